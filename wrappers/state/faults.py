"""Steps that all ranks of a group do together: every one succeeds, or every rank hears who failed.

Problem: between two collectives a rank may raise. Then it never joins the next one, and the others
wait for it. Exceptions are also poor travellers: some hold what does not pickle, some pickle and
cannot be built again, and if one breaks the collective that carries it, that is the same hang.

Idea: what a rank does between two collectives is a function, and its outcome, a value or a failure,
is what the next collective carries: as bytes, made and opened where nothing can go wrong in a
collective. ::

    [1] local()     on every rank        a value or a failure
    [2] gather      to the coordinator
    [3] combine()   on the coordinator   only if nobody failed; may fail too
    [4] broadcast   to every rank        what it is to get, or all failures

Invariant: a rank leaves a step with a value if and only if all do. Otherwise it leaves with a
``CheckpointException`` whose ``failures`` are the same on every rank, or, where it was interrupted
itself (``KeyboardInterrupt``, ``SystemExit``), with that.

What no step can help against is a rank that dies: the process group then ends the collective.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from wrappers import _torch

__all__ = ["Agreement", "CheckpointException", "Failure", "collective_group"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Failure:
    """Why a rank failed, in a form that travels.

    Attributes:
        error: The exception; None once it has travelled as text only.
        pickled: The exception; empty where it could not be built again from that.
        text: Its type's name and its own text.
        frames: Where it was raised: file, line, function, source line.
    """

    error: BaseException | None
    pickled: bytes
    text: str
    frames: list[tuple[str, int | None, str, str | None]]

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an exception that was caught just now."""
        frames = traceback.extract_tb(error.__traceback__)
        return cls(
            error,
            _pickled(error),
            f"{type(error).__name__}: {_text(error)}",
            [(f.filename, f.lineno, f.name, f.line) for f in frames],
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "error": None}

    def as_wrapped(self) -> tuple[BaseException, traceback.StackSummary]:
        """The pair that a ``CheckpointException`` lists."""
        summary = traceback.StackSummary.from_list(self.frames)  # type: ignore[arg-type]
        return self.error or _unpickled(self.pickled) or RuntimeError(self.text), summary


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:
        return f"(its text cannot be had: {type(second).__name__})"


def _pickled(error: BaseException) -> bytes:
    """An exception as bytes; empty if what would come out of them is not the same type."""
    try:
        data = pickle.dumps(error)
        return data if type(pickle.loads(data)) is type(error) else b""
    except BaseException:  # code of the exception's class runs, and may raise anything
        return b""


def _unpickled(data: bytes) -> BaseException | None:
    try:
        error = pickle.loads(data)
    except BaseException:  # as above; here its module may be missing
        return None
    return error if isinstance(error, BaseException) else None


def _outcome(function: Callable[[], Any]) -> Any:
    """What a function returns, or its failure."""
    try:
        return function()
    except BaseException as error:
        return Failure.of(error)


def _packed(outcome: Any) -> bytes:
    """An outcome as bytes; a value that does not pickle is a failure."""
    if not isinstance(outcome, Failure):
        value = outcome
        outcome = _outcome(lambda: pickle.dumps(value))
    return pickle.dumps(outcome)


def _opened(data: bytes) -> Any:
    """The outcome; a value that cannot be built again here is a failure."""
    outcome = pickle.loads(data)
    return outcome if isinstance(outcome, Failure) else _outcome(lambda: pickle.loads(outcome))


_groups: dict[dist.ProcessGroup, dict[str, dist.ProcessGroup]] = {}


def collective_group(
    group: dist.ProcessGroup | None, *, is_private: bool
) -> dist.ProcessGroup | None:
    """The group over which steps go; None where this process is alone.

    Made once for a parent group, by all its ranks together.

    Args:
        group: The ranks; by default those of the default group, if there is one.
        is_private: Whether nobody else's collectives may mix with these: those of a background
            thread.

    Raises:
        ValueError: This process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("process_group was passed, but no process group is initialized")
        return None
    parent: Any = dist.group.WORLD if group is None else group
    if dist.get_rank(parent) < 0:
        raise ValueError("this process is not in process_group: call only where it is")
    if not is_private and "cpu:" in str(dist.get_backend_config(parent)):
        return parent  # type: ignore[no-any-return]
    made = _groups.setdefault(parent, {})
    key = "private" if is_private else "cpu"
    if key not in made:
        made[key] = _new_group(parent)
    return made[key]


def _new_group(parent: Any) -> dist.ProcessGroup:
    """A gloo group of the ranks of another one, made by them alone.

    torch names such a group by its ranks and by how many groups a process is in, and ranks with
    different names wait for each other forever (torch 2.13). So those that are in fewer are put
    into groups of their own first.
    """
    nums: list[Any] = [None] * dist.get_world_size(parent)
    dist.all_gather_object(nums, _torch.num_process_groups(), group=parent)
    while _torch.num_process_groups() < max(nums):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    ranks = dist.get_process_group_ranks(parent)
    order: Any = {} if ranks == sorted(ranks) else {"sort_ranks": False}
    made: dist.ProcessGroup = dist.new_group(
        ranks, backend="gloo", use_local_synchronization=True, **order
    )
    return made


class Agreement:
    """The ranks of a group, one of them the coordinator, doing steps together.

    Args:
        group: From :func:`collective_group`.
        coordinator: Its rank in the group.

    Attributes:
        rank: This process's rank in the group.
        size: How many ranks there are.
    """

    def __init__(self, group: dist.ProcessGroup | None, coordinator: int = 0) -> None:
        self._group = group
        self._coordinator = coordinator
        #: Why this rank could not open what the last step has given it: it fails in the next one.
        self._undelivered: Failure | None = None
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank combines what the others have."""
        return self.rank == self._coordinator

    def with_coordinator(self, rank: int) -> Agreement:
        """The same ranks under another coordinator."""
        return Agreement(self._group, rank)

    def gather(self, step: str, local: Callable[[], T]) -> list[T]:
        """Run ``local`` on every rank; return to each what all have returned."""
        mine = self._run(local)
        outcomes: list[Any] = [mine]
        if self._group is not None:
            data: list[Any] = [None] * self.size
            dist.all_gather_object(data, _packed(mine), group=self._group)
            outcomes = [_opened(each) for each in data]
        self._raise_if_any(step, _failures(outcomes), mine)
        return outcomes

    def reduce(self, step: str, local: Callable[[], T], combine: Callable[[list[T]], R]) -> R:
        """Run ``local`` on every rank and ``combine`` on the coordinator; return its result."""
        return self.scatter(step, local, lambda values: [combine(values)] * self.size)

    def coordinate(self, step: str, function: Callable[[], R]) -> R:
        """Run a function on the coordinator alone; return its result to every rank."""
        return self.reduce(step, lambda: None, lambda _: function())

    def scatter(
        self, step: str, local: Callable[[], T], combine: Callable[[list[T]], Sequence[R]]
    ) -> R:
        """As :meth:`reduce`, but each rank gets its own item of the result."""
        mine = self._run(local)
        if self._group is None:
            if not isinstance(mine, Failure):
                mine = _outcome(lambda: combine([mine])[0])
            self._raise_if_any(step, _failures([mine]), mine)
            return mine  # type: ignore[no-any-return]
        root = dist.get_global_rank(self._group, self._coordinator)
        data: list[Any] | None = [None] * self.size if self.is_coordinator else None
        dist.gather_object(_packed(mine), data, dst=root, group=self._group)
        replies: list[Any] | None = None
        if data is not None:
            replies, failure = self._replies([_opened(each) for each in data], combine)
            mine = failure or mine
        answer: list[Any] = [None]
        dist.scatter_object_list(answer, replies, src=root, group=self._group)
        failures, packed = pickle.loads(answer[0])
        self._raise_if_any(step, failures, mine)
        value = _opened(packed)
        self._undelivered = value if isinstance(value, Failure) else None
        return value  # type: ignore[no-any-return]

    def _run(self, local: Callable[[], Any]) -> Any:
        failure, self._undelivered = self._undelivered, None
        return failure or _outcome(local)

    def _replies(
        self, outcomes: list[Any], combine: Callable[[list[Any]], Sequence[Any]]
    ) -> tuple[list[bytes], Failure | None]:
        """What each rank is sent ([3] in the diagram); the coordinator's own failure, if any."""
        failures = _failures(outcomes)
        packed: Any = [b""] * self.size
        failure = None
        if not failures:
            packed = _outcome(lambda: [pickle.dumps(each) for each in combine(outcomes)])
            if isinstance(packed, Failure):
                failures, failure = {self.rank: packed}, packed
                packed = [b""] * self.size
        return [pickle.dumps((failures, pickle.dumps(each))) for each in packed], failure

    def _raise_if_any(self, step: str, failures: dict[int, Failure], mine: Any) -> None:
        """Raise what a step has come to on this rank, whose own exception is the original."""
        if not failures:
            return
        error = None
        if isinstance(mine, Failure):
            error, failures = mine.error, {**failures, self.rank: mine}
        if error is not None and not isinstance(error, (Exception, CheckpointException)):
            raise error
        wrapped = {rank: failures[rank].as_wrapped() for rank in sorted(failures)}
        raise CheckpointException(step, wrapped) from error


def _failures(outcomes: list[Any]) -> dict[int, Failure]:
    return {rank: each for rank, each in enumerate(outcomes) if isinstance(each, Failure)}
