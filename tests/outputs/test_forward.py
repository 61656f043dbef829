from collections import namedtuple
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from sqakd_hf import InputError
from sqakd_hf.outputs.forward import Prediction, predict, require_classes
from tests.helpers.models import Compiled, Wrapper


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Answers(nn.Module):
    """Returns what a test wants, and notes how it was called."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x.mean((2, 3)))


class AnswersKeyword(Answers):
    def forward(self, labels=None, pixel_values=None):
        assert labels is None
        return self.answer(pixel_values.mean((2, 3)))


ANSWERS = {
    "tensor": lambda logits: logits,
    "output": lambda logits: ImageClassifierOutput(logits=logits, hidden_states=(logits + 1,)),
    "output with a loss": lambda logits: ImageClassifierOutput(loss=logits.sum(), logits=logits),
    "other name": lambda logits: {"class_queries_logits": logits, "masks": logits + 1},
    "dict": lambda logits: {"features": logits + 1, "logits": logits},
    "tuple": lambda logits: (logits, (logits + 1,)),
    "list": lambda logits: [logits, logits.sum()],
}
WRAPPERS = {
    "bare": lambda model: model,
    "wrapped": Wrapper,
    "compiled": Compiled,
    "both": lambda model: Wrapper(Compiled(model)),
    "both the other way": lambda model: Compiled(Wrapper(model)),
    "data parallel": nn.DataParallel,
}


class TestLogits:
    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    @pytest.mark.parametrize("model", [Answers, AnswersKeyword], ids=["timm's kind", "transformers' kind"])
    @pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
    def test_are_found_in_any_output_and_behind_any_wrapper(self, answer, model, wrap):
        x = randn(2, 3, 4, 4)
        assert torch.equal(predict(wrap(model(answer)), {"pixel_values": x}).logits, x.mean((2, 3)))

    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    def test_of_a_native_model(self, vit, images, wrap):
        assert torch.equal(predict(wrap(vit), {"pixel_values": images}).logits, vit(images).logits)

    def test_of_a_plain_model(self, conv_net, images):
        assert torch.equal(predict(conv_net, {"pixel_values": images}).logits, conv_net(images))

    def test_of_a_model_with_a_child_called_module(self, vit, images):
        class Halved(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, x):
                return self.module(pixel_values=x / 2)

        assert torch.equal(predict(Halved(vit), {"pixel_values": images}).logits, vit(images / 2).logits)

    def test_two_heads_ask_for_a_choice(self):
        x = randn(2, 3, 4, 4)
        two = Answers(lambda logits: (logits, logits + 1))
        with pytest.raises(
            InputError, match=r"^Answers has several heads: 0 \(2, 3\), 1 \(2, 3\)\. .*output_field names"
        ):
            predict(two, {"pixel_values": x})
        assert torch.equal(predict(two, {"pixel_values": x}, "1").logits, x.mean((2, 3)) + 1)
        named = Answers(lambda logits: {"class_logits": logits, "mask_logits": logits[:, :, None]})
        with pytest.raises(InputError, match=r"several heads: class_logits \(2, 3\), mask_logits \(2, 3, 1\)"):
            predict(named, {"pixel_values": x})
        with pytest.raises(InputError, match=r"output_field='logits': Answers returns class_logits \(2, 3\), mask_"):
            predict(named, {"pixel_values": x}, "logits")

    def test_no_head_is_said(self):
        backbone = Answers(lambda logits: {"last_hidden_state": logits})
        with pytest.raises(InputError, match=r"returns last_hidden_state \(2, 3\), and no class logits"):
            predict(backbone, {"pixel_values": randn(2, 3, 4, 4)})

    def test_a_pixel_mask_reaches_models_that_take_one(self):
        class Masked(nn.Module):
            def forward(self, pixel_values, pixel_mask):
                return pixel_values.mean((2, 3)) * pixel_mask.float().mean((1, 2))[:, None]

        x, mask = randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
        assert (predict(Masked(), {"pixel_values": x, "pixel_mask": mask}).logits == 0).all()

    def test_heads_of_several_shapes_ask_for_a_choice_as_well(self):
        x = randn(2, 3, 4, 4)
        for other in (lambda z: z[:, :1], lambda z: z.repeat(1, 2), lambda z: z[:, :, None, None]):
            two = Answers(lambda logits, other=other: (logits, other(logits)))
            with pytest.raises(InputError, match=r"several heads: 0 \(2, 3\), 1 \("):
                predict(two, {"pixel_values": x})
            assert torch.equal(predict(two, {"pixel_values": x}, "0").logits, x.mean((2, 3)))
        with_loss = Answers(lambda logits: (logits.sum(), logits))
        assert torch.equal(predict(with_loss, {"pixel_values": x}).logits, x.mean((2, 3)))

    def test_named_tuples_say_which_head_is_which(self):
        """torchvision's GoogLeNet returns one while it trains, and a tensor when it is evaluated."""
        Outputs = namedtuple("Outputs", ["aux_logits", "logits"])
        x = randn(2, 3, 4, 4)
        model = Answers(lambda logits: Outputs(logits + 1, logits))
        assert torch.equal(predict(model, {"pixel_values": x}).logits, x.mean((2, 3)))
        assert torch.equal(predict(model, {"pixel_values": x}, "aux_logits").logits, x.mean((2, 3)) + 1)

    def test_segmentation_of_torchvision_is_named(self):
        model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
        inputs = {"pixel_values": randn(1, 3, 32, 32)}
        assert predict(model, inputs, "out").logits.shape == (1, 3, 32, 32)
        with pytest.raises(InputError, match=r"LRASPP returns out \(1, 3, 32, 32\), and no class logits"):
            predict(model, inputs)


def head(number, **config):
    return lambda: ViTForImageClassification(ViTConfig(**SMALL, num_labels=number, **config))


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
DENSE = {
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 16, 16],
    "fusion_hidden_size": 16,
}
# What each is built by, whether that tells before it runs, and what is said.
NO_CLASSES = {
    "timm with one logit": (lambda: timm.create_model("test_resnet", num_classes=1), True, "a single logit"),
    "timm without classifier": (lambda: timm.create_model("test_resnet", num_classes=0), True, "num_classes=0"),
    "timm's, reset": (lambda: without_head(timm.create_model("test_vit", img_size=32)), True, "no classifier"),
    "timm's feature maps": (lambda: timm.create_model("test_resnet", features_only=True), True, "feature maps"),
    "one of them": (lambda: timm.create_model("test_resnet", features_only=True, out_indices=(3,)), True, "feature m"),
    "those of a ViT": (lambda: timm.create_model("test_vit", features_only=True, img_size=32), True, "feature maps"),
    "by hooks": (lambda: timm.create_model("test_resnet", features_only=True, feature_cls="hook"), True, "feature m"),
    "by fx": (lambda: timm.create_model("test_resnet", features_only=True, feature_cls="fx"), True, "feature maps"),
    "at the end of others": (
        lambda: nn.Sequential(nn.Identity(), nn.Sequential(timm.create_model("test_resnet", num_classes=0))),
        True,
        "ResNet has no classifier",
    ),
    "timm in transformers": (
        lambda: TimmWrapperModel(TimmWrapperConfig(architecture="test_resnet")),
        True,
        "TimmWrapperModel has no head",
    ),
    "one label": (head(1), True, r"a single logit \(num_labels=1\)"),
    "no label": (head(0), True, r"no classifier \(num_labels=0\)"),
    "several labels": (head(4, problem_type="multi_label_classification"), True, "'multi_label_classification'"),
    "regression": (head(4, problem_type="regression"), True, "problem_type='regression'"),
    "embeddings": (lambda: ViTModel(ViTConfig(**SMALL)), True, "ViTModel has no head"),
    "projected": (lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL)), True, "has no head"),
    "reconstruction": (lambda: ViTMAEForPreTraining(ViTMAEConfig(**SMALL)), True, "what it was pretrained to"),
    "depth": (lambda: DPTForDepthEstimation(DPTConfig(**SMALL, **DENSE)), False, "predicted_depth"),
    "one-channel masks": (
        lambda: DPTForSemanticSegmentation(DPTConfig(**SMALL, **DENSE, num_labels=1)),
        True,
        "logit",
    ),
    "own with one logit": (lambda: Answers(lambda x: x[:, :1]), False, r"shape \(2, 1\) has fewer than two classes"),
    "own without a dimension": (lambda: Answers(lambda x: x[:, 0]), False, r"shape \(2,\)"),
    "own masks": (lambda: Answers(lambda x: x[:, :1, None, None].expand(-1, -1, 8, 8)), False, r"\(2, 1, 8, 8\)"),
    "own depth": (lambda: Answers(lambda x: x[:, :1, None].expand(-1, 16, 16)), False, r"\(2, 16, 16\), one value"),
    "own classes": (lambda: Answers(lambda x: x.argmax(1)[:, None].expand(-1, 3)), False, "output of torch.int64"),
}


def without_head(model):
    model.reset_classifier(0)
    return model


class TestNoDistribution:
    """Two models agree about what is no distribution of classes whatever they compute: it is refused."""

    @pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, Compiled], ids=["bare", "wrapped", "compiled"])
    @pytest.mark.parametrize(("build", "known", "found"), NO_CLASSES.values(), ids=NO_CLASSES)
    def test_is_refused_by_one_sentence(self, build, known, found, wrap):
        model = wrap(build().eval())
        inputs = {"pixel_values": randn(2, 3, 32, 32)}
        message = f"^[^.]*{found}.*Distillation compares class distributions by softmax: .* output_field names the one"
        with torch.no_grad(), pytest.raises(InputError, match=message):
            predict(model, inputs)
        if known:
            with pytest.raises(InputError, match=message):
                require_classes(model)

    @pytest.mark.parametrize(
        ("build", "field"),
        [
            (lambda: DPTForDepthEstimation(DPTConfig(**SMALL, **DENSE)), "predicted_depth"),
            (lambda: ViTForMaskedImageModeling(ViTConfig(**SMALL, encoder_stride=8)), "reconstruction"),
            (lambda: ViTModel(ViTConfig(**SMALL)), "pooler_output"),
            (lambda: timm.create_model("test_resnet", features_only=True), "4"),
            (lambda: Answers(lambda x: {"depth": x[:, :1, None].expand(-1, 8, 8)}), "depth"),
            (lambda: Answers(lambda x: (x, x[:, :1])), "1"),
            (lambda: Answers(lambda x: {"score": x[:, :1], "map": x}), "score"),
        ],
    )
    def test_nor_does_output_field_make_it_one(self, build, field):
        with torch.no_grad(), pytest.raises(InputError, match="Distillation compares class distributions by softmax"):
            predict(build().eval(), {"pixel_values": randn(2, 3, 32, 32)}, field)

    def test_masks_of_queries_are_sigmoids(self):
        outputs = {"class_queries_logits": randn(2, 5, 4), "masks_queries_logits": randn(2, 5, 8, 8)}
        model = Answers(lambda x: Mask2FormerForUniversalSegmentationOutput(**outputs))
        inputs = {"pixel_values": randn(2, 3, 32, 32)}
        with pytest.raises(InputError, match="several heads"):
            predict(model, inputs)
        assert predict(model, inputs, "class_queries_logits").by_query
        with pytest.raises(InputError, match="output_field='masks_queries_logits' of Answers is no softmax"):
            predict(model, inputs, "masks_queries_logits")

    @pytest.mark.parametrize(
        ("build", "shape"),
        {
            "timm": (lambda: timm.create_model("test_resnet", num_classes=2), (2, 2)),
            "two labels": (head(2), (2, 2)),
            "stated": (head(3, problem_type="single_label_classification"), (2, 3)),
            "two channels": (lambda: DPTForSemanticSegmentation(DPTConfig(**SMALL, **DENSE)), (2, 2, 64, 64)),
            "one class of objects": (lambda: yolos(1), (2, 4, 2)),
            "as many queries as classes": (lambda: yolos(3), (2, 4, 4)),
            "tokens": (lambda: BeitForMaskedImageModeling(BeitConfig(**SMALL, vocab_size=10)), (2, 16, 10)),
            "behind features": (
                lambda: nn.Sequential(timm.create_model("test_resnet", num_classes=0), nn.LazyLinear(3)),
                (2, 3),
            ),
            "distilled": (
                lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=2),
                (2, 2),
            ),
        }.values(),
    )
    def test_what_is_one_passes(self, build, shape):
        with torch.no_grad():
            assert predict(build().eval(), {"pixel_values": randn(2, 3, 32, 32)}).logits.shape == shape


def yolos(labels):
    config = {**SMALL, "image_size": [32, 32], "num_detection_tokens": 4, "num_labels": labels}
    return YolosForObjectDetection(YolosConfig(**config))


class TestPrediction:
    def test_of_one_class_is_none(self):
        for shape in ((4, 1), (4, 1, 8, 8), (4, 8, 1), (4,)):
            with pytest.raises(InputError, match="fewer than two classes"):
                Prediction(torch.zeros(shape))

    def test_hits_of_a_label_map_are_counted_at_its_size_without_ignored_pixels(self):
        logits = torch.zeros(2, 3, 2, 2)
        logits[:, 1] = 1.0  # class 1 everywhere
        labels = torch.tensor([[[1, 1, 0, 255]] * 4, [[255, -100, -1, 255]] * 4])
        # Two thirds of the first map's labelled pixels; the second has none.
        share, counts = Prediction(logits).hits(labels)
        assert share[0].item() == pytest.approx(2 / 3) and counts.tolist() == [True, False]

    @pytest.mark.parametrize("missing", [-1, -100])
    def test_an_image_whose_label_is_negative_is_neither_right_nor_wrong(self, missing):
        share, counts = Prediction(torch.eye(300)[[1, 255, 2]]).hits(torch.tensor([1, 255, missing]))
        assert counts.tolist() == [True, True, False] and share.tolist() == [1, 1, 0]  # 255 is a class here

    def test_labels_of_another_kind_are_not_compared(self):
        assert Prediction(torch.zeros(2, 5, 3)).hits(torch.tensor([1, 2])) is None

    def test_a_mask_is_resized_to_the_logits(self):
        mask = torch.zeros(1, 4, 4, dtype=torch.bool)
        mask[:, :2] = True
        found = Prediction(torch.zeros(1, 3, 2, 2)).mask_of({"valid_mask": mask})
        assert found.tolist() == [[[True, True], [False, False]]]
        assert Prediction(torch.zeros(1, 3)).mask_of({}) is None
        with pytest.raises(InputError, match=r"valid_mask must be \(1,\) for these logits"):
            Prediction(torch.zeros(1, 3)).mask_of({"valid_mask": mask})
        with pytest.raises(InputError, match=r"valid_mask must be \(1, 2, 2\) for these logits, got \(1, 1, 4, 4\)"):
            Prediction(torch.zeros(1, 3, 2, 2)).mask_of({"valid_mask": mask[None]})


class Detector(Answers):
    """A detector of two classes whose logits have `classes` columns."""

    def __init__(self, classes):
        super().__init__(lambda logits: {"logits": logits[:, None, :classes], "pred_boxes": logits[:, None]})
        self.config = SimpleNamespace(num_labels=2)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, Compiled])
def test_detectors_need_a_class_for_no_object(wrap):
    inputs = {"pixel_values": randn(2, 4, 3, 3)}
    assert predict(wrap(Detector(3)), inputs).boxes.shape == (2, 1, 4)
    with pytest.raises(InputError, match="Detector predicts each class by a sigmoid of its own"):
        predict(wrap(Detector(2)), inputs)


def test_a_model_with_one_output_is_not_asked_for_its_name():
    inputs = {"pixel_values": randn(2, 4, 3, 3)}
    assert torch.equal(predict(Answers(lambda x: x), inputs, field="1").logits, inputs["pixel_values"].mean((2, 3)))


@pytest.mark.parametrize("batch", [{}, {"image": torch.zeros(1, 3, 16, 16), "labels": torch.zeros(1)}])
def test_a_batch_without_images_is_one_sentence(conv_net, batch):
    with pytest.raises(InputError, match="The batch has no pixel_values, only ('image', 'labels'|nothing)"):
        predict(conv_net, batch)
