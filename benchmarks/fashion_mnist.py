"""Accuracy of students on Fashion-MNIST, by quantizer and bits, over several seeds.

    python benchmarks/fashion_mnist.py --output benchmarks/fashion_mnist

Each row is one run of examples/run_sqakd.py on 10,000 training and 2,000 test images: 6 epochs for the teacher, with
labels, then 3 epochs of distillation, without. No image is held out and the last checkpoint counts, so nothing is
selected on the test images. A row whose results exist is not run again: an interrupted benchmark goes on where it was.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch


SCRIPT = Path(__file__).parents[1] / "examples" / "run_sqakd.py"
COMMON = "--dataset fashion_mnist --image_size 28 --max_train_images 10000 --max_test_images 2000 --disable_tqdm true"
STUDENT = "--num_train_epochs 3 --learning_rate 3e-3 --validation_fraction 0 --save_strategy no"


def run(folder: Path, arguments: str) -> dict:
    """Run the example once, or read what it wrote before."""
    results = folder / "results.json"
    if not results.exists():
        command = [sys.executable, str(SCRIPT), *f"{COMMON} {STUDENT} {arguments}".split()]
        command += ["--output_dir", str(folder), "--overwrite_output_dir"]
        with open(folder.with_suffix(".log"), "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(results.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/fashion_mnist"))
    parser.add_argument("--model", default="timm/test_resnet")
    parser.add_argument("--quantizers", nargs="+", default=["lsq", "ewgs", "lsq+", "pact", "dorefa"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=["float32", "bf16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    rows: dict[tuple[str, ...], list[dict]] = {}
    # The first row of a seed trains its teacher, in float32, the others distil from the same one.
    grid = list(itertools.product(options.bits, options.quantizers, options.precisions))
    if options.precisions[0] != "float32":
        parser.error("--precisions must begin with float32: the first row trains the teacher")
    for seed in options.seeds:
        teacher = options.output / folder_name(*grid[0], seed) / "teacher"
        for bits, quantizer, precision in grid:
            source = f"--teacher {teacher}" if teacher.exists() else "--teacher_epochs 6"
            arguments = (
                f"--model {options.model} --seed {seed} --quantizer {quantizer} --weight_bits {bits} "
                f"--activation_bits {bits} --teacher_learning_rate 5e-3 --recipe paper {source}"
            )
            if precision == "bf16":
                arguments += f" --bf16 true --use_cpu {not torch.cuda.is_available()}"
            row = rows.setdefault((quantizer, f"W{bits}A{bits}", precision), [])
            row.append(run(options.output / folder_name(bits, quantizer, precision, seed), arguments))
            print(f"{quantizer} W{bits}A{bits} {precision} seed {seed}: {row[-1]['student']}", flush=True)

    print(
        "\n| quantizer | bits | precision | teacher | calibrated only | distilled | behind the teacher | agreement |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row, runs in rows.items():
        cells = [mean_std([r[key]["accuracy"] for r in runs]) for key in ("teacher", "calibrated", "student")]
        behind = mean_std([r["teacher"]["accuracy"] - r["student"]["accuracy"] for r in runs])
        agreement = mean_std([r["student"]["agreement"] for r in runs])
        print(f"| {' | '.join(row)} | {' | '.join(cells)} | {behind} | {agreement} |")


def folder_name(bits: int, quantizer: str, precision: str, seed: int) -> str:
    return f"{quantizer}-{bits}-{seed}" + ("" if precision == "float32" else f"-{precision}")


def mean_std(shares: list[float]) -> str:
    values = [100 * share for share in shares]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


if __name__ == "__main__":
    main()
