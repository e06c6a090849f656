"""The data-parallel half of the composition matrix: each technique under DDP, FSDP2 and FSDP1.

A cell trains a few steps in two ranks. Its losses and gradients are compared with a single
process's, and its collectives, names and buffers with the same parallelism over the plain model,
which has a test of its own. What memory is released is seen from inside: each block takes weak
references to the storages it makes, and after the forward only those may be alive that the
technique keeps.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import matrix
from tests.distributed.models import (
    NUM_BLOCKS,
    WIDTH,
    WORLD_SIZE,
    Block,
    Model,
    assert_equal,
    buffers,
    forward,
    gradients,
    make_model,
    single_process,
)
from tests.distributed.ranks import RankFailedError
from tests.distributed.test_replay import regions
from wrappers import (
    CheckpointImpl,
    apply_activation_checkpointing,
    is_recomputing,
    remove_activation_checkpointing,
)
from wrappers.errors import WrapperError
from wrappers.offload.store import finish_offloading

# --- The model: its blocks take notes -----------------------------------------------------------

#: Names and storages of what the blocks have made since a forward began.
_made: list[tuple[str, StorageWeakRef]] = []
#: Since a step began: ``(unit, kind)`` of each collective, and where a block has computed.
_log: list[tuple[str, str]] = []
_COMPUTED, _RECOMPUTED = ("block", "computed"), ("block", "recomputed")


def noted(name: str, tensor: Tensor) -> Tensor:
    if not is_recomputing():
        _made.append((name, StorageWeakRef(tensor.untyped_storage())))
    return tensor


class NotedBlock(Block):
    """Computes what its base does."""

    def forward(self, x: Tensor) -> Tensor:
        _log.append(_RECOMPUTED if is_recomputing() else _COMPUTED)
        normed = noted("normed", self.norm(x))
        up = noted("up", self.up(normed))
        active = noted("active", up.relu())
        return x + self.down(noted("dropped", self.drop(active)))


def noted_model(*, batch_norm: bool = True, has_spare: bool = False) -> Model:
    model = make_model(batch_norm)
    for block in model.blocks:
        block.__class__ = NotedBlock
    if has_spare:
        model.blocks[1].spare = nn.Linear(WIDTH, WIDTH)  # no forward calls it
    return model


def alive(expected: dict[str, int] | None) -> dict[str, int]:
    """How many of the storages that the blocks have made are alive, by name.

    A thread of gloo lets go of a collective's thread-local state, and so of the dispatch mode it
    was called in and of what that keeps, a moment after the collective: this waits for what is
    expected.
    """
    finish_offloading()
    deadline = time.monotonic() + 5
    while True:
        found = dict(Counter(name for name, storage in _made if not storage.expired()))
        if expected in (None, found) or time.monotonic() > deadline:
            return found
        time.sleep(0.001)


# --- Steps --------------------------------------------------------------------------------------


@dataclass
class Step:
    """What one step has left in one rank; lists have an entry for each micro-batch."""

    kept: dict[str, int] | None = None
    losses: list[float] = field(default_factory=list)
    alive: list[dict[str, int]] = field(default_factory=list)
    in_forward: list[list[tuple[str, str]]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def one_step(model: nn.Module, rank: int, step: Step, micro_batch: int = 0) -> None:
    _made.clear()
    num_logged = len(_log)
    loss = forward(model, rank, micro_batch)
    step.in_forward.append(_log[num_logged:])
    step.alive.append(alive(step.kept))
    step.losses.append(loss.item())
    loss.backward()


def accumulate(model: nn.Module, rank: int, step: Step) -> None:
    """Two micro-batches, reduced once."""
    for micro_batch in range(2):
        is_last = micro_batch == 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_last)
        is_held_back = isinstance(model, DistributedDataParallel) and not is_last
        with model.no_sync() if is_held_back else contextlib.nullcontext():
            one_step(model, rank, step, micro_batch)


def bf16_step(model: nn.Module, rank: int, step: Step) -> None:
    """What FSDP does with ``param_dtype`` bf16 and ``reduce_dtype`` fp32, written out."""
    model.bfloat16().register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    one_step(model, rank, step)
    found = [parameter.grad.float() for parameter in model.parameters()]
    for parameter, gradient in zip(model.float().parameters(), found, strict=True):
        parameter.grad = gradient


# --- What is trained of the model, and how many blocks then have a backward that needs tensors ---


def everything(model: Model) -> int:
    return NUM_BLOCKS


def the_head(model: Model) -> int:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return 0


def adapters(model: Model) -> int:
    """A layer in each block but the first, whose region has nothing that requires grad."""
    model.requires_grad_(False)
    for block in model.blocks[1:]:
        block.down.requires_grad_(True)
    return NUM_BLOCKS - 1


# --- Parallelisms -------------------------------------------------------------------------------

#: ``wrap(root, check_fn)`` applies the cell's technique.
Wrap = Callable[[nn.Module, Any], None]


@dataclass(frozen=True)
class Setting:
    """A row's parallelism.

    Attributes:
        parallelize: ``(setting, model, wrap)`` to the module that trains.
        options: What the parallelism is called with.
        wraps: ``"before"`` it, ``"after"`` it, or ``"around"`` the units that it has made.
        step: A step of a rank.
        reference: The same of a single process.
        num_steps: How many; collectives are those of the last one, when all is as it will stay.
        trains: What is trained; a cell runs once for each.
        model: Settings of :func:`noted_model`.
        prefetches: Whether blocks are told which ones to prefetch.
        num_gathers: How often a step gathers the parameters of a block, where all are trained.
    """

    parallelize: Callable[[Setting, Model, Wrap], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    wraps: str = "before"
    step: Callable[[nn.Module, int, Step], None] = one_step
    reference: Callable[[nn.Module, int, Step], None] | None = None
    num_steps: int = 2
    trains: tuple[Callable[[Model], int], ...] = (everything,)
    model: dict[str, Any] = field(default_factory=dict)
    prefetches: bool = False
    num_gathers: int = 2


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def is_unit(module: nn.Module) -> bool:
    return isinstance(module, FullyShardedDataParallel) and is_block(module.module)


def ddp(setting: Setting, model: Model, wrap: Wrap) -> nn.Module:
    if setting.wraps == "before":
        wrap(model, is_block)
    trained = DistributedDataParallel(model, bucket_cap_mb=0.001, **setting.options)
    if setting.wraps == "after":
        wrap(trained, is_block)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def log(_, bucket):  # DDP reads annotations, and knows none that are text
        _log.append(("bucket", "all-reduce"))
        _log.extend((names[id(parameter)], "all-reduce") for parameter in bucket.parameters())
        return allreduce_hook(None, bucket)

    trained.register_comm_hook(None, log)
    return trained


class LoggedAllGather(DefaultAllGather):
    def __init__(self, unit: str) -> None:
        self.unit = unit

    def __call__(self, *args, **kwargs):
        _log.append((self.unit, "all-gather"))
        return super().__call__(*args, **kwargs)


class LoggedReduceScatter(DefaultReduceScatter):
    def __init__(self, unit: str) -> None:
        self.unit = unit

    def __call__(self, *args, **kwargs):
        _log.append((self.unit, "reduce-scatter"))
        return super().__call__(*args, **kwargs)


def fsdp2(setting: Setting, model: Model, wrap: Wrap) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = functools.partial(fully_shard, mesh=mesh, **setting.options)
    if setting.wraps == "before":
        wrap(model, is_block)
    blocks = [shard(block) for block in model.blocks]
    if setting.wraps == "after":
        wrap(model, is_block)
    units = {f"blocks.{index}": block for index, block in enumerate(blocks)} | {"": shard(model)}
    for name, unit in units.items():
        unit.set_custom_all_gather(LoggedAllGather(name))
        unit.set_custom_reduce_scatter(LoggedReduceScatter(name))
    if setting.prefetches:
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([block])
    return model


class FlatCollectives(TorchDispatchMode):
    """Logs FSDP1's collectives, for which it has no hook, under the size of their unit."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and "allgather" in name:
            self.log(args[1], "all-gather")
        elif func.namespace == "c10d" and "reduce_scatter" in name:
            self.log(args[0], "reduce-scatter")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def log(shard: Any, kind: str) -> None:
        (shard,) = shard if isinstance(shard, list) else [shard]
        _log.append((f"{WORLD_SIZE * shard.numel()} elements", kind))


def fsdp1(setting: Setting, model: Model, wrap: Wrap) -> nn.Module:
    if setting.wraps == "before":
        wrap(model, is_block)
    trained = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    if setting.wraps != "before":
        wrap(trained, is_block if setting.wraps == "after" else is_unit)
    return trained


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

#: What each row of FSDP2 is; in the rows of the other order it is the same.
_FSDP2: dict[str, dict[str, Any]] = {
    "FSDP2": {},
    "FSDP2, reshard_after_forward=False": {
        "options": {"reshard_after_forward": False},
        "num_gathers": 1,
    },
    "FSDP2, bf16 parameters": {
        "options": {"mp_policy": BF16},
        "model": {"batch_norm": False},
        "reference": bf16_step,
    },
    "FSDP2, frozen parameters": {"trains": (the_head, adapters)},
    "FSDP2, accumulation without sync": {"step": accumulate, "num_gathers": 4},
    "FSDP2, explicit prefetch": {"prefetches": True},
}

_UNUSED = {"options": {"find_unused_parameters": True}, "model": {"has_spare": True}}

SETTINGS = {
    "DDP": Setting(ddp),
    "DDP, static graph": Setting(ddp, {"static_graph": True}, num_steps=3),
    "DDP, unused parameters": Setting(ddp, **_UNUSED),
    "DDP, accumulation in no_sync": Setting(ddp, step=accumulate),
    **{name: Setting(fsdp2, **more) for name, more in _FSDP2.items()},
    **{
        f"{name}, sharded first": Setting(fsdp2, wraps="after", **more)
        for name, more in _FSDP2.items()
    },
    "FSDP1": Setting(fsdp1),
    "FSDP1, sharded first": Setting(fsdp1, wraps="after"),
    "FSDP1, around its units": Setting(fsdp1, wraps="around"),
}

#: What keeps nothing is not here. The first product of a block is saved, the second not needed.
KEPT_BY_POLICY = "up"

_FLAT_BLOCK = f"{sum(p.numel() for p in Block(batch_norm=True).parameters())} elements"

#: Collectives beyond those of the plain model, with the cell's note in the matrix.
MORE = {
    ("FSDP1, around its units", "REENTRANT"): {(_FLAT_BLOCK, "all-gather"): NUM_BLOCKS},
}


def kept(technique: str | None, num_blocks: int) -> dict[str, int] | None:
    """What is alive between forward and backward; None for the plain model."""
    if technique is None:
        return None
    is_kept = technique == "REPLAY, policy" and num_blocks > 0
    return {KEPT_BY_POLICY: num_blocks} if is_kept else {}


# --- A cell -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the steps of a cell have left in one rank; collectives are those of the last."""

    steps: list[Step]
    collectives: dict[tuple[str, str], int]
    buffers: dict[str, Tensor]
    names: dict[str, list[str]]
    fallen: list[str]
    num_replayed: list[int]
    warnings: list[str]
    num_blocks: int


def run_cell(name: str, technique: str | None = None, face: str | None = None) -> list[Run]:
    return [run(SETTINGS[name], train, technique, face) for train in SETTINGS[name].trains]


def run(
    setting: Setting,
    train: Callable[[Model], int] = everything,
    technique: str | None = None,
    face: str | None = None,
) -> Run:
    model = noted_model(**setting.model)
    num_blocks = train(model)

    def wrap(root: nn.Module, check_fn: Any) -> None:
        if technique is not None and face is not None:
            report = matrix.apply_technique(root, check_fn, technique, face)
            assert len(report.wrapped) == NUM_BLOCKS

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # torch 2.13: about FSDP1 itself, and state-dict tensors that will be DTensors.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        trained = setting.parallelize(setting, model, wrap)
        steps = [
            train_step(setting, trained, kept(technique, num_blocks))
            for _ in range(setting.num_steps)
        ]
        names = names_of(trained)
    known = [region.experience for region in regions(model)]
    return Run(
        steps,
        dict(Counter(entry for entry in _log if entry[0] != "block")),
        buffers(model),
        names,
        [experience.reason for experience in known if experience.fallen_at is not None],
        [experience.stats.num_replayed for experience in known if experience.stats is not None],
        [str(warning.message) for warning in caught],
        num_blocks,
    )


def train_step(setting: Setting, trained: nn.Module, expected: dict[str, int] | None) -> Step:
    step = Step(expected)
    trained.zero_grad()
    _log.clear()
    is_flat = setting.parallelize is fsdp1
    with FlatCollectives() if is_flat else contextlib.nullcontext():
        setting.step(trained, dist.get_rank(), step)
    with contextlib.ExitStack() as stack:
        if is_flat:
            whole = FullyShardedDataParallel.summon_full_params(trained, with_grads=True)
            stack.enter_context(whole)
        is_ddp = isinstance(trained, DistributedDataParallel)
        step.gradients = gradients(trained.module if is_ddp else trained)
    return step


def names_of(trained: nn.Module) -> dict[str, list[str]]:
    """All names under which a model, its state and its units are known."""
    model: Any = trained.module if isinstance(trained, DistributedDataParallel) else trained
    modules = list(model.named_modules())
    units = [name for name, module in modules if isinstance(module, _UNITS)]
    states = [module._get_fsdp_state() for _, module in modules if isinstance(module, FSDPModule)]
    groups = [state._fsdp_param_group for state in states]
    return {
        "parameters": [name for name, _ in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "modules": [name for name, _ in modules],
        "state": list(model.state_dict()),
        "units": units,
        "names in traces": [group._module_fqn for group in groups],
        "parameters of units": [p._param_fqn for group in groups for p in group.fsdp_params],
    }


_UNITS = (FSDPModule, FullyShardedDataParallel)


# --- What a cell is compared with ---------------------------------------------------------------


@dataclass
class Expected:
    """A single process's step: each rank's losses, and the mean of the gradients."""

    losses: list[list[float]]
    gradients: dict[str, Tensor]


@functools.cache
def expected_of(name: str) -> list[Expected]:
    setting = SETTINGS[name]
    found = []
    for train in setting.trains:
        model = noted_model(**setting.model)
        train(model)
        losses = []

        def step(replica: nn.Module, rank: int, losses: list[list[float]] = losses) -> None:
            step = Step()
            (setting.reference or setting.step)(replica, rank, step)
            losses.append(step.losses)

        found.append(Expected(losses, single_process(model, step).gradients))
    return found


@pytest.fixture(scope="module")
def plain(ranks):
    """The runs of a row's parallelism over the plain model, for each rank."""
    return functools.cache(lambda name: ranks(run_cell, name))


def assert_trained_as(runs: list[Run], name: str, rank: int) -> None:
    for got, expected in zip(runs, expected_of(name), strict=True):
        for step in got.steps:
            assert step.losses == expected.losses[rank]
            assert_equal(step.gradients, expected.gradients)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_plain_model(plain, name):
    """What cells are compared with trains as a single process does, and keeps its tensors."""
    setting = SETTINGS[name]
    num_micro_batches = 2 if setting.step is accumulate else 1
    state = list(noted_model(**setting.model).state_dict())
    for rank, runs in enumerate(plain(name)):
        assert_trained_as(runs, name, rank)
        for got in runs:
            assert got.names["state"] == state
            for step in got.steps:
                num_alive = [found.get("dropped", 0) for found in step.alive]
                assert num_alive == [got.num_blocks] * num_micro_batches
            if got.num_blocks == NUM_BLOCKS:
                kinds = dict.fromkeys(("normed", "active", "dropped"), NUM_BLOCKS)
                assert got.steps[-1].alive == [kinds] * num_micro_batches
                assert_exchanges(got, setting)


def assert_exchanges(got: Run, setting: Setting) -> None:
    """The collectives of a layer, and the names of units, are those that they should be."""
    parameters = [name for name, _ in noted_model(**setting.model).named_parameters()]
    if setting.parallelize is fsdp1:
        assert got.collectives[_FLAT_BLOCK, "all-gather"] == NUM_BLOCKS * setting.num_gathers
        assert got.collectives[_FLAT_BLOCK, "reduce-scatter"] == NUM_BLOCKS
        return
    assert got.names["parameters"] == parameters
    if setting.parallelize is ddp:
        assert got.collectives["bucket", "all-reduce"] > 1
        per_parameter = {(name, "all-reduce"): 1 for name in parameters}
        assert per_parameter.items() <= got.collectives.items()
        return
    blocks = [f"blocks.{index}" for index in range(NUM_BLOCKS)]
    assert got.names["units"] == got.names["names in traces"] == ["", *blocks]
    for block in blocks:
        assert got.collectives[block, "all-gather"] == setting.num_gathers
        assert got.collectives[block, "reduce-scatter"] == 1


@pytest.mark.parametrize(("name", "technique", "face"), matrix.cells(SETTINGS))
def test_cell(ranks, plain, matrix_cell, name, technique, face):
    matrix_cell(name, technique, face)
    outcome, _ = matrix.row(name).expected(technique, face)
    for rank, runs in enumerate(ranks(run_cell, name, technique, face)):
        assert_trained_as(runs, name, rank)
        for got, theirs in zip(runs, plain(name)[rank], strict=True):
            more = Counter(MORE.get((name, technique), {}))
            assert got.collectives == more + Counter(theirs.collectives)
            assert got.names == theirs.names
            assert_equal(got.buffers, theirs.buffers)
            for step, their_step in zip(got.steps, theirs.steps, strict=True):
                assert step.in_forward == their_step.in_forward
                assert step.alive == [step.kept] * len(step.losses)
            if outcome == matrix.RERUNS:
                assert_rerun(got)
            else:
                assert got.warnings == got.fallen == []
                is_replay = technique.startswith("REPLAY")
                num_replaying = sum(num > 0 for num in got.num_replayed)
                assert num_replaying == (got.num_blocks if is_replay else 0)


def assert_rerun(got: Run) -> None:
    assert len(got.fallen) == len(got.warnings) == NUM_BLOCKS
    for index, (reason, text) in enumerate(zip(got.fallen, got.warnings, strict=True)):
        assert f"blocks.{index}` is rerun from now on instead of replayed: {reason}" in text
        assert reason.startswith("an FSDP module inside moves its parameters")


# --- Beyond the table ---------------------------------------------------------------------------


def run_under_ddp(technique: str, face: str) -> Run:
    return run(Setting(ddp, wraps="after"), everything, technique, face)


@pytest.mark.parametrize("face", matrix.FACES)
@pytest.mark.parametrize("technique", matrix.TECHNIQUES)
def test_wrapping_under_ddp(ranks, plain, technique, face):
    for rank, got in enumerate(ranks(run_under_ddp, technique, face)):
        (theirs,) = plain("DDP")[rank]
        assert_trained_as([got], "DDP", rank)
        assert (got.collectives, got.names) == (theirs.collectives, theirs.names)
        assert got.warnings == got.fallen == []


def run_pairs() -> list[tuple[str, str]]:
    """The second backward through regions of two FSDP modules each, that gather ahead in forward.

    Each module is told to gather the next one's parameters, the last of a region those of the next
    region's first, which in a backward has had its turn.
    """
    blocks = [*noted_model(batch_norm=False).blocks, NotedBlock(batch_norm=False)]
    model = nn.Sequential(nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:]))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for index, block in enumerate(blocks):
        fully_shard(block, mesh=mesh).set_custom_all_gather(LoggedAllGather(str(index)))
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
    apply_activation_checkpointing(
        model, check_fn=lambda m: type(m) is nn.Sequential, impl=CheckpointImpl.REENTRANT
    )
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        loss = model(torch.ones(4, WIDTH, requires_grad=True)).sum()
        _log.clear()
        loss.backward()
    return list(_log)


def test_a_rerun_gathers_ahead_for_the_modules_of_its_region_alone(ranks):
    expected = [
        *(("2", "all-gather"), ("3", "all-gather"), _RECOMPUTED, _RECOMPUTED),
        ("1", "all-gather"),  # by FSDP2 itself, in the backward of 2
        *(("0", "all-gather"), _RECOMPUTED, _RECOMPUTED),
    ]
    assert ranks(run_pairs) == [expected, expected]


# --- Cells that cannot work ---------------------------------------------------------------------


HIDDEN = (
    "it would take the region's parameters for unused. Use CheckpointImpl.NO_REENTRANT, or DDP("
)


def wrap_under_ddp(technique: str, face: str) -> None:
    """The error comes before any module is wrapped."""
    trained = DistributedDataParallel(noted_model(), find_unused_parameters=True)
    error = r"^region `module\.blocks\.0`: DDP\(find_unused_parameters=True\)"
    with pytest.raises(WrapperError, match=error) as caught:
        matrix.apply_technique(trained, is_block, technique, face)
    assert HIDDEN in str(caught.value)
    assert caught.value.fqn == "module.blocks.0"
    assert remove_activation_checkpointing(trained) == 0


def train_the_head_under_ddp(face: str) -> tuple[Run, Run]:
    """DDP that looks for unused parameters, around blocks that have none to train."""
    setting = Setting(ddp, {"find_unused_parameters": True}, wraps="after")
    return run(setting, the_head, "REENTRANT", face), run(setting, the_head)


@pytest.mark.parametrize("face", matrix.FACES)
def test_reentrant_hides_no_frozen_parameters(ranks, face):
    for got, expected in ranks(train_the_head_under_ddp, face):
        for step, plain_step in zip(got.steps, expected.steps, strict=True):
            assert step.losses == plain_step.losses
            assert_equal(step.gradients, plain_step.gradients)


def train_with_static_graph(technique: str, face: str) -> Run:
    options = {"find_unused_parameters": True, "static_graph": True}
    return run(Setting(ddp, options, model={"has_spare": True}), everything, technique, face)


@pytest.mark.parametrize(
    ("name", "technique", "face"), matrix.cells(["DDP, unused parameters"], [matrix.RAISES])
)
def test_ddp_that_looks_for_unused_parameters_refuses_reentrant(
    ranks, matrix_cell, name, technique, face
):
    """Where wrapping finds DDP around the model, or else in the first forward."""
    matrix_cell(name, technique, face)
    ranks(wrap_under_ddp, technique, face)
    error = r"CheckpointError: region `blocks\.0`: DDP\(find_unused_parameters=True\)"
    with pytest.raises(RankFailedError, match=error) as caught:
        ranks(run_cell, name, technique, face)
    assert "failed in 2 of 2 ranks" in str(caught.value)
    assert HIDDEN in str(caught.value)
    for rank, got in enumerate(ranks(train_with_static_graph, technique, face)):
        assert_trained_as([got], name, rank)
