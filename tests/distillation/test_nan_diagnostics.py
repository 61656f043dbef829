import pytest
import torch
from transformers import Trainer

from sqakd_hf import SQAKDTrainer, calibrate_model
from sqakd_hf.distillation.nan_diagnostics import (
    FiniteWatch,
    NonFiniteError,
    first_non_finite_gradient,
    first_non_finite_parameter,
)
from tests.helpers.training import Break, Images, arguments, make_trainer, models


@pytest.mark.parametrize(
    "name, message",
    [
        ("body.3.weight_quantizer.scale", "the range of the weight quantizer of layer 'body.3'"),
        ("body.0.input_quantizer.scale", "the range of the activation quantizer of layer 'body.0'"),
        ("body.3.weight", "a parameter of layer 'body.3'"),
        ("stem.1.weight", "the input of layer 'body.0'"),
        ("head.bias", "a parameter of layer 'head'"),
    ],
)
def test_training_stops_and_names_the_layer(tmp_path, name, message):
    trainer = make_trainer(tmp_path, callbacks=[Break(name)])
    with pytest.raises(NonFiniteError, match=rf"The loss is nan at step 2\. First not finite: {message}\. Lower"):
        trainer.train()


def test_a_bad_image_is_the_input_of_the_first_layer(tmp_path):
    student, teacher = models()
    data = Images()
    trainer = SQAKDTrainer(student, teacher, arguments(tmp_path), data)
    trainer.calibrate()
    data.pixels[5] = float("inf")
    with pytest.raises(NonFiniteError, match="the input of layer 'stem.0'"):
        trainer.train()


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0}])
@pytest.mark.parametrize("name", ["body.3.weight", "head.weight", "stem.1.bias"])
def test_a_gradient_that_overflows_is_named_before_it_spoils_the_weights(tmp_path, name, options):
    trainer = make_trainer(tmp_path, num_train_epochs=4, **options)

    def spoil(grad):
        return grad * float("inf") if trainer.state.global_step == 1 else grad

    trainer.model.get_parameter(name).register_hook(spoil)
    expected = rf"The gradient's norm is (nan|inf) at step 1\. First not finite: the gradient of '{name}'\."
    with pytest.raises(NonFiniteError, match=expected):
        trainer.train()
    assert first_non_finite_parameter(trainer.model) is None


def test_where_a_backward_goes_wrong_is_the_last_of_the_bad_gradients():
    student, _ = models()
    images = Images().pixels
    calibrate_model(student, [images], disable_progress=True)
    student.train()
    student.body[3].register_full_backward_hook(lambda module, grads, _: tuple(g * float("nan") for g in grads))
    student(images).square().mean().backward()
    assert first_non_finite_gradient(student) == "the gradient of 'body.1.bias'"


def test_what_no_step_looked_at_is_found_at_the_log_and_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(SQAKDTrainer, "training_step", Trainer.training_step)
    monkeypatch.setattr(FiniteWatch, "check_loss", lambda *_: None)
    trainer = make_trainer(tmp_path / "log", callbacks=[Break("body.3.weight")], logging_steps=5)
    with pytest.raises(NonFiniteError, match=r"The (loss|gradient's norm) is nan at step 5\. First not finite: '"):
        trainer.train()
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "no"}
    trainer = make_trainer(tmp_path / "save", callbacks=[Break("body.3.weight")], **saving)
    with pytest.raises(NonFiniteError, match=r"The student's '.*' is not finite at step 4: .* the last checkpoint"):
        trainer.train()
    assert [path.name for path in (tmp_path / "save").iterdir()] == ["checkpoint-2"]


def test_a_finite_training_is_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=1)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 6 and all(torch.isfinite(torch.tensor(losses)))
