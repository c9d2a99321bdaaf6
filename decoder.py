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
import itertools
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


def norm_around(layer, delta, residual, attention, mlp):
    """Gemma 2: a norm before and after each half."""
    h, residual = layer.norm1(delta, residual)
    delta, _ = layer.out_norm1(attention(h))
    h, residual = layer.norm2(delta, residual)
    delta, _ = layer.out_norm2(mlp(h))
    return delta, residual


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
    out_norm1: str = ""             # of what attention and MLP return
    out_norm2: str = ""
    rms: bool = False               # RMS norms; otherwise layer norms
    norm_offset: float = 0.0        # what is added to the weights of a norm
    activation: str = ""            # where the config does not name it
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
    activation="gelu_pytorch_tanh",
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
GEMMA2 = replace(
    LLAMA,
    norm2="pre_feedforward_layernorm",
    out_norm1="post_attention_layernorm",
    out_norm2="post_feedforward_layernorm",
    norm_offset=1.0,
    block=norm_around,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "smollm3": LLAMA,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "gemma2": GEMMA2,
    "opt": OPT,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "bloom": BLOOM,
}


# The names that configs give to the activations of kernels.py.
ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
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
        return self.adapted(x, kernels.linear(x, self.weight, self.bias if bias else None))

    def activated(self, x, activation):
        """activation(self(x))"""
        if self.lora is None:
            return kernels.linear_activation(x, self.weight, self.bias, activation)
        return kernels.ACTIVATIONS[activation].function(self(x))

    def adapted(self, x, y):
        """y, the product of x and the weight, with what the adapter adds."""
        if self.lora is None:
            return y
        A, B, scale = self.lora
        return kernels.add_product(y, kernels.linear(x, A), B, scale)

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


class Projections(NamedTuple):
    """Several projections of the same input. One product computes all of them where their weights
    are neighbours in memory, in any order; else each has its own."""
    linears: list                   # of Linear; where there is a joint one, without their weights
    joint: Linear | None            # all weights and biases, in the order of memory
    widths: list                    # how many outputs each has, in the order of memory
    places: list                    # of each projection in that order

    @classmethod
    def of(cls, linears, copies=False):
        """copies: the weights are copied, and so made neighbours."""
        join = concatenated if copies else neighbours
        order = sorted(range(len(linears)), key=lambda i: linears[i].weight.storage_offset())
        weight = join([linears[i].weight for i in order])
        bias = join([linears[i].bias for i in order])
        if weight is None or (bias is None) != (linears[0].bias is None):
            return cls(linears, None, [], [])
        widths = [len(linears[i].weight) for i in order]
        places = [order.index(i) for i in range(len(linears))]
        adapters = [Linear(None, None, linear.lora) for linear in linears]
        return cls(adapters, Linear(weight, bias, None), widths, places)

    def __call__(self, x):
        """A list of outputs, (N, out) each."""
        if self.joint is None:
            return [linear(x) for linear in self.linears]
        parts = self.joint(x).split(self.widths, dim=-1)
        parts = [parts[place] for place in self.places]
        return [linear.adapted(x, y) for linear, y in zip(self.linears, parts)]


def neighbours(tensors):
    """One tensor that holds these, without a copy; None where each does not begin, in the same
    memory, where the one before it ends."""
    first = tensors[0]
    if first is None:
        return None
    end = first.storage_offset()
    for x in tensors:
        if x is None or x.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return None
        if x.storage_offset() != end or x.stride() != first.stride():
            return None
        end += len(x) * x.stride(0)
    shape = (sum(map(len, tensors)), *first.shape[1:])
    return first.as_strided(shape, first.stride())


def concatenated(tensors):
    """One tensor that holds copies of these; None if these are None."""
    return None if tensors[0] is None else torch.cat(tensors)


def make_neighbours(params):
    """Puts several parameters next to each other in memory, if each has memory of its own: what is
    part of a flat buffer of DeepSpeed stays there. No value changes. Returns whether any moved."""
    if len(params) == 1 or any(p is None for p in params):
        return False
    if any(p.untyped_storage().nbytes() != p.nbytes for p in params):
        return False
    joint = torch.cat([p.data for p in params])
    for p, part in zip(params, joint.split([len(p) for p in params])):
        p.data = part
    return True


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool
    offset: float                   # added to the weight

    def __call__(self, x, residual=None):
        """Returns the norm of residual + x, and residual + x."""
        return kernels.add_norm(x, residual, *self)

    def of_heads(self, x):
        """The norm of each head, or of all heads together, as the width of the weight says.
        x (N, heads, D)"""
        width = len(self.weight)
        normed, _ = self(x.reshape(len(x), -1, width))
        return normed.view_as(x)


class Layer(NamedTuple):
    index: int
    norm1: Norm
    qkv: Projections                # of queries, keys and values, or one of all, by head
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    norm2: Norm
    up: Projections                 # of the gate, if there is one, and up
    down: Linear
    out_norm1: Norm | None
    out_norm2: Norm | None
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


def read_norm(module, family):
    """A Norm that refers to the weights of a module, or None."""
    if module is None:
        return None
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias = bias.data
    return Norm(module.weight.data, bias, eps, family.rms, family.norm_offset)


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
    for name in ("activation_function", "hidden_activation", "hidden_act"):
        if getattr(config, name, None):
            return getattr(config, name)
    return FAMILIES[config.model_type].activation


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
        if not activation:
            unsupported = "an activation that the config does not name, as"
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
        self.scale = (getattr(config, "query_pre_attn_scalar", None) or self.head_dim) ** -0.5
        if not getattr(config, "scale_attn_weights", True):
            self.scale = 1.0
        self.attention_softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
        self.logit_softcap = getattr(config, "final_logit_softcapping", None) or 0.0
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
        moved = False
        for index, layer in enumerate(submodule(self.backbone, self.family.layers)):
            if not self.copies:
                moved |= self.lay_out(layer)
            with gathered(*layer.parameters()):
                self.layers.append(self.keep(self.load_layer(index, layer)))
        if moved and self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the weights have left is too small for a KV cache

        self.weight_bytes = sum(x.numel() * x.element_size() for x in self.weights())
        if self.head is not self.embed:  # a token reads one row of the embedding
            self.weight_bytes -= self.embed.numel() * self.embed.element_size()

    def lay_out(self, layer):
        """Puts the weights that one product computes next to each other in memory. Returns whether
        any moved."""
        family = self.family
        moved = False
        for paths in (family.qkv, (family.gate, family.up)):
            modules = [submodule(layer, path) for path in dict.fromkeys(paths) if path]
            modules = [getattr(module, "base", module) for module in modules]  # without LoRA
            moved |= make_neighbours([module.weight for module in modules])
            moved |= make_neighbours([getattr(module, "bias", None) for module in modules])
        return moved

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
            scale = torch.tensor(getattr(embed, "scalar_embed_scale", 1.0))
            self.embed_scale = scale.to(self.embed.dtype).item()  # rounded as in transformers
            self.embed_positions = None
            if embed_positions is not None:
                self.embed_positions = self.keep(embed_positions.weight.data)
            self.embed_norm = self.keep(read_norm(embed_norm, family))
            self.final_norm = self.keep(read_norm(final_norm, family))
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
            return read_norm(submodule(layer, path), family)

        q_norm = k_norm = None
        if family.qk_norms:
            q_norm, k_norm = map(norm, family.qk_norms)
        out = linear(family.out)
        up = linear(family.up)
        down = linear(family.down)
        q_width = self.num_heads * self.tp * self.head_dim
        k_width = self.num_kv_heads * self.tp * self.head_dim
        qkv_widths = [q_width, k_width, k_width]
        up_widths = [len(up.weight) // 2] * 2
        if self.tp > 1:  # columns, then rows: one sum over ranks for each half layer
            out = out.inputs(self.share(out.weight.size(1)))
            down = down.inputs(self.share(down.weight.size(1)))

        # OLMo-2's norm of q needs all heads; qkv() takes this rank's heads after it.
        all_heads = q_norm is not None and len(q_norm.weight) > self.head_dim
        qkv = [linear(path) for path in family.qkv]
        if family.qkv_order == "stacked":
            qkv = self.stacked(qkv[0], qkv_widths)
        else:
            qkv = self.projections(qkv, sliced=not all_heads)
        if family.gate == family.up:  # the gate first
            up = self.stacked(up, up_widths)
        elif family.gate:
            up = self.projections([linear(family.gate), up])
        elif self.tp > 1:
            up = self.slice_outputs(up)

        return Layer(
            index=index,
            norm1=norm(family.norm1),
            qkv=qkv,
            q_norm=q_norm,
            k_norm=k_norm,
            out=out,
            norm2=norm(family.norm2),
            up=up,
            down=down,
            out_norm1=norm(family.out_norm1),
            out_norm2=norm(family.out_norm2),
            rotary=has_rotary(family, self.config, index),
            spec=kernels.AttentionSpec(
                self.scale,
                attention_window(self.config, index),
                self.slopes,
                self.attention_softcap,
            ),
        )

    def share(self, n):
        """Which of n outputs, inputs or heads belong to this rank."""
        return slice(n * self.tp_rank // self.tp, n * (self.tp_rank + 1) // self.tp)

    def slice_outputs(self, linear):
        return linear.outputs(self.share(len(linear.weight)))

    def projections(self, linears, sliced=True):
        """Projections of the same input, or this rank's share of each. sliced: False for all of
        their outputs."""
        if self.tp > 1 and sliced:
            linears = [self.slice_outputs(linear) for linear in linears]
        return Projections.of(linears, self.copies)

    def stacked(self, linear, widths):
        """One projection that holds several of these widths, or this rank's share of each."""
        if self.tp == 1:
            parts = [Linear(None, None, None)] * len(widths)
            return Projections(parts, linear, widths, list(range(len(widths))))
        starts = itertools.accumulate(widths, initial=0)
        parts = [linear.outputs(slice(i, i + n)) for i, n in zip(starts, widths)]
        return self.projections(parts)

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
        if self.embed_scale != 1:
            x = x * self.embed_scale
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
        return kernels.logits(hidden, self.head, self.logit_softcap)          # (N, V)

    def attention(self, layer, attend, h):
        q, k, v = self.qkv(layer, h)
        o = attend(layer, q, k, v)                                            # (N, H, D)
        return self.sum_over_ranks(layer.out, o.flatten(1))                   # (N, E)

    def qkv(self, layer, h):
        """Queries (N, H, D), keys and values (N, K, D)."""
        H = self.num_heads
        D = self.head_dim
        outputs = layer.qkv(h)
        if self.family.qkv_order == "by head":
            q, k, v = outputs[0].unflatten(-1, (H, 3, D)).unbind(2)
        else:
            q, k, v = (x.unflatten(-1, (-1, D)) for x in outputs)
        if layer.q_norm is not None:
            q = layer.q_norm.of_heads(q)
            k = layer.k_norm.of_heads(k)
        if q.size(1) > H:  # all heads, because of the norm: take those of this rank
            q, k, v = (x[:, self.share(x.size(1))] for x in (q, k, v))
        return q, k, v

    def mlp(self, layer, h):
        if self.family.gate:
            gate, up = layer.up(h)
            h = kernels.ACTIVATIONS[self.activation].function(gate) * up
        else:
            h = layer.up.activated(h, self.activation)
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
