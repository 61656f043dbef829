"""Time the float network, its student and the student's exported file side by side, on this machine's processor.

    sqakd benchmark sqakd-output
    sqakd benchmark timm/resnet18 --weight_bits 4 --activation_bits 4 --residual_bits 8 --threads 1
    sqakd benchmark me/student --batch_size 32 --json

For a float model it is what the quantization arguments would make of it: times do not depend on the training. Needs
`pip install sqakd-hf[onnx]`; OpenVINO is measured where `pip install sqakd-hf[openvino]` was done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..export import measure_latency
from ..reporting.training_record import to_json
from .quantization_arguments import parse_with_quantization
from .students import student_or_plan


@dataclass
class BenchmarkArguments:
    model: str = field(metadata={"help": "folder or Hub id of a student or a float model, or timm/NAME"})
    image_size: int | None = field(default=None, metadata={"help": "side in pixels; default: the model's own"})
    num_labels: int = field(default=1000, metadata={"help": "classes, of a model without weights at hand"})
    batch_size: int = field(default=1, metadata={"help": "images in a batch"})
    threads: int = field(default=1, metadata={"help": "threads of each engine"})
    rounds: int = field(default=20, metadata={"help": "so many times all variants run in turn"})
    signed_activations: bool = field(default=False, metadata={"help": "of int8 activations, see sqakd export"})
    json: bool = field(default=False, metadata={"help": "print JSON"})


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options, quantization, given = parse_with_quantization(BenchmarkArguments, "sqakd benchmark", __doc__, argv)
    report = measure_latency(
        student_or_plan(options.model, quantization, given, options.image_size, options.num_labels),
        image_size=options.image_size,
        batch_size=options.batch_size,
        threads=options.threads,
        rounds=options.rounds,
        signed_activations=options.signed_activations,
    )
    print(to_json(report.to_dict()) if options.json else report)
