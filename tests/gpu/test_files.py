"""From a GPU to a file and back: stored students, device maps, exported files, the card."""

import copy

import pytest
import torch
from transformers import AutoModelForImageClassification

from sqakd_hf import calibrate_model
from sqakd_hf.conversion.student import quantized_layers
from tests.helpers.models import IMAGE_SIZE, tiny_vit
from tests.helpers.training import make_trainer, models


pytestmark = pytest.mark.gpu

IMAGES = torch.randn(16, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def student(device):
    """A student that was quantized and calibrated on the device."""
    _, teacher = models(tiny_vit)
    student, _ = models(lambda: copy.deepcopy(teacher).to(device), weight_bits=4, activation_bits=4)
    calibrate_model(student, [IMAGES], disable_progress=True)
    return student.eval()


def codes(student):
    return {name: layer.weight_codes().cpu() for name, layer in quantized_layers(student).items()}


def assert_same_codes(one, other):
    found, expected = codes(one), codes(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def logits(student):
    device = next(student.parameters()).device
    return student(IMAGES.to(device)).logits


class TestStored:
    def test_a_student_is_the_same_on_a_cpu_and_back(self, student, device, exact, tmp_path):
        assert {tensor.device.type for tensor in student.state_dict().values()} == {device.type}
        student.save_pretrained(tmp_path / "first")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "first").eval()
        assert_same_codes(loaded, student)
        torch.testing.assert_close(logits(loaded), logits(student).cpu(), rtol=0.02, atol=0.02)
        loaded.save_pretrained(tmp_path / "second")
        back = AutoModelForImageClassification.from_pretrained(tmp_path / "second").to(device).eval()
        assert_same_codes(back, student)
        assert torch.equal(logits(back), logits(student))

    def test_a_device_map_unpacks_there(self, student, device, exact, tmp_path):
        student.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, device_map=device.type).eval()
        assert {tensor.device.type for tensor in loaded.state_dict().values()} == {device.type}
        assert_same_codes(loaded, student)
        assert torch.equal(logits(loaded), logits(student))
        loaded.train()  # codes become latent weights

    def test_a_trained_student_writes_its_card_and_its_report(self, options, tmp_path):
        trainer = make_trainer(tmp_path, tiny_vit, **{**options, "bf16": True, "channels_last": True})
        trainer.train()
        trainer.evaluate()
        trainer.measure_layers(8)
        trainer.save_model()
        trainer.create_model_card()
        assert (tmp_path / "report.html").stat().st_size > 0
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert_same_codes(loaded, trainer.model)


class TestExported:
    def test_the_file_is_that_of_the_student_on_a_cpu(self, student, device, on_gpu, tmp_path, note):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        from sqakd_hf import export_onnx

        files = []
        for each in (student, copy.deepcopy(student).cpu()) if on_gpu else (student,):
            files.append(tmp_path / f"{next(each.parameters()).device.type}-{len(files)}.onnx")
            report = export_onnx(each, files[-1], images=IMAGES.to(next(each.parameters()).device))
            report.check.require()
        assert len({file.read_bytes() for file in files}) == 1

        provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            note("ONNX Runtime has no CUDA provider here")
            return
        session = onnxruntime.InferenceSession(str(files[0]), providers=[provider])
        (found,) = session.run(["logits"], {"pixel_values": IMAGES.numpy()})
        expected = logits(student).cpu()
        apart = ((torch.from_numpy(found) - expected).norm() / expected.norm()).item()
        note(f"ONNX Runtime, {session.get_providers()[0]}: logits {apart:.1e} apart from the student's")
        assert apart < 0.1
