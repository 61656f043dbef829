import copy
import functools
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from sqakd_hf import InputError, QuantizationConfig, QuantizedLayer, create_quantizer, quantize_model
from sqakd_hf.layers import quantized_layer as layers_module
from sqakd_hf.layers.quantized_layer import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose2d,
    QuantizedEmbedding,
    QuantizedLinear,
    quantized_class,
    register_quantized_layer,
    weight_of,
)


class RoundTo(nn.Module):
    """A stand-in for a quantizer, whose values a test can write down: the nearest multiple of `step`."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return torch.round(x / self.step) * self.step


CONVS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "padding": 1},
    "zeros": {"padding": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular", "bias": False, "groups": 2},
    "same": {"padding": "same", "dilation": 2},
    "same, reflect": {"padding": "same", "padding_mode": "reflect"},
    "valid": {"padding": "valid"},
}


def conv_case(dims, options):
    """A convolution, an input, and the same convolution as a function of input and weight."""
    torch.manual_seed(0)
    cls, function = CONVS[dims]
    layer = cls(4, 8, 3, **options)
    x = torch.randn(2, 4, *[7, 6, 5][:dims])
    conv = {key: options.get(key, 1) for key in ("stride", "dilation", "groups")}
    padding, mode = options.get("padding", 0), options.get("padding_mode", "zeros")

    def by_hand(x, weight):
        if mode == "zeros":
            return function(x, weight, layer.bias, padding=padding, **conv)
        width = conv["dilation"] if padding == "same" else padding  # kernel 3: one dilated step on each side
        return function(F.pad(x, [width] * (2 * dims), mode=mode), weight, layer.bias, **conv)

    return layer, x, by_hand


def linear_case(bias=True, shape=(5, 4)):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=bias)
    return layer, torch.randn(*shape), lambda x, weight: F.linear(x, weight, layer.bias)


def transposed_case(**options):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 8, 3, **options)
    return layer, torch.randn(2, 4, 7, 6), lambda x, weight: F.conv_transpose2d(x, weight, layer.bias, **options)


def timm_linear_case():
    torch.manual_seed(0)
    layer = timm.layers.Linear(4, 3)
    return layer, torch.randn(5, 4), lambda x, weight: F.linear(x, weight, layer.bias)


def conv_same_case(size, pads, **options):
    """`pads` as F.pad takes them: what TensorFlow's SAME puts around an image of this size, the odd one at the end."""
    torch.manual_seed(0)
    layer = timm.layers.Conv2dSame(4, 8, 3, **options)
    conv = {"stride": 1, **options}
    return layer, torch.randn(2, 4, *size), lambda x, weight: F.conv2d(F.pad(x, pads), weight, layer.bias, **conv)


CASES = {
    f"conv{dims}d {name}": functools.partial(conv_case, dims, options)
    for dims in CONVS
    for name, options in OPTIONS.items()
} | {
    "linear": linear_case,
    "linear no bias": functools.partial(linear_case, bias=False),
    "linear on tokens": functools.partial(linear_case, shape=(2, 5, 4)),
    "linear on a vector": functools.partial(linear_case, shape=(4,)),
    "transposed": transposed_case,
    "transposed, stride": functools.partial(transposed_case, stride=2, padding=1, output_padding=1),
    "transposed, groups": functools.partial(transposed_case, groups=2, dilation=2),
    "timm linear": timm_linear_case,
    "timm same, even": functools.partial(conv_same_case, (8, 6), (0, 1, 0, 1), stride=2),
    "timm same, odd": functools.partial(conv_same_case, (7, 8), (0, 1, 1, 1), stride=2, groups=2),
    "timm same, dilated": functools.partial(conv_same_case, (7, 8), (2, 2, 2, 2), dilation=2, groups=4),
}
# One of each class where the options do not matter.
ONE_EACH = {
    name: CASES[name]
    for name in (
        "linear",
        "conv1d reflect",
        "conv2d groups",
        "conv3d stride",
        "transposed",
        "timm linear",
        "timm same, odd",
    )
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
one_each = pytest.mark.parametrize("case", ONE_EACH.values(), ids=ONE_EACH)


def twin_of(layer, weight_step=0.25, input_step=0.5):
    return quantized_class(layer).from_float(
        layer, RoundTo(weight_step), None if input_step is None else RoundTo(input_step)
    )


@each_case
class TestForward:
    def test_is_the_float_operation_on_rounded_input_and_weight(self, case):
        layer, x, by_hand = case()
        expected = by_hand(torch.round(x / 0.5) * 0.5, torch.round(layer.weight / 0.25) * 0.25)
        assert torch.equal(twin_of(layer)(x), expected)
        assert torch.equal(by_hand(x, layer.weight), layer(x))  # the test's own formula

    def test_without_input_quantizer_only_the_weight_is_rounded(self, case):
        layer, x, by_hand = case()
        expected = by_hand(x, torch.round(layer.weight / 0.25) * 0.25)
        assert torch.equal(twin_of(layer, input_step=None)(x), expected)

    def test_at_8_bits_is_as_near_to_float_as_half_steps_allow(self, case):
        layer, x, by_hand = case()
        weight = layer.weight.detach()
        rows = weight.flatten(1).abs().amax(1)
        weight_quantizer = create_quantizer("lsq", bits=8, role="weight", channel_axis=0, num_channels=len(rows))
        input_quantizer = create_quantizer("lsq", bits=8, role="activation")
        weight_quantizer.set_range(scale=rows / 127)
        input_quantizer.set_range(scale=x.abs().max() / 127)
        twin = quantized_class(layer).from_float(layer, weight_quantizer, input_quantizer)
        # Nothing is clipped, so no value moves by more than half a step. |error| <= |x| dw + dx |w| + dx dw.
        # The last 1e-5 is float32 summation.
        dw = (rows / 254).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
        dx = torch.full_like(x, x.abs().max().item() / 254)
        bias = 0 if layer.bias is None else by_hand(torch.zeros_like(x), torch.zeros_like(weight))
        bound = by_hand(x.abs() + dx, weight.abs() + dw) - by_hand(x.abs(), weight.abs())
        error = (twin(x) - layer(x)).abs()
        assert (error <= bound + 1e-5).all() and 0 < error.max() < 0.05 * (layer(x) - bias).abs().max()


@each_case
class TestFromFloat:
    def test_shares_parameters_and_keeps_their_keys(self, case):
        layer, _, _ = case()
        keys = list(layer.state_dict())
        twin = twin_of(layer)
        assert type(twin) is quantized_class(layer) and isinstance(twin, type(layer))
        assert twin.weight is layer.weight and twin.bias is layer.bias
        assert list(twin.state_dict()) == keys == list(layer.state_dict())
        assert twin.weight_quantizer.step == 0.25 and twin.input_quantizer.step == 0.5
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        channels = 3 if isinstance(layer, nn.Linear) else 8 // (layer.groups if axis else 1)
        assert twin.channel_axis == axis and twin.weight.shape[axis] == channels

    def test_leaves_the_float_layer_usable(self, case):
        layer, x, by_hand = case()
        before = layer(x)
        twin_of(layer)
        assert not list(layer.children()) and torch.equal(layer(x), before)

    def test_and_back_gives_a_plain_layer_that_holds_the_quantized_weight(self, case):
        layer, x, by_hand = case()
        plain = twin_of(layer).dequantized()
        assert type(plain) is type(layer) and plain.bias is layer.bias
        assert torch.equal(plain.weight, torch.round(layer.weight / 0.25) * 0.25)
        assert not list(plain.children()) and set(vars(plain)) == set(vars(layer))
        assert torch.equal(plain(x), by_hand(x, plain.weight)) and repr(plain) == repr(layer)


class TestTwin:
    @one_each
    def test_dequantized_computes_the_same_where_activations_stay_in_float(self, case):
        layer, x, _ = case()
        twin = twin_of(layer, input_step=None)
        plain = twin.dequantized()
        assert type(plain) is type(layer) and set(vars(plain)) == set(vars(layer))
        assert torch.equal(plain(x), twin(x))

    @one_each
    def test_dequantized_leaves_the_quantized_layer_as_it_was(self, case):
        layer, x, _ = case()
        twin = twin_of(layer)
        before = twin(x)
        twin.dequantized()
        assert torch.equal(twin(x), before) and twin.input_quantizer.step == 0.5

    @one_each
    def test_real_quantizers_add_their_keys_and_float_weights_still_load(self, case):
        layer, x, _ = case()
        model = nn.Sequential(layer)
        float_state = {key: value + 1 for key, value in model.state_dict().items()}
        quantize_model(model, QuantizationConfig())
        added = set(model.state_dict()) - set(float_state)
        assert added and all(key.startswith(("0.weight_quantizer.", "0.input_quantizer.")) for key in added)
        result = model.load_state_dict(float_state, strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert all(torch.equal(model.state_dict()[key], value) for key, value in float_state.items())
        # The parameters are still those of the float layer.
        assert torch.equal(layer.weight, float_state["0.weight"])

    @one_each
    def test_gradients_reach_the_shared_parameters(self, case):
        layer, x, _ = case()
        model = nn.Sequential(layer)
        quantize_model(model, QuantizationConfig())
        model[0].input_quantizer.requires_grad_(True)  # also of a layer that reads images
        model[0].weight_quantizer.init_range(layer.weight)
        model[0].input_quantizer.init_range(x)
        out = model(x)
        out.sum().backward()
        # Each output adds its channel's bias once.
        assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, out.numel() / len(layer.bias)))
        assert layer.weight.grad.abs().sum() > 0 and model[0].weight_quantizer.scale.grad.abs().sum() > 0
        assert model[0].input_quantizer.scale.grad.abs().sum() > 0

    @one_each
    def test_hooks_are_kept_until_their_owner_removes_them(self, case):
        layer, x, _ = case()
        calls = []
        handles = [
            layer.register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True),
            layer.register_forward_pre_hook(lambda *_: calls.append("before")),
        ]
        twin = twin_of(layer)
        for module in (twin, twin.dequantized()):
            calls.clear()
            module(x)
            assert calls == ["before", "after"]
        for handle in handles:
            handle.remove()
        calls.clear()
        for module in (layer, twin, twin.dequantized()):
            module(x)
        assert not calls

    @one_each
    @pytest.mark.parametrize("training", [True, False])
    def test_mode_and_frozen_parameters_are_kept(self, case, training):
        layer, _, _ = case()
        layer.train(training).weight.requires_grad_(False)
        twin = twin_of(layer)
        assert [module.training for module in twin.modules()] == [training] * 3
        assert not twin.weight.requires_grad and twin.bias.requires_grad
        assert twin.dequantized().training is training

    @one_each
    def test_attributes_are_kept(self, case):
        layer, _, _ = case()
        layer._is_hf_initialized, layer.note = True, "kept"
        twin = twin_of(layer)
        assert twin._is_hf_initialized and twin.note == twin.dequantized().note == "kept"

    @one_each
    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_copies_compute_the_same_and_share_nothing(self, case, duplicate):
        layer, x, _ = case()
        model = nn.Sequential(layer)
        quantize_model(model, QuantizationConfig(quantizer="ewgs"))
        model[0].weight_quantizer.init_range(layer.weight)
        model[0].input_quantizer.init_range(x)
        twin = duplicate(model[0])
        assert type(twin) is type(model[0]) and torch.equal(twin(x), model[0](x))
        with torch.no_grad():
            twin.weight.zero_()
            twin.input_quantizer.upper.zero_()
        assert model[0].weight.abs().sum() > 0 and model[0].input_quantizer.upper.item() > 0
        assert type(twin.dequantized()) is type(layer)

    @one_each
    def test_can_be_called_by_keyword_as_the_float_layer_can(self, case):
        layer, x, _ = case()
        twin = twin_of(layer)
        assert torch.equal(twin(input=x), twin(x))

    @one_each
    def test_shows_the_float_layer_and_its_quantizers(self, case):
        layer, _, _ = case()
        name = "QuantizedTimmLinear" if type(layer) is timm.layers.Linear else f"Quantized{type(layer).__name__}"
        assert repr(twin_of(layer)) == (
            f"{name}(\n  {layer.extra_repr()}\n  (weight_quantizer): RoundTo()\n  (input_quantizer): RoundTo()\n)"
        )


class TestRegistry:
    @pytest.fixture(autouse=True)
    def own_registry(self, monkeypatch):
        monkeypatch.setattr(layers_module, "_REGISTRY", dict(layers_module._REGISTRY))
        monkeypatch.setattr(layers_module, "_FLOAT_CLASS", dict(layers_module._FLOAT_CLASS))

    @pytest.mark.parametrize(
        ("layer", "expected"),
        [
            (nn.Linear(2, 2), QuantizedLinear),
            (nn.Conv1d(2, 2, 1), QuantizedConv1d),
            (nn.Conv2d(2, 2, 1), QuantizedConv2d),
            (nn.Conv3d(2, 2, 1), QuantizedConv3d),
            (nn.ConvTranspose2d(2, 2, 1), QuantizedConvTranspose2d),
            (nn.ConvTranspose1d(2, 2, 1), None),
            (nn.Embedding(2, 2), QuantizedEmbedding),
            (nn.ReLU(), None),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_knows_linear_layers_and_convolutions(self, layer, expected):
        assert quantized_class(layer) is expected

    def test_a_subclass_may_compute_something_else_and_is_not_taken(self):
        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        assert quantized_class(Doubled(2, 2)) is None

    def test_a_subclass_that_computes_the_same_is_taken(self):
        class Named(nn.Conv2d):
            def __init__(self, channels):
                super().__init__(channels, channels, 1)

        assert quantized_class(Named(2)) is QuantizedConv2d
        assert quantized_class(nn.MultiheadAttention(2, 1).out_proj) is QuantizedLinear

    def test_a_users_own_layer_is_converted(self):
        class Scaled(nn.Linear):
            def __init__(self, *args):
                super().__init__(*args)
                self.gain = nn.Parameter(torch.tensor(3.0))

            def forward(self, x):
                return super().forward(x) * self.gain

        @register_quantized_layer(Scaled)
        class QuantizedScaled(QuantizedLayer, Scaled):
            def forward(self, x):
                return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias) * self.gain

        torch.manual_seed(0)
        layer, x = Scaled(4, 3), torch.randn(5, 4)
        twin = twin_of(layer)
        assert type(twin) is QuantizedScaled and twin.gain is layer.gain
        expected = F.linear(torch.round(x / 0.5) * 0.5, torch.round(layer.weight / 0.25) * 0.25, layer.bias) * 3.0
        assert torch.equal(twin(x), expected)
        plain = twin.dequantized()
        assert type(plain) is Scaled and torch.equal(plain(x), F.linear(x, plain.weight, layer.bias) * 3.0)
        model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 2))
        plan = quantize_model(model, QuantizationConfig())
        assert [layer.layer_type for layer in plan.quantized] == ["Scaled", "Linear"]
        assert type(model[0]) is QuantizedScaled

    def test_per_channel_ranges_follow_the_layers_own_axis(self):
        @register_quantized_layer(nn.ConvTranspose1d)
        class QuantizedConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
            channel_axis = 1

        model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3))
        quantize_model(model, QuantizationConfig())
        assert model[0].weight_quantizer.channel_axis == 1 and model[0].weight_quantizer.num_channels == 6

    def test_a_layers_own_children_keep_their_mode(self):
        class Normed(nn.Linear):
            def __init__(self, *args):
                super().__init__(*args)
                self.norm = nn.BatchNorm1d(4)

        @register_quantized_layer(Normed)
        class QuantizedNormed(QuantizedLayer, Normed):
            pass

        layer = Normed(4, 3).train()
        layer.norm.eval()  # frozen statistics
        twin = twin_of(layer)
        assert twin.training and twin.norm is layer.norm and not layer.norm.training

    def test_the_decorator_returns_the_class(self):
        class Quantized(QuantizedLayer, nn.Bilinear):
            pass

        assert register_quantized_layer(nn.Bilinear)(Quantized) is Quantized
        assert quantized_class(nn.Bilinear(1, 1, 1)) is Quantized

    @pytest.mark.parametrize(
        "bases",
        [(nn.Linear,), (QuantizedLayer,), (QuantizedLayer, nn.Conv2d), (nn.Linear, QuantizedLayer)],
        ids=["no mixin", "no float class", "another float class", "the wrong order"],
    )
    def test_a_class_that_is_not_built_from_both_is_refused(self, bases):
        cls = type("Mine", bases, {})
        with pytest.raises(InputError) as info:
            register_quantized_layer(nn.Linear)(cls)
        assert str(info.value) == "Mine must inherit from QuantizedLayer and Linear, in that order."
        assert quantized_class(nn.Linear(1, 1)) is QuantizedLinear


class TestEmbedding:
    def test_looks_up_quantized_rows_and_leaves_its_input_alone(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 4), nn.Linear(4, 4))
        plan = quantize_model(model, QuantizationConfig(weight_bits=3, activation_bits=3, first_last_bits=None))
        assert [(layer.weight_bits, layer.activation_bits) for layer in plan if layer.layer_type == "Embedding"] == [
            (None, None)  # the first layer
        ]
        model = nn.Sequential(nn.Linear(1, 1), nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 4))
        plan = quantize_model(model, QuantizationConfig(weight_bits=3, activation_bits=3))
        assert (plan.layers[1].weight_bits, plan.layers[1].activation_bits) == (3, None)
        table = model[1]
        table.weight_quantizer.init_range(table.weight)
        ids = torch.tensor([[0, 8], [2, 2]])
        out = table(ids)
        assert torch.equal(out, table.weight_quantizer(table.weight)[ids]) and table.weight_quantizer.num_channels == 9
        out.sum().backward()
        touched = table.weight.grad.abs().sum(1) > 0
        assert not touched[[1, 3, 4, 5, 6, 7]].any() and not touched[2]  # as nn.Embedding: no gradient to padding


class Builds(nn.Conv2d):
    """Another way to build a convolution, and nothing else."""

    def __init__(self, channels):
        super().__init__(channels, channels, 1)

    def extra_repr(self):
        return "built"


class Offers(nn.Conv2d):
    def spectrum(self):
        return self.weight.flatten(1).norm(dim=1)


class Prepares(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def prepare(self, x):
        return x

    def forward(self, x):
        return self.prepare(x) @ self.weight


class PreparesOtherwise(Prepares):
    def prepare(self, x):
        return x.square()


def test_subclasses_that_compute_or_offer_more_have_no_quantized_form():
    register_quantized_layer(Prepares)(type("QuantizedPrepares", (QuantizedLayer, Prepares), {}))
    try:
        assert quantized_class(Prepares()) is not None
        assert quantized_class(PreparesOtherwise()) is None
    finally:
        layers_module._FLOAT_CLASS.pop(layers_module._REGISTRY.pop(Prepares))
    assert quantized_class(Builds(2)) is quantized_class(nn.Conv2d(2, 2, 1))
    assert quantized_class(Offers(2, 2, 1)) is None


@pytest.mark.parametrize(
    ("module", "has_one"),
    [
        (nn.Linear(4, 1), True),
        (nn.LayerNorm(4), False),
        (nn.LSTM(4, 4), False),
        (nn.LazyLinear(4), False),
        (nn.MultiheadAttention(4, 2), True),
        (nn.MultiheadAttention(4, 2, kdim=3), False),
    ],
)
def test_what_holds_a_weight(module, has_one):
    assert (weight_of(module) is not None) == has_one


def test_a_vector_in_four_dimensions_is_no_weight():
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(1, 1, 1, 7))
    assert weight_of(module) is None
