"""The small examples run as a newcomer runs them: in a process of their own."""

import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


pytestmark = pytest.mark.process


EXAMPLES = ROOT / "examples"


def run(name, *arguments):
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_custom_layer_and_quantizer_survive_a_fresh_process():
    output = run("custom_layer_and_quantizer.py")
    assert "reloaded in a fresh process: QuantizedCosineLinear, logits equal: True" in output
    assert re.search(r"head +CosineLinear +320 .*percentile", output)


def test_segmentation_distils_saves_and_draws(tmp_path):
    sizes = ("--train_images", "128", "--test_images", "32", "--teacher_epochs", "2", "--epochs", "1")
    output = run("segmentation.py", "--output_dir", str(tmp_path), "--attention_bits", "8", *sizes)
    rows = re.findall(r"^(teacher|W2A2, calibrated|W2A2, distilled) +([\d.]+) % +([\d.]+) % +([\d.]+) %", output, re.M)
    assert [row[0] for row in rows] == ["teacher", "W2A2, calibrated", "W2A2, distilled"] and rows[0][3] == "100.00"
    assert (tmp_path / "predictions.png").stat().st_size > 10_000
    assert {file.name for file in tmp_path.iterdir()} >= {"model.safetensors", "config.json"}
