"""The Kubernetes manifest, the image, and the commands in the documentation of launching."""

import json
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
from launching import EXAMPLES, ROOT, code_blocks, environment, stub_clone
from omegaconf import OmegaConf
from run_ranks import run_command

from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.planning.pair_lengths import mmeb_like
from megatron_llave.planning.plan import make_plan
from megatron_llave.training import fault_tolerance


def test_kubernetes_runs_the_documented_command(tmp_path: Path) -> None:
    job_set = OmegaConf.to_container(OmegaConf.load(EXAMPLES / "kubernetes" / "jobset.yaml"))
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] in [shlex.split(line) for block in code_blocks("kubernetes.md") for line in [block]]

    # The command is one that starts, with these variables.
    env = {entry["name"]: entry.get("value", "0") for entry in container["env"]}
    assert int(env["NNODES"]) == job["completions"] == job["parallelism"]
    assert env["MASTER_ADDR"] == "{0}-{1}-0-0.{0}".format(job_set["metadata"]["name"], replicated["name"])
    clone = stub_clone(tmp_path / "clone")
    file = str(clone / container["command"][1])
    run_command(["bash", file, *container["command"][2:]], env=environment(**{**env, "NNODES": "1"}))
    report = json.loads((clone / "megatron_llave" / "rank1.json").read_text())
    assert report["argv"][2:] == container["command"][2:]
    overrides = [word for word in container["command"] if "=" in word]
    assert load_config(EXAMPLES / "7b.yaml", overrides).train.output.startswith("/shared/")

    # A stopped run goes on, without being counted as a failure; a failed one goes on a limited number of times.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [fault_tolerance.EXIT_STOPPED],
    }
    (rule,) = job_set["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] > 0 and pod["terminationGracePeriodSeconds"] >= 300
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    # What InfiniBand needs, the output of each rank, and memory for the processes, a save and what lies in /dev/shm.
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert container["resources"]["limits"]["rdma/rdma_shared_device_a"] == 1
    assert Path(env["PET_LOG_DIR"]).parent == Path(load_config(EXAMPLES / "7b.yaml", overrides).train.output)
    cfg = load_config(EXAMPLES / "7b.yaml", overrides)
    plan = make_plan(cfg, 8 * job["completions"], mmeb_like(cfg))
    memory = int(container["resources"]["requests"]["memory"].removesuffix("Gi")) << 30
    shared = int(pod["volumes"][1]["emptyDir"]["sizeLimit"].removesuffix("Gi")) << 30
    assert 100 << 30 < memory - plan.save_per_node() - shared


def test_image_is_pinned_and_not_roots() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    [base] = [line for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"FROM nvcr.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", base)
    assert re.search(r"git fetch .* https://github.com/NVIDIA/apex [0-9a-f]{40} ", "\n".join(lines))
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"] and lines[-1].startswith("USER ")
    job_set = OmegaConf.load(EXAMPLES / "kubernetes" / "jobset.yaml")
    pod = job_set.spec.replicatedJobs[0].template.spec.template.spec
    assert pod.securityContext.runAsUser == 1000
    assert re.fullmatch(r".*@sha256:[0-9a-f]{64}", pod.containers[0].image)


def test_image_has_what_is_tracked_and_no_more() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    assert ".git" in ignored
    assert {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()} <= {
        name.removeprefix("**/") for name in ignored
    }
    patterns = [name.removeprefix("**/") for name in ignored if name.startswith("**/")]
    for file in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines():
        parts = Path(file).parts
        assert not any(fnmatch(parts[0], name) for name in ignored), file
        assert not any(fnmatch(part, name) for part in parts for name in patterns), file


@pytest.mark.parametrize("page", ["getting_started.md", "clusters.md", "slurm.md", "kubernetes.md"])
def test_documented_commands_name_what_is_there(page: str) -> None:
    commands = [line for block in code_blocks(page) for line in block.splitlines()]
    named = {word for line in commands for word in re.findall(r"\b(?:tools|examples|benchmarks)/[\w./-]+", line)}
    assert named and all((ROOT / name).is_file() for name in named)
    for line in commands:
        keys = [key for key in re.findall(r"(?<!\S)([a-z]+\.[a-z_]+)=", line) if "kubectl" not in line]
        for key in keys:
            section, name = key.split(".")
            assert hasattr(getattr(RunConfig(), section), name), line
