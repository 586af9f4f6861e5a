"""Optional packages: one that is missing, and one that is installed and broken, each give one line."""

import sys
from pathlib import Path

import pytest

from megatron_llave.errors import ConfigError, DataError, import_optional


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import needed_by_extra", r"ModuleNotFoundError: No module named 'needed_by_extra'"),
        ("from json import extra", r"ImportError: cannot import name 'extra' from 'json' .*"),
        ("import json\njson.extra", r"AttributeError: module 'json' has no attribute 'extra'"),
        ("raise OSError('libextra.so: cannot open shared object file')", r"OSError: libextra.so: cannot open .* file"),
    ],
)
def test_a_broken_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str) -> None:
    (tmp_path / "extra.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"^key=1 needs extra, which is installed but .* \({said}\); install it again$"
    ):
        import_optional("extra", "key=1 needs", "pip install extra")


def test_a_missing_package_is_one_line_and_another_one_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "around.py").write_text("import extra")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "extra", None)
    for module, package in (("extra", None), ("extra.part", None), ("around", "extra")):
        with pytest.raises(DataError, match="^key=1 needs extra: pip install extra$"):
            import_optional(module, "key=1 needs", "pip install extra", package, DataError)
    assert import_optional("json.decoder", "", "") is sys.modules["json.decoder"]
