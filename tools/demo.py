r"""The three steps of RLHF with one command, and a picture of what they did.

    make demo                             # the built-in task `toy`, on a laptop
    python -m tools.demo --model facebook/opt-1.3b --reward-model facebook/opt-350m \
        --data Dahoas/rm-static --split 2,4,4 --out out/opt
    torchrun --nproc_per_node 8 -m tools.demo --model ... --ppo-flags "--zero 3 --kl-coef 0.1"

Writes OUT/sft, OUT/reward, OUT/ppo, and OUT/demo with the picture curves.png and the numbers
summary.json. The same command goes on where it stopped: a finished step is kept, an unfinished one
resumes. On toy an exact checker, data.toy_correct, judges answers sampled to held-out prompts.
"""
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import utils

STEPS = ("sft", "reward", "ppo")
LABELERS = 0.65  # share of toy's demonstrations that are right


@dataclass(frozen=True)
class Config:
    model: str = ""                # folder or hub name to start from; empty: the built-in one
    reward_model: str = ""         # what the reward model starts from; empty: the SFT model
    data: str = "toy"              # sources of all three steps, joined by commas
    split: str = ""                # shares of the rows for steps 1, 2 and 3, such as 2,4,4
    out: str = "out"               # folder of the three runs and of the picture
    seed: int = 1                  # of all three steps
    sft_flags: str = ""            # more flags of sft.py, such as "--epochs 1 --zero 2"
    reward_flags: str = ""         # more flags of reward.py
    ppo_flags: str = ""            # more flags of ppo.py


def flags_of(step, cfg):
    """The command line of a step."""
    sft = f"{cfg.out}/sft"
    models = {
        "sft": ["--model", cfg.model or "tiny"],
        "reward": ["--model", cfg.reward_model or sft],
        "ppo": ["--model", sft, "--reward", f"{cfg.out}/reward"],
    }
    if cfg.data == "toy":
        models["ppo"][-1] += ",data.py:toy_correct:0"  # logged, and nothing is trained on it
    if cfg.data == "toy" and not cfg.model:  # half the tokens of the built-in template
        models["sft"] += ["--template", "{prompt} ="]
    split = ["--split", cfg.split] if cfg.split else []
    return [*models[step], "--data", cfg.data, *split, "--out", f"{cfg.out}/{step}",
            "--seed", str(cfg.seed), *shlex.split(getattr(cfg, f"{step}_flags"))]


def is_finished(step, flags, folder):
    """Whether a step ran to its end with these flags. UserError: with others."""
    if not (folder / "finished").exists():
        return False
    before = json.loads((folder / "run.json").read_text())["config"]
    config = utils.parse_args(importlib.import_module(step).Config, flags)
    for name, value in asdict(config).items():
        if name not in ("out", "resume", "micro_batch") and before.get(name) != value:
            raise utils.UserError(f"{folder} is a finished run with --{name} {before.get(name)}, "
                                  f"not {value}; name another --out, or remove it")
    return True


def run_alone(step, flags):
    """Runs a step as a process of its own, which gives back all of its memory."""
    env = dict(os.environ)
    if "RANK" in env:  # the launcher's port remembers the ranks of the step before
        env["MASTER_PORT"] = str(int(env["MASTER_PORT"]) + 1 + STEPS.index(step))
        env["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    child = subprocess.Popen([sys.executable, f"{step}.py", *flags], env=env)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to both
    if child.wait():
        raise utils.UserError(f"{step}.py did not finish, see above; the same command goes on")


def run_step(step, cfg):
    """Runs a step, goes on with it, or keeps it. Returns its seconds."""
    folder = Path(cfg.out, step)
    flags = flags_of(step, cfg)
    if is_finished(step, flags, folder):
        utils.print0(f"\n{folder} is finished, and kept")
        return os.path.getmtime(folder / "finished") - os.path.getmtime(folder / "run.json")
    utils.print0(f"\nstep {STEPS.index(step) + 1} of 3: python {step}.py {shlex.join(flags)}")
    start = time.time()
    flags.append("--resume")
    if cfg.model:
        run_alone(step, flags)
    else:
        module = importlib.import_module(step)
        module.main(utils.parse_args(module.Config, flags))
    utils.print0(f"It took {time.time() - start:.0f} s.")
    return time.time() - start


def column(run, name):
    """(steps, values) of a metric of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def draw(out, titles, panels):
    """A panel per step: what was trained on in gray, held-out rows in colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.9), layout="tight")
    for i, (training, held_out, label) in enumerate(panels):
        run = out / STEPS[i]
        ax = figure.add_subplot(1, 3, i + 1)
        ax.plot(*column(run, training), color="0.75", lw=1, label="training batch")
        ax.plot(*column(run, held_out), "o-", color=f"C{i}", label="held out")
        ax.set(title=f"{i + 1}. {titles[i]}", xlabel=f"{STEPS[i]}.py, step", ylabel=label)
        if held_out == "eval_toy_correct":
            ax.axhline(LABELERS, color="0.5", ls="--", lw=1, label="demonstrations")
        ax.grid(alpha=0.3)
        ax.legend(loc="center right")
    figure.savefig(out / "demo" / "curves.png", dpi=110)


def main(cfg):
    out = Path(cfg.out)
    os.makedirs(out / "demo", exist_ok=True)
    seconds = {step: run_step(step, cfg) for step in STEPS}
    if os.environ.get("RANK", "0") != "0":
        return
    is_toy = cfg.data == "toy"
    what, key, words, label = ("toy_correct", "gold", "{:.1%} right", "share of right answers")
    if not is_toy:  # no exact checker
        what, key, words, label = ("score", "score", "score {:.2f}", "score")
    policy = column(out / "ppo", f"eval_{what}")[1]
    kl = column(out / "ppo", "eval_kl")[1][-1]
    ema = column(out / "ppo", f"eval_ema_{what}")[1] or [None]
    accuracy = column(out / "reward", "held_out_accuracy")[1][-1]
    before, after = words.format(policy[0]), words.format(policy[-1])
    imitated = f" (demonstrations: {LABELERS:.0%})" if is_toy else ""
    titles = [f"Fine-tuning imitates demonstrations:\n{before}{imitated}",
              f"The reward model learns to compare:\n{accuracy:.1%} of held-out pairs are right",
              f"PPO with that reward, KL {kl:.2f} nats:\nfrom {before} to {after}"]
    panels = [("loss", "held_out_loss", "loss, nats per token"),
              ("accuracy", "held_out_accuracy", "pairwise accuracy"),
              (f"score_{what}" if is_toy else what, f"eval_{what}", label)]
    draw(out, titles, panels)
    summary = {"sft": {key: policy[0]}, "reward": {"accuracy": accuracy},
               "ppo": {key: policy[-1], "kl": kl}, "ppo_ema": {key: ema[0]},
               "seconds": sum(seconds.values())}
    (out / "demo" / "summary.json").write_text(json.dumps(summary, indent=1))
    for title, step in zip(titles, STEPS):
        print(f"{seconds[step]:5.0f} s   {' '.join(title.split())}")
    print(f"{summary['seconds']:5.0f} s   in all. Picture: {out}/demo/curves.png. Next:\n"
          f"    python chat.py --model {out}/ppo --compare {out}/sft\n"
          f"    python -m tools.look {out}/ppo")


if __name__ == "__main__":
    utils.run(main, Config)
