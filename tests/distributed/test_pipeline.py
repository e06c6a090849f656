"""Schedules of ``torch.distributed.pipelining``: the rows of the composition matrix.

Regions lie in the stages, and several micro-batches are alive at once in each. A single process
that runs the stages one after the other adds up the same gradients in the same order, so
everything is equal to it bit by bit, dropout included.

The zero-bubble schedule takes the backward apart: the gradients of a stage's input first, those of
its parameters later, both by ``autograd.grad``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from tests.distributed.matrix import RAISES, apply_technique, cells
from tests.distributed.models import assert_equal
from tests.distributed.parallel_models import (
    BATCH,
    DIM,
    NUM_TOKENS,
    NUM_WATCHED,
    Block,
    Collectives,
    Seen,
    local_gradients,
    make_stage,
    names_of,
    note_regions,
    probe,
    tokens,
)
from tests.distributed.ranks import RankFailedError
from wrappers.offload.store import finish_offloading
from wrappers.select import by_class

NUM_MICRO_BATCHES = 4

#: By row: the schedule, and how many stages each of two ranks has.
SCHEDULES = {
    "pipeline, GPipe": (ScheduleGPipe, 1),
    "pipeline, 1F1B": (Schedule1F1B, 1),
    "pipeline, interleaved 1F1B": (ScheduleInterleaved1F1B, 2),
    "pipeline, interleaved zero bubble": (ScheduleInterleavedZeroBubble, 2),
}


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().mean()


def batches(seed: int) -> Tensor:
    """The micro-batches, one after the other in dimension 0."""
    return torch.cat([tokens(10 * seed + index) for index in range(NUM_MICRO_BATCHES)])


def seeds() -> Tensor:
    return torch.arange(NUM_MICRO_BATCHES)


def example() -> Tensor:
    return torch.empty(BATCH, NUM_TOKENS, DIM, dtype=torch.float64, requires_grad=True)


class Stage(PipelineStage):
    """Notes how many watched results are alive when a backward begins, at most."""

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        finish_offloading()  # What is on its way to the disk will not stay.
        probe.peak = max(probe.peak, probe.num_alive())
        return super().backward_one_chunk(*args, **kwargs)


def run(
    name: str, technique: str | None, face: str, group: dist.ProcessGroup | None = None
) -> Seen:
    """Two steps. Counts are those of a whole step; gradients and names are by stage."""
    schedule_cls, num_here = SCHEDULES[name]
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    num_stages = num_here * num_ranks
    stages = {index: make_stage(index) for index in range(rank, num_stages, num_ranks)}
    for stage in stages.values():
        if technique is not None:
            apply_technique(stage, by_class(Block), technique, face)
    cpu = torch.device("cpu")
    made = [
        Stage(stage, index, num_stages, cpu, example(), example(), group=group)
        for index, stage in stages.items()
    ]
    arguments = made[0] if num_here == 1 else made
    schedule = schedule_cls(arguments, NUM_MICRO_BATCHES, loss_fn=loss_of)
    seen = Seen(names=[text for stage in stages.values() for text in names_of(stage)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for stage in stages.values():
                stage.zero_grad()
            probe.clear()
            with Collectives() as talk:
                seen.losses.append(step(schedule, rank, num_ranks))
            seen.forward = talk.counts
            seen.num_watched, seen.num_alive = len(probe.watched), probe.peak
            seen.gradients.append(
                {f"{i}.{k}": v for i, s in stages.items() for k, v in local_gradients(s).items()}
            )
    seen.warnings = [str(warning.message) for warning in caught]
    for stage in stages.values():
        note_regions(seen, stage)
    return seen


def step(schedule: Any, rank: int, num_ranks: int) -> Tensor:
    """One step; the losses of the micro-batches where the last stage is."""
    arguments = (batches(0),) if rank == 0 else ()
    if rank < num_ranks - 1:
        schedule.step(*arguments, seed=seeds(), return_outputs=False)
        return torch.zeros(())
    losses: list[Tensor] = []
    schedule.step(*arguments, target=batches(1), losses=losses, seed=seeds(), return_outputs=False)
    return torch.stack([loss.detach() for loss in losses])


def run_alone(name: str, technique: str, face: str) -> None:
    """All stages in this rank: where a step raises, no other rank waits for it."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    run(name, technique, face, groups[dist.get_rank()])


# --- Against the same without wrapping, and against a single process ----------------------------


@functools.cache
def single(num_stages: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The stages one after the other, micro-batch by micro-batch."""
    stages = [make_stage(index) for index in range(num_stages)]
    losses = []
    inputs, targets = batches(0).chunk(NUM_MICRO_BATCHES), batches(1).chunk(NUM_MICRO_BATCHES)
    for x, target, seed in zip(inputs, targets, seeds(), strict=True):
        for stage in stages:
            x = stage(x, seed)
        loss = loss_of(x, target)
        loss.backward()
        losses.append(loss.detach())
    gradients = {f"{i}.{k}": v for i, s in enumerate(stages) for k, v in local_gradients(s).items()}
    return torch.stack(losses), {k: v / NUM_MICRO_BATCHES for k, v in gradients.items()}


@pytest.fixture(scope="module")
def plain(ranks):
    """What each schedule shows without wrapping."""
    return {name: ranks(run, name, None, "") for name in SCHEDULES}


#: By schedule and rank: the largest number of forwards of a stage that wait for their backward.
IN_FLIGHT = {
    "pipeline, GPipe": (4, 4),
    "pipeline, 1F1B": (2, 1),
    "pipeline, interleaved 1F1B": (5, 3),
    "pipeline, interleaved zero bubble": (4, 4),
}
BLOCKS_OF_STAGE = 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_pipeline_is_one_process_cut_into_pieces(plain, name):
    """What the cells below are compared with."""
    losses, gradients = single(2 * SCHEDULES[name][1])
    results = plain[name]
    for step_index in range(2):
        assert torch.equal(results[1].losses[step_index], losses)
        both = results[0].gradients[step_index] | results[1].gradients[step_index]
        assert_equal({key: both[key] for key in gradients}, gradients)
    for got, in_flight in zip(results, IN_FLIGHT[name], strict=True):
        assert got.num_alive == in_flight * BLOCKS_OF_STAGE * NUM_WATCHED
        assert got.forward[-1, "send"] == got.forward[-1, "recv_"] > 0


@pytest.mark.parametrize(("name", "technique", "face"), cells(SCHEDULES))
def test_schedules(ranks, plain, matrix_cell, name, technique, face):
    results = ranks(run, name, technique, face)
    for rank, (got, expected) in enumerate(zip(results, plain[name], strict=True)):
        for step_index in range(2):
            assert torch.equal(got.losses[step_index], expected.losses[step_index])
            assert_equal(got.gradients[step_index], expected.gradients[step_index])
        assert got.forward == expected.forward
        num_kept = IN_FLIGHT[name][rank] * BLOCKS_OF_STAGE if technique == "REPLAY, policy" else 0
        assert got.num_alive == num_kept
        assert got.num_watched == expected.num_watched * num_runs(name, technique, rank)
        assert got.names == expected.names
        assert (got.num_replayed > 0) == technique.startswith("REPLAY")
        assert (got.fallen, got.warnings) == ([], expected.warnings)
    matrix_cell(name, technique, face)


def num_runs(name: str, technique: str, rank: int) -> float:
    """How often a step runs the forward of a rank's blocks, on average."""
    if technique not in ("REENTRANT", "NO_REENTRANT"):
        return 1
    if "zero bubble" not in name:
        return 2
    # A backward in two parts needs it for each; one of rank 0's two stages has no input's gradient.
    return 2.5 if rank == 0 else 3


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="a pipeline talks to its own rank, which gloo cannot"
)
@pytest.mark.parametrize(("name", "technique", "face"), cells(SCHEDULES, [RAISES]))
def test_what_cannot_work_says_so(ranks, matrix_cell, name, technique, face):
    """All stages are in each rank here: none waits for one that has raised."""
    with pytest.raises(RankFailedError, match=NOT_THROUGH_REENTRANT) as caught:
        ranks(run_alone, name, technique, face)
    assert "failed in 2 of 2 ranks" in str(caught.value)
    matrix_cell(name, technique, face)


NOT_THROUGH_REENTRANT = (
    r"CheckpointError: region `blocks\.\d`: \.grad\(\) .* not possible through a REENTRANT region"
    r".* Use CheckpointImpl\.NO_REENTRANT"
)
