"""transformers' own model of a folder of LLaVA-OneVision, and its inputs, to compare our embeddings with."""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Module

from megatron_llave.data.packing import IMAGE, EncodedSequence
from megatron_llave.models.blocks.siglip import normalise
from megatron_llave.models.hf.weights import HfWeights
from megatron_llave.models.llava_onevision.hf_config import NEWLINE_TOKEN, build_config_json
from megatron_llave.models.llava_onevision.hf_weights import HF_EMBEDDING, LM_HEAD, POST_NORM


def reference_model(transformers: ModuleType, weights: HfWeights) -> Module:
    """Return the layout's model in float32; tensors of llava_qwen are renamed for that of llava_onevision."""
    model_class, config = transformers.LlavaOnevisionForConditionalGeneration, weights.config
    if config.layout == "llava":
        model_class = transformers.LlavaForConditionalGeneration
    if config.layout != "llava_qwen":
        return model_class.from_pretrained(weights.files.folder, use_safetensors=True).float().eval()
    wanted = [n for n in weights.names if not weights.is_unused(n) or n == LM_HEAD or n.startswith(POST_NORM)]
    tensors = {name: weights.read(name).float() for name in wanted}
    tied = config.tied or LM_HEAD not in tensors
    if tied:
        tensors[LM_HEAD] = tensors[HF_EMBEDDING]
    values = build_config_json(config.model, "llava_onevision", tied, "float32", config)
    theirs = transformers.LlavaOnevisionConfig.from_dict(values)
    return model_class.from_pretrained(None, config=theirs, state_dict=tensors).eval()


def reference_inputs(model: Module, sequence: EncodedSequence, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return keyword arguments of the model's forward for an input whose image, if any, is (width, height)."""
    image_token = getattr(model.config, "image_token_id", None)
    image_token = model.config.image_token_index if image_token is None else image_token
    layouts, newline = iter(sequence.layouts), getattr(model.config, NEWLINE_TOKEN, None)
    ids = [[image_token] * len(next(layouts)) if token == IMAGE else [token] for token in sequence.tokens]
    if newline is not None:
        ids = [[*part[:-1], newline] if token == IMAGE else part for token, part in zip(sequence.tokens, ids)]
    tokens = torch.tensor([[token for part in ids for token in part]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if sequence.tiles:
        pixels = normalise(torch.from_numpy(sequence.tiles[0]))  # [k, 3, size, size]
        if newline is not None:
            return inputs | {"pixel_values": pixels}
        inputs |= {"pixel_values": pixels[None], "image_sizes": torch.tensor([size[::-1]])}
    return inputs
