"""A tokenizer with the special tokens of the Qwen-VL families, and the sizes of a small model of each."""

import json
from pathlib import Path

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.model import ModelConfig

GOLDEN = Path(__file__).parent / "golden"
VISION_TOKENS = {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656}


def qwen_vl_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of Qwen's ids for the golden texts and single bytes, and for images and videos."""
    described = json.loads((GOLDEN / "prompts/qwen_subset_tokenizer.json").read_text())
    described["model"]["vocab"] |= VISION_TOKENS
    [like, *_] = described["added_tokens"]
    described["added_tokens"] += [like | {"id": number, "content": token} for token, number in VISION_TOKENS.items()]
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(described))
    return file


def small_model(family: str) -> ModelConfig:
    """Sizes of a small model of a family, of which the processor needs patches, vocabulary and the rate of videos."""
    vision = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_hidden_size=32)
    vision |= {"patch_size": 16 if family == "qwen3_vl" else 14}
    vision |= {"tokens_per_second": 2} if family == "qwen2_5_vl" else {}
    language = dict(hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2, ffn_hidden_size=64, vocab_size=151936)
    sizes = {"family": family, "vision": vision, "language": language | {"mrope_section": [4, 6, 6]}}
    return config_from_dict({"model": sizes}).model
