"""The only file that touches private torch APIs; it says which version has what.

Everything here exists in torch 2.11 to 2.13 unless the comment beside it says otherwise. A
function that a version lacks gets a fallback here, so that no other file asks for versions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, _ops
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import _symbolic_trace
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _device, _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import SUPPORTED_NODES

__all__ = [
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "RecordingMode",
    "SavedTensor",
    "TorchDispatchMode",
    "make_saved_tensor",
    "pop_saved_tensors_hooks",
    "push_saved_tensors_hooks",
]

_C: Any = torch._C
_autograd: Any = _C._autograd

# --- Saved tensors ----------------------------------------------------------------------

#: ``push(pack, unpack)`` puts a pair on this thread's stack of saved-tensor hooks. The pair
#: of calls costs a third of ``torch.autograd.graph.saved_tensors_hooks``, which they serve.
push_saved_tensors_hooks: Callable[[Callable[[Tensor], Any], Callable[[Any], Tensor]], None] = (
    _autograd._push_saved_tensors_default_hooks
)
pop_saved_tensors_hooks: Callable[[], None] = _autograd._pop_saved_tensors_default_hooks


def pop_hooks_down_to(pack: Callable[[Tensor], Any]) -> list[tuple[Any, Any]]:
    """Pop pairs of saved-tensor hooks, the one with this pack hook last; return them."""
    popped = []
    while True:
        pair = _autograd._top_saved_tensors_default_hooks(True)
        pop_saved_tensors_hooks()
        popped.append(pair)
        if pair[0] is pack:
            return popped


def has_saved_tensors_hooks() -> bool:
    """Whether a pair of saved-tensor hooks is active in this thread."""
    return _autograd._top_saved_tensors_default_hooks(True) is not None


class SavedTensor(Protocol):
    """A tensor in autograd's keeping: it passes the active hooks and knows its version."""

    def unpack(self) -> Tensor:
        """Return the tensor; raise RuntimeError if it was changed in place since."""
        ...


class _SaveOne(torch.autograd.Function):
    """Does nothing but save its first argument; the second one makes it a graph node."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.new_empty(0)


class _NodeSavedTensor:
    """The SavedTensor of torch 2.11 and 2.12: a graph node of our own keeps the tensor."""

    __slots__ = ("_output",)

    def __init__(self, tensor: Tensor) -> None:
        with torch.enable_grad(), _disable_current_modes():
            anchor = torch.empty(0, requires_grad=True)
            # The output, not its grad_fn: the node lives in C++ only as long as it does.
            self._output = _SaveOne.apply(tensor, anchor)  # type: ignore[no-untyped-call]

    def unpack(self) -> Tensor:
        (tensor,) = self._output.grad_fn.saved_tensors
        return tensor  # type: ignore[no-any-return]


# torch._C._autograd._make_saved_tensor came with 2.13. Remove the fallback with 2.12.
#: Gives a tensor into autograd's keeping, as an operator that saves its input does.
make_saved_tensor: Callable[[Tensor], SavedTensor] = (
    functools.partial(_autograd._make_saved_tensor, is_output=False)
    if hasattr(_autograd, "_make_saved_tensor")
    else _NodeSavedTensor
)


def raw_saved_tensors(node: Any) -> Sequence[Any]:
    """The saved tensors of a custom Function's node; ``.data`` reads one without its checks."""
    return node._raw_saved_tensors  # type: ignore[no-any-return]


#: The number that this thread's next graph node gets.
next_sequence_number: Callable[[], int] = _autograd._get_sequence_nr


# --- Autograd's state -------------------------------------------------------------------

#: Sets this thread's grad mode; 15 times cheaper than the context manager.
set_grad_enabled: Callable[[bool], None] = _C._set_grad_enabled

#: The object that the active GraphExecGroup has put there, or None.
get_graph_exec_group: Callable[[], Any] = _C._get_graph_exec_group
set_graph_exec_group: Callable[[Any], None] = _C._set_graph_exec_group


def is_reentrant_backward_allowed() -> bool:
    """Whether the running backward is a plain one: no ``inputs=``, no ``autograd.grad``."""
    return bool(torch.autograd._is_checkpoint_valid())


def run_backward(roots: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Do ``torch.autograd.backward(roots, gradients)`` without its checks of gradients.

    They cost 14 us; gradients that the engine has handed to a node need no check.
    """
    _run_backward(
        tuple(roots),
        tuple(gradients),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


_run_backward: Any = torch.autograd.Variable._execution_engine.run_backward


def is_functorch_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) is running."""
    return _C._functorch.peek_interpreter_stack() is not None


_exclude_dispatch_key: Any = _C._dispatch_tls_set_dispatch_key_excluded
_is_dispatch_key_excluded: Any = _C._dispatch_tls_is_dispatch_key_excluded
_VIEW_TRACKING = _C.DispatchKey.ADInplaceOrView


def detach_in_handler(tensor: Tensor) -> Tensor:
    """Do :func:`detach_shallow` where a handler of a dispatch mode is known to run."""
    _exclude_dispatch_key(_VIEW_TRACKING, False)
    try:
        return tensor.detach()
    finally:
        _exclude_dispatch_key(_VIEW_TRACKING, True)


def detach_shallow(tensor: Tensor) -> Tensor:
    """Detach inside a dispatch mode, where views are not tracked: share the version counter."""
    if not _is_dispatch_key_excluded(_VIEW_TRACKING):
        return tensor.detach()
    _exclude_dispatch_key(_VIEW_TRACKING, False)
    try:
        return tensor.detach()
    finally:
        _exclude_dispatch_key(_VIEW_TRACKING, True)


def has_graph(tensor: Tensor) -> bool:
    """Whether a tensor holds a graph node; autograd raises for views that a write has spoilt."""
    try:
        return not tensor.is_leaf
    except RuntimeError:
        return True


def detach_hidden(tensor: Tensor) -> Tensor:
    """Detach where no dispatch mode sees it; inside of a mode too, the version is shared."""
    with disable_dispatch_modes():
        return detach_shallow(tensor)


def empty_host_cache() -> None:
    """Free the pinned memory that torch's allocator keeps; public in 2.13 only."""
    public = getattr(torch.accelerator, "empty_host_cache", None)
    empty = public or getattr(_C, "_host_emptyCache", None)  # None in some builds for CPUs
    if empty is not None and torch.accelerator.is_available():
        empty()


# --- State that a recompute must see again ----------------------------------------------

_SDPA_SWITCHES = ("flash", "mem_efficient", "math", "cudnn", "overrideable")
_flash, _mem_efficient, _math, _cudnn, _overrideable = (
    getattr(_C, f"_get_{name}_sdp_enabled") for name in _SDPA_SWITCHES
)
_set_sdpa_switches = [getattr(_C, f"_set_sdp_use_{name}") for name in _SDPA_SWITCHES]
_get_default_dtype = torch.get_default_dtype
_get_deterministic = _C._get_deterministic_algorithms
_get_warn_only = _C._get_deterministic_algorithms_warn_only
_get_priority = _C._get_sdp_priority_order
_is_any_autocast_enabled = _C._is_any_autocast_enabled


def _default_device() -> torch.device | None:
    """The device of the innermost mode that sets one; ``with torch.device`` sets no global."""
    for mode in reversed(torch.overrides._get_current_function_mode_stack()):
        if isinstance(mode, _device.DeviceContext):
            return mode.device
    return None


def settings() -> tuple[bool, torch.device | None, tuple[Any, ...]]:
    """Take the settings outside of a region that change what its operators do.

    Returns:
        Whether autocast is on for any device type; the device of the innermost
        ``with torch.device(...)`` or of set_default_device; and what :func:`set_kernels` takes:
        default dtype, deterministic flag, SDPA switches and their priority.
    """
    return (
        _is_any_autocast_enabled(),
        _default_device() if has_function_modes() else None,
        (
            _get_default_dtype(),
            _get_deterministic(),
            _get_warn_only(),
            _flash(),
            _mem_efficient(),
            _math(),
            _cudnn(),
            _overrideable(),
            _get_priority(),
        ),
    )


def set_kernels(kernels: tuple[Any, ...]) -> None:
    """Set the ``kernels`` field of :func:`settings`."""
    dtype, deterministic, warn_only, *switches, priority = kernels
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    for set_switch, enabled in zip(_set_sdpa_switches, switches, strict=True):
        set_switch(enabled)
    _C._set_sdp_priority_order(priority)


#: The number of dispatch modes on this thread's stack; 0 is falsy.
has_dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack


#: The number of function modes on this thread's stack; 0 is falsy.
has_function_modes: Callable[[], int] = _C._len_torch_function_stack


def disable_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """Hide all dispatch modes: what runs under it is not the region's own work."""
    if not (_C._len_torch_dispatch_stack() or _ops._len_torch_dispatch_stack_pre_dispatch()):
        return _NO_MODES  # Almost always, and ten times as fast.
    return _disable_current_modes()


_NO_MODES = contextlib.nullcontext()


def version(tensor: Tensor) -> int:
    """A tensor's version counter; 0 for those born in inference mode, which have none."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


# --- Containers -------------------------------------------------------------------------


def pytree_node(
    kind: type,
) -> tuple[Callable[[Any], tuple[list[Any], Any]], Callable[[Any, Any], Any]] | None:
    """The (flatten, unflatten) pair that torch's pytree has registered for a type, if any."""
    node = SUPPORTED_NODES.get(kind)
    return None if node is None else (node.flatten_fn, node.unflatten_fn)


def is_same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors look at the same memory, wherever in it they begin."""
    try:
        return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors, for one, have no storage
        return a is b


def version_counter(tensor: Tensor) -> Tensor:
    """A tensor with the version counter of another one, and without its memory."""
    counter = detach_shallow(tensor)
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return counter


def storage_key(tensor: Tensor) -> int | None:
    """A number for the memory that a tensor looks into, its own while the memory lives."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and nested tensors
        return None


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of the memory that a tensor looks into; 0 where it has none of its own."""
    try:
        return tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # sparse and nested tensors
        return 0


def is_dense(tensor: Tensor) -> bool:
    """Whether a copy of a tensor on another device has the same strides."""
    is_plain = type(tensor) is Tensor and tensor.layout is torch.strided
    return is_plain and torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


class Place(NamedTuple):
    """Where in its memory a strided tensor lies."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    is_conj: bool
    is_neg: bool


def place_of(tensor: Tensor) -> Place | None:
    """Where in its memory a tensor lies; None for one that is more than strided memory."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return None
    if tensor.is_nested or tensor.is_quantized:
        return None
    return Place(
        tensor.dtype,
        tensor.size(),
        tensor.stride(),
        int(tensor.storage_offset()),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def copy_storage(tensor: Tensor) -> Tensor:
    """Copy all memory that a tensor looks into; a tensor without storage is cloned."""
    with disable_dispatch_modes(), torch.no_grad():
        if place_of(tensor) is None:
            return tensor.detach().clone()
        copied = tensor.untyped_storage().clone()
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(copied)


def tensor_at(memory: Tensor, place: Place | None) -> Tensor:
    """A tensor at a place in the memory of another one."""
    if place is None:
        return memory
    with disable_dispatch_modes(), torch.no_grad():
        empty = torch.empty(0, dtype=place.dtype, device=memory.device)
        tensor = empty.set_(memory.untyped_storage(), place.offset, place.size, place.stride)
        tensor = torch._neg_view(tensor) if place.is_neg else tensor
        return tensor.conj() if place.is_conj else tensor


def as_strided_at(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes a view like this tensor of one with the same memory."""
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
    return lambda base: base.as_strided(size, stride, offset)


# --- Subclasses around other tensors ----------------------------------------------------


def inner_tensors(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors that a subclass such as DTensor is made of, with their names."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return []
    parts = [(name, getattr(tensor, name)) for name in flatten()[0]]
    # In torch 2.13 a DTensor's mesh is among them, which is no tensor.
    return [(name, part) for name, part in parts if isinstance(part, Tensor)]


#: Inner tensors of a jagged tensor whose identity tells its ragged size from others.
JAGGED_IDENTITY = frozenset({"_offsets", "_lengths"})


def inner_getter(name: str) -> Callable[[Tensor], Tensor]:
    """What takes a tensor of a name out of a subclass."""
    return operator.attrgetter(name)


def subclass_builder(tensor: Tensor) -> Callable[..., Tensor]:
    """What makes a subclass like this one around other tensors."""
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    cls, size, stride = type(tensor), tensor.size(), tensor.stride()
    constants = {name: getattr(tensor, name) for name in names}
    constants = {name: part for name, part in constants.items() if not isinstance(part, Tensor)}
    names = [name for name in names if name not in constants]

    def build(*inner: Tensor) -> Tensor:
        parts = constants | dict(zip(names, inner, strict=True))
        return cls.__tensor_unflatten__(parts, context, size, stride)  # type: ignore[no-any-return, attr-defined]

    return build


# --- Modules ----------------------------------------------------------------------------

#: The base of batch and instance norm, whose kernels write statistics without a new version.
NormWithStatistics = torch.nn.modules.batchnorm._NormBase


# --- Other parts of torch that know about wrapped modules -------------------------------


def fsdp_types() -> tuple[type, ...]:
    """The classes of FSDP-managed modules; empty while nobody has imported FSDP."""
    if "torch.distributed.fsdp" not in sys.modules:
        return ()
    return _fsdp_types()


@functools.cache
def _fsdp_types() -> tuple[type, ...]:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return (FSDPModule, FullyShardedDataParallel)


def share_fsdp_state(module: torch.nn.Module, wrapper: torch.nn.Module) -> None:
    """Let FSDP know a wrapper as the module inside, if it manages that one.

    A parent's FSDP walks children and would otherwise shard the parameters a second time.
    """
    if isinstance(module, fsdp_types()):
        from torch.distributed import _composable_state as states

        state = states._get_module_state(module)
        if state is not None:
            states._module_state_mapping[wrapper] = weakref.ref(state)


def is_in_fsdp_backward(module: torch.nn.Module) -> bool:
    """Whether FSDP2 is between the start of a module's backward and the end of the root's."""
    get_state: Any = getattr(module, "_get_fsdp_state", None)  # FSDP1 modules have none
    return get_state is not None and get_state()._training_state.name == "PRE_BACKWARD"


_Class = TypeVar("_Class", bound=type)


def register_as_torch_wrapper(cls: _Class) -> _Class:
    """Let ``isinstance(x, torch's ActivationWrapper)`` hold for a class of ours.

    FSDP1 unwraps its child by that test. Does nothing in a torch without distributed.
    """
    if torch.distributed.is_available():
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

        ActivationWrapper.register(cls)
    return cls


def is_torch_wrapper(module: object) -> bool:
    """Whether a module is wrapped by torch's own checkpoint_wrapper or offload_wrapper."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as theirs

    # Not ActivationWrapper: our own classes are registered there.
    return isinstance(module, (theirs.CheckpointWrapper, theirs.OffloadWrapper))


def is_fx_tracing() -> bool:
    """Whether ``torch.fx.symbolic_trace`` is running. Its own function of this name logs."""
    return _symbolic_trace._is_fx_tracing_flag and not torch.compiler.is_compiling()


def is_operator(op: object) -> bool:
    """Whether an object is an operator that a dispatch mode can see: an overload, not a packet."""
    return isinstance(op, (OpOverload, HigherOrderOperator))


def operator_named(name: str) -> OpOverload:
    """The operator of a name such as ``aten::mm`` or ``aten::add.Tensor``."""
    packet_name, _, overload = name.partition(".")
    namespace, _, packet_name = packet_name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), packet_name)
    return getattr(packet, overload or "default")  # type: ignore[no-any-return]


def operator_call(op: Any) -> Callable[..., Any]:
    """What calls an operator: without the Python half of an overload's own call."""
    return op._op if isinstance(op, OpOverload) else op


#: Operators whose results come from other ranks: each rank must run them, or none.
_COLLECTIVES = frozenset({"_c10d_functional", "c10d_functional", "c10d", "_dtensor"})


def is_collective(op: Any) -> bool:
    """Whether an operator communicates with other ranks."""
    return getattr(op, "namespace", "") in _COLLECTIVES


def is_composite(op: OpOverload) -> bool:
    """Whether an operator is made of others, so that its schema may be silent about views."""
    has_kernel: Any = _C._dispatch_has_kernel_for_dispatch_key
    return bool(has_kernel(op.name(), "CompositeImplicitAutograd"))


def hide_from_compiler(*functions: Callable[..., Any] | type) -> None:
    """Keep torch.compile from tracing functions of ours, and what they call, in eager code.

    It does trace whatever Python runs in the eager parts of a compiled function: our hooks too.

    Args:
        *functions: Functions, with those defined inside; a class stands for all its methods.
    """
    eval_frame = _C._dynamo.eval_frame
    skip = eval_frame._FrameAction.SKIP
    for function in functions:
        if isinstance(function, type):
            hide_from_compiler(*(f for f in vars(function).values() if isinstance(f, FunctionType)))
            continue
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


class RecordingMode(TorchDispatchMode):
    """A dispatch mode whose handler the compiler needs no protection from: it runs no code of
    the user's, and torch's wrapper around it would cost time in every operator.

    It is entered once. So it does not need the lists of flags that torch's class keeps for nested
    entries of one object, and sets the three flags itself.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        self._flags: tuple[bool, bool, bool]

    def __enter__(self) -> RecordingMode:
        state: Any = _python_dispatch
        self._flags = (
            state._is_in_torch_dispatch_mode,
            state._is_in_non_infra_torch_dispatch_mode,
            state._is_in_any_mode_without_ignore_compile_internals,
        )
        self._set_flags(True, True, True)
        _C._push_on_torch_dispatch_stack(self)
        return self

    def __exit__(self, *error: object) -> None:
        _C._pop_torch_dispatch_stack(None)
        self._set_flags(*self._flags)

    @staticmethod
    def _set_flags(is_in: bool, is_in_non_infra: bool, is_in_without_ignore: bool) -> None:
        state: Any = _python_dispatch
        state._is_in_torch_dispatch_mode = is_in
        state._is_in_non_infra_torch_dispatch_mode = is_in_non_infra
        state._is_in_any_mode_without_ignore_compile_internals = is_in_without_ignore
        state.set_is_in_mode_without_ignore_compile_internals(is_in_without_ignore)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def operator_overloads(packet: OpOverloadPacket) -> Sequence[OpOverload]:
    """All overloads of an operator packet such as ``torch.ops.aten.mm``."""
    return [getattr(packet, name) for name in packet.overloads()]


def compiled_original(module: object) -> torch.nn.Module | None:
    """The module that ``torch.compile(module)`` was made from; None for any other module.

    ``OptimizedModule`` keeps it as its only child, ``_orig_mod``, and so puts that name into
    every FQN and state-dict key below it.
    """
    if "torch._dynamo.eval_frame" not in sys.modules:
        return None
    from torch._dynamo.eval_frame import OptimizedModule

    # Not getattr: OptimizedModule's own lookup needs state that unpickling has not set yet.
    return module.__dict__["_modules"].get("_orig_mod") if type(module) is OptimizedModule else None


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether calls of a module run compiled code: ``torch.compile(m)`` and ``m.compile()``."""
    return module._compiled_call_impl is not None or compiled_original(module) is not None


def is_wrap_policy(policy: object) -> bool:
    """Whether an object is one of FSDP's policy objects: ModuleWrapPolicy, CustomPolicy, ..."""
    if "torch.distributed.fsdp.wrap" not in sys.modules:
        return False
    from torch.distributed.fsdp.wrap import _Policy

    return isinstance(policy, _Policy)


def run_wrap_policy(policy: Any, root: torch.nn.Module) -> dict[torch.nn.Module, dict[str, Any]]:
    """The modules that a policy object of FSDP chooses, each with its keyword arguments."""
    return policy._run_policy(root, ignored_modules=set(), root_kwargs={})  # type: ignore[no-any-return]


def set_version(tensor: Tensor, version: int) -> None:
    """Set the counter of in-place changes of a tensor that nobody else has seen yet."""
    _autograd._unsafe_set_version_counter((tensor,), (version,))


# --- Results of collectives ---------------------------------------------------------------------


def waited_for(tensor: Tensor) -> Tensor:
    """The result of a functional collective once it is there; any other tensor as it is.

    An AsyncCollectiveTensor waits when an operator reads it, and has nothing in it before.
    """
    module = sys.modules.get("torch.distributed._functional_collectives")
    if module is None or not isinstance(tensor, module.AsyncCollectiveTensor):
        return tensor
    waited: Tensor = tensor.trigger_wait()
    return waited


# --- What DDP and FSDP do around a region, or in it --------------------------------------------


def gathers_in_forward(module: torch.nn.Module) -> bool:
    """Whether FSDP1 manages a module. It gathers in the forward, FSDP2 in hooks around it."""
    return bool(fsdp_types()) and isinstance(module, fsdp_types()[1])


def prefetch_inside_only(module: torch.nn.Module) -> Callable[[], None]:
    """Let FSDP2 modules below a module gather ahead for each other only; returns what undoes it.

    FSDP2 takes a rerun in backward for a forward, and gathers for the modules that it was told to
    prefetch there. Those behind the region have had their backward: nobody would use it.
    """
    managed: list[Any] = [m for m in module.modules() if isinstance(m, fsdp_types()[:1])]
    states = [m._get_fsdp_state() for m in managed]
    told = [(state, state._states_to_forward_prefetch) for state in states]
    for state, targets in told:
        state._states_to_forward_prefetch = [target for target in targets if target in states]

    def undo() -> None:
        for state, targets in told:
            state._states_to_forward_prefetch = targets

    return undo


def walks_graph_for_unused(module: object) -> bool:
    """Whether DDP looks after each forward which parameters its output depends on."""
    return (
        isinstance(module, DistributedDataParallel)
        and module.find_unused_parameters
        and not module.static_graph
    )


def is_in_ddp_that_walks_graph() -> bool:
    """Whether a forward of such a DDP is running."""
    return walks_graph_for_unused(DistributedDataParallel._active_ddp_module)


# --- Process groups ---------------------------------------------------------------------


def num_process_groups() -> int:
    """How many groups this process is in; torch puts the number into the names of some new ones."""
    from torch.distributed import distributed_c10d

    return len(distributed_c10d._world.pg_names)


# --- Memory without a device ------------------------------------------------------------


def key_of_storage(storage: torch.UntypedStorage) -> int:
    """A number for memory, its own while the memory lives."""
    return int(storage._cdata)


def watch_resizes(note: Callable[[torch.UntypedStorage, int], None]) -> Callable[[], None]:
    """Call ``note(storage, bytes before)`` after each ``resize_`` of a storage, as FSDP does it.

    Returns:
        What ends it.
    """
    outer = vars(torch.UntypedStorage).get("resize_")
    resize = torch.UntypedStorage.resize_

    def watched(self: torch.UntypedStorage, size: Any) -> Any:
        before = self.nbytes()
        out = resize(self, size)
        note(self, before)
        return out

    torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]

    def stop() -> None:
        if outer is None:  # It is inherited.
            del torch.UntypedStorage.resize_
        else:
            torch.UntypedStorage.resize_ = outer  # type: ignore[method-assign]

    return stop


#: The operator behind ``tensor.item()``.
number_of_tensor: OpOverload = torch.ops.aten._local_scalar_dense.default


def fake_mode() -> Any:
    """A mode under which tensors have sizes and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no memory."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


# --- What the running torch has of all this -----------------------------------------------------

#: The versions of torch that everything here is known to exist in, oldest and newest.
KNOWN_VERSIONS = ((2, 11), (2, 13))


class PrivateApi(NamedTuple):
    """A private name of torch that this file looks up late, so that a torch may lack it.

    Attributes:
        name: Where it stands.
        purpose: What needs it.
        fallback: What does the same where it is not there; empty: nothing does.
    """

    name: str
    purpose: str
    fallback: str = ""


#: Without any other name that stands in this file, the package cannot be imported at all.
PRIVATE_APIS = (
    PrivateApi(
        "torch._C._autograd._make_saved_tensor",
        "keeping a region's inputs",
        "a graph node of our own that saves them",
    ),
    PrivateApi(
        "torch.accelerator.empty_host_cache",
        "giving pinned memory back to the machine",
        "torch._C._host_emptyCache, if this build has it",
    ),
    PrivateApi("torch._C._functorch.peek_interpreter_stack", "regions under torch.func"),
    PrivateApi(
        "torch._C._dynamo.eval_frame.set_code_exec_strategy", "regions beside torch.compile"
    ),
    PrivateApi("torch._functorch.config.activation_memory_budget", "the compiler's own recompute"),
    PrivateApi("torch.distributed.fsdp.FSDPModule._get_fsdp_state", "regions below FSDP2"),
    PrivateApi("torch.distributed.fsdp.wrap._Policy", "auto_wrap_policy objects"),
    PrivateApi("torch.distributed._composable_state._get_module_state", "wrappers around FSDP2"),
    PrivateApi(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper",
        "telling torch's own wrappers",
    ),
    PrivateApi(
        "torch.distributed._functional_collectives.AsyncCollectiveTensor",
        "results of collectives in a region",
    ),
    PrivateApi("torch.distributed.distributed_c10d._world", "names of process groups"),
    PrivateApi("torch.nn.parallel.DistributedDataParallel._active_ddp_module", "regions below DDP"),
)


def has_api(name: str) -> bool:
    """Whether the running torch has what stands under a dotted name; imports its module."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def fake_tensor_log() -> logging.Logger:
    """Where torch writes a traceback for each operator that fails on tensors without memory."""
    return logging.getLogger("torch._subclasses.fake_tensor")


def compile_memory_budget() -> float:
    """The fraction of activations that torch.compile keeps, by its own setting; 1 by default."""
    from torch._functorch import config

    return float(getattr(config, "activation_memory_budget", 1.0))


class ShardedUnit(NamedTuple):
    """A module whose parameters FSDP2 shards together, and how.

    Attributes:
        module: The module.
        reshards: Whether its parameters are freed between forward and backward.
        is_automatic: Whether FSDP decides about that.
        policy: The MixedPrecisionPolicy.
        shape: Of its mesh of ranks.
    """

    module: torch.nn.Module
    reshards: bool
    is_automatic: bool
    policy: Any
    shape: tuple[int, ...]


def sharded_units(model: torch.nn.Module) -> list[ShardedUnit]:
    """What FSDP2 shards in a model, inner modules first."""
    found = []
    for module in model.modules():
        get_state: Any = getattr(module, "_get_fsdp_state", None)
        group = None if get_state is None else get_state()._fsdp_param_group
        if group is None:
            continue
        reshards = group.post_forward_mesh_info is not None
        is_automatic = bool(get_state()._auto_reshard_after_forward)
        shape = tuple(group.mesh_info.mesh.shape)
        found.append(ShardedUnit(module, reshards, is_automatic, group.mp_policy, shape))
    return found[::-1]


@contextlib.contextmanager
def unsharded_classes(model: torch.nn.Module) -> Iterator[None]:
    """Take FSDP2's classes and hooks off modules for a while, so that they can be copied."""
    sharded = [m for m in model.modules() if hasattr(m, "_get_fsdp_state")]
    if not sharded:
        yield
        return
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    undo: list[Callable[[], object]] = []
    try:
        for module in sharded:
            cls = type(module)
            undo.append(functools.partial(setattr, module, "__class__", cls))
            module.__class__ = cls.__bases__[1]
            for key in (STATE_KEY, REGISTRY_KEY):
                if key in module.__dict__:
                    undo.append(functools.partial(module.__dict__.update, {key: vars(module)[key]}))
                    del module.__dict__[key]
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                before = dict(hooks)
                undo.append(functools.partial(hooks.update, before))
                undo.append(hooks.clear)
                for key, hook in before.items():
                    owner = getattr(hook, "__self__", None)
                    if type(owner).__module__.startswith("torch.distributed.fsdp"):
                        del hooks[key]
        yield
    finally:
        for call in reversed(undo):
            call()


@contextlib.contextmanager
def fake_mesh(shape: tuple[int, ...]) -> Iterator[Any]:
    """A mesh of ranks that are not there: collectives on it do nothing.

    Where a default process group exists, each of its ranks is in a mesh of its neighbours. A rank
    that does not come here keeps nobody waiting, and later groups have the same names everywhere.

    Raises:
        ValueError: The ranks of that group cannot be told apart into meshes of this shape.
    """
    import torch.testing._internal.distributed.fake_pg as fake_pg
    from torch import distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    world_size = math.prod(shape)
    if dist.is_initialized():
        if dist.get_world_size() % world_size:
            raise ValueError(
                f"a plan for {world_size} ranks cannot be made in a process group of "
                f"{dist.get_world_size()}: make it where there is none, or in one of a multiple"
            )
        first = dist.get_rank() // world_size * world_size
        ranks = torch.arange(first, first + world_size, device="cpu").view(shape)
        lines = _lines_through(ranks, dist.get_rank())
        groups: Any = [
            dist.new_group(line.tolist(), backend="fake", use_local_synchronization=True)
            for line in lines
        ]
        names = tuple(f"dim{i}" for i in range(len(shape)))
        mine = groups if len(shape) > 1 else groups[0]
        try:
            yield DeviceMesh.from_group(mine, "cpu", mesh=ranks, mesh_dim_names=names)
        finally:
            for group in groups:
                dist.destroy_process_group(group)
        return
    store = fake_pg.FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=world_size)
    try:
        yield init_device_mesh("cpu", shape)
    finally:
        dist.destroy_process_group()


def _lines_through(ranks: Tensor, rank: int) -> list[Tensor]:
    """By dimension of a mesh: the ranks that differ from one in this dimension alone."""
    place = [int(index) for index in (ranks == rank).nonzero()[0]]
    return [
        ranks[tuple(slice(None) if d == dim else i for d, i in enumerate(place))]
        for dim in range(ranks.dim())
    ]
