"""Some of the training images, drawn at random and each time in the same way."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from .reproducible import own_random_numbers


def sample_batches(
    dataset: Dataset | IterableDataset,
    collator: Callable[[list[Any]], dict[str, torch.Tensor]],
    total: int,
    batch: int,
    seed: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of `total` images without labels, the same ones in every process and at every call.

    They are drawn and augmented at random: the first of a folder are all of one class. A stream has no others than
    its first. The random numbers of the caller stay what they are.

    Args:
        dataset (`Dataset` or `IterableDataset`): Images as the collator takes them.
        collator (`Callable`): From a list of images to a batch.
        total (`int`): So many images, or all of a smaller dataset. A last batch of one image is left out: it has no
            batch statistics.
        batch (`int`): Images in a batch.
        seed (`int`): Of the draws.
    """
    if isinstance(dataset, IterableDataset):
        with own_random_numbers(seed):
            images = islice(dataset, total)
    else:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        images = map(dataset.__getitem__, order[:total].tolist())
    for number in count():
        with own_random_numbers(seed, number):
            features = list(islice(images, batch))
            if len(features) < 2:
                return
            collated = collator(features)
        yield {name: tensor for name, tensor in collated.items() if name != "labels"}
