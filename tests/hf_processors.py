"""Processors of exported folders as AutoProcessor makes them, also where torchvision is not installed."""

import json
from pathlib import Path

import pytest
import transformers
from transformers import AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

IMAGES = {
    "LlavaOnevisionProcessor": "LlavaOnevisionImageProcessorPil",
    "LlavaProcessor": "SiglipImageProcessorPil",
}
"""Class of a processor -> that of its image processor; others have Qwen2VLImageProcessorPil."""


def load_processor(folder: str | Path) -> transformers.ProcessorMixin:
    """AutoProcessor; without torchvision, which its video processor needs, the same of its other parts."""
    folder = Path(folder)
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(folder)
    name = json.loads((folder / "preprocessor_config.json").read_text())["processor_class"]
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    settings.pop("processor_class", None)
    parts = [
        getattr(transformers, IMAGES.get(name, "Qwen2VLImageProcessorPil")).from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        *([] if name == "LlavaProcessor" else [None]),
    ]
    no_check = {"check_argument_for_proper_class": lambda self, name, argument: type(argument)}
    made = type("WithoutVideo", (getattr(transformers, name),), no_check)
    return made(
        *parts, chat_template=json.loads((folder / "chat_template.json").read_text())["chat_template"], **settings
    )


def use_processors(patch: pytest.MonkeyPatch) -> None:
    """Let AutoProcessor make these processors where torchvision is not installed."""
    if not is_torchvision_available():
        patch.setattr(AutoProcessor, "from_pretrained", lambda folder, **options: load_processor(folder))
