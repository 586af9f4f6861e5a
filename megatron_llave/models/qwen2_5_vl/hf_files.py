"""What Qwen2.5-VL's processor has of its own in Hugging Face folders.

Source: transformers' processing_qwen2_5_vl.py and video processors (4.57, 5.23), and the released folders.
"""

from megatron_llave.models.qwen2_5_vl.embedder import Qwen25VLEmbedder
from megatron_llave.models.qwen2_5_vl.inputs import INPUTS
from megatron_llave.models.qwen_vl.hf_files import HfProcessor
from megatron_llave.models.qwen_vl.prompt import templates

PROCESSOR = HfProcessor(
    name="Qwen2.5-VL",
    processor="Qwen2_5_VLProcessor",
    video_processor="Qwen2VLVideoProcessor",
    mean=Qwen25VLEmbedder.tower_kind.mean,
    std=Qwen25VLEmbedder.tower_kind.std,
    prompts=templates(INPUTS.system),
    embedders={},
)
