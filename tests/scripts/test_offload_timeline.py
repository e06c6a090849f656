"""The drawing of an offloaded step: that its spans make sense, and that it is the committed one."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest

from scripts.bench import offload_timeline
from scripts.bench.offload_timeline import (
    BANDWIDTH_BYTES_PER_S,
    D_MODEL,
    LATENCY_S,
    NUM_BLOCKS,
    SEQ_LEN,
    SLOWER_BYTES_PER_S,
    Timeline,
    forward_s,
    hidden_share,
    least_width,
    run,
)
from wrappers.offload.simulated import Span

pytestmark = pytest.mark.usefixtures("no_leaks", "seeded")

#: Bytes of one (batch, sequence, width) tensor.
D = 2 * SEQ_LEN * D_MODEL


@pytest.fixture(scope="module")
def fast() -> Timeline:
    return run(BANDWIDTH_BYTES_PER_S)


@pytest.fixture(scope="module")
def slow() -> Timeline:
    return run(SLOWER_BYTES_PER_S)


def spans(timeline: Timeline, *rows: str) -> list[Span]:
    return [span for span in timeline.spans if span.row in rows]


def seconds(found: list[Span], name: str = "") -> float:
    return sum(s.end_s - s.start_s for s in found if s.name == name)


@pytest.mark.parametrize("which", ["fast", "slow"])
def test_a_row_does_one_thing_at_a_time_within_the_step(which, request):
    timeline = request.getfixturevalue(which)
    for rows in (["compute", "wait"], ["D2H"], ["H2D"]):
        found = spans(timeline, *rows)
        assert found[0].start_s >= 0
        assert found[-1].end_s <= timeline.step_s + 1e-9
        for before, after in itertools.pairwise(found):
            assert before.end_s <= after.start_s + 1e-9


@pytest.mark.parametrize("which", ["fast", "slow"])
def test_a_step_is_compute_and_waiting(which, request):
    timeline = request.getfixturevalue(which)
    assert timeline.step_s == pytest.approx(timeline.compute_s + timeline.waited_s)


@pytest.mark.parametrize("which", ["fast", "slow"])
def test_a_copy_takes_what_the_link_says(which, request):
    timeline = request.getfixturevalue(which)
    for span in spans(timeline, "D2H", "H2D"):
        expected = LATENCY_S + span.nbytes / timeline.bandwidth_bytes_per_s
        assert span.end_s - span.start_s == pytest.approx(expected)
        assert span.nbytes in (D, 3 * D, 4 * D)


def test_the_compute_is_that_of_the_formula(fast, slow):
    forward = NUM_BLOCKS * SEQ_LEN * forward_s(D_MODEL)
    products = NUM_BLOCKS * SEQ_LEN * forward_s(D_MODEL, seq_len=0)
    for timeline in (fast, slow):
        compute = spans(timeline, "compute")
        assert seconds(compute, "forward") == pytest.approx(forward)
        # Attention's backward has five products for forward's two.
        assert seconds(compute, "backward") == pytest.approx(
            2 * products + 2.5 * (forward - products)
        )


def test_all_blocks_but_the_last_leave_and_come_back(fast):
    assert fast.out_bytes == fast.back_bytes == (NUM_BLOCKS - 1) * 16 * D
    assert len(spans(fast, "D2H")) == len(spans(fast, "H2D")) == (NUM_BLOCKS - 1) * 8


def test_what_is_needed_first_comes_back_first(fast):
    """Each block's bytes leave and return in opposite orders."""
    out, back = ([span.nbytes for span in spans(fast, row)] for row in ("D2H", "H2D"))
    assert sorted(out[:8]) == sorted(back[-8:]) == [D, D, D, D, D, 3 * D, 4 * D, 4 * D]


def test_a_sufficient_link_costs_nothing_and_a_slower_one_does(fast, slow):
    assert hidden_share(D_MODEL, BANDWIDTH_BYTES_PER_S) > 1 > hidden_share(D_MODEL, 25e9)
    assert (fast.waited_s, spans(fast, "wait")) == (0, [])
    assert slow.waited_s > 0.1 * slow.compute_s
    assert slow.back_bytes < slow.out_bytes  # What has not left does not have to come back.


def test_more_bytes_in_flight_hide_more():
    waits = [
        run(SLOWER_BYTES_PER_S, max_inflight_bytes=int(gib * 2**30)).waited_s for gib in (0.5, 1, 4)
    ]
    assert waits[0] > waits[1] > waits[2] > 0


def test_the_least_width_is_where_all_is_hidden():
    width = least_width(BANDWIDTH_BYTES_PER_S)
    assert hidden_share(width, BANDWIDTH_BYTES_PER_S) == pytest.approx(1)
    assert hidden_share(width, BANDWIDTH_BYTES_PER_S / 2) == pytest.approx(0.5)
    # 32 bytes against 24 w + 4 s FLOPs, at 8000 FLOPs a byte.
    assert width == (32 * 8000 - 4 * 4096) / 24


def test_the_committed_picture_is_that_of_the_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / "offload.svg"
    monkeypatch.setattr(sys, "argv", ["offload_timeline", "--out", str(path)])
    offload_timeline.main()
    committed = Path(offload_timeline.__file__).parents[2] / "docs/offload.svg"
    drawn, there = (p.read_text() for p in (path, committed))
    assert texts(drawn) == texts(there)
    assert texts(drawn)[4:5] == [run(BANDWIDTH_BYTES_PER_S).title]
    assert capsys.readouterr().out.startswith("| run | step | waiting |")
    rows, there = bars(drawn), bars(there)
    # One end to end for forward and backward, 56 copies out, 56 back.
    assert [len(row) // 2 for row in rows][:4] == [1, 1, 56, 56]
    for row, other in zip(rows, there, strict=True):
        assert row == pytest.approx(other, abs=1e-3)


def texts(picture: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def bars(picture: str) -> list[list[float]]:
    """Where the bars of each row begin and end, between 0 (the first one) and 1 (the last one)."""
    rows = []
    for row in re.findall(r'<g id="PolyCollection_\d+">(.*?)\n   </g>', picture, re.DOTALL):
        corners = [float(x) for x in re.findall(r"[ML] ([\d.]+) -?[\d.]+", row)]
        edges = [x for bar in range(0, len(corners), 4) for x in corners[bar + 1 : bar + 3]]
        first, last = min(edges), max(edges)
        rows.append([(x - first) / (last - first) for x in edges])
    return rows
