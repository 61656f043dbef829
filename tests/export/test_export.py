import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from sqakd_hf import (
    ExportCheck,
    ExportMismatchError,
    InputError,
    QuantizationConfig,
    build_model,
    calibrate_model,
    deploy_report,
    export_onnx,
    list_quantizers,
    measure_latency,
    quantize_model,
    quantized_layers,
    verify_export,
)
from sqakd_hf.export import verification
from sqakd_hf.quantization.quantizers import base
from tests.helpers.exporting import detector, noise, optimised, student_of
from tests.helpers.models import IMAGE_SIZE, TinyConvNet, tiny_vit


pytestmark = pytest.mark.export


class EveryQuantizer(nn.Module):
    """A convolution with BatchNorm and a linear layer for each registered quantizer, one after the other."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        names = [name.replace("+", "_plus") for name in list_quantizers()]
        self.first = nn.Conv2d(3, 8, 3)
        self.convs = nn.ModuleDict({name: nn.Conv2d(8, 8, 3, padding=1, bias=False) for name in names})
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(8) for name in names})
        self.linears = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
        self.last = nn.Linear(8, 4)

    def forward(self, pixel_values):
        x = self.first(pixel_values)
        for number, name in enumerate(self.convs):
            x = self.norms[name](self.convs[name](x))
            x = x.relu() if number % 2 else x  # unsigned and signed inputs
            x = self.linears[name](x.movedim(1, -1)).movedim(-1, 1)
        return self.last(x.mean((2, 3)))


def student_of_every_quantizer(bits):
    overrides = {
        f"{kind}.{name.replace('+', '_plus')}": {"quantizer": name}
        for name in list_quantizers()
        for kind in ("convs", "linears")
    }
    widths = {"weight_bits": bits, "activation_bits": bits, "first_last_bits": bits}
    return student_of(EveryQuantizer(), overrides=overrides, **widths)


def initialisers(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def change(proto, name, function):
    """Replace an initialiser by what `function` makes of it."""
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    before = numpy_helper.to_array(tensor)
    after = np.asarray(function(before)).astype(before.dtype)
    tensor.CopyFrom(numpy_helper.from_array(after, name))


def run(path, images, level="ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])


class TestEveryQuantizer:
    @pytest.mark.parametrize("bits", range(1, 9))
    def test_computes_with_the_codes_of_the_student(self, bits, tmp_path):
        student = student_of_every_quantizer(bits)
        for container in ("int8", "packed"):
            path = tmp_path / f"{container}.onnx"
            report = export_onnx(student, path, container, images=noise())
            check = report.check
            assert check.wrong_weights == [] and check.max_code_difference <= 1
            assert sum(check.differing.values()) <= 3 and check.layer_logit_difference < 1e-4
            names = {placement.name for placement in report.placements}
            layers = quantized_layers(student)
            assert names == set(layers) | {f"{name}.input_quantizer" for name in layers}
            stored = initialisers(path)
            for placement in report.placements:
                if placement.kind == "weight":
                    # Whole numbers alone: no float copy of the weight lies beside them.
                    assert stored[placement.tensor].dtype.kind in "iu" or "int" in str(stored[placement.tensor].dtype)
            weights = max(layer.stored_weight.numel() for layer in layers.values())
            assert all(array.size < weights for array in stored.values() if array.dtype == np.float32)
            assert "BatchNormalization" not in operators(path)

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_so_do_signed_activations(self, bits, tmp_path):
        student = student_of_every_quantizer(bits)
        report = export_onnx(student, tmp_path / "a.onnx", signed_activations=True, images=noise())
        check = report.check
        assert check.wrong_weights == [] and check.max_code_difference <= 1
        assert sum(check.differing.values()) <= 3 and check.layer_logit_difference < 1e-4
        activations = [placement for placement in report.placements if placement.kind == "activation"]
        in_float = [placement for placement in activations if placement.reason is not None]
        assert {placement.storage for placement in activations if placement.reason is None} <= {"int8"}
        # Only 256 codes that start at 0 need more than int8 has.
        assert bool(in_float) is (bits == 8)
        assert all("do not fit into int8" in placement.reason for placement in in_float)
        # TensorRT's rules: zero points of 0, one scale for an activation, nothing computes on integers.
        proto, stored = onnx.load(tmp_path / "a.onnx"), initialisers(tmp_path / "a.onnx")
        users = {}
        for node in proto.graph.node:
            for name in node.input:
                users.setdefault(name, []).append(node.op_type)
        quantizing = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
        assert len(quantizing) == len(activations) - len(in_float)
        for node in quantizing:
            assert stored[node.input[1]].shape == () and stored[node.input[1]] > 0
            assert stored[node.input[2]].dtype == np.int8 and stored[node.input[2]] == 0
            assert users[node.output[0]] == ["DequantizeLinear"]
        for node in proto.graph.node:
            if node.op_type == "DequantizeLinear":
                assert len(node.input) == 2 or stored[node.input[2]] == 0
        # Of weights too, also those whose values float operations compute.
        weights = [placement.tensor for placement in report.placements if placement.kind == "weight"]
        assert {stored[name].dtype for name in weights} == {np.dtype(np.int8)}
        assert {user for name in weights for user in users[name]} == {"DequantizeLinear"}


class TestRanges:
    def test_that_hold_no_zero_are_float_operations_and_named(self, tmp_path):
        student = student_of(TinyConvNet(), quantizer="ewgs", weight_bits=3, integer_zero_point=False)
        with torch.no_grad():  # as after training: the two ends are free
            for layer in quantized_layers(student).values():
                layer.weight_quantizer.upper *= 1.1
                layer.input_quantizer.lower -= 0.013
        report = export_onnx(student, tmp_path / "a.onnx", images=noise())
        assert {placement.kind for placement in report.in_float} == {"weight", "activation"}
        assert "integer_zero_point=False" in str(report) and "zero point of its own for each channel" in str(report)
        assert sum(report.check.differing.values()) <= 3

    @pytest.mark.parametrize("container", ["int8", "packed"])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_that_hold_no_zero_cost_nothing_when_it_runs(self, bits, container, tmp_path):
        student = student_of(
            TinyConvNet(), quantizer="ewgs", weight_bits=bits, first_last_bits=bits, integer_zero_point=False
        )
        with torch.no_grad():
            for layer in quantized_layers(student).values():
                layer.weight_quantizer.upper *= 1 + torch.rand(layer.weight_quantizer.upper.shape)
        report = export_onnx(student, tmp_path / "a.onnx", container, images=noise())
        assert sum(placement.kind == "weight" for placement in report.in_float) == len(quantized_layers(student))
        graph = optimised(tmp_path / "a.onnx")
        computed = {output for node in graph.node for output in node.output}
        products = [node for node in graph.node if node.op_type in ("Conv", "FusedConv", "Gemm")]
        assert len(products) == len(quantized_layers(student))
        assert not any(node.input[1] in computed for node in products)

    def test_of_a_whole_weight(self, tmp_path):
        student = student_of(TinyConvNet(), per_channel=False, weight_bits=4)
        assert export_onnx(student, tmp_path / "a.onnx", images=noise()).check.wrong_weights == []

    def test_that_are_whole_and_hold_no_zero(self, tmp_path):
        student = student_of(TinyConvNet(), quantizer="ewgs", activation_bits=4, integer_zero_point=False)
        quantizer = student.body[0].input_quantizer
        with torch.no_grad():
            quantizer.lower.fill_(1.0)
            quantizer.upper.fill_(1.0 + 15 * 0.125)
        assert quantizer.qparams()[1].item() == -8
        report = export_onnx(student, tmp_path / "a.onnx", images=noise())
        assert "body.0.input_quantizer" in {placement.name for placement in report.in_float}

    @pytest.mark.parametrize("quantizer", list_quantizers())
    def test_pixels_that_are_ties_get_the_same_codes(self, quantizer, tmp_path):
        """8-bit images normalised to [-1, 1] lie between the codes of that range, each of them."""
        generator = torch.Generator().manual_seed(0)
        images = (torch.randint(256, (8, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator) / 255 - 0.5) / 0.5
        images[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
        model = TinyConvNet().train()
        model(images)
        quantize_model(model, QuantizationConfig(quantizer, weight_bits=4, quantizer_kwargs={"first_range": "method"}))
        calibrate_model(model, [images], disable_progress=True)
        for signed in (False, True):
            report = export_onnx(model.eval(), tmp_path / "a.onnx", signed_activations=signed, images=images)
            assert report.check.differing.get("stem.0.input_quantizer", 0) == 0


class TestTransforms:
    """What a registered quantizer does in front of its range is in the file."""

    @pytest.mark.parametrize(
        "transform",
        [lambda self, x: x.sign() * x.abs().sqrt(), lambda self, x: torch.tanh(x) * self.upper, lambda self, x: x - 1],
        ids=["square root", "tanh of the range", "shift"],
    )
    @pytest.mark.parametrize("options", [{}, {"signed_activations": True}], ids=["uint8", "int8"])
    def test_of_activations_are_exported(self, transform, options, monkeypatch, tmp_path):
        class Companded(base.FakeQuantizer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.upper = self.new_range_parameter()

            def init_range(self, x):
                self.set_range(upper=self.rows(x).abs().amax(1))

            def clip_range(self, x=None):
                return (-self.upper if self.signed else torch.zeros_like(self.upper)), self.upper

        for role in base.ROLES:
            monkeypatch.setitem(base._REGISTRY, ("companded", role), type("Own", (Companded,), {}))
        base._REGISTRY["companded", "activation"].transform = transform
        student = student_of(TinyConvNet(), quantizer="companded", weight_bits=4, activation_bits=4)
        report = export_onnx(student, tmp_path / "student.onnx", **options)
        assert report.check.codes and report.check.max_code_difference <= 1


class Bounded(nn.Module):
    """Quantizers behind what they can be moved in front of: bounds, pooling, concatenation."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.three, self.head = nn.Conv2d(10, 8, 3), nn.Linear(8, 4)

    def forward(self, pixel_values):
        x = torch.cat([nn.functional.relu6(self.one(pixel_values)), self.two(pixel_values)], 1)
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        return self.head(nn.functional.hardtanh(self.three(x), -0.5, 0.4).mean((2, 3)))


class TestPlacement:
    @pytest.mark.parametrize("bits", [2, 4, 7])
    def test_signed_activations_are_bounded_once_in_front(self, bits, tmp_path):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten()]
        student = student_of(nn.Sequential(*layers, nn.LazyLinear(4)), weight_bits=bits, activation_bits=bits)
        report = export_onnx(student, tmp_path / "a.onnx", signed_activations=True, images=noise())
        assert sum(report.check.differing.values()) <= 3 and report.check.agreement == 1
        # One for each of the two inner convolutions; images and the head have 8 bits around 0.
        found = operators(tmp_path / "a.onnx")
        assert found.count("Clip") == 2 and not {"Relu", "Min", "Max"} & set(found)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_quantizers_follow_what_computes_their_input(self, bits, tmp_path):
        widths = {"weight_bits": bits, "activation_bits": bits, "first_last_bits": 8}
        student = student_of(Bounded(), **widths)
        path = tmp_path / "a.onnx"
        report = export_onnx(student, path, images=noise())
        assert sum(report.check.differing.values()) <= 3 and report.check.agreement == 1
        graph = onnx.load(path).graph
        producer = {output: node for node in graph.node for output in node.output}
        before = [
            producer[node.input[0]].op_type
            for node in graph.node
            if node.op_type == "QuantizeLinear" and node.input[0] in producer
        ]
        # Two convolutions in front of the concatenation; the mean in front of the head.
        assert sorted(before) == ["Conv", "Conv", "ReduceMean"]
        pool = next(node for node in graph.node if node.op_type == "MaxPool")
        values = onnx.shape_inference.infer_shapes(onnx.load(path)).graph.value_info
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        assert types[pool.output[0]] == onnx.TensorProto.UINT8

    def test_a_value_that_others_use_keeps_its_bounds(self, tmp_path):
        class Residual(nn.Module):
            num_classes = 4

            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
                self.head = nn.Linear(6, 4)

            def forward(self, pixel_values):
                x = self.one(pixel_values).relu()
                return self.head((x + self.two(x)).mean((2, 3)))

        student = student_of(Residual(), weight_bits=4)
        report = export_onnx(student, tmp_path / "a.onnx", images=noise())
        assert sum(report.check.differing.values()) <= 3 and "Relu" in operators(tmp_path / "a.onnx")


class Shared(nn.Module):
    """Layers that are called several times, whose results are equal or not used."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.twice = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, pixel_values):
        first = self.stem(pixel_values)
        x = self.twice(first) + self.twice(first)
        heads = [self.head(features.mean((2, 3))) for features in (first, self.twice(x.relu()))]
        return heads[-1]


def test_layers_that_are_called_several_times(tmp_path):
    report = export_onnx(student_of(Shared(), weight_bits=4, activation_bits=4), tmp_path / "a.onnx", images=noise())
    assert sum(report.check.differing.values()) <= 3 and report.check.agreement == 1
    calls = [placement.call for placement in report.placements if placement.name == "twice.input_quantizer"]
    assert sorted(calls) == [0, 1, 2]


class TestBatchNorm:
    def test_a_slope_of_zero_and_of_both_signs_folds(self, tmp_path):
        student = student_of(TinyConvNet(), weight_bits=4)
        with torch.no_grad():
            student.stem[1].weight[:3] = torch.tensor([0.0, -2.0, 1.0])
        report = export_onnx(student, tmp_path / "a.onnx", images=noise())
        assert "BatchNormalization" not in operators(tmp_path / "a.onnx")
        assert report.check.layer_logit_difference < 1e-4

    def test_stays_where_an_integer_has_no_negative(self, tmp_path):
        student = student_of(TinyConvNet(), weight_bits=8)
        with torch.no_grad():
            student.stem[0].weight[1, 0, 0, 0] = -1e3  # the code of -128
            student.stem[1].weight[1] = -1.0
        export_onnx(student, tmp_path / "a.onnx", images=noise())
        assert operators(tmp_path / "a.onnx").count("BatchNormalization") == 1


class TestFile:
    @pytest.fixture(scope="class")
    def exported(self, tmp_path_factory):
        """timm's test_resnet at W2A2 and W4A4: students and their files."""
        folder = tmp_path_factory.mktemp("export")
        found = {}
        for bits in (2, 4):
            torch.manual_seed(0)
            model = build_model("timm/test_resnet", 10, image_size=32)
            student = student_of(model, 32, weight_bits=bits, activation_bits=bits)
            paths = {container: folder / f"{container}{bits}.onnx" for container in ("int8", "packed")}
            reports = {c: export_onnx(student, path, c, images=noise(size=32)) for c, path in paths.items()}
            found[bits] = student, reports
        return found

    def test_passes_the_checker_and_takes_any_batch(self, exported):
        student, reports = exported[4]
        path = reports["int8"].path
        onnx.checker.check_model(onnx.load(path), full_check=True)
        for count in (1, 5):
            images = noise(count, 32, seed=count)
            with torch.no_grad():
                torch.testing.assert_close(
                    run(path, images, "ORT_DISABLE_ALL"), student(images).logits, rtol=1e-3, atol=1e-3
                )

    def test_has_one_byte_for_each_weight_or_the_narrowest_type(self, exported, tmp_path):
        for bits, (student, reports) in exported.items():
            weights = sum(layer.stored_weight.numel() for layer in quantized_layers(student).values())
            others = 16 * sum(p.numel() for p in student.parameters() if p.dim() < 2)  # scales, biases
            # What a graph itself takes is little beside the weights of a network that is used.
            assert reports["int8"].file_bytes < 1.05 * weights + others + 30_000
            first_and_last = [
                layer for layer in quantized_layers(student).values() if layer.weight_quantizer.bits == 8
            ]
            wide = sum(layer.stored_weight.numel() for layer in first_and_last)
            packed = (weights - wide) * bits / 8 + wide
            assert packed < reports["packed"].file_bytes < packed + others + 30_000
            assert reports["packed"].opset == (25 if bits == 2 else 21)

    @pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
    def test_packed_computes_what_int8_does_by_the_same_kernels(self, exported, level):
        for _, reports in exported.values():
            int8, packed = (run(reports[container].path, noise(size=32), level) for container in ("int8", "packed"))
            assert torch.equal(int8, packed)
            int8, packed = (
                Counter(node.op_type for node in optimised(reports[container].path).node)
                for container in ("int8", "packed")
            )
            assert int8 == packed and int8["QLinearConv"] > 0

    def test_tells_what_it_is(self, exported):
        facts = {entry.key: entry.value for entry in onnx.load(exported[2][1]["int8"].path).metadata_props}
        assert json.loads(facts["sqakd.preprocessing"])["image_size"] == 32
        assert len(json.loads(facts["sqakd.labels"])) == 10
        assert facts["sqakd.container"] == "int8"
        assert set(json.loads(facts["sqakd.versions"])) == {"sqakd_hf", "torch", "transformers", "timm"}
        assert json.loads(facts["sqakd.quantization"])["weight_bits"] == 2

    def test_optimised_it_names_the_same_classes(self, exported):
        for student, reports in exported.values():
            images = noise(64, 32, seed=9)
            with torch.no_grad():
                expected = student(images).logits.argmax(1)
            for report in reports.values():
                assert (run(report.path, images).argmax(1) == expected).float().mean() > 0.95

    def test_a_changed_file_is_found_out(self, exported, tmp_path):
        student, reports = exported[4]
        images = noise(size=32)
        assert not verify_export(student, reports["int8"].path, images).wrong_weights
        proto = onnx.load(reports["int8"].path)
        placement = next(p for p in reports["int8"].placements if p.kind == "weight" and p.levels == 16)
        change(proto, placement.tensor, lambda values: values + (np.arange(values.size).reshape(values.shape) == 7))
        onnx.save(proto, tmp_path / "changed.onnx")
        check = verify_export(student, tmp_path / "changed.onnx", images)
        assert check.wrong_weights == [placement.name]
        with pytest.raises(ExportMismatchError, match="stored weights 1"):
            check.require()

    def test_a_changed_range_is_found_out(self, exported, tmp_path):
        student, reports = exported[4]
        proto = onnx.load(reports["int8"].path)
        quantizer = next(p.name for p in reports["int8"].placements if p.kind == "activation" and p.levels == 16)
        change(proto, f"{quantizer}.scale", lambda scale: 1.1 * scale)
        onnx.save(proto, tmp_path / "changed.onnx")
        check = verify_export(student, tmp_path / "changed.onnx", noise(size=32))
        assert check.differing[quantizer] > 100
        with pytest.raises(ExportMismatchError, match="differing codes of one quantizer"):
            check.require()

    def test_a_number_that_is_none_is_found_out(self, exported, tmp_path):
        student, reports = exported[4]
        proto = onnx.load(reports["int8"].path)
        change(proto, "timm_model.fc.weight_scale", lambda scale: np.full_like(scale, np.nan))
        onnx.save(proto, tmp_path / "changed.onnx")
        check = verify_export(student, tmp_path / "changed.onnx", noise(size=32))
        with pytest.raises(ExportMismatchError, match="relative difference of logits on equal codes nan"):
            check.require()

    def test_others_may_read_it_as_the_folder_says(self, exported, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "umask", None)  # of the whole process: other threads write files meanwhile
        student, reports = exported[4]
        (tmp_path / "usual").touch()
        assert reports["int8"].path.stat().st_mode == (tmp_path / "usual").stat().st_mode
        (tmp_path / "own.onnx").touch(0o600)
        report = export_onnx(student, tmp_path / "own.onnx", verify=False, image_size=32)
        assert report.path.stat().st_mode & 0o777 == 0o600
        new = export_onnx(student, tmp_path / "new.onnx", verify=False, image_size=32)
        assert new.path.stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_of_another_student_is_refused(self, exported, tmp_path):
        other = student_of(TinyConvNet())
        with pytest.raises(InputError, match="it is of another one"):
            verify_export(other, exported[4][1]["int8"].path, noise())
        proto = onnx.load(exported[4][1]["int8"].path)
        del proto.metadata_props[:]
        onnx.save(proto, tmp_path / "plain.onnx")
        with pytest.raises(InputError, match="was not written by export_onnx"):
            verify_export(other, tmp_path / "plain.onnx", noise())


class TestModels:
    def test_attention_and_a_model_of_transformers(self, tmp_path):
        student = student_of(tiny_vit(), weight_bits=4, activation_bits=4, attention_bits=8)
        report = export_onnx(student, tmp_path / "a.onnx", images=noise())
        assert sum("attention_quantizers" in placement.name for placement in report.placements) == 8
        assert report.in_float == () and sum(report.check.differing.values()) <= 3

    def test_a_saved_student_by_its_folder(self, tmp_path):
        student = student_of(tiny_vit(), weight_bits=2)
        student.save_pretrained(tmp_path / "student")
        report = export_onnx(str(tmp_path / "student"), tmp_path / "a.onnx")
        assert not verify_export(student, report.path, noise()).wrong_weights

    def test_images_of_any_size(self, tmp_path):
        student = student_of(TinyConvNet())
        export_onnx(student, tmp_path / "a.onnx", images=noise(), dynamic_image_size=True)
        images = noise(2, 24)
        with torch.no_grad():
            torch.testing.assert_close(run(tmp_path / "a.onnx", images, "ORT_DISABLE_ALL"), student(images))

    def test_a_detector_and_a_change_of_its_boxes(self, tmp_path):
        student = student_of(detector(), 32, weight_bits=4)
        path = tmp_path / "a.onnx"
        export_onnx(student, path, images=noise(size=32))
        assert [value.name for value in onnx.load(path).graph.output] == ["logits", "pred_boxes"]
        proto = onnx.load(path)
        producer = {output: node for node in proto.graph.node for output in node.output}
        boxes = producer[producer["pred_boxes"].input[0]]  # the sum in front of the sigmoid
        bias = next(name for name in boxes.input if name not in producer)
        change(proto, bias, lambda values: values + 5)
        onnx.save(proto, tmp_path / "changed.onnx")
        with pytest.raises(ExportMismatchError, match="relative difference of logits on equal codes"):
            verify_export(student, tmp_path / "changed.onnx", noise(size=32)).require()

    def test_one_channel_and_no_name_of_this_machine(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(4))
        model(torch.randn(2, 1, 28, 28))
        quantize_model(model)
        calibrate_model(model, [torch.randn(4, 1, 28, 28)], disable_progress=True)
        report = export_onnx(model.eval(), tmp_path / "a.onnx", image_size=28)
        assert report.check.images == 8
        student = student_of(tiny_vit())
        student.save_pretrained(tmp_path / "student")
        export_onnx(str(tmp_path / "student"), tmp_path / "b.onnx", verify=False)
        facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "b.onnx").metadata_props}
        assert "stored" not in json.loads(facts["sqakd.quantization"])
        assert str(tmp_path).encode() not in (tmp_path / "b.onnx").read_bytes()


class TestErrors:
    def test_a_forward_that_fixes_the_number_of_images(self, tmp_path):
        class Fixed(TinyConvNet):
            def forward(self, x):
                return super().forward(x) + torch.zeros(1, 1).expand(len(x), -1)

        student = student_of(Fixed())
        with pytest.raises(InputError, match="Fixed fixes the number of images when it is exported"):
            export_onnx(student, tmp_path / "a.onnx", images=noise())
        assert list(tmp_path.iterdir()) == []

    def test_one_quantizer_that_is_wrong_among_many_codes(self):
        check = ExportCheck(images=8, compared={"small": 24, "large": 10**7}, differing={"small": 8})
        with pytest.raises(ExportMismatchError, match="differing codes of one quantizer 8"):
            check.require()
        ExportCheck(images=8, compared={"small": 24, "large": 10**7}, differing={"small": 3, "large": 900}).require()

    def test_one_quantizer_may_be_nearer_to_thresholds_than_all_are(self):
        compared = {"one": 10**5, "others": 10**7}
        ExportCheck(images=8, compared=compared, differing={"one": 90, "others": 500}).require()
        for differing, message in (({"one": 110}, "one quantizer 1.1e"), ({"others": 2000}, "differing codes 2e")):
            with pytest.raises(ExportMismatchError, match=message):
                ExportCheck(images=8, compared=compared, differing=differing).require()

    def test_leave_no_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(verification, "MAX_LOGIT_DIFFERENCE", -1.0)
        with pytest.raises(ExportMismatchError, match="relative difference of logits"):
            export_onnx(student_of(TinyConvNet()), tmp_path / "a.onnx", images=noise())
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s, f: export_onnx(s, f / "none" / "a.onnx"), "does not exist: make it"),
            (lambda s, f: export_onnx(str(f / "nowhere"), f / "a.onnx"), "nowhere"),
            (
                lambda s, f: export_onnx(s, f / "a.onnx", "int4"),
                "container must be one of 'int8', 'packed', got 'int4'",
            ),
            (lambda s, f: export_onnx(TinyConvNet(), f / "a.onnx"), "is no student of quantize_model"),
            (lambda s, f: export_onnx(s, f / "a.onnx", images=noise(size=15)), "can't be exported at"),
        ],
    )
    def test_say_what_to_do(self, change, message, tmp_path):
        student = student_of(tiny_vit())
        with pytest.raises(InputError, match=message):
            change(student, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_layers_that_were_replaced_and_outputs_that_are_no_classes(self, tmp_path):
        student = student_of(TinyConvNet())
        student.body[3] = nn.Conv2d(8, 16, 3, stride=2)
        for act in (lambda: export_onnx(student, tmp_path / "a.onnx"), lambda: deploy_report(student)):
            with pytest.raises(InputError, match=r"1 of .*'body.3' \(now Conv2d, not quantized as planned\)"):
                act()
        with pytest.raises(InputError, match="'body.3'"):
            measure_latency(student)

        one = TinyConvNet()
        one.head = nn.Linear(16, 1)
        with pytest.raises(InputError, match=r"^An output of the shape \(.*, 1\) has fewer than two classes"):
            export_onnx(student_of(one), tmp_path / "a.onnx", images=noise())
        assert list(tmp_path.iterdir()) == []

    def test_no_ranges(self, tmp_path):
        model = TinyConvNet()
        quantize_model(model)
        with pytest.raises(InputError, match="has no ranges yet"):
            export_onnx(model, tmp_path / "a.onnx")

    def test_a_missing_package_is_named(self):
        code = (
            "import sys; sys.modules['onnxruntime'] = None\n"
            "import sqakd_hf\n"
            "try:\n    sqakd_hf.export_onnx(None, None)\nexcept sqakd_hf.InputError as error:\n    print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "needs the package 'onnxruntime'" in done.stdout and "pip install sqakd-hf[onnx]" in done.stdout


def test_quantized_residuals_leave_no_convolution_that_puts_out_floats(tmp_path):
    torch.manual_seed(0)
    student = student_of(build_model("timm/test_resnet", 10, image_size=32), 32, weight_bits=4, residual_bits=8)
    path = tmp_path / "a.onnx"
    report = export_onnx(student, path, images=noise(size=32))
    assert sum(report.check.differing.values()) <= 3
    users = {}
    graph = onnx.load(path).graph
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.op_type)
    after = [users[node.output[0]] for node in graph.node if node.op_type == "Conv"]
    assert after and all(kinds == ["QuantizeLinear"] for kinds in after[:-1])
