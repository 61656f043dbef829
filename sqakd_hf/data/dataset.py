"""Training, validation and test images with standard columns, as `datasets.Dataset`s."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .._text import quote, reason, suggest
from .._validation import check_integer
from ..errors import InputError
from .labels import add_labels, holds_integers, is_number, read_labels, renumber
from .sources import VALIDATION_SPLITS, load_splits
from .splits import check_fraction, split_indices


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
    """Training, validation and test images with the columns `image` and, only where labels exist, `label`.

    Each split is labelled or not by itself, see [`is_labelled`].

    Args:
        train (`datasets.Dataset`): Training images. `image` is a `datasets.Image(decode=False)`, so that a corrupt
            file can be named when [`ImageTransform`] decodes it; `label` is a `datasets.ClassLabel`.
        test (`datasets.Dataset`, *optional*): Test images in the same form, `label` numbered as in `train`.
        class_names (`list[str]`, *optional*): Name of each class, in the order of the labels; `None` where no split
            has labels.
        validation (`datasets.Dataset`, *optional*): Images to choose a model by, in the same form.
    """

    train: "datasets.Dataset"
    test: "datasets.Dataset | None"
    class_names: list[str] | None
    validation: "datasets.Dataset | None" = None

    def numbered_like(self, class_names: Sequence[str]) -> "ImageData":
        """Return the same images with their labels numbered as a model numbers its classes.

        Classes that the model has by name get the model's numbers. Where the names are others and as many, the order
        decides, as for folders called by the codes of the classes; that is said.

        Args:
            class_names (`Sequence[str]`): The model's classes in their order.

        Raises:
            InputError: Classes that the model does not have.
        """
        own, others = self.class_names, list(class_names)
        if own is None or own == others:
            return self
        if set(own) <= set(others) and len(set(others)) == len(others):
            return replace(
                self,
                class_names=others,
                **{name: renumber(getattr(self, name), others) for name in ("train", "test", "validation")},
            )
        if len(own) != len(others):
            raise InputError(
                f"The model has {len(others)} classes but the images have {len(own)}, {quote(own[:5])} among them. "
                "Use a model trained on these classes."
            )
        if not (all(map(is_number, own)) or all(map(is_number, others))):
            logger.warning(
                "The classes of the images, %s, are called otherwise than the model's, %s. Their order decides: the "
                "accuracy is wrong where they are others.",
                *(f"{quote(names[:3])}{', ...' if len(names) > 3 else ''}" for names in (own, others)),
            )
        return self


def load_image_data(
    name: str,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str | None = "test",
    validation_dataset: str | None = None,
    test_dataset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    test_fraction: float = 0.2,
    max_train_images: int | None = None,
    max_test_images: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Load training, validation and test images from scikit-learn, a folder, a parquet file or the Hub.

    Args:
        name (`str`): One of
            - `"digits"`: scikit-learn's 1,797 grey 8x8 digits; needs no network.
            - `"fashion_mnist"`: 60,000 + 10,000 grey 28x28 images, from the Debian package `dataset-fashion-mnist`
              when it is installed, else from the Hub.
            - a folder: images in one sub-folder per class (two classes or more), images without classes, either of
              them below `train/`, `test/` and `validation/` (or `valid/`, `val/`), parquet files, or what
              `Dataset.save_to_disk` wrote.
            - a parquet file.
            - a dataset id on the Hub.
        config_name (`str`, *optional*): Configuration of a Hub dataset.
        train_split (`str`, *optional*, defaults to `"train"`): Split to train on.
        test_split (`str`, *optional*, defaults to `"test"`): Split to test on. Where there is no `"test"`, a
            validation split stands in, and is none any more; where there is none either, `test_fraction` of the
            training images are split off, by class if they are labelled. Files of a folder that share their name up
            to the last `_`, as crops of a picture and frames of a film do, then stay on one side. `None` loads no
            test images.
        validation_dataset (`str`, *optional*): A name as above, whose images are the validation images: its
            validation split, or its only split. By default they are those of a validation split beside the test
            split, if there is one.
        test_dataset (`str`, *optional*): The same for the test images; nothing is split off then.
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
        [`ImageData`]: Training, test and validation images and the names of the classes.

    Raises:
        InputError: If the name is unknown or can't be reached, if there are no images, if a column or split is missing
            or ambiguous, if a class exists in the test or validation images only, or if a number is out of range.

    Examples:
        >>> data = load_image_data("digits", max_train_images=100)
        >>> len(data.train), len(data.test), data.class_names[:3]
        (100, 359, ['0', '1', '2'])
    """
    check_fraction("test_fraction", test_fraction)
    _check_max_images("max_train_images", max_train_images)
    _check_max_images("max_test_images", max_test_images)

    source = load_splits(name, config_name, train_split, test_split)
    train = _get_split(name, source, train_split)
    test_name = None if test_dataset is not None else _find_test_split(name, source, train_split, test_split)
    validation_name = _first_of(VALIDATION_SPLITS, set(source) - {train_split, test_name})
    splits = {
        "training": (name, train),
        "test": _load_or_get(test_dataset, ("test",), name, source, test_name),
        "validation": _load_or_get(validation_dataset, VALIDATION_SPLITS, name, source, validation_name),
    }
    standard, class_names = _standardize(
        {what: split for what, split in splits.items() if split is not None}, image_column, label_column
    )

    train, test, validation = (standard.get(what) for what in splits)
    if test is None and test_split is not None:
        train_indices, test_indices = split_indices(train, test_fraction, seed, by_class=True)
        train, test = train.select(train_indices), train.select(test_indices)
    train = _take_at_most(train, max_train_images, seed, f"training images of {name!r}")
    if test is not None:
        test = _take_at_most(test, max_test_images, seed, f"test images of {(test_dataset or name)!r}")
    return ImageData(train=train, test=test, class_names=class_names, validation=validation)


def _get_split(name: str, splits: "Mapping[str, datasets.Dataset]", split: str) -> "datasets.Dataset":
    if split not in splits:
        raise InputError(
            f"Dataset {name!r} has no split {split!r}; its splits are {quote(sorted(splits))}. "
            f"Pass one of them.{suggest(split, splits)}"
        )
    if len(splits[split]) == 0:
        raise InputError(f"The split {split!r} of dataset {name!r} holds no images. Use another split or dataset.")
    return splits[split].with_format(None)  # a saved dataset keeps the format that it was given


def _find_test_split(
    name: str, splits: "Mapping[str, datasets.Dataset]", train_split: str, test_split: str | None
) -> str | None:
    """Return the name of the test split or, where "test" was asked for and is missing, of a validation split."""
    if test_split != "test" or "test" in splits:
        return test_split
    stand_in = _first_of(VALIDATION_SPLITS, set(splits) - {train_split})
    if stand_in is not None:
        logger.info("Dataset %r has no split 'test'; testing on its split %r.", name, stand_in)
    return stand_in


def _first_of(names: Iterable[str], splits: Iterable[str]) -> str | None:
    return next((name for name in names if name in splits), None)


def _load_or_get(
    dataset: str | None,
    names: Sequence[str],
    name: str,
    source: "Mapping[str, datasets.Dataset]",
    split: str | None,
) -> "tuple[str, datasets.Dataset] | None":
    """Return the images of a dataset of their own, in its split of these names or its only one, or of the source's."""
    if dataset is not None:
        name, source = dataset, load_splits(dataset, None, "train", names[0])
        split = _first_of(names, source) or (next(iter(source)) if len(source) == 1 else None)
        if split is None:
            raise InputError(
                f"Dataset {name!r} has the splits {quote(sorted(source))}, and none is called {quote(names)}. Pass a "
                "folder or a file that holds these images alone."
            )
    return None if split is None else (name, _get_split(name, source, split))


def _standardize(
    splits: "Mapping[str, tuple[str, datasets.Dataset]]", image_column: str | None, label_column: str | None
) -> "tuple[dict[str, datasets.Dataset], list[str] | None]":
    """Return splits with the columns `image` and, where labels exist, `label`, and the names of the classes.

    Classes are those of the first split that has labels.
    """
    source = splits["training"][0]
    images, labels, class_names, first, column = {}, {}, None, None, None
    for what, (name, split) in splits.items():
        # Another dataset has the columns of the training images', or those that are found as if nobody had named any.
        is_own = name == source
        images[what] = _select_images(
            name, split, image_column if is_own or image_column in split.column_names else None
        )
        if column is not None and (is_own or column in split.column_names):
            own = column
        else:
            own = _find_label_column(name, split, label_column if is_own else None)
        column = column or own
        names, labels[what] = read_labels(name, split, own)
        if class_names is None:
            class_names, first = names, what
        unknown = sorted(set(labels[what] or ()) - set(class_names or ()))
        if unknown:
            raise InputError(
                f"Dataset {name!r} has the classes {quote(unknown)} in its {what} images but not in its {first} "
                f"images, whose classes are {quote(class_names)}. Add {first} images of them or remove their {what} "
                "images."
            )
    return {what: add_labels(images[what], labels[what], class_names) for what in splits}, class_names


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
    by_name = [column for column in ("label", "labels") if holds_integers(dataset, column)]
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


def _take_at_most(dataset: "datasets.Dataset", count: int | None, seed: int, what: str) -> "datasets.Dataset":
    """Return `count` images at random, or all in their order if there are no more than that."""
    if count is None or count >= len(dataset):
        if count is not None and count > len(dataset):
            logger.info("%d %s were asked for; using all %d.", count, what, len(dataset))
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))


def _check_max_images(name: str, count: int | None) -> None:
    if count is not None:
        check_integer(count, name, hint="To use all images leave it out.")
