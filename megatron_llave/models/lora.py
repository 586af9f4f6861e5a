"""LoRA: adapters beside the column- and row-parallel linears of a built model, whose own weights are frozen.

A linear y = W x becomes y = W x + scale * B A dropout(x), with A [r, in] and B [out, r]. Each adapter belongs to one
linear of the Hugging Face model, also where ours holds several of them (linear_qkv three, linear_fc1 two).

Tensor parallel: a column-parallel linear has A on every rank and its part of the rows of B; a row-parallel linear has
its part of the columns of A, and B on every rank. The one collective is over r channels per adapter: those between A
and B. With sequence parallel, the parameter that every rank has sees each rank's own tokens; megatron-core sums its
gradient, as it does for norms.

Shapes: s tokens, b 1, r rank, k adapters of one of our linears, in and out of this rank's part of it.

Source: PEFT's tuners/lora/layer.py (0.21.2), arXiv 2106.09685.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_llave.config.lora import LoraConfig, part_of_target
from megatron_llave.config.model import PARTS
from megatron_llave.errors import ConfigError, require
from megatron_llave.models.blocks.initialization import (
    full_shape,
    global_names,
    named_generator,
    named_global_parameters,
    tensor_parallel_part,
)
from megatron_llave.models.hf.mapping import Rule

COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")
ROW_PARALLEL = ("linear_proj", "linear_fc2")
"""megatron-core's names of the linears of attention and MLP, which all families consist of."""
SUFFIX = "_lora"
"""What the name of a linear is followed by in the name of its adapters, which are a module beside it."""
PARAMETER = re.compile(rf"(?P<linear>.+){SUFFIX}\.(?P<short>\w+)_(?P<matrix>down|up)")


class HfAdapter(NamedTuple):
    """The adapter of one linear of the Hugging Face model, as PEFT has it."""

    module: str
    """Canonical name of the linear (HfFormat); that of its weight has `.weight` after it."""
    down: Tensor
    """A [r, in], PEFT's lora_A.weight."""
    up: Tensor
    """B [out, r], PEFT's lora_B.weight."""
    scale: float
    """alpha / r."""


class Adapters(Module):
    """The adapters of one of our linears on this rank: parameters NAME_down [r, in] and NAME_up [out, r].

    NAME is that of the Hugging Face linear, such as q_proj; it is in `names` for those that have an adapter.
    """

    def __init__(
        self,
        weight: Parameter,
        rule: Rule,
        names: Iterable[str],
        lora: LoraConfig,
        splits_outputs: bool,
        sequence_parallel: bool,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        size = group.size()
        # The parts of the weight on this rank: as many heads as it has.
        self.rule = replace(rule, heads=max(1, rule.heads // size), groups=max(1, rule.groups // size))
        self.lora, self.group = lora, group
        self.splits_outputs, self.sequence_parallel = splits_outputs, sequence_parallel
        self.rows = {_short(name): shape[0] for name, shape in self.rule.shapes(tuple(weight.shape)).items()}
        self.names = [name for name in self.rows if name in set(names)]
        for name in self.names:
            down = Parameter(weight.new_empty(lora.rank, weight.shape[1]))
            up = Parameter(weight.new_empty(self.rows[name], lora.rank))
            split, whole = (up, down) if splits_outputs else (down, up)
            set_tensor_model_parallel_attributes(split, True, 0 if splits_outputs else 1, 1)
            whole.sequence_parallel = sequence_parallel
            self.register_parameter(f"{name}_down", down)
            self.register_parameter(f"{name}_up", up)

    def forward(self, hidden: Tensor) -> Tensor:
        """Input [s, b, in] of the linear -> what is added to its output [s, b, out]."""
        narrow = self._down(hidden) * self.lora.scale  # [s, b, k * r]
        if self.splits_outputs and self.sequence_parallel:
            # Each rank's gradient comes from its own outputs: reduce-scattered, or all-reduced.
            narrow = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, group=self.group)
        elif self.splits_outputs:
            narrow = copy_to_tensor_model_parallel_region(narrow, group=self.group)
        elif self.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.group)
        return F.linear(narrow, self._joined_up())

    def _down(self, hidden: Tensor) -> Tensor:
        downs = self._all("down")
        if not (self.training and self.lora.dropout):
            return F.linear(hidden, torch.cat(downs))
        # Ranks whose inputs are different tokens or channels draw different numbers.
        is_own = self.group.size() > 1 and (self.sequence_parallel or not self.splits_outputs)
        with get_cuda_rng_tracker().fork() if is_own else nullcontext():
            return torch.cat([F.linear(F.dropout(hidden, self.lora.dropout), down) for down in downs], dim=-1)

    def _joined_up(self) -> Tensor:
        """[out, k * r]: each B in its own columns, its rows where the linear has those outputs."""
        rank, ups, blocks = self.lora.rank, dict(zip(self.names, self._all("up"))), []
        for name, rows in self.rows.items():
            place = self.names.index(name) * rank if name in ups else 0
            up = ups.get(name, self._all("up")[0].new_zeros(rows, rank))
            blocks.append(F.pad(up, (place, (len(self.names) - 1) * rank - place)))
        # The rows of a stacked matrix are in our order already.
        return blocks[0] if len(blocks) == 1 else self.rule.join(blocks)

    def _all(self, matrix: str) -> list[Parameter]:
        return [getattr(self, f"{name}_{matrix}") for name in self.names]

    def change(self) -> Tensor:
        """Return what the adapters add to this rank's part of the weight, [out, in] float32."""
        return self.lora.scale * (self._joined_up().float() @ torch.cat(self._all("down")).float())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """See MegatronModule."""
        matrix, axis = ("up", 0) if self.splits_outputs else ("down", 1)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {f"{name}_{matrix}": axis for name in self.names},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def add_adapters(chunk: Module, lora: LoraConfig, rules: Mapping[str, Rule], group: dist.ProcessGroup) -> None:
    """Add adapters, not filled yet, to a model chunk and freeze everything else in it.

    Args:
        chunk: a chunk of the model.
        lora: rank, targets.
        rules: those of the model's family (HfFormat).
        group: the tensor-parallel ranks.

    Raises:
        ConfigError: lora.targets names a linear that the model does not have.
    """
    chosen = chosen_linears(lora.targets, rules)
    chunk.requires_grad_(False)
    chunk.lora = lora
    to_global = global_names(chunk)
    for path, parent in list(chunk.named_modules()):
        for name in (*COLUMN_PARALLEL, *ROW_PARALLEL):
            linear = getattr(parent, name, None)
            place = to_global(f"{path}.{name}") if linear is not None else None
            if place not in chosen:
                continue
            sequence_parallel = parent.config.sequence_parallel
            kind = (name in COLUMN_PARALLEL, sequence_parallel, group)
            adapters = Adapters(linear.weight, rules[f"{place}.weight"], chosen[place], lora, *kind)
            parent.add_module(name + SUFFIX, adapters)
            # With the norm fused into it, Transformer Engine's layer has to say what the norm's output is.
            if hasattr(linear, "return_layernorm_output"):
                linear.return_layernorm_output = True
            adapters.hook = linear.register_forward_hook(partial(_add, adapters))
    chunk.vision_is_frozen = "vision" not in lora.parts


def _add(adapters: Adapters, linear: Module, inputs: tuple[Tensor, ...], output: Any) -> tuple[Tensor, Tensor | None]:
    """Add the adapters' output to that of their linear, which returns its bias apart."""
    if not getattr(linear, "return_layernorm_output", False):
        outputs, bias = output
        hidden = inputs[0]
    elif linear.te_return_bias:
        outputs, bias, hidden = output
    else:
        (outputs, hidden), bias = output
    return outputs + adapters(hidden), bias


def _short(name: str) -> str:
    """Return the name of the linear of a weight in its layer, such as q_proj."""
    return name.removesuffix(".weight").rpartition(".")[2]


def chosen_linears(targets: list[str], rules: Mapping[str, Rule]) -> dict[str, set[str]]:
    """Return the short names of the Hugging Face linears that have adapters, by the name of our linear.

    Raises:
        ConfigError: a target names a linear that the model does not have.
    """
    linears = {
        name.removesuffix(".weight"): [_short(theirs) for theirs in rule.names]
        for name, rule in rules.items()
        if name.endswith(tuple(f".{linear}.weight" for linear in (*COLUMN_PARALLEL, *ROW_PARALLEL)))
    }
    parts = {part: {name: them for name, them in linears.items() if name.startswith(f"{part}.")} for part in PARTS}
    chosen: dict[str, set[str]] = {}
    for target in targets:
        part = part_of_target(target)
        short = target.removeprefix(f"{part}.")
        known = dict.fromkeys(name for names in parts[part].values() for name in names)
        is_known = bool(known) and (target == part or short in known)
        there = ", ".join(known) or "none"
        require(is_known, f"lora.targets: {target} is no linear layer of this model's {part}, which has {there}")
        for name, names in parts[part].items():
            chosen.setdefault(name, set()).update(n for n in names if target == part or n == short)
    return {name: names for name, names in chosen.items() if names}


def targets_of(modules: Iterable[str], rules: Mapping[str, Rule]) -> list[str] | None:
    """Return lora.targets for exactly these linears, by canonical name; None: no targets name exactly these."""
    places = {theirs.removesuffix(".weight"): name for name, rule in rules.items() for theirs in rule.names}
    modules, targets = set(modules), []
    try:
        for part in PARTS:
            own = {module for module in modules if places.get(module, "").startswith(f"{part}.")}
            prefix = "" if part == "language" else f"{part}."
            is_whole = bool(own) and _modules_of([part], rules) == own
            targets += [part] if is_whole else sorted({f"{prefix}{_short(module)}" for module in own})
        return targets if targets and _modules_of(targets, rules) == modules else None
    except ConfigError:  # one of them is no linear that can have adapters
        return None


def _modules_of(targets: list[str], rules: Mapping[str, Rule]) -> set[str]:
    """Return the canonical names of the linears that lora.targets name."""
    return {
        theirs.removesuffix(".weight")
        for name, shorts in chosen_linears(targets, rules).items()
        for theirs in rules[f"{name}.weight"].names
        if _short(theirs) in shorts
    }


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return PARAMETER.fullmatch(name) is not None


def adapters_in(chunks: Iterable[Module]) -> list[tuple[Module, str, Adapters]]:
    """Return the parent, the linear's name in it and the adapters of each linear that has some."""
    return [
        (parent, name.removesuffix(SUFFIX), child)
        for chunk in chunks
        for parent in chunk.modules()
        for name, child in parent.named_children()
        if isinstance(child, Adapters)
    ]


def draws_random_numbers(chunk: Module) -> bool:
    """Whether passes of a model in training depend on random states, given one of its chunks, wrapped or not.

    The answer is the same on all pipeline stages, also on one without adapters.
    """
    lora = getattr(getattr(chunk, "module", chunk), "lora", LoraConfig())
    config = chunk.config
    return config.hidden_dropout > 0 or config.attention_dropout > 0 or lora.rank > 0 and lora.dropout > 0


def initialize_adapters(chunks: list[Module], group: dist.ProcessGroup, seed: int) -> None:
    """Fill the adapters of this rank's chunks as lora.init says, the same at every parallel layout; B is zero."""
    for chunk in chunks:
        for name, parameter in named_global_parameters(chunk):
            if not is_adapter(name):
                continue
            full = torch.zeros(full_shape(parameter, group.size()), device=parameter.device)
            if name.endswith("_down"):
                rank, inputs = full.shape
                generator = named_generator(name, seed, full.device)
                if chunk.lora.init == "gaussian":
                    full.normal_(std=1 / rank, generator=generator)
                else:  # kaiming_uniform_ with a = sqrt(5)
                    full.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            with torch.no_grad():
                parameter.copy_(tensor_parallel_part(full, parameter, group.rank(), group.size()))


def hf_adapters(tensors: Mapping[str, Tensor], rules: Mapping[str, Rule], scale: float) -> Iterator[HfAdapter]:
    """Yield the adapters of a model by the names of the Hugging Face model.

    Args:
        tensors: whole parameters of ours by name in the complete model, such as those of
            initialization.named_global_parameters on one process, or their gradients; others than adapters are left
            out.
        rules: those of the model's family.
        scale: LoraConfig.scale.
    """
    for name, down in tensors.items():
        match = PARAMETER.fullmatch(name)
        if match is None or match["matrix"] != "down":
            continue
        up, rule = tensors[name.removesuffix("down") + "up"], rules[f"{match['linear']}.weight"]
        weight = next(theirs for theirs in rule.names if _short(theirs) == match["short"])
        up = rule.split(up)[0] if len(rule.names) == 1 else up
        yield HfAdapter(weight.removesuffix(".weight"), down, up, scale)


def our_adapters(adapters: Iterable[HfAdapter], rules: Mapping[str, Rule]) -> dict[str, Tensor]:
    """Return the parameters of ours that adapters of the Hugging Face model are, by name; the inverse of `hf_adapters`.

    Raises:
        KeyError: an adapter is of no linear that can have one.
    """
    places = {theirs: (name, rule) for name, rule in rules.items() for theirs in rule.names}
    tensors = {}
    for adapter in adapters:
        name, rule = places[f"{adapter.module}.weight"]
        prefix = f"{name.removesuffix('.weight')}{SUFFIX}.{_short(adapter.module)}"
        tensors[f"{prefix}_down"] = adapter.down
        tensors[f"{prefix}_up"] = rule.join([adapter.up]) if len(rule.names) == 1 else adapter.up
    return tensors


@contextmanager
def merging(
    chunks: list[Module], lora: LoraConfig, rules: Mapping[str, Rule], group: dist.ProcessGroup
) -> Iterator[None]:
    """Give chunks without adapters some that are filled inside, and merge them at the end.

    The arguments are those of `add_adapters`. What is trained afterwards is what was trained before.
    """
    trained = [(parameter, parameter.requires_grad) for chunk in chunks for parameter in chunk.parameters()]
    frozen = [getattr(chunk, "vision_is_frozen", False) for chunk in chunks]
    for chunk in chunks:
        add_adapters(chunk, lora, rules, group)
    yield
    merge_adapters(chunks)
    for chunk, vision_is_frozen in zip(chunks, frozen):
        del chunk.lora
        chunk.vision_is_frozen = vision_is_frozen
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


@torch.no_grad()
def merge_adapters(chunks: Iterable[Module]) -> None:
    """Add the adapters to the weights beside them, in place, and remove them. The weights stay frozen.

    The sum is computed in float32 and rounded to the dtype of the weights.
    """
    for parent, name, adapters in adapters_in(chunks):
        linear = getattr(parent, name)
        linear.weight.copy_(linear.weight.float() + adapters.change())
        adapters.hook.remove()
        if hasattr(linear, "return_layernorm_output"):
            linear.return_layernorm_output = False
        delattr(parent, name + SUFFIX)
