"""accelerate: activation checkpointing of a model's blocks, one line before ``prepare``.

    enable(accelerator, model, check_fn=by_class(Block))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Problem: only accelerate's FSDP plugins checkpoint (``activation_checkpointing=True``), with torch's
wrapper. Under FSDP2 it does not restore the random state, so with dropout the gradients are those
of other masks than forward's, without a word (accelerate 1.15, ``fsdp2_apply_ac``), and its name
stands in all parameter names. DDP and a single process have nothing. A wrapper that the caller puts
around a block hides the block's class from the plugin, which looks for it by name.

Idea: replace the forwards of the blocks in place before ``prepare``. Classes and names stay those
of the plain model, so everything that ``prepare`` does afterwards (mixed precision, DDP, the units
of FSDP1 and FSDP2) finds what it expects, and so do ``unwrap_model``, ``get_state_dict``,
``save_state`` and ``load_state``. FSDP's hooks stand outside the regions: a recompute finds the
parameters gathered.

Invariant: one region a block. The plugin's own checkpointing is turned off, with a warning.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from wrappers.apply import ApplyReport, apply_activation_checkpointing
from wrappers.integrations._blocks import no_split_blocks, outermost_named
from wrappers.select import ModuleTest

try:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
except ImportError as error:
    raise ImportError(
        "wrappers.integrations.accelerate needs accelerate: "
        "pip install activation-wrappers[accelerate]"
    ) from error

__all__ = ["enable"]


def enable(
    accelerator: Accelerator,
    model: nn.Module,
    *,
    check_fn: ModuleTest | None = None,
    **settings: Any,
) -> ApplyReport:
    """Checkpoint the blocks of a model that ``accelerator.prepare`` is about to take.

    Args:
        accelerator: Says which classes its FSDP plugin shards. If that plugin's own
            ``activation_checkpointing`` is on, it is turned off once blocks were found.
        model: Changed in place; keeps its class, its blocks' classes and all names.
        check_fn: Which modules are the blocks: a predicate of :mod:`wrappers.select` or any
            callable. By default the outermost modules of the classes that the FSDP plugin shards,
            or else of those in the model's ``_no_split_modules``.
        **settings: Those of :func:`wrappers.apply_activation_checkpointing` but ``inplace``:
            ``impl``, ``policy``, ``checkpoint_wrapper_fn``, ... The random state is restored
            unless ``preserve_rng_state=False`` is among them.

    Returns:
        FQNs of the blocks, and of what was chosen but skipped with the reason.

    Raises:
        ImportError: accelerate is not installed (when this module is imported).
        TypeError: An argument is of a wrong type, or a setting is unknown.
        ValueError: The model is prepared already, or nothing says which modules are its blocks.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"expected an Accelerator first, got {type(accelerator).__name__}: "
            "enable(accelerator, model)"
        )
    if getattr(model, "_is_accelerate_prepared", False):
        raise ValueError(
            f"this {type(model).__name__} comes from accelerator.prepare: call enable(accelerator, "
            "model) with the plain model, before accelerator.prepare"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    choice = {"check_fn": check_fn} if check_fn is not None else _blocks(plugin, model)
    report = apply_activation_checkpointing(model, inplace=True, **choice, **settings)
    has_regions = bool(report.wrapped or report.skipped)
    if has_regions and plugin is not None and plugin.activation_checkpointing:
        _turn_off(plugin, is_told=accelerator.is_local_main_process)
    return report


def _blocks(plugin: FullyShardedDataParallelPlugin | None, model: nn.Module) -> dict[str, Any]:
    """What chooses the blocks, as an argument of ``apply_activation_checkpointing``."""
    if plugin is not None and plugin.transformer_cls_names_to_wrap:
        return {"check_fn": outermost_named(model, plugin.transformer_cls_names_to_wrap)}
    if plugin is not None and _says_which(plugin.auto_wrap_policy):
        return {"auto_wrap_policy": plugin.auto_wrap_policy}
    return no_split_blocks(model, "the FSDP plugin names no classes")


def _says_which(policy: Any) -> bool:
    """Whether a policy knows classes; the bare functions do not, and size makes no block."""
    from torch.distributed.fsdp import wrap

    if isinstance(policy, functools.partial):
        return policy.func is not wrap.size_based_auto_wrap_policy
    bare = (wrap.size_based_auto_wrap_policy, wrap.transformer_auto_wrap_policy)
    return policy is not None and policy not in bare


def _turn_off(plugin: FullyShardedDataParallelPlugin, *, is_told: bool) -> None:
    names = ["activation_checkpointing"]
    plugin.activation_checkpointing = False
    if plugin.activation_checkpointing_offload:
        names.append("activation_checkpointing_offload")
        plugin.activation_checkpointing_offload = False
    if not is_told:
        return
    message = (
        f"{' and '.join(names)} of accelerate's FSDP plugin would recompute the blocks twice and "
        "was turned off. Remove fsdp_activation_checkpointing from the config file, or do not call "
        "wrappers.integrations.accelerate.enable."
    )
    if len(names) == 2:
        message += (
            " To move the inputs of the blocks to the host, call enable a second time with "
            "checkpoint_wrapper_fn=wrappers.offload_wrapper."
        )
    warnings.warn(message, stacklevel=3)
