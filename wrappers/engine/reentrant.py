"""REENTRANT: no graph in forward; backward reruns the function and runs backward through it.

The whole region is one graph node. Its forward runs without grad mode; its saved tensors are
the region's inputs. Its backward calls the function on detached inputs with grad mode on,
runs autograd from the outputs' gradients down to these inputs and to the parameters, and
returns the inputs' gradients. Tensors nested in containers take part like positional ones.

A node exists only if one of its inputs requires grad. Where none does, the region's
parameters would silently get no gradient, so such a call runs as NO_REENTRANT instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _torch, _tree
from wrappers.engine.frame import Frame, Function, detach
from wrappers.engine.region import Region
from wrappers.engine.rerun import run_no_reentrant
from wrappers.errors import CheckpointError
from wrappers.policy import CheckpointImpl

HIDDEN_FROM_DDP = (
    "DDP(find_unused_parameters=True) looks in the graph for the parameters that a forward has "
    "used, and a REENTRANT region shows it none: it would take the region's parameters for unused. "
    "Use CheckpointImpl.NO_REENTRANT, or DDP(static_graph=True); or, if every step uses all "
    "parameters, find_unused_parameters=False (ddp_find_unused_parameters in TrainingArguments)."
)


def check_backward_validity(inputs: Iterable[Any]) -> None:
    """Warn if none of the tensors among ``inputs`` requires grad."""
    if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        warnings.warn(
            "None of the inputs have requires_grad=True. Gradients will be None", stacklevel=2
        )


def detach_variable(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Detach the tensors of a tuple, keeping ``requires_grad``; pass on everything else.

    Args:
        inputs: A tuple of any values.

    Returns:
        A tuple of the same length.

    Raises:
        TypeError: ``inputs`` is not a tuple.
    """
    if not isinstance(inputs, tuple):
        raise TypeError(f"detach_variable needs a tuple, got {type(inputs).__name__}")
    return tuple(detach(value) if isinstance(value, Tensor) else value for value in inputs)


class _ReentrantFrame(Frame):
    """One forward execution that is a single graph node."""

    builds_used_graph = True

    __slots__ = ("_versions", "build_output")

    build_output: Any

    def run_forward(self, ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function without a graph, in the node's forward; the node keeps the inputs."""
        ctx.frame = self
        ctx.set_materialize_grads(False)
        self._versions = [_torch.version(tensor) for tensor in self.tensors]
        ctx.save_for_backward(*self.take_tensors())
        # What is saved here belongs to a backward inside the region, if there is one (rule 6).
        _torch.push_saved_tensors_hooks(Tensor.detach, self._unpack_in_forward)
        try:
            out = self.function(*args, **kwargs)
        finally:
            _torch.pop_saved_tensors_hooks()
        self.finish_forward()
        return out

    def _unpack_in_forward(self, saved: Tensor) -> Tensor:
        if not self.runs_backward:
            self.note_backward()
        return saved

    def run_backward(self, ctx: Any, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Rerun the function and run backward through it.

        Args:
            ctx: The node's context.
            grads: Gradient of each tensor among the outputs, flat; None where there is none.

        Returns:
            The gradient of each tensor among the inputs, flat.
        """
        if torch.is_grad_enabled() or not _torch.is_reentrant_backward_allowed():
            raise self._unsupported_backward()
        self._require_fsdp_to_reduce()
        try:
            inputs = [detach(tensor) for tensor in ctx.saved_tensors]
        except RuntimeError as error:
            raise self.explain_changed_input(self._first_changed(ctx), error) from error
        is_in_region = _torch.has_saved_tensors_hooks()
        if is_in_region:  # Rule 3: as if no region were active.
            _torch.push_saved_tensors_hooks(Tensor.detach, _identity)
        try:
            outputs, _ = _tree.flatten(self.rerun(inputs))
            if self.runs_backward:  # It has added to the gradients in forward already.
                for tensor in inputs:
                    tensor.grad = None
            self._backward(outputs, grads)
        finally:
            if is_in_region:
                _torch.pop_saved_tensors_hooks()
        return [tensor.grad for tensor in inputs]

    def _first_changed(self, ctx: Any) -> int:
        """Position of the first input that was changed in place since the forward."""
        versions = [saved.data._version for saved in _torch.raw_saved_tensors(ctx)]
        return next((i for i, v in enumerate(versions) if v != self._versions[i]), 0)

    def _backward(self, outputs: list[Tensor], grads: list[Tensor | None]) -> None:
        if len(outputs) != len(grads):
            raise CheckpointError(
                f"region `{self.fqn}`: the forward returned {len(grads)} tensors, the recompute "
                f"{len(outputs)}. The forward must repeat exactly.",
                fqn=self.fqn,
            )
        roots, root_grads = [], []
        for output, grad in zip(outputs, grads, strict=True):
            if grad is not None and output.requires_grad:
                roots.append(output)
                root_grads.append(grad)
        if not roots:
            raise CheckpointError(
                f"region `{self.fqn}`: none of the outputs that backward came from requires grad, "
                "so this region has no gradient to compute. Do not checkpoint it, do not detach "
                "its outputs inside, or use CheckpointImpl.NO_REENTRANT.",
                fqn=self.fqn,
            )
        _torch.run_backward(roots, root_grads)

    def _require_fsdp_to_reduce(self) -> None:
        """Refuse a second rerun of an FSDP module in one backward: its gradient would be lost.

        The first rerun starts the module's backward for FSDP2, which takes every later one, until
        the root's backward is over, for a part of that and reduces nothing.
        """
        state = self.module_state
        if state is None or not state.fsdp_modules:
            return
        # A region around a module's forward alone leaves the module's hooks outside.
        outside = None if self.function is state.module else state.module
        if any(_torch.is_in_fsdp_backward(m) for m in state.fsdp_modules if m is not outside):
            raise CheckpointError(
                f"region `{self.fqn}`: a REENTRANT region around an FSDP module was called twice "
                "before this backward, and FSDP would lose the gradients of one call. Use "
                "CheckpointImpl.NO_REENTRANT, or put FSDP outside of the region: "
                "fully_shard(checkpoint_wrapper(module)), or inplace=True.",
                fqn=self.fqn,
            )

    def refuse_hidden_parameters(self) -> None:
        """Raise where DDP would take the region's parameters for unused, as no graph shows them."""
        if self.module_state is not None and self.module_state.trainable_leaves():
            raise CheckpointError(f"region `{self.fqn}`: {HIDDEN_FROM_DDP}", fqn=self.fqn)

    def _unsupported_backward(self) -> CheckpointError:
        what = (
            "create_graph=True is"
            if _torch.is_reentrant_backward_allowed()
            else ".grad() and .backward(inputs=...) are"
        )
        return CheckpointError(
            f"region `{self.fqn}`: {what} not possible through a REENTRANT region, whose backward "
            "runs a backward of its own. Use CheckpointImpl.NO_REENTRANT (use_reentrant=False).",
            fqn=self.fqn,
        )


def _identity(value: Any) -> Any:
    return value


class _Reentrant(torch.autograd.Function):
    """The graph node of a region: flat tensors in and out."""

    @staticmethod
    def forward(
        ctx: Any,
        frame: _ReentrantFrame,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs, frame.build_output = _tree.flatten(frame.run_forward(ctx, args, kwargs))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (None, None, None, *ctx.frame.run_backward(ctx, list(grads)))


#: Function.apply without its Python half, which is for functorch transforms: there is none.
_apply: Function = super(torch.autograd.Function, _Reentrant).apply


def run_reentrant(
    region: Region,
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owner: nn.Module | None = None,
) -> Any:
    """Run a region as one graph node."""
    frame = _ReentrantFrame(region, function, args, kwargs, owner)
    if not any(tensor.requires_grad for tensor in frame.tensors):
        return run_no_reentrant(region, function, args, kwargs, owner)
    if _torch.is_in_ddp_that_walks_graph():
        frame.refuse_hidden_parameters()
    stores = [(v, _stored(v)) for v in (*args, *kwargs.values()) if type(v) in (list, dict)]
    outputs = _apply(frame, args, kwargs, *frame.tensors)
    if any(_stored(store) - before for store, before in stores):
        region.warn_stored()
    # The frame must not keep what the outputs' structure holds.
    build_output, frame.build_output = frame.build_output, None
    return build_output(outputs)


def _stored(store: list[Any] | dict[Any, Any]) -> set[int]:
    """The tensors in a container that could have a gradient, by identity."""
    values = store.values() if type(store) is dict else store
    return {id(v) for v in values if isinstance(v, Tensor) and v.is_floating_point()}


class CheckpointFunction(torch.autograd.Function):
    """The REENTRANT node with the signature of torch's class of this name.

    ``CheckpointFunction.apply(run_function, preserve_rng_state, *args)``; :func:`checkpoint`
    does more (keyword arguments, nested tensors) and should be preferred.
    """

    @staticmethod
    def forward(ctx: Any, run_function: Function, preserve_rng_state: bool, *args: Any) -> Any:
        """Run the function on ``args`` without a graph."""
        check_backward_validity(args)
        region = Region(
            impl=CheckpointImpl.REENTRANT,
            preserve_rng_state=preserve_rng_state,
            fqn=getattr(run_function, "__qualname__", type(run_function).__name__),
        )
        frame = _ReentrantFrame(region, run_function, args, {})
        ctx.inputs = _num_tensors(args)
        out = frame.run_forward(ctx, args, {})
        ctx.outputs = _num_tensors(out if isinstance(out, tuple) else (out,))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Rerun the function and run backward through it."""
        flat: list[Tensor | None] = []
        for num, grad in zip(ctx.outputs, grads, strict=True):
            flat += [grad] if num is None else [None] * num
        found = iter(ctx.frame.run_backward(ctx, flat))
        results = []
        for num in ctx.inputs:
            results.append(next(found) if num is None else None)
            for _ in range(num or 0):
                next(found)
        return (None, None, *results)


def _num_tensors(values: tuple[Any, ...]) -> list[int | None]:
    """None for a tensor, which takes part in autograd; else how many tensors hide inside."""
    return [None if isinstance(v, Tensor) else len(_tree.flatten(v)[0]) for v in values]
