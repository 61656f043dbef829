import json
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForImageClassification

from sqakd_hf import (
    InputError,
    LayerPlan,
    QuantizationConfig,
    QuantizationPlan,
    build_model,
    calibrate_model,
    plan_quantization,
    quantize_model,
    quantized_layers,
)


def fingerprint(model):
    """Everything about `model` that planning must not change: modules, parameters, buffers, hooks, modes."""
    modules = [
        (name, id(module), type(module), module.training, sorted(vars(module)), len(module._forward_pre_hooks))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    # As bytes: ranges that are not set yet are NaN.
    return modules, parameters, {key: value.numpy().tobytes() for key, value in model.state_dict().items()}


def assert_unchanged(model, before):
    for now, then in zip(fingerprint(model), before, strict=True):
        assert now == then


def weights_by_layer(model):
    """The layers by exact type and the sizes of their weights, in the order of registration."""
    return {
        name: module.weight.numel() for name, module in model.named_modules() if type(module) in (nn.Conv2d, nn.Linear)
    }


def bits_by_layer(plan):
    return {layer.name: (layer.weight_bits, layer.activation_bits) for layer in plan}


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return timm.create_model("resnet18")


class Headless(nn.Module):
    """Four layers, with whatever metadata a test gives."""

    def __init__(self, **metadata):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(4, 4, 3)
        self.c = nn.Linear(4, 4)
        self.d = nn.Linear(4, 2)
        self.pretrained_cfg = metadata


def ends(model):
    """The layers at 7 bits: those that the plan takes for the first and the last."""
    plan = plan_quantization(model, QuantizationConfig(first_last_bits=7))
    return [layer.name for layer in plan if layer.weight_bits == 7]


class TestNames:
    def test_of_timm_resnet18(self, resnet18):
        plan = plan_quantization(resnet18, QuantizationConfig())
        assert {layer.name: layer.num_weights for layer in plan} == weights_by_layer(resnet18)
        assert [layer.name for layer in plan] == list(weights_by_layer(resnet18))
        assert len(plan.layers) == 21 and plan.quantized == list(plan) and plan.skipped == []
        by_name = {layer.name: layer for layer in plan}
        # 64 kernels of 3 x 7 x 7; 512 x 256 of 1 x 1; 1000 classes of 512 features.
        assert (by_name["conv1"].layer_type, by_name["conv1"].num_weights) == ("Conv2d", 64 * 3 * 7 * 7)
        assert by_name["layer4.0.downsample.0"].num_weights == 512 * 256
        assert (by_name["fc"].layer_type, by_name["fc"].num_weights) == ("Linear", 1000 * 512)

    @pytest.mark.parametrize(
        ("name", "layers", "first", "last"),
        [("test_resnet", 16, "conv1.0", "fc"), ("test_vit", 26, "patch_embed.proj", "head")],
    )
    def test_of_small_timm_models(self, name, layers, first, last):
        model = timm.create_model(name)
        plan = plan_quantization(model, QuantizationConfig(weight_bits=3, activation_bits=4))
        assert {layer.name: layer.num_weights for layer in plan} == weights_by_layer(model)
        assert len(plan.layers) == layers
        assert {n for n, bits in bits_by_layer(plan).items() if bits == (8, 8)} == {first, last}
        assert set(bits_by_layer(plan).values()) == {(8, 8), (3, 4)}

    def test_of_a_native_transformers_model(self, vit):
        plan = plan_quantization(vit, QuantizationConfig())
        assert {layer.name: layer.num_weights for layer in plan} == weights_by_layer(vit)
        # Patches, classifier, and in each of two blocks q, k, v, o and two MLP layers.
        assert len(plan.layers) == 2 + 2 * 6
        assert bits_by_layer(plan)[plan.layers[0].name] == bits_by_layer(plan)["classifier"] == (8, 8)
        assert plan.layers[0].layer_type == "Conv2d" and plan.layers[-1].name == "classifier"
        assert {bits for name, bits in list(bits_by_layer(plan).items())[1:-1]} == {(2, 2)}

    def test_leaves_the_model_as_it_was(self, conv_net):
        before = fingerprint(conv_net)
        plan_quantization(conv_net, QuantizationConfig(overrides={"body": {"weight_bits": 4}}))
        assert_unchanged(conv_net, before)

    def test_a_layer_under_two_names_is_planned_once_under_the_first(self):
        shared = nn.Linear(4, 4)
        plan = plan_quantization(nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": shared}), QuantizationConfig())
        assert [layer.name for layer in plan] == ["a", "b"]

    def test_vectors_and_integer_tables_are_no_layers(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.PReLU(4), nn.Linear(4, 4))
        model[0].register_buffer("table", torch.zeros(4, 4, dtype=torch.int64))
        assert [layer.name for layer in plan_quantization(model, QuantizationConfig())] == ["0", "4"]


class TestFirstAndLast:
    def test_metadata_names_them(self):
        assert ends(Headless(first_conv="b", classifier="c")) == ["b", "c"]

    def test_metadata_may_name_several(self):
        assert ends(Headless(first_conv=("a", "b"), classifier=["c", "d"])) == ["a", "b", "c", "d"]

    @pytest.mark.parametrize(
        "metadata",
        [{}, {"first_conv": None, "classifier": None}, {"first_conv": "x", "classifier": "head"}, {"first_conv": ()}],
        ids=["none", "null", "of layers that were replaced", "empty"],
    )
    def test_order_fills_what_metadata_does_not_name(self, metadata):
        assert ends(Headless(**metadata)) == ["a", "d"]

    def test_order_fills_one_end_alone(self):
        assert ends(Headless(first_conv="b", classifier="gone")) == ["b", "d"]
        assert ends(Headless(first_conv="gone", classifier="c")) == ["a", "c"]

    def test_metadata_counts_from_the_module_that_holds_it(self):
        assert ends(nn.ModuleDict({"timm_model": Headless(first_conv="b", classifier="c")})) == [
            "timm_model.b",
            "timm_model.c",
        ]

    @pytest.mark.parametrize(("count", "expected"), [(1, ["0"]), (2, ["0", "1"]), (3, ["0", "2"])])
    def test_of_very_small_models(self, count, expected):
        assert ends(nn.Sequential(*[nn.Linear(2, 2) for _ in range(count)])) == expected

    def test_layers_that_cannot_be_quantized_are_no_ends(self):
        model = nn.Sequential(nn.ConvTranspose1d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 3), nn.Bilinear(3, 3, 3))
        assert ends(model) == ["1", "2"]

    def test_their_bits_hold_for_weights_and_activations(self, conv_net):
        bits = bits_by_layer(plan_quantization(conv_net, QuantizationConfig(first_last_bits=5)))
        assert bits == {"stem.0": (5, 5), "body.0": (2, 2), "body.3": (2, 2), "head": (5, 5)}

    def test_float_activations_stay_float_there(self, conv_net):
        bits = bits_by_layer(plan_quantization(conv_net, QuantizationConfig(activation_bits=None)))
        assert bits == {"stem.0": (8, None), "body.0": (2, None), "body.3": (2, None), "head": (8, None)}

    def test_none_leaves_them_in_float_with_the_reason(self, conv_net):
        plan = plan_quantization(conv_net, QuantizationConfig(first_last_bits=None))
        assert {layer.name: layer.skipped for layer in plan.skipped} == {
            "stem.0": "first or last layer",
            "head": "first or last layer",
        }
        assert [layer.name for layer in plan.quantized] == ["body.0", "body.3"]


class TestOverrides:
    def test_later_ones_overrule_earlier_ones(self, conv_net):
        overrides = {"body": {"weight_bits": 3, "activation_bits": 4}, "body.3": {"weight_bits": 5}}
        bits = bits_by_layer(plan_quantization(conv_net, QuantizationConfig(overrides=overrides)))
        assert bits == {"stem.0": (8, 8), "body.0": (3, 4), "body.3": (5, 4), "head": (8, 8)}
        turned = dict(reversed(overrides.items()))
        bits = bits_by_layer(plan_quantization(conv_net, QuantizationConfig(overrides=turned)))
        assert bits == {"stem.0": (8, 8), "body.0": (3, 4), "body.3": (3, 4), "head": (8, 8)}

    def test_overrule_the_bits_of_first_and_last_layer(self, conv_net):
        bits = bits_by_layer(plan_quantization(conv_net, QuantizationConfig(overrides={"head": {"weight_bits": 4}})))
        assert bits["head"] == (4, 8) and bits["stem.0"] == (8, 8)

    def test_quantize_a_first_or_last_layer_that_would_stay_in_float(self, conv_net):
        config = QuantizationConfig(first_last_bits=None, overrides={"head": {"weight_bits": 4}})
        plan = plan_quantization(conv_net, config)
        assert bits_by_layer(plan)["head"] == (4, 2)
        assert [layer.name for layer in plan.skipped] == ["stem.0"]

    def test_reach_every_option(self, conv_net):
        options = {
            "quantizer": "ewgs",
            "weight_bits": 1,
            "activation_bits": None,
            "per_channel": False,
            "integer_zero_point": False,
            "quantizer_kwargs": {"delta": 0.5},
        }
        plan = plan_quantization(conv_net, QuantizationConfig(overrides={"body.0": options}))
        by_name = {layer.name: layer for layer in plan}
        assert by_name["body.0"] == LayerPlan(
            "body.0", "Conv2d", 8 * 8 * 3 * 3, macs=by_name["body.0"].macs, **options
        )
        assert by_name["body.3"] == LayerPlan(
            "body.3", "Conv2d", 16 * 4 * 3 * 3, "lsq", 2, 2, True, True, {}, macs=by_name["body.3"].macs
        )

    def test_do_not_reach_layers_that_stay_in_float(self, conv_net):
        config = QuantizationConfig(overrides={"*": {"weight_bits": 4}}, modules_to_not_convert=["body.0"])
        layer = {layer.name: layer for layer in plan_quantization(conv_net, config)}["body.0"]
        assert (layer.weight_bits, layer.quantizer) == (None, None)


class TestSkipped:
    def test_modules_to_not_convert_are_listed_with_the_reason(self, conv_net):
        plan = plan_quantization(conv_net, QuantizationConfig(modules_to_not_convert=["body", "head"]))
        assert {layer.name: layer.skipped for layer in plan} == {
            "stem.0": None,
            "body.0": "listed in modules_to_not_convert",
            "body.3": "listed in modules_to_not_convert",
            "head": "listed in modules_to_not_convert",
        }

    def test_layers_without_a_quantized_form_are_listed_with_their_type(self):
        class MyLinear(nn.Linear):
            def forward(self, x):
                return super().forward(x).relu()

        model = nn.Sequential(
            nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4), MyLinear(4, 4), nn.ConvTranspose1d(4, 4, 1)
        )
        plan = plan_quantization(model, QuantizationConfig())
        assert [(layer.layer_type, layer.skipped) for layer in plan] == [
            ("Embedding", "max_norm changes its table in each forward"),
            ("Linear", None),
            ("MyLinear", "no quantized form of MyLinear is registered"),
            ("ConvTranspose1d", "no quantized form of ConvTranspose1d is registered"),
        ]

    def test_a_layer_that_the_caller_listed_is_no_surprise(self):
        # quantize_model warns of layers that can't be quantized; listing them is how a caller says "I know".
        model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1), nn.Linear(4, 4))
        plan = plan_quantization(model, QuantizationConfig(modules_to_not_convert=["1"]))
        assert [layer.skipped for layer in plan] == [None, "listed in modules_to_not_convert", None]

    @pytest.mark.parametrize(
        "wrap",
        [
            nn.utils.parametrizations.weight_norm,
            nn.utils.parametrizations.orthogonal,
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            # The old form keeps the class and replaces the parameter.
            pytest.param(
                nn.utils.spectral_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning"), id="old style"
            ),
        ],
    )
    def test_a_reparametrized_layer_is_refused_unless_the_caller_lists_it(self, wrap):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 4)), nn.Linear(4, 4))
        with pytest.raises(InputError, match="A parameter of '1' is computed by a parametrization or by pruning"):
            quantize_model(model, QuantizationConfig())
        plan = plan_quantization(model, QuantizationConfig(modules_to_not_convert=["1"]))
        assert [layer.skipped is None for layer in plan] == [True, False, True]

    def test_so_is_one_whose_bias_alone_is(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        nn.utils.parametrize.register_parametrization(model[1], "bias", nn.Identity())
        with pytest.raises(InputError, match="A parameter of '1' is computed by a parametrization"):
            quantize_model(model)


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"modules_to_not_convert": ["haed"]},
                "modules_to_not_convert: the pattern 'haed' matches no layer; close names: head.",
            ),
            (
                {"overrides": {"head": {"weight_bits": 4}, "bdoy.0": {"weight_bits": 4}}},
                "overrides: the pattern 'bdoy.0' matches no layer; close names: body.0, ",
            ),
            (
                {"overrides": {"encoder.layer.0": {}}},
                "overrides: the pattern 'encoder.layer.0' matches no layer; ",
            ),
            (
                {"modules_to_not_convert": ["body.1"]},  # a BatchNorm
                "modules_to_not_convert: the pattern 'body.1' matches no layer; close names: body.",
            ),
            ({"overrides": {"qqqqq": {}}}, "the first layers are: stem.0, body.0, body.3."),
        ],
        ids=["exclusion", "override", "path", "norm", "far off"],
    )
    def test_a_pattern_that_matches_nothing_names_close_layers(self, conv_net, fields, message):
        before = fingerprint(conv_net)
        for plan in (plan_quantization, quantize_model):
            with pytest.raises(InputError, match=re.escape(message)):
                plan(conv_net, QuantizationConfig(**fields))
            assert_unchanged(conv_net, before)

    def test_a_model_without_a_layer_to_quantize_names_what_it_has(self):
        model = nn.Sequential(nn.Bilinear(3, 4, 2), nn.LayerNorm((4, 4)), nn.Bilinear(3, 4, 2), nn.ReLU())
        before = fingerprint(model)
        with pytest.raises(InputError) as info:
            quantize_model(model, QuantizationConfig())
        assert str(info.value) == (
            "Sequential has no layer that can be quantized; layers with a weight matrix: Bilinear, LayerNorm. "
            "register_quantized_layer adds a layer type."
        )
        assert_unchanged(model, before)

    def test_a_model_without_any_weight_says_none(self):
        with pytest.raises(InputError, match="ReLU has no layer that can be quantized; .* weight matrix: none"):
            plan_quantization(nn.ReLU(), QuantizationConfig())

    def test_a_model_is_not_quantized_twice(self, conv_net):
        quantize_model(conv_net, QuantizationConfig())
        before = fingerprint(conv_net)
        for plan in (plan_quantization, quantize_model):
            with pytest.raises(InputError, match="^The model is quantized already. Load or build the float model"):
                plan(conv_net, QuantizationConfig(weight_bits=4))
            assert_unchanged(conv_net, before)


class TestSizes:
    def test_weight_bytes_of_resnet18(self, resnet18):
        counts = weights_by_layer(resnet18)
        inner = sum(counts.values()) - counts["conv1"] - counts["fc"]
        # Every inner layer has a multiple of four weights: at 2 bits they fill whole bytes.
        assert plan_quantization(resnet18, QuantizationConfig()).weight_bytes() == (
            counts["conv1"] + counts["fc"] + inner // 4
        )
        float_ends = plan_quantization(resnet18, QuantizationConfig(first_last_bits=None))
        assert float_ends.weight_bytes() == 4 * (counts["conv1"] + counts["fc"]) + inner // 4

    @pytest.mark.parametrize(("bits", "expected"), [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9)])
    def test_each_layer_fills_whole_bytes(self, bits, expected):
        # Nine weights: ceil(9 * bits / 8) bytes, for each of the two layers.
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        plan = plan_quantization(model, QuantizationConfig(first_last_bits=bits))
        assert plan.weight_bytes() == 2 * expected

    def test_bits_are_those_of_most_weights(self, conv_net):
        # stem 216, body 576 + 576, head 64 weights.
        config = QuantizationConfig(weight_bits=3, activation_bits=4)
        assert plan_quantization(conv_net, config).bits() == "W3A4"
        assert plan_quantization(conv_net, QuantizationConfig(activation_bits=None)).bits() == "W2Afloat"
        few = QuantizationConfig(modules_to_not_convert=["body"], overrides={"head": {"weight_bits": 4}})
        assert plan_quantization(conv_net, few).bits() == "W8A8"
        with pytest.raises(InputError, match="Nothing of TinyConvNet would be quantized: 4 layers stay in float, mo"):
            plan_quantization(conv_net, QuantizationConfig(modules_to_not_convert=["*"]))


class TestModelsThatNoPlanIsMadeFor:
    """Each with one sentence, and untouched."""

    def refused(self, model, config=None):
        before = fingerprint(model)
        with pytest.raises(InputError) as info:
            quantize_model(model, config)
        assert fingerprint(model) == before
        return str(info.value)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_scripted_and_compiled(self, conv_net):
        with pytest.raises(InputError, match="is scripted or traced, its layers can't be replaced. Pass the eager"):
            quantize_model(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
        assert "is compiled already. Quantize the eager model" in self.refused(torch.compile(conv_net))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_of_another_tool(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
        with pytest.raises(InputError, match="was quantized by another tool .*torch.ao.*Load its full-precision"):
            quantize_model(model)

        class Packed(nn.Parameter):
            pass

        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = Packed(model[1].weight.data)
        model[1].weight.__class__ = Packed
        assert "was quantized by another tool (Packed)" in self.refused(model)
        model = nn.Sequential(nn.Linear(4, 4))
        model.quantization_method = "gptq"
        assert "was quantized by another tool (gptq)" in self.refused(model)

    def test_an_override_of_layers_that_stay_in_float(self, conv_net):
        config = QuantizationConfig(modules_to_not_convert=["body"], overrides={"body.0": {"weight_bits": 4}})
        assert self.refused(conv_net, config) == (
            "overrides['body.0'] only matches layers that modules_to_not_convert leaves in float. "
            "Remove it from one of the two."
        )
        # Where it also matches others, it says what they get.
        config = QuantizationConfig(modules_to_not_convert=["body.0"], overrides={"body": {"weight_bits": 4}})
        assert bits_by_layer(plan_quantization(conv_net, config))["body.3"] == (4, 2)


class TestCoverage:
    def test_counts_what_is_quantized(self, conv_net):
        config = QuantizationConfig(modules_to_not_convert=["head"], overrides={"body.0": {"activation_bits": None}})
        coverage = plan_quantization(conv_net, config, torch.zeros(2, 3, 16, 16)).coverage()
        macs = [216 * 256, 576 * 256, 576 * 49, 64]  # 16 x 16 positions, then 7 x 7, then one
        assert (coverage.layers, coverage.quantized_layers) == (4, 3)
        assert (coverage.weights, coverage.quantized_weights) == (216 + 576 + 576 + 64, 216 + 576 + 576)
        assert (coverage.macs, coverage.quantized_macs) == (sum(macs), sum(macs[:3]))
        assert coverage.attention_macs == coverage.quantized_attention_macs == 0
        assert coverage.weight_bytes == 216 + 144 + 144 + 256
        assert coverage.bops == macs[0] * 64 + macs[1] * 2 * 32 + macs[2] * 4 + macs[3] * 1024
        assert coverage.float_bops == sum(macs) * 1024

    def test_counts_attention_by_the_bits_of_its_operands(self, vit):
        off, on = (plan_quantization(vit, QuantizationConfig(attention_bits=bits)).coverage() for bits in (None, 4))
        # Two blocks, two products, 17 tokens, 16 channels.
        assert off.attention_macs == on.attention_macs == 2 * 2 * 17**2 * 16
        assert off.bops - on.bops == off.attention_macs * (32 * 32 - 4 * 4)
        assert (off.quantized_attention_macs, on.quantized_attention_macs) == (0, on.attention_macs)

    def test_says_nothing_of_what_did_not_run(self):
        coverage = plan_quantization(nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7)), QuantizationConfig()).coverage()
        assert coverage.macs is coverage.bops is None and coverage.quantized_weights == 98
        assert str(coverage) == "quantized: 100.0 % of the weights (0.10 kB)"


class TestText:
    CONFIG = QuantizationConfig(
        activation_bits=4,
        overrides={"body.0": {"quantizer": "ewgs", "per_channel": False, "activation_bits": None}},
        modules_to_not_convert=["head"],
    )

    def test_table(self, conv_net):
        assert str(plan_quantization(conv_net, self.CONFIG)).splitlines() == [
            "layer   type    weights  MACs    bits      quantizer                           weight ranges  input",
            # 3 * 3 * 3 weights for each of 8 channels and 224 * 224 places; the third without padding, 111 * 111.
            "stem.0  Conv2d  216      10.8 M  W8A8      lsq                                 per channel",
            "body.0  Conv2d  576      28.9 M  W2Afloat  ewgs                                per tensor",
            "body.3  Conv2d  576      7.1 M   W2A4      lsq                                 per channel",
            "head    Linear  64       64      float     (listed in modules_to_not_convert)",
            "body.4  ReLU                     A8        lsq                                                output",
            "4 layers: 1 at W8A8, 1 at W2Afloat, 1 at W2A4, 1 in float, 1 added or pooled feature maps at A8",
            # 216 bytes, 144, 144 and 256; 46.8 M * 32 * 32 over 10.8 M * 8 * 8 + 28.9 M * 2 * 32 + 7.1 M * 2 * 4.
            "quantized: 95.5 % of the weights (0.76 kB), 100.0 % of the layers' 46.8 M MACs, "
            "18.4 x fewer bit operations than in float",
        ]

    def test_table_after_calibration_tells_the_sign_of_inputs(self, conv_net):
        plan = plan_quantization(conv_net, self.CONFIG).with_signedness(
            {"stem.0": True, "body.0": True, "body.3": False}
        )
        assert str(plan).splitlines()[1:4] == [
            "stem.0  Conv2d  216      10.8 M  W8A8      lsq                                 per channel    signed",
            # Its activations stay in float: no codes, no sign.
            "body.0  Conv2d  576      28.9 M  W2Afloat  ewgs                                per tensor",
            "body.3  Conv2d  576      7.1 M   W2A4      lsq                                 per channel    unsigned",
        ]

    def test_large_counts_are_grouped(self, resnet18):
        text = str(plan_quantization(resnet18, QuantizationConfig()))
        assert "layer4.1.conv2         Conv2d       2,359,296  115.6 M  W2A2  lsq        per channel" in text
        assert "\n21 layers: 19 at W2A2, 2 at W8A8, 12 added or pooled feature maps at A8\n" in text

    def test_an_own_quantizer_of_activations_is_named(self, conv_net):
        config = QuantizationConfig(activation_quantizer="lsq+", overrides={"head": {"activation_quantizer": "lsq"}})
        lines = {line.split()[0]: line for line in str(plan_quantization(conv_net, config)).splitlines()}
        assert "lsq / lsq+" in lines["body.0"] and "lsq+" not in lines["head"]

    def test_summary_puts_the_most_frequent_first(self, conv_net):
        plan = plan_quantization(conv_net, QuantizationConfig(overrides={"head": {"weight_bits": 2}}))
        assert plan.summary().startswith("4 layers: 2 at W2A2, 1 at W8A8, 1 at W2A8, 1 added")

    def test_with_signedness_changes_the_named_layers_of_a_copy(self, conv_net):
        plan = plan_quantization(conv_net, QuantizationConfig())
        later = plan.with_signedness({"stem.0": True, "head": False})
        assert [layer.signed_input for layer in later] == [True, None, None, False]
        assert [layer.signed_input for layer in plan] == [None] * 4
        assert [layer.signed_input for layer in later.with_signedness({"stem.0": False})] == [False, None, None, False]

    def test_json_and_back(self, conv_net):
        plan = plan_quantization(conv_net, self.CONFIG).with_signedness({"stem.0": True})
        data = json.loads(json.dumps(plan.to_dict()))
        tables = {"layers", "attention", "others", "residuals"}
        assert QuantizationPlan(**{name: tuple(LayerPlan(**line) for line in data[name]) for name in tables}) == plan
        data = data["layers"]
        assert data[1]["quantizer"] == "ewgs" and data[3]["skipped"] == "listed in modules_to_not_convert"


class Recurrent(nn.Module):
    """Matrices without a layer: an LSTM, a bare parameter, an attention with three in-projections."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 4)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.mixer = Mixer()
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x):
        x, _ = self.lstm(self.stem(x).flatten(2).transpose(1, 2))
        x = self.mixer(x)
        return self.head(self.cross(x, x[..., :6], x[..., :6])[0].mean(1))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.mix.t()


class TestOtherMatrices:
    def test_are_counted_with_the_reason(self):
        plan = plan_quantization(Recurrent(), QuantizationConfig(), torch.randn(1, 3, 32, 32))
        found = {line.name: (line.layer_type, line.num_weights, line.macs, line.skipped) for line in plan.others}
        # 16 tokens; an LSTM has four gates, each with a matrix for the input and one for the state.
        assert found["lstm"] == ("LSTM", 2 * 4 * 64, 16 * 2 * 4 * 64, "LSTM multiplies by matrices of its own")
        assert found["mixer"] == ("Mixer", 64, 16 * 64, "Mixer multiplies by matrices of its own")
        assert found["cross"][:2] == ("MultiheadAttention", 64 + 48 + 48)
        coverage = plan.coverage()
        assert coverage.quantized_weights < coverage.weights and coverage.quantized_macs < coverage.macs
        assert coverage.weights == sum(line.num_weights for line in (*plan.layers, *plan.others))
        assert "LSTM multiplies by matrices of its own" in str(plan)

    def test_are_no_surprise_where_the_caller_lists_them(self, caplog):
        images = torch.randn(1, 3, 32, 32)
        quantize_model(Recurrent(), images=images)
        assert "mixer (Mixer multiplies by matrices of its own)" in caplog.text
        caplog.clear()
        quantize_model(Recurrent(), QuantizationConfig(modules_to_not_convert=["lstm", "mixer", "cross"]), images)
        assert "Left in float" not in caplog.text

    def test_tables_that_are_added_are_none(self):
        model = timm.create_model("test_vit", img_size=32, patch_size=8)
        assert plan_quantization(model, QuantizationConfig()).others == ()

    def test_survive_a_saved_table(self, tmp_path):
        torch.manual_seed(0)
        model = build_model("timm/sequencer2d_s", 4, image_size=32, model_args={"layers": (1, 1, 1, 1)})
        quantize_model(model)
        others = model.quantization_plan.others
        assert others and {line.layer_type for line in others} == {"LSTM"}
        calibrate_model(model, [torch.randn(4, 3, 32, 32)], disable_progress=True)
        model.save_pretrained(tmp_path)
        assert type(model).from_pretrained(tmp_path).quantization_plan.others == others


class TestOverridesOfAttention:
    def test_leave_layers_as_they_were(self, vit):
        alone = plan_quantization(vit, QuantizationConfig(first_last_bits=None))
        both = plan_quantization(vit, QuantizationConfig(first_last_bits=None, overrides={"*": {"attention_bits": 8}}))
        assert both.layers == alone.layers
        assert all(line.activation_bits == 8 for line in both.attention)

    def test_must_reach_an_attention(self, vit):
        config = QuantizationConfig(overrides={"classifier": {"attention_bits": 8}})
        with pytest.raises(InputError, match="overrides with attention_bits: the pattern 'classifier' matches no"):
            plan_quantization(vit, config)


class TestPartsThatNoPlanIsMadeFor:
    @pytest.mark.parametrize(
        ("prepare", "message"),
        [
            (lambda model: model.compile(), "The model is compiled already"),
            (lambda model: model[1].compile(), "Its part '1' is compiled already"),
            (lambda model: model.append(torch.jit.script(nn.Linear(4, 4))), "Its part '2' is scripted or traced"),
            (lambda model: model.append(nn.LazyLinear(4)), "Its part '2' has parameters of no size yet"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
    def test_are_named(self, prepare, message):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        prepare(model)
        with pytest.raises(InputError, match=message):
            quantize_model(model)


class TestExampleImages:
    def test_of_a_size_that_the_model_does_not_take(self, vit):
        with pytest.raises(InputError, match="ViTForImageClassification does not run on the example images"):
            plan_quantization(vit, QuantizationConfig(), torch.randn(1, 3, 7, 7))
        with pytest.raises(InputError, match=r"images must be a tensor \(B, C, H, W\), got list"):
            plan_quantization(vit, QuantizationConfig(), [torch.randn(3, 7, 7)])

    @pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
    def test_are_cast_to_the_models_dtype(self, name):
        plans = [
            plan_quantization(timm.create_model(name).to(dtype), QuantizationConfig())
            for dtype in (torch.float32, torch.bfloat16)
        ]
        assert plans[0] == plans[1] and plans[1].coverage().macs > 0


def test_float_bytes_are_those_of_all_weights():
    lines = tuple(LayerPlan(name, "Linear", count, "lsq", 2, 2) for name, count in (("a", 10), ("b", 100)))
    plan = QuantizationPlan(lines, others=(LayerPlan("gru", "GRU", 1000, skipped="no quantized form"),))
    assert plan.float_bytes() == 4 * 1110 > plan.weight_bytes() > 4 * 1000


class TestDepthwise:
    """A depthwise convolution between two others, and a head."""

    @staticmethod
    def bits(**options):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 8, 3, groups=4),
            nn.Conv2d(8, 8, 1, groups=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
        return [
            (line.weight_bits, line.activation_bits)
            for line in plan_quantization(model, QuantizationConfig(**options))
        ]

    @pytest.mark.parametrize(
        ("options", "depthwise"),
        [
            ({"weight_bits": 4, "activation_bits": 4}, (8, 8)),
            ({"weight_bits": 2, "activation_bits": 6}, (8, 6)),
            ({"weight_bits": 4, "activation_bits": None}, (8, None)),
            ({"weight_bits": 5, "activation_bits": 5}, (5, 5)),
            ({"weight_bits": 4, "activation_bits": 4, "depthwise_bits": None}, (4, 4)),
            ({"weight_bits": 4, "activation_bits": 4, "depthwise_bits": 6}, (6, 6)),
            ({"weight_bits": 4, "activation_bits": 4, "overrides": {"2": {"weight_bits": 3}}}, (3, 8)),
        ],
    )
    def test_have_bits_of_their_own(self, options, depthwise):
        asked = (options["weight_bits"], options["activation_bits"])
        edge = (8, asked[1] and 8)
        assert self.bits(**options) == [edge, asked, depthwise, asked, edge]

    def test_a_config_of_before_treats_them_as_the_others(self):
        stored = QuantizationConfig(weight_bits=4).to_dict()
        del stored["depthwise_bits"]
        assert QuantizationConfig.from_dict(stored).depthwise_bits is None
        assert QuantizationConfig.from_dict({"weight_bits": 4}).depthwise_bits == "auto"

    @pytest.mark.parametrize("value", [0, 9, "all", True, 2.5])
    def test_other_values_are_refused(self, value):
        with pytest.raises(InputError, match="depthwise_bits"):
            QuantizationConfig(depthwise_bits=value)


class TestActivationQuantizer:
    def test_is_that_of_inputs_alone(self, conv_net):
        config = QuantizationConfig(
            "lsq", activation_quantizer="lsq+", overrides={"head": {"activation_quantizer": "ewgs"}}
        )
        quantize_model(conv_net, config)
        layers = quantized_layers(conv_net)
        kinds = {
            name: (type(q.weight_quantizer).__name__, type(q.input_quantizer).__name__) for name, q in layers.items()
        }
        assert kinds.pop("head") == ("LSQ", "EWGS") and set(kinds.values()) == {("LSQ", "LSQPlus")}

    def test_an_unknown_one_is_named(self):
        with pytest.raises(InputError, match="Unknown activation_quantizer 'lsp'; registered: .* Did you mean 'lsq'"):
            QuantizationConfig(activation_quantizer="lsp")

    def test_of_a_stored_student_comes_back(self, vit, images, tmp_path):
        quantize_model(vit, QuantizationConfig(weight_bits=4, activation_bits=4, activation_quantizer="lsq+"))
        calibrate_model(vit, [images], disable_progress=True)
        vit.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert {type(q.input_quantizer).__name__ for q in quantized_layers(loaded).values()} == {"LSQPlus"}
        with torch.no_grad():
            assert torch.equal(vit.eval()(images).logits, loaded.eval()(images).logits)
