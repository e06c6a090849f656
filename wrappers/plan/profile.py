"""Look at one step of a model: its regions, what each can keep, what is alive between them.

    model ──► fake copies ──► a step with stubs   ──► what lives outside of regions, and when
                         └──► each structure once ──► its operators, its menu
          ──► real copies ──► one block at a time ──► times, where there is a device

The user's model is not run: copies are. It keeps its gradients, buffers and random states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wrappers import _torch, _tree
from wrappers.errors import WrapperError
from wrappers.plan.chain import chain_of, plain_choice
from wrappers.plan.fakes import Fakes
from wrappers.plan.harness import Costs
from wrappers.plan.memory import RESIZED
from wrappers.plan.names import left_out
from wrappers.plan.optimizers import OptimizerLike, OptimizerMemory, measure_optimizer
from wrappers.plan.records import (
    Decision,
    Hardware,
    Holding,
    Moment,
    Option,
    Persistent,
    Profile,
    RegionProfile,
    Structure,
)
from wrappers.plan.sharding import Sharding
from wrappers.plan.step import Step
from wrappers.plan.structures import Kind, Structures
from wrappers.select import plain_modules

#: Makes a scalar of what the model returns.
LossFn = Callable[[Any], Tensor]


def loss_of(output: Any) -> Tensor:
    """The loss of a step: what the model calls so, or the sum of what it returns.

    Raises:
        WrapperError: Nothing that it returns has a gradient.
    """
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    parts = [t.sum() for t in _tree.flatten(output)[0] if t.requires_grad]
    if not parts:
        raise WrapperError(
            "the model returns no tensor with a gradient: pass loss_fn=..., which makes a scalar "
            "of what it returns, and see that its parameters require gradients"
        )
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def samples_of(sample: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Samples as arguments: a list means several, a tuple positional ones, a dict named ones.

    Raises:
        ValueError: There is none, or one holds no tensor.
    """
    samples = sample if isinstance(sample, list) else [sample]
    if not samples:
        raise ValueError("no sample is given: pass a batch as the model gets it")
    calls = []
    for one in samples:
        if isinstance(one, tuple):
            call: tuple[tuple[Any, ...], dict[str, Any]] = (one, {})
        elif hasattr(one, "keys") and not isinstance(one, Tensor):
            call = ((), {key: one[key] for key in one})
        else:
            call = ((one,), {})
        if not _tree.flatten(call)[0]:
            raise ValueError(
                f"a sample holds no tensor: {one!r:.60}. A tensor is one argument, a tuple are "
                "positional arguments, a dict is arguments by name, a list several samples"
            )
        calls.append(call)
    return calls


@dataclass
class Pass:
    """One step with one sample.

    Attributes:
        step: What was seen.
        kinds: By region: the kinds of its calls.
        outside_us: What the operators outside of regions take.
        sample_bytes: The sample.
    """

    step: Step
    kinds: dict[str, list[Kind]]
    outside_us: float
    sample_bytes: int


class Profiler:
    """Makes the profile of a step.

    Args:
        model: The user's model.
        regions: FQNs of the regions.
        loss_fn: Makes the loss of what the model returns.
        optimizer: The optimizer, or what makes one.
        hardware: What the engine itself takes, and what is reported.
        costs: How long operators take.
        device: Where fake tensors say that they are.
        sharding: How FSDP2 shards the model, if it does.
        mesh: Over which ranks.
        has_gradients: Whether parameters have gradients when the step begins.
        has_buckets: Whether DDP reduces gradients in buckets of its own.
        max_options: Options of a menu at most.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        regions: Sequence[str],
        loss_fn: LossFn | None,
        optimizer: OptimizerLike | None,
        hardware: Hardware,
        costs: Costs,
        device: torch.device,
        sharding: Sharding | None = None,
        mesh: Any = None,
        has_gradients: bool = False,
        has_buckets: bool = False,
        is_elsewhere: bool = False,
        max_options: int = 40,
    ) -> None:
        self._is_elsewhere = is_elsewhere
        self._model = model
        self._has_buckets = has_buckets
        self._sharding = sharding
        self._loss_fn = loss_fn or loss_of
        self._optimizer = optimizer
        self._hardware = hardware
        self._costs = costs
        self._device = device
        self._has_gradients = has_gradients
        self.max_options = max_options
        #: A step with each sample.
        self.passes: list[Pass] = []
        self.fakes = Fakes(device)
        #: One copy for the step with stubs, one whose regions run.
        self.outer = self.fakes.module(model)
        self.inner = self.fakes.module(model)
        if sharding is not None:
            sharding.cast(self.inner)
            with self.fakes.mode:
                sharding.shard(self.outer, mesh)
        outer, inner = dict(plain_modules(self.outer)), dict(plain_modules(self.inner))
        self.regions = {fqn: outer[fqn] for fqn in regions}
        self.structures = Structures(
            self.fakes,
            {fqn: inner[fqn] for fqn in regions},
            costs,
            hardware,
            has_gradients=has_gradients,
            max_options=max_options,
        )

    def look(self, samples: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """Run a step with each sample."""
        self.passes = [self._pass(args, kwargs) for args, kwargs in samples]

    def profile(self) -> Profile:
        """What has been seen; it holds for all samples."""
        # The largest one decides what menus offer; the others add to what an option takes.
        passes = sorted(self.passes, key=lambda p: -p.step.memory.peak())
        first = passes[0]
        names = list(first.kinds)
        for other in passes[1:]:
            names += [fqn for fqn in other.kinds if fqn not in names]
        structures: dict[str, Structure] = {}
        keys = {fqn: self._structure(fqn, passes, structures) for fqn in names}
        optimizer_us, memory = self._run_optimizer()
        persistent = self._persistent(passes, memory)
        start_bytes = persistent.start_bytes(has_gradients=self._has_gradients)
        regions = tuple(
            RegionProfile(
                fqn,
                keys[fqn],
                start_bytes + max(_base(p, fqn, is_forward=True) for p in passes),
                start_bytes + max(_base(p, fqn, is_forward=False) for p in passes),
                max(len(p.kinds.get(fqn, ())) for p in passes),
            )
            for fqn in names
        )
        moments = _merged_moments([_moments(p.step, names, start_bytes) for p in passes])
        for one in passes:
            moments += _repeats(one.step, regions, structures)
        if self._optimizer is not None:
            after = start_bytes + persistent.gradient_bytes * (not self._has_gradients)
            moments.append(Moment("optimizer", 0, after + memory.step_bytes))
        step_us = max(p.outside_us + _regions_us(p) for p in passes) + optimizer_us
        profile = Profile(
            type(self._model).__name__,
            regions,
            structures,
            tuple(moments),
            persistent,
            step_us,
            self._hardware,
            optimizer_us=optimizer_us,
            has_gradients=self._has_gradients,
            world_size=1 if self._sharding is None else self._sharding.num_ranks,
            left_out=left_out(self.outer, names),
        )
        profile = replace(profile, holdings=_holdings(profile, first.step, self.outer, names))
        self.passes = []  # Their closures hold this, and so the user's model.
        return profile

    # --- One step

    def _pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        fakes = self.fakes
        fake_args, fake_kwargs = fakes.values((args, kwargs))
        outside_us = 0.0

        def observe(*call: Any) -> None:
            nonlocal outside_us
            outside_us += self._costs.time_us(*call)

        def run(model: nn.Module) -> Any:
            output = model(*fake_args, **fake_kwargs)
            return output, self._loss_fn(output)

        step = Step(self.outer, self.regions, self.structures.describe, run, self._device, observe)
        parameters = [p for p in self.outer.parameters() if p.requires_grad]
        try:
            with fakes.mode:
                for parameter in parameters:
                    has = self._has_gradients
                    parameter.grad = torch.empty_like(parameter) if has else None
                step.run()
        except WrapperError:
            raise
        except Exception as error:
            raise WrapperError(
                f"the {type(self._model).__name__} does not run on tensors without memory "
                f"({type(error).__name__}: {error}). Code that looks at values (`.item()`, "
                "`if tensor:`) has no answer there: give arguments with which it is not reached. "
                "Check too that model(sample) runs: a list means several samples, a tuple the "
                "arguments of one."
            ) from error
        finally:
            for parameter in parameters:
                parameter.grad = None
        kinds: dict[str, list[Kind]] = {}
        for visit in step.visits:
            kind = self.structures.kind_of(visit.fqn, visit.call)
            kinds.setdefault(visit.fqn, []).append(kind)
        tensors = _tree.flatten((args, kwargs))[0]
        sample_bytes = sum(map(_torch.storage_bytes, _distinct(tensors)))
        return Pass(step, kinds, outside_us / step.num_runs, sample_bytes)

    # --- Structures of regions

    def _structure(self, fqn: str, passes: Sequence[Pass], structures: dict[str, Structure]) -> str:
        """The key of a region's structure, which is made if it is new."""
        calls = [p.kinds.get(fqn, []) for p in passes]
        first = next(kinds for kinds in calls if kinds)[0]
        if all(kinds == [first] for kinds in calls):
            if first.key not in structures:
                structures[first.key] = first.structure()
            return first.key
        spare = _spare_bytes(passes, fqn)
        key = "+".join("*".join(kind.key for kind in kinds) for kinds in calls if kinds)
        if any(map(any, spare)):
            key += f"-{hashlib.sha256(repr(spare).encode()).hexdigest()[:8]}"
        if key not in structures:
            structures[key] = _joined(key, first, calls, spare)
        return key

    # --- What stays

    def _run_optimizer(self) -> tuple[float, OptimizerMemory]:
        time_us = 0.0

        def observe(*call: Any) -> None:
            nonlocal time_us
            time_us += self._costs.time_us(*call)

        memory = measure_optimizer(
            self._optimizer,
            self._model,
            self.outer,
            self.fakes.mode,
            observe,
            is_elsewhere=self._is_elsewhere,
        )
        return time_us, memory

    def _persistent(self, passes: Sequence[Pass], memory: OptimizerMemory) -> Persistent:
        tensors = [*self.outer.parameters(), *self.outer.buffers()]
        gradients = [p for p in self.outer.parameters() if p.requires_grad]
        gradient_bytes = sum(p.numel() * p.element_size() for p in _own_parts(gradients))
        return Persistent(
            parameter_bytes=sum(map(_torch.storage_bytes, _distinct(_own_parts(tensors)))),
            gradient_bytes=gradient_bytes,
            optimizer_bytes=memory.state_bytes,
            unsharded_bytes=max(_gathered(p.step) for p in passes) if self._sharding else 0,
            sample_bytes=max(p.sample_bytes for p in passes),
            bucket_bytes=gradient_bytes if self._has_buckets else 0,
        )


def with_buckets(profile: Profile, world_size: int) -> Profile:
    """The same step under DDP, which reduces gradients in buckets as large as they are."""
    num_bytes = profile.persistent.gradient_bytes
    holdings = [*profile.holdings, _buckets(num_bytes)]
    return replace(
        profile,
        holdings=_largest_first(holdings),
        persistent=replace(profile.persistent, bucket_bytes=num_bytes),
        regions=tuple(
            replace(
                region,
                forward_base_bytes=region.forward_base_bytes + num_bytes,
                backward_base_bytes=region.backward_base_bytes + num_bytes,
            )
            for region in profile.regions
        ),
        moments=tuple(replace(m, base_bytes=m.base_bytes + num_bytes) for m in profile.moments),
        world_size=world_size,
    )


def _own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts of tensors that are sharded, and the others as they are."""
    found: list[Tensor] = []
    for tensor in tensors:
        parts = [part for _, part in _torch.inner_tensors(tensor)]
        found += parts or [tensor]
    return found


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One tensor of each memory."""
    return list({_torch.storage_key(t) or id(t): t for t in tensors}.values())


_BUFFERS = (RESIZED, "aten.empty.memory_format")


def _gathered(step: Step) -> int:
    """The most that gathered parameters and gradients that wait to be reduced take at once."""
    alive = peak = 0
    for change, storage in step.memory.changes:
        # FSDP's buffers are empty when they are made; what stubs make has a label.
        if storage.operator in _BUFFERS and not storage.label:
            alive += change
            peak = max(peak, alive)
    return peak


def _regions_us(one: Pass) -> float:
    kinds = [kind for found in one.kinds.values() for kind in found]
    return sum(kind.plain.forward_us + kind.plain.backward_us for kind in kinds)


def _base(one: Pass, fqn: str, *, is_forward: bool) -> int:
    """The most that is alive when a region begins, over all of its calls."""
    return max(_bases(one, fqn, is_forward=is_forward), default=0)


def _bases(one: Pass, fqn: str, *, is_forward: bool) -> list[int]:
    """What is alive when a region begins, by call."""
    step = one.step
    base = step.base_of_forward if is_forward else step.base_of_backward
    return [base(i) for i, visit in enumerate(step.visits) if visit.fqn == fqn]


#: By sample and call of a region: what less is alive than in the call where most is.
_Spare = list[list[tuple[int, int]]]


def _spare_bytes(passes: Sequence[Pass], fqn: str) -> _Spare:
    both = []
    for is_forward in (True, False):
        bases = [_bases(p, fqn, is_forward=is_forward) for p in passes]
        most = max(base for found in bases for base in found)
        both.append([[most - base for base in found] for found in bases])
    return [list(zip(*found, strict=True)) for found in zip(*both, strict=True)]


def _joined(key: str, first: Kind, calls: Sequence[Sequence[Kind]], spare: _Spare) -> Structure:
    """One structure for a region that is called several times, or with several samples.

    The calls of a step add up: each keeps until its backward, and these come in opposite order.
    Of samples the largest counts.
    """
    structure = first.structure()
    options = tuple(
        _largest(
            [
                _together([kind.option(option.decisions) for kind in kinds], found)
                for kinds, found in zip(calls, spare, strict=True)
                if kinds  # A sample may leave the region out.
            ]
        )
        for option in structure.options
    )
    reasons = [kind.reason for kinds in calls for kind in kinds if kind.reason]
    return replace(
        structure,
        key=key,
        options=options[:1] if reasons else options,
        calls=dict(set.intersection(*(set(k.calls.items()) for kinds in calls for k in kinds))),
        reason=reasons[0] if reasons else "",
        forward_us=max(sum(k.plain.forward_us for k in kinds) for kinds in calls),
        backward_us=max(sum(k.plain.backward_us for k in kinds) for kinds in calls),
    )


def _together(options: Sequence[Option], spare: Sequence[tuple[int, int]]) -> Option:
    kept = 0
    others = []
    for option, (forward, backward) in zip(options, spare, strict=True):
        others.append((kept - forward, kept - backward))
        kept += option.kept_bytes
    return _sized(
        options,
        kept,
        sum(option.extra_us for option in options),
        others,
        sum(option.offload_bytes for option in options),
    )


def _sized(
    options: Sequence[Option],
    kept: int,
    extra_us: float,
    others: Sequence[tuple[int, int]],
    offload_bytes: int,
) -> Option:
    decisions: tuple[Decision, ...] | None = options[0].decisions if options else None
    return Option(
        decisions,
        kept,
        extra_us,
        max((o.forward_bytes + b for o, (b, _) in zip(options, others, strict=True)), default=0),
        max((o.backward_bytes + b for o, (_, b) in zip(options, others, strict=True)), default=0),
        offload_bytes,
    )


def _largest(options: Sequence[Option]) -> Option:
    return _sized(
        options,
        max(option.kept_bytes for option in options),
        max(option.extra_us for option in options),
        [(0, 0)] * len(options),
        max(option.offload_bytes for option in options),
    )


# --- Moments


def _moments(step: Step, names: Sequence[str], start_bytes: int) -> list[Moment]:
    """What happens between regions, in the order of the step."""
    order = {fqn: position for position, fqn in enumerate(names)}
    visits = step.visits
    moments = []
    at, before, alive = 0, "", 0
    for visit in visits:
        label = f"between {before} and {visit.fqn}" if before else f"before {visit.fqn}"
        moments.append(Moment(label, alive, start_bytes + step.peak_between(at, visit.entry)))
        at, before = visit.exit, visit.fqn
        alive = max(alive, order[visit.fqn] + 1)
    backward = sorted(
        (v for v in visits if v.backward_entry is not None), key=lambda v: v.backward_entry or 0
    )
    label = f"after {before}"
    waiting = list(backward)
    for visit in backward:
        assert visit.backward_entry is not None
        alive = max((order[v.fqn] + 1 for v in waiting), default=0)
        peak = step.peak_between(at, visit.backward_entry)
        moments.append(Moment(label, alive, start_bytes + peak))
        waiting.remove(visit)
        at, label = visit.backward_exit, f"backward before {visit.fqn}"
    moments.append(Moment(label, 0, start_bytes + step.peak_between(at, step.end_at)))
    return moments


def _repeats(
    step: Step, regions: Sequence[RegionProfile], structures: dict[str, Structure]
) -> list[Moment]:
    """Calls of a region that come after those of regions behind it in the chain: bounds.

    What the calls before keep is then not a sum over the regions before. All that the later ones
    keep in the whole step counts, and the option that takes most beyond what it keeps.
    """
    order = {region.fqn: position for position, region in enumerate(regions)}
    moments = []
    last = -1
    for visit in step.visits:
        position = order[visit.fqn]
        if position < last:
            region = regions[position]
            options = structures[region.structure].options
            forward = max(option.forward_bytes - option.kept_bytes for option in options)
            backward = max(option.backward_bytes - option.kept_bytes for option in options)
            base = max(
                region.forward_base_bytes + forward,
                region.backward_base_bytes + backward,
            )
            moments.append(Moment(f"{visit.fqn} again", last + 1, base))
        last = max(last, position)
    return list(dict.fromkeys(moments))


def _merged_moments(found: Sequence[list[Moment]]) -> list[Moment]:
    """The largest of each moment, where several samples have gone the same way."""
    first, *others = found
    merged = list(first)
    for other in others:
        bases: dict[tuple[str, int], int] = {}
        for moment in other:
            key = moment.label, moment.num_alive
            bases[key] = max(bases.get(key, 0), moment.base_bytes)
        for i, moment in enumerate(merged):
            base = bases.pop((moment.label, moment.num_alive), 0)
            merged[i] = replace(moment, base_bytes=max(moment.base_bytes, base))
        merged += [Moment(label, alive, base) for (label, alive), base in bases.items()]
    return merged


# --- What is alive at the peak


def _holdings(
    profile: Profile, step: Step, model: nn.Module, regions: Iterable[str]
) -> tuple[Holding, ...]:
    """What is alive at the peak of the plain step, largest first."""
    chain = chain_of(profile)
    needs = chain.needs(plain_choice(profile))
    index = max(range(len(needs)), key=lambda i: needs[i])
    names = [region.fqn for region in profile.regions]
    found = [*_lasting(profile, model, list(regions))]
    alive = profile.regions[: index + 1] if index < len(names) else profile.regions
    for region in alive:
        found += _kept(region, profile.structures[region.structure])
    position = step.loss_at
    if index < len(names):
        entries = [v.backward_entry for v in step.visits if v.fqn == names[index]]
        position = next((entry for entry in entries if entry is not None), position)
    for storage, num_bytes in step.memory.alive_at(position):
        fqn, _, what = storage.label.partition(" ")
        found.append(Holding(fqn, what or storage.operator, num_bytes, "autograd"))
    return _largest_first(found)


def _largest_first(holdings: Iterable[Holding]) -> tuple[Holding, ...]:
    found = [holding for holding in holdings if holding.num_bytes > 0]
    return tuple(sorted(found, key=lambda h: (-h.num_bytes, h.fqn, h.operator)))


def _lasting(profile: Profile, model: nn.Module, regions: list[str]) -> Iterable[Holding]:
    """Parameters, region by region, and what else is there between steps."""
    sizes: dict[str, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        fqn = next((r for r in regions if name.startswith(f"{r}.")), name)
        parts = _own_parts([tensor])
        sizes[fqn] = sizes.get(fqn, 0) + sum(p.numel() * p.element_size() for p in parts)
    for fqn, num_bytes in sizes.items():
        yield Holding(fqn, "parameter", num_bytes, "model")
    persistent = profile.persistent
    yield Holding("", "optimizer state", persistent.optimizer_bytes, "optimizer")
    yield Holding("", "sample", persistent.sample_bytes, "user")
    yield _buckets(persistent.bucket_bytes)
    if profile.has_gradients:
        yield Holding("", "gradient", persistent.gradient_bytes, "model")


def _buckets(num_bytes: int) -> Holding:
    return Holding("", "DDP's buckets", num_bytes, "model")


def _kept(region: RegionProfile, structure: Structure) -> Iterable[Holding]:
    """What autograd keeps of a region that is left alone."""
    rest = structure.options[0].kept_bytes
    for row in structure.operators:
        name = f"{row.operator} ({row.module})" if row.module else row.operator
        if row.saved_bytes:
            yield Holding(region.fqn, name, row.saved_bytes, "autograd")
            rest -= row.saved_bytes
    yield Holding(region.fqn, "input", max(rest, 0), "autograd")
