"""A model family that is kept outside of the package: a Qwen2 decoder over text alone, with HF folders of its own.

As a script it registers the family and trains: `words_family.py --config FILE.yaml section.key=value ...`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_llave.batch import PackedSequences, Side
from megatron_llave.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.packing import EncodedSequence, TileShape
from megatron_llave.data.tokenizer import Tokenizer, load_tokenizer
from megatron_llave.errors import DataError
from megatron_llave.models import register_family
from megatron_llave.models.blocks.layer_specs import packed_row
from megatron_llave.models.blocks.pooling import last_token_pool
from megatron_llave.models.blocks.qwen2 import LanguageModel
from megatron_llave.models.family import Family
from megatron_llave.models.hf.config_json import HfConfig, Section
from megatron_llave.models.hf.mapping import Rule, copied, gated, layer_rules, padded, qkv
from megatron_llave.models.hf.weights import HfFormat
from megatron_llave.train import main

SIZES = {
    "vision": dict(hidden_size=8, num_layers=1, num_heads=2, ffn_hidden_size=8, image_size=14),
    "language": dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, vocab_size=300),
}
LAYER = {
    "input_layernorm.weight": copied("norm1"),
    "self_attention.linear_qkv.weight": qkv("query", "key", "value"),
    "self_attention.linear_qkv.bias": qkv("query_bias", "key_bias", "value_bias"),
    "self_attention.linear_proj.weight": copied("output"),
    "pre_mlp_layernorm.weight": copied("norm2"),
    "mlp.linear_fc1.weight": gated("gate", "up"),
    "mlp.linear_fc2.weight": copied("down"),
}


class WordsEmbedder(MegatronModule):
    """A decoder chunk that pools the last token."""

    def __init__(self, model, parallel, groups, is_first: bool, is_last: bool, chunk: int | None) -> None:
        language = LanguageModel(model, parallel, groups, is_first, is_last, chunk)
        super().__init__(config=language.config)
        self.pre_process, self.post_process, self.vp_stage = is_first, is_last, chunk
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.language = language

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        self.language.decoder.set_input_tensor(input_tensor[0])

    def forward(self, sequences: PackedSequences) -> Tensor:
        hidden = None
        if self.pre_process:
            hidden = self.language.embedding(input_ids=sequences.tokens[None], position_ids=None)
        hidden = self.language(hidden, packed_row(sequences.cu_seqlens, sequences.lengths, "buckets"))
        return last_token_pool(hidden, sequences.last_token) if self.post_process else hidden


class WordsProcessor:
    """Token ids of the text."""

    tile_shape = TileShape(14, 1)

    def __init__(self, data, model: ModelConfig) -> None:
        self.tokenizer = load_tokenizer(data.tokenizer)

    def encode(self, side: Side) -> EncodedSequence:
        if side.images:
            raise DataError("words have no images")
        return EncodedSequence([*self.tokenizer.encode(side.text), self.tokenizer.eos_id], [], [])


def count_tokens(text: str, sizes, is_video: bool, tokenizer: Tokenizer, data, model: ModelConfig, seconds) -> int:
    return len(tokenizer.encode(text)) + 1


def rules(model: ModelConfig) -> dict[str, Rule]:
    language = model.language
    single = {
        "language.embedding.word_embeddings.weight": padded("words", language.vocab_size),
        "language.decoder.final_layernorm.weight": copied("norm"),
    }
    heads = (language.num_layers, language.num_heads, language.num_kv_heads)
    return single | layer_rules(LAYER, "language.decoder.layers.", "layer.", *heads)


def read_config(top: Section) -> HfConfig:
    language = LanguageConfig(**(SIZES["language"] | {"hidden_size": top.number("width", 32)}))
    model = ModelConfig(family="words", vision=VisionConfig(**SIZES["vision"]), language=language)
    return HfConfig("words", RunConfig(model=model), True, top.dtype(), 0, top.values)


def build_config(model: ModelConfig, layout: str, tied: bool, dtype: str | None, source: HfConfig | None) -> dict:
    return {"model_type": "words", "width": model.language.hidden_size, "dtype": dtype}


def keep_files(source: Path, out: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def write_files(out: Path, layout: str, config: Mapping, source: Path | None, training: str | None) -> list[str]:
    if source is not None:
        keep_files(source, out)
    (out / "config.json").write_text(json.dumps(config))
    return []


FAMILY = Family(
    name="words",
    embedder=WordsEmbedder,
    build_processor=WordsProcessor,
    image_lengths=lambda width, height, data, model: (0, 0),
    video_lengths=lambda frames, width, height, data, model: (0, 0),
    count_tokens=count_tokens,
    input_settings=lambda data, model: {},
    describe=lambda model: ["words: no images"],
    hf=HfFormat(
        layouts=("words",),
        presets=("words-tiny",),
        layout_of=lambda values: "words" if values.get("model_type") == "words" else None,
        read_config=read_config,
        build_config=build_config,
        rules=rules,
        canonical_name=lambda name, layout: name.removeprefix("words_model."),
        layout_name=lambda name, layout: f"words_model.{name}",
        embedding="words",
        lm_head="head",
        is_unused=lambda name, config: name == "head",
        unused_shapes=lambda model: {},
        room_for_tokens=lambda model, layout, folder: model,
        keep_files=keep_files,
        write_files=write_files,
        reference_model=lambda transformers, weights: torch.nn.Identity(),
        reference_inputs=lambda model, sequence, size: {},
    ),
    presets={"words-tiny": SIZES},
)

if __name__ == "__main__":
    register_family(FAMILY)
    main()
