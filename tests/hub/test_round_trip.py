"""Law 2: a trained student, its packed reload in a fresh process and the reload of that compute the same bits."""

import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation

from sqakd_hf import (
    QuantizationConfig,
    build_model,
    calibrate_model,
    list_quantizers,
    quantize_model,
    quantized_layers,
)
from tests.helpers.models import CLASSES, tiny_vit


pytestmark = pytest.mark.process


def native(name, auto_class=AutoModelForImageClassification, **options):
    def build():
        config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
        return auto_class.from_config(config)

    return build


def timm(name, **model_args):
    return lambda: build_model(f"timm/{name}", CLASSES, image_size=32, model_args=model_args)


TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_VIT = {**TRANSFORMER, "image_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 32, "patch_size": 4}
MODELS = {
    "timm-resnet": timm("test_resnet"),
    "timm-mobilenetv3": timm("mobilenetv3_small_050"),
    "timm-efficientnet": timm("test_efficientnet"),
    "timm-tf-mobilenetv3": timm("tf_mobilenetv3_small_minimal_100"),  # TensorFlow's padding
    "timm-convnext": timm("test_convnext"),
    "timm-vit": timm("test_vit", img_size=32, patch_size=8),
    "timm-nfnet": timm("test_nfnet"),  # standardised weights with gains
    "timm-beit": timm("beit_base_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=16, num_heads=2),
    "timm-swin": timm(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    ),
    "timm-swinv2": timm(  # buffers that are computed while it is loaded
        "swinv2_tiny_window8_256", img_size=32, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    ),
    "timm-coat": timm(  # modules that stand in several places
        "coat_tiny",
        img_size=32,
        embed_dims=(16, 16, 16, 16),
        serial_depths=(2, 2, 1, 1),
        parallel_depth=1,
    ),
    "vit": native("ViT", **SMALL_VIT),
    "deit": native("DeiT", **SMALL_VIT, architectures=["DeiTForImageClassification"]),
    "resnet": native("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "swin": native("Swin", **SWIN),
    "beit": native("Beit", **SMALL_VIT),
    "convnext": native("ConvNext", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]),
    "mobilenetv2": native("MobileNetV2", depth_multiplier=0.25, image_size=32),
    "dinov2": native("Dinov2", **SMALL_VIT),
    "bit": native("Bit", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8, num_groups=4),
    "segformer": native(
        "Segformer",
        AutoModelForSemanticSegmentation,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    ),
    "dpt": native(  # transposed convolutions
        "DPT",
        AutoModelForSemanticSegmentation,
        **{**SMALL_VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        use_auxiliary_head=False,
    ),
}
RELOAD = """
import sys, torch, transformers
import sqakd_hf

auto_class, *folders = sys.argv[1:]
for folder in folders:
    auto = getattr(transformers, auto_class)
    model, info = auto.from_pretrained(folder + "/one", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    images = torch.load(folder + "/images.pt")
    with torch.no_grad():
        first = model(images).logits
        model.save_pretrained(folder + "/two")
        second = auto.from_pretrained(folder + "/two")(images).logits
    torch.save((first, second), folder + "/logits.pt")
"""


def train(model, images, steps=3):
    """A few steps away from the float model: weights, ranges and batch statistics all move."""
    model.train()
    target = torch.randn(model(images).logits.shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(images).logits - target).square().mean().backward()
        optimizer.step()
    return model.eval()


def saved_student(folder, build, **config):
    """Save a trained student and the images; return its logits."""
    torch.manual_seed(0)
    model = build()
    size = 16 if build is tiny_vit else 32
    images = torch.randn(4, 3, size, size)
    quantize_model(model, QuantizationConfig(**config))
    calibrate_model(model, [torch.randn(8, 3, size, size)], disable_progress=True)
    train(model, images)
    folder.mkdir(parents=True)
    torch.save(images, folder / "images.pt")
    with torch.no_grad():
        logits = model(images).logits
    model.save_pretrained(folder / "one")
    assert torch.isfinite(logits).all() and logits.std() > 0
    return logits, {name: layer.weight.shape for name, layer in quantized_layers(model).items()}


def assert_reloads_alike(folders_and_logits, auto_class="AutoModelForImageClassification"):
    folders = [str(folder) for folder in folders_and_logits]
    done = subprocess.run([sys.executable, "-c", RELOAD, auto_class, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, logits in folders_and_logits.items():
        first, second = torch.load(folder / "logits.pt")
        assert torch.equal(first, logits), f"{folder.name}: the reload differs by {(first - logits).abs().max()}"
        assert torch.equal(second, logits), f"{folder.name}: the second reload differs"
        one, two = ((folder / name / "model.safetensors").read_bytes() for name in ("one", "two"))
        assert one == two, f"{folder.name}: the second file differs from the first"


@pytest.mark.parametrize("name", MODELS)
def test_every_model_family(tmp_path, name):
    logits, shapes = saved_student(tmp_path / name, MODELS[name], weight_bits=3, activation_bits=4)
    with safe_open(tmp_path / name / "one" / "model.safetensors", framework="pt") as file:
        packed = {key: file.get_slice(key) for key in file.keys() if key.removesuffix(".weight") in shapes}
        assert len(packed) == len(shapes)
        assert all(len(each.get_shape()) == 1 and each.get_dtype() == "U8" for each in packed.values())
    dense = name in ("segformer", "dpt")
    auto_class = "AutoModelForSemanticSegmentation" if dense else "AutoModelForImageClassification"
    assert_reloads_alike({tmp_path / name: logits}, auto_class)


@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "vit", "swin"])
def test_quantized_attention(tmp_path, name):
    logits, _ = saved_student(tmp_path / name, MODELS[name], weight_bits=3, activation_bits=4, attention_bits=3)
    assert_reloads_alike({tmp_path / name: logits})
    with safe_open(tmp_path / name / "one" / "model.safetensors", framework="pt") as file:
        assert sum("probability_quantizer.scale" in key for key in file.keys()) >= 1


@pytest.mark.parametrize("name", ["timm-resnet", "resnet"])
def test_quantized_residuals(tmp_path, name):
    logits, _ = saved_student(tmp_path / name, MODELS[name], weight_bits=3, activation_bits=4, residual_bits=8)
    assert_reloads_alike({tmp_path / name: logits})
    with safe_open(tmp_path / name / "one" / "model.safetensors", framework="pt") as file:
        assert sum("output_quantizer.scale" in key for key in file.keys()) >= 3


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
def test_every_quantizer_and_width(tmp_path, per_channel):
    students = {}
    for quantizer in list_quantizers():
        for bits in (1, 2, 3, 4, 8):
            folder = tmp_path / f"{quantizer}-{bits}"
            students[folder], _ = saved_student(
                folder, tiny_vit, quantizer=quantizer, weight_bits=bits, activation_bits=bits, per_channel=per_channel
            )
    assert_reloads_alike(students)
