"""The server of chat.py --serve: requests over HTTP, the text of streams, votes.

    pytest test_serve.py -k stop       # one part
"""
import contextlib
import http.client
import json
import socket
import threading
import time

from testing import free_port, model_of, plain_logprobs, write_rows  # before torch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
import data
import models
import serve
from hybrid_engine import HybridEngine, OnlineEngine
from utils import UserError

TEMPLATE = data.DEFAULT_TEMPLATE
TOK = models.tiny_tokenizer()
LM = model_of("llama", vocab_size=len(TOK), eos_token_id=TOK.eos_token_id)
OTHER = model_of("opt", seed=1, vocab_size=len(TOK), eos_token_id=TOK.eos_token_id)


@contextlib.contextmanager
def serving(tmp_path=None, max_batch=64, max_waiting=200, **flags):
    """A Server with the model "lm", and with --compare also "other"."""
    cfg = chat.Config(model="lm", serve=free_port(), **flags)
    server = serve.Server(cfg)
    loaded = {"lm": (LM, TOK, TEMPLATE)}
    if cfg.compare:
        loaded["other"] = (OTHER, TOK, TEMPLATE)
    server.start(loaded, max_batch, max_waiting)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def small():
    """One slot, and room for one answer that waits."""
    with serving(max_batch=1, max_waiting=1) as server:
        yield server


def connect(server, timeout=60):
    return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=timeout)


def request(server, method, path, body=None, headers=None):
    """(status, parsed reply) of a request; body: an object, or bytes as they are."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection = connect(server)
    connection.request(method, path, body, headers or {})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, json.loads(content)


def post(server, body, path="/v1/completions"):
    status, reply = request(server, "POST", path, body)
    assert status == 200, reply
    return reply


def events(server, body, path="/v1/completions"):
    """The objects of a stream."""
    connection = connect(server)
    connection.request("POST", path, json.dumps({**body, "stream": True}))
    reply = connection.getresponse()
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    blocks = reply.read().decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


ENGINE = HybridEngine(LM)


def generated(prompts, max_new_tokens, seed, temperature=1.0, top_p=1.0):
    """What HybridEngine gives to these prompts: of each, the ids of the answer without its EOS."""
    ids = [TOK(prompt)["input_ids"] for prompt in prompts]
    out = ENGINE.generate(
        ids, max_new_tokens, temperature, top_p=top_p, eos_token_id=TOK.eos_token_id, seed=seed)
    answers = []
    for row, start, n in zip(out.tokens, out.prompt_lens, out.answer_lens):
        answer = row[start : start + n].tolist()
        answers.append([token for token in answer if token != TOK.eos_token_id])
    return answers


def decode(ids):
    return TOK.decode(ids, skip_special_tokens=True)


def wait_until(condition, seconds=20):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "this does not come true"
        time.sleep(0.005)


# Greedy answers of this model run in a circle, and never come to an EOS.
LONG = {"prompt": "long", "temperature": 0, "max_tokens": 400}


class Gate:
    """Keeps a server's engine from stepping until it is opened."""

    def __init__(self, server, monkeypatch):
        self.event = threading.Event()
        engine = server.served["lm"].engine
        real = engine.step

        def step():
            self.event.wait()
            return real()

        monkeypatch.setattr(engine, "step", step)

    def open(self):
        self.event.set()


def in_threads(calls):
    """The results of functions that are called at once."""
    results = [None] * len(calls)

    def work(i, function):
        results[i] = function()

    threads = [threading.Thread(target=work, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# -----------------------------------------------------------------------------
# answers


SAMPLINGS = [
    {}, {"temperature": 0}, {"temperature": 0.7}, {"top_p": 0.5},
    {"temperature": 1.5, "top_p": 0.9},
]


def test_200_requests_at_once_get_what_generate_gives_to_each_alone(server):
    bodies = []
    for i in range(200):
        bodies.append({
            "prompt": f"{i % 7} is a prompt", "seed": i, "max_tokens": 1 + i % 13,
            **SAMPLINGS[i % len(SAMPLINGS)],
        })
    replies = in_threads([lambda body=body: post(server, body) for body in bodies])
    assert all(len(reply["choices"]) == 1 for reply in replies)
    for body, reply in list(zip(bodies, replies))[::4]:
        sampling = {name: body[name] for name in ("temperature", "top_p") if name in body}
        [want] = generated([body["prompt"]], body["max_tokens"], body["seed"], **sampling)
        [choice] = reply["choices"]
        assert choice["text"] == decode(want), body
        is_long = len(want) == body["max_tokens"]
        assert choice["finish_reason"] == ("length" if is_long else "stop")
        assert reply["usage"] == {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": len(want) + (not is_long),  # an EOS is a token
            "total_tokens": len(body["prompt"]) + len(want) + (not is_long),
        }


def text_part(text):
    return {"type": "text", "text": text}


def test_a_conversation_is_written_as_the_model_was_trained(server):
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [text_part("co"), text_part("py")]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
    ]
    reply = post(server, {"messages": messages, "seed": 4, "max_completion_tokens": 9},
                 "/v1/chat/completions")
    prompt = "be short\nHuman: copy\nAssistant: yes\nHuman: more\nAssistant:"
    assert reply["usage"]["prompt_tokens"] == len(prompt)
    [want] = generated([prompt], 9, 4)
    message = reply["choices"][0]["message"]
    assert message == {"role": "assistant", "content": decode(want).removeprefix(" ")}
    assert reply["object"] == "chat.completion" and reply["model"] == "lm"


def test_n_answers_to_several_prompts_are_those_of_one_call_of_generate(server):
    body = {"prompt": ["one", "two"], "n": 3, "seed": 2**40 + 1, "max_tokens": 8}
    reply = post(server, body)
    want = generated(["one"] * 3 + ["two"] * 3, 8, 2**40 + 1)
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    assert [choice["text"] for choice in reply["choices"]] == list(map(decode, want))
    assert len({choice["text"] for choice in reply["choices"]}) == 6
    assert post(server, body)["choices"] == reply["choices"]
    ids = [TOK(prompt)["input_ids"] for prompt in body["prompt"]]
    assert post(server, body | {"prompt": ids})["choices"] == reply["choices"]
    other = post(server, body | {"seed": None})["choices"]
    assert other != reply["choices"], "without a seed, another one every time"


def test_flags_say_what_a_request_leaves_open():
    with serving(max_new_tokens=5, temperature=0.0) as server:
        reply = post(server, {"prompt": "abc"})
        [want] = generated(["abc"], 5, 0, temperature=0)
        assert reply["choices"][0]["text"] == decode(want)
        prompt = "a" * 509
        assert post(server, {"prompt": prompt})["usage"]["completion_tokens"] <= 3, "what fits"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_forward_of_the_model(temperature, server):
    prompt = "Human: x\nAssistant:"
    body = {"seed": 3, "max_tokens": 20, "temperature": temperature}
    [ids] = generated([prompt], 20, 3, temperature)
    prompt_ids = TOK(prompt)["input_ids"]
    want = plain_logprobs(LM, prompt_ids + ids, len(prompt_ids), temperature).tolist()

    reply = post(server, body | {"prompt": prompt, "logprobs": 0})
    found = reply["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(want, abs=1e-4)
    assert found["tokens"] == [decode([token]) for token in ids]
    offsets = []
    for n in range(len(ids)):
        text = decode(ids[:n])
        while text.endswith("\ufffd"):  # not whole yet: the next token begins where this one does
            n -= 1
            text = decode(ids[:n])
        offsets.append(len(text))
    assert found["text_offset"] == offsets

    body |= {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
    content = post(server, body, "/v1/chat/completions")["choices"][0]["logprobs"]["content"]
    assert [item["logprob"] for item in content] == pytest.approx(want, abs=1e-4)
    for item, token in zip(content, ids):
        text = decode([token])
        assert item["token"] == text
        assert item["bytes"] == (None if text == "\ufffd" else list(text.encode()))

    streamed = []
    for chunk in events(server, body, "/v1/chat/completions"):
        streamed += chunk["choices"][0]["logprobs"]["content"]
    assert streamed == content


# -----------------------------------------------------------------------------
# streams and stop strings


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_joined_is_the_answer(seed, server):
    chat_body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "seed": seed}
    path = "/v1/chat/completions"
    whole = post(server, chat_body, path)
    chunks = events(server, chat_body | {"stream_options": {"include_usage": True}}, path)
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    text = whole["choices"][0]["message"]["content"]
    assert "".join(delta["content"] for delta in deltas) == text
    assert len(deltas) > 10, "it comes in pieces"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert set(reasons[:-1]) == {None}
    assert reasons[-1] == whole["choices"][0]["finish_reason"]


def test_the_answers_of_a_stream_are_told_apart_by_their_index(server):
    body = {"prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 12}
    texts = [""] * 4
    for chunk in events(server, body):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in post(server, body)["choices"]]


def pieces_of(ids, stops=(), skip=""):
    """(the pieces that a Text gives, tokens that it gives, tokens that it needed, its reason)"""
    text = serve.Text(decode, stops, skip)
    pieces = []
    tokens = []
    needed = 0
    for token in ids:
        text.add(token, -float(token))
        needed += 1
        if text.finish_reason:
            break
        piece, new = text.take()
        pieces.append(piece)
        tokens += new
    text.finish("length")
    piece, new = text.take()
    return [*pieces, piece], tokens + new, needed, text.finish_reason


# A byte's token has the name of its character in Latin-1, or if that is not seen, from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]


def token_of(byte):
    name = chr(byte) if byte in PRINTABLE else chr(256 + OTHERS.index(byte))
    return TOK.convert_tokens_to_ids(name)


CHARACTERS = "ab \n\u00e9\u4e2d\U0001f600"


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(CHARACTERS, max_size=12).map(lambda text: list(text.encode())),
        st.lists(st.integers(0, 255), max_size=12),  # also what is no UTF-8
    ),
    st.lists(st.text(CHARACTERS, min_size=1, max_size=3), max_size=3),
)
def test_the_pieces_of_a_text_are_its_text_up_to_the_first_stop_string(raw, stops):
    ids = [token_of(byte) for byte in raw]
    assert decode(ids) == bytes(raw).decode(errors="replace")
    pieces, tokens, needed, reason = pieces_of(ids, stops)
    for piece in pieces:
        piece.encode()
    joined = "".join(pieces)

    # Naively: token by token, the whole text until one of them is in it.
    want = bytes(raw).decode(errors="replace")
    want_reason = "length"
    want_needed = len(ids)
    for n in range(1, len(ids) + 1):
        text = bytes(raw[:n]).decode(errors="replace")
        ends_inside = n < len(ids) and text.endswith("\ufffd")
        found = [text.find(stop) for stop in stops if stop in text]
        if found and not ends_inside:
            want = text[: min(found)]
            want_reason = "stop"
            want_needed = n
            break
    assert (joined, reason, needed) == (want, want_reason, want_needed)
    if reason == "length":
        assert [token for token, _, _ in tokens] == ids
    else:
        assert all(start < len(joined) for _, _, start in tokens)
    assert [token for token, _, _ in tokens] == ids[: len(tokens)]
    if b"\xff" not in bytes(raw) and "\ufffd" not in want:
        assert "\ufffd" not in joined, "no character is cut"


@pytest.mark.parametrize("stop", ["cd", ["zz", "bcd"], ["d", "abc"]])
def test_an_answer_ends_before_a_stop_string_in_several_tokens(stop, server, monkeypatch):
    answer = "xxabcde" + "f" * 100
    ids = [*TOK(answer)["input_ids"], TOK.eos_token_id]
    seen = []
    speak(server, monkeypatch, ids, seen)
    stops = [stop] if isinstance(stop, str) else stop
    want = answer[: min(answer.find(s) for s in stops if s in answer)]
    body = {**LONG, "stop": stop, "max_tokens": 100, "logprobs": 0}
    reply = post(server, body)
    [choice] = reply["choices"]
    assert choice["text"] == want and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == list(want)
    needed = min(answer.find(s) + len(s) for s in stops if s in answer)
    assert reply["usage"]["completion_tokens"] == needed
    chunks = events(server, body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == want
    wait_until(lambda: not server.served["lm"].rows)
    assert len(seen) < 150, "the rest of the two answers is not computed"


def speak(server, monkeypatch, ids, seen):
    """Lets the engine say these tokens in every answer, one in a step; they are added to `seen`."""
    engine = server.served["lm"].engine
    real = engine.read
    spoken = {}

    def read():
        news = []
        for row, tokens, logprobs, ended in real():
            said = spoken.setdefault(row, 0)
            new = ids[said : said + len(tokens)]
            spoken[row] = said + len(new)
            seen.extend(new)
            news.append((row, new, logprobs[: len(new)], ended))
            if ended:
                del spoken[row]
        return news

    def remove(row):
        spoken.pop(row, None)
        real_remove(row)

    real_remove = engine.remove
    monkeypatch.setattr(engine, "read", read)
    monkeypatch.setattr(engine, "remove", remove)


# -----------------------------------------------------------------------------
# many clients


def test_a_short_request_ends_before_a_long_one_that_came_first(server):
    order = []

    def long():
        assert post(server, LONG)["usage"]["completion_tokens"] == 400
        order.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    wait_until(lambda: server.served["lm"].engine.running)
    post(server, {"prompt": "short", "max_tokens": 3})
    order.append("short")
    thread.join()
    assert order == ["short", "long"]


def test_a_prompt_takes_the_first_slot_that_is_free():
    engine = OnlineEngine(LM, 16, 64, TOK.eos_token_id, max_waiting=4)
    for i in range(15):
        engine.add([65 + i], i, 60, temperature=0)
    engine.step()
    assert len(engine.running) == 15
    later = [engine.add([97 + i], i, 1) for i in range(3)]
    ended = []
    for _ in range(3):
        ended += [row for row, _, _, has_ended in engine.step() if has_ended]
    assert ended == later
    assert len(engine.running) == 15


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(stream, small):
    model = small.served["lm"]
    connection = connect(small)
    connection.request("POST", "/v1/completions", json.dumps({**LONG, "stream": stream}))
    wait_until(lambda: model.engine.running)
    connection.close()
    wait_until(lambda: not model.rows)
    length = int(model.engine.cache.lengths[0])
    assert length < 4 + 400, "it was not computed to its end"
    assert post(small, {"prompt": "x", "max_tokens": 2})["choices"][0]["text"] is not None
    assert sorted(model.engine.free_rows) == [0, 1]


def test_a_full_queue_answers_429_and_loses_no_one(small, monkeypatch):
    gate = Gate(small, monkeypatch)
    model = small.served["lm"]
    results = []

    def ask():
        results.append(request(small, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 2}))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(model.rows) + len(model.inbox) == 2)
    status, reply = request(small, "POST", "/v1/completions", {"prompt": "x"})
    assert status == 429
    assert reply["error"]["type"] == "rate_limit_error"
    assert reply["error"]["message"] == "2 answers are computed or wait already; try again later"
    gate.open()
    for thread in threads:
        thread.join()
    assert [status for status, _ in results] == [200, 200]
    assert post(small, {"prompt": "x", "max_tokens": 1, "n": 2})["choices"], "there is room again"


def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(small, monkeypatch):
    gate = Gate(small, monkeypatch)
    model = small.served["lm"]
    for n in range(2):
        connection = connect(small)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
        wait_until(lambda n=n: len(model.rows) + len(model.inbox) == n + 1)
        connection.close()
    answers = [*model.rows.values(), *model.inbox]
    wait_until(lambda: all(answer.unwanted for answer in answers))
    gate.open()
    wait_until(lambda: not model.rows and not model.inbox)


def test_an_engine_that_fails_is_told_to_all_and_ends_the_server(monkeypatch):
    with serving() as server:
        model = server.served["lm"]

        def step():
            if len(model.rows) == 4:  # both requests are here
                raise RuntimeError("no memory")
            time.sleep(0.005)
            return []

        monkeypatch.setattr(model.engine, "step", step)
        bodies = [{"prompt": "x"}, {"prompt": "x", "n": 3}]
        calls = [lambda b=b: request(server, "POST", "/v1/completions", b) for b in bodies]
        for status, reply in in_threads(calls):
            assert status == 500
            assert reply["error"]["type"] == "server_error"
            assert reply["error"]["message"].startswith("the engine has failed")
        server.scheduler.join()
        assert str(server.scheduler.error) == "no memory"


# -----------------------------------------------------------------------------
# mistakes

CHAT_PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]

MISTAKES = [  # path, body, status, a part of the message
    ("/v1/completions", {"prompt": "x", "model": "gpt"}, 404,
     "there is no model 'gpt'; there is lm"),
    ("/v1/completions", b"{prompt", 400, "the body is not JSON (Expecting property name"),
    ("/v1/completions", b"\xff\xfe{", 400, "the body is not JSON"),
    ("/v1/completions", b"[" * 100_000, 400, "the body is not JSON"),
    ("/v1/completions", b"[]", 400, "the body must be a JSON object"),
    ("/v1/completions", b"", 400, "the body is not JSON"),
    ("/v1/completions", {}, 400, "prompt must be a text, a list of token ids, or a list of either"),
    ("/v1/completions", {"prompt": 3}, 400, "prompt must be a text"),
    ("/v1/completions", {"prompt": []}, 400, "prompt must be a text"),
    ("/v1/completions", {"prompt": [[]]}, 400, "prompt must be a text"),
    ("/v1/completions", {"prompt": [1, "x"]}, 400, "prompt must be a text"),
    ("/v1/completions", {"prompt": [True]}, 400, "prompt must be a text"),
    ("/v1/completions", {"prompt": [1, 258]}, 400,
     "prompt: a token id is outside the vocabulary of 258"),
    ("/v1/completions", {"prompt": "a\ud800"}, 400, "prompt holds one half of a surrogate pair"),
    ("/v1/completions", {"prompt": "x" * 510, "max_tokens": 3}, 400,
     "a prompt of 510 tokens and an answer of 3 exceed the context of 512 tokens; shorten one of"),
    ("/v1/completions", {"prompt": "x" * 512}, 400,
     "a prompt of 512 tokens and an answer of 1 exceed"),
    ("/v1/completions", {"prompt": "x" * 10**6}, 400,
     "a prompt of 1000000 characters exceeds the context of 512 tokens"),
    ("/v1/completions", {"prompt": "x", "n": 0}, 400, "n must be an integer from 1 to 128"),
    ("/v1/completions", {"prompt": ["x"] * 100, "n": 3}, 400,
     "a request may have at most 264 answers"),
    ("/v1/completions", {"prompt": ["x"] * 265}, 400, "a request may have at most 264 answers"),
    ("/v1/completions", {"prompt": "x", "max_tokens": "9"}, 400,
     "max_tokens must be an integer, at least 1"),
    ("/v1/completions", {"prompt": "x", "max_tokens": True}, 400, "max_tokens must be an integer"),
    ("/v1/completions", {"prompt": "x", "temperature": -1}, 400,
     "temperature must be 0, or a number from 0.001 to 2"),
    ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400, "temperature must be 0, or"),
    ("/v1/completions", {"prompt": "x", "top_p": 0}, 400,
     "top_p must be a number above 0 and at most 1"),
    ("/v1/completions", {"prompt": "x", "seed": 1.5}, 400, "seed must be an integer of 64 bits"),
    ("/v1/completions", {"prompt": "x", "stop": [""]}, 400,
     "stop must be a text, or a list of at most 4, none of them empty"),
    ("/v1/completions", {"prompt": "x", "stop": ["a"] * 5}, 400, "stop must be a text, or a list"),
    ("/v1/completions", {"prompt": "x", "stream": 1}, 400, "stream must be true or false"),
    ("/v1/completions", {"prompt": "x", "logprobs": 3}, 400, "logprobs must be 0: only the tokens"),
    ("/v1/completions", {"prompt": "x", "echo": True}, 400, "echo is not supported"),
    ("/v1/completions", {"prompt": "x", "temprature": 1}, 400, "unknown field 'temprature'"),
    (CHAT_PATH, {}, 400, "messages must be a list of messages"),
    (CHAT_PATH, {"messages": "x"}, 400, "messages must be a list of messages"),
    (CHAT_PATH, {"messages": []}, 400, "messages is [], which is not a list of messages"),
    (CHAT_PATH, {"messages": ["x"]}, 400, "messages holds 'x', which is not a message"),
    (CHAT_PATH, {"messages": [{"role": "user"}]}, 400, "there is no 'content' in a message of"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": 3}]}, 400,
     "the content of a message of messages is 3, which is not text"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400,
     "text is None, which is not text"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "a part of a content that is not text is not supported"),
    (CHAT_PATH, {"messages": [{"role": "tool", "content": "x"}]}, 400,
     "a role must be system, user or assistant"),
    (CHAT_PATH, {"messages": USER, "tools": [{}]}, 400, "tools is not supported"),
    (CHAT_PATH, {"messages": USER, "logprobs": 1}, 400, "logprobs must be true or false"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": "x" * 500}]}, 400,
     "exceed the context of 512"),
    ("/v1/embeddings", {}, 404, "there is no POST /v1/embeddings; there is GET /, "),
    ("/votes", {}, 404, "there is no POST /votes"),
]


@pytest.mark.parametrize("path, body, status, message", MISTAKES)
def test_a_mistake_gets_one_sentence_in_openais_form(path, body, status, message, server):
    found, reply = request(server, "POST", path, body)
    assert found == status
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert message in reply["error"]["message"]
    assert "\n" not in reply["error"]["message"]
    assert reply["error"]["type"] == "invalid_request_error"


def test_a_connection_goes_on_after_a_mistake(server):
    connection = connect(server)
    for body in ("{", json.dumps({"prompt": "x", "max_tokens": 1}), "[]"):
        connection.request("POST", "/v1/completions", body)
        reply = connection.getresponse()
        assert json.loads(reply.read())
        assert reply.status == (200 if "prompt" in body else 400)
    connection.close()


@pytest.mark.parametrize("raw, status", [
    (b"GET / of HTTP/1.1\r\n\r\n", 400),
    (b"PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 411),
    (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
])
def test_what_is_no_proper_request_of_http_gets_json_too(raw, status, server):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
        client.sendall(raw)
        reply = http.client.HTTPResponse(client)
        reply.begin()
        assert reply.status == status
        assert json.loads(reply.read())["error"]["message"]


def test_a_key_is_asked_for_and_the_page_needs_none():
    with serving(api_key="s\u00e9cret") as server:
        body = {"prompt": "x", "max_tokens": 1}
        headers = [
            {}, {"Authorization": "Bearer wrong"}, {"Authorization": "s\u00e9cret"},
            {"Authorization": "Bearer s\u00e9cret".encode()},
        ]
        found = [request(server, "POST", "/v1/completions", body, h)[0] for h in headers]
        assert found == [401, 401, 401, 200]
        status, reply = request(server, "GET", "/v1/models")
        assert status == 401 and reply["error"]["code"] == "invalid_api_key"
        connection = connect(server)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200


@pytest.mark.parametrize("headers, status", [
    ({"Host": "localhost:8000"}, 200),
    ({"Host": "evil.example"}, 403),
    ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
    ({"Host": "localhost:8000", "Origin": "http://evil.example"}, 403),
    ({"Host": "localhost:8000", "Origin": "null"}, 403),
])
def test_a_page_of_another_site_cannot_use_a_server_without_a_key(headers, status, server):
    assert request(server, "GET", "/v1/models", headers=headers)[0] == status


def test_a_port_in_use_is_one_sentence(server):
    port = server.server_port
    with pytest.raises(UserError, match=f"--serve {port}: .*the port is in use; take another"):
        serve.Server(chat.Config(serve=port))
    with pytest.raises(UserError, match="--serve .*: cannot listen on no.such.host"):
        serve.Server(chat.Config(serve=free_port(), host="no.such.host", api_key="k"))


@pytest.mark.parametrize("flags, message", [
    (dict(serve=70_000), "--serve 70000: must be a port, from 1 to 65535, or 0"),
    (dict(serve=1, host="0.0.0.0"), "--host 0.0.0.0: other machines may reach it, .* an --api-key"),
    (dict(serve=1, engine="hf"), "--serve needs --engine hybrid"),
    (dict(serve=1, prompt="x"), "--prompt is answered in the terminal, without --serve"),
    (dict(serve=1, compare="out/ppo"), "--compare out/ppo: it is the same as --model"),
    (dict(compare="out/sft"), "--compare needs --serve PORT"),
    (dict(api_key="x"), "--api-key needs --serve PORT"),
    (dict(host="0.0.0.0"), "--host needs --serve PORT"),
    (dict(votes="x"), "--votes needs --serve PORT"),
])
def test_flags_that_do_not_go_together_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        chat.Config(**flags)


def test_chat_serves_the_models_that_its_flags_name(tmp_path, monkeypatch, capsys):
    template = "Q: {prompt}\nA:"
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    for folder, lm in ((first, LM), (second, OTHER)):
        lm.save_pretrained(folder)
        TOK.save_pretrained(folder)
    write_rows(tmp_path / "second" / "run.json", [{"config": {"template": template}}])
    found = {}

    def serve_forever(self):
        found.update(self.served)
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.Server, "serve_forever", serve_forever)
    port = free_port()
    votes = str(tmp_path / "votes.jsonl")
    cfg = chat.Config(model=first, compare=second, serve=port, votes=votes)
    with pytest.raises(KeyboardInterrupt):
        chat.main(cfg)
    assert list(found) == [first, second]
    assert [model.template for model in found.values()] == [TEMPLATE, template]
    line = f"serving {first} and {second} at http://127.0.0.1:{port}; Ctrl-C ends it"
    assert line in capsys.readouterr().err


# -----------------------------------------------------------------------------
# the page and its votes


def test_the_page_has_all_that_it_needs_and_no_way_to_make_markup_of_a_text(server):
    connection = connect(server)
    connection.request("GET", "/")
    reply = connection.getresponse()
    text = reply.read().decode()
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval", "http:",
                 "https:", "src="):
        assert word not in text, word
    assert "textContent" in text


def vote(choice, prompt="copy abc", answers=("abc", "abd"), compared=("lm", "other")):
    messages = prompt
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    return {"prompt": messages, "answers": list(answers), "models": list(compared), "vote": choice}


TURNS = [
    {"role": "user", "content": "copy abc"},
    {"role": "assistant", "content": "abc"},
    {"role": "user", "content": "once more"},
]


def test_votes_are_rows_that_reward_py_trains_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLATRLHF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))  # no newline
    votes = [
        vote("left"), vote("right"), vote("tie", "p2"), vote("right", TURNS),
        vote("left", "Human: is a word", ("\x1b[2J<b>\u2028", "b"), ("other", "lm")),
        vote("tie", "p3"),
    ]
    with serving(compare="other", votes=str(path)) as server:
        for body in votes:
            status, counts = request(server, "POST", "/votes", body)
            assert status == 200, counts
        assert counts["wins"] == {"lm": 1, "other": 3} and counts["ties"] == 2
        assert counts["model"] == "lm" and counts["win_rate"] == pytest.approx(2 / 6)
    with serving(compare="other", votes=str(path)) as server:
        assert request(server, "GET", "/votes") == (200, counts), "they are in the file"

    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert len(rows) == 7
    assert rows[2] == {
        "prompt": votes[1]["prompt"], "chosen": "abd", "rejected": "abc", "models": ["other", "lm"]}
    assert rows[3]["answers"] == ["abc", "abd"] and rows[3]["ranks"] == [1, 1]

    train, held_out = data.load(str(path), "reward", "", 0.3, TEMPLATE, TOK, 512)
    assert "no two of its ranks differ, so there is nothing to compare" in capsys.readouterr().out
    texts = set()
    for part in (train, held_out):
        for i in range(len(part)):
            answers = [decode(answer) for answer in part.answers(i)]
            texts.add((decode(part.prompt(i)), *answers))
    assert texts == {
        ("Human: p\nAssistant:", " a", " b"),
        ("Human: copy abc\nAssistant:", " abc", " abd"),
        ("Human: copy abc\nAssistant:", " abd", " abc"),
        ("Human: copy abc\nAssistant: abc\nHuman: once more\nAssistant:", " abd", " abc"),
        ("Human: Human: is a word\nAssistant:", " \x1b[2J<b>", " b"),
    }


@pytest.mark.parametrize("body, message", [
    (vote("both"), "vote must be left, right or tie"),
    (vote("left", compared=("lm", "lm")), "models must be lm and other"),
    (vote("left", answers=("x",)), "answers and models must be lists of two texts"),
    (vote("left", answers=("x", 3)), "answers and models must be lists of two texts"),
    (vote("left", prompt=[]), "messages is []"),
    (b"x", "the body is not JSON"),
])
def test_a_vote_that_says_nothing_is_not_written(body, message, tmp_path):
    path = tmp_path / "votes.jsonl"
    with serving(compare="other", votes=str(path)) as server:
        status, reply = request(server, "POST", "/votes", body)
    assert status == 400 and message in reply["error"]["message"]
    assert path.read_text() == ""


def test_a_file_of_votes_that_cannot_be_used_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--votes .*: it cannot be read and written"):
        serve.Votes(tmp_path, ["a", "b"])
    broken = tmp_path / "votes.jsonl"
    broken.write_text('{"a": 1}\n{"a"')
    with pytest.raises(UserError, match="votes.jsonl:2: not valid JSON"):
        serve.Votes(broken, ["a", "b"])


def test_a_vote_that_the_disk_does_not_take_is_said_to_be_lost(tmp_path):
    votes = serve.Votes(tmp_path / "votes.jsonl", ["lm", "other"])
    votes.file.close()
    votes.file = open("/dev/full", "w")
    with pytest.raises(serve.ApiError, match="the vote is lost: .*, the disk is full"):
        votes.add(vote("left"))
    assert votes.summary() == {"wins": {"lm": 0, "other": 0}, "ties": 0}


@pytest.mark.parametrize("wins, n", [(0, 5), (3.5, 10), (10, 10), (61, 100)])
def test_wilsons_interval_ends_where_the_votes_are_1_96_standard_deviations_away(wins, n):
    share = wins / n
    for end in serve.wilson_interval(share, n):
        assert -1e-9 <= end <= 1 + 1e-9
        variance = max(0, end * (1 - end) / n)
        assert abs(share - end) == pytest.approx(1.96 * variance**0.5, abs=1e-6)


# -----------------------------------------------------------------------------
# OpenAI's own client


def test_the_openai_package_is_a_client():
    openai = pytest.importorskip("openai", reason="needs `pip install openai`")
    with serving(api_key="k") as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        client = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
        assert [model.id for model in client.models.list()] == ["lm"]
        arguments = dict(model="lm", messages=USER, max_tokens=30, seed=1, logprobs=True)
        whole = client.chat.completions.create(**arguments)
        assert whole.usage.completion_tokens >= len(whole.choices[0].logprobs.content)
        with client.chat.completions.stream(
                **arguments, stream_options={"include_usage": True}) as stream:
            for _ in stream:
                pass
        final = stream.current_completion_snapshot
        assert final.choices[0].message.content == whole.choices[0].message.content
        assert final.choices[0].message.role == "assistant"
        assert final.usage == whole.usage
        text = client.completions.create(model="lm", prompt="x", max_tokens=5, n=2, stop=["a"])
        assert len(text.choices) == 2
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
            client.chat.completions.create(model="gpt", messages=USER)
        with pytest.raises(openai.BadRequestError, match="exceed the context"):
            client.completions.create(model="lm", prompt="x" * 600)
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            client.with_options(api_key="wrong").models.list()
