"""Draws the losses of runs: `python -m support.metrics`."""

import argparse
import json
import os
import sys
from types import ModuleType


def import_pyplot() -> ModuleType:
    """Returns matplotlib.pyplot, set to draw into files. Raises ValueError if it is missing."""
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ValueError(f"{error}; to draw, `pip install matplotlib`") from None
    matplotlib.use("Agg")
    return matplotlib.pyplot


def plot(runs: list[str], output: str) -> None:
    """Draws each run's loss over its steps, and the loss of its evaluations as dots."""
    plt = import_pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for run in runs:
        path = os.path.abspath(os.path.join(run, "metrics.jsonl"))
        if not os.path.exists(path):
            raise ValueError(f"RUN={run!r} is not a run's output_dir: there is no {path}")
        with open(path) as file:
            lines = file.readlines()
        try:
            records = [r for r in map(json.loads, lines) if r["loss"] is not None]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{run}/metrics.jsonl is damaged ({error!r}); resume the run"
            ) from None
        if not records:
            raise ValueError(f"{run}: its metrics.jsonl has no step yet")
        axes.plot(
            [record["step"] for record in records],
            [record["loss"] for record in records],
            label=f"{os.path.basename(os.path.normpath(run))} ({records[-1]['loss']:.2f})",
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m support.metrics",
        description="Draws the losses of runs (folders with a metrics.jsonl) in one picture.",
    )
    parser.add_argument("runs", nargs="+", type=os.path.expanduser, metavar="RUN")
    parser.add_argument("--output", type=os.path.expanduser, default="loss.png")
    options = parser.parse_args()
    try:
        plot(options.runs, options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
