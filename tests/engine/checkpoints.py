"""Checkpoints between local kernels and Transformer Engine: resumed, loaded as weights, evaluated and exported.

The functions up to `resumed` run in processes with Transformer Engine and in those without it.
"""

import io
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from check_layouts import GLOBAL_BATCH, FakeEncoder, micro_batches
from engine.gradients import ENGINE, LOCAL, RECIPES, config, reset_engine
from full_parameters import let_go
from golden_mmeb import golden_tasks
from golden_model import CASES, OFFICIAL, ONEVISION, byte_tokenizer, embeddings, sequence
from reference import random_pairs
from torch import Tensor

from megatron_llave.checkpoint import fp8_scales, state
from megatron_llave.checkpoint.async_writer import CheckpointWriter
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.checkpoint.resume import resume
from megatron_llave.checkpoint.state import TrainingState, load_weights
from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.convert.hf import export_hf
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.embedder import LoadedModel, embed_parts, forward_only, load_model
from megatron_llave.evaluation.evaluate import evaluate_tasks
from megatron_llave.models import build_model
from megatron_llave.models.hf.mapping import local_kernel_name
from megatron_llave.train import train_step
from megatron_llave.training.optimizer import build_trainable

DIRECTIONS = [
    *((LOCAL, "fp32", ENGINE, "fp32"), (ENGINE, "fp32", LOCAL, "fp32")),
    *((LOCAL, "bf16", ENGINE, "bf16"), (ENGINE, "bf16", LOCAL, "bf16")),
    *((ENGINE, recipe, ENGINE, recipe) for recipe in RECIPES),
    *((ENGINE, "delayed", LOCAL, "bf16"), (ENGINE, "delayed", ENGINE, "bf16"), (LOCAL, "bf16", ENGINE, "delayed")),
]
"""Kernels and precision that a checkpoint is of, and those it is loaded into."""
OLD = [(LOCAL, "fp32", ENGINE, "fp32"), (ENGINE, "delayed", ENGINE, "delayed")]
"""The same for checkpoints with extra states, which earlier versions wrote."""
LAYOUT_SAVED, LAYOUT_LOADED = "1,2,2,0,0", "2,1,1,1,0"


def short(kernels: str, precision: str) -> RunConfig:
    """A run of a model with few layers."""
    return config(kernels, precision, num_layers=2)


def build(cfg: RunConfig, seed: int) -> TrainingState:
    """A run at the start."""
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    chunks = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=seed)
    return TrainingState(chunks, build_trainable(cfg, chunks, groups), None, groups)


def train(cfg: RunConfig, run: TrainingState, step: int) -> float:
    """The loss of one step."""
    batches = micro_batches(random_pairs(cfg.model, GLOBAL_BATCH), 4, cfg, run.groups)
    shares = train_step(run.trainable, batches, cfg.loss, step, run.groups).shares
    return sum(float(share) for share, _ in shares) / max(1, len(shares))


@dataclass
class Saved:
    """A checkpoint after one step of a run."""

    path: Path
    weights: dict[str, Tensor]
    embeddings: Tensor
    loss: float
    """Of the next step."""


def saved_run(cfg: RunConfig, folder: Path, is_old: bool = False) -> Saved:
    """Train a step, save into `folder`, and train another. `is_old` saves what earlier versions did: extra states."""
    run = build(cfg, seed=0)
    train(cfg, run, 0)
    with patch.multiple(state, sharded_parameters=everything, saved_scales=nothing) if is_old else nullcontext():
        path = save(cfg, run, folder)
    weights = {name: value.clone() for name, value in parameters(run).items()}
    return Saved(path, weights, embedded(run, cfg), train(cfg, run, 1))


def save(cfg: RunConfig, run: TrainingState, folder: Path) -> Path:
    """A checkpoint after one step."""
    cfg.train = TrainConfig(output=str(folder), steps=2, global_batch_size=8)
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    writer = CheckpointWriter(cfg, run.groups)
    assert writer.save(1, run.to_save(1), None) and writer.poll(wait=True)
    return writer.last


def everything(chunk: torch.nn.Module, metadata: dict, prefix: str = "") -> dict:
    return chunk.sharded_state_dict(prefix=prefix, metadata=metadata)


def nothing(chunk: torch.nn.Module, metadata: dict) -> dict:
    return {}


def resumed(cfg: RunConfig, folder: Path) -> float:
    """The loss of the step after checkpoint `folder`."""
    cfg.train = TrainConfig(output=str(folder.parents[1]), steps=2, global_batch_size=8)
    run = build(cfg, seed=1)
    assert resume(run, folder, cfg) == 1
    return train(cfg, run, 1)


def parameters(run: TrainingState) -> dict[str, Tensor]:
    return {local_kernel_name(name): value.detach() for name, value in run.chunks[0].named_parameters()}


def embedded(run: TrainingState, cfg: RunConfig) -> Tensor:
    """Embeddings of some sequences."""
    model = LoadedModel(cfg, run.chunks, FakeEncoder(cfg.model), run.groups)
    sides = [side for pair in random_pairs(cfg.model, 4) for side in pair]
    return forward_only(model, [model.pack(sides)])[0]


def between(folder: Path, kernels: str, precision: str, to_kernels: str, to_precision: str, is_old: bool) -> dict:
    """Save with one kind of kernels, load with another: as weights, and to resume where the precision is the same."""
    name = f"{kernels} {precision}{' old' if is_old else ''}"
    if name not in SAVED:
        SAVED[name] = saved_run(short(kernels, precision), folder / name, is_old)
    reset_engine()
    saved, cfg, said = SAVED[name], short(to_kernels, to_precision), io.StringIO()
    handler = logging.StreamHandler(said)
    fp8_scales.logger.addHandler(handler)
    run = build(cfg, seed=1)
    load_weights(saved.path, run.chunks, run.groups)
    fp8_scales.logger.removeHandler(handler)
    weights = parameters(run)
    figures = {
        "weights": all(torch.equal(weights[name], saved.weights[name]) for name in weights.keys() | saved.weights),
        "embeddings": apart(embedded(run, cfg), saved.embeddings),
        "said": said.getvalue(),
    }
    if precision == to_precision:
        figures["loss"] = abs(resumed(short(to_kernels, to_precision), saved.path) / saved.loss - 1)
    return figures


SAVED: dict[str, Saved] = {}


def golden(folder: Path) -> dict:
    """The converted golden model on Transformer Engine, in fp32: embedded, evaluated, trained, exported."""
    tokenizer, cases = byte_tokenizer(folder), [sequence(case) for case in CASES + OFFICIAL]
    rows, scores = {}, {}
    for kernels in (LOCAL, ENGINE):
        model = load_model(folder / "golden", [f"model.kernels={kernels}", f"data.tokenizer={tokenizer}"])
        rows[kernels] = forward_only(model, [model.pack(cases)])[0]
        embedder = CachedEmbedder(partial(embed_parts, model), None, {}, model.groups.dp)
        scores[kernels] = [
            result.precision_at_1 for result in evaluate_tasks(embedder, golden_tasks(), "first").results
        ]
    cfg = model.cfg
    cfg.loss.temperature, cfg.optimizer.learning_rate = 0.1, 1e-3
    run = TrainingState(model.chunks, build_trainable(cfg, model.chunks, model.groups), None, model.groups)
    train(cfg, run, 0)
    path = save(cfg, run, folder / "golden run")
    trained = forward_only(model, [model.pack(cases)])[0]
    export_hf(path, folder / "exported", model.groups)
    exported = build_model(find_pretrained(ONEVISION).cfg.model, cfg.parallel, model.groups, torch.device("cpu"), None)
    find_pretrained(folder / "exported").load(exported, model.groups)
    with torch.no_grad():
        again = exported[0].eval()(model.pack(cases))
    return {
        "off the golden embeddings": apart(rows[ENGINE], embeddings()),
        "off local kernels": apart(rows[ENGINE], rows[LOCAL]),
        "evaluation": scores[LOCAL] == scores[ENGINE] and len(scores[LOCAL]) > 0,
        "trained": apart(trained, rows[ENGINE]),
        "exported": apart(again, trained),
    }


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def from_elsewhere(folder: Path) -> dict:
    """Resume the run of a process without Transformer Engine, and leave it one to resume."""
    elsewhere = next((folder / "local run").glob("checkpoints/step-*"))
    saved = saved_run(short(ENGINE, "fp32"), folder / "engine run")
    return {"resumed": resumed(short(ENGINE, "fp32"), elsewhere), "to resume": saved.loss}


def scales_at_other_layouts(folder: Path) -> dict:
    """Layers whose scales or histories of delayed scaling are others after a checkpoint is loaded at another layout."""
    cfg = config(ENGINE, "delayed", LAYOUT_SAVED)
    run = build(cfg, seed=0)
    train(cfg, run, 0)
    path, saved = save(cfg, run, folder / "delayed pipeline"), scales(run)
    let_go(run.trainable)
    del run
    process_groups.destroy_model_parallel()
    reset_engine()
    run = build(config(ENGINE, "delayed", LAYOUT_LOADED), seed=1)
    load_weights(path, run.chunks, run.groups)
    loaded = scales(run)
    let_go(run.trainable)
    reset_engine()
    others = [key for key in saved.keys() | loaded if not torch.equal(saved.get(key, NONE), loaded.get(key, NONE))]
    return {
        "tensors": len(saved),
        "others": others,
        "as at the start": [key for key in saved if "scale_fwd" in key and bool((saved[key] == 1).all())],
    }


NONE = torch.empty(0)


def scales(run: TrainingState) -> dict[str, Tensor]:
    """The scales and histories of all layers, over all stages of the pipeline, by their names in a checkpoint."""
    metadata = state.state_metadata(run.groups)
    states = [held for chunk in run.chunks for held in fp8_scales.saved_scales(chunk, metadata).values()]
    own = {f"{held.unique_key} {name}": tensor for held in states for name, tensor in held.data.items()}
    stages = [None] * run.groups.pp.size()
    dist.all_gather_object(stages, own, group=run.groups.pp)
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def cases(world: int, folder: Path) -> dict[str, Callable[[], dict]]:
    """Cases by name."""
    if world == 2:
        return {"scales at other layouts": partial(scales_at_other_layouts, folder)}
    found: dict[str, Callable[[], dict]] = {"golden": partial(golden, folder)}
    found["from elsewhere"] = partial(from_elsewhere, folder)
    for is_old, directions in ((False, DIRECTIONS), (True, OLD)):
        for kernels, precision, *to in directions:
            name = f"{'old ' if is_old else ''}{kernels} {precision} to {' '.join(to)}"
            found[name] = partial(between, folder, kernels, precision, *to, is_old=is_old)
    return found
