"""Names, manifests, publishing, pruning, litter: a state checkpoint as files."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from wrappers import state
from wrappers.state import CheckpointException, StateError, files

pytestmark = pytest.mark.usefixtures("seeded")


def save(path, **kwargs):
    return state.save(path, nn.Linear(2, 2), **kwargs)


def failure_of(function, *args, **kwargs):
    """The only failure of the only rank."""
    with pytest.raises(CheckpointException) as caught:
        function(*args, **kwargs)
    ((rank, (error, frames)),) = caught.value.failures.items()
    assert rank == 0
    assert frames
    return error


# --- Paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_the_path_is_returned_absolute(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    assert save(kind("runs/deep/step-1")) == tmp_path / "runs" / "deep" / "step-1"
    assert state.latest(kind("runs/deep")) == tmp_path / "runs" / "deep" / "step-1"
    assert os.listdir("runs/deep") == ["step-1"]


def save_from_another_folder(folder):
    """Relative paths of ranks in different folders are different paths."""
    before = os.getcwd()
    os.chdir(folder / str(dist.get_rank()))
    try:
        with pytest.raises(CheckpointException) as caught:
            save("x")
    finally:
        os.chdir(before)
    return {rank: type(error).__name__ for rank, (error, _) in caught.value.failures.items()}


def test_relative_paths_in_different_folders(ranks, tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    assert ranks(save_from_another_folder, tmp_path) == [{1: "ValueError"}] * 2
    assert os.listdir(tmp_path / "0") == []


def test_a_relative_path_means_the_folder_of_the_call(tmp_path, monkeypatch):
    """Also in the background, where the folder may have changed before anything is written."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    start = threading.Thread.start

    def start_elsewhere(thread):
        monkeypatch.chdir(tmp_path / "other")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_elsewhere)
    assert state.async_save("x", nn.Linear(2, 2)).result() == tmp_path / "x"
    assert os.listdir(tmp_path / "other") == []


@pytest.mark.parametrize("path", ["s3://bucket/step-1", "gs://b/c", "file:///tmp/x"])
@pytest.mark.parametrize("function", [state.save, state.async_save, state.load])
def test_urls_are_refused(path, function):
    with pytest.raises(ValueError, match=r"is a URL.*renaming"):
        function(path, nn.Linear(2, 2))
    for look in (state.latest, state.verify):
        with pytest.raises(ValueError, match="is a URL"):
            look(path)


@pytest.mark.parametrize("name", ["/", ".a.partial-0123abcd"])
def test_names_that_cannot_be_used_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be that of a state checkpoint"):
        save(f"{tmp_path}/{name}" if name != "/" else name)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"keep_last": 0}, ValueError, "keep_last must be at least 1"),
        ({"keep_last": True}, ValueError, "keep_last"),
        ({"layout": "zip"}, ValueError, "layout must be one of"),
        ({"coordinator_rank": 1}, ValueError, "coordinator_rank must be a rank of the group of 1"),
        ({"coordinator_rank": -1}, ValueError, "coordinator_rank"),
        ({"path": 7}, TypeError, "int"),
        ({"path": b"x"}, TypeError, "path must be a str"),
    ],
)
def test_wrong_arguments_raise_at_once(tmp_path, kwargs, error, text):
    arguments = {"path": tmp_path / "x", **kwargs}
    with pytest.raises(error, match=text):
        save(arguments.pop("path"), **arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_nothing_is_overwritten(tmp_path, make):
    make(tmp_path / "x")
    error = failure_of(save, tmp_path / "x")
    assert type(error) is FileExistsError
    assert "never overwritten" in str(error)
    assert os.listdir(tmp_path) == ["x"]


def test_what_appears_during_the_save_is_not_overwritten(tmp_path, monkeypatch):
    rename = os.rename

    def late(source, target):
        if Path(target).name == "x":
            Path(target).mkdir()
            (Path(target) / "file").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert type(failure_of(save, tmp_path / "x")) is FileExistsError
    assert os.listdir(tmp_path) == ["x"]


# --- The manifest -------------------------------------------------------------------------------


def test_the_manifest_describes_every_file(tmp_path):
    path = save(tmp_path / "x")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["layout"] == "dcp"
    assert manifest["world_size"] == 1
    assert manifest["torch"] == str(torch.__version__)
    assert set(manifest["files"]) == set(os.listdir(path)) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"bytes": len(data), "crc32": zlib.crc32(data), "rank": 0}


@pytest.mark.parametrize("key", ["world_size", "torch", "created_ns", "layout", "format"])
def test_a_changed_head_is_found(tmp_path, key):
    path = save(tmp_path / "x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[key] = manifest[key] + type(manifest[key])(1)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StateError) as caught:
        state.verify(path)
    assert caught.value.path == path / "manifest.json"
    assert state.latest(tmp_path) is None


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "../x", "/x", "a//b", ""])
def test_names_that_no_file_can_have(tmp_path, name):
    path = save(tmp_path / "x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"][".metadata"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StateError):
        state.verify(path)
    assert state.latest(tmp_path) is None


def test_a_time_that_is_none(tmp_path):
    """With the right checksum: what somebody else has written must not break ``latest``."""
    for step in ("1", "2"):
        save(tmp_path / step)
    manifest = files.Manifest.read(tmp_path / "2")
    object.__setattr__(manifest, "created_ns", "now")
    (tmp_path / "2" / "manifest.json").write_text(json.dumps(manifest.to_json()))
    assert state.latest(tmp_path) == tmp_path / "1"


def test_an_error_says_what_is_wrong_and_what_to_do():
    error = StateError("/runs/x/file", "is missing")
    assert (error.path, error.cause) == (Path("/runs/x/file"), "is missing")
    assert str(error) == "/runs/x/file: is missing"


# --- The newest, and the last n -----------------------------------------------------------------


def test_the_newest_is_the_last_one_published_whatever_its_name(tmp_path):
    for name in ("b", "c", "a"):
        save(tmp_path / name)
        assert state.latest(tmp_path) == tmp_path / name


@pytest.mark.parametrize("link", ["a", "z"])
def test_links_are_other_names(tmp_path, link):
    """A link counts neither for ``latest``, where its target is, nor for ``keep_last``."""
    for step in ("1", "2"):
        save(tmp_path / step)
    (tmp_path / link).symlink_to("2")
    (tmp_path / f"{link} old").symlink_to("1")
    (tmp_path / f"{link} new").symlink_to("3")
    assert state.latest(tmp_path) == tmp_path / "2"
    save(tmp_path / "3", keep_last=2)
    assert state.latest(tmp_path) == tmp_path / "3"
    names = ["2", "3", link, f"{link} new", f"{link} old"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    (tmp_path / "moved").mkdir()
    (tmp_path / "3").rename(tmp_path / "moved" / "3")
    (tmp_path / "3").symlink_to("moved/3")
    assert state.latest(tmp_path) in (tmp_path / "3", tmp_path / f"{link} new")


def test_a_clock_that_goes_back_does_not_matter(tmp_path, monkeypatch):
    save(tmp_path / "1")
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    for name in ("2", "3"):
        save(tmp_path / name)
        assert state.latest(tmp_path) == tmp_path / name
    save(tmp_path / "4", keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def test_latest_looks_at_state_checkpoints_only(tmp_path):
    assert state.latest(tmp_path / "nothing") is None
    assert state.latest(tmp_path) is None
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert state.latest(tmp_path) is None
    assert state.latest(tmp_path / "file") is None
    save(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / ".x.partial-0123456789abcdef")
    assert state.latest(tmp_path) is None


def damage(path):
    (path / "__0_0.distcp").write_bytes(b"")


@pytest.mark.parametrize("keep_last", [1, 2, 3, 9])
def test_keep_last(tmp_path, keep_last):
    for step in range(5):
        save(tmp_path / str(step))
    save(tmp_path / "5", keep_last=keep_last)
    assert sorted(os.listdir(tmp_path)) == [str(step) for step in range(6)][-keep_last:]


def test_damaged_ones_do_not_count_and_stay(tmp_path):
    for step in range(4):
        save(tmp_path / str(step))
    damage(tmp_path / "2")
    damage(tmp_path / "3")
    (tmp_path / "notes").mkdir()
    save(tmp_path / "4", keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3", "4", "notes"]


def test_a_failed_save_removes_nothing(tmp_path):
    save(tmp_path / "1")
    save(tmp_path / "2")
    error = failure_of(save, tmp_path / "3", keep_last=1, extra={"x": lambda: None})
    assert isinstance(error, TypeError)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_removal_that_stops_halfway_leaves_litter_and_no_half(tmp_path, monkeypatch):
    for step in range(2):
        save(tmp_path / str(step))
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, ignore_errors: None)
    save(tmp_path / "2", keep_last=1)
    monkeypatch.undo()
    hidden = [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert len(hidden) == 2
    assert [path.name for path, _ in files.complete_in(tmp_path)] == ["2"]
    save(tmp_path / "3")
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


# --- Litter -------------------------------------------------------------------------------------


def make_litter(folder, name=".x.partial-0123456789abcdef"):
    folder.mkdir(exist_ok=True)
    (folder / name).mkdir()
    (folder / name / "__0_0.distcp").write_bytes(b"half")
    return folder / name


def test_litter_is_removed_by_the_next_save(tmp_path):
    make_litter(tmp_path)
    make_litter(tmp_path, ".y z.partial-ff")
    make_litter(tmp_path, ".partial")
    save(tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == [".partial", "x"]


def test_names_of_every_kind(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    make_litter(folder, ".a\nb.partial-0123")
    for name in ("a\nb", os.fsdecode(b"\xff"), "ä $"):
        path = save(folder / name, keep_last=1)
        state.load(path, nn.Linear(2, 2))
        assert state.latest(folder) == path
        assert os.listdir(folder) == [name]
    path.rename(folder / ".a\nb.partial-0123")
    assert state.latest(folder) is None


def test_litter_that_cannot_be_removed_stays(tmp_path, monkeypatch):
    """Another user's job has died in the same folder: that must not stop this one."""
    litter, lock = make_litter(tmp_path), files._lock

    def refuse(directory):
        if directory == litter:
            raise PermissionError(13, "Permission denied")
        return lock(directory)

    monkeypatch.setattr(files, "_lock", refuse)
    save(tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == [litter.name, "x"]


def test_a_folder_that_vanishes(tmp_path, monkeypatch):
    mkdir = os.mkdir

    def vanished(path, *args):
        if Path(path).name.startswith(".x.partial-"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        mkdir(path, *args)

    monkeypatch.setattr(os, "mkdir", vanished)
    with pytest.raises(FileNotFoundError):
        files.Partial(tmp_path / "x")
    assert not files._live


def test_a_lock_does_not_outlive_its_owner_in_a_fork(tmp_path):
    """A worker that was forked during a save has the directory's file open as well."""
    partial = files.Partial(tmp_path / "x")
    copied = os.dup(partial._lock)  # as fork does
    partial.close()
    files.remove_litter(tmp_path)
    assert os.listdir(tmp_path) == []
    os.close(copied)


def test_a_locked_directory_is_no_litter(tmp_path):
    litter = make_litter(tmp_path)
    descriptor = os.open(litter, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    save(tmp_path / "1")
    assert litter.exists()
    os.close(descriptor)
    save(tmp_path / "2")
    assert not litter.exists()


def test_without_locks_litter_goes_by_its_age(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    new, old = make_litter(tmp_path), make_litter(tmp_path, ".x.partial-00")
    then = time.time() - files.STALE_S - 1
    os.utime(old, (then, then))
    save(tmp_path / "1")
    assert new.exists()
    assert not old.exists()


def test_what_this_process_writes_is_never_litter(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    partial = files.Partial(tmp_path / "x")
    os.utime(partial.directory, (0, 0))
    save(tmp_path / "1")
    assert partial.directory.exists()
    partial.discard()
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_save_whose_directory_is_taken_for_litter_begins_again(tmp_path, monkeypatch, is_late):
    """Another job's clean-up may come between making the directory and locking it."""
    lock, taken = files._lock, []

    def interrupted(directory):
        descriptor = lock(directory) if is_late else None
        if not taken:
            taken.append(directory)
            os.rmdir(directory)
        return descriptor if is_late else lock(directory)

    monkeypatch.setattr(files, "_lock", interrupted)
    save(tmp_path / "x")
    assert taken
    assert os.listdir(tmp_path) == ["x"]
    state.verify(tmp_path / "x")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_no_file_stays_open(tmp_path):
    save(tmp_path / "0")
    num_open = len(os.listdir("/proc/self/fd"))
    make_litter(tmp_path)
    save(tmp_path / "1", keep_last=1)
    failure_of(save, tmp_path / "1")
    failure_of(save, tmp_path / "2", extra={"x": open})
    state.load(tmp_path / "1", nn.Linear(2, 2))
    assert len(os.listdir("/proc/self/fd")) == num_open
