"""The policies that planners are compared with: what each does to a model, and the comparison."""

from __future__ import annotations

import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scripts import measure
from scripts.bench import compile_budget, handmade, torch_planner
from scripts.model import GPTConfig

NUM_BLOCKS = 4
CONFIG = GPTConfig(num_layers=NUM_BLOCKS, d_model=64, num_heads=2, seq_len=64, dropout=0.0)
BATCH = 2
#: Of a product with a (width, width) matrix.
PRODUCT_FLOPS = 2 * BATCH * CONFIG.seq_len * CONFIG.d_model**2
POLICIES = dict(handmade.policies_for(NUM_BLOCKS))
OPS = ("save_matmuls", "save_every_other_matmul", "save_matmuls_and_attention")
TORCH_OPS = tuple(f"torch_{name}" for name in OPS)
FULL = ("full_no_reentrant", "full_replay", "full_torch")


@pytest.fixture(scope="module")
def model_and_tokens():
    return handmade.build(CONFIG, BATCH)


def gradients(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of one step, by the plain model's names."""
    kept = {}

    def keep(set_to_none: bool) -> None:
        kept.update({name: p.grad for name, p in model.named_parameters()})
        nn.Module.zero_grad(model, set_to_none=set_to_none)

    model.zero_grad = keep
    try:
        handmade.run_step(model, tokens)
    finally:
        del model.zero_grad
    return {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in kept.items()}


@pytest.fixture(scope="module")
def plain(model_and_tokens):
    return gradients(*model_and_tokens)


@pytest.fixture(scope="module")
def peaks(model_and_tokens):
    model, tokens = model_and_tokens
    names = ("none", *FULL, "every_2", "but_last_2", "but_last_3", "save_attention")
    forms = {name: POLICIES[name](model) for name in (*names, *OPS, *TORCH_OPS)}
    steps = handmade.steps_of(model, tokens, forms)
    return {name: handmade.peak_bytes(step) for name, step in steps.items()}


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_gives_the_plain_gradients_and_is_undone(name, model_and_tokens, plain):
    model, tokens = model_and_tokens
    modules, names = list(model.modules()), dict(model.named_parameters())
    form = POLICIES[name](model)
    chosen = {f"blocks.{index}" for index in POLICIES[name].chosen(model)}
    for _ in range(2):  # A first replay is compared with a rerun.
        with form:
            changed = {
                f"blocks.{index}"
                for index, block in enumerate(model.blocks)
                if not any(block is each for each in modules)
            }
            found = gradients(model, tokens)
        assert changed == chosen
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], plain[key]) for key in plain)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert dict(model.named_parameters()).keys() == names.keys()


def test_the_blocks_that_are_chosen(model_and_tokens):
    model, _ = model_and_tokens
    chosen = {name: policy.chosen(model) for name, policy in POLICIES.items()}
    assert chosen["none"] == []
    assert chosen["every_2"] == [0, 2]
    assert chosen["but_every_2"] == [1, 3]
    assert chosen["every_3"] == [0, 3]
    assert chosen["but_every_3"] == [1, 2]
    assert chosen["but_last_1"] == [0, 1, 2]
    assert chosen["but_last_3"] == [0]
    whole_model = {name for name, blocks in chosen.items() if len(blocks) == NUM_BLOCKS}
    assert whole_model == {name for name in POLICIES if name.startswith(("full", "save", "torch"))}


def test_a_policy_of_the_model_undoes_itself_after_an_error(model_and_tokens):
    model, tokens = model_and_tokens
    blocks = list(model.blocks)
    with pytest.raises(IndexError), POLICIES["full_replay"](model):
        model(tokens[:, :-1] + 256)
    assert list(model.blocks) == blocks


def test_fewer_recomputed_blocks_take_more_memory(peaks):
    rising = ["full_no_reentrant", "but_last_2", "but_last_3", "none"]
    for lower, higher in pairwise(rising):
        assert peaks[lower] < peaks[higher]
    assert peaks["full_no_reentrant"] < peaks["every_2"] < peaks["none"]
    assert peaks["full_no_reentrant"] == peaks["full_torch"] >= peaks["full_replay"]


def test_what_is_kept_takes_memory_and_never_more_than_in_torch(peaks):
    for name, in_torch in zip(OPS, TORCH_OPS, strict=True):
        assert peaks["full_replay"] < peaks[name] <= peaks[in_torch] < peaks["none"]
    assert peaks["save_every_other_matmul"] < peaks["save_matmuls"]
    for part in ("save_matmuls", "save_attention"):
        assert peaks[part] < peaks["save_matmuls_and_attention"]


def test_what_is_kept_is_not_computed_again(model_and_tokens):
    model, tokens = model_and_tokens
    flops = {}
    for name in ("none", "full_replay", "full_torch", *OPS, *TORCH_OPS):
        step = handmade.steps_of(model, tokens, {name: POLICIES[name](model)})[name]
        step()
        flops[name] = measure.count_flops(step)
    extra = {
        name: (count - flops["none"]) / (NUM_BLOCKS * PRODUCT_FLOPS)
        for name, count in flops.items()
    }
    assert extra == {
        "none": 0,
        "full_replay": 3 + 1 + 4,
        "full_torch": 3 + 1 + 4,
        "save_matmuls": 0,
        "save_every_other_matmul": 1,
        "save_matmuls_and_attention": 0,
        "torch_save_matmuls": 0,
        "torch_save_every_other_matmul": 1,
        "torch_save_matmuls_and_attention": 0,
    }


def test_one_of_the_policies_for_whole_blocks_contends(model_and_tokens):
    model, _ = model_and_tokens
    peaks = dict.fromkeys(POLICIES, 50)
    peaks |= {"none": 100, "full_no_reentrant": 10, "full_replay": 10, "every_2": 60}
    op_level = [name for name in POLICIES if name.startswith(("full_torch", "save", "torch"))]
    contenders = partial(handmade.contenders, model, peaks)
    assert contenders(100) == ["none", "full_replay", *op_level]
    assert contenders(99) == ["but_last_3", "full_replay", *op_level]  # of one block
    peaks["but_last_3"] = 100
    peaks["but_every_2"] = 45
    assert contenders(60) == ["but_every_2", "full_replay", *op_level]  # of two, the lowest peak
    assert contenders(10) == ["full_no_reentrant", "full_replay"]
    assert contenders(9) == []


def test_the_fastest_that_fits_is_the_best():
    rows = [
        {"policy": "a", "peak_bytes": 10, "time_ratio": 1.3},
        {"policy": "b", "peak_bytes": 20, "time_ratio": 1.1},
        {"policy": "c", "peak_bytes": 20, "time_ratio": 1.2},
        {"policy": "d", "peak_bytes": 30, "time_ratio": 1.0},
    ]
    best = {budget: handmade.best_within(rows, budget) for budget in (9, 10, 29, 30)}
    assert {budget: row and row["policy"] for budget, row in best.items()} == {
        9: None,
        10: "a",
        29: "b",
        30: "d",
    }


def test_each_round_times_each_step_once_in_an_order_of_its_own(monkeypatch):
    now, calls = [0.0], []

    def step(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    monkeypatch.setattr(handmade.time, "thread_time", lambda: now[0])
    steps = {"a": partial(step, "a", 1.0), "b": partial(step, "b", 2.0), "c": partial(step, "c", 4)}
    samples = handmade.time_in_turns(steps, rounds=20)
    assert samples == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [4.0] * 20}
    timed = calls[-60:]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, 60, 3)]
    assert {frozenset(each) for each in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 1


def test_a_ratio_pairs_rounds():
    """A machine that is slower for some rounds is so for both."""
    pace = [1.0, 1.5, 3.0, 1.0, 1.2]
    found = handmade.ratio([2 * p for p in pace], pace)
    assert (found.value, found.error) == (2.0, 0.0)
    found = handmade.ratio([1.0, 1.1, 1.2, 1.3, 9.0], [1.0] * 5)
    assert found.value == 1.2
    assert found.error > 0.05


def test_rows_and_table(capsys):
    rows = handmade.measure_policies(["save_matmuls", "none"], 1, CONFIG, BATCH, POLICIES)
    assert [row["policy"] for row in rows] == ["none", "save_matmuls"]
    assert [row["num_blocks_chosen"] for row in rows] == [0, NUM_BLOCKS]
    assert (rows[0]["time_ratio"], rows[0]["peak_ratio"]) == (1, 1)
    assert rows[1]["peak_ratio"] == round(rows[1]["peak_bytes"] / rows[0]["peak_bytes"], 4)
    assert {row["num_layers"] for row in rows} == {NUM_BLOCKS}
    assert [line.split()[0] for line in handmade.table(rows).splitlines()] == [
        "policy",
        "none",
        "save_matmuls",
    ]


def test_a_kept_heap_neither_maps_nor_trims(monkeypatch):
    calls = []

    class Glibc:
        mallopt = staticmethod(lambda *pair: calls.append(pair))

    for library in (Glibc, object):  # Others have no such function.
        monkeypatch.setattr(handmade.ctypes, "CDLL", lambda _, library=library: library())
        handmade.keep_heap()
    assert calls == [(-4, 0), (-1, -1)]


# --- Other planners -----------------------------------------------------------------------


def test_a_plan_of_torchs_planner_is_applied_and_undone(model_and_tokens, plain):
    model, tokens = model_and_tokens
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    h = torch.zeros(BATCH, CONFIG.seq_len, CONFIG.d_model)
    with Names():
        model.blocks[1].mlp(h)
    saved = [name == "addmm" for name in seen]
    plan = torch_planner.TorchPlan(
        {
            "blocks.0": torch_planner.ModulePlan(1.0, [], []),
            "blocks.1.mlp": torch_planner.ModulePlan(0.5, seen, saved),
        },
        0,
        0.0,
    )
    mlp = model.blocks[1].mlp
    step = partial(handmade.run_step, model, tokens)
    plain_flops = measure.count_flops(step)
    with torch_planner.apply_plan(model, plan):
        assert model.blocks[1].mlp is not mlp
        found = gradients(model, tokens)
        flops = measure.count_flops(step)
    assert model.blocks[1].mlp is mlp
    assert (flops - plain_flops) / PRODUCT_FLOPS == 3 + 1 + 4  # of blocks.0 alone
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_a_plan_for_other_operators_is_refused(model_and_tokens):
    model, tokens = model_and_tokens
    other = torch_planner.ModulePlan(0.5, ["zeros"], [True])
    plan = torch_planner.TorchPlan({"blocks.1.mlp": other}, 0, 0.0)
    with (
        torch_planner.apply_plan(model, plan),
        pytest.raises(RuntimeError, match="operator 0: the estimate has zeros, the step view"),
    ):
        handmade.run_step(model, tokens)


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torch_planner"])
    monkeypatch.setattr(torch_planner, "NEEDED", ("no_such_solver",))
    with pytest.raises(SystemExit):
        torch_planner.main()
    assert "no_such_solver: pip install pulp pwlf" in capsys.readouterr().err
    monkeypatch.setattr(compile_budget.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        compile_budget.main()
    assert "install g++, or name one in CXX" in capsys.readouterr().err
