"""The recipes run as their docstrings say, and docs/recipes.md shows them as they are.

Each is run twice, as it is and with ``--plain``, which leaves activation checkpointing out: the
losses that it prints must be the same to the last digit. The processes of a launch import once and
run both, see :mod:`tests.forks`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.torchrun import ENVIRONMENT, ROOT, TIMEOUT_S

FOLDER = ROOT / "scripts/recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
PAGE = (ROOT / "docs/recipes.md").read_text()

#: What the start of a command means here; torchrun on the loopback address, without a host name.
LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--local-addr", "127.0.0.1"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}


def command_of(name: str) -> str:
    """The command in a recipe's docstring, on one line."""
    docstring = (FOLDER / f"{name}.py").read_text().split('"""')[1]
    (command,) = (part for part in docstring.split("\n\n") if f"/{name}.py" in part)
    return command.replace("\\\n", " ").strip()


def run(words: list[str], folder: Path) -> list[str]:
    """Run a recipe's command in a folder; returns the losses that were printed."""
    words = list(words)
    settings = {}
    while "=" in words[0]:
        key, value = words.pop(0).split("=")
        settings[key] = value
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[words[0]], *words[1:]],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, **settings},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^step \d+: loss \d+\.\d+$", done.stdout, re.M)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Runs a recipe both ways, once for all tests of this file.

    Returns what both have printed, the losses of the plain one last, and the folder of the first.
    """

    @functools.cache
    def started(name: str) -> tuple[list[str], Path]:
        folder, plain_folder = (tmp_path_factory.mktemp(name) for _ in range(2))
        (folder / "scripts").symlink_to(ROOT / "scripts")  # what it writes stays in the folder
        words = shlex.split(command_of(name))
        at = words.index(f"scripts/recipes/{name}.py")
        launcher, command = words[:at], words[at:]
        commands = [[str(folder), *command], [str(plain_folder), *command, "--plain"]]
        return run([*launcher, str(ROOT / "tests/forks.py"), json.dumps(commands)], folder), folder

    return started


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_as_without_activation_checkpointing(name, started):
    printed, _ = started(name)
    losses, plain = printed[:4], printed[4:]
    assert [line.split(":")[0] for line in losses] == [f"step {number}" for number in range(1, 5)]
    assert plain == losses


def test_a_run_of_fsdp2_that_is_started_again_goes_on(started):
    """The newest state checkpoint goes away, and the last two steps are made once more."""
    printed, folder = started("fsdp2")
    shutil.rmtree(folder / "runs/a/step-00000004")
    assert run(shlex.split(command_of("fsdp2")), folder) == printed[2:4]


# --- The page


def test_the_page_shows_each_recipe_as_it_is():
    shown = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert sorted(shown) == sorted((FOLDER / f"{name}.py").read_text() for name in NAMES)


def test_the_page_shows_the_configuration_file_as_it_is():
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    (name,) = re.findall(r"--config_file (\S+)", command_of("with_accelerate"))
    assert shown == (ROOT / name).read_text()


def test_the_table_of_the_page_leads_to_each_recipe():
    rows = re.findall(r"^\| .* \| \[(\w+)\.py\]\(#([\w-]+)\) \|", PAGE, re.M)
    assert sorted(name for name, _ in rows) == NAMES
    titles = [title.lower() for title in re.findall(r"^## (.*)$", PAGE, re.M)]
    assert [re.sub(r"[^\w ]", "", title).replace(" ", "-") for title in titles] == [
        anchor for _, anchor in rows
    ]
