"""The context_fn pair: two dispatch modes that keep some operators' outputs.

``context_fn=partial(create_selective_checkpoint_contexts, policy)`` asks the policy about
every operator of the forward, keeps the outputs that it wants saved, and in the rerun hands
them out again instead of computing them. Outputs are found by operator and by how many times
this operator has run, as the rerun issues the same operators in the same order.

Costs a dispatch mode around every operator of both runs. Kept outputs are used up by a
backward, so a second one through the same region needs another forward.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from wrappers import _torch, _tree
from wrappers.engine import holders
from wrappers.engine.holders import Holder, Offloader
from wrappers.errors import InputChangedError, OffloadError
from wrappers.policies import Policy, PolicyFn, as_policy, plain_function, recompute_all
from wrappers.policy import KEPT, OFFLOADED, SAC_IGNORED_OPS, SelectiveCheckpointContext

ContextFn = Callable[
    [], tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]
]

#: Stands for an output that has been handed out.
_CONSUMED = object()


class _Kept:
    """An operator's output, kept, with the versions that its tensors had."""

    __slots__ = ("_build", "_held", "_versions")

    def __init__(self, out: Any, offload: Offloader | None) -> None:
        tensors, self._build = _tree.flatten(out)
        #: Of each tensor: the holder where it is offloaded, else the tensor.
        self._held: list[Holder | Tensor] = []
        for tensor in tensors:
            holder = offload(tensor) if offload is not None else None
            # Detached: a view must not look like one, and the graph must not keep itself alive.
            self._held.append(_torch.detach_shallow(tensor) if holder is None else holder)
        self._versions = [tensor._version for tensor in tensors]

    def take(self, func: Any, allow_mutation: bool) -> Any:
        """Give the output back.

        Raises:
            RuntimeError: It was changed in place.
            OffloadError: It was offloaded and does not come back.
        """
        tensors = []
        for held, version in zip(self._held, self._versions, strict=True):
            if isinstance(held, Tensor):
                if held._version != version and not allow_mutation:
                    raise _changed(func)
                tensors.append(held)
            else:
                try:
                    tensors.append(held.unpack())
                except InputChangedError as error:
                    raise _changed(func) from error
        return self._build(tensors)


def _changed(func: Any) -> RuntimeError:
    return RuntimeError(
        f"the output of {func} that the policy keeps was changed in place after it was kept. Let "
        "the policy recompute this operator, or pass allow_cache_entry_mutation=True if the change "
        "is meant to be seen."
    )


class _Cache:
    """What one forward keeps for its recompute.

    Attributes:
        counts: How many times the forward has called each operator.
        kept: By operator, and by which of its calls it was.
    """

    __slots__ = ("_has_warned", "counts", "kept")

    def __init__(self) -> None:
        self._has_warned = False
        self.counts: dict[Any, int] = {}
        self.kept: dict[Any, dict[int, Any]] = {}

    def warn_not_back(self, error: OffloadError) -> None:
        """Say once that an offloaded output was computed again, as it did not come back."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"region `{error.fqn}`: an offloaded output did not come back and was computed "
                f"again. The cause: {error.cause}.",
                stacklevel=2,
            )


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operator returns a view of an argument.

    A view is never kept: it costs nothing to make again, would keep its whole base, and would not
    see what the rerun writes into the base that it has recomputed.
    """
    schema = getattr(func, "_schema", None)  # a higher-order operator has none
    infos = [value.alias_info for value in schema.returns] if schema else []
    return any(info is not None and not info.is_write for info in infos)


class _KeepMode(_torch.TorchDispatchMode):
    """Around the forward: asks the policy and keeps outputs."""

    def __init__(
        self,
        policy: PolicyFn,
        cache: _Cache,
        note_unmatched: Callable[[Iterable[str]], None] | None = None,
        *,
        compare: Callable[[Mapping[str, int]], None] | None = None,
        fqn: str = "a function",
        allow_mutation: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._policy = policy
        self._fqn = fqn
        self._allows_mutation = allow_mutation
        self._offloader: Offloader | None = None
        self._cache = cache
        self._note_unmatched = note_unmatched
        self._compare = compare
        #: Of the policy. Python takes one that comes out of an operator like ``@`` for its own.
        self._error: TypeError | None = None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        policys_error, self._error = self._error, None
        if policys_error is not None and error[0] is TypeError:
            raise policys_error from None
        if error[0] is not None:
            return
        if self._note_unmatched is not None and not self._cache.kept:
            self._note_unmatched(map(str, self._cache.counts))
        if self._compare is not None:
            self._compare({str(func): num for func, num in self._cache.counts.items()})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in SAC_IGNORED_OPS:
            return out
        context = SelectiveCheckpointContext(is_recompute=False, op_output=out)
        try:
            policy = self._policy(context, func, *args, **kwargs)
        except TypeError as error:
            self._error = error
            raise
        counts = self._cache.counts
        index = counts.get(func, 0)
        counts[func] = index + 1
        if policy in KEPT and not _is_view(func):
            kept = self._cache.kept.setdefault(func, {})
            # What has left the device does not see a change that is meant to be seen.
            offloads = policy in OFFLOADED and not self._allows_mutation
            kept[index] = _Kept(out, self._get_offloader() if offloads else None)
        return out

    def _get_offloader(self) -> Offloader | None:
        if self._offloader is None:
            self._offloader = holders.make_offloader(self._fqn, self._fqn)
        return self._offloader


class _ReuseMode(_torch.TorchDispatchMode):
    """Around the recompute: hands out what was kept.

    Attributes:
        allows_mutation: Whether what is handed out may have been changed in place.
    """

    def __init__(self, cache: _Cache, allow_mutation: bool, *, is_consuming: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._is_consuming = is_consuming
        self.allows_mutation = allow_mutation
        self._counts: dict[Any, int] = {}

    def __enter__(self) -> _ReuseMode:
        self._counts.clear()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kept = self._cache.kept.get(func)
        if kept is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        index = self._counts.get(func, 0)
        self._counts[func] = index + 1
        entry = kept.get(index)
        if entry is None:
            self._require_called(func, index)
            return func(*args, **kwargs) if kwargs else func(*args)
        if entry is _CONSUMED:
            raise RuntimeError(
                "trying to run backward a second time through a region with a selective policy, "
                "whose kept outputs the first backward has used up. Run one backward only, or "
                "use this region without a policy."
            )
        if self._is_consuming:
            kept[index] = _CONSUMED
        try:
            return entry.take(func, self.allows_mutation)
        except OffloadError as error:
            if _torch.is_collective(func) or torch.Tag.nondeterministic_seeded in func.tags:
                raise  # Other ranks would not join; and other numbers would be drawn.
            self._cache.warn_not_back(error)
            return func(*args, **kwargs) if kwargs else func(*args)

    def _require_called(self, func: Any, index: int) -> None:
        if index >= self._cache.counts[func]:
            raise RuntimeError(
                f"the recompute calls {func} {index + 1} times, the forward called it "
                f"{self._cache.counts[func]} times. The region's operators depend on something "
                "that changed between forward and backward."
            )


def create_selective_checkpoint_contexts(
    policy_fn_or_list: PolicyFn | list[Any], allow_cache_entry_mutation: bool = False
) -> tuple[_KeepMode, _ReuseMode]:
    """Make the two contexts that keep what a policy wants kept.

    Pass it as ``checkpoint(..., context_fn=partial(create_selective_checkpoint_contexts,
    policy))``.

    Args:
        policy_fn_or_list: Either a function ``policy(ctx, op, *args, **kwargs)`` that returns
            a :class:`CheckpointPolicy` (or a bool: True saves, False recomputes), or a list
            of operators to save, such as ``[torch.ops.aten.mm.default]``; a packet such as
            ``torch.ops.aten.mm`` stands for all its overloads.
        allow_cache_entry_mutation: Whether a kept output may be changed in place before it
            is used. By default this raises RuntimeError in the recompute.

    Returns:
        The context for the forward and the one for the recompute. ``*_CPU_OFFLOAD`` moves
        outputs that lie on an accelerator to host memory and back, beside the compute.

    Raises:
        ValueError: The list has an entry that is not an operator.
        TypeError: The argument is neither a list nor callable.
    """
    cache = _Cache()
    keep = _KeepMode(
        as_policy(policy_fn_or_list).begin(), cache, allow_mutation=allow_cache_entry_mutation
    )
    return keep, _ReuseMode(cache, allow_cache_entry_mutation)


class HasPolicy(Protocol):
    """A region, as far as this file knows it."""

    policy: Any
    fqn: str
    experience: Any

    def compare_with_plan(self, calls: Mapping[str, int]) -> None:
        """Take note of the calls of one forward."""


def contexts_of_policy(
    region: HasPolicy,
    allow_mutation: bool,
    note_unmatched: Callable[[Iterable[str]], None] | None,
) -> tuple[_KeepMode, _ReuseMode]:
    """The contexts of a region that has a policy: what they keep serves any number of backwards.

    Args:
        region: The region.
        allow_mutation: Whether a kept output may be changed in place before it is used.
        note_unmatched: Called with the names of all operators if the policy keeps none.
    """
    cache = _Cache()
    policy: Policy = region.policy
    if region.experience.off_plan:
        policy, note_unmatched = recompute_all(), None
    keep = _KeepMode(
        policy.begin(),
        cache,
        note_unmatched,
        compare=region.compare_with_plan if policy.expected_calls else None,
        fqn=region.fqn,
        allow_mutation=allow_mutation,
    )
    return keep, _ReuseMode(cache, allow_mutation, is_consuming=False)


def for_compiler(context_fn: ContextFn) -> ContextFn:
    """The same policy in torch's own contexts, which the compiler knows.

    Args:
        context_fn: One made with :func:`create_selective_checkpoint_contexts` is translated; any
            other is returned as it is.
    """
    if isinstance(context_fn, functools.partial) and (
        context_fn.func is create_selective_checkpoint_contexts
    ):
        options = dict(zip(("policy_fn_or_list", _ALLOW), context_fn.args, strict=False))
        options.update(context_fn.keywords)
        policy = options["policy_fn_or_list"]
        return compiler_context_fn(policy, options.get(_ALLOW, False))
    return context_fn


_ALLOW = "allow_cache_entry_mutation"


def compiler_context_fn(policy: Any, allow_mutation: bool) -> ContextFn:
    """A policy in torch's own contexts."""
    if not isinstance(policy, Policy):  # A compiler makes it, which can make no objects.
        return functools.partial(
            torch.utils.checkpoint.create_selective_checkpoint_contexts,
            plain_function(policy),
            allow_cache_entry_mutation=allow_mutation,
        )
    return policy.mutating_compiler_context_fn if allow_mutation else policy.compiler_context_fn
