"""Tests of kernels.py: references and Triton kernels against naive versions in float64.

Without a GPU the kernels run in Triton's interpreter, in float32 and float16 (it computes wrong
results in bfloat16, without an error), and are compiled for GPUs that are not there. With a GPU,
`pytest -k gpu test_kernels.py` runs them on it, also in bfloat16. The interpreter of Triton 3.6
needs numpy below 2.4; that of 3.7.1 works with the versions in requirements.txt.
"""
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import AttentionSpec

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NO_INTERPRETER = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="here the kernels run on the GPU"
)
on_every_device = pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param("cpu", torch.float32, id="interpreter-fp32", marks=NO_INTERPRETER),
        pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=NO_INTERPRETER),
        pytest.param("cuda", torch.float32, id="gpu-fp32", marks=NO_GPU),
        pytest.param("cuda", torch.bfloat16, id="gpu-bf16", marks=NO_GPU),
    ],
)
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def draw(*shape, dtype=torch.float64, seed=0):
    """Normal random numbers that the dtype represents exactly, in float64 for the reference."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).double()


def cast(x, device, dtype):
    """Floating point tensors to the dtype, all tensors to the device. None stays None."""
    if x is None:
        return None
    if not x.is_floating_point():
        return x.to(device)
    return x.to(device, dtype)


def assert_close(got, want, dtype, what, times=1):
    """The error, in units of 1 + the size of the number, is below the tolerance of the dtype."""
    got = got.detach().double().cpu()
    want = want.detach().double()
    shapes = f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.shape == want.shape and not got.isnan().any(), f"{what}: nan, or {shapes}"
    if want.numel() == 0:
        return
    worst = ((got - want).abs() / (1 + want.abs())).max()
    assert worst < times * TOLERANCE[dtype], f"{what}: error {worst:.2e} in {dtype}"


# -----------------------------------------------------------------------------
# matrix products


@pytest.mark.parametrize(
    "shape, out",
    [
        ((5, 8), 24),
        ((3, 7, 24), 8),
        ((1, 8), 8),
        ((2, 3, 8), 1),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_linear_and_its_gradients_are_those_of_autograd(shape, out, bias, frozen):
    x = draw(*shape)
    weight = draw(out, shape[-1], seed=1)
    b = draw(out, seed=2)
    results = []
    for dtype in (torch.float64, torch.float32):
        module = torch.nn.Sequential(torch.nn.Linear(shape[-1], out, bias=bias, dtype=dtype))
        module = kernels.use_onednn_linears(module)[0]
        module.weight.data = weight.to(dtype)
        if bias:
            module.bias.data = b.to(dtype)
        module.weight.requires_grad_(not frozen)
        h = x.to(dtype).clone().requires_grad_()
        y = module(h)
        if dtype == torch.float32 and kernels.ONEDNN and not torch.cuda.is_available():
            uses_onednn = type(y.grad_fn).__name__ == "OneDNNLinearBackward"
            assert uses_onednn == (shape[0] > 1)
        y.sum().backward(retain_graph=True)  # a gradient with strides of 0
        (y * torch.arange(1, out + 1, dtype=dtype)).sum().backward()
        assert (module.weight.grad is None) == frozen
        result = [y, h.grad]
        if not frozen:
            result.append(module.weight.grad)
        if bias:
            result.append(module.bias.grad)
        results.append(result)
    for want, got in zip(*results):
        assert_close(got, want, torch.float32, "linear")


@pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param("cpu", torch.float32, id="cpu"),
        pytest.param("cuda", torch.float32, marks=NO_GPU, id="gpu-fp32"),
        pytest.param("cuda", torch.bfloat16, marks=NO_GPU, id="gpu-bf16"),
    ],
)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_product_with_an_activation(device, dtype, activation, bias, rows):
    x = draw(rows, 16, dtype=dtype)
    weight = draw(32, 16, dtype=dtype, seed=1)
    b = draw(32, dtype=dtype, seed=2) if bias else None
    z = x @ weight.T + (b if bias else 0)
    want = {
        "relu": z.clamp(min=0),
        "silu": z / (1 + (-z).exp()),
        "gelu": z * (1 + (z / 2**0.5).erf()) / 2,
        "gelu_tanh": z * (1 + ((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)).tanh()) / 2,
    }
    args = [cast(a, device, dtype) for a in (x, weight, b)]
    got = kernels.linear_activation(*args, activation)
    assert_close(got, want[activation], dtype, activation)


def test_a_scaled_product_is_added_with_its_gradients():
    y, x, weight = draw(3, 2, 5), draw(3, 2, 4, seed=1), draw(5, 4, seed=2)
    leaves = [a.requires_grad_() for a in (y, x, weight)]
    want = y + 0.5 * (x @ weight.T)
    got = kernels.add_product(y, x, weight, 0.5)
    assert_close(got, want, torch.float64, "sum")
    g = draw(3, 2, 5, seed=3)
    gradients = torch.autograd.grad(got, leaves, g)
    for a, b in zip(gradients, torch.autograd.grad(want, leaves, g)):
        assert_close(a, b, torch.float64, "gradient")


# -----------------------------------------------------------------------------
# attention


def alibi_slopes(H):
    return 2.0 ** -(1 + torch.arange(H, dtype=torch.float64) * 8 / H)


def make_spec(H, D, window, slopes, softcap):
    """An AttentionSpec for the float64 reference. slopes: whether to use ALiBi."""
    spec = AttentionSpec(D**-0.5, window, softcap=softcap)
    if slopes:
        spec = spec._replace(slopes=alibi_slopes(H))
    return spec


def on_device(spec, device):
    return spec._replace(slopes=cast(spec.slopes, device, torch.float32))


def naive_attention(q, k, v, spec):
    """One sequence in float64, query by query and head by head.

    q (n, H, D): the last n positions; k, v (T, K, D).
    """
    n, H, D = q.shape
    T, K = k.shape[:2]
    out = torch.zeros_like(q)
    for i in range(n):
        pos = T - n + i
        first = 0
        if spec.window:
            first = max(0, pos + 1 - spec.window)
        visible = slice(first, pos + 1)
        for h in range(H):
            key_head = h // (H // K)
            scores = k[visible, key_head] @ q[i, h] * spec.scale        # (visible keys,)
            if spec.softcap:
                scores = spec.softcap * (scores / spec.softcap).tanh()
            if spec.slopes is not None:
                distance = pos - torch.arange(first, pos + 1)
                scores = scores - spec.slopes[h] * distance
            out[i, h] = scores.softmax(0) @ v[visible, key_head]
    return out


def check_prefill(device, dtype, lengths, H, K, D, window, slopes, softcap=0.0):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    # Slices of one tensor, as a fused projection makes them: their rows are not contiguous.
    qkv = draw(sum(lengths), H + 2 * K, D, dtype=dtype)
    q, k, v = qkv.split([H, K, K], 1)
    spec = make_spec(H, D, window, slopes, softcap)
    case = f"prefill of {lengths}, heads {H}/{K}x{D}, {spec}"
    sequences = zip(q.split(lengths), k.split(lengths), v.split(lengths))
    want = torch.cat([naive_attention(*sequence, spec) for sequence in sequences])

    got = kernels.prefill_attention(q, k, v, cu_seqlens, spec)
    assert_close(got, want, torch.float64, f"PyTorch: {case}")

    q, k, v = qkv.to(device, dtype).split([H, K, K], 1)
    got = kernels.prefill_attention_triton(
        q, k, v, cu_seqlens.to(device), on_device(spec, device)
    )
    assert_close(got, want, dtype, f"Triton: {case}")


@on_every_device
@pytest.mark.parametrize(
    "lengths, H, K, D, window, slopes",
    [
        ([3, 0, 1, 133, 0], 2, 2, 64, 0, False),  # empty, one token, longer than a block
        ([1, 1, 1], 4, 1, 80, 0, True),
        ([31, 32, 33], 8, 1, 96, 0, False),
        ([70, 5], 4, 1, 128, 7, True),  # a window smaller than a block of keys
        ([0, 150], 1, 1, 64, 64, False),  # a window of exactly one block
        ([35], 1, 1, 256, 0, True),
        ([40, 3], 2, 1, 8, 0, False),  # below the 16 that tl.dot needs
        ([33, 2], 2, 2, 16, 9, True),
        ([50], 4, 2, 32, 0, True),
    ],
)
def test_packed_prefill_is_attention_of_each_sequence_alone(
    device, dtype, lengths, H, K, D, window, slopes
):
    check_prefill(device, dtype, lengths, H, K, D, window, slopes)


@on_every_device
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    K=st.sampled_from([1, 2]),
    G=st.sampled_from([1, 4]),
    D=st.sampled_from([64, 80]),
    window=st.integers(0, 50),
    slopes=st.booleans(),
    tile=st.sampled_from([16, 32]),
)
def test_packed_prefill_of_drawn_shapes(device, dtype, lengths, K, G, D, window, slopes, tile):
    with pytest.MonkeyPatch.context() as patch:  # small tiles: more edges in few tokens
        patch.setattr(kernels, "prefill_tile", lambda *_: (tile, 16, 1))
        check_prefill(device, dtype, lengths, K * G, K, D, window, slopes)


@on_every_device
@pytest.mark.parametrize(
    "lengths, H, K, D, window, slopes, softcap",
    [
        ([3, 0, 1, 70], 2, 2, 64, 0, False, 0.5),
        ([33, 33], 4, 2, 16, 9, True, 2.0),
        ([40], 2, 1, 256, 20, False, 50.0),  # Gemma 2
    ],
)
def test_prefill_with_a_softcap(device, dtype, lengths, H, K, D, window, slopes, softcap):
    check_prefill(device, dtype, lengths, H, K, D, window, slopes, softcap)


@on_every_device
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_sequence_never_reads_its_neighbours(device, dtype):
    q, k, v = (draw(90, 1, 64, dtype=dtype, seed=i).to(device, dtype) for i in range(3))
    cu_seqlens = torch.tensor([0, 30, 60, 90], dtype=torch.int32, device=device)
    spec = AttentionSpec(0.1)
    clean = kernels.prefill_attention_triton(q, k, v, cu_seqlens, spec)[30:60]
    for x in (q, k, v):
        x[:30] = float("nan")
        x[60:] = float("inf")
    got = kernels.prefill_attention_triton(q, k, v, cu_seqlens, spec)[30:60]
    assert torch.equal(clean, got), "tokens of another sequence changed this one's attention"


def test_alibi_tells_far_positions_apart_in_bfloat16_too():
    slopes = torch.tensor([1.0, 0.25])
    bias = kernels.alibi(slopes, torch.arange(400), torch.bfloat16)
    assert bias[0].tolist() == list(range(400)), "bfloat16 itself cannot count beyond 256"


def check_decode(device, dtype, lengths, C, H, K, D, window, slopes, softcap=0.0):
    B = len(lengths)
    slots = B + 1
    q = draw(B, H, D, dtype=dtype)
    k, v = draw(2, slots, K, C, D, dtype=dtype, seed=1)
    spec = make_spec(H, D, window, slopes, softcap)
    case = f"decode of {lengths} in {C}, heads {H}/{K}x{D}, {spec}"
    want = torch.zeros(B, H, D, dtype=torch.float64)
    for b, n in enumerate(lengths):
        if n > 0:
            keys = k[b, :, :n].transpose(0, 1)                          # (n, K, D)
            values = v[b, :, :n].transpose(0, 1)                        # (n, K, D)
            want[b] = naive_attention(q[b : b + 1], keys, values, spec)[0]

    got = kernels.decode_attention(q, k, v, torch.tensor(lengths), spec)
    assert_close(got, want, torch.float64, f"PyTorch: {case}")

    # Nothing beyond the length of a row may be read, nor the slot that has no row.
    for slot, n in enumerate([*lengths, 0]):
        k[slot, :, n:] = float("nan")
        v[slot, :, n:] = float("nan")
    q, k, v = (cast(x, device, dtype) for x in (q, k, v))
    got = kernels.decode_attention_triton(
        q, k, v, torch.tensor(lengths, device=device), on_device(spec, device)
    )
    assert_close(got, want, dtype, f"Triton: {case}")


@on_every_device
@pytest.mark.parametrize(
    "lengths, C, H, K, D, window, slopes",
    [
        ([3, 0, 70, 33], 70, 2, 2, 64, 0, False),
        ([0, 0], 40, 1, 1, 64, 0, False),  # empty rows only
        ([1], 300, 8, 1, 128, 0, True),  # a capacity of many splits, and keys for one
        ([200, 7], 200, 4, 1, 80, 50, True),
        ([100, 31], 128, 8, 2, 96, 3, False),
        ([65], 65, 1, 1, 256, 0, True),
        ([9, 17], 20, 34, 2, 64, 0, False),  # 17 query heads per key head
        ([70, 3], 80, 2, 1, 8, 0, True),  # below the 16 that tl.dot needs
        ([66, 1], 70, 4, 2, 16, 20, False),
        ([0, 90], 100, 2, 2, 32, 0, True),
    ],
)
def test_decode_is_the_last_row_of_full_attention(
    device, dtype, lengths, C, H, K, D, window, slopes
):
    check_decode(device, dtype, lengths, C, H, K, D, window, slopes)


@on_every_device
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    extra=st.integers(0, 40),
    K=st.sampled_from([1, 2]),
    G=st.sampled_from([1, 4, 8]),
    D=st.sampled_from([64, 96]),
    window=st.integers(0, 99),
    slopes=st.booleans(),
)
def test_decode_of_drawn_shapes(device, dtype, lengths, extra, K, G, D, window, slopes):
    C = max(max(lengths) + extra, 1)
    check_decode(device, dtype, lengths, C, K * G, K, D, window, slopes)


@on_every_device
@pytest.mark.parametrize(
    "lengths, C, H, K, D, window, slopes, softcap",
    [
        ([3, 0, 70], 70, 2, 2, 64, 0, False, 0.5),
        ([100, 9], 100, 4, 2, 16, 30, True, 2.0),
        ([65], 65, 2, 1, 256, 40, False, 50.0),  # Gemma 2
    ],
)
def test_decode_with_a_softcap(device, dtype, lengths, C, H, K, D, window, slopes, softcap):
    check_decode(device, dtype, lengths, C, H, K, D, window, slopes, softcap)


@on_every_device
def test_decode_in_one_split_and_in_many_agree(device, dtype):
    """Forty rows are enough programs without a split; the first row alone is split."""
    q = cast(draw(40, 8, 64, dtype=dtype), device, dtype)
    k, v = cast(draw(2, 40, 8, 96, 64, dtype=dtype), device, dtype)
    lengths = torch.full((40,), 77, device=device)
    lengths[1:39] = 0  # the interpreter is slow
    spec = AttentionSpec(0.1)
    unsplit = kernels.decode_attention_triton(q, k, v, lengths, spec)
    split = kernels.decode_attention_triton(q[:1], k, v, lengths[:1], spec)
    assert_close(split, unsplit[:1].cpu(), dtype, "decode of one row, alone and among forty")


# -----------------------------------------------------------------------------
# rotary embedding, the KV cache, norms


@on_every_device
@pytest.mark.parametrize(
    "H, K, D, R",
    [
        (4, 4, 64, 0),
        (3, 1, 64, 64),
        (8, 2, 80, 20),
        (2, 2, 96, 24),
        (1, 1, 256, 256),
    ],
)
def test_rope_rotates_and_the_cache_holds_rotated_keys(device, dtype, H, K, D, R):
    N = 5
    C = 9
    qkv = draw(N, H + 2 * K, D, dtype=dtype)
    slots = torch.tensor([0, 0, 2, 3, 1])
    positions = torch.tensor([0, 1, 8, 3, 2])
    cos = None
    sin = None
    if R > 0:
        frequencies = 0.7 ** torch.arange(R // 2, dtype=torch.float64)
        angles = torch.arange(C)[:, None] * frequencies                 # (C, R / 2)
        cos = angles.cos()
        sin = angles.sin()

    q, k, v = qkv.split([H, K, K], 1)
    want_k, want_v = torch.zeros(2, 4, K, C, D, dtype=torch.float64)
    want = kernels.rope_and_cache(q, k, v, want_k, want_v, slots, positions, cos, sin)
    if R > 0:
        # Su et al.: the product of two rotated vectors depends on the distance of their positions.
        x = draw(1, 1, D).expand(N, 1, D)
        x = kernels.rotate(x, cos[positions], sin[positions])[:, 0, :R]
        what = "products of rotated vectors at equal distances"
        assert_close(x[0] @ x[1], x[3] @ x[4], torch.float64, what)

    q, k, v = qkv.to(device, dtype).split([H, K, K], 1)
    k_cache, v_cache = torch.zeros(2, 4, K, C, D, dtype=dtype, device=device)
    cos = cast(cos, device, torch.float32)
    sin = cast(sin, device, torch.float32)
    got = kernels.rope_and_cache_triton(
        q, k, v, k_cache, v_cache, slots.to(device), positions.to(device), cos, sin
    )
    case = f"{R} of {D} features rotated"
    assert_close(got[0], want[0], dtype, f"q, {case}")
    assert_close(got[1], want[1], dtype, f"k, {case}")
    assert_close(k_cache, want_k, dtype, f"cache of k, {case}")
    assert_close(v_cache, want_v, dtype, f"cache of v, {case}")


@NO_INTERPRETER
def test_a_cache_beyond_32_bits_is_addressed_right():
    """Slot 5 starts at element 5 * 2^29. Only the pages that are touched take memory."""
    try:
        cache = torch.empty(6, 1, 2**23, 64, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"6 GB cannot be allocated here: {error}")
    q = draw(6, 1, 64, dtype=torch.float16).half()
    k = torch.ones(6, 1, 64, dtype=torch.float16)
    positions = torch.zeros(6, dtype=torch.long)
    kernels.rope_and_cache_triton(q, k, k, cache, cache, torch.arange(6), positions)
    lengths = torch.tensor([1, 0, 0, 0, 0, 1])
    got = kernels.decode_attention_triton(q, cache, cache, lengths, AttentionSpec(0.1, window=16))
    message = "keys written beyond element 2^31 are not where they are read"
    assert torch.equal(got[:, 0, 0], lengths.half()), message


@on_every_device
@pytest.mark.parametrize("E", [1, 100, 1024])
@pytest.mark.parametrize("rms, offset", [(False, 0.0), (True, 0.0), (True, 1.0)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_norm_adds_and_norms(device, dtype, E, rms, offset, with_residual):
    x, residual = draw(2, 2, 3, E, dtype=dtype)
    weight, bias = draw(2, E, dtype=dtype, seed=1)
    if E > 1:
        x = (x + 100).to(dtype).double()  # a mean much larger than the deviation
    if not with_residual:
        residual = None
    total = x
    if with_residual:
        total = (x + residual).to(dtype).double()
    if rms:
        bias = None
        want = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (offset + weight)
    else:
        y = total - total.mean(-1, keepdim=True)
        want = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    if dtype == torch.float32:  # PyTorch's norms round the sum to the other dtypes in between
        args = [cast(a, "cpu", dtype) for a in (x, residual, weight, bias)]
        normed, got = kernels.add_norm(*args, 1e-5, rms, offset)
        assert_close(normed, want, dtype, "norm in PyTorch")
        assert_close(got, total, dtype, "sum in PyTorch")
    args = [cast(a, device, dtype) for a in (x, residual, weight, bias)]
    normed, got = kernels.add_norm_triton(*args, 1e-5, rms, offset)
    assert_close(got, total, dtype, "sum in Triton")
    assert_close(normed, want, dtype, f"norm in Triton, rms {rms}, offset {offset}")


@on_every_device
def test_a_norm_of_heads_that_are_slices_of_a_joint_projection(device, dtype):
    qkv = draw(4, 9, 16, dtype=dtype)
    weight = draw(16, dtype=dtype, seed=1)
    for heads in (slice(0, 6), slice(6, 8)):
        x = qkv[:, heads]
        want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        part = cast(qkv, device, dtype)[:, heads]
        normed, _ = kernels.add_norm_triton(part, None, weight.to(device, dtype), None, 1e-5, True)
        assert_close(normed, want, dtype, f"norm of heads {heads}")


# -----------------------------------------------------------------------------
# sampling


def new_rows(B, device="cpu", length=3):
    """Rows of this length in slots of twice as many, whose slots are not in order: slots, rows."""
    slots = torch.arange(B - 1, -1, -1, device=device)
    rows = kernels.Rows(
        tokens=torch.full((B, 2 * length), 7, device=device),
        logprobs=torch.full((B, 2 * length), 8.0, device=device),
        lengths=torch.full((B,), length, device=device),
        max_lengths=torch.full((B,), 2 * length, device=device),
        keys=torch.arange(B, device=device) * 2_000_003 + 2**31,
        done=torch.zeros(B, dtype=torch.bool, device=device),
    )
    return slots, rows


NO_EOS = torch.tensor([], dtype=torch.long)


@pytest.mark.parametrize(
    "name, device, n",
    [
        pytest.param("sample_next", "cpu", 2000, id="pytorch"),
        pytest.param("sample_next_triton", "cpu", 600, id="interpreter", marks=NO_INTERPRETER),
        pytest.param("sample_next_triton", "cuda", 20000, id="gpu", marks=NO_GPU),
    ],
)
def test_sampled_frequencies_are_the_probabilities(name, device, n):
    """Pearson's chi-square test of n samples, temperature 0.7, six tokens in three blocks."""
    logits = torch.full((9000,), float("-inf"))
    likely = [0, 1, 4095, 4096, 8999, 5000]
    logits[likely] = torch.tensor([0.0, 1.0, 0.5, 1.5, -0.5, 0.3])
    slots, rows = new_rows(n, device)
    sample = getattr(kernels, name)
    sample(logits.expand(n, -1).to(device), slots, rows, NO_EOS.to(device), 0.7)
    tokens = rows.tokens[:, 3]
    p = (logits.double() / 0.7).softmax(0)
    count = tokens.cpu().bincount(minlength=9000).double()
    assert count[p == 0].sum() == 0, f"{name} drew a token of probability 0"
    chi2 = ((count - n * p).square() / (n * p))[p > 0].sum()
    message = f"{name}: chi-square {chi2:.1f} with 5 degrees of freedom has p-value below 0.001"
    assert chi2 < 20.5, message


def test_uniform_numbers_depend_on_row_and_position_alone():
    keys = torch.arange(300).repeat_interleave(300)
    counters = torch.arange(300).repeat(300)
    u = kernels.uniform(keys, counters)
    order = torch.randperm(len(u), generator=torch.Generator().manual_seed(0))
    reordered = kernels.uniform(keys[order], counters[order])
    assert torch.equal(reordered, u[order]), "the order of rows changes the numbers"

    assert 0 < u.min() and u.max() < 1, "a number outside (0, 1)"
    deciles = u.histc(10, 0, 1) / len(u)
    assert (deciles - 0.1).abs().max() < 0.005, "not uniform in (0, 1)"

    grid = u.view(300, 300).double() - 0.5                              # (keys, counters)
    others = {
        "neighbouring rows": grid.roll(1, 0),
        "neighbouring positions": grid.roll(1, 1),
        "key and counter swapped": grid.T,
    }
    for name, other in others.items():
        correlation = (grid * other).mean().abs() * 12
        assert correlation < 0.02, f"numbers are correlated: {name}"


@on_every_device
@pytest.mark.parametrize(
    "V, temperature",
    [
        (1, 1.0),
        (7, 0.7),
        (5000, 1.3),
        (5000, 0.0),
        (4096, 1.0),
    ],
)
def test_the_kernel_draws_the_tokens_that_pytorch_draws(device, dtype, V, temperature):
    """With the same random numbers, of the same keys and lengths."""
    logits = (3 * draw(16, V, dtype=dtype)).to(dtype).double()
    logits[3] = 0.0  # ties: the first token
    logits[5, : V - 1] = float("-inf")  # one token left, behind blocks of nothing
    slots, want = new_rows(16)
    kernels.sample_next(logits, slots, want, NO_EOS, temperature)

    padded = torch.cat([logits, logits + 9], 1).to(device, dtype)
    strided = padded[:, :V]  # rows that are not next to each other in memory
    greedy = temperature == 0
    divisor = 1.0 if greedy else temperature
    slots, got = new_rows(16, device)
    kernels.sample_next_triton(strided, slots, got, NO_EOS.to(device), divisor, greedy)
    slots = slots.cpu()
    tokens = got.tokens.cpu()[slots, 3]
    want_tokens = want.tokens[slots, 3]
    log_p = (logits / divisor).log_softmax(-1)                          # (16, V)
    same = tokens == want_tokens
    if not greedy:  # rounding may decide differently where u meets the boundary of two tokens
        u = kernels.uniform(want.keys[slots], torch.full((16,), 3))
        cdf = log_p.exp().cumsum(-1)                                    # (16, V)
        first = torch.minimum(tokens, want_tokens)
        boundary = cdf.gather(1, first[:, None])[:, 0]
        same |= (boundary - u).abs() < 1e-5
    assert same.all(), f"tokens {tokens.tolist()} instead of {want_tokens.tolist()}"
    want_logprobs = log_p.gather(1, tokens[:, None])[:, 0]
    logprobs = got.logprobs.cpu()[slots, 3]
    assert_close(logprobs, want_logprobs, torch.float32, "log-probability of the sampled token")


@pytest.mark.parametrize(
    "name, device",
    [
        pytest.param("sample_next", "cpu", id="pytorch"),
        pytest.param("sample_next_triton", "cpu", id="interpreter", marks=NO_INTERPRETER),
        pytest.param("sample_next_triton", "cuda", id="gpu", marks=NO_GPU),
    ],
)
def test_a_sampled_token_is_appended_and_may_end_its_row(name, device):
    """Row by row: it goes on, ends with an EOS, ends at its greatest length, has ended before."""
    logits = torch.full((4, 5000), -50.0)
    certain = torch.tensor([11, 4999, 13, 14])
    logits[range(4), certain] = 50.0
    _, rows = new_rows(6, device)
    slots = torch.tensor([4, 1, 5, 0], device=device)  # of these rows; nobody has slots 2 and 3
    rows.max_lengths[5] = 4
    rows.done[0] = True
    eos = torch.tensor([2, 4999, 15, 77], device=device)  # 14 would not end a row
    before = [x.cpu().clone() for x in rows]
    getattr(kernels, name)(logits.to(device), slots, rows, eos, 1.0)
    tokens, logprobs, lengths, max_lengths, keys, done = before
    tokens[[4, 1, 5], 3] = certain[:3]
    logprobs[[4, 1, 5], 3] = 0.0
    lengths[[4, 1, 5]] = 4
    done[[1, 5]] = True
    for field, got, want in zip(rows._fields, rows, before):
        assert_close(got, want, torch.float32, field)


def test_launchers_refuse_indices_that_kernels_would_misread():
    slots, rows = new_rows(4)
    logits = torch.zeros(4, 9)
    with pytest.raises(AssertionError, match="slots must be contiguous int64, and is torch.int32"):
        kernels.sample_next_triton(logits, slots.int(), rows, NO_EOS, 1.0)
    every_other = torch.arange(8)[::2]
    q = torch.zeros(4, 1, 16)
    cache = torch.zeros(4, 1, 8, 16)
    with pytest.raises(AssertionError, match=r"lengths must be contiguous int64.* \(2,\)"):
        kernels.decode_attention_triton(q, cache, cache, every_other, AttentionSpec(0.1))
    with pytest.raises(AssertionError, match="positions must be contiguous int64"):
        kernels.rope_and_cache_triton(q, q, q, cache, cache, slots, every_other)
    with pytest.raises(AssertionError, match="targets must be contiguous int64"):
        kernels.logit_stats_triton(logits, every_other, 1.0)


@pytest.mark.parametrize(
    "top_k, top_p, kept",
    [
        (2, 1.0, [1, 3]),
        (0, 0.7, [1, 3]),
        (0, 0.71, [1, 3, 4]),
        (4, 0.5, [1, 3]),
        (0, 1e-9, [1]),
        (9, 1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_k_and_top_p_keep_the_likely_and_renormalise(top_k, top_p, kept):
    p = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    u = torch.linspace(0.001, 0.999, 99)
    tokens, logprobs = kernels.sample(p.log().expand(99, -1), u, 1.0, top_k, top_p)
    case = f"top_k {top_k}, top_p {top_p}"
    assert set(tokens.tolist()) == set(kept), f"{case} keeps {set(tokens.tolist())}"
    want = (p[tokens] / p[kept].sum()).log()
    assert_close(logprobs, want, torch.float32, case)


# -----------------------------------------------------------------------------
# log-probabilities without keeping the logits


def make_logprobs_case(N, E, V, dtype):
    """hidden, weight, targets, and gradients of log-probabilities and entropies."""
    hidden = draw(N, E, dtype=dtype)
    weight = draw(V, E, dtype=dtype, seed=1)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    return hidden, weight, targets, draw(N, seed=3), draw(N, seed=4)


def logprobs_of_autograd(hidden, weight, targets, g, g_entropy, temperature, softcap=0.0):
    """Log-probabilities, entropies, and the gradients of hidden and weight, in float64."""
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    log_p = (logits / temperature).log_softmax(-1)
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = (logprobs * g).sum() + (entropy * g_entropy).sum()
    return logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight))


def logprobs_of_kernels(hidden, weight, targets, g, g_entropy, *options):
    """The same of kernels.py. hidden and weight require gradients."""
    device = hidden.device
    logprobs, entropy = kernels.token_logprobs(hidden, weight, targets.to(device), *options)
    g = g.to(device)
    g_entropy = g_entropy.to(device)
    loss = (logprobs * g).sum() + (entropy * g_entropy).sum()
    return logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight))


def use_triton_on_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "logit_stats", kernels.logit_stats_triton)
    monkeypatch.setattr(kernels, "logit_grads", kernels.logit_grads_triton)


NAMES = ("logprobs", "entropy", "gradient of hidden", "gradient of weight")


@pytest.mark.parametrize(
    "half, device, dtype",
    [
        ("PyTorch", "cpu", torch.float32),
        pytest.param("Triton", "cpu", torch.float32, marks=NO_INTERPRETER, id="interpreter"),
        pytest.param("Triton", "cuda", torch.float32, marks=NO_GPU, id="gpu-fp32"),
        pytest.param("Triton", "cuda", torch.bfloat16, marks=NO_GPU, id="gpu-bf16"),
    ],
)
@pytest.mark.parametrize(
    "N, E, V, temperature, softcap",
    [
        (7, 5, 11, 1.0, 0.0),
        (5, 8, 5003, 0.7, 0.0),
        (0, 3, 4, 1.0, 0.0),
        (1, 3, 1, 1.0, 0.0),
        (7, 5, 11, 0.7, 2.0),  # Gemma 2
    ],
)
def test_token_logprobs_and_their_gradients_are_those_of_autograd(
    half, device, dtype, N, E, V, temperature, softcap, monkeypatch
):
    if half == "Triton":
        use_triton_on_cpu(monkeypatch)
    monkeypatch.setattr(kernels.TokenLogprobs, "CHUNK", {device: 3 * V})  # three rows at a time
    hidden, weight, *rest = make_logprobs_case(N, E, V, dtype)
    weight[V - V // 6 :] *= 1.3  # the largest logit comes late
    want = logprobs_of_autograd(hidden, weight, *rest, temperature, softcap)

    hidden = hidden.to(device, dtype).requires_grad_()
    weight = weight.to(device, dtype).requires_grad_()
    sizes = [z.numel() for _, z in kernels.TokenLogprobs.chunks(hidden, weight)]
    message = f"chunks of {sizes} logits, where {3 * V} are allowed"
    assert sum(sizes) == N * V and max(sizes, default=0) <= 3 * V, message
    got = logprobs_of_kernels(hidden, weight, *rest, temperature, softcap)
    times = 4 if dtype == torch.bfloat16 else 1  # logits may be rounded to it before the softmax
    for name, x, y in zip(NAMES, got, want):
        assert_close(x, y, dtype, f"{half}: {name}", times)


@pytest.mark.parametrize(
    "half", ["PyTorch", pytest.param("Triton", marks=NO_INTERPRETER, id="interpreter")]
)
def test_float32_logits_of_a_bfloat16_model(half, monkeypatch):
    """What kernels.logits returns on a GPU: log-probabilities lose nothing to bfloat16."""
    if half == "Triton":
        use_triton_on_cpu(monkeypatch)

    def float32_logits(hidden, weight, softcap):
        return hidden.float() @ weight.T.float()

    monkeypatch.setattr(kernels, "logits", float32_logits)
    monkeypatch.setattr(kernels.TokenLogprobs, "CHUNK", {"cpu": 900})  # three rows at a time
    hidden, weight, *rest = make_logprobs_case(7, 16, 300, torch.bfloat16)
    want = logprobs_of_autograd(hidden, weight, *rest, 0.7)
    hidden = hidden.bfloat16().requires_grad_()
    weight = weight.bfloat16().requires_grad_()
    got = logprobs_of_kernels(hidden, weight, *rest, 0.7)
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    for name, x, y, dtype in zip(NAMES, got, want, dtypes):
        assert x.dtype == dtype
        assert_close(x, y, dtype, f"{half}: {name}")


def test_the_gradient_of_a_bfloat16_weight_is_added_up_in_float32(monkeypatch):
    """A thousand equal rows, one at a time: a sum in bfloat16 would stay at 256 times the first."""
    monkeypatch.setattr(kernels.TokenLogprobs, "CHUNK", {"cpu": 8})
    row = draw(1, 4).bfloat16()
    weight = draw(8, 4, seed=1).bfloat16().requires_grad_()
    gradients = []
    for n in (1, 1000):
        targets = torch.zeros(n, dtype=torch.long)
        logprobs, _ = kernels.token_logprobs(row.repeat(n, 1), weight, targets)
        gradients += torch.autograd.grad(logprobs.sum(), weight)
    assert_close(gradients[1] / 1000, gradients[0], torch.bfloat16, "gradient of weight")


@pytest.mark.skipif(not kernels.FLOAT32_RESULTS, reason="this PyTorch has no such product")
def test_logits_of_a_bfloat16_model_are_float32_on_a_gpu():
    """With tensors that have a device and a dtype but no memory: no GPU is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for device, dtype, want in [
            ("cuda", torch.bfloat16, torch.float32),
            ("cuda", torch.float32, torch.float32),
            ("cpu", torch.bfloat16, torch.bfloat16),
        ]:
            hidden = torch.empty(4, 8, device=device, dtype=dtype)
            weight = torch.empty(5, 8, device=device, dtype=dtype)
            got = kernels.logits(hidden, weight)
            assert got.dtype == want and got.shape == (4, 5), f"{device}, {dtype}: {got}"


def test_token_logprobs_gives_a_frozen_head_no_gradient():
    hidden = draw(4, 3).float().requires_grad_()
    weight = draw(6, 3).float()
    logprobs, _ = kernels.token_logprobs(hidden, weight, torch.arange(4))
    logprobs.sum().backward()
    assert hidden.grad is not None, "the hidden states are not frozen"
    assert weight.grad is None, "the head is frozen"


# -----------------------------------------------------------------------------
# what only a GPU can show


@NO_GPU
def test_gpu_graph_of_a_decode_step_serves_all_lengths():
    B = 3
    H = 8
    C = 300
    D = 64
    V = 1000
    q = torch.randn(B, H, D).to("cuda", torch.bfloat16)
    k, v = torch.randn(2, B, H, C, D).to("cuda", torch.bfloat16)
    logits = torch.randn(B, V).to("cuda", torch.bfloat16)
    lengths = torch.ones(B, dtype=torch.long, device="cuda")
    _, sampled = new_rows(B, "cuda")
    _, filtered = new_rows(B, "cuda")
    eos = torch.tensor([5], device="cuda")

    def step():
        slots = torch.arange(B, device="cuda")
        kernels.rope_and_cache(q, q, q, k, v, slots, lengths - 1)
        for rows in (sampled, filtered):
            rows.lengths.fill_(3)
            rows.done.fill_(False)
        kernels.sample_next(logits, slots, sampled, eos, 0.9)
        kernels.sample_next(logits, slots, filtered, eos, 0.9, top_k=50, top_p=0.9)
        attention = kernels.decode_attention(q, k, v, lengths, AttentionSpec(0.1))
        return attention, sampled.tokens.clone(), filtered.tokens.clone()

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for n in (1, 64, 65, 300):
        lengths.fill_(n)
        for rows in (sampled, filtered):
            rows.keys.random_(2**32)
        graph.replay()
        for name, a, b in zip(("attention", "sampling", "top-k and top-p"), captured, step()):
            assert torch.equal(a, b), f"{name} at length {n}: a graph and a direct call differ"


@NO_GPU
@pytest.mark.parametrize("D", [8, 16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "K, window, slopes",
    [
        (16, 0, False),
        (4, 100, True),
        (2, 0, False),
    ],
)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gpu_attention_at_real_sizes(D, K, window, slopes, softcap):
    H = 16
    C = 600
    dtype = torch.bfloat16
    lengths = [1, 513, 128, 0, 300]
    spec = make_spec(H, D, window, slopes, softcap)
    gpu_spec = on_device(spec, "cuda")
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    q = draw(sum(lengths), H, D, dtype=dtype)
    k, v = draw(2, sum(lengths), K, D, dtype=dtype)
    want = kernels.prefill_attention(q, k, v, cu_seqlens, spec)
    q, k, v = (x.to("cuda", dtype) for x in (q, k, v))
    got = kernels.prefill_attention(q, k, v, cu_seqlens.cuda(), gpu_spec)
    assert_close(got, want, dtype, "prefill")
    for B in (1, 5, 20):
        q = draw(B, H, D, dtype=dtype)
        k, v = draw(2, B, K, C, D, dtype=dtype)
        lengths = (torch.arange(B) * 137 + 600) % 601
        want = kernels.decode_attention(q, k, v, lengths, spec)
        q, k, v = (x.to("cuda", dtype) for x in (q, k, v))
        got = kernels.decode_attention(q, k, v, lengths.cuda(), gpu_spec)
        assert_close(got, want, dtype, f"decode of {B} rows")


@NO_GPU
@pytest.mark.skipif(not kernels.FLOAT32_RESULTS, reason="this PyTorch has no such product")
def test_gpu_products_of_bfloat16_with_a_float32_result():
    hidden = draw(64, 32, dtype=torch.bfloat16)
    weight = draw(1000, 32, dtype=torch.bfloat16, seed=1)
    d_logits = draw(64, 1000, dtype=torch.bfloat16, seed=2)
    d_weight = draw(1000, 32, dtype=torch.float32, seed=3)
    want = d_weight + 2 * d_logits.T @ hidden

    on_gpu = [x.to("cuda", torch.bfloat16) for x in (hidden, weight, d_logits)]
    gpu_hidden, gpu_weight, gpu_d_logits = on_gpu
    got = kernels.logits(gpu_hidden, gpu_weight)
    assert got.dtype == torch.float32
    assert_close(got, hidden @ weight.T, torch.float32, "logits")
    got = d_weight.to("cuda", torch.float32)
    for _ in range(2):
        kernels.add_weight_grad(got, gpu_d_logits, gpu_hidden)
    assert_close(got, want, torch.float32, "gradient of the weight")


# -----------------------------------------------------------------------------
# what the compiler makes of the kernels, for GPUs that are not there
#
# Whether a kernel is interpreted or compiled is decided when Triton is imported, so the functions
# below run in a process of their own.

KERNELS = [name for name in vars(kernels) if name.endswith("_kernel")]
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    """What Triton compiles for a launch of a kernel."""

    kernel: object
    signature: dict  # name of the argument: its type
    constants: dict  # name of the argument: its value
    attrs: dict  # (index of the argument,): what is known of its value
    options: dict  # num_warps, num_stages

    def key(self):
        """Launches with equal keys share a compiled kernel."""
        return repr((self.kernel.__name__, *self[1:]))


def specialize(kernel, args, kwargs):
    """The rules by which Triton's launcher specialises a kernel: dtypes, constants, the number 1,
    divisibility by 16."""
    names = [param.name for param in kernel.params]
    values = dict(zip(names, args))
    options = {}
    for name, value in kwargs.items():
        if name in names:
            values[name] = value
        else:
            options[name] = value
    assert list(values) == names, f"{kernel.__name__} was launched with {list(values)}"

    signature = {}
    constants = {}
    attrs = {}
    for i, param in enumerate(kernel.params):
        name = param.name
        value = values[name]
        special = not param.do_not_specialize
        is_one = special and type(value) is int and value == 1
        if param.is_constexpr or value is None or is_one:
            signature[name] = "constexpr"
            constants[name] = value
        elif torch.is_tensor(value):
            signature[name] = POINTERS[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif type(value) is float:
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if special and value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constants, attrs, options)


class Recorder:
    """Takes the place of a kernel and records its launches."""

    def __init__(self, kernel, launches):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        self.launches.append(specialize(self.kernel, args, kwargs))


def record(run, hopper):
    """The launches of run(), a function without arguments, none of which really happens."""
    launches = []
    prefill_tile = kernels.prefill_tile
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
        patch.setattr(kernels, "prefill_tile", lambda D, size, _: prefill_tile(D, size, hopper))
        run()
    return launches


def empty(*shape, dtype=torch.int64):
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_attention(D, dtype, K, spec):
    q = empty(64, 32, D, dtype=dtype)
    k = empty(64, K, D, dtype=dtype)
    cache = empty(256, K, 4096, D, dtype=dtype)
    kernels.prefill_attention_triton(q, k, k, empty(9, dtype=torch.int32), spec)
    part = cache[:, :, :512]
    for B in (64, 1):  # one split, several
        kernels.decode_attention_triton(q[:B], part, part, empty(B), spec)


def launch_rope(D, dtype, K):
    q = empty(64, 32, D, dtype=dtype)
    k = empty(64, K, D, dtype=dtype)
    cache = empty(256, K, 4096, D, dtype=dtype)
    for R in (0, D // 4, D):
        angles = None
        if R > 0:
            angles = empty(4096, R // 2, dtype=torch.float32)
        kernels.rope_and_cache_triton(q, k, k, cache, cache, empty(64), empty(64), angles, angles)


def launch_norms(E, dtype):
    x = empty(64, E, dtype=dtype)
    for rms in (False, True):
        kernels.add_norm_triton(x, x, x[0], x[0], 1e-5, rms)
    kernels.add_norm_triton(x, x, x[0], None, 1e-5, True, 1.0)  # Gemma


def launch_vocabulary(V, dtype):
    logits = empty(64, V, dtype=dtype)
    targets = empty(64)
    x = empty(64, dtype=torch.float32)
    rows = kernels.Rows(
        tokens=empty(64, 512),
        logprobs=empty(64, 512, dtype=torch.float32),
        lengths=empty(64),
        max_lengths=empty(64),
        keys=empty(64),
        done=empty(64, dtype=torch.bool),
    )
    for greedy in (True, False):
        kernels.sample_next_triton(logits, empty(64), rows, empty(3), 0.7, greedy)
    kernels.logit_stats_triton(logits, targets, 1.0)
    kernels.logit_grads_triton(logits, targets, x, x, x, x, 1.0)


def compile_cases(full):
    """Yields a description, and a function that launches kernels. full: more dtypes."""
    bf16 = torch.bfloat16
    fp16 = torch.float16
    fp32 = torch.float32
    head_sizes = (8, 16, 32, 64, 80, 96, 128, 256)
    if full:
        sizes = [(D, dtype) for D in head_sizes for dtype in (bf16, fp16, fp32)]
    else:
        sizes = [(D, bf16) for D in head_sizes]
        sizes += [(D, dtype) for D in (64, 128) for dtype in (fp16, fp32)]
        sizes += [(8, fp32)]
    plain = AttentionSpec(0.1)
    biased = AttentionSpec(0.1, window=1024, slopes=empty(32, dtype=fp32))
    softcapped = AttentionSpec(0.1, window=1024, softcap=50.0)
    for D, dtype in sizes:
        name = f"{str(dtype)[6:]}, D {D}"
        specs = [(32, plain, "")]
        if full or dtype == bf16 and D in (64, 128, 256):
            specs.append((8, biased, ", window, slopes"))
        if dtype == bf16 and D >= 64:
            specs.append((16, softcapped, ", window, softcap"))
        for K, spec, text in specs:
            case = f"{name}, {K} key heads{text}"
            yield case, functools.partial(launch_attention, D, dtype, K, spec)
            if spec is not softcapped:
                yield case, functools.partial(launch_rope, D, dtype, K)
    for E in (768, 2048, 5120, 9216):
        for dtype in (bf16, fp16, fp32) if full else (bf16,):
            yield f"{str(dtype)[6:]}, E {E}", functools.partial(launch_norms, E, dtype)
    for V in (259, 50257, 151936):
        for dtype in (bf16, fp32):
            yield f"{str(dtype)[6:]}, V {V}", functools.partial(launch_vocabulary, V, dtype)


def compile_launch(launch, backend, arch, warp_size):
    """A dict: registers per thread, bytes of spilled registers and of shared memory, ..."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attrs)
    target = GPUTarget(backend, arch, warp_size)
    compiled = triton.compile(source, target=target, options=launch.options)
    memory = dict(shared=compiled.metadata.shared, warps=compiled.metadata.num_warps)
    if backend == "cuda":
        return memory | assemble_ptx(compiled.asm["ptx"], arch)
    return memory | read_amdgcn(compiled.asm["amdgcn"])


def assemble_ptx(ptx, arch):
    """What NVIDIA's assembler says about a kernel. It comes with Triton and needs no GPU."""
    import triton

    name = "ptxas-blackwell" if arch >= 100 else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    gpu_name = re.search(r"\.target (\w+)", ptx)[1]
    command = [ptxas, "-v", f"--gpu-name={gpu_name}", "kernel.ptx", "-o", "kernel"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx)
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    messages = done.stdout + done.stderr
    tensor_cores = [name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx]
    return dict(
        registers=int(re.search(r"Used (\d+) registers", messages)[1]),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill", messages)),
        tensor_cores=tensor_cores[0] if tensor_cores else "",
        serialised="C7515" in messages,  # its warning that wgmma instructions wait for each other
    )


def read_amdgcn(assembly):
    """The same of AMD's assembly, as far as it says."""
    counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", assembly))
    return dict(
        registers=int(counts["vgpr_count"]),
        spilled=4 * int(counts["vgpr_spill_count"]),
        tensor_cores="mfma" if "v_mfma" in assembly else "",
    )


def compile_kernels(full=False):
    """Compiles what the launchers would launch, for sm_80 and sm_90, and where full also for sm_100
    and gfx942. Returns a list of dicts."""
    targets = [("cuda", 80, 32), ("cuda", 90, 32)]
    if full:
        targets += [("cuda", 100, 32), ("hip", "gfx942", 64)]
    rows = []
    for backend, arch, warp_size in targets:
        hopper = backend == "cuda" and arch >= 90
        compiled = set()
        for case, run in compile_cases(full):
            for launch in record(run, hopper):
                if launch.key() in compiled:
                    continue
                compiled.add(launch.key())
                start = time.time()
                row = dict(kernel=launch.kernel.__name__, case=case, target=str(arch), edition=2)
                row |= compile_launch(launch, backend, arch, warp_size)
                row["seconds"] = round(time.time() - start, 2)
                rows.append(row)
    return rows


def count_variants():
    """{kernel: how many variants Triton would compile}, for batches of 1 to 64 of one model."""

    spec = AttentionSpec(0.1)
    q = empty(1024, 32, 64, dtype=torch.bfloat16)
    k = empty(1024, 8, 64, dtype=torch.bfloat16)
    cache = empty(64, 8, 4096, 64, dtype=torch.bfloat16)

    def run():
        for B in range(1, 65):
            cu_seqlens = empty(B + 1, dtype=torch.int32)
            kernels.prefill_attention_triton(q, k, k, cu_seqlens, spec)
            for C in (512, 4096):
                part = cache[:, :, :C]
                kernels.decode_attention_triton(q[:B], part, part, empty(B), spec)

    keys = {}
    for launch in record(run, hopper=True):
        keys.setdefault(launch.kernel.__name__, set()).add(launch.key())
    return {name: len(variants) for name, variants in keys.items()}


def in_another_process(call):
    """Calls a function of this file where kernels are not interpreted, and returns its result."""
    code = f"import json, {Path(__file__).stem} as test; print(json.dumps(test.{call}))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"{call} failed:\n{ran.stderr[-3000:]}"
    return json.loads(ran.stdout)


def test_every_kernel_compiles_and_spills_nothing():
    """COMPILE_TABLE=file writes the table to a file, COMPILE_FULL=1 makes it longer."""
    full = bool(os.environ.get("COMPILE_FULL"))
    rows = in_another_process(f"compile_kernels(full={full})")
    if os.environ.get("COMPILE_TABLE"):
        lines = ",\n".join(json.dumps({**row, "edition": 2}) for row in rows)
        Path(os.environ["COMPILE_TABLE"]).write_text(f"[\n{lines}\n]\n")
    nvidia = [row for row in rows if row["target"] in ("80", "90")]
    assert {row["kernel"] for row in nvidia} == set(KERNELS), "a kernel was not compiled"
    bad = [row for row in nvidia if row["spilled"] or row["shared"] > 99 * 1024]
    message = "spilled registers, or more shared memory than a GeForce has:\n"
    assert not bad, message + "\n".join(str(row) for row in bad)
    serialised = [row for row in nvidia if row["serialised"]]
    message = "tensor core instructions of sm_90 wait for each other (ptxas warning C7515):\n"
    assert not serialised, message + "\n".join(str(row) for row in serialised)


def test_batch_sizes_share_compiled_kernels():
    """Prefill: one for all. Decode: with and without splits; merge: 16, 32 or 64 splits."""
    variants = in_another_process("count_variants()")
    assert variants.pop("prefill_kernel") == 1
    assert variants.pop("decode_kernel") == 2
    assert variants.pop("merge_kernel") <= 3
    assert not variants, f"other kernels were launched: {variants}"
