# -----------------------------------------------------------------------------
# 5. formulas and phases. Each formula has a naive second version here: plain loops over one row, a
# list of floats without padding. A row with holes must give what the row without them gives.
from prelude import *
from prelude import long, some

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


def batch_of(rows=WHOLE_ROWS, **more):
    """A Batch in which every entry of every tensor is different from its neighbours."""
    mask = torch.tensor(rows, dtype=torch.bool)
    B, A = mask.shape
    known = dict(
        tokens=torch.arange(B * (4 + A)).view(B, 4 + A),
        prompt_lens=torch.tensor([4, 2, 3, 1, 4]),
        answer_lens=(mask * torch.arange(1, A + 1)).amax(1),
        mask=mask,
        finished=torch.tensor([True, False, True, True, False]),
        sample_logprobs=-0.01 * torch.arange(B * A).view(B, A),
        columns={"prompts": [f"prompt {i}" for i in range(B)], "completions": ["a"] * B,
                 "completion_ids": [[7]] * B, "target": list(range(B))},
    )
    return ppo.Batch(**(known | more))


def scorer_of(name, weight=1.0, **more):
    return ppo.Scorer(name, name, weight, **more)


def test_a_part_of_a_batch_has_its_rows_of_every_tensor_and_no_more_columns_than_they_need():
    batch = batch_of(values=torch.randn(5, 7), total=torch.randn(5))
    part = batch.part(np.array([4, 2]))
    assert part.tokens.tolist() == batch.tokens[[4, 2], :6].tolist(), "4 + 2 and 3 + 3 tokens"
    for name in ("mask", "sample_logprobs", "values"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[4, 2], :3]), name
    for name in ("prompt_lens", "answer_lens", "finished", "total"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[4, 2]]), name
    assert part.returns is None
    assert part.lengths.tolist() == [6, 6]


def test_a_value_is_that_of_the_state_before_the_token():
    batch = batch_of(prompt_lens=torch.tensor([3, 5, 1, 1, 1]))
    got = ppo.answer_values(lambda tokens: torch.arange(tokens.size(1)).expand(tokens.shape), batch)
    message = "the first token is chosen in the state after the prompt's last"
    assert got.tolist()[:3] == [[2, 3, 4, 5, 6, 7, 8], [4] + [0] * 6, [0, 1, 2] + [0] * 4], message


def test_advantages_come_from_normalized_and_penalized_scores_and_what_is_logged_is_raw():
    """The constants of ppo.py stand here once more, as numbers."""
    mask, (logprobs, ref_logprobs, values, _) = random_tensors(ROWS_WITH_HOLES)
    nan = math.nan  # it abstained
    a = torch.tensor([0.5, -0.5, 1.0, 7.0, -3.0], dtype=torch.float64)
    b = torch.tensor([1.0, 2.0, nan, 0.0, -7.0], dtype=torch.float64)
    batch = batch_of(ROWS_WITH_HOLES, values=values, old_logprobs=logprobs,
                     ref_logprobs=ref_logprobs)
    batch.scores = {"a": a, "b": b, "none": torch.full_like(a, nan)}
    batch.total = a + 0.5 * b.nan_to_num()
    batch.kl = ((logprobs - ref_logprobs) * mask).sum(1)
    b_scorer = scorer_of("b", 0.5, mean=-1.0, std=2.0)
    scorers = [scorer_of("a"), b_scorer, scorer_of("none", 0.0)]
    metrics = ppo.estimate_advantages(batch, scorers, ppo.Config(kl_coef=0.3))

    advantages = []
    seen = a + 0.5 * ((b + 1.0) / 2.0).nan_to_num() - ~batch.finished * 1.0
    for row, score in enumerate(seen.tolist()):
        m = mask[row]
        rewards = [-0.3 * x for x in (logprobs - ref_logprobs)[row][m].tolist()]
        rewards[-1] += min(max(score, -5.0), 5.0)
        assert batch.token_rewards[row][m].tolist() == pytest.approx(rewards)
        advantages += naive_gae(values[row][m].tolist(), rewards, gamma=1.0, lam=0.95)
    raw = np.array(advantages)
    np.testing.assert_allclose(batch.advantages[mask], (raw - raw.mean()) / raw.std())
    returns = raw + values[mask].numpy()
    np.testing.assert_allclose(batch.returns[mask], returns, err_msg="of what is not whitened")
    assert math.isnan(metrics.pop("score_none"))
    assert metrics == pytest.approx({
        "score": batch.total.mean().item(),
        "score_std": batch.total.std().item(),
        "score_clipped": 2 / 5,  # 7.25, and -4.5 less the penalty
        "unjudged": 0,
        "kl": batch.kl.mean().item(),
        "length": batch.answer_lens.float().mean().item(),
        "eos_rate": 3 / 5,
        "advantage_mean": raw.mean(),
        "advantage_std": raw.std(ddof=1),
        "explained_variance": 1 - (values[mask].numpy() - returns).var() / returns.var(),
        "score_a": a.mean().item(),
        "score_b": -1.0,
    })


def test_each_epoch_has_every_row_once_and_all_but_the_first_are_shuffled_each_its_own_way():
    epochs = {}
    for seed, iteration in ((1, 1), (1, 2), (2, 1)):
        cfg = ppo.Config(batch_size=32, minibatches=4, ppo_epochs=3, seed=seed)
        steps = list(ppo.minibatches(32, cfg, iteration))
        assert [len(rows) for rows in steps] == [8] * 12
        for epoch in range(3):
            order = np.concatenate(steps[4 * epoch : 4 * epoch + 4]).tolist()
            assert sorted(order) == list(range(32))
            epochs[seed, iteration, epoch] = tuple(order)
    assert {epochs[1, 1, 0], epochs[1, 2, 0]} == {tuple(range(32))}, "it is in random order already"
    assert len(set(epochs.values())) == 7


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
    batch = batch_of(sample_logprobs=0 * ones, old_logprobs=-ones, advantages=ones)
    # The change x of a log-probability of which exp(x) - 1 - x is this large.
    changes = [next(x for x in np.arange(0, 1, 1e-5) if math.exp(x) - 1 - x >= kl) for kl in moved]
    actor = Table([x - ones for x in changes])
    updates = []
    left = list(norms)
    monkeypatch.setattr(utils, "step", lambda *engines: [left.pop(0)])
    ema = type("EMA", (), {"update": lambda self: updates.append(1)})()
    rows = np.arange(5)
    metrics = ppo.update(batch, [rows] * 4, actor, None, ema, None, ppo.Config(), 5, 1)
    assert 4 - len(actor.tables) == steps
    assert metrics["approx_kl"] == pytest.approx(np.mean(moved[:steps]), abs=1e-4)
    assert metrics["actor_grad_norm"] == norms[steps - 1], "of the last step"
    assert metrics["ratio_max"] == pytest.approx(math.exp(max(changes)), rel=1e-5)
    assert metrics["engine_gap_max"] == metrics["engine_gap_mean"] == pytest.approx(1)
    assert len(updates) == steps - norms[:steps].count(None)


class ScriptedSampler:
    """A sampler whose answers are given: prompt (a tuple of ids) -> answer ids."""

    def __init__(self, answers):
        self.answers = answers
        self.released = False

    def generate(self, prompts, *arguments, **more):
        self.arguments = (*arguments, *more.values())
        answers = [self.answers[tuple(prompt)] for prompt in prompts]
        tokens, lengths = data.pad([np.array(p + a) for p, a in zip(prompts, answers)])
        answer_lens = torch.tensor([len(a) for a in answers])
        sampled = torch.arange(int(answer_lens.max())) < answer_lens[:, None]
        return hybrid_engine.Rollout(tokens, lengths - answer_lens, answer_lens, -1.0 * sampled,
                                     sampled)

    def release(self):
        self.released = True


def test_a_rollout_says_what_was_sampled_and_its_texts_hold_all_tokens_but_the_end(tok):
    utils.init_distributed(0)
    end, pad = tok.eos_token_id, tok.pad_token_id  # <pad> is a special token that a policy may say
    a, bc, d = [tok(text)["input_ids"] for text in ("a", "bc<pad>", "d")]
    rows = data.Rows()
    for i, prompt in enumerate((a, bc, d)):
        rows.add(prompt, [], [], {"target": 10 * i}, 0)
    answers = {tuple(a): [*tok("AB")["input_ids"], pad, end], tuple(bc): tok("C")["input_ids"],
               tuple(d): [97]}
    sampler = ScriptedSampler(answers)
    cfg = ppo.Config(max_new_tokens=3, temperature=0.7)
    batch = ppo.rollout(sampler, rows, np.array([1, 0, 2, 0]), [5, 6, 7, 8], cfg, tok, [end, 97])
    assert sampler.arguments == (3, 0.7, [end, 97], [5, 6, 7, 8])
    assert sampler.released, "its memory is needed for training"
    assert batch.mask.sum(1).tolist() == batch.answer_lens.tolist() == [1, 4, 1, 4]
    assert batch.finished.tolist() == [False, True, True, True], "either of the two ids ends it"
    assert batch.columns == {
        "prompts": ["bc<pad>", "a", "d", "a"],
        "completions": ["C", "AB<pad>", "", "AB<pad>"],
        "completion_ids": [answers[tuple(x)] for x in (bc, a, d, a)],
        "target": [10, 0, 20, 0],
    }


def test_scoring_runs_every_model_on_every_row_and_leaves_out_what_no_reward_judged(monkeypatch):
    utils.init_distributed(0)
    monkeypatch.setattr(utils, "on_device", lambda *_: contextlib.nullcontext())

    def actor(tokens, prompt_lens, answer_lens, temperature):
        return tokens[:, :1].float().expand(-1, int(answer_lens.max())) * temperature, None

    def ref(*inputs):
        return -actor(*inputs)[0], None

    odd = scorer_of("odd", 0.5, function=lambda target: [t if t % 2 else None for t in target])
    model = scorer_of("model", model=lambda tokens: tokens.float() * 2)
    logged = scorer_of("logged", 0.0, function=lambda prompts: [None] * len(prompts))
    cfg = ppo.Config(temperature=0.5)
    steps = [np.array([4, 1]), np.array([0, 3]), np.array([2])]
    batch = batch_of()
    ppo.score(batch, steps, 1, cfg, ref, [odd, model, logged], actor, lambda tokens: tokens.float())
    for i, (p, a) in enumerate(zip(batch.prompt_lens.tolist(), batch.answer_lens.tolist())):
        tokens = batch.tokens[i].float()
        assert batch.values[i, :a].tolist() == tokens[p - 1 : p - 1 + a].tolist()
        assert batch.scores["model"][i] == 2 * tokens[p + a - 1], "at the last token"
        assert set(batch.ref_logprobs[i, :a].tolist()) == {-0.5 * tokens[0].item()}
        assert set(batch.old_logprobs[i, :a].tolist()) == {0.5 * tokens[0].item()}
        assert batch.kl[i] == a * tokens[0], "of both log-probabilities, over the answer"
    assert batch.scores["odd"].nan_to_num(-1).tolist() == [-1, 1, -1, 3, -1]
    odd_scores = torch.tensor([0.0, 1, 0, 3, 0])
    torch.testing.assert_close(batch.total, 0.5 * odd_scores + batch.scores["model"])
    assert torch.equal(batch.mask, batch_of().mask)

    batch = batch_of()
    ppo.score(batch, steps, 1, cfg, ref, [odd, logged])
    assert torch.equal(batch.old_logprobs, batch.sample_logprobs), "one forward less"
    assert batch.mask.any(1).tolist() == [False, True, False, True, False]
    torch.testing.assert_close(batch.kl[[0, 2, 4]], torch.zeros(3))


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


class Head:
    """What normalize reads of a model: its config."""

    def __init__(self, **config):
        self.lm = type("LM", (), {"config": type("Config", (), config)()})()


def test_rewards_without_a_scale_get_that_of_the_first_evaluation_and_so_does_a_foreign_critic():
    ours, foreign = Head(score_scale=2.0, score_offset=1.0), Head(score_offset=7.0)
    scorers = [scorer_of("ours", model=ours), scorer_of("foreign", 0.5, model=foreign),
               scorer_of("rule", -1.0, function=len), scorer_of("logged", 0.0, function=len),
               scorer_of("one", 1.0, function=len), scorer_of("silent", 1.0, function=len)]
    before = {}
    statistics = dict(ours=(3, 3), foreign=(-30, 8), rule=(0.5, 0.1), logged=(2, 4), one=(1, 1e-8),
                      critic=(-30, 8))
    for name, (mean, std) in statistics.items():
        before |= {f"eval_{name}": mean, f"eval_{name}_std": std}
    critic = Head(score_offset=7.0)
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
