import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from sqakd_hf import InputError, QuantizationConfig, SQAKDTrainer, SQAKDTrainingArguments, quantize_model
from sqakd_hf.distillation.teacher import Teacher
from tests.helpers.models import IMAGE_SIZE, TinyConvNet, tiny_vit
from tests.helpers.training import Images, arguments, make_trainer


class Watch(nn.Module):
    """Logits by one linear layer; notes the dtype that it computed in."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 4)
        self.seen = []

    def forward(self, pixel_values):
        logits = self.head(pixel_values.flatten(1))
        self.seen.append(logits.dtype)
        return logits


def batch(count=6):
    return {"pixel_values": torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))}


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("around", [None, torch.bfloat16])
    def test_it_computes_in_its_own_dtype_and_returns_float32(self, dtype, around):
        model = Watch()
        teacher = Teacher([model], torch.device("cpu"), dtype)
        with torch.autocast("cpu", around or torch.bfloat16, enabled=around is not None):
            logits = teacher.predict(batch(), 4.0).logits
        assert model.seen == [dtype]
        assert logits.dtype == torch.float32
        assert model.head.weight.dtype == torch.float32

    @pytest.mark.parametrize(
        "options, expected",
        [
            ({}, torch.float32),
            ({"bf16": True}, torch.bfloat16),
            ({"bf16": True, "teacher_dtype": "float32"}, torch.float32),
            ({"teacher_dtype": "bfloat16"}, torch.bfloat16),
            ({"teacher_dtype": "float16"}, torch.float16),
        ],
    )
    def test_auto_follows_training(self, tmp_path, options, expected):
        trainer = make_trainer(tmp_path, **options)
        assert trainer.teacher.dtype == expected

    def test_a_teacher_that_another_trainer_ran_in_half_precision_does_not_stay_so(self, tmp_path):
        torch.manual_seed(0)
        teacher = tiny_vit().eval()
        images = Images(8)
        with torch.no_grad():
            expected = teacher(images.pixels).logits
        half = TrainingArguments(str(tmp_path / "teacher"), bf16=True, use_cpu=True, remove_unused_columns=False)
        Trainer(teacher, half).predict(images)  # accelerate now runs its forward in bfloat16
        with torch.no_grad():
            assert not torch.equal(teacher(images.pixels).logits, expected)
        student = copy.deepcopy(teacher)
        quantize_model(student, QuantizationConfig())
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path, bf16=True, teacher_dtype="float32"), images)
        found = trainer.teacher_prediction({"pixel_values": images.pixels}).logits
        assert torch.equal(found, expected)

    def test_another_dtype_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="'auto' or one of .*'bfloat16'.* got 'int8'"):
            SQAKDTrainingArguments(str(tmp_path), teacher_dtype="int8")

    def test_bfloat16_costs_little_divergence(self):
        torch.manual_seed(0)
        model, images = tiny_vit(), {"pixel_values": torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE)}
        exact, rounded = (
            Teacher([model], torch.device("cpu"), dtype).predict(images, 1.0).logits.double().log_softmax(1)
            for dtype in (torch.float32, torch.bfloat16)
        )
        divergence = (exact.exp() * (exact - rounded)).sum(1).mean()
        assert 0 < divergence < 1e-4


class TestModels:
    def test_the_forward_of_the_users_model_is_not_replaced(self, tmp_path):
        trainer = make_trainer(tmp_path, bf16=True)
        assert "forward" not in vars(trainer.teacher.models[0])
        assert all(parameter.requires_grad for parameter in trainer.teacher.models[0].parameters())

    def test_a_student_that_is_copied_from_it_afterwards_trains(self, tmp_path):
        teacher = make_trainer(tmp_path / "first").teacher.models[0]
        student = copy.deepcopy(teacher)
        quantize_model(student, QuantizationConfig())
        before = copy.deepcopy(student.state_dict())
        SQAKDTrainer(student, teacher, arguments(tmp_path / "second"), Images()).train()
        weights = [name for name, parameter in student.named_parameters() if name.endswith(".weight")]
        assert weights and all(not torch.equal(student.get_parameter(name), before[name]) for name in weights)

    def test_compiled_models_give_the_same_logits(self):
        torch.manual_seed(0)
        model, images = TinyConvNet(), {"pixel_values": torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)}
        plain = Teacher([model], torch.device("cpu")).predict(images, 4.0).logits
        compiled = Teacher([model], torch.device("cpu"), compile_options={"backend": "aot_eager"})
        assert compiled._runs[0] is not model
        torch.testing.assert_close(compiled.predict(images, 4.0).logits, plain)

    def test_the_trainer_compiles_it_when_it_compiles_the_student(self, tmp_path):
        trainer = make_trainer(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", max_steps=2)
        assert type(trainer.teacher._runs[0]).__name__ == "OptimizedModule"
        assert trainer.train().global_step == 2

    def test_channels_last_reaches_student_teacher_and_images(self, tmp_path):
        trainer = make_trainer(tmp_path, channels_last=True, max_steps=2)
        seen = []
        trainer.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        trainer.train()
        layouts = [trainer.model.stem[0].weight, trainer.teacher.models[0].stem[0].weight, *seen[-2:]]
        assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in layouts)

    def test_channels_last_gives_the_same_logits(self, tmp_path):
        logits = []
        for channels_last in (False, True):
            # Float activations: a code that flips at a tie would move them by more than rounding does.
            config = {"activation_bits": None, "weight_bits": 4}
            trainer = make_trainer(tmp_path, config=config, channels_last=channels_last)
            trainer.calibrate()
            logits.append(torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions))
        torch.testing.assert_close(*logits)


class TestFingerprint:
    def test_it_changes_with_weights_dtype_and_models_and_with_nothing_else(self):
        torch.manual_seed(0)
        device, model = torch.device("cpu"), TinyConvNet()
        first = Teacher([model], device).fingerprint()
        assert Teacher([copy.deepcopy(model)], device).fingerprint() == first
        assert Teacher([copy.deepcopy(model)], device, channels_last=True).fingerprint() == first
        others = [Teacher([model], device, torch.bfloat16), Teacher([model, TinyConvNet()], device)]
        changed = copy.deepcopy(model)
        changed.stem[1].running_mean[0] += 1
        others.append(Teacher([changed], device))
        assert len({first, *(other.fingerprint() for other in others)}) == 4
