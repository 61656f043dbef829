import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from sqakd_hf import QuantizationConfig, calibrate_model, quantize_model
from sqakd_hf.distillation.layer_sqnr import layer_sqnr
from tests.helpers.models import TinyConvNet, tiny_vit


class Repeating(nn.Module):
    """Its second layer is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, pixel_values):
        return self.last(self.twice(self.twice(self.first(pixel_values))).mean((2, 3)))


def pair(bits=4, **config):
    """A teacher and its calibrated student, whose BatchNorms have seen images."""
    torch.manual_seed(0)
    teacher, student = TinyConvNet(), TinyConvNet()
    images = torch.randn(16, 3, 32, 32)
    teacher.train()(images)
    student.load_state_dict(teacher.state_dict())
    quantize_model(student, QuantizationConfig(weight_bits=bits, activation_bits=bits, **config))
    calibrate_model(student, [images], disable_progress=True)
    return teacher, student, images


def outputs_of(model, name, images):
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return found[0].double()


class Masked(nn.Module):
    """Keeps the masks that it is given, but for the run by which it was quantized."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.masks = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), []

    def forward(self, pixel_values, pixel_mask=None):
        if pixel_mask is not None:
            self.masks.append(pixel_mask)
            pixel_values = pixel_values * pixel_mask[:, None]
        return self.last(self.first(pixel_values).mean((2, 3)))


class TestLayerSQNR:
    def test_is_the_ratio_of_the_sums_of_squares_in_decibel(self):
        teacher, student, images = pair()
        found = layer_sqnr(student, teacher, images.split(5))  # batches of 5, 5, 5 and 1
        assert list(found) == [layer.name for layer in student.quantization_plan.quantized]
        for name, value in found.items():
            expected = outputs_of(teacher, name, images)
            noise = expected - outputs_of(student, name, images)
            assert value == pytest.approx(10 * math.log10(expected.square().sum() / noise.square().sum()), rel=1e-4)

    def test_more_bits_are_nearer_to_the_teacher(self):
        last = [list(layer_sqnr(s, t, [x]).values())[-1] for t, s, x in (pair(2), pair(4), pair(8))]
        assert last[0] + 3 < last[1] and last[1] + 6 < last[2]

    def test_equal_outputs_give_a_large_finite_number(self):
        teacher, student, images = pair()
        assert all(math.isfinite(v) and v > 300 for v in layer_sqnr(student, student, [images]).values())

    def test_leaves_out_what_is_not_called_once(self):
        torch.manual_seed(0)
        teacher, student, images = Repeating(), Repeating(), torch.randn(8, 3, 32, 32)
        quantize_model(student, QuantizationConfig(), images)
        calibrate_model(student, [images], disable_progress=True)
        assert list(layer_sqnr(student, teacher, [images])) == ["first", "last"]

    def test_another_architecture_has_nothing_to_compare(self):
        teacher, student, images = pair()
        deeper = TinyConvNet()
        deeper.more = nn.Linear(2, 2)  # all of the student's layers, and one more
        assert layer_sqnr(student, deeper, [images]) == layer_sqnr(student, nn.Flatten(), [images]) == {}
        assert layer_sqnr(student, TinyConvNet(), [images]).keys() == layer_sqnr(student, teacher, [images]).keys()

    def test_a_student_from_disk_compares(self, tmp_path):
        torch.manual_seed(0)
        teacher = tiny_vit()
        student, images = copy.deepcopy(teacher), torch.randn(8, 3, 16, 16)
        quantize_model(student, QuantizationConfig(attention_bits=8))
        calibrate_model(student, [images], disable_progress=True)
        expected = layer_sqnr(student, teacher, [images])
        student.save_pretrained(tmp_path)
        found = layer_sqnr(AutoModelForImageClassification.from_pretrained(tmp_path), teacher, [images])
        assert found == pytest.approx(expected, abs=1e-3) and expected

    def test_masks_reach_the_model_as_they_do_in_calibration(self):
        torch.manual_seed(0)
        teacher, images = Masked(), torch.randn(8, 3, 32, 32)
        student = copy.deepcopy(teacher)
        quantize_model(student, QuantizationConfig(), images)
        batch = {"pixel_values": images, "pixel_mask": torch.rand(8, 32, 32) > 0.5, "labels": torch.zeros(8)}
        calibrate_model(student, [batch], disable_progress=True)
        assert layer_sqnr(student, teacher, [batch])
        assert all(torch.equal(mask, batch["pixel_mask"]) for mask in student.masks + teacher.masks)
        assert len(student.masks) > 1 and len(teacher.masks) == 1

    def test_what_is_not_finite_is_left_out(self):
        teacher, student, images = pair()
        images[0, 0, 0, 0] = torch.nan
        assert layer_sqnr(student, teacher, [images]) == {}

    def test_modes_and_hooks_are_as_before(self):
        teacher, student, images = pair()
        student.train()
        next(student.children()).eval()
        modes = [module.training for module in student.modules()]
        layer_sqnr(student, teacher, [images])
        assert [module.training for module in student.modules()] == modes
        assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())
