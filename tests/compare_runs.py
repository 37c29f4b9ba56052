"""Compares losses and gradient norms of runs with those of the first one: for eight_gpus.sh.

    PYTHONPATH=. python tests/compare_runs.py FOLDER FOLDER...

The exit code is 1 if the relative error of a step is above a limit.
"""

import json
import sys
from pathlib import Path

from conftest import read_metrics

LIMITS = {
    "float32": {"loss": 1e-5, "grad_norm": 1e-5},
    "bfloat16": {"loss": 2e-3, "grad_norm": 1e-2},  # the order of additions differs
}


def main(first: str, *others: str) -> bool:
    """Prints a line for each other folder; returns whether all agree."""
    expected, agree = {record["step"]: record for record in read_metrics(first)}, True
    config = json.loads(Path(first, "config.json").read_text())
    limits = LIMITS[config["train_config"]["dtype"]]
    for folder in others:
        found = {record["step"]: record for record in read_metrics(folder)}
        if found.keys() != expected.keys():
            sys.exit(f"{folder}: steps {[*found]}, not {[*expected]}")
        line = f"{Path(folder).name:32}"
        for key, limit in limits.items():
            error = max(abs(found[step][key] / expected[step][key] - 1) for step in expected)
            agree &= error <= limit
            line += f"  {key} {error:.1e} {'ok' if error <= limit else 'FAILED'}"
        print(f"{line}  ({len(expected)} steps, against {Path(first).name})")
    return agree


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:]))
