"""Tunable constants can be changed for a while, and only those that exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import wrappers
from wrappers import _knobs

UNITS = ("_BYTES", "_ELEMENTS", "_OPERATORS", "_CALLS", "_MS", "_REGIONS", "_MODULES", "_TENSORS")
UNITS += ("_COPIES", "_THREADS", "_PERCENT", "_RUNS", "_STEPS")
KNOBS = [name for name in vars(_knobs) if name.isupper()]


def test_there_are_knobs():
    assert {"VALUE_SAMPLE_ELEMENTS", "DEBUG_TRACE_OPERATORS", "OFFLOAD_MIN_BYTES"} <= set(KNOBS)


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_is_a_positive_number_with_its_unit_in_the_name(name):
    value = getattr(_knobs, name)
    assert isinstance(value, (int, float))
    assert value > 0
    assert name.endswith(UNITS)


@pytest.mark.parametrize("name", KNOBS)
def test_override_and_back(name):
    before = getattr(_knobs, name)
    with _knobs.override(**{name: 7}):
        assert getattr(_knobs, name) == 7
        with _knobs.override(**{name: 8}):
            assert getattr(_knobs, name) == 8
        assert getattr(_knobs, name) == 7
    assert getattr(_knobs, name) == before


def test_override_is_undone_after_an_exception():
    before = _knobs.DEBUG_TRACE_OPERATORS
    with pytest.raises(ValueError, match="stop"), _knobs.override(DEBUG_TRACE_OPERATORS=1):
        raise ValueError("stop")
    assert before == _knobs.DEBUG_TRACE_OPERATORS


@pytest.mark.parametrize("name", ["NO_SUCH_KNOB", "override", "contextlib", "__name__"])
def test_an_unknown_knob(name):
    with (
        pytest.raises(AttributeError, match=f"^no such knob: {name}$"),
        _knobs.override(**{name: 1}),
    ):
        pass


def test_an_unknown_knob_beside_a_known_one_changes_nothing():
    before = _knobs.DEBUG_TRACE_OPERATORS
    with pytest.raises(AttributeError, match="no such knob: A, B"):
        _knobs.override(B=1, DEBUG_TRACE_OPERATORS=1, A=1).__enter__()
    assert before == _knobs.DEBUG_TRACE_OPERATORS


def test_knobs_are_read_at_the_moment_of_use():
    # ``from wrappers._knobs import NAME`` would miss an override.
    for path in Path(wrappers.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "wrappers._knobs", path
