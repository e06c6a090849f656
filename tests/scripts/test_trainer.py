"""A run that is saved and resumed, in a process group of this process alone."""

from __future__ import annotations

import pytest
import torch

from scripts.train import parse_args, process_group, train
from scripts.trainer import Trainer
from wrappers.state import CheckpointException

SIZES = ["--layers=1", "--d-model=16", "--heads=2", "--seq=16", "--batch=2"]

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def start(monkeypatch):
    """Makes the trainer of a run with the given options, and its parsed options."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with process_group() as device:

        def start(*options: str):
            args = parse_args([*SIZES, *options])
            return Trainer(args, device), args

        yield start


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("impl", ["none", "reentrant", "no_reentrant"])
def test_a_resumed_run_goes_on_to_the_last_digit(impl, start, tmp_path):
    """Batches, dropout masks and moments too; with another --impl than the one that saved."""
    calm, args = start("--steps=5")
    train(calm, args)

    first, args = start("--steps=3", "--impl=none", f"--save={tmp_path}")
    train(first, args)
    torch.manual_seed(12345)
    second, args = start("--steps=5", f"--impl={impl}", f"--save={tmp_path}", "--resume")
    assert second.resume(tmp_path) == tmp_path / "step-00000003"
    assert (second.num_steps, second.loss) == (3, first.loss)
    train(second, args)

    assert second.num_steps == 5
    assert repr(second.loss) == repr(calm.loss)
    expected = weights(calm)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(second).items())


def test_state_checkpoints_are_saved_every_n_steps_and_at_the_end(start, tmp_path):
    trainer, args = start("--steps=7", f"--save={tmp_path}", "--save-every=2", "--keep-last=3")
    train(trainer, args)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000004", "step-00000006", "step-00000007"]


def test_resume_without_a_state_checkpoint_starts_anew(start, tmp_path):
    trainer, _ = start(f"--save={tmp_path / 'new'}", "--resume")
    assert trainer.resume(tmp_path / "new") is None
    assert trainer.num_steps == 0


@pytest.fixture
def saved(start, tmp_path):
    """A folder with the state checkpoint of a run."""
    trainer, _ = start()
    trainer.save(tmp_path, keep_last=1)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--layers=2", r"the state checkpoint has no `model\.blocks\.1\.attention\.out\.bias`"),
        ("--d-model=32", r"Size mismatch between saved .*16.* and current: .*32"),
        ("--seq=8", r"Size mismatch between saved .*16.* and current: .*8.* for model\.embed_pos"),
    ],
)
def test_a_model_of_other_sizes_is_refused(option, message, start, saved):
    trainer, _ = start(option, f"--save={saved}", "--resume")
    with pytest.raises(CheckpointException, match=message):
        trainer.resume(saved)


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        ("--batch=4", "batch 2 there, 4 here"),
        ("--dropout=0", "dropout 0.1 there, 0.0 here"),
        ("--heads=4", "heads 2 there, 4 here"),
        (f"--text={__file__}", "text CRC-32 "),
    ],
)
def test_a_run_with_other_options_is_refused(option, difference, start, saved):
    trainer, _ = start(option, f"--save={saved}", "--resume")
    with pytest.raises(ValueError, match=f"of a run with other options: {difference}"):
        trainer.resume(saved)


def test_a_run_that_would_mix_with_another_is_refused(start, saved, capsys):
    with pytest.raises(SystemExit):
        start(f"--save={saved}")
    assert "step-00000000 is there already: go on from it with --resume" in capsys.readouterr().err
