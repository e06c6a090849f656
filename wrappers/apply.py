"""Walk a model, choose modules, wrap them or patch them in place, and report.

Problem: a model is not a tree. A module may stand in several places, may be wrapped or compiled
already, or be a mere container that nobody calls. torch's walk makes a wrapper for each parent of
a shared module, wraps only the first of its two places in one parent, and says nothing about what
it did.

Idea: three steps. Look: one pass notes every module's FQN and all places where it stands. Choose:
a predicate or a policy gives the set of modules; what must not be wrapped leaves it with a reason.
Act: one wrapper for a module, put into all its places. Wrappers share the containers of their inner
modules, so the order of wrapping does not matter.

Invariant: FQNs, in reports and in regions, are those of the unwrapped model.

Each step is linear in the number of modules.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from wrappers import _torch
from wrappers.engine.reentrant import HIDDEN_FROM_DDP
from wrappers.errors import WrapperError
from wrappers.modules.base import (
    ActivationWrapper,
    InPlaceForward,
    has_layer,
    in_place_layers,
    is_fsdp_managed,
    is_parametrized,
    plain_module,
    remove_in_place,
    require_module,
    unwrap,
    wrapper_layers,
)
from wrappers.modules.checkpoint import (
    CheckpointForward,
    CheckpointWrapper,
    checkpoint_wrapper,
    is_checkpointed,
)
from wrappers.modules.offload import OffloadForward, OffloadWrapper, is_offloaded, offload_wrapper
from wrappers.policy import CheckpointImpl
from wrappers.select import ModuleTest, as_predicate, has_forward

__all__ = ["ApplyReport", "apply_activation_checkpointing", "remove_activation_checkpointing"]

_NO_FORWARD = "a container without a forward: it is never called, wrap what it holds"
_ALREADY = "wrapped already"
_SCRIPTED = "a TorchScript module, whose forward cannot be replaced in place"
_TRANSFORMERS = "transformers' own gradient checkpointing is on"


@dataclass(frozen=True)
class ApplyReport:
    """What was wrapped and what was not.

    Attributes:
        wrapped: FQNs of the wrapped modules.
        skipped: FQNs of modules that were chosen but not wrapped, with the reason.
        plan: The :class:`~wrappers.Plan`, where a memory budget was given.
    """

    wrapped: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    plan: Any = None

    def __str__(self) -> str:
        rows = [(fqn, "wrapped") for fqn in self.wrapped]
        rows += [(fqn, f"skipped: {reason}") for fqn, reason in self.skipped.items()]
        width = max((len(fqn) for fqn, _ in rows), default=0)
        title = f"{len(self.wrapped)} wrapped, {len(self.skipped)} skipped"
        return "\n".join([title, *(f"  {fqn:<{width}}  {what}" for fqn, what in rows)])


# --- Look -----------------------------------------------------------------------------------


class _Tree:
    """A model without its wrappers: names, places, and what stands there now.

    Attributes:
        names: The first FQN of every module, in the order of ``named_modules``.
        places: Where a module stands: (parent, name in the parent).
        outer: What stands there: the module itself, a wrapper around it, its compiled form.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = plain_module(model)
        self.names: dict[nn.Module, str] = {}
        self.places: dict[nn.Module, list[tuple[nn.Module, str]]] = {self.root: []}
        self.outer: dict[nn.Module, nn.Module] = {self.root: model}
        stack = [("", self.root)]
        while stack:
            fqn, module = stack.pop()
            if module in self.names:
                continue
            self.names[module] = fqn
            stack.extend(reversed(self._note_children(fqn, module)))

    def _note_children(self, fqn: str, parent: nn.Module) -> list[tuple[str, nn.Module]]:
        prefix = f"{fqn}." if fqn else ""
        found = []
        for name, outer in parent._modules.items():
            if outer is None:
                continue
            module = plain_module(outer)
            self.places.setdefault(module, []).append((parent, name))
            self.outer.setdefault(module, outer)
            found.append((prefix + name, module))
        return found

    def children(self, module: nn.Module) -> Iterable[nn.Module]:
        """The distinct children of a module."""
        return dict.fromkeys(plain_module(m) for m in module._modules.values() if m is not None)

    def num_elements(self) -> dict[nn.Module, int]:
        """Parameter elements of each module and its submodules, each parameter counted once."""
        own = [p for m in self.names for p in m._parameters.values() if p is not None]
        is_shared = len(set(own)) < len(own) or any(len(p) > 1 for p in self.places.values())
        if is_shared:  # sums of parts would count something twice
            return {m: sum(p.numel() for p in m.parameters()) for m in self.names}
        totals = dict.fromkeys(self.names, 0)
        for module in reversed(self.names):
            parameters = module._parameters.values()
            totals[module] += sum(p.numel() for p in parameters if p is not None)
            for parent, _ in self.places[module]:
                totals[parent] += totals[module]
        return totals


# --- Choose ---------------------------------------------------------------------------------

_Chosen = dict[nn.Module, dict[str, Any]]


class _AskPolicy:
    """Asks a callable policy of FSDP from the leaves up, as torch's recursive wrapping does.

    A policy learns how many parameter elements of a module are not below a chosen module yet.
    """

    def __init__(self, policy: Callable[..., bool], tree: _Tree) -> None:
        self._policy = policy
        self._tree = tree
        self._num_elements = tree.num_elements()
        self._num_wrapped: dict[nn.Module, int] = {}
        self.chosen: _Chosen = {}
        self.visit(tree.root)

    def visit(self, module: nn.Module) -> int:
        """Decide about a module and everything below; return the number of wrapped elements."""
        if module not in self._num_wrapped:
            self._num_wrapped[module] = self._decide(module)
        return self._num_wrapped[module]

    def _decide(self, module: nn.Module) -> int:
        total = self._num_elements[module]
        if not self._policy(module=module, recurse=True, nonwrapped_numel=total):
            return 0
        wrapped = sum(self.visit(child) for child in self._tree.children(module))
        if self._policy(module=module, recurse=False, nonwrapped_numel=total - wrapped):
            self.chosen[module] = {}
            return total
        return wrapped


def _choose(tree: _Tree, check_fn: ModuleTest, policy: Any) -> _Chosen:
    """The modules to wrap, the root among them where it matches, each with its own arguments."""
    if policy is None:
        predicate = as_predicate(check_fn).bind(tree.root)
        return {module: {} for module in tree.names if predicate(module)}
    if _torch.is_wrap_policy(policy):
        found = _torch.run_wrap_policy(policy, tree.root)
        chosen = {plain_module(module): kwargs for module, kwargs in found.items()}
    elif callable(policy):
        chosen = _AskPolicy(policy, tree).chosen
    else:
        raise ValueError(
            "auto_wrap_policy must be callable or a policy object of torch.distributed.fsdp.wrap, "
            f"got {type(policy).__name__}: {policy!r:.80}"
        )
    return {module: chosen[module] for module in tree.names if module in chosen}


def _reasons(
    tree: _Tree, chosen: _Chosen, is_wrapped: Callable[[nn.Module], bool], inplace: bool
) -> dict[nn.Module, str]:
    """Why modules among the chosen ones must not be wrapped."""
    checkpointed_by_transformers = _below_gradient_checkpointing(tree)
    reasons = {}
    for module in chosen:
        if is_wrapped(tree.outer[module]):
            reasons[module] = _ALREADY
        elif module in checkpointed_by_transformers:
            reasons[module] = _TRANSFORMERS
        elif not has_forward(module):
            reasons[module] = _NO_FORWARD
        elif inplace and isinstance(module, torch.jit.ScriptModule):
            reasons[module] = _SCRIPTED
    return reasons


def _below_gradient_checkpointing(tree: _Tree) -> set[nn.Module]:
    found: set[nn.Module] = set()
    for module in tree.names:
        is_on = getattr(module, "gradient_checkpointing", False) is True
        if is_on or any(parent in found for parent, _ in tree.places[module]):
            found.add(module)
    return found


def _test_for(wrapper_fn: Callable[..., Any]) -> Callable[[nn.Module], bool]:
    """What "wrapped already" means for a wrapping function."""
    while isinstance(wrapper_fn, functools.partial):
        wrapper_fn = wrapper_fn.func
    if wrapper_fn in (checkpoint_wrapper, CheckpointWrapper):
        return is_checkpointed
    if wrapper_fn in (offload_wrapper, OffloadWrapper):
        return is_offloaded
    return _is_wrapped_somehow


def _is_wrapped_somehow(module: nn.Module) -> bool:
    return has_layer(module, (ActivationWrapper, InPlaceForward)) or _torch.is_torch_wrapper(
        unwrap(module)
    )


def _refuse_hidden_from_ddp(
    tree: _Tree, to_wrap: _Chosen, wrapper_fn: Callable[..., Any], kwargs: dict[str, Any]
) -> None:
    """Raise before anything is wrapped; where DDP comes later, the first call raises."""
    below = {
        plain_module(module)
        for ddp in tree.names
        if _torch.walks_graph_for_unused(ddp)
        for module in ddp.modules()
    }
    for module, own in to_wrap.items():
        if module not in below or not _is_reentrant(wrapper_fn, {**kwargs, **own}):
            continue
        if any(parameter.requires_grad for parameter in module.parameters()):
            fqn = tree.names[module]
            raise WrapperError(f"region `{fqn}`: {HIDDEN_FROM_DDP}", fqn=fqn)


def _is_reentrant(wrapper_fn: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    while isinstance(wrapper_fn, functools.partial):
        kwargs = {**wrapper_fn.keywords, **kwargs}
        wrapper_fn = wrapper_fn.func
    given = [kwargs.get(name) for name in ("impl", "checkpoint_impl")]
    return any(CheckpointImpl(impl) is CheckpointImpl.REENTRANT for impl in given if impl)


def find_regions(
    model: nn.Module, check_fn: ModuleTest, auto_wrap_policy: Any = None
) -> dict[str, nn.Module]:
    """The modules that :func:`apply_activation_checkpointing` would wrap, by FQN.

    Where a module and one of its submodules are chosen, only the outer one is named.
    """
    tree = _Tree(model)
    chosen = _choose(tree, check_fn, auto_wrap_policy)
    chosen.pop(tree.root, None)
    inside: set[nn.Module] = set()
    for module in chosen:
        inside.update(child for child in module.modules() if child is not module)
    return {
        tree.names[module]: module
        for module in chosen
        if module not in inside and has_forward(module)
    }


# --- Act ------------------------------------------------------------------------------------


Planner = Callable[..., ApplyReport]

_planner: Planner | None = None


def connect_planner(plan_and_apply: Planner) -> None:
    """Say who plans for a memory budget; the rooms meet here, as planning needs this one."""
    global _planner
    _planner = plan_and_apply


def _every_module(module: nn.Module) -> bool:
    return True


def apply_activation_checkpointing(
    model: nn.Module,
    checkpoint_wrapper_fn: Callable[..., Any] = checkpoint_wrapper,
    check_fn: ModuleTest = _every_module,
    auto_wrap_policy: Any = None,
    *,
    inplace: bool = False,
    impl: CheckpointImpl | None = None,
    memory_budget: int | float | str | None = None,
    sample: Any = None,
    **kwargs: Any,
) -> ApplyReport:
    """Wrap the modules of a model that a predicate or a policy chooses.

    The root is never wrapped. A module that is used in several places gets one wrapper. Where a
    module and one of its submodules are chosen, both are wrapped, as in torch: the inner region is
    then recomputed inside the outer one.

    Args:
        model: Root of the tree; changed in place.
        checkpoint_wrapper_fn: Called as ``fn(module, **kwargs)``; returns the wrapper.
        check_fn: Which modules to wrap: a predicate of :mod:`wrappers.select` or any callable.
        auto_wrap_policy: A policy of ``torch.distributed.fsdp.wrap``, a callable or an object;
            takes precedence over ``check_fn``.
        inplace: Replace the forwards of the modules instead of wrapping them.
        impl: How the regions are recomputed.
        memory_budget: Choose what each region keeps so that a step fits into this and is as fast
            as it can be: bytes, ``"12GiB"``, or ``"90%"`` of the device. See
            :func:`wrappers.make_plan`; every rank of the default process group calls this then.
            Without a ``check_fn``, regions are what the model repeats.
        sample: A batch, which planning needs: see :func:`wrappers.profile`, whose other arguments
            can be given too.
        **kwargs: Passed on to ``checkpoint_wrapper_fn``; a policy's arguments for a module win.

    Returns:
        FQNs of what was wrapped, and of what was chosen but skipped with the reason.

    Raises:
        TypeError: ``model`` is not a module, ``check_fn`` cannot be called, or an argument is
            unknown.
        ValueError: ``auto_wrap_policy`` is neither callable nor a policy object.
        WrapperError: REENTRANT regions below a DDP that looks for unused parameters.
    """
    require_module(model)
    if memory_budget is not None:
        return _plan(
            model,
            checkpoint_wrapper_fn,
            check_fn,
            auto_wrap_policy,
            inplace,
            impl,
            memory_budget,
            sample,
            kwargs,
        )
    if sample is not None:
        raise ValueError("sample is for planning: give a memory_budget with it, or leave it out")
    if inplace:
        kwargs["inplace"] = True
    if impl is not None:
        kwargs["impl"] = impl
    tree = _Tree(model)
    chosen = _choose(tree, check_fn, auto_wrap_policy)
    root_matches = chosen.pop(tree.root, None) is not None
    reasons = _reasons(tree, chosen, _test_for(checkpoint_wrapper_fn), inplace)
    to_wrap = {module: own for module, own in chosen.items() if module not in reasons}
    _refuse_hidden_from_ddp(tree, to_wrap, checkpoint_wrapper_fn, kwargs)
    for module, own in to_wrap.items():
        target = module if inplace else tree.outer[module]
        _put(tree, module, checkpoint_wrapper_fn(target, **{**kwargs, **own}))
    _warn_skipped(reasons.values())
    if to_wrap:
        _warn_cache(model)
    if not to_wrap and not {_ALREADY, _TRANSFORMERS}.intersection(reasons.values()):
        _warn_nothing_wrapped(tree, reasons, root_matches)
    return ApplyReport(
        tuple(tree.names[module] for module in to_wrap),
        {tree.names[module]: reason for module, reason in reasons.items()},
    )


def _plan(
    model: nn.Module,
    checkpoint_wrapper_fn: Callable[..., Any],
    check_fn: ModuleTest,
    policy: Any,
    inplace: bool,
    impl: CheckpointImpl | None,
    memory_budget: int | float | str,
    sample: Any,
    options: dict[str, Any],
) -> ApplyReport:
    """Wrap as a memory budget wants it."""
    is_other_impl = impl is not None and CheckpointImpl(impl) is not CheckpointImpl.REPLAY
    if checkpoint_wrapper_fn is not checkpoint_wrapper or is_other_impl or "policy" in options:
        raise ValueError(
            "a memory_budget decides what each region keeps, on CheckpointImpl.REPLAY: leave out "
            "checkpoint_wrapper_fn, impl and policy"
        )
    if sample is None:
        raise ValueError(
            "a memory_budget needs a sample: a batch as the model gets it, such as "
            "apply_activation_checkpointing(model, memory_budget=..., sample=batch)"
        )
    if policy is not None:
        check_fn = set(find_regions(model, check_fn, policy).values()).__contains__
    assert _planner is not None, "the planner is connected when the package is imported"
    chooses = None if check_fn is _every_module else check_fn
    return _planner(model, sample, memory_budget, check_fn=chooses, inplace=inplace, **options)


#: Faces that say the FQN in errors and warnings.
_NAMED = (CheckpointWrapper, CheckpointForward, OffloadWrapper, OffloadForward)


def _put(tree: _Tree, module: nn.Module, wrapper: object) -> None:
    """Put a wrapper into every place of a module and tell it the FQN."""
    if not isinstance(wrapper, nn.Module):
        raise TypeError(f"checkpoint_wrapper_fn must return a module, got {type(wrapper).__name__}")
    if wrapper is not tree.outer[module] and wrapper is not module:
        for parent, name in tree.places[module]:
            setattr(parent, name, wrapper)
    for face in (*wrapper_layers(wrapper), *in_place_layers(plain_module(wrapper))):
        if isinstance(face, _NAMED) and not face.region_fqn:
            face.region_fqn = tree.names[module]


def _warn_skipped(reasons: Iterable[str]) -> None:
    counts = Counter(reasons)
    if counts[_ALREADY]:
        warnings.warn(
            f"{counts[_ALREADY]} modules are wrapped already and were left as they are; "
            "remove_activation_checkpointing(model) removes the first wrapping",
            stacklevel=3,
        )
    if counts[_TRANSFORMERS]:
        warnings.warn(
            f"{counts[_TRANSFORMERS]} modules were left as they are because {_TRANSFORMERS}: they "
            "would be recomputed twice. Call model.gradient_checkpointing_disable() before.",
            stacklevel=3,
        )


def _warn_cache(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    is_on = getattr(config, "use_cache", False) is True
    if is_on and hasattr(model, "gradient_checkpointing_enable"):  # a transformers model
        warnings.warn(
            "model.config.use_cache is on: in training every layer then writes to a cache of keys "
            "and values, and would do so again in its recompute, which gives an error or wrong "
            "gradients. Set model.config.use_cache = False",
            stacklevel=3,
        )


def _warn_nothing_wrapped(tree: _Tree, reasons: dict[nn.Module, str], root_matches: bool) -> None:
    if reasons:
        why = f"all {len(reasons)} chosen modules are containers without a forward"
    elif root_matches:
        why = (
            f"only the root matched ({type(tree.root).__name__}), which is never wrapped here: "
            "use checkpoint_wrapper(model)"
        )
    else:
        why = "no module matched"
    counts = Counter(type(module).__name__ for module in tree.names)
    classes = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
    warnings.warn(f"nothing was wrapped: {why}. Classes in the model: {classes}", stacklevel=3)


def remove_activation_checkpointing(model: nn.Module) -> int:
    """Undo :func:`apply_activation_checkpointing`, and all other wrapping by this package.

    Replaces wrappers by their inner modules, and gives back the forwards that were replaced in
    place. Hooks that were registered on a wrapper go with it. A root that is itself a wrapper
    stays one: use ``unwrap(model)``.

    Args:
        model: Root of the tree; changed in place.

    Returns:
        The number of regions removed, two for a module that was wrapped twice.

    Raises:
        TypeError: ``model`` is not a module.
        WrapperError: FSDP manages a wrapper or it has a parametrization: removing it would cut off
            its parameters.
    """
    require_module(model)
    tree = _Tree(model)
    wrapped = {m: list(wrapper_layers(tree.outer[m])) for m in tree.names if m is not tree.root}
    for module, layers in wrapped.items():
        if any(is_fsdp_managed(layer) for layer in layers):
            fqn = tree.names[module]
            raise WrapperError(
                f"region `{fqn}`: fully_shard was applied to its wrapper, which holds the sharded "
                "parameters. Remove activation checkpointing before sharding, or apply it with "
                "inplace=True, which can be removed at any time.",
                fqn=fqn,
            )
        if any(map(is_parametrized, layers)):
            fqn = tree.names[module]
            raise WrapperError(
                f"region `{fqn}`: a parametrization was registered on its wrapper. Call "
                "torch.nn.utils.parametrize.remove_parametrizations before, or register it on the "
                "module before wrapping.",
                fqn=fqn,
            )
    num_removed = 0
    for module in tree.names:
        layers = wrapped.get(module, [])
        for parent, name in tree.places[module] if layers else ():
            setattr(parent, name, unwrap(tree.outer[module]))
        faces = (module, *layers)
        num_removed += len(layers) + sum(remove_in_place(face) for face in faces)
    return num_removed
