"""Processes in one gloo process group that stay alive and run functions for the tests.

    test process                          rank 0, rank 1, ...
    ------------                          -------------------
    ranks(function, *args)  --pipe-->     function(*args), collectives between all
    [result of 0, of 1]     <--pipe--     result, or the traceback as text

Starting a process that imports torch takes seconds, running a tiny model takes milliseconds, so
the processes are started once, where possible as forks of a server that has imported it. If one
does not answer, because it died or hangs in a collective that another never joins, all are ended,
and the next call starts new ones.

The group meets through a file and talks over the loopback interface: no port is chosen and no
host name is resolved. Functions travel by name, so they must stand at the top of a test module;
arguments and results travel by value. In a rank warnings are errors, as in pytest.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 60.0
#: What most functions that ranks run import, and what torch imports as they run.
_PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "wrappers.state",
]
#: What a rank gets to fail in its own words after another has failed.
_GRACE_S = 1.0

_ENVIRONMENT = {
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


class RankFailedError(Exception):
    """A function failed in one rank or more, or did not return in time."""


class Ranks:
    """Runs functions in all ranks at once.

    Args:
        folder: For the file through which the processes meet, and their stacks when they hang.
        world_size: The number of processes.
    """

    def __init__(self, folder: Path, world_size: int = WORLD_SIZE) -> None:
        self._folder = folder
        self.world_size = world_size
        self._num_starts = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = CALL_TIMEOUT_S
    ) -> list[Any]:
        """Call ``function(*args)`` in every rank; return what each returned.

        Raises:
            RankFailedError: With the traceback of every rank that failed.
        """
        if not self._processes:
            self._start()
        message = pickle.dumps((function, args, timeout_s))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        return self._collect(function.__qualname__, timeout_s)

    def _start(self) -> None:
        self._num_starts += 1
        context = _context()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world_size, theirs, self._folder, self._num_starts),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect("start", START_TIMEOUT_S)

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) + len(failures) < self.world_size:
            open_pipes = {
                self._pipes[rank]: rank
                for rank in range(self.world_size)
                if rank not in results and rank not in failures
            }
            ready = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = open_pipes[pipe]
                try:
                    is_good, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join(_GRACE_S)
                    is_good, value = False, f"died with exit code {self._processes[rank].exitcode}"
                (results if is_good else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        silent = set(range(self.world_size)) - results.keys() - failures.keys()
        for rank in silent:
            waited = "still running after another rank had failed"
            failures[rank] = waited if failures else self._stack(rank, timeout_s)
        if silent or not all(process.is_alive() for process in self._processes):
            self.close()
        text = "\n".join(f"--- rank {rank}: {failures[rank]}" for rank in sorted(failures))
        raise RankFailedError(
            f"{what} failed in {len(failures)} of {self.world_size} ranks\n{text}"
        )

    def _stack(self, rank: int, timeout_s: float) -> str:
        with contextlib.suppress(FileNotFoundError):
            stack = _stack_file(self._folder, rank).read_text()
            return f"no result after {timeout_s:g} s, it stands at\n{stack}"
        return f"no result after {timeout_s:g} s"

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_GRACE_S)
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        self._processes, self._pipes = [], []


def _context() -> Any:
    """How processes are started: as forks of a process of this pytest's own that has no threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"


def _serve(rank: int, world_size: int, pipe: Connection, folder: Path, num_starts: int) -> None:
    os.environ.update(_ENVIRONMENT)
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # What is imported need not be looked at by each collection.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet-{num_starts}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=CALL_TIMEOUT_S),
    )
    dist.barrier()
    pipe.send_bytes(pickle.dumps((True, None)))
    with _stack_file(folder, rank).open("w") as stack:
        while True:
            try:
                message = pipe.recv_bytes()
                pipe.send_bytes(_answer(message, stack))
            except (EOFError, ConnectionError):  # the test process has closed its end, or is gone
                break
    dist.destroy_process_group()


def _answer(message: bytes, stack: Any) -> bytes:
    try:
        function, args, timeout_s = pickle.loads(message)
        faulthandler.dump_traceback_later(0.5 * timeout_s, file=stack)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return pickle.dumps((True, function(*args)))
        finally:
            faulthandler.cancel_dump_traceback_later()
    except BaseException:
        return pickle.dumps((False, f"\n{traceback.format_exc()}"))
