"""What an optimizer keeps between steps, and what its step takes for a while.

The optimizer is built again on fake parameters and makes two steps there: the first makes its
state, the second is like all others. Nothing of the user's optimizer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wrappers import _torch
from wrappers.errors import WrapperError
from wrappers.plan.memory import Memory, Observer

#: An optimizer of the model, or what makes one of parameters.
OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of an optimizer.

    Attributes:
        state_bytes: What it keeps between steps.
        step_bytes: The most that its step takes beyond that.
    """

    state_bytes: int = 0
    step_bytes: int = 0


class _Numbers(_torch.TorchDispatchMode):
    """Answers a fake tensor that is asked for its number: the count of steps."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _torch.number_of_tensor:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


def measure_optimizer(
    optimizer: OptimizerLike | None,
    model: nn.Module,
    fake: nn.Module,
    mode: Any,
    observe: Observer | None = None,
    *,
    is_elsewhere: bool = False,
) -> OptimizerMemory:
    """Run an optimizer on fake parameters.

    Args:
        optimizer: Of the model, or what makes one.
        model: The user's.
        fake: Its copy on fake tensors, whose parameters get gradients for a while.
        mode: The fake tensors' mode.
        observe: Called with the operators of a step.

    Raises:
        WrapperError: It does not run on tensors without memory.
    """
    if optimizer is None:
        return OptimizerMemory()
    parameters = [p for p in fake.parameters() if p.requires_grad]
    is_over = False

    def observe_last(*call: Any) -> None:
        if is_over and observe is not None:
            observe(*call)

    memory = Memory(observe_last)
    try:
        with mode:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            with memory, _Numbers():  # type: ignore[no-untyped-call]
                copy = _rebuilt(optimizer, model, fake, parameters)
                if is_elsewhere:
                    _step_together(copy)
                copy.step()
                state_bytes = memory.alive_bytes
                is_over = True
                start = memory.now()
                copy.step()
                return OptimizerMemory(state_bytes, memory.peak(start) - state_bytes)
    except Exception as error:
        raise WrapperError(
            f"the optimizer {_name(optimizer)} does not run on tensors without memory "
            f"({type(error).__name__}: {error}). Leave it out and take its state off the budget."
        ) from error
    finally:
        for parameter in parameters:
            parameter.grad = None


def _rebuilt(
    optimizer: OptimizerLike,
    model: nn.Module,
    fake: nn.Module,
    parameters: list[nn.Parameter],
) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer(parameters)
    fakes = dict(zip(model.parameters(), fake.parameters(), strict=True))
    groups = [
        {**group, "params": [fakes[p] for p in group["params"] if p in fakes]}
        for group in optimizer.param_groups
    ]
    groups = [group for group in groups if group["params"]]
    return type(optimizer)(groups)  # type: ignore[call-arg]


def _step_together(optimizer: torch.optim.Optimizer) -> None:
    """Let it step as on an accelerator, where torch's default is lists of tensors."""
    for group in optimizer.param_groups:
        others = group.get("fused"), group.get("differentiable"), group.get("capturable")
        if group.get("foreach", False) is None and not any(others):
            group["foreach"] = True


def _name(optimizer: OptimizerLike) -> str:
    if isinstance(optimizer, torch.optim.Optimizer):
        return type(optimizer).__name__
    return getattr(optimizer, "__name__", repr(optimizer))
