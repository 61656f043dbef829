"""Damaged and hostile files: a stored student loads as it was, or one error names the file and what is wrong in it.

A hundred random damages by default; `SQAKD_FUZZ_EXAMPLES=1000` runs a thousand of each kind.
"""

import copy
import dataclasses
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from sqakd_hf import InputError, QuantizationConfig, calibrate_model, quantize_model
from sqakd_hf.hub.manifest import Manifest
from sqakd_hf.quantization.packing import checksum
from tests.helpers.models import tiny_vit


pytestmark = pytest.mark.fuzz


EXAMPLES = int(os.environ.get("SQAKD_FUZZ_EXAMPLES", "100"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=20_000,  # ms: no damage may hang
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 9, 300, 2**40, 2.5, "4", "", "x", [], [1], {}, {"a": 1}, "../../x", "é" * 300, [[]]]
)


FIELDS = [field.name for field in dataclasses.fields(QuantizationConfig)]


class Student:
    """A stored student whose files can be changed and put back."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        model = tiny_vit()
        quantize_model(model, QuantizationConfig(weight_bits=3, activation_bits=4))
        calibrate_model(model, [torch.randn(8, 3, 16, 16)], disable_progress=True)
        model.eval().save_pretrained(folder)
        self.folder, self.logits = folder, model(IMAGES).logits
        self.weights_path, self.config_path = folder / "model.safetensors", folder / "config.json"
        self.weights, self.config_text = self.weights_path.read_bytes(), self.config_path.read_text()
        self.tensors = {name: tensor.clone() for name, tensor in load_file(self.weights_path).items()}

    @property
    def config(self) -> dict:
        return json.loads(self.config_text)

    def write(self, weights: bytes | dict | None = None, config: str | dict | None = None) -> None:
        if isinstance(weights, dict):
            save_file(weights, self.weights_path, metadata={"format": "pt"})
        else:
            self.weights_path.write_bytes(self.weights if weights is None else weights)
        text = json.dumps(config) if isinstance(config, dict) else self.config_text if config is None else config
        self.config_path.write_text(text)

    def check(self, *accepted: type[Exception]) -> str:
        """Load; return `"same"` or the error's message. `accepted`: what transformers raises before we are asked."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            model = AutoModelForImageClassification.from_pretrained(self.folder)
        except InputError as error:
            message = str(error)
            # The recipe's own errors name the field; nobody tells them in which file it was.
            named = (str(self.folder), "config.json", "quantization config", "format version", *FIELDS)
            assert any(name in message for name in named) and len(message) < 2000, message
            return message
        except accepted as error:
            return str(error)
        finally:
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KB
        assert torch.equal(model(IMAGES).logits, self.logits), "another network was loaded in silence"
        return "same"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield Student(tmp_path_factory.mktemp("student"))
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def consistent(config: dict, tensors: dict) -> dict:
    """Return the config with the checksums that these tensors and its own table have: a forger's work."""
    config = copy.deepcopy(config)
    stored = {k: v for k, v in config["quantization_config"]["stored"].items() if k != "checksum"}
    stored["tensors"] = {name: checksum(tensor) for name, tensor in tensors.items()}
    config["quantization_config"]["stored"] = Manifest(**stored).to_dict()
    return config


def header_of(weights: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def with_header(text: str, data: bytes, length: int | None = None) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def test_the_untouched_student_is_the_same(student):
    student.write()
    assert student.check() == "same"
    student.write(config=consistent(student.config, student.tensors))
    assert student.check() == "same"


class TestWeightsFile:
    @fuzz
    @given(st.data())
    def test_truncated_anywhere(self, student, data):
        length = data.draw(st.integers(0, len(student.weights) - 1))
        student.write(weights=student.weights[:length])
        assert "model.safetensors" in student.check()

    @fuzz
    @given(st.data())
    def test_a_flipped_bit_anywhere(self, student, data):
        bit = data.draw(st.integers(0, 8 * len(student.weights) - 1))
        changed = bytearray(student.weights)
        changed[bit // 8] ^= 1 << bit % 8
        student.write(weights=bytes(changed))
        student.check()  # in the header's blanks it is harmless

    @fuzz
    @given(st.data())
    def test_a_changed_header(self, student, data):
        header, rest = header_of(student.weights)
        name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        entry = header[name]
        kind = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "removed", "renamed", "extra", "doubled"]))
        if kind == "dtype":
            entry["dtype"] = data.draw(st.sampled_from(["F32", "I32", "U8", "I8", "BF16", "F8_E4M3", "F64", "X"]))
        elif kind == "shape":
            numbers = st.sampled_from([0, 1, -1, 2, 4, 16, 64, 2**40, 2**63, 1.5])
            entry["shape"] = data.draw(st.lists(numbers, max_size=4))
        elif kind == "data_offsets":
            entry["data_offsets"] = data.draw(st.lists(st.integers(-1, len(rest) + 1), min_size=2, max_size=2))
        elif kind == "removed":
            del header[name]
        elif kind in ("renamed", "extra"):
            new = data.draw(st.sampled_from(["x", "", "../../x", "__class__", "classifier.weight.", "vit"]))
            header[new] = header.pop(name) if kind == "renamed" else dict(entry)
        text = json.dumps(header)
        if kind == "doubled":
            text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
        student.write(weights=with_header(text, rest))
        student.check()

    @pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
    def test_an_absurd_header_length(self, student, length):
        header, rest = header_of(student.weights)
        student.write(weights=with_header(json.dumps(header), rest, length))
        assert "model.safetensors" in student.check()

    def test_no_file(self, student, tmp_path):
        shutil.copy(student.config_path, tmp_path)
        with pytest.raises(OSError, match="model.safetensors"):
            AutoModelForImageClassification.from_pretrained(tmp_path)


class TestTensors:
    @fuzz
    @given(st.data())
    def test_rewritten(self, student, data):
        """By a forger with the right checksums, and by an accident without."""
        tensors = {name: tensor.clone() for name, tensor in student.tensors.items()}
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        kind = data.draw(st.sampled_from(["nan", "inf", "longer", "shorter", "dtype", "removed", "scalar", "extra"]))
        if kind in ("nan", "inf") and tensor.is_floating_point():
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = float(kind)
        elif kind == "longer":
            tensors[name] = torch.cat([tensor, tensor])
        elif kind == "shorter":
            tensors[name] = tensor[:-1].clone()
        elif kind == "dtype":
            tensors[name] = tensor.to(torch.int16)
        elif kind == "scalar":
            tensors[name] = tensor.flatten()[0].clone()
        elif kind == "removed":
            del tensors[name]
        else:
            tensors["extra"] = tensor.clone()
        forged = data.draw(st.booleans())
        student.write(tensors, consistent(student.config, tensors) if forged else None)
        if not forged:
            assert "model.safetensors" in student.check()
        elif "_quantizer" in name or not tensor.is_floating_point() or kind not in ("nan", "inf", "dtype"):
            student.check(RuntimeError)  # transformers' own word for a float tensor of another shape
        # else: whatever a forger stores in a bias is a student like any other.

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["classifier.weight_quantizer.scale", "classifier.input_quantizer.scale"])
    def test_a_range_that_is_no_number(self, student, name, value):
        tensors = {**student.tensors, name: torch.full_like(student.tensors[name], value)}
        student.write(tensors, consistent(student.config, tensors))
        assert "lacks the ranges of 'classifier'" in student.check()


class TestConfig:
    @fuzz
    @given(st.data())
    def test_a_field_replaced_or_removed(self, student, data):
        config = student.config
        places = [config["quantization_config"], config["quantization_config"]["stored"]]
        layers = places[1]["layers"]
        places += [layers, places[1]["tensors"], *layers.values()]
        place = places[data.draw(st.integers(0, len(places) - 1))]
        name = data.draw(st.sampled_from(sorted(place)))
        kind = data.draw(st.sampled_from(["replaced", "removed", "renamed", "added"]))
        if kind == "replaced":
            place[name] = data.draw(ODD)
        elif kind == "removed":
            del place[name]
        else:
            new = data.draw(st.sampled_from(["x", "", "../../x", "__class__", "." * 500]))
            place[new] = place.pop(name) if kind == "renamed" else place[name]
        if data.draw(st.booleans()) and isinstance(config["quantization_config"].get("stored"), dict):
            stored = {k: v for k, v in config["quantization_config"]["stored"].items() if k != "checksum"}
            if stored.keys() == {"format", "layers", "tensors", "base_model"}:
                # With the right checksum: what the fields say must be refused by itself, or be another valid student.
                config["quantization_config"]["stored"] = Manifest(**stored).to_dict()
                self.check_forged(student, config)
                return
        student.write(config=config)
        # Without our name or our table transformers stops at the shapes, or at a method that it does not know.
        student.check(RuntimeError, ValueError)

    def check_forged(self, student, config):
        student.write(config=config)
        try:
            student.check(RuntimeError, ValueError)
        except AssertionError as error:
            assert "another network" in str(error)  # a valid table of other activation bits

    @pytest.mark.parametrize("bits", [0, 9, 300, -1, 2.5, "4", None, True])
    def test_bits_outside_1_to_8(self, student, bits):
        config = student.config
        config["quantization_config"]["stored"]["layers"]["classifier"]["weight_bits"] = bits
        student.write(config=config)
        assert "stored.layers['classifier'].weight_bits must be an integer from 1 to 8" in student.check()

    @pytest.mark.parametrize("shape", [[2**40, 16], [-4, 16], [0, 16], ["4", 16], [], [4.0, 16], [True, 16], None])
    def test_a_huge_or_wrong_shape(self, student, shape):
        config = student.config
        config["quantization_config"]["stored"]["layers"]["classifier"]["weight_shape"] = shape
        student.write(config=config)
        assert "config.json" in student.check()

    @pytest.mark.parametrize("value", [None, [], "x", 3, {}, {"format": "packed"}])
    def test_no_table(self, student, value):
        config = student.config
        config["quantization_config"]["stored"] = value
        student.write(config=config)
        assert student.check(RuntimeError) != "same"

    @pytest.mark.parametrize("version", [0, 3, 10**9, "2", None, True, 2.0])
    def test_another_format_version(self, student, version):
        config = student.config
        config["quantization_config"]["format_version"] = version
        student.write(config=config)
        assert "format" in student.check()

    def test_without_its_quantization_config_it_is_no_float_model(self, student):
        config = student.config
        del config["quantization_config"]
        student.write(config=config)
        assert student.check(RuntimeError) != "same"

    @fuzz
    @given(st.data())
    def test_a_changed_character_of_the_quantization_config(self, student, data):
        text = student.config_text
        start = text.index('"quantization_config"')
        end = text.index('"transformers_version"')
        place = data.draw(st.integers(start, end - 1))
        character = chr(data.draw(st.integers(32, 126)))
        student.write(config=text[:place] + character + text[place + 1 :])
        student.check(RuntimeError, ValueError, OSError)  # no JSON, another method, no quantization_config
