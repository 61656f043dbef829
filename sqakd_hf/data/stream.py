"""Streams of images, read again and again in one pass that never ends: a resumed run finds its place in it."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ..errors import InputError
from .reproducible import own_random_numbers


class EndlessStream(IterableDataset):
    """The passes of a stream one after the other, each with `set_epoch` of its number where the stream has that.

    Trainer counts the batches that a resumed run has to skip from the beginning of one pass: of a stream whose length
    nobody knows, it would skip the first pass and take the others from their start. Passes are shuffled, and items
    augmented, by random numbers of the seed, the pass, the place in it and the loader's worker alone.

    Args:
        stream (`IterableDataset`): Without a length.
        seed (`int`): The training's.

    Examples:
        >>> from itertools import islice
        >>> list(islice(EndlessStream([1, 2, 3], seed=0), 7))
        [1, 2, 3, 1, 2, 3, 1]
    """

    def __init__(self, stream: IterableDataset, seed: int):
        self.stream, self.seed = stream, seed

    def __iter__(self) -> Iterator[Any]:
        for number in count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(number)
            empty = True
            for item in self._pass(number):
                empty = False
                yield item
            if empty:
                raise InputError("The stream of training images holds none. Check its source and its filters.")

    def _pass(self, number: int) -> Iterator[Any]:
        worker = get_worker_info()
        key = self.seed, worker.id if worker else 0, number
        with own_random_numbers(*key):
            items = iter(self.stream)
        for position in count():
            with own_random_numbers(*key, position):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
