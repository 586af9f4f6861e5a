"""Sizes that a model of a Qwen-VL family cannot have are refused in one line that names the key."""

from dataclasses import replace

import pytest

from megatron_llave.config.load import config_from_dict
from megatron_llave.errors import ConfigError
from megatron_llave.models import family_of


@pytest.mark.parametrize(
    ("preset", "changes", "named"),
    [
        ("tiny_qwen3vl", {"window_size": 64}, "model.vision.window_size=64: a model of qwen3_vl has none"),
        ("tiny_qwen3vl", {"num_positions": 0}, "model.vision.num_positions=0 must be positive"),
        ("tiny_qwen2_5vl", {"window_size": 0}, "model.vision.window_size=0 must be positive"),
        ("tiny_qwen3vl", {"num_positions": 60}, "model.vision.num_positions=60 must be a square"),
        ("tiny_qwen3vl", {"deepstack_layers": [1, 0]}, "model.vision.deepstack_layers=.* must be rising numbers"),
        ("tiny_qwen3vl", {"deepstack_layers": [2]}, "model.vision.deepstack_layers=.* from 0 to 1"),
        ("tiny_qwen2vl", {"deepstack_layers": [0]}, "model.vision.deepstack_layers=.*: a model of qwen2_vl has none"),
        ("tiny_qwen2vl", {"tokens_per_second": 2}, "model.vision.tokens_per_second=2: a model of qwen2_vl has none"),
        ("tiny_qwen2vl", {"image_size": 56}, "model.vision.image_size=56: a model of qwen2_vl has none"),
        ("tiny_qwen2vl", {"num_heads": 64}, "model.vision.num_heads=64 must be a multiple of 4"),
        ("tiny_qwen2_5vl", {"window_size": 50}, "model.vision.window_size=50 must be a multiple of 28"),
        ("tiny_qwen2_5vl", {"full_attention_layers": [5]}, "model.vision.full_attention_layers=.* from 0 to 1"),
    ],
)
def test_vision_encoders_that_a_family_has_not(preset: str, changes: dict, named: str) -> None:
    model = config_from_dict({"model": {"preset": preset}, "train": {"steps": 1}}).model
    assert family_of(model).name == model.family
    with pytest.raises(ConfigError, match=named):
        family_of(replace(model, vision=replace(model.vision, **changes)))


def test_decoders_that_do_not_fit() -> None:
    model = config_from_dict({"model": {"preset": "tiny_qwen3vl"}, "train": {"steps": 1}}).model
    deep = replace(model.vision, num_layers=4, deepstack_layers=[0, 1, 2])
    with pytest.raises(ConfigError, match="model.language.num_layers=2 must be at least 3"):
        family_of(replace(model, vision=deep))
    with pytest.raises(ConfigError, match="model.language.mrope_section=.* must be three numbers"):
        family_of(replace(model, language=replace(model.language, mrope_section=[])))
    with pytest.raises(ConfigError, match="model.image_grids=.*: images of qwen3_vl keep their shape"):
        family_of(replace(model, image_grids=[[1, 2]]))
