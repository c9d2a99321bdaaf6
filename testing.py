"""What the tests share: tiny models of every family, a textbook version of log-probabilities,
runs of scripts and commands, and processes that act as ranks. No tests are in here.

Import this before torch and triton: it sets environment variables that they read.
"""
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if "FLATRLHF_CACHE" not in os.environ:  # processes that the tests start inherit it
    cache = tempfile.TemporaryDirectory(prefix="flatrlhf-test-")
    os.environ["FLATRLHF_CACHE"] = cache.name
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.multiprocessing as mp

if not torch.cuda.is_available():
    # For test_kernels.py, and for what runs beside it. Triton reads it when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# `make test-long` takes all combinations, and `make test` some of them.
LONG = bool(os.environ.get("FLATRLHF_LONG"))


def some(few, all_of_them):
    """Parameters of a test that takes long: few for `make test`, all for `make test-long`."""
    return all_of_them if LONG else few


HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"
STORIES = str(SHARED / "stories260k")
TEMPLATE = "Human: {prompt}\nAssistant:"
shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the real weights and data of ../shared")


# -----------------------------------------------------------------------------
# tiny models

KINDS = [
    "llama", "llama3 rope", "yarn", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3",
    "gemma2", "opt", "opt-350m", "gpt2", "gpt_neox", "gpt_neox sequential", "bloom",
]


def tiny_config(kind, **more):
    """The config of a small model of each kind, with a vocabulary of 97."""
    import transformers as t

    size = dict(
        vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512)
    llama = dict(size, intermediate_size=100, num_key_value_heads=2)
    llama3_rope = dict(
        rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=64)
    yarn = dict(
        rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64)
    partial = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)

    if kind == "llama":
        config = t.LlamaConfig(**llama)
    elif kind == "llama3 rope":
        config = t.LlamaConfig(**llama, rope_parameters=llama3_rope)
    elif kind == "yarn":
        config = t.LlamaConfig(**llama, rope_parameters=yarn)
    elif kind == "mistral":
        config = t.MistralConfig(**dict(llama, num_key_value_heads=1), sliding_window=20)
    elif kind == "qwen2":
        config = t.Qwen2Config(
            **llama, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    elif kind == "qwen3":
        config = t.Qwen3Config(**llama, head_dim=32)
    elif kind == "smollm3":  # its middle layer has no positions
        config = t.SmolLM3Config(**llama, no_rope_layers=[1, 0, 1])
    elif kind == "olmo2":
        config = t.Olmo2Config(**llama)
    elif kind == "phi3":
        config = t.Phi3Config(**llama, rope_parameters=partial, sliding_window=20)
    elif kind == "gemma2":
        config = t.Gemma2Config(
            **llama, head_dim=16, sliding_window=20, query_pre_attn_scalar=9,
            attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    elif kind == "opt":
        config = t.OPTConfig(**size, ffn_dim=100, word_embed_proj_dim=64)
    elif kind == "opt-350m":
        config = t.OPTConfig(
            **size, ffn_dim=100, word_embed_proj_dim=32, do_layer_norm_before=False)
    elif kind == "gpt2":
        config = t.GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=512)
    elif kind == "gpt_neox":
        config = t.GPTNeoXConfig(**size, intermediate_size=100, rotary_pct=0.25)
    elif kind == "gpt_neox sequential":
        config = t.GPTNeoXConfig(
            **size, intermediate_size=100, rotary_pct=1.0, use_parallel_residual=False)
    elif kind == "bloom":  # 6 heads: the slopes of ALiBi have a second series past a power of two
        config = t.BloomConfig(vocab_size=97, hidden_size=96, n_layer=3, n_head=6)
    else:
        raise AssertionError(f"there is no kind {kind!r}")

    config.update(dict(eos_token_id=5, bos_token_id=1, pad_token_id=0) | more)
    return config


def model_of(kind, seed=0, **more):
    """A model with random weights, larger than an initialisation, so that no wrong layer can hide.

    kind: one of KINDS, or "<kind> lora" for one with adapters that are not zero.
    more: changes to its config.
    """
    from transformers import AutoModelForCausalLM

    if kind.endswith(" lora"):
        return with_adapters(model_of(kind.removesuffix(" lora"), seed, **more))
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny_config(kind, **more)).eval()
    with torch.no_grad():
        for p in lm.parameters():
            scale = 0.1 if p.dim() > 1 else 0.05
            p.add_(torch.randn_like(p) * scale)
    return lm


def with_adapters(lm):
    """Adds LoRA of rank 4, and moves it away from zero, where it starts."""
    import models

    torch.manual_seed(7)
    models.add_lora(lm, "4")
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
# files, scripts, processes


def write_rows(path, rows):
    """A file of JSON lines; returns its path as a string."""
    Path(path).write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def train(script, out, **flags):
    """Runs a script's main in this process; returns its metrics, one dict per step. What another
    run left in the folder is removed."""
    if not flags.get("resume"):
        flags.setdefault("overwrite", True)
    script.main(script.Config(out=str(out), **flags))
    return [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]


def command(*args, stdin=None):
    """Runs a Python script as a user would; returns (exit code, what it printed)."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in launcher}
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True, text=True, cwd=HERE, env=env, input=stdin)
    return done.returncode, done.stdout + done.stderr


def _rank(rank, world, port, folder, function, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else its threads may end the process with an error


def free_port():
    """A port outside the range from which the system gives ports to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def ranks(world, function, *args, timeout=400):
    """function(*args) on so many gloo ranks; returns their results in the order of the ranks."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        spawn = mp.get_context("spawn")
        processes = []
        for rank in range(world):
            arguments = (rank, world, port, folder, function, args)
            processes.append(spawn.Process(target=_rank, args=arguments))
        for p in processes:
            p.start()

        deadline = time.time() + timeout
        while any(p.is_alive() for p in processes) and time.time() < deadline:
            if any(p.exitcode not in (None, 0) for p in processes):
                break
            time.sleep(0.1)
        failed = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0)]
        hanging = [r for r, p in enumerate(processes) if p.is_alive()]
        for p in processes:
            p.kill()
        assert not failed, f"ranks {failed} failed: the traceback is in the output"
        assert not hanging, f"ranks {hanging} hang"
        return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(world)]
