"""What a command prints: tables for people, one JSON object for machines.

With ``--json`` standard output carries that object and nothing else, whatever the user's own code
prints while it is imported and built: that goes to standard error. Warnings become a list in it.

On a terminal tables are drawn by rich where it is installed; elsewhere they are plain text, so that
a pipe or a log file gets lines of its own width.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from wrappers.cli.failure import Failure

__all__ = ["Output"]


class Output:
    """Where a command writes.

    Args:
        command: Name of the command, such as ``"plan"``.
        is_json: Whether to write one JSON object instead of text.
    """

    def __init__(self, command: str, *, is_json: bool) -> None:
        self.command = command
        self.is_json = is_json
        self._stdout = sys.stdout
        self._warnings: list[str] = []

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep what others print and warn of apart from the command's own output."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = lambda message, *rest: self._note_warning(message)
            if self.is_json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            yield

    def _note_warning(self, message: Warning | str) -> None:
        text = " ".join(str(message).split())
        self._warnings.append(text)
        if not self.is_json:
            self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """Tell people something on standard error; machines are told nothing."""
        if not self.is_json:
            print(f"wrappers {self.command}: {text}", file=sys.stderr)

    def show(self, report: Any, data: dict[str, Any]) -> None:
        """Print the result.

        Args:
            report: Has ``__str__``, and ``__rich__`` for terminals.
            data: The same for machines.
        """
        if self.is_json:
            self._dump({"command": self.command, **data})
        elif not (self._stdout.isatty() and _print_rich(report)):
            print(report, file=self._stdout)
            self._stdout.flush()

    def fail(self, failure: Failure) -> None:
        """Print an error: on standard error, or as the one JSON object."""
        if self.is_json:
            self._dump({"command": self.command, "error": failure.as_json()})
        else:
            print(f"wrappers {self.command}: error: {failure}", file=sys.stderr)

    def _dump(self, data: dict[str, Any]) -> None:
        if self._warnings:
            data["warnings"] = self._warnings
        # Infinities and NaN are no JSON.
        print(json.dumps(data, allow_nan=False, default=os.fspath), file=self._stdout)
        self._stdout.flush()


def _print_rich(report: Any) -> bool:
    """Print with rich; whether it is installed."""
    try:
        import rich
    except ImportError:
        return False
    rich.print(report)
    return True


@contextlib.contextmanager
def progress(text: str, *, is_shown: bool) -> Iterator[None]:
    """Show on a terminal that something takes a while."""
    with contextlib.ExitStack() as stack:
        if is_shown and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from rich.console import Console

                stack.enter_context(Console(stderr=True).status(text))
        yield
