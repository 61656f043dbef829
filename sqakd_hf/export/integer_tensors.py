"""Where the integers of a weight or a quantizer are in an exported graph."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Placement:
    """What became of one symbol.

    Args:
        name (`str`): The module in the student: a layer, for its weight, or a quantizer.
        kind (`str`): `"weight"` or `"activation"`.
        levels (`int`): Number of codes.
        storage (`str`): The type of the integers, such as `"int8"`.
        tensor (`str`): The graph's name of the integers.
        factor, offset (`int`): `integer = factor * code + offset`; each channel of a weight may have a whole multiple
            of that, negative where the slope of the BatchNorm that was folded into it is.
        channel_axis (`int`, *optional*): The axis of a weight's output channels.
        call (`int`): Which use of the quantizer it is, from 0, where a layer is called several times.
        reason (`str`, *optional*): Why the values are computed by float operations instead of DequantizeLinear.
    """

    name: str
    kind: str
    levels: int
    storage: str
    tensor: str
    factor: int = 1
    offset: int = 0
    channel_axis: int | None = None
    reason: str | None = None
    call: int = 0

    def to_dict(self) -> dict[str, str | int]:
        """Return the arguments that make this placement, but for those at their defaults."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) != item.default}
