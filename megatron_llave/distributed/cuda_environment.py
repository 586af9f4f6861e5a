"""Environment variables that CUDA and torch's allocator read when the GPU is first used.

The import of the package sets them, before it asks whether there is a GPU. So every command has them, however it was
started: by a launch file, torchrun, SLURM or Kubernetes. What the user has set stays.
"""

from collections.abc import MutableMapping

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name of torch's variable since torch 2.9, and the one before; torch warns where only the latter is set."""


def set_defaults(env: MutableMapping[str, str]) -> None:
    """Set the variables in `env` that are not set.

    Kernels start in the order of their launches, as megatron-core's tensor-parallel layers need it. The allocator's
    segments can grow, since packed rows of ever new lengths leave gaps in segments of fixed sizes.
    """
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not any(name in env for name in ALLOCATOR):
        env.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))
