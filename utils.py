"""What the scripts share and a reader rarely opens: command line, start-up, DeepSpeed's settings, model folders, LoRA, logs."""
import argparse
import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import logging
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
import tokenize
import typing
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import kernels


class UserError(ValueError):
    """A mistake that a user can mend. Its message is all that is printed: what was there, where, and what to do."""


def print0(*args):
    if os.environ.get("RANK", "0") == "0":
        print(*args, flush=True)


# -----------------------------------------------------------------------------
# command line


def field_help(Config):
    """{field: the comment behind it in the source}. The comment is the flag's help, so the two cannot differ."""
    out, line_field = {}, {}
    for tok in tokenize.generate_tokens(io.StringIO(inspect.getsource(Config)).readline):
        if tok.type == tokenize.NAME and tok.start[0] not in line_field:
            line_field[tok.start[0]] = tok.string
        elif tok.type == tokenize.COMMENT and tok.start[0] in line_field:
            out[line_field[tok.start[0]]] = tok.string.lstrip("# ")
    return out


def parse_args(Config, argv=None):
    """A frozen dataclass of knobs to a command line: `kl_coef: float = 0.1  # help` is --kl-coef 0.2 (or --kl_coef)."""
    argv = [a.replace("_", "-", a.split("=")[0].count("_")) if a.startswith("--") else a for a in argv or sys.argv[1:]]
    doc = sys.modules[Config.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, comments = typing.get_type_hints(Config), field_help(Config)
    for f in dataclasses.fields(Config):
        kind, flag = hints[f.name], "--" + f.name.replace("_", "-")
        how = {"default": f.default, "help": f"{comments[f.name]} (default: {f.default!r})".replace("%", "%%")}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            how.update(type=type(typing.get_args(kind)[0]), choices=typing.get_args(kind))
        else:
            how.update(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(flag, **how)
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = vars(parser.parse_args(argv))
    args.pop("local_rank")
    try:
        return Config(**args)
    except UserError as e:
        parser.error(str(e))


def run(main, Config):
    """The last line of a script. A user's mistake is one sentence and exit code 2; anything else is a bug and shows its traceback."""
    cfg = parse_args(Config)
    try:
        main(cfg)
    except UserError as e:
        sys.stdout.flush()
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # most mistakes are every rank's: then rank 0 says it, and the launcher ends the others meanwhile
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(2)  # and not sys.exit: another rank may be inside a collective, and would be waited for
    if dist.is_initialized():
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# start-up


def boot(seed):
    """Joins the other ranks, however they were started (python, torchrun, deepspeed). Returns rank, world size, device."""
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported; only spares a warning
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's use of collectives that torch renamed
    importlib.import_module("torch._dynamo")  # before zero.Init, which breaks the import inside it (DeepSpeed 0.19, torch 2.13)
    import deepspeed
    importlib.import_module("deepspeed.comm.torch")
    if not cuda:  # DeepSpeed would compile C++ for two minutes, for a collective that gloo has
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # recomputing, where nothing is trained
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings are of our AdamW, and of skipped steps, which we say ourselves
    quiet()
    rank, device = int(os.environ["RANK"]), torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(verbose=False)
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return rank, dist.get_world_size(), device


def quiet():
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def precision(name):
    """auto is bf16 on a GPU and fp32 on a CPU."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.bfloat16 if torch.cuda.is_available() else torch.float32}[name]


def micro_batches(cfg_batch, cfg_micro, world):
    """Rows of an optimizer step that one rank takes at once, and how often: (micro batch, steps). Checks that they divide."""
    if cfg_batch % world:
        raise UserError(f"--batch-size {cfg_batch} is not divided by the {world} ranks; take a multiple of {world}")
    mine = cfg_batch // world
    micro = min(cfg_micro, mine) if cfg_micro else mine
    return micro, -(-mine // micro)


def deal(rows, lengths, micro, rank, world):
    """The micro batches of one rank, of the rows (an index array) that one optimizer step sees on all ranks. Rows are sorted by
    length and dealt like cards: ranks carry the same load and a micro batch has little padding. Every rank gets equally many."""
    rows = rows[np.argsort(-lengths[rows], kind="stable")][rank::world]
    return [rows[i : i + micro] for i in range(0, len(rows), micro)]


def ask_rows(question, indices, lengths, micro, rank, world):
    """question(indices of a micro batch) -> (b, k) float, for all of `indices`: (n, k), in their order, on every rank."""
    padded = np.resize(indices, len(indices) + -len(indices) % world)  # some twice, so that every rank makes the same forwards
    out = None
    for part in deal(np.arange(len(padded)), lengths[padded], micro, rank, world):
        x = question(padded[part])
        out = x.new_zeros(len(padded), x.size(1)) if out is None else out
        out[part] = x
    dist.all_reduce(out)  # every row was zero on all ranks but one
    return out[: len(indices)]


def all_sum(x, device):
    """Sum over ranks of a number or a tensor."""
    t = torch.as_tensor(x, dtype=torch.float64, device=device).clone()
    dist.all_reduce(t)
    return t if isinstance(x, torch.Tensor) else t.item()


def gather_rows(x, value=0):
    """Rows of all ranks, dealt as rank::world, back in order. x (n, ...) on each rank, n and the last size may differ by rank;
    pads with `value` on the right. Returns (sum of n, ...) on x's device."""
    world, device = dist.get_world_size(), x.device
    if world == 1:
        return x
    shape = torch.tensor([len(x), x.size(-1) if x.dim() > 1 else 0], device=device)
    shapes = [torch.empty_like(shape) for _ in range(world)]
    dist.all_gather(shapes, shape)
    n, width = (int(max(s[i] for s in shapes)) for i in (0, 1))
    full = x.new_full((n, width) if x.dim() > 1 else (n,), value)
    full[(slice(len(x)), slice(x.size(1))) if x.dim() > 1 else slice(len(x))] = x
    parts = [torch.empty_like(full) for _ in range(world)]
    dist.all_gather(parts, full.contiguous())
    total = sum(int(s[0]) for s in shapes)
    return torch.stack(parts, 1).flatten(0, 1)[:total]  # row i of rank r is row i * world + r


# -----------------------------------------------------------------------------
# DeepSpeed


class AdamW(torch.optim.AdamW):
    """NOTE: where `skip` is True a step changes nothing, whatever the gradients hold. DeepSpeed's wrappers each have a rule of their own for
    gradients that are not finite; under this one all models of a script skip together, at every ZeRO stage."""
    skip = False

    def step(self, closure=None):
        return None if self.skip else super().step(closure)


def train_engine(model, lr, micro_batch, accumulate, cfg, eps=1e-8):
    """DeepSpeed around a model to train: one optimizer, bf16 with fp32 master weights on a GPU, ZeRO as asked for.
    cfg has zero, dtype, lora, save_memory and ds_config (a JSON file merged over what stands here)."""
    import deepspeed
    away = cfg.save_memory in ("offload", "both")
    offload = {"device": "cpu" if away else "none"}
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision(cfg.dtype) == torch.bfloat16},
        "zero_optimization": {
            "stage": max(cfg.zero, int(away)),            # DeepSpeed offloads from stage 1 on; on one rank 1 is 0
            "stage3_param_persistence_threshold": 0,      # every parameter is sharded: one rule, and no surprise in memory
            "stage3_prefetch_bucket_size": 0,             # prefetching records one order of layers; RLHF runs several
            "offload_optimizer": offload,
            "offload_param": offload if cfg.zero == 3 else {"device": "none"},
        },
        "zero_force_ds_cpu_optimizer": False,             # torch's AdamW: nothing to compile
        "zero_allow_untested_optimizer": True,            # and below it our own class
        "steps_per_print": 10**9,
    }
    config = merge(config, read_ds_config(cfg.ds_config))
    buffers = {n: b.clone() for n, b in model.named_buffers() if b.dtype == torch.float32}
    lm = getattr(model, "lm", None) or model.model
    if cfg.save_memory in ("recompute", "both"):
        lm.gradient_checkpointing_enable({"use_reentrant": True})  # NOTE: ZeRO-3 lets go of weights that the other kind wants to find again
        lm.enable_input_require_grads()                            # else nothing is recomputed under frozen weights
    adapters = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith(("lora_A", "lora_B"))]
    others = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(("lora_A", "lora_B"))]
    groups = [{"params": adapters, "scale": (lora_spec(cfg.lora)["lr"] or lr) / lr if lr else 1.0}, {"params": others, "scale": 1.0}]
    groups = [g for g in groups if g["params"]]
    trained = [p for g in groups for p in g["params"]]
    # 0.99: between the 0.95 of InstructGPT's large batches and 0.999; a second moment over some hundred steps suits small ones
    optimizer = AdamW(groups, lr=lr, betas=(0.9, 0.99), eps=eps, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    restore_buffers(engine.module, buffers)
    engine.train(cfg.save_memory in ("recompute", "both"))  # transformers recomputes in training mode only; dropout is 0 in either, see load_config
    engine.trained, engine.bad = trained, torch.zeros((), device=engine.device)

    def look(gradient):
        engine.bad.add_(~gradient.sum().isfinite())
    for p in trained:  # before gradients are reduced, so it needs nothing of ZeRO
        p.register_hook(look)
    return engine


def masters(engine):
    """The float32 weights that the optimizer changes, as it keeps them on this rank: tensors of its own, flat shards under ZeRO."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [p for g in engine.basic_optimizer.param_groups for p in g["params"]]


def frozen_engine(model, device, cfg):
    """A model that is only asked: plain on this rank's device, or sharded where ZeRO-3 shards everything. Offloaded, it waits on the CPU: see `near`."""
    model.requires_grad_(False).eval()
    away = cfg.save_memory in ("offload", "both")
    if cfg.zero < 3:
        return model.to("cpu" if away else device, precision(cfg.dtype))
    import deepspeed
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": precision(cfg.dtype) == torch.bfloat16}, "steps_per_print": 10**9,
              "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
                                    "offload_param": {"device": "cpu" if away else "none"}}}
    buffers = {n: b.clone() for n, b in model.named_buffers() if b.dtype == torch.float32}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    restore_buffers(engine.module, buffers)
    engine.eval()
    return engine


@contextlib.contextmanager
def near(device, *models):
    """Within: offloaded frozen models are on the device."""
    away = [m for m in models if m is not None and not hasattr(m, "module") and next(m.parameters()).device != device]
    for m in away:
        m.to(device)
    yield
    for m in away:
        m.to("cpu")


def restore_buffers(module, buffers):
    """NOTE: .bfloat16() rounds buffers too, and with the frequencies of rotary positions that costs accuracy far out."""
    for name, old in buffers.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = old.to(next(module.parameters()).device)


def merge(base, over):
    return {**base, **{k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()}}


def read_ds_config(path):
    if not path:
        return {}
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"--ds-config {path}: {e}") from None
    if not isinstance(config, dict):
        raise UserError(f"--ds-config {path}: must hold one JSON object")
    for owned, flag in (("train_batch_size", "--batch-size"), ("gradient_accumulation_steps", "--micro-batch"), ("fp16", "--dtype")):
        if owned in config:
            raise UserError(f"--ds-config {path}: {owned} is set by {flag}; take it out of the file")
    return config


def set_lr(engine, lr):
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


PATIENCE = 5  # steps in a row without a finite gradient, before a run gives up


class Skipped:
    """Steps that were not taken, of the run and in a row."""
    total = in_a_row = 0


def step(*engines):
    """engine.step() of each, which acts only after the last of the accumulated micro batches. Where a gradient of any of them is not finite on any
    rank, none of them takes the step, anywhere. Returns the norms of the gradients before clipping, None where not finite; () in between."""
    if not engines[0].is_gradient_accumulation_boundary():
        for e in engines:
            e.step()
        return ()
    bad = sum(e.bad for e in engines)
    dist.all_reduce(bad)
    Skipped.in_a_row, Skipped.total = Skipped.in_a_row + 1 if bad else 0, Skipped.total + int(bad > 0)
    if bad:
        print0("    warning: a loss or a gradient is not finite: no model takes this step")
    norms = []
    for e in engines:
        norm = None
        if e.zero_optimization_stage() == 0 and e.get_global_grad_norm() is None:  # plain fp32: DeepSpeed keeps no record
            norm = torch.nn.utils.get_total_norm([p.grad for p in e.module.parameters() if p.grad is not None])
        e.basic_optimizer.skip = bool(bad)
        e.step()
        e.bad.zero_()
        norms.append(None if bad else float(norm if norm is not None else e.get_global_grad_norm()))
    if Skipped.in_a_row >= PATIENCE:
        raise UserError(f"the last {PATIENCE} steps had a loss or a gradient that is not finite, and were skipped: take a lower learning rate, then start "
                        "again; if the very first steps did, look at the data and at the model's dtype")
    return norms


class EMA:
    """Exponential moving average of what is trained: float32, of the float32 master weights, sharded as the optimizer shards them (Ouyang et al. 2022,
    appendix C.4, take 0.992). In 16 bit it would hardly move: 1 - decay of a difference is below the last bit."""

    def __init__(self, engine, decay, cpu=False):
        self.engine, self.decay = engine, decay
        self.average = [m.detach().clone().to("cpu" if cpu else m.device) for m in masters(engine)]

    @torch.no_grad()
    def update(self):
        """Once an optimizer step."""
        for a, m in zip(self.average, masters(self.engine)):
            a.lerp_(m.detach().to(a.device), 1 - self.decay)

    @torch.no_grad()
    def whole(self):
        """{parameter: its average, whole}, gathered one by one as they are asked for: see whole_state."""
        from deepspeed.utils import safe_get_full_fp32_param
        if self.engine.zero_optimization_stage() == 0:
            at = {p: i for i, p in enumerate(self.engine.trained)}
            return lambda p: self.average[at[p]] if p in at else p.detach()
        return lambda p: safe_get_full_fp32_param(p) if p.requires_grad else p.detach()

    @torch.no_grad()
    def save(self, lm, tokenizer, out):
        """A model folder. The average takes the masters' place while it is gathered."""
        ms = masters(self.engine)
        kept = [m.detach().clone() for m in ms]
        for m, a in zip(ms, self.average):
            m.data.copy_(a)
        save_model(lm, tokenizer, out, value=self.whole())
        for m, k in zip(ms, kept):
            m.data.copy_(k)


def memory_gib():
    """Most memory that this process has held: on the GPU, else on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cosine(step, total, warmup=0.03, floor=0.1):
    """Share of the peak learning rate: linear warm-up over 3% of the steps, then half a cosine down to 10%."""
    up = max(1, int(warmup * total))
    return (step + 1) / up if step < up else floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * (step - up) / max(1, total - up)))


# -----------------------------------------------------------------------------
# models


def first_line(e):
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def load_tokenizer(path):
    """The tokenizer of a model folder or a name on the hub; `tiny` is the built-in one (a token a byte)."""
    if path == "tiny":
        return tiny_tokenizer()
    from transformers import AutoTokenizer
    if Path(path).is_dir() and not any((Path(path) / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"{path}: this model folder has no tokenizer (no tokenizer.json); save one there with tokenizer.save_pretrained")
    check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as e:
        raise UserError(f"{path}: its tokenizer cannot be loaded ({first_line(e)})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no EOS token, so no answer could ever end")
    return tokenizer


def check_folder(path):
    looks_local = Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1 or path.split("/")[0] == "out"
    if looks_local and not Path(path).is_dir():
        raise UserError(f"{path}: no such model folder; train one first, or name another")


def load_config(path):
    """A model's config with dropout off: in PPO it would make old and new log-probabilities differ by noise."""
    from transformers import AutoConfig
    check_folder(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: neither a model folder nor a name that the hub knows ({first_line(e)})") from None
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name):
            setattr(config, name, 0.0)
    return config


def load_pretrained(auto_class, path, config, may_miss=()):
    """from_pretrained that accepts no missing, renamed or misshapen tensor except those named in may_miss."""
    try:
        model, info = auto_class.from_pretrained(path, config=config, dtype=config.dtype or torch.float32, output_loading_info=True,
                                                 ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: the model cannot be loaded ({first_line(e)})") from None
    missing = [k for k in info["missing_keys"] if not k.startswith(tuple(may_miss) or "\0")]
    unexpected = [k for k in info["unexpected_keys"] if not may_miss]
    shapes = [k[0] if isinstance(k, tuple) else k for k in info["mismatched_keys"]]
    for what, keys in (("lacks", missing), ("has unknown", unexpected), ("has the wrong shape for", shapes)):
        if keys:
            raise UserError(f"{path}: the file {what} {len(keys)} tensor{'s' * (len(keys) > 1)}, such as {sorted(keys)[0]}; "
                            "it is not a whole model of this kind, and random weights in its place would train without an error")
    return model


def load_lm(path, dtype):
    """A causal LM to train or to ask; `tiny` is the built-in one, from scratch."""
    if path == "tiny":
        return tiny_lm().to(dtype)
    from transformers import AutoModelForCausalLM
    config = load_config(path)
    config.dtype = dtype
    return load_pretrained(AutoModelForCausalLM, path, config)


def tiny_tokenizer():
    """256 bytes, <pad> and <eos>: knows every text, offline."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tok = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>", pad_token="<pad>", model_max_length=512)


def tiny_lm():
    """A Llama of 0.82 M parameters: 4 layers of width 128, 512 tokens of context."""
    from transformers import LlamaConfig, LlamaForCausalLM
    tok = tiny_tokenizer()
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=344,
        initializer_range=0.05,  # at this width 0.02 is too near 0: the skills of `toy` then take twice the steps
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id))


def context_length(config):
    return getattr(config, "max_position_embeddings", None) or 2**20  # ALiBi has no end


def same_tokenizer(a, b):
    return a.get_vocab() == b.get_vocab() and a.eos_token_id == b.eos_token_id and a.bos_token_id == b.bos_token_id


class Policy(nn.Module):
    """A causal LM that is asked one thing: how likely are these answers? DeepSpeed wraps this, so that its hooks see one forward."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        config, head = lm.config, lm.get_output_embeddings()
        scaled = [k for k in ("final_logit_softcapping", "logits_scaling", "logit_scale") if getattr(config, k, None) not in (None, 1, 1.0)]
        if scaled or head.bias is not None:
            raise UserError(f"a {config.model_type} model does more than one matrix product to its logits ({scaled or 'a bias'}); "
                            "add that to utils.Policy first")

    def forward(self, tokens, prompt_lens, answer_lens, temperature=1.0):
        """tokens (B, T) right-padded; lens (B,). Returns logprobs and entropy of the answers' tokens, (B, A) float32, zero past the
        end. No mask: in a causal model padding on the right reaches no real token. No (B, T, V) logits: see kernels.token_logprobs."""
        hidden = self.lm.base_model(tokens, use_cache=False).last_hidden_state                # (B, T, E)
        index, mask = answer_index(prompt_lens, answer_lens)                                  # (B, A), (B, A)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(index)
        rows, states = rows[mask], index[mask]                                                # (N,) the answers' tokens, packed
        out = kernels.token_logprobs(hidden[rows, states], self.lm.get_output_embeddings().weight, tokens[rows, states + 1], temperature)
        return tuple(torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x) for x in out)


class LoRA(nn.Module):
    """base(x) + scale * (x @ A.T) @ B.T (Hu et al. 2021). The base never changes, so with `on` False this is the model it was: the
    reference policy costs no memory. B starts at zero, so training starts from the base."""
    on = True  # of the class: adapters are switched all at once, see adapters_off

    def __init__(self, base, rank, alpha):
        super().__init__()
        out_features, in_features = reversed(base.weight.shape) if type(base).__name__ == "Conv1D" else base.weight.shape
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        make = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Parameter(torch.randn(rank, in_features, **make) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **make))

    def forward(self, x):
        y = self.base(x)
        return y + nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B) * self.scale if LoRA.on else y


@contextlib.contextmanager
def adapters_off():
    """Within: every model is its base."""
    LoRA.on = False
    try:
        yield
    finally:
        LoRA.on = True


def lora_spec(text):
    """'8' or '8,alpha=16,lr=1e-3,targets=q_proj+v_proj' to a dict. alpha: twice the rank where it is not said, so that the learning rate need not
    change with the rank; lr None: that of the other weights; targets (): every linear layer of the blocks. '' is rank 0: no adapters."""
    spec = {"rank": 0, "alpha": None, "lr": None, "targets": ()}
    try:
        rank, *more = str(text).split(",") if text else ["0"]
        spec["rank"] = int(rank)
        for item in more:
            key, value = item.split("=")
            spec[key] = {"alpha": float, "lr": float, "targets": lambda v: tuple(v.split("+"))}[key](value)
        assert spec["rank"] >= 0
    except (ValueError, KeyError, AssertionError):
        raise UserError(f"--lora {text}: write a rank, and if you like more behind it, such as 8,alpha=16,lr=1e-3,targets=q_proj+v_proj") from None
    return {**spec, "alpha": spec["alpha"] or 2 * spec["rank"]}


def add_lora(model, text):
    """Freezes a model and puts adapters beside the linear layers of its blocks (not the embedding, not the output layer); a scalar head stays
    trainable. text: see lora_spec."""
    spec, hit = lora_spec(text), set()
    if not spec["rank"]:
        return model
    model.requires_grad_(False)
    for name, m in list(model.base_model.named_modules()):
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D":
            target = next((t for t in spec["targets"] if name == t or name.endswith("." + t)), None)
            if target or not spec["targets"]:
                owner, _, leaf = name.rpartition(".")
                setattr(model.base_model.get_submodule(owner), leaf, LoRA(m, spec["rank"], spec["alpha"]))
                hit.add(target)
    if missed := set(spec["targets"]) - hit:
        leaves = sorted({n.rpartition(".")[2] for n, m in model.base_model.named_modules() if isinstance(m, (nn.Linear, LoRA)) and not n.endswith(".base")})
        raise UserError(f"--lora {text}: this model has no layer {sorted(missed)[0]!r}; it has {', '.join(leaves)}")
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    return model


def answer_index(prompt_lens, answer_lens):
    """Where the answers stand: index (B, A) of the state that each answer token is chosen in, which is the token before it, and
    mask (B, A) bool. This is the only shift by one in the project; past it, everything is (B, A)."""
    A = int(answer_lens.max())
    at = torch.arange(A, device=prompt_lens.device)
    mask = at < answer_lens[:, None]                                                          # (B, A)
    return torch.where(mask, prompt_lens[:, None] - 1 + at, 0), mask


def gathered(*params):
    """Within: whole parameters, where ZeRO-3 keeps only a shard of each on this rank. Tied ones may be named twice."""
    sharded = list(dict.fromkeys(p for p in params if hasattr(p, "ds_id")))
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(sharded)


@torch.no_grad()
def whole_state(model, value=torch.Tensor.detach):
    """Names and whole tensors on the CPU, on rank 0 (elsewhere {}), gathered a few at a time. Adapters are merged into copies of their
    base, so the names are those of the model without them. value(parameter) is what is saved of it."""
    out, adapters = {}, {name + ".base.weight": m for name, m in model.named_modules() if isinstance(m, LoRA)}
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] in ("lora_A", "lora_B"):
            continue
        lora = adapters.get(name)
        params = (p, lora.lora_A, lora.lora_B) if lora else (p,)
        with gathered(*params):
            w, *AB = [value(q).cpu().clone() for q in params]  # perhaps a collective: on every rank
            if dist.get_rank() == 0:
                if lora:
                    delta = lora.scale * (AB[1].float() @ AB[0].float())
                    w = w.float() + (delta.T if type(lora.base).__name__ == "Conv1D" else delta)
                out[name.replace(".base.", ".")] = w.to(p.dtype)
    return out


def save_model(lm, tokenizer, out, value=torch.Tensor.detach, **config):
    """A folder that `from_pretrained` loads with nothing of ours installed. lm: the HF model; config: more entries for its config. Adapters are merged
    into it; beside them stands adapters/, in PEFT's format, without the base."""
    state, adapters = whole_state(lm, value), adapter_state(lm, value)
    if dist.get_rank() == 0:
        for k, v in config.items():
            setattr(lm.config, k, v)
        lm.save_pretrained(out, state_dict=state)
        tokenizer.save_pretrained(out)
        if adapters:
            from safetensors.torch import save_file
            loras = {name: m for name, m in lm.named_modules() if isinstance(m, LoRA)}
            first = next(iter(loras.values()))
            head = ["score"] if hasattr(lm, "score") else None
            (Path(out) / "adapters").mkdir(exist_ok=True)
            save_file(adapters, Path(out) / "adapters" / "adapter_model.safetensors")
            (Path(out) / "adapters" / "adapter_config.json").write_text(json.dumps({
                "peft_type": "LORA", "task_type": "SEQ_CLS" if head else "CAUSAL_LM", "base_model_name_or_path": lm.config._name_or_path or None,
                "r": len(first.lora_A), "lora_alpha": first.scale * len(first.lora_A), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
                "fan_in_fan_out": type(first.base).__name__ == "Conv1D", "target_modules": sorted(loras), "modules_to_save": head}, indent=1))
    dist.barrier()


@torch.no_grad()
def adapter_state(lm, value=torch.Tensor.detach):
    """Adapters and, where there is one, the scalar head, under the names that PEFT gives them; on rank 0 (elsewhere {}), and {} without adapters."""
    out, head = {}, "score.weight"
    for name, p in lm.named_parameters():
        if name.rpartition(".")[2] in ("lora_A", "lora_B") or name == head and any(isinstance(m, LoRA) for m in lm.modules()):
            with gathered(p):
                w = value(p).cpu().to(p.dtype).clone()
                if dist.get_rank() == 0:
                    out[f"base_model.model.{name}" + ("" if name == head else ".weight")] = w
    return out


# -----------------------------------------------------------------------------
# checkpoints

CHECKPOINTS, KEPT = 10, 2  # written in a run, at equal distances; the last so many are kept


class Checkpoint:
    """What a run needs to go on as if nothing had happened: OUT/checkpoint/STEP with the weights and optimizers of all engines, averages, random
    states, and what the script adds. It is written beside and renamed, so one that is there is whole. A finished run keeps none."""

    def __init__(self, cfg, total, ema=None, **engines):
        self.cfg, self.total, self.ema, self.engines = cfg, total, ema, {k: e for k, e in engines.items() if e is not None}
        self.folder, self.run_json = Path(cfg.out) / "checkpoint", Path(cfg.out) / "run.json"
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.sharded = any(e.zero_optimization_stage() for e in self.engines.values())

    def restore(self):
        """With --resume: (last complete step, what the script added to it); else, and where there is none yet, (0, {})."""
        Skipped.total = Skipped.in_a_row = 0
        steps = sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())
        if not self.cfg.resume:
            if steps:
                raise UserError(f"{self.folder} holds a run that did not end, up to step {steps[-1]}: go on with --resume, or remove that folder, or take another --out")
            return 0, {}
        run = json.loads(self.run_json.read_text()) if self.run_json.exists() else {}
        now = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in ("resume", "out", "micro_batch")}
        for key, v in now.items():
            if run and (was := run["config"].get(key, v)) != v:
                raise UserError(f"--resume: {self.run_json} says that --{key.replace('_', '-')} was {was!r}, and now it is {v!r}; a run goes on as it began")
        if run.get("finished"):
            print0(f"{self.cfg.out} is finished: nothing is left to do")
            dist.barrier()
            sys.stdout.flush()
            raise SystemExit(0)
        if not steps:
            print0(f"--resume: no checkpoint in {self.folder} yet: starting from the beginning")
            return 0, {}
        folder = self.folder / str(steps[-1])
        state = json.loads((folder / "state.json").read_text())
        if state["world"] != self.world and self.sharded:
            raise UserError(f"--resume: {folder} was written by {state['world']} ranks, and now there are {self.world}: ZeRO keeps a part on each. Start "
                            f"{state['world']} ranks, or put its weights into files with `python {folder}/zero_to_fp32.py {folder} {folder}/weights --tag {next(iter(self.engines))}`")
        for name, engine in self.engines.items():
            engine.load_checkpoint(folder, tag=name, load_module_strict=False)  # frozen weights are not in it
        mine = torch.load(folder / f"rank-{self.rank if self.sharded else 0}.pt", weights_only=False, map_location="cpu")
        torch.set_rng_state(mine["torch"]), np.random.set_state(mine["numpy"]), random.setstate(mine["python"])
        if torch.cuda.is_available() and mine["cuda"] is not None:
            torch.cuda.set_rng_state(mine["cuda"])
        if self.ema:
            for a, b in zip(self.ema.average, mine["ema"]):
                a.copy_(b)
        Skipped.total, Skipped.in_a_row = state["skipped"]
        print0(f"--resume: goes on after step {steps[-1]} of {self.total}")
        return steps[-1], state["added"]

    def save(self, at, **added):
        """added: numbers, strings, lists and dicts that the script wants back."""
        if at % max(1, self.total // CHECKPOINTS) or at == self.total:
            return
        new = self.folder / f"{at}.new"
        if self.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        dist.barrier()
        for name, engine in self.engines.items():
            engine.save_checkpoint(new, tag=name, save_latest=False, exclude_frozen_parameters=True)
        torch.save({"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate(),
                    "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None, "ema": self.ema and self.ema.average}, new / f"rank-{self.rank}.pt")
        if self.rank == 0:
            (new / "state.json").write_text(json.dumps({"world": self.world, "skipped": [Skipped.total, Skipped.in_a_row], "added": added}))
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self.folder / str(at), ignore_errors=True)
            new.rename(self.folder / str(at))
            for old in sorted((p for p in self.folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))[:-KEPT]:
                shutil.rmtree(old)

    def finish(self):
        """The folder holds the result: nothing is left to resume."""
        dist.barrier()
        if self.rank == 0:
            write_whole(self.run_json, json.dumps({**json.loads(self.run_json.read_text()), "finished": True}, indent=1))
            shutil.rmtree(self.folder, ignore_errors=True)


# -----------------------------------------------------------------------------
# logs


class Clock:
    """Seconds since the last lap, with all of the GPU's work done."""

    def __init__(self):
        self.lap()

    def lap(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self.last = now - getattr(self, "last", now), now
        return seconds


def open_lines(path, key, last):
    """A file of JSON lines to append to, with the lines up to the step `last` kept: what came after a checkpoint comes again."""
    kept = []
    if last and path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)[key] <= last:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # cut off in the middle, so it came after the checkpoint
    write_whole(path, "".join(kept))
    return open(path, "a")


def write_whole(path, text):
    """The old file or the new one, whenever the process ends."""
    beside = Path(f"{path}.new")
    beside.write_text(text)
    beside.rename(path)


class Log:
    """One line a step on the screen, with fixed columns; the same numbers and all others in metrics.jsonl; run.json beside it."""

    def __init__(self, cfg, total, columns, every=1, start=0):
        """columns: {metric: format}, e.g. {"loss": "8.4f"}. every: of how many steps one is printed. start: the step that a resumed run goes on after."""
        self.out, self.total, self.columns, self.every, self.first = Path(cfg.out), total, columns, every, start
        self.start, self.tty = time.time(), sys.stdout.isatty()
        self.rank0 = os.environ.get("RANK", "0") == "0"
        if not self.rank0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        import deepspeed
        import transformers
        versions = {m.__name__: m.__version__ for m in (torch, deepspeed, transformers, np)}
        write_whole(self.out / "run.json", json.dumps({"script": Path(sys.argv[0]).name, "config": dataclasses.asdict(cfg), "world": dist.get_world_size(),
                                                       "versions": versions, "git": git or None}, indent=1))
        self.file = open_lines(self.out / "metrics.jsonl", "step", start)
        print0("  step" + " " * (len(str(total)) * 2 - 3) + "".join(f" {k:>{max(len(k), int(f.split('.')[0]))}}" for k, f in columns.items()) + "  left")

    def write(self, step, metrics):
        """Only to the file."""
        if self.rank0:
            self.file.write(json.dumps({"step": step, **{k: v for k, v in metrics.items() if v is not None and np.isfinite(v)}}) + "\n")
            self.file.flush()

    def __call__(self, step, metrics):
        """step counts from 1. Rank 0 writes; others do nothing."""
        self.write(step, metrics)
        if not self.rank0:
            return
        left = (time.time() - self.start) / (step - self.first) * (self.total - step)
        bar = "━" * (n := 10 * step // self.total) + "╌" * (10 - n)
        cells = "".join(f" {format(metrics[k], f) if k in metrics else '-':>{max(len(k), int(f.split('.')[0]))}}" for k, f in self.columns.items())
        line = f"{step:>{len(str(self.total))}}/{self.total} {cells}  {int(left // 60)}:{int(left % 60):02d} {bar}"
        if step % self.every == 0 or step in (1, self.total):
            print(("\r\033[K" if self.tty else "") + line, flush=True)
        elif self.tty:
            print("\r\033[K" + line, end="", flush=True)
