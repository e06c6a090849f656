"""The schedule: orders learnt, groups that stay, copies in flight, ratios; all without torch."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from wrappers.offload import scheduler
from wrappers.offload.scheduler import Group, InFlight, Schedule

FOLDER = Path(scheduler.__file__).parent


@pytest.mark.parametrize("name", ["scheduler", "pool"])
def test_neither_needs_torch(name):
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('alone', {str(FOLDER / name)!r} + '.py')\n"
        "sys.modules['alone'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.__all__\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('torch', 'wrappers')]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Orders


class Step:
    """One step of a program, written as words: ``b0`` begins a group, ``e0`` enters it.

    Groups are numbered in the order of their begins; ``b0=key`` names the region. Those of another
    step have the number -1.

    Attributes:
        ahead: By group: what was said to be wanted next when it was entered.
        stayed: The groups that stay.
    """

    def __init__(self, schedule: Schedule, program: str, *, keep_last=0, distance=1) -> None:
        self.ahead: dict[int, list[int]] = {}
        self.stayed: list[int] = []
        self.groups: dict[int, Group] = {}
        for word in program.split():
            name, _, key = word[1:].partition("=")
            index = int(name)
            if word[0] == "b":
                group = schedule.begin(key or index, f"layers.{index}", keep_last=keep_last)
                self.groups[index] = group
                if group.stays:
                    self.stayed.append(index)
            else:
                found = schedule.enter(self.groups[index], distance)
                self.ahead[index] = [self.number(group) for group in found]

    def number(self, group: Group) -> int:
        return next((i for i, other in self.groups.items() if other is group), -1)


LIFO = "b0 b1 b2 b3 e3 e2 e1 e0"
PIPELINE = "b0 b1 b2 e0 b3 e1 b4 e2 b5 e3 e4 e5"
INTERLEAVED = "b0 b1 b2 b3 e1 e3 e0 e2"


def test_the_latest_is_expected_first():
    step = Step(Schedule(), LIFO, distance=2)
    assert step.ahead == {3: [2, 1], 2: [1, 0], 1: [0], 0: []}
    assert step.stayed == []


def test_the_first_step_of_a_pipeline_guesses_by_the_latest():
    assert Step(Schedule(), PIPELINE).ahead == {0: [], 1: [], 2: [], 3: [], 4: [], 5: []}


def test_plain_training_is_learnt():
    schedule = Schedule()
    for _ in range(3):
        step = Step(schedule, LIFO, distance=3)
        assert step.ahead == {3: [2, 1, 0], 2: [1, 0], 1: [0], 0: []}


def test_a_1f1b_pipeline_is_learnt():
    """Backward wants the oldest micro-batch first, while later ones are still to begin."""
    schedule = Schedule()
    Step(schedule, PIPELINE)
    for _ in range(2):
        step = Step(schedule, PIPELINE, distance=2)
        # What has not begun yet cannot be fetched.
        assert step.ahead == {0: [1, 2], 1: [2, 3], 2: [3, 4], 3: [4, 5], 4: [5], 5: []}


def test_an_interleaved_order_is_learnt():
    schedule = Schedule()
    assert Step(schedule, INTERLEAVED, distance=3).ahead == {1: [0], 3: [2, 0], 0: [], 2: []}
    step = Step(schedule, INTERLEAVED, distance=3)
    assert step.ahead == {1: [3, 0, 2], 3: [0, 2], 0: [2], 2: []}


def test_a_distance_of_0_fetches_nothing_ahead_and_learns_all_the_same():
    schedule = Schedule()
    assert set(map(tuple, Step(schedule, INTERLEAVED, distance=0).ahead.values())) == {()}
    assert Step(schedule, INTERLEAVED).ahead == {1: [3], 3: [0], 0: [2], 2: []}


def test_two_models_that_take_turns_have_an_order_each():
    """A GAN: the discriminator's step wants the oldest first, the generator's the latest."""
    discriminator = "b0=d0 b1=d1 b2=d2 e0 e1 e2"
    generator = "b0=g0 b1=g1 b2=d0 b3=d1 e2 e3 e1 e0"
    schedule = Schedule()
    for _ in range(2):
        Step(schedule, discriminator)
        Step(schedule, generator)
    for _ in range(2):
        assert Step(schedule, discriminator).ahead == {0: [1], 1: [2], 2: []}
        assert Step(schedule, generator).ahead == {2: [3], 3: [1], 1: [0], 0: []}


def test_the_same_region_called_several_times_is_several_groups():
    schedule = Schedule()
    program = "b0=x b1=x b2=x e0 e2 e1"
    assert Step(schedule, program).ahead == {0: [], 2: [1], 1: []}
    assert Step(schedule, program).ahead == {0: [2], 2: [1], 1: []}


OTHER = "b0 b1=new b2 b3 e3 e2 e0 e1"


def test_a_step_of_another_structure_falls_back_to_the_latest_first_and_is_learnt():
    schedule = Schedule()
    for _ in range(2):
        assert Step(schedule, INTERLEAVED, keep_last=1).stayed in ([], [3])
    first = Step(schedule, OTHER, keep_last=1)
    assert first.ahead == {3: [2], 2: [1], 0: [], 1: []}
    assert first.stayed == []
    second = Step(schedule, OTHER, keep_last=1)
    assert second.ahead == {3: [2], 2: [0], 0: [1], 1: []}
    assert second.stayed == [3]
    # It has taken the place of the order before, as both begin with the same region.
    assert Step(schedule, INTERLEAVED).ahead == {1: [0], 3: [2], 0: [], 2: []}


def test_more_groups_than_the_step_before_had_are_expected_latest_first():
    schedule = Schedule()
    Step(schedule, "b0 b1 e0 e1")
    step = Step(schedule, "b0 b1 b2 e2 e0 e1", distance=2)
    assert step.ahead == {2: [1, 0], 0: [], 1: []}


def test_fewer_groups_than_the_step_before_had_are_expected_in_its_order():
    schedule = Schedule()
    Step(schedule, INTERLEAVED)
    assert Step(schedule, "b0 b1 b2 e1 e0 e2", distance=3).ahead == {1: [0, 2], 0: [2], 2: []}


def test_groups_entered_again_are_told_apart_from_those_to_come():
    """A second backward through a graph that is retained finds all of them entered."""
    schedule = Schedule()
    step = Step(schedule, LIFO + " e3 e2 e1 e0")
    assert step.ahead == {3: [], 2: [], 1: [], 0: []}


def test_the_first_of_several_backwards_is_learnt():
    schedule = Schedule()
    Step(schedule, "b0 b1 b2 e0 e1 e2 e2 e1 e0")
    assert Step(schedule, "b0 b1 b2 e0 e1 e2").ahead == {0: [1], 1: [2], 2: []}


def test_so_many_orders_are_remembered_and_the_oldest_is_forgotten():
    schedule = Schedule()
    for number in range(scheduler.MAX_REMEMBERED):
        Step(schedule, f"b0={number}a b1=x b2=x e0 e1 e2")
    program = "b0={}a b1=x b2=x e0 e1 e2"
    learnt, unlearnt = {0: [1], 1: [2], 2: []}, {0: [], 1: [], 2: []}
    assert Step(schedule, program.format(0)).ahead == learnt  # and is the latest now
    assert Step(schedule, program.format("new")).ahead == unlearnt
    Step(schedule, "b0=other e0")
    assert Step(schedule, program.format(0)).ahead == learnt
    assert Step(schedule, program.format(1)).ahead == unlearnt


def test_a_step_without_an_end_is_given_up(monkeypatch):
    """A group that is never entered and never dies must not make all that follows one step."""
    monkeypatch.setattr(scheduler, "MAX_GROUPS", 8)
    schedule = Schedule()
    kept = schedule.begin("kept", "", keep_last=0)
    Step(schedule, "b0 b1 b2 e0 e1 e2")
    Step(schedule, "b0 b1 b2 b3 e3 e2 e1 e0")
    program = "b0 b1 b2 e0 e1 e2"
    step = Step(schedule, program)
    assert step.groups[0].step is not kept.step
    assert step.ahead == {0: [], 1: [], 2: []}
    assert Step(schedule, program).ahead == {0: [1], 1: [2], 2: []}
    # It has taught what follows in one step, and no more.
    step = Step(schedule, "b9=kept b0 b1 b2 e0 e1 e2 e9")
    assert step.ahead == {0: [1], 1: [2], 2: [], 9: []}


# --- What stays


def test_nothing_stays_in_the_first_step_and_the_last_ones_from_the_second_on():
    for keep_last in range(5):
        schedule = Schedule()
        assert Step(schedule, LIFO, keep_last=keep_last).stayed == []
        for _ in range(2):
            step = Step(schedule, LIFO, keep_last=keep_last)
            assert step.stayed == list(range(4 - keep_last, 4))
            # What stays need not be fetched.
            left = 4 - keep_last
            assert step.ahead == {i: [min(i, left) - 1] if min(i, left) else [] for i in range(4)}


def test_what_stays_follows_the_distance_to_backward_and_not_the_end_of_the_step():
    """One block of each micro-batch: its backward comes right after its forward."""
    schedule = Schedule()
    program = "b0 e0 b1 b2 e1 e2"
    for _ in range(2):
        step = Step(schedule, "b9 " + program + " e9", keep_last=1)
    assert step.stayed == [0, 1, 2]
    assert Step(schedule, PIPELINE, keep_last=1).stayed == []
    assert Step(schedule, PIPELINE, keep_last=1).stayed == []
    assert Step(schedule, PIPELINE, keep_last=2).stayed == [0, 1, 4, 5]


def test_nothing_stays_where_the_step_is_another_one():
    schedule = Schedule()
    Step(schedule, LIFO, keep_last=1)
    assert Step(schedule, "b0 b1 b2=other b3 e3 e2 e1 e0", keep_last=4).stayed == [0, 1]


# --- Groups that backward does not reach


def test_groups_that_die_without_backward_end_a_step_and_teach_nothing():
    schedule = Schedule()
    Step(schedule, INTERLEAVED)
    for _ in range(3):
        step = Step(schedule, "b0 b1 b2 b3")  # an evaluation with grad mode on
        assert len({id(group.step) for group in step.groups.values()}) == 1
        del step
    assert Step(schedule, INTERLEAVED).ahead == {1: [3], 3: [0], 0: [2], 2: []}


def test_an_evaluation_of_other_regions_does_not_disturb_training():
    schedule = Schedule()
    for _ in range(3):
        step = Step(schedule, INTERLEAVED)
        Step(schedule, "b0=e b1=e b2=e")
    assert step.ahead == {1: [3], 3: [0], 0: [2], 2: []}


def test_a_group_that_is_abandoned_within_a_step_is_skipped():
    schedule = Schedule()
    step = Step(schedule, "b0 b1 b2 b3 e3")
    del step.groups[2]
    found = schedule.enter(step.groups[3], 3)
    assert [step.number(group) for group in found] == [1, 0]
    del found
    first = step.groups[0].step
    schedule.enter(step.groups[1], 1)
    schedule.enter(step.groups[0], 1)
    assert schedule.begin(0, "", keep_last=0).step is not first


def test_a_group_that_waits_holds_the_step_open_until_backward_has_reached_the_latest():
    schedule = Schedule()
    step = Step(schedule, "b0 b1 b2 e1")
    assert schedule.begin(3, "", keep_last=0).step is step.groups[0].step
    # A graph that is kept, perhaps for good, does not.
    step = Step(schedule, "b0 b1 e1")
    assert schedule.begin(2, "", keep_last=0).step is not step.groups[0].step


def test_nothing_here_keeps_a_group_alive():
    schedule = Schedule()
    for _ in range(2):
        step = Step(schedule, LIFO, keep_last=1, distance=4)
        references = [weakref.ref(group) for group in step.groups.values()]
        assert None not in [ref() for ref in references]
        gc.disable()
        try:
            del step
            assert [ref() for ref in references] == [None] * 4
        finally:
            gc.enable()


# --- Ratio


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_what_is_moved_is_never_more_than_the_ratio_allows(ratio):
    generator = random.Random(int(ratio * 100))
    for _ in range(20):
        group = Schedule().begin(0, "", keep_last=0)
        seen = moved = 0
        largest = 0
        for _ in range(200):
            size = generator.choice([1, 1000, 1 << 20, generator.randrange(1, 1 << 30)])
            largest = max(largest, size)
            seen += size
            if group.should_move(size, ratio):
                moved += size
            assert moved <= ratio * seen
            assert (group.seen_bytes, group.moved_bytes) == (seen, moved)
        # And as much as possible: what is missing is less than one tensor.
        assert moved > ratio * seen - largest or ratio == 0
        if ratio in (0, 1):
            assert moved == ratio * seen


def test_half_of_equal_tensors_are_moved_in_turns():
    group = Schedule().begin(0, "", keep_last=0)
    assert [group.should_move(100, 0.5) for _ in range(6)] == [False, True] * 3


def test_what_stays_is_seen_and_not_moved():
    schedule = Schedule()
    Step(schedule, "b0 e0")
    group = schedule.begin(0, "", keep_last=1)
    assert group.stays
    assert not group.should_move(100, 1.0)
    assert (group.seen_bytes, group.moved_bytes) == (100, 0)


# --- In flight


class Copy:
    """A copy that is done when it is told so, or waited for."""

    def __init__(self, nbytes: int, log: list[tuple[str, int]], number: int = 0) -> None:
        self.nbytes = nbytes
        self.number = number
        self.has_arrived = False
        self._log = log

    def is_done(self) -> bool:
        return self.has_arrived

    def finish(self) -> None:
        self._log.append(("finish", self.number))
        self.has_arrived = True

    def settle(self) -> None:
        assert self.has_arrived
        self._log.append(("settle", self.number))


def begin(flight: InFlight, limit: int, *copies: Copy) -> None:
    for copy in copies:
        flight.make_room(copy.nbytes, limit)
        flight.add(copy)


def test_the_oldest_is_waited_for_first_and_no_longer_than_needed():
    log: list[tuple[str, int]] = []
    flight = InFlight(100)
    begin(flight, 100, *(Copy(30, log, number) for number in range(3)))
    assert log == []
    assert flight.nbytes == flight.peak_bytes == 90
    begin(flight, 100, Copy(40, log, 3))
    assert log == [("finish", 0), ("settle", 0)]
    assert (flight.nbytes, len(flight)) == (100, 3)
    begin(flight, 100, Copy(70, log, 4))
    assert [number for what, number in log if what == "finish"] == [0, 1, 2, 3]
    assert flight.nbytes == 70
    assert flight.peak_bytes == 100


def test_a_copy_larger_than_the_limit_goes_alone():
    log: list[tuple[str, int]] = []
    flight = InFlight(100)
    begin(flight, 100, Copy(60, log, 0), Copy(500, log, 1))
    assert (flight.nbytes, len(flight)) == (500, 1)
    assert log == [("finish", 0), ("settle", 0)]
    begin(flight, 100, Copy(1, log, 2))
    assert (flight.nbytes, len(flight)) == (1, 1)
    assert flight.peak_bytes == 500


def test_poll_never_waits_and_lets_go_of_the_first_ones_that_are_done():
    log: list[tuple[str, int]] = []
    flight = InFlight(100)
    copies = [Copy(10, log, number) for number in range(4)]
    begin(flight, 100, *copies)
    flight.poll()
    assert (log, len(flight)) == ([], 4)
    copies[0].has_arrived = copies[1].has_arrived = copies[3].has_arrived = True
    flight.poll()
    assert log == [("settle", 0), ("settle", 1)]
    assert (flight.nbytes, len(flight)) == (20, 2)
    copies[2].has_arrived = True
    flight.poll()
    assert log[2:] == [("settle", 2), ("settle", 3)]
    assert flight.nbytes == 0


def test_room_is_made_by_what_has_arrived_before_anything_is_waited_for():
    log: list[tuple[str, int]] = []
    flight = InFlight(100)
    copies = [Copy(50, log, number) for number in range(2)]
    begin(flight, 100, *copies)
    copies[0].has_arrived = True
    begin(flight, 100, Copy(50, log, 2))
    assert log == [("settle", 0)]


def test_so_many_copies_at_once_and_no_more():
    log: list[tuple[str, int]] = []
    flight = InFlight(3)
    begin(flight, 1 << 40, *(Copy(1, log, number) for number in range(5)))
    assert len(flight) == 3
    assert log == [("finish", 0), ("settle", 0), ("finish", 1), ("settle", 1)]
    assert not flight.has_room(0, 1 << 40)


def test_all_of_them_can_be_waited_for():
    log: list[tuple[str, int]] = []
    flight = InFlight(100)
    begin(flight, 100, *(Copy(10, log, number) for number in range(3)))
    flight.finish_all()
    assert [number for what, number in log if what == "settle"] == [0, 1, 2]
    assert (flight.nbytes, len(flight), flight.peak_bytes) == (0, 0, 30)


@pytest.mark.parametrize("seed", range(4))
def test_random_copies_stay_within_the_limits_and_settle_in_order(seed):
    generator = random.Random(seed)
    log: list[tuple[str, int]] = []
    flight = InFlight(8)
    limit = 1000
    under_way: list[Copy] = []
    peak = 0
    for number in range(2000):
        copy = Copy(generator.randrange(1, 10 ** generator.randrange(1, 5)), log, number)
        begin(flight, limit, copy)
        under_way.append(copy)
        settled = sum(what == "settle" for what, _ in log)
        inside = under_way[settled:]
        assert len(inside) == len(flight) <= 8
        assert sum(c.nbytes for c in inside) == flight.nbytes
        assert flight.nbytes <= limit or len(flight) == 1
        peak = max(peak, flight.nbytes)
        if generator.random() < 0.5:
            generator.choice(inside).has_arrived = True
    flight.finish_all()
    assert [number for what, number in log if what == "settle"] == list(range(2000))
    assert flight.peak_bytes == peak
