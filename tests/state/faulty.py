"""Storage and planners that fail where they are told to, and errors that are hard to report.

A :class:`Fault` names a step of torch.distributed.checkpoint, the ranks on which it strikes and
what is raised there: before the step's work, after it, or through the future that the step
returns. The storage below is the ordinary file system's and the planners are the default ones,
so a rank without a fault does its real work.

    rank 0, coordinator                      rank 1
    -------------------                      ------
    reset                                    reset
    set-up, local plan                       set-up, local plan
    <---------------------- gather the local plans
    global plan
    scatter the final plans ---------------->
    write data                               write data
    <---------------------- gather the results
    finish

A step that only the coordinator runs cannot fail anywhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.api import CheckpointException

#: How long a failing future lets the others wait.
_LATE_S = 0.01

# --- Errors ---------------------------------------------------------------------------------------


class PlainError(Exception):
    """Travels between processes like any other."""


class UnpicklableError(Exception):
    """Holds what cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class UnloadableError(Exception):
    """Pickles, but cannot be built again: the usual slip of an ``__init__`` with two arguments."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


class DisguisedError(Exception):
    """Pickles into something that is no exception, and could be taken for a good result."""

    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("a good result",)


class ChangedError(Exception):
    """Pickles into another exception."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ValueError, ("something else",)


def _exit() -> None:
    raise SystemExit("while an error was unpickled")


class ExitingError(Exception):
    """Ends the process that unpickles it, unless that is caught."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _exit, ()


class UnprintableError(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


def _local_error() -> Exception:
    class LocalError(Exception):
        pass

    return LocalError("of a class that no other module can name")


def _error_known_here_only() -> Exception:
    """Pickles and unpickles in this process; in another one, its module does not exist."""
    name = f"only_in_process_{os.getpid()}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        exec("class ForeignError(Exception): pass", module.__dict__)
        sys.modules[name] = module
    error: Exception = sys.modules[name].ForeignError("of a module that only one process has")
    return pickle.loads(pickle.dumps(error))


def _error_with_a_lock() -> Exception:
    error = ValueError("good type, bad attribute")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    return error


#: What a fault may raise, by name.
ERRORS: dict[str, Callable[[], BaseException]] = {
    "PlainError": lambda: PlainError("planted"),
    "OSError": lambda: OSError(28, "No space left on device", "/data/file"),
    "KeyError": lambda: KeyError("missing"),
    "CheckpointException": lambda: CheckpointException("of a job inside", {}),
    "KeyboardInterrupt": lambda: KeyboardInterrupt("planted"),
    "SystemExit": lambda: SystemExit(3),
    "UnpicklableError": lambda: UnpicklableError("planted"),
    "UnloadableError": lambda: UnloadableError("/data/file", "planted"),
    "DisguisedError": lambda: DisguisedError("planted"),
    "ChangedError": lambda: ChangedError("planted"),
    "ExitingError": lambda: ExitingError("planted"),
    "UnprintableError": lambda: UnprintableError("planted"),
    "LocalError": _local_error,
    "ForeignError": _error_known_here_only,
    "ValueError": _error_with_a_lock,
}

#: Those that cannot be built again in another process: a RuntimeError stands for them there.
NOT_PORTABLE = (
    "UnpicklableError",
    "UnloadableError",
    "DisguisedError",
    "ChangedError",
    "ExitingError",
    "LocalError",
    "ForeignError",
    "ValueError",
)

# --- Faults ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One step that fails.

    Attributes:
        step: Name of the method, of the storage or of the planner.
        ranks: Where it fails; ranks of the group that saves or loads.
        error: What is raised, a key of :data:`ERRORS`.
        when: ``"before"`` or ``"after"`` the method's own work; ``"future"``: the method
            returns, and its future fails a little later; ``"result"``: it returns something
            that does not pickle; ``"foreign"``: something that pickles, but can be built again
            in this process only.
    """

    step: str
    ranks: tuple[int, ...]
    error: str = "PlainError"
    when: str = "before"

    def __str__(self) -> str:
        place = "" if self.when == "before" else f" ({self.when})"
        return f"{self.step}{place} on {','.join(map(str, self.ranks))}: {self.error}"


def _fails(method: Callable[..., Any], step: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        fault = self.fault
        if fault is None or fault.step != step or self.fault_rank not in fault.ranks:
            return method(self, *args, **kwargs)
        if fault.when == "before":
            raise ERRORS[fault.error]()
        result = method(self, *args, **kwargs)
        if fault.when == "after":
            raise ERRORS[fault.error]()
        if fault.when == "future":
            return _failing_future(ERRORS[fault.error]())
        thing = threading.Lock() if fault.when == "result" else _error_known_here_only()
        return _spoil(result, thing)

    return call


def _failing_future(error: BaseException) -> torch.futures.Future[Any]:
    future: torch.futures.Future[Any] = torch.futures.Future()
    threading.Timer(_LATE_S, future.set_exception, [error]).start()
    return future


def _spoil(result: Any, thing: Any) -> Any:
    """The same result with a ``thing`` in it that cannot travel."""
    if isinstance(result, torch.futures.Future):
        future: torch.futures.Future[Any] = torch.futures.Future()
        first, *others = result.wait()
        future.set_result([dataclasses.replace(first, storage_data=thing), *others])
        return future
    if isinstance(result, list):
        return [_spoil(plan, thing) for plan in result]
    if isinstance(result, tuple):
        return (_spoil(result[0], thing), *result[1:])
    return dataclasses.replace(result, planner_data=thing)


def _failing_in(*steps: str) -> Callable[[type], type]:
    def decorate(cls: type) -> type:
        for step in steps:
            setattr(cls, step, _fails(getattr(cls, step), step))
        return cls

    return decorate


@_failing_in(
    "reset",
    "storage_meta",
    "set_up_storage_writer",
    "prepare_local_plan",
    "prepare_global_plan",
    "write_data",
    "finish",
)
class FaultyStorageWriter(FileSystemWriter):
    """Writes files as usual, but fails where ``fault`` says, seen from ``rank``."""

    def __init__(self, fault: Fault | None, rank: int, path: str | os.PathLike[str] = "") -> None:
        self.fault, self.fault_rank = fault, rank
        super().__init__(path)


@_failing_in(
    "reset",
    "read_metadata",
    "set_up_storage_reader",
    "prepare_local_plan",
    "prepare_global_plan",
    "read_data",
)
class FaultyStorageReader(FileSystemReader):
    """Reads files as usual, but fails where ``fault`` says, seen from ``rank``."""

    def __init__(self, fault: Fault | None, rank: int, path: str | os.PathLike[str] = "") -> None:
        self.fault, self.fault_rank = fault, rank
        super().__init__(path)


@_failing_in(
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "resolve_data",
)
class FaultySavePlanner(DefaultSavePlanner):
    """Plans as usual, but fails where ``fault`` says, seen from ``rank``."""

    def __init__(self, fault: Fault | None, rank: int) -> None:
        self.fault, self.fault_rank = fault, rank
        super().__init__()


@_failing_in(
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "resolve_tensor",
    "commit_tensor",
    "load_bytes",
)
class FaultyLoadPlanner(DefaultLoadPlanner):
    """Plans as usual, but fails where ``fault`` says, seen from ``rank``."""

    def __init__(self, fault: Fault | None, rank: int) -> None:
        self.fault, self.fault_rank = fault, rank
        super().__init__()


#: Steps of saving and of loading, and when they may fail: those that every rank runs ...
WRITER_STEPS = (
    ("reset", "before"),
    ("set_up_storage_writer", "before"),
    ("storage_meta", "before"),
    ("prepare_local_plan", "before"),
    ("prepare_local_plan", "result"),
    ("prepare_local_plan", "foreign"),
    ("write_data", "before"),
    ("write_data", "after"),
    ("write_data", "future"),
    ("write_data", "result"),
    ("write_data", "foreign"),
)
READER_STEPS = (
    ("reset", "before"),
    ("read_metadata", "before"),
    ("set_up_storage_reader", "before"),
    ("prepare_local_plan", "before"),
    ("prepare_local_plan", "result"),
    ("prepare_local_plan", "foreign"),
    ("read_data", "before"),
    ("read_data", "after"),
    ("read_data", "future"),
)
SAVE_PLANNER_STEPS = (
    ("set_up_planner", "before"),
    ("create_local_plan", "before"),
    ("create_local_plan", "result"),
    ("create_local_plan", "foreign"),
    ("finish_plan", "before"),
    ("resolve_data", "before"),
)
LOAD_PLANNER_STEPS = (
    ("set_up_planner", "before"),
    ("create_local_plan", "before"),
    ("create_local_plan", "result"),
    ("create_local_plan", "foreign"),
    ("finish_plan", "before"),
    ("resolve_tensor", "before"),
    ("commit_tensor", "before"),
    ("load_bytes", "before"),
)
#: ... and those that the coordinator alone runs.
COORDINATOR_WRITER_STEPS = (
    ("prepare_global_plan", "before"),
    ("prepare_global_plan", "result"),
    ("prepare_global_plan", "foreign"),
    ("finish", "before"),
    ("finish", "after"),
)
COORDINATOR_READER_STEPS = (
    ("prepare_global_plan", "before"),
    ("prepare_global_plan", "result"),
    ("prepare_global_plan", "foreign"),
)
COORDINATOR_PLANNER_STEPS = (
    ("create_global_plan", "before"),
    ("create_global_plan", "result"),
    ("create_global_plan", "foreign"),
)
