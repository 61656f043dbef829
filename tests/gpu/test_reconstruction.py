"""Calibration with a teacher and reconstruction on a GPU, by the library and by the trainer."""

import copy
import math

import pytest
import torch

from sqakd_hf import QuantizationConfig, SQAKDTrainer, calibrate_model, quantize_model, reconstruct_model
from sqakd_hf.conversion.student import is_calibrated
from tests.helpers.models import TinyConvNet, tiny_vit
from tests.helpers.training import Images, arguments


pytestmark = pytest.mark.gpu


@pytest.fixture(params=[TinyConvNet, tiny_vit], ids=["conv net", "vit"])
def teacher(request, device):
    torch.manual_seed(0)
    model = request.param().to(device).train()
    with torch.no_grad():
        model(Images(40).pixels.to(device))  # statistics
    return model.eval()


@pytest.fixture
def student(teacher):
    student = copy.deepcopy(teacher)
    quantize_model(student, QuantizationConfig(weight_bits=4, activation_bits=4, activation_quantizer="lsq+"))
    return student


def test_images_of_the_cpu_make_a_student_on_the_device(teacher, student, device):
    images = Images(40).pixels
    calibrate_model(student, [images], teacher=teacher, disable_progress=True)
    assert is_calibrated(student)
    found = reconstruct_model(student, teacher, images, steps=5, batch_size=8, disable_progress=True)
    assert all(math.isfinite(unit.after) and unit.after <= unit.calibrated for unit in found)
    assert {tensor.device.type for tensor in student.state_dict().values()} == {device.type}


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_the_trainer_goes_through_its_stages(teacher, student, device, precision, tmp_path):
    args = arguments(
        tmp_path, use_cpu=device.type == "cpu", freeze_batch_norm="auto", per_device_train_batch_size=32, **precision
    )
    trainer = SQAKDTrainer(student, teacher, args, Images(40), Images(11))
    trainer.calibrate()
    before = trainer.evaluate()
    trainer.reconstruct(steps=5)
    after = trainer.evaluate()
    trainer.train()
    assert all(math.isfinite(metrics["eval_kl"]) for metrics in (before, after, trainer.evaluate()))
    assert list(trainer.results) == ["teacher", "calibrated", "reconstructed", "student"]


def test_a_time_becomes_a_number_of_updates(teacher, student, caplog):
    caplog.set_level("INFO", "sqakd_hf")
    reconstruct_model(student, teacher, Images(40).pixels, time_budget=5.0, batch_size=8, disable_progress=True)
    assert "updates of each of" in caplog.text
