"""The layout without pickles: others can read the model, and nothing in it can run."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

from tests.state.jobs import LAYOUTS, make_job
from tests.state.test_pickles import rewrite
from wrappers import state
from wrappers.state import CheckpointException, StateError, plain, safetensors_layout

pytestmark = pytest.mark.usefixtures("seeded")


def failure_of(function, *args, **kwargs):
    with pytest.raises(CheckpointException) as caught:
        function(*args, **kwargs)
    return caught.value.failures[0][0]


class Odd(nn.Module):
    """Tied, scalar, empty, transposed; names that look like ours; every kind of number."""

    def __init__(self):
        super().__init__()
        self.optimizer = nn.Linear(3, 3)
        self.model = nn.Linear(3, 3, bias=False)
        self.model.weight = self.optimizer.weight
        self.columns = nn.Parameter(torch.randn(4, 3).t())
        self.norm = nn.BatchNorm1d(3)
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64):
            self.register_buffer(f"of_{str(dtype)[6:]}", torch.arange(-3, 3).to(dtype))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("scalar", torch.tensor(-7))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("part", torch.arange(10)[2:5])
        self.register_buffer("conjugate", torch.tensor([1 + 2j, 3 - 4j]).conj())
        self.register_buffer("negative", torch.tensor([1 + 2j, 3 - 4j]).conj().imag)


def test_the_model_is_one_file_that_others_read(tmp_path):
    model = Odd()
    state.save(tmp_path / "x", model, layout="safetensors")
    read = load_file(tmp_path / "x" / "model.safetensors")
    expected = model.state_dict()
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name
    data = (tmp_path / "x" / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert (8 + header_bytes + entry["data_offsets"][0]) % expected[name].itemsize == 0, name
    other = Odd()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    state.load(tmp_path / "x", other)
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]), name


def save_sharded(path):
    job = make_job("inside")
    job.train(2)
    state.save(path, job.model, job.optimizer, job.extra, layout="safetensors")
    return {name: value.full_tensor() for name, value in job.model.state_dict().items()}


def test_the_file_of_a_sharded_model(ranks, tmp_path):
    expected, _ = ranks(save_sharded, tmp_path / "x")
    read = load_file(tmp_path / "x" / "model.safetensors")
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(read[name], value), name
    names = sorted(file.name for file in (tmp_path / "x").iterdir())
    assert names == [
        "manifest.json",
        "model.safetensors",
        "shard-00001-others.safetensors",
        "shard-00002-others.safetensors",
        "state.json",
    ]
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["layout"] == "safetensors"


def test_nothing_is_pickled(ranks, tmp_path, monkeypatch):
    ranks(save_sharded, tmp_path / "x")
    for file in (tmp_path / "x").iterdir():
        data = file.read_bytes()
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError)):
            pickle.loads(data)
        assert data[:2] != b"PK", "a zip, as torch.save writes"
        if file.suffix == ".json":
            json.loads(data)
        else:
            assert len(load_file(file)) > 0

    def refuse(*args, **kwargs):
        raise AssertionError("something is unpickled")

    job = make_job()
    for module, name in ((pickle, "Unpickler"), (pickle, "load"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    state.load(tmp_path / "x", job.model, job.optimizer, job.extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
def test_tensors_in_values(tmp_path, dtype):
    model = nn.Linear(2, 2)
    tensors = [torch.arange(4).to(dtype), torch.tensor(3).to(dtype), torch.empty(0, dtype=dtype)]
    state.save(
        tmp_path / "x",
        model,
        None,
        {"a": tensors, "b": {"c": tensors}},
        rank_extra={"a": tensors[0]},
        layout="safetensors",
    )
    values = state.load(tmp_path / "x", model)
    for got in (values["a"], values["b"]["c"], [values["rank"]["a"]]):
        for tensor, expected in zip(got, tensors, strict=False):
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected)


DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_type_can_be_read_or_is_refused_when_it_is_saved(tmp_path, dtype):
    def make(byte):
        model = nn.Linear(1, 1)
        model.register_buffer("data", torch.full((64,), byte, dtype=torch.uint8).view(dtype))
        return model

    try:
        model, other = make(1), make(0)
    except (RuntimeError, NotImplementedError):
        pytest.skip("no such tensors on a CPU")
    try:
        path = state.save(tmp_path / "x", model, layout="safetensors")
    except CheckpointException as error:
        text = str(error.failures[0][0])
        assert "iinfo" in text or f"`data` is {dtype}, which the layout 'safetensors'" in text
        assert state.latest(tmp_path) is None
        return
    state.load(path, other)
    assert torch.equal(other.data.view(torch.uint8), model.data.view(torch.uint8))
    assert dtype in safetensors_layout._WORDS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_default_device(tmp_path, layout):
    model, other, value = nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(2)
    with torch.device("meta"):
        path = state.save(tmp_path / "x", model, None, {"a": value}, layout=layout)
        values = state.load(path, other)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(values["a"], value)


class Watching(DefaultSavePlanner):
    """Counts how many of the tensors that it has given are still alive."""

    def __init__(self):
        super().__init__()
        self.given, self.max_alive = [], 0

    def resolve_data(self, write_item):
        tensor = super().resolve_data(write_item).clone()
        self.given.append(weakref.ref(tensor))
        self.max_alive = max(self.max_alive, sum(ref() is not None for ref in self.given))
        return tensor


def test_one_tensor_at_a_time_is_in_host_memory(tmp_path):
    planner, model = Watching(), Odd()
    path = state.save(tmp_path / "x", model, planner=planner, layout="safetensors")
    assert len(planner.given) >= len(model.state_dict())
    assert planner.max_alive <= 2  # the last one, until the next one has its name
    assert load_file(path / "model.safetensors").keys() == model.state_dict().keys()


class Halving(DefaultSavePlanner):
    def resolve_data(self, write_item):
        return super().resolve_data(write_item).to(torch.bfloat16)


def test_a_planner_that_gives_something_else_than_it_has_planned(tmp_path):
    error = failure_of(
        state.save, tmp_path / "x", nn.Linear(2, 2), planner=Halving(), layout="safetensors"
    )
    assert isinstance(error, TypeError)
    assert "planned as torch.float32 (2,)" in str(error)
    assert "torch.bfloat16" in str(error)


class Known:
    """A class that the user has declared safe for ``torch.load``, but that is no plain data."""


def test_values_that_json_cannot_hold_are_refused(tmp_path):
    with torch.serialization.safe_globals([Known]):
        extra = {"known": [Known()]}
        state.save(tmp_path / "good", nn.Linear(2, 2), None, extra)
        error = failure_of(
            state.save, tmp_path / "bad", nn.Linear(2, 2), None, extra, layout="safetensors"
        )
    assert isinstance(error, TypeError)
    assert "`.extra.known` holds a Known" in str(error)


@pytest.mark.parametrize("value", [range(3), object(), frozenset({1})])
def test_unknown_types_are_named(value):
    with pytest.raises(TypeError, match=rf"`name` holds a {type(value).__name__}.*layout='dcp'"):
        plain.encode("name", [{"a": value}], {})


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install activation-wrappers\[state\]"):
        state.save(tmp_path / "x", nn.Linear(2, 2), layout="safetensors")
    assert list(tmp_path.iterdir()) == []
    state.save(tmp_path / "x", nn.Linear(2, 2))


def test_the_layout_has_its_own_writer(tmp_path):
    with pytest.raises(ValueError, match="pass no storage_writer"):
        state.save(
            tmp_path / "x",
            nn.Linear(2, 2),
            layout="safetensors",
            storage_writer=FileSystemWriter(tmp_path),
        )


@pytest.mark.parametrize(
    "value",
    [
        {"$": "eval", "items": []},
        {"$": "tensor", "name": "x"},
        {"$": "tensor", "name": ["x"]},
        {"$": "tensor"},
        {"$": "dtype", "name": "load"},
        {"$": "Size", "items": ["a"]},
        {"$": "bytes"},
        {"$": ["tuple"], "items": []},
    ],
    ids=str,
)
def test_values_that_were_never_written(tmp_path, value):
    path = state.save(tmp_path / "x", nn.Linear(2, 2), None, {"a": 1}, layout="safetensors")
    values = json.loads((path / "state.json").read_text())
    values["extra.a"] = value
    rewrite(path, "state.json", json.dumps(values).encode())
    error = failure_of(state.load, path, nn.Linear(2, 2))
    assert isinstance(error, StateError), error
    assert error.path == path / "state.json"
    assert "`extra.a`" in str(error)


@pytest.mark.parametrize("text", ["[", "3", '{"a": "\xff"}', "[" * 100_000])
def test_a_damaged_value_file_is_named(tmp_path, text):
    path = state.save(tmp_path / "x", nn.Linear(2, 2), layout="safetensors")
    rewrite(path, "state.json", text.encode("latin-1"))
    error = failure_of(state.load, path, nn.Linear(2, 2))
    assert isinstance(error, StateError)
    assert error.path == path / "state.json"
