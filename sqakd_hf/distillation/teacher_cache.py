"""The teacher's logits of a training set: computed once, kept in a memory-mapped file, read beside the images."""

import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from .._text import quote, reason
from ..data.collator import LOGITS, columns
from ..data.reproducible import fetch, own_random_numbers
from ..errors import InputError
from ..quantization.packing import checksum


# As many images are drawn twice to find out whether they are the same both times.
_CHECKED = 16

Result = TypeVar("Result")


class TeacherLogits(Dataset):
    """A dataset whose items also have the teacher's logits, float32, read from a memory-mapped `.npy` file.

    Args:
        dataset (`Dataset`): The images.
        path (`str`): A file of [`cache_teacher_logits`], with a row for each image.
    """

    def __init__(self, dataset: Dataset, path: str):
        self.dataset, self.path = dataset, path
        self._logits = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**columns(self.dataset[index]), LOGITS: self._row(index)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        items = fetch(self.dataset, indices)
        return [{**columns(item), LOGITS: self._row(index)} for item, index in zip(items, indices, strict=True)]

    def _row(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._logits[index].copy())

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the file anew instead of receiving its contents.
        return {"dataset": self.dataset, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def cache_teacher_logits(
    dataset: Dataset,
    folder: str,
    predict: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    identity: str,
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    batch_size: int = 64,
    num_workers: int = 0,
    computes: bool = True,
    disable_progress: bool = False,
) -> TeacherLogits:
    """Return `dataset` with the teacher's logits, which are computed unless `folder` has them already.

    Args:
        dataset (`Dataset`): Has a length and the same image under an index every time, and can be recognised: a
            [`datasets.Dataset`], whose fingerprint covers its contents and its transform, or one with an attribute
            `fingerprint` (`str`) of its own.
        folder (`str`): Where the file is, or will be; made if it is missing.
        predict (`Callable`): Takes a collated batch and returns logits `(B, ...)`.
        identity (`str`): Whatever else the logits depend on: the teacher, its precision.
        collate (`Callable`): Makes a batch of a list of items.
        batch_size, num_workers (`int`, *optional*): How images are loaded for `predict`.
        computes (`bool`, *optional*, defaults to `True`): Whether this process makes the file where it is missing,
            or waits until another has, for as long as it takes. Of the processes of `torch.distributed` all call
            this function.
        disable_progress (`bool`, *optional*, defaults to `False`): Show no progress bar.

    Raises:
        `InputError`: A stream, a dataset that can't be recognised, images that are augmented at random (as far as
            drawing the first 16 twice shows it), logits of several shapes or of other images than were asked for, or
            a folder that can't be written to; in each of several processes, what differs between them or went wrong
            in one. The file appears when it is complete; a process that is killed leaves a `.tmp` file at most.
    """
    (own, *_) = parts = _in_all_processes(lambda: _identify(dataset, identity, collate))
    for part in own:
        if len(found := {each[part] for each in parts}) > 1:
            raise InputError(
                f"cache_teacher_logits needs the same images and teacher in all processes, but {part} differs: "
                f"{quote(sorted(found))}. Give every process the same dataset, teacher and collator."
            )
    key = hashlib.sha256(" ".join(own.values()).encode()).hexdigest()[:32]
    path = os.path.join(folder, f"teacher-logits-{key}.npy")

    def make() -> None:
        if not computes or os.path.exists(path):
            return
        loader = DataLoader(
            dataset,
            batch_size,
            collate_fn=collate,
            num_workers=num_workers,
            generator=torch.Generator(),  # or it would draw a seed from the generator that training goes on with
        )
        batches = tqdm(loader, "Teacher's logits", unit="batch", disable=disable_progress, leave=False)
        _write(path, len(dataset), batch_size, (predict(batch) for batch in batches))

    _in_all_processes(make, timeout=timedelta(days=365))
    return TeacherLogits(dataset, path)


def _identify(
    dataset: Dataset, identity: str, collate: Callable[[list[Any]], Mapping[str, torch.Tensor]]
) -> dict[str, str]:
    """Return what the logits depend on, or raise `InputError` where that can't be told."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise InputError("cache_teacher_logits needs images with an index, not a stream. Leave it out for streams.")
    fingerprint = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    if not isinstance(fingerprint, str):
        raise InputError(
            f"cache_teacher_logits can't recognise a {type(dataset).__name__} when it meets it again. Use a "
            "datasets.Dataset, or give it an attribute `fingerprint` (a string that changes with the images)."
        )
    return {
        "the dataset's fingerprint": fingerprint,
        "its length": str(len(dataset)),
        "the teacher": identity,
        # As they are collated they tell apart collators that normalise in another way.
        "the checksum of its first images": str(checksum(_first_images(dataset, collate))),
    }


def _in_all_processes(work: Callable[[], Result], timeout: timedelta | None = None) -> list[Result]:
    """Return what `work` gives in this process and in each of the others; none goes on where it fails in one.

    They wait for each other by connections of their own, which break when a process dies.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [work()]
    group = distributed.new_group(backend="gloo", timeout=timeout)
    try:
        result = error = None
        try:
            result = work()
        except BaseException as caught:  # the others learn of it first
            error = caught
        outcomes = [None] * distributed.get_world_size(group)
        try:
            distributed.all_gather_object(outcomes, (result, None if error is None else reason(error)), group)
        except RuntimeError as broken:
            if error is None:
                raise RuntimeError(
                    "cache_teacher_logits: another process ended before the teacher's logits were complete. Its own "
                    "message, if it left one, says why."
                ) from broken
    finally:
        distributed.destroy_process_group(group)
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise InputError(f"cache_teacher_logits failed in process {rank}: {failure}.")
    return [result, *(outcome for outcome, _ in outcomes)]


def _write(path: str, count: int, batch_size: int, batches: Iterator[torch.Tensor]) -> None:
    """Write the rows of `batches` to `path`, which appears when it is complete."""
    unfinished = f"{path}.{socket.gethostname()}-{os.getpid()}.tmp"
    rows, start = None, 0
    try:
        for logits in batches:
            logits = logits.float().cpu().numpy()
            if len(logits) != min(batch_size, count - start):
                raise InputError(
                    f"cache_teacher_logits got {len(logits)} logits for {min(batch_size, count - start)} images: the "
                    "data_collator drops or adds images. Use one that keeps them, or leave the cache out."
                )
            with _writing_to(path):
                if rows is None:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    shape = (count, *logits.shape[1:])
                    rows = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
            if logits.shape[1:] != rows.shape[1:]:
                raise InputError(
                    f"cache_teacher_logits needs logits of one shape, got {rows.shape[1:]} and {logits.shape[1:]}. "
                    "Give all images one size."
                )
            rows[start : start + len(logits)] = logits
            start += len(logits)
        with _writing_to(path):
            rows.flush()
            os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


@contextlib.contextmanager
def _writing_to(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = os.path.dirname(path)
        raise InputError(f"cache_teacher_logits can't write to {folder!r}: {reason(error)}.") from error


def _first_images(dataset: Dataset, collate: Callable[[list[Any]], Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Return the first images as a batch, or raise `InputError` if they are others when they are drawn again."""
    with own_random_numbers(0):
        first, second = (
            collate([dataset[index] for index in range(min(_CHECKED, len(dataset)))])["pixel_values"] for _ in range(2)
        )
    if not torch.equal(first, second):
        raise InputError(
            "cache_teacher_logits needs the same image in every epoch, and the training images are augmented at "
            "random: turn the augmentation off, or leave the cache out."
        )
    return first
