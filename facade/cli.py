"""The command line: parse, call one function, print; errors in one line."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from ellq import __version__
from ellq.commands import (
    UsageError,
    compare_checkpoints,
    demo,
    figures_list,
    figures_make,
    follow_training,
    histogram_make,
    histogram_merge,
    measure_checkpoint,
    prune_checkpoint,
    theory_check,
    theory_list,
    theory_show,
    verify_id_on_nets,
)


def run(arguments: Sequence[str]) -> int:
    """Run a command and return the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    debug = "--debug" in arguments
    try:
        config = _parser().parse_args([a for a in arguments if a != "--debug"])
        function, values = _command(config)
        function(**values)
    except SystemExit as stop:  # --help and --version end the parsing
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of our output has gone, as with `ellq measure FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if _began_with_interrupt(error):
            return _interrupted()
        if debug:
            raise
        if isinstance(error, ArgumentError | UsageError):
            print(f"ellq: wrong usage: {_one_line(error)} See 'ellq --help'.", file=sys.stderr)
            return 2
        print(f"ellq: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _interrupted() -> int:
    print("ellq: interrupted; no file is half-written", file=sys.stderr)
    return 130


def _began_with_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error, as when it strikes while an extension module loads."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: Exception) -> str:
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    text = text or type(error).__name__
    return text if text.endswith((".", "?", ")")) else f"{text}."


# Named otherwise than the functions of ellq: the parser looks a name up there, which would load PyTorch for --help.
_COMMANDS: dict[str, Callable[..., None]] = {
    "measure": measure_checkpoint,
    "compare": compare_checkpoints,
    "trajectory": follow_training,
    "prune": prune_checkpoint,
    "demo": demo,
}
_GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "histogram": (
        "Measure a checkpoint of any size in one pass, or merge the parts of such a pass.",
        {"make": histogram_make, "merge": histogram_merge},
    ),
    "verify": ("Try theorems on nets, with inputs they have not seen.", {"id": verify_id_on_nets}),
    "figures": ("List the figures, or make one.", {"list": figures_list, "make": figures_make}),
    "theory": (
        "List the statements, show one, or attack them.",
        {"list": theory_list, "show": theory_show, "check": theory_check},
    ),
}
_POSITIONAL = (measure_checkpoint, compare_checkpoints, histogram_make, figures_make, theory_show, theory_check)
_MANY_FILES = (follow_training, histogram_merge)


def _parser() -> ArgumentParser:
    parser = _new_parser(
        "How compressible a trained network is, what is provably lost, and the smaller network itself."
        " With --debug, errors show their traceback.",
        prog="ellq",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command")
    for name, function in _COMMANDS.items():
        commands.add_subcommand(name, _command_parser(function), help=_first_line(function))
    for group, (summary, functions) in _GROUPS.items():
        inner = _new_parser(summary)
        commands.add_subcommand(group, inner, help=summary)
        kinds = inner.add_subcommands(dest="action")
        for name, function in functions.items():
            kinds.add_subcommand(name, _command_parser(function), help=_first_line(function))
    return parser


def _new_parser(description: str, **settings: Any) -> ArgumentParser:
    return ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False, **settings)


def _command_parser(function: Callable[..., None]) -> ArgumentParser:
    parser = _new_parser(_first_line(function))
    parser.add_argument("--config", action="config", help="read the arguments from a YAML file")
    if function in _MANY_FILES:
        parser.add_argument("files", nargs="+", type=str, help="the files, in order")
    skip: set[str | int] = {"files"} if function in _MANY_FILES else set()
    parser.add_function_arguments(function, as_positional=function in _POSITIONAL, skip=skip)
    return parser


def _command(config: Any) -> tuple[Callable[..., None], dict[str, Any]]:
    """Return the function to call and its arguments, after checking those that are fractions."""
    from ellq.theory import open_fraction, order_below_one

    values = config[config.command].as_dict()
    if config.command in _COMMANDS:
        function = _COMMANDS[config.command]
    else:
        action = values["action"]
        function, values = _GROUPS[config.command][1][action], values[action]
    values.pop("config", None)
    try:
        if values.get("q") is not None and values.get("rule") != "diao2023":  # whose q may be larger
            order_below_one(values["q"])
        for name in ("sparsity", "flops", "parameters", "memory", "latency", "confidence", "delta"):
            if values.get(name) is not None and not isinstance(values[name], dict):
                open_fraction(values[name], name)
        if values.get("orders") or values.get("tolerances"):
            from ellq.analysis import order_grid, tolerance_grid

            order_grid(values.get("orders") or ())
            tolerance_grid(values.get("tolerances") or ())
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return function, values


def _first_line(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]
