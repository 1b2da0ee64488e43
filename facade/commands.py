"""The commands: each parses nothing, calls one function, and prints or writes what it gives."""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

_LOGS = ("iterations.csv", "epochs.csv", "flows.csv")


class UsageError(Exception):
    """An argument that parses but is out of range."""


def measure_checkpoint(
    file: str,
    q: float = 0.5,
    orders: list[float] | None = None,
    tolerances: list[float] | None = None,
    csv: str | None = None,
    grid_csv: str | None = None,
    retained_csv: str | None = None,
    json: str | None = None,
    plot: str | None = None,
    kind: Literal["units", "quantiles", "depth", "orders", "curves"] = "units",
    report: str | None = None,
) -> None:
    """Measure how compressible the weights in a checkpoint are; no data, no class needed.

    Args:
        file: checkpoint: .safetensors, or .pt, .pth, .th, of which only tensors are read, never code.
        q: order of the quasi-norm, strictly between 0 and 1.
        orders: also measure at these orders, such as "[0.1, 0.5, 0.9]".
        tolerances: also count what must be retained for these relative errors, such as "[0.01, 0.1]".
        csv: also write every unit, layer and the model as CSV to this file.
        grid_csv: also write the measures at every order to this file.
        retained_csv: also write the retained counts to this file.
        json: also write the profile as JSON to this file.
        plot: also draw the profile to this file (.png, .svg or .pdf).
        kind: what to draw: units (spread of units by layer), quantiles (heat map), depth, orders (needs --orders),
            or curves (error against what is retained, with bounds).
        report: also write all tables and pictures as one HTML page to this file.
    """
    from ellq.analysis import draw_curves, error_curves, measure, read_checkpoint

    _picture_format(plot)
    if kind != "units" and not plot:
        raise UsageError(f"kind={kind!r} says what to draw. Give --plot.")
    if grid_csv and not orders:
        raise UsageError("grid_csv needs the orders of the grid. Give --orders.")
    if retained_csv and not tolerances:
        raise UsageError("retained_csv needs tolerances. Give --tolerances.")
    if plot and kind == "orders" and not orders:
        raise UsageError("kind='orders' needs the orders to draw. Give --orders.")
    state = read_checkpoint(file)
    profile = measure(state, q=q, orders=orders or (), tolerances=tolerances or ())
    if csv:
        profile.to_csv(csv)
    if grid_csv:
        _write_table(grid_csv, profile.by_order())
    if retained_csv:
        _write_table(retained_csv, profile.retained)
    if json:
        profile.to_json(json)
    if plot:
        _draw(plot, draw_curves(error_curves(state)) if kind == "curves" else profile.plot(kind))
    if report:
        from ellq.analysis import write_text
        from ellq.weights_page import weights_page

        write_text(report, weights_page(state, profile, Path(file).name))
    _print(profile)


def compare_checkpoints(
    first: str,
    second: str,
    q: float = 0.5,
    confidence: float = 0.95,
    resamples: PositiveInt = 9999,
    paired: bool = False,
    seed: NonNegativeInt = 0,
    csv: str | None = None,
    json: str | None = None,
    plot: str | None = None,
) -> None:
    """Say which of two checkpoints of one architecture is more compressible, and by how much.

    Args:
        first: checkpoint.
        second: checkpoint with the same names and shapes of weights.
        q: order of the quasi-norm, strictly between 0 and 1.
        confidence: of the bootstrap intervals over units.
        resamples: how many times units are drawn, at least 99.
        paired: unit i of one stands for unit i of the other, as before and after pruning.
        seed: of the draws.
        csv: also write the comparison as CSV to this file.
        json: also write it as JSON to this file.
        plot: also draw it to this file (.png, .svg or .pdf).
    """
    from ellq.analysis import compare, read_checkpoint
    from ellq.analysis.compare import enough_resamples

    _picture_format(plot)
    try:
        enough_resamples(resamples, confidence)
    except ValueError as error:
        raise UsageError(str(error)) from error
    names = (Path(first).stem, Path(second).stem)
    if names[0] == names[1]:
        names = (first, second) if first != second else (f"{first} (first)", f"{second} (second)")
    compared = compare(
        read_checkpoint(first),
        read_checkpoint(second),
        q=q,
        confidence=confidence,
        resamples=resamples,
        paired=paired,
        names=names,
        seed=seed,
    )
    _hand_over(compared, csv=csv, json=json, plot=plot)


def follow_training(
    files: list[str],
    q: float = 0.5,
    csv: str | None = None,
    json: str | None = None,
    plot: str | None = None,
) -> None:
    """Measure checkpoints along a training, in the order given.

    Args:
        files: checkpoints of one architecture.
        q: order of the quasi-norm, strictly between 0 and 1.
        csv: also write the measures as CSV to this file.
        json: also write them as JSON to this file.
        plot: also draw them to this file (.png, .svg or .pdf).
    """
    from ellq.analysis import trajectory

    _picture_format(plot)
    followed = trajectory(files, q=q)
    _hand_over(followed, csv=csv, json=json, plot=plot)


def histogram_make(
    file: str,
    save: str | None = None,
    part: tuple[int, int] = (0, 1),
    by_layer: bool = True,
    orders: list[float] | None = None,
    csv: str | None = None,
    tolerances: list[float] | None = None,
    retained_csv: str | None = None,
    curves_csv: str | None = None,
    plot: str | None = None,
) -> None:
    """Measure a checkpoint of any size in one pass, in constant memory, every measure enclosed.

    Args:
        file: checkpoint, or the index file of a sharded one.
        save: keep the histograms in this file, to merge or to read again.
        part: count only the i-th of n equal shares of the file, as "[i, n]".
        by_layer: keep a histogram per layer, not of the model alone.
        orders: orders of the table written by --csv; 0.5 if not given.
        csv: also write the enclosed measures as CSV to this file.
        tolerances: relative errors for --retained_csv.
        retained_csv: also write what must be retained for the tolerances to this file.
        curves_csv: also write error against what is retained, with bounds, to this file.
        plot: also draw these curves to this file (.png, .svg or .pdf).
    """
    from ellq.analysis import histogram_profile

    _picture_format(plot)
    if not 0 <= part[0] < part[1]:
        raise UsageError(f"part={list(part)} is no share. Give [i, n] with 0 <= i < n.")
    _check_histogram_options(orders, csv, tolerances, retained_csv)
    _report_histogram(
        histogram_profile(file, by_layer=by_layer, part=part),
        save=save,
        orders=orders,
        csv=csv,
        tolerances=tolerances,
        retained_csv=retained_csv,
        curves_csv=curves_csv,
        plot=plot,
    )


def histogram_merge(
    files: list[str],
    save: str | None = None,
    orders: list[float] | None = None,
    csv: str | None = None,
    tolerances: list[float] | None = None,
    retained_csv: str | None = None,
    curves_csv: str | None = None,
    plot: str | None = None,
) -> None:
    """Merge saved histograms of the parts of a checkpoint; the result has the same bits as one pass.

    Args:
        files: histograms that 'ellq histogram make --save' wrote.
        save: keep the merged histograms in this file.
        orders: orders of the table written by --csv; 0.5 if not given.
        csv: also write the enclosed measures as CSV to this file.
        tolerances: relative errors for --retained_csv.
        retained_csv: also write what must be retained for the tolerances to this file.
        curves_csv: also write error against what is retained, with bounds, to this file.
        plot: also draw these curves to this file (.png, .svg or .pdf).
    """
    from ellq.analysis import HistogramProfile

    _picture_format(plot)
    _check_histogram_options(orders, csv, tolerances, retained_csv)
    _report_histogram(
        HistogramProfile.merge(HistogramProfile.load(file) for file in files),
        save=save,
        orders=orders,
        csv=csv,
        tolerances=tolerances,
        retained_csv=retained_csv,
        curves_csv=curves_csv,
        plot=plot,
    )


def _check_histogram_options(
    orders: list[float] | None, csv: str | None, tolerances: list[float] | None, retained_csv: str | None
) -> None:
    if bool(retained_csv) != bool(tolerances):
        raise UsageError("What must be retained needs both. Give --tolerances and --retained_csv.")
    if orders and not csv:
        raise UsageError("orders are those of the table. Give --csv.")


def _report_histogram(
    profile: Any,
    *,
    save: str | None,
    orders: list[float] | None,
    csv: str | None,
    tolerances: list[float] | None,
    retained_csv: str | None,
    curves_csv: str | None,
    plot: str | None,
) -> None:
    from ellq.analysis import draw_curves

    if save:
        profile.save(save)
    if csv:
        profile.to_csv(csv, orders or (0.5,))
    if retained_csv:
        _write_table(retained_csv, profile.retained(tolerances))
    if curves_csv or plot:
        curves = profile.curves()
        if curves_csv:
            _write_table(curves_csv, curves)
        if plot:
            _draw(plot, draw_curves(curves))
    _print(profile)


def prune_checkpoint(
    weights: str,
    out: str,
    sparsity: float | dict[str, float] | None = None,
    tol: float | None = None,
    nonzeros: PositiveInt | None = None,
    bytes: PositiveInt | None = None,
    storage: Literal["csr", "coo", "bitmask", "dense", "2:4"] = "csr",
    pattern: str | None = None,
    flops: float | None = None,
    parameters: float | None = None,
    memory: float | None = None,
    latency: float | None = None,
    method: Literal["lq", "id", "imp"] = "lq",
    rule: str | None = None,
    settings: dict[str, int | float | str] | None = None,
    q: float | None = None,
    least: NonNegativeInt | None = None,
    round_to: PositiveInt | None = None,
    selection: str | None = None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    refit: Literal[
        "auto",
        "none",
        "synthetic",
        "rescale",
        "bias",
        "least_squares",
        "obs",
        "reweight",
        "sparsegpt",
        "joint",
        "sequential",
        "fold",
    ] = "auto",
    compact: bool = False,
    model: str | None = None,
    data: str | None = None,
    samples: PositiveInt | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    plot: str | None = None,
    report: str | None = None,
    export: Literal["auto", "none", "pt2", "onnx"] = "auto",
    iterations: PositiveInt | None = None,
    cap: PositiveInt | None = None,
    stop: Literal["accuracy", "flow", "gradient", "fixed", "patience", "early-bird", "random"] | None = None,
    stopping: dict[str, int | float | str] | None = None,
    rewind: int | str | None = None,
    warm_up: NonNegativeInt | None = None,
    schedule: Literal["geometric", "cubic", "one-shot"] | None = None,
    training: dict[str, int | float | str] | None = None,
    checkpoint: str | None = None,
    seed: NonNegativeInt | None = None,
) -> None:
    """Prune a checkpoint and write the smaller model to a folder, as model.safetensors and plan.json.

    Method lq by magnitude needs the weights alone; with --model and --data what stays is refitted, without training,
    which costs much less accuracy. Method id and the rules flow, synflow, snip, taylor, wanda and least_bound run the
    model, so they need --model and --data (flow and synflow no data where the first layer is Linear). Give one budget:
    --sparsity or --tol; for method lq also --nonzeros, --bytes or --pattern; for method id also --flops, --parameters,
    --memory or --latency, which cut channels of any layers. Method id also writes model.pt2, which runs without the
    model's class, and for channels report.html. Method imp prunes by --sparsity in --iterations, retrains on --data
    after each until --stop or the --cap of epochs, and also writes iterations.csv, epochs.csv and flows.csv.

    Args:
        weights: checkpoint with the weights to prune.
        out: folder to write to.
        sparsity: fraction to remove, of weights (lq) or of each layer's hidden units (id); or, for lq, one for each
            layer, as '{"layer3.*": 0.9, "fc": 0.5}'.
        tol: the relative error allowed, per unit (lq) or in what reads the units (id); the authors' η for the rules
            yang2022 and diao2023.
        nonzeros: how many weights to retain.
        bytes: what the weights may take in the format of --storage.
        storage: csr, coo, bitmask, dense or 2:4.
        pattern: such as 2:4, two of every four weights.
        flops: fraction of the FLOPs to retain (method id).
        parameters: fraction of the parameters to retain (method id).
        memory: fraction to retain of the most memory that activations take at once (method id).
        latency: fraction to retain of the time the layers take, measured on this machine (method id).
        method: lq (weights set to zero, per unit), id (hidden units or channels removed, what reads them corrected) or
            imp (weights set to zero again and again, retrained between).
        rule: ellq (the default), flow, exact, least_bound, yang2022, diao2023, uniform, global, lamp, erk, synflow,
            snip, taylor or wanda (method lq); ellq (the default), chee2021 or chee2022 (method id); those of lq, of
            which global is the default, or gharatappeh2025 (method imp).
        settings: of the rule, as '{"scope": "layer", "gamma": 3}'.
        q: order of the quasi-norm, for the rules that have one.
        least: how many weights every unit retains at least (lq), or units every group of channels (id).
        round_to: widths become multiples of it (method id).
        selection: how channels are chosen (method id, rule ellq): elimination, magnitude, or a rule such as pivoted-qr.
        include: only weights whose name, or a module of theirs, matches one of these globs.
        exclude: none of the weights that match one of these.
        refit: what the layers become besides being masked (method lq). auto is, for rule ellq, obs with --model and
            --data (least_squares for a tolerance or a pattern), synthetic with --model alone, and none otherwise. For
            method id: joint (what auto is for channels), sequential, fold or none.
        compact: also cut out units that are constant or unread; needs --model and --data.
        model: where the model comes from, as package.module:function; called without arguments.
        data: what is calibrated on: the train part of a data set, by name, such as digits or mnist; or inputs as the
            model takes them, in a file: .npy, or .npz with inputs and labels.
        samples: at most how many of its examples to use; by default 2000, and all of them for method imp.
        mean: what to subtract from each channel of a data set's inputs in [0, 1].
        std: what to divide each channel by after that.
        plot: also draw what every layer retains, for method imp how it went, to this file (.png, .svg or .pdf).
        report: also run both models on data, and write what every layer's outputs changed by, bounds, accuracy and
            agreement as one HTML page to this file; examples of the test part are held out.
        export: also write model.pt2, by torch.export, or model.pt2 and model.onnx (onnx); needs --model and --data.
            auto is pt2 for method id, left out where the model cannot be exported.
        iterations: how often to prune and retrain (this and what follows: method imp).
        cap: the most epochs of an iteration.
        stop: when to stop retraining before the cap: accuracy (the dense net's is back on a validation split), flow or
            gradient (within epsilon of the dense net's), fixed, patience, early-bird (the masks hardly change) or
            random.
        stopping: settings of the stop, as '{"tolerance": 0.01}', '{"epsilon": 0.1, "kind": "absolute", "monitored":
            512}' or '{"epochs": 5}'. Without epsilon, the flows of the given net on halves of the monitored inputs tell
            one. Rule gharatappeh2025 stops by its own flow, epsilon 1, or by accuracy, unless told otherwise.
        rewind: what retraining goes back to: warm-up (the default), start, an epoch of the warm-up, none or rate.
        warm_up: epochs of the dense net first; by default none, as of a checkpoint that is trained.
        schedule: how sparsity rises: geometric (the default), cubic or one-shot.
        training: of SGD or AdamW, as '{"learning_rate": 0.01, "schedule": "cosine", "batch_size": 128}'.
        checkpoint: folder to keep the latest state in; a run that was stopped goes on there.
        seed: of everything random; by default 0.
    """
    from ellq.analysis import read_checkpoint
    from ellq.pruning import apply, plan
    from ellq.pruning.channel_settings import CHANNEL_RULES
    from ellq.pruning.export import export_program, require_onnx
    from ellq.pruning.plan_masks import LQ_RULES
    from ellq.pruning.refit import REFITS
    from ellq.pruning.scores import SCORE_RULES
    from ellq.pruning.structured import CHANNEL_REFITS, SELECTIONS

    _picture_format(plot)
    of_loop = {"iterations": iterations, "cap": cap, "stop": stop, "stopping": stopping, "rewind": rewind}
    of_loop |= {"warm_up": warm_up, "schedule": schedule, "training": training, "checkpoint": checkpoint, "seed": seed}
    for_masks = {"nonzeros": nonzeros, "bytes": bytes, "pattern": pattern}
    for_channels = {"flops": flops, "parameters": parameters, "memory": memory, "latency": latency}
    budgets = {"sparsity": sparsity, "tol": tol} | for_masks | for_channels
    budget = {name: value for name, value in budgets.items() if value is not None}
    if method == "imp":
        unfit = {**budgets, "report": report, "pattern": pattern, "round_to": round_to, "selection": selection}
        unfit |= {"refit": None if refit == "auto" else refit, "export": None if export == "auto" else export}
        _prune_iteratively(
            weights,
            out,
            rule or "global",
            {"q": q, "least": least, "include": include, "exclude": exclude, **(settings or {})},
            of_loop | {"sparsity": sparsity},
            {name: value for name, value in unfit.items() if value is not None and name != "sparsity"},
            model=model,
            data=data,
            samples=samples,
            mean=mean,
            std=std,
            compact=compact,
            plot=plot,
        )
        return
    stray = next((name for name, value in of_loop.items() if value is not None), None)
    if stray is not None:
        raise UsageError(f"{stray} is for method imp. Choose that, or leave it out.")
    rule, samples = rule or "ellq", samples or 2000
    if len(budget) != 1:
        raise UsageError(
            "Give either --sparsity or --tol, --nonzeros, --bytes, --pattern, --flops, --parameters, --memory or"
            " --latency; not both, and not none."
        )
    if rule not in (LQ_RULES if method == "lq" else CHANNEL_RULES):
        raise UsageError(f"rule={rule!r} is not a rule of method {method!r}.")
    others = for_masks if method == "id" else for_channels | {"round_to": round_to, "selection": selection}
    stray = next((name for name, value in others.items() if value is not None), None)
    if stray is not None:
        raise UsageError(f"{stray} is for method {'lq' if method == 'id' else 'id'}. Choose that, or leave it out.")
    if refit not in ("auto", "none") and (refit in CHANNEL_REFITS) != (method == "id"):
        raise UsageError(f"refit={refit!r} is not for method {method!r}. Leave it out.")
    if selection is not None and (selection not in SELECTIONS or rule != "ellq"):
        raise UsageError(f"selection={selection!r} is none of rule ellq's: {', '.join(SELECTIONS)}.")
    if tol is not None and not (0 < tol < 1 or (tol >= 0 and rule in ("yang2022", "diao2023"))):
        raise UsageError(f"tol={tol:g} is outside (0, 1). Choose a fraction such as tol=0.5.")
    needs_data = method == "id" or rule in ("least_bound", "snip", "taylor", "wanda")
    if (needs_data and data is None) or ((needs_data or rule in ("flow", "synflow")) and model is None):
        name = f"Method {method}" if method == "id" else f"Rule {rule}"
        needed = "--model package.module:function and --data NAME" if needs_data else "--model package.module:function"
        raise UsageError(f"{name} runs the model on data. Give {needed}.")
    if refit not in ("auto", "none") and (model is None or (refit in REFITS and data is None)):
        raise UsageError(f"refit={refit!r} runs the model. Give --model package.module:function and --data NAME.")
    if data is not None and model is None:
        raise UsageError(f"data={data!r} is for running the model. Give --model package.module:function too.")
    if (compact or export in ("pt2", "onnx")) and (model is None or data is None):
        what = "compact" if compact else f"export={export!r}"
        raise UsageError(f"{what} runs the model. Give --model package.module:function and --data NAME.")
    if model is not None and not model.partition(":")[2]:
        raise UsageError(f"model={model!r} names no function. Write package.module:function.")
    if report and data is not None and _is_array_file(data):
        raise UsageError(f"A report holds out the test part of a data set, which {data!r} has not. Give --data NAME.")
    if report and (model is None or data is None):
        raise UsageError("A report runs both models on data. Give --model package.module:function and --data NAME.")
    if export == "onnx":
        require_onnx()
    state = read_checkpoint(weights)
    calibration: Any = None
    inputs: Any = None
    source: Any = state
    if model is not None:
        source = _build(model)
        _fill(source, state, weights)
    if data is not None and model is not None:
        inputs, labels = _inputs(data, samples, mean=mean, std=std)
        calibration = _labelled(inputs, labels) if rule in SCORE_RULES and labels is not None else inputs
    if export in ("pt2", "onnx"):
        export_program(source, inputs)  # what cannot be exported is refused before the work
    choices = {"q": q, "least": least, "include": include, "exclude": exclude}
    choices |= {"round_to": round_to, "selection": selection}
    arguments: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    arguments |= {**budget, **(settings or {})}
    decided = plan(source, calibration, method=method, rule=rule, storage=storage, refit=refit, **arguments)
    pruned = apply(source, decided)
    page = None
    if report or (method == "id" and not decided.corrections):
        assert data is not None  # checked before
        held_out = None if _is_array_file(data) else _inputs(data, samples, mean=mean, std=std, part="test")
        page = _reported(source, pruned, decided, inputs, held_out, falls_back=not report)
    final = _compacted(pruned, inputs[:64]) if compact else pruned
    _save(final, out, decided, page if method == "id" else None, inputs, export)
    if plot:
        _draw(plot, decided.plot())
    _print(decided)
    if page is not None:
        print(page.verdict)
        if report:
            page.to_html(report)
    print(f"Written: {out}")


def _prune_iteratively(
    weights: str,
    out: str,
    rule: str,
    choices: dict[str, Any],
    of_loop: dict[str, Any],
    unfit: dict[str, Any],
    *,
    model: str | None,
    data: str | None,
    samples: int | None,
    mean: list[float] | None,
    std: list[float] | None,
    compact: bool,
    plot: str | None,
) -> None:
    """Prune by method imp: choices are of the masks, of_loop of the loop, unfit what belongs to other methods."""
    from ellq.analysis import accuracy, new_folder, read_checkpoint
    from ellq.pruning import EpochTrainer, iterate, write_into
    from ellq.pruning.artefact import DESCRIPTION, WEIGHTS
    from ellq.pruning.plan_masks import LQ_RULES
    from ellq.pruning.scores import SCORE_RULES

    is_released = rule == "gharatappeh2025"
    if unfit:
        raise UsageError(f"{next(iter(unfit))} is not for method imp. Leave it out.")
    if not is_released and rule not in LQ_RULES:
        raise UsageError(f"rule={rule!r} is not a rule of method 'imp'.")
    if model is None or data is None:
        raise UsageError("Method imp trains the model. Give --model package.module:function and --data NAME.")
    if not model.partition(":")[2]:
        raise UsageError(f"model={model!r} names no function. Write package.module:function.")
    options = {name: value for name, value in of_loop.items() if value is not None}
    needed = ("iterations", "cap") if is_released else ("iterations", "cap", "sparsity")
    lacking = next((name for name in needed if name not in options), None)
    if lacking is not None or isinstance(options.get("sparsity"), dict):
        raise UsageError(f"Method imp needs one number as --{lacking or 'sparsity'}.")
    net = _build(model)
    _fill(net, read_checkpoint(weights), weights)
    seed = options.setdefault("seed", 0)
    (inputs, labels), (held_inputs, held_labels) = _split(data, samples, seed, mean=mean, std=std)
    stopping, training = options.pop("stopping", {}), options.pop("training", {})
    if is_released:
        training = {"momentum": 0.0} | training
        if options.setdefault("stop", "flow") == "flow":
            released = {"kind": "signed", "pairs": "released", "epsilon": 1.0, "monitored": len(inputs)}
            stopping = released | stopping
    options["stop"] = _stop(options.get("stop"), stopping, net, inputs, labels, seed)
    if training.get("schedule") == "cosine" and "epochs" not in training:
        rounds = options["iterations"] if options.get("rewind") == "none" else 1
        training = training | {"epochs": options.get("warm_up", 0) + rounds * options["cap"]}
    try:
        trainer = EpochTrainer(inputs, labels, **{"learning_rate": 0.01, **training})
    except TypeError as error:
        raise UsageError(f"training={training} does not fit: {error}.") from error
    plan_with = {name: value for name, value in choices.items() if value is not None}
    if not is_released:
        plan_with["rule"] = rule
        if rule in SCORE_RULES or rule == "least_bound":
            plan_with["calibration"] = _labelled(inputs, labels) if rule in SCORE_RULES else inputs

    def on_validation(pruned: Any) -> float:
        return accuracy(pruned, held_inputs, held_labels)

    with new_folder(out, replaces=(WEIGHTS, DESCRIPTION, *_LOGS)) as folder:
        found = iterate(
            net,
            trainer,
            on_validation,
            plan_with=plan_with,
            rule="gharatappeh2025" if is_released else "ellq",
            **options,
        )
        final = _compacted(found.model.eval(), inputs[:64]) if compact else found.model.eval()
        write_into(folder, final)
        for name, table in zip(_LOGS, (found.iterations, found.epochs, found.flows), strict=True):
            table.to_csv(folder / name, index=False, lineterminator="\n")
    if plot:
        _draw(plot, found.plot())
    print(found.iterations.to_string(index=False, float_format="{:.4g}".format))
    if not _is_array_file(data):
        test_inputs, test_labels = _inputs(data, 10**9, mean=mean, std=std, part="test")
        scores = [accuracy(each, test_inputs, test_labels) for each in (net, final)]
        print(f"Accuracy on the test part: {scores[0]:.4f} as given, {scores[1]:.4f} pruned")
    print(f"Written: {out}")


def _split(
    data: str, samples: int | None, seed: int, *, mean: list[float] | None, std: list[float] | None
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return inputs and labels to train on, and a tenth of all, of a data set's train part, to validate on."""
    import numpy as np

    from ellq.analysis import datasets

    if not _is_array_file(data):
        whole = datasets.load(data, "train")
        parts = datasets.partition(whole.select(range(min(samples or len(whole), len(whole)))), fit=0.9, validation=0.1)
        small = next((name for name, part in parts.items() if not len(part)), None)
        if small is not None:
            raise UsageError(f"samples={samples} leaves nothing for the {small} split. Give more.")
        both = [(part.inputs(mean=mean, std=std), part.labels) for part in parts.values()]
        return both[0], both[1]
    inputs, labels = _inputs(data, samples or 10**9, mean=mean, std=std)
    if labels is None:
        raise ValueError(f"{data} holds no labels to train on. Write it by numpy.savez(file, inputs=, labels=).")
    order = np.random.default_rng(seed).permutation(len(inputs))
    held, fit = np.split(order, [-(-len(order) // 10)])
    return (inputs[fit], labels[fit]), (inputs[held], labels[held])


def _stop(name: str | None, settings: dict[str, Any], net: Any, inputs: Any, labels: Any, seed: int) -> Any:
    """Return a stopping rule by its name; a flow's monitor looks at the first inputs."""
    from ellq.analysis.flows import FlowMonitor
    from ellq.analysis.gradient_flow import GradientMonitor
    from ellq.pruning import calibrate_epsilon_on_halves, stopping

    if name is None:
        if settings:
            raise UsageError("stopping holds settings of a stop. Give --stop.")
        return None
    own = dict(settings)
    makers: dict[str, Any] = {
        "accuracy": stopping.accuracy_back,
        "fixed": stopping.fixed,
        "patience": stopping.patience,
        "early-bird": stopping.masks_stable,
        "random": partial(stopping.random_stop, **({} if "seed" in own else {"seed": seed})),
    }
    try:
        if name in makers:
            return makers[name](**own)
        import torch

        from ellq.theory.arguments import count

        examples = [inputs[: count(own.pop("monitored", 512), "monitored", low=2, high=2**62)]]
        if name == "gradient":
            examples.append(torch.as_tensor(labels[: len(examples[0])]))
        epsilon = own.pop("epsilon", None)
        make = partial(GradientMonitor if name == "gradient" else FlowMonitor, **own)
        monitor = make(*examples)
    except TypeError as error:
        raise UsageError(f"stopping={settings} does not fit stop={name!r}: {error}.") from error
    if epsilon is None:
        epsilon = calibrate_epsilon_on_halves(make, net, *examples, seed=seed)
        print(f"epsilon={epsilon:.4g}, from flows on halves of {len(examples[0])} inputs")
    return (stopping.gradient_back if name == "gradient" else stopping.flow_back)(monitor, epsilon)


def _save(model: Any, out: str, plan: Any, report: Any, inputs: Any, export: str) -> None:
    """Write a pruned model; what is exported only because nothing else was said is left out where that fails."""
    from ellq.pruning import save
    from ellq.pruning.export import ExportError

    chosen = export if export != "auto" else "pt2" if plan.method == "id" else "none"
    example = None if chosen == "none" else inputs[:16]
    try:
        save(model, out, plan=plan, example=example, onnx=chosen == "onnx", report=report)
    except ExportError as error:
        if export != "auto":
            raise
        save(model, out, plan=plan, report=report)
        print(f"model.pt2 is left out. {error}")


def _reported(
    dense: Any, pruned: Any, plan: Any, calibration: Any, held_out: tuple[Any, Any] | None, *, falls_back: bool
) -> Any:
    """Return what the plan changes in the model's outputs; without held-out inputs where these do not fit."""
    from ellq.pruning.channel_report import report

    examples, labels = held_out or (None, None)
    try:
        return report(dense, pruned, plan=plan, calibration=calibration, held_out=examples, labels=labels)
    except ValueError as error:
        if not falls_back or held_out is None:
            raise
        print(f"The report is on calibration inputs alone. {error}")
        return report(dense, pruned, plan=plan, calibration=calibration)


def _is_array_file(data: str) -> bool:
    return Path(data).suffix in (".npy", ".npz")


def _inputs(
    data: str, samples: int, *, mean: list[float] | None, std: list[float] | None, part: str = "train"
) -> tuple[Any, Any]:
    """Return inputs, and labels or None: of a part of a data set, or from a file."""
    import numpy as np
    import torch

    from ellq.analysis import datasets

    if not _is_array_file(data):
        whole = datasets.load(data, part)
        chosen = whole.select(range(min(samples, len(whole))))
        return chosen.inputs(mean=mean, std=std), chosen.labels
    if mean is not None or std is not None:
        raise UsageError(f"mean and std are for data sets; {data!r} holds inputs as the model takes them.")
    arrays = np.load(data, allow_pickle=False)
    if Path(data).suffix == ".npy":
        arrays = {"inputs": arrays}
    if "inputs" not in arrays:
        raise ValueError(f"{data} holds {', '.join(arrays)}, not inputs. Write it by numpy.savez(file, inputs=inputs).")
    inputs = arrays["inputs"][:samples]
    kept = inputs.astype(np.float32 if inputs.dtype.kind == "f" else np.int64)
    return torch.from_numpy(kept), arrays["labels"][:samples] if "labels" in arrays else None


def _compacted(pruned: Any, example: Any) -> Any:
    """Return a pruned model without its constant and unread units; say how many parameters went."""
    from ellq.pruning import compact, finalize

    full = finalize(pruned)
    small = compact(full, example)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (full, small))
    print(f"Constant and unread units cut out: {before:,} parameters, now {after:,}")
    return small


def _labelled(inputs: Any, labels: Any) -> list[tuple[Any, Any]]:
    """Return inputs and labels in batches."""
    import torch

    starts = range(0, len(inputs), 256)
    return [(inputs[i : i + 256], torch.as_tensor(labels[i : i + 256])) for i in starts]


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
        raise UsageError(str(error)) from error
    for path in make(name, out, seed=seed):
        print(path)


def verify_id_on_nets(
    out: str = "verification",
    quick: bool = False,
    jobs: PositiveInt = 1,
    seed: NonNegativeInt = 0,
    delta: float = 0.05,
) -> None:
    """Try the risk theorem of interpolative decomposition on many nets, with inputs it has not seen.

    Args:
        out: folder to write to; a run that was stopped goes on there.
        quick: random nets and digits only; without it every data set on the machine and widths up to 4096, which
            takes days.
        jobs: how many processes.
        seed: of everything random.
        delta: probability with which each bound may fail.
    """
    from ellq.pruning import verify_id
    from ellq.pruning.verify_nets import QUICK, full_grid

    found = verify_id(out, grid=QUICK if quick else full_grid(), jobs=jobs, seed=seed, delta=delta)
    print(found.verdicts.to_string(index=False))
    print(f"Written: {out}")
    if not found.holds:
        raise ValueError(f"More violations than δ={delta:g} allows. See {Path(out) / 'verdicts.csv'}.")


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

    shown = _statement(id)
    print(f"{shown.id}: {shown.title}\n")
    print(pretty(shown.formula(), use_unicode=True, num_columns=100), end="\n\n")
    print(f"LaTeX:   {shown.latex()}")
    print(f"assumes: {' '.join(assumption.sentence for assumption in shown.assumptions)}")
    print(f"status:  {shown.status}")
    print(f"source:  {shown.reference}")
    print(f"falsified by: {shown.falsifier()}")


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
    from ellq.theory import attack, registry

    table = Table("statement", "cases", "violations", "least bound ÷ observed")
    lines = ["statement,seed,cases,violations,least_bound_over_observed"]
    broken = []
    for target in registry().values() if id == "all" else [_statement(id)]:
        bar = partial(track, description=f"attacking {target.id}")
        found = attack(target, cases=cases, seed=seed, progress=bar)
        table.add_row(found.statement, f"{found.cases:,}", f"{found.violations:,}", _near_one(found.tightest))
        lines.append(f"{found.statement},{seed},{found.cases},{found.violations},{found.tightest:.9g}")
        if csv:
            write_text(csv, "\n".join(lines) + "\n")
        broken += [] if found.survived else [found]
    _print(table)
    if broken:
        raise ValueError(f"{broken[0].statement} is violated: {broken[0].verdict} on {broken[0].worst}")


def _statement(id: str) -> Any:
    from ellq.theory import statement

    try:
        return statement(id)
    except KeyError as error:
        raise UsageError(str(error.args[0])) from error


def _near_one(ratio: float) -> str:
    return f"1 + {ratio - 1:.2g}" if 0 <= ratio - 1 < 1e-4 else f"{ratio:.6g}"


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


def _picture_format(plot: str | None) -> str:
    """Return the format a picture's name asks for; refuse others before any work is done."""
    suffix = Path(plot).suffix.lower().removeprefix(".") if plot else ""
    if plot and suffix not in ("png", "svg", "pdf"):
        raise UsageError(f"plot={plot!r} has no known ending. Choose .png, .svg or .pdf.")
    return suffix


def _draw(plot: str, figure: Any) -> None:
    from ellq.analysis import write_bytes
    from ellq.paper_figures import render

    write_bytes(plot, render(figure, _picture_format(plot)))


def _hand_over(result: Any, *, csv: str | None, json: str | None, plot: str | None) -> None:
    """Write a result to the files that are named, and print it."""
    if csv:
        result.to_csv(csv)
    if json:
        result.to_json(json)
    if plot:
        _draw(plot, result.plot())
    _print(result)


def _write_table(path: str, frame: Any) -> None:
    from ellq.analysis import write_text

    write_text(path, frame.to_csv(index=False, lineterminator="\n"))
