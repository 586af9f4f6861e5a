"""Texts, images and videos of Qwen2-VL: what differs from the other Qwen-VL families."""

from megatron_llave.models.qwen_vl.processor import QwenVlInputs

INPUTS = QwenVlInputs("You are a helpful assistant.")
