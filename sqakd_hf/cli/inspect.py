"""Show what is quantized, in how many bytes, and what engines will make of it: of a student, or before there is one.

    sqakd inspect sqakd-output
    sqakd inspect timm/resnet18 --weight_bits 4 --activation_bits 4 --residual_bits 8
    sqakd inspect me/student --json
    sqakd inspect sqakd-output --html report.html

For a float model it is what the quantization arguments would make of it. Kernels of engines are told where
`pip install sqakd-hf[onnx]` was done. --html writes a page with all of it, what the student's training measured, the
codes of its weights and, where the same packages are, its speed on this machine.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..conversion.student import is_calibrated
from ..errors import InputError
from ..reporting.html_report import html_report
from ..reporting.training_record import TrainingRecord, to_json
from .quantization_arguments import parse_with_quantization
from .students import student_or_plan


@dataclass
class InspectArguments:
    model: str = field(metadata={"help": "folder or Hub id of a student or a float model, or timm/NAME"})
    image_size: int | None = field(default=None, metadata={"help": "side in pixels; default: the model's own"})
    num_labels: int = field(default=1000, metadata={"help": "classes, of a model without weights at hand"})
    container: str = field(default="int8", metadata={"help": "int8 or packed, see sqakd export"})
    signed_activations: bool = field(default=False, metadata={"help": "of int8 activations, see sqakd export"})
    html: str | None = field(default=None, metadata={"help": "write a page for the browser to this file"})
    json: bool = field(default=False, metadata={"help": "print JSON"})


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options, quantization, given = parse_with_quantization(InspectArguments, "sqakd inspect", __doc__, argv)
    path = None if options.html is None else _writable(options.html)
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
    if path is not None:
        name = os.path.basename(os.path.abspath(options.model)) if os.path.isdir(options.model) else options.model
        page = html_report(student, name, record, facts["deploy"], latency)
        path.write_text(page, encoding="utf-8")
    print(to_json(facts) if options.json else f"{plan}\n\n{missing or deploy}")
    if path is not None and not options.json:
        print(f"The report is in {path}.")


def _writable(path: str) -> Path:
    """Return the path of a file that can be written; told before the work rather than after it."""
    file = Path(path)
    if not file.parent.is_dir():
        raise InputError(f"The folder {str(file.parent)!r} does not exist: make it, or choose another path.")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"{path!r} can't be written: choose another path.")
    return file
