"""The three commands: each takes parsed arguments, shows its result and returns an exit code.

The planner is imported when a command runs, so that ``--help`` and errors of usage need torch alone
and come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wrappers import _torch
from wrappers.cli.failure import Exit, Failure, is_ours, place_of, text_of
from wrappers.cli.output import Output, progress
from wrappers.cli.targets import (
    Model,
    blocks_named,
    check_blocks,
    load_function,
    load_model,
    optimizer_named,
)
from wrappers.errors import InfeasibleBudgetError, WrapperError
from wrappers.select import ModuleTest

if TYPE_CHECKING:
    from wrappers.plan.records import Hardware, Profile

__all__ = ["doctor", "plan", "profile"]

_RUN_IT = "Run `model(sample)` and its backward in Python; --debug shows the whole error."

#: Budgets of the curve that a picture shows.
_FRONTIER_POINTS = 16

# --- doctor ---------------------------------------------------------------------------------


def doctor(arguments: argparse.Namespace, output: Output) -> Exit:
    """``wrappers doctor``: look over the installation, and a model if one is named."""
    from wrappers import diagnosis

    model = None
    if arguments.model is not None:
        named = load_model(arguments.model, None, needs_sample=False)
        with torch.device("meta") if named.is_builtin else contextlib.nullcontext():
            model = named.build()
    with progress("looking", is_shown=not output.is_json):
        found = diagnosis.doctor(model)
    rows = [dataclasses.asdict(row) for row in found.rows]
    output.show(found, {"num_problems": len(found.problems), "rows": rows})
    return Exit.PROBLEM if found.problems else Exit.DONE


# --- profile and plan -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the planner is asked about.

    Attributes:
        model: Model and sample, not built yet.
        blocks: Which modules are regions.
        blocks_argument: How the user has said so.
        settings: Keyword arguments of the planner's functions.
        num_ranks: Over how many ranks FSDP2 shards each region; 1 where it does not.
        hardware: What times are for.
        is_measured: Whether they are measured here, and not derived from a description.
    """

    model: Model
    blocks: ModuleTest
    blocks_argument: str
    settings: dict[str, Any]
    num_ranks: int
    hardware: Hardware
    is_measured: bool

    def build(self) -> nn.Module:
        """The model, in which there is something to plan."""
        model = self.model.build()
        check_blocks(model, self.blocks, self.blocks_argument)
        return model


def _request(arguments: argparse.Namespace, hardware: Hardware) -> _Request:
    blocks = blocks_named(arguments.blocks, arguments.check_fn)
    named = [
        f"{option} {value}"
        for option, value in (("--blocks", arguments.blocks), ("--check-fn", arguments.check_fn))
        if value is not None
    ]
    settings = {
        "check_fn": blocks,
        "loss_fn": load_function(arguments.loss, "--loss") if arguments.loss is not None else None,
        "optimizer": optimizer_named(arguments.optimizer),
    }
    num_ranks = arguments.world_size if arguments.fsdp else 1
    model = load_model(arguments.model, arguments.sample)
    # A built-in model comes without weights: there is nothing to allocate, and nothing to run.
    is_measured = arguments.device.lower() == "this" and not model.is_builtin and num_ranks == 1
    return _Request(
        model,
        blocks,
        (named or ["what repeats"])[0],
        settings,
        num_ranks,
        hardware,
        is_measured,
    )


def profile(arguments: argparse.Namespace, output: Output) -> Exit:
    """``wrappers profile``: look at one step of a model."""
    _check_file(arguments.output, "-o")
    request = _request(arguments, _hardware(arguments.device))
    found = _profiled(request, output)

    from wrappers.plan import schema, show

    if arguments.output is not None:
        text = schema.dump(found, indent=1)
        _write(functools.partial(schema.replace_file, data=text.encode()), arguments.output, "-o")
    data = {"model": request.model.name, "profile": schema.write(found)}
    output.show(show.report(found), {**data, **_files(arguments)})
    return Exit.DONE


def plan(arguments: argparse.Namespace, output: Output) -> Exit:
    """``wrappers plan``: make a plan within a budget, save it and draw it."""
    _check_file(arguments.output, "-o")
    _check_picture(arguments.plot)
    hardware = _hardware(arguments.device)
    budget = _budget(arguments.budget, hardware)
    request = _request(arguments, hardware)
    found = _profiled(request, output)

    from wrappers.plan import api

    settings: dict[str, Any] = {"progress": _silent} if output.is_json else {}
    if arguments.plot is not None:
        settings["frontier_points"] = _FRONTIER_POINTS
    with _translated(request):
        made = api.make_plan(found, budget, count=arguments.count, **settings)
    if arguments.output is not None:
        _write(made.save, arguments.output, "-o")
    if arguments.plot is not None:
        with _translated(request):
            _write(made.plot, arguments.plot, "--plot")
    data = {"model": request.model.name, "hash": made.hash, "plan": json.loads(made.to_json())}
    output.show(made.report(), {**data, **_files(arguments)})
    return Exit.DONE


def _silent(fraction: float) -> None:
    """In the place of a bar."""


def _profiled(request: _Request, output: Output) -> Profile:
    from wrappers.apply import find_regions
    from wrappers.plan import api
    from wrappers.plan.sharding import sharding_for

    device = contextlib.nullcontext() if request.is_measured else torch.device("meta")
    text = f"profiling {request.model.name}"
    with progress(text, is_shown=not output.is_json), _translated(request):
        with device, _noted_if(not request.is_measured):
            model, sample = request.build(), request.model.sample()
        settings = dict(request.settings)
        if request.num_ranks > 1:
            regions = list(find_regions(model, request.blocks))
            settings["sharding"] = sharding_for(regions, request.num_ranks)
        return api.profile(
            model,
            sample,
            hardware=None if request.is_measured else request.hardware,
            **settings,
        )


@contextlib.contextmanager
def _noted_if(is_meta: bool) -> Iterator[None]:
    """Say of code that fails on the meta device that it was run there."""
    try:
        yield
    except Failure as failure:
        if is_meta and failure.kind in ("model_build", "sample_build"):
            failure.remedy += (
                " For --device it runs under torch.device('meta'), where tensors have no values "
                "and nothing can be moved to another device."
            )
        raise


def _hardware(name: str) -> Hardware:
    from wrappers.plan.hardware import find_hardware

    try:
        return find_hardware(name)
    except ValueError as error:
        raise Failure(Exit.USAGE, "device", f"--device: {error}", device=name) from None


def _budget(text: str, hardware: Hardware) -> int:
    from wrappers.plan.budget import budget_bytes

    try:
        return budget_bytes(text, capacity_bytes=hardware.memory_bytes or None)
    except ValueError as error:
        raise Failure(Exit.USAGE, "budget", f"--budget: {error}", budget=text) from None


# --- Files ----------------------------------------------------------------------------------


def _check_file(path: str | None, option: str) -> None:
    """See that a file can be written, before minutes are spent on what goes into it."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise Failure(
            Exit.MISSING,
            "file",
            f"{option} {path} cannot be written",
            f"Give a file in a directory that exists and is yours, which {folder} must be.",
            path=path,
        )


def _check_picture(path: str | None) -> None:
    if path is None:
        return
    from wrappers.plan.plot import SUFFIXES

    if Path(path).suffix.lower() not in SUFFIXES:
        text = f"--plot {path} must end in one of {', '.join(SUFFIXES)}"
        raise Failure(Exit.USAGE, "file", text, path=path)
    _check_file(path, "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "pip install 'activation-wrappers[plot]', or leave --plot out."
        raise Failure(Exit.MISSING, "extra", "--plot needs matplotlib", remedy)


def _write(write: Callable[[str], Any], path: str, option: str) -> None:
    try:
        write(path)
    except OSError as error:
        raise Failure(
            Exit.MISSING, "file", f"{option} {path} cannot be written: {text_of(error)}", path=path
        ) from error


def _files(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {"output": arguments.output, "plot": getattr(arguments, "plot", None)}
    return {"files": {name: path for name, path in names.items() if path is not None}}


# --- Errors of the planner ------------------------------------------------------------------


@contextlib.contextmanager
def _translated(request: _Request) -> Iterator[None]:
    """Make Failures of what the planner raises, and of what the model raises in it."""
    try:
        with _unlogged():
            yield
    except Failure:
        raise
    except WrapperError as error:
        raise _planner_failure(error) from error
    except ImportError as error:
        if "activation-wrappers[" not in str(error):
            raise _model_failure(request, error) from error
        raise Failure(Exit.MISSING, "extra", str(error)) from error
    except Exception as error:
        if is_ours(error):
            if isinstance(error, ValueError) and not place_of(error):
                raise Failure(Exit.USAGE, "planner", str(error)) from error
            raise
        raise _model_failure(request, error) from error


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging a traceback for what a Failure says in a line."""
    log = _torch.fake_tensor_log()
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _planner_failure(error: WrapperError) -> Failure:
    fields = {key: value for key, value in vars(error).items() if _is_plain(value)}
    if isinstance(error, InfeasibleBudgetError):
        return Failure(Exit.INFEASIBLE, "infeasible_budget", str(error), **fields)
    cause = error.__cause__
    if cause is None or is_ours(cause):
        return Failure(Exit.PROBLEM, "planner", str(error), **fields)
    place = place_of(cause)
    message = f"{str(error).rstrip('.')} ({place})" if place else str(error)
    return Failure(Exit.PROBLEM, "model_run", message, _RUN_IT, where=place, **fields)


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (str, int, float))


def _model_failure(request: _Request, error: BaseException) -> Failure:
    place = place_of(error)
    where = f" ({place})" if place else ""
    return Failure(
        Exit.PROBLEM,
        "model_run",
        f"MODEL `{request.model.name}` failed when it was run on its sample: "
        f"{text_of(error)}{where}",
        _RUN_IT,
        where=place,
    )
