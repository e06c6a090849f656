"""The bar appears when it is late, and only on a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest

from wrappers.plan.progress import progress_bar

pytest.importorskip("rich")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _shown(monkeypatch, elapsed_s: float) -> str:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    now = time.monotonic()
    times = iter([now])
    monkeypatch.setattr(
        "wrappers.plan.progress.time.monotonic", lambda: next(times, now + elapsed_s)
    )
    with progress_bar("solving") as report:
        assert report is not None
        report(0.25)
    return terminal.getvalue()


def test_work_that_takes_long_shows_a_bar(monkeypatch):
    assert "solving" in _shown(monkeypatch, 5.0)


def test_work_that_is_over_soon_shows_nothing(monkeypatch):
    assert "solving" not in _shown(monkeypatch, 0.1)


def test_there_is_no_bar_without_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("solving") as report:
        assert report is None
