"""Tunable constants, the unit in the name, and a way to change them for a while.

Read them as ``_knobs.NAME`` at the moment of use, never by ``from ... import NAME``: only
so does :func:`override` reach every reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

#: ``determinism_check="values"`` compares at most this many elements of a saved tensor.
VALUE_SAMPLE_ELEMENTS = 64

#: Buffers up to this size are copied before every forward of a region, in case it changes them;
#: of larger ones only those that earlier calls have changed.
BUFFER_COPY_BYTES = 16 * 1024

#: A debug trace keeps at most this many operators; later ones are only counted.
DEBUG_TRACE_OPERATORS = 20_000

#: A debug trace prints at most this many operators around the first difference.
DEBUG_PRINTED_OPERATORS = 40

#: A region that releases no more than this is replayed at once, and not part by part.
REPLAY_AT_ONCE_BYTES = 256 * 1024

#: Saved tensors smaller than this stay on the device when their region is offloaded.
OFFLOAD_MIN_BYTES = 64 * 1024


@contextlib.contextmanager
def override(**values: int) -> Iterator[None]:
    """Set knobs for the length of a ``with`` block.

    Args:
        **values: Knob names and their values, in the unit that the name says.

    Raises:
        AttributeError: A name is not a knob.
    """
    before = {name: globals()[name] for name in values if name.isupper() and name in globals()}
    if unknown := values.keys() - before.keys():
        raise AttributeError(f"no such knob: {', '.join(sorted(unknown))}")
    globals().update(values)
    try:
        yield
    finally:
        globals().update(before)
