"""Activation memory for PyTorch: keep, recompute or offload, region by region."""

from wrappers._device import DefaultDeviceType, get_device_states, set_device_states
from wrappers.apply import (
    ApplyReport,
    apply_activation_checkpointing,
    remove_activation_checkpointing,
)
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
    "GraphExecGroup",
    "InputChangedError",
    "OffloadError",
    "OffloadStats",
    "OffloadWrapper",
    "Policy",
    "RecomputeMismatchError",
    "RegionReport",
    "RegionRow",
    "SelectiveCheckpointContext",
    "TierStats",
    "WrapperError",
    "apply_activation_checkpointing",
    "check_backward_validity",
    "checkpoint",
    "checkpoint_sequential",
    "checkpoint_wrapper",
    "create_selective_checkpoint_contexts",
    "detach_variable",
    "get_device_states",
    "is_recomputing",
    "noop_context_fn",
    "offload_stats",
    "offload_wrapper",
    "region_report",
    "register_ambient",
    "remove_activation_checkpointing",
    "set_checkpoint_debug_enabled",
    "set_checkpoint_early_stop",
    "set_device_states",
]
