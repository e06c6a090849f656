"""Processes that save and die: at a random moment, at a given file-system call, at a given byte.

    test process                 nursery                       child
    ------------                 -------                       -----
    nursery(plan) --JSON-->      fork ------------------->     save, report, save, report, ...
                                 wait, then SIGKILL ------>    (dies; or it kills itself)
    {step: ..., ...} <--JSON--   what the child had reported

Importing torch takes seconds and a fork some milliseconds, so one warm process forks all
children. It has started no thread and holds no lock, so a forked child is as good as a new one.

Run as ``python -m tests.state.crashing``.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: A child that has not ended by then hangs.
CHILD_TIMEOUT_S = 30.0
_START_TIMEOUT_S = 120.0
#: File-system calls that Python reports to an audit hook before it makes them.
_EVENTS = frozenset(
    (
        "open",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.mkdir",
        "os.listdir",
        "os.scandir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "shutil.rmtree",
        "fcntl.flock",
        "tests.os.fsync",
        "tests.os.write",
    )
)

# --- The k-th file-system call ------------------------------------------------------------------


class Calls:
    """Counts the file-system calls of this process, and does something at the k-th.

    Audit hooks see what C code does for any caller, so no import style of the code under test
    escapes. ``os.fsync`` and ``os.write`` raise no audit event: they are replaced by functions
    that do. A hook cannot be removed; while nothing is counted it does nothing.
    """

    def __init__(self) -> None:
        self.num = 0
        self.log: list[str] = []
        self._folder = ""
        self._at = 0
        self._action: Callable[[], None] | None = None
        self._is_installed = False

    @contextlib.contextmanager
    def counted(
        self, folder: Path, at: int = 0, action: Callable[[], None] | None = None
    ) -> Iterator[Calls]:
        """Count calls, those of ``open`` in ``folder`` only; before the ``at``-th, act."""
        if not self._is_installed:
            self._install()
        self.num, self.log = 0, []
        self._at, self._action, self._folder = at, action, str(folder)
        try:
            yield self
        finally:
            self._folder = ""

    def _install(self) -> None:
        self._is_installed = True
        for name in ("fsync", "write"):
            setattr(os, name, self._audited(name, getattr(os, name)))
        sys.addaudithook(self._see)

    def _audited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *args: Any) -> Any:
            if self._folder:
                sys.audit(f"tests.os.{name}", fd)
            return function(fd, *args)

        return call

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._folder or event not in _EVENTS:
            return
        if event == "open" and not self._is_ours(args[0]):
            return
        self.num += 1
        self.log.append(event)
        if self.num == self._at and self._action is not None:
            self._action()

    def _is_ours(self, path: Any) -> bool:
        if isinstance(path, int):
            return False
        text = os.fsdecode(path)
        return not os.path.isabs(text) or text.startswith(self._folder)


calls = Calls()


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_this_process() -> None:
    """Sleep until somebody sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


# --- Children -----------------------------------------------------------------------------------


def make_job() -> tuple[Any, Any]:
    """A model and its optimizer with a momentum for each parameter."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    return model, optimizer


def at_step(model: Any, optimizer: Any, step: int) -> None:
    """Give every parameter the value ``step``, every momentum its negative."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, -step)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save(folder: Path, step: int, job: tuple[Any, Any], **kwargs: Any) -> None:
    from wrappers import state

    model, optimizer = job
    at_step(model, optimizer, step)
    is_async = kwargs.pop("is_async", False)
    kwargs = {"keep_last": 2, **kwargs}
    extra = {"step": step}
    path = path_of(folder, step)
    if is_async:
        state.async_save(path, model, optimizer, extra, **kwargs).result(CHILD_TIMEOUT_S)
    else:
        state.save(path, model, optimizer, extra, **kwargs)


def _child(plan: dict[str, Any], rank: int, report: int, job: Any) -> None:
    folder = Path(plan["folder"])
    if plan["world_size"] > 1:
        from torch import distributed as dist

        dist.init_process_group(
            "gloo",
            init_method=f"file://{plan['meet']}",
            rank=rank,
            world_size=plan["world_size"],
            timeout=datetime.timedelta(seconds=CHILD_TIMEOUT_S),
        )
        dist.barrier()
    if plan["max_file_bytes"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["max_file_bytes"],) * 2)
    act = stop_this_process if plan["meanwhile"] else kill_this_process
    with calls.counted(folder, plan["act_at"], act):
        for step in range(plan["step"], plan["step"] + plan["num_saves"]):
            _tell(report, begun=step)
            save(folder, step, job, **plan["kwargs"])
            _tell(report, done=step)
        _tell(report, num_calls=calls.num)


def _tell(report: int, **what: Any) -> None:
    os.writev(report, [json.dumps(what).encode() + b"\n"])  # not os.write: that one is counted


def _start_child(plan: dict[str, Any], rank: int, job: Any) -> tuple[int, int]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return pid, ours
    code = 1
    try:
        _child(plan, rank, theirs, job)
        code = 0
    except BaseException as error:
        _tell(theirs, error=type(error).__name__, text=str(error)[-2000:])
    finally:
        os._exit(code)


# --- The nursery --------------------------------------------------------------------------------


def _run(plan: dict[str, Any], job: Any) -> dict[str, Any]:
    """Fork the children, kill them when it is time, and gather what they have reported."""
    children = [_start_child(plan, rank, job) for rank in range(plan["world_size"])]
    if plan["kill_after_s"] is not None:
        select.select([children[0][1]], [], [], CHILD_TIMEOUT_S)  # the first save has begun
        time.sleep(plan["kill_after_s"])
        for rank in plan["kill_ranks"]:
            os.kill(children[rank][0], signal.SIGKILL)
    found: dict[str, Any] = {"begun": 0, "done": 0, "errors": {}, "signals": []}
    if plan["meanwhile"]:
        pid = children[0][0]
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        found["meanwhile"] = _run(
            {**plan, "act_at": 0, "meanwhile": None, **plan["meanwhile"]}, job
        )
        os.kill(pid, signal.SIGCONT)
    for rank, (pid, pipe) in enumerate(children):
        text, has_ended = _read_all(pipe)
        if not has_ended:
            os.kill(pid, signal.SIGKILL)
            found["errors"][str(rank)] = "hangs"
        _, status = os.waitpid(pid, 0)
        found["signals"].append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
        for line in text.splitlines():
            what = json.loads(line)
            if "error" in what:
                found["errors"][str(rank)] = f"{what['error']}: {what['text']}"
            for key in ("begun", "done", "num_calls"):
                if key in what:
                    found[key] = max(what[key], found.get(key, 0))
    return found


def _read_all(pipe: int) -> tuple[str, bool]:
    """All that a child reports until its end; and whether it ended in time."""
    deadline = time.monotonic() + CHILD_TIMEOUT_S
    chunks = []
    try:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                return b"".join(chunks).decode(), True
            chunks.append(chunk)
        return b"".join(chunks).decode(), False
    finally:
        os.close(pipe)


def _serve(warm_up: Path) -> None:
    import torch

    torch.set_num_threads(1)
    job = make_job()
    for layout in ("dcp", "safetensors"):  # imports now what a save imports late
        save(warm_up / layout, 1, job, layout=layout)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line), job)), flush=True)


class Nursery:
    """The test's end of the nursery: call it with a plan; it returns what the children said.

    Returns a dict: ``begun`` and ``done``, the last step whose save has begun and returned (0 if
    none); ``num_calls``; for each rank ``signals``, which signal has killed it (0 if none), and
    ``errors`` of those that raised or hung. With ``meanwhile``, a second child runs to its end
    while the first is stopped at its call ``stop_at``; its answer is ``meanwhile``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_plans = 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONWARNINGS": "ignore",
        }
        with (folder / "stderr").open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.state.crashing", str(folder / "warm-up")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        assert self._answer(_START_TIMEOUT_S) == "ready"

    def __call__(
        self,
        folder: Path,
        step: int,
        *,
        num_saves: int = 1,
        kill_after_s: float | None = None,
        kill_ranks: tuple[int, ...] = (0,),
        die_at: int = 0,
        stop_at: int = 0,
        meanwhile: dict[str, Any] | None = None,
        max_file_bytes: int | None = None,
        world_size: int = 1,
        **kwargs: Any,
    ) -> dict[str, Any]:
        self._num_plans += 1
        plan = {
            "folder": str(folder),
            "step": step,
            "num_saves": num_saves,
            "kill_after_s": kill_after_s,
            "kill_ranks": kill_ranks,
            "act_at": die_at or stop_at,
            "meanwhile": meanwhile,
            "max_file_bytes": max_file_bytes,
            "world_size": world_size,
            "meet": str(self._folder / f"meet-{self._num_plans}"),
            "kwargs": kwargs,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = self._answer(3 * CHILD_TIMEOUT_S)
        return found

    def _answer(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else ""
        assert line, (self._folder / "stderr").read_text()[-4000:]
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(CHILD_TIMEOUT_S)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
