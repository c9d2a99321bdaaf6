"""Talk to a model in the terminal: the result of sft.py or ppo.py, or any causal LM.

    python chat.py                        # out/ppo, a prompt per line; an empty line ends it
    python chat.py --prompt "reverse lamu"                # one answer, then exit
    python chat.py --compare out/sft      # the answers of two models to each prompt
    python chat.py --model meta-llama/Llama-3.2-1B-Instruct --turns --max-new-tokens 200

Answers are sampled by PPO's engine, and printed token by token; Ctrl-C ends one. With --prompt,
standard output holds the answer and nothing else.
"""
import contextlib
import itertools
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import data
import utils
from hybrid_engine import make_engine
from sft import Policy


@dataclass(frozen=True)
class Config:
    model: str = "out/ppo"         # model folder or hub name to talk to
    compare: str = ""              # a second one, which answers the same prompts
    prompt: str = ""               # answer this and exit
    turns: bool = False            # each line goes on with the conversation, and is no new one
    max_new_tokens: int = 128      # longest answer
    temperature: float = 1.0       # of sampling; 0: always the most likely token
    top_k: int = 0                 # sample from this many most likely tokens; 0: from all
    top_p: float = 1.0             # sample from the fewest tokens with this much probability
    engine: Literal["hybrid", "hf"] = "hybrid"  # what samples: ours or transformers.generate
    seed: int = 1                  # of sampling
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 where a GPU has it


def trained_on_turns(folder):
    """Whether the first rows of what the run of this folder was trained on have several turns. A
    model that was trained on single prompts writes noise from the second turn on."""
    run = Path(folder, "run.json")
    flags = json.loads(run.read_text())["config"] if run.exists() else {"data": ""}
    source, _ = data.parse_sources(flags["data"])[0]
    rows = data.read_examples(source, []) if Path(source).is_file() else ()
    return any(len(row.messages) > 2 for _, row in itertools.islice(rows, 100))


class Speaker:
    """A model, its tokenizer, and what was said so far."""

    def __init__(self, name, cfg):
        self.name, self.cfg = name, cfg
        self.tokenizer = utils.load_tokenizer(name)
        lm = utils.load_model(AutoModelForCausalLM, name, utils.dtype_of(cfg.dtype), self.tokenizer)
        self.ends = utils.end_ids(self.tokenizer, lm)
        lm.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.engine = make_engine(cfg.engine, Policy(lm))
        self.turns = cfg.turns or trained_on_turns(name)
        self.messages = []

    def token_ids(self, prompt, seed):
        """The ids of an answer; the hybrid engine yields them as they are sampled."""
        n, temperature = self.cfg.max_new_tokens, self.cfg.temperature
        if self.cfg.engine == "hf":
            out = self.engine.generate([prompt], n, temperature, self.ends, seed)
            return out.tokens[0, len(prompt) :].tolist()
        return self.engine.stream(prompt, n, temperature, self.cfg.top_k, self.cfg.top_p, self.ends,
                                  seed)

    def answer(self, text, seed, screen):
        """Prints the answer to a text as it comes."""
        self.messages = self.messages * self.turns + [{"role": "user", "content": text}]
        rendered = data.render(self.tokenizer, self.messages)
        prompt = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        ids = []
        said = ""
        with contextlib.suppress(KeyboardInterrupt):
            for token in self.token_ids(prompt, seed):
                ids.append(token)
                now = self.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
                if not now.endswith("\ufffd"):  # else a part of a character: wait for the rest
                    print(now[len(said) :], end="", file=screen, flush=True)
                    said = now
        print(file=screen)
        self.messages.append({"role": "assistant", "content": said.strip()})


def main(cfg):
    logging.disable_progress_bar()
    screen = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what is said while a model is loaded
        speakers = [Speaker(name, cfg) for name in (cfg.model, cfg.compare) if name]
    lines = [cfg.prompt] if cfg.prompt else iter(partial(input, "Human: "), "")
    with contextlib.suppress(EOFError):
        for turn, text in enumerate(lines):
            for speaker in speakers:
                label = speaker.name if cfg.compare else "" if cfg.prompt else "Assistant"
                print(label and f"{label}: ", end="", file=screen, flush=True)
                speaker.answer(text, cfg.seed + turn, screen)


if __name__ == "__main__":
    utils.run(main, Config)
