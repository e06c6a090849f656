"""A plan: what is kept, recomputed and offloaded in each region, and what is expected of it.

Problem: a plan outlives the process that made it. It is saved, sent to other ranks, and applied to
a model that was built anew, sharded, compiled; or to another model, by mistake.

Idea: a plan is plain data. It knows regions by their names in the plain model and by the class that
stood there, and operators by name and number. What it is applied to is looked through first: only
if every region is found, is of its class and is not wrapped yet, wrapping begins.

Invariant: ``apply`` either wraps every region that the plan names, or leaves the model as it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wrappers import _torch
from wrappers.apply import ApplyReport, apply_activation_checkpointing
from wrappers.errors import WrapperError
from wrappers.modules.base import (
    ActivationWrapper,
    InPlaceForward,
    faces,
    has_layer,
    is_fsdp_managed,
    plain_module,
    require_module,
)
from wrappers.modules.checkpoint import checkpoint_wrapper
from wrappers.plan import plot, schema, show
from wrappers.plan.menu import policy_of
from wrappers.plan.names import Place, beside, class_matches, places, plain_name
from wrappers.plan.parts import VERSION, Measured, PlanData
from wrappers.plan.records import Profile
from wrappers.policy import CheckpointImpl

__all__ = ["Comparison", "Plan", "PlanMismatchError"]

_LEFT_ALONE = "the plan leaves it alone"


#: How many names an error lists.
_MAX_NAMES = 8


class PlanMismatchError(WrapperError):
    """A plan does not fit the model it was applied to; nothing was wrapped.

    Attributes:
        missing: Regions of the plan that the model does not have.
        unplanned: Modules of the regions' classes that the plan does not know.
        other_class: Regions that are of another class: (class in the plan, class in the model).
        wrapped: Modules that are wrapped or checkpointed already.
    """

    def __init__(
        self,
        message: str,
        *,
        fqn: str = "",
        missing: tuple[str, ...] = (),
        unplanned: tuple[str, ...] = (),
        other_class: Mapping[str, tuple[str, str]] | None = None,
        wrapped: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, fqn=fqn)
        self.missing = missing
        self.unplanned = unplanned
        self.other_class = dict(other_class or {})
        self.wrapped = wrapped


@dataclass(frozen=True)
class Plan(PlanData):
    """A memory budget and what to do with each region so that the step fits into it.

    ``print(plan)`` shows it as a table.
    """

    def apply(
        self,
        model: nn.Module,
        *,
        inplace: bool = False,
        strict: bool = False,
        verify: str = "never",
    ) -> ApplyReport:
        """Wrap the regions of a model as planned.

        The model may have been sharded, put into DDP or compiled since the plan was made. A
        region that FSDP2 manages or that is compiled is wrapped in place in any case: outside of
        it a wrapper could not be replayed.

        Args:
            model: Root of the tree; changed in place.
            inplace: Replace the forwards of the modules instead of wrapping them.
            strict: Raise where a region runs other operators than the plan knows, instead of
                recomputing all of it with a warning.
            verify: Whether a region's first replay is compared with a rerun: ``"first"``,
                ``"always"`` or ``"never"``. A rerun takes memory that is not in the plan.

        Returns:
            The names of what was wrapped; regions that are left alone are among the skipped.

        Raises:
            PlanMismatchError: The model is another one, or a part of it is wrapped already.
            TypeError: ``model`` is not a module.
        """
        require_module(model)
        found = places(model)
        _refuse_other_model(self, found)
        _refuse_wrapped(found.values())
        regions = {found[plain_name(r.fqn)].module: r for r in self.regions if r.is_wrapped}
        skipped = {region.fqn: _LEFT_ALONE for region in self.regions if not region.is_wrapped}
        if not regions:
            return ApplyReport((), skipped)
        inplace = inplace or any(_only_in_place(p) for p in found.values() if p.module in regions)

        def wrap(target: nn.Module, **settings: Any) -> nn.Module:
            region = regions[plain_module(target)]
            policy = policy_of(region.decisions or (), region.counts, is_strict=strict)
            return checkpoint_wrapper(target, policy=policy, **settings)

        report = apply_activation_checkpointing(
            model,
            wrap,
            regions.__contains__,
            inplace=inplace,
            impl=CheckpointImpl.REPLAY,
            verify=verify,
        )
        return ApplyReport(report.wrapped, {**report.skipped, **skipped})

    @property
    def hash(self) -> str:
        """SHA-256 of the plan as canonical JSON: equal for equal plans, on every machine."""
        return schema.digest(schema.dump(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, which is replaced as a whole.

        Raises:
            OSError: The file cannot be written; what was there before stays.
        """
        schema.replace_file(path, schema.dump(self, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            FormatError: It is not a plan of this version; the error says where and why.
            OSError: The file cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_bytes())
        except schema.FormatError as error:
            raise schema.FormatError(error.path, f"{error.what} (in {os.fspath(path)})") from None

    def to_json(self) -> str:
        """The plan as canonical JSON."""
        return schema.dump(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan that a JSON text stands for.

        Raises:
            FormatError: It is not a plan of this version.
        """
        data = schema.load(text)
        version = data.get("version") if isinstance(data, dict) else None
        if type(version) is int and version != VERSION:
            raise schema.FormatError(
                "$.version",
                f"the plan has format {version}, this package reads format {VERSION}: make the "
                "plan again, or install the package that made it",
            )
        plan = schema.read(cls, data)
        _check_names(plan)
        return plan

    def compare(self, measured: Measured) -> Comparison:
        """Hold the plan's predictions against a step that was measured."""
        return Comparison(self, measured)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw memory over one step, and peak against step time.

        Args:
            path: Ends in ``.png``, ``.svg`` or ``.html``.

        Raises:
            ValueError: It ends in something else.
            ImportError: matplotlib is not installed.
        """
        plot.draw(self, path)

    def report(self) -> show.Report:
        """The plan as tables."""
        return show.plan_report(self)

    def why(self, profile: Profile) -> show.Report:
        """What is alive at the planned step's peak, storage by storage, and where the peak lies.

        Args:
            profile: What the plan was made of.
        """
        return show.why(profile, self)

    def __str__(self) -> str:
        return str(self.report())

    def __rich__(self) -> Any:
        return self.report().__rich__()

    def __repr__(self) -> str:
        counted = self.peak_bytes - self.uncounted_bytes
        return (
            f"<Plan for {self.model_class}: {self.num_wrapped} of {len(self.regions)} regions "
            f"wrapped, peak {show.size(counted)} of {show.size(self.budget_bytes)}, "
            f"{self.ratio:.3f} of the plain step>"
        )


def _check_names(plan: Plan) -> None:
    """What types cannot say: names of regions are unique, the budget counts something known."""
    seen = set()
    for i, region in enumerate(plan.regions):
        if region.fqn in seen:
            raise schema.FormatError(f"$.regions[{i}].fqn", f"{region.fqn} is there twice")
        seen.add(region.fqn)
    if plan.counts not in ("all", "activations"):
        raise schema.FormatError(
            "$.counts", f"expected 'all' or 'activations', got {plan.counts!r:.80}"
        )


# --- Apply ----------------------------------------------------------------------------------


def _only_in_place(place: Place) -> bool:
    is_compiled = any(_torch.compiled_original(face) is not None for face in faces(place.outer))
    return is_compiled or is_fsdp_managed(place.module)


def _refuse_other_model(plan: Plan, found: Mapping[str, Place]) -> None:
    """Raise if the plan was made for another model."""
    names = {plain_name(region.fqn): region for region in plan.regions}
    missing = tuple(r.fqn for name, r in names.items() if not name or name not in found)
    here = {name: region for name, region in names.items() if name and name in found}
    other_class = {
        region.fqn: (region.class_name, type(found[name].module).__name__)
        for name, region in here.items()
        if not class_matches(found[name].module, region.class_name)
    }
    unplanned: tuple[str, ...] = ()
    if plan.left_out is not None:
        modules = {found[name].module for name in here}
        known = set(map(plain_name, plan.left_out))
        others = beside(found.values(), modules, {r.class_name for r in plan.regions})
        unplanned = tuple(name for name in others if name not in known)
    if not (missing or other_class or unplanned):
        return
    lines = [f"the plan is for another model ({plan.model_class}); nothing was wrapped"]
    if missing:
        lines.append(f"planned, but not in the model: {_listed(missing)}")
    if unplanned:
        lines.append(f"in the model, but not planned: {_listed(unplanned)}")
    if other_class:
        texts = [f"{fqn} ({had} planned, {got} there)" for fqn, (had, got) in other_class.items()]
        lines.append(f"of another class: {_listed(texts)}")
    lines.append("make a plan for this model: make_plan(profile(model, sample), memory_budget)")
    raise PlanMismatchError(
        "\n  ".join(lines),
        fqn=(*missing, *unplanned, *other_class)[0],
        missing=missing,
        unplanned=unplanned,
        other_class=other_class,
    )


def _refuse_wrapped(found: Iterable[Place]) -> None:
    """Raise if activations are recomputed or offloaded somewhere already."""
    wrapped, by_transformers = [], []
    for place in found:
        is_ours = has_layer(place.outer, (ActivationWrapper, InPlaceForward))
        if is_ours or any(map(_torch.is_torch_wrapper, faces(place.outer))):
            wrapped.append(place.name)
        if getattr(place.module, "gradient_checkpointing", False) is True:
            by_transformers.append(place.name)
    for names, what, remedy in (
        (wrapped, "are wrapped already", "call remove_activation_checkpointing(model) before"),
        (
            by_transformers,
            "have transformers' own gradient checkpointing on",
            "call model.gradient_checkpointing_disable() before",
        ),
    ):
        if names:
            raise PlanMismatchError(
                f"the plan is for a model without activation checkpointing; nothing was wrapped. "
                f"Modules that {what}: {_listed(n or '(the root)' for n in names)}; {remedy}",
                fqn=names[0],
                wrapped=tuple(names),
            )


def _listed(names: Iterable[str]) -> str:
    all_names = list(names)
    shown = ", ".join(all_names[:_MAX_NAMES])
    more = len(all_names) - _MAX_NAMES
    return f"{shown}, and {more} more" if more > 0 else shown


# --- Compare --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A plan's predictions beside a measured step; ``print`` shows a table.

    Attributes:
        plan: The plan.
        measured: The step.
    """

    plan: Plan
    measured: Measured

    #: Errors below which there is nothing to do, of the peak and of the step time.
    PEAK_TOLERANCE = 0.02
    TIME_TOLERANCE = 0.05

    @property
    def peak_error(self) -> float:
        """By how much the measured peak is above the prediction, relative to that."""
        return _relative(self.measured.peak_bytes, self.plan.peak_bytes)

    @property
    def step_error(self) -> float:
        """The same for the step time in microseconds."""
        return _relative(self.measured.step_us, self.plan.step_us)

    @property
    def ratio_error(self) -> float | None:
        """The same for the step time as a multiple of the plain one; None if that is unknown."""
        plain = self.measured.plain_step_us
        return _relative(self.measured.step_us / plain, self.plan.ratio) if plain else None

    @property
    def is_within_budget(self) -> bool:
        """Whether the measured peak, as far as the budget counts it, is within the budget."""
        counted = self.measured.peak_bytes - self.plan.uncounted_bytes
        return counted <= self.plan.budget_bytes

    @property
    def advice(self) -> tuple[str, ...]:
        """What is worth doing about the differences."""
        found = []
        if not self.is_within_budget:
            excess = self.measured.peak_bytes - self.plan.uncounted_bytes - self.plan.budget_bytes
            found.append(
                f"the step takes {show.size(excess)} more than the budget: plan again with a "
                f"margin of {show.size(self.plan.margin_bytes + excess)} or more"
            )
        if abs(self.peak_error) > self.PEAK_TOLERANCE:
            found.append(
                "the peak is not the predicted one: profile again, with the largest sample and "
                "the optimizer that the training uses, and torch " + str(torch.__version__)
            )
        if abs(self._time_error) > self.TIME_TOLERANCE:
            found.append(self._time_advice())
        return tuple(found)

    @property
    def _time_error(self) -> float:
        return self.step_error if self.ratio_error is None else self.ratio_error

    def _time_advice(self) -> str:
        if self.plan.is_measured:
            return "the times are not the predicted ones: profile again on this machine, idle"
        if self.plan.is_calibrated:
            return "the times are derived: profile on the device itself, or calibrate() again"
        return (
            f"the times are derived from a data sheet ({self.plan.device}): calibrate() measures "
            "this machine, or profile on the device itself"
        )

    def report(self) -> show.Report:
        """The comparison as a table."""
        return show.comparison_report(self.plan, self.measured, self.advice)

    def __str__(self) -> str:
        return str(self.report())

    def __rich__(self) -> Any:
        return self.report().__rich__()


def _relative(got: float, expected: float) -> float:
    return got / expected - 1.0 if expected else float(got != expected)
