"""What is in a state checkpoint: model, optimizers, random states, and what the user adds.

On its way to and from storage it is one flat dict. A tensor (plain, ``DTensor``, ``ShardedTensor``)
stands for itself; anything else is a 1-tuple, so that no planner takes it apart. ::

    model.<name>                         named as in the plain model
    optimizer.state.<name>.<key>         by parameter, so that other world sizes find them
    optimizer.settings.<name>            learning rate and so on: those of the parameter's group
    extra.<key>                          the coordinator's
    rank.<rank>.rng                      each rank its own
    rank.<rank>.extra.<key>

Values that are no tensors are plain data: what ``torch.load(weights_only=True)`` accepts. Each is
made by a round trip through it, which is the check, the copy, and the way to the host in one.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from wrappers import _device

__all__ = ["Request", "StateDict", "collect", "to_host"]

#: Tensors, and 1-tuples of anything else.
StateDict = dict[str, Any]

MODEL, OPTIMIZER, EXTRA, RANK = "model.", "optimizer.", "extra.", "rank."
_STATE, _SETTINGS = f"{OPTIMIZER}state.", f"{OPTIMIZER}settings."
#: Under which :func:`wrappers.state.load` returns a rank's own values.
RANK_KEY = "rank"

#: Optimizers whose step wants more than gradients.
_NO_STEP_OF_ZEROS = (torch.optim.LBFGS, torch.optim.SparseAdam)

_META = torch.device("meta")
_ATOMS = (bool, int, float, str, bytes, type(None))


# --- Saving ---------------------------------------------------------------------------------


def collect(
    model: nn.Module,
    optimizers: list[Optimizer],
    extra: Mapping[str, Any] | None,
    rank_extra: Mapping[str, Any] | None,
    *,
    rank: int,
    is_coordinator: bool,
    rng: bool,
) -> StateDict:
    """What a rank has to save; tensors are the live ones.

    Raises:
        TypeError: A value is not plain data.
        ValueError: A key or a parameter stands in two places.
    """
    found = _entries(MODEL, _model_state(model))
    found |= _entries("", _optimizer_state(model, optimizers))
    if RANK_KEY in _mapping("extra", extra):
        raise ValueError(f"extra: the key {RANK_KEY!r} is kept for what rank_extra holds")
    if is_coordinator:
        found |= _extra_entries("extra", EXTRA, extra)
    found |= _extra_entries("rank_extra", f"{RANK}{rank}.{EXTRA}", rank_extra)
    if rng:
        found[f"{RANK}{rank}.rng"] = (_plain("the random states", _random_states(model)),)
    return found


def _entries(prefix: str, state: Mapping[str, Any]) -> StateDict:
    copies: dict[int, Any] = {}  # the parameters of a group share their settings
    found: StateDict = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            found[prefix + key] = value
            continue
        if id(value) not in copies:
            copies[id(value)] = (_plain(prefix + key, value),)
        found[prefix + key] = copies[id(value)]
    return found


def _plain(what: str, value: Any) -> Any:
    """A copy of plain data, tensors in it on the host.

    Raises:
        TypeError: It is not plain data.
    """
    if type(value) in _ATOMS:
        return value
    try:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        return torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TypeError(
            f"{what} is a {type(value).__name__} that could not be loaded without running code "
            "from the file: save numbers, strings, tensors, lists and dicts of them, or an object "
            f"with state_dict and load_state_dict ({type(error).__name__}: {error!s:.200})"
        ) from error


def _mapping(name: str, extra: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
        raise TypeError(f"{name} must be a mapping with keys of type str, got {extra!r:.80}")
    return extra


def _extra_entries(name: str, prefix: str, extra: Mapping[str, Any] | None) -> StateDict:
    return {
        prefix + key: (_plain(f"{name}[{key!r}]", _state_of(value)),)
        for key, value in _mapping(name, extra).items()
    }


def _is_stateful(value: Any) -> bool:
    if isinstance(value, torch.Generator):
        return True
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def _state_of(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.state_dict() if _is_stateful(value) else value


def _set_state(value: Any, state: Any) -> None:
    value.set_state(state) if isinstance(value, torch.Generator) else value.load_state_dict(state)


def _model_state(model: nn.Module) -> dict[str, Any]:
    is_empty = next(model.parameters(), None) is None and next(model.buffers(), None) is None
    if is_empty and not model.state_dict():
        return {}  # torch's function takes it for a mistake
    return get_model_state_dict(model)


def _optimizer_state(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """State and settings by parameter name; those of an optimizer without a step have no state."""
    _check_parameters(model, optimizers)
    if not optimizers:
        return {}
    with _no_step(optimizers):
        return _flat(get_optimizer_state_dict(model, optimizers))


@contextlib.contextmanager
def _no_step(optimizers: list[Optimizer]) -> Iterator[None]:
    """Keep torch from making states by a step, where an optimizer has none."""
    for optimizer in optimizers:
        for parameter in _parameters([optimizer]):
            optimizer.state.setdefault(parameter, {})
    try:
        yield
    finally:
        for optimizer in optimizers:
            for parameter in [p for p, values in optimizer.state.items() if not values]:
                del optimizer.state[parameter]


def _parameters(optimizers: list[Optimizer]) -> list[Tensor]:
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


def _check_parameters(model: nn.Module, optimizers: list[Optimizer]) -> None:
    parameters = _parameters(optimizers)
    if len({id(p) for p in parameters}) < len(parameters):
        raise ValueError("optimizer: a parameter is in two groups or two optimizers")
    if not all(group["params"] for optimizer in optimizers for group in optimizer.param_groups):
        raise ValueError("optimizer: a group without parameters has no names to be saved under")
    for optimizer in optimizers:
        if isinstance(optimizer, _NO_STEP_OF_ZEROS):
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} cannot make its state by a step of zeros, "
                "which loading takes: pass it in extra, as an object with a state of its own"
            )
    strangers = {id(p) for p in parameters} - {id(p) for p in model.parameters()}
    if strangers:
        raise ValueError(
            f"optimizer: {len(strangers)} of {len(parameters)} parameters are not the model's. "
            "Make the optimizer after the model is sharded, and pass the model that it trains"
        )


def _flat(state: Any) -> dict[str, Any]:
    """The entries of an optimizer's state dict."""
    found: dict[str, Any] = {}
    for name, values in state["state"].items():
        _flatten_into(found, f"{_STATE}{name}", values)
    for group in state["param_groups"]:
        settings = {key: value for key, value in group.items() if key != "params"}
        found |= {f"{_SETTINGS}{name}": settings for name in group["params"]}
    return found


def _flatten_into(found: dict[str, Any], prefix: str, values: Mapping[Any, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _flatten_into(found, f"{prefix}.{key}", value)
        else:
            found[f"{prefix}.{key}"] = value


def to_host(state: StateDict) -> StateDict:
    """A copy of a state dict in host memory; training may go on and change the original."""
    return {
        key: _copied_to_host(value) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def _copied_to_host(tensor: Tensor) -> Tensor:
    copied = tensor.detach().cpu()
    return copied.clone() if copied.device == tensor.device else copied


# --- Random states --------------------------------------------------------------------------


def _random_states(model: nn.Module) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "devices": [
            [device.type, _device.get_rng_state(device)]
            for device in _device.rng_devices([*model.parameters(), *model.buffers()])
        ],
    }
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = [kind, keys.tolist(), *rest]
    return states


def _set_random_states(model: nn.Module, states: dict[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    saved = list(states["devices"])
    for device in _device.rng_devices([*model.parameters(), *model.buffers()]):
        for each in saved:
            if each[0] == device.type:  # the first of its type not taken yet
                saved.remove(each)
                _device.set_rng_state(device, each[1])
                break
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and "numpy" in states:
        kind, keys, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.asarray(keys, dtype=numpy.uint32), *rest))


# --- Loading --------------------------------------------------------------------------------


class Request:
    """What a rank wants from a state checkpoint, and where it is to go.

    Tensors of the model and of the optimizers are read in place.

    Args:
        model: As for :func:`collect`, like the next three.
        optimizers: See there.
        extra: See there.
        rank_extra: See there.
        saved: Names of all entries of the state checkpoint.
        rank: This rank.
        rng: Whether the random states are wanted.

    Attributes:
        state: What is to be read.

    Raises:
        ValueError: The state checkpoint lacks an entry, or a tensor has no memory to be read into.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        extra: Mapping[str, Any] | None,
        rank_extra: Mapping[str, Any] | None,
        *,
        saved: Iterable[str],
        rank: int,
        rng: bool,
    ) -> None:
        self._model = model
        self._optimizers = optimizers
        self._extra = _mapping("extra", extra)
        self._rank_extra = _mapping("rank_extra", rank_extra)
        self._saved = frozenset(saved)
        self._own = f"{RANK}{rank}.{EXTRA}"
        self._rng = f"{RANK}{rank}.rng" if rng else None
        #: Groups of parameters, with their names; parameters that were saved without a state.
        self._groups: list[tuple[dict[str, Any], list[str]]] = []
        self._stateless: list[tuple[Optimizer, Tensor]] = []
        wanted = {MODEL + name: value for name, value in _model_state(model).items()}
        if optimizers:
            wanted |= self._optimizer_request()
        values = (EXTRA, self._own)
        wanted |= {k: None for k in self._saved if k.startswith(values) or k == self._rng}
        self.state: StateDict = {
            key: value if isinstance(value, Tensor) else (value,) for key, value in wanted.items()
        }
        self._check_names()

    def unexpected(self) -> set[str]:
        """Entries of the saved model that this rank's model has no place for."""
        return {key for key in self._saved if key.startswith(MODEL)} - self.state.keys()

    def _check_names(self) -> None:
        wanted = {*self.state, *(EXTRA + key for key in self._extra)}
        if self._has_own_extra():
            wanted |= {self._own + key for key in self._rank_extra}
        if missing := sorted(wanted - self._saved):
            raise ValueError(
                f"the state checkpoint has no `{missing[0]}` ({len(missing)} such entries): it was "
                "saved from another model, optimizer or extra"
            )

        for key, value in self.state.items():
            if isinstance(value, Tensor) and value.device == _META:
                raise ValueError(
                    f"`{key}` is on the meta device: give it memory first, such as by "
                    "model.to_empty(device=...)"
                )

    def _has_own_extra(self) -> bool:
        return any(key.startswith(self._own) for key in self._saved)

    def _optimizer_request(self) -> dict[str, Any]:
        """The optimizers' entries. torch makes them in a step with zero gradients and rates."""
        _check_parameters(self._model, self._optimizers)
        parameters = _parameters(self._optimizers)
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None  # with gradients, or with an old state, it would make none
        for optimizer in self._optimizers:
            optimizer.state.clear()
        try:
            state: Any = get_optimizer_state_dict(self._model, self._optimizers)
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        names = [group["params"] for group in state["param_groups"]]
        self._groups = list(zip(groups, names, strict=True))
        self._leave_out_stateless(state["state"])
        return _flat(state)

    def _leave_out_stateless(self, states: dict[str, Any]) -> None:
        """Parameters that had no state when they were saved get none: they were never stepped."""
        saved = sorted(self._saved)
        names = [name for _, of_group in self._groups for name in of_group]
        owners = [(o, p) for o in self._optimizers for p in _parameters([o])]
        for name, owner in zip(names, owners, strict=False):  # FSDP1's one may have several names
            prefix = f"{_STATE}{name}."
            first = bisect_left(saved, prefix)
            was_stepped = first < len(saved) and saved[first].startswith(prefix)
            if not was_stepped and states.pop(name, None) is not None:
                self._stateless.append(owner)

    def apply(self) -> dict[str, Any]:
        """Give what was read to its owners; return the plain values of ``extra``."""
        found: dict[str, Any] = {
            key: each if isinstance(each, Tensor) else each[0] for key, each in self.state.items()
        }
        model = _below(MODEL, found)
        if model:
            set_model_state_dict(self._model, model)
        if self._optimizers:
            self._apply_optimizers(found)
        values = _distribute(_below(EXTRA, found), self._extra)
        if self._has_own_extra():
            values[RANK_KEY] = _distribute(_below(self._own, found), self._rank_extra)
        if self._rng in found:
            _set_random_states(self._model, found[self._rng])
        return values

    def _apply_optimizers(self, found: dict[str, Any]) -> None:
        state = _below(OPTIMIZER, {k: v for k, v in found.items() if k.startswith(_STATE)})
        for group, names in self._groups:
            # What only one side knows, such as a scheduler's initial_lr, stays.
            group.update({**found[f"{_SETTINGS}{names[0]}"], "params": group["params"]})
            settings = {key: value for key, value in group.items() if key != "params"}
            state |= {f"param_groups.{n}.{key}": v for n in names for key, v in settings.items()}
        for optimizer, parameter in self._stateless:
            optimizer.state[parameter] = {}
        with _no_step(self._optimizers):
            set_optimizer_state_dict(self._model, self._optimizers, state)

    def not_found(self) -> str:
        """What of this rank's own the state checkpoint does not have, in words; may be empty."""
        found = []
        if self._rng is not None and self._rng not in self._saved:
            found.append("random states")
        if self._rank_extra and not self._has_own_extra():
            found.append("rank_extra")
        return " and ".join(found)


def _below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _distribute(values: dict[str, Any], owners: Mapping[str, Any]) -> dict[str, Any]:
    """Give states to stateful objects; return what is left."""
    for key, owner in owners.items():
        if _is_stateful(owner):
            _set_state(owner, values.pop(key))
    return values
