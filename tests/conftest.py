"""Fixtures that any test may ask for."""

from __future__ import annotations

import gc
import importlib
import random
import threading
from typing import Any

import pytest
import torch
from torch.overrides import _len_torch_function_stack
from torch.utils import _device

import wrappers
from tests.distributed import matrix
from wrappers.engine import region

_AUTOCAST_TYPES = ("cpu", "cuda")


def surroundings() -> dict[str, Any]:
    """Everything that a region, a recompute or a backward may push, as it is right now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return {
        "saved-tensor hooks": hooks,
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": _len_torch_function_stack(),
        "default device": _device.CURRENT_DEVICE,
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in _AUTOCAST_TYPES
        },
        "autocast cache": torch.is_autocast_cache_enabled(),
        "execution group": torch._C._get_graph_exec_group(),
        "is_recomputing": wrappers.is_recomputing(),
        "early-stop switch": region._early_stop,
        "debug switch": region._debug,
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "SDPA switches": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "threads": threading.active_count(),
    }


@pytest.fixture(autouse=True, scope="module")
def _frozen_before():
    """No collection in a file looks at what was there before it, such as torch's modules.

    With them a collection takes a quarter of a second, without them a millisecond. The compiler is
    imported by the first dispatch mode, if not here.
    """
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_leaks():
    """Fail if the test leaves behind a hook, a mode, a switch or a thread."""
    before = surroundings()
    yield
    after = surroundings()
    left = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert not left, f"left behind (before, after): {left}"


@pytest.fixture
def seeded():
    """Start the test from fixed random states; put the former ones back afterwards."""
    before = torch.get_rng_state(), random.getstate()
    torch.manual_seed(0)
    random.seed(0)
    yield
    torch.set_rng_state(before[0])
    random.setstate(before[1])


def pytest_terminal_summary(terminalreporter):
    """Print the composition matrix as far as the tests have run its cells."""
    found = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "matrix cell":
                    cell, outcome = tuple(value[:3]), value[3]
                    has_failed = report.failed or found.get(cell) == "FAILED"
                    found[cell] = "FAILED" if has_failed else outcome
    if found:
        terminalreporter.section("composition matrix")
        terminalreporter.write(matrix.render(found))
