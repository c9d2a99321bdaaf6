"""Does a PPO run fit, how long will it take, what will it cost? Before anything is allocated.

    python -m tools.plan --model opt-13b --critic opt-350m --gpu a100-80g --gpus 8 --zero 3
    python -m tools.plan --model out/sft --reward out/reward --gpu cpu --batch-size 64
    python -m tools.plan --model opt:num_hidden_layers=24,hidden_size=2048 --gpus 4

The flags are those of ppo.py. A model is a name in KNOWN, a folder or hub name (only its config is
read), or a family of transformers with changes to its default config. Parameters and activations
are counted on a model without memory (meta and fake tensors). What DeepSpeed allocates is by
formula, checked against peaks measured on a CPU. Times are those of --mfu and --bandwidth.

Dimension key:  B batch, P prompt, A answer, T = P + A, L layers, E width, H query heads,
                K key/value heads, D head size, M width of the MLP, V vocabulary.
"""
import ast
import copy
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple
from unittest import mock

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import data
import utils
from hybrid_engine import PREFILL_TOKENS
from kernels import TokenLogprobs

GIB = 2**30
NETWORK = 50e9          # bytes/s per GPU between machines of 8: 400 Gb/s
PCIE = 25e9             # bytes/s between a GPU and the host
HOST_BANDWIDTH = 100e9  # bytes/s of the host's memory for one GPU's share of the optimizer
RESERVED = 2.5          # GiB of a GPU that no tensor has: CUDA, NCCL, cuBLAS, fragmentation
BUCKET = 5e8            # elements: DeepSpeed's reduce_bucket_size, and half of its
#   stage3_max_reuse_distance, within which ZeRO-3 keeps gathered weights for the backward


class Machine(NamedTuple):
    """NVIDIA's data sheets; dense, without sparsity."""
    memory: float       # GiB
    bandwidth: float    # bytes/s of its memory
    bf16: float         # FLOP/s; 0: it has none
    fp32: float         # FLOP/s
    link: float         # bytes/s to its neighbours, one way


MACHINES = {
    "h200":     Machine(141, 4.80e12, 989e12, 67e12, 450e9),
    "h100":     Machine(80, 3.35e12, 989e12, 67e12, 450e9),
    "a100-80g": Machine(80, 2.04e12, 312e12, 19.5e12, 300e9),
    "a100-40g": Machine(40, 1.56e12, 312e12, 19.5e12, 300e9),
    "a6000":    Machine(48, 0.77e12, 155e12, 38.7e12, 56e9),
    "rtx4090":  Machine(24, 1.01e12, 165e12, 82.6e12, 32e9),
    "v100-32g": Machine(32, 0.90e12, 0, 15.7e12, 150e9),
    "cpu":      Machine(psutil.virtual_memory().total / GIB, 0, 0, 0, 0),
}

# -----------------------------------------------------------------------------
# models

# name, family of transformers, L, E, H, K, D, M, V, whether the output layer is the embedding
KNOWN = """
opt-4x256     opt     4   256   4   4   64   1024    8192  tied
llama-4x256   llama   4   256   4   2   64    688    8192  own
opt-125m      opt    12   768  12  12   64   3072   50272  tied
opt-350m      opt    24  1024  16  16   64   4096   50272  tied
opt-1.3b      opt    24  2048  32  32   64   8192   50272  tied
opt-2.7b      opt    32  2560  32  32   80  10240   50272  tied
opt-6.7b      opt    32  4096  32  32  128  16384   50272  tied
opt-13b       opt    40  5120  40  40  128  20480   50272  tied
opt-30b       opt    48  7168  56  56  128  28672   50272  tied
opt-66b       opt    64  9216  72  72  128  36864   50272  tied
opt-175b      opt    96 12288  96  96  128  49152   50272  tied
llama-3.2-1b  llama  16  2048  32   8   64   8192  128256  tied
llama-8b      llama  32  4096  32   8  128  14336  128256  own
llama-70b     llama  80  8192  64   8  128  28672  128256  own
qwen2.5-0.5b  qwen2  24   896  14   2   64   4864  151936  tied
qwen2.5-7b    qwen2  28  3584  28   4  128  18944  152064  own
qwen3-0.6b    qwen3  28  1024  16   8  128   3072  151936  tied
qwen3-8b      qwen3  36  4096  32   8  128  12288  151936  own
"""
KNOWN = {row.split()[0]: row.split()[1:] for row in KNOWN.strip().splitlines()}


def find_config(name):
    """The transformers config of --model and its like."""
    from transformers import AutoConfig

    if name in KNOWN:
        family, *sizes, tied = KNOWN[name]
        L, E, H, K, D, M, V = map(int, sizes)
        more = dict(intermediate_size=M, num_key_value_heads=K, head_dim=D)
        if family == "opt":
            is_350m = name == "opt-350m"
            more = dict(ffn_dim=M, word_embed_proj_dim=512 if is_350m else E,
                        do_layer_norm_before=not is_350m)
        return AutoConfig.for_model(
            family, num_hidden_layers=L, hidden_size=E, num_attention_heads=H, vocab_size=V,
            tie_word_embeddings=tied == "tied", max_position_embeddings=2048, **more)
    family, _, changes = name.partition(":")
    if changes:
        pairs = (pair.split("=") for pair in changes.split(","))
        return AutoConfig.for_model(family, **{k: ast.literal_eval(v) for k, v in pairs})
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        raise utils.UserError(f"{name}: no model; there are {', '.join(KNOWN)}") from None


def count(module):
    return sum(p.numel() for p in module.parameters())


@cache
class Net:
    """The sizes of a model, counted on one without memory. lora: rank of its adapters."""

    def __init__(self, name, lora=0):
        from transformers import AutoModelForCausalLM

        self.config = config = find_config(name)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        self.L, self.E, self.V = config.num_hidden_layers, config.hidden_size, config.vocab_size
        self.H = config.num_attention_heads
        self.K = getattr(config, "num_key_value_heads", None) or self.H
        self.D = getattr(config, "head_dim", None) or self.E // self.H
        self.out = lm.get_output_embeddings().weight.size(1)  # OPT-350M: not E
        self.full = count(lm)
        self.reward = count(lm.base_model) + self.out  # a reward model or critic of this shape
        self.largest = max(p.numel() for p in lm.parameters())
        in_layers = [p for n, p in lm.named_parameters() if re.search(r"\.\d+\.", n)]
        matrices = [p for p in in_layers if p.dim() == 2]
        self.matrices = sum(p.numel() for p in matrices)
        self.M = max(max(p.shape) for p in matrices)
        self.is_gated = any("gate" in n for n, _ in lm.named_modules())
        utils.add_lora(lm, lora)
        self.adapters = count(lm) - self.full

    def kv_bytes(self, itemsize):  # of one token
        return 2 * self.L * self.K * self.D * itemsize

    def flops(self, tokens, length, head_tokens):
        """Of one forward over `tokens` tokens in rows of `length`, and of the output layer."""
        attention = 2 * self.L * self.H * self.D * length
        return tokens * (2 * self.matrices + attention) + 2 * self.E * self.V * head_tokens

    def forward_bytes(self, tokens, itemsize):
        """What a layer has at once without gradients, in its attention or in its MLP."""
        attention = 3 * self.E + 2 * (self.H + self.K) * self.D
        mlp = 2 * self.E + (2 + self.is_gated) * self.M
        return tokens * itemsize * max(attention, mlp)


@cache
def kept_bytes(name, lora, length, itemsize):
    """What one layer keeps for its backward, for a row of `length` tokens: the difference of models
    of two layers and of one, in a forward of fake tensors, which have no memory."""
    from transformers import AutoModelForCausalLM

    totals = []
    for layers in (1, 2):
        config = copy.deepcopy(find_config(name))
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
        # Of fake tensors transformers cannot see that rows are whole, and would make a mask.
        packed = "transformers.masking_utils.find_packed_sequence_indices"
        with FakeTensorMode(), mock.patch(packed, return_value=None):
            dtype = torch.float32 if itemsize == 4 else torch.bfloat16
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
            lm = utils.add_lora(lm, lora).eval()  # no dropout
            kept = {x.untyped_storage()._cdata: 0 for x in (*lm.parameters(), *lm.buffers())}
            alive = []  # so that no other tensor has its address

            def pack(x, kept=kept, alive=alive):
                alive.append(x)
                kept.setdefault(x.untyped_storage()._cdata, x.untyped_storage().nbytes())
                return x

            with saved_tensors_hooks(pack, lambda x: x):
                lm.base_model(torch.ones(1, length, dtype=torch.long), use_cache=False)
        totals.append(sum(kept.values()))
    return totals[1] - totals[0]


# -----------------------------------------------------------------------------
# command line


@dataclass
class Config:
    # models
    model: str = "opt-1.3b"        # the actor
    reward: str = "critic"         # as in ppo.py; critic: one reward model of the critic's shape
    critic: str = ""               # empty: the shape of the first reward model, else of --model
    lora: int = 0                  # rank of the actor's adapters; 0: train all weights
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
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 where a GPU has it
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage: shards optimizer (1), gradients (2), weights (3)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    offload: bool = False          # keep optimizers, frozen models and ZeRO-3 shards in CPU memory
    # machine
    gpus: int = 1                  # ranks
    gpu: Literal[tuple(MACHINES)] = "h100"  # kind of machine
    pairs: int = 264_292           # prompts of step 3, each used once
    price: float = 0.0             # dollars per GPU and hour
    mfu: float = 0.5               # share of the FLOP/s in prefill, scoring and training
    bandwidth: float = 0.7         # share of the memory bandwidth in decode

    def __post_init__(self):
        if self.batch_size % (self.minibatches * self.gpus) or self.gpus % self.tp:
            raise utils.UserError("--batch-size must be a multiple of --minibatches x --gpus, and "
                                  "--gpus one of --tp")
        # Not frozen: what follows from the flags, where all formulas can see it.
        self.machine = machine = MACHINES[self.gpu]
        self.is_cpu = self.gpu == "cpu"
        self.itemsize = {"auto": 2 if machine.bf16 else 4, "fp32": 4, "bf16": 2}[self.dtype]
        flop_per_s = machine.fp32 if self.itemsize == 4 else machine.bf16
        self.flop_per_s = self.gpus * self.mfu * flop_per_s  # of all GPUs
        self.stage = self.zero  # as in utils.train_engine
        if self.offload or self.itemsize == 2:
            self.stage = max(self.zero, 1)
        self.sharded = self.gpus if self.zero == 3 else 1  # over how many ranks weights are spread
        self.length = self.prompt_len + self.max_new_tokens
        share = self.batch_size // self.minibatches // self.gpus
        self.rows = min(self.micro_batch or share, share)  # of a micro batch
        self.micro_batches = math.ceil(share / self.rows)


# -----------------------------------------------------------------------------
# memory


class Trained:
    """What DeepSpeed 0.19 allocates on one rank for a model that it trains, in bytes."""

    kept_gradients = kept_buffers = 0     # there all the time, as weights and optimizer are
    gradients = waiting = in_step = 0     # between micro batches, after the last, in the step
    backward_buffers = reduce_buffers = step_buffers = 0  # when a backward starts and ends; step

    def __init__(self, cfg, name, lora=0, is_policy=False):
        net = self.net = Net(name, lora)
        self.params = net.full + net.adapters if is_policy else net.reward
        self.trained = n = net.adapters if lora else self.params
        self.shard = shard = n / (1 if cfg.stage == 0 else cfg.gpus)
        size, cpu = cfg.itemsize, cfg.is_cpu
        self.weights = size * self.params
        self.optimizer = 12 * shard
        bucket = size * min(BUCKET, n)
        # On a CPU memory that is never written to does not count, and AdamW, which is not fused,
        # makes two temporary tensors.
        whole_bucket = bucket if cpu else size * BUCKET
        temporary = 8 * shard * cpu
        if cfg.stage == 0:  # float32; AdamW works on one tensor at a time
            self.optimizer = 8 * n
            self.gradients = self.waiting = self.in_step = 4 * n
            self.reduce_buffers = bucket
            self.step_buffers = 8 * min(n, net.largest) * cpu
        elif cfg.stage == 3:  # zero/stage3.py
            self.weights /= cfg.gpus
            self.kept_gradients = 4 * shard
            self.kept_buffers = whole_bucket
            # Weights that are used again within stage3_max_reuse_distance stay gathered.
            self.backward_buffers = size * max(min(BUCKET, self.params), net.largest)
            self.reduce_buffers = bucket * (1 + cpu) + size * net.largest
            self.step_buffers = 4 * shard + temporary
        elif cfg.stage == 1 and size == 2 and not cfg.offload:  # bf16_optimizer.py
            self.kept_gradients = 4 * n
            self.reduce_buffers = 2 * n
            self.step_buffers = temporary
        else:  # zero/stage_1_and_2.py
            self.gradients = 4 * n
            self.waiting = 4 * shard
            self.in_step = 0 if cpu else self.waiting
            its_bucket = whole_bucket if cfg.stage == 2 else 4 * BUCKET * (not cpu)
            self.backward_buffers = 0 if cpu else its_bucket
            self.reduce_buffers = its_bucket + bucket
            self.step_buffers = 4 * shard + temporary
        self.host = 0
        if cfg.offload:
            self.host = 16 * shard
            if cfg.stage == 3:
                self.host += self.weights
                self.weights = 0
            else:  # the largest gradient on its way to the host
                self.kept_buffers = size * min(n, net.largest)
            self.optimizer = self.kept_gradients = self.waiting = 0
            self.in_step = self.step_buffers = 0
        if cfg.stage == 2:
            self.gradients = self.waiting
        # Before a backward, and after it: those of stage 2 stay in its bucket until their sum.
        self.before = 0 if cfg.micro_batches == 1 else self.gradients
        self.after = self.before if cfg.stage == 2 else self.gradients

        layer = cfg.rows * kept_bytes(name, lora, cfg.length, size)
        self.activations = net.L * layer
        if cfg.gradient_checkpointing:  # the input of each layer, and one layer's
            self.activations = net.L * cfg.rows * cfg.length * net.E * size + layer
        self.logits = 0
        if is_policy:  # kernels.TokenLogprobs: hidden states, their gradient and the weight's
            answers = cfg.rows * cfg.max_new_tokens
            weight = 0 if lora else 4 * net.V * net.out
            self.logits = 2 * size * answers * net.out + weight + chunk_bytes(cfg, net, answers)


def chunk_bytes(cfg, net, answers):
    """Three chunks of logits in float32, see kernels.logit_grads."""
    chunk = TokenLogprobs.CHUNK["cpu" if cfg.is_cpu else "cuda"]
    return 12 * net.V * min(answers, max(1, chunk // net.V))


class Memory:
    """Bytes per GPU of each phase, by part, at the moment of the phase that needs the most."""

    def __init__(self, cfg):
        self.cfg = cfg
        sources = [] if cfg.reward == "critic" else data.parse_sources(cfg.reward)
        names = [name for name, _ in sources if ".py:" not in name]
        critic = cfg.critic or (names or [cfg.model])[0]
        if cfg.reward == "critic":
            names = [critic]
        a = self.actor = Trained(cfg, cfg.model, cfg.lora, is_policy=True)
        c = self.critic = Trained(cfg, critic)
        self.rewards = [Net(name) for name in names]
        # With LoRA the reference is the actor with its adapters off.
        self.ref = 0 if cfg.lora else cfg.itemsize * a.net.full / cfg.sharded
        self.reward = cfg.itemsize * sum(net.reward for net in self.rewards) / cfg.sharded
        ema = 4 * a.shard * (cfg.ema > 0)
        on_gpu = not cfg.offload
        self.host = cfg.offload * (a.host + c.host + self.ref + self.reward + ema)
        # ppo.Batch, which is whole on every rank
        batch = cfg.batch_size * (8 * cfg.length + 40 * cfg.max_new_tokens)
        self.resident = {
            "actor: weights": a.weights, "actor: gradients": a.kept_gradients,
            "actor: optimizer": a.optimizer, "EMA": on_gpu * ema,
            "reference": on_gpu * self.ref, "reward model": on_gpu * self.reward,
            "critic: weights": c.weights, "critic: gradients": c.kept_gradients,
            "critic: optimizer": c.optimizer, "KV cache": 0, "activations": 0, "logits": 0,
            "buffers": batch + a.kept_buffers + c.kept_buffers,
        }
        self.phases = {"rollout": self.rollout(), "score": self.score(), "update": self.update()}
        self.totals = {phase: sum(parts.values()) for phase, parts in self.phases.items()}
        self.peak = max(self.totals.values())
        self.limit = (cfg.machine.memory - (0 if cfg.is_cpu else RESERVED)) * GIB
        self.fits = self.peak * (cfg.gpus if cfg.is_cpu else 1) <= self.limit

    def with_largest(self, *moments):
        """What is resident, and what the largest of these moments adds."""
        largest = max(moments, key=lambda moment: sum(moment.values()))
        return {part: x + largest.get(part, 0) for part, x in self.resident.items()}

    def rollout(self):
        """The KV cache, the larger of prefill and decode, whole weights under ZeRO-3."""
        cfg, net, size = self.cfg, self.actor.net, self.cfg.itemsize
        copies = 0
        if cfg.zero == 3 or cfg.tp > 1:
            copies = size * self.actor.params / cfg.tp
        if cfg.zero == 3:  # gathered one layer at a time
            copies += size * net.largest
        rows = cfg.batch_size // cfg.gpus * cfg.tp
        capacity = 32 * math.ceil(cfg.length / 32)
        per_slot = capacity * (net.kv_bytes(size) / cfg.tp + 12)  # token ids, logprobs
        free = cfg.machine.memory * GIB - sum(self.resident.values()) - copies
        slots = max(1, min(rows, 0.8 * free // per_slot))
        self.turns = rows / slots
        most = PREFILL_TOKENS["cpu" if cfg.is_cpu else "cuda"]
        tokens = min(slots * cfg.prompt_len, max(most, cfg.prompt_len))
        return self.with_largest({
            "KV cache": slots * per_slot, "buffers": copies,
            "activations": net.forward_bytes(tokens, size) / cfg.tp,
            # On a CPU they are copied twice in float32, on a GPU they are float32.
            "logits": slots * net.V * (size + 8 if cfg.is_cpu else 4),
        })

    def score(self):
        """Forwards without gradients. With --offload the frozen models come to the GPU."""
        cfg, size = self.cfg, self.cfg.itemsize
        nets = [self.actor.net, self.critic.net, *self.rewards]
        tokens = cfg.rows * cfg.length
        moment = {"activations": max(net.forward_bytes(tokens, size) for net in nets),
                  "logits": chunk_bytes(cfg, nets[0], cfg.rows * cfg.max_new_tokens)}
        if cfg.zero == 3:  # a gathered tensor, and what it is gathered into
            moment["buffers"] = 2 * size * max(net.largest for net in nets)
        elif cfg.offload:
            moment |= {"reference": self.ref, "reward model": self.reward}
        return self.with_largest(moment)

    def update(self):
        """In each micro batch the actor's backward, then the critic's; after the last one the
        actor's step, then the critic's. Gradients of one wait while the other works."""
        a, c = self.actor, self.critic
        actor_waits = a.waiting if self.cfg.micro_batches == 1 else a.gradients
        moments = [{"actor: gradients": a.in_step, "critic: gradients": c.waiting,
                    "buffers": a.step_buffers},
                   {"critic: gradients": c.in_step, "buffers": c.step_buffers}]
        for own, m, other, waiting in (("actor: gradients", a, "critic: gradients", c.before),
                                       ("critic: gradients", c, "actor: gradients", actor_waits)):
            start = {own: m.before, other: waiting, "activations": m.activations,
                     "logits": m.logits, "buffers": m.backward_buffers}
            end = {own: m.after, other: waiting, "buffers": m.reduce_buffers}
            moments += [start, end]
        return self.with_largest(*moments)


# -----------------------------------------------------------------------------
# time


def seconds_of_iteration(cfg, memory):
    """Decode reads weights and KV cache at --bandwidth, all other work computes at --mfu, and
    nothing that moves (ZeRO, --offload) is hidden behind it."""
    machine, net, critic = cfg.machine, memory.actor.net, memory.critic.net
    B, P, A, T = cfg.batch_size, cfg.prompt_len, cfg.max_new_tokens, cfg.length
    # Rows that do not fit into the KV cache at once take turns.
    rows = B * cfg.tp / cfg.gpus / memory.turns
    read = cfg.itemsize * net.full + rows * (P + A / 2) * net.kv_bytes(cfg.itemsize)
    step = read / cfg.tp / (cfg.bandwidth * machine.bandwidth)
    if cfg.tp > 1:  # two all-reduces per layer
        message = 2 * (cfg.tp - 1) / cfg.tp * rows * net.E * cfg.itemsize
        step += 2 * net.L * (message / machine.link + 10e-6)
    # Reference, critic, reward models; the actor too, where a rollout has several updates.
    actor_forward = net.flops(B * T, T, B * A)
    critic_forward = critic.flops(B * T, T, 0)
    is_single = cfg.ppo_epochs * cfg.minibatches == 1
    scored = actor_forward * (1 if is_single else 2) + critic_forward
    scored += sum(reward.flops(B * T, T, 0) for reward in memory.rewards)
    # A backward is two forwards, with frozen weights one; recomputing is one more.
    recomputed = int(cfg.gradient_checkpointing)
    trained = actor_forward * ((2 if cfg.lora else 3) + recomputed)
    trained += critic_forward * (3 + recomputed)
    return {
        "rollout": memory.turns * A * step + net.flops(B * P, P, B) / cfg.flop_per_s,
        "score": scored / cfg.flop_per_s,
        "update": cfg.ppo_epochs * trained / cfg.flop_per_s,
        **seconds_of_traffic(cfg, memory),
    }


def seconds_of_traffic(cfg, memory):
    """Weights for the rollout (gather), ZeRO in training (traffic), --offload (host)."""
    link = cfg.machine.link if cfg.gpus <= 8 else NETWORK
    per_byte = (cfg.gpus - 1) / cfg.gpus / link  # a rank has its own share already
    steps = cfg.ppo_epochs * cfg.minibatches
    passes = steps * cfg.micro_batches
    moved = host = 0
    for model in (memory.actor, memory.critic):
        weights = cfg.itemsize * model.params
        gradients = cfg.itemsize * model.trained
        if cfg.zero == 3:  # in forward and backward of each micro batch, and in scoring
            moved += weights * (2 * passes + cfg.micro_batches * cfg.minibatches)
        elif cfg.stage > 0:  # the updated weights
            moved += steps * gradients
        reductions = passes if cfg.stage >= 2 else steps
        moved += reductions * gradients * (1 if cfg.zero == 3 else 2)
        # AdamW reads and writes 28 bytes per weight.
        host += steps * (2 * gradients / cfg.gpus / PCIE + 28 * model.shard / HOST_BANDWIDTH)
    host += (memory.ref + memory.reward) / PCIE
    return {
        "gather": cfg.itemsize * memory.actor.params * per_byte if cfg.zero == 3 else 0,
        "traffic": moved * per_byte,
        "host": host if cfg.offload else 0,
    }


def hours_of_steps(cfg, memory):
    """Of steps 1, 2 and 3, whose numbers of rows are as 2 : 4 : 4 (DeepSpeed-Chat's split), each
    row once; step 2 reads two answers to each prompt."""
    T, A, recomputed = cfg.length, cfg.max_new_tokens, int(cfg.gradient_checkpointing)
    forwards = (2 if cfg.lora else 3) + recomputed
    step1 = forwards * memory.actor.net.flops(cfg.pairs * T / 2, T, cfg.pairs * A / 2)
    step2 = (3 + recomputed) * memory.critic.net.flops(2 * cfg.pairs * T, T, 0)
    step3 = cfg.pairs / cfg.batch_size * sum(seconds_of_iteration(cfg, memory).values())
    return [x / 3600 for x in (step1 / cfg.flop_per_s, step2 / cfg.flop_per_s, step3)]


# -----------------------------------------------------------------------------
# advice, and the screen


def make_it_fit(cfg):
    """Changes a plan until it fits, the cheapest change first. Returns (Config, Memory, the flags
    to add), or None where nothing is left to change."""
    changes = {}
    while not (memory := Memory(cfg)).fits:
        phase = max(memory.totals, key=memory.totals.get)
        parts = memory.phases[phase]
        net, tp = memory.actor.net, 2 * cfg.tp
        is_large = parts["activations"] + parts["logits"] > 0.1 * memory.limit
        divides = not any(n % tp for n in (cfg.gpus, net.H, net.K, net.M))
        if cfg.gpus > 1 and cfg.zero < 3:
            change = {"zero": 3}
        elif phase == "rollout" and cfg.zero == 3 and tp <= min(8, cfg.gpus) and divides:
            change = {"tp": tp}
        elif is_large and cfg.rows > 8:
            change = {"micro_batch": cfg.rows // 2}
        elif is_large and not cfg.gradient_checkpointing:
            change = {"gradient_checkpointing": True}
        elif not cfg.lora:
            change = {"lora": 64}
        elif cfg.rows > 1:
            change = {"micro_batch": cfg.rows // 2}
        elif not cfg.offload and not cfg.is_cpu:
            change = {"zero": max(2, cfg.zero), "offload": True}  # stage 1 keeps gradients there
        else:
            return None
        changes |= change
        cfg = replace(cfg, **change)
    flags = [f"--{name} {value}".removesuffix(" True") for name, value in changes.items()]
    return cfg, memory, " ".join(flags).replace("_", "-")


def main(cfg):
    memory = Memory(cfg)
    a, c = memory.actor, memory.critic
    print(f"actor: {a.params / 1e6:,.0f} M parameters, {a.trained / 1e6:,.0f} M trained; critic: "
          f"{c.params / 1e6:,.0f} M; {cfg.gpus} x {cfg.gpu}, ZeRO stage {cfg.stage}, "
          f"{8 * cfg.itemsize} bits; per step and rank {cfg.micro_batches} x {cfg.rows} rows of "
          f"{cfg.length} tokens\n")
    table = {part: [x[part] for x in memory.phases.values()] for part in memory.resident}
    table["together"] = list(memory.totals.values())
    print(f"{'GiB per rank':<22}" + "".join(f"{phase:>10}" for phase in memory.phases))
    for part, values in table.items():
        if max(values) >= 0.005 * GIB:
            print(f"{part:<22}" + "".join(f"{x / GIB:>10.2f}" for x in values))
    if memory.host:
        print(f"and {min(cfg.gpus, 8) * memory.host / GIB:,.0f} GiB of host memory per machine")
    fits = "fits" if memory.fits else "does not fit"
    print(f"\n{fits}: {memory.peak / GIB:.1f} of {memory.limit / GIB:.1f} GiB")
    if not memory.fits:
        solution = make_it_fit(cfg)
        print(f"it fits with {solution[2]} ({solution[1].peak / GIB:.1f} GiB)" if solution else
              "no flag makes it fit: take more GPUs, larger ones, or a smaller model")
    elif not cfg.is_cpu:
        seconds = seconds_of_iteration(cfg, memory)
        hours = hours_of_steps(cfg, memory)
        print("seconds per iteration: " + ", ".join(f"{k} {x:.2f}" for k, x in seconds.items() if x)
              + f"; {cfg.batch_size / sum(seconds.values()):.1f} pairs/s")
        print("hours of steps 1, 2, 3: " + ", ".join(f"{h:.2f}" for h in hours))
        if cfg.price:
            print(f"together ${sum(hours) * cfg.gpus * cfg.price:,.0f}")


if __name__ == "__main__":
    utils.run(main, Config)
