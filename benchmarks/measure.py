"""What the benchmarks share: arguments, the bytes a backward keeps, and where it was measured."""

import argparse
import contextlib
import logging
import os
import platform
from collections.abc import Callable, Sequence

import torch
from torch import nn

from sqakd_hf.quantization.recompute import recompute_quantized


def parser_of_steps(description: str, networks: Sequence[str]) -> argparse.ArgumentParser:
    """Return the arguments that benchmarks of training steps share; the first three `networks` are the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=networks[:3], choices=networks)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast of what trains, in every row")
    return parser


def begin(options: argparse.Namespace) -> None:
    """Use so many threads, keep warnings quiet, and print where this is measured."""
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    print(f"{machine(options.device)}{', bfloat16 autocast' if options.bf16 else ''}", flush=True)


class SavedBytes(recompute_quantized):
    """Context of a forward pass that counts what the backward keeps: each storage once, without the parameters.

    With `recompute`, quantized tensors are computed again in the backward, as `activation_memory="low"` does.
    """

    def __init__(self, model: nn.Module, recompute: bool = False):
        super().__init__()
        self.recompute = recompute
        self._own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._kept: dict[int, torch.Tensor] = {}  # held, so that no other tensor takes a place that was counted

    def remember(self, *made: object) -> None:
        if self.recompute:
            super().remember(*made)

    def _pack(self, tensor: torch.Tensor):
        packed = super()._pack(tensor)
        storage = tensor.untyped_storage()
        if hasattr(packed, "tensor") and storage._cdata not in self._own:  # else it is computed again
            self._kept[storage._cdata] = tensor
        return packed

    @property
    def total(self) -> int:
        """Bytes kept so far."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def without_compiler() -> contextlib.AbstractContextManager:
    """Run what torch would compile as it stands, as where no compiler works."""
    return torch.compiler.set_stance("force_eager")


class Step:
    """A training step of `model` on one batch, by SGD.

    Args:
        model (`nn.Module`): What trains.
        images (`torch.Tensor`): The batch.
        loss (`Callable`): From float32 logits to the loss.
        bf16 (`bool`, *optional*, defaults to `False`): bfloat16 autocast of the forward.
        context (`Callable`, *optional*): Makes the context of the forward; that of `without_compiler` is the
            backward's as well.
    """

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        loss: Callable[[torch.Tensor], torch.Tensor],
        bf16: bool = False,
        context: Callable[[], contextlib.AbstractContextManager] | None = None,
    ):
        self.model, self.images, self._loss, self.bf16, self.context = model, images, loss, bf16, context
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        whole = self.context is without_compiler
        with self.context() if whole else contextlib.nullcontext():
            self.loss(None if whole else self.context).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, context: Callable[[], contextlib.AbstractContextManager] | None = None) -> torch.Tensor:
        """Run the forward."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bf16):
            with contextlib.nullcontext() if context is None else context():
                logits = self.model(self.images)
        return self._loss(logits.float())

    def saved(self) -> int:
        """Return the bytes that one forward keeps for its backward."""
        with SavedBytes(self.model, recompute=self.context is recompute_quantized) as saved:
            loss = self.loss()
        loss.backward()
        self.optimizer.zero_grad()
        return saved.total


def machine(device: str = "cpu") -> str:
    """Describe what a table was measured on, in one line."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    cpu = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"
    where = cpu if device == "cpu" else f"{torch.cuda.get_device_name()} ({cpu})"
    return f"{where}; Python {platform.python_version()}, torch {torch.__version__}"
