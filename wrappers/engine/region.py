"""The settings of one region, checked once, and the switches that override them.

A :class:`Region` is made once for a wrapped module and used for all its calls, so nothing
that stays the same is worked out again. Its :class:`Habits` remember when its calls were last
looked at, and whether the user has been warned.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from wrappers.engine import verify
from wrappers.policy import CheckpointImpl

ContextFn = Callable[
    [], tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]
]

#: Every so many calls a region without preserve_rng_state is looked at for what it draws.
_PROBE_EVERY_CALLS = 64


def noop_context_fn() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """The default ``context_fn``: nothing around forward, nothing around the recompute."""
    return contextlib.nullcontext(), contextlib.nullcontext()


class Habits:
    """What is remembered between the calls of a region that does not preserve random state."""

    __slots__ = ("_calls", "_has_warned", "_last_mode")

    def __init__(self) -> None:
        self._calls = 0
        self._last_mode: object = self
        self._has_warned = False

    def should_probe(self, mode: object) -> bool:
        """Count a call; tell whether to find out if it draws random numbers.

        Args:
            mode: The ``training`` flag of what is called, if it has one. A change of mode is
                a reason to look again.
        """
        calls = self._calls
        self._calls = calls + 1
        if mode is self._last_mode and calls % _PROBE_EVERY_CALLS:
            return False
        self._last_mode = mode
        return True

    def warn_random(self, fqn: str) -> None:
        """Say once that random numbers are drawn here although they will not repeat."""
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"region `{fqn}` draws random numbers (dropout?) although it has "
            "preserve_rng_state=False: the recompute draws other ones and its gradients belong "
            "to another forward. Leave preserve_rng_state at True.",
            stacklevel=2,
        )


class Region:
    """Settings of a region and what is known about it.

    Args:
        impl: How the region is recomputed.
        preserve_rng_state: Whether random numbers repeat in the recompute.
        context_fn: Returns two context managers, for the forward and for the recompute.
        determinism_check: ``"default"``, ``"none"`` or ``"values"``; see
            :mod:`wrappers.engine.verify`.
        debug: Whether to record the operators of both runs for the error text.
        early_stop: Whether a recompute ends with the last saved tensor that is needed.
        fqn: Name for errors and reports.

    Raises:
        TypeError: ``context_fn`` cannot be called.
        ValueError: A setting is unknown, or two contradict each other.
    """

    __slots__ = (
        "context_fn",
        "debug",
        "determinism_check",
        "early_stop",
        "fqn",
        "habits",
        "impl",
        "preserve_rng_state",
    )

    def __init__(
        self,
        *,
        impl: CheckpointImpl = CheckpointImpl.NO_REENTRANT,
        preserve_rng_state: bool = True,
        context_fn: ContextFn = noop_context_fn,
        determinism_check: str = "default",
        debug: bool = False,
        early_stop: bool = True,
        fqn: str = "",
    ) -> None:
        self.impl = CheckpointImpl(impl)
        self.preserve_rng_state = preserve_rng_state
        self.context_fn = context_fn
        self.determinism_check = determinism_check
        self.debug = debug
        self.early_stop = early_stop
        self.fqn = fqn
        self.habits = Habits()
        if not callable(context_fn):
            raise TypeError(f"context_fn must be a callable, got {type(context_fn).__name__}")
        if determinism_check not in verify.DETERMINISM_CHECKS:
            raise ValueError(
                f"determinism_check must be one of {sorted(verify.DETERMINISM_CHECKS)}, "
                f"got {determinism_check!r}"
            )
        if self.impl is CheckpointImpl.REENTRANT:
            self._refuse_what_needs_hooks()

    def _refuse_what_needs_hooks(self) -> None:
        given = [
            name
            for name, is_given in (
                ("context_fn", self.context_fn is not noop_context_fn),
                ("debug", bool(self.debug)),
                ("determinism_check='values'", self.determinism_check == "values"),
            )
            if is_given
        ]
        if given:
            raise ValueError(
                f"{', '.join(given)}: not possible with CheckpointImpl.REENTRANT "
                "(use_reentrant=True), which saves nothing in forward that could be compared or "
                "kept. Use CheckpointImpl.NO_REENTRANT (use_reentrant=False)."
            )

    @property
    def is_early_stop(self) -> bool:
        """Whether recomputes of a forward that starts now end early."""
        return self.early_stop if _early_stop is None else _early_stop

    @property
    def is_debug(self) -> bool:
        """Whether a forward that starts now is traced."""
        return self.debug if _debug is None else _debug

    def with_context_fn(self, context_fn: ContextFn) -> Region:
        """The same region under other contexts; what is known about it is shared."""
        region = Region(context_fn=context_fn, **self._options())
        region.habits = self.habits
        return region

    def _options(self) -> dict[str, Any]:
        names = ("impl", "preserve_rng_state", "determinism_check", "debug", "early_stop", "fqn")
        return {name: getattr(self, name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        return {"context_fn": self.context_fn, **self._options()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Region({self.fqn!r}, {self.impl.name})"


_early_stop: bool | None = None
_debug: bool | None = None


@contextlib.contextmanager
def set_checkpoint_early_stop(enable: bool) -> Iterator[None]:
    """Override the ``early_stop`` of every region whose forward runs in this context.

    A recompute normally ends as soon as the last saved tensor that is still needed is back.
    The context needs to be active in forward only.

    Args:
        enable: Whether recomputes end early.
    """
    global _early_stop
    before, _early_stop = _early_stop, enable
    try:
        yield
    finally:
        _early_stop = before


@contextlib.contextmanager
def set_checkpoint_debug_enabled(enabled: bool | None) -> Iterator[None]:
    """Override the ``debug`` of every region whose forward runs in this context.

    Args:
        enabled: Whether to trace operators; None leaves it to each region.
    """
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before
