"""How fast is it here, and next to what? Measures on this machine, with random weights, so that nothing is downloaded.

    python bench.py generate                                   # engine and transformers.generate, at fixed and at ragged lengths
    python bench.py generate --model opt-1.3b --batch 128 --prompt-len 256 --new-tokens 256
    python bench.py ppo                                        # a whole iteration of step 3, by phase, with either engine
    python bench.py memory                                     # peak memory of a training step with 128k words, with and without (B, T, V) logits

Both sides run in one process, turn by turn; a row is the median of --repeats turns, a ratio is the median of their ratios. Everything
is also written to results/DEVICE-WHAT.json, with the versions and the commit.
"""
import dataclasses
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

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


@dataclass(frozen=True)
class Config:
    model: str = "opt-4x256,llama-4x256"  # shapes, joined by commas; see SHAPES
    batch: int = 32                    # prompts answered together
    prompt_len: int = 64               # tokens of a prompt
    new_tokens: int = 64               # tokens of an answer
    repeats: int = 7                   # turns of each side; the median is shown
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU, fp32 on a CPU
    out: str = "results"               # folder of the raw numbers
    seed: int = 1                      # of weights and of sampling


def build(name, dtype, context=1024):
    """A model of a shape, with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen3Config
    if name not in SHAPES:
        raise utils.UserError(f"--model {name}: no such shape; there are {', '.join(SHAPES)}")
    family, L, E, H, K, M, V = SHAPES[name]
    common = dict(vocab_size=V, hidden_size=E, num_hidden_layers=L, num_attention_heads=H, max_position_embeddings=max(context, 2048))
    if family == "opt":
        config = OPTConfig(**common, ffn_dim=M, word_embed_proj_dim=E, dropout=0.0)
    else:
        config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[family](**common, num_key_value_heads=K, intermediate_size=M, head_dim=E // H)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name():
    return torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else f"cpu-{torch.get_num_threads()}-threads"


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


def transformers_generate(lm, prompts, new_tokens, eos):
    """Tokens sampled by transformers.generate; nothing else is asked of it. prompts: lists of one length."""
    ids = torch.tensor(prompts, device=device())
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=True, top_k=0, eos_token_id=eos, pad_token_id=0)
    answers = out[:, ids.size(1) :]
    ended = torch.isin(answers, torch.tensor(eos or [-1], device=device())).int()
    return int(torch.where(ended.any(1), ended.argmax(1) + 1, answers.size(1)).sum())


def generate(cfg):
    """Sampling at temperature 1: fixed lengths (no EOS), and answers that end at geometric lengths (mean 32, at most 256; 8 x batch prompts)."""
    rows = []
    for name in cfg.model.split(","):
        lm = build(name, utils.precision(cfg.dtype), cfg.prompt_len + max(cfg.new_tokens, 256))
        V, g = lm.config.vocab_size, torch.Generator().manual_seed(cfg.seed)
        engine = HybridEngine(lm)
        for case, n, new, eos in (("fixed", cfg.batch, cfg.new_tokens, None), ("ragged", 8 * cfg.batch, 256, list(range(V // 32)))):
            # Random weights sample nearly uniformly: with a 32nd of the vocabulary as EOS, lengths are geometric with mean 32.
            prompts = torch.randint(V // 32, V, (n, cfg.prompt_len), generator=g).tolist()
            both = turns(cfg.repeats, ours=lambda t: int(engine.generate(prompts, new, eos_token_id=eos, seed=t).answer_lens.sum()),
                         theirs=lambda t: transformers_generate(lm, prompts, new, eos))
            speed = {side: [tokens / s for s, tokens in runs] for side, runs in both.items()}
            rows.append({"model": name, "case": case, "prompts": n, "prompt_len": cfg.prompt_len, "new_tokens": new,
                         "mean_length": statistics.mean(tokens / n for _, tokens in both["ours"]),
                         "tokens_per_s": statistics.median(speed["ours"]), "transformers_tokens_per_s": statistics.median(speed["theirs"]),
                         "ratio": statistics.median(a / b for a, b in zip(speed["ours"], speed["theirs"])), "runs": speed})
            r = rows[-1]
            print(f"{name:<14}{case:<8}{n:>5} x {cfg.prompt_len}+{new:<5} engine {r['tokens_per_s']:>9,.0f} tokens/s   transformers.generate "
                  f"{r['transformers_tokens_per_s']:>9,.0f}   ratio {r['ratio']:.2f}", flush=True)
    return rows


def let_end(lm, token, mean):
    """Makes random OPT weights end answers at geometric lengths: the last norm gets a bias along one direction, which is EOS's own row."""
    u = torch.nn.functional.normalize(torch.randn(lm.config.hidden_size), dim=0)
    with torch.no_grad():
        lm.model.decoder.final_layer_norm.bias += 22 * u
        lm.get_output_embeddings().weight[token] = 0.25 * u * math.log(lm.config.vocab_size / mean) / 5.5


def ppo(cfg):
    """Iterations of ppo.py itself, with --engine hybrid and --engine hf: seconds of rollout, score and update. Answers of --new-tokens, and
    answers that end at geometric lengths (mean 32, at most 256)."""
    import ppo as script
    import reward
    utils.boot(cfg.seed)
    tokenizer, rows = utils.tiny_tokenizer(), []
    for name in (n for n in cfg.model.split(",") if n.startswith("opt")):
        for case, new in (("fixed", cfg.new_tokens), ("ragged", 256)):
            with tempfile.TemporaryDirectory() as folder:
                lm = build(name, torch.float32)
                let_end(lm, tokenizer.eos_token_id, 32 if case == "ragged" else 1e9)
                utils.save_model(lm, tokenizer, f"{folder}/sft")
                utils.save_model(reward.RewardModel.from_lm(f"{folder}/sft", torch.float32).model, tokenizer, f"{folder}/reward")
                rng = random.Random(cfg.seed)
                prompts = [{"prompt": "".join(rng.choice("abcdefgh") for _ in range(cfg.prompt_len - 18))} for _ in range(20 * cfg.batch)]
                Path(f"{folder}/prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
                times, lengths = {"hybrid": [], "hf": []}, []
                for engine in ("hybrid", "hf", "hybrid", "hf"):
                    script.main(script.Config(model=f"{folder}/sft", reward_model=f"{folder}/reward", data=f"{folder}/prompts.jsonl", out=f"{folder}/out",
                                              max_new_tokens=new, batch_size=cfg.batch, iterations=cfg.repeats, minibatches=1, ppo_epochs=1,
                                              engine=engine, dtype=cfg.dtype, actor_lr=1e-9, critic_lr=1e-9, held_out=0.05))
                    log = [json.loads(line) for line in open(f"{folder}/out/metrics.jsonl")][2:]  # without the first iteration
                    times[engine] += [[r[k] for k in ("rollout_s", "score_s", "update_s")] for r in log]
                    lengths += [r["length"] for r in log]
            median = {e: [statistics.median(t) for t in zip(*runs)] for e, runs in times.items()}
            rows.append({"model": name, "case": case, "batch": cfg.batch, "prompt_len": cfg.prompt_len, "new_tokens": new, "mean_length": statistics.mean(lengths),
                         **{f"{e}_{k}": v for e, m in median.items() for k, v in zip(("rollout_s", "score_s", "update_s"), m)},
                         "ratio": statistics.median(map(sum, times["hf"])) / statistics.median(map(sum, times["hybrid"])), "runs": times})
    for r in rows:
        for e in ("hybrid", "hf"):
            parts = [r[f"{e}_{k}"] for k in ("rollout_s", "score_s", "update_s")]
            print(f"{r['model']:<14}{r['case']:<8}--engine {e:<8} rollout {parts[0]:.2f} s   score {parts[1]:.2f}   update {parts[2]:.2f}   iteration {sum(parts):.2f}")
        print(f"{r['model']:<14}{r['case']:<8}an iteration is {r['ratio']:.2f} times as fast")
    return rows


def loss_and_gradients(chunked):
    """The output layer of a training step: 2,048 tokens, width 256, 128,256 words. Returns loss, gradients, and most bytes held beyond the start."""
    import resource
    import kernels
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


def memory(cfg):
    """Each in a process of its own: the most memory a process has held cannot be reset."""
    context, rows, results = torch.multiprocessing.get_context("spawn"), [], {}
    for name, chunked in (("plain logits", False), ("chunked", True)):
        with context.Pool(1) as pool:
            results[name] = pool.apply(loss_and_gradients, (chunked,))
    for name, (loss, d_hidden, d_weight, peak, seconds) in results.items():
        plain = results["plain logits"]
        off = max(((a - b).norm() / b.norm()).item() for a, b in ((d_hidden, plain[1]), (d_weight, plain[2])))
        rows.append({"how": name, "loss": loss, "peak_mib": peak / 2**20, "seconds": seconds, "gradients_off": off})
        print(f"{name:<14} loss {loss:.6f}   peak {peak / 2**20:>7,.0f} MiB   {seconds:.2f} s   gradients off by {off:.1e}")
    return rows


TASKS = {"generate": generate, "ppo": ppo, "memory": memory}


def main(cfg, task):
    utils.quiet()
    torch.manual_seed(cfg.seed)
    print(f"{device_name()}, torch {torch.__version__}, {utils.precision(cfg.dtype)}")
    rows = TASKS[task](cfg)
    import transformers
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    record = {"task": task, "config": dataclasses.asdict(cfg), "device": device_name(), "processor": platform.processor() or platform.machine(),
              "threads": torch.get_num_threads(), "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
              "commit": git or None, "time": time.strftime("%Y-%m-%d %H:%M"), "rows": rows}
    path = Path(cfg.out) / f"{device_name()}-{task}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TASKS:
        sys.exit(f"{__doc__}\nwhat to measure: {', '.join(TASKS)}")
    task = sys.argv.pop(1)
    utils.run(lambda cfg: main(cfg, task), Config)
