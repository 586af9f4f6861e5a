"""A checkpoint from elsewhere runs no code, whatever reads it, and changed values are noticed; good ones load."""

import collections
import io
import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest
import torch
from golden_model import ONEVISION
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

from megatron_llave.checkpoint.merge import merge
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.checkpoint.safe_reads import check_all, check_objects, read_metadata
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.convert.hf import export_hf, import_hf
from megatron_llave.convert.inspect import inspect
from megatron_llave.errors import CheckpointError
from megatron_llave.models import build_model

METADATA, DATA, COMMON = ".metadata", "__0_0.distcp", "common.pt"
WEIGHT = "language.decoder.final_layernorm.weight"
EXTRA_STATE = "language.decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2"
CLASS = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n"


class Canary:
    """Makes the folder `sung` in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("sung",)


class Getter:
    """Reaches for what is not named in the pickle."""

    def __reduce__(self) -> tuple:
        return getattr, (Metadata, "__init__")


class ByName(pickle.Pickler):
    """Writes a member of an enum as getattr of its class, as Python 3.11.0 to 3.11.3 do; others store its value."""

    def reducer_override(self, value: object) -> object:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def dumps_by_name(value: object) -> bytes:
    data = io.BytesIO()
    ByName(data).dump(value)
    return data.getvalue()


class EnumGetter:
    """Reaches for an attribute of an enum that is no member of it."""

    def __reduce__(self) -> tuple:
        return getattr, (_MEM_FORMAT_ENCODING, "__init__")


class Items:
    """Lets an allowed container take its items from a canary."""

    def __reduce__(self) -> tuple:
        return collections.OrderedDict, (), None, None, iter([("key", Canary())])


@pytest.fixture(scope="module")
def checkpoint(groups: ProcessGroupCollection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_hf(ONEVISION, tmp_path_factory.mktemp("good") / "checkpoint", groups)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to do harm to, without its manifest: whoever does harm would write a new one."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json")))


def load(folder: Path, out: Path, groups: ProcessGroupCollection) -> None:
    """As load_model, embed, evaluate, verify, checkpoint.init do, and a resumed run does for its weights."""
    pretrained = find_pretrained(folder)
    chunks = build_model(pretrained.cfg.model, ParallelConfig(), groups, torch.device("cpu"), seed=None)
    pretrained.load(chunks, groups)


TOOLS: dict[str, Callable[[Path, Path, ProcessGroupCollection], object]] = {
    "load": load,
    "inspect": lambda folder, out, groups: inspect(folder, groups),
    "export": lambda folder, out, groups: export_hf(folder, out, groups),
    "merge": lambda folder, out, groups: merge([(folder, 0.5), (folder, 0.5)], out, groups),
}


def write_metadata(folder: Path, metadata: object) -> None:
    (folder / METADATA).write_bytes(metadata if isinstance(metadata, bytes) else pickle.dumps(metadata))


def into_metadata(folder: Path) -> None:
    """Into a field that nobody reads, so that the rest works on."""
    metadata = FileSystemReader(folder).read_metadata()
    metadata.planner_data = {"harmless": Canary()}
    write_metadata(folder, metadata)


def put_item(folder: Path, key: str, value: object) -> None:
    """Append `value` to the data file, and let the item of this key be there, an object if there is no such item."""
    metadata, data = FileSystemReader(folder).read_metadata(), io.BytesIO()
    torch.save(value, data)
    if key not in metadata.state_dict_metadata:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
    index = next((index for index in metadata.storage_data if index.fqn == key), MetadataIndex(key))
    start = (folder / DATA).stat().st_size
    metadata.storage_data[index] = _StorageInfo(DATA, start, len(data.getvalue()))
    with open(folder / DATA, "ab") as file:
        file.write(data.getvalue())
    write_metadata(folder, metadata)


def instead_of_state(value: object) -> Callable[[Path], None]:
    """In the place of the extra state of a layer, which checkpoints of earlier versions have."""
    return lambda folder: put_item(folder, EXTRA_STATE, value)


def into_state(*values: object) -> Callable[[Path], None]:
    return instead_of_state(list(values))


def as_te_writes(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


class Inner:
    """Bytes that Transformer Engine's unpickling would give to torch.load, which unpickles them once more."""

    def __reduce__(self) -> tuple:
        data = io.BytesIO()
        torch.save(Canary(), data)
        return torch.storage._load_from_bytes, (data.getvalue(),)


ATTACKS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "metadata": (METADATA, lambda folder: write_metadata(folder, [Canary()])),
    "metadata that works on": (METADATA, into_metadata),
    "metadata with getattr": (METADATA, lambda folder: write_metadata(folder, Getter())),
    "metadata with getattr of an enum": (METADATA, lambda folder: write_metadata(folder, EnumGetter())),
    "metadata with a container": (METADATA, lambda folder: write_metadata(folder, Items())),
    "metadata with a path through a class": (
        METADATA,
        lambda folder: write_metadata(
            folder, b"\x80\x04\x8c\x26torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93."
        ),
    ),
    "metadata that changes a class": (
        METADATA,
        lambda folder: write_metadata(folder, CLASS + b"N}U\x04harmK\x01s\x86b."),
    ),
    "extra state": (DATA, into_state(Canary())),
    "extra state, nested": (DATA, into_state({"a": [(Canary(),)]})),
    "extra state in a container": (DATA, into_state(Items())),
    "extra state of Transformer Engine": (DATA, into_state(as_te_writes(pickle.dumps({"recipe": Canary()})))),
    "the same in pickle's first protocol": (DATA, into_state(as_te_writes(pickle.dumps(Canary(), 0)))),
    "the same as other numbers": (DATA, into_state(as_te_writes(pickle.dumps(Canary())).view(torch.int8))),
    "the same with a tensor in it": (DATA, into_state(as_te_writes(pickle.dumps({"scale": Inner()})))),
    "the same in a tuple": (DATA, instead_of_state((as_te_writes(pickle.dumps(Canary())),))),
    "the same as a key": (DATA, instead_of_state({as_te_writes(pickle.dumps(Canary())): 0})),
    "more values than bytes": (DATA, into_state(torch.zeros(1, dtype=torch.uint8).expand(2**33))),
    "the same as a file": (DATA, into_state(io.BytesIO(pickle.dumps(Canary())))),
    "tensor": (DATA, lambda folder: put_item(folder, WEIGHT, Canary())),
    "common": (COMMON, lambda folder: torch.save({"step": 0, "optimizer": Canary()}, folder / COMMON)),
}

BY_EVERY_TOOL = {"metadata that works on", "extra state", "extra state of Transformer Engine", "tensor", "common"}
"""One attack on each kind of file and item; the others vary the pickle, which all tools read by the same function."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_tool_runs_what_a_checkpoint_holds(folder: Path, groups, capsys, attack: str) -> None:
    file, harm = ATTACKS[attack]
    harm(folder)
    assert not Path("sung").exists()
    for name in TOOLS if attack in BY_EVERY_TOOL else ("load", "inspect"):
        tool = TOOLS[name]
        with pytest.raises(CheckpointError, match=file) as error:
            tool(folder, folder.parent / "out", groups)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500, name
        assert not Path("sung").exists() and not (folder.parent / "out").exists(), name
    assert "complete" not in capsys.readouterr().out and not hasattr(Metadata, "harm")
    if attack in ("metadata", "metadata that works on"):
        pickle.loads((folder / METADATA).read_bytes())
        assert Path("sung").exists(), "the canary of this test does not sing"


def test_tuples_in_tuples_end(folder: Path) -> None:
    """Their hash, as a key, takes a time that doubles with each."""
    write_metadata(folder, b"\x80\x04}" + b")" + b"2\x86" * 60 + b"K\x01s.")
    with pytest.raises(CheckpointError, match="is damaged: a tuple stands for more than 10000 values"):
        read_metadata(folder)


def test_environment_cannot_bring_pickles_back(folder: Path, groups, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"step": 0, "optimizer": Canary()}, folder / COMMON)
    with pytest.raises(CheckpointError, match="common.pt is refused: it holds posix.mkdir"):
        load(folder, folder, groups)
    assert not Path("sung").exists()


def test_metadata_of_every_python_version_is_read(folder: Path) -> None:
    metadata = read_metadata(folder)
    data = dumps_by_name(metadata)
    assert b"getattr" in data
    write_metadata(folder, data)
    assert read_metadata(folder) == metadata


def test_fp8_state_of_transformer_engine_is_read(folder: Path, groups, capsys, monkeypatch) -> None:
    recipe = types.ModuleType("transformer_engine.common.recipe")
    recipe.DelayedScaling = type("DelayedScaling", (), {"__module__": recipe.__name__})
    recipe.Format = Enum("Format", {"HYBRID": (448, 57344)}, module=recipe.__name__)
    for name in ("transformer_engine", "transformer_engine.common", recipe.__name__):
        monkeypatch.setitem(sys.modules, name, recipe)
    state = {"recipe": recipe.DelayedScaling(), "scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}
    state["recipe"].fp8_format = recipe.Format.HYBRID
    pickles = dumps_by_name(state), pickle.dumps(state)
    assert b"getattr" in pickles[0] and pickles[0] != pickles[1]
    monkeypatch.undo()
    monkeypatch.chdir(folder.parent)
    for data in pickles:
        into_state(as_te_writes(data))(folder)
        check_objects(folder)
    assert inspect(folder, groups) == 0 and "complete: every tensor is there" in capsys.readouterr().out
    load(folder, folder, groups)
    into_state(torch.empty(0, dtype=torch.uint8))(folder)  # what the other recipes write
    load(folder, folder, groups)


def load_inside(data: bytes) -> tuple:
    """The call that loads a storage inside of Transformer Engine's pickle."""
    return torch.storage._load_from_bytes, (data,)


def load_by_another_call(data: bytes) -> tuple:
    """The same call, made by a function that is given the function to call."""
    return torch._tensor._rebuild_from_type_v2, (torch.storage._load_from_bytes, torch.Tensor, (data,), None)


@pytest.mark.parametrize("call", [load_inside, load_by_another_call])
def test_canary_inside_an_fp8_state_is_refused(folder: Path, groups, monkeypatch, call: Callable) -> None:
    inner = io.BytesIO()
    torch.save(Canary(), inner)
    state = type("State", (), {"__reduce__": lambda self: call(inner.getvalue())})()
    data = pickle.dumps({"recipe": None, "scale_fwd": state})
    monkeypatch.chdir(folder.parent)
    into_state(as_te_writes(data))(folder)
    with pytest.raises(CheckpointError, match="is refused: it holds (posix.mkdir|torch._tensor._rebuild_from_type)"):
        load(folder, folder, groups)
    assert not Path("sung").exists()
    parameter = torch.ones(3)
    parameter.mark = 1  # with an attribute, whose pickle has the same two functions in their right places
    into_state(as_te_writes(pickle.dumps({"scale_fwd": parameter})))(folder)
    load(folder, folder, groups)


def test_a_changed_value_is_noticed(folder: Path, groups) -> None:
    metadata = read_metadata(folder)
    index, place = next(
        (index, place)
        for index, place in metadata.storage_data.items()
        if "projector" in index.fqn and "weight" in index.fqn
    )
    check_all(folder)
    with open(folder / DATA, "r+b") as file:
        file.seek(place.offset + place.length // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    for tool in TOOLS.values():
        with pytest.raises(CheckpointError, match=f"{DATA}.* is damaged: Bad CRC-32"):
            tool(folder, folder.parent / "out", groups)


def test_every_tool_checks_the_manifest(checkpoint: Path, tmp_path: Path, groups) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text[: text.index("prompt:")])
    for tool in TOOLS.values():
        with pytest.raises(CheckpointError, match="config.yaml has .* bytes, written were"):
            tool(folder, tmp_path / "out", groups)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda place: replace(place, relative_path="../copy/__0_0.distcp"), "places .* not in a .distcp"),
        (lambda place: replace(place, relative_path="__9_9.distcp"), "__9_9.distcp is missing"),
        (lambda place: replace(place, length=10**400), "too few"),
        (lambda place: replace(place, offset=-1), "too few"),
        (lambda place: replace(place, transform_descriptors=["zstd"]), "compressed"),
        (lambda place: None, ".metadata is damaged"),
    ],
)
def test_places_out_of_the_folder_or_file_are_refused(folder: Path, change: Callable, named: str) -> None:
    metadata = read_metadata(folder)
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index] = change(metadata.storage_data[index])
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointError, match=named):
        read_metadata(folder)
