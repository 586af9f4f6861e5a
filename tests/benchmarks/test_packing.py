"""benchmarks/packing.py counts what packing, and padding as the released code does it, really compute."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from benchmarks import packing
from megatron_llave.batch import Pair, Side
from megatron_llave.config.load import config_from_dict
from megatron_llave.data.index import Index, write_index
from megatron_llave.data.packing import Processor, encode_pairs, pack_pairs
from megatron_llave.data.shards import write_subset
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor

MODEL = config_from_dict({"model": {"preset": packing.PRESET}}).model


def photo(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return data.getvalue()


PAIRS = [
    Pair("a", "mix", Side("what is it?", [photo(640, 480)]), Side("a user", []), "a", "a"),
    Pair("b", "mix", Side("you are a helpful assistant", []), Side("", [photo(300, 900)]), "b", "b"),
    Pair("c", "mix", Side("", [photo(384, 384)]), Side("system", []), "c", "c"),
]


@pytest.fixture(scope="module")
def encoder() -> Processor:
    return LlavaOnevisionProcessor(load_tokenizer(packing.TOKENIZER), "qwen", 10_000, packing.grids_of(MODEL), 384, 14)


def test_counts_are_those_of_a_real_batch(tmp_path: Path, encoder: Processor) -> None:
    write_index(tmp_path, Index({"mix": write_subset(PAIRS, tmp_path, "mix", "retrieval")}))
    [subset] = packing.read_folder(tmp_path, packing.TOKENIZER, MODEL).values()
    packed, padded = packing.Counts(), packing.Counts()
    packing.count_packed(subset.pairs, packed)
    packing.count_padded(subset.pairs, padded)
    encoded = encode_pairs(PAIRS, encoder, 0, pytest.fail)
    row = pack_pairs(encoded, 0, "mix", 1, encoder.tile_shape).sequences
    lengths = row.cu_seqlens.diff()
    assert (packed.tokens, packed.tiles) == (row.num_tokens, len(row.tiles))
    assert packed.attention == int((lengths.long() ** 2).sum())
    sides = [[pair.query for pair in encoded], [pair.targets[0] for pair in encoded]]
    rows = [pad_sequence([torch.zeros(s.length) for s in side], batch_first=True) for side in sides]
    assert padded.tokens == sum(row.numel() for row in rows)
    assert padded.attention == sum(row.shape[0] * row.shape[1] ** 2 for row in rows)
    assert padded.tiles == packed.tiles + 3  # three sides without a picture


def test_mix_has_the_lengths_it_says(encoder: Processor) -> None:
    subsets = packing.draw_mix(packing.HERE / "length_mixes.yaml", MODEL, 400, np.random.default_rng(0))
    assert len(subsets) == 20 and {pair.target.tiles for pair in subsets["OK-VQA"].pairs} == {0}
    template = encoder.encode(Side("", [])).length
    assert np.mean([p.query.tokens - template for p in subsets["VisDial"].pairs]) == pytest.approx(150, rel=0.05)
    nights = encoder.encode(Side("", [photo(512, 512)]))
    assert {pair.query.tiles for pair in subsets["NIGHTS"].pairs} == {len(nights.tiles[0])}
    assert min(pair.query.tokens for pair in subsets["NIGHTS"].pairs) >= nights.length


def test_imbalance_by_hand() -> None:
    one = packing.SideLength(1, 0)
    pairs = [packing.PairLength(packing.SideLength(tokens - 1, 0), one) for tokens in (40, 30, 20, 10)]
    assert packing.imbalance(pairs, 1, 2) == (70 / 50, 1.0, 1.0)
    assert packing.imbalance(pairs, 2, 1) == (1.0, 1.0, 70 / 50)
