"""Op-level policies: which operators of a region are kept, recomputed or moved to the host.

A policy is what every ``policy=`` argument takes: a preset of this file, a list of operators, or
a function ``(ctx, op, *args, **kwargs) -> CheckpointPolicy | bool``. Presets combine with ``|``:
where both sides have an opinion about a call, the right one counts; what nobody has an opinion
about is recomputed.

    policy = save_matmuls() | save_attention() | recompute_matmuls_of([(1024, 4096)])

Keeping an output only pays if something has to be recomputed from it: what backward does not need
is let go at the end of the region's forward, whatever the policy said.

The docstrings say what a transformer block then keeps: pre-norm attention and a feed-forward of
four times the width, without dropout. ``d`` is one tensor of (batch, sequence, width); a block
without checkpointing keeps about 16 d, full recompute its input.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from wrappers import _device, _torch
from wrappers.policy import (
    OFFLOADED,
    CheckpointPolicy,
    SelectiveCheckpointContext,
    policy_from_bool,
)

__all__ = [
    "Policy",
    "as_policy",
    "offload_larger_than",
    "planned",
    "recompute_all",
    "recompute_matmuls_of",
    "save_attention",
    "save_compute_and_communication",
    "save_every_other_matmul",
    "save_matmuls",
]

PolicyFn = Callable[..., Any]


@dataclass(frozen=True)
class Turns:
    """Answers about an operator that depend on the number of its call, and on nothing else.

    Numbers begin at 0 in each forward of a region. Each call counts that a policy is asked about:
    all but those of :data:`SAC_IGNORED_OPS`, views included, also in regions inside the region.

    Attributes:
        counter: Operators with the same one are counted together.
        is_kept: Whether the output of a call is kept, by its number.
        answer: The answer about a call, by its number.
        offloads: Whether any answer moves an output to the host.
    """

    counter: Hashable
    is_kept: Callable[[int], bool]
    answer: Callable[[int], CheckpointPolicy]
    offloads: bool = False


#: How often one forward of a region has to call an operator, and whether it is exactly so often.
ExpectedCalls = Mapping[str, tuple[int, bool]]


class Policy:
    """An opinion about the operators of a region; ``a | b`` combines two.

    It can be called like a policy function and given to ``torch.utils.checkpoint`` as one. A
    policy that counts does so per forward: give torch ``policy.start()`` then.
    """

    #: Whether every call of an operator gets the same answer.
    is_static = False

    #: Whether an operator and the number of its call decide the answer; see :meth:`turns_of`.
    is_counting = False

    #: Whether a region in which it keeps nothing deserves a warning.
    expects_match = True

    #: By name of an operator: the calls without which the policy makes no sense.
    expected_calls: ExpectedCalls = MappingProxyType({})

    #: Whether a forward with other calls is an error.
    is_strict = False

    def __init__(self) -> None:
        # Functions, as the compiler takes nothing else for a constant.
        self.compiler_context_fn = _compiler_contexts(self, False)
        self.mutating_compiler_context_fn = _compiler_contexts(self, True)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["compiler_context_fn"], state["mutating_compiler_context_fn"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Policy.__init__(self)

    def begin(self) -> PolicyFn:
        """Start a forward: a policy function ``(ctx, op, *args, **kwargs)`` with fresh counters.

        It returns a :class:`CheckpointPolicy`, or None where the policy has no opinion.
        """
        raise NotImplementedError

    def __call__(
        self, ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        """Answer for one call; no opinion means recompute."""
        return self.start()(ctx, op, *args, **kwargs)  # type: ignore[no-any-return]

    def start(self) -> PolicyFn:
        """Like :meth:`begin`, but no opinion means PREFER_RECOMPUTE."""
        return functools.partial(_decide, self.begin())

    def turns_of(self, op: Any) -> Turns | None:
        """What a counting policy says about an operator; None if it is the same for all calls."""
        return None

    def differences(self, calls: Mapping[str, int]) -> list[str]:
        """Tell where the calls of one forward, by operator, are others than expected."""
        found = []
        for name, (expected, is_exact) in self.expected_calls.items():
            got = calls.get(name, 0)
            if got < expected or (is_exact and got > expected):
                at_least = "" if is_exact else "at least "
                found.append(f"{name} is called {got} times, expected {at_least}{expected}")
        return found

    def __or__(self, other: Any) -> Policy:
        """Combine: where both have an opinion, the other counts."""
        return _Combined(self, as_policy(other))

    def __ror__(self, other: Any) -> Policy:
        return _Combined(as_policy(other), self)


def _compiler_contexts(policy: Policy, allow_mutation: bool) -> Callable[[], Any]:
    """A context_fn with a policy in torch's own contexts, which the compiler knows."""

    reference = weakref.ref(policy)  # It refers to the function.

    def context_fn() -> Any:
        alive = reference()
        assert alive is not None, "the policy of a compiled region has gone before its region"
        return torch.utils.checkpoint.create_selective_checkpoint_contexts(
            alive.start(), allow_cache_entry_mutation=allow_mutation
        )

    return context_fn


def _decide(opinion: PolicyFn, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    answer = opinion(ctx, op, *args, **kwargs)
    return CheckpointPolicy.PREFER_RECOMPUTE if answer is None else answer


class _Listed(Policy):
    """The same answer for every operator of a set, no opinion about others."""

    is_static = True

    def __init__(self, operators: Collection[Any], answer: CheckpointPolicy) -> None:
        super().__init__()
        self.operators = frozenset(operators)
        self.answer = answer
        self._hash = hash((self.operators, answer))

    def __reduce__(self) -> Any:  # Operators cannot be pickled, their names can.
        return _listed_again, (sorted(op.name() for op in self.operators), self.answer)

    def begin(self) -> PolicyFn:
        return self._answer

    def _answer(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy | None:
        return self.answer if op in self.operators else None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Listed)
            and self.operators == other.operators
            and self.answer is other.answer
        )

    def __hash__(self) -> int:
        return self._hash


def _listed_again(names: list[str], answer: CheckpointPolicy) -> _Listed:
    return _Listed([_torch.operator_named(name) for name in names], answer)


class _Nothing(Policy):
    """Keeps nothing."""

    is_static = True
    expects_match = False

    def begin(self) -> PolicyFn:
        return _recompute

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Nothing)

    def __hash__(self) -> int:
        return hash(_Nothing)


def _recompute(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


class _Function(Policy):
    """A user's function."""

    def __init__(self, function: PolicyFn) -> None:
        super().__init__()
        self.function = function

    def begin(self) -> PolicyFn:
        return self._answer

    def _answer(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        answer = self.function(ctx, op, *args, **kwargs)
        if isinstance(answer, bool):
            return policy_from_bool(answer)
        if not isinstance(answer, CheckpointPolicy):
            raise TypeError(
                f"the policy function must return a CheckpointPolicy or a bool; for {op} it "
                f"returned {answer!r}"
            )
        return answer


class _Counting(Policy):
    """Tells the calls of an operator apart by their numbers."""

    is_counting = True

    #: The answer about operators whose calls it does not tell apart.
    otherwise: CheckpointPolicy | None = None

    def begin(self) -> PolicyFn:
        # Before torch 2.13 its own contexts ask in the recompute too.
        num_calls: dict[bool, Counter[Hashable]] = {False: Counter(), True: Counter()}

        def answer(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy | None:
            turns = self.turns_of(op)
            if turns is None:
                return self.otherwise
            counted = num_calls[ctx.is_recompute]
            number = counted[turns.counter]
            counted[turns.counter] = number + 1
            return turns.answer(number)

        return answer


class _EveryOther(_Counting):
    """Keeps the first, third, fifth, ... call among some operators."""

    def __init__(self, operators: Collection[Any]) -> None:
        super().__init__()
        self.operators = frozenset(operators)

    def __reduce__(self) -> Any:
        return _every_other_again, (sorted(op.name() for op in self.operators),)

    def turns_of(self, op: Any) -> Turns | None:
        return _EVERY_OTHER if op in self.operators else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _EveryOther) and self.operators == other.operators

    def __hash__(self) -> int:
        return hash((_EveryOther, self.operators))


def _is_even(number: int) -> bool:
    return number % 2 == 0


def _save_even(number: int) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE if number % 2 else CheckpointPolicy.MUST_SAVE


_EVERY_OTHER = Turns("all", _is_even, _save_even)


def _every_other_again(names: list[str]) -> _EveryOther:
    return _EveryOther([_torch.operator_named(name) for name in names])


class _Planned(_Counting):
    """Keeps the calls that a plan names, recomputes all others."""

    expects_match = False  # What the plan names is expected one by one.
    otherwise = CheckpointPolicy.PREFER_RECOMPUTE

    def __init__(
        self,
        decisions: Mapping[tuple[str, int], CheckpointPolicy],
        counts: Mapping[str, int],
        is_strict: bool,
    ) -> None:
        super().__init__()
        self.decisions = dict(decisions)
        self.counts = dict(counts)
        self.is_strict = is_strict
        answers: dict[str, dict[int, CheckpointPolicy]] = {}
        for (name, ordinal), answer in self.decisions.items():
            answers.setdefault(name, {})[ordinal] = answer
        self._turns = {name: _turns(name, given) for name, given in answers.items()}
        at_least = {name: (max(given) + 1, False) for name, given in answers.items()}
        exactly = {name: (count, True) for name, count in self.counts.items()}
        self.expected_calls = {**at_least, **exactly}
        self._key = (frozenset(self.decisions.items()), frozenset(self.counts.items()), is_strict)
        self._hash = hash(self._key)

    def __reduce__(self) -> Any:
        return _Planned, (self.decisions, self.counts, self.is_strict)

    def turns_of(self, op: Any) -> Turns | None:
        return self._turns.get(str(op))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Planned) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        num_offloaded = sum(answer in OFFLOADED for answer in self.decisions.values())
        num_saved = len(self.decisions) - num_offloaded
        offloaded = f", {num_offloaded} offloaded" if num_offloaded else ""
        return f"planned({num_saved} saved{offloaded})"


def _turns(name: str, answers: dict[int, CheckpointPolicy]) -> Turns:
    """The answers of a plan about an operator."""

    def answer(number: int) -> CheckpointPolicy:
        return answers.get(number, CheckpointPolicy.PREFER_RECOMPUTE)

    offloads = any(given in OFFLOADED for given in answers.values())
    return Turns(name, frozenset(answers).__contains__, answer, offloads)


class _ByShape(Policy):
    """Recomputes matmuls by the shape of their second matrix."""

    expects_match = False

    def __init__(self, shapes: Iterable[Sequence[int]]) -> None:
        super().__init__()
        self.shapes = frozenset(tuple(shape) for shape in shapes)

    def begin(self) -> PolicyFn:
        return self._answer

    def _answer(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy | None:
        if op not in _matmuls():
            return None
        matrices = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() >= 2]
        if matrices and tuple(matrices[-1].shape) in self.shapes:
            return CheckpointPolicy.MUST_RECOMPUTE
        return None


class _ByBytes(Policy):
    """Offloads outputs that take more than some bytes."""

    expects_match = False

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def begin(self) -> PolicyFn:
        return self._answer

    def _answer(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy | None:
        out = ctx.op_output
        tensors = out if isinstance(out, (tuple, list)) else (out,)
        size = sum(_num_bytes(t) for t in tensors if isinstance(t, Tensor))
        return CheckpointPolicy.MUST_CPU_OFFLOAD if size > self.limit else None


def _num_bytes(tensor: Tensor) -> int:
    try:
        return tensor.nbytes
    except RuntimeError:  # sparse and nested tensors
        return 0


class _Combined(Policy):
    """Two policies, the second of which has the last word."""

    def __init__(self, first: Policy, second: Policy) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.is_static = first.is_static and second.is_static  # then a key of regions, too
        self.expects_match = first.expects_match or second.expects_match
        self.expected_calls = {**first.expected_calls, **second.expected_calls}
        self.is_strict = first.is_strict or second.is_strict

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Combined) and (
            (self.first, self.second) == (other.first, other.second)
        )

    def __hash__(self) -> int:
        return hash((_Combined, self.first, self.second))

    def begin(self) -> PolicyFn:
        first, second = self.first.begin(), self.second.begin()

        def answer(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy | None:
            # Both are asked, as both may count.
            earlier: CheckpointPolicy | None = first(ctx, op, *args, **kwargs)
            later: CheckpointPolicy | None = second(ctx, op, *args, **kwargs)
            return earlier if later is None else later

        return answer


def as_policy(policy: Any) -> Policy:
    """Turn what a ``policy=`` argument takes into a :class:`Policy`.

    Args:
        policy: A preset; a list of operators to save, such as ``[torch.ops.aten.mm.default]``,
            where a packet such as ``torch.ops.aten.mm`` stands for all its overloads; or a function
            ``(ctx, op, *args, **kwargs)`` that returns a :class:`CheckpointPolicy` of ours or of
            torch's (they are one), or a bool: True saves, False recomputes.

    Returns:
        A policy; a preset is returned as it is.

    Raises:
        ValueError: The list has an entry that is not an operator.
        TypeError: The argument is nothing of these.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, (list, tuple, set, frozenset)):
        return _listed(policy)
    if not callable(policy):
        raise TypeError(
            "a policy is a function policy(ctx, op, *args, **kwargs), a preset of "
            f"wrappers.policies, or a list of operators, got {type(policy).__name__}"
        )
    return _Function(policy)


def plain_function(policy: Any) -> PolicyFn:
    """What a list of operators or a function means, without objects of ours: for the compiler."""
    if isinstance(policy, (list, tuple, set, frozenset)):
        return functools.partial(_save_listed, frozenset(policy))
    return policy  # type: ignore[no-any-return]


def _save_listed(
    saved: frozenset[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    is_saved = op in saved or getattr(op, "overloadpacket", None) in saved
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


#: Lists that have been seen, by the ids of what they hold, which stands beside the policy.
_lists: dict[tuple[int, ...], tuple[tuple[Any, ...], Policy]] = {}

#: More lists than that, and they are read anew.
_MAX_LISTS = 1024


def _listed(operators: Collection[Any]) -> Policy:
    """The policy of a list; a call often brings a new list of the same operators."""
    key = tuple(map(id, operators))
    entry = _lists.get(key)
    if entry is None:
        policy = _Listed(tuple(_operators(operators)), CheckpointPolicy.MUST_SAVE)
        if len(_lists) >= _MAX_LISTS:
            _lists.clear()
        entry = _lists[key] = (tuple(operators), policy)
    return entry[1]


def _operators(listed: Iterable[Any]) -> Iterable[Any]:
    for op in listed:
        if isinstance(op, _torch.OpOverloadPacket):
            yield from _torch.operator_overloads(op)
        elif _torch.is_operator(op):
            yield op
        else:
            raise ValueError(
                f"a policy list holds operators such as torch.ops.aten.mm.default, got {op!r} of "
                f"type {type(op).__name__}"
            )


# --- Presets ------------------------------------------------------------------------------


def save_matmuls() -> Policy:
    """Keep the outputs of matrix products; recompute everything else.

    Besides its input a block keeps 8 d: the query, key and value projections (3 d), attention's
    output projection (1 d) and the first product of the feed-forward (4 d). The last product is not
    kept, as backward does not read it. What runs again are the cheap operators and attention,
    whose FLOPs are sequence length / (6 width) of the products', half of that if it is causal.
    """
    return _Listed(_matmuls(), CheckpointPolicy.MUST_SAVE)


def save_every_other_matmul() -> Policy:
    """Keep the output of every other matrix product, beginning with the first.

    Counted anew in each forward of a region. Besides its input, a block with one product for query,
    key and value keeps that (3 d) and the first product of the feed-forward (4 d), and runs the
    output projection and attention again. torchtitan's default.
    """
    return _EveryOther(_matmuls())


def save_attention() -> Policy:
    """Keep the outputs of fused attention kernels, in every variant that torch has.

    Besides its input a block keeps 1 d and the softmax statistics, and runs all matrix products
    but the last again: worth it for long sequences, where attention is most of the work. Where
    torch runs attention as separate products and a softmax (the math kernel), there is nothing to
    match.
    """
    return _Listed(_attention(), CheckpointPolicy.MUST_SAVE)


def save_compute_and_communication() -> Policy:
    """Keep matrix products, fused attention, top-k, copies to the host, functional collectives.

    What torchtitan keeps, without counting. Besides its input a block keeps 9 d and the softmax
    statistics, and runs element-wise operators and norms only. Mixtures of experts route alike,
    as top-k is not run again, and no rank communicates twice.
    """
    operators = [*_matmuls(), *_attention(), *_overloads(["topk.default"])]
    return _Listed(operators, CheckpointPolicy.MUST_SAVE) | _Collectives() | _CopyToHost()


def recompute_matmuls_of(shapes: Iterable[Sequence[int]]) -> Policy:
    """Recompute the matrix products whose second matrix has one of these shapes.

    To be combined: ``save_matmuls() | recompute_matmuls_of([(1024, 4096)])`` gives up the 4 d of a
    feed-forward's first product, of weight (4096, 1024), for a third of the forward's FLOPs.

    Args:
        shapes: Shapes of the second matrix as the product sees it: (in_features, out_features)
            for a Linear.
    """
    return _ByShape(shapes)


def offload_larger_than(num_bytes: int) -> Policy:
    """Move operators' outputs to the host where they take more than some bytes.

    Alone it moves what a block would keep without checkpointing, and recomputes the small rest;
    ``offload_larger_than(n) | save_matmuls()`` keeps matrix products on the device. Copies begin
    as soon as the operator has run, on streams of their own, as those of ``offload_wrapper``. On a
    machine without an accelerator the outputs stay where they are.

    Args:
        num_bytes: Limit in bytes; all outputs of one operator together.
    """
    return _ByBytes(num_bytes)


def recompute_all() -> Policy:
    """Keep nothing: a block keeps its input, and runs again what backward depends on."""
    return _Nothing()


def planned(
    decisions: Mapping[tuple[str, int], CheckpointPolicy],
    *,
    counts: Mapping[str, int] | None = None,
    strict: bool = False,
) -> Policy:
    """Keep or offload single calls of operators; recompute everything else.

    A call is named by its operator and its ordinal: its number, from 0, among the calls of this
    operator in one forward of the region, as :class:`Turns` counts. Collectives and choices such
    as top-k that are not named are kept, as ever. A view is never kept; leave its calls out of
    ``counts``, as autograd repeats some of them after a write in place.

    A forward that calls other operators than the plan expects has right gradients whatever it
    keeps. But it is not what the memory was planned for: so the region keeps nothing in later
    forwards, and says so once. On REPLAY that concerns the training mode in which it happened, so
    that an evaluation without dropout, with grad mode on, does not end the plan of the training; on
    NO_REENTRANT it concerns all forwards. Shapes may change as long as the calls do not. The
    compiler's graph is not compared.

    Args:
        decisions: By name, such as ``aten.mm.default``, and ordinal: MUST_SAVE or MUST_CPU_OFFLOAD.
        counts: By name: how many calls of an operator one forward has. Operators that are not in
            it have at least as many as the decisions need.
        strict: Whether such a forward raises :class:`WrapperError` instead.

    Raises:
        ValueError: A name is not that of an operator's overload, an ordinal or count is negative, a
            decision is none of the two, or a decision is about a call beyond the count.

    Example:
        >>> policy = planned({("aten.addmm.default", 0): CheckpointPolicy.MUST_SAVE})
    """
    counts = {} if counts is None else counts
    for name, ordinal in decisions:
        _check_call(name, ordinal)
        if name in counts and ordinal >= counts[name]:
            raise ValueError(
                f"the plan decides about call {ordinal} (from 0) of {name}, of which it counts "
                f"{counts[name]} calls"
            )
    for name, count in counts.items():
        _check_call(name, count)
    for (name, ordinal), answer in decisions.items():
        if answer not in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_CPU_OFFLOAD):
            raise ValueError(
                f"call {ordinal} of {name}: a plan says MUST_SAVE or MUST_CPU_OFFLOAD, got "
                f"{answer!r}. What is to be recomputed is left out."
            )
    return _Planned(decisions, counts, strict)


def _check_call(name: Any, number: Any) -> None:
    if not isinstance(name, str) or name.count(".") < 2 or ":" in name:
        raise ValueError(
            "a plan names operators with their overload, such as 'aten.mm.default', got "
            f"{name!r}: take str(operator)"
        )
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{name}: a plan counts calls from 0, got {number!r}")


class _CopyToHost(Policy):
    """Keeps copies from an accelerator to the host: to make them again waits for the device."""

    expects_match = False

    def begin(self) -> PolicyFn:
        return self._answer

    def _answer(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy | None:
        is_copy = op in _copies() and _device.is_host(ctx.op_output)
        return CheckpointPolicy.MUST_SAVE if is_copy and not _device.is_host(args[0]) else None


class _Collectives(Policy):
    """Keeps what functional collectives return."""

    is_static = True
    expects_match = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Collectives)

    def __hash__(self) -> int:
        return hash(_Collectives)

    def begin(self) -> PolicyFn:
        return self._answer

    def _answer(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy | None:
        return CheckpointPolicy.MUST_SAVE if _torch.is_collective(op) else None


def _overloads(names: Iterable[str]) -> list[Any]:
    """Operators of aten by ``name.overload``, those of them that this torch has."""
    found = []
    for name in names:
        packet, overload = name.split(".")
        if hasattr(torch.ops.aten, packet) and hasattr(getattr(torch.ops.aten, packet), overload):
            found.append(getattr(getattr(torch.ops.aten, packet), overload))
    return found


@functools.cache
def _matmuls() -> frozenset[Any]:
    names = (
        "mm.default",
        "addmm.default",
        "bmm.default",
        "baddbmm.default",
        "addbmm.default",
        "mv.default",
        "addmv.default",
        "dot.default",
        "linear.default",
        "matmul.default",
        "_scaled_mm.default",
        "_scaled_mm_v2.default",
        "_grouped_mm.default",
        "_scaled_grouped_mm.default",
        "_int_mm.default",
        "_addmm_activation.default",
    )
    return frozenset(_overloads(names))


@functools.cache
def _copies() -> frozenset[Any]:
    return frozenset(_overloads(["_to_copy.default"]))


@functools.cache
def _attention() -> frozenset[Any]:
    names = (
        "_scaled_dot_product_flash_attention.default",
        "_scaled_dot_product_flash_attention_for_cpu.default",
        "_scaled_dot_product_efficient_attention.default",
        "_scaled_dot_product_cudnn_attention.default",
        "_scaled_dot_product_attention_math_for_mps.default",
        "_scaled_dot_product_fused_attention_overrideable.default",
        "_flash_attention_forward.default",
        "_efficient_attention_forward.default",
        "_cudnn_attention_forward.default",
    )
    return frozenset(_overloads(names))
