"""A module wrapper that nobody sees, and a forward that can be replaced in place.

Problem: a wrapper that registers the inner module as its child puts a name of its own into
every FQN below it. ``named_parameters``, ``state_dict``, optimizer state and sharding code then
see other names than the plain model's, and each of them needs a hook that strips the name.

Idea: a wrapper has no child. It is a second face of the inner module:

    wrapper.__dict__ ──"_checkpoint_wrapped_module"──> inner module
        │ _parameters, _buffers, _modules, ...             │ the same objects
        └──────────────────> {"weight": ..., ...} <────────┘

The dicts that hold parameters, buffers, children and state-dict hooks are *the same objects* in
both ``__dict__``\\ s, so whatever walks a module tree finds the plain model's names and there is
nothing to strip. Attributes are read from, written to and deleted from the inner module. What a
class may override (``state_dict``, ``_apply``, ``__len__``, ...) is passed on to the inner module.

The wrapper's own are: its forward, the forward and backward hooks registered on it (they run
outside the region, once), its class, and the names in ``_own_attributes``.

Invariant: for every wrapper ``w`` and every name ``n`` in ``_SHARED``,
``w.__dict__[n] is getattr(inner, n)``, also after deepcopy and pickle.

In place there is no second module at all: ``module.forward`` is replaced in the instance's
``__dict__`` by an :class:`InPlaceForward`. The class stays, so code that looks for a class finds
it, and hooks of the module stay outside the region.
"""

from __future__ import annotations

import contextlib
import functools
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from wrappers import _torch

__all__ = ["ActivationWrapper", "InPlaceForward", "unwrap"]

# The names under which torch, FSDP and accelerate look for the inner module.
_CHECKPOINT_WRAPPED_MODULE = "_checkpoint_wrapped_module"
_CHECKPOINT_PREFIX = _CHECKPOINT_WRAPPED_MODULE + "."

_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

# Special methods are looked up on the class, so a wrapper's class has them if and only if the
# inner module's class has them: a wrapped Linear has no length and is true.
_SPECIAL = (
    *("__len__", "__bool__", "__iter__", "__reversed__", "__contains__"),
    *("__getitem__", "__setitem__", "__delitem__", "__enter__", "__exit__"),
    *("__add__", "__radd__", "__iadd__", "__mul__", "__rmul__", "__imul__"),
    # torch.distributed.checkpoint asks whether the class attribute is nn.Module's.
    *("get_extra_state", "set_extra_state"),
)

# Methods of nn.Module that work on the wrapper itself: they call it or use its own hooks.
_ABOUT_THE_CALL = frozenset(
    {
        "forward",
        "compile",
        "named_modules",
        "register_backward_hook",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "_call_impl",
        "_compiled_call_impl",
        "_get_backward_hooks",
        "_get_backward_pre_hooks",
        "_get_name",
        "_maybe_warn_non_full_backward_hook",
        "_replicate_for_data_parallel",
        "_slow_forward",
        "_wrapped_call_impl",
    }
)


#: What every object has and a module's class may override; the wrapper is an object of its own.
_OF_OBJECTS = ("__call__", "__eq__", "__hash__", "__ne__", "__str__", "__format__")

#: A class that defines one of these is not made a base of its wrappers: it would copy or make them.
_NOT_INHERITED = frozenset(
    {
        *("__copy__", "__deepcopy__", "__getnewargs__", "__getnewargs_ex__", "__getstate__"),
        *("__reduce__", "__reduce_ex__", "__getattribute__", "__new__"),
        *("__slots__", "__del__"),
    }
)


def _delegate(name: str) -> Any:
    """Make a method that calls the inner module's; the wrapper stands in for its ``self``."""

    def method(self: ActivationWrapper, *args: Any, **kwargs: Any) -> Any:
        owner = self._wrapped_owner()
        result = getattr(owner, name)(*args, **kwargs)
        if owner._modules is not self._modules:  # ``del sequential[0]`` makes a new dict
            self._link_wrapped()
        return self if result is owner else result

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"Call ``{name}`` of the inner module."
    return method


class _Through:
    """Stands on a wrapper's class for what the inner module's class defines."""

    def __init__(self, name: str, inner_cls: type) -> None:
        self._name = name
        self._inner_cls = inner_cls

    def __get__(self, wrapper: ActivationWrapper | None, owner: type | None = None) -> Any:
        if wrapper is None:
            return getattr(self._inner_cls, self._name)
        return getattr(wrapper._checkpoint_wrapped_module, self._name)


def _delegate_value(name: str) -> property:
    return property(lambda self: getattr(self._wrapped_owner(), name))


@functools.lru_cache(maxsize=1024)
def _overridden(inner_cls: type) -> tuple[str, ...]:
    """The names that a wrapper of this class must pass on beyond what all wrappers do."""
    special = [name for name in _SPECIAL if _is_changed(inner_cls, name)]
    ours = _ABOUT_THE_CALL.union(vars(ActivationWrapper))
    changed = [
        name
        for name in vars(nn.Module)
        if not name.startswith("__") and name not in ours and _is_changed(inner_cls, name)
    ]
    return tuple(dict.fromkeys(special + changed))


def _is_changed(inner_cls: type, name: str) -> bool:
    missing = object()
    return getattr(inner_cls, name, missing) is not getattr(nn.Module, name, missing)


@functools.lru_cache(maxsize=1024)
def _specialized(cls: Any, names: tuple[str, ...], inner_cls: Any) -> Any:
    """A subclass of a wrapper class for inner modules of one class; made once.

    Args:
        cls: The wrapper class.
        names: What it must pass on to the inner module.
        inner_cls: Made a base too, for ``isinstance``, unless it is None or cannot be one.
    """
    body: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    for name in _attributes_of(inner_cls):
        if not hasattr(cls, name):
            body[name] = _Through(name, inner_cls)
    for name in names:
        is_value = hasattr(nn.Module, name) and not callable(getattr(nn.Module, name))
        body[name] = _delegate_value(name) if is_value else _delegate(name)
    body["_specialization"] = (cls, names, inner_cls)  # what it takes to make the class again
    if inner_cls is not None:
        calls = {name: getattr(nn.Module, name) for name in (*_ABOUT_THE_CALL, *_OF_OBJECTS)}
        calls = {name: value for name, value in calls.items() if name not in _names_below(cls)}
        with contextlib.suppress(TypeError):  # another metaclass, slots, an order of bases
            return type(cls)(cls.__name__, (cls, inner_cls), {**calls, **body})
    return type(cls)(cls.__name__, (cls,), body)


def _names_below(cls: type) -> set[str]:
    """The names that a class defines itself or inherits from below nn.Module."""
    return {name for base in cls.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}


def _attributes_of(inner_cls: type | None) -> set[str]:
    """What a module's class defines: on the wrapper's class stands a way to the inner module's."""
    names = set() if inner_cls is None else _names_below(inner_cls)
    return {name for name in names if not (name.startswith("__") and name.endswith("__"))}


def _base_for(mod: nn.Module) -> Any:
    """The class that ``isinstance`` shall find in a wrapper of ``mod``."""
    plain = plain_module(mod)
    cls: type = type(plain)
    is_managed = isinstance(plain, (torch.jit.ScriptModule, LazyModuleMixin))
    if cls is nn.Module or is_managed or is_fsdp_managed(plain):
        return None  # A lazy module will change its class; FSDP acts on what has its.
    return None if _names_below(cls).intersection(_NOT_INHERITED) else cls


def _new_specialized(cls: type[ActivationWrapper], *specialization: Any) -> ActivationWrapper:
    """Make the empty object that unpickling and deepcopy fill with state."""
    made = _specialized(cls, *specialization) if specialization else cls
    wrapper: ActivationWrapper = nn.Module.__new__(made)
    return wrapper


@_torch.register_as_torch_wrapper
class ActivationWrapper(nn.Module, ABC):
    """Base of the module wrappers; abstract, a subclass defines ``forward``.

    A subclass calls the inner module as ``self._checkpoint_wrapped_module(...)`` and lists the
    attributes that it keeps for itself in ``_own_attributes``; all others are the inner module's.
    The class of a wrapper is a generated subclass. It has the inner module's class as a base too,
    so that code which looks for a class (``isinstance(module, Block)``) finds it; what that class
    defines is still read from and done by the inner module. Special names (``__x__``) are not read
    from the inner instance.

    Args:
        mod: The module to wrap.

    Raises:
        TypeError: ``mod`` is not a module, or the class is abstract.
    """

    #: Written to the wrapper itself. ``_old_forward``, ``_original_forward`` and ``_hf_hook`` are
    #: accelerate's: it keeps ``m.forward`` under the first two and calls it from a new
    #: ``m.forward``. If these were the inner module's, the new forward would call itself forever.
    _own_attributes: ClassVar[frozenset[str]] = frozenset(
        {
            "__class__",
            "__dict__",
            "forward",
            "_old_forward",
            "_original_forward",
            "_hf_hook",
            "_compiled_call_impl",
            "_is_full_backward_hook",
        }
    )
    _checkpoint_wrapped_module: nn.Module

    def __init_subclass__(cls) -> None:
        """Keep a generated subclass from the inner class's own hook, which may change it."""

    def __init__(self, mod: nn.Module) -> None:
        require_module(mod)
        super().__init__()
        owner_cls: Any = type(_containers_of(mod))
        names, base = _overridden(owner_cls), _base_for(mod)
        if names or base is not None:
            self.__class__ = _specialized(type(self), names, base)
        self._checkpoint_wrapped_module = mod

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the inner module as a region."""

    def _wrapped_owner(self) -> nn.Module:
        """The module whose containers and methods stand behind this wrapper."""
        return _containers_of(self._checkpoint_wrapped_module)

    def _link_wrapped(self) -> None:
        own = self.__dict__
        owner = self._wrapped_owner()
        for name in _SHARED:
            own[name] = getattr(owner, name)
        own.pop("training", None)
        _torch.share_fsdp_state(owner, self)

    # --- Attributes ---------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        is_special = name.startswith("__") and name.endswith("__")
        # deepcopy and pickle look for __deepcopy__, __getnewargs__, ... on the instance.
        if is_special or name == "_old_forward" or _CHECKPOINT_WRAPPED_MODULE not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._checkpoint_wrapped_module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and value.__name__ == f"Parametrized{type(self).__name__}":
            _read_parametrizations(self._checkpoint_wrapped_module)
        elif name == "__class__" and is_parametrized(self):
            _forget_parametrizations(self._checkpoint_wrapped_module)
        if name in _SHARED:
            setattr(self._wrapped_owner(), name, value)
            self._link_wrapped()
        elif name == _CHECKPOINT_WRAPPED_MODULE:
            object.__setattr__(self, name, value)
            self._link_wrapped()
        elif self._is_own_attribute(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._checkpoint_wrapped_module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ and name not in _SHARED:
            object.__delattr__(self, name)
        else:
            delattr(self._checkpoint_wrapped_module, name)

    def _is_own_attribute(self, name: str) -> bool:
        return name in self._own_attributes or name in self.__dict__

    def __dir__(self) -> list[str]:
        own: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return sorted({*own, *dir(self._checkpoint_wrapped_module)})

    # --- What a module may override, in its class or (``model.train = frozen``) on the instance

    _apply = _delegate("_apply")
    _load_from_state_dict = _delegate("_load_from_state_dict")
    _save_to_state_dict = _delegate("_save_to_state_dict")
    apply = _delegate("apply")
    extra_repr = _delegate("extra_repr")
    load_state_dict = _delegate("load_state_dict")
    requires_grad_ = _delegate("requires_grad_")
    state_dict = _delegate("state_dict")
    to = _delegate("to")
    train = _delegate("train")
    zero_grad = _delegate("zero_grad")

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield what the inner module yields, the wrapper in its own place.

        An inner module that FSDP manages is yielded itself: FSDP finds its modules this way.
        """
        owner = self._wrapped_owner()
        stand_in = owner if isinstance(owner, _torch.fsdp_types()) else self
        for name, module in owner.named_modules(memo, prefix, remove_duplicate):
            yield name, stand_in if module is owner else module

    def __repr__(self) -> str:
        inner = repr(self._checkpoint_wrapped_module)
        if "\n" in inner:
            inner = "\n" + textwrap.indent(inner, "  ") + "\n"
        return f"{type(self).__name__}[{self._wrapper_settings()}]({inner})"

    def _wrapper_settings(self) -> str:
        """What ``repr`` says about the wrapper itself."""
        return ""

    # --- Copies -------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A generated class cannot be found by its name. FSDP's are, on purpose, not made anew.
        made_from = vars(type(self)).get("_specialization", (type(self),))
        return _new_specialized, made_from, self.__getstate__()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Not super(): an inner class's own would write its defaults into the wrapper.
        nn.Module.__setstate__(self, state)
        # Pickle and deepcopy keep shared objects shared, unless the inner module's class copies
        # its containers itself. In a cycle the inner module may not have its state yet.
        if "_parameters" in vars(self._wrapped_owner()):
            self._link_wrapped()

    def _replicate_for_data_parallel(self) -> ActivationWrapper:
        replica: ActivationWrapper = nn.Module.__new__(type(self))
        replica.__dict__.update(self.__dict__)
        inner: Any = self._checkpoint_wrapped_module
        replica._checkpoint_wrapped_module = inner._replicate_for_data_parallel()
        return replica


def _containers_of(inner: nn.Module) -> nn.Module:
    """The inner module; its original where it is the product of torch.compile.

    ``_orig_mod`` would otherwise be a part of every name.
    """
    original = _torch.compiled_original(inner)
    return inner if original is None else original


def _read_parametrizations(module: nn.Module) -> None:
    """Let a module read weights that were parametrized through its wrapper.

    ``register_parametrization(wrapper, "weight", ...)`` deletes the weight from the containers
    that both share, but puts the property that computes it into the wrapper's class only.
    """
    cls: Any = type(module)

    def __getattr__(self: nn.Module, name: str) -> Any:
        parametrizations = self._modules.get("parametrizations")
        if isinstance(parametrizations, nn.ModuleDict) and name in parametrizations:
            return parametrizations[name]()
        return cls.__getattr__(self, name)

    body = {"__getattr__": __getattr__, "_reads_parametrizations": True}
    module.__class__ = type(cls.__name__, (cls,), body)


def _forget_parametrizations(module: nn.Module) -> None:
    """Undo :func:`_read_parametrizations`."""
    if "_reads_parametrizations" in vars(type(module)):
        module.__class__ = type(module).__bases__[0]


def is_parametrized(wrapper: ActivationWrapper) -> bool:
    """Whether a parametrization was registered on a wrapper, and so on its class."""
    return type(wrapper).__name__.startswith("Parametrized")


def require_module(mod: object) -> None:
    """Raise TypeError for what is not a module."""
    if not isinstance(mod, nn.Module):
        raise TypeError(f"expected an nn.Module to wrap, got {type(mod).__name__}: {mod!r:.80}")


def wrapper_layers(module: nn.Module) -> Iterator[ActivationWrapper]:
    """Yield the wrappers around a module, from the outside in."""
    while isinstance(module, ActivationWrapper):
        yield module
        module = module._checkpoint_wrapped_module


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers of this package; ``module`` where there are none."""
    for layer in wrapper_layers(module):
        module = layer._checkpoint_wrapped_module
    return module


# --- In place -----------------------------------------------------------------------------


class InPlaceForward(ABC):
    """Stands in ``module.__dict__["forward"]`` and calls the original forward as a region.

    Looks like the bound method it replaces: ``__self__``, ``__name__`` and the signature. Module
    and forward refer to each other, as with every forward that is set on an instance: the garbage
    collector frees them, not the reference count.

    Args:
        module: The module; :meth:`install` puts the object into its ``__dict__``.

    Attributes:
        previous: The instance-level forward that was there before; None where the class's was.
    """

    __name__ = "forward"

    def __init__(self, module: nn.Module) -> None:
        self.__self__ = module
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that was replaced; ``inspect.signature`` follows this name."""
        if self.previous is not None:
            return self.previous
        # Not a bound method, which not every torch.compile can make while it traces.
        return functools.partial(type(self.__self__).forward, self.__self__)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original forward as a region."""

    def install(self) -> None:
        """Replace the module's forward."""
        self.__self__.__dict__["forward"] = self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {type(self.__self__).__name__}>"


def in_place_layers(module: nn.Module) -> Iterator[InPlaceForward]:
    """Yield the in-place forwards of a module, from the outside in."""
    forward = module.__dict__.get("forward")
    while isinstance(forward, InPlaceForward):
        yield forward
        forward = forward.previous


def remove_in_place(module: nn.Module) -> int:
    """Give a module the forward back that it had; return how many regions were removed."""
    layers = list(in_place_layers(module))
    if layers:
        original = layers[-1].previous
        if original is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = original
    return len(layers)


def has_layer(module: nn.Module, kind: type | tuple[type, ...]) -> bool:
    """Whether a wrapper or an in-place forward of a module is of a kind; compiled or not."""
    for face in faces(module):
        if isinstance(face, kind) or any(isinstance(f, kind) for f in in_place_layers(face)):
            return True
    return False


def faces(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and what is inside: wrappers, torch's too, compiled modules, the plain one."""
    face: Any = module
    while face is not None:
        yield face
        if isinstance(face, ActivationWrapper) or _torch.is_torch_wrapper(face):
            face = face._checkpoint_wrapped_module
        else:
            face = _torch.compiled_original(face)


def is_fsdp_managed(module: nn.Module) -> bool:
    """Whether FSDP has taken over a module."""
    return isinstance(module, _torch.fsdp_types())


def plain_module(module: nn.Module) -> nn.Module:
    """Return the module that the user wrote: without wrappers, torch's too, and not compiled."""
    *_, plain = faces(module)
    return plain
