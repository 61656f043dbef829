import re

import numpy as np
import pytest
import torch

from sqakd_hf import ImageCollator, InputError


def features(count=3, **columns):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 4, 5, generator=generator) for _ in range(count)]
    return [{"pixel_values": image, **{k: v[i] for k, v in columns.items()}} for i, image in enumerate(images)]


class TestImageCollator:
    def test_stacks_images(self):
        rows = features()
        batch = ImageCollator()(rows)
        assert list(batch) == ["pixel_values"] and batch["pixel_values"].shape == (3, 3, 4, 5)
        assert all(
            torch.equal(image, row["pixel_values"]) for image, row in zip(batch["pixel_values"], rows, strict=True)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
    def test_keeps_their_dtype(self, dtype):
        rows = [{"pixel_values": torch.ones(1, 2, 2, dtype=dtype)} for _ in range(2)]
        assert ImageCollator()(rows)["pixel_values"].dtype == dtype

    def test_takes_arrays_and_lists(self):
        rows = features()
        expected = ImageCollator()(rows)["pixel_values"]
        for convert in (torch.Tensor.numpy, torch.Tensor.tolist):
            found = ImageCollator()([{"pixel_values": convert(row["pixel_values"])} for row in rows])
            assert torch.equal(found["pixel_values"], expected) and found["pixel_values"].dtype == torch.float32

    @pytest.mark.parametrize("column", ["label", "labels"])
    @pytest.mark.parametrize(
        "values",
        [[3, 0, 2], [np.int64(3), np.int64(0), np.int64(2)], list(torch.tensor([3, 0, 2]))],
        ids=["int", "numpy", "tensor"],
    )
    def test_stacks_labels_under_the_name_that_models_take(self, column, values):
        batch = ImageCollator()(features(**{column: values}))
        assert list(batch) == ["pixel_values", "labels"]
        assert torch.equal(batch["labels"], torch.tensor([3, 0, 2])) and batch["labels"].dtype == torch.int64

    def test_prefers_labels_to_label(self):
        batch = ImageCollator()(features(label=[1, 1, 1], labels=[2, 2, 2]))
        assert batch["labels"].tolist() == [2, 2, 2]

    def test_takes_label_where_labels_are_empty(self):
        batch = ImageCollator()(features(label=[1, 0, 1], labels=[None] * 3))
        assert batch["labels"].tolist() == [1, 0, 1]

    def test_leaves_out_labels_that_are_none(self):
        assert list(ImageCollator()(features(label=[None] * 3))) == ["pixel_values"]

    def test_class_zero_is_a_label(self):
        assert ImageCollator()(features(1, label=[0]))["labels"].tolist() == [0]

    def test_drops_the_rest(self):
        rows = features(path=["a", "b", "c"], image=[None] * 3, label_ids=[1, 2, 3])
        assert list(ImageCollator()(rows)) == ["pixel_values"]

    def test_leaves_the_rows_as_they_were(self):
        rows = features(label=[1, 2, 3])
        ImageCollator()(rows)
        assert [list(row) for row in rows] == [["pixel_values", "label"]] * 3

    def test_without_pixel_values_names_the_columns_and_the_transform(self):
        message = (
            "The dataset yields the columns ['image', 'label'] but not 'pixel_values'. Give it a transform, such as "
            "dataset.with_transform(ImageTransform(...))."
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            ImageCollator()([{"label": 1, "image": None}])


@pytest.mark.parametrize("boxes", [{"boxes": [1]}, [{"bbox": [1, 2, 3, 4]}], [[{"id": 1}]]])
def test_annotations_of_detectors_are_no_labels(boxes):
    batch = ImageCollator()([{"pixel_values": torch.zeros(3, 2, 2), "labels": boxes}])
    assert list(batch) == ["pixel_values"]
