"""Tests of tools/look.py, on the files that ppo.py would write."""
import json
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import ppo
from tools import look

TOKENS = [" a", "b\n", "</script><b>", "c", "<eos>"]


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "kl": 0.'  # cut off
    (folder / f"{name}.jsonl").write_text(text)


@pytest.fixture
def run(tmp_path):
    """A folder with four answers by ppo.py's own formulas; the second token was not sampled."""
    mask = torch.tensor([[1, 0, 1, 1, 1]] * 4).bool()
    logp, ref, values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    total = torch.tensor([0.5, -1.0, 2.0, 0.1])
    rewards = ppo.token_rewards(total, logp, ref, mask, 0.07, 5.0)
    advantages, returns = ppo.gae(values, rewards, mask, ppo.GAMMA, ppo.LAM)
    batch = SimpleNamespace(
        mask=mask, old_logprobs=logp, ref_logprobs=ref, values=values, token_rewards=rewards,
        advantages=ppo.whiten(advantages, mask), returns=returns, total=total,
        columns={"prompts": ["Human: <i>x"] * 4, "completion_ids": [list(range(5))] * 4})
    rows = ppo.token_samples(batch, SimpleNamespace(decode=lambda ids: TOKENS[ids[0]]))
    write(tmp_path / "ppo", "tokens", [{"step": 1, **row} for row in rows])
    metrics = {"kl": 0.1, "eval_kl": 0.1, "advantage_mean": advantages[mask].mean().item(),
               "advantage_std": advantages[mask].std(correction=0).item()}
    write(tmp_path / "ppo", "metrics", [{"step": step, **metrics} for step in (1, 2, 3)])
    write(tmp_path / "ppo", "samples", [
        dict(zip(("step", "prompt", "answer"), row)) for row in (
            (1, "p", "old<b>"), (1, "q", "same"), (1, "r", "r1"), (3, "q", "same"),
            (3, "p", "new"), (2, "r", "r2"))])
    (tmp_path / "ppo" / "run.json").write_text('{"config": {"kl_coef": 0.07}}')
    return tmp_path / "ppo"


def arithmetic(page):
    """[(name, what the numbers before its last = come to, the number behind it)]"""
    found = []
    for line in re.findall(r"<div>([^<]* = [^<]*)</div>", page):
        name, *_, numbers, result = line.replace("−", "-").split(" = ")
        numbers = numbers.replace("·", "*").replace(", the score as PPO sees it,", "")
        found.append((name, eval(numbers), float(result)))
    return found


def test_every_sum_of_every_sampled_token_is_written_out_and_right(run):
    sums = arithmetic(look.page([run]))
    names = ("reward", "δ", "A", "return", "advantage")
    assert Counter(name for name, _, _ in sums) == dict.fromkeys(names, 4 * 4)
    for name, left, right in sums:
        assert left == pytest.approx(right, abs=3e-3), name


def test_a_sum_that_does_not_hold_in_a_changed_ppo_py_is_left_out(run):
    rows = look.read(run / "tokens.jsonl")
    for row in rows:
        row["returns"] = [x + 9 for x in row["returns"]]
        row["token_rewards"][2] += 1  # a reward in the middle
        del row["advantages"]
    write(run, "tokens", rows)
    sums = arithmetic(look.page([run]))
    assert {name for name, _, _ in sums} == {"reward"} and len(sums) == 3 * 4


def test_what_models_and_people_wrote_is_never_markup(run):
    page = look.page([run])
    for text in ("<i>x", "old<b>", "</script><b>"):
        assert text not in page and look.escape(text) in page
    assert page.count("<script>") == page.count("</script>") == 1 and "://" not in page


def test_answers_that_changed_come_first_those_furthest_apart(run):
    page = look.page([run])
    assert "2 prompts that came twice" in page and ">same<" not in page
    assert page.index(">new<") < page.index(">r2<")
    write(run, "samples", [{"step": s, "prompt": f"p{s}", "answer": f"to {s}"} for s in (1, 2, 3)])
    page = look.page([run])
    assert "p1 | p3" in page and ">to 1<" in page and ">to 2<" not in page


def test_runs_of_a_step_share_their_pictures_whatever_their_names(run, tmp_path):
    write(tmp_path / "a", "metrics", [{"step": 1, "loss": 1.0, "x": float("nan")}])
    write(tmp_path / "b", "metrics", [{"step": s, "accuracy": 0.5, "loss": 2.0} for s in (1, 2)])
    write(tmp_path / "sft", "metrics", [{"step": s, "eval_kl": 0.0, "kl": s / 7} for s in (1, 2)])
    page = look.page([run, tmp_path / "a", tmp_path / "b", tmp_path / "sft"])
    assert re.findall("<h2>(sft|reward|ppo)</h2>", page) == ["sft", "reward", "ppo"]
    figures = re.findall(r"<figure><figcaption>(\w+) .*?</figure>", page)
    assert figures.count("kl") == 1 and figures.count("loss") == 2 and "x" not in figures
    [kl] = re.findall(r"<figcaption>kl .*?</figure>", page)
    assert kl.count("<polyline") == 2 and "0.1, " not in kl.split("<svg")[1]
    for x, y, label in re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*)', page):
        assert 30 < float(x) <= 340 and 0 < float(y) <= 150 and len(label) <= 7, "it is cut"


def test_the_command_writes_the_page_and_refuses_what_is_no_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["look", str(run)])
    look.main()
    assert (run / "look.html").read_text() == look.page([run])
    monkeypatch.setattr(sys, "argv", ["look", str(tmp_path)])
    pytest.raises(SystemExit, look.main)
