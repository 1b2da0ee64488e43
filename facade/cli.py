"""The command line: parse, call one function, print; errors in one line."""

from __future__ import annotations

import importlib
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ellq import __version__


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
        if isinstance(error, ArgumentError | _UsageError):
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


class _UsageError(Exception):
    """An argument that parses but is out of range."""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    text = text or type(error).__name__
    return text if text.endswith((".", "?", ")")) else f"{text}."


def measure_checkpoint(
    file: str,
    q: float = 0.5,
    csv: str | None = None,
    json: str | None = None,
    plot: str | None = None,
) -> None:
    """Measure how compressible the weights in a checkpoint are; no data, no class needed.

    Args:
        file: checkpoint: .safetensors, or .pt, .pth, .th, of which only tensors are read, never code.
        q: order of the quasi-norm, strictly between 0 and 1.
        csv: also write every unit, layer and the model as CSV to this file.
        json: also write the profile as JSON to this file.
        plot: also draw the profile to this file (.png, .svg or .pdf).
    """
    from pathlib import Path

    from ellq.analysis import measure, read_checkpoint, write_bytes
    from ellq.paper_figures import render

    suffix = Path(plot).suffix.lower().removeprefix(".") if plot else ""
    if plot and suffix not in ("png", "svg", "pdf"):
        raise _UsageError(f"plot={plot!r} has no known ending. Choose .png, .svg or .pdf.")
    profile = measure(read_checkpoint(file), q=q)
    if csv:
        profile.to_csv(csv)
    if json:
        profile.to_json(json)
    if plot:
        write_bytes(plot, render(profile.plot(), suffix))
    _print(profile)


def prune_checkpoint(
    weights: str,
    out: str,
    sparsity: float | None = None,
    tol: float | None = None,
    method: Literal["lq", "id"] = "lq",
    rule: Literal["ellq", "yang2022", "chee2021"] = "ellq",
    q: float = 0.5,
    model: str | None = None,
    data: str | None = None,
    samples: PositiveInt = 2000,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> None:
    """Prune a checkpoint and write model.safetensors and plan.json to a folder.

    Method lq needs the weights alone. Method id runs the model, so it needs --model and --data.

    Args:
        weights: checkpoint with the weights to prune.
        out: folder to write to.
        sparsity: fraction to remove, of weights (lq) or of each layer's hidden units (id).
        tol: instead of sparsity, the relative error allowed, per unit (lq) or in what reads the units (id).
        method: lq (weights set to zero, per unit) or id (hidden units removed, the next layer corrected).
        rule: ellq (ours), yang2022 (method lq) or chee2021 (method id).
        q: order of the quasi-norm, for rule yang2022.
        model: where the model comes from, as package.module:function; called without arguments.
        data: name of the data set whose train part is calibrated on, such as digits or mnist.
        samples: at most how many of its examples to use.
        mean: what to subtract from each channel of inputs in [0, 1].
        std: what to divide each channel by after that.
    """
    from ellq.analysis import datasets, read_checkpoint
    from ellq.pruning import apply, plan, save

    if (sparsity is None) == (tol is None):
        raise _UsageError("Give either --sparsity or --tol, not both and not neither.")
    if rule not in ("ellq", {"lq": "yang2022", "id": "chee2021"}[method]):
        raise _UsageError(f"rule={rule!r} is not a rule of method {method!r}.")
    if method == "id" and (model is None or data is None):
        raise _UsageError("Method id runs the model on data. Give --model package.module:function and --data NAME.")
    if model is not None and not model.partition(":")[2]:
        raise _UsageError(f"model={model!r} names no function. Write package.module:function.")
    state = read_checkpoint(weights)
    calibration = None
    source: Any = state
    if model is not None:
        source = _build(model)
        _fill(source, state, weights)
    if method == "id":
        assert data is not None  # checked above
        train = datasets.load(data, "train")
        calibration = train.select(range(min(samples, len(train)))).inputs(mean=mean, std=std)
    decided = plan(source, calibration, method=method, sparsity=sparsity, tol=tol, rule=rule, q=q)
    save(apply(source, decided), out, plan=decided)
    _print(decided)
    print(f"Written: {out}")


def demo(out: str = "ellq-demo", seed: NonNegativeInt = 0) -> None:
    """Train two small nets on bundled digits, measure, prune and bound them, and write a report.

    Args:
        out: folder to write to; replaced if it holds nothing but an earlier demo.
        seed: of training; the same seed gives the same numbers.
    """
    from rich.console import Console

    from ellq.demo import print_summary, run_demo

    summary = run_demo(out, seed=seed)
    print_summary(summary, out, Console(width=None if sys.stdout.isatty() else 120))


def figures_list() -> None:
    """List every figure that can be made."""
    from rich.table import Table

    from ellq.paper_figures import FIGURES

    table = Table("name", "shows")
    for figure in FIGURES.values():
        table.add_row(figure.name, figure.title)
    _print(table)


def figures_make(name: str, out: str = "figures", seed: NonNegativeInt = 0) -> None:
    """Compute a figure from its data and write the table (CSV) and the drawing (PNG, SVG).

    Args:
        name: the figure, from 'ellq figures list'.
        out: folder to write to.
        seed: of whatever is trained.
    """
    from ellq.paper_figures import figure_named, make

    try:
        figure_named(name)
    except ValueError as error:
        raise _UsageError(str(error)) from error
    for path in make(name, out, seed=seed):
        print(path)


def theory_list() -> None:
    """List every registered statement with its status and source."""
    from rich.table import Table

    from ellq.theory import registry

    table = Table("id", "says", "status", "source")
    for statement in registry().values():
        table.add_row(statement.id, statement.title, statement.status, statement.reference)
    _print(table)


def theory_show(id: str) -> None:
    """Show a statement: its formula as text and LaTeX, its assumptions, its status and source.

    Args:
        id: the statement, from 'ellq theory list'.
    """
    from sympy import pretty

    from ellq.theory import statement

    shown = statement(id)
    print(f"{shown.id}: {shown.title}\n")
    print(pretty(shown.formula(), use_unicode=True, num_columns=100), end="\n\n")
    print(f"LaTeX:   {shown.latex()}")
    print(f"assumes: {' '.join(assumption.sentence for assumption in shown.assumptions)}")
    print(f"status:  {shown.status}")
    print(f"source:  {shown.reference}")
    print("falsified by: a case that meets the assumptions and whose observed side exceeds the bound beyond rounding")


def theory_check(id: str, cases: PositiveInt = 10_000, seed: NonNegativeInt = 0, csv: str | None = None) -> None:
    """Attack a statement, or all of them, and say what was found; fails if one is broken.

    Args:
        id: the statement, from 'ellq theory list', or 'all'.
        cases: how many cases to evaluate for each statement.
        seed: of the draws.
        csv: also write the table to this file, again after every statement.
    """
    from rich.table import Table

    from ellq.analysis import track, write_text
    from ellq.theory import attack, registry, statement

    table = Table("statement", "cases", "violations", "least bound ÷ observed")
    lines = ["statement,seed,cases,violations,least_bound_over_observed"]
    broken = []
    for target in registry().values() if id == "all" else [statement(id)]:
        bar = partial(track, description=f"attacking {target.id}")
        found = attack(target, cases=cases, seed=seed, progress=bar)
        table.add_row(found.statement, f"{found.cases:,}", f"{found.violations:,}", f"{found.tightest:.6g}")
        lines.append(f"{found.statement},{seed},{found.cases},{found.violations},{found.tightest:.9g}")
        if csv:
            write_text(csv, "\n".join(lines) + "\n")
        broken += [] if found.survived else [found]
    _print(table)
    if broken:
        raise ValueError(f"{broken[0].statement} is violated: {broken[0].verdict} on {broken[0].worst}")


# Named otherwise than the functions of ellq: the parser looks a name up there, which would load PyTorch for --help.
_COMMANDS: dict[str, Callable[..., None]] = {"measure": measure_checkpoint, "prune": prune_checkpoint, "demo": demo}
_GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "figures": ("List the figures, or make one.", {"list": figures_list, "make": figures_make}),
    "theory": (
        "List the statements, show one, or attack them.",
        {"list": theory_list, "show": theory_show, "check": theory_check},
    ),
}
_POSITIONAL = (measure_checkpoint, figures_make, theory_show, theory_check)


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
    parser.add_function_arguments(function, as_positional=function in _POSITIONAL)
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
        if "q" in values:
            order_below_one(values["q"])
        for name in ("sparsity", "tol"):
            if values.get(name) is not None:
                open_fraction(values[name], name)
    except (TypeError, ValueError) as error:
        raise _UsageError(str(error)) from error
    return function, values


def _first_line(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def _build(path: str) -> Any:
    """Return what ``package.module:function`` makes; modules in the current folder are found too."""
    from torch import nn

    module_name, _, function_name = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise ValueError(f"model={path!r} cannot be imported ({error}). Run from the folder it lies in.") from error
    finally:
        sys.path.pop(0)
    if not callable(factory):
        raise ValueError(f"model={path!r}: module {module_name!r} has no function {function_name!r}.")
    made = factory()
    if not isinstance(made, nn.Module):
        raise ValueError(f"model={path!r} makes a {type(made).__name__}, not an nn.Module.")
    return made.eval()


def _fill(model: Any, state: Any, weights: str) -> None:
    """Load the weights bit for bit: the model takes on their dtypes, and tied tensors may be stored once."""
    values = dict(state)
    own = model.state_dict(keep_vars=True)
    for name, tensor in own.items():
        tied = [other for other in own if other in values and own[other] is tensor]
        if name not in values and tied:
            values[name] = values[tied[0]]
        if name in values and tensor.dtype != values[name].dtype:
            tensor.data = tensor.data.to(values[name].dtype)
    try:
        model.load_state_dict(values)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit the model: {error}") from error


def _print(value: object) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(value)
