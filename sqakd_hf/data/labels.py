"""The labels of images: whether there are any, what they are, and how they are numbered."""

import logging
import re
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def is_labelled(dataset: "datasets.Dataset") -> bool:
    """Tell whether a split of [`ImageData`] has labels."""
    return "label" in dataset.column_names


def holds_integers(dataset: "datasets.Dataset", column: str) -> bool:
    import datasets

    feature = dataset.features.get(column)
    return isinstance(feature, (datasets.Value, datasets.ClassLabel)) and feature.dtype.startswith(("int", "uint"))


def read_labels(
    name: str, dataset: "datasets.Dataset", column: str | None
) -> tuple[list[str] | None, list[str] | None]:
    """Return the names of the classes and the class name of each image; `None` twice without labels."""
    import datasets

    if column is None or column not in dataset.column_names:
        return None, None
    feature = dataset.features[column]
    values = dataset[column][:]
    if holds_integers(dataset, column):
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


def add_labels(
    images: "datasets.Dataset", labels: list[str] | None, class_names: list[str] | None
) -> "datasets.Dataset":
    """Return the images with the column `label` if `labels`, the class name of each, are given."""
    import datasets

    if labels is None:
        return images
    index = {class_name: i for i, class_name in enumerate(class_names)}
    ids = np.array([index[label] for label in labels], dtype=np.int64)
    return images.add_column("label", ids, feature=datasets.ClassLabel(names=class_names))


def renumber(dataset: "datasets.Dataset | None", class_names: list[str]) -> "datasets.Dataset | None":
    if dataset is None or not is_labelled(dataset):
        return dataset
    labels = dataset.features["label"].int2str(dataset["label"][:])
    return add_labels(dataset.remove_columns("label"), labels, class_names)


def is_number(class_name: str) -> bool:
    """Tell whether a class has no name, or transformers' own for those without."""
    return re.fullmatch(r"(LABEL_)?\d+", class_name) is not None
