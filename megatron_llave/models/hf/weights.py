"""Weights of a Hugging Face folder under canonical names: finding them, checking them, and loading them into a model.

A family describes its folders by an HfFormat. Canonical names are the family's choice of one spelling for each tensor,
whatever layout or version of transformers wrote the folder. Names on our side are those of
initialization.named_global_parameters: layers are counted over all pipeline stages.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from megatron_llave.config.model import ModelConfig
from megatron_llave.data.packing import EncodedSequence
from megatron_llave.errors import CheckpointError
from megatron_llave.models.blocks.initialization import full_shape, named_global_parameters, tensor_parallel_part
from megatron_llave.models.hf.config_json import HfConfig, Section
from megatron_llave.models.hf.mapping import Rule, hf_shapes, local_kernel_name, pad_rows
from megatron_llave.models.hf.peft_files import Adapter, in_transformers, read_adapter
from megatron_llave.models.hf.tensor_files import TensorFiles
from megatron_llave.models.lora import is_adapter


@dataclass(frozen=True)
class HfFormat:
    """How a family's models are stored in Hugging Face folders."""

    layouts: tuple[str, ...]
    """Kinds of folder; the first is what a model that was trained from scratch is exported to."""
    presets: tuple[str, ...]
    """Values of model.preset that such folders may be expected to have."""
    layout_of: Callable[[Mapping], str | None]
    """config.json -> the layout of its folder; None: it is not of this family."""
    read_config: Callable[[Section], HfConfig]
    """A config.json that `layout_of` knows -> what it says; CheckpointError for what we cannot run."""
    build_config: Callable[[ModelConfig, str, bool, str | None, HfConfig | None], dict]
    """Model, layout, whether weights are tied, their dtype, and the config.json they came with -> config.json."""
    rules: Callable[[ModelConfig], dict[str, Rule]]
    """A rule for each parameter of the complete model, by our name."""
    canonical_name: Callable[[str, str], str]
    """A name in a folder and the folder's layout -> the canonical name."""
    layout_name: Callable[[str, str], str]
    """A canonical name and a layout -> the name in a folder that we write."""
    embedding: str
    """Canonical name of the token embedding."""
    lm_head: str
    """Canonical name of the vocabulary projection, which the embedder does not use."""
    is_unused: Callable[[str, HfConfig], bool]
    """Whether a folder may hold a tensor of this canonical name that the embedder does not use."""
    unused_shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    """Unused tensors that every folder of this family holds, but for `lm_head`; norms, whose weight is 1 by default."""
    room_for_tokens: Callable[[ModelConfig, str, Path | None], ModelConfig]
    """Model, layout, folder with a tokenizer -> the model with embedding rows for all tokens that the layout needs."""
    keep_files: Callable[[Path, Path], None]
    """Copy what is worth keeping beside the weights from a folder into another one."""
    write_files: Callable[[Path, str, dict, Path | None, str | None], list[str]]
    """Write all files of an exported folder but the weights: folder, layout, config.json, folder with the tokenizer,
    the run's configuration. Returns what the folder lacks, a sentence each."""
    reference_model: Callable[[ModuleType, "HfWeights"], Module]
    """The module `transformers` and a folder's weights -> transformers' own model of them, in float32."""
    reference_inputs: Callable[[Module, EncodedSequence, tuple[int, int]], dict[str, Tensor]]
    """transformers' model, an input and (width, height) of its image -> keyword arguments of the model's forward."""
    module_name: Callable[[str, str], str] = in_transformers
    """Canonical name of a module and a layout -> its name in the model that such a folder is loaded into by PEFT."""
    can_hold: Callable[[ModelConfig, str], bool] = lambda model, layout: True
    """Model and layout -> whether its folders can describe the model."""
    embedding_rows: Callable[[Mapping], Mapping[str, int]] = lambda config: {}
    """config.json -> canonical names of tensors that are rows of the embedding, and which ones."""
    check_files: Callable[[HfConfig, Path], list[str]] = lambda config, folder: []
    """What config.json says, and a folder -> HfConfig.notes about its other files; CheckpointError if one says
    something else than what is run."""


@dataclass(frozen=True)
class HfWeights:
    """An HF folder's tensors under canonical names."""

    format: HfFormat
    config: HfConfig
    files: TensorFiles
    names: dict[str, str]
    """Canonical name -> the folder's own."""
    adapter: Adapter | None = None
    """What is added to the weights when they are read."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Canonical names of tensors that are rows of the embedding, under whose name `names` has them."""

    def read(self, name: str) -> Tensor:
        """Read a tensor by canonical name, with what an adapter adds to it."""
        value = self.files.read(self.names[name])
        value = value[self.rows[name]] if name in self.rows else value
        return value if self.adapter is None else self.adapter.merged(name, value)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor from the header of its file."""
        return self.files.tensors[self.names[name]].shape[name in self.rows :]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype of every tensor by canonical name."""
        return {name: self.files.tensors[spelling].dtype for name, spelling in self.names.items()}

    @property
    def unused(self) -> list[str]:
        """Return the canonical names of the tensors that the embedder does not use."""
        return sorted(filter(self.is_unused, self.names))

    def is_unused(self, name: str) -> bool:
        """Whether the format may hold the tensor although the embedder does not use it."""
        return self.format.is_unused(name, self.config)

    def problems(self, expected: dict[str, tuple[int, ...]], elsewhere: Collection[str] = ()) -> list[str]:
        """Return a line for each tensor that is missing, of a wrong shape, or unknown.

        Args:
            expected: canonical names and shapes.
            elsewhere: canonical names that are not checked here, such as tensors of other pipeline stages.
        """
        layout = self.config.layout
        missing = sorted(expected.keys() - self.names)
        lines = [f"missing: {self.format.layout_name(name, layout)} {list(expected[name])}" for name in missing]
        model = self.config.model
        head = {self.format.lm_head: (model.language.vocab_size, model.language.hidden_size)}
        known = {**head, **self.format.unused_shapes(model), **expected}
        for name in sorted(self.names):
            spelling, shape = self.names[name], self.shape(name)
            if name not in expected and name not in elsewhere and not self.is_unused(name):
                lines.append(f"extra: {spelling} {list(shape)}")
            elif known.get(name, shape) != shape:
                lines.append(f"wrong shape: {spelling} {list(shape)}, config.json makes it {list(known[name])}")
        return lines


def open_weights(
    folder: str | Path, config: HfConfig, format: HfFormat, adapter: str | Path | None = None
) -> HfWeights:
    """Read the headers of an HF folder, and of an adapter for its weights (models/hf/peft_files.py).

    Raises:
        CheckpointError: the files are missing, damaged or pickled, two tensors mean the same one, or the adapter is of
            another kind or for other weights.
    """
    files = TensorFiles(folder)
    names: dict[str, str] = {}
    for spelling in files.tensors:
        name = format.canonical_name(spelling, config.layout)
        if name in names:
            raise CheckpointError(f"{folder}: {spelling} and {names[name]} are the same tensor in two spellings")
        names[name] = spelling
    rows = format.embedding_rows(config.raw) if format.embedding in names else {}
    names |= {name: names[format.embedding] for name in rows}
    weights = HfWeights(format, config, files, names, rows=rows)
    if adapter is None:
        return weights
    canonical = partial(format.canonical_name, layout=config.layout)
    shapes = {name: weights.shape(name) for name in names}
    return replace(weights, adapter=read_adapter(Path(adapter), Path(folder), canonical, shapes))


def require_complete(weights: HfWeights, expected: dict[str, tuple[int, ...]], elsewhere: Collection[str] = ()) -> None:
    """Refuse a folder that does not hold exactly the expected tensors (see HfWeights.problems).

    Raises:
        CheckpointError: lists the first tensors that are missing, extra or of a wrong shape.
    """
    problems = weights.problems(expected, elsewhere)
    if problems:
        rest = len(problems) - 5
        more = f"; and {rest} more (llave convert inspect lists all)" if rest > 0 else ""
        raise CheckpointError(f"{weights.files.folder} does not fit its config.json: {'; '.join(problems[:5])}{more}")


def require_plausible(weights: HfWeights) -> None:
    """Refuse a folder whose config.json is of another model, before memory is taken for what it describes.

    Raises:
        CheckpointError: names the first tensors that are missing, or the token embedding.
    """
    model, layout = weights.config.model, weights.config.layout
    rules = weights.format.rules(model).values()
    missing = sorted({name for rule in rules for name in rule.names} - weights.names.keys())
    problems = [f"missing: {weights.format.layout_name(name, layout)}" for name in missing[:5]]
    if not missing and weights.shape(weights.format.embedding)[1:] != (model.language.hidden_size,):
        width = f"config.json makes it [..., {model.language.hidden_size}]"
        problems = [f"wrong shape: {weights.names[weights.format.embedding]}, {width}"]
    if problems:
        more = f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"{weights.files.folder} does not fit its config.json: {'; '.join(problems)}{more}")


def fill_from_hf(chunks: Iterable[Module], weights: HfWeights, groups: ProcessGroupCollection) -> None:
    """Copy an HF folder's weights into this rank's chunks, at any parallel layout; each rank reads what it holds.

    Adapters in the chunks stay as they are.

    Raises:
        CheckpointError: a tensor is missing, extra, of another shape, or cannot be read.
    """
    rank, size = groups.tp.rank(), groups.tp.size()
    rules = weights.format.rules(weights.config.model)
    named = [item for chunk in chunks for item in named_global_parameters(chunk)]
    parameters = {local_kernel_name(name): parameter for name, parameter in named if not is_adapter(name)}
    expected = hf_shapes({name: tuple(full_shape(p, size)) for name, p in parameters.items()}, rules)
    require_complete(weights, expected, elsewhere={theirs for rule in rules.values() for theirs in rule.names})
    for name, parameter in parameters.items():
        full = rules[name].join([weights.read(theirs) for theirs in rules[name].names])
        full = pad_rows(full, full_shape(parameter, size)[0])
        with torch.no_grad():
            parameter.copy_(tensor_parallel_part(full, parameter, rank, size))
