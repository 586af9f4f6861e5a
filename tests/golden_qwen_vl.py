"""The golden cases of the Qwen-VL families: transformers' inputs as ours, and its embeddings, losses and gradients."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_llave.data.packing import IMAGE, EncodedSequence, TileShape, VisualLayout
from megatron_llave.models.qwen_vl.resize import num_visual_tokens

GOLDEN = Path(__file__).parent / "golden" / "qwen_vl"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PLACEHOLDERS = (505, 506)
"""Ids of an image's and of a video's tokens."""


def cases(family: str) -> list[str]:
    """Names of the cases of a family."""
    return sorted(file.stem.removeprefix("input_") for file in (GOLDEN / family).glob("input_*.npz"))


def arrays(family: str, case: str) -> dict[str, np.ndarray]:
    """Everything that is stored of a case."""
    with np.load(GOLDEN / family / f"input_{case}.npz") as stored:
        return dict(stored)


def sequence(family: str, case: str) -> EncodedSequence:
    """The input of a case, with transformers' own positions and pixel values."""
    stored = arrays(family, case)
    of_kind = (stored[key].tolist() for key in ("image_grid_thw", "video_grid_thw") if key in stored)
    grids = [tuple(grid) for kind in of_kind for grid in kind]
    if family == "qwen3_vl" and "video_grid_thw" in stored:  # each pair of frames stands for itself
        grids = [(1, rows, columns) for pairs, rows, columns in grids for _ in range(pairs)]
    tokens, rest = [], stored["input_ids"].tolist()
    for grid in grids:
        start = next(place for place, token in enumerate(rest) if token in PLACEHOLDERS)
        tokens += [*rest[:start], IMAGE]
        rest = rest[start + num_visual_tokens(grid) :]
    size = patch_size(family)
    pixels = next((stored[key] for key in ("pixel_values", "pixel_values_videos") if key in stored), None)
    counts = [num_visual_tokens(grid) for grid in grids]
    tiles = [] if pixels is None else np.split(pixels.reshape(-1, 4, 3, 2, size, size), np.cumsum(counts)[:-1])
    layouts = [VisualLayout(np.arange(count)) for count in counts]
    return EncodedSequence([*tokens, *rest], tiles, layouts, positions=stored["position_ids"], grids=grids)


def patch_size(family: str) -> int:
    """Side of a patch in pixels."""
    return json.loads((GOLDEN / family / "checks.json").read_text())["patch"]


def tile_shape(family: str) -> TileShape:
    """Of the tiles of `sequence`."""
    size = patch_size(family)
    return TileShape(size, 1, (4, 3, 2, size, size))


def train_step(family: str) -> dict:
    """Names of the pairs' queries and targets, temperature and alpha, and the loss and gradient norms of the step."""
    return json.loads((GOLDEN / family / "train_step.json").read_text())


def embedding(family: str, case: str) -> Tensor:
    """The golden embedding [64] of a case."""
    return torch.from_numpy(arrays(family, case)["embedding"])


def gradients(family: str) -> dict[str, Tensor]:
    """Some whole gradients of the golden step, by transformers' names."""
    with np.load(GOLDEN / family / "train_step_gradients.npz") as stored:
        return {name.replace("|", "."): torch.from_numpy(stored[name]) for name in stored}
