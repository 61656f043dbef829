"""What training minimises: the divergence alone, or sums to compare it with."""

import copy
import tempfile

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

from sqakd_hf import InputError, QuantizationConfig, SQAKDTrainer, distillation_loss, quantize_model
from sqakd_hf.distillation.extensions import requested_extensions
from sqakd_hf.hub import paper_networks as sqakd_models
from sqakd_hf.research.features import find_lattice_layer, find_stages
from sqakd_hf.research.objective import FEATURE_TERMS, TERMS, Features, label_loss, parse_objective
from tests.helpers.models import CLASSES, TinyConvNet, tiny_vit
from tests.helpers.training import Images, arguments, assert_same_state, make_trainer, models, timm_resnet


class TestParsing:
    def test_sums_have_weights(self):
        assert parse_objective("kl") == ((1, "kl"),)
        assert parse_objective(" 0.5 * ce+2e3*at + kl") == ((0.5, "ce"), (2000, "at"), (1, "kl"))

    @pytest.mark.parametrize(
        "text", ["", "mse", "kl +", "0*kl", "-1*kl", "nan*kl", "inf*kl", "2 kl", "kl*2", "2**kl", "x*kl", None, 3]
    )
    def test_what_is_no_sum_of_known_terms_is_refused(self, text, tmp_path):
        with pytest.raises(InputError, match="objective must be a sum such as"):
            arguments(tmp_path, objective=text)

    def test_a_close_name_is_suggested(self):
        with pytest.raises(InputError, match="Did you mean 'squat'"):
            parse_objective("kl + squad")

    def test_a_term_twice_is_refused(self):
        with pytest.raises(InputError, match="twice"):
            parse_objective("kl + ce + 2*kl")

    def test_options_that_do_not_go_together_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="can't go with cache_teacher_logits"):
            arguments(tmp_path, objective="kl + at", cache_teacher_logits=str(tmp_path))
        with pytest.raises(InputError, match="can't go with torch_compile"):
            arguments(tmp_path, objective="kl + at", torch_compile=True)
        with pytest.raises(InputError, match="can't go with gradient_checkpointing"):
            arguments(tmp_path, objective="kl + at", gradient_checkpointing=True)
        with pytest.raises(InputError, match="label_smoothing_factor belongs to the term 'ce'"):
            arguments(tmp_path, label_smoothing_factor=0.1)
        with pytest.raises(InputError, match="feature_layer belongs to the term 'squat'"):
            arguments(tmp_path, feature_layer="stem")


def gradient_of(trainer, batch):
    """Return loss and gradients of one training batch."""
    trainer.model.zero_grad()
    trainer.extensions = requested_extensions(trainer)
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss, [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


@pytest.fixture
def batch():
    images = Images(8, labelled=True)
    return {"pixel_values": images.pixels, "labels": torch.tensor(images.labels)}


class TestTerms:
    def test_labels_alone_are_ordinary_training(self, tmp_path, batch):
        trainer = make_trainer(tmp_path, objective="ce", labelled=True)
        trainer.calibrate()
        loss, _ = gradient_of(trainer, batch)
        expected = F.cross_entropy(trainer.model(batch["pixel_values"]), batch["labels"])
        torch.testing.assert_close(loss, expected)

    def test_labels_are_smoothed_as_trainer_does(self, tmp_path, batch):
        trainer = make_trainer(tmp_path, tiny_vit, objective="ce", labelled=True, label_smoothing_factor=0.3)
        trainer.calibrate()
        loss, _ = gradient_of(trainer, batch)
        logits = trainer.model(batch["pixel_values"]).logits
        smoother = LabelSmoother(epsilon=0.3)  # transformers' own
        torch.testing.assert_close(loss, smoother({"logits": logits}, batch["labels"]))

    def test_weights_add_up(self, tmp_path, batch):
        trainer = make_trainer(tmp_path, objective="0.25*ce + 2*kl", labelled=True)
        trainer.calibrate()
        loss, _ = gradient_of(trainer, batch)
        logits = trainer.model(batch["pixel_values"])
        teacher = trainer.teacher.models[0](batch["pixel_values"])
        expected = 0.25 * F.cross_entropy(logits, batch["labels"]) + 2 * distillation_loss(logits, teacher)
        torch.testing.assert_close(loss, expected)

    def test_without_labels_the_term_of_labels_is_refused(self, tmp_path):
        trainer = make_trainer(tmp_path, objective="ce + kl")
        with pytest.raises(InputError, match="bring no labels"):
            trainer.train()

    @pytest.mark.parametrize("missing", [-1, -100])
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_images_without_label_are_left_out(self, missing, smoothing):
        logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0), requires_grad=True)
        labels = torch.tensor([0, missing, 3, 1, missing, missing])
        loss = label_loss(logits, labels, smoothing)
        expected = F.cross_entropy(logits[labels >= 0], labels[labels >= 0], label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.any(1).tolist() == (labels >= 0).tolist()

    @pytest.mark.parametrize("missing", [-1, -100])
    def test_a_batch_without_any_label_teaches_nothing_by_them(self, missing):
        logits = torch.randn(3, CLASSES, requires_grad=True)
        loss = label_loss(logits, torch.full((3,), missing))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and not gradient.any()

    def test_evaluation_reports_the_divergence_whatever_training_minimises(self, tmp_path):
        found = []
        for objective in ("kl", "ce"):
            trainer = make_trainer(tmp_path / objective, objective=objective, labelled=True)
            trainer.calibrate()
            found.append(trainer.evaluate()["eval_loss"])
        assert found[0] == found[1]

    @pytest.mark.parametrize("build", [timm_resnet, tiny_vit], ids=["resnet", "vit"])
    @pytest.mark.parametrize("name", FEATURE_TERMS)
    def test_feature_terms_train_and_change_the_result(self, name, build, tmp_path):
        size = 32 if build is timm_resnet else 16
        results = []
        for objective in ("kl", f"kl + 10*{name}"):
            trainer = make_trainer(tmp_path / objective[:4], build, objective=objective, size=size, max_steps=2)
            trainer.train()
            results.append(trainer.model)
        with pytest.raises(AssertionError):
            assert_same_state(*results)

    def test_flow_without_two_stages_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="'fsp' compares stages behind the stem"):
            make_trainer(tmp_path, objective="fsp").train()

    def test_feature_terms_leave_no_hooks_behind(self, tmp_path):
        trainer = make_trainer(tmp_path, timm_resnet, objective="at + squat", size=32, max_steps=1)
        trainer.train()
        for model in (trainer.model, trainer.teacher.models[0]):
            assert not any(module._forward_hooks for module in model.modules())

    def test_features_are_let_go_after_each_batch(self, tmp_path):
        trainer = make_trainer(tmp_path, timm_resnet, objective="at + squat", size=32)
        trainer.calibrate()
        gradient_of(trainer, {"pixel_values": torch.randn(4, 3, 32, 32)})
        taps = trainer.extensions[0].features._taps
        assert len(taps) == 4 and not any(tap.features for tap in taps)

    def test_a_teacher_of_another_architecture_is_refused(self, tmp_path):
        student, _ = models(TinyConvNet)
        teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
        trainer = SQAKDTrainer(student, teacher, arguments(tmp_path, objective="kl + at"), Images())
        with pytest.raises(InputError, match="module by module"):
            trainer.train()

    def test_several_teachers_are_refused(self, tmp_path):
        student, teacher = models(TinyConvNet)
        teachers = [teacher, copy.deepcopy(teacher)]
        trainer = SQAKDTrainer(student, teachers, arguments(tmp_path, objective="kl + at"), Images())
        with pytest.raises(InputError, match="one teacher, not several"):
            trainer.train()

    def test_what_the_student_can_not_represent_is_not_asked_of_it(self, tmp_path, batch):
        # The student as calibrated, in float but for one layer: its codes there are those of the teacher's features.
        trainer = make_trainer(tmp_path, timm_resnet, objective="squat", size=32)
        trainer.calibrate()
        layer = find_lattice_layer(trainer.model)
        for name, module in trainer.model.named_modules():
            if hasattr(module, "weight_quantizer"):
                module.weight_is_on_grid = True
                module.input_quantizer = module.input_quantizer if name == layer else None
        for module in trainer.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        names, teacher = ["squat"], trainer.teacher.models[0]
        terms = Features(names, trainer.model, teacher, {"pixel_values": images})
        with terms.listening()[0] as student, terms.listening()[1] as teacher:
            trainer.model(images)
            trainer.teacher.models[0](images)
            assert student and teacher
            assert terms.loss("squat").item() == 0


class TestFeatures:
    def test_stages_of_a_resnet_are_its_stages(self):
        model = timm_resnet().timm_model
        stages = find_stages(model.eval(), {"pixel_values": torch.randn(1, 3, 32, 32)})
        assert stages == ["act1", "layer1", "layer2", "layer3", "layer4"]
        assert not any(module._forward_hooks for module in model.modules())

    def test_the_stage_of_a_vit_is_its_last_tokens(self):
        assert find_stages(tiny_vit().eval(), {"pixel_values": torch.randn(1, 3, 16, 16)})[-1] == "vit.layernorm"

    def test_a_model_without_features_is_refused(self):
        with pytest.raises(InputError, match="no feature maps"):
            find_stages(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), {"pixel_values": torch.randn(2, 3, 2, 2)})

    @pytest.mark.parametrize(
        ("build", "layer"),
        [
            (timm_resnet, "timm_model.layer4.0.conv2"),
            (tiny_vit, "vit.layers.1.mlp.fc1"),
            (TinyConvNet, "body.3"),
        ],
    )
    def test_the_lattice_layer_is_that_of_the_last_block(self, build, layer):
        student, _ = models(build)
        assert find_lattice_layer(student) == layer

    @pytest.mark.parametrize("first_last_bits", [8, None])
    def test_a_head_in_float_is_no_reason_for_another_layer(self, first_last_bits):
        student = sqakd_models.resnet20_cifar(num_classes=4)
        quantize_model(student, QuantizationConfig(first_last_bits=first_last_bits))
        assert find_lattice_layer(student) == "layer3.2.conv2"

    def test_features_of_another_layout_are_refused(self):
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1))
        with pytest.raises(InputError, match=r"features \(B, H, W, C\)"):
            find_stages(model.eval(), {"pixel_values": torch.randn(1, 3, 64, 64)})

    def test_products_of_attention_are_no_stage(self):
        model = timm.create_model("test_vit", num_classes=4, img_size=32, patch_size=4).eval()
        for block in model.blocks:
            block.attn.fused_attn = False
        stages = find_stages(model, {"pixel_values": torch.randn(1, 3, 32, 32)})
        assert not any("attn" in stage for stage in stages) and stages[-1] == "norm"

    def test_a_student_without_a_plan_is_told(self):
        student, _ = models(TinyConvNet)
        del student.quantization_plan
        with pytest.raises(InputError, match="in the plan of quantize_model"):
            find_lattice_layer(student)

    def test_a_layer_of_ones_own_choice_must_be_quantized(self):
        student, _ = models(TinyConvNet)
        assert find_lattice_layer(student, "body.0") == "body.0"
        with pytest.raises(InputError, match="Did you mean 'body.3'"):
            find_lattice_layer(student, "body.33")


def test_every_term_is_documented_in_the_arguments():
    text = type(arguments(tempfile.mkdtemp())).__doc__
    assert all(f"`{term}`" in text for term in TERMS if term != "kl")
