"""A page to look at a run, or at several: what every metric means and how it went, the samples of
any iteration, and answers of PPO token by token, with the sum that enters the loss.

    python look.py out/ppo                # writes out/ppo/look.html and out/ppo/look.png
    python look.py out/ppo out/kl         # curves of both in one picture, in the first folder
    python look.py out/demo/ppo out/demo/sft out/demo/reward

The page is one file that needs no network: it can be mailed, or copied from a cluster. It works
while a run goes on, too. Long runs are thinned out, and the page says by how much.
"""
import json
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import models
import utils
from utils import UserError

TEMPLATE = Path(__file__).with_name("look.html")

# What a page holds of one run, at most.
MAX_POINTS = 1000           # of a curve
MAX_ROWS = 3000             # of samples.jsonl, and of tokens.jsonl
MAX_BYTES = 2 * 10**6       # of each of these files
MAX_ITERATIONS = 250        # from which these rows are
MAX_PROMPTS = 24            # side by side


@dataclass(frozen=True)
class Config:
    # runs
    runs: tuple = ()               # folders of runs; the page goes into the first


# -----------------------------------------------------------------------------
# what the metrics mean

# {group: {name of a metric: what it means, and when to worry}}, in the order of the page. NAME is
# the name of a scorer.
METRICS = {
    "Outcome": {
        "eval_score": "Score on held-out prompts, mean over the scorers with their weights: what "
        "PPO is meant to raise. Worry when it stands still, or rises while the answers get worse.",
        "eval_gold": "Share of held-out prompts whose answer the task's exact checker accepts. "
        "Worry when it falls while the score rises: the policy exploits the reward model.",
        "eval_kl": "log(policy / reference) on held-out prompts, nats per answer. Worry when it "
        "grows and eval_score does not: distance is paid for and buys nothing.",
        "eval_score_se": "Standard error of eval_score. A change of less than two of them may be "
        "chance.",
        "eval_ema_score": "eval_score of the EMA of the weights, at the end. Worry when it is far "
        "above eval_score: the last steps were too large.",
        "eval_ema_gold": "eval_gold of the EMA of the weights, at the end.",
        "eval_ema_kl": "eval_kl of the EMA of the weights, at the end; mostly below eval_kl, "
        "since an average lags behind.",
        "eval_ema_score_se": "Standard error of eval_ema_score.",
        "held_out_loss": "Loss on rows that are not trained on, nats per answer token in step 1, "
        "per comparison in step 2. Worry when it rises while loss falls: the model overfits.",
        "perplexity": "exp of held_out_loss: among how many tokens the model is undecided, as it "
        "were. Worry when it rises.",
        "held_out_accuracy": "Share of held-out comparisons in which the better answer has the "
        "higher score. Worry near 0.5, which is guessing; InstructGPT's labellers agreed in 73%.",
        "held_out_margin": "Score of the better answer less that of the worse, on held-out rows, "
        "before normalization. Worry when it grows and accuracy does not: the model is only surer.",
        "held_out_tau": "Kendall's tau-b between scores and ranks of held-out rankings: 1 is the "
        "same order, 0 chance. Worry near 0.",
        "held_out_pairs": "Comparisons behind the held-out numbers. An accuracy is uncertain by up "
        "to 1 / sqrt(this).",
    },
    "Training": {
        "loss": "Loss of the batch: nats per answer token in step 1, per comparison in step 2, "
        "where 0.69 is guessing. Worry when it rises over many steps: the learning rate is high.",
        "accuracy": "Share of the batch's comparisons in which the better answer has the higher "
        "score. Worry when it stays near 0.5, or is near 1 while held_out_accuracy is far lower.",
        "margin": "Score of the better answer less that of the worse, mean over the batch. Worry "
        "when it stays near 0: nothing is learned.",
        "epoch": "Passes over the data before this step, from 0. Worry when held_out_loss turns "
        "at the start of the second.",
    },
    "Rollout": {
        "score": "Score of the sampled answers: the weighted sum of what the scorers give. Worry "
        "when it falls for long, or jumps up: read the samples then.",
        "score_std": "Standard deviation of the score over the rollout. Worry when it goes to 0: "
        "all answers look alike to the scorer, and there is nothing to learn from.",
        "score_NAME": "Mean score of this scorer alone, without its weight. Worry when the sum "
        "rises by it alone.",
        "score_NAME_std": "Standard deviation of the score of this scorer alone.",
        "score_clipped": "Share of answers whose normalized score is cut to +-5. Worry above a "
        "few percent: these answers all look equally good or bad.",
        "gold": "Share of the sampled answers that the task's exact checker accepts. No model is "
        "trained on it. Worry when it falls while the score rises.",
        "kl": "log(policy / reference) of the sampled answers, nats per answer. Worry when it is "
        "clearly below 0 (sampler and trainer differ), or grows while the score does not.",
        "kl_k3": "The same by an estimator that is never negative and varies less (Schulman "
        "2020). Worry when it is far above kl.",
        "length": "Sampled tokens per answer. Worry when it drifts to the longest or shortest "
        "possible while the score rises: length is being rewarded.",
        "eos_rate": "Share of answers that end with EOS. Worry when it is far below 1: they are "
        "cut off and penalized; raise --max-new-tokens.",
        "entropy": "Of the distribution of the next token, nats, mean over sampled tokens. Worry "
        "when it falls to 0 early: the policy no longer tries anything else.",
    },
    "Update of the actor": {
        "actor_loss": "Clipped policy loss, mean over tokens. It is near 0 by construction and "
        "says little; worry only when it is large.",
        "ratio_mean": "policy / old policy, mean over tokens: near 1. Worry when it is off by "
        "some percent.",
        "ratio_max": "The largest ratio of a token. Worry when it is often far above 2: steps are "
        "too large, or sampler and trainer differ.",
        "approx_kl": "KL between old and new policy, nats per token (k3). Worry above 0.02 or so; "
        "at 0.1 the rollout's other steps are left out.",
        "clip_frac": "Share of tokens whose ratio left 1 +- clip. Worry when it is above 0.2 or "
        "so: take a lower learning rate or fewer epochs.",
        "advantage_mean": "Mean of the advantages before whitening. Worry when it stays far from "
        "0: the critic is off in one direction.",
        "advantage_std": "Standard deviation of the advantages before whitening. Worry when it "
        "goes to 0: whitening then blows up noise.",
        "actor_grad_norm": "Norm of the actor's gradient before clipping, of the iteration's last "
        "step. Worry about jumps of ten times and more.",
        "actor_lr": "Learning rate of the actor.",
        "kl_coef": "Weight of the KL penalty in the token rewards.",
        "steps": "Optimizer steps in this iteration. Worry when they are fewer than epochs x "
        "minibatches: approx_kl stopped them.",
    },
    "Update of the critic": {
        "critic_loss": "Half the squared error of the values, clipped, mean over tokens. Worry "
        "when it rises for long.",
        "explained_variance": "Share of the variance of the returns that the critic explains: 1 "
        "is all, 0 no better than a constant. Worry below 0 after the first iterations.",
        "return_mean": "Mean return of a token: what is still to come, by the rewards. It should "
        "rise with the score.",
        "value_clip_frac": "Share of tokens whose value moved by more than the value clip. Worry "
        "when it stays above 0.2 or so: lower --critic-lr.",
        "critic_grad_norm": "Norm of the critic's gradient before clipping, of the iteration's "
        "last step. Worry about jumps of ten times and more.",
    },
    "Numerics": {
        "grad_norm": "Norm of the gradient before clipping. Worry about jumps of ten times and "
        "more, and when it goes to 0.",
        "lr": "Learning rate.",
        "skipped": "Optimizer steps skipped so far, because a gradient was not finite. Worry when "
        "it grows; five in a row end the run.",
        "engine_gap_mean": "Difference between the sampler's and the trainer's log-probability "
        "of the same token, mean. Worry above 1e-4 in float32, and in bfloat16 when it grows.",
        "engine_gap_max": "The largest such difference. Worry when it jumps: sampler and trainer "
        "have different weights.",
        "padding": "Share of the computed tokens that are padding. Worry above 0.3: time is lost.",
    },
    "Speed and memory": {
        "seconds": "Time of the iteration without evaluation, seconds. Worry when it grows while "
        "length does not.",
        "rollout_s": "Time of sampling, seconds.",
        "score_s": "Time of the forwards of all models over the rollout, seconds.",
        "update_s": "Time of the optimizer steps, seconds.",
        "tokens_per_s": "Tokens per second, in PPO those that are sampled, in step 1 all. Worry "
        "when it falls: another process takes the machine.",
        "memory_gib": "Most memory of this process so far, GiB. Worry when it goes on growing.",
        "engine_generate_s": "Time of transformers' generate with --engine hf, seconds.",
        "engine_gather_s": "Time to gather ZeRO-3 shards for the rollout, seconds.",
        "engine_prefill_s": "Time to read the prompts, seconds.",
        "engine_decode_s": "Time to sample, token by token, seconds.",
        "engine_prefill_tokens": "Tokens of prompts read, equal prompts once.",
        "engine_decode_tokens": "Tokens of answers on this rank.",
        "engine_decode_steps": "Decode steps. Worry when a few long answers make them many more "
        "than length.",
        "engine_kv_bytes": "Size of the KV cache, bytes.",
        "engine_gb_per_s": "Weights and KV cache read per second of decoding, GB/s.",
        "engine_floor_share": "The same as a share of the GPU's memory bandwidth: 1 is as fast as "
        "memory can be read. Small models stay far below.",
    },
}
OTHER = "Other"


def explain(name):
    """The group of a metric, and its sentences. A metric that is not in METRICS, as of a changed
    script, has the group OTHER and an empty text."""
    for group, texts in METRICS.items():
        if name in texts:
            return group, texts[name]
    if re.fullmatch("score_.+_std", name):
        return "Rollout", METRICS["Rollout"]["score_NAME_std"]
    if re.fullmatch("score_.+", name):
        return "Rollout", METRICS["Rollout"]["score_NAME"]
    return OTHER, ""


# -----------------------------------------------------------------------------
# files of a run


class Lines:
    """A file of JSON lines, which may be larger than memory: an index holds where each line begins,
    and its values of `keys`. Lines that are cut off, or lack a key, are left out and counted."""

    def __init__(self, path, *keys):
        self.path = path
        self.index = []  # (offset, value of each key)
        self.cut = 0
        self.bytes = 0
        if not path.is_file():
            return
        with open(path, "rb") as file:
            for line in file:
                row = parse(line)
                if all(key in row for key in keys):
                    self.index.append((self.bytes, *(row[key] for key in keys)))
                else:
                    self.cut += 1
                self.bytes += len(line)

    def read(self, numbers):
        """The rows with these numbers."""
        rows = []
        with open(self.path, "rb") as file:
            for number in numbers:
                file.seek(self.index[number][0])
                rows.append(parse(file.readline()))
        return rows

    def notes(self):
        if self.cut == 0:
            return []
        what = "1 line is" if self.cut == 1 else f"{self.cut} lines are"
        return [f"{self.path.name}: {what} cut off, and left out"]


def parse(line):
    """A line of JSON as a dict; {} where it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def read_run(folder):
    """All that the page shows of a run, as JSON. Raises UserError where it is none."""
    metrics = Lines(folder / "metrics.jsonl", "step")
    if not metrics.path.is_file():
        message = f"{folder}: no metrics.jsonl in it; name the folder of a run, such as out/ppo"
        raise UserError(message)
    if not metrics.index:
        message = f"{metrics.path} has no whole line: the run has not come to its first step"
        raise UserError(message)
    rows = metrics.read(range(len(metrics.index)))
    record = models.read_run_json(folder)
    samples = Lines(folder / "samples.jsonl", "iteration", "score", "prompt")
    tokens = Lines(folder / "tokens.jsonl", "step", "reward")
    shown_samples, sample_notes = pick(samples)
    shown_tokens, token_notes = pick(tokens)
    cut = metrics.notes() + samples.notes() + tokens.notes()
    return {
        "name": str(folder),
        "script": record.get("script", ""),
        "command": record.get("command", ""),
        "time": record.get("time", ""),
        "device": record.get("device", ""),
        "git": record.get("git") or "",
        "finished": bool(record.get("finished")),
        "config": record.get("config", {}),
        "last_step": rows[-1]["step"],
        "curves": curves(rows),
        "arithmetic": arithmetic(rows),
        "samples": shown_samples,
        "side_by_side": side_by_side(samples),
        "tokens": shown_tokens,
        "notes": cut + sample_notes + token_notes,
    }


# -----------------------------------------------------------------------------
# what is kept of it


def curves(rows):
    """{metric: [steps, values]}, each with at most MAX_POINTS points."""
    found = defaultdict(lambda: [[], []])
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and np.isfinite(value):
                found[name][0].append(row["step"])
                found[name][1].append(value)
    return {name: thin(*points) for name, points in found.items()}


def thin(steps, values):
    """The smallest and the largest value of each of MAX_POINTS / 2 parts, so that no peak is lost;
    a short curve as it is."""
    if len(values) <= MAX_POINTS:
        return [steps, values]
    kept = []
    for part in np.array_split(np.arange(len(values)), MAX_POINTS // 2):
        chosen = [values[i] for i in part]
        kept += sorted({part[np.argmin(chosen)], part[np.argmax(chosen)]})
    return [[steps[i] for i in kept], [values[i] for i in kept]]


def arithmetic(rows):
    """{iteration: the numbers of metrics.jsonl that the arithmetic of a token needs}"""
    names = ("kl_coef", "advantage_mean", "advantage_std", "length")
    found = {}
    for row in rows:
        if all(name in row for name in names):
            found[row["step"]] = {name: row[name] for name in names}
    return found


def evenly(items, n):
    """n of these items, the first and the last among them."""
    if len(items) <= n:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, n).round().astype(int)]


def by_iteration(lines):
    """{iteration: numbers of its lines}"""
    found = defaultdict(list)
    for number, (_, iteration, *_) in enumerate(lines.index):
        found[iteration].append(number)
    return found


def pick(lines):
    """Rows of evenly spaced iterations: of each the same number, evenly from its lowest to its
    highest score. Returns the rows, and a note if they are not all."""
    if not lines.index:
        return [], []
    limit = max(1, min(MAX_ROWS, len(lines.index) * MAX_BYTES // lines.bytes))
    found = by_iteration(lines)
    iterations = evenly(sorted(found), min(MAX_ITERATIONS, limit))
    kept = []
    for iteration in iterations:
        by_score = sorted(found[iteration], key=lambda number: lines.index[number][2])
        kept += sorted(evenly(by_score, limit // len(iterations)))
    notes = []
    if len(kept) < len(lines.index):
        notes.append(
            f"{lines.path.name}: {len(kept):,} of {len(lines.index):,} answers are in this page, "
            f"from {len(iterations):,} of {len(found):,} iterations, of each evenly from the "
            "lowest to the highest score"
        )
    return lines.read(kept), notes


def side_by_side(lines):
    """Prompts that were answered in several iterations, with the first, the middle and the last of
    these answers. Where no prompt came twice, some of the first, middle and last iteration.
    Returns a list of lists of rows."""
    answered = defaultdict(dict)  # prompt -> {iteration: number of the line}
    for number, (_, iteration, _, prompt) in enumerate(lines.index):
        answered[prompt].setdefault(iteration, number)
    repeated = [numbers for numbers in answered.values() if len(numbers) > 1]
    # Those with three answers first, and of these the ones that are furthest apart.
    repeated.sort(key=lambda numbers: (len(numbers) < 3, min(numbers) - max(numbers)))
    groups = []
    for numbers in repeated[:MAX_PROMPTS]:
        first, last = min(numbers), max(numbers)
        middle = min(numbers, key=lambda i: abs(i - (first + last) / 2))
        groups.append([numbers[i] for i in sorted({first, middle, last})])
    if not groups:
        three = evenly(sorted(by_iteration(lines).items()), 3)
        groups = list(zip(*(numbers[: MAX_PROMPTS // 2] for _, numbers in three)))
    return [lines.read(group) for group in groups]


# -----------------------------------------------------------------------------
# the page and the picture


def page(runs):
    """The HTML page of runs as read_run returns them. What models and people wrote is in it as JSON
    only, without any <, so that it cannot end the script element that it stands in."""
    metrics = []
    for name in dict.fromkeys(name for run in runs for name in run["curves"]):
        group, text = explain(name)
        metrics.append({"name": name, "group": group, "text": text})
    content = {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "groups": [*METRICS, OTHER],
        "metrics": sorted(metrics, key=place),
        "runs": runs,
    }
    text = json.dumps(compact(content), separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text().replace("@DATA@", text)


def place(metric):
    """Where a metric stands in METRICS."""
    names = [name for texts in METRICS.values() for name in texts]
    group, name = metric["group"], metric["name"]
    return [*METRICS, OTHER].index(group), names.index(name) if name in names else len(names)


def compact(x):
    """Numbers with six digits; null in place of those that are not finite, which JSON lacks."""
    if isinstance(x, dict):
        return {name: compact(value) for name, value in x.items()}
    if isinstance(x, list):
        return [compact(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if np.isfinite(x) else None
    return x


def draw(runs, path):
    """All curves as a PNG file, one picture for each metric of each script."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves_of = defaultdict(list)  # (script, metric) -> [(run, steps, values)]
    for run in runs:
        for name, (steps, values) in run["curves"].items():
            curves_of[run["script"], name].append((run["name"], steps, values))
    plt.rcParams.update({"font.size": 7, "axes.grid": True, "grid.alpha": 0.3})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["text.parse_math"] = False  # a name may hold a $
    height = max(1, -(-len(curves_of) // 6))
    figure, axes = plt.subplots(height, 6, figsize=(16, 1.9 * height), squeeze=False)
    for ax in axes.flat[len(curves_of) :]:
        ax.axis("off")
    for ax, ((script, name), lines) in zip(axes.flat, curves_of.items()):
        ax.set_title(f"{name} ({script})")
        for label, steps, values in lines:
            marker = "o" if len(steps) < 15 else ""
            ax.plot(steps, values, marker=marker, ms=2, lw=1, label=label)
        if len(lines) > 1:
            ax.legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(folders):
    """Writes look.html and look.png into the first folder. Returns the path of the page."""
    folders = list(dict.fromkeys(Path(folder) for folder in folders))
    try:
        runs = [read_run(folder) for folder in folders]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    for run in runs:
        for note in run["notes"]:
            utils.print0(f"{run['name']}: {note}")
    path = folders[0] / "look.html"
    with utils.writing(f"{path} or look.png", advice=""):
        utils.atomic_write(path, page(runs))
        draw(runs, path.with_suffix(".png"))
    return path


def main(cfg):
    path = write(cfg.runs)
    size = path.stat().st_size / 2**20
    utils.print0(f"wrote {path} ({size:.1f} MiB; open it in a browser) and {path.stem}.png")


if __name__ == "__main__":
    utils.run(main, Config)
