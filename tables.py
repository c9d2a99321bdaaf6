"""results/README.md, written from the JSON files beside it: `python bench.py tables`.

A section per file, and a function per section, which returns lines of Markdown. Numbers come from
the files only; test_bench.py checks the claims that are made in words.
"""
import json
import math
from pathlib import Path

PHASES = ("rollout_s", "score_s", "update_s")


def read_json(path):
    return json.loads(Path(path).read_text())


def show(value, form):
    """A number that may not have been measured."""
    return "-" if value is None else format(value, form)


def table(header, rows):
    """header: column titles; rows: lists of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def first_edition(record):
    """Whether a file was measured with the first edition of the code. Later ones say
    "edition": 2 in the object, or in the rows of a list."""
    if isinstance(record, list):
        record = record[0]
    return record.get("edition", 1) == 1


def code_of(record):
    if first_edition(record):
        return "the first edition of this code"
    return "this code"


def how_measured(record, path):
    """The sentence below the heading of what bench.py measured."""
    device_text = record["device"]
    command = record["command"]
    if device_text.startswith("cpu"):
        threads = record["threads"]
        device_text = f"a CPU ({record['processor']}, threads: {threads})"
        command = f"OMP_NUM_THREADS={threads} {command}"
    versions = record["versions"]
    text = (
        f"`{command}` on {device_text}, {record['time'][:10]}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, with {code_of(record)} ([{path.name}]"
        f"({path.name}))."
    )
    if record["ceilings"]:
        copy = record["ceilings"]["bytes_per_s"] / 1e9
        product = record["ceilings"]["flop_per_s"] / 1e12
        text += f" Copying {copy:,.0f} GB/s, matrix products {product:,.2f} TFLOP/s."
    return text


def generation_table(rows):
    lines = []
    for row in rows:
        length = f"{row['new_tokens']}"
        if row["case"] == "ragged":
            length = f"{show(row['mean_length'], '.0f')} on average"
        lines.append([
            f"{row['model']}, {row['case']}",
            f"{row['prompts']} x {row['prompt_len']} + {length}",
            show(row["tokens_per_s"], ",.0f"),
            show(row["transformers_tokens_per_s"], ",.0f"),
            f"**{show(row['ratio'], '.2f')}**",
            show(row["ms_per_step"], ".2f"),
            show(row["floor_share"], ".0%"),
        ])
    header = [
        "model, answers", "prompts x tokens", "engine, tokens/s", "transformers, tokens/s",
        "ratio", "ms per decode step", "share of the bandwidth floor",
    ]
    return table(header, lines)


def generation_section(record, path):
    repeats = record["config"]["repeats"]
    return [
        "## Generation",
        "",
        how_measured(record, path),
        "Answers are sampled at temperature 1 by the hybrid engine and by "
        f"`transformers.generate`, alternating in one process; medians of {repeats} runs. Fixed: "
        "every answer has the same length. Ragged: answers end at geometric lengths, at most 256 "
        "tokens; finished rows leave the engine's batch and waiting prompts take their place. The "
        "floor is the time to read weights and KV cache once per step.",
        "",
        *generation_table(record["rows"]),
    ]


def ppo_table(rows):
    lines = []
    for row in rows:
        cells = [
            f"{row['model']}, {row['case']}",
            f"{row['batch']} x {row['prompt_len']} + {show(row.get('mean_length'), '.0f')}",
        ]
        theirs = row["hf"] or {}
        for phase in PHASES:
            both = (row["hybrid"][phase], theirs.get(phase))
            cells.append(" / ".join(show(seconds, ".2f") for seconds in both))
        cells += [
            f"**{show(row['ratio'], '.2f')}**",
            show(row.get("pairs_per_s"), ".1f"),
            show(row.get("mfu"), ".0%"),
        ]
        lines.append(cells)
    header = [
        "model, answers", "pairs x tokens", "rollout, s: ours / transformers", "score, s",
        "update, s", "ratio", "pairs/s", "MFU",
    ]
    return table(header, lines)


def ppo_section(record, path):
    repeats = len(record["rows"][0]["runs"]["hybrid"])
    return [
        "## PPO iterations",
        "",
        how_measured(record, path),
        "One iteration of `ppo.py`: rollout, score, update (one optimizer step of actor and "
        f"critic); medians of {repeats} iterations of each side. On the other side "
        "`transformers.generate` samples, and all matrix products are PyTorch's own. On a CPU "
        "PyTorch's come from MKL and ours from oneDNN, which is the difference in score and "
        "update.",
        "",
        *ppo_table(record["rows"]),
    ]


def train_section(record, path):
    lines = []
    for row in record["rows"]:
        lines.append([
            f"{row['model']}, {row['step']}",
            f"{row['batch']} x {row['length']}",
            show(row.get("seconds"), ".3f"),
            show(row.get("tokens_per_s"), ",.0f"),
            show(row.get("mfu"), ".0%"),
        ])
    return [
        "## Training",
        "",
        how_measured(record, path),
        f"Optimizer steps on full rows; medians of {record['config']['repeats']} steps.",
        "",
        *table(["model, step", "rows x tokens", "seconds", "tokens/s", "MFU"], lines),
    ]


def kernels_section(record, path):
    lines = []
    for row in record["rows"]:
        lines.append([
            f"{row['model']}, {row['kernel']}",
            f"{row['us']:,.0f}",
            f"{row['pytorch_us']:,.0f}",
            f"{row['ceiling_share']:.0%}",
        ])
    return [
        "## Kernels",
        "",
        how_measured(record, path),
        "Each function of `kernels.py` (on a CPU its PyTorch reference) and what PyTorch offers "
        "for the same work. What fits in the cache is read faster than large arrays are copied, so "
        "shares above 100% are possible.",
        "",
        *table(["function", "us", "PyTorch, us", "share of its ceiling"], lines),
    ]


def memory_section(record, path):
    lines = []
    for row in record["rows"]:
        lines.append([
            row["how"],
            f"{row['peak_mib']:,.0f} MiB",
            f"{row['seconds']:.2f}",
            f"{row['loss']:.6f}",
            f"{row['gradients_off']:.1e}",
        ])
    return [
        "## Memory of the output layer",
        "",
        how_measured(record, path),
        "Training never holds (B, T, V) logits. Forward and backward of the output layer for 2,048 "
        "tokens, width 256 and a vocabulary of 128,256, with all logits at once and in chunks:",
        "",
        *table(["", "peak memory", "seconds", "loss", "gradients differ by"], lines),
    ]


def fit_section(record, path):
    lines = []
    for row in record["rows"]:
        result = row["error"] or f"{row['memory_gib']:.1f} GiB at most"
        lines.append([row["how"], row["model"], result])
    return [
        "## The largest actor",
        "",
        how_measured(record, path),
        f"Two iterations of PPO on a machine of {record['memory_gib']:.0f} GiB, with a critic and "
        "a reward model of OPT-350M's shape, for actors of growing size until one does not fit:",
        "",
        *table(["trained", "actor", "memory"], lines),
    ]


def plan_section(record, path):
    of_table = {}
    for row in record["rows"]:
        of_table.setdefault(row["table"], []).append(row)
    return [
        "## Plans beside DeepSpeed-Chat's tables",
        "",
        "**Nothing of ours in these tables is measured.** "
        f"`{record['command']}` computes it ([{path.name}]({path.name})): a critic of OPT-350M's "
        "shape, 264,292 pairs of 256 + 256 tokens, 1,024 per iteration, one optimizer step, ZeRO 3 "
        "on several GPUs, micro batches of 16 rows, and the flags named here where it would not "
        f"fit; {record['basis']}. DeepSpeed-Chat's numbers are the published ones of "
        f"[its announcement]({record['source']}) and of its README; its costs, at "
        f"${record['price']:g} per GPU and hour, which is also our price.",
        "",
        *step3_table(of_table["step 3"]),
        "",
        "Hours of steps 1, 2 and 3. Ours are for one epoch each, and rows of the steps as 2 : 4 : "
        "4; DeepSpeed-Chat does not say how many rows and epochs its steps 1 and 2 had:",
        "",
        *three_steps_table(of_table["steps 1 to 3"]),
        "",
        "The largest actor on one GPU (a V100 has no bf16, so ours is fp32 there):",
        "",
        *largest_table(of_table["largest"]),
    ]


def step3_table(rows):
    lines = []
    for row in rows:
        line = [row["model"], f"{row['gpus']} x {row['gpu']}"]
        if "hours" in row:
            waits = row["gather_s"] + row["traffic_s"] + row["host_s"]
            seconds = [row["rollout_s"], row["score_s"], row["update_s"], waits]
            line += [f"`{row['flags']}`" if row["flags"] else "", f"{row['gib']:.0f}"]
            line += [f"{x:.1f}" for x in seconds]
            line += [f"{row['hours'][2]:.2f}", show(row["published_hours"], ".2f")]
            line += [f"{row['dollars']:,.0f}", show(row["published_dollars"], ",.0f")]
        else:
            line += ["does not fit"] + 6 * ["-"]
            line += [show(row["published_hours"], ".2f"), "-", "-"]
        lines.append(line)
    header = [
        "actor", "GPUs", "flags", "GiB per GPU", "rollout, s", "score, s", "update, s",
        "communication, s", "hours", "DeepSpeed-Chat, hours", "$", "DeepSpeed-Chat, $",
    ]
    return table(header, lines)


def three_steps_table(rows):
    lines = []
    for row in rows:
        line = [row["model"], f"{row['gpus']} x {row['gpu']}"]
        for hours in (row["hours"], row["published_hours"]):
            line.append(" + ".join(f"{x:.2f}" for x in hours))
        lines.append(line)
    return table(["actor", "GPUs", "hours", "DeepSpeed-Chat, hours"], lines)


def largest_table(rows):
    lines = []
    for row in rows:
        line = [row["gpu"]]
        for name in ("without", "with_offload"):
            cell = "no larger one"
            if name in row:
                cell = f"{row[name]} `{row[name + '_flags']}`"
            line.append(cell)
        lines.append([*line, row["published"]])
    return table(["GPU", "in its memory", "with `--offload`", "DeepSpeed-Chat"], lines)


def plan_memory_section(record, path):
    lines = []
    for row in record["rows"]:
        line = [row["case"]]
        for phase, measured in row["measured_mib"].items():
            line.append(f"{row['predicted_mib'][phase]:,.0f} / {measured:,.0f}")
        lines.append([*line, f"{row['ratio']:.2f}"])
    return [
        "## Memory, planned and measured",
        "",
        how_measured(record, path),
        "Peak memory of each phase in the second of two iterations of PPO, above what the process "
        "has after a tiny run, in MiB per rank: what `plan.py` says / what was measured. The "
        "models are small OPTs and Llamas; the flags stand in the file.",
        "",
        *table(["", "rollout", "score", "update", "ratio of the peaks"], lines),
    ]


def job_section(record, path):
    rows = []
    for row in record["rows"]:
        what = f"{row['model']}, {row.get('prompts') or row['batch']} rows"
        if "pairs_per_s" in row:
            speed = f"{row['pairs_per_s']:.2f} pairs/s"
        else:
            speed = f"{show(row.get('tokens_per_s'), ',.0f')} tokens/s"
        rows.append([what, speed])
    return [
        f"## Job: {record['job']}",
        "",
        how_measured(record, path),
        f"Published: {record['published'] or 'nothing that we know of'}.",
        "",
        *table(["", "here"], rows),
    ]


def profile_section(record, path):
    lines = []
    for row in record["rows"]:
        lines.append([
            row["model"], f"{row['batch']}", f"`{row['kernel'][:60]}`",
            f"{row['us_per_step']:,.1f}", f"{row['calls']:.1f}",
        ])
    header = ["model", "rows", "kernel", "us per step", "calls per step"]
    return [
        "## The kernels of a decode step", "", how_measured(record, path), "",
        *table(header, lines)]


BENCH_SECTIONS = {
    "generate": generation_section,
    "profile": profile_section,
    "ppo": ppo_section,
    "train": train_section,
    "kernels": kernels_section,
    "memory": memory_section,
    "fit": fit_section,
    "plan": plan_section,
    "plan-memory": plan_memory_section,
}


def demo_table(rows):
    lines = []
    for row in rows:
        before, after = row["score"]
        lines.append([
            f"{row['seed']}",
            f"{row['sft_gold']:.1%}",
            f"{row['reward_accuracy']:.1%}",
            f"**{row['ppo_gold']:.1%}**",
            f"{row['ppo_ema_gold']:.1%}",
            f"{before:.2f} → {after:.2f}",
            f"{row['ppo_kl']:.2f}",
        ])
    header = [
        "seed", "SFT accuracy", "reward model accuracy", "PPO accuracy", "EMA accuracy", "reward",
        "KL, nats per answer",
    ]
    return table(header, lines)


def demo_section(rows, path):
    return [
        "## The demo",
        "",
        f"`python demo.py --seed N` with {code_of(rows)}; seed {rows[0]['seed']} takes "
        f"{rows[0]['seconds']:.0f} seconds on two cores of one {rows[0]['processor']} "
        f"([{path.name}]({path.name})). "
        "Accuracy is that of the exact checker on answers sampled at temperature 1 to held-out "
        "prompts, and of the reward model on held-out pairs.",
        "",
        *demo_table(rows),
    ]


def guard_section(record, path):
    held_out = record["held_out"]
    lines = [
        ["gold accuracy", *[f"{row['gold']:.1%}" for row in held_out]],
        ["score", *[f"{row['score']:.3f}" for row in held_out]],
        ["KL, nats per answer", *[f"{row['kl']:.2f}" for row in held_out]],
    ]
    header = ["iteration", *[f"{row['iteration']}" for row in held_out]]
    return [
        "## Long runs",
        "",
        f"PPO on the demo's models for {held_out[-1]['iteration']} iterations instead of 32, with "
        f"{code_of(record)} ([{path.name}]({path.name})). The reward model's score and the exact "
        "checker's accuracy rise together; neither falls by more than the noise of 512 prompts. "
        "On held-out prompts:",
        "",
        *table(header, lines),
        "",
        "![gold accuracy and reward over 160 iterations](guard.png)",
    ]


def sweep_section(rows, path):
    lines = []
    for epochs in (1, 2, 4):
        for minibatches in (1, 4):
            cells = [f"{epochs}", f"{minibatches}"]
            for batches in (1, 4):  # rollouts of 128 and of 512 prompts
                settings = (epochs, minibatches, batches)
                cells.append(" / ".join(f"{gold:.1%}" for gold in sweep_gold(rows, *settings)))
            lines.append(cells)
    worst = min(row["gold"] for row in rows)
    most_kl = max(row["kl"] for row in rows)
    header = ["PPO epochs", "minibatches per epoch", "rollouts of 128", "rollouts of 512"]
    return [
        "## More than one update per rollout",
        "",
        "DeepSpeed-Chat does not get more than one epoch, or more than one batch per rollout, to "
        "work. Here: 6,144 prompts of the demo in rollouts of 128 or 512, with "
        f"{code_of(rows)}, three seeds each ([{path.name}]({path.name})). Gold accuracy on "
        f"held-out prompts; before PPO it is {rows[0]['gold_before']:.1%}.",
        "",
        *table(header, lines),
        "",
        f"No run diverges: the worst of the {len(rows)} ends at {worst:.1%}, the KL is "
        f"{most_kl:.2f} nats per answer at most, and no optimizer step was skipped.",
    ]


def sweep_gold(rows, epochs, minibatches, batches):
    gold = []
    for row in rows:
        settings = (row["ppo_epochs"], row["minibatches"], row["rollout_batches"])
        if settings == (epochs, minibatches, batches):
            gold.append(row["gold"])
    return gold


def recipes_section(rows, path):
    lines = []
    for row in rows:
        lines.append([
            row["name"], f"{row['gold']:.1%}", f"{row['kl']:.2f}", f"{row['length']:.2f}",
        ])
    return [
        "## Recipes",
        "",
        "The recipes of the main [README](../README.md#i-want-to-change-it): "
        f"{rows[0]['iterations']} iterations of the demo's PPO with each, one seed, with "
        f"{code_of(rows)} ([{path.name}]({path.name})). Before PPO the gold accuracy is "
        f"{rows[0]['gold_before']:.1%}. With 512 prompts, differences below 3 points are noise.",
        "",
        *table(["", "gold accuracy", "KL, nats per answer", "tokens per answer"], lines),
    ]


def faults_section(rows, path):
    kinds = ("kill -9", "SIGTERM", "full disk")
    lines = []
    for row in rows:
        counts = [sum(fault["fault"] == kind for fault in row["faults"]) for kind in kinds]
        same = "yes" if all(row["same"]) else "NO"
        cells = [row["zero"], row["steps"], *counts, len(row["same"]), same]
        lines.append([f"{row['script']}.py", *map(str, cells)])
    faults = sum(len(row["faults"]) for row in rows)
    ends = sum(len(row["same"]) for row in rows)
    header = ["script", "ZeRO", "steps", *kinds, "ends compared", "bit-identical"]
    return [
        "## Faults",
        "",
        f"`FLATRLHF_FAULTS={faults} python -m pytest -k many_faults test_training.py` starts each "
        "script on two ranks, and at a random moment kills a rank, sends SIGTERM to the launcher, "
        "or lets no file grow any more, as on a full disk. The run is resumed, and struck again. "
        f"With {code_of(rows)}, all {ends} runs that reached their end equal an undisturbed one "
        "bit for bit: weights, answers and logged numbers but for times "
        f"([{path.name}]({path.name})). Every run that SIGTERM or a full disk ended before its "
        "last step said so in one sentence.",
        "",
        *table(header, lines),
    ]


def accuracy_interval(result):
    """'0.897 ± 0.042', 95%."""
    accuracy, n = result["held_out_accuracy"], result["pairs"]
    interval = 1.96 * (accuracy * (1 - accuracy) / n) ** 0.5
    return f"{accuracy:.3f} ± {interval:.3f}"


def real_data_section(record, path):
    loss = record["sft"]["held_out_loss"]
    before, after = record["ppo"]["eval_score"]
    before_se, after_se = record["ppo"]["eval_score_se"]
    baseline = record["bag_of_words"]
    rows = [
        ["fine-tuning, 1,100 instructions", f"loss {loss:.3f}", f"perplexity {math.exp(loss):.2f}"],
        [
            f"reward model, {record['reward']['pairs']} held-out pairs",
            f"accuracy {accuracy_interval(record['reward'])} (95%)",
            f"bag-of-words baseline: {baseline['llms_from_scratch_pref']:.3f}",
        ],
        [
            "PPO, mean score",
            f"{before:.3f} ± {before_se:.3f} → {after:.3f} ± {after_se:.3f} (standard error)",
            f"KL {record['ppo']['eval_kl'][1]:.2f} nats per answer",
        ],
        [
            f"reward model on hh-rlhf, {record['hh']['pairs']} held-out pairs",
            f"accuracy {accuracy_interval(record['hh'])} (95%)",
            f"bag-of-words baseline: {baseline['hh_harmless_test']:.3f}",
        ],
    ]
    return [
        "## Real weights, real preferences",
        "",
        "A Llama of 260,032 parameters that has only seen children's stories (stories260k of "
        "llama2.c, a vocabulary of 512), instructions and preferences of LLMs-from-scratch, and "
        f"the harmless test split of hh-rlhf; {record['device']}, one run each, with "
        f"{code_of(record)}. All flags are in [{path.name}]({path.name}). On held-out rows:",
        "",
        *table(["", "", ""], rows),
        "",
        "The bag-of-words baseline is a logistic regression on which words occur. It beats the "
        "small reward model on the first data set, where rejected answers mostly differ by a rude "
        "word.",
    ]


KERNEL_TITLES = {
    "prefill_kernel": "prefill attention",
    "decode_kernel": "decode attention",
    "merge_kernel": "merge of the splits of decode",
    "rope_cache_kernel": "rotary and cache",
    "add_norm_kernel": "add and norm",
    "sample_kernel": "sampling",
    "logit_stats_kernel": "log-probabilities, forward",
    "logit_grads_kernel": "log-probabilities, backward",
}


def compiled_section(rows, path):
    lines = []
    for kernel, title in KERNEL_TITLES.items():
        cells = [title]
        spilled = 0
        for target in ("80", "90"):
            variants = [r for r in rows if r["kernel"] == kernel and r["target"] == target]
            registers = max(r["registers"] for r in variants)
            shared = max(r["shared"] for r in variants)
            tensor_cores = sorted({r["tensor_cores"] for r in variants if r["tensor_cores"]})
            parts = [f"{registers} registers", f"{math.ceil(shared / 1024)} KB"]
            cells.append(", ".join(parts + tensor_cores))
            spilled += sum(r["spilled"] for r in variants)
        lines.append([*cells, f"{spilled}"])
    return [
        "## Kernels, compiled without a GPU",
        "",
        "`COMPILE_FULL=1 COMPILE_TABLE=results/kernels-compile.json pytest test_kernels.py -k "
        f"compiles` compiles the kernels of {code_of(rows)} for GPUs that are not there, for every "
        f"dtype and head size in use ([{path.name}]({path.name})). Most registers per thread, most "
        "shared memory per block, tensor core instructions, bytes of spilled registers:",
        "",
        *table(["kernel", "sm_80", "sm_90", "spilled"], lines),
    ]


def dry_run_section(counts, path):
    lines = []
    for name, count in counts.items():
        triton = sum(count["triton"].values())
        products = sum(count["torch"].get(op, 0) for op in ("mm", "addmm", "_addmm_activation"))
        rest = count["launches"] - triton - products
        numbers = (count["launches"], triton, products, rest)
        lines.append([name, *(f"{n}" for n in numbers)])
    header = ["model and rows", "launches", "Triton kernels", "matrix products", "other operations"]
    return [
        "## Launches per decode step", "",
        "Counted without a GPU, on fake tensors of `cuda:0`: "
        f"`DRYRUN_OUT=file python -m pytest test_dryrun.py` ([{path.name}]({path.name})). On a GPU "
        "a CUDA graph holds all of them.",
        "", *table(header, lines)]


def mutants_section(record, path):
    rows = record["mutants"]
    first = record["first_version"]
    files = {}
    for row in rows:
        files.setdefault(row["file"], []).append(row["noticed"])
    lines = [[name, f"{len(noticed)}", f"{sum(noticed)}"] for name, noticed in files.items()]
    total = len(rows)
    noticed = sum(row["noticed"] for row in rows)
    lines.append(["all", f"{total}", f"**{noticed}**"])
    return [
        "## Mutants",
        "",
        f"`python mutants.py` makes {total} changes of one line to {code_of(record)}, each a "
        "mistake that somebody could make: a sign, an index, a mask, a state that is not restored. "
        f"Each is made in a copy, which is then tested. The tests of `make test` notice {noticed} "
        f"of them; [{path.name}]({path.name}) has every change and the test that fails. At first "
        f"{first['tests_written_for']} got past the tests that were meant for them; for these, "
        f"tests were added or made stricter. Another {first['replaced']} could not change any "
        "result, and others took their place.",
        "",
        *table(["file", "mutants", "noticed"], lines),
    ]


def by_variant(record):
    """{variant of an experiment: its rows, one per seed}."""
    rows_of = {}
    for row in sorted(record["rows"], key=lambda row: row["seed"]):
        rows_of.setdefault(row["variant"], []).append(row)
    return rows_of


def seeds(rows, name, form):
    """One number of each seed."""
    return " / ".join(format(row[name], form) for row in rows)


def mean(rows, name, form):
    """The mean over those seeds for which it was measured."""
    values = [row[name] for row in rows if row[name] is not None]
    return format(sum(values) / len(values), form)


def how_experimented(record, path):
    return (
        f"`{record['command']}`, three seeds, each with its own models, on a CPU "
        f"({record['processor']}, one thread, beside other work), with {code_of(record)} "
        f"([{path.name}]({path.name}))."
    )


def methods_table(record):
    lines = []
    for variant, rows in by_variant(record).items():
        lines.append([
            variant,
            seeds(rows, "gold", ".1%"),
            f"**{mean(rows, 'gold', '.1%')}**",
            seeds(rows, "kl", ".2f"),
            mean(rows, "cpu_seconds", ".0f"),
        ])
    return table(["", "gold accuracy", "mean", "KL, nats per answer", "CPU seconds"], lines)


def methods_section(record, path):
    before = seeds(by_variant(record)["PPO"], "gold_before", ".1%")
    return [
        "## Which method?",
        "",
        "On `toy`, all that train do so on the same 6,144 sampled answers, four to a prompt where "
        f"answers are compared: {how_experimented(record, path)} Gold accuracy on 512 held-out "
        f"prompts, before training {before}; seconds of CPU time. Filtered fine-tuning keeps the "
        "best of four answers, three times. Best of n does not train: it samples n answers to "
        "every prompt and takes the one that the reward model likes best; its KL is at most log n "
        "- (n - 1) / n, and its seconds are those of 512 prompts.",
        "",
        *methods_table(record),
        "",
        "The critic costs PPO about half as much time again. With answers of five tokens and a "
        "good reward model it buys no accuracy beyond the noise of 3 points. Best of 4 beats them "
        "all, at four times the price of every answer from then on; with 16, the reward model's "
        "mistakes are found more often, and accuracy falls again. Filtered fine-tuning learns "
        "least from the same samples.",
    ]


def countdown_methods_section(record, path):
    before = seeds(by_variant(record)["PPO"], "gold_before", ".1%")
    return [
        "### On countdown",
        "",
        "The same with the exact checker as reward and, for PPO, a new critic: "
        f"{how_experimented(record, path)} Before training {before} are solved.",
        "",
        *methods_table(record),
        "",
        "From the same 6,144 answers, all that train gain about 10 points. Filtered fine-tuning is "
        "not behind here: the checker says for certain which answers are worth imitating. Best of "
        "16 does not fall behind best of 4 either, because an exact checker cannot be "
        "over-optimized; it solves whatever the model solves once in 16 attempts.",
    ]


def break_section(record, path):
    lines = []
    for variant, rows in by_variant(record).items():
        lines.append([
            variant,
            seeds(rows, "gold", ".1%"),
            seeds(rows, "kl", ".2f"),
            mean(rows, "entropy", ".2f"),
            mean(rows, "first_gap", ".0e"),
            mean(rows, "clip_frac", ".1%"),
            mean(rows, "actor_grad_norm", ".2f"),
        ])
    header = [
        "", "gold accuracy", "`eval_kl`", "`entropy`", "`engine_gap_mean`, iteration 1",
        "`clip_frac`", "`actor_grad_norm`",
    ]
    return [
        "## Break it",
        "",
        "24 iterations of 256 answers with one mistake each, of [those in "
        f"RECIPES.md](../RECIPES.md#break-it): {how_experimented(record, path)} Gold accuracy and "
        "KL on held-out prompts, one number per seed; the rest is the mean over the seeds, of the "
        "last iteration.",
        "",
        *table(header, lines),
        "",
        "On a task as easy as this one no mistake stops PPO from learning: that is why they live "
        "long. What gives them away is another column. With dropout, sampler and trainer disagree "
        "by a twentieth of a nat per token where it should be rounding, and answers are clipped "
        "although the policy has hardly moved. Where EOS is not an action, accuracy stays behind: "
        "when to end is half of what these answers get wrong, and nothing trains it but the other "
        "tokens. Without whitening the gradient has the scale of the scores; here that is near "
        "enough to 1, with another scorer it is not. Log-probabilities without the temperature "
        "show in the gap alone: KL and entropy are those of a policy that nobody samples from.",
    ]


def overoptimization_section(record, path):
    lines = []
    for rows in by_variant(record).values():
        pairs = rows[0]["pairs"]
        lines.append([
            f"{pairs or 'all'}",
            mean(rows, "accuracy", ".1%"),
            f"{rows[0]['kl_coef']:g}",
            seeds(rows, "gold_best", ".1%"),
            seeds(rows, "gold", ".1%"),
            seeds(rows, "score", ".2f"),
            seeds(rows, "kl", ".1f"),
        ])
    header = [
        "pairs", "reward model accuracy", "KL coefficient", "best gold accuracy",
        "last gold accuracy", "last score", "KL, nats per answer",
    ]
    return [
        "## When does it break?",
        "",
        "The score of a reward model is a proxy of what it was meant to teach. Pushed far enough, "
        "the score rises and the gold accuracy falls ([Gao et al. "
        "2022](https://arxiv.org/abs/2210.10760)). Here: 40 iterations of 128 answers with reward "
        "models that have seen 100, 1,000 or all 22,738 pairs of `toy`: "
        f"{how_experimented(record, path)} On held-out prompts, one number per seed:",
        "",
        *table(header, lines),
        "",
        "![gold accuracy and score over the square root of KL](overoptimization.png)",
        "",
        "With 100 pairs and no KL penalty the policy finds what the reward model mistakes for a "
        "good answer: the score rises, and the gold accuracy falls far below where it began. The "
        "KL penalty protects: with a coefficient of 0.3 even this reward model improves the "
        "policy. With all pairs the coefficient hardly matters, so the demo can afford 0.05. "
        "Without an exact checker nobody would see the difference in the score; the KL shows it.",
    ]


def retained_table(record, header, trained, hidden, kl):
    """trained, hidden, kl: the columns of accuracy on the prompts of PPO, and of accuracy and KL on
    others."""
    lines = []
    for variant, rows in by_variant(record).items():
        lines.append([
            variant,
            "-" if variant == "SFT" else seeds(rows, trained, ".1%"),
            seeds(rows, hidden, ".1%"),
            seeds(rows, kl, "z.2f"),
            seeds(rows, "held_out_loss", ".3f"),
        ])
    return table(header, lines)


def mixture_section(record, path):
    header = [
        "", "accuracy, five skills", "accuracy, `reverse`", "KL on `reverse`",
        "loss, nats per token",
    ]
    return [
        "## What does the mixture retain?",
        "",
        "PPO on prompts of five of `toy`'s six skills; `reverse` is only in the demonstrations of "
        f"SFT, which are the mixture (`--ptx-data toy`): {how_experimented(record, path)} 16 "
        "iterations of 256 answers; then accuracy on held-out prompts of the five skills and of "
        "`reverse`, and the loss on held-out demonstrations of all six.",
        "",
        *retained_table(
            record, header, "gold_trained_skills", "gold_hidden_skill", "kl_hidden_skill"
        ),
        "",
        "PPO does not forget `reverse`: what it learns from five skills helps the sixth, which is "
        "of the same kind. What it does leave behind are the demonstrations, with the mistakes of "
        "their labellers: their loss rises by an eighth of a nat per token. The mixture keeps two "
        "thirds of that rise away. But it also teaches those mistakes again, so accuracy gains "
        "less. The KL coefficient of 0.05 makes no difference at this distance.",
    ]


def forgetting_section(record, path):
    header = [
        "", "accuracy, `toy`", "accuracy, `countdown`", "KL on `countdown`",
        "loss on `countdown`, nats per token",
    ]
    before = seeds(by_variant(record)["PPO, KL coefficient 0"], "gold_toy_before", ".1%")
    return [
        "### Of a task of another kind",
        "",
        "SFT on `toy` and `countdown`, then 32 iterations of 256 answers of PPO on prompts of "
        "`toy` alone, with its exact checker as reward; the mixture is the demonstrations of both "
        f"(`--ptx-data toy,countdown`): {how_experimented(record, path)} After SFT {before} of "
        "`toy` are correct. On held-out prompts and demonstrations:",
        "",
        *retained_table(record, header, "gold_toy", "gold_countdown", "kl_countdown"),
        "",
        "Nothing of `countdown` is forgotten in a run of this length, with or without the KL "
        "penalty and the mixture: prompts of the two tasks look different, and the policy stays "
        "where it was on those that PPO does not see. So there is nothing for the mixture to "
        "retain, and it costs 3 points on `toy`.",
    ]


def ema_section(record, path):
    decays = [name.removeprefix("gold_") for name in record["rows"][0] if name[5:6] == "0"]
    lines = []
    for variant, rows in by_variant(record).items():
        cells = [variant, seeds(rows, "gold", ".1%")]
        cells += [seeds(rows, f"gold_{decay}", ".1%") for decay in decays]
        lines.append(cells)
    return [
        "## Is EMA better?",
        "",
        "Runs of 128 answers and four optimizer steps per iteration; several EMAs of the same "
        f"weights, judged at the end: {how_experimented(record, path)} Gold accuracy on 512 "
        "held-out prompts:",
        "",
        *table(["", "the last weights", *[f"decay {decay}" for decay in decays]], lines),
        "",
        "By default the learning rate falls to a tenth. Then the last weights have settled, and no "
        "decay is better beyond the noise. With a constant learning rate 0.97 gains 2 points; with "
        "one that is also three times as high, 15, and 0.992 gains 21: the average of weights that "
        "jump about is better than any of them. The price is lag. Of the weights at the start, "
        "0.992 still holds 77% after 32 optimizer steps, 36% after 128 and 13% after 256, and 0.97 "
        "holds 38%, 2% and nothing. The default is therefore 0.97, which is at most a point behind "
        "from 128 steps on. InstructGPT's 0.992 is for runs of many hundred steps; in those of "
        "fewer than 100 take 0.9, or 0.",
    ]


def gap_section(record, path):
    lines = []
    for variant, rows in by_variant(record).items():
        lines.append([
            variant, seeds(rows, "gap_mean", ".1e"), seeds(rows, "gap_max", ".1e")
        ])
    return [
        "## Sampler against trainer",
        "",
        "How far the log-probabilities of the engine and of the trained model are from each other, "
        f"for the same token and the same weights: {how_experimented(record, path)} Four "
        "iterations of 256 answers.",
        "",
        *table(["weights", "mean difference, nats", "largest difference, nats"], lines),
    ]


def smollm2_section(record, path):
    gspo, ppo = record["gspo"]["evaluations"], record["ppo"]["evaluations"]
    lines = []
    for name, rows in (("GSPO, exact checker", gspo), ("PPO, reward model", ppo)):
        for row in rows:
            gold = f"{row['eval_gold']:.1%}"
            cells = [name, f"{row['step']}", gold, f"{row['eval_score']:.2f}"]
            lines.append([*cells, f"{max(row['eval_kl'], 0):.2f}"])
    first_loss, last_loss = record["sft"]["held_out_loss"][0], record["sft"]["held_out_loss"][-1]
    reward, generate = record["reward"], record["generate"]
    gspo_prompts = record["gspo"]["held_out"]
    ours, theirs = (sorted(generate["seconds"][name])[1] for name in ("ours", "transformers"))
    return [
        "## A real model offline",
        "",
        f"{record['model']}, on `{record['task']}` with LoRA of rank 16, in float32 on one core of "
        f"a CPU ({record['processor']}, beside other work), with {code_of(record)} "
        f"([{path.name}]({path.name})); the commands are in "
        "[RECIPES.md](../RECIPES.md#a-real-model-offline). "
        f"{record['sft']['steps']} steps of SFT bring the held-out loss from {first_loss:.2f} "
        f"(after two) to {last_loss:.2f} nats per token; {reward['steps']} steps of 8 pairs bring "
        f"the reward model to {reward['accuracy'][-1]:.0%} of {reward['held_out_pairs']} held-out "
        "pairs, whose rejected answers have another order, or a word too few or too many.",
        "",
        *table(["", "iteration", "solved", "score", "KL, nats per answer"], lines),
        "",
        f"With {gspo_prompts} held-out prompts a standard error is 5 points, so this shows that "
        "all three steps run on a real chat model, not how far they lead.",
        "",
        f"Greedy answers to {generate['prompts']} prompts ({generate['prompt_tokens']:,} tokens, "
        f"answers of {generate['tokens']:,}): the engine {ours:.0f} s, `transformers.generate` "
        f"{theirs:.0f} s, medians of three turns, and the same tokens. Almost all of it is the "
        "prompts, which both compute alike.",
    ]


def tool_section(record, path):
    lines = []
    for row in record["rows"]:
        cells = [row["name"], f"{row['sft_steps']}", f"{row['before']:.1%}"]
        after = "nothing to learn from" if row["after"] is None else f"**{row['after']:.1%}**"
        lines.append([*cells, after])
    return [
        "## A tool between turns",
        "",
        "The [calculator](../RECIPES.md#a-tool-between-turns): held-out sums of two numbers with "
        "four digits that are right before and after 12 iterations of PPO, sampled at temperature "
        f"1, on a CPU ({record['processor']}, one thread), one seed, with {code_of(record)} "
        f"([{path.name}]({path.name})). Alone, the same model is trained on the sums themselves "
        "(`--data calculator.py:alone`), five times as long.",
        "",
        *table(["", "SFT steps", "right after SFT", "right after PPO"], lines),
    ]


def countdown_section(record, path):
    lines = []
    for row in record["rows"]:
        cells = [f"{row['step']}", f"{row['gold']:.1%}", f"{max(row['kl'], 0):.2f}"]
        lines.append(cells)
    return [
        "## Countdown",
        "",
        "Reach a number with three others, each used once at most. The built-in model is trained "
        "from scratch on demonstrations of which half miss the target, then with the exact checker "
        "as reward and a new critic:",
        "",
        "```sh",
        *record["commands"],
        "```",
        "",
        "Held-out prompts that are solved at temperature 1, on a CPU "
        f"({record['processor']}, one thread), one seed, with {code_of(record)} "
        f"([{path.name}]({path.name})):",
        "",
        *table(["iteration", "gold accuracy", "KL, nats per answer"], lines),
    ]


OTHER_SECTIONS = {
    "demo": demo_section,
    "guard": guard_section,
    "sweep": sweep_section,
    "recipes": recipes_section,
    "methods": methods_section,
    "countdown-methods": countdown_methods_section,
    "overoptimization": overoptimization_section,
    "break": break_section,
    "mixture": mixture_section,
    "forgetting": forgetting_section,
    "ema": ema_section,
    "gap": gap_section,
    "tool": tool_section,
    "countdown": countdown_section,
    "real-data": real_data_section,
    "smollm2": smollm2_section,
    "faults": faults_section,
    "kernels-compile": compiled_section,
    "dryrun": dry_run_section,
    "mutants": mutants_section,
}


def readme(folder):
    """The text of results/README.md."""
    folder = Path(folder)
    sections = []
    for name, section in OTHER_SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            sections.append(section(read_json(path), path))

    records = []
    for path in sorted(folder.glob("*.json")):
        if path.stem not in OTHER_SECTIONS:
            records.append((read_json(path), path))
    for task, section in BENCH_SECTIONS.items():
        for record, path in records:
            if record["task"] == task and not record.get("job"):
                sections.append(section(record, path))
    for record, path in records:
        if record.get("job"):
            sections.append(job_section(record, path))

    status = ""
    if not any(record["device"].startswith("NVIDIA") for record, _ in records):
        status = " **Nothing here has been measured on a GPU yet.**"
    lines = [
        "# Results",
        "",
        "Written by `python bench.py tables` from the JSON files in this folder, which hold all "
        "raw numbers. `test_bench.py` checks that this page is up to date and that its claims "
        'hold. "The first edition of this code" is what was here up to commit a88fbe2; then it was '
        f"rewritten.{status} [NOTES.md](NOTES.md) says what was tuned, with which effect, and how "
        "to measure on a GPU.",
    ]
    for section in sections:
        lines += ["", *section]
    return "\n".join(lines) + "\n"
