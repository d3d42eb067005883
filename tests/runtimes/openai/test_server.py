import pytest

from arte_edge.errors import InputError
from arte_edge.runtimes.openai.client import RateLimiter, RetryPolicy, Server, UsageMeter, check_base_url


def server(url):
    return Server(url, timeout_s=1.0, retry=RetryPolicy(), limiter=RateLimiter(), meter=UsageMeter())


def test_an_address_without_a_path_gets_the_usual_one():
    assert str(check_base_url("http://127.0.0.1:8000")) == "http://127.0.0.1:8000/v1"
    assert str(check_base_url("https://host/api/v1/")) == "https://host/api/v1"


@pytest.mark.parametrize("url", ["ftp://host/v1", "host:8000", "http://", "", "http://[::1", "a b"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InputError):
        check_base_url(url)


@pytest.mark.parametrize(
    "url", ["https://user:s3cret@host/v1", "https://host/v1?key=s3cret", "https://host/#s3cret"]
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="ARTE_EDGE_API_KEY") as caught:
        check_base_url(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://anywhere.example/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://anywhere.example/v1", False),
        ("http://10.0.0.7:8000/v1", False),
    ],
)
def test_the_openai_key_never_goes_over_plain_http_to_another_machine(monkeypatch, url, sent):
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert ("authorization" in server(url)._client.headers) is sent
    monkeypatch.setenv("ARTE_EDGE_API_KEY", "meant for it")
    assert server(url)._client.headers["authorization"] == "Bearer meant for it"


def test_no_key_no_header():
    assert "authorization" not in server("https://anywhere.example/v1")._client.headers
