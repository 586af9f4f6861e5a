"""LoRA adapters of a built model: which layers have one, their initial values, and their Hugging Face names.

tests/distributed/test_lora.py has their gradients, at every layout.
"""

import pytest
import torch
from golden_lora import FAMILIES, folder_of, set_adapters, targeted

from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.model import PARTS
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.errors import ConfigError
from megatron_llave.models import build_model, family_of, open_hf
from megatron_llave.models.blocks.initialization import named_global_parameters
from megatron_llave.models.lora import HfAdapter, hf_adapters, is_adapter, our_adapters

RANK = 6


def built(groups, family: str, **lora: object) -> torch.nn.Module:
    model, section = open_hf(folder_of(family)).config.model, LoraConfig(rank=RANK, **lora)
    return build_model(model, ParallelConfig(), groups, torch.device("cpu"), 0, section)[0]


def parameters(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in named_global_parameters(chunk) if is_adapter(name)}


def adapters(chunk: torch.nn.Module, family: str) -> list[HfAdapter]:
    model = open_hf(folder_of(family)).config.model
    rules = family_of(model).hf.rules(model)
    return list(hf_adapters(parameters(chunk), rules, chunk.lora.scale))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_has_an_adapter_of_its_own_shape(groups, family: str) -> None:
    chunk, weights = built(groups, family, targets=[*PARTS]), open_hf(folder_of(family))
    found = {adapter.module: adapter for adapter in adapters(chunk, family)}
    assert sorted(found) == targeted(weights, "all")
    for module, adapter in found.items():
        outputs, inputs = weights.shape(f"{module}.weight")
        assert adapter.down.shape == (RANK, inputs) and adapter.up.shape == (outputs, RANK)
    trained = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in chunk.named_parameters() if is_adapter(name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_through_their_hugging_face_names_unchanged(groups, family: str) -> None:
    chunk, model = built(groups, family, targets=[*PARTS]), open_hf(folder_of(family)).config.model
    for parameter in chunk.parameters():
        parameter.data.normal_()
    before = parameters(chunk)
    tensors = our_adapters(adapters(chunk, family), family_of(model).hf.rules(model))
    for parameter in chunk.parameters():
        parameter.data.zero_()
    set_adapters([chunk], tensors, groups.tp)
    after = parameters(chunk)
    assert all(torch.equal(after[name], value) for name, value in before.items()) and len(before) == len(tensors)


def test_single_layers_of_the_decoder_and_of_another_part(groups) -> None:
    chunk = built(groups, "llava_onevision", targets=["v_proj", "vision.fc2"])
    found = {tuple(adapter.module.split(".")[i] for i in (0, -1)) for adapter in adapters(chunk, "llava_onevision")}
    assert found == {("language_model", "v_proj"), ("vision_tower", "fc2")}
    assert not chunk.vision_is_frozen and built(groups, "llava_onevision").vision_is_frozen


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("qproj", "lora.targets: qproj is no linear layer of this model's language, which has q_proj, k_proj, v_proj"),
        ("vision.q_proj", "of this model's vision, which has qkv, proj, gate_proj, up_proj, down_proj"),
        ("projector.qkv", "of this model's projector, which has 0, 2"),
    ],
)
def test_layers_that_are_not_there_are_named(groups, target: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        built(groups, "qwen2_5_vl", targets=["language", target])
    assert said in str(error.value)


def test_initial_values_are_distributed_as_those_of_peft(groups) -> None:
    kaiming, gaussian = (parameters(built(groups, "qwen2_vl", init=init)) for init in ("kaiming", "gaussian"))
    downs = [name for name in kaiming if name.endswith("_down")]
    assert all(not value.any() for name, value in kaiming.items() if name not in downs)
    scaled = torch.cat([kaiming[name].flatten() * kaiming[name].shape[1] ** 0.5 for name in downs])
    assert scaled.abs().max() <= 1 and scaled.std() == pytest.approx(3**-0.5, rel=0.03)  # uniform from -1 to 1
    drawn = torch.cat([gaussian[name].flatten() for name in downs]) * RANK
    assert drawn.std() == pytest.approx(1, rel=0.03) and drawn.abs().max() > 3
    assert len({float(kaiming[name][0, 0]) for name in downs}) == len(downs)
