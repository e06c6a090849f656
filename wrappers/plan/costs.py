"""How long one call of an operator takes: derived from shapes, or looked up in what was measured.

A call moves bytes and computes. Both run at once, so the slower of the two decides:

    time = launch + max(flops / rate, elements * element cost, bytes / bandwidth) + fresh / touching

* FLOPs are those of products, attention and convolutions, as torch's own counter has them; the
  rate falls with the shortest side ``s`` of the product, by ``s / (s + half side)``.
* An element costs something of its own where computing it takes longer than moving it: random
  numbers, ``exp``, a reduction across rows.
* Bytes are what the arguments and results hold: an expanded dimension counts once, a tensor that is
  given twice too, and of a table from which rows are taken only these.
* A view takes no time.

Everything is read off shapes, strides and data types, so fake and meta tensors do.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from statistics import median
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from wrappers import _device, _torch, _tree
from wrappers.engine.operators import facts_of
from wrappers.plan.records import Hardware

__all__ = ["Measured", "Roofline", "Stopwatch", "TimingMode", "class_of", "signature"]

aten = torch.ops.aten

# --- Classes of operators


def _named(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


#: Operators that compute with each element for long, such as by a series.
_TRANSCENDENTAL = _named(
    "gelu gelu_backward silu silu_ silu_backward mish mish_backward elu elu_backward softplus "
    "softplus_backward log_sigmoid_forward log_sigmoid_backward sigmoid sigmoid_ sigmoid_backward "
    "tanh tanh_ tanh_backward exp exp_ exp2 expm1 log log2 log10 log1p erf erfc erfinv sin cos tan "
    "asin acos atan atan2 sinh cosh pow logaddexp logit hardswish hardswish_backward "
    "_log_softmax_backward_data"
)
_SOFTMAX = _named("_softmax _safe_softmax _log_softmax _softmax_backward_data logsumexp")
_NORM = _named(
    "native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward "
    "native_batch_norm native_batch_norm_backward _fused_rms_norm _fused_rms_norm_backward "
    "cudnn_batch_norm cudnn_batch_norm_backward _native_batch_norm_legit"
)
_REDUCTION = _named(
    "sum mean amax amin max min argmax argmin var var_mean std std_mean prod norm "
    "linalg_vector_norm cumsum cumprod any all topk sort"
)
_COPY = _named("clone copy_ copy _to_copy contiguous cat stack constant_pad_nd repeat roll flip")
_RANDOM = _named(
    "bernoulli bernoulli_ native_dropout dropout rand rand_like randn randn_like randint "
    "randint_like normal_ uniform_ random_ exponential_ multinomial randperm"
)
#: Operators that take some elements of their first argument.
_GATHER = _named("embedding index index_select gather take")

_CLASSES = {
    "transcendental": _TRANSCENDENTAL,
    "softmax": _SOFTMAX,
    "norm": _NORM,
    "reduction": _REDUCTION,
    "copy": _COPY,
    "random": _RANDOM,
    "gather": _GATHER,
}

_PLAIN_PRODUCTS = {"aten.bmm": "bmm", "aten.baddbmm": "bmm"}


def packet_name(func: Any) -> str:
    """The name of an operator without its overload, such as ``aten.mm``."""
    return str(getattr(func, "overloadpacket", func))


def class_of(func: Any) -> str:
    """The class of an operator: what its time depends on.

    Returns:
        ``"matmul"``, ``"bmm"``, ``"attention"``, ``"attention_backward"``, ``"convolution"`` for
        what has FLOPs; else ``"transcendental"``, ``"softmax"``, ``"norm"``, ``"reduction"``,
        ``"copy"``, ``"random"``, ``"gather"``, or ``"pointwise"`` for all others.
    """
    return _class_of(packet_name(func), _formula_of(func) is not None)


@functools.cache
def _class_of(name: str, has_flops: bool) -> str:
    if has_flops:
        if "attention" in name:
            return "attention_backward" if "backward" in name else "attention"
        return "convolution" if "conv" in name else _PLAIN_PRODUCTS.get(name, "matmul")
    return next((kind for kind, names in _CLASSES.items() if name in names), "pointwise")


# --- FLOPs

Formula = Callable[..., int]


def _formula_of(func: Any) -> Formula | None:
    packet = getattr(func, "overloadpacket", func)
    return flop_registry.get(packet) or _OWN_FORMULAS.get(packet_name(func))


def _attention_flops(num_products: int) -> Formula:
    """Of attention whose tensors lie as (batch, heads, sequence, width)."""

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        query, key, value = tensors[:3] if num_products == 2 else tensors[1:4]
        batch, heads, num_queries, width = query.shape
        both = width + value.shape[-1]
        return num_products * batch * heads * num_queries * key.shape[-2] * both

    return formula


def _linear_flops(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * input.numel() * weight.shape[0]


def _matrix_vector_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * max(arg.numel() for arg in args if isinstance(arg, Tensor))


def _addbmm_flops(input: Tensor, first: Tensor, second: Tensor, **kwargs: Any) -> int:
    return 2 * first.numel() * second.shape[-1]


#: What torch's counter has no formula for.
_OWN_FORMULAS: dict[str, Formula] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention_flops(2),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_flops(5),
    "aten._scaled_dot_product_fused_attention_overrideable": _attention_flops(2),
    "aten._scaled_dot_product_fused_attention_overrideable_backward": _attention_flops(5),
    "aten.linear": _linear_flops,
    "aten.addbmm": _addbmm_flops,
    "aten._addmm_activation": _addbmm_flops,
    "aten.mv": _matrix_vector_flops,
    "aten.addmv": _matrix_vector_flops,
    "aten.dot": _matrix_vector_flops,
    "aten.vdot": _matrix_vector_flops,
}


def num_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of a product, attention or convolution; 0 for all else.

    Equal to what ``torch.utils.flop_counter`` counts, where that has a formula; like there, a
    causal mask saves nothing. The fused attention of CPUs, which it lacks, counts likewise.
    """
    formula = _formula_of(func)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


# --- Bytes


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, where dimensions that repeat the same elements count once."""
    try:
        strides = tensor.stride()
    except RuntimeError:  # sparse and nested tensors
        return int(tensor.numel() * tensor.element_size())
    sides = (n for n, stride in zip(tensor.shape, strides, strict=True) if stride or not n)
    return int(math.prod(sides) * tensor.element_size())


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _tensors_in(*values: Any) -> list[Tensor]:
    return _distinct(v for v in _tree.flatten(values)[0] if isinstance(v, Tensor))


def read_and_written(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> tuple[int, int]:
    """Bytes that a call reads and bytes that it writes; a view moves none."""
    facts = facts_of(func)
    if facts.is_view or facts.is_query or facts.is_uninitialized:
        return 0, 0
    inputs, outputs = _tensors_in(args, kwargs), _tensors_in(out)
    overwritten = [] if facts.reads_what_it_writes else facts.written(args, kwargs)
    written = sum(map(distinct_bytes, outputs))
    if class_of(func) == "gather" and inputs:
        return written + sum(map(distinct_bytes, inputs[1:])), written
    hidden = {id(tensor) for tensor in overwritten}
    return sum(distinct_bytes(t) for t in inputs if id(t) not in hidden), written


# --- The roofline


class Roofline:
    """Times of operators from a description of the device; nothing runs.

    Args:
        hardware: The device.
    """

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware

    def flops(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        """See :func:`num_flops`."""
        return num_flops(func, args, kwargs, out)

    def time_us(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
        """How long a call takes, in microseconds.

        Args:
            func: The operator.
            args: Its arguments; real, fake or meta tensors among them.
            kwargs: Its keyword arguments.
            out: What it has returned.
        """
        facts, hardware = facts_of(func), self.hardware
        if facts.is_view or facts.is_query:
            return 0.0
        if facts.is_uninitialized:
            return hardware.launch_us
        read, written = read_and_written(func, args, kwargs, out)
        moving = (read + written) / hardware.memory_bytes_per_s
        flops = num_flops(func, args, kwargs, out)
        computing = (
            self._product_s(func, flops, args, kwargs)
            if flops
            else self._elements_s(func, args, kwargs, out)
        )
        return hardware.launch_us + 1e6 * (max(computing, moving) + self._touching_s(facts, out))

    def _product_s(
        self, func: Any, flops: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float:
        hardware, kind = self.hardware, class_of(func)
        tensors = _tensors_in(args, kwargs)
        rate = self._rate(tensors[-1].dtype) * hardware.efficiency.get(kind, 1.0)
        half = hardware.half_sides.get(kind, 0.0)
        if kind.startswith("attention"):
            query, key = _query_and_key(func, args, kwargs)
            # Other tensors among the arguments, such as random seeds, are of other types.
            rate = self._rate(query.dtype) * hardware.efficiency.get(kind, 1.0)
            seen = _causal_share(func, args, kwargs, key.shape[-2], hardware.attention_block)
            width = query.shape[-1]
            return seen * flops / rate * (width + half) / width
        matrices = [t for t in tensors if t.dim() >= 2][-2:]
        side = min((min(t.shape[-2:]) for t in matrices), default=1) if half else 1
        return flops / rate * (side + half) / max(side, 1)

    def _rate(self, dtype: torch.dtype) -> float:
        """FLOPs a second of products of a data type; of another one if it is not known."""
        rates = self.hardware.matmul_flops
        name = str(dtype).removeprefix("torch.")
        if name == "float32" and torch.get_float32_matmul_precision() != "highest":
            name = "tf32" if "tf32" in rates else name
        if name not in rates and dtype.itemsize == 2:
            name = "bfloat16" if "bfloat16" in rates else name
        if name in rates:
            return rates[name]
        return rates.get("float32", min(rates.values())) * min(1.0, 4 / dtype.itemsize)

    def _elements_s(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> float:
        costs, kind = self.hardware.element_ns, class_of(func)
        inputs = _tensors_in(args, kwargs)
        if kind == "copy":  # Each input costs what reading it in its own order does.
            return 1e-9 * sum(costs.get(_kind_of_copy(t), 0.0) * t.numel() for t in inputs)
        cost = costs.get(packet_name(func), costs.get(kind, 0.0))
        if not cost:
            return 0.0
        tensors = _tensors_in(out) if kind == "gather" else [*inputs, *_tensors_in(out)]
        return cost * 1e-9 * max((tensor.numel() for tensor in tensors), default=0)

    def _touching_s(self, facts: Any, out: Any) -> float:
        hardware = self.hardware
        if not hardware.fresh_bytes_per_s or facts.writes:
            return 0.0
        sizes = map(distinct_bytes, _tensors_in(out))
        fresh = sum(size for size in sizes if size >= hardware.fresh_min_bytes)
        return fresh / hardware.fresh_bytes_per_s


def _kind_of_copy(source: Tensor) -> str:
    """Copies by what they read: ``"transpose"`` where neighbours are apart, ``"copy"`` where rows
    are, ``"pointwise"`` where nothing is."""
    if _is_contiguous(source):
        return "pointwise"
    return "copy" if source.dim() and source.stride(-1) == 1 else "transpose"


def _argument(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument of a name, given by position or by name; None if it was not given."""
    if name in kwargs:
        return kwargs[name]
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name and position < len(args):
            return args[position]
    return None


def _query_and_key(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    query, key = (_argument(func, name, args, kwargs) for name in ("query", "key"))
    return query, key


def _causal_share(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], num_keys: int, block: int
) -> float:
    """What a causal mask leaves to compute, in blocks of keys."""
    if not _argument(func, "is_causal", args, kwargs):
        return 1.0
    return min(1.0, (1 + block / num_keys) / 2)


# --- What was measured


def signature(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What tells calls apart whose times may differ; can be a key.

    The operator, and of each argument: a tensor's shape, data type, and its strides where it is not
    contiguous; numbers, texts and lists as they are; of anything else the type.
    """
    named = sorted(kwargs.items())
    return (str(func), tuple(map(_trait, args)), tuple((key, _trait(v)) for key, v in named))


def _trait(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), _layout(value))
    if isinstance(value, (list, tuple)):
        return tuple(map(_trait, value))
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return str(value) if isinstance(value, (torch.dtype, torch.layout)) else type(value).__name__


def _layout(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a tensor that is not contiguous."""
    try:
        return None if tensor.is_contiguous() else tensor.stride()
    except RuntimeError:  # sparse and nested tensors
        return ()


def _is_contiguous(tensor: Tensor) -> bool:
    return _layout(tensor) is None


class Measured:
    """Times of operators that have run, by :func:`signature`; a roofline for all others.

    Args:
        fallback: What is asked about calls that were not measured.

    Attributes:
        times_us: All times of each signature.
    """

    def __init__(self, fallback: Roofline) -> None:
        self.fallback = fallback
        self.times_us: dict[tuple[Any, ...], list[float]] = {}
        self._medians: dict[tuple[Any, ...], float] = {}

    @property
    def hardware(self) -> Hardware:
        """The device of the fallback."""
        return self.fallback.hardware

    def add(self, key: tuple[Any, ...], time_us: float) -> None:
        """Note one more time of a signature."""
        self.times_us.setdefault(key, []).append(time_us)
        self._medians.pop(key, None)

    def flops(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        """See :func:`num_flops`."""
        return num_flops(func, args, kwargs, out)

    def time_us(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
        """The median of what was measured for such a call; see :meth:`Roofline.time_us`."""
        key = signature(func, args, kwargs)
        times = self.times_us.get(key)
        if times is None:
            return self.fallback.time_us(func, args, kwargs, out)
        if key not in self._medians:
            self._medians[key] = median(times)
        return self._medians[key]


def host_clock() -> Callable[[], int]:
    """A clock of nanoseconds for work on the host.

    That of this thread, which other processes do not disturb; where operators have threads of
    their own, the wall's.
    """
    return time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns


class Stopwatch:
    """Times work on a device.

    Args:
        device: Waiting for it is part of the time where it works on its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clock = host_clock() if _device.is_host_type(device) else time.perf_counter_ns

    def time_us(self, work: Callable[[], object], times: int = 1) -> float:
        """Microseconds of a piece of work, as the mean over ``times`` in a row."""
        _device.wait_for(self.device)
        start = self._clock()
        for _ in range(times):
            work()
        _device.wait_for(self.device)
        return (self._clock() - start) / 1e3 / times


class TimingMode(_torch.TorchDispatchMode):
    """Times every operator of a real run, forward and backward, into a :class:`Measured`.

    On an accelerator by events, which are read when the mode is left; on the CPU by a clock around
    the call. Views are not timed: they take no time in the sums that these times are for.

    Args:
        measured: Where the times go.
        device: Where the operators run; the default is the accelerator, or the CPU.
    """

    def __init__(self, measured: Measured, device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.measured = measured
        self.device = _device.default_device() if device is None else device
        self._is_host = _device.is_host_type(self.device)
        self._clock = host_clock()
        self._events: list[tuple[tuple[Any, ...], torch.Event, torch.Event]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        facts = facts_of(func)
        if facts.is_view or facts.is_query:
            return func(*args, **kwargs)
        key = signature(func, args, kwargs)  # before: the call may change what it is given
        if not self._is_host:
            stream = _device.current_stream(self.device)
            start = _device.record_event(stream, is_timed=True)
            out = func(*args, **kwargs)
            self._events.append((key, start, _device.record_event(stream, is_timed=True)))
            return out
        clock = self._clock
        start_ns = clock()
        out = func(*args, **kwargs)
        self.measured.add(key, (clock() - start_ns) / 1e3)
        return out

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        if self._events:
            _device.wait_for(self.device)
        for key, start, end in self._events:
            self.measured.add(key, 1e3 * start.elapsed_time(end))
        self._events.clear()
