import gzip
import io
import json
import logging
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from sqakd_hf import data as data_module
from sqakd_hf.data import AUGMENTATIONS, ImageTransform, load_image_data, split_holdout
from sqakd_hf.errors import InputError


HALF = [0.5]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    # `datasets` reads HF_HUB_OFFLINE and its cache folder on import, so the values it read are replaced.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def digits():
    return load_image_data("digits")


def write_images(folder, count, value=0, mode="RGB"):
    """Write `count` 4x4 images whose pixels hold value, value + 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        PIL.Image.new(mode, (4, 4), (value + i,) * len(PIL.Image.new(mode, (1, 1)).getbands())).save(
            folder / f"{i:02d}.png"
        )
    return folder


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def image_dataset(count, **columns):
    images = [PIL.Image.new("L", (4, 4), i) for i in range(count)]
    labels = columns.pop("label", None)
    features = {"image": datasets.Image()}
    values = {"image": images}
    if labels is not None:
        features["label"] = datasets.ClassLabel(names=["cat", "dog", "owl"])
        values["label"] = labels
    dataset = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)
    return dataset


def save_splits(path, **splits):
    datasets.DatasetDict(splits).save_to_disk(path)
    return str(path)


def first_pixels(dataset):
    return [PIL.Image.open(io.BytesIO(item["image"]["bytes"])).getpixel((0, 0)) for item in dataset]


def file_names(dataset):
    return [Path(item["path"]).name for item in dataset["image"]]


class TestBuiltIn:
    def test_digits_are_labelled_and_their_pixels_are_scaled_to_a_byte(self, digits):
        from sklearn.datasets import load_digits

        assert digits.train.column_names == digits.test.column_names == ["image", "label"]
        assert digits.train.features["image"] == datasets.Image(decode=False)
        assert digits.class_names == digits.test.features["label"].names == [str(digit) for digit in range(10)]
        assert (len(digits.train), len(digits.test)) == (1438, 359)
        everything = load_image_data("digits", test_split=None)
        assert everything.test is None
        image = np.asarray(PIL.Image.open(io.BytesIO(everything.train[7]["image"]["bytes"])))
        assert np.array_equal(image, np.rint(load_digits().images[7] * 255 / 16))

    def test_the_split_depends_on_the_seed_alone_and_is_stratified(self, digits):
        again, other = load_image_data("digits"), load_image_data("digits", seed=1)
        assert again.train[:] == digits.train[:] and again.test[:] == digits.test[:]
        assert other.test[:] != digits.test[:]
        share = np.bincount(digits.test["label"][:]) / np.bincount([*digits.train["label"], *digits.test["label"]])
        assert np.allclose(share, 0.2, atol=0.01)  # 180 images a class: one image is 0.006

    def test_max_images_draws_by_seed_and_more_than_exist_means_all_in_order(self, digits, caplog):
        few = load_image_data("digits", max_train_images=5, max_test_images=3)
        assert (len(few.train), len(few.test)) == (5, 3)
        assert few.train[:] == load_image_data("digits", max_train_images=5).train[:]
        with caplog.at_level(logging.INFO, logger="sqakd_hf.data"):
            all_of_them = load_image_data("digits", max_train_images=10_000)
        assert all_of_them.train[:] == digits.train[:]
        assert "10000 training images of 'digits' were asked for; using all 1438." in caplog.text

    @pytest.mark.skipif(
        not data_module._fashion_mnist_is_installed(), reason="needs the Debian package dataset-fashion-mnist"
    )
    def test_fashion_mnist_of_the_debian_package_is_readable(self):
        test = data_module._load_fashion_mnist("test")  # the smaller split, for speed
        assert len(test) == 10_000 and test.features["label"].int2str(test[0]["label"]) == "Ankle boot"
        assert PIL.Image.open(io.BytesIO(test[-1]["image"]["bytes"])).size == (28, 28)

    def test_fashion_mnist_has_the_splits_of_its_files(self, monkeypatch, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
        for images, labels in data_module.FASHION_MNIST_FILES.values():
            header = struct.pack(">BBBBIII", 0, 0, 8, 3, *pixels.shape)
            (tmp_path / images).write_bytes(gzip.compress(header + pixels.tobytes()))
            (tmp_path / labels).write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + bytes([9, 0, 3])))
        monkeypatch.setattr(data_module, "FASHION_MNIST_FOLDER", str(tmp_path))
        data = load_image_data("fashion_mnist")
        assert (len(data.train), len(data.test)) == (3, 3)
        assert [data.class_names[label] for label in data.train["label"]] == ["Ankle boot", "T-shirt/top", "Dress"]
        assert np.array_equal(PIL.Image.open(io.BytesIO(data.test[2]["image"]["bytes"])), pixels[2])

    def test_fashion_mnist_without_package_or_hub_says_how_to_get_it(self, monkeypatch, tmp_path):
        monkeypatch.setattr(data_module, "FASHION_MNIST_FOLDER", str(tmp_path))
        with pytest.raises(
            InputError, match="Install the Debian package dataset-fashion-mnist, or connect to the Hub"
        ):
            load_image_data("fashion_mnist")

    def test_a_truncated_idx_file_is_named(self, monkeypatch, tmp_path):
        for file in sum(data_module.FASHION_MNIST_FILES.values(), ()):
            (tmp_path / file).write_bytes(b"\x1f\x8b")
        monkeypatch.setattr(data_module, "FASHION_MNIST_FOLDER", str(tmp_path))
        with pytest.raises(InputError, match="train-images-idx3-ubyte.gz' is not a readable idx file"):
            load_image_data("fashion_mnist")

    def test_importing_the_module_does_not_import_datasets(self):
        code = "import sys, sqakd_hf.data; assert not {'datasets', 'torchvision', 'sklearn'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestFolder:
    def test_a_flat_folder_has_no_labels_and_is_split_all_the_same(self, tmp_path):
        data = load_image_data(str(write_images(tmp_path / "photos", 10)))
        assert data.train.column_names == data.test.column_names == ["image"]
        assert data.class_names is None
        assert sorted(file_names(data.train) + file_names(data.test)) == [f"{i:02d}.png" for i in range(10)]
        assert len(data.test) == 2 and file_names(data.train) == sorted(file_names(data.train))

    def test_sub_folders_are_classes(self, tmp_path):
        write_images(tmp_path / "dog", 10)
        write_images(tmp_path / "cat" / "indoors", 5)
        (tmp_path / "cat" / "notes.txt").write_text("no image")
        write_images(tmp_path / ".hidden", 1)
        data = load_image_data(str(tmp_path))
        assert data.class_names == ["cat", "dog"]
        assert sorted(data.test["label"]) == [0, 1, 1]
        assert all(("dog" in item["image"]["path"]) == item["label"] for item in data.train)

    def test_one_sub_folder_is_not_a_class(self, tmp_path):
        write_images(tmp_path / "images", 5)
        assert load_image_data(str(tmp_path)).class_names is None

    def test_brackets_in_the_path_are_no_pattern(self, tmp_path):
        assert len(load_image_data(str(write_images(tmp_path / "a [1]*", 5)), test_split=None).train) == 5

    @pytest.mark.parametrize("test_name", ["test", "validation", "val"])
    def test_train_and_test_sub_folders_are_splits(self, tmp_path, test_name):
        for split, count in (("train", 3), (test_name, 2)):
            write_images(tmp_path / split / "cat", count)
            write_images(tmp_path / split / "dog", count)
        data = load_image_data(str(tmp_path))
        assert (len(data.train), len(data.test)) == (6, 4)
        assert data.class_names == data.test.features["label"].names == ["cat", "dog"]

    def test_a_train_sub_folder_without_others_is_split(self, tmp_path):
        write_images(tmp_path / "train", 10)
        data = load_image_data(str(tmp_path))
        assert (len(data.train), len(data.test)) == (8, 2)

    def test_a_class_may_be_called_train(self, tmp_path):
        for vehicle in ("bus", "car", "train"):
            write_images(tmp_path / vehicle, 2)
        assert load_image_data(str(tmp_path), test_split=None).class_names == ["bus", "car", "train"]

    def test_unlabelled_training_and_labelled_test_images_go_together(self, tmp_path):
        write_images(tmp_path / "train", 3)
        write_images(tmp_path / "test" / "cat", 1)
        write_images(tmp_path / "test" / "dog", 1)
        data = load_image_data(str(tmp_path))
        assert data.train.column_names == ["image"]
        assert data.test["label"][:] == [0, 1] and data.class_names == ["cat", "dog"]

    def test_a_metadata_file_names_the_images(self, tmp_path):
        write_images(tmp_path, 2)
        (tmp_path / "metadata.csv").write_text("file_name,kind\n00.png,cat\n01.png,dog\n")
        data = load_image_data(str(tmp_path), label_column="kind", test_split=None)
        assert data.class_names == ["cat", "dog"] and data.train["label"][:] == [0, 1]

    def test_a_bad_metadata_file_is_reported(self, tmp_path):
        write_images(tmp_path, 2)
        (tmp_path / "metadata.csv").write_text("kind\ncat\ndog\n")
        with pytest.raises(InputError, match="can't be read by its metadata file: .*file_name must name every image"):
            load_image_data(str(tmp_path))

    def test_a_class_that_only_the_test_images_have_is_named(self, tmp_path):
        for folder in ("train/cat", "train/dog", "test/cat", "test/emu"):
            write_images(tmp_path / folder, 1)
        with pytest.raises(
            InputError, match=r"has the classes 'emu' in its test images but not in its training images.*'cat', 'dog'"
        ):
            load_image_data(str(tmp_path))

    def test_an_empty_folder_is_reported(self, tmp_path):
        with pytest.raises(InputError, match=r"Folder '.*' holds no images; accepted are image files such as .png"):
            load_image_data(str(tmp_path))

    def test_images_beside_class_folders_are_reported(self, tmp_path):
        for folder in (tmp_path, tmp_path / "cat", tmp_path / "dog"):
            write_images(folder, 1)
        with pytest.raises(InputError, match="holds 1 images beside its class folders 'cat', 'dog', '00.png' for one"):
            load_image_data(str(tmp_path))


class TestSavedDatasets:
    def test_a_parquet_file_keeps_its_labels_and_loses_other_columns(self, tmp_path):
        path = tmp_path / "pets.parquet"
        image_dataset(10, label=[0, 1] * 5, note=["x"] * 10).to_parquet(path)
        data = load_image_data(str(path), test_split=None)
        assert data.train.column_names == ["image", "label"]
        assert data.class_names == ["cat", "dog", "owl"]
        assert first_pixels(data.train) == list(range(10)) and data.train["label"][:] == [0, 1] * 5

    def test_a_folder_of_parquet_files_has_the_splits_of_their_names(self, tmp_path):
        (tmp_path / "data").mkdir()
        image_dataset(3).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
        image_dataset(2).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
        data = load_image_data(str(tmp_path))
        assert (len(data.train), len(data.test), data.class_names) == (3, 2, None)

    def test_a_corrupt_parquet_file_is_reported(self, tmp_path):
        path = tmp_path / "pets.parquet"
        path.write_bytes(b"no parquet")
        with pytest.raises(InputError, match="pets.parquet' can't be read as parquet: .* Write it again") as caught:
            load_image_data(str(path))
        assert caught.value.__cause__ is not None

    def test_save_to_disk_is_read_back_and_the_order_is_kept(self, tmp_path):
        image_dataset(4, label=[2, 0, 1, 0]).save_to_disk(tmp_path / "one")
        data = load_image_data(str(tmp_path / "one"), test_split=None)
        assert first_pixels(data.train) == [0, 1, 2, 3] and data.train["label"][:] == [2, 0, 1, 0]
        two = save_splits(tmp_path / "two", train=image_dataset(4), test=image_dataset(2))
        assert len(load_image_data(two).test) == 2

    def test_a_broken_save_is_reported(self, tmp_path):
        image_dataset(4).save_to_disk(tmp_path)
        (tmp_path / "state.json").write_text("{")
        with pytest.raises(InputError, match="can't be read as a saved dataset: .* Save it again"):
            load_image_data(str(tmp_path))

    def test_a_missing_split_lists_those_that_exist(self, tmp_path):
        saved = save_splits(tmp_path, train=image_dataset(4), val=image_dataset(2))
        with pytest.raises(InputError, match="has no split 'vla'; its splits are 'train', 'val'.*Did you mean 'val'"):
            load_image_data(saved, test_split="vla")
        with pytest.raises(InputError, match="has no split 'training'; its splits are 'train', 'val'"):
            load_image_data(saved, train_split="training")

    def test_an_empty_split_is_reported(self, monkeypatch):
        splits = {"train": image_dataset(4), "test": image_dataset(4).select([])}
        monkeypatch.setattr(data_module, "_load_splits", lambda *args: splits)
        with pytest.raises(InputError, match="The split 'test' of dataset 'pets' holds no images"):
            load_image_data("pets")

    def test_an_empty_parquet_file_is_reported(self, tmp_path):
        image_dataset(4).select([]).to_parquet(tmp_path / "pets.parquet")
        with pytest.raises(InputError, match="pets.parquet' can't be read as parquet"):
            load_image_data(str(tmp_path / "pets.parquet"))

    def test_a_saved_dataset_without_images_is_reported(self, tmp_path):
        image_dataset(4).select([]).save_to_disk(tmp_path)
        with pytest.raises(InputError, match="can't be read as a saved dataset"):
            load_image_data(str(tmp_path))


class TestColumns:
    def test_the_image_column_is_found_by_its_feature_and_integers_become_class_labels(self, tmp_path):
        image_dataset(4, labels=[0, 2, 2, 0]).rename_column("image", "img").save_to_disk(tmp_path)
        data = load_image_data(str(tmp_path), test_split=None)
        assert data.train.column_names == ["image", "label"]
        assert data.class_names == ["0", "1", "2"] and data.train["label"][:] == [0, 2, 2, 0]

    def test_requested_columns_are_used(self, tmp_path):
        dataset = image_dataset(2, label=[0, 1], kind=["owl", "bat"])
        dataset = dataset.add_column("photo", [encode(PIL.Image.new("L", (4, 4), 9))["bytes"]] * 2)
        dataset.save_to_disk(tmp_path)
        data = load_image_data(str(tmp_path), image_column="photo", label_column="kind", test_split=None)
        assert first_pixels(data.train) == [9, 9]
        assert data.class_names == ["bat", "owl"] and data.train["label"][:] == [1, 0]

    def test_test_labels_follow_the_order_of_the_training_classes(self, tmp_path):
        test = image_dataset(2, label=[0, 1]).cast_column("label", datasets.ClassLabel(names=["dog", "cat", "owl"]))
        saved = save_splits(tmp_path, train=image_dataset(3, label=[0, 1, 2]), test=test)
        assert load_image_data(saved).test["label"][:] == [1, 0]  # dog, cat in the order cat, dog, owl

    def test_a_split_whose_labels_are_all_missing_is_unlabelled(self, tmp_path):
        saved = save_splits(tmp_path, train=image_dataset(2, label=[0, 1]), test=image_dataset(2, label=[-1, -1]))
        data = load_image_data(saved)
        assert data.test.column_names == ["image"] and data.class_names == ["cat", "dog", "owl"]

    def test_some_missing_labels_are_counted(self, tmp_path):
        image_dataset(3, label=[0, -1, 1]).save_to_disk(tmp_path)
        with pytest.raises(InputError, match="'label' of dataset .* lacks the label of 1 of 3 images"):
            load_image_data(str(tmp_path))

    @pytest.mark.parametrize("argument", ["image_column", "label_column"])
    def test_a_missing_column_lists_those_that_exist(self, tmp_path, argument):
        image_dataset(2, label=[0, 1]).save_to_disk(tmp_path)
        expected = f"{argument} 'lable' is not a column of .*; its columns are 'image', 'label'.*Did you mean 'label'"
        with pytest.raises(InputError, match=expected):
            load_image_data(str(tmp_path), **{argument: "lable"})

    def test_no_image_column_lists_the_columns(self, tmp_path):
        datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path)
        with pytest.raises(InputError, match="has no column with an Image feature; its columns are 'text', 'label'"):
            load_image_data(str(tmp_path))

    def test_several_image_or_label_columns_must_be_told_apart(self, tmp_path):
        dataset = image_dataset(2, label=[0, 1]).rename_column("image", "left").rename_column("label", "fine")
        dataset = dataset.add_column("coarse", [0, 0], feature=datasets.ClassLabel(names=["pet"]))
        dataset.save_to_disk(tmp_path / "labels")
        with pytest.raises(InputError, match="several columns with a ClassLabel feature: 'fine', 'coarse'"):
            load_image_data(str(tmp_path / "labels"))
        images = [{"bytes": b"", "path": None}] * 2
        dataset.add_column("right", images, feature=datasets.Image(decode=False)).save_to_disk(tmp_path / "images")
        with pytest.raises(InputError, match="has several columns with an Image feature"):
            load_image_data(str(tmp_path / "images"))

    def test_columns_of_another_type_are_refused(self, tmp_path):
        image_dataset(2, score=[0.5, 1.5]).save_to_disk(tmp_path)
        with pytest.raises(InputError, match="image_column 'score' of dataset .* can't be read as images"):
            load_image_data(str(tmp_path), image_column="score")
        with pytest.raises(InputError, match="label_column 'score' .*accepted are a ClassLabel, integers and strings"):
            load_image_data(str(tmp_path), label_column="score")


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

    def test_a_single_image_can_not_be_split(self, tmp_path):
        with pytest.raises(InputError, match="A fraction of 0.2 of 1 images leaves one side without images"):
            load_image_data(str(write_images(tmp_path, 1)))

    def test_config_name_is_for_the_hub_only(self):
        with pytest.raises(InputError, match="config_name='small' was given with 'digits', which is not .* the Hub"):
            load_image_data("digits", config_name="small")


class TestHub:
    def test_an_unknown_name_says_what_is_accepted(self):
        with pytest.raises(
            InputError,
            match=r"Dataset 'cifar1O' is neither 'digits', 'fashion_mnist', a folder, a parquet file nor a dataset "
            r"that the Hub \(unreachable\) or the local cache has\. Check the spelling",
        ) as caught:
            load_image_data("cifar1O")
        assert isinstance(caught.value.__cause__, ConnectionError)

    def test_a_name_close_to_a_built_in_one_is_suggested(self):
        with pytest.raises(InputError, match="Did you mean 'digits'?"):
            load_image_data("digit")

    @pytest.mark.parametrize("name", ["./nope", "/nope/at/all", "a/b/c", "nope.parquet"])
    def test_a_missing_path_is_not_looked_for_on_the_hub(self, name, monkeypatch):
        monkeypatch.setattr(data_module, "_load_from_hub", pytest.fail)
        with pytest.raises(InputError, match=f"'{name}' is not there; accepted are 'digits', .* Check the path"):
            load_image_data(name)

    def test_a_file_of_another_kind_is_refused(self, tmp_path):
        (tmp_path / "images.zip").write_bytes(b"")
        with pytest.raises(InputError, match="images.zip' is not a folder or a parquet file"):
            load_image_data(str(tmp_path / "images.zip"))

    def test_an_unreachable_hub_leads_to_the_cache_without_retries(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
        asked = []

        def load_dataset(*args):
            asked.append(datasets.config.HF_HUB_OFFLINE)
            raise ConnectionError

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(InputError, match="unreachable"):
            load_image_data("someone/pets")
        assert asked == [True] and datasets.config.HF_HUB_OFFLINE is False

    def test_a_dataset_in_the_cache_is_used_without_the_hub(self, tmp_path):
        image_dataset(4, label=[0, 1, 0, 1]).to_parquet(tmp_path / "pets.parquet")
        load_image_data(str(tmp_path / "pets.parquet"))
        (prepared,) = (tmp_path / "cache" / "parquet").glob("*/*/*/")
        # What the Hub's someone/pets would have left behind.
        cached = tmp_path / "cache" / "someone___pets" / "default" / prepared.parent.name / prepared.name
        shutil.copytree(prepared, cached)
        (cached / "parquet-train.arrow").rename(cached / "pets-train.arrow")
        info = json.loads((cached / "dataset_info.json").read_text())
        info.update(dataset_name="pets", config_name="default")
        info["splits"]["train"]["dataset_name"] = "pets"
        (cached / "dataset_info.json").write_text(json.dumps(info))
        assert len(load_image_data("someone/pets", test_split=None).train) == 4
        with pytest.raises(InputError, match=r"'someone/pets' \(config_name='small'\) can't be loaded: .*default"):
            load_image_data("someone/pets", config_name="small")


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


class TestImageTransform:
    @pytest.mark.parametrize("size", [2, 8])
    def test_pixels_without_resize_follow_the_formula(self, size):
        rgb = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        result = ImageTransform(size, mean, std)({"image": [encode(PIL.Image.fromarray(rgb))]})
        expected = (rgb.astype(np.float64) / 255 - np.array(mean)) / np.array(std)  # (H, W, C)
        (pixels,) = result["pixel_values"]
        assert pixels.dtype == torch.float32 and pixels.is_contiguous()
        # float32 against float64: three roundings of values below 3
        torch.testing.assert_close(pixels.double(), torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-6)

    def test_labels_are_integers_and_only_there_where_the_dataset_has_them(self, digits):
        item = digits.train.with_transform(ImageTransform(8, HALF, HALF))[0]
        assert item["labels"] == digits.train[0]["label"] and set(item) == {"pixel_values", "labels"}
        unlabelled = digits.train.remove_columns("label").with_transform(ImageTransform(8, HALF, HALF))
        assert set(unlabelled[0]) == {"pixel_values"}

    @pytest.mark.parametrize("augment", AUGMENTATIONS)
    @pytest.mark.parametrize("shape", [(9, 20), (20, 9), (4, 4), (8, 8)], ids=str)
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_every_augmentation_gives_squares_of_the_size(self, augment, shape, mode):
        channels = len(mode)
        transform = ImageTransform(8, HALF * channels, HALF * channels, crop_pct=0.875, augment=augment)
        (pixels,) = transform({"image": [encode(PIL.Image.new(mode, shape))]})["pixel_values"]
        assert pixels.shape == (channels, 8, 8)

    def test_crop_pct_keeps_the_centre(self):
        image = PIL.Image.fromarray(np.pad(np.full((4, 4), 255, np.uint8), 2))  # white 4x4 in black 8x8
        (pixels,) = ImageTransform(4, [0.0], [1.0], crop_pct=0.5)({"image": [encode(image)]})["pixel_values"]
        assert torch.equal(pixels, torch.ones(1, 4, 4))

    @pytest.mark.parametrize("augment", [name for name in AUGMENTATIONS if name != "none"])
    def test_augmentation_depends_on_the_generator_of_torch_alone(self, augment, digits):
        dataset = digits.train.select(range(16)).with_transform(ImageTransform(8, HALF, HALF, augment=augment))

        def draw(seed):
            torch.manual_seed(seed)
            return torch.stack(dataset[:]["pixel_values"])

        assert torch.equal(draw(0), draw(0))
        assert not torch.equal(draw(0), draw(1))

    def test_crop_shifts_by_the_mirrored_margin_and_does_not_flip(self):
        image = np.arange(64, dtype=np.uint8).reshape(8, 8)
        padded = np.pad(image, 1, mode="reflect")
        possible = [padded[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)]
        batch = {"image": [encode(PIL.Image.fromarray(image))] * 30}
        for pixels in ImageTransform(8, [0.0], [1.0], augment="crop")(batch)["pixel_values"]:
            assert (pixels[0] * 255).round().to(torch.uint8).numpy().tobytes() in possible

    def test_without_augmentation_keeps_everything_else(self):
        transform = ImageTransform(
            8, HALF, [0.25], crop_pct=0.9, interpolation="bilinear", augment="crop-flip"
        ).without_augmentation()
        expected = ImageTransform(8, HALF, [0.25], crop_pct=0.9, interpolation="bilinear")
        assert repr(transform) == repr(expected)

    def test_pickling_keeps_the_result(self, digits):
        transform = ImageTransform(12, HALF * 3, HALF * 3, augment="resized-crop")
        copy = pickle.loads(pickle.dumps(transform))
        batch = digits.train[:4]
        torch.manual_seed(0)
        expected = transform(batch)["pixel_values"]
        torch.manual_seed(0)
        assert all(map(torch.equal, copy(batch)["pixel_values"], expected))
        assert repr(copy) == repr(transform)

    @pytest.mark.parametrize(
        ("mode", "channels", "message"),
        [("L", 3, "Grey images are converted to RGB"), ("RGB", 1, "Colour images are converted to grey")],
        ids=["grey-to-rgb", "rgb-to-grey"],
    )
    def test_a_conversion_of_channels_is_said_once(self, mode, channels, message, caplog):
        transform = ImageTransform(4, HALF * channels, HALF * channels)
        batch = {"image": [encode(PIL.Image.new(mode, (4, 4)))] * 3}
        for _ in range(2):
            transform(batch)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert message in caplog.text

    def test_matching_channels_are_silent(self, caplog):
        for mode, channels in (("L", 1), ("RGB", 3), ("P", 3), ("RGBA", 3), ("LA", 1)):
            ImageTransform(4, HALF * channels, HALF * channels)({"image": [encode(PIL.Image.new(mode, (4, 4)))]})
        assert not caplog.records


class TestDecoding:
    @staticmethod
    def decode(value, channels=3):
        (pixels,) = ImageTransform(2, [0.0] * channels, [1.0] * channels)({"image": [value]})["pixel_values"]
        return (pixels * 255).round().to(torch.uint8)

    def test_a_corrupt_file_in_the_middle_of_a_batch_is_named(self, tmp_path):
        write_images(tmp_path, 5)
        broken = tmp_path / "02.png"
        broken.write_bytes(broken.read_bytes()[:40])
        dataset = load_image_data(str(tmp_path), test_split=None).train.with_transform(ImageTransform(4, HALF, HALF))
        with pytest.raises(InputError, match=r"Image '.*02\.png' can't be read \(.*Remove or replace it") as caught:
            dataset[:]
        assert caught.value.__cause__ is not None

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(InputError, match=r"gone\.png' can't be read"):
            self.decode({"bytes": None, "path": str(tmp_path / "gone.png")})

    @pytest.mark.parametrize(
        "value", [None, {"bytes": b"", "path": None}, {"bytes": b"text", "path": None}, {"bytes": None, "path": None}]
    )
    def test_an_image_without_path_is_numbered(self, value):
        good = encode(PIL.Image.new("L", (2, 2)))
        with pytest.raises(InputError, match="Image number 2 of the batch can't be read"):
            ImageTransform(2, HALF, HALF)({"image": [good, value, good]})

    @pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged tags
    def test_damaged_bytes_never_raise_anything_else(self):
        rng = np.random.default_rng(0)
        noise = PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        transform = ImageTransform(16, HALF * 3, HALF * 3)
        for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
            content = np.frombuffer(encode(noise, format)["bytes"], np.uint8)
            for _ in range(40):
                damaged = content.copy()
                damaged[rng.integers(0, min(len(damaged), 200), 4)] = rng.integers(0, 256, 4)
                try:
                    transform({"image": [{"bytes": damaged.tobytes(), "path": None}]})
                except InputError:
                    pass

    def test_transparent_parts_become_white(self):
        image = PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 255))
        image.putpixel((1, 0), (255, 0, 0, 0))
        assert self.decode(encode(image))[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]
        assert self.decode(encode(PIL.Image.new("LA", (2, 2), (10, 0))), channels=1).unique().tolist() == [255]

    def test_a_palette_is_resolved_and_its_transparent_colour_is_white(self):
        image = PIL.Image.new("P", (2, 2), 0)
        image.putpalette([0, 200, 0, 9, 9, 9])
        image.putpixel((1, 0), 1)
        assert self.decode(encode(image))[:, 0].T.tolist() == [[0, 200, 0], [9, 9, 9]]
        assert self.decode(encode(image, transparency=1))[:, 0].T.tolist() == [[0, 200, 0], [255, 255, 255]]

    def test_16_bits_are_scaled_not_clipped(self):
        image = PIL.Image.fromarray(np.array([[0, 257], [25700, 65535]], np.uint16))
        for format in ("PNG", "TIFF"):
            assert self.decode(encode(image, format), channels=1).flatten().tolist() == [0, 1, 100, 255]

    def test_exif_orientation_turns_the_image_upright(self):
        image = PIL.Image.fromarray(np.array([[0, 80], [160, 240]], np.uint8))
        exif = PIL.Image.Exif()
        exif[PIL.Image.ExifTags.Base.Orientation] = 3  # upside down
        assert self.decode(encode(image, exif=exif), channels=1).flatten().tolist() == [240, 160, 80, 0]

    def test_images_that_are_decoded_already_are_accepted(self):
        assert self.decode(PIL.Image.new("L", (2, 2), 7), channels=1).unique().tolist() == [7]


class TestTransformArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"augment": "crop-flp"},
                "Unknown augment 'crop-flp'; accepted are 'none', 'crop', 'crop-flip', 'resized-c",
            ),
            ({"interpolation": "cubic"}, "Unknown interpolation 'cubic'; accepted are .*Did you mean 'bicubic'"),
            ({"size": 0}, "size must be an integer of at least 1, got 0"),
            ({"mean": HALF * 2}, "mean and std must have three values each .*, got 2 and 1"),
            ({"std": [0.0]}, "std must be greater than 0 in every channel, got"),
            ({"crop_pct": 0.0}, "crop_pct must be greater than 0 and at most 1, got 0.0"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_value_that_is_not_accepted_is_named(self, arguments, message):
        with pytest.raises(InputError, match=message):
            ImageTransform(**{"size": 8, "mean": HALF, "std": HALF, **arguments})

    def test_a_batch_without_images_is_explained(self):
        with pytest.raises(InputError, match="needs the column 'image', got 'label'.*remove_unused_columns=False"):
            ImageTransform(8, HALF, HALF)({"label": [1]})
