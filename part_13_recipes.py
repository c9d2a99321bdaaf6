from prelude import *
from prelude import long, some
# -----------------------------------------------------------------------------
# 13. recipes: each NAME.diff applies; what it computes is that of a loop over tokens

import importlib.util
import math
import re

CORE = [f"{name}.py" for name in "sft reward ppo data utils hybrid_engine kernels".split()]
RECIPES = {path.stem: path for path in sorted((HERE / "recipes").glob("*.diff"))}
GROUPED = dict(answers_per_prompt=4, batch_size=16)


def git(*args, cwd=HERE):
    return subprocess.run(["git", *map(str, args)], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """recipe("grpo") is the module ppo with grpo.diff applied."""
    if git("diff", "--quiet", "HEAD", "--", *CORE).returncode:
        pytest.skip("the seven files differ from HEAD: do the recipes still apply?")
    modules = {}

    def get(name):
        if name not in modules:
            path = tmp_path_factory.mktemp("recipe") / "ppo.py"
            path.write_text((HERE / "ppo.py").read_text())
            applied = git("apply", *[RECIPES[part] for part in name.split()], cwd=path.parent)
            assert applied.returncode == 0, applied.stderr
            spec = importlib.util.spec_from_file_location(f"ppo_{len(modules)}", path)
            modules[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
        return modules[name]

    return get


@pytest.mark.parametrize("name", [*RECIPES, "grpo clip-higher dynamic-sampling"])
def test_a_recipe_applies_with_at_most_25_added_lines_and_the_page_has_it(name, recipe):
    """The last row is DAPO."""
    recipe(name)
    for path in [RECIPES[part] for part in name.split()]:
        added = re.findall(r"^\+(?!\+\+)(.*)", path.read_text(), re.M)
        assert len(added) <= 25 and max(map(len, added)) <= 100
        assert f"({path.name})" in (HERE / "recipes/README.md").read_text()


# -----------------------------------------------------------------------------
# advantages


def batch_with_holes(module, groups=3, n=4, A=7):
    """A scored batch made by hand: n answers to each prompt, with holes in the mask."""
    g = torch.Generator().manual_seed(7)
    B = groups * n
    answer_lens = torch.randint(3, A + 1, (B,), generator=g)
    mask = (torch.rand(B, A, generator=g) < 0.8) & (torch.arange(A) < answer_lens[:, None])
    mask[:, 0] = True
    old, ref, sample, values = [torch.randn(B, A, generator=g) * mask for _ in range(4)]
    finished = torch.rand(B, generator=g) < 0.7
    return module.Batch(
        tokens=torch.zeros(B, A + 2).long(), prompt_lens=torch.full((B,), 2), mask=mask,
        answer_lens=answer_lens, finished=finished, sample_logprobs=sample, old_logprobs=old,
        ref_logprobs=ref, values=values, scores={"rule": torch.randn(B, generator=g)},
        total=torch.zeros(B), kl=torch.zeros(B), columns={"answer_lens": answer_lens.tolist()})


def of_row(name, batch, i):
    """(score, rewards, values) of a row, the latter at its sampled tokens."""
    columns = batch.mask[i].nonzero().flatten().tolist()
    score = (batch.scores["rule"][i].item() - 0.5) / 2.0 - (not batch.finished[i])
    if name == "length-penalty":
        score -= 0.05 * batch.answer_lens[i].item()
    kl = (batch.old_logprobs - batch.ref_logprobs)[i].tolist()
    kl_coef = 0.0 if name == "kl-in-loss" else 0.3
    rewards = [-kl_coef * kl[t] for t in columns]
    rewards[-1] += score
    if name == "process-reward":
        rewards = [r + t % 2 for r, t in zip(rewards, columns)]
    return score, rewards, batch.values[i, columns].tolist()


def gae_of(row, k, lam):
    _, rewards, values = row
    errors = [r + after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0])]
    return sum(lam ** (m - k) * errors[m] for m in range(k, len(errors)))


def others(numbers, i):
    """The numbers of the other answers to the same prompt."""
    return [numbers[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]


def rloo_of(rows, i, k):
    totals = [sum(rewards) for _, rewards, _ in rows]
    return totals[i] - np.mean(others(totals, i))


def drgrpo_of(rows, i, k):
    scores = [score for score, *_ in rows]
    return scores[i] - np.mean([scores[i], *others(scores, i)])


def grpo_of(rows, i, k):
    scores = [score for score, *_ in rows]
    return drgrpo_of(rows, i, k) / (np.std([scores[i], *others(scores, i)], ddof=1) + 1e-4)


def reward_to_go(rows, i, k):
    return sum(rows[i][1][k:])


def ppo_of(rows, i, k):
    return gae_of(rows[i], k, 0.95)


def adaptive_of(rows, i, k):
    return gae_of(rows[i], k, 1 - 1 / len(rows[i][1]))


def odd_columns(answer_lens):
    """A process reward: 1 for each odd token."""
    return [[float(t % 2) for t in range(n)] for n in answer_lens]


ADVANTAGES = {  # name: a token's advantage, before whitening where there is any
    "rloo": rloo_of, "grpo": grpo_of, "drgrpo": drgrpo_of, "gspo": grpo_of, "sao": adaptive_of,
    "reinforce++": reward_to_go, "two-lambdas": adaptive_of, "kl-in-loss": ppo_of,
    "length-penalty": ppo_of, "process-reward": ppo_of, "truncated-is": ppo_of,
    "break-whitening": ppo_of,
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_advantages_of_a_recipe_are_those_of_a_loop_over_tokens(name, recipe):
    module = recipe(name)
    batch = batch_with_holes(module)
    if name == "process-reward":
        batch.process = module.process_rewards(odd_columns, batch)
    scorers = [module.Scorer("rule", "rule", 1.0, function=len, mean=0.5, std=2.0)]
    module.estimate_advantages(batch, scorers, module.Config(**GROUPED, kl_coef=0.3))
    rows = [of_row(name, batch, i) for i in range(len(batch.mask))]
    expected = torch.zeros_like(batch.advantages)
    returns = torch.zeros_like(expected)
    for i in range(len(rows)):
        for k, t in enumerate(batch.mask[i].nonzero().flatten().tolist()):
            expected[i, t] = ADVANTAGES[name](rows, i, k)
            returns[i, t] = reward_to_go(rows, i, k)
    if name in ("two-lambdas", "sao"):  # the critic's lambda is 1
        torch.testing.assert_close(batch.returns, returns, rtol=1e-4, atol=1e-4)
    if name not in ("grpo", "drgrpo", "gspo", "break-whitening"):
        inside = expected[batch.mask]
        expected = (expected - inside.mean()) / inside.std(correction=0) * batch.mask
    if name == "truncated-is":
        expected *= (batch.old_logprobs - batch.sample_logprobs).exp().clamp(max=2)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


# -----------------------------------------------------------------------------
# losses of one answer: of its tokens' log-ratios, advantages and log-probabilities


def clipped(ratio, advantage, upper=1.2):
    return max(-advantage * ratio, -advantage * min(max(ratio, 0.8), upper))


def clip_higher_of(log_ratio, advantages, logprobs):
    losses = [clipped(r, a, 1.28) for r, a in zip(log_ratio.exp(), advantages)]
    return [min(x, -3 * a) if a < 0 else x for x, a in zip(losses, advantages)]


def cispo_of(log_ratio, advantages, logprobs):
    weights = [min(r.item(), 1.2) for r in log_ratio.exp()]
    return [-w * a * x for w, a, x in zip(weights, advantages, logprobs)]


def gspo_of(log_ratio, advantages, logprobs):
    return [clipped(log_ratio.mean().exp(), advantages[0])]


def sao_of(log_ratio, advantages, logprobs):
    return [-r * a * float(0.2 < r < 4) for r, a in zip(log_ratio.exp(), advantages)]


@pytest.mark.parametrize("name, of_answer", {
    "clip-higher": clip_higher_of, "cispo": cispo_of, "gspo": gspo_of, "sao": sao_of}.items())
def test_the_loss_of_a_recipe_is_that_of_a_loop_over_tokens(name, of_answer, recipe):
    g = torch.Generator().manual_seed(5)
    old, change, advantages = (torch.randn(9, 9, generator=g).double() for _ in range(3))
    mask = torch.rand(9, 9, generator=g) < 0.7
    if name == "gspo":
        advantages = advantages[:, :1].expand(9, 9)
    logprobs = (old + 1.3 * change).requires_grad_()
    losses = []
    for i, inside in enumerate(mask):
        x = logprobs[i][inside]
        losses += of_answer(x - old[i][inside], advantages[i][inside], x)
    expected = torch.stack(losses).mean()
    [gradient] = torch.autograd.grad(expected, logprobs)
    loss = recipe(name).actor_loss(logprobs, old, advantages * mask, mask, 0.2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], gradient)


# -----------------------------------------------------------------------------
# phases


class TwoRows:
    """What rollout() asks of Rows: prompts, and the fields of the rows."""
    prompts = [np.array([65, 66, 67]), np.array([68, 69])]
    fields = [{"n": 2}, {"n": 3}]

    def columns(self, indices):
        return {"n": [self.fields[i]["n"] for i in indices]}


def test_a_tools_words_stand_behind_what_ended_as_holes_and_the_policy_goes_on(
        recipe, small, tok, tmp_path):
    utils.init_distributed(0)
    (tmp_path / "tool.py").write_text(
        "def reply(answer, n):\n    return None if len(answer) % n == 0 else 'xyz'[:n]\n")
    lm = utils.load_model(small, torch.float32)
    sampler = hybrid_engine.HybridEngine(lm)
    cfg = ppo.Config(max_new_tokens=6)
    object.__setattr__(cfg, "respond", f"{tmp_path}/tool.py:reply")
    ends = list(range(0, 256, 3))  # so that a third of the tokens end an answer
    indices = np.array([0, 1] * 8)
    seeds = [hash((3, i)) for i in range(16)]
    module = recipe("tool-use")
    batch = module.rollout(sampler, TwoRows(), indices, seeds, cfg, tok, ends)
    replies = 0
    for i, index in enumerate(indices):  # the second version: one row alone, turn after turn
        prompt = TwoRows.prompts[index].tolist()
        answer, sampled = [], []
        for turns_left in (2, 1, 0):
            out = sampler.generate([prompt + answer], 6, eos_token_id=ends, seed=[seeds[i]])
            new = rows_of(out)[0][len(prompt) + len(answer) :]
            answer += new
            sampled += [True] * len(new)
            n = TwoRows.fields[index]["n"]
            text = tok.decode(answer[:-1])
            if not turns_left or answer[-1] not in ends or len(text) % n == 0:
                break
            answer += tok("xyz"[:n])["input_ids"]
            sampled += [False] * n
            replies += 1
        P, N = len(prompt), len(answer)
        assert batch.tokens[i, : P + N].tolist() == prompt + answer
        assert batch.mask[i].tolist() == sampled + [False] * (batch.mask.size(1) - N)
        expected = plain_logprobs(lm, prompt + answer, P) * torch.tensor(sampled)
        torch.testing.assert_close(batch.sample_logprobs[i, :N].double(), expected, atol=1e-4,
                                   rtol=0)
    assert replies > 5 and not batch.mask.all()
