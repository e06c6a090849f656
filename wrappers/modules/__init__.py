"""The ``nn.Module`` face of the package: wrappers that are invisible, and forwards in place."""

from wrappers.modules.base import ActivationWrapper, unwrap
from wrappers.modules.checkpoint import CheckpointImpl, CheckpointWrapper, checkpoint_wrapper
from wrappers.modules.offload import OffloadWrapper, offload_wrapper

__all__ = [
    "ActivationWrapper",
    "CheckpointImpl",
    "CheckpointWrapper",
    "OffloadWrapper",
    "checkpoint_wrapper",
    "offload_wrapper",
    "unwrap",
]
