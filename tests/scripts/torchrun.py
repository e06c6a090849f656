"""torchrun on the loopback interface: started, watched, its workers found and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300.0

#: Loopback alone, no GPU, one thread in each process.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}


class Torchrun:
    """A running ``torchrun``, with which its workers end.

    Args:
        folder: For what it prints.
        *command: The script and its options.
        num_processes: Workers.
        max_restarts: How often a failure restarts them.
    """

    def __init__(
        self, folder: Path, *command: str, num_processes: int = 2, max_restarts: int = 0
    ) -> None:
        self._output = folder / "output"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(num_processes)]
        launcher += ["--max-restarts", str(max_restarts), *command]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                launcher,
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            workers = self.workers().values()
            self._process.kill()  # first, so that it starts no others
            self._process.wait()
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    @property
    def output(self) -> str:
        """What it and its workers have printed so far."""
        return self._output.read_text()

    def workers(self) -> dict[int, int]:
        """The process ids of the workers that are alive now, by rank."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == str(self._process.pid):
                    variables = (folder / "environ").read_bytes().split(b"\0")
                    entries = dict(entry.partition(b"=")[::2] for entry in variables)
                    found[int(entries[b"RANK"])] = int(folder.name)
            except (OSError, ValueError, KeyError, IndexError):
                continue  # no process, one that is gone by now, or none of the workers
        return found

    def kill(self, rank: int) -> None:
        """Kill a worker, without a chance to clean up."""
        os.kill(self.workers()[rank], signal.SIGKILL)

    def wait_until(self, is_so: Callable[[], object]) -> None:
        """Wait for something that the workers do; fails if they end before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_so():
            assert self._process.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < deadline, f"took longer than {TIMEOUT_S} s:\n{self.output}"
            time.sleep(0.001)

    def wait(self) -> int:
        """Wait for the end; returns the exit status."""
        try:
            return self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {TIMEOUT_S} s:\n{self.output}") from None
