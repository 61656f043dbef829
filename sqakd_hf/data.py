"""Training and test images with standard columns, as `datasets.Dataset`s."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError, quote, reason, suggest
from .sources import VALIDATION_SPLITS, load_splits


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


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

    splits = load_splits(name, config_name, train_split, test_split)
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
    dataset: "datasets.Dataset", fraction: float, seed: int, keep_labels: bool = False
) -> "tuple[datasets.Dataset, datasets.Dataset]":
    """Split off a part of the training images for choosing a model.

    Args:
        dataset (`datasets.Dataset`): Training images.
        fraction (`float`): Share of the images to hold out, in (0, 1).
        seed (`int`): Seed of the random choice.
        keep_labels (`bool`, *optional*, defaults to `False`): Leave the held-out images their `label` column.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: The remaining images, and the held-out ones; both in the order of
        `dataset`.

    Raises:
        InputError: If `fraction` is outside (0, 1) or if it leaves one side without images.
    """
    _check_fraction("fraction", fraction)
    train_indices, holdout_indices = _split_indices(len(dataset), fraction, seed)
    holdout = dataset.select(holdout_indices)
    if "label" in holdout.column_names and not keep_labels:
        holdout = holdout.remove_columns("label")
    return dataset.select(train_indices), holdout


def _get_split(name: str, splits: "Mapping[str, datasets.Dataset]", split: str) -> "datasets.Dataset":
    if split not in splits:
        raise InputError(
            f"Dataset {name!r} has no split {split!r}; its splits are {quote(sorted(splits))}. "
            f"Pass one of them.{suggest(split, splits)}"
        )
    if len(splits[split]) == 0:
        raise InputError(f"The split {split!r} of dataset {name!r} holds no images. Use another split or dataset.")
    return splits[split].with_format(None)  # a saved dataset keeps the format that it was given


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
    train_images = _select_images(name, train, image_column)
    column = _find_label_column(name, train, label_column)
    if test is None:
        class_names, labels = _read_labels(name, train, column)
        return _add_labels(train_images, labels, class_names), None, class_names

    test_images = _select_images(name, test, image_column)
    column = column or _find_label_column(name, test, label_column)
    train_names, train_labels = _read_labels(name, train, column)
    test_names, test_labels = _read_labels(name, test, column)
    class_names = train_names or test_names
    unknown = sorted(set(test_labels or ()) - set(class_names or ()))
    if unknown:
        raise InputError(
            f"Dataset {name!r} has the classes {quote(unknown)} in its test images but not in its training images, "
            f"whose classes are {quote(class_names)}. Add training images of them or remove their test images."
        )
    return (
        _add_labels(train_images, train_labels, class_names),
        _add_labels(test_images, test_labels, class_names),
        class_names,
    )


def _select_images(name: str, dataset: "datasets.Dataset", requested: str | None) -> "datasets.Dataset":
    """Return the requested column, or the one with an Image feature, as the only column `image`, not decoded."""
    import datasets
    import pyarrow

    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if requested is not None:
        column = _check_column(name, dataset, "image_column", requested)
    elif len(found) == 1 or "image" in found:
        column = "image" if "image" in found else found[0]
    else:
        raise InputError(
            f"Dataset {name!r} has {'several columns' if found else 'no column'} with an Image feature; its columns "
            f"are {quote(dataset.column_names)}. Name the one that holds the images with image_column."
        )
    images = dataset.select_columns(column).rename_columns({column: "image"})
    try:
        return images.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"image_column {column!r} of dataset {name!r} can't be read as images ({reason(error)}); accepted "
            "are an Image feature, encoded bytes and paths. Pass another column."
        ) from error


def _find_label_column(name: str, dataset: "datasets.Dataset", requested: str | None) -> str | None:
    """Return the requested column, the one with a ClassLabel feature, integers called label(s), or `None`."""
    import datasets

    if requested is not None:
        return _check_column(name, dataset, "label_column", requested)
    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    by_name = [column for column in ("label", "labels") if _holds_integers(dataset, column)]
    if len(found) > 1 and not by_name:
        raise InputError(
            f"Dataset {name!r} has several columns with a ClassLabel feature: {quote(found)}. "
            "Name the one that holds the labels with label_column."
        )
    return (by_name or found or [None])[0]


def _check_column(name: str, dataset: "datasets.Dataset", argument: str, column: str) -> str:
    if column not in dataset.column_names:
        raise InputError(
            f"{argument} {column!r} is not a column of dataset {name!r}; its columns are "
            f"{quote(dataset.column_names)}. Pass one of them.{suggest(column, dataset.column_names)}"
        )
    return column


def _holds_integers(dataset: "datasets.Dataset", column: str) -> bool:
    import datasets

    feature = dataset.features.get(column)
    return isinstance(feature, (datasets.Value, datasets.ClassLabel)) and feature.dtype.startswith(("int", "uint"))


def _read_labels(
    name: str, dataset: "datasets.Dataset", column: str | None
) -> tuple[list[str] | None, list[str] | None]:
    """Return the names of the classes and the class name of each image; `None` twice without labels."""
    import datasets

    if column is None or column not in dataset.column_names:
        return None, None
    feature = dataset.features[column]
    values = dataset[column][:]
    if _holds_integers(dataset, column):
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


def _add_labels(
    images: "datasets.Dataset", labels: list[str] | None, class_names: list[str] | None
) -> "datasets.Dataset":
    """Return the images with the column `label` if `labels`, the class name of each, are given."""
    import datasets

    if labels is None:
        return images
    index = {class_name: i for i, class_name in enumerate(class_names)}
    ids = np.array([index[label] for label in labels], dtype=np.int64)
    return images.add_column("label", ids, feature=datasets.ClassLabel(names=class_names))


def _split_indices(
    count: int, fraction: float, seed: int, labels: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `fraction` of the indices, the same share of each class by `labels`; return the others and those drawn."""
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
