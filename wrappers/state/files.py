"""A state checkpoint as files: written beside, checked, made visible in one rename. No torch here.

::

    runs/                                 the folder
      step-00000100/                      one state checkpoint
        manifest.json                     written last: every file's size and CRC-32
        ...
      .step-00000200.partial-3f2a/        being written, or litter of a job that died

A job holds a lock on its partial directory while it lives, so whoever can take the lock may remove
the directory. Removing a state checkpoint begins with a rename to such a name.

Invariant: a directory whose name is not that of a partial one is complete, or was damaged later.
A crash at any moment leaves nothing else than partial directories.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrappers.errors import WrapperError

fcntl: Any
try:
    import fcntl
except ImportError:  # no locks on this system: litter goes by its age
    fcntl = None

__all__ = ["MANIFEST", "Manifest", "Partial", "StateError", "latest", "prune", "remove_litter"]

MANIFEST = "manifest.json"
FORMAT = 1
LAYOUTS = ("dcp", "safetensors")

#: Where the file system has no locks: partial directories that nobody has touched for so long are
#: litter.
STALE_S = 24 * 3600.0

_PARTIAL = re.compile(r"\..*\.partial-[0-9a-f]+", re.DOTALL)
_CHUNK_BYTES = 4 * 1024 * 1024

#: Partial directories that this process writes now.
_live: set[Path] = set()


class StateError(WrapperError):
    """A state checkpoint is damaged, or is none.

    Attributes:
        path: The file that is not what it should be.
        cause: What is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], cause: str) -> None:
        super().__init__(f"{os.fspath(path)}: {cause}")
        self.path = Path(path)
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return StateError, (os.fspath(self.path), self.cause)


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a state checkpoint to be.

    Raises:
        TypeError: It is not a path.
        ValueError: It is a URL, or a name kept for partial directories.
    """
    absolute = checked_folder(path)
    if not absolute.name or _PARTIAL.fullmatch(absolute.name):
        name = os.fspath(path)
        raise ValueError(f"path={name!r}: this name cannot be that of a state checkpoint")
    return absolute


def checked_folder(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder of state checkpoints.

    Raises:
        TypeError: It is not a path.
        ValueError: It is a URL.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or a path of str, got {type(text).__name__}")
    if "://" in text:
        raise ValueError(
            f"path={text!r} is a URL: a state checkpoint is published by renaming a directory, "
            "which object stores cannot do. Save to a file system and copy it from there"
        )
    return Path(os.path.abspath(text))


# --- The manifest ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What is known about a file: size, CRC-32 of its bytes, the rank that wrote it."""

    bytes: int
    crc32: int
    rank: int


@dataclass(frozen=True)
class Manifest:
    """What a state checkpoint says about itself.

    Attributes:
        layout: How its files are to be read.
        world_size: How many ranks wrote it.
        torch: The version that wrote it.
        created_ns: The time, later than that of every other state checkpoint in the folder.
        files: By path in the directory, with slashes.
    """

    layout: str
    world_size: int
    torch: str
    created_ns: int
    files: dict[str, Entry]

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        head = self._head()
        files = {name: vars(self.files[name]) for name in sorted(self.files)}
        return {**head, "head_crc32": _crc_of_json(head), "files": files}

    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "layout": self.layout,
            "world_size": self.world_size,
            "torch": self.torch,
            "created_ns": self.created_ns,
        }

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of a state checkpoint.

        Raises:
            StateError: It is missing or damaged.
        """
        file = path / MANIFEST
        try:
            with open(file, "rb") as stream:
                content = json.loads(stream.read())
        except OSError as error:
            raise StateError(
                file,
                f"cannot be read ({error.strerror}): {path} is not a complete state checkpoint; "
                "wrappers.state.latest(folder) finds one",
            ) from error
        except (ValueError, RecursionError) as error:
            raise StateError(file, f"is damaged: {error}") from error
        return cls._parsed(file, content)

    @classmethod
    def _parsed(cls, file: Path, content: Any) -> Manifest:
        try:
            version = content["format"]
            if version != FORMAT:
                raise StateError(file, f"has format {version!r}, this version reads {FORMAT}")
            files = {name: _entry(entry) for name, entry in content["files"].items()}
            manifest = cls(
                content["layout"],
                content["world_size"],
                content["torch"],
                content["created_ns"],
                files,
            )
            is_good = content["head_crc32"] == _crc_of_json(manifest._head())
            is_good = is_good and type(manifest.created_ns) is int
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(file, f"is damaged: {type(error).__name__}: {error}") from error
        if not is_good or manifest.layout not in LAYOUTS or not all(map(_is_inside, files)):
            raise StateError(file, "is damaged: its content is not what was written")
        return manifest


def _entry(entry: Any) -> Entry:
    made = Entry(entry["bytes"], entry["crc32"], entry["rank"])
    if not all(type(value) is int for value in vars(made).values()):
        raise TypeError(f"expected numbers, got {entry}")
    return made


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return name != MANIFEST and not {"", ".", ".."}.intersection(parts) and "\\" not in name


def _crc_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# --- Files and their checksums --------------------------------------------------------------


def names_in(path: Path) -> list[str]:
    """All files below a directory but the manifest, and directories without any file."""
    found = []
    for root, directories, names in os.walk(path):
        relative = Path(root).relative_to(path)
        inside = [(relative / name).as_posix() for name in names]
        found += inside if directories or inside or root == str(path) else [relative.as_posix()]
    return sorted(name for name in found if name != MANIFEST)


def measure(file: Path, *, sync: bool = False) -> tuple[int, int]:
    """Size and CRC-32 of a file, read; with ``sync`` it is on the disk afterwards."""
    size = crc = 0
    with open(file, "rb", buffering=0) as stream:
        if sync:
            os.fsync(stream.fileno())
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return size, crc


def check_file(path: Path, name: str, entry: Entry) -> None:
    """Compare a file with what the manifest says.

    Raises:
        StateError: It is missing or different.
    """
    file = path / name
    check_size(path, name, entry)
    try:
        _, crc = measure(file)
    except OSError as error:
        raise StateError(file, f"cannot be read: {error.strerror}") from error
    if crc != entry.crc32:
        raise StateError(
            file,
            f"its content has changed: CRC-32 {crc:08x}, {entry.crc32:08x} in {MANIFEST}; restore "
            "it from a copy, or load an older state checkpoint",
        )


def check_size(path: Path, name: str, entry: Entry) -> None:
    """Compare a file's size with what the manifest says.

    Raises:
        StateError: It is missing or has another size.
    """
    file = path / name
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:  # a name that no file can have
        raise StateError(file, f"is missing: {getattr(error, 'strerror', error)}") from error
    if not os.path.isfile(file):
        raise StateError(file, "is not a file")
    if status.st_size != entry.bytes:
        raise StateError(
            file,
            f"has {status.st_size} bytes, {entry.bytes} in {MANIFEST}: it was cut off or replaced",
        )


def check_names(path: Path, manifest: Manifest) -> None:
    """Find files that the save did not write.

    Raises:
        StateError: There is one.
    """
    for name in names_in(path):
        if name not in manifest.files:
            raise StateError(path / name, f"does not belong here: {MANIFEST} has no such file")


def verify(path: Path) -> None:
    """Check every file of a state checkpoint; see :func:`wrappers.state.verify`."""
    manifest = Manifest.read(path)
    for name, entry in manifest.files.items():
        check_file(path, name, entry)
    check_names(path, manifest)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, content: Any) -> None:
    """Write a file that is on the disk afterwards."""
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


# --- Partial directories --------------------------------------------------------------------


class Partial:
    """The directory in which a state checkpoint is written; the coordinator's.

    Args:
        path: Where it will be visible.

    Attributes:
        directory: Where it is now.

    Raises:
        FileExistsError: Something is at ``path`` already.
        OSError: The directory cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        require_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        while not self._make():
            pass

    def _make(self) -> bool:
        """Make the directory and lock it; False if another job took it for litter in between."""
        self.directory = _partial_path(self.path)
        _live.add(self.directory)
        try:
            os.mkdir(self.directory)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                self._lock = _lock(self.directory)
                if self.directory.is_dir():
                    return True
        except BaseException:
            self.discard()
            raise
        self.close()
        return False

    def publish(self, manifest: Manifest) -> None:
        """Make the state checkpoint visible ([5] in the room's diagram)."""
        write_json(self.directory / MANIFEST, manifest.to_json())
        for root, _, _ in os.walk(self.directory, topdown=False):
            _sync_directory(Path(root))
        require_free(self.path)
        try:
            os.rename(self.directory, self.path)
        except OSError:
            require_free(self.path)  # another job was faster
            raise
        self.close()
        _sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove what was written. What cannot be removed now, the next save removes."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        lock, self._lock = self._lock, None
        if lock is not None:
            _unlock(lock)
        _live.discard(self.directory)


def require_free(path: Path) -> None:
    """Raise FileExistsError if something is at a path."""
    if os.path.lexists(path):
        raise FileExistsError(
            f"{path} exists: a state checkpoint is never overwritten. Save under another name, "
            "such as the step's, or remove it first"
        )


def _partial_path(path: Path) -> Path:
    return path.parent / f".{path.name}.partial-{secrets.token_hex(8)}"


def _lock(directory: Path) -> int | None:
    """Take the lock on a directory; None where there are no locks.

    Raises:
        BlockingIOError: Somebody else has it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _unlock(descriptor: int) -> None:
    """Let go of a lock, also where a process that was forked meanwhile has the file open too."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def remove_litter(folder: Path) -> None:
    """Remove partial directories that no living job writes. What cannot be removed stays."""
    for name in os.listdir(folder):
        if _PARTIAL.fullmatch(name) and folder / name not in _live:
            _remove_if_dead(folder / name)


def _remove_if_dead(directory: Path) -> None:
    with contextlib.suppress(OSError):  # gone, locked, or another user's
        lock = _lock(directory)
        try:
            if lock is not None or time.time() - os.stat(directory).st_mtime > STALE_S:
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            if lock is not None:
                _unlock(lock)


# --- Folders --------------------------------------------------------------------------------


def complete_in(folder: Path) -> list[tuple[Path, Manifest]]:
    """The complete state checkpoints of a folder, oldest first; by files' sizes.

    A link to one is one too, and comes before what it is a link to.
    """
    found = []
    for path in _directories(folder):
        with contextlib.suppress(StateError):
            manifest = Manifest.read(path)
            for name, entry in manifest.files.items():
                check_size(path, name, entry)
            found.append((path, manifest))
    return sorted(found, key=lambda each: (each[1].created_ns, not each[0].is_symlink(), each[0]))


def _directories(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in sorted(os.listdir(folder)):
            if not _PARTIAL.fullmatch(name) and os.path.isdir(folder / name):
                yield folder / name


def latest(folder: Path) -> Path | None:
    """The newest complete state checkpoint; see :func:`wrappers.state.latest`."""
    found = complete_in(folder)
    return found[-1][0] if found else None


def next_created_ns(folder: Path) -> int:
    """The time now, or later if a state checkpoint of the folder says that it is from then."""
    newest = 0
    for path in _directories(folder):
        with contextlib.suppress(StateError):
            newest = max(newest, Manifest.read(path).created_ns)
    return max(time.time_ns(), newest + 1)


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest complete state checkpoints; incomplete ones and links do not count.

    A link that counted would take the place of a good one, perhaps of the only one.
    """
    found = [path for path, _ in complete_in(folder) if not path.is_symlink()]
    for path in found[:-keep_last]:
        doomed = _partial_path(path)
        with contextlib.suppress(FileNotFoundError):  # another job in the folder was faster
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
