"""Reads a checkpoint's files without running code that somebody has put into them: every reader of a checkpoint's
tensors goes through here.

A checkpoint of torch consists of pickles, and a pickle can call any function when it is read. megatron-core and torch
read `.metadata` and the objects of `*.distcp` (`_extra_state`, random states) as such. Here `.metadata` may build
nothing but the classes that describe tensors, and all else is read by torch.load(weights_only=True). Checkpoints of
earlier versions hold extra states that Transformer Engine has pickled, for FP8: these are looked through too.

torch.save stores a CRC-32 with each tensor, which torch.load does not compare: changed values are noticed here too.
"""

import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, EnumMeta
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_bytes

METADATA = ".metadata"
COMMON = "common.pt"
MAX_METADATA_BYTES = 2**30
MAX_TUPLE = 10_000

_BASE = "torch.distributed.checkpoint"
_METADATA_NAMES = {
    f"{_BASE}.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_BASE}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    f"{_BASE}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "torch": ("Size", *sorted(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
}
"""What `.metadata` may name, by module: the classes of torch's distributed checkpoints, shapes, dtypes."""
_TE_NAMES = {
    "transformer_engine.common.recipe": (
        *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"),
        *("Format", "_FormatHelper", "MMParams", "QParams"),
    ),
    "megatron.core.extensions.transformer_engine": ("TEDelayedScaling",),
    "torch._utils": ("_rebuild_tensor_v2",),
    "torch._tensor": ("_rebuild_from_type_v2",),
    "torch.storage": ("UntypedStorage", "_load_from_bytes"),
    "megatron.core.safe_globals": ("safe_load_from_bytes",),
    "torch": ("Size", "Tensor"),
    "builtins": ("set", "frozenset"),
    "collections": ("OrderedDict",),
}
"""What Transformer Engine's own pickle of an FP8 state holds: recipes and tensors."""
_load = torch.load


def _bounded(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let a tuple stand for at most MAX_TUPLE values: the hash of sixty pairs in each other would never end."""

    def load_bounded(unpickler: Any) -> None:
        load(unpickler)
        waiting, count = [unpickler.stack[-1]], 0
        while waiting:
            inner = waiting.pop()
            waiting += inner if isinstance(inner, tuple) else ()
            count += 1
            if count > MAX_TUPLE:
                raise pickle.UnpicklingError(f"a tuple stands for more than {MAX_TUPLE} values")

    return load_bounded


class _Unpickler(pickle._Unpickler):
    """Builds objects of the allowed classes alone; in Python, because the one in C lets a pickle change classes.

    Its memory is bounded by the pickle's size too, while the one in C takes gigabytes for one number of a memo.
    """

    allowed = _METADATA_NAMES
    dispatch = dict(pickle._Unpickler.dispatch)
    for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[_code[0]] = _bounded(dispatch[_code[0]])

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self.enum_member
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} ")
        # Python 3.13 has moved it; here it is only the name that a checkpoint was saved under.
        return PosixPath if name == "PosixPath" else super().find_class(module, name)

    def load_build(self) -> None:
        inst = self.stack[-2]
        if type(inst).__name__ not in self.allowed.get(type(inst).__module__, ()):
            raise pickle.UnpicklingError(f"GLOBAL {type(inst).__name__}.__setstate__ ")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    @staticmethod
    def enum_member(owner: Any, name: str) -> Any:
        """Stands for getattr, as which Python 3.11.0 to 3.11.3 pickle a member of an enum."""
        if not (isinstance(owner, EnumMeta) and name in owner.__members__):
            raise pickle.UnpicklingError("GLOBAL builtins.getattr ")
        return owner[name]


class _Nothing:
    """Stands for an object of Transformer Engine, which is not installed where a checkpoint may be inspected."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Nothing":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class _Format(Enum):
    """Stands for Transformer Engine's enum of FP8 formats."""

    E2M1, E4M3, E5M2, HYBRID = range(4)

    @classmethod
    def _missing_(cls, value: object) -> "_Format":
        return cls.HYBRID


class _LooksThrough(_Unpickler):
    """Goes through Transformer Engine's pickle without building what it describes."""

    allowed = _TE_NAMES | {__name__: ("_Nothing",)}

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.allowed.get(module, ()) or module in ("builtins", "collections"):
            return super().find_class(module, name)
        return _STAND_INS.get(name, _Nothing)


class _RebuiltTensor:
    """Stands for the function that makes a tensor of a storage."""

    def __new__(cls, *args: object) -> _Nothing:
        return _Nothing()


def _rebuild_from_type(function: object, *rest: object) -> _Nothing:
    """Stands for the function that gives a tensor its attributes, after it has called the one it is given."""
    if function is not _RebuiltTensor:  # such as the one that loads bytes, which would not have been looked through
        raise pickle.UnpicklingError("GLOBAL torch._tensor._rebuild_from_type_v2 ")
    return _Nothing()


def _load_inner(data: bytes) -> Any:
    return _load(io.BytesIO(data), map_location="cpu", weights_only=True)


_STAND_INS = {
    "Format": _Format,
    "_load_from_bytes": _load_inner,
    "safe_load_from_bytes": _load_inner,
    "_rebuild_tensor_v2": _RebuiltTensor,
    "_rebuild_from_type_v2": _rebuild_from_type,
}


@contextmanager
def safe_reads() -> Iterator[None]:
    """Make torch's and megatron-core's readers of checkpoints safe inside, in this process.

    They raise a CheckpointError for a pickle that could run code and for values that were changed.
    """
    held = torch.load, FileSystemReader.read_metadata
    torch.load, FileSystemReader.read_metadata = _safe_load, _read_metadata
    try:
        yield
    finally:
        torch.load, FileSystemReader.read_metadata = held
        _unpickle.cache_clear()


def _read_metadata(reader: FileSystemReader, *args: object, **kwargs: object) -> Metadata:
    metadata = read_metadata(Path(reader.path))
    metadata.storage_meta.load_id = reader.load_id
    return metadata


class WeightsReader(FileSystemReader):
    """Reader of a checkpoint whose `.metadata` is read once, however many loads there are."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._metadata = read_metadata(Path(folder))

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Return what describes the tensors."""
        return self._metadata


def read_metadata(folder: Path) -> Metadata:
    """Read `.metadata` of a checkpoint, which says where in which file each tensor and object is.

    Raises:
        CheckpointError: names the file, which is missing or damaged, could run code, or points out of the folder.
    """
    file = folder / METADATA
    data = read_bytes(file, MAX_METADATA_BYTES, "copy the checkpoint again", CheckpointError)
    with _one_line(str(file)):
        metadata = _unpickle(data)
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{file} is damaged: it holds a {type(metadata).__name__}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = torch.distributed.checkpoint.metadata.StorageMeta()
        sizes: dict[str, int] = {}
        for index, place in metadata.storage_data.items():
            _check_place(folder, index, place, sizes)
        kinds = (TensorStorageMetadata, BytesStorageMetadata)
        for key, value in metadata.state_dict_metadata.items():
            if not (isinstance(value, kinds) and isinstance(key, str) and key.isprintable()):
                raise CheckpointError(f"{file} is damaged: it does not describe {key!a:.200}")
    return metadata


@lru_cache(maxsize=1)
def _unpickle(data: bytes) -> Any:
    """Read a `.metadata`; it is kept until the end of safe_reads, because a load asks for it four times."""
    return _Unpickler(io.BytesIO(data)).load()


def _check_place(folder: Path, index: MetadataIndex, place: _StorageInfo, sizes: dict[str, int]) -> None:
    name = place.relative_path
    if getattr(place, "transform_descriptors", None):
        raise CheckpointError(f"{folder / METADATA} is damaged: it has {index.fqn} compressed, as no checkpoint does")
    if name not in sizes:
        if Path(name).name != name or not name.endswith(".distcp"):
            raise CheckpointError(
                f"{folder / METADATA} is damaged: it places {index.fqn} in {name!r}, not in a .distcp"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder} cannot be loaded: {name} is missing")
        sizes[name] = (folder / name).stat().st_size
    if not (0 <= place.offset and 0 < place.length and place.offset + place.length <= sizes[name]):
        raise CheckpointError(
            f"checkpoint {folder} cannot be loaded: {name} has {sizes[name]} bytes, too few for {index.fqn}"
        )


def check_objects(folder: Path) -> None:
    """Read everything in a checkpoint that is no tensor, so that code in it is refused by its file's name.

    Raises:
        CheckpointError: names the file and what in it is damaged or could run code.
    """
    _check(folder, lambda described: isinstance(described, BytesStorageMetadata))


def check_all(folder: Path) -> None:
    """Read every tensor and object in a checkpoint and compare the CRC-32 of each.

    Raises:
        CheckpointError: names the file and what in it is damaged or could run code.
    """
    _check(folder, lambda described: True)


def _check(folder: Path, is_checked: Any) -> None:
    metadata = read_metadata(folder)
    places = sorted((p.relative_path, p.offset, i.fqn, p) for i, p in metadata.storage_data.items())
    for name, offset, key, place in places:
        described = metadata.state_dict_metadata.get(key)
        if is_checked(described):
            with open(folder / name, "rb") as file:
                value = _safe_load(_Part(file, offset, place.length), what=key)
                if isinstance(described, TensorStorageMetadata) and not isinstance(value, Tensor):
                    raise CheckpointError(f"{folder / name}: {key} is a {type(value).__name__}, not a tensor")
    if (folder / COMMON).is_file():
        _safe_load(folder / COMMON)


class _Part(io.RawIOBase):
    """A part of an open file, as a file of its own; torch's own view cannot be sought from its end."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0
        self.name = file.name

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (0, self.position, self.length)[whence]
        if start + offset < 0:
            raise ValueError("negative seek")
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.position)])
        self.position += count
        return count


def _safe_load(file: Any, *args: object, what: str = "", **kwargs: object) -> Any:
    """torch.load of a file of a checkpoint, of a part of one, or of bytes from one: tensors and plain values alone."""
    if hasattr(file, "base_stream"):  # torch's view of a part of a file
        file = _Part(file.base_stream, file.offset, file.len)
    where = str(getattr(file, "name", file if isinstance(file, str | Path) else "an object of a checkpoint"))
    is_file = isinstance(file, str | Path)
    with _one_line(f"{where}: {what}" if what else where):
        if is_file:
            file = io.BytesIO(read_bytes(file, MAX_METADATA_BYTES, "copy the checkpoint again", CheckpointError))
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise CheckpointError(f"{where} is damaged: it is compressed, as no checkpoint is")
            file.seek(0)
            value = _load(file, map_location="cpu", weights_only=True)
            for member in members:
                _compare_crc(archive, member, value)
        if not is_file and not isinstance(value, Tensor):
            _look_through(value, where)
    return value


def _compare_crc(archive: zipfile.ZipFile, member: zipfile.ZipInfo, value: Any) -> None:
    if isinstance(value, Tensor) and member.filename.endswith("/data/0"):
        # What torch has read already; large, so it is not read again.
        stored = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        if zlib.crc32(stored.numpy()) != member.CRC:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {member.filename!r}")
    else:
        archive.read(member)  # which compares


def _look_through(value: Any, where: str) -> None:
    """Refuse bytes in an extra state that Transformer Engine would unpickle, unless they hold what it writes."""
    if type(value) is not list:  # megatron-core saves lists, and would take another container's items too
        raise CheckpointError(f"{where} is damaged: it holds a {type(value).__name__}, where a checkpoint has a list")
    for item in value:
        if isinstance(item, Tensor) and item.numel():
            if item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise CheckpointError(f"{where} is damaged: a tensor of {item.numel()} values has fewer in the file")
            _LooksThrough(io.BytesIO(item.numpy().tobytes())).load()
        elif isinstance(item, io.BytesIO):
            _load_inner(item.getvalue())


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle or zip raises nearly every type
        named = re.search(r"GLOBAL (\S+) ", str(error))
        if named:
            reason = f"it holds {named[1]}, which no checkpoint needs and which can run any code when it is read"
            raise CheckpointError(f"{where} is refused: {reason}; do not use this checkpoint") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{where} is damaged: {reason.split('. ')[0]}") from error
