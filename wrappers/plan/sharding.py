"""FSDP2 on ranks that are not there: what gathered parameters take, and when.

A copy of the model on fake tensors is sharded as the user's is, or will be, over a process group
whose collectives do nothing. FSDP's own code then makes and frees its buffers around the stubs of a
step (see :mod:`wrappers.plan.step`): gathered parameters, prefetched ones, what waits to be
reduced. Nothing is modelled, so nothing can be modelled wrongly.

Regions lie inside of what is sharded together, so they see whole parameters, in the data type of
the mixed-precision policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wrappers import _torch
from wrappers.errors import WrapperError
from wrappers.select import plain_modules


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    Attributes:
        fqn: Their module; empty for the root.
        reshards: Whether they are freed between forward and backward; None: FSDP decides.
        policy: The MixedPrecisionPolicy; None for none.
    """

    fqn: str
    reshards: bool | None = None
    policy: Any = None


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 shards a model.

    Attributes:
        shape: Of the mesh: the number of ranks, or (replicas, ranks of one).
        units: What is sharded together, inner ones first.
    """

    shape: tuple[int, ...]
    units: tuple[Unit, ...]

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        num = 1
        for size in self.shape:
            num *= size
        return num

    @contextlib.contextmanager
    def mesh(self) -> Iterator[Any]:
        """The mesh of ranks that are not there; see :func:`wrappers._torch.fake_mesh`."""
        with _torch.fake_mesh(self.shape) as mesh:
            yield mesh

    def shard(self, model: nn.Module, mesh: Any) -> None:
        """Shard a model on fake tensors."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        modules = dict(plain_modules(model))
        for unit in self.units:
            fully_shard(
                modules[unit.fqn],
                mesh=mesh,
                reshard_after_forward=unit.reshards,
                mp_policy=unit.policy or MixedPrecisionPolicy(),
            )

    def cast(self, model: nn.Module) -> None:
        """Give the parameters of a whole model the data types in which they are gathered."""
        modules = dict(plain_modules(model))
        seen: set[nn.Parameter] = set()
        for unit in self.units:
            dtype: torch.dtype | None = getattr(unit.policy, "param_dtype", None)
            for parameter in modules[unit.fqn].parameters():
                if parameter not in seen and dtype is not None and parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
                seen.add(parameter)


def sharding_of(model: nn.Module) -> Sharding | None:
    """How a model is sharded; None if it is not.

    Raises:
        WrapperError: It is sharded in a way that a profile cannot follow.
    """
    units = _torch.sharded_units(model)
    if not units:
        _refuse_others(model)
        return None
    names = {module: fqn for fqn, module in plain_modules(model)}
    shapes = {unit.shape for unit in units}
    if len(shapes) > 1:
        raise WrapperError(f"the model is sharded over different meshes: {sorted(shapes)}")
    return Sharding(
        units[0].shape,
        tuple(
            Unit(
                names[unit.module],
                None if unit.is_automatic else unit.reshards,
                unit.policy,
            )
            for unit in units
        ),
    )


def sharding_for(regions: Sequence[str], num_ranks: int, policy: Any = None) -> Sharding:
    """What most people do: each region is sharded for itself, and what remains with the root."""
    units = (*(Unit(fqn, policy=policy) for fqn in regions), Unit("", policy=policy))
    return Sharding((num_ranks,), units)


def _refuse_others(model: nn.Module) -> None:
    for fqn, module in model.named_modules():
        if isinstance(module, _torch.fsdp_types()):
            raise WrapperError(
                f"`{fqn}` is wrapped by FSDP1, which a profile cannot follow: plan for the model "
                "before it is wrapped, or shard it with fully_shard",
                fqn=fqn,
            )
    for fqn, parameter in model.named_parameters():
        if _torch.inner_tensors(parameter):
            raise WrapperError(
                f"parameter `{fqn}` is a {type(parameter).__name__} that FSDP2 has not made, such "
                "as one of tensor parallelism, which a profile cannot follow: plan for the model "
                "before it is distributed",
                fqn=fqn,
            )
