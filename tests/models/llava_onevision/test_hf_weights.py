"""The table of tensor names and the rules of joining: names against the golden mapping, joins against a plain loop."""

import json

import pytest
import torch
from golden_model import ONEVISION, QWEN
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.errors import CheckpointError
from megatron_llave.models import model_without_memory, open_hf, read_hf_config
from megatron_llave.models.hf.mapping import hf_shapes, join_qkv, local_kernel_name, split_qkv
from megatron_llave.models.hf.weights import fill_from_hf
from megatron_llave.models.llava_onevision.hf_weights import canonical_name, layout_name, rules

MAPPING = json.loads((QWEN / "key_mapping_llava_qwen_to_hf.json").read_text())


def test_every_golden_name_is_translated_both_ways() -> None:
    assert len(MAPPING) == 109
    for qwen, onevision in MAPPING.items():
        name = canonical_name(qwen, "llava_qwen")
        assert name == canonical_name(onevision, "llava_onevision"), (qwen, onevision)
        assert layout_name(name, "llava_qwen") == qwen
        # transformers 4 knows the tower only with vision_model., 5 with and without.
        assert layout_name(name, "llava_onevision").replace("vision_model.", "") == onevision


def test_the_table_covers_the_golden_model(groups: ProcessGroupCollection) -> None:
    model = read_hf_config(ONEVISION).model
    parameters = {n: tuple(p.shape) for n, p in model_without_memory(model, groups).named_parameters()}
    assert rules(model).keys() == parameters.keys()
    weights = open_hf(ONEVISION)
    shapes = hf_shapes(parameters, rules(model))
    assert len(shapes) + len(weights.unused) == len(weights.names) == 109
    assert all(weights.shape(name) == shape for name, shape in shapes.items()) and not weights.problems(shapes)


@settings(deadline=None, max_examples=30)
@given(groups=st.integers(1, 4), ratio=st.integers(1, 4), width=st.integers(1, 3), is_bias=st.booleans())
def test_qkv_is_joined_by_key_value_head(groups: int, ratio: int, width: int, is_bias: bool) -> None:
    rest = () if is_bias else (5,)
    query, key, value = (torch.randn(heads * width, *rest) for heads in (groups * ratio, groups, groups))
    joined = join_qkv([query, key, value], groups)
    slow = []
    for group in range(groups):
        slow += query[group * ratio * width : (group + 1) * ratio * width]
        slow += key[group * width : (group + 1) * width]
        slow += value[group * width : (group + 1) * width]
    assert torch.equal(joined, torch.stack(slow))
    for part, back in zip((query, key, value), split_qkv(joined, groups * ratio, groups)):
        assert torch.equal(part, back)


def test_names_of_fused_norms() -> None:
    prefix = "language.decoder.layers.3."
    fused = prefix + "self_attention.linear_qkv.layer_norm_weight"
    assert local_kernel_name(fused) == prefix + "input_layernorm.weight"
    assert local_kernel_name(prefix + "mlp.linear_fc1.layer_norm_bias") == prefix + "pre_mlp_layernorm.bias"
    assert local_kernel_name(prefix + "mlp.linear_fc1.weight") == prefix + "mlp.linear_fc1.weight"


def test_a_stage_ignores_what_others_hold_but_no_stranger(groups: ProcessGroupCollection, monkeypatch) -> None:
    config = read_hf_config(ONEVISION)
    weights = open_hf(ONEVISION, config)
    model = model_without_memory(config.model, groups).language.to_empty(device="cpu")

    class Stage(torch.nn.Module):
        """A chunk with the decoder alone."""

        def __init__(self) -> None:
            super().__init__()
            self.language = model

    stage = Stage()
    fill_from_hf([stage], weights, groups)
    assert torch.equal(model.decoder.final_layernorm.weight, weights.read("language_model.model.norm.weight"))
    monkeypatch.setitem(weights.names, "adapter.weight", weights.names["image_newline"])
    with pytest.raises(CheckpointError, match=r"extra: image_newline \[64\]"):
        fill_from_hf([stage], weights, groups)
