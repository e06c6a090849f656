"""One step of a whole model whose regions are stubs: what is alive outside of them, and when.

A stub stands for the forward of a region. It makes results that look like the region's and, in
backward, gradients that look like the region's, keeps nothing, and notes the moments at which it
begins and ends. So the step costs little, whatever the depth of the model, and what is alive in it
is just what lives outside of regions:

    moment 0 │ stub 0 │ moment 1 │ stub 1 │ ... loss ... │ stub 1 │ moment 1 │ stub 0 │ moment 0

A tensor that comes into a region counts there if nobody else keeps it (see
:mod:`wrappers.plan.calls`). This shows when it dies, so the step runs twice: the second time, stubs
keep the inputs that others keep too, because a region may hold them until its backward.

The same works on fake tensors and, where parameters are sharded over ranks, on the device with real
ones: FSDP gathers and frees around the stubs as around the regions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _tree
from wrappers.plan.calls import Call, call_of, make_tensors
from wrappers.plan.memory import Memory, Observer, Storage

#: Runs forward and loss: what the model has returned, and the loss.
RunModel = Callable[[nn.Module], tuple[Any, Tensor]]

#: What a region returns for a call: the call with its results. The step runs no region itself.
Describe = Callable[[str, Call], Call]


@dataclass
class Visit:
    """One call of a region in a step.

    Attributes:
        fqn: The region.
        call: What it was called with and what it returns.
        entry: Position, in the memory's changes, at which its forward begins.
        exit: At which it ends.
        backward_entry: At which its backward begins; None if there is none.
        backward_exit: At which that ends.
        inputs: The memory of its inputs, by position.
        outputs: The memory of its outputs.
        gradients: The memory of the gradients of its outputs.
    """

    fqn: str
    call: Call
    entry: int = 0
    exit: int = 0
    backward_entry: int | None = None
    backward_exit: int = 0
    inputs: list[Storage | None] = field(default_factory=list)
    outputs: list[Storage | None] = field(default_factory=list)
    gradients: list[Storage | None] = field(default_factory=list)


class _Stub(torch.autograd.Function):
    """Stands for a region: makes what the region would return, and the gradients that it would."""

    @staticmethod
    def forward(ctx: Any, step: Step, visit: Visit, num_inputs: int, *tensors: Any) -> Any:
        ctx.step, ctx.visit = step, visit
        call = visit.call
        shared = [
            t
            for t, spec, s in zip(tensors, call.inputs, visit.inputs, strict=False)
            if s is not None and not spec.is_own and step.is_second
        ]
        ctx.save_for_backward(*shared)
        ctx.made = [None if not t.requires_grad else (t.size(), t.dtype, t.device) for t in tensors]
        step.memory.label = f"{visit.fqn} output"
        outputs = make_tensors(call.outputs, step.device)
        step.memory.label = ""
        constants = [
            t for t, spec in zip(outputs, call.outputs, strict=True) if not spec.requires_grad
        ]
        ctx.mark_non_differentiable(*constants)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        visit, memory = ctx.visit, ctx.step.memory
        visit.backward_entry = memory.now()
        visit.gradients = [memory.storage_of(g) for g in gradients if g is not None]
        memory.label = f"{visit.fqn} gradient"
        made = [
            None if spec is None else torch.empty(spec[0], dtype=spec[1], device=spec[2])
            for spec in ctx.made
        ]
        memory.label = ""
        visit.backward_exit = memory.now()
        return None, None, None, *made


class Step:
    """A step with stubs.

    Args:
        model: Its regions' forwards are replaced while the step runs.
        regions: The regions, by FQN.
        describe: Says what a region returns.
        run: Runs forward and loss.
        device: Of the tensors.
        observe: Called with every operator outside of regions.

    Attributes:
        memory: What was alive.
        visits: The calls of regions, in order.
        loss_at: Position at which backward begins.
        end_at: Position at which it is over.
        num_runs: How often the step was run.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, nn.Module],
        describe: Describe,
        run: RunModel,
        device: torch.device,
        observe: Observer | None = None,
    ) -> None:
        self._model = model
        self._regions = regions
        self._describe = describe
        self._run_model = run
        self._observe = observe
        self.device = device
        self.memory = Memory(observe)
        self.visits: list[Visit] = []
        self.is_second = False
        self.num_runs = 0
        self.loss_at = 0
        self.end_at = 0

    def run(self) -> None:
        """Run the step twice; what is left is the second."""
        gradients = [(p, p.grad) for p in self._model.parameters()]
        self._run_once()
        owned = [self._owned(visit.inputs, self._next_at(i)) for i, visit in self._numbered()]
        if all(all(own) for own in owned):
            self._set_owned(owned)
            self._set_owned_outputs()
            return
        for parameter, gradient in gradients:
            parameter.grad = gradient
        self.is_second = True
        self.visits = []
        self.memory = Memory(self._observe)
        self._owned_inputs = owned
        self._run_once()
        self._set_owned_outputs()

    def _numbered(self) -> list[tuple[int, Visit]]:
        return list(enumerate(self.visits))

    def _next_at(self, index: int) -> int:
        """Where the next forward of a region begins, or backward."""
        if index + 1 < len(self.visits):
            return self.visits[index + 1].entry
        return self.loss_at

    @staticmethod
    def _owned(storages: list[Storage | None], by: int) -> list[bool]:
        """Which storages nobody needs from a position on."""
        return [s is not None and s.died_at is not None and s.died_at <= by for s in storages]

    def _set_owned(self, owned: list[list[bool]]) -> None:
        for visit, own in zip(self.visits, owned, strict=True):
            visit.call = visit.call.with_own(own)

    def _set_owned_outputs(self) -> None:
        """Say which outputs a region keeps that nobody else does, a later region included."""
        later: set[Storage | None] = set()
        for visit in reversed(self.visits):
            gone = self._owned(visit.outputs, self.loss_at)
            visit.call = visit.call.with_own_outputs(
                [
                    spec.is_own and is_gone and storage not in later
                    for spec, is_gone, storage in zip(
                        visit.call.outputs, gone, visit.outputs, strict=True
                    )
                ]
            )
            inputs = zip(visit.inputs, visit.call.inputs, strict=True)
            later |= {storage for storage, spec in inputs if spec.is_own}

    def _run_once(self) -> None:
        memory = self.memory
        self.num_runs += 1
        with replaced_forwards(self._regions, self._enter), memory:
            output, loss = self._run_model(self._model)
            self.loss_at = memory.now()
            if loss.requires_grad:
                loss.backward()
            # A training loop has both until the end of its turn.
            self.end_at = memory.now()
            del output, loss

    def _enter(self, fqn: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the forward of a region does instead."""
        memory = self.memory
        tensors = _tree.flatten_call(args, kwargs)[0]
        with memory.paused():
            call = self._describe(fqn, call_of(args, kwargs))
        if self.is_second:
            call = call.with_own(self._owned_inputs[len(self.visits)])
        visit = Visit(fqn, call, entry=memory.now())
        visit.inputs = [memory.storage_of(tensor) for tensor in tensors]
        self.visits.append(visit)
        parameters = [p for p in module.parameters() if p.requires_grad]
        results = _Stub.apply(self, visit, len(tensors), *tensors, *parameters)  # type: ignore[no-untyped-call]
        visit.exit = memory.now()
        outputs = list(results)
        for output, given in call.passed_on:
            outputs[output] = tensors[given]
        visit.outputs = [memory.storage_of(tensor) for tensor in outputs]
        return call.build_output(outputs)

    # --- What it has shown

    def base_of_forward(self, index: int) -> int:
        """Bytes alive when a region's forward begins, without its own inputs."""
        visit = self.visits[index]
        own = {s for s, spec in zip(visit.inputs, visit.call.inputs, strict=True) if spec.is_own}
        return self._alive(visit.entry) - self._bytes_at(visit.entry, own)

    def base_of_backward(self, index: int) -> int:
        """Bytes alive when a region's backward begins, without the gradients of its outputs."""
        visit = self.visits[index]
        entry = visit.backward_entry
        if entry is None:
            return 0
        later = [v.backward_entry for v in self.visits if v.backward_entry is not None]
        by = min((at for at in later if at > entry), default=self.end_at)
        gradients = [s for s in visit.gradients if s is not None]
        own = {s for s, o in zip(gradients, self._owned(list(gradients), by), strict=True) if o}
        return self._alive(entry) - self._bytes_at(entry, own)

    def peak_between(self, start: int, end: int) -> int:
        """The most that is alive between two moments, from the first that is made on."""
        changes = self.memory.changes
        while start < end and changes[start][0] < 0:
            start += 1
        return self.memory.peak(start, end)

    def _alive(self, position: int) -> int:
        return sum(change for change, _ in self.memory.changes[:position])

    def _bytes_at(self, position: int, storages: set[Any]) -> int:
        changes = self.memory.changes[:position]
        return sum(change for change, storage in changes if storage in storages)


@contextlib.contextmanager
def replaced_forwards(
    regions: Mapping[str, nn.Module], enter: Callable[[str, nn.Module, Any, Any], Any]
) -> Iterator[None]:
    """Let modules do something else for a while when they are called."""
    before = {module: vars(module).get("forward") for module in regions.values()}
    try:
        for fqn, module in regions.items():
            _put_forward(module, fqn, enter)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _put_forward(
    module: nn.Module, fqn: str, enter: Callable[[str, nn.Module, Any, Any], Any]
) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return enter(fqn, module, args, kwargs)

    module.forward = forward
