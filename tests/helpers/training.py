"""Students, teachers, images and arguments for trainings of a second."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from sqakd_hf import QuantizationConfig, SQAKDTrainer, SQAKDTrainingArguments, build_model, quantize_model
from tests.helpers.models import CLASSES, IMAGE_SIZE, TinyConvNet


class Images(Dataset):
    """Seeded noise, 24 images; labels only if asked for."""

    def __init__(self, count: int = 24, size: int = IMAGE_SIZE, labelled: bool = False):
        generator = torch.Generator().manual_seed(3)
        self.pixels = torch.randn(count, 3, size, size, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator).tolist() if labelled else None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        item = {"pixel_values": self.pixels[index]}
        return item if self.labels is None else {**item, "label": self.labels[index]}


class ImageStream(IterableDataset):
    def __iter__(self):
        return iter(Images())


def arguments(folder, **options) -> SQAKDTrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 5,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "calibration_images": 16,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "seed": 7,
        "freeze_batch_norm": False,  # these teachers were never trained: they have no statistics
    }
    return SQAKDTrainingArguments(**{**defaults, **options})


def models(build=TinyConvNet, **config):
    torch.manual_seed(0)
    teacher = build()
    student = copy.deepcopy(teacher)
    quantize_model(student, QuantizationConfig(**config))
    return student, teacher


def undecided_models(data: Images):
    """Return student and teacher for whom no class is everywhere the likeliest."""
    student, teacher = models()
    with torch.no_grad():
        logits = teacher.eval()(data.pixels)
        for model in (student, teacher):
            model.head.bias.sub_(logits.mean(0))
    return student, teacher


def timm_resnet():
    return build_model("timm/test_resnet", CLASSES, image_size=32)


def make_trainer(folder, build=TinyConvNet, config=None, callbacks=None, labelled=False, size=IMAGE_SIZE, **options):
    student, teacher = models(build, **(config or {}))
    data = Images(size=size, labelled=labelled)
    return SQAKDTrainer(
        student, teacher, arguments(folder, **options), data, Images(11, size, labelled), callbacks=callbacks
    )


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not different


def whole_and_resumed(folder, **options):
    """Return a trainer that ran to its end, and one that took over from a run that was killed after a checkpoint."""
    options = {"save_strategy": "steps", "save_steps": 2, **options}
    whole = make_trainer(folder / "whole", **options)
    whole.train()

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise SystemExit  # one step after the checkpoint

    first = make_trainer(folder / "cut", callbacks=[Kill()], **options)
    with pytest.raises(SystemExit):
        first.train()
    second = make_trainer(folder / "cut", **options)
    second.train(resume_from_checkpoint=True)
    return whole, second


class Break(TrainerCallback):
    """Makes a tensor NaN before the third step."""

    def __init__(self, name):
        self.name = name

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.get_parameter(self.name).data[0] = float("nan")
