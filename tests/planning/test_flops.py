"""The formulas against torch's own count of a real forward and backward."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_llave.batch import PackedSequences
from megatron_llave.config.load import config_from_dict
from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.data.packing import IMAGE, EncodedSequence, TileShape, VisualLayout, pack_sequences
from megatron_llave.models import build_model, family_of
from megatron_llave.models.llava_onevision.anyres import visual_layout
from megatron_llave.planning.flops import Work, forward_flops, peak_tflops, step_flops

LENGTH = 60
NUM_TEXTS = 3
GRIDS = [(1, 4, 6), (2, 8, 10)]
"""Of the images of the Qwen-VL families: a window of 4 x 4 patches, and parts of windows; two frames."""


def model_config(preset: str, freeze: list[str]) -> ModelConfig:
    if preset != "tiny":
        return config_from_dict({"model": {"preset": preset, "freeze": freeze}}).model
    vision = VisionConfig(hidden_size=32, num_layers=2, num_heads=4, ffn_hidden_size=64, image_size=28)
    sizes = dict(hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, ffn_hidden_size=80, vocab_size=300)
    return ModelConfig(vision=vision, language=LanguageConfig(**sizes), freeze=freeze)


def with_image(model: ModelConfig, grid: tuple[int, int, int]) -> tuple[EncodedSequence, TileShape]:
    """A sequence of LENGTH tokens with an image: one tile, or a grid of patches."""
    size, words = model.vision.patch_size, range(5, 5 + LENGTH)
    if model.vision.image_size:
        layout, shape, grids = visual_layout(28, 28, (), 28, 2, None), TileShape(28, 4), []
    else:
        layout, shape = VisualLayout(np.arange(np.prod(grid) // 4)), TileShape(size, 1, (4, 3, 2, size, size))
        grids = [grid]
    tiles = np.zeros((len(layout) if grids else 1, *shape.pixels), np.uint8)
    sequence = EncodedSequence([IMAGE, *words[: LENGTH - len(layout)]], [tiles], [layout], grids=grids)
    return sequence, shape


def packed_row(model: ModelConfig) -> PackedSequences:
    """Images and texts, all of one length, since the local attention pads within a bucket."""
    images, shapes = zip(*(with_image(model, grid) for grid in GRIDS))
    texts = [EncodedSequence([*range(5, 5 + LENGTH)], [], []) for _ in range(NUM_TEXTS)]
    for sequence in (*images, *texts):
        if model.language.mrope_section:
            sequence.positions = np.tile(np.arange(LENGTH), (3, 1))
    return pack_sequences([*images, *texts], 1, shapes[0])


CASES = [("tiny", freeze) for freeze in ([], ["vision"], ["vision", "language"], ["vision", "projector"], ["language"])]
CASES += [(f"tiny_{name}", freeze) for name in ("qwen2vl", "qwen2_5vl", "qwen3vl") for freeze in ([], ["vision"])]
CASES += [("tiny_qwen3vl", freeze) for freeze in (["vision", "projector"], ["language"])]


@pytest.mark.parametrize(("preset", "freeze"), CASES)
def test_formula_is_torchs_count(groups, preset: str, freeze: list[str]) -> None:
    model = model_config(preset, freeze)
    [chunk] = build_model(model, ParallelConfig(), groups, torch.device("cpu"), seed=0)
    row, cost = packed_row(model), family_of(model).cost
    squares = sum(length**2 for length in row.lengths)
    work = Work(row.num_tokens, squares, row.num_tiles, cost.patch_pairs(model, row.grids))
    # Of one product of the decoder's attention, all layers, torch counts the masked half too.
    masked_half = model.language.num_layers * model.language.num_heads * model.language.head_channels * squares
    # Fused attention is not in torch's count; written out, its products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        embeddings = chunk(row)
        forward = counter.get_total_flops()
        embeddings.sum().backward()
    assert forward == forward_flops(model, work) + 2 * masked_half
    # megatron-core's layers always compute their input's gradient, that of frozen features too.
    *_, first, _ = cost.products(model, work.tiles, work.patch_pairs)
    wasted = first.flops if "projector" not in freeze and set(first.after) <= set(freeze) else 0
    assert counter.get_total_flops() == step_flops(model, work) + 6 * masked_half + wasted


@pytest.mark.parametrize(("preset", "targets"), [("tiny", ["language"]), ("tiny_qwen3vl", ["vision"])])
def test_formula_with_adapters_is_torchs_count_but_for_them(groups, preset: str, targets: list[str]) -> None:
    """Those of the smallest rank count little; the first layer of these few that has some passes no gradient on."""
    model, lora = model_config(preset, []), LoraConfig(rank=1, targets=targets)
    [chunk] = build_model(model, ParallelConfig(), groups, torch.device("cpu"), 0, lora)
    row, cost = packed_row(model), family_of(model).cost
    squares = sum(length**2 for length in row.lengths)
    work = Work(row.num_tokens, squares, row.num_tiles, cost.patch_pairs(model, row.grids))
    masked_half = model.language.num_layers * model.language.num_heads * model.language.head_channels * squares
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        chunk(row).sum().backward()
    expected = step_flops(model, work, lora.parts) + 6 * masked_half
    assert 0.92 * expected < counter.get_total_flops() < 1.05 * expected
    assert step_flops(model, work) > 1.3 * step_flops(model, work, lora.parts)


def test_model_flops_of_a_token_are_about_six_times_the_parameters() -> None:
    sizes = PRESETS["7b"]
    model = ModelConfig(vision=VisionConfig(**sizes["vision"]), language=LanguageConfig(**sizes["language"]))
    parameters = 7.07e9 - 152064 * 3584 - 1e6  # without the embedding, which takes none
    assert step_flops(model, Work(1, 0, 0)) == pytest.approx(6 * parameters, rel=0.01)


def test_cpu_has_no_known_peak() -> None:
    assert torch.cuda.is_available() or peak_tflops("bf16") is None
