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
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from wrappers import _device, _torch
from wrappers.policy import CheckpointPolicy, SelectiveCheckpointContext, policy_from_bool

__all__ = [
    "Policy",
    "as_policy",
    "offload_larger_than",
    "recompute_all",
    "recompute_matmuls_of",
    "save_attention",
    "save_compute_and_communication",
    "save_every_other_matmul",
    "save_matmuls",
]

PolicyFn = Callable[..., Any]


class Policy:
    """An opinion about the operators of a region; ``a | b`` combines two.

    It can be called like a policy function and given to ``torch.utils.checkpoint`` as one. A
    policy that counts does so per forward: give torch ``policy.start()`` then.
    """

    #: Whether every call of an operator gets the same answer.
    is_static = False

    #: Whether a region in which it keeps nothing deserves a warning.
    expects_match = True

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


class _EveryOther(Policy):
    """Keeps the first, third, fifth, ... call among some operators."""

    def __init__(self, operators: Collection[Any]) -> None:
        super().__init__()
        self.operators = frozenset(operators)

    def __reduce__(self) -> Any:
        return _every_other_again, (sorted(op.name() for op in self.operators),)

    def begin(self) -> PolicyFn:
        # Before torch 2.13 its own contexts ask in the recompute too.
        num_calls = {False: 0, True: 0}

        def answer(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy | None:
            if op not in self.operators:
                return None
            num_calls[ctx.is_recompute] += 1
            is_odd = num_calls[ctx.is_recompute] % 2 == 1
            return CheckpointPolicy.MUST_SAVE if is_odd else CheckpointPolicy.MUST_RECOMPUTE

        return answer


def _every_other_again(names: list[str]) -> _EveryOther:
    return _EveryOther([_torch.operator_named(name) for name in names])


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
