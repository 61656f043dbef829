import json
import logging
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from sqakd_hf import ImageTransform, InputError, build_model, load_model
from sqakd_hf.cli import distill, evaluate
from sqakd_hf.hub.model_preprocessing import preprocessing
from sqakd_hf.reconstruction.state import Progress
from tests.helpers.models import tiny_vit
from tests.helpers.paths import ROOT


pytestmark = [pytest.mark.process, pytest.mark.usefixtures("freed_memory_goes_back")]


SCRIPT = ROOT / "examples" / "run_sqakd.py"
QUICK = "--max_steps 2 --max_train_images 60 --max_test_images 30 --use_cpu true --disable_tqdm true"


@pytest.fixture
def run(tmp_path):
    """Run the command in this process and return its results; by the quickest recipe that trains, if none is given."""

    def call(arguments: str, output: str = "output") -> dict:
        folder = tmp_path / output
        recipe = "" if "--recipe" in arguments else "--recipe paper"
        distill.main(f"{QUICK} {recipe} {arguments} --output_dir {folder}".split())
        return json.loads((folder / "results.json").read_text())

    ours = logging.getLogger("sqakd_hf")
    level, handlers = ours.level, list(ours.handlers)
    yield call
    ours.setLevel(level)
    ours.handlers[:] = handlers


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """A folder that holds nothing but the config of a native transformers ViT."""
    folder = tmp_path_factory.mktemp("vit")
    tiny_vit().config.save_pretrained(folder)
    return folder


class TestRun:
    @pytest.mark.parametrize("model", ["timm/test_resnet", "timm/test_vit", "native"])
    def test_each_kind_of_model_runs_to_its_table(self, run, vit_folder, tmp_path, capsys, model):
        results = run(f"--model {vit_folder if model == 'native' else model}")

        for key in ("teacher", "calibrated", "student"):
            assert {"accuracy", "agreement", "kl"} <= set(results[key])
            assert 0 <= results[key]["accuracy"] <= 1
        assert results["teacher"]["agreement"] == 1.0 and results["teacher"]["kl"] == 0.0
        assert results["student"]["kl"] > 0
        assert results["arguments"]["weight_bits"] == 2
        table = capsys.readouterr().out
        stage = results["student"]["stage"]
        title = "distilled student" if stage == "trained" else f"student, as {stage}"
        assert title in table and "W2A2" in table
        output = tmp_path / "output"
        assert PIL.Image.open(output / "learning_curve.png").width > 500
        page = (output / "report.html").read_text()
        assert page.count("<figure") == 2 and f"{results['student']['accuracy']:.2%}" in page and " dB" in page
        assert {"model.safetensors", "config.json"} <= {path.name for path in output.iterdir()}

    def test_a_flat_folder_without_labels_needs_only_a_teacher(self, run, tmp_path):
        run("--model timm/test_resnet", output="first")
        flat = tmp_path / "flat"
        flat.mkdir()
        for index in range(40):
            PIL.Image.new("RGB", (40, 36), (6 * index, 100, 255 - 6 * index)).save(flat / f"{index}.png")

        with pytest.raises(
            InputError, match="no labels to train a teacher with, and 'timm/test_resnet' is not trained"
        ):
            run(f"--model timm/test_resnet --dataset {flat}", output="refused")
        with pytest.raises(InputError, match="no labels to choose the best epoch by"):
            run(f"--model timm/test_resnet --dataset {flat} --objective ce", output="refused")
        assert not (tmp_path / "refused").exists()

        teacher = tmp_path / "first" / "teacher"
        results = run(
            f"--model timm/test_resnet --dataset {flat} --teacher {teacher} --image_size 32", output="second"
        )
        assert results["student"]["accuracy"] is None
        assert 0 <= results["student"]["agreement"] <= 1

    def test_a_teacher_of_other_classes_is_refused(self, run, vit_folder, tmp_path):
        torch.manual_seed(0)
        tiny_vit().save_pretrained(tmp_path / "vit")
        with pytest.raises(InputError, match="The model has 4 classes but the images have 10, '0', '1'"):
            run(f"--model {tmp_path / 'vit'} --teacher {tmp_path / 'vit'}")

    @pytest.mark.parametrize(
        ("arguments", "metric", "greater"),
        [
            ("", "eval_kl", False),
            ("--objective 2*ce", "eval_accuracy", True),
            ("--objective ce+kl", "eval_kl", False),
            ("--metric_for_best_model eval_agreement --save_strategy epoch", "eval_agreement", True),
            ("--metric_for_best_model accuracy", "eval_accuracy", True),
        ],
    )
    def test_the_best_epoch_is_chosen_by_what_is_trained_for(self, run, arguments, metric, greater):
        training = run(f"--model timm/test_resnet {arguments}")["arguments"]["training"]
        assert (training["metric_for_best_model"], training["greater_is_better"]) == (metric, greater)
        assert training["load_best_model_at_end"] is True

    def test_all_quantization_arguments_reach_the_config(self, run):
        results = run(
            "--model timm/test_resnet --quantizer ewgs --weight_bits 3 --activation_bits none --first_last_bits none "
            "--per_channel false --integer_zero_point false --modules_to_not_convert layer1 "
            '--overrides {"layer4":{"weight_bits":4}} --quantizer_kwargs {"delta":0.01} --validation_fraction 0'
        )["arguments"]
        assert results["quantizer"] == "ewgs" and results["weight_bits"] == 3 and results["activation_bits"] is None
        assert results["first_last_bits"] is None and results["quantizer_kwargs"] == {"delta": 0.01}
        assert results["overrides"] == [["layer4", {"weight_bits": 4}]]
        assert results["modules_to_not_convert"] == ["layer1"]
        assert results["per_channel"] is False and results["integer_zero_point"] is False


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a network of 10 classes, and a flat folder of images without labels."""
    folder = tmp_path_factory.mktemp("trained")
    build_model("timm/test_resnet", 10, image_size=32).save_pretrained(folder / "model")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(40):
        pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        PIL.Image.fromarray(pixels.numpy()).save(folder / "images" / f"{index}.png")
    return folder


class TestDefaultsByRecipe:
    """Learning rate, BatchNorm and the activations' quantizer follow from the recipe."""

    def training(self, run, arguments: str, output: str = "output") -> dict:
        training = run(arguments, output)["arguments"]["training"]
        return {name: training[name] for name in ("learning_rate", "quantizer_learning_rate", "freeze_batch_norm")}

    @pytest.mark.parametrize(("bits", "rate"), [(1, 1e-3), (4, 2e-4), (8, 3e-3 / 255)])
    def test_statistics_are_kept_and_the_rate_is_one_in_units_of_the_weights_step(self, run, trained, bits, rate):
        arguments = f"--model {trained}/model --dataset {trained}/images --weight_bits {bits} --recipe auto"
        expected = {"learning_rate": rate, "quantizer_learning_rate": rate / 100, "freeze_batch_norm": "auto"}
        assert self.training(run, arguments) == expected

    def test_the_papers_has_new_statistics_and_one_rate(self, run):
        found = self.training(run, "--model timm/test_resnet --weight_bits 8 --recipe paper")
        expected = {"learning_rate": 1e-3, "quantizer_learning_rate": 1e-5, "freeze_batch_norm": False}
        assert found == expected

    @pytest.mark.parametrize(
        ("arguments", "quantizer"),
        [
            ("--recipe calibrate", "lsq+"),
            ("--recipe calibrate --activation_quantizer none", None),
            ("--recipe calibrate --quantizer ewgs", None),
            ("--recipe paper", None),
        ],
    )
    def test_lsq_has_affine_activations_but_in_the_paper(self, run, trained, arguments, quantizer):
        results = run(f"--model {trained}/model --dataset {trained}/images {arguments}")
        assert results["arguments"]["activation_quantizer"] == quantizer

    def test_what_is_given_stays(self, run, trained):
        arguments = f"--model {trained}/model --dataset {trained}/images --weight_bits 8"
        arguments += " --learning-rate=0.01 --freeze_batch_norm false --quantizer_learning_rate 0.5"
        expected = {"learning_rate": 0.01, "quantizer_learning_rate": 0.5, "freeze_batch_norm": False}
        assert self.training(run, arguments) == expected

    def test_a_resumed_training_goes_on_as_it_began(self, run, tmp_path):
        run("--model timm/test_resnet --weight_bits 8 --num_train_epochs 3")
        found = self.training(run, "--model timm/test_resnet --weight_bits 8 --resume_from_checkpoint last")
        assert found == {"learning_rate": 1e-3, "quantizer_learning_rate": 1e-5, "freeze_batch_norm": False}

    @pytest.mark.parametrize(("model", "channels_last"), [("mobilenetv2_035", True), ("test_resnet", False)])
    def test_depthwise_networks_compute_channels_last_on_a_cpu(self, run, model, channels_last):
        training = run(f"--model timm/{model} --max_steps 1")["arguments"]["training"]
        assert training["channels_last"] is channels_last


class TestTeacher:
    def test_a_trained_model_is_its_own_teacher_on_images_without_labels(self, run, trained, tmp_path):
        once = run(f"--model {trained}/model --dataset {trained}/images", output="once")
        twice = run(f"--model {trained}/model --dataset {trained}/images --teacher {trained}/model", output="twice")
        assert once["student"] == twice["student"]
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice")]
        assert weights[0] == weights[1]

    @pytest.mark.parametrize(
        "model", ["timm/test_vit", 'timm/test_resnet --model_args {"block_args":{"attn_layer":"se"}}']
    )
    def test_another_model_than_the_teacher_is_refused(self, run, trained, tmp_path, model):
        with pytest.raises(InputError, match="copy of its teacher, and --model .* is another network"):
            run(f"--model {model} --dataset {trained}/images --teacher {trained}/model")
        assert not (tmp_path / "output").exists()

    def test_the_same_network_by_another_name_is_not(self, run, trained):
        run(f"--model timm/test_resnet --dataset {trained}/images --teacher {trained}/model")

    def test_nothing_is_trained_from_scratch_without_labels(self, run, trained):
        with pytest.raises(InputError, match="--teacher_from_scratch trains a teacher by labels"):
            run(f"--model {trained}/model --dataset {trained}/images --teacher_from_scratch true")


class TestNeverWorse:
    def test_a_harmful_training_ends_with_the_calibrated_student(self, run, trained, tmp_path, capsys):
        results = run(f"--model {trained}/model --dataset {trained}/images --weight_bits 8 --learning_rate 10")
        assert results["student"]["step"] == 0
        assert {**results["calibrated"], "stage": "calibrated", "step": 0} == results["student"]
        assert "student, as calibrated" in capsys.readouterr().out
        assert "student, as calibrated" in (tmp_path / "output" / "README.md").read_text()


@pytest.fixture(scope="module")
def photographs(trained):
    """A flat folder of enough images to reconstruct from."""
    write_noise(trained / "photographs", 64)
    return trained / "photographs"


class TestRecipe:
    @pytest.mark.parametrize(
        ("recipe", "reconstructs", "trains", "freezes"),
        [
            ("auto", True, True, "auto"),
            ("paper", False, True, False),
            ("calibrate", False, False, "auto"),
            ("reconstruct", True, False, "auto"),
        ],
    )
    def test_it_goes_through_its_stages(
        self, run, trained, photographs, tmp_path, capsys, recipe, reconstructs, trains, freezes
    ):
        results = run(f"--model {trained}/model --dataset {photographs} --recipe {recipe} --weight_bits 3")
        assert (tmp_path / "output" / distill.RECONSTRUCTION).is_dir() is reconstructs
        assert (results["student"]["step"] is not None) is trains
        assert results["arguments"]["training"]["freeze_batch_norm"] == freezes
        # Each stage that was kept has a line, and the last of them is the student where nothing trained it.
        stages = [name for name in ("calibrated", "reconstructed") if name in results]
        table = capsys.readouterr().out
        assert all(f"{stage} only" in table for stage in stages)
        if results["student"]["step"] is None:
            assert results["student"] == {**results[stages[-1]], "stage": stages[-1], "step": None}
            assert f"student, as {stages[-1]}" in table
            card = (tmp_path / "output" / "README.md").read_text()
            assert f"{stages[-1]} " in card.split("##")[0] and "was tried" not in card

    def test_eight_bits_that_calibration_made_lossless_are_left_there(self, run, trained, photographs, caplog):
        arguments = f"--model {trained}/model --dataset {photographs} --recipe auto"
        results = run(f"{arguments} --weight_bits 8 --activation_bits 8")
        assert "reconstructed" not in results and results["student"]["step"] is None
        assert "Calibration is enough" in caplog.text

    def test_eight_bits_that_are_far_off_after_calibration_go_on_and_say_so(
        self, run, trained, photographs, monkeypatch, caplog
    ):
        monkeypatch.setattr(distill, "LOSSLESS_KL", -1.0)
        arguments = f"--model {trained}/model --dataset {photographs} --recipe auto"
        results = run(f"{arguments} --weight_bits 8 --activation_bits 8")
        assert results["student"]["step"] is not None
        assert "After calibration at 8 bits" in caplog.text and "above -1" in caplog.text

    def test_a_few_images_are_enough_for_all_but_reconstruction(self, run, trained, caplog):
        arguments = f"--model {trained}/model --dataset {trained}/images --max_train_images 30 --recipe auto"
        assert "reconstructed" not in run(arguments)
        assert "Not reconstructed block by block" in caplog.text and "images are too few" in caplog.text
        with pytest.raises(InputError, match="images are too few"):
            run(arguments.replace("auto", "reconstruct"), output="asked")

    def test_a_run_interrupted_between_blocks_ends_as_one_that_was_not(
        self, run, trained, photographs, tmp_path, monkeypatch
    ):
        arguments = f"--model {trained}/model --dataset {photographs} --seed 3 --recipe auto --time_budget 0.1s"
        whole = run(arguments, output="whole")
        save, units = Progress.save, []

        def save_two(self, number, *args):
            if number == 2:
                raise KeyboardInterrupt
            units.append(number)
            save(self, number, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "save", save_two)
            with pytest.raises(SystemExit, match="saved .*--resume_from_checkpoint last to go on"):
                run(arguments, output="interrupted")
        assert units == [0, 1]

        def save_and_note(self, number, *args):
            units.append(number)
            save(self, number, *args)

        monkeypatch.setattr(Progress, "save", save_and_note)
        resumed = run(f"{arguments} --resume_from_checkpoint last", output="interrupted")
        assert units[:4] == [0, 1, 2, 3]  # the first two were read
        for key in ("calibrated", "reconstructed", "student"):
            assert resumed.get(key) == whole.get(key)
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "interrupted")]
        assert weights[0] == weights[1]

    def test_a_run_that_begins_anew_leaves_the_blocks_of_another(self, run, trained, photographs):
        arguments = f"--model {trained}/model --dataset {photographs} --recipe reconstruct --time_budget 0.1s"
        run(arguments)
        run(f"{arguments} --weight_bits 3 --overwrite_output_dir")

    def test_a_time_becomes_a_number_of_updates(self, run, trained, photographs, tmp_path, caplog):
        run(f"--model {trained}/model --dataset {photographs} --recipe reconstruct --time_budget 0.1s")
        assert "10 updates of each of" in caplog.text
        assert json.loads((tmp_path / "output" / distill.RECONSTRUCTION / "steps.json").read_text()) == 10

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--recipe auto --time_budget 10", "must be a time such as 90s, 10m or 1h, got '10'"),
            ("--recipe auto --time_budget 0m", "must be a time such as"),
            ("--time_budget 5m --recipe paper", "of the reconstruction, which --recipe paper leaves out"),
        ],
    )
    def test_a_time_that_means_nothing_is_refused(self, run, arguments, message):
        with pytest.raises(InputError, match=message):
            run(f"--model timm/test_resnet {arguments}")

    def test_an_unknown_one_is_refused(self, run, tmp_path):
        with pytest.raises(InputError, match="--recipe must be one of 'auto', 'paper'.*got 'best'"):
            run("--model timm/test_resnet --recipe best")
        assert not (tmp_path / "output").exists()


def write_noise(folder, count=12):
    """Write images of noise around colours of their own; return their paths."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 60, (20, 20, 3)) + rng.integers(0, 196, 3)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def teacher(tmp_path):
    """The folder of a teacher of owls, cats and dogs, in this order, that tells noise apart somehow."""
    torch.manual_seed(0)
    model = build_model("timm/test_resnet", 3, 32).eval()
    with torch.no_grad():
        logits = predict_files(model, write_noise(tmp_path / "noise", 48))
        model.timm_model.get_classifier().bias -= logits.mean(0)
    model.config.id2label = {0: "owl", 1: "cat", 2: "dog"}
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def predict_files(model, files):
    used = preprocessing(model)
    transform = ImageTransform(32, used.mean, used.std, crop_pct=used.crop_pct, interpolation=used.interpolation)
    images = transform({"image": [PIL.Image.open(file) for file in files]})["pixel_values"]
    with torch.no_grad():
        return model(torch.stack(images)).logits


class TestLabelsOfEachSplit:
    """Split by split: labels of the one say nothing about the other."""

    def test_unlabelled_test_images_of_labelled_training_images(self, run, tmp_path, capsys):
        for folder in ("train/cat", "train/dog", "test"):
            write_noise(tmp_path / "data" / folder)
        results = run(f"--model timm/test_resnet --image_size 32 --dataset {tmp_path / 'data'}")
        assert results["teacher"]["accuracy"] is None and results["student"]["accuracy"] is None
        capsys.readouterr()
        teacher = tmp_path / "output" / "teacher"
        evaluate.main(f"{tmp_path}/output --dataset {tmp_path}/data --teacher {teacher} --json".split())
        found = json.loads(capsys.readouterr().out)
        assert "accuracy" not in found and found["agreement"] == pytest.approx(results["student"]["agreement"])

    def test_labelled_test_images_of_unlabelled_training_images(self, run, teacher, tmp_path, capsys):
        files = write_noise(tmp_path / "data" / "train", 48)
        said = predict_files(load_model(teacher).eval(), files).argmax(1).tolist()
        for file, number in zip(files, said, strict=True):
            if number:  # the test has cats and dogs: not all of the teacher's classes, and its numbers are others
                folder = tmp_path / "data" / "test" / ("owl", "cat", "dog")[number]
                folder.mkdir(parents=True, exist_ok=True)
                file.rename(folder / file.name)
        assert len(set(said)) == 3
        arguments = f"--model timm/test_resnet --image_size 32 --dataset {tmp_path / 'data'}"
        with pytest.raises(InputError, match="have no labels to train a teacher with"):
            run(arguments, output="refused")
        with pytest.raises(InputError, match="have no labels to choose the best epoch by"):
            run(f"{arguments} --objective ce", output="refused")
        results = run(f"{arguments} --teacher {teacher}")
        assert results["teacher"]["accuracy"] == 1
        assert results["student"]["accuracy"] == pytest.approx(results["student"]["agreement"])
        capsys.readouterr()
        evaluate.main(f"{tmp_path}/output --dataset {tmp_path}/data --json".split())
        assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(results["student"]["accuracy"])

    def test_labelled_test_images_of_other_classes_are_refused(self, run, teacher, tmp_path):
        for folder in ("train", "test/emu", "test/fox"):
            write_noise(tmp_path / "data" / folder)
        with pytest.raises(InputError, match="The model has 3 classes but the images have 2, 'emu', 'fox'"):
            run(f"--model timm/test_resnet --image_size 32 --dataset {tmp_path / 'data'} --teacher {teacher}")


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--model timm/resnet81", "timm has no model 'resnet81'. Did you mean 'resnet18'"),
            ("--model timm/test_resnet --weight_bits four", "weight_bits must be an integer from 1 to 8, got 'four'"),
            ("--model timm/test_resnet --weight_bits 2.5", "weight_bits must be an integer from 1 to 8, got '2.5'"),
            ("--model timm/test_resnet --quantizer lsqq", "Unknown quantizer 'lsqq'; registered: .* mean 'lsq'"),
            ("--model timm/test_resnet --dataset digit", "'digit'.*Did you mean 'digits'"),
            ("--model timm/test_resnet --overrides nonsense", "--overrides must be a JSON object, got 'nonsense'"),
            (
                "--model timm/test_resnet --save_strategy no",
                "--save_strategy does not go with --validation_fraction 0.1",
            ),
            ("--model timm/test_resnet --load-best-model-at-end=false", "--load_best_model_at_end does not go with"),
            ("--model timm/test_resnet --validation_fraction 0 --eval_strategy epoch", "fraction 0 holds out none"),
            ("--model timm/test_resnet --greater_is_better true", "pass --metric_for_best_model as well"),
            ("--model timm/test_resnet --lr_scheduler_type reduce_lr_on_plateau", "requires an eval strategy"),
            ("--model timm/test_resnet --validation_fraction 1.5", "fraction must lie between 0 and 1"),
            (
                "--model timm/test_resnet --modules_to_not_convert layr1",
                "'layr1' matches no layer; close names: layer",
            ),
        ],
        ids=lambda value: value.split()[-1] if value.startswith("--") else "",
    )
    def test_it_is_one_sentence(self, run, arguments, message):
        with pytest.raises(InputError, match=message):
            run(arguments)

    def test_several_gpus_in_one_process_are_refused_before_a_teacher_trains(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(distill.DistillationArguments, "n_gpu", 2)
        with pytest.raises(InputError, match="sees 2 GPUs"):
            run("--model timm/test_resnet")
        assert not (tmp_path / "output").exists()

    def test_an_output_folder_that_is_not_empty_is_kept(self, run, tmp_path):
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "precious").touch()
        with pytest.raises(InputError, match="is not empty. Pass --overwrite_output_dir"):
            run("--model timm/test_resnet")
        assert [path.name for path in (tmp_path / "output").iterdir()] == ["precious"]

    def test_the_shell_sees_a_sentence_and_a_failure(self, tmp_path):
        done = subprocess.run(
            [sys.executable, SCRIPT, "--model", "timm/resnet81", "--output_dir", tmp_path / "out"],
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "error: timm has no model 'resnet81'" in done.stderr
        assert "Traceback" not in done.stderr


class TestInterrupt:
    def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(self, tmp_path):
        arguments = "--model timm/test_resnet --max_train_images 200 --max_test_images 30 --use_cpu true"
        arguments += (
            " --recipe paper --teacher_epochs 1 --num_train_epochs 300 --validation_fraction 0 --disable_tqdm true"
        )
        arguments += f" --logging_strategy steps --logging_steps 1 --output_dir {tmp_path}/out"
        command = [sys.executable, "-u", str(SCRIPT), *arguments.split()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "'agreement'" in line:  # the student trains
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "Run the same command with --resume_from_checkpoint last to go on" in errors
        assert "Traceback" not in errors
        checkpoint = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]

        done = subprocess.run(
            [*command, "--resume_from_checkpoint", "last", "--max_steps", str(step + 2)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / "results.json").exists()
        assert "starts from random weights" not in done.stderr  # the teacher of the first part goes on teaching


def test_a_second_call_in_one_process_says_everything_once(tmp_path):
    ours = logging.getLogger("sqakd_hf")
    level, handlers = ours.level, list(ours.handlers)
    try:
        ours.handlers[:] = [logging.NullHandler()]
        args = distill.DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
        for _ in range(3):
            distill.set_up_logging(args)
        assert [type(handler) for handler in ours.handlers] == [logging.NullHandler, logging.StreamHandler]
    finally:
        ours.setLevel(level)
        ours.handlers[:] = handlers
