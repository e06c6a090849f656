"""The pickles in a state checkpoint, read so that no code in them runs.

torch.distributed.checkpoint writes two kinds. ``.metadata`` is a pickle of its own dataclasses: it
is read here by an unpickler that knows these classes, and nothing else. Values that are no tensors
are pickled by ``torch.save``: they are read with ``weights_only=True``, while torch's own planner
reads them with ``weights_only=False``.

A planner or reader of the user's is asked only after the same bytes have passed here. What cannot
be helped: a reader that unpickles other files than ``.metadata``, a planner that unpickles other
bytes than those it is given.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from wrappers.state.files import StateError

__all__ = ["CheckingPlanner", "SafeLoadPlanner", "SafeReader", "check_metadata"]

METADATA = ".metadata"

_DCP = "torch.distributed.checkpoint"
#: All that ``.metadata`` may name, in torch 2.11 to 2.13. None of it does more than hold data.
_ALLOWED = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


_InPython: Any = pickle._Unpickler


class _Unpickler(_InPython):  # type: ignore[misc]
    """Knows data classes only, and sets attributes of their instances only.

    The one in Python. That in C would let a file set attributes of the classes themselves, and
    take memory for whatever number of memos a file names.
    """

    dispatch: ClassVar = dict(_InPython.dispatch)

    def load_build(self) -> None:
        """The opcode that sets attributes."""
        kind = type(self.stack[-2])
        if not dataclasses.is_dataclass(kind):
            raise pickle.UnpicklingError(f"it sets attributes of a {kind.__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not (is_dtype or name in _ALLOWED.get(module, ())):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """Read ``.metadata`` of a state checkpoint without running any code in it.

    Raises:
        StateError: It holds something else than metadata.
        OSError: It cannot be read.
    """
    file = path / METADATA
    with open(file, "rb") as stream:
        try:
            metadata = _Unpickler(stream).load()
        except Exception as error:
            raise StateError(file, _refusal("cannot be read safely", error)) from error
    if not isinstance(metadata, Metadata):
        raise StateError(file, f"holds no metadata but a {type(metadata).__name__}")
    return metadata


def check_metadata(path: Path) -> None:
    """Refuse unsafe metadata before a reader of the user's opens it."""
    if (path / METADATA).exists():
        read_metadata(path)


def _refusal(what: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{what}: {type(error).__name__}: {reason}. Unpickling it could run any code. If you trust "
        "whoever could write this file, pass trust_pickles=True"
    )


class SafeReader(FileSystemReader):
    """Reads the files of one state checkpoint, and its metadata safely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``; refuses entries that lie outside of the directory."""
        path = Path(self.path)
        metadata = read_metadata(path)
        for info in (metadata.storage_data or {}).values():
            name = getattr(info, "relative_path", None)
            if type(name) is not str or Path(name).is_absolute() or ".." in Path(name).parts:
                raise StateError(path / METADATA, f"has an entry in another place: {name}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _load_value(path: Path, metadata: Metadata | None, item: ReadItem, value: io.BytesIO) -> Any:
    """What ``torch.save`` has written as a value that is no tensor.

    Raises:
        StateError: It is something that only an unsafe load could read.
    """
    try:
        return torch.load(value, map_location="cpu", weights_only=True)
    except Exception as error:
        infos: Any = getattr(metadata, "storage_data", None) or {}
        file = path / getattr(infos.get(item.storage_index), "relative_path", "")
        what = f"its entry `{item.storage_index.fqn}` cannot be read safely"
        raise StateError(file, _refusal(what, error)) from error


class SafeLoadPlanner(DefaultLoadPlanner):
    """torch's planner for a flat state dict, without its ``weights_only=False``.

    Args:
        path: The state checkpoint, for errors.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value into the state dict."""
        loaded = _load_value(self._path, self.metadata, read_item, value)
        self.original_state_dict[read_item.dest_index.fqn] = loaded


class CheckingPlanner:
    """A load planner of the user's, given only bytes that hold no code.

    Args:
        planner: The planner; everything else is its own.
        path: The state checkpoint, for errors.
    """

    def __init__(self, planner: LoadPlanner, path: Path) -> None:
        self._planner = planner
        self._path = path
        self._metadata: Metadata | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_planner"], name)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata, is_coordinator: bool
    ) -> None:
        """Note where entries lie, for errors."""
        self._metadata = metadata
        self._planner.set_up_planner(state_dict, metadata, is_coordinator)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Look through the bytes before the planner gets them."""
        start = value.tell()
        _load_value(self._path, self._metadata, read_item, value)
        value.seek(start)
        self._planner.load_bytes(read_item, value)
