# -----------------------------------------------------------------------------
# 5. formulas and phases. Each formula has a naive second version here: plain loops over one row, a
# list of floats without padding. A row with holes must give what the row without them gives.
from prelude import *
from prelude import long, some

from types import SimpleNamespace

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


def random_tensors(rows, count=4):
    """The mask of these rows, and random tensors (B, A), which are not 0 outside of it."""
    mask = torch.tensor(rows, dtype=torch.bool)
    g = torch.Generator().manual_seed(0)
    return mask, [torch.randn(mask.shape, generator=g, dtype=torch.float64) for _ in range(count)]


def pairs_by_hand(scores, ranks):
    """The margins of a row's pairs of answers of which one is better."""
    margins = []
    for a, b in itertools.combinations([k for k, rank in enumerate(ranks) if rank], 2):
        if ranks[a] != ranks[b]:
            better, worse = (a, b) if ranks[a] < ranks[b] else (b, a)
            margins.append(scores[better] - scores[worse])
    return margins


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


def test_the_loss_of_a_ranking_is_a_mean_over_its_comparisons_and_ties_are_none():
    rows = [[1, 2, 0, 0, 0], [1, 2, 3, 4, 5], [1, 1, 2, 0, 0], [1, 2, 2, 3, 3], [1, 1, 1, 1, 2]]
    ranks = torch.tensor(rows)
    scores = 2 * torch.randn(ranks.shape, generator=torch.Generator().manual_seed(3))
    margins = [pairs_by_hand(*pair) for pair in zip(scores.tolist(), rows)]
    losses = [np.mean([math.log(1 + math.exp(-m)) for m in row]) for row in margins]
    better, worse, weights = reward.comparisons(scores, ranks)
    assert len(better) == 1 + 10 + 2 + 8 + 4, "a tie is no comparison"
    loss = reward.pairwise_loss(better, worse, weights).item()
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    plain = np.mean([math.log(1 + math.exp(-m)) for m in sum(margins, [])])
    assert reward.pairwise_loss(better, worse).item() == pytest.approx(plain, rel=1e-6)
    extreme = reward.pairwise_loss(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert extreme == 2e4, "margins of any size"


@both_masks
def test_gae_is_the_sum_of_discounted_errors_from_sampled_token_to_sampled_token(rows):
    mask, (values, rewards, *_) = random_tensors(rows)
    advantages, returns = ppo.gae(values, rewards, mask, 0.9, 0.8)
    for a, r, v, row_rewards, m in zip(advantages, returns, values, rewards, mask):
        expected = naive_gae(v[m].tolist(), row_rewards[m].tolist(), 0.9, 0.8)
        assert a[m].tolist() == pytest.approx(expected, abs=1e-9)
        assert r[m].tolist() == pytest.approx((torch.tensor(expected) + v[m]).tolist(), abs=1e-6)
    assert not advantages[~mask].any() and not returns[~mask].any(), "nothing was sampled there"
    more = ppo.gae(values + 3 * ~mask, rewards - 5 * ~mask, mask, 0.9, 0.8)
    assert torch.equal(more[0], advantages) and torch.equal(more[1], returns)
    _, returns = ppo.gae(values, rewards, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_come)


@both_masks
def test_the_clipped_score_lands_on_the_last_sampled_token_and_kl_on_sampled_tokens_only(rows):
    mask, (logprobs, ref_logprobs, *_) = random_tensors(rows)
    scores = torch.tensor([1.0, -9.0, 9.0, 0.0, -1.0], dtype=torch.float64)
    args = (scores, logprobs.requires_grad_(), ref_logprobs, mask, 0.3, 5.0)
    rewards = ppo.token_rewards(*args)
    assert not rewards.requires_grad, "KL acts through the reward, not through its gradient"
    for row, p, q, m, score in zip(rewards, logprobs.detach(), ref_logprobs, mask, scores.tolist()):
        expected = [-0.3 * x for x in (p - q)[m].tolist()]
        expected[-1] += min(max(score, -5.0), 5.0)
        assert row[m].tolist() == pytest.approx(expected, abs=1e-9)
    assert not rewards[~mask].any()


@both_masks
def test_whitening_and_means_count_sampled_tokens_only(rows):
    mask, (x, *_) = random_tensors(rows)
    x = x * 3 + 5
    values = x[mask].numpy()
    assert ppo.masked_mean(x, mask).item() == pytest.approx(values.mean())
    whitened = ppo.whiten(x, mask)
    assert whitened[mask].tolist() == pytest.approx((values - values.mean()) / values.std())
    assert not whitened[~mask].any()
    assert not ppo.whiten(x, torch.zeros_like(mask)).any(), "no token at all: no NaN"


@both_masks
def test_the_losses_are_their_formulas_over_sampled_tokens(rows):
    mask, (new, old, advantages, returns) = random_tensors(rows)
    losses = []
    errors = []
    columns = [x[mask].tolist() for x in (new, old, advantages, returns)]
    for p, q, advantage, target in zip(*columns):
        ratio = math.exp(p - q)
        losses.append(max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)))
        clipped = q + min(max(p - q, -0.3), 0.3)
        errors.append(0.5 * max((p - target) ** 2, (clipped - target) ** 2))
    loss = ppo.actor_loss(new, old, advantages, mask, 0.2).item()
    assert loss == pytest.approx(np.mean(losses))
    assert ppo.critic_loss(new, old, returns, mask, 0.3).item() == pytest.approx(np.mean(errors))


@both_masks
def test_the_losses_have_no_gradient_outside_of_the_mask_and_none_where_nothing_is_to_learn(rows):
    mask, (new, old, advantages, returns) = random_tensors(rows)
    new = (old + 0.01 * new).requires_grad_()  # inside of the clip: every sampled token counts

    def gradient(loss):
        return torch.autograd.grad(loss, new)[0] != 0

    assert torch.equal(gradient(ppo.actor_loss(new, old, advantages, mask, 0.2)), mask)
    assert torch.equal(gradient(ppo.critic_loss(new, old, returns, mask, 0.2)), mask)
    assert not gradient(ppo.actor_loss(new, old, 0 * old, mask, 0.2)).any(), "equal rewards"


def test_a_ratio_beyond_e_to_the_20_does_not_overflow():
    logprobs = torch.tensor([[0.0, -300.0]], requires_grad=True)
    old_logprobs = torch.tensor([[-300.0, 0.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = ppo.actor_loss(logprobs, old_logprobs, -torch.ones(1, 2), mask, 0.2)
    assert loss.item() == pytest.approx((math.exp(20) + 0.8) / 2, rel=1e-5)
    loss.backward()
    assert logprobs.grad.isfinite().all()


# ---- the phases, one by one


def scorer_of(name, weight=1.0, **more):
    return ppo.Scorer(name, name, weight, **more)


class Table:
    """An engine whose model has these log-probabilities, one tensor (B, A) after another."""

    def __init__(self, tables):
        self.tables = tables

    def __call__(self, tokens, prompt_lens, answer_lens, temperature):
        logprobs = self.tables.pop(0)[: len(tokens)].clone().requires_grad_()
        return logprobs, -logprobs

    def backward(self, loss):
        loss.backward()


@pytest.mark.parametrize("moved, norms, steps", [
    ([0.05, 0.09, 0.11, 0.0], [1.0, None, 2.0, 1.0], 3), ([0.09] * 4, [1.0] * 4, 4)])
def test_epochs_end_once_the_policy_has_moved_a_tenth_of_a_nat_and_ema_takes_real_steps_only(
        moved, norms, steps, monkeypatch):
    utils.init_distributed(0)
    ones = torch.ones(5, 7)
    mask = torch.tensor(WHOLE_ROWS, dtype=torch.bool)
    lengths = torch.full((5,), 7)
    batch = ppo.Batch(torch.zeros(5, 9).long(), lengths - 5, lengths, mask, mask[:, 0], 0 * ones,
                      old_logprobs=-ones, advantages=ones)
    # The change x of a log-probability of which exp(x) - 1 - x is this large.
    changes = [next(x for x in np.arange(0, 1, 1e-5) if math.exp(x) - 1 - x >= kl) for kl in moved]
    actor = Table([x - ones for x in changes])
    updates = []
    left = list(norms)
    monkeypatch.setattr(utils, "step", lambda *engines: [left.pop(0)])
    ema = SimpleNamespace(update=lambda: updates.append(1))
    metrics = ppo.update(batch, [np.arange(5)] * 4, actor, None, ema, None, ppo.Config(), 5, 1)
    assert 4 - len(actor.tables) == steps
    assert metrics["approx_kl"] == pytest.approx(np.mean(moved[:steps]), abs=1e-4)
    assert metrics["actor_grad_norm"] == norms[steps - 1], "of the last step"
    assert metrics["ratio_max"] == pytest.approx(math.exp(max(changes)), rel=1e-5)
    assert metrics["engine_gap_max"] == metrics["engine_gap_mean"] == pytest.approx(1)
    assert len(updates) == steps - norms[:steps].count(None)


def test_a_rollout_says_what_was_sampled_and_its_texts_hold_all_tokens_but_the_end(tok):
    utils.init_distributed(0)
    end, pad = tok.eos_token_id, tok.pad_token_id  # <pad>: a special token that a policy may say
    prompts = [tok(text)["input_ids"] for text in ("a", "bc<pad>", "d")]
    rows = data.Rows()
    for i, prompt in enumerate(prompts):
        rows.add(prompt, [], [], {"target": 10 * i}, 0)
    answers = [[33, 34, pad, end], [35], [97]]
    said = []

    def generate(own, *arguments, **more):
        assert own == [prompts[i] for i in (1, 0, 2)]
        said.extend([*arguments, *more.values()])
        both = [np.array(prompts[i] + answers[i]) for i in (1, 0, 2)]
        lens = torch.tensor([1, 4, 1])
        tokens, lengths = data.pad(both)
        sampled = torch.arange(4) < lens[:, None]
        return hybrid_engine.Rollout(tokens, lengths - lens, lens, -1.0 * sampled, sampled)

    sampler = SimpleNamespace(generate=generate, release=lambda: said.append("released"))
    cfg = ppo.Config(max_new_tokens=4, temperature=0.7)
    batch = ppo.rollout(sampler, rows, np.array([1, 0, 2]), [5, 6, 7], cfg, tok, [end, 97])
    assert said == [4, 0.7, [end, 97], [5, 6, 7], "released"], "its memory is needed for training"
    assert batch.mask.sum(1).tolist() == batch.answer_lens.tolist() == [1, 4, 1]
    assert batch.finished.tolist() == [False, True, True], "either of the two ids ends an answer"
    assert batch.columns == {
        "prompts": ["bc<pad>", "a", "d"], "completions": ["D", "BC<pad>", ""],
        "completion_ids": [answers[i] for i in (1, 0, 2)], "target": [10, 0, 20]}


def test_a_reward_function_gets_by_name_what_its_signature_names():
    columns = {"prompts": ["p", "q"], "completions": ["", "xy"], "completion_ids": [[1], [2]],
               "answer": [["a"], ["b"]]}

    def two_names(completions, answer):
        answer[0].append("changed")
        return [len(c) for c in completions]

    async def all_of_them(prompts, **fields):
        assert set(fields) == set(columns) - {"prompts"}
        return iter([None, 2.5])

    assert ppo.call_function(two_names, columns) == [0, 2]
    assert columns["answer"] == [["a"], ["b"]], "it gets a copy"
    first, second = ppo.call_function(all_of_them, columns)
    assert math.isnan(first) and second == 2.5
    for wrong in (lambda prompts: [1.0], lambda: [1.0] * 3):
        with pytest.raises(utils.UserError, match=r"<lambda>: \d scores, 2 answers"):
            ppo.call_function(wrong, columns)
    with pytest.raises(TypeError, match="target"):
        ppo.call_function(lambda target: [0, 0], columns)


def model_with(**config):
    """What normalize reads of a model: its config."""
    return SimpleNamespace(lm=SimpleNamespace(config=SimpleNamespace(**config)))


def test_rewards_without_a_scale_get_that_of_the_first_evaluation_and_so_does_a_foreign_critic():
    ours = model_with(score_scale=2.0, score_offset=1.0)
    foreign, critic = model_with(), model_with(score_offset=7.0)
    scorers = [scorer_of("ours", model=ours), scorer_of("foreign", 0.5, model=foreign),
               scorer_of("rule", -1.0, function=len), scorer_of("logged", 0.0, function=len),
               scorer_of("one", 1.0, function=len), scorer_of("silent", 1.0, function=len)]
    before = {}
    statistics = dict(ours=(3, 3), foreign=(-30, 8), rule=(0.5, 0.1), logged=(2, 4), one=(1, 1e-8),
                      critic=(-30, 8))
    for name, (mean, std) in statistics.items():
        before |= {f"eval_{name}": mean, f"eval_{name}_std": std}
    ppo.normalize(scorers, critic, before)
    assert [(s.mean, s.std) for s in scorers] == [
        (0, 1), (-30, 8), (0.5, 0.1), (0, 1), (1, 1), (0, 1)]
    assert critic.lm.config.score_offset == -23, "logit - offset is a score: (score + 30) / 8"
    assert critic.lm.config.score_scale == 1 / 8
    ppo.normalize(scorers[:1], ours, before)
    assert (ours.lm.config.score_offset, ours.lm.config.score_scale) == (1, 2)


@pytest.mark.parametrize("mean, std, equal", [
    (0.0, 0.0, True), (-30.0, 3e-6, True), (1 / 3, 1e-8, True), (0.1, math.nan, True),
    (1e-17, 5e-17, True), (-30.0, 0.01, False), (0.0, 1e-3, False), (1e-4, 1e-4, False)])
def test_scores_that_are_equal_but_for_rounding_teach_nothing(mean, std, equal):
    before = {"eval_rule": mean, "eval_rule_std": std}
    rule = scorer_of("rule", function=len)
    with pytest.raises(utils.UserError, match="same score") if equal else contextlib.nullcontext():
        ppo.normalize([rule], None, before)
        assert rule.std == std


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_hold_every_row_once_the_longest_first_and_as_many_on_each_rank(
        world, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 40)
    rows = rng.permutation(40)[:24]
    ranks = []
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        ranks.append(utils.split_micro_batches(rows, lengths, 5))
        own = np.concatenate(ranks[-1])
        assert (np.diff(lengths[own]) <= 0).all(), "longest first: if memory is short, at once"
        assert all(len(part) == 5 for part in ranks[-1][:-1])
    assert sorted(np.concatenate(sum(ranks, []))) == sorted(rows)
    assert len({len(parts) for parts in ranks}) == 1, "every rank makes the same forwards"
    loads = [lengths[np.concatenate(parts)].sum() for parts in ranks]
    assert max(loads) - min(loads) < lengths.max(), "and has about as many tokens"
    share = 24 // world
    assert utils.micro_batch_size(24, 0) == utils.micro_batch_size(24, 99) == (share, 1)
    assert utils.micro_batch_size(24, 5) == (5, math.ceil(share / 5))


def test_the_learning_rate_warms_up_over_3_percent_of_the_steps_and_falls_to_a_tenth():
    schedule = [utils.cosine_schedule(step, 200) for step in range(200)]
    assert schedule[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    for step in range(6, 200):
        angle = math.pi * (step - 6) / 194
        assert schedule[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(angle)) / 2)
    assert utils.cosine_schedule(0, 1) == 1, "a single step is a whole one"
