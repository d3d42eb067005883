"""A Hub of our own, to which nothing leaves this machine."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import Make, Patch


@pytest.fixture
def hub(monkeypatch: Patch, tmp_path: Path) -> Iterator[Make]:
    """Start a Hub of our own and log in to it: ``hub(benchmarks=[...])`` returns the server."""
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    servers: list[Any] = []

    def start(benchmarks: Sequence[str] = ()) -> Any:
        server = module.FakeHub(list(benchmarks))
        servers.append(server)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", module.TOKEN)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for name in [
            "ARTE_EDGE_OFFLINE",
            "HF_HUB_OFFLINE",
            "http_proxy",
            "HTTP_PROXY",
            "all_proxy",
            "ALL_PROXY",
        ]:
            monkeypatch.delenv(name, raising=False)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
