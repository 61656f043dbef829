import copy
import re
import time

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from sqakd_hf import (
    FakeQuantizer,
    InputError,
    QuantizationConfig,
    calibrate_model,
    create_quantizer,
    is_calibrated,
    quantize_model,
    quantized_layers,
    reconstruct_model,
)
from sqakd_hf.reconstruction import state as state_module
from sqakd_hf.reconstruction.batch_norm import ChannelStatistics, match_statistics
from sqakd_hf.reconstruction.cost import FEWEST_STEPS, MOST_STEPS, Cost, cost_of
from sqakd_hf.reconstruction.inputs import UnitInputs
from sqakd_hf.reconstruction.optimizer import RANGE_RATE, RatedAdam, rated_parameters
from sqakd_hf.reconstruction.training import settle_weights
from sqakd_hf.reconstruction.units import find_units
from sqakd_hf.reconstruction.walk import Images
from sqakd_hf.reconstruction.windows import SIDE, find_window
from tests.helpers.models import CLASSES, TinyConvNet, tiny_vit
from tests.test_left_as_it_was import model_state


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Compiling kernels takes longer than all of these computations."""
    monkeypatch.setattr("sqakd_hf.quantization.functional._MIN_FUSED_NUMEL", 1 << 40)


class Block(nn.Module):
    """A residual block; the second of two has another stride and no shortcut, as in MobileNets."""

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.stride = stride

    def forward(self, x):
        y = self.conv2(self.act(self.bn1(self.conv1(x))))
        return x + y if self.stride == 1 else y


class TinyResNet(nn.Module):
    """Stem, two blocks, and a head of two layers, for images `(B, 3, H, W)`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8, stride=2))
        self.conv_head = nn.Conv2d(8, 16, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.act = nn.ReLU()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.fc(self.pool(self.act(self.bn(self.conv_head(self.blocks(self.stem(x)))))))


def photographs(count=40, size=12):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def trained(model):
    """Give BatchNorm the statistics of some images."""
    with torch.no_grad():
        model.train()(photographs(64) * 1.5 + 0.3)
    return model.eval()


def resnet():
    torch.manual_seed(0)
    return trained(TinyResNet())


def student_of(teacher, bits=3, **config):
    student = copy.deepcopy(teacher)
    quantize_model(student, QuantizationConfig(weight_bits=bits, activation_bits=bits, **config))
    return student


def reconstruct(student, teacher, images=None, **options):
    options = {"steps": 8, "batch_size": 8, "disable_progress": True, **options}
    return reconstruct_model(student, teacher, photographs() if images is None else images, **options)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def vit_pair():
    torch.manual_seed(0)
    teacher = tiny_vit().eval()
    return student_of(teacher, attention_bits=3), teacher


class TestUnits:
    @pytest.mark.parametrize(
        ("name", "options", "size", "count", "block"),
        [
            ("resnet10t", {}, 32, 8, "layer4.0"),
            ("mobilenetv2_035", {}, 32, 19, "blocks.1.0"),  # without a shortcut of its own
            ("convnext_atto", {"depths": (1, 1, 2, 1)}, 64, 10, "stages.2.blocks.1"),
            ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3}, 32, 5, "blocks.2"),
            (
                "swin_tiny_patch4_window7_224",
                {"img_size": 64, "window_size": 2, "depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 1, 1, 1)},
                64,
                10,
                "layers.2.blocks.1",
            ),
            ("regnetx_002", {}, 32, 15, "s4.b7"),
        ],
    )
    def test_hold_each_layer_once_in_the_order_of_execution(self, name, options, size, count, block):
        model = timm.create_model(name, num_classes=5, **options).eval()
        layers = list(quantized_layers(student_of(model)))
        units = find_units(model, layers, {"pixel_values": torch.randn(5, 3, size, size)})
        assert sorted(layer for unit in units for layer in unit.layers) == sorted(layers)
        assert len(units) == count and units[-1].is_head and not any(unit.is_head for unit in units[:-1])
        assert block in [unit.name for unit in units]

    def test_of_transformers_are_blocks_between_embedding_and_head(self, vit_pair):
        student, teacher = vit_pair
        units = find_units(teacher, list(quantized_layers(student)), {"pixel_values": torch.randn(5, 3, 16, 16)})
        names = [unit.name.removeprefix("vit.") for unit in units]
        assert len(units) == 4 and names[0].startswith("embeddings.patch_embeddings.projection")
        assert [re.sub(r".*layers?\.", "", name) for name in names[1:3]] == ["0", "1"]
        assert [unit.follows for unit in units] == [False, False, True, False] and units[3].is_head
        assert sum(len(unit.layers) for unit in units) == len(quantized_layers(student))

    def test_join_what_follows_the_last_block(self):
        teacher = resnet()
        units = find_units(teacher, list(quantized_layers(student_of(teacher))), {"pixel_values": photographs(5)})
        assert [unit.name for unit in units] == ["stem", "blocks.0", "blocks.1", "conv_head ... fc"]
        assert units[3].layers == ("conv_head", "fc") and all(unit.follows for unit in units[1:])

    def test_are_those_that_patterns_name(self):
        teacher = resnet()
        layers = list(quantized_layers(student_of(teacher)))
        units = find_units(teacher, layers, {"pixel_values": photographs(5)}, ["blocks"])
        assert [unit.name for unit in units] == ["stem", "blocks", "conv_head ... fc"]

    def test_compute_what_the_model_does(self):
        teacher, images = resnet(), photographs(5)
        units = find_units(teacher, list(quantized_layers(student_of(teacher))), {"pixel_values": images})
        x = images
        for unit in units:
            x = unit.run(teacher, [x])
        assert torch.equal(x, teacher(images))


class TestMatching:
    def test_the_same_inputs_leave_statistics_and_biases_as_they_are(self, monkeypatch):
        teacher = resnet()
        student = student_of(teacher)
        before = {name: tensor.clone() for name, tensor in student.named_buffers() if "quantizer" not in name}
        before |= {name: tensor.clone() for name, tensor in student.named_parameters() if name.endswith("bias")}
        monkeypatch.setattr(FakeQuantizer, "forward", lambda self, x: x)
        calibrate_model(student, photographs().split(16), teacher=teacher, disable_progress=True)
        after = {**dict(student.named_buffers()), **dict(student.named_parameters())}
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    def test_a_student_that_was_configured_for_training_has_the_same_units(self):
        states = []
        for configured in (False, True):
            torch.manual_seed(0)
            teacher = tiny_vit().eval()
            student = student_of(teacher, attention_bits=3)
            if configured:
                student.config.use_cache = False  # as Trainer does
            images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))
            calibrate_model(student, images.split(16), teacher=teacher, disable_progress=True)
            states.append(student.state_dict())
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_follows_the_formula(self):
        norm, teacher_norm = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        teacher_norm.running_mean.copy_(torch.tensor([1.0, -2.0]))
        teacher_norm.running_var.copy_(torch.tensor([4.0, 0.5]))
        theirs, own = torch.randn(6, 2, 5, 5, dtype=torch.float64), torch.randn(6, 2, 5, 5, dtype=torch.float64)
        own = own * 1.5 + 0.25
        expected, found = ChannelStatistics(), ChannelStatistics()
        for part in theirs.split(2):
            expected.add(part)
        for part in own.split(3):
            found.add(part)
        match_statistics(norm, teacher_norm, expected, found)
        ratio = own.var((0, 2, 3), correction=0) / theirs.var((0, 2, 3), correction=0)
        mean = own.mean((0, 2, 3)) - (theirs.mean((0, 2, 3)) - teacher_norm.running_mean) * ratio.sqrt()
        torch.testing.assert_close(norm.running_var, (teacher_norm.running_var * ratio).float())
        torch.testing.assert_close(norm.running_mean, mean.float())

    def test_a_scale_and_a_shift_of_the_inputs_change_nothing_behind_it(self):
        teacher = resnet()
        norm, x = copy.deepcopy(teacher.bn), torch.randn(6, 16, 5, 5)
        expected, found = ChannelStatistics(), ChannelStatistics()
        expected.add(x)
        found.add(x * 1.3 + 2)
        match_statistics(norm, teacher.bn, expected, found)
        norm.eps = teacher.bn.eps * 1.3**2
        torch.testing.assert_close(norm(x * 1.3 + 2), teacher.bn(x), rtol=1e-4, atol=1e-5)

    def test_biases_without_a_norm_behind_give_the_teachers_means(self, vit_pair):
        student, teacher = vit_pair
        images = photographs(size=16)
        calibrate_model(student, images.split(8), teacher=teacher, disable_progress=True)
        with torch.no_grad():
            own, theirs = student.eval()(images).logits, teacher(images).logits
        torch.testing.assert_close(own.mean(0), theirs.mean(0), rtol=0, atol=2e-6)

    def test_brings_the_student_nearer_than_calibration_alone(self):
        teacher, images = resnet(), photographs()
        alone, matched = student_of(teacher, 4), student_of(teacher, 4)
        calibrate_model(alone, images.split(8), disable_progress=True)
        calibrate_model(matched, images.split(8), teacher=teacher, disable_progress=True)
        with torch.no_grad():
            expected = teacher(images)
            errors = [(model.eval()(images) - expected).square().mean() for model in (alone, matched)]
        assert errors[1] < errors[0] and is_calibrated(matched)
        assert [line.signed_input for line in matched.quantization_plan] == [
            line.signed_input for line in alone.quantization_plan
        ]

    @pytest.mark.parametrize("others", [[TinyConvNet(), TinyConvNet()], TinyConvNet()], ids=["two", "another"])
    def test_without_a_teacher_to_compare_with_it_is_as_ever(self, others, caplog):
        one, other = student_of(resnet()), student_of(resnet())
        calibrate_model(one, [photographs()], disable_progress=True)
        calibrate_model(other, [photographs()], teacher=others, disable_progress=True)
        assert same(one, other) and "Calibrated without comparing student and teacher" in caplog.text


class TestReconstruction:
    def test_lowers_the_error_of_each_unit_or_leaves_it(self):
        teacher = resnet()
        student = student_of(teacher, 4)
        calibrate_model(student, [photographs()], teacher=teacher, disable_progress=True)
        result = reconstruct(student, teacher, steps=30)
        assert [unit.name for unit in result] == ["stem", "blocks.0", "blocks.1", "conv_head ... fc"]
        assert all(unit.after <= min(unit.before, unit.calibrated) for unit in result)
        assert any(unit.after < 0.9 * unit.calibrated for unit in result)
        assert "conv_head ... fc" in str(result) and len(result.to_dict()["units"]) == 4

    def test_keeps_what_a_training_makes_worse(self, monkeypatch):
        teacher = resnet()
        student = student_of(teacher, 4)
        calibrate_model(student, [photographs()], teacher=teacher, disable_progress=True)
        before = {name: layer.weight_codes() for name, layer in quantized_layers(student).items()}
        monkeypatch.setattr("sqakd_hf.reconstruction.optimizer.WEIGHT_RATE", 1e3)
        result = reconstruct(student, teacher, steps=2)
        assert all(unit.after == min(unit.before, unit.calibrated) for unit in result)
        assert all(
            torch.equal(layer.weight_codes(), before[name]) for name, layer in quantized_layers(student).items()
        )

    @pytest.mark.parametrize("quantizer", ["lsq", "lsq+", "ewgs", "pact", "dorefa", "statsq"])
    def test_trains_any_quantizer(self, quantizer):
        teacher = resnet()
        student = student_of(teacher, 4, quantizer=quantizer)
        result = reconstruct(student, teacher, steps=12)
        assert all(unit.after <= unit.calibrated for unit in result)
        assert any(unit.after < unit.calibrated for unit in result)

    def test_twice_and_with_any_memory_gives_the_same_bits(self, vit_pair):
        student, teacher = vit_pair
        others = [copy.deepcopy(student) for _ in range(2)]
        images = photographs(size=16)
        state = torch.get_rng_state()
        reconstruct(student, teacher, images)
        assert torch.equal(torch.get_rng_state(), state)
        reconstruct(others[0], teacher, images.split(7))
        reconstruct(others[1], teacher, images, memory_budget=0)
        assert same(student, others[0]) and same(student, others[1])
        reconstruct(copy.deepcopy(student), teacher, images, seed=1)
        assert not same(student, vit_pair[1])

    def test_interrupted_and_resumed_is_never_interrupted(self, tmp_path, monkeypatch):
        teacher = resnet()
        whole, student = student_of(teacher), student_of(teacher)
        before = model_state(student)
        reconstruct(whole, teacher)
        save, saved = state_module.Progress.save, []

        def save_two(self, number, *args):
            if len(saved) == 2:
                raise KeyboardInterrupt
            saved.append(number)
            save(self, number, *args)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(state_module.Progress, "save", save_two)
            reconstruct(student, teacher, checkpoint_dir=tmp_path)
        assert_left(student, before)
        with monkeypatch.context() as patched:
            trained_units = []
            patched.setattr(
                "sqakd_hf.reconstruction.training.calibrate_unit",
                spy("sqakd_hf.reconstruction.calibration.calibrate_unit", trained_units),
            )
            result = reconstruct(student, teacher, checkpoint_dir=tmp_path)
        assert len(trained_units) == 2 and len(result.units) == 4
        assert same(student, whole)

    def test_a_folder_of_another_run_is_refused(self, tmp_path):
        teacher = resnet()
        reconstruct(student_of(teacher), teacher, checkpoint_dir=tmp_path)
        with pytest.raises(InputError, match="another reconstruction, with other seed, steps"):
            reconstruct(student_of(teacher), teacher, checkpoint_dir=tmp_path, steps=9, seed=1)

    def test_reloaded_from_its_packed_file_it_has_the_same_codes(self, vit_pair, tmp_path):
        student, teacher = vit_pair
        images = photographs(size=16)
        reconstruct(student, teacher, images)
        codes = {name: layer.weight_codes() for name, layer in quantized_layers(student).items()}
        student.eval().save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        found = {name: layer.weight_codes() for name, layer in quantized_layers(loaded).items()}
        assert codes.keys() == found.keys() and all(torch.equal(codes[name], found[name]) for name in codes)
        with torch.no_grad():
            assert torch.equal(student(images).logits, loaded(images).logits)

    def test_weights_rest_on_their_values(self):
        student = student_of(resnet())
        calibrate_model(student, [photographs()], disable_progress=True)
        layers = list(quantized_layers(student).values())
        expected = [layer.weight_codes() for layer in layers]
        settle_weights(layers)
        assert all(torch.equal(layer.weight_codes(), codes) for layer, codes in zip(layers, expected, strict=True))
        assert all(torch.equal(layer.quantized_weight(), layer.stored_weight) for layer in layers)

    def test_leaves_gradients_modes_and_what_is_frozen_alone(self):
        teacher = resnet()
        student = student_of(teacher).train()
        student.stem.weight.requires_grad_(False)
        calibrate_model(student, [photographs()], teacher=teacher, disable_progress=True)
        student.blocks.eval()
        before = model_state(student), model_state(teacher)
        reconstruct(student, teacher)
        after = model_state(student), model_state(teacher)
        for key in ("trained", "modules", "hooks"):
            assert before[0][key] == after[0][key] and before[1][key] == after[1][key]
        assert all(torch.equal(before[1]["tensors"][name], value) for name, value in after[1]["tensors"].items())
        assert all(parameter.grad is None for parameter in student.parameters())


def spy(path, calls):
    module, _, name = path.rpartition(".")
    function = getattr(__import__(module, fromlist=[name]), name)

    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


def assert_left(model, before):
    after = model_state(model)
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(tensor, after["tensors"][name]) or (
            tensor.isnan().all() and after["tensors"][name].isnan().all()
        )
    after.pop("tensors")
    assert before == after


class TestTimeBudget:
    def test_its_updates_are_found_by_timing_and_leave_the_student_alone(self):
        teacher = resnet()
        student = student_of(teacher)
        calibrate_model(student, [photographs()], teacher=teacher, disable_progress=True)
        images = Images(photographs(), student)
        units = find_units(teacher, list(quantized_layers(student)), images.first())
        before, state = model_state(student), torch.get_rng_state()
        cost = cost_of(units, student, teacher, images, 8)
        assert_left(student, before)
        assert torch.equal(torch.get_rng_state(), state)
        assert cost.fixed > 0 and cost.update > 0
        # The stem takes 3 channels and puts out 8, in float32, of 40 images, in student and teacher.
        assert cost.memory == 2 * 40 * 4 * 12 * 12 * (8 + 8)

    def test_a_time_is_what_its_updates_take(self):
        cost = Cost(fixed=20.0, update=0.5, memory=0)
        assert cost.steps(70.0) == 100 and cost.seconds(100) == 70.0
        assert cost.steps(1.0) == FEWEST_STEPS and cost.steps(1e6) == MOST_STEPS

    def test_it_is_about_kept(self):
        teacher = resnet()
        student = student_of(teacher)
        start = time.perf_counter()
        reconstruct(student, teacher, time_budget=8.0)
        assert 1 < time.perf_counter() - start < 40  # other programs run as well

    def test_an_interrupted_one_goes_on_with_its_number(self, tmp_path, monkeypatch, caplog):
        teacher = resnet()
        whole, student = student_of(teacher), student_of(teacher)
        reconstruct(whole, teacher, steps=5)
        save = state_module.Progress.save

        def save_one(self, number, *args):
            if number:
                raise KeyboardInterrupt
            save(self, number, *args)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Cost, "steps", lambda self, seconds: 5)
            patched.setattr(state_module.Progress, "save", save_one)
            reconstruct(student, teacher, time_budget=60.0, checkpoint_dir=tmp_path)
        reconstruct(student, teacher, time_budget=60.0, checkpoint_dir=tmp_path)
        assert same(student, whole)


class TestWindows:
    def test_are_found_where_the_float_unit_is_local(self):
        teacher = resnet()
        images = photographs(5, size=64)
        units = find_units(teacher, list(quantized_layers(student_of(teacher))), {"pixel_values": images})
        x, windows = images, []
        for unit in units:
            windows.append(find_window(unit, teacher, UnitInputs([x]), torch.device("cpu")))
            x = unit.run(teacher, [x])
        assert [window and (window.stride, window.margin) for window in windows] == [(1, 1), (1, 2), (2, 2), None]

    def test_compare_what_the_whole_map_has_there(self):
        teacher = resnet()
        images = photographs(5, size=64)
        unit = find_units(teacher, list(quantized_layers(student_of(teacher))), {"pixel_values": images})[2]
        x = teacher.blocks[0](teacher.stem(images)).detach()
        window = find_window(unit, teacher, UnitInputs([x]), torch.device("cpu"))
        whole = unit.run(teacher, [x.clone()])
        generator = torch.Generator().manual_seed(0)
        sizes = set()
        for _ in range(30):
            place = window.place(generator)
            part = window.compared(unit.run(teacher, [window.of_input(x, *place).clone()]), *place)
            torch.testing.assert_close(part, window.of_output(whole, *place), rtol=0, atol=1e-5)
            sizes.add(tuple(part.shape[2:]))
        assert (SIDE, SIDE) in sizes and len(sizes) > 1  # at the map's own border nothing is left out

    def test_train_like_whole_maps(self):
        teacher, images = resnet(), photographs(40, size=40)
        student = student_of(teacher, 4)
        result = reconstruct(student, teacher, images, steps=20)
        assert result.units[1].after < result.units[1].calibrated


def test_adam_moves_each_parameter_at_its_own_rate():
    parameters = [torch.zeros(3), torch.zeros(2)]
    rates = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.5)]
    own = RatedAdam(list(zip(parameters, rates, strict=True)))
    plain = [torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    theirs = torch.optim.Adam(plain, lr=1.0, betas=RatedAdam.BETAS, eps=RatedAdam.EPSILON)
    for _ in range(4):
        gradients = [torch.randn(3), torch.randn(2)]
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = gradient.clone()
        theirs.step()
        own.step(gradients, 1.0)
    for parameter, rate, expected in zip(parameters, rates, plain, strict=True):
        torch.testing.assert_close(parameter, expected.detach() * rate)


@pytest.mark.parametrize(("quantizer", "learned"), [("lsq", ["scale"]), ("lsq+", ["scale"]), ("ewgs", ["upper"])])
def test_an_input_that_is_never_negative_keeps_its_lower_end(quantizer, learned):
    for signed in (True, False):
        module = create_quantizer(quantizer, bits=4, role="activation", signed=signed)
        module.init_range(torch.linspace(-0.5 if signed else 0, 2, 100))
        rates = dict(rated_parameters([module]))
        found = [name for name, tensor in module.named_parameters() if tensor in rates]
        assert found == (list(dict(module.named_parameters())) if signed else learned)
        lower, upper = (float(end) for end in module.clip_range())
        assert all(0 < float(rate) <= 1.0001 * RANGE_RATE * (upper - lower) for rate in rates.values())


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"images": []}, "There are no images"),
            ({"images": photographs(8)}, "8 images are too few"),
            ({"images": [{"labels": torch.zeros(3)}]}, "holds it as pixel_values; got dict with the keys"),
            ({"images": [photographs(20), photographs(20, 14)]}, "All images must have one size"),
            ({"units": ["layer9"]}, "units: the pattern 'layer9' matches no layer"),
            ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
            ({"time_budget": 0}, "time_budget must be a positive number of seconds, got 0"),
            ({"teacher": TinyConvNet()}, "the teacher has other parameters than the student"),
            ({"teacher": student_of(resnet())}, "the teacher is quantized itself"),
        ],
    )
    def test_is_one_sentence_and_the_student_as_it_was(self, options, message):
        teacher = resnet()
        student = student_of(teacher)
        before = model_state(student)
        with pytest.raises(InputError, match=message):
            reconstruct(student, **{"teacher": teacher, **options})
        assert_left(student, before)

    def test_a_full_disk_and_no_memory_is_said(self, monkeypatch):
        teacher = resnet()
        student = student_of(teacher)
        before = model_state(student)
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
        with pytest.raises(InputError, match="There is no room for what a unit takes"):
            reconstruct(student, teacher, memory_budget=0)
        assert_left(student, before)

    def test_a_float_model_has_nothing_to_reconstruct(self):
        with pytest.raises(InputError, match="The model has no quantized layer"):
            reconstruct(resnet(), resnet())

    def test_a_network_whose_layers_run_twice_has_nothing_either(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3, padding=1)

            def forward(self, x):
                return self.conv(self.conv(x)).mean((2, 3))

        teacher = Twice().eval()
        student = student_of(teacher)
        with pytest.raises(InputError, match="Twice has nothing to reconstruct"):
            reconstruct(student, teacher)

    def test_an_error_on_the_way_leaves_the_student_as_it_was(self, monkeypatch):
        teacher = resnet()
        student = student_of(teacher)
        calibrate_model(student, [photographs()], disable_progress=True)
        before = model_state(student)
        monkeypatch.setattr("sqakd_hf.reconstruction.training.settle_weights", lambda layers: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reconstruct(student, teacher)
        assert_left(student, before)

    def test_images_that_are_not_finite(self):
        teacher = resnet()
        student = student_of(teacher)
        images = photographs()
        images[35, 0, 3, 3] = float("nan")
        before = model_state(student)
        with pytest.raises(InputError, match="images hold values that are NaN"):
            calibrate_model(student, [images], teacher=teacher, disable_progress=True)
        images[35, 0, 3, 3] = 1e38  # beyond float32 in the first layer, of an image that sets no range
        with pytest.raises(InputError, match="NaN values in 'fc' of TinyResNet"):
            calibrate_model(student, [images * 3], teacher=teacher, disable_progress=True)
        assert_left(student, before)

    def test_statistics_are_matched_or_estimated_anew(self):
        teacher = resnet()
        with pytest.raises(InputError, match="pass one of the two"):
            calibrate_model(student_of(teacher), [photographs()], teacher=teacher, reestimate_batch_norm=True)


def reconstruct_in_a_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    teacher = resnet()
    student = student_of(teacher)
    result = reconstruct(student, teacher, photographs(80)[rank * 40 :][:40], steps=20)
    torch.save((student.state_dict(), [(unit.before, unit.after) for unit in result]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_one_student(tmp_path):
    torch.multiprocessing.spawn(reconstruct_in_a_process, (tmp_path,), nprocs=2)
    (one, errors), (other, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert errors == others and any(after < 0.9 * before for before, after in errors)


def test_under_autocast_units_compute_in_its_precision():
    teacher = resnet()
    student = student_of(teacher, 4)
    with torch.autocast("cpu", torch.bfloat16):
        result = reconstruct(student, teacher, steps=20)
    assert all(unit.after <= min(unit.before, unit.calibrated) for unit in result)
    assert sum(unit.after for unit in result) < sum(unit.calibrated for unit in result)
    assert all(tensor.dtype != torch.bfloat16 for tensor in student.state_dict().values())
