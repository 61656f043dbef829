import re

import numpy as np
import PIL.Image
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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
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

    @pytest.mark.parametrize("values", [[3, None, 2], [None, 3, 2], [None, None, 2]], ids=str)
    def test_an_image_without_label_in_a_labelled_batch_gets_the_number_of_none(self, values):
        expected = [-100 if value is None else value for value in values]
        assert ImageCollator()(features(label=values))["labels"].tolist() == expected
        rows = features()
        for row, value in zip(rows, values, strict=True):
            row |= {} if value is None else {"labels": value}
        assert ImageCollator()(rows)["labels"].tolist() == expected

    def test_a_map_of_labels_may_be_missing_too(self):
        batch = ImageCollator()(features(labels=[None, torch.ones(4, 5), None]))
        assert batch["labels"].unique().tolist() == [-100, 1] and batch["labels"].shape == (3, 4, 5)

    def test_an_image_without_mask_is_valid_everywhere(self):
        for key in ("valid_mask", "pixel_mask"):
            batch = ImageCollator()(features(**{key: [None, torch.zeros(4, 5), None]}))
            assert batch[key].flatten(1).all(1).tolist() == [True, False, True]

    @pytest.mark.parametrize("make", [lambda i: [i], lambda i: np.array([i]), lambda i: torch.tensor([i])])
    def test_a_class_number_may_come_in_a_vector_of_one(self, make):
        assert ImageCollator()(features(label=[make(3), make(0), 2]))["labels"].tolist() == [3, 0, 2]

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

    @pytest.mark.parametrize("pair", [tuple, list])
    def test_takes_the_pairs_of_torchvision(self, pair):
        rows = features(label=[2, 0, 1])
        batch = ImageCollator()([pair((row["pixel_values"], row["label"])) for row in rows])
        expected = ImageCollator()(rows)
        assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in expected)
        assert list(ImageCollator()([pair((row["pixel_values"],)) for row in rows])) == ["pixel_values"]

    def test_images_of_several_sizes_are_named_by_their_shapes(self):
        rows = [{"pixel_values": torch.zeros(3, 8, side)} for side in (8, 8, 9)]
        with pytest.raises(
            InputError, match=r"^'pixel_values' of one batch .*, got \(3, 8, 8\) and \(3, 8, 9\)\. Res"
        ):
            ImageCollator()(rows)

    def test_label_maps_of_several_sizes_are_named_by_their_shapes(self):
        with pytest.raises(InputError, match=r"^'labels' of one batch must have one shape, got \(2, 2\) and \(3, 3\)"):
            ImageCollator()(features(2, labels=[torch.zeros(2, 2), torch.zeros(3, 3)]))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool], ids=str)
    def test_images_that_are_no_floats_are_refused(self, dtype):
        rows = [{"pixel_values": torch.ones(1, 2, 2, dtype=dtype)} for _ in range(2)]
        for given in (rows, rows[:1], [{"pixel_values": row["pixel_values"].numpy()} for row in rows]):
            with pytest.raises(InputError, match=f"must be floats, normalised as the model expects them, got {dtype}"):
                ImageCollator()(given)

    @pytest.mark.parametrize("value", [PIL.Image.new("RGB", (4, 4)), "a.png", None, [[1.0], [1.0, 2.0]]])
    def test_what_is_no_tensor_is_named_by_its_type(self, value):
        with pytest.raises(InputError, match=f"'pixel_values' must hold tensors.*got a {type(value).__name__}. Give"):
            ImageCollator()([{"pixel_values": value}])
        with pytest.raises(InputError, match="'label' must hold tensors, arrays or numbers, got a str"):
            ImageCollator()(features(1, label=["cat"]))

    def test_what_is_neither_a_dict_nor_a_pair_is_named_by_its_type(self):
        for item in (torch.zeros(3, 2, 2), (1, 2, 3), PIL.Image.new("L", (2, 2))):
            with pytest.raises(
                InputError, match=f"yields a {type(item).__name__}; accepted are dicts with 'pixel_val"
            ):
                ImageCollator()([item])


@pytest.mark.parametrize("boxes", [{"boxes": [1]}, [{"bbox": [1, 2, 3, 4]}], [[{"id": 1}]], []])
def test_annotations_of_detectors_are_no_labels(boxes):
    batch = ImageCollator()([{"pixel_values": torch.zeros(3, 2, 2), "labels": boxes}])
    assert list(batch) == ["pixel_values"]
