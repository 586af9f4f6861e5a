"""The example configurations that come with the package: `--config tiny` stands for examples/tiny.yaml."""

import difflib
import importlib
from pathlib import Path

from megatron_llave.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
"""In a clone a link to its folder examples/; in an installed package, the YAML files of that folder."""


def names() -> list[str]:
    """The names of the examples, such as `tiny` and `studies/tiny`."""
    files = EXAMPLES.glob("**/*.yaml")
    found = (file.relative_to(EXAMPLES).with_suffix("").as_posix() for file in files)
    return sorted((name for name in found if not name.startswith("kubernetes/")), key=lambda name: ("/" in name, name))


def complete(**asked: object) -> list[str]:
    """What a shell completes where an example can be named; `asked` is what argcomplete says of the line."""
    return names()


def complete_config(prefix: str, **asked: object) -> list[str]:
    """The same for `--config`, which takes files too."""
    files = importlib.import_module("argcomplete.completers").FilesCompleter()
    return [*names(), *files(prefix)]


def find_config(given: str | Path) -> Path:
    """The file that `--config` means: an existing path, or else the example of that name.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(given)
    if path.is_file() or path.is_absolute():
        return path
    name = path.as_posix().removesuffix(".yaml")
    if name in names():
        return EXAMPLES / f"{name}.yaml"
    if path.exists():
        return path  # a folder, say, which its reader refuses
    near = difflib.get_close_matches(name, names(), 1)
    hint = f"; did you mean the example {near[0]}?" if near else "; `llave config list` names the examples"
    raise ConfigError(f"configuration file {given} does not exist{hint}")


def first_words(name: str) -> str:
    """The first sentence of an example's comment."""
    comment = []
    for line in (EXAMPLES / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("# "):
            break
        comment.append(line[2:])
    return " ".join(comment).partition(". ")[0].partition(": ")[0].rstrip(".:")
