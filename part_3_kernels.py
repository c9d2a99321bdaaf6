import re
from types import SimpleNamespace

from prelude import *
from prelude import long, some
from kernels import AttentionSpec

# -----------------------------------------------------------------------------
# 3. kernels: references and Triton kernels against naive versions in float64
#
# Without a GPU the kernels run in Triton's interpreter, in float32 and float16 (it computes wrong
# results in bfloat16, without an error), and are compiled for a GPU that is not there.

GPU_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
every_device = pytest.mark.parametrize("device, dtype", [
    pytest.param("cpu", torch.float32, id="interpreter-fp32", marks=INTERPRETED),
    pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=[INTERPRETED, long]),
    pytest.param("cuda", torch.float32, id="gpu-fp32", marks=GPU_ONLY),
    pytest.param("cuda", torch.bfloat16, id="gpu-bf16", marks=GPU_ONLY),
])
TOLERANCE = {
    torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(*shape, dtype=torch.float64, seed=0):
    """Normal random numbers that the dtype represents exactly, in float64 for the reference."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).double()


def cast(x, device, dtype):
    """Floating point tensors to the dtype, all tensors to the device. None stays None."""
    if x is None:
        return None
    return x.to(device, dtype if x.is_floating_point() else x.dtype)


def assert_close(got, want, dtype, what=""):
    """The error, in units of 1 + the size of the number, is below the tolerance of the dtype."""
    got = got.detach().double().cpu()
    want = want.detach().double()
    assert got.shape == want.shape and not got.isnan().any(), f"{what}: NaN, or {got.shape}"
    worst = ((got - want).abs() / (1 + want.abs())).max() if want.numel() else 0
    assert worst < TOLERANCE[dtype], f"{what}: error {worst:.2e} in {dtype}"


@pytest.mark.parametrize("shape, out", [((5, 8), 24), ((3, 7, 24), 8), ((1, 8), 8), ((2, 3, 8), 1)])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_and_its_gradients_are_those_of_autograd(shape, out, frozen):
    results = []
    for dtype in (torch.float64, torch.float32):  # of which oneDNN takes the second
        x, weight, bias = (draw(*size, seed=i).to(dtype).requires_grad_(i == 0 or not frozen)
                           for i, size in enumerate([shape, (out, shape[-1]), (out,)]))
        module = torch.nn.Sequential(torch.nn.Linear(shape[-1], out, bias=not frozen))
        module = kernels.use_onednn_linears(module)[0]
        module._parameters.update(weight=weight, bias=None if frozen else bias)
        y = module(x)
        if dtype == torch.float32 and kernels.ONEDNN and not torch.cuda.is_available():
            assert (type(y.grad_fn).__name__ == "OneDNNLinearBackward") == (shape[0] > 1)
        y.sum().backward(retain_graph=True)  # a gradient with strides of 0
        (y * torch.arange(1, out + 1, dtype=dtype)).sum().backward()
        results.append([y, x.grad] + ([] if frozen else [weight.grad, bias.grad]))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.float32)


@pytest.mark.parametrize("device, dtype", [
    ("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=GPU_ONLY, id="gpu-bf16")])
@pytest.mark.parametrize("rows, bias", [(1, True), (20, True), (20, False)])
def test_a_product_with_an_activation(device, dtype, rows, bias):
    x, weight = draw(rows, 16, dtype=dtype), draw(32, 16, dtype=dtype, seed=1)
    b = draw(32, dtype=dtype, seed=2) if bias else None
    z = x @ weight.T + (b if bias else 0)
    tanh = z * (1 + ((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)).tanh()) / 2
    want = dict(relu=z.clamp(min=0), silu=z / (1 + (-z).exp()), swish=z / (1 + (-z).exp()),
                gelu=z * (1 + (z / 2**0.5).erf()) / 2)
    for name in kernels.ACTIVATIONS:
        args = [cast(a, device, dtype) for a in (x, weight, b)]
        assert_close(kernels.linear_activation(*args, name), want.get(name, tanh), dtype, name)


# ---- attention ----


def make_spec(H, D, window, alibi):
    slopes = 2.0 ** -(1 + torch.arange(H, dtype=torch.float64) * 8 / H)
    return AttentionSpec(D**-0.5, window, slopes if alibi else None)


def on_device(spec, device):
    return spec._replace(slopes=cast(spec.slopes, device, torch.float32))


def naive_attention(q, k, v, spec):
    """One sequence in float64, query by query and head by head. q (n, H, D): the last n positions;
    k, v (T, K, D)."""
    n, H, _ = q.shape
    T, K = k.shape[:2]
    out = torch.zeros_like(q)
    for pos, h in itertools.product(range(T - n, T), range(H)):
        first = max(0, pos + 1 - spec.window) if spec.window else 0
        keys, values = (x[first : pos + 1, h // (H // K)] for x in (k, v))
        scores = keys @ q[pos - T + n, h] * spec.scale                  # (visible keys,)
        if spec.slopes is not None:
            scores = scores - spec.slopes[h] * (pos - torch.arange(first, pos + 1))
        out[pos - T + n, h] = scores.softmax(0) @ values
    return out


@every_device
@pytest.mark.parametrize("lengths, H, K, D, window, alibi", [
    ([3, 0, 1, 133, 0], 2, 2, 64, 0, False),  # empty, one token, longer than a block
    ([1, 1, 1], 4, 1, 80, 0, True),
    ([31, 32, 33], 4, 1, 96, 0, False),
    ([70, 5], 4, 1, 128, 7, True),  # a window smaller than a block of keys
    ([0, 150], 1, 1, 64, 64, False),  # a window of exactly one block
    ([35], 1, 1, 256, 0, True),
    ([33, 2], 2, 2, 8, 9, True),  # below the 16 that tl.dot needs
])
def test_packed_prefill_is_attention_of_each_sequence_alone(device, dtype, lengths, H, K, D, window,
                                                            alibi):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    # Slices of one tensor, as a joint projection makes them: their rows are not contiguous.
    qkv = draw(sum(lengths), H + 2 * K, D, dtype=dtype)
    q, k, v = qkv.split([H, K, K], 1)
    spec = make_spec(H, D, window, alibi)
    sequences = zip(q.split(lengths), k.split(lengths), v.split(lengths))
    want = torch.cat([naive_attention(*sequence, spec) for sequence in sequences])
    got = kernels.prefill_attention(q, k, v, cu_seqlens, spec)
    assert_close(got, want, torch.float64, "PyTorch")
    q, k, v = qkv.to(device, dtype).split([H, K, K], 1)
    got = kernels.prefill_attention_triton(q, k, v, cu_seqlens.to(device), on_device(spec, device))
    assert_close(got, want, dtype, "Triton")


@every_device
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_sequence_never_reads_its_neighbours(device, dtype):
    q, k, v = (draw(90, 1, 64, dtype=dtype, seed=i).to(device, dtype) for i in range(3))
    cu_seqlens = torch.tensor([0, 30, 60, 90], dtype=torch.int32, device=device)
    clean = kernels.prefill_attention_triton(q, k, v, cu_seqlens, AttentionSpec(0.1))[30:60]
    for x in (q, k, v):
        x[:30] = float("nan")
        x[60:] = float("inf")
    got = kernels.prefill_attention_triton(q, k, v, cu_seqlens, AttentionSpec(0.1))[30:60]
    assert torch.equal(clean, got), "tokens of another sequence changed this one's attention"


def test_alibi_tells_far_positions_apart_in_bfloat16_too():
    bias = kernels.alibi(torch.tensor([1.0, 0.25]), torch.arange(400), torch.bfloat16)
    assert bias[0].tolist() == list(range(400)), "bfloat16 itself cannot count beyond 256"


@every_device
@pytest.mark.parametrize("lengths, C, H, K, D, window, alibi", [
    ([3, 0, 70, 33], 70, 2, 2, 64, 0, False),
    ([0, 0], 40, 1, 1, 64, 0, False),  # empty rows only
    ([1], 300, 8, 1, 128, 0, True),  # a capacity of many splits, and keys for one
    ([200, 7], 200, 4, 1, 80, 50, True),
    ([100, 31], 128, 8, 2, 96, 3, False),
    ([65], 65, 1, 1, 256, 0, True),
    ([9, 17], 20, 34, 2, 8, 0, False),  # 17 query heads per key head
])
def test_decode_is_the_last_row_of_full_attention(device, dtype, lengths, C, H, K, D, window,
                                                  alibi):
    B = len(lengths)
    q = draw(B, H, D, dtype=dtype)
    k, v = draw(2, B + 1, K, C, D, dtype=dtype, seed=1)                 # one slot more than rows
    spec = make_spec(H, D, window, alibi)
    want = torch.zeros(B, H, D, dtype=torch.float64)
    for b, n in enumerate(lengths):
        if n > 0:
            keys, values = (x[b, :, :n].transpose(0, 1) for x in (k, v))  # (n, K, D)
            want[b] = naive_attention(q[b : b + 1], keys, values, spec)[0]
    got = kernels.decode_attention(q, k, v, torch.tensor(lengths), spec)
    assert_close(got, want, torch.float64, "PyTorch")
    for slot, n in enumerate([*lengths, 0]):  # nothing beyond the length of a row may be read
        k[slot, :, n:] = v[slot, :, n:] = float("nan")
    q, k, v, lengths = (cast(x, device, dtype) for x in (q, k, v, torch.tensor(lengths)))
    got = kernels.decode_attention_triton(q, k, v, lengths, on_device(spec, device))
    assert_close(got, want, dtype, "Triton")


@every_device
def test_decode_in_one_split_and_in_many_agree(device, dtype, monkeypatch):
    q = cast(draw(2, 2, 64, dtype=dtype), device, dtype)
    k, v = cast(draw(2, 2, 2, 300, 64, dtype=dtype), device, dtype)
    args = (q, k, v, torch.tensor([277, 9], device=device), AttentionSpec(0.1))
    assert [kernels.decode_splits(B, 2, 300, 0, 64) for B in (2, 256)] == [5, 1]
    split = kernels.decode_attention_triton(*args)
    monkeypatch.setattr(kernels, "decode_splits", lambda *_: 1)
    assert_close(split, kernels.decode_attention_triton(*args).cpu(), dtype, "five splits")


# ---- rotary embedding, the KV cache, norms ----


@every_device
@pytest.mark.parametrize("H, K, D, R", [(4, 4, 64, 0), (3, 1, 64, 64), (8, 2, 80, 20)])
def test_rope_rotates_and_the_cache_holds_rotated_keys(device, dtype, H, K, D, R):
    C = 9
    qkv = draw(5, H + 2 * K, D, dtype=dtype)
    q, k, v = qkv.split([H, K, K], 1)
    slots, positions = torch.tensor([[0, 0, 2, 3, 1], [0, 1, 8, 3, 2]])
    angles = torch.arange(C)[:, None] * 0.7 ** torch.arange(R // 2, dtype=torch.float64)
    tables = [angles.cos(), angles.sin()] if R else [None, None]        # (C, R / 2) each
    want = [q.clone(), k.clone()]
    for x in want:  # Su et al.: pairs of features are complex numbers, and turn
        pairs = torch.complex(x[..., : R // 2], x[..., R // 2 : R])
        turned = pairs * torch.polar(torch.ones(()).double(), angles[positions])[:, None]
        x[..., :R] = torch.cat([turned.real, turned.imag], -1)
    for where, rope, real in [("cpu", kernels.rope_and_cache, torch.float64),
                              (device, kernels.rope_and_cache_triton, dtype)]:
        q, k, v = qkv.to(where, real).split([H, K, K], 1)
        caches = torch.zeros(2, 4, K, C, D, dtype=real, device=where)
        if real != torch.float64:
            tables = [cast(x, where, torch.float32) for x in tables]
        got = rope(q, k, v, *caches, slots.to(where), positions.to(where), *tables)
        for x, y in zip(got, want):
            assert_close(x, y, real, f"{R} of {D} features rotated")
        for cache, x in zip(caches.cpu(), (want[1], v.cpu())):
            assert_close(cache[slots, :, positions], x, real, "cache")
            assert cache.count_nonzero() == x.count_nonzero(), "nothing else is written"


@long
@INTERPRETED
def test_a_cache_beyond_32_bits_is_addressed_right():
    """Slot 5 starts at element 5 * 2^29. Only the pages that are touched take memory."""
    cache = torch.empty(6, 1, 2**23, 64, dtype=torch.float16)
    q = draw(6, 1, 64).half()
    k = torch.ones(6, 1, 64, dtype=torch.float16)
    kernels.rope_and_cache_triton(q, k, k, cache, cache, torch.arange(6), torch.zeros(6).long())
    lengths = torch.tensor([1, 0, 0, 0, 0, 1])
    got = kernels.decode_attention_triton(q, cache, cache, lengths, AttentionSpec(0.1, window=16))
    assert torch.equal(got[:, 0, 0], lengths.half()), "keys are not read where they were written"


@every_device
@pytest.mark.parametrize("E, rms, with_residual", [
    (1, False, True), (100, False, False), (999, False, True), (100, True, True), (64, True, False),
])
def test_add_norm_adds_and_norms(device, dtype, E, rms, with_residual):
    x, residual = draw(2, 2, 3, E, dtype=dtype)
    weight, bias = draw(2, E, dtype=dtype, seed=1)
    if E > 64:
        x = (x + 100).to(dtype).double()  # a mean much larger than the deviation
    total = (x + residual).to(dtype).double() if with_residual else x
    residual = residual if with_residual else None
    y = total if rms else total - total.mean(-1, keepdim=True)
    want = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + (0 if rms else bias)
    for where, add_norm in (("cpu", kernels.add_norm), (device, kernels.add_norm_triton)):
        args = [cast(a, where, dtype) for a in (x, residual, weight, None if rms else bias)]
        normed, got = add_norm(*args, 1e-5, rms)
        assert_close(got, total, dtype, f"sum, {add_norm.__name__}")
        if dtype == torch.float32 or add_norm is kernels.add_norm_triton:  # PyTorch rounds the sum
            assert_close(normed, want, dtype, f"norm, {add_norm.__name__}")
    heads = cast(torch.cat([x, x], 1), device, dtype)[:, 3:]  # slices of a joint projection
    normed, _ = kernels.add_norm_triton(heads, None, *args[2:], 1e-5, rms)
    if not with_residual:
        assert_close(normed, want, dtype, "norm of heads")


# ---- sampling ----

NO_EOS = torch.tensor([], dtype=torch.long)
samplers = pytest.mark.parametrize("device", [
    pytest.param("cpu", id="pytorch"), pytest.param("cuda", id="gpu", marks=GPU_ONLY)])


def new_rows(B, device="cpu"):
    """Rows of 3 tokens in slots of 6, whose slots are not in order: slots, rows."""
    rows = kernels.Rows(
        tokens=torch.full((B, 6), 7, device=device),
        logprobs=torch.full((B, 6), 8.0, device=device),
        lengths=torch.full((B,), 3, device=device),
        max_lengths=torch.full((B,), 6, device=device),
        keys=torch.arange(B, device=device) * 2_000_003 + 2**31,
        done=torch.zeros(B, dtype=torch.bool, device=device),
    )
    return torch.arange(B - 1, -1, -1, device=device), rows


@samplers
def test_sampled_frequencies_are_the_probabilities(device):
    """Pearson's chi-square test of samples at temperature 0.7, six tokens in two blocks."""
    n = 2000
    logits = torch.full((5000,), float("-inf"))
    logits[[0, 1, 4095, 4096, 4999, 4500]] = torch.tensor([0.0, 1.0, 0.5, 1.5, -0.5, 0.3])
    slots, rows = new_rows(n, device)
    kernels.sample_next(logits.expand(n, -1).to(device), slots, rows, NO_EOS.to(device), 0.7)
    p = (logits.double() / 0.7).softmax(0)
    count = rows.tokens[:, 3].cpu().bincount(minlength=5000).double()
    assert count[p == 0].sum() == 0, "a token of probability 0"
    chi2 = ((count - n * p).square() / (n * p))[p > 0].sum()
    assert chi2 < 20.5, f"chi-square {chi2:.1f} with 5 degrees of freedom: p-value below 0.001"


def test_uniform_numbers_depend_on_row_and_position_alone():
    keys = torch.arange(300).repeat_interleave(300)
    counters = torch.arange(300).repeat(300)
    u = kernels.uniform(keys, counters)
    order = torch.randperm(len(u), generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernels.uniform(keys[order], counters[order]), u[order])
    deciles = u.histc(10, 0, 1) / len(u)
    assert 0 < u.min() and u.max() < 1 and (deciles - 0.1).abs().max() < 0.005
    grid = u.view(300, 300).double() - 0.5                              # (keys, counters)
    for other in (grid.roll(1, 0), grid.roll(1, 1), grid.T):
        correlation = (grid * other).mean().abs() * 12
        assert correlation < 0.02, "neighbours, or key and counter swapped, are correlated"


@samplers
def test_a_sampled_token_is_appended_and_may_end_its_row(device):
    """Row by row: it goes on, ends with an EOS, ends at its greatest length, has ended before."""
    logits = torch.full((4, 5000), -50.0)
    certain = torch.tensor([11, 4999, 13, 14])
    logits[range(4), certain] = 50.0
    _, rows = new_rows(6, device)
    slots = torch.tensor([4, 1, 5, 0], device=device)  # of these rows; nobody has slots 2 and 3
    rows.max_lengths[5] = 4
    rows.done[0] = True
    eos = torch.tensor([2, 4999, 15, 77], device=device)  # 14 would not end a row
    want = rows._replace(**{field: x.cpu().clone() for field, x in rows._asdict().items()})
    kernels.sample_next(logits.to(device), slots, rows, eos, 1.0)
    want.tokens[[4, 1, 5], 3] = certain[:3]
    want.logprobs[[4, 1, 5], 3] = 0.0
    want.lengths[[4, 1, 5]] = 4
    want.done[[1, 5]] = True
    for field, x, y in zip(rows._fields, rows, want):
        assert_close(x, y, torch.float32, field)


@pytest.mark.parametrize("top_k, top_p, kept", [
    (2, 1.0, [1, 3]), (0, 0.7, [1, 3]), (0, 0.71, [1, 3, 4]), (4, 0.5, [1, 3]), (0, 1e-9, [1]),
    (9, 1.0, [0, 1, 2, 3, 4]),
])
def test_top_k_and_top_p_keep_the_likely_and_renormalise(top_k, top_p, kept):
    p = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    u = torch.linspace(0.001, 0.999, 99)
    tokens, logprobs = kernels.sample(p.log().expand(99, -1), u, 1.0, top_k, top_p)
    assert set(tokens.tolist()) == set(kept)
    assert_close(logprobs, (p[tokens] / p[kept].sum()).log(), torch.float32)


# ---- log-probabilities without keeping the logits ----


def float32_logits(hidden, weight):
    """What kernels.logits returns on a GPU for a bfloat16 model."""
    return hidden.float() @ weight.T.float()


@pytest.mark.parametrize("device, dtype", [
    ("cpu", torch.float32), ("cpu", torch.bfloat16),
    pytest.param("cuda", torch.bfloat16, marks=GPU_ONLY, id="gpu")])
@pytest.mark.parametrize("N, E, V, temperature", [
    (7, 5, 11, 1.0), (5, 8, 5003, 0.7), (0, 3, 4, 1.0), (1, 3, 1, 1.0)])
def test_token_logprobs_and_their_gradients_are_those_of_autograd(N, E, V, temperature, device,
                                                                  dtype, monkeypatch):
    if dtype == torch.bfloat16 and device == "cpu":
        monkeypatch.setattr(kernels, "logits", float32_logits)
    monkeypatch.setattr(kernels.TokenLogprobs, "CHUNK", {device: 3 * V})  # three rows at a time
    inputs = [draw(N, E, dtype=dtype), draw(V, E, dtype=dtype, seed=1)]
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    g, g_entropy = draw(N, seed=3), draw(N, seed=4)

    def gradients(hidden, weight, logprobs, entropy):
        loss = (logprobs * g.to(logprobs)).sum() + (entropy * g_entropy.to(logprobs)).sum()
        return [logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight))]

    hidden, weight = (x.clone().requires_grad_() for x in inputs)
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)           # (N, V)
    entropy = -(log_p.exp() * log_p).sum(-1)
    want = gradients(hidden, weight, log_p.gather(1, targets[:, None])[:, 0], entropy)
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in inputs)
    sizes = [z.numel() for _, z in kernels.TokenLogprobs.chunks(hidden, weight)]
    assert sum(sizes) == N * V and max(sizes, default=0) <= 3 * V, f"chunks of {sizes} logits"
    logprobs, entropy = kernels.token_logprobs(hidden, weight, targets.to(device), temperature)
    got = gradients(hidden, weight, logprobs, entropy)
    for x, y, real in zip(got, want, (torch.float32, torch.float32, dtype, dtype)):
        assert x.dtype == real
        assert_close(x, y, real)


def test_a_frozen_head_has_no_gradient_and_that_of_bfloat16_is_added_up_in_float32(monkeypatch):
    """A thousand equal rows, one at a time: a sum in bfloat16 would stay at 256 times the first."""
    monkeypatch.setattr(kernels.TokenLogprobs, "CHUNK", {"cpu": 8})
    row = draw(1, 4).bfloat16().requires_grad_()
    weight = draw(8, 4, seed=1).bfloat16().requires_grad_()
    gradients = []
    for n in (1, 1000):
        targets = torch.zeros(n, dtype=torch.long)
        logprobs, _ = kernels.token_logprobs(row.repeat(n, 1), weight, targets)
        gradients += torch.autograd.grad(logprobs.sum(), weight)
    assert_close(gradients[1] / 1000, gradients[0], torch.bfloat16)
    logprobs, _ = kernels.token_logprobs(row, weight.detach(), targets[:1])
    logprobs.sum().backward()
    assert row.grad is not None and weight.grad is None


def test_logits_of_a_bfloat16_model_are_float32_on_a_gpu():
    """With tensors that have a device and a dtype but no memory: no GPU is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for device, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
            x = torch.empty(4, 8, device=device, dtype=torch.bfloat16)
            assert kernels.logits(x, x).dtype == dtype


# ---- what the compiler makes of the kernels, for a GPU that is not there ----


def empty(*shape, dtype=torch.int64):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_kernels(D, K, E, V, dtype, is_llama):
    """Calls every launcher, with tensors that have no memory, for batches of 1 to 64 rows. D head
    size, K key heads of 32 heads, E width, V vocabulary."""
    spec = AttentionSpec(0.1)
    if not is_llama:
        spec = AttentionSpec(0.1, window=1024, slopes=empty(32, dtype=torch.float32))
    q, k = empty(64, 32, D, dtype=dtype), empty(64, K, D, dtype=dtype)
    cache = empty(256, K, 4096, D, dtype=dtype)
    for B in range(1, 65):
        kernels.prefill_attention_triton(q, k, k, empty(B + 1, dtype=torch.int32), spec)
        kernels.decode_attention_triton(q[:B], cache, cache, empty(B), spec)
    cos = empty(4096, D // 2, dtype=torch.float32) if is_llama else None
    kernels.rope_and_cache_triton(q, k, k, cache, cache, empty(64), empty(64), cos, cos)
    x = empty(64, E, dtype=dtype)
    kernels.add_norm_triton(x, x, x[0], None if is_llama else x[0], 1e-5, is_llama)


def compile_kernels(variants):
    """In a process that does not interpret kernels: compiles what launch_kernels launches for an
    H100, and prints a row of what NVIDIA's assembler says about each compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = {}

    class Compile(SimpleNamespace):
        """Takes the place of a kernel, and compiles it where it would be launched."""

        def __getitem__(self, grid):
            def launch(*args, **options):
                result = self.kernel.run(*args, grid=grid, warmup=True, **options)
                compiled[self.kernel.__name__, result.hash] = result
            return launch

    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_current_stream=lambda device: 0))
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        setattr(kernels, name, Compile(kernel=getattr(kernels, name)))
    for *sizes, dtype, is_llama in variants:
        launch_kernels(*sizes, getattr(torch, dtype), is_llama)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    for (name, _), result in compiled.items():
        command = [ptxas, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", "-"]
        said = subprocess.run(command, input=result.asm["ptx"], capture_output=True, text=True)
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said.stderr)))
        print(json.dumps(dict(kernel=name, spilled=spilled, shared=result.metadata.shared,
                              serialised="C7515" in said.stderr)))


@pytest.mark.parametrize("variants", [
    [(128, 8, 2048, 50257, "bfloat16", True)],
    pytest.param([(D, K, E, 151936, dtype, is_llama)
                  for D, E in ((8, 768), (64, 2048), (80, 2560), (128, 5120), (256, 9216))
                  for K, is_llama in ((8, True), (32, False))
                  for dtype in ("bfloat16", "float16", "float32")], marks=long, id="all"),
])
def test_each_kernel_compiles_for_an_h100_and_spills_nothing(variants):
    code = f"import {__name__} as test; test.compile_kernels({variants})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "0"})
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    bad = [row for row in rows if row["spilled"] or row["serialised"] or row["shared"] > 99 * 1024]
    assert not bad, f"spilled registers, wgmma one after the other, or too much memory: {bad}"
    names = [row["kernel"] for row in rows]
    assert set(names) == {name for name in vars(kernels) if name.endswith("_kernel")}
    if len(variants) == 1:
        assert names.count("prefill_kernel") == 1, "one for all batches"
        assert names.count("decode_kernel") == 2, "in one split, in several"
        assert names.count("merge_kernel") <= 3, "of 16, 32 and 64 splits"
