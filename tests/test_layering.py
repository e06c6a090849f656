"""The direction of imports, and the two files that alone may know certain things.

Read from the source with ``ast``: imports go to a lower level or to an earlier file of the same
room; private torch APIs stand in ``_torch.py`` alone; only ``_device.py`` asks for a device's
type; the core needs torch and nothing else.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wrappers

ROOT = Path(wrappers.__file__).parent

#: Level of each room or file of the package, lower ones first; imports go up in this list.
LEVELS = {
    "errors": 0,
    "policy": 0,
    "_knobs": 0,
    "_torch": 0,
    "_tree": 1,
    "_device": 1,
    "policies": 1,
    "_random": 1,
    "engine": 2,
    "offload": 2,
    "modules": 3,
    "select": 3,
    "apply": 4,
    "report": 4,
    "state": 4,
    "plan": 5,
    "integrations": 5,
    "diagnosis": 5,
    "cli": 6,
    "__main__": 6,
}

#: Files of a room, each importing only from those before it.
ORDER = {
    "engine": [
        "ambient",
        "module_state",
        "verify",
        "holders",
        "selective",
        "region",
        "frame",
        "rerun",
        "reentrant",
        "witness",
        "operators",
        "record",
        "replay",
        "api",
    ],
    "offload": ["pool", "scheduler", "stats", "transfer", "simulated", "disk", "store", "hooks"],
    "modules": ["base", "checkpoint", "offload"],
    "state": [
        "faults",
        "files",
        "plain",
        "pickles",
        "contents",
        "safetensors_layout",
        "storage",
        "api",
    ],
    "integrations": ["_blocks", "accelerate", "lightning", "transformers"],
    "cli": ["failure", "output", "models", "targets", "commands", "entry"],
    "plan": [
        "records",
        "chain",
        "names",
        "progress",
        "budget",
        "hardware",
        "costs",
        "calibration",
        "workspaces",
        "memory",
        "fakes",
        "elsewhere",
        "sharding",
        "calls",
        "harness",
        "step",
        "cuts",
        "menu",
        "structures",
        "optimizers",
        "timing",
        "profile",
        "milp",
        "solve",
        "parts",
        "schema",
        "spans",
        "show",
        "plot",
        "plan",
        "build",
        "ranks",
        "api",
    ],
}

FILES = sorted(p for p in ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """``engine.frame`` for wrappers/engine/frame.py, ``engine`` for its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


NAMES = {path: name_of(path) for path in FILES}
MODULES = set(NAMES.values())


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports_of(tree: ast.AST) -> list[str]:
    """Dotted names of what a file imports, ``wrappers.`` cut off for our own."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own_imports_of(tree: ast.AST) -> list[str]:
    """Which of our modules a file imports, as in :func:`name_of`."""
    found = []
    for name in imports_of(tree):
        if name.split(".")[0] != "wrappers":
            continue
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        found.append(".".join(parts))
    return found


def order_error(importer: str, imported: str) -> str | None:
    """Why an import goes the wrong way; None if it does not."""
    if not imported:
        return "imports the package's __init__"
    here, there = importer.split("."), imported.split(".")
    if {here[0], there[0]} == {"engine", "offload"}:
        return "engine and offload never import each other"
    if here[0] == there[0] and len(here) > 1:
        if len(there) == 1:
            return "imports its own room's __init__"
        order = ORDER[here[0]]
        ok = order.index(there[1]) < order.index(here[1])
        return None if ok else f"{there[1]} does not come before {here[1]}"
    rooms = list(LEVELS)
    if rooms.index(there[0]) < rooms.index(here[0]):
        return None
    return f"level {LEVELS[here[0]]} imports level {LEVELS[there[0]]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: NAMES[p] or "wrappers")
def test_imports_go_down(path):
    importer = NAMES[path]
    if not importer:
        return  # The package's __init__ re-exports everything.
    if path.name == "__init__.py":
        room = {i.split(".")[0] for i in own_imports_of(tree_of(path))}
        assert room <= {importer}, "a room's __init__ re-exports its own files"
        return
    for imported in own_imports_of(tree_of(path)):
        assert order_error(importer, imported) is None, f"{importer} imports {imported}"


def test_every_file_has_a_place_in_the_order():
    for name in MODULES - {""}:
        room, *rest = name.split(".")
        assert room in LEVELS
        if len(rest) == 1 and room in ORDER:
            assert rest[0] in ORDER[room], name


def test_levels_rise():
    assert list(LEVELS.values()) == sorted(LEVELS.values())


def test_the_packages_init_only_re_exports():
    for node in tree_of(ROOT / "__init__.py").body:
        assert isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign)), ast.dump(node)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("errors", "_torch"),
        ("_tree", "engine.frame"),
        ("engine.frame", "offload.hooks"),
        ("offload.hooks", "engine.verify"),
        ("engine.ambient", "engine.frame"),
        ("engine.frame", "engine"),
        ("engine.frame", "modules.base"),
        ("modules.base", "modules.checkpoint"),
        ("select", "apply"),
        ("modules.base", "select"),
        ("_tree", "_device"),
        ("apply", ""),
    ],
)
def test_a_wrong_import_would_be_found(importer, imported):
    assert order_error(importer, imported) is not None


# --- Private torch APIs


def dotted(node: ast.AST) -> list[str]:
    """``["torch", "_C", "x"]`` for ``torch._C.x``; empty for anything but such a chain."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def torch_names(tree: ast.AST) -> set[str]:
    """Names that stand for torch modules in a file: ``torch``, ``nn``, ``F``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    found.add(alias.asname or "torch")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            # Lower case names are modules; Tensor's own _version is public knowledge.
            found |= {a.asname or a.name for a in node.names if a.name.islower()}
    return found


def private_uses(tree: ast.AST) -> list[str]:
    """Private torch modules and attributes that a file names."""
    found = []
    for name in imports_of(tree):
        parts = name.split(".")
        if parts[0] == "torch" and any(map(is_private, parts)):
            found.append(name)
    modules = torch_names(tree)
    for node in ast.walk(tree):
        parts = dotted(node)
        if parts and parts[0] in modules and any(map(is_private, parts[1:])):
            found.append(".".join(parts))
        if isinstance(node, ast.Call) and dotted(node.func) in (["getattr"], ["hasattr"]):
            target, name = node.args[:2]
            text = name.value if isinstance(name, ast.Constant) else ""
            root = dotted(target)
            if root and root[0] in modules and isinstance(text, str) and is_private(text):
                found.append(f"{'.'.join(root)}.{text}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: NAMES[p] or "wrappers")
def test_private_torch_apis_stand_in_one_file(path):
    if NAMES[path] != "_torch":
        assert private_uses(tree_of(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch._C._foo()",
        "from torch.utils._pytree import tree_map",
        "from torch._ops import OpOverload",
        "import torch.utils._device",
        "from torch.utils import _device",
        "from torch.distributed.algorithms._checkpoint import checkpoint_wrapper",
        "import torch; torch.autograd._is_checkpoint_valid()",
        "from torch import nn; nn.Module._apply; nn._x",
        "import torch; getattr(torch, '_C')",
        "import torch as t; t._C",
    ],
)
def test_a_private_use_would_be_found(line):
    assert private_uses(ast.parse(line)) != []


def test_the_one_file_does_use_them():
    assert len(private_uses(tree_of(ROOT / "_torch.py"))) > 10


# --- Device types

KINDS = {"cpu", "cuda", "xpu", "mps", "meta", "hpu", "mtia", "xla", "privateuseone", "npu"}


def device_branches(tree: ast.AST) -> list[str]:
    """Places that ask for the type of a device."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in (
            "is_cuda",
            "is_cpu",
            "is_mps",
            "is_xpu",
        ):
            found.append(node.attr)
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            for child in ast.walk(node):
                if isinstance(child, ast.Constant) and child.value in KINDS:
                    found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and dotted(node)[:2] in (
            ["torch", "cuda"],
            ["torch", "xpu"],
            ["torch", "mps"],
        ):
            found.append(".".join(dotted(node)))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: NAMES[p] or "wrappers")
def test_only_one_file_branches_on_device_types(path):
    if NAMES[path] != "_device":
        assert device_branches(tree_of(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "x.device.type == 'cuda'",
        "x.device.type in ('cpu', 'meta')",
        "kind != 'cpu'",
        "x.is_cuda",
        "x.is_cpu",
        "torch.cuda.current_stream()",
    ],
)
def test_a_device_branch_would_be_found(line):
    assert device_branches(ast.parse(line)) != []


def test_the_one_file_does_branch():
    assert device_branches(tree_of(ROOT / "_device.py")) != []


# --- What is imported

CORE = (
    "errors",
    "policy",
    "_knobs",
    "_torch",
    "_device",
    "_random",
    "_tree",
    "engine",
    "offload",
    "modules",
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: NAMES[p] or "wrappers")
def test_the_core_imports_torch_and_the_standard_library(path):
    if NAMES[path].split(".")[0] not in (*CORE, "", "select", "apply"):
        return
    roots = {name.split(".")[0] for name in imports_of(tree_of(path))}
    assert roots <= {"torch", "wrappers", *sys.stdlib_module_names}


def test_importing_the_package_loads_nothing_that_torch_does_not():
    code = """
import sys
import torch, torch.utils.checkpoint, torch.utils._pytree
import torch.distributed.algorithms._checkpoint.checkpoint_wrapper
before = set(sys.modules)
import wrappers
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"wrappers", "torch"} - set(sys.stdlib_module_names)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout == "[]\n", result.stderr


def test_importing_the_package_does_not_load_the_compiler_or_fsdp():
    code = """
import sys
import wrappers
print(sorted(set(sys.modules) & {"torch._inductor", "torch.distributed.fsdp", "scipy", "rich"}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout == "[]\n", result.stderr
