import copy

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from sqakd_hf import ImageCollator, InputError, SQAKDTrainer
from sqakd_hf.distillation.last_batch import check_last_batch
from tests.helpers.models import CLASSES, TinyConvNet
from tests.helpers.training import Images, arguments, models


class Pooled(TinyConvNet):
    """A network whose last BatchNorm sees one value of each channel of an image."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(16, 8), norm(8), nn.ReLU(), nn.Linear(8, CLASSES))


def train(folder, images, build=Pooled, **options):
    student, teacher = models(build)
    trainer = SQAKDTrainer(student, teacher, arguments(folder, num_train_epochs=1, **options), Images(images))
    trainer.train()
    return trainer


class TestTraining:
    def test_a_last_batch_of_one_image_is_refused_before_the_first_step(self, tmp_path):
        started = []

        class Watched(SQAKDTrainer):
            def training_step(self, *args, **kwargs):
                started.append(self)
                return super().training_step(*args, **kwargs)

        student, teacher = models(Pooled)
        with pytest.raises(
            InputError, match=r"17 images in batches of 8 make a batch of one.*'head\.1'\. Pass anothe"
        ):
            Watched(student, teacher, arguments(tmp_path), Images(17)).train()
        assert not started

    @pytest.mark.parametrize(
        ("images", "options"),
        [
            (18, {}),
            (17, {"dataloader_drop_last": True}),
            (17, {"per_device_train_batch_size": 7}),
            (17, {"freeze_batch_norm": True}),
            (17, {"max_steps": 2}),
            (17, {"max_steps": 1, "gradient_accumulation_steps": 2}),
            (17, {"build": TinyConvNet}),
        ],
        ids=str,
    )
    def test_what_can_be_trained_is(self, tmp_path, images, options):
        assert train(tmp_path, images, **options).state.global_step > 0

    @pytest.mark.parametrize(
        "options", [{"max_steps": 3}, {"max_steps": 2, "gradient_accumulation_steps": 2}], ids=str
    )
    def test_so_many_steps_reach_the_last_batch(self, tmp_path, options):
        with pytest.raises(InputError, match="a batch of one"):
            train(tmp_path, 17, **options)

    def test_batches_of_one_are_refused_wherever_they_would_fail(self, tmp_path):
        with pytest.raises(InputError, match="Pass another per_device_train_batch_size.$"):
            train(tmp_path, 4, per_device_train_batch_size=1, dataloader_drop_last=True)
        train(tmp_path, 4, TinyConvNet, per_device_train_batch_size=1)


class TestCheck:
    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_stays_as_it_was_and_nobodys_random_numbers_are_used_up(self, tmp_path, training):
        model, data = Pooled().train(training), [{"pixel_values": torch.rand(3, 16, 16)} for _ in range(9)]
        before, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=8)
        with pytest.raises(InputError, match="9 images in batches of 8"):
            check_last_batch(model, args, data, ImageCollator())
        assert model.training is training and torch.equal(torch.get_rng_state(), numbers)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_a_network_without_batch_norm_is_not_looked_at(self, tmp_path):
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=8)
        check_last_batch(Pooled(nn.LayerNorm).body[0], args, [None] * 9, ImageCollator())
