import weakref
from collections import defaultdict
from types import SimpleNamespace

from prelude import *
from prelude import long, some
from hybrid_engine import HFEngine, HybridEngine, make_engine

# -----------------------------------------------------------------------------
# 4. the hybrid engine: its tokens are those of transformers, its log-probabilities the textbook's


def transformers_greedy(lm, prompt, max_new_tokens, eos_token_id=None):
    """The row that transformers.generate makes of one prompt."""
    out = lm.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False,
                      eos_token_id=eos_token_id, pad_token_id=0)
    return out[0].tolist()


def assert_near(got, want, within=1e-4):
    torch.testing.assert_close(got.double(), want.double(), rtol=within, atol=within)


def check_logprobs(out, lm, temperature=1.0):
    """The log-probabilities of a Rollout are the textbook's, row by row, and 0 past the end."""
    for i, row in enumerate(rows_of(out)):
        want = plain_logprobs(lm, row, int(out.prompt_lens[i]), temperature)
        assert_near(out.logprobs[i, : len(want)], want)
        assert (out.logprobs[i, len(want) :] == 0).all()


@pytest.mark.parametrize("lora", ["", " lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_that_of_transformers_token_for_token(kind, lora):
    lm = model_of(kind + lora)
    lengths = (1, 3, 3, 17, 40, 90)
    prompts = ragged(lengths)
    engine = HybridEngine(lm, max_batch=4)
    out = engine.generate(prompts, 24, temperature=0)
    ends = [int(out.tokens[i, lengths[i] + 4]) for i in (2, 3)]  # so that some answers end early
    out = engine.generate(prompts, 24, temperature=0, eos_token_id=ends)
    assert len(set(out.answer_lens.tolist())) > 1, "answers end at different places"
    for prompt, row in zip(prompts, rows_of(out)):
        assert row == transformers_greedy(lm, prompt, 24, ends), f"prompt of {len(prompt)} tokens"
    check_logprobs(out, lm)


def vector_of_weights(lm):
    return torch.nn.utils.parameters_to_vector(lm.parameters()).detach().clone()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama lora", "gpt2 lora"])
def test_the_engine_follows_every_optimizer_step_and_never_changes_a_weight(kind):
    lm = model_of(kind)
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=0.02)
    engine = HybridEngine(lm)
    prompts = ragged((3, 9, 5))
    ids = torch.tensor([prompts[1]])
    before = None
    for _ in range(3):
        optimizer.zero_grad()
        lm(ids, labels=ids).loss.backward()
        optimizer.step()
        weights = vector_of_weights(lm)
        rows = rows_of(engine.generate(prompts, 12, temperature=0))
        assert rows == [transformers_greedy(lm, prompt, 12) for prompt in prompts]
        assert torch.equal(vector_of_weights(lm), weights), "no weight changes by one bit"
        assert rows != before, "the steps were large enough to change the output"
        before = rows
        engine.release()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "opt-350m", "gpt2", "bloom"])
def test_weights_are_read_by_reference_and_one_product_has_the_projections(kind, monkeypatch):
    lm = model_of(kind)
    weights = vector_of_weights(lm)
    engine = HybridEngine(lm)
    want = engine.generate(ragged((3,)), 2, temperature=0)
    assert torch.equal(vector_of_weights(lm), weights)
    storages = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    for x in engine.decoder.weights:
        assert x.untyped_storage().data_ptr() in storages, f"a copy of {tuple(x.shape)}"
    read = sum(x.numel() for x in engine.decoder.weights)
    assert read == len(weights), "all of them, each once"

    products = []

    def counted(function):
        return lambda *args: products.append(args) or function(*args)

    for name in ("linear", "linear_activation"):
        monkeypatch.setattr(kernels, name, counted(getattr(kernels, name)))
    for p in lm.parameters():  # as module.to(device) does: the neighbours are apart
        p.data = p.data.clone()
    got = engine.generate(ragged((3,)), 2, temperature=0)  # a prefill and a step
    assert torch.equal(got.tokens, want.tokens)
    ends = 3 if kind == "opt-350m" else 1
    assert len(products) == 2 * (4 * 3 + ends), "q, k, v; out; gate and up; down; and the ends"


def test_the_projections_of_a_deepspeed_engine_are_neighbours_too():
    utils.init_distributed(0)
    lm = model_of("opt").bfloat16()  # whose parameters stand in ZeRO's buffer as k, v, q
    trained = utils.train_engine(sft.Policy(lm), 1e-2, 2, 1, sft.Config(zero=2, dtype="bf16"))
    engine = HybridEngine(trained)
    for _ in range(2):
        engine.generate(ragged((3, 9)), 4)
        for layer, module in zip(engine.decoder.layers, lm.model.decoder.layers, strict=True):
            for name, columns in zip("qkv", layer.qkv.columns, strict=True):
                linear = getattr(module.self_attn, f"{name}_proj")
                assert layer.qkv.joint.weight[columns].data_ptr() == linear.weight.data_ptr()
                assert layer.qkv.joint.bias[columns].data_ptr() == linear.bias.data_ptr()
        logprobs, _ = trained(torch.tensor(ragged((6,))), torch.tensor([2]), torch.tensor([4]))
        trained.backward(-logprobs.mean())
        utils.step(trained)


# -----------------------------------------------------------------------------
# batching and sampling


def test_a_row_keeps_its_tokens_however_rows_are_batched():
    lm = model_of("llama")
    prompts = ragged([1 + i % 13 for i in range(40)])
    call = dict(max_new_tokens=20, temperature=1.3, eos_token_id=[7, 8, 9])

    def sample(engine, rows=range(40)):
        out = engine.generate([prompts[i] for i in rows], seed=[100 + i for i in rows], **call)
        assert out.tokens.size(1) == (out.prompt_lens + out.answer_lens).max()
        assert out.tokens.sum() == sum(map(sum, rows_of(out))), "zeros behind each row"
        return out, dict(zip(rows, rows_of(out)))

    want, whole = sample(HybridEngine(lm))
    check_logprobs(want, lm, 1.3)
    assert len(set(want.answer_lens.tolist())) > 3, "answers end at different places"
    for row, n in zip(whole.values(), want.answer_lens.tolist()):
        assert n == 20 or row[-1] in (7, 8, 9)
        assert not {7, 8, 9} & set(row[-n:-1]), "each of the three ends an answer"

    slot = 2 * 3 * 2 * 64 * 16 * 4  # K and V, layers, key heads, capacity, head size, bytes
    for limit in (dict(max_batch=4), dict(kv_gib=4.5 * slot / 2**30, max_len=64)):
        engine = HybridEngine(lm, **limit)
        out, rows = sample(engine)
        assert rows == whole, "in waves: ten times more rows than slots"
        assert len(engine.cache.slots) == 4
        assert_near(out.logprobs, want.logprobs)
    assert sample(engine, [31, 2, 17])[1] == {i: whole[i] for i in (31, 2, 17)}
    assert prompts[3] + list(engine.stream(prompts[3], seed=[103], **call)) == whole[3]
    next(engine.stream(prompts[5], seed=[1], **call))  # not read to its end
    assert sample(engine)[1] == whole
    first, same, other = (engine.generate(prompts, 8, seed=seed).tokens for seed in (5, 5, 6))
    assert torch.equal(first, same) and not torch.equal(first, other)

    large = [weakref.ref(x) for x in (engine.cache.k, engine.cache.rows.tokens, engine.out_tokens)]
    engine.release()
    assert [ref() for ref in large] == [None] * 3, "release gives the memory back"


def test_answers_to_one_prompt_share_its_prefill_and_differ():
    lm = model_of("qwen3")
    engine = HybridEngine(lm)
    out = engine.generate(ragged([30]) * 8 + ragged([5]), 10, seed=3)
    assert engine.stats["prefill_tokens"] == 35, "30 tokens once, and the other 5"
    assert len({tuple(row) for row in rows_of(out)[:8]}) > 4
    check_logprobs(out, lm)


@pytest.mark.parametrize("kind", ["opt", "opt lora", "gpt_neox"])  # tied, adapted, untied
def test_ids_without_a_word_are_never_sampled_and_have_no_probability(kind):
    lm = model_of(kind)
    lm.config.num_words = 90  # of 97
    head = lm.get_output_embeddings().weight
    with torch.no_grad():
        head[90:] = 10 * head[:7]  # greedy would often take one of them
    prompts = ragged((3, 9, 5), vocab=90)
    policy = sft.Policy(lm)
    greedy = [make_engine(name, policy).generate(prompts, 20, temperature=0)
              for name in ("hybrid", "hf")]
    assert rows_of(greedy[0]) == rows_of(greedy[1])
    for engine in (HybridEngine(policy), HFEngine(policy)):
        out = engine.generate(prompts, 60, temperature=2.0, seed=4)
        assert out.tokens.max() < 90
        logprobs, _ = policy(out.tokens, out.prompt_lens, out.answer_lens, 2.0)
        assert_near(out.logprobs, logprobs)
    if kind == "gpt_neox":
        logprobs.sum().backward()
        gradient = head.grad.abs().sum(1)
        assert (gradient[90:] == 0).all() and (gradient[:90] > 0).all()


def test_the_slow_path_has_the_same_interface_and_the_same_greedy_tokens():
    lm = model_of("gpt2")
    policy = sft.Policy(lm)
    prompts = ragged((4, 11, 1))
    slow = make_engine("hf", policy)
    call = dict(temperature=0, eos_token_id=[7, 20])
    want = make_engine("hybrid", policy).generate(prompts, 12, **call)
    got = slow.generate(prompts, 12, **call)
    for name in ("tokens", "prompt_lens", "answer_lens", "sampled"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert_near(got.logprobs, want.logprobs)
    call = dict(temperature=0.7, seed=4, eos_token_id=list(range(6, 20)))
    first = slow.generate(prompts, 12, **call)
    assert len(set(first.answer_lens.tolist())) > 1
    check_logprobs(first, lm, 0.7)
    # Whatever the model is set to, it is the trained distribution that is sampled.
    lm.generation_config.update(repetition_penalty=3.0, min_length=20)
    lm.gradient_checkpointing_enable()
    lm.train()
    assert torch.equal(first.tokens, slow.generate(prompts, 12, **call).tokens)
    assert lm.training and lm.generation_config.repetition_penalty == 3.0


# -----------------------------------------------------------------------------
# CUDA graphs


@pytest.fixture
def graphs_on_a_cpu(monkeypatch):
    """HybridEngine schedules as on a GPU: steps of few sizes, eight of them between two reads of
    the flags. The replay of a graph is the step itself."""
    def capture(self, step):
        return SimpleNamespace(replay=step)

    monkeypatch.setattr(hybrid_engine.CUDAGraphs, "capture", capture)
    monkeypatch.setitem(hybrid_engine.STEPS_PER_SYNC, "cpu", 8)


def with_graphs(lm, **limits):
    engine = HybridEngine(lm, **limits)
    engine.use_graphs = True
    return engine


@pytest.mark.parametrize("kind, max_batch", [("llama", 12), ("bloom", 24)])
def test_steps_of_few_sizes_give_every_row_the_same_tokens(kind, max_batch, graphs_on_a_cpu,
                                                           monkeypatch):
    lm = model_of(kind)
    prompts = ragged([1 + i % 13 for i in range(40)])
    call = dict(eos_token_id=[7, 8, 9], seed=3, temperature=1.3)
    want = HybridEngine(lm).generate(prompts, 20, **call)
    engine = with_graphs(lm, max_batch=max_batch)
    read = []
    waiting_at_moves = []
    attention, move = kernels.decode_attention, hybrid_engine.KVCache.move
    monkeypatch.setattr(kernels, "decode_attention", lambda *args: (
        read.append(int(args[3].sum())) or attention(*args)))
    monkeypatch.setattr(hybrid_engine.KVCache, "move", lambda *args: (
        waiting_at_moves.append(len(engine.waiting)) or move(*args)))
    got = engine.generate(prompts, 20, **call)
    assert rows_of(got) == rows_of(want)
    assert_near(got.logprobs, want.logprobs)
    # Each answer but its first token was decoded once, and read the tokens before it.
    pairs = zip(got.prompt_lens.tolist(), got.answer_lens.tolist())
    keys = sum(sum(range(p + 1, p + a)) for p, a in pairs)
    assert sum(read) == 3 * keys, "rows that have ended read no keys, in each of three layers"
    assert waiting_at_moves, "in the end rows move, so that smaller graphs serve the rest"
    assert not any(waiting_at_moves), "but not while a prompt is waiting"
    assert {n for n, *_ in engine.graphs.graphs} <= {1, 8, max_batch}
    engine.cache.slots = torch.arange(200)
    sizes = [engine.step_size(n) for n in range(1, 201)]
    assert sorted(set(sizes)) == [1, 8, 64, 128, 192, 200]
    assert all(size >= n for n, size in enumerate(sizes, 1))


def test_graphs_live_over_rollouts_until_a_tensor_that_they_use_has_moved(graphs_on_a_cpu,
                                                                          monkeypatch):
    lm = model_of("llama")
    engine = with_graphs(lm)

    def graphs(lengths=(3, 9, 5)):
        prompts = ragged(lengths)
        out = engine.generate(prompts, 40, seed=1)
        assert rows_of(out) == rows_of(HybridEngine(lm).generate(prompts, 40, seed=1))
        return dict(engine.graphs.graphs)

    first = graphs()
    assert len(first) == 1, "the first step of a size runs as it is, then it is captured"
    with torch.no_grad():
        for p in lm.parameters():
            p -= 0.01
    assert graphs() == first, "an optimizer step moves nothing"
    assert graphs((3, 1)) == first, "nor does a smaller rollout"
    monkeypatch.setattr(engine, "may_stay", lambda: True)
    engine.release()
    assert engine.decoder.layers is None and graphs() == first, "where the cache may stay"
    monkeypatch.setattr(engine, "may_stay", lambda: False)
    engine.release()
    assert engine.cache is None and not engine.graphs.graphs
    after_release = graphs()
    assert after_release != first and after_release.keys() == first.keys()
    norm = lm.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data.clone()
    assert graphs() != after_release


def test_the_cache_stays_where_it_fits_beside_the_peak_of_training(monkeypatch):
    engine = HybridEngine(model_of("llama"))
    engine.model = SimpleNamespace(global_steps=0)  # as DeepSpeed counts them
    peaks = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (90, 141))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: peaks[-1])

    def stays(peak, steps=1):
        """Whether the cache stays after a rollout, before which training had this peak."""
        peaks.append(peak)
        engine.model.global_steps += steps
        engine.device = torch.device("cuda")
        engine.measure_training()
        engine.generate(ragged((3,)), 4)  # on the CPU
        engine.device = torch.device("cuda")
        engine.cache.bytes = 20
        engine.release()
        return engine.cache is not None

    assert not stays(1, steps=0), "the first rollout: nothing is known of training"
    assert not stays(50, steps=0), "behind an evaluation there was no training either"
    assert stays(70), "70 + 20 are 90% of 100, which this process may have"
    assert stays(90), "of this peak 20 are the cache, which has stayed"
    assert not stays(91)
    assert not stays(10), "the largest peak counts"


@pytest.mark.parametrize("kind", ["qwen2", "bloom"])  # windows and grouped keys; by head and ALiBi
def test_the_triton_kernels_take_the_tensors_of_the_engine(kind, graphs_on_a_cpu, monkeypatch):
    lm = model_of(kind, num_hidden_layers=2)
    prompts = ragged((3, 9)) + ragged((3, 9))[1:]
    want = HybridEngine(lm).generate(prompts, 3, seed=3)
    for name in ("prefill_attention", "decode_attention", "rope_and_cache", "add_norm"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name + "_triton"))
    monkeypatch.setitem(hybrid_engine.STEPS_PER_SYNC, "cpu", 2)
    got = with_graphs(lm).generate(prompts, 3, seed=3)
    assert rows_of(got) == rows_of(want)
    assert_near(got.logprobs, want.logprobs)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", some(("qwen3 lora", "opt-350m", "bloom"), KINDS))
def test_a_decode_step_never_waits_for_the_host_nor_mixes_devices(kind, monkeypatch):
    """On fake tensors of a GPU, which have a shape and no data: they raise an error where the host
    would ask for a number, and where two devices meet. Kernels are replaced."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    class WithoutDriver(TorchFunctionMode):
        """Indexing of a CUDA tensor asks for a driver: here it is made of views."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is not torch.Tensor.__getitem__:
                return func(*args, **(kwargs or {}))
            x, keys = args
            keys = keys if isinstance(keys, tuple) else (keys,)
            if isinstance(keys[0], torch.Tensor):
                return torch.ops.aten.index.Tensor(x, keys)
            dim = 0
            for key in keys:
                if isinstance(key, slice):
                    x = torch.ops.aten.slice.Tensor(x, dim, key.start or 0, key.stop)
                else:
                    x = x.unsqueeze(dim) if key is None else x.select(dim, key)
                dim += not isinstance(key, int)
            return x

    launched = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        def launch(*args, _name=name, **options):
            assert all(x.is_cuda for x in args if isinstance(x, torch.Tensor)), _name
            launched.append(_name)
        monkeypatch.setattr(kernels, name, defaultdict(lambda launch=launch: launch))
    monkeypatch.setattr(HybridEngine, "free_memory", lambda self: 2**30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    lm = model_of(kind).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutDriver(), torch.no_grad():
        for module in lm.modules():  # made on the CPU, because initialisation needs a GPU
            for tensors in (module._parameters, module._buffers):
                for name, x in tensors.items():
                    if x is not None:
                        tensors[name] = torch.empty_like(x, device="cuda:0")
        engine = HybridEngine(lm)
        engine.sampling = (1.0, 0, 1.0)
        engine.prepare(4, 64, None)
        engine.decode_step(4)
    assert launched.count("decode_kernel") == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_graph_replay_equals_eager_steps_across_an_optimizer_step(kind):
    lm = model_of(kind).cuda()
    prompts = ragged((3, 30, 9, 1, 200))
    engine = HybridEngine(lm)
    eager = HybridEngine(lm)
    eager.use_graphs = False
    for _ in range(2):
        for call in (dict(temperature=0.0), dict(eos_token_id=list(range(60, 97)), top_p=0.9)):
            got = engine.generate(prompts, 40, seed=3, **call)
            want = eager.generate(prompts, 40, seed=3, **call)
            assert rows_of(got) == rows_of(want)
            assert_near(got.logprobs, want.logprobs, within=1e-3)
        assert engine.graphs.graphs, "steps were captured"
        with torch.no_grad():
            for p in lm.parameters():
                p += 0.01 * torch.randn_like(p)


# -----------------------------------------------------------------------------
# what the engine refuses

BAD_CALLS = {
    "a prompt has 500 tokens; with 20 new ones that is more than the model's context of 512":
        dict(prompts=ragged((3, 500))),
    "that is more than max_len of 32": dict(prompts=ragged((3, 20)), limits=dict(max_len=32)),
    "one row of 32 tokens needs .* raise kv_gib": dict(limits=dict(kv_gib=1e-6)),
    "or one is empty": dict(prompts=[[3], []]),
    "outside the vocabulary of 97": dict(prompts=[[97]]),
    "top_p 0.0 in": dict(top_p=0.0),
    "model type 'falcon'.*--engine hf": dict(config=dict(model_type="falcon")),
    "does not support activation 'mish'": dict(config=dict(hidden_act="mish")),
    "rope scaling 'dynamic'": dict(rope_parameters=dict(
        rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    "tp=3 does not divide one of": dict(limits=dict(tp=3)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_what_the_engine_cannot_do_it_says_before_it_starts(message):
    call = dict(prompts=[[3]], max_new_tokens=20, limits={}, config={}) | BAD_CALLS[message]
    rope = {"rope_parameters": call.pop("rope_parameters")} if "rope" in message else {}
    lm = model_of("llama", **rope)
    for name, value in call.pop("config").items():
        setattr(lm.config, name, value)
    with pytest.raises(utils.UserError, match=message):
        HybridEngine(lm, **call.pop("limits")).generate(**call)


def test_a_model_that_has_diverged_gets_one_sentence():
    lm = model_of("llama")
    lm.model.norm.weight.data[3] = float("nan")
    with pytest.raises(utils.UserError, match="training has diverged"):
        HybridEngine(lm).generate([[3]], 4)
    with pytest.raises(utils.UserError, match="training has diverged"):
        list(HybridEngine(lm).stream([3], 4))


# -----------------------------------------------------------------------------
# several ranks

TP_KINDS = ("llama", "qwen3 lora", "gpt2 lora", "opt", "opt-350m", "bloom")
TP_PROMPTS = (3, 30, 9, 1, 6)  # lengths; so that one of two ranks has more of them
TP_SEEDS = [10, 11, 12, 13, 14]


@contextlib.contextmanager
def counted_collectives():
    """A list of the names of all collectives of PyTorch and DeepSpeed that are called."""
    import deepspeed

    calls = []

    def counted(name, function):
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    names = ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast",
             "reduce_scatter_tensor")
    backend = deepspeed.comm.comm.cdb
    gather = backend.all_gather_function  # a reference of its own
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, counted(name, getattr(dist, name)))
        patch.setattr(backend, "all_gather_function", counted("deepspeed", gather))
        yield calls


def tensor_parallel_rollouts():
    """On two ranks, each with every other prompt."""
    utils.init_distributed(1)
    rank = dist.get_rank()
    prompts = ragged(TP_PROMPTS)
    out = {}
    for kind in TP_KINDS:
        engine = HybridEngine(model_of(kind), tp=2)
        for temperature in (0.0, 1.0):
            got = engine.generate(prompts[rank::2], 12, temperature, seed=TP_SEEDS[rank::2])
            out[kind, temperature] = rows_of(got), got.logprobs
            engine.release()
    with counted_collectives() as out["collectives"]:
        engine.generate(prompts[:1], 6, temperature=0)
    return out


def test_tensor_parallel_ranks_give_the_tokens_of_one_process(two):
    prompts = ragged(TP_PROMPTS)
    results = two(tensor_parallel_rollouts)
    for kind, temperature in itertools.product(TP_KINDS, (0.0, 1.0)):
        want = HybridEngine(model_of(kind)).generate(prompts, 12, temperature, seed=TP_SEEDS)
        for rank, result in enumerate(results):
            rows, logprobs = result[kind, temperature]
            assert rows == rows_of(want)[rank::2], f"{kind}, tp=2, rank {rank}"
            assert_near(logprobs, want.logprobs[rank::2])
    for result in results:
        forwards = 6  # a prefill, which samples the first token, and five steps
        assert result["collectives"].count("all_reduce") == 2 * 3 * forwards + 1, (
            "two per layer and forward, and one to plan the KV cache")
        assert set(result["collectives"]) <= {"all_reduce", "all_gather"}, "and no others"


def rollouts_of_shards():
    """On two ranks: greedy tokens before and after an optimizer step, with and without LoRA."""
    utils.init_distributed(1)
    prompts = ragged((3, 30, 9, 1))
    tokens, _ = data.pad(prompts)
    lens = [torch.ones(4).long(), torch.tensor([2, 29, 8, 1])]
    tokens = torch.nn.functional.pad(tokens, (0, 1))
    out = {}
    for stage, kind in itertools.product((2, 3), ("llama", "llama lora")):
        policy = sft.Policy(model_of(kind))
        trained = utils.train_engine(policy, 1e-2, 4, 1, sft.Config(zero=stage, dtype="fp32"))
        engine = HybridEngine(trained)
        for step in range(2):
            got = engine.generate(prompts, 12, temperature=0)
            out[stage, kind, step] = rows_of(got)
            engine.release()
            assert engine.decoder.layers is None, "what was gathered is given back"
            logprobs, _ = trained(tokens, *lens)
            trained.backward(-logprobs.sum() / 40)
            utils.step(trained)
    end = engine.generate(prompts[:1], 1, temperature=0).tokens[0, -1].item()
    for n, eos in ((1, None), (40, end if dist.get_rank() == 0 else None)):
        engine.release()
        with counted_collectives() as out["collectives", n]:  # rank 0 ends at once, rank 1 never
            got = engine.generate(prompts[:1], n, temperature=0, eos_token_id=eos)
    out["uneven"] = got.answer_lens.tolist()
    return out


def test_zero_shards_give_the_tokens_of_one_process_and_are_gathered_once_per_rollout(two):
    results = two(rollouts_of_shards)
    for result, kind in itertools.product(results, ("llama", "llama lora")):
        for step in (0, 1):
            assert result[2, kind, step] == result[3, kind, step], f"{kind}, step {step}"
        assert result[2, kind, 0] != result[2, kind, 1]
        want = HybridEngine(model_of(kind)).generate(ragged((3, 30, 9, 1)), 12, temperature=0)
        assert result[3, kind, 0] == rows_of(want)
        assert result["collectives", 1] == result["collectives", 40] != []
    assert [result["uneven"] for result in results] == [[1], [40]]
