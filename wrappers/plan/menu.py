"""The menu of a region: the ways to treat it that are worth a look, with what they really take.

    record ──► graph of what makes memory ──► cuts ──► each on the harness ──► thinned

A cut says which outputs are kept. How many bytes that leaves, and how many a recompute needs on
top, depends on the engine's order; so every cut runs there once, on fake tensors. Cuts that are
best as to bytes and time come first, then those that differ from them by one output: keeping more
may need less while it recomputes, as the replay then comes in parts.

What costs nothing is not asked about: an output that nothing needs is let go by the engine.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from wrappers import _device, _knobs, _torch, _tree
from wrappers.engine.operators import facts_of
from wrappers.engine.record import ordinals
from wrappers.plan import cuts
from wrappers.plan.cuts import Cut, Group, RegionGraph
from wrappers.plan.harness import Costs, Harness, Run
from wrappers.plan.records import RECOMPUTE_ALL, Action, Decision, Hardware, OperatorRow, Option
from wrappers.policies import (
    Policy,
    PolicyFn,
    planned,
    save_attention,
    save_matmuls,
)
from wrappers.policy import KEPT, CheckpointPolicy, SelectiveCheckpointContext

#: An option that adds less than this adds this, so that leaving a region alone is the fastest.
_LEAST_US = 1.0

#: Operators in a replay take at most so many times what they take in the forward, or so few.
_MOST_SCALE = 2.0

#: What is decided about a region, whatever the order.
_Decided = frozenset[tuple[Decision, Action]]


@dataclass
class Logged:
    """One call of an operator that a policy is asked about.

    Attributes:
        func: The operator.
        ordinal: Its number among the calls of this operator.
        module: The submodule that has called it.
        time_us: How long it takes.
        flops: Its floating-point operations.
        sizes: Bytes of the memory of its results, one a result.
        text: What two regions of one structure have in common here.
        draws: Whether it reads a generator's state.
        is_d2h: Whether it copies from a device to the host, which makes the host wait.
    """

    func: Any
    ordinal: int
    module: str
    time_us: float
    flops: int
    sizes: list[int]
    text: str
    draws: bool = False
    is_d2h: bool = False


class _Log(Policy):
    """Keeps nothing, and writes down what it is asked about."""

    expects_match = False

    def __init__(self, costs: Costs, where: Callable[[], str]) -> None:
        super().__init__()
        self.calls: list[Logged] = []
        self._costs = costs
        self._where = where

    def begin(self) -> PolicyFn:
        self.calls = []  # A small region runs twice; see the harness.
        counts: Counter[Any] = Counter()

        def note(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            out = ctx.op_output
            ordinal, counts[op] = counts[op], counts[op] + 1
            results = _tree.flatten(out)[0]
            self.calls.append(
                Logged(
                    op,
                    ordinal,
                    self._where(),
                    self._costs.time_us(op, args, kwargs, out),
                    self._costs.flops(op, args, kwargs, out),
                    [_torch.storage_bytes(t) for t in results],
                    f"{op} {_text(args)} {_text(kwargs)} {_text(out)}",
                    facts_of(op).draws(args, kwargs),
                    _is_d2h(args, results),
                )
            )
            return CheckpointPolicy.PREFER_RECOMPUTE

        return note


def _is_d2h(args: Any, results: list[Tensor]) -> bool:
    on_device = [t for t in args if isinstance(t, Tensor) and not _device.is_host(t)]
    return bool(on_device and results) and all(map(_device.is_host, results))


def _text(value: Any) -> str:
    """A value without identity: tensors by their looks."""
    if isinstance(value, Tensor):
        is_strided = value.layout is torch.strided
        stride = tuple(value.stride()) if is_strided else ()
        return f"T{tuple(value.shape)}{stride}{value.dtype}{value.requires_grad}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{_text(v)}' for k, v in value.items())}}}"
    if isinstance(value, torch.device):
        return value.type  # Ranks compute on devices of their own.
    return repr(value) if not isinstance(value, torch.Generator) else "generator"


@contextmanager
def _modules_noted(root: nn.Module) -> Iterator[Callable[[], str]]:
    """Follow which submodule's forward is running."""
    names = {module: name for name, module in root.named_modules()}
    stack = [""]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names.get(module, stack[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield lambda: stack[-1]
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Recording:
    """The operators of a region, as the engine has recorded them.

    Attributes:
        calls: What a policy is asked about, in order.
        key: Hash of them.
        run: The run in which they were recorded, in which nothing was kept.
        position_of: By number of a call: its position among the recorded operators.
    """

    calls: list[Logged]
    key: str
    run: Run
    position_of: list[int] = field(default_factory=list)


def record(harness: Harness, module: nn.Module, costs: Costs, fqn: str) -> Recording:
    """Run a region that keeps nothing, and write down its operators."""
    with _modules_noted(module) as where:
        log = _Log(costs, where)
        run = harness.run(log, fqn=fqn)
    text = "\n".join(call.text for call in log.calls)
    flags = [(p.requires_grad, tuple(p.shape), str(p.dtype)) for p in module.parameters()]
    name = type(module).__qualname__  # A plan compares classes.
    looks = f"{name}\n{text}\n{flags}\n{harness.call_text()}"
    key = hashlib.sha256(looks.encode()).hexdigest()[:16]
    recording = Recording(log.calls, key, run)
    if run.frame is not None:
        numbers = ordinals(run.frame.recording[0])
        recording.position_of = [i for i, number in enumerate(numbers) if number is not None]
        assert len(recording.position_of) == len(log.calls), "calls were recorded, but not asked of"
    return recording


class MenuMaker:
    """Makes the menu of a region.

    Args:
        harness: The region.
        recording: Its operators.
        hardware: What the engine itself takes.
        max_options: So many options at most.
        offloads: Whether outputs may go to the host.
    """

    def __init__(
        self,
        harness: Harness,
        recording: Recording,
        hardware: Hardware,
        *,
        max_options: int = 40,
        offloads: bool = False,
    ) -> None:
        self._harness = harness
        self._recording = recording
        self._hardware = hardware
        self._max_options = max_options
        self._offloads = offloads
        frame = recording.run.frame
        assert frame is not None
        self._operators, self._roots, self._writes = frame.recording
        #: See the note in :mod:`wrappers.plan.timing`.
        self._scale = 1.0
        self._region_us = hardware.region_us
        #: By decisions: what is replayed and what the engine takes, in microseconds.
        self._parts: dict[tuple[Decision, ...], tuple[float, float]] = {}
        self._call_at = {p: i for i, p in enumerate(recording.position_of)}
        self._needed_roots = self._find_needed(frame)
        self._find_groups()

    # --- The graph

    def _find_needed(self, frame: Any) -> set[int]:
        """The roots of what autograd has saved and the region does not hold."""
        return {self._roots.get(index, index) for index in frame.saved_values}

    def _find_groups(self) -> None:
        """Group operators: who makes memory, with those that write to it later."""
        #: By root made inside: position of the operator that made it.
        maker = {}
        for position, (_, _, _, _, made) in enumerate(self._operators):
            numbers = (made,) if type(made) is int else made
            for value in numbers:
                if value >= 0 and value not in self._roots:
                    maker[value] = position
        joined: dict[int, int] = {}
        for root, positions in self._writes.items():
            if root in maker:
                for position in positions:
                    joined[position] = joined.get(maker[root], maker[root])
        members: dict[int, list[int]] = {}
        self._roots_of: dict[int, list[int]] = {}
        for root, position in maker.items():
            head = joined.get(position, position)
            self._roots_of.setdefault(head, []).append(root)
        for position in range(len(self._operators)):
            head = joined.get(position, position)
            if head in self._roots_of:
                members.setdefault(head, []).append(position)
        #: Positions of the operators of each group, groups in order.
        self._groups = [members[head] for head in sorted(self._roots_of)]
        self._heads = sorted(self._roots_of)
        number = {head: i for i, head in enumerate(self._heads)}
        self._group_of_root = {
            root: number[head] for head, roots in self._roots_of.items() for root in roots
        }

    def _group(self, number: int) -> Group:
        members = self._groups[number]
        logged = self._calls_of(number)
        facts = [self._operators[p][0] for p in members]
        reads = set()
        for position in members:
            for value in self._operators[position][1]:
                root = self._roots.get(value, value)
                group = self._group_of_root.get(root)
                if group is not None and group < number:
                    reads.add(group)
        is_once = any(f.is_choice or (f.is_collective and not f.is_wait) for f in facts)
        is_once = is_once or any(call.is_d2h for call in logged)
        can_be_named = bool(logged) and not facts[-1].is_view
        time_us = sum(call.time_us + self._hardware.replay_us for call in logged)
        return Group(
            num_bytes=self._bytes_of(number),
            time_us=time_us,
            reads=tuple(sorted(reads)),
            is_candidate=can_be_named,
            is_forced=is_once,
            offload_us=self._hardware.launch_us if self._offloads else None,
        )

    def _calls_of(self, number: int) -> list[Logged]:
        positions = [p for p in self._groups[number] if p in self._call_at]
        return [self._recording.calls[self._call_at[p]] for p in positions]

    def _bytes_of(self, number: int) -> int:
        """What keeping a group's output costs: all of its memory that anything needs."""
        head = self._heads[number]
        call = self._call_at.get(head)
        if call is None:
            return 0
        sizes = self._recording.calls[call].sizes
        roots = self._roots_of[head]
        made = self._operators[head][4]
        numbers = (made,) if type(made) is int else made
        by_root = dict(zip(numbers, sizes, strict=False))
        used = [r for r in roots if r in self._needed_roots or r in self._read_roots]
        return sum(by_root.get(root, 0) for root in used)

    def graph(self) -> RegionGraph:
        """What the region can keep."""
        self._read_roots = {
            self._roots.get(value, value)
            for _, values, _, _, _ in self._operators
            for value in values
        }
        groups = tuple(self._group(i) for i in range(len(self._groups)))
        needed = frozenset(
            self._group_of_root[root] for root in self._needed_roots if root in self._group_of_root
        )
        return RegionGraph(groups, needed)

    # --- Options

    def options(self) -> tuple[tuple[Option, ...], bool]:
        """The menu, and whether it is exact."""
        graph = self.graph()
        found = cuts.pareto_cuts(graph)
        tried: dict[_Decided, Option] = {}
        front = list(found.cuts)
        is_exact = found.is_exact and len(front) <= _knobs.PLAN_MENU_RUNS // 2
        if len(front) > _knobs.PLAN_MENU_RUNS // 2:
            points = [(cut.num_bytes, cut.time_us) for cut in front]
            front = [front[i] for i in cuts.thin(points, _knobs.PLAN_MENU_RUNS // 2)]
        for cut in front:
            self._try(cut, tried)
        for cut in front:
            for other in cuts.neighbours(graph, cut):
                if len(tried) >= _knobs.PLAN_MENU_RUNS:
                    break
                self._try(other, tried)
        if self._offloads:
            for cut in cuts.with_offload(graph, front, max_options=self._max_options):
                self._try(cut, tried)
        return self._thinned(list(tried.values())), is_exact

    def _try(self, cut: Cut, tried: dict[_Decided, Option]) -> None:
        decisions = self._decisions(cut)
        key = frozenset((d, d.action) for d in decisions)
        if key not in tried:
            tried[key] = self.measure(decisions)

    def _decisions(self, cut: Cut) -> tuple[Decision, ...]:
        found = []
        for number in sorted(cut.kept | cut.offloaded):
            calls = [self._call_at[p] for p in self._groups[number] if p in self._call_at]
            if not calls or self._operators[self._groups[number][-1]][0].is_collective:
                continue
            call = self._recording.calls[calls[-1]]
            action = Action.OFFLOAD if number in cut.offloaded else Action.SAVE
            found.append(Decision(str(call.func), call.ordinal, action))
        return tuple(found)

    def by_hand(self) -> dict[str, Option]:
        """What policies come to that people choose by hand, as far as they find something here."""
        found = {RECOMPUTE_ALL: self.measure(())}
        matmuls, attention = save_matmuls(), save_attention()
        chosen = {
            "save matmuls": matmuls,
            "save attention": attention,
            "save matmuls and attention": matmuls | attention,
        }
        context = SelectiveCheckpointContext(is_recompute=False)
        for name, policy in chosen.items():
            answer = policy.begin()
            calls = [c for c in self._recording.calls if answer(context, c.func) in KEPT]
            if calls:
                found[name] = self.measure(tuple(Decision(str(c.func), c.ordinal) for c in calls))
        return found

    def measure(self, decisions: tuple[Decision, ...]) -> Option:
        """Run the region with what a plan decides about it."""
        run = self._harness.run(policy_of(decisions))
        assert run.frame is not None
        replayed = [self._call_at[p] for p in run.frame.needed if p in self._call_at]
        hardware = self._hardware
        engine_us = hardware.record_us * len(self._operators)
        engine_us += hardware.replay_us * len(run.frame.needed)
        replayed_us = sum(self._recording.calls[i].time_us for i in replayed)
        self._parts[decisions] = replayed_us, engine_us
        return Option(
            decisions,
            run.kept_bytes,
            max(self._scale * replayed_us + engine_us + self._region_us, _LEAST_US),
            run.forward_bytes,
            run.backward_bytes,
            run.offload_bytes,
        )

    def keep_all(self) -> tuple[Decision, ...]:
        """What keeps all that backward needs, so that nothing runs again."""
        graph = self.graph()
        return self._decisions(cuts.cut_of(graph, range(len(graph.groups))))

    def keep_longest(self) -> tuple[Decision, ...]:
        """What keeps the operators that take longest to run again, half of the time together."""
        groups = self.graph().groups
        order = sorted(range(len(groups)), key=lambda i: (-groups[i].time_us, i))
        total = sum(group.time_us for group in groups)
        chosen, time_us = [], 0.0
        for number in order:
            if time_us < total / 2 and groups[number].is_candidate:
                chosen.append(number)
                time_us += groups[number].time_us
        return self._decisions(cuts.cut_of(self.graph(), chosen))

    def fit(self, extra_us: Mapping[tuple[Decision, ...], float]) -> None:
        """Correct times by what some options were measured to add.

        Args:
            extra_us: By decisions: what a step takes longer with them than plainly.
        """
        points = []
        for decisions, measured_us in extra_us.items():
            self.measure(decisions)
            replayed_us, engine_us = self._parts[decisions]
            points.append((replayed_us, measured_us - engine_us))
        num = len(points)
        if not num:
            return
        # The straight line that comes closest to them.
        mean_x = sum(x for x, _ in points) / num
        mean_y = sum(y for _, y in points) / num
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        if spread:
            slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
            self._scale = min(max(slope, 1 / _MOST_SCALE), _MOST_SCALE)
        self._region_us = max(mean_y - self._scale * mean_x, 0.0)

    def _thinned(self, options: list[Option]) -> tuple[Option, ...]:
        points = [
            (o.kept_bytes, o.extra_us, max(o.forward_bytes, o.backward_bytes), o.offload_bytes)
            for o in options
        ]
        chosen = [options[i] for i in cuts.thin(points, self._max_options - 1)]
        return tuple(sorted(chosen, key=lambda o: (-o.kept_bytes, o.extra_us)))

    # --- The table

    def rows(self) -> tuple[OperatorRow, ...]:
        """The operators that make memory, for people."""
        rows = []
        graph = self.graph()
        for number, head in enumerate(self._heads):
            call = self._call_at.get(head)
            if call is None:
                continue
            logged = self._recording.calls[call]
            made = self._operators[head][4]
            numbers = (made,) if type(made) is int else made
            saved = [
                size
                for value, size in zip(numbers, logged.sizes, strict=False)
                if value in self._needed_roots
            ]
            rows.append(
                OperatorRow(
                    str(logged.func),
                    logged.ordinal,
                    logged.module,
                    sum(logged.sizes),
                    sum(saved),
                    logged.time_us,
                    logged.flops,
                    graph.groups[number].reads,
                    any(c.draws for c in self._calls_of(number)),
                    graph.groups[number].is_forced,
                )
            )
        return tuple(rows)


_ANSWERS = {
    Action.SAVE: CheckpointPolicy.MUST_SAVE,
    Action.OFFLOAD: CheckpointPolicy.MUST_CPU_OFFLOAD,
}


def policy_of(
    decisions: Sequence[Decision],
    counts: Mapping[str, int] | None = None,
    *,
    is_strict: bool = False,
) -> Policy:
    """The policy that carries decisions out.

    Args:
        decisions: About one region.
        counts: How often operators are called in one forward, as far as that is to be checked.
        is_strict: Whether a forward that differs raises.
    """
    answers = {(d.operator, d.ordinal): _ANSWERS[d.action] for d in decisions}
    return planned(answers, counts=counts, strict=is_strict)
