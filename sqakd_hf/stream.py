"""Streams of images, read again and again in one pass that never ends: a resumed run finds its place in it."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from .errors import InputError


class EndlessStream(IterableDataset):
    """The passes of a stream one after the other, each with `set_epoch` of its number where the stream has that.

    Trainer counts the batches that a resumed run has to skip from the beginning of one pass: of a stream whose length
    nobody knows, it would skip the first pass and take the others from their start.

    Args:
        stream (`IterableDataset`): Without a length.

    Examples:
        >>> from itertools import islice
        >>> list(islice(EndlessStream([1, 2, 3]), 7))
        [1, 2, 3, 1, 2, 3, 1]
    """

    def __init__(self, stream: IterableDataset):
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(number)
            empty = True
            for item in self.stream:
                empty = False
                yield item
            if empty:
                raise InputError("The stream of training images holds none. Check its source and its filters.")
            number += 1
