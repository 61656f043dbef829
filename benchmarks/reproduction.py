"""What SQAKD claims, on Fashion-MNIST: accuracy of students by quantizer, bits and objective, over several seeds.

    python benchmarks/reproduction.py grid          # train what is missing of a table, then print it
    python benchmarks/reproduction.py --print       # print all tables as far as their rows exist

Every row is a student that starts from its teacher's weights and trains by one objective; all rows of a table have the
same teacher (of the seed), images, number of steps and batch size. The last step counts: nothing is selected on the
test images, all 10,000 of Fashion-MNIST. Learning rates come from the table `tuning`, which is measured on training
images that no row trains on. Rows are kept in `--rows`, one JSON file each; start the command several times to fill a
table by several processes, each with `--threads` threads.
"""

import argparse
import itertools
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rows import Row, Rows
from tqdm import tqdm


QUANTIZERS = ("ewgs", "pact", "lsq", "dorefa")
BITS = (2, 1, 4, 8)
SEEDS = (0, 1, 2)
SQAKD, LABELS, BOTH = "kl", "ce", "ce + kl"
OBJECTIVES = {SQAKD: "SQAKD", LABELS: "labelled QAT", BOTH: "CE + KL"}
RATES = (1e-3, 3e-3, 1e-2)


def tuning_rows() -> list[Row]:
    """Learning rates, on held-out training images: one quantizer, two widths, one seed."""
    return [
        Row("lsq", bits, objective, 0, rate, on_held_out=True)
        for bits, objective, rate in itertools.product(BITS[:2], OBJECTIVES, RATES)
    ]


def grid_rows() -> list[Row]:
    """Every quantizer, width and objective."""
    return [
        Row(quantizer, bits, objective, seed)
        for seed, bits, quantizer, objective in itertools.product(SEEDS, BITS, QUANTIZERS, OBJECTIVES)
    ]


TABLES: dict[str, Callable[[], list[Row]]] = {"tuning": tuning_rows, "grid": grid_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help=f"any of {', '.join(TABLES)}")
    parser.add_argument("--print", action="store_true", help="train nothing")
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "reproduction")
    parser.add_argument("--seeds", nargs="+", type=int, help="train rows of these seeds only")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    rows = Rows(options.rows)
    for table in options.tables:
        if not options.print:
            wanted = [row for row in TABLES[table]() if options.seeds is None or row.seed in options.seeds]
            for row in tqdm(wanted, table):
                rows.run(row)
    for table in options.tables or TABLES:
        print(f"\n### {table}\n")
        for line in globals()[f"print_{table}"](rows):
            print(line)


def print_tuning(rows: Rows) -> list[str]:
    lines = [
        "| objective | bits | " + " | ".join(f"{rate:g}" for rate in RATES) + " |",
        "|---" * (2 + len(RATES)) + "|",
    ]
    for bits, (objective, title) in itertools.product(BITS[:2], OBJECTIVES.items()):
        cells = [cell(rows, [Row("lsq", bits, objective, 0, rate, on_held_out=True)]) for rate in RATES]
        lines.append(f"| {title} | W{bits}A{bits} | {' | '.join(cells)} |")
    return lines


def print_grid(rows: Rows) -> list[str]:
    heads = ("quantizer", "bits", *OBJECTIVES.values(), "SQAKD - labelled", "SQAKD - CE + KL")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for bits, quantizer in itertools.product(sorted(BITS), QUANTIZERS):
        of = {objective: [Row(quantizer, bits, objective, seed) for seed in SEEDS] for objective in OBJECTIVES}
        cells = [cell(rows, of[objective]) for objective in OBJECTIVES]
        cells += [paired(rows, of[SQAKD], of[other]) for other in (LABELS, BOTH)]
        lines.append(f"| {quantizer} | W{bits}A{bits} | {' | '.join(cells)} |")
    return lines


def accuracies(rows: Rows, wanted: Sequence[Row]) -> dict[int, float]:
    """Return the accuracy in points by seed, of the rows that exist."""
    found = {row.seed: rows.read(row) for row in wanted}
    return {seed: 100 * result["student"]["accuracy"] for seed, result in found.items() if result is not None}


def cell(rows: Rows, wanted: Sequence[Row]) -> str:
    """Return mean ± standard deviation of the accuracies."""
    return mean_std(list(accuracies(rows, wanted).values()), len(wanted))


def paired(rows: Rows, one: Sequence[Row], other: Sequence[Row]) -> str:
    """Return mean ± standard deviation of the differences of rows with the same seed."""
    first, second = accuracies(rows, one), accuracies(rows, other)
    return mean_std([first[seed] - second[seed] for seed in first if seed in second], len(one), signed=True)


def mean_std(values: list[float], wanted: int, signed: bool = False) -> str:
    if not values:
        return "not run"
    sign = "+" if signed else ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    missing = f" ({len(values)} of {wanted} seeds)" if len(values) < wanted else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}{missing}"


if __name__ == "__main__":
    main()
