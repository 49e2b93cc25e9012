"""The settings of the pictures and captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_trainer.config.facts import setting


@dataclass(frozen=True)
class DataSettings:
    train_data_dir: str = setting("", decides=False, path="read", given_by="steps")
    """Folder with the pictures, sub-folders too; for a language model a .jsonl or .json file, or a folder with such
    files."""

    more_folders: list[str] = setting([], task="image", decides=False, path="read", separator="\n")
    """Further folders with pictures, one a line; 10_dog=PATH says how often its pictures are seen in an epoch and what
    those without a caption show, as the name of a folder 10_dog does."""

    metadata_path: str | None = setting(None, task="image", decides=False, path="read")
    """metadata.csv or metadata.jsonl with the captions; empty looks for one in the folder."""

    reg_data_dir: str | None = setting(None, task="image", decides=False, path="read")
    """Folder with regularization pictures: what the class looks like without your subject."""

    prior_loss_weight: float = setting(1.0, task="image", minimum=0, maximum=10)
    """Weight of a regularization picture in the loss; a picture of yours has weight 1."""

    preserve: float = setting(0.0, task="image", minimum=0, maximum=0.9)
    """Share of the pictures that help to keep what the base model knows: shown without the trigger word and bold parts,
    they are to be answered as the base does. Each takes a third more time."""

    preserve_words: list[str] = setting([], task="image", separator=",")
    """Words that stand in place of the trigger word and bold parts for preserve: other things of the same kind,
    which are to stay as they are. Empty takes ordinary things."""

    preserve_pictures: int = setting(0, task="image", minimum=0, maximum=1000)
    """Pictures of other things that the base model draws before the training, which preserve then shows in place of
    yours: it keeps more and disturbs less. Each takes 20 steps of a sampler, and each size of your pictures gets one at
    least. 0 shows your pictures."""

    resolution: str = setting("auto", task="image")
    """Training size in pixels: 512, or 768x512. auto: 1024 for SDXL, 768 for SD 2 v-prediction, else 512."""

    enable_bucket: bool = setting(True, task="image")
    """Keep each picture's aspect ratio (grouped into buckets of equal size) instead of cropping all to one."""

    min_bucket_resolution: int = setting(256, task="image", minimum=64, maximum=4096)
    """Shortest side of a bucket in pixels."""

    max_bucket_resolution: int = setting(2048, task="image", minimum=64, maximum=8192)
    """Longest side of a bucket in pixels."""

    bucket_step: int = setting(64, task="image", minimum=8, maximum=512)
    """Sides of buckets are multiples of this many pixels; itself a multiple of the model's (8 for Stable Diffusion)."""

    bucket_no_upscale: bool = setting(False, task="image")
    """Train pictures that are smaller than the resolution at their own size."""

    repeats: int = setting(1, minimum=1, maximum=10_000)
    """How often each picture is seen in an epoch; a folder named 10_name sets its own."""

    flip: bool = setting(False, task="image")
    """Show pictures mirrored half of the time. Not for faces or text that must not be mirrored."""

    random_crop: bool = setting(False, task="image")
    """Crop at a random place instead of the center."""

    min_scale: float = setting(1.0, task="image", minimum=0.1, maximum=1)
    """Show pictures smaller, at a random place, their borders going on around them: by a factor from this to 1, drawn
    each time. With 0.5 a pair of something big changes small ones, too. 1 shows them whole; below, the latents of every
    epoch are encoded anew."""

    augmentations: list[str] = setting([], task="image", given_by="file", plugin="augmentation")
    """Changes made by plug-ins to each picture, every time it is shown; the latents of every epoch are encoded anew."""

    use_masks: bool = setting(False, task="image")
    """Learn only where a picture's mask is white (<picture>.mask.png or -masklabel.png beside it, or a file of its name
    in a folder masks), or where a picture is not transparent."""

    mask_dir: str | None = setting(None, task="image", decides=False, path="read")
    """Folder with masks that have the names of the pictures; for use_masks."""

    caption_extension: str = setting(".txt", task="image", decides=False)
    """Ending of caption files, tried first; .txt and .caption are found anyway."""

    caption_mapping: str | None = setting(None, task="image", decides=False, path="read")
    """File with terms and their translation (中文: english; .yaml, .csv or .tsv), applied to captions as they are
    read: Stable Diffusion's CLIP hardly understands Chinese."""

    default_caption: str = setting("", task="image", decides=False)
    """Caption of the pictures that have none; empty takes the class in their folder's name, or the trigger word."""

    trigger_word: str = setting("", task="image", given_by="steps")
    """Word that activates the LoRA in a prompt; added at the start of every caption that lacks it."""

    shuffle_tags: bool = setting(False, task="image")
    """Shuffle the comma-separated parts of captions; the kept ones stay first."""

    secondary_separator: str = setting("", task="image")
    """What stands between words of a caption that stay together when it is shuffled, such as ;;; ; a comma is trained
    in its place."""

    keep_tokens: int = setting(0, task="image", minimum=0, maximum=75)
    """Parts at the start of a caption that are not shuffled or dropped (the **bold** ones never are)."""

    caption_dropout: float = setting(0.0, task="image", minimum=0, maximum=1)
    """Probability that a picture is trained without its caption."""

    wildcards: bool = setting(False, task="image")
    """Of a caption of several lines take one line each time it is seen, and of {a|b} one of the choices."""

    tag_dropout: float = setting(0.0, task="image", minimum=0, maximum=1)
    """Probability that a part of a caption is left out in a step; *mood* parts are left out twice as often."""

    weighted_captions: bool = setting(False, task="image")
    """Apply weights such as (red hat:1.2) in captions instead of removing them."""

    max_token_length: Literal[75, 150, 225] = setting(225, task="image")
    """Maximum caption length in tokens; longer captions are truncated. More than 75 are encoded in chunks of
    75."""

    chat_template: Literal["auto", "own", "llama2", "chatml", "glm4", "chatglm3", "alpaca", "plain"] = setting(
        "auto", task="text"
    )
    """How a conversation is written for a language model. own: by the template in the model's folder. auto: own where
    there is one, else what fits the model."""

    system_prompt: str = setting("", task="text")
    """What the model is told before every conversation that has no system prompt of its own."""

    max_length: int = setting(1024, minimum=8, maximum=1_000_000, fills_memory=True, task="text")
    """Maximum length of a conversation in tokens; longer ones are cut at their end, and reported."""

    cache_dir: str | None = setting(None, decides=False, path="write", given_by="job")
    """Where encoded pictures and captions are kept; empty for <output_dir>/cache."""
