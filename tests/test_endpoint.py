"The client against a real server that is good, slow, busy, broken or hostile: a sentence, never a traceback, and the key nowhere."
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune_nb.core import UserError
from finetune_nb.endpoint import Endpoint, Reply

KEY = "sk-verysecret123"
GOOD = json.dumps({"choices": [{"message": {"role": "assistant", "content": "yes\n"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 7, "completion_tokens": 1}})
ASK = [{"role": "user", "content": "Is it? \ud800 é"}]  # a lone surrogate, as broken data holds them


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        step = self.server.steps.pop(0) if len(self.server.steps) > 1 else self.server.steps[0]
        step(self)
    def log_message(self, *_): pass


def answer(status=200, body=GOOD, **headers):
    def step(h):
        data = body.encode() if isinstance(body, str) else body
        h.send_response(status)
        for k, v in {"content-length": str(len(data)), **headers}.items(): h.send_header(k.replace("_", "-"), v)
        h.end_headers()
        h.wfile.write(data)
    return step


def drop(h): h.connection.shutdown(socket.SHUT_RDWR)


def half(h):
    h.send_response(200)
    h.send_header("content-length", "1000")
    h.end_headers()
    h.wfile.write(b'{"choices"')
    h.wfile.flush()
    h.connection.shutdown(socket.SHUT_RDWR)


def sleeps(h): time.sleep(0.5)


def drips(h):
    h.send_response(200)
    h.send_header("content-length", "1000")
    h.end_headers()
    try:
        for _ in range(40):
            h.wfile.write(b" ")
            h.wfile.flush()
            time.sleep(0.05)
    except OSError: pass


@pytest.fixture
def serve(monkeypatch):
    "Start a server that takes the given steps one after the other, and repeats the last"
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)
    servers = []
    def start(*steps, **settings):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.steps, server.seen, server.daemon_threads = list(steps), [], True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server, Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "tiny", **{"key_env": "TEST_MODEL_KEY", "timeout": 5, "pause": 0.001} | settings)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_good(serve):
    server, e = serve(answer())
    reply = e.ask(ASK, max_tokens=9)
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("yes", 7, 1) and 0 < reply.seconds < 5
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    assert body == {"model": "tiny", "messages": ASK, "max_tokens": 9, "temperature": 0.0}


def test_without_key_none_is_sent(serve):
    server, e = serve(answer(), key_env="")
    e.ask(ASK)
    assert not {k for k in server.seen[0][1] if k.lower() == "authorization"}


@pytest.mark.parametrize("url", ["{}/v1/", "{}/v1/chat/completions", "{}/v1/chat/completions/"])
def test_address_in_other_forms(serve, url):
    server, e = serve(answer())
    e.url = url.format(e.url.removesuffix("/v1"))
    assert e.ask(ASK).text == "yes" and server.seen[0][0] == "/v1/chat/completions"


@pytest.mark.parametrize("first", [answer(429, "busy", retry_after="0"), answer(500, "oh"), answer(503, ""), answer(408, ""), answer(529, ""), drop, half], ids="429 500 503 408 529 drop half".split())
def test_what_may_pass_is_tried_again(serve, first):
    server, e = serve(first, first, answer(), retries=2)
    assert e.ask(ASK).text == "yes" and len(server.seen) == 3


@pytest.mark.parametrize("step, says", [(answer(500, "out of memory"), "answered 500: out of memory, in each of 3 attempts"), (answer(429, ""), "answered 429: nothing"), (drop, "could not be reached"), (half, "could not be reached")])
def test_what_does_not_pass_is_told(serve, step, says):
    server, e = serve(step, retries=2)
    with pytest.raises(UserError, match=says): e.ask(ASK)
    assert len(server.seen) == 3


@pytest.mark.parametrize("step", [sleeps, drips])
def test_slow(serve, step):
    "The timeout holds for a whole attempt, also where bytes keep coming"
    _, e = serve(step, timeout=0.15, retries=1)
    start = time.monotonic()
    with pytest.raises(UserError, match="did not answer within 0.15 s, in each of 2 attempts"): e.ask(ASK)
    assert time.monotonic() - start < 3


def test_a_slow_attempt_does_not_spoil_the_next(serve):
    _, e = serve(sleeps, answer(), timeout=0.2, retries=1)
    assert e.ask(ASK).seconds < 0.2


@pytest.mark.parametrize("status, says", [(400, "Check model"), (401, "Check the key in TEST_MODEL_KEY"), (403, "Check the key"), (404, "Check url"), (422, "Check model"), (301, "the address it leads to"), (204, "answered 204")])
def test_what_will_not_pass_is_told_at_once(serve, status, says):
    server, e = serve(answer(status, "" if status == 204 else "no", location="http://example.org/"))
    with pytest.raises(UserError, match=says): e.ask(ASK)
    assert len(server.seen) == 1


@pytest.mark.parametrize("body, says", [("<html>", "not JSON"), ("", "not JSON"), ("[]", "choices"), ('{"choices": []}', "choices"), ('{"choices": [{"message": null}]}', "choices"), ('{"choices": {"a": 1}}', "choices"),
                                        ('{"choices": [{"message": {"content": 3}}]}', "not text"), ("[" * 100_000, "not JSON"), (b"\xff\xfe\x00", "not JSON"), ("null", "choices")])
def test_malformed(serve, body, says):
    _, e = serve(answer(200, body))
    with pytest.raises(UserError, match=says): e.ask(ASK)


@pytest.mark.parametrize("content, usage, reply", [(None, None, Reply("", None, None, 0)), ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, 3], {"prompt_tokens": 1.5, "completion_tokens": True}, Reply("ab", None, None, 0)), ("x", [], Reply("x", None, None, 0))])
def test_replies_of_other_forms(serve, content, usage, reply):
    _, e = serve(answer(200, json.dumps({"choices": [{"message": {"content": content}}], "usage": usage})))
    found = e.ask(ASK)
    assert (found.text, found.prompt_tokens, found.completion_tokens) == (reply.text, reply.prompt_tokens, reply.completion_tokens)


def test_too_large(serve):
    _, e = serve(answer(200, b" " * (2**24 + 2**20)))
    with pytest.raises(UserError, match="16 MiB"): e.ask(ASK)


def test_the_key_is_nowhere(serve):
    "Not in errors although the server repeats it, not in the object's text, not on the way to another host"
    other, _ = serve(answer())
    for status in (400, 401, 500, 200):
        _, e = serve(answer(status, f"your key {KEY} is bad"), retries=1)
        with pytest.raises(UserError) as error: e.ask(ASK)
        assert KEY not in str(error.value) + repr(error.value.problems) + repr(e) and "***" in str(error.value)
    _, e = serve(answer(400, "x" * 290 + KEY))
    with pytest.raises(UserError) as error: e.ask(ASK)
    assert KEY[:5] not in str(error.value), "a key that is cut in two is still half a key"
    _, e = serve(answer(302, "", location=f"http://127.0.0.1:{other.server_port}/v1/chat/completions"))
    with pytest.raises(UserError, match="302"): e.ask(ASK)
    assert not other.seen


def test_a_proxy_is_not_asked_about_this_machine(serve, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    _, e = serve(answer())
    assert e.ask(ASK).text == "yes"


@pytest.mark.parametrize("settings, says", [
    (dict(url="localhost:8000"), "not an address"), (dict(url="ftp://x/v1"), "not an address"), (dict(url="http://[::1"), "not an address"), (dict(url="http://x:port/v1"), "not an address"), (dict(url=""), "not an address"),
    (dict(url="https://me:pw@example.org/v1"), "a password"), (dict(url="https://example.org/v1?key=pw"), "a query"), (dict(model=" "), "is empty"), (dict(timeout=0), "more than 0"), (dict(retries=-1), "0 or more"),
    (dict(key_env=KEY), "not the name"), (dict(key_env="ABSENT_KEY_OF_A_TEST"), "is empty"), (dict(key_env="BLANK_KEY"), "holds blanks"), (dict(url="http://example.org/v1", key_env="TEST_MODEL_KEY"), "without encryption"), (dict(url="http://8.8.8.8/v1", key_env="TEST_MODEL_KEY"), "without encryption"),
])
def test_settings(monkeypatch, settings, says):
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)
    monkeypatch.setenv("BLANK_KEY", "two words")
    e = Endpoint(**dict(url="https://example.org/v1", model="m") | settings)
    problems = e.problems()
    assert KEY not in repr(e), "not even when it was pasted where its name belongs"
    assert len(problems) == 1 and says in str(problems[0])
    assert not {KEY, "pw", "two words"} & set(str(problems[0]).replace("@", " ").split())
    with pytest.raises(UserError, match=says): e.ask(ASK)


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://127.0.0.1/v1", "http://192.168.1.5:8000/v1", "http://vllm:8000/v1", "https://example.org/v1"])
def test_usual_addresses(monkeypatch, url):
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)
    assert Endpoint(url, "m", key_env="TEST_MODEL_KEY").problems() == []
