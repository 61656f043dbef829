import json

import pytest

from sqakd_hf import InputError
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

    @pytest.mark.parametrize("content", ["not JSON", '{"other": 1}', "[1, 2]"])
    def test_a_file_of_another_kind_is_refused(self, tmp_path, content):
        (tmp_path / RECORD_FILE).write_text(content)
        with pytest.raises(InputError, match="is no record of a training"):
            TrainingRecord.load(str(tmp_path))
