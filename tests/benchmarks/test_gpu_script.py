"""benchmarks/gpu.sh on a CPU: all of its tests and all of its tables, on small networks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.process


ROOT = Path(__file__).parents[2]
TABLES = (
    "Student's step, tiny ResNet 16 px, batch 2",
    "Student's step, tiny ViT 32 px, batch 2",
    "SQAKD step, tiny ResNet 16 px, batch 2",
    "SQAKD step, tiny ViT 32 px, batch 2",
    "The quantizer alone, 4 bits, bfloat16",
    "The quantizer alone, 4 bits, float32",
    "What a call costs where the tensor is small (64, 64): launches",
    "One SQAKD step by kernels, tiny ResNet 16 px, batch 2",
    "Other projects, tiny ResNet 16 px, batch 2",
    "Other projects, tiny ViT 32 px, batch 2",
    "Whole models compiled, tiny ResNet 16 px, batch 2",
    "Student's step, tiny ResNet 16 px, batch 4",
)


def run(*arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
class TestScript:
    def test_runs_every_test_and_makes_every_table(self, tmp_path):
        out = tmp_path / "results"
        done = run("--device", "cpu", "--tiny", "--out", str(out))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
        assert len(files) <= 8 and all(len(path.parts) == 1 for path in files)
        results = json.loads((out / "results.json").read_text())
        assert results["tiny"] and not results["failed"]
        assert set(TABLES) <= results["tables"].keys()
        text = (out / "results.md").read_text()
        assert all(f"**{title}**" in text for title in TABLES)
        assert " failed" not in (out / "tests.txt").read_text().splitlines()[-1]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_says_that_there_is_no_gpu(self, tmp_path):
        done = run("--only", "benchmark", "--out", str(tmp_path))
        assert done.returncode == 1
        assert "--device cpu --tiny checks this script without one" in done.stdout
        assert "failed: benchmark" in done.stderr


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--fast",), "unknown argument '--fast'"),
            (("--only", "tables"), "--only takes tests or benchmark, not 'tables'"),
        ],
    )
    def test_that_it_does_not_know_are_refused(self, arguments, message):
        done = run(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
