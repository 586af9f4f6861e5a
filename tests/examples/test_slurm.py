"""The SLURM script, with stand-ins of SLURM's programs and of torchrun on the path."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from launching import BATCH_FILE, LIMIT, ROOT, started, state, wait_for
from run_ranks import run_command

# Each notes its arguments in a file of its own; srun starts what it is given, torchrun is the run.
PROGRAMS = {
    "scontrol": """
if sys.argv[1] == "show":
    print("node7", "node8", "node9", sep="\\n")
""",
    "srun": """
at = next(number for number, word in enumerate(sys.argv) if word in ("bash", "torchrun"))
os.environ["SLURMD_NODENAME"] = "node7"
os.execvp(sys.argv[at], sys.argv[at:])
""",
    "torchrun": """
output = Path([word for word in sys.argv if word.startswith("train.output=")][-1].removeprefix("train.output="))

def report(state, reason=""):
    partial = output / "partial"
    partial.write_text(json.dumps({"state": state, "step": 3, "reason": reason}))
    os.replace(partial, output / "state.json")

plays = os.environ["PLAYS"]
if plays == "broken":
    sys.exit(3)
time.sleep(1)  # starting: the request may come before the folder is there
output.mkdir(parents=True, exist_ok=True)
(output / "stop").unlink(missing_ok=True)  # as StopRequests does
report("running")
if plays == "until asked":
    while not (output / "stop").exists():
        time.sleep(0.05)
    report("stopped", "a file 'stop' in train.output")
elif plays == "preempted":
    report("stopped", "SIGTERM")
    sys.exit(1)
elif plays == "stopped by the user":
    report("stopped", "a file 'stop' in train.output")
elif plays == "out of time":
    report("stopped", "train.time_limit_minutes")
else:
    report("finished")
""",
}


class Slurm:
    """What a batch job sees of SLURM, and what it did with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "run"
        for name, body in PROGRAMS.items():
            note = f"Path({str(folder / name)!r}).open('a').write(json.dumps(sys.argv[1:]) + '\\n')"
            imports = "import json, os, sys, time\nfrom pathlib import Path"
            file = folder / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"#!{sys.executable}\n{imports}\n{note}\n{body}")
            file.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def run(
        self, plays: str, *arguments: str, ask: signal.Signals | None = None, file: Path = BATCH_FILE, **env: str
    ) -> int:
        """Status of the batch script; it gets `ask` as soon as it has called srun."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[7-9]"}
        job["SLURM_SUBMIT_DIR"] = str(ROOT)
        env = {**job, "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32", "PLAYS": plays, **env, "PATH": path}
        output = self.folder / "slurm.out"
        with started(["bash", str(file), *arguments], output, **env) as script:
            if ask:
                wait_for(lambda: len(self.calls("torchrun")) > 0, script, output)
                script.send_signal(ask)
            return script.wait(LIMIT)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_slurm_starts_one_torchrun_per_node_that_meet_on_the_first(slurm: Slurm) -> None:
    overrides = ["checkpoint.init=with space", "loss.alpha=1"]
    assert slurm.run("to the end", "examples/pretrain_llave_7b.sh", str(slurm.output), *overrides) == 0
    assert slurm.calls("scontrol") == [["show", "hostnames", "node[7-9]"]], "a finished run is not queued again"
    (step,) = slurm.calls("srun")
    assert step[: step.index("bash")] == ["--kill-on-bad-exit=1"]
    directives = re.findall(r"^#SBATCH (.+)$", BATCH_FILE.read_text(), re.MULTILINE)
    assert {"--ntasks-per-node=1", "--requeue", "--signal=B:USR1@300", "--open-mode=append"} <= set(directives)
    options = (
        f"--log-dir {slurm.output}/logs/node7 --redirects 3 --tee 3 --nnodes 3 --nproc-per-node 4 --max-restarts 3 "
    )
    options += "--rdzv-backend c10d --rdzv-endpoint node7:23456 --rdzv-id 123456 --rdzv-conf read_timeout=600 "
    options += "examples/pretrain_llave_7b.sh"
    ends = [*overrides, f"train.output={slurm.output}", "--resume", "auto"]
    assert slurm.calls("torchrun") == [[*options.split(), *ends]]
    # torchrun itself takes them so.
    run_torchrun = [sys.executable, "-c", "import sys, torch.distributed.run as r; print(r.parse_args(sys.argv[1:]))"]
    parsed = run_command([*run_torchrun, *options.split(), *ends])
    assert "rdzv_endpoint='node7:23456'" in parsed and "training_script='examples/pretrain_llave_7b.sh'" in parsed


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_asks_the_run_to_stop_and_queues_it_again(slurm: Slurm, number: signal.Signals) -> None:
    # The request comes while the run is starting, forgets it, and is asked again.
    assert slurm.run("until asked", "file.sh", str(slurm.output), ask=number) == 0
    assert slurm.calls("scontrol")[1:] == [["requeue", "123456"]]
    assert state(slurm.output)["state"] == "stopped"


@pytest.mark.parametrize(
    ("plays", "status", "queued"),
    [("preempted", 0, 1), ("out of time", 0, 1), ("stopped by the user", 75, 0), ("broken", 3, 0)],
)
def test_slurm_queues_only_what_is_to_go_on(slurm: Slurm, plays: str, status: int, queued: int) -> None:
    slurm.output.mkdir()
    left = {"state": "stopped", "step": 2, "reason": "SIGUSR1"}  # by an earlier start of the job
    (slurm.output / "state.json").write_text(json.dumps(left))
    assert slurm.run(plays, "file.sh", str(slurm.output)) == status
    assert len(slurm.calls("scontrol")) == 1 + queued


def test_slurm_array_has_a_folder_per_task(slurm: Slurm) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "123400", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm.run("out of time", "file.sh", str(slurm.output), **array) == 2
    assert "OUTPUT must have {task} in it" in (slurm.folder / "slurm.out").read_text() and not slurm.calls("srun")
    assert slurm.run("out of time", "file.sh", f"{slurm.output}/{{task}}", "train.seed={task}", **array) == 0
    assert slurm.calls("torchrun")[0][-4:] == ["train.seed=2", f"train.output={slurm.output}/2", "--resume", "auto"]
    assert slurm.calls("scontrol")[-1] == ["requeue", "123400_2"]


def test_slurm_script_says_what_it_needs(slurm: Slurm) -> None:
    assert slurm.run("to the end", "file.sh") != 0
    assert "usage: sbatch" in (slurm.folder / "slurm.out").read_text()


TOOL_FILE = BATCH_FILE.with_name("tool.sbatch")


@pytest.mark.parametrize(
    ("plays", "ask", "status", "queued"),
    [("to the end", None, 0, 0), ("broken", None, 3, 0), ("until asked", signal.SIGUSR1, 0, 1)],
)
def test_slurm_runs_a_tool_on_all_nodes(slurm: Slurm, plays: str, ask, status: int, queued: int) -> None:
    arguments = ["tools/evaluate.py", "mmeb", "--out", "with space", f"train.output={slurm.output}"]
    assert slurm.run(plays, *arguments, ask=ask, file=TOOL_FILE) == status
    options = "--nnodes 3 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node7:23456 --rdzv-id 123456 "
    assert slurm.calls("torchrun") == [[*(options + "--rdzv-conf read_timeout=600").split(), *arguments]]
    assert slurm.calls("scontrol")[1:] == [["requeue", "123456"]] * queued


STUDY_FILE = BATCH_FILE.with_name("study.sbatch")
STUDY_TOOL = """
import json, os, signal, sys, time
from pathlib import Path

folder = Path(os.environ["NOTES"])
(folder / "python").write_text(json.dumps(sys.argv[1:]))
signal.signal(signal.SIGTERM, lambda *given: sys.exit(143))
if os.environ["PLAYS"] == "until asked":
    (folder / "torchrun").write_text("[]")
    time.sleep(20)
sys.exit(int(os.environ["PLAYS"]))
"""


@pytest.mark.parametrize(
    ("plays", "ask", "status", "queued"),
    [("0", None, 0, False), ("1", None, 1, False), ("until asked", signal.SIGUSR1, 0, True)],
)
def test_slurm_study_runs_its_task_and_is_queued_again_when_interrupted(
    slurm: Slurm, plays: str, ask: signal.Signals | None, status: int, queued: bool
) -> None:
    python = slurm.folder / "bin" / "python"
    python.write_text(f"#!{sys.executable}\n{STUDY_TOOL}")
    python.chmod(0o755)
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "NOTES": str(slurm.folder)}
    arguments = ["hardness", "examples/studies/2b.yaml", "0,1", "with space", "loss.temperature=0.03"]
    assert slurm.run(plays, *arguments, ask=ask, file=STUDY_FILE, **array) == status
    given = json.loads((slurm.folder / "python").read_text())
    options = ["--config", "examples/studies/2b.yaml", "--seeds", "0,1", "--out", "with space", "--processes", "4"]
    ends = ["--per-run", "4", "--task", "3", "loss.temperature=0.03"]
    assert given == ["tools/study.py", "hardness", *options, *ends]
    assert slurm.calls("scontrol") == ([["requeue", "7_3"]] if queued else [])


def test_slurm_study_refuses_what_is_not_for_a_cluster(slurm: Slurm) -> None:
    assert slurm.run("0", "communication", "examples/studies/2b.yaml", "0", "out", file=STUDY_FILE) == 2
    assert "communication measures processes" in (slurm.folder / "slurm.out").read_text()
