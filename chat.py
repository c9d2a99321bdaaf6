"""Talk to a model in the terminal: the result of sft.py or ppo.py, or any causal LM.

    python chat.py                        # out/ppo, several turns; an empty line ends it
    python chat.py --model out/sft --prompt "reverse apple"       # one answer, then exit
    python chat.py --model facebook/opt-1.3b --max-new-tokens 200 --temperature 0.7
    python chat.py --serve 8000           # in the browser, and for programs: see serve.py

Answers are sampled by the engine that PPO uses, and printed token by token. The whole conversation
is the prompt of the next turn. Ctrl-C ends an answer. Standard output holds the answers and nothing
else.
"""
import contextlib
import importlib
import sys
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal

import torch

import data
import models
import serve
import utils
from hybrid_engine import make_engine
from sources import user


@dataclass(frozen=True)
class Config:
    # chat
    model: str = "out/ppo"         # model folder or hub name to talk to
    prompt: str = ""               # answer this and exit; empty: a conversation
    template: str = ""             # how a prompt is written, such as "Q: {prompt}"; chat: as the
    #   tokenizer's chat template says; empty: as the model was trained
    max_new_tokens: int = 128      # longest answer
    temperature: float = 1.0       # of sampling; 0: always the most likely token
    top_k: int = 0                 # sample from this many most likely tokens; 0: from all
    top_p: float = 1.0             # sample from the fewest tokens with this much probability
    engine: Literal["hybrid", "hf"] = "hybrid"  # what samples: ours or transformers.generate, which
    #   is slower and knows more models
    seed: int = 1                  # of sampling
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU
    #   that computes with it (from Ampere on), else fp32
    # server
    serve: int = 0                 # port of a server: a page, and OpenAI's interface for programs,
    #   which may choose other values than these flags in a request; 0: talk in this terminal
    host: str = "127.0.0.1"        # address to listen on; 0.0.0.0: from all machines, with a key
    api_key: str = ""              # what clients must give; empty: nothing
    compare: str = ""              # a second model: the page shows answers of both, without their
    #   names, and takes votes
    votes: str = "votes.jsonl"     # file that votes are appended to, for reward.py --data

    def __post_init__(self):
        utils.check_values(self)
        data.check_template(self.template)
        serve.check_flags(self)


def find_template(cfg, tokenizer):
    """--template; else the one that the model was trained with, else that of its tokenizer."""
    template = cfg.template
    if not template and not data.template_of_run(cfg.model):
        if tokenizer.chat_template:
            template = "chat"
        else:
            utils.print0(
                f"{cfg.model} does not say how its prompts are written, so they are written as "
                f"{data.DEFAULT_TEMPLATE!r}; a model that was only trained on text goes on with "
                'yours with --template "{prompt}"'
            )
    return data.check_template(template, cfg.model)


# -----------------------------------------------------------------------------
# one turn


def read_line(screen):
    """A line that the user types; empty where there is no more."""
    try:
        if screen.isatty():
            with contextlib.redirect_stdout(screen):  # else input() would do without readline
                return input("Human: ").strip()
        utils.print0("Human: ", end="")
        return input().strip()
    except (EOFError, KeyboardInterrupt):
        utils.print0()
        return ""


def without_bad_bytes(text):
    """Text as UTF-8 has it. Python keeps other bytes as surrogates, which no tokenizer takes."""
    good = text.encode(errors="surrogateescape").decode(errors="replace")
    if good.count("\ufffd") > text.count("\ufffd"):
        utils.print0("(bytes that are not UTF-8 were replaced)")
    return good


def for_terminal(text):
    """Text whose control characters a terminal shows and does not obey."""
    shown = ""
    for character in text:
        if unicodedata.category(character) == "Cc" and character not in "\n\t":
            character = repr(character)[1:-1]
        shown += character
    return shown


def prompt_ids_that_fit(messages, template, tokenizer, context, max_new_tokens):
    """Token ids of the conversation. The oldest turns are removed from `messages` until the ids and
    an answer fit in the model's context."""
    while True:
        text = data.render(messages, template, tokenizer)
        ids = data.prompt_ids([text], template, tokenizer)[0]
        if len(ids) + max_new_tokens <= context:
            return ids
        if len(messages) < 3:
            raise utils.UserError(
                f"a prompt of {len(ids)} tokens and --max-new-tokens {max_new_tokens} exceed the "
                f"model's context of {context}; shorten one of them"
            )
        del messages[:2]
        utils.print0(
            "(the oldest turn was dropped: the conversation is longer than the model's context)"
        )


def answer_texts(engine, tokenizer, ids, cfg, turn):
    """Samples an answer. Yields its text after each token, as far as it is whole characters."""
    tokens = engine.stream(
        ids, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p,
        eos_token_id=tokenizer.eos_token_id, seed=cfg.seed + turn,
    )
    answer_ids = []
    text = ""
    for token in tokens:
        answer_ids.append(token)
        text = tokenizer.decode(answer_ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # else a part of a character: wait for the rest
            yield text
    yield text


def show(text, screen):
    if screen.isatty():
        text = for_terminal(text)
    try:
        print(text, end="", file=screen, flush=True)
    except OSError as error:
        message = f"standard output cannot be written to ({error.strerror})"
        raise utils.UserError(message) from None


def print_answer(texts, screen):
    """Prints an answer as it comes. Returns its text, and whether Ctrl-C has ended it."""
    printed = ""
    interrupted = False
    try:
        with contextlib.redirect_stdout(None):  # not what the engine says of its memory
            for text in texts:
                show(text[len(printed) :], screen)
                printed = text
    except KeyboardInterrupt:
        interrupted = True
    show("\n", screen)
    return printed.strip(), interrupted


# -----------------------------------------------------------------------------
# the conversation


def load(cfg):
    """(language model, tokenizer, template) of --model."""
    utils.quiet_transformers()
    tokenizer = models.load_tokenizer(cfg.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = models.load_lm(cfg.model, utils.dtype_of(cfg.dtype)).eval().to(device)
    return lm, tokenizer, find_template(cfg, tokenizer)


def serve_models(cfg):
    """--serve, for --model and --compare."""
    server = serve.Server(cfg)
    loaded = {}
    for name in filter(None, (cfg.model, cfg.compare)):
        loaded[name] = load(replace(cfg, model=name, compare=""))
    serve.run(server, loaded)


def converse(cfg, screen):
    """All turns, or the one of --prompt. screen: standard output."""
    lm, tokenizer, template = load(cfg)
    engine = make_engine(cfg.engine, lm)
    context = models.context_length(lm.config)

    messages = []
    turn = 0
    while True:
        text = without_bad_bytes(cfg.prompt or read_line(screen))
        if not text:
            return
        messages += user(text)
        ids = prompt_ids_that_fit(messages, template, tokenizer, context, cfg.max_new_tokens)
        if not cfg.prompt:
            utils.print0("Assistant: ", end="")
        texts = answer_texts(engine, tokenizer, ids, cfg, turn)
        answer, interrupted = print_answer(texts, screen)
        if cfg.prompt:
            if interrupted:
                raise KeyboardInterrupt
            return
        messages.append({"role": "assistant", "content": answer})
        turn += 1


def main(cfg):
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # from now on, input() knows the arrow keys
    screen = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answers
        if cfg.serve:
            serve_models(cfg)
        else:
            converse(cfg, screen)


if __name__ == "__main__":
    utils.run(main, Config)
