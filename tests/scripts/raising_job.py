"""The main job with a block that raises in one rank: ``raising_job.py forward|recompute ...``."""

from __future__ import annotations

import sys

import torch.distributed as dist

from scripts import train
from scripts.model import Block
from wrappers import is_recomputing

CULPRIT = 1


class BlockError(Exception):
    pass


def raise_in(what: str) -> None:
    """Let the forward of a block raise in the culprit, the first time or when it is recomputed."""
    forward = Block.forward

    def raising_forward(self, x):
        is_there = is_recomputing() == (what == "recompute")
        if is_there and dist.get_rank() == CULPRIT:
            raise BlockError(f"{what} on rank {CULPRIT}")
        return forward(self, x)

    Block.forward = raising_forward


if __name__ == "__main__":
    raise_in(sys.argv.pop(1))
    train.main()
