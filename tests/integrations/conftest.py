"""What the tests of all integrations share."""

from __future__ import annotations

import gc

import pytest

from wrappers.offload.store import reset_offloading


@pytest.fixture(autouse=True)
def _forget_offloading():
    """Leave no file, thread or figure of offloading to the tests after this one."""
    yield
    reset_offloading()
    gc.collect()
