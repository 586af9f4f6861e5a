"""The environment of CUDA: what is set when, and what the user has set."""

import importlib
import os

import pytest
import torch
import torch.distributed as dist

import megatron_llave
from megatron_llave.distributed import compiler, process_groups
from megatron_llave.distributed.cuda_environment import ALLOCATOR, set_defaults

DEFAULTS = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **dict.fromkeys(ALLOCATOR, "expandable_segments:True")}


def test_what_the_user_has_set_stays() -> None:
    empty: dict[str, str] = {}
    set_defaults(empty)
    assert empty == DEFAULTS
    for given in ({"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, *({name: "backend:native"} for name in ALLOCATOR)):
        env = dict(given)
        set_defaults(env)
        assert given.items() <= env.items()
        assert not set(given) & set(ALLOCATOR) or set(ALLOCATOR) & set(env) == set(given), "the names would contradict"


def test_import_sets_them_before_anything_can_ask_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(compiler, "keep_compiler_unloaded_by_megatron_core", lambda: seen.append(dict(os.environ)))
    importlib.reload(megatron_llave)
    assert DEFAULTS.items() <= seen[0].items()


def test_process_has_its_gpu_and_groups_have_communicators_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: given.update(backend=backend, **rest))
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    assert process_groups.initialize_distributed(60) == 8
    assert given["backend"] == "nccl" and chosen == [3] and "device_id" not in given
