import json

import numpy as np
import pytest
import torch

from sqakd_hf import InputError
from sqakd_hf import record as record_module
from sqakd_hf.record import RECORD_FILE, TrainingRecord


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

    @pytest.mark.parametrize("content", ["not JSON", '{"results": 3}', "[1, 2]", '{"log_history": [1]}'])
    def test_a_file_of_another_kind_is_refused(self, tmp_path, content):
        (tmp_path / RECORD_FILE).write_text(content)
        with pytest.raises(InputError, match="is no record of a training"):
            TrainingRecord.load(str(tmp_path))
