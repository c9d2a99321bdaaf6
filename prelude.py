"""The specification of flatRLHF: `make test` runs it, `make test-long` with LONG=1 the rest of it.
Sections are in the README's order; each test is one sentence.

Dimension key:  B batch, P prompt, A answer, T = P + A, V vocabulary.
"""
import contextlib
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from multiprocessing import connection
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the hub
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import data
import hybrid_engine
import kernels
import ppo
import reward
import sft
import utils

torch.set_num_threads(1)

HERE = Path(__file__).parent
LONG = bool(os.environ.get("LONG"))
long = pytest.mark.skipif(not LONG, reason="only in make test-long")


def some(few, all_of_them):
    """Parameters of a test that takes long: few for `make test`, all for `make test-long`."""
    return all_of_them if LONG else few


# -----------------------------------------------------------------------------
# tiny models of every family

KINDS = ("llama", "llama3 rope", "yarn", "mistral", "qwen2", "qwen3", "opt", "opt-350m", "gpt2",
         "gpt_neox", "gpt_neox sequential", "bloom")


def tiny_config(kind, **more):
    """The config of a small model of each kind, with a vocabulary of 97."""
    import transformers

    size = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=512)
    llama = dict(size, intermediate_size=100, num_key_value_heads=2)
    opt = dict(size, ffn_dim=100, word_embed_proj_dim=64)
    neox = dict(size, intermediate_size=100, rotary_pct=0.25)
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64)
    llama3 = dict(yarn, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
    window = dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)
    name, entries = {
        "llama": ("Llama", llama),
        "llama3 rope": ("Llama", dict(llama, rope_parameters=llama3)),
        "yarn": ("Llama", dict(llama, rope_parameters=yarn)),
        "mistral": ("Mistral", dict(llama, num_key_value_heads=1, sliding_window=20)),
        "qwen2": ("Qwen2", dict(llama, **window)),
        "qwen3": ("Qwen3", dict(llama, head_dim=32)),
        "opt": ("OPT", opt),
        "opt-350m": ("OPT", dict(opt, word_embed_proj_dim=32, do_layer_norm_before=False)),
        "gpt2": ("GPT2", dict(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=512)),
        "gpt_neox": ("GPTNeoX", neox),
        "gpt_neox sequential": ("GPTNeoX", dict(neox, rotary_pct=1.0, use_parallel_residual=False)),
        # 6 heads: the slopes of ALiBi have a second series past a power of two.
        "bloom": ("Bloom", dict(vocab_size=97, hidden_size=96, n_layer=3, n_head=6)),
    }[kind]
    config = getattr(transformers, name + "Config")(**entries)
    config.update(dict(eos_token_id=5, bos_token_id=1, pad_token_id=0) | more)
    return config


def model_of(kind, seed=0, **more):
    """A model of one of KINDS with random weights, larger than an initialisation, so that no wrong
    layer can hide; "<kind> lora": with adapters that are not zero. more: changes to its config."""
    from transformers import AutoModelForCausalLM

    name, _, lora = kind.partition(" lora")
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny_config(name, **more)).eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.05))
    if kind.endswith(" lora"):
        utils.add_lora(lm, 4)
        for name, p in lm.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1)
    return lm


# -----------------------------------------------------------------------------
# prompts, answers, log-probabilities


def ragged(lengths, vocab=97, seed=0):
    """Random prompts of these lengths, as lists of token ids."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(6, vocab, (n,), generator=g).tolist() for n in lengths]


def rows_of(out):
    """The rows of a Rollout without their padding, as lists of token ids."""
    lengths = (out.prompt_lens + out.answer_lens).tolist()
    return [row[:n].tolist() for row, n in zip(out.tokens, lengths)]


def plain_logprobs(lm, tokens, prompt_len, temperature=1.0):
    """Log-probability of each answer token of one row, by the textbook: a forward of this row."""
    with torch.no_grad():
        logits = lm(torch.tensor([tokens])).logits[0, prompt_len - 1 : -1].double() / temperature
    answer = torch.tensor(tokens[prompt_len:])
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


# -----------------------------------------------------------------------------
# files, engines, runs of scripts


def write_rows(path, rows):
    """A file of JSON lines; returns its path as a string."""
    Path(path).write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def engine_of(lm=None, lr=1e-3, eps=1e-8, micro_batches=1, **flags):
    """A DeepSpeed engine that trains a small policy, in this process."""
    utils.init_distributed(0)
    cfg = sft.Config(**{"dtype": "fp32", **flags})
    lm = lm or model_of("llama")
    for p in lm.parameters():  # not lm.to(), which also rounds buffers
        p.data = p.data.to(utils.dtype_of(cfg.dtype))
    return utils.train_engine(sft.Policy(lm), lr, 2, micro_batches, cfg, eps)


def load_lm(path, dtype=torch.float32, **entries):
    from transformers import AutoModelForCausalLM

    return utils.load_model(AutoModelForCausalLM, str(path), dtype, **entries)


def train(script, out, **flags):
    """Runs a script's main in this process; returns its metrics, one dict per step."""
    script.main(script.Config(out=str(out), **flags))
    return read_lines(Path(out) / "metrics.jsonl")


def as_a_user():
    """The environment without what a launcher of ranks has put there."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in launcher}


def command(*args, stdin=None, cwd=HERE):
    """Runs Python as a user would; returns (exit code, what it printed)."""
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                          cwd=cwd, env=as_a_user(), input=stdin)
    return done.returncode, done.stdout + done.stderr


# -----------------------------------------------------------------------------
# two ranks


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve_calls(rank, port, pipe):
    """What a rank process does: function after function, until it is killed."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    while True:
        function, args, kwargs = pipe.recv()
        try:
            pipe.send((None, function(*args, **kwargs)))
        except BaseException:
            pipe.send((f"rank {rank}: {traceback.format_exc()}", None))


class Ranks:
    """Two gloo ranks that are kept for the whole session, because a start of two processes costs
    six seconds. two(function, ...) returns [result of rank 0, result of rank 1]; the function is
    one of the top level, and puts back what it patches. After a failure or a timeout both are
    started anew."""

    def __init__(self):
        self.ranks = {}  # pipe: process

    def start(self):
        spawn = mp.get_context("spawn")
        port = free_port()
        for rank in range(2):
            pipe, end = spawn.Pipe()
            process = spawn.Process(target=serve_calls, args=(rank, port, end), daemon=True)
            process.start()
            end.close()  # so that the pipe ends with the process
            self.ranks[pipe] = process

    def stop(self):
        for process in self.ranks.values():
            process.kill()
        self.ranks = {}

    def __call__(self, function, *args, timeout=200, **kwargs):
        if not self.ranks:
            self.start()
        for pipe in self.ranks:
            pipe.send((function, args, kwargs))
        results = {}
        while len(results) < 2:
            error = "hangs"
            for pipe in connection.wait(set(self.ranks) - set(results), timeout):
                try:
                    error, results[pipe] = pipe.recv()
                except EOFError:
                    error = "a rank has died"
                if error:
                    break
            if error:
                self.stop()
                pytest.fail(f"{function.__name__}: {error}")
        return [results[pipe] for pipe in self.ranks]


@pytest.fixture(scope="session")
def two():
    ranks = Ranks()
    yield ranks
    ranks.stop()


# -----------------------------------------------------------------------------
# what is made once


@pytest.fixture(scope="session")
def tok():
    return utils.load_tokenizer("tiny")


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory):
    """240 rows of toy in a file: little enough to train on in a second."""
    rows = itertools.islice(data.toy(), 240)
    return write_rows(tmp_path_factory.mktemp("toy") / "toy.jsonl", rows)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A model folder smaller than tiny: 2 layers of 64, with the built-in tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("small")
    config = utils.tiny_config()
    config.update(dict(hidden_size=64, intermediate_size=100, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    utils.load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


COMMON = dict(held_out=0.2, batch_size=8, max_len=64)


@pytest.fixture(scope="session")
def chain(small, toy_file, tmp_path_factory):
    """The three steps, run in this process on 240 rows: {step: (folder, metrics)}."""
    out = tmp_path_factory.mktemp("chain")
    common = dict(COMMON, data=toy_file)
    runs = {}
    runs["sft"] = train(sft, out / "sft", model=small, epochs=0.5, lr=1e-3, **common)
    common["model"] = str(out / "sft")
    runs["reward"] = train(reward, out / "reward", epochs=0.5, lr=2.5e-4, **common)
    runs["ppo"] = train(ppo, out / "ppo", reward=str(out / "reward"), iterations=3, minibatches=2,
                        ppo_epochs=2, max_new_tokens=8, actor_lr=3e-4, critic_lr=1e-3, **common)
    return {step: (str(out / step), metrics) for step, metrics in runs.items()}
