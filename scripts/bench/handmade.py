"""What do the policies that people choose by hand cost, in memory and in time?

A planner has to beat them, so this file holds their list, the model that all are compared on, and
the way to compare: a GPT of 12 blocks, float32, without dropout and optimizer.

    policy                      which blocks are regions, and what of them is recomputed
    none                        none
    full_no_reentrant           all, by NO_REENTRANT
    full_replay                 all, by REPLAY
    full_torch                  all, by torch's checkpoint with use_reentrant=False
    every_K                     0, K, 2 K, ..., by NO_REENTRANT as the two that follow
    but_every_K                 all but these
    but_last_J                  all but the last J
    save_matmuls                all, but for matrix products; by REPLAY as the three that follow
    save_every_other_matmul     all, but for every other matrix product
    save_attention              all, but for attention
    save_matmuls_and_attention  all, but for both: `save_compute_and_communication()`
    torch_save_...              the same by torch's `create_selective_checkpoint_contexts`

    python -m scripts.bench.handmade [--json FILE] [--rounds 30] [--only NAME ...]

Peaks are those of the allocator's events (see `scripts.measure`), gradients included. Times are
ratios to `none`; how they are made exact to a fraction of a percent is told by the note.

[Note: timing one process against itself]
Two steps that differ by some percent are to be told apart on a machine that does other things.

- *The heap.* glibc gives memory back to the system when enough is free at the end of its heap, and
  takes large blocks from the system directly. A step then pays for the page faults of what an
  earlier one gave back: in turns with steps that need less it is the plain step that pays, now and
  then, and by more than what is to be measured. `keep_heap` makes it keep all; no step has page
  faults after the first ones. A training job of one kind of step keeps its heap by itself.
- *The clock* is the thread's, so what others run counts only by the caches that they empty.
- *Rounds.* Each step runs once a round, in an order drawn anew, so that none always follows the
  same one. A ratio is taken within a round, and the median over rounds counts.
- *The garbage collector* is off in a step, and what is young is collected before it.
- *The first steps* of each form do not count: a first replay is compared with a rerun.

A ratio comes with its standard error, which falls with the square root of the rounds; `ratio` of
two forms that are the same shows what is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as theirs
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as their_wrapper
from torch.nn import functional as F

import wrappers as ours
from scripts import measure
from scripts.bench import harness
from scripts.model import GPT, VOCAB_SIZE, GPTConfig
from wrappers import policies

#: The model of all comparisons, and its sequences in a batch.
CONFIG = GPTConfig(num_layers=12, d_model=256, num_heads=8, seq_len=256, dropout=0.0)
BATCH = 8

MIB = 1 << 20

Wrap = Callable[[nn.Module], nn.Module]

# --- Policies -----------------------------------------------------------------------------


class Replaced(contextlib.AbstractContextManager[None]):
    """A model some of whose modules are others while the context is open.

    Entered and left in microseconds and as often as wanted, so that one model can be timed in many
    forms in turns: what a wrapper has learnt in its first step stays with it.

    Args:
        model: Changed in place while the context is open.
        modules: What takes a module's place, by the module's name.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._model = model
        self._own = {name: model.get_submodule(name) for name in modules}

    def __enter__(self) -> None:
        for name, module in self.modules.items():
            self._model.set_submodule(name, module)

    def __exit__(self, *_: object) -> None:
        for name, module in self._own.items():
            self._model.set_submodule(name, module)


def _all(index: int, count: int) -> bool:
    return True


def _none(index: int, count: int) -> bool:
    return False


def _every(k: int, index: int, count: int) -> bool:
    return index % k == 0


def _but_every(k: int, index: int, count: int) -> bool:
    return index % k != 0


def _but_last(j: int, index: int, count: int) -> bool:
    return index < count - j


@dataclass(frozen=True)
class Policy:
    """What is done to which blocks; called with a model, the context in which it is.

    Attributes:
        wrap: Makes a region of a block.
        is_chosen: Whether it does so with the block of an index, among some number of blocks.
    """

    wrap: Wrap
    is_chosen: Callable[[int, int], bool] = _all

    def __call__(self, model: GPT) -> Replaced:
        blocks = {f"blocks.{index}": model.blocks[index] for index in self.chosen(model)}
        return Replaced(model, {name: self.wrap(block) for name, block in blocks.items()})

    def chosen(self, model: GPT) -> list[int]:
        """Indices of the blocks."""
        count = len(model.blocks)
        return [index for index in range(count) if self.is_chosen(index, count)]


def _ours(**options: Any) -> Wrap:
    return partial(ours.checkpoint_wrapper, **options)


def torch_checkpoint(**options: Any) -> Wrap:
    no_reentrant = their_wrapper.CheckpointImpl.NO_REENTRANT
    return partial(their_wrapper.checkpoint_wrapper, checkpoint_impl=no_reentrant, **options)


def _torch_saving(start: Callable[[], Any]) -> Wrap:
    """Torch's selective path; `start` makes the policy of one forward, as some count."""
    return torch_checkpoint(context_fn=lambda: theirs.create_selective_checkpoint_contexts(start()))


#: A block of which only the input is kept.
RERUN = _ours(impl=ours.CheckpointImpl.NO_REENTRANT)


def policies_for(num_blocks: int) -> Iterator[tuple[str, Policy]]:
    """The policies of a model of so many blocks, by name."""
    matmuls = list(policies.save_matmuls().operators)  # type: ignore[attr-defined]
    attention = list(policies.save_attention().operators)  # type: ignore[attr-defined]
    every_other = policies.save_every_other_matmul
    yield "none", Policy(RERUN, _none)
    yield "full_no_reentrant", Policy(RERUN)
    yield "full_replay", Policy(_ours(impl=ours.CheckpointImpl.REPLAY))
    yield "full_torch", Policy(torch_checkpoint())
    for k in range(2, num_blocks):
        yield f"every_{k}", Policy(RERUN, partial(_every, k))
        yield f"but_every_{k}", Policy(RERUN, partial(_but_every, k))
    for j in range(1, num_blocks):
        yield f"but_last_{j}", Policy(RERUN, partial(_but_last, j))
    yield "save_matmuls", Policy(_ours(policy=policies.save_matmuls()))
    yield "save_every_other_matmul", Policy(_ours(policy=every_other()))
    yield "save_attention", Policy(_ours(policy=policies.save_attention()))
    both = policies.save_compute_and_communication()
    yield "save_matmuls_and_attention", Policy(_ours(policy=both))
    yield "torch_save_matmuls", Policy(_torch_saving(lambda: matmuls))
    yield "torch_save_every_other_matmul", Policy(_torch_saving(every_other().start))
    saved = [*matmuls, *attention]
    yield "torch_save_matmuls_and_attention", Policy(_torch_saving(lambda: saved))


#: By name; `POLICIES[name](model)` is a context in which the model is run by that policy.
POLICIES: dict[str, Policy] = dict(policies_for(CONFIG.num_layers))

# --- Choice -------------------------------------------------------------------------------


def contenders(model: GPT, peaks: Mapping[str, int], budget_bytes: int) -> list[str]:
    """Policies that can be the best within a budget, so that only they need to be timed.

    Of those that recompute whole blocks in the same way the time depends on how many blocks they
    choose, so one of them is left: of the fewest blocks, and of these with the lowest peak.
    """
    fitting = [name for name, peak in peaks.items() if peak <= budget_bytes]

    def cost(name: str) -> tuple[int, int]:
        return len(POLICIES[name].chosen(model)), peaks[name]

    whole = [name for name in fitting if POLICIES[name].wrap is RERUN]
    others = [name for name in fitting if POLICIES[name].wrap is not RERUN]
    return [*([min(whole, key=cost)] if whole else []), *others]


def best_within(rows: Iterable[Mapping[str, Any]], budget_bytes: int) -> Mapping[str, Any] | None:
    """The row of the least `time_ratio` among those whose `peak_bytes` fit; None if none fits."""
    fitting = [row for row in rows if row["peak_bytes"] <= budget_bytes]
    return min(fitting, key=lambda row: row["time_ratio"], default=None)


# --- Measurement --------------------------------------------------------------------------


def build(config: GPTConfig = CONFIG, batch: int = BATCH) -> tuple[GPT, Tensor]:
    """The model, and the tokens of a batch with the targets."""
    torch.manual_seed(0)
    model = GPT(config)
    return model, torch.randint(VOCAB_SIZE, (batch, config.seq_len + 1))


def run_step(model: nn.Module, tokens: Tensor) -> None:
    """Forward and backward of one batch; no gradients before and after."""
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model.zero_grad(set_to_none=True)


def sizes(model: GPT, tokens: Tensor) -> dict[str, Any]:
    """What a row says about the model that it was measured on."""
    return {"batch": len(tokens), **asdict(model.config)}


def steps_of(
    model: GPT, tokens: Tensor, forms: Mapping[str, contextlib.AbstractContextManager[Any]]
) -> dict[str, measure.Step]:
    """By name: a step of the model in the form that it has in a context."""

    def step(form: contextlib.AbstractContextManager[Any]) -> None:
        with form:
            run_step(model, tokens)

    return {name: partial(step, form) for name, form in forms.items()}


def peak_bytes(step: measure.Step) -> int:
    """Peak of a step, gradients included, after one step that a first replay is compared in."""
    step()
    return measure.peak_activation_bytes(step, torch.device("cpu"))


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


#: Parameters of glibc's mallopt, by their names in malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_heap() -> None:
    """Make the C library keep the memory that is freed; see the note at the top.

    Called before anything large is allocated. Does nothing where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def time_in_turns(
    steps: Mapping[str, measure.Step], rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of the thread's clock for each step, round by round; see the note at the top."""
    for _ in range(2):
        for step in steps.values():
            step()
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                gc.collect(0)
                start_s = time.thread_time()
                steps[name]()
                samples[name].append(time.thread_time() - start_s)
    finally:
        gc.enable()
    return samples


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of one step's time to another's in the same round.

    Attributes:
        value: The median.
        error: Its standard error: how much the medians of resampled rounds scatter.
    """

    value: float
    error: float


def ratio(times: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """How much longer a step takes than another that was timed in the same rounds."""
    pairs = [time_s / base_s for time_s, base_s in zip(times, baseline, strict=True)]
    resample = random.Random(0).choices
    medians = [statistics.median(resample(pairs, k=len(pairs))) for _ in range(400)]
    return Ratio(statistics.median(pairs), statistics.pstdev(medians))


def measure_policies(
    names: Sequence[str],
    rounds: int,
    config: GPTConfig = CONFIG,
    batch: int = BATCH,
    choices: Mapping[str, Policy] = POLICIES,
) -> list[dict[str, Any]]:
    """A row for each policy, `none` first."""
    model, tokens = build(config, batch)
    names = ["none", *(name for name in names if name != "none")]
    steps = steps_of(model, tokens, {name: choices[name](model) for name in names})
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    times = time_in_turns(steps, rounds)
    rows = []
    for name in names:
        to_plain = ratio(times[name], times["none"])
        row = {
            "benchmark": "handmade",
            "policy": name,
            "num_blocks_chosen": len(choices[name].chosen(model)),
            "peak_bytes": peaks[name],
            "peak_ratio": round(peaks[name] / peaks["none"], 4),
            "step_ms": round(statistics.median(times[name]) * 1e3, 1),
            "time_ratio": round(to_plain.value, 4),
            "time_ratio_error": round(to_plain.error, 4),
            "rounds": rounds,
            **sizes(model, tokens),
        }
        rows.append(row)
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'policy':<34} {'peak MiB':>9} {'x plain time':>13} {'+-':>7}"]
    for row in rows:
        peak = f"{row['peak_bytes'] / MIB:.1f}"
        lines.append(
            f"{row['policy']:<34} {peak:>9} {row['time_ratio']:>13.3f} "
            f"{row['time_ratio_error']:>7.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", nargs="*", choices=list(POLICIES), metavar="NAME")
    options = parser.parse_args()
    keep_heap()
    torch.set_num_threads(1)
    rows = measure_policies(options.only or list(POLICIES), options.rounds)
    print(table(rows))
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
