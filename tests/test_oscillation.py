import copy

import pytest
import torch

from sqakd_hf import InputError, QuantizationConfig, calibrate_model, list_quantizers, quantize_model
from sqakd_hf.convert import quantized_layers, reestimate_batch_norm
from sqakd_hf.oscillation import dampening_loss
from sqakd_hf.quantizers import DoReFaWeight
from tests.conftest import TinyConvNet, tiny_vit
from tests.test_trainer import Images, arguments, make_trainer


@pytest.fixture(params=list_quantizers())
def student(request):
    torch.manual_seed(0)
    model = TinyConvNet()
    quantize_model(model, QuantizationConfig(request.param, weight_bits=3))
    calibrate_model(model, [torch.randn(8, 3, 16, 16)], disable_progress=True)
    return model


class TestDampening:
    def test_pulls_weights_to_their_codes_and_leaves_codes_and_ranges_alone(self, student):
        layer = quantized_layers(student)["body.3"]
        before, codes = dampening_loss([layer]), layer.weight_codes()
        before.backward()
        assert all(p.grad is None for p in layer.weight_quantizer.parameters())
        with torch.no_grad():
            layer.weight -= 0.1 * layer.weight.grad
            after = dampening_loss([layer])
        assert 0 < after < before
        assert (layer.weight_codes() != codes).float().mean() < 0.01  # DoReFa's largest weight stretches the others

    def test_is_zero_for_weights_on_their_codes(self, student):
        layer = quantized_layers(student)["body.3"]
        with torch.no_grad():
            layer.weight.copy_(layer.weight_quantizer.latent(layer.quantized_weight()))
        assert dampening_loss([layer]).item() == pytest.approx(0, abs=1e-8)

    def test_leaves_out_what_is_clipped(self, student):
        layer = quantized_layers(student)["body.3"]
        if isinstance(layer.weight_quantizer, DoReFaWeight):
            pytest.skip("squashes weights: none is clipped")
        scale, zero_point = layer.weight_quantizer.qparams()
        with torch.no_grad():
            # A quarter of a step beyond the last value, and before it.
            layer.weight[0, 0, 0, 0] = (7 - zero_point[0] + 0.25) * scale[0]
            layer.weight[0, 0, 0, 1] = (7 - zero_point[0] - 0.25) * scale[0]
        dampening_loss([layer]).backward()
        assert layer.weight.grad[0, 0, 0, 0] == 0 and layer.weight.grad[0, 0, 0, 1] < 0

    def test_training_with_it_ends_nearer_to_the_codes(self, tmp_path):
        distances = []
        for weight in (0.0, 1.0):
            trainer = make_trainer(tmp_path / str(weight), oscillation_dampening=weight, num_train_epochs=8)
            trainer.train()
            distances.append(dampening_loss(quantized_layers(trainer.model).values()).item())
        assert distances[1] < 0.8 * distances[0]

    @pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
    def test_a_weight_that_is_none_is_refused(self, tmp_path, value):
        with pytest.raises(InputError, match="oscillation_dampening must be a non-negative number"):
            arguments(tmp_path, oscillation_dampening=value)


class TestBatchNorm:
    def test_statistics_become_those_of_the_images(self, student):
        images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        reestimate_batch_norm(student, [images], disable_progress=True)
        seen = []
        handle = student.stem[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        training = copy.deepcopy(student).train()  # in train mode the batch's own statistics are used
        expected = training(images)
        student.eval()(images)
        handle.remove()
        (features,) = seen[-1:]
        torch.testing.assert_close(student.stem[1].running_mean, features.mean((0, 2, 3)))
        # Running variances are unbiased: by a factor of n / (n - 1), which later layers' roundings can carry on.
        torch.testing.assert_close(student.stem[1].running_var, features.var((0, 2, 3)))
        assert expected.shape == (32, 4)

    def test_the_trainer_does_it_at_the_end_if_asked(self, tmp_path):
        found = {}
        for images in (0, 24):
            trainer = make_trainer(tmp_path / str(images), reestimate_batch_norm=images)
            trainer.train()
            found[images] = trainer.model
        again = copy.deepcopy(found[0])
        reestimate_batch_norm(again, [Images().pixels], disable_progress=True)
        torch.testing.assert_close(found[24].state_dict(), again.state_dict())
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found[24].state_dict(), found[0].state_dict())

    def test_a_number_that_is_none_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="reestimate_batch_norm must be a number of images"):
            arguments(tmp_path, reestimate_batch_norm=-1)
        with pytest.raises(InputError, match="1 has no variance"):
            arguments(tmp_path, reestimate_batch_norm=1)

    def test_a_model_without_batch_norm_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="no BatchNorm"):
            make_trainer(tmp_path, tiny_vit, reestimate_batch_norm=24).train()
