"""How many parameters each preset has: written down, and as transformers counts the same model."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.config.load import config_from_dict
from megatron_llave.models import model_without_memory
from megatron_llave.models.blocks.qwen2 import padded_vocab_size
from megatron_llave.models.hf.mapping import hf_shapes
from megatron_llave.models.llava_onevision.hf_config import build_config_json
from megatron_llave.models.llava_onevision.hf_weights import LM_HEAD, rules

transformers = pytest.importorskip("transformers")

# Tower (26 of SigLIP's 27 layers), projector and newline, decoder without a vocabulary projection.
COUNTS = {
    "0.5b": {"vision": 397_745_440, "projector": 1_837_696, "language": 494_032_768},
    "2b": {"vision": 397_745_440, "projector": 4_133_376, "language": 1_543_714_304},
    "7b": {"vision": 397_745_440, "projector": 16_984_576, "language": 7_070_619_136},
}


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_count(groups: ProcessGroupCollection, preset: str) -> None:
    model = config_from_dict({"model": {"preset": preset}}).model
    embedder = model_without_memory(model, groups)
    counts = dict.fromkeys(COUNTS[preset], 0)
    for name, parameter in embedder.named_parameters():
        counts["projector" if name == "image_newline" else name.split(".")[0]] += parameter.numel()
    assert counts == COUNTS[preset]
    assert padded_vocab_size(model.language, 1) == model.language.vocab_size  # so no padding was counted

    config = transformers.LlavaOnevisionConfig.from_dict(build_config_json(model, "llava_onevision", False, "float32"))
    with torch.device("meta"):
        theirs = transformers.LlavaOnevisionForConditionalGeneration(config)
    unused = theirs.lm_head.weight.numel() + 2 * model.vision.hidden_size  # the norm that is not applied
    assert sum(parameter.numel() for parameter in theirs.parameters()) - unused == sum(counts.values())
    shapes = {name: tuple(parameter.shape) for name, parameter in embedder.named_parameters()}
    assert sum(torch.Size(shape).numel() for shape in hf_shapes(shapes, rules(model)).values()) == sum(counts.values())
    assert LM_HEAD not in hf_shapes(shapes, rules(model))


@pytest.mark.parametrize(
    ("preset", "tensor", "rows"),
    [("0.5b", 2, 152064), ("0.5b", 8, 152576), ("7b", 1, 152064), ("7b", 4, 152064), ("7b", 8, 152576)],
)
def test_vocabulary_is_padded_as_megatron_lm_does(preset: str, tensor: int, rows: int) -> None:
    assert padded_vocab_size(config_from_dict({"model": {"preset": preset}}).model.language, tensor) == rows
