"""The public surface: what ``from wrappers import ...`` gives, and how it is documented."""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
import torch.utils.checkpoint
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torch_wrappers

import wrappers

#: What ``torch.utils.checkpoint`` offers; code may import it from us in its place.
TORCH_NAMES = [
    "CheckpointError",
    "CheckpointFunction",
    "CheckpointPolicy",
    "DefaultDeviceType",
    "GraphExecGroup",
    "SAC_IGNORED_OPS",
    "SelectiveCheckpointContext",
    "check_backward_validity",
    "checkpoint",
    "checkpoint_sequential",
    "create_selective_checkpoint_contexts",
    "detach_variable",
    "get_device_states",
    "noop_context_fn",
    "set_checkpoint_debug_enabled",
    "set_checkpoint_early_stop",
    "set_device_states",
]

#: What torch's private checkpoint_wrapper module offers.
TORCH_WRAPPER_NAMES = [
    "ActivationWrapper",
    "CheckpointImpl",
    "CheckpointWrapper",
    "OffloadWrapper",
    "apply_activation_checkpointing",
    "checkpoint_wrapper",
    "offload_wrapper",
]

#: What only we have.
OWN_NAMES = [
    "AmbientHandle",
    "ApplyReport",
    "Diagnosis",
    "Finding",
    "Hardware",
    "InfeasibleBudgetError",
    "InputChangedError",
    "OffloadError",
    "OffloadStats",
    "Plan",
    "Policy",
    "Profile",
    "RecomputeMismatchError",
    "RegionReport",
    "RegionRow",
    "TierStats",
    "WrapperError",
    "calibrate",
    "doctor",
    "is_recomputing",
    "make_plan",
    "offload_stats",
    "plan_for",
    "profile",
    "region_report",
    "register_ambient",
    "remove_activation_checkpointing",
]

FUNCTIONS = [n for n in wrappers.__all__ if inspect.isfunction(getattr(wrappers, n))]
CLASSES = [n for n in wrappers.__all__ if inspect.isclass(getattr(wrappers, n))]


def test_all_is_exact():
    assert sorted(wrappers.__all__) == sorted(TORCH_NAMES + TORCH_WRAPPER_NAMES + OWN_NAMES)
    assert len(set(wrappers.__all__)) == len(wrappers.__all__)


def test_nothing_else_is_public():
    extra = {
        name
        for name, value in vars(wrappers).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert extra == set(wrappers.__all__)


def test_names_of_torch_are_complete():
    assert set(torch.utils.checkpoint.__all__) <= set(wrappers.__all__)
    for name in TORCH_NAMES:
        assert hasattr(torch.utils.checkpoint, name), name
    for name in TORCH_WRAPPER_NAMES:
        assert hasattr(torch_wrappers, name), name


def parameters_of(function) -> list[tuple[str, object]]:
    signature = inspect.signature(function)
    return [
        (p.name, p.default)
        for p in signature.parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]


SAME = [
    (torch.utils.checkpoint, "check_backward_validity"),
    (torch.utils.checkpoint, "checkpoint_sequential"),
    (torch.utils.checkpoint, "create_selective_checkpoint_contexts"),
    (torch.utils.checkpoint, "detach_variable"),
    (torch.utils.checkpoint, "get_device_states"),
    (torch.utils.checkpoint, "noop_context_fn"),
    (torch.utils.checkpoint, "set_checkpoint_debug_enabled"),
    (torch.utils.checkpoint, "set_checkpoint_early_stop"),
    (torch.utils.checkpoint, "set_device_states"),
    (torch_wrappers, "apply_activation_checkpointing"),
]


@pytest.mark.parametrize(("module", "name"), SAME, ids=lambda v: v if isinstance(v, str) else "")
def test_torchs_parameters_come_in_torchs_order(module, name):
    theirs = [n for n, _ in parameters_of(getattr(module, name))]
    ours = [n for n, _ in parameters_of(getattr(wrappers, name))]
    assert [n for n in ours if n in theirs] == theirs


def test_checkpoint_takes_what_torchs_takes():
    theirs = dict(parameters_of(torch.utils.checkpoint.checkpoint))
    ours = dict(parameters_of(wrappers.checkpoint))
    assert set(theirs) <= set(ours)
    assert ours["early_stop"] is theirs["early_stop"] is True
    assert ours["debug"] is theirs["debug"] is False
    assert ours["determinism_check"] == theirs["determinism_check"] == "default"
    assert ours["use_reentrant"] is None
    assert ours["preserve_rng_state"] is True


def test_shared_objects_are_torchs_own():
    assert wrappers.CheckpointPolicy is torch.utils.checkpoint.CheckpointPolicy
    assert wrappers.SAC_IGNORED_OPS is torch.utils.checkpoint.SAC_IGNORED_OPS


def test_members_of_the_implementations():
    assert list(wrappers.CheckpointImpl.__members__) == ["REENTRANT", "NO_REENTRANT", "REPLAY"]
    assert issubclass(wrappers.CheckpointImpl, enum.Enum)


# --- Documentation


@pytest.mark.parametrize("name", [n for n in wrappers.__all__ if n != "SAC_IGNORED_OPS"])
def test_every_public_object_has_a_docstring(name):
    doc = getattr(wrappers, name).__doc__
    assert doc
    first = doc.strip().splitlines()[0]
    assert first.endswith((".", ":", ",")) or len(doc.strip().splitlines()) > 1
    assert len(first) <= 100


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name):
    function = getattr(wrappers, name)
    signature = inspect.signature(function)
    names = [p.name for p in signature.parameters.values()]
    if len(names) > 1:
        assert "Args:" in function.__doc__
        for parameter in names:
            assert f"{parameter}:" in function.__doc__, parameter


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_and_result_is_annotated(name):
    signature = inspect.signature(getattr(wrappers, name))
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, parameter


def raises_itself(function) -> bool:
    """Whether a raise statement stands in the function's own code."""
    source = inspect.getsource(inspect.unwrap(function))
    return any(line.strip().startswith("raise ") for line in source.splitlines())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_raises_says_what(name):
    function = getattr(wrappers, name)
    if raises_itself(function):
        assert "Raises:" in function.__doc__


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("checkpoint", ["TypeError", "ValueError", "CheckpointError"]),
        ("checkpoint_sequential", ["ValueError"]),
        ("create_selective_checkpoint_contexts", ["ValueError", "TypeError"]),
        ("detach_variable", ["TypeError"]),
        ("register_ambient", ["TypeError"]),
        ("GraphExecGroup", ["RuntimeError"]),
        ("offload_wrapper", ["TypeError", "ValueError", "OSError"]),
        ("OffloadWrapper", ["TypeError", "ValueError", "OSError"]),
    ],
)
def test_what_is_raised_is_listed(name, raised):
    _, _, section = getattr(wrappers, name).__doc__.partition("Raises:")
    for kind in raised:
        assert f"{kind}: " in section


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_have_docstrings(name):
    cls = getattr(wrappers, name)
    if cls is wrappers.CheckpointPolicy:
        return
    for attribute, value in vars(cls).items():
        if not attribute.startswith("_") and inspect.isfunction(value):
            assert inspect.getdoc(getattr(cls, attribute)), f"{name}.{attribute}"


def test_every_module_has_a_docstring():
    for info in pkgutil.walk_packages(wrappers.__path__, "wrappers."):
        module = importlib.import_module(info.name)
        assert module.__doc__, info.name


def test_public_names_import_in_a_fresh_process():
    code = "from wrappers import *; print(checkpoint.__name__)"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout == "checkpoint\n", result.stderr
