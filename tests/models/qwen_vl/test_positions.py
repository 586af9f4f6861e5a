"""Positions of tokens in time, row and column, against the stored ones and transformers' own function."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from megatron_llave.data.packing import IMAGE
from megatron_llave.models.qwen_vl.positions import (
    counted_positions,
    frame_times,
    seconds_per_pair,
    time_stamps,
    token_positions,
)

GOLDEN = Path(__file__).parents[2] / "golden/qwen_vl"
CASES = [(path.parent.name, path.stem) for path in sorted(GOLDEN.glob("*/input_*.npz"))]


def with_images(ids: list[int], pads: set[int]) -> list[int]:
    """The ids with IMAGE for each run of pads."""
    return [
        IMAGE if is_pad else token
        for is_pad, run in itertools.groupby(ids, pads.__contains__)
        for token in (run if not is_pad else [0])
    ]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_positions_are_the_stored_ones(family: str, case: str) -> None:
    config = json.loads((GOLDEN / family / "config.json").read_text())
    pads = {config["image_token_id"], config["video_token_id"]}
    with np.load(GOLDEN / family / f"{case}.npz") as stored:
        key = next((name for name in stored if name.endswith("grid_thw")), None)
        grids = [] if key is None else [tuple(grid) for grid in stored[key].tolist()]
        if family == "qwen3_vl":
            grids = [(1, rows, columns) for frames, rows, columns in grids for _ in range(frames)]
        positions = token_positions(with_images(stored["input_ids"].tolist(), pads), grids)
        assert positions.dtype == np.int64 and np.array_equal(positions, stored["position_ids"])


def of_transformers(kinds: Tensor, grid: tuple[int, int, int], tokens_per_second: int, seconds: float) -> Tensor:
    """Positions [3, 1, length] of transformers for one video whose pairs of frames are `seconds` apart."""
    model = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
        ),
    )
    model.get_vision_position_ids = lambda *args, **more: Qwen2_5_VLModel.get_vision_position_ids(model, *args, **more)
    return Qwen2_5_VLModel.get_rope_index(
        model, kinds + 5, kinds, video_grid_thw=torch.tensor([grid]), second_per_grid_ts=torch.tensor([seconds])
    )[0]


@pytest.mark.parametrize("tokens_per_second", [2, 4])
def test_time_in_videos_of_qwen2_5_vl(tokens_per_second: int) -> None:
    """Equal to transformers up to the end of the video; where it is longer in time, text then goes on later."""
    grid, before, after = (5, 4, 6), 3, 4
    kinds = torch.tensor([[0] * before + [2] * 30 + [0] * after])
    seconds = seconds_per_pair(frame_times(10))
    assert seconds == 1
    theirs = of_transformers(kinds, grid, tokens_per_second, seconds)
    ours = token_positions([5] * before + [IMAGE] + [5] * after, [grid], tokens_per_second * seconds)
    assert np.array_equal(ours[:, : before + 30], theirs[:, 0, : before + 30].numpy())
    end = before + 4 * tokens_per_second
    assert ours[0, before:33].max() == end, "the last pair of frames begins in second 4"
    assert ours[:, 33:].tolist() == [list(range(end + 1, end + 1 + after))] * 3
    assert theirs[0, 0, 33] == before + 3, "transformers 5 goes on after the wider side, 3 visual tokens"


@pytest.mark.parametrize("fps", [0.25, 0.3, 1, 1.5, 2.99, 3, 5, 7, 24, 29.97])
def test_times_of_frames_give_the_positions_of_transformers(fps: float) -> None:
    for tokens_per_second in (2, 4):
        seconds = seconds_per_pair([number / fps for number in range(63)])
        theirs = of_transformers(torch.full((1, 32), 2), (32, 2, 2), tokens_per_second, 2 / fps)
        ours = token_positions([IMAGE], [(32, 2, 2)], tokens_per_second * seconds)
        assert np.array_equal(ours, theirs[:, 0].numpy()), tokens_per_second
    assert seconds_per_pair([7.0]) == 1, "one frame has no rate"


def test_a_fraction_of_a_position_is_rounded_down() -> None:
    assert token_positions([IMAGE], [(4, 2, 2)], interval=1.5)[0].tolist() == [0, 1, 3, 4]


def test_positions_without_images_and_counted_ones() -> None:
    expected = [[0, 1, 2]] * 3
    assert token_positions([7, 8, 9], []).tolist() == counted_positions(3).tolist() == expected
    assert counted_positions(3).dtype == np.int64


def test_time_stamps() -> None:
    """Half a second between frames, so 0.25, 1.25, ... in the middle of each pair, with one digit as Python rounds."""
    assert time_stamps(frame_times(4)) == ["<0.2 seconds>", "<1.2 seconds>"]
    assert time_stamps(frame_times(5)) == ["<0.2 seconds>", "<1.2 seconds>", "<2.0 seconds>"]
    assert time_stamps(frame_times(1)) == ["<0.0 seconds>"]


@pytest.mark.parametrize("num_frames", [1, 7, 32])
def test_time_stamps_of_evenly_spaced_frames_are_those_of_transformers(num_frames: int) -> None:
    """Frames of a clip of two minutes, at 29.97 frames per second."""
    indices, fps = np.linspace(0, 3596, num_frames, dtype=int).tolist(), 30000 / 1001
    theirs = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, 2)
    ours = time_stamps(frame_times(num_frames, [index / fps for index in indices]))
    assert ours == [f"<{middle:.1f} seconds>" for middle in theirs]
