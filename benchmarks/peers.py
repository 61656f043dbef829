"""Other projects' fake quantization of every convolution and linear layer, for the benchmarks.

Each function takes a float model, which it may change, images to calibrate on and the bits of weights and activations,
and returns the model that trains, ranges learned where the project learns them. `PEERS` names them; one whose package
is not installed is left out of the tables, and said so.
"""

import contextlib
import copy
import importlib.metadata
import io
import warnings
from collections.abc import Callable

import torch
from torch import nn

from sqakd_hf import SQAKDTrainer


class Unsupported(Exception):
    """The project has no such layer or width."""


def replace_layers(model: nn.Module, build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace every convolution and linear layer of `model` by what `build` makes of it."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, build(layer))
    return model


def inputs_below_zero(model: nn.Module, images: torch.Tensor) -> set[nn.Module]:
    """Return the convolutions and linear layers whose input, on these images, is negative somewhere."""
    found, handles = set(), []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            handles.append(layer.register_forward_pre_hook(lambda m, args: args[0].min() < 0 and found.add(m) or None))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def brevitas(model: nn.Module, images: torch.Tensor, bits: int) -> nn.Module:
    from brevitas import nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    options = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": bits,
        "weight_scaling_impl_type": "parameter_from_stats",
        "input_bit_width": bits,
        "input_collect_stats_steps": 1,  # after it the scale is a parameter
    }

    signed = inputs_below_zero(model, images)

    def build(layer: nn.Module) -> nn.Module:
        own = {**options, "input_quant": Int8ActPerTensorFloat if layer in signed else Uint8ActPerTensorFloat}
        if isinstance(layer, nn.Linear):
            twin = qnn.QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, **own)
        else:
            shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            twin = qnn.QuantConv2d(*shape, layer.dilation, layer.groups, bias=layer.bias is not None, **own)
        twin.load_state_dict(layer.state_dict(), strict=False)
        return twin

    return replace_layers(model, build).to(images.device)


class _TorchAO(nn.Module):
    """A layer with torch.ao's fake quantizers: its own QAT layers leave the input to the layer before."""

    def __init__(self, layer: nn.Module, weight_quantizer: nn.Module, input_quantizer: nn.Module):
        super().__init__()
        self.layer, self.weight_quantizer, self.input_quantizer = layer, weight_quantizer, input_quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def torch_ao(model: nn.Module, images: torch.Tensor, bits: int) -> nn.Module:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

    def build(layer: nn.Module) -> nn.Module:
        weight = FakeQuantize(
            MovingAveragePerChannelMinMaxObserver,
            -(2 ** (bits - 1)),
            2 ** (bits - 1) - 1,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )
        return _TorchAO(layer, weight, FakeQuantize(MovingAverageMinMaxObserver, 0, 2**bits - 1, dtype=torch.quint8))

    return replace_layers(model, build).to(images.device)


def torch_ao_learnable(model: nn.Module, images: torch.Tensor, bits: int) -> nn.Module:
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    def build(layer: nn.Module) -> nn.Module:
        weight = _LearnableFakeQuantize(
            MovingAveragePerChannelMinMaxObserver,
            -(2 ** (bits - 1)),
            2 ** (bits - 1) - 1,
            channel_len=layer.weight.shape[0],
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            use_grad_scaling=True,
        )
        inputs = _LearnableFakeQuantize(
            MovingAverageMinMaxObserver, 0, 2**bits - 1, dtype=torch.quint8, use_grad_scaling=True
        )
        return _TorchAO(layer, weight, inputs)

    model = replace_layers(model, build).to(images.device)
    model(images)  # observed once, learned from then on
    for module in model.modules():
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_param_learning()
    return model


def nncf(model: nn.Module, images: torch.Tensor, bits: int) -> nn.Module:
    import nncf

    if bits != 8:
        raise Unsupported("8 bits only")
    return nncf.quantize(model, nncf.Dataset([images]), subset_size=1)


def modelopt(model: nn.Module, images: torch.Tensor, bits: int) -> nn.Module:
    from modelopt.torch import quantization as mtq

    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}, "enable": True},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": bits, "axis": None}, "enable": True},
        ],
        "algorithm": "max",
    }
    return mtq.quantize(model, config, lambda model: model(images))


def torchao(model: nn.Module, images: torch.Tensor, bits: int) -> nn.Module:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    if sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) > 1:
        raise Unsupported("no convolutions")
    kind = getattr(torch, f"int{bits}")

    def build(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Conv2d):
            return layer  # the patch embedding
        return FakeQuantizedLinear.from_linear(
            layer,
            IntxFakeQuantizeConfig(kind, "per_token", is_symmetric=False),
            IntxFakeQuantizeConfig(kind, "per_channel", is_symmetric=True),
        )

    return replace_layers(model, build).to(images.device)


# By name in the table: package on the index, function, and what to know when comparing.
PEERS: dict[str, tuple[str, Callable, str]] = {
    "Brevitas": ("brevitas", brevitas, "learned ranges"),
    "torch.ao learnable": ("torch", torch_ao_learnable, "learned ranges"),
    "NNCF": ("nncf", nncf, "learned ranges"),
    "torch.ao": ("torch", torch_ao, "ranges observed, not learned"),
    "torchao Intx": ("torchao", torchao, "linear layers only, ranges not learned"),
    "ModelOpt": ("nvidia-modelopt", modelopt, "frozen ranges, gradient not clipped"),
}


def build_peers(model: nn.Module, images: torch.Tensor, bits: int) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the peers' models by the name of their row, and a line for each that can't take part."""
    models, absent = {}, []
    for name, (package, build, what) in PEERS.items():
        try:
            name = f"{name} {importlib.metadata.version(package)}"
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                models[f"{name} W{bits}A{bits} ({what})"] = build(copy.deepcopy(model), images, bits).train()
        except importlib.metadata.PackageNotFoundError:
            absent.append(f"{name} is not installed: pip install {package}")
        except Unsupported as reason:
            absent.append(f"{name} has no W{bits}A{bits} here: {reason}")
        except Exception as error:  # of another project: the tables of the others are worth having
            absent.append(f"{name} can't be built here: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return models, absent


class PeerTrainer(SQAKDTrainer):
    """[`SQAKDTrainer`] for a student with another project's quantizers; their ranges have the rate that ours have."""

    def _check_student(self, model: nn.Module) -> None:
        pass

    def _ranges(self, model: nn.Module) -> list[nn.Parameter]:
        # Brevitas' "scaling_impl.value", torch.ao's "weight_quantizer.scale" and "zero_point".
        marks = ("scaling", "zero_point", "quantizer.")
        return [p for name, p in model.named_parameters() if any(mark in name for mark in marks)]
