import pytest

from sqakd_hf.cli import distill


@pytest.fixture(autouse=True)
def freed_memory_goes_back(monkeypatch):
    """The command tells the C library to keep what is freed; a process that runs other tests after it shall not."""
    monkeypatch.setattr(distill, "keep_freed_memory", lambda: None)
