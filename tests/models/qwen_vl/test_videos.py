"""Videos through whole models of the three families, from frames and from image files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_model import byte_tokenizer
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image

from megatron_llave import models
from megatron_llave.batch import Side
from megatron_llave.config.load import config_from_dict
from megatron_llave.data.packing import pack_sequences
from megatron_llave.embedding.embedder import LoadedModel, embed


@pytest.mark.parametrize("preset", ["tiny_qwen2vl", "tiny_qwen2_5vl", "tiny_qwen3vl"])
def test_a_video_is_embedded_by_its_frames_in_order(
    preset: str, groups: ProcessGroupCollection, tmp_path: Path
) -> None:
    data = {"prompt": "plain", "tokenizer": str(byte_tokenizer(tmp_path)), "max_pixels": 12_000}
    cfg = config_from_dict({"model": {"preset": preset}, "data": data})
    chunks = models.build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=1)
    model = LoadedModel(cfg, chunks, models.build_processor(cfg.data, cfg.model), groups)
    frames = np.random.default_rng(0).integers(0, 256, (5, 60, 90, 3), np.uint8)
    images = [Image.fromarray(frame) for frame in frames]
    sides = {
        "frames": Side("What?", [], frames),
        "files": Side("What?", images, is_video=True),
        "backwards": Side("What?", images[::-1], is_video=True),
        "images": Side("What?", images),
        "slow": Side("What?", images, is_video=True, seconds=(0, 9, 18, 27, 36)),
    }
    vectors = dict(zip(sides, embed(model, sides)))
    torch.testing.assert_close(vectors["frames"], vectors["files"], rtol=0, atol=1e-6)
    for other in ("backwards", "images"):
        assert (vectors["files"] - vectors[other]).abs().max() > 1e-4, other
    assert torch.equal(vectors["slow"], vectors["files"]) == (preset == "tiny_qwen2vl"), "it has no seconds"
    row = pack_sequences([model.encoder.encode(sides["images"])], 1, model.encoder.tile_shape)
    assert row.tiles.shape[3] == 1
    of_both_frames, weight = row.tiles.repeat(1, 1, 1, 2, 1, 1), chunks[0].vision.patch_embed.weight
    once, twice = (chunks[0].vision(tiles, row.grids) for tiles in (row.tiles, of_both_frames))
    assert torch.equal(once, twice)
    assert torch.equal(*(torch.autograd.grad(features.square().sum(), weight)[0] for features in (once, twice)))
    alone = embed(model, {"files": sides["files"]})
    torch.testing.assert_close(alone[0], vectors["files"], rtol=0, atol=1e-5)
