import subprocess
import sys

import pytest
import timm
import torch

from sqakd_hf import InputError, QuantizationConfig, build_model, calibrate_model, quantize_model
from sqakd_hf.hub import paper_networks


pytestmark = pytest.mark.process


# CIFAR forms: He et al., table 6 (0.27 M, 0.46 M), and the counts of Contrastive Representation Distillation's code
# for VGG; ImageNet forms: torchvision's documentation.
PARAMETERS = {
    "resnet20_cifar": (10, 269_722),
    "resnet32_cifar": (10, 464_154),
    "vgg8_cifar": (100, 3_965_028),
    "vgg13_cifar": (100, 9_462_180),
    "vgg11": (1000, 132_863_336),
    "resnet18": (1000, 11_689_512),
    "mobilenet_v2": (1000, 3_504_872),
    "shufflenet_v2_x0_5": (1000, 1_366_792),
    "squeezenet1_0": (1000, 1_248_424),
}


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items(), ids=PARAMETERS)
def test_parameter_counts(name, expected):
    classes, parameters = expected
    with torch.device("meta"):
        model = timm.create_model(name)
    assert (model.num_classes, sum(p.numel() for p in model.parameters())) == (classes, parameters)


RELOAD = """
import sys, torch, sqakd_hf
from transformers import AutoModelForImageClassification
load = {"student": AutoModelForImageClassification.from_pretrained, "teacher": sqakd_hf.load_model}[sys.argv[2]]
images, expected = torch.load(sys.argv[1] + "/images.pt")
assert torch.equal(load(sys.argv[1])(images).logits, expected)
"""


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name not in ("vgg11", "resnet18")])
def test_each_is_trained_packed_and_reloaded(tmp_path, name):
    torch.manual_seed(0)
    size = 32 if "cifar" in name else 64
    model = build_model(f"timm/{name}", 7, image_size=size)
    plan = quantize_model(model, QuantizationConfig(depthwise_bits=None))
    assert not plan.skipped
    ends = [layer.name for layer in plan if layer.weight_bits == 8]
    cfg = timm.models.get_pretrained_cfg(name)
    assert ends == [f"timm_model.{cfg.first_conv}", f"timm_model.{cfg.classifier}"]
    images = torch.randn(4, 3, size, size)
    calibrate_model(model, [images], disable_progress=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(images).logits.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        logits = model.eval()(images).logits
    check_reload(tmp_path, model, "student", images, logits)


@torch.no_grad()
def test_a_float_network_is_loaded_by_a_process_that_built_none(tmp_path):
    model, images = build_model("timm/resnet20_cifar", 7).eval(), torch.randn(4, 3, 32, 32)
    check_reload(tmp_path, model, "teacher", images, model(images).logits)


def check_reload(folder, model, role, images, logits):
    model.save_pretrained(folder)
    torch.save((images, logits), folder / "images.pt")
    done = subprocess.run([sys.executable, "-c", RELOAD, str(folder), role], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_images_have_three_channels():
    with pytest.raises(InputError, match="squeezenet1_0 takes images of 3 channels, got in_chans=1"):
        timm.create_model("squeezenet1_0", in_chans=1)


TAKEN = """
import sys, timm, torch
from timm.models import register_model

def mobilenet_v2(pretrained=False, **kwargs):
    return torch.nn.Identity()

register_model(mobilenet_v2)
import sqakd_hf
import sqakd_hf.hub.paper_networks
assert isinstance(timm.create_model("mobilenet_v2"), torch.nn.Identity)
assert timm.create_model("squeezenet1_0").num_classes == 1000
"""


def test_a_name_that_is_taken_is_left_as_it_is():
    done = subprocess.run([sys.executable, "-c", TAKEN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "timm's registry has another 'mobilenet_v2'" in done.stderr


def test_timm_has_none_of_the_names_itself():
    code = "import timm; print(*timm.list_models())"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in PARAMETERS if timm.models.model_entrypoint(name).__module__ == paper_networks.__name__}
    assert len(ours) == 7 and not ours & set(names)
