"""Reads YAML and overrides by the types of the configuration: a value arrives as what its key takes, or is refused.

YAML guesses a type from the look of a value, and 12:30:45, 010, 1e3 or `no` then become other things than were written.
Here every scalar stays the text that it is until the key says whether it is a number, a switch or a string.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import ConfigError, require
from megatron_llave.files import MAX_JSON_DEPTH, NO_CHARACTER, read_bytes

MAX_BYTES = 2**20
"""The largest configuration file that is read."""
MAX_VALUES = 100_000
"""The most values of a configuration; aliases of YAML can stand for exponentially many."""
NULL = ("null", "Null", "NULL", "~", "")
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SPECIAL_FLOATS = {f"{sign}{dot}inf": float(f"{sign}inf") for sign in ("", "+", "-") for dot in ("", ".")}
SPECIAL_FLOATS |= {"nan": float("nan"), ".nan": float("nan")}
INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)


class Plain(str):
    """A scalar of YAML without quotes, or an override's value: its key decides what it means."""


class FromCommandLine(Plain):
    """The value of an override: as it stands for a string, otherwise YAML."""


class _Loader(yaml.SafeLoader):
    """A loader of YAML that leaves scalars as text, and refuses a key that is given twice and endless aliases."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[yaml.Node, int] = {}

    def fetch_flow_collection_start(self, TokenClass: type) -> None:
        """Begin a list or a mapping in brackets; the scanner's time grows with how deep it already is."""
        if self.flow_level >= MAX_JSON_DEPTH:
            problem = f"nested deeper than {MAX_JSON_DEPTH}"
            raise yaml.scanner.ScannerError(None, None, problem, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Return the next node. What aliases stand for is counted here, before anything walks through all of it."""
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if is_alias and node not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias stands for what it is part of", mark)
        if not is_alias:
            pairs = isinstance(node, yaml.MappingNode)
            inner = () if isinstance(node, yaml.ScalarNode) else chain(*node.value) if pairs else node.value
            self._sizes[node] = 1 + sum(self._sizes[child] for child in inner)
        if self._sizes[node] > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"there are more than {MAX_VALUES} values", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of a node; its keys are different and plain."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, times in keys.items() if times > 1), None)
        if twice is not None or len(keys) < len(node.value):
            problem = "a key must be a word" if twice is None else f"the key {twice} is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def _text_of(loader: _Loader, node: yaml.ScalarNode) -> str:
    return Plain(node.value) if node.style is None else node.value


_SAFE = yaml.SafeLoader.yaml_constructors
_Loader.yaml_constructors = {"tag:yaml.org,2002:str": _text_of, None: _SAFE[None]}  # a tag such as !!int is refused
_Loader.yaml_constructors |= {tag: _SAFE[tag] for tag in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file; its scalars are still text.

    Raises:
        ConfigError: the file is missing or too large, is not YAML, or does not hold sections.
    """
    require(path.exists(), f"configuration file {path} does not exist")
    try:
        value = _load(read_bytes(path, MAX_BYTES, "name a YAML file", ConfigError).decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    require(value is None or isinstance(value, dict), f"{path} must hold sections such as `model:` and `train:`")
    return value or {}


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the overrides as nested sections, and the keys of mappings that they empty, such as data.subsets=null.

    Raises:
        ConfigError: an override does not look like section.key=value.
    """
    tree: dict[str, Any] = {}
    emptied: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        path = key.strip().split(".")
        require(bool(equals) and all(path), f"override {override!r} must look like section.key=value")
        require(bool(value.strip()), f"override {override!r} has no value; null is none, and '' an empty text")
        section = tree
        for name in path[:-1]:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        if value.strip() in (*NULL, "{}") and _is_mapping(path):
            emptied.append(key.strip())
            section.pop(path[-1], None)
        else:
            section[path[-1]] = FromCommandLine(value)
    return tree, emptied


def _is_mapping(path: Sequence[str]) -> bool:
    """Whether the key takes a mapping with names of the user's own."""
    hint: Any = RunConfig
    for name in path:
        hint = get_type_hints(hint).get(name) if is_dataclass(hint) else None
    return get_origin(hint) is dict


class TypedReader:
    """Turns text into values by type hints; `source` names the file or the command line in messages."""

    def __init__(self, source: str) -> None:
        self.source, self.count = source, 0

    def read(self, hint: Any, value: Any, key: str = "") -> Any:
        """Return `value` as what `hint` says; a section as a dictionary of the keys that are given.

        Raises:
            ConfigError: a key is unknown, or a value is of another kind; names the key.
        """
        self.count += 1
        require(self.count <= MAX_VALUES, f"{self.source} has more than {MAX_VALUES} values")
        is_reference = isinstance(value, str) and "${" in value
        require(not is_reference, f"{key}={value}: ${{...}} is not resolved; write the value")
        wrong = isinstance(value, str) and NO_CHARACTER.search(value)
        require(not wrong, f"{key}={value!a} holds a NUL or a byte that is not UTF-8, which is no character")
        require(value != "???", f"{key}=??? is no value; leave the key out for its default")
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, UnionType):
            inner = next(argument for argument in arguments if argument is not type(None))
            return None if value is None or isinstance(value, Plain) and value in NULL else self.read(inner, value, key)
        if isinstance(value, FromCommandLine) and (is_dataclass(hint) or origin in (dict, list)):
            read = self._yaml(value, key)
            value = value if read is None else read
        if is_dataclass(hint):
            return self._section(hint, value, key)
        if origin is dict:
            if value is None or isinstance(value, Plain) and value in NULL:
                return {}
            require(isinstance(value, dict), f"{key} in {self.source} must be a mapping of names, not {value!r}")
            return {str(name): self.read(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
        if origin is list:
            require(isinstance(value, list), f"{key} in {self.source} must be a list such as [a, b], not {value!r}")
            return [self.read(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
        return self._scalar(hint, value, key)

    def _yaml(self, text: str, key: str) -> Any:
        try:
            return _load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ConfigError(f"override {key}={text} has a value that is not valid YAML: {error}") from error

    def _section(self, cls: type, value: Any, key: str) -> dict[str, Any]:
        value = {} if value is None or isinstance(value, Plain) and value in NULL else value
        require(isinstance(value, dict), f"{key} in {self.source} must be a section with keys, not {value}")
        hints, prefix = get_type_hints(cls), f"{key}." if key else ""
        for name in value:
            if name not in hints:
                near = difflib.get_close_matches(str(name), hints, n=1)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(hints)}"
                raise ConfigError(f"unknown key {prefix}{name} in {self.source}; {hint}")
        return {str(name): self.read(hints[name], item, f"{prefix}{name}") for name, item in value.items()}

    def _scalar(self, hint: type, value: Any, key: str) -> Any:
        is_text = isinstance(value, str)
        require(is_text, f"{key} in {self.source} must be {_named(hint)}, not {value!r}")
        text = value.strip()
        if hint is str:
            if isinstance(value, FromCommandLine) and len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
                return str(self._yaml(text, key))
            return str(value)
        is_plain = isinstance(value, Plain)
        try:
            if hint is bool and is_plain:
                return SWITCHES[text.lower()]
            if hint is int and is_plain and INTEGER.fullmatch(text):
                return int(text)
            if hint is float and text.lower() in SPECIAL_FLOATS:
                return SPECIAL_FLOATS[text.lower()]
            if hint is float and FLOAT.fullmatch(text):
                return _finite(text)
        except (KeyError, ValueError):
            pass
        raise ConfigError(f"{key}={value} must be {_named(hint)}")


def _finite(text: str) -> float:
    """The number, unless it is too large or too small for a float."""
    number = float(text)
    if math.isinf(number) or number == 0 and re.search("[1-9]", text.lower().partition("e")[0]):
        raise ValueError
    return number


def _named(hint: type) -> str:
    return {int: "a whole number of at most 18 digits", float: "a number", bool: "true or false", str: "a text"}[hint]
