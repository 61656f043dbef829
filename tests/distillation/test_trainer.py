import contextlib
import copy
import json
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from accelerate.utils import release_memory
from torch import nn
from transformers import TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

from sqakd_hf import (
    FakeQuantizer,
    ImageCollator,
    InputError,
    InterruptCallback,
    QuantizationConfig,
    SQAKDTrainer,
    build_model,
    calibrate_model,
    distillation_loss,
    is_calibrated,
    quantize_model,
)
from sqakd_hf.distillation import trainer as trainer_module
from sqakd_hf.distillation.callbacks import StopWithoutGain
from sqakd_hf.distillation.nan_diagnostics import NonFiniteError
from sqakd_hf.outputs.forward import Prediction, predict
from sqakd_hf.reporting.training_record import TrainingRecord
from tests.helpers.models import CLASSES, IMAGE_SIZE, TinyConvNet, Wrapper, tiny_vit
from tests.helpers.training import (
    Images,
    ImageStream,
    arguments,
    assert_same_state,
    make_trainer,
    models,
    timm_resnet,
    undecided_models,
    whole_and_resumed,
)


class TestTraining:
    def test_all_parameters_of_the_student_move_and_none_of_the_teacher(self, tmp_path):
        trainer = make_trainer(tmp_path, config={"quantizer": "ewgs"}, quantizer_learning_rate=1e-2)
        trainer.calibrate()
        before = copy.deepcopy(trainer.model.state_dict())
        teacher = copy.deepcopy(trainer.teacher.models[0].state_dict())

        trainer.train()

        still = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
        assert still == ["stem.0.input_quantizer.lower", "stem.0.input_quantizer.upper"]  # images do not change
        assert all(torch.equal(value, teacher[name]) for name, value in trainer.teacher.models[0].state_dict().items())
        assert not trainer.teacher.models[0].training
        assert all(parameter.grad is None for parameter in trainer.teacher.models[0].parameters())

    def test_the_loss_falls(self, tmp_path):
        trainer = make_trainer(tmp_path, num_train_epochs=15)
        trainer.calibrate()
        before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
        trainer.train()
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before / 2

    def test_labels_change_no_bit_of_the_result(self, tmp_path):
        results = []
        for labelled in (True, False):
            trainer = make_trainer(tmp_path / str(labelled), labelled=labelled, eval_strategy="epoch")
            trainer.train()
            results.append(trainer.model)
        assert_same_state(*results)

    def test_an_uncalibrated_student_is_calibrated_first(self, tmp_path):
        trainer = make_trainer(tmp_path)
        assert not is_calibrated(trainer.model)
        trainer.train()
        assert is_calibrated(trainer.model)

    def test_accumulated_batches_train_like_one(self, tmp_path):
        results = []
        for batch, steps in ((8, 1), (4, 2)):
            trainer = make_trainer(
                tmp_path / str(batch),
                tiny_vit,
                optim="sgd",
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
                max_grad_norm=0,
            )
            trainer.train()
            results.append(trainer.model.state_dict())
        for name, value in results[0].items():
            # Sums of the same terms in another order; a code that flips would move a weight by far more.
            torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5, msg=name)

    def test_it_trains_on_a_stream(self, tmp_path):
        student, teacher = models()
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path, max_steps=3), ImageStream())
        trainer.train()
        assert trainer.state.global_step == 3

    def test_ranges_stay_float32_under_bf16(self, tmp_path):
        trainer = make_trainer(tmp_path, bf16=True, eval_strategy="epoch")
        trainer.train()
        ranges = [
            t for m in trainer.model.modules() if isinstance(m, FakeQuantizer) for t in m.range_tensors().values()
        ]
        assert {tensor.dtype for tensor in ranges} == {torch.float32}
        assert all(
            log["eval_loss"] == pytest.approx(log["eval_loss"])
            for log in trainer.state.log_history
            if "eval_loss" in log
        )

    def test_training_logs_the_agreement(self, tmp_path):
        trainer = make_trainer(tmp_path, logging_steps=1)
        trainer.train()
        agreements = [log["agreement"] for log in trainer.state.log_history if "loss" in log]
        assert len(agreements) == 6
        assert all(0 <= value <= 1 for value in agreements)


class TestSample:
    """Images for calibration and the like."""

    def seen_by(self, act, tmp_path, **options):
        seen = []

        class Watched(Images):
            def __getitem__(self, index):
                seen.append(index)
                return super().__getitem__(index)

        student, teacher = models()
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path, **options), Watched(300))
        act(trainer)
        return seen

    def test_is_of_the_whole_set_whatever_its_order(self, tmp_path):
        seen = self.seen_by(lambda trainer: trainer.calibrate(), tmp_path, calibration_images=60)
        assert len(set(seen)) == len(seen) == 60
        # Of five classes in a row each has its share: 12 of 60, give or take what chance gives.
        assert all(4 <= sum(index // 60 == place for index in seen) <= 20 for place in range(5))

    def test_is_the_same_each_time_and_another_for_another_seed(self, tmp_path):
        first, again = (self.seen_by(lambda trainer: trainer.calibrate(), tmp_path) for _ in range(2))
        assert first == again != self.seen_by(lambda trainer: trainer.calibrate(), tmp_path, seed=8)

    def test_of_a_small_set_is_all_of_it(self, tmp_path):
        seen = self.seen_by(lambda trainer: trainer.calibrate(), tmp_path, calibration_images=512)
        assert sorted(seen) == list(range(300))

    def test_of_a_stream_are_its_first_images(self, tmp_path):
        student, teacher = models()
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path, max_steps=1), ImageStream())
        (batch,) = trainer._sampled(16)
        assert torch.equal(batch["pixel_values"], Images().pixels[:16])

    def test_brings_masks_and_no_labels(self, tmp_path):
        data = [{"pixel_values": image, "label": 0, "pixel_mask": image[0] > 0} for image in Images().pixels]
        student, teacher = models()
        (batch,) = SQAKDTrainer(student, teacher, arguments(tmp_path), data)._sampled(8)
        assert batch.keys() == {"pixel_values", "pixel_mask"}
        assert torch.equal(batch["pixel_mask"], batch["pixel_values"][:, 0] > 0)


class TestFrozenBatchNorm:
    @pytest.mark.parametrize("freezes", [False, True, "auto", "true", "false"])
    def test_statistics_stay_those_of_the_teacher_and_the_rest_trains(self, tmp_path, freezes):
        trainer = make_trainer(tmp_path, freeze_batch_norm=freezes)
        freezes = freezes not in (False, "false")
        trainer.calibrate()
        norms = {n: m for n, m in trainer.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        before = {name: copy.deepcopy(module.state_dict()) for name, module in norms.items()}
        trainer.train()
        assert norms
        for name, module in norms.items():
            after = module.state_dict()
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                assert torch.equal(after[buffer], before[name][buffer]) is freezes, buffer
            assert not torch.equal(after["weight"], before[name]["weight"])

    def test_is_refused_where_it_means_nothing(self, tmp_path):
        with pytest.raises(InputError, match="freeze_batch_norm: the student has no BatchNorm"):
            make_trainer(tmp_path, tiny_vit, freeze_batch_norm=True).train()
        with pytest.raises(InputError, match="choose one"):
            arguments(tmp_path, freeze_batch_norm=True, reestimate_batch_norm=24)
        with pytest.raises(InputError, match="freeze_batch_norm must be 'auto', True or False, got 'sometimes'"):
            arguments(tmp_path, freeze_batch_norm="sometimes")


class TestOptimizer:
    def test_ranges_have_their_own_rate_and_nothing_but_matrices_decays(self, tmp_path):
        trainer = make_trainer(tmp_path, weight_decay=0.1, learning_rate=1e-2)
        trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        groups = [
            ({names[id(p)] for p in group["params"]}, group["weight_decay"], group["lr"])
            for group in trainer.optimizer.param_groups
        ]
        decayed, rest, ranges = groups
        assert decayed[1:] == (0.1, 1e-2)
        assert decayed[0] == {"stem.0.weight", "body.0.weight", "body.3.weight", "head.weight"}
        assert rest[1:] == (0.0, 1e-2)
        assert ranges[1:] == (0.0, 1e-4)
        fixed = {"stem.0.input_quantizer.scale"}  # the range of the images themselves
        assert ranges[0] == {name for name in names.values() if "quantizer" in name} - fixed
        assert set().union(*(group[0] for group in groups)) == set(names.values()) - fixed

    def test_one_that_is_passed_without_ranges_or_weights_is_told_what_it_lacks(self, tmp_path, caplog):
        def warnings_with(parameters):
            caplog.clear()
            student, teacher = models()
            optimizer = torch.optim.SGD(parameters(student, teacher), lr=0.0)
            trainer = SQAKDTrainer(
                student, teacher, arguments(tmp_path, max_steps=1), Images(), optimizers=(optimizer, None)
            )
            trainer.train()
            assert trainer.optimizer.optimizer is optimizer
            return [record.getMessage() for record in caplog.records if "optimizer that was passed" in record.message]

        of_teacher = warnings_with(lambda student, teacher: teacher.parameters())
        assert len(of_teacher) == 2
        assert "lacks 8 of the student's 8 ranges of its quantizers: those stay" in of_teacher[0]
        assert "lacks 4 of the student's 4 quantized weights: those stay" in of_teacher[1]
        head = warnings_with(lambda student, teacher: [p for n, p in student.named_parameters() if "head" not in n])
        assert ["lacks 2 of the student's 8 ranges" in head[0], "lacks 1 of the student's 4" in head[1]] == [True] * 2
        assert warnings_with(lambda student, teacher: student.parameters()) == []

    def test_its_own_is_whole_in_a_second_training(self, tmp_path, caplog):
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.train()
        trainer.train()
        assert "optimizer that was passed" not in caplog.text

    def test_ranges_still_learn_after_one_could_not_be_made(self, tmp_path):
        student, teacher = models()
        impossible = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": -1.0})}
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path), Images(), **impossible)
        expected = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        with pytest.raises(ValueError, match="Invalid learning rate"):
            trainer.create_optimizer()
        assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == expected


class TestEvaluation:
    @pytest.mark.parametrize("missing", [-1, -100, None])
    @pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["first", "last"])
    def test_images_without_label_are_neither_right_nor_wrong(self, tmp_path, missing, order):
        trainer = make_trainer(tmp_path, labelled=True)
        trainer.calibrate()
        every = list(trainer.eval_dataset)
        labelled = [1, 2, 4]  # the last batch has none
        right = trainer.teacher.models[0].eval()(torch.stack([item["pixel_values"] for item in every])).argmax(1)
        some = [{**item, "label": right[i] if i in labelled else missing} for i, item in enumerate(every)][order]
        metrics = trainer.evaluate(some)
        assert trainer.results["teacher"]["accuracy"] == 1
        assert metrics["eval_accuracy"] == trainer.evaluate([every[i] for i in labelled])["eval_agreement"]
        assert metrics["eval_agreement"] == pytest.approx(trainer.evaluate(every)["eval_agreement"], abs=1e-12)

    def test_without_any_label_there_is_no_accuracy(self, tmp_path):
        trainer = make_trainer(tmp_path, labelled=True)
        trainer.calibrate()
        metrics = trainer.evaluate([{**item, "label": -100} for item in trainer.eval_dataset])
        assert "eval_loss" in metrics and "eval_accuracy" not in metrics

    def test_all_images_count_where_the_training_drops_its_last_batch(self, tmp_path):
        trainer = make_trainer(tmp_path, labelled=True, dataloader_drop_last=True)
        trainer.calibrate()
        expected = make_trainer(tmp_path, labelled=True)
        expected.calibrate()
        metrics = trainer.evaluate()
        assert trainer.results["calibrated"]["images"] == 11
        assert all(metrics[f"eval_{key}"] == expected.evaluate()[f"eval_{key}"] for key in ("loss", "accuracy"))
        assert len(trainer.predict(trainer.eval_dataset).predictions) == 11 and trainer.args.dataloader_drop_last

    def test_means_are_exact_over_an_uneven_last_batch(self, tmp_path):
        trainer = make_trainer(tmp_path, labelled=True)
        trainer.calibrate()

        metrics = trainer.evaluate()

        data = trainer.eval_dataset
        with torch.no_grad():
            student = trainer.model.eval()(data.pixels).double()
            teacher = trainer.teacher.models[0](data.pixels).double()
        p = (teacher / 4).softmax(1)
        divergence = 16 * (p * (p.log() - (student / 4).log_softmax(1))).sum(1)
        labels = torch.tensor(data.labels)
        # The trainer's float32 log-probabilities of about 1.4 resolve 1e-7, times T² = 16.
        assert metrics["eval_loss"] == pytest.approx(divergence.mean().item(), rel=1e-4, abs=16e-7)
        assert metrics["eval_agreement"] == (student.argmax(1) == teacher.argmax(1)).double().mean().item()
        assert metrics["eval_accuracy"] == (student.argmax(1) == labels).double().mean().item()

    def test_it_needs_no_label(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.calibrate()
        metrics = trainer.evaluate(metric_key_prefix="test")
        assert {"test_loss", "test_agreement"} <= metrics.keys()
        assert "test_accuracy" not in metrics

    def test_an_uncalibrated_student_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="no ranges yet. Call trainer.calibrate"):
            make_trainer(tmp_path).evaluate()

    def test_evaluation_before_and_after_training_see_the_same_student(self, tmp_path):
        trainer = make_trainer(tmp_path, bf16=True, num_train_epochs=1, learning_rate=0.0)
        trainer.calibrate()
        before = trainer.evaluate()["eval_loss"]
        running = {n: b.clone() for n, b in trainer.model.named_buffers()}
        trainer.train()
        for name, buffer in trainer.model.named_buffers():
            buffer.copy_(running[name])  # BatchNorm's statistics moved; weights did not
        # Prepared (autocast) in both, which the teacher's own preparation must not prevent.
        assert trainer.evaluate()["eval_loss"] == before

    @pytest.mark.parametrize("learning_rate", [1e-3, 10.0])
    def test_a_training_that_did_harm_says_so(self, tmp_path, learning_rate, caplog):
        data = Images(64)
        student, teacher = undecided_models(data)
        args = arguments(tmp_path, learning_rate=learning_rate, num_train_epochs=8)
        trainer = SQAKDTrainer(student, teacher, args, data, data)
        trainer.calibrate()
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        did_harm = learning_rate > 1
        assert (after["eval_loss"] > before["eval_loss"]) is did_harm
        assert not did_harm or after["eval_agreement"] < before["eval_agreement"]
        assert ("Training did harm" in caplog.text) is did_harm
        assert ("freeze_batch_norm=True" in caplog.text) is did_harm

    @pytest.mark.parametrize("same_images", [True, False])
    def test_harm_is_told_of_the_same_images_alone_whoever_calibrated(self, tmp_path, same_images, caplog):
        data = Images(64)
        student, teacher = undecided_models(data)
        calibrate_model(student, [data.pixels], disable_progress=True)
        args = arguments(tmp_path, learning_rate=HARMFUL, num_train_epochs=8)
        trainer = SQAKDTrainer(student, teacher, args, data, data)
        trainer.evaluate()
        trainer.train()
        trainer.evaluate(data if same_images else Images(64))
        assert ("Training did harm" in caplog.text) is same_images
        assert ("calibrated" in trainer.results) is same_images

    def test_predict_returns_the_students_logits(self, tmp_path):
        trainer = make_trainer(tmp_path, labelled=True)
        trainer.calibrate()
        output = trainer.predict(trainer.eval_dataset)
        with torch.no_grad():
            expected = trainer.model(trainer.eval_dataset.pixels)
        torch.testing.assert_close(torch.as_tensor(output.predictions), expected)
        assert "test_agreement" in output.metrics

    @pytest.mark.parametrize("metric", ["eval_loss", "eval_agreement"])
    def test_the_best_checkpoint_is_chosen_without_labels(self, tmp_path, metric):
        trainer = make_trainer(
            tmp_path,
            tiny_vit,
            num_train_epochs=4,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model=metric,
        )
        trainer.train()
        values = [log[metric] for log in trainer.state.log_history if metric in log]
        best = min(values) if metric == "eval_loss" else max(values)
        assert trainer.state.best_metric == best
        assert trainer.evaluate()[metric] == best


CHOOSES = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
HARMFUL = 10.0  # a learning rate


class TestFirstCandidate:
    """The student before its first step takes part in the choice of the best one."""

    @pytest.mark.parametrize("build", [TinyConvNet, tiny_vit], ids=["module", "native-vit"])
    @pytest.mark.parametrize("metric", ["eval_loss", "eval_agreement"])
    @pytest.mark.parametrize("learning_rate", [1e-2, HARMFUL])
    def test_the_student_is_never_worse_than_the_calibrated_one(self, tmp_path, build, metric, learning_rate):
        trainer = make_trainer(tmp_path, build, learning_rate=learning_rate, metric_for_best_model=metric, **CHOOSES)
        trainer.calibrate()
        before = trainer.evaluate()[metric]
        trainer.train()
        after = trainer.evaluate()[metric]
        assert after <= before if metric == "eval_loss" else after >= before

    def test_where_no_step_is_better_it_is_kept_bit_for_bit_and_said_everywhere(self, tmp_path, caplog):
        trainer = make_trainer(tmp_path, tiny_vit, learning_rate=HARMFUL, save_total_limit=1, **CHOOSES)
        trainer.calibrate()
        calibrated = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        before = trainer.evaluate()
        trainer.train()

        assert trainer.kept_untrained
        assert "Training did not help" in caplog.text and "eval_loss" in caplog.text
        assert all(torch.equal(tensor, calibrated[name]) for name, tensor in trainer.model.state_dict().items())
        assert trainer.evaluate()["eval_loss"] == before["eval_loss"]
        assert trainer.results["student"] == trainer.results["calibrated"] | {"step": 0}
        assert "Training did harm" not in caplog.text
        trainer.save_model()
        trainer.create_model_card()
        for page in ("README.md", "report.html"):
            text = (tmp_path / page).read_text()
            assert "student, as calibrated" in text and "distilled student" not in text
        assert "the student before its first step" in (tmp_path / "README.md").read_text()

    def test_a_better_step_is_kept_and_its_own_numbers_are_shown(self, tmp_path):
        trainer = make_trainer(tmp_path, tiny_vit, num_train_epochs=4, **CHOOSES)
        trainer.train()
        assert not trainer.kept_untrained
        logs = {log["step"]: log for log in trainer.state.log_history if "eval_loss" in log}
        best = trainer.state.best_global_step
        assert list(logs)[0] == 0 and best > 0
        assert trainer.results["calibrated"]["kl"] == logs[0]["eval_kl"]
        assert trainer.results["student"]["kl"] == logs[best]["eval_kl"]
        assert trainer.results["student"]["step"] == best

    def test_it_costs_the_training_no_random_number(self, tmp_path):
        students = []
        for chooses in (True, False):
            folder = tmp_path / str(chooses)
            make_trainer(folder, **{**CHOOSES, "load_best_model_at_end": chooses}).train()
            students.append(safetensors.torch.load_file(folder / "checkpoint-6" / "model.safetensors"))
        assert all(torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())

    @pytest.mark.parametrize("build", [TinyConvNet, tiny_vit], ids=["module", "native-vit"])
    def test_its_checkpoint_resumes_to_the_bits_of_an_uninterrupted_run(self, tmp_path, build):
        whole = make_trainer(tmp_path / "whole", build, **CHOOSES)
        whole.train()
        resumed = make_trainer(tmp_path / "resumed", build, **CHOOSES)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-0"))
        assert_same_state(resumed.model, whole.model)
        assert resumed.state.best_metric == whole.state.best_metric

    @pytest.mark.parametrize("helps", [True, False])
    def test_new_batch_norm_statistics_are_kept_where_they_do_no_harm(self, tmp_path, caplog, helps):
        torch.manual_seed(0)
        teacher, images = TinyConvNet(), Images()
        for _ in range(50):
            teacher(images.pixels)  # in training mode: it learns their statistics
        student = copy.deepcopy(teacher)
        quantize_model(student, QuantizationConfig(weight_bits=8, activation_bits=8))
        norm = student.stem[1]
        if helps:
            norm.running_mean.add_(1)
        else:
            images = [{"pixel_values": image["pixel_values"] * 3 + 2} for image in images]
        args = arguments(tmp_path, learning_rate=0.0, reestimate_batch_norm=24, **CHOOSES)
        trainer = SQAKDTrainer(student, teacher, args, images, Images(11))
        trainer.calibrate()
        loss, mean = trainer.evaluate()["eval_loss"], norm.running_mean.clone()
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_loss"] < loss if helps else after["eval_loss"] == loss
        assert torch.equal(norm.running_mean, mean) is not helps
        assert ("New BatchNorm statistics made the student worse" in caplog.text) is not helps
        assert trainer.results["student"]["kl"] == after["eval_kl"]

    def test_without_held_out_images_one_line_says_that_nothing_is_compared(self, tmp_path, caplog):
        make_trainer(tmp_path).train()
        lines = [record for record in caplog.records if "No held-out images compare" in record.message]
        assert len(lines) == 1 and lines[0].levelname == "WARNING"
        caplog.clear()
        make_trainer(tmp_path / "chooses", **CHOOSES).train()
        assert "No held-out images compare" not in caplog.text


class TestStopWithoutGain:
    """The decision is made from the log, which a checkpoint holds."""

    def trainer(self, folder):
        options = {"learning_rate": HARMFUL, "num_train_epochs": 6, "save_total_limit": None}
        return make_trainer(folder, callbacks=[StopWithoutGain(patience=2)], **{**CHOOSES, **options})

    def test_a_training_that_only_does_harm_ends_after_two_epochs(self, tmp_path):
        trainer = self.trainer(tmp_path)
        trainer.train()
        assert trainer.state.global_step == 2 * 3 and trainer.kept_untrained

    def test_a_resumed_one_ends_where_the_uninterrupted_one_did(self, tmp_path):
        self.trainer(tmp_path / "whole").train()
        resumed = self.trainer(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        assert resumed.state.global_step == 2 * 3

    def test_a_training_that_gains_goes_to_its_end(self, tmp_path):
        trainer = make_trainer(tmp_path, tiny_vit, callbacks=[StopWithoutGain(patience=2)], **CHOOSES)
        trainer.train()
        assert trainer.state.global_step == 6


class TestReconstruct:
    """Block by block before the training; held-out images decide whether it is kept."""

    def trainer(self, folder, **options):
        student, teacher = models()
        args = arguments(folder, **{**CHOOSES, "freeze_batch_norm": "auto", **options})
        return SQAKDTrainer(student, teacher, args, Images(40), Images(11))

    def test_the_student_learns_and_its_stage_is_shown(self, tmp_path):
        trainer = self.trainer(tmp_path)
        trainer.calibrate()
        before = trainer.evaluate()
        found = trainer.reconstruct(steps=20)
        after = trainer.evaluate()
        assert after["eval_loss"] < before["eval_loss"]
        assert all(unit.after <= unit.calibrated for unit in found)
        assert trainer.results["calibrated"]["kl"] == before["eval_kl"]
        assert trainer.results["reconstructed"]["kl"] == after["eval_kl"]
        assert trainer.results["student"] == trainer.results["reconstructed"] | {"step": None}

    def test_a_training_begins_from_it_and_returns_to_it(self, tmp_path):
        trainer = self.trainer(tmp_path, learning_rate=HARMFUL)
        trainer.reconstruct(steps=20)
        state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.train()
        assert trainer.kept_untrained
        assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.model.state_dict().items())
        assert trainer.results["student"] == trainer.results["reconstructed"] | {"step": 0}

    def test_where_it_does_harm_the_student_stays_as_it_was(self, tmp_path, monkeypatch, caplog):
        def ruin(model, *args, **kwargs):
            model.head.weight.data.neg_()
            model.head.input_quantizer.scale.data.mul_(5)

        monkeypatch.setattr("sqakd_hf.distillation.preparing.reconstruct_model", ruin)
        trainer = self.trainer(tmp_path)
        trainer.calibrate()
        state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        before = trainer.evaluate()
        assert trainer.reconstruct() is None
        assert "Reconstruction did not help: eval_loss" in caplog.text
        assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.model.state_dict().items())
        assert trainer.evaluate()["eval_loss"] == before["eval_loss"]
        assert trainer.results["student"] == trainer.results["calibrated"] | {"step": None}

    def test_ranges_that_it_came_with_are_what_it_is_compared_with(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sqakd_hf.distillation.preparing.calibrate_model", None)  # is not called
        trainer = self.trainer(tmp_path)
        calibrate_model(trainer.model, [Images(40).pixels], disable_progress=True)
        before = trainer.evaluate()
        assert trainer.reconstruct(steps=5) is None or trainer.evaluate()["eval_loss"] <= before["eval_loss"]
        assert trainer.results["calibrated"]["kl"] == before["eval_kl"]

    def test_processes_share_the_images_evenly(self, tmp_path, monkeypatch):
        trainer = self.trainer(tmp_path)
        whole = [batch["pixel_values"] for batch in trainer._own_share(40)]
        monkeypatch.setattr(type(trainer.args), "world_size", 3)
        shares = []
        for rank in range(3):
            monkeypatch.setattr(type(trainer.args), "process_index", rank)
            shares.append([batch["pixel_values"] for batch in trainer._own_share(40)])
        assert len({sum(map(len, share)) for share in shares}) == 1
        for batch, *parts in zip(whole, *shares, strict=True):
            joined = torch.cat(parts)
            assert torch.equal(joined, batch[: len(joined)]) and len(batch) - len(joined) < 3

    def test_without_images_it_is_refused(self, tmp_path):
        student, teacher = models()
        with pytest.raises(InputError, match="Reconstruction needs images: pass train_dataset"):
            SQAKDTrainer(student, teacher, arguments(tmp_path)).reconstruct()


@pytest.mark.parametrize(
    ("build", "size"), [(TinyConvNet, 16), (tiny_vit, 16), (timm_resnet, 32)], ids=["module", "native-vit", "timm"]
)
class TestResuming:
    def test_a_resumed_run_equals_an_uninterrupted_one(self, tmp_path, build, size):
        whole, resumed = whole_and_resumed(tmp_path, build=build, size=size, config={"quantizer": "lsq"})
        assert resumed.state.global_step == whole.state.global_step == 6
        assert_same_state(resumed.model, whole.model)


class Grid:
    """A search in this process: `train` for each of the given changes of the arguments, as optuna's runs it."""

    trials = ({"learning_rate": 1e-2}, {"learning_rate": 0.0}, {"learning_rate": 1e-2})

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        runs = []
        for number, params in enumerate(self.trials):
            trainer.train(trial=SimpleNamespace(number=number, params=params))
            rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
            runs.append((trainer.compute_objective(trainer.evaluate()), trainer.model, trainer.results, rates))
            trainer.model_wrapped, trainer.model = release_memory(trainer.model_wrapped, trainer.model)
            trainer.accelerator.clear()
        return runs


class TestModelInit:
    def search_by(self, backend, monkeypatch):
        monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, backend)
        monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)

    def trainer(self, folder, model_init, teacher=None, given=(None,), **options):
        return SQAKDTrainer(
            *given,
            teacher_model=models()[1] if teacher is None else teacher,
            args=arguments(folder, **options),
            train_dataset=Images(),
            eval_dataset=Images(11),
            model_init=model_init,
        )

    @pytest.mark.parametrize(
        ("way", "options"),
        [
            ("no model", {}),
            ("model=None", {"gradient_accumulation_steps": 2, "channels_last": True}),
            ("model=None", {"objective": "kl + at", "oscillation_freezing": 0.01}),
            ("set later", {}),
        ],
    )
    def test_each_training_has_a_student_of_its_own_which_learns_like_one_that_is_given(self, tmp_path, way, options):
        expected = make_trainer(tmp_path / "given", config={"weight_bits": 2}, **options)
        student = copy.deepcopy(expected.model)
        expected.train()

        def fresh():
            return copy.deepcopy(student)  # nobody's random numbers are used up

        if way == "set later":
            trainer = make_trainer(tmp_path, config={"weight_bits": 2}, **options)
            trainer.model_init = fresh
        else:
            trainer = self.trainer(tmp_path, fresh, given=() if way == "no model" else (None,), **options)
        trained = [trainer.model]
        for _ in range(2):
            trainer.train()
            trained.append(trainer.model)
            assert_same_state(trainer.model, expected.model)
        assert len(set(map(id, trained))) == 3

    def test_what_was_measured_of_one_student_is_not_said_of_the_next(self, tmp_path):
        trainer = self.trainer(tmp_path, lambda: models()[0], logging_steps=4, num_train_epochs=3)
        trainer.calibrate()
        trainer.evaluate()
        trainer.measure_layers(8)
        trainer.train()
        assert trainer.results == trainer.layer_sqnr == {}
        logs = []
        for _ in range(2):  # the last step of each is in no log of its own
            trainer.train()
            logs.append([log["agreement"] for log in trainer.state.log_history if "agreement" in log])
        assert len(logs[0]) == 2 and logs[0] == logs[1]

    def test_it_goes_on_from_a_checkpoint(self, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 2}
        whole = self.trainer(tmp_path, lambda: models()[0], **options)
        whole.train()
        resumed = self.trainer(tmp_path, lambda: models()[0], **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_same_state(resumed.model, whole.model)

    def test_a_calibrated_student_keeps_its_ranges(self, tmp_path):
        given = models()[0]
        calibrate_model(given, [2 * Images().pixels], disable_progress=True)
        trainer = self.trainer(tmp_path, lambda: copy.deepcopy(given), learning_rate=0.0, max_steps=1)
        trainer.train()
        ranges = [name for name, _ in given.named_parameters() if "quantizer" in name]
        assert ranges
        assert all(torch.equal(trainer.model.get_parameter(name), given.get_parameter(name)) for name in ranges)

    def test_what_it_returns_is_checked_like_a_student_that_is_given(self, tmp_path):
        student, teacher = models()
        for model_init, message in (
            (TinyConvNet, "The student is not quantized"),
            (lambda: teacher, "The student is not quantized"),
            (lambda: models(lambda: build_model("timm/test_resnet", 7, 32))[0], "4 .* 7|7 .* 4"),
        ):
            with pytest.raises(InputError, match=message):
                self.trainer(tmp_path, model_init, teacher)
            later = SQAKDTrainer(models()[0], teacher, arguments(tmp_path), Images())
            later.model_init = model_init
            with pytest.raises(InputError, match=message):
                later.train()
        again = self.trainer(tmp_path, lambda: student, teacher)
        with pytest.raises(InputError, match="student that this trainer has already. Return a new one"):
            again.train()

    def test_neither_student_nor_teacher_is_a_sentence(self, tmp_path):
        student, teacher = models()
        with pytest.raises(InputError, match="pass model, or model_init"):
            SQAKDTrainer(teacher_model=teacher, args=arguments(tmp_path))
        with pytest.raises(InputError, match="pass teacher_model"):
            SQAKDTrainer(student, args=arguments(tmp_path))

    def test_each_trial_of_a_search_trains_a_calibrated_student_of_its_own(self, tmp_path, monkeypatch):
        self.search_by(Grid, monkeypatch)
        trainer = self.trainer(tmp_path, lambda trial: models()[0], save_strategy="epoch")
        runs = trainer.hyperparameter_search(lambda trial: trial.params, backend="optuna")
        (first, still, third), students, results, rates = zip(*runs, strict=True)
        assert first == third != still
        assert len(set(map(id, students))) == 3
        divergences = [result["student"]["kl"] for result in results]
        assert divergences[0] == divergences[2] != divergences[1]
        assert rates == ([1e-2, 1e-2, 1e-4], [0.0, 0.0, 0.0], [1e-2, 1e-2, 1e-4])  # the ranges' follows
        assert {path.name for path in tmp_path.iterdir()} == {"run-0", "run-1", "run-2"}

    def test_a_search_sets_any_argument_before_the_student_gets_ready(self, tmp_path, monkeypatch):
        class Options(Grid):
            trials = ({"calibration_images": 4}, {"objective": "at", "oscillation_freezing": 0.01}, {"temperature": 1})

        self.search_by(Options, monkeypatch)
        student, _ = models(weight_bits=2)
        trainer = self.trainer(tmp_path / "search", lambda: copy.deepcopy(student))
        runs = trainer.hyperparameter_search(lambda trial: trial.params, backend="optuna")
        given = {}
        for run, changes in zip(runs, Options.trials, strict=True):
            given |= changes  # Trainer keeps what a trial set
            alone = make_trainer(tmp_path / "alone", config={"weight_bits": 2}, **given)
            alone.train()
            assert_same_state(run[1], alone.model)

    def test_optuna_searches(self, tmp_path):
        pytest.importorskip("optuna")
        student, _ = models()
        trainer = self.trainer(tmp_path, lambda: copy.deepcopy(student), eval_strategy="epoch")
        best = trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [0.0, 1e-2])},
            n_trials=2,
            backend="optuna",
        )
        alone = make_trainer(tmp_path / "alone", **best.hyperparameters)
        alone.train()
        assert best.hyperparameters == {"learning_rate": 1e-2}
        assert best.objective == alone.evaluate()["eval_loss"]


class Fail(TrainerCallback):
    """Raises in a step."""

    def __init__(self, error, at=2):
        self.error, self.at = error, at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise self.error


class TestInterrupt:
    @pytest.fixture(autouse=True)
    def _interrupts_nobody_else(self):
        """A signal that came late would end the process that runs the tests."""
        before = signal.signal(signal.SIGINT, lambda signum, frame: None)
        yield
        signal.signal(signal.SIGINT, before)

    def test_ctrl_c_leaves_a_checkpoint_that_resumes_exactly(self, tmp_path):
        class CtrlC(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    signal.raise_signal(signal.SIGINT)

        interrupt = InterruptCallback()
        first = make_trainer(tmp_path / "cut", callbacks=[interrupt, CtrlC()])
        handler = signal.getsignal(signal.SIGINT)
        first.train()
        assert interrupt.interrupted
        assert signal.getsignal(signal.SIGINT) is handler
        assert (tmp_path / "cut" / "checkpoint-3").is_dir()

        second = make_trainer(tmp_path / "cut")
        second.train(resume_from_checkpoint=True)
        whole = make_trainer(tmp_path / "whole")
        whole.train()
        assert_same_state(second.model, whole.model)

    @pytest.mark.parametrize("error", [NonFiniteError, KeyboardInterrupt])
    def test_an_error_in_training_gives_ctrl_c_back(self, tmp_path, error):
        handler = signal.getsignal(signal.SIGINT)
        trainer = make_trainer(tmp_path, callbacks=[InterruptCallback(), Fail(error)])
        with pytest.raises(error):
            trainer.train()
        assert signal.getsignal(signal.SIGINT) is handler
        interrupt, teacher = InterruptCallback(), tiny_vit()
        other = transformers.Trainer(
            teacher,
            transformers.TrainingArguments(tmp_path, report_to="none", use_cpu=True, remove_unused_columns=False),
            train_dataset=Images(labelled=True),
            data_collator=ImageCollator(),
            callbacks=[interrupt, Fail(error)],
        )
        with pytest.raises(error), contextlib.closing(interrupt):
            other.train()
        assert signal.getsignal(signal.SIGINT) is handler


class TestAfterAnError:
    def test_the_next_training_logs_nothing_of_the_one_that_failed(self, tmp_path):
        fail = Fail(NonFiniteError, at=3)
        trainer = make_trainer(tmp_path, callbacks=[fail], logging_steps=2, max_steps=4)
        trainer.teacher_prediction = lambda inputs: Prediction(-predict(trainer.model, inputs).logits)
        with pytest.raises(NonFiniteError):
            trainer.train()
        trainer.pop_callback(fail)
        trainer.teacher_prediction = lambda inputs: predict(trainer.model, inputs)
        trainer.train()
        assert [log["agreement"] for log in trainer.state.log_history if "agreement" in log] == [1.0, 1.0]

    def test_it_evaluates_as_if_no_training_went_on(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[Fail(NonFiniteError)])
        with pytest.raises(NonFiniteError):
            trainer.train()
        assert not trainer.is_in_train

    def test_ranges_still_learn_where_no_optimizer_could_be_made(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.calibrate()
        learning = [parameter.requires_grad for parameter in trainer.model.parameters()]
        trainer.optimizer_cls_and_kwargs = torch.optim.SGD, {"lr": -1.0}
        with pytest.raises(ValueError, match="Invalid learning rate"):
            trainer.train()
        assert [parameter.requires_grad for parameter in trainer.model.parameters()] == learning


class TestSaving:
    def test_arguments_are_saved_without_tokens_and_without_pickle(self, tmp_path):
        trainer = make_trainer(tmp_path, tiny_vit, hub_token="hf_secret")
        trainer.calibrate()
        trainer.save_model()
        assert not list(tmp_path.glob("*.bin"))
        text = (tmp_path / "training_args.json").read_text()
        assert "hf_secret" not in text
        assert json.loads(text)["temperature"] == 4.0

    def test_the_teacher_is_not_saved(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.calibrate()
        trainer.save_model()
        from safetensors.torch import load_file

        saved = load_file(tmp_path / "model.safetensors")
        assert saved.keys() == trainer.model.state_dict().keys()

    def test_the_card_comes_with_a_report_of_what_was_measured(self, tmp_path):
        trainer = make_trainer(tmp_path, tiny_vit, logging_steps=1)
        trainer.calibrate()
        trainer.evaluate()
        before = trainer.measure_layers(8)
        trainer.train()
        trainer.evaluate()
        after = trainer.measure_layers(8)
        assert before.keys() == after.keys() == {layer.name for layer in trainer.model.quantization_plan.quantized}
        trainer.create_model_card()
        record = TrainingRecord.load(str(tmp_path))
        assert record.layer_sqnr == {"calibrated": before, "student": after} and record.results == trainer.results
        page = (tmp_path / "report.html").read_text()
        assert all(f"{value:.1f} dB" in page for value in (*before.values(), *after.values()))
        assert f"{trainer.results['student']['agreement']:.2%}" in page and "<figure" in page
        card = (tmp_path / "README.md").read_text()
        assert "(report.html)" in card and "(learning_curve.png)" in card
        assert (tmp_path / "learning_curve.png").stat().st_size > 5000

    def test_a_card_can_be_written_before_anything_was_done(self, tmp_path):
        trainer = make_trainer(tmp_path / "new" / "folder", tiny_vit)
        trainer.create_model_card()
        assert "has no ranges yet" in (tmp_path / "new" / "folder" / "report.html").read_text()

    def test_a_card_bears_what_callbacks_log_and_odd_names(self, tmp_path):
        trainer = make_trainer(tmp_path / "run_$a_{$b", tiny_vit)
        trainer.calibrate()
        trainer.state.log_history += [{"loss": torch.tensor(1.0), "epoch": 1}, {"loss": 0.5}, {"word": "text"}]
        trainer.create_model_card()
        assert (tmp_path / "run_$a_{$b" / "learning_curve.png").exists()
        assert TrainingRecord.load(str(tmp_path / "run_$a_{$b")).log_history[0] == {"loss": 1.0, "epoch": 1.0}

    def test_measuring_layers_changes_no_training_and_draws_the_same_images(self, tmp_path):
        class Noisy(Images):
            def __getitem__(self, index):
                noise = torch.randn(3, 1, 1) + random.random() + np.random.rand()
                return {"pixel_values": self.pixels[index] + noise.float()}

        trained = []
        for measures in (False, True):
            student, teacher = models()
            trainer = SQAKDTrainer(student, teacher, arguments(tmp_path), Noisy())
            transformers.set_seed(5)
            trainer.calibrate()
            if measures:
                before = trainer.measure_layers(8)
                drawn = torch.randn(1), random.random(), np.random.rand()
                assert trainer.measure_layers(8) == before
                transformers.set_seed(5)  # and nothing was drawn since it was set first
                assert (torch.randn(1), random.random(), np.random.rand()) == drawn
            trainer.train()
            trained.append(student)
        assert_same_state(*trained)

    def test_layers_of_a_half_precision_teacher(self, tmp_path):
        student, teacher = models()
        trainer = SQAKDTrainer(
            student, teacher.bfloat16(), arguments(tmp_path, teacher_dtype="bfloat16"), Images(), Images(11)
        )
        trainer.calibrate()
        assert len(trainer.measure_layers(4)) == len(student.quantization_plan.quantized)
        assert all(parameter.dtype == torch.bfloat16 for parameter in teacher.parameters())
        with pytest.raises(InputError, match="images must be at least 2, got 1"):
            trainer.measure_layers(1)

    def test_layers_are_not_measured_where_there_is_nothing_to_compare(self, tmp_path):
        student, teacher = models()
        data = Images()
        trainer = SQAKDTrainer(student, [teacher, copy.deepcopy(teacher)], arguments(tmp_path), data)
        with pytest.raises(InputError, match="no ranges yet"):
            trainer.measure_layers()
        trainer.calibrate()
        assert trainer.measure_layers() == {} and trainer.layer_sqnr == {}
        alone = SQAKDTrainer(student, teacher, arguments(tmp_path), eval_dataset=data)
        with pytest.raises(InputError, match="Layers are measured on training images"):
            alone.measure_layers()


class TestPairs:
    @pytest.mark.parametrize("cached", [False, True])
    def test_pairs_of_image_and_label_train_and_are_measured_like_columns(self, tmp_path, cached):
        class Pairs(Images):
            fingerprint = "pairs"

            def __getitem__(self, index):
                item = super().__getitem__(index)
                return item["pixel_values"], item["label"]

        found = []
        for name, kind in (("columns", Images), ("pairs", Pairs)):
            student, teacher = models()
            cache = {"cache_teacher_logits": str(tmp_path / name)} if cached and kind is Pairs else {}
            args = arguments(tmp_path / name, objective="kl + ce", **cache)
            data = kind(labelled=True)
            trainer = SQAKDTrainer(student, teacher, args, data, data)
            trainer.train()
            metrics = trainer.evaluate()
            found.append([metrics[f"eval_{key}"] for key in ("loss", "agreement", "accuracy")])
        assert found[1] == pytest.approx(found[0], rel=1e-5)


class TestBadInput:
    def test_a_float_student_is_refused(self, conv_net, tmp_path):
        with pytest.raises(InputError, match="The student is not quantized. Call quantize_model"):
            SQAKDTrainer(conv_net, copy.deepcopy(conv_net), arguments(tmp_path))

    def test_the_student_can_not_teach_itself(self, tmp_path):
        student, _ = models()
        with pytest.raises(InputError, match="one object. Use copy.deepcopy"):
            SQAKDTrainer(student, student, arguments(tmp_path))

    def test_a_quantized_teacher_is_refused(self, tmp_path):
        student, _ = models()
        with pytest.raises(InputError, match="The teacher is quantized"):
            SQAKDTrainer(student, copy.deepcopy(student), arguments(tmp_path))

    def test_another_number_of_classes_is_one_sentence(self, tmp_path):
        student, _ = models()
        teacher = build_model("timm/test_resnet", 7, image_size=32)
        with pytest.raises(InputError, match=f"student has {CLASSES} classes but the teacher has 7"):
            SQAKDTrainer(student, teacher, arguments(tmp_path))

    def test_plain_training_arguments_are_refused(self, tmp_path):
        from transformers import TrainingArguments

        student, teacher = models()
        with pytest.raises(InputError, match="args must be SQAKDTrainingArguments, got TrainingArguments"):
            SQAKDTrainer(student, teacher, TrainingArguments(output_dir=str(tmp_path)))

    @pytest.mark.parametrize(
        ("field", "value"),
        [("temperature", 0), ("temperature", -1.0), ("quantizer_learning_rate", -1.0), ("calibration_images", 1)],
    )
    def test_arguments_out_of_range_are_named(self, tmp_path, field, value):
        with pytest.raises(InputError, match=f"{field} must .* got {value}"):
            arguments(tmp_path, **{field: value})

    def test_several_gpus_in_one_process_are_refused(self, tmp_path):
        student, teacher = models()
        args = arguments(tmp_path)
        args.check_devices()
        args._n_gpu = 2
        with pytest.raises(InputError, match="sees 2 GPUs.*accelerate launch"):
            SQAKDTrainer(student, teacher, args, Images())

    def test_data_without_pixel_values_is_named(self, tmp_path):
        student, teacher = models()
        data = [{"image": 1, "label": 0}] * 8
        with pytest.raises(InputError, match=r"columns \['image', 'label'\] but not 'pixel_values'"):
            SQAKDTrainer(student, teacher, arguments(tmp_path), data).train()


class Segmenter(nn.Module):
    """Logits at half the image's resolution, `(B, 4, 8, 8)`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        return self.net(x)


class Detector(nn.Module):
    """Five queries with a class and a box each."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 40))
        self.classes, self.boxes = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        queries = self.stem(x).unflatten(1, (5, 8))
        return {"logits": self.classes(queries), "pred_boxes": self.boxes(queries).sigmoid()}


class TestDenseHeads:
    class Maps(torch.utils.data.Dataset):
        def __init__(self):
            generator = torch.Generator().manual_seed(1)
            self.pixels = torch.randn(12, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
            self.labels = torch.randint(0, 4, (12, IMAGE_SIZE, IMAGE_SIZE), generator=generator)
            self.valid = torch.rand(12, IMAGE_SIZE, IMAGE_SIZE, generator=generator) > 0.5

        def __len__(self):
            return 12

        def __getitem__(self, index):
            return {"pixel_values": self.pixels[index], "labels": self.labels[index], "valid_mask": self.valid[index]}

    def test_segmentation_trains_and_evaluates_per_pixel(self, tmp_path):
        student, teacher = models(Segmenter)
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path, num_train_epochs=20), self.Maps(), self.Maps())
        trainer.calibrate()
        before = trainer.evaluate()
        assert set(before) >= {"eval_loss", "eval_agreement", "eval_accuracy"}
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.8 * before["eval_loss"]

    def test_the_loss_leaves_out_what_the_mask_does(self, tmp_path):
        student, teacher = models(Segmenter)
        data = self.Maps()
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path), data, data)
        trainer.calibrate()
        inputs = {"pixel_values": data.pixels, "valid_mask": data.valid}
        loss = trainer.compute_loss(student.eval(), inputs)
        with torch.no_grad():
            p = (teacher(data.pixels) / 4).double().softmax(1)
            q = (student(data.pixels) / 4).double().log_softmax(1)
        divergence, valid = 16 * (p * (p.log() - q)).sum(1), data.valid[:, ::2, ::2]
        expected = torch.stack([image[mask].mean() for image, mask in zip(divergence, valid, strict=True)]).mean()
        # The trainer's float32 log-probabilities of about 1.4 resolve 1e-7, times T² = 16.
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=16e-7)

    def test_images_without_a_valid_pixel_count_for_nothing(self, tmp_path):
        student, teacher = models(Segmenter)
        some, all_of_them = self.Maps(), self.Maps()
        some.valid[:] = True
        some.valid[:6] = False
        some.labels[:6] = 255
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path), some, some)
        trainer.calibrate()
        found = trainer.evaluate()
        rest = torch.utils.data.Subset(all_of_them, range(6, 12))
        all_of_them.valid[:] = True
        expected = trainer.evaluate(rest)
        for key in ("eval_loss", "eval_agreement", "eval_accuracy"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4)  # float32 kernels of other batches

    def test_nor_for_the_logged_agreement(self, tmp_path):
        logs = []
        for leaves_out in (False, True):
            student, teacher = models(Segmenter)
            data = self.Maps()
            data.valid[:] = True
            if leaves_out:
                data.valid[6:] = False
            else:
                data = torch.utils.data.Subset(data, range(6))
            args = arguments(tmp_path, learning_rate=0.0, num_train_epochs=1, logging_steps=10, max_steps=-1)
            trainer = SQAKDTrainer(student, teacher, args, data)
            calibrate_model(student, [self.Maps().pixels], disable_progress=True)
            trainer.train()
            trainer.log({"loss": 0.0})
            logs.append(trainer.state.log_history[-1]["agreement"])
        assert 0 < logs[0] == logs[1] <= 1

    def test_a_detector_learns_classes_and_boxes(self, tmp_path):
        student, teacher = models(Detector)
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path, num_train_epochs=20), Images(), Images())
        trainer.calibrate()
        batch = {"pixel_values": Images().pixels}
        student.eval()
        with torch.no_grad():
            ours, theirs = student(batch["pixel_values"]), teacher(batch["pixel_values"])
        is_object = 1 - theirs["logits"].softmax(-1)[..., 3]
        distance = (ours["pred_boxes"] - theirs["pred_boxes"]).abs().sum(-1)
        boxes = ((distance * is_object).sum(1) / is_object.sum(1)).mean()
        classes = distillation_loss(ours["logits"], theirs["logits"])
        assert trainer.compute_loss(student, batch).item() == pytest.approx((boxes + classes).item(), rel=1e-5)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before


class TestTeachers:
    def test_the_student_learns_the_mean_of_several_architectures(self, tmp_path):
        student, teacher = models()
        torch.manual_seed(5)
        other = tiny_vit()
        trainer = SQAKDTrainer(student, [teacher, other], arguments(tmp_path), Images(), Images())
        trainer.calibrate()
        pixels = Images().pixels
        student.eval()
        with torch.no_grad():
            mean = ((teacher(pixels) / 4).softmax(1) + (other.eval()(pixels).logits / 4).softmax(1)).double() / 2
            q = (student(pixels) / 4).double().log_softmax(1)
        expected = 16 * (mean * (mean.log() - q)).sum(1).mean()
        loss = trainer.compute_loss(student, {"pixel_values": pixels})
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=16e-7)
        trainer.train()

    def test_each_is_checked(self, tmp_path):
        student, teacher = models()
        with pytest.raises(InputError, match="teacher_model is an empty list"):
            SQAKDTrainer(student, [], arguments(tmp_path))
        other = TinyConvNet()
        other.num_classes = 7
        with pytest.raises(InputError, match="The student has 4 classes but the teacher has 7"):
            SQAKDTrainer(student, [teacher, other], arguments(tmp_path))

    def test_only_one_that_the_student_was_copied_from_answers_for_queries(self, tmp_path):
        student, teacher = models(Detector)
        images = Images()
        for teachers in ([teacher, copy.deepcopy(teacher)], OtherDetector(), WiderDetector()):
            trainer = SQAKDTrainer(student, teachers, arguments(tmp_path), images, images)
            trainer.calibrate()
            before = copy.deepcopy(student.state_dict())
            for act in (trainer.train, trainer.evaluate, lambda trainer=trainer: trainer.predict(images)):
                with pytest.raises(InputError, match="answers by queries .* one teacher that it was copied from"):
                    act()
            assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
        wrapped = SQAKDTrainer(Wrapper(student), teacher, arguments(tmp_path), images, images)
        wrapped.train()

    def test_pixels_may_have_several_of_other_architectures(self, tmp_path):
        student, teacher = models(Segmenter)
        other = nn.Conv2d(3, 4, 3, 2, 1)
        SQAKDTrainer(student, [teacher, other], arguments(tmp_path, max_steps=1), Images()).train()


class OtherDetector(Detector):
    """The same layers by another class."""


class WiderDetector(Detector):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 9, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 40))


class OneLogit(TinyConvNet):
    """Its number of classes is not stated: it shows when it runs."""

    num_classes = None

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 1)


class TwoLogits(OneLogit):
    def forward(self, x):
        logit = super().forward(x)
        return torch.cat([logit, -logit], 1)


class TestNoDistribution:
    """What could not disagree is refused: as early as it is known, and before the student has learned."""

    def test_a_config_that_tells_is_read_at_once(self, tmp_path):
        def multi_label():
            model = tiny_vit()
            model.config.problem_type = "multi_label_classification"
            return model

        def features():
            return timm.create_model("test_resnet", num_classes=0)

        for build, found in ((multi_label, "problem_type='multi_label"), (features, "no classifier")):
            student, teacher = models(build)
            with pytest.raises(InputError, match=f"{found}.*Distillation compares class distributions"):
                SQAKDTrainer(student, teacher, arguments(tmp_path))

    def test_also_that_of_a_teacher_alone(self, tmp_path):
        student, teacher = models()
        features = timm.create_model("test_resnet", num_classes=0)
        for teachers in (features, [teacher, features]):
            with pytest.raises(InputError, match="ResNet has no classifier"):
                SQAKDTrainer(student, teachers, arguments(tmp_path))

    @pytest.mark.parametrize("whose", ["both", "the teacher's"])
    @pytest.mark.parametrize("way", ["train", "evaluate", "predict", "cache"])
    def test_what_shows_at_the_first_prediction(self, tmp_path, whose, way):
        student, teacher = models(OneLogit if whose == "both" else TwoLogits)
        teacher = OneLogit()
        options = {"cache_teacher_logits": str(tmp_path / "logits")} if way == "cache" else {}
        data = Images()
        data.fingerprint = "noise"
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path, **options), data, data)
        trainer.calibrate()
        before = copy.deepcopy(dict(student.named_parameters()))
        act = {"evaluate": trainer.evaluate, "predict": lambda: trainer.predict(data)}.get(way, trainer.train)
        with pytest.raises(InputError, match="fewer than two classes.*Distillation compares class distributions"):
            act()
        assert trainer.results == {} and trainer.state.global_step == 0
        assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())
        assert not list(tmp_path.glob("logits/*"))

    def test_heads_that_a_model_has_only_while_it_trains(self, tmp_path):
        def distilled():
            model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, num_classes=4, depth=1)
            model.set_distilled_training(True)
            return model

        student, teacher = models(distilled)
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path), Images(), Images())
        trainer.calibrate()
        trainer.evaluate()
        with pytest.raises(InputError, match=r"has several heads: 0 \(8, 4\), 1 \(8, 4\)"):
            trainer.train()
        assert trainer.state.global_step == 0


class TestChangedStudents:
    """Layers that were replaced after they were quantized."""

    def trainer(self, folder, **options):
        trainer = make_trainer(folder, **options)
        trainer.calibrate()
        return trainer

    def test_are_noticed_wherever_the_student_is_used(self, tmp_path):
        trainer = self.trainer(tmp_path)
        trainer.model.head = nn.Linear(16, CLASSES)
        acts = trainer.train, trainer.evaluate, trainer.calibrate, trainer.save_model
        for act in (*acts, lambda: trainer.predict(trainer.eval_dataset)):
            with pytest.raises(InputError, match=r"1 of .*'head' \(now Linear, not quantized as planned\)"):
                act()
        with pytest.raises(InputError, match="'head'"):
            SQAKDTrainer(trainer.model, trainer.teacher.models[0], trainer.args)

    def test_a_student_without_any_quantized_layer_left_is_told_why(self, tmp_path):
        student, teacher = models()
        for name in ("stem.0", "body.0", "body.3", "head"):
            parent, _, child = name.rpartition(".")
            setattr(student.get_submodule(parent), child, nn.Identity())
        with pytest.raises(InputError, match="^4 of the student's quantized layers"):
            SQAKDTrainer(student, teacher, arguments(tmp_path))

    def test_bits_changed_by_hand_are(self, tmp_path):
        trainer = self.trainer(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.model.body[0].input_quantizer.bits = 7
        for act in (trainer.train, trainer.evaluate):
            with pytest.raises(InputError, match=r"'body.0' \(7 bits instead of "):
                act()


class TestActivationMemory:
    def test_low_trains_the_same_bits(self, tmp_path, monkeypatch):
        entered = []

        class Counted(trainer_module.recompute_quantized):
            def __enter__(self):
                entered.append(self)
                super().__enter__()

        monkeypatch.setattr(trainer_module, "recompute_quantized", Counted)
        states = {}
        for memory in ("normal", "low"):
            student, teacher = models(TinyConvNet)
            args = arguments(tmp_path, max_steps=3, activation_memory=memory)
            trainer = SQAKDTrainer(student, teacher, args, train_dataset=Images())
            trainer.train()
            states[memory] = student.state_dict()
            assert len(entered) == (3 if memory == "low" else 0)
        assert all(torch.equal(states["low"][name], tensor) for name, tensor in states["normal"].items())

    def test_takes_two_values(self, tmp_path):
        with pytest.raises(InputError, match="activation_memory must be 'normal' or 'low', got 'none'"):
            arguments(tmp_path, activation_memory="none")
