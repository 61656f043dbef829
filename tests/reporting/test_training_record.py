import json

import numpy as np
import pytest
import torch

from sqakd_hf import InputError, QuantizationConfig, quantize_model
from sqakd_hf.reporting import training_record as record_module
from sqakd_hf.reporting.html_report import html_report
from sqakd_hf.reporting.training_record import RECORD_FILE, TrainingRecord, to_json
from tests.helpers.models import tiny_vit


RECORD = TrainingRecord(
    {"student": {"accuracy": None, "agreement": 0.5, "kl": 0.1, "images": 3}},
    [{"loss": 1.0, "epoch": 0.5}],
    {"student": {"conv": 12.5}},
)


class TestTrainingRecord:
    def test_comes_back_as_it_was(self, tmp_path):
        RECORD.save(tmp_path)
        assert TrainingRecord.load(str(tmp_path)) == RECORD
        assert json.loads((tmp_path / RECORD_FILE).read_text())["layer_sqnr"] == {"student": {"conv": 12.5}}

    @pytest.mark.parametrize("name", ["a folder without", "timm/no_such_model", "nowhere"])
    def test_is_empty_where_there_is_none(self, tmp_path, name):
        (tmp_path / "a folder without").mkdir()
        assert TrainingRecord.load(str(tmp_path / name) if " " in name else name) == TrainingRecord()

    def test_is_empty_where_the_hub_has_no_such_repository(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise OSError("timm/test_resnet is not a valid model identifier")

        monkeypatch.setattr(record_module, "cached_file", refuse)
        assert TrainingRecord.load("timm/test_resnet") == TrainingRecord()

    def test_keeps_numbers_alone_and_leaves_out_what_later_versions_add(self, tmp_path):
        logs = [{"loss": torch.tensor(0.5), "epoch": np.float32(1.0), "note": "text", "many": torch.ones(3)}]
        TrainingRecord(log_history=logs).save(tmp_path)
        path = tmp_path / RECORD_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
        assert TrainingRecord.load(str(tmp_path)).log_history == [{"loss": 0.5, "epoch": 1.0}]

    def test_numbers_that_are_not_finite_are_null(self, tmp_path):
        nan, infinite = float("nan"), float("inf")
        record = TrainingRecord(
            {"student": {"kl": nan, "images": 3}},
            [{"loss": torch.tensor(nan), "epoch": 1.0}, {"loss": 0.5, "epoch": 2.0}],
            {"student": {"conv": -infinite}},
        )
        record.save(tmp_path)
        text = (tmp_path / RECORD_FILE).read_text()
        assert "NaN" not in text and "Infinity" not in text
        loaded = TrainingRecord.load(str(tmp_path))
        assert loaded.results == {"student": {"kl": None, "images": 3}}
        assert loaded.log_history[0] == {"loss": None, "epoch": 1.0}
        assert loaded.layer_sqnr == {"student": {"conv": None}}
        model = tiny_vit()
        quantize_model(model, QuantizationConfig())
        assert "<figure" in html_report(model, "s", loaded)

    def test_so_they_are_wherever_they_stand(self):
        value = {"a": [1, (float("nan"), {"b": float("-inf")})], "c": "NaN", "d": 0.25, "e": True}
        assert json.loads(to_json(value)) == {"a": [1, [None, {"b": None}]], "c": "NaN", "d": 0.25, "e": True}

    @pytest.mark.parametrize("content", ["not JSON", '{"results": 3}', "[1, 2]", '{"log_history": [1]}'])
    def test_a_file_of_another_kind_is_refused(self, tmp_path, content):
        (tmp_path / RECORD_FILE).write_text(content)
        with pytest.raises(InputError, match="is no record of a training"):
            TrainingRecord.load(str(tmp_path))
