"""The settings of one region, checked once, and the switches that override them.

A :class:`Region` is made once for a wrapped module and used for all its calls, so nothing
that stays the same is worked out again. Its :class:`Habits` remember when its calls were last
looked at, and whether the user has been warned.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from wrappers.engine.selective import ContextFn, contexts_of_policy
from wrappers.engine.verify import DETERMINISM_CHECKS
from wrappers.errors import OffloadError, WrapperError
from wrappers.policies import Policy, as_policy
from wrappers.policy import CheckpointImpl

#: When a region's replay is compared with a rerun: for its first one, always, never.
VERIFY = ("first", "always", "never")

#: Every so many calls a region without preserve_rng_state is looked at for what it draws.
_PROBE_EVERY_CALLS = 64


def noop_context_fn() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """The default ``context_fn``: nothing around forward, nothing around the recompute."""
    return contextlib.nullcontext(), contextlib.nullcontext()


_NO_MODE = object()


class Habits:
    """What is remembered between the calls of a region that does not preserve random state."""

    __slots__ = ("_calls", "_has_warned", "_last_mode")

    def __init__(self) -> None:
        self._calls = 0
        self._last_mode: object = _NO_MODE
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


class RegionStats:
    """What one forward of a region with REPLAY has come to, and its backward so far.

    Attributes:
        num_operators: Operators recorded, views included.
        num_kept: Operators whose output is kept.
        num_needed: Operators that the saved tensors depend on and that are not kept.
        num_replayed: Operators executed by backward so far.
        num_offloaded: Outputs moved to the host.
        kept_bytes: Bytes of what is kept.
        input_bytes: Bytes of the region's arguments, measured with them.
        num_bytes: Bytes kept and released.
        released_bytes: Bytes that autograd would have kept without checkpointing, beyond inputs
            and parameters, and that are not kept. None where it has not been measured: only the
            first call of a region is.
    """

    # On the class, as most forwards set two of them.
    num_operators = num_kept = num_needed = num_replayed = num_offloaded = 0
    input_bytes = num_bytes = 0
    kept_bytes: int | None = None
    released_bytes: int | None = None

    @property
    def num_dropped(self) -> int:
        """Operators that nobody needs again."""
        return self.num_operators - self.num_needed - self.num_kept


class Experience:
    """What the calls of a region with REPLAY have shown; shared by all copies of the region.

    Attributes:
        fallen_at: Which of all fallbacks so far was this region's; None if it has not fallen back.
        reason: Why it has fallen back.
        keeps_policy: Whether the policy still counts where it has fallen back.
        is_verified: Whether a replay has been compared with a rerun.
        note: What the comparison has shown, if it could not be made.
        stats: Of the latest call.
        measured: Of the first call, which is measured in bytes too.
        off_plan: By training mode: which of all fallbacks so far was the one from the plan.
        difference: How a forward has differed from the plan, the first that did.
        unneeded: What the policy kept in the first call although nothing needed it.
    """

    __slots__ = (
        "_said",
        "difference",
        "fallen_at",
        "is_verified",
        "keeps_policy",
        "measured",
        "note",
        "off_plan",
        "reason",
        "stats",
        "unneeded",
    )

    def __init__(self) -> None:
        self.fallen_at: int | None = None
        self.reason = ""
        self.is_verified = False
        self.keeps_policy = False
        self.note = ""
        self.stats: RegionStats | None = None
        self.measured: RegionStats | None = None
        self.unneeded: list[int] = []
        self.off_plan: dict[bool | None, int] = {}
        self.difference = ""
        self._said: set[str] = set()

    def warn_once(self, kind: str, text: str) -> None:
        """Say something once."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, stacklevel=2)


_num_fallbacks = 0


def num_fallbacks() -> int:
    """How many regions have fallen back so far: from REPLAY to a rerun, or from their plan."""
    return _num_fallbacks


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
        policy: Which operators' outputs are kept; see :mod:`wrappers.policies`. With NO_REENTRANT
            it stands for a ``context_fn``.
        verify: When a replay is compared with a rerun: ``"first"``, ``"always"``, ``"never"``.
        allow_cache_entry_mutation: Whether what a policy keeps may be changed before backward.

    Raises:
        TypeError: ``context_fn`` cannot be called, or ``policy`` is none.
        ValueError: A setting is unknown, or two contradict each other.
    """

    __slots__ = (
        "__weakref__",
        "_substitute",
        "_witness",
        "allow_cache_entry_mutation",
        "context_fn",
        "debug",
        "determinism_check",
        "early_stop",
        "experience",
        "fqn",
        "habits",
        "impl",
        "policy",
        "preserve_rng_state",
        "rules",
        "verify",
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
        policy: Any = None,
        verify: str = "first",
        allow_cache_entry_mutation: bool = False,
    ) -> None:
        self.impl = CheckpointImpl(impl)
        self.preserve_rng_state = preserve_rng_state
        self.context_fn = context_fn
        self.determinism_check = determinism_check
        self.debug = debug
        self.early_stop = early_stop
        self.fqn = fqn
        self.policy: Policy | None = None if policy is None else as_policy(policy)
        self.verify = verify
        self.allow_cache_entry_mutation = allow_cache_entry_mutation
        self.habits = Habits()
        self.experience = Experience()
        #: What the recorder makes of the policy.
        self.rules: Any = None
        self._substitute: Region | None = None
        self._witness: Region | None = None
        if not callable(context_fn):
            raise TypeError(f"context_fn must be a callable, got {type(context_fn).__name__}")
        if determinism_check not in DETERMINISM_CHECKS:
            raise ValueError(
                f"determinism_check must be one of {sorted(DETERMINISM_CHECKS)}, "
                f"got {determinism_check!r}"
            )
        if verify not in VERIFY:
            raise ValueError(f"verify must be one of {list(VERIFY)}, got {verify!r}")
        if self.impl is CheckpointImpl.REENTRANT:
            self._refuse_what_needs_hooks()
        if context_fn is not noop_context_fn and (
            policy is not None or self.impl is CheckpointImpl.REPLAY
        ):
            raise ValueError(
                "context_fn cannot be combined with policy or CheckpointImpl.REPLAY: give the "
                "policy of create_selective_checkpoint_contexts as policy=..., or use "
                "CheckpointImpl.NO_REENTRANT without policy."
            )
        if self.policy is not None and self.impl is CheckpointImpl.NO_REENTRANT:
            note = self.note_unmatched if self.policy.expects_match else None
            self.context_fn = functools.partial(
                contexts_of_policy, self, allow_cache_entry_mutation, note
            )

    def _refuse_what_needs_hooks(self) -> None:
        given = [
            name
            for name, is_given in (
                ("context_fn", self.context_fn is not noop_context_fn),
                ("policy", self.policy is not None),
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

    def changed(self, **options: Any) -> Region:
        """The same region with some settings changed; what is known about it is shared."""
        region = Region(**{**self.__getstate__(), **options})
        region.habits = self.habits
        region.experience = self.experience
        return region

    def __getstate__(self) -> dict[str, Any]:
        names = (
            "impl",
            "preserve_rng_state",
            "determinism_check",
            "debug",
            "early_stop",
            "fqn",
            "policy",
            "verify",
            "allow_cache_entry_mutation",
        )
        state = {name: getattr(self, name) for name in names}
        if self.policy is None:  # Else it is made from the policy.
            state["context_fn"] = self.context_fn
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # --- REPLAY

    def should_verify(self) -> bool:
        """Whether the replay of a forward that starts now is to be compared with a rerun."""
        if self.verify == "first":
            return not self.experience.is_verified or self.is_debug
        return self.verify == "always"

    def for_witness(self) -> Region:
        """The settings of the rerun that a replay is compared with."""
        if self._witness is None:
            options = {"preserve_rng_state": True, "policy": None, "debug": False}
            self._witness = self.changed(impl=CheckpointImpl.NO_REENTRANT, **options)
        return self._witness

    def substitute(self) -> Region:
        """The settings of a region that has fallen back.

        Without its policy, unless it is known to work: what a policy keeps by the number of an
        operator's call is not safe where operators write unseen.
        """
        if self._substitute is None:
            options = {} if self.experience.keeps_policy else {"policy": None}
            self._substitute = self.changed(impl=CheckpointImpl.NO_REENTRANT, **options)
        return self._substitute

    def is_fallen(self, visible_fallbacks: int) -> bool:
        """Whether the region has fallen back, as far as so many fallbacks tell."""
        fallen_at = self.experience.fallen_at
        return fallen_at is not None and fallen_at <= visible_fallbacks

    def fall_back(self, reason: str, *, keeps_policy: bool = False) -> None:
        """Rerun the region from its next forward on; say why, once."""
        global _num_fallbacks
        if self.experience.fallen_at is not None:
            return
        _num_fallbacks += 1
        # One that has never run as a replay was none for anybody.
        self.experience.fallen_at = 0 if self.experience.stats is None else _num_fallbacks
        self.experience.reason = reason
        self.experience.keeps_policy = keeps_policy
        self.experience.warn_once(
            "fallback",
            f"region `{self.fqn}` is rerun from now on instead of replayed: {reason}. Pass "
            "impl=CheckpointImpl.NO_REENTRANT to say that you know.",
        )

    def is_off_plan(self, mode: bool | None, visible_fallbacks: int) -> bool:
        """Whether the region keeps nothing in a training mode, as far as so many fallbacks tell."""
        left_at = self.experience.off_plan.get(mode)
        return left_at is not None and left_at <= visible_fallbacks

    def compare_with_plan(self, calls: Mapping[str, int], mode: bool | None = None) -> None:
        """Keep nothing from the next forward on if this one's calls differ from the plan.

        Args:
            calls: How often the forward has called each operator.
            mode: The ``training`` flag of the region's module; None if it is not known.

        Raises:
            WrapperError: They differ, and the policy is strict.
        """
        global _num_fallbacks
        assert self.policy is not None, "a region without a policy has no plan"
        found = self.policy.differences(calls)
        if not found:
            return
        difference = "; ".join(found)
        what = f"region `{self.fqn}` does not run as planned: {difference}."
        remedy = "Profile again with this sample, in this mode."
        if self.policy.is_strict:
            raise WrapperError(f"{what} {remedy}", fqn=self.fqn)
        if mode not in self.experience.off_plan:
            _num_fallbacks += 1
            self.experience.off_plan[mode] = _num_fallbacks
        self.experience.difference = self.experience.difference or difference
        self.experience.warn_once(
            "plan", f"{what} It keeps nothing from its next forward on. {remedy}"
        )

    def note_verified(self, note: str = "") -> None:
        """Note that a replay has been compared with a rerun, or that this cannot be done."""
        self.experience.is_verified = True
        self.experience.note = note

    def note_unmatched(self, seen: Iterable[str]) -> None:
        """Say once that the policy has kept nothing."""
        names = ", ".join(seen)
        self.experience.warn_once(
            "unmatched",
            f"region `{self.fqn}`: the policy keeps the output of no operator, so all of them are "
            f"recomputed. The operators of this region: {names}",
        )

    def warn_stored(self) -> None:
        """Say that the region has put a tensor into an argument where no gradient can follow."""
        self.experience.warn_once(
            "stored",
            f"region `{self.fqn}` has stored a tensor in an argument, a list or dict. REENTRANT "
            "runs the forward without a graph, so no gradient flows through that tensor. Return "
            "it, or use CheckpointImpl.NO_REENTRANT; ignore this if it needs no gradient.",
        )

    def warn_nothing_to_offload(self) -> None:
        """Say once that a policy offloads what is on the host."""
        self.experience.warn_once(
            "offload",
            f"region `{self.fqn}`: the policy moves outputs to the host that are there already; "
            "they are kept as they are",
        )

    def warn_not_back(self, error: OffloadError) -> None:
        """Say once that an offloaded output was computed again, as it did not come back."""
        self.experience.warn_once(
            "not_back",
            f"region `{self.fqn}`: an offloaded output did not come back and was computed again. "
            f"The cause: {error.cause}.",
        )

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
