import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest

from sqakd_hf.data import hub_access as hub
from sqakd_hf.data.hub_access import hub_is_reachable
from tests.helpers.hub_server import HubServer


@pytest.fixture
def server(monkeypatch):
    """A Hub on this machine that the client is pointed to, and no answers of before."""
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hub, "_answers", {})
        yield server


def slow_hub():
    """A socket that takes connections and answers none."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


class TestHubIsReachable:
    def test_it_asks_the_endpoint_once(self, server):
        assert hub_is_reachable() and hub_is_reachable()
        assert server.requests == ["HEAD "] or server.requests == ["HEAD /"]

    def test_a_slow_answer_is_no_and_asked_for_again_after_a_while(self, server, monkeypatch):
        listener, url = slow_hub()
        with listener:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
            monkeypatch.setattr(hub, "TIMEOUT", 0.2)
            assert not hub_is_reachable()
            listener.settimeout(0.2)
            listener.accept()[0].close()
            assert not hub_is_reachable()
            with pytest.raises(TimeoutError):  # the second time nobody was asked
                listener.accept()
            monkeypatch.setattr(hub, "ASK_AGAIN_AFTER", 0.0)
            answers = threading.Thread(target=lambda: listener.accept()[0].sendall(b"HTTP/1.1 200 OK\r\n\r\n"))
            monkeypatch.setattr(hub, "TIMEOUT", 5.0)
            listener.settimeout(5)
            answers.start()
            assert hub_is_reachable()
            answers.join()
        assert hub_is_reachable()  # what answered once is not asked again

    def test_another_endpoint_is_another_question(self, server, monkeypatch):
        assert hub_is_reachable()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        assert not hub_is_reachable()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        assert hub_is_reachable()

    def test_threads_get_the_same_answer(self, server):
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda _: hub_is_reachable(), range(32)))

    def test_offline_mode_asks_nothing(self, server, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert not hub_is_reachable() and server.requests == []
