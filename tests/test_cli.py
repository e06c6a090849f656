"""The command line: what reaches the planner, what is printed, and how each failure ends.

The planner itself is replaced by one that notes what it is asked and answers with a profile made by
hand, but in the tests at the end.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.plan import synthetic
from wrappers import _torch
from wrappers.cli import commands, entry, main, models
from wrappers.cli.failure import Exit
from wrappers.errors import InfeasibleBudgetError, WrapperError
from wrappers.plan import schema
from wrappers.plan.build import build_plan
from wrappers.plan.hardware import find_hardware
from wrappers.plan.plan import Plan
from wrappers.plan.records import Profile

KIB = 1024

USERS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.fc(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def build():
    return Model()


def build_loudly():
    print("printed while it is built")
    return Model()


def build_badly():
    return undefined_name


def build_a_list():
    return [Model()]


def no_blocks():
    return nn.Linear(4, 4)


def batch():
    return torch.ones(2, 4)


def is_block(module):
    return isinstance(module, Block)


def is_nothing(module):
    return False


def loss(output):
    return output.sum()


def make_optimizer(parameters):
    return torch.optim.Adagrad(parameters)


model = Model()
tensor = torch.ones(2, 4)
positional = (torch.ones(2, 4),)
named = {"x": torch.ones(2, 4)}
several = [torch.ones(2, 4), {"x": torch.ones(3, 4)}]
number = 7
"""


@pytest.fixture(autouse=True)
def nothing_stored(tmp_path, monkeypatch):
    """What a machine was calibrated to does not matter here."""
    monkeypatch.setenv("WRAPPERS_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A directory with the user's code, ``users.py``, which is the current one."""
    (tmp_path / "users.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


class Planner:
    """Stands for ``wrappers.plan.api``.

    Attributes:
        asked: Model, sample and settings of the profile.
        planned: Budget and settings of the plan.
        error: What it raises instead of planning.
    """

    def __init__(self) -> None:
        self.asked: tuple = ()
        self.planned: tuple = ()
        self.error: Exception | None = None

    def profile(self, model, sample, **settings):
        self.asked = (model, sample, settings)
        return synthetic.profile(3)

    def make_plan(self, profile, memory_budget, **settings) -> Plan:
        self.planned = (memory_budget, settings)
        if self.error is not None:
            raise self.error
        choice = (synthetic.NOTHING, synthetic.PRODUCT, synthetic.PLAIN)
        return build_plan(profile, choice, budget_bytes=memory_budget)


@pytest.fixture
def planner(monkeypatch):
    import wrappers.plan

    stand_in = Planner()
    monkeypatch.setitem(sys.modules, "wrappers.plan.api", stand_in)
    monkeypatch.setattr(wrappers.plan, "api", stand_in, raising=False)
    return stand_in


def run_json(capsys, *argv: str) -> tuple[int, dict]:
    """The exit code and the one object on standard output."""
    code = main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def error_of(capsys, *argv: str) -> tuple[int, str]:
    """The exit code and what stands on standard error; nothing on standard output."""
    code = main(list(argv))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if ": error: " in line]
    return code, line


MINE = ("users:build", "--sample", "users:batch")
PLAN = ("plan", *MINE, "--budget", "400KiB")

# --- What reaches the planner


def test_a_profile(users, planner, capsys):
    assert main(["profile", *MINE]) == 0
    model, sample, settings = planner.asked
    assert type(model).__name__ == "Model"
    assert torch.equal(sample, torch.ones(2, 4))
    assert repr(settings.pop("check_fn")) == "repeated_blocks()"
    assert settings == {
        "loss_fn": None,
        "optimizer": torch.optim.AdamW,
        "hardware": None,
    }
    assert "3 regions" in capsys.readouterr().out


def test_a_plan_for_another_device(users, planner, capsys):
    options = ["--device", "h100", "--check-fn", "users:is_block", "--loss", "users:loss"]
    options += ["--optimizer", "users:make_optimizer"]
    assert main([*PLAN, *options, "--count", "activations"]) == 0
    module = sys.modules["users"]
    model, sample, settings = planner.asked
    assert {p.device.type for p in model.parameters()} == {sample.device.type} == {"meta"}
    assert settings.pop("hardware").name == "H100"
    assert settings == {
        "check_fn": module.is_block,
        "loss_fn": module.loss,
        "optimizer": module.make_optimizer,
    }
    assert planner.planned == (400 * KIB, {"count": "activations"})
    assert "plan for Model: 2 of 3 regions wrapped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "num_ranks"),
    [
        ((), 1),
        (("--fsdp",), 1),
        (("--world-size", "4"), 4),
        (("--world-size", "4", "--no-fsdp"), 1),
    ],
)
def test_several_ranks_shard_unless_told_otherwise(users, planner, options, num_ranks):
    assert main(["profile", *MINE, *options]) == 0
    model, _, settings = planner.asked
    assert (settings["hardware"] is None) is (num_ranks == 1)  # measured here, or derived
    sharding = settings.get("sharding")
    assert (sharding is None) is (num_ranks == 1)
    if sharding is not None:
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert sharding.num_ranks == num_ranks
        names = ["blocks.0", "blocks.1", "blocks.2", ""]
        assert [unit.fqn for unit in sharding.units] == names


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("none", None)],
)
def test_optimizers_by_name(users, planner, name, expected):
    assert main(["profile", *MINE, "--optimizer", name]) == 0
    assert planner.asked[2]["optimizer"] is expected


def test_regions_by_class(users, planner):
    assert main(["profile", *MINE, "--blocks", "Block"]) == 0
    model, _, settings = planner.asked
    chosen = [name for name, module in model.named_modules() if settings["check_fn"](module)]
    assert chosen == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("name", ["tensor", "positional", "named", "several", "batch"])
def test_forms_of_a_sample(users, planner, name):
    assert main(["profile", "users:model", "--sample", f"users:{name}"]) == 0
    model, sample, _ = planner.asked
    found = getattr(sys.modules["users"], name)
    assert model is sys.modules["users"].model
    assert sample is found or name == "batch"


def test_a_built_in_model_has_a_sample_and_needs_no_memory(planner):
    assert main(["profile", "gpt:2x64:seq=32,batch=4"]) == 0
    model, sample, settings = planner.asked
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sample["tokens"].shape == sample["targets"].shape == (4, 32)
    assert settings["hardware"] == find_hardware("this")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GiB", 12 * 1024**3), ("800 MB", 800_000_000), ("90%", int(0.9 * 80 * 1024**3))],
)
def test_budgets(planner, text, expected):
    assert main(["plan", "gpt:2x64", "--device", "H100", "--budget", text]) == 0
    assert planner.planned[0] == expected


# --- What is printed and saved


def test_a_plan_is_saved_drawn_and_printed_for_machines(users, planner, capsys):
    code, data = run_json(capsys, *PLAN, "-o", "plan.json", "--plot", "plan.html")
    assert code == 0
    assert (data["command"], data["model"]) == ("plan", "users:build")
    plan = Plan.load("plan.json")
    assert json.loads(plan.to_json()) == data["plan"]
    assert planner.planned[1]["frontier_points"] > 5
    assert planner.planned[1]["progress"](0.5) is None  # no bar
    assert plan.hash == data["hash"]
    assert "<svg" in Path("plan.html").read_text()
    assert data["files"] == {"output": "plan.json", "plot": "plan.html"}


def test_a_profile_is_saved_and_printed_for_machines(users, planner, capsys):
    code, data = run_json(capsys, "profile", *MINE, "-o", "profile.json")
    assert code == 0
    assert json.loads(Path("profile.json").read_text()) == data["profile"]
    assert [region["fqn"] for region in data["profile"]["regions"]] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]


def test_what_the_users_code_prints_is_apart_from_the_object(users, planner, capsys):
    argv = ["profile", "users:build_loudly", *MINE[1:]]
    assert main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert captured.err == "printed while it is built\n"
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("printed while it is built\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("has_rich", [True, False])
@pytest.mark.parametrize("argv", [PLAN, ("profile", *MINE), ("doctor",)], ids=lambda a: a[0])
def test_tables_on_a_terminal(users, planner, monkeypatch, argv, has_rich):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", Terminal())
    if not has_rich:
        for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "rich", None)
    assert main(list(argv)) == 0
    text = terminal.getvalue()
    assert any(title in text for title in ("regions wrapped", "3 regions", "problems found"))
    assert ("┃" in text) is has_rich


def test_warnings_are_lines_or_a_list(users, planner, capsys):
    (users / "warns.py").write_text(
        "import warnings\nfrom users import *\ndef warn():\n"
        "    warnings.warn('mind\\n this')\n    return Model()\n"
    )
    argv = ("profile", "warns:warn", "--sample", "users:tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(list(argv)) == 0
        assert "wrappers profile: warning: mind this\n" in capsys.readouterr().err
        code, data = run_json(capsys, *argv)
    assert (code, data["warnings"]) == (0, ["mind this"])


# --- Failures

FAILURES = {
    "no colon": (("users.build",), 2, "import_path", "is not of the form my.module:name"),
    "no module": (("nowhere.at.all:build",), 2, "import_path", "there is no module nowhere in"),
    "no submodule": (("users.inner:build",), 2, "import_path", "there is no module users.inner"),
    "no attribute": (("users:buidl",), 2, "attribute", "users has no `buidl`"),
    "deeper": (("users:Model.build",), 2, "attribute", "users:Model has no `build`"),
    "not a model": (("users:number",), 2, "not_a_model", "is a int"),
    "returns no model": (("users:build_a_list",), 2, "not_a_model", "returned a list"),
    "fails when built": (("users:build_badly",), 1, "model_build", "name 'undefined_name'"),
    "nothing repeats": (("users:no_blocks",), 2, "no_blocks", "nothing repeats in this Linear"),
    "no such class": ((*MINE[:1], "--blocks", "Blok"), 2, "no_blocks", "Block (3), Linear (3)"),
    "chooses nothing": (
        (*MINE[:1], "--check-fn", "users:is_nothing"),
        2,
        "no_blocks",
        "--check-fn users:is_nothing chooses no module",
    ),
    "check fails": (
        (*MINE[:1], "--check-fn", "users:build"),
        1,
        "check_fn",
        "--check-fn users:build failed on a ModuleList: TypeError",
    ),
    "loss is no function": ((*MINE[:1], "--loss", "users:number"), 2, "not_callable", "got int"),
    "no such optimizer": ((*MINE[:1], "--optimizer", "adm"), 2, "optimizer", "adamw, sgd, none"),
    "no such device": ((*MINE[:1], "--device", "H1000"), 2, "device", "Did you mean H100"),
    "no such option": ((*MINE[:1], "--samples", "x"), 2, "usage", "unrecognized arguments"),
    "both": ((*MINE[:1], "--blocks", "A", "--check-fn", "b:c"), 2, "usage", "not allowed with"),
    "no ranks": ((*MINE[:1], "--world-size", "0"), 2, "usage", "must be at least 1, got 0"),
    "no such size": (("llama:9b",), 2, "builtin_model", "no built-in model 'llama:9b'"),
    "no such setting": (("gpt:2x64:layers=3",), 2, "builtin_model", "'layers' is no option"),
    "no directory": ((*MINE[:1], "-o", "no/where.json"), 4, "file", "cannot be written"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures(users, planner, capsys, case):
    argv, code, kind, text = FAILURES[case]
    argv = ("profile", *argv, "--sample", "users:batch")
    found, line = error_of(capsys, *argv)
    assert (found, text in line) == (code, True), line
    assert line.startswith("wrappers profile: error: ")
    assert planner.asked == ()
    found, data = run_json(capsys, *argv)
    assert (found, data["error"]["kind"], data["error"]["exit_code"]) == (code, kind, code)
    assert text in data["error"]["message"] + data["error"]["remedy"]


SAMPLES = {
    "none": (None, "no_sample", "needs --sample my.module:name"),
    "a number": ("users:number", "sample", "is a int"),
    "no tensor": ("users:nothing", "sample", "is a tuple without a tensor in it"),
    "a list of numbers": ("users:numbers", "sample", "is a list with a int"),
    "an empty list": ("users:empty", "sample", "is an empty list"),
    "no names": ("users:unnamed", "sample", "keys are no names of arguments"),
    "no attribute": ("users:bach", "attribute", "Close to it: batch"),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_that_are_none(users, planner, capsys, case):
    more = "nothing = ()\nnumbers = [1]\nempty = []\nunnamed = {0: tensor}\n"
    (users / "users.py").write_text(USERS + more)
    name, kind, text = SAMPLES[case]
    argv = ("profile", "users:build", *(("--sample", name) if name else ()))
    code, data = run_json(capsys, *argv)
    assert (code, data["error"]["kind"]) == (2, kind)
    assert text in data["error"]["message"] + data["error"]["remedy"]
    assert planner.asked == ()


def test_an_error_of_the_users_says_where(users, planner, capsys):
    code, data = run_json(capsys, "profile", "users:build_badly", "--sample", "users:batch")
    line = USERS.splitlines().index("    return undefined_name") + 1
    assert (code, data["error"]["where"]) == (1, f"{users / 'users.py'}:{line}")


def test_what_needs_values_cannot_be_built_without_memory(users, planner, capsys):
    (users / "reads.py").write_text(
        "from users import *\ndef build():\n    return Model() if torch.ones(1).item() else None\n"
    )
    argv = ("profile", "reads:build", "--sample", "users:batch")
    code, line = error_of(capsys, *argv, "--device", "H100")
    assert (code, "For --device it runs under torch.device('meta')" in line) == (1, True)
    assert main(list(argv)) == 0


@pytest.mark.parametrize(
    ("source", "code", "text"),
    [
        ("import not_installed_at_all", 4, "imports not_installed_at_all, which is not installed"),
        ("1 / 0", 1, "importing broken failed: ZeroDivisionError: division by zero"),
        ("def f(:", 1, "importing broken failed: SyntaxError"),
    ],
)
def test_modules_that_do_not_import(users, capsys, source, code, text):
    (users / "broken.py").write_text(source)
    found, line = error_of(capsys, "profile", "broken:f", "--sample", "broken:f")
    assert (found, text in line) == (code, True), line


@pytest.mark.parametrize(
    ("budget", "text"),
    [("12G", "12GiB"), ("much", "cannot be read"), ("0B", "at least one byte"), ("150%", "device")],
)
def test_budgets_that_are_none(users, planner, capsys, budget, text):
    code, line = error_of(capsys, "plan", *MINE, "--budget", budget)
    assert (code, "--budget: " in line, planner.asked) == (2, True, ())
    assert text in line or text.replace("12", "") in line


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("plan", *MINE), "required: --budget"),
        (("plan", "--budget", "1GiB"), "required: MODEL"),
        (("paint",), "invalid choice: 'paint'"),
        ((), "required: COMMAND"),
    ],
)
def test_usage(capsys, argv, text):
    code, line = error_of(capsys, *argv)
    assert (code, text in line, "--help` shows" in line) == (2, True, True)
    code, data = run_json(capsys, *argv)
    assert (code, data["error"]["kind"]) == (2, "usage")


def test_a_budget_that_nothing_fits_into(users, planner, capsys):
    planner.error = InfeasibleBudgetError(
        "no plan fits into 400.0 KiB: the smallest budget is 500.0 KiB",
        fqn="blocks.0",
        budget_bytes=400 * KIB,
        smallest_bytes=500 * KIB,
    )
    code, line = error_of(capsys, *PLAN, "-o", "plan.json")
    assert (code, "the smallest budget is 500.0 KiB" in line) == (3, True)
    assert not Path("plan.json").exists()
    code, data = run_json(capsys, *PLAN)
    assert (code, data["error"]["kind"]) == (3, "infeasible_budget")
    assert data["error"]["smallest_bytes"] == 500 * KIB
    assert data["error"]["fqn"] == "blocks.0"


def raised_by_torch() -> Exception:
    try:
        nn.Linear(3, 4)(torch.ones(2, 5))
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (raised_by_torch(), 1, "model_run"),
        (WrapperError("region `a`: no", fqn="a"), 1, "planner"),
        (ImportError("pip install 'activation-wrappers[plan]'"), 4, "extra"),
    ],
    ids=["model", "planner", "extra"],
)
def test_errors_of_the_planner(users, planner, capsys, error, code, kind):
    planner.error = error
    found, data = run_json(capsys, *PLAN)
    assert (found, data["error"]["kind"]) == (code, kind)
    if kind == "planner":
        assert data["error"]["fqn"] == "a"


def test_a_defect_of_ours_says_so_and_debug_shows_it(users, planner, capsys, monkeypatch):
    def broken(*_: object) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(entry, "_run", broken)
    code, line = error_of(capsys, *PLAN)
    assert (code, "AssertionError: an invariant. Run it again with --debug" in line) == (5, True)
    assert main([*PLAN, "--debug"]) == 5
    assert "in broken" in capsys.readouterr().err


def test_debug_shows_the_users_error(users, planner, capsys):
    assert main(["profile", "users:build_badly", "--sample", "users:batch", "--debug"]) == 1
    assert "in build_badly" in capsys.readouterr().err


def test_an_interrupt(users, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "wrappers doctor: interrupted\n"


def test_a_reader_that_has_had_enough(monkeypatch):
    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(entry, "_run", closed)
    assert main(["doctor"]) == 0


@pytest.mark.parametrize("path", ["plan.pdf", "no/where.html"])
def test_pictures_that_cannot_be_drawn(users, planner, capsys, path):
    code, _ = error_of(capsys, *PLAN, "--plot", path)
    assert (code, planner.asked) == (2 if path.endswith("pdf") else 4, ())


def test_a_picture_needs_matplotlib(users, planner, capsys, monkeypatch):
    real = commands.importlib.util.find_spec
    monkeypatch.setattr(
        commands.importlib.util, "find_spec", lambda n: None if n == "matplotlib" else real(n)
    )
    code, line = error_of(capsys, *PLAN, "--plot", "plan.html")
    assert (code, "activation-wrappers[plot]" in line, planner.asked) == (4, True, ())


# --- doctor, help


def test_doctor(users, capsys, monkeypatch):
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("no problems found\n")
    code, data = run_json(capsys, "doctor", "--model", "users:build")
    assert (code, data["num_problems"]) == (0, 0)
    assert data["rows"][0]["name"] == "torch"
    assert "3 modules of class Block" in next(
        row["what"] for row in data["rows"] if row["name"] == "blocks"
    )


def test_doctor_looks_through_models_that_no_memory_holds(capsys):
    code, data = run_json(capsys, "doctor", "--model", "llama:70b")
    assert (code, data["rows"][-1]["name"]) == (0, "regions")


def test_a_problem_is_an_exit_code(users, capsys):
    (users / "on.py").write_text("from users import *\nmodel.gradient_checkpointing = True\n")
    code, data = run_json(capsys, "doctor", "--model", "on:model")
    assert (code, data["num_problems"]) == (1, 1)
    assert main(["doctor", "--model", "on:model"]) == 1
    assert "gradient_checkpointing_disable()" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["doctor"], ["profile"], ["plan"]])
def test_help_lists_the_exit_codes(capsys, argv):
    assert main([*argv, "--help"]) == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.partition("exit codes:\n")[2].splitlines()]
    assert listed[: len(Exit)] == [str(int(code)) for code in Exit]
    assert all(len(line) <= 100 for line in text.splitlines())


def test_exit_codes_in_the_docs_are_these():
    text = " ".join(sys.modules["wrappers.cli"].__doc__.split())
    for code in Exit:
        assert f" {int(code)} " in text


def test_python_m_wrappers(users):
    """And what it imports before it fails: no extra."""
    command = [sys.executable, "-X", "importtime", "-m", "wrappers", "plan", "users:buidl"]
    result = subprocess.run(
        [*command, "--sample", "users:batch", "--budget", "1GiB", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(entry.__file__).parents[2])},
    )
    assert result.returncode == 2, result.stderr
    assert json.loads(result.stdout)["error"]["close"][0] == "build"
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "wrappers.cli.entry" in imported
    assert not imported & {"rich", "scipy", "matplotlib", "transformers"}


# --- Built-in models

PARAMETERS = {
    "gpt:12x768": 124_439_808,  # GPT-2
    "gpt:48x1600": 1_557_611_200,  # GPT-2 XL
    "llama:7b": 6_738_415_616,  # Llama 2 7B
    "llama:8b": 8_030_261_248,  # Llama 3 8B
    "llama:13b": 13_015_864_320,  # Llama 2 13B
    "llama:70b": 70_553_706_496,  # Llama 3 70B
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_built_in_models_have_the_parameters_of_their_namesakes(name):
    with torch.device("meta"):
        model = models.builtin_named(name).build()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["gpt:2x64:seq=8,batch=2", "gpt:2x192:dtype=bfloat16"])
def test_built_in_models_train(name, seeded):
    builtin = models.builtin_named(name)
    model, sample = builtin.build(), builtin.sample()
    loss = model(**{key: value[:1, :8] for key, value in sample.items()})
    assert loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("model_class", [models.GPT, models.Llama])
def test_built_in_models_train_and_are_causal(seeded, model_class):
    model = model_class(models.Sizes(2, 32, 4, 2, 48, 64, 8, 1, "float32"))
    logits = []
    model.head.register_forward_hook(lambda module, args, output: logits.append(output))
    tokens = torch.randint(64, (1, 8))
    other = tokens.clone()
    other[0, 7] += 1
    model(tokens, tokens).backward()
    model(other % 64, tokens)
    assert all(bool(p.grad.any()) for p in model.parameters())
    torch.testing.assert_close(logits[0][:, :7], logits[1][:, :7])
    assert not torch.allclose(logits[0][:, 7], logits[1][:, 7])


def test_the_order_of_tokens_matters_to_a_llama(seeded):
    """As its positions turn: attention alone does not see the order of what came before."""
    sizes = models.Sizes(1, 32, 4, 4, 48, 64, 8, 1, "float32")
    model = models.Llama(sizes)
    x = model.embed(torch.tensor([[1, 2, 3]]))
    positions = model.cos[:3], model.sin[:3]
    there, back = (model.blocks[0](y, *positions) for y in (x, x[:, [1, 0, 2]]))
    assert not torch.allclose(there[:, 2], back[:, 2])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpt:0x64", "layers must be at least 1, got 0"),
        ("gpt:12", "there is no built-in model 'gpt:12'"),
        ("gpt:2x64:seq=long", "seq must be a number, got 'long'"),
        ("llama:7b:dtype=int8", "dtype must be one of float32, bfloat16, float16"),
    ],
)
def test_built_in_models_that_there_are_not(name, text):
    with pytest.raises(ValueError, match=text):
        models.builtin_named(name)


def test_a_users_module_may_be_called_as_a_built_in_one():
    assert models.is_builtin("gpt:12x768")
    assert not models.is_builtin("gpt:build")
    assert not models.is_builtin("my.gpt:12x768")


# --- With the planner


def test_from_a_name_to_a_plan_that_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "gpt:2x16:seq=16,batch=2,vocab=32"
    argv = ("plan", name, "--optimizer", "sgd", "--budget")
    code, data = run_json(capsys, *argv, "1KiB")
    smallest = data["error"]["smallest_bytes"]
    assert (code, data["error"]["budget_bytes"], smallest > KIB) == (3, KIB, True)
    code, data = run_json(capsys, *argv, str(smallest), "-o", "plan.json")
    assert (code, data["plan"]["budget_bytes"]) == (0, smallest)
    assert data["plan"]["peak"]["num_bytes"] <= smallest
    builtin = models.builtin_named(name)
    model = builtin.build()
    report = Plan.load("plan.json").apply(model)
    assert "blocks.0" in report.wrapped
    model(**builtin.sample()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_that_fails_when_it_is_run_says_where(users, capsys):
    """In one line: torch does not log a traceback beside it."""
    source = USERS.replace("        return x\n\n\ndef build", "        return x @ x\n\n\ndef build")
    assert source != USERS
    (users / "users.py").write_text(source)
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append
    log = _torch.fake_tensor_log()
    log.addHandler(handler)
    try:
        code, data = run_json(capsys, "profile", *MINE)
    finally:
        log.removeHandler(handler)
    error = data["error"]
    assert (code, error["kind"], logged, log.disabled) == (1, "model_run", [], False)
    line = source.splitlines().index("        return x @ x") + 1
    assert error["where"] == f"{users / 'users.py'}:{line}"
    assert error["where"] in error["message"]


def test_a_profile_is_read_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "gpt:2x16:seq=16,batch=2,vocab=32"
    argv = ("profile", name, "--device", "H100", "--optimizer", "none")
    assert main([*argv, "-o", "profile.json"]) == 0
    assert "blocks.0..blocks.1 x2" in capsys.readouterr().out
    found = schema.read(Profile, json.loads(Path("profile.json").read_text()))
    assert [region.fqn for region in found.regions] == ["blocks.0", "blocks.1"]
    assert (found.hardware.name, found.is_measured) == ("H100", False)
