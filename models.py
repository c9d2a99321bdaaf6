"""The models of RLHF: the policy, the reward model, LoRA; and model folders, in and out.

A model folder is what transformers' `from_pretrained` loads, with nothing of ours installed.

Dimension key:  B batch, T = P prompt + A answer, N answer tokens of a batch, E model width.
"""
import contextlib
import json
import math
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import kernels
from utils import UserError, disk_problem, first_line, flag_of, print0

# -----------------------------------------------------------------------------
# model folders in


def require_folder(path):
    """Raises UserError where `path` can be neither a model folder nor a name on the hub."""
    if not path:
        raise UserError("the name of a model is empty; give a model folder or a name of the hub")
    if path == "tiny":
        return
    if Path(path).is_dir():
        require_no_adapters(path)
        return
    first, *rest = path.split("/")
    if not rest:
        message = (
            f"no folder {path} here, and it is not a name of the Hugging Face hub (owner/name)"
        )
        raise UserError(message)
    starts_locally = first in ("", "out") or first.startswith((".", "~")) or Path(first).is_dir()
    if starts_locally or len(rest) > 1:
        raise UserError(f"{path}: no such model folder; train one first, or name another")
    require_hub(path)


def require_no_adapters(folder):
    """Raises UserError where a folder holds adapters without a model."""
    path = Path(folder)
    if not (path / "adapter_config.json").exists() or (path / "config.json").exists():
        return
    whole = "merge them into their base first, with peft's merge_and_unload"
    if (path.parent / "config.json").exists():
        whole = f"take {path.parent}, which has them merged"
    raise UserError(f"{folder}: these are LoRA adapters and not a whole model; {whole}")


def require_hub(name):
    """Raises UserError where a name of the hub is not in the local cache and the hub cannot be
    reached. One try: loading would try for most of a minute, and then say less."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except HfHubHTTPError:
        pass  # the hub is there and answers; loading will say what is wrong with the name
    except Exception as error:  # the errors of a connection have no common base class
        message = (
            f"{name}: no such folder here, and the Hugging Face hub cannot be reached "
            f"({first_line(error)})"
        )
        raise UserError(message) from None


def read_run_json(folder):
    """The run.json of a folder, as a dict; {} where there is none."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no UTF-8
        message = f"{path} cannot be read ({first_line(error)}); repair it or remove it"
        raise UserError(message) from None
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise UserError(f"{path} is not the record of a run; repair it or remove it")
    return run


def load_tokenizer(path):
    """The tokenizer of a model folder or of a name on the hub; `tiny` is the built-in one, with
    one token per byte."""
    if path == "tiny":
        return tiny_tokenizer()
    from transformers import AutoTokenizer

    require_folder(path)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in names):
        message = (
            f"{path}: this model folder has no tokenizer (no tokenizer.json); "
            "save one there with tokenizer.save_pretrained"
        )
        raise UserError(message)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        message = f"{path}: its tokenizer cannot be loaded ({first_line(error)})"
        raise UserError(message) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no EOS token, so no answer could ever end")
    require_vocabulary(path, tokenizer)
    return tokenizer


def require_vocabulary(path, tokenizer):
    """Raises UserError where a tokenizer gives token ids that its model does not know."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError):
        return  # there is no model; load_config says so
    known = getattr(config, "vocab_size", None)
    padding = tokenizer.pad_token_id
    if padding == tokenizer.eos_token_id:
        padding = None  # else it is never a part of a text
    largest = max(i for i in tokenizer.get_vocab().values() if i != padding)
    if known is not None and largest >= known:
        message = (
            f"{path}: its tokenizer has token ids up to {largest}, and the model only {known} "
            "tokens; enlarge it with transformers' resize_token_embeddings, or take its own "
            "tokenizer"
        )
        raise UserError(message)


def comes_from_tiny(path):
    """Whether a model was trained from `tiny`, as the run.json files of its ancestors tell."""
    seen = set()
    while path and path not in seen:
        if path == "tiny":
            return True
        seen.add(path)
        path = read_run_json(path).get("config", {}).get("model")
    return False


def warn_of_toy_lr(cfg, **usual):
    """Prints a warning for each learning rate that is the default, which is the toy's, where the
    model is a pretrained one. usual: what such a model takes, by the name of the field."""
    if comes_from_tiny(cfg.model):
        return
    for name, lr in usual.items():
        has_its_own = name != "critic_lr" and parse_lora(cfg.lora)["lr"]
        if getattr(cfg, name) == getattr(type(cfg), name) and not has_its_own:
            print0(
                f"warning: {flag_of(name)} {getattr(cfg, name):g}, the default, is for models that "
                f"are trained from scratch; for a pretrained one such as {cfg.model} about {lr} is "
                "usual"
            )


def load_config(path):
    """A model's config, with dropout off: in PPO, dropout would make old and new log-probabilities
    differ by noise."""
    from transformers import AutoConfig

    require_folder(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        message = f"{path}: neither a model folder nor a name on the hub ({first_line(error)})"
        raise UserError(message) from None
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_pretrained(auto_class, path, config, may_miss=()):
    """from_pretrained, but strict: no tensor may be missing, unknown, of another shape, NaN or
    infinite. may_miss: prefixes of names that may be missing; unknown tensors pass then, too."""
    from safetensors import SafetensorError

    try:
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            dtype=config.dtype or torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        message = f"{path}: the model cannot be loaded ({first_line(error)})"
        raise UserError(message) from None

    missing = [name for name in info["missing_keys"] if not name.startswith(tuple(may_miss))]
    require_none(path, "lacks", missing)
    if not may_miss:
        require_none(path, "has unknown", info["unexpected_keys"])
    # An entry may be (name, shape in the file, shape in the model).
    misshapen = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    require_none(path, "has the wrong shape for", misshapen)
    for name, weight in model.named_parameters():
        if not all_finite(weight):
            message = (
                f"{path}: {name} has values that are NaN or infinite, so the model is broken; "
                "train it again with a lower learning rate, or take an earlier one"
            )
            raise UserError(message)
    return model


def require_none(path, problem, names):
    """Raises UserError where a file has this problem with any tensor."""
    if not names:
        return
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    message = (
        f"{path}: the file {problem} {count}, such as {min(names)}; it is not a whole model of "
        "this kind, and random weights in its place would train without an error"
    )
    raise UserError(message)


def all_finite(x):
    """Whether a tensor holds neither NaN nor infinity. One pass over it, and no copy."""
    if x.numel() == 0:
        return True
    low, high = x.detach().aminmax()  # NaN goes through
    return bool(low.isfinite() and high.isfinite())


def cast(model, dtype):
    """Casts the parameters of a model.

    NOTE: not model.to(dtype), which also rounds buffers: with bf16 frequencies, rotary positions
    are wrong far from the start.
    """
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def load_lm(path, dtype):
    """A causal LM; `tiny` is the built-in one, with random weights."""
    if path == "tiny":
        return cast(tiny_lm(), dtype)
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    kind = "".join(config.architectures or [])
    if kind.endswith("ForSequenceClassification"):
        message = (
            f"{path}: this is a reward model (its config says {kind}), and a language model is "
            "needed here; take the model that it was trained from"
        )
        raise UserError(message)
    config.dtype = dtype
    return load_pretrained(AutoModelForCausalLM, path, config)


def tiny_tokenizer():
    """256 bytes, <pad> and <eos>: it covers every text, and needs no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=512,
    )


def tiny_lm():
    """A Llama of 0.82 M parameters: 4 layers of width 128, a context of 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=344,
        initializer_range=0.05,  # at this width 0.02 is too small: `toy` takes twice the steps
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def context_length(config):
    """The longest row that a model reads, in tokens."""
    length = getattr(config, "max_position_embeddings", None)
    return length or 2**20  # ALiBi has no end


def same_tokenizer(a, b):
    """Whether two tokenizers give the same ids, and the same special ones, to a text."""
    same_special_ids = a.eos_token_id == b.eos_token_id and a.bos_token_id == b.bos_token_id
    return same_special_ids and a.get_vocab() == b.get_vocab()


# -----------------------------------------------------------------------------
# the policy


def answer_positions(prompt_lens, answer_lens):
    """Where in a row the answer's tokens are chosen. prompt_lens, answer_lens (B,).

    Returns index (B, A), the position of the state in which each answer token is chosen, which is
    that of the token before it (0 past the end); and mask (B, A) bool, True at answer tokens.
    This is the only shift by one in the project: after it, everything is (B, A).
    """
    A = int(answer_lens.max())
    pos = torch.arange(A, device=prompt_lens.device)                      # (A,)
    mask = pos < answer_lens[:, None]                                     # (B, A)
    index = torch.where(mask, prompt_lens[:, None] - 1 + pos, 0)          # (B, A)
    return index, mask


class Policy(nn.Module):
    """A causal LM with the one forward that RLHF needs: how likely are these answers?

    DeepSpeed wraps this module, so that its hooks see an ordinary forward.
    """

    def __init__(self, lm):
        super().__init__()
        self.lm = kernels.use_onednn_linears(lm)
        config = lm.config
        self.softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        names = ("logits_scaling", "logit_scale")
        extras = [name for name in names if getattr(config, name, None) not in (None, 1)]
        if lm.get_output_embeddings().bias is not None:
            extras.append("a bias")
        if extras:
            message = (
                f"a {config.model_type} model does more than one matrix product to its logits "
                f"({', '.join(extras)}); add that to models.Policy first"
            )
            raise UserError(message)

    def forward(self, tokens, prompt_lens, answer_lens, temperature=1.0):
        """Log-probabilities and entropies of the answers' tokens.

        tokens (B, T) right-padded; prompt_lens, answer_lens (B,). Returns logprobs and entropy,
        (B, A) float32, zero past the end. There is no attention mask: in a causal model, padding
        on the right reaches no real token. There are no (B, T, V) logits either: see
        kernels.token_logprobs.
        """
        hidden = self.lm.base_model(tokens, use_cache=False).last_hidden_state     # (B, T, E)
        index, mask = answer_positions(prompt_lens, answer_lens)                   # (B, A) each
        rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(index)
        rows = rows[mask]                                                          # (N,)
        pos = index[mask]                                                          # (N,)
        logprobs, entropy = kernels.token_logprobs(
            hidden[rows, pos],                                                     # (N, E)
            self.lm.get_output_embeddings().weight,
            tokens[rows, pos + 1],                                                 # (N,)
            temperature,
            self.softcap,
        )
        zeros = torch.zeros(mask.shape, device=logprobs.device)
        return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


# -----------------------------------------------------------------------------
# the reward model, and the critic


class RewardModel(nn.Module):
    """A number for every prefix of a text.

    As a reward model: the number at the end of an answer is its score. As a critic: the number at
    a token is the value of the state that the token leads to. One class, because the critic starts
    as a copy of the reward model.
    """

    def __init__(self, model):
        """model: a transformers model for sequence classification, with one label."""
        super().__init__()
        if not hasattr(model, "score"):
            message = (
                f"a {model.config.model_type} reward model has no head named `score`; "
                "call it from a reward function instead"
            )
            raise UserError(message)
        self.model = kernels.use_onednn_linears(model)

    @classmethod
    def from_lm(cls, path, dtype):
        """A new reward model on the backbone of a causal LM. The head is drawn with standard
        deviation 1 / sqrt(E + 1) (Stiennon et al. 2020)."""
        from transformers import AutoModelForSequenceClassification

        if path == "tiny":
            lm = tiny_lm()
            config = lm.config
        else:
            config = load_config(path)
        config.num_labels = 1
        config.dtype = dtype
        if path == "tiny":
            model = AutoModelForSequenceClassification.from_config(config)
            model.base_model.load_state_dict(lm.base_model.state_dict())
        else:
            model = load_pretrained(
                AutoModelForSequenceClassification, path, config, may_miss=("score.",)
            )
        reward_model = cls(model)
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
        cast(model, dtype)
        return reward_model

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """The reward model of a folder. Raises UserError unless every tensor is there, with its
        name and its shape."""
        from transformers import AutoModelForSequenceClassification

        config = load_config(path)
        kind = str(config.architectures)
        if config.num_labels != 1 or "ForSequenceClassification" not in kind:
            message = (
                f"{path}: is not a reward model (its config says {kind}, {config.num_labels} "
                "labels); train one with reward.py"
            )
            raise UserError(message)
        config.dtype = dtype
        return cls(load_pretrained(AutoModelForSequenceClassification, path, config))

    def values(self, tokens):
        """tokens (B, T) right-padded. Returns (B, T) float32, centred and scaled as the config
        says: (logit - score_offset) * score_scale."""
        hidden = self.model.base_model(tokens, use_cache=False).last_hidden_state  # (B, T, E)
        logits = F.linear(hidden.float(), self.model.score.weight.float()).squeeze(-1)  # (B, T)
        offset = getattr(self.model.config, "score_offset", 0.0)
        scale = getattr(self.model.config, "score_scale", 1.0)
        return (logits - offset) * scale

    forward = values  # what DeepSpeed calls

    def score(self, tokens, lengths):
        """tokens (B, T) right-padded, lengths (B,). Returns (B,) float32: the value at the last
        real token."""
        return last_token(self.values(tokens), lengths)


def last_token(values, lengths):
    """Each row's value at its last real token. values (B, T), lengths (B,). Returns (B,)."""
    return values.gather(1, lengths[:, None] - 1)[:, 0]


# -----------------------------------------------------------------------------
# LoRA


class LoRA(nn.Module):
    """base(x) + scale * (x @ A.T) @ B.T (Hu et al. 2021).

    The base never changes. So a model with its adapters off is the model that training started
    from, and the reference policy costs no memory. B is zero at first, so that training starts
    from the base.
    """

    # One switch for all adapters of the process; adapters_off() is the only place that sets it.
    enabled = True

    def __init__(self, base, rank, alpha):
        super().__init__()
        if is_conv1d(base):
            in_features, out_features = base.weight.shape
        else:
            out_features, in_features = base.weight.shape
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        like_base = {"device": base.weight.device, "dtype": base.weight.dtype}
        random = torch.randn(rank, in_features, **like_base)
        self.lora_A = nn.Parameter(random / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **like_base))

    def forward(self, x):
        y = self.base(x)
        if not LoRA.enabled:
            return y
        return kernels.add_product(y, F.linear(x, self.lora_A), self.lora_B, self.scale)


@contextlib.contextmanager
def adapters_off():
    """Context manager: every model of this process is its base."""
    LoRA.enabled = False
    try:
        yield
    finally:
        LoRA.enabled = True


def is_adapter(name):
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith(("lora_A", "lora_B"))


def is_conv1d(module):
    """Whether this is GPT-2's linear layer, which keeps its weight as (in, out)."""
    return type(module).__name__ == "Conv1D"


def parse_lora(text):
    """--lora, such as "8" or "8,alpha=16,lr=1e-3,targets=q_proj+v_proj", as a dict.

    rank: 0, or an empty text, is no adapters. alpha: by default twice the rank, so that the
    learning rate need not change with the rank. lr: None is that of the other weights.
    targets: () is every linear layer of the blocks.
    """
    options = {"rank": 0, "alpha": None, "lr": None, "targets": ()}
    rank, *more = str(text or 0).split(",")
    try:
        options["rank"] = int(rank)
        for item in more:
            name, value = item.split("=")
            if name == "targets":
                options["targets"] = tuple(value.split("+"))
            elif name in ("alpha", "lr"):
                options[name] = positive(float(value))
            else:
                raise ValueError(f"there is no {name}")
        if options["rank"] < 0:
            raise ValueError("a rank is at least 0")
    except ValueError:
        message = (
            f"--lora {text}: write a rank, and options after it if you like, such as "
            "8,alpha=16,lr=1e-3,targets=q_proj+v_proj"
        )
        raise UserError(message) from None
    if options["alpha"] is None:
        options["alpha"] = 2 * options["rank"]
    return options


def positive(x):
    if not 0 < x < math.inf:
        raise ValueError(f"{x} is not a positive number")
    return x


def add_lora(model, text):
    """Freezes a model and puts adapters beside the linear layers of its blocks, not beside the
    embedding or the output layer. A scalar head stays trainable. text: see parse_lora."""
    options = parse_lora(text)
    targets = options["targets"]
    if options["rank"] == 0:
        return model
    body = model.base_model
    linears = {}
    for name, layer in body.named_modules():
        if isinstance(layer, nn.Linear) or is_conv1d(layer):
            linears[name] = layer
    for target in targets:
        if not any(is_target(name, target) for name in linears):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            message = f"--lora {text}: this model has no layer {target!r}; it has {known}"
            raise UserError(message)

    model.requires_grad_(False)
    for name, layer in linears.items():
        if not targets or any(is_target(name, target) for target in targets):
            parent, _, leaf = name.rpartition(".")
            adapted = LoRA(layer, options["rank"], options["alpha"])
            setattr(body.get_submodule(parent), leaf, adapted)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    return model


def is_target(name, target):
    """Whether `target`, such as q_proj or mlp.up_proj, names this layer."""
    return name == target or name.endswith("." + target)


# -----------------------------------------------------------------------------
# model folders out


def gathered(*params, write=False):
    """Context manager: parameters are whole, where ZeRO-3 keeps only a shard of each on this rank.
    A tied one may be named twice. write: what rank 0 changes in them is kept, on all ranks."""
    sharded = [p for p in params if hasattr(p, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    unique = list(dict.fromkeys(sharded))
    modifier = 0 if write else None
    return deepspeed.zero.GatheredParameters(unique, modifier_rank=modifier)


@torch.no_grad()
def gather_state_dict(model):
    """{name: whole tensor on the CPU} on rank 0, {} on the others; gathered one layer at a time.

    Adapters are merged into copies of their base, under the names of the model without them.
    """
    adapted = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            adapted[name + ".base.weight"] = module
    state = {}
    for name, p in model.named_parameters():
        if is_adapter(name):
            continue
        params = [p]
        lora = adapted.get(name)
        if lora is not None:
            params += [lora.lora_A, lora.lora_B]
        with gathered(*params):
            if dist.get_rank() == 0:
                copies = [q.detach().cpu().clone() for q in params]
                weight = copies[0]
                if lora is not None:
                    weight = merged(*copies, lora)
                state[name.replace(".base.", ".")] = weight.to(p.dtype)
    return state


def merged(weight, A, B, lora):
    """The weight, in float32, of the one linear layer that does what base and adapter do."""
    delta = lora.scale * (B.float() @ A.float())                          # (out, in)
    if is_conv1d(lora.base):
        delta = delta.T
    return weight.float() + delta


@torch.no_grad()
def adapter_state_dict(lm):
    """Adapters and, where there is one, the scalar head, under PEFT's names: on rank 0, {} on the
    others. {} where the model has no adapters."""
    state = {}
    names = [name for name, _ in lm.named_parameters()]
    if not any(is_adapter(name) for name in names):
        return state
    for name, p in lm.named_parameters():
        if is_adapter(name):
            peft_name = f"base_model.model.{name}.weight"
        elif name == "score.weight":
            peft_name = f"base_model.model.{name}"
        else:
            continue
        with gathered(p):
            if dist.get_rank() == 0:
                state[peft_name] = p.detach().cpu().clone()
    return state


def save_model(lm, tokenizer, out, template=None, **config_entries):
    """Writes a folder that `from_pretrained` loads with nothing of ours installed. All ranks call.

    lm: the transformers model; out: the folder; template: the run's --template, written as a chat
    template, so that others prompt the model as it was trained; config_entries: more entries for
    the model's config.
    Adapters are merged, and are also saved on their own in OUT/adapters, in PEFT's format.
    Raises UserError on every rank where a weight is not finite or the disk is full; nothing that
    was in the folder before has changed then.
    """
    for name, value in config_entries.items():
        setattr(lm.config, name, value)
    state = gather_state_dict(lm)
    adapters = adapter_state_dict(lm)
    on_rank0(write_model, lm, tokenizer, Path(out), template, state, adapters)


def on_rank0(function, *args):
    """Calls function(*args) on rank 0, while the other ranks wait. Returns its result on all ranks.
    A UserError there is raised on all ranks, so that they end together."""
    result = None
    message = None
    if dist.get_rank() == 0:
        try:
            result = function(*args)
        except UserError as error:
            message = str(error)
    box = [result, message]
    dist.broadcast_object_list(box, 0)
    result, message = box
    if message is not None:
        raise UserError(message)
    return result


def write_model(lm, tokenizer, out, template, state, adapters):
    """The part of save_model that rank 0 does: everything is written to OUT/.new, then renamed."""
    for name, weight in state.items():
        if not all_finite(weight):
            message = (
                f"{out}: the model is not saved, because {name} holds values that are NaN or "
                "infinite after training; start again with a lower learning rate"
            )
            raise UserError(message)
    new = out / ".new"
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        lm.save_pretrained(new, state_dict=state)
        tokenizer.save_pretrained(new)
        if template not in (None, "chat"):
            (new / "chat_template.jinja").write_text(chat_template(template, tokenizer))
        if adapters:
            write_adapters(lm, adapters, new / "adapters")
        for file in new.rglob("*.safetensors"):
            shutil.copymode(new / "config.json", file)  # safetensors makes files private
        move_into(new, out)
    except Exception as error:  # the writers of tensors and of tokenizers raise what they like
        problem = disk_problem(out, error)
        shutil.rmtree(new, ignore_errors=True)
        if problem is None:
            raise
        message = (
            f"{out}: the model cannot be saved: {problem}. The last checkpoint stays in the folder "
            "of the run; when this is fixed, go on with --resume"
        )
        raise UserError(message) from None


def move_into(new, out):
    """Renames what is in one folder into another. config.json comes last, because a folder without
    it is no model: whenever the process ends, nothing half-written can be loaded."""
    files = sorted(new.iterdir(), key=lambda file: file.name == "config.json")
    for file in files:
        target = out / file.name
        if target.is_dir():
            shutil.rmtree(target)
        file.rename(target)
    new.rmdir()


def write_adapters(lm, adapters, folder):
    """A folder that PEFT loads: the adapters without the base."""
    from safetensors.torch import save_file

    loras = {name: m for name, m in lm.named_modules() if isinstance(m, LoRA)}
    first = next(iter(loras.values()))
    rank = len(first.lora_A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.config._name_or_path or None,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": is_conv1d(first.base),
        "target_modules": sorted(loras),
        "modules_to_save": None,
    }
    if hasattr(lm, "score"):
        config["task_type"] = "SEQ_CLS"
        config["modules_to_save"] = ["score"]
    folder.mkdir()
    save_file(adapters, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def chat_template(template, tokenizer):
    """--template as one line of jinja, which renders a conversation as data.render does: turns on
    lines of their own, and an answer behind its prompt."""
    template = template.replace("\\n", "\n")  # a shell passes the two characters \n
    content = "message['content'] | trim"
    pieces = [json.dumps(piece, ensure_ascii=False) for piece in template.split("{prompt}")]
    turn = f" ~ ({content}) ~ ".join(pieces)
    separator = "" if template[-1:].isspace() else " "
    start = ""
    if tokenizer.bos_token_id in tokenizer("x")["input_ids"]:
        start = "{{ bos_token }}"  # the tokenizer puts it before a text, and not before a chat
    return (
        "{# written from --template #}" + start + "{% for message in messages %}"
        "{% if message['role'] == 'assistant' and not loop.first %}"
        f"{{{{ {json.dumps(separator)} ~ ({content}) }}}}"
        "{% else %}"
        '{{ "" if loop.first else "\\n" }}'
        "{% if message['role'] == 'user' %}"
        f"{{{{ {turn} }}}}"
        "{% else %}"
        f"{{{{ {content} }}}}"
        "{% endif %}{% endif %}{% endfor %}"
    )
