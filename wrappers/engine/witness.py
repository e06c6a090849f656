"""Is a replay right? The same forward, rerun once and compared.

A :class:`WitnessFrame` stands beside a replay: in forward it makes a slot for each saved tensor,
as a rerun does. When it is asked, it calls the function again, and its slots compare what comes
with what the replay has made, bit by bit. They keep nothing that is equal, so the check needs no
second set of activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wrappers import _device, _torch
from wrappers.engine import verify
from wrappers.engine.ambient import Undo, leave
from wrappers.engine.rerun import RerunFrame, Slot


class Witness(Slot):
    """The slot of a rerun whose tensor is compared and not kept.

    Attributes:
        expected: What the tensor is compared with.
        other: The rerun's tensor, if it is another one.
    """

    __slots__ = ("expected", "other")

    def __init__(self) -> None:
        self.expected: Tensor | None = None
        self.other: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """Never there: the slot stays empty, so that each rerun fills it."""
        raise AttributeError("value")

    @value.setter
    def value(self, tensor: Tensor) -> None:
        if self.expected is not None and not verify.is_same(self.expected, tensor):
            self.other = tensor.detach()

    def taken(self) -> Tensor:
        """The rerun's tensor, which differs."""
        assert self.other is not None, "a slot that does not differ has no other tensor"
        return self.other


class WitnessFrame(RerunFrame):
    """The same forward, to be rerun and compared."""

    slot_type = Witness

    __slots__ = ()

    def differing(
        self, slots: Sequence[Witness], generators: Sequence[tuple[Any, Tensor]]
    ) -> list[Witness]:
        """Rerun the function; tell which slots get another tensor than they expect.

        Where two reruns differ as well, the kernels are not deterministic: then nothing differs
        that is about as near to a rerun as these are to each other.

        Args:
            slots: Those to compare.
            generators: The user's random number generators, with their states in forward.

        Raises:
            Exception: Whatever the rerun raises, which so cannot be compared.
        """
        if not slots:
            return []
        self._rerun(generators)
        found = [slot for slot in slots if slot.other is not None]
        if all(_device.is_host(slot.taken()) for slot in found):
            return found
        first = [slot.taken() for slot in found]
        replayed = [slot.expected for slot in found]
        for slot, tensor in zip(found, first, strict=True):
            slot.expected, slot.other = tensor, None
        self._rerun(generators)
        is_near = all(map(_is_as_near, replayed, first, [slot.other for slot in found]))
        for slot, tensor in zip(found, first, strict=True):
            slot.other = tensor
        return [] if is_near else found

    def may_differ(self, tensor: Tensor, difference: int, inputs: list[tuple[Tensor, int]]) -> bool:
        """Versions of what is made inside may differ: what counts is what is in it.

        Some functions, such as ``linear`` of an input that is not contiguous, write in place only
        while no dispatch mode looks on, as the recorder of the forward does.
        """
        is_from_outside = isinstance(tensor, torch.nn.Parameter) or any(
            _torch.is_same_storage(tensor, input) for input, _ in inputs
        )
        return not is_from_outside or super().may_differ(tensor, difference, inputs)

    def _rerun(self, generators: Sequence[tuple[Any, Tensor]]) -> None:
        undo: Undo = []
        self._group = None  # A check is no part of a GraphExecGroup.
        try:
            with _torch.disable_dispatch_modes():
                for generator, state in generators:
                    undo.append(set_random_state(generator, state))
                self.recompute()
        finally:
            leave(undo)


def _is_as_near(replayed: Tensor | None, first: Tensor, second: Tensor | None) -> bool:
    """Whether a replay's tensor is about as near to a rerun's as two reruns are to each other."""
    if replayed is None or second is None or not first.is_floating_point():
        return False
    with torch.no_grad(), _torch.disable_dispatch_modes():
        spread = (first.double() - second.double()).abs().max()
        rounding = first.double().abs().max() * torch.finfo(first.dtype).eps * 8
        distance = (first.double() - replayed.double()).abs().max()
        return bool(distance <= 8 * spread + rounding)


def set_random_state(generator: Any, state: Tensor) -> Callable[[], Any]:
    """Set the state of a generator, or of a device's; return what puts the present one back."""
    if isinstance(generator, torch.device):
        present = _device.get_rng_state(generator)
        _device.set_rng_state(generator, state)
        return functools.partial(_device.set_rng_state, generator, present)
    present = generator.get_state()
    generator.set_state(state)
    return functools.partial(generator.set_state, present)
