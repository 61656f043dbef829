"""Students to export, and their files."""

import onnx
import onnxruntime
import torch
from torch import nn
from transformers import YolosConfig, YolosForObjectDetection

from sqakd_hf import QuantizationConfig, calibrate_model, quantize_model
from tests.helpers.models import IMAGE_SIZE


def noise(count=8, size=IMAGE_SIZE, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def student_of(model, size=IMAGE_SIZE, **config):
    """A calibrated student whose BatchNorms have slopes of both signs."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(-1.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    model.train()(noise(size=size))
    quantize_model(model, QuantizationConfig(**config))
    calibrate_model(model, [noise(size=size)], disable_progress=True)
    return model.eval()


def detector():
    """A tiny YOLOS, for images of 32 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = YolosConfig(image_size=[32, 32], patch_size=8, num_detection_tokens=4, num_labels=3, **sizes)
    return YolosForObjectDetection(config)


def optimised(path):
    """The graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{path}.optimised"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph
