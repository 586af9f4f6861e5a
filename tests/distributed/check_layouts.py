"""Under torchrun: the model's embeddings, gradients and losses at many layouts against one plain process.

check_layouts.py reference DIR LAYOUT (one process) writes what a plain loop without schedules or wrappers gives
check_layouts.py compare DIR LAYOUT... compares; LAYOUT is tensor,pipeline,virtual,sequence,first_stage_layers
and the names of frozen parts, `context2` for parallel.context=2, `overlap` for parallel.overlap, and `qwen3_vl` for a
model of that family
check_layouts.py broken DIR LAYOUT   shows that the comparison fails when a constant is off
"""

import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import several_targets
import torch
import torch.distributed as dist
from full_parameters import full_gradients, let_go, worst_relative_error
from megatron.core.distributed import DistributedDataParallelConfig as DataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from reference import dense_contrastive_loss, pack, pack_pair_batch, random_pairs, random_sequence, tile_shape
from safetensors.torch import load_file, save_file

from megatron_llave.batch import PairBatch
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.model import PARTS, LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.config.optimizer import OptimizerConfig
from megatron_llave.config.schema import ParallelConfig, RunConfig, TrainConfig
from megatron_llave.data.packing import EncodedSequence
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.distributed.layout import validate_layout
from megatron_llave.embedding.embedder import LoadedModel, forward_only
from megatron_llave.loss import Compare, build_loss, contrastive, negatives
from megatron_llave.loss.contrastive import LossShare
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.models import build_model
from megatron_llave.models.blocks.initialization import initialize_parameters
from megatron_llave.models.blocks.kernels import row_multiple
from megatron_llave.train import train_step
from megatron_llave.training import gradient_cache, optimizer
from megatron_llave.training.broadcast import exchange_row_counts
from megatron_llave.training.ema import ExponentialMovingAverage
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.metrics import step_metrics
from megatron_llave.training.optimizer import Trainable, build_trainable
from megatron_llave.training.temperature import LearnedTemperature, read_gradient

TOLERANCE = 1e-5
GLOBAL_BATCH = 8
POOLS = (2, 4, 8)
"""Numbers of pairs that are each other's negatives."""
TEMPERATURE, ALPHA = 0.1, 9.0
STEPS = 3
REWARD_SEED = 1
"""Weights of the reward model that compare_reward uses."""
BUCKET_SIZE = 20_000
"""Elements of a bucket of gradients, with overlap: several in this small model."""
HARD_SHARES = {1: [4], 2: [3, 1], 4: [2, 1, 0, 1]}
"""Hard negatives of each data-parallel rank, by their number."""


def small_config(layout: ParallelConfig, freeze: list[str], family: str = ModelConfig.family) -> RunConfig:
    """Four decoder layers, so that every layout has something to split."""
    vision = VisionConfig(hidden_size=32, num_layers=2, num_heads=4, ffn_hidden_size=64, image_size=30)
    language = LanguageConfig(
        hidden_size=48, num_layers=4, num_heads=4, num_kv_heads=2, ffn_hidden_size=80, vocab_size=300
    )
    if family != ModelConfig.family:
        vision = replace(vision, image_size=0, patch_size=4, num_positions=16, deepstack_layers=[0, 1])
        language = replace(language, mrope_section=[2, 2, 2])
    model = ModelConfig(family=family, vision=vision, language=language, freeze=freeze)
    return RunConfig(
        model=model,
        parallel=layout,
        loss=LossConfig(temperature=TEMPERATURE, alpha=ALPHA, temperature_learning="one"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            clip_gradient=1.0,
            epsilon=1e-5,
            vision_layer_decay=1.0 if "vision" in freeze else 0.5,
        ),
        train=TrainConfig(steps=STEPS, global_batch_size=GLOBAL_BATCH),
    )


def write_reference(directory: Path, family: str) -> None:
    """The whole model in one process, autograd alone: no schedule, no data-parallel wrapper, no gather."""
    cfg = small_config(ParallelConfig(), [], family)
    process_groups.initialize_distributed(60)
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    (model,) = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=0)
    pairs = random_pairs(cfg.model, GLOBAL_BATCH)
    embeddings = torch.cat([model(pack([side], cfg.model)) for pair in pairs for side in pair])
    hard = torch.cat([model(pack([side], cfg.model)) for side in hard_negatives(cfg)])
    save_file({"embeddings": embeddings.detach()}, directory / "embeddings.safetensors")
    log = torch.tensor(TEMPERATURE, dtype=torch.float64).log().requires_grad_()
    for pool in POOLS:
        losses = []
        for start in range(0, GLOBAL_BATCH, pool):
            both = embeddings[2 * start : 2 * (start + pool)]
            losses.append(dense_contrastive_loss(both[0::2], both[1::2], log.exp(), ALPHA))
        save_gradients(model, torch.stack(losses).mean(), directory / f"pool{pool}.safetensors", log)
    (judge,) = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=REWARD_SEED)
    sides = [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs), *hard_negatives(cfg)]
    judged = torch.cat([judge(pack([side], cfg.model)) for side in sides]).detach()
    reward = PairEmbeddings(*judged.split([GLOBAL_BATCH, GLOBAL_BATCH, len(hard)]))
    whole = dense_contrastive_loss(embeddings[0::2], embeddings[1::2], TEMPERATURE, ALPHA, hard, reward=reward)
    save_gradients(model, whole, directory / "reward.safetensors")
    for name, loss in several_targets.losses(embeddings, hard, TEMPERATURE, ALPHA).items():
        save_gradients(model, loss, directory / f"{name}.safetensors")
    process_groups.destroy_distributed()


def hard_negatives(cfg: RunConfig) -> list[EncodedSequence]:
    """Four hard negatives, every other one with a picture."""
    return [random_sequence(cfg.model, 100 + index, index % 2 == 0) for index in range(4)]


def save_gradients(model: torch.nn.Module, value: torch.Tensor, path: Path, log: torch.Tensor | None = None) -> None:
    """Of all parameters and, where the loss depends on it, of the logarithm of the temperature."""
    model.zero_grad()
    value.backward(retain_graph=True)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if log is not None:
        gradients["log_temperature"], log.grad = log.grad, None
    save_file(gradients | {"loss": value.detach()}, path)


def compare(directory: Path, layout: ParallelConfig, freeze: list[str], family: str) -> None:
    """Raise unless this layout gives the reference's embeddings and gradients."""
    cfg = small_config(layout, freeze, family)
    validate_layout(cfg.model, layout, dist.get_world_size())
    groups = process_groups.initialize_model_parallel(layout)
    chunks = build_model(cfg.model, layout, groups, torch.device("cpu"), seed=0)
    with patch.object(optimizer, "DistributedDataParallelConfig", partial(DataParallelConfig, bucket_size=BUCKET_SIZE)):
        trainable = build_trainable(cfg, chunks, groups)
    share = 4 // groups.dp.size()
    worst = [compare_gradients(directory, "micro_batch", share, cfg, trainable, groups)]
    if groups.dp.size() == 2:
        worst.append(compare_gradients(directory, "own_micro_batch", share, cfg, trainable, groups))
    if "language" in freeze and groups.dp.size() == 2:
        # One pair per rank: the third is text alone, of which nothing is trained.
        worst.append(compare_gradients(directory, "micro_batch", 1, cfg, trainable, groups))
    for micro_batch in (1, 2, 4):
        num_micro_batches, rest = divmod(GLOBAL_BATCH, micro_batch * groups.dp.size())
        if rest == 0 and (layout.virtual_pipeline == 1 or num_micro_batches % layout.pipeline == 0):
            worst.append(compare_gradients(directory, "global_batch", micro_batch, cfg, trainable, groups))
    if not freeze:
        worst.append(compare_reward(directory, cfg, trainable, groups))
        worst += compare_several(directory, cfg, trainable, groups)
    pairs = random_pairs(cfg.model, GLOBAL_BATCH)
    trainable.zero_gradients()  # as after an update, all weights are being gathered, in one order on all ranks
    check_embeddings(directory, trainable.chunks, pairs, cfg, groups)
    cfg.loss.negatives = "micro_batch"
    batches = micro_batches(pairs, share, cfg, groups)
    learned = LearnedTemperature(cfg.loss, cfg.optimizer)
    results = [train_step(trainable, batches, cfg.loss, step, groups, temperature=learned) for step in range(STEPS)]
    losses = [step_metrics(result.shares, batches, groups.dp)["loss"] for result in results]
    losses.append(*learned.temperatures().values())
    assert abs(losses[-1] - TEMPERATURE) > 1e-4, "the temperature did not move"
    if dist.get_rank() == dist.get_world_size() - 1:  # always on the last stage
        print(f"{layout} freeze={freeze}: gradients off by {', '.join(f'{x:.1e}' for x in worst)}, losses {losses}")
        save_losses(directory, freeze, losses + results[0].gradient_norms)
    let_go(trainable)


def micro_batches(pairs: list, size: int, cfg: RunConfig, groups: ProcessGroupCollection) -> list[PairBatch]:
    """This rank's micro batches, each `size` pairs; all ranks' m-th micro batches lie together in the global batch."""
    starts = range(groups.dp.rank() * size, len(pairs), groups.dp.size() * size)
    return [pack_for(cfg, groups, pairs[start : start + size]) for start in starts]


def pack_for(
    cfg: RunConfig, groups: ProcessGroupCollection, pairs: list, hard_negatives: list[EncodedSequence] = ()
) -> PairBatch:
    """This rank's part of a micro batch."""
    multiple = row_multiple(cfg.model, cfg.parallel)
    batch = pack_pair_batch(pairs, cfg.model, multiple, hard_negatives, cfg.parallel.context)
    return batch.part(groups.cp.rank())


def compare_gradients(
    directory: Path, negatives: str, size: int, cfg: RunConfig, trainable: Trainable, groups: ProcessGroupCollection
) -> float:
    """Every parameter's gradient and the loss against the plain process; returns the worst relative error."""
    calls = TowerCalls(trainable.chunks)
    batches = micro_batches(random_pairs(cfg.model, GLOBAL_BATCH), size, cfg, groups)
    if negatives == "global_batch":  # whose last decides when gradients are summed: one rank's has no pictures
        batches.sort(key=lambda batch: batch.sequences.num_tiles == 0)
    trainable.zero_gradients()
    log = torch.tensor(TEMPERATURE, dtype=torch.float64).log().requires_grad_()
    loss = replace(cfg.loss, negatives=negatives)
    seen = forward_backward(trainable.chunks, batches, build_loss(loss, groups.dp, log), loss)
    slope = read_gradient(log, groups, loss.takes_one_pass(len(batches)))
    what = f"{cfg.parallel} freeze={cfg.model.freeze} {negatives} micro batch {size}"
    pools = {"global_batch": GLOBAL_BATCH, "micro_batch": size * groups.dp.size(), "own_micro_batch": size}
    file = directory / f"pool{pools[negatives]}.safetensors"
    error = check_step(file, seen, cfg, trainable, groups, what)
    expected = float(load_file(file)["log_temperature"])
    assert abs(slope - expected) <= TOLERANCE * abs(expected), f"{what}: {slope} of the temperature and not {expected}"
    assert all(batch.sequences.features is None for batch in batches), f"{what}: features are kept after the step"
    passes = 2 if negatives == "global_batch" and len(batches) > 1 and "vision" not in cfg.model.freeze else 1
    with_images = sum(batch.sequences.num_tiles > 0 for batch in batches)
    assert calls.stop() in (0, passes * with_images), f"{what}: the tower ran {calls.count} times"
    return error


def comparison(cfg: RunConfig, groups: ProcessGroupCollection, **changes: object) -> Compare:
    return build_loss(replace(cfg.loss, **changes), groups.dp)


def check_step(
    path: Path, seen: list[LossShare], cfg: RunConfig, trainable: Trainable, groups: ProcessGroupCollection, what: str
) -> float:
    """The gradients left in the buffers, and the loss, against those in `path`."""
    reference = load_file(path)
    expected = float(reference.pop("loss"))
    reference.pop("log_temperature", None)  # compare_gradients looks at it
    scale = get_model_config(trainable.chunks[0]).grad_scale_func(torch.ones(()))
    gradients = {name: gradient / scale for name, gradient in full_gradients(trainable, groups).items()}
    freeze = cfg.model.freeze
    frozen = tuple(freeze) + (("image_newline",) if "projector" in freeze else ())
    trained = {name: value for name, value in reference.items() if not name.startswith(frozen or "nothing")}
    name, error = worst_relative_error(gradients, trained)
    assert error <= TOLERANCE, f"{what}: gradient of {name} is off by {error:.1e}"
    if seen:
        mean = torch.stack([share for share, _ in seen]).mean()
        dist.all_reduce(mean, group=groups.dp)
        assert abs(float(mean) / groups.dp.size() - expected) <= 1e-5 * abs(expected), what
    return error


def compare_reward(directory: Path, cfg: RunConfig, trainable: Trainable, groups: ProcessGroupCollection) -> float:
    """Another reward model, ragged hard negatives, unequal micro batches, and a scaled loss, all at once."""
    chunks = [chunk.module for chunk in trainable.chunks]
    initialize_parameters(chunks, groups.tp, REWARD_SEED)
    average = ExponentialMovingAverage(chunks, decay=0.9)
    initialize_parameters(chunks, groups.tp, 0)
    rank, world = groups.dp.rank(), groups.dp.size()
    share = GLOBAL_BATCH // world
    own = random_pairs(cfg.model, GLOBAL_BATCH)[rank * share : (rank + 1) * share]
    first_hard = sum(HARD_SHARES[world][:rank])
    hard = hard_negatives(cfg)[first_hard : first_hard + HARD_SHARES[world][rank]]
    deal = [(own[:1], []), ([], []), (own[2:], hard[:1]), (own[1:2], hard[1:])]  # the second: all unreadable
    batches = [pack_for(cfg, groups, part, further) for part, further in deal]
    trainable.zero_gradients()
    with ExitStack() as scaled:
        for chunk in trainable.chunks:
            scaled.enter_context(patch.object(get_model_config(chunk), "grad_scale_func", lambda value: 1024 * value))
        compare, counted = counting(cfg, groups)
        seen = forward_backward(trainable.chunks, batches, compare, cfg.loss, average.applied)
        what = f"{cfg.parallel} with a reward model"
        error = check_step(directory / "reward.safetensors", seen, cfg, trainable, groups, what)
    check_stored(cfg, batches, trainable, groups)
    assert len(counted) == len(seen)
    for numbers in counted:
        expected = torch.full_like(numbers, GLOBAL_BATCH - 1 + sum(HARD_SHARES[world]))
        torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=0)
    return error


def compare_several(
    directory: Path, cfg: RunConfig, trainable: Trainable, groups: ProcessGroupCollection
) -> list[float]:
    """Several targets with soft labels, and graded pairs, in two micro batches, one of them empty on some ranks."""
    multiple = row_multiple(cfg.model, cfg.parallel)
    first, share = groups.dp.rank() * 4 // groups.dp.size(), 4 // groups.dp.size()
    parts = range(first, first + 1), range(first + 1, first + share)
    whole = [several_targets.pack_part(cfg, rows, multiple, hard_negatives(cfg)) for rows in parts]
    batches = [batch.part(groups.cp.rank()) for batch in whole]
    exchange_row_counts(batches, groups.dp)
    errors = []
    for name, changes in several_targets.OBJECTIVES.items():
        trainable.zero_gradients()
        seen = forward_backward(trainable.chunks, batches, comparison(cfg, groups, **changes), cfg.loss)
        what = f"{cfg.parallel} {name}"
        errors.append(check_step(directory / f"{name}.safetensors", seen, cfg, trainable, groups, what))
    return errors


def check_stored(
    cfg: RunConfig, batches: list[PairBatch], trainable: Trainable, groups: ProcessGroupCollection
) -> None:
    """Stored embeddings that are the model's own give the same loss and gradient as the model's own judgement.

    Cosines and hardness are rounded apart and not as one product, so gradients differ by up to 2e-6.
    """
    if cfg.parallel.overlap or cfg.parallel.virtual_pipeline > 1 or cfg.parallel.context > 1:
        return  # the reward comes to the last stage in the same way
    embeddings = gradient_cache._embed(trainable.chunks, batches)
    stored = [replace(batch, stored=rows.clone()) for batch, rows in zip(batches, embeddings)] or batches
    results = []
    for own, reward in ((batches, "self"), (stored, "stored")):
        trainable.zero_gradients()
        loss = replace(cfg.loss, reward=reward)
        seen = forward_backward(trainable.chunks, own, build_loss(loss, groups.dp), loss)
        loss = torch.stack([share for share, _ in seen] or [torch.ones(())])  # 1 on the stages before the last
        results.append(full_gradients(trainable, groups) | {"loss": loss})
    name, error = worst_relative_error(*results[::-1])
    assert error <= 5e-6, f"{cfg.parallel} stored: {name} is off by {error:.1e}"


def counting(cfg: RunConfig, groups: ProcessGroupCollection) -> tuple[Compare, list[torch.Tensor]]:
    """The loss, and a list to which each of its calls adds how many negatives each of its queries has.

    At a huge temperature all negatives weigh the same without alpha, so their effective number is their number. Ranks
    of one replica hold the same embeddings: if any of them were gathered, it would be larger.
    """
    compare, count, counted = comparison(cfg, groups), comparison(cfg, groups, temperature=1e6, alpha=0.0), []

    def both(embeddings: PairEmbeddings, ids: PairIds, reward: PairEmbeddings | None) -> LossShare:
        counted.append(count(embeddings, ids, reward)[1].effective_negatives)
        return compare(embeddings, ids, reward)

    return both, counted


def check_that_it_bites(directory: Path, layout: ParallelConfig) -> None:
    """With any one of the constants off, or with the gather left out, the comparison must fail."""
    cfg = small_config(layout, [])
    groups = process_groups.initialize_model_parallel(layout)
    chunks = build_model(cfg.model, layout, groups, torch.device("cpu"), seed=0)
    trainable = build_trainable(cfg, chunks, groups)
    compare_gradients(directory, "global_batch", 1, cfg, trainable, groups)
    replay = gradient_cache._replay_step
    breaks = {
        "number of micro batches": patch.object(
            gradient_cache, "_replay_step", lambda *args, schedule_divisor, states: replay(*args, 1, states)
        ),
        "number of ranks": patch.object(negatives.Context, "scale", property(lambda context: 0.5 / context.num_rows)),
        "other ranks' gradients": patch.object(contrastive, "reduce_scatter_rows", this_rank_alone),
    }
    for name, broken in breaks.items():
        try:
            with broken:
                compare_gradients(directory, "global_batch", 1, cfg, trainable, groups)
        except AssertionError as error:
            assert "gradient of" in str(error)
            print(f"bites without {name}: {error}")
        else:
            raise AssertionError(f"the comparison does not see that {name} is missing")
    let_go(trainable)


def this_rank_alone(rows: torch.Tensor, counts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    return rows.split(counts)[group.rank()]


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
    """The first layout sets the losses of three steps, and gradient norms of parts; the others must follow."""
    path = directory / f"losses{'-'.join(freeze)}.safetensors"
    ours = torch.tensor(losses)
    if path.exists():
        torch.testing.assert_close(ours, load_file(path)["losses"], rtol=1e-4, atol=1e-5)
    else:
        save_file({"losses": ours}, path)


def check_embeddings(directory, chunks, pairs, cfg, groups) -> None:
    """All sequences packed into one row, on the last stage, against one at a time."""
    model = LoadedModel(cfg, chunks, FakeEncoder(cfg.model), groups)
    outputs = forward_only(model, [model.pack([side for pair in pairs for side in pair])])
    if groups.pp.rank() == groups.pp.size() - 1:
        expected = load_file(directory / "embeddings.safetensors")["embeddings"]
        torch.testing.assert_close(outputs[0], expected, rtol=0, atol=1e-5)


class FakeEncoder:
    """What forward_only asks of an encoder."""

    def __init__(self, model: ModelConfig) -> None:
        self.tile_shape = tile_shape(model)


def parse_layout(text: str) -> tuple[ParallelConfig, list[str]]:
    """tensor,pipeline,virtual,sequence,first_stage_layers[,frozen part][,context2][,overlap]."""
    tensor, pipeline, virtual, sequence, first, *others = text.split(",")
    freeze = [name for name in others if name in PARTS]
    layout = ParallelConfig(
        tensor=int(tensor),
        pipeline=int(pipeline),
        virtual_pipeline=int(virtual),
        sequence=sequence == "1",
        first_stage_layers=int(first) or None,
        context=2 if "context2" in others else 1,
        overlap="overlap" in others,
    )
    return layout, freeze


def family_of(text: str) -> str:
    """The model family that a layout is for."""
    return next((word for word in text.split(",") if word.startswith("qwen")), ModelConfig.family)


def main() -> None:
    """Run one of the modes."""
    cpu_emulation.enable()
    mode, directory, *layouts = sys.argv[1:]
    if mode == "reference":
        write_reference(Path(directory), family_of(layouts[0]))
        return
    process_groups.initialize_distributed(120)
    for text in layouts:
        if mode == "broken":
            check_that_it_bites(Path(directory), parse_layout(text)[0])
        else:
            compare(Path(directory), *parse_layout(text), family_of(text))
        process_groups.destroy_model_parallel()
    process_groups.destroy_distributed()


if __name__ == "__main__":
    main()
