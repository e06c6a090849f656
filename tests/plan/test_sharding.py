"""Ranks that are not there: meshes beside a process group that is."""

from __future__ import annotations

import pytest
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from wrappers import _torch


@pytest.fixture
def six_of_eight():
    dist.init_process_group("fake", store=FakeStore(), rank=6, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((8,), [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ((4,), [[4, 5, 6, 7]]),
        ((2, 4), [[2, 6], [4, 5, 6, 7]]),
    ],
)
def test_a_mesh_beside_a_group_has_the_shape_it_was_asked_for(six_of_eight, shape, ranks):
    names = dict(dist.distributed_c10d._world.pg_names)
    count = dist.distributed_c10d._world.group_count
    with _torch.fake_mesh(shape) as mesh:
        assert tuple(mesh.shape) == shape
        groups = mesh.get_all_groups()
        assert [dist.get_process_group_ranks(group) for group in groups] == ranks
    assert dist.distributed_c10d._world.pg_names == names
    assert dist.distributed_c10d._world.group_count == count


def test_a_mesh_that_does_not_fit_into_a_group_is_refused(six_of_eight):
    with (
        pytest.raises(ValueError, match="16 ranks cannot be made in a process group of 8"),
        _torch.fake_mesh((16,)),
    ):
        pass


def test_a_mesh_without_a_group_leaves_none():
    with _torch.fake_mesh((2, 3)) as mesh:
        assert dist.get_world_size() == 6
        assert tuple(mesh.shape) == (2, 3)
    assert not dist.is_initialized()
