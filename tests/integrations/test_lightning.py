"""Lightning: Fabric and Trainer with DDP, FSDP2 and FSDP1 in two processes, and in a world of one.

How FSDP1 runs on a CPU, which Lightning's own strategy refuses, is said in the job.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import wrappers.integrations.lightning as integration
from scripts.model import GPT, Attention, Block
from tests.integrations.launching import launch
from tests.integrations.lightning_job import (
    CONFIG,
    IMPLS,
    NUM_STEPS,
    STRATEGIES,
    CountedAttention,
    FabricFSDPOnCPU,
    TrainerFSDPOnCPU,
    loss_of,
    make_model,
)
from wrappers import CheckpointImpl
from wrappers.integrations.lightning import ActivationCheckpointing, enable
from wrappers.select import by_class

# What lightning 2.6.6 does to torch 2.13 whenever a fit begins.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")

LAYERS = CONFIG.num_layers
FORWARDS = LAYERS * NUM_STEPS
NO_REENTRANT = {"impl": CheckpointImpl.NO_REENTRANT}


# --- Two processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    launch(
        "torch.distributed.run",
        *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"),
        *("tests/integrations/lightning_job.py", str(folder)),
    )
    return json.loads((folder / "results.json").read_text())


RUNS = [("Fabric", strategy, impl) for strategy in STRATEGIES for impl in sorted(IMPLS)]
RUNS += [("Trainer", strategy, "none") for strategy in STRATEGIES]
RUNS += [("Trainer", strategy, "no_reentrant") for strategy in STRATEGIES]


@pytest.mark.parametrize(("runner", "strategy", "impl"), RUNS)
def test_losses_are_those_of_the_plain_model(results, runner, strategy, impl):
    got, plain = results[f"{runner} {strategy} {impl}"], results["Fabric ddp none"]
    assert got["losses"] == plain["losses"]
    assert len(got["losses"]) == NUM_STEPS
    prefix = "model." if runner == "Trainer" else ""
    assert got["wrapped"] == [f"{prefix}blocks.{i}" for i in range(LAYERS) if impl != "none"]
    # A replay calls no module, but for the check of each region's first one.
    recomputed = {"none": 0, "replay": LAYERS}.get(impl, FORWARDS)
    assert got["num_attention_calls"] == FORWARDS + recomputed
    assert got["warnings"] == []


def test_in_configure_model(results):
    got = results["Trainer fsdp2 in configure_model"]
    assert got["losses"] == results["Trainer fsdp2 none"]["losses"]
    assert got["num_attention_calls"] == 2 * FORWARDS


@pytest.mark.parametrize("runner", ["Fabric", "Trainer"])
def test_lightnings_own_checkpointing_is_not_doubled(results, runner):
    own, both = results[f"{runner} fsdp1 own"], results[f"{runner} fsdp1 both"]
    assert own["num_attention_calls"] == both["num_attention_calls"] == 2 * FORWARDS
    assert own["wrapped"] == []
    assert len(both["wrapped"]) == LAYERS
    assert (own["num_torch_wrappers"], both["num_torch_wrappers"]) == (LAYERS, 0)
    assert both["losses"] == results[f"{runner} fsdp1 none"]["losses"]
    assert own["warnings"] == []
    (warning,) = both["warnings"]
    name = f"{runner}FSDPOnCPU"
    assert warning.startswith(f"activation_checkpointing_policy of {name} would recompute")


# --- A world of one, in this process


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()
        self.calls = CountedAttention(self.model)
        self.losses: list[float] = []

    def on_train_start(self) -> None:
        torch.manual_seed(1)

    def training_step(self, step):
        loss = loss_of(self.model, int(step), rank=0)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, step):
        loss_of(self.model, int(step), rank=0)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def train_dataloader(self):
        return torch.arange(NUM_STEPS)

    def val_dataloader(self):
        return torch.arange(1)


class LateModule(Module):
    """Builds its blocks in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        self.model = make_model()


def make_trainer(*callbacks, **options):
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **options,
    )


def is_region(module):
    return "forward" in vars(module)


def test_a_trainer_trains_the_same_model_again_without_wrapping_it_again():
    plain, module = Module(), Module()
    callback = ActivationCheckpointing(by_class(Block), **NO_REENTRANT)
    for _ in range(2):
        make_trainer().fit(plain)
        make_trainer(callback).fit(module)
    assert module.losses == plain.losses
    assert module.calls.count == 2 * plain.calls.count == 4 * FORWARDS
    assert callback.report.wrapped == tuple(f"model.blocks.{i}" for i in range(LAYERS))
    assert [type(block) for block in module.model.blocks] == [Block] * LAYERS
    other = Module()
    make_trainer(callback).fit(other)
    assert other.losses == plain.losses[:NUM_STEPS]
    assert other.calls.count == 2 * FORWARDS


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_trainers_checkpoint_has_the_plain_models_names(precision, tmp_path):
    plain, module = Module(), Module()
    make_trainer(precision=precision).fit(plain)
    trainer = make_trainer(
        ActivationCheckpointing(by_class(Block), **NO_REENTRANT), precision=precision
    )
    trainer.fit(module)
    assert module.losses == plain.losses
    trainer.save_checkpoint(tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=False)["state_dict"]
    expected = plain.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_validation_alone_wraps_nothing():
    module = Module()
    make_trainer(ActivationCheckpointing(by_class(Block))).validate(module, verbose=False)
    assert not any(map(is_region, module.modules()))


@pytest.mark.filterwarnings("ignore:nothing was wrapped:UserWarning")
def test_blocks_that_come_later_are_an_error_that_says_where_to_call():
    with pytest.raises(ValueError, match=r"no module of this LateModule .*\.enable\(self\.trainer"):
        make_trainer(ActivationCheckpointing(by_class(Block))).fit(LateModule())


@pytest.mark.parametrize("name", sorted(IMPLS.keys() - {"none"}))
def test_a_fabric_of_one_trains_and_saves_like_the_plain_model(name, tmp_path):
    losses, saved = [], []
    for settings in (None, IMPLS[name]):
        fabric = Fabric(accelerator="cpu", devices=1)
        model = make_model()
        if settings is not None:
            enable(fabric, model, check_fn=by_class(Block), **settings)
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        torch.manual_seed(1)
        losses.append([])
        for step in range(NUM_STEPS):
            loss = loss_of(model, step, rank=0)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        fabric.save(tmp_path / "state", {"model": model})
        fabric.load(tmp_path / "state", {"model": GPT(CONFIG)})
        saved.append(torch.load(tmp_path / "state", weights_only=True)["model"])
    assert losses[0] == losses[1]
    assert list(saved[0]) == list(saved[1])
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


# --- Which modules are the blocks, and wrong use


class Listing(nn.Module):
    _no_split_modules = ("Block", "Attention")

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()


BLOCKS = tuple(f"blocks.{i}" for i in range(LAYERS))
ATTENTIONS = tuple(f"{name}.attention" for name in BLOCKS)
POLICIES = {
    "classes": ({"activation_checkpointing_policy": {Attention}}, ATTENTIONS),
    "a policy object": ({"activation_checkpointing_policy": ModuleWrapPolicy({Block})}, BLOCKS),
    "the deprecated argument": ({"activation_checkpointing": [Block]}, BLOCKS),
}


@pytest.mark.filterwarnings("ignore:.*FSDPStrategy.activation_checkpointing=:Warning")
@pytest.mark.parametrize("kind", [FabricFSDPOnCPU, TrainerFSDPOnCPU])
@pytest.mark.parametrize("case", POLICIES)
def test_the_strategys_own_policy_chooses_and_is_turned_off(kind, case):
    options, expected = POLICIES[case]
    strategy = kind(**options)
    if kind is TrainerFSDPOnCPU:
        runner = make_trainer(strategy=strategy)
    else:
        runner = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    model = make_model()
    with pytest.warns(UserWarning, match=f"policy of {kind.__name__} would recompute") as caught:
        assert enable(runner, model).wrapped == expected
    assert caught[0].filename == __file__
    assert strategy._activation_checkpointing_kwargs == {}
    enable(runner, make_model(), check_fn=by_class(Block))  # no warning a second time


def test_what_check_fn_chooses_wins_over_the_strategys_policy():
    strategy = FabricFSDPOnCPU(activation_checkpointing_policy={Attention})
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    with pytest.warns(UserWarning, match="was turned off"):
        assert enable(fabric, make_model(), check_fn=by_class(Block)).wrapped == BLOCKS


@pytest.mark.filterwarnings("ignore:nothing was wrapped:UserWarning")
def test_where_no_block_was_found_the_strategys_policy_stays():
    strategy = FabricFSDPOnCPU(activation_checkpointing_policy={Block})
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    assert not enable(fabric, make_model(), check_fn=by_class(Listing)).wrapped
    assert strategy._activation_checkpointing_kwargs


def test_the_policy_of_a_second_fits_strategy_is_turned_off_too():
    callback, module = ActivationCheckpointing(by_class(Block), **NO_REENTRANT), Module()
    make_trainer(callback).fit(module)
    strategy = TrainerFSDPOnCPU(activation_checkpointing_policy={Block})
    trainer = make_trainer(callback, strategy=strategy)
    with pytest.warns(UserWarning, match="was turned off"):
        callback.setup(trainer, module, "fit")
    assert strategy._activation_checkpointing_kwargs == {}


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def test_else_the_model_names_them_and_the_outermost_are_taken(fabric):
    assert enable(fabric, Listing()).wrapped == tuple(f"inner.{name}" for name in BLOCKS)


def test_where_nobody_names_blocks_the_error_says_what_to_pass(fabric):
    with pytest.raises(ValueError, match=r"nothing says which modules of this GPT .*check_fn"):
        enable(fabric, make_model())


def test_a_model_that_is_set_up_is_refused(fabric):
    with pytest.raises(ValueError, match=r"comes from fabric\.setup: call enable"):
        enable(fabric, fabric.setup(make_model()), check_fn=by_class(Block))


def test_arguments_in_the_wrong_order_are_refused(fabric):
    with pytest.raises(TypeError, match=r"expected a Fabric or a Trainer first, got GPT"):
        enable(make_model(), fabric)


def test_without_lightning_the_import_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    spec = importlib.util.spec_from_file_location("without_lightning", integration.__file__)
    with pytest.raises(ImportError, match=r"pip install activation-wrappers\[lightning\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
