"""What a person sees at the end of a run: the table of results and the plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .._text import text_table
from ..conversion.plan import QuantizationPlan


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# What a run compares, and how people read it.
STAGES = ("calibrated", "reconstructed")  # of a student, before its training
ROWS = {
    "teacher": "teacher",
    **{stage: f"{stage} only" for stage in STAGES},
    "student": "distilled student",
}


def kept_stage(results: Mapping[str, Mapping[str, Any]] | None) -> str | None:
    """Return which of the stages before a training the student is of, `None` for a trained one."""
    stage = ((results or {}).get("student") or {}).get("stage")
    return stage if stage in STAGES else None


def titled_rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what a run compared, and what people call it."""
    kept = kept_stage(results)
    rows = {key: title for key, title in ROWS.items() if key != "reconstructed" or key in results}
    if kept is not None:
        rows["student"] = f"student, as {kept}"
    return list(rows.items())


def image_count(row: Mapping[str, Any]) -> str:
    """Return how many images a row was measured on, and which, as `"359 (test)"`."""
    if not row.get("images"):
        return "-"
    return f"{row['images']:,}" + (f" ({row['set']})" if row.get("set") else "")


def results_table(results: Mapping[str, Mapping[str, float | None]], plan: QuantizationPlan) -> str:
    """Return teacher, the student's stages and the student side by side, as text.

    Args:
        results (`Mapping`): `teacher`, `calibrated`, `reconstructed` (where it was) and `student`, each with
            `accuracy`, `agreement` (shares in [0, 1]) and `kl` (at temperature 1); a value that was not measured is
            `None`. The student's `stage` says which one it is, if it is not trained.
        plan (`QuantizationPlan`): The student's plan, for its bits and the bytes of its weights.
    """
    rows = [("", "accuracy", "agreement", "KL", "bits", "weight bytes")]
    for key, title in titled_rows(results):
        bits, size = ("float", plan.float_bytes()) if key == "teacher" else (plan.bits(), plan.weight_bytes())
        metrics = results[key]
        shares = [_cell(metrics[name], "{:.2%}") for name in ("accuracy", "agreement")]
        rows.append((title, *shares, _cell(metrics["kl"], "{:.4f}"), bits, f"{size:,}"))
    lines = text_table(rows, right=True)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def plot_learning_curve(
    log_history: Sequence[Mapping[str, Any]], path: str | Path | IO, title: str = "", format: str = "png"
) -> None:
    """Draw the divergence and the agreement of student and teacher over training from a Trainer's `log_history`."""
    figure, panels = _figure(title)
    titles = ("KL divergence from the teacher (T² · KL)", "agreement with the teacher's top-1")
    for axes, name, label in zip(panels, ("loss", "agreement"), titles, strict=True):
        for prefix, legend, style in (("", "training images", "-"), ("eval_", "held-out images", "o-")):
            points = [
                (log["epoch"], log[prefix + name])
                for log in log_history
                if log.get("epoch") is not None and log.get(prefix + name) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=legend, markersize=4)
        axes.set_xlabel("epoch")
        axes.set_title(label, fontsize=10)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.axes[0].set_ylim(bottom=0)
    _save(figure, path, format)


Points = Sequence[tuple[str, float, float]]


def plot_trade_off(
    sizes: Points, times: Points, quality: str, path: str | Path | IO, title: str = "", format: str = "png"
) -> None:
    """Draw quality against size and against time; up and to the left is better.

    Args:
        sizes (sequence of `(name, bytes, quality)`): Qualities are shares in [0, 1].
        times (sequence of `(name, milliseconds, quality)`): May be empty.
        quality (`str`): What the quality is.
        path (`str`, `Path` or a file): Where it goes.
        title (`str`, *optional*): Above both.
        format (`str`, *optional*, defaults to `"png"`): As matplotlib knows it.
    """
    figure, panels = _figure(title)
    megabytes = [(name, size / 1e6, share) for name, size, share in sizes]
    for axes, points, label in zip(panels, (megabytes, times), ("MB of weights", "ms for a batch"), strict=True):
        for number, (name, x, y) in enumerate(points):
            axes.plot([x], [100 * y], "osD^vP*X"[number % 8], label=name, markersize=7)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{quality}, %")
        if points:
            axes.set_xscale("log")
            axes.legend(fontsize=8)
            axes.margins(0.15)
    if not times:
        panels[1].text(0.5, 0.5, "not measured", ha="center", va="center", transform=panels[1].transAxes)
    _save(figure, path, format)


def _figure(title: str) -> tuple["Figure", Sequence["Axes"]]:
    """Return a figure of two panels. Not by pyplot: no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure, panels


def _save(figure: "Figure", path: str | Path | IO, format: str) -> None:
    from matplotlib import rc_context

    # Text stays text in an SVG, two reports of one student are the same, and two figures of one page share no id.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.axes[0].get_xlabel()}):
        figure.savefig(path, dpi=120, format=format, metadata={"Date": None} if format == "svg" else None)
