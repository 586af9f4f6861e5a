"""Names and rules of the Qwen-VL families' weights, on the golden folders: every tensor and spelling, both ways."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_llave.config.model import ModelConfig
from megatron_llave.models.hf.config_json import read_config_json
from megatron_llave.models.qwen_vl.hf_config import read_config
from megatron_llave.models.qwen_vl.hf_weights import LM_HEAD, UNUSED, canonical_name, layout_name, rules

GOLDEN = Path(__file__).parents[2] / "golden" / "qwen_vl"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NAMES = {name: import_module(f"megatron_llave.models.{name}.hf_weights").NAMES for name in FAMILIES}
SPELLINGS = {
    "released Qwen2-VL": {"language_model.": "model.", "visual.": "visual."},
    "with the head, in memory, and released Qwen3-VL": {
        "language_model.": "model.language_model.",
        "visual.": "model.visual.",
    },
    "without the head": {},
    "decoder as a model of its own": {
        "language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
}


def model_of(family: str) -> ModelConfig:
    keys = import_module(f"megatron_llave.models.{family}.hf_keys").KEYS
    return read_config(read_config_json(GOLDEN / family), keys).model


def golden(family: str) -> dict[str, Tensor]:
    """The golden tensors by canonical name."""
    tensors = load_file(GOLDEN / family / "model.safetensors")
    return {canonical_name(name, family): value for name, value in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_makes_up_one_parameter_and_comes_back(family: str) -> None:
    tensors, table = golden(family), rules(model_of(family), NAMES[family])
    used = [name for rule in table.values() for name in rule.names]
    assert sorted(used) == sorted(tensors.keys() - {LM_HEAD}) and UNUSED.fullmatch(LM_HEAD)
    for ours, rule in table.items():
        parts = [tensors[name] for name in rule.names]
        joined = rule.join(parts)
        for part, back in zip(parts, rule.split(joined), strict=True):
            assert torch.equal(part, back), ours
        assert rule.shapes(tuple(joined.shape)) == {name: tuple(tensors[name].shape) for name in rule.names}, ours


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_vision_encoders_fused_matrix_are_put_together_by_head(family: str) -> None:
    model, tensors = model_of(family), golden(family)
    table, heads = rules(model, NAMES[family]), model.vision.num_heads
    for kind in ("weight", "bias"):
        rule = table[f"vision.decoder.layers.1.self_attention.linear_qkv.{kind}"]
        ours = rule.join([tensors[name] for name in rule.names])
        # transformers: reshape(length, 3, heads, -1); megatron-core: for each head its query, key and value.
        theirs = tensors[f"visual.blocks.1.attn.qkv.{kind}"].unflatten(0, (3, heads, -1))
        assert torch.equal(ours.unflatten(0, (heads, 3, -1)), theirs.transpose(0, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_meet_the_matrix_as_they_meet_the_convolution(family: str) -> None:
    model, tensors = model_of(family), golden(family)
    rule = rules(model, NAMES[family])["vision.patch_embed.weight"]
    kernel = tensors["visual.patch_embed.proj.weight"].double()
    patches = torch.randn(5, kernel[0].numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = torch.nn.functional.conv3d(patches.view(5, *kernel.shape[1:]), kernel, stride=kernel.shape[2:])
    torch.testing.assert_close(patches @ rule.join([kernel]).T, theirs.flatten(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_all_versions_of_transformers(family: str, spelling: str) -> None:
    for name in golden(family):
        for canonical, theirs in SPELLINGS[spelling].items():
            if name.startswith(canonical):
                assert canonical_name(theirs + name.removeprefix(canonical), family) == name
        assert canonical_name(name, family) == name
        assert canonical_name(layout_name(name, family, NAMES[family]), family) == name
    # The golden folders are as transformers 5.23 writes them.
    written = {layout_name(name, family, NAMES[family]) for name in golden(family)}
    assert written == load_file(GOLDEN / family / "model.safetensors").keys()


def test_buffers_of_old_files_are_known() -> None:
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"):
        assert UNUSED.fullmatch(canonical_name(name, "qwen2_vl"))
    assert not UNUSED.fullmatch("language_model.norm.weight")
