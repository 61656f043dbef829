"""`measure_latency`: the float network, its student and the exported file side by side, in PyTorch and in engines."""

import contextlib
import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
from torch import nn
from tqdm import tqdm

from .._validation import check_integer
from ..conversion.convert import dequantize_model
from ..outputs.forward import predict
from .exporter import export_onnx
from .preparation import noise, require_student, with_ranges
from .timing import interleaved, ratios
from .tracing import INPUT, Outputs, trace


NAMES = ("PyTorch", "ONNX Runtime", "OpenVINO")
FLOAT, HALF, INT8 = "float32", "bfloat16", "int8 file"
NO_FASTER = 1.02  # ratios up to this, and down to its inverse, are no difference
REPEATS = 5  # batches in one go, so that most find their weights in the caches, as where one model runs
Run = Callable[[], object]


@dataclass(frozen=True)
class Latency:
    """The time of one variant.

    Args:
        engine (`str`): A name in `NAMES`.
        what (`str`): `"float32"`, `"bfloat16"` (in OpenVINO, where the processor computes with it), `"student"`
            (integers simulated in float) or `"int8 file"` (the student exported).
        milliseconds (`float`): Median time of a batch.
        speed_up (`float`): Median over the rounds of PyTorch's float32 time by this one's.
        spread (`float`): Half the interquartile range of that.
    """

    engine: str
    what: str
    milliseconds: float
    speed_up: float
    spread: float


@dataclass(frozen=True)
class LatencyReport:
    """What [`measure_latency`] found; `print` it.

    Args:
        latencies (`tuple[Latency, ...]`): PyTorch's float32 first.
        bits (`str`): The student's, such as `"W4A4"`.
        image_size, batch_size, threads (`int`): What was run.
        float_bytes, file_bytes (`int`): Sizes of the float32 network's and the student's ONNX file.
        versions (`dict`): Of the engines.
    """

    latencies: tuple[Latency, ...]
    bits: str
    image_size: int
    batch_size: int
    threads: int
    float_bytes: int
    file_bytes: int
    versions: dict[str, str]

    def verdicts(self) -> dict[str, str]:
        """Return for each engine whether the student's file is worth it, beside the fastest float network there."""
        smaller = f"{self.float_bytes / self.file_bytes:.1f} × smaller"
        return {each.engine: f"{smaller}, {self._speed(each)}" for each in self.latencies if each.what == INT8}

    def _speed(self, file: Latency) -> str:
        floats = [each for each in self.latencies if each.engine == file.engine and each.what in (FLOAT, HALF)]
        fastest = max(floats, key=lambda each: each.speed_up)
        ratio = file.speed_up / fastest.speed_up
        if ratio > NO_FASTER:
            return f"{ratio:.2f} × faster than {fastest.what}"
        slower = f"{1 / ratio:.2f} × slower than" if ratio < 1 / NO_FASTER else "no faster than"
        return f"{slower} {fastest.what} here"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return {**asdict(self), "verdicts": self.verdicts()}

    def __str__(self) -> str:
        engines = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        lines = [
            f"{self.bits} student, {self.image_size} px, batch {self.batch_size}, {self.threads} thread(s); {engines}",
            f"{'':27}  {'ms a batch':>10}  speed-up",
        ]
        for each in self.latencies:
            name = f"{each.engine}, {each.what}"
            lines.append(f"{name:<27}  {each.milliseconds:>10.2f}  {each.speed_up:>8.2f} ± {each.spread:.2f}")
        lines.append(f"ONNX files: float32 {self.float_bytes:,} bytes, int8 {self.file_bytes:,}")
        lines += [f"{engine}: {verdict}" for engine, verdict in self.verdicts().items()]
        if "OpenVINO" not in self.versions:
            lines.append("OpenVINO is not installed here: pip install sqakd-hf[openvino]")
        return "\n".join(lines)


def measure_latency(
    model: nn.Module | str,
    *,
    image_size: int | None = None,
    batch_size: int = 1,
    threads: int = 1,
    rounds: int = 20,
    signed_activations: bool = False,
    output_field: str | None = None,
) -> LatencyReport:
    """Time the float network, its student and the student's `"int8"` file on this machine's processor.

    The variants run in turn, five batches of noise each in a round. The float network is the student without its
    quantizers. A student without ranges is calibrated on noise, a copy of it: times do not depend on ranges.

    Args:
        model (`nn.Module` or `str`): A student, before its training or after it, or the folder or Hub id of one.
        image_size (`int`, *optional*): Side of the images; by default the model's own.
        batch_size (`int`, *optional*, defaults to 1): Images in a batch.
        threads (`int`, *optional*, defaults to 1): Threads of every engine.
        rounds (`int`, *optional*, defaults to 20): At least 2.
        signed_activations (`bool`, *optional*, defaults to `False`): Of the file, see [`export_onnx`].
        output_field (`str`, *optional*): Which output holds the class logits, for models with several heads.

    Raises:
        `InputError`: No student, a number that is not positive, an operator or a size that can't be exported.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("threads", threads, 1), ("rounds", rounds, 2)):
        check_integer(value, name, least)
    student = require_student(model)
    example = noise(student, image_size)
    student = copy.deepcopy(with_ranges(student, example)).to("cpu", torch.float32).eval()
    bits = student.quantization_plan.bits()
    plain = copy.deepcopy(student)
    dequantize_model(plain)
    images = noise(student, image_size, batch_size)
    with tempfile.TemporaryDirectory() as folder, _torch_threads(threads):
        files = {FLOAT: Path(folder) / "float.onnx", INT8: Path(folder) / "int8.onnx"}
        with tqdm(total=2, desc="Exporting", unit="file", leave=False) as progress:
            export_float(plain, example, files[FLOAT], output_field)
            progress.update()
            export_onnx(
                student,
                files[INT8],
                signed_activations=signed_activations,
                output_field=output_field,
                images=example,
                verify=False,
            )
            progress.update()
        runs: dict[tuple[str, str], Run] = {
            ("PyTorch", FLOAT): functools.partial(predict, plain, {INPUT: images}, output_field),
            ("PyTorch", "student"): functools.partial(predict, student, {INPUT: images}, output_field),
        }
        for what, path in files.items():
            found = engine_runs(path, images, threads, in_float32=what == FLOAT)
            runs |= {(engine, what): run for engine, run in found.items()}
        if _openvino_is_there() and "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            runs["OpenVINO", HALF] = engine_runs(files[FLOAT], images, threads)["OpenVINO"]
        in_order = sorted(runs, key=lambda key: (NAMES.index(key[0]), key[1] == INT8))
        with torch.inference_mode():
            seconds = interleaved({key: functools.partial(repeat, runs[key]) for key in in_order}, rounds)
        float_bytes, file_bytes = (path.stat().st_size for path in files.values())
    first = seconds["PyTorch", FLOAT]
    return LatencyReport(
        tuple(Latency(*key, 1000 * median(times) / REPEATS, *ratios(first, times)) for key, times in seconds.items()),
        bits,
        images.shape[-1],
        batch_size,
        threads,
        float_bytes,
        file_bytes,
        _versions(),
    )


def repeat(run: Run) -> None:
    """Run one batch several times."""
    for _ in range(REPEATS):
        run()


def _versions() -> dict[str, str]:
    """Return the versions of the engines that are installed, by whichever package."""
    versions = {"PyTorch": torch.__version__, "ONNX Runtime": onnxruntime.__version__}
    if _openvino_is_there():
        import openvino

        versions["OpenVINO"] = openvino.__version__.split("-")[0]
    return versions


def _openvino_is_there() -> bool:
    return importlib.util.find_spec("openvino") is not None


@functools.cache
def openvino_core() -> Any:
    """Return the process's one core: after OpenVINO unloads its plugins with the last one, a signal crashes Python."""
    import openvino

    return openvino.Core()


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def export_float(model: nn.Module, example: torch.Tensor, path: Path, output_field: str | None = None) -> None:
    """Write a float network to an ONNX file as students are written.

    Args:
        model (`nn.Module`): The network, on the CPU.
        example (`torch.Tensor`): Images `(B, C, H, W)`.
        path (`Path`): The file.
        output_field (`str`, *optional*): Which output holds the class logits, for models with several heads.
    """
    trace(Outputs(model.eval(), output_field), type(model).__name__, example).save(path)


def engine_runs(path: Path, images: torch.Tensor, threads: int, in_float32: bool = False) -> dict[str, Run]:
    """Return what runs an ONNX file on these images, for each engine that is installed.

    OpenVINO computes what is float in bfloat16 where the processor can, unless `in_float32`.
    """
    pixels = images.numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    runs: dict[str, Run] = {"ONNX Runtime": lambda: session.run(None, {INPUT: pixels})}
    if _openvino_is_there():
        core = openvino_core()
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if in_float32:
            hints["INFERENCE_PRECISION_HINT"] = "f32"
        request = core.compile_model(core.read_model(path), "CPU", hints).create_infer_request()
        runs["OpenVINO"] = lambda: request.infer({0: pixels})
    return runs
