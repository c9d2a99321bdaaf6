"""What a user reads and types: flags and their help, the README's commands, numbers and recipes,
and what only several ranks can do wrong.

    pytest test_docs.py -k recipe       # one part
"""
import dataclasses
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
import typing
from pathlib import Path

from testing import HERE, train  # before torch: it sets environment variables

import numpy as np
import pytest
import torch

import bench
import chat
import data
import demo
import experiments
import models
import plan
import ppo
import reward
import sft
import tasks
import training
import utils
from experiments import flags_of_recipe, recipes

README = (HERE / "README.md").read_text()
RECIPES = README + (HERE / "RECIPES.md").read_text()
TRAINING_SCRIPTS = {"sft": sft, "reward": reward, "ppo": ppo}
SCRIPTS = {
    **TRAINING_SCRIPTS, "chat": chat, "demo": demo, "plan": plan, "experiments": experiments}

# What all runs below have in common: 240 rows, a few steps of 8 rows.
STEPS = dict(held_out=0.2, batch_size=8, max_len=64)
PPO_STEPS = dict(
    STEPS, iterations=2, minibatches=2, ppo_epochs=2, max_new_tokens=8, ema=0.0)


@pytest.fixture
def flags(chain, toy_file):
    """PPO from the models of `chain`: two iterations of two epochs of two steps."""
    return dict(PPO_STEPS, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file)


# -----------------------------------------------------------------------------
# flags

# What these are of differs between the scripts.
OWN_FLAGS = (
    "model", "out", "epochs", "batch_size", "micro_batch", "lr", "seed", "max_len", "reward")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help_and_a_group_of_its_own(name):
    Config = SCRIPTS[name].Config
    help_of, group_of = utils.field_comments(Config)
    for field in dataclasses.fields(Config):
        assert help_of.get(field.name), f"{name}.py --{field.name} has no comment behind it"
        assert group_of[field.name] != "flags", f"{name}.py --{field.name} is in no group"
    at_most = {"ppo": 40, "plan": 28}.get(name, 23)
    assert len(dataclasses.fields(Config)) <= at_most


@pytest.mark.parametrize("name", TRAINING_SCRIPTS)
@pytest.mark.parametrize("other", TRAINING_SCRIPTS)
def test_scripts_agree_on_the_flags_that_they_share(name, other):
    first = TRAINING_SCRIPTS[name].Config
    second = TRAINING_SCRIPTS[other].Config
    types = typing.get_type_hints(first)
    other_types = typing.get_type_hints(second)
    help_of, _ = utils.field_comments(first)
    other_help_of, _ = utils.field_comments(second)
    for flag in types:
        if flag in other_types and flag not in OWN_FLAGS:
            where = f"--{flag} of {name}.py and {other}.py"
            assert types[flag] == other_types[flag], where
            assert getattr(first, flag) == getattr(second, flag), where
            assert help_of[flag] == other_help_of[flag], where


def test_a_flag_of_chat_has_the_type_of_the_same_flag_of_ppo():
    types = typing.get_type_hints(chat.Config)
    other_types = typing.get_type_hints(ppo.Config)
    shared = [flag for flag in types if flag in other_types]
    assert {"template", "temperature", "engine", "dtype", "seed"} <= set(shared)
    for flag in shared:
        assert types[flag] == other_types[flag], flag


def test_flags_take_dashes_or_underscores():
    cfg = utils.parse_args(
        ppo.Config, ["--kl-coef", "0.2", "--max_new_tokens=7", "--offload", "--lora=8,lr=1e-3"])
    assert cfg == ppo.Config(kl_coef=0.2, max_new_tokens=7, offload=True, lora="8,lr=1e-3")
    assert utils.parse_args(ppo.Config, ["--no-offload"]) == ppo.Config()
    cfg = utils.parse_args(ppo.Config, ["--local_rank", "3", "--out", "a_b"])
    assert cfg == ppo.Config(out="a_b"), "a value keeps its underscores"


@pytest.mark.parametrize("argv, message", [
    (["--klcoef", "1"], "unrecognized arguments: --klcoef 1"),
    (["--kl", "1"], "unrecognized arguments: --kl 1"),  # no abbreviations
    (["--zero", "4"], "argument --zero: invalid choice: 4"),
    (["--batch-size", "x"], "argument --batch-size: invalid int value: 'x'"),
    (["--temperature", "0"], "--temperature 0.0: PPO learns from samples"),
    (["--batch-size", "10", "--minibatches", "3"], "--batch-size 10 cannot be divided by"),
])
def test_a_wrong_flag_is_named_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        utils.parse_args(ppo.Config, argv)
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_docstring_and_each_flag_with_its_comment_and_default(name, capsys):
    module = SCRIPTS[name]
    with pytest.raises(SystemExit) as end:
        utils.parse_args(module.Config, ["--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert " ".join(module.__doc__.split()) in printed
    help_of, group_of = utils.field_comments(module.Config)
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name.replace('_', '-')}" in printed
        text = f"{help_of[field.name]} (default: {field.default!r})"
        assert " ".join(text.split()) in printed
        assert f"{group_of[field.name]}:" in printed


@dataclasses.dataclass(frozen=True)
class ExampleConfig:
    # first group
    share: float = 0.5             # 50% of it, which
    #   continues here
    name: str = "a # b"            # with a sign in its default
    # second group
    switch: bool = True            # on or off


def test_the_comment_behind_a_field_is_its_help_and_one_above_it_its_group(capsys):
    help_of, group_of = utils.field_comments(ExampleConfig)
    assert help_of == {
        "share": "50% of it, which continues here", "name": "with a sign in its default",
        "switch": "on or off"}
    assert [group_of[name] for name in ("share", "name", "switch")] == [
        "first group", "first group", "second group"]
    with pytest.raises(SystemExit):
        utils.parse_args(ExampleConfig, ["--help"])
    assert "50% of it" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# the README


def shown_commands():
    """(script, flags) of every command in the README and in the docstrings."""
    text = RECIPES + "".join(module.__doc__ for module in SCRIPTS.values())
    text = text.replace("\\\n", " ")
    launcher = r"(?:python|torchrun[^\n`]*?|deepspeed[^\n`]*?)"
    return re.findall(rf"\b{launcher} +({'|'.join(SCRIPTS)})\.py([^\n`]*)", text)


def test_the_commands_that_are_shown_parse():
    found = shown_commands()
    assert len(found) > 15
    assert {name for name, _ in found} == set(SCRIPTS)
    for name, flags in found:
        utils.parse_args(SCRIPTS[name].Config, shlex.split(flags, comments=True))


LAUNCHER_FLAGS = {  # of torchrun, deepspeed and sbatch
    "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_id", "rdzv_endpoint", "hostfile",
    "nodes", "ntasks-per-node", "gpus-per-node", "signal"}


def test_every_flag_that_the_readme_names_exists():
    known = set(LAUNCHER_FLAGS)
    for module in (*SCRIPTS.values(), bench):
        for field in dataclasses.fields(module.Config):
            known.add(field.name.replace("_", "-"))
    named = set(re.findall(r"(?<![-\w])--([a-z][a-z_-]*)", README))
    assert len(named) > 20
    assert named <= known, named - known


def test_the_files_that_the_readme_links_to_and_lists_exist():
    links = re.findall(r"\]\((?!http)([^)#]*)(#[^)]*)?\)", README)
    assert len(links) >= 5
    for path, _ in links:
        assert (HERE / path).exists(), path
    listing = README.split("```\n")[1]
    listed = set(re.findall(r"\b(\w+\.py)\b", listing))
    tests = {path.name for path in HERE.glob("test*.py")} | {"conftest.py"}
    assert listed == {path.name for path in HERE.glob("*.py")} - tests


def notebook_cells():
    """The code of demo.ipynb, a text per cell."""
    cells = json.loads((HERE / "demo.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "outputs are not committed"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_commands_of_the_notebook_parse():
    text = "\n".join(notebook_cells()).replace("\\\n", " ")
    found = re.findall(rf"!python ({'|'.join(SCRIPTS)})\.py(.*)", text)
    assert {name for name, _ in found} == {"demo", "chat", "ppo"}
    for name, flags in found:
        utils.parse_args(SCRIPTS[name].Config, shlex.split(flags))


def demo_run(chain, folder):
    """A run of PPO as the demo leaves it, with a gold accuracy, in folder/out/demo/ppo."""
    run = folder / "out/demo/ppo"
    shutil.copytree(chain["ppo"][0], run)
    samples = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text(samples.replace("}\n", ', "gold": 1.0}\n'))


def test_the_python_of_the_notebook_reads_a_run(chain, tmp_path, monkeypatch, capsys):
    demo_run(chain, tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in notebook_cells():
        is_python = not re.search(r"^ *[!%]", cell, re.M)
        if is_python and "IPython" not in cell:
            exec(compile(cell, "demo.ipynb", "exec"), names)
    printed = capsys.readouterr().out
    assert "iteration 1" in printed and "advantages" in printed
    assert repr(names["row"]["response_tokens"][0]) in printed


@pytest.mark.skipif(not os.environ.get("FLATRLHF_LONG"), reason="`make test-long`")
def test_the_notebook_runs(chain, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    for path in [*HERE.glob("*.py"), HERE / "demo.ipynb"]:
        (tmp_path / path.name).symlink_to(path)
    demo_run(chain, tmp_path)
    for name in ("sft", "reward"):
        (tmp_path / "out/demo" / name).symlink_to(chain[name][0])
    (tmp_path / "out/demo/curves.png").write_bytes(b"\x89PNG")
    notebook = nbformat.read(tmp_path / "demo.ipynb", 4)
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | path)
    printed = str([cell.get("outputs") for cell in notebook.cells])
    assert "Traceback" not in printed and "saved out/no-kl" in printed


def test_the_readme_is_short():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    assert len(prose.split()) <= 2300


def read_results(name):
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def between(start, end="<!-- end -->"):
    """The text of the README after a marker."""
    return README.split(f"<!-- {start} -->")[1].split(end)[0]


def test_the_demos_numbers_in_the_readme_are_those_in_results():
    table = between("demo_table")
    runs = read_results("demo")
    assert table.count("\n|") == 2 + len(runs)
    for run in runs:
        before, after = run["score"]
        row = (
            f"| {run['seed']} | {run['sft_gold']:.1%} | {run['reward_accuracy']:.1%} "
            f"| **{run['ppo_gold']:.1%}** | {run['ppo_ema_gold']:.1%} "
            f"| {before:.2f} → {after:.2f} | {run['ppo_kl']:.2f} |")
        assert row in table, f"demo, seed {run['seed']}"
        assert 0.5 <= run["sft_gold"] <= 0.7
        assert run["ppo_gold"] >= 0.9
        assert run["reward_accuracy"] >= 0.95


def test_the_speed_of_generation_in_the_readme_is_that_in_results():
    table = between("speed_table")
    rows = read_results("cpu-2-threads-generate")["rows"]
    assert table.count("\n|") == 2 + len(rows)
    for row in rows:
        numbers = (
            f"{row['tokens_per_s']:,.0f} | {row['transformers_tokens_per_s']:,.0f} "
            f"| **{row['ratio']:.2f}** | {row['ms_per_step']:.2f} | {row['floor_share']:.0%} |")
        name = f"| {row['model']}, {row['case']} |"
        lines = [line for line in table.splitlines() if line.startswith(name)]
        assert len(lines) == 1, name
        assert numbers in lines[0], row
        at_least = {"fixed": 1.75, "ragged": 3.0}[row["case"]]
        assert row["ratio"] >= at_least
        assert len(row["runs"]["ours"]) >= 3


# -----------------------------------------------------------------------------
# the README's recipes


def apply_recipe(title, folder, hunks=None):
    """Imports ppo.py with a recipe's changes, or only some of them, as a module."""
    source = experiments.change_ppo(hunks or recipes()[title])
    for line in source.splitlines():
        assert len(line) <= 100, line
    name = "recipe_" + re.sub(r"\W", "_", title)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def plain_run(chain, toy_file, tmp_path_factory):
    """The metrics of PPO without any recipe."""
    out = tmp_path_factory.mktemp("plain")
    return train(
        ppo, out, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file, **PPO_STEPS)


def test_the_readme_has_the_recipes_that_are_not_flags():
    assert set(recipes()) >= {
        "RLOO", "GRPO", "KL in the loss", "Adaptive KL", "Old log-probabilities from the sampler",
        "Truncated importance sampling", "A price for length"}


def test_every_recipe_has_been_measured():
    measured = {row["name"] for row in read_results("recipes")}
    measured |= {row["variant"] for row in read_results("break")["rows"]}
    assert set(recipes()) <= measured


@pytest.mark.parametrize("title", recipes())
def test_a_recipe_is_a_diff_of_at_most_fifteen_lines(title):
    lines = 0
    for old, new in recipes()[title]:
        lines += old.count("\n") + new.count("\n")
    assert lines <= 15


def give_the_sampler_a_gap(module):
    """In float32 the sampler's log-probabilities are the trainer's: make them differ."""
    real = module.rollout

    def rollout(*arguments):
        batch = real(*arguments)
        position = torch.arange(batch.sample_logprobs.size(1))
        batch.sample_logprobs += 0.5 * position.sin() * batch.mask
        return batch

    module.rollout = rollout


@pytest.mark.parametrize("title", recipes())
def test_a_recipe_applies_trains_and_changes_what_is_learned(title, flags, plain_run, tmp_path):
    module = apply_recipe(title, tmp_path)
    if title in ("Truncated importance sampling", "Old log-probabilities from the sampler"):
        give_the_sampler_a_gap(module)
    metrics = train(module, tmp_path / "run", **flags, **flags_of_recipe(title))
    assert len(metrics) == 3
    assert metrics[-1]["eval_kl"] != 0
    changed = "eval_score"
    if title == "Adaptive KL":
        changed = "critic_loss"  # with 8 rows its coefficient moves too little to change an answer
    assert metrics[-1][changed] != plain_run[-1][changed]
    if title != "Old log-probabilities from the sampler":
        assert metrics[1]["ratio_mean"] == pytest.approx(1, abs=0.2)
    message = "without a critic there is none in the log"
    has_critic = "    critic = None\n" not in [new for _, new in recipes()[title]]
    assert ("critic_loss" in metrics[1]) == has_critic, message


def first_batch(title, flags, folder):
    """The advantages of a recipe's first rollout, and what they were made of: Batch after
    estimate_advantages."""
    module = apply_recipe(title, folder)
    batches = []
    real = module.estimate_advantages

    def estimate_advantages(batch, *arguments):
        metrics = real(batch, *arguments)
        batches.append(batch)
        return metrics

    module.estimate_advantages = estimate_advantages
    flags = flags | dict(iterations=1, batch_size=16) | flags_of_recipe(title)
    train(module, folder / "run", **flags)
    [batch] = batches
    return batch


def grouped_batch(title, flags, folder):
    """The same of a recipe that compares the answers to a prompt."""
    batch = first_batch(title, flags, folder)
    for group in range(4):
        prompts = set(batch.prompts[4 * group : 4 * group + 4])
        assert len(prompts) == 1, "four answers to a prompt"
    assert len(set(batch.prompts)) == 4
    return batch


def test_rloo_compares_an_answer_with_the_mean_of_the_three_others(flags, tmp_path):
    batch = grouped_batch("RLOO", flags, tmp_path)
    outcomes = batch.rewards.sum(1).tolist()
    raw = []
    for i, outcome in enumerate(outcomes):
        first = i // 4 * 4
        others = [outcomes[j] for j in range(first, first + 4) if j != i]
        raw.append(outcome - np.mean(others))
    expected = ppo.whiten(torch.tensor(raw)[:, None] * batch.mask, batch.mask)
    torch.testing.assert_close(batch.advantages, expected.float(), rtol=1e-4, atol=1e-4)


def test_grpo_divides_by_the_standard_deviation_of_a_prompts_scores(flags, tmp_path):
    batch = grouped_batch("GRPO", flags, tmp_path)
    [scores] = batch.scores.values()
    penalized = (scores - 1.0 * ~batch.finished).tolist()
    for i, score in enumerate(penalized):
        first = i // 4 * 4
        group = penalized[first : first + 4]
        advantage = (score - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
        n = int(batch.answer_lens[i])
        assert batch.advantages[i, :n].tolist() == pytest.approx([advantage] * n, abs=1e-4)
        assert (batch.advantages[i, n:] == 0).all()


def test_drgrpo_centers_scores_and_divides_by_a_constant(flags, tmp_path):
    batch = grouped_batch("Dr.GRPO", flags, tmp_path / "a")
    [scores] = batch.scores.values()
    penalized = (scores - 1.0 * ~batch.finished).tolist()
    for i, score in enumerate(penalized):
        first = i // 4 * 4
        advantage = score - np.mean(penalized[first : first + 4])
        expected = advantage * batch.mask[i].float()
        torch.testing.assert_close(batch.advantages[i], expected, rtol=0, atol=1e-4)

    def gradient_norm(name, recipe):
        one_step = dict(iterations=1, batch_size=16, minibatches=1, ppo_epochs=1)
        module = apply_recipe("Dr.GRPO", tmp_path / name, recipe)
        return train(module, tmp_path / name, **(flags | one_step), answers_per_prompt=4)[1]

    whole = recipes()["Dr.GRPO"]
    mean = gradient_norm("mean", whole[:-1])  # a mean over tokens, as PPO's
    drgrpo = gradient_norm("sum", whole)
    tokens = mean["length"] * 16
    expected = mean["actor_grad_norm"] * tokens / (16 * flags["max_new_tokens"])
    assert drgrpo["actor_grad_norm"] == pytest.approx(expected, rel=1e-3)


def test_reinforce_plus_plus_sums_the_rewards_from_a_token_on(flags, tmp_path):
    batch = first_batch("REINFORCE++", flags, tmp_path)
    to_go = torch.zeros_like(batch.rewards)
    for i, row in enumerate(batch.rewards.tolist()):
        for t in range(len(row)):
            to_go[i, t] = sum(row[t:])
    torch.testing.assert_close(batch.advantages, ppo.whiten(to_go, batch.mask))


def test_two_lambdas_are_one_for_the_critic_and_by_length_for_the_actor(flags, tmp_path):
    batch = first_batch("Two lambdas", flags, tmp_path)
    raw = torch.zeros_like(batch.rewards)
    for i, n in enumerate(batch.answer_lens.tolist()):
        rewards = batch.rewards[i].tolist()
        values = batch.values[i].tolist()[:n] + [0.0]
        errors = [rewards[t] + values[t + 1] - values[t] for t in range(n)]
        for t in range(n):
            assert batch.returns[i, t].item() == pytest.approx(sum(rewards[t:n]), abs=1e-4)
            raw[i, t] = sum((1 - 1 / n) ** (k - t) * errors[k] for k in range(t, n))
    expected = ppo.whiten(raw, batch.mask)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-3, atol=1e-3)


def clip_higher(ratio, advantage, logprob):
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.28))
    return min(loss, -3 * advantage) if advantage < 0 else loss


def cispo(ratio, advantage, logprob):
    return -min(ratio, 1.2) * advantage * logprob


@pytest.mark.parametrize("title, loss_of_token", [
    ("Clip-higher, dual clip", clip_higher), ("CISPO", cispo)])
def test_the_loss_of_a_recipe_is_that_of_a_loop_over_tokens(title, loss_of_token, tmp_path):
    module = apply_recipe(title, tmp_path)
    g = torch.Generator().manual_seed(5)
    old, change, advantages = (torch.randn(6, 9, generator=g) for _ in range(3))
    mask = torch.rand(6, 9, generator=g) < 0.7
    advantages = advantages * mask
    logprobs = (old + change).requires_grad_()
    losses = []
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[i, t].item() - old[i, t].item())
        losses.append(loss_of_token(ratio, advantages[i, t].item(), logprobs[i, t].item()))
    loss = module.actor_loss(logprobs, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    loss.backward()
    ratio = (logprobs - old).exp().detach()
    if title == "CISPO":  # the weight has no gradient, and no token is without one
        expected = -ratio.clamp(max=1.2) * advantages / mask.sum()
    else:
        above = (advantages > 0) & (ratio > 1.28)
        below = (advantages < 0) & ((ratio < 0.8) | (ratio > 3))
        expected = -ratio * advantages / mask.sum() * ~(above | below)
        assert (above & mask).any() and (below & (ratio > 3) & mask).any()
    torch.testing.assert_close(logprobs.grad, expected, rtol=1e-4, atol=1e-6)


def test_gspo_has_one_ratio_for_each_answer_and_answers_weigh_the_same(flags, tmp_path):
    batch = grouped_batch("GSPO", flags, tmp_path)
    reference = grouped_batch("GRPO", flags, tmp_path)
    torch.testing.assert_close(batch.advantages, reference.advantages)

    module = apply_recipe("GSPO", tmp_path)
    g = torch.Generator().manual_seed(5)
    old, change = (torch.randn(6, 9, generator=g) for _ in range(2))
    mask = torch.rand(6, 9, generator=g) < 0.7
    advantages = torch.randn(6, 1, generator=g) * mask  # the same for all tokens of an answer
    logprobs = old + change
    losses = []
    for i in range(6):
        tokens = mask[i].nonzero().flatten().tolist()
        ratio = math.exp(np.mean([change[i, t].item() for t in tokens]))
        advantage = advantages[i, tokens[0]].item()
        losses.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
    loss = module.actor_loss(logprobs, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_gspo_does_not_depend_on_micro_batches(flags, tmp_path):
    module = apply_recipe("GSPO", tmp_path)
    flags = flags | dict(iterations=1, batch_size=16, answers_per_prompt=4)
    rows = []
    for micro_batch in (0, 1):
        out = tmp_path / f"{micro_batch}"
        rows.append(train(module, out, **flags, micro_batch=micro_batch)[1])
    assert rows[0]["actor_grad_norm"] == pytest.approx(rows[1]["actor_grad_norm"], rel=1e-3)


def test_dynamic_sampling_leaves_out_prompts_whose_answers_all_score_the_same(flags, tmp_path):
    rules = tmp_path / "rules.py"
    rules.write_text("def rule(completions):\n    return [float('a' in c) for c in completions]\n")
    module = apply_recipe("Dynamic sampling", tmp_path)
    scored, used = [], []
    real_score, real_update = module.score, module.update

    def score(batch, *arguments):
        real_score(batch, *arguments)
        scored.append(batch)

    def update(batch, *arguments):
        used.append(batch)
        return real_update(batch, *arguments)

    module.score, module.update = score, update
    more = dict(reward=f"{rules}:rule", batch_size=16, answers_per_prompt=4)
    train(module, tmp_path / "run", **(flags | more))

    def groups(batch):
        [scores] = batch.scores.values()
        return list(zip(batch.prompts[::4], scores.view(-1, 4).tolist()))

    left_out = 0
    for all_of_them, batch in zip(scored, used, strict=True):
        told = [pair for pair in groups(all_of_them) if len(set(pair[1])) > 1]
        flat = [pair for pair in groups(all_of_them) if len(set(pair[1])) == 1]
        assert len(told) + len(flat) == 8
        assert groups(batch) == (told + flat)[:4]
        left_out += len(flat)
    assert left_out > 0, "else this shows nothing"


class Killed(Exception):
    pass


def test_the_adaptive_coefficient_follows_its_rule_and_a_resumed_run_knows_it(
        flags, tmp_path, monkeypatch):
    module = apply_recipe("Adaptive KL", tmp_path)
    flags = flags | dict(iterations=4)
    whole = train(module, tmp_path / "whole", **flags)
    coefficient = 0.05
    for row in whole[1:]:
        assert row["kl_coef"] == pytest.approx(coefficient)
        error = min(max(row["kl"] / 6 - 1, -0.2), 0.2)
        coefficient *= 1 + error * 8 / 10_000
    assert whole[-1]["kl_coef"] != 0.05

    real = training.Checkpoint.save

    def save(self, step, **state):
        real(self, step, **state)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.Checkpoint, "save", save)
        with pytest.raises(Killed):
            train(module, tmp_path / "parts", **flags)
    parts = train(module, tmp_path / "parts", **flags, resume=True)
    assert [r.get("kl_coef") for r in parts] == [r.get("kl_coef") for r in whole]
    assert [r.get("kl") for r in parts] == [r.get("kl") for r in whole]


def test_with_the_samplers_old_logprobs_the_numbers_are_nearly_those_of_the_trainers(
        flags, plain_run, tmp_path):
    module = apply_recipe("Old log-probabilities from the sampler", tmp_path)
    metrics = train(module, tmp_path / "run", **flags)
    for row, plain in zip(metrics[1:], plain_run[1:]):
        assert row["score"] == pytest.approx(plain["score"], abs=1e-4)
        assert row["actor_loss"] == pytest.approx(plain["actor_loss"], abs=1e-4)
        assert row["engine_gap_max"] == 0, "the sampler's are the old ones: there is no gap"
    single = train(module, tmp_path / "one", **(flags | dict(minibatches=1, ppo_epochs=1)))
    assert single[1]["ratio_max"] == pytest.approx(1, abs=1e-3)


def test_dropout_moves_the_ratio_from_one_before_the_first_step(flags, tmp_path):
    batch = first_batch("Dropout", flags | dict(ppo_epochs=1), tmp_path)
    ratio = batch.ratio[:8][batch.mask[:8]]  # of the first minibatch
    assert (ratio - 1).abs().max() > 0.01
    batch = first_batch("EOS is not an action", flags | dict(ppo_epochs=1), tmp_path / "two")
    assert (batch.ratio[:8][batch.mask[:8]] == 1).all(), "as without the mistake"


def test_eos_that_is_not_an_action_is_a_hole_in_the_mask(flags, tmp_path):
    batch = first_batch("EOS is not an action", flags, tmp_path)
    for i in range(len(batch)):
        A = int(batch.answer_lens[i])
        assert batch.mask[i, : A - 1].all()
        assert bool(batch.mask[i, A - 1]) != bool(batch.finished[i])


def test_log_probabilities_without_the_temperature_leave_a_gap_to_the_sampler(flags, tmp_path):
    batch = first_batch("Log-probabilities without the temperature", flags, tmp_path)
    right = first_batch("Advantages as they are", flags | dict(temperature=0.7), tmp_path / "two")
    assert torch.equal(batch.tokens, right.tokens)
    assert torch.equal(batch.sample_logprobs, right.sample_logprobs)
    assert (right.old_logprobs - right.sample_logprobs)[right.mask].abs().max() < 1e-4
    assert (batch.old_logprobs - batch.sample_logprobs)[batch.mask].abs().mean() > 0.1


def test_the_calculator_of_the_recipes_calls_and_is_called(chain, tmp_path):
    [text] = re.findall(r"```python\n(# calculator\.py\n.*?)```", RECIPES, re.S)
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) <= 25
    path = tmp_path / "calculator.py"
    path.write_text(text.replace("20_000", "300"))
    sums, alone, calculate, correct = (
        tasks.import_function(f"{path}:{name}", "")[0]
        for name in ("sums", "alone", "calculate", "correct"))
    row, without = next(sums()), next(alone())
    a, b = map(int, re.findall(r"\d+", row["prompt"]))
    assert row == {"prompt": f"{a} + {b} =", "response": f"[{a}+{b}]", "sum": str(a + b)}
    assert without["response"] == row["sum"]
    assert calculate(row, row["response"]) == row["sum"]
    assert calculate(row, row["sum"]) is None and calculate(row, f"[{a}+{b}") is None
    answers = {f" [1+2]{row['sum']}]": 1, f" {row['sum']}": 1, f"[1+2]{a}": 0, f"1{row['sum']}": 0}
    assert correct(list(answers), [row["sum"]] * 4) == list(answers.values())

    flags = dict(STEPS, data=f"{path}:sums", max_len=64)
    train(sft, tmp_path / "calls", epochs=0.05, **flags)
    more = dict(PPO_STEPS, model=str(tmp_path / "calls"), reward=chain["reward"][0], iterations=1)
    metrics = train(ppo, tmp_path / "p", **(flags | more), respond=f"{path}:calculate")
    assert len(metrics) == 2


# -----------------------------------------------------------------------------
# users' mistakes: see test_mistakes.py


def test_a_batch_that_the_ranks_cannot_share_gets_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(utils.UserError, match="the 8 rows .* cannot be divided among 3 ranks"):
        utils.micro_batch_size(8, 0)


# -----------------------------------------------------------------------------
# experiments


def test_an_experiment_runs_once_and_its_rows_are_kept(chain, toy_file, tmp_path, monkeypatch):
    """The real scripts, on small models; the second time nothing is run."""

    def one_variant():
        def measure(lab):
            rows = lab.run(
                "run", "ppo.py", [experiments.start_from(chain["ppo"][0]),
                experiments.ONLY_ROLLOUT], model=chain["sft"][0], reward=chain["reward"][0],
                data=toy_file, held_out=0.2, batch_size=8, max_len=64, max_new_tokens=8,
                iterations=1, ema=0)
            return {"kl": rows[0]["eval_kl"], "cpu_seconds": rows[-1]["cpu_seconds"]}
        return {"variant": measure}

    monkeypatch.setattr(experiments, "EXPERIMENTS", {"one": one_variant})
    cfg = experiments.Config(
        seeds="3", out=str(tmp_path / "runs"), results=str(tmp_path))
    experiments.main(cfg)
    [row] = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert (row["variant"], row["seed"]) == ("variant", 3)
    assert row["kl"] != 0, "the actor starts from another model than the reference"
    assert row["cpu_seconds"] > 1
    samples = (tmp_path / "runs/3/run/samples.jsonl").read_text().splitlines()
    assert len(samples) == 8
    same = weights_of(tmp_path / "runs/3/run") == weights_of(Path(chain["ppo"][0]))
    assert same, "only a rollout: nothing is trained"

    def no_second_run(*arguments):
        raise AssertionError("a finished run is not repeated")

    monkeypatch.setattr(experiments, "run_alone", no_second_run)
    experiments.main(cfg)  # its row is in one.json
    (tmp_path / "one.json").unlink()
    experiments.main(cfg)  # its run is in the folder
    assert json.loads((tmp_path / "one.json").read_text())["rows"] == [row]


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_an_experiment_that_fails_leaves_the_others_their_rows(tmp_path, monkeypatch, capsys):
    def fails(lab):
        raise utils.UserError("no model")

    variants = {"bad": fails, "good": lambda lab: {"x": lab.seed}}
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"two": lambda: variants})
    cfg = experiments.Config(seeds="1,2", out=str(tmp_path / "runs"), results=str(tmp_path))
    with pytest.raises(utils.UserError, match="2 of 4 measurements did not finish"):
        experiments.main(cfg)
    assert "error: bad, seed 1: no model" in capsys.readouterr().out
    rows = json.loads((tmp_path / "two.json").read_text())["rows"]
    assert rows == [{"variant": "good", "seed": 1, "x": 1}, {"variant": "good", "seed": 2, "x": 2}]


def test_an_unknown_experiment_is_named():
    with pytest.raises(utils.UserError, match="--names sweep: there are methods, break"):
        experiments.main(experiments.Config(names="sweep"))


@pytest.mark.parametrize("flags, message", [
    (dict(seeds="1,x"), "--seeds 1,x: must be numbers"),
    (dict(seeds=""), "--seeds : must be numbers"),
    (dict(processes=0), "--processes 0: must be at least 1"),
])
def test_wrong_flags_of_experiments_get_one_sentence(flags, message):
    with pytest.raises(utils.UserError, match=message):
        experiments.Config(**flags)


def test_results_that_cannot_be_written_get_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    cfg = experiments.Config(names="gap", results=str(tmp_path / "file/results"))
    with pytest.raises(utils.UserError, match="gap.json cannot be written: .*; name another"):
        experiments.Results("gap", cfg).add("fp32", 1, {"gap_mean": 0.0})


def test_rows_that_experiments_hold_out_are_those_that_the_scripts_hold_out(tmp_path):
    rows = experiments.held_out_rows("toy")
    tokenizer = models.load_tokenizer("tiny")
    _, held_out = data.load(
        "toy", "ppo", "", 0.05, data.DEFAULT_TEMPLATE, tokenizer, 64)
    prompts = {tokenizer.decode(held_out.prompt(i)) for i in range(len(held_out))}
    assert prompts == {data.DEFAULT_TEMPLATE.format(prompt=row["prompt"]) for row in rows}


def test_the_best_of_a_group_is_finished_and_has_the_highest_score():
    samples = [
        {"eos": False, "score": 3.0}, {"eos": True, "score": 1.0}, {"eos": True, "score": 2.0},
        {"eos": True, "score": 0.0}, {"eos": True, "score": -1.0}, {"eos": False, "score": 9.0}]
    groups = experiments.groups_of(3, samples)
    assert [max(group, key=experiments.merit)["score"] for group in groups] == [2.0, 0.0]
    prompt = data.DEFAULT_TEMPLATE.format(prompt="sort ba")
    assert experiments.without_template(prompt) == "sort ba"
