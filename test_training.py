"""The specification of models.py and training.py. First what needs no script: log-probabilities,
reward models, LoRA, model folders, DeepSpeed engines, EMA, the folder of a run, checkpoints, and
signals. Then whole scripts, on one and two ranks: every combination of ZeRO, LoRA and offload,
resuming bit for bit, and kills.

    pytest test_training.py -k checkpoint     # one part
"""
import dataclasses
import fcntl
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from testing import (  # before torch: it sets environment variables
    HERE, LONG, TEMPLATE, command, free_port, model_of, plain_logprobs, ragged, ranks, some, train,
    write_rows)

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

import data
import models
import ppo
import reward
import sft
import training
import utils
from models import Policy, RewardModel
from utils import UserError

# What all runs of scripts below have in common: 240 rows, a few steps of 8 rows.
STEPS = dict(held_out=0.2, batch_size=8, max_len=64)
PPO_STEPS = dict(STEPS, iterations=3, minibatches=2, ppo_epochs=2, max_new_tokens=8)


@dataclasses.dataclass(frozen=True)
class Flags:
    """All flags that training.py reads."""
    out: str = ""
    zero: int = 0
    dtype: str = "fp32"
    lora: str = ""
    gradient_checkpointing: bool = False
    offload: bool = False
    ds_config: str = ""
    resume: bool = False
    overwrite: bool = False
    save_every: float = 0.0
    track: str = ""
    lr: float = 1e-3


def make_engine(lm=None, lr=1e-3, eps=1e-8, **flags):
    """A DeepSpeed engine around a small policy, in this process."""
    utils.init_distributed(0)
    cfg = Flags(**flags)
    if lm is None:
        lm = models.cast(model_of("llama"), utils.dtype_of(cfg.dtype))
    return training.train_engine(Policy(lm), lr, 2, 1, cfg, eps)


def backward(engine, scale=1.0):
    """The gradient of the log-probability of two answers."""
    tokens = torch.tensor(ragged([12, 12])).to(engine.device)
    prompt_lens = torch.tensor([5, 5], device=engine.device)
    answer_lens = torch.tensor([7, 7], device=engine.device)
    logprobs, _ = engine(tokens, prompt_lens, answer_lens)
    engine.backward(-scale * logprobs.mean())


class Killed(BaseException):
    """Not an Exception: as after kill -9, no handler of an error runs."""


def all_files(folder):
    """{name: bytes} of all files below a folder."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# -----------------------------------------------------------------------------
# log-probabilities


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "bloom", "gemma2"])
def test_a_padded_batch_gives_each_row_the_logprobs_of_that_row_alone(kind):
    lm = model_of(kind)
    rows = ragged([9, 4, 21, 3])
    prompt_lens = torch.tensor([5, 1, 20, 1])
    for pad in (0, 5, 1):  # pad, eos, bos: what the padding is cannot matter
        tokens, lens = data.pad(rows, value=pad)
        with torch.no_grad():
            got, _ = Policy(lm)(tokens, prompt_lens, lens - prompt_lens, 0.7)
        for i, (row, prompt_len) in enumerate(zip(rows, prompt_lens.tolist())):
            want = plain_logprobs(lm, row, prompt_len, 0.7)
            torch.testing.assert_close(
                got[i, : len(want)].double(), want, rtol=1e-4, atol=1e-5)
            assert (got[i, len(want) :] == 0).all()


def test_the_entropy_is_that_of_the_tempered_distribution_at_each_answer_token():
    lm = model_of("llama")
    (row,) = ragged([9])
    with torch.no_grad():
        _, entropy = Policy(lm)(torch.tensor([row]), torch.tensor([4]), torch.tensor([5]), 0.7)
        logits = lm(torch.tensor([row])).logits[0, 3:-1].double() / 0.7
    p = logits.softmax(-1)
    torch.testing.assert_close(
        entropy[0].double(), -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-5)


def test_answer_positions_are_the_tokens_before_the_answers_tokens():
    index, mask = models.answer_positions(torch.tensor([3, 5]), torch.tensor([4, 1]))
    assert index.tolist() == [[2, 3, 4, 5], [4, 0, 0, 0]]
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]


def test_eos_carries_gradient_although_it_is_also_pad_and_bos():
    lm = model_of("opt", pad_token_id=5, bos_token_id=5)
    tokens, lens = data.pad([[5, 9, 8, 7, 5], [5, 9, 8, 5]], value=5)
    prompt_lens = torch.tensor([3, 2])
    logprobs, _ = Policy(lm)(tokens, prompt_lens, lens - prompt_lens)
    weight = lm.model.decoder.layers[2].fc2.weight
    (grad,) = torch.autograd.grad(logprobs[0, 1], weight)
    want = plain_logprobs(lm, [5, 9, 8, 7, 5], 3)[1]
    assert logprobs[0, 1].item() == pytest.approx(want.item(), rel=1e-4)
    assert grad.abs().sum() > 0, "the EOS at the end of an answer is an action"


def test_a_model_with_more_than_one_product_to_its_logits_is_refused():
    lm = model_of("llama")
    lm.config.logits_scaling = 8.0
    with pytest.raises(UserError, match="llama model does more .*logits_scaling"):
        Policy(lm)
    lm = model_of("llama")
    lm.lm_head.bias = torch.nn.Parameter(torch.zeros(97))
    with pytest.raises(UserError, match="more than one matrix product .*a bias"):
        Policy(lm)


# -----------------------------------------------------------------------------
# the reward model


@pytest.mark.parametrize("kind", ["llama", "opt", "opt-350m", "gpt2", "gpt_neox", "bloom"])
def test_a_score_is_read_at_the_last_real_token_whatever_comes_after_it(kind, tmp_path):
    model_of(kind, vocab_size=258).save_pretrained(tmp_path)
    rm = RewardModel.from_lm(str(tmp_path), torch.float32).eval()
    rows = ragged([9, 4, 21])
    with torch.no_grad():
        alone = [rm.score(torch.tensor([row]), torch.tensor([len(row)])) for row in rows]
        for value in (0, 5, 80):
            tokens, lens = data.pad(rows, value=value)
            scores = rm.score(tokens, lens)
            torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-4, atol=1e-5)
    width = rm.model.score.in_features
    relative_std = rm.model.score.weight.std().item() * (width + 1) ** 0.5
    assert abs(relative_std - 1) < 0.3, "the head starts at std 1/sqrt(d + 1)"


def test_scores_are_centred_and_scaled_as_the_config_says():
    rm = RewardModel.from_lm("tiny", torch.float32)
    tokens = torch.tensor(ragged([9]))
    with torch.no_grad():
        raw = rm.values(tokens)
        rm.model.config.score_offset = 0.5
        rm.model.config.score_scale = 3.0
        torch.testing.assert_close(rm(tokens), (raw - 0.5) * 3.0)


def test_a_reward_model_with_a_missing_renamed_or_misshapen_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model_of("opt").save_pretrained(tmp_path / "lm")
    rm = RewardModel.from_lm(str(tmp_path / "lm"), torch.float32)
    rm.model.save_pretrained(tmp_path / "rm")
    RewardModel.from_pretrained(str(tmp_path / "rm"))
    path = tmp_path / "rm" / "model.safetensors"
    whole = load_file(path)
    name = next(k for k in whole if "layers.1.fc1.weight" in k)

    def refused(state, message):
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            RewardModel.from_pretrained(str(tmp_path / "rm"))

    missing = {k: v for k, v in whole.items() if k != name}
    refused(missing, "lacks 1 tensor, such as .*layers.1.fc1.weight")
    refused({**missing, name.replace("layers", "layer"): whole[name]}, "lacks 1 tensor")
    refused({**whole, "extra.weight": torch.zeros(2)}, "has unknown 1 tensor, such as extra.weight")
    refused({**whole, name: whole[name][:-1].clone()}, "wrong shape")
    with pytest.raises(UserError, match="is not a reward model"):
        RewardModel.from_pretrained(str(tmp_path / "lm"))


def test_a_classifier_whose_head_has_another_name_is_refused():
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1)
    bert = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(UserError, match="a bert reward model has no head named `score`"):
        RewardModel(bert)


# -----------------------------------------------------------------------------
# LoRA


def random_adapters(lm):
    """Moves the adapters of a model away from zero, where they start."""
    for name, p in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return lm


def test_an_adapter_is_described_in_one_flag():
    assert models.parse_lora("8") == dict(rank=8, alpha=16, lr=None, targets=())
    assert models.parse_lora("")["rank"] == 0
    want = dict(rank=4, alpha=2, lr=1e-3, targets=("q_proj", "v_proj"))
    assert models.parse_lora("4,alpha=2,lr=1e-3,targets=q_proj+v_proj") == want


@pytest.mark.parametrize("text", [
    "x", "-1", "2.5", "8,beta=1", "8,alpha", "8,alpha=0", "8,lr=-1", "8,lr=nan", "8,lr=inf",
    "8,lr=1=2", "8,,lr=1"])
def test_a_bad_lora_flag_gets_one_sentence(text):
    message = re.escape(f"--lora {text}: write a rank")
    with pytest.raises(UserError, match=message):
        models.parse_lora(text)


def test_adapters_go_to_the_layers_that_are_named_and_no_other_weight_is_trained():
    lm = models.add_lora(model_of("llama"), "3,targets=q_proj+mlp.up_proj")
    names = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert len(names) == 3 * 2 * 2
    assert all("q_proj.lora_" in name or "mlp.up_proj.lora_" in name for name in names)
    for kind in ("llama", "gpt2"):
        with pytest.raises(UserError, match="has no layer 'Wqkv'; it has (down_proj|c_attn)"):
            models.add_lora(model_of(kind), "4,targets=Wqkv")


def test_without_targets_every_linear_layer_of_the_blocks_has_an_adapter_and_a_head_is_trained():
    lm = models.add_lora(model_of("llama"), "2")
    adapted = {n.removesuffix(".lora_A") for n, _ in lm.named_parameters() if "lora_A" in n}
    assert len(adapted) == 3 * 7 and not any("lm_head" in name for name in adapted)
    rm = RewardModel.from_lm("tiny", torch.float32)
    models.add_lora(rm.model, "2")
    assert rm.model.score.weight.requires_grad, "a new head must learn"
    assert not rm.model.base_model.embed_tokens.weight.requires_grad


def test_an_adapter_adds_its_product_times_alpha_over_rank():
    """Hu et al. 2021, section 4.1."""
    lm = random_adapters(models.add_lora(model_of("llama"), "4,alpha=12"))
    layer = lm.model.layers[0].self_attn.q_proj
    x = torch.randn(5, layer.lora_A.size(1))
    with torch.no_grad():
        added = layer(x) - layer.base(x)
        want = 3 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(added, want, rtol=1e-4, atol=1e-5)


def test_with_its_adapters_off_a_model_is_its_base_even_after_an_error():
    ids = torch.tensor(ragged([9]))
    base = model_of("llama")
    lm = random_adapters(models.add_lora(model_of("llama"), "2"))
    with torch.no_grad():
        assert not torch.equal(lm(ids).logits, base(ids).logits)
        with models.adapters_off():
            assert torch.equal(lm(ids).logits, base(ids).logits)
        with pytest.raises(Killed), models.adapters_off():
            raise Killed
        assert not torch.equal(lm(ids).logits, base(ids).logits), "they are on again"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merged_weights_are_base_and_adapters_together(kind):
    utils.init_distributed(0)
    lm = random_adapters(models.add_lora(model_of(kind), 2))
    plain = model_of(kind)
    missing, unexpected = plain.load_state_dict(models.gather_state_dict(lm), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied in GPT-2
    ids = torch.tensor(ragged([9]))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapters_can_have_a_learning_rate_of_their_own():
    lm = models.add_lora(model_of("llama"), "3,targets=q_proj+mlp.up_proj")
    engine = make_engine(lm, lr=1e-4, lora="3,targets=q_proj+mlp.up_proj,lr=0.003")
    training.set_lr(engine, 5e-5)
    (group,) = engine.optimizer.param_groups
    assert group["lr"] == pytest.approx(0.0015), "half of the one peak is half of the other"


# -----------------------------------------------------------------------------
# model folders in


@pytest.fixture
def lm_folder(tmp_path, tok):
    """A small language model with the built-in tokenizer."""
    folder = tmp_path / "lm"
    model_of("llama", vocab_size=258).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", ["cut off", "empty", "not safetensors"])
def test_damaged_weights_get_one_sentence(damage, lm_folder):
    path = lm_folder / "model.safetensors"
    whole = path.read_bytes()
    contents = {"cut off": whole[:-1000], "empty": b"", "not safetensors": b"x" * 1000}
    path.write_bytes(contents[damage])
    with pytest.raises(UserError, match="lm: the model cannot be loaded"):
        models.load_lm(str(lm_folder), torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_where_they_are_loaded(value, dtype, lm_folder):
    lm = models.load_lm(str(lm_folder), torch.float32)
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight[3, 4] = value
    lm.save_pretrained(lm_folder)
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight has values that are NaN"):
        models.load_lm(str(lm_folder), dtype)


def test_a_reward_model_is_not_taken_for_a_language_model(tmp_path):
    RewardModel.from_lm("tiny", torch.float32).model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="this is a reward model .*LlamaForSequenceClassification"):
        models.load_lm(str(tmp_path), torch.float32)


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype_auto_takes_bf16_only_from_a_gpu_that_computes_with_it(native, expected, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return native or including_emulation  # as on a T4

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert utils.dtype_of("auto") == expected
    assert utils.dtype_of("bf16") == torch.bfloat16


def test_dropout_is_off_and_buffers_keep_their_precision_in_what_is_loaded(lm_folder):
    config = json.loads((lm_folder / "config.json").read_text())
    (lm_folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    lm = models.load_lm(str(lm_folder), torch.bfloat16)
    assert lm.config.attention_dropout == 0.0 and lm.dtype == torch.bfloat16
    frequencies = model_of("llama").model.rotary_emb.inv_freq
    assert torch.equal(lm.model.rotary_emb.inv_freq, frequencies)


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_gets_one_sentence(lm_folder):
    (lm_folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        models.load_tokenizer(str(lm_folder))
    (lm_folder / "tokenizer.json").unlink()
    (lm_folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="this model folder has no tokenizer"):
        models.load_tokenizer(str(lm_folder))


@pytest.mark.parametrize("name, message", [
    ("", "the name of a model is empty"),
    ("sftt", "no folder sftt here, and it is not a name of the Hugging Face hub"),
    ("out/nothing", "out/nothing: no such model folder; train one first, or name another"),
    ("out/nothing/here", "out/nothing/here: no such model folder"),
    ("./nothing", "./nothing: no such model folder"),
    ("/nowhere/at/all", "/nowhere/at/all: no such model folder"),
    ("results/nothing", "results/nothing: no such model folder"),  # results/ is a folder here
])
def test_a_name_that_can_be_no_model_is_said_at_once(name, message, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(models, "require_hub", lambda name: pytest.fail("the hub is asked"))
    for load in (models.load_tokenizer, models.load_config):
        with pytest.raises(UserError, match=message):
            load(name)


def test_where_the_hub_cannot_be_reached_it_is_tried_once(monkeypatch):
    import huggingface_hub

    tries = []

    def no_connection(*args, **kwargs):
        tries.append(args)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_connection)
    with pytest.raises(UserError, match=r"some/one: no such folder here, .*hub cannot be reached"):
        models.load_tokenizer("some/one")
    assert len(tries) == 1


def test_a_model_in_the_cache_of_the_hub_needs_no_network(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: "/the/file")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *args: pytest.fail())
    models.require_folder("some/one")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"config": 3}', b"\xff\xfe"])
def test_a_broken_run_json_is_named(text, tmp_path):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/run.json ")):
        models.read_run_json(tmp_path)
    (tmp_path / "run.json").unlink()
    assert models.read_run_json(tmp_path) == {}


# -----------------------------------------------------------------------------
# model folders out

CONVERSATION = [
    {"role": "user", "content": " Why {prompt}? \n"},
    {"role": "assistant", "content": "\tBecause. "},
    {"role": "user", "content": "Really, \"yes\"?"},
]
TEMPLATES = [
    TEMPLATE,
    "{prompt}",
    "Q: {prompt}\nA:\n",
    "{prompt}\n---\n{prompt} →",
    'a "b" \\ {{x}} {prompt} %}',
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
def test_the_template_of_a_run_is_saved_as_a_chat_template(template, system, tmp_path, tok):
    utils.init_distributed(0)
    messages = CONVERSATION
    if system:
        messages = [{"role": "system", "content": " Be kind. "}, *CONVERSATION]
    models.save_model(model_of("llama", vocab_size=258), tok, tmp_path, template)
    text = (tmp_path / "chat_template.jinja").read_text()
    assert "\n" not in text, "one line"
    saved = models.load_tokenizer(str(tmp_path))
    got = saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert got == data.render(messages, template, tok)
    assert data.render(messages, "chat", saved) == got, "--template chat reads it again"
    assert tok.chat_template is None, "the run's own tokenizer is as it was"


def test_a_chat_template_begins_with_bos_where_the_tokenizer_puts_it_before_a_text(tmp_path, tok):
    utils.init_distributed(0)
    from tokenizers.processors import TemplateProcessing

    with_bos = models.tiny_tokenizer()
    with_bos.bos_token = "<eos>"
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", with_bos.eos_token_id)])
    models.save_model(model_of("llama", vocab_size=258), with_bos, tmp_path, TEMPLATE)
    saved = models.load_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "why"}]
    ids = saved.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == data.prompt_ids([data.render(messages, TEMPLATE, tok)], TEMPLATE, with_bos)[0]
    assert ids[0] == with_bos.eos_token_id


def test_the_chat_template_that_is_saved_is_that_of_the_run_whatever_the_start_model_had(tmp_path):
    utils.init_distributed(0)
    lm = model_of("llama", vocab_size=258)
    tok = models.tiny_tokenizer()
    tok.chat_template = "{{ 'own' }}"
    messages = [{"role": "user", "content": "why"}]
    for template, want in (("chat", "own"), ("Q: {prompt}\nA:", "Q: why\nA:"), ("{prompt}", "why")):
        models.save_model(lm, tok, tmp_path, template)
        tok = models.load_tokenizer(str(tmp_path))
        assert tok.apply_chat_template(messages, tokenize=False) == want


def test_every_file_of_a_model_folder_has_the_same_mode(tmp_path, tok):
    utils.init_distributed(0)
    old_mask = os.umask(0o022)
    try:
        models.save_model(models.add_lora(model_of("llama"), 2), tok, tmp_path, TEMPLATE)
    finally:
        os.umask(old_mask)
    modes = {str(p): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    assert len(modes) >= 6 and set(modes.values()) == {0o644}, modes


def numbered_folder(path, number, tok):
    """A model folder in which a weight and an entry of the config have this number."""
    lm = model_of("llama")
    with torch.no_grad():
        lm.model.norm.weight.fill_(number)
    models.save_model(lm, tok, path, TEMPLATE, score_offset=number)


def killed_before_rename(n, call):
    """Calls call(), and kills it before it renames its n-th file, counted from 0. Returns the names
    of the files that it renamed, or wanted to."""
    real_rename = Path.rename
    names = []

    def rename(self, target):
        names.append(Path(target).name)
        if len(names) > n:
            raise Killed
        return real_rename(self, target)

    Path.rename = rename
    try:
        call()
    except Killed:
        pass
    finally:
        Path.rename = real_rename
    return names


def test_a_save_that_is_killed_leaves_the_old_model_or_the_new_one(tmp_path, tok):
    utils.init_distributed(0)
    numbered_folder(tmp_path / "old", 1.0, tok)
    old = all_files(tmp_path / "old")
    weights = []
    for n in range(len(old)):
        out = tmp_path / str(n)
        shutil.copytree(tmp_path / "old", out)
        names = killed_before_rename(n, lambda out=out: numbered_folder(out, 2.0, tok))
        assert len(names) == n + 1
        if n == 0:
            visible = {k: v for k, v in all_files(out).items() if not k.startswith(".new/")}
            assert visible == old, "until all is written, the old folder is untouched"
        lm = models.load_lm(str(out), torch.float32)
        weights.append(lm.model.norm.weight[0].item())
    assert weights == sorted(weights) and set(weights) == {1.0, 2.0}
    assert names[-1] == "config.json"
    numbered_folder(out, 3.0, tok)
    lm = models.load_lm(str(out), torch.float32)
    assert lm.config.score_offset == lm.model.norm.weight[0].item() == 3.0
    assert not (out / ".new").exists(), "what was left over is gone"


def test_a_save_that_is_killed_in_a_new_folder_leaves_no_model_there(tmp_path, tok):
    utils.init_distributed(0)
    numbered_folder(tmp_path / "whole", 1.0, tok)
    last = len(all_files(tmp_path / "whole")) - 1
    names = killed_before_rename(last, lambda: numbered_folder(tmp_path / "out", 1.0, tok))
    assert names[-1] == "config.json" and (tmp_path / "out/model.safetensors").exists()
    with pytest.raises(UserError, match="neither a model folder nor a name on the hub"):
        models.load_lm(str(tmp_path / "out"), torch.float32)


FULL_DISK = [
    OSError(28, "No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),  # as the tokenizers library raises it
]


@pytest.mark.parametrize("error", FULL_DISK)
def test_a_disk_that_is_full_at_the_last_save_gets_one_sentence(error, tmp_path, tok, monkeypatch):
    utils.init_distributed(0)
    numbered_folder(tmp_path, 1.0, tok)
    before = all_files(tmp_path)

    def full(self, folder, **kwargs):
        Path(folder, "half").write_text("x")
        raise error

    monkeypatch.setattr(type(tok), "save_pretrained", full)
    with pytest.raises(UserError, match="cannot be saved: the disk is full.* --resume") as caught:
        numbered_folder(tmp_path, 2.0, tok)
    assert str(tmp_path) in str(caught.value)
    assert all_files(tmp_path) == before, "the old model, and nothing half-written"


def test_an_error_that_is_not_the_disks_keeps_its_traceback(tmp_path, tok, monkeypatch):
    utils.init_distributed(0)

    def bug(self, folder, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr(type(tok), "save_pretrained", bug)
    with pytest.raises(KeyError, match="a bug"):
        numbered_folder(tmp_path, 2.0, tok)


ROOMS = (100_000, 3_000, 100)  # bytes: an error of the tensors' writer, and of smaller files'


def limit_file_size(room):
    """From here on no file of this process can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def error_of(write, *args, **kwargs):
    """[The message of the UserError that this call raises], or []. Then files may grow again."""
    try:
        write(*args, **kwargs)
        return []
    except UserError as error:
        return [str(error)]
    finally:
        limit_file_size(resource.RLIM_INFINITY)


def save_with_little_room(out):
    utils.init_distributed(0)
    model = (model_of("llama"), models.tiny_tokenizer(), out, TEMPLATE)
    messages = []
    for room in ROOMS:
        limit_file_size(room)
        messages += error_of(models.save_model, *model)
    return messages


def test_a_model_folder_that_cannot_be_written_gets_one_sentence(with_little_room):
    out, messages, _, _ = with_little_room
    assert len(messages) == len(ROOMS)
    for message in messages:
        assert re.search("the model cannot be saved: a file (has reached|is not written)", message)
    assert all_files(out / "model") == {}


def save_nan(out):
    """Saves a model, then breaks a weight and saves it again. Returns the error, and whether the
    folder is as it was."""
    utils.init_distributed(0)
    lm = model_of("llama")
    tok = models.tiny_tokenizer()
    models.save_model(lm, tok, out, TEMPLATE)
    dist.barrier()
    before = all_files(out)
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    try:
        models.save_model(lm, tok, out, TEMPLATE)
    except UserError as error:
        return str(error), all_files(out) == before


def test_weights_that_are_not_finite_are_never_saved_over_a_model(on_two_ranks):
    for message, unchanged in on_two_ranks["save nan"]:
        assert "layers.1.mlp.up_proj.weight holds values that are NaN" in message
        assert "lower learning rate" in message and unchanged


# -----------------------------------------------------------------------------
# DeepSpeed engines


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_step_uses_a_gradient_of_norm_at_most_one(zero):
    engine = make_engine(zero=zero)
    backward(engine, scale=100)
    norms = training.step(engine)
    moments = [state["exp_avg"].flatten() for state in engine.basic_optimizer.state.values()]
    norm = torch.cat(moments).norm()
    assert norms[0] > 10 and norm == pytest.approx(0.1, rel=1e-3), "Adam's moment is a tenth of it"


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_optimizer_is_adam_with_its_two_decays_and_the_epsilon_of_the_script(zero):
    """Two steps of the textbook, on the gradients that PyTorch computes without DeepSpeed."""
    lr, eps = 1e-2, 1e-3
    plain = Policy(model_of("llama"))
    engine = make_engine(lr=lr, eps=eps, zero=zero)
    tokens, prompt_lens = torch.tensor(ragged([12, 12])), torch.tensor([5, 5])
    params = list(plain.parameters())
    first = [torch.zeros_like(p) for p in params]
    second = [torch.zeros_like(p) for p in params]
    for step in (1, 2):
        logprobs, _ = plain(tokens, prompt_lens, torch.tensor([7, 7]))
        gradients = torch.autograd.grad(-logprobs.mean(), params)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for p, g, m, v in zip(params, gradients, first, second):
            g = g / norm.clamp(min=1)
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g * g)
            unbiased = v / (1 - 0.99**step)
            p.data -= lr * m / (1 - 0.9**step) / (unbiased.sqrt() + eps)
        backward(engine)
        assert training.step(engine)[0] == pytest.approx(norm.item(), rel=1e-4)
        states = engine.basic_optimizer.state.values()
        got = sum(state["exp_avg_sq"].sum().item() for state in states)
        assert got == pytest.approx(sum(v.sum().item() for v in second), rel=1e-3)
    state = models.gather_state_dict(engine.module.lm)
    for name, p in plain.lm.named_parameters():
        torch.testing.assert_close(state[name], p.data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_in_bfloat16_the_first_step_is_a_whole_one_and_rotary_frequencies_stay_float32(zero):
    engine = make_engine(dtype="bf16", zero=zero)
    cfg = Flags(dtype="bf16", zero=zero)
    lm = models.cast(model_of("llama"), torch.bfloat16)
    frozen = training.frozen_engine(Policy(lm), engine.device, cfg)
    reward_model = RewardModel.from_lm("tiny", torch.bfloat16)
    frequencies = model_of("llama").model.rotary_emb.inv_freq
    policies = {"actor": engine.module, "reference": getattr(frozen, "module", frozen)}
    for name, policy in {**policies, "reward model": reward_model}.items():
        buffers = dict(policy.named_buffers())
        found = next(b for n, b in buffers.items() if n.endswith("rotary_emb.inv_freq"))
        assert found.dtype == torch.float32, name
        assert name == "reward model" or torch.equal(found, frequencies), name
    before = [p.detach().clone() for p in training.fp32_params(engine)]
    backward(engine)
    training.step(engine)
    moved = []
    for old, new in zip(before, training.fp32_params(engine)):
        moved.append((old - new).detach().flatten().abs())
    typical = torch.cat(moved).quantile(0.9)
    assert typical == pytest.approx(1e-3, rel=0.01), "Adam's first step is as long as the rate"


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_in_bfloat16_the_gradients_of_many_micro_batches_are_added_in_float32(zero):
    """64 times the same micro batch: in bfloat16 the sum would be off by a percent."""
    norms = []
    for micro_batches in (1, 64):
        policy = Policy(models.cast(model_of("llama"), torch.bfloat16))
        cfg = Flags(dtype="bf16", zero=zero)
        engine = training.train_engine(policy, 1e-3, 2, micro_batches, cfg)
        for _ in range(micro_batches):
            backward(engine)
            norm = training.step(engine)
        norms += norm
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_in_bfloat16_deepspeed_prints_nothing(capfd):
    capfd.readouterr()
    make_engine(dtype="bf16")
    assert capfd.readouterr().out == ""


def test_under_zero_3_a_model_is_sharded_before_deepspeed_puts_it_on_a_gpu(monkeypatch):
    device = utils.init_distributed(0)
    import deepspeed

    real_initialize = deepspeed.initialize
    whole = []

    def initialize(model, **options):
        whole.append(sum(p.numel() for p in model.parameters()))
        return real_initialize(model=model, **options)

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    make_engine(zero=2)
    make_engine(zero=3)
    training.frozen_engine(Policy(model_of("llama")), device, Flags(zero=3))
    assert whole[0] > 0 and whole[1:] == [0, 0]


@pytest.mark.parametrize("zero", [0, 3])
def test_gradient_checkpointing_runs_each_layer_again_in_the_backward_pass(zero):
    calls = {}
    for checkpointing in (False, True):
        lm = models.add_lora(model_of("llama"), "2")  # frozen weights: the harder case
        engine = make_engine(lm, gradient_checkpointing=checkpointing, zero=zero)
        forwards = []
        lm.model.layers[1].mlp.register_forward_pre_hook(lambda *_, n=forwards: n.append(1))
        backward(engine)
        training.step(engine)
        adapters = models.adapter_state_dict(lm)
        moved = adapters["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
        assert moved.abs().sum() > 0, "and the first layer's adapters, zero at first, are trained"
        calls[checkpointing] = len(forwards)
    assert calls == {False: 1, True: 2}


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_offload_leaves_optimizers_and_sharded_weights_on_the_cpu(zero):
    on = make_engine(zero=zero, offload=True).optimizer
    off = make_engine(zero=zero).optimizer

    def offloads(optimizer):
        names = ("cpu_offload", "offload_optimizer")
        return any(getattr(optimizer, name, False) for name in names)

    assert offloads(on) and not offloads(off)
    if zero == 3:
        assert on.offload_param and not off.offload_param


def test_offloaded_frozen_models_are_on_the_device_only_while_they_are_needed():
    class Model(torch.nn.Linear):
        """Records where it is sent, since there may be no second device to send it to."""
        sent_to = []

        def to(self, device):
            self.sent_to.append(device)
            return self

    meta = torch.device("meta")
    training.frozen_engine(Model(2, 2), meta, Flags(offload=True))
    training.frozen_engine(Model(2, 2), meta, Flags())
    assert Model.sent_to == ["cpu", meta]
    Model.sent_to.clear()
    with pytest.raises(Killed), training.on_device(meta, Model(2, 2), None):
        raise Killed
    assert Model.sent_to == [meta, "cpu"], "there, and back whatever happens"


def poison_one_engine(zero):
    """Two engines, of which the second has a gradient of NaN on the last rank at the second step.
    Returns which of them moved at each step, and what the steps returned."""
    engines = [make_engine(zero=zero), make_engine(zero=zero)]
    last_rank = dist.get_rank() == dist.get_world_size() - 1
    moved, norms = [], []
    training.SkippedSteps.total = training.SkippedSteps.in_a_row = 0
    for step in range(3):
        before = [models.gather_state_dict(e.module.lm) for e in engines]
        for engine in engines:
            is_bad = last_rank and step == 1 and engine is engines[1]
            backward(engine, scale=math.nan if is_bad else 1.0)
        norms.append(training.step(*engines))
        after = [models.gather_state_dict(e.module.lm) for e in engines]
        moved.append([
            any(not torch.equal(x[k], y[k]) for k in x) for x, y in zip(before, after)])
    return moved, norms, (training.SkippedSteps.total, training.SkippedSteps.in_a_row)


@pytest.mark.parametrize("world, zero", [(1, 0), (1, 3), (2, 0), (2, 2), (2, 3)])
def test_a_gradient_that_is_not_finite_on_one_rank_keeps_all_engines_from_stepping(
        world, zero, on_two_ranks):
    if world == 1:
        results = [poison_one_engine(zero)]
    else:
        results = on_two_ranks[f"poison, ZeRO {zero}"]
    for rank, (moved, norms, skipped) in enumerate(results):
        if rank == 0:  # it gathers the weights
            assert moved == [[True, True], [False, False], [True, True]]
        assert norms[1] == [None, None] and None not in norms[0] + norms[2]
        assert skipped == (1, 0)


DS_CONFIGS = {
    "no such file": (None, "No such file"),
    "no JSON": ("{", "Expecting"),
    "no object": ("[1]", "must hold one JSON object"),
    "optimizer": ('{"optimizer": {"type": "AdamW"}}', "optimizer is set by training.train_engine"),
    "batch size": ('{"train_batch_size": 3}', "is set by --batch-size"),
    "micro batch": (
        '{"train_micro_batch_size_per_gpu": 4}',
        "train_micro_batch_size_per_gpu is set by --micro-batch; take it out of the file"),
    "auto": ('{"gradient_clipping": "auto"}', '"auto" is a word of'),
    "unknown": ('{"foo": 1}', "foo is not a DeepSpeed setting"),
    "unknown below": ('{"zero_optimization": {"foo": 1}}', "foo: Extra inputs are not permitted"),
    "not an object": ('{"zero_optimization": "x"}', "zero_optimization must be an object, .*'x'"),
    "not a number": ('{"gradient_clipping": "x"}', "gradient_clipping must be a number, .*'x'"),
    "no number but true": ('{"gradient_clipping": true}', "must be a number, and is True"),
    "not a switch": ('{"dump_state": 1}', "dump_state must be true or false, and is 1"),
    "negative": ('{"gradient_clipping": -1}', "gradient_clipping -1: must be at least 0"),
    "stage 7": ('{"zero_optimization": {"stage": 7}}', "stage: Input should be 0, 1, 2"),
    "other stage": (
        '{"zero_optimization": {"stage": 3}}',
        "zero_optimization.stage is 3, and by --zero, --offload and --dtype it is 2"),
    "wrong kind below": (
        '{"zero_optimization": {"offload_optimizer": {"device": "moon"}}}',
        "offload_optimizer.device: Input should be 'none', 'cpu' or 'nvme', not 'moon'"),
    "no data type": ('{"communication_data_type": "q"}', "Invalid communication_data_type"),
    "wrong switch": ('{"flops_profiler": {"enabled": "yes"}}', "DeepSpeed cannot read this"),
}


@pytest.mark.parametrize("case", DS_CONFIGS)
def test_a_bad_deepspeed_config_gets_one_sentence(case, tmp_path):
    utils.init_distributed(0)
    path = tmp_path / "ds.json"
    text, message = DS_CONFIGS[case]
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        training.read_ds_config(str(path), stage=2)
    assert str(caught.value).startswith(f"--ds-config {path}: ")
    assert "\n" not in str(caught.value)


def test_a_deepspeed_config_is_merged_over_our_settings(tmp_path):
    path = tmp_path / "ds.json"
    settings = {"gradient_clipping": 0.25, "zero_optimization": {"stage": 2, "overlap_comm": False}}
    path.write_text(json.dumps(settings))
    engine = make_engine(zero=2, ds_config=str(path))
    assert engine.gradient_clipping() == 0.25
    backward(engine, scale=100)
    training.step(engine)
    moments = [state["exp_avg"].flatten() for state in engine.basic_optimizer.state.values()]
    assert torch.cat(moments).norm() == pytest.approx(0.025, rel=1e-3)
    with pytest.raises(UserError, match="stage is 2, and by --zero, --offload and --dtype it is 0"):
        make_engine(zero=0, ds_config=str(path))


# -----------------------------------------------------------------------------
# EMA


@pytest.mark.parametrize(
    "dtype, zero", [("fp32", 0), ("fp32", 2), ("bf16", 0), ("bf16", 2), ("bf16", 3)])
def test_the_ema_is_that_of_the_float32_weights_to_five_digits_after_a_thousand_steps(
        dtype, zero, tmp_path, tok):
    lm = model_of("gpt2", vocab_size=258).to(utils.dtype_of(dtype))
    engine = make_engine(lm, dtype=dtype, zero=zero)
    ema = training.EMA(engine, 0.992)
    want = [p.detach().double() for p in training.fp32_params(engine)]
    rng = torch.Generator().manual_seed(0)
    for _ in range(1000):  # a random walk of the float32 weights, with a drift
        for p in training.fp32_params(engine):
            p.data += 1e-4 * (torch.randn(p.shape, generator=rng) + 0.3)
        ema.update()
        for w, p in zip(want, training.fp32_params(engine)):
            w.mul_(0.992).add_((1 - 0.992) * p.detach().double())
    for got, w in zip(ema.average, want):
        assert (got - w).norm() / w.norm() < 1e-5

    def shards():
        params = engine.trained_params
        return [(p.ds_tensor if zero == 3 else p).detach().clone() for p in params]

    weights = [p.detach().clone() for p in training.fp32_params(engine)]
    shards_before = shards()
    with ema.in_place():
        models.save_model(lm, tok, tmp_path)
    for before, after in zip(weights, training.fp32_params(engine)):
        assert torch.equal(before, after), "the optimizer's weights are as they were"
    for before, after in zip(shards_before, shards()):
        assert torch.equal(before, after), "and so are the model's"
    assert all((a - w).norm() > 0 for a, w in zip(ema.average, weights))
    if zero == 0:
        params = engine.trained_params
        i = next(i for i, p in enumerate(params) if p is lm.transformer.wte.weight)
        saved = models.load_lm(str(tmp_path), torch.float32).transformer.wte.weight
        rtol = 0.01 if dtype == "bf16" else 1e-5
        if dtype == "bf16":  # all float32 weights are in one buffer, in the order of the parameters
            i = sum(p.numel() for p in params[:i])
            average = want[0][i : i + saved.numel()].view_as(saved)
        else:
            average = want[i]
        torch.testing.assert_close(saved.double(), average, rtol=rtol, atol=1e-5)


def test_an_ema_with_decay_0_keeps_no_copy_and_does_nothing():
    engine = make_engine()
    ema = training.EMA(engine, 0.0)
    ema.update()
    assert ema.average == []


# -----------------------------------------------------------------------------
# the folder of a run


def claim(out, *inputs, **flags):
    utils.init_distributed(0)
    training.claim_folder(Flags(out=str(out), **flags), *map(str, inputs))


def make_run(out, finished=False, checkpoints=(), **config):
    """A folder as a run leaves it."""
    (out / "ema").mkdir(parents=True)
    (out / "ema/model.safetensors").write_text("old")
    for name in ("config.json", "metrics.jsonl", "samples.jsonl"):
        (out / name).write_text("old")
    for step in checkpoints:
        (out / "checkpoint" / str(step)).mkdir(parents=True)
    run = {"script": "sft.py", "config": {**dataclasses.asdict(Flags()), **config}}
    if finished:
        run["finished"] = True
    (out / "run.json").write_text(json.dumps(run))
    return all_files(out)


def test_a_run_may_write_to_a_folder_that_is_new_or_empty_or_of_a_run_that_never_saved(tmp_path):
    claim(tmp_path / "new" / "below")
    assert (tmp_path / "new" / "below").is_dir()
    claim(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    claim(tmp_path, "tiny", "some/one", "")
    make_run(tmp_path / "early")
    claim(tmp_path / "early")


def test_a_finished_run_is_overwritten_only_where_that_is_asked_for(tmp_path):
    out = tmp_path / "run"
    before = make_run(out, finished=True)
    with pytest.raises(UserError, match="run holds a finished run of sft.py; .*--overwrite"):
        claim(out)
    after = all_files(out)
    del after[".lock"]
    assert after == before
    claim(out, overwrite=True)
    assert list(all_files(out)) == [".lock"], "nothing of the old run is left beside the new one"


def test_a_run_that_did_not_end_goes_on_or_is_overwritten_and_never_just_begins_again(tmp_path):
    out = tmp_path / "run"
    make_run(out, checkpoints=(5, 10))
    with pytest.raises(UserError, match="holds a run that did not end, up to step 10: go on with"):
        claim(out)
    claim(out, resume=True)
    with pytest.raises(UserError, match="--lr was 0.001, and now it is 0.1; a run goes on as it"):
        claim(out, resume=True, lr=0.1)
    claim(out, resume=True, save_every=5.0)
    with pytest.raises(UserError, match="--resume goes on with a run and --overwrite removes it"):
        claim(out, resume=True, overwrite=True)
    assert (out / "checkpoint/10").is_dir()
    claim(out, overwrite=True)
    assert not (out / "checkpoint").exists()


def test_resuming_a_finished_run_ends_at_once_and_is_no_error(tmp_path, capsys):
    make_run(tmp_path / "run", finished=True)
    with pytest.raises(SystemExit) as end:
        claim(tmp_path / "run", resume=True)
    assert end.value.code == 0
    assert "is finished: nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_that_no_run_has_written_is_never_overwritten(overwrite, lm_folder):
    before = all_files(lm_folder)
    with pytest.raises(UserError, match="this folder holds a model that no run has written"):
        claim(lm_folder, overwrite=overwrite)
    assert all_files(lm_folder) == before


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_run_never_writes_over_a_model_that_it_starts_from(flags, tmp_path, monkeypatch):
    out = tmp_path / "run"
    before = make_run(out, finished=True)
    monkeypatch.chdir(tmp_path)
    for source in (out, "run", "./run/", tmp_path / "link"):
        if source == tmp_path / "link":
            source.symlink_to(out)
        with pytest.raises(UserError, match="is the folder of a model that this run starts from"):
            claim(out, "tiny", source, **flags)
    assert all_files(out) == before


def test_overwriting_never_removes_a_model_inside_the_folder_that_the_run_starts_from(tmp_path):
    out = tmp_path / "run"
    before = make_run(out, finished=True)
    with pytest.raises(UserError, match="--overwrite would remove .*run/ema, which this run"):
        claim(out, out / "ema", overwrite=True)
    assert all_files(out) == before


def test_overwriting_removes_nothing_where_there_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("a year's work")
    make_run(tmp_path / "run", finished=True)
    claim(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "run/run.json").exists()


def test_overwriting_follows_no_link_out_of_the_folder(tmp_path):
    make_run(tmp_path / "run", finished=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.tex").write_text("a year's work")
    (tmp_path / "run/link").symlink_to(tmp_path / "elsewhere")
    claim(tmp_path / "run", overwrite=True)
    assert (tmp_path / "elsewhere/thesis.tex").exists() and not (tmp_path / "run/link").exists()


def test_a_folder_that_cannot_be_written_to_gets_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="--out is empty"):
        claim("")
    with pytest.raises(UserError, match="file: cannot write to this folder .File exists"):
        claim(tmp_path / "file")
    with pytest.raises(UserError, match="below: cannot write to this folder .Not a directory"):
        claim(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot write to this folder"):
        claim("/proc/flatrlhf")
    if os.getuid() != 0:
        with pytest.raises(UserError, match="locked: cannot write to this folder .Permission"):
            claim(tmp_path / "locked")


def test_a_second_run_in_the_folder_of_a_running_one_is_refused(tmp_path):
    out = tmp_path / "run"
    make_run(out, checkpoints=(5,))
    with open(out / ".lock", "w") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX)
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="run: another run is writing to it"):
                claim(out, **flags)
        assert (out / "checkpoint/5").is_dir()
    claim(out, resume=True)
    with open(out / ".lock") as other_process, pytest.raises(BlockingIOError):
        fcntl.flock(other_process, fcntl.LOCK_EX | fcntl.LOCK_NB)
    claim(tmp_path / "another")
    with open(out / ".lock") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository in the place of ours, with the files ppo.py and utils.py."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("ppo.py", "utils.py"):
        (folder / name).write_text("a = 1\n")
    for arguments in ("init -q", "add .", "-c user.name=x -c user.email=x commit -q -m x"):
        subprocess.run(["git", *arguments.split()], cwd=folder, check=True)
    monkeypatch.setattr(utils, "__file__", str(folder / "utils.py"))
    monkeypatch.setitem(sys.modules, "ppo of a test", type(sys)("ppo"))
    sys.modules["ppo of a test"].__file__ = str(folder / "ppo.py")
    monkeypatch.setattr(utils.Inputs, "models", {})
    monkeypatch.setattr(utils.Inputs, "data", {"a.jsonl": "1"})
    return folder


def record_of(out, start=0, **flags):
    utils.init_distributed(0)
    out.mkdir(exist_ok=True)
    utils.write_record(out, Flags(out=str(out), **flags), start)
    return json.loads((out / "run.json").read_text())


def test_a_run_keeps_its_code_and_what_is_changed_in_it_since_the_commit(repository, tmp_path):
    clean = record_of(tmp_path / "clean")
    assert clean["dirty"] == [] and len(clean["git"]) == 40
    assert sorted(clean["code"]) == ["ppo.py", "test_training.py", "utils.py"]
    assert sorted(all_files(tmp_path / "clean/code")) == sorted(clean["code"])
    (repository / "ppo.py").write_text("a = 2\n")
    (tmp_path / "rules.py").write_text("")
    flags = {"lora": f"out/reward,{tmp_path}/rules.py:length:0.1"}  # any flag with such a name
    dirty = record_of(tmp_path / "dirty", **flags)
    assert dirty["dirty"] == ["ppo.py"] and dirty["git"] == clean["git"]
    diff = (tmp_path / "dirty/code/changes.diff").read_text()
    assert "-a = 1\n+a = 2\n" in diff
    assert (tmp_path / "dirty/code/ppo.py").read_text() == "a = 2\n"
    changed = {k for k in dirty["code"] if dirty["code"][k] != clean["code"].get(k)}
    assert changed == {"ppo.py", "rules.py"}
    shutil.rmtree(repository / ".git")
    assert record_of(tmp_path / "no-git")["git"] is None


def test_a_run_that_goes_on_keeps_its_record_and_says_which_code_has_changed(
        repository, tmp_path, capsys):
    out = tmp_path / "out"
    first = record_of(out, lr=0.5)
    again = record_of(out, start=3, lr=0.5, save_every=1.0)
    assert again.pop("resumed")[0]["step"] == 3 and again == first
    assert not (out / "code-3").exists() and not capsys.readouterr().out
    (repository / "ppo.py").write_text("a = 2\n")
    assert [r["step"] for r in record_of(out, start=5, lr=0.5)["resumed"]] == [3, 5]
    warning = "warning: --resume: code has changed since this run began: ppo.py\n"
    assert capsys.readouterr().out == warning
    assert (out / "code-5/ppo.py").read_text() == "a = 2\n"
    assert (out / "code/ppo.py").read_text() == "a = 1\n"


def test_a_run_records_its_rows_models_and_template_and_goes_on_with_no_others(
        toy_file, lm_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    shutil.copy(toy_file, file)
    out = tmp_path / "out"
    flags = dict(STEPS, data=str(file), model=str(lm_folder), epochs=0.15)
    _die_after(out, flags, step=1)
    run = models.read_run_json(out)
    assert run["script"] == "sft.py" and {"sft.py", "training.py", "utils.py"} <= set(run["code"])
    assert (out / "code/sft.py").read_bytes() == (HERE / "sft.py").read_bytes()
    assert run["config"]["template"] == TEMPLATE, "it was chosen by none of the flags"
    assert set(run["data"]) == {str(file)} and set(run["models"]) == {str(lm_folder)}
    assert {"command", "time", "host", "device", "world", "versions", "git", "dirty"} <= set(run)

    def refused(message):
        with pytest.raises(UserError, match=message):
            sft.main(sft.Config(out=str(out), resume=True, **flags))
        assert models.read_run_json(out) == run, "nothing has been written yet"

    rows = file.read_text()
    file.write_text("\n".join(reversed(rows.splitlines())))
    refused("rows.jsonl has other rows now than when this run began")
    file.write_text(rows.replace("\n", "\n\n"))  # the same rows
    weights = (lm_folder / "model.safetensors").read_bytes()
    flip(lm_folder / "model.safetensors")
    refused("lm has other files now than when this run began")
    (lm_folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="--template was 'Human: {prompt}.*', and now it is '{prom"):
        sft.main(sft.Config(out=str(out), resume=True, template="{prompt}", **flags))
    assert len(train(sft, out, resume=True, **flags)) == 3


def test_a_checkpoint_without_the_record_of_its_run_is_not_gone_on_with(tmp_path):
    make_run(tmp_path / "run", checkpoints=(5,))
    (tmp_path / "run/run.json").unlink()
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(UserError, match="has a checkpoint and no run.json, so nobody knows how"):
        claim(tmp_path / "run", resume=True)


def claim_finished(out):
    """The error where a folder holds a finished run."""
    utils.init_distributed(0)
    if dist.get_rank() == 0:
        make_run(Path(out), finished=True)
    try:
        claim(out)
    except UserError as error:
        return str(error)


def test_all_ranks_are_refused_together(on_two_ranks):
    first, second = on_two_ranks["claim"]
    assert first == second and "finished run" in first


# -----------------------------------------------------------------------------
# checkpoints


def short_run(cfg, total=6, at_step=None):
    """A run of a small policy, with a random number in each step's gradient.

    at_step(step) is called before each step. Returns (the step that the run started after, what it
    found there, the weights, the EMA, the next random number)."""
    engine = make_engine(lr=cfg.lr, zero=cfg.zero, dtype=cfg.dtype)
    ema = training.EMA(engine, 0.9)
    checkpoint = training.Checkpoint(cfg, total, ema=ema, engine=engine, absent=None)
    start, state = checkpoint.restore()
    for step in range(start + 1, total + 1):
        if at_step:
            at_step(step)
        backward(engine, scale=1 + random.random() + np.random.rand() + torch.rand(()).item())
        training.step(engine)
        ema.update()
        checkpoint.save(step, note=f"after {step}")
    weights = [p.detach().clone() for p in training.fp32_params(engine)]
    average = [a.clone() for a in ema.average]
    draws = [random.random(), np.random.rand(), torch.rand(()).item()]
    return start, state, weights, average, draws


def die_at(last):
    def at_step(step):
        if step == last:
            raise Killed
    return at_step


def saved_steps(out):
    return sorted(int(p.name) for p in (Path(out) / "checkpoint").iterdir())


@pytest.mark.parametrize("dtype, zero", [("fp32", 0), ("fp32", 2), ("fp32", 3), ("bf16", 0)])
def test_a_run_goes_on_with_weights_moments_ema_and_random_numbers_to_the_bit(
        dtype, zero, tmp_path):
    whole = short_run(Flags(out=str(tmp_path / "whole"), dtype=dtype, zero=zero))
    assert whole[:2] == (0, {})
    parts = Flags(out=str(tmp_path / "parts"), dtype=dtype, zero=zero)
    with pytest.raises(Killed):
        short_run(parts, at_step=die_at(4))
    resumed = short_run(dataclasses.replace(parts, resume=True))
    assert resumed[:2] == (3, {"note": "after 3"})
    for got, want in zip(resumed[2] + resumed[3], whole[2] + whole[3]):
        assert torch.equal(got, want)
    assert resumed[4] == whole[4], "Python's, NumPy's and PyTorch's random numbers go on"


@pytest.mark.parametrize("zero", [0, 2])
def test_the_fused_optimizer_of_a_gpu_takes_the_same_steps_and_goes_on(
        zero, tmp_path, monkeypatch):
    want = short_run(Flags(out=str(tmp_path / "plain"), zero=zero))
    monkeypatch.setattr(training, "FUSED", True)
    parts = Flags(out=str(tmp_path / "parts"), zero=zero)
    with pytest.raises(Killed):
        short_run(parts, at_step=die_at(4))
    resumed = short_run(dataclasses.replace(parts, resume=True))
    for got, plain in zip(resumed[2], want[2]):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)


def test_the_count_of_skipped_steps_goes_on_too(tmp_path):
    cfg = Flags(out=str(tmp_path))

    def skip_two(step):
        training.SkippedSteps.total = 2
        training.SkippedSteps.in_a_row = 1
        die_at(2)(step)

    with pytest.raises(Killed):
        short_run(cfg, at_step=skip_two)
    training.SkippedSteps.total = 77
    engine = make_engine()
    training.Checkpoint(dataclasses.replace(cfg, resume=True), 6, engine=engine).restore()
    assert training.SkippedSteps.total == 2, "the two of the run, and not the 77 of another one"


def test_ten_checkpoints_are_written_in_a_run_and_two_are_kept(tmp_path):
    seen = []

    def look(step):
        if step > 1:
            seen.append(saved_steps(tmp_path) if (tmp_path / "checkpoint").exists() else [])

    short_run(Flags(out=str(tmp_path)), total=30, at_step=look)
    steps = sorted({step for steps in seen for step in steps})
    assert steps == list(range(3, 30, 3)), "none at the end, where the result is saved"
    assert max(map(len, seen)) == 2 and seen[-1] == [24, 27]


def test_a_checkpoint_is_also_written_after_so_many_minutes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seen = []

    def a_minute_later(step):
        now[0] += 60
        if step > 1 and (tmp_path / "checkpoint").exists():
            seen.append(saved_steps(tmp_path)[-1])

    short_run(Flags(out=str(tmp_path), save_every=7.0), total=100, at_step=a_minute_later)
    assert sorted(set(seen)) == sorted({*range(10, 100, 10), *range(7, 100, 10)}), (
        "every ten steps, and seven minutes after that")


def run_with_two_clocks(out):
    """Rank 1's clock runs, rank 0's stands. Returns the checkpoints at the end."""
    utils.init_distributed(0)
    rank = dist.get_rank()
    real_clock = time.monotonic
    now = [0.0]

    def later(step):
        now[0] += 60 * rank

    time.monotonic = lambda: now[0]
    short_run(Flags(out=out, save_every=2.0), total=30, at_step=later)
    time.monotonic = real_clock
    dist.barrier()
    return saved_steps(out)


def test_it_is_rank_0s_clock_that_counts_so_that_ranks_never_disagree(on_two_ranks):
    assert on_two_ranks["clocks"] == [[24, 27]] * 2


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": lambda path: flip(path),
}


def flip(path):
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a run that was killed after the checkpoints of steps 2 and 3."""
    out = tmp_path_factory.mktemp("checkpoints")
    with pytest.raises(Killed):
        short_run(Flags(out=str(out), zero=2), at_step=die_at(4))
    assert saved_steps(out) == [2, 3]
    return out


def last_whole_step(out):
    engine = make_engine(zero=2)
    cfg = Flags(out=str(out), zero=2, resume=True)
    return training.Checkpoint(cfg, 6, engine=engine).last_whole_step()


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
        how, checkpoints, tmp_path, capsys):
    names = [str(p.relative_to(checkpoints / "checkpoint/3"))
             for p in (checkpoints / "checkpoint/3").rglob("*") if p.is_file()]
    assert {"manifest.json", "state.json", "rank-0.pt"} < set(names) and len(names) >= 6
    for name in names:
        out = tmp_path / name.replace("/", "-")
        shutil.copytree(checkpoints, out)
        DAMAGE[how](out / "checkpoint/3" / name)
        if how == "flipped" and name == "manifest.json":
            continue  # a flipped bit in a name or number is a mismatch too, but not always JSON
        assert last_whole_step(out) == 2, name
        lines = [x for x in capsys.readouterr().out.splitlines() if "damaged" in x]
        assert len(lines) == 1 and str(out / "checkpoint/3") in lines[0] and name in lines[0]


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"state.json": [1, 2]}'])
def test_a_damaged_manifest_is_damage(manifest, checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "run")
    (tmp_path / "run/checkpoint/3/manifest.json").write_text(manifest)
    assert last_whole_step(tmp_path / "run") == 2


def test_where_no_checkpoint_is_whole_there_is_one_sentence(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "run")
    for step in (2, 3):
        flip(tmp_path / f"run/checkpoint/{step}/rank-0.pt")
    with pytest.raises(UserError, match="no checkpoint in .*run/checkpoint is whole; start from"):
        last_whole_step(tmp_path / "run")


def test_an_undamaged_checkpoint_with_more_files_in_it_is_whole(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "run")
    (tmp_path / "run/checkpoint/3/weights").mkdir()  # where zero_to_fp32.py writes
    (tmp_path / "run/checkpoint/3/weights/x").write_text("x")
    assert last_whole_step(tmp_path / "run") == 3


def test_a_run_that_goes_on_before_a_damaged_checkpoint_ends_as_the_undisturbed_one(
        checkpoints, tmp_path):
    whole = short_run(Flags(out=str(tmp_path / "whole"), zero=2))
    shutil.copytree(checkpoints, tmp_path / "run")
    flip(tmp_path / "run/checkpoint/3/rank-0.pt")
    (tmp_path / "run/checkpoint/5.new").mkdir()  # half-written, by a run that was killed
    resumed = short_run(Flags(out=str(tmp_path / "run"), zero=2, resume=True))
    assert resumed[0] == 2 and saved_steps(tmp_path / "run") == [4, 5]
    for got, want in zip(resumed[2] + resumed[3], whole[2] + whole[3]):
        assert torch.equal(got, want)


def resume_with_damage(out):
    """The step after which a run goes on where a file of rank 1 is damaged."""
    cfg = Flags(out=out, zero=2)
    try:
        short_run(cfg, at_step=die_at(4))
    except Killed:
        pass
    dist.barrier()
    if dist.get_rank() == 0:
        flip(Path(out) / "checkpoint/3/rank-1.pt")
    dist.barrier()
    return short_run(dataclasses.replace(cfg, resume=True))[0]


def test_two_ranks_check_each_others_files_and_take_the_same_checkpoint(on_two_ranks):
    assert on_two_ranks["damage"] == [2, 2]


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4641664 vs 4641552"),
])
def test_a_disk_that_is_full_at_a_checkpoint_gets_one_sentence_and_the_one_before_stays(
        error, tmp_path, monkeypatch):
    real_save = torch.save
    usage = shutil.disk_usage(tmp_path)

    def full(step):
        if step == 3:
            monkeypatch.setattr(torch, "save", fail)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))

    def fail(*args, **kwargs):
        raise error

    cfg = Flags(out=str(tmp_path))
    message = r"checkpoint of step 3 cannot be written: the disk is full; the checkpoint of step 2 "
    with pytest.raises(UserError, match=message + r"stays\. .*--resume") as caught:
        short_run(cfg, at_step=full)
    monkeypatch.setattr(torch, "save", real_save)
    assert str(tmp_path / "checkpoint") in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["1", "2"]
    assert short_run(dataclasses.replace(cfg, resume=True))[0] == 2


def test_a_checkpoint_that_another_rank_gives_up_gets_one_sentence(tmp_path, monkeypatch):
    real_save = torch.save

    def save(state, path, *args, **kwargs):
        if Path(path).parent.name == "3.new":
            shutil.rmtree(Path(path).parent)  # as a rank does for which the disk is full
        real_save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    message = "checkpoint of step 3 cannot be written: another rank, which .* step 2 stays"
    with pytest.raises(UserError, match=message):
        short_run(Flags(out=str(tmp_path)))
    assert saved_steps(tmp_path) == [1, 2]


def limit_file_size_at(last, room):
    def at_step(step):
        if step == last:
            limit_file_size(room)
    return at_step


def checkpoint_with_little_room(out):
    messages = []
    for room in ROOMS:
        cfg = Flags(out=f"{out}/{room}")
        messages += error_of(short_run, cfg, at_step=limit_file_size_at(3, room))
    return messages


def test_a_checkpoint_that_cannot_be_written_gets_one_sentence(with_little_room):
    out, _, messages, _ = with_little_room
    assert len(messages) == len(ROOMS)
    for room, message in zip(ROOMS, messages):
        assert re.search("step 3 cannot be written: a file (has reached|is not written)", message)
        assert "the checkpoint of step 2 stays" in message
        assert saved_steps(out / str(room)) == [1, 2]


def log_with_little_room(out):
    """Errors of metrics, of samples, and of the record that a run begins with."""
    cfg = Flags(out=out)
    log = utils.Log(cfg, 9, {})
    row = {"iteration": 1, "answer": "x" * 60}
    log(1, {"loss": 1.0})
    log.samples([row])
    messages = []
    for write in (
        lambda: log(2, dict.fromkeys("abcdefghij", 1.0)),
        lambda: log.samples([row, row]),
        lambda: utils.Log(cfg, 9, {}),
    ):
        limit_file_size(100)
        messages += error_of(write)
    return messages


def test_a_log_that_cannot_be_written_gets_one_sentence(with_little_room):
    out, _, _, messages = with_little_room
    assert len(messages) == 3
    for name, message in zip(("/metrics.jsonl", "/samples.jsonl", ""), messages):
        begin = f"{out}/log{name} cannot be written: a file has reached the largest size"
        assert message.startswith(begin) and message.endswith("go on with --resume")
    first = (out / "log/metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["step"] == 1, "what was written before stays"


def test_an_error_that_is_no_disks_is_not_called_one(tmp_path, monkeypatch):
    def lost(*args, **kwargs):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch, "save", lost)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        short_run(Flags(out=str(tmp_path)))


# -----------------------------------------------------------------------------
# signals

SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP, "Ctrl-C": signal.SIGINT}


def send_at(step, number):
    def at_step(now):
        if now == step:
            os.kill(os.getpid(), number)
    return at_step


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(name, tmp_path, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run where it is ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    whole = short_run(Flags(out=str(tmp_path / "whole")), total=50)
    cfg = Flags(out=str(tmp_path / "run"))
    with pytest.raises(SystemExit) as end:
        short_run(cfg, total=50, at_step=send_at(13, SIGNALS[name]))
    assert end.value.code == 128 + SIGNALS[name]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == (
        f"{name}: stopped after step 13 of 50. The checkpoint is {tmp_path}/run/checkpoint/13: go "
        "on with the same command and --resume")
    resumed = short_run(dataclasses.replace(cfg, resume=True), total=50)
    assert resumed[0] == 13
    for got, want in zip(resumed[2] + resumed[3], whole[2] + whole[3]):
        assert torch.equal(got, want)


def test_a_signal_at_the_last_step_does_not_keep_the_run_from_its_end(tmp_path):
    start, *_ = short_run(Flags(out=str(tmp_path)), at_step=send_at(6, signal.SIGTERM))
    assert start == 0


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(tmp_path):
    cfg = Flags(out=str(tmp_path))
    with pytest.raises(SystemExit):
        short_run(cfg, total=50, at_step=send_at(13, signal.SIGTERM))
    assert saved_steps(tmp_path) == [10, 13]
    flip(tmp_path / "checkpoint/13/rank-0.pt")
    with pytest.raises(SystemExit):
        resumed = dataclasses.replace(cfg, resume=True)
        short_run(resumed, total=50, at_step=send_at(12, signal.SIGTERM))
    assert saved_steps(tmp_path) == [10, 12]


def test_signals_that_are_ignored_stay_ignored_and_a_finished_run_takes_its_handlers_back(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    before = signal.getsignal(signal.SIGTERM)
    engine = make_engine()
    checkpoint = training.Checkpoint(Flags(out=str(tmp_path)), 6, engine=engine)
    checkpoint.restore()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == checkpoint.interrupt.handle
    (tmp_path / "run.json").write_text('{"config": {}}')
    checkpoint.finish()
    assert signal.getsignal(signal.SIGTERM) == before
    assert json.loads((tmp_path / "run.json").read_text())["finished"]


HANG_UP = """
import fcntl, signal, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # in a new session: its end comes with this terminal's
import test_training as t
def say(step):
    print("step", step, flush=True)
t.short_run(t.Flags(out={out!r}), total=10**6, at_step=say)
"""


def test_a_terminal_that_is_closed_ends_a_run_with_a_checkpoint_although_it_prints(tmp_path):
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HANG_UP.format(out=str(tmp_path))], cwd=HERE,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said = b""
    while b"step 3" not in said and select.select([ours], [], [], 100)[0]:
        try:
            said += os.read(ours, 1000)
        except OSError:
            pytest.fail(f"the process ended: {said.decode()}")
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert len(saved_steps(tmp_path)) == 1


def signal_to_one_rank(out):
    """The exit code and the checkpoints where rank 1 receives a signal at step 3."""
    utils.init_distributed(0)
    at_step = send_at(3, signal.SIGTERM) if dist.get_rank() == 1 else None
    try:
        short_run(Flags(out=out), total=50, at_step=at_step)
    except SystemExit as end:
        return end.code, saved_steps(out)


def test_a_signal_to_one_rank_ends_all_of_them(on_two_ranks):
    assert on_two_ranks["signal"] == [(128 + 15, [3])] * 2


# -----------------------------------------------------------------------------
# what the tests above run in processes of its own: to start those takes longer than to run it


def _on_two_ranks(out):
    return {
        "save nan": save_nan(f"{out}/nan"),
        "poison, ZeRO 0": poison_one_engine(0),
        "poison, ZeRO 2": poison_one_engine(2),
        "poison, ZeRO 3": poison_one_engine(3),
        "claim": claim_finished(f"{out}/claim"),
        "clocks": run_with_two_clocks(f"{out}/clocks"),
        "damage": resume_with_damage(f"{out}/damage"),
        "signal": signal_to_one_rank(f"{out}/signal"),
    }


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """{name: [result on rank 0, result on rank 1]}"""
    first, second = ranks(2, _on_two_ranks, str(tmp_path_factory.mktemp("two-ranks")))
    return {name: [first[name], second[name]] for name in first}


def _with_little_room(out):
    errors = save_with_little_room(f"{out}/model"), checkpoint_with_little_room(out)
    return *errors, log_with_little_room(f"{out}/log")


@pytest.fixture(scope="module")
def with_little_room(tmp_path_factory):
    """(folder, errors of saves, of checkpoints, of logs) in a process whose files cannot grow."""
    out = tmp_path_factory.mktemp("little-room")
    ((saves, checkpoints, logs),) = ranks(1, _with_little_room, str(out))
    return out, saves, checkpoints, logs


def test_a_second_ctrl_c_ends_at_once_and_one_that_a_launcher_sends_twice_counts_once(
        monkeypatch, capfd):
    def exit_now(code):
        raise Killed(code)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", exit_now)
    training.Interrupt().install()
    for seconds in (0.0, 0.1, 0.9):
        now[0] = seconds
        os.kill(os.getpid(), signal.SIGINT)
    now[0] = 1.2
    with pytest.raises(Killed) as end:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert end.value.args == (128 + signal.SIGINT,)
    said = capfd.readouterr().err
    assert said == "\nCtrl-C: the run ends after this step, with a checkpoint\n"


# -----------------------------------------------------------------------------
# scripts: model folders and adapters


def test_each_folder_loads_with_transformers_alone_in_a_fresh_process(chain, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text("""
import sys, torch
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline)

out = {}
for step in ("sft", "reward", "ppo"):
    auto = AutoModelForSequenceClassification if step == "reward" else AutoModelForCausalLM
    folder = f"{sys.argv[1]}/{step}"
    tok = AutoTokenizer.from_pretrained(folder)
    model = auto.from_pretrained(folder).eval()
    ids = tok(["Human: reverse apple\\nAssistant: elppa"], return_tensors="pt")["input_ids"]
    out[step] = model(input_ids=ids).logits.detach()
assert "utils" not in sys.modules
torch.save(out, sys.argv[2])
""")
    root = Path(chain["sft"][0]).parent
    done = subprocess.run(
        [sys.executable, str(probe), str(root), str(tmp_path / "out.pt")],
        capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "out.pt")
    tok = models.load_tokenizer(chain["sft"][0])
    ids = torch.tensor([tok("Human: reverse apple\nAssistant: elppa")["input_ids"]])
    with torch.no_grad():
        for step in ("sft", "ppo"):
            lm = models.load_lm(chain[step][0], torch.float32).eval()
            assert torch.equal(lm(ids).logits, theirs[step]), step
        rm = RewardModel.from_pretrained(chain["reward"][0])
        score = rm.score(ids, torch.tensor([ids.size(1)]))
    config = rm.model.config
    want = (theirs["reward"][:, 0] - config.score_offset) * config.score_scale
    torch.testing.assert_close(score, want)
    assert config.score_offset != 0 and config.score_scale != 1


def first_mlp(folder, layer=0):
    """A weight of a saved model that every run here trains."""
    lm = models.load_lm(str(folder), torch.float32)
    return lm.model.layers[layer].mlp.up_proj.weight.detach()


def test_with_lora_the_reference_is_the_actors_base_and_the_output_is_a_plain_merged_model(
        chain, toy_file, tmp_path):
    start = chain["sft"][0]
    flags = dict(PPO_STEPS, model=start, reward=chain["reward"][0], data=toy_file)
    metrics = train(ppo, tmp_path / "ppo", **flags, lora="4", actor_lr=0.02)
    assert abs(metrics[1]["kl"]) < 1e-3 < metrics[-1]["kl"], "at first the adapters do nothing"
    flags = dict(STEPS, model=start, data=toy_file, epochs=0.2, lora="2")
    train(sft, tmp_path / "sft", **flags)
    train(reward, tmp_path / "rm", **flags)
    RewardModel.from_pretrained(str(tmp_path / "rm"))
    base = models.load_lm(start, torch.float32)
    merged = models.load_lm(str(tmp_path / "ppo"), torch.float32)
    same = torch.equal(base.model.embed_tokens.weight, merged.model.embed_tokens.weight)
    assert same, "what has no adapter is as it was"
    assert not torch.equal(first_mlp(start), first_mlp(tmp_path / "ppo"))


def test_adapters_have_their_own_rank_targets_and_rate_and_load_with_peft(
        chain, toy_file, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    start = chain["sft"][0]
    flags = dict(STEPS, model=start, data=toy_file, epochs=0.3)
    lora = "4,alpha=12,targets=q_proj+mlp.up_proj,lr=0.05"
    train(sft, tmp_path / "sft", lora=lora, **flags)
    train(reward, tmp_path / "rm", lora="2,lr=0.05", **flags)
    ids = torch.tensor(ragged([20, 20]))
    head = {"num_labels": 1, "pad_token_id": 257}
    for folder, auto, more in (("sft", AutoModelForCausalLM, {}),
                               ("rm", AutoModelForSequenceClassification, head)):
        merged = auto.from_pretrained(tmp_path / folder).eval()
        base = auto.from_pretrained(start, **more).eval()
        with torch.no_grad():
            before = base(ids).logits
            adapters = str(tmp_path / folder / "adapters")
            both = peft.PeftModel.from_pretrained(base, adapters).eval()
            torch.testing.assert_close(
                both(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(merged(ids).logits, before, atol=1e-2)


# -----------------------------------------------------------------------------
# scripts: what runs together (ZeRO, LoRA, offload, ranks)


@pytest.fixture(scope="module")
def rankings_file(toy_file, tmp_path_factory):
    """Rankings of 2 to 4 answers, some tied, and pairs."""
    rows = []
    for i, line in enumerate(open(toy_file)):
        row = json.loads(line)
        answers = [row["rejected"], row["chosen"], row["chosen"] + "ab", "b"][: 2 + i % 3]
        if i % 4:
            row = {"prompt": row["prompt"], "answers": answers, "scores": [0, 2, 1, 1][: 2 + i % 3]}
        rows.append(row)
    return write_rows(tmp_path_factory.mktemp("rankings") / "rankings.jsonl", rows)


def _steps_on_ranks(toy_file, rankings_file, out, stages, micro_batch):
    """The numbers of every step of the three scripts, for each ZeRO stage."""
    results = {}
    for zero in stages:
        root = Path(out) / str(zero)
        flags = dict(STEPS, zero=zero, micro_batch=micro_batch, data=toy_file)
        a = train(sft, root / "sft", epochs=0.15, **flags)
        flags["model"] = str(root / "sft")
        b = train(reward, root / "reward", epochs=0.15, **flags)
        ranked = train(
            reward, root / "ranked", epochs=0.15, **{**flags, "data": rankings_file})
        c = train(ppo, root / "ppo", reward=str(root / "reward"), **{**PPO_STEPS, **flags})
        ppo_numbers = ("actor_loss", "critic_loss", "score", "kl")
        ppo_norms = ("actor_grad_norm", "critic_grad_norm")
        results[zero] = {
            "sft": [row["loss"] for row in a],
            "reward": [row["loss"] for row in b],
            "rankings": [[row[k] for k in ("loss", "accuracy", "grad_norm")] for row in ranked],
            "ppo": [[row[k] for k in ppo_numbers] for row in c[1:]],
            "sft gradient": [row["grad_norm"] for row in a],
            "ppo gradient": [[row[k] for k in ppo_norms] for row in c[1:]],
        }
    return results


def test_two_ranks_and_every_zero_stage_take_the_steps_of_one_process(
        toy_file, rankings_file, tmp_path, scripts_on_two_ranks):
    # Two micro batches per step on each rank, in both (of rankings four).
    one = _steps_on_ranks(toy_file, rankings_file, str(tmp_path), (0,), 4)[0]
    _, (two, _) = scripts_on_two_ranks["steps"]
    for zero, results in two.items():
        for name, got in results.items():
            np.testing.assert_allclose(
                np.array(got), np.array(one[name]), rtol=2e-3, atol=2e-4,
                err_msg=f"{name}, ZeRO {zero}, two ranks")


LORAS = ("", "4,lr=0.01")
NUMBERS = ("actor_loss", "critic_loss", "score", "kl", "actor_grad_norm", "critic_grad_norm")


def two_iterations(out, flags):
    """PPO: the numbers of each iteration, a weight at the end, and the same weight of the EMA."""
    metrics = train(ppo, out, **{**PPO_STEPS, **flags, "iterations": 2})
    numbers = [[row[k] for k in NUMBERS] for row in metrics[1:]]
    return numbers, first_mlp(out, 1), first_mlp(Path(out) / "ema", 1)


# (ZeRO stage, LoRA, whether gradient checkpointing and offload save memory, --tp)
COMBINATIONS = {
    1: list(itertools.product((0, 2, 3), LORAS, (False, True), (1,))),
    2: list(itertools.product((0, 2, 3), LORAS, (False, True), (1, 2))),
}
if not LONG:
    FULL, LORA = LORAS
    COMBINATIONS = {
        1: [(0, FULL, True, 1), (2, LORA, True, 1), (3, LORA, False, 1)],
        2: [(0, LORA, False, 2), (2, FULL, True, 1), (3, FULL, False, 2), (3, LORA, True, 1)],
    }


def _combinations(flags, out, combinations):
    """{combination: what two_iterations returns}."""
    results = {}
    for zero, lora, saving, tp in combinations:
        options = dict(
            zero=zero, lora=lora, gradient_checkpointing=saving, offload=saving, tp=tp,
            micro_batch=2)
        folder = Path(out) / f"{zero}-{bool(lora)}-{saving}-{tp}"
        results[zero, lora, saving, tp] = two_iterations(folder, {**flags, **options})
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_combinations_of_zero_lora_offload_checkpointing_and_ranks_train_as_one_plain_process(
        world, chain, toy_file, tmp_path, scripts_on_two_ranks):
    start = first_mlp(chain["sft"][0], 1)
    flags = dict(model=chain["sft"][0], reward=chain["reward"][0], data=toy_file)
    if world == 1:
        results = _combinations(flags, tmp_path, COMBINATIONS[world])
    else:
        _, (results, _) = scripts_on_two_ranks["combinations"]
    plain = {}
    for lora in LORAS:
        plain[lora] = two_iterations(tmp_path / f"plain-{bool(lora)}", {**flags, "lora": lora})
    assert list(results) == COMBINATIONS[world]
    for (zero, lora, saving, tp), (numbers, *weights) in results.items():
        want, *want_weights = plain[lora]
        case = f"ZeRO {zero}, LoRA {lora!r}, saving memory {saving}, {world} ranks, tp {tp}"
        np.testing.assert_allclose(numbers, want, rtol=5e-3, atol=5e-4, err_msg=case)
        for got, ref in zip(weights, want_weights):
            moved = (ref - start).norm()
            off = (got - ref).norm() / moved
            assert moved > 0 and off < 0.05, f"{case}: off by {off:.3f} of the way it went"


@pytest.mark.parametrize("zero", some(few=(3,), all_of_them=(0, 2, 3)))
def test_bfloat16_trains_at_every_stage_from_float32_weights(zero, chain, toy_file, tmp_path):
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file)
    flags.update(iterations=2, zero=zero)
    half = train(ppo, tmp_path / "bf16", **flags, dtype="bf16")
    full = train(ppo, tmp_path / "fp32", **flags, dtype="fp32")
    assert half[1]["score"] == pytest.approx(full[1]["score"], abs=0.5)
    assert abs(half[1]["kl"]) < 0.2 and half[1]["engine_gap_mean"] < 0.05
    start = first_mlp(chain["sft"][0], 1)
    moved_half = (first_mlp(tmp_path / "bf16", 1) - start).norm()
    moved_full = (first_mlp(tmp_path / "fp32", 1) - start).norm()
    assert 0.2 < moved_half / moved_full < 5, (
        "updates below the last bit of bfloat16 add up in the float32 weights")


@pytest.fixture(scope="module")
def ragged_pairs(tmp_path_factory):
    """Pairs so ragged that the reward model takes four forwards per micro batch."""
    rows = []
    for i in range(80):
        rows.append({
            "prompt": f"{i} " + "x" * (i * i % 150),
            "chosen": "a" * (i % 40),
            "rejected": "b" * (1 + i * 7 % 60),
        })
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.mark.parametrize(
    "zero, micro_batch", some(few=[(2, 3), (3, 3)], all_of_them=[(2, 0), (2, 3), (3, 0), (3, 3)]))
def test_checkpointing_and_several_forwards_per_backward_give_the_gradients_of_plain_training(
        zero, micro_batch, chain, toy_file, ragged_pairs, tok, tmp_path):
    flags = dict(data=ragged_pairs, epochs=0.5, held_out=0.2, batch_size=8, model=chain["sft"][0])
    rows, _ = data.load(ragged_pairs, "reward", "", 0.2, TEMPLATE, tok, 512)
    lengths = rows.lengths("chosen", "rejected")
    assert reward.forwards_per_micro_batch(lengths, 0) == 4
    assert reward.forwards_per_micro_batch(lengths, 3) == 1
    plain = train(reward, tmp_path / "plain", **flags)
    options = dict(zero=zero, micro_batch=micro_batch, gradient_checkpointing=True)
    other = train(reward, tmp_path / "other", **flags, **options)
    for key in ("loss", "grad_norm"):
        got = [row[key] for row in other]
        want = [row[key] for row in plain]
        np.testing.assert_allclose(got, want, rtol=5e-3, err_msg=key)

    # PPO with the mixture takes two forwards per backward.
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file)
    flags.update(iterations=1, ptx_data=toy_file, micro_batch=micro_batch)
    if zero == 3:
        with pytest.raises(UserError, match="--ptx-data needs two forwards"):
            ppo.Config(**flags, zero=3, gradient_checkpointing=True)
    plain = train(ppo, tmp_path / "p", **flags)
    other = train(ppo, tmp_path / "o", **flags, zero=zero, gradient_checkpointing=zero == 2)
    for key in ("actor_loss", "actor_grad_norm", "approx_kl"):
        assert other[1][key] == pytest.approx(plain[1][key], rel=5e-3, abs=1e-5), key


# -----------------------------------------------------------------------------
# scripts: going on after an end, and failing together


def in_two_parts(script, out, after, flags):
    """Runs a script that dies right after the checkpoint of step `after`, then again with --resume;
    returns its metrics."""
    real_save = training.Checkpoint.save
    real_restore = training.Checkpoint.restore
    began = []

    def restore(self):
        step, state = real_restore(self)
        began.append(step)
        return step, state

    def save(self, step, **state):
        real_save(self, step, **state)
        if step == after:
            raise Killed

    training.Checkpoint.restore = restore
    training.Checkpoint.save = save
    try:
        train(script, out, **flags)
    except Killed:
        training.Checkpoint.save = real_save
        assert not (Path(out) / "model.safetensors").exists()
        metrics = train(script, out, **flags, resume=True)
    finally:
        training.Checkpoint.restore = real_restore
        training.Checkpoint.save = real_save
    assert began == [0, after], "it went on, and did not begin again"
    return metrics


TIMES = ("_s", "seconds", "memory_gib", "floor_share", "gather", "generate")


def without_times(rows):
    """Metrics without what differs between two equal runs."""
    kept = []
    for row in rows:
        kept.append({k: v for k, v in row.items() if not k.endswith(TIMES) and "per_s" not in k})
    return kept


def _resumed_equals_whole(toy_file, out, stages, sft_folder, reward_folder):
    """For each script and stage: whether 4 steps give the files and the numbers of 2 steps, an end,
    and 2 more steps."""
    same = {}
    for zero in stages:
        flags = dict(STEPS, data=toy_file, zero=zero, micro_batch=4)
        ppo_flags = dict(PPO_STEPS, iterations=4, reward=reward_folder, ptx_data=toy_file)
        if zero == 2:
            ppo_flags["lora"] = "4"
        runs = {
            "sft": (sft, {**flags, "epochs": 0.19}),
            "reward": (reward, {**flags, "epochs": 0.19, "model": sft_folder}),
            "ppo": (ppo, {**flags, **ppo_flags, "model": sft_folder}),
        }
        for name, (script, flags_of_script) in runs.items():
            a = Path(out) / f"{name}-{zero}-whole"
            b = Path(out) / f"{name}-{zero}-parts"
            whole = train(script, a, **flags_of_script)
            parts = in_two_parts(script, b, 2, flags_of_script)
            assert len(whole) >= 4
            files = ["model.safetensors"]
            if name == "ppo":
                files += ["samples.jsonl", "tokens.jsonl", "ema/model.safetensors"]
            dist.barrier()
            same_files = [(a / file).read_bytes() == (b / file).read_bytes() for file in files]
            same[name, zero] = all(same_files) and without_times(whole) == without_times(parts)
            assert not (b / "checkpoint").exists()
            assert json.loads((b / "run.json").read_text())["finished"]
    return same


@pytest.mark.parametrize("world", [1, 2])
def test_four_steps_are_two_steps_an_end_and_two_more_bit_for_bit(
        world, chain, toy_file, tmp_path, scripts_on_two_ranks):
    if world == 1:
        stages = some(few=(3,), all_of_them=(0, 1, 2, 3))
        same = _resumed_equals_whole(
            toy_file, tmp_path, stages, chain["sft"][0], chain["reward"][0])
    else:
        stages = TWO_RANK_STAGES["resumed"]
        _, (same, _) = scripts_on_two_ranks["resumed"]
    assert len(same) == 3 * len(stages) and all(same.values()), same


def _die_after(out, flags, step=3):
    """SFT that dies right after the checkpoint of this step."""
    last = step
    real_save = training.Checkpoint.save

    def save(self, step, **state):
        real_save(self, step, **state)
        if step == last:
            raise Killed

    training.Checkpoint.save = save
    try:
        train(sft, out, **flags)
    except Killed:
        return True
    finally:
        training.Checkpoint.save = real_save


def test_resuming_says_what_it_cannot_do(toy_file, tmp_path, capsys, monkeypatch,
                                         scripts_on_two_ranks):
    flags = dict(STEPS, data=toy_file, epochs=0.3, zero=1)
    done = train(sft, tmp_path / "a", **flags)
    with pytest.raises(SystemExit) as end:
        sft.main(sft.Config(out=str(tmp_path / "a"), resume=True, **flags))
    assert end.value.code == 0
    assert "is finished: nothing is left to do" in capsys.readouterr().out
    message = "--batch-size was 8, and now it is 4; a run goes on as it began"
    with pytest.raises(UserError, match=message):
        sft.main(sft.Config(out=str(tmp_path / "a"), resume=True, **{**flags, "batch_size": 4}))
    new = train(sft, tmp_path / "new", **flags, resume=True)
    losses = [row["loss"] for row in done]
    assert [row["loss"] for row in new] == losses, "where there is nothing yet it begins"

    out, (died, _) = scripts_on_two_ranks["died"]
    assert died == [True, True]
    resumed = train(sft, out / "died-0", **{**flags, "zero": 0}, resume=True)
    np.testing.assert_allclose(
        [row["loss"] for row in resumed], losses, rtol=1e-4,
        err_msg="ZeRO 0 keeps everything on every rank: one rank can go on where two were")

    out = out / "died-1"
    message = "holds a run that did not end, up to step 3: go on with --resume"
    with pytest.raises(UserError, match=message):
        sft.main(sft.Config(out=str(out), **flags))
    message = "was written by 2 ranks, and now there are 1.*zero_to_fp32.py"
    with pytest.raises(UserError, match=message) as caught:
        sft.main(sft.Config(out=str(out), resume=True, **flags))
    arguments = shlex.split(re.search("`python (.*)`", str(caught.value))[1])
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(arguments[0], run_name="__main__")
    assert list((out / "checkpoint/3/weights").glob("*")), "the command that it names works"


def _poisoned(toy_file, out, sft_folder, reward_folder, zero):
    """PPO in which the critic loss of the last rank is not a number at the second step of three.
    Returns, for each step, whether any weight of actor and of critic moved on this rank."""
    real_step = training.step
    real_loss = ppo.critic_loss
    calls = []
    moved = []
    is_last_rank = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", 1)) - 1)

    def sums(engine):
        return [float(p.detach().double().sum()) for p in training.fp32_params(engine)]

    def loss(*args):
        calls.append(args)
        if len(calls) == 2 and is_last_rank:
            return real_loss(*args) * math.nan
        return real_loss(*args)

    def step(*engines):
        before = [sums(engine) for engine in engines]
        norms = real_step(*engines)
        moved.append([sums(engine) != old for engine, old in zip(engines, before)])
        return norms

    training.step = step
    ppo.critic_loss = loss
    flags = dict(PPO_STEPS, iterations=3, minibatches=1, ppo_epochs=1, zero=zero)
    try:
        metrics = train(
            ppo, out, model=sft_folder, reward=reward_folder, data=toy_file, **flags)
    finally:
        training.step = real_step
        ppo.critic_loss = real_loss
    skipped = [row["skipped"] for row in metrics[1:]]
    has_norm = ["actor_grad_norm" in row for row in metrics[1:]]
    return moved, skipped, has_norm


@pytest.mark.parametrize(
    "world, zero", some(few=[(1, 2), (2, 3)], all_of_them=[(1, 0), (1, 2), (2, 0), (2, 3)]))
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_of_actor_and_critic_on_all(
        world, zero, chain, toy_file, tmp_path, scripts_on_two_ranks):
    if world == 1:
        args = (toy_file, str(tmp_path / "p"), chain["sft"][0], chain["reward"][0], zero)
        results = [_poisoned(*args)]
    else:
        _, results = scripts_on_two_ranks["poisoned"]
        results = [result[zero] for result in results]
    for moved, skipped, has_norm in results:
        assert moved == [[True, True], [False, False], [True, True]], moved
        assert skipped == [0, 1, 1] and has_norm == [True, False, True]


# What the tests above run on two ranks, in one pair of processes: to start one takes longer than
# most of it.

TWO_RANK_STAGES = {
    "steps": some(few=(3,), all_of_them=(0, 1, 2, 3)),
    "resumed": some(few=(2,), all_of_them=(0, 1, 2, 3)),
    "poisoned": some(few=(3,), all_of_them=(0, 3)),
}


def _scripts_on_two_ranks(toy_file, rankings_file, out, sft_folder, reward_folder):
    flags = dict(model=sft_folder, reward=reward_folder, data=toy_file)
    short = dict(STEPS, data=toy_file, epochs=0.3)
    folders = (sft_folder, reward_folder)
    poisoned = {}
    for zero in TWO_RANK_STAGES["poisoned"]:
        poisoned[zero] = _poisoned(toy_file, f"{out}/poisoned-{zero}", *folders, zero)
    return {
        "steps": _steps_on_ranks(
            toy_file, rankings_file, f"{out}/steps", TWO_RANK_STAGES["steps"], 2),
        "combinations": _combinations(flags, f"{out}/combinations", COMBINATIONS[2]),
        "resumed": _resumed_equals_whole(
            toy_file, f"{out}/resumed", TWO_RANK_STAGES["resumed"], *folders),
        "poisoned": poisoned,
        "died": [_die_after(f"{out}/died-{zero}", {**short, "zero": zero}) for zero in (0, 1)],
    }


@pytest.fixture(scope="module")
def scripts_on_two_ranks(chain, toy_file, rankings_file, tmp_path_factory):
    """{name: (folder, [result on rank 0, result on rank 1])}"""
    out = tmp_path_factory.mktemp("scripts-on-two-ranks")
    args = (toy_file, rankings_file, str(out), chain["sft"][0], chain["reward"][0])
    first, second = ranks(2, _scripts_on_two_ranks, *args, timeout=some(900, 3600))
    return {name: (out, [first[name], second[name]]) for name in first}


def test_a_run_whose_gradients_stay_bad_stops_with_advice(chain, toy_file, tmp_path, monkeypatch):
    def infinite(logprobs, *args):
        return logprobs.sum() * math.inf

    monkeypatch.setattr(ppo, "actor_loss", infinite)
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file)
    flags.update(iterations=9, minibatches=1, ppo_epochs=1)
    with pytest.raises(UserError, match="last 5 steps .* not finite.*lower learning rate"):
        train(ppo, tmp_path / "p", **flags)


def test_a_run_that_goes_wrong_in_its_last_steps_is_not_called_finished(toy_file, tmp_path):
    message = "the last 2 steps of this run had a loss .* take a lower learning rate, and start"
    with pytest.raises(UserError, match=message):
        train(sft, tmp_path, data=toy_file, **STEPS, epochs=0.15, lr=1e9)
    assert "finished" not in models.read_run_json(tmp_path)


# -----------------------------------------------------------------------------
# scripts: signals and kills, in processes of their own


def user_environment():
    """The environment without what a launcher of ranks has put there."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in launcher}


AS_IN_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(*arguments):
    """Starts a Python process as a user would, with Ctrl-C as it is in a terminal.

    NOTE: not with preexec_fn. That copies the page tables of this large process, which a machine
    with little memory refuses.
    """
    return subprocess.Popen(
        [sys.executable, "-c", AS_IN_A_TERMINAL, *map(str, arguments)], cwd=HERE,
        env=user_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def rows_logged(out):
    path = Path(out) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_rows(process, out, n):
    """Waits until a run has logged so many rows, or has ended."""
    while rows_logged(out) < n and process.poll() is None:
        time.sleep(0.02)


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


def as_arguments(flags):
    """{"held_out": 0.2} as --held-out 0.2."""
    arguments = []
    for name, value in flags.items():
        arguments += ["--" + name.replace("_", "-"), value]
    return arguments


@pytest.mark.parametrize(
    "world, number",
    some(few=[(1, signal.SIGINT)], all_of_them=[(1, signal.SIGINT), (2, signal.SIGTERM)]))
def test_a_script_that_gets_a_signal_goes_on_later_as_if_nothing_had_happened(
        world, number, chain, toy_file, tmp_path):
    flags = dict(STEPS, data=toy_file, epochs=3.0, model=chain["sft"][0])
    launcher = []
    if world == 2:
        launcher = [*TORCHRUN, free_port()]
    out = tmp_path / "out"
    process = start(*launcher, "sft.py", *as_arguments(flags), "--out", out)
    wait_for_rows(process, out, 8)
    process.send_signal(number)
    said = process.communicate(timeout=100)[0]
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    found = re.search(rf"{name}: stopped after step (\d+) of (\d+)\. The checkpoint is", said)
    assert found and process.returncode != 0, said
    step, total = int(found[1]), int(found[2])
    assert 8 <= step < total and rows_logged(out) == step
    if world == 1:
        assert process.returncode == 128 + number and "Traceback" not in said, said
        resumed = train(sft, out, **flags, resume=True)
        whole = train(sft, tmp_path / "whole", **flags)
        assert without_times(resumed) == without_times(whole)
        weights = (tmp_path / "whole/model.safetensors").read_bytes()
        assert (out / "model.safetensors").read_bytes() == weights
    else:
        arguments = [*as_arguments(flags), "--out", out, "--resume"]
        code, said = command(*launcher, "sft.py", *arguments)
        assert code == 0 and f"goes on after step {step} of {total}" in said, said


def same_ends(name, whole, parts):
    """Whether two runs of a script have the same end: weights, answers, and numbers but for
    times."""
    files = ["model.safetensors"]
    if name == "ppo":
        files += ["ema/model.safetensors", "samples.jsonl", "tokens.jsonl"]
    numbers = []
    for out in (whole, parts):
        rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
        numbers.append(without_times(rows))
    same_files = [(whole / f).read_bytes() == (parts / f).read_bytes() for f in files]
    return all(same_files) and numbers[0] == numbers[1]


def script_runs(chain, toy_file):
    """{name of a script: flags of a run that is long enough to be disturbed}"""
    model = chain["sft"][0]
    common = dict(STEPS, data=toy_file)
    ppo_flags = dict(iterations=15, minibatches=2, max_new_tokens=8, reward=chain["reward"][0])
    return {
        "sft": {**common, "epochs": 3.0},
        "reward": {**common, "epochs": 2.0, "model": model},
        "ppo": {**common, "model": model, **ppo_flags},
    }


@pytest.mark.parametrize("name", some(few=["ppo"], all_of_them=["sft", "reward", "ppo"]))
def test_a_script_that_is_killed_at_a_random_moment_ends_as_one_that_is_not(
        name, chain, toy_file, tmp_path):
    flags = script_runs(chain, toy_file)[name]
    script = {"sft": sft, "reward": reward, "ppo": ppo}[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    total = train(script, whole, **flags)[-1]["step"]
    rng = random.Random(name)
    process = start(f"{name}.py", *as_arguments(flags), "--out", parts)
    wait_for_rows(process, parts, rng.randint(1, total // 2))
    time.sleep(rng.uniform(0, 0.2))
    process.kill()
    said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, said
    train(script, parts, **flags, resume=True)
    assert same_ends(name, whole, parts)


def test_two_launchers_as_on_two_machines_take_the_steps_of_one_process(toy_file, tmp_path):
    readme = (HERE / "README.md").read_text().replace("\\\n", "")
    (launch,) = re.findall(r"^torchrun --nnodes 2 (.*)ppo\.py --zero 3$", readme, re.MULTILINE)
    launch = launch.replace("first-machine:29500", f"127.0.0.1:{free_port()}")
    launch = launch.replace("--nproc_per_node 8", "--nproc_per_node 1")
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", *shlex.split(launch)]
    launch += ["--local_addr", "127.0.0.1"]  # a machine's own name may not be known
    flags = dict(STEPS, data=toy_file, epochs=0.15, zero=3)
    arguments = [*as_arguments(flags), "--out", tmp_path / "two"]
    machines = [start(*launch, "sft.py", *arguments) for _ in range(2)]
    said = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sorted("saved" in text for text in said) == [False, True], "rank 0 speaks"
    assert models.read_run_json(tmp_path / "two")["world"] == 2
    one = train(sft, tmp_path / "one", **flags)
    two = [json.loads(line) for line in open(tmp_path / "two/metrics.jsonl")]
    for name in ("loss", "grad_norm"):
        got = [row[name] for row in two]
        want = [row[name] for row in one]
        np.testing.assert_allclose(got, want, rtol=2e-3, err_msg=name)
    lm = [models.load_lm(str(tmp_path / out), torch.float32) for out in ("one", "two")]
    for p, q in zip(*(x.parameters() for x in lm)):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2e-3)


# -----------------------------------------------------------------------------
# many faults, by hand:  FLATRLHF_FAULTS=60 pytest -s -k many_faults test_training.py


def strike(process, fault, rng):
    """Does this to a launcher's processes: kills one rank; sends SIGTERM to the launcher, as a
    scheduler does; or lets no file of the ranks grow any more, as on a full disk."""
    workers = psutil.Process(process.pid).children(recursive=True)
    workers = [w for w in workers if "torch.distributed.run" not in w.cmdline()]
    if fault == "kill -9":
        rng.choice(workers).kill()
    elif fault == "SIGTERM":
        process.terminate()
    else:
        for worker in workers:
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (rng.choice(ROOMS),) * 2)


def run_with_faults(name, flags, folder, faults, seed):
    """Runs a script on two ranks whole; then again with these faults at random moments, each time
    resumed. Whenever a run comes to its end, it is compared with the whole one and another begins.

    Returns what each fault did, and whether all ends are the same."""
    rng = random.Random(seed)
    whole, parts = folder / "whole", folder / "parts"
    arguments = as_arguments(flags)

    def launch(out):
        launcher = [*TORCHRUN, free_port()]
        return start(*launcher, f"{name}.py", *arguments, "--out", out, "--resume")

    process = launch(whole)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    total = rows_logged(whole)
    struck, ends = [], []
    faults = list(faults)
    while faults or parts.exists():
        process = launch(parts)
        fault = None
        if faults:
            wait_for_rows(process, parts, rows_logged(parts) + rng.randint(1, total // 3))
            time.sleep(rng.uniform(0, 0.5))
            if process.poll() is None:
                fault = faults.pop()
                strike(process, fault, rng)
        said = process.communicate(timeout=300)[0]
        if fault:
            struck.append({
                "fault": fault,
                "rows": rows_logged(parts),
                "exit_code": process.returncode,
                "said": first_sentence(said),
            })
        if process.returncode == 0:
            ends.append(same_ends(name, whole, parts))
            shutil.rmtree(parts)
        else:
            assert fault and f"{name}.py\", line" not in said, said  # no traceback of ours
        print(name, flags["zero"], struck[-1:], ends, flush=True)
    return {
        "script": name, "edition": 2, "zero": flags["zero"], "steps": total, "faults": struck,
        "same": ends}


def first_sentence(said):
    """What a run said about its end, without the launcher's many lines."""
    for line in said.splitlines():
        if line.startswith("error: ") or ": stopped after step" in line:
            return line
    return ""


@pytest.mark.skipif("FLATRLHF_FAULTS" not in os.environ, reason="takes half an hour")
def test_many_faults_at_random_moments_leave_nothing_behind(chain, toy_file, tmp_path):
    count = int(os.environ["FLATRLHF_FAULTS"])
    results = []
    jobs = list(itertools.product(script_runs(chain, toy_file).items(), (0, 2)))
    for i, ((name, flags), zero) in enumerate(jobs):
        share = count // len(jobs) + (i < count % len(jobs))
        faults = (["kill -9", "SIGTERM", "full disk"] * count)[i : i + share]
        folder = tmp_path / f"{name}-{zero}"
        results.append(run_with_faults(name, {**flags, "zero": zero}, folder, faults, seed=i))
        if out := os.environ.get("FLATRLHF_FAULTS_OUT"):
            Path(out).write_text(json.dumps(results, indent=1))
    assert sum(len(result["faults"]) for result in results) == count
    for result in results:
        assert result["same"] and all(result["same"]), result
        for fault in result["faults"]:
            was_done = fault["rows"] == result["steps"]  # and had only to exit
            died = fault["exit_code"] != 0 and fault["fault"] != "kill -9" and not was_done
            assert fault["said"] or not died, f"an end without a sentence: {fault}"
