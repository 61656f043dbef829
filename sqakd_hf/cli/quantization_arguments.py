"""What commands ask about the quantization."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import HfArgumentParser

from ..configuration import QuantizationConfig
from ..errors import InputError


@dataclass
class QuantizationArguments:
    """The fields of [`~sqakd_hf.QuantizationConfig`], as text where a number may be `none`."""

    quantizer: str = field(default="lsq", metadata={"help": "dorefa, ewgs, lsq, lsq+, pact or statsq"})
    weight_bits: str = field(default="2", metadata={"help": "1 to 8"})
    activation_bits: str = field(default="2", metadata={"help": "1 to 8, or none for float"})
    first_last_bits: str = field(default="8", metadata={"help": "1 to 8, or none for full precision as in the paper"})
    attention_bits: str = field(
        default="none", metadata={"help": "1 to 8 for q, k, v and softmax outputs, or none for float"}
    )
    residual_bits: str = field(
        default="none",
        metadata={"help": "1 to 8 for what residual connections of convolutions add, or none for float"},
    )
    per_channel: bool = field(default=True, metadata={"help": "one weight range per output channel"})
    integer_zero_point: bool = field(default=True, metadata={"help": "keep zero exactly on the activations' grid"})
    overrides: str = field(default="{}", metadata={"help": 'JSON: {"layer4": {"weight_bits": 4}}'})
    modules_to_not_convert: list[str] = field(default_factory=list, metadata={"help": "name patterns left in float"})
    quantizer_kwargs: str = field(default="{}", metadata={"help": 'JSON options of the quantizer: {"delta": 0.01}'})

    def given(self) -> list[str]:
        """Return the names of the arguments that are not at their defaults."""
        defaults = asdict(QuantizationArguments())
        return [name for name, value in asdict(self).items() if value != defaults[name]]

    def to_config(self) -> QuantizationConfig:
        """Return the configuration that the arguments describe."""
        options = asdict(self)
        for name in ("weight_bits", "activation_bits", "first_last_bits", "attention_bits", "residual_bits"):
            text = options[name]
            options[name] = None if text.lower() == "none" else int(text) if text.isdecimal() else text
        for name in ("overrides", "quantizer_kwargs"):
            options[name] = parse_json(name, options[name])
        return QuantizationConfig(**options)


def parse_with_quantization(
    kind: type, program: str, description: str | None, argv: Sequence[str]
) -> tuple[Any, QuantizationArguments]:
    """Return a command's own arguments, an instance of `kind`, and those of the quantization.

    The model is a positional argument, as in the commands that do not ask about the quantization.
    """
    parser = HfArgumentParser(
        (kind, QuantizationArguments),
        prog=program,
        usage=f"{program} MODEL [--ARGUMENT VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = [f"--model={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else argv
    return parser.parse_args_into_dataclasses(model)


def parse_json(name: str, text: str) -> dict[str, Any]:
    """Return the object that an argument holds."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--{name} must be a JSON object, got {text!r} ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"--{name} must be a JSON object, got {text!r}.")
    return value
