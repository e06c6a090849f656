"""The processes of the distributed tests."""

from tests.distributed.conftest import ranks, ranks4  # noqa: F401
