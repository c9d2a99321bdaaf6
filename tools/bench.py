"""How fast are generation, a PPO iteration, and the kernels?

    python -m tools.bench generate --model opt-1.3b --batch 32 --prompt-len 256 --new-tokens 256
    python -m tools.bench generate --ragged --batch 256 --new-tokens 256    # answers end by EOS
    python -m tools.bench generate --model qwen3-0.6b --batch 256 --lengths 100..1024
    python -m tools.bench ppo --engine hf --iterations 4
    python -m tools.bench kernels --model llama-8b

generate compares with transformers.generate and transformers' generate_batch (its own continuous
batching), kernels with PyTorch; ppo runs ppo.py and reads its metrics. Models have the shapes of
tools.plan and random weights. All sides take turns, one that is not counted first, and a number is
the median over turns. Each result is a line of JSON, printed and appended to --out, with command,
commit, device and threads.

Dimension key:  B rows, P prompt, T = P + A longest row, H heads, K key/value heads, D head size,
                E width, M width of the MLP, V vocabulary.
"""
import json
import logging
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import kernels
import utils
from hybrid_engine import HybridEngine
from tools.plan import find_config

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROOT = Path(utils.__file__).parent


@dataclass(frozen=True)
class Config:
    model: str = "llama-4x256"     # as in tools.plan
    critic: str = ""               # ppo: of the critic and the reward model; empty: as --model
    batch: int = 32                # prompts; ppo: answers per rollout
    prompt_len: int = 64           # tokens of a prompt
    new_tokens: int = 64           # longest answer
    ragged: bool = False           # answers end by EOS: geometric lengths with a mean of 32 tokens
    lengths: str = ""              # 100..1024: nano-vllm's workload, prompts and answers of these
    #   lengths at temperature 0.6; ours only
    against: str = "generate,generate_batch"  # methods of transformers to compare with
    engine: Literal["hybrid", "hf"] = "hybrid"  # ppo: as in ppo.py
    iterations: int = 4            # ppo: the first one is not counted
    minibatches: int = 1           # ppo: optimizer steps per iteration
    flags: str = ""                # ppo: more flags of ppo.py, such as "--lora 64 --micro-batch 8"
    turns: int = 5                 # of each side
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 1
    out: str = ""                  # file that results are appended to


def device_name():
    if CUDA:
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {len(names)} cores"


def record(cfg, **result):
    """Prints a result, and appends it to --out."""
    import transformers

    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT,
                            capture_output=True, text=True).stdout.strip()
    result |= {
        "command": shlex.join(["python", "-m", "tools.bench", *sys.argv[1:]]), "commit": commit,
        "device": device_name(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }
    rounded = {k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in result.items()}
    line = json.dumps(rounded)
    print(line, flush=True)
    if cfg.out:
        with open(cfg.out, "a") as f:
            f.write(line + "\n")


def build(name, dtype, auto_class="AutoModelForCausalLM", **entries):
    """A transformers model of this shape with random weights."""
    import transformers

    torch.manual_seed(0)
    config = find_config(name)
    config.update(entries)
    with torch.device(DEVICE):
        return getattr(transformers, auto_class).from_config(config, dtype=dtype).eval()


def alternate(sides, turns):
    """Runs functions of a seed in turn, {name: function}. Returns {name: [(seconds, result), ...]}
    without the first turn."""
    measured = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            result = side(turn)
            if CUDA:
                torch.cuda.synchronize()
            measured[name].append((time.perf_counter() - start, result))
    return {name: results[1:] for name, results in measured.items()}


# -----------------------------------------------------------------------------
# generate


def nano_vllm_requests(n, shortest, longest, V):
    """The requests of nano-vllm's bench.py, which draws them from Python's generator with seed 0.
    Returns the prompts and the lengths of their answers."""
    rng = random.Random(0)
    prompts = []
    for _ in range(n):
        length = rng.randint(shortest, longest)
        prompts.append([rng.randint(0, 10_000) % V for _ in range(length)])
    return prompts, [rng.randint(shortest, longest) for _ in range(n)]


def generate_lengths(engine, prompts, answer_lens, temperature, seed):
    """HybridEngine.generate with a length for each answer."""
    with torch.no_grad():
        engine.start(prompts, max(answer_lens), temperature, seed=seed)
        engine.max_lens = engine.prompt_lens + answer_lens
        while engine.waiting or engine.running:
            engine.step()
        return engine.rollout(slice(None))


def transformers_generate(lm, prompts, new_tokens, ends):
    """transformers.generate on prompts of one length: all rows run until the last one has ended.
    Returns the number of sampled tokens, up to and with the EOS of each row."""
    ids = torch.tensor(prompts, device=DEVICE)                                      # (B, P)
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                      do_sample=True, top_k=0, eos_token_id=ends, pad_token_id=0)
    answers = out[:, ids.size(1) :]                                                 # (B, A)
    is_end = torch.isin(answers, torch.tensor(ends or [-1], device=DEVICE))
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, answers.size(1))
    return int(lengths.sum())


def transformers_generate_batch(lm, prompts, new_tokens, ends):
    """transformers' own continuous batching. Its manager is kept: a start takes it seconds."""
    from transformers.generation import ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=True, top_k=0, pad_token_id=0,
                              eos_token_id=ends or -1)
    memory = ContinuousBatchingConfig(max_memory_percent=None if CUDA else 0.1)
    outputs = lm.generate_batch(prompts, config, memory, persistent_manager=True)
    return sum(len(output.generated_tokens) for output in outputs.values())


@torch.no_grad()
def generate(cfg):
    """Sampled tokens per second, prefill included."""
    lm = build(cfg.model, utils.dtype_of(cfg.dtype))
    engine = HybridEngine(lm)
    V = lm.config.vocab_size
    row = {"model": cfg.model, "vocabulary": V, "prompts": cfg.batch}
    if cfg.lengths:
        shortest, longest = map(int, cfg.lengths.split(".."))
        prompts, answer_lens = nano_vllm_requests(cfg.batch, shortest, longest, V)
        row |= {"lengths": cfg.lengths, "prompt_tokens": sum(map(len, prompts))}

        def ours(seed):
            out = generate_lengths(engine, prompts, answer_lens, 0.6, seed)
            return int(out.answer_lens.sum())

        sides = {"hybrid": ours}
    else:
        # Random weights sample nearly uniformly: a 32nd of the vocabulary ends a row.
        ends = list(range(V // 32)) if cfg.ragged else None
        generator = torch.Generator().manual_seed(cfg.seed)
        shape = (cfg.batch, cfg.prompt_len)
        prompts = torch.randint(V // 32, V, shape, generator=generator).tolist()
        row |= {"prompt_len": cfg.prompt_len, "new_tokens": cfg.new_tokens, "ragged": cfg.ragged}

        def ours(seed):
            out = engine.generate(prompts, cfg.new_tokens, eos_token_id=ends, seed=seed)
            return int(out.answer_lens.sum())

        others = {"generate": transformers_generate, "generate_batch": transformers_generate_batch}
        sides = {"hybrid": ours}
        for name in filter(None, cfg.against.split(",")):
            sides[name] = lambda _, f=others[name]: f(lm, prompts, cfg.new_tokens, ends)
    measured = alternate(sides, cfg.turns)
    if "generate_batch" in sides:
        lm.destroy_cached_continuous_batching_manager()
    ours_s = [seconds / tokens for seconds, tokens in measured["hybrid"]]  # per token
    for name, results in measured.items():
        per_token = [seconds / tokens for seconds, tokens in results]
        ratios = [a / b for a, b in zip(per_token, ours_s)]
        record(cfg, job="generate", side=name, **row,
               mean_length=statistics.mean(tokens for _, tokens in results) / cfg.batch,
               tokens_per_s=1 / statistics.median(per_token),
               hybrid_is_faster_by=statistics.median(ratios),
               runs=[round(1 / x) for x in per_token])


# -----------------------------------------------------------------------------
# ppo


def tokenizer_with(V):
    """The built-in tokenizer of bytes with as many words as a model has, so that all are sampled.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = utils.load_tokenizer("tiny")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {f"word{i}": i for i in range(len(tokenizer), V)}
    larger = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=larger, eos_token="<eos>", pad_token="<pad>",
                                   chat_template=tokenizer.chat_template)


def save_inputs(cfg, folder):
    """Writes what ppo.py reads: actor, reward model, and prompts of --prompt-len tokens."""
    dtype = utils.dtype_of(cfg.dtype)
    lm = build(cfg.model, dtype)
    V = lm.config.vocab_size
    tokenizer = tokenizer_with(V)
    # A 32nd of the vocabulary ends a row, but no byte does: prompts are made of them.
    ends = list(range(V - V // 32, V)) if cfg.ragged else tokenizer.eos_token_id
    lm.generation_config.eos_token_id = ends
    lm.save_pretrained(folder / "actor")
    reward = build(cfg.critic or cfg.model, dtype, "AutoModelForSequenceClassification",
                   num_labels=1)
    torch.nn.init.normal_(reward.score.weight, std=reward.score.in_features**-0.5)
    reward.save_pretrained(folder / "reward")
    for name in ("actor", "reward"):
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(cfg.seed)
    message = [{"role": "user", "content": ""}]
    around = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    rows = max(100, 2 * cfg.batch * cfg.iterations)
    with open(folder / "prompts.jsonl", "w") as f:
        for _ in range(rows):
            letters = rng.choices("abcdefgh", k=cfg.prompt_len - len(around))
            f.write(json.dumps({"prompt": "".join(letters)}) + "\n")


def ppo_flags(cfg, folder):
    """Of ppo.py, for what save_inputs has written."""
    flags = {
        "model": folder / "actor", "reward": folder / "reward", "data": folder / "prompts.jsonl",
        "out": folder / "out", "max-len": cfg.prompt_len + cfg.new_tokens,
        "max-new-tokens": cfg.new_tokens, "engine": cfg.engine, "iterations": cfg.iterations,
        "batch-size": cfg.batch, "minibatches": cfg.minibatches, "ema": 0, "dtype": cfg.dtype,
        "seed": cfg.seed,
    }
    return [f"--{name}={value}" for name, value in flags.items()] + shlex.split(cfg.flags)


# ppo.py, but without checkpoints: of a large model each takes longer than an iteration.
PPO = "import ppo, utils; utils.Run.save = lambda *a, **k: None; utils.run(ppo.main, ppo.Config)"
COLUMNS = ("seconds", "rollout_s", "score_s", "update_s", "length", "tokens_per_s", "memory_gib")


def ppo(cfg):
    """Seconds of each phase of an iteration, as ppo.py itself measures them."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_inputs(cfg, folder)
        command = [sys.executable, "-c", PPO, *ppo_flags(cfg, folder)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        lines = (folder / "out/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["step"] > 1]  # 0 is an evaluation, 1 warms up
    medians = {}
    for name in COLUMNS:
        if name in rows[0]:
            medians[name] = statistics.median(row[name] for row in rows)
    record(
        cfg, job="ppo", engine=cfg.engine, model=cfg.model, critic=cfg.critic or cfg.model,
        batch=cfg.batch, prompt_len=cfg.prompt_len, new_tokens=cfg.new_tokens, ragged=cfg.ragged,
        flags=cfg.flags, **medians, pairs_per_s=cfg.batch / medians["seconds"],
        runs=[round(row["seconds"], 3) for row in rows])


# -----------------------------------------------------------------------------
# kernels


def seconds_per_call(function):
    """On a GPU with a cold L2 cache; on a CPU the mean of at least 50 ms of calls."""
    if CUDA:
        from triton.testing import do_bench

        return do_bench(function, return_mode="median") / 1e3
    calls = 1
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds = time.perf_counter() - start
        if seconds > 0.05:
            return seconds / calls
        calls *= 2


def kernel_cases(config, B, P, T, dtype):
    """Yields a name, our function, what PyTorch has for it, and the bytes that must move."""
    E, H, V = config.hidden_size, config.num_attention_heads, config.vocab_size
    K = getattr(config, "num_key_value_heads", None) or H
    D = getattr(config, "head_dim", None) or E // H
    M = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * E)

    def randn(*size):
        return torch.randn(*size, device=DEVICE, dtype=dtype)

    slots = torch.arange(B, device=DEVICE)
    x, up, head = randn(B, E), randn(M, E), randn(V, E)
    yield ("linear", lambda: kernels.linear(x, up), lambda: F.linear(x, up), up.nbytes)
    yield ("output layer", lambda: kernels.linear(x, head), lambda: F.linear(x, head), head.nbytes)

    spec = kernels.AttentionSpec(D**-0.5)
    q, k, v = randn(B * P, H, D), randn(B * P, K, D), randn(B * P, K, D)
    cu_seqlens = torch.arange(0, B * P + 1, P, dtype=torch.int32, device=DEVICE)
    q4, k4, v4 = (x.view(B, P, -1, D).transpose(1, 2) for x in (q, k, v))           # (B, H, P, D)
    yield ("prefill attention",
           lambda: kernels.prefill_attention(q, k, v, cu_seqlens, spec),
           lambda: F.scaled_dot_product_attention(q4, k4, v4, is_causal=True, enable_gqa=H != K),
           2 * q.nbytes + k.nbytes + v.nbytes)

    q1 = randn(B, H, D)
    k_cache, v_cache = randn(B, K, T, D), randn(B, K, T, D)
    lengths = torch.full_like(slots, T)
    yield ("decode attention",
           lambda: kernels.decode_attention(q1, k_cache, v_cache, lengths, spec),
           lambda: F.scaled_dot_product_attention(q1[:, :, None], k_cache, v_cache,
                                                  enable_gqa=H != K),
           k_cache.nbytes + v_cache.nbytes)

    stream, residual, weight, bias = randn(B * P, E), randn(B * P, E), randn(E), randn(E)
    yield ("add and norm",
           lambda: kernels.add_norm(stream, residual, weight, bias, 1e-5, False),
           lambda: F.layer_norm(stream + residual, (E,), weight, bias), 4 * stream.nbytes)

    logits = randn(B, V)
    rows = kernels.Rows(tokens=slots.new_zeros(B, 2), logprobs=torch.zeros(B, 2, device=DEVICE),
                        lengths=torch.ones_like(slots), max_lengths=torch.full_like(slots, 9),
                        keys=slots, done=torch.zeros_like(slots, dtype=torch.bool))

    def sample():
        rows.lengths.fill_(1)
        kernels.sample_next(logits, slots, rows, slots[:0])

    def sample_by_pytorch():
        logprobs = logits.float().log_softmax(-1)
        tokens = torch.multinomial(logprobs.exp(), 1)
        return tokens, logprobs.gather(1, tokens)

    yield ("sampling", sample, sample_by_pytorch, logits.nbytes)

    hidden, targets = 0.02 * randn(B * P, E), torch.randint(V, (B * P,), device=DEVICE)
    yield ("log-probabilities",
           lambda: kernels.token_logprobs(hidden, head, targets),
           lambda: -F.cross_entropy((hidden @ head.T).float(), targets, reduction="none"),
           head.nbytes + hidden.nbytes)


@torch.no_grad()
def kernels_job(cfg):
    """Microseconds of the functions of kernels.py and of PyTorch at the shapes of a model."""
    dtype = utils.dtype_of(cfg.dtype)
    T = cfg.prompt_len + cfg.new_tokens
    for case in kernel_cases(find_config(cfg.model), cfg.batch, cfg.prompt_len, T, dtype):
        name, ours, pytorch, moved = case
        seconds = {"ours": [], "pytorch": []}
        for _ in range(cfg.turns):
            seconds["ours"].append(seconds_per_call(ours))
            seconds["pytorch"].append(seconds_per_call(pytorch))
        us = {side: 1e6 * statistics.median(x) for side, x in seconds.items()}
        record(cfg, job="kernels", kernel=name, model=cfg.model, batch=cfg.batch, length=T,
               us=us["ours"], pytorch_us=us["pytorch"], gb_per_s=moved / us["ours"] / 1e3)


JOBS = {"generate": generate, "ppo": ppo, "kernels": kernels_job}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in JOBS:
        sys.exit(f"{__doc__}\nusage: python -m tools.bench {{{','.join(JOBS)}}} --help")
    arguments = sys.argv[2:]
    JOBS[sys.argv[1]](utils.parse_args(Config, arguments))
