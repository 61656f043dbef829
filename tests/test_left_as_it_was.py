"""Whatever raises leaves models, files and the state of the process as they were: a fuzz of the public functions."""

import copy
import logging
import os
import random
import signal
import threading

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import sqakd_hf
from sqakd_hf import QuantizationConfig, SQAKDTrainer, SQAKDTrainingArguments
from tests.helpers.models import TinyConvNet, tiny_vit


pytestmark = pytest.mark.fuzz


FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def process_state() -> dict:
    """What a library may change in a process and nobody wants changed."""
    return {
        "random numbers": (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "modes": torch._C._len_torch_function_stack(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_num_threads()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "timm": len(timm.list_models(include_tags=False)),
        "transformers": (sorted(AUTO_QUANTIZER_MAPPING), sorted(AUTO_QUANTIZATION_CONFIG_MAPPING)),
        "quantizers": sqakd_hf.list_quantizers(),
        "environment": dict(os.environ),
        "logging": (list(logging.getLogger("sqakd_hf").handlers), logging.getLogger("sqakd_hf").level),
        "threads": [thread.name for thread in threading.enumerate() if not thread.daemon],
        "folder": os.getcwd(),
    }


def model_state(model: torch.nn.Module) -> dict:
    """All that makes a model: values, classes, modes, hooks, attributes."""
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": {name: (type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()},
        "hooks": {
            name: [len(m._forward_hooks), len(m._forward_pre_hooks), len(m._load_state_dict_pre_hooks)]
            for name, m in model.named_modules()
        },
        "plan": getattr(model, "quantization_plan", None),
        "config": str(getattr(model, "config", None)),
        "ranges": {
            name: (m.calibrated, m.signed, m.bits)
            for name, m in model.named_modules()
            if isinstance(m, sqakd_hf.FakeQuantizer)
        },
    }


def assert_same(before: dict, after: dict) -> None:
    for name in before:
        if name == "tensors":
            assert before[name].keys() == after[name].keys()
            for key, tensor in before[name].items():
                assert torch.equal(tensor.nan_to_num(7), after[name][key].nan_to_num(7)), key
        else:
            assert before[name] == after[name], name


class Untouched:
    """Context that tells whether its body raised, and then holds process, models and files against what they were."""

    def __init__(self, *models: torch.nn.Module, folder=None):
        self.models, self.folder = models, folder

    def files(self) -> list[str]:
        return sorted(map(str, self.folder.rglob("*"))) if self.folder else []

    def __enter__(self) -> "Untouched":
        self.before = process_state(), [model_state(model) for model in self.models], self.files()
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if kind is None:
            return False
        process, models, files = self.before
        assert_same(process, process_state())
        for model, before in zip(self.models, models, strict=True):
            assert_same(before, model_state(model))
        assert files == self.files()
        assert issubclass(kind, ValueError | TypeError | KeyboardInterrupt), error
        return True


# Values that people pass by mistake, beside right ones.
NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([2.5, float("nan"), True, None, "4", "none"]))
NAMES = st.sampled_from(["lsq", "ewgs", "statsq", "lsqq", "", None, 3])
PATTERNS = st.sampled_from(["body", "stem.0", "nowhere", "", 4])
OPTIONS = {
    "quantizer": NAMES,
    "weight_bits": NUMBERS,
    "activation_bits": NUMBERS,
    "first_last_bits": NUMBERS,
    "attention_bits": NUMBERS,
    "residual_bits": NUMBERS,
    "per_channel": st.sampled_from([True, False, "no", None]),
    "overrides": st.one_of(
        st.none(), st.dictionaries(PATTERNS, st.dictionaries(st.sampled_from(["weight_bits", "bits"]), NUMBERS))
    ),
    "modules_to_not_convert": st.one_of(st.none(), st.lists(PATTERNS, max_size=2), st.just("stem")),
    "quantizer_kwargs": st.sampled_from([{}, {"delta": -1}, {"delta": 0.1}, {"gamma": 1}, None, [1]]),
}
CONFIGS = st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.none(), max_size=3).flatmap(
    lambda chosen: st.fixed_dictionaries({name: OPTIONS[name] for name in chosen})
)


class Broken(torch.utils.data.Dataset):
    """Images of which the one of a given number can't be read."""

    def __init__(self, bad: int, error: type[BaseException]):
        self.bad, self.error = bad, error

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        if index == self.bad:
            raise self.error("can't be read")
        return {"pixel_values": torch.full((3, 16, 16), index / 16.0)}


def batches(kind: str):
    """A generator of calibration batches, of which the second is bad."""
    yield torch.zeros(4, 3, 16, 16).normal_(generator=torch.Generator().manual_seed(0))
    if kind == "interrupt":
        raise KeyboardInterrupt
    yield {
        "nan": torch.full((4, 3, 16, 16), float("nan")),
        "infinite": torch.full((4, 3, 16, 16), float("inf")),
        "channels": torch.zeros(4, 5, 16, 16),
        "one": torch.zeros(1, 3, 16, 16),
        "text": "images",
        "keys": {"images": torch.zeros(4, 3, 16, 16)},
        "small": torch.zeros(4, 3, 1, 1),
        "integers": torch.zeros(4, 3, 16, 16, dtype=torch.int64),
    }[kind]


STATES = ("new", "calibrated", "trained", "reloaded")
BATCHES = ("nan", "infinite", "channels", "one", "text", "keys", "small", "integers", "interrupt")


class TestModels:
    @pytest.mark.parametrize("build", [TinyConvNet, tiny_vit], ids=["module", "native-vit"])
    @FUZZ
    @given(options=CONFIGS)
    @example(options={"attention_bits": 8})  # there is no attention, or no convolution whose sums are added
    @example(options={"residual_bits": 8})
    @example(options={"modules_to_not_convert": ["nowhere"]})
    def test_quantizing(self, build, options):
        model = build()
        with Untouched(model):
            sqakd_hf.quantize_model(model, QuantizationConfig(**options))

    @pytest.mark.parametrize("kind", BATCHES)
    @pytest.mark.parametrize(
        ("build", "state"),
        # Modules that are not of transformers have no packed file to be reloaded from.
        [(TinyConvNet, state) for state in STATES[:3]] + [(tiny_vit, state) for state in STATES],
    )
    def test_calibrating(self, build, state, kind, tmp_path):
        torch.manual_seed(0)
        student = build()
        sqakd_hf.quantize_model(student, QuantizationConfig(weight_bits=3, activation_bits=4))
        if state != "new":
            sqakd_hf.calibrate_model(student, [torch.randn(8, 3, 16, 16)], disable_progress=True)
        if state == "trained":
            student.train()(torch.randn(4, 3, 16, 16))
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.mul_(1.01)
        if state == "reloaded":
            student.save_pretrained(tmp_path)
            student = type(student).from_pretrained(tmp_path)
        with Untouched(student):
            sqakd_hf.calibrate_model(
                student, batches(kind), reestimate_batch_norm=build is TinyConvNet, disable_progress=True
            )

    @FUZZ
    @given(name=NAMES, bits=NUMBERS, role=st.sampled_from(["weight", "activation", "both", None]), signed=NUMBERS)
    def test_creating_quantizers(self, name, bits, role, signed):
        with Untouched():
            sqakd_hf.create_quantizer(name, bits=bits, role=role, signed=signed)

    @FUZZ
    @given(
        name=st.sampled_from(["timm/test_resnet", "timm/test_resnet.nothing", "timm/resnet81", "", "no/such", "."]),
        labels=NUMBERS,
        size=NUMBERS,
        arguments=st.sampled_from([None, {}, {"depth": 1}, {"in_chans": 0}, {"channels": "many"}, 3]),
    )
    def test_building(self, name, labels, size, arguments):
        sqakd_hf.build_model("timm/test_resnet", 2)  # what a first use imports and registers stays
        with Untouched():
            sqakd_hf.build_model(name, labels, size, arguments)
        with Untouched():
            sqakd_hf.load_model(name, num_labels=labels)


class TestData:
    @FUZZ
    @given(
        name=st.sampled_from(["digits", "digit", "", "/nowhere", ".", "a.parquet"]),
        options=st.fixed_dictionaries(
            {},
            optional={
                "test_fraction": st.sampled_from([0.2, 0, 1.5, float("nan")]),
                "max_train_images": NUMBERS,
                "max_test_images": NUMBERS,
                "label_column": st.sampled_from([None, "label", "labels", "klass"]),
                "image_column": st.sampled_from([None, "image", "label"]),
                "train_split": st.sampled_from(["train", "training"]),
                "test_split": st.sampled_from(["test", None, "train"]),
            },
        ),
    )
    def test_loading(self, name, options, tmp_path):
        with Untouched(folder=tmp_path):
            data = sqakd_hf.load_image_data(name, **options)
            sqakd_hf.split_holdout(data.train, options.get("test_fraction", 0.1), seed=0)

    @FUZZ
    @given(
        size=NUMBERS,
        mean=st.sampled_from([(0.5,) * 3, (0.5,), (0.5, 0.5), ()]),
        std=st.sampled_from([(0.5,) * 3, (0.0,) * 3, (0.5,)]),
        options=st.fixed_dictionaries(
            {},
            optional={
                "crop_pct": st.sampled_from([1.0, 0.0, 2]),
                "augment": st.sampled_from(["none", "crop-flip", "mixup"]),
                "interpolation": st.sampled_from(["bicubic", "cubic"]),
            },
        ),
        image=st.sampled_from([None, {"bytes": b"no image", "path": None}, {"bytes": None, "path": "nowhere.png"}, 3]),
    )
    def test_transforming(self, size, mean, std, options, image):
        with Untouched():
            sqakd_hf.ImageTransform(size, mean, std, **options)({"image": [image]})


class TestTraining:
    @FUZZ
    @given(
        options=st.dictionaries(
            st.sampled_from(
                ["temperature", "calibration_images", "quantizer_learning_rate", "oscillation_freezing", "objective"]
                + ["reestimate_batch_norm", "freeze_batch_norm", "teacher_dtype", "activation_memory"]
            ),
            NUMBERS,
            min_size=1,
            max_size=2,
        )
    )
    def test_arguments(self, options, tmp_path):
        SQAKDTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)  # sets up accelerate once
        with Untouched(folder=tmp_path):
            SQAKDTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("bad", [0, 9, 15])
    def test_calibration_and_measuring_by_the_trainer(self, bad, error, tmp_path):
        torch.manual_seed(0)
        teacher = TinyConvNet()
        student = copy.deepcopy(teacher)
        sqakd_hf.quantize_model(student, QuantizationConfig(weight_bits=8, activation_bits=8))
        args = SQAKDTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        trainer = SQAKDTrainer(student, teacher, args, Broken(bad, error), Broken(bad, error))
        with Untouched(student, teacher, folder=tmp_path):
            trainer.calibrate()
        sqakd_hf.calibrate_model(student, [torch.rand(8, 3, 16, 16)], disable_progress=True)
        for act in (trainer.calibrate, trainer.measure_layers, trainer.evaluate):
            modes = student.training
            with Untouched(teacher, folder=tmp_path):
                act()
            student.train(modes)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_training_that_ends_in_an_error(self, error, tmp_path):
        torch.manual_seed(0)
        teacher = TinyConvNet()
        student = copy.deepcopy(teacher)
        sqakd_hf.quantize_model(student, QuantizationConfig(weight_bits=8, activation_bits=8))
        sqakd_hf.calibrate_model(student, [torch.rand(8, 3, 16, 16)], disable_progress=True)
        args = SQAKDTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        callbacks = [sqakd_hf.InterruptCallback()]
        trainer = SQAKDTrainer(student, teacher, args, Broken(5, error), callbacks=callbacks)
        before = process_state() | {"random numbers": None}  # training draws
        with pytest.raises(error):
            trainer.train()
        assert_same(before, process_state() | {"random numbers": None})
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in student.modules())


class TestExport:
    @settings(FUZZ, max_examples=8)
    @given(
        options=st.fixed_dictionaries(
            {},
            optional={
                "container": st.sampled_from(["int8", "packed", "int4", None]),
                "image_size": st.sampled_from([16, 0, -1, "16", 1]),
                "opset": st.sampled_from([None, 7, "21"]),
                "signed_activations": st.booleans(),
            },
        ),
        place=st.sampled_from(["student.onnx", "no/such/folder/student.onnx", "."]),
        calibrated=st.booleans(),
    )
    def test_exporting(self, options, place, calibrated, tmp_path_factory):
        folder = tmp_path_factory.mktemp("export")
        torch.manual_seed(0)
        student = TinyConvNet()
        sqakd_hf.quantize_model(student, QuantizationConfig(weight_bits=8, activation_bits=8))
        if calibrated:
            sqakd_hf.calibrate_model(student, [torch.randn(8, 3, 16, 16)], disable_progress=True)
        with Untouched(student.eval(), folder=folder):
            sqakd_hf.export_onnx(student, folder / place, **options)
