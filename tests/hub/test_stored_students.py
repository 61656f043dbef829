"""Students that earlier versions stored load with the same codes, ranges and outputs."""

import json

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForImageClassification

import sqakd_hf
from tests.helpers.paths import TESTS
from tests.stored.store_students import STUDENTS, images


FOLDERS = sorted((TESTS / "stored").glob("students_of_*/*"))


def test_there_are_all_of_them():
    assert len(FOLDERS) >= len(STUDENTS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name[-7:]}-{path.name}")
def test_it_loads_with_the_same_codes_and_computes_the_same(folder, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folder)
    stored = json.loads((folder / "logits.json").read_text())
    with torch.no_grad():
        logits = model(images(4, stored["size"])).logits
    # Written on another machine: the same codes, but for the sums of another CPU.
    torch.testing.assert_close(logits, torch.tensor(stored["logits"]), rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    before, after = (safetensors.torch.load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["stored"]["layers"]
    for name, layer in sqakd_hf.quantized_layers(model).items():
        assert layer.weight_quantizer.bits == layers[name]["weight_bits"]
