"""Write a student to an ONNX file that computes with the same integers.

    sqakd export sqakd-output student.onnx
    sqakd export me/student student.onnx --container packed --json

The file is compared with the student first, layer by layer; on a mismatch none is written. Needs
`pip install sqakd-hf[onnx]`.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from ..export import export_onnx
from ..reporting.training_record import to_json
from .students import load_student


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "sqakd export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", help="folder or Hub id of a saved student")
    parser.add_argument("path", help="the file to write")
    parser.add_argument("--container", default="int8", help="int8 (default), or packed: weights of 2 and 4 bits")
    parser.add_argument("--signed_activations", action="store_true", help="int8 activations, as TensorRT wants them")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the student's own")
    parser.add_argument("--dynamic_image_size", action="store_true", help="take images of any size")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(argv)
    report = export_onnx(
        load_student(options.student),
        options.path,
        options.container,
        signed_activations=options.signed_activations,
        image_size=options.image_size,
        dynamic_image_size=options.dynamic_image_size,
    )
    facts = {**dataclasses.asdict(report), "path": str(report.path)}
    print(to_json(facts) if options.json else report)
