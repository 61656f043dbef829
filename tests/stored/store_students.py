"""Store one small student for each thing that a file can hold, as the package of today writes it.

    python tests/stored/store_students.py tests/stored/students_of_0157557

Later versions have to load them with the same codes, see tests/hub/test_stored_students.py. A change of the format
adds a folder of its own, made by the commit before the change.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, ViTConfig

from sqakd_hf import QuantizationConfig, build_model, calibrate_model, quantize_model


STUDENTS = {
    "lsq_attention": {"weight_bits": 2, "activation_bits": 4, "attention_bits": 8},
    "lsq_percentile": {"weight_bits": 4, "activation_bits": 4, "quantizer_kwargs": {"first_range": "percentile"}},
    "lsq+_free_zero_point": {"quantizer": "lsq+", "weight_bits": 3, "activation_bits": 3, "integer_zero_point": False},
    "ewgs_delta": {"quantizer": "ewgs", "weight_bits": 3, "activation_bits": 3, "quantizer_kwargs": {"delta": 0.25}},
    "pact_binary": {"quantizer": "pact", "weight_bits": 1, "activation_bits": 1, "first_last_bits": None},
    "dorefa_per_tensor": {"quantizer": "dorefa", "weight_bits": 5, "activation_bits": None, "per_channel": False},
    "statsq": {"quantizer": "statsq", "weight_bits": 2, "activation_bits": 2, "overrides": {"1": {"weight_bits": 7}}},
    "timm_residual": {"weight_bits": 4, "activation_bits": 4, "residual_bits": 8},
    "timm_attention": {"weight_bits": 6, "activation_bits": 6, "attention_bits": 4},
}
TIMM = {
    "timm_residual": ("timm/test_resnet", {"channels": [8, 8, 8, 16]}),
    "timm_attention": ("timm/test_vit", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
}


def images(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def float_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name in TIMM:
        architecture, arguments = TIMM[name]
        return build_model(architecture, 4, 32, arguments)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return AutoModelForImageClassification.from_config(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=4))


def main(folder: Path) -> None:
    for name, options in STUDENTS.items():
        model = float_model(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)  # outputs of some size
        size = 32 if name in TIMM else 16
        quantize_model(model, QuantizationConfig(**options))
        calibrate_model(model, [images(16, size)], disable_progress=True)
        model.eval().save_pretrained(folder / name)
        with torch.no_grad():
            logits = model(images(4, size)).logits
        (folder / name / "logits.json").write_text(json.dumps({"size": size, "logits": logits.tolist()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
