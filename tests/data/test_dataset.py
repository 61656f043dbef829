import io
import logging
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from sqakd_hf.data import dataset as data_module
from sqakd_hf.data.dataset import load_image_data
from sqakd_hf.data.labels import is_labelled
from sqakd_hf.data.splits import split_holdout
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
        with caplog.at_level(logging.INFO, logger="sqakd_hf.data.dataset"):
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


class TestValidation:
    @pytest.mark.parametrize("name", ["validation", "valid", "val"])
    def test_a_validation_split_beside_a_test_split_is_for_choosing(self, load, name):
        splits = {"train": image_dataset(4), name: image_dataset(3), "test": image_dataset(2)}
        data = load(splits)
        assert (len(data.train), len(data.validation), len(data.test)) == (4, 3, 2)
        assert data.validation.features == data.train.features
        assert load(splits, test_split=None).test is None and len(load(splits, test_split=None).validation) == 3

    def test_one_that_is_tested_or_trained_on_is_not_for_choosing(self, load, caplog):
        splits = {"train": image_dataset(4), "val": image_dataset(3)}
        with caplog.at_level(logging.INFO, logger="sqakd_hf.data.dataset"):
            data = load(splits)
        assert len(data.test) == 3 and data.validation is None
        assert "has no split 'test'; testing on its split 'val'" in caplog.text
        assert load(splits, test_split="val").validation is None
        assert load({**splits, "test": image_dataset(2)}, train_split="val").validation is None

    def test_labels_are_numbered_as_in_training(self, load):
        renamed = datasets.ClassLabel(names=["dog", "owl", "cat"])
        validation = image_dataset(3, label=[0, 1, 2]).cast_column("label", renamed)
        splits = {"train": image_dataset(3, label=[0, 1, 2]), "test": image_dataset(1), "validation": validation}
        data = load(splits)
        assert data.validation["label"][:] == [1, 2, 0] and not is_labelled(data.test)
        with pytest.raises(InputError, match="'emu' in its validation images but not in its training images"):
            kinds = ["cat", "cat", "emu"]
            load(
                {
                    "train": image_dataset(3, kind=["cat"] * 3),
                    "test": image_dataset(1),
                    "validation": image_dataset(3, kind=kinds),
                },
                label_column="kind",
            )

    def test_each_split_tells_whether_it_is_labelled(self, load):
        labelled, plain = image_dataset(2, label=[0, 1]), image_dataset(2)
        for kinds in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 0)):
            names = zip(("train", "test", "validation"), kinds, strict=True)
            data = load({name: labelled if kind else plain for name, kind in names})
            found = tuple(map(is_labelled, (data.train, data.test, data.validation)))
            assert found == tuple(map(bool, kinds))
            assert data.class_names == (["cat", "dog", "owl"] if any(kinds) else None)


class TestDatasetsOfTheirOwn:
    @pytest.fixture
    def load(self, monkeypatch):
        def load(sources, **options):
            monkeypatch.setattr(data_module, "load_splits", lambda name, *args: sources[name])
            return load_image_data("pets", **options)

        return load

    def test_they_take_the_place_of_splits(self, load):
        pets = {"train": image_dataset(10), "validation": image_dataset(3), "test": image_dataset(2)}
        others = {"train": image_dataset(5)}
        data = load({"pets": pets, "more": others}, test_dataset="more")
        assert (len(data.train), len(data.validation), len(data.test)) == (10, 3, 5)
        data = load({"pets": pets, "more": others}, validation_dataset="more")
        assert (len(data.train), len(data.validation), len(data.test)) == (10, 5, 2)

    def test_nothing_is_split_off_and_a_validation_split_stays_one(self, load):
        sources = {"pets": {"train": image_dataset(10)}, "more": {"train": image_dataset(5)}}
        assert len(load(sources, test_dataset="more").train) == 10
        assert len(load(sources, validation_dataset="more").train) == 8  # test images are still split off
        sources["pets"]["val"] = image_dataset(3)
        data = load(sources, test_dataset="more", max_test_images=4)
        assert (len(data.validation), len(data.test)) == (3, 4)

    def test_their_own_split_of_that_kind_comes_first(self, load):
        more = {"train": image_dataset(5), "val": image_dataset(3), "test": image_dataset(2)}
        sources = {"pets": {"train": image_dataset(9)}, "more": more, "only": {"zoo": image_dataset(4)}}
        data = load(sources, test_dataset="more", validation_dataset="more")
        assert (len(data.validation), len(data.test)) == (3, 2)
        assert len(load(sources, test_dataset="only").test) == 4
        del more["val"]
        with pytest.raises(InputError, match="'more' has the splits 'test', 'train', and none is called 'validation'"):
            load(sources, validation_dataset="more")

    def test_labels_are_numbered_as_in_training_and_found_in_their_own_columns(self, load):
        renamed = datasets.ClassLabel(names=["owl", "dog"])
        more = image_dataset(2, labels=[0, 1]).cast_column("labels", renamed).rename_column("image", "photo")
        sources = {"pets": {"train": image_dataset(3, kind=["cat", "owl", "dog"])}, "more": {"train": more}}
        data = load(sources, label_column="kind", image_column="image", test_dataset="more")
        assert data.class_names == ["cat", "dog", "owl"] and data.test["label"][:] == [2, 1]
        with pytest.raises(InputError, match="Dataset 'more' has the classes 'owl' in its test images but not in its"):
            sources["pets"] = {"train": image_dataset(2, kind=["cat", "dog"])}
            load(sources, label_column="kind", test_dataset="more")

    def test_folders(self, tmp_path):
        for folder, count in (("train/cat", 3), ("train/dog", 3), ("later/dog", 2), ("later/cat", 1), ("new", 4)):
            (tmp_path / folder).mkdir(parents=True)
            for index in range(count):
                PIL.Image.new("L", (4, 4)).save(tmp_path / folder / f"{index}.png")
        names = {name: str(tmp_path / name) for name in ("train", "later", "new")}
        data = load_image_data(names["train"], test_dataset=names["later"], validation_dataset=names["new"])
        assert (len(data.train), len(data.test), len(data.validation)) == (6, 3, 4)
        assert data.test["label"][:] == [0, 1, 1] and not is_labelled(data.validation)
        with pytest.raises(InputError, match="'nowhere/' is not there"):
            load_image_data(names["train"], test_dataset="nowhere/")


class TestNumberedLike:
    @pytest.fixture
    def data(self, load):
        labelled = image_dataset(3, label=[0, 2, 1])
        return load({"train": labelled, "test": image_dataset(1), "validation": labelled})

    def test_classes_that_the_model_has_by_name_get_its_numbers(self, data):
        found = data.numbered_like(["owl", "emu", "cat", "dog"])
        assert found.class_names == ["owl", "emu", "cat", "dog"] == found.train.features["label"].names
        assert found.train["label"][:] == found.validation["label"][:] == [2, 0, 3]
        assert first_pixels(found.train) == [0, 1, 2] and not is_labelled(found.test)

    def test_the_same_classes_and_unlabelled_images_stay(self, data, load):
        assert data.numbered_like(["cat", "dog", "owl"]) is data
        plain = load({"train": image_dataset(2), "test": image_dataset(2)})
        assert plain.numbered_like(["a"]) is plain

    def test_as_many_of_other_names_are_taken_in_their_order_and_it_is_said(self, data, caplog):
        assert data.numbered_like(["tabby", "hound", "bird"]) is data
        assert "'cat', 'dog', 'owl', are called otherwise than the model's, 'tabby', 'hound', 'bird'." in caplog.text

    def test_a_model_with_two_classes_of_one_name_is_taken_in_its_order(self, data):
        assert data.numbered_like(["dog", "cat", "cat"]) is data
        with pytest.raises(InputError, match="The model has 4 classes"):
            data.numbered_like(["owl", "dog", "cat", "cat"])

    @pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"]])
    def test_numbers_are_no_names_to_differ_from(self, data, names, caplog):
        assert data.numbered_like(names) is data and not caplog.records

    @pytest.mark.parametrize("names", [["cat", "dog"], ["LABEL_0"], ["a", "b", "c", "d"]], ids=len)
    def test_classes_that_the_model_does_not_have_are_refused(self, data, names):
        with pytest.raises(
            InputError, match=f"The model has {len(names)} classes but the images have 3, 'cat', 'dog'"
        ):
            data.numbered_like(names)


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


def named_images(names, label=None):
    """Return images with these paths, which hold nothing."""
    columns = {"image": [{"bytes": b"x", "path": name} for name in names]}
    features = {"image": datasets.Image(decode=False)}
    if label is not None:
        columns["label"], features["label"] = label, datasets.ClassLabel(names=["cat", "dog", "owl"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def split_by_image(count, fraction, seed, labels=None):
    """The split of images that have nothing to do with each other: every k-th of a random order, class by class."""
    drawn = round(count * fraction)
    order = np.random.default_rng(seed).permutation(count)
    if labels is not None:
        order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    return np.sort(order[((np.arange(drawn) + 0.5) * count / drawn).astype(np.int64)]).tolist()


def drawn_of(dataset, fraction, seed, load=None):
    """The indices that are held out, or split off by class."""
    numbered = dataset.add_column("index", range(len(dataset)))
    if load is None:
        return split_holdout(numbered, fraction, seed)[1]["index"][:]
    test = load({"train": dataset}, test_fraction=fraction, seed=seed).test
    by_path = {item["path"]: index for index, item in enumerate(dataset["image"])}
    return [by_path[item["path"]] for item in test["image"]]


CROPS = [f"{picture:03d}_{crop:02d}.jpg" for picture in range(30) for crop in range(1 + picture % 5)]


class TestImagesOfOneName:
    @pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
    @pytest.mark.parametrize("folder", ["", "crops/", "/data/a_b/"])
    def test_stay_on_one_side(self, fraction, folder, load, caplog):
        for seed in range(5):
            for loads in (None, load):
                drawn = drawn_of(named_images([folder + name for name in CROPS]), fraction, seed, loads)
                held = {CROPS[index].split("_")[0] for index in drawn}
                trained = {CROPS[index].split("_")[0] for index in set(range(len(CROPS))) - set(drawn)}
                assert not held & trained and held and trained
                # Half of the largest group may be missing or too many.
                assert abs(len(drawn) - fraction * len(CROPS)) <= 3
        assert not caplog.records
        assert len({tuple(drawn_of(named_images(CROPS), fraction, seed)) for seed in range(5)}) == 5

    def test_stay_there_by_class_too(self, load):
        for seed in range(5):
            names = [f"{pet}/{name}" for pet in ("cat", "dog", "owl") for name in CROPS]
            label = [index // len(CROPS) for index in range(len(names))]
            drawn = drawn_of(named_images(names, label), 0.2, seed, load)
            groups = {names[index].rpartition("_")[0] for index in drawn}
            assert sum(name.rpartition("_")[0] in groups for name in names) == len(drawn)
            assert np.bincount([label[index] for index in drawn]) / len(CROPS) == pytest.approx([0.2] * 3, abs=0.06)

    def test_groups_are_of_one_folder(self):
        names = [f"{day}/{camera}_{shot}.jpg" for day in range(20) for camera in "ab" for shot in range(2)]
        drawn = drawn_of(named_images(names), 0.25, 0)
        held = {names[index].rpartition("_")[0] for index in drawn}
        assert len(held) == 10 and len(drawn) == 20 and len({name.split("/")[0] for name in held}) > 5

    @pytest.mark.parametrize(
        "names",
        [
            [f"IMG_{index:04d}.jpg" for index in range(50)],
            [f"{pet}/img_{index:04d}.jpg" for pet in ("cat", "dog") for index in range(25)],
            [f"{index:04d}.jpg" for index in range(50)],
            [f"{index:04d}_cat.jpg" for index in range(50)],
            [f"_{index}.jpg" for index in range(49)] + ["a_b/c_d.jpg"],
            [None] * 50,
        ],
        ids=["camera", "classes", "numbers", "numbers first", "no name", "no path"],
    )
    def test_names_that_tell_nothing_change_nothing(self, names, caplog):
        for seed, fraction in ((0, 0.1), (1, 0.2), (2, 0.31)):
            assert drawn_of(named_images(names), fraction, seed) == split_by_image(50, fraction, seed)
        assert not caplog.records

    def test_names_that_tell_nothing_change_nothing_by_class(self, load):
        rng = np.random.default_rng(0)
        for count in (10, 50, 333):
            labels = rng.integers(0, 3, count).tolist()
            dataset = named_images([f"{index}.jpg" for index in range(count)], labels)
            for seed, fraction in ((0, 0.1), (1, 0.2), (2, 0.31), (3, 0.5)):
                assert drawn_of(dataset, fraction, seed, load) == split_by_image(count, fraction, seed, labels)

    def test_the_digits_are_split_as_before(self):
        everything = load_image_data("digits", test_split=None).train
        data = load_image_data("digits", seed=42)
        assert data.test[:] == everything.select(split_by_image(1797, 0.2, 42, everything["label"][:]))[:]
        holdout = split_holdout(data.train, 0.1, 42, keep_labels=True)[1]
        assert holdout[:] == data.train.select(split_by_image(1438, 0.1, 42))[:]

    @pytest.mark.parametrize(
        "names",
        [
            [f"film{film}_{frame}.png" for film in range(2) for frame in range(25)],
            [f"IMG_{index}.jpg" for index in range(48)] + ["cat.jpg", "dog.jpg"],
        ],
        ids=["two films", "one big group"],
    )
    def test_too_few_names_are_said_and_images_drawn_one_by_one(self, names, caplog):
        assert drawn_of(named_images(names), 0.2, 0) == split_by_image(50, 0.2, 0)
        assert "can't be kept together" in caplog.text and caplog.records[0].levelname == "WARNING"

    def test_no_class_is_taken_from_training(self, load, caplog):
        # The one picture of a class has many crops: to keep them together would be to test on a class unseen.
        names = [f"{index}.jpg" for index in range(40)] + [f"owl_{crop}.jpg" for crop in range(10)]
        for seed in range(5):
            data = load({"train": named_images(names, [0, 1] * 20 + [2] * 10)}, seed=seed)
            assert set(data.train["label"]) == {0, 1, 2}

    def test_images_that_are_decoded_already_are_held_out_too(self, tmp_path):
        files = [str(tmp_path / name) for name in CROPS[:30]]
        for file in files:
            PIL.Image.new("L", (2, 2)).save(file)
        dataset = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
        train, holdout = split_holdout(dataset.with_transform(lambda batch: batch), 0.3, seed=0)
        sides = [{Path(item["image"].filename).name.split("_")[0] for item in side} for side in (train, holdout)]
        assert not sides[0] & sides[1]

    def test_a_dataset_without_images_is_split_too(self):
        assert len(split_holdout(datasets.Dataset.from_dict({"x": range(10)}), 0.2, seed=0)[1]) == 2


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
