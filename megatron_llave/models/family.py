"""What a model family brings: the record that the registry in models/__init__.py holds one of for each family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module

from megatron_llave.config.data import DataConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.data.packing import Processor
from megatron_llave.data.tokenizer import Tokenizer
from megatron_llave.models.hf.weights import HfFormat
from megatron_llave.models.vision_cost import VisionCost


@dataclass(frozen=True)
class Family:
    """Everything that the rest of the package needs to know of a kind of model."""

    name: str
    """Value of model.family."""
    embedder: Callable[..., Module]
    """One pipeline chunk of the model, a MegatronModule: embedder(model: ModelConfig, parallel: ParallelConfig,
    groups: ProcessGroupCollection, is_first: bool, is_last: bool, chunk: int | None). Takes PackedSequences; the last
    chunk returns embeddings [n, d] float32 of unit length, others hidden states. Its attribute `language` is a
    blocks.qwen2.LanguageModel or has the same `decoder`; other parts are called as in model.freeze."""
    build_processor: Callable[[DataConfig, ModelConfig], Processor]
    """The processor of a run; ConfigError or DataError where its tokenizer does not fit or cannot be read."""
    image_lengths: Callable[[int, int, DataConfig, ModelConfig], tuple[int, int]]
    """Width and height of an image, pixels -> its visual tokens, and the tiles that the vision encoder sees."""
    video_lengths: Callable[[int, int, int, DataConfig, ModelConfig], tuple[int, int]]
    """Number, width and height of the frames of a video -> its visual tokens, and the tiles."""
    count_tokens: Callable[[str, list[list[int]], bool, Tokenizer, DataConfig, ModelConfig, Sequence[float]], int]
    """Text, [width, height] of its images, whether these are the frames of a video, tokenizer, sections, the times of
    these frames in seconds (empty: unknown) -> tokens of the input, visual ones counted, however long it is; DataError
    where text and images do not fit together."""
    input_settings: Callable[[DataConfig, ModelConfig], dict[str, Any]]
    """The settings that embeddings depend on beside weights, tokenizer and precision, by key."""
    describe: Callable[[ModelConfig], list[str]]
    """Lines about the parts before the decoder, for llave convert inspect."""
    hf: HfFormat
    """How its models are stored in Hugging Face folders."""
    cost: VisionCost = VisionCost()
    """Parameters, FLOPs and bytes of vision encoder and projector; the default is right without images."""
    prompts: tuple[str, ...] = ("qwen", "plain")
    """Values of data.prompt that its models can have."""
    check: Callable[[ModelConfig], None] = lambda model: None
    """Raises a ConfigError for sizes that this family cannot have; config/checks.py has what holds for every family."""
    presets: Mapping[str, dict] = field(default_factory=dict)
    """Further values of model.preset: keys of the section `model` by name. Those of the package's own families are in
    config/presets.py, which can be read before any model is imported."""
