"""REPLAY: record the operators of the forward; execute only those that missing slots depend on.

    forward                                    backward
    -------                                    --------
    hold the inputs                            unpack hook: the slot is empty  [4]
    function runs under the recorder and         -> the operators that it depends on, in order,
    the hook pair                                   without grad mode  [5]
      recorder: operator -> value  [1]              result -> the slots that wait for it  [6]
      pack hook: tensor -> slot of a value  [2]     value without a use left: let go  [7]
    sweep: what is needed at all?  [3]         unpack hook: take the tensor out  [8]

[1] See :mod:`wrappers.engine.record`. What is held goes through autograd's own SavedTensor if a
    region surrounds this one, so that it is hidden (rule 2), kept outputs included.
[2] A saved tensor that is held needs no replay: an input, a parameter, what the policy keeps.
[3] Backward through all slots marks operators and counts the uses of each value. Held values that
    nothing needs are let go, whatever the policy said.
[4] Each unpack executes what *this* slot needs and has not been executed yet. So where kept
    outputs cut the region, its parts come back one after another, and do not wait for each other
    in memory. A region of a few bytes comes back at once.
[5] No function of the user's runs again, no graph is built, nothing that is not needed runs.
[6] Also those that nobody has asked for yet: no operator runs twice in one backward.
[7] At the last of the uses that the sweep has counted. Kept outputs belong to the slots that
    depend on them, and die with these, so with the graph's nodes.
[8] The slot is empty again, also with ``retain_graph=True`` (rule 4). If its operators have run
    already, the next unpack begins a new round.

Autograd itself puts an unpacked tensor back to its place in the forward's graph, so double backward
needs nothing else: its nodes unpack the same slots again.

[Note: trust]

A region's first replay is compared with a rerun, bit by bit, where two reruns agree
themselves (``verify="first"``). If it differs, backward gets the rerun's tensors, and the
region falls back: it is rerun from then on. Where the rerun has chosen (top-k) otherwise than the
forward, it says nothing about the replay, which has kept the choice. A region also falls back as
soon as the recorder has seen something that it cannot follow; in the forward at hand, what was not
understood is held.

A fallback changes what a region saves, and a region around it that reruns expects the same again.
So a forward sees no fallback that happens while it runs, and a rerun those before its forward
(``Frame.as_of``).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _device, _knobs, _torch, _tree
from wrappers.engine import holders
from wrappers.engine.ambient import Undo, enter_kernels, leave
from wrappers.engine.frame import (
    Function,
    backwards_of_thread,
    enter_forward,
    enter_recompute,
    leave_forward,
    leave_recompute,
    module_of,
    visible_fallbacks,
)
from wrappers.engine.holders import (
    Held,
    Hidden,
    Holder,
    Kept,
    KeptElsewhere,
    Owned,
    Unchecked,
    num_bytes,
)
from wrappers.engine.module_state import name_in
from wrappers.engine.operators import Operator
from wrappers.engine.record import HOLE, Recorder, Rules, num_calls
from wrappers.engine.region import Region, RegionStats
from wrappers.engine.rerun import run_no_reentrant
from wrappers.engine.witness import Witness, WitnessFrame, set_random_state
from wrappers.errors import CheckpointError, InputChangedError, OffloadError


class _Slot:
    """The place of one saved tensor.

    Attributes:
        keeps: What holds the kept outputs that its recompute needs.
        index: The number of its value.
        at: How many operators had been recorded when it was saved; not there if no operator had
            written in place until then.
        value: The tensor, between recompute and unpack.
        witness: The slot of the rerun that checks this one; see [Note: trust].
    """

    __slots__ = ("__weakref__", "at", "index", "keeps", "value", "witness")

    at: int
    index: int
    keeps: list[Holder]
    value: Tensor
    witness: Witness


class ReplayFrame:
    """One forward execution whose saved tensors are recomputed by its recorded operators."""

    __slots__ = (
        "__weakref__",
        "_backwards",
        "_base_uses",
        "_blank_slots",
        "_choices",
        "_depends",
        "_done",
        "_held",
        "_input_bytes",
        "_is_at_once",
        "_is_forward_over",
        "_is_hidden",
        "_kernels",
        "_live",
        "_lock",
        "_made",
        "_needed",
        "_num_inputs",
        "_offloader",
        "_operators",
        "_owner",
        "_pack",
        "_random_states",
        "_recorder",
        "_roots",
        "_scratch",
        "_sites",
        "_uses",
        "_waiting",
        "_witness",
        "_writes",
        "region",
        "slots",
        "stats",
    )

    def __init__(self, region: Region, owner: nn.Module | None) -> None:
        self.region = region
        self.slots: list[weakref.ref[_Slot]] = []
        self.stats = RegionStats()
        self._owner = owner
        self._is_hidden = _torch.has_saved_tensors_hooks()
        self._is_forward_over = False
        self._kernels = _torch.settings()[2]
        self._backwards = backwards_of_thread()
        #: The pack hook, while it is pushed.
        self._pack: Callable[[Tensor], Any] | None = None
        self._lock = RLock()
        self._offloader: holders.Offloader | None = None
        self._is_at_once = False
        #: Slots of memory that nobody had written when it was saved, and what it is.
        self._blank_slots: list[tuple[_Slot, Tensor]] = []
        self._witness: WitnessFrame | None = None
        #: What a rerun must choose too, if it is to tell anything about this replay.
        self._choices: list[Witness] = []

    @property
    def fqn(self) -> str:
        """Name of the region."""
        return self.region.fqn

    @property
    def _mode(self) -> bool | None:
        """The training mode of the region's module, if it has one."""
        return None if self._owner is None else self._owner.training

    # --- For a look from outside, when the forward is over

    @property
    def recording(self) -> tuple[list[Any], dict[int, int], dict[int, list[int]]]:
        """The recorded operators, the roots of values, and who has written to which root."""
        return self._operators, self._roots, self._writes

    @property
    def needed(self) -> list[int]:
        """Positions of the operators that backward executes."""
        return self._needed

    @property
    def random_state_bytes(self) -> int:
        """Bytes of the generators' states that wait for backward."""
        found = self._random_states.values()
        return sum(state.nbytes for states in found for _, state in states)

    @property
    def saved_values(self) -> list[int]:
        """The values that autograd has saved and that are not held."""
        return list(self._waiting)

    # --- Forward

    def run_forward(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function so that the graph keeps slots where it would keep tensors."""
        region = self.region
        is_witnessed = region.should_verify()
        self._recorder = recorder = Recorder(
            _rules_of(region, self._mode),
            self._hold,
            self._keep,
            keeps_plainly=not (self._is_hidden or region.allow_cache_entry_mutation),
            traces=is_witnessed,
        )
        self._share(recorder)
        tensors = _tree.flatten_call(args, kwargs)[0]
        inputs = [recorder.hold_input(tensor) for tensor in tensors]
        self._num_inputs = len(inputs)
        self._input_bytes = sum(map(_torch.storage_bytes, tensors))
        del tensors
        start = _torch.next_sequence_number()
        pack = self._make_pack(recorder)
        saved_bytes: dict[int, int] | None = None
        if is_witnessed:
            held_inputs = [self._held[value] for value in inputs]
            witness = WitnessFrame(
                region.for_witness(), function, args, kwargs, self._owner, inputs=held_inputs
            )
            self._witness = witness
            pack = self._make_witnessed_pack(pack, witness.make_pack())
        if region.experience.measured is None:
            saved_bytes = {}
            pack = self._make_measuring_pack(pack, saved_bytes)
        self._pack = pack
        _torch.push_saved_tensors_hooks(pack, self._unpack)
        as_of = enter_forward(visible_fallbacks())
        try:
            with recorder:
                out = function(*args, **kwargs)
        except BaseException as error:
            del self._recorder  # They refer to each other.
            if isinstance(error, TypeError) and recorder.error is not None:
                raise recorder.error from None
            raise
        finally:
            self._pack = None
            leave_forward(as_of)
            _torch.pop_saved_tensors_hooks()
        self._is_forward_over = True
        if self._witness is not None:
            self._witness.end_forward(start)
            if not self._can_rerun(recorder.written_outside):
                self._witness = None
                region.note_verified("it changes tensors from outside, a rerun would do it again")
        self._finish(recorder, saved_bytes)
        return out

    def _can_rerun(self, written: list[Tensor]) -> bool:
        """Whether a rerun leaves alone what the forward has changed outside: a module's buffers."""
        if not written:
            return True
        buffers = list(self._owner.buffers()) if self._owner is not None else []
        return all(any(_torch.is_same_storage(t, b) for b in buffers) for t in written)

    def _share(self, recorder: Recorder) -> None:
        self._operators = recorder.operators
        self._made = recorder.made
        self._held = recorder.held
        self._roots = recorder.roots
        self._writes = recorder.writes
        self._random_states = recorder.random_states
        self._scratch = recorder.scratch
        self._sites = recorder.sites

    def _hold(self, tensor: Tensor) -> Holder:
        """Keep a tensor from outside of the region. See [1]."""
        if self._pack is not None and _torch.has_graph(tensor):
            # Made inside, its graph holds this frame: both would hold each other through C++.
            tensor = _torch.detach_hidden(tensor)
        return self._hide(tensor)

    def _hide(self, tensor: Tensor) -> Holder:
        # Autograd refuses to save what was born in inference mode, and nothing else could hide it.
        if not self._is_hidden or tensor.is_inference():
            return Held(tensor)
        if self._pack is None:
            return Hidden(tensor)
        pairs = _torch.pop_hooks_down_to(self._pack)
        try:
            with _torch.disable_dispatch_modes():
                return Hidden(tensor)
        finally:
            for pair in reversed(pairs):
                _torch.push_saved_tensors_hooks(*pair)

    def _keep(self, tensor: Tensor, facts: Operator, offload: bool) -> Holder:
        """Keep what an operator has just returned."""
        # Else the region around brings it back; or changes are to be seen.
        if offload and not (self._is_hidden or self.region.allow_cache_entry_mutation):
            holder = self._offload(tensor)
            if holder is not None:
                self.stats.num_offloaded += 1
                return KeptElsewhere(holder, facts.name, is_offloaded=True)
        if self.region.allow_cache_entry_mutation:
            return Unchecked(tensor)
        return KeptElsewhere(self._hide(tensor), facts.name)

    def _offload(self, tensor: Tensor) -> Holder | None:
        if self._offloader is None:
            self._offloader = holders.make_offloader(self.fqn, id(self.region))
        holder = self._offloader(tensor) if self._offloader is not None else None
        if holder is None and (self._offloader is None or _device.is_host(tensor)):
            self.region.warn_nothing_to_offload()
        return holder

    def _make_pack(self, recorder: Recorder) -> Callable[[Tensor], Any]:
        """The pack hook. See [Note: hooks are closures] in :mod:`wrappers.engine.rerun`."""
        known, held = recorder.known, recorder.held
        operators, writes, add_saved = recorder.operators, recorder.writes, recorder.saved.add
        add_slot, new, ref = self.slots.append, _Slot, weakref.ref
        pack_otherwise, pack_held = self._pack_otherwise, self._pack_held

        def pack(tensor: Tensor) -> Any:
            entry = known.get(id(tensor))
            if entry is None or entry[0]() is not tensor or entry[2] != tensor._version:
                return pack_otherwise(tensor)
            index = entry[1]
            holder = held.get(index)
            if holder is not None:
                if type(holder) is Kept:
                    add_saved(index)
                    return holder
                return pack_held(index, tensor)
            slot = new()
            slot.index = index
            if writes:
                slot.at = len(operators)
            add_slot(ref(slot))
            return slot

        return pack

    def _pack_otherwise(self, tensor: Tensor) -> Any:
        recorder = self._recorder
        if recorder.is_stopped and not recorder.is_known(tensor):
            return self._hold(tensor)
        if recorder.is_blank(tensor):
            # The operator that saves it is about to write it, or nobody who can be seen has.
            value = recorder.value_of(tensor)
            at = sys.maxsize
        else:
            value = recorder.value_read(tensor)
            at = len(recorder.operators)
        if value in self._held:
            return self._pack_held(value, tensor)
        slot = _Slot()
        slot.index = value
        slot.at = at
        self.slots.append(weakref.ref(slot))
        if at == sys.maxsize:
            self._blank_slots.append((slot, _torch.detach_hidden(tensor)))
        return slot

    def _pack_held(self, value: int, tensor: Tensor) -> Holder:
        """What the graph keeps of a held value: its holder, which it so may outlive."""
        self._recorder.saved.add(value)
        holder = self._held[value]
        if isinstance(holder, KeptElsewhere) and holder.is_offloaded:
            holder.num_uses += 1
        elif self._is_hidden:
            # One of its own, as each unpack asks the region around this one for it.
            return self._hold(tensor)
        return holder

    def _make_witnessed_pack(
        self, pack: Callable[[Tensor], Any], pack_for_witness: Callable[[Tensor], Any]
    ) -> Callable[[Tensor], Any]:
        """The pack hook of a forward whose replay is to be checked."""

        def witnessed_pack(tensor: Tensor) -> Any:
            packed = pack(tensor)
            witness = pack_for_witness(tensor)
            # A rerun saves a blank one before anything is written to it.
            if type(packed) is _Slot and getattr(packed, "at", 0) != sys.maxsize:
                packed.witness = witness
            elif self._is_choice(tensor):
                witness.expected = tensor
                self._choices.append(witness)
            return packed

        return witnessed_pack

    def _is_choice(self, tensor: Tensor) -> bool:
        """Whether a tensor that autograd has just saved says what an operator has chosen."""
        entry = self._recorder.known.get(id(tensor))
        return (
            entry is not None
            and not (tensor.is_floating_point() or tensor.requires_grad)
            and self._is_kept_choice(entry[1])
        )

    def _is_kept_choice(self, value: int) -> bool:
        """Whether a value looks into what an operator has chosen and the region keeps."""
        root = self._roots.get(value, value)
        position = self._made[root]
        return position >= 0 and root in self._held and self._operators[position][0].is_choice

    def _make_measuring_pack(
        self, pack: Callable[[Tensor], Any], saved_bytes: dict[int, int]
    ) -> Callable[[Tensor], Any]:
        """The pack hook of a forward that notes the bytes of each root that autograd saves."""
        roots, made = self._roots, self._made

        def measuring_pack(tensor: Tensor) -> Any:
            packed = pack(tensor)
            if type(packed) is _Slot:
                root = roots.get(packed.index, packed.index)
                if made[root] >= 0:
                    saved_bytes[root] = _torch.storage_bytes(tensor)
            return packed

        return measuring_pack

    def _finish(self, recorder: Recorder, saved_bytes: dict[int, int] | None) -> None:
        """Drop what was for the forward only; let go of what is held for nothing. See [3]."""
        region, experience, stats, held = (
            self.region,
            self.region.experience,
            self.stats,
            self._held,
        )
        del self._recorder
        has_held_slots = False
        for slot, tensor in self._blank_slots:
            root = self._roots.get(slot.index, slot.index)
            if root not in self._writes:
                if root not in recorder.written:
                    recorder.note_blank()
                slot.index = recorder.hold(tensor)
                has_held_slots = True
        self._blank_slots.clear()
        if recorder.written_outside:
            self._cut_graphs(recorder)
        stats.num_operators = len(self._operators)
        experience.stats = stats
        measured = experience.measured
        is_simple = not (
            self._writes
            or has_held_slots
            or recorder.written_outside
            or stats.num_offloaded
            or experience.off_plan  # The first call tells nothing about this one.
        )
        if is_simple and measured is not None and self._is_small(measured):
            # It is replayed at once, so there is nothing to plan and little to let go.
            self._is_at_once = True
            stats.num_needed, stats.num_kept = measured.num_needed, measured.num_kept
            for value in experience.unneeded:
                if value in recorder.kept and value not in recorder.saved:
                    # If this forward does need it, it is made again.
                    del held[value]
        else:
            self._plan()
            self._let_go(recorder, saved_bytes)
        policy = recorder.policy
        has_matched = bool(recorder.kept) or recorder.has_matched
        if policy is not None and policy.expects_match and not has_matched:
            names = [recorded[0].name for recorded in self._operators]
            region.note_unmatched(dict.fromkeys(names))
        if recorder.reason:
            region.fall_back(recorder.reason)
        if policy is not None and policy.expected_calls and not recorder.is_stopped:
            region.compare_with_plan(num_calls(self._operators), self._mode)

    def _cut_graphs(self, recorder: Recorder) -> None:
        """Let no tensor from outside that the region has written to hold the graph of the write."""
        for value in recorder.outside & self._held.keys():
            holder = self._held[value]
            if type(holder) is Held and _torch.has_graph(holder.tensor):
                tensor = holder.tensor
                if any(_torch.is_same_storage(tensor, t) for t in recorder.written_outside):
                    holder.tensor = _torch.detach_hidden(tensor)

    def _is_small(self, measured: RegionStats) -> bool:
        """Whether the region's bytes do not matter, as far as its first call tells."""
        return (
            measured.num_bytes <= _knobs.REPLAY_AT_ONCE_BYTES
            and self._input_bytes <= measured.input_bytes
        )

    def _let_go(self, recorder: Recorder, saved_bytes: dict[int, int] | None) -> None:
        """Let go of what is held for nothing; count, and measure in a first call."""
        held, stats, uses = self._held, self.stats, self._base_uses
        kept = [v for v in recorder.kept if uses[v] or v in recorder.saved]
        stats.num_needed = len(self._needed)
        stats.num_kept = len({self._made[v] for v in kept}) if kept else 0
        if saved_bytes is not None:
            kept_roots = {self._roots.get(v, v) for v in kept}
            stats.kept_bytes = sum(num_bytes(held[v]) for v in kept)
            stats.released_bytes = sum(n for r, n in saved_bytes.items() if r not in kept_roots)
            stats.input_bytes = self._input_bytes
            stats.num_bytes = stats.kept_bytes + stats.released_bytes
            self.region.experience.measured = stats
            self.region.experience.unneeded = [
                v
                for v in recorder.kept
                if v not in kept and self._made[v] >= 0 and self._is_repeatable(v)
            ]
        for value in [v for v in held if not uses[v] and v not in self._waiting]:
            # What offloaded outputs were computed from stays, in case one does not come back.
            if stats.num_offloaded and (self._made[value] < 0 or value in recorder.saved):
                continue
            del held[value]
        if stats.num_offloaded:
            for value in kept:
                holder = held.get(value)
                if isinstance(holder, KeptElsewhere):
                    holder.num_uses += uses[value]
        if kept:
            self._give_to_slots(kept)

    def _is_repeatable(self, value: int) -> bool:
        facts = self._operators[self._made[value]][0]
        return not (facts.is_collective or facts.is_choice)

    def _give_to_slots(self, kept: list[int]) -> None:
        """Let each kept output die with the last of the slots that depend on it."""
        held, roots = self._held, self._roots
        kept = [value for value in kept if value in held]
        #: By value: the kept outputs that it is made from, one bit each.
        sources = {value: 1 << bit for bit, value in enumerate(kept)}
        mask_of: dict[int, int] = {}
        for position in self._needed:
            _, values, _, _, made = self._operators[position]
            mask = 0
            for value in values:
                mask |= sources.get(value, 0) | sources.get(roots.get(value, value), 0)
            for other in self._depends.get(position, ()):
                mask |= mask_of.get(other, 0)
            if not mask:
                continue
            mask_of[position] = mask
            for value in (made,) if type(made) is int else made:
                sources[value] = mask
            for value in values if self._writes else ():
                root = roots.get(value, value)
                if position in self._writes.get(root, ()):
                    sources[root] = sources.get(root, 0) | mask
        for reference in self.slots:
            slot = reference()
            if slot is None:
                continue
            index = slot.index
            mask = sources.get(index, 0) | sources.get(roots.get(index, index), 0)
            if mask:
                slot.keeps = [held[value] for bit, value in enumerate(kept) if mask >> bit & 1]
        for value in kept:
            held[value] = Owned(held[value])

    # --- Plan

    def _plan(self) -> None:
        """Find out which operators are needed, and how often each value is used."""
        operators, held, made = self._operators, self._held, self._made
        writes, roots = self._writes, self._roots
        num = len(operators)
        self._base_uses = uses = [0] * len(made)
        self._waiting = waiting = {}  # type: dict[int, list[weakref.ref[_Slot]]]
        forced = bytearray(num)
        for ref in self.slots:
            slot = ref()
            if slot is None:
                continue
            index = slot.index
            if index in waiting:
                waiting[index].append(ref)
            else:
                waiting[index] = [ref]
            if writes:
                root = roots.get(index, index)
                if root in writes:
                    uses[index] += 1
                    for position in self._writes_before(slot):
                        forced[position] = 1
        needed: list[int] = []
        for position in range(num - 1, -1, -1):
            _, values, _, _, made_here = operators[position]
            if type(made_here) is int:
                is_needed = (uses[made_here] or made_here in waiting) and made_here not in held
            else:
                is_needed = any(
                    (uses[v] or v in waiting) and v not in held for v in made_here if v >= 0
                )
            if is_needed or forced[position]:
                needed.append(position)
                for value in values:
                    uses[value] += 1
                if writes:
                    for value in values:
                        for write in writes.get(roots.get(value, value), ()):
                            if write < position:
                                forced[write] = 1
        needed.reverse()
        self._needed = needed
        self._depends = self._dependencies(needed) if writes else {}
        self._begin_round()

    def _dependencies(self, needed: list[int]) -> dict[int, list[int]]:
        """What needed operators that touch written memory wait for, besides their arguments.

        A reader waits for the writes before it, a write for whatever has touched the memory.
        """
        roots, writes = self._roots, self._writes
        touched: dict[int, list[tuple[int, bool]]] = {}
        depends: dict[int, list[int]] = {}
        for position in needed:
            found = {roots.get(v, v) for v in self._operators[position][1]} & writes.keys()
            for root in found:
                is_write = position in writes[root]
                before = touched.setdefault(root, [])
                depends.setdefault(position, []).extend(
                    other for other, other_writes in before if is_write or other_writes
                )
                before.append((position, is_write))
        return depends

    def _begin_round(self) -> None:
        self._done = bytearray(len(self._operators))
        self._uses = self._base_uses.copy()
        #: By value: the tensor, from its making to its last use.
        self._live: list[Tensor | None] = [None] * len(self._base_uses)

    def _missing(self, slot: _Slot) -> list[int]:
        """The operators that a slot needs and that have not run in this round, in order."""
        for _ in range(2):
            missing: set[int] = set()
            values = [slot.index]
            positions = self._writes_before(slot)
            is_consistent = True
            while values or positions:
                if positions:
                    position = positions.pop()
                    if position in missing or self._done[position]:
                        continue
                else:
                    value = values.pop()
                    if self._live[value] is not None or value in self._held:
                        continue
                    position = self._made[value]
                    if position in missing:
                        continue
                    if self._done[position]:  # and its result is gone
                        is_consistent = False
                        break
                missing.add(position)
                values.extend(self._operators[position][1])
                if self._depends:
                    positions.extend(self._depends.get(position, ()))
            if is_consistent:
                return sorted(missing)
            self._begin_round()
        raise AssertionError("a new round has operators that have run already")

    def _writes_before(self, slot: _Slot) -> list[int]:
        if not self._writes:
            return []
        root = self._roots.get(slot.index, slot.index)
        at = getattr(slot, "at", 0)
        return [position for position in self._writes.get(root, ()) if position < at]

    # --- Backward

    def _unpack(self, packed: Any) -> Tensor:
        kind = type(packed)
        if kind is not _Slot:
            if kind is Kept and packed.tensor._version == packed.version:
                return packed.tensor  # type: ignore[no-any-return]
            return self._unpack_held(packed)
        try:
            value: Tensor = packed.value
            del packed.value
        except AttributeError:
            return self._recompute(packed)
        return value

    def _recompute(self, slot: _Slot) -> Tensor:
        """Bring the tensor of an empty slot back."""
        with self._lock:
            if not self._is_forward_over:
                self._note_backward()
                self._plan()
            elif self._witness is not None:
                self._verify()
            return self._take(slot)

    def _note_backward(self) -> None:
        """Let the regions around know that a backward runs in their forward (rule 6)."""
        if self._witness is not None:
            self._witness.note_backward()
        else:
            self._backwards.num += 1

    def _take(self, slot: _Slot) -> Tensor:
        """Take the tensor of a slot out, after the operators that it needs have run."""
        value: Tensor
        if hasattr(slot, "value"):  # Another thread has been faster.
            value = slot.value
            del slot.value
            return value
        index = slot.index
        if index in self._held:
            return self._unpack_held(self._held[index])
        is_written = bool(self._writes) and self._is_written(slot)
        if self._is_at_once:
            self._execute_at_once()
        else:
            missing = self._missing(slot)
            if missing:
                self._execute(missing)
        if hasattr(slot, "value"):
            value = slot.value
            del slot.value
            return value
        tensor = self._live[index]
        if not is_written and tensor is not None:
            return tensor  # Unpacked again while an operator to come needs the value too.
        assert tensor is not None, "a slot's value was let go before it was taken"
        self._uses[index] -= 1
        if not self._uses[index]:
            self._live[index] = None
        return tensor

    def _is_written(self, slot: _Slot) -> bool:
        """Whether a slot's memory is written to by recorded operators.

        Raises:
            CheckpointError: It is also written to after autograd has saved it.
        """
        writes = self._writes.get(self._roots.get(slot.index, slot.index))
        if not writes:
            return False
        at = getattr(slot, "at", 0)
        later = [position for position in writes if position >= at]
        if later:
            raise CheckpointError(
                f"region `{self.fqn}`: one of the variables needed for gradient computation has "
                f"been modified by an inplace operation: {self._operators[later[0]][0].name} has "
                "changed it after another operator had saved it. The region would fail without "
                "checkpointing too.",
                fqn=self.fqn,
            )
        return True

    def _unpack_held(self, holder: Holder) -> Tensor:
        if type(holder) is Owned:
            holder = holder.holder
        try:
            return holder.unpack()
        except OffloadError as error:
            return self._rebuild(holder, error)
        except RuntimeError as error:
            explained = self._explain(holder, error)
            if explained is error:
                raise
            raise explained from error

    def _rebuild(self, holder: Holder, error: OffloadError) -> Tensor:
        """Compute an offloaded output again that did not come back; raise if that is impossible."""
        wanted = [v for v, h in self._held.items() if h is holder or _is_owned(h, holder)]
        positions = self._ancestors(wanted)
        if not positions:
            raise error
        results: dict[int, Tensor] = {}
        with self._lock, _Replaying(self._kernels):
            for position in sorted(positions):
                values, made = self._operators[position][1], self._operators[position][4]
                tensors = [
                    results[v] if v in results else self._unpack_held(self._held[v]) for v in values
                ]
                out = self._run(position, tensors)
                made = (made,) if type(made) is int else made
                results.update(zip(made, _tree.flatten(out)[0], strict=True))
        self.stats.num_replayed += len(positions)
        self.region.warn_not_back(error)
        return results[wanted[0]]

    def _ancestors(self, wanted: list[int]) -> set[int] | None:
        """The operators from what is held to some values; None if they cannot be run again."""
        positions: set[int] = set()
        values = list(wanted)
        while values:
            value = values.pop()
            position = self._made[value]
            if position < 0 or self._roots.get(value, value) in self._writes:
                return None  # It is gone, or is not what it was.
            facts = self._operators[position][0]
            if facts.is_collective or facts.is_choice:
                return None  # The other ranks would not join; or it might choose otherwise.
            if position not in positions:
                positions.add(position)
                values += [v for v in self._operators[position][1] if not self._is_there(v)]
        return positions

    def _is_there(self, value: int) -> bool:
        holder = self._held.get(value)
        return holder is not None and not (type(holder) is Owned and holder.is_gone)

    def _execute_at_once(self) -> None:
        """Fill all slots that are alive and empty; for a region whose bytes do not matter."""
        held, made_by = self._held, self._made
        slots = [slot for reference in self.slots if (slot := reference()) is not None]
        if self.stats.num_replayed:  # not the first time
            slots = [slot for slot in slots if not hasattr(slot, "value")]
        is_needed = bytearray(len(made_by))
        for slot in slots:
            is_needed[slot.index] = 1
        needed, positions = [], []
        position = len(self._operators)
        for recorded in reversed(self._operators):
            position -= 1
            made = recorded[4]
            if type(made) is int:
                if not is_needed[made] or made in held:
                    continue
            elif not any(is_needed[v] and v not in held for v in made if v >= 0):
                continue
            needed.append(recorded)
            positions.append(position)
            for value in recorded[1]:
                is_needed[value] = 1
        needed.reverse()
        positions.reverse()
        results: list[Any] = [None] * len(made_by)
        is_special = self._random_states or self._scratch
        position_of = iter(positions)
        with _Replaying(self._kernels):
            for facts, values, constants, kwargs, made in needed:
                tensors = []
                for value in values:
                    tensor = results[value]
                    if tensor is None:
                        holder = held[value]
                        if type(holder) is Kept and holder.tensor._version == holder.version:
                            tensor = holder.tensor
                        else:
                            tensor = results[value] = self._unpack_held(holder)
                    tensors.append(tensor)
                if is_special:
                    out = self._run(next(position_of), tensors)
                elif constants is None and not kwargs:
                    out = facts.call(*tensors)
                else:
                    out = _call(facts, constants, kwargs, tensors)
                if type(made) is int:
                    results[made] = out
                else:
                    for value, tensor in zip(made, _tree.flatten(out)[0], strict=True):
                        results[value] = tensor
        for slot in slots:
            slot.value = results[slot.index]
        self.stats.num_replayed += len(needed)

    def _run(self, position: int, tensors: list[Tensor]) -> Any:
        """Run one recorded operator."""
        facts, _, constants, kwargs, _ = self._operators[position]
        if position in self._random_states or position in self._scratch:
            return self._run_specially(position, tensors)
        return _call(facts, constants, kwargs, tensors)

    def _execute(self, positions: list[int]) -> None:
        """Run recorded operators. See [5] to [7]."""
        operators, done, uses = self._operators, self._done, self._uses
        live, held, waiting = self._live, self._held, self._waiting
        is_hidden = self._is_hidden
        with _Replaying(self._kernels):
            for position in positions:
                values, made = operators[position][1], operators[position][4]
                tensors = []
                for value in values:
                    tensor = live[value]
                    if tensor is None:
                        tensor = self._unpack_held(held[value])
                        if is_hidden and uses[value] > 1:
                            live[value] = tensor
                    tensors.append(tensor)
                out = self._run(position, tensors)
                done[position] = 1
                if type(made) is int:
                    if uses[made]:
                        live[made] = out
                    if made in waiting:
                        self._fill(made, out)
                elif made:
                    self._fill_results(made, out)
                for value in values:
                    left = uses[value] = uses[value] - 1
                    if not left:
                        live[value] = None
                # Nothing may outlive its last use through these names.
                tensors = out = tensor = None  # type: ignore[assignment]
        self.stats.num_replayed += len(positions)

    def _fill(self, index: int, tensor: Tensor) -> None:
        if self._writes and self._roots.get(index, index) in self._writes:
            return  # It may not be what it is to be yet: its slots take it from the live values.
        for ref in self._waiting[index]:
            slot = ref()
            if slot is not None:
                slot.value = tensor

    def _fill_results(self, made: tuple[int, ...], out: Any) -> None:
        for index, tensor in zip(made, _tree.flatten(out)[0], strict=True):
            if index < 0 or index in self._held:
                continue
            if self._uses[index]:
                self._live[index] = tensor
            if index in self._waiting:
                self._fill(index, tensor)

    def _run_specially(self, position: int, tensors: list[Tensor]) -> Any:
        """Run an operator that draws random numbers, or changes arguments from outside."""
        facts, values, constants, kwargs, _ = self._operators[position]
        scratch = self._scratch.get(position)
        if scratch:
            tensors = [
                t.clone() if v in scratch else t for v, t in zip(values, tensors, strict=True)
            ]
        undo: Undo = []
        try:
            for generator, state in self._random_states.get(position, ()):
                undo.append(set_random_state(generator, state))
            return _call(facts, constants, kwargs, tensors)
        finally:
            leave(undo)

    # --- The check; see [Note: trust]

    def _verify(self) -> None:
        """Compare the replay of all slots with a rerun; give them the rerun's where they differ."""
        witness, self._witness = self._witness, None
        choices, self._choices = self._choices, []
        assert witness is not None
        region = self.region
        checked: list[tuple[_Slot, Witness]] = []
        for ref in self.slots:
            slot = ref()
            if slot is None or not hasattr(slot, "witness"):
                continue
            checked.append((slot, slot.witness))
            slot.witness.expected = self._peek(slot)
            del slot.witness
        try:
            seen_by_rerun = [*(seen for _, seen in checked), *choices]
            differing = witness.differing(seen_by_rerun, self._own_generators())
        except InputChangedError:
            return  # It says nothing about replays.
        except Exception as error:  # of the user's code: what cannot run twice cannot be compared
            region.note_verified(f"a rerun differs from the forward: {error}")
            return
        wrong = [(slot, seen) for slot, seen in checked if seen in differing]
        has_chosen_otherwise = any(seen in differing for seen in choices)
        if has_chosen_otherwise or any(self._is_kept_choice(slot.index) for slot, _ in wrong):
            region.note_verified("a rerun chooses otherwise than the forward did")
            return
        if wrong:
            region.fall_back(self._difference(wrong[0][0]))
            self._is_at_once = False
        for slot, seen in wrong:
            # Held, as the graph may be retained.
            slot.index = len(self._made)
            self._made.append(-1)
            self._held[slot.index] = Held(seen.taken())
            if hasattr(slot, "value"):
                del slot.value
        if wrong:
            self._plan()
        region.note_verified()

    def _peek(self, slot: _Slot) -> Tensor | None:
        """The tensor of a slot, which stays in it."""
        try:
            tensor = self._take(slot)
        except CheckpointError:
            return None  # Backward will raise it if it wants this slot.
        slot.value = tensor
        return tensor

    def _own_generators(self) -> list[tuple[Any, Tensor]]:
        """The user's generators that operators draw from, with their states at the start."""
        found: dict[Any, Tensor] = {}
        for states in self._random_states.values():
            for generator, state in states:
                if isinstance(generator, torch.Generator) and (
                    generator is not torch.default_generator
                ):
                    found.setdefault(generator, state)
        return list(found.items())

    def _difference(self, slot: _Slot) -> str:
        index = slot.index
        position = self._made[index]
        if position < 0:
            return "a value from outside of the region differs in a rerun"
        name = self._operators[position][0].name
        site = self._sites.get(position) if self._sites else None
        where = f" ({site.location})" if site is not None and site.location else ""
        return f"its first replay gave another result of {name}{where} than a rerun did"

    # --- Errors

    def _explain(self, holder: Holder, error: RuntimeError) -> RuntimeError:
        """Turn autograd's complaint about a version into an error that names the tensor."""
        is_away = isinstance(holder, KeptElsewhere) and holder.is_offloaded
        if not (is_away and isinstance(error, InputChangedError)) and (
            isinstance(error, CheckpointError) or "inplace" not in str(error)
        ):
            return error
        if isinstance(holder, (Kept, KeptElsewhere)):
            return CheckpointError(
                f"region `{self.fqn}`: the output of {holder.name} that the policy keeps was "
                "changed in place before backward. Let the policy recompute this operator, change "
                "a copy, or pass allow_cache_entry_mutation=True if the change is meant to be "
                f"seen. The cause: {error}",
                fqn=self.fqn,
            )
        name = self._name_of(holder)
        return InputChangedError(
            f"region `{self.fqn}`: {name} was changed in place between forward and backward, so a "
            "recompute would use other values than the forward did. Run backward before the "
            f"update, or make it out of place. The cause: {error}",
            fqn=self.fqn,
            tensor=name,
        )

    def _name_of(self, holder: Holder) -> str:
        tensor = getattr(holder, "tensor", None)
        if self._owner is not None and tensor is not None:
            name = name_in(self._owner, tensor)
            if name:
                return name
        for value, other in self._held.items():
            if other is holder and value < self._num_inputs:
                return f"argument {value}"
        size = "" if tensor is None else f" of shape {tuple(tensor.shape)}"
        return f"a tensor{size} that the region reads"


def _is_owned(holder: Holder, by_slots: Holder) -> bool:
    return type(holder) is Owned and not holder.is_gone and holder.holder is by_slots


def _call(
    facts: Operator, constants: Any, kwargs: dict[str, Any] | None, tensors: list[Tensor]
) -> Any:
    """Call an operator with recorded arguments."""
    args: Any = tensors
    if type(constants) is tuple:
        rest = iter(tensors)
        args = [next(rest) if c is HOLE else c for c in constants]
    elif constants is not None:
        args, kwargs = constants(tensors)
    return facts.call(*args, **kwargs) if kwargs else facts.call(*args)


class _Replaying:
    """The surroundings of a replay: no graph, and the forward's kernels."""

    __slots__ = ("_kernels", "_undo", "_was_enabled")

    def __init__(self, kernels: tuple[Any, ...]) -> None:
        self._kernels = kernels
        self._undo: Undo = []

    def __enter__(self) -> None:
        self._was_enabled = torch.is_grad_enabled()
        _torch.set_grad_enabled(False)
        enter_recompute()
        enter_kernels(self._kernels, self._undo)

    def __exit__(self, *error: object) -> None:
        leave_recompute()
        _torch.set_grad_enabled(self._was_enabled)
        leave(self._undo)


#: For all regions that keep nothing of what their policies say.
_NO_POLICY = Rules(None)


def _rules_of(region: Region, mode: bool | None) -> Rules:
    if region.experience.off_plan and region.is_off_plan(mode, visible_fallbacks()):
        return _NO_POLICY
    if region.rules is None:
        region.rules = Rules(region.policy)
    return region.rules  # type: ignore[no-any-return]


_FSDP_INSIDE = "an FSDP module inside moves its parameters between forward and backward"


def _reason_against(function: Function, module: nn.Module | None) -> str:
    """Why a region cannot be replayed, as far as its modules show; empty if it can."""
    if module is None:
        return ""
    fsdp_types = _torch.fsdp_types()
    # A region around a module's forward alone leaves the module's hooks outside.
    outside = None if function is module or _torch.gathers_in_forward(module) else module
    for inside in module.modules():
        if fsdp_types and isinstance(inside, fsdp_types) and inside is not outside:
            return _FSDP_INSIDE
        if _torch.is_compiled(inside):
            return "compiled code inside runs without operators that could be recorded"
    return ""


def run_replay(
    region: Region,
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owner: nn.Module | None = None,
) -> Any:
    """Run a region whose saved tensors come back by its recorded operators."""
    if region.experience.fallen_at is None and (
        region.experience.stats is None or _torch.fsdp_types()
    ):
        reason = _reason_against(function, module_of(function, owner))
        if reason:
            region.fall_back(reason, keeps_policy=reason == _FSDP_INSIDE)
            return run_no_reentrant(region.substitute(), function, args, kwargs, owner)
    if region.is_fallen(visible_fallbacks()):
        return run_no_reentrant(region.substitute(), function, args, kwargs, owner)
    frame = ReplayFrame(region, module_of(function, owner))
    return frame.run_forward(function, args, kwargs)


_hidden = (f for n, f in vars(ReplayFrame).items() if callable(f) and n != "run_forward")
_torch.hide_from_compiler(*(f for f in _hidden if hasattr(f, "__code__")))
