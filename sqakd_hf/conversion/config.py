"""`QuantizationConfig`: what to quantize and how, as plain data."""

import difflib
import inspect
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .._text import suggest
from .._validation import check_bits, check_integer
from ..errors import InputError
from ..quantization.quantizers import FEW_BITS, FakeQuantizer, create_quantizer, list_quantizers


logger = logging.getLogger(__name__)

# 1: float latents alone. 2: `stored` says what each layer is and how its weights are stored.
FORMAT_VERSION = 2
LAYER_FIELDS = (
    "quantizer",
    "activation_quantizer",
    "weight_bits",
    "activation_bits",
    "per_channel",
    "integer_zero_point",
    "quantizer_kwargs",
)
# Fewer bits cost quality, and no engine gains by them.
RESIDUAL_BITS = 8
# Depthwise convolutions of fewer bits cost most of what a network loses at 4 bits, and are few of its weights.
DEPTHWISE_BITS = 8
OVERRIDABLE = (*LAYER_FIELDS, "attention_bits")


@dataclass
class QuantizationConfig(QuantizationConfigMixin):
    """What to quantize and how. Validated on creation, equal to itself after a round trip through JSON.

    A *pattern* names a module or a run of parts of its dotted name, with `*` and `?` as wildcards (not a regular
    expression): `"layer1"` covers everything in `layer1`, `"fc"` also `timm_model.fc`, `"layer?.0.conv1"` four layers.

    Args:
        quantizer (`str`, *optional*, defaults to `"lsq"`): One of [`list_quantizers`], for weights and activations.
        activation_quantizer (`str`, *optional*): Another one for activations: `"lsq+"`, whose range need not begin or
            be centred at zero, is nearer to inputs that are negative at times. `None`: `quantizer`.
        weight_bits (`int`, *optional*, defaults to 2): 1 to 8.
        activation_bits (`int`, *optional*, defaults to 2): 1 to 8; `None` leaves activations in float.
        per_channel (`bool`, *optional*, defaults to `True`): One weight range per output channel instead of one per
            layer. Activations have one range per layer.
        first_last_bits (`int`, *optional*, defaults to 8): Bits of the first and the last layer, weights and
            activations; `None` leaves both in full precision, as the paper does.
        attention_bits (`int`, *optional*): Bits of the operands of attention's products: queries, keys, values and
            the softmax's output. `None`, the default, leaves them in float. Needs `"sdpa"` or `"eager"` attention.
        residual_bits (`int` or `str`, *optional*, defaults to `"auto"`): Bits of the feature maps that residual
            connections of convolutional networks add and that global pooling takes. Engines whose integer
            convolutions put out integers alone (ONNX Runtime) compute in float where these are in float. `"auto"` is 8
            for what one convolution puts out by itself; a number is for all of them, sums that go on as well; `None`
            leaves them in float, as the papers do.
        depthwise_bits (`int` or `str`, *optional*, defaults to `"auto"`): Bits of depthwise convolutions, weights and
            activations. `"auto"` gives them 8 where 4 or fewer were asked: at 4 bits they are what mobile networks
            lose most by, and 3 % of their bytes. `None` treats them as the other layers.
        overrides (`dict[str, dict]`, *optional*): Pattern → any of `quantizer`, `activation_quantizer`,
            `weight_bits`, `activation_bits`, `per_channel`, `integer_zero_point`, `quantizer_kwargs` for the layers
            that match, and `attention_bits` for attention modules. Also overrules `first_last_bits` and
            `depthwise_bits`; where several patterns match, later ones overrule earlier ones.
        modules_to_not_convert (`list[str]`, *optional*): Patterns of modules that stay in full precision.
        quantizer_kwargs (`dict`, *optional*): Options of the quantizer, such as `{"delta": 0.0}`.
        integer_zero_point (`bool`, *optional*, defaults to `True`): Keep zero exactly on the grid of activations, as
            integer kernels want it; `False` is the papers' free range.
        stored (`dict`, *optional*): Written on saving, read on loading: what each layer is, the format of the
            weights, and checksums. Quantizing another model with a saved config leaves it aside.

    Raises:
        `InputError`: For a value that is not accepted, naming the field.

    Examples:
        >>> config = QuantizationConfig(weight_bits=4, activation_bits=4, overrides={"layer4": {"weight_bits": 2}})
        >>> QuantizationConfig.from_dict(config.to_dict()) == config
        True
    """

    quantizer: str = "lsq"
    weight_bits: int = 2
    activation_bits: int | None = 2
    per_channel: bool = True
    first_last_bits: int | None = 8
    attention_bits: int | None = None
    residual_bits: int | str | None = field(default="auto", kw_only=True)
    depthwise_bits: int | str | None = field(default="auto", kw_only=True)
    activation_quantizer: str | None = field(default=None, kw_only=True)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules_to_not_convert: list[str] = field(default_factory=list)
    quantizer_kwargs: dict[str, Any] = field(default_factory=dict)
    integer_zero_point: bool = True
    quant_method: str = field(default="sqakd", kw_only=True)
    format_version: int = FORMAT_VERSION
    stored: dict[str, Any] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        self.overrides = {} if self.overrides is None else self.overrides
        self.modules_to_not_convert = [] if self.modules_to_not_convert is None else self.modules_to_not_convert
        self.quantizer_kwargs = {} if self.quantizer_kwargs is None else self.quantizer_kwargs
        if self.quant_method != "sqakd":
            raise InputError(f"quant_method must be 'sqakd', got {self.quant_method!r}.")
        if self.first_last_bits is not None:
            check_bits(self.first_last_bits, "first_last_bits (None leaves both layers in full precision)")
        if self.attention_bits is not None:
            check_bits(self.attention_bits, "attention_bits (None leaves attention's products in float)")
        if self.residual_bits is not None and self.residual_bits != "auto":
            check_bits(self.residual_bits, "residual_bits ('auto': 8 where there are any; None: in float)")
        if self.depthwise_bits is not None and self.depthwise_bits != "auto":
            check_bits(self.depthwise_bits, "depthwise_bits ('auto': 8 for 4 or fewer; None: as the other layers)")
        if isinstance(self.modules_to_not_convert, str) or not isinstance(self.modules_to_not_convert, Iterable):
            raise InputError(f"modules_to_not_convert must be a list of names, got {self.modules_to_not_convert!r}.")
        self.modules_to_not_convert = list(self.modules_to_not_convert)
        if not all(isinstance(pattern, str) for pattern in self.modules_to_not_convert):
            raise InputError(f"modules_to_not_convert must be a list of names, got {self.modules_to_not_convert!r}.")
        check_integer(self.format_version, "format_version")
        if self.stored is not None and not isinstance(self.stored, dict):
            raise InputError(f"stored must be what saving wrote, or None; got {self.stored!r}.")
        self.check_layer_options(self.layer_options())
        # JSON writers sort the keys of objects, but the order of the overrides counts: saved as pairs.
        if isinstance(self.overrides, list) and all(
            isinstance(p, list | tuple) and len(p) == 2 for p in self.overrides
        ):
            self.overrides = dict(self.overrides)
        if not isinstance(self.overrides, dict):
            raise InputError(f"overrides must map name patterns to options, got {self.overrides!r}.")
        for pattern, options in self.overrides.items():
            if not isinstance(pattern, str):
                raise InputError(f"overrides must have names for patterns, got {pattern!r}.")
            if not isinstance(options, dict):
                raise InputError(f"overrides[{pattern!r}] must be a dict of layer options, got {options!r}.")
            for key in options:
                if key not in OVERRIDABLE:
                    raise InputError(
                        f"overrides[{pattern!r}] has the unknown option {key!r}; accepted: {', '.join(OVERRIDABLE)}."
                        + suggest(key, OVERRIDABLE)
                    )
            if options.get("attention_bits") is not None:
                check_bits(options["attention_bits"], f"overrides[{pattern!r}]: attention_bits")
            self.check_layer_options({**self.layer_options(), **options}, f"overrides[{pattern!r}]: ")

    @staticmethod
    def check_layer_options(options: dict[str, Any], where: str = "") -> None:
        """Raise `InputError` for a layer option that is not accepted, naming it after the prefix `where`."""
        check_bits(options["weight_bits"], f"{where}weight_bits")
        if options["activation_bits"] is not None:
            check_bits(options["activation_bits"], f"{where}activation_bits (None leaves activations in float)")
        for name in ("per_channel", "integer_zero_point"):
            if not isinstance(options[name], bool):
                raise InputError(f"{where}{name} must be True or False, got {options[name]!r}.")
        kwargs = options["quantizer_kwargs"]
        if not isinstance(kwargs, dict) or not _survives_json(kwargs):
            raise InputError(f"{where}quantizer_kwargs must be a dict that JSON can hold, got {kwargs!r}.")
        own = {"name", *inspect.signature(FakeQuantizer).parameters} - {"delta", "first_range"}
        decided = sorted(own & kwargs.keys())
        if decided:
            raise InputError(
                f"{where}quantizer_kwargs can't hold {', '.join(decided)}, which the config's own fields decide."
            )
        by_role = {"weight": options["quantizer"], "activation": options["activation_quantizer"]}
        by_role["activation"] = by_role["weight"] if by_role["activation"] is None else by_role["activation"]
        for role, name in by_role.items():
            if name not in list_quantizers():
                what = "quantizer" if name == options["quantizer"] else "activation_quantizer"
                raise InputError(
                    f"{where}Unknown {what} {name!r}; registered: {', '.join(list_quantizers())}."
                    + suggest(name, list_quantizers())
                )
            try:
                create_quantizer(name, bits=options["weight_bits"], role=role, **kwargs)
            except InputError as error:
                raise InputError(f"{where}{error}") from error

    def layer_options(self) -> dict[str, Any]:
        """Return the options that apply to a layer which no override and no first/last rule touches."""
        return {name: getattr(self, name) for name in LAYER_FIELDS}

    def depthwise_options(self) -> dict[str, int]:
        """Return what depthwise convolutions have instead of [`layer_options`]."""
        asked = {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits}
        asked = {name: bits for name, bits in asked.items() if bits is not None}
        if self.depthwise_bits is None:
            return {}
        if self.depthwise_bits == "auto":
            return {name: DEPTHWISE_BITS for name, bits in asked.items() if bits <= FEW_BITS}
        return dict.fromkeys(asked, self.depthwise_bits)

    def resolved_residual_bits(self) -> int | None:
        """Return the bits of what residual connections add; `"auto"` leaves it in float where activations are."""
        if self.residual_bits == "auto":
            return None if self.activation_bits is None else RESIDUAL_BITS
        return self.residual_bits

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict of all fields; `overrides` as a list of `[pattern, options]` pairs, in order."""
        return {**asdict(self), "overrides": [[pattern, dict(options)] for pattern, options in self.overrides.items()]}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all fields: a saved config spells out its defaults, so that a later default can't change it."""
        return self.to_dict()

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "QuantizationConfig":
        """Create a config from [`to_dict`]'s result.

        Keys that a newer version of the library wrote are left out with a warning that says so; any other unknown
        key is an error.
        """
        known = {f.name for f in fields(cls)}
        version = config_dict.get("format_version", FORMAT_VERSION)
        unknown = sorted(set(config_dict) - known)
        if isinstance(version, int) and version > FORMAT_VERSION:
            if config_dict.get("stored") is not None:
                raise InputError(
                    f"The weights are stored in format version {version}, this sqakd_hf reads up to {FORMAT_VERSION}. "
                    "Upgrade with `pip install -U sqakd_hf`."
                )
            logger.warning(
                "This quantization config has format version %d, this sqakd_hf reads up to %d and ignores: %s. "
                "Upgrade with `pip install -U sqakd_hf`.",
                version,
                FORMAT_VERSION,
                ", ".join(unknown) or "nothing",
            )
            config_dict = {key: value for key, value in config_dict.items() if key in known - {"format_version"}}
        elif unknown:
            close = "".join(suggest(key, known) for key in unknown)
            raise InputError(f"Unknown quantization config keys: {', '.join(unknown)}.{close}")
        if "format_version" in config_dict:
            # A saved config has all fields: one without these was saved before there was a choice.
            config_dict = {"depthwise_bits": None, "residual_bits": None, **config_dict}
        own = {key: kwargs.pop(key) for key in list(kwargs) if key in known}
        config = cls(**{**config_dict, **own})
        return (config, kwargs) if return_unused_kwargs else config


def _survives_json(value: object) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def matches(name: str, pattern: str) -> bool:
    """Tell whether a dotted module name, or a run of its parts, matches the wildcard pattern.

    Examples:
        >>> matches("timm_model.layer1.0.conv1", "layer1"), matches("layer10.conv", "layer1")
        (True, False)
    """
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def check_patterns(patterns: list[str], names: list[str], where: str) -> None:
    """Raise `InputError` for a pattern that matches none of the module names, with close names."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            parts = sorted({part for name in names for part in (name, *name.split("."))})
            close = difflib.get_close_matches(pattern, parts, n=3, cutoff=0.5)
            hint = f"close names: {', '.join(close)}" if close else f"the first layers are: {', '.join(names[:3])}"
            raise InputError(f"{where}: the pattern {pattern!r} matches no layer; {hint}.")
