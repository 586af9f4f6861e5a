"""Checks of the nodes of a cluster before a run: each node describes itself, and `find_faults` compares them.

llave preflight prints the result. Everything is measured by the processes that would train, so over NCCL with GPUs
and over gloo without.
"""

import hashlib
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist

from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed.collectives import from_all_ranks, from_first_rank
from megatron_llave.distributed.process_groups import device
from megatron_llave.errors import CheckpointError
from megatron_llave.hub import local_folder

PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "safetensors", "tokenizers", "webdataset")
SLOW = 0.7
"""A node is slow if it reaches less than this share of the median of all nodes."""
CLOCK_SECONDS = 2.0
"""Largest difference between the clocks of two nodes: locks, logs and file times compare their times."""
SHARED_MEMORY = 2**30
"""Smallest free bytes of /dev/shm, in which NCCL and the data workers share memory; Docker's default is 64 MB."""
SECONDS_TO_SEE = 3
"""How long another node's file may take to appear on a network file system."""
REPEATS, ROUND_TRIPS = 5, 8
SPEEDS = (
    ("flops", "matrix products run at", "TFLOP/s", 1e12),
    ("all_reduce", "all-reduces within the node run at", "GB/s", 1e9),
    ("write", "the output directory is written at", "GB/s", 1e9),
)
INTERFACES = Path("/sys/class/net")
INFINIBAND = Path("/dev/infiniband")
SHARED_FOLDER = Path("/dev/shm")
CONTROL_GROUPS, OWN_CONTROL_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMORY_OF_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True)
class Needs:
    """What a run will need of each node, in bytes; 0 where it is not known."""

    host_memory: int = 0
    """For a save, beside what the processes use now."""
    disk: int = 0
    """In the output directory, for all checkpoints that are kept and one more."""


@dataclass(frozen=True)
class Node:
    """What a node is and reaches. Its speeds are those of its slowest process."""

    name: str
    ranks: int
    device: str
    versions: Mapping[str, str]
    clock: float
    """Seconds ahead of the first node."""
    flops: float
    """FLOP/s of a matrix product: bf16 on a GPU, float32 on a CPU."""
    all_reduce: float
    """Bytes/s that each process sends in an all-reduce within the node; 0 with one process."""
    write: float
    """Bytes/s into the output directory, all nodes at once, until they are on the disk."""
    disk: int
    """Free bytes of the output directory."""
    host_memory: int
    """Free bytes of the host's memory, of the container if it has a limit."""
    shared_memory: int
    """Free bytes of /dev/shm."""
    problems: list[str] = field(default_factory=list)
    """What this node finds without the others, each in one line."""


def find_faults(nodes: list[Node], needs: Needs) -> list[str]:
    """Return one line for each fault, which names the node and says what would be right."""
    clock = statistics.median(node.clock for node in nodes)
    faults = []
    for node in nodes:
        found = [*node.problems, *_differences(nodes[0], node), *_shortages(node, needs)]
        if abs(node.clock - clock) > CLOCK_SECONDS:
            found.append(f"its clock is {node.clock - clock:+.1f} s off the others; let chrony or ntpd set it")
        for name, doing, unit, scale in SPEEDS:
            value, middle = getattr(node, name), statistics.median(getattr(other, name) for other in nodes)
            if value < SLOW * middle:
                speeds = f"{value / scale:.3g} {unit}, and {middle / scale:.3g} in the median of the nodes"
                found.append(f"{doing} {speeds}; repair the node or leave it out")
        faults += [f"{node.name}: {line}" for line in found]
    return faults


def _differences(first: Node, node: Node) -> Iterator[str]:
    mine, others = {"device": node.device, **node.versions}, {"device": first.device, **first.versions}
    for name in sorted(mine.keys() | others.keys()):
        if mine.get(name) != others.get(name):
            is_here, is_there = mine.get(name, "missing"), others.get(name, "missing")
            yield f"{name} is {is_here}, and {is_there} on {first.name}; all nodes need the same"


def _shortages(node: Node, needs: Needs) -> Iterator[str]:
    if node.shared_memory < SHARED_MEMORY:
        has = f"{node.shared_memory / 2**20:.0f} MiB"
        yield f"/dev/shm has {has} free and needs 1 GiB; docker run --ipc=host or --shm-size gives a container more"
    if node.host_memory < needs.host_memory:
        has, need = node.host_memory / 2**30, needs.host_memory / 2**30
        yield f"the host has {has:.1f} GB of memory free, and a save needs {need:.1f} GB"
    if node.disk < needs.disk:
        has, need = node.disk / 2**30, needs.disk / 2**30
        yield f"the output directory has {has:.1f} GB free, and the checkpoints need {need:.1f} GB"


def describe_nodes(cfg: RunConfig, megabytes: int) -> tuple[list[Node], float]:
    """Measure, and return all nodes in the order of their ranks, and the bytes/s of an all-reduce over all processes.

    Every process calls this.

    Args:
        cfg: the run; `train.output` is written to and left as it was, other paths must exist.
        megabytes: 10^6 bytes that are written on each node, and reduced by each process of a node with GPUs.
    """
    name = (int(os.environ.get("GROUP_RANK", 0)), socket.gethostname())
    names = from_all_ranks([name])
    members = {node: [rank for rank, other in enumerate(names) if other == node] for node in dict.fromkeys(names)}
    groups = {node: dist.new_group(ranks) for node, ranks in members.items()}
    firsts = [ranks[0] for ranks in members.values()]
    size = megabytes * 10**6 if torch.cuda.is_available() else 4 * 10**6
    clock = _clocks(firsts)
    within = _all_reduce_speed(groups[name], size)
    over_all = _all_reduce_speed(dist.group.WORLD, size)
    flops = from_all_ranks([_matrix_speed()])
    mine = members[name]
    nodes = []
    problems = _problems(cfg)
    output = Path(cfg.train.output)
    with _same_folder(output) as is_same:
        if dist.get_rank() == mine[0]:
            write, free = 0.0, 0
            try:
                write, free = _write_speed(output, megabytes * 10**6), shutil.disk_usage(output).free
                if not is_same:
                    problems.append(f"train.output={output} is not the first node's folder; put it on a shared disk")
            except OSError as error:
                problems.append(f"train.output={output} cannot be written: {error.strerror}")
            shared = shutil.disk_usage(SHARED_FOLDER).free if SHARED_FOLDER.is_dir() else 0
            speed = min(flops[rank] for rank in mine)
            about = (name[1], len(mine), _device_name(), _versions(), clock, speed, within, write)
            nodes.append(Node(*about, free, _free_memory(), shared, problems))
    return from_all_ranks(nodes), over_all


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.cuda.is_available():
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        with suppress(OSError):
            found["driver"] = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    code = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found | {"megatron_llave (SHA-256 of its code)": code.hexdigest()[:12]}


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _free_memory() -> int:
    """Return the free bytes of the host, or of the control group with the least room among this process's and its
    parents: a container's, or a SLURM job's. Both versions of control groups are read."""
    free = [psutil.virtual_memory().available]
    for line in OWN_CONTROL_GROUPS.read_text().splitlines() if OWN_CONTROL_GROUPS.exists() else []:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, files = CONTROL_GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, files = CONTROL_GROUPS / "memory", MEMORY_OF_VERSION_1
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            with suppress(OSError, ValueError):  # no such folder here, or no limit
                free.append(_room(folder, *files))
    return max(0, min(free))


def _room(group: Path, limit: str, used: str, cache: str) -> int:
    """Return the limit of a control group less what it uses, without files that are only cached."""
    cached = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    return int((group / limit).read_text()) - int((group / used).read_text()) + int(cached[1] if cached else 0)


def _problems(cfg: RunConfig) -> list[str]:
    """Return what this process finds wrong on its own."""
    problems = []
    for key, path in (("data.path", cfg.data.path), ("checkpoint.init", cfg.checkpoint.init)):
        if not path or "://" in path or path.startswith("pipe:") or os.path.exists(path):
            continue
        try:
            is_on_hub = key == "checkpoint.init" and local_folder(path).is_dir()
        except CheckpointError as error:
            problems.append(f"{key}: {error}")
        else:
            problems += [] if is_on_hub else [f"{key}={path} does not exist here"]
    known = sorted(os.listdir(INTERFACES)) if INTERFACES.is_dir() else []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        names = wanted.lstrip("=").split(",")
        is_named = any(one == name or (wanted[:1] != "=" and one.startswith(name)) for one in known for name in names)
        if wanted and wanted[0] != "^" and known and not is_named:
            problems.append(f"{variable}={wanted} names none of its interfaces: {', '.join(known)}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if INFINIBAND.is_dir() and locked != resource.RLIM_INFINITY:
        problems.append(f"ulimit -l is {locked} bytes, but InfiniBand locks memory; set it to unlimited")
    return problems


def _clocks(firsts: list[int]) -> float:
    """Return the seconds that this process's clock is ahead of that of rank 0; 0 for all but the ranks `firsts`.

    As in NTP: half of the shortest round trip is taken for the way of the answer.
    """
    rank, ahead = dist.get_rank(), 0.0
    for other in firsts[1:]:
        if rank not in (0, other):
            continue
        best, stamp = float("inf"), torch.zeros(1, dtype=torch.float64, device=device())
        for _ in range(ROUND_TRIPS):
            if rank == 0:
                dist.recv(stamp, other)
                stamp.item()  # NCCL only queues what is received; this waits for it
                dist.send(torch.full_like(stamp, time.time()), other)
                continue
            sent = time.time()
            dist.send(stamp, 0)
            dist.recv(stamp, 0)
            answered = stamp.item()
            trip = time.time() - sent
            if trip < best:
                best, ahead = trip, sent + trip / 2 - answered
    dist.barrier()
    return ahead


def _seconds(group: dist.ProcessGroup, work: torch.Tensor) -> float:
    if work.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(work, group=group)
    if work.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / REPEATS


def _all_reduce_speed(group: dist.ProcessGroup, size: int) -> float:
    """Return the bytes/s that a process sends ("bus bandwidth" of nccl-tests), with `size` bytes of zeros in each."""
    ranks = group.size()
    if ranks == 1:
        return 0.0
    work = torch.zeros(size // 4, device=device())
    _seconds(group, work)  # which connects them
    return 2 * (ranks - 1) / ranks * size / _seconds(group, work)


def _matrix_speed() -> float:
    """Return the FLOP/s of a square matrix product."""
    on_gpu = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=device())
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def _write_speed(folder: Path, size: int) -> float:
    file, block = folder / f".preflight-{uuid4().hex}", os.urandom(2**20)
    start = time.perf_counter()
    try:
        with file.open("wb") as out:
            for _ in range(-(-size // len(block))):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        return size / (time.perf_counter() - start)
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def _same_folder(folder: Path) -> Iterator[bool]:
    """Make the folder, and yield whether it is the one that the first process has made; remove it if it is new."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    token = folder / from_first_rank(lambda: f".preflight-{uuid4().hex}")
    with suppress(OSError):  # whoever writes to it will say so
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
    dist.barrier()
    deadline = time.monotonic() + SECONDS_TO_SEE
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    is_same = token.exists()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    yield is_same
    dist.barrier()
    with suppress(OSError):
        token.unlink()
    for path in new:
        with suppress(OSError):  # another process has removed it, or something is in it
            path.rmdir()
