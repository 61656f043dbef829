"""`export_onnx`: a student as an ONNX file, checked before it is there; `deploy_report`: what it will be."""

import contextlib
import json
import os
import secrets
import stat
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from .._text import first_line, quote
from ..conversion.student import is_calibrated
from ..data.hub_access import hub_id
from ..errors import InputError
from ..hub.preprocessing import Preprocessing
from .engines import DeployReport, kernels
from .integer_tensors import Placement
from .lowering import CONTAINERS, lower
from .preparation import expected_images, noise, require_student, with_ranges
from .symbolic_model import Symbolic
from .tracing import OPSET, trace
from .verification import PLACEMENTS, ExportCheck, verify_export


OPSET_OF_INT2 = 25


@dataclass(frozen=True)
class ExportReport:
    """What [`export_onnx`] wrote.

    Args:
        path (`Path`): The file.
        file_bytes (`int`): Its size.
        opset (`int`): The version of ONNX's operators that it needs.
        placements (`tuple[Placement, ...]`): What became of each weight and each quantizer.
        check (`ExportCheck`, *optional*): How far it agrees with the student; `None` where it was not asked.
    """

    path: Path
    file_bytes: int
    opset: int
    placements: tuple[Placement, ...]
    check: ExportCheck | None

    @property
    def in_float(self) -> tuple[Placement, ...]:
        """The weights and quantizers whose values float operations compute, with the reason."""
        return tuple(placement for placement in self.placements if placement.reason is not None)

    def __str__(self) -> str:
        weights = sum(placement.kind == "weight" for placement in self.placements)
        lines = [
            f"{self.path}: {self.file_bytes:,} bytes, opset {self.opset}, {weights} weights as integers, "
            f"{len(self.placements) - weights} quantizers"
        ]
        reasons: dict[str, list[str]] = {}
        for placement in self.in_float:
            reasons.setdefault(f"{placement.kind}s with {placement.reason}", []).append(placement.name)
        for reason, names in reasons.items():
            lines.append(
                f"by float operations: {len(names)} {reason} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
            )
        if self.check is not None:
            lines.append(str(self.check))
        return "\n".join(lines)


def export_onnx(
    model: nn.Module | str,
    path: str | os.PathLike,
    container: str = "int8",
    *,
    signed_activations: bool = False,
    image_size: int | None = None,
    dynamic_image_size: bool = False,
    output_field: str | None = None,
    verify: bool = True,
    images: torch.Tensor | None = None,
) -> ExportReport:
    """Write a quantized student to an ONNX file that computes with the same integers.

    The file takes `pixel_values` `(batch, C, H, W)`, float32, normalised, any batch size, and returns `logits` (and
    `pred_boxes` of a detector). Its metadata has the labels, the preprocessing, the source and the versions.

    Weights are integer initialisers; BatchNorm after a convolution goes into their scales and the bias, which changes
    no code. Activations are uint8, clipped to their own width. Values that no integer type expresses are computed by
    float operations, see [`ExportReport.in_float`].

    Args:
        model (`nn.Module` or `str`): A calibrated student, or the folder or Hub id of a classifier that was saved.
        path (`str` or `os.PathLike`): The file to write; its folder must exist. It is written last, whole, and only if
            the checks pass.
        container (`str`, *optional*, defaults to `"int8"`): `"int8"` holds codes of every width in 8-bit integers, for
            any engine. `"packed"` holds weights of up to 4 bits in 4-bit integers, and of up to 2 bits in 2-bit ones,
            of which ONNX Runtime and OpenVINO make the same 8-bit integers when they open the file: as fast. OpenVINO
            opens no file with 2-bit integers, TensorRT none with either.
        signed_activations (`bool`, *optional*, defaults to `False`): Activations as int8 with a zero point of 0, as
            TensorRT wants them, instead of uint8, which are faster on processors. Of 8 bits only ranges that reach as
            far below 0 as above it fit; others are computed by float operations.
        image_size (`int`, *optional*): Side of the images; by default the model's own.
        dynamic_image_size (`bool`, *optional*, defaults to `False`): Take images of any size, where the model does.
        output_field (`str`, *optional*): Which output holds the class logits, for models with several heads.
        verify (`bool`, *optional*, defaults to `True`): Compare file and student by [`verify_export`].
        images (`torch.Tensor`, *optional*): What to compare on, `(B, C, H, W)`; seeded noise by default.

    Raises:
        `InputError`: A model that is no calibrated student, an operator or a size that can't be exported, a path that
            can't be written.
        `ExportMismatchError`: File and student disagree; nothing is written.
    """
    _check_container(container)
    student = require_student(model)
    if not is_calibrated(student):
        raise InputError("The student has no ranges yet. Run calibrate_model(model, batches) or train it first.")
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"The folder {str(path.parent)!r} does not exist: make it, or choose another path.")
    example = images if images is not None else noise(student, image_size)
    exported, placements = _lowered(student, example, container, signed_activations, dynamic_image_size, output_field)
    proto = _proto(exported)
    onnx.checker.check_model(proto, full_check=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.onnx")
    try:
        with open(temporary, "xb") as file:  # with the permissions of any new file, unlike tempfile's
            file.write(proto.SerializeToString())
        if path.exists():
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        check = None
        if verify:
            check = verify_export(student, temporary, example, output_field=output_field)
            check.require()
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{str(path)!r} can't be written: {error.strerror}.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
    return ExportReport(path, path.stat().st_size, exported.opset_imports[""], tuple(placements), check)


def deploy_report(
    model: nn.Module | str,
    container: str = "int8",
    *,
    signed_activations: bool = False,
    image_size: int | None = None,
    output_field: str | None = None,
) -> DeployReport:
    """Tell which layers of a student will have integer kernels in which engine: before its training, or after it.

    The student is traced and lowered as for [`export_onnx`], and nothing is written. One that has no ranges yet is
    calibrated on noise for that, a copy of it: kernels depend on what is quantized, not on where ranges lie.

    Args:
        model (`nn.Module` or `str`): After [`quantize_model`], or the folder or Hub id of a saved classifier.
        container, signed_activations (*optional*): See [`export_onnx`].
        image_size (`int`, *optional*): Side of the images; by default the model's own.
        output_field (`str`, *optional*): Which output holds the class logits, for models with several heads.
    """
    _check_container(container)
    student = require_student(model)
    example = noise(student, image_size)
    student = with_ranges(student, example)
    exported, placements = _lowered(student, example, container, signed_activations, False, output_field)
    size = _proto(exported).ByteSize()
    plan = student.quantization_plan
    found = kernels(exported.graph, placements, {layer.name: layer.macs for layer in plan})
    return DeployReport(found, plan.coverage(), size, container)


def open_session(path: str | os.PathLike) -> tuple[onnxruntime.InferenceSession, Preprocessing]:
    """Open a file that [`export_onnx`] wrote in ONNX Runtime; return the session and how its images are prepared.

    Raises:
        `InputError`: No file, one that ONNX Runtime can't read, or one without preprocessing in it.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"There is no file {path!r}.")
    try:
        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    except Exception as error:
        raise InputError(f"ONNX Runtime can't read {path!r}: {first_line(error)}") from error
    stated = session.get_modelmeta().custom_metadata_map.get("sqakd.preprocessing")
    if stated is None:
        raise InputError(f"{path!r} does not tell how its images are prepared: it was not exported from a classifier.")
    return session, Preprocessing(**json.loads(stated))


def _check_container(container: str) -> None:
    if container not in CONTAINERS:
        raise InputError(f"container must be one of {quote(CONTAINERS)}, got {container!r}.")


def _lowered(
    student: nn.Module,
    example: torch.Tensor,
    container: str,
    signed_activations: bool,
    dynamic_image_size: bool,
    output_field: str | None,
) -> tuple[ir.Model, list[Placement]]:
    """Return the student's graph with integers and all metadata in it, and what became of its quantizers."""
    exported = trace(Symbolic(student, output_field), type(student).__name__, example, dynamic_image_size).model
    placements = lower(exported, container, signed_activations)
    has_int2 = any("int2" in each.storage for each in placements)
    exported.opset_imports[""], exported.ir_version = (OPSET_OF_INT2, 13) if has_int2 else (OPSET, 10)
    exported.producer_name, exported.producer_version = "sqakd_hf", _version("sqakd_hf")
    exported.metadata_props.update(_metadata(student, example, container))
    exported.metadata_props[PLACEMENTS] = json.dumps([placement.to_dict() for placement in placements])
    return exported, placements


def _proto(exported: ir.Model) -> onnx.ModelProto:
    """Return what a file holds: not the shapes between nodes, which readers infer and which are 3 % of small files."""
    proto = ir.to_proto(exported)
    del proto.graph.value_info[:]
    return proto


def _metadata(student: nn.Module, example: torch.Tensor, container: str) -> dict[str, str]:
    """Return what a user of the file wants to know, by name; all values are text, most of them JSON."""
    expected = expected_images(student)
    facts: dict[str, Any] = {"container": container}
    if expected is not None:
        facts["preprocessing"] = {
            "image_size": example.shape[-1],
            "mean": list(expected.mean),
            "std": list(expected.std),
            "crop_pct": expected.crop_pct,
            "interpolation": expected.interpolation,
        }
        labels = getattr(student.config, "id2label", None) or {}
        facts["labels"] = [labels[number] for number in sorted(labels)]
        facts["source"] = hub_id(getattr(student.config, "_name_or_path", None)) or type(student).__name__
        stated = student.config.quantization_config.to_dict()
        facts["quantization"] = {name: value for name, value in stated.items() if name != "stored"}
    facts["versions"] = {name: _version(name) for name in ("sqakd_hf", "torch", "transformers", "timm")}
    return {f"sqakd.{name}": value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
