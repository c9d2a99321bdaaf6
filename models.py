"""Models: folders in and out, the built-in tiny one, what a policy is asked, LoRA."""
import contextlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import kernels
from utils import UserError

# -----------------------------------------------------------------------------
# model folders


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


def cast(model, dtype):
    """NOTE: not model.to(dtype), which rounds buffers too: bf16 frequencies of rotary positions turn by other angles far out."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def load_lm(path, dtype):
    """A causal LM to train or to ask; `tiny` is the built-in one, from scratch."""
    if path == "tiny":
        return cast(tiny_lm(), dtype)
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


# -----------------------------------------------------------------------------
# log-probabilities of answers


class Policy(nn.Module):
    """A causal LM that is asked one thing: how likely are these answers? DeepSpeed wraps this, so that its hooks see one forward."""

    def __init__(self, lm):
        super().__init__()
        self.lm = kernels.quick_linears(lm)
        config, head = lm.config, lm.get_output_embeddings()
        scaled = [k for k in ("final_logit_softcapping", "logits_scaling", "logit_scale") if getattr(config, k, None) not in (None, 1, 1.0)]
        if scaled or head.bias is not None:
            raise UserError(f"a {config.model_type} model does more than one matrix product to its logits ({scaled or 'a bias'}); "
                            "add that to models.Policy first")

    def forward(self, tokens, prompt_lens, answer_lens, temperature=1.0):
        """tokens (B, T) right-padded; lens (B,). Returns logprobs and entropy of the answers' tokens, (B, A) float32, zero past the
        end. No mask: in a causal model padding on the right reaches no real token. No (B, T, V) logits: see kernels.token_logprobs."""
        hidden = self.lm.base_model(tokens, use_cache=False).last_hidden_state                # (B, T, E)
        index, mask = answer_index(prompt_lens, answer_lens)                                  # (B, A), (B, A)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(index)
        rows, states = rows[mask], index[mask]                                                # (N,) the answers' tokens, packed
        out = kernels.token_logprobs(hidden[rows, states], self.lm.get_output_embeddings().weight, tokens[rows, states + 1], temperature)
        return tuple(torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x) for x in out)


# -----------------------------------------------------------------------------
# LoRA


class LoRA(nn.Module):
    """base(x) + scale * (x @ A.T) @ B.T (Hu et al. 2021). The base never changes, so with `on` False this is the model it was: the
    reference policy costs no memory. B starts at zero, so training starts from the base."""
    on = True  # of the class: adapters are switched all at once, see adapters_off

    def __init__(self, base, rank, alpha):
        super().__init__()
        out_features, in_features = reversed(base.weight.shape) if is_conv1d(base) else base.weight.shape
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        make = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Parameter(torch.randn(rank, in_features, **make) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **make))

    def forward(self, x):
        y = self.base(x)
        return y + nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B) * self.scale if LoRA.on else y


def is_adapter(name):
    return name.endswith(("lora_A", "lora_B"))


def is_conv1d(module):
    """GPT-2's linear layer, which keeps its weight as (in, out)."""
    return type(module).__name__ == "Conv1D"


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
        assert spec["rank"] >= 0 and all(spec[k] is None or spec[k] > 0 for k in ("alpha", "lr"))
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
        if isinstance(m, nn.Linear) or is_conv1d(m):
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


# -----------------------------------------------------------------------------
# saving


def gathered(*params, write=False):
    """Within: whole parameters, where ZeRO-3 keeps only a shard of each on this rank. Tied ones may be named twice. write: what rank 0 makes of them is kept."""
    sharded = list(dict.fromkeys(p for p in params if hasattr(p, "ds_id")))
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None)


@torch.no_grad()
def whole_state(model):
    """Names and whole tensors on the CPU, on rank 0 (elsewhere {}), gathered a few at a time. Adapters are merged into copies of their
    base, so the names are those of the model without them."""
    out, adapters = {}, {name + ".base.weight": m for name, m in model.named_modules() if isinstance(m, LoRA)}
    for name, p in model.named_parameters():
        if is_adapter(name):
            continue
        lora = adapters.get(name)
        params = (p, lora.lora_A, lora.lora_B) if lora else (p,)
        with gathered(*params):
            if dist.get_rank() == 0:
                w, *AB = [q.detach().cpu().clone() for q in params]
                if lora:
                    delta = lora.scale * (AB[1].float() @ AB[0].float())
                    w = w.float() + (delta.T if is_conv1d(lora.base) else delta)
                out[name.replace(".base.", ".")] = w.to(p.dtype)
    return out


def save_model(lm, tokenizer, out, **config):
    """A folder that `from_pretrained` loads with nothing of ours installed. lm: the HF model; config: more entries for its config. Adapters are merged
    into it; beside them stands adapters/, in PEFT's format, without the base."""
    state, adapters = whole_state(lm), adapter_state(lm)
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
                "fan_in_fan_out": is_conv1d(first.base), "target_modules": sorted(loras), "modules_to_save": head}, indent=1))
    dist.barrier()


@torch.no_grad()
def adapter_state(lm):
    """Adapters and, where there is one, the scalar head, under the names that PEFT gives them; on rank 0 (elsewhere {}), and {} without adapters."""
    out, head = {}, "score.weight"
    for name, p in lm.named_parameters():
        if is_adapter(name) or name == head and any(isinstance(m, LoRA) for m in lm.modules()):
            with gathered(p):
                w = p.detach().cpu().clone()
                if dist.get_rank() == 0:
                    out[f"base_model.model.{name}" + ("" if name == head else ".weight")] = w
    return out
