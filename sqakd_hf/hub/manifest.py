"""`Manifest`: what a stored student consists of, written into its `config.json` and held against its files."""

import contextlib
import json
import zlib
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .._text import quote, reason
from .._validation import check_bits
from ..conversion.config import LAYER_FIELDS, QuantizationConfig
from ..conversion.plan import LayerPlan, QuantizationPlan
from ..errors import InputError
from ..layers.quantized_layer import WEIGHT_NAMES, quantized_class, weight_of
from ..quantization.packing import checksum, packed_row_bytes


FORMATS = ("packed", "latent")
_ENTRY_FIELDS = {f.name for f in fields(LayerPlan)} - {"name", "num_weights"} | {"weight_shape"}
# What the first files of this format do not say yet.
_LATER_FIELDS = {"macs": None, "bypassed": False, "reads_images": False, "fused": None, "activation_quantizer": None}


@dataclass(frozen=True)
class Manifest:
    """The resolved table of a student's layers and the checksums of its tensors.

    Args:
        format (`str`): `"packed"`, weights as integer codes, or `"latent"`, the float weights that training goes on
            from.
        layers (`dict`): Layer name → its line of the plan, and `weight_shape`.
        tensors (`dict`): Name in the files → [`~sqakd_hf.quantization.packing.checksum`].
        base_model (`str`, *optional*): Hub id of the full-precision model.
        attention (`dict`): Module that computes attention → its line of the plan.
        others (`dict`): Module that multiplies by matrices of its own → its line of the plan, in float.
        residuals (`dict`): Module whose output a residual connection adds or pooling takes → its line of the plan.
    """

    format: str
    layers: dict[str, dict[str, Any]]
    tensors: dict[str, str]
    base_model: str | None = None
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    residuals: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def describe(
        cls,
        format: str,
        plan: QuantizationPlan,
        shapes: dict[str, torch.Size],
        state_dict: dict[str, torch.Tensor],
        base_model: str | None = None,
    ) -> "Manifest":
        """Describe a student about to be saved: its plan, its layers' weight shapes and the tensors as stored."""
        layers = {layer.name: {**_entry(layer), "weight_shape": list(shapes[layer.name])} for layer in plan}
        attention = {line.name: _entry(line) for line in plan.attention}
        tensors = {name: checksum(tensor) for name, tensor in state_dict.items()}
        others = {line.name: {**_entry(line), "num_weights": line.num_weights} for line in plan.others}
        residuals = {line.name: _entry(line) for line in plan.residuals}
        return cls(format, layers, tensors, base_model, attention, others, residuals)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data, with a checksum of its own."""
        return {**asdict(self), "checksum": _json_checksum(asdict(self))}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> "Manifest":
        """Check what [`to_dict`] wrote, and return it.

        Raises:
            `InputError`: Naming the file `where` and the field that is not as it was written.
        """
        where = f"{where}: quantization_config.stored"
        later = {"attention", "others", "residuals"}  # the first files of this format have none of these tables
        expected = {"format", "layers", "tensors", "base_model", "checksum"} | later
        if set(data) | later != expected:
            raise InputError(f"{where} must have the fields {quote(sorted(expected))}, got {quote(sorted(data))}.")
        if data["format"] not in FORMATS:
            raise InputError(f"{where}.format must be {' or '.join(map(repr, FORMATS))}, got {data['format']!r}.")
        body = {key: value for key, value in data.items() if key != "checksum"}
        for name in ("layers", *sorted(later), "tensors"):
            if not isinstance(data.get(name, {}), dict):
                raise InputError(f"{where}.{name} must be an object, got {data[name]!r}.")
        for name, entry in data["layers"].items():
            _check_entry(entry, f"{where}.layers[{name!r}]", _ENTRY_FIELDS)
        for table in ("attention", "residuals"):
            for name, entry in data.get(table, {}).items():
                _check_entry(entry, f"{where}.{table}[{name!r}]", _ENTRY_FIELDS - {"weight_shape"})
        for name, entry in data.get("others", {}).items():
            _check_entry(entry, f"{where}.others[{name!r}]", _ENTRY_FIELDS - {"weight_shape"} | {"num_weights"})
            if type(entry["num_weights"]) is not int or entry["num_weights"] < 0:
                raise InputError(f"{where}.others[{name!r}].num_weights must count, got {entry['num_weights']!r}.")
        if not isinstance(data["base_model"], str | None):
            raise InputError(f"{where}.base_model must be a repository's id or null, got {data['base_model']!r}.")
        if _json_checksum(body) != data["checksum"]:
            raise InputError(
                f"{where} does not match its own checksum: the file is damaged or was edited by hand. "
                "Download or save the student again."
            )
        layers = {name: {**_LATER_FIELDS, **entry} for name, entry in body["layers"].items()}
        return cls(**{**body, "layers": layers})

    def plan_for(self, model: nn.Module, prefix: str, where: str) -> QuantizationPlan:
        """Return the plan for `model`, a freshly built float model that the weights are to be loaded into.

        Args:
            model (`nn.Module`): Also a part of the stored model, such as its backbone, or one that contains it.
            prefix (`str`): The name that models with a head give their backbone.
            where (`str`): The file, for messages.

        Raises:
            `InputError`: A layer that is missing or of another type, unless it is of the head and `model`, of another
                class than was stored, has none.
        """
        modules = dict(model.named_modules())
        head = self._head_missing_in(model, modules, prefix)
        layers = []
        for stored_name, entry in self.layers.items():
            name = self._name_in(modules, stored_name, prefix)
            if stored_name in head:
                continue
            if name is None:
                raise InputError(
                    f"{where}: {type(model).__name__} has no layer {stored_name!r} that the file describes."
                )
            module = modules[name]
            found = type(module).__name__
            if found != entry["layer_type"] or (entry["skipped"] is None and quantized_class(module) is None):
                raise InputError(
                    f"{where}: the layer {stored_name!r} is stored as {entry['layer_type']}, this model has {found}. "
                    "Register the layer type, or use the versions of timm and transformers that it was saved with."
                )
            values = {key: value for key, value in entry.items() if key != "weight_shape"}
            layers.append(LayerPlan(name=name, num_weights=weight_of(module).numel(), **values))
        parts = [layers]
        for table in (self.attention, self.others, self.residuals):
            named = ((self._name_in(modules, stored_name, prefix), entry) for stored_name, entry in table.items())
            parts.append(
                [LayerPlan(**{"num_weights": 0, **entry}, name=name) for name, entry in named if name is not None]
            )
        order = {name: i for i, name in enumerate(modules)}
        return QuantizationPlan(*(tuple(sorted(part, key=lambda line: order[line.name])) for part in parts))

    def _head_missing_in(self, model: nn.Module, modules: dict[str, nn.Module], prefix: str) -> set[str]:
        """Return the stored layers that a class without the head does not have, where `model` is of such a class."""
        if type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
            return set()
        if prefix and prefix not in modules and any(name.startswith(f"{prefix}.") for name in self.layers):
            return {name for name in self.layers if not name.startswith(f"{prefix}.")}
        # timm puts an nn.Identity in the head's place. A class of which all is stored has no use for what it lacks.
        if any(self._name_in(self.tensors, name, prefix) is None for name in model.state_dict()):
            return set()
        return {name for name in self.layers if weight_of(modules.get(self._name_in(modules, name, prefix))) is None}

    def stored_shape(self, name: str, prefix: str) -> torch.Size:
        """Return the weight shape stored for the layer that a model calls `name`."""
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return torch.Size(next(self.layers[n]["weight_shape"] for n in names if n in self.layers))

    def verify(self, files: Iterable[str]) -> None:
        """Hold the tensors of safetensors `files` against the table.

        Raises:
            `InputError`: Naming the file and the tensor that is missing, unknown, doubled or damaged.
        """
        files = list(files)
        found: dict[str, str] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():
                    if name in found:
                        raise InputError(f"{path}: the tensor {name!r} is also in {found[name]}.")
                    if name not in self.tensors:
                        raise InputError(f"{path}: the tensor {name!r} is not part of the student as it was saved.")
                    found[name] = path
                    self._verify_tensor(file.get_tensor(name), name, path)
        if missing := sorted(self.tensors.keys() - found.keys()):
            raise InputError(f"{', '.join(files)}: lacks {quote(missing[:5])}, {len(missing)} of the saved tensors.")

    def _verify_tensor(self, tensor: torch.Tensor, name: str, path: str) -> None:
        layer, _, parameter = name.rpartition(".")
        entry = self.layers.get(layer) if parameter in WEIGHT_NAMES else None
        if self.format == "packed" and entry is not None and entry["skipped"] is None:
            if tensor.dtype != torch.uint8 or tensor.dim() != 1:
                raise InputError(
                    f"{path}: the packed weight {name!r} must be one-dimensional uint8, got {tensor.dtype} "
                    f"{list(tensor.shape)}."
                )
        if "_quantizer." in name and tensor.dtype not in (torch.float32, torch.uint8):
            raise InputError(f"{path}: the range {name!r} must be float32, got {tensor.dtype}.")
        if checksum(tensor) != self.tensors[name]:
            raise InputError(
                f"{path}: the tensor {name!r} is not what was saved: its checksum is {checksum(tensor)}, the table "
                f"says {self.tensors[name]}. The file is damaged, half-written or of another student."
            )

    @staticmethod
    def _name_in(known: Container[str], name: str, prefix: str) -> str | None:
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if prefix else (name,)
        return next((n for n in names if n in known), None)


def packed_shape(shape: torch.Size, channel_axis: int, bits: int) -> tuple[int, int]:
    """Return `(rows, bytes per row)` of the codes of a weight of this shape."""
    rows = shape[channel_axis]
    return rows, packed_row_bytes(shape.numel() // rows, bits)


def _entry(line: LayerPlan) -> dict[str, Any]:
    return {key: value for key, value in asdict(line).items() if key in _ENTRY_FIELDS}


def _check_entry(entry: Any, where: str, names: set[str]) -> None:
    if not isinstance(entry, dict) or set(entry) | set(_LATER_FIELDS) != names:
        raise InputError(f"{where} must have the fields {quote(sorted(names))}, got {entry!r}.")
    if "weight_shape" in names:
        shape = entry["weight_shape"]
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise InputError(f"{where}.weight_shape must be a list of positive integers, got {shape!r}.")
    if entry["skipped"] is None:
        options = {key: {**_LATER_FIELDS, **entry}[key] for key in LAYER_FIELDS}
        if "weight_shape" not in names:
            check_bits(options["activation_bits"], f"{where}.activation_bits")
            options["weight_bits"] = options["activation_bits"]  # there is no weight
        QuantizationConfig.check_layer_options(options, f"{where}.")


def _json_checksum(data: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(data, sort_keys=True).encode()):08x}"


@contextlib.contextmanager
def _opened(path: str) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} can't be read: {reason(error)}. The file is damaged or half-written.") from error
