"""Runs scripts one after another, each in a fork of a process that has imported what they import.

    torchrun --nproc-per-node 2 tests/forks.py '[["FOLDER", "a.py", "--option"], ...]'

Importing torch and a trainer takes seconds, the work of a small job milliseconds. So a process of
the launcher imports once, and each command gets a fork: nothing is left over from the command
before it, and a fork ends as any process of Python ends. No thread has been started by then and no
process group was joined, so a fork is as good as a new process.

A command is the folder to run in, the script and its options.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys

import torch._dynamo  # noqa: F401 - every optimizer's first step imports it.
from torch import distributed as dist


def main(commands: list[list[str]]) -> None:
    for script in dict.fromkeys(script for _, script, *_ in commands):
        runpy.run_path(script, run_name="imported")
    gc.freeze()  # A collection in a fork would write to, and so copy, what all forks share.
    for number, (folder, script, *options) in enumerate(commands):
        script = os.path.abspath(script)
        if (child := os.fork()) == 0:
            meet_apart(f"command-{number}")
            os.chdir(folder)
            sys.argv = [script, *options]
            runpy.run_path(script, run_name="__main__")
            return
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(f"{script} {options}: status {os.waitstatus_to_exitcode(status)}")


def meet_apart(name: str) -> None:
    """Keep what this fork's process group leaves in torchrun's one store from the other forks'."""
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # not the function
    create = rendezvous._create_c10d_store

    def create_prefixed(*args: object, **kwargs: object) -> dist.PrefixStore:
        return dist.PrefixStore(name, create(*args, **kwargs))

    rendezvous._create_c10d_store = create_prefixed


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
