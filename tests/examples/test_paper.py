"""Each recipe of the paper's tables runs, on images that are at hand."""

import importlib.util
import json
import sys

import pytest
import torch

from sqakd_hf import InputError, build_model
from tests.helpers.paths import ROOT


pytestmark = [pytest.mark.process, pytest.mark.usefixtures("freed_memory_goes_back")]


SCRIPT = ROOT / "examples" / "paper" / "run.py"
RECIPES = sorted(SCRIPT.parent.glob("recipes/*.json"))
QUICK = (
    "--dataset digits --max_steps 2 --max_train_images 40 --max_test_images 20 --use_cpu true --disable_tqdm true "
    "--per_device_train_batch_size 20"
)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("paper_run", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        script.main()

    return call


def teacher_with_statistics(name, folder):
    """Save a network with random weights whose running statistics are those of its activations."""
    torch.manual_seed(0)
    model = build_model(name, 10, image_size=32).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative
    with torch.no_grad():
        model(pixel_values=torch.randn(40, 3, 32, 32))
    model.save_pretrained(folder)
    return str(folder)


def test_there_is_one_for_each_row():
    names = [path.stem for path in RECIPES]
    assert len(names) == len(set(names)) == 37
    for network, count in {"resnet20": 3, "vgg8": 3, "resnet32": 3, "vgg13": 3, "resnet18": 9, "vgg11": 9}.items():
        assert sum(f"-{network}-" in name for name in names) == count


def marks(path):
    """All but one of the rows that differ in bits alone are slow, and VGG-11: 130 million weights, five gigabytes."""
    first = min(other.stem for other in RECIPES if other.stem[:-4] == path.stem[:-4])
    return () if path.stem == first and "vgg11" not in path.stem else pytest.mark.slow


@pytest.mark.parametrize(
    "recipe", [pytest.param(path, marks=marks(path)) for path in RECIPES], ids=lambda path: path.stem
)
def test_each_runs_and_its_settings_arrive(run, recipe, tmp_path):
    wanted = json.loads(recipe.read_text())
    arguments = [*QUICK.split(), "--output_dir", str(tmp_path / "out")]
    if wanted["weight_bits"] == "8":
        # With many codes calibration goes by BatchNorm's running statistics, which two steps don't bring.
        arguments += ["--teacher", teacher_with_statistics(wanted["model"], tmp_path / "teacher")]
    run(recipe.stem, *arguments)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    training = found["arguments"]["training"]
    assert f"-{wanted['quantizer']}-w{wanted['weight_bits']}a{wanted['activation_bits']}" in recipe.stem
    assert found["arguments"]["first_last_bits"] is None and found["arguments"]["model"] == wanted["model"]
    arrived = {**training, **found["arguments"], "objective": training["objective"]}
    overruled = {"dataset", "label_column", "image_size", "per_device_train_batch_size"}
    for name in wanted.keys() - overruled:
        assert _plain(arrived[name]) == _plain(wanted[name]), name
    assert 0 <= found["student"]["accuracy"] <= 1


def _plain(value):
    """Forms that the command line, the config and the trainer's JSON give one value."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None if value == "none" else value
    if isinstance(value, dict):
        return [[key, value[key]] for key in value]
    return value


def test_the_number_of_epochs_is_teachers_and_students(run, tmp_path):
    run("cifar10-vgg8-ewgs-w2a2", *QUICK.split(), "--epochs", "3", "--output_dir", str(tmp_path / "out"))
    arguments = json.loads((tmp_path / "out" / "results.json").read_text())["arguments"]
    assert arguments["teacher_epochs"] == arguments["training"]["num_train_epochs"] == 3


def test_an_unknown_recipe_is_refused_with_close_names(run):
    with pytest.raises(InputError, match="no recipe 'cifar10-resnet21'. Close: cifar10-resnet20"):
        run("cifar10-resnet21")


def test_help_lists_the_recipes(run, capsys):
    run("--help")
    text = capsys.readouterr().out
    assert all(path.stem in text for path in RECIPES)
