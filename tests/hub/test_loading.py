import copy
import json
import re
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ViTImageProcessor

from sqakd_hf import (
    InputError,
    QuantizationConfig,
    SQAKDTrainer,
    SQAKDTrainingArguments,
    WeightsNotFoundError,
    build_model,
    calibrate_model,
    load_model,
    quantize_model,
)
from sqakd_hf.hub.loading import load_teacher, num_classes, resolve_name
from sqakd_hf.hub.model_preprocessing import preprocessing, processor_of, record_preprocessing, record_processor
from sqakd_hf.hub.preprocessing import Preprocessing, image_processor


SIZE = 32
NAMES = {0: "cat", 1: "dog", 2: "owl", 3: "yak"}


def images(channels=3, size=SIZE):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def build(name, num_labels=4, seed=0, **options):
    torch.manual_seed(seed)
    return build_model(name, num_labels, **options).eval()


def timm_model(**options):
    """timm's own model, without the zeros that its last norms start with."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model, x):
    # Weights that safetensors maps from a file lie at odd addresses, where some kernels sum in another order; a copy
    # lies where any other model's weights lie.
    outputs = copy.deepcopy(model)(x)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def save_like_timm(model, folder, model_args=None, **config):
    """Write the folder that timm's `push_to_hf_hub` uploads: its own keys, and its own view of the config."""
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    pretrained_cfg = {
        "tag": "mine",
        "custom_load": False,
        "input_size": [3, 160, 160],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 0.95,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 4,
        "first_conv": "conv1.0",
        "classifier": "fc",
    }
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architecture": "test_resnet",
                "num_classes": 4,
                "num_features": 96,
                "pretrained_cfg": pretrained_cfg,
                "model_args": model_args,
                **config,
            }
        )
    )
    return str(folder)


class TestResolveName:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("timm/resnet18", "timm/resnet18.a1_in1k"),
            ("timm/resnet18.tv_in1k", "timm/resnet18.tv_in1k"),
            ("timm/test_resnet", "timm/test_resnet.r160_in1k"),
            ("timm/vit_base_patch16_224", "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"),
            # Weights that lie in somebody else's repository.
            ("timm/fastvit_mci0.apple_mclip", "apple/mobileclip_s0_timm"),
            # timm knows the architecture but no weights.
            ("timm/botnet50ts_256", "timm/botnet50ts_256"),
            ("microsoft/resnet-50", "microsoft/resnet-50"),
            ("my-model", "my-model"),
        ],
    )
    def test_gives_the_repository(self, name, expected):
        assert resolve_name(name) == expected

    def test_a_folder_is_itself_whatever_its_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("resnet18", "timm/resnet18", "timm/nothing"):
            (tmp_path / name).mkdir(parents=True)
            assert resolve_name(name) == name
        assert resolve_name(str(tmp_path)) == str(tmp_path)

    @pytest.mark.parametrize("name", ["resnt18", "resnet_18", "resnet18d2"])
    def test_a_misspelt_timm_name_gets_close_ones(self, name):
        with pytest.raises(InputError) as info:
            resolve_name(f"timm/{name}")
        assert str(info.value).startswith(f"timm has no model {name!r}. Did you mean 'resnet18")

    def test_a_name_like_no_other_gets_none(self):
        with pytest.raises(InputError) as info:
            resolve_name("timm/qqqqqqqqqqqq")
        assert str(info.value) == "timm has no model 'qqqqqqqqqqqq'."

    def test_a_misspelt_tag_gets_all_tags(self):
        with pytest.raises(InputError) as info:
            resolve_name("timm/resnet18.a1_in22k")
        assert str(info.value).startswith("timm has no weights 'resnet18.a1_in22k'; accepted: resnet18, ")
        assert all(f"resnet18.{tag}" in str(info.value) for tag in ("a1_in1k", "a2_in1k", "tv_in1k"))

    def test_a_tag_of_an_architecture_without_any_says_so(self):
        with pytest.raises(InputError, match=r"^timm has no weights 'botnet50ts_256.x'; accepted: botnet50ts_256, no"):
            resolve_name("timm/botnet50ts_256.x")

    def test_a_timm_name_without_its_prefix_is_told_so(self):
        for use in (resolve_name, load_model):
            with pytest.raises(InputError, match="^'resnet18' is a timm model: write 'timm/resnet18'.$"):
                use("resnet18")


class TestLoadTeacher:
    @pytest.fixture(params=["timm", "native"])
    def saved(self, request, vit, tmp_path):
        """A model of either kind, the folder it was saved to, and its images."""
        model = build("timm/test_resnet") if request.param == "timm" else vit
        model.config.id2label, model.config.label2id = NAMES, {name: i for i, name in NAMES.items()}
        model.save_pretrained(tmp_path / "model")
        return model, str(tmp_path / "model"), images(size=SIZE if request.param == "timm" else 16)

    def test_of_a_saved_folder_computes_the_same(self, saved):
        model, folder, x = saved
        teacher = load_model(folder)
        assert type(teacher) is type(model) and not teacher.training
        assert torch.equal(logits(teacher, x), logits(model, x))
        assert teacher.config.id2label == NAMES and teacher.config.num_labels == 4

    def test_with_the_same_number_of_labels_keeps_head_and_names(self, saved):
        model, folder, x = saved
        teacher = load_model(folder, num_labels=4)
        assert torch.equal(logits(teacher, x), logits(model, x)) and teacher.config.id2label == NAMES

    @pytest.mark.parametrize("count", [2, 6])
    def test_with_another_number_of_labels_gets_a_new_head_and_new_names(self, saved, count, tmp_path):
        model, folder, x = saved
        teacher = load_model(folder, num_labels=count)
        assert teacher(x).logits.shape == (2, count) and torch.isfinite(teacher(x).logits).all()
        names = {i: f"LABEL_{i}" for i in range(count)}
        assert teacher.config.id2label == names and teacher.config.num_labels == count == num_classes(teacher)
        assert teacher.config.label2id == {name: i for i, name in names.items()}
        # All but the head is what was stored.
        stored = model.state_dict()
        changed = [key for key, value in teacher.state_dict().items() if not torch.equal(value, stored[key])]
        assert changed and all("fc" in key or "classifier" in key for key in changed) and len(changed) == 2
        teacher.save_pretrained(tmp_path / "new")
        again = load_model(str(tmp_path / "new"))
        assert torch.equal(logits(again, x), logits(teacher, x)) and again.config.id2label == names

    def test_passes_options_on(self, saved):
        assert load_model(saved[1], dtype=torch.float64).dtype == torch.float64

    def test_is_in_full_precision_even_where_the_file_is_not(self, vit, tmp_path):
        expected = {key: value.half().float() for key, value in vit.state_dict().items()}
        vit.half().save_pretrained(tmp_path)
        teacher = load_model(str(tmp_path))
        assert teacher.dtype == torch.float32
        assert all(torch.equal(value, expected[key]) for key, value in teacher.state_dict().items())

    @pytest.mark.parametrize(
        "model_args",
        [None, {}, {"num_classes": 4}, {"num_classes": 4, "global_pool": "avg"}, {"in_chans": 3}],
        ids=["null", "none", "classes twice", "pooling too", "channels"],
    )
    def test_of_a_timm_repository_computes_what_timm_does(self, tmp_path, model_args):
        model = timm_model()
        teacher = load_model(save_like_timm(model, tmp_path / "repo", model_args, global_pool="avg"))
        assert torch.equal(logits(teacher, images(size=64)), model(images(size=64)))
        assert teacher.config.num_labels == 4

    def test_of_a_timm_repository_keeps_its_pooling(self, tmp_path):
        model, x = timm_model(global_pool="max"), images(size=64)  # at 32 there is one pixel left to pool
        folder = save_like_timm(model, tmp_path / "repo", {"num_classes": 4, "global_pool": "max"}, global_pool="max")
        assert torch.equal(logits(load_model(folder), x), model(x))

    def test_of_an_own_model_keeps_its_pooling(self, tmp_path):
        model, x = build("timm/test_resnet", model_args={"global_pool": "max"}), images(size=64)
        model.timm_model.load_state_dict(timm_model().state_dict())
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(load_model(str(tmp_path)), x), model(x).logits)

    def test_of_a_timm_repository_takes_its_class_names_and_another_head(self, tmp_path):
        folder = save_like_timm(timm_model(), tmp_path / "repo", {"num_classes": 4}, label_names=[*NAMES.values()])
        assert load_model(folder).config.id2label == NAMES
        teacher = load_model(folder, num_labels=2)
        assert teacher(images()).logits.shape == (2, 2)
        assert teacher.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}

    @pytest.mark.parametrize(
        ("name", "where"),
        [
            ("timm/test_resnet", "'timm/test_resnet' (timm/test_resnet.r160_in1k)"),
            ("timm/resnet18.a1_in1k", "'timm/resnet18.a1_in1k'"),
            ("nobody/nothing", "'nobody/nothing'"),
        ],
    )
    def test_offline_says_in_one_line_that_weights_are_missing(self, name, where):
        with pytest.raises(WeightsNotFoundError) as info:
            load_model(name)
        message = str(info.value)
        assert message.startswith(f"Neither the Hub nor the local cache gives trained weights for {where}: ")
        assert message.endswith(". Check the name and the connection, or pass a folder with a trained model.")
        assert "\n" not in message and isinstance(info.value, InputError) and info.value.__cause__ is not None

    def test_of_a_folder_with_a_config_alone_says_that_it_has_no_weights(self, vit, tmp_path):
        vit.config.save_pretrained(tmp_path)
        with pytest.raises(WeightsNotFoundError, match=re.escape(f"folder '{tmp_path}' has no trained weights: ")):
            load_model(str(tmp_path))

    def test_of_a_folder_without_a_model_is_no_question_of_weights(self, tmp_path):
        with pytest.raises(InputError, match=re.escape(f"The folder '{tmp_path}' holds no model: ")) as info:
            load_model(str(tmp_path))
        assert not isinstance(info.value, WeightsNotFoundError)

    def test_lacking_weights_are_an_error_unless_a_new_head_is_asked_for(self, vit, tmp_path):
        vit.vit.save_pretrained(tmp_path)  # the backbone alone
        with pytest.raises(InputError, match="lack 'classifier.bias', 'classifier.weight', 2 weights"):
            load_model(str(tmp_path))
        teacher = load_model(str(tmp_path), num_labels=6)
        assert torch.equal(teacher.vit.state_dict()["layernorm.weight"], vit.vit.state_dict()["layernorm.weight"])
        assert teacher.classifier.weight.shape[0] == 6

    def test_of_a_name_that_timm_does_not_know_gets_close_ones(self):
        with pytest.raises(InputError, match="^timm has no model 'test_resnt'. Did you mean 'test_resnet'") as info:
            load_model("timm/test_resnt")
        assert not isinstance(info.value, WeightsNotFoundError)


class TestBuildModel:
    def test_of_timm_has_the_classes_and_its_own_size(self):
        model = build("timm/test_resnet", 7)
        assert model(images(size=160)).logits.shape == (2, 7) and preprocessing(model).image_size == 160
        assert model.config.num_labels == 7 and model.timm_model.num_classes == 7
        assert model.config.id2label == {i: f"LABEL_{i}" for i in range(7)}

    def test_of_timm_is_the_timm_model(self):
        model = build("timm/test_vit", image_size=SIZE)
        twin = timm.create_model("test_vit", num_classes=4, img_size=SIZE).eval()
        twin.load_state_dict(model.timm_model.state_dict(), strict=True)
        assert torch.equal(model(images()).logits, twin(images()))

    def test_draws_its_weights_from_the_seed(self):
        one, other = build("timm/test_resnet"), build("timm/test_resnet")
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
        assert not torch.equal(one.timm_model.fc.weight, build_model("timm/test_resnet", 4).timm_model.fc.weight)

    def test_takes_a_tag_for_its_metadata(self):
        model = build("timm/test_resnet.r160_in1k")
        assert model.config.architecture == "test_resnet" and model.config.pretrained_cfg["tag"] == "r160_in1k"

    @pytest.mark.parametrize(("name", "fixed"), [("timm/test_resnet", False), ("timm/test_vit", True)])
    def test_takes_an_image_size(self, name, fixed):
        model = build(name, image_size=SIZE)
        assert model(images()).logits.shape == (2, 4)
        assert (preprocessing(model).image_size, preprocessing(model).fixed_size) == (SIZE, fixed)
        if fixed:  # (32 / 16) ** 2 patches and the class token
            assert model.timm_model.pos_embed.shape[1] == 5

    def test_takes_the_architectures_own_arguments(self):
        model = build("timm/test_vit", image_size=SIZE, model_args={"patch_size": 8, "depth": 2})
        assert model.timm_model.pos_embed.shape[1] == 17 and len(model.timm_model.blocks) == 2
        assert model(images()).logits.shape == (2, 4)

    @pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit"])
    def test_takes_grey_images(self, name):
        model = build(name, image_size=SIZE, model_args={"in_chans": 1})
        assert model(images(channels=1)).logits.shape == (2, 4)
        assert preprocessing(model).mean == preprocessing(model).std == (0.5,)

    def test_an_image_size_stated_in_timms_way_is_the_image_size(self):
        model = build("timm/test_vit", model_args={"img_size": SIZE})
        assert model(images()).logits.shape == (2, 4) and preprocessing(model).image_size == SIZE

    def test_leaves_the_callers_arguments_as_they_were(self):
        model_args = {"depth": 1}
        build("timm/test_vit", image_size=SIZE, model_args=model_args)
        assert model_args == {"depth": 1}

    def test_saved_and_loaded_is_the_same_model(self, tmp_path):
        model = build("timm/test_vit", image_size=SIZE, model_args={"patch_size": 8})
        model.save_pretrained(tmp_path)
        loaded = load_model(str(tmp_path))
        assert torch.equal(logits(loaded, images()), logits(model, images()))
        assert preprocessing(loaded) == preprocessing(model)

    def test_of_a_folder_with_only_a_config(self, vit, tmp_path):
        vit.config.save_pretrained(tmp_path)
        model = build(str(tmp_path), seed=1)
        assert type(model) is type(vit) and model(images(size=16)).logits.shape == (2, 4)
        # New weights, the same architecture.
        shapes = {key: value.shape for key, value in vit.state_dict().items()}
        assert {key: value.shape for key, value in model.state_dict().items()} == shapes
        assert not torch.equal(model.classifier.weight, vit.classifier.weight)

    def test_of_a_folder_takes_labels_size_and_fields(self, vit, tmp_path):
        vit.config.id2label = NAMES
        vit.config.save_pretrained(tmp_path)
        model = build(str(tmp_path), 6, image_size=SIZE, model_args={"num_hidden_layers": 1, "patch_size": 8})
        assert model(images()).logits.shape == (2, 6) and model.config.image_size == SIZE
        assert model.config.num_hidden_layers == 1 and model.config.patch_size == 8
        assert model.config.id2label == {i: f"LABEL_{i}" for i in range(6)}

    def test_of_a_folder_with_another_number_of_labels_is_silent(self, vit, tmp_path, caplog):
        vit.config.save_pretrained(tmp_path)
        build(str(tmp_path), 6)
        assert not caplog.records

    def test_of_a_folder_with_as_many_labels_keeps_their_names(self, vit, tmp_path):
        vit.config.id2label = NAMES
        vit.config.save_pretrained(tmp_path)
        assert build(str(tmp_path), 4).config.id2label == NAMES

    @pytest.mark.parametrize(
        ("model_args", "message"),
        [
            ({"patchsize": 4}, "'timm/test_vit' can't be built with {'patchsize': 4"),
            ({"num_heads": 5}, "'timm/test_vit' can't be built with {'num_heads': 5"),
            ({"global_pool": "bogus"}, "'timm/test_vit' can't be built with {'global_pool': 'bogus'"),
            ({"num_classes": 3}, "'timm/test_vit' can't be built with {'num_classes': 3"),
            ({"act_layer": "geluu"}, "'timm/test_vit' can't be built with {'act_layer': 'geluu'"),
            ({"norm_layer": "bogus"}, "'timm/test_vit' can't be built with {'norm_layer': 'bogus'"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_arguments_that_timm_does_not_take_are_an_error(self, model_args, message):
        with pytest.raises(InputError, match=re.escape(message)):
            build_model("timm/test_vit", 4, model_args=model_args)

    @pytest.mark.parametrize(
        ("model_args", "message"),
        [
            ({"hidden_sise": 32}, "ViTConfig has no field 'hidden_sise'. Did you mean 'hidden_size'"),
            ({"zzzz": 1}, "ViTConfig has no field 'zzzz'."),
            ({"hidden_act": "gel"}, "can't be built with {'hidden_act': 'gel'"),
            ({"patch_size": 0}, "can't be built with {'patch_size': 0"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_fields_that_the_config_does_not_take_are_an_error(self, vit, tmp_path, model_args, message):
        vit.config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=re.escape(message)):
            build_model(str(tmp_path), 4, model_args=model_args)

    @pytest.mark.parametrize("count", [0, -1, 2.5, "4"], ids=repr)
    @pytest.mark.parametrize("kind", ["timm", "native"])
    def test_a_number_of_labels_that_is_none_is_an_error(self, vit, tmp_path, kind, count):
        vit.config.save_pretrained(tmp_path)
        with pytest.raises(InputError):
            build_model("timm/test_vit" if kind == "timm" else str(tmp_path), count)

    def test_an_unknown_timm_name_gets_close_ones(self):
        with pytest.raises(InputError, match="^timm has no model 'test_vitt'. Did you mean 'test_vit"):
            build_model("timm/test_vitt", 4)

    @pytest.mark.parametrize(("name", "close"), [("test_resnet", "timm/test_resnet"), ("resnet-18", "timm/resnet18")])
    def test_an_unknown_name_gets_close_ones_with_their_prefix(self, name, close):
        with pytest.raises(InputError) as info:
            build_model(name, 4)
        assert str(info.value).startswith(f"Model {name!r} can't be found: ") and f"Did you mean '{close}" in str(
            info.value
        )
        assert "\n" not in str(info.value)

    def test_a_folder_without_a_config_is_an_error(self, tmp_path):
        with pytest.raises(InputError, match=re.escape(f"Model '{tmp_path}' can't be found: ")):
            build_model(str(tmp_path), 4)


class TestPreprocessing:
    def test_of_a_timm_model_is_its_metadata(self):
        assert preprocessing(build("timm/resnet18")) == Preprocessing(
            224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.95, "bicubic", fixed_size=False
        )
        assert preprocessing(build("timm/test_resnet")) == Preprocessing(
            160, (0.5,) * 3, (0.5,) * 3, 0.95, "bilinear", fixed_size=False
        )
        assert preprocessing(build("timm/test_vit", image_size=SIZE)) == Preprocessing(
            SIZE, (0.5,) * 3, (0.5,) * 3, 0.95, "bicubic", fixed_size=True
        )

    def test_of_other_channels_averages_the_channels(self):
        found = preprocessing(build("timm/resnet18", model_args={"in_chans": 2}))
        # ImageNet's channels; three float64 terms.
        assert found.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,) * 2, rel=1e-12)
        assert found.std == pytest.approx(((0.229 + 0.224 + 0.225) / 3,) * 2, rel=1e-12)

    def test_of_a_model_without_weights_at_timm_is_complete(self):
        found = preprocessing(build("timm/botnet50ts_256"))
        assert found.image_size == 256 and len(found.mean) == len(found.std) == 3

    def test_of_a_loaded_timm_repository_is_its_own(self, tmp_path):
        folder = save_like_timm(timm_model(), tmp_path / "repo", {"num_classes": 4})
        config = json.loads((tmp_path / "repo" / "config.json").read_text())
        config["pretrained_cfg"].update(
            mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], input_size=[3, 64, 64], crop_pct=0.9
        )
        (tmp_path / "repo" / "config.json").write_text(json.dumps(config))
        assert preprocessing(load_model(folder)) == Preprocessing(
            64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.9, "bilinear", fixed_size=False
        )

    @pytest.mark.parametrize("kind", ["native", "timm"])
    def test_that_nobody_states_is_neutral_and_said_once(self, vit, caplog, kind):
        model = vit
        if kind == "timm":
            model = build("timm/test_vit", image_size=16)
            model.config.pretrained_cfg = {"input_size": (3, 16, 16)}
        expected = Preprocessing(16, (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic", fixed_size=True)
        assert preprocessing(model) == preprocessing(model) == preprocessing(copy.deepcopy(model)) == expected
        (said,) = caplog.records
        assert said.levelname == "WARNING"
        for part in ("is not known", "16 pixels, a mean of 0.5 and a std of 0.5", "processing_class"):
            assert part in said.getMessage()

    @pytest.mark.parametrize("size", [16, [16, 16], (16, 16)], ids=repr)
    def test_of_a_native_model_takes_the_side_of_its_images(self, vit, size):
        vit.config.image_size = size
        assert preprocessing(vit).image_size == 16

    def test_of_a_native_model_that_takes_any_size(self):
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
        found = preprocessing(AutoModelForImageClassification.from_config(config))
        assert (found.image_size, found.fixed_size) == (224, False)

    @pytest.mark.parametrize("channels", [1, 4, 13])
    def test_of_a_native_model_has_the_channels_of_its_images(self, vit, tmp_path, channels):
        vit.config.save_pretrained(tmp_path)
        model = build(str(tmp_path), model_args={"num_channels": channels})
        assert preprocessing(model).mean == preprocessing(model).std == (0.5,) * channels

    def save_with_processor(self, vit, folder, **options):
        vit.save_pretrained(folder)
        ViTImageProcessor(
            size={"height": 16, "width": 16},
            **{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], **options},
        ).save_pretrained(folder)
        return str(folder)

    def test_of_a_native_model_is_that_of_the_processor_saved_with_it(self, vit, tmp_path):
        folder = self.save_with_processor(vit, tmp_path)
        for model in (load_model(folder), build(folder)):
            found = preprocessing(model)
            assert (found.mean, found.std, found.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 16)

    @pytest.mark.parametrize(("resample", "name"), [(0, "nearest"), (2, "bilinear"), (3, "bicubic")])
    def test_of_a_native_model_resamples_as_its_processor_does(self, vit, tmp_path, resample, name):
        folder = self.save_with_processor(vit, tmp_path, resample=resample)
        assert preprocessing(load_model(folder)).interpolation == name

    def test_of_a_processor_that_does_not_normalise_changes_nothing(self, vit, tmp_path):
        folder = self.save_with_processor(vit, tmp_path, do_normalize=False)
        found = preprocessing(load_model(folder))
        assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)

    def test_of_a_processor_that_says_more_is_told(self, vit, tmp_path, caplog):
        folder = self.save_with_processor(vit, tmp_path, resample=1, rescale_factor=1 / 127.5)
        found = preprocessing(load_model(folder))
        # (2 x - mean) / std
        assert found.mean == pytest.approx((0.05, 0.1, 0.15)) and found.std == pytest.approx((0.2, 0.25, 0.3))
        assert "resamples by Pillow's method 1" in caplog.text and "changes the shape" in caplog.text


def student_of(model):
    quantize_model(model, QuantizationConfig(weight_bits=4, activation_bits=4))
    calibrate_model(model, [images(size=16)], disable_progress=True)
    return model.eval()


class TestRecordedPreprocessing:
    USED = Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.8, "bilinear")

    def processor(self, **options):
        return image_processor(replace(self.USED, **options))

    @pytest.mark.parametrize("source", ["recorded", "trainer", "saved with the teacher"])
    def test_is_stored_with_the_student(self, vit, tmp_path, caplog, source):
        if source == "saved with the teacher":
            vit.save_pretrained(tmp_path / "teacher")
            self.processor().save_pretrained(tmp_path / "teacher")
            vit = load_model(str(tmp_path / "teacher"))
        teacher, student = copy.deepcopy(vit), student_of(vit)
        if source == "recorded":
            record_preprocessing(student, self.USED)
        elif source == "trainer":
            args = SQAKDTrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
            SQAKDTrainer(student, teacher, args, processing_class=self.processor())
        assert preprocessing(student) == self.USED
        student.save_pretrained(tmp_path / "student")
        assert not (tmp_path / "student" / "preprocessor_config.json").exists()
        loaded = load_model(str(tmp_path / "student"))
        assert preprocessing(loaded) == preprocessing(student)
        assert processor_of(loaded).to_dict() == self.processor().to_dict()
        loaded.save_pretrained(tmp_path / "again")
        assert preprocessing(load_model(str(tmp_path / "again"))) == preprocessing(student)
        assert "is not known" not in caplog.text

    def test_of_the_training_counts_more_than_what_lies_with_the_base(self, vit, tmp_path):
        vit.save_pretrained(tmp_path)
        self.processor(mean=(0.9,) * 3).save_pretrained(tmp_path)
        model = load_model(str(tmp_path))
        record_processor(model, self.processor())
        assert preprocessing(model).mean == (0.1, 0.2, 0.3)
        assert list(processor_of(model).image_mean) == [0.1, 0.2, 0.3]

    def test_a_processor_that_is_saved_with_the_student_counts_more(self, vit, tmp_path):
        student = student_of(vit)
        record_preprocessing(student, self.USED)
        student.save_pretrained(tmp_path)
        self.processor(mean=(0.9,) * 3).save_pretrained(tmp_path)
        assert preprocessing(load_model(str(tmp_path))).mean == (0.9,) * 3

    def test_of_a_processor_that_does_the_same_is_left_as_it_is(self):
        model = build("timm/test_resnet")
        used = Preprocessing(160, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.95, "bilinear", fixed_size=False)
        record_preprocessing(model, used)
        record_processor(model, image_processor(used))  # whose sides are whole: 160 / 168
        assert preprocessing(model) == used
        record_processor(model, image_processor(replace(used, image_size=64, crop_pct=1.0)))
        assert preprocessing(model) == replace(used, image_size=64, crop_pct=1.0)

    @pytest.mark.parametrize("stated", [3, {"mean": [0.5]}, {"image_size": 3, "mean": 2, "std": 2}], ids=repr)
    def test_that_is_damaged_is_one_sentence(self, vit, stated):
        vit.config.sqakd_preprocessing = stated
        with pytest.raises(InputError, match="sqakd_preprocessing in the config of ViTForImageClassification is no"):
            preprocessing(vit)


class TestNumClasses:
    def test_are_those_that_the_model_states(self, conv_net, vit):
        assert num_classes(vit) == 4 and num_classes(conv_net) == 4
        wrapped = build("timm/test_resnet", 7)
        assert num_classes(wrapped) == num_classes(wrapped.timm_model) == 7

    def test_are_none_where_it_states_none(self):
        assert num_classes(nn.Linear(2, 3)) is None
        model = nn.Linear(2, 3)
        model.num_classes = "three"
        assert num_classes(model) is None


def test_the_old_name_of_load_model_warns_and_works():
    with pytest.warns(FutureWarning, match="load_teacher is now load_model"), pytest.raises(InputError, match="'no'"):
        load_teacher("timm/no")
