"""Time to import the package and its trainer, against transformers' own Trainer.

    python benchmarks/import_time.py

Fresh processes in turn, medians. What quantization adds to a program that trains with transformers anyway.
"""

import argparse
import statistics
import subprocess
import sys

from measure import machine


STATEMENTS = {
    "from transformers import Trainer": "from transformers import Trainer",
    "from sqakd_hf import SQAKDTrainer": "from sqakd_hf import SQAKDTrainer",
}
TIMED = "import time; start = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for number in range(-1, options.rounds):  # the first round writes bytecode
        for name, statement in STATEMENTS.items():
            command = [sys.executable, "-W", "ignore", "-c", TIMED.format(statement)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if number >= 0:
                seconds[name].append(float(done.stdout.splitlines()[-1]))
    print(machine())
    first = statistics.median(next(iter(seconds.values())))
    print("\n| statement | seconds | / Trainer |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| `{name}` | {statistics.median(times):.2f} | {statistics.median(times) / first:.2f} |")


if __name__ == "__main__":
    main()
