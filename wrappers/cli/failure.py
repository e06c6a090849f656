"""How the command line ends: exit codes, and errors that are one paragraph with a remedy.

Problem: whoever plans a job from a shell needs to know what to change, and a script needs to know
what has happened; a traceback through this package tells neither of them.

Idea: everything that can go wrong and is not our fault becomes a :class:`Failure` where it is
known best what to do about it. The entry prints it and exits with its code.
"""

from __future__ import annotations

import enum
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["Exit", "Failure", "call_users", "place_of", "text_of"]

_Result = TypeVar("_Result")

_OWN = Path(__file__).resolve().parents[1]


class Exit(enum.IntEnum):
    """Exit codes of all commands."""

    DONE = 0
    #: ``doctor`` has found a problem, or the model failed when it was built or run.
    PROBLEM = 1
    #: The command line cannot be understood: an option, an import path, a sample, a budget.
    USAGE = 2
    #: No plan fits into the budget.
    INFEASIBLE = 3
    #: Something is missing on this machine: an extra, memory, a file that can be written.
    MISSING = 4
    #: A defect of this package.
    INTERNAL = 5


class Failure(Exception):
    """What ends a command.

    Args:
        code: The exit code.
        kind: A word for machines, such as ``"import_path"``.
        message: What happened, with what was expected and got.
        remedy: What to do.
        **fields: Figures of the message, for machines.
    """

    def __init__(
        self, code: Exit, kind: str, message: str, remedy: str = "", **fields: Any
    ) -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind
        self.message = message
        self.remedy = remedy
        self.fields = fields

    def __str__(self) -> str:
        end = "" if self.message.endswith((".", "!", "?")) else "."
        return f"{self.message}{end} {self.remedy}".rstrip() if self.remedy else self.message

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "kind": self.kind,
            "exit_code": int(self.code),
            "message": self.message,
            "remedy": self.remedy,
            **self.fields,
        }


def text_of(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place_of(error: BaseException) -> str:
    """``file:line`` of the last line of the user's own code that an error has come through.

    Empty if there is none: the error comes from torch, from a package, or from us.
    """
    places = [(f.filename, f.lineno) for f in _frames(error.__traceback__) if _is_users(f.filename)]
    return f"{places[-1][0]}:{places[-1][1]}" if places else ""


def is_ours(error: BaseException) -> bool:
    """Whether the line that raised an error stands in this package."""
    frames = _frames(error.__traceback__)
    return bool(frames) and _OWN in Path(frames[-1].filename).parents


def _frames(trace: TracebackType | None) -> list[traceback.FrameSummary]:
    # Not extract_tb: it reads every line of source.
    walked = traceback.walk_tb(trace)
    return list(traceback.StackSummary.extract(walked, lookup_lines=False))


def _is_users(filename: str) -> bool:
    path = Path(filename)
    if not path.is_absolute():  # "<string>", "<frozen importlib._bootstrap>"
        return False
    roots = {_OWN, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve() / "lib"}
    resolved = path.resolve()
    return "site-packages" not in resolved.parts and not roots.intersection(resolved.parents)


def call_users(function: Callable[[], _Result], what: str, remedy: str, *, kind: str) -> _Result:
    """Call code of the user's; what it raises becomes a Failure that says where.

    Args:
        function: Takes no arguments.
        what: Such as ``"building the model `train:build` failed"``.
        remedy: What to do about it.
        kind: For machines.

    Raises:
        Failure: It has raised.
    """
    try:
        return function()
    except Failure:
        raise
    except Exception as error:
        place = place_of(error)
        where = f" ({place})" if place else ""
        raise Failure(
            Exit.PROBLEM, kind, f"{what}: {text_of(error)}{where}", remedy, where=place
        ) from error
