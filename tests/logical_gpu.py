"""A GPU that is only logical: torch.cuda is available, and tensors that say that they are on it lie in host memory.

Within `LogicalGpu()` a computation takes the paths that it takes on a GPU. An operation on tensors of both sides raises
an error, as on a GPU, and whatever makes the host wait for the device is counted, with the line that did it: reading a
value, a copy to the host, a copy from memory that is not page-locked, a result whose size depends on values, a
synchronization. A device tensor is one whose storage is marked; the marks spread through every operation, those of
backward passes included. gloo takes NCCL's place.
"""

import inspect
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llave.distributed import cpu_emulation

ROOT = Path(__file__).resolve().parents[1]
CUDA, CPU, BASE = torch.device("cuda", 0), torch.device("cpu"), torch._C.TensorBase
READS_VALUES = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "allclose", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "bincount",
}  # fmt: skip
"""Operations that return a value of the device to the host, or whose result has a size that depends on values."""
COPIES_PYTHON_VALUES = {"tensor", "as_tensor", "asarray"}
MOVES = {"copy_", "_to_copy"}
"""Operations whose arguments may lie on both sides."""


class Marks:
    """A set of storages. It refers to them weakly, and no other storage gets the address of one that it holds."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self._most = 1000

    def __contains__(self, tensor: Tensor) -> bool:
        if isinstance(tensor, ShardedTensor):  # a description of tensors, without storage
            return False
        return BASE.untyped_storage(tensor)._cdata in self._storages

    def set(self, tensor: Tensor, is_in: bool = True) -> Tensor:
        """Add the storage of a tensor or take it out, and return the tensor."""
        storage = BASE.untyped_storage(tensor)
        if not is_in:
            self._storages.pop(storage._cdata, None)
        elif storage._cdata not in self._storages:
            self._storages[storage._cdata] = StorageWeakRef(storage)
        if len(self._storages) > self._most:
            self._storages = {key: weak for key, weak in self._storages.items() if not weak.expired()}
            self._most = 2 * len(self._storages) + 1000
        return tensor


class LogicalGpu:
    """The device of this process, while it is entered. The thread that enters it is the one that is watched."""

    def __init__(self) -> None:
        self.device, self.pinned = Marks(), Marks()
        self.waits: Counter[str] = Counter()
        """What made the host wait, and where -> how often."""
        self.is_in_kernel = False
        """Whether code runs that stands for a kernel of the device: what it makes lies there, and nothing waits."""
        self.sent: deque[Any] = deque(maxlen=100)
        """The last storages that were sent; gloo keeps only their tensors, and megatron-core frees the storages."""

    def __enter__(self) -> "LogicalGpu":
        with ExitStack() as stack:
            for target, name, value in _replacements(self):
                stack.enter_context(patch.object(target, name, value, create=True))
            mode = stack.enter_context(_FunctionMode(self))
            backward = BackwardCFunction.apply

            def apply(*args: Any) -> Any:
                with mode:  # torch switches it off in backward passes, which may run Python code of ours
                    return backward(*args)

            stack.enter_context(patch.object(BackwardCFunction, "apply", apply))
            stack.enter_context(_DispatchMode(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def refuse_host(self, name: str, inputs: list[Tensor]) -> None:
        """Raise RuntimeError if one of the inputs of an operation of the device is on the host and is no number."""
        host = [x for x in inputs if x not in self.device and x.ndim > 0]
        if host:
            shapes = ", ".join(str(tuple(x.shape)) for x in host)
            raise RuntimeError(f"{name} at {_place()}: tensors of the device and of the host ({shapes}) meet")

    def wait(self, what: str) -> None:
        """Count that the host waits for the device."""
        if self.is_in_kernel:
            return
        self.waits[f"{what} at {_place()}"] += 1

    def kernel(self, function: Callable) -> Callable:
        """Let a function stand for a kernel of the device, which takes tensors of the device alone."""

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.refuse_host(function.__name__, _tensors((args, kwargs)))
            with patch.object(self, "is_in_kernel", True):
                return function(*args, **kwargs)

        return wrapper

    def upload(self, made: Tensor, source: Any, non_blocking: bool = False) -> Tensor:
        """Mark a tensor that was copied from the host; the host waits unless its memory is page-locked."""
        if made.numel() > 0 and not (non_blocking and isinstance(source, Tensor) and source in self.pinned):
            self.wait("copy from the host")
        return self.device.set(made)

    def download(self, made: Tensor, non_blocking: bool = False) -> Tensor:
        """Take the mark off a tensor that was copied from the device, which is page-locked if the copy did not wait."""
        if made.numel() > 0 and not non_blocking:
            self.wait("copy to the host")
        self.pinned.set(made, non_blocking)
        return self.device.set(made, False)


def _place() -> str:
    """The line of the package, of megatron-core, of Transformer Engine or of a test that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        is_ours = file.startswith(f"{ROOT}/") and "/site-packages/" not in file  # .venv may lie in the clone
        is_theirs = any(name in file for name in ("/megatron/core/", "/transformer_engine/pytorch/"))
        if file != __file__ and (is_ours or is_theirs):
            path = re.split("site-packages/|/transformer_engine/", file)[-1].removeprefix(f"{ROOT}/")
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def check_waits(ranks: list[dict[str, dict[str, int]]], numbers: tuple[int, int, int]) -> None:
    """Fail unless the rank that waits most often in a step, an embed and an evaluation does so as often as expected.

    Args:
        ranks: for each rank, and each of the three, what waited and how often.
        numbers: of waits in each of the three.
    """
    for kind, expected in zip(("step", "embed", "evaluation"), numbers):
        worst = max((rank[kind] for rank in ranks), key=lambda where: sum(where.values()))
        assert sum(worst.values()) == expected, f"{kind}: {json.dumps(worst, indent=1)}"


class _FunctionMode(TorchFunctionMode):
    """Answers what a tensor says about its device, moves tensors, and makes new ones on the device."""

    def __init__(self, gpu: LogicalGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in HANDLERS:
            return HANDLERS[func](self._gpu, *args, **kwargs)
        if func is torch._C._nn._parse_to:  # with which modules read the arguments of their `to`
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in COPIES_PYTHON_VALUES and not isinstance(args[0], Tensor):
            for _ in filter(self._gpu.device.__contains__, _tensors(args)):
                self._gpu.wait(f"{func.__name__} of values of the device")
        is_pinned = kwargs.get("pin_memory") is not None and kwargs.pop("pin_memory")
        wanted = kwargs.get("device")
        if wanted is None or is_pinned:
            made = func(*args, **kwargs)
            return self._gpu.pinned.set(made) if is_pinned else made
        is_cuda = _names_cuda(wanted)
        name = func.__name__
        if name in COPIES_PYTHON_VALUES and isinstance(args[0], Tensor):
            return _to(self._gpu, args[0], wanted, kwargs.get("dtype"))
        made = func(*args, **{**kwargs, "device": CPU})
        if not isinstance(made, Tensor):
            return made
        if is_cuda and name in COPIES_PYTHON_VALUES:
            return self._gpu.upload(made.clone(), None)
        return self._gpu.device.set(made, is_cuda)


class _DispatchMode(TorchDispatchMode):
    """Spreads the marks over the results of every operation, refuses mixes, and counts what makes the host wait."""

    def __init__(self, gpu: LogicalGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__.partition(".")[0]
        inputs = _tensors((args, kwargs))
        is_marked = [x in self._gpu.device for x in inputs]
        if func.namespace == "c10d":
            self._collective(name, inputs)
        elif any(is_marked) and not self._gpu.is_in_kernel:
            if name not in MOVES:
                self._gpu.refuse_host(name, inputs)
            self._count_waits(name, inputs, args, kwargs)
        if name == "copy_" and not self._gpu.is_in_kernel:
            self._copy(args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2]))
        made = func(*args, **kwargs)
        if self._gpu.is_in_kernel or any(is_marked) and name != "copy_":
            for x in _tensors(made):
                self._gpu.device.set(x)
        return made

    def _count_waits(self, name: str, inputs: list[Tensor], args: tuple, kwargs: dict) -> None:
        is_boolean_index = False
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1])]
            fills = name != "index" and args[2].numel() == 1 and all(masks)  # torch turns it into masked_fill
            is_boolean_index = any(masks) and not fills
        is_repeat = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in READS_VALUES or is_boolean_index or is_repeat:
            self._gpu.wait(name)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        sides = target in self._gpu.device, source in self._gpu.device
        if sides == (True, False):
            self._gpu.upload(target, source, non_blocking)
        elif sides == (False, True) and not (non_blocking and target in self._gpu.pinned):
            self._gpu.wait("copy to the host")

    def _collective(self, name: str, inputs: list[Tensor]) -> None:
        if name == "barrier":
            self._gpu.wait(name)
        elif any(x not in self._gpu.device for x in inputs):
            raise RuntimeError(f"{name} at {_place()}: NCCL is given a tensor of the host")
        self._gpu.sent += [x.untyped_storage() for x in inputs if name == "send"]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a value of lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [x for part in values for x in _tensors(part)]


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda")


def _to(gpu: LogicalGpu, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    copy, here = kwargs.pop("copy", False), tensor in gpu.device
    if args and isinstance(args[0], Tensor):
        args = (CUDA if args[0] in gpu.device else CPU, args[0].dtype, *args[1:])
    elif args and isinstance(args[0], int):
        args = (CUDA, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    there = here if device is None else device.type == "cuda"
    options = {} if memory_format is None else {"memory_format": memory_format}
    moved = tensor.to(dtype or tensor.dtype, copy=copy or here != there, **options)
    if here == there:
        return moved
    return gpu.upload(moved, tensor, non_blocking) if there else gpu.download(moved, non_blocking)


def _device(gpu: LogicalGpu, tensor: Tensor) -> torch.device:
    # torch.distributed chooses a backend by it, and gloo takes tensors of the host.
    asks = sys._getframe(2).f_globals["__name__"]
    return CUDA if tensor in gpu.device and asks != "torch.distributed.distributed_c10d" else CPU


def _type(gpu: LogicalGpu, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = tensor.type(*args, **kwargs)
    is_name = isinstance(result, str) and tensor in gpu.device
    return result.replace("torch.", "torch.cuda.") if is_name else result


def _tolist(gpu: LogicalGpu, tensor: Tensor) -> Any:
    if tensor in gpu.device:
        gpu.wait("tolist")
    return tensor.tolist()


def _numpy(gpu: LogicalGpu, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if tensor in gpu.device:
        raise TypeError(f"numpy at {_place()}: can't convert a tensor of the device")
    return tensor.numpy(*args, **kwargs)


def _new_tensor(gpu: LogicalGpu, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    made = tensor.new_tensor(*args, **kwargs)
    return gpu.upload(made, None) if tensor in gpu.device else made


def _set_item(gpu: LogicalGpu, tensor: Tensor, index: Any, value: Any) -> None:
    if not isinstance(value, Tensor):  # torch makes it on the device
        value = gpu.device.set(tensor.new_tensor(value), tensor in gpu.device)
    tensor[index] = value


HANDLERS: dict[Callable, Callable] = {
    BASE.device.__get__: _device,
    BASE.is_cuda.__get__: lambda gpu, tensor: tensor in gpu.device,
    BASE.is_cpu.__get__: lambda gpu, tensor: tensor not in gpu.device,
    BASE.get_device: lambda gpu, tensor: 0 if tensor in gpu.device else -1,
    BASE.type: _type,
    BASE.to: _to,
    BASE.cuda: lambda gpu, tensor, *args, **kwargs: _to(gpu, tensor, CUDA, **kwargs),
    BASE.cpu: lambda gpu, tensor, **kwargs: _to(gpu, tensor, CPU, **kwargs),
    BASE.pin_memory: lambda gpu, tensor, *args: gpu.pinned.set(tensor.clone()),
    BASE.is_pinned: lambda gpu, tensor, *args: tensor in gpu.pinned,
    BASE.tolist: _tolist,
    BASE.numpy: _numpy,
    BASE.new_tensor: _new_tensor,
    BASE.__setitem__: _set_item,
}


class _Stream:
    """A stream or an event; the host waits for the device when it synchronizes with it."""

    def __init__(self, gpu: LogicalGpu) -> None:
        self.synchronize = lambda: gpu.wait("synchronize")
        self.cuda_stream = 0
        self.is_capturing = lambda: False

    def __getattr__(self, name: str) -> Callable:
        if name not in ("wait_stream", "wait_event", "record_event", "record", "wait", "query", "elapsed_time"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self if name == "record_event" else True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exception: Any) -> None:
        return None


def _replacements(gpu: LogicalGpu) -> Iterator[tuple[Any, str, Any]]:
    """What is replaced while the logical GPU is entered: object, name, value."""
    for name in cpu_emulation.FACTORIES:  # where megatron-core has been made to run on the CPU
        yield torch, name, inspect.unwrap(getattr(torch, name))
    for name in ("to", "cuda", "type"):
        yield Tensor, name, getattr(BASE, name)

    def wrapper_subclass(*args: Any, device: Any = CPU, **kwargs: Any) -> Tensor:
        if not _names_cuda(device):
            return BASE._make_wrapper_subclass(*args, device=device, **kwargs)
        return gpu.device.set(BASE._make_wrapper_subclass(*args, device=CPU, **kwargs))

    yield Tensor, "_make_wrapper_subclass", wrapper_subclass
    stream, cuda, c10d = _Stream(gpu), torch.cuda, dist.distributed_c10d
    constants = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "logical GPU"}
    constants |= {"get_device_capability": (9, 0), "is_bf16_supported": True, "is_current_stream_capturing": False}
    constants |= dict.fromkeys(("max_memory_allocated", "memory_allocated", "memory_reserved"), 0)
    constants |= dict.fromkeys(("set_device", "empty_cache", "reset_peak_memory_stats", "init"), None)
    constants |= dict.fromkeys(("current_stream", "default_stream", "Stream", "Event", "stream"), stream)
    constants |= {"is_initialized": True, "device": nullcontext()}
    for name, value in constants.items():
        yield cuda, name, lambda *args, value=value, **kwargs: value
    yield torch.accelerator, "current_stream", lambda *args: stream
    yield cuda, "synchronize", lambda *args: gpu.wait("synchronize")
    yield cuda, "manual_seed", torch.manual_seed
    generator = torch.Generator
    yield torch, "Generator", lambda *args, **kwargs: generator()
    for module, name in ((cuda, "{}_rng_state"), (random, "_{}_cuda_rng_state")):
        yield module, name.format("get"), lambda *args, **kwargs: torch.get_rng_state()
        yield module, name.format("set"), lambda state, *args, **kwargs: torch.set_rng_state(state)

    def on_gloo(function: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("device_id", None)
            args, kwargs["backend"] = (args[1:], "gloo") if args and args[0] == "nccl" else (args, "gloo")
            return function(*args, **kwargs)

        return wrapper

    for module in (dist, c10d):
        yield module, "init_process_group", on_gloo(c10d.init_process_group)
        yield module, "new_group", on_gloo(c10d.new_group)
    wait = dist.Work.wait

    def wait_for_gloo(work: dist.Work, *args: Any) -> Any:
        with patch.object(gpu, "is_in_kernel", True):  # gloo imitates reductions to parts with copies of its own
            return wait(work, *args)

    yield dist.Work, "wait", wait_for_gloo
    yield c10d, "_get_object_coll_device", lambda group=None: "cuda"
