"""Tensors with sizes and without memory, and copies of modules that are made of them.

A copy shares nothing with its original that could change: running it leaves the user's model, its
buffers and counters as they were. Hooks are copied too, and see fake tensors where they are called.
It has no wrappers of ours and is not sharded, whatever its original is, so that its regions are
those of the plain model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _torch, _tree
from wrappers.apply import remove_activation_checkpointing
from wrappers.errors import WrapperError


class Fakes:
    """Makes fake tensors and modules that belong together.

    Args:
        device: Where the fake tensors say that they are.

    Attributes:
        mode: Enter it to run code on fake tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.mode = _torch.fake_mode()
        self.device = device
        #: By storage and data type of the original: what stands for its memory.
        self._memory: dict[tuple[int, torch.dtype], Tensor] = {}
        #: Keeps storages alive whose number is a key.
        self._originals: list[Tensor] = []

    def tensor(self, original: Tensor) -> Tensor:
        """A fake tensor like another one; what shares memory goes on to share it."""
        # What is sharded is whole here.
        is_strided = original.layout is torch.strided and not _torch.inner_tensors(original)
        key = _torch.storage_key(original) if is_strided else None
        with self.mode, torch.no_grad():
            if key is None:
                fake = torch.empty(original.shape, dtype=original.dtype, device=self.device)
            else:
                fake = self._place(original, key)
        if isinstance(original, nn.Parameter):
            return nn.Parameter(fake, requires_grad=original.requires_grad)
        return fake.requires_grad_(original.requires_grad)

    def _place(self, original: Tensor, key: int) -> Tensor:
        memory = self._memory.get((key, original.dtype))
        if memory is None:
            num = _torch.storage_bytes(original) // original.dtype.itemsize
            memory = torch.empty(num, dtype=original.dtype, device=self.device)
            self._memory[key, original.dtype] = memory
            self._originals.append(original)
        place = original.size(), original.stride(), original.storage_offset()
        return memory.as_strided(*place)

    def values(self, value: Any) -> Any:
        """The same nested value with fake tensors in it."""
        tensors, build = _tree.flatten(value)
        return build([self.tensor(tensor) for tensor in tensors])

    def module(self, original: nn.Module) -> nn.Module:
        """A copy of a module, made of fake tensors.

        Raises:
            WrapperError: Something in the module cannot be copied.
        """
        memo = {id(t): self.tensor(t) for m in original.modules() for t in _tensors_of(m)}
        try:
            with _torch.unsharded_classes(original):
                fake = copy.deepcopy(original, memo)
        except Exception as error:
            raise WrapperError(
                f"the {type(original).__name__} cannot be copied, which a profile without the "
                f"device begins with: {type(error).__name__}: {error}. Give a function that "
                "builds the model to wrappers.plan_for, or keep what cannot be copied out of it."
            ) from error
        remove_activation_checkpointing(fake)
        return fake

    def realize(
        self, fake: nn.Module, device: torch.device, memo: dict[int, Any] | None = None
    ) -> nn.Module:
        """A copy of a fake module with memory on a device, its numbers made up.

        Args:
            fake: A module of fake tensors.
            device: Where its tensors are to be.
            memo: By ``id`` of a submodule: what stands in its place.
        """
        memo = {} if memo is None else memo
        for module in fake.modules():
            if id(module) not in memo:
                memo.update({id(t): _real(t, device) for t in _tensors_of(module)})
        return copy.deepcopy(fake, memo)


def _real(fake: Tensor, device: torch.device) -> Tensor:
    """A tensor with small numbers in it, so that sums and products of many stay in range."""
    if fake.is_floating_point():
        made = torch.randn(fake.shape, device=device).mul_(0.02).to(fake.dtype)
    else:
        made = torch.zeros(fake.shape, dtype=fake.dtype, device=device)
    if isinstance(fake, nn.Parameter):
        return nn.Parameter(made, requires_grad=fake.requires_grad)
    return made.requires_grad_(fake.requires_grad)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All tensors that a module holds itself: parameters, buffers, plain attributes."""
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    own = {
        k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")
    }
    yield from _tree.flatten(own)[0]
