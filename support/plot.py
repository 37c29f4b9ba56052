"""Draws the losses of runs: `python -m support.plot`."""

import argparse
import json
import math
import os
import sys
from types import ModuleType
from typing import Any

MOST_CURVES = 6


def import_pyplot() -> ModuleType:
    """Returns matplotlib.pyplot, set to draw into files. Raises ValueError if it is missing."""
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ValueError(f"{error}; to draw, `pip install matplotlib`") from None
    matplotlib.use("Agg")
    return matplotlib.pyplot


def read_records(run: str) -> list[dict[str, Any]]:
    """Returns the steps in a run's metrics.jsonl. Raises ValueError if there is none, or damage."""
    path = os.path.abspath(os.path.join(run, "metrics.jsonl"))
    if not os.path.exists(path):
        raise ValueError(f"RUN={run!r} is not a run's output_dir: there is no {path}")
    with open(path) as file:
        lines = file.readlines()
    try:
        return [r | {"step": r["step"], "loss": r["loss"]} for r in map(json.loads, lines)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run}/metrics.jsonl is damaged ({error!r}); resume the run") from None


def name_of(run: str) -> str:
    return os.path.basename(os.path.normpath(run))


def plot(runs: list[str], output: str) -> None:
    """Draws each run's loss over its steps, and the loss of its evaluations as dots."""
    plt = import_pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for run in runs:
        records = [record for record in read_records(run) if record["loss"] is not None]
        if not records:
            raise ValueError(f"{run}: its metrics.jsonl has no step yet")
        axes.plot(
            [record["step"] for record in records],
            [record["loss"] for record in records],
            label=f"{name_of(run)} ({records[-1]['loss']:.2f})",
            linewidth=1.2,
        )
        evaluated = [record for record in records if record.get("eval_loss") is not None]
        axes.plot(
            [record["step"] for record in evaluated],
            [record["eval_loss"] for record in evaluated],
            "o",
            color=axes.lines[-1].get_color(),
            markeredgecolor="black",
            markersize=5,
            label=f"held out ({evaluated[-1]['eval_loss']:.2f})" if evaluated else None,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per label")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="run (last loss)")
    figure.savefig(output, dpi=150)
    print(f"written: {output}")


def last_evaluation(run: str) -> tuple[dict[int, float], dict[int, int], float]:
    """Returns the losses and the numbers of labels of a run's last evaluation, by position, and its
    mean loss.
    """
    for record in reversed(read_records(run)):
        losses, labels = (record.get(f"eval_{x}_by_position", {}) for x in ("loss", "labels"))
        losses = {int(end): loss for end, loss in losses.items() if loss is not None}
        if losses:
            return losses, {int(e): count for e, count in labels.items()}, record["eval_loss"]
    raise ValueError(
        f"{run}: its metrics.jsonl has no loss by position; a run with train_config.eval_interval "
        f"writes it, and `python main.py --evaluate` prints it for a checkpoint"
    )


def plot_by_position(runs: list[str], output: str) -> None:
    """Draws the loss of each run's last evaluation over the position in the document, and below
    it the number of labels. A dotted line is the mean over all labels. The frame fits the last ten
    ranges of positions: the loss of the first ones is so high that the others would look flat.
    """
    plt = import_pyplot()
    if len(runs) > MOST_CURVES:
        raise ValueError(
            f"--by-position draws at most {MOST_CURVES} runs, not {len(runs)}; leave some out"
        )
    figure, (axes, below) = plt.subplots(
        *(2, 1), figsize=(7, 5), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    found = [last_evaluation(run) for run in runs]
    longest = max(max(losses) for losses, *_ in found)
    ends, in_frame, width = [], [], 0.8 / len(runs)
    for i, (losses, labels, mean) in enumerate(found):
        in_frame += [loss for end, loss in losses.items() if end * 2**10 > longest]
        places = [math.log2(end) for end in losses]
        axes.plot(places, list(losses.values()), "o-", color=f"C{i}", linewidth=1.2, markersize=4)
        places = [math.log2(end) + (i - (len(runs) - 1) / 2) * width for end in labels]
        below.bar(places, list(labels.values()), width, color=f"C{i}")
        axes.axhline(mean, color=f"C{i}", linestyle=":", linewidth=1.2)
        ends.append((mean, i))
    margin = 0.1 * (max(in_frame) - min(in_frame)) or 0.1
    low, high = axes.set_ylim(min(in_frame) - margin, max(in_frame) + margin)
    height = -1.0  # of the last name, as a share of the axes
    for mean, i in sorted(ends):
        height = max((mean - low) / (high - low), height + 0.07)
        label = f"{name_of(runs[i])} ({mean:.2f})"
        axes.text(1.02, height, label, transform=axes.transAxes, color=f"C{i}", va="center")
    ticks = range(1, longest.bit_length())
    below.set_xticks(ticks, [f"{2**tick:,}" for tick in ticks], rotation=30)
    below.set(yscale="log", ylabel="labels", xlabel="position in the document, up to")
    axes.set(ylabel="held-out loss, nats per label", title="run (loss over all positions, dotted)")
    for part in (axes, below):
        part.set_axisbelow(True)
        part.grid(alpha=0.3)
        part.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)
    print(f"written: {output}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m support.plot",
        description="Draws the losses of runs (folders with a metrics.jsonl) in one picture.",
    )
    parser.add_argument("runs", nargs="+", type=os.path.expanduser, metavar="RUN")
    parser.add_argument(
        "--by-position",
        action="store_true",
        help="the last evaluation's loss over the position in the document, instead of the steps",
    )
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        help="loss.png, or loss_by_position.png",
    )
    options = parser.parse_args()
    try:
        if options.by_position:
            plot_by_position(options.runs, options.output or "loss_by_position.png")
        else:
            plot(options.runs, options.output or "loss.png")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
