"""Law 5: one process and several compute the same, on gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageClassification

from sqakd_hf import QuantizationConfig, quantize_model
from sqakd_hf.distillation.checkpoint import last_checkpoint
from tests.helpers.models import IMAGE_SIZE, TinyConvNet, tiny_vit
from tests.helpers.processes import LAUNCHER, launch, run


pytestmark = pytest.mark.process


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def vit_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    return {
        "1 x 8": run(folder / "one", 1, model="vit", batch=8, accumulation=1),
        "2 x 4": run(folder / "two", 2, model="vit", batch=4, accumulation=1),
        "accumulation 2 x 4": run(folder / "accumulated", 1, model="vit", batch=4, accumulation=2),
        "2 x accumulation 2 x 2": run(folder / "both", 2, model="vit", batch=2, accumulation=2),
    }


@pytest.mark.parametrize("name", ["2 x 4", "accumulation 2 x 4", "2 x accumulation 2 x 2"])
def test_twenty_steps_equal_those_of_one_process(vit_runs, name):
    (expected,), (found, *_) = vit_runs["1 x 8"], vit_runs[name]
    assert len(expected["losses"]) == 20
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-6)  # logs are rounded
    assert found["agreements"] == pytest.approx(expected["agreements"], abs=1e-4)
    moved = 0
    for key, tensor in expected["state"].items():
        torch.testing.assert_close(found["state"][key], tensor, rtol=1e-5, atol=1e-6, msg=key)
        moved += not torch.equal(tensor, expected["calibrated"][key])
    assert moved > len(expected["state"]) / 2
    for key in ("eval_loss", "eval_agreement", "eval_accuracy"):
        # A loss near 0 is T² = 16 times a difference of logarithms in float32, each good to 6e-8.
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-5, abs=1e-6)


def test_processes_hold_the_same_bits(vit_runs):
    first, second = vit_runs["2 x 4"]
    assert_same_bits(first["state"], second["state"])
    assert_same_bits(first["calibrated"], second["calibrated"])
    assert first["agreements"] == second["agreements"]  # logged of the images of both, not of each one's own
    assert len(set(first["agreements"])) > 2


def test_two_processes_that_resume_equal_two_that_went_on(tmp_path):
    options = {"model": "vit", "batch": 4, "accumulation": 1, "steps": 8}
    whole, _ = run(tmp_path / "whole", 2, save_steps=3, **options)
    resumed, other = run(tmp_path / "resumed", 2, resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert_same_bits(resumed["state"], other["state"])
    for name, tensor in whole["state"].items():
        torch.testing.assert_close(resumed["state"][name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert resumed["losses"][3:] == pytest.approx(whole["losses"][3:], rel=1e-5)


class TestInterrupt:
    options = {"model": "vit", "batch": 4, "accumulation": 1}

    @pytest.mark.parametrize("step", [3, 5])
    def test_one_process_that_is_interrupted_stops_all_after_the_same_step(self, tmp_path, step):
        left = run(tmp_path / "run", 2, steps=6, interrupt=step, **self.options)
        # Of the last step nobody could be stopped any more, and still all say the same of it.
        assert [(each["step"], each["interrupted"]) for each in left] == [(min(step + 2, 6), True)] * 2
        assert_same_bits(left[0]["state"], left[1]["state"])
        checkpoints = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
        assert checkpoints == (["checkpoint-5"] if step == 3 else [])

    def test_ctrl_c_in_the_terminal_that_started_all_processes(self, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        options = json.dumps({"steps": 10_000, "interrupt": -1, **self.options})
        with subprocess.Popen(
            [*LAUNCHER, "2", "-m", "tests.helpers.distributed_run", str(folder), options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:
            next(line for line in process.stdout if line.startswith("step 3 "))
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        left = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
        (step,) = {each["step"] for each in left}
        assert all(each["interrupted"] for each in left) and 3 < step < 100
        assert last_checkpoint(str(folder)) == str(folder / f"checkpoint-{step}")


class TestCachedLogits:
    options = {"model": "vit", "batch": 4, "accumulation": 1, "steps": 4}

    def run_alone(self, folder, **options):
        """Start two processes without a launcher that would end one with the other; return what they say."""
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.helpers.distributed_run", str(folder), json.dumps(options)]
        processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        try:
            return [process.communicate(timeout=120)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()

    def test_one_process_computes_and_both_train_as_without(self, tmp_path):
        cached = run(tmp_path / "cached", 2, cache=str(tmp_path / "logits"), **self.options)
        plain = run(tmp_path / "plain", 2, **self.options)
        assert [len(each["losses"]) for each in cached] == [4, 4]
        assert cached[0]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-5)
        assert len(list((tmp_path / "logits").iterdir())) == 1

    @pytest.mark.parametrize(
        ("teacher", "message"),
        [
            ("fails", r"InputError: .* failed in process 0: cannot identify image file a\.png\."),
            ("killed", "RuntimeError: cache_teacher_logits: another process ended before"),
            ("other images", "InputError: .* the dataset's fingerprint differs: 'noise of process 0', '.* 1'"),
        ],
    )
    def test_what_goes_wrong_in_one_process_ends_both(self, tmp_path, teacher, message):
        first, second = self.run_alone(
            tmp_path / "run", cache=str(tmp_path / "logits"), teacher=teacher, **self.options
        )
        assert re.search(message, second), second[-3000:]
        expected = {"fails": "OSError: cannot identify", "killed": "", "other images": message}[teacher]
        assert re.search(expected, first), first[-3000:]


def test_batch_statistics_and_augmented_calibration_are_those_of_the_first_process(tmp_path):
    first, second = run(tmp_path / "conv", 2, model="conv", batch=4, accumulation=1, steps=3, augmented=True)
    assert_same_bits(first["calibrated"], second["calibrated"])
    assert_same_bits(first["state"], second["state"])
    fresh = TinyConvNet().state_dict()
    assert not torch.equal(first["state"]["stem.1.running_mean"], fresh["stem.1.running_mean"])
    assert first["metrics"]["eval_loss"] == second["metrics"]["eval_loss"]


def test_fsdp2_trains_and_packs_a_sharded_student_like_a_whole_one(tmp_path):
    done = launch("tests.helpers.fsdp_run", tmp_path / "run", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    left = torch.load(tmp_path / "run" / "left.pt", weights_only=True)
    whole, sharded, autocast = left["whole"], left["sharded"], left["autocast"]

    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for name, tensor in whole["state"].items():
        torch.testing.assert_close(sharded["state"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)

    student = tiny_vit()
    quantize_model(student, QuantizationConfig(weight_bits=4, activation_bits=4))
    student.load_state_dict(sharded["state"])
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "packed")
    images = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(loaded.eval()(images).logits, student.eval()(images).logits)

    assert autocast["dtypes"] == ["torch.float32"]  # of the ranges
    assert autocast["losses"] != whole["losses"]
    assert autocast["losses"] == pytest.approx(whole["losses"], rel=0.2)

    assert "arrives in torch.bfloat16" in left["refused"] and "MixedPrecisionPolicy()" in left["refused"]
