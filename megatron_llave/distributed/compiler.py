"""Keeps torch's compiler unloaded where there is no GPU; megatron-core's import would load all of it.

The import of the package arranges this without loading torch itself, so that what needs no torch starts at once.
"""

import functools
import importlib.abc
import sys
from collections.abc import Callable
from typing import Any


class _BeforeMegatronCore(importlib.abc.MetaPathFinder):
    """Finds no module, but sees the first import of megatron.core before it is found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "megatron.core":
            sys.meta_path.remove(self)
            keep_compiler_unloaded()


def keep_compiler_unloaded_by_megatron_core() -> None:
    """Call `keep_compiler_unloaded` when megatron-core is imported for the first time; after that, do nothing."""
    if "megatron.core" not in sys.modules and not any(isinstance(f, _BeforeMegatronCore) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeMegatronCore())


def keep_compiler_unloaded() -> None:
    """Replace torch.compile for megatron-core by a function that compiles nothing; other callers get torch's own.

    At its import megatron-core compiles fused functions, which are not called on a CPU. That would load the whole
    compiler, which takes 4 of the 9 seconds of a process's start. Nothing is replaced where CUDA is available.
    """
    import torch

    if torch.cuda.is_available() or hasattr(torch.compile, "original"):
        return
    original = torch.compile

    @functools.wraps(original)
    def compile(model: Callable | None = None, **options: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return model if model is not None else lambda function: function
        return original(model, **options)

    compile.original = original
    torch.compile = compile
