"""Enumerations and contexts that say how a region or an operator is treated.

They hold no behaviour and move no data. ``CheckpointPolicy`` and ``SAC_IGNORED_OPS`` are
torch's own objects: one enum for everybody, so that a policy function written for
``torch.utils.checkpoint`` and one written for us can be exchanged without a translation.
"""

from __future__ import annotations

import enum
from typing import Any

from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy

__all__ = [
    "KEPT",
    "OFFLOADED",
    "SAC_IGNORED_OPS",
    "CheckpointImpl",
    "CheckpointPolicy",
    "SelectiveCheckpointContext",
    "policy_from_bool",
]


#: Answers of a policy that move an operator's output to the host.
OFFLOADED = frozenset({CheckpointPolicy.MUST_CPU_OFFLOAD, CheckpointPolicy.PREFER_CPU_OFFLOAD})

#: Answers of a policy that keep an operator's output, wherever.
KEPT = OFFLOADED | {CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE}


class CheckpointImpl(enum.Enum):
    """How a region is recomputed.

    ``CheckpointImpl(x)`` also takes the members of torch's private enum of the same name.

    Attributes:
        REENTRANT: An autograd.Function. No graph is built in forward; backward calls the
            function again and runs a second backward through it.
        NO_REENTRANT: Saved-tensor hooks. The graph is built in forward without its saved
            tensors; backward calls the function again until the last needed one is back.
        REPLAY: Saved-tensor hooks and a recording. Backward executes those of the forward's
            operators that its saved tensors depend on, and calls no function again.
    """

    REENTRANT = enum.auto()
    NO_REENTRANT = enum.auto()
    REPLAY = enum.auto()

    @classmethod
    def _missing_(cls, value: object) -> CheckpointImpl | None:
        if type(value).__name__ == "CheckpointImpl" and isinstance(value, enum.Enum):
            return cls.__members__.get(value.name)
        return None


class SelectiveCheckpointContext:
    """What a policy function learns about the moment in which it is asked.

    Attributes:
        is_recompute: Always False: a policy is asked in the forward only, and its answers
            are used again in the recompute. Kept for torch's signature.
        op_output: What the operator returned.
    """

    def __init__(self, *, is_recompute: bool, op_output: Any = None) -> None:
        self.is_recompute = is_recompute
        self.op_output = op_output


def policy_from_bool(save: bool) -> CheckpointPolicy:
    """Translate the short form of a policy's answer: True saves, False recomputes."""
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE
