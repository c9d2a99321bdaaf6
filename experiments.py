"""Experiments with several seeds: methods, over-optimization, mistakes, the mixture, EMA. Those
that have been run have their tables in results/README.md.

    python experiments.py --names methods,ema --seeds 1,2,3 --processes 2

An experiment compares a few variants, each with several seeds. A variant runs the scripts as a user
would, with other flags or with a few lines of ppo.py changed: those of a recipe in RECIPES.md, or
its own. Every run is a folder below --out; a run that is finished is not repeated, so remove the
folder of one whose flags you change. Each measured row is appended to results/NAME.json at once.
Every process has one thread.
"""
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import bench
import data
import tasks
import utils

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    # experiments
    names: str = "all"             # which, joined by commas, in this order
    seeds: str = "1,2,3"           # of all steps
    processes: int = 1             # runs at a time
    out: str = "out/experiments"   # folder of the runs
    results: str = "results"       # folder of the JSON files

    def __post_init__(self):
        for name in self.name_list:
            if name not in EXPERIMENTS:
                raise utils.UserError(f"--names {name}: there are {', '.join(EXPERIMENTS)}")
        if not re.fullmatch(r"\d+(,\d+)*", self.seeds):
            raise utils.UserError(f"--seeds {self.seeds}: must be numbers, such as 1,2,3")
        if self.processes < 1:
            raise utils.UserError(f"--processes {self.processes}: must be at least 1")

    @property
    def name_list(self):
        return list(EXPERIMENTS) if self.names == "all" else self.names.split(",")


# -----------------------------------------------------------------------------
# recipes: changes of ppo.py, written in Markdown as **title**, a text, and a diff


def recipes():
    """{title: [(old lines, new lines)]} of all diffs in README.md and RECIPES.md."""
    found = {}
    pattern = r"\*\*([^*\n]+)\*\*((?!\*\*|```).)*```diff\n(.*?)```"
    for title, _, diff in re.findall(pattern, recipe_text(), re.S):
        hunks = []
        for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.M):
            hunks.append((without_signs(old), without_signs(new)))
        lines = sum(old.count("\n") + new.count("\n") for old, new in hunks)
        assert lines == diff.count("\n"), f"{title}: a line is in no hunk"
        found[title] = hunks
    return found


def recipe_text():
    return (HERE / "README.md").read_text() + (HERE / "RECIPES.md").read_text()


def flags_of_recipe(title):
    """The flags that its text gives, as in: With `--answers-per-prompt 4`."""
    [text] = re.findall(rf"\*\*{re.escape(title)}\*\*(.*?)```diff", recipe_text(), re.S)
    flags = {}
    for name, value in re.findall(r"`--([a-z-]+) ([\d.]+)`", text):
        flags[name.replace("-", "_")] = json.loads(value)
    return flags


def without_signs(lines):
    return "".join(line[1:] + "\n" for line in lines.splitlines())


def change_ppo(hunks):
    """The text of ppo.py with these changes."""
    source = (HERE / "ppo.py").read_text()
    original = source.splitlines(keepends=True)
    for old, new in hunks:
        for line in old.splitlines(keepends=True):
            assert original.count(line) == 1, f"this line is not once in ppo.py:\n{line}"
        assert source.count(old) == 1, f"these lines are not once in ppo.py:\n{old}"
        source = source.replace(old, new)
    return source


# -----------------------------------------------------------------------------
# runs


class Lab:
    """Where the runs of one seed are."""

    locks = defaultdict(threading.Lock)  # of folders: where two variants need a run, one does it

    def __init__(self, folder, seed):
        self.folder = folder / str(seed)
        self.seed = seed

    def run(self, name, script, hunks=(), **flags):
        """Runs a script into the folder `name`, with changes of ppo.py. Returns the rows of its
        metrics.jsonl; the last one also has the run's seconds of CPU time."""
        out = self.folder / name
        with Lab.locks[out]:
            return self.run_once(out, name, script, hunks, flags)

    def run_once(self, out, name, script, hunks, flags):
        seconds = out / "cpu_seconds.json"
        if not seconds.exists():
            path = HERE / script
            if hunks:
                path = self.folder / f"{name}.py"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(change_ppo(hunks))
            flags = {"seed": self.seed, **flags, "out": out}
            command = [sys.executable, str(path), "--overwrite"]
            for flag, value in flags.items():
                command += ["--" + flag.replace("_", "-"), str(value)]
            print("$", *command[1:], flush=True)
            cpu_seconds = run_alone(command, self.folder / f"{name}.log")
            seconds.write_text(json.dumps(cpu_seconds))
        rows = read_lines(out / "metrics.jsonl")
        rows[-1]["cpu_seconds"] = json.loads(seconds.read_text())
        return rows

    def sft(self, source):
        """Folder of an SFT model."""
        folder = self.folder / f"{source.replace(',', '-')}-sft"
        self.run(folder.name, "sft.py", data=source)
        return folder

    def models(self, task="toy"):
        """Folders of an SFT model and, for toy, a reward model, as in the demo."""
        sft = self.sft(task)
        if task == "countdown":
            return sft, "countdown"
        self.run("toy-reward", "reward.py", model=sft, data=task)
        return sft, self.folder / "toy-reward"

    def write(self, name, rows):
        path = self.folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lab.locks[path]:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path


def run_alone(command, log):
    """Runs a command with one thread. Returns its seconds of CPU time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise utils.UserError(f"{' '.join(command)} did not finish; {log} says why")
    return usage.ru_utime + usage.ru_stime


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def start_from(folder):
    """A change of ppo.py: the actor starts from another model than the reference. Its metrics at
    step 0 are then those of that model, with its KL from the reference."""
    old = "    actor = Policy(models.add_lora(models.load_lm(cfg.model, dtype), cfg.lora))\n"
    return old, old.replace("cfg.model", f'"{folder}"')


ON_HELD_OUT_PROMPTS = (
    "    train, held_out = data.load(\n",
    "    held_out, train = data.load(\n",
)
ONLY_ROLLOUT = (
    "        metrics |= update(batch, actor, critic, ema, mix, cfg, micro_batch, iteration)\n",
    "        batch.ratio = batch.mask.float()\n",
)


def metrics_before_and_after(rows):
    return {
        "gold_before": rows[0]["eval_gold"],
        "gold": rows[-1]["eval_gold"],
        "kl": rows[-1]["eval_kl"],
        "cpu_seconds": rows[-1]["cpu_seconds"],
    }


def is_held_out(prompt):
    text = data.DEFAULT_TEMPLATE.format(prompt=prompt)
    return data.hash_of_prompt(text) % 10_000 < 500  # as data.py decides, --held-out 0.05


def held_out_rows(task):
    """Those of the task that every step evaluates on and none trains on."""
    rows = {"toy": tasks.toy, "countdown": tasks.countdown}[task]()
    return [row for row in rows if is_held_out(row["prompt"])]


# -----------------------------------------------------------------------------
# which method? All train on the same number of sampled answers.

ITERATIONS = 12
ANSWERS = 512 * ITERATIONS
ROUNDS = 3       # of filtered fine-tuning: sample, keep the best, fine-tune
OF = 4           # answers to a prompt, of which the best is kept
METHODS = {
    "toy": ("PPO", "RLOO", "GRPO", "Dr.GRPO", "REINFORCE++"),
    "countdown": ("PPO", "RLOO", "GRPO", "Dr.GRPO"),
}


def methods(task="toy"):
    variants = {}
    for method in METHODS[task]:
        variants[method] = lambda lab, method=method: train_with(lab, method, task)
    variants["filtered fine-tuning"] = lambda lab: filtered_fine_tuning(lab, task)
    for n in (4, 16):
        variants[f"best of {n}"] = lambda lab, n=n: best_of(lab, n, task)
    return variants


def train_with(lab, method, task):
    sft, reward = lab.models(task)
    hunks, flags = (), {}
    if method != "PPO":
        hunks, flags = recipes()[method], flags_of_recipe(method)
    rows = lab.run(
        f"{task}-{method}", "ppo.py", hunks, data=task, model=sft, reward=reward,
        iterations=ITERATIONS, **flags,
    )
    return metrics_before_and_after(rows)


def filtered_fine_tuning(lab, task):
    """Rejection sampling: in each round the model answers, the scorer keeps the best of four
    answers to a prompt, if it is above the mean of all, and the model is fine-tuned on them."""
    sft, reward = lab.models(task)
    model = sft
    cpu_seconds = 0.0
    for i in range(ROUNDS):
        name = f"{task}-filtered-{i}"
        rows = lab.run(
            f"{name}-samples", "ppo.py", [ONLY_ROLLOUT], data=task, model=model, reward=reward,
            batch_size=ANSWERS // ROUNDS, answers_per_prompt=OF, seed=lab.seed + 1000 * i,
            iterations=1, ema=0,
        )
        cpu_seconds += rows[-1]["cpu_seconds"]
        samples = read_lines(lab.folder / f"{name}-samples" / "samples.jsonl")
        mean = sum(s["score"] for s in samples) / len(samples)
        best = [max(group, key=merit) for group in groups_of(OF, samples)]
        kept = []
        for s in best:
            if s["score"] > mean:
                kept.append({"prompt": without_template(s["prompt"]), "response": s["answer"]})
        file = lab.write(name, kept + held_out_rows(task))
        rows = lab.run(name, "sft.py", data=file, model=model, epochs=2, lr=3e-4)
        cpu_seconds += rows[-1]["cpu_seconds"]
        model = lab.folder / name
    judged = judge(lab, f"{task}-filtered", model, task, sft, reward)
    return judged | {"cpu_seconds": cpu_seconds}


def judge(lab, name, model, source, sft, reward, hunks=()):
    """Gold accuracy of a model on held-out prompts, and its KL from the SFT model."""
    rows = lab.run(
        f"{name}-judged", "ppo.py", [start_from(model), ONLY_ROLLOUT, *hunks], data=source,
        model=sft, reward=reward, batch_size=32, iterations=1, ema=0,
    )
    return {"gold": rows[0]["eval_gold"], "kl": rows[0]["eval_kl"]}


def best_of(lab, n, task):
    """No training: n answers to each held-out prompt, of which the scorer takes the best."""
    sft, reward = lab.models(task)
    rows = lab.run(
        f"{task}-best-of-{n}", "ppo.py", [ON_HELD_OUT_PROMPTS, ONLY_ROLLOUT], data=task,
        model=sft, reward=reward, batch_size=512 * n, answers_per_prompt=n, iterations=1, ema=0,
    )
    samples = read_lines(lab.folder / f"{task}-best-of-{n}" / "samples.jsonl")
    best = [max(group, key=merit)["gold"] for group in groups_of(n, samples)]
    return {
        "gold": sum(best) / len(best),
        "kl": math.log(n) - (n - 1) / n,  # at most: the known bound
        "cpu_seconds": rows[-1]["cpu_seconds"],
    }


def merit(sample):
    return sample["eos"], sample["score"]


def without_template(prompt):
    start, end = data.DEFAULT_TEMPLATE.split("{prompt}")
    return prompt.removeprefix(start).removesuffix(end)


def groups_of(n, samples):
    return [samples[i : i + n] for i in range(0, len(samples), n)]


# -----------------------------------------------------------------------------
# break it: one mistake each

MISTAKES = (
    "EOS is not an action", "Dropout", "Advantages as they are",
    "Log-probabilities without the temperature",
)


def break_it():
    variants = {
        "PPO": lambda lab: with_mistake(lab, "PPO"),
        "KL coefficient 0": lambda lab: with_mistake(lab, "KL-0", kl_coef=0),
        "PPO at temperature 0.7": lambda lab: with_mistake(lab, "PPO-0.7", temperature=0.7),
    }
    for title in MISTAKES:
        variants[title] = lambda lab, title=title: with_mistake(
            lab, title, recipes()[title], **flags_of_recipe(title)
        )
    return variants


def with_mistake(lab, name, hunks=(), **flags):
    sft, reward = lab.models()
    rows = lab.run(
        f"break-{name}", "ppo.py", hunks, model=sft, reward=reward, batch_size=256, iterations=24,
        **flags,
    )
    last = rows[-1]
    columns = (
        "score", "kl", "entropy", "length", "eos_rate", "ratio_max", "clip_frac", "approx_kl",
        "engine_gap_mean", "explained_variance", "actor_grad_norm",
    )
    first = {"first_ratio_max": rows[1]["ratio_max"], "first_gap": rows[1]["engine_gap_mean"]}
    return metrics_before_and_after(rows) | {x: last[x] for x in columns} | first


# -----------------------------------------------------------------------------
# when does it break? Gold against proxy score (Gao et al. 2022)


def overoptimization():
    variants = {}
    for pairs in (100, 1000, 0):
        for kl_coef in (0.0, 0.05, 0.3):
            variants[f"{pairs or 'all'} pairs, KL {kl_coef:g}"] = (
                lambda lab, pairs=pairs, kl_coef=kl_coef: overoptimize(lab, pairs, kl_coef)
            )
    return variants


def overoptimize(lab, pairs, kl_coef):
    sft, reward = lab.models()
    if pairs:
        reward, accuracy = reward_model_of(lab, sft, pairs)
    else:
        accuracy = lab.run("toy-reward", "reward.py")[-1]["held_out_accuracy"]
    rows = lab.run(
        f"over-{pairs}-{kl_coef}", "ppo.py", model=sft, reward=reward, kl_coef=kl_coef,
        batch_size=128, iterations=40,
    )
    evaluated = [row for row in rows if "eval_gold" in row]
    curve = [{x: row[x] for x in ("gold", "score", "kl")} for row in rows[1:]]
    return metrics_before_and_after(rows) | {
        "pairs": pairs,
        "kl_coef": kl_coef,
        "accuracy": accuracy,
        "gold_best": max(row["eval_gold"] for row in evaluated),
        "score_before": rows[0]["eval_score"],
        "score": rows[-1]["eval_score"],
        "curve": [mean_of(curve[i : i + 5]) for i in range(0, len(curve), 5)],
    }


def reward_model_of(lab, sft, pairs):
    """A reward model trained on a few pairs of toy, and its accuracy on all held-out pairs."""
    rows = list(tasks.toy())
    step = len(rows) // pairs
    kept = [row for row in rows if not is_held_out(row["prompt"])][lab.seed :: step][:pairs]
    file = lab.write(f"pairs-{pairs}", kept + held_out_rows("toy"))
    name = f"reward-{pairs}"
    metrics = lab.run(name, "reward.py", data=file, model=sft, epochs=max(8, 1600 // pairs))
    return lab.folder / name, metrics[-1]["held_out_accuracy"]


def mean_of(rows):
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def draw_overoptimization(rows, path):
    """Gold accuracy (solid) and score (dashed) over the square root of KL, as Gao et al. draw it: a
    panel per number of pairs, a colour per KL coefficient, a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), sharex=True, sharey=True)
    colors = {0.0: "C3", 0.05: "C0", 0.3: "C2"}
    for ax, pairs in zip(axes, (100, 1000, 0)):
        score_ax = ax.twinx()
        score_ax.grid(False)
        labelled = set()
        for row in rows:
            if row["pairs"] != pairs:
                continue
            kl_coef = row["kl_coef"]
            color = colors[kl_coef]
            label = None if kl_coef in labelled else f"KL coefficient {kl_coef:g}"
            labelled.add(kl_coef)
            x = [max(point["kl"], 0) ** 0.5 for point in row["curve"]]
            ax.plot(x, [point["gold"] for point in row["curve"]], color=color, label=label)
            score_ax.plot(x, [point["score"] for point in row["curve"]], "--", color=color, lw=0.8)
        ax.set_title(f"reward model of {pairs:,} pairs" if pairs else "reward model of all pairs")
        ax.set(xlabel="square root of the KL, nats per answer", ylabel="gold accuracy (solid)")
        ax.set_ylim(0, 1.02)
        score_ax.set_ylabel("score (dashed)")
        ax.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# -----------------------------------------------------------------------------
# what does the mixture retain? PPO has no prompt of one skill.

HIDDEN_SKILL = "reverse"


def mixture():
    return {
        "SFT": retained_by_sft,
        "PPO, KL coefficient 0": lambda lab: retained(lab, 0.0, ""),
        "PPO, KL coefficient 0.05": lambda lab: retained(lab, 0.05, ""),
        "PPO, KL coefficient 0, mixture": lambda lab: retained(lab, 0.0, "toy"),
    }


def retained(lab, kl_coef, ptx):
    sft, reward = lab.models()
    rows = [row for row in tasks.toy() if HIDDEN_SKILL not in row["prompt"]]
    others = lab.write("other-skills", rows)
    name = f"mixture-{kl_coef}-{ptx}"
    rows = lab.run(
        name, "ppo.py", [ALWAYS_TOY], data=others, model=sft, reward=reward, kl_coef=kl_coef,
        ptx_data=ptx, batch_size=256, iterations=16,
    )
    gold = {"gold_trained_skills": rows[-1]["eval_gold"]}
    return gold | judge_skills(lab, name) | {"cpu_seconds": rows[-1]["cpu_seconds"]}


def retained_by_sft(lab):
    sft, _ = lab.models()
    return judge_skills(lab, "toy-sft")


# Rows of a file have no checker of their own; these are rows of toy.
ALWAYS_TOY = (
    "    names = [cfg.data] + [source for source, _ in parse_reward(cfg.reward)]\n",
    '    names = ["toy"]\n',
)


def judge_skills(lab, name):
    """Accuracy of a model on the hidden skill, and its loss on held-out demonstrations of all."""
    sft, reward = lab.models()
    hidden = [row for row in tasks.toy() if HIDDEN_SKILL in row["prompt"]]
    file = lab.write("hidden-skill", hidden)
    judged = judge(
        lab, f"{name}-hidden", lab.folder / name, file, sft, reward, [ALWAYS_TOY]
    )
    return {
        "gold_hidden_skill": judged["gold"],
        "kl_hidden_skill": judged["kl"],
        "held_out_loss": held_out_loss(lab, f"{name}-loss", lab.folder / name, "toy"),
    }


def held_out_loss(lab, name, model, source):
    """The loss of a model on held-out demonstrations, from a run of SFT that changes nothing."""
    rows = lab.run(name, "sft.py", model=model, data=source, epochs=0.001, lr=1e-30)
    return rows[-1]["held_out_loss"]


# The same with two tasks that have less in common: PPO has no prompt of countdown.

BOTH_TASKS = "toy,countdown"


def forgetting():
    return {
        "SFT": lambda lab: judge_countdown(lab, lab.sft(BOTH_TASKS)),
        "PPO, KL coefficient 0": lambda lab: ppo_on_toy(lab, 0.0, ""),
        "PPO, KL coefficient 0.05": lambda lab: ppo_on_toy(lab, 0.05, ""),
        "PPO, KL coefficient 0, mixture": lambda lab: ppo_on_toy(lab, 0.0, BOTH_TASKS),
    }


def ppo_on_toy(lab, kl_coef, ptx):
    sft = lab.sft(BOTH_TASKS)
    name = f"forgetting-{kl_coef}-{ptx.replace(',', '-')}"
    rows = lab.run(
        name, "ppo.py", data="toy", model=sft, reward="toy", kl_coef=kl_coef, ptx_data=ptx,
        batch_size=256, iterations=32,
    )
    gold = {"gold_toy_before": rows[0]["eval_gold"], "gold_toy": rows[-1]["eval_gold"]}
    gold |= {"kl_toy": rows[-1]["eval_kl"], "cpu_seconds": rows[-1]["cpu_seconds"]}
    return gold | judge_countdown(lab, lab.folder / name)


def judge_countdown(lab, model):
    """Accuracy of a model on countdown, and its loss on held-out demonstrations of countdown."""
    sft = lab.sft(BOTH_TASKS)
    judged = judge(lab, f"{model.name}-countdown", model, "countdown", sft, "countdown")
    return {
        "gold_countdown": judged["gold"],
        "kl_countdown": judged["kl"],
        "held_out_loss": held_out_loss(lab, f"{model.name}-countdown-loss", model, "countdown"),
    }


# -----------------------------------------------------------------------------
# is EMA better? Over decay and length of the run

DECAYS = (0.9, 0.97, 0.992, 0.998)
MANY_EMAS = (
    ("    ema = training.EMA(actor, cfg.ema, cpu=cfg.offload)\n",
     "    ema = training.EMA(actor, cfg.ema, cpu=cfg.offload)\n"
     f"    emas = [training.EMA(actor, decay) for decay in {DECAYS}]\n"
     "    ema.update = lambda: [each.update() for each in emas]\n"),
    ("    checkpoint.finish()\n",
     "    for each in emas:\n"
     "        with each.in_place():\n"
     "            metrics |= evaluate_now(name=f'eval_{each.decay}')\n"
     "    log.write(iteration + 1, metrics)\n"
     "    checkpoint.finish()\n"),
)


CONSTANT_LR = (
    "        lr_scale = max(LR_FLOOR, 1 - (iteration - 1) / cfg.iterations)\n",
    "        lr_scale = 1.0\n",
)


def ema():
    variants = {}
    for n in (8, 32, 64):
        variants[f"{n} iterations"] = lambda lab, n=n: compare_emas(lab, f"ema-{n}", n)
    variants["32 iterations, constant learning rates"] = lambda lab: compare_emas(
        lab, "ema-32-constant", 32, [CONSTANT_LR]
    )
    variants["32 iterations, constant, three times as high"] = lambda lab: compare_emas(
        lab, "ema-32-high", 32, [CONSTANT_LR], actor_lr=9e-4
    )
    return variants


def compare_emas(lab, name, iterations, hunks=(), **flags):
    sft, reward = lab.models()
    rows = lab.run(
        name, "ppo.py", [*MANY_EMAS, *hunks], model=sft, reward=reward, batch_size=128,
        iterations=iterations, ema=0, **flags,
    )
    last = rows[-1]
    result = metrics_before_and_after(rows)
    for decay in DECAYS:
        result[f"gold_{decay}"] = last[f"eval_{decay}_gold"]
        result[f"kl_{decay}"] = last[f"eval_{decay}_kl"]
    return result


# -----------------------------------------------------------------------------
# sampler against trainer: the difference of their log-probabilities of the same token


def gap():
    return {dtype: lambda lab, dtype=dtype: measure_gap(lab, dtype) for dtype in ("fp32", "bf16")}


def measure_gap(lab, dtype):
    sft, reward = lab.models()
    rows = lab.run(
        f"gap-{dtype}", "ppo.py", model=sft, reward=reward, dtype=dtype, batch_size=256,
        iterations=4,
    )
    means = [row["engine_gap_mean"] for row in rows[1:]]
    maxima = [row["engine_gap_max"] for row in rows[1:]]
    return {"gap_mean": sum(means) / len(means), "gap_max": max(maxima)}


# -----------------------------------------------------------------------------

EXPERIMENTS = {
    "methods": methods,
    "break": break_it,
    "overoptimization": overoptimization,
    "mixture": mixture,
    "forgetting": forgetting,
    "ema": ema,
    "countdown-methods": lambda: methods("countdown"),
    "gap": gap,
}


PACKAGES = ("torch", "deepspeed", "transformers")


class Results:
    """results/NAME.json."""

    lock = threading.Lock()

    def __init__(self, name, cfg):
        self.path = Path(cfg.results) / f"{name}.json"
        if self.path.exists():
            self.record = json.loads(self.path.read_text())
        else:
            self.record = {
                "edition": 2,
                "command": f"python experiments.py --names {name}",
                "processor": bench.processor_name(),
                "threads": 1,
                "versions": {name: version(name) for name in PACKAGES},
                "commit": utils.git_commit(),
                "rows": [],
            }

    def has(self, variant, seed):
        known = [(row["variant"], row["seed"]) for row in self.record["rows"]]
        return (variant, seed) in known

    def add(self, variant, seed, row):
        with Results.lock:
            self.record["rows"].append({"variant": variant, "seed": seed, **row})
            with utils.writing(self.path, "; name another folder with --results"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                utils.atomic_write(self.path, json.dumps(self.record, indent=1) + "\n")
        print(variant, seed, json.dumps(row)[:200], flush=True)


def main(cfg):
    jobs = []
    for name in cfg.name_list:
        results = Results(name, cfg)
        for seed in map(int, cfg.seeds.split(",")):
            for variant, measure in EXPERIMENTS[name]().items():
                if not results.has(variant, seed):
                    jobs.append((results, variant, seed, measure))

    failed = []

    def measure_one(job):
        results, variant, seed, measure = job
        lab = Lab(Path(cfg.out).resolve(), seed)
        try:
            results.add(variant, seed, measure(lab))
        except utils.UserError as error:  # the others go on
            print(f"error: {variant}, seed {seed}: {error}", flush=True)
            failed.append(variant)

    with ThreadPoolExecutor(cfg.processes) as pool:
        list(pool.map(measure_one, jobs))
    if "overoptimization" in cfg.name_list:
        results = Results("overoptimization", cfg)
        draw_overoptimization(results.record["rows"], results.path.with_suffix(".png"))
    if failed:
        raise utils.UserError(f"{len(failed)} of {len(jobs)} measurements did not finish")


if __name__ == "__main__":
    utils.run(main, Config)
