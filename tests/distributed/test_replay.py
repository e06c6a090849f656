"""REPLAY in several processes: what ranks exchange, DTensors, and modules that FSDP or DDP manage.

Three things can go wrong here and nowhere else. A rank that replays a collective which the other
one does not hangs. A collective that is run once more than in the plain run costs its time in
every step. And parameters that FSDP frees between forward and backward are not there to be replayed
from.

Regions are modules, as each has its own memory of what its calls have shown; the processes stay
alive between tests. Two steps are made each time: the first replay is compared with a rerun,
which runs the region's collectives too, so operators are counted in the second.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.models import (
    NUM_BLOCKS,
    Block,
    assert_equal,
    buffers,
    gradients,
    make_model,
    single_process,
)
from tests.distributed.test_ddp import STEPS as DDP_STEPS
from tests.distributed.test_ddp import two_forwards
from tests.distributed.test_fsdp2 import (
    NO_REENTRANT,
    STEPS,
    CountingAllGather,
    CountingReduceScatter,
    bf16_step,
    one_step,
    reference,
)
from wrappers import (
    CheckpointImpl,
    CheckpointPolicy,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    region_report,
)
from wrappers.policies import recompute_all, save_matmuls

REPLAY = CheckpointImpl.REPLAY
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")


class Operators(TorchDispatchMode):
    """Counts the operators that run, as ``namespace.name``."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[f"{func.namespace}.{func.overloadpacket.__name__}"] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Steps:
    """What two steps of one model have come to in one rank."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    in_forward: Counter = field(default_factory=Counter)
    in_backward: Counter = field(default_factory=Counter)
    fallen: list[str] = field(default_factory=list)
    num_replayed: int = 0

    @property
    def collectives(self):
        """Collectives of the second backward, by name."""
        return {
            name: num
            for name, num in self.in_backward.items()
            if name.startswith(("_c10d_functional", "c10d."))
        }

    @property
    def num_matmuls(self):
        return sum(self.in_backward[f"aten.{name}"] for name in MATMULS)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def two_steps(model, x):
    steps = Steps()
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        with Operators() as in_forward:
            out = model(x)
        loss = local(out).square().sum()
        with Operators() as in_backward:
            loss.backward()
        found = {name: local(p.grad).clone() for name, p in model.named_parameters()}
        steps.gradients.append(found | {"x": local(x.grad).clone()})
        steps.in_forward, steps.in_backward = in_forward.counts, in_backward.counts
    for region in regions(model):
        if region.experience.fallen_at is not None:
            steps.fallen.append(region.experience.reason)
        if region.experience.stats is not None:
            steps.num_replayed += region.experience.stats.num_replayed
    return steps


def regions(model):
    """The regions of wrapped modules, and of those whose forward has been replaced.

    A wrapper that FSDP does not manage shows the module inside in place of itself.
    """
    found = {}
    for module in [*model.modules(), *getattr(model, "blocks", ())]:
        for face in (module, module.forward):
            region = getattr(face, "_checkpoint_region", None)
            if region is not None:
                found[id(region)] = region
    return list(found.values())


def assert_same_gradients(results, plain):
    for got, expected in zip(results, plain, strict=True):
        for ours, theirs in zip(got.gradients, expected.gradients, strict=True):
            assert_equal(ours, theirs)


def assert_replayed(results):
    for got in results:
        assert got.fallen == []
        assert got.num_replayed > 0


# --- Functional collectives -------------------------------------------------------------------


def group():
    return dist.group.WORLD


HALVES = [2, 2]
FUNCTIONAL = {
    "all_reduce": lambda x: funcol.all_reduce(x, "sum", group()),
    "all_gather": lambda x: funcol.all_gather_tensor_autograd(x, 0, group()),
    "reduce_scatter": lambda x: funcol.reduce_scatter_tensor_autograd(x, "sum", 0, group()),
    "all_to_all": lambda x: funcol.all_to_all_single_autograd(x, HALVES, HALVES, group()),
    "all_gather_and_wait": lambda x: funcol.wait_tensor(
        funcol.all_gather_tensor_autograd(x, 0, group())
    ),
    "all_gather_no_autograd": lambda x: funcol.all_gather_tensor(x, 0, group()),
    "reduce_scatter_no_autograd": lambda x: funcol.reduce_scatter_tensor(x, "sum", 0, group()),
    "all_to_all_no_autograd": lambda x: funcol.all_to_all_single(x, HALVES, HALVES, group()),
}


class Exchanging(nn.Module):
    """Exchanges what it has in the middle with the other rank."""

    def __init__(self, exchange):
        super().__init__()
        self.exchange = exchange
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        y = self.exchange(self.first(x.sin()).tanh())
        return self.second(y.sin()).sigmoid()


def run_exchanging(exchange, wrap, policy, preset):
    torch.manual_seed(0)
    model = Exchanging(exchange)
    if wrap:
        if preset is not None:  # Operators cannot be pickled.
            policy = preset()
        model = checkpoint_wrapper(model, impl=REPLAY, policy=policy)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    return two_steps(model, x.requires_grad_())


def run_functional(name, wrap, policy=None, preset=None):
    with warnings.catch_warnings():  # torch 2.13 has given two of them other names
        warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning)
        return run_exchanging(FUNCTIONAL[name], wrap, policy, preset)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_what_a_collective_has_returned_is_kept(ranks, name):
    plain = ranks(run_functional, name, False)
    results = ranks(run_functional, name, True)
    assert_same_gradients(results, plain)
    assert_replayed(results)
    for got, expected in zip(results, plain, strict=True):
        assert got.collectives == expected.collectives
        assert sum(expected.collectives.values()) > 0


def forbid_collectives(ctx, op, *args, **kwargs):
    """Keeps matrix products, so that a replay begins right before the collective."""
    if op.namespace == "_c10d_functional":
        return CheckpointPolicy.MUST_RECOMPUTE
    return op is torch.ops.aten.addmm.default


def forbid_most(ctx, op, *args, **kwargs):
    """Keeps what comes last, so that a replay runs everything."""
    is_last = op is torch.ops.aten.sigmoid.default
    return CheckpointPolicy.MUST_SAVE if is_last else CheckpointPolicy.MUST_RECOMPUTE


@pytest.mark.parametrize("policy", [forbid_collectives, forbid_most])
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_a_collective_that_the_policy_forbids_to_keep_is_replayed_on_all_ranks(ranks, name, policy):
    plain = ranks(run_functional, name, False)
    results = ranks(run_functional, name, True, policy)
    assert_same_gradients(results, plain)
    assert_replayed(results)
    for got, expected in zip(results, plain, strict=True):
        assert exchanges(got.collectives) == Counter(exchanges(expected.collectives)) + Counter(
            exchanges(expected.in_forward)
        )
        # Those that the region waits for are waited for again; reading too early may go well.
        wait = "_c10d_functional.wait_tensor"
        assert got.in_backward[wait] == expected.in_backward[wait] + expected.in_forward[wait]


def exchanges(counts):
    """The collectives themselves: waits are no talk."""
    return {
        name: num
        for name, num in counts.items()
        if name.startswith("_c10d_functional.")
        and not name.endswith(("_tensor_autograd", "wait_tensor"))
    }


@pytest.mark.parametrize("preset", [recompute_all, save_matmuls])
def test_a_policy_that_does_not_name_collectives_keeps_them(ranks, preset):
    plain = ranks(run_functional, "all_reduce", False)
    results = ranks(run_functional, "all_reduce", True, None, preset)
    assert_same_gradients(results, plain)
    assert_replayed(results)
    assert [got.collectives for got in results] == [expected.collectives for expected in plain]


def different_needs(x):
    """Backward reads what has been exchanged in rank 0 alone."""
    y = funcol.all_reduce(x, "sum", group())
    return y.sin() if dist.get_rank() == 0 else y * 2


class OneSided(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return different_needs(self.first(x.sin()).tanh())


def run_one_sided(wrap):
    torch.manual_seed(0)
    model = checkpoint_wrapper(OneSided(), impl=REPLAY, verify="never") if wrap else OneSided()
    return two_steps(model, torch.ones(4, 4, requires_grad=True))


def test_no_rank_waits_for_one_that_does_not_need_the_collective(ranks):
    """A rerun hangs here: it ends early in rank 1, before the collective."""
    plain = ranks(run_one_sided, False)
    results = ranks(run_one_sided, True)
    assert_same_gradients(results, plain)
    assert_replayed(results)


def run_nested(outer, inner, wrap):
    """A region with a collective in a region with another one."""
    torch.manual_seed(0)
    model = Exchanging(FUNCTIONAL["all_reduce"])
    outer_model = nn.Sequential(model, Exchanging(FUNCTIONAL["all_to_all"]))
    if wrap:
        outer_model[0] = checkpoint_wrapper(model, impl=inner)
        outer_model = checkpoint_wrapper(outer_model, impl=outer)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    return two_steps(outer_model, x.requires_grad_())


@pytest.mark.parametrize("outer", [REPLAY, NO_REENTRANT])
@pytest.mark.parametrize("inner", [REPLAY, NO_REENTRANT])
def test_regions_with_collectives_in_each_other(ranks, outer, inner):
    plain = ranks(run_nested, None, None, False)
    results = ranks(run_nested, outer, inner, True)
    assert_same_gradients(results, plain)
    assert [got.fallen for got in results] == [[], []]


# --- Collectives in place ---------------------------------------------------------------------


class SumInForward(torch.autograd.Function):
    """Sum over ranks of what each has computed, as after a row-parallel Linear."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class SumInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class SumOfSaved(torch.autograd.Function):
    """Reads what the collective has left, and what was there before, in its backward."""

    @staticmethod
    def forward(ctx, x):
        total = x.sin()
        ctx.before = total.cos()
        dist.all_reduce(total)
        ctx.save_for_backward(x, total)
        return total.exp()

    @staticmethod
    def backward(ctx, gradient):
        x, total = ctx.saved_tensors
        gradient = gradient * total.exp()
        dist.all_reduce(gradient)
        return gradient * x.cos()


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient):
        out = torch.empty_like(gradient)
        dist.all_to_all_single(out, gradient.contiguous())
        return out


class Gather(torch.autograd.Function):
    """Gather into a list, which the collective gets as an argument inside of an argument."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def detached_statistics(x):
    """A mean over ranks that needs no gradient, as in an auxiliary loss or a global norm."""
    mean = x.detach().mean()
    dist.all_reduce(mean)
    return x * mean.sigmoid()


def overwritten_after_a_read(x):
    """The collective writes over what an operator has read and autograd needs again."""
    total = x.detach() * 2
    y = x * total.sin()
    dist.all_reduce(total)
    return y * total


def not_waited_for(x):
    total = x.detach() * 2
    work = dist.all_reduce(total, async_op=True)
    y = x.cos()
    work.wait()
    return y * total


IN_PLACE = {
    "sum_in_forward": SumInForward.apply,
    "sum_in_backward": SumInBackward.apply,
    "sum_of_saved": SumOfSaved.apply,
    "exchange": Exchange.apply,
    "gather": Gather.apply,
    "detached_statistics": detached_statistics,
    "overwritten_after_a_read": overwritten_after_a_read,
    "not_waited_for": not_waited_for,
}


def run_in_place(name, wrap, policy=None, preset=None):
    return run_exchanging(IN_PLACE[name], wrap, policy, preset)


@pytest.mark.parametrize("policy", [None, forbid_collectives, forbid_most])
@pytest.mark.parametrize("name", IN_PLACE)
def test_collectives_in_place(ranks, name, policy):
    """What they leave is held as it is: no rank runs one again in backward."""
    plain = ranks(run_in_place, name, False)
    results = ranks(run_in_place, name, True, policy)
    assert_same_gradients(results, plain)
    assert_replayed(results)
    assert [got.collectives for got in results] == [expected.collectives for expected in plain]


# --- DTensor: tensor and sequence parallelism -------------------------------------------------

DIM, HIDDEN, BATCH, SEQUENCE = 8, 16, 2, 4


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm(x))).sin())


def tensor_parallel():
    return {"up": ColwiseParallel(), "down": RowwiseParallel()}


def without_locals():
    """DTensors between the layers and behind the last one."""
    return {
        "norm": SequenceParallel(use_local_output=False),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }


def sequence_parallel():
    """As torchtitan has it: norms on a part of the sequence, gathered before the first product."""
    return {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }


PLANS = [tensor_parallel, sequence_parallel, without_locals]


def run_parallel(plan, wrap, preset=None, policy=None):
    torch.manual_seed(0)
    model = nn.Sequential(MLP(), MLP())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for index, mlp in enumerate(model):
        parallelize_module(mlp, mesh, plan())
        if wrap:
            policy = preset() if preset is not None else policy
            model[index] = checkpoint_wrapper(mlp, impl=REPLAY, policy=policy)
    size = SEQUENCE if plan is tensor_parallel else SEQUENCE // dist.get_world_size()
    seed = 0 if plan is tensor_parallel else dist.get_rank()
    x = torch.randn(BATCH, size, DIM, generator=torch.Generator().manual_seed(seed))
    return two_steps(model, x.requires_grad_())


@pytest.mark.parametrize("preset", [None, recompute_all, save_matmuls])
@pytest.mark.parametrize("plan", PLANS)
def test_parallel_layers(ranks, plan, preset):
    plain = ranks(run_parallel, plan, False)
    results = ranks(run_parallel, plan, True, preset)
    assert_same_gradients(results, plain)
    assert_replayed(results)
    for got, expected in zip(results, plain, strict=True):
        assert exchanges(got.collectives) == exchanges(expected.collectives)
        # The last product of each MLP is needed by nobody.
        num_recomputed = 0 if preset is save_matmuls else 2
        assert got.num_matmuls == expected.num_matmuls + num_recomputed
        assert exchanges(got.in_forward) == exchanges(expected.in_forward)


@pytest.mark.parametrize("plan", PLANS)
def test_collectives_of_parallel_layers_are_replayed_if_the_policy_wants_it(ranks, plan):
    plain = ranks(run_parallel, plan, False)
    results = ranks(run_parallel, plan, True, None, forbid_collectives)
    assert_same_gradients(results, plain)
    assert_replayed(results)
    # Each MLP's gather is needed again; its last sum, or scatter, is needed by nobody.
    num_gathers = 0 if plan is tensor_parallel else 2
    for got, expected in zip(results, plain, strict=True):
        assert got.num_matmuls == expected.num_matmuls
        more = Counter(got.collectives)
        more.subtract(expected.collectives)
        assert more["_c10d_functional.all_gather_into_tensor"] == num_gathers
        assert more["_c10d_functional.all_reduce"] == 0
        assert more["_c10d_functional.reduce_scatter_tensor"] == 0
        # Each is waited for. Reading too early gives wrong gradients only at times.
        assert more["_c10d_functional.wait_tensor"] == num_gathers


# --- FSDP2 ------------------------------------------------------------------------------------

FACES = ("wrapper", "in_place_before", "in_place_after")


def shard(model, face, preset, counts=None, **options):
    """Regions in FSDP modules; or around them, where the face is ``outside``."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wrap = partial(
        apply_activation_checkpointing,
        model,
        check_fn=lambda module: isinstance(module, Block),
        inplace=face.startswith("in_place"),
        impl=REPLAY,
        policy=None if preset is None else preset(),
    )
    if face in ("wrapper", "in_place_before"):
        wrap()
    units = {f"block {i}": fully_shard(b, mesh=mesh, **options) for i, b in enumerate(model.blocks)}
    if face in ("outside", "in_place_after"):
        wrap()
    units["root"] = fully_shard(model, mesh=mesh, **options)
    if counts is not None:
        for name, unit in units.items():
            unit.set_custom_all_gather(CountingAllGather(counts, (name, "all-gather")))
            unit.set_custom_reduce_scatter(CountingReduceScatter(counts, (name, "reduce-scatter")))
    return model


@dataclass
class Sharded:
    """What the second of two steps has left in one rank."""

    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    collectives: dict[tuple[str, str], int]
    fallen: list[str]
    num_replayed: list[int]
    warnings: list[str]


def twice(step, model, rank):
    for _ in range(2):
        model.zero_grad()
        step(model, rank)


def run_sharded(face, preset, step, options=None, batch_norm=True):
    counts = Counter()
    model = shard(make_model(batch_norm), face, preset, counts, **(options or {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(model, dist.get_rank())
        model.zero_grad()
        counts.clear()
        step(model, dist.get_rank())
    known = [region.experience for region in regions(model)]
    return Sharded(
        gradients(model),
        buffers(model),
        dict(counts),
        [experience.reason for experience in known if experience.fallen_at is not None],
        [experience.stats.num_replayed for experience in known if experience.stats is not None],
        [str(warning.message) for warning in caught],
    )


def assert_sharded(results, expected, step=None):
    """Compare with a single process; the buffers too if the step is given."""
    updated = None if step is None else single_process(make_model(), partial(twice, step)).buffers
    for rank, got in enumerate(results):
        assert_equal(got.gradients, expected.gradients)
        if updated is not None:
            assert_equal(got.buffers, updated[rank])


def assert_all_replayed(results):
    for got in results:
        assert got.warnings == []
        assert got.fallen == []
        assert len(got.num_replayed) == NUM_BLOCKS
        assert all(num > 0 for num in got.num_replayed)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(
    ("step", "preset"),
    [*((step, save_matmuls) for step in STEPS.values()), (one_step, None)],
    ids=[*STEPS, "no_policy"],
)
@pytest.mark.parametrize("face", FACES)
def test_regions_in_fsdp_modules(ranks, face, step, preset, reshard):
    results = ranks(run_sharded, face, preset, step, {"reshard_after_forward": reshard})
    assert_sharded(results, reference(NO_REENTRANT, step), step)
    assert_all_replayed(results)


@pytest.mark.parametrize(("reshard", "num_all_gathers"), [(True, 2), (False, 1)])
@pytest.mark.parametrize(
    ("face", "preset"),
    [*((face, save_matmuls) for face in FACES), ("wrapper", None), ("outside", None)],
)
def test_collectives_of_a_layer_are_those_of_plain_fsdp(
    ranks, face, preset, reshard, num_all_gathers
):
    results = ranks(run_sharded, face, preset, one_step, {"reshard_after_forward": reshard})
    units = [f"block {index}" for index in range(NUM_BLOCKS)] + ["root"]
    expected = {(unit, "all-gather"): num_all_gathers for unit in units}
    expected |= {(unit, "reduce-scatter"): 1 for unit in units}
    assert [got.collectives for got in results] == [expected, expected]


@pytest.mark.parametrize("face", FACES)
def test_mixed_precision(ranks, face):
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = ranks(run_sharded, face, save_matmuls, one_step, {"mp_policy": bf16}, False)
    assert_sharded(results, single_process(make_model(batch_norm=False), bf16_step))
    assert_all_replayed(results)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("preset", [None, save_matmuls])
def test_a_region_around_an_fsdp_module_is_rerun_and_says_why(ranks, preset, step):
    results = ranks(run_sharded, "outside", preset, step)
    assert_sharded(results, reference(NO_REENTRANT, step), step)
    for got in results:
        assert len(got.fallen) == NUM_BLOCKS
        assert all("FSDP module inside" in reason for reason in got.fallen)
        assert len(got.warnings) == NUM_BLOCKS
        for index, text in enumerate(got.warnings):
            assert text.startswith(f"region `blocks.{index}` is rerun from now on")
            assert "an FSDP module inside moves its parameters" in text


def reported():
    model = shard(make_model(), "outside", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they fall back
        one_step(model, dist.get_rank())
    return [(row.fqn, row.impl.name, bool(row.reason)) for row in region_report(model).rows]


def test_regions_around_fsdp_modules_are_in_the_report(ranks):
    rows = [(f"blocks.{index}", "NO_REENTRANT", True) for index in range(NUM_BLOCKS)]
    assert ranks(reported) == [rows, rows]


# --- DDP --------------------------------------------------------------------------------------


def run_ddp(preset, step, inplace=False):
    model = make_model()
    if preset is not None:
        apply_activation_checkpointing(
            model,
            check_fn=lambda module: isinstance(module, Block),
            inplace=inplace,
            policy=preset(),
        )
    ddp = DistributedDataParallel(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(ddp, dist.get_rank())
    known = [region.experience for region in regions(model)]
    return Sharded(
        gradients(model),
        buffers(model),
        {},
        [experience.reason for experience in known if experience.fallen_at is not None],
        [experience.stats.num_replayed for experience in known if experience.stats is not None],
        [str(warning.message) for warning in caught],
    )


@pytest.mark.parametrize(
    "step",
    # Before torch 2.13 the plain model's second forward changes buffers that the first has saved.
    [s for s in DDP_STEPS.values() if s is not two_forwards or torch.__version__ >= "2.13"],
    ids=lambda step: step.__name__,
)
@pytest.mark.parametrize("preset", [save_matmuls, recompute_all])
@pytest.mark.parametrize("inplace", [False, True])
def test_ddp(ranks, preset, step, inplace):
    plain = ranks(run_ddp, None, step)
    results = ranks(run_ddp, preset, step, inplace)
    expected = single_process(make_model(), step)
    for got, theirs in zip(results, plain, strict=True):
        assert_equal(got.gradients, expected.gradients)
        assert_equal(got.gradients, theirs.gradients)
        assert_equal(got.buffers, theirs.buffers)
    assert_all_replayed(results)
