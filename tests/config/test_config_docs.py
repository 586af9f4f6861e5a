"""docs/configuration.md is what its tool makes, and explains every key."""

import dataclasses

from megatron_llave.config.schema import RunConfig
from tools import config_docs


def test_file_is_up_to_date() -> None:
    assert config_docs.FILE.read_text() == config_docs.make(), "run python tools/config_docs.py"


def test_every_key_is_explained() -> None:
    text = config_docs.make()
    for section in dataclasses.fields(RunConfig):
        assert f"## {section.name}\n" in text
        for field in dataclasses.fields(section.default_factory):
            if not dataclasses.is_dataclass(field.default_factory):
                assert f"\n| `{field.name}` | `" in text, f"{section.name}.{field.name}"
    assert "## data.subsets.NAME" in text and "## model.vision" in text
