"""Profiles made by hand: a chain of equal blocks with a small menu, small enough to check by eye.

The names fit the models of ``tests/distributed/models.py``: ``blocks.0``, ``blocks.1``, ...
"""

from __future__ import annotations

from wrappers.plan.build import build_plan
from wrappers.plan.plan import Plan
from wrappers.plan.records import (
    Action,
    Decision,
    Hardware,
    Holding,
    Moment,
    OperatorRow,
    Option,
    Persistent,
    Profile,
    RegionProfile,
    Structure,
)

KIB = 1024
PLAIN, PRODUCT, NOTHING, OFFLOAD = range(4)
OFFLOADED = Decision("aten.addmm.default", 0, Action.OFFLOAD)
HARDWARE = Hardware(
    "toy", {"float32": 1e12}, 1e11, h2d_bytes_per_s=1e9, d2h_bytes_per_s=1e9, memory_bytes=2**30
)
PERSISTENT = Persistent(parameter_bytes=100 * KIB, gradient_bytes=0, sample_bytes=4 * KIB)


def structure(key: str = "s0", class_name: str = "Block") -> Structure:
    """A block of four operators: left alone, keeping a product, nothing, offloading the product."""
    operators = (
        OperatorRow("aten.native_layer_norm.default", 0, "norm", 10 * KIB, 10 * KIB, 5.0),
        OperatorRow("aten.addmm.default", 0, "up", 40 * KIB, 40 * KIB, 50.0, 8 * KIB, (0,)),
        OperatorRow("aten.relu.default", 0, "", 40 * KIB, 40 * KIB, 8.0, 0, (1,)),
        OperatorRow("aten.addmm.default", 1, "down", 10 * KIB, 0, 45.0, 8 * KIB, (2,)),
    )
    options = (
        Option(None, 90 * KIB, 0.0, 110 * KIB, 120 * KIB),
        Option((Decision("aten.addmm.default", 0),), 50 * KIB, 15.0, 100 * KIB, 130 * KIB),
        Option((), 10 * KIB, 60.0, 100 * KIB, 140 * KIB),
        Option((OFFLOADED,), 10 * KIB, 20.0, 100 * KIB, 130 * KIB, 40 * KIB),
    )
    calls = {
        "aten.native_layer_norm.default": 1,
        "aten.addmm.default": 2,
        "aten.relu.default": 1,
        "aten.t.default": 2,
    }
    return Structure(key, class_name, operators, 6, 110.0, 200.0, options, calls=calls)


def profile(
    num_regions: int = 3, *, base_bytes: int = 104 * KIB, step_us: float = 0.0, **changes: object
) -> Profile:
    """A step of some equal blocks; gradients of 8 KiB a block stay from its backward on."""
    names = [f"blocks.{i}" for i in range(num_regions)]
    regions = tuple(
        RegionProfile(name, "s0", base_bytes, base_bytes + 8 * KIB * (num_regions - 1 - i))
        for i, name in enumerate(names)
    )
    moments = [Moment("before blocks.0", 0, base_bytes)]
    for i in range(1, num_regions):
        label = f"between {names[i - 1]} and {names[i]}"
        moments.append(Moment(label, i, base_bytes + 10 * KIB))
    moments.append(
        Moment(f"after {names[-1] if names else 'nothing'}", num_regions, base_bytes + 20 * KIB)
    )
    moments.append(Moment("backward after blocks.0", 0, base_bytes + 8 * KIB * num_regions))
    moments.append(Moment("optimizer", 0, base_bytes + 16 * KIB * num_regions))
    holdings = [Holding("", "parameter", 100 * KIB, "model")]
    holdings += [Holding(name, "aten.addmm.default", 40 * KIB, "autograd") for name in names]
    fields: dict[str, object] = {
        "model_class": "Model",
        "regions": regions,
        "structures": {"s0": structure()},
        "moments": tuple(moments),
        "persistent": PERSISTENT,
        "step_us": step_us or 310.0 * num_regions + 100.0,
        "hardware": HARDWARE,
        "optimizer_us": 40.0,
        "holdings": tuple(holdings),
        "left_out": (),
    }
    return Profile(**{**fields, **changes})  # type: ignore[arg-type]


def plan(choice: tuple[int, ...] = (NOTHING, PRODUCT, PLAIN), **settings: object) -> Plan:
    """A plan for such a step, by default with a different option for each of three blocks."""
    budget: dict[str, object] = {"budget_bytes": 400 * KIB}
    return build_plan(profile(len(choice)), choice, **{**budget, **settings})  # type: ignore[arg-type]
