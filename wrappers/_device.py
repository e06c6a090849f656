"""The only file that branches on the type of a device.

Random number generators and pinned memory. Works with every accelerator whose
``torch.<type>`` module has ``get_rng_state`` and ``set_rng_state``; nothing here
initialises a device that was not in use before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wrappers import _torch, _tree

__all__ = ["DefaultDeviceType", "get_device_states", "set_device_states"]

_WITHOUT_RNG = frozenset({"cpu", "meta"})


class DefaultDeviceType:
    """The device type that stands in where arguments name none.

    Kept for code that uses ``torch.utils.checkpoint.DefaultDeviceType``. The engine itself
    keeps the random state of every device in use and needs no default.
    """

    _device_type: str | None = None

    @staticmethod
    def set_device_type(device: str = "cuda") -> None:
        """Set the default device type.

        Args:
            device: A device type such as ``"cuda"``.
        """
        DefaultDeviceType._device_type = device

    @staticmethod
    def get_device_type() -> str:
        """Return the type that was set; else the accelerator's; else ``"cpu"``."""
        if DefaultDeviceType._device_type is None:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            return "cpu" if accelerator is None else accelerator.type
        return DefaultDeviceType._device_type


def is_host(tensor: Tensor) -> bool:
    """Whether a tensor's memory is the host's or nowhere, so that there is nothing to offload."""
    return tensor.is_cpu or tensor.is_meta


def is_in_host_memory(tensor: Tensor) -> bool:
    """Whether a tensor's memory is the host's."""
    return tensor.is_cpu


def rng_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Every device with a random state of its own that is in use.

    These are the devices on which one of the tensors lies, and the accelerator's current
    device if the accelerator is initialised.
    """
    devices = {t.device: None for t in tensors if not t.is_cpu}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and _is_initialized(accelerator):
        index = torch.accelerator.current_device_index()
        devices[torch.device(accelerator.type, index)] = None
    return with_rng(devices) if devices else []


def beyond_host(tensors: Iterable[Tensor]) -> set[torch.device]:
    """The devices of some tensors, without the host."""
    return {tensor.device for tensor in tensors if not tensor.is_cpu}


def with_rng(devices: Iterable[torch.device]) -> list[torch.device]:
    """Those of some devices that have a random state besides the host's."""
    return [device for device in devices if device.type not in _WITHOUT_RNG]


def _is_initialized(device: torch.device) -> bool:
    module = torch.get_device_module(device)
    return hasattr(module, "is_initialized") and bool(module.is_initialized())


def get_rng_state(device: torch.device) -> Tensor:
    """Return a copy of a device's random state, a uint8 tensor on the host."""
    return torch.get_device_module(device).get_rng_state(device)  # type: ignore[no-any-return]


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Set a device's random state."""
    torch.get_device_module(device).set_rng_state(state, device)


def get_device_states(*args: Any) -> tuple[list[int], list[Tensor]]:
    """Return indices and random states of the devices on which tensors among ``args`` lie.

    Args:
        *args: Any values; tensors nested in containers are found too. Tensors of several
            device types: CUDA goes first, else the first type met, as in torch. (The engine
            does not use this function and keeps all of them.)

    Returns:
        Device indices, and one uint8 state tensor for each.
    """
    tensors, _ = _tree.flatten(args)
    devices = [t.device for t in tensors if t.device.type not in _WITHOUT_RNG]
    if not devices:
        return [], []
    kind = "cuda" if any(d.type == "cuda" for d in devices) else devices[0].type
    devices = [d for d in devices if d.type == kind]
    return [d.index or 0 for d in devices], [get_rng_state(d) for d in devices]


def set_device_states(
    devices: Sequence[int], states: Sequence[Tensor], *, device_type: str | None = None
) -> None:
    """Set what :func:`get_device_states` returned.

    Args:
        devices: Device indices.
        states: One state for each.
        device_type: Type of the devices; the default is DefaultDeviceType's.
    """
    kind = device_type or DefaultDeviceType.get_device_type()
    if kind in _WITHOUT_RNG:
        return
    for index, state in zip(devices, states, strict=False):
        set_rng_state(torch.device(kind, index), state)


# --- Streams and events of an accelerator, and host memory that it can reach


def accelerator_tensors_exist() -> bool:
    """Whether tensors can lie on an accelerator in this process."""
    return torch.accelerator.is_available()


def is_on_accelerator(tensor: Tensor) -> bool:
    """Whether a tensor lies in an accelerator's own memory, from which streams copy."""
    return not (tensor.is_cpu or tensor.is_meta or tensor.is_mps)


def current_stream(device: torch.device) -> torch.Stream:
    """The stream on which the calling thread computes."""
    return torch.accelerator.current_stream(device)


def new_stream(device: torch.device) -> torch.Stream:
    """A stream of its own."""
    return torch.Stream(device)


def record_event(stream: torch.Stream, *, is_timed: bool = False) -> torch.Event:
    """An event that is done once everything queued on a stream so far is done."""
    event = torch.Event(stream.device, enable_timing=is_timed)
    event.record(stream)
    return event


def copy_on_stream(target: Tensor, source: Tensor, stream: torch.Stream) -> None:
    """Queue a copy; does not block where the host's side is pinned."""
    with stream:
        target.copy_(source, non_blocking=True)


def empty_on_stream(nbytes: int, device: torch.device, stream: torch.Stream) -> Tensor:
    """Bytes on a device. Their memory is reused in the order of ``stream``."""
    with stream:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def use_on_stream(tensor: Tensor, stream: torch.Stream) -> None:
    """Let a tensor's memory not be reused before what ``stream`` has queued until its death."""
    tensor.record_stream(stream)


def use_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make an accelerator's device the calling thread's current one; a new thread has the first."""
    if device.type in _WITHOUT_RNG:
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)


def is_capturing() -> bool:
    """Whether what the current stream runs goes into a graph, in which nothing may be asked."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def release_pinned() -> None:
    """Give pinned memory that torch keeps for later back to the machine."""
    _torch.empty_host_cache()


def empty_pinned(nbytes: int) -> Tensor:
    """Bytes of pinned host memory.

    Raises:
        RuntimeError: There is none left.
    """
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


# --- What a device is and has


def is_host_type(device: torch.device) -> bool:
    """Whether a device computes on the host, in the thread that calls."""
    return device.type in _WITHOUT_RNG


def rounds_allocations(device: torch.device) -> bool:
    """Whether the device's allocator takes memory in larger pieces than it was asked for."""
    return device.type not in _WITHOUT_RNG


def own_memory_bytes(device: torch.device) -> int | None:
    """How much memory a device has of its own; None for the host, or if it does not say."""
    if device.type in _WITHOUT_RNG or not torch.accelerator.is_available():
        return None
    module = torch.get_device_module(device)
    properties = getattr(module, "get_device_properties", None)
    total = getattr(properties(device), "total_memory", None) if properties else None
    return None if total is None else int(total)


def own_name(device: torch.device) -> str | None:
    """What the maker calls a device; None for the host, or if it does not say."""
    if device.type in _WITHOUT_RNG:
        return None
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(ask(device)) if ask is not None else device.type


def default_device() -> torch.device:
    """The accelerator's current device; the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def wait_for(device: torch.device) -> None:
    """Block until a device has done all that is queued on it."""
    if device.type not in _WITHOUT_RNG:
        torch.accelerator.synchronize(device)


def has_no_memory(device: torch.device) -> bool:
    """Whether tensors there have sizes and nothing else."""
    return device.type == "meta"


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Give the generators of the host and of a device back the states that they have now."""
    devices = with_rng([] if is_host_type(device) else [device])
    state = torch.get_rng_state()
    states = [(d, get_rng_state(d)) for d in devices]
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for d, s in states:
            set_rng_state(d, s)
