"""Qwen2.5-VL: RMSNorm, a gated MLP and attention in windows in the vision encoder, and the decoder of Qwen2-VL."""

from megatron_llave.models.qwen2_5_vl.embedder import Qwen25VLEmbedder
from megatron_llave.models.qwen2_5_vl.hf_files import PROCESSOR
from megatron_llave.models.qwen2_5_vl.hf_keys import KEYS
from megatron_llave.models.qwen2_5_vl.hf_weights import NAMES
from megatron_llave.models.qwen2_5_vl.inputs import INPUTS
from megatron_llave.models.qwen_vl.family import qwen_vl_family
from megatron_llave.models.qwen_vl.hf_format import hf_format

FAMILY = qwen_vl_family(
    Qwen25VLEmbedder, INPUTS, KEYS, hf_format(KEYS, NAMES, PROCESSOR, ("qwen2_5vl_3b", "qwen2_5vl_7b"))
)
