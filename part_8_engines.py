from prelude import *
from prelude import long, some

# -----------------------------------------------------------------------------
# 8. DeepSpeed engines, optimizer steps, EMA
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


@pytest.mark.parametrize("zero", [0, 3])
def test_a_step_that_is_not_finite_is_taken_by_no_engine_and_five_in_a_row_end_the_run(zero):
    engines = [engine_of(zero=zero), engine_of(zero=zero)]
    utils.skipped.update(total=0, in_a_row=0)

    def one_step(is_bad):
        before = [torch.cat([p.flatten() for p in masters(e)]) for e in engines]
        for engine in engines:
            backward(engine, math.nan if is_bad and engine is engines[1] else 1.0)
        norms = utils.step(*engines)
        after = [torch.cat([p.flatten() for p in masters(e)]) for e in engines]
        moved = [not torch.equal(x, y) for x, y in zip(before, after)]
        assert moved == [norm is not None for norm in norms]
        return moved

    assert [one_step(bad) for bad in (False, True, False)] == [[True] * 2, [False] * 2, [True] * 2]
    assert utils.skipped == {"total": 1, "in_a_row": 0}
    for _ in range(utils.PATIENCE - 1):
        assert one_step(is_bad=True) == [False, False]
    with pytest.raises(utils.UserError, match="5 steps in a row .*lower --lr"):
        one_step(is_bad=True)


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
