"""The golden inputs of tests/golden/hf_tiny as one packed row, and what the released model makes of them."""

from pathlib import Path

import numpy as np
import tokenizers
import torch

from megatron_llave.batch import PackedSequences
from megatron_llave.data.packing import EncodedSequence, TileShape, pack_sequences
from megatron_llave.models.llava_onevision.anyres import visual_layout

GOLDEN = Path(__file__).parent / "golden"
ONEVISION, QWEN = GOLDEN / "hf_tiny", GOLDEN / "hf_tiny_llava_qwen"
# Made by transformers 5.23 and, the official ones, by the released code on the same weights.
CASES = ["text_short", "text_long", "img_1tile", "img_wide_2tiles", "img_2x2"]
OFFICIAL = ["official_single_tile_tensor", "official_image_token_without_image"]
TILE, PATCHES_PER_SIDE = 56, 4
# Fixed here, and not from config.json, so that what was read of it is tested too.
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2))


def arrays(case: str) -> dict[str, np.ndarray]:
    """All arrays of a golden case."""
    name = case if case.startswith("official") else f"input_{case}"
    with np.load(ONEVISION / f"{name}.npz") as file:
        return dict(file)


def sequence(case: str) -> EncodedSequence:
    """The case's ids (-200 for its image) and its tiles back in uint8, which normalise exactly to the golden pixels."""
    golden = arrays(case)
    tokens = golden["input_ids_unexpanded"].reshape(-1).tolist()
    if "pixel_values" not in golden:
        return EncodedSequence(tokens, [], [])
    pixels = (golden["pixel_values"].astype(np.float64) * 0.5 + 0.5) * 255
    is_blank = case == "official_image_token_without_image"
    tiles = np.zeros(pixels.shape, np.uint8) if is_blank else np.rint(pixels).astype(np.uint8)
    grids = () if case in OFFICIAL else GRIDS
    layout = visual_layout(*golden["image_size_wh"].tolist(), grids, TILE, PATCHES_PER_SIDE, 9)
    return EncodedSequence(tokens, [tiles], [layout], blank=is_blank)


def packed(pad_to_multiple: int = 1) -> PackedSequences:
    """All cases in one row."""
    shape = TileShape(TILE, PATCHES_PER_SIDE**2)
    return pack_sequences([sequence(case) for case in CASES + OFFICIAL], pad_to_multiple, shape)


def embeddings() -> torch.Tensor:
    """[n, 64] float32, in the order of `packed`."""
    return torch.from_numpy(np.stack([arrays(case)["embedding"] for case in CASES + OFFICIAL]))


def byte_tokenizer(folder: Path) -> Path:
    """A tokenizer.json with one id per byte, since the golden model has none."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.add_special_tokens(["<|im_end|>"])
    path = folder / "tokenizer.json"
    model.save(str(path))
    return path
