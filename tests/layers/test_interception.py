import copy
import pickle

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ViTConfig

from sqakd_hf import InputError, QuantizationConfig, calibrate_model, plan_quantization, quantize_model
from sqakd_hf.conversion.convert import dequantize_model
from sqakd_hf.layers.interception import InterceptedModule


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """One head; how its products are written is the test's choice."""

    def __init__(self, way):
        super().__init__()
        self.stem, self.qkv, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 24), nn.Linear(8, 4)
        self.inner = Products(way)

    def forward(self, x):
        q, k, v = self.qkv(self.stem(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        return self.head(self.inner(q, k, v).mean(1))


class Products(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way
        self.drop = nn.Dropout(0.0)

    def forward(self, q, k, v):
        return self.way(self, q * 8**-0.5, k, v)


WAYS = {
    "operators": lambda self, q, k, v: self.drop((q @ k.mT).softmax(-1)) @ v,
    "matmul": lambda self, q, k, v: torch.matmul(F.softmax(torch.matmul(q, k.mT), dim=-1), v),
    "bmm": lambda self, q, k, v: torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1).to(v.dtype), v),
    "einsum": lambda self, q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(-1), v),
    "values first": lambda self, q, k, v: (v.mT @ (q @ k.mT).softmax(-1).mT).mT,
    "fused": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
    "fused, mask": lambda self, q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(16, 16, dtype=torch.bool).tril(), scale=1.0
    ),
    "fused, causal": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0),
}


def student_of(model, images=IMAGES, **config):
    student = copy.deepcopy(model)
    plan = quantize_model(student, QuantizationConfig(**{"weight_bits": 8, "activation_bits": 8, **config}))
    calibrate_model(student, [images], disable_progress=True)
    return student.eval(), plan


class TestProducts:
    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    def test_equal_the_formula_however_they_are_written(self, way):
        torch.manual_seed(0)
        student, plan = student_of(Attention(way), attention_bits=3)
        assert [(line.name, line.skipped, line.activation_bits) for line in plan.attention] == [("inner", None, 3)]
        q, k, v = torch.randn(3, 4, 16, 8).unbind()
        quantizers = student.inner.attention_quantizers
        with torch.no_grad():
            output = student.inner(q, k, v)
            scores = quantizers.query_quantizer(q * 8**-0.5) @ quantizers.key_quantizer(k).mT
            if way in (WAYS["fused, mask"], WAYS["fused, causal"]):
                scores = scores + torch.full((16, 16), float("-inf")).triu(1)
            expected = quantizers.probability_quantizer(scores.softmax(-1)) @ quantizers.value_quantizer(v)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        # Probabilities have unsigned codes, the others signed ones, and three bits leave eight values.
        signed = [each.signed for each in quantizers.children()]
        assert signed == [True, True, True, False]
        assert len(quantizers.key_quantizer(k).unique()) <= 8

    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    def test_gradients_reach_all_four_ranges(self, way):
        torch.manual_seed(0)
        student, _ = student_of(Attention(way), attention_bits=3)
        student.train()(IMAGES).square().sum().backward()
        ranges = list(student.inner.attention_quantizers.parameters())
        assert len(ranges) == 4 and all(r.grad is not None and r.grad.abs().sum() > 0 for r in ranges)

    def test_are_float_where_not_asked_for_and_said_so(self):
        student, plan = student_of(Attention(WAYS["fused"]))
        assert not any(isinstance(module, InterceptedModule) for module in student.modules())
        assert plan.attention[0].skipped == "attention_bits is None"
        # Two products of 784 tokens at 224 px, by 8 channels.
        assert plan.attention[0].macs == 2 * 784**2 * 8

    def test_overrides_and_exclusions_reach_single_modules(self):
        model = nn.ModuleDict({"a": Attention(WAYS["fused"]), "b": Attention(WAYS["bmm"])})
        model.forward = lambda x: model["a"](x) + model["b"](x)
        config = QuantizationConfig(attention_bits=4, overrides={"b.inner": {"attention_bits": 7}})
        assert [line.activation_bits for line in plan_quantization(model, config).attention] == [4, 7]
        config = QuantizationConfig(attention_bits=4, modules_to_not_convert=["a.inner"])
        assert [line.activation_bits for line in plan_quantization(model, config).attention] == [None, 4]

    def test_a_model_without_any_is_refused(self, conv_net):
        with pytest.raises(InputError, match="attention_bits is set, but no attention was found in TinyConvNet"):
            quantize_model(conv_net, QuantizationConfig(attention_bits=8))

    def test_more_products_than_two_are_left_with_the_reason(self):
        def twice(self, q, k, v):
            return (q @ k.mT).softmax(-1) @ v + (q @ q.mT).softmax(-1) @ v

        plan = plan_quantization(Attention(twice), QuantizationConfig(attention_bits=8))
        assert plan.attention[0].skipped == "it computes the products scores, values, scores, values"

    def test_products_with_matrices_of_its_own_are_left_with_the_reason(self):
        class Positions(Products):
            def __init__(self):
                super().__init__(WAYS["bmm"])
                self.table = nn.Parameter(torch.randn(16, 8))

            def forward(self, q, k, v):
                return ((q @ k.mT) + q @ self.table.t()).softmax(-1) @ v

        model = Attention(None)
        model.inner = Positions()
        plan = plan_quantization(model, QuantizationConfig(attention_bits=8), IMAGES)
        assert plan.attention[0].skipped == "it computes the products scores, weights, values"
        assert [(line.name, line.num_weights, line.macs) for line in plan.others] == [("inner", 128, 16 * 128)]

    def test_products_of_modules_inside_are_left_with_the_reason(self):
        class Gated(Products):
            def __init__(self):
                super().__init__(WAYS["bmm"])
                self.gate = nn.Softmax(-1)

            def forward(self, q, k, v):
                return super().forward(q, k, v) * self.gate(q)

        model = Attention(None)
        model.inner = Gated()
        plan = plan_quantization(model, QuantizationConfig(attention_bits=8))
        assert plan.attention[0].skipped == "modules inside it compute products or softmaxes as well"

    def test_linear_attention_is_listed(self):
        plan = plan_quantization(Attention(lambda self, q, k, v: q @ (k.mT @ v)), QuantizationConfig())
        assert plan.attention[0].skipped == "attention_bits is None"
        plan = plan_quantization(Attention(lambda self, q, k, v: q @ (k.mT @ v)), QuantizationConfig(attention_bits=8))
        assert plan.attention[0].skipped == "it multiplies activations without a softmax between"
        assert plan.attention[0].macs == 2 * 784 * 64

    @pytest.mark.parametrize(
        "name",
        [
            "test_vit",
            *(
                pytest.param(name, marks=pytest.mark.process)
                for name in ("swin_tiny_patch4_window7_224", "levit_128s", "crossvit_tiny_240")
            ),
        ],
    )
    def test_each_quantizer_runs_once_a_forward(self, name):
        torch.manual_seed(0)
        model = timm.create_model(name)
        images = torch.randn(2, *model.pretrained_cfg["input_size"])
        student, plan = student_of(model, images, attention_bits=8)
        calls = {}
        for line in plan.attention:
            assert line.skipped is None
            for each in student.get_submodule(line.name).attention_quantizers.children():
                each.register_forward_hook(lambda module, *_: calls.update({module: calls.get(module, 0) + 1}))
        with torch.no_grad():
            student(images)
        assert len(calls) == 4 * len(plan.attention) and set(calls.values()) == {1}

    def test_who_sees_nothing_gets_zeros_as_from_the_fused_kernel(self):
        mask = torch.ones(16, 16, dtype=torch.bool).tril(-1)  # the first sees nothing

        def way(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

        torch.manual_seed(0)
        images = torch.randn(2, 3, 32, 32)
        model = Attention(way)
        student = copy.deepcopy(model)
        quantize_model(student, QuantizationConfig(attention_bits=8), images)
        calibrate_model(student, [images], disable_progress=True)
        q, k, v = torch.randn(3, 2, 16, 8).unbind()
        with torch.no_grad():
            assert (student.inner(q, k, v)[:, 0] == 0).all()


def vit(implementation):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    config._attn_implementation = implementation
    return AutoModelForImageClassification.from_config(config).eval()


class TestModels:
    def test_eager_and_fused_attention_agree(self):
        logits = {}
        for implementation in ("eager", "sdpa"):
            model = vit(implementation)
            for bits in (None, 8):
                student, _ = student_of(model, attention_bits=bits)
                with torch.no_grad():
                    logits[implementation, bits] = student(IMAGES).logits
            with torch.no_grad():
                logits[implementation, "float"] = model(IMAGES).logits
        for bits in ("float", None, 8):
            torch.testing.assert_close(logits["eager", bits], logits["sdpa", bits], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "build",
        [lambda: vit("sdpa"), lambda: vit("eager"), lambda: timm.create_model("test_vit", img_size=32, patch_size=8)],
        ids=["sdpa", "eager", "timm"],
    )
    def test_at_8_bits_logits_stay_near_those_without(self, build):
        torch.manual_seed(0)
        model = build().eval()
        logits = []
        for bits in (None, 8):
            student, _ = student_of(model, attention_bits=bits)
            with torch.no_grad():
                output = student(IMAGES)
            logits.append(output if isinstance(output, torch.Tensor) else output.logits)
        assert 0 < (logits[1] - logits[0]).norm() / logits[0].norm() < 0.05


class TestSwitches:
    """A student computes attention as it did when it was quantized, whatever is switched later."""

    @staticmethod
    def model(name="test_vit", **options):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3 if parameter.dim() > 1 else 1)
        return model

    @staticmethod
    def switch(model, fused):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
    def test_of_timm_change_no_code(self, name, fused):
        model, images = self.model(name, img_size=32), torch.randn(2, 3, 32, 32)
        self.switch(model, fused)
        student, plan = student_of(model, images, attention_bits=4)
        switchable = {name for name, module in model.named_modules() if hasattr(module, "fused_attn")}
        assert switchable and {line.fused for line in plan.attention if line.name in switchable} == {fused}
        with torch.no_grad():
            expected = student(images)
            self.switch(student, not fused)
            assert torch.equal(student(images), expected)
            assert torch.equal(pickle.loads(pickle.dumps(student))(images), expected)
        assert all(student.get_submodule(name).fused_attn is not fused for name in switchable)  # it is the user's

    @pytest.mark.parametrize("fused", [True, False])
    def test_of_a_process_that_loads_the_student_change_no_code(self, fused, tmp_path):
        from sqakd_hf import build_model

        was = use_fused_attn()
        try:
            set_fused_attn(fused)
            torch.manual_seed(0)
            model = build_model("timm/test_vit", 10, 32)
            model.timm_model.load_state_dict(self.model(img_size=32).state_dict())
            student, _ = student_of(model, attention_bits=4)
            student.save_pretrained(tmp_path)
            set_fused_attn(not fused)
            loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        finally:
            set_fused_attn(was)
        with torch.no_grad():
            assert torch.equal(loaded(IMAGES).logits, student(IMAGES).logits)
        attention = loaded.timm_model.blocks[0].attn
        assert attention.fused_attn is not fused
        dequantize_model(loaded)
        assert attention.fused_attn is not fused and not hasattr(attention, "planned_fused")

    def test_students_without_a_note_of_it_compute_as_they_are_built(self):
        student, _ = student_of(self.model(img_size=32), attention_bits=4)
        for module in student.modules():
            vars(module).pop("planned_fused", None)  # as stored by earlier versions
        with torch.no_grad():
            expected = student(IMAGES)
            self.switch(student, False)
            assert not torch.equal(student(IMAGES), expected)

    @pytest.mark.parametrize("implementations", [("sdpa", "eager"), ("eager", "sdpa")])
    def test_of_transformers_change_no_code_because_both_scale_after_the_product(self, implementations):
        student, _ = student_of(vit(implementations[0]), attention_bits=4)
        with torch.no_grad():
            expected = student(IMAGES).logits
            student.set_attn_implementation(implementations[1])
            assert torch.equal(student(IMAGES).logits, expected)


@pytest.mark.process
def test_another_attention_than_was_quantized_is_an_error():
    student, _ = student_of(vit("sdpa"), attention_bits=8)
    student.set_attn_implementation("flex_attention")
    message = "was quantized, but now computes attention by a function that can't be"
    with torch.no_grad(), pytest.raises(InputError, match=message):
        student(IMAGES)


@pytest.mark.process
def test_many_watched_modules_share_the_compiled_kernels():
    from sqakd_hf.quantization import functional

    images = torch.randn(32, 3, 32, 32)
    for seed in range(10):
        torch.manual_seed(seed)
        student, _ = student_of(timm.create_model("test_vit", img_size=32, patch_size=4), images, attention_bits=8)
        student(images).sum().backward()
    assert functional._compiler_failures == []


class Bypass(nn.Module):
    """Applies the weight of its child itself, as timm's BEiT does."""

    def __init__(self, keywords=False):
        super().__init__()
        self.qkv, self.keywords = nn.Linear(8, 8), keywords

    def forward(self, x):
        if self.keywords:
            return F.linear(input=x, weight=self.qkv.weight, bias=self.qkv.bias)
        return F.linear(x, self.qkv.weight, self.qkv.bias)


def bypassing(inner):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), Transposed(), inner, nn.Linear(8, 4))


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class TestBypassedLayers:
    @pytest.mark.parametrize("keywords", [False, True])
    def test_are_quantized_all_the_same(self, keywords):
        model = bypassing(Bypass(keywords))
        reference = copy.deepcopy(model)
        reference[3] = nn.Sequential(reference[3].qkv)
        expected, _ = student_of(reference, weight_bits=3, activation_bits=3)
        student, plan = student_of(model, weight_bits=3, activation_bits=3)
        layer = next(layer for layer in plan if layer.name == "3.qkv")
        assert layer.bypassed and layer.skipped is None and layer.macs == 784 * 64
        with torch.no_grad():
            assert torch.equal(student(IMAGES), expected(IMAGES))
        student.train()(IMAGES).sum().backward()
        assert student[3].qkv.weight_quantizer.scale.grad is not None

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_and_pickles_compute_the_same(self, duplicate):
        student, _ = student_of(bypassing(Bypass()), weight_bits=3, activation_bits=3)
        twin = duplicate(student)
        assert isinstance(twin[3], Bypass) and isinstance(twin[3], InterceptedModule)
        assert torch.equal(twin(IMAGES), student(IMAGES))

    def test_dequantizing_gives_the_module_back(self):
        student, _ = student_of(bypassing(Bypass()), weight_bits=3, activation_bits=None)
        with torch.no_grad():
            expected = student(IMAGES)
        dequantize_model(student)
        assert type(student[3]) is Bypass and type(student[3].qkv) is nn.Linear
        with torch.no_grad():
            torch.testing.assert_close(student(IMAGES), expected, rtol=1e-6, atol=1e-6)  # other kernels

    def test_weights_used_in_another_way_stay_float_with_the_reason(self, caplog):
        class Odd(Bypass):
            def forward(self, x):
                return x @ self.qkv.weight.t()

        class Far(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Bypass()

            def forward(self, x):
                return F.linear(x, self.inner.qkv.weight)

        assert [layer.skipped for layer in plan_quantization(bypassing(Odd()), QuantizationConfig()).skipped] == [
            "3 uses its weight in t"
        ]
        assert [layer.skipped for layer in plan_quantization(bypassing(Far()), QuantizationConfig()).skipped] == [
            "3 applies its weight itself"
        ]
        quantize_model(bypassing(Odd()))
        assert "Left in float: 3.qkv (3 uses its weight in t)." in caplog.text


class AppliesItself(nn.Module):
    """Applies the weight of its layer without calling the layer, in one way or another."""

    def __init__(self):
        super().__init__()
        self.fc, self.by_function = nn.Linear(3, 4), True

    def forward(self, x):
        x = x.mean((2, 3))
        return F.linear(x, self.fc.weight) if self.by_function else x @ self.fc.weight.T


class TestMissedWeights:
    def test_a_weight_that_is_no_longer_met_is_said_once(self, caplog):
        student, *_ = student_of(nn.Sequential(AppliesItself(), nn.Linear(4, 2)))
        student(IMAGES)
        assert "computed without the quantized weights" not in caplog.text
        student[0].by_function = False
        for _ in range(2):
            student(IMAGES)
        said = [
            record for record in caplog.records if "computed without the quantized weights of 'fc'" in record.message
        ]
        assert len(said) == 1 and said[0].levelname == "WARNING"

    def test_one_that_was_never_met_is_in_the_plan_and_told(self, caplog):
        model = nn.Sequential(AppliesItself(), nn.Linear(4, 2))
        model[0].by_function = False
        plan = quantize_model(model, QuantizationConfig())
        line = next(line for line in plan if line.name == "0.fc")
        assert "uses its weight in" in line.skipped
        assert f"0.fc ({line.skipped})" in caplog.text
