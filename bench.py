"""How fast is it here, compared to what, and how far from what this machine can do?

Models have random weights of real shapes (SHAPES), so nothing is downloaded.

    python bench.py generate            # the engine and transformers.generate, fixed and ragged
    python bench.py profile             # the kernels of a decode step, by time
    python bench.py train               # optimizer steps of the three scripts
    python bench.py ppo                 # PPO iterations by phase, ours and with transformers
    python bench.py kernels             # each kernel against PyTorch and against its ceiling
    python bench.py memory              # the output layer in training, with and without all logits
    python bench.py fit                 # the largest actor that trains here
    python bench.py plan-memory         # peaks of memory, and what plan.py says of them
    python bench.py nano-vllm           # requests of given lengths, as in nano-vllm's benchmark
    python bench.py job verl            # one of JOBS, workloads that others have published
    python bench.py tables              # writes OUT/README.md from the JSON files in OUT

    python bench.py generate --model opt-1.3b --batch 1,32,128 --prompt-len 256 --new-tokens 256
    python bench.py ppo --model opt-1.3b --critic opt-350m --batch 128 --micro-batch 16 \\
        --prompt-len 256 --new-tokens 256 --ragged 0

Both sides of a comparison run in one process and alternate, so that a machine whose speed changes
slows both. A number is the median of --repeats measurements. The ceilings (copying, matrix
products) are measured in the same run. Every row is written to OUT/DEVICE-TASK.json as soon as it
is measured.

Dimension key:  B rows, P prompt, A answer, T = P + A, E width, H query heads, K key/value heads,
                D head size, M width of the MLP, V vocabulary size, L layers.
"""
import contextlib
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shlex
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

import kernels
import models
import plan
import ppo
import reward
import tables
import training
import utils
from hybrid_engine import HybridEngine, Rollout, make_engine
from plan import SHAPES, Shape, flops, kv_bytes, layer_params
from tables import PHASES, show

# -----------------------------------------------------------------------------
# models of the shapes in plan.py


def config_of(name, context=2048):
    """The transformers config of a shape."""
    import transformers

    s = SHAPES[name]
    options = dict(
        vocab_size=s.V,
        hidden_size=s.E,
        num_hidden_layers=s.L,
        num_attention_heads=s.H,
        max_position_embeddings=max(context, 2048),
        tie_word_embeddings=s.tied,
        num_labels=1,
    )
    if s.family == "opt":
        options |= dict(ffn_dim=s.M, word_embed_proj_dim=s.embed or s.E, dropout=0.0)
    else:
        options |= dict(intermediate_size=s.M, num_key_value_heads=s.K, head_dim=s.D)
    if s.embed:  # OPT-350M
        options |= dict(do_layer_norm_before=False)
    return transformers.AutoConfig.for_model(s.family, **options)


def build(name, dtype, context=2048, auto_class="AutoModelForCausalLM"):
    """A transformers model of a shape, with random weights, made on the device."""
    import transformers

    config = config_of(name, context)
    with torch.device(device()):
        return getattr(transformers, auto_class).from_config(config, dtype=dtype).eval()


# -----------------------------------------------------------------------------
# command line


@dataclass(frozen=True)
class Config:
    # workload
    model: str = "opt-4x256,llama-4x256"  # shapes in SHAPES, joined by commas
    critic: str = ""               # shape of critic and reward model; empty: that of the actor
    batch: str = "32"              # prompts answered together, or rows of a training step;
    #   generate takes several, joined by commas
    micro_batch: int = 0           # rows per forward of training; 0: all, in ppo at most 32
    prompt_len: int = 64           # tokens per prompt
    new_tokens: int = 64           # tokens per answer
    ragged: int = 8                # also answers of geometric lengths (mean 32, at most 256), this
    #   many times --batch prompts; 0: only answers of --new-tokens
    minibatches: int = 1           # ppo: optimizer steps per iteration
    scorer: Literal["model", "function"] = "model"  # ppo: a reward model, or a function that
    #   costs nothing
    only: str = ""                 # train: only these steps, of sft, reward, actor, critic
    lora: str = ""                 # as in ppo.py
    gradient_checkpointing: bool = False  # as in ppo.py
    offload: bool = False          # as in ppo.py
    zero: Literal[0, 1, 2, 3] = 0  # as in ppo.py
    # measurement
    compare: bool = True           # generate and ppo: measure transformers too
    group: int = 0                 # rows that transformers generates at a time; 0: all that fit
    repeats: int = 7               # measurements of each side; the median counts
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU
    #   that computes with it (from Ampere on), else fp32
    out: str = "results"           # folder of the JSON files
    seed: int = 1                  # of weights and of sampling

    def __post_init__(self):
        utils.require_at_least(self, 1, "prompt_len", "new_tokens", "minibatches", "repeats")
        utils.require_at_least(self, 0, "micro_batch", "ragged", "group")
        check_shapes("--model", self.shapes)
        if self.critic:
            check_shapes("--critic", [self.critic])
        parse_numbers("--batch", self.batch)
        for step in self.steps:
            if step not in STEPS:
                raise utils.UserError(f"--only {self.only}: {step!r} is none of {', '.join(STEPS)}")

    @property
    def shapes(self):
        return self.model.split(",")

    @property
    def batches(self):
        return parse_numbers("--batch", self.batch)

    @property
    def steps(self):
        return self.only.split(",") if self.only else list(STEPS)

    @property
    def torch_dtype(self):
        return utils.dtype_of(self.dtype)


def check_shapes(flag, names):
    for name in names:
        if name not in SHAPES:
            message = f"{flag} {name}: there is no such shape; there are {', '.join(SHAPES)}"
            raise utils.UserError(message)


def parse_numbers(flag, text):
    """'1,8..32' to [1, 8, 16, 32]."""
    numbers = []
    for part in text.split(","):
        low, _, high = part.partition("..")
        try:
            number = int(low)
            last = int(high or low)
        except ValueError:
            number = last = 0
        if number < 1:
            message = (
                f"{flag} {text}: needs numbers above 0, joined by commas, such as 8,64, or 8..64 "
                "for 8,16,32,64"
            )
            raise utils.UserError(message)
        while number <= last:
            numbers.append(number)
            number *= 2
    return numbers


class Job(NamedTuple):
    """A workload that others have published numbers for. Flags after its name override its own:
    `bench.py job nano-vllm --model llama-3.2-1b`, or --compare for transformers beside it."""
    command: str
    published: str


OPT_256 = "--prompt-len 256 --new-tokens 256 --ragged 0 --repeats 2 --no-compare"
DEEPSPEED_CHAT = f"ppo --critic opt-350m --batch 128 {OPT_256}"
JOBS = {
    "decode-opt-1.3b": Job(
        f"generate --model opt-1.3b --batch 1,32,128 {OPT_256}",
        "DeepSpeed's hybrid engine on an H100, 256 + 128 tokens: 200 tokens/s at batch 1, 5,956 "
        "at batch 32 (DeepSpeed, pull request 8271)",
    ),
    "decode-opt-6.7b": Job(
        f"generate --model opt-6.7b --batch 1,128 {OPT_256}",
        "",
    ),
    "nano-vllm": Job(
        "nano-vllm --model qwen3-0.6b --batch 256 --prompt-len 1024 --new-tokens 1024 --repeats 2",
        "on an A800, vLLM 0.10.2 and nano-vllm with Triton: qwen3-0.6b 8,588 and 10,009 tokens/s, "
        "llama-3.2-1b 12,627 and 15,068, qwen2.5-0.5b 17,711 and 24,121",
    ),
    "deepspeed-chat-1.3b": Job(
        f"{DEEPSPEED_CHAT} --model opt-1.3b --micro-batch 16",
        "DeepSpeed-Chat on an A100-80G: 6.27 pairs/s",
    ),
    "deepspeed-chat-6.7b": Job(
        f"{DEEPSPEED_CHAT} --model opt-6.7b --lora 128 --micro-batch 16",
        "DeepSpeed-Chat on an A100-80G: 1.80 pairs/s",
    ),
    "deepspeed-chat-13b": Job(
        f"{DEEPSPEED_CHAT} --model opt-13b --lora 128 --micro-batch 8",
        "DeepSpeed-Chat on an A100-80G: 0.62 pairs/s",
    ),
    "verl": Job(  # PPO on GSM8K with its mean lengths; a rule is the reward
        "ppo --model qwen2.5-0.5b --scorer function --batch 256 --minibatches 4 --micro-batch 32 "
        "--prompt-len 104 --new-tokens 276 --ragged 0 --repeats 2 --no-compare",
        "verl on a GPU of the 80 GB class: 3.87 pairs/s",
    ),
    "sft-0.6b": Job(
        "train --model qwen3-0.6b --only sft --batch 2 --micro-batch 1 --prompt-len 1 "
        "--new-tokens 8191 --gradient-checkpointing --repeats 3",
        "prime-rl on an H100, rows of 8,192 tokens, recomputing activations: 26,005 tokens/s",
    ),
}


# -----------------------------------------------------------------------------
# measuring


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-threads"


def processor_name():
    """Of the CPU: times on two of them cannot be compared."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_bytes():
    """Memory that could be allocated now."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def total_bytes():
    if not torch.cuda.is_available():
        return psutil.virtual_memory().total
    _, total = torch.cuda.mem_get_info()
    return total


def free_unused_memory():
    """Frees what is no longer used (DeepSpeed's engines hold cycles), and starts a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


CALLS_PER_GRAPH = 10


def seconds_per_call(calls):
    """Median time of one call. calls: functions that do the same work, each on buffers of its own.

    On a CPU the first one is called again and again, and finds its data in the cache. On a GPU one
    CUDA graph holds ten calls, so that launching it hardly counts. They cycle through the
    functions, and the L2 cache holds other data when the graph starts.
    """
    if torch.cuda.is_available():
        return seconds_on_gpu(calls)
    call = calls[0]
    for _ in range(2):
        call()
    clock = utils.Clock()
    call()
    repeats = max(1, int(0.04 / max(clock.lap(), 1e-7)))
    groups = []
    for _ in range(5):
        for _ in range(repeats):
            call()
        groups.append(clock.lap() / repeats)
    return statistics.median(groups)


def seconds_on_gpu(calls):
    for call in calls:
        for _ in range(2):  # kernels compile
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        for i in range(CALLS_PER_GRAPH):
            calls[i % len(calls)]()
    other_data = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events = []
    for _ in range(20):
        other_data.zero_()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    milliseconds = [start.elapsed_time(end) for start, end in events]
    return statistics.median(milliseconds) / 1e3 / CALLS_PER_GRAPH


def measure_ceilings(dtype):
    """What this device does at best: bytes/s of copying (read and written), and FLOP/s of a matrix
    product."""
    size, numbers = 1024, 2**26
    if torch.cuda.is_available():
        size, numbers = 8192, 2**29
    x = torch.zeros(numbers, device=device())
    y = torch.empty_like(x)
    a = torch.randn(size, size, device=device(), dtype=dtype)
    b = torch.randn(size, size, device=device(), dtype=dtype)

    def copy():
        y.copy_(x)

    def product():
        kernels.linear(a, b)

    bytes_per_s = 2 * x.nbytes / seconds_per_call([copy])
    flop_per_s = 2 * size**3 / seconds_per_call([product])
    print(
        f"ceilings, measured: copying {bytes_per_s / 1e9:,.0f} GB/s, "
        f"matrix products {flop_per_s / 1e12:,.2f} TFLOP/s"
    )
    return {"bytes_per_s": bytes_per_s, "flop_per_s": flop_per_s}


def alternate(repeats, sides, before=None):
    """Calls all sides `repeats` times, one after the other, and once more at first to warm up.

    sides: {name: function of the number of the repeat}. before() is called before each call,
    outside the clock. Returns {name: [(seconds, result) of each repeat]}. A side that runs out of
    GPU memory is not called again, and the others go on.
    """
    measured = {name: [] for name in sides}
    remaining = dict(sides)
    for repeat in range(repeats + 1):
        for name, side in list(remaining.items()):
            if before:
                before()
            timed = time_call(side, repeat)
            if timed is None:
                print(f"{name}: out of memory")
                del remaining[name]
                free_unused_memory()
            elif repeat > 0:
                measured[name].append(timed)
    return measured


def time_call(side, repeat):
    """(seconds, result), or None where the GPU's memory is too small."""
    clock = utils.Clock()
    try:
        result = side(repeat)
    except torch.OutOfMemoryError:
        return None
    return clock.lap(), result


def median(values):
    """None where nothing was measured."""
    values = list(values)
    return statistics.median(values) if values else None


def ratio(a, b):
    """a / b, or None where one of them was not measured."""
    if a is None or b is None:
        return None
    return a / b


def file_name(cfg, task, job):
    """DEVICE-TASK or DEVICE-job-JOB, with the shapes where these are not the usual ones."""
    if task == "plan-memory" and not torch.cuda.is_available():  # the CPU hardly matters
        return task
    name = f"{device_name()}-{task}"
    usual = Config
    if job:
        name = f"{device_name()}-job-{job}"
        usual = utils.parse_args(Config, JOBS[job].command.split()[1:])
    if cfg.model != usual.model:
        name += "-" + cfg.model.replace(",", "+")
    if cfg.lora != usual.lora:
        name += f"-lora-{cfg.lora}"
    return name


class Record:
    """The JSON file of one run. It is written again after every row, so that a run that ends early
    loses nothing."""

    def __init__(self, cfg, task, job, command, ceilings):
        import transformers

        self.path = Path(cfg.out) / f"{file_name(cfg, task, job)}.json"
        self.content = {
            "task": task,
            "job": job,
            "published": JOBS[job].published if job else "",
            "command": command,
            "edition": 2,
            "config": dataclasses.asdict(cfg),
            "device": device_name(),
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(total_bytes() / 2**30, 1),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "commit": utils.git_commit(),
            "time": time.strftime("%Y-%m-%d %H:%M"),
            "ceilings": ceilings,
            "rows": [],
        }

    def add(self, row):
        self.content["rows"].append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        utils.atomic_write(self.path, json.dumps(self.content, indent=1))


# -----------------------------------------------------------------------------
# generation


PROFILED_STEPS = 20
PROFILED_KERNELS = 20
MAX_RAGGED = 256  # tokens of the longest ragged answer


class Case(NamedTuple):
    name: str           # "fixed": no EOS; "ragged": answers end at geometric lengths
    prompts: int
    new_tokens: int     # longest answer


def cases(cfg, batches):
    out = [Case("fixed", batch, cfg.new_tokens) for batch in batches]
    if cfg.ragged:
        out += [Case("ragged", cfg.ragged * batch, MAX_RAGGED) for batch in batches]
    return out


def eos_ids(case, V):
    """Random weights sample nearly uniformly: with a 32nd of the vocabulary as EOS, lengths are
    geometric with mean 32."""
    if case.name == "fixed":
        return None
    return list(range(V // 32))


def random_prompts(n, length, V, generator):
    """n prompts without the ids that may be EOS, as lists."""
    return torch.randint(V // 32, V, (n, length), generator=generator).tolist()


def rows_that_fit(rows, row_bytes, limit):
    """How many rows transformers generates at a time: `limit`, or as many as fit. Its cache grows
    by concatenation, so that much of the memory is in use twice or lost between blocks."""
    if not limit:
        limit = max(1, int(0.4 * available_bytes() / row_bytes))
    return min(rows, limit)


def transformers_generate(lm, prompts, new_tokens, eos, group):
    """Samples with transformers.generate, `group` prompts (all of one length) at a time. Returns
    the number of sampled tokens, up to and with each answer's EOS."""
    total = 0
    for start in range(0, len(prompts), group):
        ids = torch.tensor(prompts[start : start + group], device=device())         # (b, P)
        out = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            eos_token_id=eos,
            pad_token_id=0,
        )
        answers = out[:, ids.size(1) :]                                             # (b, A)
        is_eos = torch.isin(answers, torch.tensor(eos or [-1], device=device()))
        first_eos = is_eos.int().argmax(1)                                          # (b,)
        lengths = torch.where(is_eos.any(1), first_eos + 1, answers.size(1))
        total += int(lengths.sum())
    return total


def generate(cfg, ceilings):
    """Sampling at temperature 1 by the engine and by transformers.generate."""
    for name in cfg.shapes:
        free_unused_memory()
        lm = build(name, cfg.torch_dtype, cfg.prompt_len + max(cfg.new_tokens, MAX_RAGGED))
        engine = HybridEngine(lm)
        generator = torch.Generator().manual_seed(cfg.seed)
        for case in cases(cfg, cfg.batches):
            prompts = random_prompts(case.prompts, cfg.prompt_len, SHAPES[name].V, generator)
            row = {
                "model": name,
                "case": case.name,
                "prompts": case.prompts,
                "prompt_len": cfg.prompt_len,
                "new_tokens": case.new_tokens,
            }
            row |= time_generation(cfg, name, lm, engine, case, prompts, ceilings)
            print(
                f"{name:<13}{case.name:<7}{case.prompts:>5} x {cfg.prompt_len}+{case.new_tokens:<5}"
                f"engine {show(row['tokens_per_s'], ',.0f'):>8} tokens/s, "
                f"{show(row['ms_per_step'], '.2f')} ms per step, "
                f"{show(row['floor_share'], '.0%')} of the bandwidth floor, "
                f"transformers {show(row['transformers_tokens_per_s'], ',.0f')} tokens/s, "
                f"ratio {show(row['ratio'], '.2f')}",
                flush=True,
            )
            yield row
        del lm, engine  # before the next model is made


def time_generation(cfg, name, lm, engine, case, prompts, ceilings):
    eos = eos_ids(case, SHAPES[name].V)
    row_bytes = kv_bytes(SHAPES[name], cfg.prompt_len + case.new_tokens, cfg.torch_dtype)
    engine.release()
    group = rows_that_fit(case.prompts, row_bytes, cfg.group)
    before = None
    if 2 * case.prompts * row_bytes > 0.8 * available_bytes():
        before = engine.release  # the caches of both sides do not fit beside each other

    def ours(repeat):
        out = engine.generate(prompts, case.new_tokens, eos_token_id=eos, seed=repeat)
        return int(out.answer_lens.sum()), dict(engine.stats)

    def theirs(repeat):
        return transformers_generate(lm, prompts, case.new_tokens, eos, group), None

    sides = {"ours": ours}
    if cfg.compare:
        sides["theirs"] = theirs
    measured = alternate(cfg.repeats, sides, before)
    return generation_numbers(measured, case.prompts, ceilings) | {"transformers_group": group}


def generation_numbers(measured, n_prompts, ceilings):
    """What a row says of the repeats of both sides."""
    runs = {"ours": [], "theirs": []}  # tokens/s of each repeat
    for side, repeats in measured.items():
        for seconds, (tokens, _) in repeats:
            runs[side].append(tokens / seconds)
    lengths, ms_per_step, floor_share = [], [], []
    for _, (tokens, stats) in measured["ours"]:
        lengths.append(tokens / n_prompts)
        ms_per_step.append(1e3 * stats["decode_s"] / max(1, stats["decode_steps"]))
        floor_share.append(stats["gb_per_s"] * 1e9 / ceilings["bytes_per_s"])
    return {
        "mean_length": statistics.mean(lengths) if lengths else None,
        "tokens_per_s": median(runs["ours"]),
        "transformers_tokens_per_s": median(runs["theirs"]),
        "ratio": median(a / b for a, b in zip(runs["ours"], runs["theirs"])),
        "ms_per_step": median(ms_per_step),
        "floor_share": median(floor_share),
        "runs": runs,
    }


def profile(cfg, ceilings):
    """Where the time of a decode step goes: PyTorch's profiler over PROFILED_STEPS steps in the
    middle of the answers. Yields a row for each of the slowest kernels (on a CPU: operations)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    for name in cfg.shapes:
        lm = build(name, cfg.torch_dtype, cfg.prompt_len + cfg.new_tokens)
        engine = HybridEngine(lm)
        generator = torch.Generator().manual_seed(cfg.seed)
        for B in cfg.batches:
            prompts = random_prompts(B, cfg.prompt_len, SHAPES[name].V, generator)
            with torch.no_grad():
                engine.start(prompts, cfg.new_tokens, 1.0, 0, 1.0, eos_token_id=None, seed=cfg.seed)
                engine.step()  # prefill
                engine.step()  # kernels are compiled, graphs are captured
                before = engine.stats["decode_steps"]
                with torch_profile(activities=[activity]) as profiler:
                    while engine.stats["decode_steps"] < before + PROFILED_STEPS and engine.running:
                        engine.step()
            steps = engine.stats["decode_steps"] - before
            events = []
            for event in profiler.key_averages():
                us = event.self_cpu_time_total
                if torch.cuda.is_available():
                    us = event.self_device_time_total
                events.append((us / steps, event.count / steps, event.key))
            for us, calls, key in sorted(events, reverse=True)[:PROFILED_KERNELS]:
                print(f"{name:<13}{B:>5} rows {us:>9,.1f} us {calls:>6.1f} calls  {key[:60]}")
                yield {"model": name, "batch": B, "kernel": key, "us_per_step": us, "calls": calls}


# -----------------------------------------------------------------------------
# nano-vllm's benchmark


def nano_vllm_requests(n, max_prompt_len, max_new_tokens, V):
    """The requests of nano-vllm's bench.py, which draws them from Python's generator with seed 0:
    256 prompts of 100 to 1,024 tokens, then answers of 100 to 1,024 tokens. Returns the prompts and
    the lengths of the answers."""
    rng = random.Random(0)
    prompts = []
    for _ in range(n):
        length = rng.randint(min(100, max_prompt_len), max_prompt_len)
        prompts.append([rng.randint(0, 10_000) % V for _ in range(length)])
    shortest = min(100, max_new_tokens)  # with shapes of a rehearsal
    answer_lens = [rng.randint(shortest, max_new_tokens) for _ in range(n)]
    return prompts, answer_lens


class ExactLengths(HybridEngine):
    """A HybridEngine whose answers have given lengths, one per prompt, 2 at least: once rows are
    admitted, max_lengths says where each of them must end."""

    def generate_lengths(self, prompts, answer_lens, temperature, seed):
        self.answer_lens = np.array(answer_lens)
        return self.generate(prompts, max(answer_lens), temperature, seed=seed)

    def admit(self):
        super().admit()
        rows = list(self.running.values())
        slots = list(self.running)
        max_lengths = self.requests.prompt_lens[rows] + self.answer_lens[rows]
        cache = self.cache.max_lengths
        cache[slots] = torch.tensor(max_lengths, device=cache.device)


def nano_vllm(cfg, ceilings):
    """Answers of given lengths to prompts of given lengths, EOS ignored, at temperature 0.6. The
    speed is that of the answers' tokens over the whole time, prefill included."""
    for name in cfg.shapes:
        free_unused_memory()
        lm = build(name, cfg.torch_dtype, cfg.prompt_len + cfg.new_tokens)
        engine = ExactLengths(lm)
        for batch in cfg.batches:
            row = time_requests(cfg, name, engine, batch, ceilings)
            print(
                f"{name:<13}{batch} prompts of {row['prompt_tokens']:,} tokens, "
                f"{row['answer_tokens']:,} sampled: {show(row['tokens_per_s'], ',.0f')} tokens/s, "
                f"{show(row['floor_share'], '.0%')} of the bandwidth floor in decode",
                flush=True,
            )
            yield row
        del lm, engine  # before the next model is made


def time_requests(cfg, name, engine, batch, ceilings):
    V = SHAPES[name].V
    prompts, answer_lens = nano_vllm_requests(batch, cfg.prompt_len, cfg.new_tokens, V)

    def ours(repeat):
        out = engine.generate_lengths(prompts, answer_lens, 0.6, seed=repeat)
        assert out.answer_lens.tolist() == answer_lens, "an answer has another length"
        return sum(answer_lens), dict(engine.stats)

    row = {
        "model": name,
        "prompts": batch,
        "prompt_tokens": sum(map(len, prompts)),
        "answer_tokens": sum(answer_lens),
    }
    measured = alternate(cfg.repeats, {"ours": ours})
    return row | generation_numbers(measured, batch, ceilings)


# -----------------------------------------------------------------------------
# training


def ppo_config(cfg, **more):
    """The Config of ppo.py that holds what both have in common."""
    return ppo.Config(
        lora=cfg.lora,
        gradient_checkpointing=cfg.gradient_checkpointing,
        offload=cfg.offload,
        zero=cfg.zero,
        dtype=cfg.dtype,
        seed=cfg.seed,
        **more,
    )


def random_policy(cfg, name, context):
    lm = build(name, cfg.torch_dtype, context)
    return models.Policy(models.add_lora(lm, cfg.lora))


def random_reward_model(cfg, name, context, lora=""):
    model = build(name, cfg.torch_dtype, context, "AutoModelForSequenceClassification")
    return models.RewardModel(models.add_lora(model, lora))


def answer_logprobs(policy, tokens, prompt_len):
    """tokens (B, T), of which the first prompt_len are prompts. Returns (B, A)."""
    B, T = tokens.shape
    prompt_lens = torch.full((B,), prompt_len, device=tokens.device)
    answer_lens = torch.full((B,), T - prompt_len, device=tokens.device)
    logprobs, _ = policy(tokens, prompt_lens, answer_lens)
    return logprobs


def sft_loss(policy, tokens, prompt_len):
    return -answer_logprobs(policy, tokens, prompt_len).mean()


def reward_loss(model, tokens, prompt_len):
    """Every second row is the rejected answer to the prompt of the row before it."""
    scores = model(tokens)[:, -1]                                                   # (B,)
    return reward.pairwise_loss(scores[::2], scores[1::2])


def actor_loss(policy, tokens, prompt_len):
    logprobs = answer_logprobs(policy, tokens, prompt_len)                          # (B, A)
    old_logprobs = logprobs.detach()
    advantages = torch.ones_like(logprobs)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    return ppo.actor_loss(logprobs, old_logprobs, advantages, mask, ppo.Config.clip)


def critic_loss(model, tokens, prompt_len):
    values = model(tokens)                                                          # (B, T)
    zeros = torch.zeros_like(values)
    mask = torch.ones_like(values)
    return ppo.critic_loss(values, zeros, zeros, mask, ppo.VALUE_CLIP)


class Step(NamedTuple):
    title: str
    loss: object        # (model, tokens, prompt_len) -> scalar
    policy: bool        # trains a Policy; otherwise a RewardModel


STEPS = {
    "sft": Step("fine-tuning", sft_loss, policy=True),
    "reward": Step("reward model", reward_loss, policy=False),
    "actor": Step("PPO, actor", actor_loss, policy=True),
    "critic": Step("PPO, critic", critic_loss, policy=False),
}


def train(cfg, ceilings):
    """Optimizer steps on full rows: tokens/s, and MFU, the model's own FLOPs as a share of the
    ceiling."""
    utils.init_distributed(cfg.seed)
    for name in cfg.shapes:
        for key in cfg.steps:
            free_unused_memory()
            row = {"model": name, "step": STEPS[key].title}
            row |= {"batch": cfg.batches[0], "length": cfg.prompt_len + cfg.new_tokens}
            try:
                row |= train_row(cfg, name, STEPS[key], ceilings)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            print(
                f"{name:<13}{row['step']:<14}{row['batch']:>4} x {row['length']:<6}"
                f"{show(row.get('seconds'), '.3f'):>8} s "
                f"{show(row.get('tokens_per_s'), ',.0f'):>10} tokens/s   "
                f"MFU {show(row.get('mfu'), '.0%')} {row.get('error', '')}",
                flush=True,
            )
            yield row


def train_row(cfg, name, step, ceilings):
    B, T = cfg.batches[0], cfg.prompt_len + cfg.new_tokens
    micro_batch, accumulation_steps = utils.micro_batch_size(B, cfg.micro_batch)
    if step.policy:
        model = random_policy(cfg, name, T)
        head_tokens = B * cfg.new_tokens
    else:
        model = random_reward_model(cfg, name, T, cfg.lora)
        head_tokens = 0
    engine = training.train_engine(model, 1e-6, micro_batch, accumulation_steps, ppo_config(cfg))
    generator = torch.Generator().manual_seed(cfg.seed)
    tokens = torch.randint(SHAPES[name].V, (B, T), generator=generator).to(device())

    runs = []
    clock = utils.Clock()
    for _ in range(cfg.repeats + 1):
        for part in tokens.split(micro_batch):
            engine.backward(step.loss(engine, part, cfg.prompt_len))
            training.step(engine)
        runs.append(clock.lap())
    runs = runs[1:]  # the first step warms up
    seconds = statistics.median(runs)
    forwards = 2 if cfg.lora else 3  # frozen weights need no gradient of their own
    work = forwards * flops(SHAPES[name], B * T, T, head_tokens)
    return {
        "seconds": seconds,
        "tokens_per_s": B * T / seconds,
        "mfu": work / seconds / ceilings["flop_per_s"],
        "memory_gib": utils.memory_gib(),
        "runs": runs,
    }


# -----------------------------------------------------------------------------
# PPO: the functions of ppo.py, on random models and random prompts


@contextlib.contextmanager
def pytorch_products():
    """Context manager: on a CPU matrix products are PyTorch's own, and not oneDNN's. The switch is
    kernels.ONEDNN, which kernels.linear reads at every call."""
    before = kernels.ONEDNN
    kernels.ONEDNN = False
    try:
        yield
    finally:
        kernels.ONEDNN = before


class RandomPrompts:
    """Takes the place of data.Rows."""

    def __init__(self, n, length, V, seed):
        self.prompts = random_prompts(n, length, V, torch.Generator().manual_seed(seed))

    def prompt(self, i):
        return self.prompts[i]

    def fields(self, indices):
        return {}


class Sampler:
    """A sampler as ppo.rollout wants it, whose answers end at the ids `eos` (None: never), whatever
    the tokenizer says. row_bytes: where the KV cache of one row takes so many bytes, prompts are
    answered in groups that fit in memory (or of `group`); None: the sampler sees to that."""

    def __init__(self, sampler, eos, row_bytes=None, group=0):
        self.sampler = sampler
        self.eos = eos
        self.row_bytes = row_bytes
        self.group = group

    def generate(self, prompts, max_new_tokens, temperature, eos_token_id, seed, respond):
        group = len(prompts)
        if self.row_bytes:
            group = rows_that_fit(len(prompts), self.row_bytes, self.group)
        parts = []
        for start in range(0, len(prompts), group):
            rows = slice(start, start + group)
            parts.append(
                self.sampler.generate(
                    prompts[rows],
                    max_new_tokens,
                    temperature,
                    eos_token_id=self.eos,
                    seed=seed[rows],
                )
            )
        return join_rollouts(parts)

    def release(self):
        self.sampler.release()


def join_rollouts(parts):
    """Several Rollouts as one, padded on the right."""
    if len(parts) == 1:
        return parts[0]
    columns = []
    for name in ("tokens", "prompt_lens", "answer_lens", "logprobs", "sampled"):
        xs = [getattr(part, name) for part in parts]
        if xs[0].dim() > 1:
            width = max(x.size(1) for x in xs)
            xs = [F.pad(x, (0, width - x.size(1))) for x in xs]
        columns.append(torch.cat(xs))
    return Rollout(*columns)


def no_score(prompts, answers, row_fields):
    """A reward function that costs nothing."""
    return [0.0 for _ in answers]


class PPO:
    """What ppo.main builds from model folders and data, from random weights and prompts here.

    side: "hybrid"; or "hf", where transformers generates. Learning rates are 1e-9, so that the
    policy stays as random as it is.
    """

    def __init__(self, cfg, name, case, side, iterations):
        self.cfg = ppo_config(
            cfg,
            engine=side,
            max_len=cfg.prompt_len + case.new_tokens,
            max_new_tokens=case.new_tokens,
            batch_size=case.prompts,
            minibatches=cfg.minibatches,
            micro_batch=cfg.micro_batch or 32,
            iterations=iterations,
            actor_lr=1e-9,
            critic_lr=1e-9,
            ema=0.0,
        )
        critic_name = cfg.critic or name
        context = cfg.prompt_len + max(case.new_tokens, MAX_RAGGED)
        shape = SHAPES[name]

        # ---- models ----
        actor = random_policy(cfg, name, context)
        self.ref = None
        if not cfg.lora:
            ref = models.Policy(build(name, cfg.torch_dtype, context))
            self.ref = training.frozen_engine(ref, device(), self.cfg)
        critic = random_reward_model(cfg, critic_name, context)
        scorer = ppo.Scorer("function", 1.0, function=no_score)
        if cfg.scorer == "model":
            reward_model = random_reward_model(cfg, critic_name, context)
            frozen = training.frozen_engine(reward_model, device(), self.cfg)
            scorer = ppo.Scorer("model", 1.0, model=frozen)
        self.scorers = [scorer]

        # ---- engines ----
        step_rows = case.prompts // cfg.minibatches
        sizes = utils.micro_batch_size(step_rows, self.cfg.micro_batch)
        self.micro_batch = sizes[0]
        self.actor = training.train_engine(actor, 1e-9, *sizes, self.cfg, ppo.ADAM_EPS)
        self.critic = training.train_engine(critic, 1e-9, *sizes, self.cfg, ppo.ADAM_EPS)
        if self.ref is None:
            self.ref = self.actor  # with its adapters off
        self.ema = training.EMA(self.actor, 0.0)
        sampler = make_engine(side, self.actor)
        row_bytes = None
        if side == "hf":
            row_bytes = kv_bytes(shape, self.cfg.max_len, cfg.torch_dtype)
        self.sampler = Sampler(sampler, eos_ids(case, shape.V), row_bytes, cfg.group)

        # ---- data ----
        self.tokenizer = models.tiny_tokenizer()
        self.mixture = ppo.PretrainingMix(self.cfg, "", self.tokenizer, self.cfg.max_len, 0)
        n_prompts = case.prompts * iterations
        self.prompts = RandomPrompts(n_prompts, cfg.prompt_len, shape.V, cfg.seed)

    def iteration(self, number, after=lambda phase: None):
        """One iteration of ppo.main. Returns its times and the mean length of the answers.
        after(phase) is called at its start, and when a phase has ended."""
        cfg = self.cfg
        first = (number - 1) * cfg.batch_size
        indices = np.arange(first, first + cfg.batch_size)
        seeds = [hash((cfg.seed, number, row)) for row in range(cfg.batch_size)]
        after("start")
        clock = utils.Clock()
        batch = ppo.rollout(self.sampler, self.prompts, indices, seeds, cfg, self.tokenizer)
        rollout_s = clock.lap()
        after("rollout")
        ppo.score(
            batch, self.actor, self.ref, self.critic, self.scorers, cfg, self.micro_batch
        )
        score_s = clock.lap()
        after("score")
        ppo.estimate_advantages(batch, self.scorers, cfg)
        ppo.update(
            batch, self.actor, self.critic, self.ema, self.mixture, cfg, self.micro_batch, number
        )
        update_s = clock.lap()
        after("update")
        return {
            "rollout_s": rollout_s,
            "score_s": score_s,
            "update_s": update_s,
            "seconds": rollout_s + score_s + update_s,
            "length": batch.mask.sum(1).float().mean().item(),
            "memory_gib": utils.memory_gib(),
        }


PAIRS = 264_292  # of DeepSpeed-Chat's benchmark of step 3 (its BenckmarkSetting.md), one epoch


def ppo_iterations(cfg, name, case, side, count):
    """Runs `count` iterations and returns what iteration() says of all but the first, which warms
    up. With PyTorch's own products on the side of transformers, nothing there is ours but the
    kernel of log-probabilities."""
    free_unused_memory()
    products = pytorch_products() if side == "hf" else contextlib.nullcontext()
    with products:
        run = PPO(cfg, name, case, side, count)
        return [run.iteration(number) for number in range(1, count + 1)][1:]


def ppo_task(cfg, ceilings):
    """Whole iterations, by phase. The models of one side at a time are in memory: some iterations
    of each side, twice."""
    utils.init_distributed(cfg.seed)
    for name in cfg.shapes:
        for case in cases(cfg, cfg.batches[:1]):
            runs = {"hybrid": []}
            if cfg.compare:
                runs["hf"] = []
            count = 1 + math.ceil(cfg.repeats / 2)
            for _ in range(2):
                for side in list(runs):
                    try:
                        runs[side] += ppo_iterations(cfg, name, case, side, count)
                    except torch.OutOfMemoryError:
                        print(f"{name}, {side}: out of memory")
            row = ppo_row(cfg, name, case, runs, ceilings)
            print_ppo_row(row)
            yield row


def ppo_row(cfg, name, case, runs, ceilings):
    medians = {}
    for side, iterations in runs.items():
        medians[side] = {phase: median(run[phase] for run in iterations) for phase in PHASES}
    ours = median(run["seconds"] for run in runs["hybrid"])
    theirs = median(run["seconds"] for run in runs.get("hf", []))
    critic = cfg.critic or name
    row = {
        "model": name,
        "critic": critic,
        "case": case.name,
        "batch": case.prompts,
        "minibatches": cfg.minibatches,
        "prompt_len": cfg.prompt_len,
        "hybrid": medians["hybrid"],
        "hf": medians.get("hf"),
        "seconds": ours,
        "ratio": ratio(theirs, ours),
        "runs": {},
    }
    for side, iterations in runs.items():
        row["runs"][side] = [[run[phase] for phase in PHASES] for run in iterations]
    if ours is None:
        return row | {"mean_length": None, "error": "out of memory"}

    length = statistics.mean(run["length"] for run in runs["hybrid"])
    T = cfg.prompt_len + length
    B = case.prompts
    actor_flops = flops(SHAPES[name], B * T, T, B * length)  # of one forward
    critic_flops = flops(SHAPES[critic], B * T, T, 0)
    # DeepSpeed-Chat counts a forward for generation, and three or four for training.
    convention = actor_flops * (1 + 3 + int(cfg.gradient_checkpointing))
    # Forwards of the actor: rollout, reference and update, with several minibatches also the old
    # log-probabilities. A backward is two more, and one where weights are frozen.
    actor_forwards = 3 + (1 if cfg.lora else 2) + int(cfg.minibatches > 1)
    # Of the critic: values and update, and the reward model. It trains all of its weights.
    critic_forwards = 2 + 2 + int(cfg.scorer == "model")
    work = actor_flops * actor_forwards + critic_flops * critic_forwards
    return row | {
        "mean_length": length,
        "pairs_per_s": B / ours,
        "hours": PAIRS / (B / ours) / 3600,
        "deepspeed_chat_tflops": convention / ours / 1e12,
        "mfu": work / ours / ceilings["flop_per_s"],
        "memory_gib": max(run["memory_gib"] for run in runs["hybrid"]),
    }


def print_ppo_row(row):
    title = f"{row['model']:<13}{row['case']:<7}{row['batch']:>4} x {row['prompt_len']}"
    for side, label in (("hybrid", "ours"), ("hf", "transformers")):
        if row[side]:
            phases = []
            for phase in PHASES:
                phases.append(f"{phase.removesuffix('_s')} {show(row[side][phase], '.2f')} s")
            print(f"{title} {label:<13} {'   '.join(phases)}", flush=True)
    if "error" in row:
        return
    print(
        f"    ratio {show(row['ratio'], '.2f')}, {row['pairs_per_s']:.1f} pairs/s, "
        f"{row['hours']:.1f} h for DeepSpeed-Chat's {PAIRS:,} pairs, "
        f"{row['deepspeed_chat_tflops']:.3g} TFLOP/s as it counts, MFU {row['mfu']:.0%}",
        flush=True,
    )


# -----------------------------------------------------------------------------
# kernels


@dataclass
class Sizes:
    """The sizes at which the kernels of a model are measured, and tensors of them."""
    shape: Shape
    B: int
    P: int
    T: int
    dtype: torch.dtype

    def randn(self, *size):
        return torch.randn(*size, device=device(), dtype=self.dtype)

    def full(self, n, value):
        return torch.full((n,), value, device=device())


class KernelCase(NamedTuple):
    """Two functions that compute the same, and what they have to move and to compute at least."""
    ours: object
    pytorch: object
    bytes: int
    flops: int


def linear_case(sizes, out_features):
    B, E = sizes.B, sizes.shape.E
    x = sizes.randn(B, E)
    weight = sizes.randn(out_features, E)

    def ours():
        return kernels.linear(x, weight)

    def pytorch():
        return F.linear(x, weight)

    moved = x.nbytes + weight.nbytes + B * out_features * sizes.dtype.itemsize
    return KernelCase(ours, pytorch, moved, 2 * B * E * out_features)


def prefill_case(sizes):
    s, B, P = sizes.shape, sizes.B, sizes.P
    q = sizes.randn(B * P, s.H, s.D)
    k = sizes.randn(B * P, s.K, s.D)
    v = sizes.randn(B * P, s.K, s.D)
    cu_seqlens = torch.arange(0, B * P + 1, P, dtype=torch.int32, device=device())
    spec = kernels.AttentionSpec(s.D**-0.5)
    q4, k4, v4 = [x.view(B, P, -1, s.D).transpose(1, 2) for x in (q, k, v)]         # (B, H, P, D)

    def ours():
        return kernels.prefill_attention(q, k, v, cu_seqlens, spec)

    def pytorch():
        return F.scaled_dot_product_attention(q4, k4, v4, is_causal=True, enable_gqa=s.H != s.K)

    moved = 2 * q.nbytes + k.nbytes + v.nbytes
    return KernelCase(ours, pytorch, moved, 2 * B * s.H * P * P * s.D)


def decode_case(sizes):
    s, B, T = sizes.shape, sizes.B, sizes.T
    q = sizes.randn(B, s.H, s.D)
    k_cache = sizes.randn(B, s.K, T, s.D)
    v_cache = sizes.randn(B, s.K, T, s.D)
    lengths = sizes.full(B, T)
    spec = kernels.AttentionSpec(s.D**-0.5)

    def ours():
        return kernels.decode_attention(q, k_cache, v_cache, lengths, spec)

    def pytorch():
        return F.scaled_dot_product_attention(
            q[:, :, None], k_cache, v_cache, enable_gqa=s.H != s.K
        )

    moved = k_cache.nbytes + v_cache.nbytes
    return KernelCase(ours, pytorch, moved, 4 * B * s.H * T * s.D)


def rope_case(sizes):
    s, B, P, T = sizes.shape, sizes.B, sizes.P, sizes.T
    q = sizes.randn(B, s.H, s.D)
    k = sizes.randn(B, s.K, s.D)
    v = sizes.randn(B, s.K, s.D)
    k_cache = sizes.randn(B, s.K, T, s.D)
    v_cache = sizes.randn(B, s.K, T, s.D)
    slots = torch.arange(B, device=device())
    positions = sizes.full(B, P)
    cos = torch.rand(T, s.D // 2, device=device())
    sin = torch.rand(T, s.D // 2, device=device())

    def ours():
        return kernels.rope_and_cache(q, k, v, k_cache, v_cache, slots, positions, cos, sin)

    def pytorch():
        k_cache[slots, :, positions] = kernels.rotate(k, cos[positions], sin[positions])
        v_cache[slots, :, positions] = v
        return kernels.rotate(q, cos[positions], sin[positions])

    moved = 2 * (q.nbytes + k.nbytes + v.nbytes)
    return KernelCase(ours, pytorch, moved, 0)


def norm_case(sizes):
    E = sizes.shape.E
    x = sizes.randn(sizes.B * sizes.P, E)
    residual = sizes.randn(sizes.B * sizes.P, E)
    weight = sizes.randn(E)
    bias = sizes.randn(E)

    def ours():
        return kernels.add_norm(x, residual, weight, bias, 1e-5, False)

    def pytorch():
        total = x + residual
        return F.layer_norm(total, (E,), weight, bias), total

    return KernelCase(ours, pytorch, 4 * x.nbytes, 0)


def sampling_case(sizes):
    logits = sizes.randn(sizes.B, sizes.shape.V)
    slots = torch.arange(sizes.B, device=device())
    rows = kernels.Rows(
        tokens=slots.new_zeros(sizes.B, 2),
        logprobs=torch.zeros(sizes.B, 2, device=device()),
        lengths=torch.ones_like(slots),
        max_lengths=torch.full_like(slots, 9),
        keys=slots,
        done=torch.zeros_like(slots, dtype=torch.bool),
    )
    eos = slots[:0]

    def ours():
        rows.lengths.fill_(1)
        kernels.sample_next(logits, slots, rows, eos)

    def pytorch():
        logprobs = logits.float().log_softmax(-1)
        noise = torch.empty_like(logprobs).exponential_()
        tokens = (logprobs.exp() / noise).argmax(-1, keepdim=True)
        return tokens, logprobs.gather(1, tokens)

    return KernelCase(ours, pytorch, logits.nbytes, 0)


def logprob_case(sizes):
    s = sizes.shape
    N = sizes.B * sizes.P
    hidden = sizes.randn(N, s.E) * 0.02
    weight = sizes.randn(s.V, s.E)
    targets = torch.randint(s.V, (N,), device=device())

    def ours():
        return kernels.token_logprobs(hidden, weight, targets)

    def pytorch():
        return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")

    moved = weight.nbytes + hidden.nbytes
    return KernelCase(ours, pytorch, moved, 2 * N * s.E * s.V)


def kernel_cases(sizes):
    """{title: function that makes a KernelCase, with buffers of its own}."""
    return {
        "linear": partial(linear_case, sizes, sizes.shape.M),
        "linear, output layer": partial(linear_case, sizes, sizes.shape.V),
        "prefill attention": partial(prefill_case, sizes),
        "decode attention": partial(decode_case, sizes),
        "rotary and cache": partial(rope_case, sizes),
        "add and norm": partial(norm_case, sizes),
        "sampling": partial(sampling_case, sizes),
        "log-probabilities": partial(logprob_case, sizes),
    }


@torch.no_grad()
def time_case(make):
    """Seconds per call of ours and of PyTorch's. On a GPU, calls that follow each other have
    buffers of their own, up to about a gigabyte of them, so that none finds its data in the L2
    cache."""
    made = [make()]
    if torch.cuda.is_available():
        copies = min(CALLS_PER_GRAPH, math.ceil(1e9 / made[0].bytes))
        made += [make() for _ in range(copies - 1)]
    ours = seconds_per_call([case.ours for case in made])
    pytorch = seconds_per_call([case.pytorch for case in made])
    return made[0], ours, pytorch


def kernels_task(cfg, ceilings):
    """The functions of kernels.py at the shapes of a model: time, PyTorch's time, and the share of
    the nearer ceiling, of bytes or of FLOPs."""
    for name in cfg.shapes:
        T = cfg.prompt_len + cfg.new_tokens
        sizes = Sizes(SHAPES[name], cfg.batches[0], cfg.prompt_len, T, cfg.torch_dtype)
        for title, make in kernel_cases(sizes).items():
            case, ours, pytorch = time_case(make)
            by_bytes = case.bytes / ceilings["bytes_per_s"]
            by_flops = case.flops / ceilings["flop_per_s"]
            share = max(by_bytes, by_flops) / ours
            nearer = "bandwidth" if by_bytes >= by_flops else "FLOP"
            print(
                f"{name:<13}{title:<22}{ours * 1e6:>10,.0f} us   "
                f"PyTorch {pytorch * 1e6:>10,.0f} us   {share:>5.0%} of the {nearer} ceiling",
                flush=True,
            )
            yield {
                "model": name,
                "kernel": title,
                "us": ours * 1e6,
                "pytorch_us": pytorch * 1e6,
                "bytes": case.bytes,
                "flops": case.flops,
                "ceiling_share": share,
            }


# -----------------------------------------------------------------------------
# memory of the output layer


def peak_bytes():
    """The most memory that this process has had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def output_layer(chunked):
    """Forward and backward of the output layer for 2,048 tokens, width 256, 128,256 token ids.
    Returns the loss, both gradients, the peak of memory above the start in bytes, and seconds."""
    torch.manual_seed(0)
    hidden = (torch.randn(2048, 256, device=device()) * 0.1).requires_grad_()
    weight = (torch.randn(128_256, 256, device=device()) * 0.1).requires_grad_()
    targets = torch.randint(128_256, (2048,), device=device())
    weight.grad = torch.zeros_like(weight)
    hidden.grad = torch.zeros_like(hidden)
    start = torch.cuda.memory_allocated() if torch.cuda.is_available() else peak_bytes()
    clock = utils.Clock()
    if chunked:
        logprobs, _ = kernels.token_logprobs(hidden, weight, targets)
    else:
        # In one expression, so that nothing keeps the logits longer than autograd does.
        logprobs = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss = -logprobs.mean()
    loss.backward()
    seconds = clock.lap()
    grads = (hidden.grad.cpu(), weight.grad.cpu())
    return loss.item(), grads, peak_bytes() - start, seconds


def memory(cfg, ceilings):
    """Each way in a process of its own: the most memory a process has had cannot be reset."""
    plain_grads = None
    for title, chunked in (("plain logits", False), ("chunked", True)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            loss, grads, peak, seconds = pool.apply(output_layer, (chunked,))
        if plain_grads is None:
            plain_grads = grads
        errors = [(a - b).norm() / b.norm() for a, b in zip(grads, plain_grads)]
        difference = max(errors).item()
        print(
            f"{title:<14} loss {loss:.6f}   peak {peak / 2**20:>7,.0f} MiB   {seconds:.2f} s   "
            f"gradients differ by {difference:.1e}"
        )
        yield {
            "how": title,
            "loss": loss,
            "peak_mib": peak / 2**20,
            "seconds": seconds,
            "gradients_off": difference,
        }


# -----------------------------------------------------------------------------
# the largest actor


def fit(cfg, ceilings):
    """Two iterations of PPO with OPT actors of growing size, until one does not fit: with all
    weights trained, then with LoRA and gradient checkpointing. The critic and the reward model are
    of --critic's shape."""
    lora = {"lora": "8", "gradient_checkpointing": True}
    for how, options in (("all weights", {}), ("LoRA 8, gradient checkpointing", lora)):
        changed = dataclasses.replace(cfg, critic=cfg.critic or "opt-350m", **options)
        for name in SHAPES:
            if not name.startswith("opt-") or name == "opt-4x256":
                continue
            gib, error = try_to_fit(changed, name)
            result = f"trains, {gib:.1f} GiB at most" if error is None else error
            print(f"{how:<32}{name:<10}{result}", flush=True)
            yield {"how": how, "model": name, "memory_gib": gib, "error": error}
            if error:
                break


def try_to_fit(cfg, name):
    """Runs two iterations in a process of its own, so that what it allocates goes with it. Returns
    (most memory in GiB, None), or (None, why it does not fit)."""
    s = SHAPES[name]
    weights = (s.L * layer_params(s) + s.E * s.V) * cfg.torch_dtype.itemsize
    if weights > available_bytes():
        return None, "its weights alone are larger than the memory"

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_memory, args=(sender, cfg, name))
    process.start()
    sender.close()
    while process.is_alive() and not receiver.poll(0.1):
        if not torch.cuda.is_available() and psutil.virtual_memory().available < 2 * 2**30:
            process.kill()  # before the system ends something else
    result = (None, "out of memory")
    with contextlib.suppress(EOFError):  # raised where the process was killed
        result = receiver.recv()
    process.join()
    return result


def send_memory(connection, cfg, name):
    """What the process of try_to_fit runs."""
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(variable, None)  # it is a world of its own
    try:
        utils.init_distributed(cfg.seed)
        case = Case("fixed", cfg.batches[0], cfg.new_tokens)
        last = ppo_iterations(cfg, name, case, "hybrid", 2)[-1]
        connection.send((last["memory_gib"], None))
    except torch.OutOfMemoryError:
        connection.send((None, "out of memory"))
    except Exception as error:  # libraries fail in ways of their own when memory is scarce
        connection.send((None, f"{type(error).__name__}: {models.first_line(error)}"))


# -----------------------------------------------------------------------------
# peaks of memory, and what plan.py says of them

SMALL_OPT = "layers=6,width=640,heads=10,ffn=2560,vocab=16384"
SMALL_CRITIC = "layers=3,width=640,heads=10,ffn=2560,vocab=16384"
SMALL_LLAMA = (
    "family=llama,layers=10,width=512,heads=8,kv-heads=2,ffn=1408,vocab=24576,tied=no"
)
PAIR = {"model": SMALL_OPT, "critic": SMALL_CRITIC}
ALIKE = {"model": SMALL_LLAMA, "critic": SMALL_LLAMA}
SHORT_ROWS = {"prompt_len": 64, "batch": "8", "micro_batch": 2, "minibatches": 2, "new_tokens": 32}
LONG_ROWS = {"prompt_len": 448, "batch": "4", "micro_batch": 4, "minibatches": 1, "new_tokens": 64}
MEMORY_CASES = {  # name: (ranks, fields of Config)
    "fp32": (1, PAIR | SHORT_ROWS),
    "fp32, long rows": (1, ALIKE | LONG_ROWS),
    "gradient checkpointing, long rows": (1, ALIKE | LONG_ROWS | {"gradient_checkpointing": True}),
    "LoRA 16": (1, ALIKE | SHORT_ROWS | {"lora": "16"}),
    "bf16": (1, PAIR | SHORT_ROWS | {"dtype": "bf16"}),
    "ZeRO 1, 2 ranks": (2, PAIR | SHORT_ROWS | {"zero": 1}),
    "ZeRO 2, 2 ranks": (2, PAIR | SHORT_ROWS | {"zero": 2}),
    "ZeRO 3, 2 ranks": (2, PAIR | SHORT_ROWS | {"zero": 3}),
    "ZeRO 3 and LoRA 16, 2 ranks": (2, ALIKE | SHORT_ROWS | {"zero": 3, "lora": "16"}),
}


def planned_config(cfg, ranks):
    """plan.py's Config of the same run."""
    gpu = "cpu"
    for name in plan.MACHINES:
        if name.partition("-")[0].upper() in device_name():
            gpu = name
    return plan.Config(
        model=cfg.model,
        critic=cfg.critic,
        lora=cfg.lora,
        prompt_len=cfg.prompt_len,
        max_new_tokens=cfg.new_tokens,
        batch_size=cfg.batches[0],
        minibatches=cfg.minibatches,
        micro_batch=cfg.micro_batch,
        dtype=cfg.dtype,
        zero=cfg.zero,
        gradient_checkpointing=cfg.gradient_checkpointing,
        gpus=ranks,
        gpu=gpu,
    )


def plan_memory(cfg, ceilings):
    """The peak of each phase in the second of two iterations of PPO, measured and predicted."""
    for name, (ranks, fields) in MEMORY_CASES.items():
        if torch.cuda.is_available() and ranks > torch.cuda.device_count():
            continue
        case = MemoryConfig(ragged=0, **fields)
        measured = measure_peaks(case, ranks)
        predicted = plan.Memory(planned_config(case, ranks)).totals
        row = {"case": name, "ranks": ranks, "flags": fields}
        row["measured_mib"] = {phase: x / 2**20 for phase, x in measured.items()}
        row["predicted_mib"] = {phase: x / 2**20 for phase, x in predicted.items()}
        row["ratio"] = max(predicted.values()) / max(measured.values())
        text = ""
        for phase, mib in row["measured_mib"].items():
            text += f"  {phase} {row['predicted_mib'][phase]:,.0f} / {mib:,.0f}"
        print(f"{name:<36}predicted / measured, MiB:{text}  {row['ratio']:.2f}", flush=True)
        yield row


class MemoryConfig(Config):
    """A Config whose models may be described, as in plan.py."""

    def __post_init__(self):
        pass


def measure_peaks(case, ranks):
    """Bytes of each phase, of the rank that needs the most. Ranks are processes of their own."""
    # Freed memory goes back to the system at once, so that it does not count.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    context = multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes, receivers = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=send_peaks, args=(sender, case, rank, ranks, port))
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    of_ranks = [receiver.recv() for receiver in receivers]
    for process in processes:
        process.join()
    return {phase: max(peaks[phase] for peaks in of_ranks) for phase in of_ranks[0]}


def send_peaks(connection, case, rank, ranks, port):
    """What a process of measure_peaks runs."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    utils.init_distributed(case.seed)
    # A small run first: libraries that are loaded on the way are not the run's memory.
    tiny = "layers=1,width=64,heads=1,ffn=64,vocab=512"
    phase_peaks(dataclasses.replace(case, model=tiny, critic=tiny), 0)
    free_unused_memory()
    connection.send(phase_peaks(case, current_bytes()))
    dist.barrier()


def phase_peaks(case, baseline):
    """Two iterations; the peaks of the second one above the baseline, in bytes."""
    for name in (case.model, case.critic):
        SHAPES[name] = plan.find_shape("--model", name)
    rows = Case("fixed", case.batches[0], case.new_tokens)
    run = PPO(case, case.model, rows, "hybrid", 2)
    run.ema = training.EMA(run.actor, ppo.Config.ema)
    run.iteration(1)
    peaks = {}  # the one before the first phase is of iteration 1
    run.iteration(2, lambda phase: peaks.update({phase: start_peak() - baseline}))
    del peaks["start"]
    return peaks


def current_bytes():
    """Memory that this process has now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def start_peak():
    """Starts a new peak. Returns the last one, in bytes."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what there is now
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# -----------------------------------------------------------------------------

TASKS = {
    "generate": generate,
    "profile": profile,
    "nano-vllm": nano_vllm,
    "train": train,
    "ppo": ppo_task,
    "kernels": kernels_task,
    "memory": memory,
    "fit": fit,
    "plan-memory": plan_memory,
}
NEED_CEILINGS = ("generate", "nano-vllm", "train", "ppo", "kernels")


def parse_task(argv):
    """Splits the command line into (task, name of the job or "", flags)."""
    if not argv or argv[0] in ("-h", "--help"):
        return "generate", "", ["--help"]
    task, *flags = argv
    job = ""
    if task == "job":
        job = flags.pop(0) if flags else ""
        if job not in JOBS:
            sys.exit(f"error: there is no job {job!r}; there are {', '.join(JOBS)}")
        task, *job_flags = JOBS[job].command.split()
        flags = job_flags + flags  # the last one of a flag counts
    if task not in (*TASKS, "tables"):
        names = ", ".join([*TASKS, "job", "tables"])
        sys.exit(f"error: there is no task {task!r}; there are {names} (--help explains them)")
    return task, job, flags


def main(cfg, task, job="", command=""):
    if task == "tables":
        path = Path(cfg.out) / "README.md"
        utils.atomic_write(path, tables.readme(cfg.out))
        print(f"wrote {path}")
        return
    utils.quiet_transformers()
    torch.manual_seed(cfg.seed)
    print(f"{device_name()}, {processor_name()}, torch {torch.__version__}, {cfg.torch_dtype}")
    ceilings = None
    if task in NEED_CEILINGS:
        ceilings = measure_ceilings(cfg.torch_dtype)
    record = Record(cfg, task, job, command, ceilings)
    for row in TASKS[task](cfg, ceilings):
        record.add(row)
    print(f"wrote {record.path}")


if __name__ == "__main__":
    command = shlex.join(["python", "bench.py", *sys.argv[1:]])
    task, job, sys.argv[1:] = parse_task(sys.argv[1:])
    utils.run(partial(main, task=task, job=job, command=command), Config)
