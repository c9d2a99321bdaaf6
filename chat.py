"""Talk to a model folder in the terminal: the output of any step that writes a policy, or any causal LM.

    python chat.py                                                    # out/ppo, a conversation of several turns; an empty line ends it
    python chat.py --model out/sft --prompt "reverse apple"           # one answer, then exit
    python chat.py --model facebook/opt-1.3b --max-new-tokens 200 --temperature 0.7

Answers are sampled by the engine that PPO uses, and printed as they come. The whole conversation is the prompt of the next turn.
"""
from dataclasses import dataclass
from typing import Literal

import torch

import data
import models
import utils
from hybrid_engine import make_engine


@dataclass(frozen=True)
class Config:
    model: str = "out/ppo"             # model folder or hub name to talk to
    prompt: str = ""                   # answer this and exit; empty: a conversation
    template: str = "Human: {prompt}\nAssistant:"  # how a prompt is written; chat: the tokenizer's own chat template
    max_new_tokens: int = 128          # longest answer
    temperature: float = 1.0           # of sampling; 0: always the likeliest token
    top_k: int = 0                     # sample from this many likeliest tokens; 0: from all
    top_p: float = 1.0                 # sample from the fewest tokens with this much probability
    engine: Literal["hybrid", "hf"] = "hybrid"  # what samples: ours, or transformers.generate (any model, slower)
    seed: int = 1                      # of sampling
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU, fp32 on a CPU


def answer(engine, tokenizer, messages, template, cfg, turn):
    """Streams one answer to the terminal; returns its text."""
    context = models.context_length(engine.module.config)
    while True:
        ids = data.prompt_ids([data.render(messages, template, tokenizer)], template, tokenizer)[0]
        if len(ids) + cfg.max_new_tokens <= context:
            break
        if len(messages) < 3:
            raise utils.UserError(f"a prompt of {len(ids)} tokens and --max-new-tokens {cfg.max_new_tokens} are more than the model's "
                                  f"context of {context}; shorten one of them")
        del messages[:2]  # the oldest turn no longer fits: forget it
        print("(the oldest turn is forgotten: the conversation is longer than the model's context)")
    said, shown = [], ""
    for token in engine.stream(ids, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, tokenizer.eos_token_id, cfg.seed + turn):
        said.append(token)
        text = tokenizer.decode(said, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return shown.strip()


def main(cfg):
    utils.quiet()
    template = data.check_template(cfg.template, cfg.model)
    tokenizer = models.load_tokenizer(cfg.model)
    lm = models.load_lm(cfg.model, utils.precision(cfg.dtype)).eval()
    engine = make_engine(cfg.engine, lm.to("cuda" if torch.cuda.is_available() else "cpu"))
    if cfg.prompt:
        answer(engine, tokenizer, data.user(cfg.prompt), template, cfg, 0)
        return
    messages, turn = [], 0
    while True:
        try:
            text = input("Human: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text:
            return
        messages += data.user(text)
        print("Assistant: ", end="", flush=True)
        messages += [{"role": "assistant", "content": answer(engine, tokenizer, messages, template, cfg, turn)}]
        turn += 1


if __name__ == "__main__":
    utils.run(main, Config)
