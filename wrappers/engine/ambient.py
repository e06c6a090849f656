"""What a recompute must see again: the state around a region that is not its arguments.

A rerun gives the same tensors only if it finds the random state, the autocast settings, the
default device and the kernel switches of the forward. Torch restores the random state of
one device type, autocast and the default device; it loses the SDPA switches, the default
dtype, the deterministic flag and Python's ``random``.

An :class:`Ambient` is the state of one moment. Taking it is on the path of every region, so
it is a handful of C calls; entering it changes only
what differs at that moment, and notes on an undo list how to put each change back. Users add
their own state with :func:`register_ambient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from wrappers import _device, _random, _torch

Undo = list[Callable[[], Any]]

_cpu_generator = torch.default_generator


class _Provider(NamedTuple):
    capture: Callable[[], Any]
    restore: Callable[[Any], None]


_providers: list[_Provider] = []


class AmbientHandle:
    """Returned by :func:`register_ambient`; its ``remove()`` ends the registration."""

    def __init__(self, provider: _Provider) -> None:
        self._provider = provider

    def remove(self) -> None:
        """Stop to capture this state. Graphs that exist already still restore it."""
        if self._provider in _providers:
            _providers.remove(self._provider)


def register_ambient(capture: Callable[[], Any], restore: Callable[[Any], None]) -> AmbientHandle:
    """Let every recompute see some state of yours as the forward saw it.

    For a tensor-parallel random state tracker, an fp8 recipe, a global that a layer reads.
    Before a recompute the engine calls ``now = capture()`` and ``restore(state)`` with the
    forward's state; after it, also after an exception, ``restore(now)``.

    Args:
        capture: Returns the state as a value that later changes do not reach. Called before
            every region's forward, so it should be cheap.
        restore: Sets a state that ``capture`` returned.

    Returns:
        A handle with a ``remove()`` method.

    Raises:
        TypeError: One of the two is not callable.

    Example:
        >>> handle = register_ambient(tracker.get_states, tracker.set_states)
    """
    if not callable(capture) or not callable(restore):
        raise TypeError("register_ambient needs two callables: capture() and restore(state)")
    provider = _Provider(capture, restore)
    _providers.append(provider)
    return AmbientHandle(provider)


class Ambient:
    """The ambient state of one moment.

    Args:
        devices: Devices whose random state is taken besides the host's. None takes no random
            state at all: a recompute then draws new numbers.
    """

    __slots__ = (
        "autocast",
        "cpu_rng",
        "device_rng",
        "python_random",
        "registered",
        "settings",
    )

    def __init__(self, devices: Sequence[torch.device] | None) -> None:
        self.settings = settings = _torch.settings()
        self.autocast = _autocast_state() if settings[0] else None
        self.cpu_rng = self.python_random = None
        self.device_rng: Sequence[tuple[torch.device, torch.Tensor]] = ()
        if devices is not None:
            self.cpu_rng = _cpu_generator.get_state()
            self.python_random = _random.get_state()
            if devices:
                self.device_rng = [(d, _device.get_rng_state(d)) for d in devices]
        self.registered = [(p, p.capture()) for p in _providers] if _providers else ()

    def enter(self, undo: Undo) -> None:
        """Make this state the current one.

        Args:
            undo: Receives calls that put the present state back, to be made in reverse order.
        """
        now = _torch.settings()
        if now != self.settings:
            self._enter_settings(now, undo)
        if now[0] or self.autocast is not None:
            self._enter_autocast(undo)
        if self.cpu_rng is not None:
            undo.append(partial(_cpu_generator.set_state, _cpu_generator.get_state()))
            _cpu_generator.set_state(self.cpu_rng)
        for device, state in self.device_rng:
            undo.append(partial(_device.set_rng_state, device, _device.get_rng_state(device)))
            _device.set_rng_state(device, state)
        if self.python_random is not None:
            undo.append(partial(_random.set_state, _random.get_state()))
            _random.set_state(self.python_random)
        for provider, state in self.registered:
            undo.append(partial(provider.restore, provider.capture()))
            provider.restore(state)

    def _enter_settings(self, now: tuple[Any, ...], undo: Undo) -> None:
        _, device, kernels = self.settings
        if now[2] != kernels:
            undo.append(partial(_torch.set_kernels, now[2]))
            _torch.set_kernels(kernels)
        if now[1] != device:
            mode = device or torch.device("cpu")
            mode.__enter__()
            undo.append(partial(mode.__exit__, None, None, None))

    def _enter_autocast(self, undo: Undo) -> None:
        cache, now = _autocast_state()
        wanted_cache, wanted = self.autocast or (
            cache,
            {kind: (False, now[kind][1]) for kind in now},
        )
        for kind, (enabled, dtype) in wanted.items():
            is_same = now[kind] == (enabled, dtype) and cache == wanted_cache
            if is_same or not (enabled or now[kind][0]):
                continue
            context = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=wanted_cache)
            context.__enter__()
            undo.append(partial(context.__exit__, None, None, None))

    def forget_python_random(self) -> None:
        """Drop the state of ``random``, to be called when the forward is over, if it has not drawn.

        Setting it costs far more than taking it.
        """
        if self.python_random == _random.get_state():
            self.python_random = None

    def has_drawn(self) -> bool:
        """Whether a random number was drawn from torch since this state was taken."""
        return self.cpu_rng is not None and not (
            torch.equal(self.cpu_rng, _cpu_generator.get_state())
            and all(torch.equal(s, _device.get_rng_state(d)) for d, s in self.device_rng)
        )

    def forget_rng(self) -> None:
        """Drop all random state."""
        self.cpu_rng = self.python_random = None
        self.device_rng = ()


def enter_kernels(kernels: tuple[Any, ...], undo: Undo) -> None:
    """Let recorded operators run as in forward: the same kernel choice, no autocast.

    Args:
        kernels: The forward's, from :func:`wrappers._torch.settings`.
        undo: Receives calls that put the present state back, to be made in reverse order.
    """
    is_autocast, _, now = _torch.settings()
    if now != kernels:
        undo.append(partial(_torch.set_kernels, now))
        _torch.set_kernels(kernels)
    if is_autocast:  # The casts are operators, and recorded.
        for kind, (enabled, dtype) in _autocast_state()[1].items():
            if enabled:
                context = torch.autocast(kind, dtype=dtype, enabled=False)
                context.__enter__()
                undo.append(partial(context.__exit__, None, None, None))


_AUTOCAST_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "privateuseone")


def _autocast_state() -> tuple[bool, dict[str, tuple[bool, torch.dtype]]]:
    """Cache flag, and enabled and dtype of every device type that knows autocast."""
    states = {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in _AUTOCAST_TYPES
        if torch.amp.is_autocast_available(kind)
    }
    return torch.is_autocast_cache_enabled(), states


def leave(undo: Undo) -> None:
    """Make the calls of an undo list in reverse order; one that raises stops no other."""
    while undo:
        step = undo.pop()
        try:
            step()
        except BaseException:
            leave(undo)
            raise
