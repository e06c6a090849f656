"""Damaged, missing and foreign files: the error names the file, on every rank, in both layouts.

Each case damages a copy of the newer of two state checkpoints. ``load`` and ``verify`` must raise
a ``StateError`` with the file's path, and ``latest`` must fall back to the older one where a file
is missing, cut off or not described.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.fsdp import fully_shard

from tests.state.crashing import at_step, make_job
from wrappers import state
from wrappers.state import CheckpointException, StateError

LAYOUTS = ("dcp", "safetensors")
MANIFEST = "manifest.json"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def make_sharded_job():
    """The same job, sharded over the processes' default group where there is one."""
    if not dist.is_initialized():
        return make_job()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def save_two(folder, layout):
    job = make_sharded_job()
    for step in (1, 2):
        at_step(*job, step)
        state.save(folder / f"step-{step}", *job, {"step": step}, layout=layout)


def errors_of(error):
    """(type's name, path, text) of each cause."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    return [
        (type(cause).__name__, str(getattr(cause, "path", None)), str(cause)) for cause in causes
    ]


def try_to_load(paths):
    """What loading each path raises on this rank; None where it does not."""
    job = make_sharded_job()
    at_step(*job, 0)
    found = []
    for path in paths:
        try:
            state.load(path, *job, {"step": 0}, rng=False)
            found.append(None)
        except (CheckpointException, StateError) as error:
            found.append(errors_of(error))
    return found


# --- Damages --------------------------------------------------------------------------------------


def data_files(path):
    """All files but the manifest, by their path in the state checkpoint."""
    return sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and file.name != MANIFEST
    )


def cut_off(path, name, other):
    os.truncate(path / name, (path / name).stat().st_size // 2)


def cut_last_byte(path, name, other):
    os.truncate(path / name, (path / name).stat().st_size - 1)


def make_empty(path, name, other):
    os.truncate(path / name, 0)


def lengthen(path, name, other):
    with (path / name).open("ab") as file:
        file.write(b"\0")


def flip(position):
    """Flip one bit, at a share of the file's length."""

    def damage(path, name, other):
        data = bytearray((path / name).read_bytes())
        data[int(position * (len(data) - 1))] ^= 0x10
        (path / name).write_bytes(data)

    return damage


def remove(path, name, other):
    (path / name).unlink()


def make_directory(path, name, other):
    (path / name).unlink()
    (path / name).mkdir()


def take_from_other(path, name, other):
    """The file of the same name, and here of the same size, of another state checkpoint."""
    shutil.copy(other / name, path / name)


def fill_with_zeros(path, name, other):
    """Zeros of the right size: what a file system may show after a power cut."""
    (path / name).write_bytes(bytes((path / name).stat().st_size))


#: Name: (what is done to a file, does ``latest`` have to skip it).
DAMAGES = {
    "cut off": (cut_off, True),
    "last byte missing": (cut_last_byte, True),
    "empty": (make_empty, True),
    "longer": (lengthen, True),
    "first bit": (flip(0.0), False),
    "a bit in the middle": (flip(0.5), False),
    "a bit near the end": (flip(0.9), False),
    "last byte": (flip(1.0), False),
    "missing": (remove, True),
    "a directory": (make_directory, True),
    "zeros": (fill_with_zeros, False),
    "of another checkpoint": (take_from_other, False),
}


class Cases:
    """Copies of two state checkpoints, one folder a case; the newer is damaged."""

    def __init__(self, folder):
        self.folder, self.original = folder, folder / "original"
        self.names = {}

    def add(self, case, damage, name):
        """Damage file ``name`` of a copy; return the damaged path."""
        copy = self.folder / f"case-{len(self.names)}"
        shutil.copytree(self.original, copy)
        path = copy / "step-2"
        damage(path, name, copy / "step-1")
        self.names[case] = (path, name)
        return path


def check_errors(path, name, errors):
    """All are StateErrors that name the file, as a field and in the text."""
    assert errors
    for kind, found_path, text in errors:
        assert kind == "StateError", (kind, text)
        assert found_path == str(path / name), text
        assert name in text


def check_verify(path, name):
    with pytest.raises(StateError) as caught:
        state.verify(path)
    check_errors(path, name, errors_of(caught.value))


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request, ranks, tmp_path_factory):
    """Two state checkpoints of a job of two processes."""
    folder = tmp_path_factory.mktemp("corruption")
    ranks(save_two, folder / "original", request.param)
    return folder / "original", request.param


@pytest.fixture
def cases(saved, tmp_path):
    made = Cases(tmp_path)
    made.original = saved[0]
    return made


def test_the_undamaged_one_loads_and_its_files_are_known(ranks, saved):
    folder, layout = saved
    path = folder / "step-2"
    assert state.latest(folder) == path
    state.verify(path)
    assert try_to_load([path]) == [None]
    assert ranks(try_to_load, [path]) == [[None], [None]]
    assert (path / MANIFEST).is_file()
    assert len(data_files(path)) >= 3
    if layout == "safetensors":
        for name in data_files(path):
            assert name.endswith((".safetensors", ".json"))


def check_cases(ranks, cases):
    """Each case is an error that names its file, in one process, in both of two, and in verify."""
    paths = [path for path, _ in cases.names.values()]
    alone, (rank0, rank1) = try_to_load(paths), ranks(try_to_load, paths)
    for (case, (path, name)), *found in zip(cases.names.items(), alone, rank0, rank1, strict=True):
        for errors in found:
            assert errors is not None, f"{case} was loaded"
            check_errors(path, name, errors)
        check_verify(path, name)


def test_damaged_files(ranks, cases):
    """Every kind of damage to every file, loaded by one process, and by two."""
    names = data_files(cases.original / "step-2")
    for what, (damage, _) in DAMAGES.items():
        for name in names:
            same = [(cases.original / step / name).read_bytes() for step in ("step-1", "step-2")]
            if damage is take_from_other and same[0] == same[1]:
                continue
            cases.add((what, name), damage, name)
    assert any(what == "of another checkpoint" for what, _ in cases.names)
    check_cases(ranks, cases)
    for case, (path, _) in cases.names.items():
        if DAMAGES[case[0]][1]:
            assert state.latest(path.parent) == path.parent / "step-1", case


def add_file(path, name, other):
    (path / name).write_bytes(b"foreign")


def add_directory(path, name, other):
    (path / name).mkdir()
    (path / name / "file").write_bytes(b"foreign")


def test_files_that_do_not_belong_there(ranks, cases):
    kind = Path(data_files(cases.original / "step-2")[0]).suffix
    for name in (f"extra{kind}", "core.1234", ".hidden", "__7_0.distcp"):
        cases.add(name, add_file, name)
    paths = [path for path, _ in cases.names.values()]
    alone, (rank0, rank1) = try_to_load(paths), ranks(try_to_load, paths)
    for (path, name), *found in zip(cases.names.values(), alone, rank0, rank1, strict=True):
        for errors in found:
            assert errors is not None, f"{name} was ignored"
            check_errors(path, name, errors)
        check_verify(path, name)


# --- The manifest ---------------------------------------------------------------------------------


def rewrite(change):
    """Change the manifest's JSON."""

    def damage(path, name, other):
        manifest = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(change(manifest) or manifest))

    return damage


def _first(manifest):
    return manifest["files"][min(manifest["files"])]


def _key_of_version(manifest):
    (key,) = (key for key in manifest if "format" in key or key == "version")
    return key


MANIFEST_DAMAGES = {
    "missing": remove,
    "empty": make_empty,
    "cut off": cut_off,
    "no text": lambda path, name, other: (path / name).write_bytes(b"\xff\xfe\0" * 50),
    "a directory": make_directory,
    "a list": rewrite(lambda manifest: [manifest]),
    "a number": rewrite(lambda manifest: 1),
    "nothing in it": lambda path, name, other: (path / name).write_text("{}"),
    "no files": rewrite(lambda manifest: manifest.pop("files") and None),
    "files is a list": rewrite(lambda manifest: manifest.update(files=list(manifest["files"]))),
    "a file without size": rewrite(lambda manifest: _first(manifest).pop("bytes") and None),
    "a file without checksum": rewrite(lambda manifest: _first(manifest).pop("crc32") and None),
    "a size that is text": rewrite(lambda manifest: _first(manifest).update(bytes="12")),
    "a file that is null": rewrite(
        lambda manifest: manifest["files"].update({min(manifest["files"]): None})
    ),
    "newer format": rewrite(lambda manifest: manifest.update({_key_of_version(manifest): 1000})),
    "format is text": rewrite(lambda manifest: manifest.update({_key_of_version(manifest): "1"})),
    "unknown layout": rewrite(lambda manifest: manifest.update(layout="zip")),
    "a file above": rewrite(
        lambda manifest: manifest["files"].update(
            {"../step-1/manifest.json": dict(_first(manifest))}
        )
    ),
    "an absolute file": rewrite(
        lambda manifest: manifest["files"].update({"/etc/hostname": dict(_first(manifest))})
    ),
    "deeply nested": lambda path, name, other: (path / name).write_text("[" * 100_000),
}


def test_a_damaged_manifest(ranks, cases):
    for what, damage in MANIFEST_DAMAGES.items():
        cases.add(what, damage, MANIFEST)
    check_cases(ranks, cases)
    for case, (path, _) in cases.names.items():
        assert state.latest(path.parent) == path.parent / "step-1", case


def test_the_manifest_of_another_checkpoint(ranks, cases):
    """Some file then is not what it says: which one does not matter."""
    path = cases.add("other", take_from_other, MANIFEST)
    for errors in (*try_to_load([path]), *(found[0] for found in ranks(try_to_load, [path]))):
        assert errors is not None
        assert {kind for kind, _, _ in errors} == {"StateError"}
    with pytest.raises(StateError):
        state.verify(path)


def test_an_error_tells_the_format_it_knows_and_the_one_it_has_found(cases):
    path = cases.add("newer", MANIFEST_DAMAGES["newer format"], MANIFEST)
    with pytest.raises(StateError, match=r"1000.*\b1\b|\b1\b.*1000"):
        state.verify(path)


def test_a_path_that_is_no_state_checkpoint(ranks, tmp_path):
    """Nothing there, an empty directory, a file: a StateError of that path, and no latest."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    paths = [tmp_path / "nothing", tmp_path / "empty", tmp_path / "file"]
    for found in (try_to_load(paths), *ranks(try_to_load, paths)):
        for path, errors in zip(paths, found, strict=True):
            assert errors is not None
            for kind, found_path, text in errors:
                assert kind == "StateError"
                assert found_path in (str(path), str(path / MANIFEST))
                assert str(path) in text
    assert state.latest(tmp_path) is None
    assert state.latest(tmp_path / "nothing") is None


def test_ranks_that_see_different_damage_are_told_apart(ranks, cases):
    """One rank's file is cut off, the other's missing: the errors name both or the first found,
    and all ranks hear the same."""
    names = data_files(cases.original / "step-2")

    def damage(path, name, other):
        cut_off(path, names[0], other)
        remove(path, names[-1], other)

    path = cases.add("both", damage, names[0])
    rank0, rank1 = ranks(try_to_load, [path])
    assert rank0 == rank1
    assert {kind for kind, _, _ in rank0[0]} == {"StateError"}
    assert {found for _, found, _ in rank0[0]} <= {str(path / names[0]), str(path / names[-1])}


# --- Hostile files --------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def replace(data):
    """Put ``data`` into a file and into the manifest: as one who can write there would."""

    def damage(path, name, other):
        (path / name).write_bytes(data)
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"][name].update(bytes=len(data), crc32=zlib.crc32(data))
        (path / MANIFEST).write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize("saved", ["dcp"], indirect=True)  # the other layout has no pickles
def test_a_pickle_with_code_in_it_is_refused(ranks, cases, tmp_path):
    bait = tmp_path / "executed"
    path = cases.add("hostile", replace(pickle.dumps(Payload(bait))), ".metadata")
    for errors in (*try_to_load([path]), *(found[0] for found in ranks(try_to_load, [path]))):
        assert errors is not None
        check_errors(path, ".metadata", errors)
        assert "trust_pickles=True" in errors[0][2]
    assert not bait.exists()
    state.verify(path)


@pytest.mark.parametrize("saved", ["dcp"], indirect=True)
def test_a_value_with_code_in_it_is_refused(ranks, cases, tmp_path):
    """The bytes of an entry that is no tensor, replaced in the data file."""
    original = cases.original / "step-2"
    metadata = pickle.loads((original / ".metadata").read_bytes())
    bait = tmp_path / "executed"
    entries = {
        index.fqn: info
        for index, info in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    }
    assert entries
    payload = tmp_path / "payload"
    torch.save(Payload(bait), payload)
    for fqn, info in entries.items():
        data = payload.read_bytes()
        whole = original / info.relative_path
        content = whole.read_bytes() + data
        path = cases.add(fqn, replace(content), info.relative_path)
        new_info = type(info)(info.relative_path, len(content) - len(data), len(data))
        changed = pickle.loads((original / ".metadata").read_bytes())
        for index in changed.storage_data:
            if index.fqn == fqn:
                changed.storage_data[index] = new_info
        replace(pickle.dumps(changed))(path, ".metadata", None)
    paths = [path for path, _ in cases.names.values()]
    for found in (try_to_load(paths), *ranks(try_to_load, paths)):
        # A rank's own entry may be read by no other; nothing is ever executed.
        assert any(errors is not None for errors in found)
        for errors in found:
            for kind, _, text in errors or ():
                assert kind == "StateError"
                assert "trust_pickles=True" in text
    assert not bait.exists()
