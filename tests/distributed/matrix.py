"""Which way to save activation memory works under which parallelism: one table, cell by cell.

A row is a parallelism with its settings, a column a technique, and each cell stands for two faces:
the module wrapped, and its forward replaced in place. A row says what each of its cells must do:

* *works*: gradients and loss are the single process's, collectives a layer are counted, memory is
  released, names are the plain model's;
* *reruns*: the same, but REPLAY falls back to NO_REENTRANT there and says why;
* *raises*: wrapping, or the first step where wrapping cannot know, raises with the reason and the
  way out.

Tests take their parameters from here (:func:`cells`), and report each cell that they have run with
the fixture ``matrix_cell``; the matrix of what was found is printed after the tests. The same
table, as it must be, stands in ``docs/composition.md``: ``python -m tests.distributed.matrix``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from torch import nn

from wrappers import (
    ApplyReport,
    CheckpointImpl,
    apply_activation_checkpointing,
    offload_wrapper,
)
from wrappers.policies import save_matmuls

#: What each technique passes to ``apply_activation_checkpointing``.
TECHNIQUES: dict[str, Callable[[], dict[str, Any]]] = {
    "REENTRANT": lambda: {"impl": CheckpointImpl.REENTRANT},
    "NO_REENTRANT": lambda: {"impl": CheckpointImpl.NO_REENTRANT},
    "REPLAY": lambda: {"impl": CheckpointImpl.REPLAY},
    "REPLAY, policy": lambda: {"policy": save_matmuls()},
    "offload, disk": lambda: {
        "checkpoint_wrapper_fn": partial(
            offload_wrapper,
            tier="disk",
            directory=tempfile.gettempdir(),
            min_bytes=1,
            keep_last=0,
        )
    },
}

FACES = ("wrapper", "in place")

WORKS, RERUNS, RAISES = "works", "reruns", "raises"


@dataclass(frozen=True)
class Row:
    """One parallelism.

    Attributes:
        name: As it stands in the table.
        group: The part of the table.
        world_size: Number of processes of its tests.
        exceptions: Techniques, or (technique, face), whose cells do not simply work: what they do
            instead, and why.
    """

    name: str
    group: str
    world_size: int = 2
    exceptions: Mapping[Any, tuple[str, str]] = field(default_factory=dict)

    def expected(self, technique: str, face: str) -> tuple[str, str]:
        """What a cell must do, and why where it is not simply to work."""
        simple = self.exceptions.get(technique, (WORKS, ""))
        return self.exceptions.get((technique, face), simple)


_FSDP_INSIDE = (
    "An FSDP module inside the region frees its parameters after forward. Wrap before sharding, or "
    "in place, to replay."
)
_RERUN = (RERUNS, _FSDP_INSIDE)
_MORE_GATHERS = (
    WORKS,
    "One more all-gather for each unit and step, as FSDP1 frees the parameters after the rerun's "
    "forward too. NO_REENTRANT, and wrapping inside the units, gather as often as the plain model.",
)
_HIDDEN = (
    RAISES,
    "DDP looks in the graph for the parameters that a forward has used, and a REENTRANT region "
    "shows it none. Use NO_REENTRANT, or DDP(static_graph=True). Raised when wrapping, or by the "
    "first forward where DDP comes after wrapping.",
)

_FSDP2_ROWS = (
    "FSDP2",
    "FSDP2, reshard_after_forward=False",
    "FSDP2, bf16 parameters",
    "FSDP2, frozen parameters",
    "FSDP2, accumulation without sync",
    "FSDP2, explicit prefetch",
)

DATA_PARALLEL: list[Row] = [
    Row("DDP", "Data parallel"),
    Row("DDP, static graph", "Data parallel"),
    Row("DDP, unused parameters", "Data parallel", exceptions={"REENTRANT": _HIDDEN}),
    Row("DDP, accumulation in no_sync", "Data parallel"),
    *(Row(name, "Data parallel") for name in _FSDP2_ROWS),
    *(
        Row(
            f"{name}, sharded first",
            "Data parallel",
            exceptions={("REPLAY", "wrapper"): _RERUN, ("REPLAY, policy", "wrapper"): _RERUN},
        )
        for name in _FSDP2_ROWS
    ),
    Row("FSDP1", "Data parallel"),
    Row("FSDP1, sharded first", "Data parallel"),
    Row(
        "FSDP1, around its units",
        "Data parallel",
        exceptions={"REENTRANT": _MORE_GATHERS, "REPLAY": _RERUN, "REPLAY, policy": _RERUN},
    ),
]

_NO_SPLIT_BACKWARD = (
    RAISES,
    "Zero-bubble schedules take gradients by autograd.grad, which cannot go through a REENTRANT "
    "region. Use NO_REENTRANT or REPLAY. Raised by the first backward.",
)
_SPLIT_BACKWARD = (
    WORKS,
    "Zero-bubble schedules run backward in two parts, and each recomputes what it reads.",
)

MODEL_PARALLEL: list[Row] = [
    Row("tensor parallel", "Model parallel"),
    Row("sequence parallel", "Model parallel"),
    Row("FSDP2 x tensor parallel", "Model parallel", 4),
    Row(
        "FSDP2 x tensor parallel, sharded first",
        "Model parallel",
        4,
        {("REPLAY", "wrapper"): _RERUN, ("REPLAY, policy", "wrapper"): _RERUN},
    ),
    Row("functional collectives", "Model parallel"),
    Row("collectives of torch.distributed.nn", "Model parallel"),
    Row("mixture of experts, all-to-all", "Model parallel"),
    Row("pipeline, GPipe", "Model parallel"),
    Row("pipeline, 1F1B", "Model parallel"),
    Row("pipeline, interleaved 1F1B", "Model parallel"),
    Row(
        "pipeline, interleaved zero bubble",
        "Model parallel",
        exceptions={
            "REENTRANT": _NO_SPLIT_BACKWARD,
            "NO_REENTRANT": _SPLIT_BACKWARD,
            "REPLAY": _SPLIT_BACKWARD,
            "REPLAY, policy": _SPLIT_BACKWARD,
        },
    ),
]

#: The rows in the order of the table.
ROWS = [*DATA_PARALLEL, *MODEL_PARALLEL]


def row(name: str) -> Row:
    """The row of a name."""
    (found,) = [row for row in ROWS if row.name == name]
    return found


def cells(names: Iterable[str], outcome: Iterable[str] = (WORKS, RERUNS)) -> list[Any]:
    """Parameters ``(row name, technique, face)`` of all cells of rows that must end so."""
    found = [
        (name, technique, face)
        for name in names
        for technique in TECHNIQUES
        for face in FACES
        if row(name).expected(technique, face)[0] in tuple(outcome)
    ]
    return [pytest.param(*cell, id="-".join(cell).replace(" ", "_")) for cell in found]


def apply_technique(
    model: nn.Module, check_fn: Any, technique: str, face: str, **more: Any
) -> ApplyReport:
    """Wrap the chosen modules of a model by a technique; options may be overridden."""
    options = {**TECHNIQUES[technique](), **more}
    return apply_activation_checkpointing(
        model, check_fn=check_fn, inplace=face == "in place", **options
    )


# --- The table as text --------------------------------------------------------------------------


def render(found: Mapping[tuple[str, str, str], str] | None = None) -> str:
    """The table as Markdown: as it must be, or as ``found`` by tests (row, technique, face)."""
    lines = []
    notes: list[str] = []
    for group in dict.fromkeys(row.group for row in ROWS):
        lines += [f"| {group} | " + " | ".join(TECHNIQUES) + " |"]
        lines += ["|---" * (1 + len(TECHNIQUES)) + "|"]
        for each in (row for row in ROWS if row.group == group):
            texts = [_text(each, technique, notes, found) for technique in TECHNIQUES]
            lines.append(f"| {each.name} | " + " | ".join(texts) + " |")
        lines.append("")
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines).strip() + "\n"


def _text(
    each: Row, technique: str, notes: list[str], found: Mapping[tuple[str, str, str], str] | None
) -> str:
    texts = []
    for face in FACES:
        outcome, why = each.expected(technique, face)
        if found is not None:
            outcome = found.get((each.name, technique, face), "-")
        if why and why not in notes:
            notes.append(why)
        texts.append(f"{outcome} ({notes.index(why) + 1})" if why else outcome)
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"{face}: {text}" for face, text in zip(FACES, texts, strict=True))


if __name__ == "__main__":
    print(render(), end="")
