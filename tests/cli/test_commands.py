"""The commands beside `distill`, in the order in which a user meets them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from sqakd_hf import QuantizationConfig, calibrate_model, quantize_model
from sqakd_hf.cli import COMMANDS, distill, evaluate, main
from sqakd_hf.data import dataset as data_module
from tests.helpers.models import tiny_vit


pytestmark = [pytest.mark.process, pytest.mark.usefixtures("freed_memory_goes_back")]


@pytest.fixture(scope="module", params=["timm", "native"])
def distilled(request, tmp_path_factory):
    """The folder of a student that `sqakd distill` made of digits, of timm's kind or transformers'."""
    folder = tmp_path_factory.mktemp("cli")
    model = "timm/test_resnet"
    if request.param == "native":
        model = folder / "vit"
        tiny_vit().config.save_pretrained(model)
    output = folder / "student"
    distill.main(
        f"--model {model} --output_dir {output} --max_steps 4 --max_train_images 80 --max_test_images 60 "
        "--recipe paper --use_cpu true --disable_tqdm true".split()
    )
    return output


def printed(capsys, *arguments):
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


class TestEvaluate:
    def test_measures_what_the_training_measured(self, distilled, capsys):
        expected = json.loads((distilled / "results.json").read_text())["student"]
        arguments = ["--dataset", "digits", "--max_images", 60, "--teacher", distilled / "teacher", "--json"]
        found = json.loads(printed(capsys, "evaluate", distilled, *arguments))
        assert found["images"] == 60
        # Training computes the divergence in float32: log-probabilities near 2 are rounded by 2e-7, times T² = 16.
        for name in ("accuracy", "agreement", "kl"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=4e-6), name

    def test_images_are_those_that_the_training_was_tested_on(self, tmp_path, capsys):
        rng = np.random.default_rng(0)
        for index in range(60):
            folder = tmp_path / "data" / ("cat", "dog")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            PIL.Image.fromarray(noise).save(folder / f"{index // 6}_{index}.png")
        used = ["--dataset", tmp_path / "data"]
        arguments = [
            "--model",
            "timm/test_resnet",
            "--image_size",
            32,
            "--recipe",
            "paper",
            "--max_steps",
            2,
            "--seed",
            7,
            "--use_cpu",
            "true",
        ]
        limits = ["--max_train_images", 40, "--max_test_images", 9]
        distill.main([str(each) for each in (*arguments, *limits, *used, "--output_dir", tmp_path / "student")])
        tested, loaded = [], data_module.load_image_data

        def load(name, **options):
            tested.append(loaded(name, **options))
            return tested[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "load_image_data", load)
            for more in ([], ["--seed", 8], ["--max_images", 12]):
                found = json.loads(printed(capsys, "evaluate", tmp_path / "student", *used, "--json", *more))
                assert found["images"] == (12 if "--max_images" in more else 9)
        expected = loaded(str(tmp_path / "data"), seed=7, max_test_images=9).test[:]
        assert tested[0].test[:] == expected != tested[1].test[:]
        student = json.loads((tmp_path / "student" / "results.json").read_text())["student"]
        (again,) = (json.loads(printed(capsys, "evaluate", tmp_path / "student", *used, "--json")),)
        assert again["accuracy"] == pytest.approx(student["accuracy"])

    def test_takes_the_exported_file(self, distilled, capsys, tmp_path):
        said = printed(capsys, "export", distilled, tmp_path / "s.onnx")
        assert "all weights equal" in said and (tmp_path / "s.onnx").exists()
        results = [
            json.loads(printed(capsys, "evaluate", model, "--max_images", 60, "--json"))
            for model in (distilled, tmp_path / "s.onnx")
        ]
        assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=2 / 60)
        assert "accuracy: " in printed(capsys, "evaluate", tmp_path / "s.onnx", "--max_images", 60)

    def test_a_student_of_several_labels_has_no_accuracy_to_report(self, tmp_path, capsys):
        model = tiny_vit()
        model.config.problem_type = "multi_label_classification"
        quantize_model(model)
        calibrate_model(model, [torch.randn(4, 3, 16, 16)], disable_progress=True)
        model.save_pretrained(tmp_path / "student")
        (tmp_path / "images").mkdir()
        for index in range(20):
            PIL.Image.new("RGB", (20, 20), (9 * index, 100, 50)).save(tmp_path / "images" / f"{index}.png")
        with pytest.raises(SystemExit, match="error: .*problem_type='multi_label_classification'"):
            main(["evaluate", str(tmp_path / "student"), "--dataset", str(tmp_path / "images")])
        assert "accuracy" not in capsys.readouterr().out


class TestExport:
    def test_prints_json(self, distilled, capsys, tmp_path):
        arguments = [distilled, tmp_path / "p.onnx", "--container", "packed", "--json"]
        report = json.loads(printed(capsys, "export", *arguments))
        assert (
            report["path"] == str(tmp_path / "p.onnx") and report["file_bytes"] == Path(report["path"]).stat().st_size
        )
        assert report["check"]["wrong_weights"] == [] and len(report["placements"]) > 10


class TestInspect:
    def test_a_student(self, distilled, capsys):
        facts = json.loads(printed(capsys, "inspect", distilled, "--json"))
        assert facts["plan"]["coverage"]["quantized_layers"] == len(facts["deploy"]["kernels"])
        said = printed(capsys, "inspect", distilled)
        assert "W2A2" in said and "ONNX Runtime: " in said

    def test_a_model_that_is_not_quantized_yet(self, capsys):
        arguments = ["timm/test_resnet", "--weight_bits", 3, "--residual_bits", 8, "--num_labels", 7, "--json"]
        plan = json.loads(printed(capsys, "inspect", *arguments))["plan"]
        assert plan["residuals"] and {layer["weight_bits"] for layer in plan["layers"]} == {3, 8}
        assert plan["layers"][-1]["num_weights"] % 7 == 0

    def test_a_page_for_the_browser(self, distilled, capsys, tmp_path):
        said = printed(capsys, "inspect", distilled, "--html", tmp_path / "page.html")
        assert "ONNX Runtime: " in said and f"The report is in {tmp_path / 'page.html'}." in said
        page = (tmp_path / "page.html").read_text()
        accuracy = json.loads((distilled / "results.json").read_text())["student"]["accuracy"]
        for expected in (f"{accuracy:.2%}", " dB", "OpenVINO, int8 file", ">integer<", 'class="codes"'):
            assert expected in page, expected
        assert "student: W2A2 by lsq" in page

    def test_what_each_place_costs(self, distilled, capsys, tmp_path):
        teacher, file = distilled / "teacher", tmp_path / "places.json"
        arguments = [teacher, "--weight_bits", 4, "--sensitivity", file, "--dataset", "digits", "--max_images", 33]
        said = printed(capsys, "inspect", *arguments)
        assert "KL where this alone is quantized" in said and "keep these high. 33 images" in said
        facts = json.loads(printed(capsys, "inspect", *arguments, "--json"))
        assert {error["bits"] for error in facts["sensitivity"]["errors"]} == {2, 3, 4, 6, 8}
        places = len(json.loads(file.read_text())["errors"])
        assert 5 * places == len(facts["sensitivity"]["errors"]) >= 10 * facts["plan"]["coverage"]["quantized_layers"]

    @pytest.mark.parametrize(
        ("what", "arguments", "message"),
        [
            ("teacher", [], "--sensitivity needs images: pass --dataset"),
            ("teacher", ["--dataset", "digits", "--max_images", 0], "max_images must be an integer of at least 1"),
            ("", ["--dataset", "digits"], "is a student: --sensitivity is of the float model"),
        ],
    )
    def test_what_places_can_not_be_measured(self, distilled, tmp_path, what, arguments, message):
        file = tmp_path / "places.json"
        with pytest.raises(SystemExit, match=message):
            main(["inspect", str(distilled / what), "--sensitivity", str(file), *map(str, arguments)])
        assert not file.exists()

    def test_a_page_that_cannot_be_written_is_told_first(self, tmp_path):
        (tmp_path / "folder").mkdir()
        for path, message in (
            (tmp_path / "no" / "a.html", "does not exist"),
            (tmp_path / "folder", "can't be written"),
        ):
            with pytest.raises(SystemExit, match=message):
                main(["inspect", "no/model", "--html", str(path)])
        assert [each.name for each in tmp_path.iterdir()] == ["folder"]

    def test_without_the_packages_of_the_export_it_says_what_is_missing(self):
        code = (
            "import sys; sys.modules['onnxruntime'] = None\n"
            "from sqakd_hf.cli import main; main(['inspect', 'timm/test_resnet'])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "W2A2" in done.stdout and "Kernels of engines are not told. Exporting to ONNX needs" in done.stdout


class TestBenchmark:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ("--weight_bits 4", "--weight_bits"),
            ("--weight_bits 2", "--weight_bits"),  # the default: given all the same
            ("--quantizer=lsq --no_per_channel", "--quantizer, --per_channel"),
        ],
    )
    @pytest.mark.parametrize("command", ["inspect", "benchmark"])
    def test_a_student_keeps_its_quantization(self, whole, command, given, named):
        with pytest.raises(SystemExit, match=f"is a student, whose quantization is its own. Leave out {named}.$"):
            main([command, str(whole / "student"), *given.split()])

    def test_a_student(self, distilled, capsys):
        facts = json.loads(printed(capsys, "benchmark", distilled, "--rounds", 2, "--json"))
        engines = {(each["engine"], each["what"]) for each in facts["latencies"]}
        assert ("PyTorch", "float32") in engines and ("ONNX Runtime", "int8 file") in engines
        assert facts["bits"] == "W2A2"

    def test_a_model_that_is_not_quantized_yet(self, capsys):
        arguments = ["timm/test_resnet", "--image_size", 32, "--weight_bits", 4, "--rounds", 2]
        assert "W4A2 student, 32 px, batch 1" in printed(capsys, "benchmark", *arguments)


class TestMain:
    def test_help_names_every_command_and_each_explains_itself(self, capsys):
        main([])
        said = capsys.readouterr().out
        for name in COMMANDS:
            assert name in said
            with pytest.raises(SystemExit) as stop:
                main([name, "--help"])
            assert stop.value.code == 0
            own = capsys.readouterr().out
            assert f"usage: sqakd {name}" in own and f"    sqakd {name} " in own

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("exprot", "There is no command 'exprot'; choose from .* Did you mean 'export'?"),
            ("evaluate nowhere.onnx", "There is no file 'nowhere.onnx'"),
            ("evaluate timm/resnet81", "timm has no model 'resnet81'"),
            ("inspect timm/test_resnet --weight_bits 9", "weight_bits must be an integer from 1 to 8, got 9"),
            ("inspect timm/test_resnet --image_size -3", "image_size must be an integer of at least 1, got -3"),
            ("benchmark timm/test_resnet --rounds 1", "rounds must be an integer of at least 2, got 1"),
            ("inspect timm/test_resnet --container zip", "container must be one of"),
            ("inspect", "sqakd inspect needs a model"),
            ("inspect --weight_bits 4", "sqakd inspect needs a model"),
            ("benchmark --json", "sqakd benchmark needs a model"),
            (
                "inspect timm/test_resnet --weigth_bits 4",
                "sqakd inspect has no argument '--weigth_bits'; .* Did you mean '--weight_bits'",
            ),
            ("benchmark timm/test_resnet --round=3", "has no argument '--round=3'; .* Did you mean '--rounds'"),
            ("inspect timm/test_resnet --weight 4", "has no argument '--weight'"),
            ("benchmark timm/test_resnet more", "sqakd benchmark has no argument 'more'"),
        ],
    )
    def test_what_the_user_can_mend_is_one_sentence(self, arguments, message):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            main(arguments.split())

    def test_a_float_model_and_a_file_of_another_kind_are_refused(self, tmp_path):
        torch.manual_seed(0)
        model = tiny_vit()
        model.save_pretrained(tmp_path / "float")
        with pytest.raises(SystemExit, match="is a float model, not a student. `sqakd distill` makes one."):
            main(["export", str(tmp_path / "float"), str(tmp_path / "a.onnx")])
        (tmp_path / "bad.onnx").write_bytes(b"no graph")
        with pytest.raises(SystemExit, match="ONNX Runtime can't read"):
            main(["evaluate", str(tmp_path / "bad.onnx")])

    def test_a_teacher_of_other_classes_is_refused(self, distilled, tmp_path):
        model = tiny_vit()
        model.save_pretrained(tmp_path / "other")
        with pytest.raises(SystemExit, match="error: .*10.*classes|error: .*4.*classes"):
            main(["evaluate", str(distilled), "--max_images", "4", "--teacher", str(tmp_path / "other")])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders with a whole student, a whole float model, and one in several files."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = tiny_vit()
    model.save_pretrained(folder / "float")
    model.save_pretrained(folder / "sharded", max_shard_size="10KB")
    quantize_model(model, QuantizationConfig(weight_bits=4, activation_bits=4))
    calibrate_model(model, [torch.randn(4, 3, 16, 16)], disable_progress=True)
    model.eval().save_pretrained(folder / "student")
    return folder


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def truncate(folder, name="model.safetensors"):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def keep_one_tensor(folder):
    name, tensor = next(iter(load_file(folder / "model.safetensors").items()))
    save_file({name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "a flipped bit": ("student", flip_a_bit, "is not what was saved"),
    "a truncated student": ("student", truncate, "model.safetensors can't be read"),
    "a student without weights": (
        "student",
        lambda folder: (folder / "model.safetensors").unlink(),
        "The weights of the quantized model .* are missing",
    ),
    "a truncated float model": ("float", truncate, "can't be loaded: .*If its files are damaged"),
    "an empty file of weights": (
        "float",
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "can't be loaded",
    ),
    "a half-written download": (
        "float",
        lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.part"),
        "can't be loaded",
    ),
    "most tensors lost": ("float", keep_one_tensor, "The files of .* lack '"),
    "a missing shard": (
        "sharded",
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        "can't be loaded: No such file.*00002-of-00003",
    ),
    "a missing index": (
        "sharded",
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "can't be loaded",
    ),
    "a truncated index": (
        "sharded",
        lambda folder: truncate(folder, "model.safetensors.index.json"),
        "can't be loaded",
    ),
    "an index that names a missing file": (
        "sharded",
        lambda folder: replace_index(folder, {"metadata": {}, "weight_map": {"vit.x": "gone.safetensors"}}),
        "can't be loaded: No such file.*gone.safetensors",
    ),
    "an index of another kind": ("sharded", lambda folder: replace_index(folder, {}), "can't be loaded"),
    "a truncated config": ("float", lambda folder: truncate(folder, "config.json"), "holds no model"),
    "an empty folder": ("float", lambda folder: [path.unlink() for path in folder.iterdir()], "holds no model"),
}


class TestDamagedModels:
    @pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
    def damaged(self, request, whole, tmp_path):
        source, damage, message = request.param
        shutil.copytree(whole / source, tmp_path / "model")
        damage(tmp_path / "model")
        return str(tmp_path / "model"), message

    @pytest.mark.parametrize("command", ["inspect", "benchmark", "evaluate", "export", "distill"])
    def test_are_an_error_and_never_random_weights(self, damaged, command, tmp_path, capsys):
        folder, message = damaged
        arguments = {
            "export": [folder, str(tmp_path / "a.onnx")],
            "distill": ["--model", folder, "--output_dir", str(tmp_path / "output"), "--use_cpu", "true"],
        }
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            main([command, *arguments.get(command, [folder])])
        assert capsys.readouterr().out == "" and not (tmp_path / "output").exists()

    def test_the_shell_sees_a_sentence_and_a_failure(self, whole, tmp_path):
        shutil.copytree(whole / "student", tmp_path / "model")
        flip_a_bit(tmp_path / "model")
        command = [sys.executable, "-m", "sqakd_hf", "inspect", str(tmp_path / "model")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
        assert re.search("^error: .*model.safetensors: the tensor .* is not what was saved", done.stderr, re.MULTILINE)

    def test_a_config_alone_is_an_architecture_and_said_to_be_one(self, whole, tmp_path, capsys, caplog):
        shutil.copy(whole / "float" / "config.json", tmp_path)
        said = printed(capsys, "inspect", tmp_path, "--num_labels", 7)
        assert "W2A2" in said and "ONNX Runtime: " in said
        assert "Random weights" in caplog.text and "has no trained weights" in caplog.text
