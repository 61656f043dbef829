"""What SQAKD claims, on Fashion-MNIST: accuracy of students by quantizer, bits and objective, over several seeds.

    python benchmarks/reproduction.py grid          # train what is missing of a table, then print it
    python benchmarks/reproduction.py --print       # print all tables as far as their rows exist

Every row is a student that starts from its teacher's weights and trains by one objective; all rows of a table have the
same teacher (of the seed), images, number of steps and batch size. The last step counts: nothing is selected on the
test images, all 10,000 of Fashion-MNIST. The learning rate is the best one, by the mean over the widths, for each
objective of the table `tuning`, which is measured on training images that no row trains on. Rows are kept in `--rows`,
one JSON file each; start the command several times to fill a table by several processes of `--threads` threads.
"""

import argparse
import inspect
import itertools
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import Row, Rows
from tqdm import tqdm


QUANTIZERS = ("ewgs", "pact", "lsq", "dorefa")
BITS = (1, 2, 4, 8)
SEEDS = (0, 1, 2)
HEADLINE_SEEDS = (0, 1, 2, 3, 4)
SQAKD, LABELS, BOTH = "kl", "ce", "ce + kl"
OBJECTIVES = {SQAKD: "SQAKD", LABELS: "labelled QAT", BOTH: "CE + KL"}
RATES = (1e-3, 3e-3, 1e-2)
# Their published weights, but for CC's, which belongs to another formula; all of them train with labels.
DISTILLATION = {
    "FitNet": "ce + 100*fitnet",
    "AT": "ce + 1000*at",
    "NST": "ce + 50*nst",
    "SP": "ce + 3000*sp",
    "RKD": "ce + rkd",
    "PKT": "ce + 30000*pkt",
    "FSP": "ce + 50*fsp",
    "CC": "ce + cc",
}
# What a student of SQAKD can see, as labels are not needed.
IMAGES: dict[str, dict[str, Any]] = {
    "plain SQAKD": {},
    "45,000 more unlabelled images": {"student_images": 55_000},
    "no augmentation": {"augment": "none"},
    "no augmentation, 45,000 more images": {"augment": "none", "student_images": 55_000},
}
Group = dict[tuple[str, ...], list[Row]]


def tuning() -> Group:
    """Accuracy on held-out images by learning rate: one quantizer, two widths, one seed."""
    return {
        (f"W{bits}A{bits}", title, f"{rate:g}"): [Row("lsq", bits, objective, 0, rate, on_held_out=True)]
        for bits, (objective, title), rate in itertools.product(BITS[:2], OBJECTIVES.items(), RATES)
    }


def grid() -> Group:
    """Every quantizer, width and objective."""
    return {
        (f"W{bits}A{bits}", quantizer, title): [Row(quantizer, bits, objective, seed) for seed in SEEDS]
        for bits, quantizer, (objective, title) in itertools.product(BITS, QUANTIZERS, OBJECTIVES.items())
    }


def headline() -> Group:
    """SQAKD against labelled QAT over five seeds: the lines of `grid` that the claim is about."""
    return {
        (f"W{bits}A{bits}", quantizer, OBJECTIVES[objective]): [
            Row(quantizer, bits, objective, seed) for seed in HEADLINE_SEEDS
        ]
        for bits, quantizer, objective in itertools.product(BITS, QUANTIZERS, (SQAKD, LABELS))
    }


def rates() -> Group:
    """W2A2 by learning rate: in `tuning`, labels do better at 1e-3 if this width is looked at alone."""
    return {
        ("W2A2", quantizer, f"{OBJECTIVES[objective]}, {rate:g}"): [
            Row(quantizer, 2, objective, seed, rate) for seed in SEEDS
        ]
        for quantizer, objective, rate in itertools.product(QUANTIZERS, (SQAKD, LABELS), (RATES[1], RATES[0]))
    }


def kd() -> Group:
    """SQAKD against other methods of distillation, one quantizer."""
    methods = {"SQAKD": SQAKD, "labelled QAT": LABELS, "CE + KL": BOTH, **DISTILLATION}
    return {
        (f"W{bits}A{bits}", title): [Row("lsq", bits, objective, seed) for seed in SEEDS]
        for bits, (title, objective) in itertools.product(BITS[:3], methods.items())
    }


def beyond() -> Group:
    """What could be better than plain SQAKD, all of it without labels."""
    settings: dict[str, dict[str, Any]] = {
        **IMAGES,
        "resized-crop": {"augment": "resized-crop"},
        "KL + SQuaT's term": {"objective": "kl + squat"},
        "first ranges by least error": {"quantizer_kwargs": '{"first_range": "error"}'},
        "first ranges by percentile": {"quantizer_kwargs": '{"first_range": "percentile"}'},
        "BatchNorm re-estimated": {"training": '{"reestimate_batch_norm": 2048}'},
        "oscillations dampened, 1e-2": {"training": '{"oscillation_dampening": 0.01}'},
        "oscillations frozen, 0.01": {"training": '{"oscillation_freezing": 0.01}'},
        # progressive_bits is gone: these rows were measured, and run again, at be9835f.
        "8 and 4 bits first": {"training": '{"progressive_bits": [8, 4]}'},
        "temperature 1": {"training": '{"temperature": 1.0}'},
        "temperature 8": {"training": '{"temperature": 8.0}'},
        "ranges learn at a tenth": {"training": '{"quantizer_learning_rate": 3e-4}'},
        "EWGS, delta 1e-3": {"quantizer": "ewgs"},
        "EWGS, delta 0": {"quantizer": "ewgs", "quantizer_kwargs": '{"delta": 0.0}'},
        "EWGS, delta estimated": {"quantizer": "ewgs", "training": '{"delta_estimation_steps": 157}'},
    }
    return {
        (f"W{bits}A{bits}", title): [replace(Row("lsq", bits, SQAKD, seed), **changes) for seed in SEEDS]
        for bits, (title, changes) in itertools.product(BITS[:2], settings.items())
    }


def choice() -> Group:
    """Accuracy on held-out images, as in `tuning`: which images the students of `best` should see."""
    return {
        (f"W{bits}A{bits}", title): [Row("lsq", bits, SQAKD, 0, on_held_out=True, **changes)]
        for bits, (title, changes) in itertools.product(BITS[:2], IMAGES.items())
    }


def best() -> Group:
    """The setting that `choice` has chosen against plain SQAKD, and against labels in the same setting; five seeds."""
    settings: dict[str, dict[str, Any]] = {
        "SQAKD, no augmentation": {"augment": "none"},
        "plain SQAKD": {},
        "labelled QAT, no augmentation": {"objective": LABELS, "augment": "none"},
    }
    return {
        (f"W{bits}A{bits}", title): [replace(Row("lsq", bits, SQAKD, seed), **changes) for seed in HEADLINE_SEEDS]
        for bits, (title, changes) in itertools.product(BITS[:3], settings.items())
    }


def few() -> Group:
    """A tenth of the images, for as many steps."""
    return {
        (f"W{bits}A{bits}", title): [Row("lsq", bits, objective, seed, share=0.1) for seed in SEEDS]
        for bits, (objective, title) in itertools.product(BITS[:3], OBJECTIVES.items())
    }


def other() -> Group:
    """Distilled on grey patches of photographs: the student sees no image of Fashion-MNIST."""
    settings = {
        "SQAKD on photographs": "{}",
        "SQAKD on photographs, BatchNorm frozen": '{"freeze_batch_norm": true}',
    }
    return {
        (f"W{bits}A{bits}", title): [
            Row("lsq", bits, SQAKD, seed, source="photographs", training=training) for seed in SEEDS
        ]
        for bits, (title, training) in itertools.product(BITS, settings.items())
    }


def tuning_models() -> Group:
    """Accuracy on held-out images by setting, as in `tuning` and `choice`: a teacher of 20 epochs, too few for it."""
    settings: dict[str, dict[str, Any]] = {
        **{
            f"{OBJECTIVES[objective]}, learning rate {rate:g}": {"objective": objective, "learning_rate": rate}
            for objective, rate in itertools.product((SQAKD, LABELS), RATES[:2])
        },
        "SQAKD, BatchNorm frozen": {"training": '{"freeze_batch_norm": true}'},
        "SQAKD, no augmentation": {"augment": "none"},
        "labelled QAT, no augmentation": {"objective": LABELS, "augment": "none"},
    }
    row = Row("lsq", 4, SQAKD, 0, model="mobilenetv2_050", teacher_epochs=20, on_held_out=True)
    return {("MobileNetV2 x0.5 W4A4", title): [replace(row, **changes)] for title, changes in settings.items()}


def models() -> Group:
    """Depthwise convolutions and a vision transformer (6 blocks of width 64, rate 1e-3 untuned), no augmentation."""
    shared: dict[str, Any] = {"augment": "none"}
    vit = {**shared, "model_args": '{"patch_size": 4}', "learning_rate": 1e-3, "teacher_learning_rate": 1e-3}
    networks: tuple[tuple[str, str, tuple[int, int], dict[str, Any]], ...] = (
        ("MobileNetV2 x0.5", "mobilenetv2_050", (8, 4), shared),
        ("ShuffleNetV2 x0.5", "shufflenet_v2_x0_5", (8, 4), shared),
        ("ViT", "test_vit", (4, 2), vit),
    )
    table: Group = {}
    for (network, model, widths, options), objective in itertools.product(networks, (SQAKD, LABELS)):
        for bits in widths:
            rows = [Row("lsq", bits, objective, seed, model=model, **options) for seed in SEEDS]
            table[f"{network} W{bits}A{bits}", OBJECTIVES[objective]] = rows
    # StatsQ is made for transformers: its weights, LSQ's activations.
    for bits in networks[-1][2]:
        lsq = table[f"ViT W{bits}A{bits}", "SQAKD"]
        table[f"ViT W{bits}A{bits}", "SQAKD, StatsQ weights"] = [replace(row, quantizer="statsq") for row in lsq]
    return dict(sorted(table.items(), key=lambda item: item[0][0]))


def teachers() -> Group:
    """The ViT of `models` by the epochs of its teacher: are labels ahead only while a teacher has more to learn?"""
    table, network = models(), "ViT W4A4"
    return {
        (network, f"{epochs} epochs", title): [replace(row, teacher_epochs=epochs) for row in table[network, title]]
        for epochs, title in itertools.product((40, 160), ("SQAKD", "labelled QAT"))
    }


def peers() -> Group:
    """Other projects' quantizers in all layers, driven by the same trainer and loss on the same images.

    Needs `pip install brevitas`. Their time is in the table of `train_step.py`, side by side.
    """
    table: Group = {}
    for bits in (4, 2):
        own = [Row("lsq", bits, SQAKD, seed, first_last_bits=bits) for seed in SEEDS]
        table[f"W{bits}A{bits}", "ours, LSQ"] = own
        for name in ("Brevitas", "torch.ao learnable", "torch.ao"):
            table[f"W{bits}A{bits}", name] = [replace(row, peer=name) for row in own]
    return table


def resnet20() -> Group:
    """The paper's ResNet-20 on 55,000 images: 10 epochs for the teacher, 4 for each student on the same images."""
    options: dict[str, Any] = {"model": "resnet20_cifar", "images": 55_000, "epochs": 4, "teacher_epochs": 10}
    settings: dict[str, dict[str, Any]] = {
        "SQAKD": {},
        "labelled QAT": {"objective": LABELS},
        "SQAKD, no augmentation": {"augment": "none"},
    }
    return {
        (f"W{bits}A{bits}", quantizer, title): [
            replace(Row(quantizer, bits, SQAKD, seed, **options), **changes) for seed in SEEDS
        ]
        for bits, quantizer, (title, changes) in itertools.product(BITS[:3], ("lsq", "ewgs"), settings.items())
    }


ALL = (
    *(tuning, grid, headline, rates, kd, choice, best, beyond, few, other),
    *(tuning_models, models, teachers, peers, resnet20),
)
TABLES: dict[str, Callable[[], Group]] = {table.__name__: table for table in ALL}
# Tables whose groups of lines begin with the one that the others are compared with.
COMPARED = ("grid", "headline", "rates", "kd", "best", "beyond", "few", "models", "teachers", "peers", "resnet20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=list(TABLES), help=f"any of {', '.join(TABLES)}")
    parser.add_argument("--print", action="store_true", help="train nothing")
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "reproduction")
    parser.add_argument("--seeds", nargs="+", type=int, help="train rows of these seeds only")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if unknown := [name for name in options.tables if name not in TABLES]:
        parser.error(f"there is no table {', '.join(unknown)}; choose from {', '.join(TABLES)}")
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    rows = Rows(options.rows)
    for name in () if options.print else options.tables:
        wanted = [row for cells in TABLES[name]().values() for row in cells]
        # Seed by seed: what is there when it is interrupted compares.
        for row in tqdm(sorted(wanted, key=lambda row: row.seed), name):
            if options.seeds is None or row.seed in options.seeds:
                rows.run(row)
    for name in options.tables:
        print(f"\n### {name}\n\n{inspect.cleandoc(TABLES[name].__doc__)}\n")
        print_table(rows, TABLES[name](), compared=name in COMPARED)


def print_table(rows: Rows, table: Group, compared: bool) -> None:
    """Print a line for each entry; if `compared`, also how far the first line of its group is ahead of it."""
    width = len(next(iter(table)))
    last = " the first is ahead by |" * compared
    print(f"|{' |' * width} accuracy | teacher | behind the teacher | agreement |{last}")
    print("|---" * (width + 4 + compared) + "|")
    for key, wanted in table.items():
        first = next(others for other, others in table.items() if other[: width - 1] == key[: width - 1])
        ahead = f" {'' if first is wanted else paired(rows, first, wanted)} |" if compared else ""
        results = found(rows, wanted)
        teachers = [100 * result["teacher"]["accuracy"] for result in results]
        students = [100 * result["student"]["accuracy"] for result in results]
        behind = [teacher - student for teacher, student in zip(teachers, students, strict=True)]
        agreement = [100 * result["student"]["agreement"] for result in results]
        numbers = " | ".join((cell(rows, wanted), *map(spread, (teachers, behind, agreement))))
        print(f"| {' | '.join(key)} | {numbers} |{ahead}")


def found(rows: Rows, wanted: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the results that exist."""
    return [result for row in wanted if (result := rows.read(row)) is not None]


def cell(rows: Rows, wanted: Sequence[Row]) -> str:
    """Return mean ± standard deviation of the accuracies in points, and how many seeds are missing."""
    values = [100 * result["student"]["accuracy"] for result in found(rows, wanted)]
    return spread(values) + (f" ({len(values)} of {len(wanted)} seeds)" if 0 < len(values) < len(wanted) else "")


def paired(rows: Rows, one: Sequence[Row], other: Sequence[Row]) -> str:
    """Return mean ± standard deviation of the differences of rows with the same seed and teacher."""
    first, second = (
        {(result["row"]["seed"], result["teacher_fingerprint"]): result for result in found(rows, wanted)}
        for wanted in (one, other)
    )
    differences = [
        100 * (first[key]["student"]["accuracy"] - second[key]["student"]["accuracy"])
        for key in first.keys() & second.keys()
    ]
    return spread(differences, signed=True) if differences else "not run"


def spread(values: list[float], signed: bool = False) -> str:
    """Return mean ± standard deviation."""
    if not values:
        return "not run"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if signed else ''}.2f}{deviation}"


if __name__ == "__main__":
    main()
