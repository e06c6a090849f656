"""The two processes that the distributed tests share."""

from __future__ import annotations

import pytest
from torch import distributed as dist

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Calls a function in two processes of one gloo group; see :mod:`tests.distributed.ranks`."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()
