"""What a deploy report says of ONNX Runtime and OpenVINO, held against the kernels that they choose."""

from collections import Counter

import pytest
import torch
from torch import nn

from sqakd_hf import (
    InputError,
    QuantizationConfig,
    build_model,
    deploy_report,
    export_onnx,
    is_calibrated,
    quantize_model,
    quantized_layers,
)
from sqakd_hf.export.latency import openvino_core
from tests.helpers.exporting import noise, optimised, student_of
from tests.helpers.models import TinyConvNet, tiny_vit


pytestmark = pytest.mark.export


# Side of the images, configuration, and how it is exported.
MODELS = {
    "test_resnet": (32, {}, {}),
    "test_resnet, floats added": (32, {"residual_bits": None}, {}),
    "test_resnet, sums": (32, {"residual_bits": 8}, {}),
    # Engines must not quantize by themselves the weight that is left in float between integers.
    "test_resnet, kept": (32, {"modules_to_not_convert": ["layer3.0.conv1"]}, {}),
    "test_resnet, packed": (32, {}, {"container": "packed"}),
    "mobilenetv2_050": (32, {}, {}),  # pools what a convolution puts out
    "test_resnet, signed": (32, {"residual_bits": 7}, {"signed_activations": True}),
    "mobilenetv3_small_050": (32, {}, {}),
    "test_vit": (160, {}, {}),
    "test_vit, packed": (160, {}, {"container": "packed"}),
    "test_vit, signed": (160, {}, {"signed_activations": True}),
}


def build(name):
    torch.manual_seed(0)
    return build_model(f"timm/{name.split(',')[0]}", 10, image_size=MODELS[name][0])


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """A report, made before there are ranges, and the file of the calibrated student."""
    size, config, options = MODELS[request.param]
    student = build(request.param)
    quantize_model(student, QuantizationConfig(weight_bits=4, activation_bits=4, **config))
    report = deploy_report(student, **options)
    assert not is_calibrated(student)
    path = tmp_path_factory.mktemp("engines") / "a.onnx"
    student = student_of(build(request.param), size, weight_bits=4, activation_bits=4, **config)
    export_onnx(student, path, image_size=size, verify=False, **options)
    return request.param, report, path


def test_onnx_runtime_has_the_kernels_that_the_report_says(exported):
    name, report, path = exported
    found = Counter(node.op_type for node in optimised(path).node)
    said = Counter(kernel.operator for kernel in report.with_integers("onnxruntime"))
    assert found["QLinearConv"] == said["Conv"]
    # The head is a product of few numbers, whose optimised form depends on its bias.
    assert said["MatMul"] <= found["MatMulIntegerToFloat"] + found["QGemm"] <= said["MatMul"] + said["Gemm"]
    left = [kernel.layer for kernel in report.kernels if kernel.operator == "Conv" and kernel.onnxruntime is not None]
    in_float = ("mobilenetv3", "test_vit", "test_resnet, floats", "test_resnet, signed")
    assert bool(left) is name.startswith(in_float)


def test_openvino_has_the_kernels_that_the_report_says(exported):
    name, report, path = exported
    core = openvino_core()
    compiled = core.compile_model(core.read_model(path), "CPU")
    types = Counter()
    for node in compiled.get_runtime_model().get_ops():
        facts = {key: str(value.value) for key, value in node.get_rt_info().items()}
        if facts.get("layerType") in ("Convolution", "FullyConnected", "MatMul"):
            types[facts["runtimePrecision"]] += 1
    said = report.with_integers("openvino")
    # Signed, the head's input of 256 codes from 0 is no int8; this OpenVINO finds integers even in float operations.
    assert len(said) == len(report.kernels) - (name == "test_resnet, signed")
    assert len(said) <= types["u8"] + types["i8"] <= len(report.kernels)


@pytest.mark.parametrize("name", ["test_resnet, signed", "test_vit, signed", "test_resnet"])
def test_tensorrt_wants_signed_activations(name):
    size, config, options = MODELS[name]
    report = deploy_report(student_of(build(name), size, weight_bits=4, activation_bits=4, **config), **options)
    reasons = [kernel.tensorrt for kernel in report.kernels if kernel.tensorrt is not None]
    if options:
        assert reasons == ["its input is in float"] * (name == "test_resnet, signed")
    else:
        assert len(reasons) == len(report.kernels) and all("signed_activations=True" in each for each in reasons)


def test_what_has_no_integers_has_a_reason():
    model = student_of(TinyConvNet(), quantizer="dorefa", weight_bits=2, activation_bits=None, first_last_bits=8)
    reasons = {kernel.layer: kernel.openvino for kernel in deploy_report(model, image_size=16).kernels}
    assert reasons["body.0"] == "its input is in float"
    assert reasons["stem.0"].startswith("its weight has a zero point between two codes")


def test_integers_that_an_engine_can_not_read_have_a_reason():
    for bits, open_in_openvino in ((2, False), (4, True)):
        packed = deploy_report(student_of(tiny_vit(), weight_bits=bits, first_last_bits=8), "packed")
        _, *layers = packed.kernels  # the first is a convolution that puts out floats
        assert {kernel.onnxruntime for kernel in layers} == {None}
        # The file is not opened at all: no layer of it has a kernel, whatever its own bits.
        reason = f"it opens no file with {bits}-bit integers (container='int8')"
        assert {kernel.openvino for kernel in packed.kernels} == ({None} if open_in_openvino else {reason})
        assert {kernel.tensorrt for kernel in packed.kernels} == {reason}


class Twice(nn.Module):
    """A convolution that is called before a quantizer, and before a sigmoid."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.twice, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.twice(self.stem(x)).relu()
        return self.head(self.twice(x).sigmoid().mean((2, 3)))


@pytest.mark.parametrize("container", ["int8", "packed"])
def test_of_several_calls_the_worst_counts(container):
    report = deploy_report(student_of(Twice(), weight_bits=2), container)
    reasons = {kernel.layer: kernel.onnxruntime for kernel in report.kernels}
    assert reasons["stem"] is None and "goes to Sigmoid in float" in reasons["twice"]


@pytest.mark.parametrize("options", [{}, {"container": "packed"}, {"signed_activations": True}], ids=str)
@pytest.mark.parametrize(("quantizer", "bits"), [("ewgs", 3), ("ewgs", 8), ("dorefa", 8), ("lsq", 4)])
def test_openvino_computes_what_pytorch_does(quantizer, bits, options, tmp_path):
    """With zero points that are no whole numbers as well, which OpenVINO rounds in dequantizations."""
    torch.manual_seed(0)
    widths = {"weight_bits": bits, "activation_bits": 4, "first_last_bits": bits}
    # Of the 6,272 values before pooling one is 3e-6 of a step from a tie, which may fall to either side.
    student = student_of(TinyConvNet(), quantizer=quantizer, residual_bits=None, **widths)
    if quantizer == "ewgs":
        with torch.no_grad():  # as after training
            for layer in quantized_layers(student).values():
                layer.weight_quantizer.upper *= 1 + 0.1 * torch.rand(layer.weight_quantizer.upper.shape)
    report = export_onnx(student, tmp_path / "a.onnx", images=noise(), **options)
    assert any(placement.kind == "weight" for placement in report.in_float) is (quantizer != "lsq")
    core = openvino_core()
    compiled = core.compile_model(core.read_model(tmp_path / "a.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = student(noise())
    torch.testing.assert_close(
        torch.from_numpy(compiled(noise().numpy())["logits"]), expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
    )


def test_a_convolution_before_an_addition_is_told_what_would_help():
    report = deploy_report(student_of(build("test_resnet"), 32, weight_bits=4, residual_bits=None))
    assert "goes to Add in float (residual_bits='auto' makes it integers)" in str(report)
    assert set(report.to_dict()) == {"kernels", "coverage", "file_bytes", "container", "verdicts"}


def test_the_verdict_counts_multiplications():
    slow, fast = (
        deploy_report(student_of(build("test_resnet"), 32, weight_bits=4, residual_bits=bits))
        for bits in (None, "auto")
    )
    assert fast.integer_share("onnxruntime") == fast.integer_share("openvino") == 1
    macs = {layer.name: layer.macs for layer in student_of(build("test_resnet"), 32).quantization_plan}
    without = sum(macs[kernel.layer] for kernel in slow.kernels if kernel.onnxruntime is not None)
    assert slow.integer_share("onnxruntime") == pytest.approx(1 - without / sum(macs.values())) != 1
    assert fast.verdict("openvino").endswith("integers in 16 of 16 layers, 100% of the MACs: faster")
    assert slow.integer_share("onnxruntime") < 0.75 and slow.verdict("onnxruntime").endswith("no faster, or hardly")
    assert fast.integer_share("tensorrt") == 0 and f"TensorRT: {fast.verdict('tensorrt')}" in str(fast)
    ratio = 4 * fast.coverage.weights / fast.file_bytes
    assert fast.verdict("openvino").startswith(f"{ratio:.1f} × smaller than float32; ")


def test_attention_in_float_counts_as_float():
    report = deploy_report(student_of(build("test_vit"), 160, weight_bits=8))
    layers = sum(kernel.macs for kernel in report.with_integers("openvino"))
    assert layers < report.coverage.macs + report.coverage.attention_macs
    assert report.integer_share("openvino") == layers / (report.coverage.macs + report.coverage.attention_macs)


def test_bytes_are_those_of_the_file(tmp_path):
    student = student_of(TinyConvNet(), weight_bits=4)
    report = deploy_report(student, image_size=16)
    size = export_onnx(student, tmp_path / "a.onnx", images=noise()).file_bytes
    assert report.file_bytes == size


def test_a_float_model_is_refused():
    with pytest.raises(InputError, match="is no student of quantize_model"):
        deploy_report(nn.Sequential(nn.Conv2d(3, 4, 3)))


class Attends(nn.Module):
    """Cross-attention, whose in-projection is one weight in three parts, and a convolution that is the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.query = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, pixel_values):
        x = self.stem(pixel_values)
        tokens = x.flatten(2).transpose(1, 2)
        attended = self.attention(self.query(tokens), tokens, tokens)[0]
        return self.head(attended.transpose(1, 2).reshape(x.shape))


def test_parts_of_a_weight_and_a_convolution_that_is_the_output():
    kernels = {
        kernel.layer: kernel for kernel in deploy_report(student_of(Attends(), weight_bits=4), image_size=16).kernels
    }
    assert kernels["attention"].operator == "MatMul" and kernels["attention"].openvino is None
    assert kernels["head"].onnxruntime.endswith("goes to the output in float")
