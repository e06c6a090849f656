"""Record the operators of a forward: what each made, from what, and what is held for a replay.

A *value* is what one tensor held at one time; it has a number. A value is *held* if a tensor keeps
it until backward: region inputs, parameters, what comes in through a closure, and what a policy
keeps. Any other value is known by the operator that made it and can be made again.

    x ──► sin ──► 1 ──► mm(1, w) ──► 2 ──► add_(2, b)    0: x, held     operators: sin    0    -> 1
    0                      3                  4          3: w, held                mm     1, 3 -> 2
                                                         4: b, held                add_   2, 4

A tensor is recognised by its identity: under a dispatch mode, an operator's result is the very
object that autograd saves and that the next operator gets. Nothing here holds a recorded tensor:
beside each number stands a weak reference, which also tells when an ``id`` has been recycled.

[Note: writes]

An operator that changes a tensor in place writes to a *root*: the tensor that first had the memory.

* A root that an operator of the region has made is written again in the replay. Whoever reads this
  memory, through whatever view, runs between the same writes as in forward.
* A held root is written once, in forward, and never again: from then on its tensors are new held
  values. If operators have read it before, the old value is held too, as a copy.

[Note: what cannot be seen]

A kernel that torch does not know writes memory without an operator. It shows in one of these ways,
and each time the tensor is held as it is now, which is always right, and the region is told why
it should rather be rerun in its next forwards:

* an operator reads memory from ``empty`` that nobody has written;
* a version counter has moved without a write that was seen;
* a tensor was made inside the region by nobody.

What shows in none of them is found by the check of a region's first replay, if it can be made: not
where a rerun would change tensors from outside once more.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from wrappers import _device, _torch, _tree
from wrappers.engine import verify
from wrappers.engine.holders import Holder, Kept, Unchecked
from wrappers.engine.operators import Operator, facts_of
from wrappers.policies import Policy, Turns
from wrappers.policy import (
    KEPT,
    OFFLOADED,
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    SelectiveCheckpointContext,
)

#: Stands for a tensor among the arguments of a recorded operator.
HOLE = type("Hole", (), {"__repr__": lambda self: "HOLE"})()

#: Arguments of these types hold no tensor.
_CONSTANTS = _tree.ATOMS | {torch.dtype, torch.device, torch.layout, torch.memory_format}

#: Types of arguments that are no tensors, where lists have been looked into.
_PLAIN = _CONSTANTS | {list, tuple}

#: A recorded operator: facts, the values that it reads, its arguments without the tensors (None:
#: tensors only; a tuple with HOLEs; a function that builds (args, kwargs)), its keyword arguments
#: where no tensor is among them, and the numbers of the values that it made: one, or a tuple for
#: the flat results, with -1 for one that is not new.
Recorded = tuple[Operator, list[int], Any, Any, Any]


_ref = weakref.ref
_detach_in_handler = _torch.detach_in_handler

#: Stands for the version of a tensor that is another value since the last look at it. Right after
#: a write: the version before is taken off, as -1 - version.
_STALE = -(2**62)

#: Stands for the version of what ``detach`` returns, which has the counter of its base, or for
#: ``.data``, the same operator, one of its own: the next look tells.
_ANY = _STALE + 1


class Rule:
    """What a policy says about one operator, as far as that can be told beforehand.

    Attributes:
        facts: The facts about the operator.
        call: Calls it.
        is_fast: Whether a call needs no more than to be written down.
        answer: The policy's answer; None if it has no opinion, or if it is to be asked each time.
        turns: How the answer depends on the number of the call; None if it does not, or if the
            policy is to be asked each time.
        is_kept: Whether a result is kept; with ``turns``: whether it may be.
    """

    __slots__ = ("answer", "call", "facts", "is_fast", "is_kept", "is_view", "turns")

    def __init__(self, facts: Operator, policy: Policy | None) -> None:
        self.facts = facts
        self.call = facts.call
        self.answer: CheckpointPolicy | None = None
        self.turns: Turns | None = None
        is_told = policy is None or policy.is_static or policy.is_counting
        if policy is not None and is_told and facts.func not in SAC_IGNORED_OPS:
            self.turns = policy.turns_of(facts.func)
            if self.turns is None:
                context = SelectiveCheckpointContext(is_recompute=False)
                self.answer = policy.begin()(context, facts.func)
        self.is_kept = self.turns is not None or keeps_result(facts, self.answer)
        self.is_view = facts.is_view
        offloads = self.answer in OFFLOADED or (self.turns is not None and self.turns.offloads)
        is_simple = facts.is_plain or facts.is_plain_view
        # A choice is kept also where it is not its turn.
        is_simple = is_simple and not (self.turns is not None and facts.is_choice)
        self.is_fast = is_simple and is_told and not offloads


class Rules:
    """A policy's rules for all operators that have been seen; shared by all forwards."""

    __slots__ = ("by_id", "policy")

    def __init__(self, policy: Policy | None) -> None:
        self.policy = policy
        #: By the id of the operator, which its facts keep alive.
        self.by_id: dict[int, Rule] = {}

    def add(self, func: Any) -> Rule:
        """Make the rule for an operator."""
        rule = self.by_id[id(func)] = Rule(facts_of(func), self.policy)
        return rule


class Recorder(_torch.RecordingMode):
    """The dispatch mode of one forward.

    Args:
        rules: The policy's.
        hold: Makes the holder of a tensor; the tensor may have a graph.
        keep: Makes the holder of an operator's result: ``keep(tensor, facts, offload)``.
        keeps_plainly: Whether a result that stays on its device needs no more than a Kept.
        traces: Whether to note the sites of operators.

    Attributes:
        policy: The rules' policy.
        operators: What has been recorded, in order.
        made: By value: the position of the operator that made it, -1 for what came from outside.
        known: By ``id``: a weak reference to a tensor, its value, its version. After a write: the
            version before, as -1 - version. Where it is to be held anew: _STALE, or less. After a
            detach: _ANY.
        held: The holders, by value.
        kept: Which of the held values the policy has kept.
        saved: Which of the held values autograd has saved.
        roots: The root of each value that shares memory with an earlier one.
        writes: By root: positions of the operators that have written to it, in order.
        random_states: By position of an operator: the generators that it uses, and their states.
        scratch: Held values that the operators at these positions change: each gets a copy.
        reason: Why the region should be rerun from its next forward on; empty if it need not.
        is_stopped: Whether the rest of the forward is not recorded any more.
        error: The TypeError that a policy has raised: Python takes one that comes out of an
            operator like ``@`` for its own.
        sites: By position of an operator: where the user called it; only if asked for.
    """

    # On the class, as few forwards set them.
    error: TypeError | None = None
    has_matched = is_stopped = False
    reason = ""

    def __init__(
        self,
        rules: Rules,
        hold: Callable[[Tensor], Holder],
        keep: Callable[[Tensor, Operator, bool], Holder],
        *,
        keeps_plainly: bool,
        traces: bool = False,
    ) -> None:
        super().__init__()
        self._rules = rules.by_id
        self._all_rules = rules
        self.policy = policy = rules.policy
        is_told = policy is None or policy.is_static or policy.is_counting
        self._ask = None if is_told else policy.begin()  # type: ignore[union-attr]
        #: How many calls there have been so far, for rules with turns.
        self._num_calls: dict[Hashable, int] = {}
        self._hold = hold
        self._keep = keep
        self._keeps_plainly = keeps_plainly
        self.operators: list[Recorded] = []
        self.made: list[int] = []
        self.known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        #: The same for memory that nobody has written yet.
        self._blank: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        #: By ``id`` of a tensor inside a subclass: a reference to it, the subclass's value, name.
        self._inner: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self.held: dict[int, Holder] = {}
        self.kept: list[int] = []
        self.saved: set[int] = set()
        #: By ``id``: tensors that the policy keeps as an operator has left them.
        self._to_keep: dict[int, tuple[weakref.ref[Tensor], Operator, bool]] = {}
        #: Held values that were not made inside.
        self.outside: set[int] = set()
        #: Roots that operators have written to, held ones too.
        self.written: set[int] = set()
        #: Tensors from outside that the region changes.
        self.written_outside: list[Tensor] = []
        self.roots: dict[int, int] = {}
        self.writes: dict[int, list[int]] = {}
        self.random_states: dict[int, list[tuple[Any, Tensor]]] = {}
        self.scratch: dict[int, set[int]] = {}
        #: Whether no operator may be written down without a closer look.
        self._is_careful = traces
        self.sites: dict[int, verify.Site] | None = {} if traces else None
        self._start = _torch.next_sequence_number()

    # --- Operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = self._rules.get(id(func)) or self._all_rules.add(func)
        if not rule.is_fast or self._is_careful:
            return self._dispatch_otherwise(rule, args, kwargs or {})
        known = self.known
        values: list[int] = []
        try:
            for arg in args:
                entry: Any = known.get(id(arg))
                if entry is not None and entry[0]() is arg and entry[2] == arg._version:
                    values.append(entry[1])
                elif type(arg) is Parameter:
                    values.append(self.value_of(arg))
                elif type(arg) not in _CONSTANTS and not _is_constant(arg):
                    return self._dispatch_otherwise(rule, args, kwargs or {})
        except RuntimeError:  # born in inference mode, so without a version
            return self._dispatch_otherwise(rule, args, kwargs or {})
        if kwargs:
            for arg in kwargs.values():
                if type(arg) not in _CONSTANTS and not _is_constant(arg):
                    return self._dispatch_otherwise(rule, args, kwargs)
            out = rule.call(*args, **kwargs)
        else:
            out = rule.call(*args)
        made, operators = self.made, self.operators
        position, value = len(operators), len(made)
        constants = None
        if len(values) != len(args):
            constants = tuple([arg if type(arg) in _PLAIN else HOLE for arg in args])
        if type(out) is Tensor and not rule.is_view:
            # New memory is at version 0. If this were wrong, the next look would find out.
            known[id(out)] = (_ref(out), value, 0)
            made.append(position)
            operators.append((rule.facts, values, constants, kwargs, value))
            if rule.is_kept and (
                rule.turns is None or rule.turns.is_kept(self._number(rule.turns))
            ):
                if self._keeps_plainly:
                    try:
                        self.held[value] = Kept(_detach_in_handler(out), rule.facts.name)
                        self.kept.append(value)
                    except RuntimeError:  # born in inference mode
                        self._keep_result(value, out, rule.facts)
                else:
                    self._keep_result(value, out, rule.facts)
            return out
        root, version = -1, None
        if rule.is_view:
            root = self.roots.get(values[0], values[0])
            version = args[0]._version  # It is going to share the counter.
            if version and rule.facts.is_detach:
                version = _ANY
        is_kept = rule.is_kept
        if rule.turns is not None:
            is_kept = rule.turns.is_kept(self._number(rule.turns))
        results = []
        for tensor in out if type(out) in (tuple, list) else _tree.flatten(out)[0]:
            if tensor is None:
                continue
            value = self._new_value(tensor, position, version)
            results.append(value)
            if root >= 0:
                self.roots[value] = root
            elif is_kept:
                self._keep_result(value, tensor, rule.facts)
        numbers = results[0] if type(out) is Tensor else tuple(results)
        operators.append((rule.facts, values, constants, kwargs, numbers))
        return out

    def _dispatch_otherwise(self, rule: Rule, args: Any, kwargs: dict[str, Any]) -> Any:
        facts = rule.facts
        if facts.is_query:
            return facts.call(*args, **kwargs)
        if not self.is_stopped and facts.reason:
            self.stop(facts.reason)
        if self.is_stopped:
            for tensor in facts.written(args, kwargs) if facts.writes else ():
                if self._is_held(tensor):
                    self._save_old_value(tensor)
            return facts.call(*args, **kwargs)
        if facts.is_collective and facts.func.namespace == "c10d":
            return self._run_in_place_collective(facts, args, kwargs)
        position = len(self.operators)
        tensors, build = _tree.flatten_call(args, kwargs)
        written = facts.written(args, kwargs) if facts.writes else []
        values = [self._value_read(facts, tensor, written) for tensor in tensors]
        held_roots = [t for t in written if self._root(self.value_of(t)) in self.held]
        for tensor in held_roots:
            self._save_old_value(tensor)
        if facts.draws(args, kwargs):
            self.random_states[position] = _random_states(tensors, args, kwargs)
        # It runs again if it has other results: then on copies of what it may not change.
        is_mixed = _has_new_results(facts) or len(held_roots) < len(written)
        replaced = self._copy_written(held_roots) if is_mixed else {}
        out = facts.call(*args, **kwargs)
        answer = rule.answer
        if rule.turns is not None:
            answer = rule.turns.answer(self._number(rule.turns))
        elif self._ask is not None:
            answer = self._answer(facts, out, args, kwargs)
        values = [replaced.get(id(t), v) for t, v in zip(tensors, values, strict=True)]
        if replaced:
            self.scratch[position] = set(replaced.values())
        root, version, base = self._root_of_result(facts, args, kwargs, tensors, out)
        if facts.is_wait:
            entry = self.known.get(id(out))
            if entry is not None and entry[1] not in self.held:
                del self.known[id(out)]  # What is there after the wait is another value.
        results = self._add_results(out, root, version, base, is_blank=facts.is_uninitialized)
        self._add(facts, values, build, results, answer)
        for tensor in written:
            self._note_written(tensor, facts, position, answer)
        return out

    def _keep_result(
        self, value: int, tensor: Tensor, facts: Operator, offload: bool = False
    ) -> None:
        """Hold what an operator has returned, as the policy wants."""
        # Detached: autograd is about to give it a graph, which holds the frame.
        detached = _torch.detach_shallow(tensor)
        if tensor.is_inference():  # It has no version, and nobody may change it.
            self.held[value] = Unchecked(detached)
        elif self._keeps_plainly and not offload:
            self.held[value] = Kept(detached, facts.name)
        else:
            self.held[value] = self._keep(detached, facts, offload)
        self.kept.append(value)

    def _number(self, turns: Turns) -> int:
        """Count a call that has returned; its number."""
        number = self._num_calls.get(turns.counter, 0)
        self._num_calls[turns.counter] = number + 1
        return number

    def _answer(self, facts: Operator, out: Any, args: Any, kwargs: Any) -> Any:
        if facts.func in SAC_IGNORED_OPS:
            return None
        context = SelectiveCheckpointContext(is_recompute=False, op_output=out)
        try:
            return self._ask(context, facts.func, *args, **kwargs)  # type: ignore[misc]
        except TypeError as error:
            self.error = error
            raise

    def _add(
        self,
        facts: Operator,
        values: list[int],
        build: Any,
        results: list[tuple[int, Any]],
        answer: CheckpointPolicy | None,
    ) -> None:
        """Write an operator down."""
        if self.sites is not None:
            self.sites[len(self.operators)] = verify.current_site()
        numbers = tuple(value for value, _ in results)
        self.operators.append((facts, values, build, None, numbers))
        if not keeps_result(facts, answer) or (facts.is_view and not facts.is_collective):
            return
        if facts.is_uninitialized:  # There is nothing in it that could be kept.
            self.has_matched = True
            return
        for value, tensor in results:
            if value >= 0:
                self._keep_result(value, tensor, facts, answer in OFFLOADED)

    def _add_results(
        self,
        out: Any,
        root: int = -1,
        version: int | None = None,
        base: Tensor | None = None,
        *,
        is_blank: bool = False,
    ) -> list[tuple[int, Tensor]]:
        """Number what an operator that is about to be written down has returned.

        Args:
            out: What it has returned.
            root: The root whose memory the results share; -1 if they have their own.
            version: That of the tensor whose version counter they are going to share.
            base: Only results that share its memory are of this root, if it is given.
            is_blank: Whether nothing is in their memory yet.
        """
        position = len(self.operators)
        is_blank = is_blank or root in self._blank_roots()
        results: list[tuple[int, Tensor]] = []
        for tensor in _tree.flatten(out)[0]:
            entry = self.known.get(id(tensor)) or self._blank.get(id(tensor))
            if entry is not None and entry[0]() is tensor:
                results.append((-1, tensor))
                continue
            is_empty = is_blank and _torch.storage_bytes(tensor) == 0
            value = self._new_value(tensor, position, version, is_blank=is_blank and not is_empty)
            if root >= 0 and (base is None or _torch.is_same_storage(tensor, base)):
                self.roots[value] = root
            results.append((value, tensor))
        return results

    def _blank_roots(self) -> Iterable[int]:
        return {self._root(entry[1]) for entry in self._blank.values()} if self._blank else ()

    def _new_value(
        self, tensor: Tensor, position: int, version: int | None = None, *, is_blank: bool = False
    ) -> int:
        value = len(self.made)
        self.made.append(position)
        entries, others = self.known, self._blank
        if is_blank:
            entries, others = others, entries
        others.pop(id(tensor), None)  # It may be of a tensor that has died.
        if version is None:
            version = _torch.version(tensor)
        entries[id(tensor)] = (weakref.ref(tensor), value, version)
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            self._note_inner(tensor, value)
        return value

    def _note_inner(self, tensor: Tensor, value: int) -> None:
        """Note the tensors that a subclass is made of."""
        for name, inner in _torch.inner_tensors(tensor):
            self._inner[id(inner)] = (weakref.ref(inner), value, name)
            if name in _torch.JAGGED_IDENTITY:
                self._hold_identity(inner)

    def _hold_identity(self, tensor: Tensor) -> None:
        """Hold a tensor by which torch tells the sizes of jagged tensors: a copy will not do."""
        entry = self.known.get(id(tensor))
        if entry is not None and entry[0]() is tensor and entry[1] not in self.held:
            self.held[entry[1]] = self._hold(tensor)

    def _root_of_result(
        self, facts: Operator, args: Any, kwargs: Any, tensors: list[Tensor], out: Any
    ) -> tuple[int, int | None, Tensor | None]:
        """The root whose memory an operator's results share, -1 if they have their own.

        And the version of the tensor whose counter they share once autograd knows them as views;
        and that tensor, where not all of the results need share its memory.
        """
        if facts.is_view:
            base = facts.argument(facts.base, args, kwargs)
            if isinstance(base, Tensor):
                version = None if facts.is_silent_view else _torch.version(base)
                if version and facts.is_detach:
                    version = _ANY
                only = base if facts.may_alias else None
                return self._root(self.value_of(base)), None if only is not None else version, only
        if facts.may_alias:
            for result in _tree.flatten(out)[0]:
                for tensor in tensors:
                    if result is not tensor and _torch.is_same_storage(result, tensor):
                        return self._root(self.value_of(tensor)), None, tensor
        return -1, None, None

    def _run_in_place_collective(self, facts: Operator, args: Any, kwargs: Any) -> Any:
        """Run a collective that writes into its arguments: the replay finds what it has left."""
        tensors = _tree.flatten((args, kwargs))[0]
        for tensor in tensors:
            self.value_of(tensor)
            self._save_old_value(tensor)
        out = facts.call(*args, **kwargs)
        for tensor in tensors:
            for other in self._sharing(self._root(self.value_of(tensor))):
                self._make_stale(other)
        return out

    # --- Values

    def _root(self, value: int) -> int:
        return self.roots.get(value, value)

    def _value_read(self, facts: Operator, tensor: Tensor, written: list[Tensor]) -> int:
        """The value of an operator's argument."""
        is_only_written = not facts.reads_what_it_writes and any(t is tensor for t in written)
        if facts.is_view or is_only_written:
            return self.value_of(tensor)
        return self.value_read(tensor)

    def value_read(self, tensor: Tensor) -> int:
        """The value of a tensor that an operator, or autograd, is about to read."""
        value = self.value_of(tensor)
        if self._blank and self._blank.get(id(tensor), (None, -1))[1] == value:
            self.note_blank()
            return self._adopt(tensor)
        return value

    def value_of(self, tensor: Tensor) -> int:
        """The value of a tensor, whatever it is."""
        entry = self.known.get(id(tensor)) or self._blank.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return self._meet(tensor)
        reference, value, expected = entry
        version = _torch.version(tensor)
        if expected == version:
            return value
        if expected <= _STALE:
            value = self._adopt(tensor)
            if version == _STALE - 1 - expected:  # It has not moved yet: look once more.
                self.known[id(tensor)] = (reference, value, expected)
            return value
        if expected == _ANY:
            self.known[id(tensor)] = (reference, value, version)
            return value
        if version == -expected - 1:  # It has not moved yet.
            return value
        if expected < 0 and version + expected + 1 in (1, 2):  # mark_dirty moves it once more
            self.known[id(tensor)] = (reference, value, version)
            return value
        self.note("a tensor was changed in place by something that is no operator")
        return self._adopt(tensor)

    def _meet(self, tensor: Tensor) -> int:
        """Number a tensor that no recorded operator has returned."""
        if isinstance(tensor, Parameter):
            return self.hold_from_outside(tensor)
        inner = self._inner.get(id(tensor))
        if inner is not None and inner[0]() is tensor:
            return self._add_inner(tensor, inner)
        if type(tensor) is not Tensor:
            wrapped = self._meet_subclass(tensor)
            if wrapped is not None:
                return wrapped
        alias = self._find_alias(tensor)
        if alias is not None:
            call = _torch.as_strided_at(tensor)
            return self._add_synthetic(tensor, call, [alias], self._root(alias))
        node = tensor.grad_fn
        if node is not None and node._sequence_nr() >= self._start:
            self.note("a tensor inside comes from no operator that could be seen (compiled code?)")
        return self.hold_from_outside(tensor)

    def _meet_subclass(self, tensor: Tensor) -> int | None:
        """Number a subclass around recorded tensors, made by hand; None if it is not one."""
        inners = _torch.inner_tensors(tensor)
        values = []
        for _, inner in inners:
            entry = self.known.get(id(inner))
            if entry is not None and entry[0]() is inner:
                values.append(entry[1])
                continue
            owner = self._inner.get(id(inner))
            if owner is None or owner[0]() is not inner:
                return None
            values.append(self._add_inner(inner, owner))
        if not values:
            return None
        build = _torch.subclass_builder(tensor)
        return self._add_synthetic(tensor, build, values, self._root(values[0]))

    def _add_inner(self, tensor: Tensor, owner: tuple[Any, int, str]) -> int:
        """Number a tensor that has been taken out of a subclass by its name."""
        _, value, name = owner
        return self._add_synthetic(tensor, _torch.inner_getter(name), [value], self._root(value))

    def _add_synthetic(
        self, tensor: Tensor, call: Callable[..., Any], values: list[int], root: int
    ) -> int:
        """Write down a step that is no operator."""
        facts = Operator(torch.ops.aten.alias.default)
        facts.call = call
        position = len(self.operators)
        is_blank = root in self._blank_roots()
        value = self._new_value(tensor, position, is_blank=is_blank)
        self.roots[value] = root
        self.operators.append((facts, values, None, None, value))
        return value

    def _find_alias(self, tensor: Tensor) -> int | None:
        """A recorded value whose memory a tensor shares, of which it can be a view."""
        for entries in (self.known, self._blank):
            for reference, _, _ in list(entries.values()):
                other = reference()
                if other is not None and _torch.is_same_storage(other, tensor):
                    is_alike = (
                        type(other) is type(tensor) is Tensor
                        and other.dtype == tensor.dtype
                        and other.is_conj() == tensor.is_conj()
                        and other.is_neg() == tensor.is_neg()
                    )
                    return self.value_of(other) if is_alike else None
        return None

    def is_blank(self, tensor: Tensor) -> bool:
        """Whether a tensor is memory that no operator has written yet."""
        entry = self._blank.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def note_blank(self) -> None:
        """Note that memory is read that no operator has written."""
        self.note(
            "it reads memory that no operator has written, so a kernel that torch does not see "
            "must have"
        )

    def is_known(self, tensor: Tensor) -> bool:
        """Whether a tensor is a value that has been written down, and still what it was."""
        entry = self.known.get(id(tensor))
        return entry is not None and entry[0]() is tensor and entry[2] == _torch.version(tensor)

    def hold_input(self, tensor: Tensor) -> int:
        """Make a held value of an argument of the region, which nobody has seen yet."""
        value = len(self.made)
        self.made.append(-1)
        self.known[id(tensor)] = (_ref(tensor), value, _torch.version(tensor))
        self.held[value] = self._hold(tensor)
        self.outside.add(value)
        if type(tensor) is not Tensor:
            self._note_inner(tensor, value)
        return value

    def hold_from_outside(self, tensor: Tensor) -> int:
        """Make a held value of a tensor that was not made inside."""
        value = self.hold(tensor)
        self.outside.add(value)
        return value

    def hold(self, tensor: Tensor) -> int:
        """Make a held value of what a tensor is now."""
        value = self._new_value(tensor, -1)
        to_keep = self._to_keep.pop(id(tensor), None)
        if to_keep is not None and to_keep[0]() is tensor:
            self._keep_result(value, tensor, *to_keep[1:])
        else:
            self.held[value] = self._hold(tensor)
        return value

    def _adopt(self, tensor: Tensor) -> int:
        """Make a held value of a tensor as it is now; all that share its memory are stale."""
        entry = self.known.get(id(tensor)) or self._blank[id(tensor)]
        root = self._root(entry[1])
        hold = self.hold_from_outside if root in self.outside else self.hold
        for other in self._sharing(root):
            self._make_stale(other)
        return hold(tensor)

    def _make_stale(self, tensor: Tensor) -> None:
        """Let the next look at a tensor hold it as it is then."""
        reference, value, expected = self.known.get(id(tensor)) or self._blank.pop(id(tensor))
        self.known[id(tensor)] = (reference, value, min(expected, _STALE))

    def _sharing(self, root: int) -> list[Tensor]:
        """The tensors that are alive and share a root's memory, as far as it is known."""
        found = self._views(root)
        for entries in (self.known, self._blank):
            for reference, value, _ in entries.values():
                tensor = reference()
                if tensor is None or self._root(value) not in self.held:
                    continue
                is_other = self._root(value) != root
                if is_other and found and _torch.is_same_storage(tensor, found[0]):
                    found.append(tensor)  # Two tensors from outside with the same memory.
        return found

    # --- Writes; see [Note: writes]

    def _is_held(self, tensor: Tensor) -> bool:
        """Whether a tensor has been seen and its memory is held."""
        entry = self.known.get(id(tensor))
        return entry is not None and entry[0]() is tensor and self._root(entry[1]) in self.held

    def _save_old_value(self, tensor: Tensor) -> None:
        """Copy a held value that is about to be overwritten, if an operator has read it."""
        root = self._root(self.value_of(tensor))
        roots = {root, *(self._root(self.value_of(other)) for other in self._sharing(root))}
        read = {self._root(value) for recorded in self.operators for value in recorded[1]}
        if not roots & read:
            return
        copy = None if _torch.place_of(tensor) is None else _torch.copy_storage(tensor)
        for value in [value for value in self.held if self._root(value) in roots]:
            holder = self.held[value]
            if copy is None or holder.place is None:
                self.held[value] = self._hold(_torch.copy_storage(holder.unpack()))
            else:
                self.held[value] = self._hold(_torch.tensor_at(copy, holder.place))

    def _copy_written(self, written: list[Tensor]) -> dict[int, int]:
        """Hold copies of what an operator that has other results too is about to change."""
        replaced = {}
        for tensor in written:
            copy = _torch.copy_storage(tensor)
            value = len(self.made)
            self.made.append(-1)
            self.held[value] = self._hold(_torch.tensor_at(copy, _torch.place_of(tensor)))
            replaced[id(tensor)] = value
        return replaced

    def _note_written(
        self, tensor: Tensor, facts: Operator, position: int, answer: CheckpointPolicy | None
    ) -> None:
        """Note that the operator at a position has just written to a tensor.

        Its version counter moves only when autograd's part of the call goes on, so who looks at
        the tensor next finds out about that.
        """
        entry = self.known.get(id(tensor)) or self._blank[id(tensor)]
        root = self._root(entry[1])
        is_held = root in self.held
        is_kept = answer in KEPT
        if root in self.outside:
            self.written_outside.append(tensor)
        self.written.add(root)
        if not is_held:
            self.writes.setdefault(root, []).append(position)
        if is_kept:
            self.has_matched = True
            self._to_keep[id(tensor)] = (_ref(tensor), facts, answer in OFFLOADED)
        sharing = self._sharing(root) if is_held else self._views(root)
        for key in [k for k, e in self._blank.items() if e[0]() is None]:
            del self._blank[key]
        for other in sharing:
            reference, value, _ = self.known.get(id(other)) or self._blank.pop(id(other))
            expected = -1 - _torch.version(other)
            if is_held or is_kept:
                expected += _STALE
            self.known[id(other)] = (reference, value, expected)

    def _views(self, root: int) -> list[Tensor]:
        """The tensors that are alive and of this root."""
        found = []
        for entries in (self.known, self._blank):
            for reference, value, _ in entries.values():
                tensor = reference()
                if tensor is not None and self._root(value) == root:
                    found.append(tensor)
        return found

    # --- Trouble; see [Note: what cannot be seen]

    def note(self, reason: str) -> None:
        """Note why the region should be rerun from its next forward on."""
        self.reason = self.reason or reason

    def stop(self, reason: str) -> None:
        """Record nothing from now on: what autograd saves is kept."""
        self.reason = reason  # It says more than what was noted on the way to it.
        self.is_stopped = self._is_careful = True


def ordinals(operators: Sequence[Recorded]) -> list[int | None]:
    """Number recorded operators as :func:`wrappers.policies.planned` does.

    Args:
        operators: Those of a recorder.

    Returns:
        For each of them its number, from 0, among the calls of the same operator; None for what no
        policy is asked about: a step that is no operator, or one of :data:`SAC_IGNORED_OPS`.
    """
    num_calls: dict[Operator, int] = {}
    numbers: list[int | None] = []
    for facts, *_ in operators:
        number = num_calls.get(facts, 0)
        num_calls[facts] = number + 1
        numbers.append(number if _is_asked_about(facts) else None)
    return numbers


def num_calls(operators: Sequence[Recorded]) -> dict[str, int]:
    """How often recorded operators have been called, by their names; see :func:`ordinals`."""
    counted = Counter(map(itemgetter(0), operators))
    return {facts.name: num for facts, num in counted.items() if _is_asked_about(facts)}


def _is_asked_about(facts: Operator) -> bool:
    # A step that is no operator has facts of its own.
    return facts_of(facts.func) is facts and facts.func not in SAC_IGNORED_OPS


def keeps_result(facts: Operator, answer: CheckpointPolicy | None) -> bool:
    """Whether an operator's result is kept, given what the policy says about it.

    What ranks have said to each other, and what has been chosen, is not asked for once more unless
    the policy insists.
    """
    if answer in KEPT:
        return True
    is_asked_once = facts.is_choice or (facts.is_collective and not facts.is_wait)
    return is_asked_once and answer is not CheckpointPolicy.MUST_RECOMPUTE


def _is_constant(value: Any) -> bool:
    """Whether an argument is a list of sizes or the like."""
    kind = type(value)
    return (kind is list or kind is tuple) and all(type(item) in _CONSTANTS for item in value)


def _has_new_results(facts: Operator) -> bool:
    """Whether a writer returns something else than what it has written."""
    infos = [value.alias_info for value in facts.func._schema.returns]
    return bool(facts.writes) and any(info is None for info in infos)


def _random_states(
    tensors: list[Tensor], args: Any, kwargs: dict[str, Any]
) -> list[tuple[Any, Tensor]]:
    """The generators that an operator may draw from, and their states."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Generator):
            return [(value, value.get_state())]
    states: list[tuple[Any, Tensor]] = [
        (torch.default_generator, torch.default_generator.get_state())
    ]
    devices = _device.beyond_host(tensors)
    if kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]))
    states += [(d, _device.get_rng_state(d)) for d in _device.with_rng(devices)]
    return states


_torch.hide_from_compiler(Recorder, Rules)
