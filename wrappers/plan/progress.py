"""A bar for what takes longer than a second, where rich is installed and a terminal looks on."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

#: Work that is over before that shows no bar.
_PATIENCE_S = 1.0


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float], object] | None]:
    """Give a function to call with the part that is done; None where there is nothing to show.

    Args:
        title: What the bar is called.
    """
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield None
        return
    start_s = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=False) as bar:
        task = bar.add_task(title, total=1.0, visible=False)

        def report(part: float) -> None:
            is_late = time.monotonic() - start_s > _PATIENCE_S
            bar.update(task, completed=part, visible=is_late)

        yield report
