import copy
import json
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    pipeline,
)

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
    quantized_layers,
)
from tests.helpers.models import CLASSES, tiny_vit
from tests.helpers.paths import TESTS


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

    @pytest.mark.process
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
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            freeze_batch_norm=False,  # those of a network that was never trained stop every gradient
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
        with pytest.raises(InputError, match="lacks .*_quantizer"):
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


# --- formats ---

V1 = TESTS / "stored" / "format_version_1"


def test_a_student_of_format_version_1_loads_and_is_saved_as_the_current_version(tmp_path):
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    model = AutoModelForImageClassification.from_pretrained(V1)
    expected = torch.tensor(json.loads((V1 / "logits.json").read_text()))
    # Written on another machine: the same codes, but for the sums of another CPU.
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 2 and stored["stored"]["format"] == "packed"
    assert (tmp_path / "model.safetensors").stat().st_size < (V1 / "model.safetensors").stat().st_size
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, model(images).logits)
    assert again.quantization_plan == model.quantization_plan


def test_the_stored_table_decides_and_not_the_patterns(tmp_path):
    model = student(tiny_vit, 16, weight_bits=3, overrides={"classifier": {"weight_bits": 5}})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(weight_bits=7, overrides=[], first_last_bits=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.quantization_plan == model.quantization_plan
    assert torch.equal(logits(loaded, 16), logits(model, 16))


def test_a_saved_config_quantizes_another_model_anew(tmp_path):
    model = student(tiny_vit, 16, weight_bits=3)
    model.save_pretrained(tmp_path)
    config = AutoModelForImageClassification.from_pretrained(tmp_path).config.quantization_config
    other = tiny_vit()
    assert quantize_model(other, config) == quantize_model(tiny_vit(), QuantizationConfig(weight_bits=3))
    assert other.config.quantization_config.stored is None


PLACES = {"native": (tiny_vit, 16, "classifier"), "timm": (timm_resnet, 32, "timm_model.fc")}


@pytest.mark.parametrize(("build", "size", "head"), PLACES.values(), ids=PLACES)
def test_a_student_that_lost_what_it_could_not_be_loaded_without_is_not_saved(tmp_path, build, size, head):
    model = student(build, size)
    parent, _, child = head.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Linear(16, CLASSES))
    with pytest.raises(InputError, match=rf"1 of .*'{head}' \(now Linear, not quantized as planned\)"):
        model.save_pretrained(tmp_path)

    in_float = student(build, size, first_last_bits=None)
    setattr(in_float.get_submodule(parent), child, nn.Identity())
    with pytest.raises(InputError, match=f"The float layer '{head}' is no longer in the student"):
        in_float.save_pretrained(tmp_path)


@pytest.mark.parametrize("format", ["packed", "latent"])
def test_bits_that_are_not_those_of_the_plan_are_not_saved(tmp_path, format):
    model = student(tiny_vit, 16)
    model.classifier.weight_quantizer.bits = 3
    with model.hf_quantizer.saving(format), pytest.raises(InputError, match=r"'classifier' \(3 bits instead of 8\)"):
        model.save_pretrained(tmp_path)


@pytest.mark.process
def test_plain_transformers_refuses_a_packed_student(tmp_path):
    for bits in range(1, 9):
        student(tiny_vit, 16, weight_bits=bits, first_last_bits=bits).save_pretrained(tmp_path / str(bits))
    code = (
        "import sys\nfrom transformers import AutoModelForImageClassification\n"
        "assert 'sqakd_hf' not in sys.modules\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n        AutoModelForImageClassification.from_pretrained(folder)\n"
        "    except Exception as error:\n        print(str(error).lower().count('mismatch') > 0)\n"
    )
    folders = [str(tmp_path / str(bits)) for bits in range(1, 9)]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 8, done.stderr[-2000:]


def test_an_uncalibrated_student_is_not_saved(tmp_path):
    model = tiny_vit()
    quantize_model(model)
    with pytest.raises(InputError, match="no ranges yet"):
        model.save_pretrained(tmp_path / "student")
    assert not any((tmp_path / "student").glob("*"))


# --- what loads ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    model = student(tiny_vit, 16, quantizer="dorefa", weight_bits=3)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(saved, device_map):
    folder, model = saved
    loaded = AutoModelForImageClassification.from_pretrained(folder, device_map=device_map)
    assert torch.equal(logits(loaded, 16), logits(model, 16))


def test_a_device_map_with_offload_is_refused(saved, tmp_path):
    device_map = {"vit": "cpu", "classifier": "disk"}
    with pytest.raises(InputError, match="device_map='cpu'"):
        AutoModelForImageClassification.from_pretrained(saved[0], device_map=device_map, offload_folder=tmp_path)


def test_bfloat16_keeps_codes_and_ranges(saved, tmp_path):
    folder, model = saved
    loaded = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for n, p in loaded.named_parameters() if "_quantizer" not in n} == {torch.bfloat16}
    codes = {name: layer.weight_codes() for name, layer in quantized_layers(model).items()}
    for name, layer in quantized_layers(loaded).items():
        assert torch.equal(layer.weight_codes(), codes[name])
    loaded.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(layer.weight_codes(), codes[name]) for name, layer in quantized_layers(again).items())


@pytest.mark.parametrize(("build", "size"), [(tiny_vit, 16), (timm_resnet, 32)], ids=["native-vit", "timm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
class TestHalfPrecision:
    def test_checkpoints_give_students_in_float32(self, tmp_path, build, size, dtype, caplog):
        torch.manual_seed(0)
        model = build().to(dtype)
        model.save_pretrained(tmp_path / "float")
        loaded = AutoModelForImageClassification.from_pretrained(
            tmp_path / "float", quantization_config=QuantizationConfig(weight_bits=4, activation_bits=4)
        )
        assert sum("so they are float32 now" in record.getMessage() for record in caplog.records) == 1
        tensors = [*loaded.parameters(), *loaded.buffers()]
        assert not {torch.float16, torch.bfloat16} & {tensor.dtype for tensor in tensors}
        state = loaded.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value.float() if value.is_floating_point() else value), key
        calibrate_model(loaded, [torch.randn(8, 3, size, size)], disable_progress=True)

    def test_students_stay_so_until_they_train(self, tmp_path, build, size, dtype, caplog):
        model = student(build, size, quantizer="dorefa", weight_bits=3)
        model.save_pretrained(tmp_path / "student")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "student", dtype=dtype)
        assert loaded.dtype == dtype and not any("float32 now" in each.getMessage() for each in caplog.records)
        exact = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
        images = [{"pixel_values": torch.randn(3, size, size)} for _ in range(8)]
        args = SQAKDTrainingArguments(
            tmp_path / "trained", max_steps=1, learning_rate=0.0, report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = SQAKDTrainer(loaded, build(), args, train_dataset=images)
        trainer.train()
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert sum("so they are float32 now" in record.getMessage() for record in caplog.records) == 1
        # The very latents that a student has which was loaded in float32.
        exact.train()
        for name, layer in quantized_layers(exact).items():
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight), name


def test_shards(saved, tmp_path):
    folder, model = saved
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, 16), logits(model, 16))


def test_the_backbone_loads_without_its_head(saved):
    folder, model = saved
    backbone = AutoModel.from_pretrained(folder)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(
            backbone(images).last_hidden_state[:, 0], model(images, output_hidden_states=True).hidden_states[-1][:, 0]
        ) or torch.equal(backbone(images).last_hidden_state, model.vit(images).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("test_resnet", ["fc"]),
        ("test_vit", ["head"]),
        ("test_efficientnet", ["classifier"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
    ],
)
def test_embeddings_of_timm_models_are_those_in_front_of_the_head(name, heads, tmp_path):
    size = 224 if "224" in name else 32
    model = student(lambda: build_model(f"timm/{name}", CLASSES, image_size=size), size)
    model.save_pretrained(tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path)
    left_out = quantized_layers(model).keys() - quantized_layers(trunk).keys()
    assert left_out == {f"timm_model.{head}" for head in heads}
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = model.timm_model.forward_features(images)
        found = trunk(images)
        assert torch.equal(found.last_hidden_state, features)
        assert torch.equal(found.pooler_output, model.timm_model.forward_head(features, pre_logits=True))


def test_a_pipeline_extracts_features_with_a_timm_student(tmp_path):
    student(timm_resnet, 32).save_pretrained(tmp_path)
    image = PIL.Image.fromarray(np.full((40, 40, 3), 90, np.uint8))
    assert np.array(pipeline("image-feature-extraction", model=str(tmp_path))(image)).shape == (1, 96, 1, 1)


def test_another_class_that_lacks_what_is_stored_of_it_is_refused(tmp_path):
    """What is missing is left out only where the class itself is complete."""
    model = student(timm_resnet, 32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"] = "test_vit"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no layer|is stored as"):
        AutoModel.from_pretrained(tmp_path)


def test_another_number_of_classes_starts_the_head_anew(saved, caplog):
    folder, model = saved
    with pytest.raises((RuntimeError, InputError), match="ignore_mismatched_sizes|number of classes"):
        AutoModelForImageClassification.from_pretrained(folder, num_labels=7)
    try:
        loaded = AutoModelForImageClassification.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    except InputError:
        pytest.skip("transformers 5.17 can't leave out weights of a quantized model")
    assert "uncalibrated" in caplog.text and "classifier" in caplog.text
    head = loaded.classifier
    assert not head.weight_quantizer.calibrated
    assert head.weight.shape == (7, 16) and 0 < head.weight.std() < 0.1
    assert torch.equal(quantized_layers(loaded)[WEIGHT].weight_codes(), quantized_layers(model)[WEIGHT].weight_codes())
    calibrate_model(loaded, [torch.randn(8, 3, 16, 16)], disable_progress=True)
    assert logits(loaded, 16).shape == (3, 7)


WEIGHT = "vit.embeddings.patch_embeddings.projection"


def test_a_loaded_weight_lies_on_its_grid_until_it_trains(saved):
    folder, model = saved
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    layers = quantized_layers(loaded)
    expected = {name: layer.quantized_weight() for name, layer in quantized_layers(model).items()}
    for name, layer in layers.items():
        assert layer.weight_is_on_grid and torch.equal(layer.weight, expected[name])
    state = copy.deepcopy(loaded.state_dict())
    loaded.train()
    for name, layer in layers.items():
        assert not layer.weight_is_on_grid
        assert torch.equal(layer.quantized_weight(), expected[name]), name
        assert torch.equal(state[f"{name}.weight"], layer.weight)
    # A state dict holds latents, whichever it was taken from.
    fresh = tiny_vit()
    quantize_model(fresh, loaded.config.quantization_config)
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh.eval(), 16), logits(model, 16))
    loaded.eval()
    assert torch.equal(logits(loaded, 16), logits(model, 16))


def test_a_weight_that_was_changed_after_loading_is_not_saved(saved, tmp_path):
    loaded = AutoModelForImageClassification.from_pretrained(saved[0])
    loaded.classifier.weight.data.mul_(0.9)
    with pytest.raises(InputError, match="no longer lies on its grid"):
        loaded.save_pretrained(tmp_path / "changed")


def test_parameters_keep_their_order(saved):
    loaded = AutoModelForImageClassification.from_pretrained(saved[0])
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in saved[1].named_parameters()]


@pytest.mark.parametrize(("build", "size"), [(tiny_vit, 16), (timm_resnet, 32)], ids=["native-vit", "timm"])
def test_dequantize_gives_the_float_model_back(tmp_path, build, size):
    torch.manual_seed(0)
    float_model = build()
    types = [type(module) for module in float_model.modules()]
    model = student(build, size, activation_bits=None)
    expected = logits(model, size)
    model.save_pretrained(tmp_path / "student")
    for each in (model, AutoModelForImageClassification.from_pretrained(tmp_path / "student")):
        plain = each.dequantize()
        assert [type(module) for module in plain.modules()] == types
        assert plain.state_dict().keys() == float_model.state_dict().keys()
        assert torch.equal(logits(plain, size), expected)
        plain.save_pretrained(tmp_path / "float")
        assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
        reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "float").state_dict()
        # Not the logits: float weights stay mapped to their file, at odd addresses, where kernels sum in other orders.
        assert all(torch.equal(reloaded[name], tensor) for name, tensor in plain.state_dict().items())
        if build is timm_resnet:
            assert torch.equal(
                plain.timm_model(torch.zeros(1, 3, size, size)), plain(torch.zeros(1, 3, size, size)).logits
            )


def test_a_model_that_initialises_by_the_shapes_of_weights_inside_it(tmp_path):
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        num_labels=CLASSES,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    images = torch.randn(2, 3, 32, 32)
    quantize_model(model, QuantizationConfig(weight_bits=3), images)
    calibrate_model(model, [images], disable_progress=True)
    model.eval().save_pretrained(tmp_path)
    reloaded, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        for name in ("class_queries_logits", "masks_queries_logits"):
            assert torch.equal(reloaded(images)[name], model(images)[name])


# --- damage ---


@pytest.mark.parametrize("name", ["classifier.weight", "classifier.bias", "classifier.weight_quantizer.magnitude"])
def test_a_flipped_bit_is_named(saved, tmp_path, name):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(torch.uint8).reshape(-1)[-1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: the tensor '{name}' is not what was saved"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_copies_save_and_upload_themselves(saved, tmp_path):
    folder, _ = saved
    for duplicate in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        for original in (
            student(tiny_vit, 16, weight_bits=3),
            AutoModelForImageClassification.from_pretrained(folder),
        ):
            other = duplicate(original)
            assert other.push_to_hub.args[0] is other and other.hf_quantizer is not original.hf_quantizer
            with torch.no_grad():
                other.vit.layernorm.bias.add_(1)
            other.save_pretrained(tmp_path)
            reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
            assert torch.equal(logits(reloaded, 16), logits(other, 16))
            assert not torch.equal(logits(reloaded, 16), logits(original, 16))


def test_a_students_base_model_travels_with_it(tmp_path):
    model = tiny_vit()
    model.config._name_or_path = "someone/vit"
    quantize_model(model, QuantizationConfig())
    calibrate_model(model, [torch.randn(8, 3, 16, 16)], disable_progress=True)
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    stored = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]["stored"]
    assert loaded.hf_quantizer.base_model == stored["base_model"] == "someone/vit"


@pytest.mark.parametrize("train", [False, True])
def test_a_student_can_be_saved_where_it_was_loaded_from(saved, tmp_path, train):
    folder = shutil.copytree(saved[0], tmp_path / "student")
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    if train:
        with torch.no_grad():
            loaded.train().classifier.bias.add_(1)
        loaded.eval()
    expected = logits(loaded, 16)
    loaded.save_pretrained(folder)
    assert torch.equal(logits(loaded, 16), expected)
    (folder / "model.safetensors").write_bytes(bytes((folder / "model.safetensors").stat().st_size))
    assert torch.equal(logits(loaded, 16), expected)
    loaded.save_pretrained(folder)
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(folder), 16), expected)


def test_the_config_of_a_timm_student_names_its_classes_for_everyone(tmp_path):
    """optimum and transformers.js read `id2label`, which transformers leaves out of a timm model's config."""
    names = {0: "cat", 1: "dog", 2: "owl"}
    model = build_model("timm/test_resnet", 3, image_size=32)
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    quantize_model(model, QuantizationConfig())
    calibrate_model(model, [torch.randn(4, 3, 32, 32)], disable_progress=True)
    model.save_pretrained(tmp_path / "one")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())
    assert stored["id2label"] == {"0": "cat", "1": "dog", "2": "owl"} and stored["label2id"]["owl"] == 2
    assert stored["model_type"] == "timm_wrapper" and stored["label_names"] == ["cat", "dog", "owl"]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "one")
    assert loaded.config.id2label == names and loaded.config.num_labels == 3
    loaded.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["id2label"] == stored["id2label"]
    again = AutoModelForImageClassification.from_config(pickle.loads(pickle.dumps(copy.deepcopy(loaded.config))))
    assert again.config.id2label == names
