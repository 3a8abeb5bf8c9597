"""What an experiment of `reproduce` says: tables as Markdown, figures, and verdicts that follow from the numbers."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nexusgen import shapes
from nexusgen.statistics import (
    Interval,
    mean_of_groups_interval,
    paired_difference,
    paired_difference_of_groups,
)
from pipelines import storage
from pipelines.reproduce import ReproduceConfig, Result
from pipelines.trials import CURVE_EVERY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trials = Sequence[Mapping[str, Any]]
MODES = ("teacher_forced", "free_running")
MODE_NAMES = {"teacher_forced": "teacher-forced", "free_running": "free-running"}
COLOURS = ("#1f6fb4", "#d1495b", "#6a994e")
TITLES = {
    "prefill-ablation": "Prefilled against naive autoregression",
    "loss-weights": "The image loss without either part",
    "decoder-inputs": "The generation decoder trained on the encoder's embeddings or on predicted ones",
}


@dataclass(frozen=True)
class Verdict:
    """A claim, and whether the numbers bear it out."""

    claim: str
    verdict: str
    numbers: str


@dataclass(frozen=True)
class Report:
    """What was found."""

    text: str
    verdicts: Sequence[Verdict]
    result: Result
    files: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints and report.json holds."""
        return {
            "experiment": self.result.experiment,
            "verdicts": [vars(verdict) for verdict in self.verdicts],
            "trials": self.result.trials,
            "decoder": self.result.decoder,
            "seconds": self.result.seconds,
            "files": list(self.files),
        }


def write_report(config: ReproduceConfig, result: Result, folder: Path) -> Report:
    """Write report.md, report.json and the figures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if result.experiment == "decoder-inputs":
        lines, verdicts, figures = _decoder_inputs(result)
    else:
        lines, verdicts, figures = _ar_arms(result)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
    text = "\n".join([f"## {TITLES[result.experiment]}", "", *_made_by(config, result), "", *lines])
    if verdicts:
        rows = [[one.claim, one.verdict, one.numbers] for one in verdicts]
        text += "\n\n" + table(["claim", "verdict", "numbers"], rows, numbers=False)
    text += "\n\n" + "\n\n".join(f"![{name}]({name}.png)" for name in figures) + "\n"
    files = ["report.md", "report.json", *(f"{name}.png" for name in figures)]
    report = Report(text, verdicts, result, [str(folder / name) for name in files])
    storage.write_bytes_atomic(str(folder / "report.md"), text.encode())
    storage.write_json(str(folder / "report.json"), report.to_json())
    return report


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table; all columns but the first are numbers, if they are."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _made_by(config: ReproduceConfig, result: Result) -> list[str]:
    """The command, the machine, and what it cost."""
    ar, decoder = config.train_ar, config.train_generation_decoder
    samples = ", ".join(f"{count:,} {task}" for task, count in config.pack.counts.items())
    trainings = [trial["training"] for trials in result.trials.values() for trial in trials]
    seconds = sum(training["cpu_seconds"] for training in trainings)
    return [
        f"`nexusgen reproduce {result.experiment} --out DIR --seeds {config.num_seeds}`",
        "",
        f"Data: {samples} samples of the demo world. Stage ar: {ar.num_steps:,} steps of {ar.batch_samples} samples; "
        f"generation decoder: {decoder.num_steps:,} steps of {decoder.batch_samples}; from `{config.model}`, all else "
        f"as in the demo. Seeds 0 to {config.num_seeds - 1}. Errors on held-out samples, scores on held-out prompts.",
        "",
        f"Machine: {os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}; one thread. The trainings "
        f"below took {seconds:,.0f} CPU seconds.",
    ]


# --- arms of stage ar ---------------------------------------------------------------------------------------------


def _ar_arms(result: Result) -> tuple[list[str], list[Verdict], dict[str, Figure]]:
    trials = result.trials
    lines: list[str] = []
    for task in _tasks(trials):
        count = next(iter(trials.values()))[0]["errors"][task]["n"]
        lines += [
            f"MSE of predicted embeddings by position in the image, {task}: {count} held-out samples, mean of "
            f"{len(next(iter(trials.values())))} seeds.",
            "",
            _error_table(trials, task),
            "",
        ]
    lines += ["Each trial: mean MSE over positions, and scores.", "", _trial_table(trials), ""]
    assert result.decoder is not None
    lines += [
        "Scores on held-out prompts, all seeds together, with 95 % intervals over prompts. `true embeddings` are the "
        "encoder's own, of what the prompt asks for, drawn by the same decoder: what the predictions could reach.",
        "",
        _score_table({**_pooled_of(trials), "true embeddings": result.decoder["scores_of_true"]}),
    ]
    verdicts = _prefill_verdicts(trials) if result.experiment == "prefill-ablation" else _loss_verdicts(trials)
    return lines, verdicts, {"errors": _draw_errors(trials), "scores": _draw_scores_and_curves(result)}


def _tasks(trials: Mapping[str, Trials]) -> list[str]:
    return list(next(iter(trials.values()))[0]["errors"])


def _by_position(trials: Trials, task: str, mode: str) -> np.ndarray:
    """MSE by seed and position."""
    return np.array([trial["errors"][task][mode]["mse"] for trial in trials])


def _error_table(trials: Mapping[str, Trials], task: str) -> str:
    rows = []
    for arm, of_arm in trials.items():
        for mode in MODES:
            by_position = _by_position(of_arm, task, mode).mean(axis=0)
            rows.append([f"{arm}, {MODE_NAMES[mode]}", *_numbers(by_position), f"{_growth(by_position):.1f}"])
    constant = _by_position(next(iter(trials.values())), task, "mean_embedding").mean(axis=0)
    rows.append(["always the mean embedding", *_numbers(constant), f"{_growth(constant):.1f}"])
    return table(["", *(str(place + 1) for place in range(len(constant))), "mean", "last / first"], rows)


def _numbers(by_position: np.ndarray) -> list[str]:
    return [f"{value:.3f}" for value in (*by_position, by_position.mean())]


def _growth(by_position: np.ndarray) -> float:
    return float(by_position[-1] / by_position[0])


def _trial_table(trials: Mapping[str, Trials]) -> str:
    tasks = _tasks(trials)
    header = ["arm, seed", *(f"{task}, {MODE_NAMES[mode]}" for task in tasks for mode in MODES)]
    rows = []
    for arm, of_arm in trials.items():
        for seed, trial in enumerate(of_arm):
            errors = [f"{np.mean(trial['errors'][task][mode]['mse']):.4f}" for task in tasks for mode in MODES]
            scores = [f"{_overall(trial['scores']).value:.3f}", f"{np.mean(trial['scores']['explicit']):.3f}"]
            training = trial["training"]
            cost = [str(training["num_skipped"]), f"{training['cpu_seconds']:.0f}"]
            rows.append([f"{arm}, {seed}", *errors, *scores, *cost])
    return table([*header, "overall", "explicit", "skipped steps", "training, CPU s"], rows)


def _pooled(scores: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Scores of several trials, seed after seed, by category."""
    return {category: [one for of_seed in scores for one in of_seed[category]] for category in scores[0]}


def _pooled_of(trials: Mapping[str, Trials], name: str = "scores") -> dict[str, dict[str, list[float]]]:
    return {arm: _pooled([trial[name] for trial in of_arm]) for arm, of_arm in trials.items()}


def _overall(scores: Mapping[str, Sequence[float]]) -> Interval:
    return mean_of_groups_interval([scores[category] for category in shapes.CATEGORIES])


def _score_table(by_arm: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    rows = []
    for arm, scores in by_arm.items():
        cells = [_overall(scores), *(mean_of_groups_interval([scores[name]]) for name in _categories())]
        rows.append([arm, *(f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})" for one in cells)])
    return table(["", "overall", *_categories()], rows)


def _categories() -> list[str]:
    return [*shapes.CATEGORIES, "explicit"]


def _difference(
    trials: Mapping[str, Trials],
    ours: str,
    theirs: str,
    groups: Callable[[Mapping[str, Any]], Sequence[Sequence[float]]],
) -> Interval:
    """Of the mean of groups' means, paired by seed and item."""
    one, other = ([groups(trial) for trial in trials[arm]] for arm in (ours, theirs))
    joined = [
        [[value for of_seed in side for value in of_seed[number]] for number in range(len(side[0]))]
        for side in (one, other)
    ]
    return paired_difference_of_groups(joined[0], joined[1])


def _errors_of(task: str, mode: str) -> Callable[[Mapping[str, Any]], Sequence[Sequence[float]]]:
    return lambda trial: [trial["errors"][task][mode]["mse_by_sample"]]


def _short_scores(trial: Mapping[str, Any]) -> Sequence[Sequence[float]]:
    return [trial["scores"][category] for category in shapes.CATEGORIES]


def _explicit_scores(trial: Mapping[str, Any]) -> Sequence[Sequence[float]]:
    return [trial["scores"]["explicit"]]


def _prefill_verdicts(trials: Mapping[str, Trials]) -> list[Verdict]:
    """Of each naive arm against prefilled. Free-running, naive may be worse for two reasons, which are told apart: it
    predicts worse from true embeddings, and its errors pile up."""
    ours, *others = trials
    verdicts = []
    for theirs in others:
        for task in _tasks(trials):
            verdicts += _error_verdicts(trials, ours, theirs, task)
        for name, groups in (("short prompts", _short_scores), ("explicit captions", _explicit_scores)):
            difference = _difference(trials, ours, theirs, groups)
            claim = f"{ours} scores higher than {theirs} on {name}"
            verdicts.append(Verdict(claim, _sign(difference), f"{ours} - {theirs}: {difference}"))
    return verdicts


def _error_verdicts(trials: Mapping[str, Trials], ours: str, theirs: str, task: str) -> list[Verdict]:
    forced = _difference(trials, theirs, ours, _errors_of(task, "teacher_forced"))
    free = _difference(trials, theirs, ours, _errors_of(task, "free_running"))
    freely, truly = (
        [value for trial in trials[theirs] for value in trial["errors"][task][mode]["mse_by_sample"]]
        for mode in ("free_running", "teacher_forced")
    )
    piled_up = paired_difference(freely, truly)
    grown = {arm: [_growth(one) for one in _by_position(trials[arm], task, "free_running")] for arm in (ours, theirs)}
    by_seed = "; ".join(f"{arm} {', '.join(f'{one:.1f}' for one in ratios)}" for arm, ratios in grown.items())
    return [
        Verdict(
            f"{theirs} is trained as well: its teacher-forced MSE is no larger ({task})",
            "holds" if forced.low <= 0 else "FAILS",
            f"{theirs} - {ours}: {forced}",
        ),
        Verdict(
            f"{theirs}'s errors pile up: its free-running MSE exceeds its teacher-forced one ({task})",
            _sign(piled_up),
            f"free-running - teacher-forced: {piled_up}",
        ),
        Verdict(
            f"{theirs}'s free-running MSE grows along the image, more than {ours}'s ({task})",
            "holds" if min(grown[theirs]) > max(1.0, *grown[ours]) else "FAILS",
            f"last / first position, by seed: {by_seed}",
        ),
        Verdict(
            f"{ours}'s free-running MSE is smaller than {theirs}'s ({task})", _sign(free), f"{theirs} - {ours}: {free}"
        ),
    ]


def _loss_verdicts(trials: Mapping[str, Trials]) -> list[Verdict]:
    full, *others = trials
    verdicts = []
    for arm in others:
        for name, groups in (("short prompts", _short_scores), ("explicit captions", _explicit_scores)):
            difference = _difference(trials, full, arm, groups)
            verdicts.append(
                Verdict(
                    f"both parts score higher on {name} than {arm}", _sign(difference), f"{full} - {arm}: {difference}"
                )
            )
    return verdicts


def _sign(difference: Interval) -> str:
    """Whether a difference is above 0, beyond chance."""
    if difference.low > 0:
        return "holds"
    return "FAILS: the other way round" if difference.high < 0 else "can't be told: the interval holds 0"


# --- arms of the decoder ------------------------------------------------------------------------------------------


def _decoder_inputs(result: Result) -> tuple[list[str], list[Verdict], dict[str, Figure]]:
    trials = result.trials
    by_arm = {
        f"trained on {arm}, drawn from {source}": _pooled_of(trials, name)[arm]
        for source, name in (("predicted", "scores"), ("true", "scores_of_true"))
        for arm in trials
    }
    rows = []
    for arm, of_arm in trials.items():
        for seed, trial in enumerate(of_arm):
            cells = [
                (_overall(trial[name]).value, np.mean(trial[name]["explicit"])) for name in ("scores", "scores_of_true")
            ]
            loss, cost = trial["training"]["validation"]["flow"], trial["training"]["cpu_seconds"]
            rows.append(
                [f"{arm}, {seed}", *(f"{value:.3f}" for pair in cells for value in pair), f"{loss:.4f}", f"{cost:.0f}"]
            )
    header = ["trained on, seed", "overall, predicted", "explicit, predicted", "overall, true", "explicit, true"]
    lines = [
        "Each trial: scores of pictures drawn from predicted embeddings, and from the encoder's own of what the prompt "
        "asks for; flow loss on held-out samples, each decoder on its own inputs.",
        "",
        table([*header, "held-out loss", "training, CPU s"], rows),
        "",
        "All seeds together, with 95 % intervals over prompts.",
        "",
        _score_table(by_arm),
    ]
    verdicts = []
    for name, groups in (("short prompts", _short_scores), ("explicit captions", _explicit_scores)):
        difference = _difference(trials, "predicted", "encoder", groups)
        claim = f"a decoder trained on predicted embeddings draws predictions better, {name}"
        verdicts.append(Verdict(claim, _sign(difference), f"predicted - encoder: {difference}"))
    figure = _new_figure(11, 4)
    _draw_bars(figure.subplots(), by_arm)
    return lines, verdicts, {"scores": figure}


# --- figures ------------------------------------------------------------------------------------------------------


def _new_figure(width: float, height: float) -> Figure:
    # Not above: importing it looks for fonts and may write a list of them, and importing a module does nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_errors(trials: Mapping[str, Trials]) -> Figure:
    """A row for each task: teacher-forced and free-running MSE by position, a thin line for each seed."""
    tasks = _tasks(trials)
    figure = _new_figure(10, 3.6 * len(tasks))
    for row, task in zip(figure.subplots(len(tasks), 2, sharey="row", squeeze=False), tasks, strict=True):
        constant = _by_position(next(iter(trials.values())), task, "mean_embedding").mean(axis=0)
        places = np.arange(1, len(constant) + 1)
        for axes, mode in zip(row, MODES, strict=True):
            for (arm, of_arm), colour in zip(trials.items(), COLOURS, strict=False):
                by_seed = _by_position(of_arm, task, mode)
                axes.plot(places, by_seed.T, color=colour, linewidth=0.7, alpha=0.5)
                axes.plot(
                    places, by_seed.mean(axis=0), color=colour, linewidth=2.2, marker="o", markersize=4, label=arm
                )
            axes.plot(places, constant, color="grey", linestyle=":", label="always the mean embedding")
            axes.set(title=f"{task}, {MODE_NAMES[mode]}", xlabel="position in the image", yscale="log")
            axes.set_xticks(places)
            axes.grid(alpha=0.3, which="both")
        row[0].set_ylabel("MSE of the embedding")
        row[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _draw_scores_and_curves(result: Result) -> Figure:
    """The image loss on the way, and the scores by category."""
    figure = _new_figure(12, 4)
    curves, bars = figure.subplots(1, 2, width_ratios=(1, 1.6))
    for (arm, of_arm), colour in zip(result.trials.items(), COLOURS, strict=False):
        for number, trial in enumerate(of_arm):
            points = trial["training"]["curve"]
            steps, losses = [point["step"] for point in points], [point["mse"] for point in points]
            curves.plot(steps, losses, color=colour, linewidth=1, alpha=0.8, label=arm if number == 0 else None)
    curves.set(title=f"training, teacher-forced: MSE of {CURVE_EVERY} steps", xlabel="step", ylabel="MSE", yscale="log")
    curves.grid(alpha=0.3, which="both")
    curves.legend(fontsize=8)
    _draw_bars(bars, _pooled_of(result.trials))
    return figure


def _draw_bars(axes: Axes, by_arm: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    names = ["overall", *_categories()]
    places, width = np.arange(len(names)), 0.8 / len(by_arm)
    palette = (*COLOURS, "#edae49")
    for number, ((arm, scores), colour) in enumerate(zip(by_arm.items(), palette, strict=False)):
        cells = [_overall(scores), *(mean_of_groups_interval([scores[name]]) for name in _categories())]
        values = np.array([cell.value for cell in cells])
        bounds = np.array([[cell.low for cell in cells], [cell.high for cell in cells]])
        axes.bar(
            places + (number - (len(by_arm) - 1) / 2) * width,
            values,
            width,
            yerr=np.abs(bounds - values),
            color=colour,
            error_kw={"elinewidth": 0.8},
            label=arm,
        )
    axes.set(title="score on held-out prompts, 95 % intervals", ylim=(0, 1.02))
    axes.set_xticks(places, names, rotation=20)
    axes.grid(axis="y", alpha=0.3)
    # Below, where no bar can stand.
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(by_arm))
