import copy
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from sqakd_hf import (
    InputError,
    LatencyReport,
    QuantizationConfig,
    build_model,
    is_calibrated,
    measure_latency,
    quantize_model,
)
from sqakd_hf.export import latency
from sqakd_hf.export.latency import Latency, engine_runs, export_float
from tests.helpers.exporting import detector, noise, student_of
from tests.helpers.models import TinyConvNet, tiny_vit


pytestmark = pytest.mark.export


def network():
    torch.manual_seed(0)
    return build_model("timm/test_resnet", num_labels=7, image_size=32)


class TestMeasureLatency:
    def test_has_a_line_for_each_engine_and_variant(self):
        report = measure_latency(student_of(network(), 32), rounds=3, batch_size=2)
        assert [(each.engine, each.what) for each in report.latencies] == [
            ("PyTorch", "float32"),
            ("PyTorch", "student"),
            ("ONNX Runtime", "float32"),
            ("ONNX Runtime", "int8 file"),
            ("OpenVINO", "float32"),
            ("OpenVINO", "int8 file"),
        ]
        first = report.latencies[0]
        assert (first.speed_up, first.spread) == (1, 0)
        assert all(0 < each.milliseconds < 60_000 and each.speed_up > 0 for each in report.latencies)
        assert 3 * report.file_bytes < report.float_bytes
        assert (report.image_size, report.batch_size, report.threads) == (32, 2, 1)
        assert list(report.versions) == ["PyTorch", "ONNX Runtime", "OpenVINO"]
        said = str(report)
        assert "W2A2 student, 32 px, batch 2, 1 thread(s)" in said and f"int8 {report.file_bytes:,}" in said
        assert said.count("\n") == 10
        assert set(report.verdicts()) == {"ONNX Runtime", "OpenVINO"}
        assert all(f"{engine}: {verdict}" in said for engine, verdict in report.verdicts().items())

    @pytest.mark.parametrize(
        ("half", "int8", "verdict"),
        [
            (1.0, 4.0, "3.9 × smaller, 2.00 × faster than float32"),
            (2.5, 4.0, "3.9 × smaller, 1.60 × faster than bfloat16"),
            (1.0, 2.04, "3.9 × smaller, no faster than float32 here"),
            (1.0, 1.97, "3.9 × smaller, no faster than float32 here"),
            (4.0, 2.0, "3.9 × smaller, 2.00 × slower than bfloat16 here"),
        ],
    )
    def test_says_whether_the_file_is_worth_it(self, half, int8, verdict):
        speeds = {"float32": 2.0, "bfloat16": half, "int8 file": int8}
        lines = [Latency("PyTorch", "float32", 9.0, 1.0, 0.0), Latency("PyTorch", "student", 9.0, 9.0, 0.0)]
        lines += [Latency("OpenVINO", what, 1.0, speed, 0.1) for what, speed in speeds.items()]
        report = LatencyReport(tuple(lines), "W8A8", 224, 1, 1, 39_000, 10_000, {"OpenVINO": "1"})
        assert report.verdicts() == {"OpenVINO": verdict} == report.to_dict()["verdicts"]
        assert f"OpenVINO: {verdict}" in str(report)

    def test_bfloat16_is_measured_where_the_processor_has_it(self, monkeypatch):
        core = latency.openvino_core()
        has = [*core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"), "BF16"]
        real = type(core).get_property

        def property_of(self, device, name):
            return has if name == "OPTIMIZATION_CAPABILITIES" else real(self, device, name)

        monkeypatch.setattr(type(core), "get_property", property_of)
        report = measure_latency(student_of(network(), 32), rounds=2)
        assert [each.what for each in report.latencies if each.engine == "OpenVINO"] == [
            "float32",
            "bfloat16",
            "int8 file",
        ]

    def test_a_student_without_ranges_stays_without(self):
        student = network()
        quantize_model(student, QuantizationConfig())
        before = copy.deepcopy(student.state_dict())
        threads = torch.get_num_threads()
        measure_latency(student, rounds=2)
        assert not is_calibrated(student) and torch.get_num_threads() == threads
        # Ranges that were not set are NaN.
        torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0, equal_nan=True)

    def test_a_signal_afterwards_is_the_programs_own(self):
        code = (
            "import signal\n"
            "from sqakd_hf import QuantizationConfig, build_model, measure_latency, quantize_model\n"
            "student = build_model('timm/test_resnet', 7, image_size=32)\n"
            "quantize_model(student, QuantizationConfig())\n"
            "measure_latency(student, rounds=2)\n"
            "signal.signal(signal.SIGINT, lambda *_: print('caught'))\n"
            "signal.raise_signal(signal.SIGINT)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("caught\n")

    def test_a_model_that_is_not_of_transformers(self):
        torch.manual_seed(0)
        report = measure_latency(student_of(TinyConvNet()), rounds=2)
        assert report.image_size > 0 and len(report.latencies) == 6

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rounds": 1}, "rounds must be an integer of at least 2, got 1"),
            ({"threads": 0}, "threads must be an integer of at least 1, got 0"),
            ({"batch_size": 1.5}, "batch_size must be an integer of at least 1, got 1.5"),
            ({"threads": True}, "threads must be an integer of at least 1, got True"),
        ],
    )
    def test_numbers_that_make_no_sense_are_refused(self, options, message):
        with pytest.raises(InputError, match=message):
            measure_latency(network(), **options)

    def test_sizes_that_a_model_does_not_take_are_refused(self):
        for size, message in (
            (0, "image_size must be an integer of at least 1"),
            (40, "does not run on images of 40, 40|40"),
        ):
            student = tiny_vit()
            quantize_model(student, QuantizationConfig())
            with pytest.raises(InputError, match=message):
                measure_latency(student, image_size=size)

    def test_a_detector_is_timed_with_its_boxes(self, tmp_path):
        model, images = detector().eval(), noise(2, 32)
        export_float(model, images, tmp_path / "f.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "f.onnx", providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == ["logits", "pred_boxes"]

    def test_a_float_model_is_refused(self):
        with pytest.raises(InputError, match="no student of quantize_model"):
            measure_latency(network())


class TestFloatFile:
    def test_computes_what_the_network_does(self, tmp_path):
        model, images = network().eval(), noise(3, 32)
        export_float(model, images, tmp_path / "f.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "f.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(["logits"], {"pixel_values": images.numpy()})
        np.testing.assert_allclose(found, model(images).logits.detach(), rtol=1e-4, atol=1e-5)

    def test_every_engine_runs_it(self, tmp_path):
        model, images = network().eval(), noise(3, 32)
        export_float(model, images, tmp_path / "f.onnx")
        runs = engine_runs(tmp_path / "f.onnx", images, threads=1, in_float32=True)
        expected = model(images).logits.detach()
        np.testing.assert_allclose(runs["ONNX Runtime"]()[0], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(runs["OpenVINO"]()[0], expected, rtol=1e-3, atol=1e-4)
