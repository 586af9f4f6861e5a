"""The launch file is bash and Python at once: each of the three ways to start it trains, and trains the same."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from run_ranks import run_command

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_FILES = sorted((ROOT / "examples").rglob("*.sh"))
TINY = ROOT / "examples" / "pretrain_llave_tiny.sh"
WAYS = {
    "bash": ["bash"],
    "torchrun": ["torchrun", "--nproc-per-node", "2"],
    "torchrun_no_python": ["torchrun", "--no-python", "--nproc-per-node", "2"],
}

# Stands in for the package: writes what each rank was given, and starts a child which imports the launch file again.
STUB = """
import json
import multiprocessing
import os
from pathlib import Path

def main(argv):
    child = multiprocessing.get_context("spawn").Process(target=print, args=("child",))
    child.start()
    child.join()
    names = ("WORLD_SIZE", "OMP_NUM_THREADS")
    report = {"argv": argv, "child": child.exitcode, **{n: os.environ[n] for n in names}}
    Path(__file__).with_name(f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))
"""


def launch(way: str, file: Path, *overrides: str, **env: str) -> str:
    """Start `file` as a user would, with the interpreter of these tests first on the path."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # PET_MASTER_PORT is torchrun's own --master-port: two test runs on one machine must not meet at its default.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    full_env = {"PATH": path, "PROCS": "2", "PET_MASTER_PORT": port, **env}
    return run_command([*WAYS[way], str(file), *overrides], env=full_env)


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_launch_file_is_bash_and_python(file: Path) -> None:
    assert file.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(file)], check=True)
    if file.name.startswith("pretrain_"):
        compile(file.read_text(), str(file), "exec")


@pytest.fixture
def stub_clone(tmp_path: Path) -> Path:
    """A clone that holds the launch file and a package which only notes how it was called."""
    folder = tmp_path / "a clone"
    (folder / "examples").mkdir(parents=True)
    (folder / "megatron_llave").mkdir()
    (folder / "megatron_llave" / "__init__.py").touch()
    (folder / "megatron_llave" / "train.py").write_text(STUB)
    shutil.copy(TINY, folder / "examples")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_gets_the_same_arguments(stub_clone: Path, way: str) -> None:
    launch(way, stub_clone / "examples" / TINY.name, "train.steps=3", "train.output=with space", OMP_NUM_THREADS="3")
    expected = {
        "argv": ["--config", str(stub_clone / "examples" / "tiny.yaml"), "train.steps=3", "train.output=with space"],
        "child": 0,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "3",
    }
    for rank in (0, 1):
        assert json.loads((stub_clone / "megatron_llave" / f"rank{rank}.json").read_text()) == expected
    assert len(list((stub_clone / "megatron_llave").glob("rank*.json"))) == 2


def test_procs_and_several_nodes(stub_clone: Path) -> None:
    file = stub_clone / "examples" / TINY.name
    launch("bash", file, PROCS="1")
    assert json.loads((stub_clone / "megatron_llave" / "rank0.json").read_text())["WORLD_SIZE"] == "1"
    with pytest.raises(AssertionError, match="NODE_RANK: must be set"):
        launch("bash", file, NNODES="2")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        nodes = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "PROCS": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, **nodes, "PATH": path}
    second = subprocess.Popen(["bash", str(file)], env={**env, "NODE_RANK": "1"})
    try:
        launch("bash", file, **nodes, NODE_RANK="0")
        assert second.wait(60) == 0
    finally:
        second.kill()
    for rank in (0, 1):
        report = json.loads((stub_clone / "megatron_llave" / f"rank{rank}.json").read_text())
        assert report["WORLD_SIZE"] == "2"


def test_all_three_ways_train_the_same(openmoji_data: Path, tmp_path: Path) -> None:
    losses = {}
    for way in WAYS:
        sizes = ["train.steps=2", "train.global_batch_size=8"]
        launch(way, TINY, f"data.path={openmoji_data}", f"train.output={tmp_path / way}", *sizes)
        records = [json.loads(line) for line in (tmp_path / way / "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2]
        losses[way] = [record["loss"] for record in records]
    assert losses["bash"] == losses["torchrun"] == losses["torchrun_no_python"]
    assert len(set(losses["bash"])) == 2 and all(loss > 0 for loss in losses["bash"])


def test_mistake_on_the_command_line_ends_with_one_line(openmoji_data: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"error: unknown key train.step .*did you mean train.steps\?"):
        launch("bash", TINY, f"data.path={openmoji_data}", f"train.output={tmp_path}", "train.step=3")
