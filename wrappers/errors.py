"""Errors of the package.

Every error that concerns one region carries the region's FQN as a field, and the
figures of its text too, so that a caller can act on them without parsing words.

Wrong arguments raise plain ``ValueError`` or ``TypeError``. A broken invariant of our own
raises ``AssertionError``. What the region's own code raises is never replaced.
"""

from __future__ import annotations


class WrapperError(RuntimeError):
    """Base of all errors that concern a region.

    Attributes:
        fqn: Name of the region as in the unwrapped model; the function's name where the
            region belongs to no module.
    """

    def __init__(self, message: str, *, fqn: str = "") -> None:
        super().__init__(message)
        self.fqn = fqn


class CheckpointError(WrapperError):
    """A recompute could not give back what the forward had saved."""


class RecomputeMismatchError(CheckpointError):
    """The recompute saved other tensors than the forward.

    Attributes:
        slot: Position of the first saved tensor that differs, counted from 0; None where
            only the number of saved tensors differs.
        num_slots: How many tensors the forward saved.
        num_recomputed: How many tensors the recompute saved before it ended.
        expected: Description of the forward's tensor.
        got: Description of the recomputed tensor.
        operator: First operator that differs, as far as it is known.
        location: ``file:line`` of the user's code that called this operator.
    """

    def __init__(
        self,
        message: str,
        *,
        fqn: str = "",
        slot: int | None = None,
        num_slots: int = 0,
        num_recomputed: int = 0,
        expected: str = "",
        got: str = "",
        operator: str = "",
        location: str = "",
    ) -> None:
        super().__init__(message, fqn=fqn)
        self.slot = slot
        self.num_slots = num_slots
        self.num_recomputed = num_recomputed
        self.expected = expected
        self.got = got
        self.operator = operator
        self.location = location


class InputChangedError(CheckpointError):
    """A tensor that the recompute reads was changed in place since the forward.

    Attributes:
        tensor: Name of the changed tensor: a parameter's name, ``argument 0``, ...
    """

    def __init__(self, message: str, *, fqn: str = "", tensor: str = "") -> None:
        super().__init__(message, fqn=fqn)
        self.tensor = tensor


class OffloadError(WrapperError):
    """An offloaded tensor could not be brought back as it was.

    Attributes:
        cause: What happened to it.
        tier: Where it was: ``"host"`` or ``"disk"``.
        num_bytes: Its size.
    """

    def __init__(
        self,
        message: str,
        *,
        fqn: str = "",
        cause: str = "",
        tier: str = "",
        num_bytes: int = 0,
    ) -> None:
        super().__init__(message, fqn=fqn)
        self.cause = cause
        self.tier = tier
        self.num_bytes = num_bytes


class InfeasibleBudgetError(WrapperError):
    """No choice of what to keep, recompute and offload fits into a memory budget.

    Attributes:
        fqn: The region that needs most; empty where it is code outside of regions.
        budget_bytes: What was asked for.
        smallest_bytes: The smallest budget that can be met, exactly.
    """

    def __init__(
        self, message: str, *, fqn: str = "", budget_bytes: int = 0, smallest_bytes: int = 0
    ) -> None:
        super().__init__(message, fqn=fqn)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
