"""The instructions that mteb's tasks, a model or a file give to the texts of an evaluation by mteb."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_llave.config.data import INSTRUCTION_PROMPTS
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.errors import DataError
from megatron_llave.files import read_json

SIDES = ("query", "document")
FILE_KEYS = ("template", "image", "tasks")
"""Keys of a file of --prompts beside the names of tasks, of their types, and of the sides query and document."""
OWN_PROMPTS = "config_sentence_transformers.json"


@dataclass(frozen=True)
class Instructions:
    """What stands before the texts of a task, or in place of a missing text."""

    by_name: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)
    """Name of a task, type of tasks, `query` or `document` -> instruction, or {"query": ..., "document": ...}. They win
    over those of mteb's tasks, in this order."""
    template: str = "{instruction}\n{text}"
    """How an instruction and a text become one text."""
    image: str = "Represent the given image."
    """Text of an image that has neither text nor instruction."""
    uses_tasks: bool = True
    """Whether inputs without an instruction in `by_name` get that of mteb's task."""

    @staticmethod
    def of(cfg: RunConfig) -> "Instructions":
        """Those that a model of this configuration embeds with: the prompt's own place for them, where it has one."""
        if cfg.data.prompt in INSTRUCTION_PROMPTS:
            return Instructions(template="Instruct: {instruction}\n{text}", image="")
        return Instructions()

    def for_document(self, task_metadata: Any) -> str:
        """The instruction of a document, which has one only where it is meant for documents."""
        prompts = [self.by_name.get(task_metadata.name), self.by_name.get(task_metadata.type)]
        prompts += [{"document": self.by_name.get("document")}, task_metadata.prompt if self.uses_tasks else None]
        found = (prompt["document"] for prompt in prompts if isinstance(prompt, Mapping) and prompt.get("document"))
        return next(found, "")

    def text(self, instruction: str, text: str, has_image: bool) -> str:
        """The text of an input; marks in it, such as <image>, are ordinary text."""
        if instruction:
            line = " ".join(instruction.split()) if self.template.startswith("Instruct:") else instruction
            text = self.template.replace("{instruction}", line).replace("{text}", text).strip()
        elif has_image and not text:
            text = self.image
        return mark_user_text(text, 0) or ("" if has_image else " ")  # some prompts have no token of their own to pool


def read_prompts(path: str | Path, tasks: Sequence[Any]) -> dict[str, Any]:
    """Read a JSON file of instructions, whose keys Instructions and FILE_KEYS describe.

    Raises:
        DataError: the file is not such a file, or mteb has neither a task nor a type of tasks with the name of a key.
    """
    from mteb.get_tasks import TASK_LIST

    values = read_json(path, hint="--prompts names a JSON file of instructions")
    known = {word for task in [*TASK_LIST, *tasks] for word in (task.metadata.name, task.metadata.type)}
    for key, value in values.items():
        if key not in known and key not in (*FILE_KEYS, *SIDES):
            others = f"nor one of {', '.join((*SIDES, *FILE_KEYS))}"
            raise DataError(f"{path}: {key!r} is neither a task nor a type of tasks, {others}{nearest(key, known)}")
        right = _what_is_right(key, value)
        if right:
            raise DataError(f"{path}: {key!r} must be {right}, not {value!r:.60}")
    return values


def _what_is_right(key: str, value: Any) -> str:
    """What the value of a key of --prompts must be; "" where it is right."""
    if key == "tasks":
        return "" if isinstance(value, bool) else "true or false"
    if key == "template":
        is_right = isinstance(value, str) and "{instruction}" in value and "{text}" in value
        return "" if is_right else "a text with {instruction} and {text}"
    if key in (*SIDES, "image") or isinstance(value, str):
        return "" if isinstance(value, str) else "a text"
    is_right = isinstance(value, dict) and all(side in SIDES and isinstance(text, str) for side, text in value.items())
    return "" if is_right else 'a text, or {"query": a text, "document": a text}'


def own_prompts(folder: Path, tasks: Sequence[Any]) -> dict[str, str]:
    """The instructions that a Hugging Face folder brings for sentence-transformers, by the names that mteb knows.

    Raises:
        DataError: their file is damaged.
    """
    file = folder / OWN_PROMPTS
    values = read_json(file).get("prompts") if file.is_file() else None
    names = {*SIDES, *(word for task in tasks for word in (task.metadata.name, task.metadata.type))}
    found = values.items() if isinstance(values, dict) else ()
    return {key: text for key, text in found if key in names and isinstance(text, str) and text}


def instructions_of(cfg: RunConfig, prompts: Mapping[str, Any]) -> Instructions:
    """The instructions that a model of this configuration embeds with, and those of a file of --prompts."""
    names = {"template": "template", "image": "image", "tasks": "uses_tasks"}
    changes = {names[key]: value for key, value in prompts.items() if key in FILE_KEYS}
    by_name = {key: value for key, value in prompts.items() if key not in FILE_KEYS}
    return replace(Instructions.of(cfg), by_name=by_name, **changes)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known name that is nearest."""
    lower = {each.lower(): each for each in known}
    return f"; the nearest is {lower[difflib.get_close_matches(name.lower(), lower, 1, 0.0)[0]]!r}"
