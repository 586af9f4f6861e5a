"""What of a configuration is shown to others: no word of a command, no secret of a URL, of a path only its own name.

Model cards (convert/training_record.py), trackers and the reports of evaluations and studies show it to people who may
not see the configuration itself.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from megatron_llave.hub import is_pinned

PATHS = ("path", "negatives", "order", "images", "cache", "tokenizer", "output", "init", "resume", "base")
PATHS += ("stored_embeddings",)
"""Keys of the configuration whose values are folders, files or URLs."""
A_COMMAND = "a command"
"""What is told of a command in data.path: each of its words may be a password or hold one."""
_COMMAND = re.compile(r"\bpipe:.*", re.DOTALL | re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*://)", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return a text without what may be secret: a command to its end; of URLs user, password, query and fragment.

    A URL is taken to end where the text ends or the next one begins, since a password may have any character.
    """
    start, *urls = _SCHEME.split(_COMMAND.sub(A_COMMAND, text))
    return start + "".join(scheme + _place(rest) for scheme, rest in zip(urls[::2], urls[1::2]))


def _place(rest: str) -> str:
    """Return host and path of a URL, given what follows its scheme."""
    place, *query = re.split("[?#;]", rest, maxsplit=1)
    is_clear = "@" not in "".join(query)  # else what precedes it may be the beginning of a password
    return place.rpartition("@")[2] if is_clear else "..."


def own_name(path: str) -> str:
    """Return the name of a folder, file or URL, a model of the hub as it is, and of a command that it is one."""
    if is_pinned(path):
        return path
    text = without_secrets(path)
    return A_COMMAND if text.endswith(A_COMMAND) else PurePath(text).name


def config_without_secrets(config: Any) -> Any:
    """Return a configuration, or a value in it, with `without_secrets` of each text."""
    return _of_texts(config, lambda key, text: without_secrets(text))


def config_without_paths(config: Any) -> Any:
    """Return a configuration, or a value in it, without secrets, and with own names instead of paths.

    Own names have values of PATHS, and absolute paths, URLs and commands wherever they are.
    """

    def shown(key: str, text: str) -> str:
        is_place = key in PATHS or PurePath(text).is_absolute() or _SCHEME.match(text) or _COMMAND.match(text)
        return own_name(text) if is_place else without_secrets(text)

    return _of_texts(config, shown)


def _of_texts(value: Any, shown: Callable[[str, str], str], key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {inner: _of_texts(of_inner, shown, inner) for inner, of_inner in value.items()}
    if isinstance(value, list | tuple):
        return [_of_texts(inner, shown, key) for inner in value]
    return shown(key, value) if isinstance(value, str) else value
