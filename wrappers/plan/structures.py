"""Which regions of a model are alike, and what each kind of them can keep.

Regions are alike where their classes, parameters, flags and arguments agree, and the plain
attributes of their modules. Where attributes differ, such as the number of a layer, the operators
decide: the region runs once on fake tensors, and regions with the same operators on the same shapes
are one structure. Its menu is made once, whatever the depth of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _torch
from wrappers.errors import WrapperError
from wrappers.plan.calls import Call, make_tensors, with_output
from wrappers.plan.fakes import Fakes
from wrappers.plan.harness import Costs, Harness, Run
from wrappers.plan.menu import MenuMaker, Recording, record
from wrappers.plan.records import Decision, Hardware, OperatorRow, Option, Structure


class Kind:
    """All calls of regions that are alike.

    Attributes:
        key: Hash of their operators.
        fqn: The first region.
        module: Its module, on fake tensors.
        call: The first call.
        recording: The operators.
        reason: Why it can only be left alone; empty if it can be recomputed.
    """

    def __init__(
        self, fqn: str, module: nn.Module, call: Call, harness: Harness, recording: Recording
    ) -> None:
        self.fqn = fqn
        self.module = module
        self.call = call
        self.recording = recording
        self.key = recording.key
        self.reason = ""
        self.plain = Run()
        self._harness = harness
        self._maker: MenuMaker | None = None

    def set_costs(self, costs: Costs, hardware: Hardware, *, max_options: int = 40) -> None:
        """Say how long operators take, and what the engine itself takes."""
        self.recording = record(self._harness, self.module, costs, self.fqn)
        self.plain = self._harness.run(is_plain=True, costs=costs)
        frame = self.recording.run.frame
        if not self.plain.has_backward or frame is None:
            self.reason = "no gradient flows through it"
            return
        self.reason = frame.region.experience.reason
        if not self.reason:
            self._maker = MenuMaker(
                self._harness,
                self.recording,
                hardware,
                max_options=max_options,
                offloads=hardware.d2h_bytes_per_s > 0 and hardware.h2d_bytes_per_s > 0,
            )

    def set_times(
        self,
        forward_us: float,
        backward_us: float,
        extra_us: Mapping[tuple[Decision, ...], float],
    ) -> None:
        """Say what was measured.

        Args:
            forward_us: A plain forward.
            backward_us: A plain backward.
            extra_us: By decisions: what a step takes longer with them than plainly.
        """
        self.plain.forward_us, self.plain.backward_us = forward_us, backward_us
        if self._maker is not None:
            self._maker.fit(extra_us)

    def refuse(self, reason: str) -> None:
        """Say why it must be left alone."""
        self.reason, self._maker = reason, None

    def examples(self) -> list[tuple[Decision, ...]]:
        """Ways to treat it that lie far apart: keep nothing, half, all that is needed."""
        if self._maker is None:
            return []
        return [(), self._maker.keep_longest(), self._maker.keep_all()]

    @property
    def is_fixed(self) -> bool:
        """Whether it can only be left alone."""
        return self._maker is None

    def plain_option(self) -> Option:
        """What it takes to leave it alone."""
        run = self.plain
        kept = run.kept_bytes if run.has_backward else 0
        return Option(None, kept, 0.0, run.forward_bytes, run.backward_bytes)

    def option(self, decisions: tuple[Decision, ...] | None) -> Option:
        """What it takes to treat it like this."""
        if decisions is None or self._maker is None:
            return self.plain_option()
        return self._maker.measure(decisions)

    @property
    def calls(self) -> dict[str, int]:
        """How often each operator is called in one forward."""
        return dict(Counter(str(call.func) for call in self.recording.calls))

    def structure(self) -> Structure:
        """Its menu and its operators."""
        options: tuple[Option, ...] = ()
        by_hand: dict[str, Option] = {}
        rows: tuple[OperatorRow, ...] = ()
        is_exact = True
        if self._maker is not None:
            options, is_exact = self._maker.options()
            rows = self._maker.rows()
            by_hand = self._maker.by_hand()
        return Structure(
            self.key,
            type(self.module).__name__,
            rows,
            len(self.recording.calls),
            self.plain.forward_us,
            self.plain.backward_us,
            (self.plain_option(), *options),
            is_exact,
            self.reason,
            by_hand=by_hand,
            calls=self.calls,
        )


class Structures:
    """Finds the kind of each call of a region.

    Args:
        fakes: Made the modules.
        modules: The regions' modules by FQN, whole and on fake tensors.
        costs: How long operators take.
        hardware: What the engine itself takes.
        has_gradients: Whether parameters have gradients when the step begins.
        max_options: Options of a menu at most.
    """

    def __init__(
        self,
        fakes: Fakes,
        modules: Mapping[str, nn.Module],
        costs: Costs,
        hardware: Hardware,
        *,
        has_gradients: bool = False,
        max_options: int = 40,
    ) -> None:
        self._fakes = fakes
        self.modules = modules
        self._costs = costs
        self._hardware = hardware
        self._has_gradients = has_gradients
        self._max_options = max_options
        self._looks: dict[str, str] = {}
        self._results: dict[Any, Call] = {}
        self._by_looks: dict[Any, Kind] = {}
        self.kinds: dict[str, Kind] = {}

    def describe(self, fqn: str, call: Call) -> Call:
        """The call with what the region returns."""
        key = self._key(fqn, call)
        if key not in self._results:
            self._results[key] = self._run(fqn, call)
        seen = self._results[key]
        return replace(
            call,
            outputs=seen.outputs,
            build_output=seen.build_output,
            passed_on=seen.passed_on,
        )

    def kind_of(self, fqn: str, call: Call) -> Kind:
        """The kind of a call, whose own inputs are known."""
        own = tuple(spec.is_own for spec in (*call.inputs, *call.outputs))
        key = (*self._key(fqn, call), own)
        if key not in self._by_looks:
            self._by_looks[key] = self._record(fqn, call)
        return self._by_looks[key]

    def _key(self, fqn: str, call: Call) -> tuple[Any, ...]:
        if fqn not in self._looks:
            self._looks[fqn] = looks_of(self.modules[fqn])
        return self._looks[fqn], *call.key()

    def _run(self, fqn: str, call: Call) -> Call:
        device = self._fakes.device
        try:
            with self._fakes.mode:
                made = make_tensors(call.inputs, device)
                inputs = [
                    t.detach().requires_grad_(spec.requires_grad)
                    for t, spec in zip(made, call.inputs, strict=True)
                ]
                with _saved_keys() as saved:
                    out = call.run(self.modules[fqn], inputs)
                return with_output(call, inputs, out, saved)
        except Exception as error:
            raise _failed(fqn, error) from error

    def _record(self, fqn: str, call: Call) -> Kind:
        module = self.modules[fqn]
        harness = Harness(
            self._fakes.mode,
            module,
            call,
            self._fakes.device,
            has_gradients=self._has_gradients,
        )
        try:
            recording = record(harness, module, self._costs, fqn)
            if recording.key not in self.kinds:
                kind = Kind(fqn, module, call, harness, recording)
                kind.set_costs(self._costs, self._hardware, max_options=self._max_options)
                self.kinds[recording.key] = kind
        except Exception as error:
            raise _failed(fqn, error) from error
        return self.kinds[recording.key]


@contextlib.contextmanager
def _saved_keys() -> Iterator[set[int | None]]:
    """Collect the keys of the memory that autograd saves within a ``with`` block."""
    keys: set[int | None] = set()

    def pack(tensor: Tensor) -> Tensor:
        keys.add(_torch.storage_key(tensor))
        return tensor.detach()  # Not itself: an output would hold its own graph.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield keys
    keys.discard(None)


def _failed(fqn: str, error: Exception) -> WrapperError:
    return WrapperError(
        f"region `{fqn}` does not run on tensors without memory ({type(error).__name__}: {error}). "
        "A profile needs sizes only: code that looks at values (`.item()`, `if tensor:`) has to "
        "stay outside of regions, or behind a flag.",
        fqn=fqn,
    )


#: Attributes of every module that say nothing about what it computes.
_UNTOLD = frozenset({"_parameters", "_buffers", "_modules", "training"})


def looks_of(module: nn.Module) -> str:
    """A hash of what a module consists of: equal for modules that compute alike."""
    lines = []
    for name, inside in module.named_modules():
        tensors = [*inside._parameters.items(), *inside._buffers.items()]
        lines.append(f"{name} {type(inside).__qualname__} {inside.training}")
        lines += [
            f"  {key} {tuple(t.shape)} {t.dtype} {t.requires_grad}"
            for key, t in tensors
            if t is not None
        ]
        own = {k: v for k, v in vars(inside).items() if k not in _UNTOLD}
        lines += [f"  {key} {_told(value)}" for key, value in own.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _told(value: Any) -> str:
    """An attribute as text: by value where it is plain, else by identity."""
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_told(k)}: {_told(v)}' for k, v in value.items())}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_told, value)))}}}"
    return f"{type(value).__qualname__} {id(value)}"
