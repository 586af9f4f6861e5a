"""Qwen2.5-VL: RMSNorm, a gated MLP and attention in windows in the vision encoder, and the decoder of Qwen2-VL."""

from megatron_llave.models.family import Family
from megatron_llave.models.qwen2_5_vl.embedder import Qwen25VLEmbedder
from megatron_llave.models.qwen2_5_vl.hf_files import PROCESSOR
from megatron_llave.models.qwen2_5_vl.hf_keys import KEYS
from megatron_llave.models.qwen2_5_vl.hf_weights import NAMES
from megatron_llave.models.qwen2_5_vl.inputs import INPUTS
from megatron_llave.models.qwen_vl.hf_format import hf_format

FAMILY = Family(
    name=KEYS.layout,
    embedder=Qwen25VLEmbedder,
    build_processor=INPUTS.build_processor,
    image_lengths=INPUTS.image_lengths,
    count_tokens=INPUTS.count_tokens,
    input_settings=INPUTS.input_settings,
    describe=INPUTS.describe,
    prompts=INPUTS.prompts,
    hf=hf_format(KEYS, NAMES, PROCESSOR, presets=("qwen2_5vl_3b", "qwen2_5vl_7b")),
)
