import gzip
import io
import json
import logging
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from sqakd_hf.data import sources
from sqakd_hf.data.sources import load_splits
from sqakd_hf.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def load(name, config_name=None, train_split="train", test_split="test"):
    return load_splits(str(name), config_name, train_split, test_split)


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        PIL.Image.new("RGB", (4, 4)).save(folder / f"{i:02d}.png")
    return folder


def image_dataset(count):
    images = [PIL.Image.new("L", (4, 4), i) for i in range(count)]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


def sizes(splits):
    return {name: len(dataset) for name, dataset in splits.items()}


def class_names(dataset):
    return dataset.features["label"].names


def pixels(item):
    return np.asarray(PIL.Image.open(io.BytesIO(item["image"]["bytes"])))


@pytest.mark.process
def test_importing_the_modules_does_not_import_datasets():
    modules = "sqakd_hf.data.dataset, sqakd_hf.data.sources, sqakd_hf.data.transforms"
    code = f"import sys, {modules}; assert not {{'datasets', 'torchvision', 'sklearn'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestBuiltIn:
    def test_digits_are_labelled_and_their_pixels_are_scaled_to_a_byte(self):
        from sklearn.datasets import load_digits

        digits = load("digits", train_split="all")["all"]
        assert digits.features["image"] == datasets.Image(decode=False)
        assert class_names(digits) == [str(digit) for digit in range(10)]
        assert digits["label"][:] == load_digits().target.tolist()
        assert np.array_equal(pixels(digits[7]), np.rint(load_digits().images[7] * 255 / 16))

    @pytest.mark.skipif(
        not sources.fashion_mnist_is_installed(), reason="needs the Debian package dataset-fashion-mnist"
    )
    def test_fashion_mnist_of_the_debian_package_is_readable(self):
        test = sources.load_fashion_mnist("test")  # the smaller split, for speed
        assert len(test) == 10_000 and test.features["label"].int2str(test[0]["label"]) == "Ankle boot"
        assert pixels(test[-1]).shape == (28, 28)

    def test_fashion_mnist_has_the_splits_of_its_files(self, monkeypatch, tmp_path):
        values = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
        for images, labels in sources.FASHION_MNIST_FILES.values():
            header = struct.pack(">BBBBIII", 0, 0, 8, 3, *values.shape)
            (tmp_path / images).write_bytes(gzip.compress(header + values.tobytes()))
            (tmp_path / labels).write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + bytes([9, 0, 3])))
        monkeypatch.setattr(sources, "FASHION_MNIST_FOLDER", str(tmp_path))
        splits = load("fashion_mnist")
        assert sizes(splits) == {"train": 3, "test": 3}
        train = splits["train"]
        assert train.features["label"].int2str(train["label"][:]) == ["Ankle boot", "T-shirt/top", "Dress"]
        assert np.array_equal(pixels(splits["test"][2]), values[2])

    def test_fashion_mnist_without_package_or_hub_says_how_to_get_it(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sources, "FASHION_MNIST_FOLDER", str(tmp_path))
        with pytest.raises(
            InputError, match="Install the Debian package dataset-fashion-mnist, or connect to the Hub"
        ):
            load("fashion_mnist")

    @pytest.mark.parametrize(
        "content",
        [b"\x1f\x8b", b"no gzip", gzip.compress(bytes(16 + 28)), gzip.compress(b"")[:10] + b"\xff" * 20],
        ids=["truncated", "no gzip", "too few pixels", "damaged"],
    )
    def test_a_damaged_idx_file_is_named(self, monkeypatch, tmp_path, content):
        for file in sum(sources.FASHION_MNIST_FILES.values(), ()):
            (tmp_path / file).write_bytes(content)
        monkeypatch.setattr(sources, "FASHION_MNIST_FOLDER", str(tmp_path))
        with pytest.raises(InputError, match="train-images-idx3-ubyte.gz' is not a readable idx file"):
            load("fashion_mnist")


class TestFolder:
    def test_a_flat_folder_has_no_labels(self, tmp_path):
        splits = load(write_images(tmp_path / "photos", 10), train_split="all")
        assert sizes(splits) == {"all": 10} and splits["all"].column_names == ["image"]
        assert [Path(item["path"]).name for item in splits["all"]["image"]] == [f"{i:02d}.png" for i in range(10)]

    def test_the_images_of_a_relative_folder_are_found_from_elsewhere(self, tmp_path, monkeypatch):
        write_images(tmp_path / "photos", 1)
        monkeypatch.chdir(tmp_path)
        assert load("photos")["train"][0]["image"]["path"] == str(tmp_path / "photos" / "00.png")

    def test_sub_folders_are_classes(self, tmp_path):
        write_images(tmp_path / "dog", 10)
        write_images(tmp_path / "cat" / "indoors", 5)
        (tmp_path / "cat" / "notes.txt").write_text("no image")
        write_images(tmp_path / ".hidden", 1)
        (tmp_path / "cat" / "._00.png").write_bytes(b"what macOS leaves behind")
        train = load(tmp_path)["train"]
        assert class_names(train) == ["cat", "dog"] and train["label"][:] == [0] * 5 + [1] * 10
        assert all(("dog" in item["image"]["path"]) == item["label"] for item in train)

    def test_one_sub_folder_is_not_a_class(self, tmp_path, caplog):
        write_images(tmp_path / "images", 5)
        with caplog.at_level(logging.INFO, logger="sqakd_hf.data.sources"):
            assert load(tmp_path)["train"].column_names == ["image"]
        assert "has one sub-folder of images only, so its images have no labels." in caplog.text

    def test_links_are_followed_and_suffixes_may_be_capitals(self, tmp_path):
        write_images(tmp_path / "elsewhere", 1)
        (tmp_path / "elsewhere" / "00.png").rename(tmp_path / "elsewhere" / "00.PNG")
        write_images(tmp_path / "pets" / "dog", 1)
        (tmp_path / "pets" / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        assert load(tmp_path / "pets")["train"]["label"][:] == [0, 1]

    def test_brackets_in_the_path_are_no_pattern(self, tmp_path):
        assert sizes(load(write_images(tmp_path / "a [1]*", 5))) == {"train": 5}

    def test_the_home_folder_may_be_abbreviated(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write_images(tmp_path / "photos", 2)
        assert sizes(load("~/photos")) == {"train": 2}

    @pytest.mark.parametrize("test_name", ["test", "validation", "valid", "val", "holdout"])
    def test_train_and_test_sub_folders_are_splits(self, tmp_path, test_name):
        for split, count in (("train", 3), (test_name, 2)):
            write_images(tmp_path / split / "cat", count)
            write_images(tmp_path / split / "dog", count)
        splits = load(tmp_path, test_split="holdout" if test_name == "holdout" else "test")
        assert sizes(splits) == {"train": 6, test_name: 4}
        assert class_names(splits["train"]) == class_names(splits[test_name]) == ["cat", "dog"]

    def test_splits_may_be_without_classes(self, tmp_path):
        write_images(tmp_path / "train", 3)
        write_images(tmp_path / "test" / "cat", 1)
        write_images(tmp_path / "test" / "dog", 1)
        splits = load(tmp_path)
        assert sizes(splits) == {"train": 3, "test": 2}
        assert splits["train"].column_names == ["image"] and class_names(splits["test"]) == ["cat", "dog"]

    def test_a_train_sub_folder_without_others_is_a_split(self, tmp_path):
        write_images(tmp_path / "train", 10)
        write_images(tmp_path, 1)  # a preview, say
        assert sizes(load(tmp_path, test_split=None)) == {"train": 10}

    @pytest.mark.parametrize("other", ["test", "bus"])
    def test_a_training_split_with_classes_is_a_split_whatever_is_beside_it(self, tmp_path, other):
        for folder in ("train/cat", "train/dog", f"{other}/cat", f"{other}/dog"):
            write_images(tmp_path / folder, 1)
        assert class_names(load(tmp_path)["train"]) == ["cat", "dog"]

    @pytest.mark.parametrize("train_split", ["train", "test"])
    def test_a_class_may_be_called_like_the_training_split(self, tmp_path, train_split):
        for folder in ("bus", "car", train_split):
            write_images(tmp_path / folder, 2)
        assert class_names(load(tmp_path, train_split=train_split)[train_split]) == ["bus", "car", train_split]

    @pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
    def test_a_metadata_file_names_the_images(self, tmp_path, format):
        write_images(tmp_path, 2)
        metadata = datasets.Dataset.from_dict({"file_name": ["00.png", "01.png"], "kind": ["cat", "dog"]})
        path = tmp_path / f"metadata.{format}"
        {"csv": metadata.to_csv, "jsonl": metadata.to_json, "parquet": metadata.to_parquet}[format](path)
        assert load(tmp_path)["train"]["kind"][:] == ["cat", "dog"]

    def test_a_bad_metadata_file_is_reported(self, tmp_path):
        write_images(tmp_path, 2)
        (tmp_path / "metadata.csv").write_text("kind\ncat\ndog\n")
        with pytest.raises(InputError, match="can't be read by its metadata file: .*file_name must name every image"):
            load(tmp_path)

    def test_an_empty_folder_is_reported(self, tmp_path):
        with pytest.raises(InputError, match=r"Folder '.*' holds no images; accepted are image files such as .png"):
            load(tmp_path)

    def test_images_beside_class_folders_are_reported(self, tmp_path):
        for folder in (tmp_path, tmp_path / "cat", tmp_path / "dog"):
            write_images(folder, 1)
        with pytest.raises(InputError, match="holds 1 images beside its class folders 'cat', 'dog', '00.png' for one"):
            load(tmp_path)


class TestSavedDatasets:
    def test_a_parquet_file_is_one_split(self, tmp_path):
        image_dataset(10).add_column("note", ["x"] * 10).to_parquet(tmp_path / "pets.parquet")
        splits = load(tmp_path / "pets.parquet", train_split="all")
        assert sizes(splits) == {"all": 10} and splits["all"].column_names == ["image", "note"]

    def test_a_folder_of_parquet_files_has_the_splits_of_their_names(self, tmp_path):
        (tmp_path / "data").mkdir()
        image_dataset(3).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
        image_dataset(2).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
        assert sizes(load(tmp_path)) == {"train": 3, "test": 2}

    def test_a_corrupt_parquet_file_is_reported(self, tmp_path):
        path = tmp_path / "pets.parquet"
        path.write_bytes(b"no parquet")
        with pytest.raises(InputError, match="pets.parquet' can't be read as parquet: .* Write it again") as caught:
            load(path)
        assert caught.value.__cause__ is not None

    def test_a_corrupt_parquet_file_beside_a_good_one_is_reported(self, tmp_path):
        image_dataset(2).to_parquet(tmp_path / "train-0.parquet")
        (tmp_path / "train-1.parquet").write_bytes(b"no parquet")
        with pytest.raises(InputError, match="can't be read as parquet"):
            load(tmp_path)

    def test_an_empty_parquet_file_is_reported(self, tmp_path):
        image_dataset(4).select([]).to_parquet(tmp_path / "pets.parquet")
        with pytest.raises(InputError, match="pets.parquet' can't be read as parquet"):
            load(tmp_path / "pets.parquet")

    def test_save_to_disk_is_read_back_and_the_order_is_kept(self, tmp_path):
        image_dataset(4).save_to_disk(tmp_path / "one")
        one = load(tmp_path / "one", train_split="all")["all"]
        assert [item["image"].getpixel((0, 0)) for item in one] == [0, 1, 2, 3]
        datasets.DatasetDict(train=image_dataset(4), val=image_dataset(2)).save_to_disk(tmp_path / "two")
        assert sizes(load(tmp_path / "two")) == {"train": 4, "val": 2}

    def test_a_broken_save_is_reported(self, tmp_path):
        image_dataset(4).save_to_disk(tmp_path)
        (tmp_path / "state.json").write_text("{")
        with pytest.raises(InputError, match="can't be read as a saved dataset: .* Save it again"):
            load(tmp_path)

    def test_a_save_that_lacks_a_file_is_reported(self, tmp_path):
        image_dataset(4).save_to_disk(tmp_path)
        (tmp_path / "data-00000-of-00001.arrow").unlink()
        with pytest.raises(InputError, match=r"can't be read as a saved dataset: .*data-00000-of-00001\.arrow"):
            load(tmp_path)

    def test_a_saved_dataset_without_images_is_reported(self, tmp_path):
        image_dataset(4).select([]).save_to_disk(tmp_path)
        with pytest.raises(InputError, match="can't be read as a saved dataset"):
            load(tmp_path)


class TestNames:
    @pytest.mark.parametrize("name", ["./nope", "/nope/at/all", "~/nope", "a/b/c", "a\\b", "nope/", "nope.parquet"])
    def test_a_missing_path_is_not_looked_for_on_the_hub(self, name, monkeypatch):
        monkeypatch.setattr(sources, "_load_from_hub", pytest.fail)
        with pytest.raises(InputError) as caught:
            load(name)
        assert f"{name!r} is not there; accepted are 'digits', 'fashion_mnist', an existing" in str(caught.value)
        assert "Check the path." in str(caught.value)

    def test_a_file_of_another_kind_is_refused(self, tmp_path):
        (tmp_path / "images.zip").write_bytes(b"")
        with pytest.raises(InputError, match="images.zip' is not a folder or a parquet file"):
            load(tmp_path / "images.zip")

    def test_no_name_is_not_the_current_folder(self):
        with pytest.raises(InputError, match="^'' is not a folder or a parquet file"):
            load("")

    def test_config_name_is_for_the_hub_only(self, tmp_path):
        for name in ("digits", tmp_path):
            with pytest.raises(
                InputError, match=f"config_name='small' was given with '{name}', which is not .* the Hub"
            ):
                load(name, config_name="small")


class TestHub:
    def test_an_unknown_name_says_what_is_accepted(self):
        with pytest.raises(
            InputError,
            match=r"Dataset 'cifar1O' is neither 'digits', 'fashion_mnist', a folder, a parquet file nor a dataset "
            r"that the Hub \(unreachable\) or the local cache has\. Check the spelling, or connect",
        ) as caught:
            load("cifar1O")
        assert isinstance(caught.value.__cause__, ConnectionError)

    def test_a_name_close_to_a_built_in_one_is_suggested(self):
        with pytest.raises(InputError, match="Did you mean 'digits'?"):
            load("digit")

    @pytest.mark.parametrize("reachable", [True, False])
    def test_only_a_hub_that_answers_is_asked(self, monkeypatch, reachable):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sources, "hub_is_reachable", lambda: reachable)
        asked = []

        def load_dataset(*arguments):
            asked.append((*arguments, datasets.config.HF_HUB_OFFLINE))
            raise ConnectionError

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        place = r"that the Hub has\. .*your access" if reachable else r"the Hub \(unreachable\)"
        with pytest.raises(InputError, match=place):
            load("someone/pets", config_name="small")
        assert asked == [("someone/pets", "small", not reachable)] and datasets.config.HF_HUB_OFFLINE is False

    @pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError])
    def test_a_dataset_that_can_not_be_read_is_reported(self, monkeypatch, error):
        def load_dataset(*arguments):
            raise error("No scripts.") from None

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(InputError, match=r"'someone/pets' \(config_name=None\) can't be loaded: No scripts\. Acc"):
            load("someone/pets")

    def test_the_offline_mode_of_datasets_is_kept(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
        with pytest.raises(InputError, match=r"the Hub \(unreachable\)"):
            load("someone/pets")
        assert datasets.config.HF_HUB_OFFLINE is True

    def test_a_dataset_in_the_cache_is_used_without_the_hub(self, tmp_path, own_cache):
        image_dataset(4).to_parquet(tmp_path / "pets.parquet")
        load(tmp_path / "pets.parquet")
        (prepared,) = (own_cache / "parquet").glob("*/*/*/")
        # What the Hub's someone/pets would have left behind.
        cached = own_cache / "someone___pets" / "default" / prepared.parent.name / prepared.name
        shutil.copytree(prepared, cached)
        (cached / "parquet-train.arrow").rename(cached / "pets-train.arrow")
        info = json.loads((cached / "dataset_info.json").read_text())
        info.update(dataset_name="pets", config_name="default")
        info["splits"]["train"]["dataset_name"] = "pets"
        (cached / "dataset_info.json").write_text(json.dumps(info))
        assert sizes(load("someone/pets")) == {"train": 4}
        with pytest.raises(InputError, match=r"'someone/pets' \(config_name='small'\) can't be loaded: .*default"):
            load("someone/pets", config_name="small")
