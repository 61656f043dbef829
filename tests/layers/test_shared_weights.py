"""Accumulated batches share one quantization of each weight, and train like one large batch."""

import copy

import pytest
import torch
from torch import nn

from sqakd_hf import QuantizationConfig, calibrate_model, list_quantizers, quantize_model
from sqakd_hf.conversion.student import quantized_layers
from sqakd_hf.layers.shared_weights import SharedWeights
from tests.helpers.models import tiny_vit
from tests.helpers.training import make_trainer


class Skipping(nn.Module):
    """Two layers; the second is left out on demand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.skips = False

    def forward(self, x):
        x = self.first(x)
        return x if self.skips else x + self.second(x.relu())


def student_of(quantizer="lsq", **kwargs):
    torch.manual_seed(0)
    model = Skipping()
    config = QuantizationConfig(quantizer, weight_bits=3, activation_bits=3, quantizer_kwargs=kwargs)
    images = torch.randn(12, 6)
    quantize_model(model, config, images)
    calibrate_model(model, [images], disable_progress=True)
    return model.train(), images


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def accumulate(model, batches, shared, skips=()):
    for number, batch in enumerate(batches):
        model.skips = number in skips
        with shared.batch(is_last=number == len(batches) - 1):
            model(batch).square().sum().backward()


@pytest.mark.parametrize("quantizer", list_quantizers())
class TestSharedWeights:
    def test_gradients_of_weights_are_those_of_one_large_batch_with_scaling_too(self, quantizer):
        model, images = student_of(quantizer, delta=0.3)
        # The input's own quantizers scale per batch; only weights are shared.
        for layer in quantized_layers(model).values():
            layer.input_quantizer = None
        whole = copy.deepcopy(model)
        whole(images).square().sum().backward()
        accumulate(model, images.split(4), SharedWeights(model))
        expected = gradients(whole)
        assert gradients(model).keys() == expected.keys()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)

    @pytest.mark.parametrize("skips", [(2,), (0,), (0, 1)])
    def test_a_layer_that_a_batch_goes_around_keeps_the_others_gradients(self, quantizer, skips):
        model, images = student_of(quantizer)
        plain = copy.deepcopy(model)
        for number, batch in enumerate(images.split(4)):
            plain.skips = number in skips
            plain(batch).square().sum().backward()
        accumulate(model, images.split(4), SharedWeights(model), skips)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, gradients(plain)[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_weight_is_quantized_once_a_step(tmp_path):
    trainer = make_trainer(
        tmp_path, tiny_vit, gradient_accumulation_steps=2, max_steps=3, per_device_train_batch_size=4
    )
    trainer.calibrate()
    calls = []
    for layer in quantized_layers(trainer.model).values():
        layer.weight_quantizer.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    trainer.train()
    assert len(calls) == 3 * len(set(calls)) == 3 * len(quantized_layers(trainer.model))


def test_an_error_leaves_nothing_shared():
    model, images = student_of()
    shared = SharedWeights(model)
    with pytest.raises(ZeroDivisionError), shared.batch(is_last=False):
        raise ZeroDivisionError
    with shared.batch(is_last=True):
        model(images).sum().backward()
    assert all(layer.shared_weight is None for layer in quantized_layers(model).values())
    assert gradients(model)
