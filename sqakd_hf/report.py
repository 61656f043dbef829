"""What a person sees at the end of a run: the table of results and the learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plan import QuantizationPlan


# What a run compares, and how people read it.
ROWS = (("teacher", "teacher"), ("calibrated", "calibrated only"), ("student", "distilled student"))


def results_table(results: Mapping[str, Mapping[str, float | None]], plan: QuantizationPlan) -> str:
    """Return teacher, calibrated and distilled student side by side, as text.

    Args:
        results (`Mapping`): `teacher`, `calibrated` and `student`, each with `accuracy`, `agreement` (shares in
            [0, 1]) and `kl`; a value that was not measured is `None`.
        plan (`QuantizationPlan`): The student's plan, for its bits and the bytes of its weights.
    """
    float_bytes = sum(layer.num_weights * 4 for layer in plan)
    rows = [("", "accuracy", "agreement", "KL", "bits", "weight bytes")]
    for key, title in ROWS:
        bits, size = ("float", float_bytes) if key == "teacher" else (plan.bits(), plan.weight_bytes())
        metrics = results[key]
        shares = [_cell(metrics[name], "{:.2%}") for name in ("accuracy", "agreement")]
        rows.append((title, *shares, _cell(metrics["kl"], "{:.4f}"), bits, f"{size:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def plot_learning_curve(log_history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw the divergence and the agreement of student and teacher over training from a Trainer's `log_history`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: no global state, no display.
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, label in zip(
        figure.subplots(1, 2),
        ("loss", "agreement"),
        ("KL divergence from the teacher (T² · KL)", "agreement with the teacher's top-1"),
        strict=True,
    ):
        for prefix, legend, style in (("", "training images", "-"), ("eval_", "held-out images", "o-")):
            points = [(log["epoch"], log[prefix + name]) for log in log_history if prefix + name in log]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=legend, markersize=4)
        axes.set_xlabel("epoch")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.axes[0].set_ylim(bottom=0)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
