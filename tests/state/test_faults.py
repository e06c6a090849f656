"""A fault in any step, on any rank: every rank hears which ranks have failed and why; none hangs.

A cell is one operation with one planted fault. The processes run many cells in one call and
return what they saw; the tests assert cell by cell. After each fault, the cell looks whether the
group still works, whether the previous state checkpoint still loads, and what the next good save
leaves in the folder.
"""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.distributed.ranks import RankFailedError
from tests.state import crashing, faulty
from tests.state.faulty import NOT_PORTABLE, Fault
from wrappers import state
from wrappers.state import CheckpointException

#: A batch of cells must end within this time, else it counts as hanging.
BATCH_TIMEOUT_S = 50.0
#: More file-system calls than a save makes.
MAX_CALLS = 200
WIDTH = 6

# --- Cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One operation with one fault.

    Attributes:
        operation: ``"save"``, ``"async_save"`` or ``"load"``.
        target: What fails: the ``"storage"`` or the ``"planner"``.
        coordinator: Rank of the coordinator in the group.
    """

    operation: str
    target: str
    fault: Fault
    coordinator: int = 0

    def __str__(self) -> str:
        return f"{self.operation}, coordinator {self.coordinator}, {self.target}: {self.fault}"


@dataclass
class Outcome:
    """What one rank saw.

    Attributes:
        raised: Type's name of what the operation has raised; None if nothing.
        failures: For each rank named in it, the type's name and the text of its exception.
        text: All that the error says.
        before: What ``latest`` gave before the operation.
        after: What ``latest`` gave after it.
        group_sum: A sum over the group after the fault.
        names: The folder's content after it; after the next good save, if there was litter.
    """

    raised: str | None = None
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    text: str = ""
    before: str = ""
    after: str = ""
    group_sum: int = 0
    names: list[str] = field(default_factory=list)


class Job:
    """A tiny model, sharded where there is a group, whose parameters show which step it is at."""

    def __init__(self, folder: Path, group: dist.ProcessGroup | None, rank: int, size: int):
        self.folder, self.group, self.rank, self.size = folder, group, rank, size
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2))
        if size > 1:
            mesh = dist.DeviceMesh.from_group(group or dist.group.WORLD, "cpu")
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.step = 0

    def path(self) -> Path:
        return self.folder / f"step-{self.step:08d}"

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)

    def values(self) -> list[float]:
        """The different values found in all parameters of this rank."""
        local = [
            p.to_local() if hasattr(p, "to_local") else p.detach() for p in self.model.parameters()
        ]
        return sorted({value for tensor in local for value in tensor.flatten().tolist()})

    def save(self, save: Any = state.save, **kwargs: Any) -> Any:
        """Save the next step."""
        self.step += 1
        self.fill(self.step)
        kwargs = {"process_group": self.group, "keep_last": 2, **kwargs}
        extra = {"step": self.step, "text": "abc"}
        return save(self.path(), self.model, self.optimizer, extra, **kwargs)

    def load(self, path: Path, **kwargs: Any) -> Any:
        kwargs = {"process_group": self.group, **kwargs}
        return state.load(path, self.model, self.optimizer, {"step": 0, "text": ""}, **kwargs)

    def run(self, cell: Cell) -> Any:
        """Run the operation with the fault in it."""
        fault = cell.fault
        storage = fault if cell.target == "storage" else None
        planner = fault if cell.target == "planner" else None
        if cell.operation == "load":
            return self.load(
                state.latest(self.folder) or Path(),
                storage_reader=faulty.FaultyStorageReader(storage, self.rank),
                planner=faulty.FaultyLoadPlanner(planner, self.rank),
                coordinator_rank=cell.coordinator,
            )
        made = self.save(
            state.save if cell.operation == "save" else state.async_save,
            storage_writer=faulty.FaultyStorageWriter(storage, self.rank),
            planner=faulty.FaultySavePlanner(planner, self.rank),
            coordinator_rank=cell.coordinator,
        )
        return made if cell.operation == "save" else made.result(timeout=BATCH_TIMEOUT_S)


def text_of(error: BaseException) -> str:
    try:
        return str(error)
    except ValueError:
        return "no text"


def sum_of_group(job: Job, value: float = 1.0) -> int:
    """A collective of the group's, which also lets all ranks come together."""
    total = torch.tensor(value)
    if job.size > 1:
        dist.all_reduce(total, group=job.group)
    return int(total)


def run_cell(job: Job, cell: Cell) -> Outcome:
    before = str(state.latest(job.folder))
    raised, failures, text = attempt(job.run, cell)
    outcome = Outcome(raised, failures, text, before, group_sum=sum_of_group(job))
    outcome.after = str(state.latest(job.folder))
    if job.rank == 0:
        state.verify(outcome.after)
    if sum_of_group(job, float(bool(litter_in(job.folder)))):
        job.save(coordinator_rank=cell.coordinator)
        sum_of_group(job)
    outcome.names = sorted(os.listdir(job.folder))
    return outcome


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def litter_in(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not name.startswith("step-")]


def attempt(function: Any, *args: Any, **kwargs: Any) -> tuple[str | None, dict[int, Any], str]:
    """What a call raises: type's name, (type's name, text) of each rank's failure, its text."""
    try:
        function(*args, **kwargs)
    except CheckpointException as error:
        return (
            "CheckpointException",
            {rank: (type(e).__name__, text_of(e)) for rank, (e, _) in error.failures.items()},
            text_of(error),
        )
    except BaseException as error:
        return type(error).__name__, {}, text_of(error)
    return None, {}, ""


def ranks_of(members: tuple[int, ...] | None) -> tuple[Any, int, int]:
    """The group of some of the processes, this process's rank in it, its size."""
    if members is None:
        return None, dist.get_rank(), dist.get_world_size()
    group = dist.new_group(members)
    return group, dist.get_group_rank(group, dist.get_rank()), len(members)


def run_cells(
    cells: list[Cell], folder: Path, members: tuple[int, ...] | None = None
) -> list[Outcome]:
    """Run cells one after the other; in each process of a group, or in this one alone."""
    group, rank, size = None, 0, 1
    if dist.is_initialized():
        if members is not None and dist.get_rank() not in members:
            dist.new_group(members)
            return []
        group, rank, size = ranks_of(members)
    job = Job(folder, group, rank, size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        job.save()
        outcomes = []
        for cell in cells:
            (folder.parent / f"running-{rank}").write_text(str(cell))
            outcomes.append(run_cell(job, cell))
        newest = state.latest(folder) or Path()
        job.load(newest)
        assert job.values() in ([step_of(newest)], [])  # nothing, where a rank holds no shard
        job.save()
        sum_of_group(job)
        assert not litter_in(folder)
        assert len(os.listdir(folder)) == 2
    return outcomes


class Batches:
    """Runs the cells of a batch at the first question for one of them, and keeps the outcomes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._outcomes: dict[Any, Any] = {}

    def outcomes(self, ranks: Any, cells: list[Cell], cell: Cell, **kwargs: Any) -> list[Outcome]:
        """What each rank saw of ``cell``, which is one of ``cells``."""
        key = tuple(cells)
        if key not in self._outcomes:
            self._outcomes[key] = self._run(ranks, cells, **kwargs)
        found = self._outcomes[key]
        if isinstance(found, str):
            pytest.fail(found)
        return [of_rank[cells.index(cell)] for of_rank in found if of_rank]

    def _run(self, ranks: Any, cells: list[Cell], **kwargs: Any) -> Any:
        root = self._folder / f"batch-{len(self._outcomes)}"
        folder = root / "runs"
        folder.mkdir(parents=True)
        if ranks is None:
            return [run_cells(cells, folder, **kwargs)]
        try:
            return ranks(run_cells, cells, folder, *kwargs.values(), timeout_s=BATCH_TIMEOUT_S)
        except RankFailedError as error:
            at = [file.read_text() for file in sorted(root.glob("running-*"))]
            return f"the ranks stood at {at}:\n{error}"


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    return Batches(tmp_path_factory.mktemp("faults"))


def check(cell: Cell, outcomes: list[Outcome]) -> None:
    """Every rank was told the same: exactly the failing ranks, and the original errors."""
    fault = cell.fault
    failing = set(fault.ranks)
    if fault.when == "foreign" and "global" in fault.step:
        # Those fail that cannot open what the coordinator has sent them.
        failing = set(range(len(outcomes))) - {cell.coordinator}
    for rank, outcome in enumerate(outcomes):
        if fault.error in ("KeyboardInterrupt", "SystemExit") and rank in failing:
            assert outcome.raised == fault.error, outcome
        else:
            assert outcome.raised == "CheckpointException", outcome
            assert set(outcome.failures) == failing, outcome
            for other, (name, text) in outcome.failures.items():
                check_error(fault, name, text, is_own=other == rank)
        assert outcome.group_sum == len(outcomes)
        assert outcome.after == outcome.before != "None"
        assert Path(outcome.before).name in outcome.names
        assert all(name.startswith("step-") for name in outcome.names), "litter"


def check_error(fault: Fault, name: str, text: str, is_own: bool) -> None:
    if fault.when == "result":
        assert name in ("TypeError", "PicklingError", "AttributeError", "RuntimeError"), name
        assert "pickle" in text
    elif fault.when == "foreign":
        assert name in ("ModuleNotFoundError", "RuntimeError")
        assert "only_in_process" in text
    elif fault.error not in NOT_PORTABLE:
        assert name == fault.error
    elif not (is_own and name == fault.error):
        assert name == "RuntimeError"
        assert fault.error in text


# --- Every step, every rank -----------------------------------------------------------------------


def steps_of(operation: str) -> list[tuple[str, str, str, bool]]:
    """(target, step, when, does the coordinator alone run it) for every step of an operation."""
    if operation == "load":
        everywhere = {
            "storage": faulty.READER_STEPS,
            "planner": faulty.LOAD_PLANNER_STEPS,
        }
        coordinator = {
            "storage": faulty.COORDINATOR_READER_STEPS,
            "planner": faulty.COORDINATOR_PLANNER_STEPS,
        }
    else:
        everywhere = {
            "storage": faulty.WRITER_STEPS,
            "planner": faulty.SAVE_PLANNER_STEPS,
        }
        coordinator = {
            "storage": faulty.COORDINATOR_WRITER_STEPS,
            "planner": faulty.COORDINATOR_PLANNER_STEPS,
        }
    return [
        (target, step, when, alone)
        for table, alone in ((everywhere, False), (coordinator, True))
        for target, steps in table.items()
        for step, when in steps
    ]


def cells_of(
    operation: str, coordinator: int, groups_of_ranks: tuple[tuple[int, ...], ...]
) -> list[Cell]:
    return [
        Cell(operation, target, Fault(step, ranks, when=when), coordinator)
        for target, step, when, alone in steps_of(operation)
        for ranks in (((coordinator,),) if alone else groups_of_ranks)
        # What the coordinator alone can open, it can open.
        if when != "foreign" or alone or coordinator not in ranks
    ]


OPERATIONS = ("save", "async_save", "load")
EVERY_STEP = {
    (operation, coordinator): cells_of(operation, coordinator, ((0,), (1,), (0, 1)))
    for operation in OPERATIONS
    for coordinator in (0, 1)
}


@pytest.mark.parametrize("cell", [cell for cells in EVERY_STEP.values() for cell in cells], ids=str)
def test_every_step_on_every_rank(ranks, batches, cell):
    check(cell, batches.outcomes(ranks, EVERY_STEP[cell.operation, cell.coordinator], cell))


#: Alone, a result need not be sent to anybody.
ALONE = {
    operation: [
        cell
        for cell in cells_of(operation, 0, ((0,),))
        if cell.fault.when not in ("result", "foreign")
    ]
    for operation in OPERATIONS
}


@pytest.mark.parametrize("cell", [cell for cells in ALONE.values() for cell in cells], ids=str)
def test_every_step_without_a_process_group(batches, cell):
    check(cell, batches.outcomes(None, ALONE[cell.operation], cell))


#: Ranks 3 and 1 of four as a group: there they have the ranks 1 and 0.
MEMBERS = (1, 3)
IN_A_GROUP = [
    Cell(operation, "storage", fault, coordinator)
    for coordinator in (0, 1)
    for operation, fault in (
        ("save", Fault("reset", (1,))),
        ("save", Fault("prepare_local_plan", (0,))),
        ("save", Fault("write_data", (1,), when="future")),
        ("save", Fault("finish", (coordinator,))),
        ("async_save", Fault("write_data", (0, 1))),
        ("load", Fault("read_data", (1,))),
        ("load", Fault("read_metadata", (0,))),
    )
]


@pytest.mark.parametrize("cell", IN_A_GROUP, ids=str)
def test_ranks_are_those_of_the_group_in_use(ranks4, batches, cell):
    check(cell, batches.outcomes(ranks4, IN_A_GROUP, cell, members=MEMBERS))


SEVERAL = [
    Cell(operation, target, Fault(step, ranks, when=when), coordinator)
    for coordinator, ranks in ((0, (1, 3)), (2, (0, 1, 3)), (3, (0, 1, 2, 3)))
    for operation, target, step, when in (
        ("save", "storage", "reset", "before"),
        ("save", "storage", "set_up_storage_writer", "before"),
        ("save", "planner", "finish_plan", "before"),
        ("save", "storage", "write_data", "future"),
        ("async_save", "storage", "write_data", "before"),
        ("load", "storage", "read_metadata", "before"),
        ("load", "storage", "read_data", "future"),
        ("load", "planner", "load_bytes", "before"),
    )
]


@pytest.mark.parametrize("cell", SEVERAL, ids=str)
def test_several_of_four_ranks(ranks4, batches, cell):
    check(cell, batches.outcomes(ranks4, SEVERAL, cell))


# --- Errors that are hard to report ---------------------------------------------------------------

#: Steps at which an error is carried by different collectives.
CARRIERS = (
    ("save", "reset"),
    ("save", "prepare_local_plan"),
    ("save", "write_data"),
    ("load", "read_metadata"),
    ("load", "read_data"),
)
ERRORS = {
    coordinator: [
        Cell(operation, "storage", Fault(step, (1,), error), coordinator)
        for error in faulty.ERRORS
        if error != "PlainError"
        for operation, step in CARRIERS
    ]
    + [
        Cell(operation, "storage", Fault(step, (coordinator,), error), coordinator)
        for error in ("UnpicklableError", "UnloadableError", "ForeignError", "KeyboardInterrupt")
        for operation, step in (("save", "finish"), ("load", "prepare_global_plan"))
    ]
    for coordinator in (0, 1)
}


@pytest.mark.parametrize("cell", [cell for cells in ERRORS.values() for cell in cells], ids=str)
def test_errors_that_are_hard_to_report(ranks, batches, cell):
    check(cell, batches.outcomes(ranks, ERRORS[cell.coordinator], cell))


ALONE_ERRORS = [
    Cell(operation, "storage", Fault(step, (0,), error))
    for error in faulty.ERRORS
    if error != "PlainError"
    for operation, step in CARRIERS
]


@pytest.mark.parametrize("cell", ALONE_ERRORS, ids=str)
def test_errors_that_are_hard_to_report_without_a_process_group(batches, cell):
    check(cell, batches.outcomes(None, ALONE_ERRORS, cell))


ASYNC_ERRORS = [
    Cell("async_save", "storage", Fault("write_data", (1,), error))
    for error in faulty.ERRORS
    if error not in ("KeyboardInterrupt", "SystemExit")
]


@pytest.mark.parametrize("cell", ASYNC_ERRORS, ids=str)
def test_errors_of_an_async_save_that_are_hard_to_report(ranks, batches, cell):
    check(cell, batches.outcomes(ranks, ASYNC_ERRORS, cell))


# --- Our own steps --------------------------------------------------------------------------------


def default_job(folder: Path) -> Job:
    if not dist.is_initialized():
        return Job(folder, None, 0, 1)
    return Job(folder, None, dist.get_rank(), dist.get_world_size())


class FailingState:
    """A stateful object that fails, on some ranks, when it is saved or loaded."""

    def __init__(self, save: bool = False, load: bool = False) -> None:
        self.save, self.load = save, load

    def state_dict(self) -> dict[str, Any]:
        if self.save:
            raise faulty.PlainError("in state_dict")
        return {"value": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.load:
            raise faulty.PlainError("in load_state_dict")


def fail_in_contents(folder: Path, failing: int, is_async: bool) -> list[Any]:
    """Faults in what is saved, on one rank: each is heard by all."""
    job = default_job(folder)
    job.save()
    job.load(job.path())
    is_bad = job.rank == failing
    save = state.async_save if is_async else state.save

    def run(**kwargs: Any) -> None:
        made = job.save(save, **kwargs)
        if is_async:
            made.result(timeout=BATCH_TIMEOUT_S)

    found = [
        attempt(run, rank_extra={"text": "good", "bad": lambda: None} if is_bad else {"text": ""}),
        attempt(run, rank_extra={"scheduler": FailingState(save=is_bad)}),
        attempt(run, rank_extra=17 if is_bad else {}),
    ]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise faulty.PlainError("in a state dict hook")

    handle = job.model.register_state_dict_pre_hook(fail) if is_bad else None
    found.append(attempt(run))
    if handle:
        handle.remove()
    run(rank_extra={"scheduler": FailingState()})
    loaded = attempt(
        state.load,
        job.path(),
        job.model,
        job.optimizer,
        rank_extra={"scheduler": FailingState(load=is_bad)},
    )
    found.append(loaded)
    handle2 = job.model.register_load_state_dict_pre_hook(fail) if is_bad else None
    found.append(attempt(state.load, job.path(), job.model, job.optimizer))
    if handle2:
        handle2.remove()
    job.load(job.path())
    total = torch.ones(())
    if job.size > 1:
        dist.all_reduce(total)
    found.append((int(total), job.values() == [job.step], sorted(os.listdir(folder))))
    return found


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("is_async", [False, True], ids=["save", "async"])
def test_a_fault_in_what_is_saved_or_loaded(ranks, tmp_path, failing, is_async):
    for found in ranks(fail_in_contents, tmp_path, failing, is_async):
        *attempts, (total, is_loaded, names) = found
        for raised, failures, _ in attempts:
            assert raised == "CheckpointException", attempts
            assert list(failures) == [failing]
        kinds = [failures[failing][0] for _, failures, _ in attempts]
        assert [kind for kind in kinds if kind != "PlainError"] == [kinds[0], kinds[2]]
        assert "'bad'" in attempts[0][1][failing][1]
        assert total == 2
        assert is_loaded
        assert names == ["step-00000001", "step-00000006"]


def fail_at_every_call(
    folder: Path, failing: int, coordinator: int, kind: str, is_async: bool
) -> list[Any]:
    """Let the k-th file-system call of a save fail on one rank, for every k."""
    job = default_job(folder)

    def fail() -> None:
        raise OSError(5, "planted") if kind == "OSError" else KeyboardInterrupt("planted")

    def run() -> None:
        save = state.async_save if is_async else state.save
        made = job.save(save, coordinator_rank=coordinator)
        if is_async:
            made.result(timeout=BATCH_TIMEOUT_S)

    for _ in range(2):
        job.save(coordinator_rank=coordinator)
    found = []
    for at in range(1, MAX_CALLS):
        before = state.latest(folder)
        with crashing.calls.counted(folder, at if job.rank == failing else 0, fail) as counted:
            raised, failures, text = attempt(run)
        has_failed = sum_of_group(job, float(job.rank == failing and counted.num >= at))
        newest = state.latest(folder) or Path()
        is_published = newest == job.path()
        assert is_published or newest == before
        if job.rank == failing:
            state.verify(newest)
        if sum_of_group(job, float(is_published or bool(litter_in(folder)))):
            job.save(coordinator_rank=coordinator)
        total = sum_of_group(job)
        event = counted.log[at - 1] if len(counted.log) >= at else ""
        litter = litter_in(folder)
        sum_of_group(job)
        found.append((f"call {at} ({event})", raised, failures, text, is_published, litter, total))
        if not has_failed:
            newest = state.latest(folder) or Path()
            job.load(newest)
            assert job.values() == [step_of(newest)]
            return found
    raise AssertionError(f"more than {MAX_CALLS} calls")


@pytest.mark.parametrize(
    ("failing", "coordinator", "kind", "is_async"),
    [
        (0, 0, "OSError", False),
        (1, 0, "OSError", False),
        (0, 0, "KeyboardInterrupt", False),
        (1, 0, "KeyboardInterrupt", False),
        (0, 0, "OSError", True),
    ],
)
def test_every_file_system_call_of_a_save(ranks, tmp_path, failing, coordinator, kind, is_async):
    """A call that fails is reported to all ranks, or did not matter: then the save is complete."""
    found = ranks(fail_at_every_call, tmp_path, failing, coordinator, kind, is_async)
    check_calls(found, failing, kind)


@pytest.mark.parametrize("kind", ["OSError", "KeyboardInterrupt"])
def test_every_file_system_call_of_a_save_without_a_process_group(tmp_path, kind):
    check_calls([fail_at_every_call(tmp_path, 0, 0, kind, False)], 0, kind)


def check_calls(found: list[list[Any]], failing: int, kind: str) -> None:
    num_reported = 0
    for calls in zip(*found, strict=True):
        call = calls[failing][0]
        is_told = {raised is not None for _, raised, *_ in calls}
        assert len(is_told) == 1, f"{call}: not all ranks were told: {calls}"
        for rank, (_, raised, failures, text, is_published, litter, total) in enumerate(calls):
            assert total == len(found)
            assert not litter, f"litter after {call} and one good save: {litter}"
            num_reported += raised is not None
            if raised is None:
                assert is_published, f"{call}: no error, and no state checkpoint"
            elif kind == "KeyboardInterrupt" and rank == failing:
                assert raised == kind, f"{call}: {text}"
            else:
                assert raised == "CheckpointException", f"{call}: {raised}: {text}"
                assert list(failures) == [failing], call
                assert failures[failing][0] in (kind, "StateError"), f"{call}: {text}"
    assert num_reported >= 4 * len(found)


# --- Files that are not what was written ----------------------------------------------------------


class SabotagedWriter(faulty.FaultyStorageWriter):
    """Writes its files and then spoils one of them, before anybody has checked it."""

    def __init__(self, how: str, is_bad: bool) -> None:
        super().__init__(None, 0)
        self.how, self.is_bad = how, is_bad

    def write_data(self, plan: Any, planner: Any) -> Any:
        future = super().write_data(plan, planner)
        if self.is_bad:
            name = future.value()[0].storage_data.relative_path
            path = Path(self.path) / name
            if self.how == "missing":
                path.unlink()
            elif self.how == "cut off":
                os.truncate(path, path.stat().st_size - 1)
            else:
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
        return future


def sabotage(folder: Path, failing: int) -> list[Any]:
    job = default_job(folder)
    job.save()
    found = []
    for how in ("missing", "cut off", "flipped"):
        is_bad = job.rank == failing
        found.append(attempt(job.save, storage_writer=SabotagedWriter(how, is_bad)))
        if job.size > 1:
            dist.barrier()
        assert state.latest(folder) == folder / "step-00000001"
    return found


@pytest.mark.parametrize("failing", [0, 1])
def test_spoilt_files_are_found_before_they_are_published(ranks, tmp_path, failing):
    for found in ranks(sabotage, tmp_path, failing):
        for raised, failures, text in found:
            assert raised == "CheckpointException", found
            assert list(failures) == [failing], text
            assert failures[failing][0] == "StateError"
            assert f"__{failing}_0.distcp" in failures[failing][1]


# --- Arguments that differ, saves nobody asks for -------------------------------------------------


def differ(folder: Path) -> list[Any]:
    """Ranks that disagree about what to do: an error on each, and a group that still works."""
    job = default_job(folder)
    job.save()
    model, optimizer, rank = job.model, job.optimizer, job.rank
    small = nn.Linear(2, 2, bias=rank == 0)
    found = [
        attempt(state.save, folder / f"differs-{rank}", model, optimizer),
        attempt(state.load, folder / ("nothing" if rank else "step-00000001"), model, optimizer),
        attempt(state.save, folder / "keep", model, keep_last=0 if rank else 2),
        attempt(state.save, folder / "layout", model, layout="zip" if rank else "dcp"),
        attempt(state.save, folder / "coordinator", model, coordinator_rank=rank),
        attempt(state.load, folder / "step-00000001", model, None, {"step": 0, f"{rank}": 0}),
        attempt(state.load, folder / "step-00000001", model if rank == 0 else small),
    ]
    total = torch.ones(())
    dist.all_reduce(total)
    found.append((int(total), str(state.latest(folder)), sorted(os.listdir(folder))))
    return found


def test_ranks_that_disagree(ranks, tmp_path):
    first, second = ranks(differ, tmp_path)
    assert first[-1] == second[-1]
    assert first[-1][:2] == (2, str(tmp_path / "step-00000001"))
    assert [name for name in first[-1][2] if not name.startswith(".")] == ["step-00000001"]
    for index, (mine, theirs) in enumerate(zip(first[:-1], second[:-1], strict=True)):
        assert mine[0] == theirs[0] == "CheckpointException", (index, mine, theirs)
    assert list(first[2][1]) == list(first[3][1]) == [1]
    assert first[2][1][1][0] == first[3][1][1][0] == "ValueError"


def forget_a_failure(folder: Path) -> list[Any]:
    """An async save fails and nobody asks; then another begins."""
    job = default_job(folder)
    job.save()
    fault = Fault("write_data", (1,))
    job.save(state.async_save, storage_writer=faulty.FaultyStorageWriter(fault, job.rank))
    found = [attempt(job.save)]
    found.append(attempt(job.save))
    job.load(state.latest(folder) or Path())
    found.append((job.values() == [job.step], str(state.latest(folder)) == str(job.path())))
    asked = job.save(state.async_save, storage_writer=faulty.FaultyStorageWriter(fault, job.rank))
    found.append(attempt(asked.result, timeout=BATCH_TIMEOUT_S))
    found.append((asked.done(), type(asked.exception()).__name__))
    found.append(attempt(job.save))
    return found


def test_a_failure_that_nobody_asked_for_is_raised_by_the_next_save(ranks, tmp_path):
    for forgotten, good, after, asked, state_of_asked, last in ranks(forget_a_failure, tmp_path):
        assert forgotten[:2] == ("CheckpointException", {1: ("PlainError", "planted")})
        assert good[0] is None
        assert after == (True, True)
        assert asked[:2] == ("CheckpointException", {1: ("PlainError", "planted")})
        assert state_of_asked == (True, "CheckpointException")
        assert last[0] is None, "it was raised once already"


class SlowWriter(faulty.FaultyStorageWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        time.sleep(0.3)
        return super().write_data(plan, planner)


def train_beside_a_failing_save(folder: Path) -> Any:
    """Collectives of training go on while a save is under way, and after it has failed."""
    job = default_job(folder)
    job.save()
    fault = Fault("write_data", (1,), when="after")
    made = job.save(state.async_save, storage_writer=SlowWriter(fault, job.rank))
    job.fill(-1.0)
    sums, num_beside = set(), 0
    for _ in range(300):
        total = torch.tensor(job.rank + 1)
        dist.all_reduce(total)
        sums.add(int(total))
        num_beside += not made.done()
    return sums, num_beside, attempt(made.result, timeout=BATCH_TIMEOUT_S), job.values()


def test_training_goes_on_beside_a_save_that_fails(ranks, tmp_path):
    for sums, num_beside, outcome, values in ranks(train_beside_a_failing_save, tmp_path):
        assert sums == {3}
        assert num_beside > 0
        assert outcome[:2] == ("CheckpointException", {1: ("PlainError", "planted")})
        assert values == [-1.0]


def save_in_a_group_whose_ranks_are_in_different_groups(folder: Path) -> tuple[int, int]:
    """Torch names a group by how many groups a rank is in, where only some ranks make it."""
    group = dist.new_group([0, 1])
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    job = Job(folder, group, dist.get_rank(), 2)
    made = job.save(state.async_save)
    assert made.result(BATCH_TIMEOUT_S) == job.path()
    return job.step, sum_of_group(job)


def test_ranks_in_different_numbers_of_groups(ranks, tmp_path):
    found = ranks(save_in_a_group_whose_ranks_are_in_different_groups, tmp_path, timeout_s=30.0)
    assert found == [(1, 2), (1, 2)]
