from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _clean_engine_test(no_leaks, seeded):
    """Every engine test starts from fixed random states and must leave nothing behind."""
