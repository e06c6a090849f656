"""What is saved: names, metadata, optimizers in every state, and what the user adds."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, OrderedDict
from functools import partial

import numpy
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.state.jobs import LAYOUTS
from wrappers import apply_activation_checkpointing, checkpoint_wrapper, state
from wrappers.state import CheckpointException, contents

pytestmark = pytest.mark.usefixtures("seeded")


def failure_of(function, *args, **kwargs):
    with pytest.raises(CheckpointException) as caught:
        function(*args, **kwargs)
    return caught.value.failures[0][0]


def make_model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def step(model, *optimizers):
    model(torch.randn(5, 3)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def states_of(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def assert_equal(got, expected):
    assert str(got) == str(expected)
    assert got.keys() == expected.keys()


# --- Names and metadata -------------------------------------------------------------------------


def metadata_of(path):
    return FileSystemReader(path).read_metadata().state_dict_metadata


def test_names_are_those_of_the_plain_model(tmp_path):
    plain = make_model()
    wrapped = checkpoint_wrapper(copy.deepcopy(plain))
    apply_activation_checkpointing(wrapped, check_fn=lambda m: isinstance(m, nn.Linear))
    for name, model in (("plain", plain), ("wrapped", wrapped)):
        optimizer = torch.optim.AdamW(model.parameters())
        step(model, optimizer)
        state.save(tmp_path / name, model, optimizer, {"a.b": 1})
    names = set(metadata_of(tmp_path / "plain"))
    assert names == set(metadata_of(tmp_path / "wrapped"))
    assert {name for name in names if name.startswith("model.")} == {
        f"model.{name}" for name in plain.state_dict()
    }
    assert "optimizer.state.0.weight.exp_avg" in names
    assert "optimizer.settings.0.weight" in names
    assert {"extra.a.b", "rank.0.rng"} < names


class Mixed(nn.Module):
    """Everything that a model may hold: replicated, sharded, uneven, and what is no tensor."""

    def __init__(self, mesh):
        super().__init__()
        torch.manual_seed(0)
        full = torch.arange(12.0).reshape(6, 2)
        self.replicated = nn.Parameter(full.clone())
        self.sharded = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
        self.columns = nn.Parameter(distribute_tensor(full, mesh, [Shard(1)]))
        self.one_row = nn.Parameter(distribute_tensor(full[:1], mesh, [Shard(0)]))
        self.whole = nn.Parameter(distribute_tensor(full, mesh, [Replicate()]))
        self.low = nn.Parameter(full.bfloat16(), requires_grad=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.empty(0, 4))
        self.note = "first"

    def get_extra_state(self):
        return {"note": self.note, "nothing": {}}

    def set_extra_state(self, extra):
        self.note = extra["note"]


def save_mixed(path, layout):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = Mixed(mesh)
    state.save(path, model, layout=layout, rng=False)
    loaded = Mixed(mesh)
    loaded.note = "second"
    with torch.no_grad():
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.zero_()
    state.load(path, loaded, rng=False)
    equal = {
        name: torch.equal(value.full_tensor(), model.state_dict()[name].full_tensor())
        if isinstance(value, DTensor)
        else torch.equal(value, model.state_dict()[name])
        for name, value in loaded.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    return equal, loaded.note


def chunks_of(metadata):
    return sorted((tuple(c.offsets), tuple(c.sizes)) for c in metadata.chunks if c.sizes.numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metadata_and_values_of_every_kind(ranks, tmp_path, layout):
    for equal, note in ranks(save_mixed, tmp_path / "x", layout):
        assert len(equal) == 8
        assert all(equal.values()), equal
        assert note == "first"
    if layout == "safetensors":
        return
    metadata = metadata_of(tmp_path / "x")
    for name, item in metadata.items():
        kind = BytesStorageMetadata if name == "model._extra_state" else TensorStorageMetadata
        assert type(item) is kind, name
    full = [((0, 0), (6, 2))]
    assert chunks_of(metadata["model.replicated"]) == full
    assert chunks_of(metadata["model.whole"]) == full
    assert chunks_of(metadata["model.sharded"]) == [((0, 0), (3, 2)), ((3, 0), (3, 2))]
    assert chunks_of(metadata["model.columns"]) == [((0, 0), (6, 1)), ((0, 1), (6, 1))]
    assert chunks_of(metadata["model.one_row"]) == [((0, 0), (1, 2))]
    assert chunks_of(metadata["model.low"]) == full
    assert metadata["model.low"].properties.dtype == torch.bfloat16
    assert metadata["model.count"].size == torch.Size([])
    assert metadata["model.empty"].size == torch.Size([0, 4])


class Partitioned(nn.Module):
    """Holds a ShardedTensor, the kind of before DTensor, through state-dict hooks."""

    def __init__(self, value):
        super().__init__()
        from torch.distributed._shard import sharded_tensor

        self.table = sharded_tensor.full(_spec(), (4, 3), value)
        self._register_state_dict_hook(self._add)
        self.register_load_state_dict_pre_hook(self._take)

    @staticmethod
    def _add(module, state_dict, prefix, local_metadata):
        state_dict[f"{prefix}table"] = module.table

    @staticmethod
    def _take(module, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}table")


def _spec():
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    ranks = [f"rank:{rank}/cpu" for rank in range(dist.get_world_size())]
    return ChunkShardingSpec(dim=0, placements=ranks)


def save_partitioned(path, layout, save):
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)  # in every call
    saved = getattr(state, save)(path, Partitioned(2.5), layout=layout, rng=False)
    if save == "async_save":
        saved.result()
    loaded = Partitioned(0.0)
    state.load(path, loaded, rng=False)
    return [shard.tensor.unique().tolist() for shard in loaded.table.local_shards()]


@pytest.mark.parametrize("save", ["save", "async_save"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_tensors(ranks, tmp_path, layout, save):
    assert ranks(save_partitioned, tmp_path / "x", layout, save) == [[[2.5]], [[2.5]]]
    if layout == "dcp":
        table = metadata_of(tmp_path / "x")["model.table"]
        assert chunks_of(table) == [((0, 0), (2, 3)), ((2, 0), (2, 3))]


def save_with_one_rank_empty(path, layout):
    """Pipeline stages: each rank has another model, the last has nothing."""
    model = nn.Identity() if dist.get_rank() else make_model()
    optimizers = [] if dist.get_rank() else torch.optim.SGD(model.parameters(), lr=0.1)
    state.save(path, model, optimizers, layout=layout, coordinator_rank=1, rng=False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state.load(path, model, optimizers, coordinator_rank=1, rng=False)
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_holds_nothing(ranks, tmp_path, layout):
    assert ranks(save_with_one_rank_empty, tmp_path / "x", layout) == [True, True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_model_is_refused(tmp_path, layout):
    state.save(tmp_path / "x", make_model(), layout=layout)
    larger = nn.Sequential(*make_model(), nn.Linear(2, 2))
    error = failure_of(state.load, tmp_path / "x", larger)
    assert isinstance(error, ValueError)
    assert "has no `model.3.bias` (2 such entries)" in str(error)
    error = failure_of(state.load, tmp_path / "x", make_model()[:2])
    assert isinstance(error, ValueError)
    assert "`model.2.bias` (2 such entries), for which no rank's model has a place" in str(error)
    wider = make_model()
    wider[2] = nn.Linear(4, 3)
    error = failure_of(state.load, tmp_path / "x", wider)
    assert "Size mismatch" in str(error)


def test_a_model_without_memory_is_refused(tmp_path):
    state.save(tmp_path / "x", make_model())
    with torch.device("meta"):
        model = make_model()
    error = failure_of(state.load, tmp_path / "x", model)
    assert isinstance(error, ValueError)
    assert "`model.0.weight` is on the meta device" in str(error)


# --- Optimizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        partial(torch.optim.AdamW, lr=0.1, amsgrad=True),
        partial(torch.optim.AdamW, lr=torch.tensor(0.1)),
        partial(torch.optim.Adafactor, lr=0.1),
        partial(torch.optim.RMSprop, lr=0.1, centered=True, momentum=0.5),
        partial(torch.optim.NAdam, lr=0.1),
    ],
    ids=["SGD", "momentum", "amsgrad", "lr tensor", "Adafactor", "RMSprop", "NAdam"],
)
def test_optimizers_go_on_as_if_nothing_had_been(tmp_path, make, layout):
    model = make_model()
    optimizer = make(model.parameters())
    step(model, optimizer)
    state.save(tmp_path / "x", model, optimizer, layout=layout)
    other = make_model()
    loaded = make(other.parameters())
    for _ in range(2):
        step(other, loaded)
    state.load(tmp_path / "x", other, loaded)
    assert_equal(loaded.state_dict(), optimizer.state_dict())
    for _ in range(2):
        torch.manual_seed(5)
        step(model, optimizer)
        torch.manual_seed(5)
        step(other, loaded)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_saving_takes_no_step(tmp_path):
    """torch's get_optimizer_state_dict takes one where there is no state: Adam would count it."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    before = states_of(optimizer)
    state.save(tmp_path / "x", model, optimizer)
    assert_equal(optimizer.state_dict(), before)
    assert not optimizer.state
    assert not calls
    assert all(p.grad is None for p in model.parameters())
    trained = torch.optim.AdamW(model.parameters())
    step(model, trained)
    state.load(tmp_path / "x", model, trained)
    assert_equal(trained.state_dict(), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_without_state_and_frozen_ones(tmp_path, layout):
    model = make_model()
    model.unused = nn.Parameter(torch.ones(2))
    model[2].requires_grad_(False)
    model[0].bias.requires_grad_(False)

    def forward(x):
        return model[2](model[1](model[0](x)))

    model.forward = forward
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    expected = states_of(optimizer)
    assert len(expected["state"]) == 3
    state.save(tmp_path / "x", model, optimizer, layout=layout)
    for num_steps in (0, 1):
        loaded = torch.optim.AdamW(model.parameters())
        for _ in range(num_steps):
            step(model, loaded)
        state.load(tmp_path / "x", model, loaded)
        assert_equal(loaded.state_dict(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_optimizer_that_has_stepped_fewer_parameters(tmp_path, layout):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    expected = states_of(optimizer)
    state.save(tmp_path / "x", model, optimizer, layout=layout)
    loaded = torch.optim.AdamW(model.parameters())
    model[0](torch.randn(5, 3)).sum().backward()
    loaded.step()
    loaded.zero_grad()
    assert len(loaded.state) == 2
    state.load(tmp_path / "x", model, loaded)
    assert_equal(loaded.state_dict(), expected)


def test_gradients_survive_loading(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    expected = states_of(optimizer)
    state.save(tmp_path / "x", model, optimizer)
    loaded = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state.load(tmp_path / "x", model, loaded)
    assert_equal(loaded.state_dict(), expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_optimizers_and_groups(tmp_path, layout):
    model = make_model()

    def make():
        return [
            torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
            torch.optim.AdamW(
                [
                    {"params": model[1].parameters(), "weight_decay": 0.0},
                    {"params": model[2].parameters(), "lr": 0.5, "betas": (0.8, 0.9)},
                ]
            ),
        ]

    optimizers = make()
    step(model, *optimizers)
    expected = [states_of(optimizer) for optimizer in optimizers]
    state.save(tmp_path / "x", model, optimizers, layout=layout)
    loaded = make()
    for optimizer in loaded:
        for group in optimizer.param_groups:
            group["lr"] = 77.0
    state.load(tmp_path / "x", model, tuple(loaded))
    for got, wanted in zip(loaded, expected, strict=True):
        assert_equal(got.state_dict(), wanted)


def test_settings_that_only_one_side_knows(tmp_path):
    """A scheduler writes ``initial_lr`` into the groups: before or after loading, or both."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    state.save(tmp_path / "with", model, optimizer)
    plain = torch.optim.SGD(model.parameters(), lr=3.0)
    state.load(tmp_path / "with", model, plain)
    assert (plain.param_groups[0]["lr"], plain.param_groups[0]["initial_lr"]) == (0.5, 1.0)
    state.save(tmp_path / "without", model, torch.optim.SGD(model.parameters(), lr=0.25))
    state.load(tmp_path / "without", model, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"]) == (0.25, 1.0)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda m: [torch.optim.SGD(m.parameters(), 1)] * 2, ValueError, "two groups or two"),
        (lambda m: torch.optim.SGD(make_model().parameters(), 1), ValueError, "6 of 6 parameters"),
        (lambda m: [m], TypeError, "must be an Optimizer"),
        (lambda m: 3, TypeError, "int"),
        (
            lambda m: torch.optim.SGD([{"params": m.parameters()}, {"params": []}], 1),
            ValueError,
            "without parameters",
        ),
        (lambda m: torch.optim.LBFGS(m.parameters()), TypeError, "pass it in extra"),
        (lambda m: torch.optim.SparseAdam(m.parameters()), TypeError, "SparseAdam cannot make"),
    ],
)
def test_optimizers_that_do_not_fit(tmp_path, make, error, text):
    model = make_model()
    state.save(tmp_path / "good", model)
    for operation, path in ((state.save, "bad"), (state.load, "good")):
        failure = failure_of(operation, tmp_path / path, model, make(model))
        assert isinstance(failure, error)
        assert text in str(failure)


# --- What the user adds -------------------------------------------------------------------------

VALUES = {
    "number": 3,
    "float": 0.1 + 0.2,
    "infinite": float("inf"),
    "text": "ä\n",
    "nothing": None,
    "flag": True,
    "bytes": b"\0\xff",
    "complex": 1 + 2j,
    "tensor": torch.arange(6).reshape(2, 3).t(),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "nested": {"a": [1, (2, {3: torch.ones(2), "$": 4})], (1, 2): {}, "empty": []},
    "ordered": OrderedDict(b=1, a=2),
    "counter": Counter("aab"),
    "dtype": torch.float16,
    "size": torch.Size([2, 3]),
    "dotted.key": 1,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_values_come_back_as_they_were(tmp_path, layout):
    model = make_model()
    state.save(tmp_path / "x", model, None, VALUES, rank_extra=VALUES, layout=layout)
    values = state.load(tmp_path / "x", model)
    own = values.pop("rank")
    for got in (values, own):
        assert got.keys() == VALUES.keys()
        for key, value in VALUES.items():
            assert type(got[key]) is type(value), key
            assert str(got[key]) == str(value), key
    assert torch.equal(values["tensor"], VALUES["tensor"])
    assert type(values["nested"]["a"][1]) is tuple


class Counting:
    """A stateful object of the user's."""

    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stateful_objects_get_their_state_back(tmp_path, layout):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, 9),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 2]),
    ]
    generator = torch.Generator().manual_seed(3)
    extra = {"one cycle": schedulers[0], "steps": schedulers[1], "generator": generator}
    extra["scaler"] = torch.amp.GradScaler("cpu")
    state.save(
        tmp_path / "x", model, optimizer, extra, rank_extra={"counting": Counting(5)}, layout=layout
    )
    expected = [scheduler.state_dict() for scheduler in schedulers]
    expected_draw = torch.rand(3, generator=generator)
    optimizer.step()
    for scheduler in schedulers:
        scheduler.step()
    counting = Counting()
    values = state.load(tmp_path / "x", model, optimizer, extra, rank_extra={"counting": counting})
    assert values == {"rank": {}}
    assert [scheduler.state_dict() for scheduler in schedulers] == expected
    assert torch.equal(torch.rand(3, generator=generator), expected_draw)
    assert counting.count == 5
    values = state.load(tmp_path / "x", model)
    assert values["rank"] == {"counting": {"count": 5}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_optimizer_that_is_refused_goes_into_extra(tmp_path, layout):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(3.0)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    state.save(tmp_path / "x", model, extra={"optimizer": optimizer}, layout=layout)
    loaded = torch.optim.LBFGS(model.parameters())
    assert state.load(tmp_path / "x", model, extra={"optimizer": loaded}) == {}
    assert_equal(loaded.state_dict(), optimizer.state_dict())


def test_a_key_that_is_not_there(tmp_path):
    model = make_model()
    state.save(tmp_path / "x", model, None, {"a": 1}, rank_extra={"b": 1})
    for extra, rank_extra, name in (
        ({"c": 0}, None, "extra.c"),
        (None, {"d": Counting()}, "rank.0.extra.d"),
    ):
        error = failure_of(state.load, tmp_path / "x", model, None, extra, rank_extra=rank_extra)
        assert f"has no `{name}`" in str(error)


class Opaque:
    pass


@pytest.mark.parametrize(
    "value",
    [
        lambda: None,
        Opaque(),
        [{"deep": Opaque()}],
        numpy.float64(1.0),
        open,
        make_model()[0].forward,
    ],
    ids=["lambda", "object", "nested object", "numpy", "function", "method"],
)
@pytest.mark.parametrize("where", ["extra", "rank_extra"])
def test_what_could_not_be_loaded_safely_is_refused_when_it_is_saved(tmp_path, value, where):
    arguments = {where: {"good": 1, "bad": value}}
    error = failure_of(state.save, tmp_path / "x", make_model(), **arguments)
    assert isinstance(error, TypeError)
    assert f"{where}['bad'] is a {type(value).__name__}" in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", [[1], {1: 2}, "text"])
def test_extra_must_be_a_mapping_of_names(tmp_path, extra):
    for arguments in ({"extra": extra}, {"rank_extra": extra}):
        error = failure_of(state.save, tmp_path / "x", make_model(), **arguments)
        assert isinstance(error, TypeError)
        assert "must be a mapping with keys of type str" in str(error)


def test_a_reserved_key(tmp_path):
    error = failure_of(state.save, tmp_path / "x", make_model(), extra={"rank": 1})
    assert isinstance(error, ValueError)
    assert contents.RANK_KEY in str(error)


def save_own_extra(path):
    """``extra`` is the coordinator's, whoever that is; ``rank_extra`` each rank's own."""
    rank = dist.get_rank()
    model = make_model()
    state.save(
        path, model, None, {"from": rank}, rank_extra={"own": rank}, coordinator_rank=1, rng=False
    )
    return state.load(path, model, rng=False)


def test_one_copy_for_all_and_one_for_each(ranks, tmp_path):
    assert ranks(save_own_extra, tmp_path / "x") == [
        {"from": 1, "rank": {"own": 0}},
        {"from": 1, "rank": {"own": 1}},
    ]
