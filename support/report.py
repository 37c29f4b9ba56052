"""The tables and the plot of benchmark.py's results."""

import sys

from .plot import import_pyplot


def newest_series(results: list[dict], field: str, series: str | None) -> list[dict]:
    """Returns the lines with this field of a series, or of the newest, on the machine of its last.

    Raises ValueError if there is none.
    """
    lines = [r for r in results if field in r and "series" in r]
    lines = [r for r in lines if series in (None, r["series"])]
    if not lines:
        raise ValueError(f"no results with a {field!r} in {series or 'any series'}; measure some")
    newest = lines[-1]["series"], lines[-1]["machine"]["device"]
    return [r for r in lines if (r["series"], r["machine"]["device"]) == newest]


def by_case(results: list[dict]) -> dict[str, dict[str, dict]]:
    """Returns {case: {backend: its last result}}."""
    found = {}
    for result in results:
        found.setdefault(result["case"], {})[result["backend"].split()[0]] = result
    return found


def table(results: list[dict]) -> str:
    """Returns the results in Markdown, a row a case."""
    backends = list(dict.fromkeys(result["backend"].split()[0] for result in results))
    lines = [
        "| case | " + " | ".join(f"{name}, tokens/s | memory" for name in backends) + " |",
        "| --- " * (1 + 2 * len(backends)) + "|",
    ]
    for case, found in by_case(results).items():
        cells = [case]
        peer = found.get("torchtitan", {}).get("tokens_per_s")
        for name in backends:
            if not (result := found.get(name)):
                cells += ["", ""]
                continue
            low, high = result["tokens_per_s_range"]
            ratio = (
                f", {result['tokens_per_s'] / peer:.2f}" if peer and name != "torchtitan" else ""
            )
            cells.append(f"{result['tokens_per_s']:,.0f} ({low:,.0f} to {high:,.0f}){ratio}")
            cells.append(f"{result['peak_memory_gib']:.1f} GiB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kernels_table(results: list[dict]) -> str:
    """Returns TFLOP/s in Markdown: a row a mask, forward / forward and backward."""
    columns = list(dict.fromkeys((r["head_dim"], r["kernel"]) for r in results))
    found = {(r["mask"], r["head_dim"], r["kernel"]): r for r in results}
    lines = [
        "| mask | " + " | ".join(f"head_dim {hd}: {kernel}" for hd, kernel in columns) + " |",
        "| --- " * (1 + len(columns)) + "|",
    ]
    for mask in dict.fromkeys(r["mask"] for r in results):
        cells = [found.get((mask, *column)) for column in columns]
        shown = [f"{r['forward_tflops']:.0f} / {r['both_tflops']:.0f}" if r else "" for r in cells]
        lines.append(f"| {mask} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(results: list[dict], plot: str) -> None:
    """Draws a group of bars for each case: tokens/s of each backend, relative to torchtitan's.

    Cases that torchtitan did not run are left out, unless it ran none.
    """
    plt = import_pyplot()
    cases, peer = by_case(results), "torchtitan"
    if any(len(found) > 1 and peer in found for found in cases.values()):
        cases = {case: found for case, found in cases.items() if len(found) > 1 and peer in found}
    else:
        peer = results[0]["backend"]
    backends = list(dict.fromkeys(name for found in cases.values() for name in found))
    colors = dict(zip(backends, ("#1b6ca8", "#79b4d9", "#bbbbbb"), strict=False))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.7 * len(cases)), layout="constrained")
    height = 0.8 / len(backends)
    for row, found in enumerate(cases.values()):
        base = found.get(peer, next(iter(found.values())))["tokens_per_s"]
        for i, (name, result) in enumerate(found.items()):
            speed, y = result["tokens_per_s"], row + (i - (len(found) - 1) / 2) * height
            axes.barh(y, speed / base, height, color=colors[name])
            label = f"{speed / 1e3:,.1f}k" + (f"  {name}" if row == 0 else "")
            axes.text(speed / base + 0.01, y, label, va="center")
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens/s relative to {peer}; absolute at the bars")
    axes.set_title(results[-1]["machine"]["device"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.14)
    figure.savefig(plot, dpi=150)


def report(results: list[dict], plot: str, order: list[str], series: str | None = None) -> None:
    """Prints the tables of a series, or of the newest ones, and draws its plot. order: of cases."""
    places = {case: place for place, case in enumerate(order)}
    cases = newest_series(results, "case", series)
    cases.sort(key=lambda result: places.get(result["case"], len(places)))
    print(table(cases))
    draw(cases, plot)
    print("\n" + kernels_table(newest_series(results, "kernel", series)))
    print(f"written: {plot}", file=sys.stderr)  # stdout has only the tables
