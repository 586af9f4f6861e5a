"""Texts, images and videos of Qwen3-VL: what differs from the other Qwen-VL families."""

from megatron_llave.models.qwen_vl.processor import QwenVlInputs

INPUTS = QwenVlInputs(None, has_time_stamps=True)
