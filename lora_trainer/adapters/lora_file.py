"""Reading LoRA files: kohya's, ours, LyCORIS's, and diffusers'/PEFT's layouts, as one thing."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_trainer.adapters import algebra
from lora_trainer.adapters.base import Target, weight_shape
from lora_trainer.adapters.tensor_file import open_tensors, specs_of
from lora_trainer.errors import UserError

_DOWN, _UP, _MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
_SUFFIX = re.compile(
    r"^(?P<module>.+?)\.(?P<suffix>lora_(?:down|up|mid)\.weight|lora(?:_linear_layer)?\.(?:down|up)\.weight"
    r"|lora_[AB](?:\.default)?\.weight|alpha|dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?"
    r"|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)$"
)
_ADDED = re.compile(
    r"\.(?P<suffix>w_norm|b_norm|diff|diff_b|set_weight|bias|lora_(?:A|B|up|down)(?:\.default)?\.bias|lora_bias)$"
)
"""Differences that stand beside a low-rank change and leave its meaning as it is: of norms, biases, whole weights."""
_KINDS = {"lora": "lora_down.weight, lora_up.weight", "loha": "hada_…", "lokr": "lokr_…"}


@dataclass(frozen=True)
class ModuleWeights:
    """What a file holds for one layer. ``tensors``: by kohya's or LyCORIS's suffix, in the file's number format."""

    name: str
    kind: str  # "lora" | "loha" | "lokr"
    tensors: dict[str, Tensor]
    alpha: float | None

    @property
    def rank(self) -> int | None:
        """None for a LoKr of two whole matrices, which has none."""
        tensors = self.tensors
        if self.kind == "lora":
            return tensors[_DOWN].shape[0]
        for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in tensors:
                return tensors[name].shape[0]
        return None

    @property
    def scale(self) -> float:
        """alpha / rank; 1 where the file gives no alpha or the layer has no rank, as every reader takes it."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def dora_scale(self) -> Tensor | None:
        """DoRA's magnitudes in fp32: (1, in[, 1, 1]) as A1111 reads them, or (out, 1[, 1, 1]) as PEFT and LyCORIS from
        3.2 on write them."""
        scale = self.tensors.get("dora_scale")
        return None if scale is None else scale.float()

    @property
    def is_per_output(self) -> bool:
        """Whether the magnitudes are those of the rows of the weight, one for each output."""
        scale = self.dora_scale
        return scale is not None and scale.shape[0] > 1

    def delta(self, shape: Sequence[int]) -> Tensor:
        """ΔW in fp32, as ``shape``; without DoRA's magnitudes. Raises ValueError when it does not fit that shape."""
        t = {name: tensor.float() for name, tensor in self.tensors.items()}
        if self.kind == "lora":
            down, up = t[_DOWN], t[_UP]
            product = algebra.tucker_delta(down, t[_MID], up) if _MID in t else algebra.low_rank_delta(down, up)
        elif self.kind == "loha":
            w1, w2 = (_matrix(t, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
            product = algebra.hadamard_delta(w1, w2, w1.shape)
        else:
            w1, w2 = _matrix(t, "lokr_w1", ""), _matrix(t, "lokr_w2", "lokr_t2")
            full = (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:])
            product = algebra.kronecker_delta(w1, w2, full)
        if product.numel() != torch.Size(shape).numel() or product.shape[0] != shape[0]:
            raise ValueError(f"{tuple(product.shape)} does not fit {tuple(shape)}")
        return product.reshape(*shape) * self.scale

    def change(self, weight: Tensor) -> Tensor:
        """What is added to ``weight`` (fp32) at full strength: ΔW, and with DoRA what becomes of it.

        Raises ValueError when it does not fit.
        """
        delta = self.delta(weight.shape)
        if self.dora_scale is None:
            return delta
        axis, side = (0, "outputs") if self.is_per_output else (1, "inputs")
        if self.dora_scale.numel() != weight.shape[axis]:
            raise ValueError(f"dora_scale has {self.dora_scale.numel()} values for {weight.shape[axis]} {side}")
        shape = [1] * weight.dim()
        shape[axis] = -1
        return algebra.decompose(weight, delta, self.dora_scale.reshape(shape), axis) - weight

    def is_finite(self) -> bool:
        tensors_finite = all(bool(torch.isfinite(tensor.float()).all()) for tensor in self.tensors.values())
        return tensors_finite and (self.alpha is None or math.isfinite(self.alpha))


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file in memory. ``modules`` by the name in the file: a kohya name, or a dotted diffusers path.

    unsupported: names of tensors that are not read: differences of norms and biases, networks of another kind.
    """

    path: Path
    modules: dict[str, ModuleWeights]
    metadata: dict[str, str]
    unsupported: tuple[str, ...] = ()

    def match(self, targets: Iterable[Target]) -> tuple[dict[str, ModuleWeights], list[str]]:
        """Whose layers are whose: weights by the target's kohya name, and the file's names that fit no target."""
        targets = list(targets)
        known = {alias: target.kohya_name for target in targets for alias in _aliases(target)}
        matched = {known[name]: weights for name, weights in self.modules.items() if name in known}
        used = set(known)
        for target in targets:
            if target.kohya_name in matched:
                continue
            if target.swapped and (weights := self._named(_network_aliases(target.diffusers_name))) is not None:
                matched[target.kohya_name] = _swapped(self.path, target, weights)
                used.add(weights.name)
            elif target.split:
                parts = [(self._named(_network_aliases(name)), rows) for name, rows in target.split]
                if found := [weights.name for weights, _ in parts if weights is not None]:
                    matched[target.kohya_name] = _fused(self.path, target.kohya_name, parts)
                    used.update(found)
        return matched, [name for name in self.modules if name not in used]

    def _named(self, names: Iterable[str]) -> ModuleWeights | None:
        return next((self.modules[name] for name in names if name in self.modules), None)

    def left_out(self) -> list[str]:
        """What the file holds beside its layers, in sentences."""
        counts = Counter(found["suffix"] for name in self.unsupported if (found := _ADDED.search(name)))
        others = [name for name in self.unsupported if not _ADDED.search(name)]
        sentences = []
        if counts:
            kinds = ", ".join(f"{count} × {suffix}" for suffix, count in sorted(counts.items()))
            sentences.append(
                f"It also holds differences of normalization layers, biases or whole weights ({kinds}), which are not "
                "trained here and are left out."
            )
        if others:
            sentences.append(f"{len(others)} tensors are of a kind unknown here, such as {others[0]}.")
        return sentences

    def __repr__(self) -> str:
        return f"LoraFile({str(self.path)!r}, {len(self.modules)} modules)"


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA file (.safetensors), or the one in a folder that diffusers or PEFT has saved.

    Raises:
        UserError: missing, damaged, no LoRA, or tensors of a layer that do not belong together.
    """
    path = _lora_path(Path(path))
    groups: dict[str, dict[str, Tensor]] = {}
    unsupported = []
    with open_tensors(path) as handle:
        metadata = dict(handle.metadata() or {})
        names = [spec.name for spec in specs_of(handle, path)]
        for name in names:
            # diffusers before 0.22 kept attention's LoRA in the processor: …attn1.processor.to_q_lora.down.weight
            new_name = name.replace(".processor.to_out_lora.", ".to_out.0.lora.").replace("_lora.", ".lora.")
            found = _SUFFIX.match(new_name)
            if found is None:
                unsupported.append(name)
                continue
            module = found["module"].replace(".processor.", ".").removeprefix("base_model.model.")
            # A copy: the file's pages must not be needed any more when somebody replaces it.
            tensor = handle.get_tensor(name).clone()
            if found["suffix"].startswith("lora_magnitude_vector"):  # PEFT's: (out,), or (1, out, 1, 1)
                tensor = tensor.reshape(-1, 1)
            groups.setdefault(module, {})[_canonical(found["suffix"])] = tensor
    if not any(set(tensors) - {"alpha"} for tensors in groups.values()):
        message = f"{path.name} is no LoRA: it holds no layers of a LoRA."
        if any(name.startswith("model.diffusion_model.") for name in names):
            message = f"{path.name} is a whole checkpoint: it holds no layers of a LoRA."
        raise UserError(message, remedy="Choose a LoRA file.")
    _refuse_other_meanings(path, groups, unsupported)
    alphas = _peft_alphas(path, metadata)
    modules = {name: _module(path, name, tensors, alphas) for name, tensors in groups.items()}
    return LoraFile(path, modules, metadata, tuple(unsupported))


def _refuse_other_meanings(path: Path, groups: dict[str, dict[str, Tensor]], unsupported: list[str]) -> None:
    """Raises UserError for an unknown tensor beside those of a layer: it may change what they mean."""
    for name in unsupported:
        stem = name
        while "." in stem:
            stem = stem.rpartition(".")[0]
            if stem in groups and not _ADDED.search(name):
                raise UserError(
                    f"{path.name}: {name} changes what the other tensors of {stem} mean, and is not known here.",
                    remedy="Save the LoRA in kohya's layout, or merge it with the program that made it.",
                )


def _lora_path(path: Path) -> Path:
    if path.is_dir():
        for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"The folder {path} holds no pytorch_lora_weights.safetensors.")
    if path.is_file() and path.suffix.lower() in {".pt", ".pth", ".ckpt", ".bin"}:
        raise UserError(
            f"{path.name} is no .safetensors file.", remedy="Convert it first: such files can carry programs."
        )
    return path


def _canonical(suffix: str) -> str:
    if suffix.startswith(("lora_A", "lora.down", "lora_linear_layer.down")):
        return _DOWN
    if suffix.startswith(("lora_B", "lora.up", "lora_linear_layer.up")):
        return _UP
    return "dora_scale" if suffix.startswith("lora_magnitude_vector") else suffix


def _module(path: Path, name: str, tensors: dict[str, Tensor], peft_alphas: dict[str, dict]) -> ModuleWeights:
    def problem(what: str, kind: str = "") -> UserError:
        return UserError(what.format(path.name, name, kind), remedy="The file is damaged or of an unknown kind.")

    alpha_tensor = tensors.pop("alpha", None)
    if alpha_tensor is not None and alpha_tensor.numel() != 1:
        raise problem("{0}: the tensors of {1} have an alpha that is not one number.")
    if any(not tensor.is_floating_point() or not tensor.numel() for tensor in tensors.values()):
        raise problem("{0}: the tensors of {1} are empty or no fractional numbers.")
    kinds = {
        "lora" if key.startswith("lora_") else "loha" if key.startswith("hada") else "lokr"
        for key in tensors
        if key != "dora_scale"
    }
    if len(kinds) != 1:
        raise problem("{0}: the tensors of {1} are incomplete or of several kinds.")
    kind = kinds.pop()
    if not _consistent(kind, {key: tuple(tensor.shape) for key, tensor in tensors.items()}):
        raise problem("{0}: the tensors of {1} do not belong together ({2}).", _KINDS[kind])
    if "dora_scale" in tensors:
        tensors["dora_scale"] = _dora_scale(tensors["dora_scale"], problem)
    weights = ModuleWeights(name, kind, tensors, None if alpha_tensor is None else float(alpha_tensor))
    if alpha_tensor is None and weights.rank and (config := peft_alphas.get(name.split(".")[0], peft_alphas.get(""))):
        alpha = next(
            (value for key, value in config.get("alpha_pattern", {}).items() if name.endswith(key)),
            config.get("lora_alpha", weights.rank),
        )
        weights = ModuleWeights(name, kind, tensors, alpha * (weights.rank**0.5 if config.get("use_rslora") else 1.0))
    return weights


def _dora_scale(scale: Tensor, problem: Callable[[str], UserError]) -> Tensor:
    """(1, in), or (out, 1) where the file has one number for each output."""
    if sum(side != 1 for side in scale.shape) > 1:
        raise problem("{0}: the tensors of {1} have a dora_scale that is neither per input nor per output.")
    return scale.reshape(1, -1) if scale.dim() < 2 or scale.shape[0] == 1 else scale.reshape(-1, 1)


def _consistent(kind: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the factors are all there and their inner dimensions agree."""
    if kind == "lora":
        down, up, mid = shapes.get(_DOWN, ()), shapes.get(_UP, ()), shapes.get(_MID)
        if len(down) not in (2, 4) or len(up) not in (2, 4) or any(side != 1 for side in up[2:]):
            return False
        if mid is not None:
            return len(mid) == 4 and mid[:2] == (up[1], down[0]) and all(side == 1 for side in down[2:])
        return up[1] == down[0]
    if kind == "loha":
        sizes = [_matrix_shape(shapes, f"hada_w{i}", f"hada_t{i}") for i in (1, 2)]
        return sizes[0] is not None and sizes[0] == sizes[1]
    first, second = _matrix_shape(shapes, "lokr_w1", ""), _matrix_shape(shapes, "lokr_w2", "lokr_t2")
    return first is not None and second is not None and len(first) == 2


def _matrix_shape(shapes: dict[str, tuple[int, ...]], name: str, core_name: str) -> tuple[int, ...] | None:
    """Shape of a factor that is stored whole, as a product of two, or with a core; None if it is not there."""
    if name in shapes:
        return shapes[name] if len(shapes[name]) in (2, 4) else None
    a, b, core = shapes.get(f"{name}_a", ()), shapes.get(f"{name}_b", ()), shapes.get(core_name)
    if len(a) != 2 or len(b) != 2:
        return None
    if core is not None:
        return (a[1], b[1], *core[2:]) if len(core) == 4 and core[:2] == (a[0], b[0]) else None
    return (a[0], b[1]) if a[1] == b[0] else None


def _matrix(tensors: dict[str, Tensor], name: str, core_name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return algebra.tucker_core_delta(tensors[core_name], a, b) if core_name in tensors else a @ b


def _peft_alphas(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """Settings of PEFT by part of the model ("" for all): alpha is there, not among the tensors.

    diffusers writes them into the metadata (``lora_adapter_metadata``), PEFT beside the file (adapter_config.json).
    """
    source = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in metadata:
            parts: dict[str, dict] = {}
            for key, value in json.loads(metadata["lora_adapter_metadata"]).items():
                part, _, setting = key.partition(".")
                parts.setdefault(part, {})[setting] = value
            return {part: _checked_peft(config) for part, config in parts.items()}
        if path.name == "adapter_model.safetensors" and source.is_file():
            return {"": _checked_peft(json.loads(source.read_text("utf-8")))}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path.name}: PEFT's settings cannot be read ({error}).") from error
    return {}


def _checked_peft(config: dict) -> dict:
    pattern = {str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
    checked = {"alpha_pattern": pattern, "use_rslora": bool(config.get("use_rslora"))}
    if config.get("lora_alpha") is not None:
        checked["lora_alpha"] = float(config["lora_alpha"])
    return checked


def _aliases(target: Target) -> list[str]:
    """The names under which other tools store this layer as it is."""
    if target.swapped:
        return [target.kohya_name, *_original_aliases(target)]
    part, _, path = target.diffusers_name.partition(".")
    # transformers 5.6 took text_model out of CLIPTextModel's names.
    paths = [path, path.removeprefix("text_model.")]
    prefixes = {"unet": ["lora_unet"], "text_encoder": ["lora_te", "lora_te1"]}.get(target.part, ["lora_te2"])
    names = [target.kohya_name, *(f"{part}.{path}" for path in paths)]
    names += [f"{prefix}_{path.replace('.', '_')}" for prefix in prefixes for path in paths]
    if target.part != "unet":  # ComfyUI's
        encoders = ("clip_g",) if target.part == "text_encoder_2" else ("clip_l", "clip_h")
        stems = [f"{stem}{encoder}.transformer." for stem in ("", "text_encoders.") for encoder in encoders]
        return [*names, *(stem + path for stem in stems for path in paths)]
    return [*names, *_network_aliases(target.diffusers_name), *_original_aliases(target)]


def _original_aliases(target: Target) -> list[str]:
    """The names of the original implementations: input_blocks.1.1. …"""
    if not target.checkpoint_name:
        return []
    original = target.checkpoint_name.removeprefix("model.diffusion_model.")
    names = [f"{stem}{original}" for stem in ("model.diffusion_model.", "diffusion_model.", "unet.", "")]
    return names + [f"{prefix}_{original.replace('.', '_')}" for prefix in ("lora_unet", "lycoris")]


def _network_aliases(diffusers_name: str) -> list[str]:
    """The names of a layer of the denoiser in diffusers' words: PEFT's, OneTrainer's, kohya's and LyCORIS's."""
    part, _, path = diffusers_name.partition(".")
    joined = path.replace(".", "_")
    return [diffusers_name, path, f"lora_{part}_{joined}", f"lora_unet_{joined}", f"lycoris_{joined}"]


def _swapped(path: Path, target: Target, weights: ModuleWeights) -> ModuleWeights:
    """A LoRA of a layer whose halves stand the other way round here."""
    if weights.kind != "lora" or set(weights.tensors) != {_DOWN, _UP}:
        raise UserError(
            f"{path.name}: {weights.name} is another layer in this model, and only a plain LoRA of it can be read.",
            remedy="Use a file in kohya's layout.",
        )
    _check_rows(path, weights, weight_shape(target.module)[0])
    up = torch.cat(weights.tensors[_UP].chunk(2)[::-1])
    return ModuleWeights(target.kohya_name, "lora", {_DOWN: weights.tensors[_DOWN], _UP: up}, weights.alpha)


def _fused(path: Path, name: str, parts: Sequence[tuple[ModuleWeights | None, int]]) -> ModuleWeights:
    """One layer's LoRA, exactly, of those of the layers that it is elsewhere; None: it is unchanged there.

    parts: with how many of the layer's outputs each one has.
    """
    given = [weights for weights, _ in parts if weights is not None]
    if any(weights.kind != "lora" or set(weights.tensors) != {_DOWN, _UP} for weights in given):
        raise UserError(
            f"{path.name}: {given[0].name} and its like are one layer in this model, and only plain LoRAs of them can "
            "be put together.",
            remedy="Use a file in kohya's layout.",
        )
    downs = [weights.tensors[_DOWN].float() for weights in given]
    shared = len(given) == len(parts) and all(torch.equal(down, downs[0]) for down in downs[1:])
    rank = len(downs[0]) if shared else sum(map(len, downs))
    ups, start = [], 0
    for weights, rows in parts:
        up = torch.zeros(rows, rank)
        if weights is not None:
            own = weights.tensors[_UP].float() * weights.scale
            _check_rows(path, weights, rows)
            up[:, start : start + own.shape[1]] = own
            start += 0 if shared else own.shape[1]
        ups.append(up)
    down = downs[0] if shared else torch.cat(downs)
    return ModuleWeights(name, "lora", {_DOWN: down, _UP: torch.cat(ups)}, None)


def _check_rows(path: Path, weights: ModuleWeights, rows: int) -> None:
    """Raises UserError where a LoRA's layer has not so many outputs."""
    if (own := len(weights.tensors[_UP])) != rows:
        raise UserError(
            f"{path.name}: {weights.name} has {own} outputs instead of {rows}.",
            remedy="It was made for another model.",
        )
