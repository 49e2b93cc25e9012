"""Settings of kohya's sd-scripts: the arguments of train_network.py as TOML, and its dataset_config with subsets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_trainer.config.foreign import kohya, kohya_flow, kohya_network
from lora_trainer.config.foreign.report import Reading, Translation, find, is_on, number, section, sections
from lora_trainer.config.yaml_text import file_text
from lora_trainer.errors import UserError

TOOL = "sd-scripts"

# What train_network.py does where a setting is not given, and this program would do otherwise.
DEFAULTS = {"lr_scheduler": "constant", "network_dim": 4, "max_train_steps": 1600, "max_token_length": 75,
            "enable_bucket": False, "max_bucket_reso": 1024, "train_batch_size": 1}  # fmt: skip

NAMES = """
    network_module network_args network_alpha optimizer_type optimizer_args learning_rate unet_lr text_encoder_lr
    lr_scheduler lr_warmup_steps max_train_steps max_train_epochs loss_type save_precision min_snr_gamma
    min_timestep max_timestep resolution masked_loss alpha_mask sample_prompts dataset_config dataset_repeats
    datasets general conv_dim conditioning_data_dir network_dim bucket_reso_steps
""".split()
"""What is read here beside the names of ``kohya.py``."""

_OF_DATASETS = ("image_dir", "num_repeats", "class_tokens", "is_reg", "metadata_file", "custom_attributes")
_NETWORKS = {
    "networks.lora": "lora", "lycoris.kohya": "locon", "networks.loha": "loha", "networks.lokr": "lokr",
    "networks.lora_flux": "lora", "networks.lora_sd3": "lora",
}  # fmt: skip


def is_dataset_config(values: Mapping[str, Any]) -> bool:
    return isinstance(values.get("datasets"), list)


def translate(values: Mapping[str, Any], folder: Path | None, known: set[str]) -> Translation:
    """``values``: the file's settings. Raises UserError for several folders that cannot be trained together."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and name not in ("general", "optimizer_args"):  # sections only group
            flat.update(value)
        else:
            flat[name] = value
    translation = Translation(TOOL)
    data: dict[str, Any] = {name: flat.pop(name) for name in ("general", "datasets") if name in flat}
    given = bool(flat)
    reading = Reading(translation, flat, folder=folder)
    named = reading.pop("dataset_config")
    if named and not data:
        data = _read_dataset_config(str(named), folder, translation)
    if data:  # goes before the arguments of the same name
        _datasets(data, translation, _family(reading))
        reading.ignore("train_data_dir", "reg_data_dir", "in_json", "resolution", "train_batch_size")
        reading.ignore(*(theirs for theirs, ours in kohya.SAME.items() if ours in translation.settings))
    if given:
        _arguments(reading, known)
    else:
        _defaults(reading, "enable_bucket", "max_bucket_reso")
        reading.take_all(kohya.SAME)
    return translation


def set_aside(values: Mapping[str, Any]) -> Translation:
    """A file with our names, into which some of sd-scripts' were carried over that mean nothing here."""
    translation = Translation("this program, with some of sd-scripts")
    reading = Reading(translation, values)
    _other_forms(reading)
    reading.cannot(kohya_flow.INSTEAD)
    reading.ignore(*kohya.NOTHING, *kohya_flow.NAMES)
    if str(reading.left.get("network_module", "")) in ("", "networks.lora"):
        reading.ignore("network_module")
    if "unet_lr" in reading.left and "learning_rate" in reading.left:
        reading.note(f"unet_lr ({reading.left['unet_lr']}) counts, not learning_rate.")
        del reading.left["learning_rate"]
    reading.cannot(kohya.CANNOT, kohya.HARMLESS)
    translation.settings.update(reading.left)
    return translation


def has_other_forms(values: Mapping[str, Any]) -> bool:
    """Whether settings that have our names are written as sd-scripts takes them."""
    warmup = number(values.get("lr_warmup_steps"))
    return (
        (isinstance(warmup, float) and 0 < warmup < 1)
        or any(isinstance(values.get(name), list) for name in ("resolution", "text_encoder_lr"))
        or ("clip_skip" in values and number(values["clip_skip"]) == 0)
    )


def _other_forms(reading: Reading) -> None:
    left = reading.left
    if has_other_forms({"lr_warmup_steps": left.get("lr_warmup_steps")}):
        kohya.warmup(reading, "lr_warmup_steps")
    if isinstance(left.get("resolution"), list):
        reading.take("resolution", "resolution", kohya.resolution)
    if isinstance(left.get("text_encoder_lr"), list):
        reading.take("text_encoder_lr", "text_encoder_lr",
                     lambda value: kohya.one_rate(reading, "text_encoder_lr", value))  # fmt: skip
    if number(left.get("clip_skip", 1)) == 0:
        reading.ignore("clip_skip")
    kohya_network.arguments(reading, kohya.pairs(reading.pop("network_args")))


def _arguments(reading: Reading, known: set[str]) -> None:
    family = _family(reading)
    module = str(reading.pop("network_module") or "networks.lora")
    if family is not None:
        reading.ignore("max_token_length")  # of CLIP in Stable Diffusion alone
    _defaults(reading, *(name for name in DEFAULTS if name != "max_token_length" or family is None))
    arguments = kohya.pairs(reading.pop("network_args"))
    lycoris = module == "lycoris.kohya"
    algorithm = str(arguments.get("algo", "lora")) if lycoris else _NETWORKS.get(module, module)
    convolutions, unet_only = is_on(arguments.get("conv_dim")), False
    if lycoris:  # which trains the convolutions with the rank of the others where they have none of their own
        convolutions, unet_only = kohya_network.lycoris_preset(
            reading, "network_args.preset", arguments.pop("preset", None), family
        )
        if not arguments.get("conv_dim"):
            arguments["conv_dim"] = reading.left.get("network_dim")
            arguments.setdefault("conv_alpha", reading.left.get("network_alpha", 1))
    name = "network_args.algo" if lycoris else "network_module"
    unet_only = unet_only or is_on(reading.left.get("network_train_unet_only"))
    text_only = is_on(reading.left.get("network_train_text_encoder_only"))
    if family is not None:
        kohya_flow.read_network(reading, arguments, "network_args.")
        convolutions, unet_only = False, unet_only or kohya_flow.text_encoders_idle(reading, family)
    kohya_network.network(reading, algorithm, arguments, convolutions=convolutions, name=name)
    kohya.rates(reading, unet_only=unet_only, text_encoder_only=text_only)
    kohya.optimizer(reading)
    kohya.schedule(reading)
    kohya.warmup(reading, "lr_warmup_steps")
    kohya.length(reading, reading.pop("max_train_epochs"), reading.pop("max_train_steps"))
    if "dataset_repeats" in reading.left:
        reading.take("dataset_repeats", "repeats", number)
    _previews(reading)
    kohya.common(reading, family)
    kohya_flow.read(reading, family)
    reading.ignore(*kohya.NOTHING)
    reading.cannot(kohya.CANNOT, kohya.HARMLESS)
    reading.finish(known)


def _family(reading: Reading) -> str | None:
    return kohya_flow.family_of(str(reading.left.get("network_module") or "networks.lora"), reading.left)


def _defaults(reading: Reading, *names: str) -> None:
    """What sd-scripts takes for those of the names that are not given."""
    for name in names:
        value = DEFAULTS[name]
        if name in reading.left or _decided(reading, name) or (name == "max_bucket_reso" and not _buckets(reading)):
            continue
        reading.left[name] = value
        if name != "max_train_steps" or "max_train_epochs" not in reading.left:
            reading.note(f"{name} is not given: sd-scripts takes {value}.")


def _buckets(reading: Reading) -> bool:
    return is_on(reading.left.get("enable_bucket")) or is_on(reading.translation.settings.get("enable_bucket"))


def _decided(reading: Reading, name: str) -> bool:
    """Whether a dataset_config has said it already."""
    ours = kohya.SAME.get(name)
    return ours in reading.translation.settings


def _previews(reading: Reading) -> None:
    """``sample_prompts``: a file of prompts, one a line."""
    named = reading.pop("sample_prompts")
    if named is None:
        return
    path = find(named, reading.folder)
    if path is None or path.suffix.lower() not in (".txt", ""):
        reading.unmet("sample_prompts", named, "write the prompts as preview_prompts, one a line")
        return
    prompts = [line.strip() for line in file_text(path).splitlines()]
    reading.set("sample_prompts", "preview_prompts", [line for line in prompts if line and not line.startswith("#")])


def _read_dataset_config(name: str, folder: Path | None, translation: Translation) -> dict[str, Any]:
    from lora_trainer.config.foreign.formats import parse_any

    path = find(name, folder)
    if path is None:
        raise UserError(
            f"dataset_config names {name}, which "
            + ("is not there." if folder is not None else "lies on a disk; only what is pasted is read here."),
            field="dataset_config",
            remedy="Check the path." if folder is not None else "Paste its lines below the others.",
        )
    translation.notes.append(f"The pictures are those of {path}.")
    return parse_any(file_text(path), str(path))


def _datasets(data: Mapping[str, Any], translation: Translation, family: str | None) -> None:
    """[general], [[datasets]] and [[datasets.subsets]]: what stands in a lower one counts."""
    general = section(data.get("general"), "general")
    subsets: list[dict[str, Any]] = []
    for one in sections(data.get("datasets"), "datasets"):
        shared = {**general, **{name: value for name, value in one.items() if name != "subsets"}}
        subsets += [{**shared, **subset} for subset in sections(one.get("subsets"), "datasets.subsets")]
    training = [subset for subset in subsets if not subset.get("is_reg")]
    regularization = [subset for subset in subsets if subset.get("is_reg")]
    if not training:
        raise UserError("names no folder with pictures.", field="datasets", remedy="Give a subset its image_dir.")
    if len(regularization) > 1:
        raise UserError(
            f"names {len(regularization)} folders of regularization pictures; there can be one here.",
            field="datasets", remedy="Put them into one folder, each in a sub-folder such as 1_person.",
        )  # fmt: skip
    first, *others = training
    _one_folder(first, translation, family)
    _further_folders(others, translation)
    for subset in regularization:
        reading = Reading(translation, {"image_dir": subset.get("image_dir")}, "datasets.subsets.")
        reading.take("image_dir", "reg_data_dir")
        repeats, words = subset.get("num_repeats", 1), str(subset.get("class_tokens") or "")
        if (repeats != 1 or words) and not _says(str(subset.get("image_dir")), repeats, words):
            translation.notes.append(
                f"Regularization pictures: name the folder {repeats}_{words or 'class'}, which says how often they "
                "are seen and their caption."
            )
    for name in sorted({name for subset in training for name in subset} - set(_OF_DATASETS)):
        values = [subset.get(name) for subset in training]
        if any(value != values[0] for value in values):
            translation.notes.append(f"{name} differs between the folders; {values[0]} counts for all of them.")


def _one_folder(subset: Mapping[str, Any], translation: Translation, family: str | None) -> None:
    reading = Reading(translation, subset, "datasets.")
    folder = str(reading.left.get("image_dir") or "")
    reading.take("image_dir", "train_data_dir")
    reading.take("metadata_file", "metadata_path")
    reading.take("num_repeats", "repeats", number)
    reading.take("class_tokens", "default_caption")
    repeats = number(subset.get("num_repeats", 1))
    if (label := _label(folder)) and label[0] != repeats:
        translation.notes.append(
            f"The name of {folder} says {label[0]} repeats, which counts here; num_repeats says {repeats}. Rename it."
        )
    reading.take("batch_size", "batch_size", number)
    reading.ignore("is_reg", "custom_attributes")
    if is_on(reading.left.get("enable_wildcard")):
        reading.take("enable_wildcard", "wildcards", is_on)
    reading.ignore("enable_wildcard")
    for name in ("keep_tokens", "resolution"):
        if name in reading.left:
            reading.take(name, name, kohya.resolution if name == "resolution" else number)
    for theirs, ours in kohya.SAME.items():
        if theirs in reading.left:
            reading.take(theirs, ours)
    kohya.bucket_step(reading, family)
    if is_on(reading.left.get("alpha_mask")) or is_on(reading.left.get("conditioning_data_dir")):
        translation.settings["use_masks"] = True
    reading.take_unless_off("conditioning_data_dir", "mask_dir")
    reading.ignore("alpha_mask", *kohya.NOTHING)
    reading.cannot(kohya.CANNOT, kohya.HARMLESS)
    reading.finish()


def _further_folders(subsets: list[dict[str, Any]], translation: Translation) -> None:
    folders = []
    for subset in subsets:
        repeats, words = number(subset.get("num_repeats", 1)), str(subset.get("class_tokens") or "").strip()
        folders.append(f"{repeats}_{words}={subset.get('image_dir')}")
    if folders:
        Reading(translation, {}, "datasets.subsets.").set("image_dir", "more_folders", folders)


def _label(folder: str) -> tuple[int, str] | None:
    """What a folder's own name says: ``10_dog`` -> (10, "dog")."""
    repeats, underscore, words = Path(folder.replace("\\", "/")).name.partition("_")
    counts = underscore and words and repeats.isdecimal() and len(repeats) <= 5
    return (int(repeats), words) if counts else None


def _says(folder: str, repeats: Any, words: str) -> bool:
    return _label(folder) == (repeats, words)
