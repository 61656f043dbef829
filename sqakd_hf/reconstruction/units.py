"""The units of a network: the pieces that are reconstructed one after the other, in the order of execution."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..conversion.config import check_patterns, matches
from ..conversion.trace import evaluating
from ..conversion.watcher import tensors_in
from ..errors import InputError
from ..layers.interception import ADDITIONS
from ..layers.quantized_layer import weight_of
from ..outputs.forward import run_model


# Images that are run to find the units: a number that is hardly the first size of anything else.
TRACED_IMAGES = 5


@dataclass(frozen=True)
class _Slot:
    """Stands in the arguments for the tensor of that number."""

    index: int


class Arguments:
    """The nested arguments of a module, in which tensors that differ by image are told from the rest.

    Args:
        args (`tuple`), kwargs (`dict`): Of one call.
        images (`int`): How many images that was on: tensors of this first size differ by image.
    """

    def __init__(self, args: tuple, kwargs: Mapping[str, Any], images: int):
        leaves, self._spec = pytree.tree_flatten((args, dict(kwargs)))
        self._leaves = []
        self.count = 0
        self.main = 0
        given = main_tensor((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (images,):
                if leaf is given:
                    self.main = self.count
                leaf, self.count = _Slot(self.count), self.count + 1
            self._leaves.append(leaf)

    def columns_of(self, args: tuple, kwargs: Mapping[str, Any], images: int) -> list[torch.Tensor]:
        """Return the tensors that differ by image among the arguments of another call, on so many images.

        Another model of the same architecture may pass switches besides, as its config says: training sets
        `use_cache=False` in that of a transformers model.
        """
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec == self._spec:
            return [leaf for leaf, kept in zip(leaves, self._leaves, strict=True) if isinstance(kept, _Slot)]
        found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (images,)]
        if len(found) != self.count:
            raise InputError(
                f"Student and teacher call a module with {len(found)} and {self.count} tensors of each image: they "
                "can't be compared unit by unit. Take the teacher that the student was made of, configured alike."
            )
        return found

    def with_columns(self, columns: Sequence[torch.Tensor]) -> tuple[tuple, dict[str, Any]]:
        """Return `(args, kwargs)` with these tensors in their place."""
        leaves = [columns[leaf.index] if isinstance(leaf, _Slot) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)


@dataclass(frozen=True)
class Unit:
    """Modules that run one after the other, each on what the one before it returned.

    Args:
        modules (`tuple[str, ...]`): Their names. A residual or transformer block is one module; a stem or a head is
            several: a layer, its normalisation, its activation.
        layers (`tuple[str, ...]`): The names of the quantized layers inside.
        follows (`bool`): Whether it takes exactly what the unit before it returned, and nothing else of each image.
        is_head (`bool`): Whether it returns the class logits of the whole network.
        arguments (`Arguments`): How its first module is called.
    """

    modules: tuple[str, ...]
    layers: tuple[str, ...]
    follows: bool = False
    is_head: bool = False
    arguments: Arguments | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The first module's name, and the last one's where there are several."""
        return self.modules[0] if len(self.modules) == 1 else f"{self.modules[0]} ... {self.modules[-1]}"

    def of(self, model: nn.Module) -> list[nn.Module]:
        """Return the unit's modules in `model`."""
        return [model.get_submodule(name) for name in self.modules]

    def run(self, model: nn.Module, columns: Sequence[torch.Tensor]) -> torch.Tensor:
        """Run the unit of `model` on what differs by image, and return the tensor that it puts out."""
        first, *others = self.of(model)
        args, kwargs = self.arguments.with_columns(columns)
        output = main_tensor(first(*args, **kwargs))
        for module in others:
            output = main_tensor(module(output))
        return output


def main_tensor(value: Any) -> torch.Tensor | None:
    """Return the first floating-point tensor among arguments or outputs, nested in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return None
    return next((found for item in value if (found := main_tensor(item)) is not None), None)


@torch.no_grad()
def find_units(
    model: nn.Module,
    layers: Collection[str],
    inputs: Mapping[str, torch.Tensor],
    patterns: Sequence[str] | None = None,
) -> list[Unit]:
    """Return the units of a float `model` in the order of execution.

    Blocks are found by what they do: a module that itself adds two activations of the same shape (a residual
    connection) is one, and so are its siblings, those whose names differ by numbers alone. Where such modules are
    inside one another, the block is the innermost of those that are repeated. Each layer outside of blocks begins a
    unit of its own, together with the normalisation and the activation that follow it; what follows the last block up
    to the logits is one unit.

    Args:
        model (`nn.Module`): The teacher: a float model with the student's module names.
        layers (`Collection[str]`): The names of the student's quantized layers.
        inputs (`dict`): `TRACED_IMAGES` images as `pixel_values`, see [`~sqakd_hf.outputs.forward.run_model`].
        patterns (`list[str]`, *optional*): The blocks, by name, instead of those that are found.

    Raises:
        `InputError`: A pattern that matches no module which runs once and returns a tensor.
    """
    with evaluating(model), _Watcher(model) as watcher:
        output = run_model(model, inputs)
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    names = [name for name in watcher.calls if name and watcher.runs_once(name)]
    blocks = _named_blocks(names, patterns) if patterns else _residual_blocks(names, watcher.added, layers)
    blocks = [name for name in blocks if any(is_inside(layer, name) for layer in layers)]
    pieces = [name for name in _pieces(model, set(blocks)) if watcher.runs_once(name)]
    pieces.sort(key=watcher.order)
    chains: list[list[str]] = []
    for name in pieces:
        chain = chains[-1] if chains else []
        joins = (
            chain
            and name not in blocks
            and chain[-1] not in blocks
            and watcher.follows(name, chain[-1])
            and not (_has_layer(model, name) and any(_has_layer(model, other) for other in chain))
        )
        if joins:
            chain.append(name)
        else:
            chains.append([name])
    _join_head(chains, blocks, watcher, logits)
    units: list[Unit] = []
    for chain in chains:
        inside = tuple(layer for layer in layers if any(is_inside(layer, name) for name in chain))
        if not inside and not any(_has_batch_norm(model, name) for name in chain):
            continue
        units.append(
            Unit(
                tuple(chain),
                inside,
                follows=bool(units) and watcher.follows(chain[0], units[-1].modules[-1]),
                is_head=logits is not None and watcher.output_of(chain[-1]) is logits and logits.dim() == 2,
                arguments=watcher.arguments_of(chain[0], len(inputs["pixel_values"])),
            )
        )
    return units


def require_units(units: Sequence[Unit], layers: Collection[str], what: str) -> None:
    """Raise `InputError` where no unit holds a quantized layer."""
    if not any(unit.layers for unit in units):
        raise InputError(
            f"{what} has nothing to reconstruct: none of its {len(layers)} quantized layers is in a module that runs "
            "once and returns a tensor."
        )


class _Watcher(TorchFunctionMode):
    """Sees which modules run, on what tensors, and which of them add activations."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.calls: dict[str, list[tuple[int, tuple, dict, Any]]] = {}
        self.added: set[str] = set()
        self._active: list[str] = []
        self._count = 0
        self._handles: list[Any] = []

    def __enter__(self) -> "_Watcher":
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name)))
            self._handles.append(module.register_forward_hook(self._leaving(name), with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str):
        def hook(_module: nn.Module, _args: tuple) -> None:
            self._active.append(name)
            self._count += 1
            self.calls.setdefault(name, []).append((self._count, (), {}, None))

        return hook

    def _leaving(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self._active.pop()
            self.calls[name][-1] = (self.calls[name][-1][0], args, kwargs, output)

        return hook

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in ADDITIONS and self._active:
            operands = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
            if len(operands) == 2 and operands[0].shape == operands[1].shape and operands[0].dim() > 2:
                self.added.add(self._active[-1])
        return func(*args, **(kwargs or {}))

    def runs_once(self, name: str) -> bool:
        """Tell whether a module was called once, with a tensor, and returned one."""
        calls = self.calls.get(name, [])
        return len(calls) == 1 and main_tensor(calls[0][1:3]) is not None and main_tensor(calls[0][3]) is not None

    def order(self, name: str) -> int:
        return self.calls[name][0][0]

    def output_of(self, name: str) -> torch.Tensor | None:
        return main_tensor(self.calls[name][0][3])

    def arguments_of(self, name: str, images: int) -> Arguments:
        _, args, kwargs, _ = self.calls[name][0]
        return Arguments(args, kwargs, images)

    def follows(self, name: str, before: str) -> bool:
        """Tell whether a module takes what another one returned, and no other tensor that differs by image."""
        _, args, kwargs, _ = self.calls[name][0]
        given = main_tensor((args, kwargs))
        others = [x for x in tensors_in((args, kwargs)) if x is not given and x.shape[:1] == given.shape[:1]]
        return given is self.output_of(before) and not others


def is_inside(name: str, outer: str) -> bool:
    """Tell whether a module is another one or in it, by their names."""
    return name == outer or name.startswith(f"{outer}.")


def _outermost(names: Collection[str]) -> list[str]:
    return [name for name in names if not any(is_inside(name, other) and name != other for other in names)]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _residual_blocks(names: Sequence[str], added: Collection[str], layers: Collection[str]) -> list[str]:
    """Return the modules that are residual blocks, and their siblings."""
    adders = {name for name in names if name in added and any(is_inside(layer, name) for layer in layers)}
    for outer in sorted(adders, key=len, reverse=True):
        inner = [_without_numbers(name) for name in adders if is_inside(name, outer) and name != outer]
        # What holds several blocks of a kind is no block; what holds one adder of each kind (attention that adds a
        # bias by position, say) is.
        if len(inner) > len(set(inner)):
            adders.discard(outer)
    kinds = {_without_numbers(name) for name in _outermost(adders)}
    return _outermost([name for name in names if _without_numbers(name) in kinds])


def _named_blocks(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the outermost modules that match one of the patterns."""
    check_patterns(list(patterns), list(names), "units")
    return _outermost([name for name in names if any(matches(name, pattern) for pattern in patterns)])


def _pieces(model: nn.Module, blocks: Collection[str], name: str = "") -> list[str]:
    """Return the blocks, and outside of them layers, norms and whatever holds none of these, as large as can be."""
    if name in blocks:
        return [name]
    module = model.get_submodule(name)
    whole = name and not any(is_inside(block, name) for block in blocks)
    if whole and (weight_of(module) is not None or _is_norm(module) or not _has_layer(model, name)):
        if weight_of(module) is not None or _is_norm(module) or not _has_batch_norm(model, name):
            return [name]
    prefix = f"{name}." if name else ""
    return [piece for child, _ in module.named_children() for piece in _pieces(model, blocks, prefix + child)]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _has_layer(model: nn.Module, name: str) -> bool:
    return any(weight_of(module) is not None for module in model.get_submodule(name).modules())


def _has_batch_norm(model: nn.Module, name: str) -> bool:
    return any(_is_norm(module) for module in model.get_submodule(name).modules())


def _join_head(
    chains: list[list[str]], blocks: Collection[str], watcher: _Watcher, logits: torch.Tensor | None
) -> None:
    """Make one chain, in place, of those behind the last block that lead to the logits."""
    if logits is None or not chains or watcher.output_of(chains[-1][-1]) is not logits:
        return
    while (
        len(chains) > 1
        and blocks
        and not set(chains[-2]) & set(blocks)
        and any(set(chain) & set(blocks) for chain in chains[:-2])
        and watcher.follows(chains[-1][0], chains[-2][-1])
    ):
        chains[-2:] = [chains[-2] + chains[-1]]
