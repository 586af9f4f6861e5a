"""The stand-ins: in place without a GPU, not touched with one, and not installed by an import."""

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forking import run_script
from megatron.core.distributed import param_and_grad_buffer

from megatron_llave.distributed import cpu_emulation

NO_OP_WITH_A_GPU = """
import torch
torch.cuda.is_available = lambda: True
before = {name: getattr(torch, name) for name in ("zeros", "tensor", "empty", "compile")}
before_cuda = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "manual_seed")}
import megatron_llave.train
from megatron_llave.distributed import cpu_emulation
assert cpu_emulation.enable() is False
assert all(getattr(torch, name) is function for name, function in before.items())
assert all(getattr(torch.cuda, name) is function for name, function in before_cuda.items())
"""

IMPORT_CHANGES_NOTHING_ELSE = """
import torch
before = torch.zeros, torch.cuda.current_device, torch.Tensor.cuda
import megatron_llave.train, megatron_llave.embedding, megatron_llave.evaluation.evaluate
assert before == (torch.zeros, torch.cuda.current_device, torch.Tensor.cuda)
import sys
assert ("torch._inductor.compile_fx" in sys.modules) == torch.cuda.is_available()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
assert type(torch.compile(torch.nn.Linear(1, 1), backend="eager")).__name__ == "OptimizedModule"
"""


DEVICE_CONTEXT_STILL_WORKS = """
import torch
from megatron_llave.distributed import cpu_emulation
assert cpu_emulation.enable()
with torch.device("meta"):
    assert torch.empty(3).is_meta and torch.arange(3).is_meta and not torch.empty(3, device="cuda").is_meta
"""


def run_python(source: str) -> None:
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


def test_does_nothing_where_cuda_is_available() -> None:
    run_python(NO_OP_WITH_A_GPU)


def test_importing_the_package_keeps_the_compiler_from_megatron_core_and_patches_nothing_else() -> None:
    run_python(IMPORT_CHANGES_NOTHING_ELSE)


def test_cuda_calls_land_on_the_cpu() -> None:
    if not cpu_emulation.enable():
        assert torch.cuda.is_available()
        return
    assert torch.zeros(3, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.arange(2, pin_memory=True).tolist() == [0, 1]
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.int32).dtype == torch.int32
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), drawn)


def test_enabling_twice_wraps_once() -> None:
    cpu_emulation.enable()
    zeros = torch.zeros
    cpu_emulation.enable()
    assert torch.zeros is zeros


def test_a_device_can_still_be_chosen_by_a_context(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(DEVICE_CONTEXT_STILL_WORKS)
    run_script(tmp_path / "script.py").check_returncode()


def test_overlapped_collectives_have_ended_when_they_are_started(groups) -> None:
    values = torch.ones(3)
    with param_and_grad_buffer._coalescing_manager(dist.group.WORLD, async_ops=True) as manager:
        dist.all_reduce(values, async_op=True)
    assert manager.works == []
    manager.wait()  # which the wrapper does, and which must not write once more
