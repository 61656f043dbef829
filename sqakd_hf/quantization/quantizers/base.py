"""`FakeQuantizer`, the one base class of all quantizers, and their registry."""

from collections.abc import Callable

import torch
from torch import nn

from ..._text import quote, suggest
from ..._validation import check_bits
from ...errors import InputError
from ..functional import Grid, affine_grid, dequantize, fake_quantize, quantize
from ..recompute import remember
from .range_search import FEW_BITS, best_ends, percentile_ends


ROLES = ("weight", "activation")
FIRST_RANGES = ("auto", "method", "error", "percentile")


class FakeQuantizer(nn.Module):
    """Map a tensor to the values that `bits`-bit integer codes can represent, with a gradient that trains through it.

    A subclass says where its range lies: [`init_range`] sets it from data, [`clip_range`] returns its two ends with
    the gradients that the method defines. Codes, values and state follow from these. Subclasses may also override
    [`transform`] (a map before the range, as DoReFa's tanh) and [`grid`] (where the ends alone do not fix it).

    Ranges are 1-D float32 (`(1,)`, or `(channels,)` with `channel_axis`), stay float32 under `.to(dtype)` and
    autocast, and hold NaN until they are set.

    Args:
        bits (`int`): Width of a code, 1 to 8.
        role (`str`): `"weight"` or `"activation"`.
        signed (`bool`, *optional*, defaults to `True`): Whether the input can be negative. `None` lets
            [`~sqakd_hf.calibrate_model`] decide from the data it sees (signed until then).
        channel_axis (`int`, *optional*): Axis with one range per index; `None` for one range in all.
        num_channels (`int`, *optional*, defaults to 1): Length of that axis; `init_range` adapts it to its data.
        delta (`float`, *optional*, defaults to 0.0): Element-wise gradient scaling, 0 for the straight-through
            estimator.
        integer_zero_point (`bool`, *optional*, defaults to `True`): Keep zero exactly on the grid of activations;
            `False` is the papers' free range. Weights and 1-bit signed activations keep their symmetric grid.
        first_range (`str`, *optional*, defaults to `"auto"`): How calibration sets the range: the method's own way
            (`"method"`), by least squared error (`"error"`), or so that it leaves out a thousandth of the data
            (`"percentile"`). `"auto"`: by least error with more than 4 bits, for images themselves, and for
            activations of 1 bit by PACT, DoReFa and LSQ+; else the method's own. Two-valued signed codes, and the
            weights of DoReFa and StatsQ, always have the method's own.
    """

    # The range learns from clipped elements alone (PACT).
    clip_only = False
    # Widths whose first range is that of least error, unless the caller says otherwise.
    searched_bits = tuple(range(FEW_BITS + 1, 9))

    def __init__(
        self,
        bits: int,
        role: str,
        signed: bool | None = True,
        channel_axis: int | None = None,
        num_channels: int = 1,
        *,
        delta: float = 0.0,
        integer_zero_point: bool = True,
        first_range: str = "auto",
    ):
        super().__init__()
        self.bits = check_bits(bits)
        _check_role(role)
        if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 <= delta < float("inf"):
            raise InputError(
                f"delta must be a non-negative number, got {delta!r}; 0 is the straight-through estimator."
            )
        if first_range not in FIRST_RANGES:
            raise InputError(f"first_range must be one of {quote(FIRST_RANGES)}, got {first_range!r}.")
        self.first_range = first_range
        self.role = role
        self.channel_axis = channel_axis
        self.num_channels = num_channels if channel_axis is not None else 1
        self.delta = float(delta)
        self.integer_zero_point = integer_zero_point
        self.declared_signed = signed
        self.calibrated = False
        # 0-D scalars would do, but FSDP2 shards 1-D tensors and up.
        self.register_buffer("signed_flag", torch.tensor([signed is not False], dtype=torch.uint8))
        self._signed = signed is not False

    @property
    def signed_is_open(self) -> bool:
        """Whether the data decides if codes are signed."""
        return self.declared_signed is None

    @property
    def levels(self) -> int:
        """Number of codes, `2 ** bits`."""
        return 2**self.bits

    @property
    def signed(self) -> bool:
        """Whether the input can be negative."""
        return self._signed

    @signed.setter
    def signed(self, value: bool) -> None:
        self._signed = bool(value)
        self.signed_flag.fill_(self._signed)

    @property
    def binary(self) -> bool:
        """Whether this is the two-valued signed case {-s, +s}, where `sign(0) = +1`."""
        return self.bits == 1 and self.signed

    @property
    def has_integer_zero_point(self) -> bool:
        """Whether the grid is shifted to hold zero exactly."""
        return self.integer_zero_point and self.role == "activation" and not self.binary

    @property
    def zero_on_grid(self) -> tuple[bool, ...]:
        """Whether first ranges put zero on the grid: always, if that is nearer (both), or as symmetry has it."""
        if self.role == "weight":
            return (False,)
        return (True,) if self.has_integer_zero_point else (False, True)

    @property
    def searches_range(self) -> bool:
        """Whether [`searched_ends`] sets the first range, rather than the method's own way."""
        by_bits = self.first_range == "auto" and self.bits in self.searched_bits
        return not self.binary and (by_bits or self.first_range in ("error", "percentile"))

    def searched_ends(
        self, lower: torch.Tensor, upper: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the share of a range that holds all `rows` `(channels, n)` by which the first range is to begin."""
        if self.first_range == "percentile":
            return percentile_ends(lower, upper, rows)
        return best_ends(lower, upper, rows, self.levels, self.zero_on_grid)

    # --- what a subclass defines ---

    def init_range(self, x: torch.Tensor) -> None:
        """Set the range in place from data `x` (a weight, or a batch of activations)."""
        raise NotImplementedError

    def clip_range(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(lower, upper)`, each 1-D float32, through which gradients reach the learned parameters.

        `x` is the tensor about to be quantized, for methods whose gradient depends on its size.
        """
        raise NotImplementedError

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` before it meets the range; the identity unless a method defines it."""
        return x

    def latent(self, values: torch.Tensor) -> torch.Tensor:
        """Return a tensor that quantizes to `values`, which lie on the grid; to be overridden with [`transform`]."""
        return values

    def grid(self) -> Grid:
        """Return the values used in the forward, without gradient."""
        lower, upper = self.clip_range()
        return affine_grid(lower.detach(), upper.detach(), self.levels, self.has_integer_zero_point)

    # --- what follows from it ---

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(scale, zero_point)`, 1-D float32: `value = (code - zero_point) * scale`."""
        return self.grid()[2:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantize `x`: same shape and dtype, values on the grid, arithmetic in float32."""
        self._require_range()
        source, ends = self.transform(x), self.clip_range(x)
        if ends[0].dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"The range of this {self.role} quantizer arrives in {ends[0].dtype}: something casts parameters "
                "behind it, such as FSDP's mixed precision. Shard with MixedPrecisionPolicy() and compute in a lower "
                "precision by torch.autocast, which leaves ranges in float32."
            )
        options = {
            "levels": self.levels,
            "grid": self.grid(),
            "delta": self.delta,
            "channel_axis": self.channel_axis,
            "binary": self.binary,
            "clip_only": self.clip_only,
        }

        def compute(source: torch.Tensor) -> torch.Tensor:
            return fake_quantize(source, *ends, **options).to(x.dtype)

        output = compute(source)
        remember(output, source, compute)
        return output

    @torch.no_grad()
    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes of `x`, `uint8` in `[0, levels - 1]`, same shape."""
        self._require_range()
        return quantize(
            self.transform(x), self.grid(), self.levels, channel_axis=self.channel_axis, binary=self.binary
        )

    @torch.no_grad()
    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the float32 values of `codes`, same shape."""
        self._require_range()
        return dequantize(codes, self.grid(), channel_axis=self.channel_axis)

    @torch.no_grad()
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the codes of values that lie on the grid already, [`dequantize`]'s result in any float dtype.

        Raises:
            `InputError`: A value between two codes.
        """
        self._require_range()
        codes = quantize(values, self.grid(), self.levels, channel_axis=self.channel_axis, binary=self.binary)
        if not torch.equal(self.dequantize(codes).to(values.dtype), values):
            raise InputError(
                "The weight no longer lies on its grid: it was changed after loading, or its dtype is too narrow to "
                "tell its codes apart. Call model.train() before you change weights; load in float32 to save again."
            )
        return codes

    def extra_repr(self) -> str:
        sign = "signed" if self.signed else "unsigned"
        where = "per tensor" if self.channel_axis is None else f"per channel (axis {self.channel_axis})"
        return f"{self.role}, {self.bits} bits, {sign}, {where}" + ("" if self.calibrated else ", no range yet")

    # --- helpers for subclasses ---

    def new_range_parameter(self) -> nn.Parameter:
        """Return a learned range tensor, NaN until it is set."""
        return nn.Parameter(torch.full((self.num_channels,), float("nan"), dtype=torch.float32))

    @torch.no_grad()
    def set_range(self, **tensors: torch.Tensor) -> None:
        """Write range tensors by name, from values broadcastable to 1-D, and mark the quantizer calibrated."""
        for name, value in tensors.items():
            target = getattr(self, name)
            target.data = value.to(target.device, torch.float32).reshape(-1).clone()
        self.num_channels = target.numel()
        self.calibrated = True

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """View `x` in float32 as `(channels, n)`: one row for each range."""
        x = x.detach().float()
        return x.reshape(1, -1) if self.channel_axis is None else x.movedim(self.channel_axis, 0).flatten(1)

    def elements_per_sample(self, x: torch.Tensor) -> float:
        """Number of elements of `x` that share one range; for activations, of one sample of the batch."""
        samples = max(x.shape[0], 1) if self.role == "activation" else 1
        return max(x.numel() / samples / self.num_channels, 1)

    def _require_range(self) -> None:
        if not self.calibrated:
            raise InputError(
                f"This {self.role} quantizer has no range yet. Run calibrate_model(model, batches) first, "
                "or load a calibrated state dict."
            )

    # --- state ---

    def range_tensors(self) -> dict[str, torch.Tensor]:
        """Return the learned and the fixed range tensors by name."""
        named = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        return {name: tensor for name, tensor in named if name != "signed_flag"}

    def _apply(self, fn, recurse=True):
        # `.to(bfloat16)`, `.half()` and bf16_full_eval would round the ranges: follow to the device, keep float32.
        exact = {name: tensor.detach() for name, tensor in self.range_tensors().items()}
        super()._apply(fn, recurse)
        for name, tensor in self.range_tensors().items():
            if tensor.dtype != torch.float32:
                grad, tensor.grad = tensor.grad, None
                tensor.data = exact[name].to(tensor.device)
                tensor.grad = None if grad is None else grad.float()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        names = [*self.range_tensors(), "signed_flag"]
        if not any(prefix + name in state_dict for name in names):
            return  # a float checkpoint: it has the weights, the ranges stay as they are
        for name, tensor in self.range_tensors().items():
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.dim() == 1 and self.channel_axis is not None and not self.calibrated:
                tensor.data = tensor.new_full(stored.shape, float("nan"))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )
        self.refresh()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the range and what the data said about the sign: the quantizer is as it was created."""
        for tensor in self.range_tensors().values():
            tensor.fill_(float("nan"))
        self.signed = self.declared_signed is not False
        self.calibrated = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring what derives from the tensors (signedness, whether calibrated) up to date after they were loaded."""
        self._signed = bool(self.signed_flag.item())
        tensors = self.range_tensors().values()
        self.num_channels = max((tensor.numel() for tensor in tensors), default=1)
        self.calibrated = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise InputError(f"role must be 'weight' or 'activation', got {role!r}.")


# --- registry --------------------------------------------------------------------------------------------------------

_REGISTRY: dict[tuple[str, str], type[FakeQuantizer]] = {}


def register_quantizer(name: str, role: str | None = None) -> Callable[[type[FakeQuantizer]], type[FakeQuantizer]]:
    """Register a `FakeQuantizer` subclass under `name`, for one role or (by default) for both.

    ```python
    @register_quantizer("my_method")
    class MyQuantizer(FakeQuantizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.upper = self.new_range_parameter()

        def init_range(self, x):
            self.set_range(upper=self.rows(x).abs().amax(1))

        def clip_range(self, x=None):
            return -self.upper, self.upper
    ```

    `QuantizationConfig(quantizer="my_method")` then uses it; the law tests, saving and loading need nothing more.
    """

    if role is not None:
        _check_role(role)

    def decorate(cls: type[FakeQuantizer]) -> type[FakeQuantizer]:
        if not (isinstance(cls, type) and issubclass(cls, FakeQuantizer)):
            raise InputError(f"register_quantizer({name!r}) needs a subclass of FakeQuantizer, got {cls!r}.")
        keys = [(name, key) for key in (ROLES if role is None else (role,))]
        for key in keys:
            previous = _REGISTRY.get(key, cls)
            # The same class again comes from a reloaded module: it replaces the old one.
            if (previous.__module__, previous.__qualname__) != (cls.__module__, cls.__qualname__):
                raise InputError(
                    f"The {key[1]} quantizer {name!r} is taken by {previous.__qualname__}; choose another name."
                )
        _REGISTRY.update(dict.fromkeys(keys, cls))
        return cls

    return decorate


def list_quantizers() -> list[str]:
    """Return the names that [`create_quantizer`] accepts, sorted.

    Examples:
        >>> list_quantizers()
        ['dorefa', 'ewgs', 'lsq', 'lsq+', 'pact', 'statsq']
    """
    return sorted({name for name, _ in _REGISTRY})


def create_quantizer(
    name: str,
    *,
    bits: int,
    role: str,
    signed: bool | None = True,
    channel_axis: int | None = None,
    **kwargs: object,
) -> FakeQuantizer:
    """Create a quantizer by its registered name.

    Args:
        name (`str`): One of [`list_quantizers`].
        bits (`int`): 1 to 8.
        role (`str`): `"weight"` or `"activation"`.
        signed (`bool`, *optional*, defaults to `True`): Whether the input can be negative; `None`: the data decides.
        channel_axis (`int`, *optional*): Axis with one range per index.
        **kwargs: Options of the method, such as `delta`.

    Raises:
        `InputError`: Unknown name or option, or a value outside what the method accepts.

    Examples:
        >>> quantizer = create_quantizer("lsq", bits=2, role="weight")
        >>> quantizer.init_range(torch.tensor([-1.0, 0.5, 1.5]))
        >>> quantizer(torch.tensor([-0.2, 1.1])).tolist()
        [0.0, 2.0]
    """
    cls = _REGISTRY.get((name, role))
    if cls is None:
        _check_role(role)
        known = list_quantizers()
        reason = f"has no {role} form" if name in known else "is not registered"
        raise InputError(f"Quantizer {name!r} {reason}; registered: {', '.join(known)}.{suggest(name, known)}")
    try:
        quantizer = cls(bits, role, signed, channel_axis, **kwargs)
    except TypeError as error:
        raise InputError(f"Quantizer {name!r} can't take the options {sorted(kwargs)}: {error}.") from error
    for tensor in quantizer.range_tensors().values():
        # Created while transformers builds a bfloat16 model, it has the default dtype of that moment.
        tensor.data = tensor.data.float()
    return quantizer
