"""A page of one or several runs: curves, answers that changed, and answers of PPO token by token,
with the sums that their numbers come from.

    python -m tools.look out/ppo                         # writes out/ppo/look.html
    python -m tools.look out/ppo out/kl out/reward       # runs of a step share their pictures

One file that needs no network. It may be made while a run goes on.
"""
import argparse
import itertools
import json
import re
from collections import defaultdict
from html import escape
from pathlib import Path

import numpy as np

MAX_POINTS = 400  # of a curve
MAX_ANSWERS = 24  # of a run: first and last ones, and as many token by token
MAX_TOKENS = 200  # of an answer

COLORS = "<p>Blue: better than the critic expected, orange: worse. A click shows a token's sums."
FILES = ("metrics", "samples", "tokens")

# What to look at first in each step, as regular expressions of a metric's name.
FIRST = {
    "sft": ("loss", "held_out_loss", "grad_norm", "lr", "tokens_per_s", "skipped"),
    "reward": ("loss", "held_out_loss", "accuracy", "held_out_accuracy", "margin", "grad_norm"),
    "ppo": ("eval_score", r"eval_(?!score|kl|ema).*(?<!_std)(?<!_se)", "kl", "length", "entropy",
            "explained_variance"),
}
WORRY = {
    "loss": "of the batch; in step 2, 0.69 is guessing",
    "held_out_loss": "worry when it rises while the loss falls: overfitting",
    "held_out_accuracy": "0.5 is guessing; InstructGPT's labelers agreed in 73%",
    "eval_score": "on held-out prompts, what PPO should raise; worry when answers get worse",
    "kl": "log(policy / reference) per answer; worry when it grows and the score does not",
    "length": "tokens per answer; worry when it drifts with the score: length is rewarded",
    "entropy": "worry when it falls to 0 early: no exploration is left",
    "explained_variance": "of the critic, 1 is all; worry below 0 after the first iterations",
}


def read(path):
    """Rows of a file of JSON lines, which may be missing, or end in half a line."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def evenly(items, n):
    """n of these items, the first and the last among them."""
    index = np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int)
    return [items[i] for i in index]


def number(x):
    """Four digits, a true minus sign."""
    return f"{x + 0.0:.4g}".replace("-", "−") if isinstance(x, (int, float)) else escape(str(x))


def term(x):
    """A number inside a sum or product."""
    return f"({number(x)})" if x < 0 else number(x)


def near(a, b):
    """Equal but for rounding, and for n - 1 in place of n."""
    return abs(a - b) <= 1e-4 + 0.005 * abs(b)


# -----------------------------------------------------------------------------
# curves


def step_of(metrics):
    """Which step has logged these rows."""
    names = set().union(*metrics)
    return "ppo" if "eval_kl" in names else "reward" if "accuracy" in names else "sft"


def ticks(low, high):
    """About four round numbers from low to high."""
    step = 10.0 ** np.floor(np.log10((high - low) / 2))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 4.5)
    return [i * step for i in range(int(np.ceil(low / step)), int(high // step) + 1)]


def picture(name, lines):
    """A figure of one metric. lines: {color: [(step, value), ...]}"""
    W, H = 340, 150
    left, right, top, bottom = 48, W - 12, 8, H - 20
    x = np.array([x for points in lines.values() for x, _ in points], float)
    y = np.array([y for points in lines.values() for _, y in points], float)
    pad = 0.05 * np.ptp(y) or 0.5 * abs(y[0]) or 1.0
    x0, x1 = x.min(), max(x.max(), x.min() + 1)
    y0, y1 = y.min() - pad, y.max() + pad

    def place(x, y):
        return (f"{left + (x - x0) / (x1 - x0) * (right - left):.1f}",
                f"{bottom - (y - y0) / (y1 - y0) * (bottom - top):.1f}")

    parts = []
    for tick in ticks(y0, y1):
        _, at = place(x0, tick)
        parts.append(f'<path class="axis" d="M{left} {at}H{right}"/><text x="{left - 5}" '
                     f'y="{at}" dy="4" text-anchor="end">{number(tick)}</text>')
    for tick, anchor in ((x0, "start"), (x1, "end")):
        at, _ = place(tick, y0)
        parts.append(f'<text x="{at}" y="{H - 5}" text-anchor="{anchor}">{tick:.0f}</text>')
    for color, points in lines.items():
        style = f'style="stroke:var({color});fill:var({color})"'
        dots = [place(*point) for point in evenly(points, MAX_POINTS)]
        parts.append(f'<polyline {style} points="{" ".join(map(",".join, dots))}"/>')
        if len(points) < 40:
            parts += [f'<circle {style} cx="{a}" cy="{b}" r="1.8"/>' for a, b in dots]
    last = ", ".join(f'<span style="color:var({color})">{number(points[-1][1])}</span>'
                     for color, points in lines.items())
    return (f'<figure><figcaption>{escape(name)} <small>last: {last}</small></figcaption>'
            f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{escape(name)} by step">'
            f'{"".join(parts)}</svg><small>{WORRY.get(name, "")}</small></figure>')


def curves(step, runs):
    """All metrics of the runs of one step: six of them, and the others behind a click."""
    colors = [f"--c{i % 6}" for i in range(len(runs))]
    lines = defaultdict(dict)
    for color, run in zip(colors, runs):
        for name in dict.fromkeys(name for row in run["metrics"] for name in row):
            points = [(row["step"], row[name]) for row in run["metrics"]
                      if isinstance(row.get(name), (int, float)) and np.isfinite(row[name])]
            if points and name != "step":
                lines[name][color] = points
    order = []
    for pattern in FIRST[step]:
        # Of several rewards the last one: the first is often all of the score, the last a check.
        order += [n for n in lines if re.fullmatch(pattern, n) and n not in order][-1:]
    order += [name for name in lines if name not in order]
    figures = [picture(name, lines[name]) for name in order]
    legend = "".join(f'<span><i style="background:var({color})"></i>{escape(run["name"])}</span>'
                     for color, run in zip(colors, runs))
    return (f'<h2>{step}</h2><p class="runs">{legend}</p>'
            f'<div class="grid">{"".join(figures[:6])}</div><details><summary>all others</summary>'
            f'<div class="grid">{"".join(figures[6:])}</div></details>')


# -----------------------------------------------------------------------------
# answers that changed


def changed(run):
    """Prompts that were answered early and late, differently; else answers to other prompts."""
    rows = run["samples"]
    by_prompt = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt"]].append(row)
    ends = [(found[0], found[-1]) for found in by_prompt.values()]
    pairs = [(a, b) for a, b in ends if a["answer"] != b["answer"] and a["step"] < b["step"]]
    pairs.sort(key=lambda pair: pair[0]["step"] - pair[1]["step"])
    note = f"{len(pairs)} prompts that came twice got another answer; by the iterations between:"
    if not pairs:
        note = "No prompt got two different answers: some of the first and of the last iteration."
        pairs = zip(*([row for row in rows if row["step"] == end["step"]]
                      for end in (rows[0], rows[-1])))
    parts = [f'<h2>{escape(run["name"])}: first and last answers</h2><p class="quiet">{note}']
    for pair in list(pairs)[:MAX_ANSWERS]:
        prompts = " | ".join(dict.fromkeys(row["prompt"] for row in pair))
        parts.append(f'<div class="pair"><div class="text quiet">{escape(prompts)}</div>')
        for row in pair:
            facts = ", ".join(f"{escape(name)} {number(x)}" for name, x in row.items()
                              if name not in ("prompt", "answer", "tokens", "eos"))
            answer = escape(row["answer"]) or "(empty)"
            parts.append(f'<div><div class="text">{answer}</div><small>{facts}</small></div>')
        parts.append("</div>")
    return "".join(parts)


# -----------------------------------------------------------------------------
# one answer, token by token


# Columns of tokens.jsonl: whether their sum over an answer means something.
COLUMNS = {"logprobs": True, "ref_logprobs": True, "token_rewards": True, "values": False,
           "returns": False, "advantages": False}


def constant(run, name):
    """A number of the formulas: GAMMA or LAM in the run's copy of ppo.py."""
    path = run["folder"] / "code" / "ppo.py"
    found = re.search(rf"^{name} = ([\d.]+)", path.read_text() if path.is_file() else "", re.M)
    return float(found[1]) if found else {"GAMMA": 1.0, "LAM": 0.95}[name]


def sums(row, run):
    """[lines of arithmetic] for each token. A line whose two sides differ is left out: a changed
    ppo.py may compute something else."""
    mask = row.get("mask") or [1] * len(row["response_tokens"])
    sampled = [t for t, m in enumerate(mask) if m]
    known = next((m for m in run["metrics"] if m["step"] == row["step"]), {})
    kl_coef = known.get("kl_coef", run["config"].get("kl_coef"))
    gamma, lam = constant(run, "GAMMA"), constant(run, "LAM")
    logp, ref, rewards, values, returns, advantages = map(row.get, COLUMNS)
    lines = [[] for _ in mask]
    for t in sampled if logp and ref and rewards and kl_coef is not None else ():
        score = rewards[t] + kl_coef * (logp[t] - ref[t])
        end = f" + {term(score)}, the score as PPO sees it," if t == sampled[-1] else ""
        if end or near(score, 0):
            lines[t].append(f"reward = −{number(kl_coef)} · ({number(logp[t])} − {term(ref[t])})"
                            f"{end} = {number(rewards[t])}")
    mean, std = known.get("advantage_mean"), known.get("advantage_std")
    next_value = next_gae = 0.0
    for t in reversed(sampled) if rewards and values and returns else ():
        delta = rewards[t] + gamma * next_value - values[t]
        gae = delta + gamma * lam * next_gae
        if near(gae + values[t], returns[t]):
            lines[t] += [
                f"δ = reward + γ · next value − value = {number(rewards[t])} + {number(gamma)} · "
                f"{term(next_value)} − {term(values[t])} = {number(delta)}",
                f"A = δ + γλ · next A = {number(delta)} + {number(gamma * lam)} · "
                f"{term(next_gae)} = {number(gae)}",
                f"return = A + value = {number(gae)} + {term(values[t])} = {number(returns[t])}"]
            if std and advantages and near((gae - mean) / std, advantages[t]):
                lines[t].append(f"advantage = (A − mean) / std = ({number(gae)} − {term(mean)}) / "
                                f"{number(std)} = {number(advantages[t])}")
        next_value, next_gae = values[t], gae
    return lines


def token_by_token(row, run, ids, is_open):
    """One answer: its tokens, the sums of the one that is chosen, a table of all numbers."""
    tokens = row["response_tokens"][:MAX_TOKENS]
    mask = row.get("mask") or [1] * len(tokens)
    names = [k for k in COLUMNS if k in row]
    advantages = row.get("advantages") or [0.0] * len(tokens)
    chosen = int(np.argmax(np.abs(advantages[: len(tokens)])))
    buttons, boxes, table = [], [], []
    for t, (token, lines) in enumerate(zip(tokens, sums(row, run))):
        i = next(ids)
        name = escape(token.replace("\n", "↵") or "∅")
        color = "--c0" if advantages[t] > 0 else "--c1"
        share = min(60, 30 * abs(advantages[t])) * mask[t]
        buttons.append(
            f'<button value="t{i}" aria-current="{str(t == chosen).lower()}" '
            f'class="{"" if mask[t] else "read"}" style="background:color-mix(in srgb, '
            f'var({color}) {share:.0f}%, var(--soft))">{name.replace(" ", "␣")}</button>')
        lines = lines if mask[t] else ["read, not sampled: it enters no sum"]
        boxes.append(f'<div class="sums" id="t{i}"{" hidden" * (t != chosen)}><b>token {t + 1} of '
                     f'{len(mask)}: {escape(repr(token))}</b>'
                     + "".join(f"<div>{line}</div>" for line in lines) + "</div>")
        cells = "".join(f"<td>{number(row[k][t]) if mask[t] else ''}" for k in names)
        table.append(f"<tr><td>{escape(repr(token))}{cells}")
    total = "".join(f"<td>{number(sum(row[k])) if COLUMNS[k] else ''}" for k in names)
    head = "".join(f"<th>{escape(k.replace('_', ' '))}" for k in names)
    answer = escape("".join(row["response_tokens"])[:80])
    more = len(row["response_tokens"]) - len(tokens)
    return (f'<details{" open" * is_open}><summary>step {row["step"]}, score '
            f'{number(row.get("reward", ""))}: <b>{answer}</b></summary>'
            f'<div class="text quiet">{escape(row.get("prompt", ""))}</div>'
            f'<div class="tokens">{"".join(buttons)}{f" and {more} more" * bool(more)}</div>'
            f'{"".join(boxes)}<div class="scroll"><table><thead><tr><th>token{head}</thead>'
            f'<tbody>{"".join(table)}</tbody><tfoot><tr><th>sum{total}</tfoot></table></div></details>')


# -----------------------------------------------------------------------------
# the page


def page(folders):
    """The text of the page."""
    runs = []
    for folder in folders:
        record = folder / "run.json"
        config = json.loads(record.read_text())["config"] if record.is_file() else {}
        files = {name: read(folder / f"{name}.jsonl") for name in FILES}
        runs.append({"name": str(folder), "folder": folder, "config": config, **files})
    body = [f"<h1>{escape(', '.join(run['name'] for run in runs))}</h1>"]
    for step in FIRST:
        those = [run for run in runs if run["metrics"] and step_of(run["metrics"]) == step]
        body.append(curves(step, those) if those else "")
    ids = itertools.count()
    for run in runs:
        body.append(changed(run) if run["samples"] else "")
        rows = evenly(run["tokens"], MAX_ANSWERS)[::-1]
        if rows:
            body.append(f"<h2>{escape(run['name'])}: answers token by token</h2>{COLORS}")
        body += [token_by_token(row, run, ids, row is rows[0]) for row in rows]
    return Path(__file__).with_name("look.html").read_text().replace("@BODY@", "".join(body))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    folders = parser.parse_args().runs
    for folder in folders:
        if not read(folder / "metrics.jsonl"):
            parser.error(f"{folder}: no metrics.jsonl with a step in it")
    path = folders[0] / "look.html"
    path.write_text(page(folders))
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB); open it in a browser")


if __name__ == "__main__":
    main()
