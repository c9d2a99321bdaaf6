"""Inner loops of generation and training: each Triton kernel after its PyTorch reference.

On a CPU a public function runs the reference. On a GPU it launches the kernel that follows it, and
test_kernels.py compares the two. Inside a kernel scores, sums and norms are float32, whatever the
dtype of its tensors.

Dimension key:
    B  rows (sequences)                 N  tokens of all sequences, packed end to end
    H  query heads                      K  key and value heads; K divides H (grouped queries)
    G  H / K                            D  head size
    R  features that are rotated        C  capacity of a cache slot, in tokens
    S  splits of one row's keys         V  vocabulary size
    E  hidden size                      n  rows of a chunk
In a kernel BX is X rounded up to a power of two, and a mask hides what is beyond X. Attention takes
BM queries and BN keys at a time.
"""
import itertools
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton.language as tl
    from triton import cdiv, jit, next_power_of_2
except ImportError:  # no Triton for this platform (macOS): the references need none
    tl = types.SimpleNamespace(constexpr=float)

    def jit(kernel=None, **options):
        """Takes the place of triton.jit where the kernels are defined and never launched."""
        if kernel is None:  # as in @jit(do_not_specialize=...)
            return jit
        return kernel


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_DTYPES = [torch.float32]
if ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # not without AVX-512, for example
    ONEDNN_DTYPES.append(torch.bfloat16)

# Products of bfloat16 matrices with a float32 result: PyTorch 2.8 or later, on NVIDIA GPUs only.
FLOAT32_RESULTS = hasattr(torch.ops.aten.addmm, "dtype_out") and not torch.version.hip

# e^x = 2^(x * LOG2E). Attention kernels use powers of 2, for which GPUs have an instruction.
LOG2E = tl.constexpr(1.4426950408889634)

def require_indices(**tensors):
    """Kernels read slots, positions and lengths as int64 that lie one after the other, whatever a
    tensor says of itself."""
    for name, x in tensors.items():
        is_index = x.dtype == torch.int64 and x.is_contiguous()
        assert is_index, f"{name} must be contiguous int64, and is {x.dtype}, strides {x.stride()}"


# -----------------------------------------------------------------------------
# matrix products


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


class Activation(NamedTuple):
    function: object
    onednn: str = ""  # its name where oneDNN applies it to the result of a product
    algorithm: str = ""  # of that
    cublas: str = ""  # the same of cuBLAS: relu, or gelu, which is the one with tanh


ACTIVATIONS = {
    "relu": Activation(torch.relu_, "relu", cublas="relu"),
    "silu": Activation(F.silu, "swish"),
    "gelu": Activation(F.gelu, "gelu", "none"),
    "gelu_tanh": Activation(gelu_tanh, "gelu", "tanh", cublas="gelu"),
}


def linear_activation(x, weight, bias, activation):
    """activation(x @ weight.T + bias), where possible in one call. x (N, in), weight (out, in),
    bias (out,) or None; activation: a name in ACTIVATIONS. Without gradient."""
    a = ACTIVATIONS[activation]
    if x.is_cuda and a.cublas and bias is not None:
        return torch._addmm_activation(bias, x, weight.T, use_gelu=a.cublas == "gelu")
    if uses_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, a.onednn, [], a.algorithm)
    return a.function(F.linear(x, weight, bias))


def uses_onednn(x):
    """Whether oneDNN computes a product of x."""
    single_row = x.numel() == x.size(-1)
    return ONEDNN and not x.is_cuda and x.dtype in ONEDNN_DTYPES and not single_row


def linear(x, weight, bias=None):
    """x @ weight.T + bias. x (..., in), weight (out, in), bias (out,) or None.

    On a CPU this calls oneDNN, which PyTorch ships beside MKL. On an AMD processor, where MKL does
    not use the wide vector units, oneDNN was 1.3 to 2.3 times as fast as F.linear for 7 to 4,096
    rows, and slower for 1 and 2 rows (256 x 1024 and 256 x 8192, float32).
    """
    if not uses_onednn(x):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return OneDNNLinear.apply(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """x @ weight.T + bias; the product and both gradients are computed by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_output = grad_output.contiguous()
        rows = grad_output.flatten(0, -2)                               # (N, out)
        d_x = d_weight = d_bias = None
        if needs_x:
            d_x = onednn_linear(grad_output, weight.T)
        if needs_bias:
            d_bias = rows.sum(0)
        if needs_weight:
            d_weight = onednn_weight_grad(rows, x.flatten(0, -2))
        return d_x, d_weight, d_bias


def onednn_weight_grad(grad_output, x):
    """grad_output.T @ x, the gradient of a weight. grad_output (N, out), x (N, in).

    oneDNN is fastest when the longer side is where it expects the outputs of a layer.
    """
    if x.size(1) >= grad_output.size(1):
        return onednn_linear(grad_output.T, x.T)
    return onednn_linear(x.T, grad_output.T).T


def add_product(y, x, weight, scale):
    """y + scale * x @ weight.T, in one call. y (..., out), x (..., in), weight (out, in)."""
    rows = y.flatten(0, -2)
    return torch.addmm(rows, x.flatten(0, -2), weight.T, alpha=scale).view_as(y)


class Linear(torch.nn.Linear):
    """nn.Linear with the product above."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def use_onednn_linears(model):
    """Turns every nn.Linear of a model into the Linear above. Returns the model.

    Does nothing where there is a GPU. Only the class changes: parameters and their names stay.
    """
    if torch.cuda.is_available():
        return model
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear
    return model


def logits(hidden, weight, softcap=0.0):
    """hidden @ weight.T, the output layer, without gradient. hidden (n, E), weight (V, E): (n, V).

    softcap (Gemma 2): logits become softcap * tanh(logits / softcap); 0: they stay.

    On a GPU the logits of a bfloat16 model are float32. Rounded to bfloat16, whose numbers above 16
    are 0.125 apart, they would put noise into log-probabilities and KL. Elsewhere they have the
    dtype of hidden.
    """
    if hidden.is_cuda and hidden.dtype == torch.bfloat16 and FLOAT32_RESULTS:
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        z = linear(hidden, weight)
    if softcap > 0:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z


# -----------------------------------------------------------------------------
# attention


class AttentionSpec(NamedTuple):
    """What the attention of a layer needs beyond q, k and v."""

    scale: float  # scores are q @ k.T * scale
    window: int = 0  # a query sees the last `window` keys, its own included; 0: all keys
    slopes: torch.Tensor | None = None  # (H,) ALiBi: slope * key position is added to the scores
    softcap: float = 0.0  # Gemma 2: scores become softcap * tanh(scores / softcap); 0: no softcap


def attend(q, k, v, bias, spec):
    """softmax(softcapped q @ k.T * scale + bias) @ v. PyTorch only.

    q (B, H, n, D); k, v (B, K, T, D); bias broadcasts to (B, H, n, T), or None for causal attention
    without a softcap. Returns (B, H, n, D).
    """
    if spec.softcap == 0:
        return F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=bias,
            is_causal=bias is None,
            scale=spec.scale,
            enable_gqa=k.size(1) != q.size(1),
        )
    # PyTorch's function has no softcap.
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.size(1) // k.size(1)
    k = k.repeat_interleave(group, dim=1).to(dtype)                     # (B, H, T, D)
    v = v.repeat_interleave(group, dim=1).to(dtype)                     # (B, H, T, D)
    scores = q.to(dtype) @ k.transpose(-1, -2) * spec.scale             # (B, H, n, T)
    scores = spec.softcap * torch.tanh(scores / spec.softcap) + bias
    return (scores.softmax(-1) @ v).to(q.dtype)


def alibi(slopes, pos, dtype):
    """slope * key position: slopes (H,), pos (T,) -> (H, T). (Press et al. 2022)

    For a query this differs from slope * distance by a constant, which the softmax removes. At
    least float32: bfloat16 cannot count beyond 256.
    """
    slopes = slopes.to(torch.promote_types(dtype, torch.float32))
    return slopes[:, None] * pos


def causal_bias(length, spec, q):
    """(1 or H, length, length): ALiBi, and -inf where a query must not see a key.

    None where plain causal attention is meant: PyTorch has a faster path for it. q gives the dtype
    and the device.
    """
    windowed = 0 < spec.window < length
    if not windowed and spec.slopes is None and spec.softcap == 0:
        return None
    pos = torch.arange(length, device=q.device)
    mask = pos <= pos[:, None]                                          # (queries, keys)
    if spec.window > 0:
        mask &= pos > pos[:, None] - spec.window
    if spec.slopes is None:
        bias = q.new_zeros(1, length, length)
    else:
        bias = alibi(spec.slopes, pos, q.dtype)[:, None]                # (H, 1, keys)
    return bias.masked_fill(~mask, float("-inf"))


def prefill_attention(q, k, v, cu_seqlens, spec):
    """Causal attention within each of several sequences that lie end to end, without padding.

    q (N, H, D); k, v (N, K, D); sequence b is rows cu_seqlens[b]:cu_seqlens[b + 1], cu_seqlens
    (B + 1,) int32; spec: AttentionSpec. Returns (N, H, D).
    """
    if q.is_cuda:
        return prefill_attention_triton(q, k, v, cu_seqlens, spec)
    D = q.size(2)
    out = torch.empty_like(q)                                           # (N, H, D)
    start = 0
    for length, group in itertools.groupby(cu_seqlens.diff().tolist()):
        # Neighbours of the same length share a call.
        count = len(list(group))
        end = start + count * length
        if length > 0:
            bias = causal_bias(length, spec, q)
            packed = [x[start:end] for x in (q, k, v)]                  # (count * length, heads, D)
            batch = [x.view(count, length, -1, D).transpose(1, 2) for x in packed]
            o = attend(*batch, bias, spec)                              # (count, H, length, D)
            out[start:end] = o.transpose(1, 2).reshape(count * length, -1, D)
        start = end
    return out


@jit
def attention_scores(q, k, pos, scale, slope, SOFTCAP: tl.constexpr):
    """Scores of q (M, BD) and k (BN, BD) as exponents of 2: (M, BN).

    pos (BN,): positions of the keys. scale includes LOG2E, and so does slope, which is for ALiBi: a
    number, (M, 1), or None.
    """
    qk = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (e^2x + 1), and here e^2x = 2^(2 * qk / SOFTCAP). It may be infinite.
        tanh = 1 - 2 / (tl.exp2(qk * (2 / SOFTCAP)) + 1)
        qk = tanh * (SOFTCAP * LOG2E)
    if slope is not None:
        qk += slope * pos
    return qk


@jit
def online_softmax(qk, v, m_i, l_i, acc):
    """Adds a block of BN keys to M running softmaxes (FlashAttention, Dao et al. 2022).

    qk (M, BN): scores as exponents of 2; v (BN, BD). The state of the softmaxes: m_i (M,), the
    largest score; l_i (M,), the sum of 2^(score - m_i); acc (M, BD), the sum of values with these
    weights.
    """
    m_new = tl.maximum(m_i, tl.max(qk, 1))
    p = tl.exp2(qk - m_new[:, None])                                    # (M, BN)
    alpha = tl.exp2(m_i - m_new)                                        # (M,)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    l_i = l_i * alpha + tl.sum(p, 1)
    return m_new, l_i, acc


@jit
def find_sequence(pid, cu_seqlens_ptr, B, BM: tl.constexpr, BB: tl.constexpr):
    """Start and length of the sequence that a program works on, and its first query in it.

    Sequence b gets the programs from cu_seqlens[b] // BM + b up to the first one of sequence b + 1.
    They are never too few for its queries and at most one too many, so the host can launch the
    grid without knowing a single length.
    """
    offs_b = tl.arange(0, BB)
    cu_seqlens = tl.load(cu_seqlens_ptr + offs_b, mask=offs_b < B, other=2**31 - 1)  # (BB,)
    first_pid = cu_seqlens // BM + offs_b                               # (BB,)
    b = tl.sum((first_pid <= pid).to(tl.int32), 0) - 1
    seq_start = tl.load(cu_seqlens_ptr + b)
    seq_len = tl.load(cu_seqlens_ptr + b + 1) - seq_start
    start_m = (pid - seq_start // BM - b) * BM
    return seq_start, seq_len, start_m


@jit(do_not_specialize=["B"])  # else Triton compiles again for B = 1 and for multiples of 16
def prefill_kernel(
    q_ptr,  # (N, H, D)
    k_ptr,  # (N, K, D)
    v_ptr,  # (N, K, D)
    cu_seqlens_ptr,  # (B + 1,)
    slopes_ptr,  # (H,) or None
    out_ptr,  # (N, H, D)
    B,
    scale,  # includes LOG2E
    stride_qn, stride_qh,  # from token to token, from head to head
    stride_kn, stride_kh,
    stride_vn, stride_vh,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # divides BM
):
    """Program (i, h) computes up to BM queries of head h; find_sequence says which."""
    head = tl.program_id(1)
    # The last queries see the most keys, so they start first.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    seq_start, seq_len, start_m = find_sequence(pid, cu_seqlens_ptr, B, BM, BB)
    if start_m >= seq_len:
        return

    # Keys lo to hi are visible. Up to `diagonal` every query sees every key, and the first loop
    # needs no mask. With a window it is empty: both ends of the visible keys need one.
    hi = tl.minimum(start_m + BM, seq_len)
    if WINDOW:
        lo = tl.maximum(start_m + 1 - WINDOW, 0)
        diagonal = lo
    else:
        lo = 0
        diagonal = start_m

    offs_m = start_m + tl.arange(0, BM)
    offs_n = tl.arange(0, BN)
    offs_d = tl.arange(0, BD)
    seq_start = seq_start.to(tl.int64)  # token * heads * D outgrows 32 bits
    q_rows = (seq_start + offs_m)[:, None]
    q_mask = (offs_m < seq_len)[:, None] & (offs_d < D)
    q_ptrs = q_ptr + q_rows * stride_qn + head * stride_qh + offs_d
    q = tl.load(q_ptrs, mask=q_mask, other=0.0)                         # (BM, BD)
    k_ptr += (seq_start + lo) * stride_kn + head // G * stride_kh
    v_ptr += (seq_start + lo) * stride_vn + head // G * stride_vh
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
    m_i = tl.full([BM], -1e30, tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)

    d_mask = (offs_d < D)[None, :]
    for start_n in tl.range(lo, diagonal, BN):
        k = tl.load(k_ptr + offs_n[:, None] * stride_kn + offs_d, mask=d_mask, other=0.0)
        v = tl.load(v_ptr + offs_n[:, None] * stride_vn + offs_d, mask=d_mask, other=0.0)
        pos = start_n + offs_n
        qk = attention_scores(q, k, pos, scale, slope, SOFTCAP)         # (BM, BN)
        m_i, l_i, acc = online_softmax(qk, v, m_i, l_i, acc)
        k_ptr += BN * stride_kn
        v_ptr += BN * stride_vn

    for start_n in tl.range(diagonal, hi, BN):
        pos = start_n + offs_n
        # A key of the next sequence is not even loaded: 0 * inf is not 0.
        kv_mask = d_mask & (pos < seq_len)[:, None]
        k = tl.load(k_ptr + offs_n[:, None] * stride_kn + offs_d, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + offs_n[:, None] * stride_vn + offs_d, mask=kv_mask, other=0.0)
        qk = attention_scores(q, k, pos, scale, slope, SOFTCAP)         # (BM, BN)
        # Not -inf: a window can hide a whole block from a query that sees later keys.
        qk = tl.where(pos <= offs_m[:, None], qk, -1e30)
        if WINDOW:
            qk = tl.where(pos > offs_m[:, None] - WINDOW, qk, -1e30)
        m_i, l_i, acc = online_softmax(qk, v, m_i, l_i, acc)
        k_ptr += BN * stride_kn
        v_ptr += BN * stride_vn

    tl.store(out_ptr + (q_rows * H + head) * D + offs_d, acc / l_i[:, None], mask=q_mask)


def prefill_tile(D, element_size, hopper):
    """BM, BN and the number of stages, for 8 warps: no register spills, and no more than the 99 KB
    of shared memory that a GeForce has. hopper: sm_90 or later."""
    if element_size == 4:  # float32 has no tensor cores here
        if D <= 64:
            return 32, 16, 1
        return 16, 16, 1
    if D > 128:
        return 64, 32, 2
    if D > 64 and not hopper:
        return 128, 32, 3  # with two stages up to 16 bytes are spilled, on sm_80
    # With three stages and D <= 64 ptxas would serialise the wgmma of sm_90 (its warning C7515).
    return 128, 64, 2


def prefill_attention_triton(q, k, v, cu_seqlens, spec):
    """Bytes: q and out once; k and v once for each block of BM queries that sees them, mostly from
    the L2 cache."""
    N, H, D = q.shape
    B = len(cu_seqlens) - 1
    contiguous = q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert contiguous, "prefill_attention: the features of a head must be contiguous"
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous(), "cu_seqlens: int32"
    out = q.new_empty(N, H, D)
    hopper = False
    if q.is_cuda and not torch.version.hip:
        hopper = torch.cuda.get_device_capability(q.device)[0] >= 9
    BM, BN, stages = prefill_tile(D, q.element_size(), hopper)
    prefill_kernel[N // BM + B, H](
        q, k, v,
        cu_seqlens,
        spec.slopes,
        out,
        B,
        spec.scale * LOG2E.value,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        H=H,
        G=H // k.size(1),
        D=D,
        WINDOW=spec.window,
        SOFTCAP=spec.softcap,
        BB=max(64, next_power_of_2(B)),  # a floor, so that most batches share a compiled kernel
        BD=max(16, next_power_of_2(D)),  # tl.dot needs 16
        BM=BM,
        BN=BN,
        num_warps=8,
        num_stages=stages,
    )
    return out


def decode_attention(q, k_cache, v_cache, lengths, spec):
    """One query per row over the row's cache: row b sees the first lengths[b] entries of slot b.

    q (B, H, D); k_cache, v_cache (slots, K, C, D), of which the first B slots are read; lengths
    (B,); spec: AttentionSpec. A row of length 0 gives zeros. Returns (B, H, D).
    Bytes that must move: 2 * lengths.sum() * K * D * element size.
    """
    if q.is_cuda:
        return decode_attention_triton(q, k_cache, v_cache, lengths, spec)
    B, H, D = q.shape
    K = k_cache.size(1)
    T = max(int(lengths.max()), 1)
    k = k_cache[:B, :, :T]                                              # (B, K, T, D)
    v = v_cache[:B, :, :T]                                              # (B, K, T, D)
    pos = torch.arange(T, device=q.device)
    mask = pos < lengths[:, None]                                       # (B, T)
    if spec.window > 0:
        mask &= pos >= lengths[:, None] - spec.window
    if spec.slopes is None:
        bias = q.new_zeros(B, 1, 1, T)
    else:
        bias = alibi(spec.slopes, pos, q.dtype).view(1, K, H // K, T)
    bias = bias.masked_fill(~mask[:, None, None], float("-inf"))        # (B, 1 or K, 1 or G, T)
    # The G query heads of a key head take the place of query positions: no key is copied.
    q = q.view(B, K, H // K, D)
    o = attend(q, k, v, bias, spec)                                     # (B, K, G, D)
    empty = lengths == 0
    return o.reshape(B, H, D).masked_fill(empty[:, None, None], 0)


@jit
def decode_kernel(
    q_ptr,  # (B, H, D)
    k_ptr,  # (slots, K, C, D)
    v_ptr,  # (slots, K, C, D)
    lengths_ptr,  # (B,)
    slopes_ptr,  # (H,) or None
    out_ptr,  # (B, H, S, D)
    lse_ptr,  # (B, H, S) log2 of the weight of each split, or None if S is 1
    scale,  # includes LOG2E
    stride_qb, stride_qh,
    stride_slot, stride_head, stride_token,  # of both caches
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (s, k, b): the G queries of key head k in row b attend to the keys of split s."""
    split = tl.program_id(0)
    S = tl.num_programs(0)
    key_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)

    # This program reads keys lo to hi: an equal share of the row's keys, in whole blocks.
    length = tl.load(lengths_ptr + b).to(tl.int32)
    window_start = 0
    if WINDOW:
        window_start = tl.maximum(length - WINDOW, 0)
    keys_per_split = tl.cdiv(tl.cdiv(length - window_start, S), BN) * BN
    lo = window_start + split * keys_per_split
    hi = tl.minimum(lo + keys_per_split, length)

    offs_g = tl.arange(0, BG)
    offs_n = tl.arange(0, BN)
    offs_d = tl.arange(0, BD)
    heads = key_head * G + offs_g                                       # (BG,)
    q_mask = (offs_g < G)[:, None] & (offs_d < D)
    q_ptrs = q_ptr + b * stride_qb + heads[:, None] * stride_qh + offs_d
    q = tl.load(q_ptrs, mask=q_mask, other=0.0)                         # (BG, BD)
    # 64 bits: offsets in a cache outgrow 32 bits, those within a block do not.
    cache_row = b * stride_slot + key_head.to(tl.int64) * stride_head
    first_key = cache_row + lo.to(tl.int64) * stride_token
    k_ptr += first_key
    v_ptr += first_key
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + heads, mask=offs_g < G, other=0.0).to(tl.float32) * LOG2E
        slope = slope[:, None]                                          # (BG, 1)
    m_i = tl.full([BG], -1e30, tl.float32)
    l_i = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)

    for start_n in tl.range(lo, hi, BN):  # no iteration where this split has no keys
        pos = start_n + offs_n
        kv_mask = (pos < hi)[:, None] & (offs_d < D)
        k = tl.load(k_ptr + offs_n[:, None] * stride_token + offs_d, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + offs_n[:, None] * stride_token + offs_d, mask=kv_mask, other=0.0)
        qk = attention_scores(q, k, pos, scale, slope, SOFTCAP)         # (BG, BN)
        qk = tl.where(pos < hi, qk, -1e30)
        m_i, l_i, acc = online_softmax(qk, v, m_i, l_i, acc)
        k_ptr += BN * stride_token
        v_ptr += BN * stride_token

    l_i = tl.maximum(l_i, 1.0)  # the largest score alone contributes 1, unless there was no key
    part = (b * H + heads) * S + split                                  # (BG,)
    if lse_ptr is not None:
        tl.store(lse_ptr + part, m_i + tl.log2(l_i), mask=offs_g < G)
    if lse_ptr is None or hi > lo:
        tl.store(out_ptr + part[:, None] * D + offs_d, acc / l_i[:, None], mask=q_mask)


@jit(do_not_specialize=["S"])
def merge_kernel(
    parts_ptr,  # (B, H, S, D)
    lse_ptr,  # (B, H, S)
    out_ptr,  # (B, H, D)
    S,
    D: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """Merges the splits of decode_kernel: the average of parts with weights 2^lse.

    A split without keys has an lse of -1e30, and its part was never written.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BS)
    offs_d = tl.arange(0, BD)
    lse = tl.load(lse_ptr + row * S + offs_s, mask=offs_s < S, other=-1e30)  # (BS,)
    weight = tl.exp2(lse - tl.max(lse, 0))
    mask = (lse > -1e30)[:, None] & (offs_d < D)
    part_ptrs = parts_ptr + (row * S + offs_s)[:, None] * D + offs_d
    parts = tl.load(part_ptrs, mask=mask, other=0.0)                    # (BS, BD)
    out = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)        # (BD,)
    tl.store(out_ptr + row * D + offs_d, out, mask=offs_d < D)


def decode_splits(B, K, C, window, BN):
    """In how many programs (S) to split the keys of one row and key head.

    Enough for two programs on each of 132 multiprocessors: each has 32 KB of loads in flight, and
    that fills the bus of an H100. Also enough for none to read more than 1024 keys while the others
    are done. Depends on shapes alone.
    """
    longest = C
    if window > 0:
        longest = min(C, window)
    wanted = max(cdiv(256, B * K), cdiv(longest, 1024))
    return min(wanted, cdiv(longest, BN), 64)


def decode_attention_triton(q, k_cache, v_cache, lengths, spec):
    """Bytes: the keys and values that the rows see, once.

    One program reads the keys of one key head for all its G queries. These are the rows of a matrix
    product, which has at least 16; empty rows cost nothing, because everyone waits for memory. The
    launch depends on shapes alone, never on lengths, so a CUDA graph can hold it.
    """
    B, H, D = q.shape
    K, C = k_cache.shape[1:3]
    contiguous = q.stride(2) == k_cache.stride(3) == 1
    assert contiguous, "decode_attention: the features of a head must be contiguous"
    require_indices(lengths=lengths)
    same_layout = k_cache.stride() == v_cache.stride()
    assert same_layout, "decode_attention: the two caches must have the same strides"
    BD = max(16, next_power_of_2(D))  # tl.dot needs 16
    BN = max(16, min(64, 8192 // BD // q.element_size()))
    S = decode_splits(B, K, C, spec.window, BN)
    out = q.new_empty(B, H, D)
    parts = out
    lse = None
    if S > 1:
        parts = q.new_empty(B, H, S, D, dtype=torch.float32)
        lse = q.new_empty(B, H, S, dtype=torch.float32)
    decode_kernel[S, K, B](
        q, k_cache, v_cache,
        lengths,
        spec.slopes,
        parts,
        lse,
        spec.scale * LOG2E.value,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        H=H,
        G=H // K,
        D=D,
        WINDOW=spec.window,
        SOFTCAP=spec.softcap,
        BG=max(16, next_power_of_2(H // K)),
        BD=BD,
        BN=BN,
        num_warps=4 if D <= 128 else 8,
        num_stages=3,
    )
    if S > 1:
        BS = max(16, next_power_of_2(S))  # a floor, so that most batches share a compiled kernel
        merge_kernel[(B * H,)](parts, lse, out, S, D=D, BS=BS, BD=BD)
    return out


# -----------------------------------------------------------------------------
# rotary embedding and the KV cache


def rotate(x, cos, sin):
    """Rotary embedding (Su et al. 2021) of the first R of D features, half against half.

    x (N, H, D); cos, sin (N, R / 2). Returns (N, H, D).
    """
    half = cos.size(-1)
    cos = cos[:, None].to(x.dtype)                                      # (N, 1, R / 2)
    sin = sin[:, None].to(x.dtype)                                      # (N, 1, R / 2)
    first = x[..., :half]
    second = x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rope_and_cache(q, k, v, k_cache, v_cache, slots, positions, cos=None, sin=None):
    """Rotates q and k by their positions, and writes k and v into the cache.

    q (N, H, D); k, v (N, K, D); k_cache, v_cache (slots, K, C, D), written in place. Token i goes
    to slot slots[i] at positions[i], both (N,); neither is checked on a GPU. cos, sin (C or more,
    R / 2), or None for models without rotary embedding. Returns the rotated q and k.
    """
    if q.is_cuda:
        return rope_and_cache_triton(q, k, v, k_cache, v_cache, slots, positions, cos, sin)
    if cos is not None:
        q = rotate(q, cos[positions], sin[positions])
        k = rotate(k, cos[positions], sin[positions])
    k_cache[slots, :, positions] = k
    v_cache[slots, :, positions] = v
    return q, k


@jit
def load_rotated(
    x_ptr,  # (HEADS, D)
    cos_ptr,
    sin_ptr,
    position,
    stride_h,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """Loads the heads of one token, rotated: (BH, BD). Returns them and their mask.

    Each feature below R is combined with its partner R / 2 away. From R on cos is 1 and sin is 0.
    """
    offs_h = tl.arange(0, BH)[:, None]
    offs_d = tl.arange(0, BD)
    mask = (offs_h < HEADS) & (offs_d < D)
    x = tl.load(x_ptr + offs_h * stride_h + offs_d, mask=mask, other=0.0)
    if R > 0:
        upper_partner = tl.where(offs_d < R, offs_d - R // 2, offs_d)
        partner = tl.where(offs_d < R // 2, offs_d + R // 2, upper_partner)
        y = tl.load(x_ptr + offs_h * stride_h + partner, mask=mask, other=0.0).to(tl.float32)
        angle = position * (R // 2) + offs_d % (R // 2)
        cos = tl.load(cos_ptr + angle, mask=offs_d < R, other=1.0).to(tl.float32)  # (BD,)
        sin = tl.load(sin_ptr + angle, mask=offs_d < R, other=0.0).to(tl.float32)  # (BD,)
        x = x.to(tl.float32) * cos + y * tl.where(offs_d < R // 2, -sin, sin)
    return x, mask


@jit
def rope_cache_kernel(
    q_ptr,  # (N, H, D)
    k_ptr,  # (N, K, D)
    v_ptr,  # (N, K, D)
    q_out_ptr,  # (N, H, D)
    k_out_ptr,  # (N, K, D)
    k_cache_ptr,  # (slots, K, C, D)
    v_cache_ptr,  # (slots, K, C, D)
    slots_ptr,  # (N,)
    positions_ptr,  # (N,)
    cos_ptr,  # (C or more, R / 2) or None
    sin_ptr,  # (C or more, R / 2) or None
    stride_qn, stride_qh,
    stride_kn, stride_kh,
    stride_vn, stride_vh,
    stride_slot, stride_head, stride_token,  # of both caches
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Program n rotates and stores the heads of token n."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n).to(tl.int64)
    position = tl.load(positions_ptr + n).to(tl.int64)
    offs_k = tl.arange(0, BK)[:, None]
    offs_d = tl.arange(0, BD)
    offs_cache = slot * stride_slot + offs_k.to(tl.int64) * stride_head
    offs_cache = offs_cache + position * stride_token + offs_d          # (BK, BD)
    k, k_mask = load_rotated(
        k_ptr + n * stride_kn, cos_ptr, sin_ptr, position, stride_kh, K, D, R, BK, BD)
    v = tl.load(v_ptr + n * stride_vn + offs_k * stride_vh + offs_d, mask=k_mask, other=0.0)
    tl.store(k_cache_ptr + offs_cache, k, mask=k_mask)
    tl.store(v_cache_ptr + offs_cache, v, mask=k_mask)
    if R > 0:
        tl.store(k_out_ptr + (n * K + offs_k) * D + offs_d, k, mask=k_mask)
        q, q_mask = load_rotated(
            q_ptr + n * stride_qn, cos_ptr, sin_ptr, position, stride_qh, H, D, R, BH, BD)
        offs_h = tl.arange(0, BH)[:, None]
        tl.store(q_out_ptr + (n * H + offs_h) * D + offs_d, q, mask=q_mask)


def rope_and_cache_triton(q, k, v, k_cache, v_cache, slots, positions, cos=None, sin=None):
    """Bytes: q, k and v read once; q and v written once, and k twice. One program per token."""
    N, H, D = q.shape
    K = k.size(1)
    contiguous = all(x.stride(-1) == 1 for x in (q, k, v, k_cache))
    assert contiguous, "rope_and_cache: the features of a head must be contiguous"
    require_indices(slots=slots, positions=positions)
    same_layout = k_cache.stride() == v_cache.stride()
    assert same_layout, "rope_and_cache: the two caches must have the same strides"
    if cos is None:
        R = 0
        q_out = q
        k_out = k
    else:
        contiguous = cos.is_contiguous() and sin.is_contiguous()
        assert contiguous, "rope_and_cache: cos and sin must be contiguous"
        R = 2 * cos.size(1)
        q_out = q.new_empty(N, H, D)
        k_out = k.new_empty(N, K, D)
    rope_cache_kernel[(N,)](
        q, k, v,
        q_out, k_out,
        k_cache, v_cache,
        slots, positions,
        cos, sin,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        H=H,
        K=K,
        D=D,
        R=R,
        BH=next_power_of_2(H),
        BK=next_power_of_2(K),
        BD=next_power_of_2(D),
        num_warps=4 if H * D <= 2048 else 8,
    )
    return q_out, k_out


# -----------------------------------------------------------------------------
# norms


def add_norm(x, residual, weight, bias, eps, rms, offset=0.0):
    """residual + x, and the norm of this sum: what connects the halves of a transformer layer.

    x, residual (..., E), or residual None; weight, bias (E,). rms: RMSNorm without mean and bias
    (Zhang and Sennrich 2019), otherwise LayerNorm. offset: added to the weight of an RMSNorm, 1 for
    Gemma. Returns (normed, sum), both (..., E).
    """
    if x.is_cuda:
        return add_norm_triton(x, residual, weight, bias, eps, rms, offset)
    total = x
    if residual is not None:
        total = residual + x
    if not rms:
        return F.layer_norm(total, (total.size(-1),), weight, bias, eps), total
    y = total.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if offset:  # Gemma rounds once, the others before the product and after it
        return (y * (offset + weight.float())).to(total.dtype), total
    return weight * y.to(total.dtype), total


@jit
def add_norm_kernel(
    x_ptr,  # (N, E) or (N, H, E)
    residual_ptr,  # of the same shape, or None
    weight_ptr,  # (E,)
    bias_ptr,  # (E,) or None
    normed_ptr,  # as x
    total_ptr,  # as x, written where there is a residual
    stride_n, stride_h,  # of x
    eps,
    E: tl.constexpr,
    RMS: tl.constexpr,
    OFFSET: tl.constexpr,
    BE: tl.constexpr,
):
    offs_e = tl.arange(0, BE)
    mask = offs_e < E
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    offs = (n * tl.num_programs(1) + h) * E + offs_e
    x = tl.load(x_ptr + n * stride_n + h * stride_h + offs_e, mask=mask, other=0.0)  # (BE,)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + offs, x, mask=mask)
    y = x.to(tl.float32)
    if not RMS:
        y = tl.where(mask, y - tl.sum(y, 0) / E, 0.0)
    y *= tl.rsqrt(tl.sum(y * y, 0) / E + eps)
    if RMS and OFFSET == 0:
        y = y.to(x.dtype).to(tl.float32)  # the models that use it were trained with this rounding
    y *= tl.load(weight_ptr + offs_e, mask=mask, other=0.0).to(tl.float32) + OFFSET
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_e, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed_ptr + offs, y, mask=mask)


def add_norm_triton(x, residual, weight, bias, eps, rms, offset=0.0):
    """Bytes: x and residual read once, sum and norm written once: 4 * N * E * element size. One
    program per row.

    x may be (N, H, E), with heads that are slices of a joint projection.
    """
    assert x.stride(-1) == 1, "add_norm: the features of a row must be contiguous"
    heads = 1
    stride_h = 0
    if x.dim() == 3:
        heads = x.size(1)
        stride_h = x.stride(1)
    total = x
    if residual is not None:
        residual = residual.contiguous()
        total = x.new_empty(x.shape)
    if rms:
        bias = None
    normed = x.new_empty(x.shape)
    E = x.size(-1)
    BE = next_power_of_2(E)
    add_norm_kernel[len(x), heads](
        x, residual, weight, bias,
        normed, total,
        x.stride(0),
        stride_h,
        eps,
        E=E,
        RMS=rms,
        OFFSET=offset,
        BE=BE,
        num_warps=min(max(BE // 512, 1), 16),
    )
    return normed, total


# -----------------------------------------------------------------------------
# sampling


def hash32(x):
    """A 32-bit hash of the low 32 bits of each element, int64 in and out.

    The steps and constants are those of "lowbias32" by C. Wellons.
    """
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def uniform(keys, counters):
    """A uniform random number in (0, 1) for each key and counter. keys, counters (B,) int64.

    There is no state: the number belongs to a row (key) and a position in it (counter), and does
    not depend on the order in which rows are computed. Returns (B,) float32.
    """
    bits = hash32(hash32(keys) + counters * 0x9E3779B9)
    return ((bits >> 8).float() + 0.5) / 2**24


def top_k_top_p_filter(logits, top_k, top_p):
    """logits (B, V), with -inf outside the top_k largest, and outside the fewest tokens whose
    probability reaches top_p.

    PyTorch on every device, and rarely used. No shape depends on data and nothing waits for the
    GPU, so a CUDA graph can hold it.
    """
    if 0 < top_k < logits.size(-1):
        kth_largest = logits.topk(top_k, dim=-1).values[:, -1:]         # (B, 1)
        logits = logits.masked_fill(logits < kth_largest, float("-inf"))
    if top_p < 1:
        order = logits.argsort(dim=-1, descending=True)                 # (B, V)
        p = logits.softmax(-1).gather(1, order)                         # (B, V) in that order
        # Remove a token if those before it reach top_p: never the first one.
        remove_sorted = p.cumsum(-1) - p >= top_p                       # (B, V) in that order
        remove = torch.zeros_like(remove_sorted).scatter(1, order, remove_sorted)
        logits = logits.masked_fill(remove, float("-inf"))
    return logits


def sample(logits, u, temperature, top_k=0, top_p=1.0):
    """One token per row, and its log-probability under the distribution that it was drawn from.

    logits (B, V); u (B,) uniform in (0, 1). Temperature 0 takes the largest logit, and its
    log-probability is the one at temperature 1. Returns tokens (B,) int64, logprobs (B,) float32.
    """
    greedy = temperature == 0
    z = logits.float()
    if temperature not in (0, 1):
        z = z / temperature
    if top_k > 0 or top_p < 1:
        z = top_k_top_p_filter(z, top_k, top_p)
    largest = z.amax(-1, keepdim=True)                                  # (B, 1)
    mass = (z - largest).exp_()                                         # (B, V)
    if greedy:
        tokens = z.argmax(-1, keepdim=True)                             # (B, 1)
        total = mass.sum(-1, keepdim=True)                              # (B, 1)
    else:
        tokens, total = inverse_cdf_of_rows(mass, u[:, None])
        tokens = tokens.clamp(max=z.size(1) - 1)  # if mass is NaN
    logprobs = z.gather(1, tokens) - largest - total.log()              # (B, 1)
    return tokens[:, 0], logprobs[:, 0]


def inverse_cdf_of_rows(mass, u):
    """The first token of each row at which the running sum of mass reaches u times its whole sum,
    and this sum. mass (B, V), u (B, 1) above 0. Returns (B, 1) each.

    Takes the sums of blocks, and then the running sum in one of them: a running sum of the whole
    row takes several times as long.
    """
    BLOCK = 64
    if mass.size(1) % BLOCK:
        mass = F.pad(mass, (0, -mass.size(1) % BLOCK))
    mass = mass.unflatten(1, (-1, BLOCK))                               # (B, blocks, 64)
    sums = mass.sum(-1).cumsum(-1)                                      # (B, blocks)
    total = sums[:, -1:]
    target = u * total
    # If mass is NaN, no sum reaches u. The engine sees that by the log-probability.
    block = torch.searchsorted(sums, target).clamp(max=sums.size(1) - 1)
    before = F.pad(sums, (1, 0)).gather(1, block)
    inside = mass.take_along_dim(block[:, :, None], 1)[:, 0].cumsum(-1)  # (B, 64)
    # Where rounding would lead out of the block, it is its last token with mass.
    index = torch.searchsorted(inside, torch.minimum(target - before, inside[:, -1:]))
    return block * BLOCK + index, total


class Rows(NamedTuple):
    """The sequences in S slots of C tokens, as the sampler reads and continues them."""

    tokens: torch.Tensor  # (S, C) int64
    logprobs: torch.Tensor  # (S, C) float32, of each token
    lengths: torch.Tensor  # (S,) int64
    max_lengths: torch.Tensor  # (S,) int64: where a row must end
    keys: torch.Tensor  # (S,) int64, of its random numbers
    done: torch.Tensor  # (S,) bool: whether it has ended


def sample_next(logits, slots, rows, eos, temperature=1.0, top_k=0, top_p=1.0):
    """Samples the next token of some rows, and appends it with its log-probability.

    logits (B, V), of the rows in slots (B,) int64; rows: Rows, changed in place; eos (n,) int64:
    tokens that end a row. A row that has ended stays as it is. The random number belongs to the
    row's key and its length; for the rest see sample.
    """
    if logits.is_cuda:
        greedy = temperature == 0
        divisor = 1.0 if greedy else temperature
        if top_k > 0 or top_p < 1:
            logits = top_k_top_p_filter(logits.float() / divisor, top_k, top_p)
            divisor = 1.0
        sample_next_triton(logits, slots, rows, eos, divisor, greedy)
        return
    running = ~rows.done[slots]
    lengths = rows.lengths[slots]
    u = uniform(rows.keys[slots], lengths)
    new, logprobs = sample(logits, u, temperature, top_k, top_p)        # (B,), (B,)

    # A row that has ended overwrites its last token with the same one.
    lengths = lengths + running
    last = lengths - 1
    rows.tokens[slots, last] = torch.where(running, new, rows.tokens[slots, last])
    rows.logprobs[slots, last] = torch.where(running, logprobs, rows.logprobs[slots, last])
    rows.lengths[slots] = lengths
    is_eos = (new[:, None] == eos).any(1)
    rows.done[slots] |= is_eos | (lengths >= rows.max_lengths[slots])


@jit
def hash32_triton(x):
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


@jit
def inverse_cdf(mass, target, SIZE: tl.constexpr):
    """The first index at which the running sum of mass (SIZE,) reaches target, and the sum before.

    Its own mass is never 0. Where rounding keeps the whole sum below target, it is the last index
    with mass.
    """
    offs = tl.arange(0, SIZE)
    reached = (tl.cumsum(mass, 0) >= target) & (mass > 0)
    first_reached = tl.min(tl.where(reached, offs, SIZE), 0)
    last_with_mass = tl.max(tl.where(mass > 0, offs, 0), 0)
    index = tl.minimum(first_reached, last_with_mass)
    before = tl.sum(tl.where(offs < index, mass, 0.0), 0)
    return index, before


@jit(do_not_specialize=["n_eos"])
def sample_kernel(
    logits_ptr,  # (B, V)
    slots_ptr,  # (B,)
    tokens_ptr,  # (S, C)
    logprobs_ptr,  # (S, C)
    lengths_ptr,  # (S,)
    max_lengths_ptr,  # (S,)
    keys_ptr,  # (S,)
    done_ptr,  # (S,)
    eos_ptr,  # (n_eos,)
    n_eos,
    V,
    C,
    stride,  # from row to row of the logits
    temperature,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # a power of two, BLOCKS * BLOCK >= V
    BEOS: tl.constexpr,
):
    """Program b continues the row in slots[b]. z are the logits after temperature."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if tl.load(done_ptr + slot):
        return
    logits_ptr += row.to(tl.int64) * stride
    offs = tl.arange(0, BLOCK)
    offs_block = tl.arange(0, BLOCKS)

    # One pass over the row: of each block the largest z, and the sum of exp(z - largest).
    largest = tl.full([BLOCKS], -1e30, tl.float32)
    mass = tl.zeros([BLOCKS], tl.float32)
    for i in tl.range(0, tl.cdiv(V, BLOCK), num_stages=3):
        mask = i * BLOCK + offs < V
        z = tl.load(logits_ptr + i * BLOCK + offs, mask=mask, other=float("-inf"))
        z = z.to(tl.float32) / temperature
        z_max = tl.maximum(tl.max(z, 0), -1e30)  # a whole block may be -inf
        largest = tl.where(offs_block == i, z_max, largest)
        mass = tl.where(offs_block == i, tl.sum(tl.exp(z - z_max), 0), mass)
    row_max = tl.max(largest, 0)
    mass *= tl.exp(largest - row_max)                                   # (BLOCKS,)
    total = tl.sum(mass, 0)

    length = tl.load(lengths_ptr + slot)

    # Find the block, then the token in it. Greedy: the first one among the largest.
    if GREEDY:
        target = 1.0
        mass = tl.where(largest == row_max, 1.0, 0.0)
    else:
        bits = hash32_triton(hash32_triton(tl.load(keys_ptr + slot)) + length * 0x9E3779B9)
        u = ((bits >> 8).to(tl.float32) + 0.5) / 2**24  # that of uniform()
        target = u * total
    block, before = inverse_cdf(mass, target, BLOCKS)
    mask = block * BLOCK + offs < V
    z = tl.load(logits_ptr + block * BLOCK + offs, mask=mask, other=float("-inf"))
    z = z.to(tl.float32) / temperature                                  # (BLOCK,)
    if GREEDY:
        mass = tl.where(z == tl.max(z, 0), 1.0, 0.0)
    else:
        mass = tl.exp(z - row_max)
    index, _ = inverse_cdf(mass, target - before, BLOCK)
    token_z = tl.sum(tl.where(offs == index, z, 0.0), 0)
    token = (block * BLOCK + index).to(tl.int64)
    last = slot * C + length
    tl.store(tokens_ptr + last, token)
    tl.store(logprobs_ptr + last, token_z - row_max - tl.log(total))

    offs_eos = tl.arange(0, BEOS)
    eos = tl.load(eos_ptr + offs_eos, mask=offs_eos < n_eos, other=-1)
    is_eos = tl.max((eos == token).to(tl.int32), 0) > 0
    tl.store(lengths_ptr + slot, length + 1)
    tl.store(done_ptr + slot, is_eos | (length + 1 >= tl.load(max_lengths_ptr + slot)))


def sample_next_triton(logits, slots, rows, eos, temperature, greedy=False):
    """Bytes: the logits once, and one block of each row a second time. One program per row."""
    B, V = logits.shape
    assert logits.stride(1) == 1, "sample_next: a row of logits must be contiguous"
    require_indices(
        slots=slots, tokens=rows.tokens, lengths=rows.lengths, max_lengths=rows.max_lengths,
        keys=rows.keys, eos=eos)
    contiguous = rows.logprobs.is_contiguous() and rows.done.is_contiguous()
    assert contiguous, "sample_next: logprobs and done must be contiguous"
    BLOCK = min(4096, next_power_of_2(V))
    sample_kernel[(B,)](
        logits,
        slots,
        *rows,
        eos,
        len(eos),
        V,
        rows.tokens.size(1),
        logits.stride(0),
        float(temperature),
        GREEDY=greedy,
        BLOCK=BLOCK,
        BLOCKS=next_power_of_2(cdiv(V, BLOCK)),
        BEOS=max(16, next_power_of_2(len(eos))),
        num_warps=8,
    )


# -----------------------------------------------------------------------------
# log-probabilities without keeping the logits


def logit_stats(logits, targets, temperature):
    """What a loss needs of softmax(logits / temperature). logits (n, V), targets (n,).

    Returns the log-probability of the targets, the log-sum-exp, and the entropy, (n,) float32 each.
    logits may be overwritten.
    """
    if logits.is_cuda:
        return logit_stats_triton(logits, targets, temperature)
    z = logits.float().div_(temperature)                                # (n, V)
    lse = z.logsumexp(-1)                                               # (n,)
    z -= lse[:, None]
    logprobs = z.gather(1, targets[:, None])[:, 0]                      # (n,)
    entropy = -z.exp().mul_(z).sum(-1)                                  # (n,)
    return logprobs, lse, entropy


@jit
def logit_stats_kernel(
    logits_ptr,  # (n, V)
    targets_ptr,  # (n,)
    logprobs_ptr,  # (n,)
    lse_ptr,  # (n,)
    entropy_ptr,  # (n,)
    V,
    temperature,
    BLOCK: tl.constexpr,
):
    """One pass over a row. z are the logits after temperature."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    offs = tl.arange(0, BLOCK)
    m_i = -1e30  # the largest z
    l_i = 0.0  # the sum of exp(z - m_i)
    s_i = 0.0  # the sum of exp(z - m_i) * (z - m_i)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        z = tl.load(logits_ptr + start + offs, mask=start + offs < V, other=-1e30)
        z = z.to(tl.float32) / temperature                              # (BLOCK,)
        m_new = tl.maximum(m_i, tl.max(z, 0))
        z -= m_new
        p = tl.exp(z)
        alpha = tl.exp(m_i - m_new)
        s_i = (s_i + (m_i - m_new) * l_i) * alpha + tl.sum(p * z, 0)
        l_i = l_i * alpha + tl.sum(p, 0)
        m_i = m_new
    target = tl.load(targets_ptr + row)
    target_z = tl.load(logits_ptr + target).to(tl.float32) / temperature
    tl.store(logprobs_ptr + row, target_z - m_i - tl.log(l_i))
    tl.store(lse_ptr + row, m_i + tl.log(l_i))
    tl.store(entropy_ptr + row, tl.log(l_i) - s_i / l_i)


def logit_stats_triton(logits, targets, temperature):
    """Bytes: the logits once. One program per row."""
    n, V = logits.shape
    require_indices(targets=targets)
    logprobs = logits.new_empty(n, dtype=torch.float32)
    lse = logits.new_empty(n, dtype=torch.float32)
    entropy = logits.new_empty(n, dtype=torch.float32)
    logit_stats_kernel[(n,)](
        logits, targets,
        logprobs, lse, entropy,
        V,
        float(temperature),
        BLOCK=min(4096, next_power_of_2(V)),
        num_warps=8,
    )
    return logprobs, lse, entropy


def logit_grads(logits, targets, lse, entropy, g, g_entropy, temperature):
    """Gradient of the logits (n, V), in their dtype. They may be overwritten, even by the result.

    g, g_entropy (n,): gradients of the log-probabilities and of the entropies. With z the logits
    after temperature: d logprob / dz = onehot(target) - p, d entropy / dz = -p (log p + entropy).
    """
    if logits.is_cuda:
        return logit_grads_triton(logits, targets, lse, entropy, g, g_entropy, temperature)
    log_p = logits.float().div_(temperature).sub_(lse[:, None])         # (n, V)
    dz = log_p + entropy[:, None]
    dz.mul_(g_entropy[:, None]).add_(g[:, None])
    dz.mul_(log_p.exp_()).neg_()
    dz.scatter_add_(1, targets[:, None], g[:, None])
    return dz.div_(temperature).to(logits.dtype)


@jit
def logit_grads_kernel(
    logits_ptr,  # (n, V), overwritten with their gradient
    targets_ptr,  # (n,)
    lse_ptr,  # (n,)
    entropy_ptr,  # (n,)
    g_ptr,  # (n,)
    g_entropy_ptr,  # (n,)
    V,
    temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < V
    logits_ptrs = logits_ptr + row.to(tl.int64) * V + offs
    g = tl.load(g_ptr + row)
    g_entropy = tl.load(g_entropy_ptr + row)
    z = tl.load(logits_ptrs, mask=mask, other=0.0).to(tl.float32) / temperature
    log_p = z - tl.load(lse_ptr + row)                                  # (BLOCK,)
    dz = -tl.exp(log_p) * (g + g_entropy * (log_p + tl.load(entropy_ptr + row)))
    dz += tl.where(offs == tl.load(targets_ptr + row), g, 0.0)
    tl.store(logits_ptrs, dz / temperature, mask=mask)


def logit_grads_triton(logits, targets, lse, entropy, g, g_entropy, temperature):
    """Bytes: the logits read once, and overwritten once."""
    n, V = logits.shape
    require_indices(targets=targets)
    BLOCK = min(4096, next_power_of_2(V))
    logit_grads_kernel[n, cdiv(V, BLOCK)](
        logits, targets,
        lse, entropy,
        g.contiguous(),
        g_entropy.contiguous(),
        V,
        float(temperature),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return logits


def add_weight_grad(d_weight, d_logits, hidden):
    """d_weight += d_logits.T @ hidden, in place.

    d_weight (V, E) float32; d_logits (n, V), hidden (n, E) of the same dtype.
    """
    if d_logits.dtype == torch.float32:
        d_weight.addmm_(d_logits.T, hidden)
    elif d_logits.is_cuda and FLOAT32_RESULTS:  # no bfloat16 copy of the product
        torch.addmm(d_weight, d_logits.T, hidden, out_dtype=torch.float32, out=d_weight)
    else:
        d_weight += d_logits.T @ hidden


class TokenLogprobs(torch.autograd.Function):
    """Log-probability of each target and the entropy, from hidden states.

    Takes a chunk of rows at a time: no more than CHUNK logits exist at once, forward or backward,
    which computes them again.
    """

    # 16 MB of float32 on a CPU, about its cache; 256 MB on a GPU, enough for a fast product.
    CHUNK = {"cpu": 2**22, "cuda": 2**26}

    @staticmethod
    def chunks(hidden, weight, softcap=0.0):
        """Yields slices of rows and their logits (n, V), all of nearly the same size: there is no
        small and slow last one."""
        rows = len(hidden)
        rows_per_chunk = max(1, TokenLogprobs.CHUNK[hidden.device.type] // len(weight))
        count = -(-rows // rows_per_chunk)
        for i in range(count):
            part = slice(rows * i // count, rows * (i + 1) // count)
            yield part, logits(hidden[part], weight, softcap)

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap):
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        lse = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs)
        for part, z in TokenLogprobs.chunks(hidden, weight, softcap):
            stats = logit_stats(z, targets[part], temperature)
            logprobs[part], lse[part], entropy[part] = stats
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        ctx.softcap = softcap
        return logprobs, entropy

    @staticmethod
    def backward(ctx, g, g_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)                             # (N, E)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)    # (V, E)
        for part, z in TokenLogprobs.chunks(hidden, weight, ctx.softcap):
            stats = (lse[part], entropy[part], g[part], g_entropy[part])
            slope = None
            if ctx.softcap > 0:  # the derivative of softcap * tanh; logit_grads overwrites z
                slope = 1 - (z.float() / ctx.softcap).square()
            dz = logit_grads(z, targets[part], *stats, ctx.temperature)
            if slope is not None:
                dz = dz * slope
            dz = dz.to(hidden.dtype)  # logits may be float32 where hidden is not; see logits()
            d_hidden[part] = linear(dz, weight.T)
            if d_weight is not None:
                add_weight_grad(d_weight, dz, hidden[part])
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None


def token_logprobs(hidden, weight, targets, temperature=1.0, softcap=0.0):
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of the same.

    hidden (N, E), weight (V, E), targets (N,) int64; softcap: see logits. Returns logprobs (N,),
    entropy (N,), float32; both carry gradient.
    """
    return TokenLogprobs.apply(hidden, weight, targets, temperature, softcap)
