"""The commands beside `distill`, in the order in which a user meets them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sqakd_hf import calibrate_model, quantize_model
from sqakd_hf.cli import COMMANDS, distill, main
from tests.conftest import tiny_vit


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
        "--use_cpu true --disable_tqdm true".split()
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
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=4e-6), name

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
        model.save_pretrained(tmp_path)
        with pytest.raises(SystemExit, match="error: .*problem_type='multi_label_classification'"):
            main(["evaluate", str(tmp_path), "--max_images", "4"])
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
        assert "W2A2" in said and "integer kernels for" in said

    def test_a_model_that_is_not_quantized_yet(self, capsys):
        arguments = ["timm/test_resnet", "--weight_bits", 3, "--residual_bits", 8, "--num_labels", 7, "--json"]
        plan = json.loads(printed(capsys, "inspect", *arguments))["plan"]
        assert plan["residuals"] and {layer["weight_bits"] for layer in plan["layers"]} == {3, 8}
        assert plan["layers"][-1]["num_weights"] % 7 == 0

    def test_a_page_for_the_browser(self, distilled, capsys, tmp_path):
        said = printed(capsys, "inspect", distilled, "--html", tmp_path / "page.html")
        assert "integer kernels for" in said and f"The report is in {tmp_path / 'page.html'}." in said
        page = (tmp_path / "page.html").read_text()
        accuracy = json.loads((distilled / "results.json").read_text())["student"]["accuracy"]
        for expected in (f"{accuracy:.2%}", " dB", "OpenVINO, int8 file", ">integer<", 'class="codes"'):
            assert expected in page, expected
        assert "student: W2A2 by lsq" in page

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
    def test_a_student_keeps_its_quantization(self, distilled):
        with pytest.raises(SystemExit, match="is a student, whose quantization is its own. Leave out --weight_bits."):
            main(["benchmark", str(distilled), "--weight_bits", "4"])

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
            ("inspect timm/test_resnet --image_size -3", "image_size must be a positive integer, got -3"),
            ("benchmark timm/test_resnet --rounds 1", "rounds must be an integer of at least 2, got 1"),
            ("inspect timm/test_resnet --container zip", "container must be one of"),
        ],
    )
    def test_what_the_user_can_mend_is_one_sentence(self, arguments, message):
        done = subprocess.run(
            [sys.executable, "-m", "sqakd_hf", *arguments.split()], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert re.search(f"^error: .*{message}", done.stderr, re.MULTILINE)

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
