"""Tests of tools/serve.py, with a uvicorn on 127.0.0.1 and a small random model."""
import contextlib
import json
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

import data
import utils
from hybrid_engine import HybridEngine
from tools import serve

TOK = utils.load_tokenizer("tiny")
ASK = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = utils.tiny_config()
    config.update({"hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.4})
    return transformers.LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def serving(lm, tok=TOK, names=("lm",), batch=256, waiting=1024, **flags):
    """Yields a client; client.model: the first Model; client.chat: asks it."""
    served = {name: serve.Model(lm, tok, batch, waiting, share=0.3) for name in names}
    app = serve.make_app(serve.Config(model=names[0], **flags), served)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=url, limits=limits) as client:
        client.model = served[names[0]]
        client.chat = lambda timeout=60, **body: client.post(
            "/v1/chat/completions", json={"messages": ASK, **body}, timeout=timeout)
        yield client
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(lm):
    with serving(lm) as client:
        yield client


def wait_until(condition, seconds=20):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen"
        time.sleep(0.01)


def text_of(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def slowly(model, monkeypatch, seconds=0.02):
    """Lets the engine take its time over a step. Returns a list of what its steps return."""
    step, said = model.engine.step, []
    def slow():
        time.sleep(seconds)
        said.append(step())
        return said[-1]
    monkeypatch.setattr(model.engine, "step", slow)
    return said


def test_200_requests_at_once_get_what_generate_gives_to_each_alone(client, lm, monkeypatch):
    said = slowly(client.model, monkeypatch, 0)
    samplings = [{}, {"temperature": 0}, {"top_p": 0.5}, {"temperature": 1.5, "top_p": 0.9}]
    def ask(i):
        return client.chat(messages=[{"role": "user", "content": f"is {i % 7}"}], seed=2**33 + i,
                           max_tokens=1 + i % 13, **samplings[i % 4])
    with ThreadPoolExecutor(200) as threads:
        replies = list(threads.map(ask, range(200)))
    generate = HybridEngine(lm).generate
    for i in range(0, 200, 3):
        prompt = TOK(f"Human: is {i % 7}\nAssistant:")["input_ids"]
        out = generate([prompt], 1 + i % 13, eos_token_id=TOK.eos_token_id, seed=2**33 + i,
                       **samplings[i % 4])
        want = TOK.decode(out.tokens[0, len(prompt) :], skip_special_tokens=True)
        assert text_of(replies[i]) in (want, want.removeprefix(" ")), i
    assert max(map(len, said)) > 20, "they were not decoded together"
    wait_until(lambda: len(client.model.engine.free_rows) == 1280)


def test_a_stream_is_the_answer_in_pieces_to_what_the_chat_template_renders(client):
    messages = [{"role": "developer", "content": "short"}, {"role": "assistant", "content": "yes"},
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("co", "py")]}]
    body = {"messages": messages, "max_tokens": 60, "seed": 0}
    whole = client.chat(**body).json()
    assert whole["usage"]["prompt_tokens"] == len("short\nAssistant: yes\nHuman: copy\nAssistant:")
    reply = client.chat(**body, stream=True, stream_options={"include_usage": True})
    assert reply.text.endswith("\n\ndata: [DONE]\n\n")
    *chunks, last = map(json.loads, reply.text.removeprefix("data: ").split("\n\ndata: ")[:-1])
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["delta"]["content"] for choice in choices)
    assert text == whole["choices"][0]["message"]["content"] and len(choices) > 5
    assert [i for i, choice in enumerate(choices) if "role" in choice["delta"]] == [0]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert {choice["finish_reason"] for choice in choices[:-1]} == {None}
    assert text_of(client.chat(max_tokens=60)) != text_of(client.chat(max_tokens=60)), "no seed"


def test_the_pieces_of_an_answer_are_its_text_up_to_the_first_stop_string():
    rng = random.Random(0)
    def decode(ids):  # as sentencepiece: the first token loses its space
        return TOK.decode(ids).removeprefix(" ")
    model = SimpleNamespace(ends=[TOK.eos_token_id], decode=decode, has_space=True)
    for _ in range(400):
        ids = rng.choices(range(256), k=9)  # what is no UTF-8, too
        if rng.random() < 0.8:
            text = "".join(rng.choices("ab \n\u00e9\U0001f600", k=rng.randrange(1, 12)))
            ids = TOK(text)["input_ids"]
        n = rng.randrange(4)
        stops = ["".join(rng.choices("ab \u00e9", k=rng.randrange(1, 4))) for _ in range(n)]
        answer = serve.Answer("lm", model, None, stops)
        said = ""
        while not answer.reason:
            said += answer.add(ids[answer.tokens], ended=answer.tokens == len(ids) - 1)
        text = decode(ids)
        found = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        assert said == re.sub(r"\A (?!\s)", "", text[:found]), (text, stops)
        assert answer.reason == ("stop" if found < len(text) else "length")


def test_an_answer_ends_at_every_end_that_the_folder_names(lm, monkeypatch):
    letters = "abcdefghijklmnopqrstuvwxyz"
    tok = utils.load_tokenizer("tiny")
    tok.add_tokens(list(letters), special_tokens=True)
    ends = [tok.eos_token_id, *tok(letters)["input_ids"]]
    monkeypatch.setattr(lm.generation_config, "eos_token_id", ends)
    with serving(lm, tok) as client:
        for seed in range(6):
            reply = client.chat(seed=seed, max_tokens=300).json()
            assert reply["choices"][0]["finish_reason"] == "stop"
            assert reply["usage"]["completion_tokens"] < 100


def test_a_stop_string_ends_the_row_and_is_not_said(client):
    whole = text_of(client.chat(seed=1, max_tokens=200))
    reply = client.chat(seed=1, max_tokens=200, stop=["never said", whole[20:23]])
    assert text_of(reply) == whole[: whole.index(whole[20:23])]
    wait_until(lambda: not client.model.rows, 2)


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_a_row_also_one_that_waits(lm, monkeypatch, stream):
    with serving(lm, batch=1) as client, ThreadPoolExecutor() as threads:
        said = slowly(client.model, monkeypatch)

        for _ in range(2):
            threads.submit(client.chat, max_tokens=400, stream=stream, temperature=0, timeout=2)
        wait_until(lambda: len(client.model.rows) == 2)
        wait_until(lambda: not client.model.rows and not client.model.inbox)
        assert len(said) < 300 and len(client.model.engine.free_rows) == 1025


def test_a_full_queue_answers_429_and_loses_nobody_and_a_failure_is_told_to_all(lm, monkeypatch):
    with serving(lm, batch=1, waiting=1) as client, ThreadPoolExecutor() as threads:
        slowly(client.model, monkeypatch)
        first = [threads.submit(client.chat, max_tokens=30, seed=1) for _ in range(2)]
        wait_until(lambda: len(client.model.rows) == 2)
        reply = client.chat()
        assert reply.status_code == 429 and reply.json()["error"]["type"] == "rate_limit_error"
        assert len({text_of(future.result()) for future in first}) == 1
        monkeypatch.setattr(client.model.engine, "step", lambda: 1 / 0)
        for _ in range(2):
            reply = client.chat()
            assert reply.status_code == 500 and "by zero" in reply.json()["error"]["message"]


@pytest.mark.parametrize("body, status, message", [
    ({"model": "gpt"}, 404, "there is no model 'gpt'; there is lm"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages: "),
    ({"max_tokens": 600}, 400, "exceed the context of 512 tokens"),
    ({"top_p": 0}, 400, "top_p: Input should be greater"),
    ({"tools": []}, 400, "tools: Extra inputs are not permitted"),
])
def test_a_mistake_gets_one_sentence_in_openais_form(client, body, status, message):
    reply = client.chat(**body)
    assert reply.status_code == status and message in reply.json()["error"]["message"]


def test_a_key_is_asked_for_and_without_one_other_sites_are_refused(lm, client):
    for headers in ({"host": "evil.com"}, {"origin": "http://evil.com"}):
        assert client.get("/v1/models", headers=headers).status_code == 403
    with serving(lm, api_key="k") as keyed:
        assert keyed.get("/").status_code == 200 and keyed.chat().status_code == 401
        assert keyed.get("/v1/models", headers={"authorization": "Bearer k"}).status_code == 200
    with pytest.raises(utils.UserError, match="--api-key"):
        serve.Config(host="0.0.0.0")


def test_votes_are_rows_that_reward_py_trains_on(lm, tmp_path):
    path = tmp_path / "votes.jsonl"
    with serving(lm, names=("lm", "other"), votes=str(path)) as client:
        def vote(choice, *answers):
            body = {"prompt": ASK, "models": ["other", "lm"], "answers": answers, "vote": choice}
            return client.post("/votes", json=body).json()
        vote("left", "good", "bad")
        vote("right", "bad", "Human: a\n\nAssistant: b")
        vote("tie", "good", "bad")
        assert vote("left", "same", "same") == {"wins": {"lm": 1, "other": 1}, "ties": 2}
    rows = [data.as_example(row) for row in data.read(str(path))]
    assert all(row.messages == ASK for row in rows)
    said = [row.answers("reward") for row in rows]
    assert [[m["content"] for m in answers] for answers in said[:2]] == [
        ["good", "bad"], ["Human: a\n\nAssistant: b", "bad"]]
    assert said[2:] == [None, None], "a tie is no comparison"


def test_the_page_makes_no_markup_of_a_text_and_what_is_missing_is_one_sentence(client):
    page = client.get("/").text
    assert "innerHTML" not in page and "://" not in page
    code = "import sys; sys.modules['fastapi'] = None; import tools.serve"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "tools.serve needs fastapi: pip install fastapi uvicorn"
