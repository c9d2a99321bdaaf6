"""kernels.py: every kernel against what it means, in float64.

Without a GPU the Triton kernels run in Triton's interpreter (float32 and float16: it gets bfloat16 wrong, silently), and
are compiled for GPUs that are not there. With one, `pytest -k gpu` runs them on it, in bfloat16. (Triton 3.6's interpreter
needs numpy below 2.4; 3.7.1 takes what requirements.txt says.)
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import kernels  # noqa: E402

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NO_INTERPRETER = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here")
on_every_device = pytest.mark.parametrize("device, dtype", [
    pytest.param("cpu", torch.float32, id="interpreter-fp32", marks=NO_INTERPRETER),
    pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=NO_INTERPRETER),
    pytest.param("cuda", torch.float32, id="gpu-fp32", marks=NO_GPU),
    pytest.param("cuda", torch.bfloat16, id="gpu-bf16", marks=NO_GPU)])
WITHIN = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(*shape, dtype=torch.float64, seed=0):
    """Normal numbers that the dtype can hold exactly, in float64 for the reference."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).double()


def to(device, dtype, *tensors):
    return [None if t is None else t.to(device, dtype if t.is_floating_point() else None) for t in tensors]


def same(got, want, dtype, what, times=1):
    got, want = got.detach().double().cpu(), want.detach().double()
    worst = (got - want).abs() / (1 + want.abs())
    assert got.shape == want.shape and not got.isnan().any(), f"{what}: nan, or shape {tuple(got.shape)} is not {tuple(want.shape)}"
    assert worst.numel() == 0 or worst.max() < times * WITHIN[dtype], f"{what}: off by {worst.max():.2e} of 1 + its size in {dtype}"


# -----------------------------------------------------------------------------
# matrix products


@pytest.mark.parametrize("shape, out", [((5, 8), 24), ((3, 7, 24), 8), ((1, 8), 8), ((2, 3, 8), 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_linear_and_its_gradients_are_those_of_autograd(shape, out, bias, frozen):
    x, weight, b = draw(*shape), draw(out, shape[-1], seed=1), draw(out, seed=2) if bias else None
    results = []
    for dtype in (torch.float64, torch.float32):
        module = kernels.quick_linears(torch.nn.Sequential(torch.nn.Linear(shape[-1], out, bias=bias, dtype=dtype)))[0]
        module.weight.data, h = weight.to(dtype), x.to(dtype).clone().requires_grad_()
        if bias:
            module.bias.data = b.to(dtype)
        module.weight.requires_grad_(not frozen)
        y = module(h)
        if dtype == torch.float32 and kernels.ONEDNN and not torch.cuda.is_available():
            assert (type(y.grad_fn).__name__ == "OneDNNLinearBackward") == (shape[0] > 1)
        y.sum().backward(retain_graph=True)  # its gradient is one number, seen everywhere: no storage to speak of
        (y * torch.arange(1, out + 1, dtype=dtype)).sum().backward()
        assert (module.weight.grad is None) == frozen
        results.append([y, h.grad, *([] if frozen else [module.weight.grad]), *([module.bias.grad] if bias else [])])
    for want, got in zip(*results):
        same(got, want, torch.float32, "linear")


# -----------------------------------------------------------------------------
# attention


def naive_attention(q, k, v, scale, window, slopes):
    """One sequence, float64: q (n, H, D) are its last n positions, k and v (T, K, D). Query by query, head by head."""
    n, H, D = q.shape
    T, K = k.shape[:2]
    out = torch.zeros_like(q)
    for i in range(n):
        here = T - n + i
        seen = slice(max(0, here + 1 - window) if window else 0, here + 1)
        for h in range(H):
            scores = k[seen, h // (H // K)] @ q[i, h] * scale                            # (seen,)
            if slopes is not None:
                scores = scores - slopes[h] * (here - torch.arange(seen.start, seen.stop))
            out[i, h] = scores.softmax(0) @ v[seen, h // (H // K)]
    return out


def alibi(H):
    return 2.0 ** -(1 + torch.arange(H, dtype=torch.float64) * 8 / H)


def check_prefill(device, dtype, lengths, H, K, D, window, slopes, seed=0):
    N, cu = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    # q, k and v as a fused projection leaves them: slices of one tensor, whose rows are longer than theirs
    q, k, v = draw(N, H + 2 * K, D, dtype=dtype, seed=seed).split([H, K, K], 1)
    slopes = alibi(H) if slopes else None
    want = torch.cat([naive_attention(a, b, c, D**-0.5, window, slopes) for a, b, c in zip(*(x.split(lengths) for x in (q, k, v)))])
    same(kernels.prefill_attention(q, k, v, cu, D**-0.5, window, slopes), want, torch.float64, "prefill in PyTorch")
    qkv = torch.cat([q, k, v], 1).to(device, dtype).split([H, K, K], 1)
    got = kernels.prefill_attention_triton(*qkv, cu.to(device), D**-0.5, window, *to(device, torch.float32, slopes))
    same(got, want, dtype, f"prefill of {lengths}, heads {H}/{K}x{D}, window {window}, slopes {slopes is not None}")


@on_every_device
@pytest.mark.parametrize("lengths, H, K, D, window, slopes", [
    ([3, 0, 1, 133, 0], 2, 2, 64, 0, False),        # empty and one-token rows, a row longer than a block
    ([1, 1, 1], 4, 1, 80, 0, True),
    ([31, 32, 33], 8, 1, 96, 0, False),
    ([70, 5], 4, 1, 128, 7, True),                  # a window smaller than a block of keys
    ([0, 150], 1, 1, 64, 64, False),                # a window of exactly one
    ([35], 1, 1, 256, 0, True)])
def test_packed_prefill_is_attention_of_each_sequence_alone(device, dtype, lengths, H, K, D, window, slopes):
    check_prefill(device, dtype, lengths, H, K, D, window, slopes)


@on_every_device
@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), K=st.sampled_from([1, 2]), G=st.sampled_from([1, 4]),
       D=st.sampled_from([64, 80]), window=st.integers(0, 50), slopes=st.booleans(), tile=st.sampled_from([16, 32]))
def test_packed_prefill_of_drawn_shapes(device, dtype, lengths, K, G, D, window, slopes, tile):
    with pytest.MonkeyPatch.context() as patch:  # small tiles: more edges in few tokens
        patch.setattr(kernels, "prefill_tile", lambda *_: (tile, 16, 1))
        check_prefill(device, dtype, lengths, K * G, K, D, window, slopes)


@on_every_device
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_sequence_never_reads_its_neighbours(device, dtype):
    q, k, v = (draw(90, 1, 64, dtype=dtype, seed=i).to(device, dtype) for i in range(3))
    cu = torch.tensor([0, 30, 60, 90], dtype=torch.int32, device=device)
    alone = kernels.prefill_attention_triton(q, k, v, cu, 0.1)[30:60]
    for x in (q, k, v):
        x[:30] = float("nan")
        x[60:] = float("inf")
    packed = kernels.prefill_attention_triton(q, k, v, cu, 0.1)[30:60]
    assert torch.equal(alone, packed), "tokens of another sequence changed this one's attention"


def check_decode(device, dtype, lengths, C, H, K, D, window, slopes, seed=0):
    B, slots, lens = len(lengths), len(lengths) + 1, torch.tensor(lengths)
    q, k, v = draw(B, H, D, dtype=dtype, seed=seed), *draw(2, slots, K, C, D, dtype=dtype, seed=seed + 1)
    slopes = alibi(H) if slopes else None
    want = torch.cat([naive_attention(q[b : b + 1], k[b, :, :n].transpose(0, 1), v[b, :, :n].transpose(0, 1), D**-0.5, window, slopes)
                      if n else torch.zeros(1, H, D) for b, n in enumerate(lengths)])
    same(kernels.decode_attention(q, k, v, lens, D**-0.5, window, slopes), want, torch.float64, "decode in PyTorch")
    for b in range(slots):  # what stands behind a row's length belongs to nobody
        k[b, :, (lengths + [0])[b] :] = v[b, :, (lengths + [0])[b] :] = float("nan")
    got = kernels.decode_attention_triton(*to(device, dtype, q, k, v), lens.to(device), D**-0.5, window, *to(device, torch.float32, slopes))
    same(got, want, dtype, f"decode of {lengths} in {C}, heads {H}/{K}x{D}, window {window}, slopes {slopes is not None}")


@on_every_device
@pytest.mark.parametrize("lengths, C, H, K, D, window, slopes", [
    ([3, 0, 70, 33], 70, 2, 2, 64, 0, False),
    ([0, 0], 40, 1, 1, 64, 0, False),               # nothing but empty rows
    ([1], 300, 8, 1, 128, 0, True),                 # a capacity of many splits, and keys for one
    ([200, 7], 200, 4, 1, 80, 50, True),
    ([100, 31], 128, 8, 2, 96, 3, False),
    ([65], 65, 1, 1, 256, 0, True),
    ([9, 17], 20, 34, 2, 64, 0, False)])            # 17 query heads to a key head
def test_decode_is_the_last_row_of_full_attention(device, dtype, lengths, C, H, K, D, window, slopes):
    check_decode(device, dtype, lengths, C, H, K, D, window, slopes)


@on_every_device
@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3), extra=st.integers(0, 40), K=st.sampled_from([1, 2]),
       G=st.sampled_from([1, 4, 8]), D=st.sampled_from([64, 96]), window=st.integers(0, 99), slopes=st.booleans())
def test_decode_of_drawn_shapes(device, dtype, lengths, extra, K, G, D, window, slopes):
    check_decode(device, dtype, lengths, max(max(lengths) + extra, 1), K * G, K, D, window, slopes)


@on_every_device
def test_decode_in_one_split_and_in_many_agree(device, dtype):
    """Forty rows are programs enough not to split; the first of them alone is split."""
    q, (k, v) = draw(40, 8, 64, dtype=dtype), draw(2, 40, 8, 96, 64, dtype=dtype)
    q, k, v, n = *to(device, dtype, q, k, v), torch.full((40,), 77, device=device)
    n[1:39] = 0  # the interpreter is slow
    many = kernels.decode_attention_triton(q, k, v, n, 0.1)
    one = kernels.decode_attention_triton(q[:1], k, v, n[:1], 0.1)
    same(one, many[:1].cpu(), dtype, "decode of one row against the same row among forty")


# -----------------------------------------------------------------------------
# rotary positions, the cache, norms


@on_every_device
@pytest.mark.parametrize("H, K, D, R", [(4, 4, 64, 0), (3, 1, 64, 64), (8, 2, 80, 20), (2, 2, 96, 24), (1, 1, 256, 256)])
def test_rope_turns_and_the_cache_holds_what_was_turned(device, dtype, H, K, D, R):
    N, C = 5, 9
    q, k, v = draw(N, H + 2 * K, D, dtype=dtype).to(device, dtype).split([H, K, K], 1)
    slots, positions = torch.tensor([0, 0, 2, 3, 1]), torch.tensor([0, 1, 8, 3, 2])
    angles = torch.arange(C)[:, None] * 0.7 ** torch.arange(R // 2, dtype=torch.float64)
    cos, sin = (angles.cos(), angles.sin()) if R else (None, None)
    want_k, want_v = torch.zeros(2, 4, K, C, D, dtype=torch.float64)
    want = kernels.rope_and_cache(*(x.cpu().double() for x in (q, k, v)), want_k, want_v, slots, positions, cos, sin)
    if R:  # Su et al.: the angle between two turned vectors depends on the distance of their positions only
        x = draw(1, 1, D).expand(N, 1, D)
        x = kernels.rotate(x, cos[positions], sin[positions])[:, 0, :R]
        same((x[0] @ x[1]), x[3] @ x[4], torch.float64, "products of turned vectors at equal distances")
    cache_k, cache_v = torch.zeros(2, 4, K, C, D, dtype=dtype, device=device)
    got = kernels.rope_and_cache_triton(q, k, v, cache_k, cache_v, slots.to(device), positions.to(device), *to(device, torch.float32, cos, sin))
    for name, a, b in zip(("q", "k", "cache of k", "cache of v"), (*got, cache_k, cache_v), (*want, want_k, want_v)):
        same(a, b, dtype, f"{name}, {R} of {D} features turned")


@NO_INTERPRETER
def test_a_cache_beyond_32_bits_is_addressed_right():
    """Slot 5 of these starts 5 * 2^29 numbers in. Only the pages that are touched take memory."""
    try:
        cache = torch.empty(6, 1, 2**23, 64, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"6 GB cannot even be promised here: {error}")
    q, k = draw(6, 1, 64, dtype=torch.float16).half(), torch.ones(6, 1, 64, dtype=torch.float16)
    kernels.rope_and_cache_triton(q, k, k, cache, cache, torch.arange(6), torch.zeros(6, dtype=torch.long))
    lengths = torch.tensor([1, 0, 0, 0, 0, 1])
    got = kernels.decode_attention_triton(q, cache, cache, lengths, 0.1, window=16)
    assert torch.equal(got[:, 0, 0], lengths.half()), "keys written past 2^31 numbers are not where they are read"


@on_every_device
@pytest.mark.parametrize("E", [1, 100, 1024])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_norm_adds_and_norms(device, dtype, E, rms, with_residual):
    x, r = draw(2, 3, 2, E, dtype=dtype)
    weight, bias = draw(2, E, dtype=dtype, seed=1)
    r, bias = r if with_residual else None, None if rms else bias
    x = (x + 100 * (E > 1)).to(dtype).double()  # a mean much larger than the deviation
    total = (x if r is None else x + r).to(dtype).double()
    y = total if rms else total - total.mean(-1, keepdim=True)
    want = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + (0 if rms else bias)
    if dtype == torch.float32:  # in the others the sum is rounded in between
        for got, ref, what in zip(kernels.add_norm(*to("cpu", dtype, x, r, weight, bias), 1e-5, rms), (want, total), ("norm in PyTorch", "sum in PyTorch")):
            same(got, ref, dtype, what)
    normed, got = kernels.add_norm_triton(*to(device, dtype, x, r, weight, bias), 1e-5, rms)
    same(got, total, dtype, "sum")
    same(normed, want, dtype, "rms norm" if rms else "layer norm")


# -----------------------------------------------------------------------------
# sampling


@pytest.mark.parametrize("name, device, n", [
    pytest.param("sample", "cpu", 2000, id="pytorch"),
    pytest.param("sample_triton", "cpu", 600, id="interpreter", marks=NO_INTERPRETER),
    pytest.param("sample_triton", "cuda", 20000, id="gpu", marks=NO_GPU)])
def test_sampled_frequencies_are_the_probabilities(name, device, n):
    """Pearson's chi-square over six tokens that lie in three blocks, the row's own random numbers, temperature 0.7."""
    logits = torch.full((9000,), float("-inf"))
    logits[[0, 1, 4095, 4096, 8999, 5000]] = torch.tensor([0.0, 1.0, 0.5, 1.5, -0.5, 0.3])
    u = kernels.uniform(torch.arange(n), torch.full((n,), 3))
    tokens = getattr(kernels, name)(logits.expand(n, -1).to(device), u.to(device), 0.7)[0].cpu()
    p = (logits.double() / 0.7).softmax(0)
    count = tokens.bincount(minlength=9000).double()
    assert count[p == 0].sum() == 0, f"{name} drew a token of probability 0"
    chi2 = ((count - n * p).square() / (n * p))[p > 0].sum()
    assert chi2 < 20.5, f"{name}: chi-square {chi2:.1f} with 5 degrees of freedom has a chance below 0.001"


def test_uniform_numbers_depend_on_row_and_position_alone():
    keys, counters = torch.arange(300).repeat_interleave(300), torch.arange(300).repeat(300)
    u = kernels.uniform(keys, counters)
    shuffle = torch.randperm(len(u), generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernels.uniform(keys[shuffle], counters[shuffle]), u[shuffle]), "order changes the numbers"
    assert 0 < u.min() and u.max() < 1 and (u.histc(10, 0, 1) / len(u) - 0.1).abs().max() < 0.005, "not uniform in (0, 1)"
    grid = u.view(300, 300).double() - 0.5
    for name, other in (("rows", grid.roll(1, 0)), ("positions", grid.roll(1, 1)), ("key and counter swapped", grid.T)):
        assert (grid * other).mean().abs() * 12 < 0.02, f"numbers of neighbouring {name} go together"


@on_every_device
@pytest.mark.parametrize("V, temperature", [(1, 1.0), (7, 0.7), (5000, 1.3), (5000, 0.0), (4096, 1.0)])
def test_the_kernel_draws_the_tokens_that_pytorch_draws(device, dtype, V, temperature):
    logits, u = 3 * draw(16, V, dtype=dtype), torch.linspace(2**-25, 1 - 2**-24, 16, dtype=torch.float32)
    logits = logits.to(dtype).double()
    logits[3] = 0.0                                   # ties: the first
    logits[5, : V - 1] = float("-inf")                # one token left, behind empty blocks
    want, want_logprobs = kernels.sample(logits, u, temperature)
    rows = torch.cat([logits, logits + 9], 1).to(device, dtype)[:, :V]  # rows that are not next to each other
    tokens, logprobs = (x.cpu() for x in kernels.sample_triton(rows, u.to(device), temperature))
    cdf = (logits / (temperature or 1)).softmax(-1).cumsum(-1)
    near = (cdf.gather(1, torch.minimum(tokens, want)[:, None])[:, 0] - u).abs() < 1e-5
    assert ((tokens == want) | (near & (temperature > 0))).all(), f"tokens {tokens.tolist()} instead of {want.tolist()}"
    want_logprobs = (logits / (temperature or 1)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    same(logprobs, want_logprobs, torch.float32, "log-probability of the sampled token")


def test_top_k_and_top_p_keep_the_likely_and_renormalise():
    p = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    for top_k, top_p, kept in ((2, 1.0, [1, 3]), (0, 0.7, [1, 3]), (0, 0.71, [1, 3, 4]), (4, 0.5, [1, 3]), (0, 1e-9, [1]), (9, 1.0, range(5))):
        u = torch.linspace(0.001, 0.999, 99)
        tokens, logprobs = kernels.sample(p.log().expand(99, -1), u, 1.0, top_k, top_p)
        assert set(tokens.tolist()) == set(kept), f"top_k {top_k}, top_p {top_p} keeps {set(tokens.tolist())}"
        same(logprobs, (p[tokens] / p[list(kept)].sum()).log(), torch.float32, f"top_k {top_k}, top_p {top_p}")


# -----------------------------------------------------------------------------
# log-probabilities without the logits


@pytest.mark.parametrize("half, device, dtype", [
    ("PyTorch", "cpu", torch.float32), pytest.param("Triton", "cpu", torch.float32, marks=NO_INTERPRETER, id="interpreter"),
    pytest.param("Triton", "cuda", torch.float32, marks=NO_GPU, id="gpu-fp32"),
    pytest.param("Triton", "cuda", torch.bfloat16, marks=NO_GPU, id="gpu-bf16")])
@pytest.mark.parametrize("N, E, V, temperature", [(7, 5, 11, 1.0), (5, 8, 5003, 0.7), (0, 3, 4, 1.0), (1, 3, 1, 1.0)])
def test_token_logprobs_and_their_gradients_are_those_of_autograd(half, device, dtype, N, E, V, temperature, monkeypatch):
    if half == "Triton":
        monkeypatch.setattr(kernels, "logit_stats", kernels.logit_stats_triton)
        monkeypatch.setattr(kernels, "logit_grads", kernels.logit_grads_triton)
    monkeypatch.setattr(kernels.TokenLogprobs, "CHUNK", {device: 3 * V})  # three rows at a time
    hidden, weight = draw(N, E, dtype=dtype), draw(V, E, dtype=dtype, seed=1)
    weight[V - V // 6 :] *= 1.3  # the largest logit comes late
    targets, g, g_entropy = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2)), draw(N, seed=3), draw(N, seed=4)

    a, b = (x.clone().requires_grad_() for x in (hidden, weight))
    logp = (a @ b.T / temperature).log_softmax(-1)
    want = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    want += torch.autograd.grad((want[0] * g).sum() + (want[1] * g_entropy).sum(), (a, b))

    a, b = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    sizes = [z.numel() for _, z in kernels.TokenLogprobs.chunks(a, b)]
    assert sum(sizes) == N * V and max(sizes, default=0) <= 3 * V, f"chunks of {sizes} logits, where {3 * V} are allowed"
    got = kernels.token_logprobs(a, b, targets.to(device), temperature)
    got += torch.autograd.grad((got[0] * g.to(device)).sum() + (got[1] * g_entropy.to(device)).sum(), (a, b))
    for name, x, y in zip(("logprobs", "entropy", "gradient of hidden", "gradient of weight"), got, want):
        same(x, y, dtype, f"{half}: {name}", times=4 if dtype == torch.bfloat16 else 1)  # logits are rounded to it before the softmax


def test_token_logprobs_gives_a_frozen_head_no_gradient():
    hidden, weight = draw(4, 3).float().requires_grad_(), draw(6, 3).float()
    kernels.token_logprobs(hidden, weight, torch.arange(4))[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None, "the head is frozen, the hidden states are not"


# -----------------------------------------------------------------------------
# what only a GPU can show


@NO_GPU
def test_gpu_graph_of_a_decode_step_serves_all_lengths():
    B, H, C, D, V = 3, 8, 300, 64, 1000
    q, (k, v), logits = torch.randn(B, H, D), torch.randn(2, B, H, C, D), torch.randn(B, V)
    q, k, v, logits = to("cuda", torch.bfloat16, q, k, v, logits)
    lengths, u = torch.ones(B, dtype=torch.long, device="cuda"), torch.rand(B, device="cuda")

    def step():
        kernels.rope_and_cache(q, q, q, k, v, torch.arange(B, device="cuda"), lengths - 1)
        plain, cut = kernels.sample(logits, u, 0.9), kernels.sample(logits, u, 0.9, top_k=50, top_p=0.9)
        return kernels.decode_attention(q, k, v, lengths, 0.1), plain[0], cut[0]
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for n in (1, 64, 65, 300):
        lengths.fill_(n)
        u.uniform_()
        graph.replay()
        for name, a, b in zip(("attention", "sampling", "top-k and top-p"), captured, step()):
            assert torch.equal(a, b), f"{name} inside a graph differs from outside at length {n}"


@NO_GPU
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("K, window, slopes", [(16, 0, False), (4, 100, True), (2, 0, False)])
def test_gpu_attention_at_real_sizes(D, K, window, slopes):
    H, C, device, dtype = 16, 600, "cuda", torch.bfloat16
    lengths, slopes = [1, 513, 128, 0, 300], alibi(H).float() if slopes else None
    q, k, v = draw(sum(lengths), H, D, dtype=dtype), *draw(2, sum(lengths), K, D, dtype=dtype)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    got = kernels.prefill_attention(*to(device, dtype, q, k, v), cu.to(device), D**-0.5, window, *to(device, torch.float32, slopes))
    same(got, kernels.prefill_attention(q, k, v, cu, D**-0.5, window, slopes), dtype, "prefill")
    for B in (1, 5, 20):
        q, (k, v), n = draw(B, H, D, dtype=dtype), draw(2, B, K, C, D, dtype=dtype), (torch.arange(B) * 137 + 600) % 601
        got = kernels.decode_attention(*to(device, dtype, q, k, v), n.to(device), D**-0.5, window, *to(device, torch.float32, slopes))
        same(got, kernels.decode_attention(q, k, v, n, D**-0.5, window, slopes), dtype, f"decode of {B} rows")


# -----------------------------------------------------------------------------
# what the compiler makes of them, for GPUs that are not here


def compile_kernels(full=False):
    """Compiles what the launchers would launch, for sm_80 and sm_90 (and, where full, more dtypes, sm_100 and gfx942).
    Returns a list of dicts: registers of a thread, bytes of spilled registers and of shared memory, ..."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    launches, bf16, fp16, fp32 = [], torch.bfloat16, torch.float16, torch.float32
    pointers = {bf16: "*bf16", fp16: "*fp16", fp32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}

    def recorder(fn):
        """Stands where a kernel does, and keeps what Triton would specialise on: dtypes, constants, divisibility by 16."""
        class Recorder:
            def __getitem__(self, grid):
                def launch(*args, **options):
                    signature, constants, attrs = {}, {}, {}
                    for i, (p, x) in enumerate(zip(fn.params, args, strict=True)):
                        if p.is_constexpr or x is None or type(x) is int and x == 1:
                            signature[p.name], constants[p.name] = "constexpr", x
                            continue
                        signature[p.name] = pointers[x.dtype] if torch.is_tensor(x) else "fp32" if type(x) is float \
                            else "i32" if x < 2**31 else "i64"
                        if torch.is_tensor(x) or type(x) is int and x % 16 == 0:
                            attrs[(i,)] = [["tt.divisibility", 16]]
                    launches.append((case, fn.__name__, fn, signature, constants, attrs, options))
                return launch
        return Recorder()

    def tensor(*shape, dtype=torch.int64):
        return torch.empty(*shape, dtype=dtype, device="meta")

    kept = {name: fn for name, fn in vars(kernels).items() if name.endswith("_kernel")}
    tile, rows = kernels.prefill_tile, []
    targets = [("cuda", 80, 32), ("cuda", 90, 32)] + [("cuda", 100, 32), ("hip", "gfx942", 64)] * full
    for target in targets:
        launches.clear()
        for name, fn in kept.items():
            setattr(kernels, name, recorder(fn))
        kernels.prefill_tile = lambda D, bytes, _: tile(D, bytes, target[0] == "cuda" and target[1] >= 90)
        sizes = [(D, bf16) for D in (64, 80, 96, 128, 256)] + [(D, dtype) for D in (64, 128) for dtype in (fp16, fp32)]
        if full:
            sizes = [(D, dtype) for D in (64, 80, 96, 128, 256) for dtype in (bf16, fp16, fp32)]
        for D, dtype in sizes:
            both = full or dtype == bf16 and D in (64, 128, 256)
            for K, window, slopes in ((32, 0, None), (8, 1024, tensor(32, dtype=fp32)))[: 1 + both]:
                case = f"{str(dtype)[6:]}, D {D}, {K} key heads" + ", window, slopes" * bool(window)
                q, k, cache = (tensor(*s, D, dtype=dtype) for s in ((64, 32), (64, K), (256, K, 4096)))
                kernels.prefill_attention_triton(q, k, k, tensor(9, dtype=torch.int32), 0.1, window, slopes)
                for B in (64, 1):  # one split, many
                    kernels.decode_attention_triton(q[:B], cache[:, :, :512], cache[:, :, :512], tensor(B), 0.1, window, slopes)
                for R in (0, D // 4, D):
                    turn = tensor(4096, R // 2, dtype=fp32) if R else None
                    kernels.rope_and_cache_triton(q, k, k, cache, cache, tensor(64), tensor(64), turn, turn)
        for E in (768, 2048, 5120, 9216):
            for dtype in (bf16, fp16, fp32)[: 3 if full else 1]:
                x, case = tensor(64, E, dtype=dtype), f"{str(dtype)[6:]}, E {E}"
                for rms in (False, True):
                    kernels.add_norm_triton(x, x, x[0], x[0], 1e-5, rms)
        for V in (259, 50257, 151936):
            for dtype in (bf16, fp32):
                x, n, f, case = tensor(64, V, dtype=dtype), tensor(64), tensor(64, dtype=fp32), f"{str(dtype)[6:]}, V {V}"
                for temperature in (0.0, 0.7):
                    kernels.sample_triton(x, f, temperature)
                kernels.logit_stats_triton(x, n, 1.0)
                kernels.logit_grads_triton(x, n, f, f, f, f, 1.0)
        for name, fn in kept.items():
            setattr(kernels, name, fn)
        kernels.prefill_tile = tile

        seen = set()
        for case, name, fn, signature, constants, attrs, options in launches:
            key = repr((name, signature, constants, attrs, options))
            if key in seen:
                continue
            seen.add(key)
            start = time.time()
            source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
            k = triton.compile(source, target=GPUTarget(*target), options=options)
            row = dict(kernel=name, case=case, target=str(target[1]), shared=k.metadata.shared, warps=k.metadata.num_warps)
            if target[0] == "cuda":
                arch = re.search(r"\.target (\w+)", k.asm["ptx"])[1]
                with tempfile.TemporaryDirectory() as tmp:
                    Path(tmp, "k.ptx").write_text(k.asm["ptx"])
                    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if target[1] >= 100 else "ptxas")
                    said = subprocess.run([ptxas, "-v", f"--gpu-name={arch}", "k.ptx", "-o", "k"], cwd=tmp, check=True,
                                          capture_output=True, text=True).stderr
                row |= dict(registers=int(re.search(r"Used (\d+) registers", said)[1]),
                            spilled=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
                            tensor_cores=next((i for i in ("tcgen05.mma", "wgmma", "mma.sync") if i in k.asm["ptx"]), ""))
            else:
                count = {what: int(n) for what, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", k.asm["amdgcn"])}
                row |= dict(registers=count["vgpr_count"], spilled=4 * count["vgpr_spill_count"],
                            tensor_cores="mfma" if "v_mfma" in k.asm["amdgcn"] else "")
            rows.append(row | dict(seconds=round(time.time() - start, 2)))
    return rows


def test_every_kernel_compiles_and_spills_nothing():
    """In a process of its own: whether a kernel is interpreted is decided when triton is imported. COMPILE_TABLE=file keeps
    the table; COMPILE_FULL=1 makes it longer."""
    code = f"import json, os, {Path(__file__).stem} as t; print(json.dumps(t.compile_kernels(bool(os.environ.get('COMPILE_FULL')))))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=os.environ | {"TRITON_INTERPRET": "0"},
                         capture_output=True, text=True)
    assert ran.returncode == 0, f"a kernel does not compile:\n{ran.stderr[-3000:]}"
    rows = json.loads(ran.stdout)
    if os.environ.get("COMPILE_TABLE"):
        Path(os.environ["COMPILE_TABLE"]).write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    nvidia = [r for r in rows if r["target"] in ("80", "90")]
    assert {r["kernel"] for r in nvidia} == {n for n in vars(kernels) if n.endswith("_kernel")}, "a kernel was not compiled"
    bad = [r for r in nvidia if r["spilled"] or r["shared"] > 99 * 1024]
    assert not bad, "spilled registers, or more shared memory than a GeForce has:\n" + "\n".join(map(str, bad))
