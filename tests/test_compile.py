"""Under torch.compile a region becomes torch's own: no graph break, and a real recompute."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch.nn import functional as F

import wrappers
from wrappers import CheckpointImpl, apply_activation_checkpointing, checkpoint

IMPLS = list(CheckpointImpl)
MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        h = self.down(F.gelu(self.up(self.norm(x))))
        return x + (h if scale is None else h * scale)


class CountMatmuls:
    """A compiler backend that runs the graphs as they are and counts their matmuls."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        return aot_module_simplified(
            graph, inputs, fw_compiler=self._count("forward"), bw_compiler=self._count("backward")
        )

    def _count(self, which: str) -> object:
        def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
            num = sum(node.target in MATMULS for node in graph.graph.nodes)
            setattr(self, which, getattr(self, which) + num)
            return make_boxed_func(graph.forward)

        return compiler


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def gradients(model: nn.Module, run, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    run(x).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def wrapped(model: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(model)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block), **options)
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_wrapped_blocks_compile_to_one_graph_with_eager_gradients(blocks, impl, inplace):
    x = torch.randn(4, 16)
    expected = gradients(blocks, blocks, x)
    model = wrapped(blocks, impl=impl, inplace=inplace)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(model, compiled, x), expected, strict=True):
        assert torch.equal(got, want)


def test_function_level_region_compiles_with_keyword_tensors(blocks):
    x, scale = torch.randn(4, 16), torch.randn(16)

    def run(x):
        for block in blocks:
            x = checkpoint(block, x, scale=scale)
        return x

    def plain(x):
        for block in blocks:
            x = block(x, scale=scale)
        return x

    expected = gradients(blocks, plain, x)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(blocks, compiled, x), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor_gradients_equal_eager_to_rounding(blocks):
    x = torch.randn(4, 16)
    expected = gradients(blocks, blocks, x)
    model = wrapped(blocks)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    for got, want in zip(gradients(model, compiled, x), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_backward_recomputes_the_matmuls(blocks, inplace):
    x = torch.randn(4, 16)
    plain, recomputing = CountMatmuls(), CountMatmuls()
    gradients(blocks, torch.compile(blocks, backend=plain), x)
    model = wrapped(blocks, inplace=inplace)
    gradients(model, torch.compile(model, backend=recomputing), x)
    assert (plain.forward, recomputing.forward) == (4, 4)
    # Of two matmuls a block, the last one's output is needed by nobody.
    assert recomputing.backward - plain.backward == 2


@pytest.mark.parametrize(
    "policy",
    [MATMULS, lambda ctx, op, *args, **kwargs: op in MATMULS],
    ids=["list", "function"],
)
def test_selective_policy_reaches_the_compiler(blocks, policy):
    x = torch.randn(4, 16)
    plain, selective = CountMatmuls(), CountMatmuls()
    expected = gradients(blocks, torch.compile(blocks, backend=plain), x)
    context_fn = partial(wrappers.create_selective_checkpoint_contexts, policy)
    model = wrapped(blocks, context_fn=context_fn)
    got = gradients(model, torch.compile(model, backend=selective, fullgraph=True), x)
    assert selective.backward == plain.backward
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore:region .* is rerun from now on")
@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_code_inside_an_eager_region(blocks, impl):
    x = torch.randn(4, 16, requires_grad=True)
    expected = gradients(blocks, blocks, x)
    recorder = EagerAndRecordGraphs()
    compiled = [torch.compile(block, backend=recorder) for block in blocks]

    def run(x):
        for block in compiled:
            x = checkpoint(block, x, impl=impl)
        return x

    for got, want in zip(gradients(blocks, run, x), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert recorder.graphs
