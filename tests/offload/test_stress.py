"""Random programs, pipelines, threads and faults: a right gradient or a clear error, and no hang.

Everything runs in a thread that is watched: see ``within``.
"""

from __future__ import annotations

import copy
import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrappers
from tests.offload.helpers import StrictTransport, are_equal, stack, step, until, within
from wrappers import CheckpointImpl, OffloadError, _knobs
from wrappers.offload.simulated import Fault, SimulatedTransport
from wrappers.offload.store import finish_offloading, reset_offloading, store_for

DIM = 24
BATCH = 8
TENSOR_BYTES = BATCH * DIM * 4

pytestmark = [
    # Where there is no room, where a copy fails, and in a checkpointed region, users are told.
    pytest.mark.filterwarnings(
        "ignore:.*(no room left|pageable memory is used|copy to the .* has failed)"
    ),
]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, seeded):
    monkeypatch.setattr(_knobs, "OFFLOAD_SLAB_BYTES", 1 << 16)
    reset_offloading()
    gc.collect()
    gc.freeze()  # What a test finds need not be looked at again and again.
    yield
    reset_offloading()


# --- Random programs ------------------------------------------------------------------------------


class Block(nn.Module):
    """Some operators, chosen by a seed, on ``x`` and on a tensor that all blocks share."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.operators = rng.choices(sorted(OPERATORS), k=rng.randint(2, 5))
        self.cut = rng.randint(1, DIM - 1)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        for name in self.operators:
            x = OPERATORS[name](self, x, shared)
        return x


def _views(block: Block, x: Tensor, shared: Tensor) -> Tensor:
    left, right = x[:, : block.cut], x[:, block.cut :]
    return torch.cat([right.sin() * right, left.cos() * left], dim=1)


def _transposed(block: Block, x: Tensor, shared: Tensor) -> Tensor:
    return (x @ x.t()).softmax(-1) @ x + x.t().contiguous().t()


def _in_place(block: Block, x: Tensor, shared: Tensor) -> Tensor:
    y = block.first(x)
    y.mul_(0.5).add_(1.0)
    y[:, : block.cut] += 1.0
    return y.tanh_() * x


def _strided(block: Block, x: Tensor, shared: Tensor) -> Tensor:
    even = x[:, ::2]
    return (even.exp() / (1 + even.exp())).repeat_interleave(2, dim=1) * shared.flip(0)


OPERATORS: dict[str, Callable[[Block, Tensor, Tensor], Tensor]] = {
    "linear": lambda block, x, shared: torch.nn.functional.gelu(block.first(x)),
    "residual": lambda block, x, shared: x + block.second(block.first(x).relu()),
    "dropout": lambda block, x, shared: torch.nn.functional.dropout(x, 0.3) * shared,
    "shared": lambda block, x, shared: x * shared.t().t() + shared[:, :1],
    "expanded": lambda block, x, shared: x * x.mean(1, keepdim=True).expand_as(x).sigmoid(),
    "normed": lambda block, x, shared: torch.nn.functional.layer_norm(x, (DIM,)) * x,
    "double": lambda block, x, shared: (x.double().sin() * shared).float(),
    "views": _views,
    "transposed": _transposed,
    "in place": _in_place,
    "strided": _strided,
}


class Program(nn.Module):
    """Blocks in a row; the shared tensor is saved by many of them."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.entry = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(Block(rng) for _ in range(rng.randint(3, 7)))

    def forward(self, x: Tensor) -> Tensor:
        shared = self.entry(x).sigmoid()
        for block in self.blocks:
            x = block(x, shared)
        return x + shared


def checkpoint_some(model: Program, rng: random.Random) -> Program:
    """Checkpoint some blocks. Sums of gradients have another order then, so first of all."""
    for index, block in enumerate(model.blocks):
        if rng.random() < 0.4:
            impl = rng.choice(list(CheckpointImpl))
            model.blocks[index] = wrappers.checkpoint_wrapper(block, impl=impl)
    return model


def offload_most(model: Program, rng: random.Random, directory: str) -> Program:
    """Offload most blocks, in one of many ways."""
    for index, block in enumerate(model.blocks):
        if rng.random() < 0.85:
            is_on_disk = rng.random() < 0.2
            model.blocks[index] = wrappers.offload_wrapper(
                block,
                inplace=rng.random() < 0.3,
                tier="disk" if is_on_disk else "host",
                directory=directory if is_on_disk else None,
                min_bytes=rng.choice([0, 0, 200]),
                keep_last=rng.choice([0, 1, 1, 2]),
                max_inflight_bytes=rng.choice([None, 1, TENSOR_BYTES, 4 * TENSOR_BYTES]),
                prefetch=rng.choice([0, 1, 1, 3]),
                ratio=rng.choice([1.0, 1.0, 0.5]),
                checksum=rng.random() < 0.2,
            )
    return model


def transport_settings(rng: random.Random) -> dict[str, Any]:
    bandwidth = rng.choice([1e9, 1e7, float("inf")])
    return {
        "bandwidth_bytes_per_s": bandwidth,
        "latency_s": rng.choice([0.0, 1e-6, 1e-3]),
        "host_bytes": rng.choice([None, None, 1 << 16]),
    }


def seeded_step(model: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return step(model, x)


def assert_all_is_free(device: SimulatedTransport) -> None:
    """Nothing is away, no buffer is in use, and what was away or came back is dead."""
    finish_offloading()
    gc.collect()
    for tier in wrappers.offload_stats().tiers:
        assert (tier.num_alive, tier.used_bytes) == (0, 0), tier.name
    if not isinstance(device, StrictTransport):  # Its shadows outlive what they stand for.
        until(lambda: device.device_bytes == 0, 5.0)  # A thread of its lets go of its last copy.


@pytest.mark.parametrize("seed", range(60))
def test_a_random_program_is_equal_to_the_plain_one(seed, tmp_path):
    rng = random.Random(seed)
    plain = checkpoint_some(Program(rng), rng)
    model = offload_most(copy.deepcopy(plain), rng, str(tmp_path))
    x = torch.randn(BATCH, DIM)
    make = StrictTransport if seed % 2 else SimulatedTransport

    def run() -> None:
        with make(**transport_settings(rng)) as device:
            for number in range(3):
                expected = seeded_step(plain, x, number)
                assert all(bool(t.isfinite().all()) for t in expected)
                assert are_equal(seeded_step(model, x, number), expected)
            assert_all_is_free(device)
            if isinstance(device, StrictTransport):
                assert device.violations == []

    within(run)


@pytest.mark.parametrize("seed", range(100, 112))
def test_a_transport_100_times_slower_changes_no_value(seed, tmp_path):
    rng = random.Random(seed)
    model = offload_most(checkpoint_some(Program(rng), rng), rng, str(tmp_path))
    x = torch.randn(BATCH, DIM)
    settings = transport_settings(rng)
    results = []
    for factor in (1, 100):
        slower = {**settings, "bandwidth_bytes_per_s": 1e9 / factor, "latency_s": 1e-6 * factor}

        def run(settings=slower) -> list[list[Tensor]]:
            with StrictTransport(**settings) as device:
                steps = [seeded_step(model, x, number) for number in range(3)]
                assert all(bool(t.isfinite().all()) for values in steps for t in values)
                assert_all_is_free(device)
                assert device.violations == []
                return steps

        results.append(within(run))
        reset_offloading()
    assert all(map(are_equal, *results))


# --- Pipelines and threads ------------------------------------------------------------------------


#: An odd number of elements: a byte that is corrupted is not the lowest of an element, whose change
#: a sum may round away.
SHAPE = (7, 15)


def plain_stack() -> nn.Sequential:
    return stack(4, num_layers=2, dim=SHAPE[1])


def offloaded_stack(**settings: Any) -> nn.Sequential:
    model = plain_stack()
    for index, block in enumerate(model):
        model[index] = wrappers.offload_wrapper(block, min_bytes=0, **settings)
        model[index].region_fqn = f"blocks.{index}"
    return model


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("keep_last", [0, 1, 3])
def test_micro_batches_in_1f1b_order(keep_last, is_slow):
    model = offloaded_stack(keep_last=keep_last, max_inflight_bytes=2048)
    batches = [torch.randn(*SHAPE) for _ in range(6)]

    def run_step() -> list[Tensor]:
        model.zero_grad()
        pending, results = [], []

        def forward(x: Tensor) -> None:
            leaf = x.clone().requires_grad_()
            pending.append((leaf, model(leaf * 1.0)))

        def backward() -> None:
            leaf, out = pending.pop(0)
            out.square().sum().backward()
            results.extend([leaf.grad, out.detach()])

        for x in batches[:2]:
            forward(x)
        for x in batches[2:]:
            forward(x)
            backward()
        while pending:
            backward()
        return [*results, *(p.grad.clone() for p in model.parameters())]

    expected = run_step()

    def run() -> None:
        with StrictTransport(bandwidth_bytes_per_s=1e6 if is_slow else 1e8) as device:
            for _ in range(3):
                assert are_equal(run_step(), expected)
            assert_all_is_free(device)
            assert device.violations == []
            assert device.num_copies("D2H") > 0

    within(run)


def in_threads(functions: list[Callable[[], None]]) -> None:
    """Call functions at once, each in a watched thread; raise what one of them has raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], None]) -> None:
        barrier.wait(10)
        try:
            within(function)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("limit_bytes", [512, 1 << 20])
def test_threads_with_models_of_their_own(limit_bytes, tier, tmp_path):
    directory = str(tmp_path) if tier == "disk" else None
    models = [
        offloaded_stack(max_inflight_bytes=limit_bytes, tier=tier, directory=directory)
        for _ in range(4)
    ]
    inputs = [torch.randn(*SHAPE) for _ in models]
    plain = plain_stack()
    expected = [step(plain, x) for x in inputs]

    with SimulatedTransport(bandwidth_bytes_per_s=1e8, latency_s=1e-6) as device:

        def train(index: int) -> None:
            for _ in range(8):
                assert are_equal(step(models[index], inputs[index]), expected[index])

        in_threads([lambda i=i: train(i) for i in range(len(models))])
        assert_all_is_free(device)


@pytest.mark.parametrize("limit_bytes", [512, 1 << 20])
def test_threads_in_backward_of_the_same_graph(limit_bytes):
    model = offloaded_stack(max_inflight_bytes=limit_bytes, keep_last=0)
    plain = plain_stack()
    leaf = torch.randn(*SHAPE, requires_grad=True)
    wanted = [leaf, *model.parameters()]
    expected = torch.autograd.grad(plain(leaf * 1.0).sum(), [leaf, *plain.parameters()])

    with SimulatedTransport(bandwidth_bytes_per_s=1e8, latency_s=1e-6) as device:
        for _ in range(4):
            loss = model(leaf * 1.0).sum()

            def backward(loss=loss) -> None:
                for _ in range(3):
                    grads = torch.autograd.grad(loss, wanted, retain_graph=True)
                    assert are_equal(list(grads), list(expected))

            in_threads([backward] * 4)
            del loss, backward
        assert_all_is_free(device)


def test_the_disk_remembers_no_copies_that_are_over(tmp_path):
    model, x = (
        offloaded_stack(tier="disk", directory=str(tmp_path), keep_last=0),
        torch.ones(*SHAPE),
    )

    def run() -> None:
        with SimulatedTransport(bandwidth_bytes_per_s=1e9, latency_s=0.0):
            for _ in range(10):
                step(model, x, finish_offloading)
            tier = store_for(model[0].offload_settings).tier
            until(lambda: all(job.is_done() for job in [*tier._staged, *tier._landing]))
            step(model, x, finish_offloading)
            # Those of a step are looked through at the next copy.
            assert len(tier._staged) <= 8
            assert len(tier._landing) <= 8

    within(run)


# --- Faults ---------------------------------------------------------------------------------------

NUM_COPIES = {"D2H": 8, "H2D": 8}  # of a step of the stack below, at most
TIERS = [("host", True), ("host", False), ("disk", True)]


class Faults:
    """A transport's fault function: at some copies of a step, or at all of a direction."""

    def __init__(self) -> None:
        self.planned: dict[tuple[str, int], Fault] = {}
        self.everywhere: dict[str, Fault] = {}
        self.num_met = 0

    def __call__(self, direction: str, number: int) -> Fault | None:
        fault = self.everywhere.get(direction) or self.planned.pop((direction, number), None)
        self.num_met += fault is not None
        return fault


class Outcome:
    """How a step ended: with values, or an error."""

    def __init__(self, model: nn.Module, x: Tensor, before_backward: Callable[[], None]) -> None:
        self.values: list[Tensor] | None = None
        self.error: OffloadError | None = None
        try:
            self.values = step(model, x, before_backward)
        except OffloadError as error:
            self.error = error.with_traceback(None)
            error.__cause__ = error.__context__ = None


def run_with_faults(
    plan: Callable[[Faults, SimulatedTransport], None],
    *,
    directory: str | None,
    checksum: bool,
    keep_last: int = 0,
    **settings: Any,
) -> Outcome:
    """One step without faults, one with them, one without: the middle one's outcome.

    The first and the last are right, and nothing is alive after any of them.
    """
    model = offloaded_stack(
        keep_last=keep_last,
        tier="disk" if directory else "host",
        directory=directory,
        checksum=checksum,
    )
    x = torch.randn(*SHAPE)
    expected = step(model, x)
    faults = Faults()
    # Files are written in real time: else backward may be there before they are.
    before_backward = finish_offloading if directory else lambda: None

    def run() -> Outcome:
        settings_of_copies = {"bandwidth_bytes_per_s": 1e9, "latency_s": 0.0, **settings}
        with SimulatedTransport(fault=faults, **settings_of_copies) as device:
            compute = device.compute
            for layer in model.modules():
                if hasattr(layer, "forward_s"):
                    layer.forward_s = layer.backward_s = 1.0
                    layer.compute = compute
            assert are_equal(step(model, x, before_backward), expected)
            assert_all_is_free(device)
            plan(faults, device)
            outcome = Outcome(model, x, before_backward)
            assert outcome.values is None or are_equal(outcome.values, expected)
            assert_all_is_free(device)
            faults.planned.clear()
            faults.everywhere.clear()
            for _ in range(2):
                assert are_equal(step(model, x), expected)
                assert_all_is_free(device)
            assert faults.num_met > 0
        return outcome

    outcome = within(run)
    if outcome.error is not None:
        assert outcome.error.fqn in [f"blocks.{index}" for index in range(4)]
        assert f"region `{outcome.error.fqn}`: {outcome.error.num_bytes:,} bytes" in str(
            outcome.error
        )
        assert outcome.error.num_bytes == x.nbytes
        assert outcome.error.tier == ("disk" if directory else "host")
    return outcome


def at(direction: str, number: int, fault: Fault) -> Callable[[Faults, SimulatedTransport], None]:
    """Plan a fault for a copy of the next step."""

    def plan(faults: Faults, device: SimulatedTransport) -> None:
        faults.planned[direction, device.num_copies(direction) + number] = fault

    return plan


FAULTS = {
    "fail": Fault("fail"),
    "delay": Fault("delay", delay_s=3.5),
    "long delay": Fault("delay", delay_s=1000.0),
    "corrupt": Fault("corrupt"),
}


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("direction", ["D2H", "H2D"])
@pytest.mark.parametrize("kind", ["fail", "delay", "long delay"])
@pytest.mark.parametrize("tier", ["host", "host, checked", "disk"])
def test_one_copy_that_fails_or_is_late_changes_nothing(tier, kind, direction, number, tmp_path):
    outcome = run_with_faults(
        at(direction, number, FAULTS[kind]),
        directory=str(tmp_path) if tier == "disk" else None,
        checksum=tier == "host, checked",
    )
    assert outcome.error is None


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("direction", ["D2H", "H2D"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_one_copy_that_corrupts_is_found_by_checksums(tier, direction, number, tmp_path):
    outcome = run_with_faults(
        at(direction, number, FAULTS["corrupt"]),
        directory=str(tmp_path) if tier == "disk" else None,
        checksum=True,
    )
    if direction == "H2D":
        assert outcome.error is None  # The second attempt brings it back.
    else:
        assert outcome.error is not None
        assert outcome.error.fqn == f"blocks.{number // 2}"


def always(direction: str, kind: str) -> Callable[[Faults, SimulatedTransport], None]:
    def plan(faults: Faults, device: SimulatedTransport) -> None:
        faults.everywhere[direction] = FAULTS[kind]

    return plan


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize(
    ("direction", "kind", "is_error"),
    [
        ("D2H", "fail", False),  # All tensors stay.
        ("D2H", "long delay", False),
        ("D2H", "corrupt", True),
        ("H2D", "fail", True),
        ("H2D", "long delay", False),
        ("H2D", "corrupt", True),
    ],
)
def test_a_direction_that_does_not_work_at_all(direction, kind, is_error, tier, tmp_path):
    outcome = run_with_faults(
        always(direction, kind),
        directory=str(tmp_path) if tier == "disk" else None,
        checksum=True,
    )
    assert (outcome.error is not None) == is_error
    if outcome.error is not None:
        assert outcome.error.fqn == "blocks.3"  # The first that backward wants.


def test_a_corrupted_copy_without_checksums_is_what_the_checksums_are_for():
    with pytest.raises(AssertionError):
        run_with_faults(at("D2H", 3, FAULTS["corrupt"]), directory=None, checksum=False)


@pytest.mark.parametrize("seed", range(30))
def test_many_faults_at_once(seed, tmp_path):
    rng = random.Random(seed)

    def plan(faults: Faults, device: SimulatedTransport) -> None:
        for direction in ("D2H", "H2D"):
            for number in range(16):
                if rng.random() < 0.4:
                    at(direction, number, FAULTS[rng.choice(sorted(FAULTS))])(faults, device)
        at("D2H", 0, FAULTS["fail"])(faults, device)

    is_on_disk = seed % 3 == 0
    run_with_faults(
        plan,
        directory=str(tmp_path) if is_on_disk else None,
        checksum=True,
        keep_last=rng.choice([0, 1]),
        bandwidth_bytes_per_s=rng.choice([1e9, 256.0, 64.0]),
    )


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("num_tensors", [0, 1, 2, 5])
def test_device_memory_that_ends_in_backward(num_tensors, tier, tmp_path):
    """What comes back finds no room: an error of the device's, and a right next step."""
    model = offloaded_stack(
        keep_last=0, tier=tier, directory=str(tmp_path) if tier == "disk" else None
    )
    x = torch.randn(*SHAPE)
    expected = step(plain_stack(), x)

    def run() -> None:
        with SimulatedTransport(bandwidth_bytes_per_s=1e9, latency_s=0.0) as device:
            for _ in range(2):
                model.zero_grad()
                leaf = x.clone().requires_grad_()
                out = model(leaf * 1.0)
                finish_offloading()
                gc.collect()
                device._max_device_bytes = device.device_bytes + num_tensors * x.nbytes
                try:
                    out.square().sum().backward()
                except torch.OutOfMemoryError:
                    pass
                else:
                    assert torch.equal(leaf.grad, expected[1])
                device._max_device_bytes = None
                del out, leaf
                assert_all_is_free(device)
            for _ in range(2):
                assert are_equal(step(model, x), expected)
            assert_all_is_free(device)

    within(run, 15)
