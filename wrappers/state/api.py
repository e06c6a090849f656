"""``save``, ``async_save``, ``load``, ``latest`` and ``verify``; see the room's note."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.optim import Optimizer

from wrappers.state import contents, files, safetensors_layout, storage
from wrappers.state.contents import Request, StateDict
from wrappers.state.faults import Agreement, CheckpointException, collective_group
from wrappers.state.files import Entry, Manifest, Partial

__all__ = ["AsyncSave", "async_save", "latest", "load", "save", "verify"]

PathLike = str | os.PathLike[str]


# --- What the ranks must agree on -----------------------------------------------------------


@dataclass(frozen=True)
class _Terms:
    """Arguments that must be the same on all ranks."""

    operation: str
    path: Path
    coordinator_rank: int
    keep_last: int | None = None
    layout: str = ""
    trust_pickles: bool = False

    def check(self, size: int, storage_writer: object = None) -> None:
        """Raise TypeError or ValueError for a wrong argument, ImportError for a missing package."""
        if type(self.coordinator_rank) is not int or not 0 <= self.coordinator_rank < size:
            raise ValueError(
                f"coordinator_rank must be a rank of the group of {size}, got "
                f"{self.coordinator_rank!r}"
            )
        if self.keep_last is not None and (type(self.keep_last) is not int or self.keep_last < 1):
            raise ValueError(f"keep_last must be at least 1, or None, got {self.keep_last!r}")
        if self.operation == "load":
            return
        if self.layout not in files.LAYOUTS:
            raise ValueError(f"layout must be one of {files.LAYOUTS}, got {self.layout!r}")
        if self.layout == "safetensors":
            safetensors_layout.require_safetensors()
            if storage_writer is not None:
                raise ValueError("layout='safetensors' has its own writer: pass no storage_writer")


def _agree(
    terms: Callable[[], _Terms],
    process_group: ProcessGroup | None,
    *,
    storage_writer: object = None,
    is_private: bool = False,
) -> tuple[Agreement, _Terms]:
    """The first step of every operation: all ranks begin, with the same arguments."""
    agreement = Agreement(collective_group(process_group, is_private=is_private))

    def check() -> tuple[_Terms, bool]:
        mine = terms()
        mine.check(agreement.size, storage_writer)
        return mine, mine.operation != "load" and _previous.is_forgotten_failure()

    def compare() -> None:
        if theirs != mine:
            raise ValueError(f"rank {agreement.rank} called {mine}, rank 0 {theirs}")

    try:
        of_ranks = agreement.gather("arguments", check)
    except CheckpointException as error:
        if len(error.failures) == agreement.size:  # wrong for all: nothing to tell the others
            raise error.failures[agreement.rank][0] from None
        raise
    if any(is_forgotten for _, is_forgotten in of_ranks):
        _previous.raise_forgotten()
    theirs, mine = of_ranks[0][0], of_ranks[agreement.rank][0]
    agreement.gather("arguments", compare)
    return agreement.with_coordinator(mine.coordinator_rank), mine


def _optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    found = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for each in found:
        if not isinstance(each, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer or several, got {type(each).__name__}")
    return found


# --- Saving ---------------------------------------------------------------------------------


def _taken(
    agreement: Agreement,
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None,
    extra: Mapping[str, Any] | None,
    rank_extra: Mapping[str, Any] | None,
    *,
    rng: bool,
    on_host: bool,
) -> StateDict:
    """What this rank has to save ([1] in the diagram)."""
    found: StateDict = {}

    def collect() -> None:
        state = contents.collect(
            model,
            _optimizers(optimizer),
            extra,
            rank_extra,
            rank=agreement.rank,
            is_coordinator=agreement.is_coordinator,
            rng=rng,
        )
        found.update(contents.to_host(state) if on_host else state)

    agreement.gather("state", collect)
    return found


def _written(
    agreement: Agreement, terms: _Terms, state: StateDict, storage_writer: Any, planner: Any
) -> Path:
    """Write, check and publish; see the room's diagram."""
    path = terms.path
    partials: list[Partial] = []

    def prepare() -> str:
        partials.append(Partial(path))
        files.remove_litter(path.parent)
        return str(partials[0].directory)

    def publish(found: dict[str, Entry]) -> None:
        created_ns = files.next_created_ns(path.parent)
        version = str(torch.__version__)
        partials[0].publish(Manifest(terms.layout, agreement.size, version, created_ns, found))

    try:
        directory = Path(agreement.coordinate("prepare", prepare))
        storage.write(
            agreement,
            directory,
            state,
            layout=terms.layout,
            writer=storage_writer,
            planner=planner,
            publish=publish,
        )
    except BaseException:
        for partial in partials:
            partial.discard()
        raise
    keep_last = terms.keep_last
    if keep_last is not None:
        agreement.coordinate("prune", lambda: files.prune(path.parent, keep_last))
    return path


def save(
    path: PathLike,
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    rank_extra: Mapping[str, Any] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: ProcessGroup | None = None,
    coordinator_rank: int = 0,
    keep_last: int | None = None,
    layout: str = "dcp",
    rng: bool = True,
) -> Path:
    """Save a state checkpoint; every rank of the group calls this, and blocks until it is done.

    Entries are named as in the plain model. A buffer that differs between ranks is saved from one
    of them. Files are read back once they are written, as a rule from the page cache.

    Args:
        path: Its directory, such as ``runs/a/step-00000100``; must not exist. All ranks share the
            file system.
        model: The model, wrapped, sharded or plain.
        optimizer: Its optimizer, or several.
        extra: More to save, by key: plain data (what ``torch.load(weights_only=True)`` accepts), or
            objects with ``state_dict`` and ``load_state_dict``, or a ``torch.Generator``. The
            coordinator's is saved.
        rank_extra: The same, each rank its own.
        storage_writer: Must write below the path that its ``reset`` is given. If it writes through
            torch's ``FileSystem``, what is read back is compared with what was handed to the files;
            else checksums are those of what was read back.
        planner: torch's ``DefaultSavePlanner`` by default.
        process_group: The ranks; by default those of the default group, or this process alone.
        coordinator_rank: Rank in the group that plans and publishes.
        keep_last: Remove older state checkpoints in the same folder, so that this many are left.
            Damaged ones do not count and are left alone.
        layout: ``"dcp"``, or ``"safetensors"``, in which nothing is pickled.
        rng: Save the random states of Python, numpy, torch and the devices in use, of each rank.

    Returns:
        The absolute path.

    Raises:
        CheckpointException: A rank has failed: ``failures`` say which and why, the same on every
            rank. What was visible before still is.
        TypeError: An argument has the wrong type on every rank.
        ValueError: An argument has a wrong value on every rank.
    """
    _previous.wait()
    agreement, terms = _agree(
        lambda: _Terms("save", files.checked_path(path), coordinator_rank, keep_last, layout),
        process_group,
        storage_writer=storage_writer,
    )
    state = _taken(agreement, model, optimizer, extra, rank_extra, rng=rng, on_host=False)
    return _written(agreement, terms, state, storage_writer, planner)


class AsyncSave:
    """A state checkpoint that a background thread writes."""

    def __init__(self, write: Callable[[], Path]) -> None:
        self._future: Future[Path] = Future()
        self._is_asked = False
        self._thread = threading.Thread(target=self._run, args=(write,), name="wrappers state")
        self._thread.start()

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            self._future.set_result(write())
        except BaseException as error:
            if isinstance(error, CheckpointException):
                _drop_frames(error)
            self._future.set_exception(error)

    def done(self) -> bool:
        """Whether it is published, or has failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Path:
        """Wait for it, at most ``timeout`` seconds; return its path.

        Raises:
            CheckpointException: A rank has failed; see :func:`save`.
            TimeoutError: It is not done.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._future.result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for it, at most ``timeout`` seconds; return why it has failed, or None.

        Raises:
            TimeoutError: It is not done.
        """
        error = self._future.exception(timeout)
        self._is_asked = True
        return error

    def wait(self) -> None:
        """Wait for its thread's end; raises nothing and counts as no question."""
        self._thread.join()

    def is_forgotten_failure(self) -> bool:
        """Whether it has failed and nobody has asked."""
        return self.done() and not self._is_asked and self._future.exception() is not None


def _drop_frames(error: BaseException | None) -> None:
    """Free the copy of the state, which an exception's frames hold; its text has the places."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class _Previous:
    """The last async save of this process, at most one of which is under way."""

    def __init__(self) -> None:
        self._save: AsyncSave | None = None

    def set(self, started: AsyncSave) -> None:
        """Remember one that has begun."""
        self._save = started

    def wait(self) -> None:
        """Wait until none is under way."""
        if self._save is not None:
            self._save.wait()

    def is_forgotten_failure(self) -> bool:
        """Whether it has failed and nobody has asked."""
        return self._save is not None and self._save.is_forgotten_failure()

    def raise_forgotten(self) -> None:
        """Raise its failure, as some rank has not asked for it."""
        forgotten, self._save = self._save, None
        error = forgotten.exception() if forgotten is not None else None
        if error is not None:
            raise error
        raise CheckpointException("an async save of other ranks has failed", {})

    def report(self) -> None:
        """Log a failure that nobody will ask for any more."""
        if self._save is not None and self.is_forgotten_failure():
            error = self._save.exception()
            assert error is not None
            logging.getLogger(__name__).error("the last async save has failed", exc_info=error)


_previous = _Previous()
atexit.register(_previous.report)


def async_save(
    path: PathLike,
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    rank_extra: Mapping[str, Any] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: ProcessGroup | None = None,
    coordinator_rank: int = 0,
    keep_last: int | None = None,
    layout: str = "dcp",
    rng: bool = True,
) -> AsyncSave:
    """Copy the state to host memory, and save it in a background thread.

    The call blocks until the copy is made, or, if the last async save is not done, until it is;
    training may then go on and change the model. The thread has a gloo group of its own, made by
    all ranks at the first call, and frees the copy at its end. The process does not exit before.

    A failure is raised by :meth:`AsyncSave.result`, on every rank; if no rank has asked before the
    next save begins, that one raises it instead.

    Args:
        path: As for :func:`save`, like all others.
        model: See there.
        optimizer: See there.
        extra: See there.
        rank_extra: See there.
        storage_writer: See there.
        planner: See there.
        process_group: See there.
        coordinator_rank: See there.
        keep_last: See there.
        layout: See there.
        rng: See there.

    Raises:
        CheckpointException: A rank cannot copy its state, or an earlier async save has failed.
        TypeError: An argument has the wrong type on every rank.
        ValueError: An argument has a wrong value on every rank.
    """
    _previous.wait()
    agreement, terms = _agree(
        lambda: _Terms("async_save", files.checked_path(path), coordinator_rank, keep_last, layout),
        process_group,
        storage_writer=storage_writer,
        is_private=True,
    )
    state = _taken(agreement, model, optimizer, extra, rank_extra, rng=rng, on_host=True)
    started = AsyncSave(lambda: _written(agreement, terms, state, storage_writer, planner))
    _previous.set(started)
    return started


# --- Loading --------------------------------------------------------------------------------


def load(
    path: PathLike,
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    rank_extra: Mapping[str, Any] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: ProcessGroup | None = None,
    coordinator_rank: int = 0,
    trust_pickles: bool = False,
    rng: bool = True,
) -> dict[str, Any]:
    """Load a state checkpoint into a model, its optimizers and more; every rank calls this.

    The model may be wrapped, sharded and spread over ranks in another way than the one that was
    saved. Before anything is changed, all files are compared with their checksums, each by one
    rank. Tensors are then read in place: after a later failure, model and optimizer are undefined.

    No code from the files is executed, also not with a reader or planner of the user's, whose
    ``.metadata`` and values are looked through before it gets them. A reader that unpickles other
    files cannot be helped.

    Args:
        path: The directory of a state checkpoint.
        model: The model; its parameters must be materialized.
        optimizer: Its optimizer, or several. Gradients are left alone. The optimizer's step hooks
            run once, as torch makes the state that is to be read by a step of zeros.
        extra: Objects with ``load_state_dict`` that get back what was saved under their keys.
            Another value only says that its key must be there.
        rank_extra: The same for what each rank has saved for itself.
        storage_reader: Reads below the path that its ``reset`` is given.
        planner: torch's ``DefaultLoadPlanner`` by default, made safe.
        process_group: As for :func:`save`.
        coordinator_rank: As for :func:`save`.
        trust_pickles: Let pickles in the files run code.
        rng: Restore the random states. A rank that has none in the files (there are more ranks than
            there were) keeps its own and warns; the same goes for ``rank_extra``.

    Returns:
        The values of ``extra`` that went to no object, by key. Under ``"rank"``, those of
        ``rank_extra``, if this rank had saved any.

    Raises:
        CheckpointException: A rank has failed: ``failures`` say which and why. A damaged, missing
            or foreign file is a :class:`~wrappers.state.files.StateError` among them.
        TypeError: An argument has the wrong type on every rank.
        ValueError: An argument has a wrong value on every rank.
    """
    agreement, terms = _agree(
        lambda: _Terms(
            "load", files.checked_path(path), coordinator_rank, trust_pickles=trust_pickles
        ),
        process_group,
    )
    manifests: list[Manifest] = []  # not the step's value: every rank would get those of all

    def check() -> None:
        manifests.append(_checked(agreement, terms.path))

    agreement.gather("files", check)
    manifest = manifests[0]

    def request_for(saved: set[str]) -> Request:
        optimizers = _optimizers(optimizer)
        return Request(
            model, optimizers, extra, rank_extra, saved=saved, rank=agreement.rank, rng=rng
        )

    request = storage.read(
        agreement,
        terms.path,
        request_for,
        layout=manifest.layout,
        reader=storage_reader,
        planner=planner,
        trust_pickles=trust_pickles,
    )
    values: dict[str, Any] = {}
    agreement.gather("apply", lambda: values.update(request.apply()))
    if missing := request.not_found():
        warnings.warn(
            f"{terms.path} has no {missing} of rank {agreement.rank} (it was saved by "
            f"{manifest.world_size} ranks): this rank keeps its own",
            stacklevel=2,
        )
    return values


def _checked(agreement: Agreement, path: Path) -> Manifest:
    """The manifest, after this rank's share of the files has been checked."""
    manifest = Manifest.read(path)
    for name in list(manifest.files)[agreement.rank :: agreement.size]:
        files.check_file(path, name, manifest.files[name])
    if agreement.is_coordinator:
        files.check_names(path, manifest)
    return manifest


def latest(folder: PathLike) -> Path | None:
    """The newest complete state checkpoint in a folder, or None.

    Complete means: its manifest can be read, and every file is there with its size.
    :func:`verify` reads the files too, and so does :func:`load`.

    Args:
        folder: The parent of state checkpoints.

    Raises:
        ValueError: It is a URL.
    """
    return files.latest(files.checked_folder(folder))


def verify(path: PathLike) -> None:
    """Check every file of a state checkpoint against its size and checksum.

    Args:
        path: The directory of a state checkpoint.

    Raises:
        StateError: A file is damaged, missing, or does not belong there.
        ValueError: It is a URL.
    """
    files.verify(files.checked_folder(path))
