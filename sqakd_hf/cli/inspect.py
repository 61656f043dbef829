"""Show what is quantized, in how many bytes, and what engines will make of it: of a student, or before there is one.

    sqakd inspect sqakd-output
    sqakd inspect timm/resnet18 --weight_bits 4 --activation_bits 4 --residual_bits 8
    sqakd inspect me/student --json

For a float model it is what the quantization arguments would make of it. Kernels of engines are told where
`pip install sqakd-hf[onnx]` was done.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import InputError
from .quantization_arguments import parse_with_quantization
from .students import student_or_plan


@dataclass
class InspectArguments:
    model: str = field(metadata={"help": "folder or Hub id of a student or a float model, or timm/NAME"})
    image_size: int | None = field(default=None, metadata={"help": "side in pixels; default: the model's own"})
    num_labels: int = field(default=1000, metadata={"help": "classes, of a model without weights at hand"})
    container: str = field(default="int8", metadata={"help": "int8 or packed, see sqakd export"})
    json: bool = field(default=False, metadata={"help": "print JSON"})


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options, quantization = parse_with_quantization(InspectArguments, "sqakd inspect", __doc__, argv)
    student = student_or_plan(options.model, quantization.to_config(), options.image_size, options.num_labels)
    plan = student.quantization_plan
    deploy, missing = None, ""
    try:
        from ..export import deploy_report
    except InputError as error:
        missing = f"Kernels of engines are not told. {error}"
    else:
        deploy = deploy_report(student, options.container, image_size=options.image_size)
    if options.json:
        print(json.dumps({"plan": plan.to_dict(), "deploy": None if deploy is None else deploy.to_dict()}, indent=2))
        return
    print(f"{plan}\n\n{missing or deploy}")
