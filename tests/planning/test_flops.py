"""The formulas against torch's own count of a real forward and backward."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_llave.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.data.packing import IMAGE, EncodedSequence, TileShape, pack_sequences
from megatron_llave.models import build_model, family_of
from megatron_llave.models.llava_onevision.anyres import visual_layout
from megatron_llave.planning.flops import Work, forward_flops, peak_tflops, step_flops

LENGTH = 40
NUM_IMAGES, NUM_TEXTS = 2, 3


def model_config(freeze: list[str]) -> ModelConfig:
    vision = VisionConfig(hidden_size=32, num_layers=2, num_heads=4, ffn_hidden_size=64, image_size=28)
    sizes = dict(hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, ffn_hidden_size=80, vocab_size=300)
    return ModelConfig(vision=vision, language=LanguageConfig(**sizes), freeze=freeze)


def sequences() -> list[EncodedSequence]:
    """All of one length, since the local attention pads within a bucket."""
    layout = visual_layout(28, 28, (), 28, 2, None)
    tile = np.zeros((1, 3, 28, 28), np.uint8)
    words = list(range(5, 5 + LENGTH))
    with_image = EncodedSequence([IMAGE, *words[: LENGTH - len(layout)]], [tile], [layout])
    return [with_image] * NUM_IMAGES + [EncodedSequence(words, [], [])] * NUM_TEXTS


def masked_half(model: ModelConfig) -> int:
    """Of one product of the decoder's attention, all layers: torch counts it, the formula does not."""
    return model.language.num_layers * model.language.hidden_size * LENGTH**2 * (NUM_IMAGES + NUM_TEXTS)


WORK = Work(LENGTH * (NUM_IMAGES + NUM_TEXTS), LENGTH**2 * (NUM_IMAGES + NUM_TEXTS), NUM_IMAGES)


@pytest.mark.parametrize("freeze", [[], ["vision"], ["vision", "language"], ["vision", "projector"], ["language"]])
def test_formula_is_torchs_count(groups, freeze: list[str]) -> None:
    model = model_config(freeze)
    [chunk] = build_model(model, ParallelConfig(), groups, torch.device("cpu"), seed=0)
    packed = pack_sequences(sequences(), 1, TileShape(28, 4))
    # Fused attention is not in torch's count; written out, its products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        embeddings = chunk(packed)
        forward = counter.get_total_flops()
        embeddings.sum().backward()
    assert forward == forward_flops(model, WORK) + 2 * masked_half(model)
    # megatron-core's layers always compute their input's gradient, that of frozen features too.
    *_, first, _ = family_of(model).cost.products(model, NUM_IMAGES, 0)
    wasted = first.flops if "vision" in freeze and "projector" not in freeze else 0
    assert counter.get_total_flops() == step_flops(model, WORK) + 6 * masked_half(model) + wasted


def test_model_flops_of_a_token_are_about_six_times_the_parameters() -> None:
    sizes = PRESETS["7b"]
    model = ModelConfig(vision=VisionConfig(**sizes["vision"]), language=LanguageConfig(**sizes["language"]))
    parameters = 7.07e9 - 152064 * 3584 - 1e6  # without the embedding, which takes none
    assert step_flops(model, Work(1, 0, 0)) == pytest.approx(6 * parameters, rel=0.01)


def test_cpu_has_no_known_peak() -> None:
    assert torch.cuda.is_available() or peak_tflops("bf16") is None
