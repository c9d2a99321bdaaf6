# -----------------------------------------------------------------------------
# 7. the three steps, run
from part_6_second_versions import record_rollouts
from prelude import *
from prelude import long, some

COLUMNS = set("""score score_std score_clipped unjudged kl length eos_rate entropy actor_loss
critic_loss approx_kl clip_frac value_clip_frac ratio_mean ratio_max advantage_mean advantage_std
explained_variance engine_gap_mean engine_gap_max actor_grad_norm critic_grad_norm actor_lr skipped
rollout_s score_s update_s seconds tokens_per_s memory_gib score_reward""".split())
EVALUATED = {"eval_score", "eval_score_se", "eval_kl", "eval_reward", "eval_reward_std"}
RULES_OF_RUNS = """
def length(completions):
    return [len(c) for c in completions]

def short(completions, **fields):
    return [-len(c) for c in completions]

def near(completions, target, **fields):
    assert "prompts" in fields
    return [-abs(len(c) - t) for c, t in zip(completions, target)]

def picky(prompts, completions):
    return [len(c) if "sort" in p else None for p, c in zip(prompts, completions)]

def constant(completions):
    return [0.1] * len(completions)

def silent(completions):
    return [None] * len(completions)
"""


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "rules.py").write_text(RULES_OF_RUNS)
    return str(tmp_path / "rules.py")


@pytest.fixture
def flags(chain, toy_file):
    """PPO from the models of `chain`: one iteration of one step of 16 answers, without EMA."""
    return dict(COMMON, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file,
                batch_size=16, iterations=1, minibatches=1, max_new_tokens=8, ema=0.0)


def copy_of(folder, to, **changes):
    """A model folder again, with other entries in its config; None takes one out."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


def as_foreign(folder, to):
    """A reward model as others publish them: raw logits around -30, and no record of a run."""
    from safetensors.torch import load_file, save_file

    copy_of(folder, to, score_offset=None, score_scale=None)
    (to / "run.json").unlink()
    state = load_file(to / "model.safetensors")
    state["score.weight"] *= 8
    save_file(state, to / "model.safetensors", {"format": "pt"})
    return str(to)


def test_every_step_logs_finite_numbers_and_what_its_reader_needs(chain):
    assert {"loss", "grad_norm", "lr", "held_out_loss"} <= set(chain["sft"][1][-1])
    needed = {"loss", "accuracy", "margin", "grad_norm", "lr", "held_out_accuracy"}
    assert needed <= set(chain["reward"][1][-1])
    folder, metrics = chain["ppo"]
    assert EVALUATED <= set(metrics[0])
    assert len(metrics) == 4, "the evaluation before training, and three iterations"
    for row in metrics[1:]:
        assert COLUMNS <= set(row), COLUMNS - set(row)
    assert EVALUATED | {name.replace("eval", "eval_ema") for name in EVALUATED} <= set(metrics[3])
    first = metrics[1]
    assert abs(first["kl"]) < 1e-3, "before the first update actor and reference are one"
    assert first["engine_gap_max"] < 1e-4, "and so are sampler and trainer"
    samples = read_lines(f"{folder}/samples.jsonl")
    assert len(samples) == 3 * 8
    own = [sample for sample in samples if sample["step"] == 3]
    for name, column in (("score", "score"), ("kl", "kl"), ("eos_rate", "eos"),
                         ("length", "tokens"), ("score_reward", "reward")):
        assert metrics[3][name] == pytest.approx(np.mean([s[column] for s in own]), abs=1e-3), name


def test_tokens_jsonl_has_the_numbers_of_each_token_and_the_critic_starts_as_the_reward_model(
        chain, tok):
    lists = {"response_tokens", "mask", "logprobs", "ref_logprobs", "values", "token_rewards",
             "advantages", "returns"}
    critic = reward.RewardModel.from_pretrained(chain["reward"][0], torch.float32)
    rows = read_lines(f"{chain['ppo'][0]}/tokens.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    for row in rows:
        assert set(row) == lists | {"step", "prompt", "reward"}
        assert {len(row[name]) for name in lists} == {len(row["response_tokens"])}
        kl = 0.05 * (np.array(row["logprobs"]) - row["ref_logprobs"])
        assert row["token_rewards"][:-1] == pytest.approx(-kl[:-1], abs=1e-5)
        if row["step"] == 1:  # the state before the first token
            value = critic(torch.tensor([tok(row["prompt"])["input_ids"]]))[0, -1].item()
            assert row["values"][0] == pytest.approx(value, rel=1e-4)


def test_what_is_rewarded_becomes_likelier_and_what_was_chosen_scores_higher(
        flags, rules, tmp_path, capsys):
    more = dict(batch_size=32, iterations=10, minibatches=2, actor_lr=3e-3)
    metrics = train(ppo, tmp_path / "ppo", **flags | more | dict(reward=f"{rules}:short:0.5"))
    assert metrics[-1]["score"] > metrics[1]["score"] + 0.5
    assert metrics[-1]["length"] < metrics[1]["length"]
    assert metrics[0]["eval_short"] == pytest.approx(2 * metrics[0]["eval_score"]), "raw"
    printed = capsys.readouterr().out
    assert f"python chat.py --model {tmp_path / 'ppo'}" in printed.splitlines()[-1]
    assert ("did not end within --max-new-tokens" in printed) == (metrics[-1]["eos_rate"] < 0.5)

    rows = [{"prompt": f"number {i}", "answers": ["best", "good", "fair"], "scores": [3, 2, 1]}
            for i in range(100)]
    path = write_rows(tmp_path / "rankings.jsonl", rows)
    metrics = train(reward, tmp_path / "rm", **COMMON, model=flags["model"], data=path, epochs=4,
                    lr=1e-3)
    assert metrics[-1]["held_out_accuracy"] > 0.95 > metrics[0]["accuracy"]


def test_a_reward_of_weight_0_is_logged_as_it_is_and_trains_nothing(flags, tmp_path):
    assert ppo.Config().reward == "out/reward,data.py:toy_correct:0"
    weights = {}
    for name, more in (("without", ""), ("gold", ",data.py:toy_correct:0")):
        out = tmp_path / name
        metrics = train(ppo, out, **flags | dict(reward=flags["reward"] + more))
        weights[name] = (out / "model.safetensors").read_bytes()
    assert weights["gold"] == weights["without"]
    samples = read_lines(out / "samples.jsonl")
    prompts, answers = ([s[key] for s in samples] for key in ("prompt", "answer"))
    gold = data.toy_correct(prompts=prompts, completions=answers)
    assert [sample["toy_correct"] for sample in samples] == gold
    assert all(sample["score"] == sample["reward"] for sample in samples)
    assert metrics[1]["score_toy_correct"] == pytest.approx(np.mean(gold))
    assert {"eval_toy_correct", "eval_toy_correct_std"} <= set(metrics[0])

    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"number {i}"} for i in range(80)])
    more = dict(data=rows, reward=f"{flags['reward']},data.py:toy_correct:0")
    metrics = train(ppo, tmp_path / "other", **flags | more)
    assert not any("toy_correct" in name for row in metrics for name in row), "it judged nothing"


def test_an_answer_that_no_reward_judged_is_left_out_and_counted(
        flags, rules, tmp_path, monkeypatch):
    calls = record_rollouts(monkeypatch)
    more = dict(reward=f"{rules}:picky,{rules}:short:0", micro_batch=2)
    metrics = train(ppo, tmp_path / "p", **flags | more)
    batch = calls[1][1]
    sort = ["sort" in prompt for prompt in batch.columns["prompts"]]
    assert 0 < sum(sort) < 8, "some micro batches have none"
    assert batch.mask.any(1).tolist() == sort
    assert not batch.advantages[~torch.tensor(sort)].any()
    judged = [len(c) for c, s in zip(batch.columns["completions"], sort) if s]
    row = metrics[1]
    assert row["unjudged"] == 16 - sum(sort)
    assert row["score"] == row["score_picky"] == pytest.approx(np.mean(judged))
    assert row["skipped"] == 0 and row["actor_grad_norm"] > 0
    samples = read_lines(tmp_path / "p" / "samples.jsonl")
    assert ["picky" in sample for sample in samples] == sort
    for name in ("constant", "silent"):
        with pytest.raises(utils.UserError, match="nothing to learn"):
            train(ppo, tmp_path / name, **flags | dict(reward=f"{rules}:{name}"))


def test_rewards_are_logged_apart_under_names_of_their_own(chain, flags, rules, tmp_path):
    folder = chain["reward"][0]
    config = json.loads(Path(folder, "config.json").read_text())
    other = copy_of(folder, tmp_path / "reward", score_offset=config["score_offset"] + 1.0)
    rows = [{"prompt": f"copy {i}", "target": i % 7} for i in range(120)]
    more = dict(data=write_rows(tmp_path / "rows.jsonl", rows),
                reward=f"{folder}:0.5,{other}:-2,{rules}:near:0.25")
    metrics = train(ppo, tmp_path / "p", **flags | more)
    samples = read_lines(tmp_path / "p" / "samples.jsonl")
    for sample in samples:
        number = int(re.search(r"copy (\d+)", sample["prompt"])[1])
        assert sample["near"] == -abs(len(sample["answer"]) - number % 7), "its row's own field"
        shifted = sample["reward"] - config["score_scale"]
        assert sample["reward_"] == pytest.approx(shifted, abs=1e-3)
        total = 0.5 * sample["reward"] - 2 * sample["reward_"] + 0.25 * sample["near"]
        assert sample["score"] == pytest.approx(total, abs=1e-3)
    for name in ("reward", "reward_", "near"):
        mean = np.mean([sample[name] for sample in samples])
        assert metrics[1][f"score_{name}"] == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("where", ["reward", "critic", "both"])
def test_a_foreign_critic_has_the_scale_in_which_ppo_sees_the_score(
        where, chain, flags, rules, tmp_path, monkeypatch, capsys):
    foreign = as_foreign(chain["reward"][0], tmp_path / "foreign")
    spec = {"reward": dict(reward=foreign), "both": dict(reward=foreign, critic=foreign + "/"),
            "critic": dict(reward=f"{rules}:length", critic=foreign)}[where]
    calls = record_rollouts(monkeypatch)
    metrics = train(ppo, tmp_path / "p", **flags | spec)
    batch = calls[1][1]
    raw = reward.RewardModel.from_pretrained(foreign, torch.float32)
    with torch.no_grad():
        values = ppo.answer_values(raw, batch)
    before = metrics[0]
    mean, std = before["eval_critic"], before["eval_critic_std"]
    torch.testing.assert_close(batch.values, (values - mean) / std * batch.mask, rtol=1e-3,
                               atol=1e-3)
    if where != "critic":
        assert (before["eval_foreign"], before["eval_foreign_std"]) == pytest.approx((mean, std))
        assert metrics[1]["score"] == pytest.approx(batch.scores["foreign"].mean().item()), "raw"
    seen = f"PPO sees (score - {before['eval_score']:.4g})"
    assert seen in capsys.readouterr().out


def test_the_critic_starts_from_the_flag_else_the_first_reward_that_counts_else_a_new_head(
        tok, monkeypatch):
    monkeypatch.setattr(ppo, "load_reward_model", lambda path, *arguments: path)

    def start(*scorers, **more):
        cfg = ppo.Config(model="tiny", **more)
        return ppo.load_critic(cfg, scorers, tok, torch.float32)

    logged, counts = (ppo.Scorer(name, name, weight, model=1) for name, weight in zip("ab", (0, 1)))
    rule = ppo.Scorer("rules.py:f", "f", 1.0, function=len)
    assert start(rule, logged, counts) == "b", "one of weight 0 is only logged"
    assert start(rule, logged, counts, critic="c") == "c"
    new = start(rule, logged).lm
    assert new.config.score_scale == 1.0, "a new head is no foreign one"
    assert new.score.weight.std().item() == pytest.approx(129**-0.5, rel=0.2)


def test_learning_rates_fall_linearly_to_a_tenth_and_know_the_built_in_model_from_others(
        flags, rules, tmp_path, monkeypatch):
    rates = []
    real = utils.set_lr
    monkeypatch.setattr(utils, "set_lr", lambda e, lr: (rates.append((type(e.module), lr)),
                                                        real(e, lr)))
    more = dict(batch_size=2, iterations=12, max_new_tokens=2, critic_warmup=2)
    metrics = train(ppo, tmp_path / "p", **flags | more)
    shares = [max(0.1, 1 - done / 12) for done in range(12)]
    actor = [3e-4 * share if i >= 2 else 0.0 for i, share in enumerate(shares)]
    assert [lr for kind, lr in rates if kind is sft.Policy] == pytest.approx(actor)
    critic = [lr for kind, lr in rates if kind is reward.RewardModel]
    assert critic == pytest.approx([1e-3 * share for share in shares])
    assert [row["actor_lr"] for row in metrics[1:]] == pytest.approx(actor), "what was used"
    evaluated = [row["step"] for row in metrics if "eval_score" in row]
    assert evaluated == [0, 3, 6, 9, 12], "four, besides the one at its start"
    for vocab_size, lr in ((258, 1e-3), (50_000, 1e-5)):
        config = type("Config", (), {"vocab_size": vocab_size})
        assert utils.pick_lr(0.0, config, 1e-3, 1e-5) == lr
        assert utils.pick_lr(2e-4, config, 1e-3, 1e-5) == 2e-4


# With gradient checkpointing a model trains in training mode.
@pytest.mark.parametrize("minibatches, gradient_checkpointing", [(1, False), (2, True)])
def test_the_first_ratio_is_exactly_one_in_spite_of_dropout_in_the_config(
        minibatches, gradient_checkpointing, chain, flags, tmp_path, monkeypatch):
    folders = {"model": copy_of(chain["sft"][0], tmp_path / "sft", attention_dropout=0.1),
               "reward": copy_of(chain["reward"][0], tmp_path / "reward", attention_dropout=0.1)}
    forwards = []
    real = sft.Policy.forward

    def forward(self, *arguments):
        forwards.append(torch.is_grad_enabled())
        return real(self, *arguments)

    monkeypatch.setattr(sft.Policy, "forward", forward)
    flags = flags | folders | dict(temperature=0.7, micro_batch=3, minibatches=minibatches)
    metrics = train(ppo, tmp_path / "p", **flags, actor_lr=1e-12,
                    gradient_checkpointing=gradient_checkpointing)
    row = metrics[1]
    assert row["ratio_max"] == row["ratio_mean"] == 1, "exactly, at any temperature"
    assert row["clip_frac"] == row["approx_kl"] == 0
    assert abs(row["kl"]) < 1e-5, "the reference has the temperature in it too"
    assert row["engine_gap_max"] < 1e-4, "and so has the sampler"
    # Of 16 rows: 3, 3, 3, 3, 3, 1, or twice 3, 3, 2; two evaluations in micro batches of 32.
    # A single step needs no forward of the actor before it.
    scored = 6 * minibatches
    assert [forwards.count(with_gradient) for with_gradient in (False, True)] == [scored + 4, 6]


def test_rollouts_are_in_random_order_and_answers_to_a_prompt_stand_side_by_side_and_differ(
        flags, tmp_path, monkeypatch):
    calls = record_rollouts(monkeypatch)
    for seed in (1, 2):
        more = dict(iterations=2, answers_per_prompt=4, seed=seed)
        train(ppo, tmp_path / f"{seed}", **flags | more)
    rollouts = [call for call in calls if len(call[0]) == 16]
    assert len({seed for seeds, _ in rollouts for seed in seeds}) == 4 * 16, "each has its own"
    for seeds, _ in calls:
        fixed = [2**31 + i for i in range(len(seeds))]
        assert len(seeds) == 16 or seeds == fixed, "evaluations have always the same"
    for _, batch in rollouts:
        prompts = np.array(batch.columns["prompts"]).reshape(4, 4)
        assert (prompts == prompts[:, :1]).all() and len(set(prompts[:, 0])) == 4
        answers = np.array(batch.columns["completions"]).reshape(4, 4)
        assert all(len(set(group)) > 1 for group in answers)
    lengths = [batch.prompt_lens.tolist() for _, batch in rollouts]
    assert any(x != sorted(x) for x in lengths), "all minibatches are alike"


def test_a_reward_model_of_another_chat_template_or_tokenizer_is_refused_a_foreign_one_named(
        small, toy_file, tmp_path, capsys):
    """Two bases of which only one is given the template: both name it in its own run."""
    common = dict(COMMON, model=small, data=toy_file, epochs=0.1)
    template = "Q: {prompt}\nA:"
    train(sft, tmp_path / "sft", template=template, **common)
    train(reward, tmp_path / "rm", **common)
    train(reward, tmp_path / "same", template=template, **common)
    flags = dict(COMMON, model=str(tmp_path / "sft"), data=toy_file, iterations=1, minibatches=1,
                 max_new_tokens=4)
    with pytest.raises(utils.UserError, match="rm has another chat template .*sft; .*--template"):
        train(ppo, tmp_path / "a", **flags, reward=str(tmp_path / "rm"))
    capsys.readouterr()
    (tmp_path / "rm" / "run.json").unlink()
    train(ppo, tmp_path / "b", **flags, reward=f"{tmp_path / 'same'},{tmp_path / 'rm'}")
    assert capsys.readouterr().out.count("has another chat template than --model") == 1
    samples = read_lines(tmp_path / "b" / "samples.jsonl")
    assert all(re.fullmatch(r"Q: \w+ \w+\nA:", sample["prompt"]) for sample in samples)
    other = utils.load_tokenizer("tiny")
    other.add_tokens(["<more>"])
    with pytest.raises(utils.UserError, match="same has another tokenizer than --model x"):
        reward.load_reward_model(str(tmp_path / "same"), torch.float32, "x", other)


def test_ids_without_a_word_are_neither_sampled_nor_part_of_any_probability(
        toy_file, tok, rules, tmp_path, monkeypatch):
    """A model whose vocabulary is padded from 258 to 320 ids."""
    from transformers import AutoModelForCausalLM as Auto

    torch.manual_seed(0)
    config = utils.tiny_config()
    config.update(dict(hidden_size=64, num_hidden_layers=2, vocab_size=320, initializer_range=0.2))
    Auto.from_config(config).save_pretrained(tmp_path / "padded")
    tok.save_pretrained(tmp_path / "padded")
    common = dict(COMMON, data=toy_file, zero=some(0, 3))
    train(sft, tmp_path / "sft", model=str(tmp_path / "padded"), epochs=0.1, **common)
    heads = [Auto.from_pretrained(tmp_path / name).lm_head.weight for name in ("sft", "padded")]
    assert heads[0].shape == (320, 64)
    moved = (heads[0] != heads[1]).any(1)
    assert moved[66:90].all() and not moved[258:].any()

    lm = utils.load_model(Auto, str(tmp_path / "sft"), torch.float32, tok)
    tokens, lengths = torch.tensor([[72, 117, 109, 97]]), torch.tensor([2])
    logprobs, entropy = sft.Policy(lm)(tokens, lengths, lengths)
    expected = lm(tokens).logits[0, 1:3, :258].log_softmax(-1)
    torch.testing.assert_close(logprobs[0], expected[[0, 1], [109, 97]])
    torch.testing.assert_close(entropy[0], -(expected.exp() * expected).sum(-1))

    calls = record_rollouts(monkeypatch)
    metrics = train(ppo, tmp_path / "ppo", model=str(tmp_path / "sft"), reward=f"{rules}:length",
                    iterations=1, minibatches=1, max_new_tokens=8, **common)
    assert metrics[1]["engine_gap_max"] < 1e-4, "sampler and trainer agree"
    assert max(batch.tokens.max() for _, batch in calls) < 258
