# -----------------------------------------------------------------------------
# 9. two ranks take the steps of one process
from part_6_second_versions import ranked_rows, texts_of_many_lengths
from part_7_runs import RULES_OF_RUNS
from prelude import *
from prelude import long, some


def trained_on_ranks(name, out, flags):
    script = {"sft": sft, "reward": reward, "ppo": ppo}[name]
    metrics = None
    script.main(script.Config(out=out, **flags))
    if dist.get_rank() == 0:  # it has written them
        metrics = read_lines(Path(out) / "metrics.jsonl")
    return metrics


def assert_same_steps(metrics, expected, rel=2e-3):
    """The same numbers, but for rounding and for time."""
    assert len(metrics) == len(expected)
    timed = re.compile(r".*_s|seconds|tokens_per_s|memory_gib|engine_gap.*")
    for row, expected_row in zip(metrics, expected):
        assert set(row) == set(expected_row)
        for name, value in expected_row.items():
            if not timed.fullmatch(name):
                assert row[name] == pytest.approx(value, rel=rel, abs=2e-5), (row["step"], name)


def weights_of(folder):
    from safetensors.torch import load_file

    state = load_file(Path(folder) / "model.safetensors")
    return torch.cat([x.flatten() for _, x in sorted(state.items())])


def assert_same_weights(folder, other, start):
    """Closer to each other than a hundredth of the way that they have come."""
    apart = weights_of(folder) - weights_of(other)
    assert apart.norm() < 0.01 * (weights_of(other) - weights_of(start)).norm()


def use_collectives():
    """Gathers and computes rows that two ranks hold in turns, of different number and width."""
    rank = dist.get_rank()
    whole = torch.arange(35).view(5, 7) + 1
    lengths = np.array([9, 8, 7, 6, 5])

    def forward(indices):
        return torch.tensor(indices)[:, None] * torch.tensor([1.0, 10.0])

    def fail():
        raise utils.UserError("of rank 0")

    try:
        utils.on_rank0(fail)
    except utils.UserError as error:
        message = str(error)
    return {
        "gathered": utils.gather_rows(whole[rank::2, : (4, 7)[rank]]).tolist(),
        "vector": utils.gather_rows(torch.from_numpy(lengths)[rank::2]).tolist(),
        "computed": utils.forward_in_micro_batches(
            forward, np.array([4, 2, 0]), lengths, 1).tolist(),
        "sum": utils.sum_over_ranks(rank + 0.5, "cpu"),
        "on_rank0": utils.on_rank0(dist.get_rank),
        "error": message,
    }


def start_rank(seed):
    utils.init_distributed(seed)
    return dist.get_world_size()


def test_collectives_keep_the_order_of_rows_and_tell_all_ranks_of_an_error(two):
    assert two(start_rank, 1) == [2, 2]
    whole = torch.arange(35).view(5, 7) + 1
    whole[::2, 4:] = 0  # rank 0 has even rows, and needs four columns
    for result in two(use_collectives):
        assert result == {
            "gathered": whole.tolist(), "vector": [9, 8, 7, 6, 5], "sum": 2,
            "computed": [[4, 40], [2, 20], [0, 0]], "on_rank0": 0, "error": "of rank 0"}


def test_sft_and_reward_under_zero_3_take_the_steps_of_one_process(two, chain, toy_file, tmp_path):
    """With a micro batch that does not divide a rank's share of a step; reward.py on rankings."""
    start = chain["sft"][0]
    rankings = write_rows(tmp_path / "rankings.jsonl", ranked_rows())
    for script, source in ((sft, toy_file), (reward, rankings)):
        name = script.__name__
        flags = dict(COMMON, model=start, data=source, epochs=0.22, lr=1e-3)
        one = train(script, tmp_path / name, **flags, micro_batch=5)
        out = str(tmp_path / f"{name}-3")
        metrics, _ = two(trained_on_ranks, name, out, dict(flags, zero=3, micro_batch=3))
        assert_same_steps(metrics, one)
        assert len(one) > 2
        if script is sft:
            assert_same_weights(out, tmp_path / name, start)


@pytest.fixture(scope="module")
def ppo_flags(chain, toy_file, tmp_path_factory):
    """PPO of two iterations where a function leaves out most answers, so that some micro batches,
    and some ranks' parts of a step, have none."""
    rules = tmp_path_factory.mktemp("rules") / "rules.py"
    rules.write_text(RULES_OF_RUNS)
    folder = chain["reward"][0]
    return dict(COMMON, model=chain["sft"][0], reward=f"{rules}:picky,{folder}:0", critic=folder,
                data=toy_file, batch_size=16, iterations=2, minibatches=2, ppo_epochs=2,
                max_new_tokens=8, actor_lr=1e-3, critic_lr=3e-4, ema=0.5)


def test_ppo_under_zero_3_with_tensor_parallel_rollouts_takes_the_steps_of_one_process(
        two, ppo_flags, chain, tmp_path):
    one = train(ppo, tmp_path / "one", **ppo_flags, micro_batch=4)
    assert 4 < one[1]["unjudged"] < 16 and abs(one[2]["kl"]) > 1e-3
    flags = dict(ppo_flags, zero=3, tp=2, micro_batch=1)
    metrics, _ = two(trained_on_ranks, "ppo", str(tmp_path / "two"), flags)
    assert_same_steps(metrics, one)
    for folder in (".", "ema"):
        assert_same_weights(tmp_path / "two" / folder, tmp_path / "one" / folder, chain["sft"][0])
    samples = [read_lines(tmp_path / run / "samples.jsonl") for run in ("one", "two")]
    for a, b in zip(*samples):
        assert (a["prompt"], a["answer"]) == (b["prompt"], b["answer"])
    # Frozen engines of ZeRO 3 read the weights that they were given.
    alone = train(ppo, tmp_path / "zero3", **dict(ppo_flags, zero=3, iterations=1), micro_batch=4)
    for name in ("score_reward", "score_picky", "kl", "actor_loss", "critic_loss"):
        assert alone[1][name] == pytest.approx(one[1][name], rel=1e-3, abs=2e-5), name


def test_ppo_with_lora_zero_2_offload_checkpointing_and_a_mixture_takes_the_steps_of_one_process(
        two, ppo_flags, chain, tmp_path):
    """With LoRA the reference is the actor's base, and what is saved is a plain merged model."""
    from transformers import AutoModelForCausalLM

    text = write_rows(tmp_path / "text.jsonl", texts_of_many_lengths())
    flags = dict(ppo_flags, lora=4, ptx_data=text, actor_lr=1e-2)
    one = train(ppo, tmp_path / "one", **flags)
    more = dict(zero=2, offload=True, gradient_checkpointing=True, micro_batch=3)
    metrics, _ = two(trained_on_ranks, "ppo", str(tmp_path / "two"), flags | more)
    assert_same_steps(metrics, one)
    assert_same_weights(tmp_path / "two", tmp_path / "one", chain["sft"][0])

    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    base = AutoModelForCausalLM.from_pretrained(chain["sft"][0])
    assert {n for n, _ in lm.named_parameters()} == {n for n, _ in base.named_parameters()}
    tok = utils.load_tokenizer("tiny")
    # The held-out answers of the last evaluation once more, by what was saved.
    cfg = ppo.Config(**flags)
    rows = data.load(cfg.data, "ppo", "", 0.2, tok, [tok.eos_token_id], 56)[1]
    seeds = [2**31 + i for i in range(len(rows))]
    batch = ppo.rollout(hybrid_engine.HybridEngine(lm), rows, np.arange(len(rows)), seeds, cfg, tok,
                        [tok.eos_token_id])
    kls = []
    for tokens, p, n in zip(batch.tokens.tolist(), batch.prompt_lens.tolist(), batch.lengths):
        if "sort" in tok.decode(tokens[:p]):
            kls.append(sum(plain_logprobs(lm, tokens[:n], p) - plain_logprobs(base, tokens[:n], p)))
    assert one[2]["eval_kl"] == pytest.approx(np.mean(kls), rel=1e-3)
    assert one[2]["eval_kl"] > 0.01, "it has moved away from its base"


def rows_of_rank():
    yield from ({"prompt": f"row {i} of rank {dist.get_rank()}"} for i in range(50))


def load_rows_of_rank(path):
    tok = utils.load_tokenizer("tiny")
    try:
        data.load(path, "ppo", "", 0.2, tok, [tok.eos_token_id], 64)
    except utils.UserError as error:
        return str(error)


def test_ranks_that_read_different_rows_are_told_so(two, tmp_path):
    path = tmp_path / "rows.py"
    path.write_text("from part_9_ranks import rows_of_rank as rows\n")
    for message in two(load_rows_of_rank, f"{path}:rows"):
        assert "ranks read different rows" in message


def poison(zero, bad_rank):
    """Two engines; in the second step one rank's gradient of one of them is NaN. Returns of each
    step the norms, and whether the weights of both moved."""
    engines = [engine_of(zero=zero), engine_of(zero=zero)]
    tokens, lengths = torch.arange(6, 14).view(2, 4), torch.tensor([2, 2])
    steps = []
    for step in range(3):
        before = [utils.EMA(e, 0.5).average for e in engines]
        for engine in engines:
            loss = engine(tokens, lengths, lengths)[0].sum()
            is_bad = step == 1 and engine is engines[1] and dist.get_rank() == bad_rank
            engine.backward(loss * math.nan if is_bad else loss)
        norms = utils.step(*engines)
        moved = [any((p != q).any() for p, q in zip(utils.EMA(e, 0.5).average, b))
                 for e, b in zip(engines, before)]
        steps.append(([norm is not None for norm in norms], moved))
    return steps


@pytest.mark.parametrize("zero, bad_rank", some([(0, 0), (2, 1)], [(0, 0), (2, 1), (3, 1)]))
def test_a_gradient_that_is_not_finite_on_one_rank_keeps_all_engines_from_stepping(
        zero, bad_rank, two):
    for steps in two(poison, zero, bad_rank):
        assert steps[1] == ([False, False], [False, False])
        assert steps[0] == steps[2] == ([True, True], [True, True])
