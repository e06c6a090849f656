"""Look over an installation and a model for what keeps this package from working well.

Problem: most of what goes wrong with activation memory is decided outside of this package: a torch
that lacks something, a library that recomputes on its own, a setting of an allocator. None of it
raises, or it raises far from where it was set.

Idea: ask for each of these things, and answer in rows of four: what was looked at, whether it is
as it should be, what was found, and what to do. A ``problem`` costs memory, time or correctness as
it is; a ``note`` is worth knowing, and may be meant.

Nothing is changed. Only the bandwidth of copies is measured, in memory that is let go of again.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from wrappers import _device, _knobs, _torch
from wrappers.engine import region
from wrappers.modules.base import faces, in_place_layers, is_fsdp_managed, plain_module
from wrappers.modules.checkpoint import (
    CheckpointForward,
    CheckpointWrapper,
    is_torch_checkpoint,
)
from wrappers.modules.offload import OffloadForward, OffloadWrapper
from wrappers.offload.pool import available_host_bytes
from wrappers.offload.transfer import AcceleratorTransport, Transport, current_transport
from wrappers.plan import hardware
from wrappers.plan.show import Table, size
from wrappers.policy import CheckpointImpl
from wrappers.report import region_report
from wrappers.select import repeated_blocks

__all__ = ["EXTRAS", "Diagnosis", "Finding", "doctor"]

Status = Literal["ok", "note", "problem"]

#: What a copy measures with, and how many of them.
_COPY_BYTES = 64 * 1024 * 1024
_NUM_COPIES = 8

#: So many processes a core that want to run make a machine busy.
_BUSY_LOAD = 1.5

#: The optional parts of the package: what each brings, and what it is for.
EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "plan": (("scipy",), "memory budgets"),
    "cli": (("rich",), "tables with lines and colours, progress"),
    "plot": (("matplotlib",), "pictures of plans"),
    "accelerate": (("accelerate",), "wrappers.integrations.accelerate"),
    "transformers": (("transformers",), "wrappers.integrations.transformers"),
    "lightning": (("lightning",), "wrappers.integrations.lightning"),
    "peft": (("peft",), "adapters in models of transformers"),
    "state": (("safetensors",), "state checkpoints in safetensors' layout"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is, such as ``"torch"`` or ``"copies cuda:0"``.
        status: ``"ok"``, ``"note"`` or ``"problem"``.
        what: What was found.
        remedy: What to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`wrappers.doctor` has found; ``print`` shows a table.

    Attributes:
        rows: In the order in which they were looked at.
    """

    rows: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What needs doing."""
        return tuple(row for row in self.rows if row.status == "problem")

    def __getitem__(self, name: str) -> Finding:
        """The first row of a name.

        Raises:
            KeyError: There is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def table(self) -> Table:
        """The rows as a table, with the remedies below."""
        cells = [(row.name, row.status, row.what) for row in self.rows]
        remedies = [f"{row.name}: {row.remedy}" for row in self.rows if row.remedy]
        title = f"{len(self.problems) or 'no'} problem{'s' * (len(self.problems) != 1)} found"
        return Table(title, ("", "", "found"), cells, remedies)

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()


def doctor(model: nn.Module | None = None) -> Diagnosis:
    """Look for what keeps this package from working well, here and in a model.

    Args:
        model: A model to look through, too; it is not changed and not run.

    Returns:
        A row for each thing that was looked at, with a remedy where there is one: torch and what
        of its private parts it has, devices, bandwidth of copies, pinned memory, extras,
        calibration, settings that interfere; and of the model what recomputes in it already.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> print(doctor(model))
        >>> assert not doctor(model).problems
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module to look through, got {type(model).__name__}")
    rows = [row for look in _ENVIRONMENT for row in look()]
    if model is not None:
        rows += [row for look_at in _MODEL for row in look_at(model)]
    return Diagnosis(tuple(rows))


# --- Torch ----------------------------------------------------------------------------------


def _torch_version() -> Iterator[Finding]:
    oldest, newest = ((".".join(map(str, v))) for v in _torch.KNOWN_VERSIONS)
    running = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    text = f"torch {torch.__version__}"
    if running < _torch.KNOWN_VERSIONS[0]:
        yield Finding("torch", "problem", f"{text} is too old", f"install torch {oldest} or newer")
    elif running > _torch.KNOWN_VERSIONS[1]:
        what = f"{text} is newer than what this version of wrappers knows ({oldest} to {newest})"
        yield Finding("torch", "note", what, "look for a newer activation-wrappers")
    else:
        yield Finding("torch", "ok", text)


def _private_apis() -> Iterator[Finding]:
    apis = [
        api
        for api in _torch.PRIVATE_APIS
        if torch.distributed.is_available() or "distributed" not in api.name.lower()
    ]
    missing = [api for api in apis if not _torch.has_api(api.name)]
    what = f"{len(apis) - len(missing)} of {len(apis)} that may be missing are there"
    yield Finding("private APIs of torch", "ok", what)
    for api in missing:
        what = f"torch {torch.__version__} has no {api.name}, for {api.purpose}"
        if api.fallback:
            yield Finding("private APIs of torch", "note", f"{what}; in its place: {api.fallback}")
            continue
        oldest, newest = ((".".join(map(str, v))) for v in _torch.KNOWN_VERSIONS)
        remedy = f"install torch {oldest} to {newest}, or a newer activation-wrappers"
        yield Finding("private APIs of torch", "problem", what, remedy)


# --- Devices --------------------------------------------------------------------------------


def _accelerators() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    return [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())]


def _devices() -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    what = f"{cores} cores, {torch.get_num_threads()} threads, "
    yield Finding("host", "ok", f"{what}{size(available_host_bytes())} available")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY_LOAD * cores:
        what = f"{load:.1f} processes want to run on {cores} cores: measured times will vary"
        yield Finding("host", "note", what, "profile and calibrate on a machine that is idle")
    accelerators = _accelerators()
    if not accelerators:
        what = "none: everything runs on the CPU, and only the disk tier can offload"
        yield Finding("accelerator", "note", what)
    for device in accelerators:
        total = _device.own_memory_bytes(device)
        what = str(_device.own_name(device))
        free = getattr(torch.get_device_module(device), "mem_get_info", None)
        if total is not None:
            what += f", {size(total)}"
        if free is not None:
            what += f", {size(free(device)[0])} free"
        yield Finding(f"device {device}", "ok", what)


def _copies() -> Iterator[Finding]:
    transport = current_transport()
    if transport is None:
        return
    is_real = isinstance(transport, AcceleratorTransport)
    for device in _accelerators() if is_real else [torch.device("cpu")]:
        name = f"copies {device}" if is_real else "copies of the simulated device"
        try:
            d2h, h2d = copy_bandwidth(transport, device)
        except (MemoryError, RuntimeError) as error:
            what = f"could not be measured: {' '.join(str(error).split()):.200}"
            remedy = f"have {size(_COPY_BYTES)} free on the device and as pinned memory"
            yield Finding(name, "problem", what, remedy)
            continue
        what = f"D2H {d2h / 1e9:.1f} GB/s, H2D {h2d / 1e9:.1f} GB/s, from and to pinned memory"
        yield Finding(name, "ok", what)


def copy_bandwidth(transport: Transport, device: torch.device) -> tuple[float, float]:
    """Measure copies of one large tensor; blocks.

    Args:
        transport: What copies.
        device: Where the tensor is.

    Returns:
        Bytes a second to the host (D2H) and to the device (H2D), one direction at a time.

    Raises:
        MemoryError: There is no pinned memory left.
        RuntimeError: There is no memory left on the device.
    """
    with _device.use_device(device):
        on_device = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
        on_host = transport.empty_host(_COPY_BYTES, is_pinned=True)
        compute = transport.current_stream(device)
        rates = []
        for name, target, source in (("D2H", on_host, on_device), ("H2D", on_device, on_host)):
            stream = transport.new_stream(device, name)
            transport.wait(stream, transport.record(compute))
            transport.copy(target, source, stream)  # The first one pays for what others reuse.
            transport.synchronize(transport.record(stream))
            start_s = time.perf_counter()
            for _ in range(_NUM_COPIES):
                transport.copy(target, source, stream)
            transport.synchronize(transport.record(stream))
            elapsed_s = time.perf_counter() - start_s
            rates.append(_NUM_COPIES * _COPY_BYTES / elapsed_s)
    return rates[0], rates[1]


def _pinned_memory() -> Iterator[Finding]:
    available = available_host_bytes()
    limit = min(_knobs.OFFLOAD_PINNED_BYTES, available * _knobs.OFFLOAD_PINNED_PERCENT // 100)
    what = (
        f"offloading takes at most {size(limit)} of the {size(available)} that are available now "
        f"(wrappers._knobs.OFFLOAD_PINNED_PERCENT = {_knobs.OFFLOAD_PINNED_PERCENT})"
    )
    yield Finding("pinned memory", "ok", what)


def _calibration() -> Iterator[Finding]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stored = hardware.load()
    remedy = "run wrappers.calibrate() once"
    if stored is not None:
        yield Finding("calibration", "ok", f"stored in {hardware.cache_file()}")
    elif caught:
        yield Finding("calibration", "problem", str(caught[0].message), remedy)
    else:
        what = f"none for this device ({hardware.device_key()}): times are a data sheet's"
        yield Finding("calibration", "note", what, remedy)


# --- What is installed and set --------------------------------------------------------------


def _extras() -> Iterator[Finding]:
    for extra, (packages, purpose) in EXTRAS.items():
        found = {package: _version_of(package) for package in packages}
        name = f"extra {extra}"
        if missing := [package for package, version in found.items() if version is None]:
            what = f"{', '.join(missing)} not installed, for {purpose}"
            remedy = f"pip install 'activation-wrappers[{extra}]', if you need it"
            yield Finding(name, "note", what, remedy)
        else:
            versions = ", ".join(f"{package} {version}" for package, version in found.items())
            yield Finding(name, "ok", f"{versions}, for {purpose}")


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _allocator() -> Iterator[Finding]:
    # The second name is the newer one, for all accelerators.
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    settings = {name: os.environ[name] for name in names if os.environ.get(name)}
    name = "allocator"
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        what = "PYTORCH_NO_CUDA_MEMORY_CACHING is set: each tensor is allocated by the driver"
        yield Finding(name, "problem", what, "unset it: a recompute allocates much")
    if not settings:
        is_needed = bool(_accelerators())
        remedy = "set PYTORCH_ALLOC_CONF=expandable_segments:True if memory fragments"
        what = "PYTORCH_ALLOC_CONF is not set"
        yield Finding(name, "note" if is_needed else "ok", what, remedy if is_needed else "")
        return
    if len(set(settings.values())) > 1:
        what = " and ".join(f"{key}={value}" for key, value in settings.items())
        yield Finding(name, "problem", f"{what} contradict each other", f"unset {names[0]}")
    for key, value in settings.items():
        yield Finding(name, "ok", f"{key}={value}")


def _compiler() -> Iterator[Finding]:
    budget = _torch.compile_memory_budget()
    if budget != 1.0:
        yield Finding(
            "torch.compile's budget",
            "problem",
            f"torch._functorch.config.activation_memory_budget is {budget}: compiled code "
            "recomputes on its own, within our regions and beside them",
            "set it to 1.0 and plan with memory_budget=, or leave compiled modules to the compiler",
        )
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    is_disabled = os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES") == "1"
    if folder and not is_disabled:
        yield Finding(
            "compile cache",
            "note",
            f"TORCHINDUCTOR_CACHE_DIR={folder}: compiled code of earlier runs is used again, so "
            "the time of a first step says nothing about compiling",
            "set TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 where that time is compared",
        )


def _switches() -> Iterator[Finding]:
    """Global states that reach into every region."""
    found = [
        (
            region._early_stop is False,
            "set_checkpoint_early_stop(False) is active: every rerun runs to its end",
            "leave its `with` block, unless the whole rerun is wanted",
        ),
        (
            region._debug is True,
            "set_checkpoint_debug_enabled(True) is active: every region records a trace",
            "leave its `with` block when the error is found",
        ),
        (
            torch.is_anomaly_enabled(),
            "autograd's anomaly mode is on: it keeps a stack trace of every operator",
            "torch.autograd.set_detect_anomaly(False)",
        ),
        (
            _torch.has_saved_tensors_hooks(),
            "saved-tensor hooks are active around this call, such as save_on_cpu's: outside of "
            "regions they decide what is kept",
            "leave their `with` block, or use offload_wrapper",
        ),
        (
            not torch.is_grad_enabled(),
            "gradients are off in this thread: no region does anything",
            "leave torch.no_grad() before the training step",
        ),
    ]
    rows = [Finding("switches", "note", what, remedy) for is_on, what, remedy in found if is_on]
    yield from rows or [Finding("switches", "ok", "nothing global is set that changes regions")]


_ENVIRONMENT: tuple[Callable[[], Iterator[Finding]], ...] = (
    _torch_version,
    _private_apis,
    _devices,
    _copies,
    _pinned_memory,
    _calibration,
    _extras,
    _allocator,
    _compiler,
    _switches,
)

# --- A model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A module of a model, with what stands around it.

    Attributes:
        fqn: As in the unwrapped model.
        outer: What stands there: the module itself, a wrapper around it, its compiled form.
        is_inside: Whether it lies in a checkpointed region.
    """

    fqn: str
    outer: nn.Module
    is_inside: bool

    @property
    def module(self) -> nn.Module:
        return plain_module(self.outer)

    def layers(self) -> list[object]:
        """Wrappers of ours and of torch's, and forwards in place, from the outside in."""
        return [*faces(self.outer), *in_place_layers(self.module)]

    def num_checkpointing(self) -> int:
        """How many times its activations are checkpointed."""
        own = (CheckpointWrapper, CheckpointForward)
        return sum(
            isinstance(layer, own) or (isinstance(layer, nn.Module) and is_torch_checkpoint(layer))
            for layer in self.layers()
        )

    def num_offloading(self) -> int:
        """How many times its activations are offloaded by us."""
        return sum(isinstance(layer, OffloadWrapper | OffloadForward) for layer in self.layers())


def _places(model: nn.Module) -> Iterator[_Place]:
    seen: set[nn.Module] = set()
    stack = [_Place("", model, False)]
    while stack:
        place = stack.pop()
        module = place.module
        if module in seen:
            continue
        seen.add(module)
        yield place
        prefix = f"{place.fqn}." if place.fqn else ""
        is_inside = place.is_inside or place.num_checkpointing() > 0
        children = [
            _Place(prefix + name, outer, is_inside)
            for name, outer in module._modules.items()
            if outer is not None
        ]
        stack.extend(reversed(children))


def _named(fqns: list[str]) -> str:
    first = f"`{fqns[0]}`" if fqns[0] else "the root"
    return f"{first} and {len(fqns) - 1} more" if len(fqns) > 1 else first


def _blocks(model: nn.Module) -> Iterator[Finding]:
    try:
        chosen = repeated_blocks().bind(model)
    except ValueError as error:
        what, _, remedy = str(error).partition(" Say ")
        yield Finding("blocks", "note", what, f"say {remedy}")
        return
    found = [place for place in _places(model) if chosen(place.module)]
    name = type(found[0].module).__name__
    what = f"what repeats: {len(found)} modules of class {name}, the first is `{found[0].fqn}`"
    yield Finding("blocks", "ok", what)


def _regions(model: nn.Module) -> Iterator[Finding]:
    rows = region_report(model).rows
    if not rows:
        yield Finding("regions", "ok", "nothing is checkpointed by wrappers")
        return
    counts = Counter(row.impl.name for row in rows)
    what = ", ".join(f"{count} {impl}" for impl, count in counts.items())
    yield Finding("regions", "ok", f"checkpointed: {what}")
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            by_reason.setdefault(row.reason, []).append(row.fqn)
    for reason, fqns in by_reason.items():
        what = f"{_named(fqns)}: not replayed but rerun: {reason}"
        yield Finding("regions", "note", what, "a policy or a plan has no effect there")
    reentrant = [row.fqn for row in rows if row.impl is CheckpointImpl.REENTRANT]
    if reentrant:
        what = f"{_named(reentrant)}: REENTRANT, so parameters get gradients only if an input does"
        yield Finding("regions", "note", what, "take another impl, unless REENTRANT is needed")


def _wrapped_twice(model: nn.Module) -> Iterator[Finding]:
    twice, nested = [], []
    for place in _places(model):
        num_checkpointing = place.num_checkpointing()
        if num_checkpointing > 1 or place.num_offloading() > 1:
            twice.append(place.fqn)
        elif num_checkpointing and place.is_inside:
            nested.append(place.fqn)
    if twice:
        remedy = "remove_activation_checkpointing(model), then apply once"
        what = f"{_named(twice)}: two wrappers of the same kind, so recomputed or copied twice"
        yield Finding("wrapped twice", "problem", what, remedy)
    if nested:
        what = f"{_named(nested)}: in another region, and recomputed once more for it"
        remedy = "choose the outer modules or the inner ones, unless memory needs both"
        yield Finding("region in a region", "note", what, remedy)


def _torchs_wrappers(model: nn.Module) -> Iterator[Finding]:
    found = [p.fqn for p in _places(model) if any(map(_torch.is_torch_wrapper, p.layers()))]
    if found:
        yield Finding(
            "torch's wrappers",
            "problem",
            f"{_named(found)}: wrapped by torch's checkpoint_wrapper or offload_wrapper, which put "
            "their prefix into names and which no plan can replace",
            "apply wrappers.apply_activation_checkpointing in the place of torch's",
        )


def _transformers(model: nn.Module) -> Iterator[Finding]:
    places = list(_places(model))
    is_on = [p for p in places if getattr(p.module, "gradient_checkpointing", False) is True]
    if is_on:
        yield Finding(
            "transformers",
            "problem",
            f"{_named([p.fqn for p in is_on])}: transformers' own gradient checkpointing is on, "
            "and regions below would be recomputed twice",
            "model.gradient_checkpointing_disable(), and gradient_checkpointing=False in the "
            "TrainingArguments",
        )
    is_wrapped = any(place.num_checkpointing() for place in places)
    for place in places if is_wrapped else ():
        config = getattr(place.module, "config", None)
        can_checkpoint = hasattr(place.module, "gradient_checkpointing_enable")
        if can_checkpoint and getattr(config, "use_cache", False) is True:
            what = "config.use_cache is on: in training, a recompute writes keys and values again"
            yield Finding("transformers", "problem", what, "model.config.use_cache = False")
            break


def _compiled(model: nn.Module) -> Iterator[Finding]:
    found = [
        place.fqn
        for place in _places(model)
        if any(_torch.is_compiled(face) for face in faces(place.outer))
    ]
    if found:
        yield Finding(
            "torch.compile",
            "note",
            f"{_named(found)}: compiled; regions inside are left to the compiler, and compiled "
            "code inside of a region is rerun, not replayed",
            "compile after wrapping, and plan on the model that is not compiled",
        )


def _sharded_inside(model: nn.Module) -> Iterator[Finding]:
    found = [p.fqn for p in _places(model) if p.is_inside and is_fsdp_managed(p.module)]
    if found:
        yield Finding(
            "FSDP",
            "note",
            f"{_named(found)}: sharded on its own inside of a region, which is rerun, not "
            "replayed, and gathers its parameters once more",
            "wrap and shard the same modules",
        )


_MODEL: tuple[Callable[[nn.Module], Iterator[Finding]], ...] = (
    _blocks,
    _regions,
    _wrapped_twice,
    _torchs_wrappers,
    _transformers,
    _compiled,
    _sharded_inside,
)
