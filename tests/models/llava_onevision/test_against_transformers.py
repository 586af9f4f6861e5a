"""Tower and decoder against transformers' own modules with the same random weights, one sequence at a time."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from megatron_llave.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models import build_model
from megatron_llave.models.blocks.layer_specs import packed_row
from megatron_llave.models.blocks.siglip import normalise

transformers = pytest.importorskip("transformers")

MODEL = ModelConfig(
    vision=VisionConfig(hidden_size=32, num_layers=2, num_heads=4, ffn_hidden_size=64, image_size=44, patch_size=14),
    language=LanguageConfig(
        hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, ffn_hidden_size=80, vocab_size=300
    ),
)
LENGTHS = [7, 1, 20]


def fill(module: Module) -> Module:
    """Weights large enough that attention, positions and activation functions matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return module.eval()


def grouped_qkv(state: dict[str, Tensor], layer: str, kind: str, num_groups: int) -> Tensor:
    """Per key/value head: its query heads, the key head, the value head; megatron-core's order of rows."""
    parts = [state[f"{layer}.self_attn.{name}_proj.{kind}"].chunk(num_groups) for name in "qkv"]
    return torch.cat([torch.cat(group) for group in zip(*parts)])


def layer_weights(state: dict[str, Tensor], source: str, ours: str, num_groups: int, names: dict[str, str]) -> dict:
    qkv = f"{ours}.self_attention.linear_qkv"
    weights = {f"{qkv}.{kind}": grouped_qkv(state, source, kind, num_groups) for kind in ("weight", "bias")}
    for theirs, own in names.items():
        for kind in ("weight", "bias"):
            if f"{source}.{theirs}.{kind}" in state:
                weights[f"{ours}.{own}.{kind}"] = state[f"{source}.{theirs}.{kind}"]
    return weights


def load(module: Module, weights: dict[str, Tensor]) -> None:
    expected = dict(module.named_parameters())
    assert set(weights) == set(expected), set(weights) ^ set(expected)
    with torch.no_grad():
        for name, parameter in expected.items():
            rows = weights[name]
            parameter[: len(rows)] = rows  # the vocabulary is padded


def test_tower_equals_siglip(groups: ProcessGroupCollection) -> None:
    vision = MODEL.vision
    config = transformers.SiglipVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=42,
        patch_size=vision.patch_size,
        attn_implementation="eager",
    )
    siglip = fill(transformers.SiglipVisionModel(config))
    state = {name.removeprefix("vision_model."): value for name, value in siglip.state_dict().items()}
    names = {
        "layer_norm1": "input_layernorm",
        "layer_norm2": "pre_mlp_layernorm",
        "self_attn.out_proj": "self_attention.linear_proj",
        "mlp.fc1": "mlp.linear_fc1",
        "mlp.fc2": "mlp.linear_fc2",
    }
    weights = {
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "conv1.bias": state["embeddings.patch_embedding.bias"],
        "position_embeddings.weight": state["embeddings.position_embedding.weight"],
    }
    for index in range(vision.num_layers):
        ours = f"decoder.layers.{index}"
        weights |= layer_weights(state, f"encoder.layers.{index}", ours, vision.num_heads, names)
    (model,) = build_model(MODEL, ParallelConfig(), groups, torch.device("cpu"), seed=0)
    load(model.vision.encoder, weights)
    tiles = torch.randint(0, 256, (2, 3, 44, 44), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        # 44 is no multiple of 14: the convolution sees the first 42 pixels. The last hidden state is before the norm.
        expected = siglip(normalise(tiles)[..., :42, :42], output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model.vision(tiles), expected, rtol=0, atol=1e-5)


def test_packed_decoder_equals_qwen2(groups: ProcessGroupCollection) -> None:
    language = MODEL.language
    config = transformers.Qwen2Config(
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        num_key_value_heads=language.num_kv_heads,
        vocab_size=language.vocab_size,
        rope_theta=language.rope_theta,
        rms_norm_eps=language.norm_epsilon,
        attn_implementation="eager",
    )
    qwen = fill(transformers.Qwen2Model(config))
    state = qwen.state_dict()
    names = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "self_attn.o_proj": "self_attention.linear_proj",
        "mlp.down_proj": "mlp.linear_fc2",
    }
    weights = {
        "embedding.word_embeddings.weight": state["embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["norm.weight"],
    }
    for index in range(language.num_layers):
        source, ours = f"layers.{index}", f"decoder.layers.{index}"
        weights |= layer_weights(state, source, ours, language.num_kv_heads, names)
        gate, up = (state[f"{source}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        weights[f"{ours}.mlp.linear_fc1.weight"] = torch.cat([gate, up])
    (model,) = build_model(MODEL, ParallelConfig(), groups, torch.device("cpu"), seed=0)
    load(model.language, weights)
    tokens = torch.randint(0, 300, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat([qwen(part[None]).last_hidden_state[0] for part in tokens.split(LENGTHS)])
        hidden = model.language.embedding(input_ids=tokens[None], position_ids=None)
        layout = packed_row(torch.tensor([0, *LENGTHS]).cumsum(0).int(), LENGTHS, "buckets")
        torch.testing.assert_close(model.language(hidden, layout).squeeze(1), expected, rtol=0, atol=2e-5)
