"""The main job under torchrun when things go wrong: workers that are killed, a rank that raises."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from scripts.train import Result
from tests.scripts.raising_job import CULPRIT
from tests.scripts.torchrun import Torchrun

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

SIZES = ["--layers=2", "--d-model=32", "--heads=2", "--seq=64", "--batch=2"]
NUM_STEPS = 28
JOB = ["scripts/train.py", *SIZES, f"--steps={NUM_STEPS}", "--json"]
#: A rank that raises ends the job; the others would wait for gloo's 30 minutes.
BOUND_S = 60.0


def loss_of(path: Path) -> str:
    return repr(Result(**json.loads(path.read_text())).loss)


def step_of(path: Path) -> int:
    return int(path.name.partition("step-")[2].partition(".")[0])


@pytest.mark.slow
def test_killed_workers_are_restarted_and_change_nothing(tmp_path):
    """One is killed between two saves, later another while it saves."""
    with Torchrun(tmp_path, *JOB, str(tmp_path / "calm.json"), "--impl=none") as run:
        assert run.wait() == 0, run.output

    folder = tmp_path / "states"
    options = ["--save", str(folder), "--save-every=4", "--keep-last=1", "--resume"]
    disturbed = [*JOB, str(tmp_path / "disturbed.json"), *options]
    with Torchrun(tmp_path, *disturbed, max_restarts=2) as run:
        run.wait_until(lambda: (folder / "step-00000004").exists())
        run.kill(1)
        run.wait_until(lambda: "resumed from" in run.output)
        (first,) = re.findall(r"resumed from (\S+)", run.output)
        run.wait_until(lambda: any(step_of(path) > 8 for path in folder.glob(".*.partial-*")))
        run.kill(0)
        assert run.wait() == 0, run.output
        resumed = [step_of(Path(found)) for found in re.findall(r"resumed from (\S+)", run.output)]

    assert resumed[0] == step_of(Path(first))
    assert 4 <= resumed[0] < resumed[1] < NUM_STEPS
    assert "nothing to resume from" in run.output
    assert loss_of(tmp_path / "disturbed.json") == loss_of(tmp_path / "calm.json")
    assert [path.name for path in folder.iterdir()] == [f"step-{NUM_STEPS:08}"]


@pytest.mark.parametrize("where", ["forward", "recompute"])
def test_a_rank_that_raises_in_a_region_ends_the_job_with_its_traceback(where, tmp_path):
    start = time.monotonic()
    with Torchrun(tmp_path, "tests/scripts/raising_job.py", where, *SIZES) as run:
        assert run.wait() == 1
    assert time.monotonic() - start < BOUND_S
    cause = run.output.partition("Root Cause (first observed failure):")[2]
    assert re.search(rf"rank +: {CULPRIT} ", cause), run.output
    assert "raise BlockError(" in cause
    assert f"BlockError: {where} on rank {CULPRIT}" in cause
    assert ("loss.backward()" in cause) == (where == "recompute")
