"""What RLHF does, shown on two CPU cores: the three steps on the task `toy`, judged by an exact
checker that no model is trained on.

    make demo                 # or, in the environment: python demo.py --seed 2 --out out/demo-2

Runs sft.py, reward.py and ppo.py with nothing but --seed, --out and the folders of the steps before
them, reads what they logged, prints a table, and writes curves.png, summary.json and a page to look
at all three runs (look.py). All numbers are measured on held-out prompts, answered by sampling at
temperature 1.
"""
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import look
import utils

LABELLERS = 0.65  # share of the demonstrations that are correct, see tasks.toy


@dataclass(frozen=True)
class Config:
    # demo
    out: str = "out/demo"          # folder of the three runs, of curves.png and of summary.json
    seed: int = 1                  # of all three steps


def read_metrics(run, *names):
    """Steps and values of the rows of metrics.jsonl that have all these metrics, as lists."""
    columns = {name: [] for name in ("step", *names)}
    with open(run / "metrics.jsonl") as lines:
        for line in lines:
            row = json.loads(line)
            if all(name in row for name in names):
                for name, values in columns.items():
                    values.append(row[name])
    return list(columns.values())


# -----------------------------------------------------------------------------
# the picture


def draw_sft(ax, run, summary):
    step, loss = read_metrics(run, "loss")
    ax.plot(step, loss, color="0.8", lw=0.8, label="training batch")
    step, loss = read_metrics(run, "held_out_loss")
    ax.plot(step, loss, "o-", color="C0", label="held out")
    gold = summary["sft"]["gold"]
    ax.set_title(
        f"1. Fine-tuning imitates careless labellers:\n{gold:.0%} of its sampled answers are "
        f"correct, {LABELLERS:.0%} of theirs"
    )
    ax.set(xlabel="SFT step", ylabel="loss, nats per token", ylim=(0, 3))
    ax.legend()


def draw_reward(ax, run, summary):
    step, accuracy = read_metrics(run, "accuracy")
    ax.plot(step, accuracy, color="0.8", lw=0.8, label="training batch")
    step, accuracy = read_metrics(run, "held_out_accuracy")
    ax.plot(step, accuracy, "o-", color="C1", label="held out")
    final = summary["reward"]["accuracy"]
    ax.set_title(f"2. The reward model learns to prefer correct answers:\naccuracy {final:.1%}")
    ax.set(xlabel="reward model step", ylabel="pairwise accuracy", ylim=(0.4, 1.02))
    ax.legend(loc="lower right")


def draw_ppo(ax, run, summary):
    step, gold, kl = read_metrics(run, "gold", "kl")
    ax.plot(step, gold, color="C2", alpha=0.4, label="gold accuracy, rollouts")
    eval_step, eval_gold = read_metrics(run, "eval_gold")
    ax.plot(eval_step, eval_gold, "o-", color="C2", label="gold accuracy, held out")
    ax.axhline(LABELLERS, color="0.5", ls="--", lw=1)
    ax.text(step[-1], LABELLERS + 0.005, "the labellers", color="0.4", ha="right")
    before, after = summary["sft"]["gold"], summary["ppo"]["gold"]
    ax.set_title(
        f"3. PPO with that reward removes their mistakes:\n{before:.0%} to {after:.0%} correct, "
        f"{summary['ppo']['kl']:.1f} nats from the SFT model"
    )
    ax.set(xlabel="PPO iteration", ylabel="gold accuracy", ylim=(0, 1.02))
    kl_ax = ax.twinx()
    kl_ax.plot(step, kl, color="C3", lw=1, label="KL to the SFT model, nats per answer")
    kl_ax.set(ylim=(0, max(kl) * 3), ylabel="KL")
    kl_ax.grid(False)
    lines = ax.get_legend_handles_labels()[0][:2] + kl_ax.get_legend_handles_labels()[0]
    ax.legend(lines, [line.get_label() for line in lines], loc="center right")


def draw(out, summary):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    draw_sft(axes[0], out / "sft", summary)
    draw_reward(axes[1], out / "reward", summary)
    draw_ppo(axes[2], out / "ppo", summary)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)


# -----------------------------------------------------------------------------


def run_script(script, flags, out, seed):
    """Runs one step as a user would. Returns its seconds."""
    command = [f"{script}.py", *flags, "--out", str(out / script), "--seed", str(seed)]
    print(f"\n$ python {' '.join(command)}", flush=True)
    shutil.rmtree(out / script, ignore_errors=True)  # of an earlier demo
    start = time.time()
    path = Path(__file__).parent / command[0]
    done = subprocess.run([sys.executable, str(path), *command[1:]])
    if done.returncode:
        raise utils.UserError(f"{script}.py did not finish; its message is above")
    return time.time() - start


def main(cfg):
    out = Path(cfg.out)
    sft, reward, ppo = str(out / "sft"), str(out / "reward"), out / "ppo"
    seconds = {
        "sft": run_script("sft", [], out, cfg.seed),
        "reward": run_script("reward", ["--model", sft], out, cfg.seed),
        "ppo": run_script("ppo", ["--model", sft, "--reward", reward], out, cfg.seed),
    }
    total_seconds = sum(seconds.values())

    _, accuracy = read_metrics(out / "reward", "held_out_accuracy")
    _, gold, score, kl = read_metrics(ppo, "eval_gold", "eval_score", "eval_kl")
    ema = read_metrics(ppo, "eval_ema_gold", "eval_ema_score", "eval_ema_kl")
    _, [ema_gold], [ema_score], [ema_kl] = ema
    summary = {
        "sft": {"gold": gold[0]},
        "reward": {"accuracy": accuracy[-1]},
        "ppo": {"gold": gold[-1], "kl": kl[-1]},
        "ppo_ema": {"gold": ema_gold, "kl": ema_kl},
        "score": [score[0], score[-1]],
        "seconds": total_seconds,
        "seed": cfg.seed,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    draw(out, summary)
    page = look.write([ppo, out / "sft", out / "reward"])

    rows = [
        ("step", "seconds", "gold accuracy", "reward", "KL, nats"),
        ("1 fine-tuning", f"{seconds['sft']:.0f}", f"{gold[0]:.1%}", f"{score[0]:.2f}", "0.00"),
        ("2 reward model", f"{seconds['reward']:.0f}", "", "", ""),
        ("3 PPO", f"{seconds['ppo']:.0f}", f"{gold[-1]:.1%}", f"{score[-1]:.2f}", f"{kl[-1]:.2f}"),
        ("  its EMA", "", f"{ema_gold:.1%}", f"{ema_score:.2f}", f"{ema_kl:.2f}"),
    ]
    print()
    for step, *cells in rows:
        print(f"{step:<16}" + "".join(f"{cell:>15}" for cell in cells))
    print(f"\nPairwise accuracy of the reward model on held-out pairs: {accuracy[-1]:.1%}")
    print(
        f"{total_seconds:.0f} seconds in all. Curves: {out}/curves.png. Numbers: "
        f"{out}/summary.json. To talk to the result: python chat.py --model {out}/ppo\n"
        f"To look at the runs, answer by answer and token by token, open in a browser: {page}"
    )


if __name__ == "__main__":
    utils.run(main, Config)
