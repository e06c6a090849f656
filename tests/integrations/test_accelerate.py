"""accelerate: real launches of FSDP2 and DDP in two processes, and the helper in a world of one."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from accelerate.utils.dataclasses import get_module_class_from_name
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp.wrap import (
    ModuleWrapPolicy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)

import wrappers.integrations.accelerate as integration
from scripts.model import GPT, Block, GPTConfig
from scripts.train_accelerate import Result, Windows, parse_args
from tests.integrations.accelerate_job import NUM_STEPS, RUNS, SIZES
from tests.integrations.launching import launch
from wrappers import CheckpointImpl, offload_wrapper
from wrappers.integrations.accelerate import enable
from wrappers.policies import save_matmuls
from wrappers.select import by_class

CONFIGS = ("fsdp2", "ddp")
LAYERS, BATCHES = 3, 2 * NUM_STEPS
CONFIG = GPTConfig(num_layers=LAYERS, d_model=32, num_heads=2, seq_len=32)


# --- Two processes, started by `accelerate launch`


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Launches a config once, for the job and the script as a user starts it.

    Gives their folder, and the job's results with their names.
    """

    @functools.cache
    def job(config):
        folder = tmp_path_factory.mktemp(config)
        options = [*SIZES, f"--steps={NUM_STEPS}", *RUNS["no_reentrant"]]
        options += ["--json", str(folder / "script.json")]
        commands = [
            [str(folder), "tests/integrations/accelerate_job.py", str(folder)],
            [str(folder), "scripts/train_accelerate.py", *options],
        ]
        launch(
            "accelerate.commands.launch",
            *("--config_file", f"scripts/accelerate_{config}.yaml"),
            *("tests/forks.py", json.dumps(commands)),
        )
        return folder, json.loads((folder / "results.json").read_text())

    return job


@pytest.fixture(scope="module")
def plain_names():
    return [name for name, _ in GPT(CONFIG).named_parameters()]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", sorted(RUNS.keys() - {"none"}))
def test_losses_are_those_of_the_plain_model_and_the_blocks_are_recomputed(config, name, job):
    _, results = job(config)
    got, plain = results[name], results["none"]
    assert got["losses"] == plain["losses"]
    assert plain["num_attention_calls"] == LAYERS * BATCHES
    recomputed = got["num_attention_calls"] - plain["num_attention_calls"]
    # A replay calls no module, but for the check of each region's first one.
    assert recomputed == (LAYERS if name == "replay" else LAYERS * BATCHES)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_script_has_the_losses_of_the_plain_model_to_the_last_digit(config, job):
    folder, results = job(config)
    result = Result(**json.loads((folder / "script.json").read_text()))
    assert result.losses == results["none"]["losses"]
    assert len(result.losses) == BATCHES
    assert result.world_size == 2
    assert result.distributed_type == {"fsdp2": "FSDP", "ddp": "MULTI_CPU"}[config]
    assert result.wrapped == [f"blocks.{i}" for i in range(LAYERS)]


@pytest.mark.parametrize("config", CONFIGS)
def test_all_names_are_those_of_the_plain_model(config, job, plain_names):
    _, results = job(config)
    for name in RUNS:
        assert results[name]["parameter_names"] == plain_names
        assert results[name]["state_names"] == plain_names
        assert results[name]["block_names"] == [n for n, _ in Block(CONFIG).named_modules()]


def test_accelerates_own_checkpointing_is_turned_off_with_a_warning(job):
    _, results = job("fsdp2")
    own = results["accelerate's own too"]
    assert own["losses"] == results["none"]["losses"]
    assert own["num_attention_calls"] == 2 * LAYERS * BATCHES
    assert [w.split(" of ")[0] for w in own["warnings"]] == ["activation_checkpointing"]
    assert own["parameter_names"] == results["none"]["parameter_names"]
    assert own["num_torch_wrappers"] == 0


def test_accelerates_own_checkpointing_alone_has_other_dropout_masks_in_the_recompute(job):
    """Why it is turned off. Once this fails, accelerate restores the random state."""
    _, results = job("fsdp2")
    own, plain = results["accelerate's own alone"], results["none"]
    assert own["num_torch_wrappers"] == LAYERS
    assert own["num_attention_calls"] == 2 * LAYERS * BATCHES
    # No update between these two batches: the recompute has drawn masks anew.
    assert own["losses"][0] == plain["losses"][0]
    assert own["losses"][1] != plain["losses"][1]


@pytest.mark.parametrize("name", ["FSDP1", "FSDP1, accelerate's own too"])
def test_under_fsdp1_too(job, name):
    _, results = job("ddp")
    assert results[name]["distributed_type"] == "FSDP"
    assert "_fsdp_wrapped_module" in results[name]["block_names"][1]
    assert results[name]["losses"] == results["none"]["losses"]
    assert results[name]["num_attention_calls"] == 2 * LAYERS * BATCHES
    assert results[name]["num_torch_wrappers"] == 0
    assert len(results[name]["warnings"]) == ("own" in name)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("how", ["second half", "second half, replayed", "second half, plain"])
def test_a_resumed_run_goes_on_bit_for_bit(config, how, job):
    _, results = job(config)
    whole, first = results["none"]["losses"], results["first half"]["losses"]
    assert first == whole[: BATCHES // 2]
    assert results[how]["losses"] == whole[BATCHES // 2 :]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("config", CONFIGS)
def test_saved_files_load_into_the_plain_model(config, job):
    folder, _ = job(config)
    expected = torch.load(folder / "half", weights_only=True)
    model = GPT(CONFIG)
    if config == "fsdp2":
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=folder / "state" / "pytorch_model_fsdp_0", no_dist=True)
        model.load_state_dict(state["model"])
    else:
        model.load_state_dict(load_file(folder / "state" / "model.safetensors"))
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    assert not torch.equal(expected["head.weight"], GPT(CONFIG).state_dict()["head.weight"])


# --- A world of one, in this process


@pytest.fixture
def make_accelerator():
    """Makes an Accelerator that later tests do not see."""

    def make(*, plugin=None, **options):
        accelerator = Accelerator(cpu=True, **options)
        if plugin is not None:  # which accelerate forgets on a CPU
            accelerator.state.fsdp_plugin = plugin
        return accelerator

    yield make
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    """The plugin writes its settings to the environment."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")


def train(accelerator, num_batches=4, load=None, save=None, **settings):
    """Losses of a GPT with dropout, and the prepared model."""
    set_seed(0)
    model = GPT(CONFIG)
    if settings:
        enable(accelerator, model, check_fn=by_class(Block), **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(1)
    if load is not None:
        accelerator.load_state(load)
    losses = []
    for batch in range(num_batches):
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(256, (2, CONFIG.seq_len + 1), generator=generator)
        with accelerator.accumulate(model):
            logits = model(tokens[:, :-1]).float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if save is not None:
        accelerator.save_state(save)
    return losses, model


SETTINGS = {
    "reentrant": {"impl": CheckpointImpl.REENTRANT},
    "no_reentrant": {"impl": CheckpointImpl.NO_REENTRANT},
    "replay": {"policy": save_matmuls()},
    "offload": {"checkpoint_wrapper_fn": offload_wrapper, "tier": "disk", "min_bytes": 0},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_single_process_trains_like_the_plain_model(make_accelerator, name, precision, tmp_path):
    directory = {"directory": tmp_path} if name == "offload" else {}
    accelerator = make_accelerator(mixed_precision=precision, gradient_accumulation_steps=2)
    expected, plain = train(accelerator)
    losses, model = train(accelerator, **SETTINGS[name], **directory)
    assert losses == expected
    got, wanted = accelerator.get_state_dict(model), accelerator.get_state_dict(plain)
    assert list(got) == list(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_unwrap_model_gives_the_model_with_its_regions(make_accelerator):
    accelerator = make_accelerator()
    _, model = train(accelerator, num_batches=1, impl=CheckpointImpl.NO_REENTRANT)
    plain = accelerator.unwrap_model(model)
    assert type(plain) is GPT
    assert all(type(block) is Block and is_region(block) for block in plain.blocks)


def test_state_goes_to_the_plain_model_and_back(make_accelerator, tmp_path):
    expected, _ = train(make_accelerator())
    impl = {"impl": CheckpointImpl.NO_REENTRANT}
    train(make_accelerator(), num_batches=4, save=tmp_path / "wrapped", **impl)
    train(make_accelerator(), num_batches=4, save=tmp_path / "plain")
    wrapped, plain = (
        load_file(tmp_path / kind / "model.safetensors") for kind in ("wrapped", "plain")
    )
    assert wrapped.keys() == plain.keys() <= GPT(CONFIG).state_dict().keys()
    assert all(torch.equal(wrapped[name], plain[name]) for name in plain)
    on, _ = train(make_accelerator(), load=tmp_path / "wrapped")
    on_wrapped, _ = train(make_accelerator(), load=tmp_path / "plain", **impl)
    assert on == on_wrapped
    assert on[0] < expected[0]


# --- Which modules are the blocks


class Expert(nn.Linear):
    pass


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(4, 4) for _ in range(2))

    def forward(self, x):
        return x + sum(expert(x) for expert in self.experts)


class SpecialLayer(Layer):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), SpecialLayer())
        self.last = Expert(4, 4)

    def forward(self, x):
        return self.last(self.layers(x))


class Listing(Model):
    _no_split_modules = ("Layer",)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Listing()


def make_plugin(**options):
    return FullyShardedDataParallelPlugin(fsdp_version=2, **options)


BY_CLASS = {"auto_wrap_policy": "transformer_based_wrap"}
LAYERS_OF = {
    "named by the plugin": (
        {**BY_CLASS, "transformer_cls_names_to_wrap": ["Layer"]},
        Model,
        ("layers.0", "layers.1"),
    ),
    "outermost alone": (
        {**BY_CLASS, "transformer_cls_names_to_wrap": ["Expert", "Layer"]},
        Model,
        ("layers.0", "layers.1", "last"),
    ),
    "plugin before model": (
        {**BY_CLASS, "transformer_cls_names_to_wrap": ["SpecialLayer"]},
        Listing,
        ("layers.1",),
    ),
    "a policy with classes": (
        {"auto_wrap_policy": partial(transformer_auto_wrap_policy, transformer_layer_cls={Layer})},
        Model,
        ("layers.0", "layers.1"),
    ),
    "a policy object": (
        {"auto_wrap_policy": ModuleWrapPolicy({SpecialLayer})},
        Model,
        ("layers.1",),
    ),
    "named by the model": (BY_CLASS, Listing, ("layers.0", "layers.1")),
    "named by a part of the model": (BY_CLASS, Outer, ("inner.layers.0", "inner.layers.1")),
    "size makes no block": (
        {"auto_wrap_policy": partial(size_based_auto_wrap_policy, min_num_params=1)},
        Listing,
        ("layers.0", "layers.1"),
    ),
    "no plugin": (None, Listing, ("layers.0", "layers.1")),
}


def is_region(module):
    return "forward" in vars(module)


@pytest.mark.parametrize("case", LAYERS_OF)
def test_blocks_are_those_that_the_plugin_or_the_model_names(make_accelerator, case):
    options, cls, expected = LAYERS_OF[case]
    plugin = None if options is None else make_plugin(**options)
    model = cls()
    report = enable(make_accelerator(plugin=plugin), model)
    assert report.wrapped == expected
    assert tuple(name for name, m in model.named_modules() if is_region(m)) == expected


@pytest.mark.parametrize("options", [None, {}, BY_CLASS, {"auto_wrap_policy": "size_based_wrap"}])
def test_where_nobody_names_blocks_the_error_says_what_to_pass(make_accelerator, options):
    plugin = None if options is None else make_plugin(**options)
    with pytest.raises(ValueError, match=r"nothing says which modules of this Model .*check_fn"):
        enable(make_accelerator(plugin=plugin), Model())


def test_the_plugin_still_finds_the_class_of_a_block(make_accelerator):
    model = Model()
    enable(make_accelerator(), model, check_fn=by_class(Layer))
    assert get_module_class_from_name(model, "Layer") is Layer


# --- Accelerate's own checkpointing, and wrong use


@pytest.mark.parametrize("with_offload", [False, True])
def test_the_plugins_flags_are_off_afterwards(make_accelerator, with_offload):
    plugin = make_plugin(
        activation_checkpointing=True, activation_checkpointing_offload=with_offload
    )
    offload = " and activation_checkpointing_offload" if with_offload else ""
    with pytest.warns(UserWarning, match=f"^activation_checkpointing{offload} of") as caught:
        report = enable(make_accelerator(plugin=plugin), Listing())
    assert report.wrapped == ("layers.0", "layers.1")
    assert caught[0].filename == __file__
    assert ("offload_wrapper" in str(caught[0].message)) == with_offload
    assert not plugin.activation_checkpointing
    assert not plugin.activation_checkpointing_offload


def test_a_failed_call_leaves_the_plugin_as_it_was(make_accelerator):
    plugin = make_plugin(activation_checkpointing=True)
    with pytest.raises(ValueError, match="nothing says"):
        enable(make_accelerator(plugin=plugin), Model())
    assert plugin.activation_checkpointing


@pytest.mark.filterwarnings("ignore:nothing was wrapped:UserWarning")
def test_where_no_block_was_found_the_plugin_goes_on(make_accelerator):
    plugin = make_plugin(activation_checkpointing=True)
    enable(make_accelerator(plugin=plugin), Model(), check_fn=by_class(Block))
    assert plugin.activation_checkpointing


def test_a_second_call_changes_nothing(make_accelerator):
    accelerator, model = make_accelerator(), Listing()
    enable(accelerator, model)
    first = [m.forward for m in model.layers]
    with pytest.warns(UserWarning, match="2 modules are wrapped already"):
        assert enable(accelerator, model).wrapped == ()
    assert [m.forward for m in model.layers] == first


def test_a_prepared_model_is_refused(make_accelerator):
    accelerator = make_accelerator()
    model = accelerator.prepare(Listing())
    with pytest.raises(ValueError, match=r"Listing comes from accelerator\.prepare: call enable"):
        enable(accelerator, model)


def test_arguments_in_the_wrong_order_are_refused(make_accelerator):
    with pytest.raises(TypeError, match=r"expected an Accelerator first, got Listing"):
        enable(Listing(), make_accelerator())


def test_without_accelerate_the_import_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    spec = importlib.util.spec_from_file_location("without_accelerate", integration.__file__)
    with pytest.raises(ImportError, match=r"pip install activation-wrappers\[accelerate\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# --- The script's own parts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--impl none --policy save_matmuls", "needs --impl replay, got --impl none"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--accumulate 0", "--accumulate must be at least 1, got 0"),
        ("--resume /no/such/folder", "--resume /no/such/folder: no such folder"),
        ("--heads 3", "d_model must be a multiple of num_heads, got 256 and 3"),
    ],
)
def test_bad_options_end_with_one_clear_line(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(options.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_windows_depend_on_seed_and_index_alone():
    tokens = torch.arange(200, dtype=torch.uint8)
    short, long = (Windows(tokens, 8, length, seed=3) for length in (4, 16))
    inputs, targets = long[2]
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(short[2][0], inputs)
    assert not torch.equal(Windows(tokens, 8, 4, seed=4)[2][0], inputs)
