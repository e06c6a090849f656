"""Regions whose own code talks to other ranks: the rows of the composition matrix.

Blocks exchange tensors between their layers, by functional collectives, by those of
``torch.distributed.nn``, or with experts of other ranks. Each rank has a part of the tokens, and
the sum of the ranks' gradients is that of a single process that has all of them, to the rounding of
float64. The same model without wrapping must be matched bit by bit, and asked for as many
collectives as a recompute repeats.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from tests.distributed.matrix import apply_technique, cells, row
from tests.distributed.models import assert_equal
from tests.distributed.parallel_models import (
    DIM,
    Alone,
    Classic,
    Functional,
    MoE,
    MoEBlock,
    Seen,
    Talking,
    TalkingBlock,
    assert_cell,
    assert_close,
    make,
    names_of,
    sum_of_ranks,
    two_steps,
)
from tests.engine.test_choices import ties_broken_anew
from wrappers.errors import RecomputeMismatchError
from wrappers.policies import save_compute_and_communication, save_matmuls
from wrappers.select import by_class

NUM_TOKENS = 12

#: By row: the model and how its blocks talk.
MODELS: dict[str, tuple[Callable[[Any], nn.Module], type]] = {
    "functional collectives": (Talking, Functional),
    "collectives of torch.distributed.nn": (Talking, Classic),
    "mixture of experts, all-to-all": (MoE, Functional),
}


def loss_of(rank: int, num: int, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_TOKENS, DIM, generator=generator, dtype=torch.float64)
    x = x.chunk(num)[rank].clone().requires_grad_()
    return model(x).square().sum()


def run(name: str, technique: str | None, face: str) -> Seen:
    kind, talk = MODELS[name]
    model = make(lambda: kind(talk()))
    if technique is not None:
        apply_technique(model, by_class(TalkingBlock, MoEBlock), technique, face)
    step = functools.partial(loss_of, dist.get_rank(), dist.get_world_size())
    return two_steps(model, step, None if technique else sum_of_ranks)


@functools.cache
def single(name: str) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    model = make(lambda: MODELS[name][0](Alone()))
    loss = loss_of(0, 1, model)
    loss.backward()
    return loss.detach(), sum_of_ranks(model), names_of(model)


@pytest.fixture(scope="module")
def plain(ranks):
    """What the models show without wrapping, by row; together that is a single process's."""
    found = {}
    for name in MODELS:
        found[name] = results = ranks(run, name, None, "")
        loss, gradients, names = single(name)
        total = sum(got.losses[-1] for got in results)
        for got in results:
            got.losses[-1], own = total, got.losses[-1]
            assert_close(got, loss, gradients)
            got.losses[-1] = own
            assert got.names == names
    return found


#: By row: the collectives of a block, the last one where nothing saved depends on it, and how many
#: of the watched results ``save_matmuls`` keeps.
TALK: dict[str, tuple[tuple[str, ...], str | None, int]] = {
    "functional collectives": (
        ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"),
        "reduce_scatter_tensor",
        1,
    ),
    "collectives of torch.distributed.nn": (
        ("allreduce_", "allgather_", "reduce_scatter_"),
        "reduce_scatter_",
        1,
    ),
    "mixture of experts, all-to-all": (("all_to_all_single",), None, 0),
}


@pytest.mark.parametrize(("name", "technique", "face"), cells(MODELS))
def test_blocks_that_talk(ranks, plain, matrix_cell, name, technique, face):
    outcome, _ = row(name).expected(technique, face)
    own, last, num_kept = TALK[name]
    results = ranks(run, name, technique, face)
    assert_cell(results, plain[name], technique, outcome, own=own, last=last, num_kept=num_kept)
    matrix_cell(name, technique, face)


# --- Experts chosen between equals (see also tests/engine/test_choices.py) ------------------------


def run_with_ties_broken_anew(technique: str | None, preset: Any = None) -> Seen:
    """With a top-k that does not choose the same when it runs again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        with ties_broken_anew():
            model = make(lambda: MoE(Functional()))
            if technique is not None:
                policy = {} if preset is None else {"policy": preset()}
                apply_technique(model, by_class(MoEBlock), technique, "wrapper", **policy)
            step = functools.partial(loss_of, dist.get_rank(), dist.get_world_size())
            return two_steps(model, step)


@pytest.mark.parametrize(
    ("technique", "preset"),
    [
        ("REPLAY", None),
        ("REPLAY, policy", save_matmuls),
        ("REPLAY, policy", save_compute_and_communication),
        ("NO_REENTRANT", save_compute_and_communication),
    ],
)
def test_no_token_goes_elsewhere_in_the_recompute(ranks, technique, preset):
    """Routing is repeated on no rank, so all exchange what they did in forward."""
    plain = ranks(run_with_ties_broken_anew, None)
    results = ranks(run_with_ties_broken_anew, technique, preset)
    for got, expected in zip(results, plain, strict=True):
        for step in range(2):
            assert_equal(got.gradients[step], expected.gradients[step])
        assert got.backward == expected.backward
        assert (got.fallen, got.warnings) == ([], [])


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_rerun_that_routes_otherwise_is_an_error():
    """The experts' numbers of tokens differ. (REENTRANT compares nothing, so it is silent.)"""
    model = make(lambda: MoE(Alone()))
    apply_technique(model, by_class(MoEBlock), "NO_REENTRANT", "wrapper")
    with ties_broken_anew(), pytest.raises(RecomputeMismatchError, match=r"region `blocks\.2`"):
        loss_of(0, 1, model).backward()
