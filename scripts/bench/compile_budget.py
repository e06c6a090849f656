"""What do real peak and time come to under torch.compile's activation_memory_budget?

`torch._functorch.config.activation_memory_budget` is a fraction: 1 keeps what the compiler would
keep anyway, 0 keeps the inputs alone. What it bounds is what is kept from forward to backward, not
what backward holds while it recomputes. One row for each budget of the model of
`scripts.bench.handmade`, compiled as a whole and block by block:

    column       what
    scope        what is compiled: the model, or each of its blocks
    budget       the fraction
    peak_bytes   the most that a step holds beyond what was there before
    peak_ratio   the same / that of the model without the compiler
    time_ratio   time of a step / that of the model without the compiler
    compile_s    CPU seconds of the first step, without the compiler's caches, g++ included

    python -m scripts.bench.compile_budget [--json FILE] [--scopes model blocks]
        [--budgets 1 0.8 0.5 0.2 0] [--rounds 15]

A row is printed as soon as it is there: the whole model takes minutes a row. Needs a C++ compiler.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from scripts import measure
from scripts.bench import handmade, harness
from scripts.model import GPT

SCOPES = ("model", "blocks")


def compiler_of(budget: float) -> Callable[[nn.Module], nn.Module]:
    """torch.compile with a budget."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: Any, inputs: Any) -> Any:
        # Forward and backward are parted in here, so this is where the budget is read.
        with functorch_config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    def compile_it(module: nn.Module) -> nn.Module:
        compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
        return cast(nn.Module, compiled)

    return compile_it


def compiled_step(model: GPT, tokens: Tensor, scope: str, budget: float) -> measure.Step:
    """A step of the model as the compiler makes it in the first of them."""
    compiled = compiler_of(budget)
    if scope == "model":
        return partial(handmade.run_step, compiled(model), tokens)
    blocks = {f"blocks.{i}": compiled(block) for i, block in enumerate(model.blocks)}
    form = handmade.Replaced(model, blocks)
    return handmade.steps_of(model, tokens, {scope: form})[scope]


def measure_budget(
    model: GPT, tokens: Tensor, plain_peak: int, scope: str, budget: float, rounds: int
) -> dict[str, Any]:
    """A row."""
    from torch._inductor import config as inductor_config

    torch.compiler.reset()
    plain = partial(handmade.run_step, model, tokens)
    step = compiled_step(model, tokens, scope, budget)
    start_s = handmade.cpu_seconds()
    # Not in other processes, which would not be waited for, so that their time would not count.
    with inductor_config.patch(force_disable_caches=True, compile_threads=1):
        step()
    compile_s = handmade.cpu_seconds() - start_s
    peak = handmade.peak_bytes(step)
    times = handmade.time_in_turns({"plain": plain, "compiled": step}, rounds)
    time_ratio = handmade.ratio(times["compiled"], times["plain"])
    return {
        "benchmark": "compile_budget",
        "scope": scope,
        "budget": budget,
        "peak_bytes": peak,
        "peak_ratio": round(peak / plain_peak, 4),
        "time_ratio": round(time_ratio.value, 4),
        "time_ratio_error": round(time_ratio.error, 4),
        "compile_s": round(compile_s, 1),
        "rounds": rounds,
        **handmade.sizes(model, tokens),
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--scopes", nargs="*", choices=SCOPES, default=list(SCOPES))
    parser.add_argument("--budgets", type=float, nargs="*", default=[1, 0.8, 0.5, 0.2, 0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
        parser.error("torch.compile needs a C++ compiler here: install g++, or name one in CXX")
    handmade.keep_heap()
    torch.set_num_threads(1)
    model, tokens = handmade.build()
    plain_peak = handmade.peak_bytes(partial(handmade.run_step, model, tokens))
    for scope in options.scopes:
        for budget in options.budgets:
            row = measure_budget(model, tokens, plain_peak, scope, budget, options.rounds)
            harness.report([row], options.json)


if __name__ == "__main__":
    main()
