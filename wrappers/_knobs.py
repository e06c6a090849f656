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

#: Saved tensors whose memory is smaller than this stay on the device in an offloaded region.
OFFLOAD_MIN_BYTES = 64 * 1024

#: Pinned host memory is allocated in pieces of at least this size.
OFFLOAD_SLAB_BYTES = 64 * 1024 * 1024

#: Pinned host memory that offloading may take at most, and at most so much of what the machine, or
#: the process's cgroup, has left when the first tensor is offloaded.
OFFLOAD_PINNED_BYTES = 1 << 42
OFFLOAD_PINNED_PERCENT = 50

#: The same for pageable memory, which is used when there is no pinned memory left.
OFFLOAD_PAGEABLE_BYTES = 1 << 42
OFFLOAD_PAGEABLE_PERCENT = 25

#: Bytes that may be on their way in each direction, in device memory, or twice the largest tensor's
#: if that is more; a region can say otherwise.
OFFLOAD_INFLIGHT_BYTES = 256 * 1024 * 1024

#: Copies that may be on their way out.
OFFLOAD_INFLIGHT_COPIES = 1024

#: Threads that write files, and as many that read them.
OFFLOAD_DISK_THREADS = 2

#: Pinned memory through which an accelerator's tensors go to files and come back.
OFFLOAD_STAGING_BYTES = 1024 * 1024 * 1024

#: To find out what a block can keep, it runs on tensors without memory at most so often.
PLAN_MENU_RUNS = 160

#: Steps in which a block is timed, and those in which its operators are.
PLAN_TIMED_STEPS = 7
PLAN_TIMED_OPERATOR_STEPS = 5


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
