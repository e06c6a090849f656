"""A process killed at any moment of a save leaves the previous state checkpoint, and no litter
after the next save.

After each death the same is asked (``Survivor.check``): ``latest`` names a step whose save had at
least begun and is not older than the last that returned; it passes ``verify`` and gives the values
of that step; so does everything else that is visible in the folder. Then the interrupted step is
saved again, as a restarted job would, and nothing but the last two is left.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time

import pytest
import torch

from tests.state.crashing import Nursery, at_step, make_job, path_of, save
from wrappers import state

LAYOUTS = ("dcp", "safetensors")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


class Survivor:
    """The job that goes on in a folder where others have died."""

    def __init__(self, folder, layout="dcp"):
        self.folder, self.layout = folder, layout
        self.job = make_job()
        self.last_done = 0
        self.next_step = 1
        self.num_partial = 0

    def check(self, found):
        """What must hold after a death; ``found`` is the nursery's answer."""
        self.last_done = max(self.last_done, found["done"])
        newest = state.latest(self.folder)
        visible = sorted(name for name in os.listdir(self.folder) if not name.startswith("."))
        self.num_partial += len(os.listdir(self.folder)) > len(visible)
        if newest is None:
            assert self.last_done == 0, "a save had returned"
            assert visible == []
        else:
            step = int(newest.name.rpartition("-")[2])
            assert step in (self.last_done, found["begun"])
            assert newest.name == visible[-1]
            assert len(visible) <= 3, "keep_last=2, and one before the oldest is removed"
            self.last_done = step
        for name in visible:
            state.verify(self.folder / name)
            self.check_values(self.folder / name)
        self.next_step = max(found["begun"], self.last_done + 1)

    def check_values(self, path):
        step = int(path.name.rpartition("-")[2])
        model, optimizer = self.job
        at_step(model, optimizer, 0)
        extra = state.load(path, model, optimizer, {"step": 0}, rng=False)
        assert extra["step"] == step
        for parameter in model.parameters():
            assert torch.equal(parameter, torch.full_like(parameter, step))
            momentum = optimizer.state[parameter]["momentum_buffer"]
            assert torch.equal(momentum, torch.full_like(parameter, -step))

    def save(self):
        """The next good save; it leaves the last two and nothing else."""
        step = self.next_step if self.next_step > self.last_done else self.last_done + 1
        save(self.folder, step, self.job, layout=self.layout)
        before = [self.last_done] if self.last_done else []
        self.last_done, self.next_step = step, step + 1
        names = sorted(path_of(self.folder, s).name for s in (*before, step))
        assert sorted(os.listdir(self.folder)) == names


# --- At every file-system call ------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_first", [True, False], ids=["first save", "third save"])
def test_death_at_every_file_system_call(nursery, tmp_path, layout, is_first):
    survivor = Survivor(tmp_path / "runs", layout)
    survivor.folder.mkdir()
    if not is_first:
        survivor.save()
        survivor.save()
    num_deaths, events = 0, 0
    while True:
        if is_first and num_deaths:  # each time into an empty folder
            survivor = Survivor(tmp_path / f"runs-{num_deaths}", layout)
            survivor.folder.mkdir()
        found = nursery(survivor.folder, survivor.next_step, die_at=num_deaths + 1, layout=layout)
        assert found["errors"] == {}
        survivor.check(found)
        if found["signals"] == [0]:
            events = found["num_calls"]
            break
        assert found["signals"] == [signal.SIGKILL]
        num_deaths += 1
        survivor.save()
    assert num_deaths == events > 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_death_in_the_middle_of_a_file(nursery, tmp_path, layout):
    """The kernel ends the process at the n-th byte of any file: files cut off at many lengths."""
    survivor = Survivor(tmp_path / "runs", layout)
    survivor.folder.mkdir()
    survivor.save()
    survivor.save()
    newest = state.latest(survivor.folder)
    largest = max(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    assert largest > 1000
    # Not up to the last byte: numbers in text differ in length from one save to the next.
    for num_bytes in [0, 1, *range(97, largest * 9 // 10, largest // 12)]:
        found = nursery(
            survivor.folder, survivor.next_step, max_file_bytes=num_bytes, layout=layout
        )
        assert found["signals"] == [signal.SIGXFSZ]
        assert found["done"] == 0
        survivor.check(found)
        survivor.save()
    assert survivor.num_partial > 0


# --- At a random moment -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "is_async", "num_kills"),
    [("dcp", False, 50), ("dcp", True, 30), ("safetensors", False, 30)],
)
def test_kill_at_a_random_moment(nursery, tmp_path, layout, is_async, num_kills):
    rng = random.Random(0)
    survivor = Survivor(tmp_path / "runs", layout)
    survivor.folder.mkdir()
    start = time.perf_counter()
    for _ in range(3):
        survivor.save()
    save_s = (time.perf_counter() - start) / 3
    for _ in range(num_kills):
        found = nursery(
            survivor.folder,
            survivor.next_step,
            num_saves=1000,
            kill_after_s=rng.uniform(0.0, 3 * save_s),
            layout=layout,
            is_async=is_async,
        )
        assert found["errors"] == {}
        assert found["signals"] == [signal.SIGKILL]
        survivor.check(found)
        survivor.save()
    assert survivor.num_partial > 0, "no kill has hit a save"


@pytest.mark.parametrize("kill_ranks", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("is_async", [False, True], ids=["save", "async"])
def test_kill_one_of_two_ranks(nursery, tmp_path, kill_ranks, is_async):
    """The other rank ends with an error instead of waiting for the dead one."""
    rng = random.Random(0)
    survivor = Survivor(tmp_path / "runs")
    survivor.folder.mkdir()
    survivor.save()
    for _ in range(6):
        found = nursery(
            survivor.folder,
            survivor.next_step,
            num_saves=1000,
            kill_after_s=rng.uniform(0.0, 0.2),
            kill_ranks=kill_ranks,
            world_size=2,
            is_async=is_async,
        )
        for rank in (0, 1):
            if rank in kill_ranks:
                assert found["signals"][rank] == signal.SIGKILL
            else:
                assert found["signals"][rank] == 0
                assert found["errors"][str(rank)] != "hangs"
        survivor.check(found)
        survivor.save()


# --- Two jobs in one folder ---------------------------------------------------------------------


def test_what_a_living_process_writes_is_no_litter(nursery, tmp_path):
    """Another job saves, and removes litter, while the first is stopped in its save."""
    for at in itertools.count(1):
        folder = tmp_path / f"runs-{at}"
        folder.mkdir()
        found = nursery(folder, 1, stop_at=at, meanwhile={"step": 2})
        assert found["meanwhile"]["errors"] == {}
        assert found["errors"] == {}, f"stopped at call {at}"
        for step in (1, 2):
            state.verify(path_of(folder, step))
        assert sorted(os.listdir(folder)) == [path_of(folder, step).name for step in (1, 2)]
        if at == found["num_calls"]:
            break


def test_two_jobs_that_save_the_same_step(nursery, tmp_path):
    """The later one is refused, and the earlier one's is not touched."""
    num_refused = 0
    for at in itertools.count(1):
        folder = tmp_path / f"runs-{at}"
        folder.mkdir()
        found = nursery(folder, 1, stop_at=at, meanwhile={"kwargs": {"layout": "safetensors"}})
        meanwhile = found["meanwhile"]
        if found["errors"]:
            num_refused += 1
            assert "FileExistsError" in found["errors"]["0"]
            assert meanwhile["errors"] == {}
        else:  # the first had published when it was stopped
            assert "FileExistsError" in meanwhile["errors"]["0"]
        state.verify(path_of(folder, 1))
        manifest = json.loads((path_of(folder, 1) / "manifest.json").read_text())
        assert manifest["layout"] == ("safetensors" if found["errors"] else "dcp")
        save(folder, 2, make_job())
        assert sorted(os.listdir(folder)) == [path_of(folder, step).name for step in (1, 2)]
        if at == found.get("num_calls"):
            break
    assert num_refused > 5


# --- What a power cut would leave -----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_is_on_the_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path, monkeypatch, layout
):
    """Every file and directory is synced, then renamed once, then the folder is synced."""
    folder = tmp_path / "runs"
    folder.mkdir()
    log = []
    fsync, rename = os.fsync, os.rename

    def spied_fsync(fd):
        log.append(("fsync", os.stat(fd).st_ino))
        fsync(fd)

    def spied_rename(source, target, **kwargs):
        log.append(("rename", os.fspath(target)))
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "rename", spied_rename)
    save(folder, 1, make_job(), layout=layout)
    published = path_of(folder, 1)
    at = log.index(("rename", str(published)))
    assert log.count(log[at]) == 1
    synced = {value for kind, value in log[:at] if kind == "fsync"}
    for found in (published, *published.rglob("*")):
        assert found.stat().st_ino in synced, f"{found} was not synced before the rename"
    assert ("fsync", folder.stat().st_ino) in log[at:]
