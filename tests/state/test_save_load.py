"""A state checkpoint goes from any job to any other, and training goes on as if nothing had been.

Values are compared bit by bit: parameters, optimizer state, settings, random states.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import distributed as dist

from tests.distributed.test_fsdp2 import ORDERS
from tests.state.jobs import LAYOUTS, PLAIN, assert_same, contents, draws, make_job
from wrappers import state
from wrappers.state import CheckpointException, api, faults

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(autouse=True)
def one_thread():
    """As in a rank: more would split sums in other places."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- From any job to any other ------------------------------------------------------------------


def save_trained(path, order, layout, save=state.save):
    job = make_job(order)
    job.train(3)
    saved = save(
        path, job.model, job.optimizer, job.extra, rank_extra=job.rank_extra, layout=layout
    )
    if save is state.async_save:
        saved = saved.result()
    assert saved == path
    return contents(job), job.losses, draws()


def load_into_other(path, order):
    job = make_job(order, seed=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = state.load(path, job.model, job.optimizer, job.extra, rank_extra=job.rank_extra)
    return contents(job), values, draws(), [str(each.message) for each in caught]


@pytest.fixture(scope="module", params=LAYOUTS)
def written_by_two(request, ranks, tmp_path_factory):
    """What a wrapped FSDP2 job of two processes has saved, and what it then had."""
    path = tmp_path_factory.mktemp("two") / "step-3"
    return path, ranks(save_trained, path, "inside", request.param)


@pytest.mark.parametrize("order", [*ORDERS, PLAIN])
def test_two_processes_to_two(ranks, written_by_two, order):
    path, saved = written_by_two
    for (expected, losses, expected_draws), (got, values, got_draws, caught) in zip(
        saved, ranks(load_into_other, path, order), strict=True
    ):
        assert_same(got, expected)
        assert values == {"losses": saved[0][1], "rank": {}}, losses
        assert got_draws == expected_draws
        assert caught == []
    assert saved[0][2] != saved[1][2], "each rank has its own random state"


def test_two_processes_to_one_plain_model(written_by_two):
    path, saved = written_by_two
    got, values, got_draws, caught = load_into_other(path, PLAIN)
    assert_same(got, saved[0][0])
    assert got_draws == saved[0][2]
    assert values == {"losses": saved[0][1], "rank": {}}
    assert caught == []


def test_two_processes_to_four(ranks4, written_by_two):
    path, saved = written_by_two
    results = ranks4(load_into_other, path, "in_place_before")
    for rank, (got, values, got_draws, caught) in enumerate(results):
        assert_same(got, saved[0][0])
        assert values["losses"] == saved[0][1]
        if rank < 2:
            assert got_draws == saved[rank][2]
            assert caught == []
        else:
            (text,) = caught
            assert f"no random states and rank_extra of rank {rank} (it was saved by 2" in text
            assert "rank" not in values
    assert results[2][2] != results[3][2], "they keep their own"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_plain_model_to_two_processes_and_back(ranks, tmp_path, layout):
    expected, losses, _ = save_trained(tmp_path / "one", PLAIN, layout)
    for got, values, *_ in ranks(load_into_other, tmp_path / "one", "outside"):
        assert_same(got, expected)
        assert values["losses"] == losses
    ranks(save_loaded, tmp_path / "one", tmp_path / "two", layout)
    got, *_ = load_into_other(tmp_path / "two", PLAIN)
    assert_same(got, expected)


def save_loaded(source, target, layout):
    job = make_job("in_place_after", seed=5)
    state.load(source, job.model, job.optimizer, job.extra, rng=False)
    state.save(
        target, job.model, job.optimizer, job.extra, rank_extra=job.rank_extra, layout=layout
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_processes_to_one(ranks4, tmp_path, layout):
    """With parameters of fewer rows than ranks: some ranks hold nothing of them."""
    saved = ranks4(save_trained, tmp_path / "four", "inside", layout)
    got, _, got_draws, _ = load_into_other(tmp_path / "four", PLAIN)
    assert_same(got, saved[0][0])
    assert got_draws == saved[0][2]


# --- Training goes on ---------------------------------------------------------------------------


def train_through(order, num_steps):
    job = make_job(order)
    job.train(num_steps)
    return job.losses, contents(job), draws()


def train_with_a_break(path, order, num_before, num_after, layout):
    job = make_job(order)
    job.train(num_before)
    state.save(path, job.model, job.optimizer, job.extra, rank_extra=job.rank_extra, layout=layout)
    job.train(1)  # lost
    resumed = make_job(order, seed=9)
    values = state.load(
        path, resumed.model, resumed.optimizer, resumed.extra, rank_extra=resumed.rank_extra
    )
    resumed.losses = job.losses[:num_before]  # extra holds those of the coordinator
    assert len(values["losses"]) == num_before
    resumed.train(num_after)
    return resumed.losses, contents(resumed), draws()


def check_resumed(resumed, through):
    assert resumed[0] == through[0]
    assert_same(resumed[1], through[1])
    assert resumed[2] == through[2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_before", [0, 3])
def test_resumed_training_in_one_process(tmp_path, layout, num_before):
    """From the very start too: an optimizer that has made no step has no state."""
    through = train_through(PLAIN, num_before + 3)
    assert len(set(through[0])) == num_before + 3
    resumed = train_with_a_break(tmp_path / "here", PLAIN, num_before, 3, layout)
    check_resumed(resumed, through)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_before", [0, 3])
def test_resumed_training_under_fsdp2(ranks, tmp_path, layout, num_before):
    through = ranks(train_through, "inside", num_before + 3)
    resumed = ranks(train_with_a_break, tmp_path / "here", "inside", num_before, 3, layout)
    assert through[0][0] != through[1][0]
    for of_rank in zip(resumed, through, strict=True):
        check_resumed(*of_rank)


def test_without_random_states_training_goes_on_with_others(tmp_path):
    path = tmp_path / "here"
    job = make_job()
    state.save(path, job.model, job.optimizer, rng=False)
    expected = draws()
    with pytest.warns(UserWarning, match="no random states of rank 0"):
        state.load(path, job.model, job.optimizer)
    assert draws() != expected
    state.load(path, job.model, job.optimizer, rng=False)


# --- Async --------------------------------------------------------------------------------------


def save_beside_training(path, order, layout):
    job = make_job(order)
    job.train(2)
    expected, losses = contents(job), list(job.losses)
    started = state.async_save(
        path, job.model, job.optimizer, job.extra, rank_extra=job.rank_extra, layout=layout
    )
    job.train(3)
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.fill_(-1)
    assert started.result(timeout=60) == path
    assert started.done()
    assert started.exception() is None
    return expected, losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_async_save_keeps_what_was_there_when_it_began(ranks, tmp_path, layout):
    saved = ranks(save_beside_training, tmp_path / "two", "inside", layout)
    got, values, *_ = load_into_other(tmp_path / "two", PLAIN)
    assert_same(got, saved[0][0])
    assert values["losses"] == saved[0][1]
    expected, losses = save_beside_training(tmp_path / "one", PLAIN, layout)
    got, values, *_ = load_into_other(tmp_path / "one", PLAIN)
    assert_same(got, expected)
    assert values["losses"] == losses


class BlockedWriter(torch.distributed.checkpoint.FileSystemWriter):
    """Writes when it is let; on some ranks it then fails."""

    def __init__(self, gate, fails=False):
        super().__init__("")
        self.gate, self.fails = gate, fails

    def write_data(self, plan, planner):
        assert self.gate.wait(60)
        if self.fails:
            raise OSError(28, "No space left on device")
        return super().write_data(plan, planner)


def test_one_async_save_at_a_time(tmp_path):
    job, gate = make_job(), threading.Event()
    first = state.async_save(tmp_path / "1", job.model, storage_writer=BlockedWriter(gate))
    with pytest.raises(TimeoutError):
        first.result(timeout=0.01)
    assert not first.done()
    assert state.latest(tmp_path) is None
    threading.Timer(0.2, gate.set).start()
    second = state.async_save(tmp_path / "2", job.model)
    assert first.done()
    assert second.result() == tmp_path / "2" == state.latest(tmp_path)


def fail_in_background(folder):
    """Each rank's view of an async save that fails on the last rank: asked, and not asked for."""
    job, gate = make_job(), threading.Event()
    gate.set()
    fails = not dist.is_initialized() or dist.get_rank() == 1
    seen = []
    for name in ("asked", "not asked"):
        writer = BlockedWriter(gate, fails)
        started = state.async_save(folder / name, job.model, storage_writer=writer)
        if name == "asked":
            error = started.exception()
        else:
            with pytest.raises(CheckpointException) as caught:
                state.save(folder / "next", job.model)
            error = caught.value
        seen.append({rank: repr(cause) for rank, (cause, _) in error.failures.items()})
    state.save(folder / "next", job.model)
    seen.append(state.latest(folder))
    return seen


def test_a_failure_in_the_background_is_raised_by_result_or_by_the_next_save(ranks, tmp_path):
    error = repr(OSError(28, "No space left on device"))
    alone = fail_in_background(tmp_path / "alone")
    assert alone == [{0: error}, {0: error}, tmp_path / "alone" / "next"]
    for seen in ranks(fail_in_background, tmp_path / "two"):
        assert seen == [{1: error}, {1: error}, tmp_path / "two" / "next"]


def test_a_failure_is_logged_at_exit_if_nobody_has_asked(tmp_path, caplog):
    gate = threading.Event()
    gate.set()
    for is_asked in (True, False):
        writer = BlockedWriter(gate, fails=True)
        started = state.async_save(tmp_path / "x", make_job().model, storage_writer=writer)
        if is_asked:
            assert isinstance(started.exception(), CheckpointException)
        started.wait()
        api._previous.report()
        assert ("the last async save has failed" in caplog.text) is not is_asked
    assert "No space left on device" in caplog.text
    api._previous.report()
    assert caplog.text.count("the last async save has failed") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_copy_is_freed_at_the_end(tmp_path, monkeypatch, fails):
    """Also where the failure that is kept, for whoever asks, was raised with the copy at hand."""
    copies, to_host = [], api.contents.to_host

    def watched(state_dict):
        copied = to_host(state_dict)
        copies.extend(weakref.ref(v) for v in copied.values() if isinstance(v, torch.Tensor))
        return copied

    monkeypatch.setattr(api.contents, "to_host", watched)
    gate = threading.Event()
    writer = BlockedWriter(gate, fails)
    started = state.async_save(tmp_path / "x", make_job().model, storage_writer=writer)
    assert all(copy() is not None for copy in copies)
    gate.set()
    error = started.exception()
    started.wait()
    gc.collect()
    assert copies
    assert all(copy() is None for copy in copies)
    assert (error is not None) is fails
    if fails:
        assert "in write_data" in str(error), "where it was raised is still known"


# --- Groups -------------------------------------------------------------------------------------


def save_in_a_subgroup(folder):
    """Ranks 1 and 3 of four save together; rank 0 of the group is rank 1."""
    group = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        with pytest.raises(ValueError, match="not in process_group"):
            state.save(folder / "x", make_job().model, process_group=group)
        return None
    job = make_job()
    for save, name in ((state.save, "sync"), (state.async_save, "async")):
        save(folder / name, job.model, process_group=group, coordinator_rank=1)
        save(folder / f"{name} 2", job.model, process_group=group)
    loaded = make_job(seed=3)
    state.load(state.latest(folder), loaded.model, process_group=group, coordinator_rank=1)
    assert_same(contents(loaded) | {"scheduler": 0}, contents(loaded) | {"scheduler": 0})
    return all(
        torch.equal(a, b)
        for a, b in zip(loaded.model.parameters(), job.model.parameters(), strict=True)
    )


def test_a_group_of_some_of_the_processes(ranks4, tmp_path):
    assert ranks4(save_in_a_subgroup, tmp_path) == [None, True, None, True]
    state.async_save(tmp_path / "wait", make_job().model).result()
    assert len(list(tmp_path.iterdir())) == 5


def save_without_cpu_collectives(folder):
    """The group can move tensors of a device only, as nccl's: it gets a companion, once."""
    backend_config = dist.get_backend_config
    faults.dist.get_backend_config = lambda group: "cuda:nccl"
    try:
        groups = [faults.collective_group(None, is_private=False) for _ in range(2)]
        state.save(folder / "x", make_job().model)
    finally:
        faults.dist.get_backend_config = backend_config
    private = [faults.collective_group(None, is_private=True) for _ in range(2)]
    own = faults.collective_group(None, is_private=False)
    return (
        groups[0] is groups[1] is not dist.group.WORLD,
        private[0] is private[1] is not groups[0],
        own is dist.group.WORLD,
        dist.get_backend(groups[0]),
    )


def test_a_group_without_cpu_collectives(ranks, tmp_path):
    assert ranks(save_without_cpu_collectives, tmp_path) == [(True, True, True, "gloo")] * 2
    state.verify(tmp_path / "x")


def test_a_group_without_initialized_processes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no process group is initialized"):
        state.save(tmp_path / "x", make_job().model, process_group=object())
