"""An HTTP server for what sft.py and ppo.py train: OpenAI's chat completions, and a page on which
people talk to a model, or compare two and vote.     pip install fastapi uvicorn

    python -m tools.serve                                        # out/ppo at http://127.0.0.1:8000
    python -m tools.serve --model out/ppo --compare out/sft      # votes go into votes.jsonl
    python reward.py --data votes.jsonl --out out/voted          # learns what people preferred

    event loop                                                   a thread
      JSON -> token ids -> Answer ---- submit ---->  RequestEngine: rows enter the batch, get a
      text <- Answer.add <---------- news <--------  token in every step, and leave

An answer depends on its request alone, and not on what else is decoded at the time.
"""
import asyncio
import contextlib
import json
import secrets
import time
import traceback
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
except ImportError as error:
    raise SystemExit(f"tools.serve needs {error.name}: pip install fastapi uvicorn") from None

import numpy as np
import torch
from pydantic import BaseModel, Field, PositiveInt
from starlette.exceptions import HTTPException

import data
import kernels
import utils
from hybrid_engine import HybridEngine, require_finite, row_keys

MAX_BATCH = 256     # answers that are decoded at once
MAX_WAITING = 1024  # answers that wait for a slot; more get 429
MAX_LEN = 4096      # tokens of a prompt and its answer; every slot has room for so many
LOCAL = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Config:
    model: str = "out/ppo"         # model folder or hub name
    compare: str = ""              # a second model: the page shows both answers and takes votes
    votes: str = "votes.jsonl"     # file that votes are appended to, for reward.py --data
    host: str = "127.0.0.1"        # address to listen on; any other needs a key
    port: int = 8000               # port to listen on
    api_key: str = ""              # what clients must give; empty: nothing
    max_new_tokens: int = 128      # longest answer
    temperature: float = 1.0       # of sampling; 0: always the most likely token
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 where a GPU has it

    def __post_init__(self):
        if self.host not in LOCAL and not self.api_key:
            raise utils.UserError(f"--host {self.host}: others may reach it; give an --api-key")


# -----------------------------------------------------------------------------
# the engine


class RequestEngine(HybridEngine):
    """Generation for a server: prompts come while others are answered, each with its own sampling.
    A row gets the tokens that generate() gives to its prompt and key. max_waiting: most rows that
    wait for a slot; share: of the free memory, for the KV cache."""

    def __init__(self, lm, max_batch, max_len, ends, max_waiting, share):
        super().__init__(lm, max_batch=max_batch, max_len=max_len)
        self.share = share
        with torch.no_grad():
            self.prepare(max_batch, max_len, ends)
        self.waiting = deque()                                # rows
        self.running = {}                                     # slot: row
        N = max_batch + max_waiting
        self.free_rows = list(range(N))
        self.prompts = [None] * N                             # of each row
        self.prompt_lens = np.zeros(N, dtype=np.int64)
        self.max_lens = np.zeros(N, dtype=np.int64)
        self.keys = np.zeros(N, dtype=np.int64)
        self.samplings = [None] * N                           # (temperature, top_k, top_p)
        shape = (len(self.cache.slots), len(self.decoder.ends.head))
        self.logits = torch.zeros(shape, device=self.device)  # (S, V) the newest of each slot

    def free_memory(self):
        return self.share * super().free_memory()

    def add(self, prompt, key, max_new_tokens, sampling):
        """Queues a prompt, token ids. key: one of row_keys. Returns its row, a number that is this
        prompt's until step() says that it has ended, or remove() is called."""
        row = self.free_rows.pop()
        self.prompts[row] = np.asarray(prompt, dtype=np.int64)
        self.prompt_lens[row] = len(prompt)
        self.max_lens[row] = len(prompt) + max_new_tokens
        self.keys[row] = key
        self.samplings[row] = sampling
        self.waiting.append(row)
        return row

    def remove(self, row):
        """Ends a row that nobody waits for any more."""
        if row in self.waiting:
            self.waiting.remove(row)
            self.free_rows.append(row)
        else:
            self.leave(next(slot for slot in self.running if self.running[slot] == row))

    def leave(self, slot):
        self.cache.rows.done[slot] = True
        self.free_rows.append(self.running.pop(slot))

    @torch.no_grad()
    def step(self):
        """Returns of each token that is sampled (row, token, whether the row has ended)."""
        news = []
        if self.waiting and len(self.running) < len(self.cache.slots):
            before = set(self.running)
            self.admit()
            news += self.choose([slot for slot in self.running if slot not in before])
        if self.running:
            self.close_gaps()
            n = self.step_size(max(self.running) + 1)
            if self.use_graphs:
                self.graphs.run((n, self.cache.capacity), lambda: self.decode_step(n))
            else:
                self.decode_step(n)
            news += self.choose(list(self.running))
        return news

    def sample(self, logits, slots):
        """Only keeps the logits. A CUDA graph may hold this step; which rows are sampled in which
        way changes from step to step, and stays outside."""
        self.logits.index_copy_(0, slots, logits.float())

    def choose(self, slots):
        """A token for the row in each of these slots (a list). Returns what step() does."""
        rows = [self.running[slot] for slot in slots]
        groups = defaultdict(list)
        for slot, row in zip(slots, rows):
            groups[self.samplings[row]].append(slot)
        state = self.cache.rows
        ends = self.eos_tensors[self.eos_ids]
        for sampling, group in groups.items():
            index = self.tensor(group)
            kernels.sample_next(self.logits[index], index, state, ends, *sampling)
        slots = self.tensor(slots)
        last = state.lengths[slots] - 1                                       # (n,)
        require_finite(state.logprobs[slots, last])
        tokens = state.tokens[slots, last].tolist()
        done = state.done[slots].tolist()
        for slot in self.ended_slots():
            self.leave(slot)
        return list(zip(rows, tokens, done))


# -----------------------------------------------------------------------------
# answers


class Answer:
    """An answer while it is decoded. Its text goes out in whole characters, without what may turn
    out to be the start of a stop string."""

    def __init__(self, name, model, request, stops):
        """request: what RequestEngine.add takes."""
        self.name, self.model, self.request, self.stops = name, model, request, stops
        self.head = {"id": "chatcmpl-" + secrets.token_hex(12), "created": int(time.time())}
        self.news = asyncio.Queue()     # (token, ended); or None: nobody waits any more
        self.wanted = True              # somebody waits for it
        self.reason = None              # why it has ended: "stop" or "length"
        self.ids = []
        self.text = ""
        self.start = self.read = 0      # ids[start:read] are decoded a second time, as context
        self.sent = self.tokens = 0     # characters; tokens, the end included

    def add(self, token, ended):
        """Returns the new text."""
        self.tokens += 1
        if token in self.model.ends:
            self.reason = "stop"
        else:
            self.ids.append(token)
            self.reason = "length" if ended else None
        self.extend()
        if self.sent == 0 and self.model.has_space:
            if self.text == " " and not self.reason:
                return ""  # until it is known whether more white space follows: code keeps it
            self.sent = int(self.text[:1] == " " and not self.text[1:2].isspace())
        begun = [stop[:n] for stop in self.stops for n in range(1, len(stop))]
        held = [len(start) for start in begun if not self.reason and self.text.endswith(start)]
        new = self.text[self.sent : len(self.text) - max(held, default=0)]
        self.sent += len(new)
        return new

    def extend(self):
        """Decodes new ids as far as they are whole characters, at the end all of them, and looks
        for stop strings. Some tokenizers write a token otherwise where it is the first."""
        old = self.model.decode(self.ids[self.start : self.read])
        new = self.model.decode(self.ids[self.start :])
        if self.reason or not new.endswith("\ufffd"):
            self.text += new[len(old) :]
            self.start, self.read = self.read, len(self.ids)
        found = [self.text.find(stop) for stop in self.stops if stop in self.text]
        if found:
            self.text, self.reason = self.text[: min(found)], "stop"

    def usage(self):
        counts = {"prompt_tokens": len(self.request[0]), "completion_tokens": self.tokens}
        return {"usage": counts | {"total_tokens": sum(counts.values())}}

    def reply(self, kind, **content):
        choice = {"index": 0, **content, "finish_reason": self.reason}
        return self.head | {"object": kind, "model": self.name, "choices": [choice]}


class Model:
    """A model that is served. All but the engine's step runs in the event loop."""

    def __init__(self, lm, tokenizer, max_batch=MAX_BATCH, max_waiting=MAX_WAITING, share=1.0):
        self.tokenizer = tokenizer
        self.ends = utils.end_ids(tokenizer, lm)
        self.max_len = min(utils.context_length(lm.config), MAX_LEN)
        self.max_answers = max_batch + max_waiting
        self.engine = RequestEngine(lm, max_batch, self.max_len, self.ends, max_waiting, share)
        self.inbox = deque()     # Answers that the engine does not have yet
        self.rows = {}           # row of the engine: Answer
        self.error = None        # what has ended run()
        self.wake = asyncio.Event()
        self.decode = partial(tokenizer.decode, skip_special_tokens=True)
        # Whether the chat template writes a space before an answer, which is not the answer's.
        ask = [{"role": "user", "content": "?"}]
        whole = data.render(tokenizer, ask, answer={"role": "assistant", "content": "ANSWER"})
        self.has_space = whole.removeprefix(data.render(tokenizer, ask)).startswith(" ")

    def submit(self, answer):
        if self.error:
            raise HTTPException(500, self.error)
        if len(self.inbox) + len(self.rows) >= self.max_answers:
            raise HTTPException(429, "too many answers wait already; try again later")
        self.inbox.append(answer)
        self.wake.set()

    async def run(self, thread):
        """Steps as long as there is something to answer. thread: an executor with one thread."""
        while True:
            await self.wake.wait()
            for row in [row for row, answer in self.rows.items() if not answer.wanted]:
                self.engine.remove(row)
                del self.rows[row]
            while self.inbox:
                answer = self.inbox.popleft()
                if answer.wanted:
                    self.rows[self.engine.add(*answer.request)] = answer
            if not self.rows:
                self.wake.clear()
                continue
            try:
                loop = asyncio.get_running_loop()
                found = await loop.run_in_executor(thread, self.engine.step)
            except Exception as error:
                traceback.print_exc()
                self.error = f"the engine has failed: {error}"
                for answer in (*self.rows.values(), *self.inbox):
                    answer.news.put_nowait(None)
                return
            for row, token, ended in found:
                self.rows[row].news.put_nowait((token, ended))
                if ended:
                    del self.rows[row]


# -----------------------------------------------------------------------------
# requests


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict]

    def plain(self):
        role = self.role.replace("developer", "system")
        return data.as_message({"role": role, "content": self.content})


class Chat(BaseModel, extra="forbid"):
    """Other fields are refused: without them, the answer would be one to another question."""
    messages: list[Message] = Field(min_length=1)
    model: str = ""
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict | None = None
    user: str | None = None
    n: Literal[1] = 1
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0


def read_request(body, served, cfg):
    """An Answer, not yet submitted."""
    name = body.model or cfg.model
    if name not in served:
        raise HTTPException(404, f"there is no model {name!r}; there is {', '.join(served)}")
    model = served[name]
    try:
        text = data.prompt_text(model.tokenizer, [m.plain() for m in body.messages])
    except Exception as error:  # a template is a program, and raises what it likes
        raise HTTPException(400, f"messages: {error}") from None
    prompt = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = body.max_completion_tokens or body.max_tokens
    room = model.max_len - len(prompt)
    if room < (asked or 1):
        raise HTTPException(400, f"a prompt of {len(prompt)} tokens and an answer of {asked or 1} "
                            f"exceed the context of {model.max_len} tokens")
    limit = asked or min(cfg.max_new_tokens, room)
    temperature = cfg.temperature if body.temperature is None else body.temperature
    # Rounded: logits that are divided by much less would overflow.
    sampling = (round(temperature, 3), 0, body.top_p or 1.0)
    seed = secrets.randbits(62) if body.seed is None else body.seed
    request = (prompt, int(row_keys(seed, 1)[0]), limit, sampling)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Answer(name, model, request, [stop for stop in stops if stop])


async def watch(request, answer):
    """Until the response is complete or the client hangs up. What nobody waits for leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.wanted = False
    answer.news.put_nowait(None)


async def pieces(answer):
    """Yields new text as it comes, until the answer has ended."""
    while not answer.reason:
        news = await answer.news.get()
        if news is None:
            raise HTTPException(500, answer.model.error or "the client has gone")
        text = answer.add(*news)
        answer.wanted = not answer.reason  # a stop string ends a row that the engine would go on
        if text or answer.reason:
            yield text


async def events(answer, with_usage):
    """The reply as server-sent events."""
    def event(value):
        return f"data: {json.dumps(value)}\n\n"

    kind = "chat.completion.chunk"
    role = {"role": "assistant"}
    try:
        async for text in pieces(answer):
            yield event(answer.reply(kind, delta={**role, "content": text}))
            role = {}
        if with_usage:
            yield event(answer.reply(kind) | {"choices": []} | answer.usage())
        yield "data: [DONE]\n\n"
    except HTTPException as error:
        yield event(error_body(error.status_code, error.detail))


# -----------------------------------------------------------------------------
# votes: rows that reward.py trains on


class Vote(BaseModel):
    prompt: list[Message] = Field(min_length=1)
    models: tuple[str, str]
    answers: tuple[str, str]
    vote: Literal["left", "right", "tie"]

    def row(self):
        """Two answers in the same words are a tie, whatever was voted. Answers are messages: as
        text, one that begins with "Human:" would be read as a dialogue."""
        order = [1, 0] if self.vote == "right" else [0, 1]
        first, second = ([{"role": "assistant", "content": self.answers[i]}] for i in order)
        row = {"prompt": [message.plain() for message in self.prompt]}
        row["models"] = [self.models[i] for i in order]
        if self.vote == "tie" or self.answers[0] == self.answers[1]:
            return row | {"answers": [first, second], "ranks": [1, 1]}
        return row | {"chosen": first, "rejected": second}


def count_votes(path, names):
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    rows = [row for row in map(json.loads, lines) if sorted(row["models"]) == sorted(names)]
    best = [row["models"][0] for row in rows if "chosen" in row]
    return {"wins": {name: best.count(name) for name in names}, "ties": len(rows) - len(best)}


# -----------------------------------------------------------------------------
# HTTP


def error_body(status, message):
    kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def make_app(cfg, served):
    """served: {name: Model}, one or two."""
    names = list(served)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        with ThreadPoolExecutor(1) as thread:  # one for all engines, which take turns
            tasks = [asyncio.create_task(model.run(thread)) for model in served.values()]
            yield
            for task in tasks:
                task.cancel()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def on_http(request, error):
        return JSONResponse(error_body(error.status_code, error.detail), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request, error):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:]))
        return JSONResponse(error_body(400, f"{where}: {first['msg']}".lstrip(": ")), 400)

    async def check(request: Request):
        """Without a key, what a browser sends for a page of another site is refused: that page
        could vote, or under a name that it has pointed to 127.0.0.1 (DNS rebinding), read."""
        given = request.headers.get("authorization", "").encode()
        if cfg.api_key and not secrets.compare_digest(given, f"Bearer {cfg.api_key}".encode()):
            raise HTTPException(401, "the API key is missing or wrong")
        host = request.headers.get("host", "")
        here = request.headers.get("origin", f"http://{host}") == f"http://{host}"
        if not cfg.api_key and not (here and host.partition(":")[0] in LOCAL):
            raise HTTPException(403, "this is for pages and programs of this machine")

    @app.post("/v1/chat/completions", dependencies=[Depends(check)])
    async def chat_completions(request: Request, body: Chat):
        answer = read_request(body, served, cfg)
        answer.model.submit(answer)
        answer.watcher = asyncio.create_task(watch(request, answer))
        if body.stream:
            stream = events(answer, (body.stream_options or {}).get("include_usage"))
            return StreamingResponse(stream, media_type="text/event-stream")
        text = "".join([new async for new in pieces(answer)])
        message = {"role": "assistant", "content": text}
        return answer.reply("chat.completion", message=message) | answer.usage()

    @app.get("/v1/models", dependencies=[Depends(check)])
    async def list_models():
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}

    @app.get("/")
    async def page():
        return FileResponse(Path(__file__).with_name("serve.html"))

    @app.post("/votes", dependencies=[Depends(check)])
    async def vote(body: Vote):
        if len(names) < 2 or sorted(body.models) != sorted(names):
            raise HTTPException(400, f"models must be those of /v1/models, two: {names}")
        with open(cfg.votes, "a") as file:
            file.write(json.dumps(body.row()) + "\n")
        return count_votes(cfg.votes, names)

    return app


def load(name, cfg, share):
    """A Model, on the GPU if there is one."""
    from transformers import AutoModelForCausalLM

    tokenizer = utils.load_tokenizer(name)
    lm = utils.load_model(AutoModelForCausalLM, name, utils.dtype_of(cfg.dtype), tokenizer)
    return Model(lm.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, share=share)


def main(cfg):
    names = [name for name in (cfg.model, cfg.compare) if name]
    served = {name: load(name, cfg, 1 / (len(names) - i)) for i, name in enumerate(names)}
    print(f"serving {' and '.join(names)} at http://{cfg.host}:{cfg.port}; Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(make_app(cfg, served), host=cfg.host, port=cfg.port, log_level="warning",
                    timeout_graceful_shutdown=2)


if __name__ == "__main__":
    utils.run(main, Config)
