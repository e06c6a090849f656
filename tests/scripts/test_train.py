"""The main job under torchrun: two processes, FSDP around wrapped blocks."""

from __future__ import annotations

import json

import pytest

from scripts.train import Result, load_tokens, parse_args
from tests.scripts.torchrun import Torchrun

SIZES = ["--layers=4", "--d-model=64", "--heads=4", "--seq=128", "--batch=4", "--steps=3"]
MODES = {
    "none": ["--impl", "none"],
    "reentrant": ["--impl", "reentrant"],
    "no_reentrant": ["--impl", "no_reentrant"],
    "in_place": ["--impl", "no_reentrant", "--inplace"],
    "save_matmuls": ["--impl", "no_reentrant", "--policy", "save_matmuls"],
    "disk": ["--impl", "offload_disk", "--max-inflight-mib", "0.5"],
    "planned": ["--impl", "planned", "--budget", "10MiB"],
}
#: Planned on each of two processes that share a machine, so with few of the ways to treat a block.
SCRIPTS = {"planned": "tests/scripts/planned_job.py"}
WRAPPED = sorted(MODES.keys() - {"none"})


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """The result of the job in a mode; all modes are run by one launch."""
    folder = tmp_path_factory.mktemp("train")
    more = [*SIZES, "--memory-trace", "--json"]
    commands = [
        [str(folder), SCRIPTS.get(mode, "scripts/train.py"), *options, *more, f"{mode}.json"]
        for mode, options in MODES.items()
    ]
    with Torchrun(folder, "tests/forks.py", json.dumps(commands)) as run:
        assert run.wait() == 0, run.output

    def train(mode: str) -> Result:
        return Result(**json.loads((folder / f"{mode}.json").read_text()))

    return train


@pytest.mark.parametrize("mode", WRAPPED)
def test_loss_equals_that_of_the_plain_model_to_the_last_digit(train, mode):
    assert repr(train(mode).loss) == repr(train("none").loss)
    assert train(mode).world_size == 2


@pytest.mark.parametrize("mode", ["reentrant", "no_reentrant", "in_place"])
def test_activation_checkpointing_lowers_the_peak(train, mode):
    assert train(mode).peak_activation_bytes < 0.5 * train("none").peak_activation_bytes
    assert train(mode).peak_activation_bytes == max(train(mode).timeline_bytes)


def test_activations_in_a_file_lower_the_peak_and_are_not_recomputed(train):
    assert train("disk").peak_activation_bytes < 0.8 * train("none").peak_activation_bytes
    assert train("disk").peak_activation_bytes == max(train("disk").timeline_bytes)
    assert train("disk").flops == train("none").flops


def test_a_planned_step_stays_within_its_budget(train):
    peak_bytes, plain_bytes = (train(m).peak_activation_bytes for m in ("planned", "none"))
    assert 0.9 * 10 * 2**20 < peak_bytes <= 10 * 2**20 < plain_bytes
    assert train("none").flops <= train("planned").flops < train("no_reentrant").flops


def matmul_flops_of_a_block_forward() -> int:
    batch, seq, d_model = 4, 128, 64
    projections = 2 * batch * seq * d_model * d_model * (3 + 1 + 4 + 4)
    attention = 2 * batch * seq * seq * d_model * 2
    return projections + attention


@pytest.mark.parametrize("mode", ["reentrant", "no_reentrant", "in_place"])
def test_recomputed_flops_are_those_of_the_blocks_forward(train, mode):
    recomputed = train(mode).flops - train("none").flops
    forward = 4 * matmul_flops_of_a_block_forward()
    if mode == "reentrant":
        assert recomputed == forward
    else:  # early stop may leave out what follows the last saved tensor
        assert 0.6 * forward <= recomputed <= forward


def test_saved_matmuls_are_not_recomputed(train):
    attention = 4 * 2 * 4 * 128 * 128 * 64 * 2
    assert train("save_matmuls").flops - train("none").flops <= attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--impl none --inplace", "--inplace needs an --impl to put in place"),
        ("--impl reentrant --policy save_matmuls", "needs --impl no_reentrant, got --impl reent"),
        ("--impl none --directory x", "--directory needs --impl offload_disk, got --impl none"),
        ("--impl offload_disk --policy save_matmuls", "needs --impl no_reentrant, got --impl off"),
        ("--impl planned", "--impl planned and --budget SIZE need each other"),
        ("--budget 1GiB", "need each other, got --impl no_reentrant"),
        ("--impl planned --budget 1G", "--budget: memory budget '1G' can mean two things"),
        ("--impl planned --budget 50%", "--budget: memory budget '50%' is a share of a device"),
        ("--max-inflight-mib 0", "--max-inflight-mib must be positive, got 0"),
        ("--memory-trace", "--memory-trace needs --json FILE"),
        ("--steps 1", "--steps must be at least 2"),
        ("--batch 0", "--batch must be at least 1, got 0"),
        ("--resume", "--resume needs --save DIR to resume from"),
        ("--save-every 2", "--save-every needs --save DIR to save to"),
        ("--save x --save-every 0", "--save-every must be at least 1, got 0"),
        ("--save x --keep-last 0", "--keep-last must be at least 1, got 0"),
        ("--heads 3", "d_model must be a multiple of num_heads, got 256 and 3"),
        ("--layers 0", "num_layers must be at least 1, got 0"),
        ("--dropout 1", "dropout must lie in [0, 1), got 1.0"),
        ("--text /no/such/file", "No such file or directory: '/no/such/file'"),
        ("--text /dev/null", "/dev/null: a sequence takes 257 bytes, the text has 0"),
    ],
)
def test_bad_options_end_with_one_clear_line(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(options.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_text_of_a_file_becomes_its_bytes(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes([7, 0, 255]))
    assert load_tokens(path, min_bytes=3).tolist() == [7, 0, 255]


def test_default_text_ships_with_python():
    assert len(load_tokens(None, min_bytes=1)) > 100_000
