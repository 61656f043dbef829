"""Image datasets as `datasets.Dataset`s with an Image feature, and the transform that feeds them to a model."""

import gzip
import io
import logging
import os
import ssl
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import InputError, suggest


if TYPE_CHECKING:
    import datasets
    import PIL.Image

logger = logging.getLogger(__name__)

BUILT_IN_DATASETS = ("digits", "fashion_mnist")
FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # the Debian package dataset-fashion-mnist
FASHION_MNIST_ON_THE_HUB = "zalando-datasets/fashion_mnist"
FASHION_MNIST_FILES = {  # split: (images, labels)
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
VALIDATION_SPLITS = ("validation", "valid", "val")  # stand in for a missing test split, in this order
IMAGE_METADATA_FILES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # read by datasets' imagefolder


@dataclass(frozen=True)
class ImageData:
    """Training and test images with the columns `image` and, only where labels exist, `label`.

    Args:
        train (`datasets.Dataset`): Training images. `image` is a `datasets.Image(decode=False)`, so that a corrupt
            file can be named when [`ImageTransform`] decodes it; `label` is a `datasets.ClassLabel`.
        test (`datasets.Dataset`, *optional*): Test images in the same form, `label` numbered as in `train`.
        class_names (`list[str]`, *optional*): Name of each class, in the order of the labels; `None` without labels.
    """

    train: "datasets.Dataset"
    test: "datasets.Dataset | None"
    class_names: list[str] | None


def load_image_data(
    name: str,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str | None = "test",
    image_column: str | None = None,
    label_column: str | None = None,
    test_fraction: float = 0.2,
    max_train_images: int | None = None,
    max_test_images: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Load training and test images from scikit-learn, a folder, a parquet file or the Hub.

    Args:
        name (`str`): One of
            - `"digits"`: scikit-learn's 1,797 grey 8x8 digits; needs no network.
            - `"fashion_mnist"`: 60,000 + 10,000 grey 28x28 images, from the Debian package `dataset-fashion-mnist`
              when it is installed, else from the Hub.
            - a folder: images in one sub-folder per class (two classes or more), images without classes, either of
              them below `train/` and `test/` (or `validation/`, `valid/`, `val/`), parquet files, or what
              `Dataset.save_to_disk` wrote.
            - a parquet file.
            - a dataset id on the Hub.
        config_name (`str`, *optional*): Configuration of a Hub dataset.
        train_split (`str`, *optional*, defaults to `"train"`): Split to train on.
        test_split (`str`, *optional*, defaults to `"test"`): Split to test on. Where there is no `"test"`, a
            validation split stands in; where there is none either, `test_fraction` of the training images are split
            off, by class if they are labelled. `None` loads no test images.
        image_column (`str`, *optional*): Column of the images; by default the one with an Image feature.
        label_column (`str`, *optional*): Column of the labels: a ClassLabel, integers or strings. By default the one
            with a ClassLabel feature, or integers named `label` or `labels`. A split whose labels are all missing
            (`None` or negative) counts as unlabelled.
        test_fraction (`float`, *optional*, defaults to 0.2): Share of the images to split off, in (0, 1).
        max_train_images (`int`, *optional*): Keep this many training images, drawn at random by `seed`; by default
            all, in their original order.
        max_test_images (`int`, *optional*): The same for the test images.
        seed (`int`, *optional*, defaults to 0): Seed of the split and of the draw.

    Returns:
        [`ImageData`]: Training images, test images and the names of the classes.

    Raises:
        InputError: If the name is unknown or can't be reached, if there are no images, if a column or split is missing
            or ambiguous, if a class exists in the test images only, or if a number is out of range.

    Examples:
        >>> data = load_image_data("digits", max_train_images=100)
        >>> len(data.train), len(data.test), data.class_names[:3]
        (100, 359, ['0', '1', '2'])
    """
    _check_fraction("test_fraction", test_fraction)
    _check_max_images("max_train_images", max_train_images)
    _check_max_images("max_test_images", max_test_images)

    splits = _load_splits(name, config_name, train_split, test_split)
    train = _get_split(name, splits, train_split)
    test = _get_test_split(name, splits, train_split, test_split)
    train, test, class_names = _standardize(name, train, test, image_column, label_column)

    if test is None and test_split is not None:
        labels = train["label"][:] if "label" in train.column_names else None
        train_indices, test_indices = _split_indices(len(train), test_fraction, seed, labels)
        train, test = train.select(train_indices), train.select(test_indices)
    train = _take_at_most(train, max_train_images, seed, f"training images of {name!r}")
    if test is not None:
        test = _take_at_most(test, max_test_images, seed, f"test images of {name!r}")
    return ImageData(train=train, test=test, class_names=class_names)


def split_holdout(
    dataset: "datasets.Dataset", fraction: float, seed: int
) -> "tuple[datasets.Dataset, datasets.Dataset]":
    """Split off a part of the training images for choosing a model without labels.

    Args:
        dataset (`datasets.Dataset`): Training images.
        fraction (`float`): Share of the images to hold out, in (0, 1).
        seed (`int`): Seed of the random choice.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: The remaining images, and the held-out ones without their `label`
        column; both in the order of `dataset`.

    Raises:
        InputError: If `fraction` is outside (0, 1) or if it leaves one side without images.
    """
    _check_fraction("fraction", fraction)
    train_indices, holdout_indices = _split_indices(len(dataset), fraction, seed)
    holdout = dataset.select(holdout_indices)
    if "label" in holdout.column_names:
        holdout = holdout.remove_columns("label")
    return dataset.select(train_indices), holdout


# Where the images come from: each loader returns the splits by name, with whatever columns the source has.


def _load_splits(
    name: str, config_name: str | None, train_split: str, test_split: str | None
) -> "dict[str, datasets.Dataset]":
    """Return the splits of the dataset that `name` stands for."""
    if name == "fashion_mnist" and not _fashion_mnist_is_installed():
        return _load_from_hub(name, FASHION_MNIST_ON_THE_HUB, config_name)
    path = Path(name).expanduser()
    is_local = name in BUILT_IN_DATASETS or path.exists()
    if is_local and config_name is not None:
        raise InputError(
            f"config_name={config_name!r} was given with {name!r}, which is not a dataset of the Hub. Leave it out."
        )
    if name == "digits":
        return {train_split: _load_digits()}
    if name == "fashion_mnist":
        return {split: _load_fashion_mnist(split) for split in FASHION_MNIST_FILES}
    if name and path.is_dir():
        return _load_folder(name, path, train_split, test_split)
    if path.suffix == ".parquet" and path.is_file():
        return {train_split: _load_parquet(name, data_files={"train": str(path)})["train"]}
    if is_local or _looks_like_a_path(name):
        raise InputError(
            f"{name!r} is not {'a folder or a parquet file' if path.exists() else 'there'}; accepted are "
            f"{_quote(BUILT_IN_DATASETS)}, an existing folder, a .parquet file and a dataset id of the Hub. "
            f"Check the path.{suggest(name, BUILT_IN_DATASETS)}"
        )
    return _load_from_hub(name, name, config_name)


def _looks_like_a_path(name: str) -> bool:
    """Return whether `name` can't be a dataset id (`name` or `owner/name`) of the Hub."""
    is_relative = name.startswith((".", "/", "~")) or name.endswith(("/", ".parquet"))
    return is_relative or "\\" in name or name.count("/") > 1


def _load_digits() -> "datasets.Dataset":
    """Return scikit-learn's digits: 1,797 grey 8x8 images of 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), from 0..16
    return _dataset_from_arrays(pixels, digits.target, [str(name) for name in digits.target_names])


def _fashion_mnist_is_installed() -> bool:
    return all(Path(FASHION_MNIST_FOLDER, file).is_file() for files in FASHION_MNIST_FILES.values() for file in files)


def _load_fashion_mnist(split: str) -> "datasets.Dataset":
    """Return one split of Fashion-MNIST from the files of the Debian package."""
    images, labels = (_read_idx(Path(FASHION_MNIST_FOLDER, file)) for file in FASHION_MNIST_FILES[split])
    return _dataset_from_arrays(images, labels, FASHION_MNIST_CLASSES)


def _read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: two zeros, type, number of dimensions, each dimension, then the values."""
    try:
        content = gzip.decompress(path.read_bytes())
        dims = content[3]
        shape = struct.unpack_from(f">{dims}I", content, offset=4)
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, zlib.error, IndexError, ValueError, struct.error) as error:
        raise InputError(f"'{path}' is not a readable idx file ({error}). Install it again.") from error


def _dataset_from_arrays(images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> "datasets.Dataset":
    """Return a dataset of PNG files from `images` `(N, H, W)` in uint8 and `labels` `(N,)`."""
    import datasets
    import PIL.Image

    def png(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # 1: fast; 70,000 images in some seconds
        return buffer.getvalue()

    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=class_names)}
    )
    encoded = [{"bytes": png(pixels), "path": None} for pixels in images]
    return datasets.Dataset.from_dict({"image": encoded, "label": labels.tolist()}, features=features)


def _load_folder(name: str, folder: Path, train_split: str, test_split: str | None) -> "dict[str, datasets.Dataset]":
    """Return the splits of a folder of images, of parquet files or of what `save_to_disk` wrote."""
    import datasets

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, LookupError) as error:  # LookupError: an empty split, a file without its keys
            raise InputError(
                f"Folder {name!r} can't be read as a saved dataset: {_reason(error)}. Save it again."
            ) from error
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {train_split: saved}

    files = list(_walk_files(folder))
    if any(file.suffix == ".parquet" and file.name not in IMAGE_METADATA_FILES for file in files):
        return _load_parquet(name, data_dir=str(folder))
    if any(file.name in IMAGE_METADATA_FILES for file in files):
        return _load_image_folder_with_metadata(name, folder)

    split_folders = _find_split_folders(folder, train_split, test_split)
    if split_folders:
        return {path.name: _dataset_from_image_files(f"{name}/{path.name}", path) for path in split_folders}
    return {train_split: _dataset_from_image_files(name, folder)}


def _load_parquet(name: str, **source: Any) -> "dict[str, datasets.Dataset]":
    """Return the splits of parquet files; `source` is what `datasets.load_dataset("parquet", ...)` takes."""
    import datasets

    try:
        return dict(datasets.load_dataset("parquet", **source))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{name!r} can't be read as parquet: {_reason(error)}. Write it again, for example with "
            "Dataset.to_parquet."
        ) from error


def _load_image_folder_with_metadata(name: str, folder: Path) -> "dict[str, datasets.Dataset]":
    """Return the splits of a folder with metadata.csv (or .jsonl, .parquet), whose columns are kept."""
    import datasets

    try:
        return dict(datasets.load_dataset("imagefolder", data_dir=str(folder)))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"Folder {name!r} can't be read by its metadata file: {_reason(error)}. Its column file_name must name "
            "every image; without the file the sub-folders are the classes."
        ) from error


def _walk_files(folder: Path) -> Iterator[Path]:
    """Yield the files below `folder` in sorted order, links followed, hidden files and folders left out."""
    for root, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(subfolder for subfolder in subfolders if not subfolder.startswith("."))
        yield from (Path(root, file) for file in sorted(files) if not file.startswith("."))


def _find_split_folders(folder: Path, train_split: str, test_split: str | None) -> list[Path]:
    """Return the sub-folders that are splits; none if the sub-folders are classes, one of them called "train", say."""
    train = folder / train_split
    if not train.is_dir():
        return []
    others = dict.fromkeys(["test", *([test_split] if test_split else []), *VALIDATION_SPLITS])
    found = [train, *(folder / split for split in others if split != train_split and (folder / split).is_dir())]
    has_siblings = any(path.is_dir() and path != train for path in folder.iterdir())
    train_has_classes = any(path.is_dir() for path in train.iterdir())
    return found if len(found) > 1 or train_has_classes or not has_siblings else []


def _dataset_from_image_files(name: str, folder: Path) -> "datasets.Dataset":
    """Return the images below `folder`, labelled by their sub-folder if there are two of them or more."""
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    folder = folder.absolute()
    files = [file for file in _walk_files(folder) if file.suffix.lower() in ImageFolder.EXTENSIONS]
    if not files:
        raise InputError(
            f"Folder {name!r} holds no images; accepted are image files such as .png and .jpg, in one sub-folder per "
            "class or without classes, or parquet files. Check the path."
        )
    images = [{"bytes": None, "path": str(file)} for file in files]
    classes = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in files]
    class_names = sorted({class_name for class_name in classes if class_name is not None})
    if len(class_names) < 2:
        if class_names:
            logger.info("Folder %r has one sub-folder of images only, so its images have no labels.", name)
        return datasets.Dataset.from_dict(
            {"image": images}, features=datasets.Features({"image": datasets.Image(decode=False)})
        )
    if None in classes:
        raise InputError(
            f"Folder {name!r} holds {classes.count(None)} images beside its class folders {_quote(class_names)}, "
            f"'{files[classes.index(None)].name}' for one. Move them into a class folder or remove them."
        )
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=class_names)}
    )
    return datasets.Dataset.from_dict({"image": images, "label": classes}, features=features)


def _load_from_hub(name: str, repo_id: str, config_name: str | None) -> "dict[str, datasets.Dataset]":
    """Return the splits of a dataset on the Hub, or in the local cache when the Hub can't be reached."""
    import datasets

    reachable = _hub_is_reachable()
    try:
        if reachable:
            return dict(datasets.load_dataset(repo_id, config_name))
        with _offline_mode():
            return dict(datasets.load_dataset(repo_id, config_name))
    except (ConnectionError, FileNotFoundError) as error:
        place = "the Hub has" if reachable else "the Hub (unreachable) or the local cache has"
        if name == "fashion_mnist":
            raise InputError(
                f"Dataset 'fashion_mnist' is neither in {FASHION_MNIST_FOLDER} nor a dataset that {place}. Install "
                "the Debian package dataset-fashion-mnist, or connect to the Hub once to download it."
            ) from error
        raise InputError(
            f"Dataset {name!r} is neither {_quote(BUILT_IN_DATASETS)}, a folder, a parquet file nor a dataset that "
            f"{place}. Check the spelling"
            f"{' and your access to it' if reachable else ', or connect to the Hub once to download it'}."
            f"{suggest(name, BUILT_IN_DATASETS)}"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"Dataset {name!r} (config_name={config_name!r}) can't be loaded: {_reason(error)}. Accepted are datasets "
            "of the Hub in a format that `datasets.load_dataset` reads. Correct the name or config_name."
        ) from error


def _hub_is_reachable(timeout: float = 5) -> bool:
    """Return whether the Hub answers at all; `datasets` itself would retry for half a minute."""
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(datasets.config.HF_ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it answers; the Hub's client may know the certificate
    except OSError:
        return False


@contextmanager
def _offline_mode() -> Iterator[None]:
    """Let `datasets` look into its local cache only, as with `HF_HUB_OFFLINE=1`."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reason(error: BaseException) -> str:
    """Return the message of an error, or of what caused it, on one line and without a full stop."""
    message = " ".join(str(error.__cause__ or error).split()).rstrip(".")
    return message or type(error).__name__


# From what a source has to the columns `image` and `label`.


def _get_split(name: str, splits: "Mapping[str, datasets.Dataset]", split: str) -> "datasets.Dataset":
    if split not in splits:
        raise InputError(
            f"Dataset {name!r} has no split {split!r}; its splits are {_quote(sorted(splits))}. "
            f"Pass one of them.{suggest(split, splits)}"
        )
    if len(splits[split]) == 0:
        raise InputError(f"The split {split!r} of dataset {name!r} holds no images. Use another split or dataset.")
    return splits[split]


def _get_test_split(
    name: str, splits: "Mapping[str, datasets.Dataset]", train_split: str, test_split: str | None
) -> "datasets.Dataset | None":
    """Return the test split or, where "test" was asked for and is missing, a validation split or `None`."""
    if test_split is None:
        return None
    if test_split == "test" and "test" not in splits:
        stand_in = next((split for split in VALIDATION_SPLITS if split in splits and split != train_split), None)
        if stand_in is None:
            return None
        logger.info("Dataset %r has no split 'test'; testing on its split %r.", name, stand_in)
        test_split = stand_in
    return _get_split(name, splits, test_split)


def _standardize(
    name: str,
    train: "datasets.Dataset",
    test: "datasets.Dataset | None",
    image_column: str | None,
    label_column: str | None,
) -> "tuple[datasets.Dataset, datasets.Dataset | None, list[str] | None]":
    """Return both splits with the columns `image` and, where labels exist, `label`, and the class names."""
    train_image = _find_image_column(name, train, image_column)
    found = _find_label_column(name, train, label_column)
    if test is None:
        class_names, labels = _read_labels(name, train, found)
        return _keep_columns(name, train, train_image, labels, class_names), None, class_names

    test_image = _find_image_column(name, test, image_column)
    found = found or _find_label_column(name, test, label_column)
    train_names, train_labels = _read_labels(name, train, found)
    test_names, test_labels = _read_labels(name, test, found)
    unknown = sorted(set(test_labels or ()) - set(train_names or test_names or ()))
    if unknown:
        raise InputError(
            f"Dataset {name!r} has the classes {_quote(unknown)} in its test images but not in its training images, "
            f"whose classes are {_quote(train_names)}. Add training images of them or remove their test images."
        )
    class_names = train_names or test_names
    train = _keep_columns(name, train, train_image, train_labels, class_names)
    test = _keep_columns(name, test, test_image, test_labels, class_names)
    return train, test, class_names


def _find_image_column(name: str, dataset: "datasets.Dataset", requested: str | None) -> str:
    """Return the requested column, or the one with an Image feature."""
    import datasets

    if requested is not None:
        return _check_column(name, dataset, "image_column", requested)
    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1 and "image" not in found:
        raise InputError(
            f"Dataset {name!r} has {'several columns' if found else 'no column'} with an Image feature; its columns "
            f"are {_quote(dataset.column_names)}. Name the one that holds the images with image_column."
        )
    return "image" if "image" in found else found[0]


def _find_label_column(name: str, dataset: "datasets.Dataset", requested: str | None) -> str | None:
    """Return the requested column, the one with a ClassLabel feature, integers called label(s), or `None`."""
    import datasets

    if requested is not None:
        return _check_column(name, dataset, "label_column", requested)
    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    by_name = [column for column in ("label", "labels") if column in found or _holds_integers(dataset, column)]
    if len(found) > 1 and not by_name:
        raise InputError(
            f"Dataset {name!r} has several columns with a ClassLabel feature: {_quote(found)}. "
            "Name the one that holds the labels with label_column."
        )
    return (by_name or found or [None])[0]


def _check_column(name: str, dataset: "datasets.Dataset", argument: str, column: str) -> str:
    if column not in dataset.column_names:
        raise InputError(
            f"{argument} {column!r} is not a column of dataset {name!r}; its columns are "
            f"{_quote(dataset.column_names)}. Pass one of them.{suggest(column, dataset.column_names)}"
        )
    return column


def _holds_integers(dataset: "datasets.Dataset", column: str) -> bool:
    import datasets

    feature = dataset.features.get(column)
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))


def _read_labels(
    name: str, dataset: "datasets.Dataset", column: str | None
) -> tuple[list[str] | None, list[str] | None]:
    """Return the names of the classes and the class name of each image; `None` twice without labels."""
    import datasets

    if column is None or column not in dataset.column_names:
        return None, None
    feature = dataset.features[column]
    values = dataset.with_format(None)[column][:]
    if isinstance(feature, datasets.ClassLabel) or _holds_integers(dataset, column):
        missing = sum(value is None or value < 0 for value in values)
    elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        missing = values.count(None)
    else:
        raise InputError(
            f"label_column {column!r} of dataset {name!r} holds {feature}; accepted are a ClassLabel, integers and "
            "strings. Pass another column."
        )
    if missing == len(values):
        logger.info("A split of dataset %r has no labels in its column %r.", name, column)
        return None, None
    if missing:
        raise InputError(
            f"Column {column!r} of dataset {name!r} lacks the label of {missing} of {len(values)} images (None or "
            "negative). Label all images of a split or none of them."
        )
    if isinstance(feature, datasets.ClassLabel):
        return feature.names, [feature.names[value] for value in values]
    if isinstance(values[0], str):
        return sorted(set(values)), values
    return [str(value) for value in range(max(values) + 1)], [str(value) for value in values]


def _keep_columns(
    name: str,
    dataset: "datasets.Dataset",
    image_column: str,
    labels: list[str] | None,
    class_names: list[str] | None,
) -> "datasets.Dataset":
    """Return the dataset with the columns `image`, not decoded, and `label` if `labels` are given; no others."""
    import datasets
    import pyarrow

    dataset = dataset.with_format(None).select_columns(image_column)
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    try:
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"image_column {image_column!r} of dataset {name!r} can't be read as images ({_reason(error)}); accepted "
            "are an Image feature, encoded bytes and paths. Pass another column."
        ) from error
    if labels is None or class_names is None:
        return dataset
    index = {class_name: i for i, class_name in enumerate(class_names)}
    ids = np.array([index[label] for label in labels], dtype=np.int64)
    return dataset.add_column("label", ids, feature=datasets.ClassLabel(names=class_names))


def _split_indices(
    count: int, fraction: float, seed: int, labels: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `fraction` of `count` images, the same share of each class if `labels` are given.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Sorted indices of the others and of those drawn.
    """
    drawn = round(count * fraction)
    if not 0 < drawn < count:
        raise InputError(
            f"A fraction of {fraction} of {count} images leaves one side without images. "
            "Give more images or a fraction nearer to 0.5."
        )
    order = np.random.default_rng(seed).permutation(count)
    if labels is not None:
        order = order[np.argsort(np.asarray(labels)[order], kind="stable")]  # class by class, at random within a class
    every_kth = ((np.arange(drawn) + 0.5) * count / drawn).astype(np.int64)
    test = np.sort(order[every_kth])
    return np.setdiff1d(np.arange(count), test), test


def _take_at_most(dataset: "datasets.Dataset", count: int | None, seed: int, what: str) -> "datasets.Dataset":
    """Return `count` images at random, or all in their order if there are no more than that."""
    if count is None or count >= len(dataset):
        if count is not None and count > len(dataset):
            logger.info("%d %s were asked for; using all %d.", count, what, len(dataset))
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))


def _check_fraction(name: str, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise InputError(f"{name} must lie between 0 and 1, both excluded, got {fraction!r}. Try 0.2.")


def _check_max_images(name: str, count: int | None) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise InputError(f"{name} must be an integer of at least 1, got {count!r}. To use all images leave it out.")


def _quote(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


# From an encoded image to the tensor that a model takes.


def _center_crop(size: int, crop_pct: float, interpolation: Any) -> torch.nn.Module:
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(round(size / crop_pct), interpolation), v2.CenterCrop(size)])


def _random_crop(size: int, crop_pct: float, interpolation: Any) -> torch.nn.Module:
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(size, interpolation), v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")])


def _random_crop_flip(size: int, crop_pct: float, interpolation: Any) -> torch.nn.Module:
    from torchvision.transforms import v2

    return v2.Compose([_random_crop(size, crop_pct, interpolation), v2.RandomHorizontalFlip()])


def _random_resized_crop_flip(size: int, crop_pct: float, interpolation: Any) -> torch.nn.Module:
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(size, scale=(0.35, 1), ratio=(3 / 4, 4 / 3), interpolation=interpolation)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


# Each takes (size, crop_pct, interpolation) and returns a map from an image to one of `size` x `size` pixels.
# They draw from torch's global generator only, which `transformers.set_seed` seeds.
AUGMENTATIONS: dict[str, Callable[[int, float, Any], torch.nn.Module]] = {
    "none": _center_crop,
    "crop": _random_crop,
    "crop-flip": _random_crop_flip,
    "resized-crop": _random_resized_crop_flip,
}

GREY_MODES = {"1", "L", "LA", "La", "I", "F"}  # and I;16 with its byte orders
# What Pillow raises for files that it can't decode; OSError includes missing files and unknown formats.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    struct.error,
    zlib.error,
)


class ImageTransform:
    """Turn a batch of encoded images into normalised tensors, for `dataset.with_transform(transform)`.

    Images are turned upright by their EXIF orientation and converted to RGB or to grey, whichever the model takes
    (warned of once); 16 bits become 8, and transparent parts are composed over white. The result is
    `(pixels / 255 - mean) / std`.

    Args:
        size (`int`): Height and width of the result, in pixels.
        mean (`Sequence[float]`): Mean of each channel in units of [0, 1]; three for RGB, one for grey.
        std (`Sequence[float]`): Standard deviation of each channel in the same units.
        crop_pct (`float`, *optional*, defaults to 1.0): Side of the centre crop over the shorter side of the image.
        interpolation (`str`, *optional*, defaults to `"bicubic"`): A `torchvision.transforms.InterpolationMode`.
        augment (`str`, *optional*, defaults to `"none"`):
            - `"none"`: shorter side to `round(size / crop_pct)`, centre crop.
            - `"crop"`: shorter side to `size`, pad by `size // 8` (mirrored), random crop.
            - `"crop-flip"`: the same, and a horizontal flip with probability 0.5.
            - `"resized-crop"`: random crop of 0.35 to 1 of the area, resized, and the flip.

    Raises:
        InputError: If an argument is not accepted, or on use if an image can't be read.

    Examples:
        >>> data = load_image_data("digits")
        >>> transform = ImageTransform(16, mean=[0.5], std=[0.5])
        >>> item = data.train.with_transform(transform)[0]
        >>> item["pixel_values"].shape, item["labels"]
        (torch.Size([1, 16, 16]), 0)
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        augment: str = "none",
    ) -> None:
        from torchvision.transforms import InterpolationMode

        _check_transform(size, mean, std, crop_pct, interpolation, augment)
        self.size = size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.crop_pct = crop_pct
        self.interpolation = interpolation
        self.augment = augment
        self._mode = "RGB" if len(self.mean) == 3 else "L"
        self._warned_of_channels = False
        self._reshape = AUGMENTATIONS[augment](size, crop_pct, InterpolationMode(interpolation))

    def __repr__(self) -> str:
        return (
            f"ImageTransform({self.size}, mean={self.mean}, std={self.std}, crop_pct={self.crop_pct}, "
            f"interpolation={self.interpolation!r}, augment={self.augment!r})"
        )

    def without_augmentation(self) -> "ImageTransform":
        """Return a copy with `augment="none"`, for evaluation."""
        return ImageTransform(self.size, self.mean, self.std, crop_pct=self.crop_pct, interpolation=self.interpolation)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode and normalise a batch.

        Args:
            batch (`Mapping[str, list]`): Columns; `image` holds `{"bytes": ..., "path": ...}` or Pillow images.

        Returns:
            `dict[str, list]`: `pixel_values`, float32 tensors of shape `(C, size, size)`, and, only if `batch` has the
            column `label`, `labels`, integers.

        Raises:
            InputError: If there is no column `image`, or if an image is missing or corrupt; the message names it.
        """
        if "image" not in batch:
            raise InputError(
                f"ImageTransform needs the column 'image', got {_quote(sorted(batch))}. Keep that column; with a "
                "Trainer set remove_unused_columns=False."
            )
        images = [self._decode(value, number) for number, value in enumerate(batch["image"], start=1)]
        pixels = torch.from_numpy(np.stack([np.asarray(self._reshape(image)) for image in images]))
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)  # (B, C, size, size)
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        normalized = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)
        result: dict[str, list[Any]] = {"pixel_values": list(normalized)}
        if "label" in batch:
            result["labels"] = [int(label) for label in batch["label"]]
        return result

    def _decode(self, value: Any, number: int) -> "PIL.Image.Image":
        """Return the image in the mode of the model, upright; `number` is its place in the batch, from 1."""
        import datasets
        import PIL.Image

        try:
            if value is None:
                raise ValueError("it is missing")
            image = value if isinstance(value, PIL.Image.Image) else datasets.Image().decode_example(value)
            self._warn_of_channels(image)
            return _convert_mode(image, self._mode)
        except (*DECODING_ERRORS, PIL.Image.DecompressionBombError) as error:
            path = value.get("path") if isinstance(value, Mapping) else None
            what = f"Image '{path}'" if path else f"Image number {number} of the batch"
            raise InputError(
                f"{what} can't be read ({_reason(error)}); accepted are image files that Pillow opens. "
                "Remove or replace it."
            ) from error

    def _warn_of_channels(self, image: "PIL.Image.Image") -> None:
        """Warn, the first time only, that images have other channels than the model."""
        is_grey = image.mode in GREY_MODES or image.mode.startswith("I;16")
        if self._warned_of_channels or is_grey == (self._mode == "L"):
            return
        self._warned_of_channels = True
        if is_grey:
            logger.warning(
                "Grey images are converted to RGB for a model with 3 input channels. A model with 1 input channel "
                "would compute less. (Said once.)"
            )
        else:
            logger.warning(
                "Colour images are converted to grey for a model with 1 input channel. To keep the colours use a "
                "model with 3. (Said once.)"
            )


def _convert_mode(image: "PIL.Image.Image", mode: str) -> "PIL.Image.Image":
    """Convert an image to `"RGB"` or `"L"`: 16 bits scaled to 8, transparent parts composed over white."""
    import PIL.Image

    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
        pixels = np.asarray(image).clip(0, 65535)
        image = PIL.Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _check_transform(
    size: int, mean: Sequence[float], std: Sequence[float], crop_pct: float, interpolation: str, augment: str
) -> None:
    """Raise `InputError` for the first argument of [`ImageTransform`] that is not accepted."""
    from torchvision.transforms import InterpolationMode

    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(
            f"size must be an integer of at least 1, got {size!r}. Give the side of the images in pixels."
        )
    if len(mean) not in (1, 3) or len(std) != len(mean):
        raise InputError(
            f"mean and std must have three values each (RGB) or one each (grey), got {len(mean)} and {len(std)}. "
            "Give those of the model."
        )
    if min(std) <= 0:
        raise InputError(f"std must be greater than 0 in every channel, got {list(std)}. Give those of the model.")
    if not 0 < crop_pct <= 1:
        raise InputError(f"crop_pct must be greater than 0 and at most 1, got {crop_pct!r}. Use 1 for no centre crop.")
    modes = [mode.value for mode in InterpolationMode]
    if interpolation not in modes:
        raise InputError(
            f"Unknown interpolation {interpolation!r}; accepted are {_quote(sorted(modes))}."
            f"{suggest(interpolation, modes) or ' Use one of them.'}"
        )
    if augment not in AUGMENTATIONS:
        raise InputError(
            f"Unknown augment {augment!r}; accepted are {_quote(AUGMENTATIONS)}."
            f"{suggest(augment, AUGMENTATIONS) or ' Use one of them.'}"
        )
