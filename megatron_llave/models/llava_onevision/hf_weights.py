"""Weights of Hugging Face checkpoints and ours: one table of names, and the few tensors that are put together.

Names on the other side are written as transformers 4.x writes LLaVA-OneVision ("canonical" below). PREFIXES translates
the spelling of transformers 5.x and of llava_qwen, the layout of LLaVA-NeXT and of the released LLaVE checkpoints.
Names on our side are those of initialization.named_global_parameters: the layers counted over all pipeline stages.

Sources of the pairs: transformers' convert_llava_onevision_weights_to_hf.py and modeling_qwen2.py, modeling_siglip.py.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from megatron_llave.config.model import ModelConfig
from megatron_llave.errors import CheckpointError
from megatron_llave.models.blocks.initialization import full_shape, named_global_parameters, tensor_parallel_part
from megatron_llave.models.hf.mapping import Rule, join_qkv, local_kernel_name, pad_rows, split_qkv
from megatron_llave.models.hf.tensor_files import TensorFiles
from megatron_llave.models.llava_onevision.hf_config import HfConfig

LANGUAGE, VISION = "language_model.model.", "vision_tower.vision_model."
EMBEDDING = "language.embedding.word_embeddings.weight"
HF_EMBEDDING = LANGUAGE + "embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
POST_NORM = VISION + "post_layernorm."

# Ours -> theirs. Three names are query, key and value; two are gate and up.
SINGLE_PARAMETERS = {
    EMBEDDING: [HF_EMBEDDING],
    "language.decoder.final_layernorm.weight": [LANGUAGE + "norm.weight"],
    "image_newline": ["image_newline"],
    "projector.encoder.linear_fc1.weight": ["multi_modal_projector.linear_1.weight"],
    "projector.encoder.linear_fc1.bias": ["multi_modal_projector.linear_1.bias"],
    "projector.encoder.linear_fc2.weight": ["multi_modal_projector.linear_2.weight"],
    "projector.encoder.linear_fc2.bias": ["multi_modal_projector.linear_2.bias"],
    "vision.encoder.conv1.weight": [VISION + "embeddings.patch_embedding.weight"],
    "vision.encoder.conv1.bias": [VISION + "embeddings.patch_embedding.bias"],
    "vision.encoder.position_embeddings.weight": [VISION + "embeddings.position_embedding.weight"],
}
LANGUAGE_LAYER = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "self_attention.linear_qkv.bias": [f"self_attn.{part}_proj.bias" for part in "qkv"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}
VISION_LAYER = {
    f"{ours}.{kind}": [f"{name}.{kind}" for name in theirs]
    for ours, theirs in {
        "input_layernorm": ["layer_norm1"],
        "self_attention.linear_qkv": [f"self_attn.{part}_proj" for part in "qkv"],
        "self_attention.linear_proj": ["self_attn.out_proj"],
        "pre_mlp_layernorm": ["layer_norm2"],
        "mlp.linear_fc1": ["mlp.fc1"],
        "mlp.linear_fc2": ["mlp.fc2"],
    }.items()
    for kind in ("weight", "bias")
}

# Spelling -> canonical, the first that fits. Transformers 5.x drops `vision_model.` from the tower's names; some 4.5x
# releases wrote the names that the model has in memory, which begin with `model.`.
PREFIXES = {
    "llava_onevision": [
        ("model.language_model.", LANGUAGE),
        ("model.vision_tower.vision_model.", VISION),
        ("model.vision_tower.", VISION),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
        ("lm_head.", "language_model.lm_head."),
        (VISION, VISION),
        ("vision_tower.", VISION),
    ],
    "llava_qwen": [
        ("model.vision_tower.vision_tower.vision_model.", VISION),
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
        ("model.image_newline", "image_newline"),
        ("lm_head.", "language_model.lm_head."),
        ("model.", LANGUAGE),
    ],
}

# What the files may hold beside the embedder: the vocabulary projection, the tower's norm and head, old buffers.
UNUSED = re.compile(
    rf"{re.escape(LM_HEAD)}|{re.escape(POST_NORM)}(weight|bias)|{re.escape(VISION)}(head\..*|embeddings\.position_ids)"
    r"|.*\.rotary_emb\.inv_freq"
)


def canonical_name(name: str, layout: str) -> str:
    """The canonical name of a tensor that a folder of this layout calls `name`."""
    for spelling, canonical in PREFIXES[layout]:
        if name.startswith(spelling):
            return canonical + name.removeprefix(spelling)
    return name


def layout_name(name: str, layout: str) -> str:
    """How a tensor is called in a folder that we write; llava_onevision gets names which transformers 4 and 5 load."""
    if layout == "llava_onevision":
        return name
    for spelling, canonical in PREFIXES[layout]:
        if name.startswith(canonical):
            return spelling + name.removeprefix(canonical)
    return name


def rules(model: ModelConfig) -> dict[str, Rule]:
    """A rule for each parameter of the whole model, by our name."""
    table = dict(SINGLE_PARAMETERS)
    layers = (
        ("language.decoder.layers", LANGUAGE, LANGUAGE_LAYER, model.language.num_layers),
        ("vision.encoder.decoder.layers", VISION + "encoder.", VISION_LAYER, model.vision.num_layers),
    )
    for ours, theirs, layer, num_layers in layers:
        for index in range(num_layers):
            for name, parts in layer.items():
                table[f"{ours}.{index}.{name}"] = [f"{theirs}layers.{index}.{part}" for part in parts]
    return {name: _rule(name, theirs, model) for name, theirs in table.items()}


def _rule(name: str, theirs: list[str], model: ModelConfig) -> Rule:
    if name == EMBEDDING:  # padded with rows of zeros, how many depends on the tensor-parallel size
        return Rule(theirs, lambda parts: parts[0], lambda ours: [ours[: model.language.vocab_size]])
    if len(theirs) == 3:
        is_language = name.startswith("language.")
        heads = model.language.num_heads if is_language else model.vision.num_heads
        groups = model.language.num_kv_heads if is_language else heads
        return Rule(theirs, partial(join_qkv, groups=groups), partial(split_qkv, heads=heads, groups=groups))
    if len(theirs) == 2:
        return Rule(theirs, torch.cat, lambda ours: list(ours.chunk(2)))
    return Rule(theirs, lambda parts: parts[0], lambda ours: [ours])


def hf_shapes(shapes: dict[str, tuple[int, ...]], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of their tensors that make up parameters of ours with these full shapes."""
    table = rules(model)
    return {theirs: part for name, shape in shapes.items() for theirs, part in table[name].shapes(shape).items()}


@dataclass(frozen=True)
class HfWeights:
    """An HF folder's tensors under canonical names."""

    config: HfConfig
    files: TensorFiles
    names: dict[str, str]
    """Canonical name -> the folder's own."""

    def read(self, name: str) -> Tensor:
        """One tensor by canonical name."""
        return self.files.read(self.names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the header."""
        return self.files.tensors[self.names[name]].shape

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every tensor by canonical name."""
        return {name: self.files.tensors[own].dtype for name, own in self.names.items()}

    @property
    def unused(self) -> list[str]:
        """Canonical names of the tensors that the embedder has no use for."""
        return sorted(filter(self.is_unused, self.names))

    def is_unused(self, name: str) -> bool:
        """Whether the format may hold the tensor while the embedder has no use for it."""
        layer = re.match(re.escape(VISION) + r"encoder\.layers\.(\d+)\.", name)
        model, held = self.config.model, self.config.vision_layers
        beyond = layer is not None and model.vision.num_layers <= int(layer[1]) < held
        return beyond or UNUSED.fullmatch(name) is not None

    def problems(self, expected: dict[str, tuple[int, ...]], elsewhere: Collection[str] = ()) -> list[str]:
        """One line for each tensor that is missing, of a wrong shape, or unknown.

        Args:
            expected: canonical names and shapes.
            elsewhere: canonical names that others look at, such as the tensors of other pipeline stages.
        """
        layout = self.config.layout
        found = [f"missing: {layout_name(n, layout)} {list(expected[n])}" for n in sorted(expected.keys() - self.names)]
        for name in sorted(self.names):
            own, shape = self.names[name], self.shape(name)
            if name not in expected and name not in elsewhere and not self.is_unused(name):
                found.append(f"extra: {own} {list(shape)}")
            elif self._known_shape(name, expected) not in (None, shape):
                wanted = list(self._known_shape(name, expected))
                found.append(f"wrong shape: {own} {list(shape)}, config.json makes it {wanted}")
        return found

    def _known_shape(self, name: str, expected: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        language, vision = self.config.model.language, self.config.model.vision
        unused = {LM_HEAD: (language.vocab_size, language.hidden_size)}
        unused |= {POST_NORM + kind: (vision.hidden_size,) for kind in ("weight", "bias")}
        return expected.get(name, unused.get(name))


def open_weights(folder: str | Path, config: HfConfig) -> HfWeights:
    """Read the headers of an HF folder.

    Raises:
        CheckpointError: the files are missing, damaged or pickled, or two tensors mean the same one.
    """
    files = TensorFiles(folder)
    names: dict[str, str] = {}
    for own in files.tensors:
        name = canonical_name(own, config.layout)
        if name in names:
            raise CheckpointError(f"{folder}: {own} and {names[name]} are the same tensor in two spellings")
        names[name] = own
    return HfWeights(config, files, names)


def require_whole(weights: HfWeights, expected: dict[str, tuple[int, ...]], elsewhere: Collection[str] = ()) -> None:
    """Refuse a folder that does not hold exactly the expected tensors (see HfWeights.problems).

    Raises:
        CheckpointError: lists the first tensors that are missing, extra or of a wrong shape.
    """
    found = weights.problems(expected, elsewhere)
    if found:
        more = f"; and {len(found) - 5} more (tools/convert_hf.py inspect lists all)" if len(found) > 5 else ""
        raise CheckpointError(f"{weights.files.folder} does not fit its config.json: {'; '.join(found[:5])}{more}")


def fill_from_hf(chunks: Iterable[Module], weights: HfWeights, groups: ProcessGroupCollection) -> None:
    """Copy an HF folder's weights into this rank's chunks, at any layout; each rank reads what it holds.

    Raises:
        CheckpointError: a tensor is missing, extra, of another shape, or cannot be read.
    """
    model, rank, size = weights.config.model, groups.tp.rank(), groups.tp.size()
    table = rules(model)
    parameters = {local_kernel_name(n): p for chunk in chunks for n, p in named_global_parameters(chunk)}
    expected = hf_shapes({name: tuple(full_shape(p, size)) for name, p in parameters.items()}, model)
    require_whole(weights, expected, elsewhere={theirs for rule in table.values() for theirs in rule.names})
    for name, parameter in parameters.items():
        full = table[name].join([weights.read(theirs) for theirs in table[name].names])
        full = pad_rows(full, full_shape(parameter, size)[0])
        with torch.no_grad():
            parameter.copy_(tensor_parallel_part(full, parameter, name, rank, size))
