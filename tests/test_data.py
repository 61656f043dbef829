import io
import logging

import datasets
import numpy as np
import PIL.Image
import pytest

from sqakd_hf import data as data_module
from sqakd_hf.data import load_image_data, split_holdout
from sqakd_hf.errors import InputError


@pytest.fixture(scope="module")
def digits():
    return load_image_data("digits")


@pytest.fixture
def load(monkeypatch):
    """Load the dataset 'pets', which has the given splits."""

    def load(splits, **options):
        if isinstance(splits, datasets.Dataset):
            splits, options = {"train": splits}, {"test_split": None, **options}
        monkeypatch.setattr(data_module, "load_splits", lambda *args: splits)
        return load_image_data("pets", **options)

    return load


def image_dataset(count, label=None, **columns):
    """Return 4x4 images whose pixels hold 0, 1, ...; `label` numbers cat, dog and owl."""
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": [PIL.Image.new("L", (4, 4), i) for i in range(count)]}, features)
    if label is not None:
        dataset = dataset.add_column("label", label, feature=datasets.ClassLabel(names=["cat", "dog", "owl"]))
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)
    return dataset


def first_pixels(dataset):
    return [PIL.Image.open(io.BytesIO(item["image"]["bytes"])).getpixel((0, 0)) for item in dataset]


class TestSplits:
    def test_test_images_are_split_off_where_the_source_has_none(self, digits):
        assert digits.train.column_names == digits.test.column_names == ["image", "label"]
        assert digits.class_names == digits.test.features["label"].names == [str(digit) for digit in range(10)]
        assert (len(digits.train), len(digits.test)) == (1438, 359)
        assert load_image_data("digits", test_split=None).test is None

    def test_the_split_depends_on_the_seed_alone_and_is_stratified(self, digits):
        again, other = load_image_data("digits"), load_image_data("digits", seed=1)
        assert again.train[:] == digits.train[:] and again.test[:] == digits.test[:]
        assert other.test[:] != digits.test[:]
        share = np.bincount(digits.test["label"][:]) / np.bincount([*digits.train["label"], *digits.test["label"]])
        assert np.allclose(share, 0.2, atol=0.01)  # 180 images a class: one image is 0.006

    @pytest.mark.parametrize("label", [[0] + [1] * 9, [0] * 9 + [1]], ids=str)
    def test_the_one_image_of_the_first_or_last_class_is_trained_on(self, load, label):
        for seed in range(10):
            assert set(load({"train": image_dataset(10, label=label)}, seed=seed).train["label"]) == {0, 1}

    def test_unlabelled_images_are_split_too_and_keep_their_order(self, load):
        data = load({"train": image_dataset(10)})
        assert data.train.column_names == data.test.column_names == ["image"] and data.class_names is None
        train, test = first_pixels(data.train), first_pixels(data.test)
        assert len(test) == 2 and sorted(train + test) == list(range(10))
        assert train == sorted(train) and test == sorted(test)

    def test_max_images_draws_by_the_seed_unless_all_are_asked_for(self, load):
        dataset = image_dataset(20)
        few, other = (first_pixels(load(dataset, max_train_images=10, seed=seed).train) for seed in (0, 1))
        assert sorted(set(few)) == sorted(few) and few != other
        assert first_pixels(load(dataset, max_train_images=20).train) == list(range(20))

    def test_max_images_counts_after_the_split_and_more_than_exist_means_all(self, digits, caplog):
        few = load_image_data("digits", max_train_images=5, max_test_images=3)
        assert (len(few.train), len(few.test)) == (5, 3)
        assert few.train[:] == load_image_data("digits", max_train_images=5).train[:]
        assert few.train[:] != digits.train[:5]
        with caplog.at_level(logging.INFO, logger="sqakd_hf.data"):
            all_of_them = load_image_data("digits", max_train_images=10_000)
        assert all_of_them.train[:] == digits.train[:]
        assert "10000 training images of 'digits' were asked for; using all 1438." in caplog.text

    @pytest.mark.parametrize("test_name", ["test", "validation", "valid", "val"])
    def test_a_validation_split_stands_in_for_a_missing_test_split(self, load, test_name):
        splits = {"train": image_dataset(4), test_name: image_dataset(2), "zoo": image_dataset(3)}
        assert len(load(splits).test) == 2

    def test_the_test_split_comes_before_a_validation_split_and_both_may_be_named(self, load):
        names = ("train", "validation", "test", "zoo", "val")
        splits = {name: image_dataset(count) for count, name in enumerate(names, start=1)}
        assert len(load(splits).test) == 3
        assert len(load({name: splits[name] for name in ("train", "val", "validation")}).test) == 2
        data = load(splits, train_split="validation", test_split="zoo")
        assert (len(data.train), len(data.test)) == (2, 4)

    def test_the_training_split_does_not_stand_in_for_the_test_split(self, load):
        data = load({"val": image_dataset(10)}, train_split="val")
        assert (len(data.train), len(data.test)) == (8, 2)

    def test_a_missing_split_lists_those_that_exist(self, load):
        splits = {"val": image_dataset(2), "train": image_dataset(4)}
        with pytest.raises(InputError, match="has no split 'vla'; its splits are 'train', 'val'.*Did you mean 'val'"):
            load(splits, test_split="vla")
        with pytest.raises(InputError, match="has no split 'training'; its splits are 'train', 'val'"):
            load(splits, train_split="training")

    def test_an_empty_split_is_reported(self, load):
        with pytest.raises(InputError, match="The split 'test' of dataset 'pets' holds no images"):
            load({"train": image_dataset(4), "test": image_dataset(4).select([])})

    def test_a_single_image_can_not_be_split(self, load):
        with pytest.raises(InputError, match="A fraction of 0.2 of 1 images leaves one side without images"):
            load({"train": image_dataset(1)})


class TestColumns:
    def test_labels_are_kept_and_other_columns_are_not(self, load):
        data = load(image_dataset(4, label=[2, 0, 1, 0], note=["x"] * 4))
        assert data.train.column_names == ["image", "label"]
        assert data.train.features["image"] == datasets.Image(decode=False)
        assert data.class_names == data.train.features["label"].names == ["cat", "dog", "owl"]
        assert first_pixels(data.train) == [0, 1, 2, 3] and data.train["label"][:] == [2, 0, 1, 0]

    def test_the_image_column_is_found_by_its_feature_and_integers_become_class_labels(self, load):
        data = load(image_dataset(4, labels=[0, 2, 2, 0]).rename_column("image", "img"))
        assert data.train.column_names == ["image", "label"]
        assert data.class_names == ["0", "1", "2"] and data.train["label"][:] == [0, 2, 2, 0]

    def test_numbers_and_strings_called_otherwise_are_no_labels(self, load):
        assert load(image_dataset(2, score=[0, 1], labels=["a", "b"])).class_names is None

    def test_the_columns_image_and_label_come_before_others_of_their_kind(self, load):
        dataset = image_dataset(2, label=[0, 1])
        dataset = dataset.add_column("coarse", [0, 0], feature=datasets.ClassLabel(names=["pet"]))
        dataset = dataset.add_column("mask", [{"bytes": b"", "path": None}] * 2, feature=datasets.Image())
        data = load(dataset.select_columns(["mask", "coarse", "label", "image"]))
        assert data.class_names == ["cat", "dog", "owl"] and first_pixels(data.train) == [0, 1]

    def test_requested_columns_are_used(self, load):
        buffer = io.BytesIO()
        PIL.Image.new("L", (4, 4), 9).save(buffer, "PNG")
        dataset = image_dataset(2, label=[0, 1], kind=["owl", "bat"], photo=[buffer.getvalue()] * 2)
        data = load(dataset, image_column="photo", label_column="kind")
        assert first_pixels(data.train) == [9, 9]
        assert data.class_names == ["bat", "owl"] and data.train["label"][:] == [1, 0]

    def test_strings_are_classes_in_alphabetical_order(self, load):
        data = load(image_dataset(6, kind=["owl", "bat", "emu", "bat", "ant", "fox"]), label_column="kind")
        assert data.class_names == ["ant", "bat", "emu", "fox", "owl"]
        assert data.train["label"][:] == [4, 1, 2, 1, 0, 3]

    def test_the_format_that_a_dataset_was_saved_with_does_not_matter(self, load):
        data = load(image_dataset(3, label=[1, 0, 2]).with_format("numpy"))
        assert data.train["label"][:] == [1, 0, 2] and data.train.format["type"] is None

    def test_requested_columns_are_used_in_the_test_images_too(self, load):
        dataset = image_dataset(2, label=[0, 1], kind=["owl", "bat"])
        mask = [{"bytes": b"", "path": None}] * 2
        dataset = dataset.rename_column("image", "left").add_column("image", mask, feature=datasets.Image())
        data = load({"train": dataset, "test": dataset}, image_column="left", label_column="kind")
        assert first_pixels(data.test) == [0, 1] and data.test["label"][:] == [1, 0]

    @pytest.mark.parametrize("dtype", ["int8", "uint16", "string", "large_string"])
    def test_labels_of_any_width_are_read(self, load, dtype):
        dataset = image_dataset(2, labels=[1, 0]).cast_column("labels", datasets.Value(dtype))
        data = load(dataset, label_column="labels" if "string" in dtype else None)
        assert data.class_names == ["0", "1"] and data.train["label"][:] == [1, 0]

    def test_test_labels_follow_the_order_of_the_training_classes(self, load):
        test = image_dataset(2, label=[0, 1]).cast_column("label", datasets.ClassLabel(names=["dog", "cat", "owl"]))
        data = load({"train": image_dataset(3, label=[0, 1, 2]), "test": test})
        assert data.test["label"][:] == [1, 0]  # dog, cat in the order cat, dog, owl
        assert data.test.features == data.train.features

    def test_a_class_that_only_the_test_images_have_is_named(self, load):
        splits = {"train": image_dataset(2, kind=["cat", "dog"]), "test": image_dataset(2, kind=["cat", "emu"])}
        with pytest.raises(
            InputError, match=r"has the classes 'emu' in its test images but not in its training images.*'cat', 'dog'"
        ):
            load(splits, label_column="kind")

    def test_unlabelled_training_and_labelled_test_images_go_together(self, load):
        data = load({"train": image_dataset(3), "test": image_dataset(2, label=[0, 1])})
        assert data.train.column_names == ["image"]
        assert data.test["label"][:] == [0, 1] and data.class_names == ["cat", "dog", "owl"]

    @pytest.mark.parametrize("label", [None, [-1, -1]], ids=["no column", "negative"])
    def test_labelled_training_and_unlabelled_test_images_go_together(self, load, label):
        data = load({"train": image_dataset(2, label=[0, 1]), "test": image_dataset(2, label=label)})
        assert data.test.column_names == ["image"] and data.class_names == ["cat", "dog", "owl"]

    @pytest.mark.parametrize("kind", [[0, -1, 1], [0, None, 1], ["a", None, "b"]], ids=str)
    def test_some_missing_labels_are_counted(self, load, kind):
        with pytest.raises(InputError, match="'kind' of dataset 'pets' lacks the label of 1 of 3 images"):
            load(image_dataset(3, kind=kind), label_column="kind")

    @pytest.mark.parametrize("argument", ["image_column", "label_column"])
    def test_a_missing_column_lists_those_that_exist(self, load, argument):
        expected = f"{argument} 'lable' is not a column of .*; its columns are 'image', 'label'.*Did you mean 'label'"
        with pytest.raises(InputError, match=expected):
            load(image_dataset(2, label=[0, 1]), **{argument: "lable"})

    def test_no_image_column_lists_the_columns(self, load):
        with pytest.raises(InputError, match="has no column with an Image feature; its columns are 'text', 'label'"):
            load(datasets.Dataset.from_dict({"text": ["a"], "label": [0]}))

    def test_several_image_or_label_columns_must_be_told_apart(self, load):
        dataset = image_dataset(2, label=[0, 1]).rename_column("image", "left").rename_column("label", "fine")
        dataset = dataset.add_column("coarse", [0, 0], feature=datasets.ClassLabel(names=["pet"]))
        with pytest.raises(InputError, match="several columns with a ClassLabel feature: 'fine', 'coarse'"):
            load(dataset)
        images = [{"bytes": b"", "path": None}] * 2
        with pytest.raises(InputError, match="has several columns with an Image feature"):
            load(dataset.add_column("right", images, feature=datasets.Image(decode=False)))

    @pytest.mark.parametrize("values", [[0.5, 1.5], [["a"], ["b"]], [[[1], [2, 3]]] * 2], ids=str)
    def test_columns_of_another_type_are_refused(self, load, values):
        dataset = image_dataset(2, score=values)
        with pytest.raises(InputError, match="image_column 'score' of dataset .* can't be read as images"):
            load(dataset, image_column="score")
        with pytest.raises(InputError, match="label_column 'score' .*accepted are a ClassLabel, integers and strings"):
            load(dataset, label_column="score")


class TestArguments:
    @pytest.mark.parametrize("fraction", [0, 1, -0.5, 2])
    def test_test_fraction_lies_between_0_and_1(self, fraction):
        with pytest.raises(InputError, match=f"test_fraction must lie between 0 and 1, both excluded, got {fraction}"):
            load_image_data("digits", test_fraction=fraction)

    @pytest.mark.parametrize("argument", ["max_train_images", "max_test_images"])
    @pytest.mark.parametrize("count", [0, -1, 1.5, True])
    def test_max_images_is_a_positive_integer(self, argument, count):
        with pytest.raises(InputError, match=f"{argument} must be an integer of at least 1, got {count}"):
            load_image_data("digits", **{argument: count})

    def test_the_source_gets_what_it_needs(self, monkeypatch):
        asked = []
        monkeypatch.setattr(data_module, "load_splits", lambda *args: asked.append(args) or {"a": image_dataset(2)})
        load_image_data("pets", config_name="small", train_split="a", test_split=None)
        assert asked == [("pets", "small", "a", None)]


class TestSplitHoldout:
    def test_parts_are_disjoint_seeded_and_the_held_out_one_has_no_labels(self):
        dataset = image_dataset(10, label=[0, 1] * 5)
        train, holdout = split_holdout(dataset, 0.3, seed=0)
        assert train.column_names == ["image", "label"] and holdout.column_names == ["image"]
        decode = [item["image"].getpixel((0, 0)) for part in (train, holdout) for item in part]
        assert len(holdout) == 3 and sorted(decode) == list(range(10))
        again = split_holdout(dataset, 0.3, seed=0)[1]
        assert [item["image"].getpixel((0, 0)) for item in again] == decode[7:]

    def test_a_dataset_without_labels_is_split_too(self):
        train, holdout = split_holdout(image_dataset(4), 0.5, seed=0)
        assert len(train) == len(holdout) == 2

    @pytest.mark.parametrize("fraction", [0, 1, 1.5])
    def test_the_fraction_lies_between_0_and_1(self, fraction):
        with pytest.raises(InputError, match=f"fraction must lie between 0 and 1, both excluded, got {fraction}"):
            split_holdout(image_dataset(4), fraction, seed=0)

    @pytest.mark.parametrize("fraction", [0.01, 0.99])
    def test_neither_side_may_be_empty(self, fraction):
        with pytest.raises(InputError, match=f"A fraction of {fraction} of 4 images leaves one side without images"):
            split_holdout(image_dataset(4), fraction, seed=0)
