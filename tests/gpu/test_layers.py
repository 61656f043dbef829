"""Whole students: how many codes are others on a GPU than on a CPU, and how far apart the logits are."""

import copy

import pytest
import torch

from sqakd_hf import FakeQuantizer, calibrate_model
from sqakd_hf.conversion.student import quantized_layers
from sqakd_hf.outputs.forward import predict
from tests.helpers.models import IMAGE_SIZE, TinyConvNet, tiny_vit
from tests.helpers.training import models


pytestmark = pytest.mark.gpu

IMAGES = torch.randn(32, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[8, 4, 2])
def student(request, build):
    """A student with ranges, on the CPU."""
    student, _ = models(build, weight_bits=request.param, activation_bits=request.param)
    calibrate_model(student, [IMAGES], disable_progress=True)
    return student.eval()


def codes_and_logits(student, device):
    """Return the codes of all inputs of layers, and the logits, on the CPU."""
    student, codes = copy.deepcopy(student).to(device), []
    for module in student.modules():
        if isinstance(module, FakeQuantizer) and module.role == "activation":
            module.register_forward_pre_hook(lambda module, args: codes.append(module.quantize(args[0]).flatten()))
    with torch.no_grad():
        logits = predict(student, {"pixel_values": IMAGES.to(device)}).logits
    return torch.cat(codes).cpu(), logits.cpu()


@pytest.mark.parametrize("build", [TinyConvNet, tiny_vit])
class TestStudents:
    def test_weights_have_the_same_codes(self, student, device):
        for layer, other in zip(
            quantized_layers(student).values(),
            quantized_layers(copy.deepcopy(student).to(device)).values(),
            strict=True,
        ):
            assert torch.equal(layer.weight_codes(), other.weight_codes().cpu())

    def test_few_codes_of_activations_are_others(self, student, build, device, note, request):
        expected, logits = codes_and_logits(student, torch.device("cpu"))
        name = f"{build.__name__} {student.quantization_plan.bits()}"

        def compare(precision):
            found, others = codes_and_logits(student, device)
            share = (found != expected).float().mean().item()
            apart = ((others - logits).norm() / logits.norm()).item()
            note(f"{name}, {precision}: {share:.2e} of the activations' codes are others, logits {apart:.1e} apart")
            return share, apart

        compare("torch's defaults (TF32 in convolutions)")
        request.getfixturevalue("exact")
        share, apart = compare("float32")
        # A sum in another order moves a value over a threshold, and what follows with it.
        assert share < 1e-2
        assert apart < 0.05
