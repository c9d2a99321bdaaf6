"""What RLHF does, shown on two CPU cores: the three steps on `toy`, judged by an exact checker that no model ever sees.

    make demo                                   # or, in the environment: python demo.py --seed 2 --out out/demo-2

Runs sft.py, reward.py and ppo.py with nothing but --seed, --out and the folders of the steps before, reads what they logged, prints a table, and writes
curves.png and summary.json. Every number is measured on held-out prompts, answered by sampling at temperature 1.
"""
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import utils


@dataclass(frozen=True)
class Config:
    out: str = "out/demo"              # folder of the three runs, of curves.png and of summary.json
    seed: int = 1                      # of all three steps


def metrics(run, *keys):
    """Columns of a run's metrics.jsonl: the steps that logged all of `keys`, and their values."""
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    rows = [r for r in rows if all(k in r for k in keys)]
    return [[r[k] for r in rows] for k in ("step", *keys)]


def draw(out, summary):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    sft, ppo = summary["sft"]["gold"], summary["ppo"]["gold"]

    ax, (step, loss), (at, held) = axes[0], metrics(out / "sft", "loss"), metrics(out / "sft", "held_out_loss")
    ax.plot(step, loss, color="0.8", lw=0.8, label="training batch")
    ax.plot(at, held, "o-", color="C0", label="held out")
    ax.set(title=f"1. Fine-tuning imitates careless labellers:\n{sft:.0%} of sampled answers are right, 65% of theirs",
           xlabel="SFT step", ylabel="loss, nats a token", ylim=(0, 3))
    ax.legend()

    ax, (step, acc), (at, held) = axes[1], metrics(out / "reward", "accuracy"), metrics(out / "reward", "held_out_accuracy")
    ax.plot(step, acc, color="0.8", lw=0.8, label="training batch")
    ax.plot(at, held, "o-", color="C1", label="held out")
    ax.set(title=f"2. The reward model learns to prefer right answers:\n{summary['reward']['accuracy']:.1%} of held-out pairs",
           xlabel="reward model step", ylabel="pairs ranked right", ylim=(0.4, 1.02))
    ax.legend(loc="lower right")

    ax, (step, gold, kl) = axes[2], metrics(out / "ppo", "gold", "kl")
    at, held = metrics(out / "ppo", "eval_gold")
    ax.plot(step, gold, color="C2", alpha=0.4, label="right answers (checker), rollouts")
    ax.plot(at, held, "o-", color="C2", label="right answers (checker), held out")
    ax.axhline(0.65, color="0.5", ls="--", lw=1)
    ax.text(step[-1], 0.655, "the labellers", color="0.4", ha="right")
    ax.set(title=f"3. PPO against that reward removes their mistakes:\n{sft:.0%} to {ppo:.0%} right, {summary['ppo']['kl']:.1f} nats from the SFT model",
           xlabel="PPO iteration", ylabel="share of right answers", ylim=(0, 1.02))
    other = ax.twinx()
    other.plot(step, kl, color="C3", lw=1, label="KL to the SFT model, nats an answer")
    other.set(ylim=(0, max(kl) * 3), ylabel="KL")
    other.grid(False)
    lines = [line for a in (ax, other) for line in a.get_legend_handles_labels()[0]]
    ax.legend(lines, [line.get_label() for line in lines], loc="center right")
    fig.tight_layout()
    fig.savefig(out / "curves.png", dpi=110)


def main(cfg):
    out, seconds = Path(cfg.out), {}
    runs = {"sft": [], "reward": ["--model", out / "sft"], "ppo": ["--model", out / "sft", "--reward-model", out / "reward"]}
    for script, flags in runs.items():
        command = [f"{script}.py", *map(str, flags), "--out", str(out / script), "--seed", str(cfg.seed)]
        print(f"\n$ python {' '.join(command)}", flush=True)
        shutil.rmtree(out / script / "checkpoint", ignore_errors=True)  # of a demo that was interrupted
        start = time.time()
        here = Path(__file__).parent
        if subprocess.run([sys.executable, str(here / command[0]), *command[1:]]).returncode:
            raise utils.UserError(f"{script}.py did not finish; its message stands above")
        seconds[script] = time.time() - start

    _, ema_gold, ema_score, ema_kl = metrics(out / "ppo", "eval_ema_gold", "eval_ema_score", "eval_ema_kl")
    (_, gold, score, kl), (_, accuracy) = metrics(out / "ppo", "eval_gold", "eval_score", "eval_kl"), metrics(out / "reward", "held_out_accuracy")
    summary = {"sft": {"gold": gold[0]}, "reward": {"accuracy": accuracy[-1]}, "ppo": {"gold": gold[-1], "kl": kl[-1]},
               "ppo_ema": {"gold": ema_gold[-1], "kl": ema_kl[-1]},
               "seconds": sum(seconds.values()), "seed": cfg.seed}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    draw(out, summary)

    print(f"\n{'step':<22}{'seconds':>8}{'gold accuracy':>15}{'reward':>9}{'KL, nats':>10}")
    print(f"{'1 fine-tuning':<22}{seconds['sft']:>8.0f}{gold[0]:>15.1%}{score[0]:>9.2f}{0:>10.2f}")
    print(f"{'2 reward model':<22}{seconds['reward']:>8.0f}{accuracy[-1]:>15.1%}   (of held-out pairs)")
    print(f"{'3 PPO':<22}{seconds['ppo']:>8.0f}{gold[-1]:>15.1%}{score[-1]:>9.2f}{kl[-1]:>10.2f}")
    print(f"{'  its moving average':<22}{'':>8}{ema_gold[-1]:>15.1%}{ema_score[-1]:>9.2f}{ema_kl[-1]:>10.2f}")
    print(f"\n{sum(seconds.values()):.0f} seconds in all. {out}/curves.png shows it, {out}/summary.json keeps it;"
          f" python chat.py --model {out}/ppo talks to the result.")


if __name__ == "__main__":
    utils.run(main, Config)
