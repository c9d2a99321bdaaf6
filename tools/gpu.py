"""Checks and measures the project on one GPU; tools/gpu.sh runs it.

    python -m tools.gpu OUT machine parity bandwidth decode:opt-1.3b

A section is a function below, for some with a model. Every result is a line of OUT/gpu.jsonl at
once, and after a section that fails the next one runs: what ends early loses only what comes after
it. TINY=1 takes tiny shapes, for a rehearsal on a CPU.
"""
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers

import ppo
import utils
from hybrid_engine import HybridEngine
from tools import bench
from tools.bench import CUDA, DEVICE

TINY = bool(os.environ.get("TINY"))
P = A = 16 if TINY else 256  # tokens of prompts and answers
BATCHES = (1, 3) if TINY else (1, 32, 128)
ROWS = BATCHES[1]

SMALL = "vocab_size=211,hidden_size=64,num_hidden_layers=3,num_attention_heads=4"
LLAMA = f"{SMALL},intermediate_size=128,num_key_value_heads=2"
FAMILIES = {
    "opt": f"opt:{SMALL},ffn_dim=128,word_embed_proj_dim=64",
    "llama": f"llama:{LLAMA}",
    "mistral": f"mistral:{LLAMA},sliding_window=32",
    "gpt2": f"gpt2:{SMALL}",
    "qwen3": f"qwen3:{LLAMA},head_dim=32",
    "gpt_neox": f"gpt_neox:{SMALL},intermediate_size=128",
    "bloom": f"bloom:{SMALL}",
}


def write(**row):
    with open(OUT / "gpu.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    print("  ", *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


def timed(function, *args, **kwargs):
    """Seconds that a call takes, and what it returns. Each of these waits for the GPU itself."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def prompts(lengths, V):
    return [torch.randint(V // 32, V, (n,)).tolist() for n in lengths]


def shape(name):
    """The name of a model; in a rehearsal a tiny one in its place."""
    family = "opt" if name.startswith("opt") else "llama"
    return FAMILIES[family].replace("vocab_size=211", "vocab_size=512") if TINY else name


def build(name):
    return bench.build(shape(name), torch.bfloat16 if CUDA else torch.float32)


# -----------------------------------------------------------------------------
# the first command: is it right, how fast are generation and PPO


def machine():
    import triton

    write(section="machine", device=bench.device_name(), python=sys.version,
          versions=[m.__version__ for m in (torch, triton, transformers)])


def own_logprobs(model, out, i, temperature):
    """The answer of row i by a forward of the model itself."""
    p, a = int(out.prompt_lens[i]), int(out.answer_lens[i])
    tokens = out.tokens[i, : p + a]                                                 # (T,)
    logits = model(tokens[None]).logits[0, p - 1 : -1].float() / temperature        # (a, V)
    return logits.log_softmax(-1).gather(1, tokens[p:, None])[:, 0]


@torch.no_grad()
def parity():
    """float32: greedy tokens are those of transformers, and graphs replay what eager steps compute.
    bfloat16: log-probabilities are near those of the model's own forward."""
    lengths = (1, 3, 17, 17, 40, 90)
    for family, name in FAMILIES.items():
        model = bench.build(name, torch.float32)
        for p in model.parameters():  # larger than an initialisation: no wrong layer can hide
            p.add_(torch.randn_like(p), alpha=0.05)
        P = prompts(lengths, 211)
        out = HybridEngine(model).generate(P, 40, temperature=0.0, eos_token_id=5)
        wrong = 0
        for i, prompt in enumerate(P):
            ids = torch.tensor([prompt], device=DEVICE)
            want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40,
                                  do_sample=False, eos_token_id=5, pad_token_id=1)[0]
            n = int(out.prompt_lens[i] + out.answer_lens[i])
            wrong += out.tokens[i, :n].tolist() != want.tolist()
        eager = HybridEngine(model, max_batch=3)
        eager.use_graphs = False
        a = HybridEngine(model).generate(P, 40, seed=3)
        b = eager.generate(P, 40, seed=3)
        model = model.bfloat16()
        c = HybridEngine(model).generate(P, 40, temperature=0.7, seed=3)
        gaps = [(own_logprobs(model, c, i, 0.7) - c.logprobs[i]).abs() for i in range(len(P))]
        gaps = torch.cat(gaps)
        write(section="parity", family=family, wrong_rows=wrong, of=len(P),
              graph_is_eager=torch.equal(a.tokens, b.tokens),
              bf16_gap_mean=gaps.mean().item(), bf16_gap_max=gaps.max().item())


def bandwidth():
    """Of copies of random data, read and written."""
    x = torch.randn(2**20 if TINY else 2**29, device=DEVICE)
    y = torch.empty_like(x)
    turns = bench.alternate({"copy": lambda turn: y.copy_(x)}, 5)["copy"]
    seconds = sorted(seconds for seconds, _ in turns)[2]
    write(section="bandwidth", gb_per_s=2 * x.nbytes / seconds / 1e9)


def measure(name, engine, batch, prompt_len=P, new_tokens=A):
    """Three rollouts of one shape; the first one compiles kernels and captures a graph."""
    rows = prompts([prompt_len] * batch, engine.decoder.config.vocab_size)
    for turn in (1, 2, 3):
        seconds, _ = timed(engine.generate, rows, new_tokens, seed=1)
        stats, cache = engine.stats, engine.cache
        # A step reads all weights, and the keys and values of all rows, on average at half length.
        per_token = cache.bytes / len(cache.slots) / cache.capacity
        read = engine.decoder.weight_bytes + batch * (prompt_len + new_tokens / 2) * per_token
        step = stats["decode_s"] / stats["decode_steps"]
        write(section="decode", model=name, batch=batch, turn=turn, seconds=seconds,
              tokens_per_s=batch * new_tokens / seconds, ms_per_step=1e3 * step,
              prefill_s=stats["prefill_s"], gb_per_s=read / step / 1e9)


def measure_transformers(name, model, function, batch):
    rows = prompts([P] * batch, model.config.vocab_size)
    for turn in (1, 2):
        seconds, tokens = timed(function, model, rows, A, None)
        write(section=function.__name__, model=name, batch=batch, turn=turn, tokens=tokens,
              tokens_per_s=tokens / seconds)


def decode(name):
    model = build(name)
    engine = HybridEngine(model)
    for batch in BATCHES:
        measure(name, engine, batch)
        if batch == ROWS:
            measure_transformers(name, model, bench.transformers_generate, batch)


def ppo_step():
    """Two iterations by ppo.py itself, in DeepSpeed-Chat's shape: OPT-1.3B, a critic and a reward
    model of OPT-350M."""
    cfg = bench.Config(model=shape("opt-1.3b"), critic=shape("opt-350m"), iterations=2,
                       batch=4 if TINY else 64, prompt_len=32 if TINY else P, new_tokens=A)
    folder = OUT.parent / "ppo"
    shutil.rmtree(folder, ignore_errors=True)
    bench.save_inputs(cfg, folder)
    utils.Run.save = lambda *args, **kwargs: None  # a checkpoint would take longer than the step
    ppo.main(utils.parse_args(ppo.Config, bench.ppo_flags(cfg, folder)))
    for line in (folder / "out/metrics.jsonl").read_text().splitlines()[1:]:
        row = json.loads(line)
        write(section="ppo", batch=cfg.batch, pairs_per_s=cfg.batch / row["seconds"], **row)


# -----------------------------------------------------------------------------
# the second command: where the time goes, and other shapes


def ragged():
    """Answers of geometric lengths, where captures of graphs and admissions count too."""
    model = build("opt-1.3b")
    V = model.config.vocab_size
    engine = HybridEngine(model)
    captures = []  # seconds
    capture = engine.graphs.capture

    def timed_capture(step):
        seconds, graph = timed(capture, step)
        captures.append(seconds)
        return graph

    engine.graphs.capture = timed_capture
    ends = list(range(V // 32))  # random weights sample nearly uniformly: 32 tokens on average
    rows = prompts([P] * (12 if TINY else 256), V)
    for turn in (1, 2, 3):
        captures.clear()
        seconds, out = timed(engine.generate, rows, A, seed=2, eos_token_id=ends)
        write(section="ragged", turn=turn, seconds=seconds,
              tokens_per_s=int(out.answer_lens.sum()) / seconds, captured=len(captures),
              capture_s=sum(captures), graphs=len(engine.graphs.graphs),
              decode_s=engine.stats["decode_s"], prefill_s=engine.stats["prefill_s"])


@torch.no_grad()
def profile():
    """Microseconds of a decode step by kernel."""
    model = build("opt-1.3b")
    engine = HybridEngine(model)
    engine.start(prompts([P] * ROWS, model.config.vocab_size), A, seed=1)
    for _ in range(3):  # prefill, compilation, capture
        engine.step()
    before = engine.stats["decode_steps"]
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if CUDA else kind.CPU]) as profiler:
        for _ in range(2):
            engine.step()
    steps = engine.stats["decode_steps"] - before
    events = []
    for event in profiler.key_averages():
        us = event.self_device_time_total if CUDA else event.self_cpu_time_total
        events.append((us / steps, event.count / steps, event.key))
    for us, calls, key in sorted(events, reverse=True)[:14]:
        write(section="profile", us_per_step=us, calls=calls, kernel=key[:70])


def equal_rows():
    """The same seeds in batches of two sizes: in bfloat16 sums are rounded differently."""
    model = build("opt-1.3b")
    n, small = (4, 2) if TINY else (128, 32)
    rows = prompts([P] * n, model.config.vocab_size)
    a = HybridEngine(model).generate(rows, A, seed=5)
    b = HybridEngine(model, max_batch=small).generate(rows, A, seed=5)
    same = a.tokens == b.tokens                                                     # (n, T)
    before = same.int().cumprod(1).sum(1) - P  # equal tokens from the start
    write(section="equal_rows", batches=(n, small), rows=n, equal=int(same.all(1).sum()),
          tokens=A, equal_tokens_mean=before.float().mean().item())


def generate_batch():
    model = build("opt-1.3b")
    measure_transformers("opt-1.3b", model, bench.transformers_generate_batch, ROWS)
    model.destroy_cached_continuous_batching_manager()  # it has most of the memory


def gpt2():
    """Batch 1, 128 + 32 tokens: on an H200 DeepSpeed has published 222 tokens/s for itself, 767 for
    vLLM and 965 for SGLang (DeepSpeed's pull request 8352)."""
    measure("gpt2", HybridEngine(build("gpt2:vocab_size=50257")), 1, 128, 32)


def nano_vllm():
    """nano-vllm's workload: 256 prompts of 100 to 1,024 tokens, answers of 100 to 1,024."""
    model = build("qwen3-0.6b")
    engine = HybridEngine(model)
    sizes = (6, 4, 20) if TINY else (256, 100, 1024)
    rows, lengths = bench.nano_vllm_requests(*sizes, model.config.vocab_size)
    for turn in (1, 2):
        seconds, _ = timed(bench.generate_lengths, engine, rows, lengths, 0.6, seed=1)
        write(section="nano_vllm", turn=turn, seconds=seconds, answer_tokens=sum(lengths),
              tokens_per_s=sum(lengths) / seconds, decode_s=engine.stats["decode_s"],
              prefill_s=engine.stats["prefill_s"], graphs=len(engine.graphs.graphs))


if __name__ == "__main__":
    OUT = Path(sys.argv[1])
    OUT.mkdir(parents=True, exist_ok=True)
    for section in sys.argv[2:]:
        print(f"== {section}", flush=True)
        start = time.perf_counter()
        failed = None
        torch.cuda.empty_cache()
        try:
            name, _, model = section.partition(":")
            globals()[name](*filter(None, [model]))
        except (Exception, SystemExit):  # the next section runs
            failed = traceback.format_exc()
            print(failed)
        write(section="time", name=section, seconds=time.perf_counter() - start, failed=failed)
