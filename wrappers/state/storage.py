"""A state dict to files and back, through torch.distributed.checkpoint's planners and storage.

The steps are those of ``torch.distributed.checkpoint.save`` and ``load``, each as a step of an
:class:`~wrappers.state.faults.Agreement`. What is written through torch's ``FileSystem`` is
summed up on its way (CRC-32), and read back before anybody is told that it is there.

Two layouts: ``"dcp"`` is torch's own, tensors and values in ``__<rank>_<n>.distcp`` and
``.metadata``; for ``"safetensors"`` see :mod:`wrappers.state.safetensors_layout`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from wrappers.state import files, pickles, safetensors_layout
from wrappers.state.contents import Request, StateDict
from wrappers.state.faults import Agreement
from wrappers.state.files import Entry, StateError

__all__ = ["read", "write"]

#: Size and CRC-32 of files, by name.
Sums = dict[str, tuple[int, int]]


# --- Checksums ------------------------------------------------------------------------------


class _SummedStream:
    """A file open for writing that sums up what it is handed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.size = self.crc = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.crc = zlib.crc32(view, self.crc)
        self.size += len(view)
        return self._stream.write(view)  # type: ignore[no-any-return]


class SummedFiles(FileSystem):
    """torch's access to files, summing up those that are written.

    Args:
        directory: Names are relative to it.

    Attributes:
        sums: What was handed to each file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.sums: Sums = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file."""
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            summed = _SummedStream(stream)
            yield summed
        self.sums[self._name(path)] = (summed.size, summed.crc)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file."""
        super().rename(path, new_path)
        if self._name(path) in self.sums:
            self.sums[self._name(new_path)] = self.sums.pop(self._name(path))

    def _name(self, path: str | os.PathLike[str]) -> str:
        return Path(os.path.relpath(path, self._directory)).as_posix()


@contextlib.contextmanager
def _summing(writer: Any, directory: Path) -> Iterator[Sums]:
    """Sum up what a writer writes, if it writes through torch's ``FileSystem``."""
    summed = SummedFiles(directory)
    original = getattr(writer, "fs", None)
    if type(original) is not FileSystem:
        yield summed.sums
        return
    writer.fs = summed
    try:
        yield summed.sums
    finally:
        writer.fs = original


def _checked(directory: Path, names: set[str], sums: Sums) -> Sums:
    """Size and CRC-32 of files, read back from them, which are on the disk then.

    Raises:
        StateError: A file is missing, or not what was handed to it.
    """
    found = {}
    for name in sorted(names):
        try:
            found[name] = files.measure(directory / name, sync=True)
        except FileNotFoundError as error:
            raise StateError(directory / name, "is missing after it was written") from error
        if found[name] != sums.get(name, found[name]):
            raise StateError(
                directory / name,
                f"reads as {found[name][0]} bytes with CRC-32 {found[name][1]:08x}; "
                f"{sums[name][0]} bytes with CRC-32 {sums[name][1]:08x} were written",
            )
    return found


# --- Writing --------------------------------------------------------------------------------


def write(
    agreement: Agreement,
    directory: Path,
    state: StateDict,
    *,
    layout: str,
    writer: Any,
    planner: Any,
    publish: Callable[[dict[str, Entry]], None],
) -> None:
    """Write a state dict, check the files, and publish them.

    Args:
        agreement: The ranks.
        directory: Where to write; all ranks see it.
        state: From :func:`wrappers.state.contents.collect`.
        layout: ``"dcp"`` or ``"safetensors"``.
        writer: A storage writer, or None for the layout's.
        planner: A save planner, or None for torch's.
        publish: Called on the coordinator with what is known about the files.
    """
    to_write: dict[str, Any] = state
    if layout == "safetensors":
        to_write = safetensors_layout.write_values(agreement, directory, state)
        writer = writer or safetensors_layout.SafetensorsWriter(directory)
    writer = writer or FileSystemWriter(directory)
    planner = planner or DefaultSavePlanner()
    metadata: list[Metadata] = []

    def plan_here() -> SavePlan:
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{directory} was made by the coordinator, but is not there on rank "
                f"{agreement.rank}: the ranks must share the file system"
            )
        writer.reset(directory)
        _call(
            planner.set_up_planner,
            state_dict=to_write,
            storage_meta=writer.storage_meta(),
            is_coordinator=agreement.is_coordinator,
        )
        _call(
            writer.set_up_storage_writer,
            agreement.is_coordinator,
            rank=agreement.rank,
            use_collectives=True,
        )
        return writer.prepare_local_plan(planner.create_local_plan())  # type: ignore[no-any-return]

    def plan_for_all(plans: list[SavePlan]) -> list[SavePlan]:
        plans, global_metadata = planner.create_global_plan(plans)
        metadata.append(global_metadata)
        return writer.prepare_global_plan(plans)  # type: ignore[no-any-return]

    def write_here() -> tuple[Any, Sums]:
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
        return results, _checked(directory, {*sums, *_names_of(results)}, sums)

    def finish(outcomes: list[tuple[Any, Sums]]) -> None:
        before = dict(sums)
        writer.finish(metadata[0], [results for results, _ in outcomes])
        found = _entries([own for _, own in outcomes])
        for name in getattr(writer, "replaced", ()):
            del found[name]
        publish(_all_files(directory, found, agreement.rank, sums, before))

    with _summing(writer, directory) as sums:
        plan = agreement.scatter("plan", plan_here, plan_for_all)
        agreement.reduce("write", write_here, finish)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method of the user's with those keyword arguments that it knows."""
    known = inspect.signature(function).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in known.values()):
        kwargs = {name: value for name, value in kwargs.items() if name in known}
    return function(*args, **kwargs)


def _names_of(results: Any) -> set[str]:
    """The files that write results name."""
    infos = [getattr(result, "storage_data", None) for result in results]
    found = {getattr(info, "relative_path", None) for info in infos}
    return {Path(name).as_posix() for name in found if name}


def _entries(checked: list[Sums]) -> dict[str, Entry]:
    return {
        name: Entry(size, crc, rank)
        for rank, own in enumerate(checked)
        for name, (size, crc) in own.items()
    }


def _all_files(
    directory: Path, found: dict[str, Entry], rank: int, sums: Sums, before: Sums
) -> dict[str, Entry]:
    """Every file there is: those that ranks have checked, and the rest, which is checked here."""
    names = set(files.names_in(directory))
    if gone := sorted(found.keys() - names):
        by = found[gone[0]].rank
        raise StateError(directory / gone[0], f"was written by rank {by}, and is not there")
    late = {name for name in names if name not in found or sums.get(name) != before.get(name)}
    for name, (size, crc) in _checked(directory, late, sums).items():
        found[name] = Entry(size, crc, rank)
    return found


# --- Reading --------------------------------------------------------------------------------


def read(
    agreement: Agreement,
    path: Path,
    request_for: Callable[[set[str]], Request],
    *,
    layout: str,
    reader: Any,
    planner: Any,
    trust_pickles: bool,
) -> Request:
    """Read what a rank asks for.

    Args:
        agreement: The ranks.
        path: The state checkpoint, whose files are checked.
        request_for: Makes the request from the names of all entries.
        layout: The one that it was written in.
        reader: A storage reader, or None for the layout's.
        planner: A load planner, or None for torch's.
        trust_pickles: Whether pickles may run code.

    Returns:
        The request, its state read.
    """
    is_unpickled = layout == "dcp" and not trust_pickles
    source = safetensors_layout.Values(path) if layout == "safetensors" else _Everything()
    reader = reader or _reader_for(path, layout, is_unpickled)
    planner = _planner_for(path, planner, is_unpickled)
    metadata: list[Metadata] = []
    saved: set[str] = set()
    request: list[Request] = []

    def describe() -> None:
        reader.reset(path)
        if is_unpickled and not isinstance(reader, pickles.SafeReader):
            pickles.check_metadata(path)
        metadata.append(reader.read_metadata())
        saved.update(source.keys(metadata[0]))

    def ask() -> None:
        request.append(request_for(saved))

    def plan_here() -> tuple[Any, set[str]]:
        planner.set_up_planner(
            source.wanted(request[0].state, metadata[0]), metadata[0], agreement.is_coordinator
        )
        _call(
            reader.set_up_storage_reader,
            metadata[0],
            agreement.is_coordinator,
            rank=agreement.rank,
            use_collectives=True,
        )
        plan = reader.prepare_local_plan(planner.create_local_plan())
        return plan, request[0].unexpected()

    def plan_for_all(plans: list[tuple[Any, set[str]]]) -> Any:
        if homeless := set.intersection(*(unexpected for _, unexpected in plans)):
            raise ValueError(
                f"{path} holds `{min(homeless)}` ({len(homeless)} such entries), for which no "
                "rank's model has a place: it was saved from another model"
            )
        global_plan = planner.create_global_plan([plan for plan, _ in plans])
        return reader.prepare_global_plan(global_plan)

    def read_here() -> None:
        with torch.device("cpu"):  # where safetensors reads to, else the default device
            reader.read_data(planner.finish_plan(plan), planner).wait()
        source.deliver(request[0].state)

    agreement.gather("metadata", describe)
    # Alone in its step: making the state of sharded tensors may take collectives, such as FSDP1's.
    agreement.gather("request", ask)
    plan = agreement.scatter("plan", plan_here, plan_for_all)
    agreement.gather("read", read_here)
    return request[0]


def _reader_for(path: Path, layout: str, is_unpickled: bool) -> Any:
    if layout == "safetensors":
        return HuggingFaceStorageReader(str(path))
    return pickles.SafeReader(path) if is_unpickled else FileSystemReader(path)


def _planner_for(path: Path, planner: Any, is_unpickled: bool) -> Any:
    if not is_unpickled:
        return planner or DefaultLoadPlanner()
    return pickles.CheckingPlanner(planner, path) if planner else pickles.SafeLoadPlanner(path)


class _Everything:
    """Where entries are in the layout of torch: all in the reader's files."""

    def keys(self, metadata: Metadata) -> set[str]:
        """Names of all entries."""
        return set(metadata.state_dict_metadata)

    def wanted(self, state: StateDict, metadata: Metadata) -> dict[str, Any]:
        """What the planner is to read; into the state dict itself."""
        return state

    def deliver(self, state: StateDict) -> None:
        """Put what else was read into the state dict."""
