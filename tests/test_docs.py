"""Links, anchors, paths, configuration keys and commands in README.md, CONTRIBUTING.md and docs/ exist.

The tools are not run here: their subcommands and options are looked up among the strings in their source.
test_doc_commands.py runs the commands that need no more than a CPU.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megatron_llave.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Commands and paths in a dated result are those of its day; only its links are checked.
GUIDES = [page for page in PAGES if "results/2" not in page.as_posix()]
FOLDERS = ("megatron_llave", "tools", "examples", "benchmarks", "docs", "tests")
SECTIONS = {field.name: field.default_factory for field in fields(RunConfig)}
# The command of a tool with another name, and modules that hold further names of commands and options.
COMMANDS = {"convert_hf": "convert", "prepare_data": "prepare"}
FURTHER_SOURCES = {
    "study": "study/variants.py",
    "prepare": "commands/prepare_*.py",
    "evaluate": "evaluation/benchmarks/*.py",
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_guide = pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))


def split(text: str) -> tuple[str, list[str]]:
    """The prose of a page, and its code blocks with continued lines joined."""
    parts = text.split("```")
    return "".join(parts[::2]), [re.sub(r"\\\n\s*", "", part) for part in parts[1::2]]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", split(page.read_text())[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def bad_links(page: Path, text: str) -> list[str]:
    links = re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", split(text)[0])
    bad = []
    for link, anchor in links:
        target = page.parent / link if link else page
        if not link.startswith(("http://", "https://")):
            if not target.exists() or anchor and anchor not in anchors(target):
                bad.append(f"{link}#{anchor}" if anchor else link)
    return bad


def bad_paths(text: str) -> list[str]:
    """Paths of the repository, in code blocks or between backticks, that do not exist. `*` and `{a,b}` are expanded."""
    prose, blocks = split(text)
    words = " ".join(re.findall(r"`([^`]+)`", prose) + blocks).split()
    paths = {
        word.strip("\"'(),:;") for word in words if word.lstrip("\"'(").startswith(tuple(f"{f}/" for f in FOLDERS))
    }
    return sorted(path for path in paths for pattern in alternatives(path) if not list(ROOT.glob(pattern)))


def alternatives(path: str) -> Iterator[str]:
    """`a{b,c}d` as `abd` and `acd`."""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    yield from (match[1] + middle + match[3] for middle in match[2].split(",")) if match else [path]


def bad_keys(text: str) -> list[str]:
    """Configuration keys, as overrides in code blocks or between backticks, that do not exist."""
    prose, blocks = split(text)
    names = "|".join(SECTIONS)
    used = re.findall(rf"(?<![\w./])((?:{names})(?:\.\w+)+)=", "\n".join(blocks))
    used += re.findall(rf"`((?:{names})(?:\.\w+)+)(?:[:=][^`]*)?`", prose)
    return sorted({key for key in used if not key.endswith((".py", ".json", ".jsonl")) and not has_key(key)})


def has_key(key: str) -> bool:
    section: Any = RunConfig
    for name in key.split("."):
        hints = get_type_hints(section) if is_dataclass(section) else {}
        if is_dataclass(section):
            section = hints.get(name)
            if section is None:
                return False
        else:  # the name of an entry of a mapping
            section = get_args(section)[-1]
    return True


@cache
def strings_of(tool: str) -> tuple[set[str], bool]:
    """All strings in the source of a tool, and whether its first argument is the name of a command."""
    name, package = COMMANDS.get(tool, tool), ROOT / "megatron_llave"
    own = [file for folder in ("commands", "options") if (file := package / folder / f"{name}.py").is_file()]
    sources = [*(own or [ROOT / "tools" / f"{tool}.py"]), *package.glob(FURTHER_SOURCES.get(name, "-"))]
    sources.append(package / "launch" / "procs.py")
    nodes = [node for source in sources for node in ast.walk(ast.parse(source.read_text()))]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return strings, name in FURTHER_SOURCES or any("add_subparsers" in file.read_text() for file in own)


def bad_commands(text: str) -> list[str]:
    """Subcommands and options after `tools/TOOL.py` or `llave NAME`, in code and backticks, that do not exist."""
    prose, blocks = split(text)
    lines = re.findall(r"`([^`]+)`", prose) + [line for block in blocks for line in block.splitlines()]
    bad = []
    for tool, rest in (match for line in lines for match in re.findall(r"(?:tools/|^llave )(\w+)(?:\.py)?(.*)", line)):
        words = re.split(r"\s#|`", rest)[0].replace("[", " ").replace("]", " ").split()
        strings, has_commands = strings_of(tool)
        used = [word for word in words if word.startswith("--")]
        used += words[:1] if has_commands and words and words[0] not in (*used, "...", "COMMAND") else []
        bad += [f"tools/{tool}.py {word}" for word in used if word not in strings and word != "--help"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = re.findall(r"^make (?:[A-Z]+=\S+ )*(\w+)", "\n".join(lines), re.MULTILINE)
    return bad + [f"make {target}" for target in made if target not in targets]


@each_page
def test_links_and_anchors(page: Path) -> None:
    assert bad_links(page, page.read_text()) == []


@each_guide
def test_paths_keys_and_commands(page: Path) -> None:
    text = page.read_text()
    assert bad_paths(text) + bad_keys(text) + bad_commands(text) == []


def missing_messages(text: str) -> list[str]:
    """Messages in the column `message` of tables that the package does not have; `...` stands for any text."""
    files = (ROOT / "megatron_llave").rglob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    said = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    tables = re.findall(r"^\| message \|.*\n\|-.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    messages = [row[1] for table in tables for row in re.finditer(r"^\| `([^`]+)`", table, re.MULTILINE)]
    parts = [part.strip(" ;") for message in messages for part in re.split(r"\.\.\.|: --", message)]
    return [part for part in parts if len(part) >= 8 and not any(part in constant for constant in said)]


def test_messages_that_are_explained_exist() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert missing_messages(text) == []
    assert missing_messages(text.replace("cannot be split into", "can be split into")) == [
        "processes can be split into"
    ]


def test_what_does_not_exist_is_noticed() -> None:
    text = "[a](nowhere.md) [b](README.md#nowhere) `tools/none.py` `loss.none` `data.subsets.A.none: 1`\n"
    text += "```\npython tools/merge.py --none runs/a=1\npython tools/prepare_data.py none \\\n  --o\nmake none\n"
    text += "bash examples/none.sh train.none=3\n```"
    assert bad_links(ROOT / "CONTRIBUTING.md", text) == ["nowhere.md", "README.md#nowhere"]
    assert bad_paths(text) == ["examples/none.sh", "tools/none.py"]
    assert bad_keys(text) == ["data.subsets.A.none", "loss.none", "train.none"]
    commands = ["merge.py --none", "prepare_data.py --o", "prepare_data.py none"]
    assert bad_commands(text.replace("`tools/none.py`", "")) == [*(f"tools/{c}" for c in commands), "make none"]


SOURCES = [path for folder in FOLDERS[:-1] for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")]


def test_no_command_installs_the_package_by_its_name() -> None:
    """Nobody owns the name on the package index, so whoever takes it would be installed."""
    files = [*GUIDES, *SOURCES, ROOT / "Makefile", ROOT / "Dockerfile", ROOT / "setup.py"]
    by_name = re.compile(r"pip install(?: -\S+)* [\"']?megatron[_-]llave")
    assert by_name.search('x pip install -U "megatron_llave[video]"') and not by_name.search("pip install -e '.[gpu]'")
    assert [path for path in files if by_name.search(path.read_text(errors="replace"))] == []


def dry_run(*settings: str, **env: str) -> str:
    """The commands with which make would set up .venv, which bash can read; pip has no settings but those in `env`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "TORCH_INDEX", "MAKE"))}
    kept |= {"PIP_CONFIG_FILE": os.devnull, **env}
    command = ["make", "-n", "-B", ".venv/.installed", f"PYTHON={sys.executable}", *settings]
    out = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True, timeout=100).stdout
    subprocess.run(["bash", "-n"], input=out, text=True, check=True, timeout=100)
    return out


def test_make_takes_the_cpu_build_of_torch_where_there_is_no_gpu() -> None:
    cpu = "https://download.pytorch.org/whl/cpu"
    assert f"--index-url {cpu}" in (ROOT / "docs" / "installation.md").read_text()
    if sys.platform == "linux":
        out = dry_run("GPUS=0")
        assert out.index(f"--index-url {cpu} \"$(grep '^torch==' requirements.txt)\"") < out.index(
            "-r requirements.txt"
        )
    assert "--index-url" not in dry_run("GPUS=2")
    assert "--index-url" not in dry_run("GPUS=0", "TORCH_INDEX=")
    assert "--index-url https://mirror/simple" in dry_run("GPUS=2", "TORCH_INDEX=https://mirror/simple")
    assert "--index-url" not in dry_run("GPUS=0", PIP_INDEX_URL="https://mirror/simple")  # pip's own setting is kept
