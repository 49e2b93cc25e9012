"""Every setting of a training run: its name, type, default, limits and meaning; long groups have files of their own.

The YAML file is flat: each field below is a key of it. The same words serve the tab, the command line and the
README; the text under a field is what the tab shows as its explanation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from lora_trainer.config.changes import ChangeSettings
from lora_trainer.config.data import DataSettings
from lora_trainer.config.facts import Facts, setting
from lora_trainer.config.output import OutputSettings

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "lion", "adafactor")
MIN_SNR_GAMMA = 5.0
LR_SCHEDULERS = ("constant", "cosine", "cosine_with_restarts", "linear", "polynomial")


@dataclass(frozen=True)
class ModelSettings:
    base_model: str = setting("", decides=False, path="read", or_name=True, given_by="steps")
    """Checkpoint to train on: a .safetensors file or a diffusers folder. Inside a WebUI: its name in the list,
    or empty for the one that is loaded."""

    task: Literal["auto", "image", "words", "pair", "slider", "text"] = setting(
        "auto", decides=False, sets_pace=True, given_by="file"
    )
    """What is learned from: image (pictures with captions), words (prompts alone), pair (pictures before and after a
    change), slider (pictures of something and of its opposite) or text (rows of prompts and answers, for a language
    model). auto: text when base_model is a folder whose config.json names a language model, else image."""

    quantize: Literal["no", "nf4"] = setting("no", fills_memory=True, sets_pace=True, task="text")
    """Keep the frozen base in 4 bits (nf4): a third of its memory, slower. Needs the package bitsandbytes."""

    base_precision: Literal["stored", "fp8", "nf4"] = setting("stored", fills_memory=True, sets_pace=True, task="image")
    """Format of the frozen weights of FLUX.1, Chroma and SD 3 from a file, quantized as they are read: fp8 takes half
    the memory of bf16, nf4 little more than a quarter, slower. stored: that of the file, or of the WebUI that lends
    them."""

    offload_blocks: Literal["auto"] | int = setting(
        "auto", minimum=0, maximum=1000, decides=False, fills_memory=True, sets_pace=True, task="image"
    )
    """So many blocks of FLUX.1 (it has 57), Chroma or SD 3 from a file wait in main memory and are copied to the NVIDIA
    or AMD GPU when they compute; needs gradient_checkpointing. auto: as many as must for the training to fit into the
    memory that is free when it begins; 0 where all fits. Not yet tried on a card."""

    trust_remote_code: bool = setting(False, decides=False, given_by="file", task="text")
    """Run the Python code in the base model's folder, which ChatGLM2 and 3 need. It can do anything: trust it first."""

    vae: str | None = setting(None, task="image", decides=False, path="read", or_name=True)
    """Another VAE file (.safetensors) to encode the pictures with; empty for the base model's own."""

    text_encoders: list[str] = setting([], task="image", decides=False, path="read", given_by="file", separator="\n")
    """Files of the text encoders, for a FLUX.1, Chroma or SD 3 that has none in its file: clip_l.safetensors (not for
    Chroma), for SD 3 also clip_g.safetensors, and t5xxl_….safetensors, with T5's tokenizer.json beside it."""

    v_prediction: bool | None = setting(None, task="image")
    """Whether the base model predicts v instead of noise; empty detects it from the model."""

    device: str = setting("auto", decides=False, fills_memory=True, sets_pace=True)
    """Where to train: auto, cpu, cuda, cuda:1, mps …"""

    gpus: list[int] | None = setting(None, decides=False, sets_pace=True)
    """Numbers of the GPUs that train together, such as 0, 1, in processes beside the WebUI, which read the base model
    from its file; empty trains in the WebUI, on its own. On the command line torchrun chooses them."""

    shard_base: bool = setting(False, decides=False, fills_memory=True, sets_pace=True)
    """Each of several processes keeps a part of the base model's blocks, which are gathered when they compute (as FSDP
    does): for a FLUX.1, Chroma, SD 3 or language model larger than one card; needs gradient_checkpointing. Not yet
    tried on cards."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting("auto", fills_memory=True, sets_pace=True)
    """Number format of the computation. auto: on a GPU that of the weights which a WebUI lends (fp16 or bf16), else
    bf16 where the GPU supports it and fp16 where not; on the CPU no (fp32)."""

    gradient_checkpointing: Literal["auto"] | bool | float = setting(
        False, minimum=0, maximum=1, decides=False, fills_memory=True
    )
    """Recompute activations in the backward pass: a third of the activation memory or less, a third more time. auto:
    only in as many parts of an image model as are needed for the training to fit into the memory that is free on the
    NVIDIA or AMD GPU when it begins; not yet tried on a card. A file may give the share of the parts, such as 0.5."""

    cuda_graphs: Literal["auto", "off"] = setting("off", decides=False, fills_memory=True, sets_pace=True)
    """auto: launch a step's kernels as one CUDA graph where memory is free for it and it is faster. Not yet tried on a
    card, therefore off."""

    channels_last: Literal["auto", "off"] = setting(
        "off", task="image", decides=False, sets_pace=True, given_by="file"
    )
    """auto: on the command line, bring the weights of an SD or SDXL model's convolutions into channels last in memory,
    in those levels that are measured to be faster so. A resumed run keeps the choice; another may be made for an equal
    run, which then differs in last bits. Not yet tried on a card, therefore off."""

    compile: Literal["auto", "off"] = setting(
        "off", task="image", decides=False, fills_memory=True, sets_pace=True, given_by="file"
    )
    """auto: on the command line, compile the model's blocks with torch.compile in a run that has ten minutes left, and
    use them compiled where that is faster. Sums are rounded otherwise: a resumed run is not the same to the last bit.
    Needs torch 2.5, and Triton on a GPU. Not yet tried on a card, therefore off."""

    exact: bool = setting(False, decides=False, given_by="file")
    """Several processes (torchrun) add even large gradients in the order of one: the same LoRA to the last bit."""

    plugins: list[str] = setting([], decides=False, path="read", given_by="file")
    """Python files with further optimizers, schedulers, losses, augmentations, regularisers, captioners and model
    families. Their code is run, so a page accepts only those that whoever started it has loaded."""


@dataclass(frozen=True)
class AdapterSettings:
    adapter: Literal["lora", "loha", "lokr"] = setting("lora", fills_memory=True)
    """Type of network. lora can be loaded by every tool."""

    lora_rank: int = setting(16, minimum=1, maximum=1024, fills_memory=True)
    """Capacity of the LoRA: 8–16 for a style, 12–32 for a character. Above 32 it tends to memorize."""

    alpha: float | None = setting(None, above=0)
    """The LoRA is scaled by alpha/rank. Empty means equal to the rank."""

    conv_rank: int = setting(0, task="image", minimum=0, maximum=1024, fills_memory=True)
    """Rank for the 3×3 convolutions (LoCon); 0 does not train them."""

    conv_alpha: float | None = setting(None, task="image", above=0)
    """Alpha for the convolutions; empty means equal to conv_rank."""

    dora: bool = setting(False, task="image", fills_memory=True)
    """Train magnitude and direction of the weights separately (DoRA): slower, a little more accurate at low
    rank."""

    dropout: float = setting(0.0, minimum=0, maximum=0.95)
    """Probability that an activation inside the LoRA is set to zero in training; 0.1–0.3 with few pictures."""

    rank_dropout: float = setting(0.0, minimum=0, maximum=0.95)
    """Probability that a rank is set to zero in training."""

    module_dropout: float = setting(0.0, minimum=0, maximum=0.95)
    """Probability that the whole LoRA of a layer is switched off in a step."""

    scale_weight_norms: float | None = setting(None, above=0, maximum=1000)
    """Largest norm of a layer's change, to which it is scaled down after each step; 1 is usual, empty is off."""

    lokr_factor: int = setting(-1, task="image", minimum=-1, maximum=1024, fills_memory=True)
    """Size of the smaller Kronecker factor (lokr only); -1 splits as evenly as possible."""

    target_modules: list[str] = setting(["attention", "feed_forward", "projection"], fills_memory=True)
    """Layers of the UNet that are trained: groups (attention, feed_forward, projection), names (to_q, q_proj,
    ff.net …) or regular expressions written as /…/ ."""

    train_text_encoder: bool = setting(False, task="image", fills_memory=True)
    """Train the text encoders as well: helps with a new word, costs memory and flexibility."""

    text_encoder_target_modules: list[str] = setting(["attention", "feed_forward"], task="image", fills_memory=True)
    """Layers of the text encoders that are trained, if train_text_encoder is on."""

    block_ranks: list[int] | None = setting(None, task="image", fills_memory=True)
    """25 ranks, one per UNet block as kohya counts (SD: 12 in, middle, 12 out; SDXL: places 1–9 in, 10–12 middle,
    13–21 out); 0 leaves a block out."""

    block_lr_weights: list[float] | None = setting(None, task="image")
    """25 factors on the learning rate, one per UNet block; 0 freezes a block."""

    init_lora: str | None = setting(None, decides=False, path="read")
    """Continue from this LoRA file (.safetensors, ours or kohya's)."""


@dataclass(frozen=True)
class OptimizationSettings:
    epochs: int = setting(10, minimum=1, maximum=100_000)
    """Passes over all pictures; in each of them a picture is seen as often as its repeats say."""

    max_train_steps: int | None = setting(None, minimum=1, maximum=100_000_000)
    """Stop after this many steps, whatever the number of epochs."""

    batch_size: int = setting(1, minimum=1, maximum=256, fills_memory=True)
    """Pictures per step."""

    gradient_accumulation_steps: int = setting(1, minimum=1, maximum=1024)
    """Batches whose gradients are summed before each optimizer step: a larger effective batch without its
    memory."""

    learning_rate: float = setting(1e-4, above=0, maximum=10)
    """Learning rate of the UNet's LoRA: 1e-4 to 2e-4 with AdamW; 1 with Prodigy."""

    text_encoder_lr: float | None = setting(None, task="image", minimum=0, maximum=10, fills_memory=True)
    """Learning rate of the text encoders; empty for half of learning_rate."""

    optimizer: Literal["adamw", "adamw8bit", "prodigy", "lion", "adafactor"] = setting(
        "adamw", fills_memory=True, plugin="optimizer"
    )
    """Optimizer. adamw is safe; adamw8bit saves memory; prodigy finds its own learning rate."""

    optimizer_args: dict[str, Any] = setting({})
    """Further arguments of the optimizer, such as weight_decay: 0.01."""

    lr_scheduler: Literal["constant", "cosine", "cosine_with_restarts", "linear", "polynomial"] = setting(
        "cosine", plugin="scheduler"
    )
    """How the learning rate changes over the run."""

    lr_warmup_steps: int = setting(0, minimum=0)
    """Steps over which the learning rate rises from 0."""

    lr_warmup_ratio: float = setting(0.0, minimum=0, maximum=1)
    """The same as a share of the whole training, such as 0.1; counts where lr_warmup_steps is 0."""

    lr_cycles: int = setting(1, minimum=1, maximum=1000)
    """Restarts of cosine_with_restarts."""

    lr_power: float = setting(1.0, above=0, maximum=10)
    """Exponent of polynomial."""

    max_grad_norm: float = setting(1.0, minimum=0)
    """Maximum gradient norm; 0 does not clip."""

    ema_decay: float | None = setting(None, above=0, maximum=0.99999, fills_memory=True)
    """Save an exponential moving average of the weights, with this decay (such as 0.99); empty: none."""

    seed: int = setting(42, minimum=0, maximum=2**63 - 1)
    """Same seed, same data, same settings: same LoRA."""


@dataclass(frozen=True)
class ObjectiveSettings:
    loss: Literal["mse", "huber", "smooth_l1"] = setting("mse", task="image", plugin="loss")
    """Loss function; huber and smooth_l1 are robust to outliers."""

    huber_c: float = setting(0.1, task="image", above=0, maximum=10)
    """Threshold at which huber and smooth_l1 change from quadratic to linear."""

    min_snr_gamma: Literal["auto"] | float | None = setting("auto", task="image", above=0, maximum=100)
    """Weight the loss by the noise level (min-SNR); empty is off. auto: 5, but off for v-prediction with zero terminal
    SNR, where it would leave the high noise levels next to no weight, and with debiased_estimation."""

    debiased_estimation: bool = setting(False, task="image")
    """Weight the loss by 1/√SNR instead of min-SNR."""

    noise_offset: float = setting(0.0, task="image", minimum=0, maximum=1)
    """Adds a constant offset to the noise, so that very dark and bright pictures can be learned; 0.05 is usual."""

    multires_noise_iterations: int = setting(0, task="image", minimum=0, maximum=10)
    """Number of scales of additional noise, also for dark and bright pictures; 6 is usual."""

    multires_noise_discount: float = setting(0.3, task="image", minimum=0, maximum=1)
    """Factor by which each coarser scale is weaker."""

    input_perturbation: float = setting(0.0, task="image", minimum=0, maximum=1)
    """Adds noise to the model's input but not to its target; 0.1 is usual."""

    zero_terminal_snr: bool | None = setting(None, task="image")
    """Make the last noise level pure noise, for v-prediction models trained that way; empty detects it from the
    model."""

    min_timestep: int = setting(0, task="image", minimum=0, maximum=999)
    """Lowest timestep (noise level) that is trained."""

    max_timestep: int = setting(999, task="image", minimum=0, maximum=1000)
    """Highest timestep (noise level) that is trained, of the model's 1000 from 0 to 999."""

    regularisers: dict[str, Any] = setting({}, given_by="file", plugin="regulariser")
    """Terms made by plug-ins that are added to the loss of every step, each with its weight: name: 0.01."""

    sigma_sampling: Literal["auto", "flux_shift", "logit_normal", "sigmoid", "uniform", "shift"] = setting(
        "auto", task="image"
    )
    """How the noise level is drawn, of models that learn by flow matching (FLUX.1, Chroma, SD 3). flux_shift: more
    noise for larger pictures; logit_normal and sigmoid: most in the middle; shift: by sigma_shift. auto: the model's
    own way."""

    sigma_shift: float = setting(3.0, task="image", above=0, maximum=100)
    """Shift s of sigma_sampling: shift, which makes the noise level σ s·σ / (1 + (s - 1)·σ)."""

    latent_sampling: Literal["sample", "mean"] = setting("sample", task="image")
    """Train on a sample from the VAE's distribution, or on its mean."""

    clip_skip: int = setting(1, task="image", minimum=1, maximum=12)
    """Which layer of the text encoder is used, counted from the end (SD 1 only); 2 for anime models."""


@dataclass(frozen=True)
class TrainConfig(
    OutputSettings,
    ObjectiveSettings,
    OptimizationSettings,
    AdapterSettings,
    ChangeSettings,
    DataSettings,
    ModelSettings,
):
    """One training run, built by ``config.load`` or ``config.from_mapping``, which check it. Frozen: what a run was
    started with is what is saved beside its result."""

    @property
    def effective_alpha(self) -> float:
        return self.strength * (self.lora_rank if self.alpha is None else self.alpha)

    @property
    def effective_conv_alpha(self) -> float:
        return self.strength * (self.conv_rank if self.conv_alpha is None else self.conv_alpha)

    @property
    def strength(self) -> float:
        """By what the alpha of the LoRA is larger than the one that it is trained with."""
        return self.saved_strength if (self.task, self.pair_method) == ("pair", "alternating") else 1.0

    @property
    def effective_text_encoder_lr(self) -> float:
        return self.learning_rate / 2 if self.text_encoder_lr is None else self.text_encoder_lr

    def warmup_steps(self, total_steps: int) -> int:
        """Of a run of ``total_steps``."""
        return self.lr_warmup_steps or round(self.lr_warmup_ratio * total_steps)

    def snr_gamma(self, prediction_type: str, zero_terminal_snr: bool) -> float | None:
        """min-SNR's γ for a model of this kind; None where the noise levels weigh alike."""
        if self.min_snr_gamma != "auto":
            return self.min_snr_gamma
        off = self.debiased_estimation or (prediction_type == "v_prediction" and zero_terminal_snr)
        return None if off else MIN_SNR_GAMMA

    @property
    def given_offload_blocks(self) -> int:
        """The number that ``offload_blocks`` gives; 0 for auto, which is decided when a run begins."""
        return 0 if self.offload_blocks == "auto" else self.offload_blocks

    @property
    def given_gradient_checkpointing(self) -> float:
        """The share of the model's parts that ``gradient_checkpointing`` gives; 0 for auto, which is decided when a run
        begins."""
        return 0.0 if self.gradient_checkpointing == "auto" else float(self.gradient_checkpointing)

    @property
    def text_encoders_learn(self) -> bool:
        return self.train_text_encoder and self.effective_text_encoder_lr > 0


GROUPS: tuple[tuple[str, type], ...] = (
    ("model", ModelSettings),
    ("data", DataSettings),
    ("change", ChangeSettings),
    ("adapter", AdapterSettings),
    ("optimization", OptimizationSettings),
    ("objective", ObjectiveSettings),
    ("output", OutputSettings),
)
"""The groups in the order in which a person meets them; the tab's Advanced sections and the saved YAML follow it."""

FACTS: dict[str, Facts] = {one.name: one.metadata["facts"] for _, group in GROUPS for one in fields(group)}
"""The facts of every setting."""


def settings_where(holds: Callable[[Facts], bool]) -> tuple[str, ...]:
    """Names of the settings of whose facts ``holds`` is true, in the order of the groups."""
    return tuple(name for name, facts in FACTS.items() if holds(facts))
