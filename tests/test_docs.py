"""The pages of ``docs`` tell the truth: examples, figures, options and messages are real ones."""

from __future__ import annotations

import errno
import inspect
import os
import re
import shlex
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import wrappers.policies as presets
import wrappers.state
from scripts.bench import offload_timeline, plan_block, plan_tables
from scripts.model import GPT, Block, GPTConfig
from tests.distributed import matrix
from tests.engine.helpers import assert_equal, leaf
from wrappers import (
    CheckpointImpl,
    CheckpointPolicy,
    InputChangedError,
    OffloadError,
    _knobs,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_stats,
    offload_wrapper,
)
from wrappers.cli import entry
from wrappers.engine.replay import ReplayFrame
from wrappers.offload.simulated import Fault, SimulatedTransport
from wrappers.offload.store import reset_offloading
from wrappers.plan.hardware import PRESETS
from wrappers.policies import save_matmuls
from wrappers.report import region_report
from wrappers.select import by_class

pytestmark = pytest.mark.usefixtures("no_leaks", "seeded")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/replay.md").read_text()
OFFLOAD_PAGE = (ROOT / "docs/offload.md").read_text()
PLAN_PAGE = (ROOT / "docs/plan.md").read_text()
README = (ROOT / "README.md").read_text()

BATCH = 2
CONFIG = GPTConfig(num_layers=2, d_model=64, num_heads=4, seq_len=32, dropout=0)
D = BATCH * CONFIG.seq_len * CONFIG.d_model * 4  # bytes of one (batch, sequence, width)


def block_input() -> Tensor:
    return leaf(BATCH, CONFIG.seq_len, CONFIG.d_model)


class Modules(TorchDispatchMode):
    """For each operator of a module: its name, the innermost module, how many d it allocates."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.rows = []
        self._names = [""]
        for name, child in module.named_modules():
            child.register_forward_pre_hook(lambda *_, name=name: self._names.append(name))
            child.register_forward_hook(self._leave)

    def _leave(self, *_) -> None:
        self._names.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.detach.default:
            first = out[0] if isinstance(out, (tuple, list)) else out
            given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
            is_view = first.untyped_storage()._cdata in given
            size = "view" if is_view else f"{first.nbytes / D:g} d"
            self.rows.append((self._names[-1] or "(block)", func.overloadpacket.__name__, size))
        return out


def figure_of_a_real_run(monkeypatch) -> list[tuple[str, ...]]:
    """Module, operator, size, fate, and whether autograd saves an output, in order."""
    frames, saved = [], set()
    finish = ReplayFrame._finish

    def watched_finish(frame, *args):
        finish(frame, *args)
        frames.append(frame)
        saved.update(slot.index for ref in frame.slots if (slot := ref()) is not None)

    monkeypatch.setattr(ReplayFrame, "_finish", watched_finish)
    block, x = Block(CONFIG), block_input()
    with Modules(block) as modules:
        block(x)
    out = checkpoint_wrapper(Block(CONFIG), policy=save_matmuls(), verify="never")(x)
    (frame,) = frames
    needed = set(frame._needed)
    figure = []
    for position, (module, name, size) in enumerate(modules.rows):
        facts, _, _, _, made = frame._operators[position]
        assert facts.func.overloadpacket.__name__ == name
        values = {made} if type(made) is int else set(made)
        fate = "dropped"
        if values & frame._held.keys():
            fate = "KEPT"
        elif position in needed:
            fate = "replayed"
        figure.append((module, name, size, fate, "saved" if values & saved else ""))
    assert len(figure) == len(frame._operators) == frame.stats.num_operators
    out.sum().backward()
    fates = [row[3] for row in figure]
    stats = frame.stats
    assert fates.count("KEPT") == stats.num_kept
    assert fates.count("replayed") == stats.num_replayed
    assert fates.count("dropped") == stats.num_dropped
    frames.clear()
    return figure


_ROW = re.compile(
    r"^ [│▼] (?P<module>[\w.()]*) +(?P<op>\w+) +(?P<size>view|[\d.]+ d) +"
    r"(?P<fate>KEPT|replayed|dropped) *(?P<saved>saved)?$"
)


def figure_of_the_page() -> list[tuple[str, ...]]:
    (figure,) = re.findall(r"<!-- figure -->\n```text\n(.*?)```", PAGE, re.DOTALL)
    rows, module = [], ""
    for line in figure.splitlines():
        if found := _ROW.match(line):
            module = found["module"] or module
            rows.append((module, found["op"], found["size"], found["fate"], found["saved"] or ""))
    return rows


def test_the_figure_is_that_of_a_real_run(monkeypatch):
    figure = figure_of_a_real_run(monkeypatch)
    assert figure_of_the_page() == figure
    counts = {fate: sum(row[3] == fate for row in figure) for fate in ("KEPT", "replayed")}
    total = f"{len(figure)} operators: {counts['KEPT']} kept, {counts['replayed']} replayed"
    assert f"{total}, {len(figure) - sum(counts.values())} dropped" in PAGE
    kept = sum(float(row[2].removesuffix(" d")) for row in figure if row[3] == "KEPT")
    assert f"keeps {kept:g} d" in PAGE


KEPT_BY = {
    "recompute_all()": presets.recompute_all,
    "save_matmuls()": presets.save_matmuls,
    "save_every_other_matmul()": presets.save_every_other_matmul,
    "save_attention()": presets.save_attention,
    "save_compute_and_communication()": presets.save_compute_and_communication,
    "save_matmuls() \\| recompute_matmuls_of([(d, 4 * d)])": lambda: (
        presets.save_matmuls()
        | presets.recompute_matmuls_of([(CONFIG.d_model, 4 * CONFIG.d_model)])
    ),
}


@pytest.mark.parametrize("name", KEPT_BY)
def test_the_table_of_presets(name):
    block = checkpoint_wrapper(Block(CONFIG), policy=KEPT_BY[name](), verify="never")
    block(block_input())
    (row,) = region_report(block).rows
    statistics = BATCH * CONFIG.seq_len * CONFIG.num_heads * 4
    whole, rest = divmod(row.kept_bytes, D)
    assert rest in (0, statistics)
    kept = "nothing" if not row.kept_bytes else f"{whole} d"
    assert f"| `{name}` | {kept}{' + statistics' if rest else ''} |" in PAGE


def examples(text: str, fence: str) -> list[str]:
    return re.findall(rf"```{fence}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def names():
    torch.manual_seed(0)
    config = GPTConfig(num_layers=2, d_model=256, num_heads=8, seq_len=256, dropout=0)
    tokens = torch.randint(256, (BATCH, config.seq_len))
    return {"GPT": GPT, "Block": Block, "config": config, "tokens": tokens}


@pytest.mark.filterwarnings("ignore:.*that are there already")
@pytest.mark.filterwarnings("ignore:.*is rerun from now on")
@pytest.mark.parametrize("page", [PAGE, OFFLOAD_PAGE], ids=["replay", "offload"])
def test_the_examples_of_the_page_print_what_it_says(names, page, capsys):
    for code, output in re.findall(
        r"```python\n(.*?)```(?:\n\nprints\n\n```text\n(.*?)```)?", page, re.DOTALL
    ):
        exec(code, names)
        printed = capsys.readouterr().out
        if output:
            assert printed == output


def test_the_readmes_example_of_a_policy(names, capsys):
    code, _, _ = examples(README, "py")
    exec(code, names)
    assert "blocks.1" in capsys.readouterr().out
    rows = region_report(names["model"]).rows
    assert [(row.impl, row.num_kept) for row in rows] == [(CheckpointImpl.REPLAY, 3)] * 2


def test_a_compiled_module_inside_keeps_the_policy_in_the_rerun():
    model = nn.Sequential(Block(CONFIG))
    model[0].mlp.compile(backend="eager")
    apply_activation_checkpointing(model, check_fn=by_class(Block), policy=save_matmuls())
    with pytest.warns(UserWarning, match=r"^region `0` is rerun from now on"):
        model(block_input()).sum().backward()
    (row,) = region_report(model).rows
    assert row.impl is CheckpointImpl.NO_REENTRANT
    assert "compiled code inside" in row.reason


# --- Offload ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_offloading():
    reset_offloading()
    yield
    reset_offloading()


def test_the_readmes_example_of_offloading(names, capsys, fresh_offloading):
    _, code, _ = examples(README, "py")
    with SimulatedTransport(bandwidth_bytes_per_s=float("inf"), latency_s=0):
        exec(code, names)
    assert re.search(r"^host +24.0 MiB ", capsys.readouterr().out, re.MULTILINE)


def offloaded_gpt(wrap=None, **options) -> GPT:
    model = GPT(CONFIG)
    wrap = wrap or partial(offload_wrapper, min_bytes=4096, **options)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=by_class(Block))
    return model


def products_to_host(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    if op is torch.ops.aten.addmm.default:
        return CheckpointPolicy.MUST_CPU_OFFLOAD
    return CheckpointPolicy.PREFER_RECOMPUTE


def offloading_policy_gpt() -> GPT:
    model = GPT(CONFIG)
    apply_activation_checkpointing(
        model, check_fn=by_class(Block), policy=products_to_host, verify="never"
    )
    return model


def step(model: nn.Module) -> None:
    model(torch.zeros(BATCH, CONFIG.seq_len, dtype=torch.int64)).sum().backward()


def device(fails=lambda direction, number: None, **options) -> SimulatedTransport:
    """A simulated device whose copies take no time."""
    options = {"bandwidth_bytes_per_s": float("inf"), "latency_s": 0, **options}
    return SimulatedTransport(fault=fails, **options)


def exhaust_pinned_memory(tmp_path, monkeypatch):
    with device(host_bytes=2**18):
        step(offloaded_gpt())


def exhaust_host_memory(tmp_path, monkeypatch):
    with device(), _knobs.override(OFFLOAD_PINNED_BYTES=2**18, OFFLOAD_PAGEABLE_BYTES=0):
        step(offloaded_gpt())


def fill_the_disk(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    step(offloaded_gpt(tier="disk", directory=tmp_path))


def choose_a_file_as_directory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    offloaded_gpt(tier="disk", directory=tmp_path / "file" / "activations")


def fail_a_write(tmp_path, monkeypatch):
    with device(lambda *copy: Fault("fail") if copy == ("D2H", 3) else None):
        step(offloaded_gpt())


def fail_reads(tmp_path, monkeypatch):
    with device(lambda direction, _: Fault("fail") if direction == "H2D" else None):
        step(offloaded_gpt())


def corrupt_reads(tmp_path, monkeypatch):
    with device(lambda direction, _: Fault("corrupt") if direction == "H2D" else None):
        step(offloaded_gpt(checksum=True))


def fail_reads_of_a_policy(tmp_path, monkeypatch):
    with device(lambda direction, _: Fault("fail") if direction == "H2D" else None):
        step(offloading_policy_gpt())


class ChangesWhatItSaved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = x * 2
        out = doubled.sin()
        doubled.add_(1)
        return out


def change_what_leaves(tmp_path, monkeypatch):
    with device(latency_s=1):
        module = offload_wrapper(nn.Sequential(ChangesWhatItSaved()), min_bytes=1)
        module(leaf(64, 64)).sum().backward()


def change_what_stays(tmp_path, monkeypatch):
    with device():
        offload_wrapper(ChangesWhatItSaved())(leaf(64, 64)).sum().backward()


def checkpoint_around(tmp_path, monkeypatch):
    with device():
        step(offloaded_gpt(lambda block: checkpoint_wrapper(offload_wrapper(block, min_bytes=1))))
        assert offload_stats()["host"].num_out == 0


def run_a_policy_without_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr("wrappers.offload.transfer._accelerator", [])
    monkeypatch.setattr("wrappers._device.accelerator_tensors_exist", lambda: False)
    step(offloading_policy_gpt())


def offload_twice(tmp_path, monkeypatch):
    offload_wrapper(offload_wrapper(Block(CONFIG)))


#: By name: what goes wrong, and whether backward then raises.
MESSAGES = {
    "pageable": (exhaust_pinned_memory, None),
    "kept": (exhaust_host_memory, None),
    "full": (fill_the_disk, None),
    "unwritable": (choose_a_file_as_directory, OSError),
    "failed_write": (fail_a_write, None),
    "failed_read": (fail_reads, OffloadError),
    "computed_again": (fail_reads_of_a_policy, None),
    "corrupted": (corrupt_reads, OffloadError),
    "changed_leaving": (change_what_leaves, InputChangedError),
    "changed_staying": (change_what_stays, InputChangedError),
    "inside": (checkpoint_around, None),
    "no_device": (run_a_policy_without_an_accelerator, None),
    "already": (offload_twice, None),
}


def message_of(name: str, tmp_path, monkeypatch) -> str:
    """What the user reads first."""
    cause, error = MESSAGES[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if error is None:
            cause(tmp_path, monkeypatch)
        else:
            with pytest.raises(error) as raised:
                cause(tmp_path, monkeypatch)
            assert not said
            return str(raised.value).replace(str(tmp_path), "/scratch")
    return str(said[0].message).replace(str(tmp_path), "/scratch")


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_what_the_user_reads(name, tmp_path, monkeypatch, fresh_offloading):
    (text,) = re.findall(rf"<!-- {name} -->\n```text\n(.*?)```", OFFLOAD_PAGE, re.DOTALL)
    assert " ".join(text.split()) == message_of(name, tmp_path, monkeypatch)


def test_each_message_of_the_page_has_a_cause():
    assert sorted(re.findall(r"<!-- (\w+) -->", OFFLOAD_PAGE)) == sorted(MESSAGES)


def table_rows(title: str) -> list[list[str]]:
    """The cells of a table of the page about offloading, without its title."""
    (table,) = re.findall(rf"^\| {title} \|.*\n\|[-|]+\n((?:\|.*\n)+)", OFFLOAD_PAGE, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]


def test_the_options_are_those_of_offload_wrapper():
    parameters = list(inspect.signature(offload_wrapper).parameters.values())[1:]
    real = [[f"`{p.name}`", f"`{p.default!r}`"] for p in parameters]
    assert [row[:2] for row in table_rows("option")] == real


def test_the_knobs_are_those_of_the_package():
    def shown(name: str, value: int) -> str:
        units = {"TiB": 40, "GiB": 30, "MiB": 20, "KiB": 10}
        unit = next((u for u, bits in units.items() if value >= 1 << bits), None)
        return f"{value >> units[unit]} {unit}" if name.endswith("_BYTES") else str(value)

    real = {
        f"`{name}`": shown(name, value)
        for name, value in vars(_knobs).items()
        if name.startswith("OFFLOAD_")
    }
    assert {row[0]: row[1] for row in table_rows("knob")} == real


def test_the_table_of_steps_is_that_of_the_runs():
    timelines = offload_timeline.run_cases()
    assert offload_timeline.step_table(timelines) in OFFLOAD_PAGE
    picture = (ROOT / "docs/offload.svg").read_text()
    titles = [timelines[name].title for name in offload_timeline.DRAWN]
    assert re.findall(r">([^<]* a step, [^<]*)<", picture) == titles


def test_when_it_pays():
    assert offload_timeline.width_table() in OFFLOAD_PAGE
    least = {gbs: offload_timeline.least_width(gbs * 1e9) for gbs in (25, 50, 400)}
    text = " ".join(OFFLOAD_PAGE.split())
    assert f"at least {least[50]:.0f} at 50 GB/s, and {least[25]:.0f} at 25 GB/s" in text
    assert f"At 400 GB/s it would be {least[400]:.0f}." in text
    assert offload_timeline.least_width(50e9, saved_bytes=2) < 0  # the input, at any width
    whole_gib = offload_timeline.NUM_BLOCKS * 16 * 2 * 4096 * 12288 / 2**30
    assert f"Without offloading the blocks hold {whole_gib:g} GiB" in text
    assert f"the last block's {whole_gib / offload_timeline.NUM_BLOCKS:g} GiB" in text
    assert f"takes {4 * 2 * 4096 * 12288 // 2**20} MiB here" in text


def test_a_block_saves_sixteen_tensors():
    block = Block(CONFIG)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.nbytes() >= D:
            saved[storage.data_ptr()] = storage
        return tensor

    x = block_input().sin()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    sizes = sorted(storage.nbytes() // D for storage in saved.values())
    assert sizes == [1, 1, 1, 1, 1, 3, 4, 4]
    assert 2 * sum(sizes) == offload_timeline.SAVED_BYTES
    out.sum().backward()


def test_around_a_checkpointed_block_its_input_is_offloaded(fresh_offloading):
    with device():
        step(offloaded_gpt(lambda b: offload_wrapper(checkpoint_wrapper(b), min_bytes=1)))
        stats = offload_stats()["host"]
    assert (stats.num_out, stats.out_bytes) == (CONFIG.num_layers, CONFIG.num_layers * D)


def test_each_backward_of_a_graph_fetches_it_again(fresh_offloading):
    model = offloaded_gpt()
    with device():
        loss = model(torch.zeros(BATCH, CONFIG.seq_len, dtype=torch.int64)).square().sum()
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in model.parameters()]
        before = offload_stats()["host"]
        model.zero_grad()
        loss.backward()
        after = offload_stats()["host"]
    assert_equal([p.grad for p in model.parameters()], first)
    assert before.num_back == before.num_out == after.num_out == 16
    assert after.num_back == 2 * before.num_back


def test_after_it_has_left_a_tensor_may_not_change_either(fresh_offloading):
    x = leaf(64, 64)
    with device():
        module = offload_wrapper(LeavesFirst(), min_bytes=1)
        out = module(x).sum()
        with pytest.raises(InputChangedError, match="after it had been saved"):
            out.backward()


class LeavesFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = x * 2
        out = doubled.sin()
        out.sin()  # Whatever is saved next finds the first copy done.
        doubled.add_(1)
        return out


def test_under_autocast_the_casts_of_weights_move_too(fresh_offloading):
    with device(), torch.autocast("cpu", torch.bfloat16):
        offload_wrapper(nn.Linear(64, 64), min_bytes=1)(leaf(4, 64).sin()).sum().backward()
        assert offload_stats()["host"].out_bytes == 2 * (4 * 64 + 64 * 64)


@pytest.mark.parametrize("how", ["compiled", "without grad"])
def test_nothing_is_offloaded_and_nothing_said(how, fresh_offloading):
    model = offloaded_gpt()
    with device():
        if how == "compiled":
            step(torch.compile(model, backend="eager"))
        else:
            with torch.no_grad():
                model(torch.zeros(1, 4, dtype=torch.int64))
        assert offload_stats().tiers == ()


# --- A memory budget --------------------------------------------------------------------------


def tables_of_the_plan_page() -> dict[str, str]:
    return dict(re.findall(r"<!-- (\w+) -->\n((?:[^\n]+\n)+)", PLAN_PAGE))


@pytest.mark.parametrize("name", ["operators", "menu", "plan"])
def test_the_tables_of_the_plan_page_are_those_of_a_profile(name):
    assert tables_of_the_plan_page()[name] == getattr(plan_block, f"{name}_table")()


def test_the_prose_of_the_plan_page_is_that_of_the_profile():
    text = " ".join(PLAN_PAGE.split())
    assert plan_block.plan_facts() in text
    structure = plan_block.block_of(plan_block.make_profile())
    assert f"{len(structure.operators)} of its {structure.num_operators} operators" in text
    assert f"`attention` costs {structure.operators[2].time_us:.0f} us alone" in text
    config = plan_block.CONFIG
    assert f"of width {config.d_model} with {config.num_heads} heads" in text
    assert f"{plan_block.BATCH} sequences of {config.seq_len} tokens" in text
    assert f"tensor, {plan_block.D // 2**20} MiB" in text
    assert f"with {plan_block.BUDGET_BYTES // 2**30} GiB for activations" in text
    assert f"Presets are {', '.join(list(PRESETS)[:-1])} and {list(PRESETS)[-1]}" in text


def test_what_the_plan_page_says_about_rows_of_the_menu():
    options = plan_block.block_of(plan_block.make_profile()).options
    found = {plan_block.what(option): option for option in options}
    everything = found[", ".join(plan_block.SHOWN[0][0]), ""]
    assert everything.backward_bytes - options[0].backward_bytes == 4 * plan_block.D
    nothing, one = found["nothing", ""], found["sum 1", ""]
    assert one.kept_bytes - nothing.kept_bytes == plan_block.D
    assert round((nothing.backward_bytes - one.backward_bytes) / plan_block.D, 1) == 5
    assert one.extra_us < nothing.extra_us


def test_early_blocks_need_most_and_keep_least():
    """As the page says, which also says that kept bytes and needs are within the budget."""
    needs = [items[0].need_bytes for items in plan_block.chain().items]
    assert needs == sorted(needs, reverse=True)
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in tables_of_the_plan_page()["plan"].splitlines()[2:]
    ]
    together = [float(row[5].removesuffix(" d")) for row in rows]
    assert max(together) <= plan_block.BUDGET_BYTES / plan_block.D
    kept = [float(row[2].removesuffix(" d")) for row in rows]
    assert kept[0] == min(kept)


def test_the_command_lines_are_understood():
    text = f"{README}\n{PLAN_PAGE}".replace("\\\n", " ")
    lines = re.findall(r"^(?:.*`)?wrappers ((?:plan|profile) [^`#\n]*)", text, re.MULTILINE)
    lines = [line for line in lines if not line.startswith("plan --help")]
    assert len(lines) == 3
    for line in lines:
        entry._parser().parse_args(shlex.split(line))


@pytest.fixture
def _quick_planning(monkeypatch):
    """Few of the ways to treat a block, and times that mean nothing."""
    monkeypatch.setattr(_knobs, "PLAN_MENU_RUNS", 8)
    monkeypatch.setattr(_knobs, "PLAN_TIMED_STEPS", 1)
    monkeypatch.setattr(_knobs, "PLAN_TIMED_OPERATOR_STEPS", 1)


@pytest.mark.usefixtures("_quick_planning")
def test_the_examples_of_the_plan_page_run(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code in examples(PLAN_PAGE, "python"):
        exec(code, names)
    report = names["report"]
    assert report.wrapped
    assert str(report) in (printed := capsys.readouterr().out)
    assert "memory at the peak" in printed
    assert names["plan"].world_size == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.html", "plan.json"]


# --- docs/composition.md, docs/state.md ---------------------------------------------------------


def test_the_matrix_is_that_of_the_tests():
    page = (ROOT / "docs/composition.md").read_text()
    table = page.partition("<!-- matrix -->\n\n")[2].partition("\n## ")[0]
    assert table == matrix.render()


def test_the_example_of_the_state_page_runs_and_goes_on_where_it_stopped(tmp_path):
    page = (ROOT / "docs/state.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    tokens = torch.zeros(BATCH, CONFIG.seq_len, dtype=torch.long)
    names = {"GPT": GPT, "Block": Block, "config": CONFIG, "tokens": tokens, "folder": tmp_path}
    exec(example, names)
    kept = ["step-00000003", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    shutil.rmtree(tmp_path / kept[1])
    interrupted = dict(names)
    exec(example, interrupted)
    assert interrupted["step"] == 3
    assert interrupted["scheduler"].last_epoch == 4
    found, expected = (each["model"].state_dict() for each in (interrupted, names))
    assert list(found) == list(expected)
    assert_equal(found.values(), expected.values())


def test_the_readmes_example_of_state_checkpoints(tmp_path, monkeypatch):
    _, _, example = examples(README, "py")
    monkeypatch.chdir(tmp_path)
    model = GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        exec(example, {"model": model, "optimizer": optimizer})
        assert wrappers.state.latest("runs/a") == tmp_path / f"runs/a/step-{step:08}"


# --- docs/plan.md: figures of the benchmarks


@pytest.mark.parametrize("name", list(plan_tables.TABLES))
def test_the_benchmarks_tables_are_those_of_the_committed_results(name):
    table = plan_tables.TABLES[name]()
    assert len(table.splitlines()) > 6
    assert table in (ROOT / "docs/plan.md").read_text()
