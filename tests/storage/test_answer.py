"""Servers that never end, and servers that repeat the token: each wait ends, and no message holds a credential."""

from __future__ import annotations

import base64
import time
from http.client import HTTPResponse
from urllib.parse import quote

import pytest
import servers

from embedkit._io.text import plain_line, quoted, redacted
from embedkit.errors import EmbedkitError, EntryError, UnreachableError, ZooError
from embedkit.hub.access import Access
from embedkit.hub.publish.publish import publish
from embedkit.hub.resolve import find_entry
from embedkit.storage.answer import SLOWEST
from embedkit.storage.http import POST_LIMIT, WebStorage

TOKEN = "glpat-SECRETSECRET123"


@pytest.fixture
def endless(request):
    server = servers.EndlessServer(request.param)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("EMBEDKIT_TIMEOUT", "0.5")


@pytest.mark.parametrize(
    "endless",
    ["head", "chunk-line", "chunk-ext", "trailer", "trailer-fast", "slow-body"],
    indirect=True,
)
def test_an_answer_that_never_ends_is_left(endless):
    """Each byte begins a socket's timeout again, so that all but the first and the last once waited without end."""
    since = time.monotonic()
    with pytest.raises(UnreachableError, match="timed out|slower than"):
        WebStorage(endless.url).read("index.json", 200_000)
    assert time.monotonic() - since < 20  # far above the half second, far below for ever
    assert endless.connections == 1


@pytest.mark.parametrize("endless", ["chunk-line", "trailer-fast"], indirect=True)
def test_a_stream_that_never_ends_is_left(endless):
    begin, chunks = WebStorage(endless.url).stream("model.onnx", 0, 10**9)
    with pytest.raises(UnreachableError, match="timed out"):
        for _ in chunks:
            pass
    assert begin == 0


@pytest.mark.parametrize("endless", ["body"], indirect=True)
def test_an_answer_to_a_post_is_bounded(endless):
    with pytest.raises(ZooError, match=f"expected at most {POST_LIMIT} bytes, found more"):
        WebStorage(endless.url).post_json("api/validate-yaml", {})
    with pytest.raises(ZooError, match="expected at most 1000 bytes, found more"):
        WebStorage(endless.url).get_json("api/models/team/x", 1000)


@pytest.mark.parametrize("endless", ["body", "trailer-fast"], indirect=True)
def test_a_hub_that_never_ends(endless, zoo, monkeypatch):
    """The client of the Hub reads an answer whole, whatever its length: what is read does not go through it."""
    monkeypatch.setenv("HF_ENDPOINT", endless.url)
    monkeypatch.setattr("embedkit.hub.download.TRIES", 1)
    for act in (
        lambda: find_entry("hf://team/linear-tiny.noise"),
        lambda: publish(find_entry(zoo / "linear-tiny.noise"), "hf://team", token=TOKEN),
    ):
        with pytest.raises((ZooError, UnreachableError)):
            act()


def test_a_reader_that_is_slow_is_not_a_slow_server(site, monkeypatch):
    (site.root / "big").write_bytes(bytes(300_000))
    _, chunks = WebStorage(site.url).stream("big", 0, 300_000)
    got = 0
    for chunk in chunks:
        got += len(chunk)
        if got == len(chunk):
            time.sleep(0.7)  # longer than the timeout, and no wait for the server
    assert got == 300_000 > SLOWEST


@pytest.mark.parametrize("endless", ["head"], indirect=True)
def test_a_proxy_that_never_ends_its_greeting_is_left(endless, monkeypatch):
    monkeypatch.setenv("https_proxy", endless.url)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(UnreachableError, match="no answer"):
        WebStorage("https://zoo.example").read("index.json", 1000)
    assert endless.connections == 1


def test_pythons_client_still_reads_by_these_names():
    """`_Response` puts its own reader in the place of `fp`."""
    assert "fp" in HTTPResponse.__init__.__code__.co_names and hasattr(HTTPResponse, "read1")


# --- tokens and what strangers say ------------------------------------------------------------------------


class Echo(servers.Handler):
    """Gives the credential back in each place where an answer has room for one."""

    def do_GET(self):
        self.body()
        said = self.headers.get("Authorization", "")
        token = said.removeprefix("Bearer ")
        answer = {
            "json": lambda: self.answer_json(
                {"error": f"bad {said}"}, 400, X_Error_Message=f"invalid {said}"
            ),
            "yaml": lambda: self.answer_json({"errors": [{"message": f"bad {token}\x1b[31m"}]}, 400),
            "scheme": lambda: self.answer(302, Location=f"{token}://x/"),
            "ftp": lambda: self.answer(302, Location=f"ftp://x/{token}"),
            "path": lambda: self.answer(302, Location=f"/{token}/?q"),
            "host": lambda: self.answer(302, Location=f"http://{token}.example/"),
            "range": lambda: self.answer(206, b"{}", Content_Range=said),
            "quoted": lambda: self.answer(302, Location=f"http://x/{quote(token, safe='')}"),
        }[self.server.mode]
        answer()

    do_POST = do_HEAD = do_GET


@pytest.mark.parametrize("mode", ["json", "yaml", "scheme", "ftp", "path", "host", "range", "quoted"])
def test_a_token_that_a_server_repeats_is_never_printed(mode, zoo, monkeypatch):
    server = servers.Server(Echo)
    server.mode = mode
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    storage = WebStorage(server.url, TOKEN)
    acts = (
        lambda: find_entry("hf://team/linear-tiny.noise", access=Access(token=TOKEN)),
        lambda: publish(find_entry(zoo / "linear-tiny.noise"), "hf://team", token=TOKEN),
        lambda: find_entry(f"{server.url}/linear-tiny.noise", access=Access(token=TOKEN)),
        lambda: storage.stream("model.onnx", 5, 10),
    )
    for act in acts:
        with pytest.raises((EmbedkitError, FileNotFoundError)) as caught:
            act()
        said = f"{caught.value} {caught.value!r}"
        assert TOKEN.lower() not in said.lower() and "\x1b" not in said
    server.close()


def test_secrets_are_found_in_every_form():
    secret = "a/b+c=Secret"
    for form in (secret, secret.upper(), quote(secret, safe=""), base64.b64encode(secret.encode()).decode()):
        assert "ecret" not in redacted(f"before {form} after", secret) and form not in redacted(form, secret)
    assert redacted("?X-Amz-Signature=abc&part=1") == "?...&part=1" and redacted("hf_abcDEF1") == "..."
    assert redacted("Authorization: Bearer abc.def") == "Authorization: ..."
    assert redacted("nothing to hide", None, "") == "nothing to hide"
    assert quoted("x" * 195 + secret, secret).endswith("x...")  # taken out before the cut leaves a part of it


def test_a_message_is_one_line_of_plain_text():
    assert plain_line("a\x1b]0;title\x07b\r\nc\u202ed\x9b31m\ud800") == "a ]0;title b c d 31m"
    assert plain_line("naïve 日本 नमस्ते") == "naïve 日本 नमस्ते"


def test_an_entry_error_of_a_hub_is_plain(zoo, monkeypatch):
    server = servers.Server(Echo)
    server.mode = "yaml"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(EntryError, match=r"refuses its YAML: bad \.\.\. \[31m"):
        publish(find_entry(zoo / "linear-tiny.noise"), "hf://team", token=TOKEN)
    server.close()


class Api(servers.Handler):
    """A hub's API that answers with one status and one code."""

    def do_GET(self):
        status, code = self.server.mode
        self.answer(status, b"{}", **({"X_Error_Code": code} if code else {}))


@pytest.mark.parametrize(
    ("status", "code", "found"),
    [
        (404, "RepoNotFound", None),
        (404, "RevisionNotFound", None),
        (401, "RepoNotFound", None),
        (401, "", None),
        (403, "GatedRepo", "is gated: accept its conditions"),
        (401, "GatedRepo", "is gated: accept its conditions"),
        (403, "", r"access is refused \(403\)"),
        (200, "", "gives no usable commit"),
        (500, "", "overloaded or broken"),
        (418, "", "an unexpected answer"),
    ],
)
def test_what_a_hub_says_of_a_commit(status, code, found, monkeypatch):
    from embedkit.hub.hf import HubZoo

    server = servers.Server(Api)
    server.mode = status, code
    zoo = HubZoo("team", TOKEN, server.url)
    if found is None:
        assert zoo.commit("linear-x.noise", "main") is None
    else:
        with pytest.raises(ZooError, match=found):
            zoo.commit("linear-x.noise", "main")
    server.close()


def test_a_license_with_an_escape_is_plain_in_the_refusal():
    from embedkit.hub.cache import Arrival, open_only

    with pytest.raises(EmbedkitError) as caught:
        open_only(Arrival(name="a-x.d", zoo="p", license="CC-BY-NC\x1b]0;x\x07", bytes=1))
    assert str(caught.value).isprintable()
