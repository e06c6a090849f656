"""Activation checkpointing of a transformers model's blocks, in place of its own.

Problem: a model of transformers knows its blocks and has a checkpointing of its own, which must
not act on top of ours. Its blocks do three things that a plain region does not survive:

* they write keys and values to a cache that is handed from block to block, and a rerun would write
  them a second time (doubled keys, and gradients that are wrong without an error);
* tensors leave a block beside its return value: hooks record what the caller has asked for (router
  logits, attentions), and some blocks share their keys in a mapping (Gemma 3n). Under REENTRANT a
  block runs without a graph, so gradients through these would be lost: it is refused;
* ``Trainer`` may switch transformers' checkpointing on, or let accelerate's FSDP plugin put torch's
  wrapper around the blocks, after we have wrapped.

Idea: :func:`enable` wraps the blocks (not their children, with random state) as regions of a kind
that looks at its arguments first, and puts a forward pre-hook on every block, wrapped or not.

                       block called with grad mode
                                  │
    pre-hook    other checkpointing on?    ──yes──> error
                empty cache, in training?  ──yes──> goes on without the cache, a warning
                                  │
    region      a cache to write to?       ──yes──> plain call, nothing is recomputed
                                  │ no
                               region

Invariant: a region never runs with a cache that it writes to, so no recompute touches one. Without
grad mode (``generate``) the blocks are the plain model's. The config is not changed.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import nn

from wrappers.apply import (
    ApplyReport,
    apply_activation_checkpointing,
    remove_activation_checkpointing,
)
from wrappers.errors import WrapperError
from wrappers.integrations._blocks import no_split_names
from wrappers.modules.base import (
    ActivationWrapper,
    InPlaceForward,
    has_layer,
    plain_module,
    require_module,
)
from wrappers.modules.checkpoint import CheckpointForward, CheckpointWrapper, is_torch_checkpoint
from wrappers.modules.offload import offload_wrapper
from wrappers.plan import ranks
from wrappers.plan.api import make_plan, profile
from wrappers.plan.menu import policy_of
from wrappers.plan.plan import Plan
from wrappers.policy import CheckpointImpl
from wrappers.select import ModuleTest, as_predicate, every_nth, plain_modules

try:
    from transformers.cache_utils import Cache
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError as error:
    raise ImportError(
        "wrappers.integrations.transformers needs transformers with GradientCheckpointingLayer "
        "(4.53 or newer): pip install -U 'activation-wrappers[transformers]'"
    ) from error

_collector: Any
try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:  # versions in which blocks return all that is asked for
    _collector = None

masking_utils: Any
try:
    from transformers import masking_utils
except ImportError:  # versions in which each model makes its own masks
    masking_utils = None

__all__ = ["disable", "enable"]


def enable(
    model: nn.Module,
    *,
    policy: Any = None,
    impl: CheckpointImpl | None = None,
    inplace: bool = True,
    every: int = 1,
    check_fn: ModuleTest | None = None,
    offload: bool | Mapping[str, Any] = False,
    memory_budget: int | float | str | None = None,
    sample: Any = None,
    **settings: Any,
) -> ApplyReport:
    """Checkpoint the blocks of a transformers model: decoder, encoder and vision layers.

    Works on the model, on a ``PeftModel`` around it, or on any module that contains one; before or
    after ``get_peft_model``, and before ``Trainer``. Frozen parameters and inputs need no
    ``enable_input_require_grads``. If transformers' own gradient checkpointing is on, it is
    switched off with a warning.

    In training the cache of keys and values stays empty; training with a cache that is filled
    already (prefix tuning) works, but is not checkpointed. Each of the two is said once. A block
    that REENTRANT would make lose gradients (router logits, shared keys) raises when it is called.
    In an encoder-decoder model REENTRANT adds up the gradient of the encoder's output in another
    order than the plain model.

    Args:
        model: Changed in place.
        policy: Which operators' outputs the blocks keep: see :mod:`wrappers.policies`.
        impl: How the blocks are recomputed; REPLAY with a policy and NO_REENTRANT without, if None.
        inplace: Replace the blocks' forwards instead of wrapping them: modules, classes and hooks
            stay as they are.
        every: Checkpoint every n-th block.
        check_fn: Which of the blocks, as for :func:`~wrappers.apply_activation_checkpointing`;
            ``every`` counts those that are left.
        offload: True, or the arguments of :func:`~wrappers.offload_wrapper`. Alone it replaces the
            recompute: activations wait on the host or disk. With ``impl``, ``policy`` or other
            settings too, the blocks are recomputed and what they keep goes there.
        **settings: Of the regions, such as ``verify`` or ``determinism_check``.

    Returns:
        FQNs of the blocks that were wrapped, and of those that were wrapped before.

    Raises:
        TypeError: ``model`` is not a module, or a setting is unknown.
        ValueError: Settings contradict each other.
        InfeasibleBudgetError: Nothing fits into the budget; the model is as it was.
        WrapperError: No blocks were found, or a budget is given and blocks are wrapped already.
    """
    require_module(model)
    is_other_impl = impl not in (None, CheckpointImpl.REPLAY)
    if memory_budget is not None and (is_other_impl or offload or policy is not None):
        raise ValueError(
            "a memory_budget decides what each block keeps, on CheckpointImpl.REPLAY: leave out "
            "impl, policy and offload"
        )
    if (memory_budget is None) is not (sample is None):
        raise ValueError(
            "a memory_budget and a sample belong together: a batch as the model gets it, such as "
            "enable(model, memory_budget=..., sample=batch)"
        )
    blocks = _find_blocks(model)
    _switch_off_gradient_checkpointing(model)
    chosen: ModuleTest = every_nth(every, as_predicate(blocks.__contains__) & (check_fn or _any))
    if memory_budget is not None:
        return _enable_planned(model, blocks, chosen, memory_budget, sample, inplace, settings)
    recompute = {"impl": impl, "policy": policy, **settings}
    is_offload_alone = bool(offload) and not settings and impl is None and policy is None
    wrap = partial(
        _wrap_block,
        recompute=None if is_offload_alone else recompute,
        offload=dict(offload) if isinstance(offload, Mapping) else {} if offload else None,
    )
    with warnings.catch_warnings():
        # The guard sees to the cache.
        warnings.filterwarnings("ignore", message=r"model\.config\.use_cache is on")
        report = apply_activation_checkpointing(model, wrap, chosen, inplace=inplace)
    _guard(model, blocks)
    return report


def disable(model: nn.Module) -> int:
    """Undo :func:`enable`, and all other wrapping by this package.

    Args:
        model: Changed in place.

    Returns:
        The number of regions removed.

    Raises:
        TypeError: ``model`` is not a module.
        WrapperError: As for :func:`~wrappers.remove_activation_checkpointing`.
    """
    num_removed = remove_activation_checkpointing(model)
    _remove_guards(model)
    return num_removed


def _remove_guards(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Guard):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


# --- Which modules are blocks -----------------------------------------------------------------


def _any(module: nn.Module) -> bool:
    return True


def _find_blocks(model: nn.Module) -> dict[nn.Module, str]:
    """The blocks with their FQNs: what transformers itself would checkpoint.

    Of nested ones (the stages of Swin and their layers) the inner ones. Models whose code is older
    name the classes of their blocks for the placement on devices, beside those of embeddings and
    the like, which do not stand in a list.
    """
    modules = dict(plain_modules(model))
    found = {fqn: m for fqn, m in modules.items() if fqn and _is_block(m)}
    if not found:
        names = no_split_names(model)
        repeated = (nn.ModuleList, nn.Sequential)
        found = {
            fqn: module
            for fqn, module in modules.items()
            if type(module).__name__ in names
            and isinstance(modules[fqn.rpartition(".")[0]], repeated)
        }
    innermost = {
        module: fqn
        for fqn, module in found.items()
        if not any(other.startswith(f"{fqn}.") for other in found)
    }
    if not innermost:
        raise WrapperError(
            f"no blocks found in a {type(model).__name__}: none of its modules is a "
            "GradientCheckpointingLayer of transformers, and none that stands in a ModuleList is "
            "of a class in _no_split_modules. Name the blocks yourself: "
            "apply_activation_checkpointing(model, check_fn=by_class(...))."
        )
    return innermost


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def _switch_off_gradient_checkpointing(model: nn.Module) -> None:
    """Turn the flags off that transformers' ``gradient_checkpointing_enable`` has set.

    Not by ``gradient_checkpointing_disable``, which newer versions have under another name.
    """
    flagged: list[Any] = [module for module in model.modules() if _is_flagged(module)]
    for module in flagged:
        module.gradient_checkpointing = False
    if flagged:
        warnings.warn(
            "transformers' own gradient checkpointing was on and has been switched off: the blocks "
            "would be recomputed twice. Do not set it in the TrainingArguments either.",
            stacklevel=3,
        )


def _is_flagged(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True


# --- A region that stays away from caches -----------------------------------------------------


def _writes_cache(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call gives a block a cache of keys and values that the block adds to."""
    if getattr(block, "_can_checkpoint_with_cache", False):  # transformers: it only reads
        return False
    return any(isinstance(value, Cache) for value in (*args, *kwargs.values()))


def _num_stored(kwargs: dict[str, Any]) -> dict[str, int]:
    """How much there is where a block can store tensors beside what it returns.

    Transformers' hooks append to lists while the model that is being called collects outputs. A
    dict among the arguments is the caller's.
    """
    collected = _collector.get() or {} if _collector is not None else {}
    places = (*collected.items(), *kwargs.items())
    return {name: len(value) for name, value in places if isinstance(value, (list, dict))}


def _is_shared(value: object) -> bool:
    """Whether an argument is a mapping of transformers in which blocks find each other's keys."""
    return isinstance(value, MutableMapping) and not isinstance(value, dict)


class _Block:
    """A region of a transformers block; mixed into the faces of a checkpointed module."""

    checkpoint_impl: CheckpointImpl
    region_fqn: str

    def _run_region(
        self, function: Callable[..., Any], args: Any, kwargs: Any, owner: nn.Module | None = None
    ) -> Any:
        run_region = super()._run_region  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return run_region(function, args, kwargs, owner)
        if _writes_cache(function if owner is None else owner, args, kwargs):
            return function(*args, **kwargs)
        if self.checkpoint_impl is not CheckpointImpl.REENTRANT:
            return run_region(function, args, kwargs, owner)
        if shared := [name for name, value in kwargs.items() if _is_shared(value)]:
            self._refuse_reentrant(f"blocks find each other's tensors in `{shared[0]}`")
        before = _num_stored(kwargs)
        out = run_region(function, args, kwargs, owner)
        after = _num_stored(kwargs)
        if stored := [name for name in after if after[name] != before[name]]:
            self._refuse_reentrant(f"the block has stored tensors in `{stored[0]}`")
        return out

    def _refuse_reentrant(self, what: str) -> None:
        raise WrapperError(
            f"region `{self.region_fqn}`: {what}, and REENTRANT runs the block without a graph, so "
            "gradients through them would be lost. Use impl=CheckpointImpl.NO_REENTRANT or REPLAY, "
            "or do not ask for them.",
            fqn=self.region_fqn,
        )


class BlockWrapper(_Block, CheckpointWrapper):
    """A transformers block whose activations are recomputed."""


class BlockForward(_Block, CheckpointForward):
    """The forward of a transformers block that is checkpointed in place."""


def _wrap_block(
    block: nn.Module,
    *,
    recompute: dict[str, Any] | None,
    offload: dict[str, Any] | None,
    inplace: bool = False,
) -> nn.Module:
    if recompute is not None and inplace:
        BlockForward(block, **recompute).install()
    elif recompute is not None:
        block = BlockWrapper(block, **recompute)
    return block if offload is None else offload_wrapper(block, inplace=inplace, **offload)


# --- A memory budget --------------------------------------------------------------------------


def _enable_planned(
    model: nn.Module,
    blocks: Mapping[nn.Module, str],
    chosen: ModuleTest,
    memory_budget: int | float | str,
    sample: Any,
    inplace: bool,
    settings: dict[str, Any],
) -> ApplyReport:
    """Wrap the blocks as a plan wants it.

    The guard comes first: the copies of the model that planning runs have it too, and so blocks
    without a cache, as in training.
    """
    modules = dict(plain_modules(model))
    for fqn in blocks.values():
        parent, _, name = fqn.rpartition(".")
        face: Any = modules[parent]._modules[name]
        if has_layer(face, (ActivationWrapper, InPlaceForward)):
            raise WrapperError(
                f"block `{fqn}` is wrapped already, and a plan is for a model without activation "
                "checkpointing: call disable(model) before.",
                fqn=fqn,
            )
    _guard(model, blocks)
    try:
        made = _plan(model, chosen, memory_budget, sample, **settings)
    except BaseException:
        _remove_guards(model)
        raise
    planned = {region.fqn: region for region in made.regions if region.is_wrapped}

    def wrap(block: nn.Module, *, inplace: bool = False) -> nn.Module:
        region = planned[blocks[plain_module(block)]]
        policy = policy_of(region.decisions or (), region.counts)
        recompute = {"impl": CheckpointImpl.REPLAY, "policy": policy, "verify": "never"}
        return _wrap_block(block, recompute=recompute, offload=None, inplace=inplace)

    report = ApplyReport()
    if planned:
        targets = {block for block, fqn in blocks.items() if fqn in planned}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"model\.config\.use_cache is on")
            report = apply_activation_checkpointing(
                model, wrap, targets.__contains__, inplace=inplace
            )
    left = {r.fqn: "the plan leaves it alone" for r in made.regions if not r.is_wrapped}
    return ApplyReport(report.wrapped, {**report.skipped, **left}, made)


def _plan(
    model: nn.Module,
    chosen: ModuleTest,
    memory_budget: int | float | str,
    sample: Any,
    *,
    count: str = "all",
    **settings: Any,
) -> Plan:
    with warnings.catch_warnings(), _causal_masks_left_out(sample) as sample:
        # Training will say it.
        warnings.filterwarnings("ignore", message="the model is in training and use_cache is on")
        return ranks.plan_together(
            lambda: profile(model, sample, check_fn=chosen, **settings),
            lambda found: make_plan(found, memory_budget, count=count),
        )


@contextlib.contextmanager
def _causal_masks_left_out(sample: Any) -> Iterator[Any]:
    """Let transformers leave masks out of attention where it does so for the sample.

    It looks at values to see that nothing is padded or packed, and then attention without a mask
    runs on another kernel. Tensors without memory have no values, so it would make the mask.

    Yields:
        The sample to plan with.
    """
    calls = [dict(one) if isinstance(one, Mapping) else one for one in _samples(sample)]
    for call in calls:
        padding = call.get("attention_mask") if isinstance(call, dict) else None
        if isinstance(padding, torch.Tensor) and padding.dim() == 2 and bool(padding.all()):
            del call["attention_mask"]
    before = getattr(masking_utils, "find_packed_sequence_indices", None)
    if before is None or any("position_ids" in call for call in calls if isinstance(call, dict)):
        yield calls
        return
    masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        yield calls
    finally:
        masking_utils.find_packed_sequence_indices = before


def _samples(sample: Any) -> list[Any]:
    return sample if isinstance(sample, list) else [sample]


# --- The guard --------------------------------------------------------------------------------


def _guard(model: nn.Module, blocks: Mapping[nn.Module, str]) -> None:
    """Give every block the pre-hook, unless it has one.

    Those that are not wrapped too: a cache must not be filled by some of the blocks.
    """
    guard = _Guard(tuple(_flagged_parents(model, blocks)))
    modules = dict(plain_modules(model))
    for block, fqn in blocks.items():
        parent, _, name = fqn.rpartition(".")
        # The wrapper, so that the hook stands outside the region. ``modules()`` does not yield a
        # wrapper around what FSDP manages.
        face: Any = modules[parent]._modules[name]
        hooks = (*face._forward_pre_hooks.values(), *block._forward_pre_hooks.values())
        if not any(isinstance(hook, _Guard) for hook in hooks):
            face.register_forward_pre_hook(guard, with_kwargs=True)


def _flagged_parents(model: nn.Module, blocks: Mapping[nn.Module, str]) -> Iterator[nn.Module]:
    """The modules around blocks that have a flag for transformers' gradient checkpointing."""
    for fqn, module in plain_modules(model):
        prefix = f"{fqn}." if fqn else ""
        is_parent = any(name.startswith(prefix) and name != fqn for name in blocks.values())
        if is_parent and hasattr(module, "gradient_checkpointing"):
            yield module


class _Guard:
    """Forward pre-hook of all blocks of a model: see the module's docstring.

    Args:
        parents: The modules around blocks where transformers' gradient checkpointing may be on.
    """

    def __init__(self, parents: tuple[nn.Module, ...]) -> None:
        self._parents = parents
        self._has_looked = False
        self._said: set[str] = set()

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Look at a call of a block before the region does."""
        if not torch.is_grad_enabled():
            return None
        if block.training and any(map(_is_flagged, (block, *self._parents))):
            self._refuse(
                _fqn_of(block) or type(block).__name__,
                "transformers' own gradient checkpointing was switched on",
                "activation_checkpointing (gradient_checkpointing) out of the TrainingArguments, "
                "or call disable(model) to leave it to transformers",
            )
        if not self._has_looked and not torch.compiler.is_compiling():
            self._look_around()
        if not _writes_cache(block, args, kwargs):
            return None
        if not block.training or not _is_empty((*args, *kwargs.values())):
            self._warn(
                "blocks are called with grad mode and a cache of keys and values, which a "
                "recompute would fill again: such calls are not checkpointed. If you want no "
                "gradients, use torch.no_grad(); if no cache, pass use_cache=False."
            )
            return None
        self._warn(
            "the model is in training and use_cache is on: the cache of keys and values stays "
            "empty, as a recompute would fill it again. Pass use_cache=False, or set "
            "config.use_cache = False for the model (and for the decoder where it has its own)."
        )
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        kwargs = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return args, kwargs

    def _look_around(self) -> None:
        """Raise in the first calls if torch's wrapper has come around a region."""
        for module in itertools.chain.from_iterable(p.modules() for p in self._parents):
            if is_torch_checkpoint(module) and has_layer(module, _Block):
                self._refuse(
                    _fqn_of(plain_module(module)) or _fqn_of(module),
                    "torch's checkpoint_wrapper was put around it",
                    "activation_checkpointing out of fsdp_config in the TrainingArguments, or "
                    "fsdp_activation_checkpointing out of accelerate's config file",
                )
        self._has_looked = True

    def _refuse(self, fqn: str, what: str, remedy: str) -> None:
        raise WrapperError(
            f"block `{fqn}`: {what} after wrappers.integrations.transformers.enable(model), and "
            f"the block would be recomputed twice. Take {remedy}.",
            fqn=fqn,
        )

    def _warn(self, text: str) -> None:
        if text not in self._said and not torch.compiler.is_compiling():
            self._said.add(text)
            warnings.warn(text, stacklevel=2)


def _fqn_of(face: Any) -> str:
    """The name of a block's region; empty where it has none."""
    return getattr(face, "region_fqn", "") or getattr(face.forward, "region_fqn", "")


def _is_empty(values: tuple[Any, ...]) -> bool:
    return all(value.get_seq_length() == 0 for value in values if isinstance(value, Cache))
