import pytest
import torch
from transformers import TrainerCallback

from sqakd_hf import SQAKDTrainer
from sqakd_hf.non_finite import NonFiniteError, first_non_finite
from tests.test_trainer import Images, arguments, make_trainer, models


class Break(TrainerCallback):
    """Makes a tensor NaN before the third step."""

    def __init__(self, name):
        self.name = name

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.get_parameter(self.name).data[0] = float("nan")


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


def test_a_gradient_that_overflows_is_found_at_the_log(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=1)
    weight = trainer.model.body[3].weight

    def spoil(grad):
        return grad * float("inf") if trainer.state.global_step == 1 else grad

    weight.register_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"The gradient's norm is (nan|inf) at step 2"):
        trainer.train()


def test_the_last_bad_gradient_is_where_it_began():
    student, _ = models()
    from sqakd_hf import calibrate_model

    images = Images().pixels
    calibrate_model(student, [images], disable_progress=True)
    student.train()
    student.body[0].weight_quantizer.register_full_backward_hook(lambda *_: None)
    student.body[3].register_full_backward_hook(lambda module, grads, _: tuple(g * float("nan") for g in grads))
    found = first_non_finite(student, lambda: student(images).square().mean())
    assert found == "the gradient of 'body.1.bias'"


def test_a_finite_training_is_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=1)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 6 and all(torch.isfinite(torch.tensor(losses)))
