"""The golden models of all families with LoRA adapters, as PEFT computes them: embeddings, loss, gradients.

Nothing here is stored: PEFT runs on transformers' models of the golden folders. `write_reference` needs both packages.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import golden_model
import golden_qwen_vl
import numpy as np
import torch
import torch.distributed as dist
from reference import dense_contrastive_loss
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module

from megatron_llave.config.lora import LoraConfig
from megatron_llave.data.packing import EncodedSequence, TileShape
from megatron_llave.models import family_of, open_hf
from megatron_llave.models.blocks.initialization import named_global_parameters, tensor_parallel_part
from megatron_llave.models.hf.weights import HfWeights
from megatron_llave.models.lora import HfAdapter, hf_adapters, is_adapter

FAMILIES = ("llava_onevision", *golden_qwen_vl.FAMILIES)
PAIRS = {
    "llava_onevision": [
        ("img_1tile", "text_short"),
        ("text_long", "img_wide_2tiles"),
        ("img_2x2", "text_long/3"),
        ("text_short/2", "text_long/5"),
    ],
    "qwen": [
        ("image_small", "text_short"),
        ("image_wide", "text_long"),
        ("two_images", "image_tall"),
        ("text_short", "image_first"),
    ],
}
"""Names of the golden cases: queries and targets. There are few texts; `/3` moves the tokens of one by three places."""
TARGETS = {
    "default": LoraConfig().targets,
    "all": ["language", "projector", "vision"],
    "some": ["q_proj", "v_proj", "up_proj", "down_proj"],
}
RANK, ALPHA = 4, 8.0
UP_SIZE = 0.05
"""Standard deviation of B."""
TEMPERATURE, HARDNESS = 0.5, 3.0


def folder_of(family: str) -> Path:
    """The golden folder of a family."""
    return golden_model.ONEVISION if family == "llava_onevision" else golden_qwen_vl.GOLDEN / family


def lora_of(targets: str, **others: object) -> LoraConfig:
    """The section `lora` of a key of TARGETS."""
    return LoraConfig(rank=RANK, alpha=ALPHA, targets=TARGETS[targets], **others)


def pairs_of(family: str) -> list[tuple[EncodedSequence, EncodedSequence]]:
    """The four pairs as our inputs."""
    if family == "llava_onevision":
        return [tuple(map(_moved, pair)) for pair in PAIRS[family]]
    return [tuple(golden_qwen_vl.sequence(family, case) for case in pair) for pair in PAIRS["qwen"]]


def _moved(case: str) -> EncodedSequence:
    name, _, places = case.partition("/")
    whole = golden_model.sequence(name)
    return EncodedSequence(np.roll(whole.tokens, int(places)).tolist(), [], []) if places else whole


def tile_shape(family: str) -> TileShape:
    """Of the tiles of `pairs_of`."""
    if family == "llava_onevision":
        return TileShape(golden_model.TILE, golden_model.PATCHES_PER_SIDE**2)
    return golden_qwen_vl.tile_shape(family)


def drawn(weights: HfWeights, linears: list[str]) -> dict[str, Tensor]:
    """A and B for these linears, by canonical name: normal numbers, B not zero, so that every gradient counts."""
    generator, values = torch.Generator().manual_seed(0), {}
    for name in linears:
        rows, columns = weights.shape(f"{name}.weight")
        values[f"{name}.down"] = torch.randn(RANK, columns, generator=generator) * columns**-0.5
        values[f"{name}.up"] = torch.randn(rows, RANK, generator=generator) * UP_SIZE
    return values


def write_reference(file: Path, family: str, targets: str) -> None:
    """Write A, B, their gradients, embeddings and the loss as PEFT gives them in float64, on one process."""
    import peft
    import transformers

    weights = open_hf(folder_of(family))
    model = weights.format.reference_model(transformers, weights).double().requires_grad_(False)
    shrink(model.named_parameters())
    names = {
        weights.format.canonical_name(f"{name}.weight", weights.config.layout).removesuffix(".weight"): name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    linears = targeted(weights, targets)
    theirs = [names[name] for name in linears]
    config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=theirs)
    adapted = peft.get_peft_model(model, config)
    layers = dict(adapted.base_model.model.named_modules())
    values = drawn(weights, linears)
    for name in linears:
        layer = layers[names[name]]
        layer.lora_A.default.weight.data.copy_(values[f"{name}.down"])
        layer.lora_B.default.weight.data.copy_(values[f"{name}.up"])
    cases = PAIRS.get(family, PAIRS["qwen"])
    rows = [embedding(adapted, family, case) for pair in cases for case in pair]
    embeddings = torch.stack(rows)
    loss = dense_contrastive_loss(embeddings[0::2], embeddings[1::2], TEMPERATURE, HARDNESS)
    loss.backward()
    for name in linears:
        layer = layers[names[name]]
        values[f"{name}.down.grad"] = layer.lora_A.default.weight.grad
        values[f"{name}.up.grad"] = layer.lora_B.default.weight.grad
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(linears), "PEFT trains something else"
    values |= {"embeddings": embeddings.detach(), "loss": loss.detach()}
    save_file({name: value.float() for name, value in values.items()}, file)


@torch.no_grad()
def shrink(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Halve the matrices of all layers, so that rounding in float32 is not amplified as much."""
    for name, parameter in parameters:
        is_in_layer = ".layers." in name or ".blocks." in name
        if is_in_layer and parameter.dim() == 2 and not is_adapter(name):
            parameter.mul_(0.5)


def targeted(weights: HfWeights, targets: str) -> list[str]:
    """Canonical names of the Hugging Face linears with an adapter, which are written out here by their last names."""
    short = {
        "default": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "some": "q_proj v_proj up_proj down_proj",
    }
    language = [name for name in weights.names if name.startswith("language_model.") and ".layers." in name]
    chosen = [n for n in language if n.split(".")[-2] in short.get(targets, short["default"]).split()]
    if targets == "all":
        others = [n for n in weights.names if not n.startswith("language_model.") and not weights.is_unused(n)]
        chosen += [n for n in others if n.endswith(".weight") and len(weights.shape(n)) == 2 and "embed" not in n]
    return sorted(name.removesuffix(".weight") for name in chosen if name.endswith(".weight"))


def embedding(model: torch.nn.Module, family: str, case: str) -> Tensor:
    """[h] of unit length, from the arrays that transformers' processors made."""
    if family == "llava_onevision":
        name, _, places = case.partition("/")
        stored = golden_model.arrays(name)
        stored["input_ids"] = np.roll(stored["input_ids"], int(places or 0))
        inputs = {name: torch.from_numpy(stored[name]) for name in ("input_ids", "attention_mask")}
        if "pixel_values" in stored:
            inputs["pixel_values"] = torch.from_numpy(stored["pixel_values"])[None].double()
            inputs["image_sizes"] = torch.from_numpy(stored["image_sizes_hw"])
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    else:
        stored = golden_qwen_vl.arrays(family, case)
        tokens = torch.from_numpy(stored["input_ids"])[None]
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        inputs["position_ids"] = torch.from_numpy(stored["position_ids"])[:, None]
        for name in ("pixel_values", "image_grid_thw"):
            if name in stored:
                inputs[name] = torch.from_numpy(stored[name])
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        hidden = model(**inputs).last_hidden_state
    return torch.nn.functional.normalize(hidden[0, -1], dim=-1)


def stored_adapters(reference: dict[str, Tensor]) -> list[HfAdapter]:
    """The adapters of a reference."""
    names = [name.removesuffix(".down") for name in reference if name.endswith(".down")]
    return [HfAdapter(name, reference[f"{name}.down"], reference[f"{name}.up"], ALPHA / RANK) for name in names]


def gradients_of(tensors: dict[str, Tensor], weights: HfWeights) -> dict[str, Tensor]:
    """Whole gradients of ours by the names of the reference."""
    rules = family_of(weights.config.model).hf.rules(weights.config.model)
    found = {}
    for adapter in hf_adapters(tensors, rules, ALPHA / RANK):
        found |= {f"{adapter.module}.down.grad": adapter.down, f"{adapter.module}.up.grad": adapter.up}
    return found


def load_reference(file: Path) -> dict[str, Tensor]:
    """What `write_reference` has written."""
    return load_file(file)


@torch.no_grad()
def set_adapters(chunks: list[Module], tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Copy whole parameters (`our_adapters`) into the adapters of this rank's chunks, at any parallel layout."""
    for chunk in chunks:
        for name, parameter in named_global_parameters(chunk):
            if is_adapter(name):
                parameter.copy_(tensor_parallel_part(tensors[name], parameter, group.rank(), group.size()))
