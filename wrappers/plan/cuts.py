"""What a region can keep, as numbers: all ways to cut it that are worth a look.

Backward needs some of the memory that a region's operators make. What it needs is kept, or
recomputed; and what is recomputed needs, in its turn, all that its operator reads:

    x ──► norm ──► qkv ──► attention ──► out        needed: norm, qkv, attention
                                                    recompute attention: qkv is kept, or recomputed,
                                                    and then norm is

So what a recompute costs depends on what else is kept, and ratios of time to bytes rank nothing.

Idea: decide from the last operator to the first. Then it is known, when the turn comes to an
operator, whether anything needs its output: if not, it is neither kept nor run, as the engine lets
go what nothing needs; if so, it is kept (its bytes), or runs again (its time) and demands what it
reads. All that later decisions have to know of the earlier ones is which outputs are demanded. So
of all ways to get to the same demands only those count that are best as to (bytes, time), a
Pareto front, and these stay few: what backward needs anyway is no demand, and most operators read
what has been made shortly before. This is the labelling algorithm for two-criteria shortest paths,
with demands for vertices; it is exact.

Fronts can have any number of points, so those nearer than a resolution are taken for one. Where
operators read each other at random over long distances, there are up to ``2 ** n`` different
demands; then labels are also compared with those that demand a little more or less. Beyond a number
of labels some are dropped, and the result says so.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

#: A way to treat the operators seen so far: bytes kept, nanoseconds to recompute, and the set of
#: what is kept, as the bits of a number. Nanoseconds are integers, so that sums are equal where
#: their terms are.
_Label = tuple[int, int, int]

#: Bytes and nanoseconds that a label may come to, its demands, the label.
_Rated = tuple[int, int, int, _Label]

#: More labels than these at one time, and those of different demands are compared as well.
_MANY_LABELS = 5_000

#: More labels than these at one time, and some are dropped.
_MAX_LABELS = 150_000


@dataclass(frozen=True)
class Group:
    """An operator that makes memory, or several that a replay runs together.

    An input of the region that costs memory while it is held is a forced group without time.

    Attributes:
        num_bytes: What it costs to keep its output; all of those that are needed, together.
        time_us: How long it takes to run it again, the engine's part included.
        reads: Positions of the groups whose memory it reads; those of earlier ones.
        is_candidate: Whether its output may be kept.
        is_forced: Whether its output is never recomputed, but kept where anything needs it.
        offload_us: What the step waits if its output goes to the host, the bandwidth aside;
            None: it cannot go there.
    """

    num_bytes: int
    time_us: float
    reads: tuple[int, ...] = ()
    is_candidate: bool = True
    is_forced: bool = False
    offload_us: float | None = None


@dataclass(frozen=True)
class RegionGraph:
    """The operators of a region, and what backward needs of them.

    Attributes:
        groups: In the order in which they run.
        needed: Positions of the groups whose memory backward needs.
        partners: Sets of groups of which, as far as they are needed, all are kept or all are
            recomputed: those that draw from the same random numbers.

    Raises:
        ValueError: A group reads itself or a later one; two sets of partners share a group; or of
            two partners one may not be kept and one may not be recomputed.
    """

    groups: tuple[Group, ...]
    needed: frozenset[int]
    partners: tuple[frozenset[int], ...] = ()

    def __post_init__(self) -> None:
        for position, group in enumerate(self.groups):
            if any(not 0 <= read < position for read in group.reads):
                raise ValueError(
                    f"group {position} reads {group.reads}, expected positions of earlier groups"
                )
        members = [position for partners in self.partners for position in partners]
        if len(members) != len(set(members)):
            raise ValueError(f"the sets of partners overlap: {self.partners}")
        for position in {*members, *self.needed}:
            if not 0 <= position < len(self.groups):
                raise ValueError(f"there is no group {position}, only {len(self.groups)}")
            if not self.may_keep(position) and not self.may_recompute(position):
                raise ValueError(
                    f"of the partners of group {position}, {sorted(self.unit(position))}, one is "
                    "never recomputed and one is never kept"
                )

    def unit(self, position: int) -> frozenset[int]:
        """A group and its partners."""
        for partners in self.partners:
            if position in partners:
                return partners
        return frozenset((position,))

    def may_keep(self, position: int) -> bool:
        """Whether a group and all of its partners may be kept."""
        unit = [self.groups[i] for i in self.unit(position)]
        return all(group.is_candidate or group.is_forced for group in unit)

    def may_recompute(self, position: int) -> bool:
        """Whether neither a group nor one of its partners is forced."""
        return not any(self.groups[i].is_forced for i in self.unit(position))


@dataclass(frozen=True)
class Cut:
    """What is kept of a region; all else that is needed is recomputed.

    Attributes:
        kept: Groups whose output stays on the device.
        num_bytes: What they take.
        time_us: How long it takes to run again what is recomputed, and what offloading costs.
        recomputed: Groups that run again.
        offloaded: Groups whose output goes to the host; none of ``kept``.
        offload_bytes: What they take there.
    """

    kept: frozenset[int]
    num_bytes: int
    time_us: float
    recomputed: frozenset[int] = frozenset()
    offloaded: frozenset[int] = frozenset()
    offload_bytes: int = 0


@dataclass(frozen=True)
class Cuts:
    """Cuts of a region, by rising bytes and falling time.

    Attributes:
        cuts: None is as good as another in both.
        is_exact: Whether each way to cut the region is matched by one of these, which takes no more
            time and less than the resolution more bytes.
    """

    cuts: tuple[Cut, ...]
    is_exact: bool


def cut_of(graph: RegionGraph, kept: Iterable[int]) -> Cut:
    """What happens if the outputs of some groups are to be kept.

    Forced groups and the partners of those given are added; what nothing needs is left out.
    """
    wanted = {i for position in kept for i in graph.unit(position) if graph.may_keep(position)}
    is_needed = [position in graph.needed for position in range(len(graph.groups))]
    stays, runs = [], []
    for position in reversed(range(len(graph.groups))):
        if not is_needed[position]:
            continue
        if position in wanted or not graph.may_recompute(position):
            stays.append(position)
            continue
        runs.append(position)
        for read in graph.groups[position].reads:
            is_needed[read] = True
    return Cut(
        frozenset(stays),
        sum(graph.groups[i].num_bytes for i in stays),
        sum(graph.groups[i].time_us for i in reversed(runs)),
        frozenset(runs),
    )


def pareto_cuts(
    graph: RegionGraph,
    *,
    resolution_bytes: int = 64 * 1024,
    max_options: int | None = None,
    max_labels: int = _MAX_LABELS,
) -> Cuts:
    """All cuts that are best as to the bytes that they keep and the time that they take.

    The first has the fewest bytes that are possible, the last the least time.

    Args:
        graph: The region.
        resolution_bytes: Cuts whose bytes differ by less may stand for each other.
        max_options: Thin the result to so many; None: leave it as it is.
        max_labels: How many partial cuts may be followed at one time.
    """
    search = _Search(graph, resolution_bytes, max_labels)
    labels = search.run()
    if not search.is_exact:
        ends = [cut_of(graph, range(len(graph.groups))), cut_of(graph, ())]
        labels += [_label_of(graph, cut) for cut in ends]
    labels = _front(labels, max(1, resolution_bytes // 2))
    if max_options is not None:
        points = [label[:2] for label in labels]
        labels = [labels[i] for i in _choose(points, list(range(len(points))), max_options)]
    cuts = tuple(cut_of(graph, _positions(kept)) for _, _, kept in labels)
    return Cuts(cuts, search.is_exact)


class _Search:
    """One run over the groups of a region, from the last to the first.

    Demands are the bits of a number: bit ``i`` for group ``i``, and for each set of partners two
    more, which say that one that is needed has been kept, or recomputed.

    Attributes:
        is_exact: Whether no label has been dropped that might have been better than all others.
    """

    def __init__(self, graph: RegionGraph, resolution_bytes: int, max_labels: int) -> None:
        self.is_exact = True
        self._graph = graph
        self._max_labels = max_labels
        # Half of the resolution for all steps together, half for the result.
        self._grain = max(1, resolution_bytes // (2 * max(1, len(graph.groups))))
        size = len(graph.groups)
        #: By group: the bits "a partner is kept" and "a partner is recomputed".
        self._partner_bits: dict[int, tuple[int, int]] = {}
        for number, partners in enumerate(graph.partners):
            bits = 1 << (size + 2 * number), 1 << (size + 2 * number + 1)
            self._partner_bits |= dict.fromkeys(partners, bits)
        #: By the first group of a set of partners: the bits, which end with it.
        self._last_bits = {min(p): sum(self._partner_bits[min(p)]) for p in graph.partners if p}
        needed = sum(1 << position for position in graph.needed)
        self._fronts: dict[int, list[_Label]] = {needed: [(0, 0, 0)]}

    def run(self) -> list[_Label]:
        """The best labels of the whole region."""
        for position in reversed(range(len(self._graph.groups))):
            self._decide(position)
            if self._num_labels() > min(_MANY_LABELS, self._max_labels):
                self._compare_demands()
            if self._num_labels() > self._max_labels:
                self._drop()
        return self._fronts[0]

    def _num_labels(self) -> int:
        return sum(map(len, self._fronts.values()))

    def _decide(self, position: int) -> None:
        """Keep or recompute a group, wherever it is needed."""
        graph, own = self._graph, 1 << position
        group = graph.groups[position]
        may_keep, may_recompute = graph.may_keep(position), graph.may_recompute(position)
        is_kept, is_recomputed = self._partner_bits.get(position, (0, 0))
        last = ~self._last_bits.get(position, 0)
        demanded = sum(1 << read for read in set(group.reads))
        num_bytes, time_ns = group.num_bytes, _nanoseconds(group)
        parts: dict[int, list[list[_Label]]] = {}
        for demands, labels in self._fronts.items():
            if not demands & own:
                parts.setdefault(demands & last, []).append(labels)
                continue
            rest = demands & ~own
            if may_keep and not demands & is_recomputed:
                kept = [(b + num_bytes, t, k | own) for b, t, k in labels]
                parts.setdefault((rest | is_kept) & last, []).append(kept)
            if may_recompute and not demands & is_kept:
                again = [(b, t + time_ns, k) for b, t, k in labels]
                parts.setdefault((rest | is_recomputed | demanded) & last, []).append(again)
        self._fronts = {
            demands: lists[0] if len(lists) == 1 else _front(chain(*lists), self._grain)
            for demands, lists in parts.items()
        }

    def _compare_demands(self) -> None:
        """Leave out labels on which one is better that demands one group less, or one more.

        To demand less is better in itself. Who demands one group more can keep it, and owes no more
        than its bytes.
        """
        graph, fronts = self._graph, self._fronts
        for position in self._groups_in(functools.reduce(operator.or_, fronts)):
            own = 1 << position
            can_keep = graph.may_keep(position) and len(graph.unit(position)) == 1
            for fewer in [demands for demands in fronts if not demands & own]:
                more = fewer | own
                if more not in fronts:
                    continue
                fronts[more] = _without_worse(fronts[more], fronts[fewer], 0)
                if can_keep:
                    owed = graph.groups[position].num_bytes
                    fronts[fewer] = _without_worse(fronts[fewer], fronts[more], owed)
        self._fronts = {demands: labels for demands, labels in fronts.items() if labels}

    def _drop(self) -> None:
        """Leave at most half as many labels as there may be: the quickest of those of like bytes.

        One time with what is demanded as if it were going to be kept, and one time as if it were
        going to be recomputed.
        """
        self.is_exact = False
        kept, again = [], []
        for demands, labels in self._fronts.items():
            groups = [self._graph.groups[i] for i in self._groups_in(demands)]
            owed_bytes = sum(group.num_bytes for group in groups)
            owed_ns = sum(_nanoseconds(group) for group in groups)
            for label in labels:
                kept.append((label[0] + owed_bytes, label[1], demands, label))
                again.append((label[0], label[1] + owed_ns, demands, label))
        room = self._max_labels // 4
        chosen = {entry[2:] for rated in (kept, again) for entry in _quickest(rated, room)}
        self._fronts = {}
        for demands, label in sorted(chosen):
            self._fronts.setdefault(demands, []).append(label)

    def _groups_in(self, demands: int) -> list[int]:
        return [i for i in _positions(demands) if i < len(self._graph.groups)]


def _front(labels: Iterable[_Label], grain: int) -> list[_Label]:
    """The labels that are best as to (bytes, time), the quickest one of each multiple of a grain.

    The one of fewest bytes stays in any case, and the quickest as well.
    """
    best: list[_Label] = []
    for label in sorted(labels):
        if best and label[1] >= best[-1][1]:
            continue
        if len(best) > 1 and label[0] // grain == best[-1][0] // grain:
            best.pop()
        best.append(label)
    return best


def _without_worse(labels: list[_Label], others: list[_Label], owed: int) -> list[_Label]:
    """The labels of a front on which none of another is better, though it owes bytes."""
    left = []
    quickest: float = math.inf
    rest = iter(others)
    other = next(rest, None)
    for label in labels:
        while other is not None and other[0] + owed <= label[0]:
            quickest = other[1]
            other = next(rest, None)
        if label[1] < quickest:
            left.append(label)
    return left


def _quickest(rated: list[_Rated], count: int) -> list[_Rated]:
    """About so many labels of (bytes, time): the same number of each range of bytes."""
    num_together = 4
    lowest, highest = min(rated)[0], max(rated)[0]
    width = (highest - lowest) * num_together // max(1, count) + 1
    by_bytes: dict[int, list[_Rated]] = {}
    for entry in rated:
        by_bytes.setdefault((entry[0] - lowest) // width, []).append(entry)
    found = []
    for entries in by_bytes.values():
        found += sorted(entries, key=lambda entry: entry[1:])[:num_together]
    return found


def _nanoseconds(group: Group) -> int:
    return round(1000 * group.time_us)


def _label_of(graph: RegionGraph, cut: Cut) -> _Label:
    time_ns = sum(_nanoseconds(graph.groups[i]) for i in cut.recomputed)
    return cut.num_bytes, time_ns, sum(1 << i for i in cut.kept)


def _positions(bits: int) -> list[int]:
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def neighbours(graph: RegionGraph, cut: Cut) -> list[Cut]:
    """The cuts that keep one group more, or one less; partners go together.

    Those that keep more can need less memory while they recompute, as a replay comes in parts
    between which a kept output stands: bytes and time alone do not tell. Offloading is not looked
    at.
    """
    kept = cut.kept | cut.offloaded
    found: dict[frozenset[int], Cut] = {kept: cut}
    for position in range(len(graph.groups)):
        unit = graph.unit(position)
        if position in cut.recomputed and graph.may_keep(position):
            other = cut_of(graph, kept | unit)
        elif position in kept and graph.may_recompute(position):
            other = cut_of(graph, kept - unit)
        else:
            continue
        found.setdefault(other.kept, other)
    return list(found.values())[1:]


def with_offload(
    graph: RegionGraph,
    cuts: Iterable[Cut],
    *,
    min_bytes: int = 64 * 1024,
    max_options: int = 40,
) -> list[Cut]:
    """The cuts, and variants of them in which some of what is kept goes to the host instead.

    The largest one goes first, then the two largest, and so on: the wait for a copy that is left
    when bandwidth is accounted for elsewhere is one of a storage, whatever its size.

    Args:
        graph: The region.
        cuts: Cuts without offloading.
        min_bytes: Smaller outputs stay.
        max_options: How many are returned: the best spread of (bytes kept, time, bytes that
            go to the host).
    """
    found = []
    for cut in cuts:
        found.append(cut)
        movable = [i for i in cut.kept if graph.groups[i].offload_us is not None]
        movable = [i for i in movable if graph.groups[i].num_bytes >= min_bytes]
        movable.sort(key=lambda i: (-graph.groups[i].num_bytes, i))
        for count in range(1, len(movable) + 1):
            found.append(_offloaded(graph, cut, movable[:count]))
    points = [(cut.num_bytes, cut.time_us, cut.offload_bytes) for cut in found]
    return [found[i] for i in thin(points, max_options)]


def _offloaded(graph: RegionGraph, cut: Cut, moved: Sequence[int]) -> Cut:
    num_bytes = sum(graph.groups[i].num_bytes for i in moved)
    return Cut(
        cut.kept.difference(moved),
        cut.num_bytes - num_bytes,
        cut.time_us + sum(graph.groups[i].offload_us or 0.0 for i in moved),
        cut.recomputed,
        frozenset(moved),
        num_bytes,
    )


def thin(points: Sequence[Sequence[float]], max_options: int = 40) -> list[int]:
    """Choose few points that stand for many, less being better in every criterion.

    A point's loss is what the best of the chosen ones is worse in, at most, as a part of the range
    of that criterion. The best in each criterion are chosen in any case. Then, again and again, the
    point whose loss is largest: up to half of those left, of the corners of the convex hull of the
    first two criteria, which is what a choice over many regions is made of; then of all.

    Args:
        points: With the same number of criteria, such as (bytes, time, transient bytes).
        max_options: How many to choose; at least as many as there are criteria.

    Returns:
        Positions of the chosen points, in order. No other point is as good as a chosen one in all
        criteria.

    Raises:
        ValueError: Not even the best in each criterion may be chosen.
    """
    return _choose(points, _undominated(points), max_options)


def _choose(points: Sequence[Sequence[float]], front: list[int], max_options: int) -> list[int]:
    """What :func:`thin` does with the points that are left."""
    if not front:
        return []
    criteria = range(len(points[front[0]]))
    if max_options < len(criteria):
        raise ValueError(
            f"cannot choose {max_options} points: the best in each of {len(criteria)} criteria are "
            "always chosen"
        )
    lowest = [min(points[i][c] for i in front) for c in criteria]
    spans = [max(points[i][c] for i in front) - lowest[c] or 1.0 for c in criteria]
    scaled = {i: [(points[i][c] - lowest[c]) / spans[c] for c in criteria] for i in front}
    losses = dict.fromkeys(front, math.inf)

    def choose(best: int) -> None:
        del losses[best]
        for i in losses:
            loss = max(b - p for b, p in zip(scaled[best], scaled[i], strict=True))
            losses[i] = min(losses[i], loss)

    for best in sorted({min(front, key=_by(scaled, c)) for c in criteria}):
        choose(best)
    num_ends = len(front) - len(losses)
    room_for_corners = (num_ends + max_options + 1) // 2
    for pool, room in ((_corners(points, front), room_for_corners), (front, max_options)):
        waiting = [i for i in pool if i in losses]
        while waiting and len(front) - len(losses) < room:
            best = max(waiting, key=lambda i: (losses[i], -i))
            waiting.remove(best)
            choose(best)
    return sorted(set(front) - losses.keys())


def _by(scaled: dict[int, list[float]], criterion: int) -> Callable[[int], Any]:
    return lambda i: (scaled[i][criterion], sum(scaled[i]), i)


def _corners(points: Sequence[Sequence[float]], front: list[int]) -> list[int]:
    """The corners of the convex hull, to the lower left, of the first two criteria."""
    hull: list[int] = []
    if len(points[front[0]]) < 2:
        return hull
    for i in sorted(front, key=lambda i: (points[i][0], points[i][1], i)):
        x, y = points[i][:2]
        if hull and y >= points[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = points[hull[-2]][:2], points[hull[-1]][:2]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(i)
    return hull


def _undominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Points that no other is as good as in all criteria; the first one of equal points."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (tuple(points[i]), i)):
        if not any(all(q <= p for q, p in zip(points[j], points[i], strict=True)) for j in front):
            front.append(i)
    return front
