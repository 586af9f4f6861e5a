"""What is taken for a checkpoint and what is not; saving and loading run under tests/distributed and test_train.py."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from megatron_llave.checkpoint.folders import find, newest_usable, read_position, write_manifest
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.config.load import config_from_dict, save_config
from megatron_llave.errors import CheckpointError

STEP = "step-0000003"


def write_checkpoint(folder: Path) -> Path:
    """What `find` looks for."""
    folder.mkdir(parents=True)
    save_config(config_from_dict({"model": {"preset": "tiny"}}), folder / "config.yaml")
    metadata = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "data.json").write_text('{"step": 3, "subsets": {}}')
    write_manifest(folder, 3, {"tensor": 1})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with one checkpoint."""
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoints" / STEP)
    (checkpoint.parent / "latest").write_text(f"{STEP}\n")
    return tmp_path / "run"


def test_run_checkpoints_folder_and_checkpoint_mean_the_same(run: Path) -> None:
    expected = run / "checkpoints" / STEP
    assert [find(run), find(run / "checkpoints"), find(expected)] == [expected] * 3


def change(file: str, text: str):
    return lambda folder: (folder / file).write_text(text)


def edit(file: str, edited):
    """Replace the text of a file by what `edited` makes of it."""
    return lambda folder: (folder / file).write_text(edited((folder / file).read_text()))


def put(file: str, make):
    """Replace a file by what `make` puts in its place."""

    def damage(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return damage


def add_asset(assets: Path) -> None:
    """A tokenizer.json beside a tokenizer.model would be read in its place."""
    assets.mkdir()
    (assets / "tokenizer.json").write_text("{}")


METADATA, MANIFEST, CONFIG = (f"{STEP}/{name}" for name in ("metadata.json", "manifest.json", "config.yaml"))
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "latest").unlink(), "checkpoints/latest"),
        (lambda folder: (folder / "latest").write_bytes(b"\xff\xfe"), "latest is damaged: it names"),
        (change("latest", "a" * 2**20), "latest is damaged: it names"),
        (change("latest", "step-" + "1" * 300), "latest is damaged: it names"),
        (change("latest", "/etc"), "latest is damaged: it names"),
        (change("latest", "step-0000009"), "step-0000009 is neither"),
        (lambda folder: (folder / METADATA).unlink(), "metadata.json"),
        (change(METADATA, "{"), "metadata.json has 1 bytes"),
        (put(METADATA, Path.mkdir), "metadata.json is missing"),
        (put(METADATA, lambda path: path.symlink_to("/dev/zero")), "metadata.json is missing"),
        (change(MANIFEST, "null"), "manifest.json holds a NoneType"),
        (change(MANIFEST, DEEP), "manifest.json is not valid JSON"),
        (edit(MANIFEST, lambda text: text.replace('"files": {', '"files": [{').replace("}", "}]", 1)), "manifest.json"),
        (
            edit(MANIFEST, lambda text: text.replace('"data.json": ', '"../../../../../dev/zero": ')),
            "manifest.json is da",
        ),
        (edit(MANIFEST, lambda text: text.replace('"step": 3', '"step": -3')), "manifest.json is damaged"),
        (
            edit(MANIFEST, lambda text: text.replace('"step": 3', '"step": 99')),
            "manifest.json is damaged: it is of step 99",
        ),
        (
            edit(MANIFEST, lambda text: re.sub(r'"files": {[^}]*}', '"files": {}', text)),
            "is not in manifest.json; remove",
        ),
        (lambda folder: add_asset(folder / STEP / "assets"), "tokenizer.json is not in manifest.json; remove it"),
        (put(MANIFEST, Path.mkdir), "manifest.json cannot be read"),
        (put(MANIFEST, lambda path: None), "manifest.json does not exist"),
        (lambda folder: (folder / CONFIG).unlink(), "config.yaml"),
        (edit(CONFIG, lambda text: text[: text.index("prompt:")]), "config.yaml has .* override its keys"),
        (
            edit(CONFIG, lambda text: text.replace("tiny", "tint", 1)),
            "config.yaml is not what was .* its keys",
        ),
    ],
)
def test_damaged_checkpoint_is_named(run: Path, damage, named: str) -> None:
    damage(run / "checkpoints")
    with pytest.raises(CheckpointError, match=named) as error:
        find(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["null", "[]", '"a"', "{", DEEP, '{"sharded_backend": "zarr"}', '{"a": 1}'])
def test_damage_in_a_checkpoint_without_checksums(run: Path, tmp_path: Path, text: str) -> None:
    """As earlier versions wrote them: the manifest has sizes alone."""
    folder = run / "checkpoints" / STEP
    (folder / "metadata.json").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["metadata.json"] = len(text)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="metadata.json"):
        find(run)


@pytest.mark.parametrize("text", ["{}", '{"step": 3, "subsets": []}', '{"step": 3, "subsets": {"a": 1}}', DEEP, "[]"])
def test_damaged_position_in_the_data(run: Path, text: str) -> None:
    folder = run / "checkpoints" / STEP
    assert read_position(folder) == {"step": 3, "subsets": {}}
    for damaged in (text, '{"step": 1000000000000, "subsets": {}}'):  # which would draw batches for days
        (folder / "data.json").write_text(damaged)
        write_manifest(folder, 3, {"tensor": 1})
        with pytest.raises(CheckpointError, match="data.json"):
            read_position(folder)


def test_weights_alone_need_no_manifest_but_a_whole_configuration(tmp_path: Path) -> None:
    """As `convert_hf.py import` and `merge.py` wrote them before."""
    folder = write_checkpoint(tmp_path / "converted")
    for name in ("manifest.json", "data.json"):
        (folder / name).unlink()
    assert find(folder) == folder
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text[: text.index("prompt:")])
    with pytest.raises(CheckpointError, match="config.yaml is damaged: it is cut before loss"):
        find(folder)


def test_next_older_checkpoint_is_resumed(run: Path) -> None:
    older, said = run / "checkpoints" / STEP, []
    newer = Path(shutil.copytree(older, older.with_name("step-0000005")))
    text = (newer / "config.yaml").read_text()
    (newer / "config.yaml").write_text(text.replace("tiny", "tint", 1))
    assert newest_usable(run, said.append) == older
    assert len(said) == 1 and "config.yaml is not what was written" in said[0]


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 5000, "nul\0", "\ud800"])
def test_a_name_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist; ") as error:
        find_pretrained(name)
    assert len(str(error.value)) < 2100 and os.linesep not in str(error.value)
