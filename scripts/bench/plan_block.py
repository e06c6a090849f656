"""The worked block of docs/plan.md: its operators, its menu, and a plan for eight such blocks.

    python -m scripts.bench.plan_block

Everything is derived: the model is on the meta device, times are from the data sheet of an H100.
Bytes are given in ``d``, the memory of one (batch, sequence, width) tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

import wrappers
from scripts.model import GPT, GPTConfig
from wrappers.plan.chain import Chain, chain_of, plain_choice
from wrappers.plan.records import Action, Option, Profile, Structure
from wrappers.plan.solve import solve

CONFIG = GPTConfig(num_layers=8, d_model=4096, num_heads=32, seq_len=4096, dropout=0)
BATCH = 4

#: Bytes of one (batch, sequence, width) tensor in bfloat16.
D = BATCH * CONFIG.seq_len * CONFIG.d_model * 2

#: For the activations of eight blocks.
BUDGET_BYTES = 10 * 2**30

#: What the page calls the operators that make memory, in order.
NAMES = ("norm 1", "qkv", "attention", "out", "sum 1", "norm 2", "up", "gelu", "down", "sum 2")

#: The rows of the menu that the page shows: outputs that stay, outputs that go to the host.
SHOWN = (
    (("norm 1", "qkv", "attention", "sum 1", "norm 2", "up", "gelu"), ()),
    (("qkv", "attention", "sum 1", "up"), ()),
    (("attention", "sum 1", "up"), ()),
    (("attention", "sum 1"), ()),
    (("sum 1",), ()),
    ((), ()),
    (("attention", "sum 1"), ("qkv", "up")),
    ((), ("norm 1", "qkv", "attention", "sum 1", "norm 2", "up", "gelu")),
)


@functools.cache
def make_profile() -> Profile:
    """The step of the model, without its device."""
    with torch.device("meta"):
        model = GPT(CONFIG).to(torch.bfloat16)
        tokens = torch.empty(BATCH, CONFIG.seq_len, dtype=torch.long)
    return wrappers.profile(model, tokens, hardware="H100")


def block_of(profile: Profile) -> Structure:
    """The one structure that all blocks have."""
    (structure,) = profile.structures.values()
    return structure


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(titles), "|".join("---" for _ in titles), *map(" | ".join, rows)]
    return "".join(f"|{line}|\n" if line.startswith("---") else f"| {line} |\n" for line in lines)


def in_d(num_bytes: float) -> str:
    """Bytes as a multiple of d."""
    return f"{num_bytes / D:.1f} d"


# --- The block


def operators_table() -> str:
    """What makes memory in the block."""
    structure = block_of(make_profile())
    titles = ("", "operator", "reads", "memory", "saved by autograd", "time")
    rows = [
        (
            name,
            f"`{row.operator.removeprefix('aten.').removesuffix('.default')}`",
            ", ".join(NAMES[i] for i in row.reads) or "x",
            in_d(row.output_bytes),
            "yes" if row.saved_bytes else "no",
            f"{row.time_us:.0f} us",
        )
        for name, row in zip(NAMES, structure.operators, strict=True)
    ]
    return _table(titles, rows)


def _names(option: Option, action: Action) -> tuple[str, ...]:
    """The operators that an option keeps or moves, in order."""
    operators = block_of(make_profile()).operators
    names = {(row.operator, row.ordinal): name for name, row in zip(NAMES, operators, strict=True)}
    chosen = {names[d.operator, d.ordinal] for d in option.decisions or () if d.action is action}
    return tuple(name for name in NAMES if name in chosen)


def what(option: Option) -> tuple[str, str]:
    """What an option keeps and what it moves, in words."""
    if option.decisions is None:
        return "everything (left alone)", ""
    return ", ".join(_names(option, Action.SAVE)) or "nothing", ", ".join(
        _names(option, Action.OFFLOAD)
    )


def menu_table() -> str:
    """Some of the ways to treat the block, the plain one first."""
    options = block_of(make_profile()).options
    found = {(_names(o, Action.SAVE), _names(o, Action.OFFLOAD)): o for o in options[1:]}
    titles = ("keeps", "on the host", "kept", "forward", "backward", "extra time")
    rows = [
        (
            *what(option),
            in_d(option.kept_bytes),
            in_d(option.forward_bytes),
            in_d(option.backward_bytes),
            f"{option.extra_us:.0f} us",
        )
        for option in (options[0], *(found[names] for names in SHOWN))
    ]
    return _table(titles, rows)


# --- Eight blocks


def without_offload(profile: Profile) -> Profile:
    """The profile without the options that move anything to the host."""
    structures = {
        key: replace(s, options=tuple(o for o in s.options if not o.offload_bytes))
        for key, s in profile.structures.items()
    }
    return replace(profile, structures=structures)


def started_with_bytes(profile: Profile) -> int:
    """What is on the device when the step begins, which the budget of activations leaves out."""
    return profile.persistent.parameter_bytes + profile.persistent.sample_bytes


def chain() -> Chain:
    """The choice over the blocks."""
    return chain_of(without_offload(make_profile()))


@functools.cache
def chosen() -> tuple[int, ...]:
    """The option of each block within the budget."""
    profile = make_profile()
    return solve(chain(), BUDGET_BYTES + started_with_bytes(profile)).choice


def plan_table() -> str:
    """What each block keeps, and the most memory while it runs."""
    profile = without_offload(make_profile())
    start_bytes = started_with_bytes(profile)
    titles = ("block", "keeps", "kept", "kept before it", "need", "together", "extra time")
    rows = []
    kept = 0
    for number, (region, index) in enumerate(zip(profile.regions, chosen(), strict=True)):
        option = profile.options(region)[index]
        need = chain().items[number][index].need_bytes - start_bytes
        sizes = (option.kept_bytes, kept, need, kept + need)
        extra = f"{option.extra_us:.0f} us"
        rows.append((str(number), what(option)[0], *map(in_d, sizes), extra))
        kept += option.kept_bytes
    return _table(titles, rows)


def plan_facts() -> str:
    """The plan in one sentence."""
    profile, items = make_profile(), chain()
    start_bytes = started_with_bytes(profile)
    plain, found = (items.peak_bytes(c) for c in (plain_choice(profile), chosen()))
    ratio = 1 + items.extra_us(chosen()) / profile.step_us
    smallest = items.smallest()[0]
    return (
        f"The plain step peaks at {in_d(plain - start_bytes)}, the planned one at "
        f"{in_d(found - start_bytes)} of the {in_d(BUDGET_BYTES)} in the budget, and takes "
        f"{ratio:.3f} of its time. The smallest budget that can be met is "
        f"{in_d(smallest - start_bytes)}."
    )


def main() -> None:
    """Print what the page shows."""
    for part in (operators_table, menu_table, plan_table, plan_facts):
        print(part())


if __name__ == "__main__":
    main()
