"""The state of Python's ``random``, taken as a copy of its memory.

``random.getstate()`` makes a tuple of 625 integers, a cost that every region would pay for the
few that draw numbers there. CPython keeps the Mersenne Twister as an index and 624
words right behind the object's head, so a copy of these bytes is a state too, made many
times faster. Whether an interpreter has this layout is checked once, against ``getstate()``;
where it has not, ``getstate()`` is what is used.
"""

from __future__ import annotations

import ctypes
import random
import struct
from typing import Any

_twister: Any = random.seed.__self__  # type: ignore[attr-defined]
_WORDS = struct.Struct("=i624I")
_memory = (ctypes.c_char * _WORDS.size).from_address(id(_twister) + object.__basicsize__)


def _copy() -> tuple[bytes, float | None]:
    return _memory.raw, _twister.gauss_next


def _to_state(copied: tuple[bytes, float | None]) -> tuple[Any, ...]:
    """What ``random.getstate()`` would have returned at the time of the copy."""
    index, *words = _WORDS.unpack(copied[0])
    return random.Random.VERSION, (*words, index), copied[1]


def _has_known_layout() -> bool:
    base = random.Random.__base__
    if base is None or base.__basicsize__ < object.__basicsize__ + _WORDS.size:
        return False
    return _to_state(_copy()) == random.getstate()


if _has_known_layout():
    get_state = _copy

    def set_state(state: Any) -> None:
        """Set a state that :func:`get_state` returned."""
        random.setstate(_to_state(state))

else:
    get_state, set_state = random.getstate, random.setstate
