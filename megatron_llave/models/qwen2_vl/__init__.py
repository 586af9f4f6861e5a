"""Qwen2-VL: LayerNorm and QuickGELU in the vision encoder, and a Qwen2 decoder with positions in three axes."""

from megatron_llave.models.family import Family
from megatron_llave.models.qwen2_vl.embedder import Qwen2VLEmbedder
from megatron_llave.models.qwen2_vl.hf_files import PROCESSOR
from megatron_llave.models.qwen2_vl.hf_keys import KEYS
from megatron_llave.models.qwen2_vl.hf_weights import NAMES
from megatron_llave.models.qwen2_vl.inputs import INPUTS
from megatron_llave.models.qwen_vl.hf_format import hf_format

FAMILY = Family(
    name=KEYS.layout,
    embedder=Qwen2VLEmbedder,
    build_processor=INPUTS.build_processor,
    image_lengths=INPUTS.image_lengths,
    count_tokens=INPUTS.count_tokens,
    input_settings=INPUTS.input_settings,
    describe=INPUTS.describe,
    prompts=INPUTS.prompts,
    hf=hf_format(KEYS, NAMES, PROCESSOR, presets=("qwen2vl_2b", "qwen2vl_7b")),
)
