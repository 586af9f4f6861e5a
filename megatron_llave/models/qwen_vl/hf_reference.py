"""transformers' own Qwen-VL model of a folder, and its inputs, to compare our embeddings with."""

import inspect
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from megatron_llave.data.packing import IMAGE, EncodedSequence
from megatron_llave.models.hf.weights import HfWeights
from megatron_llave.models.qwen_vl.hf_files import HfProcessor
from megatron_llave.models.qwen_vl.hf_keys import SPECIAL_TOKENS, HfKeys
from megatron_llave.models.qwen_vl.hf_weights import LM_HEAD
from megatron_llave.models.qwen_vl.resize import normalise


def reference_model(transformers: ModuleType, weights: HfWeights, keys: HfKeys) -> Module:
    """Return the family's model of transformers without the vocabulary projection, in float32."""
    model_class = getattr(transformers, keys.base)
    theirs = model_class.config_class.from_pretrained(weights.files.folder)
    wanted = [name for name in weights.names if not weights.is_unused(name) and name != LM_HEAD]
    tensors = {name: weights.read(name).float() for name in wanted}
    return model_class.from_pretrained(None, config=theirs, state_dict=tensors).eval()


def reference_inputs(
    model: Module, sequence: EncodedSequence, size: tuple[int, int], files: HfProcessor
) -> dict[str, Tensor]:
    """Return keyword arguments of the model's forward for a text, with an image or without one."""
    image = getattr(model.config, "image_token_id", SPECIAL_TOKENS["image_token_id"][1])
    layouts = iter(sequence.layouts)
    ids = [[image] * len(next(layouts)) if token == IMAGE else [token] for token in sequence.tokens]
    tokens = torch.tensor([[token for part in ids for token in part]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if sequence.tiles:
        tiles = torch.from_numpy(np.concatenate(sequence.tiles))  # [k, 4, 3, 1, P, P]
        pixels = normalise(tiles, torch.tensor(files.mean), torch.tensor(files.std))
        inputs["pixel_values"] = pixels.flatten(0, 1).flatten(1)  # [4 * k, 3 * 2 * P * P]
        inputs["image_grid_thw"] = torch.tensor(sequence.grids)
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # since transformers 5
            inputs["mm_token_type_ids"] = (tokens == image).long()
    return inputs
