"""Adapters of PEFT on models whose blocks are checkpointed: the base is frozen.

Nothing that goes into the first blocks requires a gradient, which is where a REENTRANT region of
torch loses those of the adapters, silently (transformers#26221).
"""

from __future__ import annotations

import functools

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.integrations import models  # noqa: E402
from tests.integrations.models import (  # noqa: E402
    FACES,
    TECHNIQUES,
    assert_equal,
    batch,
    gradients,
    make_model,
    saved_bytes,
    step,
)
from wrappers import WrapperError  # noqa: E402
from wrappers.integrations.transformers import disable, enable  # noqa: E402

IN_PLACE = pytest.mark.parametrize("inplace", list(FACES.values()), ids=list(FACES))
TARGETS = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}

# PEFT asks a model of transformers for a property that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")


def add_adapters(model, name):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2,
        target_modules=TARGETS[name],
        lora_dropout=0.1,
        init_lora_weights=False,  # else one of each pair is zero and the other has no gradient
        fan_in_fan_out=name == "gpt2",
        task_type="SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def make_adapted(name, order, **options):
    """A model with adapters and checkpointed blocks, made in either order."""
    model = make_model(name)
    if order == "enabled first":
        enable(model, **options)
    model = add_adapters(model, name)
    if order == "adapters first":
        enable(model, **options)
    return model


@functools.cache
def plain_step(name):
    model = make_adapted(name, "never enabled")
    loss = step(model, name)
    found = gradients(model)
    return loss, found, torch.get_rng_state(), saved_bytes(model, name)


ORDERS = pytest.mark.parametrize("order", ["enabled first", "adapters first"])


@ORDERS
@IN_PLACE
@pytest.mark.parametrize("technique", list(TECHNIQUES))
@pytest.mark.parametrize("name", list(TARGETS))
def test_adapters_get_the_plain_models_gradients(name, technique, inplace, order):
    loss, expected, state, num_bytes = plain_step(name)
    assert len(expected) == 2 * len(TARGETS[name]) * (6 if name == "t5" else 2)
    assert all(gradient.any() for gradient in expected.values())
    model = make_adapted(name, order, inplace=inplace, **TECHNIQUES[technique])
    for _ in range(2):
        model.zero_grad()
        assert torch.equal(step(model, name), loss)
        assert torch.equal(torch.get_rng_state(), state)
        if (name, technique) == ("t5", "REENTRANT"):  # see the test of T5 in test_transformers
            torch.testing.assert_close(gradients(model), expected)
        else:
            assert_equal(gradients(model), expected)
    assert saved_bytes(model, name) < (1.0 if "policy" in technique else 0.3) * num_bytes


@ORDERS
@IN_PLACE
def test_adapters_are_saved_loaded_and_merged(tmp_path, inplace, order):
    plain = make_adapted("llama", "never enabled").eval()
    model = make_adapted("llama", order, inplace=inplace)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    inputs = batch("llama")
    with torch.no_grad():
        expected = plain(**inputs).logits
        assert torch.equal(model.eval()(**inputs).logits, expected)
        assert torch.equal(loaded(**inputs).logits, expected)
        merged = model.merge_and_unload()
        assert torch.equal(merged(**inputs).logits, plain.merge_and_unload()(**inputs).logits)
    assert disable(merged) == models.NUM_LAYERS


@IN_PLACE
def test_adapters_of_a_model_without_a_head(inplace):
    """PEFT calls such a model's forward itself, so no hook of the model runs."""

    def run(*, is_enabled):
        model = make_model("llama", use_cache=is_enabled).model
        if is_enabled:
            enable(model, inplace=inplace)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
        model = peft.get_peft_model(model, config)
        torch.manual_seed(2)
        model(batch("llama")["input_ids"]).last_hidden_state.square().sum().backward()
        return gradients(model)

    with pytest.warns(UserWarning, match="stays empty"):
        got = run(is_enabled=True)
    assert_equal(got, run(is_enabled=False))


@pytest.mark.parametrize("technique", ["REENTRANT", "NO_REENTRANT", "REPLAY"])
@IN_PLACE
def test_prefix_tuning_works_but_is_not_checkpointed(inplace, technique):
    """The prefix is a filled cache, which a recompute would fill again."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)

    def run(*, is_enabled):
        torch.manual_seed(0)
        model = peft.get_peft_model(make_model("llama"), config)
        if is_enabled:
            enable(model, inplace=inplace, **TECHNIQUES[technique])
        return step(model, "llama"), gradients(model)

    expected_loss, expected = run(is_enabled=False)
    assert expected
    with pytest.warns(UserWarning, match="such calls are not checkpointed"):
        loss, got = run(is_enabled=True)
    assert torch.equal(loss, expected_loss)
    assert_equal(got, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant param:UserWarning")
def test_preparation_that_switches_checkpointing_on_is_seen():
    """``prepare_model_for_kbit_training`` does for a quantized model, unless told not to."""
    model = make_model("llama")
    model.is_loaded_in_8bit = True
    enable(model)
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    step(add_adapters(model, "llama"), "llama")
    peft.prepare_model_for_kbit_training(model)
    with pytest.raises(WrapperError, match="switched on after"):
        step(model, "llama")
