"""A student's report: one HTML file that needs nothing else, for anybody's browser."""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import nn

from ..conversion.plan import LayerPlan, QuantizationPlan, bits_of
from ..conversion.student import is_calibrated, quantized_layers
from .tables import STAGES, image_count, plot_learning_curve, plot_trade_off, titled_rows
from .training_record import TrainingRecord


_STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 104rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.note { color: #777; margin: .3rem 0; }
figure { margin: 0; background: #fff; border-radius: 6px; max-width: 60rem; }
figure svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap; }
.n { text-align: right; }
.codes { display: block; color: #3572b0; } .codes path { fill: currentColor; }
.bar { display: inline-block; height: .6em; margin-right: .4em; background: #3572b0; }
.before { background: #b08035; }
.integer { color: #2a8f4d; } .float { color: #b3472d; }"""
_ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT"}
_MAX_DB = 60.0
Row = Sequence[str]


def html_report(
    model: nn.Module,
    name: str,
    record: TrainingRecord | None = None,
    deploy: Mapping[str, Any] | None = None,
    latency: Mapping[str, Any] | None = None,
) -> str:
    """Return a student's report as an HTML page: results, learning curve, accuracy against size and speed, layers.

    Nothing is loaded from elsewhere: no script, no font, no picture. What was not measured is said to be so.

    Args:
        model (`nn.Module`): The student, with a `quantization_plan`; without ranges it has no codes to show.
        name (`str`): Its name for people.
        record (`TrainingRecord`, *optional*): What its training measured.
        deploy (`Mapping`, *optional*): `DeployReport.to_dict()`.
        latency (`Mapping`, *optional*): `LatencyReport.to_dict()`.
    """
    plan: QuantizationPlan = model.quantization_plan
    record = record or TrainingRecord()
    quantizers = ", ".join(dict.fromkeys(layer.quantizer for layer in plan.quantized))
    title = f"{name}: {plan.bits()} by {quantizers}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(plan.summary())}; {escape(str(plan.coverage()))}</p>',
        "<h2>Results</h2>",
        _results(record.results, plan),
        "<h2>Learning curve</h2>",
        _learning_curve(record.log_history),
        "<h2>Accuracy against size and speed</h2>",
        _trade_off(record.results, plan, latency),
        "<h2>Layers</h2>",
        _layers(model, plan, record.layer_sqnr, deploy),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(head: Row, rows: Iterable[Row], numbers: int = 1) -> str:
    """Return a table of cells that are HTML; columns from `numbers` on are aligned to the right."""

    def line(tag: str, cells: Row) -> str:
        return "".join(f"<{tag}{' class=n' * (i >= numbers)}>{cell}</{tag}>" for i, cell in enumerate(cells))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{line("th", head)}</tr>\n{body}\n</table></div>'


def _results(results: Mapping[str, Mapping[str, Any]], plan: QuantizationPlan) -> str:
    if not results:
        return _note("Not measured by a training that is known here.")
    rows = []
    for key, title in titled_rows(results):
        row = results.get(key, {})
        shares = [_share(row.get(metric)) for metric in ("accuracy", "agreement")]
        divergence = "-" if row.get("kl") is None else f"{row['kl']:.4f}"
        size = plan.float_bytes() if key == "teacher" else plan.weight_bytes()
        rows.append((title, *shares, divergence, image_count(row), f"{size:,}"))
    head = ("", "accuracy", "agreement with the teacher", "KL divergence", "images", "bytes of weights")
    return _table(head, rows) + _note("- : not measured.")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _learning_curve(log_history: Sequence[Mapping[str, Any]]) -> str:
    if not any("loss" in log or "eval_loss" in log for log in log_history):
        return _note("No training is known here.")
    return _figure("Learning curve", lambda file: plot_learning_curve(log_history, file, format="svg"))


def _trade_off(
    results: Mapping[str, Mapping[str, Any]], plan: QuantizationPlan, latency: Mapping[str, Any] | None
) -> str:
    metric = next((name for name in ("accuracy", "agreement") if _measured(results, name)), None)
    if metric is None:
        return _latency_table(latency) if latency else _note("Neither accuracy nor speed is known here.")
    titles = dict(titled_rows(results))
    quality = {key: results[key][metric] for key in titles if results.get(key, {}).get(metric) is not None}
    sizes = [
        (title, plan.float_bytes() if key == "teacher" else plan.weight_bytes(), quality[key])
        for key, title in titles.items()
        if key in quality
    ]
    times = []
    for each in () if latency is None else latency["latencies"]:
        key = "teacher" if each["what"] == "float32" else "student"
        if key in quality:
            times.append((f"{each['engine']}, {each['what']}", each["milliseconds"], quality[key]))
    label = "accuracy" if metric == "accuracy" else "agreement with the teacher"
    figure = _figure(
        "Accuracy against size and speed", lambda file: plot_trade_off(sizes, times, label, file, format="svg")
    )
    if latency is None:
        return figure + _note("Speed was not measured: `sqakd inspect STUDENT --html FILE` does, with sqakd-hf[onnx].")
    return figure + _latency_table(latency)


def _measured(results: Mapping[str, Mapping[str, Any]], metric: str) -> bool:
    # The teacher agrees with itself, whatever was measured.
    return any(results.get(key, {}).get(metric) is not None for key in (*STAGES, "student"))


def _latency_table(latency: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{each['engine']}, {each['what']}",
            f"{each['milliseconds']:.2f}",
            f"{each['speed_up']:.2f} ± {each['spread']:.2f}",
        )
        for each in latency["latencies"]
    ]
    engines = ", ".join(f"{name} {number}" for name, number in latency["versions"].items())
    where = (
        f"{latency['image_size']} px, batch {latency['batch_size']}, {latency['threads']} thread(s); {engines}. ONNX "
        f"files: float32 {latency['float_bytes']:,} bytes, int8 {latency['file_bytes']:,}."
    )
    return _table(("", "ms for a batch", "speed-up"), rows) + _note(where)


def _figure(label: str, draw: Callable[[io.StringIO], None]) -> str:
    file = io.StringIO()
    draw(file)
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]  # without the declaration of an XML document
    return f'<figure role="img" aria-label="{escape(label)}">{drawing}</figure>'


def _layers(
    model: nn.Module,
    plan: QuantizationPlan,
    layer_sqnr: Mapping[str, Mapping[str, float]],
    deploy: Mapping[str, Any] | None,
) -> str:
    codes = _histograms(model)
    kernels = {} if deploy is None else {kernel["layer"]: kernel for kernel in deploy["kernels"]}
    stages = [stage for stage in (*STAGES, "student") if layer_sqnr.get(stage)]
    engines = _ENGINES if deploy is not None else {}
    reasons: dict[str, int] = {}
    rows = []
    for line in (*plan.layers, *plan.others, *plan.attention, *plan.residuals):
        cells = [escape(line.name), _bits_cell(line), f"{line.num_weights:,}" if line.num_weights else ""]
        cells += _codes_cells(codes.get(line.name) if line.weight_bits else None) if codes else ()
        # A residual's or attention's line can have a layer's name.
        own = line.weight_bits is not None
        cells += [_sqnr_cell(layer_sqnr[key].get(line.name) if own else None, key) for key in stages]
        cells += [_kernel_cell(kernels.get(line.name) if own else None, engine, reasons) for engine in engines]
        rows.append(cells)
    head = ["layer", "bits", "weights", *(("weight codes", "used", "entropy") if codes else ())]
    head += [f"SQNR {stage}" for stage in stages] + list(engines.values())
    notes = [_note(f"({number}) {reason}") for reason, number in reasons.items()]
    what = "Weight codes: how many weights have each code, from the lowest to the highest. Entropy: the least bits a "
    notes.append(_note(f"{what}weight that any coding of them needs." if codes else "The student has no ranges yet."))
    if stages:
        notes.append(
            _note(
                "SQNR of the student at each stage: the teacher's output of the layer against the student's "
                "difference from it, in dB; 20 dB are an error of a tenth. It holds what the layers before did. "
                "Training is free to find other features than the teacher's on the way to its logits: the last layer "
                "is the one that counts."
            )
        )
    else:
        notes.append(_note("The error of each layer (SQNR) was not measured by a training that is known here."))
    if deploy is not None:
        notes.append(_note(f"ONNX file ({deploy['container']}): {deploy['file_bytes']:,} bytes."))
    return _table(head, rows, numbers=len(head)) + "\n".join(notes)


def _bits_cell(line: LayerPlan) -> str:
    if line.skipped is not None:
        return f'<span class="float" title="{escape(line.skipped)}">float</span>'
    return bits_of(line) if line.weight_bits else f"A{line.activation_bits}"


def _histograms(model: nn.Module) -> dict[str, list[int]]:
    """Return for each quantized layer how many of its weights have each code."""
    if not is_calibrated(model):
        return {}
    return {
        name: torch.bincount(layer.weight_codes().flatten(), minlength=layer.weight_quantizer.levels).tolist()
        for name, layer in quantized_layers(model).items()
    }


def _codes_cells(counts: list[int] | None) -> Row:
    """Return a drawing of the counts, how many codes are used, and their entropy."""
    if not counts:
        return "", "", ""
    width, height, most, total = 160, 22, max(counts), sum(counts)
    step = width / len(counts)
    gap = step / 8 if len(counts) <= 16 else 0
    bars = "".join(
        f"M{i * step:.1f} {height}v-{count / most * height:.1f}h{step - gap:.2f}v{count / most * height:.1f}z"
        for i, count in enumerate(counts)
        if count
    )
    drawing = (
        f'<svg class="codes" width="{width}" height="{height}" role="img" aria-label="weight codes">'
        f'<path d="{bars}"/></svg>'
    )
    shares = [count / total for count in counts if count]
    entropy = -sum(share * math.log2(share) for share in shares) + 0.0  # not -0.00
    return drawing, f"{len(shares)} of {len(counts)}", f"{entropy:.2f}"


def _sqnr_cell(value: float | None, key: str) -> str:
    if value is None:
        return ""
    width = 6 * min(max(value, 0.0), _MAX_DB) / _MAX_DB
    kind = "bar before" if key in STAGES else "bar"
    return f'<span class="{kind}" style="width:{width:.2f}em"></span>{value:.1f} dB'


def _kernel_cell(kernel: Mapping[str, Any] | None, engine: str, reasons: dict[str, int]) -> str:
    if kernel is None:
        return ""
    reason = kernel[engine]
    if reason is None:
        return '<span class="integer">integer</span>'
    number = reasons.setdefault(reason, len(reasons) + 1)
    return f'<span class="float" title="{escape(reason)}">float ({number})</span>'
