"""The specification of steps 2 and 3: the losses, the formulas of PPO, the record of a rollout,
what the scripts do with them, and what they log. Each formula has a naive second version here, in
plain loops over one row, and each script has one in float64.

    pytest test_ppo.py -k gae           # one part
"""
import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

from testing import (  # before torch: it sets environment variables
    TEMPLATE, model_of, ragged, ranks, train, write_rows)

import numpy as np
import pytest
import torch

import data
import models
import ppo
import reward
import sft
import tasks
import training
import utils
from hybrid_engine import Rollout
from models import RewardModel

# What all runs below have in common: 240 rows, a few steps of 8 rows.
STEPS = dict(held_out=0.2, batch_size=8, max_len=64)
PPO_STEPS = dict(STEPS, iterations=3, minibatches=2, ppo_epochs=2, max_new_tokens=8)

# -----------------------------------------------------------------------------
# step 2


def test_the_pairwise_loss_is_its_formula_and_is_finite_at_extreme_margins():
    chosen = torch.tensor([1.0, -2.0])
    rejected = torch.tensor([0.5, 1.0])
    losses = []
    for c, r in zip(chosen.tolist(), rejected.tolist()):
        losses.append(math.log(1 + math.exp(-(c - r))))
    assert abs(reward.pairwise_loss(chosen, rejected).item() - np.mean(losses)) < 1e-6

    extreme = reward.pairwise_loss(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert torch.isfinite(extreme), "margins of any size"


def test_pairs_get_the_same_scores_in_one_forward_or_in_four(toy_file, tok):
    rows, _ = data.load(toy_file, "reward", "", 0.2, TEMPLATE, tok, 512)
    model = RewardModel.from_lm("tiny", torch.float32)
    one_by_one = []
    with torch.no_grad():
        for i in range(9):
            for which in ("chosen", "rejected"):
                tokens, lengths = data.pad([rows.prompt(i) + rows.answer(i, which)])
                one_by_one.append(model.score(tokens, lengths).item())
        one, _ = reward.answer_scores(model, rows, range(9), 1, "cpu")
        four, slots = reward.answer_scores(model, rows, range(9), 4, "cpu")
    torch.testing.assert_close(one, torch.tensor(one_by_one).view(9, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-5)
    real_tokens = 0
    for i in range(9):
        real_tokens += 2 * len(rows.prompt(i))
        real_tokens += len(rows.answer(i, "chosen")) + len(rows.answer(i, "rejected"))
    assert real_tokens <= slots < 1.3 * real_tokens, "the padding is counted too"


RANKS = [  # of the answers of a row, best first; 0: there is none
    [1, 2, 0, 0, 0],
    [1, 2, 3, 4, 5],
    [1, 1, 2, 0, 0],
    [1, 2, 2, 3, 3],
    [1, 1, 1, 1, 2],
]


def pairs_by_hand(scores, ranks):
    """Counts of a row's pairs of answers, and the margins of those of which one is better."""
    counts = dict.fromkeys(("agree", "oppose", "tied_ranks", "tied_scores", "all"), 0)
    margins = []
    answers = [k for k, rank in enumerate(ranks) if rank]
    for a, b in itertools.combinations(answers, 2):
        counts["all"] += 1
        counts["tied_ranks"] += ranks[a] == ranks[b]
        counts["tied_scores"] += scores[a] == scores[b]
        if ranks[a] != ranks[b]:
            better, worse = (a, b) if ranks[a] < ranks[b] else (b, a)
            margins.append(scores[better] - scores[worse])
            counts["agree"] += scores[better] > scores[worse]
            counts["oppose"] += scores[better] < scores[worse]
    return counts, margins


def tau_by_hand(scores, ranks):
    """Kendall's tau-b of one row (Kendall 1945)."""
    counts, _ = pairs_by_hand(scores, ranks)
    untied_ranks = counts["all"] - counts["tied_ranks"]
    untied_scores = counts["all"] - counts["tied_scores"]
    if untied_scores == 0:
        return 0.0
    return (counts["agree"] - counts["oppose"]) / math.sqrt(untied_ranks * untied_scores)


@pytest.mark.parametrize("ties", [False, True])
def test_the_loss_of_a_ranking_is_a_mean_over_its_comparisons(ties):
    ranks = torch.tensor(RANKS)
    g = torch.Generator().manual_seed(3)
    scores = torch.randn(ranks.shape, generator=g, dtype=torch.float64) * 2
    if ties:
        scores = scores.round()
        scores[3] = 1.0
    scores[ranks == 0] = 0
    losses = []
    accuracies = []
    taus = []
    for row, row_ranks in zip(scores.tolist(), RANKS):
        counts, margins = pairs_by_hand(row, row_ranks)
        losses.append(np.mean([math.log(1 + math.exp(-margin)) for margin in margins]))
        accuracies.append(counts["agree"] / len(margins))
        taus.append(tau_by_hand(row, row_ranks))
    better, worse, weights = reward.comparisons(scores, ranks)
    assert len(better) == 1 + 10 + 2 + 8 + 4, "a tie is no comparison"
    loss = reward.pairwise_loss(better, worse, weights).item()
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    accuracy = reward.weighted_mean(better > worse, weights).item()
    assert accuracy == pytest.approx(np.mean(accuracies), rel=1e-6)
    tau = reward.kendall_tau(scores, ranks)
    assert tau.tolist() == pytest.approx(taus, rel=1e-6)
    if not ties:  # in neither scores nor ranks
        assert tau[:2].tolist() == pytest.approx([2 * a - 1 for a in accuracies[:2]], rel=1e-6)


def test_kendalls_tau_of_known_rankings():
    ranks = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 0], [1, 2, 3, 0]])
    scores = torch.tensor(
        [[9.0, 5, 2, 1], [1, 2, 3, 4], [4, 3, 1, 2], [3, 2, 1, 0], [7, 7, 7, 0]])
    # Five of six agree and one does not; two agree, and the ranks tie one of three; no order.
    assert reward.kendall_tau(scores, ranks).tolist() == pytest.approx(
        [1, -1, 4 / 6, 2 / math.sqrt(2 * 3), 0])


# -----------------------------------------------------------------------------
# step 3: the formulas. Each naive version takes one row, without padding, as a list of floats; a
# row with holes must give what the row without them gives.

WHOLE_ROWS = [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 1, 0],
    [1, 1, 0, 0, 0, 0, 0],
]
ROWS_WITH_HOLES = [
    [1, 1, 0, 0, 1, 1, 1],  # a tool's output between two turns
    [1, 0, 1, 0, 1, 0, 1],
    [0, 0, 1, 1, 0, 0, 0],  # a forced beginning
    [1, 1, 1, 1, 0, 0, 0],
    [0, 1, 0, 0, 0, 1, 0],  # the last token is not the policy's
]
both_masks = pytest.mark.parametrize("rows", [WHOLE_ROWS, ROWS_WITH_HOLES], ids=["whole", "holes"])


def random_batch(rows, count=4):
    """The mask of these rows, and some random tensors (B, A), which are not 0 outside of it."""
    mask = torch.tensor(rows, dtype=torch.bool)
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(mask.shape, generator=g, dtype=torch.float64) for _ in range(count)]
    return mask, tensors


def sampled(x, mask, row):
    """A row's values at sampled tokens, as a list of floats."""
    return x[row][mask[row]].tolist()


def naive_gae(values, rewards, gamma, lam):
    """Advantages of one row: the discounted sum of all later errors of the value."""
    n = len(values)
    advantages = []
    for t in range(n):
        total = 0.0
        for k in range(t, n):
            next_value = values[k + 1] if k + 1 < n else 0.0
            error = rewards[k] + gamma * next_value - values[k]
            total += (gamma * lam) ** (k - t) * error
        advantages.append(total)
    return advantages


@both_masks
def test_gae_is_the_sum_of_discounted_errors_from_sampled_token_to_sampled_token(rows):
    mask, (values, rewards, *_) = random_batch(rows)
    advantages, returns = ppo.gae(values, rewards, mask, 0.9, 0.8)
    for b in range(len(mask)):
        row_values = sampled(values, mask, b)
        expected = naive_gae(row_values, sampled(rewards, mask, b), 0.9, 0.8)
        assert sampled(advantages, mask, b) == pytest.approx(expected, abs=1e-9)
        expected_returns = [a + v for a, v in zip(expected, row_values)]
        assert sampled(returns, mask, b) == pytest.approx(expected_returns, abs=1e-9)
    assert (advantages[~mask] == 0).all(), "nothing where the policy sampled nothing"
    assert (returns[~mask] == 0).all()


@both_masks
def test_with_gamma_and_lambda_1_a_return_is_the_sum_of_the_rewards_to_come(rows):
    mask, (values, rewards, *_) = random_batch(rows)
    _, returns = ppo.gae(values, rewards, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_come)


@both_masks
def test_gae_does_not_read_what_stands_outside_of_the_mask(rows):
    mask, (values, rewards, *_) = random_batch(rows)
    advantages, returns = ppo.gae(values, rewards, mask, 0.9, 0.8)
    more = ppo.gae(values + 3 * ~mask, rewards - 5 * ~mask, mask, 0.9, 0.8)
    assert torch.equal(more[0], advantages)
    assert torch.equal(more[1], returns)


def test_rewards_are_kl_at_every_token_and_the_clipped_score_at_the_last():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]], requires_grad=True)
    ref_logprobs = torch.tensor([[-1.5, -1.0, -3.0], [-4.0, 9.0, 9.0]])
    scores = torch.tensor([0.5, 30.0])
    rewards = ppo.token_rewards(scores, logprobs, ref_logprobs, mask, 0.1, 10.0)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 0.5], [10 - 0.3, 0, 0]]))
    assert not rewards.requires_grad, "KL acts through the reward, not through its gradient"


@both_masks
def test_the_score_lands_on_the_last_sampled_token_and_kl_on_sampled_tokens_only(rows):
    mask, (logprobs, ref_logprobs, *_) = random_batch(rows)
    scores = torch.tensor([1.0, -9.0, 9.0, 0.0, -1.0], dtype=torch.float64)
    rewards = ppo.token_rewards(scores, logprobs, ref_logprobs, mask, 0.3, 5.0)
    for b, score in enumerate(scores.tolist()):
        expected = []
        for p, q in zip(sampled(logprobs, mask, b), sampled(ref_logprobs, mask, b)):
            expected.append(-0.3 * (p - q))
        expected[-1] += min(max(score, -5.0), 5.0)
        assert sampled(rewards, mask, b) == pytest.approx(expected, abs=1e-9)
    assert (rewards[~mask] == 0).all()


@both_masks
def test_whitening_and_means_count_sampled_tokens_only(rows):
    mask, (x, *_) = random_batch(rows)
    x = x * 3 + 5
    values = x[mask].tolist()
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    assert ppo.masked_mean(x, mask).item() == pytest.approx(mean, abs=1e-9)
    whitened = ppo.whiten(x, mask)
    expected = [(v - mean) / math.sqrt(variance) for v in values]
    assert whitened[mask].tolist() == pytest.approx(expected, abs=1e-6)
    assert (whitened[~mask] == 0).all()


def naive_actor_loss(logprobs, old_logprobs, advantages, clip):
    """Mean over the tokens of a list."""
    total = 0.0
    for logprob, old, advantage in zip(logprobs, old_logprobs, advantages):
        ratio = math.exp(logprob - old)
        clipped_ratio = min(max(ratio, 1 - clip), 1 + clip)
        total += max(-advantage * ratio, -advantage * clipped_ratio)
    return total / len(logprobs)


def naive_critic_loss(values, old_values, returns, value_clip):
    total = 0.0
    for value, old, target in zip(values, old_values, returns):
        clipped_value = old + min(max(value - old, -value_clip), value_clip)
        total += 0.5 * max((value - target) ** 2, (clipped_value - target) ** 2)
    return total / len(values)


@both_masks
def test_the_losses_are_their_formulas_over_sampled_tokens(rows):
    mask, (new, old, advantages, returns) = random_batch(rows)
    tokens = [x[mask].tolist() for x in (new, old, advantages, returns)]
    loss = ppo.actor_loss(new, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(naive_actor_loss(*tokens[:3], 0.2), abs=1e-9)
    loss = ppo.critic_loss(new, old, returns, mask, 0.2)
    expected = naive_critic_loss(tokens[0], tokens[1], tokens[3], 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


@both_masks
def test_the_losses_have_no_gradient_outside_of_the_mask_and_none_where_nothing_is_to_learn(rows):
    mask, (new, old, advantages, returns) = random_batch(rows)
    new = (old + 0.01 * new).requires_grad_()  # inside of the clip: every sampled token counts
    (gradient,) = torch.autograd.grad(ppo.actor_loss(new, old, advantages, mask, 0.2), new)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).all()
    (gradient,) = torch.autograd.grad(ppo.critic_loss(new, old, returns, mask, 0.2), new)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).all()
    loss = ppo.actor_loss(new, old, torch.zeros_like(old), mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, new)
    assert (gradient == 0).all(), "equal rewards, equal values: nothing to learn"


def test_a_ratio_beyond_e_to_the_20_does_not_overflow():
    mask = torch.ones(1, 2, dtype=torch.bool)
    logprobs = torch.tensor([[0.0, -300.0]], requires_grad=True)
    old_logprobs = torch.tensor([[-300.0, 0.0]])
    loss = ppo.actor_loss(logprobs, old_logprobs, torch.tensor([[-1.0, -1.0]]), mask, 0.2)
    assert loss.item() == pytest.approx((math.exp(20) + 0.8) / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.isfinite(gradient).all()


# The formulas of the first edition, which knew no holes.


def first_gae(values, rewards, mask, gamma, lam):
    values = values * mask
    rewards = rewards * mask
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def first_token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, score_clip):
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = (mask.sum(1) - 1).long()
    rewards[torch.arange(len(scores)), last] += scores.clamp(-score_clip, score_clip)
    return rewards


def test_without_holes_every_bit_is_that_of_the_formulas_that_know_none():
    lengths = torch.arange(1, 34)
    mask = torch.arange(33) < lengths[:, None]
    g = torch.Generator().manual_seed(0)
    values, rewards, logprobs, ref_logprobs = torch.randn(4, 33, 33, generator=g)
    scores = 4 * torch.randn(33, generator=g)
    for gamma, lam in ((1.0, 0.95), (0.99, 0.9)):
        got = ppo.gae(values, rewards, mask, gamma, lam)
        expected = first_gae(values, rewards, mask, gamma, lam)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    arguments = (scores, logprobs, ref_logprobs, mask, 0.05, 5.0)
    assert torch.equal(ppo.token_rewards(*arguments), first_token_rewards(*arguments))


def test_a_value_is_that_of_the_state_before_the_token():
    def critic(tokens):
        """Its value of a state is the state's position."""
        return torch.arange(tokens.size(1)).float().expand(tokens.shape)

    tokens = torch.zeros(2, 9, dtype=torch.long)
    prompt_lens = torch.tensor([3, 5])
    answer_lens = torch.tensor([4, 1])
    batch = batch_of(tokens=tokens, prompt_lens=prompt_lens, answer_lens=answer_lens)
    got = ppo.answer_values(critic, batch)
    message = "the first token is chosen in the state after the prompt's last"
    assert got.tolist() == [[2, 3, 4, 5], [4, 0, 0, 0]], message


def test_gradients_do_not_depend_on_how_a_batch_is_split():
    lm = model_of("llama").double()
    policy = models.Policy(lm)
    rows = ragged([9, 4, 21, 3])
    prompt_lens = torch.tensor([5, 1, 20, 1])
    old_logprobs = torch.randn(4, 4, dtype=torch.float64) - 4
    advantages = torch.randn(4, 4, dtype=torch.float64)

    def gradient(parts):
        lm.zero_grad()
        step_tokens = 0
        for i in sum(parts, []):
            step_tokens += len(rows[i]) - prompt_lens[i]
        for part in parts:
            tokens, lengths = data.pad([rows[i] for i in part])
            answer_lens = lengths - prompt_lens[part]
            logprobs, _ = policy(tokens, prompt_lens[part], answer_lens)
            A = logprobs.size(1)
            mask = torch.arange(A) < answer_lens[:, None]
            loss = ppo.actor_loss(
                logprobs.double(), old_logprobs[part, :A], advantages[part, :A], mask, 0.2)
            (loss * mask.sum() / step_tokens).backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters()])

    whole = gradient([[0, 1, 2, 3]])
    for parts in ([[0], [1], [2], [3]], [[0, 3], [1, 2]]):
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-4, atol=1e-7)


# -----------------------------------------------------------------------------
# the record of a rollout


def batch_of(B=5, A=7, P=4, **more):
    """A Batch in which every entry of every field is different from its neighbours."""
    prompt_lens = torch.tensor([4, 2, 3, 1, 4])[:B]
    answer_lens = torch.tensor([2, 7, 4, 1, 3])[:B]
    matrix = torch.arange(B * A).view(B, A).float()
    known = dict(
        tokens=torch.arange(B * (P + A)).view(B, P + A),
        prompt_lens=prompt_lens,
        answer_lens=answer_lens,
        mask=torch.arange(A) < answer_lens[:, None],
        finished=torch.tensor([True, False, True, True, False])[:B],
        sample_logprobs=matrix + 0.1,
        prompts=[f"prompt {i}" for i in range(B)],
        answers=[f"answer {i}" for i in range(B)],
        row_fields={"target": list(range(B)), "name": [f"row {i}" for i in range(B)]},
    )
    return ppo.Batch(**(known | more))


def test_indexing_a_batch_takes_those_rows_of_every_field_and_no_more_columns_than_they_need():
    batch = batch_of()
    g = torch.Generator().manual_seed(0)
    for name in (
            "old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "ratio"):
        setattr(batch, name, torch.randn(5, 7, generator=g))
    batch.kl = torch.randn(5, generator=g)
    batch.scores = {"a": torch.randn(5, generator=g), "b": torch.randn(5, generator=g)}

    rows = np.array([4, 2])
    part = batch[rows]
    assert len(part) == 2
    T = 7  # the longer of 4 + 3 and 3 + 4
    A = 4  # the longer of 3 and 4
    for field in dataclasses.fields(ppo.Batch):
        whole = getattr(batch, field.name)
        got = getattr(part, field.name)
        assert whole is not None, f"this test must set {field.name}"
        if field.name == "tokens":
            assert got.tolist() == [whole[i, :T].tolist() for i in rows]
        elif isinstance(whole, dict):
            for name, values in whole.items():
                assert list(got[name]) == [values[i] for i in rows], field.name
        elif isinstance(whole, list) or whole.dim() == 1:
            assert list(got) == [whole[i] for i in rows], field.name
        else:
            assert got.tolist() == [whole[i, :A].tolist() for i in rows], field.name
    assert part.lengths.tolist() == [7, 7]
    for got, expected in zip(part.inputs, (part.tokens, part.prompt_lens, part.answer_lens)):
        assert got is expected


def test_a_field_that_no_phase_has_filled_stays_empty_in_a_part_of_a_batch():
    part = batch_of()[np.array([0, 3])]
    assert part.values is None
    assert part.advantages is None
    assert part.scores == {}


def test_put_stores_a_models_outputs_in_their_rows_and_leaves_the_others_zero():
    batch = batch_of()
    batch.put(np.array([3, 0]), values=torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    batch.put(np.array([1]), values=torch.arange(7.0)[None], old_logprobs=torch.ones(1, 7))
    expected = torch.zeros(5, 7)
    expected[3, 0] = 1
    expected[0, :2] = torch.tensor([2.0, 3.0])
    expected[1] = torch.arange(7.0)
    assert torch.equal(batch.values, expected)
    assert batch.old_logprobs.sum() == 7
    assert batch.ref_logprobs is None


def test_on_one_rank_a_sum_over_ranks_changes_nothing():
    utils.init_distributed(0)
    batch = batch_of()
    batch.put(np.arange(5), values=torch.randn(5, 7))
    before = batch.values.clone()
    batch.sum_over_ranks("values", "old_logprobs")  # no old_logprobs yet: nothing to do
    assert torch.equal(batch.values, before)
    assert batch.old_logprobs is None


# -----------------------------------------------------------------------------
# totals, micro batches, collectives, schedules, logs


def token_quantities():
    """A mask (6, 5) with holes, two quantities (6, 5), and a scalar that is a masked mean."""
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(6, 5, generator=g) > 0.3
    x = torch.randn(6, 5, generator=g)
    y = torch.rand(6, 5, generator=g) > 0.5
    return mask, x, y


def add_rows(totals, rows):
    mask, x, y = token_quantities()
    loss = ppo.masked_mean(x[rows] ** 2, mask[rows])
    totals.add(mask[rows], x=x[rows], y=y[rows], loss=loss)
    totals.add_max(largest=x[rows][mask[rows]].max())


def naive_means():
    mask, x, y = token_quantities()
    return {
        "x": x[mask].double().mean().item(),
        "y": y[mask].double().mean().item(),
        "loss": (x[mask].double() ** 2).mean().item(),
        "largest": x[mask].max().item(),
    }


@pytest.mark.parametrize("parts", [[range(6)], [[0], [1, 2, 3, 4], [5]], [[5, 0, 3], [1, 2, 4]]])
def test_totals_are_means_over_tokens_however_the_rows_were_split(parts):
    utils.init_distributed(0)
    totals = utils.Totals()
    for part in parts:
        add_rows(totals, list(part))
    totals.all_reduce()
    assert totals.means() == pytest.approx(naive_means(), rel=1e-6)
    assert totals.mean("x") == totals.means()["x"]


def test_merging_totals_is_adding_their_rows_to_one():
    utils.init_distributed(0)
    together = utils.Totals()
    for part in ([0, 1], [2, 3, 4, 5]):
        step = utils.Totals()
        add_rows(step, part)
        step.all_reduce()
        together.merge(step)
    assert together.means() == pytest.approx(naive_means(), rel=1e-6)


def as_rank(monkeypatch, rank, world):
    """Rank and world size, for a function that reads them and calls no collective."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_hold_every_row_once_the_longest_first_and_as_many_on_each_rank(
        world, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 40)
    rows = rng.permutation(40)[:24]
    taken = []
    counts = set()
    loads = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        parts = utils.split_micro_batches(rows, lengths, 5)
        counts.add(len(parts))
        mine = np.concatenate(parts)
        assert (np.diff(lengths[mine]) <= 0).all(), "longest first: if memory is short, at once"
        assert all(len(part) == 5 for part in parts[:-1])
        loads.append(lengths[mine].sum())
        taken += mine.tolist()
    assert sorted(taken) == sorted(rows.tolist())
    assert len(counts) == 1, "every rank makes the same number of forwards"
    assert max(loads) - min(loads) < lengths.max(), "and has about as many tokens"


def test_a_rank_computes_its_share_of_a_step_in_micro_batches_of_the_given_size(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    as_rank(monkeypatch, 0, 2)
    assert utils.micro_batch_size(16, 0) == (8, 1)
    assert utils.micro_batch_size(16, 3) == (3, 3)
    assert utils.micro_batch_size(16, 8) == (8, 1)
    assert utils.micro_batch_size(16, 99) == (8, 1)


def test_the_learning_rate_warms_up_over_3_percent_of_the_steps_and_falls_to_a_tenth():
    schedule = [utils.cosine_schedule(step, 200) for step in range(200)]
    assert schedule[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    for step in range(6, 200):
        angle = math.pi * (step - 6) / 194
        assert schedule[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(angle)) / 2)
    assert schedule[-1] == pytest.approx(0.1, abs=1e-3)
    assert utils.cosine_schedule(0, 1) == 1, "a single step is a whole one"


def test_lines_past_the_checkpoint_that_a_run_resumes_from_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "x": 1}\n', '{"step": 2, "x": 2}\n', '{"step": 3, "x": 3}\n']
    path.write_text("".join(lines) + '{"step": 3, "y"')  # the process ended while it wrote
    with utils.append_lines(path, "step", 2) as file:
        file.write("new\n")
    assert path.read_text() == "".join(lines[:2]) + "new\n"
    utils.append_lines(path, "step", 0).close()
    assert path.read_text() == "", "a run from the start drops them all"


def test_what_is_logged_is_in_its_file_at_once(tmp_path):
    utils.init_distributed(0)
    log = utils.Log(ppo.Config(out=str(tmp_path)), 3, {"score": ".3f"})
    log(1, {"score": 0.5})
    log.samples([{"iteration": 1, "answer": "a"}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_text().count("\n") == 1, f"{name}: a killed run must keep it"


def test_a_tracker_gets_what_the_file_gets(tmp_path, flags, monkeypatch):
    calls = []
    tracker = types.SimpleNamespace(
        init=lambda **config: calls.append(config),
        log=lambda metrics, step: calls.append({"step": step, **metrics}),
        finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    metrics = train(ppo, tmp_path / "p", **flags, track="trackio")
    config, *rows, end = calls
    assert (config["project"], config["name"]) == ("flatrlhf", str(tmp_path / "p"))
    assert config["config"]["kl_coef"] == 0.05
    assert rows == metrics and end == "finish"


def test_a_tracker_that_is_not_installed_gets_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(utils.UserError, match="--track wandb: first `pip install wandb`"):
        utils.require_tracker("wandb")
    utils.require_tracker("")


def test_a_file_that_is_being_replaced_is_the_old_one_until_it_is_the_new_one(
        tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    utils.atomic_write(path, "old")

    def rename(self, target):
        assert Path(self).read_text() == "new", "whole before it takes the place"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            utils.atomic_write(path, "new")
        assert path.read_text() == "old"
    utils.atomic_write(path, "new")
    assert path.read_text() == "new"


# -----------------------------------------------------------------------------
# the phases, one by one


@pytest.mark.parametrize("process", [False, True])
def test_advantages_come_from_normalized_and_penalized_scores_and_the_logged_score_does_not(
        process):
    """The constants of ppo.py stand here once more, as numbers. process: whether the second scorer
    has given a number for each token."""
    mask, (logprobs, ref_logprobs, values, _) = random_batch(ROWS_WITH_HOLES)
    batch = batch_of(mask=mask, sample_logprobs=logprobs + 1)
    batch.old_logprobs = logprobs
    batch.ref_logprobs = ref_logprobs
    batch.values = values
    a = torch.tensor([0.5, -0.5, 1.0, 7.0, -3.0], dtype=torch.float64)
    b = torch.tensor([1.0, 2.0, -4.0, 0.0, -7.0], dtype=torch.float64)
    batch.scores = {"a": a, "b": b}
    if process:
        each = torch.randn(mask.shape, dtype=torch.float64) * mask
        each = (each + ((b - each.sum(1)) / mask.sum(1))[:, None]) * mask  # add up to b
        batch.token_scores = {"b": each}
    scorers = [ppo.Scorer("a", 1.0), ppo.Scorer("b", 0.5, mean=-1.0, std=2.0)]
    metrics = ppo.estimate_advantages(batch, scorers, ppo.Config(kl_coef=0.3))

    total = a + 0.5 * b
    normalized = a + 0.5 * (b + 1.0) / 2.0
    advantages = []
    for row in range(5):
        penalized = normalized[row].item()
        if not batch.finished[row]:
            penalized -= 1.0
        log_ratios = []
        for p, q in zip(sampled(logprobs, mask, row), sampled(ref_logprobs, mask, row)):
            log_ratios.append(p - q)
        assert batch.kl[row].item() == pytest.approx(sum(log_ratios))
        rewards = [-0.3 * x for x in log_ratios]
        rewards[-1] += min(max(penalized, -5.0), 5.0)
        if process:  # its share, over its standard deviation, stands at the tokens
            for t, score in enumerate(sampled(each, mask, row)):
                rewards[t] += 0.5 * score / 2.0
                rewards[-1] -= 0.5 * score / 2.0
        assert sampled(batch.rewards, mask, row) == pytest.approx(rewards)
        row_values = sampled(values, mask, row)
        advantages += naive_gae(row_values, rewards, gamma=1.0, lam=0.95)
    raw = np.array(advantages)
    whitened = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-8)
    np.testing.assert_allclose(batch.advantages[mask], whitened)
    returns = raw + values[mask].numpy()
    np.testing.assert_allclose(batch.returns[mask], returns, err_msg="of what is not whitened")

    log_ratio = (logprobs - ref_logprobs)[mask]
    k3 = (-log_ratio).exp() - 1 + log_ratio
    errors = values[mask].numpy() - returns
    assert metrics == pytest.approx({
        "score": total.mean().item(),
        "score_std": total.std().item(),
        "score_clipped": 2 / 5,  # 7.25, and -4.5 less the penalty
        "kl": log_ratio.sum().item() / 5,
        "kl_k3": k3.sum().item() / 5,
        "advantage_mean": raw.mean(),
        "advantage_std": raw.std(),
        "score_a": a.mean().item(),
        "score_a_std": a.std().item(),
        "score_b": b.mean().item(),
        "score_b_std": b.std().item(),
        "return_mean": returns.mean(),
        "explained_variance": 1 - errors.var() / returns.var(),
    })


def test_with_a_single_update_per_rollout_kl_is_measured_with_the_samplers_logprobs():
    mask, (logprobs, ref_logprobs, values, _) = random_batch(WHOLE_ROWS)
    batch = batch_of(mask=mask, sample_logprobs=logprobs)
    batch.ref_logprobs = ref_logprobs
    batch.values = values
    batch.scores = {"a": torch.zeros(5, dtype=torch.float64)}
    ppo.estimate_advantages(batch, [ppo.Scorer("a", 1.0)], ppo.Config(minibatches=1))
    torch.testing.assert_close(batch.kl, ((logprobs - ref_logprobs) * mask).sum(1))


def test_each_epoch_has_every_row_once_and_all_but_the_first_are_shuffled_each_its_own_way():
    cfg = ppo.Config(batch_size=32, minibatches=4, ppo_epochs=3)
    epochs = {}
    for iteration in (1, 2):
        steps = list(ppo.minibatches(32, cfg, iteration))
        assert [len(rows) for rows in steps] == [8] * 12
        for epoch in range(3):
            order = np.concatenate(steps[4 * epoch : 4 * epoch + 4]).tolist()
            assert sorted(order) == list(range(32))
            epochs[iteration, epoch] = tuple(order)
    assert epochs[1, 0] == epochs[2, 0] == tuple(range(32)), "a rollout is in random order already"
    assert len(set(epochs.values())) == 5
    other_seed = list(ppo.minibatches(32, dataclasses.replace(cfg, seed=2), 1))
    assert tuple(np.concatenate(other_seed[4:8])) != epochs[1, 1]


class CountingEMA:
    def __init__(self):
        self.updates = 0

    def update(self):
        self.updates += 1


def update_with(monkeypatch, approx_kls, norms):
    """ppo.update with steps that move the policy so far and have gradients of these norms.
    Returns its metrics and the number of updates of the EMA."""
    remaining = list(zip(approx_kls, norms))

    def update_step(*_):
        approx_kl, norm = remaining.pop(0)
        totals = utils.Totals()
        totals.add(torch.ones(1, 1, dtype=torch.bool), approx_kl=torch.tensor([[approx_kl]]))
        return totals, [norm, norm]

    monkeypatch.setattr(ppo, "update_step", update_step)
    ema = CountingEMA()
    cfg = ppo.Config(batch_size=4, minibatches=2, ppo_epochs=2)
    metrics = ppo.update(batch_of(B=4), None, "critic", ema, None, cfg, 2, 1)
    return metrics, ema.updates


def test_the_epochs_on_a_rollout_end_after_a_step_that_moved_the_policy_more_than_a_tenth_of_a_nat(
        monkeypatch):
    metrics, _ = update_with(monkeypatch, [0.05, 0.09, 0.11, 0.0], [1.0, 1.0, 2.0, 1.0])
    assert metrics["steps"] == 3
    assert metrics["approx_kl"] == pytest.approx(0.25 / 3)
    assert metrics["actor_grad_norm"] == 2.0, "of the last step"
    metrics, _ = update_with(monkeypatch, [0.09] * 4, [1.0] * 4)
    assert metrics["steps"] == 4


def test_the_ema_takes_each_step_of_the_actor_and_none_that_was_skipped(monkeypatch):
    _, updates = update_with(monkeypatch, [0.0] * 4, [1.0, None, 1.0, 1.0])
    assert updates == 3


class ScriptedSampler:
    """A sampler whose answers are given: prompt (a tuple of ids) -> answer ids."""

    def __init__(self, answers):
        self.answers = answers
        self.released = False

    def generate(self, prompts, max_new_tokens, temperature, eos_token_id, seed, respond):
        self.respond = respond
        self.arguments = (max_new_tokens, temperature, eos_token_id, seed)
        answers = [self.answers[tuple(prompt)] for prompt in prompts]
        tokens, _ = data.pad([p + a for p, a in zip(prompts, answers)])
        answer_lens = torch.tensor([len(a) for a in answers])
        logprobs = -torch.ones(len(answers), int(answer_lens.max()))
        prompt_lens = torch.tensor([len(p) for p in prompts])
        mask = torch.arange(logprobs.size(1)) < answer_lens[:, None]
        return Rollout(tokens, prompt_lens, answer_lens, logprobs, mask)

    def release(self):
        self.released = True


class ThreeRows:
    """Prompts "a", "bc", "d", with a field."""

    def __init__(self, tokenizer):
        self.prompts = tokenizer(["a", "bc", "d"])["input_ids"]

    def prompt(self, i):
        return self.prompts[i]

    def fields(self, indices):
        return {"target": [10 * int(i) for i in indices]}


def test_a_rollout_says_which_tokens_were_sampled_which_answers_ended_and_what_their_rows_hold(
        tok):
    utils.init_distributed(0)
    eos = tok.eos_token_id
    rows = ThreeRows(tok)
    a, bc, d = [tuple(prompt) for prompt in rows.prompts]
    sampler = ScriptedSampler(
        {a: tok("AB")["input_ids"] + [eos], bc: tok("C")["input_ids"], d: [eos]})
    indices = np.array([1, 0, 2, 0])
    cfg = ppo.Config(max_new_tokens=3, temperature=0.7)
    batch = ppo.rollout(sampler, rows, indices, [5, 6, 7, 8], cfg, tok)
    assert sampler.arguments == (3, 0.7, eos, [5, 6, 7, 8])
    assert sampler.released, "its memory is needed for training"
    assert batch.mask.tolist() == [
        [True, False, False], [True, True, True], [True, False, False], [True, True, True]]
    assert batch.finished.tolist() == [False, True, True, True]
    assert batch.prompts == ["bc", "a", "d", "a"]
    assert batch.answers == ["C", "AB", "", "AB"]
    assert batch.row_fields == {"target": [10, 0, 20, 0]}
    assert batch.lengths.tolist() == [3, 4, 2, 4]


def test_a_tool_sees_its_row_and_the_text_so_far_and_its_words_become_tokens(tok, tmp_path):
    utils.init_distributed(0)
    file = tmp_path / "tools.py"
    file.write_text("""
def shout(row, text):
    if len(text) > 3:
        return None
    return f" {row['prompt'].upper()}{row['target']}"
""")
    rows = ThreeRows(tok)
    a, bc, d = [tuple(prompt) for prompt in rows.prompts]
    sampler = ScriptedSampler({a: tok("A")["input_ids"], bc: tok("B")["input_ids"]})
    cfg = ppo.Config(max_new_tokens=3, respond=f"{file}:shout")
    ppo.rollout(sampler, rows, np.array([1, 0]), [5, 6], cfg, tok)
    eos = [tok.eos_token_id]
    assert sampler.respond(0, tok("xy")["input_ids"] + eos) == tok(" BC10")["input_ids"]
    assert sampler.respond(1, tok("xy")["input_ids"] + eos) == tok(" A0")["input_ids"]
    assert sampler.respond(1, tok("xyzw")["input_ids"] + eos) is None
    assert ppo.make_respond(ppo.Config(), rows, [0], tok) is None


def scored_batch():
    """A batch of 4 rows and four models of plain arithmetic that read it."""
    batch = batch_of(B=4)

    def actor(tokens, prompt_lens, answer_lens, temperature):
        width = int(answer_lens.max())
        return tokens[:, :1].float().expand(-1, width) * temperature, None

    def ref(tokens, prompt_lens, answer_lens, temperature):
        logprobs, _ = actor(tokens, prompt_lens, answer_lens, temperature)
        return -logprobs, None

    def critic(tokens):
        return tokens.float()

    def reward_model(tokens):
        return tokens.float() * 2

    return batch, actor, ref, critic, reward_model


@pytest.mark.parametrize("minibatches", [1, 2])
def test_scoring_runs_every_model_on_every_row_and_skips_what_a_single_update_does_not_need(
        minibatches, monkeypatch):
    utils.init_distributed(0)
    monkeypatch.setattr(training, "on_device", lambda *_: contextlib.nullcontext())
    batch, actor, ref, critic, reward_model = scored_batch()
    scorers = [
        ppo.Scorer("model", 1.0, model=reward_model),
        ppo.Scorer("rule", 0.5, function=lambda prompts, answers, fields: fields["target"]),
    ]
    cfg = ppo.Config(batch_size=4, minibatches=minibatches, temperature=0.5)
    ppo.score(batch, actor, ref, critic, scorers, cfg, micro_batch=1)

    for row in range(4):
        p = int(batch.prompt_lens[row])
        a = int(batch.answer_lens[row])
        tokens = batch.tokens[row].tolist()
        values = [float(x) for x in tokens[p - 1 : p - 1 + a]]
        assert batch.values[row].tolist() == values + [0] * (7 - a), "of the state before a token"
        assert batch.scores["model"][row] == 2 * tokens[p + a - 1], "at the last token"
        assert (batch.ref_logprobs[row, :a] == -0.5 * tokens[0]).all()
        if minibatches == 2:
            assert (batch.old_logprobs[row, :a] == 0.5 * tokens[0]).all()
    assert batch.scores["rule"].tolist() == [0, 1, 2, 3]
    total = ppo.total_score(batch, scorers)
    torch.testing.assert_close(total, batch.scores["model"] + 0.5 * batch.scores["rule"])
    if minibatches == 1:
        assert batch.old_logprobs is None, "one forward less: the first ratio is 1 anyway"


# -----------------------------------------------------------------------------
# the three scripts a second time: float64, rows one by one, no padding, no micro batches, nothing
# of ours but the order of the rows. Written from the papers.


def exact(model):
    """A model in float64."""
    return model.double().eval()


def exact_policy(folder):
    return exact(models.load_lm(folder, torch.float32))


class ExactRewardModel:
    """A folder of reward.py, read with transformers alone."""

    def __init__(self, folder):
        from transformers import AutoModelForSequenceClassification

        self.model = exact(AutoModelForSequenceClassification.from_pretrained(folder))
        self.offset = getattr(self.model.config, "score_offset", 0.0)
        self.scale = getattr(self.model.config, "score_scale", 1.0)

    def __call__(self, tokens):
        """The value of each prefix of a row."""
        hidden = self.model.model(torch.tensor([tokens])).last_hidden_state[0]
        return (self.model.score(hidden)[:, 0] - self.offset) * self.scale


def exact_logprobs(lm, prompt, answer, temperature=1.0):
    """Log-probability of each answer token, and the entropy where it was chosen."""
    logits = lm(torch.tensor([prompt + answer])).logits[0] / temperature
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0], entropy


class Adam:
    """Kingma and Ba 2015, algorithm 1, on a gradient that is clipped to norm 1."""

    def __init__(self, model, eps):
        self.params = list(model.parameters())
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.eps = eps
        self.t = 0

    def step(self, loss, lr, beta1=0.9, beta2=0.99):
        """Returns the norm of the gradient before it is clipped."""
        gradients = torch.autograd.grad(loss, self.params)
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        self.t += 1
        with torch.no_grad():
            for p, m, v, g in zip(self.params, self.m, self.v, gradients):
                g = g * min(1.0, 1.0 / norm)
                m.mul_(beta1).add_(g * (1 - beta1))
                v.mul_(beta2).add_(g**2 * (1 - beta2))
                m_hat = m / (1 - beta1**self.t)
                v_hat = v / (1 - beta2**self.t)
                p -= lr * m_hat / (v_hat.sqrt() + self.eps)
        return norm


def exact_schedule(step, total):
    """Of sft.py and reward.py, where a run is shorter than 34 steps: one step of warm-up."""
    if step == 0:
        return 1.0
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / (total - 1)))


def distance(model, other, start):
    """How far apart two models' weights are, as a share of the way from where they started."""
    apart = moved = 0.0
    for p, q, s in zip(model.parameters(), other.parameters(), start.parameters()):
        apart += (p.double() - q.double()).square().sum().item()
        moved += (q.double() - s.double()).square().sum().item()
    assert moved > 0
    return math.sqrt(apart / moved)


def rows_of_steps(source, step, flags, tokenizer, names):
    """The data of a run: its rows, and the indices of each step (in order, without end)."""
    rows, _ = data.load(source, step, "", 0.2, TEMPLATE, tokenizer, flags["max_len"])
    return rows, data.steps(rows, rows.lengths(*names), flags["batch_size"], 1)


def test_sft_takes_the_steps_of_a_second_version(chain, toy_file, tok, tmp_path):
    start = chain["sft"][0]
    flags = dict(STEPS, model=start, data=toy_file, epochs=0.22, micro_batch=3, lr=1e-3)
    metrics = train(sft, tmp_path / "sft", **flags)

    lm = exact_policy(start)
    adam = Adam(lm, 1e-8)
    rows, batches = rows_of_steps(toy_file, "sft", flags, tok, ["response"])
    for step, row in enumerate(metrics):
        _, indices = next(batches)
        logprobs = []
        for i in indices:
            logprobs.append(exact_logprobs(lm, rows.prompt(i), rows.answer(i, "response"))[0])
        loss = -torch.cat(logprobs).mean()  # over all tokens of the step
        lr = 1e-3 * exact_schedule(step, len(metrics))
        norm = adam.step(loss, lr)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert row["lr"] == pytest.approx(lr)
    assert len(metrics) == 5
    got = models.load_lm(str(tmp_path / "sft"), torch.float32)
    assert distance(got, lm, exact_policy(start)) < 5e-4


def test_the_held_out_loss_of_sft_is_a_mean_over_answer_tokens(chain, toy_file, tok):
    folder, metrics = chain["sft"]
    lm = exact_policy(folder)  # as it was saved, after the last step
    _, held_out = data.load(toy_file, "sft", "", 0.2, TEMPLATE, tok, 64)
    logprobs = []
    with torch.no_grad():
        for i in range(len(held_out)):
            prompt = held_out.prompt(i)
            logprobs.append(exact_logprobs(lm, prompt, held_out.answer(i, "response"))[0])
    loss = -torch.cat(logprobs).mean().item()
    assert metrics[-1]["held_out_loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics[-1]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)


@pytest.fixture
def started(monkeypatch):
    """The models that DeepSpeed is given to train, and copies of them as they were then."""
    pairs = []
    real = training.train_engine

    def train_engine(model, *arguments):
        pairs.append((model, copy.deepcopy(model)))
        return real(model, *arguments)

    monkeypatch.setattr(training, "train_engine", train_engine)
    return pairs


def exact_pair(model, rows, i):
    """The scores of the chosen and of the rejected answer of a row."""
    prompt = rows.prompt(i)
    answers = [rows.answer(i, which) for which in ("chosen", "rejected")]
    return [model(prompt + answer)[-1] for answer in answers]


def test_reward_takes_the_steps_of_a_second_version(chain, toy_file, tok, tmp_path, started):
    flags = dict(STEPS, model=chain["sft"][0], data=toy_file, epochs=0.22, micro_batch=3, lr=1e-3)
    metrics = train(reward, tmp_path / "reward", **flags)
    [(trained, start)] = started

    start.model.save_pretrained(tmp_path / "start")  # the backbone of the SFT model, a random head
    model = ExactRewardModel(tmp_path / "start")
    adam = Adam(model.model, 1e-8)
    rows, batches = rows_of_steps(toy_file, "reward", flags, tok, ["chosen", "rejected"])
    for step, row in enumerate(metrics):
        _, indices = next(batches)
        margins = []
        sums = []
        for i in indices:
            chosen, rejected = exact_pair(model, rows, i)
            margins.append(chosen - rejected)
            sums.append(chosen + rejected)
        margins = torch.stack(margins)
        loss = torch.log1p((-margins).exp()).mean()
        centering = 0.003 * torch.stack(sums).square().mean()  # Eisenstein et al. 2023
        lr = 1e-3 * exact_schedule(step, len(metrics))
        norm = adam.step(loss + centering, lr)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["margin"] == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-5)
        assert row["accuracy"] == (margins > 0).double().mean()
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["lr"] == pytest.approx(lr)
    assert len(metrics) == 5
    assert distance(trained, model.model, start) < 1e-3

    with torch.no_grad():
        scores = [exact_pair(model, rows, i) for i in range(len(rows))]
    chosen_scores = [chosen.item() for chosen, _ in scores]
    all_scores = [score.item() for pair in scores for score in pair]
    saved = ExactRewardModel(tmp_path / "reward")
    assert abs(np.mean(all_scores) - np.mean(chosen_scores)) > 1e-3
    assert saved.offset == pytest.approx(np.mean(chosen_scores), abs=1e-4)
    assert saved.scale == pytest.approx(1 / np.std(all_scores, ddof=1), rel=1e-3)


@pytest.fixture(scope="module")
def rankings(tmp_path_factory):
    """Rows of 2 to 5 ranked answers with ties, and pairs: the rows, and a file of them."""
    rows = []
    for i, row in enumerate(itertools.islice(tasks.toy(), 160)):
        right, wrong = row["chosen"], row["rejected"]
        answers = [wrong, right, right + "ab", "b" + right, wrong + "c"][: 2 + i % 4]
        new = {"prompt": f"{row['prompt']} {i}", "answers": answers}  # each prompt is there once
        if i % 8 == 0:
            new = {"prompt": new["prompt"], "chosen": right, "rejected": wrong}
        elif i % 2:
            new["ranks"] = [3, 1, 2, 2, 4][: len(answers)]
        else:
            new["scores"] = [0, 2.5, 1, 1, -1][: len(answers)]
        rows.append(new)
    return rows, write_rows(tmp_path_factory.mktemp("rankings") / "rankings.jsonl", rows)


def exact_ranking(model, tok, row):
    """Scores of the answers of a row of a file, and their ranks; the best answer is first."""
    if "chosen" in row:
        answers, ranks = [row["chosen"], row["rejected"]], [1, 2]
    else:
        answers = row["answers"]
        ranks = row.get("ranks") or [-score for score in row["scores"]]
    prompt = tok(TEMPLATE.format(prompt=row["prompt"]))["input_ids"]
    scores = []
    for answer in answers:
        ids = tok(" " + answer if answer else "")["input_ids"]
        scores.append(model(prompt + ids + [tok.eos_token_id])[-1])
    order = sorted(range(len(answers)), key=lambda k: ranks[k])
    return torch.stack([scores[k] for k in order]), [ranks[k] + 10 for k in order]


def test_reward_takes_the_steps_of_a_second_version_on_rankings(
        chain, rankings, tok, tmp_path, started):
    raw, path = rankings
    flags = dict(STEPS, model=chain["sft"][0], data=path, epochs=0.3, micro_batch=3, lr=1e-3)
    metrics = train(reward, tmp_path / "reward", **flags)
    [(trained, start)] = started
    start.model.save_pretrained(tmp_path / "start")
    model = ExactRewardModel(tmp_path / "start")
    adam = Adam(model.model, 1e-8)
    train_rows, held_out = data.load(path, "reward", "", 0.2, TEMPLATE, tok, flags["max_len"])
    by_prompt = {tuple(tok(TEMPLATE.format(prompt=row["prompt"]))["input_ids"]): row for row in raw}
    lengths = train_rows.lengths_to_compare().max(1)
    batches = data.steps(train_rows, lengths, flags["batch_size"], 1)

    def ranked(rows, i):
        return exact_ranking(model, tok, by_prompt[tuple(rows.prompt(i))])

    for step, row in enumerate(metrics):
        _, indices = next(batches)
        losses = []
        margins = []
        accuracies = []
        levels = []
        for i in indices:
            scores, ranks = ranked(train_rows, i)
            counts, own_margins = pairs_by_hand(scores, ranks)
            own_margins = torch.stack(own_margins)
            losses.append(torch.log1p((-own_margins).exp()).mean())
            margins.append(own_margins.mean().item())
            accuracies.append(counts["agree"] / len(own_margins))
            levels.append(2 * scores.mean())
        loss = torch.stack(losses).mean()
        centering = 0.003 * torch.stack(levels).square().mean()
        norm = adam.step(loss + centering, 1e-3 * exact_schedule(step, len(metrics)))
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["margin"] == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-5)
        assert row["accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-6)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert len(metrics) == 4
    assert distance(trained, model.model, start) < 1e-3

    with torch.no_grad():
        held = [ranked(held_out, i) for i in range(len(held_out))]
        known = [ranked(train_rows, i)[0] for i in range(len(train_rows))]
    counted = [pairs_by_hand(scores.tolist(), ranks) for scores, ranks in held]
    accuracy = np.mean([counts["agree"] / len(margins) for counts, margins in counted])
    tau = np.mean([tau_by_hand(scores.tolist(), ranks) for scores, ranks in held])
    assert metrics[-1]["held_out_accuracy"] == pytest.approx(accuracy, abs=1e-5)
    assert metrics[-1]["held_out_tau"] == pytest.approx(tau, abs=1e-5)
    assert metrics[-1]["held_out_pairs"] == sum(len(margins) for _, margins in counted)
    saved = ExactRewardModel(tmp_path / "reward")
    best = np.mean([scores[0].item() for scores in known])
    assert saved.offset == pytest.approx(best, abs=1e-4), "the best answer, the first of equals"
    every = torch.cat(known).numpy()
    assert saved.scale == pytest.approx(1 / np.std(every, ddof=1), rel=1e-3)


def test_a_pair_and_a_ranking_of_two_give_the_same_run_bit_for_bit(chain, tmp_path):
    pairs = []
    ranked = []
    for i, row in enumerate(itertools.islice(tasks.toy(), 120)):
        prompt, right, wrong = row["prompt"], row["chosen"], row["rejected"]
        pairs.append({"prompt": prompt, "chosen": right, "rejected": wrong})
        if i % 2:
            ranked.append({"prompt": prompt, "answers": [wrong, right], "ranks": [2, 1]})
        else:
            ranked.append({"prompt": prompt, "answers": [right, wrong], "scores": [0.5, -3]})
    flags = dict(STEPS, model=chain["sft"][0], epochs=0.4, micro_batch=3)
    runs = {}
    for name, rows in {"pairs": pairs, "ranked": ranked}.items():
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        metrics = train(reward, tmp_path / name, data=path, **flags)
        keys = ("loss", "accuracy", "margin", "grad_norm", "held_out_accuracy", "held_out_loss")
        assert len(metrics) == 4 and "held_out_tau" not in metrics[-1]
        config = json.loads((tmp_path / name / "config.json").read_text())
        runs[name] = (
            [[row.get(key) for key in keys] for row in metrics],
            (tmp_path / name / "model.safetensors").read_bytes(),
            config["score_offset"], config["score_scale"])
    assert runs["pairs"] == runs["ranked"]


# What the second version of PPO and ppo.py are given.
EXACT = dict(
    batch_size=16, minibatches=2, ppo_epochs=2, micro_batch=4, iterations=2, max_new_tokens=8,
    temperature=0.8, actor_lr=3e-4, critic_lr=3e-4, kl_coef=0.2, ema=0.7, ptx_coef=0.5, seed=1)


class ExactPPO:
    """PPO on given answers. A row is prompt ids, answer ids, and a mask (a,) of the answer's tokens
    that the policy sampled; all numbers below are of sampled tokens."""

    def __init__(self, sft_folder, reward_folder, tokenizer):
        self.actor = exact_policy(sft_folder)
        self.ref = exact_policy(sft_folder)
        self.ema = exact_policy(sft_folder)
        self.critic = ExactRewardModel(reward_folder)
        self.reward_model = ExactRewardModel(reward_folder)
        self.actor_adam = Adam(self.actor, 1e-5)
        self.critic_adam = Adam(self.critic.model, 1e-5)
        self.tokenizer = tokenizer
        self.letters_mean = None  # of the answers of the first rollout
        self.letters_std = None

    def logprobs(self, lm, prompt, answer, mask):
        logprobs, entropy = exact_logprobs(lm, prompt, answer, EXACT["temperature"])
        return logprobs[mask], entropy[mask]

    def values(self, prompt, answer, mask):
        """The critic's, of the state before each token."""
        return self.critic(prompt + answer)[len(prompt) - 1 : -1][mask]

    def letters(self, answer):
        return len(self.tokenizer.decode(answer, skip_special_tokens=True))

    def normalize_letters(self, rows):
        letters = [self.letters(answer) for _, answer, _ in rows]
        self.letters_mean = np.mean(letters)
        self.letters_std = np.std(letters, ddof=1)

    @torch.no_grad()
    def judge(self, rows):
        """What each token was worth. Keeps a list for every quantity, an entry per row, and
        returns what is logged."""
        self.old_logprobs = []
        self.old_values = []
        self.advantages = []
        scores = []
        kls = []
        k3s = []
        for prompt, answer, mask in rows:
            logprobs, _ = self.logprobs(self.actor, prompt, answer, mask)
            ref_logprobs, _ = self.logprobs(self.ref, prompt, answer, mask)
            values = self.values(prompt, answer, mask)
            score = self.reward_model(prompt + answer)[-1].item()
            letters = self.letters(answer)
            scores.append(score + 0.3 * letters)
            score += 0.3 * (letters - self.letters_mean) / self.letters_std
            log_ratio = logprobs - ref_logprobs
            rewards = (-EXACT["kl_coef"] * log_ratio).tolist()
            penalty = 0.0 if answer[-1] == self.tokenizer.eos_token_id else 1.0
            rewards[-1] += min(max(score - penalty, -5.0), 5.0)
            advantages = naive_gae(values.tolist(), rewards, gamma=1.0, lam=0.95)
            self.old_logprobs.append(logprobs)
            self.old_values.append(values)
            self.advantages.append(torch.tensor(advantages, dtype=torch.float64))
            kls.append(log_ratio.sum().item())
            k3s.append(((-log_ratio).exp() - 1 + log_ratio).sum().item())
        self.returns = [a + v for a, v in zip(self.advantages, self.old_values)]
        raw = torch.cat(self.advantages)
        std = raw.std(unbiased=False)
        self.advantages = [(a - raw.mean()) / std for a in self.advantages]
        returns = torch.cat(self.returns)
        errors = torch.cat(self.old_values) - returns
        return {
            "score": np.mean(scores),
            "score_std": np.std(scores, ddof=1),
            "kl": np.mean(kls),
            "kl_k3": np.mean(k3s),
            "advantage_mean": raw.mean().item(),
            "advantage_std": std.item(),
            "return_mean": returns.mean().item(),
            "explained_variance": 1 - (errors.var() / returns.var()).item(),
        }

    def token_losses(self, i, prompt, answer, mask):
        """Of row i: the losses of its tokens, and what is logged of them."""
        logprobs, entropy = self.logprobs(self.actor, prompt, answer, mask)
        ratio = (logprobs - self.old_logprobs[i]).exp()
        advantages = self.advantages[i]
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        values = self.values(prompt, answer, mask)
        change = values - self.old_values[i]
        clipped = self.old_values[i] + change.clamp(-0.2, 0.2)
        error = torch.maximum(
            (values - self.returns[i]).square(), (clipped - self.returns[i]).square())
        return {
            "actor_loss": -gain,
            "critic_loss": error / 2,
            "entropy": entropy,
            "ratio_mean": ratio,
            "approx_kl": ratio - 1 - ratio.log(),
            "clip_frac": ((ratio - 1).abs() > 0.2).double(),
            "value_clip_frac": (change.abs() > 0.2).double(),
        }

    def step(self, rows, indices, texts, lr_scale):
        """One optimizer step of actor and critic; texts: the mixture's rows. Returns the losses and
        what is logged of all its tokens, and the norms of the gradients."""
        parts = [self.token_losses(i, *rows[i]) for i in indices]
        tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        text_logprobs = torch.cat([exact_logprobs(self.actor, *text)[0] for text in texts])
        actor_loss = tokens["actor_loss"].mean() - EXACT["ptx_coef"] * text_logprobs.mean()
        actor_norm = self.actor_adam.step(actor_loss, EXACT["actor_lr"] * lr_scale)
        critic_loss = tokens["critic_loss"].mean()
        critic_norm = self.critic_adam.step(critic_loss, EXACT["critic_lr"] * lr_scale)
        with torch.no_grad():
            for average, p in zip(self.ema.parameters(), self.actor.parameters()):
                average.mul_(EXACT["ema"]).add_(p * (1 - EXACT["ema"]))
        return tokens, (actor_norm, critic_norm)

    def iteration(self, number, rows, texts):
        """Returns its metrics. texts: a generator of the mixture's rows for each step."""
        lr_scale = 1 - (number - 1) / EXACT["iterations"]
        if number == 1:
            self.normalize_letters(rows)
        metrics = self.judge(rows)
        steps = []
        for epoch in range(EXACT["ppo_epochs"]):
            order = np.arange(len(rows))
            if epoch > 0:
                order = np.random.default_rng([1, number, epoch]).permutation(len(rows))
            for indices in np.split(order, EXACT["minibatches"]):
                tokens, norms = self.step(rows, indices, next(texts), lr_scale)
                steps.append(tokens)
        for name in steps[0]:
            metrics[name] = torch.cat([tokens[name] for tokens in steps]).mean().item()
        metrics["ratio_max"] = max(tokens["ratio_mean"].max().item() for tokens in steps)
        metrics["actor_grad_norm"], metrics["critic_grad_norm"] = norms  # of the last step
        metrics["actor_lr"] = EXACT["actor_lr"] * lr_scale
        metrics["steps"] = len(steps)
        return metrics


def token_rows(batch):
    """A Batch's rows as (prompt ids, answer ids, mask)."""
    rows = []
    for i, tokens in enumerate(batch.tokens.tolist()):
        p = int(batch.prompt_lens[i])
        a = int(batch.answer_lens[i])
        rows.append((tokens[:p], tokens[p : p + a], batch.mask[i, :a]))
    return rows


def punch_holes(monkeypatch):
    """In the last rollout the second, fifth, ... token of each answer is not the policy's."""
    real = ppo.rollout
    rollouts = []

    def rollout(*arguments):
        batch = real(*arguments)
        if len(batch) == EXACT["batch_size"]:  # and not an evaluation
            rollouts.append(batch)
        if len(rollouts) == EXACT["iterations"]:
            batch.mask &= torch.arange(batch.mask.size(1)) % 3 != 1
        return batch

    monkeypatch.setattr(ppo, "rollout", rollout)
    return rollouts


def texts_of_many_lengths():
    """60 rows of plain text, from 4 to 50 characters."""
    line = "the line of a text that goes on for a while, or not"
    return [{"text": f"{i} {line[: 2 + i * 7 % 47]}"} for i in range(60)]


def texts_of_steps(source, tokenizer):
    """The mixture's rows for one optimizer step after another."""
    flags = dict(max_len=64, batch_size=EXACT["batch_size"] // EXACT["minibatches"])
    rows, batches = rows_of_steps(source, "sft", flags, tokenizer, ["response"])
    for _, indices in batches:
        yield [(rows.prompt(i), rows.answer(i, "response")) for i in indices]


def test_ppo_takes_the_steps_of_a_second_version(
        chain, toy_file, tok, tmp_path, started, monkeypatch):
    rollouts = punch_holes(monkeypatch)
    monkeypatch.setattr(ppo, "STOP_KL", 1e9)
    rules = tmp_path / "rules.py"
    rules.write_text("def letters(completions):\n    return [len(c) for c in completions]\n")
    sft_folder = chain["sft"][0]
    reward_folder = chain["reward"][0]
    text = write_rows(tmp_path / "text.jsonl", texts_of_many_lengths())
    flags = EXACT | dict(
        held_out=0.2, max_len=64, data=toy_file, model=sft_folder, ptx_data=text,
        reward=f"{reward_folder},{rules}:letters:0.3")
    metrics = train(ppo, tmp_path / "ppo", **flags)
    (actor, actor_start), (critic, critic_start) = started
    assert len(rollouts) == EXACT["iterations"]

    second = ExactPPO(sft_folder, reward_folder, tok)
    texts = texts_of_steps(text, tok)
    for number, batch in enumerate(rollouts, 1):
        expected = second.iteration(number, token_rows(batch), texts)
        for name, value in expected.items():
            assert metrics[number][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
        assert expected["clip_frac"] > 0.05, "the clip has something to do"
        assert expected["value_clip_frac"] > 0.05
    assert distance(actor.lm, second.actor, actor_start.lm) < 1e-4
    assert distance(critic.model, second.critic.model, critic_start.model) < 1e-4
    saved = models.load_lm(str(tmp_path / "ppo"), torch.float32)
    assert distance(saved, second.actor, actor_start.lm) < 1e-4
    saved_ema = models.load_lm(str(tmp_path / "ppo" / "ema"), torch.float32)
    assert distance(saved_ema, second.ema, actor_start.lm) < 1e-4


# -----------------------------------------------------------------------------
# the three steps, run


def read_samples(folder):
    """The rows of a run's samples.jsonl."""
    return [json.loads(line) for line in open(Path(folder) / "samples.jsonl")]


@pytest.fixture
def flags(chain, toy_file):
    """PPO from the models of `chain`: three iterations of two epochs of two steps."""
    return dict(PPO_STEPS, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file)


@pytest.fixture
def one_step(flags):
    """PPO with a single optimizer step."""
    return dict(flags, iterations=1, minibatches=1, ppo_epochs=1)


def test_every_step_logs_finite_numbers_and_the_metrics_that_its_reader_needs(chain):
    for step in ("sft", "reward"):
        for row in chain[step][1]:  # what is not finite is not logged
            assert {"loss", "grad_norm", "lr"} <= set(row), step
    for folder, _ in chain.values():
        run = json.load(open(Path(folder) / "run.json"))
        assert run["config"]["batch_size"] == 8
        assert run["versions"]["torch"] == torch.__version__

    folder, metrics = chain["ppo"]
    assert len(metrics) == 4, "the evaluation before training, and three iterations"
    needed = {
        "score", "score_std", "score_clipped", "kl", "kl_k3", "kl_coef", "entropy", "ratio_mean",
        "ratio_max", "clip_frac", "value_clip_frac", "approx_kl", "explained_variance",
        "advantage_mean", "advantage_std", "eos_rate", "length", "actor_grad_norm",
        "critic_grad_norm", "engine_gap_mean", "engine_gap_max", "tokens_per_s", "memory_gib",
        "rollout_s", "score_s", "update_s", "actor_loss", "critic_loss", "return_mean", "steps",
        "skipped", "actor_lr"}
    for row in metrics[1:]:
        assert needed <= set(row), needed - set(row)
    samples = read_samples(folder)
    assert len(samples) == 3 * 8
    assert {"iteration", "prompt", "answer", "score", "kl", "eos"} <= set(samples[0])
    first = metrics[1]
    assert abs(first["kl"]) < 1e-3, "before the first update actor and reference are one"
    assert first["engine_gap_max"] < 1e-4, "and so are sampler and trainer"


def test_what_is_logged_of_an_iteration_is_what_its_samples_show(chain):
    folder, metrics = chain["ppo"]
    samples = read_samples(folder)
    for row in metrics[1:]:
        own = [sample for sample in samples if sample["iteration"] == row["step"]]
        assert row["score"] == pytest.approx(np.mean([s["score"] for s in own]), abs=1e-3)
        assert row["kl"] == pytest.approx(np.mean([s["kl"] for s in own]), abs=1e-3)
        assert row["eos_rate"] == pytest.approx(np.mean([s["eos"] for s in own]))
        assert row["kl_coef"] == 0.05


def test_demonstrations_become_likelier(chain):
    losses = [row["loss"] for row in chain["sft"][1]]
    assert losses[-1] < 0.6 * losses[0]


def test_the_reward_model_learns_which_answer_was_chosen(chain, tmp_path):
    rows = []
    for i in range(100):
        rows.append({"prompt": f"number {i}", "chosen": "good", "rejected": "bad"})
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    metrics = train(
        reward, tmp_path / "rm", data=pairs, model=chain["sft"][0], epochs=3, **STEPS)
    assert metrics[-1]["held_out_accuracy"] == 1
    assert metrics[-1]["held_out_margin"] > 1
    assert metrics[-1]["margin"] > metrics[0]["margin"] + 1


def test_the_reward_model_learns_a_ranking_of_four(chain, tmp_path):
    rows = []
    for i in range(100):
        answers = ["best", "good", "fair", "poor"]
        scores = [4, 3, 2, 1]
        turn = i % 4
        answers = answers[turn:] + answers[:turn]
        scores = scores[turn:] + scores[:turn]
        rows.append({"prompt": f"number {i}", "answers": answers, "scores": scores})
    path = write_rows(tmp_path / "rankings.jsonl", rows)
    metrics = train(reward, tmp_path / "rm", data=path, model=chain["sft"][0], epochs=5, **STEPS)
    assert metrics[-1]["held_out_accuracy"] > 0.95 and metrics[-1]["held_out_tau"] > 0.9
    assert metrics[0]["accuracy"] < 0.9, "at the start it does not know"


def test_what_is_rewarded_becomes_likelier(flags, tmp_path):
    rules = tmp_path / "rules.py"
    rules.write_text("def short(completions):\n    return [-float(len(c)) for c in completions]\n")
    more = dict(batch_size=32, iterations=10, actor_lr=3e-3, reward=f"{rules}:short:0.5")
    metrics = train(ppo, tmp_path / "ppo", **(flags | more))
    scores = [row["score"] for row in metrics[1:]]
    assert np.mean(scores[-2:]) > np.mean(scores[:2]) + 0.5
    assert metrics[-1]["length"] < metrics[1]["length"]


def mini_rows():
    return [{"prompt": f"copy {i}"} for i in range(200)]


def mini_check(prompts, completions):
    return [float("7" not in prompt) for prompt in prompts]


def test_gold_is_what_the_checker_says_of_answers_that_ended(one_step, tmp_path, monkeypatch):
    mini = tasks.Task(rows=mini_rows, check=mini_check)
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, "mini": mini})
    metrics = train(ppo, tmp_path / "p", **(one_step | dict(data="mini", batch_size=32)))
    samples = read_samples(tmp_path / "p")
    for sample in samples:
        is_right = sample["eos"] and "7" not in sample["prompt"]
        assert sample["gold"] == float(is_right)
    cases = {(sample["eos"], sample["gold"]) for sample in samples}
    assert cases == {(False, 0.0), (True, 0.0), (True, 1.0)}, "all cases occur"
    assert metrics[1]["gold"] == pytest.approx(np.mean([s["gold"] for s in samples]))
    assert 0 < metrics[1]["eval_gold"] < 1
    assert "eval_ema_gold" in metrics[1]


def record_rollouts(monkeypatch):
    """A list that ppo.rollout will fill: (lengths of the prompts, seeds, Batch) of each call."""
    calls = []
    real = ppo.rollout

    def rollout(sampler, rows, indices, seeds, cfg, tokenizer):
        batch = real(sampler, rows, indices, seeds, cfg, tokenizer)
        calls.append(([len(rows.prompt(i)) for i in indices], list(seeds), batch))
        return batch

    monkeypatch.setattr(ppo, "rollout", rollout)
    return calls


def test_rollouts_are_random_in_order_and_every_answer_has_a_seed_of_its_own(
        flags, tmp_path, monkeypatch):
    calls = record_rollouts(monkeypatch)
    more = dict(iterations=2, batch_size=16, ema=0.0)
    for seed in (1, 2):
        train(ppo, tmp_path / f"{seed}", **(flags | more), seed=seed)
    rollouts = [call for call in calls if len(call[1]) == 16]
    evaluations = [call for call in calls if len(call[1]) != 16]
    assert len(rollouts) == 4
    seeds = []
    for prompt_lens, own_seeds, _ in rollouts:
        message = "a step of the first epoch has no other lengths than another"
        assert prompt_lens != sorted(prompt_lens), message
        seeds += own_seeds
    assert len(set(seeds)) == 4 * 16, "and other ones with another --seed"
    for prompt_lens, own_seeds, _ in evaluations:
        assert own_seeds == [2**31 + i for i in range(len(prompt_lens))], "always the same"


def test_the_critic_starts_as_the_reward_model(chain, flags, tmp_path, monkeypatch):
    values = []
    real = ppo.gae

    def gae(batch_values, *arguments):
        values.append(batch_values.clone())
        return real(batch_values, *arguments)

    monkeypatch.setattr(ppo, "gae", gae)
    calls = record_rollouts(monkeypatch)
    train(ppo, tmp_path / "p", **(flags | dict(iterations=1, batch_size=16, ema=0.0)))
    [batch] = [batch for _, seeds, batch in calls if len(seeds) == 16]
    critic = RewardModel.from_pretrained(chain["reward"][0]).eval()
    with torch.no_grad():
        expected = ppo.answer_values(critic, batch)
    torch.testing.assert_close(values[0], expected, rtol=1e-4, atol=1e-5)


def test_the_epochs_on_a_rollout_end_where_the_policy_has_moved_too_far(
        flags, tmp_path, monkeypatch):
    steps = {}
    for limit in (1e9, 0.0):
        monkeypatch.setattr(ppo, "STOP_KL", limit)
        metrics = train(ppo, tmp_path / f"{limit}", **(flags | dict(iterations=1, ema=0.0)))
        steps[limit] = metrics[1]["steps"]
    assert steps == {1e9: 4, 0.0: 2}, "the first step sees no change yet; the second does"


def test_both_learning_rates_fall_linearly_to_a_tenth_and_a_run_has_four_evaluations(
        flags, tmp_path, monkeypatch):
    rates = []
    real = training.set_lr

    def set_lr(engine, lr):
        rates.append((engine, lr))
        real(engine, lr)

    monkeypatch.setattr(training, "set_lr", set_lr)
    more = dict(batch_size=2, iterations=12, minibatches=1, ppo_epochs=1, max_new_tokens=2)
    metrics = train(
        ppo, tmp_path / "p", **(flags | more), actor_lr=3e-4, critic_lr=1e-3, ema=0.0)
    shares = [max(0.1, 1 - done / 12) for done in range(12)]
    actor = rates[0][0]
    critic = rates[1][0]
    assert hasattr(actor.module, "lm")
    assert not hasattr(critic.module, "lm")
    assert [lr for engine, lr in rates if engine is actor] == [3e-4 * s for s in shares]
    assert [lr for engine, lr in rates if engine is critic] == [1e-3 * s for s in shares]
    assert [row["actor_lr"] for row in metrics[1:]] == [3e-4 * s for s in shares]
    evaluated = [row["step"] for row in metrics if "eval_score" in row]
    assert evaluated == [0, 3, 6, 9, 12], "besides the one at its start"


def test_in_its_warmup_only_the_critic_learns(flags, tmp_path):
    flags = flags | dict(iterations=3, ema=0.0)
    metrics = train(ppo, tmp_path / "p", **flags, critic_warmup=2)
    plain = train(ppo, tmp_path / "plain", **flags)
    assert [row["actor_lr"] > 0 for row in metrics[1:]] == [False, False, True]
    assert [row["approx_kl"] == 0 for row in metrics[1:]] == [True, True, False]
    assert [row["approx_kl"] == 0 for row in plain[1:]] == [False, False, False]
    assert metrics[2]["critic_loss"] < metrics[1]["critic_loss"]


def test_a_scorer_that_is_called_like_a_column_keeps_both(one_step, tmp_path):
    rules = tmp_path / "rules.py"
    rules.write_text("def kl(completions):\n    return [float(len(c)) for c in completions]\n")
    reward_flag = f"{one_step['reward']},{rules}:kl"
    train(ppo, tmp_path / "p", **(one_step | dict(reward=reward_flag)))
    for sample in read_samples(tmp_path / "p"):
        assert sample["kl_"] == len(sample["answer"]) and abs(sample["kl"]) < 1


def test_a_process_reward_is_given_at_its_tokens_and_its_sum_is_the_score(
        one_step, tmp_path, monkeypatch):
    rules = tmp_path / "rules.py"
    rules.write_text(
        "def each(completion_ids):\n"
        "    return [[float(i % 3) for i in ids] for ids in completion_ids]\n"
        "def first(completions):\n"
        "    return [{0: len(c) / 9} for c in completions]\n"
        "def total(completion_ids):\n"
        "    return [float(sum(i % 3 for i in ids)) for ids in completion_ids]\n")
    calls = record_rollouts(monkeypatch)
    flags = one_step | dict(kl_coef=0.0)
    reward_flag = f"{rules}:each,{rules}:first"
    metrics = train(ppo, tmp_path / "p", **(flags | dict(reward=reward_flag)))
    batch = next(batch for _, _, batch in calls if batch.rewards is not None)
    tokens = [batch.tokens[i, p : p + a].tolist() for i, (p, a) in enumerate(
        zip(batch.prompt_lens.tolist(), batch.answer_lens.tolist()))]
    each = [[i % 3 for i in ids] for ids in tokens]
    first = [len(answer) / 9 for answer in batch.answers]
    assert batch.scores["each"].tolist() == pytest.approx([sum(row) for row in each])
    assert batch.scores["first"].tolist() == pytest.approx(first)
    std_each = np.std([sum(row) for row in each], ddof=1)
    std_first = np.std(first, ddof=1)
    for i, row in enumerate(each):
        rewards = [x / std_each for x in row[:-1]]
        if rewards:
            rewards[0] += first[i] / std_first
        got = batch.rewards[i, : len(rewards)].tolist()
        assert got == pytest.approx(rewards, abs=1e-4), "and the rest stands at the last token"
    total = train(ppo, tmp_path / "t", **(flags | dict(reward=f"{rules}:total,{rules}:first")))
    assert metrics[0]["eval_score"] == pytest.approx(total[0]["eval_score"])
    assert metrics[1]["score"] == pytest.approx(total[1]["score"])


def test_several_answers_to_a_prompt_stand_side_by_side_and_differ(flags, tmp_path, monkeypatch):
    calls = record_rollouts(monkeypatch)
    more = dict(iterations=2, batch_size=16, max_new_tokens=8, answers_per_prompt=4)
    train(ppo, tmp_path / "p", **(flags | more))
    batches = [batch for _, _, batch in calls if len(batch) == 16]
    assert len(batches) == 2
    for batch in batches:
        groups = [set(batch.prompts[i : i + 4]) for i in range(0, 16, 4)]
        assert all(len(group) == 1 for group in groups), "the same prompt"
        assert len(set.union(*groups)) == 4, "of each group another"
        for i in range(0, 16, 4):
            assert len(set(batch.answers[i : i + 4])) > 1, "not the same answer"
    assert not set(batches[0].prompts) & set(batches[1].prompts), "an epoch has each prompt once"


def test_an_evaluation_is_the_mean_over_held_out_prompts_with_its_standard_error(
        one_step, tmp_path, monkeypatch):
    calls = record_rollouts(monkeypatch)
    metrics = train(ppo, tmp_path / "p", **(one_step | dict(ema=0.0)))
    _, seeds, batch = calls[0]
    n = len(seeds)
    assert 30 < n < 60, "all held-out prompts, of which there are few"
    [scores] = [scores.tolist() for scores in batch.scores.values()]
    row = metrics[0]
    assert row["eval_score"] == pytest.approx(np.mean(scores), rel=1e-4)
    assert row["eval_score_se"] == pytest.approx(np.std(scores, ddof=1) / n**0.5, rel=1e-4)
    log_ratio = (batch.sample_logprobs - batch.ref_logprobs)[batch.mask]
    assert row["eval_kl"] == pytest.approx(log_ratio.sum().item() / n, abs=1e-5)


def test_chosen_answers_score_zero_on_average_and_scores_have_variance_one(chain, toy_file, tok):
    rows, _ = data.load(toy_file, "reward", "", 0.2, TEMPLATE, tok, 512)
    reward_model = RewardModel.from_pretrained(chain["reward"][0])
    scores = {}
    for which in ("chosen", "rejected"):
        sequences = [rows.prompt(i) + rows.answer(i, which) for i in range(len(rows))]
        with torch.no_grad():
            scores[which] = reward_model.score(*data.pad(sequences))
    assert abs(scores["chosen"].mean()) < 0.1
    assert abs(torch.cat([scores["chosen"], scores["rejected"]]).std() - 1) < 0.1


# With gradient checkpointing a model trains in training mode.
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_first_ratio_is_exactly_one_in_spite_of_dropout_in_the_config(
        gradient_checkpointing, chain, flags, tmp_path):
    for step in ("sft", "reward"):
        shutil.copytree(chain[step][0], tmp_path / step)
        path = tmp_path / step / "config.json"
        config = json.loads(path.read_text())
        assert config["attention_dropout"] == 0.0
        path.write_text(json.dumps({**config, "attention_dropout": 0.1}))
    more = dict(
        model=str(tmp_path / "sft"), reward=str(tmp_path / "reward"), iterations=2, ppo_epochs=1,
        actor_lr=0.0, temperature=0.7, micro_batch=3,
        gradient_checkpointing=gradient_checkpointing)
    metrics = train(ppo, tmp_path / "ppo", **(flags | more))
    for row in metrics[1:]:
        assert row["ratio_max"] == 1, "in float32: exactly, at any temperature"
        assert row["ratio_mean"] == 1
        assert row["clip_frac"] == 0
        assert row["approx_kl"] == 0
        assert abs(row["kl"]) < 1e-5, "the reference has the temperature in it too"
        assert row["engine_gap_max"] < 1e-4, "and so has the sampler"


def test_with_one_update_per_iteration_the_ratio_is_1_without_a_forward_before_it(
        flags, tmp_path, monkeypatch):
    calls = []
    real = models.Policy.forward

    def forward(self, *arguments):
        calls.append(self.training or torch.is_grad_enabled())
        return real(self, *arguments)

    monkeypatch.setattr(models.Policy, "forward", forward)
    metrics = train(ppo, tmp_path / "a", **(flags | dict(ppo_epochs=1, minibatches=1)))
    for row in metrics[1:]:
        assert row["ratio_max"] == 1
        assert row["engine_gap_max"] < 1e-4
    assert calls.count(True) == 3, "one forward of the actor per iteration, in the update"
    # the reference: in each iteration once, in 2 micro batches at 5 evaluations
    assert calls.count(False) == 3 + 5 * 2


def test_ppo_also_runs_on_the_slow_path(flags, tmp_path):
    metrics = train(ppo, tmp_path / "p", **(flags | dict(iterations=1, engine="hf")))
    assert metrics[1]["engine_gap_max"] < 1e-3
    assert metrics[1]["engine_generate_s"] > 0


def test_an_unfinished_answer_loses_exactly_the_penalty_and_its_logged_score_does_not(
        flags, tmp_path, monkeypatch):
    last_rewards = {}
    samples = {}
    real = ppo.estimate_advantages

    def estimate_advantages(batch, scorers, cfg):
        metrics = real(batch, scorers, cfg)
        kl = cfg.kl_coef * (batch.old_logprobs - batch.ref_logprobs)
        last_rewards[ppo.EOS_PENALTY] = (batch.rewards + kl * batch.mask).sum(1).tolist()
        return metrics

    monkeypatch.setattr(ppo, "estimate_advantages", estimate_advantages)
    more = dict(iterations=1, batch_size=32, max_new_tokens=4)
    for penalty in (0.0, 2.5):
        monkeypatch.setattr(ppo, "EOS_PENALTY", penalty)
        train(ppo, tmp_path / f"{penalty}", **(flags | more))
        samples[penalty] = read_samples(tmp_path / f"{penalty}")
    assert {sample["eos"] for sample in samples[0.0]} == {True, False}
    for row, (a, b) in enumerate(zip(samples[0.0], samples[2.5])):
        expected = 0 if a["eos"] else 2.5
        lost = last_rewards[0.0][row] - last_rewards[2.5][row]
        assert lost == pytest.approx(expected, abs=1e-3)
        assert a["score"] == b["score"] == pytest.approx(last_rewards[0.0][row], abs=1e-3)


# -----------------------------------------------------------------------------
# scorers


@pytest.mark.parametrize("text, expected", [
    ("out/reward", [("out/reward", 1.0)]),
    ("out/reward:0.5", [("out/reward", 0.5)]),
    ("rules.py:short", [("rules.py:short", 1.0)]),
    ("a, rules.py:short:-2 ,toy:1e-1", [("a", 1.0), ("rules.py:short", -2.0), ("toy", 0.1)]),
    ("rules.py:short:half", [("rules.py:short:half", 1.0)]),  # tasks.py will say what is wrong
])
def test_reward_is_a_list_of_sources_with_optional_weights(text, expected):
    assert ppo.parse_reward(text) == expected


@pytest.mark.parametrize("text", ["a,,b", ",", ":0.5", "out/reward:nan", "out/reward:inf"])
def test_a_scorer_without_a_source_or_with_a_weight_that_is_no_number_gets_one_sentence(text):
    with pytest.raises(utils.UserError, match="is not a reward model folder, file.py:function"):
        ppo.parse_reward(text)


RULES = """
def length(prompts, completions):
    return [len(c) for c in completions]

def near(completions, target, **kwargs):
    assert "prompts" in kwargs
    return [-abs(len(c) - t) for c, t in zip(completions, target)]

def fails(prompts):
    return [1 / ("sort" not in p) for p in prompts]

def no_number(prompts):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


def test_a_function_can_be_the_reward_alone_or_beside_the_model(one_step, rules, tmp_path):
    samples = {}
    model = one_step["reward"]
    for name, spec in (
            ("alone", f"{rules}:length"), ("beside", f"{model},{rules}:length:0.5"),
            ("model", model)):
        train(ppo, tmp_path / name, **(one_step | dict(reward=spec)))
        samples[name] = read_samples(tmp_path / name)
    for a, b, c in zip(samples["alone"], samples["beside"], samples["model"]):
        assert a["answer"] == b["answer"] == c["answer"], "the first rollout is the same"
        assert a["score"] == len(a["answer"])
        assert b["score"] == pytest.approx(c["score"] + 0.5 * len(a["answer"]), abs=1e-3)
        assert b["reward"] == pytest.approx(c["score"], abs=1e-3)
        assert b["length"] == len(b["answer"])


def test_two_reward_models_and_a_function_that_reads_a_field_are_logged_apart(
        chain, one_step, rules, tmp_path, monkeypatch):
    other = tmp_path / "reward"  # of the same name as the first: the second one gets another
    shutil.copytree(chain["reward"][0], other)
    config = json.loads((other / "config.json").read_text())
    config["score_offset"] += 1.0
    (other / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": f"copy {i}", "target": i % 7} for i in range(120)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    spec = f"{chain['reward'][0]}:0.5,{other}:-2,{rules}:near:0.25"
    metrics = train(ppo, tmp_path / "p", **(one_step | dict(data=source, reward=spec)))

    samples = read_samples(tmp_path / "p")
    shift = 1.0 * config["score_scale"]
    for sample in samples:
        number = int(sample["prompt"].split("copy ")[1].split("\n")[0])
        assert sample["near"] == -abs(len(sample["answer"]) - number % 7), "its row's own field"
        assert sample["reward_"] == pytest.approx(sample["reward"] - shift, abs=1e-3)
        total = 0.5 * sample["reward"] - 2 * sample["reward_"] + 0.25 * sample["near"]
        assert sample["score"] == pytest.approx(total, abs=1e-3)
    for name in ("reward", "reward_", "near"):
        values = [sample[name] for sample in samples]
        assert metrics[1][f"score_{name}"] == pytest.approx(np.mean(values), abs=1e-3)
        assert metrics[1][f"score_{name}_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-3)
    mean = np.mean([sample["score"] for sample in samples])
    assert metrics[1]["score"] == pytest.approx(mean, abs=1e-3)


def test_a_function_that_fails_in_a_run_gets_one_sentence(one_step, rules, tmp_path):
    for name, message in (
            ("fails", r"raised ZeroDivisionError\(.*\) for prompt 'Human: sort"),
            ("no_number", "gave nan for prompt 'Human"),
            ("absent", "has no function 'absent'")):
        with pytest.raises(utils.UserError, match=message):
            more = dict(reward=f"{rules}:{name}", batch_size=32)
            train(ppo, tmp_path / name, **(one_step | more))


def test_scores_that_are_mostly_clipped_get_a_warning(one_step, rules, tmp_path, capsys):
    train(ppo, tmp_path / "p", **(one_step | dict(reward=f"{rules}:length:10")))
    printed = capsys.readouterr().out
    assert re.search(r"warning: \d+% of the normalized scores are outside \+-5.0", printed)


def test_scorers_are_normalized_by_the_first_rollout_unless_they_come_with_statistics(chain):
    batch = batch_of()
    g = torch.Generator().manual_seed(3)
    far_off = torch.randn(5, generator=g) * 20 - 30
    batch.scores = {"rule": far_off, "model": torch.randn(5, generator=g)}
    model = models.RewardModel.from_pretrained(chain["reward"][0])
    scorers = [ppo.Scorer("rule", 2.0, function=len), ppo.Scorer("model", 0.5, model=model)]
    assert torch.equal(
        ppo.normalized_score(batch, scorers), ppo.total_score(batch, scorers)), "nothing fitted yet"
    ppo.fit_normalization(batch, scorers)
    normalized = (far_off - far_off.mean()) / far_off.std()
    torch.testing.assert_close(
        ppo.normalized_score(batch, scorers), 2.0 * normalized + 0.5 * batch.scores["model"])

    state = json.loads(json.dumps(ppo.run_state(ppo_mix_of_no_text(), {}, scorers)))
    fresh = [ppo.Scorer("rule", 2.0, function=len), ppo.Scorer("model", 0.5, model=model)]
    ppo.restore_normalization(fresh, state)
    assert [(s.mean, s.std) for s in fresh] == [(s.mean, s.std) for s in scorers]


@pytest.mark.parametrize("value", [0.25, 0.1, -1 / 3])  # the float32 std of 0.1's is above 0
@pytest.mark.parametrize("n", [1, 5, 512])
def test_a_scorer_whose_scores_are_all_equal_teaches_nothing(value, n):
    batch = batch_of()
    batch.scores = {"rule": torch.full((n,), value)}
    rule = ppo.Scorer("rule", 2.0, function=len)
    with pytest.raises(utils.UserError, match=f"rule: all {n} answers .* score {value:g}, so"):
        ppo.fit_normalization(batch, [rule])


@pytest.mark.parametrize("weight, warned", [(2.0, True), (0.0, False)])
def test_a_scorer_whose_scores_are_all_equal_does_not_end_a_run_with_another(
        weight, warned, capsys):
    batch = batch_of()
    batch.scores = {"rule": torch.full((5,), 0.1), "other": torch.arange(5.0)}
    rule, other = ppo.Scorer("rule", weight, function=len), ppo.Scorer("other", 1.0, function=len)
    ppo.fit_normalization(batch, [rule, other])
    assert ("warning: --reward rule: all 5" in capsys.readouterr().out) == warned
    normalized = ppo.normalized_score(batch, [rule, other])
    np.testing.assert_allclose(normalized.mean().item(), 0, atol=1e-5)
    assert rule.std == 1.0 and other.std > 1.0


def test_only_full_credit_is_gold():
    batch = batch_of()
    batch.finished = torch.tensor([True, True, True, True, False])
    batch.prompts = batch.answers = [""] * 5
    batch.row_fields = {}
    gold = ppo.gold_accuracy(batch, lambda *_: [0.0, 0.95, 1.0, 1.0000002, 1.0])
    assert gold == [0.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("data, reward, name", [
    ("toy:1", "out/reward", "toy"), ("toy", "countdown", "toy"), ("toy,a.jsonl", "out/r", None),
    ("toy,countdown", "toy", "toy"), ("a.jsonl", "out/r", None),
    ("countdown", "toy:0.5", "countdown"),
])
def test_the_gold_accuracy_is_that_of_the_task_of_all_rows(data, reward, name):
    class Rows:
        def field_names(self):
            return ["nums", "target"]

    task = ppo.load_task(ppo.Config(data=data, reward=reward), Rows())
    assert (task and task.name) == name


def ppo_mix_of_no_text():
    return ppo.PretrainingMix(ppo.Config(), "", None, 0, 0)


def test_a_reward_model_that_reward_py_has_not_trained_is_normalized_too(chain):
    model = models.RewardModel.from_pretrained(chain["reward"][0])
    del model.model.config.score_scale
    scorer = ppo.Scorer("foreign", 1.0, model=model)
    batch = batch_of()
    batch.scores = {"foreign": torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])}
    ppo.fit_normalization(batch, [scorer])
    assert scorer.mean == 4.0
    assert scorer.std == pytest.approx(np.std([1, 2, 3, 4, 10], ddof=1))


class Killed(Exception):
    pass


def test_a_resumed_run_keeps_the_scorers_statistics_its_first_evaluation_and_its_place_in_the_text(
        flags, rules, tmp_path, monkeypatch, capsys):
    text = write_rows(tmp_path / "text.jsonl", texts_of_many_lengths())
    flags = flags | dict(reward=f"{flags['reward']},{rules}:length:0.5", ptx_data=text)
    whole = train(ppo, tmp_path / "whole", **flags)
    summary = capsys.readouterr().out.splitlines()[-1]
    real = training.Checkpoint.save

    def save(self, step, **state):
        real(self, step, **state)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.Checkpoint, "save", save)
        with pytest.raises(Killed):
            train(ppo, tmp_path / "parts", **flags)
    parts = train(ppo, tmp_path / "parts", **flags, resume=True)
    names = (
        "score", "advantage_mean", "return_mean", "critic_loss", "actor_loss", "actor_grad_norm",
        "eval_score")
    for name in names:
        assert parts[-1][name] == whole[-1][name], name
    resumed_summary = capsys.readouterr().out.splitlines()[-1]
    assert "held-out score" in summary
    assert resumed_summary.replace("/parts:", "/whole:") == summary


def test_scores_around_minus_30_train_as_well_as_others(flags, tmp_path):
    """Unnormalized they are all clipped to -5: no answer is better than another."""
    path = tmp_path / "rules.py"
    path.write_text(
        "def plain(completions):\n    return [len(c) for c in completions]\n"
        "def far_off(completions):\n    return [20 * len(c) - 300 for c in completions]\n")
    runs = []
    for name in ("plain", "far_off"):
        more = dict(reward=f"{path}:{name}", batch_size=16)
        runs.append(train(ppo, tmp_path / name, **(flags | more)))
    for plain, far_off in zip(runs[0][1:], runs[1][1:]):
        assert far_off["score"] == pytest.approx(20 * plain["score"] - 300, rel=1e-4)
        assert far_off["actor_loss"] == pytest.approx(plain["actor_loss"], abs=1e-4)
        assert far_off["score_clipped"] == plain["score_clipped"]


def test_a_kl_that_only_a_bug_can_give_gets_a_warning(capsys):
    cfg = ppo.Config()
    ppo.print_progress(batch_of(), {"score_clipped": 0.0, "kl": -0.05}, 2, cfg)
    assert "warning" not in capsys.readouterr().out
    ppo.print_progress(batch_of(), {"score_clipped": 0.0, "kl": -0.2}, 2, cfg)
    assert "warning: the mean KL is -0.20" in capsys.readouterr().out


def test_the_critic_starts_from_the_flag_else_the_first_reward_model_else_a_new_head(
        chain, rules, tmp_path, tok):
    folder = chain["reward"][0]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "score_offset": 7.0}))

    def offset(**flags):
        cfg = ppo.Config(model=chain["sft"][0], **flags)
        critic = ppo.load_critic(cfg, tok, 258, torch.float32)
        return getattr(critic.model.config, "score_offset", None)

    own = config["score_offset"]
    assert offset(reward=folder) == own
    assert offset(reward=f"{rules}:length,{folder}:0.5,{other}") == own
    assert offset(reward=folder, critic=str(other)) == 7.0
    assert offset(reward=f"{rules}:length") is None
    assert offset(reward=f"{rules}:length", critic=str(other)) == 7.0


# -----------------------------------------------------------------------------
# the mixture


def test_the_mixture_goes_on_where_a_checkpoint_left_it(tok, tmp_path):
    utils.init_distributed(0)
    text = write_rows(tmp_path / "text.jsonl", texts_of_many_lengths())
    cfg = ppo.Config(batch_size=16, minibatches=2, ptx_data=text, held_out=0.2)
    whole = ppo.PretrainingMix(cfg, TEMPLATE, tok, 64, 0)
    steps = [whole.next_step(3, 3) for _ in range(9)]  # more than an epoch
    assert whole.steps == 9
    resumed = ppo.PretrainingMix(cfg, TEMPLATE, tok, 64, 4)
    for parts, tokens in steps[4:]:
        resumed_parts, resumed_tokens = resumed.next_step(3, 3)
        assert [part.tolist() for part in resumed_parts] == [part.tolist() for part in parts]
        assert resumed_tokens == tokens
        assert [len(part) for part in parts] == [3, 3, 2]
        own = sum(len(whole.rows.answer(i, "response")) for i in np.concatenate(parts))
        assert tokens == own
    none = ppo.PretrainingMix(ppo.Config(), TEMPLATE, tok, 64, 0)
    assert none.next_step(3, 2) == ([None, None], 0)


def test_the_gradient_of_the_mixture_is_the_sum_of_its_parts_and_a_coefficient_of_0_changes_no_bit(
        one_step, tmp_path, monkeypatch):
    gradients = {}
    real_step = training.step

    def step(*engines):
        if engines[0].is_gradient_accumulation_boundary():
            parts = [p.grad.flatten().double() for p in engines[0].trained_params]
            gradients[name] = torch.cat(parts)
        return real_step(*engines)

    def no_loss(logprobs, *_):
        return (logprobs * 0).sum()

    monkeypatch.setattr(training, "step", step)
    text = write_rows(tmp_path / "text.jsonl", texts_of_many_lengths())
    mixture = dict(ptx_data=text, ptx_coef=2.5)
    for name, more in (
            ("ppo", {}), ("off", dict(ptx_data=text, ptx_coef=0.0)), ("both", mixture),
            ("split", dict(mixture, micro_batch=3)), ("text", mixture)):
        if name == "text":
            monkeypatch.setattr(ppo, "actor_loss", no_loss)
        train(ppo, tmp_path / name, **(one_step | more))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ppo", "off")]
    assert weights[0] == weights[1]
    # These are gradients before DeepSpeed clips their norm to 1.
    together = gradients["ppo"] + gradients["text"]
    torch.testing.assert_close(gradients["both"], together, rtol=1e-4, atol=1e-6)
    message = "a mean over the step's tokens, however it is split"
    torch.testing.assert_close(
        gradients["split"], gradients["both"], rtol=1e-4, atol=1e-6, msg=message)
    assert gradients["text"].norm() > 0.01
    assert gradients["ppo"].norm() > 0.01


# -----------------------------------------------------------------------------
# two ranks


def _put():
    """Each rank puts the rows of its micro batches; returns all values and which rows were its."""
    batch = batch_of()
    mine = []
    for part in utils.split_micro_batches(np.arange(4), batch.lengths.numpy(), 1):
        b = batch[part]
        batch.put(part, values=b.sample_logprobs * 2)
        mine += part.tolist()
    batch.sum_over_ranks("values")
    return batch.values, mine


def _totals():
    totals = utils.Totals()
    parts = [[[0], [1, 2, 3]], [[4], [5]]]  # of each rank
    for part in parts[torch.distributed.get_rank()]:
        add_rows(totals, part)
    totals.all_reduce()
    return totals.means()


def _rows():
    """Gathers and computes rows that two ranks hold in turns, of different number and width."""
    rank = torch.distributed.get_rank()
    whole = torch.arange(35).view(5, 7) + 1
    widths = [4, 7]
    lengths = torch.tensor([9, 8, 7, 6, 5])

    def forward(indices):
        return torch.tensor(indices)[:, None] * torch.tensor([1.0, 10.0])

    indices = np.array([4, 2, 0])
    return {
        "gathered": utils.gather_rows(whole[rank::2, : widths[rank]]),
        "vector": utils.gather_rows(lengths[rank::2]),
        "computed": utils.forward_in_micro_batches(forward, indices, lengths.numpy(), 1),
        "sum": utils.sum_over_ranks(rank + 0.5, "cpu"),
    }


def _on_rank(out, flags):
    single = dict(flags, iterations=1, minibatches=1, ppo_epochs=1)
    return {
        "metrics": train(ppo, f"{out}/many", **flags),
        "single": train(ppo, f"{out}/single", **single),
        "put": _put(),
        "totals": _totals(),
        "rows": _rows(),
    }


def check_put(first, second):
    values, rows_of_first = first["put"]
    same_values, rows_of_second = second["put"]
    assert sorted(rows_of_first + rows_of_second) == [0, 1, 2, 3]
    assert torch.equal(values, same_values)
    batch = batch_of()
    expected = batch.sample_logprobs * 2 * batch.mask
    expected[4] = 0  # nobody has put it
    assert torch.equal(values * batch.mask, expected)


def check_collectives(result):
    whole = torch.arange(35).view(5, 7) + 1
    whole[::2, 4:] = 0  # rank 0 has even rows, and needs four columns
    assert torch.equal(result["rows"]["gathered"], whole)
    assert result["rows"]["vector"].tolist() == [9, 8, 7, 6, 5]
    assert result["rows"]["computed"].tolist() == [[4, 40], [2, 20], [0, 0]]
    assert result["rows"]["sum"] == 2
    assert result["totals"] == pytest.approx(naive_means(), rel=1e-6)


def check_steps(metrics, expected):
    names = (
        "actor_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm", "approx_kl",
        "entropy", "ratio_max", "score", "kl")
    for row, expected_row in zip(metrics[1:], expected[1:]):
        for name in names:
            assert row[name] == pytest.approx(expected_row[name], rel=2e-3, abs=1e-5), name
    for name in ("eval_score", "eval_score_se", "eval_kl"):
        assert metrics[0][name] == pytest.approx(expected[0][name], abs=1e-4), name


def test_two_ranks_hold_every_row_and_take_the_means_and_the_steps_of_one_process(
        flags, tmp_path):
    """In two ranks and in one process: PPO with a mixture of texts of many lengths, so that no
    rank has as many tokens as the other."""
    text = write_rows(tmp_path / "text.jsonl", texts_of_many_lengths())
    flags = flags | dict(iterations=2, ptx_data=text)
    one = train(ppo, tmp_path / "one", **flags, micro_batch=2)
    first, second = ranks(2, _on_rank, str(tmp_path / "two"), dict(flags, micro_batch=1))
    check_put(first, second)
    check_collectives(first)
    check_collectives(second)
    check_steps(first["metrics"], one)
    assert first["single"][1]["engine_gap_max"] < 1e-4, "of the rows of both ranks"
    samples = [read_samples(tmp_path / folder) for folder in ("one", "two/many")]
    for a, b in zip(*samples):
        assert (a["prompt"], a["answer"]) == (b["prompt"], b["answer"])
