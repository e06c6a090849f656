"""Loading runs no code from the files, whoever reads them, unless the caller says so."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import resource
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from wrappers import state
from wrappers.state import CheckpointException, StateError, pickles

pytestmark = pytest.mark.usefixtures("seeded")


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def failure_of(function, *args, **kwargs):
    with pytest.raises(CheckpointException) as caught:
        function(*args, **kwargs)
    return caught.value.failures[0][0]


def rewrite(path, name, data):
    """Change a file and the manifest, as one may who can write there."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name].update(bytes=len(data), crc32=zlib.crc32(data))
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def saved(tmp_path):
    return state.save(tmp_path / "x", nn.Linear(2, 2), None, {"value": [1, 2]})


class OwnReader(FileSystemReader):
    pass


class OwnPlanner(DefaultLoadPlanner):
    pass


READERS = {
    "default": lambda path: {},
    "own reader": lambda path: {"storage_reader": OwnReader(path)},
    "own planner": lambda path: {"planner": OwnPlanner()},
    "both": lambda path: {"storage_reader": OwnReader(path), "planner": OwnPlanner()},
}


@pytest.mark.parametrize("reader", READERS)
def test_a_good_one_is_read(saved, reader):
    values = state.load(saved, nn.Linear(2, 2), **READERS[reader](saved))
    assert values == {"value": [1, 2]}


# --- Metadata -----------------------------------------------------------------------------------


@dataclasses.dataclass
class WithBomb(Metadata):
    pass


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", ["the pickle", "planner_data", "storage_data"])
def test_code_in_the_metadata_is_not_run(saved, tmp_path, reader, place):
    bait = tmp_path / "bait"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    if place == "the pickle":
        data = pickle.dumps(Bomb(bait))
    else:
        data = pickle.dumps(dataclasses.replace(metadata, **{place: Bomb(bait)}))
    rewrite(saved, ".metadata", data)
    state.verify(saved)
    error = failure_of(state.load, saved, nn.Linear(2, 2), **READERS[reader](saved))
    assert not bait.exists()
    assert type(error) is StateError
    assert error.path == saved / ".metadata"
    assert "trust_pickles=True" in str(error)
    assert "posix.mkdir" in str(error)


def test_it_is_run_for_those_who_trust_it(saved, tmp_path):
    bait = tmp_path / "bait"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata = dataclasses.replace(metadata, planner_data=Bomb(bait))
    rewrite(saved, ".metadata", pickle.dumps(metadata))
    values = state.load(saved, nn.Linear(2, 2), trust_pickles=True)
    assert values == {"value": [1, 2]}
    assert bait.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch", "ops.os"),
        ("torch", "Size.__class__"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.filesystem", "FileSystem"),
        ("pathlib", "os"),
        ("collections", "_sys"),
    ],
)
def test_names_that_are_refused(tmp_path, module, name):
    data = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)
    )
    (tmp_path / ".metadata").write_bytes(data + b"\x93.")
    with pytest.raises(StateError, match=f"it names {module}.{name}"):
        pickles.read_metadata(tmp_path)


def named(module, name):
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize(
    "target",
    [
        named("torch.distributed.checkpoint.metadata", "Metadata"),
        named("pathlib", "Path"),
        named("torch.serialization", "_get_layout"),
        named("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        named("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING") + b"K\1\x85R",
        named("torch", "float32"),
    ],
    ids=["data class", "class", "function", "enum", "enum member", "dtype"],
)
def test_nothing_but_data_gets_attributes(tmp_path, target):
    """The opcode BUILD sets attributes of whatever is on the stack, also of classes."""
    state_of_it = b"N}X\x07\x00\x00\x00planted" + named("torch", "Size") + b"s\x86b"
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + target + state_of_it + b".")
    with pytest.raises(StateError, match="it sets attributes of a"):
        pickles.read_metadata(tmp_path)
    member = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING(1)
    for each in (Metadata, Path, torch.serialization._get_layout, type(member), member):
        assert not hasattr(each, "planted")


def test_a_memo_of_any_number_takes_no_memory(tmp_path):
    """The unpickler in C would make room for 500 million entries."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x1f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StateError, match="holds no metadata but a NoneType"):
        pickles.read_metadata(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 1024**2  # KiB


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_of_every_kind_is_read(tmp_path, protocol):
    dtypes = {v for v in vars(torch).values() if isinstance(v, torch.dtype)}
    entries = {
        str(dtype): TensorStorageMetadata(
            TensorProperties(dtype, memory_format=memory_format, layout=layout),
            torch.Size([2, 3]),
            [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))],
        )
        for dtype in dtypes
        for memory_format in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
        for layout in (torch.strided, torch.sparse_coo)
    }
    entries["bytes"] = BytesStorageMetadata()
    metadata = Metadata(
        entries,
        planner_data=OrderedDict(a=("a", 1)),
        storage_data={MetadataIndex("a", [0, 1], 3): 1},
        storage_meta=StorageMeta(Path("/x"), "1", "2", ["m"]),
        version="1.0.0",
    )
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    read = pickles.read_metadata(tmp_path)
    assert read == metadata
    assert next(iter(read.storage_data)).index == 3


@pytest.mark.parametrize("data", [b"", b"text", pickle.dumps(3), pickle.dumps({})[:-1]])
def test_what_is_no_metadata(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(StateError) as caught:
        pickles.read_metadata(tmp_path)
    assert caught.value.path == tmp_path / ".metadata"


@pytest.mark.parametrize("place", ["/etc/hostname", "../other/__0_0.distcp", Path("a")])
def test_entries_in_other_places_are_refused(saved, place):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = dataclasses.replace(info, relative_path=place)
    rewrite(saved, ".metadata", pickle.dumps(metadata))
    error = failure_of(state.load, saved, nn.Linear(2, 2))
    assert type(error) is StateError
    assert str(place) in str(error)


# --- Values -------------------------------------------------------------------------------------


def plant(path, fqn, value):
    """Replace an entry that is no tensor."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == fqn)
    info = metadata.storage_data[index]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    before = (path / info.relative_path).read_bytes()
    rewrite(path, info.relative_path, before + buffer.getvalue())
    metadata.storage_data[index] = dataclasses.replace(
        info, offset=len(before), length=len(buffer.getvalue())
    )
    rewrite(path, ".metadata", pickle.dumps(metadata))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fqn", ["extra.value", "rank.0.rng"])
def test_code_in_a_value_is_not_run(saved, tmp_path, reader, fqn):
    bait = tmp_path / "bait"
    plant(saved, fqn, (Bomb(bait),))
    error = failure_of(state.load, saved, nn.Linear(2, 2), **READERS[reader](saved))
    assert not bait.exists()
    assert type(error) is StateError
    assert error.path == saved / "__0_0.distcp"
    assert f"`{fqn}`" in str(error)
    assert "trust_pickles=True" in str(error)


def test_a_value_is_unpickled_for_those_who_trust_it(saved, tmp_path):
    bait = tmp_path / "bait"
    plant(saved, "extra.value", (Bomb(bait),))
    assert state.load(saved, nn.Linear(2, 2), trust_pickles=True) == {"value": None}
    assert bait.exists()


def test_code_in_a_tensor_is_not_run_even_then(saved, tmp_path):
    bait = tmp_path / "bait"
    plant(saved, "model.weight", Bomb(bait))
    failure_of(state.load, saved, nn.Linear(2, 2), trust_pickles=True)
    assert not bait.exists()


# --- Planners and storage of the user's ---------------------------------------------------------


class Doubling(DefaultSavePlanner):
    """Writes twice the values."""

    def resolve_data(self, write_item):
        data = super().resolve_data(write_item)
        return 2 * data if isinstance(data, torch.Tensor) else data


class Halving(DefaultLoadPlanner):
    """Counts values, and halves tensors."""

    num_values = 0

    def load_bytes(self, read_item, value):
        self.num_values += 1
        super().load_bytes(read_item, value)

    def commit_tensor(self, read_item, tensor):
        tensor.mul_(0.5)


class Recording(FileSystemWriter):
    """Notes where it was told to write."""

    def reset(self, checkpoint_id=None):
        self.told = checkpoint_id
        super().reset(checkpoint_id)


def test_planners_and_storage_are_used(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    writer = Recording(tmp_path / "elsewhere", single_file_per_rank=False)
    files_before = writer.fs
    path = state.save(
        tmp_path / "x", model, None, {"a": 1}, storage_writer=writer, planner=Doubling()
    )
    assert writer.told.parent == tmp_path
    assert writer.fs is files_before
    assert not (tmp_path / "elsewhere").exists()
    assert len(list(path.glob("*.distcp"))) == 4
    planner = Halving()
    assert state.load(path, other, planner=planner, storage_reader=OwnReader("")) == {"a": 1}
    assert planner.num_values == 2
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)
