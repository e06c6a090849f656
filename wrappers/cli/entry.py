"""Arguments in, an exit code out.

The options of a command and their errors are argparse's; its way of ending the process is not:
:func:`main` always returns, so that it can be called from Python too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from wrappers.cli import commands, models
from wrappers.cli.failure import Exit, Failure, text_of
from wrappers.cli.output import Output

__all__ = ["main"]

EXIT_CODES = """exit codes:
  0  done
  1  doctor has found a problem, or the model failed when it was imported, built or run
  2  the command line cannot be understood: an option, an import path, a sample, a budget
  3  no plan fits into the budget; the error says which budget is the smallest
  4  something is missing: an extra, a package, a directory that can be written
  5  a defect of this package
With --json, standard output is one JSON object, for errors too: {"error": {"kind": ...}}.
"""

_MODEL = textwrap.fill(
    "MODEL is my.module:name, an nn.Module or a function without arguments that returns one; the "
    f"current directory is on the path. Or it is built in: {models.FORMS}.",
    width=80,
)


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise Failure(Exit.USAGE, "usage", message, f"`{self.prog} --help` shows what there is.")


def _parser() -> argparse.ArgumentParser:
    # No suggest_on_error and no colours, which newer versions of Python alone know.
    parser = _Parser(
        prog="wrappers",
        description="Plan the activation memory of a PyTorch model.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"{epilog}\n\n{EXIT_CODES}".lstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.add_argument("--debug", action="store_true", help="print tracebacks of errors")
        return sub

    _add_doctor_options(add("doctor", commands.doctor, "look for what keeps wrappers from working"))
    sub = add("profile", commands.profile, "show what one step of a model takes", _MODEL)
    _add_model_options(sub)
    sub.add_argument("-o", "--output", metavar="FILE", help="save the profile as JSON")
    sub = add("plan", commands.plan, "find the fastest step within a memory budget", _MODEL)
    _add_model_options(sub)
    _add_plan_options(sub)
    return parser


def _add_doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="look through a model, too")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="what to look at; see below")
    add(
        "--sample",
        metavar="my.module:name",
        help="input of one step: a tensor, a tuple of positional arguments, a dict of keyword "
        "arguments, a list of such samples, or a function without arguments that returns one; "
        "built-in models have one",
    )
    add(
        "--device",
        default="this",
        metavar="NAME",
        help="what times are for: A100, H100, H200, L4, RTX4090, CPU; nothing is allocated there. "
        "Default: this, the device at hand",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--blocks",
        metavar="CLASS",
        help="class of the modules that are regions; default: the blocks that repeat in lists",
    )
    which.add_argument(
        "--check-fn", metavar="my.module:name", help="function that says whether a module is one"
    )
    add(
        "--optimizer",
        default="adamw",
        metavar="NAME",
        help="adamw (the default), sgd, none, or my.module:name, a function of the parameters",
    )
    add(
        "--loss",
        metavar="my.module:name",
        help="function that makes a scalar of what the model returns; default: its `loss` where it "
        "has one, else the sum",
    )
    add(
        "--world-size",
        type=_positive,
        default=1,
        metavar="N",
        help="how many ranks there are; default: 1",
    )
    add(
        "--fsdp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the ranks shard the model, each region for itself, by fully_shard; default: "
        "they do",
    )


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--budget",
        required=True,
        metavar="SIZE",
        help='memory of a step: "12GiB", "800MiB", bytes, or a share of the device, "90%%"',
    )
    add(
        "--count",
        choices=("all", "activations"),
        default="all",
        help="what the budget counts: everything on the device (the default), or activations",
    )
    add("-o", "--output", metavar="FILE", help="save the plan as JSON, for Plan.load")
    add("--plot", metavar="FILE", help="draw the plan: FILE ends in .html, .png or .svg")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; the process's own by default.

    Returns:
        The exit code, see :class:`wrappers.cli.failure.Exit`; 130 after an interrupt.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # Where the arguments cannot be parsed, these two must be known all the same.
    names = [word for word in given if word in ("doctor", "profile", "plan")]
    output = Output(names[0] if names else "", is_json="--json" in given)
    try:
        with output.quiet():
            return int(_run(given, output))
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        output.say("interrupted")
        return 130
    except BrokenPipeError:
        # Whoever reads our output has had enough. Python would complain when it flushes at exit.
        with contextlib.suppress(OSError):  # It may be no file at all.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.DONE)
    except Exception as error:
        failure = error if isinstance(error, Failure) else _defect(error)
        output.fail(failure)
        if "--debug" in given:
            traceback.print_exception(error, file=sys.stderr)
        return int(failure.code)


def _run(given: list[str], output: Output) -> Exit:
    arguments = _parser().parse_args(given)
    code: Exit = arguments.run(arguments, output)
    return code


def _defect(error: Exception) -> Failure:
    return Failure(
        Exit.INTERNAL,
        "defect",
        f"this should not have happened: {text_of(error)}",
        "Run it again with --debug and report what it prints.",
    )
