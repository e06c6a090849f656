"""Backward of a stack of transformer blocks costs plain backward and the products it repeats.

And after forward exactly what the policies say is in memory.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from scripts.model import Block, GPTConfig
from tests.engine.helpers import NO_REENTRANT, Operators, assert_equal, leaf, watch
from wrappers import CheckpointImpl, apply_activation_checkpointing, checkpoint, checkpoint_wrapper
from wrappers.policies import (
    recompute_all,
    recompute_matmuls_of,
    save_attention,
    save_compute_and_communication,
    save_every_other_matmul,
    save_matmuls,
)

pytestmark = pytest.mark.usefixtures("no_leaks", "seeded")

REPLAY = CheckpointImpl.REPLAY
aten = torch.ops.aten

NUM_BLOCKS, WIDTH, NUM_HEADS, SEQ_LEN, BATCH = 3, 32, 4, 16, 2
CONFIG = GPTConfig(
    num_layers=NUM_BLOCKS, d_model=WIDTH, num_heads=NUM_HEADS, seq_len=SEQ_LEN, dropout=0
)
TOKENS = BATCH * SEQ_LEN
D = TOKENS * WIDTH * 4  # bytes of one tensor of (batch, sequence, width)
STATISTICS = TOKENS * NUM_HEADS * 4  # bytes of attention's softmax statistics

#: FLOPs in the forward of one block.
QKV = 2 * TOKENS * WIDTH * 3 * WIDTH
OUT = 2 * TOKENS * WIDTH * WIDTH
UP = DOWN = 2 * TOKENS * WIDTH * 4 * WIDTH
ATTENTION = 2 * 2 * BATCH * SEQ_LEN * SEQ_LEN * WIDTH


def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    batch, num_heads, seq_len, width = query
    return 2 * 2 * batch * num_heads * seq_len * key[2] * width


#: torch does not count the kernel of the CPU.
EXTRA = {aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}

#: Preset: bytes that a block keeps besides its input, FLOPs that its backward repeats.
POLICIES = {
    "recompute_all": (recompute_all, 0, QKV + ATTENTION + OUT + UP),
    "save_matmuls": (save_matmuls, 8 * D, ATTENTION),
    "save_every_other_matmul": (save_every_other_matmul, 7 * D, ATTENTION + OUT),
    "save_attention": (save_attention, D + STATISTICS, QKV + OUT + UP),
    "save_compute_and_communication": (save_compute_and_communication, 9 * D + STATISTICS, 0),
    "recompute_matmuls_of": (
        lambda: save_matmuls() | recompute_matmuls_of([(WIDTH, 4 * WIDTH)]),
        4 * D,
        ATTENTION + UP,
    ),
    "list": (lambda: [aten.addmm.default], 8 * D, ATTENTION),
    "none": (lambda: None, 0, QKV + ATTENTION + OUT + UP),
}
each_policy = pytest.mark.parametrize("name", POLICIES)


def new_stack(**options) -> nn.Sequential:
    torch.manual_seed(0)
    stack = nn.Sequential(*(Block(CONFIG) for _ in range(NUM_BLOCKS)))
    if options:
        apply_activation_checkpointing(stack, check_fn=lambda m: isinstance(m, Block), **options)
    return stack


def stack_input() -> Tensor:
    return leaf(BATCH, SEQ_LEN, WIDTH)


def step(stack):
    """Gradients, and the FLOPs of backward."""
    stack.zero_grad()
    x = stack_input()
    loss = stack(x).square().sum()
    with FlopCounterMode(display=False, custom_mapping=EXTRA) as counter:
        loss.backward()
    return [x.grad, *(p.grad for p in stack.parameters())], counter.get_total_flops()


def test_the_flops_of_a_plain_forward_and_backward_are_those_of_this_file():
    stack, x = new_stack(), stack_input()
    with FlopCounterMode(display=False, custom_mapping=EXTRA) as counter:
        stack(x)
    forward = QKV + ATTENTION + OUT + UP + DOWN
    # A block's forward under a counting mode goes through the same kernels.
    assert counter.get_total_flops() in (NUM_BLOCKS * forward, NUM_BLOCKS * (forward - ATTENTION))
    _, flops = step(stack)
    assert flops == NUM_BLOCKS * 2 * (QKV + OUT + UP + DOWN)


@each_policy
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_costs_plain_backward_and_what_the_policy_repeats(name, inplace):
    make, _, repeated = POLICIES[name]
    expected, plain_flops = step(new_stack())
    stack = new_stack(policy=make(), impl=REPLAY, inplace=inplace)
    step(stack)  # This one's backward is checked by a rerun.
    for _ in range(2):
        ours, flops = step(stack)
        assert_equal(ours, expected)
        assert flops - plain_flops == NUM_BLOCKS * repeated


@each_policy
@pytest.mark.parametrize("verify", ["first", "never"])
def test_the_first_backward_costs_the_same(name, verify):
    """The rerun that the first replay is compared with is hidden from counters."""
    make, _, repeated = POLICIES[name]
    expected, plain_flops = step(new_stack())
    ours, flops = step(new_stack(policy=make(), impl=REPLAY, verify=verify))
    assert_equal(ours, expected)
    assert flops - plain_flops == NUM_BLOCKS * repeated


@each_policy
def test_a_rerun_with_the_policys_contexts_costs_the_same(name):
    make, _, repeated = POLICIES[name]
    expected, plain_flops = step(new_stack())
    ours, flops = step(new_stack(policy=make(), impl=NO_REENTRANT))
    assert_equal(ours, expected)
    assert flops - plain_flops == NUM_BLOCKS * repeated


def test_products_inside_the_math_kernel_of_attention_are_kept_too():
    with sdpa_kernel(SDPBackend.MATH):
        expected, plain_flops = step(new_stack())
        none = new_stack(policy=recompute_all(), verify="never")
        _, all_flops = step(none)
        stack = new_stack(policy=save_matmuls(), verify="never")
        ours, flops = step(stack)
    assert_equal(ours, expected)
    assert flops == plain_flops
    assert all_flops - plain_flops == NUM_BLOCKS * (QKV + ATTENTION + OUT + UP)


def test_a_second_backward_through_the_same_graph_costs_the_same():
    _, plain_flops = step(new_stack())
    stack = new_stack(policy=save_every_other_matmul(), verify="never")
    loss = stack(stack_input()).square().sum()
    for _ in range(3):
        with FlopCounterMode(display=False, custom_mapping=EXTRA) as counter:
            loss.backward(retain_graph=True)
        repeated = NUM_BLOCKS * POLICIES["save_every_other_matmul"][2]
        assert counter.get_total_flops() - plain_flops == repeated


def test_the_gradient_of_the_input_alone_repeats_no_more_than_it_needs():
    """Without gradients of weights: no product's input is needed, only what is not linear."""
    stack = new_stack(policy=recompute_all(), verify="never").requires_grad_(False)
    plain = new_stack().requires_grad_(False)

    def input_flops(stack):
        x = stack_input()
        loss = stack(x).square().sum()
        with FlopCounterMode(display=False, custom_mapping=EXTRA) as counter:
            loss.backward()
        return x.grad, counter.get_total_flops()

    expected, plain_flops = input_flops(plain)
    ours, flops = input_flops(stack)
    assert torch.equal(ours, expected)
    # norm, attention and gelu read what they got, so all but the last product runs again.
    assert flops - plain_flops == NUM_BLOCKS * (QKV + ATTENTION + OUT + UP)
    assert plain_flops == NUM_BLOCKS * (QKV + OUT + UP + DOWN)


# --- Operators that nobody needs ----------------------------------------------------------------


def operators_of_backward(function, *inputs, policy=None):
    out = checkpoint(function, *inputs, policy=policy, impl=REPLAY, verify="never")
    with Operators() as operators:
        out.sum().backward()
    return operators


def plain_operators_of_backward(function, *inputs):
    out = function(*inputs)
    with Operators() as operators:
        out.sum().backward()
    return operators


def replayed(function, *inputs, **options) -> dict[str, int]:
    """The operators of backward beyond plain's."""
    tensors = [t.detach().clone().requires_grad_() for t in inputs]
    ours = operators_of_backward(function, *inputs, **options)
    return dict(ours.counts - plain_operators_of_backward(function, *tensors).counts)


def test_a_dead_tail_is_not_run():
    def region(x, w):
        y = x.sin().exp()  # exp's result is saved twice: by itself and by the product
        return (y @ w).neg() + 1  # none of these three is

    assert replayed(region, leaf(8, 8), leaf(8, 8, seed=1)) == {"sin": 1, "exp": 1}


def test_a_dead_branch_is_not_run():
    def region(x, w):
        unused = (x @ w).exp().cumsum(0)
        assert unused.shape == x.shape
        logged = x.detach().sinh().mean()
        return (x * 2).sin() + 0 * float(logged > 1e9)

    assert replayed(region, leaf(8, 8), leaf(8, 8, seed=1)) == {"mul": 1}


def test_operators_before_a_kept_output_are_not_run():
    def region(x, w):
        return ((x.sin().exp().tanh()) @ w).cos()

    # The product is linear in both: it saves tanh's result, which has to come back.
    assert replayed(region, leaf(8, 8), leaf(8, 8, seed=1), policy=[aten.mm]) == {
        "sin": 1,
        "exp": 1,
        "tanh": 1,
    }
    assert replayed(region, leaf(8, 8), leaf(8, 8, seed=1), policy=[aten.tanh, aten.mm]) == {
        "sin": 1,
        "exp": 1,
    }
    everything = [aten.sin, aten.exp, aten.tanh, aten.mm]
    assert replayed(region, leaf(8, 8), leaf(8, 8, seed=1), policy=everything) == {}


def test_a_chain_of_which_backward_reads_only_the_middle():
    def region(x):
        for _ in range(5):
            x = x + 1
        x = x.sin()
        for _ in range(5):
            x = x * 2
        return x

    assert replayed(region, leaf(4)) == {"add": 5}


def test_of_a_block_only_the_tail_is_left_out():
    module = checkpoint_wrapper(new_stack()[0], policy=recompute_all(), verify="never")
    loss = module(stack_input()).sum()
    seen = module._checkpoint_region.experience
    with Operators() as operators:
        loss.backward()
    stats = seen.stats
    assert (operators["addmm"], operators["gelu"]) == (3, 1)
    # The last product, the view of its result and the sum with the residual.
    assert (stats.num_dropped, stats.num_kept) == (3, 0)
    assert stats.num_replayed == stats.num_needed == stats.num_operators - 3


def test_a_region_without_saved_tensors_runs_nothing():
    assert replayed(lambda x: (x + 1).sum(), leaf(4)) == {}


# --- Memory after forward -------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Watches the memory that operators allocate."""

    def __init__(self) -> None:
        super().__init__()
        self._watched = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._watched[storage._cdata] = (watch(tensor), storage.nbytes())
        return out

    @property
    def live_bytes(self) -> int:
        return sum(size for reference, size in self._watched.values() if not reference.expired())


@each_policy
@pytest.mark.parametrize("inplace", [False, True])
def test_after_forward_a_stack_keeps_inputs_and_what_the_policy_keeps(name, inplace):
    make, kept_bytes, _ = POLICIES[name]
    stack = new_stack(policy=make(), impl=REPLAY, inplace=inplace, verify="never")
    x = stack_input()
    for _ in range(2):  # The first forward of a region is also measured.
        with Allocations() as allocations:
            out = stack(x)
        assert allocations.live_bytes == NUM_BLOCKS * (kept_bytes + D)  # each block's output
        out.sum().backward()
        del out
        assert allocations.live_bytes == 0


@each_policy
def test_the_check_of_the_first_replay_needs_no_more_memory_after_forward(name):
    make, kept_bytes, _ = POLICIES[name]
    stack, x = new_stack(policy=make(), impl=REPLAY), stack_input()
    with Allocations() as allocations:
        out = stack(x)
    assert allocations.live_bytes == NUM_BLOCKS * (kept_bytes + D)
    del out
    assert allocations.live_bytes == 0


def test_what_a_plain_stack_keeps_after_forward():
    """What the figures above are to be compared with."""
    stack, x = new_stack(), stack_input()
    with Allocations() as allocations:
        out = stack(x)
    norm_statistics = 4 * TOKENS * 4
    assert allocations.live_bytes == NUM_BLOCKS * (16 * D + STATISTICS + norm_statistics)
    assert out.shape == (BATCH, SEQ_LEN, WIDTH)


@each_policy
def test_the_measured_bytes_are_the_real_ones(name):
    make, kept_bytes, _ = POLICIES[name]
    stack = new_stack(policy=make(), impl=REPLAY)
    stack(stack_input())
    for block in stack:
        measured = block._checkpoint_region.experience.measured
        assert measured.kept_bytes == kept_bytes


@each_policy
def test_backward_holds_what_one_block_needs_at_a_time(name):
    """Between two blocks nothing recomputed is left."""
    make, kept_bytes, _ = POLICIES[name]
    stack = new_stack(policy=make(), impl=REPLAY, verify="never")
    x = stack_input()
    left = []
    with Allocations() as allocations:
        h = x
        for block in stack:
            h.register_hook(lambda grad: left.append(allocations.live_bytes))
            h = block(h)
        loss = h.sum()
        del h
        loss.backward()
    # Outputs of blocks that are inputs of others, what blocks before this one keep, the loss,
    # two gradients in flight, and the gradients of the parameters so far.
    parameters = sum(p.nbytes for p in stack[0].parameters())
    for num_left, live in enumerate(reversed(left)):
        num_done = NUM_BLOCKS - num_left
        ceiling = num_left * (kept_bytes + D) + num_done * parameters + 3 * D + 4
        assert live <= ceiling, (num_left, live, ceiling)
