"""The functions that users call: drop-ins for ``torch.utils.checkpoint``, and the entry for
everything that wraps modules (:func:`run_region`).
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wrappers import _torch
from wrappers.engine.frame import WHOLE_CALLS, Function, without_partials
from wrappers.engine.reentrant import run_reentrant
from wrappers.engine.region import Region, noop_context_fn
from wrappers.engine.replay import run_replay
from wrappers.engine.rerun import run_no_reentrant
from wrappers.engine.selective import ContextFn, compiler_context_fn, for_compiler
from wrappers.policies import Policy, as_policy
from wrappers.policy import CheckpointImpl


def run_region(
    region: Region,
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owner: nn.Module | None = None,
) -> Any:
    """Run ``function(*args, **kwargs)`` as a region; without grad mode just run it.

    Args:
        region: Settings, made once and used for every call.
        function: What the region runs.
        args: Positional arguments.
        kwargs: Keyword arguments.
        owner: The module whose modes, buffers and parameters the function uses. Found out by
            itself where the function is a module or a module's bound method.

    Returns:
        What the function returns.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if _torch.is_functorch_active():
        raise RuntimeError(
            f"region `{region.fqn}`: activation checkpointing inside a torch.func transform (grad, "
            "vjp, vmap, jvp, ...) is not possible, since the transform has its own saved tensors. "
            "Put the region around the transform, or use torch.autograd.grad in place of it."
        )
    impl = region.impl  # By identity: hashing a member of an enum runs Python code.
    if impl is CheckpointImpl.REPLAY:
        return run_replay(region, function, args, kwargs, owner)
    run = run_reentrant if impl is CheckpointImpl.REENTRANT else run_no_reentrant
    return run(region, function, args, kwargs, owner)


def run_compiled(
    region: Region, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Hand a region to ``torch.utils.checkpoint``, which torch.compile knows and traces.

    The compiler recomputes by itself: it ignores the determinism check and ``debug``, and
    always preserves random states.
    """
    return _call_torch(
        region.context_fn,
        region.policy,
        region.allow_cache_entry_mutation,
        function,
        args,
        kwargs,
    )


def _call_torch(
    context_fn: ContextFn,
    policy: Any,
    allow_mutation: bool,
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    options: dict[str, Any] = {}
    if policy is not None:
        options["context_fn"] = compiler_context_fn(policy, allow_mutation)
    elif context_fn is not noop_context_fn:
        options["context_fn"] = for_compiler(context_fn)
    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, **options, **kwargs
    )


def checkpoint(
    function: Function,
    *args: Any,
    use_reentrant: bool | None = None,
    impl: CheckpointImpl | None = None,
    context_fn: ContextFn = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    preserve_rng_state: bool = True,
    policy: Any = None,
    verify: str = "first",
    allow_cache_entry_mutation: bool = False,
    **kwargs: Any,
) -> Any:
    """Run a function as a region: drop its activations, recompute them in backward.

    Takes what ``torch.utils.checkpoint.checkpoint`` takes. Differences: without
    ``use_reentrant`` and ``impl`` it uses NO_REENTRANT and does not warn; REENTRANT takes
    keyword arguments and tensors in containers, and gives parameters their gradients also
    where no input requires grad.

    Args:
        function: What to run. If it is a module or a bound method of one, the recompute also
            finds the module's modes, buffers and parameters as the forward found them.
        *args: Its positional arguments. Tensors may sit in tuples, lists, dicts, dataclasses.
        use_reentrant: True is ``impl=CheckpointImpl.REENTRANT``, False NO_REENTRANT.
        impl: How to recompute; see :class:`CheckpointImpl`.
        context_fn: Returns two context managers, around forward and around the recompute; see
            :func:`create_selective_checkpoint_contexts`.
        determinism_check: ``"default"`` compares shape, dtype, device and version of each
            recomputed tensor with the forward's, ``"values"`` also a sample of its elements,
            ``"none"`` nothing.
        debug: Record the operators of both runs; an error shows the first that differs.
        early_stop: End the recompute with the last saved tensor that is needed. Overridden by
            :func:`set_checkpoint_early_stop`.
        preserve_rng_state: Let random operators give the same numbers in the recompute, on
            every device in use. REPLAY always does.
        policy: Which operators' outputs are kept or moved to the host instead of being recomputed:
            a list of operators, a function ``(ctx, op, *args, **kwargs)``, or a preset of
            :mod:`wrappers.policies`. The default ``impl`` is REPLAY then.
        verify: When REPLAY compares its tensors with a rerun's: ``"first"`` (its first time for
            this function), ``"always"``, ``"never"``.
        allow_cache_entry_mutation: Whether what the policy keeps may be changed in place before
            backward; it then sees the change.
        **kwargs: Keyword arguments of the function.

    Returns:
        What the function returns.

    Raises:
        TypeError: ``function`` cannot be called, or ``policy`` is none.
        ValueError: An option is unknown, or two contradict each other.
        CheckpointError: In backward: the recompute differs from the forward, or an input or
            parameter was changed in place.
    """
    if not callable(function):
        raise TypeError(f"checkpoint needs a callable, got {type(function).__name__}")
    if torch.compiler.is_compiling():  # Before anything that the compiler cannot trace.
        return _call_torch(context_fn, policy, allow_cache_entry_mutation, function, args, kwargs)
    if policy is not None:
        policy = as_policy(policy)
    region = _region_for(
        function,
        use_reentrant,
        impl,
        policy,
        preserve_rng_state,
        determinism_check,
        debug,
        early_stop,
        verify,
        allow_cache_entry_mutation,
    )
    if context_fn is not noop_context_fn:
        region = region.changed(context_fn=context_fn)
    elif region.policy is not policy and region.policy != policy:
        region = region.changed(policy=policy)
    return run_region(region, function, args, kwargs)


#: Regions of functions, by the identity of their code and by the options. The code is referred to
#: weakly: a class that a function defines would keep what its methods close over.
_regions: dict[tuple[Any, ...], tuple[weakref.ref[Any], Region]] = {}

#: What else tells regions of one function apart.
_OPTIONS = (
    "preserve_rng_state",
    "determinism_check",
    "debug",
    "early_stop",
    "verify",
    "allow_cache_entry_mutation",
)

#: More functions than that, and the regions are made anew.
_MAX_REGIONS = 4096


def _region_for(
    function: Function,
    use_reentrant: bool | None,
    impl: CheckpointImpl | None,
    policy: Policy | None,
    *options: Any,
) -> Region:
    """The region of a function that is called with these options.

    It is the same for all calls, so that what earlier calls have shown is remembered. A
    closure is made anew for every call; what identifies it is its code.
    """
    code = _code_of(function)
    is_replay = impl is CheckpointImpl.REPLAY or (policy is not None and impl is None)
    if is_replay and not (type(function) is types.FunctionType and not function.__closure__):
        # What one module's calls have shown is not true of another's.
        modules = _modules_of(function)
        if modules:
            code = modules[0]
            options = (*options, *map(id, modules))
    # By id, as hashing a code object is slow.
    is_key = policy is None or policy.is_static or policy.is_counting
    kind = policy if is_key else type(policy)
    key = (id(code), use_reentrant, impl, kind, *options)
    entry = _regions.get(key)
    if entry is None or entry[0]() is not code:
        region = Region(
            impl=choose_impl(use_reentrant, impl, policy),
            policy=policy,
            fqn=_name_of(function),
            **dict(zip(_OPTIONS, options, strict=False)),
        )
        if len(_regions) >= _MAX_REGIONS:
            _regions.clear()
        entry = _regions[key] = (weakref.ref(code), region)
    return entry[1]


def _code_of(function: Any) -> Any:
    """The code that a call runs, as far as it can be told: a code object, a class, a builtin."""
    function = without_partials(function)
    if _is_whole_call(function):
        return type(function.__self__)
    code = getattr(function, "__code__", None)  # a bound method has its function's
    if code is not None:
        return code
    return function if isinstance(function, types.BuiltinFunctionType) else type(function)


def _modules_of(function: Any) -> list[nn.Module]:
    """The modules that a function runs, as far as that shows: itself, bound to it, closed over."""
    found: list[nn.Module] = []
    while isinstance(function, functools.partial):
        found += [v for v in (*function.args, *function.keywords.values()) if _is_module(v)]
        function = function.func
    if type(function) is nn.Sequential and len(function):
        return [*function, *found]  # checkpoint_sequential makes one for each call.
    if isinstance(function, nn.Module):
        return [function, *found]
    bound_to = getattr(function, "__self__", None)
    if isinstance(bound_to, nn.Module):
        return [bound_to, *found]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            if _is_module(cell.cell_contents):
                found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return found


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _is_whole_call(function: Any) -> bool:
    """Whether a function is a bound method that calls a module: all modules share the code."""
    return (
        type(function) is types.MethodType
        and isinstance(function.__self__, nn.Module)
        and getattr(function, "__name__", "") in WHOLE_CALLS
    )


def _name_of(function: Any) -> str:
    """The FQN of a region that nobody has named: what is called, without partials."""
    function = without_partials(function)
    if _is_whole_call(function):
        return type(function.__self__).__name__
    name: str = getattr(function, "__qualname__", type(function).__name__)
    return name


def choose_impl(
    use_reentrant: bool | None, impl: CheckpointImpl | None, policy: Any = None
) -> CheckpointImpl:
    """Combine torch's option and ours; with a policy, REPLAY is the default.

    Raises:
        ValueError: They contradict each other.
    """
    if use_reentrant is None:
        return default_impl(policy) if impl is None else CheckpointImpl(impl)
    meant = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    if impl is not None and CheckpointImpl(impl) is not meant:
        raise ValueError(
            f"use_reentrant={use_reentrant} means {meant.name}, but impl={impl.name} was given "
            "too. Give one of the two."
        )
    return meant


def default_impl(policy: Any) -> CheckpointImpl:
    """The implementation of a region for which none was chosen."""
    return CheckpointImpl.NO_REENTRANT if policy is None else CheckpointImpl.REPLAY


def checkpoint_sequential(
    functions: nn.Sequential | list[Callable[[Any], Any]],
    segments: int,
    input: Any,
    use_reentrant: bool | None = None,
    **options: Any,
) -> Any:
    """Run functions one after another, in segments that are regions.

    The last segment is not one: its backward comes first.

    Args:
        functions: A ``Sequential``, or functions of one argument.
        segments: How many segments to make.
        input: What the first function gets.
        use_reentrant: As for :func:`checkpoint`.
        **options: Other options of :func:`checkpoint`; no arguments for the functions.

    Returns:
        What the last function returns.

    Raises:
        ValueError: Fewer functions than segments, no segment, or an unknown option.
    """
    known = ("impl", "context_fn", "policy", *_OPTIONS)
    if unknown := options.keys() - set(known):
        raise ValueError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
    steps = list(functions)
    if not 1 <= segments <= len(steps):
        raise ValueError(f"segments must be between 1 and {len(steps)}, got {segments}")
    size = len(steps) // segments
    for start in range(0, size * (segments - 1), size):
        run = _chain(steps[start : start + size])
        input = checkpoint(run, input, use_reentrant=use_reentrant, **options)
    return _chain(steps[size * (segments - 1) :])(input)


def _chain(steps: list[Any]) -> Function:
    """One function that calls several; a module if they are, so that it has their state."""
    if all(isinstance(step, nn.Module) for step in steps):
        return nn.Sequential(*steps)
    return functools.partial(functools.reduce, lambda value, step: step(value), steps)


class GraphExecGroup:
    """Backward calls in this context recompute each region at most once, all together.

    For a loss that is differentiated in parts. The calls must not need the same saved tensor:
    they run over parts of the graph that do not overlap, also with ``retain_graph=True``.
    Affects NO_REENTRANT regions. torch's own class of this name works too.

    Raises:
        RuntimeError: On entering a group inside another one.
    """

    def __enter__(self) -> GraphExecGroup:
        active = _torch.get_graph_exec_group()
        if active is not None:
            raise RuntimeError(
                f"GraphExecGroup contexts cannot be nested; {active} is active. Leave it first."
            )
        _torch.set_graph_exec_group(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        _torch.set_graph_exec_group(None)
