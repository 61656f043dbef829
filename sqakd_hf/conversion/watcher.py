"""Sees every operation of a forward pass, and keeps which layer each tensor comes from."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..layers.interception import ADDITIONS, PRODUCTS, SOFTMAX, WEIGHTED, input_and_weight
from ..layers.quantized_layer import QuantizedLayer, quantized_class, weight_of


IMAGE = ""  # what tensors that no layer has touched come from; layers have names


@dataclass
class Trace:
    """What a forward pass of one image showed.

    Attributes:
        macs (`dict[str, int]`): Layer → multiply-accumulates; the keys are the layers that ran, in order.
        first, last (`set[str]`): Layers that the image reaches before any other; layers that the output leaves from.
        bypassed (`dict[str, str]`): Layer whose weight another module applies itself → that module.
        misused (`dict[str, str]`): Layer whose weight is used in a way that nothing can stand in for → that use.
        attention (`dict[str, str | None]`): Module that multiplies activations by each other → `None` where that is
            attention whose operands can be told apart, or why not.
        attention_macs (`dict[str, int]`): Module → multiply-accumulates of its products of activations.
        residuals (`dict[str, str | None]`): Module that puts out a feature map of convolutions which is added to
            another one or pooled to one number a channel, or is such a sum and goes into a layer → `None`; or a module
            that adds what no module of its own puts out → that reason.
        by_convolutions (`set[str]`): Those of `residuals` whose map one convolution puts out, with nothing but what
            engines compute along with it.
        others (`dict[str, tuple[int, int]]`): Module that multiplies by matrices of its own without being a layer
            (recurrent networks, bare parameters) → elements of these matrices, multiply-accumulates.
    """

    macs: dict[str, int] = field(default_factory=dict)
    first: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)
    bypassed: dict[str, str] = field(default_factory=dict)
    misused: dict[str, str] = field(default_factory=dict)
    attention: dict[str, str | None] = field(default_factory=dict)
    attention_macs: dict[str, int] = field(default_factory=dict)
    residuals: dict[str, str | None] = field(default_factory=dict)
    by_convolutions: set[str] = field(default_factory=set)
    others: dict[str, tuple[int, int]] = field(default_factory=dict)


class Watcher(TorchFunctionMode):
    """Sees every torch function and every module of one forward.

    Each tensor is marked with the layers it comes from most recently: through operations marks are united, a layer
    replaces them by its own name. Tensors made of one weight alone (transposed, reshaped) are marked with its owner.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.model, self.layers = model, layers
        self.trace = Trace()
        self.active: list[str] = []  # names of the modules whose forward is running
        self.owner = {id(weight_of(module)): name for name, module in layers.items()}
        self.loose = {
            id(parameter): name
            for name, module in model.named_modules()
            for parameter in module.parameters(recurse=False)
            if parameter.dim() > 1 and id(parameter) not in self.owner
        }
        self.used: dict[str, dict[int, int]] = {}  # module → its loose matrices that were used, by id → elements
        self.used_macs: dict[str, int] = {}
        self.products: dict[str, list[str]] = {}
        self.within: dict[str, list[str]] = {}  # the same, of the modules inside as well
        self.reached: dict[str, set[str]] = {}
        self.calls: dict[str, int] = {}
        self.added: list[tuple[str, list[str]]] = []  # module that adds → those that put the operand out, inner first
        self.pooled: list[list[str]] = []  # the same, of what is pooled
        self.fused: list[list[str]] = []  # those of both that a convolution puts out

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                for handle in (
                    module.register_forward_pre_hook(self._enter(name), with_kwargs=True),
                    module.register_forward_hook(self._leave(name), with_kwargs=True),
                ):
                    stack.callback(handle.remove)
            stack.enter_context(self)
            yield

    def _enter(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.active.append(name)
            self.calls[name] = self.calls.get(name, 0) + 1
            if name in self.layers:
                self._reach(name, [args, kwargs])
                for tensor in tensors_in([args, kwargs]):
                    if getattr(tensor, "_sqakd_sum", False):
                        self.added.append(("", list(_returned_by(tensor))))

        return hook

    def _leave(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.active.pop()
            if name in self.layers:
                self._ran(name, [*args, *kwargs.values()], output)
            if name and isinstance(output, torch.Tensor):
                output._sqakd_returned_by = [*_returned_by(output), name]

        return hook

    def _reach(self, name: str, inputs: Any) -> None:
        self.reached.setdefault(name, set()).update(*map(_sources, tensors_in(inputs)))

    def _ran(self, name: str, inputs: list[Any], output: Any) -> None:
        cls = quantized_class(self.layers[name])
        outputs = tensors_in(output)
        if outputs:
            count = (cls or QuantizedLayer).count_macs
            self._add_macs(name, count(weight_of(self.layers[name]), tensors_in(inputs), outputs[0]))
        for tensor in outputs:
            set_sources(tensor, frozenset([name]))
            tensor._sqakd_fused = weight_of(self.layers[name]).dim() == tensor.dim() == 4

    def _add_macs(self, layer: str, macs: int) -> None:
        self.trace.macs[layer] = self.trace.macs.get(layer, 0) + macs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_residual = func in ADDITIONS and self._watch_addition([args, kwargs])
        # Read before an operation in place marks its input anew.
        fused = [tensor for tensor in tensors_in(args[:1]) if getattr(tensor, "_sqakd_fused", False)]
        output = func(*args, **kwargs)
        outputs = tensors_in(output)
        if func in POOLS and fused and _is_pooled(outputs[0], fused[0]):
            self.pooled.append(list(_returned_by(fused[0])))
            self.fused.append(self.pooled[-1])
        if not outputs and not tensors_in(args):
            return output
        inputs = tensors_in([args, kwargs])
        sources = frozenset().union(*map(_sources, inputs))
        name = getattr(func, "__name__", str(func))
        for tensor in inputs:
            layer = self.owner.get(id(tensor))
            if layer is not None and layer not in self.active and outputs:
                sources = self._foreign_use(layer, func, args, kwargs, outputs, sources)
        self._watch_weights(func, name, args, kwargs, inputs, outputs)
        self._watch_products(func, args, inputs, outputs)
        for tensor in outputs:
            if not isinstance(tensor, nn.Parameter):
                # An activation of a sum is still what the next layer and the next addition take.
                same = len(inputs) == 1 and inputs[0].shape == tensor.shape
                tensor._sqakd_sum = is_residual or (same and getattr(inputs[0], "_sqakd_sum", False))
                tensor._sqakd_returned_by = []
                tensor._sqakd_fused = bool(fused) and func in FUSED
        changed = [*outputs, args[0]] if name == "__setitem__" and isinstance(args[0], torch.Tensor) else outputs
        for tensor in changed:
            if not isinstance(tensor, nn.Parameter):
                set_sources(tensor, sources)
        return output

    def _watch_addition(self, args: list) -> bool:
        """Note what put out the operands of an addition, and tell whether both are feature maps of convolutions."""
        operands = tensors_in(args)
        if len(operands) != 2 or any(x.dim() != 4 or x.shape != operands[0].shape for x in operands):
            return False
        sources = [self.layers.get(name) for x in operands for name in _sources(x)]
        if not sources or any(layer is None or weight_of(layer).dim() != 4 for layer in sources):
            return False
        user = self.active[-1] if self.active else ""
        self.added += [(user, list(_returned_by(x))) for x in operands]
        self.fused += [list(_returned_by(x)) for x in operands if getattr(x, "_sqakd_fused", False)]
        return True

    def _foreign_use(
        self, layer: str, func, args: tuple, kwargs: dict, outputs: list, sources: frozenset
    ) -> frozenset:
        """Note that the weight of `layer` is used outside of its own forward; return what the outputs come from."""
        user = self.active[-1] if self.active else ""
        if layer.rpartition(".")[0] == user and user in self.layers:
            # A layer within a layer, such as the output projection of nn.MultiheadAttention, is called by it.
            self._reach(layer, [])
            self._ran(layer, [], outputs[0])
        elif func in WEIGHTED and input_and_weight(args, kwargs)[1] is weight_of(self.layers[layer]):
            x, _ = input_and_weight(args, kwargs)
            self._reach(layer, x)
            self._ran(layer, [x], outputs[0])
            if self.trace.bypassed.setdefault(layer, user) != user:
                self.trace.misused[layer] = f"several modules use its weight: {self.trace.bypassed[layer]}, {user}"
            return frozenset([layer])
        elif layer not in self.trace.misused:
            self.trace.misused[layer] = (
                f"{user or type(self.model).__name__} uses its weight in {getattr(func, '__name__', func)}"
            )
        return sources

    def _weight_behind(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """Return the owner and the id of the weight that `tensor` is, or is made of."""
        owner = self.owner.get(id(tensor), self.loose.get(id(tensor)))
        return getattr(tensor, "_sqakd_weight", None) if owner is None else (owner, id(tensor))

    def _watch_weights(self, func, name: str, args: tuple, kwargs: dict, inputs: list, outputs: list) -> None:
        """Count products with matrices that no layer of their own applies."""
        if func in WEIGHTED:
            operands = [input_and_weight(args, kwargs)[1]]
        elif func in PRODUCTS or name in _TAKE_MANY:
            # Query, key and value come first: a learned query is no matrix.
            operands = inputs[3:] if func is F.multi_head_attention_forward else inputs
        else:
            behind = {self._weight_behind(tensor) for tensor in inputs}
            if len(behind) == 1 and None not in behind:
                for tensor in outputs:
                    tensor._sqakd_weight = next(iter(behind))
            return
        for tensor in operands:
            behind = self._weight_behind(tensor)
            if behind is None or (behind[0] in self.layers and behind[0] in self.active):
                continue
            owner, key = behind
            if name in _TAKE_MANY:
                macs = tensor.numel() * (outputs[0].numel() // outputs[0].shape[-1])
            elif func in WEIGHTED:
                macs = QuantizedLayer.count_macs(tensor, [], outputs[0])
            else:
                macs = outputs[0].numel() * _contracted(func, args, inputs)
            if owner not in self.layers:
                self.used.setdefault(owner, {})[key] = tensor.numel()
                self.used_macs[owner] = self.used_macs.get(owner, 0) + macs
            elif owner in self.trace.misused and not (func in WEIGHTED and id(tensor) in self.owner):
                self._add_macs(owner, macs)

    def _watch_products(self, func, args: tuple, inputs: list, outputs: list) -> None:
        user = self.active[-1] if self.active else ""
        if func in SOFTMAX and outputs:
            outputs[0]._sqakd_probability = True
            self._note("softmax", user)
        elif func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward:
            self._note("attention", user)
            if func is F.scaled_dot_product_attention:
                query, key, value = inputs[:3]
                macs = query.numel() * key.shape[-2] + query.numel() // query.shape[-1] * value.numel() // math.prod(
                    value.shape[:-2]
                )
            else:  # (L, B, E), (S, B, E)
                macs = 2 * inputs[0].numel() * inputs[1].shape[0]
            self._add_attention_macs(user, macs)
        elif func in PRODUCTS and len(inputs) >= 2:
            if any(self._weight_behind(tensor) for tensor in inputs):
                self._note("weights", user)
                return
            by_softmax = any(getattr(tensor, "_sqakd_probability", False) for tensor in inputs)
            self._note("values" if by_softmax else "scores", user)
            self._add_attention_macs(user, outputs[0].numel() * _contracted(func, args, inputs))
        elif inputs and getattr(inputs[0], "_sqakd_probability", False):
            for tensor in outputs:
                tensor._sqakd_probability = True

    def _note(self, kind: str, user: str) -> None:
        self.products.setdefault(user, []).append(kind)
        for name in dict.fromkeys([*self.active, user]):
            self.within.setdefault(name, []).append(kind)

    def _add_attention_macs(self, user: str, macs: int) -> None:
        self.trace.attention_macs[user] = self.trace.attention_macs.get(user, 0) + macs

    def finish(self, output: Any, images: int) -> Trace:
        trace = self.trace
        trace.first = {name for name, sources in self.reached.items() if sources == {IMAGE}}
        if isinstance(output, Mapping):
            heads = {k: v for k, v in output.items() if "logits" in k or k.startswith("pred_")}
            output = heads or output
        trace.last = set().union(*map(_sources, tensors_in(output))) - {IMAGE}
        for counts in (trace.macs, trace.attention_macs):
            counts.update({name: count // images for name, count in counts.items()})
        trace.others = {name: (sum(used.values()), self.used_macs[name] // images) for name, used in self.used.items()}
        for user, modules in [*self.added, *(("", modules) for modules in self.pooled)]:
            if (name := self._put_out_by(modules)) is not None:
                trace.residuals[name] = None
            elif user:
                trace.residuals.setdefault(user, "it adds what is the output of no module of its own")
        trace.by_convolutions = {self._put_out_by(modules) for modules in self.fused} & trace.residuals.keys()
        trace.attention = {
            name: self._why_not_attention(name)
            for name, products in self.products.items()
            if {"attention", "values", "scores"} & set(products)
        }
        return trace

    def _put_out_by(self, modules: list[str]) -> str | None:
        """Return the innermost of these modules that does no more than put out one tensor."""
        # A module that is called several times (a shared activation) puts out other things as well.
        once = [name for name in modules if self.calls[name] == 1]
        named = (name for name in once if not isinstance(self.model.get_submodule(name), nn.Identity))
        return next(named, once[0] if once else None)

    def _why_not_attention(self, name: str) -> str | None:
        products = [kind for kind in self.products[name] if kind != "softmax"]
        if "attention" not in products and "values" not in products:
            return "it multiplies activations without a softmax between"
        # The softmax may be a module of its own, inside.
        whole = {("attention",): ["attention"], ("scores", "values"): ["scores", "softmax", "values"]}
        if tuple(products) not in whole:
            return f"it computes the products {', '.join(products)}"
        if self.within[name] != whole[tuple(products)]:
            return "modules inside it compute products or softmaxes as well"
        return None


# What engines compute as a part of the convolution before it.
_RELUS = {F.relu, F.relu6, F.hardtanh, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}
_CLAMPS = {torch.clamp, torch.Tensor.clamp, torch.Tensor.clamp_}
FUSED = {F.batch_norm, F.max_pool2d, *_RELUS, *_CLAMPS}
_MEANS = {torch.mean, torch.Tensor.mean, torch.amax, torch.Tensor.amax}
POOLS = {F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, *_MEANS}
# Functions that take many matrices at once.
_TAKE_MANY = {"lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"}


def _contracted(func, args: tuple, operands: list[torch.Tensor]) -> int:
    """Return how many products are summed for one element of the result."""
    if func is not torch.einsum:
        return operands[0].shape[-1]
    equation = args[0]
    if not isinstance(equation, str) or "->" not in equation:
        return 1
    terms, result = equation.replace(" ", "").split("->")
    sizes = dict(zip("".join(terms.split(",")), [n for t in operands for n in t.shape], strict=False))
    return math.prod(size for letter, size in sizes.items() if letter not in result)


def _is_pooled(output: torch.Tensor, x: torch.Tensor) -> bool:
    """Tell whether one number is left of each channel of a map `(B, C, H, W)`."""
    return output.shape[:2] == x.shape[:2] and output.numel() == math.prod(x.shape[:2])


def _sources(tensor: torch.Tensor) -> frozenset[str]:
    return getattr(tensor, "_sqakd_sources", frozenset())


def _returned_by(tensor: torch.Tensor) -> list[str]:
    return getattr(tensor, "_sqakd_returned_by", [])


def set_sources(tensor: torch.Tensor, sources: frozenset[str]) -> None:
    tensor._sqakd_sources = sources


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]
