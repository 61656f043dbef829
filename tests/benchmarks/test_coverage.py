"""A dozen of what benchmarks/coverage.py walks: convert, calibrate, train, pack, reload, compare."""

import importlib.util

import pytest

from tests.helpers.paths import ROOT


pytestmark = pytest.mark.process


PATH = ROOT / "benchmarks" / "coverage.py"
spec = importlib.util.spec_from_file_location("coverage_benchmark", PATH)
coverage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage)

DOZEN = [
    "test_byobnet",
    "test_efficientnet",
    "test_nfnet",
    "test_convnext",
    "test_coatnet",
    "test_vit",
    "test_mambaout",
    "levit_128s",
    "edgenext_xx_small",
    "repvgg_a0",
    "SwinForImageClassification",
    "BitForImageClassification",
    "SegformerForSemanticSegmentation",
    "YolosForObjectDetection",
]


@pytest.mark.parametrize("name", DOZEN)
def test_everything_is_quantized_near_float_and_reloads_exactly(name):
    row = coverage.examine(name)
    assert row["exact"] and row["without_gradient"] == 0
    assert row["macs"] >= 0.99 and not row["skipped"]
    assert 0 < row["error"] < 0.1
