"""The pages of ``docs`` tell the truth: their examples run, their figure is that of a real run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import wrappers.policies as presets
from scripts.model import GPT, Block, GPTConfig
from tests.engine.helpers import leaf
from wrappers import CheckpointImpl, apply_activation_checkpointing, checkpoint_wrapper
from wrappers.engine.replay import ReplayFrame
from wrappers.policies import save_matmuls
from wrappers.report import region_report
from wrappers.select import by_class

pytestmark = pytest.mark.usefixtures("no_leaks", "seeded")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/replay.md").read_text()
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
def test_the_examples_of_the_page_print_what_it_says(names, capsys):
    for code, output in re.findall(
        r"```python\n(.*?)```(?:\n\nprints\n\n```text\n(.*?)```)?", PAGE, re.DOTALL
    ):
        exec(code, names)
        printed = capsys.readouterr().out
        if output:
            assert printed == output


def test_the_readmes_example_of_a_policy(names, capsys):
    (code,) = examples(README, "py")
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
