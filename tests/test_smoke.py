"""One quick test of each kind that the default run leaves out, see the markers in setup.cfg."""

import json

import onnxruntime
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqakd_hf import create_quantizer, export_onnx
from sqakd_hf.cli import main
from tests.helpers.exporting import noise, student_of
from tests.helpers.models import TinyConvNet
from tests.helpers.processes import run


def test_two_processes_train_one_student(tmp_path):
    one, other = run(tmp_path / "run", 2, model="vit", batch=4, accumulation=1, steps=2)
    assert all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())


def test_the_command_distils_a_student(tmp_path):
    quick = "--max_steps 2 --max_train_images 60 --max_test_images 30 --use_cpu true --disable_tqdm true"
    main(f"distill --model timm/test_resnet {quick} --output_dir {tmp_path / 'output'}".split())
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert 0 <= results["student"]["kl"] < 1e-3 and (tmp_path / "output" / "model.safetensors").exists()


def test_an_exported_student_computes_what_it_did(tmp_path):
    torch.manual_seed(0)
    student = student_of(TinyConvNet(), weight_bits=4, activation_bits=4)
    path = str(tmp_path / "student.onnx")
    export_onnx(student, path, image_size=16)
    images = noise()
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), student(images), rtol=1e-3, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.floats(0.01, 1000))
def test_values_of_codes_are_codes_of_values(bits, end):
    quantizer = create_quantizer("lsq", bits=bits, role="activation", signed=True)
    quantizer.init_range(torch.tensor([-end, end]))
    codes = torch.arange(2**bits, dtype=torch.uint8)
    assert torch.equal(quantizer.quantize(quantizer.dequantize(codes)), codes)
