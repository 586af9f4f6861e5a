"""On several ranks: gradients of LoRA adapters at many layouts against PEFT on one process.

check_lora.py reference DIR FAMILY/TARGETS...         writes what PEFT gives
check_lora.py compare DIR FAMILY/TARGETS:LAYOUT...    compares; TARGETS is a key of golden_lora.TARGETS, LAYOUT that of
check_layouts.py, followed by `full` or `selective` for model.recompute
check_lora.py broken DIR FAMILY/TARGETS:LAYOUT        shows that the comparison fails when a constant is off
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from check_layouts import parse_layout
from full_parameters import full_gradients, full_weights, let_go, worst_relative_error
from golden_lora import (
    ALPHA,
    HARDNESS,
    RANK,
    TEMPERATURE,
    folder_of,
    gradients_of,
    load_reference,
    lora_of,
    pairs_of,
    set_adapters,
    shrink,
    stored_adapters,
    tile_shape,
    write_reference,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_llave.batch import PairBatch
from megatron_llave.checkpoint.optimizer_state import make_states
from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.data.packing import pack_sequences
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.distributed.layout import validate_layout
from megatron_llave.distributed.schedule import run_schedule
from megatron_llave.loss import build_loss
from megatron_llave.models import build_model, family_of, lora, open_hf
from megatron_llave.models.blocks.kernels import row_multiple
from megatron_llave.models.hf.weights import fill_from_hf
from megatron_llave.models.lora import initialize_adapters, is_adapter, merge_adapters, our_adapters
from megatron_llave.planning.memory import BUFFER_ALIGNMENT, PARAMETER_ALIGNMENT
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.optimizer import Trainable, build_trainable, inner_optimizers

TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-6
MERGED_TOLERANCE = 1e-6
EMBEDDING_TOLERANCE = 1e-5


def config_of(family: str, text: str) -> RunConfig:
    """A run of the golden model at a layout."""
    layout, _ = parse_layout(text)
    recompute = next((way for way in ("full", "selective") if way in text.split(",")), "none")
    model = replace(open_hf(folder_of(family)).config.model, recompute=recompute)
    loss = LossConfig(temperature=TEMPERATURE, alpha=HARDNESS)
    return RunConfig(model=model, parallel=layout, loss=loss, train=TrainConfig(steps=1, global_batch_size=4))


def check_same(found: dict[str, Tensor], file: Path) -> None:
    """Initial values are those of the first layout, which writes them."""
    if not file.exists() and dist.get_rank() == 0:
        save_file(found, file)
    dist.barrier()
    expected = load_file(file)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def build(
    cfg: RunConfig, targets: str, groups: ProcessGroupCollection, reference: dict[str, Tensor], initial: Path
) -> Trainable:
    """The golden model with the adapters of the reference; other layouts' initial values are in `initial`."""
    weights = open_hf(folder_of(cfg.model.family))
    chunks = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), None, lora_of(targets))
    fill_from_hf(chunks, weights, groups)
    for chunk in chunks:
        shrink(chunk.named_parameters())
    initialize_adapters(chunks, groups.tp, 0)
    check_same(full_weights(chunks, groups), initial)
    rules = family_of(cfg.model).hf.rules(cfg.model)
    set_adapters(chunks, our_adapters(stored_adapters(reference), rules), groups.tp)
    return build_trainable(cfg, chunks, groups)


def micro_batches(size: int, cfg: RunConfig, groups: ProcessGroupCollection) -> list[PairBatch]:
    """This rank's micro batches of `size` pairs."""
    family, batches = cfg.model.family, []
    pairs = pairs_of(family)
    for start in range(groups.dp.rank() * size, len(pairs), groups.dp.size() * size):
        some = pairs[start : start + size]
        sequences = [query for query, _ in some] + [target for _, target in some]
        row = pack_sequences(
            sequences, row_multiple(cfg.model, cfg.parallel), tile_shape(family), cfg.parallel.context
        ).part(groups.cp.rank())
        numbers = torch.arange(start, start + len(some))
        batches.append(PairBatch(row, numbers, numbers, torch.zeros(0, dtype=torch.int64), "golden", ["-"] * len(some)))
    return batches


def gradient_error(
    trainable: Trainable, size: int, cfg: RunConfig, groups: ProcessGroupCollection, reference: dict[str, Tensor]
) -> float:
    """The worst relative error of an adapter's gradient; the loss is compared too."""
    batches = micro_batches(size, cfg, groups)
    trainable.zero_gradients()
    seen = forward_backward(trainable.chunks, batches, build_loss(cfg.loss, groups.dp), cfg.loss)
    scale = get_model_config(trainable.chunks[0]).grad_scale_func(torch.ones(()))
    found = {name: value / scale for name, value in full_gradients(trainable, groups).items()}
    assert all(map(is_adapter, found)), "something else is trained"
    expected = {name: value for name, value in reference.items() if name.endswith(".grad")}
    name, error = worst_relative_error(gradients_of(found, open_hf(folder_of(cfg.model.family))), expected)
    assert error <= TOLERANCE, f"{cfg.parallel} micro batch {size}: the gradient of {name} is off by {error:.1e}"
    if seen:
        mean = torch.stack([share for share, _ in seen]).mean()
        dist.all_reduce(mean, group=groups.dp)
        off = abs(float(mean) / groups.dp.size() / float(reference["loss"]) - 1)
        assert off <= LOSS_TOLERANCE, f"{cfg.parallel} micro batch {size}: the loss is off by {off:.1e}"
    return error


def embeddings_of(chunks: list, cfg: RunConfig, groups: ProcessGroupCollection) -> Tensor | None:
    """[8, h] query and target of each pair in turn, on the last stage."""
    batches = micro_batches(1, cfg, groups)
    rows: list[Tensor] = []

    def step(items, chunk):
        return chunk(next(items)), lambda output, non_loss_data=True: rows.append(output)

    sequences = [batch.sequences for batch in batches]
    longest = max(sum(row.padded_lengths) for row in sequences)
    run_schedule(chunks, sequences, len(sequences), longest, step, forward_only=True)
    return torch.cat(rows) if rows else None


def check_buffers(trainable: Trainable, groups: ProcessGroupCollection) -> None:
    """Gradient buffers and optimizer hold the adapters of this rank and nothing else: 4 and 12 bytes per element."""
    modules = [chunk.module for chunk in trainable.chunks]
    own = [p for module in modules for name, p in module.named_parameters() if is_adapter(name)]
    in_buffers = [p for chunk in trainable.chunks for buffer in chunk.buffers for p in buffer.params]
    assert set(map(id, in_buffers)) == set(map(id, own)) and own, "the gradient buffers hold something else"
    elements = sum(p.numel() for p in own)
    held = sum(buffer.grad_data.nbytes for chunk in trainable.chunks for buffer in chunk.buffers)
    planned = 0
    for module in modules:  # one bucket of each chunk
        sizes = [p.numel() for p in module.parameters() if p.requires_grad]
        padded = sum(-(-size // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT for size in sizes)
        block = math.lcm(BUFFER_ALIGNMENT, groups.dp_cp.size())
        planned += 4 * -(-padded // block) * block
    assert held == planned, (held, planned)
    make_states(trainable.optimizer)
    states = [state for inner in inner_optimizers(trainable.optimizer) for state in inner.state.values()]
    moments = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    total = torch.tensor(moments)
    dist.all_reduce(total, group=groups.dp_cp)
    assert int(total) == 8 * elements, (elements, int(total))


def compare(directory: Path, family: str, targets: str, text: str) -> None:
    """Raise unless this layout gives PEFT's gradients, and merged weights the embeddings of unmerged ones."""
    reference = load_reference(directory / f"{family}-{targets}.safetensors")
    cfg = config_of(family, text)
    validate_layout(cfg.model, cfg.parallel, dist.get_world_size())
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    trainable = build(cfg, targets, groups, reference, directory / f"{family}-{targets}-initial.safetensors")
    check_buffers(trainable, groups)
    errors = []
    for size in (1, 2, 4):
        count, rest = divmod(4, size * groups.dp.size())
        if rest == 0 and (cfg.parallel.virtual_pipeline == 1 or count % cfg.parallel.pipeline == 0):
            errors.append(gradient_error(trainable, size, cfg, groups, reference))
    before = embeddings_of(trainable.chunks, cfg, groups)
    merge_adapters(chunk.module for chunk in trainable.chunks)
    after = embeddings_of(trainable.chunks, cfg, groups)
    off = 0.0
    if before is not None:
        own = [i for i in range(4) if i % groups.dp.size() == groups.dp.rank()]
        golden = reference["embeddings"].unflatten(0, (4, 2))[own].flatten(0, 1)
        torch.testing.assert_close(before, golden, rtol=0, atol=EMBEDDING_TOLERANCE)
        off = float((after - before).abs().max())
        assert off <= MERGED_TOLERANCE, f"{text}: merged weights are {off:.1e} off"
        print(f"{family}/{targets}:{text}: gradients {', '.join(f'{x:.1e}' for x in errors)}, merged {off:.1e}")
    let_go(trainable)


def check_that_it_bites(directory: Path, family: str, targets: str, text: str) -> None:
    """With a collective between A and B left out, or another scale, the comparison must fail."""
    collectives = ("copy_to_tensor_model_parallel_region", "reduce_from_tensor_model_parallel_region")
    breaks = {name: patch.object(lora, name, lambda hidden, group: hidden) for name in collectives}
    breaks["scale"] = patch.object(LoraConfig, "scale", ALPHA / RANK * 1.001)
    for what, broken in breaks.items():
        try:
            with broken:
                compare(directory, family, targets, text)
        except AssertionError as error:
            assert "is off by" in str(error), error
            print(f"bites without {what}", flush=True)
        else:
            raise AssertionError(f"nothing has noticed that {what} is off")
        process_groups.destroy_model_parallel()


def main() -> None:
    """Run one of the modes."""
    cpu_emulation.enable()
    mode, directory, *cases = sys.argv[1:]
    process_groups.initialize_distributed(120)
    for case in cases:
        family, _, rest = case.partition("/")
        targets, _, text = rest.partition(":")
        if mode == "reference":
            write_reference(Path(directory) / f"{family}-{targets}.safetensors", family, targets)
            continue
        if mode == "broken":
            check_that_it_bites(Path(directory), family, targets, text)
            continue
        compare(Path(directory), family, targets, text)
        process_groups.destroy_model_parallel()
    process_groups.destroy_distributed()


if __name__ == "__main__":
    main()
