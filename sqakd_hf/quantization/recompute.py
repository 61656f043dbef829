"""Less memory for the backward: what quantizers put out is computed again there instead of being kept."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch


class _Kept(NamedTuple):
    """A tensor and its version: autograd leaves it to whoever packs tensors to notice changes in place."""

    tensor: torch.Tensor
    version: int

    def unchanged(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"A tensor {list(self.tensor.shape)} that the backward needs was changed in place after it was used. "
                "Change a copy of it."
            )
        return self.tensor


class _Again(NamedTuple):
    """A tensor that was not kept: what it is computed of and how, and which view of that it is."""

    source: _Kept
    compute: Callable[[torch.Tensor], torch.Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class recompute_quantized(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801 - a context manager, used as a verb
    """Context of a forward pass: layers keep the input of each quantizer for the backward, and not its output too.

    An input is mostly kept anyway, by the operation that made it, so that fake quantization then needs about as much
    memory as the float network. The backward computes the same bits again. Layers that receive a cast copy (a
    float32 input under autocast) keep that copy.

    Examples:
        >>> from sqakd_hf import create_quantizer
        >>> quantizer = create_quantizer("lsq", bits=2, role="activation")
        >>> quantizer.init_range(torch.randn(8))
        >>> with recompute_quantized():
        ...     y = quantizer(torch.randn(8)) * torch.ones(8, requires_grad=True)
        >>> y.sum().backward()
    """

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        # By storage: layers save views of what they were given. Entries live as long as the tensor does.
        self._made: dict[int, tuple[weakref.ref, int, _Kept, Callable[[torch.Tensor], torch.Tensor]]] = {}

    def __enter__(self) -> "recompute_quantized":
        super().__enter__()
        _active.append(self)
        return self

    def __exit__(self, *args: object) -> None:
        _active.remove(self)
        super().__exit__(*args)

    def remember(
        self, output: torch.Tensor, source: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Note that `compute(source)` gives `output` again."""
        key = output.untyped_storage()._cdata
        made = weakref.ref(output, lambda _: self._made.pop(key, None))
        self._made[key] = made, output._version, _Kept(source, source._version), compute

    def _pack(self, tensor: torch.Tensor) -> _Kept | _Again:
        made, version, *how = self._made.get(tensor.untyped_storage()._cdata, (None, None))
        output = None if made is None else made()
        # What was changed in place since then (`x += shortcut`) is nothing that can be computed again.
        if output is None or output.dtype != tensor.dtype or output._version != version:
            return _Kept(tensor, tensor._version)
        return _Again(*how, tensor.size(), tensor.stride(), tensor.storage_offset() - output.storage_offset())

    @staticmethod
    def _unpack(packed: _Kept | _Again) -> torch.Tensor:
        if isinstance(packed, _Kept):
            return packed.unchanged()
        with torch.no_grad():
            output = packed.compute(packed.source.unchanged())
        return output.as_strided(packed.size, packed.stride, output.storage_offset() + packed.offset)


_active: list[recompute_quantized] = []


def remember(output: torch.Tensor, source: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Tell the active [`recompute_quantized`], if there is one, how to compute `output` again."""
    # In inference mode, tensors have no version, and no backward.
    if _active and not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        _active[-1].remember(output, source, compute)
