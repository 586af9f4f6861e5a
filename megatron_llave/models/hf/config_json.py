"""config.json of a Hugging Face folder: reading it, refusing values that we cannot run, and what it says.

What its keys mean is up to the model families, each of which reads a Section into an HfConfig.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json

DTYPES = ("float32", "bfloat16", "float16")
LONGEST_VALUE = 200
"""Number of characters of a value that a message repeats."""
MOST = {"num_hidden_layers": 500, "depth": 500, "image_size": 4096}
MOST_SIZE = 2**24
"""The largest whole numbers, for keys in MOST and for all others: a model is laid out before its weights are read."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""transformers writes the first since 4.56, and the second before 5."""


@dataclass(frozen=True)
class HfConfig:
    """What a config.json says."""

    layout: str
    """The kind of folder, one of HfFormat.layouts."""
    run: RunConfig
    """The model and how its inputs are made; all that config.json does not say has its default."""
    tied: bool
    """The vocabulary projection shares the embedding's weights."""
    dtype: str | None
    """Type of the weights: float32, bfloat16 or float16; None where the file does not say."""
    vision_layers: int
    """Layers of the vision encoder that the weights hold: those that are run, and maybe some after them."""
    raw: dict
    """The file as it is."""
    notes: list[str] = field(default_factory=list, compare=False)
    """What a reader should know of the files beside it: a line for each that is not used, or that sets a key."""

    @property
    def model(self) -> ModelConfig:
        """Return the `model` section."""
        return self.run.model


@dataclass(frozen=True)
class Section:
    """A part of a config.json, and how to name it in messages."""

    file: Path
    prefix: str
    """The keys that lead to the section, each followed by a dot."""
    values: dict

    def refuse(self, key: str, right: str) -> CheckpointError:
        """Return the error to raise for the value of `key`."""
        value = repr(self.values[key]) if key in self.values else "(missing)"
        value = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
        return CheckpointError(f"{self.file}: {self.prefix}{key}={value} is not supported; it must be {right}")

    def number(self, key: str, default: float) -> float:
        """Return a positive, finite number, which must be an integer if the default is one, and not too large.

        Raises:
            CheckpointError: the value is not one.
        """
        value = self.values.get(key, default)
        kinds = int if isinstance(default, int) else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.refuse(key, f"a positive {'whole ' if kinds is int else ''}number")
        most = MOST.get(key, MOST_SIZE)
        if kinds is int and value > most:
            raise self.refuse(key, f"at most {most}")
        return value

    def check(self, fixed: dict[str, tuple[Any, Any]]) -> None:
        """Refuse values other than the one we run.

        Args:
            fixed: by key the value that a missing key stands for, and the one value that we run.

        Raises:
            CheckpointError: names the first key with another value.
        """
        for key, (default, right) in fixed.items():
            if self.values.get(key, default) != right:
                raise self.refuse(key, repr(right))

    def inner(self, key: str) -> "Section | None":
        """Return the section under `key`; None if it is missing or null.

        Raises:
            CheckpointError: there is something else.
        """
        values = self.values.get(key)
        if not isinstance(values, dict | None):
            raise self.refuse(key, "an object")
        return None if values is None else Section(self.file, f"{self.prefix}{key}.", values)

    def dtype(self) -> str | None:
        """Return the type of the weights, from the key of either version of transformers; None if there is neither.

        Raises:
            CheckpointError: it is none of DTYPES.
        """
        key = DTYPE_KEYS[self.values.get("dtype") is None]
        if self.values.get(key) not in (None, *DTYPES):
            raise self.refuse(key, f"one of {', '.join(DTYPES)}")
        return self.values.get(key)


def read_config_json(folder: str | Path) -> Section:
    """Read config.json of a folder.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = Path(folder) / "config.json"
    return Section(file, "", read_json(file, hint="a Hugging Face folder has one", error=CheckpointError))
