"""LoRA adapters in the layout of PEFT: written, and read to be trained or to be added to weights while these are read.

W + scale * B A, computed in float32 and rounded to the dtype of W; scale is alpha / r, or alpha / sqrt(r) with
use_rslora. An adapter that holds anything else, or a matrix that fits no weight, is refused: none is read without
effect. fan_in_fan_out has none in PEFT either, because all layers of our families are linear or convolutions.

Source: PEFT's tuners/lora/{config,layer,model}.py and utils/other.py (0.21.2; older versions know fewer keys).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import save_file
from torch import Tensor

from megatron_llave.config.lora import LoraConfig
from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json, write_json
from megatron_llave.hub import is_name, local_folder
from megatron_llave.models.hf.config_json import Section
from megatron_llave.models.hf.tensor_files import TensorFiles

ADAPTER_CONFIG, ADAPTER_STEM = "adapter_config.json", "adapter_model"
MATRIX = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")

FIXED = {
    "peft_type": ("LORA", "LORA"),
    "bias": ("none", "none"),
    "use_dora": (False, False),
    "lora_bias": (False, False),
    "use_qalora": (False, False),
}
"""Key -> the value of a missing key, and the only value that is run."""
INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights with which training starts from the weights of the base; others change those first."""
HARMLESS = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "fan_in_fan_out"),
    *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "ensure_weight_tying"),
}
"""Further keys that may have any value: those that are read here, and those that merged weights do not depend on."""


@dataclass(frozen=True)
class Update:
    """What is added to one weight."""

    down: str
    """Name of A [r, in]."""
    up: str
    """Name of B [out, r]."""
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter for the weights of a Hugging Face folder."""

    files: TensorFiles
    updates: Mapping[str, Update] = field(default_factory=dict)
    """By canonical name of the weight."""

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight of a canonical name with its update, if it has one."""
        if name not in self.updates:
            return weight
        update = self.updates[name]
        down, up = (self.files.read(part).float().flatten(1) for part in (update.down, update.up))
        change = update.scale * (up @ down)
        return (weight.float() + change.view(weight.shape)).to(weight.dtype)


def in_transformers(module: str, layout: str) -> str:
    """Return how transformers (4.57 and 5) calls a module of canonical name, in a model with vocabulary projection."""
    return "model." + module.replace("language_model.model.", "language_model.", 1)


def write_adapter(
    folder: Path,
    matrices: Mapping[str, tuple[Tensor, Tensor]],
    lora: LoraConfig,
    base: str | None,
    revision: str | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing folder.

    Args:
        folder: an existing folder.
        matrices: A [r, in] and B [out, r] by the name of their module in the model that PEFT is to load them into.
        lora: rank, alpha and dropout.
        base: name of the base on the hub; None: it has none.
        revision: the base's commit there; None: it is not known.

    Raises:
        OSError: a file cannot be written.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "target_modules": sorted(matrices),
    }
    tensors = {
        f"base_model.model.{module}.lora_{part}.weight": matrix.contiguous()
        for module, both in matrices.items()
        for part, matrix in zip("AB", both)
    }
    save_file(tensors, folder / f"{ADAPTER_STEM}.safetensors", {"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, config)


def find_weights(source: str | Path, base: str | Path | None) -> tuple[Path, Path | None]:
    """Find the weights of a folder that may hold an adapter beside them or instead of them.

    Args:
        source: a Hugging Face folder, or one with an adapter; each folder may be the name of a model on the hub.
        base: folder of the weights that the adapter is for; None: `source` if it has weights, else the folder or the
            model of the hub that base_model_name_or_path names.

    Returns:
        The folder of the weights, and that of the adapter; None: there is no adapter.

    Raises:
        CheckpointError: there is a base without an adapter, or an adapter without a base.
    """
    source = local_folder(source)
    file = source / ADAPTER_CONFIG
    if not file.is_file():
        if base is not None:
            raise CheckpointError(f"{file} is missing; a base is given for the folder of an adapter alone")
        return source, None
    if base is not None:
        return local_folder(base), source
    if (source / "config.json").is_file() and [*source.glob("model*.safetensors")]:
        return source, source
    section = Section(file, "", read_json(file, error=CheckpointError))
    named = section.values.get("base_model_name_or_path")
    if isinstance(named, str):
        for folder in (Path(named), source / named):
            if named and (folder / "config.json").is_file():
                return folder, source
        if is_name(named):
            revision = section.values.get("revision")
            try:
                return local_folder(f"{named}@{revision}" if revision and "@" not in named else named), source
            except CheckpointError as error:
                said = f"{file} has base_model_name_or_path={named!r}"
                raise CheckpointError(
                    f"{error}; {said} as the base: get it, or name the base's folder with --base"
                ) from error
    raise section.refuse("base_model_name_or_path", "a folder on this machine; name the base's folder with --base")


def read_adapter(
    folder: Path, base: Path, canonical_name: Callable[[str], str], shapes: Mapping[str, tuple[int, ...]]
) -> Adapter:
    """Read an adapter's configuration and the headers of its weights.

    Args:
        folder: has adapter_config.json and adapter_model.safetensors.
        base: the folder with the weights.
        canonical_name: of a tensor of the base.
        shapes: of the base's tensors by canonical name.

    Raises:
        CheckpointError: the adapter is damaged, not LoRA as it is run here, or does not fit the weights.
    """
    section = _read_config(folder / ADAPTER_CONFIG)
    _check_tokenizers(folder, base)
    files = TensorFiles(folder, ADAPTER_STEM)
    parts: dict[str, dict[str, str]] = {}
    modules: dict[str, str] = {}
    for spelling, info in files.tensors.items():
        match = MATRIX.fullmatch(spelling)
        if match is None:
            what = (
                "is no lora_A or lora_B of a weight, so it is not read; merge the adapter with peft (merge_and_unload)"
            )
            raise CheckpointError(f"{info.file}: {spelling} {what}")
        name = canonical_name(f"{match['module']}.weight")
        if name not in shapes:
            raise CheckpointError(f"{info.file}: {spelling} fits no weight in {base}")
        if match["part"] in parts.setdefault(name, {}):
            raise CheckpointError(f"{info.file}: {spelling} and {parts[name][match['part']]} are for the same weight")
        parts[name][match["part"]] = spelling
        modules[name] = match["module"]
    if not parts:
        raise CheckpointError(
            f"{folder} has an adapter without weights; adapter_model.safetensors must have lora_A and lora_B"
        )
    return Adapter(files, {name: _update(section, files, modules[name], parts[name], shapes[name]) for name in parts})


def _read_config(file: Path) -> Section:
    section = Section(file, "", read_json(file, error=CheckpointError))
    section.check(FIXED)
    init = section.values.get("init_lora_weights", True)
    if init not in INITS:
        raise section.refuse("init_lora_weights", "true: this way to begin changes the weights of the base")
    for key, value in section.values.items():
        if key not in HARMLESS and key not in FIXED and value not in (None, False, [], {}, ""):
            raise section.refuse(key, "null; merge the adapter with peft (merge_and_unload)")
    return section


def _check_tokenizers(folder: Path, base: Path) -> None:
    """Refuse an adapter whose tokenizer has other ids than that of the base, which is the one that is kept."""
    both = [path / "tokenizer.json" for path in (folder, base)]
    if folder == base or not all(path.is_file() for path in both):
        return
    try:
        ours, theirs = (tokenizers.Tokenizer.from_file(str(path)).get_vocab() for path in both)
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(f"{both[0]} or {both[1]} is not readable: {' '.join(str(error).split())}") from error
    if ours != theirs:
        token = next(iter(sorted(ours.items() ^ theirs.items())))[0]
        what = f"{both[0]}: {token!r} must have the id that it has in {both[1]}"
        raise CheckpointError(f"{what}; if no update depends on it, remove tokenizer.json from {folder}")


def _update(
    section: Section, files: TensorFiles, module: str, parts: Mapping[str, str], shape: tuple[int, ...]
) -> Update:
    """Return the update of one weight.

    Raises:
        CheckpointError: a matrix is missing, or their shapes do not fit the weight or the configured rank.
    """
    if len(parts) < 2:
        (there,) = parts.values()
        raise CheckpointError(f"{files.tensors[there].file}: {there} has no other half, lora_A or lora_B")
    down, up = (files.tensors[parts[part]] for part in "AB")
    rank = _number(section, "r", "rank_pattern", module, 8)
    alpha = _number(section, "lora_alpha", "alpha_pattern", module, 8)
    if down.shape[0] != rank:
        raise CheckpointError(
            f"{down.file}: {parts['A']} {list(down.shape)} must have {rank} rows, as {section.file} says"
        )
    wide, high = (shape[0], rank), (rank, math.prod(shape[1:]))
    if (down.shape[0], math.prod(down.shape[1:])) != high or (up.shape[0], math.prod(up.shape[1:])) != wide:
        both = f"{parts['A']} {list(down.shape)} and {parts['B']} {list(up.shape)}"
        raise CheckpointError(f"{down.file}: {both} do not fit their weight {list(shape)}")
    return Update(parts["A"], parts["B"], alpha / (math.sqrt(rank) if section.values.get("use_rslora") else rank))


def _number(section: Section, key: str, patterns: str, module: str, default: int) -> Any:
    """Return a number that may depend on the module: that of the first pattern that its name ends with, as in PEFT."""
    inner = section.inner(patterns)
    for pattern in [] if inner is None else inner.values:
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise section.refuse(patterns, f"patterns of names; {pattern!r} is none: {error}") from error
        if fits:
            return inner.number(pattern, 1 if key == "r" else 1.0)
    return section.number(key, default if key == "r" else float(default))
