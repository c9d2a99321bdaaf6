"""The engine: its tokens are those of transformers, its log-probabilities those of the textbook.

    pytest test_engine.py           # all of it
    pytest test_engine.py -k gpu    # what needs a GPU

Real weights are read from ../shared where that folder exists.
"""
from testing import (  # first, because it sets environment variables
    KINDS, STORIES, model_of, plain_logprobs, ragged, ranks, rows_of, shared)

import gc
import math

import pytest
import torch

import data
import hybrid_engine
import kernels
import models
import sft
import training
import utils
from hybrid_engine import CUDAGraphs, HFEngine, HybridEngine, make_engine

utils.quiet_transformers()


def transformers_greedy(lm, prompt, max_new_tokens, eos_token_id=None):
    """The row that transformers.generate makes of one prompt."""
    out = lm.generate(
        torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=eos_token_id, pad_token_id=0)
    return out[0].tolist()


def close(got, want, within=1e-4):
    torch.testing.assert_close(got.double(), want.double(), rtol=within, atol=within)


def check_logprobs(out, lm, temperature=1.0):
    """Checks the log-probabilities of a Rollout against the textbook's, row by row."""
    for i, row in enumerate(rows_of(out)):
        want = plain_logprobs(lm, row, int(out.prompt_lens[i]), temperature)
        close(out.logprobs[i, : len(want)], want)


# -----------------------------------------------------------------------------
# greedy decoding


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_that_of_transformers_generate_token_for_token(kind):
    lm = model_of(kind)
    lengths = (1, 3, 3, 17, 40, 90, 200)
    prompts = ragged(lengths)
    engine = HybridEngine(lm, max_batch=4)
    out = engine.generate(prompts, 24, temperature=0)
    eos = int(out.tokens[2, lengths[2] + 4])  # so that some answers end early
    out = engine.generate(prompts, 24, temperature=0, eos_token_id=eos)
    assert len(set(out.answer_lens.tolist())) > 1, "answers end at different places"
    for prompt, row in zip(prompts, rows_of(out)):
        want = transformers_greedy(lm, prompt, 24, eos)
        assert row == want, f"{kind}, prompt of {len(prompt)} tokens"
    check_logprobs(out, lm)


@shared
def test_greedy_output_is_that_of_transformers_on_real_weights():
    tok = models.load_tokenizer(STORIES)
    lm = models.load_lm(STORIES, torch.float32).eval()
    texts = ["Once upon a time", "Lily and Tom went to the park. They saw a big", "The"]
    prompts = tok(texts)["input_ids"]
    eos = tok.eos_token_id
    out = HybridEngine(lm).generate(prompts, 120, temperature=0, eos_token_id=eos)
    for prompt, row in zip(prompts, rows_of(out)):
        assert row == transformers_greedy(lm, prompt, 120, eos)
    assert "Once upon a time, there was" in tok.decode(rows_of(out)[0])


# -----------------------------------------------------------------------------
# the weights that are being trained


def weights_of(lm):
    """A copy of all weights, as one vector."""
    return torch.nn.utils.parameters_to_vector(lm.parameters()).detach().clone()


@pytest.mark.parametrize("kind", ["llama", "olmo2", "phi3", "opt", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_engine_follows_every_optimizer_step_and_never_changes_a_weight(kind, lora):
    lm = model_of(kind)
    if lora:
        models.add_lora(lm, "4")
    params = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.02)
    engine = HybridEngine(lm)
    prompts = ragged((3, 9, 5))
    ids = torch.tensor([prompts[1]])
    before = None
    for _ in range(5):
        optimizer.zero_grad()
        lm(ids, labels=ids).loss.backward()
        optimizer.step()
        weights = weights_of(lm)
        rows = rows_of(engine.generate(prompts, 12, temperature=0))
        assert rows == [transformers_greedy(lm, prompt, 12) for prompt in prompts]
        assert torch.equal(weights_of(lm), weights), "no weight changes by one bit"
        assert rows != before, "the steps were large enough to change the output"
        before = rows
    if lora:
        base = model_of(kind)
        with models.adapters_off(), torch.no_grad():
            same = torch.equal(lm(ids).logits, base(ids).logits)
        assert same, "with its adapters off the model is its base, bit for bit"


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_reads_every_weight_by_reference(kind):
    lm = model_of(kind)
    engine = HybridEngine(lm)
    engine.generate(ragged((3,)), 2)
    storages = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    read = 0
    for x in engine.decoder.weights():
        if x is engine.decoder.slopes:  # no weight: made from the number of heads
            continue
        assert x.untyped_storage().data_ptr() in storages, f"{kind}: a copy of {tuple(x.shape)}"
        read += x.numel()
    assert read == sum(p.numel() for p in lm.parameters()), f"{kind}: and reads all of them"


SEVERAL_PROJECTIONS = ["llama", "qwen2", "smollm3", "olmo2", "gemma2", "opt", "opt-350m"]


@pytest.mark.parametrize("kind", [*SEVERAL_PROJECTIONS, "phi3", "gpt2", "bloom"])
@pytest.mark.parametrize("lora", ["", " lora"])
def test_one_product_computes_the_projections_of_one_input(kind, lora, monkeypatch):
    lm = model_of(kind + lora)
    engine = HybridEngine(lm)
    weights = weights_of(lm)
    before = {name: p.data_ptr() for name, p in lm.named_parameters()}
    want = engine.generate(ragged((3,)), 2, temperature=0)
    assert torch.equal(weights_of(lm), weights)
    moved = {name for name, p in lm.named_parameters() if p.data_ptr() != before[name]}
    assert bool(moved) == (kind in SEVERAL_PROJECTIONS)

    products = []

    def counted(function):
        def counting(x, weight, *more):
            products.append(tuple(weight.shape))
            return function(x, weight, *more)
        return counting

    monkeypatch.setattr(kernels, "linear", counted(kernels.linear))
    monkeypatch.setattr(kernels, "linear_activation", counted(kernels.linear_activation))
    got = engine.generate(ragged((3,)), 2, temperature=0)  # a prefill and a step
    assert torch.equal(got.tokens, want.tokens)
    base = [shape for shape in products if 4 not in shape]  # without the adapters of rank 4
    layers = lm.config.num_hidden_layers
    ends = 3 if kind == "opt-350m" else 1
    assert len(base) == 2 * (4 * layers + ends), "q, k, v; out; gate and up; down; and the head"
    for name, p in lm.named_parameters():
        if name in moved:
            p.data = p.data.clone()  # as module.to(device) does
    again = engine.generate(ragged((3,)), 2, temperature=0)
    assert torch.equal(again.tokens, want.tokens), "weights that have moved are put together again"
    assert all(layer.qkv.joint is not None for layer in engine.decoder.layers)


@pytest.mark.parametrize("kind", ["qwen2", "opt"])
@pytest.mark.parametrize("dtype, zero", [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 0)])
def test_the_projections_of_a_deepspeed_engine_are_neighbours_too(kind, dtype, zero):
    utils.init_distributed(0)
    lm = models.cast(model_of(kind), utils.dtype_of(dtype))
    trained = training.train_engine(
        models.Policy(lm), 1e-2, 2, 1, sft.Config(zero=zero, dtype=dtype))
    generator = HybridEngine(trained)
    attention = [m for m in lm.modules() if hasattr(m, "q_proj")]
    for _ in range(2):
        generator.generate(ragged((3, 9)), 4)
        for layer, module in zip(generator.decoder.layers, attention, strict=True):
            weights = layer.qkv.joint.weight.split(layer.qkv.widths)
            biases = layer.qkv.joint.bias.split(layer.qkv.widths)
            linears = (module.q_proj, module.k_proj, module.v_proj)
            for place, linear in zip(layer.qkv.places, linears, strict=True):
                assert weights[place].data_ptr() == linear.weight.data_ptr()
                assert biases[place].data_ptr() == linear.bias.data_ptr()
        ids = torch.tensor(ragged((6,)))
        logprobs, _ = trained(ids, torch.tensor([2]), torch.tensor([4]))
        trained.backward(-logprobs.mean())
        training.step(trained)


def test_neighbours_train_and_are_saved_as_before(tmp_path):
    """Bit for bit, whether the engine has put the weights together or not."""
    ids = torch.tensor(ragged((9, 9)))

    def trained(generate):
        lm = model_of("qwen2")
        optimizer = torch.optim.AdamW(lm.parameters(), lr=0.02)
        for _ in range(3):
            if generate:
                HybridEngine(lm).generate(ragged((3,)), 2)
            optimizer.zero_grad()
            lm(ids, labels=ids).loss.backward()
            optimizer.step()
        return lm

    lm = trained(generate=True)
    assert lm.model.layers[0].self_attn.q_proj.weight.untyped_storage().nbytes() > 4 * 64 * 64
    assert torch.equal(weights_of(lm), weights_of(trained(generate=False)))
    lm.save_pretrained(tmp_path / "folder")
    loaded = models.load_lm(str(tmp_path / "folder"), torch.float32)
    assert torch.equal(weights_of(loaded), weights_of(lm))
    torch.save(lm.state_dict(), tmp_path / "state.pt")
    other = model_of("qwen2", seed=1)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(weights_of(other), weights_of(lm))
    size = (tmp_path / "state.pt").stat().st_size
    assert size < 4 * len(weights_of(lm)) + 20_000, "no weight is in the file twice"


def test_a_hundred_rollouts_leave_the_weights_and_a_release_leaves_the_memory_as_it_was():
    lm = model_of("llama")
    weights = weights_of(lm)

    def tensor_bytes():
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum(x.numel() * x.element_size() for x in tensors)

    before = tensor_bytes()
    engine = HybridEngine(lm)
    for seed in range(100):
        engine.generate(ragged((3, 5)), 4, seed=seed)
    assert tensor_bytes() > before + engine.cache.k_cache.numel() * 4
    engine.release()
    assert tensor_bytes() <= before + 4096, "release gives everything back but a few indices"
    assert torch.equal(weights_of(lm), weights)


# -----------------------------------------------------------------------------
# batching


def test_a_row_keeps_its_tokens_however_rows_are_batched():
    lm = model_of("llama")
    prompts = ragged([1 + i % 13 for i in range(40)])

    def sample(engine, rows=range(40)):
        some = [prompts[i] for i in rows]
        seeds = [100 + i for i in rows]
        out = engine.generate(some, 20, temperature=1.3, eos_token_id=[7, 8, 9], seed=seeds)
        return dict(zip(rows, rows_of(out))), out

    whole, out = sample(HybridEngine(lm))
    assert len(set(out.answer_lens.tolist())) > 3, "answers end at different places"
    for row, n in zip(rows_of(out), out.answer_lens):
        assert n == 20 or row[-1] in (7, 8, 9), "where an answer ends early, it ends with EOS"

    engine = HybridEngine(lm, max_batch=4)
    small, out_small = sample(engine)
    assert len(engine.cache.slots) == 4
    assert small == whole, "a rollout ten times larger than the KV cache"
    close(out_small.logprobs, out.logprobs)

    slot = 2 * 3 * 2 * 64 * 16 * 4  # K and V, layers, key heads, capacity, head size, bytes
    engine = HybridEngine(lm, kv_gib=4.5 * slot / 2**30, max_len=64)
    assert sample(engine)[0] == whole
    assert len(engine.cache.slots) == 4, "a KV cache of four rows by memory"

    some = [31, 2, 17]
    rows, _ = sample(HybridEngine(lm), some)
    assert rows == {i: whole[i] for i in some}, "three of the rows, in another order"

    first = engine.generate(prompts, 8, seed=5)
    same = engine.generate(prompts, 8, seed=5)
    other = engine.generate(prompts, 8, seed=6)
    assert torch.equal(first.tokens, same.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_answers_to_one_prompt_share_its_prefill_and_differ():
    lm = model_of("qwen3")
    prompt = ragged([30])[0]
    engine = HybridEngine(lm)
    prompts = [prompt] * 8 + ragged([5])
    out = engine.generate(prompts, 10, seed=3)
    assert engine.stats["prefill_tokens"] == 35, "30 tokens once, and the other 5"
    different = {tuple(row) for row in rows_of(out)[:8]}
    assert len(different) > 4
    check_logprobs(out, lm)


def test_rows_are_padded_with_zeros_whatever_was_in_their_slots_before():
    lm = model_of("gpt2")
    prompts = ragged([1 + i % 7 for i in range(30)])
    engine = HybridEngine(lm, max_batch=3)
    out = engine.generate(prompts, 20, eos_token_id=[7, 8, 9], seed=0)
    lengths = out.prompt_lens + out.answer_lens
    for i in range(30):
        answer_len = out.answer_lens[i]
        assert (out.tokens[i, lengths[i] :] == 0).all()
        assert (out.logprobs[i, answer_len:] == 0).all()
        assert (out.logprobs[i, :answer_len] < 0).all()
    assert out.tokens.size(1) == lengths.max(), "no column is padding only"
    assert out.logprobs.size(1) == out.answer_lens.max()


def test_a_stream_that_is_not_read_to_its_end_leaves_nothing_behind():
    lm = model_of("llama")
    prompts = ragged((3, 9, 5))
    engine = HybridEngine(lm)
    want = engine.generate(prompts, 20, seed=1)
    tokens = engine.stream(prompts[0], 20, seed=2)
    next(tokens)
    got = engine.generate(prompts, 20, seed=1)
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.logprobs, want.logprobs)


# -----------------------------------------------------------------------------
# sampling


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (1.7, 0, 1.0),
    (1.0, 5, 1.0),
    (1.0, 0, 0.7),
    (0.8, 6, 0.8),
])
def test_samples_have_the_frequencies_of_the_distribution(temperature, top_k, top_p):
    n = 100_000
    V = 12
    logits = torch.randn(V, generator=torch.Generator().manual_seed(4)) * 1.5
    u = kernels.uniform(torch.arange(n), torch.full((n,), 17))
    tokens, logprobs = kernels.sample(logits.expand(n, V), u, temperature, top_k, top_p)

    # The naive version keeps tokens one by one.
    p = (logits.double() / temperature).softmax(-1)
    order = logits.argsort(descending=True)
    top_k_mass = p[order[: top_k or V]].sum()
    kept = []
    mass = 0.0
    for token in order.tolist():
        if mass >= top_p or (top_k and len(kept) == top_k):
            break
        kept.append(token)
        mass += (p[token] / top_k_mass).item()
    want = torch.zeros(V, dtype=torch.float64)
    want[kept] = p[kept] / p[kept].sum()

    counts = tokens.bincount(minlength=V).double()
    assert counts[want == 0].sum() == 0, "only kept tokens are drawn"
    expected = n * want[kept]
    chi2 = ((counts[kept] - expected) ** 2 / expected).sum().item()
    k = len(kept) - 1
    assert chi2 < k + 4 * math.sqrt(2 * k), f"chi-square {chi2:.1f} with {k} degrees of freedom"
    close(logprobs, want.log()[tokens], within=1e-5)


def test_the_random_numbers_of_neighbours_are_uniform_and_not_correlated():
    n = 100_000
    u = kernels.uniform(torch.arange(n), torch.full((n,), 17))
    assert abs(u.mean() - 0.5) < 0.005
    neighbours = torch.stack([u[1:], u[:-1]])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.02


def test_logprobs_of_sampled_tokens_are_those_of_the_tempered_policy():
    lm = model_of("opt")
    prompts = ragged((4, 8))
    out = HybridEngine(lm).generate(prompts, 10, temperature=0.7, seed=1)
    check_logprobs(out, lm, 0.7)


# -----------------------------------------------------------------------------
# tools between turns

MANY_EOS = list(range(0, 97, 12))  # so that turns are short


class CountingTool:
    """Answers the first two turns of every row with some tokens, and then no more."""

    def __init__(self):
        self.answers = {}  # row -> the answers it was asked about

    def __call__(self, row, answer):
        asked = self.answers.setdefault(row, [])
        asked.append(answer)
        if len(asked) <= 2:
            return [20 + row, 31, 32][: 1 + row % 3]


def one_turn_after_the_other(engine, prompt, row, seed, max_new_tokens):
    """The textbook version: a call for each turn, whose prompt is all that came before. Returns
    the row, and which of its answer tokens the model has sampled."""
    tool = CountingTool()
    tokens = list(prompt)
    sampled = []
    room = max_new_tokens
    while room > 0:
        out = engine.generate([tokens], room, eos_token_id=MANY_EOS, seed=[seed])
        turn = rows_of(out)[0][len(tokens) :]
        tokens += turn
        sampled += [True] * len(turn)
        room -= len(turn)
        if turn[-1] not in MANY_EOS or room == 0:
            break
        reply = tool(row, tokens[len(prompt) :])
        if reply is None:
            break
        reply = reply[:room]
        tokens += reply
        sampled += [False] * len(reply)
        room -= len(reply)
    return tokens, sampled


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_tool_goes_on_with_an_answer_as_if_its_words_had_been_in_the_prompt(kind):
    lm = model_of(kind)
    prompts = ragged((3, 9, 30, 1, 5, 5, 17, 2, 8))
    seeds = list(range(50, 59))
    engine = HybridEngine(lm, max_batch=4)  # several waves, and rows that move
    tool = CountingTool()
    out = engine.generate(prompts, 26, eos_token_id=MANY_EOS, seed=seeds, respond=tool)
    got = rows_of(out)
    full = 0
    for row, prompt in enumerate(prompts):
        want, sampled = one_turn_after_the_other(HybridEngine(lm), prompt, row, seeds[row], 26)
        assert got[row] == want, f"row {row}"
        n = len(sampled)
        assert out.sampled[row, :n].tolist() == sampled
        assert not out.sampled[row, n:].any()
        textbook = plain_logprobs(lm, got[row], len(prompt))
        close(out.logprobs[row, :n], textbook * torch.tensor(sampled))
        full += n == 26
    turns = [len(answers) for answers in tool.answers.values()]
    assert set(turns) >= {2, 3} and full, "some rows have three turns, and some no room for them"


def test_without_a_tool_all_of_an_answer_is_sampled():
    for engine in (HybridEngine(model_of("llama")), HFEngine(model_of("llama"))):
        out = engine.generate(ragged((3, 9, 4)), 12, eos_token_id=MANY_EOS, seed=3)
        lengths = torch.arange(out.sampled.size(1)) < out.answer_lens[:, None]
        assert torch.equal(out.sampled, lengths)
    with pytest.raises(utils.UserError, match="a tool between turns needs --engine hybrid"):
        engine.generate([[1]], 4, respond=CountingTool())


# -----------------------------------------------------------------------------
# mistakes


def test_a_model_type_that_is_not_in_the_table_is_refused():
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    falcon = AutoModelForCausalLM.from_config(config)
    with pytest.raises(utils.UserError, match="'falcon'.*--engine hf"):
        HybridEngine(falcon)


def test_an_activation_that_the_config_does_not_name_is_refused():
    lm = model_of("llama")
    lm.config.hidden_act = ""
    with pytest.raises(utils.UserError, match="an activation that the config does not name.*hf"):
        HybridEngine(lm)


@pytest.mark.parametrize("kind, rope_type, parameters", [
    ("llama", "dynamic", dict(factor=2.0)),
    ("phi3", "longrope", dict(short_factor=[1.0] * 8, long_factor=[2.0] * 8)),
])
def test_rope_scaling_that_changes_with_the_length_is_refused(kind, rope_type, parameters):
    rope = dict(parameters, rope_type=rope_type, rope_theta=1e4, partial_rotary_factor=1.0)
    lm = model_of(kind, rope_parameters=rope)
    with pytest.raises(utils.UserError, match=f"rope scaling '{rope_type}'"):
        HybridEngine(lm)


BAD_CALLS = {
    "prompt 1 has 500 tokens; with 20 new ones that is more than the model's context of 512":
        dict(prompts=ragged((3, 500))),
    "prompt 1 has 20 tokens; with 20 new ones that is more than max_len of 32":
        dict(prompts=ragged((3, 20)), max_len=32),
    "one row of 32 tokens needs .* raise kv_gib": dict(prompts=ragged((3,)), kv_gib=1e-6),
    "prompt 1 is empty": dict(prompts=[[3], []]),
    "there is no prompt": dict(prompts=[]),
    "outside the vocabulary of 97": dict(prompts=[[97]]),
    "top_p 0.0 must be in": dict(prompts=[[3]], top_p=0.0),
    "temperature -1.0 and top_k 0 must not be negative": dict(prompts=[[3]], temperature=-1.0),
    "max_new_tokens is 0": dict(prompts=[[3]], max_new_tokens=0),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_what_the_engine_cannot_do_it_says_before_it_starts(message):
    call = dict(dict(max_new_tokens=20, max_len=None, kv_gib=None), **BAD_CALLS[message])
    max_len = call.pop("max_len")
    kv_gib = call.pop("kv_gib")
    engine = HybridEngine(model_of("llama"), max_len=max_len, kv_gib=kv_gib)
    with pytest.raises(utils.UserError, match=message):
        engine.generate(**call)


# -----------------------------------------------------------------------------
# the slow path


def test_the_slow_path_has_the_same_interface_and_the_same_greedy_tokens():
    lm = model_of("gpt2")
    prompts = ragged((4, 11, 1))
    hybrid = make_engine("hybrid", lm)
    slow = make_engine("hf", lm)
    want = hybrid.generate(prompts, 12, temperature=0, eos_token_id=[7, 20])
    got = slow.generate(prompts, 12, temperature=0, eos_token_id=[7, 20])
    assert rows_of(got) == rows_of(want)
    assert torch.equal(got.prompt_lens, want.prompt_lens)
    assert torch.equal(got.answer_lens, want.answer_lens)
    close(got.logprobs, want.logprobs)

    most_likely = slow.generate(prompts, 12, temperature=0.7, top_k=1)
    assert rows_of(most_likely) == rows_of(hybrid.generate(prompts, 12, temperature=0))
    sampling = dict(temperature=0.7, eos_token_id=[7, 20], seed=3)
    for engine in (hybrid, slow):
        row = rows_of(engine.generate(prompts[1:2], 12, **sampling))[0]
        assert prompts[1] + list(engine.stream(prompts[1], 12, **sampling)) == row


def test_the_slow_path_repeats_itself_and_has_the_logprobs_of_the_tempered_policy():
    lm = model_of("gpt2")
    prompts = ragged((4, 11, 1))
    first = HFEngine(lm).generate(prompts, 12, temperature=0.7, seed=4)
    second = HFEngine(lm).generate(prompts, 12, temperature=0.7, seed=4)
    assert torch.equal(first.tokens, second.tokens)
    check_logprobs(first, lm, 0.7)


def test_the_slow_path_samples_the_trained_distribution_whatever_the_model_is_set_to():
    lm = model_of("llama")
    prompts = ragged((4, 11))
    want = HFEngine(lm).generate(prompts, 30, temperature=0.9, seed=4)
    lm.generation_config.repetition_penalty = 3.0
    lm.generation_config.min_length = 20
    lm.generation_config.eos_token_id = 7
    lm.gradient_checkpointing_enable()
    lm.train()
    got = HFEngine(lm).generate(prompts, 30, temperature=0.9, seed=4)
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.logprobs, want.logprobs)
    assert lm.training, "and leaves the model as it was"
    assert lm.generation_config.repetition_penalty == 3.0


def test_the_slow_path_has_zeros_past_the_end_of_an_answer_with_top_k_too():
    lm = model_of("llama")
    prompts = ragged((4, 11, 7))
    eos = list(range(6, 20))
    out = HFEngine(lm).generate(prompts, 12, top_k=3, eos_token_id=eos, seed=1)
    assert len(set(out.answer_lens.tolist())) > 1
    for logprobs, n in zip(out.logprobs, out.answer_lens):
        assert logprobs.isfinite().all()
        assert (logprobs[n:] == 0).all()


# -----------------------------------------------------------------------------
# CUDA graphs


class EagerGraph:
    """Takes the place of a CUDA graph on a CPU: its replay is the step itself."""

    def __init__(self, step):
        self.replay = step


@pytest.fixture
def graphs_on_a_cpu(monkeypatch):
    """HybridEngine schedules as on a GPU: steps of few sizes, eight of them between two reads of
    the flags."""
    monkeypatch.setattr(CUDAGraphs, "capture", lambda self, step: EagerGraph(step))
    monkeypatch.setitem(hybrid_engine.STEPS_PER_SYNC, "cpu", 8)


def with_graphs(lm, **limits):
    engine = HybridEngine(lm, **limits)
    engine.use_graphs = True
    return engine


@pytest.mark.parametrize("kind", ["llama", "mistral", "bloom", "opt"])
@pytest.mark.parametrize("max_batch", [5, 24, 100])
def test_steps_of_few_sizes_give_every_row_the_same_tokens(kind, max_batch, graphs_on_a_cpu):
    lm = model_of(kind)
    prompts = ragged([1 + i % 13 for i in range(100)])
    call = dict(eos_token_id=[7, 8, 9], seed=3, temperature=1.3)
    want = HybridEngine(lm).generate(prompts, 40, **call)
    engine = with_graphs(lm, max_batch=max_batch)
    got = engine.generate(prompts, 40, **call)
    assert rows_of(got) == rows_of(want)
    close(got.logprobs, want.logprobs)
    sizes = {n for n, *_ in engine.graphs.compiled}
    assert sizes <= set(hybrid_engine.graph_sizes(max_batch))


def test_rows_that_have_ended_read_no_keys(graphs_on_a_cpu, monkeypatch):
    lm = model_of("llama")
    prompts = ragged([4] * 9)
    read = []
    attention = kernels.decode_attention

    def counting(q, k_cache, v_cache, lengths, spec):
        read.append(lengths.tolist())
        return attention(q, k_cache, v_cache, lengths, spec)

    monkeypatch.setattr(kernels, "decode_attention", counting)
    eos = list(range(6, 40))
    out = with_graphs(lm).generate(prompts, 20, eos_token_id=eos, seed=1)
    assert len(set(out.answer_lens.tolist())) > 1
    # Each answer but its first token was decoded once, and read the tokens before it.
    want = 0
    for answer_len in out.answer_lens.tolist():
        want += sum(range(4 + 1, 4 + answer_len))
    assert sum(map(sum, read)) == 3 * want, "in each of three layers"


def test_waiting_prompts_fill_the_holes_before_anyone_moves(graphs_on_a_cpu, monkeypatch):
    moved = []
    move = hybrid_engine.KVCache.move

    def counting(self, source, target):
        moved.append(len(source))
        return move(self, source, target)

    monkeypatch.setattr(hybrid_engine.KVCache, "move", counting)
    lm = model_of("llama")
    prompts = ragged([5] * 200)
    engine = with_graphs(lm, max_batch=16)
    waiting_at_moves = []
    close_gaps = engine.close_gaps

    def watched():
        before = len(moved)
        close_gaps()
        if len(moved) > before:
            waiting_at_moves.append(len(engine.waiting))

    engine.close_gaps = watched
    engine.generate(prompts, 40, eos_token_id=[7, 8, 9], seed=3)
    assert waiting_at_moves, "in the end rows move, so that smaller graphs serve the rest"
    assert not any(waiting_at_moves), "but not while a prompt is waiting"
    assert sum(moved) <= 16


def test_graphs_live_over_rollouts_until_a_tensor_that_they_use_has_moved(graphs_on_a_cpu):
    lm = model_of("llama")
    prompts = ragged((3, 9, 5))
    engine = with_graphs(lm)

    def graphs_after(change):
        change()
        engine.generate(prompts, 40, seed=1)
        return dict(engine.graphs.graphs)

    def nothing():
        pass

    def optimizer_step():
        with torch.no_grad():
            for p in lm.parameters():
                p -= 0.01

    def move_a_weight():
        norm = lm.model.layers[1].input_layernorm
        norm.weight.data = norm.weight.data.clone()

    first = graphs_after(nothing)
    assert len(first) == 1, "the first steps of a size run as they are, then it is captured"
    assert graphs_after(nothing) == first
    assert graphs_after(optimizer_step) == first
    after_release = graphs_after(engine.release)
    assert after_release != first
    assert after_release.keys() == first.keys(), "their kernels were compiled before"
    after_move = graphs_after(move_a_weight)
    assert after_move != after_release


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here")
@pytest.mark.parametrize("kind", ["phi3", "bloom"])
def test_the_triton_kernels_take_the_tensors_of_the_engine(kind, graphs_on_a_cpu, monkeypatch):
    """In Triton's interpreter. phi3: stacked projections, a window; bloom: projections by head."""
    lm = model_of(kind)
    prompts = ragged((3, 9, 3))
    prompts.append(prompts[1])
    want = HybridEngine(lm).generate(prompts, 3, seed=3)
    for name in ("prefill_attention", "decode_attention", "rope_and_cache", "add_norm"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name + "_triton"))
    monkeypatch.setattr(kernels, "sample_next", lambda logits, slots, rows, eos, *_: (
        kernels.sample_next_triton(logits, slots, rows, eos, 1.0)))
    monkeypatch.setitem(hybrid_engine.STEPS_PER_SYNC, "cpu", 2)
    got = with_graphs(lm).generate(prompts, 3, seed=3)
    assert rows_of(got) == rows_of(want)
    close(got.logprobs, want.logprobs)


def test_few_graph_sizes_serve_all_batches():
    sizes = hybrid_engine.graph_sizes(200)
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 128, 192, 200]
    assert hybrid_engine.graph_sizes(1) == [1]
    assert hybrid_engine.graph_sizes(64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_graph_replay_equals_eager_steps_across_an_optimizer_step(kind):
    lm = model_of(kind).cuda()
    prompts = ragged((3, 30, 9, 1, 200))
    engine = HybridEngine(lm)
    eager = HybridEngine(lm)
    eager.use_graphs = False
    ids = torch.tensor([prompts[1]], device="cuda")
    samplings = [
        dict(temperature=0.0, eos_token_id=[7, 8]),
        dict(temperature=1.0, eos_token_id=[7, 8]),
        dict(temperature=1.0, eos_token_id=list(range(60, 97))),
    ]
    first = {}
    for turn in range(3):
        for sampling in samplings:
            got = engine.generate(prompts, 40, seed=3, **sampling)
            want = eager.generate(prompts, 40, seed=3, **sampling)
            assert rows_of(got) == rows_of(want)
            close(got.logprobs, want.logprobs, within=1e-3)
        graphs = dict(engine.graphs.graphs)
        assert graphs, "steps were captured"
        if turn == 1:  # answers end elsewhere, so there may be new sizes
            assert first.items() <= graphs.items(), "graphs outlive a weight update"
            engine.release()  # as after every rollout of PPO
        first = graphs
        lm(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p in lm.parameters():
                p -= 0.1 * p.grad
                p.grad = None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_two_engines_replay_graphs_in_turn_and_one_may_go():
    lm = model_of("llama").cuda()
    prompts = ragged((3, 30, 9, 1))
    first = HybridEngine(lm)
    second = HybridEngine(lm)
    want = first.generate(prompts, 40, seed=3)
    for _ in range(2):
        assert rows_of(second.generate(prompts, 40, seed=3)) == rows_of(want)
        assert rows_of(first.generate(prompts, 40, seed=3)) == rows_of(want)
    del second
    gc.collect()
    assert rows_of(first.generate(prompts, 40, seed=3)) == rows_of(want)


# -----------------------------------------------------------------------------
# several ranks

# Between two ranks; "lora": with adapters.
TP_KINDS = (
    "llama", "llama lora", "qwen3", "smollm3", "olmo2", "olmo2 lora", "phi3", "phi3 lora",
    "gemma2", "opt", "opt-350m", "gpt2", "gpt2 lora", "gpt_neox", "bloom",
)


class CountCollectives:
    """Writes down every collective of PyTorch and DeepSpeed that is called from here on."""

    def __init__(self):
        import deepspeed

        self.calls = []
        backend = deepspeed.comm.comm.cdb
        # DeepSpeed holds a reference from before the functions below were wrapped.
        backend.all_gather_function = self.wrap("deepspeed", backend.all_gather_function)
        names = (
            "all_reduce", "all_gather_into_tensor", "all_gather", "broadcast",
            "reduce_scatter_tensor")
        for name in names:
            function = getattr(torch.distributed, name)
            setattr(torch.distributed, name, self.wrap(name, function))

    def wrap(self, name, function):
        def counted(*args, **kwargs):
            self.calls.append(name)
            return function(*args, **kwargs)
        return counted


TP_PROMPTS = (3, 30, 9, 1, 6)  # lengths; so that one of two ranks has more of them
TP_SEEDS = [10, 11, 12, 13, 14]


def _tensor_parallel(kinds):
    """On two ranks, each with every other prompt. Returns the rows, and the collectives."""
    utils.init_distributed(1)
    counter = CountCollectives()
    rank = torch.distributed.get_rank()
    prompts = ragged(TP_PROMPTS)
    out = {}
    for kind in kinds:
        lm = model_of(kind)
        for temperature in (0.0, 1.0):
            engine = HybridEngine(lm, tp=2)
            seeds = TP_SEEDS[rank::2]
            mine = prompts[rank::2]
            got = engine.generate(mine, 12, temperature=temperature, seed=seeds)
            out[kind, temperature] = rows_of(got), got.logprobs
    tool = CountingTool()
    got = engine.generate(mine, 20, eos_token_id=MANY_EOS, seed=seeds, respond=tool)
    out["tool"] = rows_of(got), tool.answers
    counter.calls.clear()
    engine.generate(prompts[:1], 6, temperature=0)
    out["collectives"] = list(counter.calls)
    out["layers"] = engine.decoder.num_layers
    out["joint"] = [layer.qkv.joint is not None for layer in engine.decoder.layers]
    return out


def test_tensor_parallel_ranks_give_the_tokens_of_one_process():
    prompts = ragged(TP_PROMPTS)
    results = ranks(2, _tensor_parallel, TP_KINDS)
    for kind in TP_KINDS:
        for temperature in (0.0, 1.0):
            want = HybridEngine(model_of(kind)).generate(
                prompts, 12, temperature=temperature, seed=TP_SEEDS)
            for rank in (0, 1):
                rows, logprobs = results[rank][kind, temperature]
                assert rows == rows_of(want)[rank::2], f"{kind}, tp=2, rank {rank}"
                close(logprobs, want.logprobs[rank::2])
    engine = HybridEngine(model_of(TP_KINDS[-1]))
    for rank, result in enumerate(results):
        rows, answers = result["tool"]
        own = set(range(len(rows)))
        assert answers and set(answers) <= own, "each rank asks for its own prompts"
        tool = CountingTool()
        want = engine.generate(
            prompts[rank::2], 20, eos_token_id=MANY_EOS, seed=TP_SEEDS[rank::2],
            respond=tool)
        assert (rows, answers) == (rows_of(want), tool.answers)
    for result in results:
        assert all(result["joint"])
        forwards = 6  # a prefill, which samples the first token, and five steps
        want = 2 * result["layers"] * forwards + 1
        assert result["collectives"].count("all_reduce") == want, (
            "two per layer and forward, and one to plan the KV cache")
        assert set(result["collectives"]) <= {"all_reduce", "all_gather"}, "and no others"


def _zero_stages(stages):
    """On two ranks: greedy tokens before and after an optimizer step, with and without LoRA."""
    utils.init_distributed(1)
    counter = CountCollectives()
    rank = torch.distributed.get_rank()
    prompts = ragged((3, 30, 9, 1))
    out = {}
    tokens, _ = data.pad([prompt + [9] for prompt in prompts])
    prompt_lens = torch.tensor([1, 1, 1, 1])
    answer_lens = torch.tensor([2, 29, 8, 1])
    for stage in stages:
        for kind in ("llama", "llama lora"):
            cfg = sft.Config(zero=stage, dtype="fp32")
            policy = models.Policy(model_of(kind))
            trained = training.train_engine(policy, 1e-2, 2, 1, cfg)
            generator = HybridEngine(trained)
            for step in range(2):
                got = generator.generate(prompts, 12, temperature=0)
                out[stage, kind, step] = rows_of(got)
                generator.release()
                logprobs, _ = trained(tokens, prompt_lens, answer_lens)
                trained.backward(-logprobs.sum() / 40)
                training.step(trained)
            if stage == 3 and kind == "llama":
                counter.calls.clear()
                short = HybridEngine(trained).generate(prompts[:1], 1, temperature=0)
                out["collectives of one token"] = len(counter.calls)
                counter.calls.clear()
                eos = None  # rank 1 never ends
                if rank == 0:  # rank 0 ends at once
                    eos = short.tokens[0, -1].item()
                got = HybridEngine(trained).generate(
                    prompts[:1], 40, temperature=0, eos_token_id=eos)
                out["collectives of 40 tokens"] = len(counter.calls)
                out["uneven"] = got.answer_lens.tolist()
            torch.distributed.barrier()
    return out


def test_zero_shards_give_the_tokens_of_one_process_and_are_gathered_once_per_rollout():
    prompts = ragged((3, 30, 9, 1))
    results = ranks(2, _zero_stages, (0, 2, 3))
    for result in results:
        for kind in ("llama", "llama lora"):
            for step in (0, 1):
                rows = result[0, kind, step]
                assert rows == result[2, kind, step] == result[3, kind, step], f"{kind}, {step}"
            assert result[0, kind, 0] != result[0, kind, 1]
        assert result["collectives of one token"] > 0
        assert result["collectives of 40 tokens"] == result["collectives of one token"]
    want = HybridEngine(model_of("llama")).generate(prompts, 12, temperature=0)
    assert results[0][0, "llama", 0] == rows_of(want)
    assert [result["uneven"] for result in results] == [[1], [40]]


def test_tensor_parallelism_that_does_not_divide_is_refused():
    with pytest.raises(utils.UserError, match="tp=3 does not divide the . (ranks|attention heads)"):
        HybridEngine(model_of("llama"), tp=3)
    with pytest.raises(utils.UserError, match="--tp needs --engine hybrid"):
        make_engine("hf", model_of("llama"), tp=2)
