"""What commands ask about the quantization."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers import HfArgumentParser

from .._text import suggest
from ..conversion.config import QuantizationConfig
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
        default="auto",
        metadata={
            "help": "1 to 8 for what residual connections of convolutions add and global pooling takes, none for "
            "float; auto: 8, which engines want"
        },
    )
    depthwise_bits: str = field(
        default="auto",
        metadata={"help": "1 to 8 for depthwise convolutions, auto for 8 where 4 or fewer were asked, or none"},
    )
    activation_quantizer: str = field(
        default="auto",
        metadata={"help": "another quantizer for activations, or none; auto: lsq+ with lsq, none with others"},
    )
    per_channel: bool = field(default=True, metadata={"help": "one weight range per output channel"})
    integer_zero_point: bool = field(default=True, metadata={"help": "keep zero exactly on the activations' grid"})
    overrides: str = field(default="{}", metadata={"help": 'JSON: {"layer4": {"weight_bits": 4}}'})
    modules_to_not_convert: list[str] = field(default_factory=list, metadata={"help": "name patterns left in float"})
    quantizer_kwargs: str = field(default="{}", metadata={"help": 'JSON options of the quantizer: {"delta": 0.01}'})

    def to_config(self, as_published: bool = False) -> QuantizationConfig:
        """Return the configuration that the arguments describe.

        Args:
            as_published (`bool`, *optional*, defaults to `False`): Make of `auto` what the papers have: activations by
                the weights' quantizer, and residual connections in float. Else `lsq` has the activations of `lsq+`,
                whose range has two ends.
        """
        options = asdict(self)
        names = [name for name in options if name.endswith("_bits")]
        for name in (*names, "activation_quantizer"):
            text = options[name]
            options[name] = None if text.lower() == "none" else int(text) if text.isdecimal() else text
        if self.activation_quantizer == "auto":
            options["activation_quantizer"] = "lsq+" if self.quantizer == "lsq" and not as_published else None
        if self.residual_bits == "auto" and as_published:
            options["residual_bits"] = None
        for name in ("overrides", "quantizer_kwargs"):
            options[name] = parse_json(name, options[name])
        return QuantizationConfig(**options)


def parse_with_quantization(
    kind: type, program: str, description: str | None, argv: Sequence[str]
) -> tuple[Any, QuantizationArguments, list[str]]:
    """Return a command's own arguments, an instance of `kind`, those of the quantization, and those of these given.

    The model is a positional argument, as in the commands that do not ask about the quantization.
    """
    parser = HfArgumentParser(
        (kind, QuantizationArguments),
        prog=program,
        usage=f"{program} MODEL [--ARGUMENT VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arguments = [f"--model={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else list(argv)
    named = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    if not {"--model", "--help"} & {*named, *("--help" for argument in arguments if argument == "-h")}:
        raise InputError(f"{program} needs a model: {program} MODEL, a folder, a Hub id or timm/NAME.")
    options, quantization, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        raise InputError(
            f"{program} has no argument {unknown[0]!r}; `{program} --help` lists them."
            f"{suggest(unknown[0].split('=')[0], known)}"
        )
    names = {name.lstrip("-").replace("-", "_").removeprefix("no_") for name in named}
    return options, quantization, [each.name for each in fields(quantization) if each.name in names]


def parse_json(name: str, text: str) -> dict[str, Any]:
    """Return the object that an argument holds."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--{name} must be a JSON object, got {text!r} ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"--{name} must be a JSON object, got {text!r}.")
    return value
