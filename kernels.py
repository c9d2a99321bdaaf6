"""The inner loops, each beside the few lines of PyTorch that it means.

Every public function below is plain PyTorch on a CPU; that is also what its GPU kernel is tested against.

Dimension key:  N packed tokens, B rows, H query heads, K key/value heads (K divides H: grouped-query attention),
                D head size, C slots' capacity in tokens, V vocabulary, E width of the model.
"""
import torch
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# attention


def prefill_attention(q, k, v, cu_seqlens, scale, window=0, slopes=None):
    """Causal attention inside each of several sequences that lie end to end, without padding.

    q (N, H, D), k and v (N, K, D); sequence i is rows cu_seqlens[i]:cu_seqlens[i + 1], cu_seqlens (B + 1,) int32.
    window > 0: a query sees the last `window` keys, itself included. slopes (H,): ALiBi, adds slope * key position
    (a constant per query away from slope * distance, which a softmax does not see). Returns (N, H, D).
    """
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
                if slopes is not None:
                    bias = slopes.view(H, 1, 1).to(q.dtype) * at + bias
                bias = bias.masked_fill(dead, float("-inf"))                              # (1 or H, n, n)
            o = F.scaled_dot_product_attention(a, b, c, attn_mask=bias, is_causal=bias is None, scale=scale,
                                               enable_gqa=k.size(1) != H)
            out[part] = o.transpose(1, 2).reshape(many * n, H, D)
        row, start = row + many, start + many * n
    return out


def decode_attention(q, k_cache, v_cache, lengths, scale, window=0, slopes=None):
    """One query a row over that row's cache: row b sees the first lengths[b] entries of slot b.

    q (B, H, D); k_cache, v_cache (slots, K, C, D), the first B slots are read; lengths (B,). A row of length 0
    gives zeros. Returns (B, H, D). The bytes that must move: 2 * lengths.sum() * K * D * element size.
    """
    B, H, D = q.shape
    K = k_cache.size(1)
    T = max(int(lengths.max()), 1)
    k, v = k_cache[:B, :, :T], v_cache[:B, :, :T]                                        # (B, K, T, D)
    at = torch.arange(T, device=q.device)
    dead = at >= lengths[:, None]                                                        # (B, T)
    if window:
        dead |= at < lengths[:, None] - window
    bias = torch.zeros(B, 1, 1, T, dtype=q.dtype, device=q.device)
    if slopes is not None:
        bias = slopes.view(1, K, H // K, 1).to(q.dtype) * at + bias                      # (B, K, H/K, T)
    bias = bias.masked_fill(dead[:, None, None], float("-inf"))
    # The H/K query heads that share a key head stand where several query positions would: no key is copied.
    o = F.scaled_dot_product_attention(q.view(B, K, H // K, D), k, v, attn_mask=bias, scale=scale)
    return o.reshape(B, H, D).masked_fill((lengths == 0)[:, None, None], 0)


def rotate(x, cos, sin):
    """Rotary embedding (Su et al. 2021), first half against second half of the first R of D features.
    x (N, H, D); cos and sin (N, R / 2)."""
    R = 2 * cos.size(-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)                        # (N, 1, R/2)
    a, b = x[..., : R // 2], x[..., R // 2 : R]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., R:]], dim=-1)


def rope_and_cache(q, k, v, k_cache, v_cache, slots, positions, cos=None, sin=None):
    """Turns q and k by their positions, and writes k and v into the cache.

    q (N, H, D), k and v (N, K, D); k_cache, v_cache (slots, K, C, D); token i goes to slot slots[i], place positions[i].
    cos, sin (C or more, R / 2), or None where the model has other positions. Returns the turned q and k.
    """
    if cos is not None:
        q, k = rotate(q, cos[positions], sin[positions]), rotate(k, cos[positions], sin[positions])
    k_cache[slots, :, positions] = k
    v_cache[slots, :, positions] = v
    return q, k


# -----------------------------------------------------------------------------
# norms


def add_norm(x, residual, weight, bias, eps, rms):
    """residual + x, and its norm: what stands between two halves of a layer. x, residual (N, E); residual may be None.
    rms: Zhang and Sennrich 2019, no mean and no bias; otherwise layer norm. Returns (normed, sum), both (N, E)."""
    total = x if residual is None else residual + x
    if not rms:
        return F.layer_norm(total, (total.size(-1),), weight, bias, eps), total
    y = total.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(total.dtype), total


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


def sample(logits, u, temperature, top_k=0, top_p=1.0):
    """One token a row, and its log-probability under the distribution that it was drawn from.

    logits (B, V); u (B,) in (0, 1); temperature 0 takes the largest logit (its log-probability is then the one at
    temperature 1). Returns tokens (B,) long, logprobs (B,) float32.
    """
    logits = logits.float()
    if temperature > 0:
        logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:  # keep the fewest most likely tokens whose mass reaches top_p
        order = logits.argsort(dim=-1, descending=True)
        p = logits.softmax(-1).gather(1, order)
        drop = p.cumsum(-1) - p >= top_p                                                  # (B, V), sorted; never the first
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    logprobs = logits.log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:  # inverse of the cumulative distribution: the first token at which it reaches u
        cdf = logprobs.exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


# -----------------------------------------------------------------------------
# log-probabilities without the logits


class TokenLogprobs(torch.autograd.Function):
    """Log-probability of each target, and entropy, from hidden states: a chunk of rows at a time, so that no more than
    CHUNK logits exist at once, forward or backward (which computes them again)."""
    CHUNK = 2**24  # logits: 64 MB of fp32

    @staticmethod
    def logits(hidden, weight, temperature):
        return F.linear(hidden, weight).float() / temperature

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        step = max(1, TokenLogprobs.CHUNK // weight.size(0))
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        lse, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)             # (N,)
        for i in range(0, len(hidden), step):
            part = slice(i, i + step)
            z = TokenLogprobs.logits(hidden[part], weight, temperature)                   # (step, V)
            lse[part] = z.logsumexp(-1)
            logprobs[part] = z.gather(1, targets[part, None])[:, 0] - lse[part]
            z -= lse[part, None]
            entropy[part] = -(z.exp() * z).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature, ctx.step = temperature, step
        return logprobs, entropy

    @staticmethod
    def backward(ctx, g, g_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), ctx.step):
            part = slice(i, i + ctx.step)
            z = TokenLogprobs.logits(hidden[part], weight, ctx.temperature) - lse[part, None]  # (step, V) log p
            p = z.exp()
            # d logprob = onehot - p;  d entropy = -p (log p + entropy)
            dz = -p * (g[part, None] + g_entropy[part, None] * (z + entropy[part, None]))
            dz.scatter_add_(1, targets[part, None], g[part, None])
            dz = (dz / ctx.temperature).to(hidden.dtype)
            d_hidden[part] = dz @ weight
            if d_weight is not None:
                d_weight += (dz.T @ hidden[part]).float()
        return d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype), None, None


def token_logprobs(hidden, weight, targets, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of that distribution, in float32.
    hidden (N, E), weight (V, E), targets (N,) long. Returns logprobs (N,), entropy (N,); both carry gradient."""
    return TokenLogprobs.apply(hidden, weight, targets, temperature)
