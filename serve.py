"""An HTTP server for the models that sft.py and ppo.py train: OpenAI's interface, and a page on
which people talk to them and compare two.

    python chat.py --serve 8000                          # http://127.0.0.1:8000
    python chat.py --model out/ppo --compare out/sft --serve 8000
    python reward.py --data votes.jsonl                  # learns what people preferred

    a thread per connection                              one thread for all engines
      JSON -> token ids -> Answers --- submit ----->  rows of the engine: they enter, get a token
      text <- tokens <- queue of the request <------  in every step, and leave

A row that a client no longer waits for leaves at once. An answer depends on its prompt and its
seed, and not on what else is computed: it is that of HybridEngine.generate.

The server is the one of Python's standard library. A thread per connection is all that is needed
where one machine's GPU or CPU is what limits the number of clients to hundreds, and there is
nothing to install. It does not speak TLS: over a network, put it behind a proxy that does.
"""
import errno
import hmac
import json
import math
import queue
import secrets
import select
import socket
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import data
import models
import utils
from hybrid_engine import OnlineEngine, row_keys
from sources import check_messages, check_text, read_json_lines
from utils import UserError

PAGE = Path(__file__).with_name("serve.html")

MAX_BATCH = 256          # rows that are decoded at once
MAX_WAITING = 1024       # rows that wait for a slot; more get 429
MAX_LEN = 4096           # tokens of a row; every slot of the KV cache has room for so many
MAX_ANSWERS = 128        # `n` of a request
MAX_BODY = 16 * 2**20    # bytes of a request
TIMEOUT = 60             # seconds without a byte, from or to a client, after which it is gone
CHARACTERS_PER_TOKEN = 100  # a longer prompt is refused before it is tokenized, which may take long

NO_KEY_HOSTS = ("127.0.0.1", "localhost")  # what only this machine reaches


def check_flags(cfg):
    """Raises UserError for flags of chat.py that do not go together."""
    if not cfg.serve:
        for name in ("host", "api_key", "compare", "votes"):
            if getattr(cfg, name) != getattr(type(cfg), name):
                raise UserError(f"{utils.flag_of(name)} needs --serve PORT")
        return
    if cfg.prompt:
        raise UserError("--prompt is answered in the terminal, without --serve")
    if cfg.engine != "hybrid":
        raise UserError("--serve needs --engine hybrid")
    if cfg.host not in NO_KEY_HOSTS and not cfg.api_key:
        message = f"--host {cfg.host}: other machines may reach it, so it needs an --api-key"
        raise UserError(message)
    if cfg.compare == cfg.model:
        raise UserError(f"--compare {cfg.compare}: it is the same as --model; name another one")


class ApiError(Exception):
    """What a client is told in place of an answer, in OpenAI's form. code: a word for programs."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status = status
        self.code = code

    def body(self):
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        if self.status >= 500:
            kind = "server_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return {"error": error}


# -----------------------------------------------------------------------------
# the thread of the engines


@dataclass
class Answer:
    """One answer of a request. What the engine's thread puts into `news`, the queue of the request:
    (index, new tokens, their log-probabilities, whether the row has ended), or an ApiError."""
    index: int               # among those of the request
    prompt: list             # token ids
    key: int                 # of its random numbers
    max_new_tokens: int
    sampling: tuple          # temperature, top_k, top_p
    news: queue.SimpleQueue
    unwanted: bool = False   # nobody waits for it any more


class Model:
    """A model that is served: `name` is --model or --compare."""

    def __init__(self, name, lm, tokenizer, template, max_batch, max_waiting, memory_share):
        self.name = name
        self.tokenizer = tokenizer
        self.template = template
        self.max_len = min(models.context_length(lm.config), MAX_LEN)
        self.engine = OnlineEngine(
            lm, max_batch, self.max_len, tokenizer.eos_token_id, max_waiting, memory_share)
        self.max_answers = max_batch + max_waiting
        self.inbox = deque()      # Answers that the engine does not have yet
        self.rows = {}            # row of the engine: Answer
        # A tokenizer may be changed for a moment while it encodes, so threads take turns.
        self.tokenizer_lock = threading.Lock()

    def encode(self, text, template):
        if len(text) > CHARACTERS_PER_TOKEN * self.max_len:
            message = (
                f"a prompt of {len(text)} characters exceeds the context of {self.max_len} tokens")
            raise ApiError(400, message, "context_length_exceeded")
        with self.tokenizer_lock:
            return data.prompt_ids([text], template, self.tokenizer)[0]

    def decode(self, ids):
        with self.tokenizer_lock:
            return self.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Scheduler(threading.Thread):
    """The one thread that calls the engines, a step of each in turn."""

    def __init__(self, served, on_error):
        super().__init__(daemon=True)
        self.served = served                 # Models
        self.on_error = on_error             # is called if the thread ends
        self.changed = threading.Condition()  # guards every inbox
        self.error = None                    # what has ended the thread

    def submit(self, model, answers):
        """Queues the answers of a request, all or none. Called by the threads of connections."""
        with self.changed:
            if self.error:
                raise ApiError(500, "the engine has failed")
            open_answers = len(model.inbox) + len(model.rows)
            if open_answers + len(answers) > model.max_answers:
                message = f"{open_answers} answers are computed or wait already; try again later"
                raise ApiError(429, message, "queue_full")
            model.inbox.extend(answers)
            self.changed.notify()

    def run(self):
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: any(m.inbox or m.rows for m in self.served))
                for model in self.served:
                    self.step(model)
        except Exception as error:
            self.fail(error)

    def step(self, model):
        engine = model.engine
        for row, answer in list(model.rows.items()):
            if answer.unwanted:
                engine.remove(row)
                del model.rows[row]
        with self.changed:
            while model.inbox:
                answer = model.inbox.popleft()
                if not answer.unwanted:
                    row = engine.add(
                        answer.prompt, answer.key, answer.max_new_tokens, *answer.sampling)
                    model.rows[row] = answer
        for row, tokens, logprobs, ended in engine.step():
            answer = model.rows[row]
            answer.news.put((answer.index, tokens, logprobs, ended))
            if ended:
                del model.rows[row]

    def fail(self, error):
        """All who wait are told."""
        with self.changed:
            self.error = error
            for model in self.served:
                for answer in (*model.rows.values(), *model.inbox):
                    answer.news.put(ApiError(500, f"the engine has failed: {error}"))
        self.on_error()


# -----------------------------------------------------------------------------
# tokens to text


class Text:
    """The text of an answer as its tokens come. take() gives what is new and will not change: whole
    characters, and nothing that may turn out to be the start of a stop string.

    skip: what is left out at the start, the template's space between prompt and answer.
    """

    def __init__(self, decode, stops=(), skip=""):
        self.decode = decode
        self.stops = stops
        self.skip = skip
        self.text = ""
        self.ids = []
        self.tokens = []            # (id, log-probability, where in the text it begins), not taken
        self.context = 0            # ids from here to `decoded` are decoded a second time: some
        self.decoded = 0            # tokenizers write a token otherwise where it is the first
        self.taken = 0              # characters
        self.finish_reason = None

    def add(self, token, logprob):
        self.tokens.append((token, logprob, len(self.text)))
        self.ids.append(token)
        self.extend()

    def finish(self, reason):
        """No more tokens come."""
        self.extend(flush=True)
        self.finish_reason = self.finish_reason or reason

    def extend(self, flush=False):
        """Decodes new tokens, as far as they are whole characters, or all of them."""
        searched = len(self.text)
        old = self.decode(self.ids[self.context : self.decoded])
        new = self.decode(self.ids[self.context :])
        if flush or not new.endswith("\ufffd"):
            self.text += new[len(old) :]
            self.context = self.decoded
            self.decoded = len(self.ids)
        if not searched and self.text.startswith(self.skip):
            self.taken = len(self.skip)

        found = []
        for stop in self.stops:
            found.append(self.text.find(stop, max(0, searched - len(stop) + 1)))
        found = [position for position in found if position >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.tokens = [token for token in self.tokens if token[2] < len(self.text)]
            self.finish_reason = "stop"

    def take(self):
        """(text, its tokens) since the last call."""
        end = len(self.text)
        tokens = self.tokens
        if not self.finish_reason:
            end -= self.length_of_a_begun_stop()
            tokens = [token for token in self.tokens if token[2] < end]
        text = self.text[self.taken : end]
        self.taken = max(self.taken, end)
        self.tokens = self.tokens[len(tokens) :]
        return text, tokens

    def length_of_a_begun_stop(self):
        """How many characters at the end may be the start of a stop string."""
        longest = max(map(len, self.stops), default=0)
        for length in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stops):
                return length
        return 0


# -----------------------------------------------------------------------------
# requests


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_integer(x):
    return isinstance(x, int) and not isinstance(x, bool)


def is_stop(x):
    texts = [x] if isinstance(x, str) else x
    if not isinstance(texts, list) or len(texts) > 4:
        return False
    return all(isinstance(text, str) and text for text in texts)


STREAM_OPTIONS = {"include_usage", "include_obfuscation"}
POSITIVE = ("an integer, at least 1", lambda x: is_integer(x) and 1 <= x < 2**31)
BOOL = ("true or false", lambda x: isinstance(x, bool))
ANY = ("", lambda x: True)

# The fields of a request: what each must be, in words and as a test. null: as if it were left out.
FIELDS = {
    "model": ("text", lambda x: isinstance(x, str)),
    "n": (f"an integer from 1 to {MAX_ANSWERS}", lambda x: is_integer(x) and 1 <= x <= MAX_ANSWERS),
    "max_tokens": POSITIVE,
    "max_completion_tokens": POSITIVE,
    "temperature": (
        "0, or a number from 0.001 to 2", lambda x: is_number(x) and (x == 0 or 0.001 <= x <= 2)),
    "top_p": ("a number above 0 and at most 1", lambda x: is_number(x) and 0 < x <= 1),
    "seed": ("an integer of 64 bits", lambda x: is_integer(x) and -(2**63) <= x < 2**63),
    "stop": ("a text, or a list of at most 4, none of them empty", is_stop),
    "stream": BOOL,
    "stream_options": (
        "an object with include_usage", lambda x: isinstance(x, dict) and set(x) <= STREAM_OPTIONS),
    "user": ANY,
    "metadata": ANY,
}
CHAT_FIELDS = {**FIELDS, "messages": ANY, "logprobs": BOOL}
COMPLETION_FIELDS = {
    **FIELDS,
    "prompt": ANY,
    "logprobs": ("0: only the tokens of the answer have one", lambda x: is_integer(x) and x == 0),
}
# What clients send along, and the only values of it that are supported: those without effect.
WITHOUT_EFFECT = {
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "store": [False],
    "suffix": [""],
    "tools": [[]],
    "top_logprobs": [0],
}


def bad(message, code=None):
    return ApiError(400, message, code)


def parse_json(body):
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON ({utils.first_line(error)})") from None
    if not isinstance(fields, dict):
        raise bad("the body must be a JSON object")
    return {name: value for name, value in fields.items() if value is not None}


def check_fields(fields, known):
    """Raises ApiError for a field of a request that cannot be done as it is written."""
    for name, value in fields.items():
        if name in known:
            words, holds = known[name]
            if not holds(value):
                raise bad(f"{name} must be {words}")
        elif name not in WITHOUT_EFFECT:
            raise bad(f"unknown field {name[:60]!r}")
        elif value not in WITHOUT_EFFECT[name]:
            raise bad(f"{name} is not supported")


def joined_parts(message):
    """A message whose content may be a list of texts, as one text."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise bad("messages: a part of a content that is not text is not supported")
        texts.append(check_text("text", part.get("text")))
    return {**message, "content": "".join(texts)}


def read_messages(value):
    """A conversation as [{"role", "content"}]."""
    try:
        if not isinstance(value, list):
            raise bad("messages must be a list of messages")
        messages = []
        for message in check_messages("messages", list(map(joined_parts, value))):
            role = message["role"]
            if role == "developer":
                role = "system"
            if role not in ("system", "user", "assistant"):
                raise bad("messages: a role must be system, user or assistant")
            messages.append({"role": role, "content": message["content"]})
        return messages
    except ValueError as error:
        raise bad(str(error)) from None


def chat_prompts(model, fields):
    """[token ids] of a conversation."""
    messages = read_messages(fields.get("messages"))
    try:
        text = data.render(messages, model.template, model.tokenizer)
    except UserError as error:  # a chat template that refuses it
        raise bad(str(error)) from None
    return [model.encode(text, model.template)]


def check_number_of_answers(model, n):
    if n > model.max_answers:
        raise bad(f"a request may have at most {model.max_answers} answers")


def completion_prompts(model, fields):
    """[token ids] of each prompt: a text, token ids, or a list of either."""
    prompt = fields.get("prompt")
    is_list = isinstance(prompt, list) and len(prompt) > 0
    if not is_list or is_integer(prompt[0]):
        prompt = [prompt]
    check_number_of_answers(model, len(prompt))
    prompts = []
    for item in prompt:
        if isinstance(item, str):
            try:
                prompts.append(model.encode(check_text("prompt", item), ""))
            except ValueError as error:
                raise bad(str(error)) from None
        elif isinstance(item, list) and item and all(map(is_integer, item)):
            V = model.engine.decoder.config.vocab_size
            if min(item) < 0 or max(item) >= V:
                raise bad(f"prompt: a token id is outside the vocabulary of {V}")
            prompts.append(item)
        else:
            raise bad("prompt must be a text, a list of token ids, or a list of either")
    return prompts


@dataclass
class Request:
    model: Model
    prompts: list            # token ids of each prompt
    answers: list            # Answers: n for the first prompt, n for the second, ...
    texts: list              # a Text for each of them
    news: queue.SimpleQueue
    logprobs: bool           # whether they are wanted
    stream: bool
    stream_usage: bool       # whether the stream ends with the counts of tokens
    completion_tokens: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: secrets.token_hex(12))


def read_request(kind, fields, served, cfg):
    """A Request, from the fields of a body. kind: CHAT or COMPLETION. served: {name: Model}."""
    check_fields(fields, kind.fields)
    name = fields.get("model", cfg.model)
    if name not in served:
        message = f"there is no model {name[:200]!r}; there is {', '.join(served)}"
        raise ApiError(404, message, "model_not_found")
    model = served[name]
    prompts = kind.prompts(model, fields)
    n = fields.get("n", 1)
    check_number_of_answers(model, len(prompts) * n)

    asked = fields.get("max_completion_tokens", fields.get("max_tokens"))
    longest = max(map(len, prompts))
    least = asked or 1
    if longest + least > model.max_len:
        message = (
            f"a prompt of {longest} tokens and an answer of {least} exceed the context of "
            f"{model.max_len} tokens; shorten one of them")
        raise bad(message, "context_length_exceeded")
    max_new_tokens = asked or min(cfg.max_new_tokens, model.max_len - longest)

    temperature = float(fields.get("temperature", cfg.temperature))
    top_p = float(fields.get("top_p", cfg.top_p))
    sampling = (temperature, cfg.top_k, top_p)
    seed = fields.get("seed", secrets.randbits(62))
    stops = fields.get("stop", [])
    if isinstance(stops, str):
        stops = [stops]
    news = queue.SimpleQueue()
    answers = []
    texts = []
    for index, key in enumerate(row_keys(seed, len(prompts) * n).tolist()):
        prompt = prompts[index // n]
        answers.append(Answer(index, prompt, key, max_new_tokens, sampling, news))
        texts.append(Text(model.decode, stops, kind.skip(model)))
    return Request(
        model=model,
        prompts=prompts,
        answers=answers,
        texts=texts,
        news=news,
        logprobs=fields.get("logprobs", False) is not False,
        stream=fields.get("stream", False),
        stream_usage=fields.get("stream_options", {}).get("include_usage", False) is True,
    )


def receive(request, check_client):
    """Waits for the tokens of a request's answers. Yields (index, new text, its tokens, reason why
    the answer ends or None). check_client() is called often; it raises when the client has gone."""
    eos_ids = request.model.engine.eos_ids
    unfinished = set(range(len(request.answers)))
    while unfinished:
        check_client()
        try:
            news = request.news.get(timeout=0.5)
        except queue.Empty:
            continue
        if isinstance(news, ApiError):
            raise news
        index, tokens, logprobs, ended = news
        if index not in unfinished:
            continue  # it had come to a stop string
        text = request.texts[index]
        for token, logprob in zip(tokens, logprobs):
            request.completion_tokens += 1
            if not math.isfinite(logprob):
                raise ApiError(500, "the model's log-probabilities are NaN or infinite")
            if token in eos_ids:
                text.finish("stop")
                break
            text.add(token, logprob)
            if text.finish_reason:
                break
        if ended and not text.finish_reason:
            text.finish("length")
        if text.finish_reason:
            request.answers[index].unwanted = True
            unfinished.remove(index)
        new_text, new_tokens = text.take()
        if new_text or new_tokens or text.finish_reason:
            yield index, new_text, new_tokens, text.finish_reason


# -----------------------------------------------------------------------------
# replies


class CHAT:
    """/v1/chat/completions"""

    fields = CHAT_FIELDS
    prompts = staticmethod(chat_prompts)
    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    @staticmethod
    def skip(model):
        return data.separator(model.template)

    @staticmethod
    def choice(text):
        return {"message": {"role": "assistant", "content": text}}

    @staticmethod
    def chunk(text, is_first):
        if is_first:
            return {"delta": {"role": "assistant", "content": text}}
        return {"delta": {"content": text}}

    @staticmethod
    def logprobs(model, tokens):
        content = []
        for token, logprob, _ in tokens:
            text = model.decode([token])
            is_whole = "\ufffd" not in text  # else a part of a character
            content.append({
                "token": text,
                "logprob": logprob,
                "bytes": list(text.encode()) if is_whole else None,
                "top_logprobs": [],
            })
        return {"content": content, "refusal": None}


class COMPLETION:
    """/v1/completions"""

    fields = COMPLETION_FIELDS
    prompts = staticmethod(completion_prompts)
    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"

    @staticmethod
    def skip(model):
        return ""

    @staticmethod
    def choice(text):
        return {"text": text}

    @staticmethod
    def chunk(text, is_first):
        return {"text": text}

    @staticmethod
    def logprobs(model, tokens):
        return {
            "tokens": [model.decode([token]) for token, _, _ in tokens],
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": None,
            "text_offset": [offset for _, _, offset in tokens],
        }


def usage(request):
    prompt_tokens = sum(map(len, request.prompts))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "total_tokens": prompt_tokens + request.completion_tokens,
    }


def envelope(kind, request, object_name, choices):
    return {
        "id": kind.id_prefix + request.id,
        "object": object_name,
        "created": request.created,
        "model": request.model.name,
        "choices": choices,
    }


def choice(kind, request, index, content, tokens, reason):
    logprobs = None
    if request.logprobs:
        logprobs = kind.logprobs(request.model, tokens)
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


def whole_reply(kind, request, check_client):
    """The reply of a request that is not streamed."""
    n = len(request.answers)
    texts = [""] * n
    tokens = [[] for _ in range(n)]
    reasons = [None] * n
    for index, new_text, new_tokens, reason in receive(request, check_client):
        texts[index] += new_text
        tokens[index] += new_tokens
        reasons[index] = reason
    choices = []
    for index in range(n):
        content = kind.choice(texts[index])
        choices.append(choice(kind, request, index, content, tokens[index], reasons[index]))
    return envelope(kind, request, kind.object_name, choices) | {"usage": usage(request)}


def chunks(kind, request, check_client):
    """The objects of a reply that is streamed."""
    begun = set()
    for index, new_text, new_tokens, reason in receive(request, check_client):
        content = kind.chunk(new_text, index not in begun)
        begun.add(index)
        choices = [choice(kind, request, index, content, new_tokens, reason)]
        yield envelope(kind, request, kind.chunk_name, choices)
    if request.stream_usage:
        yield envelope(kind, request, kind.chunk_name, []) | {"usage": usage(request)}


# -----------------------------------------------------------------------------
# votes


def wilson_interval(share, n):
    """95% confidence interval of a share of n (Wilson 1927)."""
    z = 1.96
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return (middle - half) / scale, (middle + half) / scale


class Votes:
    """Votes on answers of two models, in a file that reward.py trains on: a pair for each, or where
    none is better, a ranking with a tie, which it counts and leaves out. `models` in a row names
    the models of the two answers, in their order."""

    def __init__(self, path, names):
        self.path = Path(path)
        self.names = list(names)
        self.wins = {name: 0 for name in names}
        self.ties = 0
        self.lock = threading.Lock()
        self.ends_in_line = True
        try:
            self.file = open(self.path, "a+", encoding="utf-8")
            self.file.seek(0)
            text = self.file.read()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--votes {path}: it cannot be read and written ({reason})") from None
        self.ends_in_line = text == "" or text.endswith("\n")
        for _, row in read_json_lines(str(path), text.split("\n")):
            self.count(row)

    def count(self, row):
        """Adds a row to the counts, if it compares these two models."""
        if not isinstance(row, dict) or not isinstance(row.get("models"), list):
            return
        compared = row["models"]
        if sorted(map(str, compared)) != sorted(self.names):
            return
        if "chosen" in row:
            self.wins[compared[0]] += 1
        else:
            self.ties += 1

    def add(self, fields):
        """A vote as the page sends it: prompt (messages), answers and models of the two sides, vote
        (left, right, tie)."""
        answers = fields.get("answers")
        compared = fields.get("models")
        vote = fields.get("vote")
        for two in (answers, compared):
            is_list = isinstance(two, list) and len(two) == 2
            if not is_list or not all(isinstance(x, str) for x in two):
                raise bad("answers and models must be lists of two texts")
        if sorted(compared) != sorted(self.names):
            raise bad(f"models must be {' and '.join(self.names)}")
        row = {"prompt": read_messages(fields.get("prompt"))}
        if vote == "tie":
            row |= {"answers": answers, "ranks": [1, 1]}
        elif vote == "left":
            row |= {"chosen": answers[0], "rejected": answers[1]}
        elif vote == "right":
            row |= {"chosen": answers[1], "rejected": answers[0]}
            compared = compared[::-1]
        else:
            raise bad("vote must be left, right or tie")
        row["models"] = compared
        with self.lock:
            self.write(row)
            self.count(row)

    def write(self, row):
        line = json.dumps(row) + "\n"
        if not self.ends_in_line:
            line = "\n" + line
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            problem = utils.disk_problem(self.path.absolute().parent, error)
            message = f"the vote is lost: {self.path} cannot be written, {problem}"
            raise ApiError(500, message) from None
        self.ends_in_line = True

    def summary(self):
        """The counts, and how often the first model wins; a tie is half a win."""
        first = self.names[0]
        n = sum(self.wins.values()) + self.ties
        out = {"wins": self.wins, "ties": self.ties}
        if n:
            share = (self.wins[first] + self.ties / 2) / n
            low, high = wilson_interval(share, n)
            out |= {"model": first, "win_rate": share, "low": low, "high": high}
        return out


# -----------------------------------------------------------------------------
# HTTP


class Handler(BaseHTTPRequestHandler):
    """One connection. self.server: a Server."""

    protocol_version = "HTTP/1.1"
    server_version = "flatRLHF"
    sys_version = ""
    timeout = TIMEOUT
    disable_nagle_algorithm = True  # else the parts of a stream come in lumps

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.respond()

    def do_POST(self):
        self.respond()

    def respond(self):
        """Finds the function for this path, and turns errors into replies."""
        routes = {
            "GET /": self.get_page,
            "GET /v1/models": self.get_models,
            "POST /v1/chat/completions": lambda body: self.answer(CHAT, body),
            "POST /v1/completions": lambda body: self.answer(COMPLETION, body),
        }
        if self.server.votes:
            routes["GET /votes"] = self.get_votes
            routes["POST /votes"] = self.post_vote
        try:
            body = self.read_body()
            self.check_site()
            route = f"{self.command} {self.path.partition('?')[0]}"
            if route not in routes:
                message = f"there is no {route[:200]}; there is {', '.join(routes)}"
                raise ApiError(404, message, "unknown_url")
            if route != "GET /":
                self.check_key()
            routes[route](body)
        except ApiError as error:
            self.send_api_error(error)
        except OSError:  # the client has gone, or it neither sends nor reads for too long
            self.close_connection = True

    def read_body(self):
        length = self.headers.get("Content-Length", "0")
        is_count = length.isdecimal() and len(length) < 16
        if "Transfer-Encoding" in self.headers or not is_count:
            self.close_connection = True
            raise ApiError(411, "a body needs its length in Content-Length")
        if int(length) > MAX_BODY:
            self.close_connection = True
            raise ApiError(413, f"the body is longer than {MAX_BODY} bytes")
        return self.rfile.read(int(length))

    def check_site(self):
        """Without a key, what a browser sends for a page of another site is refused: that page
        could vote, or under a name that it has pointed to 127.0.0.1 (DNS rebinding), read."""
        host = self.headers.get("Host", "localhost")
        origin = self.headers.get("Origin", f"http://{host}")
        is_local = host.partition(":")[0] in NO_KEY_HOSTS
        if not self.server.api_key and (origin != f"http://{host}" or not is_local):
            message = "this is for pages and programs of this machine; else start it with --api-key"
            raise ApiError(403, message)

    def check_key(self):
        key = self.server.api_key
        given = self.headers.get("Authorization", "")
        if key and not hmac.compare_digest(given.encode("latin-1"), f"Bearer {key}".encode()):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")

    def check_client(self):
        """Raises OSError if the client has closed the connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError

    # ---- replies ----

    def send(self, status, content, kind="application/json", more=()):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in more:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_json(self, value, status=200):
        self.send(status, json.dumps(value).encode())

    def send_api_error(self, error):
        try:
            self.send_json(error.body(), error.status)
        except OSError:
            self.close_connection = True

    def send_error(self, code, message=None, explain=None):
        """What http.server itself finds wrong with a request."""
        self.close_connection = True
        self.send_api_error(ApiError(int(code), message or "not a request of HTTP"))

    # ---- routes ----

    def get_page(self, body):
        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; frame-ancestors 'none'")
        more = [("Content-Security-Policy", policy), ("Cache-Control", "no-cache")]
        self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8", more)

    def get_models(self, body):
        found = []
        for model in self.server.served.values():
            found.append({
                "id": model.name, "object": "model", "created": self.server.created,
                "owned_by": "flatRLHF",
            })
        self.send_json({"object": "list", "data": found})

    def get_votes(self, body):
        self.send_json(self.server.votes.summary())

    def post_vote(self, body):
        self.server.votes.add(parse_json(body))
        self.send_json(self.server.votes.summary())

    def answer(self, kind, body):
        request = read_request(kind, parse_json(body), self.server.served, self.server.cfg)
        self.server.scheduler.submit(request.model, request.answers)
        try:
            if request.stream:
                self.stream(chunks(kind, request, self.check_client))
            else:
                self.send_json(whole_reply(kind, request, self.check_client))
        finally:
            for answer in request.answers:
                answer.unwanted = True

    def stream(self, objects):
        """Sends objects as server-sent events. The end of the connection is that of the reply."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for value in objects:
                self.send_event(json.dumps(value))
            self.send_event("[DONE]")
        except ApiError as error:
            self.send_event(json.dumps(error.body()))

    def send_event(self, text):
        self.wfile.write(f"data: {text}\n\n".encode())


class Server(ThreadingHTTPServer):
    """Listens from the start, so that a port in use is found before models are loaded."""

    request_queue_size = 512  # connections that nobody has taken yet
    daemon_threads = True

    def __init__(self, cfg):
        self.cfg = cfg
        self.api_key = cfg.api_key
        self.created = int(time.time())
        self.served = {}       # name: Model
        self.votes = None      # Votes, with --compare
        self.scheduler = None
        try:
            super().__init__((cfg.host, cfg.serve), Handler)
        except OSError as error:
            reason = error.strerror or error
            if error.errno == errno.EADDRINUSE:
                reason = "the port is in use; take another one"
            message = f"--serve {cfg.serve}: cannot listen on {cfg.host}:{cfg.serve} ({reason})"
            raise UserError(message) from None

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()

    def start(self, loaded, max_batch=MAX_BATCH, max_waiting=MAX_WAITING):
        """Builds the engines, and lets their thread begin. loaded: {name: (language model,
        tokenizer, template)}, one or two."""
        share = 1 / len(loaded)
        for name, (lm, tokenizer, template) in loaded.items():
            model = Model(name, lm, tokenizer, template, max_batch, max_waiting, share)
            self.served[name] = model
        if len(loaded) == 2:
            self.votes = Votes(self.cfg.votes, list(loaded))
        self.scheduler = Scheduler(list(self.served.values()), on_error=self.shutdown)
        self.scheduler.start()


def run(server, loaded):
    """Serves until Ctrl-C."""
    server.start(loaded)
    cfg = server.cfg
    names = " and ".join(loaded)
    utils.print0(f"serving {names} at http://{cfg.host}:{server.server_port}; Ctrl-C ends it")
    server.serve_forever()
    time.sleep(1)  # for the connections that are being told of the error
    raise server.scheduler.error
