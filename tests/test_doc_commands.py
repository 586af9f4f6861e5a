"""Every command of the guides is run, here or by another test, or is marked with what it needs."""

import ast
import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from doc_commands import (
    ELSEWHERE,
    GUIDES,
    PAGES_ELSEWHERE,
    PRELUDE,
    PYTHON_ELSEWHERE,
    ROOT,
    Block,
    blocks_of,
    can_run,
    elsewhere,
    guide_blocks,
    name_of,
    python_elsewhere,
    run_command,
)
from forking import run_script
from golden_model import ONEVISION, byte_tokenizer
from launching import data_with_few_sets
from PIL import Image

FIRST = {
    command: page
    for page in reversed(GUIDES)
    for block in guide_blocks(page)
    if not block.needs
    for command in block.commands()
}
"""The first page that has a command, which runs it."""


def left_over(block: Block) -> list[str]:
    """The commands of a block that are neither run nor marked."""
    return [] if block.needs else [c for c in block.commands() if not elsewhere(c) and not can_run(c)]


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_are_run_or_marked(page: Path) -> None:
    assert [f"{block.where}: {command}" for block in guide_blocks(page) for command in left_over(block)] == []


def test_a_command_that_nothing_runs_and_an_unknown_mark_are_noticed() -> None:
    page = "```bash\nmake demo\n# a remark\npython tools/x.py a \\\n  b   # twice\nkubectl x\n```\n"
    [block] = blocks_of(page, "page")
    assert block.commands() == ["make demo", "python tools/x.py a b", "kubectl x"] and left_over(block) == ["kubectl x"]
    [block] = blocks_of('text\n```bash title="Needs GPUs and a download"\nkubectl x\n```\n', "page")
    assert block.needs == ("GPUs", "a download") and block.where == "page:2" and left_over(block) == []
    for fence in ('```bash title="Needs luck"', "```\n", "```fish", '```bash title="GPUs"'):
        with pytest.raises(AssertionError, match="page:1: "):
            list(blocks_of(f"{fence}\nls\n```\n", "page"))


def test_the_tests_elsewhere_are_there() -> None:
    named = [*ELSEWHERE.values(), *PYTHON_ELSEWHERE.values()]
    named += [(test, [Path(page).name]) for page, test in PAGES_ELSEWHERE.items()]
    for test, words in named:
        file, function = test.split("::")
        text = (ROOT / file).read_text()
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.walk(ast.parse(text)))
        assert all(word in text for word in words), test
    used = {command for page in GUIDES for block in guide_blocks(page) for command in block.commands()}
    assert {elsewhere(command) for command in used} >= {test for test, _ in ELSEWHERE.values()}, "one is not used"


# ---- running them ----


class Shelf:
    """What the commands of a page find: small data, runs of a few steps, files. Each is made once, when asked for."""

    def __init__(self, root: Path, openmoji: Callable[[], Path]) -> None:
        self.root, self.openmoji = root, openmoji

    def put(self, things: dict[str, str], folder: Path) -> None:
        """Copy things into a folder under the names by which a page calls them."""
        for name, thing in things.items():
            source = self.get(thing)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, folder / name, **({"symlinks": True} if source.is_dir() else {}))

    def get(self, thing: str) -> Path:
        """The thing's only copy, which must not be changed."""
        if not (self.root / thing).exists():
            getattr(self, f"make_{thing}")(self.root / thing)
        return self.root / thing

    def make_data(self, out: Path) -> None:
        data_with_few_sets(self.openmoji(), out, "group")

    def make_photos(self, out: Path) -> None:
        out.mkdir()
        for number in range(24):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(out / f"{number}.png")
            (out / f"{number}.txt").write_text(f"noise number {number}")

    def make_image(self, out: Path) -> None:
        Image.new("RGB", (30, 20), "red").save(out, format="PNG")

    def make_vectors(self, out: Path) -> None:
        with out.open("wb") as file:
            np.save(file, np.ones((1, 2), np.float32))

    def make_list(self, out: Path) -> None:
        with out.open("w", newline="") as file:
            csv.writer(file).writerows([["filepath", "title"], *([f"photos/{n}.png", f"noise {n}"] for n in range(24))])

    def make_pairs(self, out: Path) -> None:
        rows = [{"query": {"text": f"noise {n}"}, "target": {"image": f"photos/{n}.png"}} for n in range(24)]
        out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def make_items(self, out: Path) -> None:
        out.write_text("".join(f"{json.dumps({'id': str(n), 'text': f'noise {n}'})}\n" for n in range(4)))

    def make_judgements(self, out: Path) -> None:
        out.write_text("".join(f"{n} 0 {n} 1\n" for n in range(4)))

    def make_own(self, out: Path) -> None:
        run_command(f"python tools/prepare_data.py folder --source {self.get('photos')} --out {out}")

    def make_tiny(self, out: Path) -> None:
        run_command(f"bash examples/pretrain_llave_tiny.sh data.path={self.get('data')} train.output={out}")

    def make_hf(self, out: Path) -> None:
        shutil.copytree(ONEVISION, out)
        byte_tokenizer(out)

    def make_trained(self, out: Path, *more: str) -> None:
        """A run from a Hugging Face folder, which can be exported."""
        given = [f"checkpoint.init={self.get('hf')}", f"data.path={self.get('own')}", "model.preset=null", *more]
        start = "bash examples/pretrain_llave_tiny.sh --config examples/own_data.yaml"
        run_command(" ".join([start, f"train.output={out}", *given]))

    def make_adapters(self, out: Path) -> None:
        self.make_trained(out, "lora.rank=2")

    def make_adapter(self, out: Path) -> None:
        run_command(f"python tools/convert_hf.py export --from {self.get('adapters')} --to {out} --adapter")


GIVEN = {
    # The things of the shelf that a page takes for granted.
    "README.md": {"runs/openmoji": "data"},
    "CONTRIBUTING.md": {"runs/openmoji": "data"},
    "docs/contrastive_step.md": {"runs/openmoji": "data"},
    "docs/conversion.md": {"HF_DIR": "hf", "runs/mine": "trained", "ADAPTER_DIR": "adapter"},
    "docs/data.md": {"photos": "photos", "list.csv": "list", "pairs.jsonl": "pairs"},
    "docs/evaluation.md": {
        "runs/openmoji": "data",
        "CKPT": "tiny",
        "Q.jsonl": "items",
        "C.jsonl": "items",
        "QRELS": "judgements",
    },
    "docs/getting_started.md": {"runs/llave_7b": "tiny", "runs/another": "tiny"},
    "docs/lora.md": {
        "runs/lora": "adapters",
        "runs/retrieval": "adapters",
        "runs/vqa": "adapters",
        "HF_DIR": "hf",
    },
    "docs/mining.md": {"CKPT": "tiny", "data/own": "own"},
    "docs/python.md": {"CKPT": "tiny", "cat.jpg": "image", "dog.jpg": "image", "inputs.jsonl": "items"},
    "docs/quickstart.md": {"runs/openmoji": "data"},
    "docs/recipes.md": {
        "photos": "photos",
        "pairs.jsonl": "pairs",
        "runs/openmoji": "data",
        "runs/openmoji-hard": "data",
        "runs/judge": "tiny",
        "runs/retrieval": "tiny",
        "runs/vqa": "tiny",
        "runs/mine": "trained",
    },
    "docs/running.md": {"runs/openmoji": "data"},
    "docs/search.md": {"runs/own": "tiny", "photos": "photos"},
    "docs/studies.md": {"runs/openmoji": "data", "runs/judges/larger.npy": "vectors"},
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Shelf]:
    """The shelf of all pages."""
    yield Shelf(tmp_path_factory.mktemp("shelf"), lambda: request.getfixturevalue("openmoji_data"))


def to_run(page: Path) -> list[Block]:
    """The blocks of a page whose commands or lines of Python are run here."""
    blocks = [] if name_of(page) in PAGES_ELSEWHERE else guide_blocks(page)
    return [block for block in blocks if block.language in ("bash", "python") and not block.needs]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in GUIDES if to_run(page)], ids=name_of)
def test_commands_run(page: Path, shelf: Shelf, tmp_path: Path) -> None:
    shelf.put(GIVEN.get(name_of(page), {}), tmp_path)
    code = PRELUDE
    for block in to_run(page):
        for command in block.commands():
            if not elsewhere(command) and FIRST[command] == page:
                run_command(command)
        if block.language == "python" and not python_elsewhere(block.text):
            code += block.text  # a block may use the names of those before it
    if code != PRELUDE:
        (tmp_path / "snippet.py").write_text(code)
        done = run_script(tmp_path / "snippet.py")
        assert done.returncode == 0, done.stderr[-5000:]
