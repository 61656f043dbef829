"""Images augmented by random numbers of their own: a resumed run draws the same as one that was never interrupted."""

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


@contextlib.contextmanager
def own_random_numbers(*key: object) -> Iterator[None]:
    """Context in which Python, NumPy and torch (on the CPU) draw what `key` decides, and nobody else's are used up.

    These are their global generators. A generator that somebody made for himself is not concerned.

    Args:
        *key (`object`): Told apart by their `repr`.

    Examples:
        >>> with own_random_numbers(0, 3):
        ...     first = torch.rand(4)
        >>> with own_random_numbers(0, 3):
        ...     print(torch.equal(torch.rand(4), first))
        True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    seed = int.from_bytes(digest, "little")
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def fetch(dataset: Dataset, indices: Sequence[int]) -> list[Any]:
    """Return the items under `indices`, at once where the dataset has a way to do that."""
    read = getattr(dataset, "__getitems__", None)
    return [dataset[index] for index in indices] if read is None else read(indices)


class RepeatableImages(Dataset):
    """A dataset whose batches are augmented by random numbers of a seed, the epoch and the batch's indices alone.

    They do not depend on what the process, or a worker of the loader, has drawn before. That holds for augmentation
    that draws from the global generators of Python, NumPy or torch, and for loaders, which read a batch at once. The
    same batch in the same epoch is augmented in the same way: when `train` is called once more, too.

    Args:
        dataset (`Dataset`): With a length.
        seed (`int`): The training's.

    Examples:
        >>> class Noise(Dataset):
        ...     def __getitem__(self, index):
        ...         return torch.rand(())
        >>> images = RepeatableImages(Noise(), seed=0)
        >>> first = images.__getitems__([3, 5])
        >>> images.__getitems__([3, 5]) == first
        True
        >>> images.begin_epoch(1)
        >>> images.__getitems__([3, 5]) == first
        False
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        # Shared, so that workers that live on see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def begin_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, if it wants to know; any loader that begins does that, with an epoch of its own."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        with own_random_numbers(self.seed, int(self._epoch), *indices):
            return fetch(self.dataset, indices)
