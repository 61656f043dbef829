"""The teacher as training uses it: one or several models without gradients, in a precision of their own."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..conversion.student import parameter_shapes
from ..errors import InputError
from ..outputs.forward import Prediction, predict, unwrapped
from .losses import mean_teacher_logits


TEACHER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def teacher_dtype(name: str, mixed_precision: str) -> torch.dtype:
    """Return what `teacher_dtype=name` comes to: `"auto"` is what training computes in, by its `mixed_precision`."""
    if name == "auto":
        name = {"bf16": "bfloat16", "fp16": "float16"}.get(mixed_precision, "float32")
    return TEACHER_DTYPES[name]


class Teacher:
    """Frozen models whose mean distribution a student learns.

    Args:
        models (list of `nn.Module`): Put in eval mode and moved to `device`, in place. They are not wrapped:
            every process holds them whole.
        device (`torch.device`): Where they run.
        dtype (`torch.dtype`): What matrix products and convolutions compute in, by autocast; parameters stay as they
            are, and logits come out in float32.
        channels_last (`bool`, *optional*, defaults to `False`): Keep kernels in channels-last memory format.
        compile_options (`dict`, *optional*): Arguments of `torch.compile`; `None` runs the models as they stand.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        compile_options: dict[str, Any] | None = None,
    ):
        # Not frozen: it runs without gradients, and a student copied from it later is to train.
        self.models = [model.eval().to(device) for model in models]
        if channels_last:
            self.models = [model.to(memory_format=torch.channels_last) for model in self.models]
        self.device, self.dtype = device, dtype
        self._corresponds_to: nn.Module | None = None
        self._runs = self.models
        if compile_options is not None:
            self._runs = [torch.compile(model, **compile_options) for model in self.models]

    @torch.no_grad()
    def predict(self, inputs: Mapping[str, Any], temperature: float, field: str | None = None) -> Prediction:
        """Return the mean of the models' distributions at `temperature`, as logits, and of their boxes.

        Args:
            inputs (`dict`): A batch, on the teacher's device.
            temperature (`float`): Positive.
            field (`str`, *optional*): See [`~sqakd_hf.outputs.forward.predict`].
        """
        # Also where training computes in another precision: this is the inner context, and it counts.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            predictions = [predict(model, inputs, field) for model in self._runs]
        boxes = [prediction.boxes.float() for prediction in predictions if prediction.boxes is not None]
        return Prediction(
            mean_teacher_logits([prediction.logits.float() for prediction in predictions], temperature),
            torch.stack(boxes).mean(0) if boxes else None,
        )

    def require_corresponding_queries(self, student: nn.Module) -> None:
        """Raise `InputError` unless the queries of `student` may be those of one teacher that it started from.

        Which object a query answers for is arbitrary: each training settles it anew.
        """
        if student is self._corresponds_to:
            return
        own, models = unwrapped(student), [unwrapped(model) for model in self.models]
        alike = isinstance(own, type(models[0])) and parameter_shapes(own) == parameter_shapes(models[0])
        if len(models) > 1 or not alike:
            teachers = ", ".join(type(model).__name__ for model in models)
            raise InputError(
                f"{type(own).__name__} answers by queries (B, Q, K), and so do its teachers: {teachers}. Queries "
                "correspond only between a student and the one teacher that it was copied from: pass that one."
            )
        self._corresponds_to = student

    def fingerprint(self) -> str:
        """Return a hash of what the predictions depend on: the models' structure and tensors, and the dtype."""
        digest = hashlib.sha256(str(self.dtype).encode())
        for model in self.models:
            digest.update(f"{type(model).__qualname__} {model}".encode())
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
