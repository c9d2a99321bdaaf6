# -----------------------------------------------------------------------------
# 6. the three scripts a second time: float64, row by row, no padding, no micro batches, nothing
# of ours but the order of the rows. Written from the papers.
from part_5_formulas import naive_gae, pairs_by_hand
from prelude import *
from prelude import long, some

import copy


def lm_of(folder):
    """A causal LM in float64, read with transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).double().eval()


class ExactRewardModel:
    """A folder of reward.py, read with transformers alone."""

    def __init__(self, folder):
        from transformers import AutoModelForSequenceClassification

        self.model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
        self.offset = self.model.config.score_offset
        self.scale = self.model.config.score_scale

    def __call__(self, tokens):
        """The value of each prefix of a row."""
        hidden = self.model.model(torch.tensor([tokens])).last_hidden_state[0]
        return (self.model.score(hidden)[:, 0] - self.offset) * self.scale


def exact_logprobs(lm, prompt, answer, temperature=1.0):
    """Log-probability of each answer token, and the entropy where it was chosen."""
    logits = lm(torch.tensor([[*prompt, *answer]])).logits[0] / temperature
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, torch.tensor(np.array(answer, int))[:, None])[:, 0], entropy


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


def rows_of_step(source, step, tok, max_len=64):
    """The rows of a step: (train, held out)."""
    return data.load(source, step, "", 0.2, tok, [tok.eos_token_id], max_len)


def steps_of(rows, batch_size):
    """Indices of the rows of each step, without end."""
    for _, indices in data.steps(rows, rows.lengths(), batch_size, 1):
        yield indices


@pytest.fixture
def started(monkeypatch):
    """The models that DeepSpeed is given to train, and copies of them as they were then."""
    pairs = []
    real = utils.train_engine

    def train_engine(model, *arguments):
        pairs.append((model, copy.deepcopy(model)))
        return real(model, *arguments)

    monkeypatch.setattr(utils, "train_engine", train_engine)
    return pairs


def test_sft_takes_the_steps_of_a_second_version(chain, toy_file, tok, tmp_path):
    start = chain["sft"][0]
    metrics = train(sft, tmp_path / "sft", **COMMON, model=start, data=toy_file, epochs=0.22,
                    micro_batch=3, lr=1e-3)
    lm = lm_of(start)
    adam = Adam(lm, 1e-8)
    rows, held_out = rows_of_step(toy_file, "sft", tok)

    def loss_of(rows, indices):  # over all answer tokens
        logprobs = [exact_logprobs(lm, rows.prompts[i], rows.answers[i][0])[0] for i in indices]
        return -torch.cat(logprobs).mean()

    for step, (row, indices) in enumerate(zip(metrics, steps_of(rows, 8))):
        loss = loss_of(rows, indices)
        lr = 1e-3 * exact_schedule(step, len(metrics))
        norm = adam.step(loss, lr)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert row["lr"] == pytest.approx(lr)
    assert len(metrics) == 5
    assert distance(lm_of(tmp_path / "sft"), lm, lm_of(start)) < 5e-4
    with torch.no_grad():
        loss = loss_of(held_out, range(len(held_out))).item()
    assert metrics[-1]["held_out_loss"] == pytest.approx(loss, rel=1e-4)


def ranked_rows():
    """Rows of 2 to 5 ranked answers with ties, and pairs; each prompt is there once."""
    for i, row in enumerate(itertools.islice(data.toy(), 160)):
        right, wrong = row["chosen"], row["rejected"]
        answers = [wrong, right, right + "ab", "b" + right, wrong + "c"][: 2 + i % 4]
        new = {"prompt": f"{row['prompt']} {i}", "answers": answers}
        if i % 8 == 0:
            new = {"prompt": new["prompt"], "chosen": right, "rejected": wrong}
        elif i % 2:
            new["ranks"] = [3, 1, 2, 2, 4][: len(answers)]
        else:
            new["scores"] = [0, 2.5, 1, 1, -1][: len(answers)]
        yield new


def exact_ranking(model, tok, row):
    """Scores of the answers of a row of a file, and their ranks; the best answer is first."""
    answers, ranks = [row.get("chosen"), row.get("rejected")], [1, 2]
    if "answers" in row:
        answers, ranks = row["answers"], row.get("ranks") or [-score for score in row["scores"]]
    scores = []
    for answer in answers:
        text = f"Human: {row['prompt']}\nAssistant:" + (" " + answer if answer else "")
        scores.append(model(tok(text)["input_ids"] + [tok.eos_token_id])[-1])
    order = sorted(range(len(answers)), key=lambda k: ranks[k])
    return torch.stack([scores[k] for k in order]), [ranks[k] + 10 for k in order]


def test_reward_takes_the_steps_of_a_second_version(chain, tok, tmp_path, started):
    """With 8 rows of a step in micro batches of 3, 3 and 2, so that a wrong weight shows."""
    raw = list(ranked_rows())
    path = write_rows(tmp_path / "rankings.jsonl", raw)
    metrics = train(reward, tmp_path / "reward", **COMMON, model=chain["sft"][0], data=path,
                    epochs=0.3, micro_batch=3, lr=1e-3)
    [(trained, start)] = started
    start.lm.config.update({"score_offset": 0.0, "score_scale": 1.0})
    start.lm.save_pretrained(tmp_path / "start")  # the SFT model's backbone, a random head
    model = ExactRewardModel(tmp_path / "start")
    adam = Adam(model.model, 1e-8)
    rows, held_out = rows_of_step(path, "reward", tok)
    by_prompt = {f"Human: {row['prompt']}\nAssistant:": row for row in raw}

    def ranked(rows, i):
        return exact_ranking(model, tok, by_prompt[tok.decode(rows.prompts[i])])

    for step, (row, indices) in enumerate(zip(metrics, steps_of(rows, 8))):
        margins = []
        levels = []
        for i in indices:
            scores, ranks = ranked(rows, i)
            margins.append(torch.stack(pairs_by_hand(scores, ranks)))
            levels.append(2 * scores.mean())
        loss = torch.stack([torch.log1p((-m).exp()).mean() for m in margins]).mean()
        centering = 0.003 * torch.stack(levels).square().mean()  # Eisenstein et al. 2023
        lr = 1e-3 * exact_schedule(step, len(metrics))
        norm = adam.step(loss + centering, lr)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        margin = np.mean([m.mean().item() for m in margins])
        assert row["margin"] == pytest.approx(margin, rel=1e-3, abs=1e-5)
        accuracy = np.mean([(m > 0).double().mean() for m in margins])
        assert row["accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["lr"] == pytest.approx(lr)
    assert len(metrics) == 4
    assert distance(trained.lm, model.model, start.lm) < 1e-3

    with torch.no_grad():
        held = [pairs_by_hand(*ranked(held_out, i)) for i in range(len(held_out))]
        known = [ranked(rows, i)[0] for i in range(len(rows))]
    accuracy = np.mean([np.mean([margin > 0 for margin in row]) for row in held])
    assert metrics[-1]["held_out_accuracy"] == pytest.approx(accuracy, abs=1e-5)
    losses = [np.mean([math.log1p(math.exp(-margin)) for margin in row]) for row in held]
    assert metrics[-1]["held_out_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    saved = ExactRewardModel(tmp_path / "reward")
    best = np.mean([scores[0].item() for scores in known])
    assert saved.offset == pytest.approx(best, abs=1e-4), "the best answer, the first of equals"
    assert saved.scale == pytest.approx(1 / torch.cat(known).std(unbiased=False).item(), rel=1e-3)


# What the second version of PPO and ppo.py are given.
EXACT = dict(
    batch_size=16, minibatches=2, ppo_epochs=2, micro_batch=3, iterations=2, max_new_tokens=8,
    temperature=0.8, actor_lr=1e-3, critic_lr=5e-4, kl_coef=0.2, ema=0.7, ptx_coef=0.5, seed=1)
RULES = """
def letters(completions):  # it abstains on long answers
    return [len(c) if len(c) < 8 else None for c in completions]

def a(prompts):
    return [prompt.count("a") for prompt in prompts]
"""


class ExactPPO:
    """PPO on given answers. A row is prompt ids, answer ids, and a mask (a,) of the answer's tokens
    that the policy sampled; all numbers below are of sampled tokens."""

    def __init__(self, sft_folder, reward_folder, tok):
        self.actor = lm_of(sft_folder)
        self.ref = lm_of(sft_folder)
        self.ema = lm_of(sft_folder)
        self.critic = ExactRewardModel(reward_folder)
        self.reward_model = ExactRewardModel(reward_folder)
        self.actor_adam = Adam(self.actor, 1e-5)
        self.critic_adam = Adam(self.critic.model, 1e-5)
        self.tok = tok

    def logprobs(self, lm, prompt, answer, mask):
        logprobs, entropy = exact_logprobs(lm, prompt, answer, EXACT["temperature"])
        return logprobs[mask], entropy[mask]

    def values(self, prompt, answer, mask):
        """The critic's, of the state before each token."""
        return self.critic(prompt + answer)[len(prompt) - 1 : -1][mask]

    def letters(self, answer):
        """The second reward: None or the number of letters, of all tokens but the last end."""
        ended = answer[-1] == self.tok.eos_token_id
        count = len(self.tok.decode(answer[:-1] if ended else answer))
        return count if count < 8 else None

    def first_evaluation(self, rows):
        letters = [self.letters(answer) for _, answer, _ in rows]
        judged = [n for n in letters if n is not None]
        assert 5 < len(judged) < len(letters)
        self.mean, self.std = np.mean(judged), np.std(judged, ddof=1)

    @torch.no_grad()
    def judge(self, rows):
        """What each token was worth. Keeps a list for every quantity, an entry per row, and
        returns what is logged."""
        self.old_logprobs = []
        self.old_values = []
        self.advantages = []
        scores = []
        kls = []
        for prompt, answer, mask in rows:
            logprobs, _ = self.logprobs(self.actor, prompt, answer, mask)
            ref_logprobs, _ = self.logprobs(self.ref, prompt, answer, mask)
            values = self.values(prompt, answer, mask)
            score = self.reward_model(prompt + answer)[-1].item()
            letters = self.letters(answer)
            scores.append(score + 0.3 * (letters or 0))
            if letters is not None:
                score += 0.3 * (letters - self.mean) / self.std
            log_ratio = logprobs - ref_logprobs
            rewards = (-EXACT["kl_coef"] * log_ratio).tolist()
            penalty = 0.0 if answer[-1] == self.tok.eos_token_id else 1.0
            rewards[-1] += min(max(score - penalty, -5.0), 5.0)
            advantages = naive_gae(values.tolist(), rewards, gamma=1.0, lam=0.95)
            self.old_logprobs.append(logprobs)
            self.old_values.append(values)
            self.advantages.append(torch.tensor(advantages, dtype=torch.float64))
            kls.append(log_ratio.sum().item())
        self.returns = [a + v for a, v in zip(self.advantages, self.old_values)]
        raw = torch.cat(self.advantages)
        std = raw.std(unbiased=False)
        self.advantages = [(a - raw.mean()) / std for a in self.advantages]
        returns = torch.cat(self.returns)
        errors = torch.cat(self.old_values) - returns
        return {
            "score": np.mean(scores),
            "score_std": np.std(scores, ddof=1),
            "score_a": np.mean([self.tok.decode(prompt).count("a") for prompt, _, _ in rows]),
            "kl": np.mean(kls),
            "advantage_mean": raw.mean().item(),
            "advantage_std": raw.std().item(),
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
        errors = [(v - self.returns[i]).square() for v in (values, clipped)]
        return {
            "actor_loss": -gain,
            "critic_loss": torch.maximum(*errors) / 2,
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
        return metrics


def token_rows(batch):
    """A Batch's rows as (prompt ids, answer ids, mask)."""
    rows = []
    spans = zip(batch.tokens.tolist(), batch.prompt_lens.tolist(), batch.answer_lens.tolist())
    for (tokens, p, a), mask in zip(spans, batch.mask):
        rows.append((tokens[:p], tokens[p : p + a], mask[:a]))
    return rows


def texts_of_many_lengths():
    """60 rows of plain text, from 4 to 50 characters."""
    line = "the line of a text that goes on for a while, or not"
    return [{"text": f"{i} {line[: 2 + i * 7 % 47]}"} for i in range(60)]


def record_rollouts(monkeypatch, change=lambda batch: None):
    """A list that ppo.rollout will fill: (seeds, Batch) of each call."""
    calls = []
    real = ppo.rollout

    def rollout(sampler, rows, indices, seeds, *arguments):
        calls.append((list(seeds), real(sampler, rows, indices, seeds, *arguments)))
        change(calls[-1][1])
        return calls[-1][1]

    monkeypatch.setattr(ppo, "rollout", rollout)
    return calls


def test_ppo_takes_the_steps_of_a_second_version(
        chain, toy_file, tok, tmp_path, started, monkeypatch):
    """Two iterations of two epochs of two minibatches, each in micro batches of 3, 3 and 2, with a
    reward model, a function that abstains, one that is only logged, a mixture and an EMA. In the
    last rollout the second, fifth, ... token of each answer is not the policy's."""
    rollouts = []

    def punch_holes(batch):
        if len(batch.tokens) == EXACT["batch_size"]:  # and not an evaluation
            rollouts.append(batch)
            if len(rollouts) == EXACT["iterations"]:
                batch.mask &= torch.arange(batch.mask.size(1)) % 3 != 1

    calls = record_rollouts(monkeypatch, punch_holes)
    monkeypatch.setattr(ppo, "STOP_KL", 1e9)
    rules = tmp_path / "rules.py"
    rules.write_text(RULES)
    sft_folder, reward_folder = chain["sft"][0], chain["reward"][0]
    text = write_rows(tmp_path / "text.jsonl", texts_of_many_lengths())
    metrics = train(
        ppo, tmp_path / "ppo", **EXACT, held_out=0.2, max_len=64, data=toy_file, model=sft_folder,
        ptx_data=text, reward=f"{reward_folder},{rules}:letters:0.3,{rules}:a:0")
    (actor, actor_start), (critic, critic_start) = started
    assert len(rollouts) == EXACT["iterations"]

    second = ExactPPO(sft_folder, reward_folder, tok)
    second.first_evaluation(token_rows(calls[0][1]))
    rows, _ = rows_of_step(text, "sft", tok)
    texts = ([(rows.prompts[i], rows.answers[i][0]) for i in indices]
             for indices in steps_of(rows, EXACT["batch_size"] // EXACT["minibatches"]))
    for number, batch in enumerate(rollouts, 1):
        expected = second.iteration(number, token_rows(batch), texts)
        for name, value in expected.items():
            assert metrics[number][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
        assert expected["clip_frac"] > 0.02, "the clip has something to do"
        assert expected["value_clip_frac"] > 0.02
    assert distance(actor.lm, second.actor, actor_start.lm) < 1e-4
    assert distance(critic.lm, second.critic.model, critic_start.lm) < 1e-4
    assert distance(lm_of(tmp_path / "ppo"), second.actor, actor_start.lm) < 1e-4
    assert distance(lm_of(tmp_path / "ppo" / "ema"), second.ema, actor_start.lm) < 1e-4
