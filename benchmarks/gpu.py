"""All that is to be known of training on a GPU, in one run of a few minutes: steps, the quantizer alone, a profile.

    python benchmarks/gpu.py --minutes 8 --out gpu-results

Tables come in the order of their value and are printed, and kept in `results.md` and `results.json`, when they are
done; one whose time has not come when the minutes are over is left out, and said so. Networks are those of
train_step.py and sqakd_step.py at 224 px, under bfloat16 autocast; "float32" is the float network under it as well.
Times are of several steps in a row, one variant after the other in each round; the ratio is the median over the rounds
of a variant's time by the float network's of the same round. "peak" is the memory that a step takes beside what lasts
(parameters, their optimizer's state, the images). `--device cpu --tiny` runs every table on small networks, which says
nothing about speed: there "peak" are the bytes that a forward keeps for the backward.
"""

import os


os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import contextlib
import functools
import gc
import json
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqakd_step
import torch
import train_step
from measure import Step, begin, machine, without_compiler
from peers import build_peers
from train_step import COMPILED_FLOAT, COMPILED_STUDENT, FLOAT, LOW_MEMORY, STUDENT

from sqakd_hf import FakeQuantizer, InputError, create_quantizer
from sqakd_hf.distillation.teacher import Teacher
from sqakd_hf.export.timing import interleaved, ratios, synchronize
from sqakd_hf.quantization import functional


NETWORKS = ("ResNet-50 224 px", "ViT-S/16 224 px")
TINY_NETWORKS = ("tiny ResNet 16 px", "tiny ViT 32 px")
LARGE_BATCH = 256
# Projects that the aims name; others of peers.py are shown where they are installed.
AIMED_AT = ("torch.ao", "ModelOpt")


class OutOfTime(BaseException):
    """The minutes are over. Not an `Exception`: nobody on the way may take it for an error of his own."""


class Report:
    """Tables as they are done, on the screen and in two files of a folder.

    Args:
        folder (`Path`): It is made.
        facts (`dict`): What the JSON file says of the run.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self._text, self._data = folder / "results.md", folder / "results.json"
        self._text.write_text("")
        self.facts, self.tables = facts, {}
        self.failed: list[str] = []

    def table(self, title: str, rows: dict[str, dict[str, float | int | str | None]]) -> None:
        """Show rows of equal columns, by name, under a title."""
        self.tables[title] = rows
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        lines = [f"\n**{title}**\n", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            lines.append(f"| {name} | {' | '.join(_cell(row.get(column)) for column in columns)} |")
        self.say("\n".join(lines))

    def say(self, text: str) -> None:
        print(text, flush=True)
        with open(self._text, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")
        self._data.write_text(
            json.dumps({**self.facts, "failed": self.failed, "tables": self.tables}, indent=1) + "\n"
        )


def _cell(value: float | int | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


# --- tables ----------------------------------------------------------------------------------------------------------


def student_step(name: str, options: argparse.Namespace, report: Report, batch: int | None = None) -> None:
    """A student's step, without a teacher."""
    images, labels, model = train_step.build(name, options.device, batch)
    models, contexts = train_step.students(model, images)
    steps = train_step.steps_of({FLOAT: model, **models}, contexts, images, labels, bf16=True)
    compare(f"Student's step, {name}, batch {len(images)}", steps, options, report)


def sqakd(name: str, options: argparse.Namespace, report: Report, batch: int | None = None) -> None:
    """The whole step, with a teacher."""
    images, labels, model = train_step.build(name, options.device, batch)
    teachers = sqakd_step.teachers_of(model, torch.device(options.device))
    steps = sqakd_step.steps_of(model, teachers, images, labels, bf16=True)
    compare(f"SQAKD step, {name}, batch {len(images)}", steps, options, report)


def compiled_step(name: str, options: argparse.Namespace, report: Report) -> None:
    """Whole models compiled: float network and student, and the student with a compiled teacher."""
    how = {"backend": "eager"} if options.tiny else {}  # a C++ compiler takes minutes
    images, labels, model = train_step.build(name, options.device)
    models = {FLOAT: model, **train_step.compiled(model, images, **how)}
    steps = train_step.steps_of(models, {}, images, labels, bf16=True)
    device = torch.device(options.device)
    teacher = Teacher([train_step.build(name, options.device)[2]], device, torch.bfloat16, compile_options=how)
    # The same student again: to compile another one would cost a minute and say nothing new.
    learn = sqakd_step.learn_from(teacher, images)
    steps["**torch.compile(sqakd_hf), bfloat16 teacher**"] = Step(models[COMPILED_STUDENT], images, learn, True)
    compare(f"Whole models compiled, {name}, batch {len(images)}", steps, options, report)
    torch._dynamo.reset()


def peers(name: str, options: argparse.Namespace, report: Report) -> None:
    """Other projects beside ours."""
    images, labels, model = train_step.build(name, options.device)
    with torch.autocast(images.device.type, torch.bfloat16):  # ranges are learned of what training computes
        others, absent = build_peers(model, images, 4)
    models = {FLOAT: model, STUDENT: train_step.student_of(model, images, "lsq", 4), **others}
    steps = train_step.steps_of(models, {}, images, labels, bf16=True)
    failures = {}
    compare(f"Other projects, {name}, batch {len(images)}", steps, options, report, list(others), failures)
    absent += [f"{row} does not train here: {why}" for row, why in failures.items()]
    for line in sorted(set(absent)):
        report.say(f"\n{line}")


def compare(
    title: str,
    steps: dict[str, Step],
    options: argparse.Namespace,
    report: Report,
    may_fail: Sequence[str] = (),
    failures: dict[str, str] | None = None,
) -> None:
    """Measure time and memory of steps against the float network's.

    Rows of `may_fail` that raise are left out, and `failures` says why.
    """

    failures = {} if failures is None else failures

    def attempt(row: str, act: Callable[[], Any]) -> Any:
        if row not in may_fail:
            return act()
        try:
            return None if row in failures else act()
        except Exception as error:
            failures[row] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    several = {
        row: functools.partial(attempt, row, functools.partial(repeat, step, options.repeats))
        for row, step in steps.items()
    }
    seconds = interleaved(several, options.rounds, options.device, warm_up=2)
    memory = {row: attempt(row, functools.partial(peak, step, options.device)) for row, step in steps.items()}
    steps = {row: step for row, step in steps.items() if row not in failures}
    rows = {}
    for row, step in steps.items():
        reference = train_step.reference_of(row) if COMPILED_FLOAT in steps else FLOAT
        ratio, spread = ratios(seconds[row], seconds[reference])
        to_eager, _ = ratios(seconds[row], seconds[FLOAT])
        rows[row] = {
            "images/s": round(len(step.images) * options.repeats / statistics.median(seconds[row])),
            "time / float": ratio,
            "±": spread,
            **({"time / eager float": to_eager} if COMPILED_FLOAT in steps else {}),
            "peak MiB": None if memory[row] is None else round(memory[row] / 2**20),
            "peak / float": None if memory[row] is None else memory[row] / memory[FLOAT],
        }
    report.table(title, rows)
    if functional._compiler_failures:
        report.say(f"\nKernels did not compile: {functional._compiler_failures[0]}")


def repeat(step: Callable[[], object], times: int) -> None:
    """Run a step so many times without waiting in between, as training does."""
    for _ in range(times):
        step()


def peak(step: Step, device: str) -> int | None:
    """Return the bytes that a step takes beside what lasts."""
    if device == "cpu":
        # Of a compiled model hooks would make another graph: half a minute.
        return None if isinstance(step.model, torch._dynamo.OptimizedModule) else step.saved()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    lasting = torch.cuda.memory_allocated()
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - lasting


def quantizer_alone(options: argparse.Namespace, report: Report) -> None:
    """One quantizer on large tensors, against a copy: it reads and writes as much, so that 1 is the best there is."""
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "activations (64, 256, 56, 56)": ((64, 256, 56, 56), None),
        "activations, channels-last": ((64, 256, 56, 56), None),
        "tokens (64, 197, 1536)": ((64, 197, 1536), None),
        "weights (4096, 4096), per channel": ((4096, 4096), 0),
    }
    for dtype in (torch.bfloat16, torch.float32):
        rows = {}
        for name, (shape, axis) in shapes.items():
            shape = tuple(min(size, 8) for size in shape) if options.tiny else shape
            x = torch.randn(shape, device=options.device).to(dtype)
            if "channels-last" in name:
                x = x.contiguous(memory_format=torch.channels_last)
            copy = seconds_of(functools.partial(torch.empty_like(x).copy_, x), options)
            rows[f"copy, {name}"] = {"GB/s": 2 * x.nbytes / copy / 1e9, "share of the copy's bandwidth": 1.0}
            for method in ("lsq", "ewgs"):
                quantizer = create_quantizer(method, bits=4, role="activation", channel_axis=axis).to(options.device)
                quantizer.init_range(x)
                rows.update(
                    {
                        f"{method}{how}, {what}, {name}": {"GB/s": rate / 1e9, "share of the copy's bandwidth": share}
                        for how, context in (("", contextlib.nullcontext), (" without a compiler", without_compiler))
                        for what, rate, share in bandwidths(quantizer, x, copy, context, options)
                    }
                )
            if axis is None and dtype == torch.float32:
                native = seconds_of(
                    functools.partial(torch.fake_quantize_per_tensor_affine, x, 0.1, 0, 0, 15), options
                )
                rows[f"torch.fake_quantize_per_tensor_affine, forward, {name}"] = {
                    "GB/s": 2 * x.nbytes / native / 1e9,
                    "share of the copy's bandwidth": copy / native,
                }
        report.table(f"The quantizer alone, 4 bits, {str(dtype).removeprefix('torch.')}", rows)
    small = torch.randn(64, 64, device=options.device)
    rows = {}
    for method in ("lsq", "ewgs"):
        quantizer = create_quantizer(method, bits=4, role="weight", channel_axis=0).to(options.device)
        quantizer.init_range(small)
        with torch.no_grad():
            forward = seconds_of(functools.partial(quantizer, small), options)
        leaf, g = small.clone().requires_grad_(), torch.ones_like(small)
        wanted = [leaf, *quantizer.parameters()]
        both = seconds_of(functools.partial(_forward_and_backward, quantizer, leaf, wanted, g), options)
        rows[method] = {"forward, microseconds": 1e6 * forward, "with its backward": 1e6 * both}
    report.table("What a call costs where the tensor is small (64, 64): launches", rows)


def _forward_and_backward(
    quantizer: FakeQuantizer, x: torch.Tensor, wanted: Sequence[torch.Tensor], g: torch.Tensor
) -> None:
    torch.autograd.grad(quantizer(x), wanted, g)


def bandwidths(
    quantizer: FakeQuantizer,
    x: torch.Tensor,
    copy: float,
    context: Callable[[], contextlib.AbstractContextManager],
    options: argparse.Namespace,
) -> list[tuple[str, float, float]]:
    """Return bytes a second of forward and backward, and their share of a copy's, which takes `copy` seconds."""
    with context():
        with torch.no_grad():
            forward = seconds_of(lambda: quantizer(x), options)
        leaf = x.detach().requires_grad_()
        y, g = quantizer(leaf), torch.ones_like(x)
        wanted = [leaf, *quantizer.parameters()]
        backward = seconds_of(lambda: torch.autograd.grad(y, wanted, g, retain_graph=True), options)
    # The forward reads and writes one tensor, the backward reads two and writes one.
    return [
        ("forward", 2 * x.nbytes / forward, copy / forward),
        ("backward", 3 * x.nbytes / backward, 1.5 * copy / backward),
    ]


def seconds_of(act: Callable[[], object], options: argparse.Namespace) -> float:
    """Return the seconds of one call, the median over rounds of several calls in a row."""
    times = interleaved(
        {"": functools.partial(repeat, act, options.repeats)}, options.rounds, options.device, warm_up=2
    )[""]
    return statistics.median(times) / options.repeats


def profile(name: str, options: argparse.Namespace, report: Report) -> None:
    """One SQAKD step by kernels; `profile.txt` has them all."""
    images, labels, model = train_step.build(name, options.device)
    student = train_step.student_of(model, images, "lsq", 4)
    teacher = Teacher([model], torch.device(options.device), torch.bfloat16)
    step = Step(student, images, sqakd_step.learn_from(teacher, images), True)
    repeat(step, 3)
    on_gpu = options.device != "cpu"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        synchronize(options.device)
    events = recorded.key_averages()
    which = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    (options.out / "profile.txt").write_text(events.table(sort_by=which, row_limit=60, max_name_column_width=100))
    # On a GPU kernels alone: an operator's time is that of its kernels again.
    kernels = [each for each in events if not on_gpu or each.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(each, which) for each in kernels) or 1
    rows = {
        f"`{each.key[:70]}`": {
            "calls": each.count,
            "ms": getattr(each, which) / 1000,
            "share": getattr(each, which) / total,
        }
        for each in sorted(kernels, key=lambda each: -getattr(each, which))[:20]
    }
    report.table(f"One SQAKD step by kernels, {name}, batch {len(images)}", rows)
    counts = {each.key: each.count for each in events}
    launches = sum(count for key, count in counts.items() if "LaunchKernel" in key)
    waits = {key: count for key, count in counts.items() if "Synchronize" in key or key == "aten::_local_scalar_dense"}
    report.say(f"\nKernels launched: {launches}. What waits (one is the profile's own): {waits or 'nothing'}.")


def long_row(options: argparse.Namespace, report: Report) -> None:
    """A row of RESULTS: ResNet-20, 55,000 images of Fashion-MNIST, teacher and student."""
    import rows  # with all that data needs

    settings: dict[str, Any] = {"model": "resnet20_cifar", "images": 55_000, "epochs": 4, "teacher_epochs": 10}
    if options.tiny:
        rows.HELD_OUT = 128
        settings = {"images": 256, "epochs": 1, "teacher_epochs": 1, "on_held_out": True}
    row = rows.Row("lsq", 4, "kl", 0, **settings)
    with tempfile.TemporaryDirectory() as folder:
        kept = rows.Rows(Path(folder), Path(folder) / "work" / "teachers")
        try:
            kept.run(row)
        except InputError as error:
            report.say(f"\nlong_row: left out: {error}")
            return
        found = kept.read(row)
    report.table(
        f"Fashion-MNIST, {row.model}, {row.images:,} images, W4A4",
        {
            name: {"accuracy": found[name]["accuracy"], "agreement": found[name]["agreement"]}
            for name in ("teacher", "calibrated", "student")
        },
    )
    report.say(
        f"\n{found['steps']} steps of the student in {found['seconds']} s, all in {found['seconds_with_all']} s"
    )


# --- all of them -----------------------------------------------------------------------------------------------------


def sections(options: argparse.Namespace) -> list[tuple[str, int, Callable[[Report], None]]]:
    """Return name, seconds that it takes at least, and function of each table, the most valuable first."""
    networks = TINY_NETWORKS if options.tiny else NETWORKS
    one = networks[:1]

    def of(function: Callable, names: Sequence[str], seconds: int, **more: Any):
        return [
            (f"{function.__name__} {name}", seconds, functools.partial(function, name, options, **more))
            for name in names
        ]

    large = 4 if options.tiny else LARGE_BATCH
    return [
        *of(student_step, networks, 30),
        *of(sqakd, networks, 30),
        ("quantizer_alone", 20, functools.partial(quantizer_alone, options)),
        *of(profile, one, 20),
        *of(peers, networks, 20),
        *of(compiled_step, one if options.tiny else networks, 60),
        *of(student_step, one if options.tiny else networks, 30, batch=large),
        ("long_row", 240, functools.partial(long_row, options)),
    ]


def run(options: argparse.Namespace, report: Report) -> None:
    """Run the sections as far as the minutes go."""
    end = time.monotonic() + 60 * options.minutes

    def stop(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    try:
        for name, least, section in sections(options):
            if end - time.monotonic() < (0 if options.tiny else least):
                report.say(f"\n{name}: left out, less than {least} s are left")
                continue
            start = time.monotonic()
            try:
                section(report)
                report.say(f"\n({name}: {time.monotonic() - start:.0f} s)")
            except Exception as error:
                report.failed.append(name)
                report.say(f"\n{name} failed: {type(error).__name__}: {str(error)[:500]}")
                traceback.print_exc()
            gc.collect()
            if options.device != "cpu":
                torch.cuda.empty_cache()
    except OutOfTime:
        report.say(f"\nStopped after {options.minutes:g} minutes.")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def aims(tables: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, str]]:
    """Return what was aimed at, what was found and whether that is met, by network."""
    found: dict[str, dict[str, str]] = {}

    def add(name: str, aim: str, value: float, met: bool) -> None:
        found[name] = {"aim": aim, "found": f"{value:.3f}", "": "met" if met else "**missed**"}

    for title, rows in tables.items():
        where = title.partition(", ")[2]
        if title.startswith("Student's step"):
            ratio, memory = rows[STUDENT]["time / float"], rows[LOW_MEMORY]["peak / float"]
            add(f"student, compiled kernels, {where}", "time at most 1.25", ratio, ratio <= 1.25)
            add(f"activation_memory=low, {where}", "memory at most 1.05", memory, memory <= 1.05)
        elif title.startswith("Whole models compiled"):
            ratio = rows[COMPILED_STUDENT]["time / float"]
            add(f"whole model compiled, {where}", "time at most 1.10", ratio, ratio <= 1.1)
        elif title.startswith("The quantizer alone"):
            for row, values in rows.items():
                if row.startswith(("lsq, forward", "ewgs, forward")):
                    share = values["share of the copy's bandwidth"]
                    add(f"{row}, {where}", "at least 0.80 of a copy", share, share >= 0.8)
        elif title.startswith("Other projects"):
            own = rows[STUDENT]["time / float"]
            for row, values in rows.items():
                if row.startswith(AIMED_AT):
                    ahead = values["time / float"] / own
                    add(f"{row.partition(' (')[0]}, {where}", "its time at least ours", ahead, ahead >= 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop by itself after so many")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for tables, JSON and profile")
    parser.add_argument("--tiny", action="store_true", help="small networks and two rounds: does it run at all?")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny checks this script without one")
    options.bf16, options.threads = True, torch.get_num_threads()
    options.rounds, options.repeats = (2, 1) if options.tiny else (15, 3)
    if options.tiny and options.device == "cpu":
        functional._MIN_FUSED_NUMEL = sys.maxsize  # a C++ compiler takes a minute for what it is not asked here
    begin(options)
    report = Report(options.out, {"machine": machine(options.device), "tiny": options.tiny})
    report.say(f"{machine(options.device)}, bfloat16 autocast")
    run(options, report)
    if rows := aims(report.tables):
        report.table("Aims" + " (of no meaning: small networks)" * options.tiny, rows)
    if report.failed:
        raise SystemExit(f"failed: {', '.join(report.failed)}")


if __name__ == "__main__":
    main()
