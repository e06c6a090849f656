"""Models of transformers with checkpointed blocks: nothing is changed but the memory.

The plain model is the reference: same loss, same gradients and the same random state afterwards,
bit by bit, in training with dropout.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import pickle
import re
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper as torch_wrapper,
)
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers")

from scripts.measure import memory_timeline  # noqa: E402
from tests.integrations import models  # noqa: E402
from tests.integrations.models import (  # noqa: E402
    FACES,
    TECHNIQUES,
    assert_equal,
    batch,
    block_names,
    gradients,
    make_model,
    saved_bytes,
    step,
)
from wrappers import (  # noqa: E402
    ActivationWrapper,
    CheckpointImpl,
    CheckpointWrapper,
    OffloadWrapper,
    WrapperError,
    _knobs,
    offload_stats,
    region_report,
)
from wrappers.integrations.transformers import disable, enable  # noqa: E402
from wrappers.policies import save_matmuls  # noqa: E402
from wrappers.select import all_but_last, by_class, by_name  # noqa: E402

REENTRANT, NO_REENTRANT, REPLAY = CheckpointImpl
IMPLS = pytest.mark.parametrize("impl", list(CheckpointImpl), ids=lambda impl: impl.name)
IN_PLACE = pytest.mark.parametrize("inplace", list(FACES.values()), ids=list(FACES))
ALL = pytest.mark.parametrize("name", list(models.BLOCKS))
WITH_CACHE = pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5"])
NO_LEAKS = pytest.mark.usefixtures("no_leaks")


@functools.cache
def plain_step(name, attention="sdpa"):
    """Loss, gradients, random state afterwards and the bytes kept, of the plain model."""
    model = make_model(name, attention)
    loss = step(model, name)
    state = torch.get_rng_state()
    found = gradients(model)
    return loss, found, state, saved_bytes(model, name)


def assert_equals_plain(model, name, attention="sdpa", *, is_exact=True):
    expected_loss, expected, state, _ = plain_step(name, attention)
    model.zero_grad()
    assert torch.equal(step(model, name), expected_loss)
    assert torch.equal(torch.get_rng_state(), state)
    if is_exact:
        assert_equal(gradients(model), expected)
    else:
        torch.testing.assert_close(gradients(model), expected)


# --- A step


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@IN_PLACE
@pytest.mark.parametrize("technique", list(TECHNIQUES))
@ALL
def test_a_step_is_the_plain_models(name, technique, inplace, attention):
    model = make_model(name, attention)
    names = block_names(model, name)
    state_names = list(model.state_dict())
    report = enable(model, inplace=inplace, **TECHNIQUES[technique])
    assert report.wrapped == names
    assert len(names) == (4 if name == "t5" else 2)
    assert not report.skipped
    assert list(model.state_dict()) == state_names
    for block in map(model.get_submodule, names):
        assert isinstance(block, ActivationWrapper) is not inplace
        assert ("forward" in vars(block)) is inplace
    is_exact = (name, technique) != ("t5", "REENTRANT")  # see the test of T5 below
    for _ in range(2):  # the first replay is compared with a rerun, the second is not
        assert_equals_plain(model, name, attention, is_exact=is_exact)
    assert disable(model) == len(names)
    assert_equals_plain(model, name, attention)
    assert [type(model.get_submodule(n)).__name__ for n in names] == [models.BLOCKS[name]] * len(
        names
    )
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_reentrant_adds_up_the_gradient_of_what_t5_blocks_share_as_torch_does():
    """The encoder's output goes into all blocks of the decoder, twice into each.

    A REENTRANT block adds up its own two shares first, which is another order than the plain
    model's. Torch's has the same order, and the same bits.
    """
    theirs = make_model("t5")
    switch_on(theirs, use_reentrant=True)
    step(theirs, "t5")
    model = make_model("t5")
    enable(model, impl=REENTRANT)
    step(model, "t5")
    assert_equal(gradients(model), gradients(theirs))
    plain = plain_step("t5")[1]
    got = gradients(model)
    decoder = {n: g for n, g in plain.items() if n.startswith("decoder.")}
    assert_equal({n: got[n] for n in decoder}, decoder)


# --- Memory


def moved_bytes():
    return sum(tier.out_bytes for tier in offload_stats().tiers)


@IN_PLACE
@pytest.mark.parametrize("technique", list(TECHNIQUES))
@ALL
def test_activations_are_dropped(name, technique, inplace):
    model = make_model(name)
    enable(model, inplace=inplace, **TECHNIQUES[technique])
    moved = moved_bytes()
    kept = saved_bytes(model, name) / plain_step(name)[3]
    rows = region_report(model).rows
    if technique == "REPLAY, policy":
        assert 0.3 < kept < 0.7
        assert all(row.num_kept and row.released_bytes for row in rows)
    else:
        assert kept < 0.3
    if "REPLAY" in technique:
        assert {row.impl for row in rows} == {REPLAY}
        assert all(row.num_replayed and not row.reason and not row.note for row in rows)
    if "offload" in technique:
        assert not rows
        assert moved_bytes() > moved


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@IN_PLACE
@IMPLS
def test_a_block_is_recomputed_once(impl, inplace):
    """The last product of a block is not: nothing saves its output."""
    plain = make_model("llama", "eager")
    tokens = models.BATCH * models.LENGTH
    head = 2 * tokens * models.WIDTH * models.VOCABULARY
    with torch.no_grad():
        blocks = flops(lambda: plain(**batch("llama"))) - head
    last_products = models.NUM_LAYERS * 2 * tokens * 2 * models.WIDTH * models.WIDTH
    expected = flops(lambda: step(plain, "llama")) + blocks
    model = make_model("llama", "eager")
    enable(model, impl=impl, inplace=inplace)
    step(model, "llama")
    got = flops(lambda: step(model, "llama"))
    assert got == (expected if impl is REENTRANT else expected - last_products)


# --- A memory budget


def planned_gpt2():
    """Four blocks, and a batch as a tokenizer makes it, in which nothing is padded."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=64,
        n_layer=4,
        n_head=2,
        loss_type="ForCausalLM",
        use_cache=False,
        **models._SPECIAL_TOKENS,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    tokens = torch.randint(4, 256, (4, 64))
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}

    def step():
        torch.manual_seed(7)
        out = model(**batch)
        out.loss.backward()
        found = gradients(model)
        model.zero_grad()
        return found

    return model, batch, step


@pytest.mark.parametrize("inplace", [True, False])
def test_a_planned_step_takes_what_was_predicted(inplace, monkeypatch):
    monkeypatch.setattr(_knobs, "PLAN_MENU_RUNS", 16)
    model, batch, step = planned_gpt2()
    expected = step()
    names = block_names(model, "gpt2")
    report = enable(
        model,
        memory_budget="6.2MiB",
        sample=batch,
        count="activations",
        hardware="CPU",
        inplace=inplace,
    )
    assert sorted((*report.wrapped, *report.skipped)) == sorted(names)
    assert report.wrapped
    assert_equal(step(), expected)
    rows = region_report(model).rows
    assert [(row.fqn, row.impl, row.reason) for row in rows] == [
        (name, REPLAY, "") for name in report.wrapped
    ]
    got = memory_timeline(lambda: step().clear(), torch.device("cpu")).peak_bytes
    predicted = report.plan.peak_bytes - report.plan.uncounted_bytes
    assert abs(got / predicted - 1) < 1e-3
    assert 0.9 < got / (6.2 * 2**20) <= 1


def test_a_plan_for_blocks_that_are_wrapped_is_refused():
    model, batch, _ = planned_gpt2()
    enable(model)
    with pytest.raises(WrapperError, match=r"^block `transformer\.h\.0` is wrapped already"):
        enable(model, memory_budget="90%", sample=batch)


def test_where_planning_fails_the_model_is_as_it_was():
    model, _, _ = planned_gpt2()
    with pytest.raises(ValueError, match="a sample holds no tensor"):
        enable(model, memory_budget="90%", sample={})
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    "settings", [{"policy": save_matmuls()}, {"impl": NO_REENTRANT}, {"offload": True}]
)
def test_a_plan_decides_alone(settings):
    model, batch, _ = planned_gpt2()
    with pytest.raises(ValueError, match="leave out impl, policy and offload"):
        enable(model, memory_budget="90%", sample=batch, **settings)


def test_a_budget_and_a_sample_belong_together():
    model, batch, _ = planned_gpt2()
    for settings in ({"memory_budget": "90%"}, {"sample": batch}):
        with pytest.raises(ValueError, match="a memory_budget and a sample belong together"):
            enable(model, **settings)


# --- What is chosen


def test_every_second_block():
    model = make_model("t5")
    assert enable(model, every=2).wrapped == ("encoder.block.0", "decoder.block.0")
    assert_equals_plain(model, "t5")


def test_check_fn_chooses_among_the_blocks():
    model = make_model("t5")
    assert enable(model, check_fn=by_name("decoder.**")).wrapped == (
        "decoder.block.0",
        "decoder.block.1",
    )
    disable(model)
    blocks = by_class(type(model.encoder.block[0]))
    assert enable(model, check_fn=all_but_last(2, blocks), every=2).wrapped == ("encoder.block.0",)


def test_offload_alone_replaces_the_recompute_and_joins_it_otherwise():
    alone, both = make_model("llama"), make_model("llama")
    enable(alone, inplace=False, **TECHNIQUES["offload, disk"])
    enable(both, inplace=False, impl=NO_REENTRANT, **TECHNIQUES["offload, disk"])
    block = alone.model.layers[0]
    assert isinstance(block, OffloadWrapper)
    assert not isinstance(block._checkpoint_wrapped_module, CheckpointWrapper)
    block = both.model.layers[0]
    assert isinstance(block, OffloadWrapper)
    assert isinstance(block._checkpoint_wrapped_module, CheckpointWrapper)
    assert_equals_plain(both, "llama")
    assert disable(both) == 4
    host = make_model("llama")
    enable(host, offload=True, inplace=False)
    assert host.model.layers[0].offload_settings.tier == "host"


def test_settings_reach_the_regions():
    model = make_model("llama")
    enable(model, policy=save_matmuls(), verify="never")
    assert model.model.layers[0].forward.checkpoint_impl is REPLAY
    assert model.model.layers[0].forward._checkpoint_region.verify == "never"
    with pytest.raises(TypeError, match="unknown settings of a region: verfy"):
        enable(make_model("llama"), verfy="never")


def test_blocks_are_wrapped_once():
    model = make_model("llama")
    enable(model, every=2)
    with pytest.warns(UserWarning, match="1 modules are wrapped already"):
        report = enable(model)
    assert report.wrapped == ("model.layers.1",)
    assert list(report.skipped) == ["model.layers.0"]
    assert [len(block._forward_pre_hooks) for block in model.model.layers] == [1, 1]
    assert_equals_plain(model, "llama")
    assert disable(model) == 2


class Attention(nn.Module):
    def forward(self, x):
        return x


class OldBlock(nn.Module):
    """A block as in models that do not know GradientCheckpointingLayer."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(self.attention(x)).tanh()


class OldModel(nn.Module):
    _no_split_modules = ("OldBlock", "Embedding")

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False
        self.embed = nn.Embedding(4, 2)
        self.first = OldBlock()  # does not stand in a list
        self.blocks = nn.ModuleList([OldBlock(), OldBlock()])

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_of_a_model_that_only_names_their_class():
    model = OldModel()
    assert enable(nn.Sequential(model)).wrapped == ("0.blocks.0", "0.blocks.1")
    model(torch.arange(3)).sum().backward()
    model.gradient_checkpointing = True  # such a model's forward would checkpoint its blocks
    with pytest.raises(WrapperError, match=r"block `0\.blocks\.0`.*switched on after"):
        model(torch.arange(3))


def test_of_nested_blocks_the_inner_ones_are_wrapped():
    """As of the stages of Swin and their layers: a stage at once would be most of the model."""
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=4, depths=[1, 2], num_heads=[1, 1], window_size=2
    )
    model = transformers.SwinModel(config)
    names = [n for n, m in model.named_modules() if type(m).__name__ == "SwinLayer"]
    assert len(names) == 3
    assert list(enable(model).wrapped) == names


def test_a_model_without_blocks_is_an_error():
    with pytest.raises(WrapperError, match=r"no blocks found in a Linear.*check_fn=by_class"):
        enable(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected an nn\.Module to wrap, got str"):
        enable("gpt2")


def test_without_the_extra_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.modeling_layers", None)
    spec = importlib.util.find_spec("wrappers.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install -U 'activation-wrappers\[transformers\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# --- The cache of keys and values


@IMPLS
@IN_PLACE
@WITH_CACHE
def test_use_cache_in_training(name, inplace, impl):
    model = make_model(name, use_cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable(model, impl=impl, inplace=inplace)
    assert model.config.use_cache is True
    is_exact = (name, impl) != ("t5", REENTRANT)
    with pytest.warns(UserWarning, match="use_cache is on: the cache .* stays empty") as caught:
        assert_equals_plain(model, name, is_exact=is_exact)
    assert len(caught) == 1
    assert_equals_plain(model, name, is_exact=is_exact)  # said once
    kept = saved_bytes(model, name) / plain_step(name)[3]
    assert kept < 0.3
    assert model(**batch(name)).past_key_values.get_seq_length() == 0


class Called(transformers.modeling_layers.GradientCheckpointingLayer):
    """A block that tells what it is called with."""

    def forward(self, x, cache=None, use_cache=None, past_key_values=None):
        self.got = cache, use_cache, past_key_values
        return x.sin()


@IN_PLACE
def test_a_block_is_called_without_an_empty_cache_wherever_it_stands(inplace):
    model = nn.Sequential(Called())
    block = model[0]
    enable(model, inplace=inplace)
    x, cache = torch.ones(2, requires_grad=True), transformers.DynamicCache()
    with pytest.warns(UserWarning, match="stays empty"):
        model[0](x, cache, use_cache=True)
    assert block.got == (None, False, None)
    model[0](x, past_key_values=cache)
    assert block.got == (None, None, None)
    with torch.no_grad():
        model[0](x, cache, use_cache=True)
    assert block.got == (cache, True, None)


def test_the_cache_stays_empty_in_blocks_that_are_not_chosen_too():
    model = make_model("llama", use_cache=True)
    enable(model, check_fn=by_name("model.layers.1"))
    with pytest.warns(UserWarning, match="stays empty"):
        cache = model(**batch("llama")).past_key_values
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 0


@IMPLS
@IN_PLACE
@WITH_CACHE
def test_eval_and_generate_use_the_cache(name, inplace, impl):
    plain = make_model(name, use_cache=True).eval()
    model = make_model(name, use_cache=True)
    enable(model, impl=impl, inplace=inplace)
    step(model, name, use_cache=False)
    model.eval()
    inputs = batch(name)
    with torch.no_grad():
        got, expected = model(**inputs), plain(**inputs)
        assert torch.equal(got.logits, expected.logits)
        assert got.past_key_values.get_seq_length() == models.LENGTH
        tokens = inputs["input_ids"]
        generate = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(tokens, **generate), plain.generate(tokens, **generate))


def two_calls_with_a_cache(model):
    """The second call attends to the keys of the first, and its gradient goes there."""
    tokens = batch("llama")["input_ids"]
    first = model(tokens[:, :4], use_cache=True)
    second = model(tokens[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    second.logits.square().sum().backward()
    return second.logits


@NO_LEAKS
@IMPLS
@IN_PLACE
def test_a_cache_in_eval_with_grad_mode_works_without_a_region(inplace, impl):
    plain, model = make_model("llama").eval(), make_model("llama").eval()
    expected = two_calls_with_a_cache(plain)
    enable(model, impl=impl, inplace=inplace)
    with pytest.warns(UserWarning, match="such calls are not checkpointed") as caught:
        assert torch.equal(two_calls_with_a_cache(model), expected)
    assert len(caught) == 1
    assert_equal(gradients(model), gradients(plain))


@NO_LEAKS
@IMPLS
@IN_PLACE
def test_a_filled_cache_in_training_works_without_a_region(inplace, impl):
    def run(model):
        tokens = batch("llama")["input_ids"]
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model.eval()(tokens[:, :4], past_key_values=cache, use_cache=True)
        torch.manual_seed(0)
        model.train()(tokens[:, 4:], past_key_values=cache).logits.square().sum().backward()
        return gradients(model)

    model = make_model("llama")
    enable(model, impl=impl, inplace=inplace)
    with pytest.warns(UserWarning, match="such calls are not checkpointed"):
        got = run(model)
    assert_equal(got, run(make_model("llama")))


def set_use_cache(model, value):
    """In all configs: the decoder of a T5 has its own."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = value


def test_the_warning_says_how_to_be_rid_of_it():
    model = make_model("t5", use_cache=True)
    enable(model)
    model(**batch("t5"), use_cache=False)
    set_use_cache(model, False)
    model(**batch("t5"))


# --- What hooks inside a block record


@pytest.mark.parametrize("impl", [NO_REENTRANT, REPLAY], ids=lambda impl: impl.name)
@IN_PLACE
def test_router_logits_carry_gradients(inplace, impl):
    """The auxiliary loss of a mixture of experts, made from what hooks record in the blocks."""
    plain, model = make_model("mixtral"), make_model("mixtral")
    expected = step(plain, "mixtral", output_router_logits=True)
    assert not torch.equal(expected, plain_step("mixtral")[0])
    enable(model, impl=impl, inplace=inplace)
    assert torch.equal(step(model, "mixtral", output_router_logits=True), expected)
    assert_equal(gradients(model), gradients(plain))


@NO_LEAKS
@IN_PLACE
def test_reentrant_refuses_to_lose_the_gradient_of_router_logits(inplace):
    model = make_model("mixtral")
    enable(model, impl=REENTRANT, inplace=inplace)
    expected = (
        r"region `model\.layers\.0`: the block has stored tensors in `router_logits`.*or REPLAY"
    )
    with pytest.raises(WrapperError, match=expected) as caught:
        step(model, "mixtral", output_router_logits=True)
    assert caught.value.fqn == "model.layers.0"
    assert_equals_plain(model, "mixtral")


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if t != "REENTRANT"])
@IN_PLACE
def test_keys_that_blocks_share_carry_gradients(inplace, technique):
    """The last blocks of a Gemma 3n use keys and values of earlier blocks."""
    plain, model = make_model("gemma3n"), make_model("gemma3n")
    enable(model, inplace=inplace, **TECHNIQUES[technique])
    assert torch.equal(step(model, "gemma3n"), step(plain, "gemma3n"))
    assert_equal(gradients(model), gradients(plain))


@NO_LEAKS
@IN_PLACE
def test_reentrant_refuses_to_lose_the_gradient_of_shared_keys(inplace):
    model = make_model("gemma3n")
    enable(model, impl=REENTRANT, inplace=inplace)
    expected = (
        r"region `model\.layers\.0`: blocks find each other's tensors in `shared_kv_states`.*REPLAY"
    )
    with pytest.raises(WrapperError, match=expected):
        step(model, "gemma3n")


class Sharing(transformers.modeling_layers.GradientCheckpointingLayer):
    def forward(self, x, shared=None):
        shared["twice"] = 2 * x
        return x.sin()


@pytest.mark.filterwarnings("ignore:region `0` has stored a tensor:UserWarning")
@NO_LEAKS
@IN_PLACE
def test_reentrant_refuses_a_block_that_stores_tensors_in_a_dict(inplace):
    model = nn.Sequential(Sharing())
    enable(model, impl=REENTRANT, inplace=inplace)
    with pytest.raises(WrapperError, match=r"region `0`: the block has stored tensors in `shared`"):
        model[0](torch.ones(2, requires_grad=True), shared={})
    with torch.no_grad():
        model[0](torch.ones(2), shared={})


@IMPLS
@IN_PLACE
def test_hidden_states_are_those_between_the_blocks(inplace, impl):
    plain, model = make_model("llama"), make_model("llama")
    enable(model, impl=impl, inplace=inplace)

    def run(model):
        torch.manual_seed(0)
        hidden = model(**batch("llama"), output_hidden_states=True).hidden_states
        sum(h.square().sum() for h in hidden).backward()
        return [h.detach() for h in hidden]

    for got, expected in zip(run(model), run(plain), strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(gradients(model), gradients(plain))


# --- transformers' own gradient checkpointing


def switch_on(model, **kwargs):
    """What transformers 5.23 calls activation checkpointing was gradient checkpointing before."""
    name = "activation_checkpointing_enable"
    getattr(model, name, model.gradient_checkpointing_enable)(kwargs or None)


def is_on(model):
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@IN_PLACE
@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_own_checkpointing_that_is_on_is_switched_off(name, inplace):
    model = make_model(name)
    switch_on(model)
    assert is_on(model)
    with pytest.warns(UserWarning, match="has been switched off") as caught:
        report = enable(model, inplace=inplace)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert report.wrapped == block_names(make_model(name), name)
    assert not is_on(model)
    assert_equals_plain(model, name)


@NO_LEAKS
@IN_PLACE
@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_own_checkpointing_that_comes_after_is_an_error(name, inplace):
    model = make_model(name)
    first = enable(model, inplace=inplace).wrapped[0]
    switch_on(model)
    expected = (
        rf"block `{re.escape(first)}`: transformers' own.*TrainingArguments.*disable\(model\)"
    )
    with pytest.raises(WrapperError, match=expected) as caught:
        step(model, name)
    assert caught.value.fqn == first
    with torch.no_grad():
        model(**batch(name))
    disable(model)
    assert_equals_plain(model, name)
    assert is_on(model)


@NO_LEAKS
@IN_PLACE
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_torchs_wrapper_that_comes_after_is_an_error(name, inplace):
    """accelerate's FSDP plugin puts it around the blocks in ``prepare``, if its config says so."""
    model = make_model(name)
    fqn = enable(model, every=2, inplace=inplace).wrapped[-1]
    model.set_submodule(fqn, torch_wrapper(model.get_submodule(fqn), preserve_rng_state=False))
    expected = rf"block `{re.escape(fqn)}`: torch's checkpoint_wrapper .*twice.*fsdp_config"
    for _ in range(2):
        with pytest.raises(WrapperError, match=expected) as caught:
            step(model, name)
        assert caught.value.fqn == fqn
        del caught
        gc.collect()  # torch 2.11: an error in its region leaves its hooks to the collector


@IN_PLACE
def test_torchs_wrapper_that_was_there_before_is_left_alone(inplace):
    model = make_model("llama", "eager")
    model.model.layers[0] = torch_wrapper(model.model.layers[0])
    with pytest.warns(UserWarning, match="1 modules are wrapped already"):
        report = enable(model, inplace=inplace)
    assert report.wrapped == ("model.layers.1",)
    assert torch.equal(step(model, "llama"), plain_step("llama", "eager")[0])


# --- Copies and files


@IN_PLACE
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_copies_are_checkpointed_and_guarded(name, inplace):
    model = make_model(name)
    enable(model, inplace=inplace)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert saved_bytes(made, name) < 0.3 * plain_step(name)[3]
        assert_equals_plain(made, name)
        switch_on(made)
        with pytest.raises(WrapperError, match="switched on after"):
            step(made, name)
    assert_equals_plain(model, name)


@IN_PLACE
@ALL
def test_save_pretrained_and_from_pretrained(name, inplace, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, plain = make_model(name, use_cache=True), make_model(name, use_cache=True)
    enable(model, inplace=inplace)
    model.save_pretrained(tmp_path / "enabled")
    plain.save_pretrained(tmp_path / "plain")
    files = [tmp_path / which / "model.safetensors" for which in ("enabled", "plain")]
    got, expected = map(safetensors.load_file, files)
    assert_equal(got, expected)
    configs = [(tmp_path / which / "config.json").read_text() for which in ("enabled", "plain")]
    assert configs[0] == configs[1]
    loaded = models.MODELS[name][1].from_pretrained(tmp_path / "enabled").train()
    set_use_cache(loaded, False)
    assert_equals_plain(loaded, name)
    enable(loaded, inplace=inplace)
    assert_equals_plain(loaded, name)


@IN_PLACE
def test_a_plain_state_dict_loads_into_an_enabled_model(inplace):
    model = make_model("llama")
    enable(model, inplace=inplace)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    keys = model.load_state_dict(make_model("llama").state_dict())
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert_equals_plain(model, "llama")


# --- Trainer


def train(folder, prepare, **arguments):
    """Three steps of ``Trainer`` on a toy dataset: the losses and the parameters afterwards."""
    pytest.importorskip("accelerate")
    losses = []

    class Recording(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    model = make_model("llama", use_cache=True)
    prepare(model)
    rows = [
        {key: value[row] for key, value in batch("llama", seed).items()}
        for seed in range(3)
        for row in range(models.BATCH)
    ]
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=models.BATCH,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    trainer = Recording(model=model, args=options, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder))
    return losses, dict(model.state_dict())


@pytest.mark.parametrize("technique", list(TECHNIQUES))
@IN_PLACE
def test_trainer(tmp_path, inplace, technique):
    losses, state = train(tmp_path, lambda model: None)
    assert len(set(map(float, losses))) == 3
    got_losses, got_state = train(
        tmp_path, lambda model: enable(model, inplace=inplace, **TECHNIQUES[technique])
    )
    assert got_losses == losses
    assert_equal(got_state, state)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_equal(dict(loaded.state_dict()), state)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@IN_PLACE
def test_trainer_that_checkpoints_too_is_an_error(tmp_path, inplace):
    with pytest.raises(WrapperError, match=r"would be recomputed twice.*TrainingArguments"):
        train(tmp_path, lambda model: enable(model, inplace=inplace), gradient_checkpointing=True)
