import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sqakd_hf import InputError, QuantizationConfig, calibrate_model, list_quantizers, quantize_model
from sqakd_hf.conversion.calibration import reestimate_batch_norm
from sqakd_hf.conversion.student import quantized_layers
from sqakd_hf.quantization.quantizers import DoReFaWeight
from sqakd_hf.research.oscillation import OscillationFreezer, dampening_loss
from tests.helpers.models import TinyConvNet, tiny_vit
from tests.helpers.training import Images, arguments, assert_same_state, make_trainer


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
            values = layer.quantized_weight()
            squashed = isinstance(layer.weight_quantizer, DoReFaWeight)
            layer.weight.copy_(layer.weight_quantizer.latent(values) if squashed else values)
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
        with pytest.raises(InputError, match="reestimate_batch_norm must be an integer of at least 0"):
            arguments(tmp_path, reestimate_batch_norm=-1)
        with pytest.raises(InputError, match="1 has no variance"):
            arguments(tmp_path, reestimate_batch_norm=1)

    def test_a_model_without_batch_norm_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="no BatchNorm"):
            make_trainer(tmp_path, tiny_vit, reestimate_batch_norm=24).train()


def oscillating(threshold=0.02, momentum=0.1, **config):
    """A layer of two weights per code, and a freezer that watches it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    quantize_model(model, QuantizationConfig(weight_bits=2, **config))
    calibrate_model(model, [torch.randn(16, 4)], disable_progress=True)
    layer = model[2]
    return layer, OscillationFreezer({"2": layer}, threshold, momentum)


class TestFreezing:
    def test_a_weight_that_flips_is_held_where_it_is_most_of_the_time(self):
        layer, freezer = oscillating()
        scale = layer.weight_quantizer.qparams()[0]
        with torch.no_grad():
            layer.weight.copy_(0.4 * scale[:, None])  # code of the value 0
            still = layer.weight.clone()
        frozen_at = None
        for step in range(30):
            with torch.no_grad():
                # Two steps of three below the threshold: the average code is that of 0.
                layer.weight[0, 0] = (0.6 if step % 3 == 2 else 0.4) * scale[0]
                layer.weight[1, 1] = (0.1 + 0.1 * (step % 3)) * scale[1]  # moves, its code does not
            freezer.step(1.0)
            if frozen_at is None and freezer.frozen_share() > 0:
                frozen_at = step
        # One change is no flip: the code has to come back.
        assert frozen_at is not None and frozen_at >= 1
        assert freezer.frozen_share() == 1 / 16
        assert layer.weight[0, 0] == 0
        still[0, 0], still[1, 1] = layer.weight[0, 0], layer.weight[1, 1]
        assert torch.equal(layer.weight, still) and layer.weight[1, 1] != 0

    def test_a_weight_that_wanders_one_way_is_not_frozen(self):
        layer, freezer = oscillating()
        scale = layer.weight_quantizer.qparams()[0]
        for step in range(30):
            with torch.no_grad():
                layer.weight[0, 0] = (-2 + step / 10) * scale[0]
            freezer.step(1.0)
        assert freezer.frozen_share() == 0

    def test_the_threshold_comes_down_with_the_training(self):
        shares = []
        # The share of flips goes to 1. The threshold has 4, 1, 3.56 and 1.44 times its last value: half a cosine.
        for progress, threshold in ((0.0, 0.3), (1.0, 0.3), (0.25, 0.3), (0.75, 0.6)):
            layer, freezer = oscillating(threshold=threshold, momentum=0.5)
            scale = layer.weight_quantizer.qparams()[0]
            for step in range(20):
                with torch.no_grad():
                    layer.weight[0, 0] = (0.4 if step % 2 else 0.6) * scale[0]
                freezer.step(progress)
            shares.append(freezer.frozen_share())
        assert shares == [0, 1 / 16, 0, 1 / 16]

    def test_held_weights_follow_their_range(self):
        layer, freezer = oscillating()
        scale = layer.weight_quantizer.scale
        for step in range(30):
            with torch.no_grad():
                layer.weight[0, 0] = (0.4 if step % 3 == 2 else 0.6) * scale[0]
            freezer.step(1.0)
        assert layer.weight[0, 0] == scale[0]
        with torch.no_grad():
            scale *= 1.5
        freezer.step(1.0)
        assert layer.weight[0, 0] == scale[0]

    def test_training_goes_on_from_a_checkpoint_bit_for_bit(self, tmp_path):
        options = {"oscillation_freezing": 0.002, "num_train_epochs": 6, "learning_rate": 0.05}
        options |= {"save_strategy": "steps", "save_steps": 12, "logging_steps": 1}
        whole = make_trainer(tmp_path / "a", config={"weight_bits": 2}, **options)
        whole.train()
        share = whole.extensions[0].freezer.frozen_share()
        logged = [log["frozen"] for log in whole.state.log_history if "loss" in log]
        assert 0 < share < 1 and logged[-1] == pytest.approx(share, abs=1e-4) and logged == sorted(logged)
        part = make_trainer(tmp_path / "b", config={"weight_bits": 2}, **options)
        part.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-12"))
        assert_same_state(part.model, whole.model)
        assert part.extensions[0].freezer.frozen_share() == share

    def test_checkpoints_of_weights_in_any_memory_format(self, tmp_path):
        options = {"oscillation_freezing": 0.01, "channels_last": True, "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(tmp_path, config={"weight_bits": 2}, **options)
        trainer.train()
        tensors = load_file(tmp_path / "checkpoint-2" / "oscillations.safetensors")
        assert tensors["body.0.frozen"].shape == trainer.model.body[0].weight.shape

    def test_a_checkpoint_of_other_layers_or_without_is_told(self, tmp_path, caplog):
        options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
        make_trainer(tmp_path / "a", config={"weight_bits": 2}, **options).train()
        resumed = make_trainer(tmp_path / "b", config={"weight_bits": 2}, oscillation_freezing=0.01, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        assert "is of a training without oscillation_freezing" in caplog.text
        _, freezer = oscillating()
        with pytest.raises(InputError, match="does not tell which weights of 2 are frozen"):
            freezer.load_state_dict({"other.codes": torch.zeros(1)})

    @pytest.mark.parametrize("quantizer", ["dorefa", "pact", "statsq"])
    def test_weights_that_are_stretched_are_refused(self, quantizer, tmp_path):
        with pytest.raises(InputError, match=r"layer 'body.0' depend on all of its weights.*lsq, lsq\+ or ewgs"):
            make_trainer(
                tmp_path, config={"quantizer": quantizer, "weight_bits": 2}, oscillation_freezing=0.01
            ).train()

    def test_weights_of_many_bits_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="no layer of the student has weights of up to 4 bits"):
            make_trainer(tmp_path, config={"weight_bits": 5}, oscillation_freezing=0.01).train()

    @pytest.mark.parametrize("value", [-0.1, 1, float("nan")])
    def test_a_share_that_is_none_is_refused(self, tmp_path, value):
        with pytest.raises(InputError, match="oscillation_freezing must be a share"):
            arguments(tmp_path, oscillation_freezing=value)
