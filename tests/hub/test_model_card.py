import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
)

from sqakd_hf import QuantizationConfig, build_model, quantize_model
from sqakd_hf.data.hub_access import hub_id
from sqakd_hf.hub.model_card import _TASKS, _task, model_card
from tests.helpers.models import tiny_vit


RESULTS = {
    "teacher": {"accuracy": 0.75, "agreement": 1.0, "kl": 0.0, "images": 1200},
    "calibrated": {"accuracy": 0.5, "agreement": 0.625, "kl": 1.5, "images": 1200},
    "student": {"accuracy": 0.725, "agreement": 0.875, "kl": 0.25, "images": 1200},
}


@pytest.fixture
def student():
    torch.manual_seed(0)
    model = tiny_vit()
    quantize_model(model, QuantizationConfig(weight_bits=3, activation_bits=4))
    return model


def reread(card, tmp_path):
    card.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_metadata_is_what_the_hub_understands(student, tmp_path):
    card = model_card(
        student,
        "me/student",
        base_model="timm/resnet18.a1_in1k",
        results=RESULTS,
        datasets=["ylecun/mnist"],
        license="apache-2.0",
        language="en",
        tags=["mine"],
    )
    data = reread(card, tmp_path).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-classification",
        "apache-2.0",
    )
    assert (data.base_model, data.base_model_relation) == ("timm/resnet18.a1_in1k", "quantized")
    assert data.datasets == ["ylecun/mnist"] and data.language == "en"
    assert {"sqakd", "sqakd_hf", "quantization", "w3a4", "mine"} <= set(data.tags)
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    assert measured == {"accuracy": 0.725, "agreement": 0.875, "kl": 0.25}
    assert {result.dataset_type for result in data.eval_results} == {"ylecun/mnist"}


def test_a_reader_finds_numbers_bits_and_how_to_load(student):
    text = str(model_card(student, "me/student", results=RESULTS, stored_bytes=1000, training_arguments={"seed": 3}))
    assert "| calibrated only | 50.00% | 62.50% | 1.5000 | 1,200 |" in text
    assert "| distilled student | 72.50% | 87.50% | 0.2500 | 1,200 |" in text
    assert "import sqakd_hf" in text and 'from_pretrained("me/student")' in text
    assert "The weight files take 1,000 bytes" in text and "| `seed` | `3` |" in text
    for layer in student.quantization_plan:
        assert layer.name in text


def test_files_beside_the_card_are_shown(student):
    text = str(model_card(student, "me/student", learning_curve="curve.png", report="page.html"))
    assert "](curve.png)" in text and "[page.html](page.html)" in text
    assert "](" not in str(model_card(student, "me/student")).split("## Results")[1].split("## Size")[0]


def test_what_was_not_measured_is_not_claimed(student, tmp_path):
    card = reread(model_card(student, "me/student"), tmp_path)
    assert "Not measured in the run that wrote this card." in card.text
    assert card.data.eval_results is None and card.data.base_model is None and card.data.license is None
    unlabelled = {"student": {"accuracy": None, "agreement": 0.5, "kl": 1.0}}
    text = str(model_card(student, "me/student", results=unlabelled))
    assert "| teacher | - | - | - | - |" in text and "| distilled student | - | 50.00% | 1.0000 | - |" in text


def test_sizes_are_those_of_the_float_network(student):
    float_bytes = sum(tensor.numel() * 4 for tensor in tiny_vit().state_dict().values())
    text = str(model_card(student, "me/student", stored_bytes=float_bytes // 4))
    assert f"the float32 weights {float_bytes:,}: 4.0 times less" in text


@pytest.mark.parametrize("name", ["timm/resnet18.a1_in1k", "google/vit-base-patch16-224"])
def test_repositories_have_ids(name):
    assert hub_id(name) == name


@pytest.mark.parametrize("name", [None, "", "resnet18", "/home/me/model", "./a/b", "a/b/c", "../model", "~/model"])
def test_folders_have_none(name):
    assert hub_id(name) is None


def test_an_existing_folder_is_no_id(tmp_path, monkeypatch):
    (tmp_path / "out" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("out/run") is None


@pytest.mark.parametrize(
    ("objective", "method", "images"),
    [
        ("kl", "and no labels are used", "Images: clothes, without labels."),
        ("ce + kl", "training with labels: the loss is `ce + kl`", "Images: clothes, with labels."),
        ("kl + squat", "training without labels: the loss is `kl + squat`", "Images: clothes, without labels."),
    ],
)
def test_it_says_what_was_minimised_and_whether_labels_were_read(student, objective, method, images):
    arguments = {"objective": objective}
    card = model_card(
        student, "me/student", training_arguments=arguments, dataset_name="clothes", with_labels="ce" in objective
    )
    text = str(card)
    assert method in text and images in text
    assert (objective == "kl") == ("no labels are used" in text)


def config_of(kind, **options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(image_size=[32, 32], patch_size=8, **sizes, **options)


@pytest.mark.parametrize(
    ("model", "auto_class", "task"),
    [
        (lambda: tiny_vit(), "AutoModelForImageClassification", "image-classification"),
        (
            lambda: YolosForObjectDetection(config_of(YolosConfig, num_detection_tokens=4)),
            "AutoModelForObjectDetection",
            "object-detection",
        ),
        (
            lambda: SegformerForSemanticSegmentation(SegformerConfig()),
            "AutoModelForSemanticSegmentation",
            "image-segmentation",
        ),
        (lambda: build_model("timm/test_resnet", 4), "AutoModelForImageClassification", "image-classification"),
        (lambda: ViTModel(tiny_vit().config), "AutoModel", "image-feature-extraction"),
    ],
    ids=["classifier", "detector", "segmentation", "timm", "backbone"],
)
def test_it_names_the_auto_class_that_loads_the_student(model, auto_class, task):
    with torch.device("meta"):
        assert _task(model()) == (auto_class, task)


def test_a_detector_says_how_to_load_it():
    student = YolosForObjectDetection(config_of(YolosConfig, num_detection_tokens=4))
    quantize_model(student, QuantizationConfig())
    card = model_card(student, "me/detector")
    assert card.data.pipeline_tag == "object-detection"
    assert 'AutoModelForObjectDetection.from_pretrained("me/detector")' in str(card)


def test_the_auto_classes_are_those_of_transformers():
    assert all(hasattr(transformers, name) for name in _TASKS)
