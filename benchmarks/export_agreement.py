"""Trained students and their ONNX files: do they name the same classes, and how accurate are they?

    pip install -e ".[onnx]"
    python benchmarks/export_agreement.py

Fashion-MNIST, test_resnet at 28 px: the teacher of reproduction.py (seed 0), students of `--epochs` epochs, all 10,000
test images. `layers` are codes that differ where each layer computes on the student's codes, with ONNX Runtime's
optimisations off; `agreement` is by the whole file with all of them on, as it is used.
"""

import argparse
import copy
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch
from measure import machine
from rows import Row, Rows, common, images_of
from transformers import PrinterCallback

from sqakd_hf import (
    QuantizationConfig,
    SQAKDTrainer,
    SQAKDTrainingArguments,
    export_onnx,
    quantize_model,
    verify_export,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantizers", nargs="+", default=["lsq", "ewgs"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    lines = [
        f"{machine()}, onnxruntime {onnxruntime.__version__}\n",
        "| | residuals | accuracy, PyTorch | ONNX Runtime | agreement | layers: codes that differ | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    row = Row("lsq", 4, "kl", 0)
    data = images_of(row.seed, row.images)
    teacher = Rows(Path("outputs")).teacher(row)
    train = data.train("crop-flip")
    images = torch.stack([item["pixel_values"] for item in data.test.items])
    labels = np.array([item["labels"] for item in data.test.items])
    for quantizer in options.quantizers:
        for bits in options.bits:
            for residual_bits in (None, 8):
                student = copy.deepcopy(teacher)
                config = QuantizationConfig(
                    quantizer, weight_bits=bits, activation_bits=bits, residual_bits=residual_bits
                )
                quantize_model(student, config)
                args = SQAKDTrainingArguments(
                    output_dir="outputs/export_agreement",
                    num_train_epochs=options.epochs,
                    learning_rate=3e-3,
                    **common(row.seed),
                )
                trainer = SQAKDTrainer(student, teacher, args, train)
                trainer.remove_callback(PrinterCallback)
                trainer.train()
                cells = compare(student.eval(), images, labels)
                where = "float" if residual_bits is None else f"{residual_bits} bits"
                lines.append(f"| {quantizer} W{bits}A{bits} | {where} | {' | '.join(cells)} |")
    print("\n".join(lines))


@torch.no_grad()
def compare(student: torch.nn.Module, images: torch.Tensor, labels: np.ndarray) -> list[str]:
    """Return the cells of one student's line."""
    expected = torch.cat([student(batch).logits for batch in images.split(250)]).argmax(1).numpy()
    with TemporaryDirectory() as folder:
        report = export_onnx(student, Path(folder) / "student.onnx", images=images[:32])
        check = verify_export(student, report.path, images[:500])
        session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        found = np.concatenate([session.run(None, {"pixel_values": b.numpy()})[0] for b in images.split(250)]).argmax(
            1
        )
        return [
            f"{100 * (expected == labels).mean():.2f} %",
            f"{100 * (found == labels).mean():.2f} %",
            f"{100 * (found == expected).mean():.2f} %",
            f"{sum(check.differing.values())} of {check.codes:,}",
            f"{report.file_bytes:,}",
        ]


if __name__ == "__main__":
    main()
