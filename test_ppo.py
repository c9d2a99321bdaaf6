"""The specification of steps 2 and 3: the losses, the formulas of PPO, the record of a rollout,
what the scripts do with them, and what they log. Beside each formula stands a naive second version
of it, in plain loops over one row.

    pytest test_ppo.py -k formula       # one part
"""
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

from testing import (  # before torch: it sets environment variables
    HERE, TEMPLATE, model_of, ragged, ranks, train, write_rows)

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
        one, _ = reward.pair_scores(model, rows, range(9), 1, "cpu")
        four, slots = reward.pair_scores(model, rows, range(9), 4, "cpu")
    torch.testing.assert_close(one, torch.tensor(one_by_one).view(9, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-5)
    real_tokens = 0
    for i in range(9):
        real_tokens += 2 * len(rows.prompt(i))
        real_tokens += len(rows.answer(i, "chosen")) + len(rows.answer(i, "rejected"))
    assert real_tokens <= slots < 1.3 * real_tokens, "the padding is counted too"


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
    [1, 1, 0, 0, 1, 1, 1],  # a tool's words between two turns
    [1, 0, 1, 0, 1, 0, 1],
    [0, 0, 1, 1, 0, 0, 0],  # a forced beginning
    [1, 1, 1, 1, 0, 0, 0],
    [0, 1, 0, 0, 0, 1, 0],  # the last word is not the policy's
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
    prompt_lens, answer_lens = torch.tensor([3, 5]), torch.tensor([4, 1])
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
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        setattr(batch, name, torch.randn(5, 7, generator=g))
    batch.kl = torch.randn(5, generator=g)
    batch.scores = {"a": torch.randn(5, generator=g), "b": torch.randn(5, generator=g)}

    rows = np.array([4, 2])
    part = batch[rows]
    assert len(part) == 2
    T, A = 7, 4  # the longer of 4 + 3 and 3 + 4; the longer of 3 and 4
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
    batch.put(np.array([1]), values=torch.arange(7.0)[None], logprobs=torch.ones(1, 7))
    expected = torch.zeros(5, 7)
    expected[3, 0] = 1
    expected[0, :2] = torch.tensor([2.0, 3.0])
    expected[1] = torch.arange(7.0)
    assert torch.equal(batch.values, expected)
    assert batch.logprobs.sum() == 7
    assert batch.ref_logprobs is None


def test_on_one_rank_a_sum_over_ranks_changes_nothing():
    utils.init_distributed(0)
    batch = batch_of()
    batch.put(np.arange(5), values=torch.randn(5, 7))
    before = batch.values.clone()
    batch.sum_over_ranks("values", "logprobs")  # no logprobs yet: nothing to do
    assert torch.equal(batch.values, before)
    assert batch.logprobs is None


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
    """Rank and world size as a function that only asks for them sees them."""
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


def test_a_rank_computes_its_share_of_a_step_in_micro_batches_of_at_most_the_size_asked_for(
        monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    as_rank(monkeypatch, 0, 2)
    assert utils.micro_batch_size(16, 0) == (8, 1)
    assert utils.micro_batch_size(16, 3) == (3, 3)
    assert utils.micro_batch_size(16, 8) == (8, 1)
    assert utils.micro_batch_size(16, 99) == (8, 1)


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


def _on_rank():
    utils.init_distributed(0)
    return {"put": _put(), "totals": _totals(), "rows": _rows()}


def test_two_ranks_together_hold_every_row_in_order_and_the_means_over_all_tokens():
    first, second = ranks(2, _on_rank)

    values, rows_of_first = first["put"]
    same_values, rows_of_second = second["put"]
    assert sorted(rows_of_first + rows_of_second) == [0, 1, 2, 3]
    assert torch.equal(values, same_values)
    batch = batch_of()
    expected = batch.sample_logprobs * 2 * batch.mask
    expected[4] = 0  # nobody has put it
    assert torch.equal(values * batch.mask, expected)

    whole = torch.arange(35).view(5, 7) + 1
    whole[::2, 4:] = 0  # rank 0 has even rows, and needs four columns
    for result in (first, second):
        assert result["totals"] == pytest.approx(naive_means(), rel=1e-6)
        assert torch.equal(result["rows"]["gathered"], whole)
        assert result["rows"]["vector"].tolist() == [9, 8, 7, 6, 5]
        assert result["rows"]["computed"].tolist() == [[4, 40], [2, 20], [0, 0]]
        assert result["rows"]["sum"] == 2


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
