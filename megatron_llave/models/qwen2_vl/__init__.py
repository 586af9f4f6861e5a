"""Qwen2-VL: LayerNorm and QuickGELU in the vision encoder, and a Qwen2 decoder with positions in three axes."""

from megatron_llave.models.qwen2_vl.embedder import Qwen2VLEmbedder
from megatron_llave.models.qwen2_vl.hf_files import PROCESSOR
from megatron_llave.models.qwen2_vl.hf_keys import KEYS
from megatron_llave.models.qwen2_vl.hf_weights import NAMES
from megatron_llave.models.qwen2_vl.inputs import INPUTS
from megatron_llave.models.qwen_vl.family import qwen_vl_family
from megatron_llave.models.qwen_vl.hf_format import hf_format

FAMILY = qwen_vl_family(Qwen2VLEmbedder, INPUTS, KEYS, hf_format(KEYS, NAMES, PROCESSOR, ("qwen2vl_2b", "qwen2vl_7b")))
