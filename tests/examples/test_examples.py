"""The launch files, and what starts them: bash, torchrun on one node and two.

A launch file is bash and Python at once; each of the three ways to start it runs the same.
"""

import json
import re
import shlex
import signal
import socket
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from forking import run_script
from launching import BATCH_FILE, EXAMPLES, LIMIT, environment, free_port, losses, started, state, stub_clone, wait_for
from run_ranks import run_command

from examples.launch import config_file
from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed.layout import validate_batch, validate_layout
from megatron_llave.launch import start as launcher
from megatron_llave.training import fault_tolerance, run_state

pytestmark = pytest.mark.long

LAUNCH_FILES = sorted(EXAMPLES.glob("pretrain_*.sh"))
TINY, LARGE = EXAMPLES / "pretrain_llave_tiny.sh", EXAMPLES / "pretrain_llave_7b.sh"
RELEASED = ("0.5b", "2b", "7b")
QWEN_VL = ("qwen2vl_2b", "qwen2vl_7b", "qwen3vl_2b", "qwen3vl_8b")
WAYS = {
    "bash": ["bash"],
    "torchrun": ["torchrun", "--nproc-per-node", "2"],
    "torchrun_no_python": ["torchrun", "--no-python", "--nproc-per-node", "2"],
}


def launch(way: str, file: Path, *overrides: str, **env: str) -> str:
    """Start `file` as a user would."""
    return run_command([*WAYS[way], str(file), *overrides], env=environment(**env), timeout=LIMIT)


# ---- the launch files ----


@pytest.mark.parametrize("file", [*LAUNCH_FILES, *BATCH_FILE.parent.glob("*.sbatch")], ids=lambda file: file.stem)
def test_file_is_bash(file: Path) -> None:
    assert file.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(file)], check=True)


def test_launch_files_differ_in_their_first_comment_alone() -> None:
    llave = {f"pretrain_llave_{name}" for name in ("tiny", *RELEASED)}
    assert {file.stem for file in LAUNCH_FILES} == llave | {f"pretrain_{name}" for name in QWEN_VL}
    code = set()
    for file in LAUNCH_FILES:
        text = file.read_text()
        compile(text, str(file), "exec")
        name = file.stem.removeprefix("pretrain_").removeprefix("llave_")
        assert text.count(file.name) == 3 and f"{name}.yaml" in text, "the comment names itself and its configuration"
        code.add("\n".join(line for line in text.splitlines() if not line.startswith("# ")))
    assert len(code) == 1


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return stub_clone(tmp_path / "a clone")


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_gets_the_same_arguments(
    clone: Path, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--resume", "auto", "train.steps=3", "train.output=with space"]
    launch(way, Path("a clone/examples") / TINY.name, *arguments, OMP_NUM_THREADS="3")
    expected = {
        "argv": ["--config", str(clone / "examples" / "tiny.yaml"), *arguments],
        "child": 0,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "3",
    }
    for rank in (0, 1):
        assert json.loads((clone / "megatron_llave" / f"rank{rank}.json").read_text()) == expected
    assert len(list((clone / "megatron_llave").glob("rank*.json"))) == 2


def test_procs_and_several_nodes(clone: Path, tmp_path: Path) -> None:
    file = clone / "examples" / TINY.name
    launch("bash", file, PROCS="1", PET_LOG_DIR=str(tmp_path / "logs"))
    [log] = (tmp_path / "logs").glob(f"*-{socket.gethostname()}/*/attempt_0/0/stdout.log")
    assert log.read_text() == "child\n"
    assert json.loads((clone / "megatron_llave" / "rank0.json").read_text())["WORLD_SIZE"] == "1"
    with pytest.raises(AssertionError, match="error: NODE_RANK must be set"):
        launch("bash", file, NNODES="2")
    with pytest.raises(AssertionError, match="error: PROCS=two must be a whole number"):
        launch("bash", file, PROCS="two")
    nodes = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "PROCS": "1"}
    with started(["bash", str(file)], tmp_path / "second", NODE_RANK="1", **nodes) as second:
        launch("bash", file, NODE_RANK="0", **nodes)
        assert second.wait(LIMIT) == 0
    for rank in (0, 1):
        report = json.loads((clone / "megatron_llave" / f"rank{rank}.json").read_text())
        assert report["WORLD_SIZE"] == "2"


def test_adapters_of_the_demo_start_from_other_tasks(openmoji_data: Path, tmp_path: Path) -> None:
    start, lora = EXAMPLES / "studies" / "tiny_start.yaml", EXAMPLES / "tiny_lora.yaml"
    cfg = load_config(lora)
    assert cfg.checkpoint.init == f"runs/{start.stem}", "where `make demo` trains it"
    assert cfg.data.subsets.keys().isdisjoint(load_config(start).data.subsets)
    assert set(cfg.evaluate.sets) == cfg.data.subsets.keys()
    for file, init in ((start, "null"), (lora, tmp_path / start.stem)):
        settings = [f"data.path={openmoji_data}", f"train.output={tmp_path / file.stem}", "train.global_batch_size=4"]
        settings += [f"checkpoint.init={init}", "train.steps=2", "data.workers=0"]
        done = run_script(TINY, "--config", file, *settings)
        assert done.returncode == 0, done.stderr[-5000:]
        assert list(losses(tmp_path / file.stem)) == [1, 2]
    base = json.loads((tmp_path / lora.stem / "assets" / "base.json").read_text())
    assert str(tmp_path / start.stem) in str(base)


# ---- what starts them ----


def test_names_and_numbers_are_those_of_the_package() -> None:
    assert launcher.EXIT_STOPPED == fault_tolerance.EXIT_STOPPED
    assert launcher.DEFAULT_OUTPUT == RunConfig().train.output
    assert (fault_tolerance.STOP_FILE, run_state.STATE_FILE) == ("stop", "state.json")


def test_folder_of_the_run_is_found_as_training_finds_it(tmp_path: Path) -> None:
    def folder(*arguments: str) -> str:
        return str(launcher.run_folder(config_file(str(LARGE)), list(arguments)))

    other = tmp_path / "other.yaml"
    other.write_text("model: {preset: tiny}\n")
    assert folder("--resume", "auto", "loss.alpha=1") == load_config(EXAMPLES / "7b.yaml").train.output
    assert folder("train.output=a", "--resume", "auto", "train.output=b c") == "b c"
    for text in ("1e3", "010", "12:30:45", '"a b"', "a # b"):
        assert (
            folder(f"train.output={text}") == load_config(EXAMPLES / "tiny.yaml", [f"train.output={text}"]).train.output
        )
    assert folder("--config", str(other)) == launcher.DEFAULT_OUTPUT


@pytest.mark.slow
def test_asked_to_end_it_saves_and_ends_with_status_75(openmoji_data: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    arguments = [f"data.path={openmoji_data}", f"train.output={run}", "--resume", "auto", "data.workers=0"]
    arguments += ["train.global_batch_size=8"]
    with started(["bash", str(TINY), *arguments, "train.steps=1000000"], output) as process:
        wait_for(lambda: len(losses(run)) > 0, process, output)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == fault_tolerance.EXIT_STOPPED, output.read_text()[-5000:]
    stopped = state(run)
    assert (stopped["state"], stopped["reason"]) == ("stopped", "a file 'stop' in train.output")
    assert [folder.name for folder in (run / "checkpoints").glob("step-*")] == [f"step-{stopped['step']:07d}"]


def test_a_late_request_does_not_end_it_by_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> int:
        signal.raise_signal(signal.SIGTERM)  # the launcher makes the stop file, and will again after two seconds
        return 0

    (tmp_path / "state.json").write_text('{"state": "stopped"}')
    for name in ("PROCS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=wait))
    held = {number: signal.getsignal(number) for number in (*launcher.ASKING, signal.SIGHUP, signal.SIGQUIT)}
    try:
        status = launcher.start_training(["file"], EXAMPLES / "tiny.yaml", [f"train.output={tmp_path}"])
        assert status == launcher.EXIT_STOPPED
        assert signal.alarm(0) > 0 and (tmp_path / "stop").exists()
        assert {signal.getsignal(number) for number in held} == {signal.SIG_IGN}
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


# ---- the released sizes ----


@pytest.mark.parametrize("name", [*RELEASED, *QWEN_VL])
def test_recipe_is_the_papers(name: str) -> None:
    cfg = load_config(EXAMPLES / f"{name}.yaml")
    assert (cfg.model.preset, cfg.model.precision, cfg.model.kernels) == (name, "bf16", "transformer_engine")
    grids = [[1, 1], [1, 2], [2, 1], [2, 2]] if name in RELEASED else []
    assert cfg.model.freeze == ["vision"] and cfg.model.image_grids == grids
    assert (cfg.loss.temperature, cfg.loss.alpha, cfg.loss.negatives) == (0.02, 9, "global_batch")
    assert (cfg.train.global_batch_size, cfg.train.epochs, cfg.train.steps) == (256, 1, 0)
    optimizer = cfg.optimizer
    assert (
        optimizer.learning_rate == (5e-6 if name.endswith(("7b", "8b")) else 1e-5) and optimizer.min_learning_rate == 0
    )
    assert (optimizer.warmup_fraction, optimizer.weight_decay) == (0.03, 0)
    assert (cfg.data.max_length, cfg.data.prompt) == (4096, "qwen")
    assert "--limit 50000" in (EXAMPLES / f"{name}.yaml").read_text()
    assert cfg.checkpoint.init, "from random weights nothing would be learned"


def large_memory_overrides(name: str) -> list[str]:
    """What the file says to change on GPUs with 141 GB."""
    return re.search(r"For 141 GB use:\n# +(.+)\n", (EXAMPLES / f"{name}.yaml").read_text())[1].split()


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("name", [*RELEASED, *QWEN_VL])
def test_sizes_work_on_nodes_of_eight(name: str, nodes: int) -> None:
    for overrides in ([], large_memory_overrides(name)):
        cfg = load_config(EXAMPLES / f"{name}.yaml", overrides)
        validate_batch(cfg, validate_layout(cfg.model, cfg.parallel, 8 * nodes))
        assert cfg.parallel.sequence == (cfg.parallel.tensor > 1)


SHRUNK = [
    *("model.vision.hidden_size=32", "model.vision.num_layers=2", "model.vision.num_heads=4"),
    *("model.vision.ffn_hidden_size=64", "model.vision.image_size=28", "model.language.hidden_size=64"),
    *("model.language.num_layers=2", "model.language.num_heads=4", "model.language.num_kv_heads=2"),
    *("model.language.ffn_hidden_size=128", "model.language.vocab_size=1200", "model.kernels=local"),
    *("model.precision=fp32", "checkpoint.init=null", "train.steps=4", "train.global_batch_size=8"),
    *("checkpoint.interval=1", "data.workers=0"),
]


@pytest.mark.slow
def test_literal_torchrun_on_two_nodes_and_on_one_through_a_failure(openmoji_data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [str(LARGE), f"data.path={openmoji_data}", *SHRUNK]
    options = f"--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:{free_port()}"
    command = ["torchrun", *shlex.split(options), *arguments, f"train.output={two}"]
    with started(command, tmp_path / "node0") as first, started(command, tmp_path / "node1") as second:
        for process, output in zip((first, second), (tmp_path / "node0", tmp_path / "node1")):
            assert process.wait(LIMIT) == 0, output.read_text()[-5000:]
    cfg = load_config(two / "config.yaml")
    assert (cfg.parallel.tensor, cfg.parallel.sequence, cfg.model.freeze) == (2, True, ["vision"])

    output = tmp_path / "output"
    command = ["torchrun", "--nproc-per-node", "2", "--max-restarts", "1", *arguments, f"train.output={one}"]
    with started(command, output) as process:
        wait_for(lambda: (one / "checkpoints" / "latest").is_file(), process, output)
        max(psutil.Process(process.pid).children(), key=lambda child: child.pid).kill()
        assert process.wait(LIMIT) == 0, output.read_text()[-5000:]
    assert "resuming from" in output.read_text()
    assert state(one)["state"] == state(two)["state"] == "finished"
    assert list(losses(two)) == [1, 2, 3, 4]
    assert losses(one) == {step: pytest.approx(loss, rel=1e-5) for step, loss in losses(two).items()}


def test_wrong_setting_is_one_line_of_one_start(tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = ["checkpoint.init=nowhere", f"train.output={tmp_path / 'run'}"]
    with started(["bash", str(LARGE), *arguments], output, PET_MAX_RESTARTS="3") as process:
        assert process.wait(LIMIT) == 2
    hint = "name a checkpoint, an output directory or a Hugging Face folder"
    assert output.read_text().splitlines() == [f"error: nowhere does not exist; {hint}"]
    assert not (tmp_path / "run").exists()
