"""Tensor and sequence parallelism, alone and under FSDP2: the rows of the composition matrix.

Each cell is run in both orders, wrapped before ``parallelize_module`` and after it, and compared

* with the same parallel model without wrapping: losses and gradients bit by bit, as nothing may
  change them, and collectives by block: what backward does more is what a recompute repeats;
* with a single process that has the whole model: losses and gradients up to the rounding of
  float64, as a row-parallel product is a sum of the ranks' products.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.distributed.matrix import TECHNIQUES, apply_technique, cells, row
from tests.distributed.models import assert_equal
from tests.distributed.parallel_models import (
    DIM,
    HIDDEN,
    Block,
    Seen,
    Transformer,
    assert_cell,
    assert_close,
    local_gradients,
    make,
    names_of,
    quiet,
    tokens,
    two_steps,
    whole_dtensors,
)
from wrappers import offload_stats, offload_wrapper
from wrappers.offload.store import finish_offloading, reset_offloading
from wrappers.select import by_class

# --- Plans --------------------------------------------------------------------------------------


def tensor_parallel() -> dict[str, object]:
    """Column-, then row-parallel products; what is between the layers is whole."""
    return {
        "blocks.*.attention.wq": ColwiseParallel(),
        "blocks.*.attention.wk": ColwiseParallel(),
        "blocks.*.attention.wv": ColwiseParallel(),
        "blocks.*.attention.wo": RowwiseParallel(),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(),
    }


def sequence_parallel() -> dict[str, object]:
    """As torchtitan has it: norms, dropout and residuals on a part of the tokens."""
    return tensor_parallel() | {
        "embed": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)),
        "blocks.*": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Shard(1), use_local_output=True
        ),
        "blocks.*.norm_attention": SequenceParallel(),
        "blocks.*.attention": _gathered(),
        "blocks.*.attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "blocks.*.norm_mlp": SequenceParallel(),
        "blocks.*.mlp": _gathered(),
        "blocks.*.mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        "head": _gathered(use_local_output=True),
    }


def _gathered(**options: bool) -> PrepareModuleInput:
    return PrepareModuleInput(
        input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), **options
    )


PLANS = {"tensor parallel": tensor_parallel, "sequence parallel": sequence_parallel}
ROWS_2D = ("FSDP2 x tensor parallel", "FSDP2 x tensor parallel, sharded first")

#: What the plans make of the blocks' layers, and what comes last.
OWN = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
LAST = {"tensor parallel": "all_reduce", "sequence parallel": "reduce_scatter_tensor"}


def parallelize(model: nn.Module, mesh: object, plan: object) -> None:
    """Apply a plan, and tell dropout which part of its tensor a rank has."""
    parallelize_module(model, mesh, plan())
    rank, num = mesh.get_local_rank(), mesh.size()
    for block in model.blocks:
        block.mlp.drop.part = (2, rank, num)
        if plan is sequence_parallel:
            block.drop.part = (1, rank, num)


# --- In a rank ----------------------------------------------------------------------------------


def loss_of(seed: int, model: nn.Module) -> Tensor:
    return model(tokens(seed)).square().mean()


def run_1d(plan: object, technique: str | None, face: str, is_wrapped_first: bool) -> Seen:
    model = make(Transformer)
    wrap = functools.partial(apply_technique, model, by_class(Block), technique, face)
    if technique is not None and is_wrapped_first:
        wrap()
    parallelize(model, init_device_mesh("cpu", (2,)), plan)
    if technique is not None and not is_wrapped_first:
        wrap()
    return two_steps(model, functools.partial(loss_of, 0), None if technique else whole_dtensors)


def run_2d(name: str, technique: str | None, face: str) -> Seen:
    """FSDP over one dimension of the mesh, tensor parallelism over the other."""
    model = make(Transformer)
    is_wrapped_last = name.endswith("sharded first")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    wrap = functools.partial(apply_technique, model, by_class(Block), technique, face)
    parallelize(model, mesh["tensor"], tensor_parallel)
    if technique is not None and not is_wrapped_last:
        wrap()
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    if technique is not None and is_wrapped_last:
        wrap()
    fully_shard(model, mesh=mesh["data"])
    rank = mesh.get_local_rank("data")
    return two_steps(model, functools.partial(loss_of, rank), None if technique else whole_dtensors)


# --- Against the same without wrapping, and against a single process ----------------------------


@functools.cache
def single(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    model = make(Transformer)
    torch.manual_seed(7)
    loss = loss_of(seed, model)
    loss.backward()
    return loss.detach(), whole_dtensors(model)


@pytest.fixture(scope="module")
def plain_1d(ranks):
    """What the models show without wrapping, by row."""
    plain = {name: ranks(run_1d, plan, None, "", True) for name, plan in PLANS.items()}
    for name in PLANS:
        for got in plain[name]:
            assert_close(got, *single(0))
            assert got.names == names_of(make(Transformer))
    return plain


@pytest.mark.parametrize(("name", "technique", "face"), cells(PLANS))
def test_one_dimension(ranks, plain_1d, matrix_cell, name, technique, face):
    outcome, _ = row(name).expected(technique, face)
    for is_wrapped_first in (True, False):
        results = ranks(run_1d, PLANS[name], technique, face, is_wrapped_first)
        assert_cell(results, plain_1d[name], technique, outcome, own=OWN, last=LAST[name])
    matrix_cell(name, technique, face)


@pytest.fixture(scope="module")
def plain_2d(ranks4):
    """What FSDP2 x tensor parallelism shows without wrapping."""
    plain = ranks4(run_2d, "", None, "")
    (first, gradients), (second, others) = single(0), single(1)
    mean = {name: (gradients[name] + others[name]) / 2 for name in gradients}
    for rank, got in enumerate(plain):
        assert_close(got, second if rank >= 2 else first, mean)
        assert got.names == names_of(make(Transformer))
    return plain


@pytest.mark.parametrize(("name", "technique", "face"), cells(ROWS_2D))
def test_two_dimensions(ranks4, plain_2d, matrix_cell, name, technique, face):
    outcome, _ = row(name).expected(technique, face)
    results = ranks4(run_2d, name, technique, face)
    assert_cell(results, plain_2d, technique, outcome, own=OWN, last="all_reduce")
    matrix_cell(name, technique, face)


# --- What is offloaded of a DTensor -------------------------------------------------------------


def offloaded_bytes(module: nn.Module, x: Tensor) -> tuple[int, dict[str, Tensor], type]:
    """Bytes that leave while a module is offloaded; its gradients; what backward found."""
    reset_offloading()
    options = TECHNIQUES["offload, disk"]()["checkpoint_wrapper_fn"].keywords
    out = offload_wrapper(module, **options)(x)
    finish_offloading()
    num = sum(tier.out_bytes for tier in offload_stats().tiers)
    found = type(out.grad_fn._saved_other) if hasattr(out.grad_fn, "_saved_other") else Tensor
    out.sum().backward()
    reset_offloading()
    return num, local_gradients(module), found


def run_mlp() -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    x = torch.randn(4, DIM, requires_grad=True)
    models[0](x.sin()).sum().backward()
    num, gradients, _ = offloaded_bytes(models[1], x.sin())
    return num, gradients, local_gradients(models[0])


def test_of_dtensors_the_local_tensors_are_offloaded_and_parameters_stay(ranks):
    for num, gradients, expected in ranks(run_mlp):
        assert_equal(gradients, expected)
        # The input, and this rank's half of what goes into gelu and of what comes out of it.
        assert num == 4 * 4 * (DIM + HIDDEN // 2 + HIDDEN // 2)


class Weighted(nn.Module):
    """Multiplies with what the ranks have gathered, which nobody has waited for yet."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        gathered = quiet(funcol.all_gather_tensor, x, 0, dist.group.WORLD)
        assert isinstance(gathered, funcol.AsyncCollectiveTensor)
        return self.weight * gathered


def run_gathered() -> tuple[int, dict[str, Tensor], type]:
    return offloaded_bytes(Weighted(), torch.full((4,), 1.0 + dist.get_rank()))


def test_what_a_collective_has_not_brought_yet_is_waited_for_and_offloaded(ranks):
    for num, gradients, found in ranks(run_gathered):
        assert gradients["weight"].tolist() == [1.0] * 4 + [2.0] * 4
        assert num == 8 * 4
        assert found is Tensor


class Redistributed(Weighted):
    """The same, gathered by a DTensor: what nobody has waited for is inside of it."""

    def forward(self, x: Tensor) -> Tensor:
        mesh = init_device_mesh("cpu", (2,))
        gathered = DTensor.from_local(x, mesh, [Shard(0)]).redistribute(
            placements=[Replicate()], async_op=True
        )
        assert isinstance(gathered._local_tensor, funcol.AsyncCollectiveTensor)
        weight = DTensor.from_local(self.weight, mesh, [Replicate()])
        return (weight * gathered).to_local()


def run_redistributed() -> tuple[int, dict[str, Tensor], type]:
    return offloaded_bytes(Redistributed(), torch.full((4,), 1.0 + dist.get_rank()))


def test_of_dtensors_too(ranks):
    for num, gradients, _ in ranks(run_redistributed):
        assert gradients["weight"].tolist() == [1.0] * 4 + [2.0] * 4
        assert num == 8 * 4
