"""Size of stored students against the float files, and the cost of loading them.

    python benchmarks/file_size.py

Weights are random (sizes do not depend on them); ranges come from two random images. The floor is what no format with
these codes can undercut by much: `bits` bits for each quantized weight, the bytes of everything that stays float
(ranges, biases, norms), and 4 KB for names. Loading is measured in fresh processes, float and packed in turn: the
seconds until `from_pretrained` returned and every weight was read, and the peak memory of the whole process, medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sqakd_hf import QuantizationConfig, build_model, calibrate_model, quantize_model


MODELS = {"timm/resnet18": 64, "timm/vit_base_patch16_224": 224}
LOAD = """
import json, sys, time
import sqakd_hf
from transformers import AutoModelForImageClassification
start = time.perf_counter()
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
for parameter in model.parameters():
    parameter.sum()  # a float file is mapped, and read where it is used
seconds = time.perf_counter() - start
# Not ru_maxrss, which a process inherits from the one that started it.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, peak / 1024]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2, 1], help="weight and activation bits")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each loading time")
    options = parser.parse_args()
    heads = ("model", "bits", "bytes", "floor", "/ floor", "float / it", "load", "/ float", "peak MiB", "/ float")
    print("{:28} {:>5} {:>12} {:>12} {:>8} {:>10} {:>6} {:>7} {:>8} {:>7}".format(*heads))
    for name, size in MODELS.items():
        with tempfile.TemporaryDirectory() as root:
            torch.manual_seed(0)
            model = build_model(name, 1000).eval()
            model.save_pretrained(Path(root, "float"))
            float_bytes = file_bytes(Path(root, "float"))
            print(f"{name:28} {'float':>5} {float_bytes:12,}")
            state = model.state_dict()
            for bits in options.bits:
                student = build_model(name, 1000).eval()
                student.load_state_dict(state)
                quantize_model(student, QuantizationConfig(weight_bits=bits, activation_bits=bits, residual_bits=None))
                calibrate_model(student, [torch.randn(2, 3, size, size)], disable_progress=True)
                folder = Path(root, str(bits))
                student.save_pretrained(folder)
                stored, lowest = file_bytes(folder), floor_bytes(student)
                load = measure_loading(Path(root, "float"), folder, options.repeats)
                print(
                    f"{name:28} {'W' + str(bits):>5} {stored:12,} {lowest:12,} {stored / lowest:8.4f} "
                    f"{float_bytes / stored:10.1f} {load}",
                    flush=True,
                )


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def floor_bytes(student: torch.nn.Module) -> int:
    bits = {f"{layer.name}.weight": layer.weight_bits for layer in student.quantization_plan.quantized}
    state = student.state_dict().items()
    return sum((t.numel() * bits[name] + 7) // 8 if name in bits else t.nbytes for name, t in state) + 4096


def measure_loading(float_folder: Path, packed_folder: Path, repeats: int) -> str:
    runs = {float_folder: [], packed_folder: []}
    for _ in range(repeats):
        for folder, measured in runs.items():
            done = subprocess.run(
                [sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True
            )
            measured.append(json.loads(done.stdout.splitlines()[-1]))
    times, peaks = ([statistics.median(run[i] for run in measured) for measured in runs.values()] for i in (0, 1))
    return f"{times[1]:5.2f}s {times[1] / times[0]:6.2f}x {peaks[1]:8.0f} {peaks[1] / peaks[0]:6.2f}x"


if __name__ == "__main__":
    main()
