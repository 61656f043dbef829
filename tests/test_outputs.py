from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from sqakd_hf import InputError
from sqakd_hf.outputs import Prediction, predict
from tests.conftest import Compiled, Wrapper


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
        with pytest.raises(InputError, match="^Answers has several heads: 0, 1. Choose one with output_field='0'."):
            predict(two, {"pixel_values": x})
        assert torch.equal(predict(two, {"pixel_values": x}, "1").logits, x.mean((2, 3)) + 1)
        named = Answers(lambda logits: {"class_logits": logits, "mask_logits": logits[:, :, None]})
        with pytest.raises(InputError, match="several heads: class_logits, mask_logits"):
            predict(named, {"pixel_values": x})
        with pytest.raises(InputError, match="output_field='logits': Answers returns class_logits, mask_logits."):
            predict(named, {"pixel_values": x}, "logits")

    def test_no_head_is_said(self):
        backbone = Answers(lambda logits: {"last_hidden_state": logits})
        with pytest.raises(InputError, match="returns no class logits, only last_hidden_state"):
            predict(backbone, {"pixel_values": randn(2, 3, 4, 4)})

    def test_a_pixel_mask_reaches_models_that_take_one(self):
        class Masked(nn.Module):
            def forward(self, pixel_values, pixel_mask):
                return pixel_values.mean((2, 3)) * pixel_mask.float().mean((1, 2))[:, None]

        x, mask = randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
        assert (predict(Masked(), {"pixel_values": x, "pixel_mask": mask}).logits == 0).all()


class TestPrediction:
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
