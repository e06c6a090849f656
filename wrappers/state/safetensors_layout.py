"""The layout ``"safetensors"``, in which nothing is pickled.

::

    model.safetensors      the whole model under its plain names
    shard-*.safetensors    optimizers, random states, ...: each rank its own shards
    state.json             everything that is no tensor

Each rank writes its shards in the format that torch.distributed.checkpoint has for safetensors, the
coordinator makes one file of those of the model, and torch's reader reads both. Invariant: an
entry's name tells where it is. The model's have their plain names, all others begin with a dot, as
no parameter's name does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from wrappers.state import files, plain
from wrappers.state.contents import MODEL, StateDict
from wrappers.state.faults import Agreement
from wrappers.state.files import StateError

__all__ = ["SafetensorsWriter", "Values", "require_safetensors", "write_values"]

VALUES = "state.json"
MODEL_FILE = "model.safetensors"

#: The words of safetensors for types that can be written and read (its 0.8 writes more).
_WORDS = {
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}


def require_safetensors() -> None:
    """Raise ImportError, with the remedy, where the package is not installed."""
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the layout 'safetensors' needs the package safetensors: "
            "pip install activation-wrappers[state]"
        ) from error


def _name_of(key: str) -> str:
    """An entry's name in safetensors files: the plain one for the model's, ``.<key>`` for others.

    No parameter's name begins with a dot.
    """
    return key[len(MODEL) :] if key.startswith(MODEL) else f".{key}"


def _key_of(name: str) -> str:
    return name[1:] if name.startswith(".") else MODEL + name


def write_values(agreement: Agreement, directory: Path, state: StateDict) -> dict[str, Tensor]:
    """Write all ranks' values to one JSON file; return the tensors by their names in files."""
    tensors = {_name_of(key): each for key, each in state.items() if isinstance(each, Tensor)}

    def encode() -> dict[str, Any]:
        values = {}
        for key, each in state.items():
            if not isinstance(each, Tensor):
                inside: dict[str, Tensor] = {}
                values[key] = plain.encode(f".{key}", each[0], inside)
                tensors.update(inside)
        return values

    def write_all(of_ranks: list[dict[str, Any]]) -> None:
        merged = {key: value for values in reversed(of_ranks) for key, value in values.items()}
        files.write_json(directory / VALUES, merged)

    agreement.reduce("values", encode, write_all)
    return tensors


# --- Writing --------------------------------------------------------------------------------


class SafetensorsWriter(HuggingFaceStorageWriter):
    """Writes each rank's shards as torch's reader wants them, then makes one file of the model's.

    Holds one tensor at a time in host memory: a shard on each rank, then a whole one on the
    coordinator. torch's own writing would hold three copies of a rank's shards (torch 2.13), and
    its consolidation would lose the values of tensors without dimensions, and take no integers;
    neither is used.

    Args:
        directory: Where to write.

    Attributes:
        replaced: Files that were written and are gone, as the model's file holds all of them.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(path=str(directory), save_distributed=True)
        self.replaced: set[str] = set()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what one file cannot hold, and what torch's reader would not read."""
        counts = Counter(item.index.fqn for item in plan.items)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(
                f"`{twice[0]}` has several shards on one rank, which the layout 'safetensors' "
                "cannot hold: use layout='dcp'"
            )
        for item in plan.items:
            if item.tensor_data is not None and item.tensor_data.properties.dtype not in _WORDS:
                raise TypeError(
                    f"`{item.index.fqn}` is {item.tensor_data.properties.dtype}, which the layout "
                    "'safetensors' cannot hold: use layout='dcp'"
                )
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shards: the model's into one file, all others into another."""
        rank: int = plan.storage_data["shard_index"]
        results = []
        for part in ("model", "others"):
            items = [item for item in plan.items if _part_of(item.index.fqn) == part]
            if items:
                place = _Place(f"shard-{rank:05}-{part}.safetensors")
                with self.fs.create_stream(Path(self.path) / place.relative_path, "wb") as stream:
                    _write_shards(items, planner, stream)
                results += [WriteResult(item.index, _num_bytes(item), place) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Make one file of the model's shards, and remove them."""
        shards = {
            result.storage_data.relative_path
            for of_rank in results
            for result in of_rank
            if _part_of(result.index.fqn) == "model"
        }
        if shards:
            directory = Path(self.path)
            with self.fs.create_stream(directory / MODEL_FILE, "wb") as stream:
                _join(directory, sorted(shards), metadata, stream)
            for name in shards:
                os.remove(directory / name)
            self.replaced = shards


@dataclass(frozen=True)
class _Place:
    relative_path: str


def _part_of(name: str) -> str:
    return "others" if name.startswith(".") else "model"


def _num_bytes(item: Any) -> int:
    data = item.tensor_data
    return int(data.chunk.sizes.numel() * data.properties.dtype.itemsize)


def _write_shards(items: list[WriteItem], planner: SavePlanner, stream: Any) -> None:
    """Write a safetensors file of shards that says where in their tensors they begin."""
    sharding, kinds = {}, {}
    for item in items:
        data: Any = item.tensor_data
        sharding[item.index.fqn] = {"saved_offsets": list(data.chunk.offsets)}
        kinds[item.index.fqn] = (data.properties.dtype, data.chunk.sizes)
    by_name = {item.index.fqn: item for item in items}
    for name in _write_header(kinds, {"DCP_SHARDING_INFO": json.dumps(sharding)}, stream):
        shard: Any = planner.resolve_data(by_name[name])
        if (shard.dtype, shard.shape) != kinds[name]:
            raise TypeError(
                f"`{name}` was planned as {kinds[name][0]} {tuple(kinds[name][1])}, and the "
                f"planner gives {shard.dtype} {tuple(shard.shape)}"
            )
        _write_tensor(shard, stream)


def _write_header(
    kinds: dict[str, tuple[torch.dtype, torch.Size]], metadata: dict[str, str], stream: Any
) -> list[str]:
    """Write what begins a safetensors file; return the names in the order of their data."""
    # Wide elements first, so that each tensor's data is aligned.
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        dtype, shape = kinds[name]
        start, end = end, end + shape.numel() * dtype.itemsize
        word = _WORDS[dtype]
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    return order


def _write_tensor(tensor: Tensor, stream: Any) -> None:
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if data.numel():
        stream.write((ctypes.c_char * data.nbytes).from_address(data.data_ptr()))


def _empty(saved: Any) -> Tensor:
    """A tensor to be filled; in host memory, whatever the default device is."""
    return torch.empty(saved.size, dtype=saved.properties.dtype, device="cpu")


class _Shards:
    """An open file with a rank's shards.

    Args:
        file: From ``safe_open``.

    Attributes:
        offsets: Where each shard begins in the whole tensor, by name.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        info = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        self.offsets = {name: entry["saved_offsets"] for name, entry in info.items()}

    def place(self, name: str, whole: Tensor) -> None:
        """Copy a shard to its place."""
        shard = self._file.get_tensor(name)
        begins = zip(self.offsets[name], shard.shape, strict=True)
        whole[tuple(slice(at, at + n) for at, n in begins)] = shard


def _join(directory: Path, shards: list[str], metadata: Metadata, stream: Any) -> None:
    """Write a safetensors file of whole tensors from files with their shards."""
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        holders: dict[str, list[_Shards]] = {}
        for shard in shards:
            file = _Shards(stack.enter_context(safe_open(directory / shard, framework="pt")))
            for name in file.offsets:
                holders.setdefault(name, []).append(file)
        saved: Any = {name: metadata.state_dict_metadata[name] for name in holders}
        kinds = {name: (each.properties.dtype, each.size) for name, each in saved.items()}
        for name in _write_header(kinds, {}, stream):
            whole = _empty(saved[name])
            for file in holders[name]:
                file.place(name, whole)
            _write_tensor(whole, stream)


# --- Reading --------------------------------------------------------------------------------


class Values:
    """Where entries are: values in JSON, and only tensors in the reader's files.

    Args:
        path: The state checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._file = path / VALUES
        self._values: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}

    def keys(self, metadata: Metadata) -> set[str]:
        """Names of all entries."""
        try:
            self._values = dict(json.loads(self._file.read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise StateError(self._file, f"is damaged: {error}") from error
        inside = set(plain.tensor_names(list(self._values.values())))
        names = metadata.state_dict_metadata.keys() - inside
        return {_key_of(name) for name in names} | self._values.keys()

    def wanted(self, state: StateDict, metadata: Metadata) -> dict[str, Any]:
        """What the planner is to read: the tensors, and those in values."""
        found = {_name_of(key): each for key, each in state.items() if isinstance(each, Tensor)}
        for key in state.keys() & self._values.keys():
            for name in plain.tensor_names(self._values[key]):
                saved: Any = metadata.state_dict_metadata.get(name)
                if saved is not None:
                    self._tensors[name] = _empty(saved)
        return {**found, **self._tensors}

    def deliver(self, state: StateDict) -> None:
        """Put the values into the state dict."""
        for key, each in state.items():
            if not isinstance(each, Tensor):
                try:
                    state[key] = (plain.decode(self._values[key], self._tensors),)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise StateError(
                        self._file, f"has no good `{key}`: {type(error).__name__}: {error}"
                    ) from error
