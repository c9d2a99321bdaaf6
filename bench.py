"""How fast is it here, next to what, and how far from what the machine can do? Random weights of real shapes; nothing is downloaded.

    python bench.py generate                                   # engine and transformers.generate, at fixed and at ragged lengths
    python bench.py generate --model opt-1.3b --batch 1,32,128 --prompt-len 256 --new-tokens 256
    python bench.py train --model opt-1.3b --batch 16 --micro-batch 8 --prompt-len 256 --new-tokens 256
    python bench.py ppo                                        # whole iterations of ppo.py, by phase, ours and with transformers' generation
    python bench.py ppo --model opt-1.3b --critic opt-350m --batch 128 --micro-batch 16 --prompt-len 256 --new-tokens 256 --ragged 0
    python bench.py kernels                                    # each against its ceiling, and against PyTorch
    python bench.py memory                                     # a training step with 128k words, with and without (B, T, V) logits
    python bench.py fit --prompt-len 256 --new-tokens 256      # the largest actor that trains here
    python bench.py scale --model opt-13b --world 8..1024      # on paper: a step on many GPUs, from what was measured on one

Both sides of a comparison run in one process, turn by turn (of ppo: some iterations of each, twice); a row is the median of --repeats turns.
Ceilings (copying, matrix products) are measured in the same run. Everything is also written to OUT/DEVICE-TASK.json, or OUT/DEVICE-TASK-MODEL.json, with versions and commit.
"""
import contextlib
import dataclasses
import gc
import io
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.nn.functional as F

import kernels
import models
import training
import utils
from hybrid_engine import HybridEngine

# name: family, layers, width, heads, key/value heads, width of the MLP, vocabulary
SHAPES = {
    "opt-4x256": ("opt", 4, 256, 4, 4, 1024, 8192), "llama-4x256": ("llama", 4, 256, 4, 2, 688, 8192),
    "opt-125m": ("opt", 12, 768, 12, 12, 3072, 50272), "opt-350m": ("opt", 24, 1024, 16, 16, 4096, 50272),
    "opt-1.3b": ("opt", 24, 2048, 32, 32, 8192, 50272), "opt-2.7b": ("opt", 32, 2560, 32, 32, 10240, 50272),
    "opt-6.7b": ("opt", 32, 4096, 32, 32, 16384, 50272), "opt-13b": ("opt", 40, 5120, 40, 40, 20480, 50272),
    "opt-30b": ("opt", 48, 7168, 56, 56, 28672, 50272), "opt-66b": ("opt", 64, 9216, 72, 72, 36864, 50272),
    "llama-1b": ("llama", 16, 2048, 32, 8, 8192, 128256), "llama-8b": ("llama", 32, 4096, 32, 8, 14336, 128256),
    "llama-70b": ("llama", 80, 8192, 64, 8, 28672, 128256), "qwen3-8b": ("qwen3", 36, 4096, 32, 8, 12288, 151936),
}
PAIRS = 264_292  # of DeepSpeed-Chat's step 3 (its BenckmarkSetting.md); one epoch


@dataclass(frozen=True)
class Config:
    model: str = "opt-4x256,llama-4x256"  # shapes, joined by commas; see SHAPES
    critic: str = ""                   # shape of critic and reward model; empty: that of the actor
    batch: str = "32"                  # prompts answered together, or rows of a training step; generate takes several, joined by commas
    micro_batch: int = 0               # rows that training takes at once; 0: all
    prompt_len: int = 64               # tokens of a prompt
    new_tokens: int = 64               # tokens of an answer
    ragged: int = 8                    # also answers of geometric lengths (mean 32, at most 256), so many times --batch prompts; 0: not
    lora: str = ""                     # as in ppo.py
    save_memory: Literal["no", "recompute", "offload", "both"] = "no"  # as in ppo.py
    world: str = "8..1024"             # scale: numbers of GPUs, joined by commas; 8..1024 doubles from 8 to 1024
    repeats: int = 7                   # turns of each side; the median is shown
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU, fp32 on a CPU
    out: str = "results"               # folder of the raw numbers
    seed: int = 1                      # of weights and of sampling

    def __post_init__(self):
        for name in filter(None, (*self.model.split(","), self.critic)):
            if name not in SHAPES:
                raise utils.UserError(f"--model {name}: no such shape; there are {', '.join(SHAPES)}")
        for flag, text in (("batch", self.batch), ("world", self.world)):
            if not numbers(text):
                raise utils.UserError(f"--{flag} {text}: needs numbers above 0, joined by commas, such as 8,64, or 8..64 for 8,16,32,64")

    @property
    def batches(self):
        return numbers(self.batch)


def numbers(text):
    """'1,8..32' to [1, 8, 16, 32]; [] where it is not understood."""
    out = []
    for part in text.split(","):
        low, _, high = part.partition("..")
        if not low.isdigit() or not int(low) or high and not high.isdigit():
            return []
        n = int(low)
        while n <= int(high or low):
            out, n = [*out, n], 2 * n
    return out


def build(name, dtype, context=2048, auto="AutoModelForCausalLM"):
    """A model of a shape, with random weights, made on the device."""
    import transformers
    family, L, E, H, K, M, V = SHAPES[name]
    common = dict(vocab_size=V, hidden_size=E, num_hidden_layers=L, num_attention_heads=H, max_position_embeddings=max(context, 2048), num_labels=1)
    if family == "opt":
        post = name == "opt-350m"
        config = transformers.OPTConfig(**common, ffn_dim=M, word_embed_proj_dim=E // 2 if post else E, do_layer_norm_before=not post, dropout=0.0)
    else:
        config = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[family](**common, num_key_value_heads=K, intermediate_size=M, head_dim=E // H)
    with torch.device(device()):
        return getattr(transformers, auto).from_config(config, dtype=dtype).eval()


def flops(name, tokens, length, heads):
    """Of a forward of `tokens` in rows of `length`, `heads` of which also go through the output layer: 2 a weight and token, and causal attention."""
    _, L, E, H, K, M, V = SHAPES[name]
    layer = 2 * E * E + 2 * E * E * K // H + (2 if name.startswith("opt") else 3) * E * M
    return 2 * L * layer * tokens + 2 * L * E * length * tokens + 2 * E * V * heads


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name():
    return torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else f"cpu-{torch.get_num_threads()}-threads"


def fresh():
    """Gives back what is no longer used (DeepSpeed's engines hold cycles), and begins to record the most memory anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(f, at_least=0.2):
    """Median time of a call. On a CPU of 5 groups of calls that take at_least seconds together; on a GPU of 20, each as a graph, as the engine runs it,
    after something else has filled the cache."""
    f(), f()
    if torch.cuda.is_available():
        graph, cache, events = torch.cuda.CUDAGraph(), torch.empty(2**28, dtype=torch.uint8, device="cuda"), []
        with torch.cuda.graph(graph):
            f()
        for _ in range(20):
            cache.zero_()
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record(), graph.replay(), events[-1][1].record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in events) / 1e3
    clock = utils.Clock()
    f()
    n = max(1, int(at_least / 5 / max(clock.lap(), 1e-7)))
    groups = []
    for _ in range(5):
        for _ in range(n):
            f()
        groups.append(clock.lap() / n)
    return statistics.median(groups)


def ceilings(dtype):
    """What this device does at best: bytes/s of copying (read and written), FLOP/s of a matrix product."""
    cuda = torch.cuda.is_available()
    x = torch.zeros((2**31 if cuda else 2**28) // 4, device=device())
    y = torch.empty_like(x)
    n = 8192 if cuda else 1024
    a, b = torch.randn(n, n, device=device(), dtype=dtype), torch.randn(n, n, device=device(), dtype=dtype)
    product = torch.mm if cuda else kernels.linear
    out = {"bytes_per_s": 2 * x.numel() * 4 / seconds(lambda: y.copy_(x)), "flop_per_s": 2 * n**3 / seconds(lambda: product(a, b))}
    print(f"ceilings, measured: copying {out['bytes_per_s'] / 1e9:,.0f} GB/s, matrix products {out['flop_per_s'] / 1e12:,.2f} TFLOP/s")
    return out


def turns(repeats, **sides):
    """Runs the sides turn by turn, once to warm up; {side: [(seconds, result) of each turn]}."""
    out = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            clock = utils.Clock()
            result = side(turn)
            if turn:
                out[name].append((clock.lap(), result))
    return out


# -----------------------------------------------------------------------------
# generation


def transformers_generate(lm, prompts, new_tokens, eos):
    """Tokens sampled by transformers.generate; nothing else is asked of it. prompts: lists of one length."""
    ids = torch.tensor(prompts, device=device())
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=True, top_k=0, eos_token_id=eos, pad_token_id=0)
    answers = out[:, ids.size(1) :]
    ended = torch.isin(answers, torch.tensor(eos or [-1], device=device())).int()
    return int(torch.where(ended.any(1), ended.argmax(1) + 1, answers.size(1)).sum())


def generate(cfg, peak):
    """Sampling at temperature 1: fixed lengths (no EOS), and answers that end at geometric lengths (mean 32, at most 256)."""
    rows = []
    for name in cfg.model.split(","):
        lm = engine = None
        fresh()
        lm = build(name, utils.precision(cfg.dtype), cfg.prompt_len + max(cfg.new_tokens, 256))
        V, g = lm.config.vocab_size, torch.Generator().manual_seed(cfg.seed)
        engine = HybridEngine(lm)

        def ours(turn):
            out = engine.generate(prompts, new, eos_token_id=eos, seed=turn)
            return int(out.answer_lens.sum()), dict(engine.stats)
        for case, n, new in [("fixed", b, cfg.new_tokens) for b in cfg.batches] + [("ragged", cfg.ragged * b, 256) for b in cfg.batches if cfg.ragged]:
            # Random weights sample nearly uniformly: with a 32nd of the vocabulary as EOS, lengths are geometric with mean 32.
            eos = list(range(V // 32)) if case == "ragged" else None
            prompts = torch.randint(V // 32, V, (n, cfg.prompt_len), generator=g).tolist()
            both = turns(cfg.repeats, ours=ours, theirs=lambda t: (transformers_generate(lm, prompts, new, eos), None))
            speed = {side: [tokens / s for s, (tokens, _) in runs] for side, runs in both.items()}
            stats = [s for _, (_, s) in both["ours"]]
            rows.append(r := {"model": name, "case": case, "prompts": n, "prompt_len": cfg.prompt_len, "new_tokens": new,
                              "mean_length": statistics.mean(tokens / n for _, (tokens, _) in both["ours"]),
                              "tokens_per_s": statistics.median(speed["ours"]), "transformers_tokens_per_s": statistics.median(speed["theirs"]),
                              "ratio": statistics.median(a / b for a, b in zip(speed["ours"], speed["theirs"])),
                              "ms_a_step": statistics.median(1e3 * s["decode_s"] / max(1, s["decode_steps"]) for s in stats),
                              "floor_share": statistics.median(s["gb_per_s"] * 1e9 / peak["bytes_per_s"] for s in stats), "runs": speed})
            print(f"{name:<12}{case:<7}{n:>5} x {cfg.prompt_len}+{new:<4} engine {r['tokens_per_s']:>8,.0f} tokens/s, {r['ms_a_step']:6.2f} ms a step, {r['floor_share']:4.0%} of the "
                  f"bandwidth floor   transformers.generate {r['transformers_tokens_per_s']:>7,.0f}   ratio {r['ratio']:.2f}", flush=True)
    return rows


# -----------------------------------------------------------------------------
# training


def train(cfg, peak):
    """Optimizer steps of the three scripts' kinds on full rows: tokens/s, and the share of the matrix-product ceiling that the model's own FLOPs are (MFU)."""
    import ppo as script
    import reward
    utils.boot(cfg.seed)
    rows = []
    for name in cfg.model.split(","):
        B, P, A = cfg.batches[0], cfg.prompt_len, cfg.new_tokens
        T, V = P + A, SHAPES[name][-1]
        micro, accumulate = utils.micro_batches(B, cfg.micro_batch, 1)
        g = torch.Generator().manual_seed(cfg.seed)
        tokens = torch.randint(V, (B, T), generator=g).to(device())
        lens = [torch.full((micro,), n, device=device()) for n in (P, A)]
        parts = tokens.split(micro)

        def engine_of(module, lr=1e-6):
            options = script.Config(lora=cfg.lora, save_memory=cfg.save_memory, dtype=cfg.dtype)
            return training.train_engine(module, lr, micro, accumulate, options)

        def language(engine, loss):
            for part in parts:
                logprobs, _ = engine(part, lens[0][: len(part)], lens[1][: len(part)])
                engine.backward(loss(logprobs))
                training.step(engine)

        def scores(engine, loss):
            for part in parts:
                engine.backward(loss(engine(part)))
                training.step(engine)
        lm = lambda: models.Policy(models.add_lora(build(name, utils.precision(cfg.dtype), T), cfg.lora))  # noqa: E731
        rm = lambda: reward.RewardModel(models.add_lora(build(name, utils.precision(cfg.dtype), T, "AutoModelForSequenceClassification"), cfg.lora))  # noqa: E731
        old, mask = torch.full((micro, A), -math.log(V), device=device()), torch.ones(micro, A, dtype=torch.bool, device=device())
        zeros = torch.zeros(micro, T, device=device())
        kinds = {"fine-tuning": (lm, language, lambda x: -x.mean(), B * A), "reward model": (rm, scores, lambda v: reward.pairwise_loss(v[::2, -1], v[1::2, -1]), 0),
                 "PPO, actor": (lm, language, lambda x: script.actor_loss(x, old[: len(x)], zeros[: len(x), :A] + 1, mask[: len(x)], 0.2), B * A),
                 "PPO, critic": (rm, scores, lambda v: script.critic_loss(v, zeros[: len(v)], zeros[: len(v)], zeros[: len(v)] + 1, 0.2), 0)}
        for kind, (make, run, loss, heads) in kinds.items():
            engine = None
            fresh()
            engine = engine_of(make())
            runs = [s for s, _ in turns(cfg.repeats, step=lambda _, engine=engine: run(engine, loss))["step"]]
            s = statistics.median(runs)
            work = (2 if cfg.lora else 3) * flops(name, B * T, T, heads)  # frozen weights need no gradient of their own
            rows.append({"model": name, "step": kind, "batch": B, "length": T, "seconds": s, "tokens_per_s": B * T / s, "mfu": work / s / peak["flop_per_s"],
                         "memory_gib": utils.memory_gib(), "runs": runs})
            print(f"{name:<12}{kind:<14}{B:>4} x {T:<5}{s:>8.3f} s  {B * T / s:>10,.0f} tokens/s   MFU {rows[-1]['mfu']:.0%}", flush=True)
    return rows


@contextlib.contextmanager
def stand_ins(cfg, name, stop, side):
    """Within: ppo.py's models are random ones of these shapes, nothing is saved, little is evaluated, and an answer ends where `stop` says (token ids, or None: never).
    side: hybrid; or hf, where matrix products are PyTorch's own too, so that nothing but the kernel of log-probabilities is ours."""
    import ppo as script
    from reward import RewardModel
    kept = [(o, k, o.__dict__[k]) for o, k in ((models, "load_lm"), (models, "load_tokenizer"), (models, "save_model"), (RewardModel, "from_pretrained"), (script, "make_engine"), (kernels, "ONEDNN"),
                                                (training, "CHECKPOINTS"), (script, "EVALS"), (script, "EVAL_ROWS"))]

    def engine(*args):
        e = make(*args)
        real = e.generate
        e.generate = lambda prompts, n, t, eos_token_id, seed: real(prompts, n, t, eos_token_id=stop, seed=seed)
        return e
    make = script.make_engine
    context = cfg.prompt_len + max(cfg.new_tokens, 256)
    models.load_lm = lambda path, dtype: build(name, dtype, context)
    models.load_tokenizer = lambda path: models.tiny_tokenizer()
    models.save_model = lambda *args, **kwargs: None
    RewardModel.from_pretrained = classmethod(lambda cls, path, dtype: cls(build(cfg.critic or name, dtype, context, "AutoModelForSequenceClassification")))
    script.make_engine = engine
    training.CHECKPOINTS = script.EVALS = 1  # at the end, which has none
    script.EVAL_ROWS = 2
    kernels.ONEDNN = kernels.ONEDNN and side == "hybrid"
    try:
        yield script
    finally:
        for owner, key, value in kept:
            setattr(owner, key, value)


def iterations(cfg, name, batch, new, stop, engine, count):
    """Metrics of each iteration of ppo.py but the first, one update each, as in DeepSpeed-Chat's benchmark."""
    fresh()
    with tempfile.TemporaryDirectory() as folder, stand_ins(cfg, name, stop, engine) as script:
        skip = len(models.tiny_tokenizer()("Human: \nAssistant:")["input_ids"])
        prompts = [{"prompt": f"{i:08d}".ljust(cfg.prompt_len - skip, "x")[: cfg.prompt_len - skip]} for i in range(int(1.3 * batch * count) + 64)]
        Path(f"{folder}/prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(script.Config(data=f"{folder}/prompts.jsonl", out=f"{folder}/out", max_len=cfg.prompt_len + new, max_new_tokens=new, batch_size=batch,
                                      micro_batch=cfg.micro_batch or 32, iterations=count, minibatches=1, ppo_epochs=1, engine=engine, dtype=cfg.dtype, ema=0.0,
                                      lora=cfg.lora, save_memory=cfg.save_memory, actor_lr=1e-9, critic_lr=1e-9, held_out=0.02))
        return [json.loads(line) for line in open(f"{folder}/out/metrics.jsonl")][2:]


def ppo(cfg, peak):
    """Iterations of ppo.py itself, as they are and with transformers.generate and PyTorch's own products: seconds of rollout, score and update; pairs/s; FLOP/s as DeepSpeed-Chat counts them, and
    as a share of the ceiling with everything counted (MFU)."""
    rows = []
    for name in cfg.model.split(","):
        V = SHAPES[name][-1]
        for case, batch, new in [("fixed", cfg.batches[0], cfg.new_tokens)] + ([("ragged", cfg.ragged * cfg.batches[0], 256)] if cfg.ragged else []):
            stop = list(range(V // 32)) if case == "ragged" else None
            runs = {"hybrid": [], "hf": []}
            for _ in range(2):
                for engine in runs:
                    runs[engine] += iterations(cfg, name, batch, new, stop, engine, 1 + math.ceil(cfg.repeats / 2))
            phases = ("rollout_s", "score_s", "update_s")
            total = {e: [sum(r[k] for k in phases) for r in logs] for e, logs in runs.items()}
            median = {e: {k: statistics.median(r[k] for r in logs) for k in phases} for e, logs in runs.items()}
            s, length = statistics.median(total["hybrid"]), statistics.mean(r["length"] for r in runs["hybrid"])
            T, critic = cfg.prompt_len + length, cfg.critic or name
            one, other = (flops(n, batch * T, T, heads) for n, heads in ((name, batch * length), (critic, 0)))
            backward = 1 if cfg.lora else 2
            convention = one * (1 + 3 + training.saves(cfg, "recompute"))
            # rollout 1, reference 1, reward model 1, critic 1 and both trained; the old log-probabilities cost none with one update
            everything = one * (2 + 1 + backward) + other * (2 + 1 + backward)
            rows.append(r := {"model": name, "critic": critic, "case": case, "batch": batch, "prompt_len": cfg.prompt_len, "mean_length": length, "hybrid": median["hybrid"],
                              "hf": median["hf"], "seconds": s, "ratio": statistics.median(total["hf"]) / s, "pairs_per_s": batch / s, "hours": PAIRS / (batch / s) / 3600,
                              "deepspeed_chat_tflops": convention / s / 1e12, "mfu": everything / s / peak["flop_per_s"], "memory_gib": max(x["memory_gib"] for x in runs["hybrid"]),
                              "runs": {e: [[x[k] for k in phases] for x in logs] for e, logs in runs.items()}})
            for e in runs:
                m = median[e]
                print(f"{name:<12}{case:<7}{batch:>4} x {cfg.prompt_len}+{length:<6.0f} {'ours' if e == 'hybrid' else 'transformers':<13} rollout {m['rollout_s']:6.2f} s   score {m['score_s']:5.2f}   update {m['update_s']:5.2f}"
                      f"   iteration {statistics.median(total[e]):6.2f}", flush=True)
            print(f"{'':<19}{r['ratio']:.2f} times as fast; {r['pairs_per_s']:.1f} pairs/s, {r['hours']:.1f} h for DeepSpeed-Chat's {PAIRS:,} pairs; "
                  f"{r['deepspeed_chat_tflops']:.3g} TFLOP/s as it counts, MFU {r['mfu']:.0%}", flush=True)
    return rows


# -----------------------------------------------------------------------------
# parts


def kernel(cfg, peak):
    """Every function of kernels.py at the shape of the model: its time next to PyTorch's, and the share of its ceiling, bytes or FLOPs, whichever is nearer."""
    dtype, rows = utils.precision(cfg.dtype), []
    for name in cfg.model.split(","):
        _, L, E, H, K, M, V = SHAPES[name]
        B, P, D = cfg.batches[0], cfg.prompt_len, E // H
        T, size = P + cfg.new_tokens, torch.empty((), dtype=dtype).element_size()
        make = lambda *shape: torch.randn(*shape, device=device(), dtype=dtype)  # noqa: E731
        x, w, head = make(B, E), make(M, E), make(V, E)
        q, k, v = make(B * P, H, D), make(B * P, K, D), make(B * P, K, D)
        cu = torch.arange(0, B * P + 1, P, dtype=torch.int32, device=device())
        kc, vc, lengths = make(B, K, T, D), make(B, K, T, D), torch.full((B,), T, device=device())
        slots, at = torch.arange(B, device=device()), torch.full((B,), P, device=device())
        cos, sin = (torch.rand(T, D // 2, device=device()) for _ in range(2))
        weight, bias, u, logits = make(E), make(E), torch.rand(B, device=device()), make(B, V)
        hidden, targets = make(B * P, E) * 0.02, torch.randint(V, (B * P,), device=device())
        attention = lambda a, b, c, **how: F.scaled_dot_product_attention(a, b, c, enable_gqa=H != K, **how)  # noqa: E731
        batched = [y.view(B, P, -1, D).transpose(1, 2) for y in (q, k, v)]

        def rope():
            kc[slots, :, at] = kernels.rotate(k[:B], cos[at], sin[at])
            vc[slots, :, at] = v[:B]
            return kernels.rotate(q[:B], cos[at], sin[at])
        cases = {  # ours, PyTorch's, bytes, FLOPs
            "linear": (lambda: kernels.linear(x, w), lambda: F.linear(x, w), (M * E + B * (E + M)) * size, 2 * B * E * M),
            "linear, output layer": (lambda: kernels.linear(x, head), lambda: F.linear(x, head), (V * E + B * (E + V)) * size, 2 * B * E * V),
            "prefill attention": (lambda: kernels.prefill_attention(q, k, v, cu, D**-0.5), lambda: attention(*batched, is_causal=True),
                                  B * P * (2 * H + 2 * K) * D * size, 2 * B * H * P * P * D),
            "decode attention": (lambda: kernels.decode_attention(q[:B], kc, vc, lengths, D**-0.5), lambda: attention(q[:B, :, None], kc, vc),
                                 2 * B * K * T * D * size, 4 * B * H * T * D),
            "rotary and cache": (lambda: kernels.rope_and_cache(q[:B], k[:B], v[:B], kc, vc, slots, at, cos, sin), rope, B * (2 * H + 4 * K) * D * size, 0),
            "add and norm": (lambda: kernels.add_norm(hidden, hidden, weight, bias, 1e-5, False), lambda: (F.layer_norm(s := hidden + hidden, (E,), weight, bias), s),
                             4 * hidden.numel() * size, 0),
            "sampling": (lambda: kernels.sample(logits, u, 1.0), lambda: (t := ((p := logits.float().log_softmax(-1)).exp() / torch.empty_like(p).exponential_()).argmax(-1, True), p.gather(1, t)), B * V * size, 0),
            "log-probabilities": (lambda: kernels.token_logprobs(hidden, head, targets), lambda: -F.cross_entropy((hidden @ head.T).float(), targets, reduction="none"),
                                  (V * E + B * P * E) * size, 2 * B * P * E * V),
        }
        for what, (ours, theirs, moved, work) in cases.items():
            with torch.no_grad():
                a, b = seconds(ours), seconds(theirs)
            floor = max(moved / peak["bytes_per_s"], work / peak["flop_per_s"])
            rows.append({"model": name, "kernel": what, "us": a * 1e6, "pytorch_us": b * 1e6, "bytes": moved, "flops": work, "ceiling_share": floor / a})
            print(f"{name:<12}{what:<22}{a * 1e6:>10,.0f} us   PyTorch {b * 1e6:>10,.0f} us   {floor / a:>5.0%} of the {'bandwidth' if floor * peak['bytes_per_s'] == moved else 'FLOP'} ceiling", flush=True)
    return rows


def loss_and_gradients(chunked):
    """The output layer of a training step: 2,048 tokens, width 256, 128,256 words. Returns loss, gradients, and most bytes held beyond the start."""
    import resource
    torch.manual_seed(0)
    hidden, weight = torch.randn(2048, 256, device=device()) * 0.1, torch.randn(128_256, 256, device=device()) * 0.1
    targets = torch.randint(128_256, (2048,), device=device())
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    w.grad, h.grad = torch.zeros_like(w), torch.zeros_like(h)
    cuda = torch.cuda.is_available()
    start = torch.cuda.memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    clock = utils.Clock()
    if chunked:
        logprobs, _ = kernels.token_logprobs(h, w, targets)
    else:
        logprobs = (h @ w.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss = -logprobs.mean()
    loss.backward()
    seconds = clock.lap()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return loss.item(), h.grad.cpu(), w.grad.cpu(), peak - start, seconds


def memory(cfg, peak):
    """Each in a process of its own: the most memory a process has held cannot be reset."""
    context, rows, results = torch.multiprocessing.get_context("spawn"), [], {}
    for name, chunked in (("plain logits", False), ("chunked", True)):
        with context.Pool(1) as pool:
            results[name] = pool.apply(loss_and_gradients, (chunked,))
    for name, (loss, d_hidden, d_weight, most, s) in results.items():
        plain = results["plain logits"]
        off = max(((a - b).norm() / b.norm()).item() for a, b in ((d_hidden, plain[1]), (d_weight, plain[2])))
        rows.append({"how": name, "loss": loss, "peak_mib": most / 2**20, "seconds": s, "gradients_off": off})
        print(f"{name:<14} loss {loss:.6f}   peak {most / 2**20:>7,.0f} MiB   {s:.2f} s   gradients off by {off:.1e}")
    return rows


# -----------------------------------------------------------------------------
# limits


def try_to_fit(cfg, name):
    """In a process of its own: two iterations of PPO. Returns the most memory held, GiB."""
    utils.quiet()
    return iterations(cfg, name, cfg.batches[0], cfg.new_tokens, None, "hybrid", 2)[-1]["memory_gib"]


def fit(cfg, peak):
    """Two iterations of PPO with actors of growing size, until one does not fit: all weights trained, then LoRA with recomputing. Critic and reward model: --critic."""
    total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().available
    context, rows = torch.multiprocessing.get_context("spawn"), []
    for how, options in (("all weights", {"save_memory": "no"}), ("LoRA 8, recompute", {"lora": "8", "save_memory": "recompute"})):
        for name in (n for n in SHAPES if n.startswith("opt-") and n != "opt-4x256"):
            _, L, E, _, _, M, V = SHAPES[name]
            weights = (L * (4 * E * E + 2 * E * M) + E * V) * utils.precision(cfg.dtype).itemsize
            if weights > total:  # not even its weights: no need to try
                error, gib = "its weights alone are larger than the memory", None
            else:
                pool = context.Pool(1)  # whatever it takes goes with it
                job = pool.apply_async(try_to_fit, (dataclasses.replace(cfg, critic=cfg.critic or "opt-350m", **options), name))
                gib, error = None, None
                while not job.ready():
                    job.wait(0.1)
                    if not all(p.is_alive() for p in pool._pool) or not torch.cuda.is_available() and psutil.virtual_memory().available < 2 * 2**30:
                        error = "out of memory"
                        break
                else:
                    try:
                        gib = job.get()
                    except torch.OutOfMemoryError:
                        error = "out of memory"
                    except Exception as e:  # near the edge libraries fail in ways of their own: what was measured before is kept
                        error = f"{type(e).__name__}: {models.first_line(e)}"
                pool.terminate()
            rows.append({"how": how, "model": name, "memory_gib": gib, "error": error})
            print(f"{how:<20}{name:<10}" + (f"trains, {gib:.1f} GiB at most" if gib else error), flush=True)
            if error:
                break
    return rows


# DeepSpeed-Chat's README, table 1: hours for its step 3 by (actor, A100-80G GPUs)
PUBLISHED = {("opt-1.3b", 1): 11.7, ("opt-6.7b", 1): 40.8, ("opt-13b", 1): 117.6, ("opt-1.3b", 8): 1.4, ("opt-6.7b", 8): 4.1, ("opt-13b", 8): 9.0, ("opt-30b", 8): 18.0, ("opt-66b", 8): 50.4,
             ("opt-1.3b", 64): 31 / 60, ("opt-6.7b", 64): 51 / 60, ("opt-13b", 64): 1.25, ("opt-30b", 64): 4.0, ("opt-66b", 64): 7.5}
# bytes/s of memory, FLOP/s in bfloat16, bytes of memory, bytes/s of NVLink one way: NVIDIA's data sheets of the SXM parts. 400 Gb/s a GPU between machines of 8.
SHEETS = {"H100": (3.35e12, 989e12, 80e9, 450e9), "A100": (2.04e12, 312e12, 80e9, 300e9)}
NETWORK = 50e9


def step_on(world, name, critic, sheet, share, mfu, prompt=256, new=256, batch=1024):
    """Seconds of rollout, gather, score, update and gradient traffic of one iteration of `batch` pairs on `world` GPUs.

    A copy of the actor lies on tp GPUs, the fewest that hold it (bfloat16) in half of their memory; rows are spread over world / tp groups. Decode reads the weights and the keys and
    values at `share` of the bandwidth, and adds 2 all-reduces a layer; everything else computes at `mfu`; ZeRO moves weights twice and gradients once a step.
    """
    bandwidth, peak, capacity, nvlink = sheet
    _, L, E, H, K, M, V = SHAPES[name]
    params = L * (2 * E * E + 2 * E * E * K // H + (2 if name.startswith("opt") else 3) * E * M) + E * V
    tp = next((t for t in (1, 2, 4, 8) if 2 * params / t < 0.5 * capacity), 8)
    tp = min(tp, world)
    rows = batch * tp / world                                          # of a group
    token = 4 * L * E * K // H                                         # bytes of keys and values of a token
    fits = max(1, min(rows, (0.85 * capacity - 2 * params / tp) // (token * (prompt + new) / tp)))
    waves = rows / fits
    link = nvlink if world <= 8 else NETWORK
    read = 2 * params / tp + fits * (prompt + new / 2) * token / tp    # bytes a GPU reads a step
    reduce = 2 * L * (2 * (tp - 1) / tp * fits * E * 2 / nvlink + 10e-6) if tp > 1 else 0
    rollout = waves * new * (read / (share * bandwidth) + reduce) + flops(name, batch * prompt, prompt, batch) / world / (mfu * peak)
    gather = 2 * params * (world - 1) / world / link if world > 1 else 0
    forward, other = flops(name, batch * (prompt + new), prompt + new, batch * new), flops(critic, batch * (prompt + new), prompt + new, 0)
    score, update = (forward + 2 * other) / world / (mfu * peak), 3 * (forward + other) / world / (mfu * peak)
    traffic = 3 * 2 * params * (world - 1) / world / link if world > 1 else 0
    return {"tp": tp, "rollout_s": rollout, "gather_s": gather, "score_s": score, "update_s": update, "traffic_s": traffic}


def scale(cfg, peak):
    """On paper. The two shares are taken from this folder's generate and ppo results of a GPU where there are some; else they are assumptions, and the table says so."""
    found = [p for p in sorted(Path(cfg.out).glob("NVIDIA*-ppo*.json")) if not json.loads(p.read_text())["config"]["lora"]]  # of adapters the work is another
    generated = sorted(Path(cfg.out).glob("NVIDIA*-generate*.json"))
    share, mfu, basis = 0.7, 0.5, "ASSUMED shares, no GPU measured: 70% of the bandwidth in decode, 50% MFU elsewhere"
    gpu = "H100"
    if found and generated:
        gpu = next((g for g in SHEETS if g in found[0].name), "H100")
        sheet = SHEETS[gpu]
        row = max((r for r in json.loads(found[0].read_text())["rows"] if r["case"] == "fixed"), key=lambda r: r["batch"])
        T, batch = row["prompt_len"] + row["mean_length"], row["batch"]
        one, other = flops(row["model"], batch * T, T, batch * row["mean_length"]), flops(row["critic"], batch * T, T, 0)
        mfu = (4 * one + 5 * other) / (row["hybrid"]["score_s"] + row["hybrid"]["update_s"]) / sheet[1]
        decode = json.loads(generated[0].read_text())
        share = statistics.median(r["floor_share"] for r in decode["rows"] if r["case"] == "fixed") * decode["ceilings"]["bytes_per_s"] / sheet[0]
        basis = f"fitted to {found[0].name} and {generated[0].name}: {share:.0%} of the bandwidth in decode, {mfu:.0%} MFU elsewhere"
    print(f"{gpu}, 1,024 pairs of 256 + 256 tokens a step, critic 350M; {basis}")
    rows = []
    for name in (n for n in cfg.model.split(",") if not n.endswith("4x256")) if cfg.model != Config.model else ("opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b"):
        for world in numbers(cfg.world):
            t = step_on(world, name, cfg.critic or "opt-350m", SHEETS[gpu], share, mfu)
            s = sum(v for k, v in t.items() if k.endswith("_s"))
            hours, published = PAIRS / 1024 * s / 3600, PUBLISHED.get((name, world))
            rows.append({"model": name, "world": world, "basis": basis, **t, "seconds": s, "hours": hours, "deepspeed_chat_hours": published})
            print(f"{name:<10}{world:>5} GPUs, tp {t['tp']}: rollout {t['rollout_s']:7.2f} s  gather {t['gather_s']:5.2f}  score {t['score_s']:6.2f}  update {t['update_s']:6.2f}  traffic {t['traffic_s']:5.2f}"
                  f"   {hours:7.2f} h" + (f"   (DeepSpeed-Chat, A100-80G: {published:.2f} h)" if published else ""))
    return rows


TASKS = {"generate": generate, "train": train, "ppo": ppo, "kernels": kernel, "memory": memory, "fit": fit, "scale": scale}


def main(cfg, task):
    utils.quiet()
    torch.manual_seed(cfg.seed)
    print(f"{device_name()}, torch {torch.__version__}, {utils.precision(cfg.dtype)}")
    peak = ceilings(utils.precision(cfg.dtype)) if task in ("generate", "train", "ppo", "kernels") else None
    rows = TASKS[task](cfg, peak)
    import transformers
    record = {"task": task, "config": dataclasses.asdict(cfg), "device": device_name(), "processor": platform.processor() or platform.machine(),
              "threads": torch.get_num_threads(), "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
              "commit": utils.commit(), "time": time.strftime("%Y-%m-%d %H:%M"), "ceilings": peak, "rows": rows}
    what = [device_name(), task, *[cfg.model.replace(",", "+")] * (cfg.model != Config.model), *[f"lora-{cfg.lora}"] * bool(cfg.lora)]
    path = Path(cfg.out) / (f"{task}.json" if task == "scale" else f"{'-'.join(what)}.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TASKS:
        sys.exit(f"{__doc__}\nwhat to measure: {', '.join(TASKS)}")
    task = sys.argv.pop(1)
    utils.run(lambda cfg: main(cfg, task), Config)
