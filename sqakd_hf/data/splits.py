"""Images set aside: drawn by class where there are classes, and never apart from those of the same name."""

import logging
from collections import Counter
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .labels import is_labelled


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def split_holdout(
    dataset: "datasets.Dataset", fraction: float, seed: int, keep_labels: bool = False
) -> "tuple[datasets.Dataset, datasets.Dataset]":
    """Split off a part of the training images for choosing a model.

    Args:
        dataset (`datasets.Dataset`): Training images.
        fraction (`float`): Share of the images to hold out, in (0, 1).
        seed (`int`): Seed of the random choice.
        keep_labels (`bool`, *optional*, defaults to `False`): Leave the held-out images their `label` column.

    Files of a folder that share their name up to the last `_` stay on one side, as in [`load_image_data`].

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: The remaining images, and the held-out ones; both in the order of
        `dataset`.

    Raises:
        InputError: If `fraction` is outside (0, 1) or if it leaves one side without images.
    """
    check_fraction("fraction", fraction)
    train_indices, holdout_indices = split_indices(dataset, fraction, seed)
    holdout = dataset.select(holdout_indices)
    if is_labelled(holdout) and not keep_labels:
        holdout = holdout.remove_columns("label")
    return dataset.select(train_indices), holdout


def split_indices(
    dataset: "datasets.Dataset", fraction: float, seed: int, by_class: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `fraction` of the indices, the same share of each class if told to; return the others and those drawn."""
    count = len(dataset)
    asked = round(count * fraction)
    if not 0 < asked < count:
        raise InputError(
            f"A fraction of {fraction} of {count} images leaves one side without images. "
            "Give more images or a fraction nearer to 0.5."
        )
    labels = np.asarray(dataset["label"][:]) if by_class and is_labelled(dataset) else np.zeros(count, np.int64)
    groups, singles = _name_groups(dataset), np.arange(count)
    drawn = _draw_groups(groups, labels, asked, seed)
    if len(np.unique(groups)) < count:
        uneven = abs(len(drawn) - asked) > min(asked, count - asked) / 2
        if uneven or set(labels) - set(np.delete(labels, drawn)):
            logger.warning(
                "Files that share their name up to the last '_' can't be kept together: there are too few such names. "
                "Images are drawn one by one, so that crops or frames of one picture may be on both sides; give "
                "validation and test images of your own if there are any."
            )
            drawn = _draw_groups(singles, labels, asked, seed)
        else:
            logger.info(
                "Files that share their name up to the last '_' stay on one side: %d of %d images drawn.",
                len(drawn),
                count,
            )
    return np.setdiff1d(singles, drawn), drawn


def _draw_groups(groups: np.ndarray, labels: np.ndarray, asked: int, seed: int) -> np.ndarray:
    """Draw whole groups with about `asked` images in all, class by class by the label of each group's first image."""
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(labels[first][order], kind="stable")]  # class by class, at random within a class
    # A group is drawn where half of it or more is owed: of groups of one image, every k-th.
    drawn, owed = [], 0
    for group in order:
        owed += asked * sizes[group]
        if 2 * owed > len(groups) * sizes[group]:
            drawn.append(group)
            owed -= len(groups) * sizes[group]
    return np.flatnonzero(np.isin(groups, drawn))


def _name_groups(dataset: "datasets.Dataset") -> np.ndarray:
    """Return the number of each image's group: files of a folder that share their name up to the last `_`.

    Images without such a name are their own group. So are those of a folder where all share one: it tells nothing, as
    in IMG_0001.jpg to IMG_0500.jpg.
    """
    import datasets

    if not isinstance(dataset.features.get("image"), datasets.Image):
        return np.arange(len(dataset))
    images = dataset.with_format(None).select_columns("image").cast_column("image", datasets.Image(decode=False))
    paths = [PurePath(path or "") for path in images.flatten()["image.path"][:]]  # the bytes are not read
    keys = [(path.parent, path.stem.rpartition("_")[0]) for path in paths]
    prefixes = Counter(folder for folder, _ in set(keys))  # how many different ones a folder has
    numbers: dict[object, int] = {}
    return np.array(
        [
            numbers.setdefault((folder, prefix) if prefix and prefixes[folder] > 1 else index, len(numbers))
            for index, (folder, prefix) in enumerate(keys)
        ]
    )


def check_fraction(name: str, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise InputError(f"{name} must lie between 0 and 1, both excluded, got {fraction!r}. Try 0.2.")
