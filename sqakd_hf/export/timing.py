"""Timing that bears a noisy machine: what is compared runs in turn, and ratios are medians over the rounds."""

import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from tqdm import tqdm


Name = TypeVar("Name", bound=Hashable)


def interleaved(
    steps: dict[Name, Callable[[], object]], rounds: int, device: str = "cpu", warm_up: int = 3
) -> dict[Name, list[float]]:
    """Run every step once a round, in turn, and return the seconds of each: what disturbs one round disturbs all.

    The first `warm_up` rounds compile kernels and fill caches, and are not counted.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(-warm_up, rounds), "Rounds", leave=False):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait for the accelerator, if it is one."""
    if device != "cpu":
        torch.accelerator.synchronize()


def ratios(seconds: list[float], reference: list[float]) -> tuple[float, float]:
    """Return the median over the rounds of one step's time by another's, and half the interquartile range of it."""
    shares = [one / other for one, other in zip(seconds, reference, strict=True)]
    first, median, third = statistics.quantiles(shares, n=4)
    return median, (third - first) / 2
