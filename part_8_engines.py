from prelude import *
from prelude import long, some

# -----------------------------------------------------------------------------
# 8. DeepSpeed engines, optimizer steps, EMA, what ranks say to each other
# -----------------------------------------------------------------------------


def two_answers(device="cpu"):
    """What a Policy is called with."""
    tokens = torch.tensor(ragged([12, 12]), device=device)
    return tokens, torch.tensor([5, 5], device=device), torch.tensor([7, 7], device=device)


def backward(engine, scale=1.0):
    """The gradient of the mean log-probability of two answers."""
    logprobs, _ = engine(*two_answers(engine.device))
    engine.backward(-scale * logprobs.mean())


def masters(engine):
    """The float32 weights that the optimizer updates on this rank."""
    return [p.detach() for p in utils.EMA(engine, 0).masters()]


@pytest.mark.parametrize("zero", some((0, 3), (0, 1, 2, 3)))
def test_the_optimizer_is_adam_with_its_two_decays_its_epsilon_and_gradients_of_norm_one(zero):
    """Two steps of the textbook, on the gradients that PyTorch computes without DeepSpeed."""
    plain = sft.Policy(model_of("llama"))
    engine = engine_of(lr=1e-2, eps=1e-3, zero=zero)
    params = list(plain.parameters())
    first = [torch.zeros_like(p) for p in params]
    second = [torch.zeros_like(p) for p in params]
    for step, scale in ((1, 100), (2, 0.01)):  # clipped, and not
        logprobs, _ = plain(*two_answers())
        gradients = torch.autograd.grad(-scale * logprobs.mean(), params)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert (norm > 1) == (step == 1)
        for p, g, m, v in zip(params, gradients, first, second):
            g = g / norm.clamp(min=1)
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g * g)
            unbiased = v / (1 - 0.99**step)
            p.data -= 1e-2 * m / (1 - 0.9**step) / (unbiased.sqrt() + 1e-3)
        backward(engine, scale)
        assert utils.step(engine)[0] == pytest.approx(norm.item(), rel=1e-4)
        states = engine.basic_optimizer.state.values()
        got = sum(state["exp_avg_sq"].sum().item() for state in states)
        assert got == pytest.approx(sum(v.sum().item() for v in second), rel=1e-3)
    state = utils.whole_state_dict(engine.module.lm)
    for name, p in plain.lm.named_parameters():
        torch.testing.assert_close(state[name], p.data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("zero", some((2,), (0, 2, 3)))
def test_in_bfloat16_a_first_step_is_whole_and_gradients_are_added_in_float32(zero):
    norms = []
    for micro_batches in (1, 16):
        engine = engine_of(dtype="bf16", zero=zero, micro_batches=micro_batches)
        frequencies = engine.module.lm.model.rotary_emb.inv_freq
        assert torch.equal(frequencies, model_of("llama").model.rotary_emb.inv_freq)
        before = [p.clone() for p in masters(engine)]
        for _ in range(micro_batches):  # all the same: in bfloat16, the sum is off by a percent
            backward(engine)
            norm = utils.step(engine)
        norms += norm
        moved = torch.cat([(p - q).flatten().abs() for p, q in zip(before, masters(engine))])
        assert moved.quantile(0.9).item() == pytest.approx(1e-3, rel=0.01), "as long as the rate"
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def follow_a_walk(dtype, zero, out):
    """An EMA follows a random walk of the float32 weights, with a drift; then it is saved."""
    lm = model_of("gpt2", vocab_size=258)
    engine = engine_of(lm, dtype=dtype, zero=zero)
    ema = utils.EMA(engine, 0.99)
    want = [p.double() for p in masters(engine)]
    rng = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(200):
        for p, w in zip(masters(engine), want):
            p += 1e-3 * (torch.randn(p.shape, generator=rng) + 0.3)
            w.mul_(0.99).add_(0.01 * p.double())
        ema.update()
    for got, w in zip(ema.average, want):
        assert (got - w).norm() / w.norm() < 1e-5
    before = [x.clone() for x in (*masters(engine), *ema.average)]
    with ema.in_place():
        utils.save_model(lm, utils.load_tokenizer("tiny"), [257], out)
    after = [*masters(engine), *ema.average]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    # The trained parameters end with this one; under ZeRO-3 each rank has its share of it.
    name = "transformer.ln_f.bias"
    shards = [p.ds_tensor if zero == 3 else p for p in engine.trained_params]
    n = shards[-1].numel()
    end = sum(shard.numel() for shard in shards)
    mine = slice(dist.get_rank() * n, dist.get_rank() * n + n)
    average = torch.cat([w.flatten() for w in want])[end - n : end]
    weight = torch.cat([p.flatten() for p in masters(engine)])[end - n : end]
    saved = load_lm(out).state_dict()[name].double()[mine]
    assert (saved - average).norm() < 0.05 * (weight - average).norm(), "the average is saved"
    state = utils.whole_state_dict(lm)  # empty on rank 1
    assert not state or torch.equal(state[name][mine], weight.to(lm.dtype)), "and put back"
    assert utils.EMA(engine, 0).average == [], "decay 0: no copy"


@pytest.mark.parametrize("world, dtype, zero", [(1, "fp32", 0), (1, "bf16", 2), (2, "bf16", 3)])
def test_the_ema_is_that_of_the_float32_weights_and_the_model_comes_back_to_the_bit(
        world, dtype, zero, two, tmp_path):
    if world == 1:
        follow_a_walk(dtype, zero, str(tmp_path))
    else:
        two(follow_a_walk, dtype, zero, str(tmp_path))


def poison_one_engine(zero):
    """Two engines, of which the second has a gradient of NaN on the last rank at the second step.
    Returns which of them moved at each step, what the steps returned, and the sentence after more
    such steps in a row."""
    engines = [engine_of(zero=zero), engine_of(zero=zero)]
    last_rank = dist.get_rank() == dist.get_world_size() - 1
    moved, norms = [], []
    utils.skipped.update(total=0, in_a_row=0)

    def one_step(is_bad):
        for engine in engines:
            backward(engine, math.nan if is_bad and last_rank and engine is engines[1] else 1.0)
        return utils.step(*engines)

    for step in range(3):
        before = [utils.whole_state_dict(e.module.lm) for e in engines]
        norms.append(one_step(is_bad=step == 1))
        after = [utils.whole_state_dict(e.module.lm) for e in engines]
        moved.append([any(not torch.equal(x[k], y[k]) for k in x) for x, y in zip(before, after)])
    assert utils.skipped == {"total": 1, "in_a_row": 0}
    for _ in range(utils.PATIENCE - 1):
        assert one_step(is_bad=True) == [None, None]
    with pytest.raises(utils.UserError) as error:
        one_step(is_bad=True)
    return moved, norms, str(error.value)


@pytest.mark.parametrize("world, zero", [(1, 0), (1, 3), (2, 2)])
def test_a_gradient_that_is_not_finite_on_one_rank_keeps_all_engines_from_stepping(
        world, zero, two):
    results = [poison_one_engine(zero)] if world == 1 else two(poison_one_engine, zero)
    for rank, (moved, norms, advice) in enumerate(results):
        if rank == 0:  # it gathers the weights
            assert moved == [[True, True], [False, False], [True, True]]
        assert norms[1] == [None, None] and None not in norms[0] + norms[2]
        assert "5 steps in a row" in advice and "lower --lr" in advice


@pytest.mark.parametrize("zero", [0, 3])
def test_flags_reach_deepspeed_and_a_frozen_model_is_sharded_like_the_others(zero, tmp_path):
    """Checkpointing under LoRA is the harder case: the embedding is frozen."""
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 0.25, "zero_optimization": {"overlap_comm": false}}')
    adapters = []
    for on in (False, True):
        lm = model_of("llama lora")
        flags = dict(gradient_checkpointing=on, offload=on, ds_config=str(path) if on else "")
        engine = engine_of(lm, zero=zero, **flags)
        forwards = []
        lm.model.layers[1].mlp.register_forward_pre_hook(lambda *_, n=forwards: n.append(1))
        backward(engine, scale=0.1)
        utils.step(engine)
        assert len(forwards) == 1 + on, "a layer runs again in the backward pass"
        assert engine.gradient_clipping() == (0.25 if on else 1.0)
        names = ("cpu_offload", "offload_optimizer")
        assert any(getattr(engine.optimizer, name, False) for name in names) == on
        assert bool(getattr(engine.optimizer, "offload_param", False)) == (on and zero == 3)
        lora = lm.model.layers[0].mlp.up_proj
        with utils.gathered(lora.lora_B):
            adapters.append(lora.lora_B.detach().clone())
    torch.testing.assert_close(*adapters, rtol=1e-3, atol=1e-5)
    policy = sft.Policy(model_of("llama"))
    want = policy(*two_answers())[0]
    frozen = utils.frozen_engine(policy, engine.device, sft.Config(zero=zero, dtype="fp32"))
    got = frozen(*two_answers())[0]
    torch.testing.assert_close(got, want)
    assert not got.requires_grad and hasattr(frozen, "module") == (zero == 3)


def test_offloaded_frozen_models_are_on_the_device_only_while_they_are_needed():
    class Model(torch.nn.Linear):
        """Records where it is sent, since there may be no second device to send it to."""
        sent_to = []

        def to(self, device):
            self.sent_to.append(device)
            return self

    meta = torch.device("meta")
    utils.frozen_engine(Model(2, 2), meta, sft.Config(offload=True))
    utils.frozen_engine(Model(2, 2), meta, sft.Config())
    assert Model.sent_to == ["cpu", meta]
    with pytest.raises(KeyError), utils.on_device(meta, Model(2, 2), None):
        raise KeyError
    assert Model.sent_to[2:] == [meta, "cpu"], "there, and back whatever happens"


def what_ranks_say():
    utils.init_distributed(0)
    rank = dist.get_rank()
    rows = torch.arange(10)[:, None] * torch.ones(1, 3)                             # (10, 3)
    mine = rows[:5][rank::2, : 2 + rank]  # 3 rows of 2, 2 rows of 3
    gathered = utils.gather_rows(mine)
    total = utils.sum_over_ranks(0.1 + rank, "cpu")
    indices = np.array([4, 7, 2, 9, 5])
    lengths = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    seen = []

    def forward(part):
        seen.append(len(part))
        return rows[part, :2]

    answers = utils.forward_in_micro_batches(forward, indices, lengths, 2)
    shares = utils.split_micro_batches(indices, lengths, 2)
    try:
        utils.on_rank0(utils.load, int, "out/nowhere")
    except utils.UserError as error:
        said = str(error)
    with pytest.raises(utils.UserError, match="3 rows cannot be divided by 2 ranks"):
        utils.micro_batch_size(3, 0)
    sizes = utils.micro_batch_size(12, 4)
    return gathered, total, answers, seen, [s.tolist() for s in shares], said, sizes


def test_ranks_gather_rows_in_order_sum_exactly_and_share_forwards_and_errors(two):
    results = two(what_ranks_say)
    for gathered, total, answers, seen, _, said, sizes in results:
        want = torch.arange(5.0)[:, None] * torch.tensor([[1.0, 1, 0], [1, 1, 1]])[[0, 1, 0, 1, 0]]
        assert torch.equal(gathered, want)
        assert total == pytest.approx(1.2, abs=1e-15)
        assert answers[:, 0].tolist() == [4, 7, 2, 9, 5]
        assert seen == [2, 1], "as many forwards on every rank"
        assert "no such model folder" in said and sizes == (4, 2)
    assert [shares for *_, shares, _, _ in results] == [[[5, 4], [9]], [[7, 2]]]
