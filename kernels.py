"""The inner loops, each beside the few lines of PyTorch that it means.

On a CPU a public function is those lines. On a GPU it launches the Triton kernel below them, whose test they are.
Inside a kernel scores, sums and norms are float32, whatever comes in and goes out.

Dimension key:  N packed tokens, B rows, H query heads, K key/value heads (K divides H: grouped-query attention),
                G = H / K, D head size, R rotated features, C slots' capacity in tokens, S splits of a row's keys,
                V vocabulary, E width of the model. In kernels BX is X up to the next power of two, masked where it
                is more, and BM queries meet BN keys at a time.
"""
import types

import torch
import torch.nn.functional as F

try:
    import triton.language as tl
    from triton import cdiv, jit, next_power_of_2
except ImportError:  # no triton for this platform (macOS): what runs on a CPU needs none
    jit, tl = (lambda kernel: kernel), types.SimpleNamespace(constexpr=None)

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LOG2E = 1.4426950408889634  # attention kernels raise 2 to their scores, not e: that is what the hardware has

# -----------------------------------------------------------------------------
# matrix products


def linear(x, weight, bias=None):
    """x @ weight.T + bias. x (..., in), weight (out, in), bias (out,).

    On a CPU from oneDNN, which PyTorch carries beside MKL: on an AMD processor, where MKL leaves the wide vectors unused, it was 1.3 to
    2.3 times as fast as F.linear for 7 to 4,096 rows, and slower for 1 and 2 (256 x 1024 and 256 x 8192, float32).
    """
    if not ONEDNN or x.is_cuda or x.dtype not in (torch.float32, torch.bfloat16) or x.numel() == x.size(-1):
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x, weight, bias) if torch.is_grad_enabled() else onednn(x, weight, bias)


def onednn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """x @ weight.T + bias, and its gradients, all three as oneDNN's products."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x, weight), (needs_x, needs_weight, needs_bias), g = ctx.saved_tensors, ctx.needs_input_grad, g.contiguous()
        d_x = onednn(g, weight.T) if needs_x else None
        d_bias = g.flatten(0, -2).sum(0) if needs_bias else None
        return d_x, outer(g.flatten(0, -2), x.flatten(0, -2)) if needs_weight else None, d_bias


def outer(g, x):
    """g.T @ x, the gradient of a weight. g (N, out), x (N, in). oneDNN is fastest with the longer side where it expects a weight's."""
    return onednn(g.T, x.T) if x.size(1) >= g.size(1) else onednn(x.T, g.T).T


class Linear(torch.nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def quick_linears(model):
    """Every nn.Linear of a model becomes a kernels.Linear where that makes a difference: there is no GPU. Returns the model."""
    for m in model.modules():
        if type(m) is torch.nn.Linear and not torch.cuda.is_available():
            m.__class__ = Linear
    return model


# -----------------------------------------------------------------------------
# attention


def prefill_attention(q, k, v, cu_seqlens, scale, window=0, slopes=None):
    """Causal attention inside each of several sequences that lie end to end, without padding.

    q (N, H, D), k and v (N, K, D); sequence i is rows cu_seqlens[i]:cu_seqlens[i + 1], cu_seqlens (B + 1,) int32.
    window > 0: a query sees the last `window` keys, itself included. slopes (H,): ALiBi, adds slope * key position
    (a constant per query away from slope * distance, which a softmax does not see). Returns (N, H, D).
    """
    if q.is_cuda:
        return prefill_attention_triton(q, k, v, cu_seqlens, scale, window, slopes)
    N, H, D = q.shape
    out = torch.empty_like(q)                                                           # (N, H, D)
    lengths = cu_seqlens.diff().tolist()
    row, start = 0, 0
    while row < len(lengths):  # sequences of one length that follow each other share a call
        n = lengths[row]
        many = next((i for i in range(row, len(lengths)) if lengths[i] != n), len(lengths)) - row
        if n:
            part = slice(start, start + many * n)
            a, b, c = (x[part].view(many, n, -1, D).transpose(1, 2) for x in (q, k, v))  # (many, H or K, n, D)
            bias = None
            if slopes is not None or 0 < window < n:
                at = torch.arange(n, device=q.device)
                dead = (at > at[:, None]) | ((at <= at[:, None] - window) if window else False)  # (n, n)
                bias = torch.zeros(1, n, n, dtype=q.dtype, device=q.device)
                if slopes is not None:  # not in bfloat16, which cannot count beyond 256
                    bias = slopes.to(torch.promote_types(q.dtype, torch.float32)).view(H, 1, 1) * at
                bias = bias.masked_fill(dead, float("-inf"))                              # (1 or H, n, n)
            o = F.scaled_dot_product_attention(a, b, c, attn_mask=bias, is_causal=bias is None, scale=scale,
                                               enable_gqa=k.size(1) != H)
            out[part] = o.transpose(1, 2).reshape(many * n, H, D)
        row, start = row + many, start + many * n
    return out


@jit
def softmax_step(scores, v, m, l, acc):
    """Takes one more block of keys into M running softmaxes: scores (M, BN) as powers of 2, v (BN, BD). Their state:
    the largest score m (M,), the sum l (M,) of 2^(score - m), and the values under the same weights, acc (M, BD)."""
    m_new = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp2(scores - m_new[:, None])                                                  # (M, BN)
    shrink = tl.exp2(m - m_new)                                                           # (M,)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return m_new, l * shrink + tl.sum(p, 1), acc


@jit
def prefill_kernel(
    q_ptr, k_ptr, v_ptr,            # (N, H, D), (N, K, D), (N, K, D)
    cu_ptr, slopes_ptr, out_ptr,    # (B + 1,), (H,) or None, (N, H, D)
    B, scale, qn, qh, kn, kh, vn, vh,  # strides of tokens and heads
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    BB: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,  # BN divides BM
):
    # Sequence i owns the programs from cu[i] // BM + i to where the next one's begin: never too few, at most one too
    # many, and no host has to know a length. The last queries see the most keys, so they start first.
    h, pid = tl.program_id(1), tl.num_programs(0) - 1 - tl.program_id(0)
    i = tl.arange(0, BB)
    first = tl.load(cu_ptr + i, mask=i < B, other=2**31 - 1) // BM + i                    # (BB,)
    row = tl.sum((first <= pid).to(tl.int32), 0) - 1
    start = tl.load(cu_ptr + row)
    length = tl.load(cu_ptr + row + 1) - start
    m0 = (pid - start // BM - row) * BM
    if m0 >= length:
        return

    at, n, d = m0 + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    lo = tl.maximum(m0 + 1 - WINDOW, 0) if WINDOW else 0
    full = lo if WINDOW else m0  # before this key, every query of the block sees every key: no mask
    start = start.to(tl.int64)   # token * heads * D outgrows 32 bits
    rows = (start + at)[:, None]
    inside = (at < length)[:, None] & (d < D)
    q = tl.load(q_ptr + rows * qn + h * qh + d, mask=inside, other=0.0)                   # (BM, BD)
    k_ptr += (start + lo) * kn + h // G * kh
    v_ptr += (start + lo) * vn + h // G * vh
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + h).to(tl.float32) * 1.4426950408889634
    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for masked in tl.static_range(2):
        for j0 in tl.range(full if masked else lo, tl.minimum(m0 + BM, length) if masked else full, BN):
            j = j0 + n
            there = (d < D)[None, :]
            if masked:  # do not even read a neighbour's keys: 0 * inf is not 0
                there = there & (j < length)[:, None]
            k = tl.load(k_ptr + n[:, None] * kn + d, mask=there, other=0.0)               # (BN, BD)
            v = tl.load(v_ptr + n[:, None] * vn + d, mask=there, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale                    # (BM, BN)
            if slopes_ptr is not None:
                s += slope * j
            if masked:  # not -inf: a window may hide all of a block from a query that sees later ones
                s = tl.where(j <= at[:, None], s, -1e30)
                if WINDOW:
                    s = tl.where(j > at[:, None] - WINDOW, s, -1e30)
            m, l, acc = softmax_step(s, v, m, l, acc)
            k_ptr += BN * kn
            v_ptr += BN * vn
    tl.store(out_ptr + (rows * H + h) * D + d, acc / l[:, None], mask=inside)


def prefill_tile(D, bytes, hopper):
    """BM, BN and stages for 8 warps: no register spills, and it fits the 99 KB of shared memory that a GeForce has."""
    if bytes == 4:  # without tensor cores
        return (32, 32, 1) if D <= 64 else (16, 16, 1)
    return (128, 64, 3) if D <= 64 else (128, 64 if hopper else 32, 2) if D <= 128 else (64, 32, 2)


def prefill_attention_triton(q, k, v, cu_seqlens, scale, window=0, slopes=None):
    """Bytes: q and out once, k and v once for each block of BM queries that sees them (mostly from L2)."""
    (N, H, D), B = q.shape, len(cu_seqlens) - 1
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, "prefill_attention: a head's features must be contiguous"
    out = q.new_empty(N, H, D)
    hopper = q.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(q.device)[0] >= 9
    BM, BN, stages = prefill_tile(D, q.element_size(), hopper)
    prefill_kernel[N // BM + B, H](
        q, k, v, cu_seqlens, slopes, out, B, scale * LOG2E, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        H, H // k.size(1), D, window, next_power_of_2(B), next_power_of_2(D), BM, BN,
        num_warps=8, num_stages=stages)
    return out


def decode_attention(q, k_cache, v_cache, lengths, scale, window=0, slopes=None):
    """One query a row over that row's cache: row b sees the first lengths[b] entries of slot b.

    q (B, H, D); k_cache, v_cache (slots, K, C, D), the first B slots are read; lengths (B,). A row of length 0
    gives zeros. Returns (B, H, D). The bytes that must move: 2 * lengths.sum() * K * D * element size.
    """
    if q.is_cuda:
        return decode_attention_triton(q, k_cache, v_cache, lengths, scale, window, slopes)
    B, H, D = q.shape
    K = k_cache.size(1)
    T = max(int(lengths.max()), 1)
    k, v = k_cache[:B, :, :T], v_cache[:B, :, :T]                                         # (B, K, T, D)
    at = torch.arange(T, device=q.device)
    dead = at >= lengths[:, None]                                                         # (B, T)
    if window:
        dead |= at < lengths[:, None] - window
    bias = torch.zeros(B, 1, 1, T, dtype=q.dtype, device=q.device)
    if slopes is not None:
        slopes = slopes.to(torch.promote_types(q.dtype, torch.float32))
        bias = slopes.view(1, K, H // K, 1) * at                                          # (B, K, H/K, T)
    bias = bias.masked_fill(dead[:, None, None], float("-inf"))
    # The H/K query heads that share a key head stand where several query positions would: no key is copied.
    o = F.scaled_dot_product_attention(q.view(B, K, H // K, D), k, v, attn_mask=bias, scale=scale)
    return o.reshape(B, H, D).masked_fill((lengths == 0)[:, None, None], 0)


@jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr,      # (B, H, D), (slots, K, C, D), (slots, K, C, D)
    lengths_ptr, slopes_ptr,  # (B,), (H,) or None
    out_ptr, lse_ptr,         # (B, H, S, D), (B, H, S): parts and log2 of their weights; or the output, None
    scale, qb, qh, slot, head, token,  # strides
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):
    split, splits = tl.program_id(0), tl.num_programs(0)
    key_head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    seen = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    share = tl.cdiv(tl.cdiv(length - seen, splits), BN) * BN  # of this row's keys, in whole blocks
    lo = seen + split * share
    hi = tl.minimum(lo + share, length)

    g, n, d = tl.arange(0, BG), tl.arange(0, BN), tl.arange(0, BD)
    h = key_head * G + g                                                                  # (BG,)
    inside = (g < G)[:, None] & (d < D)
    q = tl.load(q_ptr + b * qb + h[:, None] * qh + d, mask=inside, other=0.0)             # (BG, BD)
    first = b * slot + key_head.to(tl.int64) * head + lo.to(tl.int64) * token  # a cache outgrows 32 bits, a block not
    k_ptr += first
    v_ptr += first
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + h, mask=g < G, other=0.0).to(tl.float32) * 1.4426950408889634
    m = tl.full([BG], -1e30, tl.float32)
    l = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)
    for j0 in tl.range(lo, hi, BN):  # no round where this split has no keys
        j = j0 + n
        there = (j < hi)[:, None] & (d < D)
        k = tl.load(k_ptr + n[:, None] * token + d, mask=there, other=0.0)                # (BN, BD)
        v = tl.load(v_ptr + n[:, None] * token + d, mask=there, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale                        # (BG, BN)
        if slopes_ptr is not None:
            s += slope[:, None] * j
        m, l, acc = softmax_step(tl.where(j < hi, s, -1e30), v, m, l, acc)
        k_ptr += BN * token
        v_ptr += BN * token
    l = tl.maximum(l, 1.0)  # the largest score alone makes it 1, unless there was none
    part = (b * H + h) * splits + split                                                   # (BG,)
    if lse_ptr is not None:
        tl.store(lse_ptr + part, m + tl.log2(l), mask=g < G)
    if lse_ptr is None or hi > lo:
        tl.store(out_ptr + part[:, None] * D + d, acc / l[:, None], mask=inside)


@jit
def merge_kernel(parts_ptr, lse_ptr, out_ptr, S, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr):
    """parts (B, H, S, D), lse (B, H, S), which is -1e30 where a split had no keys and no part; out (B, H, D)."""
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BS), tl.arange(0, BD)
    lse = tl.load(lse_ptr + row * S + s, mask=s < S, other=-1e30)                         # (BS,)
    weight = tl.exp2(lse - tl.max(lse, 0))
    there = (lse > -1e30)[:, None] & (d < D)
    parts = tl.load(parts_ptr + (row * S + s)[:, None] * D + d, mask=there, other=0.0)    # (BS, BD)
    out = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + row * D + d, out, mask=d < D)


def decode_attention_triton(q, k_cache, v_cache, lengths, scale, window=0, slopes=None):
    """Bytes: the keys and values that rows see, once. One program reads a key head for all its G queries, which are
    the rows of a matrix product, 16 at least; rows that stay empty cost nothing, since everyone waits for memory.
    The launch depends on shapes alone, never on lengths: a CUDA graph can hold it."""
    (B, H, D), (K, C) = q.shape, k_cache.shape[1:3]
    assert q.stride(2) == k_cache.stride(3) == 1, "decode_attention: a head's features must be contiguous"
    assert k_cache.stride() == v_cache.stride(), "decode_attention: one cache is laid out unlike the other"
    BG, BD = max(16, next_power_of_2(H // K)), next_power_of_2(D)
    BN = max(16, min(64, 8192 // BD // q.element_size()))
    # Programs that share a row's keys: enough for two on each of 132 multiprocessors (each has 32 KB on the way, and
    # that fills the bus of an H100), and for none to read more than 1024 keys while the others are done.
    span = min(C, window or C)
    S = min(max(cdiv(256, B * K), cdiv(span, 1024)), cdiv(span, BN), 64)
    out, parts, lse = q.new_empty(B, H, D), None, None
    if S > 1:
        parts, lse = q.new_empty(B, H, S, D, dtype=torch.float32), q.new_empty(B, H, S, dtype=torch.float32)
    decode_kernel[S, K, B](
        q, k_cache, v_cache, lengths, slopes, out if S == 1 else parts, lse, scale * LOG2E, *q.stride()[:2],
        *k_cache.stride()[:3], H, H // K, D, window, BG, BD, BN, num_warps=4 if D <= 128 else 8, num_stages=3)
    if S > 1:
        merge_kernel[(B * H,)](parts, lse, out, S, D, next_power_of_2(S), BD)
    return out


def rotate(x, cos, sin):
    """Rotary embedding (Su et al. 2021), first half against second half of the first R of D features.
    x (N, H, D); cos and sin (N, R / 2)."""
    R = 2 * cos.size(-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)                         # (N, 1, R/2)
    a, b = x[..., : R // 2], x[..., R // 2 : R]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., R:]], dim=-1)


def rope_and_cache(q, k, v, k_cache, v_cache, slots, positions, cos=None, sin=None):
    """Turns q and k by their positions, and writes k and v into the cache.

    q (N, H, D), k and v (N, K, D); k_cache, v_cache (slots, K, C, D); token i goes to slot slots[i], place
    positions[i] (neither is checked on a GPU). cos, sin (C or more, R / 2), or None where the model has other
    positions. Returns the turned q and k.
    """
    if q.is_cuda:
        return rope_and_cache_triton(q, k, v, k_cache, v_cache, slots, positions, cos, sin)
    if cos is not None:
        q, k = rotate(q, cos[positions], sin[positions]), rotate(k, cos[positions], sin[positions])
    k_cache[slots, :, positions] = k
    v_cache[slots, :, positions] = v
    return q, k


@jit
def load_turned(x_ptr, cos_ptr, sin_ptr, position, stride, heads, D: tl.constexpr, R: tl.constexpr,
                BH: tl.constexpr, BD: tl.constexpr):
    """One token's heads (BH, BD), turned: a feature meets the one R / 2 away; beyond R, itself at an angle of 0."""
    h, d = tl.arange(0, BH)[:, None], tl.arange(0, BD)
    inside = (h < heads) & (d < D)
    x = tl.load(x_ptr + h * stride + d, mask=inside, other=0.0)
    if R > 0:
        partner = tl.where(d < R // 2, d + R // 2, tl.where(d < R, d - R // 2, d))
        y = tl.load(x_ptr + h * stride + partner, mask=inside, other=0.0).to(tl.float32)
        angle = position * (R // 2) + d % (R // 2)
        cos = tl.load(cos_ptr + angle, mask=d < R, other=1.0).to(tl.float32)              # (BD,)
        sin = tl.load(sin_ptr + angle, mask=d < R, other=0.0).to(tl.float32)
        x = x.to(tl.float32) * cos + y * tl.where(d < R // 2, -sin, sin)
    return x, inside


@jit
def rope_cache_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr,   # (N, H, D), (N, K, D), (N, K, D), (N, H, D), (N, K, D)
    k_cache_ptr, v_cache_ptr,                    # (slots, K, C, D), (slots, K, C, D)
    slots_ptr, positions_ptr, cos_ptr, sin_ptr,  # (N,), (N,), (C or more, R / 2), (C or more, R / 2)
    qn, qh, kn, kh, vn, vh, slot, head, token,   # strides
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + i).to(tl.int64)
    h, d = tl.arange(0, BK)[:, None], tl.arange(0, BD)
    place = tl.load(slots_ptr + i).to(tl.int64) * slot + h.to(tl.int64) * head + position * token + d  # (BK, BD)
    k, inside = load_turned(k_ptr + i * kn, cos_ptr, sin_ptr, position, kh, K, D, R, BK, BD)
    v = tl.load(v_ptr + i * vn + h * vh + d, mask=inside, other=0.0)
    tl.store(k_cache_ptr + place, k, mask=inside)
    tl.store(v_cache_ptr + place, v, mask=inside)
    if R > 0:
        tl.store(k_out_ptr + (i * K + h) * D + d, k, mask=inside)
        q, inside = load_turned(q_ptr + i * qn, cos_ptr, sin_ptr, position, qh, H, D, R, BH, BD)
        tl.store(q_out_ptr + (i * H + tl.arange(0, BH)[:, None]) * D + d, q, mask=inside)


def rope_and_cache_triton(q, k, v, k_cache, v_cache, slots, positions, cos=None, sin=None):
    """Bytes: q, k and v read once, q and v written once and k twice. One program a token."""
    (N, H, D), K = q.shape, k.size(1)
    assert all(x.stride(-1) == 1 for x in (q, k, v, k_cache)), "rope_and_cache: a head's features must be contiguous"
    assert k_cache.stride() == v_cache.stride(), "rope_and_cache: one cache is laid out unlike the other"
    assert cos is None or cos.is_contiguous() and sin.is_contiguous(), "rope_and_cache: cos and sin must be contiguous"
    q_out, k_out = (q, k) if cos is None else (q.new_empty(N, H, D), k.new_empty(N, K, D))
    rope_cache_kernel[(N,)](
        q, k, v, q_out, k_out, k_cache, v_cache, slots, positions, cos, sin,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
        H, K, D, 0 if cos is None else 2 * cos.size(1), next_power_of_2(H), next_power_of_2(K), next_power_of_2(D),
        num_warps=4 if H * D <= 2048 else 8)
    return q_out, k_out


# -----------------------------------------------------------------------------
# norms


def add_norm(x, residual, weight, bias, eps, rms):
    """residual + x, and its norm: what stands between two halves of a layer. x, residual (..., E), or no residual.
    rms: Zhang and Sennrich 2019, no mean and no bias; otherwise layer norm. Returns (normed, sum), both (..., E)."""
    if x.is_cuda:
        return add_norm_triton(x, residual, weight, bias, eps, rms)
    total = x if residual is None else residual + x
    if not rms:
        return F.layer_norm(total, (total.size(-1),), weight, bias, eps), total
    y = total.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(total.dtype), total


@jit
def add_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # (N, E), (N, E) or None, (E,), (E,) or None
    normed_ptr, total_ptr,                      # (N, E), (N, E)
    eps, E: tl.constexpr, RMS: tl.constexpr, BE: tl.constexpr,
):
    e = tl.arange(0, BE)
    inside, at = e < E, tl.program_id(0).to(tl.int64) * E + e
    x = tl.load(x_ptr + at, mask=inside, other=0.0)                                       # (BE,)
    if residual_ptr is not None:
        x = (x.to(tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + at, x, mask=inside)
    y = x.to(tl.float32)
    if not RMS:
        y = tl.where(inside, y - tl.sum(y, 0) / E, 0.0)
    y *= tl.rsqrt(tl.sum(y * y, 0) / E + eps)
    if RMS:
        y = y.to(x.dtype).to(tl.float32)  # rounded here too in the models that were trained with it
    y *= tl.load(weight_ptr + e, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + e, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, y, mask=inside)


def add_norm_triton(x, residual, weight, bias, eps, rms):
    """Bytes: x and residual read once, sum and norm written once: 4 * N * E * element size. One program a row."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    E, BE = x.size(-1), next_power_of_2(x.size(-1))
    normed, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    add_norm_kernel[(x.numel() // E,)](x, residual, weight, None if rms else bias, normed, total, eps, E, rms, BE,
                                       num_warps=min(max(BE // 512, 1), 16))
    return normed, total


# -----------------------------------------------------------------------------
# sampling


def mix(x):
    """A 32-bit hash of the low 32 bits of each element (the 'lowbias32' constants of C. Wellons); int64 in and out."""
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def uniform(keys, counters):
    """A uniform number in (0, 1) for each (key, counter): no state, so the randomness belongs to the row and its
    position, and not to the order in which rows are computed. keys, counters (B,) int64; returns (B,) float32."""
    return ((mix(mix(keys) + counters * 0x9E3779B9) >> 8).float() + 0.5) / 2**24


def keep_likely(logits, top_k, top_p):
    """logits (B, V), -inf outside the top_k largest and outside the fewest whose mass reaches top_p. PyTorch on every
    device: no shape here depends on data and nothing waits for the GPU, so that a CUDA graph can hold it."""
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        order = logits.argsort(dim=-1, descending=True)
        p = logits.softmax(-1).gather(1, order)
        drop = p.cumsum(-1) - p >= top_p  # (B, V) in that order; never the first
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return logits


def sample(logits, u, temperature, top_k=0, top_p=1.0):
    """One token a row, and its log-probability under the distribution that it was drawn from.

    logits (B, V); u (B,) in (0, 1); temperature 0 takes the largest logit (its log-probability is then the one at
    temperature 1). Returns tokens (B,) long, logprobs (B,) float32.
    """
    if top_k > 0 or top_p < 1:
        logits = keep_likely(logits.float() / (temperature or 1), top_k, top_p)
        temperature = 1 if temperature > 0 else 0
    if logits.is_cuda:
        return sample_triton(logits, u, temperature)
    logprobs = (logits.float() / (temperature or 1)).log_softmax(-1)                      # (B, V)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:  # inverse of the cumulative distribution: the first token at which it reaches u
        cdf = logprobs.exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


@jit
def first_to_reach(mass, target, SIZE: tl.constexpr):
    """The first element at which the running sum of mass (SIZE,) reaches target, and the sum before it. It always has
    mass of its own; where rounding keeps the sum under the target, it is the last that has."""
    i = tl.arange(0, SIZE)
    reached = (tl.cumsum(mass, 0) >= target) & (mass > 0)
    at = tl.minimum(tl.min(tl.where(reached, i, SIZE), 0), tl.max(tl.where(mass > 0, i, 0), 0))
    return at, tl.sum(tl.where(i < at, mass, 0.0), 0)


@jit
def sample_kernel(
    logits_ptr, u_ptr, tokens_ptr, logprobs_ptr,  # (B, V), (B,), (B,), (B,)
    V, stride, temperature, GREEDY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    i, block = tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    top = tl.full([BLOCKS], -1e30, tl.float32)  # the largest logit of each block,
    mass = tl.zeros([BLOCKS], tl.float32)       # and its sum of exp(logit - top)
    for b in tl.range(0, tl.cdiv(V, BLOCK), num_stages=3):
        z = tl.load(logits_ptr + b * BLOCK + i, mask=b * BLOCK + i < V, other=float("-inf"))
        z = z.to(tl.float32) / temperature
        z_top = tl.maximum(tl.max(z, 0), -1e30)  # a whole block may be -inf
        top = tl.where(block == b, z_top, top)
        mass = tl.where(block == b, tl.sum(tl.exp(z - z_top), 0), mass)
    m = tl.max(top, 0)
    mass *= tl.exp(top - m)                                                               # (BLOCKS,)
    total = tl.sum(mass, 0)
    # The same search twice: for a block, then inside it. Greedy looks for the first among the largest.
    target = 1.0 if GREEDY else tl.load(u_ptr + row) * total
    b, before = first_to_reach(tl.where(top == m, 1.0, 0.0) if GREEDY else mass, target, BLOCKS)
    z = tl.load(logits_ptr + b * BLOCK + i, mask=b * BLOCK + i < V, other=float("-inf")).to(tl.float32) / temperature
    j, _ = first_to_reach(tl.where(z == tl.max(z, 0), 1.0, 0.0) if GREEDY else tl.exp(z - m), target - before, BLOCK)
    tl.store(tokens_ptr + row, b * BLOCK + j)
    tl.store(logprobs_ptr + row, tl.sum(tl.where(i == j, z, 0.0), 0) - m - tl.log(total))


def sample_triton(logits, u, temperature):
    """Bytes: the logits once, and one block of each row again. One program a row."""
    B, V = logits.shape
    assert logits.stride(1) == 1, "sample: a row of logits must be contiguous"
    tokens, logprobs = u.new_empty(B, dtype=torch.int64), u.new_empty(B, dtype=torch.float32)
    BLOCK = min(4096, next_power_of_2(V))
    sample_kernel[(B,)](logits, u, tokens, logprobs, V, logits.stride(0), float(temperature or 1), temperature == 0,
                        BLOCK, next_power_of_2(cdiv(V, BLOCK)), num_warps=8)
    return tokens, logprobs


# -----------------------------------------------------------------------------
# log-probabilities without the logits


def logit_stats(logits, targets, temperature):
    """Log-probability of the targets (n,) under softmax(logits / temperature), the log-sum-exp, and the entropy, (n,)
    float32 each. logits (n, V) may be overwritten."""
    if logits.is_cuda:
        return logit_stats_triton(logits, targets, temperature)
    z = logits.float().div_(temperature)                                                  # (n, V)
    lse = z.logsumexp(-1)
    z -= lse[:, None]
    return z.gather(1, targets[:, None])[:, 0], lse, -z.exp().mul_(z).sum(-1)


def logit_grads(logits, targets, lse, entropy, g, g_entropy, temperature):
    """Gradient of the logits (n, V), in their dtype and perhaps in their place, from those of the log-probabilities
    and the entropies, g and g_entropy (n,): d logprob = onehot - p;  d entropy = -p (log p + entropy)."""
    if logits.is_cuda:
        return logit_grads_triton(logits, targets, lse, entropy, g, g_entropy, temperature)
    z = logits.float().div_(temperature).sub_(lse[:, None])                               # (n, V) log p
    dz = (z + entropy[:, None]).mul_(g_entropy[:, None]).add_(g[:, None]).mul_(z.exp_()).neg_()
    return dz.scatter_add_(1, targets[:, None], g[:, None]).div_(temperature).to(logits.dtype)


@jit
def logit_stats_kernel(
    logits_ptr, targets_ptr, logprobs_ptr, lse_ptr, entropy_ptr,  # (n, V), (n,), (n,), (n,), (n,)
    V, temperature, BLOCK: tl.constexpr,
):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    logits_ptr += row.to(tl.int64) * V
    m, l, s = -1e30, 0.0, 0.0  # largest z, sum of exp(z - m), sum of exp(z - m) * (z - m)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        z = tl.load(logits_ptr + start + i, mask=start + i < V, other=-1e30).to(tl.float32) / temperature
        m_new = tl.maximum(m, tl.max(z, 0))
        z -= m_new
        p, shrink = tl.exp(z), tl.exp(m - m_new)
        s = (s + (m - m_new) * l) * shrink + tl.sum(p * z, 0)
        l = l * shrink + tl.sum(p, 0)
        m = m_new
    target = tl.load(logits_ptr + tl.load(targets_ptr + row)).to(tl.float32) / temperature
    tl.store(logprobs_ptr + row, target - m - tl.log(l))
    tl.store(lse_ptr + row, m + tl.log(l))
    tl.store(entropy_ptr + row, tl.log(l) - s / l)


@jit
def logit_grads_kernel(
    logits_ptr, targets_ptr, lse_ptr, entropy_ptr, g_ptr, g_entropy_ptr,  # (n, V), then (n,) each
    V, temperature, BLOCK: tl.constexpr,
):
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row.to(tl.int64) * V + i
    g, g_entropy = tl.load(g_ptr + row), tl.load(g_entropy_ptr + row)
    z = tl.load(at, mask=i < V, other=0.0).to(tl.float32) / temperature - tl.load(lse_ptr + row)
    dz = -tl.exp(z) * (g + g_entropy * (z + tl.load(entropy_ptr + row)))
    dz += tl.where(i == tl.load(targets_ptr + row), g, 0.0)
    tl.store(at, dz / temperature, mask=i < V)


def logit_stats_triton(logits, targets, temperature):
    """Bytes: the logits once. One program a row."""
    n, V = logits.shape
    logprobs, lse, entropy = (logits.new_empty(n, dtype=torch.float32) for _ in range(3))
    logit_stats_kernel[(n,)](logits, targets, logprobs, lse, entropy, V, float(temperature),
                             min(4096, next_power_of_2(V)), num_warps=8)
    return logprobs, lse, entropy


def logit_grads_triton(logits, targets, lse, entropy, g, g_entropy, temperature):
    """Bytes: the logits read once, and overwritten once."""
    (n, V), BLOCK = logits.shape, min(4096, next_power_of_2(logits.size(1)))
    logit_grads_kernel[n, cdiv(V, BLOCK)](logits, targets, lse, entropy, g.contiguous(), g_entropy.contiguous(),
                                          V, float(temperature), BLOCK, num_warps=8)
    return logits


class TokenLogprobs(torch.autograd.Function):
    """Log-probability of each target, and entropy, from hidden states: a chunk of rows at a time, so that no more than
    CHUNK logits exist at once, forward or backward (which computes them again)."""
    CHUNK = {"cpu": 2**22, "cuda": 2**26}  # 16 MB of float32, near a CPU's cache; 128 MB of bfloat16: enough for a fast product

    @staticmethod
    def chunks(hidden, weight):
        """Yields slices of rows and their logits (n, V), all of about one size: no last one is small and slow."""
        most = max(1, TokenLogprobs.CHUNK[hidden.device.type] // len(weight))
        count = -(-len(hidden) // most)
        for i in range(count):
            part = slice(len(hidden) * i // count, len(hidden) * (i + 1) // count)
            yield part, linear(hidden[part], weight)

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logprobs, lse, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))    # (N,)
        for part, logits in TokenLogprobs.chunks(hidden, weight):
            logprobs[part], lse[part], entropy[part] = logit_stats(logits, targets[part], temperature)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx, g, g_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part, z in TokenLogprobs.chunks(hidden, weight):
            dz = logit_grads(z, targets[part], lse[part], entropy[part], g[part], g_entropy[part], ctx.temperature)
            d_hidden[part] = linear(dz, weight.T)                                         # (n, E)
            if d_weight is not None and dz.dtype == torch.float32:
                d_weight.addmm_(dz.T, hidden[part])                                       # (V, E)
            elif d_weight is not None:
                d_weight += dz.T @ hidden[part]
        return d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype), None, None


def token_logprobs(hidden, weight, targets, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of that distribution, in float32.
    hidden (N, E), weight (V, E), targets (N,) long. Returns logprobs (N,), entropy (N,); both carry gradient."""
    return TokenLogprobs.apply(hidden, weight, targets, temperature)
