"""Show what is quantized, in how many bytes, and what engines will make of it: of a student, or before there is one.

    sqakd inspect sqakd-output
    sqakd inspect timm/resnet18 --weight_bits 4 --activation_bits 4
    sqakd inspect me/student --json
    sqakd inspect sqakd-output --html report.html
    sqakd inspect me/model --weight_bits 4 --activation_bits 4 --sensitivity places.json --dataset photos

For a float model it is what the quantization arguments would make of it. Kernels of engines are told where
`pip install sqakd-hf[onnx]` was done. --html writes a page with all of it, what the student's training measured, the
codes of its weights and, where the same packages are, its speed on this machine. --sensitivity quantizes one place of
a float model at a time and tells which cost most on these images: the ones to keep high. Its file is written place by
place; the same command goes on from there.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .._validation import check_integer
from ..conversion.student import is_calibrated, quantized_layers
from ..data.dataset import load_image_data
from ..errors import InputError
from ..hub.loading import load_model
from ..hub.model_preprocessing import preprocessing
from ..reporting.html_report import html_report
from ..reporting.training_record import TrainingRecord, to_json
from ..search.sensitivity import SensitivityReport, sensitivity
from .quantization_arguments import QuantizationArguments, parse_with_quantization
from .students import expected_transform, student_or_plan


@dataclass
class InspectArguments:
    model: str = field(metadata={"help": "folder or Hub id of a student or a float model, or timm/NAME"})
    image_size: int | None = field(default=None, metadata={"help": "side in pixels; default: the model's own"})
    num_labels: int = field(default=1000, metadata={"help": "classes, of a model without weights at hand"})
    container: str = field(default="int8", metadata={"help": "int8 or packed, see sqakd export"})
    signed_activations: bool = field(default=False, metadata={"help": "of int8 activations, see sqakd export"})
    html: str | None = field(default=None, metadata={"help": "write a page for the browser to this file"})
    sensitivity: str | None = field(
        default=None,
        metadata={"help": "measure what each place of a float model costs, and write it to this JSON file"},
    )
    dataset: str | None = field(default=None, metadata={"help": "images for --sensitivity, as in sqakd distill"})
    max_images: int = field(default=128, metadata={"help": "so many images for --sensitivity"})
    json: bool = field(default=False, metadata={"help": "print JSON"})


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options, quantization, given = parse_with_quantization(InspectArguments, "sqakd inspect", __doc__, argv)
    path = None if options.html is None else _writable(options.html)
    report = None
    if options.sensitivity is not None:
        _writable(options.sensitivity)
        report = _sensitivity(options, quantization)
    student = student_or_plan(options.model, quantization, given, options.image_size, options.num_labels)
    record = TrainingRecord.load(options.model) if is_calibrated(student) else TrainingRecord()
    plan = student.quantization_plan
    deploy, latency, missing = None, None, ""
    try:
        from ..export import deploy_report, measure_latency
    except InputError as error:
        missing = f"Kernels of engines are not told. {error}"
    else:
        deploy = deploy_report(
            student,
            options.container,
            signed_activations=options.signed_activations,
            image_size=options.image_size,
        )
        if path is not None:
            latency = measure_latency(
                student,
                image_size=options.image_size,
                rounds=10,
                signed_activations=options.signed_activations,
            ).to_dict()
    facts = {"plan": plan.to_dict(), "deploy": None if deploy is None else deploy.to_dict()}
    if report is not None:
        facts["sensitivity"] = report.to_dict()
    if path is not None:
        name = os.path.basename(os.path.abspath(options.model)) if os.path.isdir(options.model) else options.model
        page = html_report(student, name, record, facts["deploy"], latency)
        path.write_text(page, encoding="utf-8")
    parts = [plan, missing or deploy, report]
    print(to_json(facts) if options.json else "\n\n".join(str(part) for part in parts if part is not None))
    if path is not None and not options.json:
        print(f"The report is in {path}.")


def _sensitivity(options: InspectArguments, quantization: QuantizationArguments) -> SensitivityReport:
    """Measure the places of the float model on images as it expects them."""
    if options.dataset is None:
        raise InputError("--sensitivity needs images: pass --dataset, a folder of them for example.")
    check_integer(options.max_images, "max_images", 1)
    model = load_model(options.model).eval()
    if quantized_layers(model):
        raise InputError(f"{options.model!r} is a student: --sensitivity is of the float model it was made of.")
    data = load_image_data(options.dataset, max_train_images=options.max_images)
    items = data.train.with_transform(expected_transform(preprocessing(model), options.image_size))
    images = torch.stack([items[number]["pixel_values"] for number in range(len(items))])
    return sensitivity(model, images, quantization.to_config(), progress_file=options.sensitivity)


def _writable(path: str) -> Path:
    """Return the path of a file that can be written; told before the work rather than after it."""
    file = Path(path)
    if not file.parent.is_dir():
        raise InputError(f"The folder {str(file.parent)!r} does not exist: make it, or choose another path.")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"{path!r} can't be written: choose another path.")
    return file
