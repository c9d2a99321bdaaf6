"""Talk to a model in the terminal: the result of sft.py or ppo.py, or any causal LM.

    python chat.py                        # out/ppo, several turns; an empty line ends it
    python chat.py --model out/sft --prompt "reverse apple"       # one answer, then exit
    python chat.py --model facebook/opt-1.3b --max-new-tokens 200 --temperature 0.7

Answers are sampled by the engine that PPO uses, and printed token by token. The whole conversation
is the prompt of the next turn.
"""
from dataclasses import dataclass
from typing import Literal

import torch

import data
import models
import utils
from hybrid_engine import make_engine
from sources import user


@dataclass(frozen=True)
class Config:
    # chat
    model: str = "out/ppo"         # model folder or hub name to talk to
    prompt: str = ""               # answer this and exit; empty: a conversation
    template: str = "Human: {prompt}\nAssistant:"  # how a prompt is written; chat: the tokenizer's
    #   own chat template
    max_new_tokens: int = 128      # longest answer
    temperature: float = 1.0       # of sampling; 0: always the most likely token
    top_k: int = 0                 # sample from this many most likely tokens; 0: from all
    top_p: float = 1.0             # sample from the fewest tokens with this much probability
    engine: Literal["hybrid", "hf"] = "hybrid"  # what samples: ours or transformers.generate, which
    #   is slower and knows more models
    seed: int = 1                  # of sampling
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU, else fp32


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
        print("(the oldest turn was dropped: the conversation is longer than the model's context)")


def print_answer(engine, tokenizer, ids, cfg, turn):
    """Samples an answer and prints it as it comes. Returns its text."""
    tokens = engine.stream(
        ids, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p,
        eos_token_id=tokenizer.eos_token_id, seed=cfg.seed + turn,
    )
    answer_ids, printed = [], ""
    for token in tokens:
        answer_ids.append(token)
        text = tokenizer.decode(answer_ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            continue  # part of a character: wait for the rest
        print(text[len(printed) :], end="", flush=True)
        printed = text
    print()
    return printed.strip()


def main(cfg):
    utils.quiet_transformers()
    template = data.check_template(cfg.template, cfg.model)
    tokenizer = models.load_tokenizer(cfg.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = models.load_lm(cfg.model, utils.dtype_of(cfg.dtype)).eval().to(device)
    engine = make_engine(cfg.engine, lm)
    context = models.context_length(lm.config)

    messages, turn = [], 0
    while True:
        text = cfg.prompt
        if not text:
            try:
                text = input("Human: ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
        if not text:
            return
        messages += user(text)
        ids = prompt_ids_that_fit(messages, template, tokenizer, context, cfg.max_new_tokens)
        if not cfg.prompt:
            print("Assistant: ", end="", flush=True)
        answer = print_answer(engine, tokenizer, ids, cfg, turn)
        if cfg.prompt:
            return
        messages.append({"role": "assistant", "content": answer})
        turn += 1


if __name__ == "__main__":
    utils.run(main, Config)
