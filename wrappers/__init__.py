"""Activation memory for PyTorch: keep, recompute or offload, region by region."""

from wrappers._device import DefaultDeviceType, get_device_states, set_device_states
from wrappers.apply import (
    ApplyReport,
    apply_activation_checkpointing,
    remove_activation_checkpointing,
)
from wrappers.diagnosis import Diagnosis, Finding, doctor
from wrappers.engine.ambient import AmbientHandle, register_ambient
from wrappers.engine.api import GraphExecGroup, checkpoint, checkpoint_sequential
from wrappers.engine.frame import is_recomputing
from wrappers.engine.reentrant import (
    CheckpointFunction,
    check_backward_validity,
    detach_variable,
)
from wrappers.engine.region import (
    noop_context_fn,
    set_checkpoint_debug_enabled,
    set_checkpoint_early_stop,
)
from wrappers.engine.selective import create_selective_checkpoint_contexts
from wrappers.errors import (
    CheckpointError,
    InfeasibleBudgetError,
    InputChangedError,
    OffloadError,
    RecomputeMismatchError,
    WrapperError,
)
from wrappers.modules import (
    ActivationWrapper,
    CheckpointWrapper,
    OffloadWrapper,
    checkpoint_wrapper,
    offload_wrapper,
)
from wrappers.offload.stats import OffloadStats, TierStats
from wrappers.offload.store import offload_stats
from wrappers.plan.api import make_plan, plan_for, profile
from wrappers.plan.calibration import calibrate
from wrappers.plan.plan import Plan
from wrappers.plan.records import Hardware, Profile
from wrappers.policies import Policy
from wrappers.policy import (
    SAC_IGNORED_OPS,
    CheckpointImpl,
    CheckpointPolicy,
    SelectiveCheckpointContext,
)
from wrappers.report import RegionReport, RegionRow, region_report

__all__ = [
    "SAC_IGNORED_OPS",
    "ActivationWrapper",
    "AmbientHandle",
    "ApplyReport",
    "CheckpointError",
    "CheckpointFunction",
    "CheckpointImpl",
    "CheckpointPolicy",
    "CheckpointWrapper",
    "DefaultDeviceType",
    "Diagnosis",
    "Finding",
    "GraphExecGroup",
    "Hardware",
    "InfeasibleBudgetError",
    "InputChangedError",
    "OffloadError",
    "OffloadStats",
    "OffloadWrapper",
    "Plan",
    "Policy",
    "Profile",
    "RecomputeMismatchError",
    "RegionReport",
    "RegionRow",
    "SelectiveCheckpointContext",
    "TierStats",
    "WrapperError",
    "apply_activation_checkpointing",
    "calibrate",
    "check_backward_validity",
    "checkpoint",
    "checkpoint_sequential",
    "checkpoint_wrapper",
    "create_selective_checkpoint_contexts",
    "detach_variable",
    "doctor",
    "get_device_states",
    "is_recomputing",
    "make_plan",
    "noop_context_fn",
    "offload_stats",
    "offload_wrapper",
    "plan_for",
    "profile",
    "region_report",
    "register_ambient",
    "remove_activation_checkpointing",
    "set_checkpoint_debug_enabled",
    "set_checkpoint_early_stop",
    "set_device_states",
]
