"""Moments in bf16 and offloaded states, on a GPU that is only logical: updates, bytes, and checkpoints between them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from engine import double
from engine.checkpoints import save
from engine.gradients import ENGINE, config, reset_engine
from engine.logical import GPU
from full_parameters import let_go

from megatron_llave.checkpoint.optimizer_state import owned_values
from megatron_llave.checkpoint.state import TrainingState
from megatron_llave.config.optimizer import OptimizerConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed import process_groups
from megatron_llave.models import build_model
from megatron_llave.planning.memory import optimizer_bytes
from megatron_llave.training.optimizer import build_trainable, inner_optimizers, require_runnable

PLAIN = "plain"
KINDS = {
    PLAIN: {},
    "bf16": {"moments": "bf16"},
    "half": {"offload_fraction": 0.5},
    "all": {"offload_fraction": 1.0, "offload_overlap": True},
}
RESUMES = [*((kind, kind) for kind in KINDS), (PLAIN, "half"), ("all", PLAIN), ("bf16", "all"), (PLAIN, "bf16")]
"""Which kind goes on after a checkpoint of which."""
STEPS = 2
"""Before the checkpoint; there is another one behind it."""


def configured(kind: str) -> RunConfig:
    """The small model in bf16."""
    section = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, clip_gradient=1.0, **KINDS[kind])
    return replace(config(ENGINE, "bf16", num_layers=2), optimizer=section)


def build(cfg: RunConfig, seed: int) -> TrainingState:
    """A run at its start."""
    require_runnable(cfg.optimizer)
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), seed=seed)
    return TrainingState(chunks, build_trainable(cfg, chunks, groups), None, groups)


def step(run: TrainingState, number: int) -> None:
    """An update with random gradients, the same on all ranks, which is clipped."""
    run.trainable.zero_gradients()
    generator = torch.Generator().manual_seed(number)
    for chunk in run.trainable.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator).cuda())
    run.trainable.update(float(run.trainable.squared_norms()[0]) ** 0.5)


def values(run: TrainingState) -> dict[str, torch.Tensor]:
    """This rank's share of the weights and moments, in float32 on the host, and the model's own weights."""
    names = {parameter: name for name, parameter in run.chunks[0].named_parameters()}
    found = {
        f"{kind} {names[parameter]}": value.cpu().clone()
        for parameter, named in owned_values(run.trainable.optimizer).items()
        for kind, value in named.items()
    }
    return found | {name: parameter.detach().cpu().float() for parameter, name in names.items()}


def bytes_of_states(run: TrainingState) -> tuple[int, int]:
    """On the device and on the host, without the model's own weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in run.chunks[0].parameters()}
    [outer] = inner_optimizers(run.trainable.optimizer)
    tensors = [
        tensor
        for inner in getattr(outer, "sub_optimizers", [outer])
        for group in inner.param_groups
        for parameter in group["params"]
        for tensor in {id(x): x for x in (parameter, *inner.state[parameter].values())}.values()
        if tensor.ndim > 0 and tensor.untyped_storage().data_ptr() not in own
    ]
    sizes = [(tensor.is_cuda, tensor.nbytes) for tensor in tensors]
    return sum(n for on_device, n in sizes if on_device), sum(n for on_device, n in sizes if not on_device)


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest relative difference of weights that are updated, of moments, and of the model's own weights."""
    assert ours.keys() == theirs.keys()
    found: dict[str, float] = {}
    for name, value in ours.items():
        kind = name.split(" ")[0] if " " in name else "model"
        difference = float((value - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12))
        found[kind] = max(found.get(kind, 0.0), difference)
    return found


def updates(folder: Path) -> dict[str, object]:
    """Figures of every kind, and of every resume."""
    figures: dict[str, object] = {}
    saved, after = {}, {}
    with GPU as gpu, patch.object(double, "gpu", gpu):
        for kind in KINDS:
            cfg = configured(kind)
            run = build(cfg, seed=0)
            for number in range(STEPS):
                step(run, number)
            saved[kind] = save(cfg, run, folder / f"optimizer {kind}")
            step(run, STEPS)
            after[kind] = values(run)
            owned = sum(value.numel() for name, value in after[kind].items() if name.startswith("param "))
            device, host = bytes_of_states(run)
            planned = optimizer_bytes(cfg, owned)
            sizes = {"device": device, "host": host, "planned": planned, "owned": owned}
            figures[kind] = sizes | {"says": run.trainable.describe()} | apart(after[kind], after[PLAIN])
            let_go(run.trainable)
        for before, kind in RESUMES:
            run = build(configured(kind), seed=1)
            run.load(saved[before], STEPS, is_same_layout=True)
            step(run, STEPS)
            figures[f"{before} to {kind}"] = apart(values(run), after[before])
            let_go(run.trainable)
    reset_engine()
    return figures


def cases(world: int, folder: Path) -> dict[str, Callable[[], dict[str, object]]]:
    """One case, on two data-parallel ranks."""
    return {"optimizers": partial(updates, folder)} if world == 2 else {}
