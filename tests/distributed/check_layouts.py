"""Under torchrun: the model's embeddings, gradients and losses at many layouts against one plain process.

    check_layouts.py reference DIR       (one process) writes what a plain loop without schedules or wrappers gives
    check_layouts.py compare DIR LAYOUT... compares; LAYOUT is tensor,pipeline,virtual,sequence,first_stage_layers
    and the names of frozen parts
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from full_parameters import full_gradients, worst_relative_error
from megatron.core.process_groups_config import ProcessGroupCollection
from reference import dense_contrastive_loss, pack, pack_pair_batch, random_pairs, tile_shape
from safetensors.torch import load_file, save_file

from megatron_llave import cpu_emulation, parallel
from megatron_llave.batch import PairBatch
from megatron_llave.config import (
    LanguageConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_llave.embedding import LoadedModel, forward_only
from megatron_llave.gradient_cache import forward_backward
from megatron_llave.model.embedder import build_model
from megatron_llave.optimizer import Trainable, build_trainable
from megatron_llave.train import contrast, train_step

TOLERANCE = 1e-5
GLOBAL_BATCH = 8
POOLS = {"micro_batch": 4, "global_batch": 8}  # pairs that are each other's negatives
TEMPERATURE, ALPHA = 0.1, 9.0
STEPS = 3


def small_config(layout: ParallelConfig, freeze: list[str]) -> RunConfig:
    """Four decoder layers, so that every layout has something to split."""
    model = ModelConfig(
        vision=VisionConfig(hidden_size=32, num_layers=2, num_heads=4, ffn_hidden_size=64, image_size=30),
        language=LanguageConfig(
            hidden_size=48, num_layers=4, num_heads=4, num_kv_heads=2, ffn_hidden_size=80, vocab_size=300
        ),
        freeze=freeze,
    )
    return RunConfig(
        model=model,
        parallel=layout,
        loss=LossConfig(temperature=TEMPERATURE, alpha=ALPHA),
        optimizer=OptimizerConfig(learning_rate=1e-3, clip_gradient=1.0, epsilon=1e-5),
        train=TrainConfig(steps=STEPS, global_batch_size=GLOBAL_BATCH),
    )


def write_reference(directory: Path) -> None:
    """The whole model in one process, autograd alone: no schedule, no data-parallel wrapper, no gather."""
    cfg = small_config(ParallelConfig(), [])
    parallel.start_processes(60)
    groups = parallel.init(cfg.parallel)
    (model,) = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=0)
    pairs = random_pairs(cfg.model, GLOBAL_BATCH)
    embeddings = torch.cat([model(pack([side], cfg.model)) for pair in pairs for side in pair])
    save_file({"embeddings": embeddings.detach()}, directory / "embeddings.safetensors")
    for negatives, pool in POOLS.items():
        losses = []
        for start in range(0, GLOBAL_BATCH, pool):
            both = embeddings[2 * start : 2 * (start + pool)]
            losses.append(dense_contrastive_loss(both[0::2], both[1::2], TEMPERATURE, ALPHA))
        loss = torch.stack(losses).mean()
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        save_file(gradients | {"loss": loss.detach()}, directory / f"{negatives}.safetensors")
    parallel.shut_down()


def compare(directory: Path, layout: ParallelConfig, freeze: list[str]) -> None:
    """Raise unless this layout gives the reference's embeddings and gradients."""
    cfg = small_config(layout, freeze)
    parallel.validate_layout(cfg.model, layout, dist.get_world_size())
    groups = parallel.init(layout)
    chunks = build_model(cfg.model, layout, groups, torch.device("cpu"), seed=0)
    trainable = build_trainable(cfg, chunks, groups)
    share = POOLS["micro_batch"] // groups.dp.size()
    worst = [compare_gradients(directory, "micro_batch", share, cfg, trainable, groups)]
    for micro_batch in (1, 2, 4):
        num_micro_batches, rest = divmod(GLOBAL_BATCH, micro_batch * groups.dp.size())
        if rest == 0 and (layout.virtual_pipeline == 1 or num_micro_batches % layout.pipeline == 0):
            worst.append(compare_gradients(directory, "global_batch", micro_batch, cfg, trainable, groups))
    pairs = random_pairs(cfg.model, GLOBAL_BATCH)
    check_embeddings(directory, trainable.chunks, pairs, cfg, groups)
    cfg.loss.negatives = "micro_batch"
    batches = micro_batches(pairs, share, cfg, groups)
    losses = [train_step(trainable, batches, cfg.loss, step, groups)["loss"] for step in range(STEPS)]
    if dist.get_rank() == dist.get_world_size() - 1:  # always on the last stage
        print(f"{layout} freeze={freeze}: gradients off by {', '.join(f'{x:.1e}' for x in worst)}, losses {losses}")
        save_losses(directory, freeze, losses)
    parallel.leave_layout()


def micro_batches(pairs: list, size: int, cfg: RunConfig, groups: ProcessGroupCollection) -> list[PairBatch]:
    """This rank's micro batches, each `size` pairs; all ranks' m-th micro batches lie together in the global batch."""
    multiple = cfg.parallel.tensor if cfg.parallel.sequence else 1
    starts = range(groups.dp.rank() * size, len(pairs), groups.dp.size() * size)
    return [pack_pair_batch(pairs[start : start + size], cfg.model, multiple) for start in starts]


def compare_gradients(
    directory: Path, negatives: str, size: int, cfg: RunConfig, trainable: Trainable, groups: ProcessGroupCollection
) -> float:
    """Every parameter's gradient and the loss against the plain process; returns the worst relative error."""
    reference = load_file(directory / f"{negatives}.safetensors")
    expected = float(reference.pop("loss"))
    calls = TowerCalls(trainable.chunks)
    compare = partial(contrast, config=cfg.loss, temperature=TEMPERATURE, alpha=ALPHA, group=groups.dp)
    batches = micro_batches(random_pairs(cfg.model, GLOBAL_BATCH), size, cfg, groups)
    trainable.zero_gradients()
    seen = forward_backward(trainable.chunks, batches, compare, negatives)
    gradients = full_gradients(trainable, groups)
    freeze = cfg.model.freeze
    frozen = tuple(freeze) + (("image_newline",) if "projector" in freeze else ())
    trained = {name: value for name, value in reference.items() if not name.startswith(frozen or "nothing")}
    name, error = worst_relative_error(gradients, trained)
    what = f"{cfg.parallel} freeze={freeze} {negatives} micro batch {size}"
    assert error <= TOLERANCE, f"{what}: gradient of {name} is off by {error:.1e}"
    if seen:
        loss = torch.stack([loss for loss, _ in seen]).mean()
        dist.all_reduce(loss, group=groups.dp)
        assert abs(float(loss) / groups.dp.size() - expected) <= 1e-5 * abs(expected), what
    passes = 2 if negatives == "global_batch" and len(batches) > 1 and "vision" not in freeze else 1
    with_images = sum(len(batch.sequences.tiles) > 0 for batch in batches)
    assert calls.stop() in (0, passes * with_images), f"{what}: the tower ran {calls.count} times"
    return error


class TowerCalls:
    """Counts how often the vision tower runs; 0 on stages without one."""

    def __init__(self, chunks: list) -> None:
        self.count = 0
        towers = [chunk.module.vision for chunk in chunks if hasattr(chunk.module, "vision")]
        self.hooks = [tower.register_forward_hook(self.add) for tower in towers]

    def add(self, *unused: object) -> None:
        self.count += 1

    def stop(self) -> int:
        for hook in self.hooks:
            hook.remove()
        return self.count


def save_losses(directory: Path, freeze: list[str], losses: list[float]) -> None:
    """The first layout of each kind sets the losses of three steps, the others must follow."""
    path = directory / f"losses{'-'.join(freeze)}.safetensors"
    ours = torch.tensor(losses)
    if path.exists():
        torch.testing.assert_close(ours, load_file(path)["losses"], rtol=1e-4, atol=1e-5)
    else:
        save_file({"losses": ours}, path)


def check_embeddings(directory, chunks, pairs, cfg, groups) -> None:
    """All sequences packed into one row, on the last stage, against one at a time."""
    model = LoadedModel(cfg, chunks, FakeEncoder(cfg.model), groups)
    row = pack([side for pair in pairs for side in pair], cfg.model, model.pad_to_multiple)
    with torch.no_grad():
        outputs = forward_only(model, [row])
    if groups.pp.rank() == groups.pp.size() - 1:
        expected = load_file(directory / "embeddings.safetensors")["embeddings"]
        torch.testing.assert_close(outputs[0], expected, rtol=0, atol=1e-5)


class FakeEncoder:
    """What forward_only asks of an encoder."""

    def __init__(self, model: ModelConfig) -> None:
        self.tile_shape = tile_shape(model)


def parse_layout(text: str) -> tuple[ParallelConfig, list[str]]:
    """tensor,pipeline,virtual,sequence,first_stage_layers[,frozen part]."""
    tensor, pipeline, virtual, sequence, first, *freeze = text.split(",")
    layout = ParallelConfig(
        tensor=int(tensor),
        pipeline=int(pipeline),
        virtual_pipeline=int(virtual),
        sequence=sequence == "1",
        first_stage_layers=int(first) or None,
    )
    return layout, freeze


def main() -> None:
    """Run one of the two modes."""
    cpu_emulation.enable()
    mode, directory, *layouts = sys.argv[1:]
    if mode == "reference":
        write_reference(Path(directory))
        return
    parallel.start_processes(120)
    for text in layouts:
        compare(Path(directory), *parse_layout(text))
    parallel.shut_down()


if __name__ == "__main__":
    main()
