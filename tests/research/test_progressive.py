import contextlib

import pytest
import torch
from transformers import TrainerCallback

from sqakd_hf import InputError, QuantizationConfig, list_quantizers, quantize_model
from sqakd_hf.conversion.student import is_calibrated, quantizers
from sqakd_hf.research.progressive import ProgressiveBits
from tests.helpers.models import TinyConvNet
from tests.helpers.training import arguments, assert_same_state, make_trainer


class Widths(TrainerCallback):
    """Notes the widths of the weights of an inner layer and of the last at each step, and may stop early."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append((model.body[0].weight_quantizer.bits, model.head.weight_quantizer.bits))
        control.should_training_stop = state.global_step == self.stop_at


def trainer_with(folder, widths=(8, 4), stop_at=None, bits=2, **options):
    callback = Widths(stop_at)
    config = {"weight_bits": bits, "activation_bits": bits, "quantizer": options.pop("quantizer", "lsq")}
    trainer = make_trainer(
        folder, config=config, callbacks=[callback], progressive_bits=list(widths), num_train_epochs=3, **options
    )
    return trainer, callback


@pytest.mark.parametrize("quantizer", list_quantizers())
def test_each_width_has_its_share_of_the_steps(quantizer, tmp_path):
    trainer, widths = trainer_with(tmp_path, quantizer=quantizer)
    trainer.train()
    assert [inner for inner, _ in widths.seen] == [8] * 3 + [4] * 3 + [2] * 3
    assert {last for _, last in widths.seen} == {8}  # its own is no smaller
    codes = trainer.model.body[0].weight_codes()
    assert codes.max() < 4


def test_ranges_fit_the_width(tmp_path):
    """Without steps that change anything, the student is the one that was calibrated with its own bits."""
    options = {"learning_rate": 0.0, "quantizer_learning_rate": 0.0}
    plain, _ = trainer_with(tmp_path / "plain", widths=(), **options)
    plain.train()
    staged, _ = trainer_with(tmp_path / "staged", **options)
    staged.train()
    for one, other in zip(quantizers(staged.model), quantizers(plain.model), strict=True):
        if one.role == "weight":
            assert all(torch.equal(a, b) for a, b in zip(one.qparams(), other.qparams(), strict=True))


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, step):
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 4}
    whole, _ = trainer_with(tmp_path / "a", **options)
    whole.train()
    part, widths = trainer_with(tmp_path / "b", **options)
    part.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert len(widths.seen) == 9 - step
    assert_same_state(part.model, whole.model)


def test_a_student_that_is_stopped_early_has_its_own_bits(tmp_path):
    trainer, widths = trainer_with(tmp_path, stop_at=4)
    trainer.train()
    assert widths.seen[-1] == (4, 8)
    assert trainer.model.body[0].weight_quantizer.bits == 2
    assert trainer.model.body[0].weight_codes().max() < 4
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_training_that_breaks_leaves_no_ranges_of_another_width(tmp_path, monkeypatch):
    trainer, _ = trainer_with(tmp_path)
    monkeypatch.setattr(trainer, "log", lambda *args, **kwargs: 1 / 0)
    trainer.args.logging_steps = 1
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.model.body[0].weight_quantizer.bits == 2 and not is_calibrated(trainer.model)


@pytest.mark.parametrize("stage", range(3))
def test_nor_does_one_that_breaks_while_ranges_are_set_anew(tmp_path, monkeypatch, stage):
    trainer, _ = trainer_with(tmp_path)
    trainer.calibrate()
    sample = trainer._sample

    def interrupted(count):
        yield next(iter(sample(count)))
        if trainer.model.body[0].weight_quantizer.bits == (8, 4, 2)[stage]:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_sample", interrupted)
    with contextlib.suppress(KeyboardInterrupt):  # which may only end the training
        trainer.train()
    assert trainer.model.body[0].weight_quantizer.bits == 2 and not is_calibrated(trainer.model)


@pytest.mark.parametrize("widths", [[4, 8], [8, 8], [9], [1], [True], ["8"], [8, 2.5]])
def test_widths_that_do_not_fall_are_refused(tmp_path, widths):
    with pytest.raises(InputError, match="progressive_bits must be numbers of bits from 8 to 2, falling"):
        arguments(tmp_path, progressive_bits=widths)


def test_widths_that_change_nothing_are_refused():
    model = TinyConvNet()
    quantize_model(model, QuantizationConfig(weight_bits=4, activation_bits=4))
    with pytest.raises(InputError, match=r"progressive_bits \[4, 3\]: no quantizer of the student has fewer bits"):
        ProgressiveBits(model, [8, 4, 3])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}, "more bits"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "hub_strategy='end'"),
        ({"oscillation_freezing": 0.01}, "use one of them"),
    ],
)
def test_what_would_keep_earlier_codes_is_refused(tmp_path, options, why):
    with pytest.raises(InputError, match=why):
        arguments(tmp_path, progressive_bits=[8, 4], **options)
