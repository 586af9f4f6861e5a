"""The checks before a run: each fault is one line that names its node; two real processes measure and agree."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_ranks import run_ranks

from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.planning import preflight
from megatron_llave.planning.preflight import Needs, Node, describe_nodes, find_faults

ROOT = Path(__file__).resolve().parents[2]
GOOD = Node(
    name="node0",
    ranks=8,
    device="H100",
    versions={"torch": "2.9", "driver": "580"},
    clock=0.0,
    flops=7e14,
    all_reduce=4e11,
    write=2e9,
    disk=2**40,
    host_memory=2**40,
    shared_memory=2**36,
)
NEEDS = Needs(host_memory=2**37, disk=2**38)


def faults(**changes) -> list[str]:
    """Faults of four nodes, of which the last but one differs by these changes."""
    nodes = [replace(GOOD, name=f"node{number}") for number in range(4)]
    nodes[2] = replace(nodes[2], **changes)
    return find_faults(nodes, NEEDS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"torch": "2.8", "driver": "580"}}, "torch is 2.8, and 2.9 on node0"),
        ({"versions": {"torch": "2.9"}}, "driver is missing, and 580 on node0"),
        ({"versions": {**GOOD.versions, "NCCL": "2.27"}}, "NCCL is 2.27, and missing on node0"),
        ({"device": "A100"}, "device is A100, and H100 on node0"),
        ({"clock": -3.0}, "its clock is -3.0 s off the others"),
        ({"flops": 4e14}, "matrix products run at 400 TFLOP/s, and 700 in the median of the nodes"),
        ({"all_reduce": 1e11}, "all-reduces within the node run at 100 GB/s, and 400 in"),
        ({"write": 1e9}, "the output directory is written at 1 GB/s, and 2 in"),
        ({"disk": 2**37}, "the output directory has 128.0 GB free, and the checkpoints need 256.0 GB"),
        ({"host_memory": 2**36}, "the host has 64.0 GB of memory free, and a save needs 128.0 GB"),
        ({"shared_memory": 2**26}, "/dev/shm has 64 MiB free and needs 1 GiB"),
        ({"problems": ["data.path=x does not exist here"]}, "data.path=x does not exist here"),
    ],
)
def test_fault_is_one_line_with_the_node_and_the_values(changes: dict, said: str) -> None:
    assert faults() == []
    [fault] = faults(**changes)
    assert fault.startswith(f"node2: {said}") and "\n" not in fault


def test_what_is_nearly_the_same_is_no_fault() -> None:
    assert faults(clock=1.9, flops=5e14, all_reduce=2.9e11, write=1.5e9, disk=2**38, host_memory=2**37) == []


def test_interfaces_and_locked_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lo", "ib0", "eth1"):
        (tmp_path / "net" / name).mkdir(parents=True)
    monkeypatch.setattr(preflight, "INTERFACES", tmp_path / "net")
    cfg = RunConfig()
    for wanted in ("ib", "=ib0", "eth0,ib0", "^docker", "=ib1,eth1", ""):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", wanted)
        assert preflight._problems(cfg) == []
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=ib")
    assert preflight._problems(cfg) == ["NCCL_SOCKET_IFNAME==ib names none of its interfaces: eth1, ib0, lo"]
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setattr(preflight, "INFINIBAND", tmp_path)
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda kind: (65536, 65536))
    assert preflight._problems(cfg) == ["ulimit -l is 65536 bytes, but InfiniBand locks memory; set it to unlimited"]


def test_free_memory_is_that_of_the_tightest_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what is only cached, in a container and in a job of SLURM whose own group has no limit."""

    def write(group: str, names: tuple[str, str, str], limit: object, used: int, cached: int) -> None:
        folder = tmp_path / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip((*names[:2], "memory.stat"), (limit, used, f"anon 1\n{names[2]} {cached}\nfile 99")):
            (folder / name).write_text(f"{value}\n")

    monkeypatch.setattr(preflight, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(preflight, "OWN_CONTROL_GROUPS", tmp_path / "own")
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert preflight._free_memory() == 5000
    of_2 = ("memory.max", "memory.current", "inactive_file")
    (tmp_path / "own").write_text("0::/slurm/job_1/step_0\n")
    write("slurm/job_1/step_0", of_2, "max", 900, 300)
    assert preflight._free_memory() == 5000, "no limit"
    write("slurm/job_1", of_2, 2000, 900, 300)
    assert preflight._free_memory() == 1400
    write("", of_2, 1500, 1000, 100)  # a container's, seen from within
    assert preflight._free_memory() == 600
    (tmp_path / "own").write_text("5:cpu:/\n4:hugetlb,memory:/job\n0::/\n")
    write("", of_2, "max", 1000, 100)
    write("memory", preflight.MEMORY_OF_VERSION_1, 2**63, 9000, 0)
    write("memory/job", preflight.MEMORY_OF_VERSION_1, 1000, 950, 250)
    assert preflight._free_memory() == 300
    write("memory/job", preflight.MEMORY_OF_VERSION_1, 1000, 1100, 0)
    assert preflight._free_memory() == 0


def test_output_directory_that_cannot_be_written(groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SECONDS_TO_SEE", 0)
    (tmp_path / "file").touch()
    [node], over_all = describe_nodes(RunConfig(train=TrainConfig(output=str(tmp_path / "file" / "run"))), 1)
    assert node.problems == [f"train.output={tmp_path}/file/run cannot be written: Not a directory"]
    assert (node.ranks, node.clock, node.all_reduce, over_all) == (1, 0, 0, 0) and node.flops > 0


def test_processes_measure_and_say_what_is_missing(tmp_path: Path) -> None:
    arguments = ["--config", str(ROOT / "examples" / "tiny.yaml"), "--megabytes", "1", "data.path=nowhere"]
    with pytest.raises(AssertionError, match="exit code 1") as failed:
        run_ranks(2, ROOT / "tools" / "preflight.py", *arguments, f"train.output={tmp_path / 'a' / 'run'}")
    output = str(failed.value)
    assert "2 x CPU" in output and "All-reduce over all 2 processes: " in output
    found = [line for line in output.splitlines() if "fault: " in line]
    assert sum("data.path=nowhere does not exist here" in line for line in found) == 1
    assert not (tmp_path / "a").exists(), "the output directory is left as it was"
