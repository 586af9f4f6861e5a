"""What Qwen3-VL's processor has of its own in Hugging Face folders.

Source: transformers' processing_qwen3_vl.py and video processors (4.57, 5.23), and the released folders.
"""

from megatron_llave.models.qwen3_vl.embedder import Qwen3VLEmbedder
from megatron_llave.models.qwen3_vl.inputs import INPUTS
from megatron_llave.models.qwen_vl.hf_files import HfProcessor
from megatron_llave.models.qwen_vl.prompt import templates

PROCESSOR = HfProcessor(
    name="Qwen3-VL",
    processor="Qwen3VLProcessor",
    video_processor="Qwen3VLVideoProcessor",
    mean=Qwen3VLEmbedder.tower_kind.mean,
    std=Qwen3VLEmbedder.tower_kind.std,
    prompts=templates(INPUTS.system),
    embedders={"qwen3_vl_embedding": r"(?i)qwen3[-_]?vl[-_]?embedding|Represent the user's input\.|appends <"},
)
