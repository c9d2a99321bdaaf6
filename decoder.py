"""The decoder of the hybrid engine: the weights that are being trained, in a forward of our own.

FAMILIES says where each model family of transformers keeps its tensors, and what it does
differently. Decoder reads the tensors of a Hugging Face module into a flat list of layers:

  by reference   `.data` of the training parameters. Nothing is copied, and an optimizer step is
                 visible at once. LoRA stays beside the base weight and is never merged into it.
  as copies      only what this rank does not hold as it needs it: ZeRO-3 shards are gathered
                 layer by layer, tensor-parallel ranks take their slices. Once per rollout.

Prefill and decode share one forward. They differ in `attend`, a function that the engine passes
in, because the engine owns the KV cache. Nothing of transformers is patched or called.

Dimension key:  N tokens, H heads, K key/value heads, D head size, E width, V vocabulary,
                C capacity of the KV cache in tokens, R rotated features of a head.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import kernels
from models import gathered, is_conv1d
from utils import UserError

# -----------------------------------------------------------------------------
# blocks: how norms, attention, MLP and residual stream are put together in a layer
#
# A block takes and returns delta and residual, (N, E) each. The residual stream is their sum: delta
# is the output of the last half layer and not yet added, because the sum and the norm that follows
# are one kernel. Before the first layer residual is None. attention and mlp are functions of h.


def pre_norm(layer, delta, residual, attention, mlp):
    h, residual = layer.norm1(delta, residual)
    delta = attention(h)
    h, residual = layer.norm2(delta, residual)
    return mlp(h), residual


def parallel(layer, delta, residual, attention, mlp):
    """GPT-NeoX: attention and MLP read the same input."""
    h, residual = layer.norm1(delta, residual)
    delta = attention(h)
    h, _ = layer.norm2(residual)
    return delta + mlp(h), residual


def post_norm(layer, x, residual, attention, mlp):
    """OPT-350M: the norm comes after the sum, so x is the whole stream and residual stays None."""
    x, _ = layer.norm1(attention(x), x)
    x, _ = layer.norm2(mlp(x), x)
    return x, None


def norm_of_output(layer, delta, residual, attention, mlp):
    """OLMo-2: what attention and MLP return is normed before it joins the residual stream."""
    x = delta if residual is None else residual + delta
    delta, _ = layer.norm1(attention(x))
    x = x + delta
    delta, _ = layer.norm2(mlp(x))
    return delta, x


# -----------------------------------------------------------------------------
# families: where their tensors are, and what they do differently


@dataclass(frozen=True)
class Family:
    """Module paths are relative to the backbone, those of a layer's parts to the layer."""
    backbone: str                   # in the causal LM
    embed: str
    layers: str
    norm1: str                      # of the attention half of a layer
    qkv: tuple                      # three projections, or one that holds all of them
    out: str
    norm2: str                      # of the MLP half
    up: str
    down: str
    final_norm: str
    gate: str = ""                  # gated MLP: down(act(gate(h)) * up(h)); equal to up: stacked
    qkv_order: str = ""             # of one projection: "stacked", or "by head" (q, k, v of each)
    qk_norms: tuple = ()            # norms of q and k, of each head or of all heads together
    rms: bool = False               # RMS norms; otherwise layer norms
    positions: str = "rope"         # "rope", "learned" or "alibi"
    embed_positions: str = ""       # learned positions
    position_offset: int = 0        # of the learned positions
    embed_norm: str = ""
    project_in: str = ""            # from a narrower embedding, and back to it (OPT-350M)
    project_out: str = ""
    block: Callable = pre_norm


LLAMA = Family(
    backbone="model",
    embed="embed_tokens",
    layers="layers",
    norm1="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    norm2="post_attention_layernorm",
    up="mlp.up_proj",
    down="mlp.down_proj",
    final_norm="norm",
    gate="mlp.gate_proj",
    rms=True,
)
OPT = Family(
    backbone="model.decoder",
    embed="embed_tokens",
    layers="layers",
    norm1="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    norm2="final_layer_norm",
    up="fc1",
    down="fc2",
    final_norm="final_layer_norm",
    positions="learned",
    embed_positions="embed_positions",
    position_offset=2,
    project_in="project_in",
    project_out="project_out",
)
GPT2 = Family(
    backbone="transformer",
    embed="wte",
    layers="h",
    norm1="ln_1",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    norm2="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    final_norm="ln_f",
    qkv_order="stacked",
    positions="learned",
    embed_positions="wpe",
)
GPT_NEOX = Family(
    backbone="gpt_neox",
    embed="embed_in",
    layers="layers",
    norm1="input_layernorm",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    norm2="post_attention_layernorm",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    final_norm="final_layer_norm",
    qkv_order="by head",
)
BLOOM = Family(
    backbone="transformer",
    embed="word_embeddings",
    layers="h",
    norm1="input_layernorm",
    qkv=("self_attention.query_key_value",),
    out="self_attention.dense",
    norm2="post_attention_layernorm",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    final_norm="ln_f",
    qkv_order="by head",
    positions="alibi",
    embed_norm="word_embeddings_layernorm",
)
QWEN3 = replace(LLAMA, qk_norms=("self_attn.q_norm", "self_attn.k_norm"))
OLMO2 = replace(
    QWEN3,
    norm1="post_attention_layernorm",
    norm2="post_feedforward_layernorm",
    block=norm_of_output,
)
PHI3 = replace(
    LLAMA,
    qkv=("self_attn.qkv_proj",),
    qkv_order="stacked",
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "smollm3": LLAMA,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "opt": OPT,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "bloom": BLOOM,
}


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "relu": torch.relu_,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "bloom": gelu_tanh,
}


# -----------------------------------------------------------------------------
# weights


class Adapter(NamedTuple):
    A: torch.Tensor                 # (r, in)
    B: torch.Tensor                 # (out, r)
    scale: float


class Linear(NamedTuple):
    """x @ weight.T + bias + scale * (x @ A.T) @ B.T"""
    weight: torch.Tensor            # (out, in), a view of the training weight
    bias: torch.Tensor | None       # (out,)
    lora: Adapter | None

    def __call__(self, x, bias=True):
        y = kernels.linear(x, self.weight, self.bias if bias else None)
        if self.lora is not None:
            A, B, scale = self.lora
            y = y + kernels.linear(kernels.linear(x, A), B) * scale
        return y

    def outputs(self, part):
        """The same projection with some of its outputs (a slice): views, no copy."""
        bias = self.bias
        lora = self.lora
        if bias is not None:
            bias = bias[part]
        if lora is not None:
            lora = lora._replace(B=lora.B[part])
        return Linear(self.weight[part], bias, lora)

    def inputs(self, part):
        """The same projection of some of its inputs (a slice). Its bias stays whole."""
        lora = self.lora
        if lora is not None:
            lora = lora._replace(A=lora.A[:, part])
        return Linear(self.weight[:, part], self.bias, lora)


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool

    def __call__(self, x, residual=None):
        """Returns the norm of residual + x, and residual + x."""
        return kernels.add_norm(x, residual, self.weight, self.bias, self.eps, self.rms)

    def of_heads(self, x):
        """The norm of each head, or of all heads together, as the width of the weight says.
        x (N, heads, D)"""
        width = len(self.weight)
        normed, _ = self(x.reshape(len(x), -1, width))
        return normed.view_as(x)


class Layer(NamedTuple):
    index: int
    norm1: Norm
    qkv: list                       # three Linears, or one
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    norm2: Norm
    gate: Linear | None
    up: Linear
    down: Linear
    rotary: bool                    # whether positions turn its queries and keys
    spec: kernels.AttentionSpec


def unwrap(model):
    """The HF causal LM inside a DeepSpeed engine, or inside a module that holds it as `.lm`."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "lm", None)
        if inner is None:
            return model
        model = inner


def submodule(module, path):
    """The module at a dotted path, or None where there is none."""
    if not path:
        return None
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def read_linear(module):
    """A Linear that refers to the weights of a module: nn.Linear, Conv1D, LoRA or None."""
    if module is None:
        return None
    lora = None
    if hasattr(module, "lora_A"):
        lora = Adapter(module.lora_A.data, module.lora_B.data, module.scale)
        module = module.base
    weight = module.weight.data
    if is_conv1d(module):
        weight = weight.T
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias = bias.data
    return Linear(weight, bias, lora)


def read_norm(module, rms):
    """A Norm that refers to the weights of a module, or None."""
    if module is None:
        return None
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias = bias.data
    return Norm(module.weight.data, bias, eps, rms)


def tensors_in(x):
    """Yields every tensor in nested lists and tuples."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from tensors_in(item)


def copied(x):
    """The same nested lists and NamedTuples, with a copy of every tensor."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    if isinstance(x, list):
        return [copied(item) for item in x]
    if isinstance(x, tuple):
        return x._make(copied(item) for item in x)
    return x


def attention_window(config, index):
    """How many keys a query of this layer sees; 0 where it sees all."""
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return 0
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] != "sliding_attention":
        return 0
    return window


def has_rotary(family, config, index):
    """Whether positions turn the queries and keys of this layer."""
    if family.positions != "rope":
        return False
    with_rope = getattr(config, "no_rope_layers", None)  # SmolLM3; 1 means with, 0 without
    return not with_rope or bool(with_rope[index])


def alibi_slopes(H):
    """Press et al. 2022: a geometric series; past a power of two, every other step of a finer
    one. Returns H floats."""
    power = 2 ** (H.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(H - power)]
    return slopes


# -----------------------------------------------------------------------------
# the decoder


def activation_name(config):
    name = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    return name or "bloom"  # whose config does not say


def check_supported(module):
    """Raises UserError for a model that Decoder would compute wrongly, or not at all."""
    config = module.config
    kind = config.model_type
    if kind not in FAMILIES:
        message = (
            f"the hybrid engine does not know the model type {kind!r} "
            f"(it knows {', '.join(FAMILIES)}); use --engine hf, which is slower")
        raise UserError(message)

    unsupported = None
    activation = activation_name(config)
    if activation not in ACTIVATIONS:
        unsupported = f"activation {activation!r}"
    rope = getattr(submodule(module, FAMILIES[kind].backbone), "rotary_emb", None)
    rope_type = getattr(rope, "rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        unsupported = f"rope scaling {rope_type!r}, which changes with the length"
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        unsupported = "a residual taken after the norm"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        unsupported = "attention scaled by the layer"
    if getattr(config, "add_cross_attention", False):
        unsupported = "cross attention"
    if unsupported:
        message = (
            f"the hybrid engine does not support {unsupported} of this {kind} model; "
            "use --engine hf")
        raise UserError(message)


class Decoder:
    """The forward of a causal LM on the weights that are being trained.

    model: a Hugging Face causal LM, or the DeepSpeed engine around one. tp: how many neighbouring
    ranks share the model. Raises UserError (a ValueError) for a model that it cannot run.
    """

    def __init__(self, model, tp=1):
        self.module = unwrap(model)
        self.config = self.module.config
        check_supported(self.module)
        config = self.config
        self.family = FAMILIES[config.model_type]
        self.backbone = submodule(self.module, self.family.backbone)
        self.activation = ACTIVATIONS[activation_name(config)]
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads           # tensor parallelism: of this rank
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim = getattr(config, "head_dim", None)
        if not self.head_dim:
            self.head_dim = config.hidden_size // self.num_heads
        self.scale = self.head_dim**-0.5
        if not getattr(config, "scale_attn_weights", True):
            self.scale = 1.0
        self.block = self.family.block
        if not getattr(config, "do_layer_norm_before", True):
            self.block = post_norm
        if getattr(config, "use_parallel_residual", False):
            self.block = parallel

        self.layers = None                                    # until load()
        self.slopes = self.cos = self.sin = None
        self.tp = tp
        self.tp_rank = 0
        self.group = None
        if tp > 1:
            self.init_tensor_parallel()

    def init_tensor_parallel(self):
        config = self.config
        tp = self.tp
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
        counts = {
            "ranks": dist.get_world_size() if dist.is_initialized() else 1,
            "attention heads": self.num_heads,
            "key/value heads": self.num_kv_heads,
            "MLP columns": inner or 4 * config.hidden_size,
        }
        for what, n in counts.items():
            if n % tp:
                raise UserError(f"tp={tp} does not divide the {n} {what}")
        for first in range(0, counts["ranks"], tp):
            # A collective: every rank makes every group.
            group = dist.new_group(list(range(first, first + tp)))
            if first <= dist.get_rank() < first + tp:
                self.group = group
                self.tp_rank = dist.get_rank() - first
        self.num_heads //= tp
        self.num_kv_heads //= tp

    # ---- loading ----

    def load(self):
        """Refers to all weights. Under ZeRO-3 and tensor parallelism it copies them, unless there
        are copies already: until release()."""
        sharded = any(hasattr(p, "ds_id") for p in self.module.parameters())
        self.copies = sharded or self.tp > 1
        if self.copies and self.layers is not None:
            return
        self.load_ends()
        self.device = self.embed.device
        if self.family.positions == "alibi" and self.slopes is None:
            slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads))
            self.slopes = slopes[self.share(len(slopes))].to(self.device)     # (H,)
        self.layers = []
        for index, layer in enumerate(submodule(self.backbone, self.family.layers)):
            with gathered(*layer.parameters()):
                self.layers.append(self.keep(self.load_layer(index, layer)))

        self.weight_bytes = sum(x.numel() * x.element_size() for x in self.weights())
        if self.head is not self.embed:  # a token reads one row of the embedding
            self.weight_bytes -= self.embed.numel() * self.embed.element_size()

    def keep(self, weights):
        """Copies weights that do not last: what ZeRO-3 gathers is freed after `with gathered`."""
        return copied(weights) if self.copies else weights

    def load_ends(self):
        """What comes before the first layer and after the last one."""
        family = self.family
        get = partial(submodule, self.backbone)
        embed = get(family.embed)
        embed_positions = get(family.embed_positions)
        embed_norm = get(family.embed_norm)
        final_norm = get(family.final_norm)
        project_in = get(family.project_in)
        project_out = get(family.project_out)
        head = self.module.get_output_embeddings()

        modules = (embed, embed_positions, embed_norm, final_norm, project_in, project_out, head)
        params = [p for m in modules if m is not None for p in m.parameters()]
        with gathered(*params):
            self.embed = self.keep(embed.weight.data)                         # (V, E)
            self.embed_positions = None
            if embed_positions is not None:
                self.embed_positions = self.keep(embed_positions.weight.data)
            self.embed_norm = self.keep(read_norm(embed_norm, family.rms))
            self.final_norm = self.keep(read_norm(final_norm, family.rms))
            self.project_in = self.keep(read_linear(project_in))
            self.project_out = self.keep(read_linear(project_out))
            assert getattr(head, "bias", None) is None, "decoder: an output layer with a bias"
            self.head = self.embed                                            # tied
            if head.weight is not embed.weight:
                self.head = self.keep(head.weight.data)                       # (V, E)

    def load_layer(self, index, layer):
        """The Layer of one layer's module: this rank's part of it, by reference."""
        family = self.family

        def linear(path):
            return read_linear(submodule(layer, path))

        def norm(path):
            return read_norm(submodule(layer, path), family.rms)

        q_norm = k_norm = gate = None
        if family.qk_norms:
            q_norm, k_norm = map(norm, family.qk_norms)
        qkv = [linear(path) for path in family.qkv]
        out = linear(family.out)
        up = linear(family.up)
        down = linear(family.down)
        if family.gate == family.up:  # stacked, the gate first
            half = len(up.weight) // 2
            gate = up.outputs(slice(0, half))
            up = up.outputs(slice(half, None))
        elif family.gate:
            gate = linear(family.gate)

        if self.tp > 1:  # columns, then rows: one sum over ranks for each half layer
            qkv = self.slice_qkv(qkv, q_norm)
            out = out.inputs(self.share(out.weight.size(1)))
            up = self.slice_outputs(up)
            gate = gate and self.slice_outputs(gate)
            down = down.inputs(self.share(down.weight.size(1)))

        return Layer(
            index=index,
            norm1=norm(family.norm1),
            qkv=qkv,
            q_norm=q_norm,
            k_norm=k_norm,
            out=out,
            norm2=norm(family.norm2),
            gate=gate,
            up=up,
            down=down,
            rotary=has_rotary(family, self.config, index),
            spec=kernels.AttentionSpec(
                self.scale, attention_window(self.config, index), self.slopes),
        )

    def share(self, n):
        """Which of n outputs, inputs or heads belong to this rank."""
        return slice(n * self.tp_rank // self.tp, n * (self.tp_rank + 1) // self.tp)

    def slice_outputs(self, linear):
        return linear.outputs(self.share(len(linear.weight)))

    def slice_qkv(self, qkv, q_norm):
        if q_norm is not None and len(q_norm.weight) > self.head_dim:
            return qkv  # OLMo-2's norm needs all heads; qkv() slices them after it
        if self.family.qkv_order == "stacked":  # a rank needs its share of each of the three
            q = self.num_heads * self.tp * self.head_dim
            k = self.num_kv_heads * self.tp * self.head_dim
            parts = (slice(0, q), slice(q, q + k), slice(q + k, None))
            qkv = [qkv[0].outputs(part) for part in parts]
        return [self.slice_outputs(linear) for linear in qkv]

    def build_rotary(self, capacity):
        """Cosines and sines of the positions below capacity, (C, R / 2) float32."""
        if self.family.positions != "rope":
            return
        if self.cos is not None and len(self.cos) == capacity:
            return
        rope = self.backbone.rotary_emb
        positions = torch.arange(capacity, device=self.device).float()
        angles = positions[:, None] * rope.inv_freq.float().to(self.device)   # (C, R / 2)
        scaling = getattr(rope, "attention_scaling", 1.0)  # of YaRN
        self.cos = angles.cos() * scaling
        self.sin = angles.sin() * scaling

    def weights(self):
        """All tensors of the weights, each once."""
        parts = [
            self.layers, self.embed, self.embed_positions, self.embed_norm, self.final_norm,
            self.project_in, self.project_out, self.head,
        ]
        return list({x.data_ptr(): x for x in tensors_in(parts)}.values())

    def tensors(self):
        """All tensors that a forward reads, weights and tables."""
        return self.weights() + list(tensors_in([self.cos, self.sin]))

    def release(self):
        """Drops all weights: copies give their memory back."""
        self.layers = self.embed = self.embed_positions = self.embed_norm = None
        self.final_norm = self.project_in = self.project_out = self.head = None

    # ---- computing ----

    def forward(self, tokens, positions, attend):
        """tokens, positions (N,). attend(layer, q, k, v) -> (N, H, D) writes k and v to the KV
        cache and does the attention. Returns hidden states (N, E)."""
        x = F.embedding(tokens, self.embed)                                   # (N, E)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            x = x + F.embedding(positions + self.family.position_offset, self.embed_positions)
        if self.embed_norm is not None:
            x, _ = self.embed_norm(x)

        delta = x
        residual = None
        for layer in self.layers:
            attention = partial(self.attention, layer, attend)
            mlp = partial(self.mlp, layer)
            delta, residual = self.block(layer, delta, residual, attention, mlp)

        if self.final_norm is not None:
            x, _ = self.final_norm(delta, residual)
        elif residual is not None:
            x = residual + delta
        else:
            x = delta
        if self.project_out is not None:
            x = self.project_out(x)
        return x

    def logits(self, hidden):
        return kernels.logits(hidden, self.head)                              # (N, V)

    def attention(self, layer, attend, h):
        q, k, v = self.qkv(layer, h)
        o = attend(layer, q, k, v)                                            # (N, H, D)
        return self.sum_over_ranks(layer.out, o.flatten(1))                   # (N, E)

    def qkv(self, layer, h):
        """Queries (N, H, D), keys and values (N, K, D)."""
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        if len(layer.qkv) == 3:
            q, k, v = (linear(h).unflatten(-1, (-1, D)) for linear in layer.qkv)
        elif self.family.qkv_order == "stacked":
            q, k, v = layer.qkv[0](h).unflatten(-1, (H + 2 * K, D)).split([H, K, K], dim=1)
        else:
            q, k, v = layer.qkv[0](h).unflatten(-1, (H, 3, D)).unbind(2)
        if layer.q_norm is not None:
            q = layer.q_norm.of_heads(q)
            k = layer.k_norm.of_heads(k)
        if q.size(1) > H:  # all heads, because of the norm: take those of this rank
            q, k, v = (x[:, self.share(x.size(1))] for x in (q, k, v))
        return q, k, v

    def mlp(self, layer, h):
        if layer.gate is not None:
            h = self.activation(layer.gate(h)) * layer.up(h)
        else:
            h = self.activation(layer.up(h))
        return self.sum_over_ranks(layer.down, h)                             # (N, E)

    def sum_over_ranks(self, linear, x):
        """A projection whose inputs are spread over the tensor-parallel ranks. This is the one
        collective of a half layer; the bias is added after it, once."""
        if self.tp == 1:
            return linear(x)
        y = linear(x, bias=False)
        dist.all_reduce(y, group=self.group)
        if linear.bias is not None:
            y = y + linear.bias
        return y
