"""The harness itself: a rank that fails or hangs fails the test, says why, and is replaced."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from torch import distributed as dist

from tests.distributed.ranks import RankFailedError


def add_up(value):
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), total


def warn_in_rank_1():
    if dist.get_rank() == 1:
        warnings.warn("a warning of rank 1", stacklevel=1)
    dist.barrier()


def hang_in_rank_0():
    if dist.get_rank() == 0:
        time.sleep(60)


def test_both_ranks_return_their_results(ranks):
    assert ranks(add_up, 10) == [(0, torch.tensor(21)), (1, torch.tensor(21))]


def test_a_failure_is_reported_and_does_not_reach_the_next_call(ranks):
    with pytest.raises(RankFailedError, match="warn_in_rank_1 failed in") as caught:
        ranks(warn_in_rank_1)
    assert 'warnings.warn("a warning of rank 1", stacklevel=1)' in str(caught.value)
    assert "UserWarning: a warning of rank 1" in str(caught.value)
    assert [total for _, total in ranks(add_up, 0)] == [1, 1]
    with pytest.raises(RankFailedError, match=r"(?s)rank 0: no result after 2 s.*hang_in_rank_0"):
        ranks(hang_in_rank_0, timeout_s=2.0)
