"""What will a run need? Memory by part, seconds and dollars, before anything is allocated.

    python plan.py --model opt-13b --critic opt-350m --gpus 8 --gpu a100-80g --zero 3 --lora 128
    python plan.py --model out/sft --reward out/reward --gpu cpu --batch-size 64
    python plan.py --model layers=24,width=2048,heads=32,ffn=8192,vocab=50272 --gpus 4 --price 2.5
    python plan.py --deepspeed-chat --out results/plan.json    # its published tables, and ours

The flags are those of ppo.py. A model is a name in SHAPES, a folder (only its config.json is read),
or a shape. Memory follows what the code allocates: each formula names its place. With --gpu cpu it
is held to measured peaks (results/plan-memory.json); on a GPU nothing has been measured yet. Times
are a model: so many FLOPs and bytes, at shares of the data sheet that are assumed, or taken from
files that bench.py has written on the same GPU (--measured).

Dimension key:  P prompt, A answer, T = P + A, L layers, E width, H query heads, K key/value heads,
                D head size, M width of the MLP, V vocabulary size.
"""
import json
import math
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

import decoder
import kernels
import models
import ppo
import tables
import tasks
import utils
from hybrid_engine import PREFILL_TOKENS

GIB = 2**30

# -----------------------------------------------------------------------------
# shapes of models


class Shape(NamedTuple):
    family: str     # model_type of transformers
    L: int
    E: int
    H: int
    K: int
    D: int
    M: int
    V: int
    tied: bool      # the output layer is the embedding
    context: int = 2048  # longest row; families with learned positions have a weight for each
    embed: int = 0       # width of the embedding, where that is not E (OPT-350M)


SHAPES = {
    #                       family      L      E   H   K    D      M       V  tied
    "opt-4x256":      Shape("opt",      4,   256,  4,  4,  64,  1024,   8192, True),
    "llama-4x256":    Shape("llama",    4,   256,  4,  2,  64,   688,   8192, False),
    "opt-125m":       Shape("opt",     12,   768, 12, 12,  64,  3072,  50272, True),
    "opt-350m":       Shape("opt",     24,  1024, 16, 16,  64,  4096,  50272, True, embed=512),
    "opt-1.3b":       Shape("opt",     24,  2048, 32, 32,  64,  8192,  50272, True),
    "opt-2.7b":       Shape("opt",     32,  2560, 32, 32,  80, 10240,  50272, True),
    "opt-6.7b":       Shape("opt",     32,  4096, 32, 32, 128, 16384,  50272, True),
    "opt-13b":        Shape("opt",     40,  5120, 40, 40, 128, 20480,  50272, True),
    "opt-30b":        Shape("opt",     48,  7168, 56, 56, 128, 28672,  50272, True),
    "opt-66b":        Shape("opt",     64,  9216, 72, 72, 128, 36864,  50272, True),
    "opt-175b":       Shape("opt",     96, 12288, 96, 96, 128, 49152,  50272, True),
    "smollm2-135m":   Shape("llama",   30,   576,  9,  3,  64,  1536,  49152, True),
    "smollm2-360m":   Shape("llama",   32,   960, 15,  5,  64,  2560,  49152, True),
    "smollm2-1.7b":   Shape("llama",   24,  2048, 32, 32,  64,  8192,  49152, True),
    "llama-2-7b":     Shape("llama",   32,  4096, 32, 32, 128, 11008,  32000, False),
    "llama-2-13b":    Shape("llama",   40,  5120, 40, 40, 128, 13824,  32000, False),
    "llama-2-70b":    Shape("llama",   80,  8192, 64,  8, 128, 28672,  32000, False),
    "llama-3.2-1b":   Shape("llama",   16,  2048, 32,  8,  64,  8192, 128256, True),
    "llama-3.2-3b":   Shape("llama",   28,  3072, 24,  8, 128,  8192, 128256, True),
    "llama-8b":       Shape("llama",   32,  4096, 32,  8, 128, 14336, 128256, False),
    "llama-70b":      Shape("llama",   80,  8192, 64,  8, 128, 28672, 128256, False),
    "qwen2.5-0.5b":   Shape("qwen2",   24,   896, 14,  2,  64,  4864, 151936, True),
    "qwen2.5-1.5b":   Shape("qwen2",   28,  1536, 12,  2, 128,  8960, 151936, True),
    "qwen2.5-7b":     Shape("qwen2",   28,  3584, 28,  4, 128, 18944, 152064, False),
    "qwen3-0.6b":     Shape("qwen3",   28,  1024, 16,  8, 128,  3072, 151936, True),
    "qwen3-1.7b":     Shape("qwen3",   28,  2048, 16,  8, 128,  6144, 151936, True),
    "qwen3-4b":       Shape("qwen3",   36,  2560, 32,  8, 128,  9728, 151936, True),
    "qwen3-8b":       Shape("qwen3",   36,  4096, 32,  8, 128, 12288, 151936, False),
}

# What a model written by hand may say, and the field of Shape that it sets.
SHAPE_KEYS = {
    "layers": "L", "width": "E", "heads": "H", "kv-heads": "K", "head": "D", "ffn": "M",
    "vocab": "V", "family": "family", "tied": "tied", "context": "context",
}
# The names that configs give to the same numbers.
CONFIG_KEYS = {
    "L": ("num_hidden_layers", "n_layer"),
    "E": ("hidden_size", "n_embd"),
    "H": ("num_attention_heads", "n_head"),
    "M": ("intermediate_size", "ffn_dim", "n_inner"),
    "V": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions"),
}
UNTIED = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gpt_neox")  # by default


def find_shape(flag, text):
    """The Shape of a model's name, folder or description. Raises UserError."""
    if text in SHAPES:
        return SHAPES[text]
    if "=" in text:
        return parse_shape(flag, text)
    path = Path(text)
    if path.is_dir():
        return read_shape(flag, path)
    message = (
        f"{flag} {text}: no such folder, and no model that is known here; there are "
        f"{', '.join(SHAPES)}; or write its shape, such as "
        "layers=24,width=2048,heads=32,ffn=8192,vocab=50272"
    )
    raise utils.UserError(message)


def parse_shape(flag, text):
    """layers=24,width=2048,heads=32,ffn=8192,vocab=50272 as a Shape. What may be left out: kv-heads
    (as many as heads), head (width / heads), family (opt), tied (yes), context (2048)."""
    values = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in SHAPE_KEYS or not value:
            known = ", ".join(SHAPE_KEYS)
            raise utils.UserError(f"{flag} {text}: {part!r} is not one of {known}, and its value")
        values[SHAPE_KEYS[key]] = value
    fields = {"family": values.pop("family", "opt")}
    fields["tied"] = values.pop("tied", "yes") in ("yes", "true", "1")
    for name, value in values.items():
        if not value.isdigit() or int(value) < 1:
            raise utils.UserError(f"{flag} {text}: {value!r} is not a number above 0")
        fields[name] = int(value)
    missing = [key for key, name in SHAPE_KEYS.items() if name in "LEHMV" and name not in fields]
    if missing:
        raise utils.UserError(f"{flag} {text}: {' and '.join(missing)} must be there, too")
    return complete_shape(f"{flag} {text}", fields)


def read_shape(flag, folder):
    """The Shape that the config.json of a model folder describes."""
    path = folder / "config.json"
    if not path.is_file():
        message = f"{flag} {folder}: has no config.json, so it is not a model folder"
        raise utils.UserError(message)
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise utils.UserError(f"{path} cannot be read ({utils.first_line(error)})") from None
    return shape_of_config(str(path), config)


def shape_of_config(where, config):
    """config: the dict in a config.json."""
    family = config.get("model_type")
    fields = {"family": family}
    fields["tied"] = config.get("tie_word_embeddings", family not in UNTIED)
    for name, keys in CONFIG_KEYS.items():
        for key in keys:
            if config.get(key):
                fields[name] = config[key]
    fields["K"] = config.get("num_key_value_heads")
    fields["D"] = config.get("head_dim")
    if "E" in fields:
        fields.setdefault("M", 4 * fields["E"])  # GPT-2 and BLOOM
        embed = config.get("word_embed_proj_dim") or fields["E"]
        fields["embed"] = embed if embed != fields["E"] else 0
    return complete_shape(where, fields)


def complete_shape(where, fields):
    """A Shape from its fields, of which K and D may be missing. Raises UserError for nonsense."""
    if fields["family"] not in decoder.FAMILIES:
        known = ", ".join(decoder.FAMILIES)
        message = f"{where}: the model family {fields['family']!r} is not known; there are {known}"
        raise utils.UserError(message)
    missing = [name for name in "LEHMV" if not isinstance(fields.get(name), int)]
    if missing:
        raise utils.UserError(f"{where}: does not say {', '.join(CONFIG_KEYS[missing[0]])}")
    E, H = fields["E"], fields["H"]
    K = fields.get("K") or H
    if E % H and not fields.get("D"):
        raise utils.UserError(f"{where}: a width of {E} cannot be divided among {H} heads")
    if H % K:
        raise utils.UserError(f"{where}: {H} heads cannot share {K} key/value heads")
    return Shape(**fields | {"K": K, "D": fields.get("D") or E // H})


# -----------------------------------------------------------------------------
# parameters. The modules are those of decoder.FAMILIES.

BIASED = ("opt", "gpt2", "gpt_neox", "bloom")  # every linear layer has a bias


def linears(s):
    """{name: (inputs, outputs)} of the linear layers of one layer."""
    family = decoder.FAMILIES[s.family]
    q = s.H * s.D
    kv = s.K * s.D
    found = {}
    if len(family.qkv) == 1:
        found[family.qkv[0]] = (s.E, q + 2 * kv)
    else:
        for name, outputs in zip(family.qkv, (q, kv, kv)):
            found[name] = (s.E, outputs)
    found[family.out] = (q, s.E)
    is_stacked = family.gate == family.up
    found[family.up] = (s.E, 2 * s.M if is_stacked else s.M)
    if family.gate and not is_stacked:
        found[family.gate] = (s.E, s.M)
    found[family.down] = (s.M, s.E)
    return found


def layer_params(s):
    """Weights of the matrices of one layer."""
    return sum(inputs * outputs for inputs, outputs in linears(s).values())


def small_params(s):
    """Biases and norms of one layer."""
    family = decoder.FAMILIES[s.family]
    norm = 1 if family.rms else 2
    norms = [family.norm1, family.norm2, family.out_norm1, family.out_norm2]
    total = norm * s.E * sum(name != "" for name in norms)
    if family.qk_norms:
        per_head = s.family == "qwen3"  # OLMo-2 norms all heads together
        total += 2 * s.D if per_head else (s.H + s.K) * s.D
    if s.family in BIASED:
        total += sum(outputs for _, outputs in linears(s).values())
    elif s.family == "qwen2":
        total += (s.H + 2 * s.K) * s.D
    return total


def end_params(s):
    """What is before the first layer and after the last one, without the output layer."""
    family = decoder.FAMILIES[s.family]
    norm = 1 if family.rms else 2
    total = s.V * (s.embed or s.E)
    if family.positions == "learned":
        total += (s.context + family.position_offset) * s.E
    if family.embed_norm:
        total += norm * s.E
    if s.embed:  # OPT-350M: two projections, and no norm at the end
        return total + 2 * s.embed * s.E
    return total + norm * s.E


def lm_params(s):
    """Parameters of the causal LM."""
    head = 0 if s.tied else s.V * (s.embed or s.E)
    return s.L * (layer_params(s) + small_params(s)) + end_params(s) + head


def reward_model_params(s):
    """Parameters of a RewardModel: no output layer, and a head with one output."""
    return s.L * (layer_params(s) + small_params(s)) + end_params(s) + (s.embed or s.E)


def lora_params(s, lora):
    """Parameters of the adapters that models.add_lora adds: A and B beside each linear layer."""
    options = models.parse_lora(lora)
    targets = options["targets"]
    total = 0
    for name, (inputs, outputs) in linears(s).items():
        if not targets or any(models.is_target(name, target) for target in targets):
            total += s.L * (inputs + outputs)
    if s.embed and not targets:
        total += 2 * (s.embed + s.E)  # the projections of OPT-350M
    return options["rank"] * total


def largest_param(s):
    """Elements of the largest tensor."""
    sizes = [inputs * outputs for inputs, outputs in linears(s).values()]
    return max(*sizes, s.V * (s.embed or s.E))


def kv_bytes(s, tokens, dtype):
    """Bytes of the keys and values of so many tokens."""
    return 2 * s.L * s.K * s.D * tokens * dtype.itemsize


def flops(s, tokens, length, head_tokens):
    """Of one forward over `tokens` tokens in rows of `length`, of which `head_tokens` also go
    through the output layer: 2 per weight and token, and causal attention."""
    layers = 2 * s.L * layer_params(s) * tokens
    attention = 2 * s.L * s.H * s.D * length * tokens
    head = 2 * s.E * s.V * head_tokens
    return layers + attention + head


# -----------------------------------------------------------------------------
# what a forward keeps for its backward


class Kept(NamedTuple):
    """How many tensors of each width autograd keeps of one layer, as transformers writes it. A
    norm of RMS is written out, and keeps its input, the normed input and its output."""
    E: int              # (tokens, E): inputs of norms and of linear layers
    q: int              # (tokens, H * D): queries, outputs of attention
    kv: int             # (tokens, K * D)
    M: int              # (tokens, M)
    scores: int = 0     # (tokens, H, T): attention that is written out
    wide_E: int = 0     # of those of E, q, kv, scores: float32 also in a bf16 model
    wide_q: int = 0
    wide_kv: int = 0
    wide_scores: int = 0
    norms: int = 0      # of those of E: kept only for the gradient of a norm's weight


LLAMA = Kept(E=6, q=2, kv=2, M=4, wide_E=2, norms=2)
KEPT = {
    "opt":      Kept(E=4, q=2, kv=2, M=1),
    "gpt2":     Kept(E=4, q=2, kv=2, M=5),
    "gpt_neox": Kept(E=3, q=4, kv=3, M=2),
    "bloom":    Kept(E=4, q=2, kv=2, M=2, scores=1, wide_scores=1),
    "llama":    LLAMA,
    "mistral":  LLAMA,
    "qwen2":    LLAMA,
    "smollm3":  LLAMA,
    "phi3":     LLAMA._replace(q=4, kv=3),
    "qwen3":    LLAMA._replace(q=4, kv=4, wide_q=1, wide_kv=1),
    "olmo2":    Kept(E=6, q=4, kv=4, M=4, wide_E=4, wide_q=2, wide_kv=2, norms=2),
    "gemma2":   Kept(E=10, q=4, kv=0, M=4, scores=2, wide_E=8, wide_scores=1, norms=4),
}


def kept_bytes(s, tokens, length, itemsize):
    """Bytes that one layer keeps for `tokens` tokens in rows of `length`."""
    k = KEPT[s.family]
    q = s.H * s.D
    kv = s.K * s.D
    scores = s.H * length
    narrow = k.E * s.E + k.q * q + k.kv * kv + k.M * s.M + k.scores * scores
    wide = 0
    if itemsize == 2:
        wide = k.wide_E * s.E + k.wide_q * q + k.wide_kv * kv + k.wide_scores * 2 * scores
    logsumexp = 4 * s.H
    return tokens * (itemsize * (narrow + wide) + logsumexp)


def forward_bytes(s, tokens, itemsize):
    """Bytes at once in a layer without gradients: attention, or the MLP."""
    attention = 3 * s.E + 2 * s.H * s.D + 2 * s.K * s.D
    mlp = 2 * s.E + (3 if decoder.FAMILIES[s.family].gate else 2) * s.M
    return tokens * itemsize * max(attention, mlp)


# -----------------------------------------------------------------------------
# machines


class Machine(NamedTuple):
    """NVIDIA's data sheets; dense, without sparsity."""
    memory: float       # GiB
    bandwidth: float    # bytes/s of its memory
    bf16: float         # FLOP/s; 0: it has none
    fp32: float         # FLOP/s
    link: float         # bytes/s to its neighbours, one way


MACHINES = {
    "h200":      Machine(141, 4.80e12, 989e12, 67e12, 450e9),
    "h100":      Machine(80, 3.35e12, 989e12, 67e12, 450e9),
    "a100-80g":  Machine(80, 2.04e12, 312e12, 19.5e12, 300e9),
    "a100-40g":  Machine(40, 1.56e12, 312e12, 19.5e12, 300e9),
    "a6000":     Machine(48, 0.77e12, 155e12, 38.7e12, 56e9),
    "v100-32g":  Machine(32, 0.90e12, 0, 15.7e12, 150e9),
    "cpu":       Machine(psutil.virtual_memory().total / GIB, 0, 0, 0, 0),
}
NETWORK = 50e9          # bytes/s per GPU between machines of 8: 400 Gb/s
PCIE = 25e9             # bytes/s between a GPU and the host, one way
HOST_BANDWIDTH = 100e9  # bytes/s of the host's memory for one GPU's share of the optimizer
RESERVED = 2.5          # GiB of a GPU that no tensor has: CUDA, NCCL, cuBLAS, fragmentation
BUCKET = 5e8            # elements: DeepSpeed's reduce_bucket_size, and half of its
#   stage3_max_reuse_distance, within which ZeRO-3 keeps gathered weights for the backward

# -----------------------------------------------------------------------------
# command line


@dataclass(frozen=True)
class Config:
    # models
    model: str = "opt-1.3b"        # the actor: a name in SHAPES, a folder with a config.json, or a
    #   shape, such as layers=24,width=2048,heads=32,ffn=8192,vocab=50272
    reward: str = "critic"         # reward models and functions as in ppo.py; critic: one reward
    #   model of the critic's shape
    critic: str = ""               # empty: the shape of the first reward model, else of --model
    lora: str = ""                 # train adapters only: a rank, or 8,targets=q_proj+v_proj
    # rollout
    prompt_len: int = 256          # tokens of the longest prompt
    max_new_tokens: int = 256      # longest answer
    tp: int = 1                    # ranks that share one copy of the model while they generate
    # PPO
    batch_size: int = 512          # answers per rollout, over all ranks
    ppo_epochs: int = 1            # epochs over each rollout
    minibatches: int = 4           # optimizer steps per epoch
    micro_batch: int = 0           # rows per rank and forward; 0: the rank's share of a minibatch
    ema: float = 0.97              # decay of the actor's EMA; 0: no EMA
    # run
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU
    #   that computes with it (from Ampere on), else fp32
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage: shards optimizer (1), gradients (2), weights (3)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    offload: bool = False          # keep optimizers, frozen models and ZeRO-3 shards in CPU memory
    # machine
    gpus: int = 1                  # ranks
    gpu: str = "h100"              # one of MACHINES
    pairs: int = 264_292           # prompts of step 3, each used once
    price: float = 0.0             # dollars per GPU and hour; 0: no cost
    # assumptions
    mfu: float = 0.5               # share of the FLOP/s in prefill, scoring and training
    bandwidth: float = 0.7         # share of the memory bandwidth in decode
    measured: str = ""             # files of bench.py, joined by commas, whose shares replace these
    # instead of one plan
    deepspeed_chat: bool = False   # the tables that DeepSpeed-Chat has published, and our plans
    out: str = "results/plan.json"  # the JSON file of these tables

    def __post_init__(self):
        utils.check_values(self)
        models.parse_lora(self.lora)
        utils.require_at_least(self, 1, "prompt_len", "gpus", "pairs")
        utils.require_at_least(self, 0, "price")
        for name in ("mfu", "bandwidth"):
            if not 0 < getattr(self, name) <= 1:
                value = getattr(self, name)
                raise utils.UserError(f"--{name} {value}: a share, above 0 and at most 1")
        if self.gpu not in MACHINES:
            message = f"--gpu {self.gpu}: not known; there are {', '.join(MACHINES)}"
            raise utils.UserError(message)
        self.check_contradictions()

    def check_contradictions(self):
        problem = None
        if self.gpu == "cpu" and self.offload:
            problem = "--offload moves memory to the CPU, and with --gpu cpu it is there already"
        elif self.itemsize == 2 and self.gpu == "v100-32g":
            problem = "--gpu v100-32g computes no bf16; add --dtype fp32"
        elif self.gpus % self.tp:
            problem = f"--tp {self.tp} does not divide --gpus {self.gpus}"
        elif self.batch_size % (self.minibatches * self.gpus):
            problem = (
                f"--batch-size {self.batch_size} cannot be divided by --minibatches "
                f"{self.minibatches} and --gpus {self.gpus}"
            )
        if problem:
            raise utils.UserError(problem)

    @property
    def machine(self):
        return MACHINES[self.gpu]

    @property
    def is_cpu(self):
        return self.gpu == "cpu"

    @property
    def itemsize(self):
        """Bytes of a weight."""
        if self.dtype == "auto":
            return 4 if self.gpu in ("cpu", "v100-32g") else 2
        return {"fp32": 4, "bf16": 2}[self.dtype]

    @property
    def torch_dtype(self):
        return torch.float32 if self.itemsize == 4 else torch.bfloat16

    @property
    def peak_flops(self):
        """FLOP/s of one GPU in this dtype, by its data sheet."""
        return self.machine.fp32 if self.itemsize == 4 else self.machine.bf16

    @property
    def stage(self):
        """As in training.train_engine."""
        if self.offload or self.itemsize == 2:
            return max(self.zero, 1)
        return self.zero

    @property
    def length(self):
        return self.prompt_len + self.max_new_tokens

    @property
    def share(self):
        """Rows of a rank in one optimizer step."""
        return self.batch_size // self.minibatches // self.gpus

    @property
    def rows(self):
        """Rows of a micro batch."""
        return min(self.micro_batch or self.share, self.share)

    @property
    def micro_batches(self):
        return -(-self.share // self.rows)


def reward_shapes(text):
    """The Shapes of the reward models in --reward; functions need no memory."""
    if "=" in text:
        return [find_shape("--reward", text)]
    shapes = []
    for source, _ in ppo.parse_reward(text):
        if not tasks.is_function(source):
            shapes.append(find_shape("--reward", source))
    return shapes


def all_shapes(cfg):
    """Shapes of the actor and of the critic, and a list of those of the reward models."""
    actor = find_shape("--model", cfg.model)
    critic = None
    if cfg.critic:
        critic = find_shape("--critic", cfg.critic)
    if cfg.reward == "critic":
        rewards = [critic or actor]
    else:
        rewards = reward_shapes(cfg.reward)
    if critic is None:
        critic = rewards[0] if rewards else actor
    if actor.H % cfg.tp or actor.K % cfg.tp or actor.M % cfg.tp:
        message = (
            f"--tp {cfg.tp} does not divide the {actor.H} heads, {actor.K} key/value heads or "
            f"{actor.M} MLP columns of --model {cfg.model}"
        )
        raise utils.UserError(message)
    return actor, critic, rewards


# -----------------------------------------------------------------------------
# memory of a model that is trained


@dataclass
class Trained:
    """What DeepSpeed allocates for one model. All in bytes, on the device of one rank.

    There are four kinds of optimizers (DeepSpeed 0.19): `plain` (fp32, stage 0: PyTorch's AdamW),
    `bf16` (stage 1: bf16_optimizer.py), `zero12` (zero/stage_1_and_2.py) and `zero3`
    (zero/stage3.py).
    """

    shape: Shape
    params: int         # all
    trained: int        # of these
    is_policy: bool
    lora: bool
    cfg: Config

    @property
    def kind(self):
        cfg = self.cfg
        if cfg.stage == 0:
            return "plain"
        if cfg.stage == 3:
            return "zero3"
        if cfg.stage == 1 and cfg.itemsize == 2 and not cfg.offload:
            return "bf16"
        return "zero12"

    @property
    def shard(self):
        """Trained parameters whose optimizer states this rank has."""
        return self.trained / (1 if self.kind == "plain" else self.cfg.gpus)

    @property
    def weights(self):
        if self.kind == "zero3":
            return 0 if self.cfg.offload else self.cfg.itemsize * self.params / self.cfg.gpus
        return self.cfg.itemsize * self.params

    @property
    def optimizer(self):
        """Two moments; and float32 weights, of which DeepSpeed makes a copy in fp32, too."""
        if self.cfg.offload:
            return 0
        master = 0 if self.kind == "plain" else 4
        return (master + 8) * self.shard

    @property
    def kept_gradients(self):
        """Gradients with memory of their own, that stay from step to step."""
        if self.kind == "bf16":  # of all parameters: stage 1 shards the optimizer only
            return 4 * self.trained
        if self.kind == "zero3" and not self.cfg.offload:
            return 4 * self.shard
        return 0

    @property
    def gradients(self):
        """Gradients between two micro batches that do not stay."""
        if self.kind in ("bf16", "zero3"):
            return 0
        if self.kind == "zero12" and self.cfg.stage == 2:  # --offload: the sum is on the CPU
            return 0 if self.cfg.offload else 4 * self.shard
        return 4 * self.trained

    @property
    def kept_bucket(self):
        """ZeRO-3's bucket of gradients stays. On a CPU only what is written to counts. With
        --offload, ZeRO-1 and 2 have a buffer for the largest gradient on its way to the CPU."""
        if self.kind == "zero12" and self.cfg.offload:
            return self.cfg.itemsize * min(self.trained, largest_param(self.shape))
        if self.kind != "zero3":
            return 0
        elements = min(BUCKET, self.trained) if self.cfg.is_cpu else BUCKET
        return self.cfg.itemsize * elements

    @property
    def bucket(self):
        """ZeRO-1 and 2 make theirs for each backward (setup_buckets). With stage 1 gradients move
        into it, so that on a CPU, where unused pages cost nothing, it adds nothing."""
        if self.kind != "zero12":
            return 0
        itemsize = self.cfg.itemsize if self.cfg.stage == 2 else 4
        if not self.cfg.is_cpu:
            return itemsize * BUCKET
        return itemsize * min(BUCKET, self.trained) if self.cfg.stage == 2 else 0

    @property
    def reduction(self):
        """Copies of gradients while they are summed over ranks, at the end of a backward, one
        bucket at most. bf16's float32 gradients are one tensor, which is cast."""
        copies = 1
        if self.kind == "zero3" and self.cfg.is_cpu:
            copies = 2  # gloo sums up a copy of its own
        if self.kind == "bf16":
            return 2 * self.trained
        return copies * self.cfg.itemsize * min(BUCKET, self.trained)

    @property
    def gathered(self):
        """Whole weights of ZeRO-3 in a forward that has a backward: what is used again within
        stage3_max_reuse_distance stays, and one tensor more."""
        if self.kind != "zero3":
            return 0
        kept = min(BUCKET, self.params)
        return self.cfg.itemsize * max(kept, largest_param(self.shape))

    @property
    def stepping(self):
        """What a step needs besides gradients between micro batches: ZeRO copies its gradients
        into one flat tensor. Not fused, on a CPU, AdamW makes two temporary tensors as large as
        the largest that it updates (training.FUSED)."""
        if self.cfg.offload:
            return 0
        tensors = 0 if self.kind in ("plain", "bf16") else 1
        if not self.cfg.is_cpu:
            return 4 * self.shard * tensors
        if self.kind == "plain":
            return 2 * 4 * min(self.trained, largest_param(self.shape))
        return 4 * self.shard * (tensors + 2)

    @property
    def held_in_step(self):
        """Gradients that a step begins with. On a CPU ZeRO-1 and 2 have dropped them, and keep
        their copy, when AdamW makes its temporary tensors."""
        if self.kind == "zero12" and self.cfg.is_cpu:
            return 0
        return self.waiting_gradients

    @property
    def waiting_gradients(self):
        """Gradients that wait for the step, after the last micro batch."""
        if self.kind == "zero12":
            return 0 if self.cfg.offload else 4 * self.shard
        return self.gradients

    @property
    def host(self):
        """--offload: optimizer states, gradients and, with ZeRO-3, weights."""
        if not self.cfg.offload:
            return 0
        total = (4 + 8 + 4) * self.shard
        if self.kind == "zero3":
            total += self.cfg.itemsize * self.params / self.cfg.gpus
        return total

    def activations(self):
        """What the forward of a micro batch keeps for its backward, besides the output layer."""
        s = self.shape
        tokens = self.cfg.rows * self.cfg.length
        itemsize = self.cfg.itemsize
        layer = kept_bytes(s, tokens, self.cfg.length, itemsize)
        if self.lora:
            layer -= tokens * itemsize * KEPT[s.family].norms * s.E  # norms are not trained
            layer += tokens * itemsize * lora_rank_tokens(s, self.cfg.lora)
        if self.cfg.gradient_checkpointing:
            return s.L * tokens * s.E * itemsize + layer
        return s.L * layer

    def output_layer(self):
        """kernels.TokenLogprobs: a chunk of logits, the hidden states of the answers and their
        gradient, and the gradient of the weight in float32. A critic has one output."""
        if not self.is_policy:
            return 0
        s = self.shape
        answers = self.cfg.rows * self.cfg.max_new_tokens
        hidden = 2 * self.cfg.itemsize * answers * (s.embed or s.E)
        weight = 0
        if not self.lora:
            weight = 4 * s.V * (s.embed or s.E)
        return hidden + weight + logits_bytes(self.cfg, s, answers)


def lora_rank_tokens(s, lora):
    """Numbers per token and layer that adapters keep: the output of each A."""
    return models.parse_lora(lora)["rank"] * len(linears(s))


def logits_bytes(cfg, s, answers):
    """A chunk of logits. On a CPU there are three of its size, in float32, see logit_grads."""
    chunk = kernels.TokenLogprobs.CHUNK["cpu" if cfg.is_cpu else "cuda"]
    rows = min(answers, max(1, chunk // s.V))
    return rows * s.V * (12 if cfg.is_cpu else cfg.itemsize)


# -----------------------------------------------------------------------------
# memory of a run

PARTS = (
    "actor: weights", "actor: gradients", "actor: optimizer", "EMA", "reference", "reward model",
    "critic: weights", "critic: gradients", "critic: optimizer", "KV cache", "activations",
    "logits", "buffers",
)


class Memory:
    """Bytes per GPU of each phase, by part, at the moment of the phase that needs the most."""

    def __init__(self, cfg):
        self.cfg = cfg
        actor, critic, rewards = all_shapes(cfg)
        self.rewards = rewards
        has_lora = models.parse_lora(cfg.lora)["rank"] > 0
        params = lm_params(actor)
        trained = params
        if has_lora:
            trained = lora_params(actor, cfg.lora)
            params += trained
        of_critic = reward_model_params(critic)
        self.actor = Trained(actor, params, trained, True, has_lora, cfg)
        self.critic = Trained(critic, of_critic, of_critic, False, False, cfg)
        # With LoRA the reference is the actor with its adapters off (ppo.main).
        self.ref_params = 0 if has_lora else lm_params(actor)
        self.reward_params = sum(map(reward_model_params, rewards))
        self.waves = 1
        self.phases = {"rollout": self.rollout(), "score": self.score(), "update": self.update()}

    def resident(self):
        """What is there all the time."""
        cfg = self.cfg
        actor, critic = self.actor, self.critic
        parts = dict.fromkeys(PARTS, 0)
        parts["actor: weights"] = actor.weights
        parts["critic: weights"] = critic.weights
        parts["actor: gradients"] = actor.kept_gradients
        parts["critic: gradients"] = critic.kept_gradients
        parts["actor: optimizer"] = actor.optimizer
        parts["critic: optimizer"] = critic.optimizer
        if cfg.ema and not cfg.offload:
            parts["EMA"] = 4 * actor.shard
        parts["reference"] = self.frozen(self.ref_params)
        parts["reward model"] = self.frozen(self.reward_params)
        batch = cfg.batch_size * (8 * cfg.length + 40 * cfg.max_new_tokens)  # ppo.Batch, whole
        parts["buffers"] = batch + actor.kept_bucket + critic.kept_bucket
        return parts

    def frozen(self, params):
        """See training.frozen_engine."""
        if self.cfg.offload:
            return 0
        return self.cfg.itemsize * params / (self.cfg.gpus if self.cfg.zero == 3 else 1)

    def peak(self, moments):
        """The resident parts with those of the largest of these moments added."""
        largest = max(moments, key=lambda moment: sum(moment.values()))
        parts = self.resident()
        for name, value in largest.items():
            parts[name] += value
        return parts

    def rollout(self):
        """hybrid_engine.py: the KV cache as KVCache.plan has it, the larger of prefill and decode,
        and whole weights, or this rank's slices, under ZeRO-3 and tensor parallelism."""
        cfg = self.cfg
        s = self.actor.shape
        copies = 0
        if cfg.zero == 3 or cfg.tp > 1:
            copies = cfg.itemsize * self.actor.params / cfg.tp
        if cfg.zero == 3:  # gathered one layer at a time
            copies += cfg.itemsize * largest_param(s)

        rows = cfg.batch_size // cfg.gpus * cfg.tp
        capacity = 32 * math.ceil(cfg.length / 32)
        keys_and_values = kv_bytes(s, capacity, cfg.torch_dtype) / cfg.tp
        per_slot = keys_and_values + 12 * capacity  # token ids, logprobs
        free = cfg.machine.memory * GIB - sum(self.resident().values()) - copies
        slots = max(1, min(rows, 0.8 * free // per_slot))
        self.waves = rows / slots

        most = PREFILL_TOKENS["cpu" if cfg.is_cpu else "cuda"]
        tokens = min(slots * cfg.prompt_len, max(most, cfg.prompt_len))
        copy_of_logits = 8 if cfg.is_cpu else 0  # kernels.sample_next: float32, twice
        moment = {
            "KV cache": slots * per_slot,
            "activations": forward_bytes(s, tokens, cfg.itemsize) / cfg.tp,
            "logits": slots * s.V * (cfg.itemsize + copy_of_logits),
            "buffers": copies,
        }
        return self.peak([moment])

    def score(self):
        """Forwards without gradients. --offload: frozen models are on the device."""
        cfg = self.cfg
        tokens = cfg.rows * cfg.length
        answers = cfg.rows * cfg.max_new_tokens
        shapes = [self.actor.shape, self.critic.shape, *self.rewards]
        moment = {
            "activations": max(forward_bytes(s, tokens, cfg.itemsize) for s in shapes),
            "logits": logits_bytes(cfg, self.actor.shape, answers),
        }
        if cfg.zero == 3:  # a gathered tensor, and what it is gathered into
            largest = max(map(largest_param, shapes))
            moment["buffers"] = 2 * cfg.itemsize * largest
        elif cfg.offload:
            moment["reference"] = cfg.itemsize * self.ref_params
            moment["reward model"] = cfg.itemsize * self.reward_params
        return self.peak([moment])

    def update(self):
        """ppo.update_step: in each micro batch the actor's backward, then the critic's; after the
        last one the actor's step, then the critic's. Gradients of one wait while the other works.
        """
        actor, critic = self.actor, self.critic
        moments = [
            *self.backward("actor", actor, "critic", critic),
            *self.backward("critic", critic, "actor", actor),
            self.step("actor", actor, "critic", critic),
            self.step("critic", critic, "actor", actor, is_last=True),
        ]
        return self.peak(moments)

    def backward(self, name, model, other_name, other):
        """Two moments: its start, with all activations, and its end, with all gradients."""
        is_first = self.cfg.micro_batches == 1
        waiting = other.gradients
        if is_first and name == "actor":
            waiting = 0
        elif is_first:
            waiting = other.waiting_gradients
        before = 0 if is_first else model.gradients
        buffers = model.gathered
        if not self.cfg.is_cpu:
            buffers += model.bucket
        start = {
            f"{name}: gradients": before,
            f"{other_name}: gradients": waiting,
            "activations": model.activations(),
            "logits": model.output_layer(),
            "buffers": buffers,
        }
        last_gathered = 0
        if model.kind == "zero3":
            last_gathered = self.cfg.itemsize * largest_param(model.shape)
        in_bucket = model.kind == "zero12" and self.cfg.stage == 2  # until they are summed up
        end = {
            f"{name}: gradients": before if in_bucket else model.gradients,
            f"{other_name}: gradients": waiting,
            "buffers": model.bucket + model.reduction + last_gathered,
        }
        return start, end

    def step(self, name, model, other_name, other, is_last=False):
        waiting = 0 if is_last else other.waiting_gradients
        return {
            f"{name}: gradients": model.held_in_step,
            f"{other_name}: gradients": waiting,
            "buffers": model.stepping,
        }

    @property
    def totals(self):
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak_bytes(self):
        return max(self.totals.values())

    @property
    def limit(self):
        """Bytes that tensors may take."""
        reserved = 0 if self.cfg.is_cpu else RESERVED
        return (self.cfg.machine.memory - reserved) * GIB

    @property
    def fits(self):
        ranks = self.cfg.gpus if self.cfg.is_cpu else 1  # they share the machine's memory
        return self.peak_bytes * ranks <= self.limit

    @property
    def host_bytes(self):
        """--offload: of one rank."""
        if not self.cfg.offload:
            return 0
        sharded = self.cfg.gpus if self.cfg.zero == 3 else 1
        frozen = self.cfg.itemsize * (self.ref_params + self.reward_params) / sharded
        ema = 4 * self.actor.shard if self.cfg.ema else 0
        return self.actor.host + self.critic.host + frozen + ema


# -----------------------------------------------------------------------------
# time


def seconds_of_iteration(cfg, memory):
    """A model of one PPO iteration. Returns seconds of rollout, score, update, and of what they
    wait for: gather (weights for the rollout), traffic (ZeRO, while training), host (--offload).

    Decode reads the weights and the KV cache at cfg.bandwidth of the memory's bandwidth, and adds
    two all-reduces per layer with tensor parallelism. All other work computes at cfg.mfu.
    """
    machine = cfg.machine
    actor, critic = memory.actor, memory.critic
    s = actor.shape
    B, P, A, T = cfg.batch_size, cfg.prompt_len, cfg.max_new_tokens, cfg.length
    world, tp = cfg.gpus, cfg.tp
    flop_per_s = world * cfg.mfu * cfg.peak_flops

    # Rollout: rows of a tensor-parallel group that do not fit in its memory wait.
    weight_bytes = cfg.itemsize * lm_params(s)
    rows = B * tp / world
    rows_at_once = rows / memory.waves
    token_bytes = kv_bytes(s, 1, cfg.torch_dtype)
    kv_read = rows_at_once * (P + A / 2) * token_bytes / tp
    step_s = (weight_bytes / tp + kv_read) / (cfg.bandwidth * machine.bandwidth)
    if tp > 1:
        message = 2 * (tp - 1) / tp * rows_at_once * s.E * cfg.itemsize
        step_s += 2 * s.L * (message / machine.link + 10e-6)
    decode_s = memory.waves * A * step_s
    prefill_s = flops(s, B * P, P, B) / flop_per_s

    # Score: reference, critic, reward models, and the actor where a rollout has several updates.
    actor_forward = flops(s, B * T, T, B * A)
    critic_forward = flops(critic.shape, B * T, T, 0)
    is_single = cfg.ppo_epochs * cfg.minibatches == 1
    scored = actor_forward * (1 if is_single else 2) + critic_forward
    scored += sum(flops(shape, B * T, T, 0) for shape in memory.rewards)

    # Update: a backward is two forwards, with frozen weights one; recomputing is one more.
    recompute = int(cfg.gradient_checkpointing)
    actor_forwards = (2 if actor.lora else 3) + recompute
    trained = actor_forwards * actor_forward + (3 + recompute) * critic_forward

    seconds = {
        "rollout": decode_s + prefill_s,
        "score": scored / flop_per_s,
        "update": cfg.ppo_epochs * trained / flop_per_s,
    }
    return seconds | traffic_seconds(cfg, memory)


def traffic_seconds(cfg, memory):
    """Seconds of an iteration in which weights and gradients move, none of it hidden."""
    machine = cfg.machine
    link = machine.link if cfg.gpus <= 8 else NETWORK
    others = (cfg.gpus - 1) / cfg.gpus
    steps = cfg.ppo_epochs * cfg.minibatches
    passes = steps * cfg.micro_batches
    gathered = 0  # bytes of whole weights
    reduced = 0
    offloaded = 0
    for model in (memory.actor, memory.critic):
        weights = cfg.itemsize * model.params
        gradients = cfg.itemsize * model.trained
        if cfg.zero == 3:  # forward and backward of each micro batch, and scoring before
            gathered += weights * (2 * passes + cfg.micro_batches * cfg.minibatches)
        elif cfg.stage > 0:  # the updated ones
            gathered += steps * cfg.itemsize * model.trained
        reduces = passes if cfg.stage >= 2 else steps
        reduced += reduces * gradients * (1 if cfg.zero == 3 else 2)
        if cfg.offload:
            moved = steps * 2 * gradients / cfg.gpus / PCIE
            adam = steps * 28 * model.shard / HOST_BANDWIDTH  # AdamW reads and writes 28 bytes
            offloaded += moved + adam
    if cfg.offload:
        frozen = cfg.itemsize * (memory.ref_params + memory.reward_params)
        offloaded += frozen / (cfg.gpus if cfg.zero == 3 else 1) / PCIE
    rollout_weights = 0
    if cfg.zero == 3:
        rollout_weights = cfg.itemsize * memory.actor.params
    return {
        "gather": rollout_weights * others / link,
        "traffic": (gathered + reduced) * others / link,
        "host": offloaded,
    }


def hours_of_steps(cfg, memory):
    """Hours of steps 1, 2 and 3. The rows of the three steps are as 2 : 4 : 4, DeepSpeed-Chat's
    split of its data, once through each; rows have the length of a prompt and an answer, and
    step 2 reads two answers to each prompt."""
    actor, critic = memory.actor, memory.critic
    T, A = cfg.length, cfg.max_new_tokens
    flop_per_s = cfg.gpus * cfg.mfu * cfg.peak_flops
    recompute = int(cfg.gradient_checkpointing)
    forwards = (2 if actor.lora else 3) + recompute
    rows = cfg.pairs / 2
    step1 = forwards * flops(actor.shape, rows * T, T, rows * A) / flop_per_s
    rows = 2 * cfg.pairs
    step2 = (3 + recompute) * flops(critic.shape, rows * T, T, 0) / flop_per_s
    iterations = cfg.pairs / cfg.batch_size
    step3 = iterations * sum(seconds_of_iteration(cfg, memory).values())
    return [seconds / 3600 for seconds in (step1, step2, step3)]


def with_measured(cfg):
    """The Config with the shares that files of bench.py have measured, and what they rest on."""
    found = {}
    for path in filter(None, cfg.measured.split(",")):
        utils.require_file("measured", path)
        record = read_record(path)
        check_device(cfg, path, record)
        rows = [row for row in record["rows"] if row.get("case") == "fixed" and row["mean_length"]]
        config = record["config"]
        if record["task"] == "ppo" and rows:
            found["mfu"] = measured_mfu(cfg, rows, config)
        elif record["task"] == "generate" and rows:
            share = statistics.median(row["floor_share"] for row in rows)
            bytes_per_s = share * record["ceilings"]["bytes_per_s"]
            found["bandwidth"] = bytes_per_s / cfg.machine.bandwidth
        else:
            message = (
                f"--measured {path}: holds no rows of `bench.py ppo` or `bench.py generate` at "
                "fixed lengths"
            )
            raise utils.UserError(message)
    cfg = replace(cfg, **found)
    parts = []
    for name, what in (("bandwidth", "of the bandwidth in decode"), ("mfu", "MFU elsewhere")):
        how = f"measured on {cfg.gpu}" if name in found else "assumed"
        parts.append(f"{how}: {getattr(cfg, name):.0%} {what}")
    return cfg, ", ".join(parts)


def read_record(path):
    try:
        record = tables.read_json(path)
        return {key: record[key] for key in ("task", "device", "config", "rows", "ceilings")}
    except (ValueError, KeyError, TypeError):
        message = f"--measured {path}: is not a file that bench.py has written"
        raise utils.UserError(message) from None


def check_device(cfg, path, record):
    """Raises UserError for shares of another device."""
    model = cfg.gpu.partition("-")[0].upper()
    if model not in record["device"]:
        message = (
            f"--measured {path}: was measured on {record['device']}, and its shares say nothing of "
            f"--gpu {cfg.gpu}"
        )
        raise utils.UserError(message)


def measured_mfu(cfg, rows, config):
    """Of scoring and training, in the row with the largest batch."""
    row = max(rows, key=lambda row: row["batch"])
    B, A = row["batch"], row["mean_length"]
    T = row["prompt_len"] + A
    actor = flops(SHAPES[row["model"]], B * T, T, B * A)
    critic = flops(SHAPES[row["critic"]], B * T, T, 0)
    frozen = 1 if row["minibatches"] == 1 else 2
    actor_forwards = frozen + (2 if config["lora"] else 3) + config["gradient_checkpointing"]
    critic_forwards = 4 + config["gradient_checkpointing"]
    if config["scorer"] == "model":
        critic_forwards += 1
    work = actor_forwards * actor + critic_forwards * critic
    seconds = row["hybrid"]["score_s"] + row["hybrid"]["update_s"]
    return work / seconds / cfg.machine.bf16


# -----------------------------------------------------------------------------
# what to change where it does not fit


def next_change(cfg, memory):
    """What to change first where a plan does not fit, as {field: value}; None: nothing is left."""
    totals = memory.totals
    worst = max(totals, key=totals.get)
    parts = memory.phases[worst]
    s = memory.actor.shape
    tp = 2 * cfg.tp
    if cfg.gpus > 1 and cfg.zero < 3:
        return {"zero": 3}
    if worst == "rollout" and cfg.zero == 3 and tp <= min(8, cfg.gpus):
        if not (cfg.gpus % tp or s.H % tp or s.K % tp or s.M % tp):
            return {"tp": tp}
    if parts["activations"] + parts["logits"] > 0.1 * memory.limit:
        if cfg.rows > 8:
            return {"micro_batch": cfg.rows // 2}
        if not cfg.gradient_checkpointing:
            return {"gradient_checkpointing": True}
    if not memory.actor.lora:
        return {"lora": "64"}
    if cfg.rows > 1:
        return {"micro_batch": cfg.rows // 2}
    if not cfg.offload and not cfg.is_cpu:
        return {"zero": max(2, cfg.zero), "offload": True}  # stage 1 keeps gradients on the GPU
    return None


def make_it_fit(cfg):
    """Changes a plan until it fits. Returns (Config, Memory, {field: value} of the changes), or
    None where nothing is left to change."""
    changes = {}
    memory = Memory(cfg)
    while not memory.fits:
        change = next_change(cfg, memory)
        if change is None:
            return None
        changes |= change
        cfg = replace(cfg, **change)
        memory = Memory(cfg)
    return cfg, memory, changes


def flag_text(changes):
    """The changes as they are typed."""
    words = []
    for name, value in changes.items():
        words.append(utils.flag_of(name) if value is True else f"{utils.flag_of(name)} {value}")
    return " ".join(words)


# -----------------------------------------------------------------------------
# one plan, on the screen


def print_plan(cfg):
    cfg, basis = with_measured(cfg)
    memory = Memory(cfg)
    print_memory(cfg, memory)
    print_advice(cfg, memory)
    if cfg.is_cpu:
        print("no times: they need the data sheet of a GPU")
    else:
        print_times(cfg, memory, basis)


def print_memory(cfg, memory):
    actor, critic = memory.actor, memory.critic
    trained = ""
    if actor.lora:
        trained = f", of which {actor.trained / 1e6:,.0f} M are trained"
    print(
        f"actor: {actor.params / 1e6:,.0f} M parameters{trained}; critic: "
        f"{critic.params / 1e6:,.0f} M; {cfg.gpus} x {cfg.gpu}, ZeRO stage {cfg.stage}, "
        f"{'bf16' if cfg.itemsize == 2 else 'fp32'}; per step and rank {cfg.micro_batches} x "
        f"{cfg.rows} rows of {cfg.length} tokens"
    )
    phases = memory.phases
    print(f"\n{'GiB per rank':<22}" + "".join(f"{phase:>10}" for phase in phases))
    for part in PARTS:
        print_row(part, [phases[phase][part] for phase in phases])
    print_row("together", memory.totals.values())
    if memory.waves > 1 and memory.fits:
        print(f"the rows of a rank take {memory.waves:.1f} turns in the KV cache")
    if memory.host_bytes:
        on_machine = min(cfg.gpus, 8) * memory.host_bytes / GIB
        print(f"and {on_machine:,.0f} GiB of host memory per machine of {min(cfg.gpus, 8)} GPUs")


def print_row(title, values):
    """Values in bytes; nothing where all are nearly 0."""
    values = [value / GIB for value in values]
    if max(values) >= 0.005:
        print(f"{title:<22}" + "".join(f"{value:>10.2f}" for value in values))


def print_advice(cfg, memory):
    need = memory.peak_bytes / GIB
    limit = memory.limit / GIB
    if memory.fits:
        print(f"\nfits: {need:.1f} of {limit:.1f} GiB")
        return
    print(f"\ndoes not fit: {need:.1f} of {limit:.1f} GiB")
    change = next_change(cfg, memory)
    solution = make_it_fit(cfg)
    if change is None or solution is None:
        print("no flag makes it fit: take more GPUs, larger ones, or a smaller model")
        return
    _, changed, changes = solution
    print(
        f"change first: {flag_text(change)}; it fits with {flag_text(changes)} "
        f"({changed.peak_bytes / GIB:.1f} GiB)"
    )


def print_times(cfg, memory, basis):
    if not memory.fits:
        return
    seconds = seconds_of_iteration(cfg, memory)
    text = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    total = sum(seconds.values())
    print(f"\nseconds per iteration: {text}; {cfg.batch_size / total:.1f} pairs/s")
    hours = hours_of_steps(cfg, memory)
    text = ", ".join(f"{h:.2f}" for h in hours)
    print(f"hours of steps 1, 2, 3, for {cfg.pairs:,} pairs: {text}")
    if cfg.price:
        dollars = [h * cfg.gpus * cfg.price for h in hours]
        text = ", ".join(f"${x:,.0f}" for x in dollars)
        print(f"cost at ${cfg.price:g} per GPU and hour: {text}; together ${sum(dollars):,.0f}")
    print(
        f"{basis}; NVIDIA's data sheet: {cfg.machine.bandwidth / 1e12:.2f} TB/s, "
        f"{cfg.peak_flops / 1e12:.0f} TFLOP/s; "
        f"{NETWORK / 1e9:.0f} GB/s per GPU between machines; {RESERVED:g} GiB of a GPU are not for "
        "tensors; nothing is hidden behind anything else"
    )


# -----------------------------------------------------------------------------
# DeepSpeed-Chat's tables, and ours

BLOG = "https://github.com/deepspeedai/DeepSpeed/blob/master/blogs/deepspeed-chat/README.md"
# Hours, and dollars where they are given, of step 3: the blog's tables 1 and 2; on one GPU, and
# OPT-1.3B, table 1 in the README of its code (applications/DeepSpeed-Chat in DeepSpeedExamples).
DEEPSPEED_CHAT = {
    ("a100-40g", 1, "opt-1.3b"): (15.4, None),
    ("a100-40g", 1, "opt-6.7b"): (3.4 * 24, None),
    ("a100-80g", 1, "opt-1.3b"): (11.7, None),
    ("a100-80g", 1, "opt-6.7b"): (40.8, None),
    ("a100-80g", 1, "opt-13b"): (117.6, None),
    ("a100-40g", 8, "opt-1.3b"): (2.0, None),
    ("a100-40g", 8, "opt-6.7b"): (5.7, None),
    ("a100-40g", 8, "opt-13b"): (10.8, None),
    ("a100-40g", 8, "opt-30b"): (1.85 * 24, None),
    ("a100-80g", 8, "opt-1.3b"): (1.4, 45),
    ("a100-80g", 8, "opt-6.7b"): (4.1, 132),
    ("a100-80g", 8, "opt-13b"): (9.0, 290),
    ("a100-80g", 8, "opt-30b"): (18.0, 580),
    ("a100-80g", 8, "opt-66b"): (2.1 * 24, 1620),
    ("a100-80g", 64, "opt-1.3b"): (31 / 60, None),
    ("a100-80g", 64, "opt-6.7b"): (51 / 60, None),
    ("a100-80g", 64, "opt-13b"): (1.25, 320),
    ("a100-80g", 64, "opt-30b"): (4.0, 1024),
    ("a100-80g", 64, "opt-66b"): (7.5, 1920),
    ("a100-80g", 64, "opt-175b"): (20.0, 5120),
}
# Hours of steps 1, 2 and 3: the blog's tables 4 and 5. (Table 6 is of another data set.)
THREE_STEPS = {
    ("a100-40g", 8, "opt-13b"): (2.5, 0.25, 10.8),
    ("a100-80g", 64, "opt-66b"): (82 / 60, 5 / 60, 7.5),
}
# The largest actor on one GPU: the blog's table 3.
LARGEST = {
    "v100-32g": "opt-2.7b", "a6000": "opt-6.7b", "a100-40g": "opt-6.7b", "a100-80g": "opt-13b",
}
AZURE = 4.0  # dollars per GPU and hour: what its costs are, divided by GPUs and hours


def benchmark(gpu, gpus, model, **more):
    """The workload of DeepSpeed-Chat's tables: its BenckmarkSetting.md."""
    options = dict(
        model=model, critic="opt-350m", gpu=gpu, gpus=gpus, batch_size=1024, minibatches=1,
        micro_batch=16, ema=0.0, zero=3 if gpus > 1 else 0, price=AZURE,
    )
    return Config(**options | more)


def step3_rows(**assumptions):
    for (gpu, gpus, model), (hours, dollars) in DEEPSPEED_CHAT.items():
        row = {"table": "step 3", "gpu": gpu, "gpus": gpus, "model": model}
        row |= {"published_hours": hours, "published_dollars": dollars}
        solution = make_it_fit(benchmark(gpu, gpus, model, **assumptions))
        if solution:
            cfg, memory, changes = solution
            seconds = seconds_of_iteration(cfg, memory)
            hours = hours_of_steps(cfg, memory)
            row |= {f"{name}_s": value for name, value in seconds.items()}
            row |= {"flags": flag_text(changes), "gib": memory.peak_bytes / GIB, "hours": hours}
            row["dollars"] = AZURE * gpus * hours[2]
        yield row


def three_step_rows(**assumptions):
    for (gpu, gpus, model), hours in THREE_STEPS.items():
        cfg, memory, changes = make_it_fit(benchmark(gpu, gpus, model, **assumptions))
        yield {
            "table": "steps 1 to 3", "gpu": gpu, "gpus": gpus, "model": model,
            "published_hours": hours, "flags": flag_text(changes),
            "hours": hours_of_steps(cfg, memory),
        }


def largest_rows():
    """The largest OPT that fits on one GPU, with all flags, and with all but --offload."""
    names = [name for name in SHAPES if re.fullmatch(r"opt-[\d.]+[mb]", name)]
    for gpu, published in LARGEST.items():
        row = {"table": "largest", "gpu": gpu, "published": published}
        for model in names:
            solution = make_it_fit(benchmark(gpu, 1, model))
            if solution is None:
                continue
            flags = flag_text(solution[2])
            column = "with_offload" if "--offload" in flags else "without"
            row[column] = model
            row[f"{column}_flags"] = flags
        yield row


def write_tables(cfg):
    cfg, basis = with_measured(cfg)
    shares = {"mfu": cfg.mfu, "bandwidth": cfg.bandwidth}
    rows = [*step3_rows(**shares), *three_step_rows(**shares), *largest_rows()]
    for row in rows:
        print(json.dumps(row))
    record = {
        "task": "plan",
        "command": f"python plan.py --deepspeed-chat --out {cfg.out}",
        "edition": 2,
        "device": "none",
        "basis": basis,
        "source": BLOG,
        "price": AZURE,
        "commit": utils.git_commit(),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "rows": rows,
    }
    with utils.writing(cfg.out, "; name another file with --out"):
        utils.atomic_write(cfg.out, json.dumps(record, indent=1))
    print(f"wrote {cfg.out}")


def main(cfg):
    if cfg.deepspeed_chat:
        write_tables(cfg)
    else:
        print_plan(cfg)


if __name__ == "__main__":
    utils.run(main, Config)
