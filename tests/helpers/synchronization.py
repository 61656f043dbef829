"""Contexts in which no code may wait for the device by reading a number back from it."""

import contextlib
import traceback
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sqakd_hf import SQAKDTrainer
from sqakd_hf.quantization import functional


# Each reads a tensor's numbers in Python: item(), float(), bool(), int(), an index by a tensor, `if tensor:`.
READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
)


class _CountReads(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS:
            frames = traceback.extract_stack()[:-1]  # without this method
            caller = next(frame for frame in reversed(frames) if "/torch/" not in frame.filename)
            self.found.append(f"{function} at {caller.filename}:{caller.lineno} in {caller.name}")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_reads(monkeypatch, found: list[str]) -> Iterator[None]:
    """Context that notes in `found` what reads a number back, in the eager form of quantizers that trains."""
    with monkeypatch.context() as context, _CountReads(found):
        # Under a dispatch mode quantizers would leave their flat views out.
        context.setattr(functional, "_is_watched", lambda: False)
        yield


@contextlib.contextmanager
def no_waiting(device: torch.device, monkeypatch) -> Iterator[None]:
    """Context in which waiting for `device` is an error; on a CPU, what would wait for an accelerator."""
    if device.type != "cuda":
        found = []
        with counted_reads(monkeypatch, found):
            yield
        assert not found
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def train_within(trainer: SQAKDTrainer, context: Callable[[], contextlib.AbstractContextManager]) -> None:
    """Train with each step but the first, which warms up, in a context; its inputs are on the device before."""
    step = trainer.training_step

    def training_step(model, inputs, *args):
        if trainer.state.global_step == 0:
            return step(model, inputs, *args)
        inputs = trainer._prepare_inputs(inputs)
        with context():
            return step(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train()
