"""`verify_export`: the integers of an ONNX file beside those of the student that it was made of."""

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn
from tqdm import tqdm

from ..conversion.student import quantized_layers
from ..errors import ExportMismatchError, InputError
from ..outputs.forward import Prediction, predict
from ..quantization.quantizers import FakeQuantizer
from .integer_tensors import Placement


# What a student's file may differ by from the student: float operations in another order move a value that lies on
# the threshold between two codes to the other side.
MAX_CODE_DIFFERENCE = 1
MAX_DIFFERING_SHARE = 1e-4
# With 256 codes, and in a layer whose large terms cancel, more values are that near to a threshold than on average.
MAX_DIFFERING_SHARE_OF_ONE = 1e-3
FEW = 3  # codes that may differ among however few
MAX_LOGIT_DIFFERENCE = 1e-4
PLACEMENTS = "sqakd.placements"  # the metadata where a file tells its integers
_BATCH = 32
# Types of activation codes, in numpy and in ONNX.
_STORED = {
    "uint8": (np.uint8, onnx.TensorProto.UINT8),
    "int8": (np.int8, onnx.TensorProto.INT8),
    "float": (np.float32, onnx.TensorProto.FLOAT),
}


@dataclass
class ExportCheck:
    """How far an ONNX file agrees with its student, on some images; ONNX Runtime ran without optimisations.

    Codes are compared layer by layer: each computes on the codes that PyTorch gave the layers before it, so that what
    is counted is each layer's own. Logits are compared both so and with the file running by itself, where one code
    that fell to the other side of a threshold changes what comes after it.

    Args:
        images (`int`): Number of images.
        compared (`dict[str, int]`): Quantizer → how many of its codes were compared.
        differing (`dict[str, int]`): Quantizer → how many of its codes differ, where some do.
        max_code_difference (`int`): Largest difference of a code.
        wrong_weights (`list[str]`): Layers whose stored integers are not the student's.
        layer_logit_difference (`float`): Largest difference of a logit (or a detector's box) on equal codes, as a
            share of the largest one of its image.
        logit_difference (`float`): The same of the file by itself.
        agreement (`float`): Share of positions where student and file, by itself, name the same class.
    """

    images: int = 0
    compared: dict[str, int] = field(default_factory=dict)
    differing: dict[str, int] = field(default_factory=dict)
    max_code_difference: int = 0
    wrong_weights: list[str] = field(default_factory=list)
    layer_logit_difference: float = 0.0
    logit_difference: float = 0.0
    agreement: float = 1.0

    @property
    def codes(self) -> int:
        """Number of activation codes that were compared."""
        return sum(self.compared.values())

    @property
    def differing_share(self) -> float:
        """The share of the codes that differ."""
        return sum(self.differing.values()) / max(self.codes, 1)

    def __str__(self) -> str:
        weights = f"weights of {', '.join(self.wrong_weights)} differ" if self.wrong_weights else "all weights equal"
        different = sum(self.differing.values())
        return (
            f"against PyTorch on {self.images} images: {weights}; layer by layer {different:,} of {self.codes:,} "
            f"codes differ ({self.differing_share:.4%}, by {self.max_code_difference} at most), logits by "
            f"{self.layer_logit_difference:.1e}; as a whole logits by {self.logit_difference:.1e}, the same class for "
            f"{self.agreement:.2%}"
        )

    def require(self) -> None:
        """Raise `ExportMismatchError` where layers differ by more than another order of float operations makes."""
        bounds = (
            ("stored weights", len(self.wrong_weights), 0),
            ("largest difference of a code", self.max_code_difference, MAX_CODE_DIFFERENCE),
            ("differing codes", sum(self.differing.values()), max(FEW, MAX_DIFFERING_SHARE * self.codes)),
            ("differing codes of one quantizer", *self._worst_quantizer()),
            ("relative difference of logits on equal codes", self.layer_logit_difference, MAX_LOGIT_DIFFERENCE),
        )
        failed = [f"{what} {value:.2g} (bound {bound:g})" for what, value, bound in bounds if not value <= bound]
        if failed:
            raise ExportMismatchError(f"The file does not compute what the student does: {'; '.join(failed)}. {self}")

    def _worst_quantizer(self) -> tuple[int, float]:
        """Return how many codes differ, and how many may, of the quantizer where that is furthest apart."""
        bounds = [
            (wrong, max(FEW, MAX_DIFFERING_SHARE_OF_ONE * self.compared[name]))
            for name, wrong in self.differing.items()
        ]
        return max(bounds, key=lambda bound: bound[0] / bound[1], default=(0, FEW))


def verify_export(
    model: nn.Module, onnx_path: str | os.PathLike, images: torch.Tensor, *, output_field: str | None = None
) -> ExportCheck:
    """Run a student and its ONNX file on the same images and compare every code of every layer, and the logits.

    ONNX Runtime runs with all optimisations off: they reorder float operations, which moves codes on a threshold.

    Args:
        model (`nn.Module`): The student.
        onnx_path (`str` or `os.PathLike`): What [`~sqakd_hf.export.export_onnx`] wrote.
        images (`torch.Tensor`): `(B, C, H, W)`, as the student takes them.
        output_field (`str`, *optional*): As given to the export.

    Raises:
        `InputError`: A file that is no export of this student.
    """
    proto = onnx.load(os.fspath(onnx_path))
    stated = {entry.key: entry.value for entry in proto.metadata_props}.get(PLACEMENTS)
    if stated is None:
        raise InputError(f"{os.fspath(onnx_path)!r} was not written by export_onnx: it does not tell its integers.")
    placements = [Placement(**entry) for entry in json.loads(stated)]
    student = copy.deepcopy(model).to("cpu", torch.float32).eval()
    check = ExportCheck(wrong_weights=list(_wrong_weights(student, proto, placements)))
    activations = [placement for placement in placements if placement.kind == "activation"]
    whole, (image_name,) = _session(proto), [value.name for value in proto.graph.input]
    layers = _session(_cut(proto, activations))
    same = positions = 0
    for batch in tqdm(images.float().cpu().split(_BATCH), "Comparing", unit="batch", leave=False):
        prediction, codes = _codes_of(student, batch, output_field)
        given, expected = {image_name: batch.numpy()}, {}
        for placement in activations:
            expected[placement.tensor] = codes[placement.name][placement.call]
            integers = expected[placement.tensor].astype(np.int64) * placement.factor + placement.offset
            given[_given(placement)] = integers.astype(_STORED[placement.storage][0])
        found = _run(layers, given)
        for placement in activations:
            integers = found[placement.tensor].astype(np.float64)
            difference = np.abs((integers - placement.offset) / placement.factor - expected[placement.tensor])
            check.compared[placement.name] = check.compared.get(placement.name, 0) + difference.size
            if wrong := int((difference != 0).sum()):  # NaN differs as well
                check.differing[placement.name] = check.differing.get(placement.name, 0) + wrong
                largest = difference.max()
                largest = int(np.ceil(largest)) if np.isfinite(largest) else 256
                check.max_code_difference = max(check.max_code_difference, largest)
        by_itself = _run(whole, {image_name: batch.numpy()})
        check.images += len(batch)
        for name, values in (("logits", prediction.logits), ("pred_boxes", prediction.boxes)):
            if values is not None:
                # np.maximum, unlike max, passes NaN on.
                layers_apart, apart = (_relative(outputs[name], values.numpy()) for outputs in (found, by_itself))
                check.layer_logit_difference = float(np.maximum(check.layer_logit_difference, layers_apart))
                check.logit_difference = float(np.maximum(check.logit_difference, apart))
        classes = Prediction(torch.from_numpy(by_itself["logits"])).classes() == prediction.classes()
        same, positions = same + int(classes.sum()), positions + classes.numel()
    check.agreement = same / max(positions, 1)
    return check


def _session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, inputs), strict=True))


def _given(placement: Placement) -> str:
    return f"{placement.tensor}.given"


def _cut(proto: onnx.ModelProto, activations: list[Placement]) -> onnx.ModelProto:
    """Return the graph whose layers take their codes as inputs, while the codes that it computes are outputs."""
    cut = onnx.ModelProto()
    cut.CopyFrom(proto)
    tensors = {placement.tensor: _given(placement) for placement in activations}
    for node in cut.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = tensors.get(name, name)
    for placement in activations:
        kind = _STORED[placement.storage][1]
        cut.graph.input.append(onnx.helper.make_tensor_value_info(_given(placement), kind, None))
        cut.graph.output.append(onnx.ValueInfoProto(name=placement.tensor))
    return cut


def _relative(values: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference as a share of the largest magnitude of its image."""
    values, expected = (array.reshape(len(expected), -1) for array in (values, expected))
    largest = np.maximum(np.abs(expected).max(1), np.finfo(np.float32).tiny)
    return float((np.abs(values - expected).max(1) / largest).max())


@torch.no_grad()
def _codes_of(
    student: nn.Module, images: torch.Tensor, output_field: str | None
) -> tuple[Prediction, dict[str, list[np.ndarray]]]:
    """Return the student's prediction and, for each quantizer, the codes of its calls."""
    codes: dict[str, list[np.ndarray]] = {}
    handles = []
    for name, module in student.named_modules():
        if isinstance(module, FakeQuantizer) and module.role == "activation":

            def note(quantizer: FakeQuantizer, args: tuple, name: str = name) -> None:
                codes.setdefault(name, []).append(quantizer.quantize(args[0]).numpy())

            handles.append(module.register_forward_pre_hook(note))
    try:
        prediction = predict(student, {"pixel_values": images}, output_field)
    finally:
        for handle in handles:
            handle.remove()
    return prediction, codes


def _wrong_weights(student: nn.Module, proto: onnx.ModelProto, placements: list[Placement]) -> Iterator[str]:
    """Yield the layers whose integers in the file are not those of the student."""
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    layers = quantized_layers(student)
    for placement in placements:
        if placement.kind != "weight":
            continue
        layer = layers.get(placement.name)
        if layer is None or placement.tensor not in stored:
            raise InputError(
                f"The file has a layer {placement.name!r} that the student has not: it is of another one."
            )
        integers = numpy_helper.to_array(stored[placement.tensor]).astype(np.int64)
        rows = layer.weight_codes().numpy().astype(np.int64) * placement.factor + placement.offset
        if placement.channel_axis is not None:
            integers = np.moveaxis(integers, placement.channel_axis, 0)
        integers = integers.reshape(rows.shape)
        # Each channel may be a whole multiple, which its scale undoes; a BatchNorm with slope 0 empties it.
        place = np.abs(rows).argmax(1)[:, None]
        largest = np.take_along_axis(rows, place, 1)
        multiples = np.take_along_axis(integers, place, 1) // np.where(largest == 0, 1, largest)
        same = (integers == multiples * rows).all(1)
        if not same.all():
            yield placement.name
