"""The console command: its table, what it says about a mistyped word, completion, and what it does not load."""

import ast
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import EXAMPLES, LIMIT, data_with_few_sets, environment, losses, started, state, wait_for

from megatron_llave import __main__ as console
from megatron_llave import __version__, errors
from megatron_llave.commands import completion, train
from megatron_llave.config.load import load_config
from megatron_llave.config.packaged import find_config, first_words, names
from megatron_llave.errors import ConfigError
from megatron_llave.launch import procs, start
from megatron_llave.launch.quiet_torchrun import cause
from megatron_llave.options.study import NAMES
from megatron_llave.processes import without_garbage_collection
from megatron_llave.study.variants import STUDIES

ROOT = Path(__file__).resolve().parents[1]
HEAVY = [
    "torch",
    "numpy",
    "omegaconf",
    "scipy",
    "matplotlib",
    "pyarrow",
    "PIL",
    "rich",
    "transformers",
    "megatron.core",
]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/llave", *words])
    return console.main()


def test_the_table_has_every_command() -> None:
    modules = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "megatron_llave" / "commands").glob("*.py")}
    functions = {
        name: {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} for name, tree in modules.items()
    }
    assert {name for name, found in functions.items() if "main" in found} == set(console.COMMANDS)
    assert {name.split()[0] for name in console.RANKED} < set(console.COMMANDS)
    options = {path.stem for path in (ROOT / "megatron_llave" / "options").glob("*.py")} - {"__init__"}
    assert options == set(console.COMMANDS) - {"config", "completion"}  # which load nothing that takes long
    assert set(NAMES) == set(STUDIES)
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"config_docs"}
    assert {{"convert_hf": "convert", "prepare_data": "prepare"}.get(tool, tool) for tool in tools} < set(
        console.COMMANDS
    )


def test_help_version_and_mistyped_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit, match="0"):
            run(monkeypatch, *words)
        printed = capsys.readouterr().out
        assert all(f"  {name} " in printed and about in printed for name, about in console.COMMANDS.items())
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "--version")
    assert capsys.readouterr().out == f"megatron_llave {__version__}\n"
    assert run(monkeypatch, "trian") == 2
    assert capsys.readouterr().err == "error: 'trian' is not a command of llave; did you mean train?\n"
    assert run(monkeypatch, "xyz") == 2
    assert capsys.readouterr().err.startswith(
        "error: 'xyz' is not a command of llave; the commands are train, prepare,"
    )
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "train", "--config")
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "train", "--help")
    assert "usage: llave train [-h] --config" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_RANK", "1")  # where torchrun starts a command, the ranks say what is wrong
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    for argv in (["--help"], ["--nonsense"]):
        with pytest.raises(SystemExit):
            errors.OneLineParser().parse_args(argv)
    assert capsys.readouterr() == ("", "")


LOADS_NONE_OF = """
import sys
from contextlib import suppress
from megatron_llave.__main__ import main
for words in {lines}:
    sys.argv = ["llave", *words]
    with suppress(SystemExit):
        main()
print([name for name in {names} if name in sys.modules], file=sys.stderr)
"""


def test_help_loads_no_library_that_takes_long() -> None:
    """The names are a steadier check than the time, 0.1 s; the commands with options of their own are quick too."""
    options = sorted(path.stem for path in (ROOT / "megatron_llave" / "options").glob("[a-z]*.py"))
    lines = [["--help"], ["--version"], ["config", "list"], *([name, "--help"] for name in options)]
    source = LOADS_NONE_OF.format(lines=lines, names=HEAVY)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.stderr == "[]\n" and done.stdout.count("usage: llave") == 1 + len(options)


NOT_FOR_EMBEDDING = ["scipy", "matplotlib", "pyarrow", "pandas", "rich", "transformers", "datasets", "huggingface_hub"]
NOT_FOR_EMBEDDING += ["mteb", "sentence_transformers", "tensorboard", "wandb", "mlflow", "av", "torchvision"]
NOT_FOR_EMBEDDING += [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "megatron_llave.evaluation",
    "megatron_llave.report",
]


def test_embedding_loads_no_library_that_it_does_not_need() -> None:
    source = "import gc, sys, megatron_llave.embedding\nassert gc.isenabled() and gc.get_freeze_count() == 0\n"
    source += f"print([name for name in {NOT_FOR_EMBEDDING} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_collector_is_paused_and_does_not_go_through_all_that_is_new_afterwards() -> None:
    gc.collect()
    frozen, collections = gc.get_freeze_count(), []

    def note(phase: str, info: dict) -> None:
        collections.append(info)

    gc.callbacks.append(note)
    try:
        with without_garbage_collection():
            assert not gc.isenabled()
            kept = [[number] for number in range(5000)]
        few = [[] for _ in range(10)]
    finally:
        gc.callbacks.remove(note)
    assert collections == [] and gc.isenabled() and len(kept) == 5000 and len(few) == 10
    assert (gc.get_freeze_count() == 0) == (frozen == 0)
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


# ---- completion ----


@pytest.fixture
def llave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console command as an installed package has it."""
    file = tmp_path / "bin" / "llave"
    file.parent.mkdir()
    file.write_text(f"#!{sys.executable}\nimport sys\nfrom megatron_llave.__main__ import main\nsys.exit(main())\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(file.parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_bash_completes_commands_options_and_examples(llave: None) -> None:
    lines = {
        "llave tra": "train",
        "llave train --re": "--resume",
        "llave embed --checkpoint x --sk": "--skip-bad",
        "llave config ": "list show",
        "llave config show studies/tiny_fi": "studies/tiny_finetune",
        "llave train --config studies/tiny_fi": "studies/tiny_finetune",
        "llave plan --config examples/kub": "examples/kubernetes/",
    }
    script = 'eval "$(llave completion bash)"; while read -r COMP_LINE; do COMP_POINT=${#COMP_LINE}; '
    script += '_python_argcomplete llave; echo "${COMPREPLY[@]}"; done'
    given = "".join(f"{line}\n" for line in lines)
    command = ["bash", "-c", f"IFS=; {script}"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == list(lines.values()), done.stderr


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    completion.main([shell])
    assert "llave" in capsys.readouterr().out


def test_completion_without_argcomplete_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(SystemExit, match="2"):
        completion.main(["zsh"])
    assert capsys.readouterr().err == "error: completion needs argcomplete: pip install argcomplete\n"


# ---- example configurations ----


def test_each_example_has_a_name_and_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [*(ROOT / "examples").glob("*.yaml"), *(ROOT / "examples" / "studies").glob("*.yaml")]
    assert {ROOT / "examples" / f"{name}.yaml" for name in names()} == set(files)
    run(monkeypatch, "config", "list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names() and all(first_words(name) for name in names())
    run(monkeypatch, "config", "show", "studies/tiny")
    assert capsys.readouterr().out == (ROOT / "examples" / "studies" / "tiny.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    for given in ("tiny", "tiny.yaml", EXAMPLES / "tiny.yaml"):
        assert load_config(given) == load_config(ROOT / "examples" / "tiny.yaml")
    Path("tiny").mkdir()
    assert find_config("tiny").resolve() == EXAMPLES / "tiny.yaml", "a folder of that name is no configuration"
    Path("tiny.yaml").write_text("model: {preset: tiny}\ntrain: {seed: 7}\n")
    assert load_config("tiny.yaml").train.seed == 7, "a file of one's own comes first"
    with pytest.raises(ConfigError, match="configuration file tinny does not exist; did you mean the example tiny"):
        load_config("tinny")
    with pytest.raises(ConfigError, match="zzz.yaml does not exist; `llave config list` names the examples"):
        load_config("zzz.yaml")


# ---- processes ----


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """What `llave` starts on several processes: their number, and the command."""
    calls: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(start, "start_ranks", lambda command, number: calls.append((number, command)) or 7)
    monkeypatch.delenv("PROCS", raising=False)
    monkeypatch.setenv("PATH", "")  # nvidia-smi is not there
    return calls


def test_processes_are_those_asked_for(monkeypatch: pytest.MonkeyPatch, started_with: list) -> None:
    command = ["embed", "--checkpoint", "c", "--text", "t"]
    assert run(monkeypatch, *command, "--procs", "3") == 7
    assert started_with.pop() == (3, [str(start.RANK), *command, "--procs", "3"])
    monkeypatch.setenv("PROCS", "2")
    assert run(monkeypatch, *command) == 7 and started_with.pop()[0] == 2
    monkeypatch.delenv("PROCS")
    assert run(monkeypatch, "preflight", "--config", "tiny") == 7 and started_with.pop()[0] == 2
    build = ["search", "build", "--checkpoint", "c", "--pictures", "p", "--out", "i", "--procs", "4"]
    assert run(monkeypatch, *build) == 7 and started_with.pop() == (4, [str(start.RANK), *build])
    monkeypatch.setenv("NNODES", "2")
    command = ["evaluate", "prepared", "--checkpoint", "c", "--data", "d"]
    assert run(monkeypatch, *command) == 7 and started_with.pop()[0] == 1


@pytest.mark.parametrize("words", [["--text", "t"], ["--jsonl", "f", "--procs", "1"]])
def test_a_single_process_is_this_one(monkeypatch: pytest.MonkeyPatch, started_with: list, words: list[str]) -> None:
    for name in ("LOCAL_RANK", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    module = SimpleNamespace(main=lambda argv: argv)
    monkeypatch.setattr(console.importlib, "import_module", lambda name: module if "commands" in name else procs)
    monkeypatch.setattr(console, "options_of", lambda name: None)
    assert run(monkeypatch, "embed", *words) == words and started_with == []
    monkeypatch.setenv("PROCS", "2")  # for the builds of an index, and not for its page
    assert run(monkeypatch, "search", "serve", "index") == ["serve", "index"] and started_with == []


def test_ctrl_c_while_a_command_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(console.importlib, "import_module", interrupted)
    monkeypatch.setattr(console, "options_of", lambda name: None)
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, "plot", "runs/a")
    assert capsys.readouterr().err == "interrupted by Ctrl-C\n"


def test_procs_are_a_number_and_as_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--procs 0 must be at least 1 and at most 1024"):
        procs.asked_for(["--procs", "0"], True, 1)
    assert procs.asked_for(["--jsonl", "x", "--procs=5", "a.b=c"], True, 1) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    procs.require_as_started(4)
    procs.require_as_started(None)
    started: list[object] = []
    monkeypatch.setattr(train, "start_training", lambda *given: started.extend(given) or 75)
    assert train.main(["--config", "tiny", "a.b=c", "--procs", "3", "--resume", "auto"]) == 75
    arguments = ["--config", str(find_config("tiny")), "--resume", "auto", "a.b=c"]
    assert started == [[str(start.RANK), "train", *arguments], find_config("tiny"), arguments, 3]
    with pytest.raises(ConfigError, match="--procs 2, but 4 .* the command `llave` starts"):
        procs.require_as_started(2)


def test_the_cause_is_not_a_rank_that_torchrun_has_ended() -> None:
    failures = {0: SimpleNamespace(exitcode=2, timestamp=11), 1: SimpleNamespace(exitcode=-15, timestamp=10)}
    assert cause(failures)[0] == 0
    failures[2] = SimpleNamespace(exitcode=-9, timestamp=9)
    assert cause(failures)[0] == 2
    assert cause({1: failures[1]})[0] == 1


# ---- the package as it is installed ----


@pytest.mark.slow
def test_the_built_wheel_does_it_all_from_an_empty_folder(
    openmoji_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built, installed and started as a user does, but for the packages that it depends on, which are there."""
    source, site, empty = (tmp_path / name for name in ("source", "site", "empty"))
    for folder in (source, empty):
        folder.mkdir()
    for name in ("megatron_llave", "examples"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    # The wheel is built from the archive of the sources, as the package's users may do.
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", source], check=True, capture_output=True)
    [wheel] = (source / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    shutil.rmtree(source)
    assert (site / "megatron_llave" / "py.typed").is_file()
    monkeypatch.chdir(empty)
    monkeypatch.setenv("PYTHONPATH", str(site))

    def llave(*words: str) -> str:
        command = [sys.executable, str(site / "bin" / "llave"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=os.environ | environment())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert llave("--version") == f"megatron_llave {__version__}\n"
    assert llave("config", "show", "studies/tiny") == (EXAMPLES / "studies" / "tiny.yaml").read_text()
    train = ["train", "--config", "tiny", f"data.path={openmoji_data}", "train.output=run", "data.workers=0"]
    train += ["train.global_batch_size=8", "train.steps=1000000", "checkpoint.interval=1000000"]
    output = tmp_path / "output"
    with started([sys.executable, str(site / "bin" / "llave"), *train], output, PROCS="2") as process:
        wait_for(lambda: len(losses(empty / "run")) > 0, process, output)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == start.EXIT_STOPPED, output.read_text()[-5000:]
    stopped = state(empty / "run")
    assert (stopped["state"], stopped["reason"]) == ("stopped", "a file 'stop' in train.output")
    few = data_with_few_sets(openmoji_data, tmp_path / "few", "vqa")
    llave("evaluate", "prepared", "--checkpoint", "run", "--data", str(few), "--procs", "2")
    report = json.loads(Path("run/evaluation/report.json").read_text())
    assert "llave evaluate prepared --checkpoint run" in json.dumps(report)
    assert llave("embed", "--checkpoint", "run", "--text", "a cat").count("embedding") == 1
    llave("convert", "export", "--from", "run", "--to", "hf", "--format", "llava_qwen")
    assert Path("hf/config.json").is_file()
