import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline

from sqakd_hf import (
    InputError,
    QuantizationConfig,
    SQAKDTrainer,
    SQAKDTrainingArguments,
    build_model,
    calibrate_model,
    is_calibrated,
    list_quantizers,
    quantize_model,
)
from tests.conftest import CLASSES, tiny_vit


def timm_resnet():
    return build_model("timm/test_resnet", CLASSES, image_size=32)


def student(build, size, **config):
    torch.manual_seed(0)
    model = build()
    quantize_model(model, QuantizationConfig(**config))
    calibrate_model(model, [torch.randn(8, 3, size, size)], disable_progress=True)
    return model.eval()


@torch.no_grad()
def logits(model, size):
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5))
    return model(images.to(model.dtype)).logits


@pytest.mark.parametrize(("build", "size"), [(tiny_vit, 16), (timm_resnet, 32)], ids=["native-vit", "timm"])
class TestRoundTrip:
    @pytest.mark.parametrize("quantizer", list_quantizers())
    @pytest.mark.parametrize("bits", [1, 2, 8])
    def test_a_reloaded_student_computes_the_same_bits(self, tmp_path, build, size, quantizer, bits):
        model = student(build, size, quantizer=quantizer, weight_bits=bits, activation_bits=bits)
        model.save_pretrained(tmp_path / "one")
        first, info = AutoModelForImageClassification.from_pretrained(tmp_path / "one", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(logits(first, size), logits(model, size))
        first.save_pretrained(tmp_path / "two")
        second = AutoModelForImageClassification.from_pretrained(tmp_path / "two")
        assert torch.equal(logits(second, size), logits(model, size))

    def test_it_is_the_same_in_a_fresh_process(self, tmp_path, build, size):
        model = student(build, size)
        model.save_pretrained(tmp_path)
        code = (
            "import sys, torch, sqakd_hf\n"
            "from transformers import AutoModelForImageClassification as Auto\n"
            f"x = torch.randn(3, 3, {size}, {size}, generator=torch.Generator().manual_seed(5))\n"
            "with torch.no_grad(): torch.save(Auto.from_pretrained(sys.argv[1])(x).logits, sys.argv[2])\n"
        )
        subprocess.run([sys.executable, "-c", code, tmp_path, tmp_path / "logits.pt"], check=True)
        assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model, size))

    def test_a_float_checkpoint_with_a_config_gives_an_uncalibrated_student(self, tmp_path, build, size):
        torch.manual_seed(0)
        model = build()
        model.save_pretrained(tmp_path)
        config = QuantizationConfig(weight_bits=4, quantizer="ewgs")
        loaded, info = AutoModelForImageClassification.from_pretrained(
            tmp_path, quantization_config=config, output_loading_info=True
        )
        assert not is_calibrated(loaded)
        assert not info["missing_keys"]
        quantize_model(model, config)
        batch = torch.randn(8, 3, size, size)
        for each in (model, loaded):
            calibrate_model(each, [batch], disable_progress=True)
        assert torch.equal(logits(loaded, size), logits(model.eval(), size))

    def test_ranges_stay_float32_in_a_bfloat16_model(self, tmp_path, build, size):
        model = student(build, size)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
        ranges = {name: tensor for name, tensor in loaded.state_dict().items() if "_quantizer." in name}
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ranges.items())
        assert torch.isfinite(logits(loaded, size)).all()

    def test_a_reloaded_student_trains_on(self, tmp_path, build, size):
        model = student(build, size)
        model.save_pretrained(tmp_path / "student")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
        torch.manual_seed(0)
        args = SQAKDTrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True, save_strategy="no"
        )
        data = [{"pixel_values": torch.randn(3, size, size)} for _ in range(16)]
        before = copy.deepcopy(loaded.state_dict())
        trainer = SQAKDTrainer(loaded, build(), args, data)
        trainer.train()
        weights = [name for name, _ in loaded.named_parameters() if name.endswith("weight")]
        assert weights and not any(torch.equal(loaded.state_dict()[name], before[name]) for name in weights)


class TestBadInput:
    def test_a_checkpoint_without_ranges_is_refused(self, tmp_path):
        student(tiny_vit, 16).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        save_file(
            {name: tensor for name, tensor in weights.items() if "_quantizer" not in name},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        with pytest.raises(InputError, match="says it is quantized but lacks ranges"):
            AutoModelForImageClassification.from_pretrained(tmp_path)

    def test_an_unknown_config_key_is_named(self, tmp_path):
        student(tiny_vit, 16).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["wieght_bits"] = 2
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            InputError, match="Unknown quantization config keys: wieght_bits. Did you mean 'weight_bits'"
        ):
            AutoModelForImageClassification.from_pretrained(tmp_path)


def test_the_pipeline_loads_a_student(tmp_path):
    from transformers import ViTImageProcessor

    student(tiny_vit, 16).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    import PIL.Image

    answer = pipeline("image-classification", str(tmp_path), device="cpu")(PIL.Image.new("RGB", (20, 20)))
    assert len(answer) == CLASSES
