"""DDP over wrapped blocks: gradients, buffers, and where REENTRANT needs ``static_graph``.

With ``broadcast_buffers`` every forward overwrites rank 1's buffers in place. Where a second
forward comes before the backward, that must neither alarm the first forward's regions nor reach
their recompute.
"""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import (
    IMPLS,
    WIDTH,
    Block,
    assert_equal,
    buffers,
    forward,
    gradients,
    make_model,
    single_process,
)
from tests.distributed.ranks import RankFailedError
from wrappers import apply_activation_checkpointing

REENTRANT, NO_REENTRANT = IMPLS
FACES = {
    f"{impl.name}-{'in_place' if inplace else 'wrapper'}": {"impl": impl, "inplace": inplace}
    for impl in IMPLS
    for inplace in (False, True)
}
OPTIONS = {
    "default": {},
    "own_buffers": {"broadcast_buffers": False},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"static_graph": True, "gradient_as_bucket_view": True},
}


def three_steps(model, rank):
    for micro_batch in range(3):
        model.zero_grad()
        forward(model, rank, micro_batch).backward()


def two_forwards(model, rank):
    (forward(model, rank, 0) + forward(model, rank, 1)).backward()


def accumulate(model, rank):
    is_ddp = isinstance(model, DistributedDataParallel)
    with model.no_sync() if is_ddp else contextlib.nullcontext():
        forward(model, rank, 0).backward()
    forward(model, rank, 1).backward()


STEPS = {step.__name__: step for step in (three_steps, two_forwards, accumulate)}


def run_ddp(face, step, options):
    model = make_model()
    if options.get("find_unused_parameters"):
        model.unused = nn.Linear(WIDTH, WIDTH)
    if face is not None:
        report = apply_activation_checkpointing(
            model, check_fn=lambda module: isinstance(module, Block), **face
        )
        assert len(report.wrapped) == len(model.blocks)
    with warnings.catch_warnings():  # torch 2.13: broadcast_buffers=False will mean less later
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        ddp = DistributedDataParallel(model, **options)
    step(ddp, dist.get_rank())
    return gradients(model), buffers(model)


def is_marked_twice(face, step, options):
    """Whether a REENTRANT backward gives DDP a parameter's gradient in more than one piece.

    DDP counts them in advance only in a static graph. Looking for unused parameters fails too, in
    the first forward: DDP walks the graph that it leaves, in which a REENTRANT region shows none.
    """
    is_told = options.get("static_graph", False)
    is_looking = options.get("find_unused_parameters", False)
    is_reentrant = face["impl"] is REENTRANT
    return is_reentrant and not is_told and (step is two_forwards or is_looking)


ALL = [
    pytest.param(face, step, options, id=f"{face_name}-{step_name}-{options_name}")
    for face_name, face in FACES.items()
    for step_name, step in STEPS.items()
    for options_name, options in OPTIONS.items()
    # The plain model fails in these too: DDP learns a static graph in the first backward it syncs,
    # and before torch 2.13 its second forward changes buffers that the first has saved.
    if not (step is accumulate and options.get("static_graph"))
    and not (step is two_forwards and torch.__version__ < "2.13")
]
REFUSED = [case for case in ALL if is_marked_twice(*case.values)]


@pytest.mark.parametrize(("face", "step", "options"), [case for case in ALL if case not in REFUSED])
def test_gradients_equal_a_single_process_and_buffers_plain_ddp(ranks, face, step, options):
    expected = single_process(make_model(), step).gradients
    plain = ranks(run_ddp, None, step, options)
    results = ranks(run_ddp, face, step, options)
    for (got, got_buffers), (_, plain_buffers) in zip(results, plain, strict=True):
        assert_equal(got, expected)
        assert_equal(got_buffers, plain_buffers)


@pytest.mark.parametrize(("face", "step", "options"), REFUSED)
def test_ddp_refuses_reentrant_without_a_static_graph(ranks, face, step, options):
    is_looking = options.get("find_unused_parameters", False)
    ours = r"CheckpointError: region `blocks\.0`: DDP\(find_unused_parameters=True\)"
    error = ours if is_looking else "Expected to mark a variable ready only once"
    with pytest.raises(RankFailedError, match=error):
        ranks(run_ddp, face, step, options)
