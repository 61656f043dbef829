import os
import pickle
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sqakd_hf import ImageTransform, InputError, SQAKDTrainer
from sqakd_hf.data.collator import LOGITS
from sqakd_hf.distillation.teacher_cache import cache_teacher_logits
from tests.helpers.models import IMAGE_SIZE
from tests.helpers.training import Images, ImageStream, arguments, models


class Named(Images):
    fingerprint = "noise-3"


class Augmented(Named):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {"pixel_values": item["pixel_values"].flip(2) if torch.rand(()) < 0.5 else item["pixel_values"]}


def trainer_of(folder, data, **options):
    student, teacher = models()
    options = {"cache_teacher_logits": str(folder / "logits"), "optim": "sgd", "logging_steps": 1, **options}
    return SQAKDTrainer(student, teacher, arguments(folder / "run", **options), data, data)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Calls:
    """Counts how often a trainer's teacher runs."""

    def __init__(self, trainer):
        self.count = 0
        trainer.teacher.models[0].register_forward_pre_hook(lambda *_: setattr(self, "count", self.count + 1))


class TestTraining:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_it_is_the_training_without_a_cache_and_runs_the_teacher_once_an_image(self, tmp_path, workers):
        plain = trainer_of(tmp_path / "plain", Named(), cache_teacher_logits=None)
        plain.train()
        cached = trainer_of(tmp_path / "cached", Named(), dataloader_num_workers=workers)
        calls = Calls(cached)
        cached.train()
        assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
        assert len(losses(cached)) == 6
        assert calls.count == 5  # 24 images in batches of 5
        assert isinstance(cached.train_dataset, Named)

    def test_a_second_run_reads_what_the_first_wrote(self, tmp_path):
        first = trainer_of(tmp_path, Named())
        first.train()
        second = trainer_of(tmp_path, Named())
        calls = Calls(second)
        second.train()
        assert calls.count == 0
        assert losses(second) == losses(first)

    def test_another_teacher_has_a_file_of_its_own(self, tmp_path):
        trainer_of(tmp_path, Named()).train()
        other = trainer_of(tmp_path, Named())
        with torch.no_grad():
            other.teacher.models[0].stem[0].weight.add_(0.1)
        calls = Calls(other)
        other.train()
        assert calls.count == 5
        assert len(os.listdir(tmp_path / "logits")) == 2

    def test_a_collator_that_drops_them_is_an_error(self, tmp_path):
        trainer = trainer_of(tmp_path, Named())
        trainer.data_collator = lambda items: {"pixel_values": torch.stack([i["pixel_values"] for i in items])}
        with pytest.raises(InputError, match="data_collator dropped '_teacher_logits'"):
            trainer.train()


class TestDatasets:
    def hub_dataset(self, augment="none"):
        generator = np.random.default_rng(0)
        images = [Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in range(24)]
        data = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
        return data.with_transform(ImageTransform(IMAGE_SIZE, (0.5,) * 3, (0.5,) * 3, augment=augment))

    def test_a_datasets_dataset_is_recognised_by_contents_and_transform(self, tmp_path):
        trainer_of(tmp_path, self.hub_dataset()).train()
        again = trainer_of(tmp_path, self.hub_dataset())
        calls = Calls(again)
        again.train()
        assert calls.count == 0
        shorter = trainer_of(tmp_path, self.hub_dataset().select(range(16)))
        calls = Calls(shorter)
        shorter.train()
        assert calls.count == 4

    def test_random_augmentation_is_refused(self, tmp_path):
        for data in (self.hub_dataset("crop-flip"), Augmented()):
            with pytest.raises(InputError, match="augmented at random: turn the augmentation off"):
                trainer_of(tmp_path, data).train()
        assert not (tmp_path / "logits").exists()

    def test_a_stream_and_a_nameless_dataset_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="not a stream"):
            trainer_of(tmp_path, ImageStream(), max_steps=2).train()
        with pytest.raises(InputError, match="attribute `fingerprint`"):
            trainer_of(tmp_path, Images()).train()


def stack(items):
    return {"pixel_values": torch.stack([item["pixel_values"] for item in items])}


def mean_of(batch):
    return batch["pixel_values"].mean((2, 3))


class TestFile:
    def cache(self, folder, predict=mean_of, data=None, collate=stack, **options):
        options = {"batch_size": 7, "disable_progress": True, **options}
        return cache_teacher_logits(data or Named(), str(folder), predict, "t", collate, **options)

    def test_rows_belong_to_their_images_also_after_pickling(self, tmp_path):
        cached = self.cache(tmp_path)
        expected = Images().pixels.mean((2, 3))
        for each in (cached, pickle.loads(pickle.dumps(cached))):
            assert len(each) == 24
            assert torch.equal(torch.stack([each[i][LOGITS] for i in range(24)]), expected)
            rows = each.__getitems__([5, 3])
            assert torch.equal(torch.stack([row[LOGITS] for row in rows]), expected[[5, 3]])
            assert torch.equal(rows[0]["pixel_values"], Images().pixels[5])
        assert len(pickle.dumps(self.cache(tmp_path, data=Named(2)))) - len(pickle.dumps(Named(2))) < 400

    def test_an_interrupted_computation_leaves_no_file(self, tmp_path):
        def fail(batch):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.cache(tmp_path, fail)
        assert os.listdir(tmp_path) == []

    def test_logits_of_several_shapes_are_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"one shape, got \(3,\) and \(2,\)"):
            self.cache(tmp_path, lambda batch: torch.zeros(len(x := batch["pixel_values"]), 3 if len(x) == 7 else 2))
        assert os.listdir(tmp_path) == []

    def test_a_collator_that_normalises_in_another_way_has_a_file_of_its_own(self, tmp_path):
        first = self.cache(tmp_path)
        second = self.cache(tmp_path, collate=lambda items: {"pixel_values": stack(items)["pixel_values"] * 2})
        assert torch.equal(second[3][LOGITS], 2 * first[3][LOGITS])

    def test_a_collator_that_drops_images_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="6 logits for 7 images: the data_collator drops or adds"):
            self.cache(tmp_path, collate=lambda items: stack(items[:-1] if len(items) == 7 else items))
        assert os.listdir(tmp_path) == []

    def test_an_image_that_cannot_be_read_is_not_the_folders_fault(self, tmp_path):
        def broken(batch):
            raise OSError("cannot identify image file a.png")

        with pytest.raises(OSError, match="cannot identify image file a.png"):
            self.cache(tmp_path, broken)

    def test_others_may_read_it(self, tmp_path):
        mask = os.umask(0o022)
        try:
            path = self.cache(tmp_path).path
        finally:
            os.umask(mask)
        assert os.stat(path).st_mode & 0o777 == 0o644

    def test_a_folder_that_cannot_be_made_is_one_sentence(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="can't write to .*file"):
            self.cache(tmp_path / "file")

    def test_it_leaves_the_random_generators_as_they_were(self, tmp_path):
        def draw():
            return random.random(), np.random.rand(), torch.rand(()).item()

        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        expected = draw()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        self.cache(tmp_path)
        assert draw() == expected
