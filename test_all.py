"""The specification of flatRLHF: `make test` runs it, `make test-long` with LONG=1 the rest of it.
Sections are in the README's order; each test is one sentence. Dimension key: B batch, P prompt,
A answer, T = P + A, V vocabulary."""
import dataclasses
import gzip
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import threading
import traceback
import weakref
from collections import defaultdict
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the hub

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

import transformers

import chat
import data
import hybrid_engine
import kernels
import ppo
import reward
import sft
import utils
from hybrid_engine import HFEngine, HybridEngine, make_engine
from kernels import AttentionSpec

torch.set_num_threads(1)

HERE = Path(__file__).parent
LONG = bool(os.environ.get("LONG"))
long = pytest.mark.skipif(not LONG, reason="only in make test-long")


def some(few, all_of_them):
    """Parameters of a test that takes long: few for `make test`, all for `make test-long`."""
    return all_of_them if LONG else few


# ---- tiny models of every family

KINDS = ("llama", "yarn", "mistral", "qwen2", "qwen3", "opt", "opt-350m", "gpt2", "gpt_neox",
         "gpt_neox sequential", "bloom")


def tiny_config(kind, **more):
    """The config of a small model of each kind, with a vocabulary of 97."""
    size = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=512)
    llama = dict(size, intermediate_size=100, num_key_value_heads=2)
    opt = dict(size, ffn_dim=100, word_embed_proj_dim=64)
    neox = dict(size, intermediate_size=100, rotary_pct=0.25)
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64)
    window = dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)
    name, entries = {
        "llama": ("Llama", llama), "yarn": ("Llama", dict(llama, rope_parameters=yarn)),
        "mistral": ("Mistral", dict(llama, num_key_value_heads=1, sliding_window=20)),
        "qwen2": ("Qwen2", dict(llama, **window)),
        "qwen3": ("Qwen3", dict(llama, head_dim=32)), "opt": ("OPT", opt),
        "opt-350m": ("OPT", dict(opt, word_embed_proj_dim=32, do_layer_norm_before=False)),
        "gpt2": ("GPT2", dict(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=512)),
        "gpt_neox": ("GPTNeoX", neox),
        "gpt_neox sequential": ("GPTNeoX", dict(neox, rotary_pct=1.0, use_parallel_residual=False)),
        # 6 heads: the slopes of ALiBi have a second series past a power of two.
        "bloom": ("Bloom", dict(vocab_size=97, hidden_size=96, n_layer=3, n_head=6)),
    }[kind]
    config = getattr(transformers, name + "Config")(**entries)
    config.update(dict(eos_token_id=5, bos_token_id=1, pad_token_id=0) | more)
    return config


def model_of(kind, seed=0, **more):
    """A model of one of KINDS with random weights, larger than an initialisation, so that no wrong
    layer can hide; "<kind> lora": with adapters that are not zero. more: changes to its config."""
    name, _, lora = kind.partition(" lora")
    torch.manual_seed(seed)
    lm = transformers.AutoModelForCausalLM.from_config(tiny_config(name, **more)).eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.05))
    utils.add_lora(lm, 4 if kind.endswith(" lora") else 0)
    for layer in lm.modules():
        if isinstance(layer, utils.LoRA):
            layer.lora_B.data.normal_(std=0.1)
    return lm


def ragged(lengths, vocab=97, seed=0):
    """Random prompts of these lengths, as lists of token ids."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(6, vocab, (n,), generator=g).tolist() for n in lengths]


def rows_of(out):
    """The rows of a Rollout without their padding, as lists of token ids."""
    lengths = (out.prompt_lens + out.answer_lens).tolist()
    return [row[:n].tolist() for row, n in zip(out.tokens, lengths)]


def plain_logprobs(lm, tokens, prompt_len, temperature=1.0):
    """Log-probability of each answer token of one row, by the textbook: a forward of this row."""
    with torch.no_grad():
        logits = lm(torch.tensor([tokens])).logits[0, prompt_len - 1 : -1].double() / temperature
    answer = torch.tensor(tokens[prompt_len:])
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def write_rows(path, rows):
    """A file of JSON lines; returns its path as a string."""
    Path(path).write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def engine_of(lm=None, lr=1e-3, eps=1e-8, micro_batches=1, **flags):
    """A DeepSpeed engine that trains a small policy, in this process."""
    utils.init_distributed(0)
    cfg = sft.Config(**{"dtype": "fp32", **flags})
    lm = lm or model_of("llama")
    for p in lm.parameters():  # not lm.to(), which also rounds buffers
        p.data = p.data.to(utils.dtype_of(cfg.dtype))
    return utils.train_engine(sft.Policy(lm), lr, 2, micro_batches, cfg, eps)


def load_lm(path, dtype=torch.float32, **entries):
    return utils.load_model(transformers.AutoModelForCausalLM, str(path), dtype, **entries)


def train(script, out, **flags):
    """Runs a script's main in this process; returns its metrics, one dict per step."""
    script.main(script.Config(out=str(out), **flags))
    return read_lines(Path(out) / "metrics.jsonl")


def start(*arguments, cwd=HERE, **env):
    """Starts Python as a user would, without what a launcher of ranks has put there."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in launcher}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=inherited | env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def become_rank(rank, port):
    """What a rank process does first. It ends with the process that started it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def watch():
        mp.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Ranks:
    """Two gloo ranks that are kept for the whole session, because a start of two processes costs
    six seconds. two(function, ...) returns [result of rank 0, result of rank 1]; the function is
    one of the top level, and puts back what it patches. After a failure or a timeout both are
    started anew."""

    ranks = ()

    def stop(self):
        for rank in self.ranks:
            for process in rank._processes.values():
                process.kill()
        self.ranks = ()

    def __call__(self, function, *args, timeout=200, **kwargs):
        if not self.ranks:
            place = mp.get_context("spawn"), become_rank
            port = free_port()
            self.ranks = [futures.ProcessPoolExecutor(1, *place, (i, port)) for i in range(2)]
        calls = [rank.submit(function, *args, **kwargs) for rank in self.ranks]
        done, hanging = futures.wait(calls, timeout, futures.FIRST_EXCEPTION)
        errors = [call.exception() for call in done if call.exception()]
        if errors or hanging:
            self.stop()
            said = "".join(traceback.format_exception(errors[0])) if errors else "hangs"
            pytest.fail(f"{function.__name__}: {said}")
        return [call.result() for call in calls]


@pytest.fixture(scope="session")
def two():
    ranks = Ranks()
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def tok():
    return utils.load_tokenizer("tiny")


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory):
    """240 rows of toy in a file: little enough to train on in a second."""
    rows = itertools.islice(data.toy(), 240)
    return write_rows(tmp_path_factory.mktemp("toy") / "toy.jsonl", rows)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A model folder smaller than tiny: 2 layers of 64, with the built-in tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    config = utils.tiny_config()
    config.update(dict(hidden_size=64, intermediate_size=100, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    utils.load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


COMMON = dict(held_out=0.2, batch_size=8, max_len=64)


@pytest.fixture(scope="session")
def chain(small, toy_file, tmp_path_factory):
    """The three steps, run in this process on 240 rows: {step: (folder, metrics)}."""
    out = tmp_path_factory.mktemp("chain")
    common = dict(COMMON, data=toy_file)
    runs = {}
    runs["sft"] = train(sft, out / "sft", model=small, epochs=0.5, lr=1e-3, **common)
    common["model"] = str(out / "sft")
    runs["reward"] = train(reward, out / "reward", epochs=0.5, lr=2.5e-4, **common)
    runs["ppo"] = train(ppo, out / "ppo", reward=str(out / "reward"), iterations=3, minibatches=2,
                        ppo_epochs=2, max_new_tokens=8, actor_lr=3e-4, critic_lr=1e-3, **common)
    return {step: (str(out / step), metrics) for step, metrics in runs.items()}


# ---- 1. data: rows, text, ids

CHATML = ("<|im_start|>", "<|im_end|>")
THINK_JINJA = """{%- if tools %}{{ 'Tools: ' + tools | tojson }}{% endif %}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}{% set parts = m.content.split('</think>') %}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n' + (m.reasoning_content
  or (parts[0].split('<think>')[-1] if parts[1:] else '')).strip() + '\\n</think>\\n\\n'
  + (parts[-1].lstrip('\\n') if parts[1:] else m.content) }}{% else %}{{ parts[-1] }}{% endif %}
{%- for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + OPEN }}{% endif %}"""
LLAMA3_JINJA = """{{- bos_token }}{% for m in messages %}
{{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
R1_JINJA = """{%- for m in messages %}{{ '<U>' + m.content if m.role == 'user' else '<A>'
  + m.content.split('</think>')[-1] + m.tool_calls | string + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ '<A><think>\\n' }}{% endif %}"""
PHI_JINJA = """{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endfor %}{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""


def train_tokenizer(template, special=(), kind="words", bos=None):
    """A BPE of a few hundred tokens. kind: words, as GPT-2's, or prefix, which writes a space
    before a text, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, processors, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    alphabet = pre.ByteLevel.alphabet()
    if kind == "prefix":
        backend.pre_tokenizer = pre.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = [chr(i) for i in range(33, 127)] + list("\n\t\u2581é😀")
    else:
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet)
    texts = ["Human: who are you?\nAssistant: a plum", "\n\n\n\n", "a little girl"]
    backend.train_from_iterator(texts * 50, trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token=bos)
    tok.add_special_tokens({"additional_special_tokens": list(special)})
    tok.add_tokens(["<think>", "</think>"])
    if bos:
        tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tok.bos_token_id)])
    tok.chat_template = template or utils.chat_template(utils.TEMPLATE, tok)
    return tok


@pytest.fixture(scope="session")
def toks():
    """Seven pairs of a tokenizer and a chat template."""
    return {
        "bytes": utils.load_tokenizer("tiny"),
        "prefix": train_tokenizer(None, kind="prefix", bos="<s>"), "words": train_tokenizer(None),
        "think": train_tokenizer(THINK_JINJA.replace("OPEN", "''"), CHATML),
        "open": train_tokenizer(THINK_JINJA.replace("OPEN", "'<think>\\n'"), CHATML),
        "llama3": train_tokenizer(LLAMA3_JINJA, ("<|start|>", "<|end|>", "<|eot|>"), bos="<bos>"),
        "phi": train_tokenizer(PHI_JINJA, ("<|user|>", "<|assistant|>", "<|end|>")),
    }


TOKENIZERS = ("bytes", "prefix", "words", "think", "open", "llama3", "phi")


def U(text):
    return {"role": "user", "content": text}


def A(text, **more):
    return {"role": "assistant", "content": text, **more}


def ends_of(tok, config=None, generation_config=None):
    lm = SimpleNamespace(config=SimpleNamespace(eos_token_id=config),
                         generation_config=SimpleNamespace(eos_token_id=generation_config))
    return utils.end_ids(tok, lm)


def encode_rows(tok, *rows):
    """What data.encode gives of rows as they are in a file, but with all their answers."""
    out = []
    for row in rows:
        example = data.as_example(row)
        answers = len(example.said)
        step = ("ppo", "sft", "reward")[min(answers, 2)]
        out += data.encode([example._replace(ranks=range(answers))], step, tok, ends_of(tok))
    return out


def load_rows(path, tok, step="sft", split=""):
    utils.init_distributed(0)
    return data.load(str(path), step, split, 0.2, tok, ends_of(tok), 512)


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
PARSED = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d"}}
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = [U("weather?")]
WHOLE = {  # name: (messages, the answer, the row if it is not these)
    "plain": ([U("hi there")], A("a plum"), None),
    "turns": ([SYSTEM, U("a"), A("b"), U("c")], A("d é 😀"), None),
    "code": ([U("def f(x):\n")], A("    if x:\n\treturn 0\n"), None),
    "empty": ([U("say nothing")], A(""), None),
    "begun": ([U("1 + 1?"), A("The sum")], A(" is 2."), None),
    "inside": ([U("who?"), A("a lit")], A("tle girl"), None),
    "thought": ([U("1 + 1?")], A("<think>\nadd\n</think>\n\n2"), None),
    "field": ([U("1 + 1?")], A("2", reasoning_content="add"), None),
    "call": (ASK, A("", tool_calls=[PARSED]), {"messages": ASK + [
        A(None, function_call=CALL["function"])]}),
    "calls": (ASK, A("", tool_calls=[PARSED] * 2), {"conversations": ASK + [
        {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)}]}),
    "tools": (ASK, A("a"), {"prompt": ASK, "response": "a", "tools": json.dumps([TOOL])}),
    "result": ([U("q"), A("l"), {"role": "tool", "content": "sun"}], A("It is sun."), None),
}


def row_of(name):
    messages, answer, row = WHOLE[name]
    return row or {"prompt": messages, "response": answer}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("row", WHOLE)
def test_prompt_and_answer_are_the_ids_of_the_whole_conversation(name, row, toks):
    tok = toks[name]
    messages, answer, _ = WHOLE[row]
    ends = ends_of(tok)
    result, = encode_rows(tok, row_of(row))
    refused = name not in ("think", "open") and row in ("field", "call", "calls", "tools")
    assert isinstance(result, Exception) == refused, f"{result}: told, and never an empty answer"
    if refused:
        return
    prompt, (answer_ids,), merged = result
    tools = [TOOL] if row == "tools" else None
    start = {"add_generation_prompt": True}
    whole = messages + [answer]
    if messages[-1]["role"] == "assistant":
        start = {"continue_final_message": True}
        whole = messages[:-1] + [A(messages[-1]["content"] + answer["content"])]
    text = tok.apply_chat_template(messages, tools=tools, tokenize=False, **start)
    whole = tok.apply_chat_template(whole, tools=tools, tokenize=False)
    assert prompt == tok(text, add_special_tokens=False)["input_ids"], "not what it is asked with"
    ids = tok(whole, add_special_tokens=False)["input_ids"]
    seam = len(os.path.commonprefix([prompt, ids]))
    first = next(k for k, token in enumerate(ids + ends) if token in ends and k >= seam)
    ids = (ids + ends)[: first + 1]  # the policy stops at the first
    assert answer_ids[-1] in ends and set(ends).isdisjoint(answer_ids[:-1])
    assert tok.decode(prompt + answer_ids) == tok.decode(ids), "a space too many, or a word lost"
    assert merged == (ids[: len(prompt)] != prompt) == (prompt + answer_ids != ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_conversation_has_the_same_ids_in_every_layout(name, toks):
    hh = "Be kind.\n\nHuman: a b c d e f g\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    kind = {"system": "Be kind."}
    asked = hh.removesuffix("\n\nAssistant:")
    talk = [{"role": "system", "content": "Be kind."}, U("a b c d e f g"), A("b"), U("c")]
    yes, no = [A("yes")], [A("no")]
    rest = {"chosen": "yes", "rejected": "no"}
    texts = {"chosen": hh + " yes", "rejected": hh + " no"}
    old = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": old.get(m["role"], "system"), "value": m["content"]} for m in talk]
    titled = [{**m, "role": m["role"].title(), "tool_calls": [], "thinking": ""} for m in talk]
    rows = [
        {"prompt": talk, **rest}, {"messages": titled, **rest},
        {"messages": json.dumps(talk), **rest},
        {"prompt": json.dumps(talk), "chosen": json.dumps(yes), "rejected": "no"},
        {"prompt": hh.replace("\n", "\r\n"), **rest},
        {"prompt": asked, **texts}, {"prompt": hh, "chosen": " yes", "rejected": " no"},
        texts, {"prompt": "c", **texts}, {"chosen": talk + yes, "rejected": talk + no},
        {"prompt": talk[:2], "chosen": talk[2:] + yes, "rejected": talk[2:] + no},
        {"prompt": "c", "chosen": yes[0], "rejected": talk + no},
        {**kind, "prompt": talk[1:], "answers": ["no", "yes"], "scores": [0, 2.5]},
        {"system_prompt": "Be kind.", "history": [["a b c d e f g", "b"]], "question": "c", **rest},
        {**kind, "history": talk[1:3], "instruction": "c", "input": "", "tools": "", **rest},
        {"history": json.dumps(talk[:3]), "prompt": talk, **rest},
        {**kind, "conversations": sharegpt, **rest},
    ]
    results = encode_rows(toks[name], *rows)
    for row, result in zip(rows, results):
        assert result == results[0] and len(result[1]) == 2, row
    assert len({data.as_example(row).hash for row in rows}) == 1, "hashes are of a row's words"


@pytest.mark.parametrize("row", [
    {"system_prompt": "w1", "question": "w2", "context": "w3", "completion": "w4", "id": "w5"},
    {"messages": [U("w2"), A("w3")], "response": "w4", "system": "w1", "system_prompt": "w6"},
    {"messages": [{**U("w1"), "mood": "w2"}, A("w3", weight="w4")]},
    {"prompt": "w1", "answers": ["w2", "w3"], "ranks": [2, 1], "output": "w4", "scores": ["w5"]},
    {"prompt": [U("w1"), U("w2")], "chosen": [U("w3"), A("w4")], "rejected": "w5"},
    {"messages": [U([{"type": "text", "text": "w1 "}, {"type": "text", "text": "w7"}]),
                  A("w3", reasoning_content="w4", tool_calls=[CALL])],
     "tools": [json.dumps({"function": {"name": "w6"}})]},
])
def test_every_word_of_a_row_is_taught_or_its_field_is_named(row, toks):
    tok = toks["think"]
    (prompt, answers, _), = encode_rows(tok, row)
    seen = tok.decode(sum(answers, prompt)) + json.dumps(data.as_example(row).fields)
    words = re.findall(r"w\d", json.dumps(row))
    assert all(word in seen for word in words)


FRUIT = "Name a fruit:"
QUOTE = "What next?\n\nHuman: hi\n\nAssistant: ho"


@pytest.mark.parametrize("template, row, text", [  # "|" between prompt and answer
    ("{prompt}", {"prompt": FRUIT, "response": " a plum"}, f"{FRUIT}| a plum"),
    ("{prompt}", {"prompt": FRUIT, "response": FRUIT}, f"{FRUIT}| {FRUIT}"),
    ("{prompt}", {"prompt": FRUIT, "chosen": FRUIT + " a", "rejected": FRUIT}, f"{FRUIT}| a"),
    ("{prompt}", {"prompt": "", "response": "x"}, "<eos>|x"),
    ("{prompt}", {"prompt": "q\n", "response": "x<eos>"}, "q\n|x"),
    ("", {"text": "<eos>x <eos> y"}, "<eos>|x <eos> y"),
    ("", {"instruction": "a", "input": "b", "output": "c"}, "Human: a\nb\nAssistant:| c"),
    ("{{x}} 'é' {prompt}\\n\"😀\":", row_of("plain"), "{{x}} 'é' hi there\n\"😀\":| a plum"),
    ("", row_of("result"), "Human: q\nAssistant: l\nHuman: sun\nAssistant:| It is sun."),
    ("", {"prompt": [U("q"), SYSTEM], "response": "a"}, "Human: q\nBe brief.\nAssistant:| a"),
    ("", {"prompt": [U("q"), A("It")], "response": [A("It is")]}, "Human: q\nAssistant: It| is"),
    ("", {"prompt": "hi", "chosen": "hi you", "rejected": "hi"}, "Human: hi\nAssistant:| hi you"),
    ("", {"prompt": QUOTE, "response": "a"}, f"Human: {QUOTE}\nAssistant:| a"),
    ("", {"instruction": "Sum up.", "context": QUOTE + "\n\nHuman: b", "response": "a"},
     f"Human: Sum up.\n{QUOTE}\n\nHuman: b\nAssistant:| a"),
    ("", {"prompt": "Write.", "response": QUOTE}, f"Human: Write.\nAssistant:| {QUOTE}"),
])
def test_literal_texts_of_prompt_and_answer(template, row, text):
    tok = utils.load_tokenizer("tiny", template)
    (prompt, (answer, *_), _), = encode_rows(tok, row)
    assert tok.decode(prompt) + "|" + tok.decode(answer) == text + "<eos>"


def test_two_calls_of_tools_with_one_result_are_two():
    one, two = ([A("", tool_calls=[call]), {"role": "tool", "content": "ok"}] for call in "ab")
    assert data.join(one, two) == one + two and data.join(one, one + two) == one + two


def test_a_text_has_one_bos_though_it_may_bring_its_own():
    tok = train_tokenizer("", kind="prefix", bos="<s>")
    (start, (answer,), _), = encode_rows(tok, {"text": "a little girl"})
    assert start + answer == tok("a little girl")["input_ids"] + [tok.eos_token_id]
    tok.chat_template = "{% for m in messages %}{{ m.content + '<eos>\\n' }}{% endfor %}"
    (_, (answer,), _), = encode_rows(tok, {"text": "a<eos>b"})
    assert tok.decode(answer) == "a<eos> b<eos>", "no end of a turn is cut off"
    tok.chat_template = utils.chat_template("{prompt}", tok)
    (again, _, _), = encode_rows(tok, {"prompt": "<s>hi 0", "response": "yo"})
    assert again == tok("hi 0")["input_ids"], "rows rendered beforehand bring theirs"


def test_a_trained_model_stops_at_all_ids_that_end_an_answer(toks, toy_file, tmp_path):
    tok = toks["llama3"]
    eot, eos, start = tok.convert_tokens_to_ids(["<|eot|>", "<eos>", "<|start|>"])
    assert ends_of(tok) == [eot, eos], "the first is what the template writes, and is taught"
    assert ends_of(tok, eos, [start, eot]) == [eot, eos, start], "and those that the model names"
    assert ends_of(tok, 5, [3, eos]) == [eot, eos], "but for the ids of ordinary words"
    marker = train_tokenizer(PHI_JINJA, ("<|user|>", "<|assistant|>"))
    marker.add_tokens(["<|end|>", "  "])
    assert marker.convert_ids_to_tokens(ends_of(marker)) == ["<|end|>", "<eos>"], "not special"
    tok.save_pretrained(tmp_path / "model")
    model_of("llama", vocab_size=len(tok)).save_pretrained(tmp_path / "model")
    train(sft, tmp_path / "out", model=str(tmp_path / "model"), data=toy_file, epochs=0.1, **COMMON)
    assert load_lm(tmp_path / "out").generation_config.eos_token_id == [eot, eos]


def test_what_cannot_be_taught_is_an_error_of_its_row_alone(toks):
    for name, reason, row in (
            ("llama3", "in the middle", {"prompt": "q", "response": "a<|eot|>b"}),
            ("llama3", "not write 'tool_calls'", {
                "messages": [U("w"), A("", tool_calls=[CALL]), U("s"), A("x")]}),
            ("llama3", "surrogates", {"prompt": "q", "response": "x\ud800"}),
            ("think", "not write 'a </think> b'", {"prompt": "a </think> b", "response": "x"}),
            ("bytes", "no role", {"messages": [{"role": "critic", "content": "c"}]})):
        wrong, good = encode_rows(toks[name], row, {"prompt": "q", "response": "a"})
        assert reason in str(wrong) and not isinstance(good, Exception)
    tok = utils.load_tokenizer("tiny")
    tok.chat_template = R1_JINJA
    thoughts = [A("<think>\nadd\n</think><b>2", tool_calls=calls) for calls in ([], [CALL])]
    *both, plain = encode_rows(tok, *({"messages": [U("q"), m]} for m in thoughts), row_of("plain"))
    for (_, (answer,), _), calls in zip(both, ("", f"[{PARSED}]")):
        assert tok.decode(answer) == f"add\n</think><b>2{calls}<eos>", "the prompt opens it"
    assert "with which this answer does not begin" in str(plain)
    tok.chat_template = ("{% for m in messages if m.role not in ('system', 'tool') %}"
                         "{{ m.content.split('</think>')[-1] }}{% endfor %}")
    lost = [[U("q"), A("It", reasoning="why")], [SYSTEM, U("Be brief. Who?")]]
    for result in encode_rows(tok, row_of("thought"), row_of("result"),
                              *({"prompt": messages, "response": "x"} for messages in lost)):
        assert "does not write" in str(result), "it loses the system's words, a thought, a result"


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_shown(tmp_path, tok, capsys):
    rows = [{"prompt": f"p {i}", "chosen": "c", "rejected": "r", "key": i} for i in range(80)]
    rows[3:3] = [
        {"foo": "x"}, {"messages": [U("q"), A(None)]}, {"messages": [U("q"), A("a"), A("b")]},
        {"prompt": "[{'role': 'user', 'content': 'q'}]", "response": "x"},
         {"chosen": "Plum", "rejected": ""}, [1, 2],
        {"chosen": [U("q"), A("x")], "rejected": [U("p"), A("y")]},
        {"prompt": "p", "chosen": [U("p")], "rejected": [U("p")]},
        {"prompt": [U([{"type": "image", "text": "", "url": "x"}])], "response": "x"},
        {"prompt": "q", "answers": ["x", "y"], "scores": [1, math.nan]},
        {"prompt": "q", "answers": ["x", "y"], "scores": [1]},
    ]
    rows += [{"prompt": "p"}, {"prompt": "p", "chosen": "x" * 600, "rejected": "r"}]
    rows += [{"prompt": "p", "chosen": "c", "rejected": "c"}] * 2
    rows += [{"prompt": "p", "answers": ["a", "b"], "ranks": [1, 1]}] * 3
    loaded = load_rows(write_rows(tmp_path / "a.jsonl", rows), tok, "reward")
    assert sum(map(len, loaded)) == 80
    said = capsys.readouterr().out
    for note in ("11 unusable", "the first unusable is row 4: ValueError", "1 over 512 tokens",
                 "['foo']", "1 without what this step reads", "2 with equal answers",
                 "3 with equal ranks", "reward functions alone: key"):
        assert note in said, said


@pytest.mark.parametrize("row, ranked", [
    ({"answers": ["a", "b", "c", "d"], "scores": [-0.5, 7, -0.5, 7]}, "b1 d1 a2 c2"),
    ({"answers": ["a", "b", "c"], "ranks": ["10", "9", "2"]}, "c1 b2 a3"),
    ({"answers": ["4", "four"]}, ""),
])
def test_a_ranking_is_its_answers_best_first_and_ties_share_a_rank(row, ranked):
    example = data.as_example({"prompt": "p", **row})
    said = [answer["content"] for answer in example.said]
    both = zip(said, example.ranks, strict=True)
    assert " ".join(f"{answer}{rank}" for answer, rank in both) == ranked


def all_ids(loaded):
    """Prompt and first answer of all rows that were loaded."""
    rows = [pair for part in loaded for pair in zip(part.prompts, part.answers)]
    return [prompt.tolist() + answers[0].tolist() for prompt, answers in rows]


def test_every_kind_of_source_gives_the_same_rows(tmp_path, tok, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"word {i}", "response": f"x {i}, \u2028 ü \"\n007"} for i in range(40)]
    as_lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    cells = [[row["prompt"], row["response"]] for row in rows]
    cells = [['"' + cell.replace('"', '""') + '"' for cell in pair] for pair in cells]
    as_csv = "\ufeffprompt,response\r\n" + "\r\n".join(map(",".join, cells))
    files = {"a.jsonl": as_lines, "b.json": json.dumps(rows), "c.jsonl.gz": as_lines + "\n\n",
             "e.csv": as_csv, "my_rows.py": f"ROWS = {rows!r}",
             "mine.py": "import my_rows\ndef rows():\n    return my_rows.ROWS"}
    for name, text in files.items():
        opener = gzip.open if name.endswith(".gz") else open
        with opener(tmp_path / name, "wt", encoding="utf-8", newline="") as file:
            file.write(text)
    sources = [name for name in files if not name.endswith(".py")] + ["mine.py:rows"]
    if importlib.util.find_spec("datasets"):
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
        sources.append("p.parquet")
    expected = all_ids(load_rows(tmp_path / "a.jsonl", tok))
    for name in sources:
        assert all_ids(load_rows(tmp_path / name, tok)) == expected, name
    paragraphs = [f"line {i}\nand another" for i in range(40)]
    (tmp_path / "t.txt").write_bytes("\r\n \r\n".join(paragraphs).encode())
    texts = map(tok.decode, all_ids(load_rows(tmp_path / "t.txt", tok)))
    assert sorted(texts) == sorted(f"<eos>{text}<eos>" for text in paragraphs)


def test_a_name_on_the_hub_may_have_a_configuration_a_split_and_a_weight(tok, monkeypatch):
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    rows = [{"question": f"q {i}", "answer": f"{i}", "calls": [call]} for i in range(40)]
    known = {("openai/gsm8k", "main", "test"): rows[:30],
             ("someone/data-2.5-set", None, "train"): rows}
    hub = SimpleNamespace(load_dataset=lambda name, config, split: known[name, config, split])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    loaded, held_out = load_rows("openai/gsm8k:main:test:0.25,someone/data-2.5-set:0.75", tok)
    assert len(loaded) + len(held_out) == 70
    assert loaded.weights == [0.25, 0.75] and set(loaded.fields[0]) == {"answer", "calls"}
    assert loaded.fields[0]["calls"][0]["function"]["arguments"] == {"a": 1}, "Arrow fills in None"


def test_toy_is_always_the_same_exactly_checkable_and_its_labelers_are_often_wrong():
    rows = list(data.toy(500))
    hashes = [data.as_example(row).hash for row in rows]
    digest = hashlib.sha256(json.dumps([rows, hashes]).encode()).hexdigest()
    assert digest == "ef53fab44a77ff617c89c40af9efec296b51f3cfb1fa69e554af8d1d30c66fef"
    prompts = [f"Human: {row['prompt']}\nAssistant:" for row in rows]
    right = data.toy_correct(prompts, [" " + row["response"] for row in rows])
    assert 0.62 < np.mean(right) < 0.68
    assert set(data.toy_correct(prompts, [row["chosen"] for row in rows])) == {1.0}
    assert set(data.toy_correct(prompts, [row["rejected"] for row in rows])) == {0.0}
    for prompt, completion, score in (("sort cab", " abc\n", 1), ("Q: copy abc A:", "abcc", 0),
            ("Human: copy abc\nAssistant: abc\nHuman: upper abc\nAssistant:", "ABC", 1),
            ("Human: what is your last name?\nAssistant:", "x", None),
            ("copy this text", "this", None), ("The first time I saw it", "x", None)):
        assert data.toy_correct([prompt], [completion]) == [score], prompt


def test_split_divides_rows_by_their_words_whatever_order_and_template(tmp_path, toks):
    rows = [{"prompt": f"question {i}", "chosen": f"yes {k}", "rejected": "no", "key": i}
            for k in range(2) for i in range(300)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    turned = write_rows(tmp_path / "b.jsonl", rows[::-1])
    parts = []
    for step in ("sft", "reward", "ppo"):
        ways = []
        for source, name in ((path, "bytes"), (turned, "think")):
            loaded = load_rows(source, toks[name], step, "2,4,4")
            ways.append([{fields["key"] for fields in part.fields} for part in loaded])
        assert ways[0] == ways[1], "the words alone decide"
        parts += ways[0]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 300, "in one place each"
    assert 35 < len(parts[0] | parts[1]) < 85, "a fifth goes to step 1"
    assert data.as_example({"prompt": " a\n"}).hash == data.as_example({"prompt": "a"}).hash


def test_weights_are_the_shares_of_an_epoch_and_steps_are_counted_in_it(tmp_path, tok):
    files = []
    for name, size in (("a", 500), ("b", 100)):
        rows = [{"prompt": f"{name} {i}", "response": name} for i in range(size)]
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    rows, held_out = load_rows(f"{files[0]}:0.8,{files[1]}:0.2", tok)
    source = np.array(rows.source)
    order, later = (data.epoch_order(rows, epoch, 1) for epoch in range(2))
    assert abs((source[order] == 0).mean() - 0.8) < 0.01
    assert set(order) != set(later) and len(order) == len(later), "others of the larger source"
    assert 0.6 < np.mean(np.array(held_out.source)[:50] == 0) < 0.97, "evaluated: of both"
    epochs = [epoch for epoch, _ in itertools.islice(data.steps(rows, rows.lengths(), 20, 1), 40)]
    assert epochs.count(0) == len(order) // 20


def test_an_epoch_has_every_row_once_in_batches_of_like_lengths(toy_file, tok):
    rows, _ = load_rows(toy_file, tok)
    lengths = rows.lengths()
    first, second = (list(data.batches(rows, lengths, 8, epoch, seed=3)) for epoch in (0, 1))
    in_epoch = np.concatenate(first)
    assert len(set(in_epoch)) == len(in_epoch) == len(rows) // 8 * 8, "no row twice in an epoch"
    assert not {frozenset(b) for b in first} & {frozenset(b) for b in second}, "other rows together"
    resumed = data.steps(rows, lengths, 8, 3, start=len(first) + 2)
    assert next(resumed)[1].tolist() == second[2].tolist(), "the position in the data is a number"
    _, mixed = next(data.steps(rows, lengths, 64, 1, pool=1))
    _, alike = next(data.steps(rows, lengths, 64, 1, pool=4))
    assert (np.diff(lengths[mixed]) < 0).any(), "a rollout is in random order"
    assert (np.diff(lengths[alike]) >= 0).all(), "the others are sorted in pools"


def test_fields_that_are_no_text_travel_beside_the_tokens_and_count_in_the_digest(tmp_path, tok):
    lines = [{"prompt": f"p {i}", "id": i, "response": "x"} for i in range(100)]
    for line in lines[::3]:
        line["nums"] = [line["id"], {"a": "ü"}]
    rows, _ = load_rows(write_rows(tmp_path / "a.jsonl", lines), tok)
    indices = np.arange(len(rows))[::-1]
    fields = rows.columns(indices)
    assert fields["nums"] == [lines[i].get("nums") for i in fields["id"]]
    prompts = [tok.decode(rows.prompts[i]) for i in indices]
    assert prompts == [f"Human: p {i}\nAssistant:" for i in fields["id"]]
    for change in ({"prompt": "x"}, {"id": "x"}, {"response": "y"}):
        path = write_rows(tmp_path / "a.jsonl", lines[:7] + [{**lines[7], **change}] + lines[8:])
        assert load_rows(path, tok)[0].digest != rows.digest


# ---- 2. models: log-probabilities, scores, LoRA, folders


def padded(rows, value):
    """(B, T) tokens, right-padded with any value, and their lengths."""
    tensors = [torch.tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(tensors, True, value), lengths


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "bloom"])
def test_a_padded_batch_gives_each_row_the_logprobs_and_entropies_of_that_row_alone(kind):
    lm = model_of(kind)
    rows = [row + [5] for row in ragged([8, 3, 20, 2])]
    prompt_lens = torch.tensor([5, 1, 20, 1])
    for pad in (0, 5):  # the EOS at the end is an action, also where it is the padding
        tokens, lens = padded(rows, pad)
        with torch.no_grad():
            got, entropy = sft.Policy(lm)(tokens, prompt_lens, lens - prompt_lens, 0.7)
        for i, (row, prompt_len) in enumerate(zip(rows, prompt_lens.tolist())):
            n = len(row) - prompt_len
            with torch.no_grad():
                logits = lm(torch.tensor([row])).logits[0, prompt_len - 1 : -1].double() / 0.7
            alone = torch.distributions.Categorical(logits=logits)
            want = alone.log_prob(torch.tensor(row[prompt_len:]))
            torch.testing.assert_close(got[i, :n].double(), want, rtol=1e-4, atol=1e-5)
            want = alone.entropy()
            torch.testing.assert_close(entropy[i, :n].double(), want, rtol=1e-4, atol=1e-5)
            assert not got[i, n:].any() and not entropy[i, n:].any()


@pytest.mark.parametrize("kind", ["llama", "opt-350m", "gpt2", "bloom"])
def test_a_score_is_read_at_the_last_real_token_whatever_comes_after_it(kind, tmp_path):
    model_of(kind).save_pretrained(tmp_path)
    rm = reward.RewardModel.from_lm(str(tmp_path), torch.float32)
    rows = ragged([9, 4, 21])
    with torch.no_grad():
        alone = torch.stack([rm(torch.tensor([row]))[0, -1] for row in rows])
        for value in (0, 80):
            tokens, lens = padded(rows, value)
            got = reward.last_token(rm(tokens), lens)
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


def test_every_linear_layer_of_the_blocks_has_an_adapter_and_a_head_is_trained():
    trained = [n for n, p in model_of("llama lora").named_parameters() if p.requires_grad]
    adapted = {name.rpartition(".")[0] for name in trained}
    assert len(trained) == 2 * 3 * 7 == 2 * len(adapted)
    assert all(".lora_" in name and "lm_head" not in name for name in trained)
    rm = reward.RewardModel.from_lm("tiny", torch.float32)
    utils.add_lora(rm.lm, 2)
    assert rm.lm.score.weight.requires_grad, "a new head must learn"
    assert not rm.lm.base_model.embed_tokens.weight.requires_grad


def test_an_adapter_adds_twice_its_product_also_when_it_is_merged_and_off_it_adds_nothing():
    """Hu et al. 2021, section 4.1, with alpha = 2 rank."""
    utils.init_distributed(0)
    lm = model_of("gpt2 lora")
    plain = model_of("gpt2")
    layer = lm.transformer.h[0].attn.c_attn
    x = torch.randn(5, layer.lora_A.size(1))
    ids = torch.tensor(ragged([9]))
    with torch.no_grad():
        want = 2 * x @ layer.lora_A.T @ layer.lora_B.T
        torch.testing.assert_close(layer(x) - layer.base(x), want, rtol=1e-4, atol=1e-5)
        with pytest.raises(KeyError), utils.adapters_off():
            assert torch.equal(lm(ids).logits, plain(ids).logits), "the reference policy"
            raise KeyError
        logits = lm(ids).logits
        assert not torch.equal(logits, plain(ids).logits), "they are on again, even after an error"
        missing, unexpected = plain.load_state_dict(utils.whole_state_dict(lm), strict=False)
        assert not unexpected and missing == ["lm_head.weight"]  # it is tied
        torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_a_tensor_that_is_missing_or_has_another_shape_is_named_and_unknown_ones_pass(
        tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    model_of("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    rest = {k: v for k, v in whole.items() if k != name}
    for state, message in ((rest, "look at " + name),
            (rest | {name: whole[name][:-1].clone()}, name + ".*63.*64"),
            (whole | {"score.weight": torch.zeros(1, 64)}, "look at score.weight")):
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(utils.UserError, match=message):
            load_lm(tmp_path)
    save_file(whole | {"extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    load_lm(tmp_path)
    assert "tensors belong to no layer, such as extra.weight" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match="look at score.weight"):
        reward.RewardModel.from_pretrained(str(tmp_path), torch.float32)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(utils.UserError, match="holds LoRA adapters .*merge them"):
        load_lm(tmp_path)
    with pytest.raises(utils.UserError, match="no such model folder; train one first"):
        load_lm("out/nowhere")


def test_what_is_loaded_has_no_dropout_float32_frequencies_and_the_tokenizers_words(tmp_path, tok):
    model_of("gpt2").save_pretrained(tmp_path / "gpt2")
    assert all(m.p == 0 for m in load_lm(tmp_path / "gpt2").modules()
               if isinstance(m, torch.nn.Dropout))
    model_of("llama", vocab_size=264).save_pretrained(tmp_path)
    for path, vocabulary, words in ((tmp_path, 264, 258), ("tiny", 258, None)):
        lm = load_lm(path, torch.bfloat16, tokenizer=tok)
        assert lm.dtype == torch.bfloat16
        assert lm.model.rotary_emb.inv_freq.dtype == torch.float32
        assert (lm.config.vocab_size, lm.config.num_words) == (vocabulary, words)
    lm.config.logits_scaling = 8.0
    with pytest.raises(utils.UserError, match="scales or caps its logits"):
        sft.Policy(lm)
    assert utils.pick_lr(0, lm.config, 1e-3, 1e-5) == 1e-3, "the built-in model"
    assert utils.pick_lr(0, load_lm(tmp_path).config, 1e-3, 1e-5) == 1e-5
    assert utils.pick_lr(0.5, lm.config, 1e-3, 1e-5) == 0.5
    if not torch.cuda.is_available():
        assert 0.05 < utils.memory_gib() < 1000


def test_a_saved_folder_keeps_its_settings_names_the_ends_and_holds_nothing_broken(tmp_path, tok):
    """Sampling settings as Llama 2 had them, which transformers calls invalid; and a config that
    ties the embeddings of a file where they differ."""
    utils.init_distributed(0)
    lm = model_of("llama", vocab_size=258, tie_word_embeddings=False)
    lm.config.tie_word_embeddings = True
    lm.save_pretrained(tmp_path / "a")
    settings = {"eos_token_id": 5, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "a/generation_config.json").write_text(json.dumps(settings))
    loaded = load_lm(tmp_path / "a")
    ends = [256, 257]
    utils.save_model(loaded, tok, ends, tmp_path / "b")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert saved.config.eos_token_id == saved.generation_config.eos_token_id == ends
    for name in ("temperature", "top_p", "repetition_penalty"):
        assert getattr(saved.generation_config, name) == settings[name]
    ids = torch.tensor(ragged([9]))
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, lm(ids).logits)
    loaded.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    before = (tmp_path / "b/model.safetensors").read_bytes()
    with pytest.raises(utils.UserError, match="layers.1.mlp.up_proj.weight is not finite; lower"):
        utils.save_model(loaded, tok, ends, tmp_path / "b")
    assert (tmp_path / "b/model.safetensors").read_bytes() == before


def test_each_folder_loads_with_transformers_alone(chain):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    policies = [chain["sft"][0], chain["ppo"][0], chain["ppo"][0] + "/ema"]
    for folder in (*policies, chain["reward"][0]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert text == "Human: hi\nAssistant: ho"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for path in policies:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
            assert torch.equal(load_lm(path)(ids).logits, theirs(ids).logits)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        ours = reward.RewardModel.from_pretrained(folder, torch.float32)
        want = (theirs(ids).logits[:, 0] - theirs.config.score_offset) * theirs.config.score_scale
        torch.testing.assert_close(ours(ids)[:, -1], want)
    assert theirs.config.score_offset != 0 and theirs.config.score_scale != 1


# ---- 3. kernels: Triton's against PyTorch references in float64, which section 4 compares
# with transformers.
# Without a GPU the kernels run in Triton's interpreter, in float32 and float16 (it computes wrong
# results in bfloat16, without an error), and are compiled for a GPU that is not there.

GPU_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
every_device = pytest.mark.parametrize("device, dtype", [
    pytest.param("cpu", torch.float32, id="interpreter-fp32", marks=INTERPRETED),
    pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=[INTERPRETED, long]),
    pytest.param("cuda", torch.float32, id="gpu-fp32", marks=GPU_ONLY),
    pytest.param("cuda", torch.bfloat16, id="gpu-bf16", marks=GPU_ONLY),
])
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(*shape, dtype=torch.float64, seed=0):
    """Normal random numbers that the dtype represents exactly, in float64 for the reference."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).double()


def assert_close(got, want, dtype, what=""):
    """The error, in units of 1 + the size of the number, is below the tolerance of the dtype."""
    got, want = (x.detach().double().cpu() for x in (got, want))
    assert got.shape == want.shape and not got.isnan().any(), f"{what}: NaN, or {got.shape}"
    worst = ((got - want).abs() / (1 + want.abs())).max() if want.numel() else 0
    assert worst < TOLERANCE[dtype], f"{what}: error {worst:.2e} in {dtype}"


@pytest.mark.parametrize("shape, out", [((5, 8), 24), ((3, 7, 8), 8), ((1, 8), 8), ((2, 3, 8), 1)])
def test_linear_and_its_gradients_are_those_of_autograd(shape, out):
    inputs = [draw(*size, seed=i).float() for i, size in enumerate([shape, (out, 8), (out,)])]
    results = []
    for linear, dtype in ((torch.nn.functional.linear, torch.float64),
                          (kernels.linear, torch.float32)):
        args = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        y = linear(*args)
        y.sum().backward(retain_graph=True)  # a gradient with strides of 0
        (y * torch.arange(1, out + 1)).sum().backward()
        results.append([y, *(x.grad for x in args)])
    if kernels.ONEDNN:
        assert (type(y.grad_fn).__name__ == "OneDNNLinearBackward") == (shape[0] > 1)
    module = kernels.use_onednn_linears(torch.nn.Linear(8, 8))
    assert type(module) is kernels.Linear or torch.cuda.is_available()
    for want, got in zip(*results):
        assert_close(got, want, torch.float32)


@every_device
@pytest.mark.parametrize("rows", [1, 20])
def test_a_product_with_an_activation(device, dtype, rows):
    x, weight = draw(rows, 16, dtype=dtype), draw(32, 16, dtype=dtype, seed=1)
    for name, bias in itertools.product(kernels.ACTIVATIONS, (weight[:, 0], None)):
        want = kernels.ACTIVATIONS[name].function(torch.nn.functional.linear(x, weight, bias))
        args = [a if a is None else a.to(device, dtype) for a in (x, weight, bias)]
        assert_close(kernels.linear_activation(*args, name), want, dtype, name)


def spec_of(H, D, window, alibi, device="cpu"):
    slopes = 2.0 ** -(1 + torch.arange(H, device=device) * 8 / H)
    return AttentionSpec(D**-0.5, window, slopes if alibi else None)


@every_device
@pytest.mark.parametrize("lengths, H, K, D, window, alibi", [
    ([3, 0, 1, 133, 0], 2, 2, 64, 0, False),  # empty, one token, longer than a block
    ([70, 5], 4, 1, 128, 7, True),  # a window smaller than a block of keys
    ([0, 150], 1, 1, 64, 64, False),  # a window of exactly one block
    ([35], 1, 1, 256, 0, True), ([33, 2], 2, 2, 8, 9, True),  # below the 16 that tl.dot needs
])
def test_packed_prefill_is_attention_of_each_sequence_alone(device, dtype, lengths, H, K, D, window,
                                                            alibi):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    N = sum(lengths)
    # Slices of one tensor, as a joint projection makes them: their rows are not contiguous.
    qkv = draw(N + 64, H + 2 * K, D, dtype=dtype)
    qkv[N:] = float("nan")  # nothing behind a sequence may be read: 0 * NaN is not 0
    q, k, v = qkv[:N].split([H, K, K], 1)
    want = kernels.prefill_attention(q, k, v, cu_seqlens, spec_of(H, D, window, alibi))
    q, k, v = qkv.to(device, dtype)[:N].split([H, K, K], 1)
    spec = spec_of(H, D, window, alibi, device)
    got = kernels.prefill_attention_triton(q, k, v, cu_seqlens.to(device), spec)
    assert_close(got, want, dtype)


def test_alibi_tells_far_positions_apart_in_bfloat16_too():
    bias = kernels.alibi(torch.tensor([1.0, 0.25]), torch.arange(400), torch.bfloat16)
    assert bias[0].tolist() == list(range(400)), "bfloat16 itself cannot count beyond 256"


@every_device
@pytest.mark.parametrize("lengths, C, H, K, D, window, alibi", [
    ([3, 0, 70, 33], 70, 2, 2, 64, 0, False), ([0, 0], 40, 1, 1, 64, 0, False),  # empty rows only
    ([1], 300, 8, 1, 128, 0, True),  # a capacity of many splits, and keys for one
    ([200, 7], 200, 4, 1, 80, 50, True), ([100, 31], 128, 8, 2, 96, 3, False),
    ([9, 17], 20, 34, 2, 8, 0, False),  # 17 query heads per key head
])
def test_decode_reads_the_keys_of_each_row_alone(device, dtype, lengths, C, H, K, D, window, alibi,
                                                 monkeypatch):
    B = len(lengths)
    q = draw(B, H, D, dtype=dtype)
    k, v = draw(2, B + 1, K, C, D, dtype=dtype, seed=1)                 # one slot more than rows
    seen = torch.tensor(lengths)
    want = kernels.decode_attention(q, k, v, seen, spec_of(H, D, window, alibi))
    for slot, n in enumerate([*lengths, 0]):  # nothing beyond the length of a row may be read
        k[slot, :, n:] = v[slot, :, n:] = float("nan")
    args = [*(x.to(device, dtype) for x in (q, k, v)), seen.to(device)]
    spec = spec_of(H, D, window, alibi, device)
    assert_close(kernels.decode_attention_triton(*args, spec), want, dtype)
    monkeypatch.setattr(kernels, "decode_splits", lambda *_: 1)
    assert_close(kernels.decode_attention_triton(*args, spec), want, dtype, "in one split")


@every_device
@pytest.mark.parametrize("H, K, D, R", [(4, 4, 64, 0), (3, 1, 64, 64), (8, 2, 80, 20)])
def test_rope_rotates_and_the_cache_holds_rotated_keys(device, dtype, H, K, D, R):
    C = 9
    qkv = draw(5, H + 2 * K, D, dtype=dtype)
    slots, positions = torch.tensor([[0, 0, 2, 3, 1], [0, 1, 8, 3, 2]])
    angles = torch.arange(C)[:, None] * 0.7 ** torch.arange(R // 2)
    tables = [angles.cos(), angles.sin()] if R else []                  # (C, R / 2) each
    results = []
    for where, rope, real in [("cpu", kernels.rope_and_cache, torch.float64),
                              (device, kernels.rope_and_cache_triton, dtype)]:
        q, k, v = qkv.to(where, real).split([H, K, K], 1)
        caches = torch.zeros(2, 4, K, C, D, dtype=real, device=where)
        indices = [x.to(where) for x in (slots, positions, *tables)]
        results.append([*rope(q, k, v, *caches, *indices), caches])
    for want, got in zip(*results):
        assert_close(got, want, dtype)


@long
@INTERPRETED
def test_a_cache_beyond_32_bits_is_addressed_right():
    """Slot 5 starts at element 5 * 2^29. Only the pages that are touched take memory."""
    cache = torch.empty(6, 1, 2**23, 64, dtype=torch.float16)
    q = draw(6, 1, 64).half()
    k = torch.ones(6, 1, 64, dtype=torch.float16)
    kernels.rope_and_cache_triton(q, k, k, cache, cache, torch.arange(6), torch.zeros(6).long())
    lengths = torch.tensor([1, 0, 0, 0, 0, 1])
    got = kernels.decode_attention_triton(q, cache, cache, lengths, AttentionSpec(0.1, window=16))
    assert torch.equal(got[:, 0, 0], lengths.half()), "keys are not read where they were written"


@every_device
@pytest.mark.parametrize("E, rms, with_residual", [
    (1, False, True), (100, False, False), (999, False, True), (100, True, True), (64, True, False),
])
def test_add_norm_adds_and_norms(device, dtype, E, rms, with_residual):
    x, residual = draw(2, 3, 4, E, dtype=dtype)
    weight, bias = draw(2, E, dtype=dtype, seed=1)
    if E > 64:
        x = (x + 100).to(dtype).double()  # a mean much larger than the deviation
    total = (x + residual).to(dtype).double() if with_residual else x
    want, _ = kernels.add_norm(total, None, weight, bias, 1e-5, rms)
    x, residual, weight, bias = (a.to(device, dtype) for a in (x, residual, weight, bias))
    for part in (np.s_[:, 0], np.s_[:, 2:]):  # rows, or heads: slices of a joint projection
        added = residual[part] if with_residual else None
        normed, got = kernels.add_norm_triton(x[part], added, weight, bias, 1e-5, rms)
        assert_close(got, total[part], dtype, "sum")
        assert_close(normed, want[part], dtype, "norm")


@pytest.mark.parametrize("temperature, top_k, top_p, kept", [
    (1.0, 2, 1.0, [1, 3]), (0.7, 0, 0.71, [1, 3, 4]), (1.0, 0, 1e-9, [1]),
    (0.7, 9, 1.0, [0, 1, 2, 3, 4]),
])
def test_sampled_tokens_have_their_share_of_the_random_numbers(temperature, top_k, top_p, kept):
    p = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    tokens = torch.tensor([0, 63, 64, 65, 4999])  # the sampler takes blocks of 64
    logits = torch.full((5000,), float("-inf"))
    logits[tokens] = p.log() * temperature
    u = (torch.arange(1000) + 0.5) / 1000
    got, logprobs = kernels.sample(logits.expand(1000, -1), u, temperature, top_k, top_p)
    renormalised = torch.zeros(5000)
    renormalised[tokens[kept]] = p[kept] / p[kept].sum()
    shares = got.bincount(minlength=5000) / 1000
    assert (shares - renormalised).abs().max() < 0.002
    assert_close(logprobs, renormalised[got].log(), torch.float32)


def test_uniform_numbers_are_uniform_and_independent():
    keys = torch.arange(300)[:, None].expand(300, 300)
    grid = kernels.uniform(keys, keys.T)                                # (keys, counters)
    deciles = grid.histc(10, 0, 1) / grid.numel()
    assert 0 < grid.min() and grid.max() < 1 and (deciles - 0.1).abs().max() < 0.005
    grid = grid.double() - 0.5
    for other in (grid.roll(1, 0), grid.roll(1, 1), grid.T):
        correlation = (grid * other).mean().abs() * 12
        assert correlation < 0.02, "neighbours, or key and counter swapped, are correlated"


@pytest.mark.parametrize("device, dtype", [
    ("cpu", torch.float32), ("cpu", torch.bfloat16),
    pytest.param("cuda", torch.bfloat16, marks=GPU_ONLY, id="gpu")])
@pytest.mark.parametrize("N, E, V, temperature", [
    (7, 5, 11, 1.0), (5, 8, 5003, 0.7), (0, 3, 4, 1.0), (1, 3, 1, 1.0)])
def test_token_logprobs_and_their_gradients_are_those_of_autograd(N, E, V, temperature, device,
                                                                  dtype, monkeypatch):
    if dtype == torch.bfloat16 and device == "cpu":  # logits as on a GPU
        monkeypatch.setattr(kernels, "logits", lambda x, weight: x.float() @ weight.T.float())
    monkeypatch.setattr(kernels.TokenLogprobs, "CHUNK", {device: 3 * V})  # three rows at a time
    inputs = [draw(N, E, dtype=dtype), draw(V, E, dtype=dtype, seed=1)]
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    g, g_entropy = draw(N, seed=3), draw(N, seed=4)

    def textbook(hidden, weight, targets, temperature):
        log_p = (hidden @ weight.T / temperature).log_softmax(-1)       # (N, V)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    results = []
    for where, real, function in (("cpu", torch.float64, textbook),
                                  (device, dtype, kernels.token_logprobs)):
        hidden, weight = (x.to(where, real, copy=True).requires_grad_() for x in inputs)
        logprobs, entropy = function(hidden, weight, targets.to(where), temperature)
        loss = (logprobs * g.to(logprobs)).sum() + (entropy * g_entropy.to(logprobs)).sum()
        results.append([logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight))])
    for want, got, real in zip(*results, (torch.float32, torch.float32, dtype, dtype)):
        assert got.dtype == real
        assert_close(got, want, real)
    sizes = [z.numel() for _, z in kernels.TokenLogprobs.chunks(hidden, weight)]
    assert sum(sizes) == N * V and max(sizes, default=0) <= 3 * V, f"chunks of {sizes} logits"


def test_the_gradient_of_a_bfloat16_head_is_added_up_in_float32(monkeypatch):
    """A thousand equal rows, one at a time: a sum in bfloat16 would stay at 256 times the first."""
    monkeypatch.setattr(kernels.TokenLogprobs, "CHUNK", {"cpu": 8})
    row = draw(1, 4).bfloat16()
    weight = draw(8, 4, seed=1).bfloat16().requires_grad_()
    gradients = []
    for n in (1, 1000):
        targets = torch.zeros(n, dtype=torch.long)
        logprobs, _ = kernels.token_logprobs(row.repeat(n, 1), weight, targets)
        gradients += torch.autograd.grad(logprobs.sum(), weight)
    assert_close(gradients[1] / 1000, gradients[0], torch.bfloat16)


def test_logits_of_a_bfloat16_model_are_float32_on_a_gpu():
    """With tensors that have a device and a dtype but no memory: no GPU is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)
        assert kernels.logits(x, x).dtype == torch.float32


def empty(*shape, dtype=torch.int64):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_kernels(D, K, E, dtype, is_llama):
    """Every launcher, with tensors without memory. D head size, K key heads of 32, E width."""
    spec = AttentionSpec(0.1)
    if not is_llama:
        spec = AttentionSpec(0.1, window=1024, slopes=empty(32, dtype=torch.float32))
    q, k = empty(64, 32, D, dtype=dtype), empty(64, K, D, dtype=dtype)
    cache = empty(256, K, 512, D, dtype=dtype)
    for B in range(1, 65):
        kernels.prefill_attention_triton(q, k, k, empty(B + 1, dtype=torch.int32), spec)
        kernels.decode_attention_triton(q[:B], cache, cache, empty(B), spec)
    cos = empty(512, D // 2, dtype=torch.float32) if is_llama else None
    kernels.rope_and_cache_triton(q, k, k, cache, cache, empty(64), empty(64), cos, cos)
    x = empty(64, E, dtype=dtype)
    kernels.add_norm_triton(x, x, x[0], None if is_llama else x[0], 1e-5, is_llama)


def check_compiled_kernels():
    """In a process that does not interpret kernels: compiles what launch_kernels launches for an
    H100, and reads what NVIDIA's assembler says about each compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = {}
    run = triton.JITFunction.run

    def compile_only(kernel, *args, warmup, **options):
        result = run(kernel, *args, warmup=True, **options)
        compiled[kernel.__name__, result.hash] = result

    triton.JITFunction.run = compile_only
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_current_stream=lambda device: 0))
    variants = [(128, 8, 2048, torch.bfloat16, True)]
    if LONG:
        variants = [(D, K, E, dtype, is_llama)
                    for D, E in ((8, 768), (64, 2048), (80, 2560), (128, 5120), (256, 9216))
                    for K, is_llama in ((8, True), (32, False))
                    for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for variant in variants:
        launch_kernels(*variant)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    for (name, _), result in compiled.items():
        command = [ptxas, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", "-"]
        said = subprocess.run(command, input=result.asm["ptx"], capture_output=True, text=True)
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said.stderr)))
        assert spilled == 0, f"{name} spills registers"
        assert "C7515" not in said.stderr, f"{name}: wgmma one after the other"
        assert result.metadata.shared <= 99 * 1024, f"{name}: too much memory"
    names = [name for name, _ in compiled]
    assert set(names) == {name for name in vars(kernels) if name.endswith("_kernel")}
    if not LONG:
        assert names.count("prefill_kernel") == 1, "one for all batches"
        assert names.count("decode_kernel") == 2, "in one split, in several"
        assert names.count("merge_kernel") <= 3, "of 16, 32 and 64 splits"


def test_each_kernel_compiles_for_an_h100_and_spills_nothing():
    code = f"import {__name__} as test; test.check_compiled_kernels()"
    ran = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "0"})
    assert ran.returncode == 0, ran.stderr[-3000:]


# ---- 4. the hybrid engine: the tokens of transformers, the log-probabilities of the textbook


def transformers_greedy(lm, prompt, max_new_tokens, eos_token_id=None):
    """The row that transformers.generate makes of one prompt."""
    out = lm.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False,
                      eos_token_id=eos_token_id, pad_token_id=0)
    return out[0].tolist()


def assert_near(got, want, within=1e-4):
    torch.testing.assert_close(got.double(), want.double(), rtol=within, atol=within)


def check_logprobs(out, lm, temperature=1.0):
    """The log-probabilities of a Rollout are the textbook's, row by row, and 0 past the end."""
    for i, row in enumerate(rows_of(out)):
        want = plain_logprobs(lm, row, int(out.prompt_lens[i]), temperature)
        assert_near(out.logprobs[i, : len(want)], want)
        assert (out.logprobs[i, len(want) :] == 0).all()


@pytest.mark.parametrize("kind", [*KINDS, "llama lora", "gpt2 lora", "bloom lora"])
def test_greedy_output_is_that_of_transformers_token_for_token(kind):
    lm = model_of(kind)
    prompts = ragged((1, 3, 3, 17, 40, 90))
    ends = list(range(6, 20))
    out = HybridEngine(lm, max_batch=4).generate(prompts, 24, temperature=0, eos_token_id=ends)
    assert rows_of(out) == [transformers_greedy(lm, prompt, 24, ends) for prompt in prompts]
    check_logprobs(out, lm)


@pytest.mark.parametrize("kind", ["gpt2", "llama lora"])
def test_the_engine_follows_every_optimizer_step_and_never_changes_a_weight(kind):
    lm = model_of(kind)
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=0.02)
    engine = HybridEngine(lm)
    prompts = ragged((3, 9, 5))
    ids = torch.tensor([prompts[1]])
    outputs = []
    for _ in range(3):
        weights = [p.detach().clone() for p in lm.parameters()]
        outputs.append(rows_of(engine.generate(prompts, 12, temperature=0)))
        assert outputs[-1] == [transformers_greedy(lm, prompt, 12) for prompt in prompts]
        assert all(map(torch.equal, lm.parameters(), weights)), "no weight changes by one bit"
        lm(ids, labels=ids).loss.backward()
        optimizer.step()
    assert outputs[0] != outputs[1] != outputs[2], "the steps were large enough to change tokens"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt-350m", "gpt2", "bloom"])
def test_weights_are_read_by_reference_and_one_product_has_the_projections(kind, monkeypatch):
    lm = model_of(kind)
    products = []

    def counted(function):
        return lambda *args: products.append(args) or function(*args)

    for name in ("linear", "linear_activation"):
        monkeypatch.setattr(kernels, name, counted(getattr(kernels, name)))
    engine = HybridEngine(lm)
    engine.generate(ragged((3,)), 2)  # a prefill and a step
    storages = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    for x in engine.decoder.weights:
        assert x.untyped_storage().data_ptr() in storages, f"a copy of {tuple(x.shape)}"
    assert sum(x.numel() for x in engine.decoder.weights) == lm.num_parameters()
    ends = 3 if kind == "opt-350m" else 1
    assert len(products) == 2 * (4 * 3 + ends), "q, k, v; out; gate and up; down; and the ends"


def test_a_row_keeps_its_tokens_however_rows_are_batched():
    lm = model_of("llama")
    prompts = ragged([1 + i % 13 for i in range(40)])
    call = dict(max_new_tokens=20, temperature=1.3, eos_token_id=[7, 8, 9])

    def sample(engine, rows=range(40)):
        out = engine.generate([prompts[i] for i in rows], seed=[100 + i for i in rows], **call)
        assert out.tokens.sum() == sum(map(sum, rows_of(out))), "zeros behind each row"
        return out, dict(zip(rows, rows_of(out)))

    want, whole = sample(HybridEngine(lm))
    check_logprobs(want, lm, 1.3)

    slot = 2 * 3 * 2 * 64 * 16 * 4  # K and V, layers, key heads, capacity, head size, bytes
    for limit in (dict(max_batch=4), dict(kv_gib=4.5 * slot / 2**30, max_len=64)):
        engine = HybridEngine(lm, **limit)
        out, rows = sample(engine)
        assert rows == whole, "in waves: ten times more rows than slots"
        assert len(engine.cache.slots) == 4
        assert_near(out.logprobs, want.logprobs)
    assert sample(engine, [31, 2, 17])[1] == {i: whole[i] for i in (31, 2, 17)}
    assert prompts[3] + list(engine.stream(prompts[3], seed=[103], **call)) == whole[3]
    next(engine.stream(prompts[5], seed=[1], **call))  # not read to its end
    assert sample(engine)[1] == whole
    first, same, other = (engine.generate(prompts, 8, seed=seed).tokens for seed in (5, 5, 6))
    assert torch.equal(first, same) and not torch.equal(first, other)

    large = [weakref.ref(x) for x in (engine.cache.k, engine.cache.rows.tokens, engine.out_tokens)]
    engine.release()
    assert [ref() for ref in large] == [None] * 3, "release gives the memory back"


def test_answers_to_one_prompt_share_its_prefill_and_differ():
    lm = model_of("qwen3")
    engine = HybridEngine(lm)
    out = engine.generate(ragged([30]) * 8 + ragged([5]), 10, seed=3)
    assert engine.stats["prefill_tokens"] == 35, "30 tokens once, and the other 5"
    assert len({tuple(row) for row in rows_of(out)[:8]}) > 4
    check_logprobs(out, lm)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox"])  # tied, untied
def test_ids_without_a_word_are_never_sampled_and_have_no_probability(kind):
    lm = model_of(kind)
    lm.config.num_words = 90  # of 97
    head = lm.get_output_embeddings().weight
    with torch.no_grad():
        head[90:] = 10 * head[:7]  # greedy would often take one of them
    prompts = ragged((3, 9, 5), vocab=90)
    policy = sft.Policy(lm)
    for name in ("hybrid", "hf"):
        out = make_engine(name, policy).generate(prompts, 60, temperature=2.0, seed=4)
        assert out.tokens.max() < 90
        logprobs, _ = policy(out.tokens, out.prompt_lens, out.answer_lens, 2.0)
        assert_near(out.logprobs, logprobs)


def test_the_slow_path_has_the_same_interface_and_the_same_greedy_tokens():
    lm = model_of("llama")
    prompts = ragged((4, 11, 1))
    ends = list(range(6, 20))
    want = HybridEngine(lm).generate(prompts, 12, temperature=0, eos_token_id=ends)
    # Whatever the model is set to, it is the trained distribution that is sampled.
    lm.generation_config.update(repetition_penalty=3.0, min_length=20)
    lm.gradient_checkpointing_enable()
    lm.train()
    slow = HFEngine(sft.Policy(lm))
    got = slow.generate(prompts, 12, temperature=0, eos_token_id=ends)
    for name in ("tokens", "prompt_lens", "answer_lens", "sampled", "logprobs"):
        assert_near(getattr(got, name), getattr(want, name))
    sampled = slow.generate(prompts, 12, temperature=0.7, seed=4)
    check_logprobs(sampled, lm, 0.7)
    assert torch.equal(sampled.tokens, slow.generate(prompts, 12, 0.7, seed=4).tokens)
    assert lm.training and lm.generation_config.repetition_penalty == 3.0


@pytest.fixture
def with_graphs(monkeypatch):
    """Makes engines that schedule as on a GPU: steps of few sizes, eight of them between two reads
    of the flags. The replay of a graph is the step itself."""
    def make(lm, **limits):
        engine = HybridEngine(lm, **limits)
        engine.use_graphs = True
        engine.graphs.capture = lambda step: SimpleNamespace(replay=step)
        return engine

    monkeypatch.setitem(hybrid_engine.STEPS_PER_SYNC, "cpu", 8)
    return make


def test_steps_of_few_sizes_give_every_row_the_same_tokens(with_graphs, monkeypatch):
    lm = model_of("llama")
    prompts = ragged([1 + i % 13 for i in range(40)])
    call = dict(eos_token_id=[7, 8, 9], seed=3, temperature=1.3)
    want = HybridEngine(lm).generate(prompts, 20, **call)
    engine = with_graphs(lm, max_batch=12)
    read = []
    attention = kernels.decode_attention
    monkeypatch.setattr(kernels, "decode_attention", lambda *args: (
        read.append(int(args[3].sum())) or attention(*args)))
    got = engine.generate(prompts, 20, **call)
    assert rows_of(got) == rows_of(want)
    assert_near(got.logprobs, want.logprobs)
    pairs = zip(got.prompt_lens.tolist(), got.answer_lens.tolist())
    keys = sum(sum(range(p + 1, p + a)) for p, a in pairs)  # an answer's first token is of prefill
    assert sum(read) == 3 * keys, "rows that have ended read no keys, in each of three layers"
    assert {n for n, *_ in engine.graphs.graphs} == {8, 12}, "in the end rows move to fill gaps"
    engine.cache.slots = torch.arange(200)
    assert [engine.step_size(n) for n in (1, 2, 9, 65, 199)] == [1, 8, 64, 128, 200]


def test_graphs_live_over_rollouts_until_a_tensor_that_they_use_has_moved(with_graphs,
                                                                          monkeypatch):
    lm = model_of("llama")
    engine = with_graphs(lm)

    def graphs(lengths=(3, 30, 5)):
        prompts = ragged(lengths)
        out = engine.generate(prompts, 40, seed=1)
        assert rows_of(out) == rows_of(HybridEngine(lm).generate(prompts, 40, seed=1))
        return dict(engine.graphs.graphs)

    first = graphs()
    with torch.no_grad():
        for p in lm.parameters():
            p -= 0.01
    assert graphs() == first, "an optimizer step moves nothing"
    assert graphs((3, 1)) == first, "nor does a smaller rollout"
    monkeypatch.setattr(engine, "may_stay", lambda: True)
    engine.release()
    assert graphs() == first, "where the cache may stay"
    norm = lm.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data.clone()
    assert graphs() != first
    monkeypatch.setattr(engine, "may_stay", lambda: False)
    engine.release()
    assert engine.cache is None and not engine.graphs.graphs


def test_the_cache_stays_where_it_fits_beside_the_peak_of_training(monkeypatch):
    engine = HybridEngine(model_of("llama"))
    engine.generate([[7]], 1)
    engine.device = torch.device("cuda")
    engine.cache.bytes = 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (90, 141))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 10)
    for steps, kept, peak, stays in (
            (0, 0, 50, False),  # an evaluation: nothing is known of training
            (1, 0, 70, True),  # 70 + 20 are 90% of 100, which this process may have
            (1, 20, 90, True), (1, 20, 91, False), (1, 20, 50, False)):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_, peak=peak: peak)
        engine.model = SimpleNamespace(global_steps=steps)  # as DeepSpeed counts them
        engine.released = 0, kept
        engine.measure_training()
        assert engine.may_stay() == stays, "of this peak 20 are the cache, which has stayed"


@pytest.mark.parametrize("kind", ["qwen2", "bloom"])  # windows and grouped keys; by head and ALiBi
def test_the_triton_kernels_take_the_tensors_of_the_engine(kind, with_graphs, monkeypatch):
    lm = model_of(kind, num_hidden_layers=2)
    prompts = ragged((3, 9)) + ragged((3, 9))[1:]
    want = HybridEngine(lm).generate(prompts, 3, seed=3)
    for name in ("prefill_attention", "decode_attention", "rope_and_cache", "add_norm"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name + "_triton"))
    monkeypatch.setitem(hybrid_engine.STEPS_PER_SYNC, "cpu", 2)
    got = with_graphs(lm).generate(prompts, 3, seed=3)
    assert rows_of(got) == rows_of(want)
    assert_near(got.logprobs, want.logprobs)


@pytest.mark.parametrize("kind", ["qwen3 lora", "opt-350m", "bloom"])
def test_a_decode_step_never_waits_for_the_host_nor_mixes_devices(kind, monkeypatch):
    """On tensors without data: they raise an error where the host would ask for a number, and
    where they meet a tensor that has data. The Triton kernels are replaced."""
    launched = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        def launch(*args, _name=name, **options):
            assert all(x.is_meta for x in args if isinstance(x, torch.Tensor)), _name
            launched.append(_name)
        monkeypatch.setattr(kernels, name, defaultdict(lambda launch=launch: launch))
    for name in ("decode_attention", "rope_and_cache", "add_norm"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name + "_triton"))
    monkeypatch.setattr(HybridEngine, "free_memory", lambda self: 2**30)
    engine = HybridEngine(model_of(kind).bfloat16().to("meta"))
    engine.sampling = (1.0, 0, 1.0)
    with torch.no_grad():
        engine.prepare(4, 64, None)
        engine.decode_step(4)
    assert launched.count("decode_kernel") == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_graph_replay_equals_eager_steps_across_an_optimizer_step(kind):
    lm = model_of(kind).cuda()
    prompts = ragged((3, 30, 9, 1, 200))
    engine = HybridEngine(lm)
    eager = HybridEngine(lm)
    eager.use_graphs = False
    call = dict(eos_token_id=list(range(60, 97)), top_p=0.9, seed=3)
    for _ in range(2):
        got = engine.generate(prompts, 40, **call)
        want = eager.generate(prompts, 40, **call)
        assert rows_of(got) == rows_of(want)
        assert_near(got.logprobs, want.logprobs, within=1e-3)
        assert engine.graphs.graphs, "steps were captured"
        with torch.no_grad():
            for p in lm.parameters():
                p += 0.01 * torch.randn_like(p)


BAD_CALLS = {
    "a prompt has 500 tokens; with 20 new ones that is more than the model's context of 512":
        dict(prompts=ragged((3, 500))),
    "one row of 32 tokens needs .* raise kv_gib": dict(limits=dict(kv_gib=1e-6)),
    "outside the vocabulary of 97": dict(prompts=[[97]]), "top_p 0.0 in": dict(top_p=0.0),
    "model type 'falcon'.*--engine hf": dict(config=dict(model_type="falcon")),
    "rope scaling 'dynamic'": dict(config=dict(
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))),
    "tp=3 does not divide one of": dict(limits=dict(tp=3)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_what_the_engine_cannot_do_it_says_before_it_starts(message):
    call = dict(prompts=[[3]], max_new_tokens=20, limits={}, config={}) | BAD_CALLS[message]
    lm = model_of("llama", **call.pop("config"))
    with pytest.raises(utils.UserError, match=message):
        HybridEngine(lm, **call.pop("limits")).generate(**call)


TP_KINDS = ("llama", "qwen3 lora", "gpt2 lora", "opt", "opt-350m", "bloom")


def collectives(function, *args):
    """The names of all collectives that a call makes."""
    with torch.profiler.profile() as profile:
        function(*args)
    return [e.name for e in profile.events() if e.name.startswith("c10d::")]


def tensor_parallel_rollouts(prompts, seeds):
    """On two ranks, each with every other prompt."""
    utils.init_distributed(1)
    rank = dist.get_rank()
    out = {}
    for kind in TP_KINDS:
        engine = HybridEngine(model_of(kind), tp=2)
        got = engine.generate(prompts[rank::2], 12, seed=seeds[rank::2])
        out[kind] = rows_of(got), got.logprobs
        engine.release()
    out["collectives"] = collectives(engine.generate, prompts[:1], 6)
    return out


def test_tensor_parallel_ranks_give_the_tokens_of_one_process(two):
    prompts = ragged((3, 30, 9, 1, 6))  # so that one of two ranks has more of them
    seeds = [10, 11, 12, 13, 14]
    results = two(tensor_parallel_rollouts, prompts, seeds)
    for kind in TP_KINDS:
        want = HybridEngine(model_of(kind)).generate(prompts, 12, seed=seeds)
        for rank, result in enumerate(results):
            rows, logprobs = result[kind]
            assert rows == rows_of(want)[rank::2], f"{kind}, tp=2, rank {rank}"
            assert_near(logprobs, want.logprobs[rank::2])
    forwards = 6  # a prefill, which samples the first token, and five steps
    for result in results:
        assert result["collectives"].count("c10d::allreduce_") == 2 * 3 * forwards + 1, (
            "two per layer and forward, and one to plan the KV cache")
        assert len(result["collectives"]) == 2 * 3 * forwards + 3, "two gather the prompts"


def rollouts_of_shards():
    """On two ranks: greedy tokens before and after an optimizer step, with and without LoRA."""
    utils.init_distributed(1)
    prompts = ragged((3, 30, 9, 1))
    row = torch.tensor(ragged((6,))), torch.tensor([2]), torch.tensor([4])
    out = {}
    for stage, kind in itertools.product((2, 3), ("llama", "llama lora")):
        trained = engine_of(model_of(kind), 1e-2, zero=stage)
        engine = HybridEngine(trained)
        out[stage, kind] = []
        for _ in range(2):
            out[stage, kind].append(rows_of(engine.generate(prompts, 12, temperature=0)))
            engine.release()
            assert engine.decoder.layers is None, "what was gathered is given back"
            logprobs, _ = trained(*row)
            trained.backward(-logprobs.mean())
            utils.step(trained)
    few = collectives(engine.generate, prompts, 1)
    engine.release()
    assert few == collectives(engine.generate, prompts, 40 if dist.get_rank() else 2) != []
    return out


def test_zero_shards_give_the_tokens_of_one_process_and_are_gathered_once_per_rollout(two):
    results = two(rollouts_of_shards)
    for result, kind in itertools.product(results, ("llama", "llama lora")):
        assert result[2, kind] == result[3, kind]
        before, after = result[3, kind]
        want = HybridEngine(model_of(kind)).generate(ragged((3, 30, 9, 1)), 12, temperature=0)
        assert after != before == rows_of(want)


# ---- 5. formulas and phases, against plain loops over one row without padding or holes


MASK = torch.tensor([
    [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 1, 1, 1],  # a tool's output between two turns
    [0, 0, 1, 1, 0, 0, 0],  # a forced beginning
    [0, 1, 0, 0, 0, 1, 0],  # the last token is not the policy's
], dtype=torch.bool)


def random_tensors(count):
    """Random tensors (B, A), which are not 0 outside of MASK."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(MASK.shape, generator=g, dtype=torch.float64) for _ in range(count)]


def naive_gae(values, rewards, gamma, lam):
    """Advantages of one row: the discounted sum of all later errors of the value."""
    advantages = []
    for t in range(len(values)):
        total = 0.0
        for k, next_value in enumerate([*values[t + 1 :], 0.0]):
            error = rewards[t + k] + gamma * next_value - values[t + k]
            total += (gamma * lam) ** k * error
        advantages.append(total)
    return advantages


def test_the_loss_of_a_pair_is_finite_for_margins_of_any_size():
    scores = torch.tensor([-1e4, 0.0])
    expected = (2e4 + math.log(2)) / 2
    assert reward.pairwise_loss(scores, -scores).item() == pytest.approx(expected)


def test_gae_is_the_sum_of_discounted_errors_from_sampled_token_to_sampled_token():
    values, rewards = random_tensors(2)
    advantages, returns = ppo.gae(values, rewards, MASK, 0.9, 0.8)
    for i, m in enumerate(MASK):
        v = values[i, m].numpy()
        expected = np.array(naive_gae(v, rewards[i, m].numpy(), 0.9, 0.8))
        assert advantages[i, m].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
        assert returns[i, m].tolist() == pytest.approx((expected + v).tolist(), rel=1e-4)
    assert not advantages[~MASK].any() and not returns[~MASK].any(), "nothing was sampled there"


def test_the_clipped_score_lands_on_the_last_sampled_token_and_kl_on_sampled_tokens_only():
    logprobs, ref_logprobs = random_tensors(2)
    scores = torch.tensor([1.0, -9.0, 9.0, 0.0, -1.0, 2.0], dtype=torch.float64)
    rewards = ppo.token_rewards(scores, logprobs, ref_logprobs, MASK, 0.3, 5.0)
    for i, m in enumerate(MASK):
        expected = [-0.3 * x for x in (logprobs - ref_logprobs)[i, m].tolist()]
        expected[-1] += min(max(scores[i].item(), -5.0), 5.0)
        assert rewards[i, m].tolist() == pytest.approx(expected)
    assert not rewards[~MASK].any()


def test_the_losses_are_their_formulas_over_sampled_tokens():
    new, old, advantages, returns = random_tensors(4)
    losses = []
    errors = []
    columns = [x[MASK].tolist() for x in (new, old, advantages, returns)]
    for p, q, advantage, target in zip(*columns):
        ratio = math.exp(p - q)
        losses.append(max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)))
        clipped = q + min(max(p - q, -0.3), 0.3)
        errors.append(0.5 * max((p - target) ** 2, (clipped - target) ** 2))
    loss = ppo.actor_loss(new, old, advantages, MASK, 0.2).item()
    assert loss == pytest.approx(np.mean(losses))
    assert ppo.critic_loss(new, old, returns, MASK, 0.3).item() == pytest.approx(np.mean(errors))
    assert not ppo.whiten(advantages, MASK & False).any(), "no token at all: no NaN"
    far = torch.tensor([[0.0, -300.0]])
    loss = ppo.actor_loss(far, far.flip(1), -torch.ones(1, 2), torch.ones(1, 2), 0.2).item()
    assert loss == pytest.approx((math.exp(20) + 0.8) / 2, rel=1e-5), "no ratio is infinite"


# ---- the phases, one by one


def test_epochs_end_once_the_policy_has_moved_a_tenth_of_a_nat_and_ema_takes_real_steps_only(
        monkeypatch):
    utils.init_distributed(0)
    ones = torch.ones(MASK.shape)
    lengths = torch.full((6,), 7)
    batch = ppo.Batch(torch.zeros(6, 9).long(), lengths - 5, lengths, MASK, MASK[:, 0], 0 * ones,
                      old_logprobs=-ones, advantages=ones)
    changes = [0.3, 0.41, 0.45, 0.0]  # of log-probabilities: exp(0.42) - 1 - 0.42 > 0.1
    tables = [x - ones for x in changes]

    def actor(*inputs):
        logprobs = tables.pop(0)
        return logprobs, -logprobs

    actor.backward = lambda loss: None
    updates = []
    norms = [1.0, None, 2.0, 3.0]  # the second step was skipped
    monkeypatch.setattr(utils, "step", lambda *engines: [norms.pop(0)])
    ema = SimpleNamespace(update=lambda: updates.append(1))
    metrics = ppo.update(batch, [np.arange(6)] * 4, actor, None, ema, None, ppo.Config(), 6, 1)
    assert len(tables) == 1, "the fourth step was not taken"
    assert len(updates) == 2
    assert metrics["engine_gap_max"] == metrics["engine_gap_mean"] == pytest.approx(1)


def test_a_rollout_says_what_was_sampled_and_its_texts_hold_all_tokens_but_the_end(tok):
    utils.init_distributed(0)
    end, pad = tok.eos_token_id, tok.pad_token_id  # <pad>: a special token that a policy may say
    prompts = [tok(text)["input_ids"] for text in ("a", "bc<pad>", "d")]
    answers = [[33, 34, pad, end], [35], [97]]
    order = [1, 0, 2]
    rows = data.Rows()
    for i, prompt in enumerate(prompts):
        rows.add(prompt, [], [], {"target": 10 * i}, 0)
    said = []

    def generate(own, *arguments, **more):
        said.extend([own, *arguments, *more.values()])
        lens = torch.tensor([1, 4, 1])
        tokens, lengths = data.pad([np.array(prompts[i] + answers[i]) for i in order])
        sampled = torch.arange(4) < lens[:, None]
        return hybrid_engine.Rollout(tokens, lengths - lens, lens, -1.0 * sampled, sampled)

    sampler = SimpleNamespace(generate=generate, release=lambda: said.append("released"))
    cfg = ppo.Config(max_new_tokens=4, temperature=0.7)
    batch = ppo.rollout(sampler, rows, np.array(order), [5, 6, 7], cfg, tok, [end, 97])
    own = [prompts[i] for i in order]
    assert said == [own, 4, 0.7, [end, 97], [5, 6, 7], "released"], "training needs its memory"
    assert batch.finished.tolist() == [False, True, True], "either of the two ids ends an answer"
    assert batch.columns == {
        "prompts": ["bc<pad>", "a", "d"], "completions": ["D", "BC<pad>", ""],
        "completion_ids": [answers[i] for i in order], "target": [10, 0, 20]}


def test_a_reward_function_gets_by_name_what_its_signature_names():
    columns = {"prompts": ["p", "q"], "completions": ["", "xy"], "answer": [["a"], ["b"]]}

    def two_names(completions, answer):
        answer[0].append("changed")
        return [len(c) for c in completions]

    async def all_of_them(prompts, **fields):
        assert set(fields) == {"completions", "answer"}
        return iter([None, 2.5])

    assert ppo.call_function(two_names, columns) == [0, 2]
    assert columns["answer"] == [["a"], ["b"]], "it gets a copy"
    first, second = ppo.call_function(all_of_them, columns)
    assert math.isnan(first) and second == 2.5
    with pytest.raises(utils.UserError, match="1 scores, 2 answers"):
        ppo.call_function(lambda prompts: [1.0], columns)


def model_with(**config):
    """What normalize reads of a model: its config."""
    return SimpleNamespace(lm=SimpleNamespace(config=SimpleNamespace(**config)))


def test_rewards_without_a_scale_get_that_of_the_first_evaluation_and_so_does_a_foreign_critic():
    ours = model_with(score_scale=2.0, score_offset=1.0)
    critic = model_with(score_offset=7.0)
    scorers = [ppo.Scorer("", "ours", 1.0, ours), ppo.Scorer("", "foreign", 0.5, model_with())]
    for name, weight in (("rule", -1.0), ("logged", 0.0), ("one", 1.0), ("silent", 1.0)):
        scorers.append(ppo.Scorer("", name, weight, function=len))
    statistics = dict(ours=(3, 3), foreign=(-30, 8), rule=(0.5, 0.1), logged=(2, 4), one=(1, 1e-8),
                      critic=(-30, 8))
    before = {f"eval_{name}": mean for name, (mean, _) in statistics.items()}
    before |= {f"eval_{name}_std": std for name, (_, std) in statistics.items()}
    ppo.normalize(scorers, critic, before)
    assert [(s.mean, s.std) for s in scorers] == [
        (0, 1), (-30, 8), (0.5, 0.1), (0, 1), (1, 1), (0, 1)]
    assert critic.lm.config.score_offset == -23, "logit - offset is a score: (score + 30) / 8"
    assert critic.lm.config.score_scale == 1 / 8
    ppo.normalize(scorers[:1], ours, before)
    assert (ours.lm.config.score_offset, ours.lm.config.score_scale) == (1, 2)


def test_scores_that_are_equal_but_for_rounding_teach_nothing():
    rule = ppo.Scorer("", "rule", 1.0, function=len)
    for mean, std in ((0.0, 0.0), (-30.0, 3e-6), (0.1, math.nan), (1e-17, 5e-17)):
        with pytest.raises(utils.UserError, match="same score"):
            ppo.normalize([rule], None, {"eval_rule": mean, "eval_rule_std": std})
    for mean, std in ((-30.0, 0.01), (1e-4, 1e-4)):
        ppo.normalize([rule], None, {"eval_rule": mean, "eval_rule_std": std})
        assert rule.std == std


def test_micro_batches_are_the_longest_first_and_ranks_have_about_as_many_tokens(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 40)
    rows = rng.permutation(40)[:24]
    loads = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        parts = utils.split_micro_batches(rows, lengths, 5)
        assert [len(part) for part in parts] == [5, 3]
        own = lengths[np.concatenate(parts)]
        assert (np.diff(own) <= 0).all(), "if memory is short, at once"
        loads.append(own.sum())
    assert max(loads) - min(loads) < lengths.max()
    assert utils.micro_batch_size(24, 99) == (8, 1)
    assert utils.micro_batch_size(24, 5) == (5, 2)


def test_the_learning_rate_warms_up_over_3_percent_of_the_steps_and_falls_to_a_tenth():
    schedule = [utils.cosine_schedule(step, 200) for step in range(200)]
    assert schedule[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert schedule[103] == pytest.approx(0.55), "half-way down"
    assert utils.cosine_schedule(0, 1) == 1, "a single step is a whole one"


# ---- 6. the three scripts a second time: float64, row by row, written from the papers


def lm_of(folder):
    """A causal LM in float64, read with transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()


class ExactRewardModel:
    """A folder of reward.py, read with transformers alone."""

    def __init__(self, folder):
        lm = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        self.model = lm.double().eval()
        self.offset = self.model.config.score_offset
        self.scale = self.model.config.score_scale

    def __call__(self, tokens):
        """The value of each prefix of a row."""
        hidden = self.model.model(torch.tensor([tokens])).last_hidden_state[0]
        return (self.model.score(hidden)[:, 0] - self.offset) * self.scale


def exact_logprobs(lm, prompt, answer, temperature=1.0):
    """Log-probability of each answer token, and the entropy where it was chosen."""
    logits = lm(torch.tensor([[*prompt, *answer]])).logits[0] / temperature
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, torch.tensor(np.array(answer, int))[:, None])[:, 0], entropy


class Adam(torch.optim.Adam):
    """On a gradient that is clipped to norm 1."""

    def __init__(self, model, eps):
        super().__init__(model.parameters(), betas=(0.9, 0.99), eps=eps)

    def take(self, loss, lr):
        """One step. Returns the norm of the gradient before it is clipped."""
        [group] = self.param_groups
        group["lr"] = lr
        self.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.step()
        return norm.item()


def distance(model, other, start):
    """How far apart two models' weights are, as a share of the way from where they started."""
    p, q, s = (torch.cat([x.flatten() for x in m.parameters()]) for m in (model, other, start))
    return ((p - q).norm() / (q - s).norm()).item()


def rows_of_step(source, step, tok):
    """The rows of a step: (train, held out, the indices of each batch of 8)."""
    train, held_out = data.load(source, step, "", 0.2, tok, [tok.eos_token_id], 64)
    batches = data.steps(train, train.lengths(), 8, 1)
    return train, held_out, (indices for _, indices in batches)


def test_sft_takes_the_steps_of_a_second_version(chain, toy_file, tok, tmp_path):
    start = chain["sft"][0]
    metrics = train(sft, tmp_path / "sft", **COMMON, model=start, data=toy_file, epochs=0.22,
                    micro_batch=3, lr=1e-3)
    lm = lm_of(start)
    adam = Adam(lm, 1e-8)
    rows, held_out, batches = rows_of_step(toy_file, "sft", tok)

    def loss_of(rows, indices):  # over all answer tokens
        logprobs = [exact_logprobs(lm, rows.prompts[i], rows.answers[i][0])[0] for i in indices]
        return -torch.cat(logprobs).mean()

    for step, (row, indices) in enumerate(zip(metrics, batches)):
        loss = loss_of(rows, indices)
        lr = 1e-3 * utils.cosine_schedule(step, len(metrics))
        norm = adam.take(loss, lr)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert row["lr"] == pytest.approx(lr)
    assert len(metrics) == 5
    assert distance(lm_of(tmp_path / "sft"), lm, lm_of(start)) < 5e-4
    with torch.no_grad():
        loss = loss_of(held_out, range(len(held_out))).item()
    assert metrics[-1]["held_out_loss"] == pytest.approx(loss, rel=1e-4)


def ranked_rows():
    """Rows of 2 to 5 answers, the best first, with ties."""
    for i, row in enumerate(itertools.islice(data.toy(), 160)):
        right = row["chosen"]
        answers = [right, right + "ab", "b" + right, row["rejected"] + "c", right + "d"]
        n = 2 + i % 4
        yield {"prompt": row["prompt"], "answers": answers[:n], "ranks": [1, 2, 2, 3, 4][:n]}


def test_reward_takes_the_steps_of_a_second_version(chain, tok, tmp_path):
    """With 8 rows of a step in micro batches of 3, 3 and 2, so that a wrong weight shows."""
    path = write_rows(tmp_path / "rankings.jsonl", ranked_rows())
    metrics = train(reward, tmp_path / "reward", **COMMON, model=chain["sft"][0], data=path,
                    epochs=0.3, micro_batch=3, lr=1e-3)
    utils.init_distributed(1)  # the seed of the run: the head is drawn again
    start = reward.RewardModel.from_lm(chain["sft"][0], torch.float32)
    start.lm.config.score_offset = 0.0
    start.lm.save_pretrained(tmp_path / "start")
    model = ExactRewardModel(tmp_path / "start")
    adam = Adam(model.model, 1e-8)
    rows, held_out, batches = rows_of_step(path, "reward", tok)

    def judge(rows, indices):
        """For each row: its scores and the margins of its comparisons."""
        for i in indices:
            scores = [model([*rows.prompts[i], *answer])[-1] for answer in rows.answers[i]]
            pairs = itertools.combinations(zip(rows.ranks[i], scores), 2)
            margins = [better - worse for (a, better), (b, worse) in pairs if a < b]
            yield torch.stack(scores), torch.stack(margins)

    def compare(judged, found, prefix=""):
        """Returns the loss."""
        margins = [m for _, m in judged]
        loss = torch.stack([torch.log1p((-m).exp()).mean() for m in margins]).mean()
        margin = np.mean([m.mean().item() for m in margins])
        accuracy = np.mean([(m > 0).double().mean() for m in margins])
        assert found[f"{prefix}loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert found[f"{prefix}margin"] == pytest.approx(margin, rel=1e-3, abs=1e-5)
        assert found[f"{prefix}accuracy"] == pytest.approx(accuracy, abs=1e-5)
        return loss

    for step, (row, indices) in enumerate(zip(metrics, batches)):
        judged = list(judge(rows, indices))
        levels = torch.stack([2 * scores.mean() for scores, _ in judged])
        loss = compare(judged, row) + 0.003 * levels.square().mean()  # Eisenstein et al. 2023
        lr = 1e-3 * utils.cosine_schedule(step, len(metrics))
        assert row["grad_norm"] == pytest.approx(adam.take(loss, lr), rel=1e-4)
    assert len(metrics) == 4
    saved = ExactRewardModel(tmp_path / "reward")
    assert distance(saved.model, model.model, start.lm) < 1e-3
    with torch.no_grad():
        compare(list(judge(held_out, range(len(held_out)))), metrics[-1], "held_out_")
        known = [scores for scores, _ in judge(rows, range(len(rows)))]
    best = np.mean([scores[0].item() for scores in known])
    assert saved.offset == pytest.approx(best, abs=1e-4)
    assert saved.scale == pytest.approx(1 / torch.cat(known).std(unbiased=False).item(), rel=1e-3)


EXACT = dict(
    batch_size=16, minibatches=2, ppo_epochs=2, micro_batch=3, iterations=2, max_new_tokens=8,
    temperature=0.8, actor_lr=1e-3, critic_lr=5e-4, kl_coef=0.2, ema=0.7, ptx_coef=0.5, seed=1)
RULES = """
def letters(completions):  # it abstains on long answers
    return [len(c) if len(c) < 8 else None for c in completions]
"""


def means(parts):
    return {name: torch.cat([part[name] for part in parts]).mean() for name in parts[0]}


class ExactPPO:
    """PPO on given answers. A row has prompt ids, answer ids, and a mask (a,) of the answer's
    tokens that the policy sampled; all other tensors are of sampled tokens."""

    def __init__(self, sft_folder, reward_folder, tok):
        self.actor, self.ref, self.ema = (lm_of(sft_folder) for _ in range(3))
        self.critic, self.reward_model = (ExactRewardModel(reward_folder) for _ in range(2))
        self.actor_adam = Adam(self.actor, 1e-5)
        self.critic_adam = Adam(self.critic.model, 1e-5)
        self.tok = tok

    def logprobs(self, lm, row):
        both = exact_logprobs(lm, row.prompt, row.answer, EXACT["temperature"])
        return [x[row.mask] for x in both]

    def values(self, row):
        """The critic's, of the state before each token."""
        return self.critic(row.prompt + row.answer)[len(row.prompt) - 1 : -1][row.mask]

    def letters(self, row):
        """The second reward: None or the number of letters, of all tokens but the last end."""
        count = len(self.tok.decode([x for x in row.answer if x != self.tok.eos_token_id]))
        return count if count < 8 else None

    @torch.no_grad()
    def judge(self, rows):
        """What each token was worth. Returns what is logged."""
        scores = []
        for row in rows:
            row.old_logprobs, _ = self.logprobs(self.actor, row)
            row.old_values = self.values(row)
            log_ratio = row.old_logprobs - self.logprobs(self.ref, row)[0]
            row.kl = log_ratio.sum().item()
            score = self.reward_model(row.prompt + row.answer)[-1].item()
            letters = self.letters(row)
            scores.append(score + 0.3 * (letters or 0))
            if letters is not None:
                score += 0.3 * (letters - self.mean) / self.std
            if row.answer[-1] != self.tok.eos_token_id:
                score -= 1
            rewards = (-EXACT["kl_coef"] * log_ratio).tolist()
            rewards[-1] += min(max(score, -5.0), 5.0)
            advantages = naive_gae(row.old_values.tolist(), rewards, gamma=1.0, lam=0.95)
            row.advantages = torch.tensor(advantages, dtype=torch.float64)
            row.returns = row.advantages + row.old_values
        raw = torch.cat([row.advantages for row in rows])
        for row in rows:
            row.advantages = (row.advantages - raw.mean()) / raw.std(unbiased=False)
        returns = torch.cat([row.returns for row in rows])
        errors = torch.cat([row.old_values for row in rows]) - returns
        return {
            "score": np.mean(scores), "score_std": np.std(scores, ddof=1),
            "kl": np.mean([row.kl for row in rows]),
            "advantage_mean": raw.mean().item(), "advantage_std": raw.std().item(),
            "explained_variance": 1 - (errors.var() / returns.var()).item(),
        }

    def token_losses(self, row):
        """The losses of a row's tokens, and what is logged of them."""
        logprobs, entropy = self.logprobs(self.actor, row)
        ratio = (logprobs - row.old_logprobs).exp()
        gain = torch.minimum(ratio * row.advantages, ratio.clamp(0.8, 1.2) * row.advantages)
        values = self.values(row)
        change = values - row.old_values
        clipped = row.old_values + change.clamp(-0.2, 0.2)
        errors = [(v - row.returns).square() for v in (values, clipped)]
        return {
            "actor_loss": -gain, "critic_loss": torch.maximum(*errors) / 2,
            "entropy": entropy, "ratio_mean": ratio, "approx_kl": ratio - 1 - ratio.log(),
            "clip_frac": ((ratio - 1).abs() > 0.2).double(),
            "value_clip_frac": (change.abs() > 0.2).double(),
        }

    def iteration(self, number, rows, texts):
        """Two epochs of two optimizer steps of actor and critic. Returns its metrics. texts: a
        generator of the mixture's rows for each step."""
        lr_scale = 1 - (number - 1) / EXACT["iterations"]
        metrics = self.judge(rows)
        seen = []
        shuffled = np.random.default_rng([1, number, 1]).permutation(len(rows))
        for indices in np.split(np.r_[: len(rows), shuffled], 4):
            parts = [self.token_losses(rows[i]) for i in indices]
            seen += parts
            losses = means(parts)
            text = torch.cat([exact_logprobs(self.actor, *row)[0] for row in next(texts)])
            actor_loss = losses["actor_loss"] - EXACT["ptx_coef"] * text.mean()
            metrics["actor_grad_norm"] = self.actor_adam.take(
                actor_loss, EXACT["actor_lr"] * lr_scale)
            metrics["critic_grad_norm"] = self.critic_adam.take(
                losses["critic_loss"], EXACT["critic_lr"] * lr_scale)
            with torch.no_grad():
                for average, p in zip(self.ema.parameters(), self.actor.parameters()):
                    average.lerp_(p, 1 - EXACT["ema"])
        metrics["ratio_max"] = max(part["ratio_mean"].max().item() for part in seen)
        return metrics | {name: x.item() for name, x in means(seen).items()}


def token_rows(batch):
    """A Batch's rows for ExactPPO."""
    rows = zip(rows_of(batch), batch.prompt_lens, batch.answer_lens, batch.mask)
    return [SimpleNamespace(prompt=row[:start], answer=row[start:], mask=mask[:count])
            for row, start, count, mask in rows]


def texts_of_many_lengths():
    """60 rows of plain text, from 4 to 50 characters."""
    line = "the line of a text that goes on for a while, or not"
    return [{"text": f"{i} {line[: 2 + i * 7 % 47]}"} for i in range(60)]


def record_rollouts(monkeypatch, change=lambda batch: None):
    """A list that ppo.rollout will fill: (seeds, Batch) of each call."""
    calls = []
    real = ppo.rollout

    def rollout(sampler, rows, indices, seeds, *arguments):
        calls.append((list(seeds), real(sampler, rows, indices, seeds, *arguments)))
        change(calls[-1][1])
        return calls[-1][1]

    monkeypatch.setattr(ppo, "rollout", rollout)
    return calls


def test_ppo_takes_the_steps_of_a_second_version(chain, toy_file, tok, tmp_path, monkeypatch):
    """Two iterations of two epochs of two minibatches, each in micro batches of 3, 3 and 2, with a
    reward model, a function that abstains, a mixture and an EMA. In the second rollout the second,
    fifth, ... token of each answer is not the policy's."""
    def punch_holes(batch):
        if len(calls) == 4:  # there is an evaluation before each rollout
            batch.mask &= torch.arange(batch.mask.size(1)) % 3 != 1

    calls = record_rollouts(monkeypatch, punch_holes)
    monkeypatch.setattr(ppo, "STOP_KL", 1e9)
    (tmp_path / "rules.py").write_text(RULES)
    start, reward_folder = chain["sft"][0], chain["reward"][0]
    text = write_rows(tmp_path / "text.jsonl", texts_of_many_lengths())
    metrics = train(
        ppo, tmp_path / "ppo", **EXACT, held_out=0.2, max_len=64, data=toy_file, model=start,
        ptx_data=text, reward=f"{reward_folder},{tmp_path}/rules.py:letters:0.3")

    second = ExactPPO(start, reward_folder, tok)
    evaluated = [second.letters(row) for row in token_rows(calls[0][1])]
    judged = [count for count in evaluated if count is not None]
    assert None in evaluated
    second.mean = np.mean(judged)
    second.std = np.std(judged, ddof=1)
    rows, _, batches = rows_of_step(text, "sft", tok)
    texts = ([(rows.prompts[i], rows.answers[i][0]) for i in indices] for indices in batches)
    for number, batch in ((1, calls[1][1]), (2, calls[3][1])):
        expected = second.iteration(number, token_rows(batch), texts)
        for name, value in expected.items():
            assert metrics[number][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
        assert min(expected["clip_frac"], expected["value_clip_frac"]) > 0.02, "clips do something"
    assert distance(lm_of(tmp_path / "ppo"), second.actor, lm_of(start)) < 1e-4
    assert distance(lm_of(tmp_path / "ppo" / "ema"), second.ema, lm_of(start)) < 1e-4


# ---- 7. the three steps, run

RULES_OF_RUNS = """
def short(completions, **fields):
    return [-len(c) for c in completions]

def near(completions, target, **fields):
    assert "prompts" in fields
    return [-abs(len(c) - t) for c, t in zip(completions, target)]

def picky(prompts, completions):
    return [len(c) if "sort" in p else None for p, c in zip(prompts, completions)]
"""


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "rules.py").write_text(RULES_OF_RUNS)
    return str(tmp_path / "rules.py")


@pytest.fixture
def flags(chain, toy_file):
    """PPO from the models of `chain`: one iteration of one step of 16 answers, without EMA."""
    return dict(COMMON, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file,
                batch_size=16, iterations=1, minibatches=1, max_new_tokens=8, ema=0.0)


def test_every_iteration_logs_what_its_readers_need(chain):
    folder, metrics = chain["ppo"]
    assert len(metrics) == 4, "the evaluation before training, and three iterations"
    table = (HERE / "README.md").read_text().partition("## What you see")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [re.sub("NAME|…", ".+", x) for x in re.findall(r"`([\w…]+)`", " ".join(cells))]
    for row, prefixes in ((metrics[0], "eval"), (metrics[1], "(?!eval)"), (metrics[3], "")):
        for name in names:
            if re.match(prefixes, name) and "ema" not in name * (row is metrics[0]):
                assert any(re.fullmatch(name, column) for column in row), name
        for column in set(row) - {"step"}:
            assert any(re.fullmatch(name, column) for name in names), column
    samples = [row for row in read_lines(f"{folder}/samples.jsonl") if row["step"] == 3]
    assert len(samples) == 8
    for name, column in (("score", "score"), ("kl", "kl"), ("eos_rate", "eos"),
                         ("length", "tokens"), ("score_reward", "reward")):
        mean = np.mean([sample[column] for sample in samples])
        assert metrics[3][name] == pytest.approx(mean, abs=1e-3), name

    lists = {"response_tokens", "mask", "logprobs", "ref_logprobs", "values", "token_rewards",
             "advantages", "returns"}
    rows = read_lines(f"{folder}/tokens.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    for row in rows:
        assert set(row) == lists | {"step", "prompt", "reward"}
        assert {len(row[name]) for name in lists} == {len(row["response_tokens"])}
        kl = np.array(row["logprobs"]) - row["ref_logprobs"]
        assert row["token_rewards"][:-1] == pytest.approx(-0.05 * kl[:-1], abs=1e-5)


def test_what_is_rewarded_becomes_likelier(flags, rules, tmp_path):
    more = dict(batch_size=32, iterations=10, minibatches=2, actor_lr=3e-3)
    metrics = train(ppo, tmp_path / "ppo", **flags | more | dict(reward=f"{rules}:short"))
    assert metrics[-1]["score"] > metrics[1]["score"] + 1


def test_an_answer_that_no_reward_judged_is_left_out_and_counted(
        flags, rules, tmp_path, monkeypatch):
    calls = record_rollouts(monkeypatch)
    more = dict(reward=f"{rules}:picky,{rules}:short:0", micro_batch=2)
    row = train(ppo, tmp_path / "p", **flags | more)[1]
    batch = calls[1][1]
    judged = ["sort" in prompt for prompt in batch.columns["prompts"]]
    assert 0 < sum(judged) < 8, "some micro batches have none"
    assert batch.mask.any(1).tolist() == judged
    assert not batch.advantages[~torch.tensor(judged)].any()
    lengths = [len(c) for c, is_judged in zip(batch.columns["completions"], judged) if is_judged]
    assert row["unjudged"] == 16 - sum(judged)
    assert row["score"] == row["score_picky"] == pytest.approx(np.mean(lengths))
    assert row["skipped"] == 0 and row["actor_grad_norm"] > 0
    samples = read_lines(tmp_path / "p" / "samples.jsonl")
    assert ["picky" in sample for sample in samples] == judged


def test_rewards_are_logged_apart_under_names_of_their_own(flags, rules, tmp_path):
    folder = flags["reward"]
    rows = [{"prompt": f"copy {i}", "target": i % 7} for i in range(120)]
    more = dict(data=write_rows(tmp_path / "rows.jsonl", rows),
                reward=f"{folder}:0.5,{folder}:-2,{rules}:near:0.25,data.py:toy_correct:0")
    metrics = train(ppo, tmp_path / "p", **flags | more)
    assert not any("toy_correct" in name for row in metrics for name in row), "it judged nothing"
    for sample in read_lines(tmp_path / "p" / "samples.jsonl"):
        number = int(re.search(r"copy (\d+)", sample["prompt"])[1])
        assert sample["near"] == -abs(len(sample["answer"]) - number % 7), "its row's own field"
        total = 0.5 * sample["reward"] - 2 * sample["reward_"] + 0.25 * sample["near"]
        assert sample["score"] == pytest.approx(total, abs=1e-3)


def test_a_foreign_critic_has_the_scale_in_which_ppo_sees_the_score(flags, tmp_path, monkeypatch):
    foreign = shutil.copytree(flags["reward"], tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    del config["score_offset"], config["score_scale"]
    (foreign / "config.json").write_text(json.dumps(config))
    calls = record_rollouts(monkeypatch)
    before, metrics = train(ppo, tmp_path / "p", **flags | dict(reward=str(foreign)))
    batch = calls[1][1]
    raw = reward.RewardModel.from_pretrained(foreign, torch.float32)
    with torch.no_grad():
        values = ppo.answer_values(raw, batch)
    mean, std = before["eval_critic"], before["eval_critic_std"]
    assert abs(std - 1) > 0.1, "it has a scale of its own"
    expected = (values - mean) / std * batch.mask
    torch.testing.assert_close(batch.values, expected, rtol=1e-3, atol=1e-3)
    assert (before["eval_foreign"], before["eval_foreign_std"]) == pytest.approx((mean, std))
    assert metrics["score"] == pytest.approx(batch.scores["foreign"].mean().item()), "raw"


def test_the_critic_starts_from_the_flag_else_the_first_reward_that_counts_else_a_new_head(
        tok, monkeypatch):
    monkeypatch.setattr(ppo, "load_reward_model", lambda path, *arguments: path)

    def start(*scorers, critic=""):
        cfg = ppo.Config(model="tiny", critic=critic)
        return ppo.load_critic(cfg, scorers, tok, torch.float32)

    rule = ppo.Scorer("rules.py:f", "f", 1.0, function=len)
    logged = ppo.Scorer("logged", "logged", 0.0, model=1)
    counts = ppo.Scorer("counts", "counts", 1.0, model=1)
    assert start(rule, logged, counts) == "counts"
    assert start(rule, logged, counts, critic="flag") == "flag"
    new = start(rule, logged).lm
    assert new.config.score_scale == 1.0, "a new head is no foreign one"
    assert new.score.weight.std().item() == pytest.approx(129**-0.5, rel=0.2)


def test_learning_rates_fall_linearly_to_a_tenth_and_the_actors_is_0_in_the_warm_up_of_the_critic(
        flags, tmp_path, monkeypatch):
    rates = defaultdict(list)
    monkeypatch.setattr(utils, "set_lr", lambda engine, lr: rates[type(engine.module)].append(lr))
    more = dict(batch_size=2, iterations=12, max_new_tokens=2, critic_warmup=2)
    metrics = train(ppo, tmp_path / "p", **flags | more)
    shares = [max(0.1, 1 - done / 12) for done in range(12)]
    actor = [0, 0] + [3e-4 * share for share in shares[2:]]
    assert rates[sft.Policy] == pytest.approx(actor)
    assert rates[reward.RewardModel] == pytest.approx([1e-3 * share for share in shares])
    assert [row["actor_lr"] for row in metrics[1:]] == pytest.approx(actor), "what was used"
    evaluated = [row["step"] for row in metrics if "eval_score" in row]
    assert evaluated == [0, 3, 6, 9, 12], "four, besides the one at its start"


@pytest.mark.parametrize("minibatches, gradient_checkpointing", [(1, False), (2, True)])
def test_the_first_ratio_is_exactly_one_at_any_temperature(
        minibatches, gradient_checkpointing, flags, tmp_path):
    flags = flags | dict(temperature=0.7, micro_batch=3, minibatches=minibatches)
    row = train(ppo, tmp_path / "p", **flags, actor_lr=1e-12,
                gradient_checkpointing=gradient_checkpointing)[1]
    assert row["ratio_max"] == row["ratio_mean"] == 1
    assert row["clip_frac"] == row["approx_kl"] == 0
    assert abs(row["kl"]) < 1e-5, "the reference has the temperature in it too"
    assert row["engine_gap_max"] < 1e-4, "and so has the sampler"


def test_rollouts_are_in_random_order_and_answers_to_a_prompt_stand_side_by_side_and_differ(
        flags, tmp_path, monkeypatch):
    calls = record_rollouts(monkeypatch)
    for seed in (1, 2):
        more = dict(iterations=2, answers_per_prompt=4, seed=seed)
        train(ppo, tmp_path / f"{seed}", **flags | more)
    rollouts = [call for call in calls if len(call[0]) == 16]
    assert len({seed for seeds, _ in rollouts for seed in seeds}) == 4 * 16, "each has its own"
    evaluations = [seeds for seeds, _ in calls if len(seeds) != 16]
    assert all(seeds == evaluations[0] for seeds in evaluations), "always the same"
    for _, batch in rollouts:
        prompts = np.array(batch.columns["prompts"]).reshape(4, 4)
        assert (prompts == prompts[:, :1]).all() and len(set(prompts[:, 0])) == 4
        answers = np.array(batch.columns["completions"]).reshape(4, 4)
        assert all(len(set(group)) > 1 for group in answers)
    lengths = [batch.prompt_lens.tolist() for _, batch in rollouts]
    assert any(x != sorted(x) for x in lengths), "all minibatches are alike"


def test_a_reward_model_of_another_chat_template_or_tokenizer_is_refused_a_foreign_one_named(
        small, toy_file, tmp_path, capsys):
    """Two bases of which only one is given the template."""
    common = dict(COMMON, model=small, data=toy_file, epochs=0.1)
    for script, name in ((sft, "sft"), (reward, "same")):
        train(script, tmp_path / name, template="Q: {prompt}\nA:", **common)
    train(reward, tmp_path / "rm", **common)
    tok = utils.load_tokenizer(str(tmp_path / "sft"))

    def load(name):
        return reward.load_reward_model(str(tmp_path / name), torch.float32, "x", tok)

    load("same")
    with pytest.raises(utils.UserError, match="rm has another chat template .*x; .*--template"):
        load("rm")
    (tmp_path / "rm" / "run.json").unlink()
    capsys.readouterr()
    load("rm")
    assert "rm has another chat template than --model x" in capsys.readouterr().out
    tok.add_tokens(["<more>"])
    with pytest.raises(utils.UserError, match="same has another tokenizer than --model x"):
        load("same")


def test_ids_without_a_word_are_never_sampled(toy_file, tok, rules, tmp_path, monkeypatch):
    """A model whose vocabulary is padded from 258 to 320 ids."""
    torch.manual_seed(0)
    config = utils.tiny_config()
    config.update(dict(hidden_size=64, num_hidden_layers=2, vocab_size=320, initializer_range=0.2))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "padded")
    tok.save_pretrained(tmp_path / "padded")
    calls = record_rollouts(monkeypatch)
    metrics = train(ppo, tmp_path / "ppo", model=str(tmp_path / "padded"), data=toy_file,
                    reward=f"{rules}:short", iterations=1, max_new_tokens=8, **COMMON)
    assert metrics[1]["engine_gap_max"] < 1e-4, "sampler and trainer agree"
    assert max(batch.tokens.max() for _, batch in calls) < 258


# ---- 8. DeepSpeed engines, optimizer steps, EMA


def two_answers(device="cpu"):
    """What a Policy is called with."""
    return [torch.tensor(x, device=device) for x in (ragged([12, 12]), [5, 5], [7, 7])]


def backward(engine, scale=1.0):
    """The gradient of the mean log-probability of two answers."""
    logprobs, _ = engine(*two_answers(engine.device))
    engine.backward(-scale * logprobs.mean())


def masters(engine):
    """The float32 weights that the optimizer updates on this rank."""
    return [p.detach() for p in utils.EMA(engine, 0).masters()]


@pytest.mark.parametrize("zero", some((0, 3), (0, 1, 2, 3)))
def test_the_optimizer_is_adam_with_its_two_decays_its_epsilon_and_gradients_of_norm_one(zero):
    """Two steps that PyTorch takes without DeepSpeed."""
    plain = sft.Policy(model_of("llama"))
    adam = Adam(plain, eps=1e-3)
    engine = engine_of(lr=1e-2, eps=1e-3, zero=zero)
    for scale in (100, 0.01):
        logprobs, _ = plain(*two_answers())
        norm = adam.take(-scale * logprobs.mean(), lr=1e-2)
        assert (norm > 1) == (scale == 100), "clipped, and not"
        backward(engine, scale)
        assert utils.step(engine)[0] == pytest.approx(norm, rel=1e-4)
        got, want = [sum(state["exp_avg_sq"].sum().item() for state in optimizer.state.values())
                     for optimizer in (engine.basic_optimizer, adam)]
        assert got == pytest.approx(want, rel=1e-3)
    state = utils.whole_state_dict(engine.module.lm)
    for name, p in plain.lm.named_parameters():
        torch.testing.assert_close(state[name], p.data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("zero", some((2,), (0, 2, 3)))
def test_in_bfloat16_a_first_step_is_whole_and_gradients_are_added_in_float32(zero):
    norms = []
    for micro_batches in (1, 16):
        engine = engine_of(dtype="bf16", zero=zero, micro_batches=micro_batches)
        frequencies = engine.module.lm.model.rotary_emb.inv_freq
        assert torch.equal(frequencies, model_of("llama").model.rotary_emb.inv_freq)
        before = [p.clone() for p in masters(engine)]
        for _ in range(micro_batches):  # all the same: in bfloat16, the sum is off by a percent
            backward(engine)
            norm = utils.step(engine)
        norms += norm
        moved = torch.cat([(p - q).flatten().abs() for p, q in zip(before, masters(engine))])
        assert moved.quantile(0.9).item() == pytest.approx(1e-3, rel=0.01), "as long as the rate"
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def follow_a_walk(zero, out):
    """An EMA follows a random walk of the float32 weights, with a drift; then it is saved."""
    engine = engine_of(model_of("gpt2", vocab_size=258), dtype="bf16", zero=zero)
    ema = utils.EMA(engine, 0.99)
    want = [p.double() for p in masters(engine)]
    rng = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(200):
        for p, w in zip(masters(engine), want):
            p += 1e-3 * (torch.randn(p.shape, generator=rng) + 0.3)
            w.mul_(0.99).add_(0.01 * p.double())
        ema.update()
    for got, w in zip(ema.average, want):
        assert (got - w).norm() / w.norm() < 1e-5
    with ema.in_place():
        pass  # the model follows: so far, the optimizer's weights have walked alone
    before = [x.clone() for x in (*masters(engine), *ema.average, engine(*two_answers())[0])]
    with ema.in_place():
        logprobs = engine(*two_answers())[0]
        utils.save_model(engine.module.lm, utils.load_tokenizer("tiny"), [257], out)
    for x, y in zip(before, (*masters(engine), *ema.average, engine(*two_answers())[0])):
        assert torch.equal(x, y)
    saved = sft.Policy(load_lm(out, torch.bfloat16))(*two_answers())[0]
    torch.testing.assert_close(saved, logprobs)
    assert (saved - before[-1]).abs().max() > 0.01, "the average is saved, and not the weights"
    assert utils.EMA(engine, 0).average == [], "decay 0: no copy"


def test_the_ema_is_that_of_the_float32_weights_and_the_model_comes_back_to_the_bit(two, tmp_path):
    follow_a_walk(2, str(tmp_path))
    two(follow_a_walk, 3, str(tmp_path))


@pytest.mark.parametrize("zero", [0, 3])
def test_flags_reach_deepspeed_and_a_frozen_model_is_sharded_like_the_others(zero, tmp_path):
    """Checkpointing under LoRA is the harder case: the embedding is frozen."""
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 0.25, "zero_optimization": {"overlap_comm": false}}')
    trained = []
    for on in (False, True):
        lm = model_of("llama lora")
        flags = dict(gradient_checkpointing=on, offload=on, ds_config=str(path) if on else "")
        engine = engine_of(lm, zero=zero, **flags)
        forwards = []
        lm.model.layers[1].mlp.register_forward_pre_hook(lambda *_, n=forwards: n.append(1))
        backward(engine, scale=0.1)
        utils.step(engine)
        assert len(forwards) == 1 + on, "a layer runs again in the backward pass"
        assert engine.gradient_clipping() == (0.25 if on else 1.0)
        names = ("cpu_offload", "offload_optimizer")
        assert any(getattr(engine.optimizer, name, False) for name in names) == on
        assert bool(getattr(engine.optimizer, "offload_param", False)) == (on and zero == 3)
        trained.append(torch.cat([p.flatten() for p in masters(engine)]))
    torch.testing.assert_close(*trained, rtol=0, atol=2e-4)  # a step is 1e-3 long
    frozen = sft.Policy(model_of("llama"))
    frozen = utils.frozen_engine(frozen, engine.device, sft.Config(zero=zero, dtype="fp32"))
    assert not frozen(*two_answers())[0].requires_grad
    assert hasattr(frozen, "module") == (zero == 3)


def test_offloaded_frozen_models_are_on_the_device_only_while_they_are_needed():
    model = torch.nn.Linear(2, 2)
    sent_to = []
    model.to = sent_to.append  # there may be no second device to send it to
    meta = torch.device("meta")
    utils.frozen_engine(model, meta, sft.Config(offload=True))
    utils.frozen_engine(model, meta, sft.Config())
    assert sent_to == ["cpu", meta]
    with pytest.raises(KeyError), utils.on_device(meta, model, None):
        raise KeyError
    assert sent_to[2:] == [meta, "cpu"], "there, and back whatever happens"


# ---- 9. two ranks take the steps of one process


def run_script(name, out, flags):
    script = {"sft": sft, "reward": reward, "ppo": ppo}[name]
    script.main(script.Config(out=out, **flags))


def train_on(two, script, out, **flags):
    """Like train(), on two ranks."""
    two(run_script, script.__name__, str(out), flags)
    return read_lines(out / "metrics.jsonl")


def assert_same_steps(metrics, expected):
    """The same numbers, but for rounding and for time."""
    assert len(metrics) == len(expected)
    timed = re.compile(r".*_s|seconds|tokens_per_s|memory_gib|engine_gap.*")
    for row, expected_row in zip(metrics, expected):
        assert set(row) == set(expected_row)
        for name, value in expected_row.items():
            if not timed.fullmatch(name):
                assert row[name] == pytest.approx(value, rel=2e-3, abs=2e-5), (row["step"], name)


def assert_same_weights(folder, other, start):
    assert distance(lm_of(folder), lm_of(other), lm_of(start)) < 0.01


def use_collectives():
    """Rows that two ranks hold in turns, of different number and width, and an error of rank 0."""
    utils.init_distributed(1)
    rank = dist.get_rank()
    whole = torch.arange(35).view(5, 7) + 1

    def fail():
        raise utils.UserError("of rank 0")

    with pytest.raises(utils.UserError, match="of rank 0"):
        utils.on_rank0(fail)
    return utils.gather_rows(whole[rank::2, : (4, 7)[rank]]).tolist()


def test_collectives_keep_the_order_of_rows_and_tell_all_ranks_of_an_error(two):
    whole = torch.arange(35).view(5, 7) + 1
    whole[::2, 4:] = 0  # rank 0 has even rows, and needs four columns
    assert two(use_collectives) == [whole.tolist()] * 2


def test_sft_and_reward_under_zero_3_take_the_steps_of_one_process(two, chain, toy_file, tmp_path):
    """With a micro batch that does not divide a rank's share of a step; reward.py on rankings."""
    start = chain["sft"][0]
    rankings = write_rows(tmp_path / "rankings.jsonl", ranked_rows())
    for script, source in ((sft, toy_file), (reward, rankings)):
        one, out = (tmp_path / f"{script.__name__}{ranks}" for ranks in (1, 2))
        flags = dict(COMMON, model=start, data=source, epochs=0.22, lr=1e-3)
        expected = train(script, one, **flags, micro_batch=5)
        metrics = train_on(two, script, out, **flags, zero=3, micro_batch=3)
        assert_same_steps(metrics, expected)
        if script is sft:
            assert_same_weights(out, one, start)


@pytest.fixture(scope="module")
def ppo_flags(chain, toy_file, tmp_path_factory):
    """PPO of two iterations where a function leaves out most answers, so that some micro batches,
    and some ranks' parts of a step, have none."""
    rules = tmp_path_factory.mktemp("rules") / "rules.py"
    rules.write_text(RULES_OF_RUNS)
    folder = chain["reward"][0]
    return dict(COMMON, model=chain["sft"][0], reward=f"{rules}:picky,{folder}:0", critic=folder,
                data=toy_file, batch_size=16, iterations=2, minibatches=2, ppo_epochs=2,
                max_new_tokens=8, actor_lr=1e-3, critic_lr=3e-4, ema=0.5)


def test_ppo_under_zero_3_with_tensor_parallel_rollouts_takes_the_steps_of_one_process(
        two, ppo_flags, tmp_path):
    one = train(ppo, tmp_path / "one", **ppo_flags, micro_batch=4)
    assert 4 < one[1]["unjudged"] < 16 and abs(one[2]["kl"]) > 1e-3
    metrics = train_on(two, ppo, tmp_path / "two", **ppo_flags, zero=3, tp=2, micro_batch=1)
    assert_same_steps(metrics, one)
    assert max(row["engine_gap_max"] for row in metrics[1:]) < 1e-3
    for folder in (".", "ema"):
        runs = (tmp_path / run / folder for run in ("two", "one"))
        assert_same_weights(*runs, ppo_flags["model"])


def test_ppo_with_lora_zero_2_offload_checkpointing_and_a_mixture_takes_the_steps_of_one_process(
        two, ppo_flags, tmp_path, monkeypatch):
    """With LoRA the reference is the actor's base, and what is saved is a plain model."""
    text = write_rows(tmp_path / "text.jsonl", texts_of_many_lengths())
    flags = dict(ppo_flags, lora=4, ptx_data=text, actor_lr=1e-2)
    calls = record_rollouts(monkeypatch)
    one = train(ppo, tmp_path / "one", **flags)
    more = dict(zero=2, offload=True, gradient_checkpointing=True, micro_batch=3)
    metrics = train_on(two, ppo, tmp_path / "two", **flags, **more)
    assert_same_steps(metrics, one)
    assert_same_weights(tmp_path / "two", tmp_path / "one", ppo_flags["model"])

    assert abs(one[2]["kl"]) > 1e-3, "the actor has moved away from its base"
    base = load_lm(ppo_flags["model"])
    batch = [batch for seeds, batch in calls if len(seeds) == 16][1]
    for row, logprobs in zip(token_rows(batch), batch.ref_logprobs):
        expected = plain_logprobs(base, row.prompt + row.answer, len(row.prompt)).float()
        torch.testing.assert_close(logprobs[: len(expected)], expected, rtol=1e-3, atol=1e-4)


def poison(zero):
    """Steps of two engines. In the bad ones rank 1's gradient of one of them is NaN."""
    engines = [engine_of(zero=zero), engine_of(zero=zero)]
    utils.skipped.update(total=0, in_a_row=0)

    def one_step(is_bad):
        before = [masters(engine)[0].clone() for engine in engines]
        backward(engines[0])
        backward(engines[1], math.nan if is_bad and dist.get_rank() == 1 else 1.0)
        norms = utils.step(*engines)
        moved = [not torch.equal(x, masters(engine)[0]) for x, engine in zip(before, engines)]
        assert moved == [norm is not None for norm in norms] == [not is_bad] * 2

    for is_bad in (False, True, False):
        one_step(is_bad)
    assert utils.skipped == {"total": 1, "in_a_row": 0}
    with pytest.raises(utils.UserError, match="5 steps in a row .*lower --lr"):
        for _ in range(5):
            one_step(is_bad=True)
    assert utils.skipped["total"] == 6, "and not before the fifth"


@pytest.mark.parametrize("zero", some((0, 3), (0, 2, 3)))
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_engines_and_after_five_the_run(
        zero, two):
    two(poison, zero)


# ---- 10. going on: checkpoints, kills, signals, the folder of a run


class Killed(BaseException):
    """Not an Exception: as after kill -9, no handler of an error runs."""


def die():
    raise Killed


def short_run(out, total=6, at=None, digest="rows", **flags):
    """A run without training. at: {step: what is called before it}."""
    engine = engine_of(out=str(out), **flags)
    cfg = sft.Config(**{"dtype": "fp32", "out": str(out), **flags})
    utils.claim_folder(cfg)
    run = utils.Run(cfg, total, {"loss": ".3f"}, digest=digest, engine=engine, critic=None)
    start, _ = run.restore()
    for step in range(start + 1, total + 1):
        if at and step in at:
            at[step]()
        run.log(step, {"loss": step, "nan": math.nan, "none": None})
        run.save(step)
    run.finish("done")


def results(out):
    """{file: contents} of a run, without times."""
    out = Path(out)
    files = [*out.rglob("*.jsonl"), *out.rglob("*.safetensors")]
    found = {path.relative_to(out): path.read_bytes() for path in files}
    name = Path("metrics.jsonl")
    times = ("_s", "seconds", "memory_gib")
    rows = read_lines(out / name)
    found[name] = [{k: v for k, v in row.items() if not k.endswith(times)} for row in rows]
    return found


def test_ten_checkpoints_are_written_and_two_are_kept(tmp_path):
    seen = []

    def look():
        seen.append(sorted(int(p.name) for p in (tmp_path / "checkpoint").glob("*")))

    before = signal.getsignal(signal.SIGTERM)
    looks = dict.fromkeys(range(1, 30), look)
    last = {30: lambda: signal.raise_signal(signal.SIGTERM)}  # too late to stop the run
    short_run(tmp_path, total=30, at=looks | last)
    assert set(sum(seen, [])) == set(range(3, 30, 3)), "none at the end: the result is saved there"
    assert max(map(len, seen)) == 2 and seen[-1] == [24, 27]
    assert not (tmp_path / "checkpoint").exists()
    assert signal.getsignal(signal.SIGTERM) == before, "a finished run takes its handlers back"


def stop_one_rank(out):
    """A signal to rank 1 alone. Returns what this rank says at its end."""
    rank = int(os.environ["RANK"])
    with pytest.raises(utils.UserError) as error:
        short_run(out, zero=2, at={3 * rank: lambda: os.kill(os.getpid(), signal.SIGINT)})
    return str(error.value)


def test_a_signal_to_one_rank_ends_all_of_them_after_the_same_step(two, tmp_path):
    said = two(stop_one_rank, str(tmp_path))
    assert said == ["stopped after step 3; go on with the same command and --resume"] * 2
    with pytest.raises(utils.UserError, match="was written by 2 ranks.*start as many"):
        short_run(tmp_path, zero=2, resume=True)


def test_a_folder_is_claimed_by_one_run_and_goes_on_only_as_it_began(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def refused(message, path=out, **flags):
        with pytest.raises(utils.UserError, match=message):
            short_run(path, **flags)

    def skip_steps():
        utils.skipped["total"] += 2

    utils.skipped["total"] = 7  # of another run of this process
    with pytest.raises(Killed):  # before its first checkpoint; --resume without a run begins one
        short_run(out, at={1: die}, resume=True)
    assert (out / "code/sft.py").read_text() == (HERE / "sft.py").read_text()
    refused("holds a run or a model; --resume it")
    with pytest.raises(Killed):
        short_run(out, at={2: skip_steps, 3: die}, resume=True)
    refused("--batch_size was 32, and now it is 8", resume=True, batch_size=8)
    refused("the rows of --data are not those", resume=True, digest="other rows")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dist, "get_world_size", lambda *args, **kwargs: 4)
        short_run(out, at={4: die}, resume=True, micro_batch=2)  # these may change
    short_run(out, at={5: skip_steps}, resume=True)
    assert utils.skipped["total"] == 4
    assert read_lines(out / "metrics.jsonl") == [{"step": n, "loss": n} for n in range(1, 7)]
    refused("holds a finished run", resume=True)
    model_of("llama").save_pretrained(tmp_path / "model")
    refused("holds a run or a model", path=tmp_path / "model", resume=True)


def test_a_tracker_gets_what_the_log_gets(tmp_path, monkeypatch):
    calls = []
    stub = SimpleNamespace(
        __spec__="installed", finish=lambda: calls.append("finish"),
        init=lambda **kwargs: calls.append(kwargs["config"]["track"]),
        log=lambda row, step: calls.append({"step": step, **row}))
    monkeypatch.setitem(sys.modules, "stub", stub)
    short_run(tmp_path, track="stub")
    assert calls == ["stub", *read_lines(tmp_path / "metrics.jsonl"), "finish"]


@pytest.mark.parametrize("script, owner, name, call, zero, dtype", [
    (sft, torch, "save", 5, 3, "fp32"), (reward, Path, "rename", 3, 2, "bf16"),
    (ppo, utils.Run, "write", 8, 2, "fp32")])
def test_a_script_that_is_killed_twice_ends_as_one_that_is_not_bit_for_bit(
        script, owner, name, call, zero, dtype, chain, toy_file, tmp_path, monkeypatch):
    """In a checkpoint or a log, and then in saving its last model, in the second epoch of SFT; with
    other rows it does not go on. PPO has a mixture, a function as a second reward, LoRA and EMA."""
    source, whole, parts = tmp_path / "rows.jsonl", tmp_path / "whole", tmp_path / "parts"
    rows = Path(toy_file).read_text()
    source.write_text(rows)
    (tmp_path / "rules.py").write_text(RULES)
    flags = dict(data=str(source), epochs=1.3, lr=1e-3)
    if script is ppo:
        flags = dict(EXACT, reward=f"{chain['reward'][0]},{tmp_path}/rules.py:letters:0.5", lora=4,
                     data=toy_file, ptx_data=str(source), iterations=4)
    flags = dict(COMMON, zero=zero, dtype=dtype, model=chain["sft"][0]) | flags
    train(script, whole, **flags)
    real = getattr(owner, name)
    calls = itertools.count(1)

    def kill(*args, **kwargs):
        real(*args, **kwargs)
        if next(calls) == call:
            die()

    def save_half(lm, tokenizer, ends, out, **entries):
        Path(out, "model.safetensors").write_text("half")
        die()

    for dies in ((owner, name, kill), (utils, "save_model", save_half)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*dies)
            train(script, parts, resume=True, **flags)
        with open(parts / "metrics.jsonl", "a") as file:
            file.write('{"step": 1, "lo')  # a torn line
    source.write_text(rows[: rows.rindex("\n")])  # without the last row
    with pytest.raises(utils.UserError, match="the rows of --data are not those"):
        train(script, parts, resume=True, **flags)
    source.write_text(rows)
    train(script, parts, resume=True, **flags)
    assert results(parts) == results(whole)


def as_arguments(flags):
    return [f"--{name}={value}" for name, value in flags.items()]


def test_torchrun_takes_a_script_and_after_a_sigterm_it_goes_on_as_if_nothing_had_happened(
        two, small, toy_file, tmp_path):
    flags = dict(COMMON, data=toy_file, epochs=2.0, model=small, lr=1e-3)
    out = tmp_path / "out"
    process = start("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port",
                    free_port(), "sft.py", *as_arguments(flags), "--out", out)
    while not (out / "checkpoint/8").exists() and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    said = process.communicate(timeout=100)[0]
    found = re.search(r"error: stopped after step (\d+); go on with the same command", said)
    assert found and process.returncode != 0, said
    assert 8 <= int(found[1]) == len(read_lines(out / "metrics.jsonl")) < 47
    two(run_script, "sft", str(out), dict(flags, resume=True))
    two(run_script, "sft", str(tmp_path / "whole"), flags)
    assert results(out) == results(tmp_path / "whole")


@long
@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_ranks_that_are_killed_at_random_moments_end_as_ranks_that_are_not(
        name, chain, toy_file, tmp_path):
    """Both of two ranks get kill -9, up to half a second apart, at some moment of what an
    undisturbed run takes (not in its first third, which is imports), until the run has ended."""
    flags = dict(COMMON, data=toy_file, model=chain["sft"][0])
    if name == "ppo":
        flags.update(reward=chain["reward"][0], iterations=12, minibatches=2, zero=2)
    else:
        flags.update(epochs=2.5, lr=1e-3)
    rng = random.Random(name)

    def run(out, moment):
        """Two ranks that go on in a folder and are killed at this moment; returns their codes."""
        env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        argv = [f"{name}.py", *as_arguments(flags), "--out", out, "--resume"]
        ranks = [start(*argv, **env, RANK=rank) for rank in "01"]
        for rank in rng.sample(ranks, 2):
            try:
                rank.communicate(timeout=moment)
                moment = 60  # the other ends, too
            except subprocess.TimeoutExpired:
                rank.kill()
                moment = rng.uniform(0, 0.5)
        return [rank.wait() for rank in ranks]

    began = time.time()
    assert run(tmp_path / "whole", 600) == [0, 0]
    seconds = time.time() - began
    for out in (tmp_path / "1", tmp_path / "2"):
        while not (out / "finished").exists():
            assert set(run(out, rng.uniform(seconds / 3, seconds))) <= {0, -signal.SIGKILL}
        assert results(out) == results(tmp_path / "whole")


# ---- 11. flags, and what a user can do wrong


SCRIPTS = {"sft": sft, "reward": reward, "ppo": ppo, "chat": chat}


def test_flags_that_scripts_share_agree_in_type_and_help_and_none_is_without_help():
    special = {"model", "batch_size", "epochs", "lr", "seed", "max_new_tokens"}
    seen = {}
    for script in (sft, reward, ppo):
        comment = r"^    (\w+): .*?  # (.*(?:\n    #   .*)*)$"
        help_of = dict(re.findall(comment, inspect.getsource(script.Config), re.M))
        for field in dataclasses.fields(script.Config):
            entry = (field.type, "" if field.name in special else help_of[field.name])
            assert seen.setdefault(field.name, entry) == entry, (script.__name__, field.name)


def test_a_number_outside_of_its_range_and_a_wrong_flag_are_refused(capsys):
    def refused(script, *argv):
        with pytest.raises((utils.UserError, SystemExit)):
            utils.parse_args(script.Config, argv)

    for script in SCRIPTS.values():
        for field in dataclasses.fields(script.Config):
            if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
                refused(script, f"--{field.name}", "-1")
    for line in ("--batch 8", "toy", "--zero 4", "--batch-size 1.5", "--lr nan", "--lr inf"):
        refused(sft, *line.split())
    cfg = utils.parse_args(ppo.Config, ["--kl_coef", "0.1", "--kl-coef", "0.2", "--resume"])
    assert cfg == ppo.Config(kl_coef=0.2, resume=True), "both spellings"


SMALL = "--batch-size 8 --held-out 0.2 --max-len 64 "
PPO = "ppo --model lm --reward rm --data toy.jsonl --max-new-tokens 8 --minibatches 2 " + SMALL
MISTAKES = {
    "sft --data odd.jsonl": "--data odd.jsonl: too few .*: 1 unusable; .*'colour'.*",
    "sft --data toy.jsonl --split 1,2": "--split 1,2: needs three shares.*",
    "sft --data toy.jsonl --batch-size 5000": "--batch-size 5000: there are only .* rows .*",
    "ppo --ptx-data x --zero 3 --gradient-checkpointing": "--ptx-data with --zero 3 .*",
    PPO + "--reward lm": "lm: not a whole .*",
    PPO + "--max-new-tokens 64": ".*too few.*(--split, --held-out).*",
    PPO + "--tp 2 --engine hf": "--tp needs --engine hybrid",
    PPO + "--actor-lr 1e9 --ppo-epochs 2 --iterations 9":
        "the model's log-probabilities are NaN or infinite: .*|5 steps in a row had .*",
    "sft --model lm --data toy.jsonl --lr 1e9 --epochs 3 " + SMALL:
        "5 steps in a row had a gradient that is not finite: lower --lr|.*is not finite.*",
}


@pytest.fixture(scope="session")
def place(chain, toy_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(chain["sft"][0], root / "lm")
    shutil.copytree(chain["reward"][0], root / "rm")
    shutil.copy(toy_file, root / "toy.jsonl")
    write_rows(root / "odd.jsonl", [{"colour": "red"}])
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    script, *argv = shlex.split(mistake)
    argv += ["--out", str(tmp_path / "x")]
    with pytest.raises(utils.UserError) as caught:
        SCRIPTS[script].main(utils.parse_args(SCRIPTS[script].Config, argv))
    message = str(caught.value)
    assert re.fullmatch(MISTAKES[mistake], message), message
    assert not list(tmp_path.glob("x/*.safetensors"))


def test_the_commands_in_the_readme_and_in_docstrings_can_be_typed_as_they_stand():
    texts = {script.__name__: script.__doc__ for script in SCRIPTS.values()}
    for page in ("README.md", "recipes/README.md"):
        texts[page] = (HERE / page).read_text()
    for where, text in texts.items():
        text = text.replace("\\\n", " ")
        lines = re.findall(r"^(?:    |`*)((?:python|torchrun|deepspeed) [^`\n]*)", text, re.M)
        for line in lines:
            words = shlex.split(line, comments=True)
            [name] = [word for word in words if word.endswith(".py") or word.startswith("tools.")]
            if name.startswith("tools."):
                assert (HERE / name.replace(".", "/")).with_suffix(".py").exists()
                continue
            argv = words[words.index(name) + 1 :]
            utils.parse_args(SCRIPTS[name.removesuffix(".py")].Config, argv)
            if where.endswith(".md") and name != "chat.py":
                assert "--out" in argv, f"{where}: the demo's own folder is there: {words}"


@long
def test_a_copy_of_a_script_with_one_more_flag_and_metric_runs_under_torchrun(
        chain, toy_file, tmp_path):
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    source = (HERE / "ppo.py").read_text()
    for line, new in (("    # PPO\n", "    entropy_coef: float = 0.0     # of a bonus\n"),
            ('                "entropy": entropy.detach(),\n',
             '                "surprise": entropy.detach() + cfg.entropy_coef,\n')):
        source = source.replace(line, line + new)
    (tmp_path / "ppo_x.py").write_text(source)
    flags = dict(COMMON, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file,
                 iterations=1, minibatches=2, max_new_tokens=8, entropy_coef=0.01, out="x")
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                    "ppo_x.py", *as_arguments(flags), cwd=tmp_path)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    assert read_lines(tmp_path / "x/metrics.jsonl")[-1]["surprise"] > 0


# ---- 12. chat.py, and what a newcomer types first


@pytest.fixture
def talk(small, tok, monkeypatch, capsys):
    """talk(*lines, **flags): what chat.py prints where a user types these lines and the model says
    "né€ ok". talk.asked: what the model was asked, and the ids that end an answer."""

    def stream(engine, prompt, n, temperature, top_k, top_p, ends, seed):
        talk.asked.append((tok.decode(prompt), ends))
        return tok("né€ ok")["input_ids"]

    def talk(*lines, **flags):
        talk.asked = []
        typed = iter([*lines, ""])
        monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
        chat.main(chat.Config(**{"model": small, **flags}))
        return capsys.readouterr().out

    monkeypatch.setattr(HybridEngine, "stream", stream)
    return talk


@pytest.mark.parametrize("engine", ["hybrid", "hf"])
def test_chat_prints_the_answer_of_transformers(engine, small, tok, capsys):
    ids = tok("Human: hi\nAssistant:", return_tensors="pt")["input_ids"]
    out = load_lm(small).generate(ids, do_sample=False, max_new_tokens=6)[0, ids.size(1) :]
    chat.main(chat.Config(small, prompt="hi", max_new_tokens=6, temperature=0.0, engine=engine))
    expected = tok.decode(out, skip_special_tokens=True).strip()
    assert capsys.readouterr().out.strip() == expected != ""


def test_chat_prints_whole_characters_and_the_name_of_each_of_two_models(talk, small):
    assert talk(prompt="?") == "né€ ok\n"
    assert talk("?", compare="tiny") == f"{small}: né€ ok\ntiny: né€ ok\n"


@pytest.mark.parametrize("turns, flag", ((1, False), (2, False), (1, True)))
def test_chat_goes_on_in_turns_where_asked_or_trained_on_them_and_knows_the_ends_of_the_folder(
        talk, small, tmp_path, turns, flag):
    words = [{"role": role, "content": "hi"} for role in ("user", "assistant") * turns]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": words}] * 3)
    folder = shutil.copytree(small, tmp_path / "model")
    (folder / "run.json").write_text(json.dumps({"config": {"data": rows}}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 257]}')
    talk("one", "two", model=str(folder), turns=flag)
    before = "Human: one\nAssistant: né€ ok\n" * (turns > 1 or flag)
    assert talk.asked[1] == (f"{before}Human: two\nAssistant:", [256, 257])


def test_the_readme_gives_the_sizes_of_the_files():
    sizes = re.findall(r"^(\w+\.py) +(\d+) ", (HERE / "README.md").read_text(), re.M)
    assert len(sizes) == 9
    for name, lines in sizes:
        counted = len((HERE / name).read_text().splitlines())
        assert int(lines) == pytest.approx(counted, rel=0.1), name


@long
def test_the_memory_of_300_iterations_is_flat(chain, toy_file, tmp_path, monkeypatch):
    pages = Path("/proc/self/statm")
    monkeypatch.setattr(utils, "memory_gib", lambda: int(pages.read_text().split()[1]))
    metrics = train(ppo, tmp_path / "out", model=chain["sft"][0], reward=chain["reward"][0],
                    data=toy_file, iterations=300, minibatches=2, **COMMON)
    assert metrics[-1]["memory_gib"] < 1.02 * metrics[50]["memory_gib"]


@long
def test_make_demo_and_the_ppo_after_it_end_better_than_they_began(tmp_path):
    repo = shutil.copytree(HERE, tmp_path / "repo", ignore=shutil.ignore_patterns(".*", "out"))
    for out, args in (("ppo", "-m tools.demo"), ("kl", "ppo.py --kl-coef 0.1 --out out/kl")):
        process = start(*args.split(), cwd=repo)
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        first, *_, last = read_lines(repo / "out" / out / "metrics.jsonl")
        assert last["eval_toy_correct"] > first["eval_toy_correct"] + 0.2, args


# ---- 13. recipes: their own tests, recipes/test_recipes.py, say what they compute


@pytest.mark.parametrize("path", sorted((HERE / "recipes").glob("*.diff")), ids=str)
def test_a_recipe_applies_with_at_most_25_added_lines_and_the_page_has_it(path):
    core = [f"{name}.py" for name in "sft reward ppo data utils hybrid_engine kernels".split()]
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *core], cwd=HERE).returncode:
        pytest.skip("the seven files differ from HEAD: do the recipes still apply?")
    subprocess.run(["git", "apply", "--check", path], cwd=HERE, check=True)
    added = re.findall(r"^\+(?!\+\+)(.*)", path.read_text(), re.M)
    assert len(added) <= 25 and max(map(len, added)) <= 100
    assert f"({path.name})" in (HERE / "recipes/README.md").read_text()
