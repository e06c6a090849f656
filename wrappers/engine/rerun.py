"""NO_REENTRANT: saved-tensor hooks; rerun until the last needed slot is filled.

    forward                                   backward
    -------                                   --------
    save the inputs  [1]                      unpack hook: slot is empty  [3]
    function runs under the hook pair           -> inputs from autograd
      pack hook: tensor -> slot  [2]            -> function runs under the fill hook
    graph keeps slots, not tensors                 fill hook: tensor -> slot  [4]
                                                   last needed slot: stop  [5]
                                              unpack hook: take the tensor out  [6]

[1] Under the hooks of the enclosing region, if there is one: it hides them (rule 2).
[2] The frame keeps only a weak reference to a slot and a description of the tensor, so a
    slot dies with the part of the graph that saved it.
[3] Also from a backward inside the region while its forward still runs (rule 6).
[4] The graph that the rerun builds gets nothing but a weak reference to the slot: it is never
    used, unless the function runs a backward itself (rule 6). If it did so in forward, then
    the graph gets the tensors. Autograd itself unpacks a tensor without the graph it has.
[5] By an exception through the function's frames (rule 5). It is made anew each time: one
    shared instance would collect tracebacks and get slower with every raise. A raise through
    C++ is slow, so it is left out where the operator that saves is done, as it saves
    its output, and is the last that makes a graph node: then the function runs to its end.
[6] The slot is empty again, also with ``retain_graph=True`` (rule 4).

[Note: hooks are closures]

The pack hooks run for every saved tensor, twice a step, and are most of what a region costs
beyond its recompute. So they are closures over what they need, and write
:func:`wrappers.engine.verify.describe` out in line: as methods that call it they would cost
nearly twice as much.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _torch
from wrappers.engine import verify
from wrappers.engine.frame import (
    Frame,
    Function,
    StopRerun,
    detach,
    enter_forward,
    leave_forward,
)
from wrappers.engine.holders import Held
from wrappers.engine.region import Region, noop_context_fn
from wrappers.errors import CheckpointError, InputChangedError, RecomputeMismatchError


class Slot:
    """The place of one saved tensor. ``value`` exists only between fill and unpack."""

    __slots__ = ("__weakref__", "value", "version")

    value: Tensor
    #: The value's version counter when it was saved.
    version: int


def _save(tensor: Tensor) -> _torch.SavedTensor:
    # Autograd refuses to save what was born in inference mode, and nothing else could hide it.
    return Held(tensor) if tensor.is_inference() else _torch.make_saved_tensor(tensor)


def _unpack_in_rerun(packed: Any) -> Tensor:
    """The unpack hook of the graph that a rerun builds. See [4]."""
    if isinstance(packed, Tensor):
        return packed
    slot = packed and packed()
    if isinstance(slot, Slot) and hasattr(slot, "value"):
        return slot.value
    raise CheckpointError(
        "a backward runs through tensors that a recompute has made, which are gone. If the region "
        "keeps a tensor beyond its call (in a list, say), let it do so only while not "
        "is_recomputing(); and do not make a backward inside of a region depend on that."
    )


class RerunFrame(Frame):
    """One forward execution whose saved tensors are recomputed by calling the function again.

    Args:
        region: The region's settings.
        function: What the region runs.
        args: Positional arguments of this execution.
        kwargs: Keyword arguments of this execution.
        owner: The module whose state the function uses.
        inputs: Who holds the input tensors, if that is settled already.
    """

    slot_type = Slot

    __slots__ = (
        "_describe",
        "_early_stop",
        "_group",
        "_input_versions",
        "_inputs",
        "_is_forward_over",
        "_num_nodes",
        "_recompute_context",
        "_trace",
        "described",
        "slots",
    )

    def __init__(
        self,
        region: Region,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        owner: nn.Module | None,
        *,
        inputs: Sequence[_torch.SavedTensor] | None = None,
    ) -> None:
        super().__init__(region, function, args, kwargs, owner)
        self._input_versions: list[int] = []
        is_hidden = _torch.has_saved_tensors_hooks()
        if is_hidden:
            self._input_versions = [_torch.version(tensor) for tensor in self.tensors]
        tensors = self.take_tensors()
        if inputs is None:
            inputs = list(map(_save, tensors)) if is_hidden else list(map(Held, tensors))
        self._inputs = inputs
        self._describe = verify.DETERMINISM_CHECKS[region.determinism_check]
        self._early_stop = region.is_early_stop
        self._trace = verify.DebugTrace() if region.is_debug else None
        self._recompute_context: contextlib.AbstractContextManager[Any] | None = None
        self._is_forward_over = False
        self._num_nodes = 0
        self._group: weakref.ref[Any] | None = None
        self.slots: list[weakref.ref[Slot]] = []
        self.described: list[verify.Description] = []

    # --- Forward

    def run_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function so that the graph keeps slots where it would keep tensors."""
        context_fn = self.region.context_fn
        start = _torch.next_sequence_number()
        as_of = enter_forward(self.as_of)
        try:
            if context_fn is noop_context_fn and self._trace is None:
                _torch.push_saved_tensors_hooks(self.make_pack(), self._unpack)
                try:
                    out = self.function(*args, **kwargs)
                finally:
                    _torch.pop_saved_tensors_hooks()
            else:
                out = self._run_forward_in_context(args, kwargs)
        finally:
            leave_forward(as_of)
        self.end_forward(start)
        return out

    def end_forward(self, start: int) -> None:
        """Note that the forward is over, whose first graph node had the number ``start``."""
        self._is_forward_over = True
        self._num_nodes = _torch.next_sequence_number() - start
        self.finish_forward()

    def is_last_node(self, saved: Tensor, start: int) -> bool:
        """Whether the operator that saves this tensor, its output, is the last that saves any.

        Args:
            saved: What the running operator saves, as its hook sees it.
            start: Number of the first graph node of the rerun.
        """
        node = saved.grad_fn
        last = _torch.next_sequence_number() - 1
        return (
            node is not None and node._sequence_nr() == last and last - start + 1 == self._num_nodes
        )

    def _run_forward_in_context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context, self._recompute_context = self.region.context_fn()
        is_returned = False
        _torch.push_saved_tensors_hooks(self.make_pack(), self._unpack)
        try:
            # The trace is the inner one: it sees what a policy's mode takes from its cache too.
            with context, self._trace.forward if self._trace else contextlib.nullcontext():
                out = self.function(*args, **kwargs)
                is_returned = True
        finally:
            _torch.pop_saved_tensors_hooks()
        if not is_returned:
            raise CheckpointError(
                f"region `{self.fqn}`: the forward context of context_fn suppressed an exception "
                "of the region, which so has no output. Let the context pass exceptions on.",
                fqn=self.fqn,
            )
        return out

    def make_pack(self) -> Callable[[Tensor], Slot]:
        """Make the pack hook of the forward. See [Note: hooks are closures]."""
        add_slot, add_description, ref = self.slots.append, self.described.append, weakref.ref
        describe, new = self._describe, self.slot_type

        def pack(tensor: Tensor) -> Slot:
            slot = new()
            add_slot(ref(slot))
            try:
                add_description((tensor.shape, tensor.dtype, tensor.device, tensor._version))
            except RuntimeError:  # a tensor without a shape
                add_description(verify.describe(tensor))
            return slot

        def pack_otherwise(tensor: Tensor) -> Slot:
            slot = new()
            add_slot(ref(slot))
            if describe is not None:
                add_description(describe(tensor))
            return slot

        return pack if describe is verify.describe else pack_otherwise

    # --- Backward

    def _unpack(self, slot: Slot) -> Tensor:
        try:
            value = slot.value
        except AttributeError:
            self.recompute()
            value = slot.value
        del slot.value
        if value._version != slot.version:
            raise CheckpointError(
                f"region `{self.fqn}`: one of the variables needed for gradient computation has "
                f"been modified by an inplace operation: {verify.to_text(verify.describe(value))} "
                f"is at version {value._version}, an operator of the region had saved it at "
                f"version {slot.version}. The region would fail without checkpointing too.",
                fqn=self.fqn,
            )
        return value

    def may_differ(self, tensor: Tensor, difference: int, inputs: list[tuple[Tensor, int]]) -> bool:
        """Whether it is right that the versions of a saved tensor differ between the runs.

        Args:
            tensor: What the rerun saves.
            difference: How much higher its version is than the forward's.
            inputs: The rerun's input tensors and the versions that they started with.
        """
        if getattr(self._recompute_context, "allows_mutation", False):
            return True
        if self.module_state is not None and self.module_state.may_change(tensor):
            return True
        # Hooks around the region may bring its inputs back with other versions.
        return any(
            start - version == difference and _torch.is_same_storage(tensor, input)
            for version, (input, start) in zip(self._input_versions, inputs, strict=False)
        )

    def _last_needed(self) -> int:
        """Position of the last slot that is alive and empty."""
        slots = self.slots
        for index in range(len(slots) - 1, -1, -1):
            slot = slots[index]()
            if slot is not None and not hasattr(slot, "value"):
                return index
        raise AssertionError("a recompute was asked for although no slot is empty")

    def recompute(self) -> None:
        """Fill every slot that is alive and empty."""
        group = _torch.get_graph_exec_group() if self._is_forward_over else None
        if group is not None:
            self._require_new(group)
        if not self._is_forward_over:
            self.note_backward()
        last = self._last_needed()
        tensors = self._unpack_inputs()
        fill = _Fill(self, tensors)
        try:
            self._rerun_into(fill, last, tensors)
        except CheckpointError:
            raise
        except Exception as error:
            # The region's own exception goes to the user; a difference seen before it explains it.
            if fill.mismatches and hasattr(error, "add_note"):  # Python 3.11
                error.add_note(str(self._mismatch_error(fill)))
            raise
        if fill.mismatches or fill.num_saved <= last or self._has_other_count(fill):
            raise self._mismatch_error(fill)
        if group is not None:
            self._group = weakref.ref(group)

    def _unpack_inputs(self) -> list[Tensor]:
        tensors = []
        for index, saved in enumerate(self._inputs):
            try:
                tensors.append(saved.unpack())
            except RuntimeError as error:
                raise self.explain_changed_input(index, error) from error
        if self.runs_backward:  # It must not go on into the graph before the region again.
            tensors = [detach(tensor) for tensor in tensors]
        return tensors

    def _rerun_into(self, fill: _Fill, last: int, tensors: list[Tensor]) -> None:
        pack, finish = fill.make_pack(last)
        _torch.push_saved_tensors_hooks(pack, _unpack_in_rerun)
        try:
            if self._recompute_context is None:
                self.rerun(tensors)
            else:
                trace = self._trace.start_recompute() if self._trace else contextlib.nullcontext()
                with self._recompute_context, trace:
                    self.rerun(tensors)
        finally:
            _torch.pop_saved_tensors_hooks()
            finish()

    def _require_new(self, group: Any) -> None:
        if self._group is not None and self._group() is group:
            raise CheckpointError(
                f"region `{self.fqn}`: two backward calls under one GraphExecGroup need the same "
                "saved tensor. Calls in a group must run over parts of the graph that do not "
                "overlap; run these outside of the group.",
                fqn=self.fqn,
            )

    # --- Errors

    def _has_other_count(self, fill: _Fill) -> bool:
        """Whether a rerun that went to its end saved more or fewer tensors than the forward."""
        return not self._early_stop and self._is_forward_over and fill.num_saved != len(self.slots)

    def _mismatch_error(self, fill: _Fill) -> CheckpointError:
        if not fill.mismatches:
            return self._count_error(fill)
        first = fill.mismatches[0]
        if verify.is_only_version(first.expected, first.got):
            return self._changed_error(first)
        num = len(self.slots)
        expected, got = verify.to_text(first.expected), verify.to_text(first.got)
        if expected == got:
            got = "other values"
        text = (
            f"region `{self.fqn}`, saved tensor {first.slot + 1} of {num}: forward {expected}, "
            f"recomputed {got}."
        )
        if first.site.location:
            text += (
                f" First operator that differs: {first.site.expression} ({first.site.location})."
            )
        text += (
            " The forward must repeat exactly: check autocast, globals and randomness that the "
            "region reads, or use wrappers.register_ambient for such state."
        )
        return RecomputeMismatchError(
            text + self._trace_text(),
            fqn=self.fqn,
            slot=first.slot,
            num_slots=num,
            num_recomputed=fill.num_saved,
            expected=expected,
            got=got,
            operator=first.site.expression,
            location=first.site.location,
        )

    def _count_error(self, fill: _Fill) -> CheckpointError:
        num = len(self.slots)
        return RecomputeMismatchError(
            f"region `{self.fqn}`: the forward saved {num} tensors, the recompute "
            f"{fill.num_saved}. The region took another way through its code: check what its "
            "branches and loops depend on." + self._trace_text(),
            fqn=self.fqn,
            num_slots=num,
            num_recomputed=fill.num_saved,
            expected=f"{num} saved tensors",
            got=f"{fill.num_saved} saved tensors",
        )

    def _changed_error(self, mismatch: verify.Mismatch) -> CheckpointError:
        state = self.module_state
        name = (state.name_of(mismatch.tensor) if state else "") or (
            f"the {verify.to_text(mismatch.got)} tensor that {mismatch.site.expression} reads "
            f"({mismatch.site.location})"
        )
        return InputChangedError(
            f"region `{self.fqn}`, saved tensor {mismatch.slot + 1} of {len(self.slots)}: {name} "
            "was changed in place between forward and backward, so a recompute would use other "
            "values than the forward did. Run backward before the update, or make it out of "
            "place.",
            fqn=self.fqn,
            tensor=name,
        )

    def _trace_text(self) -> str:
        if self._trace is None:
            return " Pass debug=True to compare the operators of both runs."
        return "\n" + self._trace.report()


class _Fill:
    """Puts the tensors that one rerun saves into the slots of a frame.

    Attributes:
        mismatches: Tensors that differ from the forward's.
        num_saved: How many tensors the rerun has saved; known when it is over.
    """

    __slots__ = ("_frame", "_tensors", "mismatches", "num_saved")

    def __init__(self, frame: RerunFrame, tensors: list[Tensor]) -> None:
        self._frame = frame
        # Where no hooks were around the region, its inputs come back as they were.
        self._tensors = [(t, _torch.version(t)) for t in tensors if frame._input_versions]
        self.mismatches: list[verify.Mismatch] = []
        self.num_saved = 0

    def make_pack(self, last: int) -> tuple[Callable[[Tensor], Any], Callable[[], None]]:
        """Make the pack hook of the rerun. See [Note: hooks are closures].

        Args:
            last: Position of the last slot that has to be filled.

        Returns:
            The hook, and a function to be called when the rerun is over.
        """
        frame: Any = self._frame
        me: Any = self
        slots, described, check = frame.slots, frame.described, frame._describe is not None
        num_slots = len(slots)
        stop_after = last if frame._early_stop else sys.maxsize
        start = _torch.next_sequence_number()
        is_used = frame.runs_backward
        # In anomaly mode a node keeps the node during whose backward it was made: a cycle.
        detaches = torch.is_anomaly_enabled()
        count = 0

        def pack(tensor: Tensor) -> Tensor | weakref.ref[Slot] | None:
            nonlocal count
            index = count
            count += 1
            if index >= num_slots:
                return tensor.detach() if is_used else None
            packed = slots[index]
            slot = packed()
            if slot is not None:
                version = tensor._version
                if check:
                    try:
                        is_same = described[index] == (
                            tensor.shape,
                            tensor.dtype,
                            tensor.device,
                            version,
                        )
                    except RuntimeError:  # a tensor without a shape
                        is_same = False
                    if not is_same:
                        me._look_closer(index, tensor)
                slot.value = tensor.detach() if detaches else tensor
                slot.version = version
            if index >= stop_after and not (index == last and frame.is_last_node(tensor, start)):
                raise StopRerun.of(frame)  # no local: it would be a cycle with the traceback
            return tensor.detach() if is_used else packed

        def finish() -> None:
            nonlocal frame, me, slots, described
            me.num_saved = count
            # The rerun's graph keeps the hook, and the user may keep the graph: let go of all.
            frame = me = slots = described = None

        return pack, finish

    def _look_closer(self, index: int, tensor: Tensor) -> None:
        """Compare in full a tensor that is not described like the forward's at first sight."""
        frame = self._frame
        expected, got = frame.described[index], frame._describe(tensor)  # type: ignore[misc]
        if got == expected:
            return
        if verify.is_only_version(expected, got) and frame.may_differ(
            tensor, got[3] - expected[3], self._tensors
        ):
            return
        # Detached: its graph keeps this hook alive, and so would a cycle that nobody sees.
        tensor = tensor.detach()
        self.mismatches.append(verify.Mismatch(index, expected, got, tensor, verify.current_site()))


def run_no_reentrant(
    region: Region,
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owner: nn.Module | None = None,
) -> Any:
    """Run a region whose saved tensors come back by a rerun."""
    return RerunFrame(region, function, args, kwargs, owner).run_forward(args, kwargs)


_torch.hide_from_compiler(RerunFrame.make_pack, RerunFrame._unpack, _Fill.make_pack)
