"""Which outputs a policy keeps: presets on a transformer block, users' policies, bad ones."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint as theirs

from scripts.model import GPT, Block, GPTConfig
from tests.conftest import surroundings
from tests.engine.helpers import NO_REENTRANT, REENTRANT, Call, Operators, assert_equal, leaf, watch
from tests.test_compile import CountMatmuls
from wrappers import (
    CheckpointError,
    CheckpointImpl,
    CheckpointPolicy,
    Policy,
    TierStats,
    apply_activation_checkpointing,
    checkpoint,
    checkpoint_wrapper,
    create_selective_checkpoint_contexts,
    offload_stats,
)
from wrappers.offload.simulated import SimulatedTransport
from wrappers.offload.store import finish_offloading, reset_offloading
from wrappers.policies import (
    as_policy,
    offload_larger_than,
    planned,
    recompute_all,
    recompute_matmuls_of,
    save_attention,
    save_compute_and_communication,
    save_every_other_matmul,
    save_matmuls,
)

pytestmark = pytest.mark.usefixtures("seeded")

REPLAY = CheckpointImpl.REPLAY
aten = torch.ops.aten
SDPA = "_scaled_dot_product_flash_attention_for_cpu"

WIDTH, NUM_HEADS, SEQ_LEN, BATCH = 32, 4, 16, 2
CONFIG = GPTConfig(num_layers=2, d_model=WIDTH, num_heads=NUM_HEADS, seq_len=SEQ_LEN, dropout=0)
#: Bytes of one tensor of (batch, sequence, width), and of the softmax statistics.
D = BATCH * SEQ_LEN * WIDTH * 4
STATISTICS = BATCH * SEQ_LEN * NUM_HEADS * 4
#: The second matrix of the feed-forward's first product, as the product sees it.
UP = (WIDTH, 4 * WIDTH)


@pytest.fixture(autouse=True)
def _clean(request):
    """Nothing may be left behind; only the compiler keeps a thread."""
    if "fresh_compiler" not in request.fixturenames:
        request.getfixturevalue("no_leaks")


def new_block() -> Block:
    torch.manual_seed(0)
    return Block(CONFIG)


def block_input() -> Tensor:
    return leaf(BATCH, SEQ_LEN, WIDTH)


def wrapped(function, policy, **options) -> nn.Module:
    return checkpoint_wrapper(Call(function), policy=policy, **options)


def experience(module):
    return module._checkpoint_region.experience


def step(module, *inputs):
    """The output, all gradients and the operators that backward has run."""
    module.zero_grad()
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = module(*inputs)
    loss = out.square().sum()
    with Operators() as operators:
        loss.backward()
    params = (p.grad for p in module.parameters())
    return [out, *(t.grad for t in inputs), *params], operators


def two_mms(x, a, b):
    return ((x @ a).sin() @ b).tanh()


def three_mms(x, a, b):
    return (((x @ a).sin() @ b).sin() @ a).sin()


def matrices() -> list[Tensor]:
    return [leaf(8, 8, seed=seed) for seed in range(3)]


def plan_every_other_product() -> Policy:
    """A plan that keeps the first and the third of a block's four products."""
    name = "aten.addmm.default"
    save = CheckpointPolicy.MUST_SAVE
    return planned({(name, 0): save, (name, 2): save}, counts={name: 4}, strict=True)


MM = 8 * 8 * 4  # Bytes of one product of these.


def num_extra_mms(module, *, num_products=2) -> int:
    """How many products backward runs beyond its own; the gradients must be plain's."""
    expected, plain = step(Call(module.function), *matrices())
    ours, operators = step(module, *matrices())
    assert_equal(ours, expected)
    assert plain["mm"] == 2 * num_products
    return operators["mm"] - plain["mm"]


# --- Presets on a block -----------------------------------------------------------------------

#: Preset: its outputs kept, their bytes, and the products and attentions that backward repeats.
PRESETS = {
    "recompute_all": (recompute_all, 0, 0, 3, 1),
    "save_matmuls": (save_matmuls, 3, 8 * D, 0, 1),
    "save_every_other_matmul": (save_every_other_matmul, 2, 7 * D, 1, 1),
    "planned": (plan_every_other_product, 2, 7 * D, 1, 1),
    "save_attention": (save_attention, 1, D + STATISTICS, 3, 0),
    "save_compute_and_communication": (
        save_compute_and_communication,
        4,
        9 * D + STATISTICS,
        0,
        0,
    ),
    "recompute_matmuls_of": (lambda: save_matmuls() | recompute_matmuls_of([UP]), 2, 4 * D, 1, 1),
    "list of packets": (lambda: [aten.addmm, aten.mm], 3, 8 * D, 0, 1),
}


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_block_keeps_and_what_backward_repeats(name):
    make, num_kept, kept_bytes, num_products, num_attentions = PRESETS[name]
    expected, _ = step(new_block(), block_input())
    module = checkpoint_wrapper(new_block(), policy=make())
    seen = experience(module)
    for is_verified in (False, True):  # The first replay is compared with a rerun.
        assert seen.is_verified is is_verified
        ours, operators = step(module, block_input())
        assert_equal(ours, expected)
    assert seen.fallen_at is None, seen.reason
    assert seen.stats.num_kept == num_kept
    assert seen.measured.kept_bytes == kept_bytes
    assert seen.stats.num_replayed == seen.stats.num_needed
    assert (operators["addmm"], operators[SDPA]) == (num_products, num_attentions)


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_block_keeps_on_no_reentrant(name):
    make, _, _, num_products, num_attentions = PRESETS[name]
    expected, _ = step(new_block(), block_input())
    module = checkpoint_wrapper(new_block(), policy=make(), impl=NO_REENTRANT)
    ours, operators = step(module, block_input())
    assert_equal(ours, expected)
    # The rerun ends with the last product's input, so this product is not run again either.
    assert (operators["addmm"], operators[SDPA]) == (num_products, num_attentions)


def test_what_a_block_keeps_without_checkpointing():
    """The figure that the docstrings compare with: about 16 d."""
    block, x = new_block(), block_input()
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    norm_statistics = 4 * BATCH * SEQ_LEN * 4  # Mean and deviation, of two norms.
    total = sum(storage.nbytes() for storage in saved.values())
    assert total == 16 * D + STATISTICS + norm_statistics
    assert out.shape == x.shape


@pytest.mark.parametrize("name", PRESETS)
def test_kept_and_released_add_up_to_what_autograd_keeps(name):
    make = PRESETS[name][0]
    module = checkpoint_wrapper(new_block(), policy=make())
    module(block_input())
    measured = experience(module).measured
    total = 15 * D + STATISTICS + 4 * BATCH * SEQ_LEN * 4  # The block's input is not released.
    # The output projection is kept although autograd keeps its sum with the input only.
    is_projection_kept = name in {
        "save_matmuls",
        "save_compute_and_communication",
        "list of packets",
        "recompute_matmuls_of",
    }
    assert measured.kept_bytes + measured.released_bytes == total + is_projection_kept * D


def test_the_last_product_is_not_kept_as_backward_does_not_read_it():
    asked = []

    def policy(ctx, op, *args, **kwargs):
        asked.append(op)
        return op is aten.addmm.default

    module = checkpoint_wrapper(new_block(), policy=policy)
    module(block_input())
    assert asked.count(aten.addmm.default) == 4
    assert experience(module).stats.num_kept == 3


def test_the_up_projection_costs_a_third_of_the_forwards_products():
    products = [3 * WIDTH**2, WIDTH**2, 4 * WIDTH**2, 4 * WIDTH**2]
    assert 3 * UP[0] * UP[1] == sum(products)


def test_save_attention_finds_nothing_where_the_math_kernel_runs():
    expected = save_attention()
    module = checkpoint_wrapper(new_block(), policy=expected)
    with (
        sdpa_kernel(SDPBackend.MATH),
        pytest.warns(UserWarning, match=r"keeps the output of no operator.*aten\.bmm\.default"),
    ):
        module(block_input())


def test_save_matmuls_keeps_the_products_inside_the_math_kernel():
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = step(new_block(), block_input())
        module = checkpoint_wrapper(new_block(), policy=save_matmuls())
        step(module, block_input())
        ours, operators = step(module, block_input())
        plain_operators = step(new_block(), block_input())[1]
    assert_equal(ours, expected)
    assert experience(module).fallen_at is None, experience(module).reason
    assert (operators["addmm"], operators["bmm"]) == (0, plain_operators["bmm"])


# --- Combinations -----------------------------------------------------------------------------


def save_all(ctx, op, *args, **kwargs):
    return True


def save_none(ctx, op, *args, **kwargs):
    return False


@pytest.mark.parametrize(
    ("make", "num_kept", "num_extra"),
    [
        (lambda: save_matmuls() | recompute_matmuls_of([(8, 8)]), 0, 2),
        (lambda: recompute_matmuls_of([(8, 8)]) | save_matmuls(), 2, 0),
        (lambda: save_matmuls() | recompute_matmuls_of([(8, 9)]), 2, 0),
        (lambda: save_matmuls() | recompute_all(), 0, 2),
        (lambda: recompute_all() | save_matmuls(), 2, 0),
        (lambda: save_matmuls() | save_none, 0, 2),
        (lambda: save_none | save_matmuls(), 2, 0),
        (lambda: [aten.sin] | save_matmuls(), 3, 0),
        (lambda: save_matmuls() | [aten.sin], 3, 0),
        (lambda: {aten.sin.default} | save_matmuls(), 3, 0),
        (lambda: save_matmuls() | save_every_other_matmul(), 1, 1),
        (lambda: save_every_other_matmul() | save_matmuls(), 2, 0),
        (lambda: save_attention() | save_matmuls(), 2, 0),
        (lambda: save_matmuls() | recompute_all() | [aten.mm], 2, 0),
        (lambda: save_matmuls() | (recompute_all() | [aten.sin]), 1, 2),
    ],
)
@pytest.mark.filterwarnings("ignore:.*keeps the output of no operator")
def test_where_both_have_an_opinion_the_right_one_counts(make, num_kept, num_extra):
    module = wrapped(three_sines, make())
    module(*matrices())
    seen = experience(module)
    assert seen.stats.num_kept == num_kept
    assert num_extra_mms(module) == num_extra
    assert num_extra_mms(module) == num_extra  # Now without the comparison with a rerun.
    assert seen.fallen_at is None, seen.reason


def three_sines(x, a, b):
    """Backward needs both products and the sine between them."""
    return ((x @ a).sin() @ b).sin()


def test_a_preset_is_returned_as_it_is():
    policy = save_matmuls()
    assert as_policy(policy) is policy


def test_equal_lists_are_equal_policies():
    assert save_matmuls() == save_matmuls()
    assert hash(save_matmuls()) == hash(save_matmuls())
    assert save_matmuls() != save_attention()
    assert as_policy([aten.mm.default]) == as_policy((aten.mm.default,))
    assert recompute_all() == recompute_all()


# --- Lists and functions ----------------------------------------------------------------------


def torchs_policy(ctx, op, *args, **kwargs):
    """As for torch.utils.checkpoint: it looks at both attributes of the context."""
    assert ctx.is_recompute in (True, False)
    if op == aten.mm.default:
        return theirs.CheckpointPolicy.MUST_SAVE
    return theirs.CheckpointPolicy.PREFER_RECOMPUTE


GIVEN = {
    "overload": [aten.mm.default],
    "packet": [aten.mm],
    "tuple": (aten.mm.default,),
    "set": {aten.mm.default, aten.bmm.default},
    "bools": lambda ctx, op, *args, **kwargs: op is aten.mm.default,
    "torch's": torchs_policy,
    "ours": lambda ctx, op, *args, **kwargs: (
        CheckpointPolicy.MUST_SAVE if op is aten.mm.default else CheckpointPolicy.MUST_RECOMPUTE
    ),
}
each_impl = pytest.mark.parametrize("impl", [REPLAY, NO_REENTRANT])


@each_impl
@pytest.mark.parametrize("given", GIVEN)
def test_every_way_to_give_a_policy(given, impl):
    module = wrapped(three_sines, GIVEN[given], impl=impl)
    assert [num_extra_mms(module) for _ in range(2)] == [0, 0]
    if impl is REPLAY:
        assert experience(module).stats.num_kept == 2
        assert experience(module).measured.kept_bytes == 2 * MM
        assert experience(module).fallen_at is None


def test_what_a_function_is_told_on_replay():
    told = []

    def policy(ctx, op, *args, **kwargs):
        told.append((ctx.is_recompute, op, len(args), kwargs, ctx.op_output.dtype))
        return True

    module = wrapped(lambda x, y: (x @ y).to(torch.float64).sin(), policy)
    module(leaf(2, 3), leaf(3, 4)).sum().backward()
    assert told == [
        (False, aten.mm.default, 2, {}, torch.float32),
        (False, aten._to_copy.default, 1, {"dtype": torch.float64}, torch.float64),
        (False, aten.sin.default, 1, {}, torch.float64),
    ]


#: Answers that keep an output.
SAVING = {CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE}
OFFLOADING = {CheckpointPolicy.MUST_CPU_OFFLOAD, CheckpointPolicy.PREFER_CPU_OFFLOAD}


@each_impl
@pytest.mark.parametrize("answer", list(CheckpointPolicy))
@pytest.mark.filterwarnings("ignore:.*keeps the output of no operator")
@pytest.mark.filterwarnings("ignore:.*that are there already")
def test_every_member_of_the_enum(answer, impl):
    def policy(ctx, op, *args, **kwargs):
        return answer if op is aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    module = wrapped(three_sines, policy, impl=impl)
    num_extra = 0 if answer in SAVING | OFFLOADING else 2
    assert [num_extra_mms(module) for _ in range(2)] == [num_extra] * 2
    if impl is REPLAY:
        assert experience(module).stats.num_kept == 2 - num_extra


@pytest.mark.parametrize("make", [save_matmuls, lambda: save_attention() | [aten.mm]])
def test_our_presets_in_torchs_contexts(make):
    def run(*args):
        context_fn = partial(theirs.create_selective_checkpoint_contexts, make())
        with theirs.set_checkpoint_early_stop(False):
            return theirs.checkpoint(three_sines, *args, use_reentrant=False, context_fn=context_fn)

    module = Call(run)
    expected, plain = step(Call(three_sines), *matrices())
    ours, operators = step(module, *matrices())
    assert_equal(ours, expected)
    assert operators["mm"] == plain["mm"]


@pytest.mark.parametrize("function", [two_mms, three_mms])
def test_a_counting_policy_in_torchs_contexts(function):
    """torch asks again in the recompute, where the count must begin again."""

    def run(*args):
        policy = save_every_other_matmul().start()
        context_fn = partial(theirs.create_selective_checkpoint_contexts, policy)
        with theirs.set_checkpoint_early_stop(False):
            return theirs.checkpoint(function, *args, use_reentrant=False, context_fn=context_fn)

    expected, plain = step(Call(function), *matrices())
    ours, operators = step(Call(run), *matrices())
    assert_equal(ours, expected)
    assert operators["mm"] == plain["mm"] + 1


def test_our_presets_in_our_contexts():
    def run(*args):
        context_fn = partial(create_selective_checkpoint_contexts, save_every_other_matmul())
        return checkpoint(three_mms, *args, context_fn=context_fn, early_stop=False)

    expected, plain = step(Call(three_mms), *matrices())
    ours, operators = step(Call(run), *matrices())
    assert_equal(ours, expected)
    assert operators["mm"] == plain["mm"] + 1


@each_impl
def test_every_other_matmul_is_counted_anew_in_each_forward(impl):
    module = wrapped(three_mms, save_every_other_matmul(), impl=impl)
    # Of three products the first and the third are kept. Going on, the next forward would keep
    # the second alone.
    assert [num_extra_mms(module, num_products=3) for _ in range(3)] == [1, 1, 1]
    if impl is REPLAY:
        assert experience(module).stats.num_kept == 2


def test_two_forwards_at_once_do_not_count_together():
    module = wrapped(three_mms, save_every_other_matmul())
    kept = []
    outs = []
    for _ in range(2):
        outs.append(module(*matrices()))
        kept.append(experience(module).stats.num_kept)
    assert kept == [2, 2]
    with Operators() as operators:
        (outs[0].sum() + outs[1].sum()).backward()
    assert operators["mm"] >= 2 * (6 + 1)


# --- Offload ----------------------------------------------------------------------------------


@pytest.fixture
def device():
    """Every tensor lies on a device; copies to and from the host take no time.

    Nothing of what was offloaded may be left at the end of the test.
    """
    reset_offloading()
    with SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0.0) as device:
        yield device
        finish_offloading()
        assert (host().num_alive, host().used_bytes) == (0, 0)


def host() -> TierStats:
    """What the host tier has done so far."""
    return offload_stats()["host"]


def offload_matmuls(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_CPU_OFFLOAD if op is aten.mm.default else False


@each_impl
def test_offloaded_products_are_copied_there_and_back_and_not_run_again(device, impl):
    module = wrapped(three_sines, offload_matmuls, impl=impl, verify="never")
    expected, plain = step(Call(three_sines), *matrices())
    inputs = matrices()
    out = module(*inputs)
    assert (host().num_out, host().out_bytes, host().num_back) == (2, 2 * MM, 0)
    with Operators() as operators:
        out.square().sum().backward()
    assert (host().num_out, host().num_back, host().back_bytes) == (2, 2, 2 * MM)
    assert operators["mm"] == plain["mm"]
    assert_equal([out, *(t.grad for t in inputs)], expected)
    if impl is REPLAY:
        assert experience(module).stats.num_offloaded == 2
        assert experience(module).stats.num_kept == 2


@each_impl
def test_the_memory_of_an_offloaded_product_is_free_after_the_forward(device, impl):
    watches = []

    def region(x, a):
        y = x @ a
        watches.append(watch(y))
        return y.sin()

    out = wrapped(region, offload_matmuls, impl=impl, verify="never")(leaf(8, 8), leaf(8, 8))
    assert [w.expired() for w in watches] == [True]
    out.sum().backward()


def test_the_check_of_the_first_replay_agrees_with_offloaded_values(device):
    module = wrapped(three_sines, offload_matmuls)
    expected, _ = step(Call(three_sines), *matrices())
    for _ in range(2):
        assert_equal(step(module, *matrices())[0], expected)
    assert experience(module).is_verified
    assert experience(module).fallen_at is None


@pytest.mark.filterwarnings("ignore:.*keeps the output of no operator")
def test_offload_larger_than_counts_bytes(device):
    def region(x, a):
        wide = x @ a  # (8, 16): 512 bytes
        return wide.sin() @ a.t()  # (8, 8): 256 bytes

    def num_offloaded(limit):
        module = wrapped(lambda x, a: region(x, a).sin(), offload_larger_than(limit))
        module(leaf(8, 8), leaf(8, 16)).sum().backward()
        return experience(module).stats.num_offloaded

    # What is moved at first; what backward does not need is let go again.
    assert num_offloaded(8 * 16 * 4) == 0
    assert num_offloaded(8 * 16 * 4 - 1) == 2  # the product and its sine
    assert num_offloaded(8 * 8 * 4) == 2
    assert num_offloaded(8 * 8 * 4 - 1) >= 3


def test_offload_larger_than_alone_moves_what_a_block_keeps(device):
    block = checkpoint_wrapper(new_block(), policy=offload_larger_than(0), verify="never")
    block(block_input())
    measured = experience(block).measured
    assert measured.released_bytes == 0
    assert measured.kept_bytes == 15 * D + STATISTICS + 4 * BATCH * SEQ_LEN * 4


def test_matmuls_stay_on_the_device_where_the_right_side_keeps_them(device):
    module = wrapped(three_sines, offload_larger_than(0) | save_matmuls())
    module(*matrices())
    stats = experience(module).stats
    assert stats.num_kept == 3  # two products, and the sine between them
    assert host().out_bytes == 2 * MM
    assert stats.num_offloaded == host().num_out == 2  # both sines, the last one for nothing
    assert num_extra_mms(module) == 0


def test_without_an_accelerator_outputs_stay_where_they_are_and_this_is_said_once():
    watches = []

    def region(x, a):
        y = x @ a
        watches.append(watch(y))
        return y.sin()

    module = checkpoint_wrapper(Call(region), policy=offload_matmuls, verify="never")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            out = module(leaf(8, 8), leaf(8, 8, seed=1)).sum()
    (warning,) = said
    assert "moves outputs to the host that are there already" in str(warning.message)
    assert not watches[-1].expired()  # The very memory, no copy of it.
    assert experience(module).stats.num_offloaded == 0
    assert experience(module).stats.num_kept == 1
    with Operators() as operators:
        out.backward()
    assert operators["mm"] == 2
    assert operators["_to_copy"] == 0


# --- A policy that matches nothing ------------------------------------------------------------


@each_impl
def test_a_policy_that_keeps_nothing_is_reported_once_with_the_operators_seen(impl):
    module = wrapped(two_mms, [aten.bmm], impl=impl)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            module(*matrices()).sum().backward()
    (warning,) = said
    assert "the policy keeps the output of no operator" in str(warning.message)
    for name in ("aten.mm.default", "aten.sin.default", "aten.tanh.default"):
        assert name in str(warning.message)
    assert "aten.detach" not in str(warning.message)


@each_impl
def test_the_report_names_the_region(impl):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    apply_activation_checkpointing(
        model, check_fn=lambda m: isinstance(m, nn.Linear), policy=[aten.bmm], impl=impl
    )
    with pytest.warns(UserWarning, match=r"^region `0`: the policy keeps"):
        model(leaf(2, 4))


@each_impl
@pytest.mark.parametrize(
    "policy", [recompute_all(), recompute_matmuls_of([(3, 3)])], ids=["recompute_all", "by shape"]
)
def test_a_policy_that_need_not_keep_anything_is_not_reported(policy, impl):
    module = wrapped(three_sines, policy, impl=impl)
    assert [num_extra_mms(module) for _ in range(2)] == [2, 2]


def test_kept_for_nothing_is_not_matched_nothing():
    """Backward of a sum reads neither of its terms: the product is let go."""
    module = wrapped(lambda x, a: x + x @ a, [aten.mm])
    module(leaf(8, 8), leaf(8, 8)).sum().backward()
    assert experience(module).stats.num_kept == 0


# --- Where a policy is given ------------------------------------------------------------------


def is_block(module) -> bool:
    return isinstance(module, Block)


def through_checkpoint(block, policy):
    return lambda x: checkpoint(block, x, policy=policy)


def through_wrapper(block, policy):
    return checkpoint_wrapper(block, policy=policy)


def in_place(block, policy):
    return checkpoint_wrapper(block, policy=policy, inplace=True)


def through_apply(block, policy):
    model = nn.Sequential(block)
    report = apply_activation_checkpointing(model, check_fn=is_block, policy=policy)
    assert report.wrapped == ("0",)
    return model


def through_apply_in_place(block, policy):
    model = nn.Sequential(block)
    apply_activation_checkpointing(model, check_fn=is_block, policy=policy, inplace=True)
    return model


@pytest.mark.parametrize(
    "way", [through_checkpoint, through_wrapper, in_place, through_apply, through_apply_in_place]
)
def test_a_policy_reaches_the_region_whichever_way_it_is_given(way):
    expected, _ = step(new_block(), block_input())
    block = new_block()
    call = way(block, save_matmuls())
    for _ in range(2):
        block.zero_grad()
        x = block_input()
        out = call(x)
        loss = out.square().sum()
        with Operators() as operators:
            loss.backward()
        assert_equal([out, x.grad, *(p.grad for p in block.parameters())], expected)
    assert (operators["addmm"], operators[SDPA]) == (0, 1)


def test_one_policy_object_serves_all_blocks_of_a_model():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    tokens = torch.randint(256, (BATCH, SEQ_LEN))
    model(tokens).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    apply_activation_checkpointing(model, check_fn=is_block, policy=save_every_other_matmul())
    for _ in range(2):
        model.zero_grad()
        model(tokens).square().sum().backward()
        assert_equal([p.grad for p in model.parameters()], expected)
    for block in model.blocks:
        assert experience(block).measured.kept_bytes == 7 * D
        assert experience(block).fallen_at is None, experience(block).reason


@pytest.mark.filterwarnings("ignore:region .* the policy keeps the output of no operator")
def test_checkpoint_takes_a_new_policy_at_every_call():
    def extra(policy):
        inputs = matrices()
        out = checkpoint(three_sines, *inputs, policy=policy, verify="never").sum()
        with Operators() as operators:
            out.backward()
        return operators["mm"] - 4

    for _ in range(2):
        assert extra(save_matmuls()) == 0
        assert extra(recompute_all()) == 2
        assert extra(save_matmuls() | recompute_matmuls_of([(8, 8)])) == 2
        assert extra(recompute_matmuls_of([(8, 8)]) | save_matmuls()) == 0
        assert extra(lambda ctx, op, *args, **kwargs: op is aten.mm.default) == 0
        assert extra(lambda ctx, op, *args, **kwargs: op is aten.sin.default) == 2


def test_a_region_with_a_policy_is_replayed_unless_told_otherwise():
    module = nn.Linear(2, 2)
    assert checkpoint_wrapper(module, policy=[aten.mm]).checkpoint_impl is REPLAY
    module = nn.Linear(2, 2)
    other = checkpoint_wrapper(module, policy=[aten.mm], impl=NO_REENTRANT)
    assert other.checkpoint_impl is NO_REENTRANT
    assert checkpoint_wrapper(nn.Linear(2, 2)).checkpoint_impl is NO_REENTRANT


# --- Compiled ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("make", "num_products"),
    [
        (recompute_all, 3),
        (save_matmuls, 0),
        (save_every_other_matmul, 1),
        (plan_every_other_product, 1),
        (lambda: save_matmuls() | recompute_matmuls_of([UP]), 1),
        (lambda: [aten.addmm], 0),
        (lambda: lambda ctx, op, *args, **kwargs: op is aten.addmm.default, 0),
    ],
    ids=["recompute_all", "save_matmuls", "every other", "plan", "by shape", "list", "function"],
)
def test_the_compiler_recomputes_what_the_policy_says(make, num_products):
    x = block_input()
    plain, counting = CountMatmuls(), CountMatmuls()
    torch.compile(new_block(), backend=plain, fullgraph=True)(x).square().sum().backward()
    module = checkpoint_wrapper(new_block(), policy=make())
    compiled = torch.compile(module, backend=counting, fullgraph=True)
    compiled(x).square().sum().backward()
    assert counting.forward == plain.forward == 4
    assert counting.backward - plain.backward == num_products


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("impl", [REPLAY, NO_REENTRANT])
def test_compiled_gradients_are_eagers(impl, inplace):
    expected, _ = step(new_block(), block_input())
    module = checkpoint_wrapper(
        new_block(), policy=save_every_other_matmul(), impl=impl, inplace=inplace
    )
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = block_input()
    out = compiled(x)
    out.square().sum().backward()
    got = [out, x.grad, *(p.grad for p in module.parameters())]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_policy_given_to_checkpoint_compiles_in_one_graph():
    block, x = new_block(), block_input()
    counting = CountMatmuls()
    policy = save_matmuls()
    torch.compile(lambda x: checkpoint(block, x, policy=policy), backend=counting, fullgraph=True)(
        x
    ).sum().backward()
    plain = CountMatmuls()
    torch.compile(block, backend=plain, fullgraph=True)(x).sum().backward()
    assert counting.backward == plain.backward


# --- Copies of wrapped modules ----------------------------------------------------------------


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize(
    ("make", "kept_bytes"),
    [
        (save_every_other_matmul, 7 * D),
        (plan_every_other_product, 7 * D),
        (save_compute_and_communication, 9 * D + STATISTICS),
        (lambda: save_matmuls() | recompute_matmuls_of([UP]), 4 * D),
        (recompute_all, 0),
    ],
    ids=["every other", "plan", "compute", "by shape", "nothing"],
)
def test_a_copy_of_a_wrapped_module_keeps_the_same(make, kept_bytes, copied, inplace):
    expected, _ = step(new_block(), block_input())
    module = checkpoint_wrapper(new_block(), policy=make(), inplace=inplace)
    step(module, block_input())
    other = copied(module)
    assert_equal(step(other, block_input())[0], expected)
    region = (other.forward if inplace else other)._checkpoint_region
    assert region.experience.measured.kept_bytes == kept_bytes
    assert region.experience.fallen_at is None


def test_a_users_function_is_copied_by_reference():
    module = checkpoint_wrapper(Call(three_sines), policy=torchs_policy)
    for other in (copy.deepcopy(module), by_pickle(module)):
        assert other._checkpoint_region.policy.function is torchs_policy
        assert num_extra_mms(other) == 0


# --- Bad input --------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("rubbish", [None, 1, "save", [], object()])
def test_a_policy_that_returns_something_else_names_operator_and_answer(rubbish, impl):
    module = wrapped(lambda x: x.sin().cos(), lambda *args, **kwargs: rubbish, impl=impl)
    before = surroundings()
    with pytest.raises(TypeError, match=r"must return a CheckpointPolicy or a bool") as info:
        module(leaf(3))
    assert "aten.sin.default" in str(info.value)
    assert repr(rubbish) in str(info.value)
    assert surroundings() == before


@each_impl
def test_the_error_survives_where_torch_turns_type_errors_of_operators_into_its_own(impl):
    """``x @ w`` makes "unsupported operand" of any TypeError from below."""
    module = wrapped(lambda x, w: x @ w, lambda *args, **kwargs: "save", impl=impl)
    with pytest.raises(TypeError, match=r"for aten\.mm\.default it returned 'save'"):
        module(leaf(3, 3), leaf(3, 3))


class OwnError(Exception):
    pass


@each_impl
def test_a_policy_that_raises_reaches_the_user_and_the_next_step_is_fine(impl):
    is_failing = True

    def policy(ctx, op, *args, **kwargs):
        if is_failing and op is aten.sin.default:
            raise OwnError("mine")
        return op is aten.mm.default

    module = wrapped(three_sines, policy, impl=impl)
    before, state = surroundings(), torch.get_rng_state()
    with pytest.raises(OwnError, match=r"^mine$"):
        module(*matrices())
    assert surroundings() == before
    assert torch.equal(torch.get_rng_state(), state)
    is_failing = False
    assert [num_extra_mms(module) for _ in range(2)] == [0, 0]
    if impl is REPLAY:
        assert experience(module).fallen_at is None


def test_a_static_policy_that_raises_is_asked_again_at_the_next_call():
    class Once(type(save_matmuls())):
        num_calls = 0

        def _answer(self, ctx, op, *args, **kwargs):
            Once.num_calls += 1
            if Once.num_calls == 1:
                raise OwnError("mine")
            return super()._answer(ctx, op, *args, **kwargs)

    module = wrapped(three_sines, Once([aten.mm.default], CheckpointPolicy.MUST_SAVE))
    with pytest.raises(OwnError):
        module(*matrices())
    assert num_extra_mms(module) == 0


REFUSED = {
    "reentrant": (
        {"policy": [aten.mm], "impl": REENTRANT},
        ValueError,
        "policy: not possible with",
    ),
    "context_fn": (
        {"policy": [aten.mm], "context_fn": partial(create_selective_checkpoint_contexts, [])},
        ValueError,
        "context_fn cannot be combined with policy",
    ),
    "context_fn on replay": (
        {"impl": REPLAY, "context_fn": partial(create_selective_checkpoint_contexts, [])},
        ValueError,
        "context_fn cannot be combined with policy or CheckpointImpl.REPLAY",
    ),
    "verify": ({"verify": "sometimes"}, ValueError, r"verify must be one of .* got 'sometimes'"),
    "number": ({"policy": 3}, TypeError, "a policy is a function .* got int"),
    "string": ({"policy": "mm"}, TypeError, "a policy is a function .* got str"),
    "list": ({"policy": [torch.mm]}, ValueError, "a policy list holds operators such as"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_and_unknown_values_are_refused(case):
    options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        checkpoint(torch.sin, leaf(3), **options)
    for inplace in (False, True):
        module = nn.Linear(3, 3)
        with pytest.raises(kind, match=message):
            checkpoint_wrapper(module, inplace=inplace, **options)
        assert "forward" not in vars(module)


def test_use_reentrant_with_a_policy_is_refused():
    with pytest.raises(ValueError, match="REENTRANT"):
        checkpoint(torch.sin, leaf(3), use_reentrant=True, policy=[aten.sin])


def test_apply_refuses_a_bad_policy_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(TypeError, match="a policy is a function"):
        apply_activation_checkpointing(model, check_fn=lambda m: True, policy=3)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("other", [3, None, "mm", [torch.mm]])
def test_a_preset_combines_with_policies_only(other):
    with pytest.raises((TypeError, ValueError), match="a policy"):
        save_matmuls() | other


# --- A kept output that is changed in place ---------------------------------------------------


@each_impl
def test_a_kept_output_changed_before_backward_is_refused_by_name(impl):
    stolen = []

    def region(x, w):
        y = x @ w
        stolen.append(y.detach())  # shares memory and version with what is kept
        return y * 2.0 + y.sin()

    module = wrapped(region, [aten.mm], impl=impl, verify="never")
    out = module(leaf(8, 8), leaf(8, 8, seed=1)).sum()
    stolen[0].add_(1)
    with pytest.raises(
        RuntimeError, match=r"output of aten\.mm\.default .*changed in place"
    ) as info:
        out.backward()
    if impl is REPLAY:
        assert isinstance(info.value, CheckpointError)
        assert "allow_cache_entry_mutation=True" in str(info.value)


@each_impl
def test_a_kept_output_changed_before_backward_is_used_if_allowed(impl):
    stolen = []

    def region(x, w):
        y = x @ w
        stolen.append(y.detach())
        return y.sin()

    x, w = leaf(8, 8), leaf(8, 8, seed=1)
    module = wrapped(region, [aten.mm], impl=impl, verify="never", allow_cache_entry_mutation=True)
    out = module(x, w).sum()
    stolen[0].add_(1)
    out.backward()
    changed = (x @ w + 1).detach()
    assert torch.equal(x.grad, changed.cos() @ w.detach().t())


def test_a_change_inside_the_region_after_the_output_was_kept():
    """The recorder sees the write: what was kept stays what it was."""

    def region(x, w):
        y = x @ w
        z = y * 1.0
        y.add_(1)
        return (z + y).sin()

    expected, _ = step(Call(region), leaf(8, 8), leaf(8, 8, seed=1))
    module = wrapped(region, [aten.mm])
    for _ in range(2):
        assert_equal(step(module, leaf(8, 8), leaf(8, 8, seed=1))[0], expected)
    assert experience(module).fallen_at is None


@pytest.mark.parametrize("allow", [False, True])
def test_nothing_is_said_where_nothing_is_changed(allow):
    module = wrapped(three_sines, save_matmuls(), allow_cache_entry_mutation=allow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [num_extra_mms(module) for _ in range(2)] == [0, 0]
