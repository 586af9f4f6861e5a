"""Write docs/configuration.md, which lists every key of a run's configuration, from the docstrings of the fields.

python tools/config_docs.py

A test compares the file with what this tool generates.
"""

import argparse
import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_llave.config.data import SubsetConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import OneLineParser

FILE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

This page lists every key of the YAML file that `--config` names and of the `section.key=value` overrides after it.
`python tools/config_docs.py` generates it from the docstrings in `megatron_llave/config/`; do not edit it by hand.
[The glossary](glossary.md) explains the terms.
"""
MAPS = {"subsets": SubsetConfig}
"""Fields that map names to sections: field name -> dataclass of such a section."""


def field_docs(section: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, joined into one line: field name -> docstring."""
    classes = section.__mro__[:-1]  # with those that it inherits fields from
    body = [statement for one in classes for statement in ast.parse(inspect.getsource(one)).body[0].body]
    docs = {}
    for statement, following in zip(body, body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, as YAML writes it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def describe(section: type, name: str) -> Iterator[str]:
    """The lines of a section's heading and table, followed by those of the sections within it."""
    docs = field_docs(section)
    nested = []
    yield f"\n## {name}\n\n{inspect.getdoc(section)}\n\n| key | default | description |\n|---|---|---|"
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default_factory):
            nested.append((field.default_factory, f"{name}.{field.name}"))
            continue
        if field.name in MAPS:
            nested.append((MAPS[field.name], f"{name}.{field.name}.NAME"))
        text = docs[field.name].replace("|", "\\|")
        yield f"| `{field.name}` | `{default_of(field)}` | {text} |"
    for inner, path in nested:
        yield from describe(inner, path)


def make() -> str:
    """The complete text of docs/configuration.md."""
    lines = [HEAD]
    for field in dataclasses.fields(RunConfig):
        lines += describe(field.default_factory, field.name)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FILE.write_text(make())
    print(f"wrote {FILE}")
