"""The estimate of delta against Hessians that are written down or differentiated exactly."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from sqakd_hf import (
    InputError,
    QuantizationConfig,
    SQAKDTrainer,
    calibrate_model,
    distillation_loss,
    list_quantizers,
    quantize_model,
)
from sqakd_hf.conversion.student import quantized_layers, quantizers
from sqakd_hf.research import ewgs_delta as delta
from sqakd_hf.research.ewgs_delta import estimate_delta
from tests.helpers.models import tiny_vit
from tests.helpers.training import arguments, assert_same_state, make_trainer, timm_resnet


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def student_of(quantizer="ewgs", bits=3, **options):
    torch.manual_seed(0)
    teacher = Net()
    student = copy.deepcopy(teacher)
    images = torch.randn(6, 4)
    config = QuantizationConfig(quantizer, bits, bits, first_last_bits=bits, **options)
    quantize_model(student, config, images)
    calibrate_model(student, [images], disable_progress=True)
    with torch.no_grad():
        target = 2 * teacher(images) + torch.randn(6, 3)
    return student, {"pixel_values": images, "target": target}


def loss_of(student):
    return lambda batch: distillation_loss(student(batch["pixel_values"]), batch["target"])


def estimated(student, batch, quantizer, size, monkeypatch):
    """Estimate with one unit vector after the other for one quantizer, nothing for others: the exact trace."""
    order = list(quantizers(student))
    calls = iter(range(10**6))

    def basis(like, generator):
        draw, place = divmod(next(calls), len(order))
        vector = torch.zeros(like.numel())
        if order[place] is quantizer:
            vector[draw] = size**0.5
        return vector.view_as(like)

    monkeypatch.setattr(delta, "_signs", basis)
    options = {"max_draws": size, "tolerance": 0, "disable_progress": True}
    return estimate_delta(student, loss_of(student), [batch], **options)[quantizer]


def exact(trace, gradient):
    return max(0.0, float(trace / gradient.numel() / (3 * gradient.std())))


@pytest.mark.parametrize("quantizer", list_quantizers())
@pytest.mark.parametrize("per_channel", [True, False])
def test_of_the_last_layer_it_is_that_of_the_softmax(quantizer, per_channel, monkeypatch):
    student, batch = student_of(quantizer, per_channel=per_channel)
    found = {
        module: estimated(student, batch, module, size, monkeypatch)
        for module, size in ((student.last.weight_quantizer, 15), (student.last.input_quantizer, 30))
    }
    layer = student.last
    with torch.no_grad():
        inputs = torch.tanh(student.second(torch.tanh(student.first(batch["pixel_values"]))))
        values, weight = layer.quantized_input(inputs), layer.quantized_weight()
        logits = F.linear(values, weight, layer.bias)
        p, q = (logits / 4).softmax(1), (batch["target"] / 4).softmax(1)
        slope = 4 * (p - q) / len(p)  # of the loss for the logits
        curvature = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(p)
        width = layer.weight_quantizer.qparams()[0][:, None] * 7
        trace = (width**2 * torch.einsum("bkk,bj->kj", curvature, values**2)).sum()
        assert found[layer.weight_quantizer] == pytest.approx(exact(trace, width * slope.T @ values), rel=0.01)
        width = layer.input_quantizer.qparams()[0] * 7
        trace = width**2 * torch.einsum("kj,bkl,lj->", weight, curvature, weight)
        assert found[layer.input_quantizer] == pytest.approx(exact(trace, width * slope @ weight), rel=0.01)


def test_of_an_inner_layer_it_follows_the_straight_through_estimator(monkeypatch):
    student, batch = student_of()
    found = estimated(student, batch, student.second.weight_quantizer, 25, monkeypatch)
    inner, last = student.second, student.last
    with torch.no_grad():
        before = torch.tanh(student.first(batch["pixel_values"]))
        values, weight = inner.quantized_input(before), inner.quantized_weight()
        hidden = torch.tanh(F.linear(values, weight, inner.bias))
        offset = last.quantized_input(hidden) - hidden
        grid = last.input_quantizer.grid()
        passes = (hidden >= grid.lower) & (hidden <= grid.upper)
        clipped = last.quantized_input(hidden)
        final = last.quantized_weight()

    def smooth(units):
        """The loss as a function of the inner weight in units of its range, with codes further on held in place."""
        hidden = torch.tanh(F.linear(values, units.view_as(weight) * width, inner.bias))
        inputs = torch.where(passes, hidden + offset, clipped)
        return distillation_loss(F.linear(inputs, final, last.bias), batch["target"])

    width = (inner.weight_quantizer.qparams()[0] * 7)[:, None]
    units = (weight / width).flatten()
    trace = torch.autograd.functional.hessian(smooth, units).trace()
    gradient = torch.autograd.functional.jacobian(smooth, units)
    assert found == pytest.approx(exact(trace, gradient), rel=0.01) and found > 0


def test_random_signs_estimate_the_trace(monkeypatch):
    student, batch = student_of()
    quantizer = student.last.weight_quantizer
    found = [
        estimate_delta(student, loss_of(student), [batch], seed=1000 * seed, disable_progress=True)[quantizer]
        for seed in range(8)
    ]
    expected = estimated(student, batch, quantizer, 15, monkeypatch)
    mean = torch.tensor(found).mean().item()
    error = torch.tensor(found).std().item() / 8**0.5
    assert abs(mean - expected) < 4 * error < expected


def test_a_negative_curvature_gives_zero_and_stops_no_sooner():
    student, batch = student_of()
    calls = {1: 0, -1: 0}

    def signed(sign):
        def loss(b):
            calls[sign] += 1
            return sign * loss_of(student)(b)

        return estimate_delta(student, loss, [batch], disable_progress=True)

    assert signed(1)[student.last.weight_quantizer] > 0
    found = signed(-1)
    assert found[student.last.weight_quantizer] == 0
    assert found.keys() == set(quantizers(student))
    assert calls[1] == calls[-1] > 20


def test_draws_stop_when_the_mean_has_settled():
    student, batch = student_of()
    calls = []

    def loss(b):
        calls.append(1)
        return loss_of(student)(b)

    estimate_delta(student, loss, [batch], tolerance=1e9, disable_progress=True)
    assert len(calls) == 1 + 2 * 2  # the gradient itself, and two draws of two sides
    calls.clear()
    estimate_delta(student, loss, [batch, batch], max_draws=7, tolerance=0, disable_progress=True)
    assert len(calls) == 2 * (1 + 7 * 2)


@pytest.mark.parametrize("build", [timm_resnet, tiny_vit])
def test_the_model_is_left_as_it_was(build, tmp_path):
    size, attention = (16, {"attention_bits": 8}) if build is tiny_vit else (32, {})
    trainer = make_trainer(tmp_path, build, config={"quantizer": "ewgs", **attention}, size=size)
    trainer.calibrate()
    model = trainer.model.train()
    before = copy.deepcopy(model.state_dict())
    batch = {"pixel_values": torch.randn(4, 3, size, size)}
    found = estimate_delta(
        model, lambda b: trainer.compute_loss(model, b), [batch], max_draws=2, disable_progress=True
    )
    assert len(found) == len(quantizers(model)) and all(0 <= value < float("inf") for value in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert quantized_layers(model)


class Segmenter(nn.Module):
    """Logits `(B, 4, 4, 4)`, behind a BatchNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 3, 2, 1)

    def forward(self, x):
        return self.head(self.stem(x))


class Twice(nn.Module):
    """One layer on two inputs of other sizes, and one that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.unused, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        hidden = self.first(x)
        both = torch.tanh(self.shared(hidden)).mean(0) + torch.tanh(self.shared(hidden[:3])).mean(0)
        return self.last(both + hidden) + 0 * self.unused(hidden).detach()


def test_layers_that_run_twice_or_for_nothing_do_not_change_the_output():
    torch.manual_seed(0)
    student, images = Twice(), torch.randn(6, 4)
    quantize_model(student, QuantizationConfig("ewgs", 3, 3), images)
    calibrate_model(student, [images], disable_progress=True)
    expected = student.eval()(images)
    seen = []

    def loss(batch):
        seen.append(student(batch["pixel_values"]))
        return distillation_loss(seen[-1], torch.zeros(6, 4))

    found = estimate_delta(student, loss, [{"pixel_values": images}], max_draws=2, disable_progress=True)
    torch.testing.assert_close(seen[0], expected)
    assert found[student.unused.weight_quantizer] == 0
    assert found.keys() == set(quantizers(student))


class Normalised(nn.Module):
    """BatchNorm, or what it is with its running statistics, between two layers."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), norm, nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


class Affine(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.factor = (norm.running_var + norm.eps).rsqrt()
        self.offset = -norm.running_mean * self.factor

    def forward(self, x):
        return x * self.factor + self.offset


def test_batch_norm_normalises_as_it_will_in_training():
    norm = nn.BatchNorm1d(5)
    norm.running_mean.copy_(torch.linspace(-1, 1, 5))
    norm.running_var.copy_(torch.linspace(0.5, 4, 5))
    images = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, module, options in (
        ("running", norm, {"running_statistics": True}),
        ("affine", Affine(norm), {}),
        ("batch", norm, {}),
    ):
        torch.manual_seed(0)
        student = Normalised(copy.deepcopy(module))
        quantize_model(student, QuantizationConfig("ewgs", 8, 8), images)
        calibrate_model(student, [images], disable_progress=True)
        batch = {"pixel_values": images, "target": torch.linspace(-3, 3, 96).view(32, 3)}
        estimate = estimate_delta(student, loss_of(student), [batch], max_draws=5, disable_progress=True, **options)
        found[name] = list(estimate.values())
    assert found["running"] == pytest.approx(found["affine"], rel=1e-4)
    assert found["batch"] != pytest.approx(found["affine"], rel=0.1)


def test_without_a_batch_it_is_refused():
    student, _ = student_of()
    with pytest.raises(InputError, match="got no batch"):
        estimate_delta(student, loss_of(student), [])


class TestTraining:
    def test_deltas_are_zero_until_they_are_estimated_and_resumed_with_the_run(self, tmp_path):
        options = {
            "config": {"quantizer": "ewgs"},
            "max_steps": 6,
            "delta_estimation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 10,
        }
        seen = []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model, **kwargs):
                seen.append([module.delta for module in quantizers(model)])

        whole = make_trainer(tmp_path, callbacks=[Watch()], **options)
        whole.train()
        assert set(seen[0]) == set(seen[1]) == {0.0} and max(seen[2]) > 0
        assert seen[2] == seen[3] != seen[4] == seen[5]
        before, seen[:] = list(seen), []
        resumed = make_trainer(tmp_path, callbacks=[Watch()], **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert seen == before[3:]
        assert_same_state(whole.model, resumed.model)

    @pytest.mark.parametrize("freezes", [False, True])
    def test_it_is_of_the_loss_in_float32(self, tmp_path, monkeypatch, freezes):
        """Whatever training computes in, with the batch's masks, and BatchNorm as training has it."""
        dtypes, losses = [], []

        def watched(model, loss, batches, **options):
            assert options["running_statistics"] is freezes
            handle = model.head.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
            for batch in batches:
                unmasked = {name: value for name, value in batch.items() if name != "valid_mask"}
                losses.append((loss(batch).item(), loss(unmasked).item()))
            handle.remove()
            return {}

        monkeypatch.setattr("sqakd_hf.research.ewgs_delta.estimate_delta", watched)
        data = [
            {"pixel_values": image, "valid_mask": torch.arange(16).view(4, 4) % 5 > 0}
            for image in torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        ]
        teacher = Segmenter()
        student = copy.deepcopy(teacher)
        quantize_model(student, QuantizationConfig("ewgs"))
        args = arguments(tmp_path, bf16=True, max_steps=2, delta_estimation_steps=1, freeze_batch_norm=freezes)
        trainer = SQAKDTrainer(student, teacher, args, data)
        trained = []
        student.head.register_forward_hook(
            lambda _, __, output: trained.append(output.dtype) if torch.is_autocast_enabled("cpu") else None
        )
        trainer.train()
        assert set(dtypes) == {torch.float32} and set(trained) == {torch.bfloat16}
        assert losses and all(with_mask != without for with_mask, without in losses)

    def test_a_checkpoint_of_the_other_kind_is_told(self, tmp_path, caplog):
        options = {"config": {"quantizer": "ewgs"}, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
        make_trainer(tmp_path / "with", delta_estimation_steps=1, **options).train()
        make_trainer(tmp_path / "without", **options).train()
        assert "delta_estimation_steps" not in caplog.text
        make_trainer(tmp_path / "a", **options).train(str(tmp_path / "with" / "checkpoint-2"))
        assert "is of a training with delta_estimation_steps: without it" in caplog.text
        make_trainer(tmp_path / "b", delta_estimation_steps=1, **options).train(
            str(tmp_path / "without" / "checkpoint-2")
        )
        assert "is of a training without delta_estimation_steps: delta is 0 until" in caplog.text

    def test_a_second_training_estimates_again(self, tmp_path):
        trainer = make_trainer(tmp_path, config={"quantizer": "ewgs"}, max_steps=3, delta_estimation_steps=2)
        for _ in range(2):
            trainer.train()
            assert max(module.delta for module in quantizers(trainer.model)) > 0

    def test_a_number_of_steps_that_is_none_is_refused(self, tmp_path):
        with pytest.raises(
            InputError,
            match="delta_estimation_steps must be an integer of at least 0, got 0.5",
        ):
            arguments(tmp_path, delta_estimation_steps=0.5)
