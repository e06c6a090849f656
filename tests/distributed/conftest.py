"""The processes that the distributed tests share: two of one group, and four of another."""

from __future__ import annotations

import pytest
from torch import distributed as dist

from tests.distributed import matrix
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Calls a function in two processes of one gloo group; see :mod:`tests.distributed.ranks`."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def ranks4(tmp_path_factory):
    """The same with four processes, for meshes of two dimensions."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    ranks = Ranks(tmp_path_factory.mktemp("ranks4"), world_size=4)
    yield ranks
    ranks.close()


@pytest.fixture
def matrix_cell(record_property):
    """Reports that a test has run a cell: ``matrix_cell(row name, technique, face)``."""

    def report(name, technique, face):
        outcome, _ = matrix.row(name).expected(technique, face)
        record_property("matrix cell", [name, technique, face, outcome])

    return report
