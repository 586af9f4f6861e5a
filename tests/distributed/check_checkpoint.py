"""Under torchrun: what is saved at one layout is the same at others: weights bit by bit, the next step."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from check_layouts import family_of, pack_for, parse_layout, small_config
from full_parameters import full_weights, let_go
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from reference import random_pairs

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.async_writer import CheckpointWriter
from megatron_llave.checkpoint.resume import resume
from megatron_llave.checkpoint.safe_reads import safe_reads
from megatron_llave.checkpoint.state import TrainingState, load_weights, state_metadata
from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.model import PARTS
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import CheckpointError
from megatron_llave.models import build_model
from megatron_llave.models.lora import initialize_adapters
from megatron_llave.train import train_step
from megatron_llave.training.ema import ExponentialMovingAverage
from megatron_llave.training.optimizer import build_trainable
from megatron_llave.training.temperature import LearnedTemperature

LEARNING_RATE = 1e-3
WORST_UPDATE = 2e-3
"""Of the learning rate: what float noise in a gradient may change of AdamW's next update."""
POSITION = {"step": 1, "subsets": {"birds": {"taken": 4}}}


def build(cfg: RunConfig, seed: int) -> TrainingState:
    """A run at the layout of its configuration."""
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    # Adapters are drawn from the seed, and so is the model unless its checkpoints leave it out.
    seed_of_base = 0 if cfg.lora.rank else seed
    chunks = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed_of_base, cfg.lora)
    initialize_adapters(chunks, groups.tp, seed)
    average = ExponentialMovingAverage(chunks, decay=0.5)
    temperature = LearnedTemperature(cfg.loss, cfg.optimizer)
    return TrainingState(chunks, build_trainable(cfg, chunks, groups), average, groups, temperature, cfg.lora)


def step(cfg: RunConfig, state: TrainingState, number: int) -> None:
    """A step over the same 8 pairs at every layout."""
    groups = state.groups
    share = 4 // groups.dp.size()
    pairs = random_pairs(cfg.model, 8)[groups.dp.rank() * share :]
    batches = [pack_for(cfg, groups, pairs[start : start + share]) for start in (0, 4)]
    result = train_step(state.trainable, batches, cfg.loss, number, groups, state.average, None, state.temperature)
    assert result.gradient_norms[0] > 0, "saving, averaging or loading cost the gradients"


def weights(state: TrainingState) -> tuple[dict, dict]:
    """All weights, and all averaged ones."""
    learned = torch.tensor([*state.temperature.to_save().get("all", [])], dtype=torch.float64)
    plain = full_weights(state.chunks, state.groups) | {"temperature": learned}
    with state.average.applied():
        return plain, full_weights(state.chunks, state.groups)


def check(output: str, precision: str, is_gathered: bool, saved_at: str, loaded_at: list[str]) -> None:
    """Train a step, save while training another, and go on from there at other layouts, from other weights."""
    layout, freeze = parse_layout(saved_at)
    cfg = small_config(layout, freeze, family_of(saved_at))
    cfg.model.precision = precision
    if "lora" in saved_at:  # all linear layers have adapters; `lora_base` saves the rest of the model too
        cfg.lora = LoraConfig(rank=3, targets=[*PARTS], save_base="lora_base" in saved_at)
        cfg.checkpoint.init = "base"
    cfg.train.output = output
    cfg.loss.reward = "ema"
    folder, *expected = train_and_save(cfg, is_gathered)
    process_groups.destroy_model_parallel()
    for text in [saved_at, *loaded_at]:
        check_load(replace(cfg, parallel=parse_layout(text)[0]), folder, text == saved_at, *expected)
        process_groups.destroy_model_parallel()
    check_other_model(cfg, folder)
    print(f"{saved_at} loads bit-equal at {' '.join(loaded_at)}", flush=True)


def train_and_save(cfg: RunConfig, is_gathered: bool) -> tuple[Path, tuple[dict, dict], tuple[dict, dict]]:
    """The checkpoint after one step, the weights in it, and those after the next step.

    It is saved as megatron-core saves it if `is_gathered`, which is how checkpoints were saved before.
    """
    state = build(cfg, seed=0)
    step(cfg, state, 0)
    writer = CheckpointWriter(cfg, state.groups)
    saved = weights(state)
    assert any(not torch.equal(saved[0][name], saved[1][name]) for name in saved[0]), "the average is another model"
    to_save = state.to_save(1)
    gathered = gathered_optimizer_state(state, to_save)
    values = [part.data.clone() for part in nested_values(gathered["param_state"])]
    assert writer.save(1, to_save | ({"optimizer": gathered} if is_gathered else {}), POSITION)
    step(cfg, state, 1)  # while the checkpoint is being written
    assert writer.poll(wait=True)
    assert folders.read_position(writer.last) == POSITION
    assert folders.find(cfg.train.output) == writer.last == folders.newest_usable(cfg.train.output, print)
    after = weights(state)
    require_as_gathered(writer.last, gathered["param_state"], values)
    let_go(state.trainable)
    return writer.last, saved, after


def gathered_optimizer_state(state: TrainingState, to_save: dict) -> dict:
    """What megatron-core itself saves of the optimizer: whole tensors, gathered on every data-parallel rank."""
    if "optimizer" not in to_save:
        return {"param_state": {}}
    models = {key: part for key, part in to_save.items() if key.startswith("model")}
    models = models if len(models) > 1 else models["model"]
    gathered = state.trainable.optimizer.sharded_state_dict(models, metadata=state_metadata(state.groups))
    apply_factories(gathered)
    return gathered


def require_as_gathered(folder: Path, gathered: dict, values: list[torch.Tensor]) -> None:
    """megatron-core reads from the checkpoint what it would have gathered, bit by bit."""
    for part in nested_values(gathered):
        part.data = torch.full_like(part.data, torch.nan)
    with safe_reads():
        loaded = list(nested_values(dist_checkpointing.load({"gathered": gathered}, str(folder)).get("gathered", {})))
    assert len(loaded) == len(values) and all(torch.equal(*pair) for pair in zip(loaded, values))


def check_load(
    cfg: RunConfig, folder: Path, is_same_layout: bool, saved: tuple[dict, dict], after: tuple[dict, dict]
) -> None:
    """At this layout: weights and averages bit by bit, and the step that follows."""
    state = build(cfg, seed=1)
    assert resume(state, folder, cfg) == 1
    for found, expected in zip(weights(state), saved):
        require_close(found, expected, 0.0, f"{cfg.parallel}")
    step(cfg, state, 1)
    if is_same_layout or cfg.model.precision == "fp32":  # bf16 rounds gradients otherwise at every layout
        worst = 0.0 if is_same_layout else WORST_UPDATE * LEARNING_RATE
        for found, expected in zip(weights(state), after):
            require_close(found, expected, worst, f"{cfg.parallel}, the next step")
    load_weights(folder, state.chunks, state.groups, average=True)
    require_close(full_weights(state.chunks, state.groups), saved[1], 0.0, f"{cfg.parallel}, averages alone")
    let_go(state.trainable)


def require_close(found: dict, expected: dict, worst: float, where: str) -> None:
    """Weights that differ by at most `worst`."""
    for name, value in found.items():
        rows = min(len(value), len(expected[name]))  # the vocabulary's padding differs
        value, other = value[:rows].double(), expected[name][:rows].double()
        off = (value - other).abs().max()
        assert off <= worst, f"{where}: {name} off by {off}"


def check_other_model(cfg: RunConfig, folder: Path) -> None:
    """A wider model cannot take these weights, and says which checkpoint it was given and what differs."""
    cfg = replace(cfg, parallel=parse_layout("1,1,1,0,0")[0])
    cfg.model.language.ffn_hidden_size *= 2
    state = build(cfg, seed=0)
    for load, named in (
        (lambda: load_weights(folder, state.chunks, state.groups), "linear_fc1"),
        (lambda: resume(state, folder, cfg), "model.language.ffn_hidden_size was 80, is 160"),
    ):
        try:
            load()
        except CheckpointError as error:
            message = str(error)
            assert str(folder) in message and named in message and "\n" not in message, message
        else:
            raise AssertionError("weights of another model were loaded")


if __name__ == "__main__":
    cpu_emulation.enable()
    process_groups.initialize_distributed(120)
    output, precision, form, saved_at, *loaded_at = sys.argv[1:]
    check(output, precision, form == "gathered", saved_at, loaded_at)
