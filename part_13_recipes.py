from prelude import *
from prelude import long, some
# -----------------------------------------------------------------------------
# 13. the recipes: each NAME.diff applies; what it computes is compared with a loop over tokens

import importlib.util
import math
import re

CORE = [f"{name}.py" for name in "sft reward ppo data utils hybrid_engine kernels".split()]
RECIPES = {path.stem: path for path in sorted((HERE / "recipes").glob("*.diff"))}


def git(*args, cwd=HERE):
    return subprocess.run(["git", *map(str, args)], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="session")
def unchanged():
    if git("diff", "--quiet", "HEAD", "--", *CORE).returncode:
        pytest.skip("the seven files differ from HEAD: look whether the recipes still apply")


def module_at(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recipe(unchanged, tmp_path_factory):
    """recipe("grpo") is the module ppo with grpo.diff applied."""
    folder = tmp_path_factory.mktemp("recipes")
    modules = {}

    def get(name):
        if name not in modules:
            copy = folder / name
            copy.mkdir()
            (copy / "ppo.py").write_text((HERE / "ppo.py").read_text())
            applied = git("apply", RECIPES[name], cwd=copy)
            assert applied.returncode == 0, applied.stderr
            modules[name] = module_at(copy / "ppo.py", "ppo_with_" + re.sub(r"\W", "_", name))
        return modules[name]

    return get


def flags_of_recipe(name):
    """What the line "Flags:" of a diff says, as arguments of train()."""
    words = re.findall(r"^Flags: (.*)", RECIPES[name].read_text(), re.M)
    words = words[0].split() if words else []
    types = ppo.Config.__annotations__
    names = [word[2:].replace("-", "_") for word in words[::2]]
    return {name: types[name](value) for name, value in zip(names, words[1::2])}


@pytest.mark.parametrize("names", [*RECIPES, "grpo clip-higher dynamic-sampling"])
def test_a_recipe_applies_with_at_most_25_added_lines_and_is_explained(names, unchanged):
    """The last row is DAPO."""
    paths = [RECIPES[name] for name in names.split()]
    checked = git("apply", "--check", *paths)
    assert checked.returncode == 0, checked.stderr
    readme = (HERE / "recipes/README.md").read_text()
    for path in paths:
        added = re.findall(r"^\+(?!\+\+)(.*)", path.read_text(), re.M)
        assert len(added) <= 25 and all(len(line) <= 100 for line in added), path.name
        assert f"{path.stem}.diff" in readme


# -----------------------------------------------------------------------------
# advantages


def batch_with_holes(groups=3, n=4, A=7):
    """A scored batch made by hand: n answers to each prompt, with holes in the mask."""
    g = torch.Generator().manual_seed(7)
    B = groups * n
    answer_lens = torch.randint(3, A + 1, (B,), generator=g)
    mask = (torch.rand(B, A, generator=g) < 0.8) & (torch.arange(A) < answer_lens[:, None])
    mask[:, 0] = True
    numbers = [torch.randn(B, A, generator=g) * mask for _ in range(4)]
    finished = torch.rand(B, generator=g) < 0.7
    batch = ppo.Batch(torch.zeros(B, A + 2).long(), torch.full((B,), 2), answer_lens, mask,
                      finished, sample_logprobs=numbers[0])
    batch.ref_logprobs, batch.old_logprobs, batch.values = numbers[1:]
    batch.scores = {"rule": torch.randn(B, generator=g)}
    return batch


def advantages_of(module, batch, **flags):
    """(advantages, returns) of a hand-made batch, and of each row a list of what a second version
    needs: sampled columns, penalized score, and the reward and the value at each of them."""
    cfg = module.Config(answers_per_prompt=4, kl_coef=0.3, **flags)
    scorers = [module.Scorer("rule", "rule", 1.0, function=len, mean=0.5, std=2.0)]
    module.estimate_advantages(batch, scorers, cfg)
    rows = []
    for i in range(len(batch.mask)):
        columns = batch.mask[i].nonzero().flatten().tolist()
        score = (batch.scores["rule"][i].item() - 0.5) / 2.0 - (not batch.finished[i])
        kl = (batch.old_logprobs - batch.ref_logprobs)[i].tolist()
        rewards = [-0.3 * kl[t] for t in columns]
        rewards[-1] += score
        rows.append((columns, score, rewards, [batch.values[i, t].item() for t in columns]))
    return batch.advantages, batch.returns, rows


def others(numbers, i):
    """The numbers of the other answers to the same prompt."""
    return [numbers[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]


def rloo_of(i, k, rows):
    totals = [sum(rewards) for _, _, rewards, _ in rows]
    return totals[i] - np.mean(others(totals, i))


def drgrpo_of(i, k, rows):
    scores = [score for _, score, _, _ in rows]
    return scores[i] - np.mean([scores[i], *others(scores, i)])


def grpo_of(i, k, rows):
    scores = [score for _, score, _, _ in rows]
    return drgrpo_of(i, k, rows) / (np.std([scores[i], *others(scores, i)], ddof=1) + 1e-4)


def reinforce_of(i, k, rows):
    return sum(rows[i][2][k:])


def gae_of(rewards, values, k, lam):
    errors = [r + after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0])]
    return sum(lam ** (m - k) * errors[m] for m in range(k, len(errors)))


def ppo_of(i, k, rows):
    return gae_of(*rows[i][2:], k, 0.95)


def adaptive_of(i, k, rows):
    return gae_of(*rows[i][2:], k, 1 - 1 / len(rows[i][0]))


def without_kl_of(i, k, rows):
    columns, score, _, values = rows[i]
    return gae_of([0.0] * (len(columns) - 1) + [score], values, k, 0.95)


ADVANTAGES = {  # name: (a token's advantage before whitening, whether it is whitened)
    "rloo": (rloo_of, True), "grpo": (grpo_of, False), "drgrpo": (drgrpo_of, False),
    "gspo": (grpo_of, False), "reinforce++": (reinforce_of, True), "sao": (adaptive_of, True),
    "two-lambdas": (adaptive_of, True), "kl-in-loss": (without_kl_of, True),
    "break-whitening": (ppo_of, False), "truncated-is": (ppo_of, True),
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_advantages_of_a_recipe_are_those_of_a_loop_over_tokens(name, recipe):
    batch = batch_with_holes()
    advantages, returns, rows = advantages_of(recipe(name), batch)
    of_token, whitened = ADVANTAGES[name]
    expected = torch.zeros_like(advantages)
    for i, (columns, *_) in enumerate(rows):
        for k, t in enumerate(columns):
            expected[i, t] = of_token(i, k, rows)
            if name in ("two-lambdas", "sao"):  # the critic's lambda is 1
                assert returns[i, t].item() == pytest.approx(reinforce_of(i, k, rows), abs=1e-4)
    if whitened:
        inside = expected[batch.mask]
        expected = (expected - inside.mean()) / inside.std(correction=0) * batch.mask
    if name == "truncated-is":
        ratio = (batch.old_logprobs - batch.sample_logprobs).exp()
        assert (ratio > 2).any()
        expected = expected * ratio.clamp(max=2)
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)


def test_a_length_penalty_is_a_part_of_the_last_reward_and_a_process_reward_of_each(recipe):
    _, plain, _ = advantages_of(recipe("two-lambdas"), batch_with_holes())
    batch = batch_with_holes()
    _, returns, _ = advantages_of(recipe("length-penalty"), batch)
    _, without, _ = advantages_of(ppo, batch_with_holes())
    last = ppo.last_sampled(batch.mask)
    rows = torch.arange(len(last))
    difference = (returns - without)[rows, last]
    torch.testing.assert_close(difference, -0.05 * batch.answer_lens)

    module = recipe("process-reward")
    plain = batch_with_holes()
    fields = {name: getattr(plain, name) for name in ppo.Batch.__dataclass_fields__}
    batch = module.Batch(**fields)

    def odd(completion_ids, **kwargs):
        return [[float(t % 2) for t in range(len(ids))] for ids in completion_ids]

    batch.process = module.process_rewards(odd, batch, {})
    advantages_of(module, batch)
    advantages_of(ppo, plain)
    added = torch.zeros_like(plain.returns)
    for i, t in batch.mask.nonzero().tolist():  # GAE of the difference
        columns = [c for c in batch.mask[i].nonzero().flatten().tolist() if c >= t]
        added[i, t] = sum(0.95**k * (c % 2) for k, c in enumerate(columns))
    torch.testing.assert_close(batch.returns - plain.returns, added, rtol=1e-4, atol=1e-4)


# -----------------------------------------------------------------------------
# losses


def clip_higher_of(ratio, advantage, logprob):
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.28))
    return min(loss, -3 * advantage) if advantage < 0 else loss


def cispo_of(ratio, advantage, logprob):
    return -min(ratio, 1.2) * advantage * logprob


def sao_of(ratio, advantage, logprob):
    return -ratio * advantage if 0.2 < ratio < 4 else 0.0


@pytest.mark.parametrize("name, of_token", [
    ("clip-higher", clip_higher_of), ("cispo", cispo_of), ("sao", sao_of)])
def test_the_loss_of_a_recipe_is_that_of_a_loop_over_tokens(name, of_token, recipe):
    g = torch.Generator().manual_seed(5)
    old, change, advantages = (torch.randn(9, 9, generator=g) for _ in range(3))
    mask = torch.rand(9, 9, generator=g) < 0.7
    logprobs = (old + 1.3 * change).requires_grad_()
    losses = []
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[i, t].item() - old[i, t].item())
        losses.append(of_token(ratio, advantages[i, t].item(), logprobs[i, t].item()))
    loss = recipe(name).actor_loss(logprobs, old, advantages * mask, mask, 0.2)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    loss.backward()
    ratio = (logprobs - old).exp().detach()
    if name == "cispo":  # no token is without a gradient
        expected = -ratio.clamp(max=1.2) * advantages
    else:
        flat = {
            "sao": (ratio < 0.2) | (ratio > 4),
            "clip-higher": torch.where(advantages > 0, ratio > 1.28, (ratio < 0.8) | (ratio > 3)),
        }[name]
        assert (flat & mask & (advantages > 0)).any() and (flat & mask & (advantages < 0)).any()
        expected = -ratio * advantages * ~flat
    expected = expected * mask / mask.sum()
    torch.testing.assert_close(logprobs.grad, expected, rtol=1e-4, atol=1e-6)


def test_gspo_has_one_ratio_per_answer_and_answers_weigh_the_same(recipe):
    g = torch.Generator().manual_seed(5)
    old, change = (torch.randn(6, 9, generator=g) for _ in range(2))
    mask = torch.rand(6, 9, generator=g) < 0.7
    advantages = torch.randn(6, 1, generator=g) * mask
    losses = []
    for i in range(6):
        columns = mask[i].nonzero().flatten().tolist()
        ratio = math.exp(np.mean([change[i, t].item() for t in columns]))
        advantage = advantages[i, columns[0]].item()
        losses.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
    loss = recipe("gspo").actor_loss(old + change, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
