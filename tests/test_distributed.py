"""Law 5: one process and several compute the same, on gloo."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import TinyConvNet


def run(folder, processes, **options):
    """Run tests/distributed_run.py; return what each process left."""
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tests.distributed_run"]
    done = subprocess.run(
        [*command, str(folder), json.dumps({"steps": 20, **options})],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


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
    }


@pytest.mark.parametrize("name", ["2 x 4", "accumulation 2 x 4"])
def test_twenty_steps_equal_those_of_one_process(vit_runs, name):
    (expected,), (found, *_) = vit_runs["1 x 8"], vit_runs[name]
    assert len(expected["losses"]) == 20
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-6)  # logs are rounded
    moved = 0
    for key, tensor in expected["state"].items():
        torch.testing.assert_close(found["state"][key], tensor, rtol=1e-5, atol=1e-6, msg=key)
        moved += not torch.equal(tensor, expected["calibrated"][key])
    assert moved > len(expected["state"]) / 2
    for key in ("eval_loss", "eval_agreement", "eval_accuracy"):
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-5)


def test_processes_hold_the_same_bits(vit_runs):
    first, second = vit_runs["2 x 4"]
    assert_same_bits(first["state"], second["state"])
    assert_same_bits(first["calibrated"], second["calibrated"])


def test_batch_statistics_and_augmented_calibration_are_those_of_the_first_process(tmp_path):
    first, second = run(tmp_path / "conv", 2, model="conv", batch=4, accumulation=1, steps=3, augmented=True)
    assert_same_bits(first["calibrated"], second["calibrated"])
    assert_same_bits(first["state"], second["state"])
    fresh = TinyConvNet().state_dict()
    assert not torch.equal(first["state"]["stem.1.running_mean"], fresh["stem.1.running_mean"])
    assert first["metrics"]["eval_loss"] == second["metrics"]["eval_loss"]
