"""The hybrid engine: one model, two lives.

              training                                    generation
    HF module, ZeRO shards, autograd  --weights-->  a flat list of tensors, our own decoder
                                                         |
      prompts --> waiting --admit--> slots --prefill--> arena of K and V --decode--> decode --> ... --> tokens, logprobs
                     ^                                                     |
                     +------------- rows that end leave; their slots are taken again ------------+

  weights   by reference (`.data` of the training parameters): an optimizer step is seen at once and nothing is copied. Only what
            does not exist on this rank is copied, once a rollout: ZeRO-3 shards are gathered layer by layer, tensor-parallel ranks
            take their slice. LoRA stands beside the base weight, never in it.
  prefill   prompts lie end to end without padding; equal prompts are computed once.
  decode    one token for every live row. All bookkeeping (lengths, EOS, random numbers) is in tensors, so that a step needs no host;
            on a GPU it is one CUDA graph a batch size, which serves all lengths and outlives weight updates (same pointers).
  release   gives the arena and the copies back to training.

Nothing of transformers is patched or called: FAMILIES says where each family keeps its tensors and what it does differently. A
family that is not there raises; `--engine hf` is the slow path through `transformers.generate` that works for all of them.

Dimension key:  N packed tokens, B live rows, S slots, C capacity of a slot in tokens, L layers, H heads, K key/value heads,
                D head size, E width, V vocabulary, A longest answer.
"""
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

import kernels
from models import gathered, is_conv1d
from utils import UserError, print0

PREFILL_TOKENS = {"cuda": 16384, "cpu": 2048}  # at most so many packed tokens at once: bounds what activations take; on a CPU, fits its cache
LOOK = 8                # on a GPU the host looks at the done flags every so many steps
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100-SXM4-80GB": 2.04e12, "A100-SXM4-40GB": 1.56e12}  # bytes/s, NVIDIA's data sheets

# -----------------------------------------------------------------------------
# what the families differ in: where their tensors hang, and five choices


@dataclass(frozen=True)
class Family:
    root: str                      # the backbone in the HF module
    embed: str
    layers: str
    norm1: str                     # before attention
    qkv: tuple                     # one fused projection, or three
    out: str
    norm2: str                     # before the MLP
    up: str
    down: str
    final_norm: str
    gate: str = ""                 # gated MLP: down(act(gate) * up)
    positions: str = "rope"        # rope, learned, alibi
    rms: bool = False              # RMS norm, else layer norm
    fused: str = ""                # order of a fused projection's outputs: 3hd or h3d
    embed_positions: str = ""
    offset: int = 0                # of the learned positions
    qk_norms: tuple = ()           # norms of every head's q and k
    embed_norm: str = ""
    project: tuple = ()            # in and out of a narrower embedding (OPT-350M)


LLAMA = Family("model", "embed_tokens", "layers", "input_layernorm",
               ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", "post_attention_layernorm",
               "mlp.up_proj", "mlp.down_proj", "norm", gate="mlp.gate_proj", rms=True)
FAMILIES = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA,
    "qwen3": Family(**{**vars(LLAMA), "qk_norms": ("self_attn.q_norm", "self_attn.k_norm")}),
    "opt": Family("model.decoder", "embed_tokens", "layers", "self_attn_layer_norm",
                  ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj", "final_layer_norm",
                  "fc1", "fc2", "final_layer_norm", positions="learned", embed_positions="embed_positions", offset=2,
                  project=("project_in", "project_out")),
    "gpt2": Family("transformer", "wte", "h", "ln_1", ("attn.c_attn",), "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj", "ln_f",
                   positions="learned", embed_positions="wpe", fused="3hd"),
    "gpt_neox": Family("gpt_neox", "embed_in", "layers", "input_layernorm", ("attention.query_key_value",), "attention.dense",
                       "post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "final_layer_norm", fused="h3d"),
    "bloom": Family("transformer", "word_embeddings", "h", "input_layernorm", ("self_attention.query_key_value",),
                    "self_attention.dense", "post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "ln_f",
                    positions="alibi", fused="h3d", embed_norm="word_embeddings_layernorm"),
}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "bloom")
ACTIVATIONS = {"relu": torch.relu_, "silu": F.silu, "swish": F.silu, "gelu": F.gelu,
               **{name: lambda x: F.gelu(x, approximate="tanh") for name in TANH_GELU}}


class Linear(NamedTuple):
    """x @ weight.T + bias + scale * (x @ A.T) @ B.T"""
    weight: torch.Tensor           # (out, in), a view of the training weight
    bias: torch.Tensor | None
    lora: tuple | None = None      # A (r, in), B (out, r), scale

    def __call__(self, x, bias=True):
        y = kernels.linear(x, self.weight, self.bias if bias else None)
        if self.lora:
            A, B, scale = self.lora
            y = y + kernels.linear(kernels.linear(x, A), B) * scale
        return y


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool

    def __call__(self, x, residual=None):
        """(norm of residual + x, residual + x)"""
        return kernels.add_norm(x, residual, self.weight, self.bias, self.eps, self.rms)


class Layer(NamedTuple):
    norm1: Norm
    qkv: list
    out: Linear
    norm2: Norm
    up: Linear
    down: Linear
    gate: Linear | None
    qk_norms: list
    window: int                    # 0: sees everything


@dataclass
class Rollout:
    tokens: torch.Tensor           # (N, T) long, right-padded: prompt, then answer (its EOS included)
    prompt_lens: torch.Tensor      # (N,) long
    answer_lens: torch.Tensor      # (N,) long
    logprobs: torch.Tensor         # (N, A) float32, under the tempered policy, 0 past the end


def unwrap(model):
    """The HF causal LM inside a DeepSpeed engine, or inside a module that holds it as `.lm`."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "lm", None)
        if inner is None:
            return model
        model = inner


def get(module, path):
    for name in filter(None, path.split(".")):
        module = getattr(module, name, None)
    return module


def row_keys(seed, n):
    """One 32-bit key a row. seed: an int for the whole call (row i gets its own key), or one int a row. Returns (n,) long."""
    if isinstance(seed, int):
        return kernels.mix(torch.arange(n) + kernels.mix(torch.tensor(seed & 0xFFFFFFFF)) + (seed >> 32 & 0x7FFFFFFF))
    return kernels.mix(torch.tensor([s & 0xFFFFFFFF for s in seed]))


# -----------------------------------------------------------------------------
# the engine


class HybridEngine:
    """Generation from the weights that are being trained.

    model: a Hugging Face causal LM, or the DeepSpeed engine around one. tp: ranks that share a model (they must be neighbours);
    max_batch: most rows decoded at once; max_len: capacity of a row in tokens; kv_gib: size of the arena, GiB. None: planned from the
    call and from the memory that is free. Raises UserError (a ValueError) for a model that it cannot run.
    """

    def __init__(self, model, tp=1, max_batch=None, max_len=None, kv_gib=None):
        self.module = unwrap(model)
        self.config = c = self.module.config
        self.family = f = FAMILIES.get(c.model_type)
        self.max_batch, self.max_len, self.kv_gib = max_batch, max_len, kv_gib
        if f is None:
            raise UserError(f"the hybrid engine does not know the model type {c.model_type!r} (it knows {', '.join(FAMILIES)}); "
                            "use --engine hf, which is slower")
        act = getattr(c, "activation_function", None) or getattr(c, "hidden_act", None) or "bloom"
        rope = getattr(get(self.module, f.root), "rotary_emb", None)
        rope_type = getattr(rope, "rope_type", "default")
        for bad, what in ((act not in ACTIVATIONS, f"activation {act!r}"),
                          (rope_type in ("dynamic", "longrope"), f"rope scaling {rope_type!r}, which changes with the length"),
                          (getattr(c, "apply_residual_connection_post_layernorm", False), "a residual taken after the norm"),
                          (getattr(c, "scale_attn_by_inverse_layer_idx", False), "attention scaled by the layer"),
                          (getattr(c, "add_cross_attention", False), "cross attention")):
            if bad:
                raise UserError(f"the hybrid engine does not support {what} of this {c.model_type} model; use --engine hf")
        self.act = ACTIVATIONS[act]
        self.L, self.H = c.num_hidden_layers, c.num_attention_heads
        self.K = getattr(c, "num_key_value_heads", None) or self.H
        self.D = getattr(c, "head_dim", None) or c.hidden_size // self.H
        self.post_norm = not getattr(c, "do_layer_norm_before", True)   # OPT-350M
        self.parallel = getattr(c, "use_parallel_residual", False)      # attention and MLP read the same input (GPT-NeoX)
        self.scale = self.D ** -0.5 if getattr(c, "scale_attn_weights", True) else 1.0
        self.tp, self.group, self.tp_rank = tp, None, 0
        if tp > 1:
            self._init_tensor_parallel()
        self.k = self.v = self.weights = None
        self.stats, self.told, self.eos_tensors, self.addresses = {}, set(), {}, None
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._forget_graphs()

    def _init_tensor_parallel(self):
        tp, inner = self.tp, getattr(self.config, "intermediate_size", None) or getattr(self.config, "ffn_dim", None) or 4 * self.config.hidden_size
        world = dist.get_world_size() if dist.is_initialized() else 1
        for n, what in ((world, "ranks"), (self.H, "attention heads"), (self.K, "key/value heads"), (inner, "MLP columns")):
            if n % tp:
                raise UserError(f"tp={tp} does not divide the {n} {what}")
        for first in range(0, world, tp):  # every rank makes every group: new_group is collective
            group = dist.new_group(list(range(first, first + tp)))
            if first <= dist.get_rank() < first + tp:
                self.group, self.tp_rank = group, dist.get_rank() - first
        self.H, self.K = self.H // tp, self.K // tp

    # ---- weights ----

    def _linear(self, path_or_module, layer=None, part=None):
        """The Linear of a module. part: 'columns' (a slice of the outputs), 'rows' (of the inputs), 'heads' (of fused q, k, v)."""
        m = get(layer, path_or_module) if isinstance(path_or_module, str) else path_or_module
        lora = (m.lora_A, m.lora_B, m.scale) if hasattr(m, "lora_A") else None
        m = getattr(m, "base", m)
        weight, bias = m.weight.data, getattr(m, "bias", None)
        bias = bias.data if bias is not None else None
        if is_conv1d(m):
            weight = weight.T
        if part:
            weight, bias = self._slice(weight, part), bias if part == "rows" else self._slice(bias, part)
        if lora:
            A, B = lora[0].data, lora[1].data
            A, B = (self._slice(A, "rows"), self._take(B)) if part == "rows" else (self._take(A), self._slice(B, part))
            lora = (A, B, lora[2])
        return Linear(self._take(weight), self._take(bias), lora)

    def _slice(self, w, part):
        """This rank's share of a weight (out, in) or a bias (out,)."""
        if w is None or self.tp == 1 or part is None:
            return w
        if part == "heads" and self.family.fused:
            order = (3, self.H * self.tp, self.D) if self.family.fused == "3hd" else (self.H * self.tp, 3, self.D)
            heads = self.family.fused.index("h")
            return w.unflatten(0, order).chunk(self.tp, dim=heads)[self.tp_rank].flatten(0, 2)
        return w.chunk(self.tp, dim=1 if part == "rows" else 0)[self.tp_rank]

    def _take(self, w):
        """By reference where the training weight is whole and stays, else a copy: what is gathered goes when its layer is done."""
        return w.clone() if self.copies and w is not None else w

    def _norm(self, path, layer):
        m = get(layer, path)
        if m is None:
            return None
        eps = getattr(m, "variance_epsilon", None) or getattr(m, "eps", None)
        bias = getattr(m, "bias", None)
        return Norm(self._take(m.weight.data), None if bias is None else self._take(bias.data), eps, self.family.rms)

    def _collect(self):
        """References to (or, under ZeRO-3 and tensor parallelism, copies of) all weights, as a flat list of layers."""
        f, c, root = self.family, self.config, get(self.module, self.family.root)
        sharded = any(hasattr(p, "ds_id") for p in self.module.parameters())
        self.copies = sharded or self.tp > 1
        if self.copies and self.weights is not None:
            return  # copied for this rollout already
        windows = [0] * self.L
        if getattr(c, "sliding_window", None) and getattr(c, "use_sliding_window", True):
            kinds = getattr(c, "layer_types", None) or ["sliding_attention"] * self.L
            windows = [c.sliding_window if k == "sliding_attention" else 0 for k in kinds]
        self.weights = []
        for layer, window in zip(get(root, f.layers), windows):
            with gathered(*layer.parameters()):
                qkv = [self._linear(p, layer, "heads") for p in f.qkv]
                self.weights.append(Layer(
                    self._norm(f.norm1, layer), qkv, self._linear(f.out, layer, "rows"), self._norm(f.norm2, layer),
                    self._linear(f.up, layer, "columns"), self._linear(f.down, layer, "rows"),
                    self._linear(f.gate, layer, "columns") if f.gate else None, [self._norm(p, layer) for p in f.qk_norms], window))
        head = self.module.get_output_embeddings()
        rest = [get(root, p) for p in (f.embed, f.embed_positions, f.final_norm, f.embed_norm, *f.project) if p]
        with gathered(*(p for m in (head, *rest) if m is not None for p in m.parameters())):
            self.embed = self._take(get(root, f.embed).weight.data)                           # (V, E)
            self.embed_positions = self._take(get(root, f.embed_positions).weight.data) if f.embed_positions else None
            self.final_norm = self._norm(f.final_norm, root)
            self.embed_norm = self._norm(f.embed_norm, root) if f.embed_norm else None
            self.project = [self._linear(p, root) if get(root, p) is not None else None for p in f.project] or [None, None]
            tied = head.weight is get(root, f.embed).weight
            self.head = Linear(self.embed, None) if tied else self._linear(head)
        tensors = self._tensors()
        self.weight_bytes = sum(x.numel() * x.element_size() for x in tensors) - (0 if tied else self.embed.numel() * self.embed.element_size())
        addresses = tuple(x.data_ptr() for x in tensors)
        if addresses != self.addresses:  # an optimizer step keeps them; whatever moved the weights cost us the graphs
            self._forget_graphs()
            self.addresses = addresses

    def _tensors(self):
        """All weights of the decoder, in a fixed order."""
        def walk(x):
            if isinstance(x, torch.Tensor):
                yield x
            elif isinstance(x, (list, tuple)):
                for y in x:
                    yield from walk(y)
        return list({x.data_ptr(): x for x in walk([self.weights, self.embed, self.embed_positions, self.final_norm, self.embed_norm,
                                                    self.project, self.head])}.values())

    def _tables(self, C):
        """Cosines and sines of the rotary positions (C, R / 2) float32, or ALiBi's slopes (H,)."""
        self.cos = self.sin = self.slopes = None
        if self.family.positions == "rope":
            rope = get(self.module, self.family.root).rotary_emb
            angles = torch.arange(C, device=self.device).float()[:, None] * rope.inv_freq.float().to(self.device)
            scaling = getattr(rope, "attention_scaling", 1.0)  # yarn
            self.cos, self.sin = angles.cos() * scaling, angles.sin() * scaling
        elif self.family.positions == "alibi":  # Press et al. 2022: a geometric series; the odd steps of a finer one past a power of two
            H = self.config.num_attention_heads
            power = 2 ** (H.bit_length() - 1)
            slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
            slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(H - power)]
            self.slopes = torch.tensor(slopes, device=self.device).chunk(self.tp)[self.tp_rank]

    # ---- the decoder ----

    def _forward(self, tokens, positions, attend):
        """tokens, positions (N,); attend(layer index, window, q, k, v) -> (N, H, D) keeps the cache. Returns hidden states (N, E)."""
        x = F.embedding(tokens, self.embed)                                                   # (N, E)
        if self.project[0]:
            x = self.project[0](x)
        if self.embed_positions is not None:
            x = x + F.embedding(positions + self.family.offset, self.embed_positions)
        if self.embed_norm:
            x, _ = self.embed_norm(x)
        new, x = x, None  # x is the residual stream, new what the last half layer adds to it
        for i, w in enumerate(self.weights):
            if self.post_norm:
                x, _ = w.norm1(self._attention(i, w, new, attend), new)
                new, _ = w.norm2(self._mlp(w, x), x)
                continue
            h, x = w.norm1(new, x)
            a = self._attention(i, w, h, attend)
            if self.parallel:
                new = a + self._mlp(w, w.norm2(x)[0])
            else:
                h, x = w.norm2(a, x)
                new = self._mlp(w, h)
        if not self.post_norm and self.final_norm:
            new, _ = self.final_norm(new, x)
        elif not self.post_norm:
            new = x + new
        return self.project[1](new) if self.project[1] else new

    def _attention(self, i, w, h, attend):
        if len(w.qkv) == 3:
            q, k, v = (p(h).unflatten(-1, (-1, self.D)) for p in w.qkv)                       # (N, H or K, D)
        else:
            split, dim = ((3, self.H, self.D), 1) if self.family.fused == "3hd" else ((self.H, 3, self.D), 2)
            q, k, v = w.qkv[0](h).unflatten(-1, split).unbind(dim)                            # (N, H, D)
        if w.qk_norms:
            q, k = w.qk_norms[0](q)[0], w.qk_norms[1](k)[0]
        return self._sum(w.out, attend(i, w.window, q, k, v).flatten(1))

    def _mlp(self, w, h):
        h = self.act(w.gate(h)) * w.up(h) if w.gate else self.act(w.up(h))
        return self._sum(w.down, h)

    def _sum(self, linear, x):
        """A projection whose inputs are spread over the tensor-parallel ranks: the one collective of a half layer."""
        if self.tp == 1:
            return linear(x)
        y = linear(x, bias=False)
        dist.all_reduce(y, group=self.group)
        return y if linear.bias is None else y + linear.bias

    def _logits(self, hidden):
        return self.head(hidden)

    def _prefill(self, prompts, slots):
        """Computes prompts (lists of ids) into these slots; returns the logits after each, (len(prompts), V)."""
        lengths = torch.tensor([len(p) for p in prompts])
        cu = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(self.device)
        tokens = torch.tensor([t for p in prompts for t in p], device=self.device)            # (N,)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        where = torch.tensor(slots).repeat_interleave(lengths).to(self.device)

        def attend(i, window, q, k, v):
            q, k = kernels.rope_and_cache(q, k, v, self.k[i], self.v[i], where, positions, self.cos, self.sin)
            return kernels.prefill_attention(q, k, v, cu, self.scale, window, self.slopes)
        hidden = self._forward(tokens, positions, attend)
        return self._logits(hidden[cu[1:].long() - 1])

    def _decode(self, n):
        """One token for each of the first n slots. Reads and writes state tensors only: nothing here waits for the host."""
        at = self.at[:n]                                                                      # (n,) place of the newest token
        token = self.tokens[:n].gather(1, at[:, None])[:, 0]
        lengths = at + 1

        def attend(i, window, q, k, v):
            q, k = kernels.rope_and_cache(q, k, v, self.k[i], self.v[i], self.slots[:n], at, self.cos, self.sin)
            return kernels.decode_attention(q, self.k[i], self.v[i], lengths, self.scale, window, self.slopes)
        self._append(self._logits(self._forward(token, at, attend)), self.slots[:n])

    def _step(self, n):
        """_decode, on a GPU as the replay of a graph. The batch is rounded up, so that few graphs serve all sizes; the slots past n are
        marked done, and compute what nobody reads. The first step of a size runs as it is (kernels compile), the second is captured."""
        if self.device.type != "cuda" or self.tp > 1:  # a collective inside a graph is left to a day when it can be tried
            return self._decode(n)
        n = min(1 << (n - 1).bit_length() if n <= 8 else -(-n // 8) * 8 if n <= 64 else -(-n // 32) * 32, self.k.size(1))
        key = (n, self.sampling, self.eos.data_ptr())
        if key not in self.graphs:
            self.graphs[key] = None
            return self._decode(n)
        if self.graphs[key] is None:
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool):
                self._decode(n)
        self.graphs[key].replay()

    def _append(self, logits, slots):
        """Samples for rows that are not done, and writes token, log-probability and whether that ends the row."""
        at, live = self.at[slots], ~self.done[slots]
        new, logprob = kernels.sample(logits, kernels.uniform(self.keys[slots], at + 1), *self.sampling)
        at = at + live                                                                        # a row that is done stays where it is
        self.tokens[slots, at] = torch.where(live, new, self.tokens[slots, at])
        self.logprobs[slots, at] = torch.where(live, logprob, self.logprobs[slots, at])
        self.at[slots] = at
        self.done[slots] |= (new[:, None] == self.eos).any(1) | (at >= self.last[slots])      # not isin: of many ids it would sort, which no graph can

    # ---- scheduling ----

    def _arena(self, rows, C):
        """Memory for K and V of as many rows as fit, (L, S, K, C, D) each, and the state of each slot."""
        dtype = self.embed.dtype
        slot = 2 * self.L * self.K * C * self.D * dtype.itemsize
        if self.k is not None and self.k.size(3) == C and (self.k.size(1) >= rows or self.k.size(1) == self.full):
            return
        self._free_arena()
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        else:
            free = psutil.virtual_memory().available
        if self.tp > 1:  # ranks of a group make the same steps, so they plan with the memory of the one that has least
            least = torch.tensor(free, dtype=torch.float64, device=self.device)
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
            free = least.item()
        budget = self.kv_gib * 2**30 if self.kv_gib else 0.8 * free
        self.full = max(1, min(int(budget // slot), self.max_batch or 2**31))
        if slot > budget:
            raise UserError(f"one row of {C} tokens needs {slot / 2**30:.3f} GiB for its keys and values, and the arena has "
                            f"{budget / 2**30:.3f} GiB; shorten the prompts or answers" + (", or raise kv_gib" if self.kv_gib else ""))
        S = min(rows, self.full)
        plan = (f"engine: arena of {S} rows x {C} tokens, {S * slot / 2**30:.3f} GiB of {free / 2**30:.1f} GiB free"
                + (f"; {rows} rows go through it as others end" if S < rows else ""))
        if (S, C) not in self.told:  # say what will be taken, once a size
            print0(plan)
            self.told.add((S, C))
        device = self.device
        self.k = torch.zeros(self.L, S, self.K, C, self.D, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.tokens = torch.zeros(S, C, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(S, C, device=device)
        self.at, self.last, self.keys = (torch.zeros(S, dtype=torch.long, device=device) for _ in range(3))
        self.done = torch.ones(S, dtype=torch.bool, device=device)
        self.slots = torch.arange(S, device=device)
        self._tables(C)

    def _admit(self, rows, slots, prompts, max_new_tokens, keys):
        """Puts waiting rows into free slots: prefill, and their first token. Rows with equal prompts share the computation. Returns the
        number of tokens computed."""
        twins = {}
        for row, slot in zip(rows, slots):
            twins.setdefault(tuple(prompts[row]), []).append((row, slot))
        unique = sorted(twins, key=len)                        # equal lengths next to each other share an attention call
        homes = [twins[p][0][1] for p in unique]
        logits = self._prefill(unique, homes)                  # (unique, V)
        order = [(row, slot, i) for i, p in enumerate(unique) for row, slot in twins[p]]
        for p, home in zip(unique, homes):
            if len(twins[p]) > 1:
                copies = [slot for _, slot in twins[p][1:]]
                self.k[:, copies, :, : len(p)] = self.k[:, home, :, : len(p)].unsqueeze(1)
                self.v[:, copies, :, : len(p)] = self.v[:, home, :, : len(p)].unsqueeze(1)
        slots = torch.tensor([s for _, s, _ in order], device=self.device)
        lengths = torch.tensor([len(prompts[r]) for r, _, _ in order], device=self.device)
        for row, slot, _ in order:
            self.tokens[slot, : len(prompts[row])] = torch.tensor(prompts[row], device=self.device)
        self.at[slots] = lengths - 1
        self.last[slots] = lengths - 1 + max_new_tokens
        self.keys[slots] = keys[[r for r, _, _ in order]].to(self.device)
        self.done[slots] = False
        self._append(logits[[i for _, _, i in order]], slots)
        return sum(map(len, unique))

    def _move(self, src, dst):
        """Rows of the slots src now live in dst: live rows stay the first n slots, which decode reads without an index."""
        T = int(self.at[src].max()) + 1
        self.k[:, dst, :, :T] = self.k[:, src, :, :T]
        self.v[:, dst, :, :T] = self.v[:, src, :, :T]
        for x in (self.tokens, self.logprobs, self.at, self.last, self.keys, self.done):
            x[dst] = x[src]

    def _run(self, prompts, max_new_tokens, keys):
        """Continuous batching. A generator that yields (row, slot) when a row ends, and None after every look at the flags."""
        waiting, rows = deque(range(len(prompts))), []         # rows[slot]: who lives there; live slots are the first len(rows)
        S = self.k.size(1)
        look = LOOK if self.device.type == "cuda" else 1
        while waiting or rows:
            # A prefill of few rows costs as much as one of many: wait until an eighth of the slots is free.
            while waiting and S - len(rows) >= min(len(waiting), max(1, S // 8)):
                new, size = [], 0
                while waiting and len(rows) + len(new) < S and (not new or size + len(prompts[waiting[0]]) <= PREFILL_TOKENS[self.device.type]):
                    size += len(prompts[waiting[0]])
                    new.append(waiting.popleft())
                start = time.perf_counter()
                computed = self._admit(new, range(len(rows), len(rows) + len(new)), prompts, max_new_tokens, keys)
                rows += new
                self._clock("prefill", start, computed)
            done, start = self.done[: len(rows)].tolist(), time.perf_counter()
            if not any(done):
                for _ in range(look):
                    self._step(len(rows))
                self.stats["decode_steps"] += look
                self._clock("decode", start, 0)
                done = self.done[: len(rows)].tolist()
            ended = [s for s, d in enumerate(done) if d]
            for slot in ended:
                yield rows[slot], slot
            yield None
            n = len(rows) - len(ended)
            holes, movers = [s for s in ended if s < n], [s for s in range(n, len(rows)) if not done[s]]
            if holes:
                self._move(movers, holes)
                for hole, mover in zip(holes, movers):
                    rows[hole] = rows[mover]
            self.done[n : len(rows)] = True
            del rows[n:]

    def _clock(self, phase, start, tokens):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.stats[f"{phase}_s"] += time.perf_counter() - start
        self.stats[f"{phase}_tokens"] += tokens

    # ---- what callers use ----

    def _start(self, prompts, max_new_tokens, temperature, top_k, top_p, eos_token_id, seed):
        """Checks everything before anything runs; returns the keys of the rows."""
        limit = getattr(self.config, "max_position_embeddings", None) if self.family.positions != "alibi" else None
        longest = max(map(len, prompts), default=0)
        if not prompts or not all(prompts):
            raise UserError("there is no prompt" if not prompts else f"prompt {[len(p) for p in prompts].index(0)} is empty: give at least one token")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise UserError(f"temperature {temperature} and top_k {top_k} must not be negative, and top_p {top_p} must be in (0, 1]")
        for most, what in ((limit, "the model's context"), (self.max_len, "max_len")):
            if most and longest + max_new_tokens > most:
                i = [len(p) for p in prompts].index(longest)
                raise UserError(f"prompt {i} has {longest} tokens; with {max_new_tokens} new ones that is more than {what} of {most}")
        vocab = self.config.vocab_size
        if not all(0 <= t < vocab for p in prompts for t in p):
            raise UserError(f"a prompt holds a token id outside the vocabulary of {vocab}: is it another model's tokenizer?")
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        self.stats = dict.fromkeys(("gather_s", "prefill_s", "decode_s"), 0.0) | dict.fromkeys(("prefill_tokens", "decode_tokens", "decode_steps"), 0)
        start = time.perf_counter()
        self._collect()
        if self.copies and self.device.type == "cuda":
            torch.cuda.synchronize()
        self.stats["gather_s"] = time.perf_counter() - start if self.copies else 0.0
        self.sampling = (temperature, top_k, top_p)
        eos = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        self.eos = self.eos_tensors.setdefault(eos, torch.tensor(eos, dtype=torch.long, device=self.device))  # graphs hold its address
        need = longest + max_new_tokens
        self._arena(min(len(prompts), self.max_batch or len(prompts)), self.max_len or -(-need // 32) * 32)
        return row_keys(seed, len(prompts))

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, seed=None):
        """Samples an answer to every prompt.

        prompts: lists of token ids, ragged, any number. temperature 0 is greedy. eos_token_id: an id, a list of ids, or None (every
        answer has max_new_tokens). seed: an int, or one int a row; the same seed gives the same tokens, however rows are batched.
        Returns a Rollout in the prompts' order, on the engine's device. Raises UserError before anything runs.
        """
        prompts = [list(map(int, p)) for p in prompts]
        mine = slice(0, len(prompts))
        if self.tp > 1:  # the ranks of a group answer all their prompts together
            seed = [int(torch.randint(2**62, ())) for _ in prompts] if seed is None else row_keys(seed, len(prompts)).tolist() \
                if isinstance(seed, int) else list(seed)
            everyone = [None] * self.tp
            dist.all_gather_object(everyone, (prompts, seed), group=self.group)
            first = sum(len(p) for p, _ in everyone[: self.tp_rank])
            mine = slice(first, first + len(prompts))
            prompts, seed = sum((p for p, _ in everyone), []), sum((s for _, s in everyone), [])
        keys = self._start(prompts, max_new_tokens, temperature, top_k, top_p, eos_token_id, seed)
        tokens, logprobs = [None] * len(prompts), [None] * len(prompts)
        for event in self._run(prompts, max_new_tokens, keys):
            if event:
                row, slot = event
                end = int(self.at[slot]) + 1
                tokens[row] = self.tokens[slot, :end].clone()
                logprobs[row] = self.logprobs[slot, len(prompts[row]) : end].clone()
        prompts, tokens, logprobs = prompts[mine], tokens[mine], logprobs[mine]
        pad = torch.nn.utils.rnn.pad_sequence
        lens = torch.tensor([len(p) for p in prompts], device=self.device)
        answers = torch.tensor([len(x) for x in logprobs], device=self.device)
        self.stats["decode_tokens"] += int(answers.sum())
        # What decode had to read: all weights every step, and every row's keys and values at each of its lengths.
        token = 2 * self.L * self.K * self.D * self.k.element_size()
        moved = self.stats["decode_steps"] * self.weight_bytes + token * int(((lens + answers / 2) * answers).sum())
        self.stats.update(kv_bytes=2 * self.k.numel() * self.k.element_size(), gb_per_s=moved / max(self.stats["decode_s"], 1e-9) / 1e9)
        if peak := next((b for name, b in BANDWIDTH.items() if self.device.type == "cuda" and name in torch.cuda.get_device_name()), None):
            self.stats["floor_share"] = self.stats["gb_per_s"] * 1e9 / peak  # 1: as fast as memory can be read
        return Rollout(pad(tokens, batch_first=True), lens, answers, pad(logprobs, batch_first=True))

    @torch.no_grad()
    def stream(self, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, seed=None):
        """Yields the token ids of one answer as they are sampled (its EOS too)."""
        keys = self._start([prompt], max_new_tokens, temperature, top_k, top_p, eos_token_id, seed)
        at = len(prompt)
        for _ in self._run([prompt], max_new_tokens, keys):
            end = int(self.at[0]) + 1
            yield from self.tokens[0, at:end].tolist()
            at = end

    def _forget_graphs(self):
        """NOTE: a pool whose graphs are all gone takes no new ones while cuBLAS keeps its workspace in it (torch 2.11): the next have a pool of their own."""
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def _free_arena(self):
        self._forget_graphs()
        self.k = self.v = self.tokens = self.logprobs = None

    def release(self):
        """Gives the arena, and the copies of ZeRO-3 and tensor-parallel weights, back."""
        self._free_arena()
        self.weights = self.embed = self.embed_positions = self.final_norm = self.embed_norm = self.head = self.project = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# the slow path


class HFEngine:
    """`transformers.generate` behind the same interface, for models that FAMILIES does not know: left-padded, no batching of its own,
    under ZeRO-3 a gather of every layer for every token. One seed a call: here randomness belongs to the call, not to the row."""

    def __init__(self, model):
        self.module, self.stats = unwrap(model), {}
        self.sharded = any(hasattr(p, "ds_id") for p in self.module.parameters())

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, seed=None):
        """See HybridEngine.generate."""
        from transformers import GenerationConfig, LogitsProcessorList
        start, device = time.perf_counter(), next(self.module.parameters()).device
        lens = torch.tensor([len(p) for p in prompts], device=device)
        width, eos = int(lens.max()), [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
        ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        for row, p in zip(ids, prompts):
            row[width - len(p) :] = torch.tensor(p, device=device)
        mask = (torch.arange(width, device=device) >= width - lens[:, None]).long()
        how = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=temperature > 0, eos_token_id=eos or None, pad_token_id=0, num_beams=1,
                               **(dict(temperature=1.0, top_k=0, top_p=1.0) if temperature > 0 else {}))
        said, logprobs = [], []  # the distribution of the step before; what its token had there

        def temper(ids, logits):  # ours and not transformers' own: kept for a step, not (A, B, V) of them
            logprobs.extend(z.gather(1, ids[:, -1:]) for z in said)
            said[:] = [kernels.keep_likely(logits.float() / (temperature or 1), top_k, top_p).log_softmax(-1)]
            return said[0]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if seed is not None:
                torch.manual_seed(int(row_keys(seed, 1)[0] if isinstance(seed, int) else kernels.mix(row_keys(seed, len(seed)).sum())))
            # NOTE: while it trains with recomputing, transformers drops the cache; and what `how` leaves open it takes from the model's own settings, such as a
            # repetition penalty, and then samples from another distribution than the one that is trained.
            training, own = self.module.training, self.module.generation_config
            try:
                self.module.eval().generation_config = GenerationConfig()
                out = self.module.generate(ids, attention_mask=mask, generation_config=how, synced_gpus=self.sharded, logits_processor=LogitsProcessorList([temper]))
            finally:
                self.module.train(training).generation_config = own
        answers = out[:, width:]                                                              # (N, A)
        logprobs = torch.cat([*logprobs, said[0].gather(1, answers[:, -1:])], 1)              # (N, A)
        ended = torch.isin(answers, torch.tensor(eos, dtype=torch.long, device=device))
        answer_lens = torch.where(ended.any(1), ended.int().argmax(1) + 1, answers.size(1))
        A = int(answer_lens.max())
        live = torch.arange(A, device=device) < answer_lens[:, None]
        rows = [torch.cat([torch.tensor(p, device=device), a[:n]]) for p, a, n in zip(prompts, answers, answer_lens)]
        self.stats = {"generate_s": time.perf_counter() - start, "decode_tokens": int(answer_lens.sum())}
        return Rollout(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lens, answer_lens, logprobs[:, :A] * live)

    def stream(self, prompt, *args, **kwargs):
        yield from self.generate([prompt], *args, **kwargs).tokens[0, len(prompt) :].tolist()

    def release(self):
        pass


def make_engine(name, model, tp=1):
    """--engine: 'hybrid', or 'hf' for the slow path."""
    if name == "hf" and tp > 1:
        raise UserError("--tp needs --engine hybrid")
    return HFEngine(model) if name == "hf" else HybridEngine(model, tp)
