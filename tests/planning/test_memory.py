"""Planned bytes against those of real steps, part by part, and of a save, on every rank: at most 10 % off."""

import json
from pathlib import Path

import pytest
from run_ranks import run_ranks

from megatron_llave.config.load import config_from_dict
from megatron_llave.planning.memory import MicroBatch, bytes_in_flight, loss_bytes, stage_chunks
from megatron_llave.planning.pair_lengths import SideShape

MEASURE = Path(__file__).resolve().parents[2] / "benchmarks" / "memory_plan.py"
WORST = 0.1
SMALL_IMAGES = "data.max_pixels=60000"
FROZEN = ["model.freeze=[vision]", "model.recompute=full"]
LORA = ["checkpoint.init=base", "lora.rank=8"]
WORST_TEMPORARY = 0.4
"""What exists for a moment is the rest of the peak, so it has the errors of all other parts: 37 % of a small number."""


def measure(world: int, *arguments: str) -> list[dict]:
    """What the benchmark found, by rank."""
    [line] = [line for line in run_ranks(world, MEASURE, "--json", *arguments).splitlines() if line.startswith("[")]
    return json.loads(line)


@pytest.mark.parametrize(
    ("world", "arguments"),
    [
        (1, ["model.recompute=selective", "model.freeze=[vision]", "--micro-batches", "3"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2", "model.recompute=full"]),
        (2, ["parallel.context=2", "--pairs", "4"]),
        (1, [*LORA, "lora.targets=[q_proj,v_proj]", "--micro-batches", "3"]),
        (2, [*LORA, "parallel.tensor=2", "parallel.sequence=true"]),
        (1, ["--preset", "tiny_qwen2vl", SMALL_IMAGES]),
        (2, ["--preset", "tiny_qwen2_5vl", SMALL_IMAGES, "parallel.tensor=2"]),
        (2, ["--preset", "tiny_qwen3vl", SMALL_IMAGES, "parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["--preset", "tiny_qwen3vl", SMALL_IMAGES, "parallel.context=2", *FROZEN]),
        (1, ["--preset", "tiny_qwen2_5vl", SMALL_IMAGES, *FROZEN]),
    ],
)
def test_plan_is_what_a_step_takes(world: int, arguments: list[str]) -> None:
    rows = measure(world, *arguments)
    for rank, row in enumerate(rows):
        planned, measured = row["planned"], row["measured"]
        assert planned.keys() == measured.keys()
        for part, found in measured.items():
            worst = WORST_TEMPORARY if part == "temporary" else WORST
            assert planned[part] == pytest.approx(found, rel=worst), f"{part} of rank {rank}"
        assert sum(planned.values()) == pytest.approx(sum(measured.values()), rel=WORST)
        assert min(measured[part] for part in ("weights", "gradients", "optimizer", "activations", "data")) > 0

    require_planned_save(rows)


def test_data_parallel_ranks_share_a_save_and_the_loss() -> None:
    rows = measure(2)
    require_planned_save(rows)
    for row in rows:  # which gather the targets of each other for the loss
        assert row["planned"]["loss"] == pytest.approx(row["measured"]["loss"], rel=0.02)
    copied = sum(row["save"]["copied"] for row in rows)
    # The weights, and the optimizer's copy of them and two moments: each once, however many ranks there are.
    assert copied == pytest.approx(4 * rows[0]["measured"]["weights"], rel=0.01)


def require_planned_save(rows: list[dict]) -> None:
    """The bytes that a save copies are those of the plan; nothing else is made, such as tensors of other ranks."""
    for row in rows:
        # What all tensor-parallel ranks have is written by the first one.
        fullest = max(other["save"]["copied"] for other in rows if other["save"]["planned"] == row["save"]["planned"])
        assert row["save"]["planned"] == pytest.approx(fullest, rel=WORST)


def test_sequences_of_a_bucket_are_padded_to_its_longest() -> None:
    batch = MicroBatch.of([SideShape(5), SideShape(8), SideShape(9), SideShape(20, 16, 4)])
    assert batch.attended == 8 + 8 + 9 + 20
    assert (batch.work.tokens, batch.work.squared_lengths, batch.work.tiles) == (42, 25 + 64 + 81 + 400, 4)
    assert (batch.sequences, batch.visual_tokens) == (4, 16)
    assert (batch.tokens, batch.tiles, batch.keys, batch.masked) == (42, 4, batch.attended, 0)


def test_context_ranks_share_a_micro_batch() -> None:
    """Sequences of 8, 8, 12 and 20 tokens after padding: chunks of 2, 2, 3 and 5, in three buckets."""
    batch = MicroBatch.of([SideShape(5), SideShape(8), SideShape(9), SideShape(20, 16, 5)], context=2)
    assert (batch.work.tokens, batch.tokens, batch.visual_tokens, batch.tiles) == (42, 24, 8, 3)
    assert (batch.attended, batch.keys, batch.masked) == (2 * 12, 5 * 12, 5 * (2 * 4 + 9 + 25))


@pytest.mark.parametrize(
    ("kept", "stage", "stages", "micro_batches", "most"),
    [
        ([1], 0, 1, 8, 1),  # no pipeline: one micro batch at a time
        ([1], 0, 4, 8, 4),  # 1F1B: as many as there are stages after this one, and its own
        ([1], 3, 4, 8, 1),
        ([1], 0, 4, 2, 2),  # never more than there are
        ([1, 1], 0, 2, 4, 5),  # interleaved: 2 (stages - 1) + (chunks - 1) stages, and one more
        ([1, 1], 1, 2, 4, 3),
    ],
)
def test_micro_batches_in_flight(kept: list[int], stage: int, stages: int, micro_batches: int, most: int) -> None:
    assert bytes_in_flight(kept, stage, stages, micro_batches) == most


def test_every_layer_is_on_one_stage() -> None:
    cfg = config_from_dict({"model": {"preset": "7b"}, "parallel": {"pipeline": 4, "first_stage_layers": 4}})
    chunks = [stage_chunks(cfg.model, cfg.parallel, stage) for stage in range(4)]
    assert [sum(chunk.layers for chunk in stage) for stage in chunks] == [4, 8, 8, 8]
    assert [[chunk.is_first for chunk in stage] for stage in chunks] == [[True], [False], [False], [False]]
    assert [[chunk.is_last for chunk in stage] for stage in chunks] == [[False], [False], [False], [True]]


def test_loss_grows_with_the_batch_and_not_with_its_square() -> None:
    rows = 8192
    assert loss_bytes(2 * rows, 2 * rows, 1024) == 2 * loss_bytes(rows, rows, 1024)
