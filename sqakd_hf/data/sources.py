"""Where images come from: scikit-learn, Fashion-MNIST, a folder, parquet files or the Hub."""

import gzip
import io
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._text import quote, reason, suggest
from ..errors import InputError
from .hub_access import hub_is_reachable


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

BUILT_IN_DATASETS = ("digits", "fashion_mnist")
FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # the Debian package dataset-fashion-mnist
FASHION_MNIST_ON_THE_HUB = "zalando-datasets/fashion_mnist"
FASHION_MNIST_FILES = {  # split: (images, labels)
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
FASHION_MNIST_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_MNIST_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
VALIDATION_SPLITS = ("validation", "valid", "val")  # stand in for a missing test split, in this order
IMAGE_METADATA_FILES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # read by datasets' imagefolder


def load_splits(
    name: str, config_name: str | None, train_split: str, test_split: str | None
) -> "dict[str, datasets.Dataset]":
    """Return the splits of the dataset that `name` stands for, with whatever columns the source has.

    Args:
        name (`str`): A built-in dataset, a folder, a parquet file or a dataset id on the Hub.
        config_name (`str`, *optional*): Configuration of a Hub dataset.
        train_split (`str`): Name to give to the one split of a source without splits.
        test_split (`str`, *optional*): A sub-folder of this name is a split, beside those with the usual names.

    Raises:
        InputError: If the name is unknown, or if what it stands for can't be reached or read.

    Examples:
        >>> load_splits("digits", None, "train", "test")["train"].column_names
        ['image', 'label']
    """
    if name == "fashion_mnist" and not fashion_mnist_is_installed():
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
        return {split: load_fashion_mnist(split) for split in FASHION_MNIST_FILES}
    if name and path.is_dir():
        return _load_folder(name, path, train_split, test_split)
    if path.suffix == ".parquet" and path.is_file():
        return {train_split: _load_parquet(name, data_files={"train": str(path)})["train"]}
    if is_local or _looks_like_a_path(name):
        raise InputError(
            f"{name!r} is not {'a folder or a parquet file' if path.exists() else 'there'}; accepted are "
            f"{quote(BUILT_IN_DATASETS)}, an existing folder, a .parquet file and a dataset id of the Hub. "
            f"Check the path.{suggest(name, BUILT_IN_DATASETS)}"
        )
    return _load_from_hub(name, name, config_name)


def _looks_like_a_path(name: str) -> bool:
    """Return whether `name` can't be a dataset id (`name` or `owner/name`) of the Hub."""
    is_path = name.startswith((".", "/", "~")) or name.endswith(("/", ".parquet"))
    return is_path or "\\" in name or name.count("/") > 1


def _load_digits() -> "datasets.Dataset":
    """Return scikit-learn's digits: 1,797 grey 8x8 images of 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), from 0..16
    return _dataset_from_arrays(pixels, digits.target, [str(name) for name in digits.target_names])


def fashion_mnist_is_installed() -> bool:
    return all(Path(FASHION_MNIST_FOLDER, file).is_file() for files in FASHION_MNIST_FILES.values() for file in files)


def load_fashion_mnist(split: str) -> "datasets.Dataset":
    """Return one split of Fashion-MNIST from the files of the Debian package."""
    images, labels = FASHION_MNIST_FILES[split]
    return _dataset_from_arrays(_read_idx(images, (-1, 28, 28)), _read_idx(labels, (-1,)), FASHION_MNIST_CLASSES)


def _read_idx(file: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read a gzipped idx file of bytes, which come after a header of 4 bytes and 4 more for each dimension."""
    path = Path(FASHION_MNIST_FOLDER, file)
    try:
        content = gzip.decompress(path.read_bytes())
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"'{path}' is not a readable idx file ({error}). Install it again.") from error


def _dataset_from_arrays(images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> "datasets.Dataset":
    """Return a dataset of PNG files from `images` `(N, H, W)` in uint8 and `labels` `(N,)`."""
    import PIL.Image

    def png(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # 1: fast; 70,000 images in some seconds
        return buffer.getvalue()

    return _make_dataset([{"bytes": png(pixels), "path": None} for pixels in images], labels.tolist(), class_names)


def _make_dataset(
    images: list[dict[str, Any]], labels: list[int] | list[str] | None = None, class_names: list[str] | None = None
) -> "datasets.Dataset":
    """Return a dataset of encoded images, `{"bytes": ..., "path": ...}`, and of their labels if they are given."""
    import datasets

    columns, features = {"image": images}, {"image": datasets.Image(decode=False)}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=class_names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _load_folder(name: str, folder: Path, train_split: str, test_split: str | None) -> "dict[str, datasets.Dataset]":
    """Return the splits of a folder of images, of parquet files or of what `save_to_disk` wrote."""
    import datasets

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        with _explained(f"Folder {name!r} can't be read as a saved dataset", "Save it again."):
            saved = datasets.load_from_disk(str(folder))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {train_split: saved}

    files = {file.name for file in _walk_files(folder)}
    if any(file.endswith(".parquet") for file in files - IMAGE_METADATA_FILES):
        return _load_parquet(name, data_dir=str(folder))
    if files & IMAGE_METADATA_FILES:
        advice = "Its column file_name must name every image; without the file the sub-folders are the classes."
        with _explained(f"Folder {name!r} can't be read by its metadata file", advice):
            return dict(datasets.load_dataset("imagefolder", data_dir=str(folder)))

    split_folders = _find_split_folders(folder, train_split, test_split)
    if split_folders:
        return {path.name: _dataset_from_image_files(f"{name}/{path.name}", path) for path in split_folders}
    return {train_split: _dataset_from_image_files(name, folder)}


def _load_parquet(name: str, **source: Any) -> "dict[str, datasets.Dataset]":
    """Return the splits of parquet files; `source` is what `datasets.load_dataset("parquet", ...)` takes."""
    import datasets

    advice = "Write it again, for example with Dataset.to_parquet."
    with _explained(f"{name!r} can't be read as parquet", advice):
        return dict(datasets.load_dataset("parquet", **source))


@contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
    """Turn what `datasets` raises for files that it can't read into `InputError`."""
    import datasets

    try:
        yield
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        # LookupError: a saved split without images, or a file without its keys.
        raise InputError(f"{what}: {reason(error)}. {advice}") from error


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
    others = {"test", test_split or "test", *VALIDATION_SPLITS} - {train_split}
    found = [train, *(folder / split for split in sorted(others) if (folder / split).is_dir())]
    has_siblings = any(path.is_dir() and path != train for path in folder.iterdir())
    train_has_classes = any(path.is_dir() for path in train.iterdir())
    return found if len(found) > 1 or train_has_classes or not has_siblings else []


def _dataset_from_image_files(name: str, folder: Path) -> "datasets.Dataset":
    """Return the images below `folder`, labelled by their sub-folder if there are two of them or more."""
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
    class_names = sorted(set(classes) - {None})
    if len(class_names) < 2:
        if class_names:
            logger.info("Folder %r has one sub-folder of images only, so its images have no labels.", name)
        return _make_dataset(images)
    if None in classes:
        raise InputError(
            f"Folder {name!r} holds {classes.count(None)} images beside its class folders {quote(class_names)}, "
            f"'{files[classes.index(None)].name}' for one. Move them into a class folder or remove them."
        )
    return _make_dataset(images, classes, class_names)


def _load_from_hub(name: str, repo_id: str, config_name: str | None) -> "dict[str, datasets.Dataset]":
    """Return the splits of a dataset on the Hub, or in the local cache when the Hub can't be reached."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    reachable = not offline and hub_is_reachable()
    try:
        datasets.config.HF_HUB_OFFLINE = not reachable  # else `datasets` would retry for half a minute
        return dict(datasets.load_dataset(repo_id, config_name))
    except (ConnectionError, FileNotFoundError) as error:
        place = "the Hub has" if reachable else "the Hub (unreachable) or the local cache has"
        if name == "fashion_mnist":
            raise InputError(
                f"Dataset 'fashion_mnist' is neither in {FASHION_MNIST_FOLDER} nor a dataset that {place}. Install "
                "the Debian package dataset-fashion-mnist, or connect to the Hub once to download it."
            ) from error
        raise InputError(
            f"Dataset {name!r} is neither {quote(BUILT_IN_DATASETS)}, a folder, a parquet file nor a dataset that "
            f"{place}. Check the spelling"
            f"{' and your access to it' if reachable else ', or connect to the Hub once to download it'}."
            f"{suggest(name, BUILT_IN_DATASETS)}"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"Dataset {name!r} (config_name={config_name!r}) can't be loaded: {reason(error)}. Accepted are datasets "
            "of the Hub in a format that `datasets.load_dataset` reads. Correct the name or config_name."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
