"""Images of other channels than three, from the plan to the file and its report."""

import json

import onnxruntime
import pytest
import timm
import torch
from transformers import AutoModelForImageClassification, ViTConfig

from sqakd_hf import (
    QuantizationConfig,
    build_model,
    calibrate_model,
    deploy_report,
    export_onnx,
    measure_latency,
    quantize_model,
    verify_export,
)
from sqakd_hf.hub.model_preprocessing import preprocessing
from sqakd_hf.reporting.html_report import html_report


pytestmark = pytest.mark.export


SIZE = 32


def plain(channels):
    return timm.create_model("test_resnet", num_classes=4, in_chans=channels)


def wrapped(channels):
    model = build_model("timm/test_resnet", 4, image_size=SIZE, model_args={"in_chans": channels})
    model.config.pretrained_cfg["input_size"] = (3, SIZE, SIZE)  # as a Hub repository states its weights'
    return model


def native(channels):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=SIZE, patch_size=8, num_channels=channels, num_labels=4, **sizes)
    return AutoModelForImageClassification.from_config(config)


def student_of(build, channels):
    torch.manual_seed(0)
    model = build(channels).eval()
    quantize_model(model, QuantizationConfig(weight_bits=4, activation_bits=4))
    return model


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("build", [plain, wrapped, native])
def test_a_plan_and_a_preprocessing(build, channels):
    model = student_of(build, channels)
    assert all(layer.macs > 0 for layer in model.quantization_plan)
    if build is not plain:
        assert len(preprocessing(model).mean) == len(preprocessing(model).std) == channels


@pytest.mark.parametrize(("build", "channels"), [(plain, 1), (plain, 4), (wrapped, 4), (wrapped, 13), (native, 13)])
def test_a_file(build, channels, tmp_path):
    model = student_of(build, channels)
    images = torch.randn(8, channels, SIZE, SIZE)
    calibrate_model(model, [images], disable_progress=True)
    assert export_onnx(model, tmp_path / "s.onnx", image_size=SIZE).check.codes > 0
    verify_export(model, tmp_path / "s.onnx", images).require()
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    assert session.get_inputs()[0].shape[1] == channels
    if build is not plain:
        stated = json.loads(session.get_modelmeta().custom_metadata_map["sqakd.preprocessing"])
        assert stated["mean"] == list(preprocessing(model).mean) and len(stated["mean"]) == channels


@pytest.mark.parametrize(("build", "channels"), [(plain, 4), (native, 1)])
def test_a_report(build, channels):
    model = student_of(build, channels)
    deploy = deploy_report(model, image_size=SIZE).to_dict()
    page = html_report(model, "s", deploy=deploy, latency=measure_latency(model, image_size=SIZE, rounds=2).to_dict())
    assert "ONNX Runtime" in page
