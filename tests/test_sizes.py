"""No file over 400 lines and no function over 60, in the package and the tools; prints the ten longest of each."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def source_files() -> list[Path]:
    return sorted(path for folder in ("megatron_llave", "tools") for path in (ROOT / folder).rglob("*.py"))


def functions(source: str) -> list[tuple[int, str]]:
    """(lines, name) of module-level functions and methods; a nested function counts with its parent."""
    found = []
    waiting = [(node, "") for node in ast.parse(source).body]
    while waiting:
        node, prefix = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((node.end_lineno - node.lineno + 1, prefix + node.name))
        elif isinstance(node, ast.ClassDef):
            waiting.extend((child, f"{prefix}{node.name}.") for child in node.body)
        else:
            waiting.extend((child, prefix) for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
    return found


def report(title: str, sizes: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nlongest {title}:")
        for lines, name in sorted(sizes, reverse=True)[:10]:
            print(f"{lines:5} {name}")


def test_file_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [(len(path.read_text().splitlines()), str(path.relative_to(ROOT))) for path in source_files()]
    report("files", sizes, capsys)
    assert [size for size in sizes if size[0] > LONGEST_FILE] == []


def test_function_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for path in source_files():
        name = path.relative_to(ROOT)
        sizes += [(lines, f"{name}: {function}") for lines, function in functions(path.read_text())]
    report("functions", sizes, capsys)
    assert [size for size in sizes if size[0] > LONGEST_FUNCTION] == []


def test_lengths_are_counted_right() -> None:
    nested = "@cache\ndef a():\n    def b():\n        pass\n\n    return b\n"
    method = "class C:\n    def d(self):\n        pass\n"
    assert sorted(functions(nested + method)) == [(2, "C.d"), (5, "a")]
    assert functions("if True:\n    async def e():\n        pass\n") == [(2, "e")]
