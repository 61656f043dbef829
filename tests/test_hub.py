import huggingface_hub
import pytest

from sqakd_hf.hub import hub_is_reachable


class FakeSession:
    """Stands in for the Hub's HTTP client; `error` is what a request raises, if anything."""

    def __init__(self, error=None):
        self.error = error
        self.requests = []

    def head(self, url, timeout):
        self.requests.append((url, timeout))
        if self.error is not None:
            raise self.error


@pytest.fixture
def connect(monkeypatch):
    def install(session):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.example")
        monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: session)
        return session

    hub_is_reachable.cache_clear()
    yield install
    hub_is_reachable.cache_clear()


class TestHubIsReachable:
    def test_it_asks_the_endpoint_once_and_briefly(self, connect):
        session = connect(FakeSession())
        assert hub_is_reachable() and hub_is_reachable()
        assert session.requests == [("https://hub.example", 5)]

    def test_any_error_means_no_and_is_not_tried_again(self, connect):
        session = connect(FakeSession(ConnectionError()))
        assert not hub_is_reachable() and not hub_is_reachable()
        assert len(session.requests) == 1

    def test_offline_mode_asks_nothing(self, connect, monkeypatch):
        session = connect(FakeSession())
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert not hub_is_reachable() and session.requests == []
