"""Qwen3-VL: learned positions and deepstack in the vision encoder, and a Qwen3 decoder with interleaved positions."""

from megatron_llave.models.qwen3_vl.embedder import Qwen3VLEmbedder
from megatron_llave.models.qwen3_vl.hf_files import PROCESSOR
from megatron_llave.models.qwen3_vl.hf_keys import KEYS
from megatron_llave.models.qwen3_vl.hf_weights import NAMES
from megatron_llave.models.qwen3_vl.inputs import INPUTS
from megatron_llave.models.qwen_vl.family import qwen_vl_family
from megatron_llave.models.qwen_vl.hf_format import hf_format

FAMILY = qwen_vl_family(
    Qwen3VLEmbedder, INPUTS, KEYS, hf_format(KEYS, NAMES, PROCESSOR, ("qwen3vl_2b", "qwen3vl_4b", "qwen3vl_8b"))
)
