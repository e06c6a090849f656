"""What `region_report` says: counts and bytes worked out by hand, remarks, names, the table."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.engine.helpers import leaf
from wrappers import (
    CheckpointImpl,
    CheckpointPolicy,
    RegionReport,
    RegionRow,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
    region_report,
)
from wrappers.offload.simulated import SimulatedTransport
from wrappers.policies import recompute_all, save_matmuls
from wrappers.select import by_class

pytestmark = pytest.mark.usefixtures("no_leaks")

REENTRANT, NO_REENTRANT = CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT
REPLAY = CheckpointImpl.REPLAY
aten = torch.ops.aten

#: Rows of the input.
BATCH = 3
#: Bytes of a row of the hidden layer.
HIDDEN = 8 * 4


class Block(nn.Module):
    """Seven operators: t, mm, sin, exp, t, mm, add.

    Autograd saves the input and both weights, transposed, the first product (for the sine), and
    what exp returns (for exp and the second product): two hidden layers beyond what exists anyway.
    Backward depends neither on the second product nor on the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8, bias=False)
        self.down = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).sin().exp())


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def block_input(num_rows: int = BATCH) -> Tensor:
    return leaf(num_rows, 4)


def rows_of(model: nn.Module) -> dict[str, RegionRow]:
    return {row.fqn: row for row in region_report(model).rows}


def without_figures(fqn: str, impl: CheckpointImpl, **remarks: str) -> RegionRow:
    return RegionRow(fqn, impl, **remarks)


# --- Figures


def test_a_block_that_recomputes_everything():
    model = checkpoint_wrapper(Block(), policy=recompute_all())
    model(block_input()).sum().backward()
    assert region_report(model).rows == (
        RegionRow(
            fqn="",
            impl=REPLAY,
            num_operators=7,
            num_kept=0,
            num_replayed=5,
            num_dropped=2,
            num_offloaded=0,
            kept_bytes=0,
            released_bytes=BATCH * 2 * HIDDEN,
        ),
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("policy", [save_matmuls(), [aten.mm]], ids=["preset", "list"])
def test_a_block_that_keeps_its_products(policy, inplace):
    """The second product is not kept, as backward does not depend on it."""
    model = checkpoint_wrapper(Block(), policy=policy, inplace=inplace)
    model(block_input()).sum().backward()
    assert region_report(model).rows == (
        RegionRow(
            fqn="",
            impl=REPLAY,
            num_operators=7,
            num_kept=1,
            num_replayed=4,
            num_dropped=2,
            num_offloaded=0,
            kept_bytes=BATCH * HIDDEN,
            released_bytes=BATCH * HIDDEN,
        ),
    )


def test_memory_that_is_kept_is_not_released_through_a_view():
    """The sine saves the product's transpose, which needs no memory of its own."""
    weight = leaf(4, 8, seed=1)
    model = checkpoint_wrapper(Call(lambda x: (x @ weight).t().sin()), policy=[aten.mm])
    model(block_input()).sum().backward()
    (row,) = region_report(model).rows
    assert (row.kept_bytes, row.released_bytes) == (BATCH * HIDDEN, 0)
    assert (row.num_kept, row.num_replayed, row.num_dropped) == (1, 1, 1)


def test_without_a_policy_nothing_is_kept():
    model = checkpoint_wrapper(Block(), impl=REPLAY)
    model(block_input()).sum().backward()
    (row,) = region_report(model).rows
    assert (row.num_kept, row.kept_bytes) == (0, 0)
    assert (row.num_replayed, row.released_bytes) == (5, BATCH * 2 * HIDDEN)


def test_outputs_that_are_offloaded():
    """Both products are moved at once; the second one is let go at the end of the forward."""

    def offload(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_CPU_OFFLOAD if op is aten.mm.default else False

    model = checkpoint_wrapper(Block(), policy=offload)
    with SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0):
        model(block_input()).sum().backward()
    (row,) = region_report(model).rows
    assert (row.num_offloaded, row.num_kept, row.num_replayed) == (2, 1, 4)
    assert (row.kept_bytes, row.released_bytes) == (BATCH * HIDDEN, BATCH * HIDDEN)


def test_what_backward_has_replayed_so_far():
    model = checkpoint_wrapper(Block(), policy=recompute_all())
    loss = model(block_input()).sum()
    replayed = [region_report(model)[""].num_replayed]
    for _ in range(2):
        loss.backward(retain_graph=True)
        replayed.append(region_report(model)[""].num_replayed)
    assert replayed == [0, 5, 10]
    model(block_input())
    assert region_report(model)[""].num_replayed == 0


def test_counts_are_the_latest_calls_and_bytes_the_first_ones():
    def function(x):
        x = x.sin().exp()
        return x.sin() if len(x) > BATCH else x

    model = checkpoint_wrapper(Call(function), policy=recompute_all())
    model(block_input()).sum().backward()
    before = region_report(model)[""]
    model(block_input(2 * BATCH)).sum().backward()
    after = region_report(model)[""]
    assert (before.num_operators, after.num_operators) == (2, 3)
    assert before.released_bytes == after.released_bytes == BATCH * 4 * 4


def test_a_report_stays_what_it_was():
    model = checkpoint_wrapper(Block(), policy=recompute_all())
    loss = model(block_input()).sum()
    report = region_report(model)
    loss.backward()
    assert report[""].num_replayed == 0
    assert region_report(model) != report


def test_a_call_without_grad_mode_leaves_the_figures_alone():
    model = checkpoint_wrapper(Block(), policy=recompute_all())
    with torch.no_grad():
        model(block_input())
    assert region_report(model).rows == (without_figures("", REPLAY),)
    model(block_input()).sum().backward()
    before = region_report(model)
    with torch.no_grad():
        model(block_input())
    assert region_report(model) == before


# --- Rows without figures


def test_regions_that_have_not_run():
    model = nn.Sequential(*(Block() for _ in range(3)))
    apply_activation_checkpointing(model, check_fn=by_class(Block), policy=[aten.mm])
    model[1](block_input())
    rows = rows_of(model)
    assert rows["0"] == without_figures("0", REPLAY)
    assert rows["1"].num_operators == 7
    assert rows["2"] == without_figures("2", REPLAY)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("impl", [REENTRANT, NO_REENTRANT])
def test_other_implementations_record_no_operators(impl, inplace):
    model = nn.Sequential(Block())
    apply_activation_checkpointing(model, check_fn=by_class(Block), impl=impl, inplace=inplace)
    model(block_input()).sum().backward()
    assert region_report(model).rows == (without_figures("0", impl),)


def test_a_policy_on_no_reentrant_records_none_either():
    model = checkpoint_wrapper(Block(), policy=[aten.mm], impl=NO_REENTRANT)
    model(block_input()).sum().backward()
    assert region_report(model).rows == (without_figures("", NO_REENTRANT),)


def test_a_copy_of_a_model_starts_without_figures():
    model = checkpoint_wrapper(Block(), policy=[aten.mm])
    model(block_input()).sum().backward()
    other = copy.deepcopy(model)
    assert region_report(other).rows == (without_figures("", REPLAY),)
    assert region_report(model)[""].num_operators == 7


# --- Remarks


class Unseen(torch.autograd.Function):
    """Doubles into new memory as a kernel does that torch does not know."""

    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        out.numpy()[:] = 2 * x.detach().numpy()
        return out

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


REASON = (
    "it reads memory that no operator has written, so a kernel that torch does not see must have"
)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_region_that_has_fallen_back_says_why(inplace):
    model = nn.Sequential(Call(lambda x: Unseen.apply(x.sin()).cos()), Block())
    apply_activation_checkpointing(
        model, check_fn=lambda module: module in set(model), impl=REPLAY, inplace=inplace
    )
    with pytest.warns(UserWarning, match="region `0` is rerun from now on"):
        model(block_input()).sum().backward()
    rows = rows_of(model)
    assert rows["0"] == without_figures("0", NO_REENTRANT, reason=REASON)
    assert (rows["1"].impl, rows["1"].num_replayed, rows["1"].reason) == (REPLAY, 5, "")
    line = str(region_report(model)).splitlines()[1]
    assert line.startswith("0       NO_REENTRANT    -")
    assert line.endswith(f"  {REASON}")


def test_a_replay_that_could_not_be_compared_says_why():
    num_calls = torch.zeros(())

    def function(x):
        num_calls.add_(1)
        return x.sin().exp()

    model = checkpoint_wrapper(Call(function), impl=REPLAY)
    model(block_input()).sum().backward()
    (row,) = region_report(model).rows
    assert row.note == "it changes tensors from outside, a rerun would do it again"
    assert (row.impl, row.reason) == (REPLAY, "")
    assert row.num_operators == 3
    assert str(region_report(model)).splitlines()[1].endswith(f"  {row.note}")
    assert num_calls == 1


# --- Names and order


class Model(nn.Module):
    """Registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.last = Block()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.first = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_are_in_the_order_of_named_modules(inplace):
    model = Model()
    expected = [name for name, module in model.named_modules() if type(module) is Block]
    apply_activation_checkpointing(
        model, check_fn=by_class(Block), policy=[aten.mm], inplace=inplace
    )
    model(block_input()).sum().backward()
    report = region_report(model)
    assert [row.fqn for row in report.rows] == expected
    assert expected == ["last", "layers.0", "layers.1", "first"]
    assert {row.num_replayed for row in report.rows} == {4}


def test_wrapped_regions_and_regions_in_place_side_by_side():
    model = Model()
    model.last = checkpoint_wrapper(model.last, policy=[aten.mm])
    checkpoint_wrapper(model.layers[1], policy=recompute_all(), inplace=True)
    model.first = offload_wrapper(model.first)  # Not recomputed, so no region.
    model(block_input()).sum().backward()
    rows = region_report(model).rows
    assert [(row.fqn, row.num_replayed) for row in rows] == [("last", 4), ("layers.1", 5)]


def test_a_region_inside_another_wrapper_is_found():
    model = nn.Sequential(offload_wrapper(checkpoint_wrapper(Block(), policy=[aten.mm])))
    model(block_input()).sum().backward()
    (row,) = region_report(model).rows
    assert (row.fqn, row.num_replayed) == ("0", 4)


def test_a_region_and_those_inside_it_have_a_row_each():
    model = Model()
    for linear in ("up", "down"):
        setattr(model.last, linear, checkpoint_wrapper(getattr(model.last, linear), impl=REPLAY))
    model.last = checkpoint_wrapper(model.last, impl=NO_REENTRANT)
    model(block_input()).sum().backward()
    rows = region_report(model).rows
    assert [(row.fqn, row.impl, row.num_operators) for row in rows] == [
        ("last", NO_REENTRANT, None),
        ("last.up", REPLAY, 2),
        ("last.down", REPLAY, 2),
    ]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shared_module_has_one_row_under_its_first_name(inplace):
    shared = Block()
    model = nn.Sequential(shared, Block(), shared)
    apply_activation_checkpointing(
        model, check_fn=by_class(Block), policy=[aten.mm], inplace=inplace
    )
    model(block_input()).sum().backward()
    assert [row.fqn for row in region_report(model).rows] == ["0", "1"]


def test_rows_by_name():
    model = Model()
    apply_activation_checkpointing(model, check_fn=by_class(Block), policy=[aten.mm])
    report = region_report(model)
    assert report["layers.1"] is report.rows[2]
    for missing in ("layers", "layers.2", "layers.0.up", ""):
        with pytest.raises(KeyError) as caught:
            report[missing]
        assert caught.value.args == (missing,)


def test_a_model_without_regions():
    report = region_report(Model())
    assert report == RegionReport()
    with pytest.raises(KeyError):
        report[""]
    assert len(str(report).splitlines()) == 1


@pytest.mark.parametrize("thing", [None, 3, "model", [nn.Linear(1, 1)], nn.Linear])
def test_something_that_is_not_a_module(thing):
    with pytest.raises(TypeError, match=r"expected an nn\.Module.*, got "):
        region_report(thing)


# --- The table


def test_the_table_of_a_model():
    model = nn.Sequential(Block(), Block(), Block(), Block())
    model[0] = checkpoint_wrapper(model[0], policy=recompute_all())
    model[1] = checkpoint_wrapper(model[1], policy=save_matmuls())
    checkpoint_wrapper(model[2], impl=NO_REENTRANT, inplace=True)
    model(block_input(16)).sum().backward()
    assert str(region_report(model)) == (
        "region  impl          ops  kept  replayed  dropped     kept  released\n"
        "0       REPLAY          7     0         5        2  0.0 KiB   1.0 KiB\n"
        "1       REPLAY          7     1         4        2  0.5 KiB   0.5 KiB\n"
        "2       NO_REENTRANT    -     -         -        -        -         -"
    )


def test_the_table_of_a_region_without_a_name():
    model = checkpoint_wrapper(Block(), impl=REENTRANT)
    assert str(region_report(model)) == (
        "region     impl       ops  kept  replayed  dropped  kept  released\n"
        "(unnamed)  REENTRANT    -     -         -        -     -         -"
    )


def test_the_table_says_the_reason_or_else_the_note_and_sizes_from_a_mebibyte_on():
    figures = {"num_kept": 1, "num_replayed": 20, "num_dropped": 3, "num_offloaded": 0}
    rows = (
        RegionRow("a", NO_REENTRANT, reason="why"),
        RegionRow("layers.10", REPLAY, 24, **figures, kept_bytes=2**20 - 1, released_bytes=2**20),
        RegionRow("b", REPLAY, 24, **figures, kept_bytes=2**30, released_bytes=1536, note="aha"),
    )
    assert str(RegionReport(rows)) == (
        "region     impl          ops  kept  replayed  dropped        kept  released\n"
        "a          NO_REENTRANT    -     -         -        -           -         -  why\n"
        "layers.10  REPLAY         24     1        20        3  1024.0 KiB   1.0 MiB\n"
        "b          REPLAY         24     1        20        3  1024.0 MiB   1.5 KiB  aha"
    )


def test_rich_shows_the_same_cells():
    console = pytest.importorskip("rich.console")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_activation_checkpointing(model, check_fn=by_class(nn.Linear), impl=REPLAY)
    model(torch.randn(2, 4)).sum().backward()
    report = region_report(model)
    shown = console.Console(width=200, color_system=None)
    with shown.capture() as captured:
        shown.print(report)
    assert captured.get().split() == [*str(report).splitlines()[0].split(), "remark"] + [
        word for line in str(report).splitlines()[1:] for word in line.split()
    ]
