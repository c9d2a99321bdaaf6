"""What each recipe computes is that of a loop over tokens, and each trains."""
import importlib.util
import itertools
import math
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import data
import hybrid_engine
import ppo
import utils
from test_all import COMMON, HERE, long, model_of, plain_logprobs, train, write_rows
from test_all import chain, small, tok, toy_file  # noqa: F401 (fixtures)

CORE = [f"{name}.py" for name in "sft reward ppo data utils hybrid_engine kernels".split()]
RECIPES = {path.stem: path for path in sorted((HERE / "recipes").glob("*.diff"))}


def git(*args, cwd=HERE):
    return subprocess.run(["git", *map(str, args)], cwd=cwd).returncode


def user(name):
    return data.load_function(str(HERE / "recipes" / name))


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """recipe("grpo") is the module ppo with grpo.diff applied."""
    if git("diff", "--quiet", "HEAD", "--", *CORE):
        pytest.skip("the seven files differ from HEAD: do the recipes still apply?")
    modules = {}

    def get(name):
        if name not in modules:
            path = tmp_path_factory.mktemp("recipe") / "ppo.py"
            path.write_text((HERE / "ppo.py").read_text())
            assert git("apply", *[RECIPES[part] for part in name.split()], cwd=path.parent) == 0
            spec = importlib.util.spec_from_file_location(f"ppo_{len(modules)}", path)
            modules[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
        return modules[name]

    return get


def batch_with_holes(module, B=12, A=7):
    """A scored batch made by hand, four answers to each prompt, with holes in the mask."""
    g = torch.Generator().manual_seed(7)
    answer_lens = torch.randint(3, A + 1, (B,), generator=g)
    mask = (torch.rand(B, A, generator=g) < 0.8) & (torch.arange(A) < answer_lens[:, None])
    mask[:, 0] = True
    ids = [[2, 2, 1, 1, 1, 2, 2][:n] for n in answer_lens]
    old, ref, sample, values = [torch.randn(B, A, generator=g) * mask for _ in range(4)]
    return module.Batch(
        tokens=torch.zeros(B, A + 2).long(), prompt_lens=torch.full((B,), 2), mask=mask,
        answer_lens=answer_lens, finished=torch.rand(B, generator=g) < 0.7, sample_logprobs=sample,
        old_logprobs=old, ref_logprobs=ref, values=values, total=torch.zeros(B), kl=torch.zeros(B),
        scores={"rule": torch.randn(B, generator=g)}, columns={"completion_ids": ids})


def seen_of_row(name, batch, i):
    """(penalized score, rewards, values) of a row, the latter two at its sampled tokens."""
    columns = batch.mask[i].nonzero().flatten().tolist()
    score = (batch.scores["rule"][i].item() - 0.5) / 2.0 - (not batch.finished[i])
    if name == "length-penalty":
        score -= 0.05 * batch.answer_lens[i].item()
    kl_coef = 0.0 if name == "kl-in-loss" else 0.3
    rewards = (-kl_coef * (batch.old_logprobs - batch.ref_logprobs))[i, columns].tolist()
    rewards[-1] += score
    if name == "process-reward":
        rewards = [r - (t in (1, 3, 4, 6)) for r, t in zip(rewards, columns)]
    return score, rewards, batch.values[i, columns].tolist()


def advantages_of_row(name, rows, i):
    """What a recipe gives the sampled tokens of a row, before whitening."""
    score, rewards, values = rows[i]
    n = len(rewards)
    group = range(i // 4 * 4, i // 4 * 4 + 4)
    if name == "rloo":
        return [sum(rewards) - np.mean([sum(rows[j][1]) for j in group if j != i])] * n
    if name in ("grpo", "drgrpo", "gspo"):
        scores = [rows[j][0] for j in group]
        std = 1.0 if name == "drgrpo" else np.std(scores, ddof=1) + 1e-4
        return [(score - np.mean(scores)) / std] * n
    lam = 1 - 1 / n if name in ("two-lambdas", "sao") else 0.95
    errors = [r + after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0])]
    if name == "reinforce++":
        lam, errors = 1.0, rewards
    return [sum(lam ** (m - k) * errors[m] for m in range(k, n)) for k in range(n)]


@pytest.mark.parametrize("name", [
    "rloo", "grpo", "drgrpo", "gspo", "sao", "reinforce++", "two-lambdas", "kl-in-loss",
    "length-penalty", "process-reward", "truncated-is", "break-whitening"])
def test_the_advantages_of_a_recipe_are_those_of_a_loop_over_tokens(name, recipe):
    module = recipe(name)
    batch = batch_with_holes(module)
    if name == "process-reward":
        batch.process = module.process_rewards(user("repetition.py:repetition"), batch)
    scorers = [module.Scorer("rule", "rule", 1.0, function=len, mean=0.5, std=2.0)]
    cfg = module.Config(answers_per_prompt=4, kl_coef=0.3)
    module.estimate_advantages(batch, scorers, cfg)
    rows = [seen_of_row(name, batch, i) for i in range(len(batch.mask))]

    def second_version(name):
        flat = sum([advantages_of_row(name, rows, i) for i in range(len(rows))], [])
        return torch.zeros(batch.mask.shape).masked_scatter(batch.mask, torch.tensor(flat).float())

    if name in ("two-lambdas", "sao"):  # the critic's lambda is 1
        to_go = second_version("reinforce++")
        torch.testing.assert_close(batch.returns, to_go, rtol=1e-4, atol=1e-4)
    expected = second_version(name)
    if name not in ("grpo", "drgrpo", "gspo", "break-whitening"):
        inside = expected[batch.mask]
        expected = (expected - inside.mean()) / inside.std(correction=0) * batch.mask
    if name == "truncated-is":
        expected *= (batch.old_logprobs - batch.sample_logprobs).exp().clamp(max=2)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def losses_of_answer(name, log_ratio, advantages, logprobs):
    """What a recipe's loss is a mean of."""
    ratio = log_ratio.exp()
    if name == "cispo":
        weights = [min(r.item(), 1.2) for r in ratio]
        return [-w * a * x for w, a, x in zip(weights, advantages, logprobs)]
    if name == "sao":
        return [-r * a * float(0.2 < r < 4) for r, a in zip(ratio, advantages)]
    if name == "gspo":
        ratio = [log_ratio.mean().exp()]
    upper = 1.28 if name == "clip-higher" else 1.2
    losses = [max(-a * r, -a * min(max(r, 0.8), upper)) for r, a in zip(ratio, advantages)]
    if name == "clip-higher":
        losses = [min(x, -3 * a) if a < 0 else x for x, a in zip(losses, advantages)]
    return losses


@pytest.mark.parametrize("name", ["clip-higher", "cispo", "gspo", "sao"])
def test_the_loss_of_a_recipe_is_that_of_a_loop_over_tokens(name, recipe):
    g = torch.Generator().manual_seed(5)
    old, change, advantages = (torch.randn(9, 9, generator=g).double() for _ in range(3))
    mask = torch.rand(9, 9, generator=g) < 0.7
    if name == "gspo":
        advantages = advantages[:, :1].expand(9, 9)
    logprobs = (old + 1.3 * change).requires_grad_()
    losses = []
    for i, inside in enumerate(mask):
        x = logprobs[i][inside]
        losses += losses_of_answer(name, x - old[i][inside], advantages[i][inside], x)
    expected = torch.stack(losses).mean()
    loss = recipe(name).actor_loss(logprobs, old, advantages * mask, mask, 0.2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(x, logprobs)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_a_tools_words_are_holes_and_the_policy_goes_on_behind_them(recipe, tok, tmp_path):
    utils.init_distributed(0)
    rows = SimpleNamespace(prompts=[np.array([65, 66, 67]), np.array([68, 69])],
                           fields=[{"n": 2}, {"n": 3}], columns=lambda indices: {})
    tool = "def reply(answer, n):\n    return None if len(answer) % n == 0 else 'ABC'[:n]\n"
    (tmp_path / "tool.py").write_text(tool)
    lm = model_of("llama")
    sampler = hybrid_engine.HybridEngine(lm)
    module = recipe("tool-use")
    cfg = module.Config(max_new_tokens=6, respond=f"{tmp_path}/tool.py:reply")
    ends = list(range(0, 97, 3))  # so that a third of the tokens end an answer
    seeds = [hash((3, i)) for i in range(12)]
    batch = module.rollout(sampler, rows, np.array([0, 1] * 6), seeds, cfg, tok, ends)
    replies = 0
    for i, seed in enumerate(seeds):  # the second version: one row alone, turn after turn
        prompt, n = rows.prompts[i % 2].tolist(), rows.fields[i % 2]["n"]
        answer, sampled = [], []
        for turn in range(3):
            out = sampler.generate([prompt + answer], 6, eos_token_id=ends, seed=[seed])
            answer += out.tokens[0, len(prompt) + len(answer) :].tolist()
            sampled += [True] * (len(answer) - len(sampled))
            if turn == 2 or answer[-1] not in ends or len(tok.decode(answer[:-1])) % n == 0:
                break
            answer += tok("ABC"[:n])["input_ids"]
            sampled += [False] * n
            replies += 1
        N = len(answer)
        assert batch.tokens[i, : len(prompt) + N].tolist() == prompt + answer
        assert batch.mask[i].tolist() == sampled + [False] * (batch.mask.size(1) - N)
        expected = plain_logprobs(lm, prompt + answer, len(prompt)) * torch.tensor(sampled)
        assert batch.sample_logprobs[i, :N].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert replies > 3


@long
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_changes_what_is_learned(name, recipe, chain, toy_file, tmp_path):
    module = recipe(name)
    flags = dict(COMMON, data=toy_file, model=chain["sft"][0], reward=chain["reward"][0],
                 iterations=2, minibatches=2, max_new_tokens=8)
    [words] = re.findall(r"^Flags: (.*)", RECIPES[name].read_text(), re.M) or [""]
    for flag, value in re.findall(r"--(\S+) (\S+)", words):
        flags[flag.replace("-", "_")] = float(value) if "." in value else int(value)
    plain = train(ppo, tmp_path / "plain", **flags)
    module.critic_loss = mock.Mock(side_effect=ppo.critic_loss)
    metrics = train(module, tmp_path / "run", **flags)
    assert all(math.isfinite(x) for row in metrics for x in row.values())
    has_critic = "critic = None" not in RECIPES[name].read_text()
    assert module.critic_loss.call_count == 4 * has_critic * (2 if name == "sao" else 1)
    assert ("critic_loss" in metrics[1]) == ("explained_variance" in metrics[1]) == has_critic
    # in fp32, without a ratio of 1.2 so early; and no answer to toy has a call
    same = ("sampler-logprobs", "truncated-is", "clip-higher", "tool-use")
    what = "critic_loss" if name in ("sao", "adaptive-kl") else "eval_kl"
    assert metrics[2][what] != plain[2][what] or name in same
    assert metrics[2][what] == pytest.approx(plain[2][what], rel=1e-4) or name not in same
    if name == "sao":  # in its warm-up the actor is plain PPO's
        assert metrics[1]["entropy"] == pytest.approx(plain[1]["entropy"])
    if name == "dynamic-sampling":
        assert metrics[1]["unjudged"] == flags["batch_size"]
    if name == "adaptive-kl":
        assert metrics[1]["kl_coef"] == 0.05 > metrics[2]["kl_coef"]


def judge(function, answers, *fields):
    return function(answers, *[[field] * len(answers) for field in fields])


def test_countdown_judges_answers_exactly_and_runs_nothing():
    rows = list(itertools.islice(user("countdown.py:countdown")(), 100))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    correct = user("countdown.py:correct")
    assert set(correct(columns["chosen"], **columns)) == {1.0}
    assert set(correct(columns["rejected"], **columns)) == {0.0}
    assert 40 <= sum(correct(columns["response"], **columns)) <= 60
    right = ["(1+2)*8", " ( 1 + 2 ) * 8 = 24", "8*(1+2)\n", "8*(1+2)" + " " * 999]
    wrong = ["8*2+8", "(1+2)*8=23", "(1+2)*8=", "24", "", "=24", "8*(1+2", "8**1+2", "48//2", "1/0",
             "9**9**9**9", "\u0668*(1+2)", "(" * 90 + "8" + ")" * 9, "8" * 9999, "8*(1+2.0)"]
    assert judge(correct, right, [8, 2, 1], 24) == [1.0] * len(right)
    assert judge(correct, wrong, [8, 2, 1], 24) == [0.0] * len(wrong)
    assert judge(correct, ["8/(3-8/3)"], [8, 8, 3, 3], 24) == [1.0]
    assert judge(correct, ["1"], None, None) == [None]


def test_gsm8k_compares_the_last_numbers():
    correct = user("gsm8k.py:correct")
    right = ["#### 1,234", "It is 7, no, 1234.", "7, so $1,234", "1234.0", "#### 1234 of 5",
             "#### none, 1234", "1 and 1234 ####", "1244-10=1234", "2468/2-1234", "- 1234"]
    wrong = ["It is 1234, no, 7", "9" * 9000, "1234 or " + "9" * 9000, "-1234", "", "none", "12 34"]
    solution = "He has <<2*617=1234>>1234.\n#### 1234"
    assert judge(correct, right, solution) == [1.0] * len(right)
    assert judge(correct, wrong, solution) == [0.0] * len(wrong)
    assert correct(["so 42", "-0.5", "#### .5", "1"], [42, -0.5, 0.5, None]) == [1, 1, 1, None]


def test_user_files_read_rows_and_the_calculator_calculates(monkeypatch, tmp_path):
    def rows_of(name, constant, *rows):
        generator = user(name)
        path = write_rows(tmp_path / "rows.jsonl", rows)
        monkeypatch.setitem(generator.__globals__, constant, path)
        return list(generator())

    answer = "2*3=<<2*3=6>>6\n#### 6"
    [row] = rows_of("gsm8k.py:gsm8k", "SOURCE", {"question": "?", "answer": answer})
    assert row == {"prompt": "?", "response": "2*3=6\n#### 6", "solution": answer}
    row = {"history": "?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 3.0}
    rows = rows_of("shp.py:shp", "SOURCE", row, row | {"labels": 0}, row | {"score_ratio": 1.5})
    assert [row["chosen"] + row["rejected"] for row in rows] == ["ab", "ba"]
    row = {"question": {"full_text": "?"}, "answer_0": "a [1, 2].", "answer_1": "b[3]"}
    rows = [row | {"score_0": -x, "score_1": x} for x in (0.0, 1.0, -1.0)]
    rows = rows_of("webgpt.py:webgpt", "FILE", *rows)
    assert [row["response"] for row in rows] == ["a.", "b", "a."]
    assert [data.as_example(row).ranks for row in rows] == [[1, 1], [1, 2], [1, 2]]

    row = next(user("calculator.py:sums")())
    calculate = user("calculator.py:calculate")
    assert calculate(row["response"], **row) == row["sum"] == str(eval(row["prompt"][:-1]))
    assert calculate(row["sum"]) is None and calculate(row["response"][:-1]) is None
    answers = [f" [1+2]<eos>{row['sum']}", f" {row['sum']}", "[1+2]12", f"1{row['sum']}"]
    assert judge(user("calculator.py:correct"), answers, row["sum"]) == [1, 1, 0, 0]
