"""Under torchrun with 4 ranks: weights saved at one layout are bit-equal when loaded at others."""

import sys
from pathlib import Path

import torch
from check_layouts import parse_layout, small_config
from full_parameters import full_weights
from reference import pack_pair_batch, random_pairs

from megatron_llave import checkpoint, cpu_emulation, parallel
from megatron_llave.errors import CheckpointError
from megatron_llave.model.embedder import build_model
from megatron_llave.optimizer import build_trainable
from megatron_llave.train import train_step
from megatron_llave.weight_average import WeightAverage


def check(output: str, precision: str, saved_at: str, loaded_at: list[str]) -> None:
    """Train a step, save, train another, and load what was saved into models of other seeds at other layouts."""
    layout, freeze = parse_layout(saved_at)
    cfg = small_config(layout, freeze)
    cfg.model.precision = precision
    cfg.train.output = output
    groups = parallel.init(layout)
    chunks = build_model(cfg.model, layout, groups, torch.device("cpu"), seed=0)
    trainable = build_trainable(cfg, chunks, groups)
    share = 4 // groups.dp.size()
    pairs = random_pairs(cfg.model, 8)[groups.dp.rank() * share :]
    multiple = layout.tensor if layout.sequence else 1
    batches = [pack_pair_batch(pairs[start : start + share], cfg.model, multiple) for start in (0, 4)]
    average = WeightAverage(chunks, decay=0.5)
    train_step(trainable, batches, cfg.loss, 0, groups, average)
    position = {"step": 1, "subsets": {"birds": {"taken": 4}}}
    state = trainable.optimizer, trainable.schedule
    folder = checkpoint.save(cfg, 1, chunks, *state, groups, position, average.tensors())
    assert checkpoint.read_position(folder) == position
    assert checkpoint.find(output) == folder
    saved = full_weights(chunks, groups)
    with average.applied():
        saved_average = full_weights(chunks, groups)
    assert any(not torch.equal(saved[name], saved_average[name]) for name in saved)
    record, _ = train_step(trainable, batches, cfg.loss, 1, groups, average)
    assert record["gradient_norm"] > 0, "saving and averaging cost the gradients"
    parallel.leave_layout()
    for index, text in enumerate(loaded_at):
        layout, freeze = parse_layout(text)
        groups = parallel.init(layout)
        chunks = build_model(cfg.model, layout, groups, torch.device("cpu"), seed=1)
        # The average takes the same way: two layouts are enough for it.
        for is_average, expected in ((False, saved), (True, saved_average))[: 2 if index < 2 else 1]:
            checkpoint.load_weights(folder, chunks, groups, is_average)
            for name, value in full_weights(chunks, groups).items():
                rows = min(len(value), len(expected[name]))  # the vocabulary's padding differs
                assert torch.equal(value[:rows], expected[name][:rows]), f"{saved_at} -> {text}: {name} {is_average}"
        parallel.leave_layout()
    check_other_model(cfg, folder)
    print(f"{saved_at} loads bit-equal at {' '.join(loaded_at)}", flush=True)


def check_other_model(cfg, folder: Path) -> None:
    """A wider model cannot take these weights, and says which checkpoint it was given."""
    layout, _ = parse_layout("1,1,1,0,0")
    groups = parallel.init(layout)
    cfg.model.language.ffn_hidden_size *= 2
    chunks = build_model(cfg.model, layout, groups, torch.device("cpu"), seed=0)
    try:
        checkpoint.load_weights(folder, chunks, groups)
    except CheckpointError as error:
        message = str(error)
        assert str(folder) in message and "linear_fc1" in message and "\n" not in message, message
    else:
        raise AssertionError("weights of another model were loaded")
    parallel.leave_layout()


if __name__ == "__main__":
    cpu_emulation.enable()
    parallel.start_processes(120)
    check(*sys.argv[1:4], sys.argv[4:])
    parallel.shut_down()
