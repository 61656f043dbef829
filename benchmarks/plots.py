"""Plots of the rows that reproduction.py trained: accuracy against bits, and learning curves.

python benchmarks/plots.py          # writes accuracy.png and curves.png beside the rows
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from reproduction import BITS, LABELS, OBJECTIVES, QUANTIZERS, SQAKD, found, grid
from rows import Rows


# Colours that people with any colour vision can tell apart (Okabe and Ito), and a mark of their own for each.
STYLES = {"SQAKD": ("#0072B2", "o"), "labelled QAT": ("#D55E00", "s"), "CE + KL": ("#009E73", "^")}


def accuracy(rows: Rows) -> Figure:
    """Return accuracy against bits: a panel for each quantizer, a line for each objective, the teacher dashed."""
    table, widths = grid(), BITS
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, quantizer in zip(figure.subplots(1, len(QUANTIZERS), sharey=True), QUANTIZERS, strict=True):
        teachers = [
            100 * result["teacher"]["accuracy"]
            for bits in widths
            for result in found(rows, table[f"W{bits}A{bits}", quantizer, OBJECTIVES[SQAKD]])
        ]
        if teachers:
            axes.axhline(statistics.mean(teachers), color="0.4", linestyle="--", label="teacher")
        for title, (color, mark) in STYLES.items():
            points = [(bits, _accuracies(rows, table[f"W{bits}A{bits}", quantizer, title])) for bits in widths]
            points = [(bits, values) for bits, values in points if values]
            axes.errorbar(
                [widths.index(bits) for bits, _ in points],
                [statistics.mean(values) for _, values in points],
                [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points],
                color=color,
                marker=mark,
                capsize=3,
                label=title,
            )
        axes.set_title(quantizer)
        axes.set_xticks(range(len(widths)), [f"W{bits}A{bits}" for bits in widths])
        axes.set_xlim(-0.3, len(widths) - 0.7)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy on test images, %")
    figure.axes[0].legend(loc="lower right")
    return figure


def curves(rows: Rows) -> Figure:
    """Return agreement with the teacher while training: a panel for each width, mean over the seeds, LSQ."""
    table, widths = grid(), BITS
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, bits in zip(figure.subplots(1, len(widths)), widths, strict=True):
        for title in (OBJECTIVES[SQAKD], OBJECTIVES[LABELS]):
            runs = [result["curve"] for result in found(rows, table[f"W{bits}A{bits}", "lsq", title])]
            color, _ = STYLES[title]
            if runs:
                steps = [entry["step"] for entry in runs[0]]
                means = [100 * statistics.mean(entry["agreement"] for entry in at) for at in zip(*runs, strict=True)]
                axes.plot(steps, means, color=color, label=f"{title} ({len(runs)} seeds)")
        axes.set_title(f"W{bits}A{bits}")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="lower right")
    figure.axes[0].set_ylabel("agreement in training, %")
    return figure


def _accuracies(rows: Rows, wanted: Any) -> list[float]:
    return [100 * result["student"]["accuracy"] for result in found(rows, wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "reproduction")
    options = parser.parse_args()
    rows = Rows(options.rows)
    for draw in (accuracy, curves):
        path = options.rows / f"{draw.__name__}.png"
        draw(rows).savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main()
