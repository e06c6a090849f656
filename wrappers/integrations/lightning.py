"""Lightning: activation checkpointing of a model's blocks under Fabric and Trainer.

    enable(fabric, model, check_fn=by_class(Block))             # before fabric.setup(model)
    Trainer(callbacks=[ActivationCheckpointing(check_fn=by_class(Block))])

Problem: only ``FSDPStrategy`` checkpoints (``activation_checkpointing_policy=``), with torch's
wrapper, after sharding: nothing under DDP, under FSDP2 (``ModelParallelStrategy``) or on a single
device, and no choice of what is kept.

Idea: replace the forwards of the blocks in place while the model is still plain. For Fabric that is
any time before ``setup``. A Trainer calls its callbacks' ``setup`` before ``configure_model``, and
both before its strategy wraps or shards:

    callbacks' setup  -->  configure_model      -->  strategy.setup  -->  training
    [the callback]         [1] fully_shard           DDP, FSDP1
                           [2] the model is built

A module that builds its blocks in ``configure_model`` [2] calls ``enable(self.trainer, self)``
there, before it shards, in place of the callback.

Invariant: one region a block. The strategy's own policy chooses the blocks where nothing else does,
and is turned off, with a warning.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from wrappers.apply import ApplyReport, apply_activation_checkpointing
from wrappers.integrations._blocks import no_split_blocks
from wrappers.select import ModuleTest

try:
    from lightning.fabric import Fabric
    from lightning.fabric.wrappers import is_wrapped
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "wrappers.integrations.lightning needs lightning: "
        "pip install activation-wrappers[lightning]"
    ) from error

__all__ = ["ActivationCheckpointing", "enable"]

#: Where lightning 2.6 keeps what ``apply_activation_checkpointing`` shall choose modules with.
_OWN_CHOICE = "_activation_checkpointing_kwargs"


def enable(
    runner: Fabric | Trainer,
    model: nn.Module,
    *,
    check_fn: ModuleTest | None = None,
    **settings: Any,
) -> ApplyReport:
    """Checkpoint the blocks of a model that Fabric or a Trainer is about to take.

    Args:
        runner: If its strategy has an ``activation_checkpointing_policy`` of its own, that is
            turned off once blocks were found.
        model: Changed in place; keeps its class, its blocks' classes and all names.
        check_fn: Which modules are the blocks: a predicate of :mod:`wrappers.select` or any
            callable. By default what the strategy's own policy chooses, or else the outermost
            modules of the classes in the model's ``_no_split_modules``.
        **settings: Those of :func:`wrappers.apply_activation_checkpointing` but ``inplace``:
            ``impl``, ``policy``, ``checkpoint_wrapper_fn``, ... The random state is restored
            unless ``preserve_rng_state=False`` is among them.

    Returns:
        FQNs of the blocks, and of what was chosen but skipped with the reason.

    Raises:
        ImportError: lightning is not installed (when this module is imported).
        TypeError: An argument is of a wrong type, or a setting is unknown.
        ValueError: The model was set up already, or nothing says which modules are its blocks.
    """
    if not isinstance(runner, (Fabric, Trainer)):
        raise TypeError(
            f"expected a Fabric or a Trainer first, got {type(runner).__name__}: "
            "enable(fabric, model)"
        )
    if is_wrapped(model):
        raise ValueError(
            "this model comes from fabric.setup: call enable(fabric, model) with the plain model, "
            "before fabric.setup"
        )
    own = getattr(runner.strategy, _OWN_CHOICE, {})
    choice: dict[str, Any] = {"check_fn": check_fn} if check_fn is not None else own
    if not choice:
        choice = no_split_blocks(model, "the strategy has no activation_checkpointing_policy")
    report = apply_activation_checkpointing(model, inplace=True, **choice, **settings)
    if report.wrapped or report.skipped:
        _turn_off_own(runner)
    return report


def _turn_off_own(runner: Fabric | Trainer) -> None:
    """Turn the strategy's own policy off, with a warning if there is one."""
    strategy = runner.strategy
    if not getattr(strategy, _OWN_CHOICE, {}):
        return
    setattr(strategy, _OWN_CHOICE, {})
    if runner.is_global_zero:
        warnings.warn(
            f"activation_checkpointing_policy of {type(strategy).__name__} would recompute the "
            "blocks twice and was turned off. Leave it out and pass check_fn to "
            "wrappers.integrations.lightning.",
            stacklevel=3,
        )


class ActivationCheckpointing(Callback):
    """Calls :func:`enable` when a fit begins, before ``configure_model`` and the strategy.

    The regions stay in the model after the fit; without grad mode they do nothing.

    Args:
        check_fn: See :func:`enable`.
        **settings: See there.

    Attributes:
        report: What was checkpointed; None before the first fit.
    """

    def __init__(self, check_fn: ModuleTest | None = None, **settings: Any) -> None:
        super().__init__()
        self.report: ApplyReport | None = None
        self._check_fn = check_fn
        self._settings = settings
        self._enabled_for: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checkpoint the blocks of a module that is fitted for the first time.

        Raises:
            ValueError: No module was chosen.
        """
        if stage != "fit":
            return
        if self._enabled_for is pl_module:
            _turn_off_own(trainer)  # Each fit may have a strategy of its own.
            return
        self.report = enable(trainer, pl_module, check_fn=self._check_fn, **self._settings)
        if not self.report.wrapped and not self.report.skipped:
            raise ValueError(
                f"no module of this {type(pl_module).__name__} was chosen when the fit began. "
                "Where configure_model builds the blocks, call "
                "wrappers.integrations.lightning.enable(self.trainer, self) at its end, before "
                "anything is sharded, and leave out this callback"
            )
        self._enabled_for = pl_module
