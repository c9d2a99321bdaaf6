"""The specification, in the order of the README. Each test is one sentence; inside stands a naive second version of what it tests.

    make test                       # this and test_kernels.py, about five minutes on two cores
    pytest test_all.py -k engine    # one part

Real weights and real human preferences are taken from ../shared where that folder exists; the rest needs nothing.
"""
import dataclasses
import gzip
import importlib.util
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

if "NANORLHF_CACHE" not in os.environ:  # processes started from here inherit it
    cache = tempfile.TemporaryDirectory(prefix="nanorlhf-test-")
    os.environ["NANORLHF_CACHE"] = cache.name
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for test_kernels.py, where both run: before anything imports triton

import chat
import data
import kernels
import ppo
import reward
import sft
import models
import training
import utils
from hybrid_engine import HFEngine, HybridEngine, make_engine
from reward import RewardModel

utils.quiet()
torch.set_num_threads(1)
HERE, SHARED = Path(__file__).parent, Path(__file__).parent.parent / "shared" / "data"
STORIES = str(SHARED / "stories260k")
shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the real weights and data of ../shared")
TEMPLATE = "Human: {prompt}\nAssistant:"
SCRIPTS = {"sft": sft, "reward": reward, "ppo": ppo, "chat": chat}


# -----------------------------------------------------------------------------
# helpers


@pytest.fixture(scope="session")
def tok():
    return models.tiny_tokenizer()


def write_rows(path, rows):
    Path(path).write_text("\n".join(json.dumps(r) for r in rows))
    return str(path)


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory):
    """240 rows of toy in a file: small enough to train on in a second."""
    rows = [r for r, _ in zip(data.toy(), range(240))]
    return write_rows(tmp_path_factory.mktemp("toy") / "toy.jsonl", rows)


def tiny_config(kind, **more):
    """A model of every family, small, with a vocabulary of 97."""
    import transformers as t
    s = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512)
    llama = dict(s, intermediate_size=100, num_key_value_heads=2)
    make = {
        "llama": lambda: t.LlamaConfig(**llama),
        "llama3 rope": lambda: t.LlamaConfig(**llama, rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
                                                                      high_freq_factor=4.0, original_max_position_embeddings=64)),
        "yarn": lambda: t.LlamaConfig(**llama, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64)),
        "mistral": lambda: t.MistralConfig(**{**llama, "num_key_value_heads": 1}, sliding_window=20),
        "qwen2": lambda: t.Qwen2Config(**llama, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        "qwen3": lambda: t.Qwen3Config(**llama, head_dim=32),
        "opt": lambda: t.OPTConfig(**s, ffn_dim=100, word_embed_proj_dim=64),
        "opt-350m": lambda: t.OPTConfig(**s, ffn_dim=100, word_embed_proj_dim=32, do_layer_norm_before=False),
        "gpt2": lambda: t.GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=512),
        "gpt_neox": lambda: t.GPTNeoXConfig(**s, intermediate_size=100, rotary_pct=0.25),
        "gpt_neox sequential": lambda: t.GPTNeoXConfig(**s, intermediate_size=100, rotary_pct=1.0, use_parallel_residual=False),
        "bloom": lambda: t.BloomConfig(vocab_size=97, hidden_size=96, n_layer=3, n_head=6),
    }
    config = make[kind]()
    config.update(dict(eos_token_id=5, bos_token_id=1, pad_token_id=0) | more)
    return config


KINDS = ["llama", "llama3 rope", "yarn", "mistral", "qwen2", "qwen3", "opt", "opt-350m", "gpt2", "gpt_neox", "gpt_neox sequential", "bloom"]


def model_of(kind, seed=0, **more):
    """Random weights, larger than an initialisation, so that a wrong layer cannot hide."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny_config(kind, **more)).eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.05))
    return lm


def ragged(lengths, vocab=97, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(6, vocab, (n,), generator=g).tolist() for n in lengths]


def plain_logprobs(lm, tokens, prompt_len, temperature=1.0):
    """Log-probability of each answer token of one row, by the textbook: a forward of this row alone."""
    with torch.no_grad():
        logits = lm(torch.tensor([tokens])).logits[0, prompt_len - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[prompt_len:])[:, None])[:, 0]


def rows_of(out):
    return [t[: p + a].tolist() for t, p, a in zip(out.tokens, out.prompt_lens, out.answer_lens)]


def train(script, out, **flags):
    """Runs a script's main in this process; returns its metrics, one dict a step."""
    script.main(script.Config(out=str(out), **flags))
    return [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]


def command(*args, typed=None):
    """Runs a command as a user would, who typed this; returns (exit code, what it printed)."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=HERE, env=env, input=typed)
    return done.returncode, done.stdout + done.stderr


def _rank(rank, world, port, folder, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    torch.distributed.barrier()


def ranks(world, function, *args):
    """function(*args) on so many gloo ranks; returns their results in the order of the ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        procs = [mp.get_context("spawn").Process(target=_rank, args=(r, world, port, folder, function, args)) for r in range(world)]
        for p in procs:
            p.start()
        deadline = time.time() + 400
        while any(p.is_alive() for p in procs) and all(p.exitcode in (None, 0) for p in procs) and time.time() < deadline:
            time.sleep(0.1)
        died, hang = [r for r, p in enumerate(procs) if p.exitcode not in (None, 0)], [r for r, p in enumerate(procs) if p.is_alive()]
        for p in procs:
            p.kill()
        assert not died, f"rank {died} died: the traceback stands in the output"
        assert not hang, f"rank {hang} hangs"
        return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(world)]


# -----------------------------------------------------------------------------
# data: rows from anywhere


@pytest.mark.parametrize("row, want", [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "c", "r")),
    ({"prompt": "p", "response": "a"}, ("p", "a", None, None)),
    ({"prompt": "p"}, ("p", None, None, None)),
    ({"prompt": "\n\nHuman: p\n\nAssistant:", "chosen": " c", "rejected": " r"}, ("p", " c", " c", " r")),
    ({"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"}, ("p", "c", "c", "r")),
    ({"instruction": "i", "input": "x", "output": "o"}, ("i\nx", "o", None, None)),
    ({"instruction": "i", "input": "", "output": "o", "chosen": "c", "rejected": "r"}, ("i", "o", "c", "r")),
    ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}, ("p", "a", None, None)),
    ({"question": "q", "answer": "a"}, ("q", "a", None, None)),
    ({"text": "t"}, (None, "t", None, None)),
])
def test_a_row_is_recognised_by_its_fields(row, want):
    messages, *rest = data.convert(row, "here")
    assert (messages[-1]["content"] if messages else None, *rest) == want


def test_a_conversation_is_rendered_turn_by_turn(tok):
    messages = data.dialogue("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d")[:-1]
    assert data.render(messages, TEMPLATE, tok) == "Human: a\nAssistant: b\nHuman: c\nAssistant:"
    tok = models.tiny_tokenizer()
    tok.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    assert data.render(messages, "chat", tok) == "[user]a[assistant]b[user]c[assistant]"


def load_file(path, tok, step="sft", split="", held_out=0.2, max_len=512, template=TEMPLATE):
    return data.load(str(path), step, split, held_out, template, tok, max_len)


def test_an_answer_ends_with_the_one_id_of_eos_even_where_pad_and_bos_are_the_same_id(tmp_path):
    for same in (False, True):
        tok = models.tiny_tokenizer()
        if same:
            tok.pad_token = tok.bos_token = tok.eos_token
        path = write_rows(tmp_path / "a.jsonl", [{"prompt": f"word {i}", "response": "x" * (1 + i % 7)} for i in range(40)])
        rows, _ = load_file(path, tok)
        tokens, prompt_lens, answer_lens = data.collate(rows, range(len(rows)), "cpu")
        for t, p, a in zip(tokens, prompt_lens, answer_lens):
            answer = t[p : p + a].tolist()
            assert answer[-1] == tok.eos_token_id and answer.count(tok.eos_token_id) == 1, "EOS is one id, at the end"
            assert tok.decode(answer[:-1]).strip("x ") == "" and tok.decode(t[:p]).endswith("Assistant:")


def test_split_divides_rows_without_overlap_whatever_their_order(tmp_path, tok):
    rows = [{"prompt": f"question {i % 600}", "chosen": f"yes {i}", "rejected": "no"} for i in range(1200)]
    a, b = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[::-1])
    parts = {}
    for path in (a, b):
        for step in ("sft", "reward", "ppo"):
            train_rows, held = load_file(path, tok, step, "2,4,4")
            parts[path, step] = [{tuple(r.prompt(i)) for i in range(len(r))} for r in (train_rows, held)]
    for step in ("sft", "reward", "ppo"):
        assert parts[a, step] == parts[b, step], "a row's step depends on its content alone"
    everything = [s for step in ("sft", "reward", "ppo") for s in parts[a, step]]
    assert len(set.union(*everything)) == sum(map(len, everything)) == 600, "all rows of a prompt stand in exactly one place"
    assert 80 < len(set.union(*parts[a, "sft"])) < 160, "a fifth goes to step 1"


def test_weights_are_the_shares_of_an_epoch(tmp_path, tok):
    files = [write_rows(tmp_path / f"{n}.jsonl", [{"prompt": f"{n} {i}", "response": n} for i in range(size)]) for n, size in (("a", 700), ("b", 500))]
    rows, _ = load_file(f"{files[0]}:0.8,{files[1]}:0.2", tok, held_out=0.05)
    order = data.epoch_order(rows, 0, 1)
    share = (rows.source[order] == 0).mean()
    assert abs(share - 0.8) < 0.01 and len(set(order)) == len(order), f"{share}: 80% from the first, and no row twice"
    assert set(order) != set(data.epoch_order(rows, 1, 1)), "another epoch takes other rows of the larger source"


def test_an_epoch_has_every_row_once_and_ranks_share_the_batches_of_one_process(toy_file, tok):
    rows, _ = load_file(toy_file, tok)
    lengths = rows.lengths("response")
    first, second = (list(data.batches(rows, lengths, 8, epoch, seed=3)) for epoch in (0, 1))
    seen = np.concatenate(first)
    assert len(set(seen)) == len(seen) == len(rows) // 8 * 8, "no row twice in an epoch"
    assert [b.tolist() for b in first] != [b.tolist() for b in second], "another epoch has another order"
    for batch in first:
        dealt = [np.concatenate(utils.deal(batch, lengths, 2, r, 4)) for r in range(4)]
        assert all(len(d) == 2 for d in dealt) and set(np.concatenate(dealt)) == set(batch)
    resumed = data.steps(rows, lengths, 8, 3, start=len(first) + 2)
    assert next(resumed)[1].tolist() == second[2].tolist(), "the position in the data is a number"


def test_tokens_are_made_once_and_again_when_a_line_or_the_template_changes(tmp_path, tok, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    rows = [{"prompt": f"question {i}", "response": "yes"} for i in range(50)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    load_file(path, tok)
    (folder,) = data.CACHE.iterdir()
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    load_file(path, tok)
    assert [f.name for f in data.CACHE.iterdir()] == [folder.name] and (folder / "tokens.bin").stat().st_mtime_ns == stamp
    load_file(path, tok, template="Q: {prompt}\nA:")
    assert len(list(data.CACHE.iterdir())) == 2, "another template, other tokens"
    rows[7]["response"] = "no"
    write_rows(path, rows)
    edited, held = load_file(path, tok)
    assert len(list(data.CACHE.iterdir())) == 3
    answers = [tok.decode(r.answer(i, "response")[:-1]).strip() for r in (edited, held) for i in range(len(r))]
    assert answers.count("no") == 1, "the edited line is seen"


def test_toy_is_exactly_checkable_and_a_third_of_its_demonstrations_is_wrong(tok):
    rows = list(data.toy(500))
    right = np.mean([data.toy_gold(f"Human: {r['prompt']}\nAssistant:", " " + r["response"]) for r in rows])
    assert 0.62 < right < 0.68
    assert all(data.toy_gold(r["prompt"], r["chosen"]) == 1 and data.toy_gold(r["prompt"], r["rejected"]) == 0 for r in rows)
    assert data.toy_gold("reverse abc", "cba") == data.toy_gold("upper abc", "ABC") == data.toy_gold("sort cab", "abc") == 1
    assert data.toy_gold("first abc", "ab") == data.toy_gold("copy abc", "abcc") == 0


@shared
def test_real_preferences_are_read_whole_and_batches_of_them_have_little_padding():
    tok = models.load_tokenizer(STORIES)
    rows, held = data.load(str(SHARED / "prefs/hh_harmless_test.jsonl.gz"), "reward", "", 0.1, TEMPLATE, tok, 10**6)
    equal = 2312 - len(rows) - len(held) - 5  # 5 pairs of dialogues with different prompts
    assert 0 <= equal <= 12, f"{len(rows) + len(held)} of 2,312 rows are there"
    lengths = rows.lengths("chosen", "rejected")
    nothing = lambda tokens: torch.zeros(tokens.shape)  # noqa: E731
    slots = sum(reward.pair_scores(nothing, rows, part, reward.groups_for(lengths, 0), "cpu")[1]
                for batch in data.batches(rows, lengths, 32, 0, 1) for part in utils.deal(batch, lengths, 8, 0, 1))
    real = sum(rows.lengths(w)[np.concatenate(list(data.batches(rows, lengths, 32, 0, 1)))].sum() for w in ("chosen", "rejected"))
    assert 1 - real / slots < 0.10, f"{1 - real / slots:.1%} of the tokens are padding"
    text = tok.decode(rows.prompt(0), skip_special_tokens=True)
    assert text.startswith("Human:") and text.endswith("Assistant:"), text


def test_every_kind_of_file_gives_the_same_rows(tmp_path, tok):
    rows = [{"prompt": f"word {i}", "response": f"x {i} ü"} for i in range(40)]
    as_lines = "\n".join(json.dumps(r) for r in rows)
    (tmp_path / "a.jsonl").write_text(as_lines), (tmp_path / "b.json").write_text(json.dumps(rows))
    for name, text in (("c.jsonl.gz", as_lines), ("d.json.gz", json.dumps(rows))):
        with gzip.open(tmp_path / name, "wt") as f:
            f.write(text)
    names = ["a.jsonl", "b.json", "c.jsonl.gz", "d.json.gz"]
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
        names.append("e.parquet")
    def tokens(name):
        train_rows, held = load_file(tmp_path / name, tok)
        return [[r.prompt(i) + r.answer(i, "response") for i in range(len(r))] for r in (train_rows, held)]
    assert all(tokens(name) == tokens("a.jsonl") for name in names)
    (tmp_path / "t.txt").write_text("\n\n".join(f"a line {i}\nand another" for i in range(40)))
    text, held = load_file(tmp_path / "t.txt", tok)
    assert len(text) + len(held) == 40 and tok.decode(text.answer(0, "response")[:-1]).endswith("\nand another")


def test_another_tokenizer_makes_other_tokens(tmp_path, tok):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": f"word {i}", "response": "x"} for i in range(40)])
    other = models.tiny_tokenizer()
    spec = json.loads(other.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab["w"], vocab["v"] = vocab["v"], vocab["w"]
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(spec))
    a, b = (load_file(path, t)[0].prompt(0) for t in (tok, other))
    assert a != b and len(a) == len(b), "and not those that the first one left in the cache"


def test_a_new_source_is_ten_lines_as_the_readme_shows(tok, monkeypatch):
    (code,) = re.findall(r"```python\n(def arithmetic.*?)```", (HERE / "README.md").read_text(), re.S)
    assert len(code.split("\n\n")[0].splitlines()) <= 10
    monkeypatch.setattr(data, "SOURCES", dict(data.SOURCES)), monkeypatch.setattr(data, "CHECKERS", dict(data.CHECKERS))
    exec(code, vars(data))
    rows, _ = load_file("arithmetic", tok, "reward")
    prompt, right, wrong = (tok.decode(x, skip_special_tokens=True) for x in (rows.prompt(5), rows.answer(5, "chosen"), rows.answer(5, "rejected")))
    assert data.checker("arithmetic")(prompt, right) == 1 and data.checker("arithmetic")(prompt, wrong) == 0


BAD_DATA = {
    "missing file": ("nowhere.jsonl", None, "nowhere.jsonl: no such file"),
    "not a kind": ("a.csv", "x", "unknown kind of file '.csv'"),
    "broken line": ("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a", ', r"a.jsonl:2: not valid JSON"),
    "unknown fields": ("a.jsonl", '{"foo": 1}', r"a.jsonl:1: unknown fields \['foo'\]; a row needs one of: messages; prompt"),
    "not an object": ("a.jsonl", "[1, 2]", "a.jsonl:1: a row must be an object"),
    "not text": ("a.jsonl", '{"prompt": "a", "response": 3}', "a.jsonl:1: .*'3' stands where text is needed"),
    "no words": ("a.jsonl", '{"question": null, "answer": "b"}', "a.jsonl:1: cannot read this row as question/answer: 'None' stands where"),
    "a tool's call": ("a.jsonl", '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]}', "a.jsonl:1: .*'None' stands where"),
    "no content": ("a.jsonl", '{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', "a.jsonl:1: cannot read this row as messages: there is no 'content'"),
    "no role": ("a.jsonl", '{"messages": [{"content": "a"}]}', "a.jsonl:1: cannot read this row as messages: there is no 'role'"),
    "not messages": ("a.jsonl", '{"prompt": ["a"]}', "a.jsonl:1: cannot read this row as prompt"),
    "no text": ("a.jsonl", '{"text": null}', "a.jsonl:1: .*neither a prompt nor a text"),
    "half a letter": ("a.jsonl", r'{"prompt": "a \ud83d", "response": "b"}', "a.jsonl:1: .*surrogate"),
    "not parquet": ("a.parquet", "x", "cannot be read as parquet|first `pip install pyarrow`"),
    "a name with a dot": ("someone/data-2.5-set", None, "neither a file here nor a data set|for a folder or a name on the Hugging Face hub first"),
    "empty": ("a.jsonl", "", "has no rows"),
    "no pair": ("a.jsonl", '{"prompt": "a", "response": "b"}', "no row has chosen and rejected"),
    "not a list": ("a.json", '{"prompt": "a"}', "must hold one list of rows"),
    "parquet, gzipped": ("a.parquet.gz", "x", "unknown kind of file '.parquet.gz'"),
    "not gzip": ("a.jsonl.gz", "plain", "cannot be read as gzipped"),
    "too few": ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "rows are too few"),
    "too long": ("a.jsonl", json.dumps({"prompt": "a" * 600, "chosen": "b", "rejected": "c"}), "no row is left .*1 over 512 tokens"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_gets_one_sentence_that_says_where(case, tmp_path, tok):
    name, content, message = BAD_DATA[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(utils.UserError, match=message):
        load_file(tmp_path / name, tok, "reward")


def test_rows_are_ended_once_asked_something_and_held_out_from_every_source(tmp_path, tok):
    path = write_rows(tmp_path / "eos.jsonl", [{"prompt": f"word {i}", "response": f"x{i}<eos>"} for i in range(40)])
    rows, _ = load_file(path, tok)
    assert all(rows.answer(i, "response").count(tok.eos_token_id) == 1 for i in range(len(rows))), "a text may end in the tokenizer's word for EOS"
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"line {i}"} for i in range(40)])
    with pytest.raises(utils.UserError, match="text.jsonl: no row has a prompt"):
        load_file(text, tok, "ppo")
    a, b = (write_rows(tmp_path / f"{x}.jsonl", [{"prompt": f"{x} {i}"} for i in range(400)]) for x in "ab")
    _, held = load_file(f"{a},{b}", tok, "ppo", held_out=0.5)
    assert 0.3 < held.source[:100].mean() < 0.7, "the first rows, which are evaluated, come from both"


def test_a_rollout_is_in_random_order_and_steps_of_the_others_are_sorted_in_pools(toy_file, tok):
    rows, _ = load_file(toy_file, tok, "ppo", held_out=0.1)
    lengths = rows.lengths()
    (_, a), (_, b) = (next(data.steps(rows, lengths, 64, 1, pool=pool)) for pool in (1, 4))
    early, late = lengths[a][:32].mean(), lengths[a][32:].mean()
    assert abs(early - late) < lengths.std(), "the first optimizer steps of a rollout see no other lengths than the last"
    assert (np.diff(lengths[a]) < 0).any() and (np.diff(lengths[b]) >= 0).all()


def test_a_template_of_another_run_is_told(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"template": "Q: {prompt}\\nA:"}}))
    assert data.check_template("Q: {prompt}\nA:", str(tmp_path), "") == "Q: {prompt}\nA:" and not capsys.readouterr().out
    data.check_template(TEMPLATE, str(tmp_path))
    assert f"was trained with --template {'Q: {prompt}' + chr(10) + 'A:'!r}" in capsys.readouterr().out


@pytest.mark.parametrize("split, data_flag, message", [
    ("2,4", "toy", "three shares"), ("0,1,1", "toy", "gives nothing to step 1"), ("", "toy:0", "weight above 0"), ("", "toy:1,toy", "weight above 0, or none"),
    ("", "", "--data is empty")])
def test_bad_splits_and_weights_get_one_sentence(split, data_flag, message, tok):
    with pytest.raises(utils.UserError, match=message):
        data.load(data_flag, "sft", split, 0.1, TEMPLATE, tok, 512)


# -----------------------------------------------------------------------------
# command line


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_knob_has_help_and_the_scripts_agree_on_those_they_share(name):
    Config, help_of = SCRIPTS[name].Config, {n: utils.field_help(s.Config) for n, s in SCRIPTS.items()}
    hints = {n: typing.get_type_hints(s.Config) for n, s in SCRIPTS.items()}
    for f in dataclasses.fields(Config):
        assert help_of[name].get(f.name), f"{name}.py --{f.name} has no comment behind it"
        if f.name in ("model", "out", "epochs", "batch_size", "micro_batch", "lr", "seed", "max_len"):
            continue  # what they are of differs
        for other, h in hints.items():
            if f.name in h and other != "chat":
                assert hints[name][f.name] == h[f.name] or name == "chat", f"--{f.name} differs in {name} and {other}"
                assert name in ("chat",) or getattr(Config, f.name) == getattr(SCRIPTS[other].Config, f.name), f"the default of --{f.name} differs in {name} and {other}"
                assert name in ("chat",) or help_of[name][f.name] == help_of[other][f.name], f"--{f.name} differs in {name} and {other}"
    assert len(dataclasses.fields(Config)) <= (34 if name == "ppo" else 18)


def test_flags_take_dashes_or_underscores_and_a_wrong_one_is_named():
    assert utils.parse_args(ppo.Config, ["--kl-coef", "0.2", "--max_new_tokens=7"]) == ppo.Config(kl_coef=0.2, max_new_tokens=7)
    for argv in (["--klcoef", "1"], ["--zero", "4"], ["--batch-size", "x"], ["--temperature", "0"], ["--batch-size", "10", "--minibatches", "3"]):
        with pytest.raises(SystemExit):
            utils.parse_args(ppo.Config, argv)


def test_the_readme_shows_commands_that_parse():
    text = (HERE / "README.md").read_text().replace("\\\n", " ") + "".join(s.__doc__ for s in SCRIPTS.values())
    found = re.findall(r"(?:python|torchrun[^\n]*?|deepspeed[^\n]*?) (sft|reward|ppo|chat)\.py([^\n`]*)", text)
    assert len(found) > 10
    for name, flags in found:
        utils.parse_args(SCRIPTS[name].Config, shlex.split(flags, comments=True) or ["--seed", "1"])


def test_the_numbers_in_the_readme_are_those_in_results():
    text, results = (HERE / "README.md").read_text(), lambda name: json.load(open(HERE / "results" / f"{name}.json"))
    for r in results("demo"):
        assert f"| {r['seed']} | {r['sft_gold']:.1%} | {r['reward_accuracy']:.1%} | **{r['ppo_gold']:.1%}** | {r['ppo_ema_gold']:.1%} | {r['score'][0]:.2f} → {r['score'][1]:.2f} | {r['ppo_kl']:.2f} |" in text, f"demo, seed {r['seed']}"
        assert 0.5 <= r["sft_gold"] <= 0.7 and r["ppo_gold"] >= 0.9 and r["reward_accuracy"] >= 0.95
    for r in results("cpu-2-threads-generate")["rows"]:
        assert f"{r['tokens_per_s']:,.0f} | {r['transformers_tokens_per_s']:,.0f} | **{r['ratio']:.2f}** | {r['ms_a_step']:.2f} | {r['floor_share']:.0%} |" in text, r
        assert r["ratio"] >= (3 if r["case"] == "ragged" else 1.75) and len(r["runs"]["ours"]) >= 3
    for r in results("cpu-2-threads-ppo")["rows"]:
        phases = " | ".join(f"{r['hybrid'][k]:.2f} / {r['hf'][k]:.2f}" for k in ("rollout_s", "score_s", "update_s"))
        assert f"{phases} | **{r['ratio']:.2f}** | {r['pairs_per_s']:.1f} | {r['mfu']:.0%} |" in text and r["ratio"] >= 1.5, r
    for r in results("cpu-2-threads-train")["rows"]:
        assert f"| {r['model']}, {r['step']} | {r['batch']} x {r['length']} | {r['seconds']:.3f} | {r['tokens_per_s']:,.0f} | {r['mfu']:.0%} |" in text, r
    for r in results("cpu-2-threads-kernels")["rows"]:
        assert r["model"] != "opt-4x256" or f"| {r['model']}, {r['kernel']} | {r['us']:,.0f} | {r['pytorch_us']:,.0f} | {r['ceiling_share']:.0%} |" in text, r
    for r in results("cpu-2-threads-fit")["rows"]:
        assert not r["error"] or f"{r['model']}: {r['error']} |" in text, r
    kills = results("kills")
    assert all(r["same"] and len(r["rows_logged_at_each_kill"]) == 20 for r in kills) and f"all {sum(r['ends_compared'] for r in kills)} runs" in text
    for r in results("scale")["rows"]:
        assert r["world"] not in (8, 64) or f"| {r['model']} | {r['world']} | {r['tp']} | {r['rollout_s']:.2f} |" in text, r
    sweep, guard = results("sweep"), results("guard")["held_out"]
    assert all(r["gold"] > r["gold_before"] + 0.1 and r["skipped"] == 0 for r in sweep)
    for e in (1, 2, 4):
        for m in (1, 4):
            cells = [" / ".join(f"{r['gold']:.1%}" for r in sweep if (r["ppo_epochs"], r["minibatches"], r["rollout_batches"]) == (e, m, b)) for b in (1, 4)]
            assert f"| {e} | {m} | {cells[0]} | {cells[1]} |" in text
    assert len(sweep) == 36 and f"the worst of 36 runs ends at {min(r['gold'] for r in sweep):.1%}" in text
    assert " | ".join(f"{r['gold']:.1%}" for r in guard) in text and guard[-1]["gold"] >= guard[1]["gold"] - 0.02 and guard[-1]["score"] > guard[1]["score"]
    for r in results("recipes"):
        assert f"| {r['name']} | {r['gold']:.1%} | {r['kl']:.2f} | {r['length']:.2f} |" in text and r["gold"] > r["gold_before"] + 0.1, r
    for r in json.load(open(HERE / "results/cpu-1-threads-memory.json"))["rows"]:
        assert f"{r['peak_mib']:,.0f} MiB | {r['seconds']:.2f} | {r['loss']:.6f}" in text, r["how"]
    real = json.load(open(HERE / "results/real-data.json"))
    (a, b), (c, d) = real["ppo"]["eval_score"], real["ppo"]["eval_score_se"]
    for quoted in (f"{a:.3f} ± {c:.3f} → {b:.3f} ± {d:.3f}", f"{real['ppo']['eval_kl'][1]:.2f} nats", f"{real['reward']['held_out_accuracy']:.3f} ±",
                   f"{real['hh']['held_out_accuracy']:.3f} ±", f"loss {real['sft']['held_out_loss']:.3f}"):
        assert quoted in text, quoted
    assert (b - a) > 2 * (c**2 + d**2) ** 0.5 and real["ppo"]["eval_kl"][1] < 15


# -----------------------------------------------------------------------------
# log-probabilities


def test_a_padded_batch_gives_each_row_the_logprobs_of_that_row_alone():
    for kind in ("opt", "gpt2", "llama", "bloom"):
        lm = model_of(kind)
        rows, prompt_lens = ragged([9, 4, 21, 3]), torch.tensor([5, 1, 20, 1])
        for pad in (0, 5, 1):  # pad, eos, bos: what the padding is cannot matter
            tokens, lens = data.pad(rows, value=pad)
            with torch.no_grad():
                got, _ = models.Policy(lm)(tokens, prompt_lens, lens - prompt_lens, 0.7)
            for i, (row, p) in enumerate(zip(rows, prompt_lens.tolist())):
                want = plain_logprobs(lm, row, p, 0.7)
                torch.testing.assert_close(got[i, : len(want)].double(), want, rtol=1e-4, atol=1e-5)
                assert (got[i, len(want) :] == 0).all()


def test_eos_carries_gradient_although_it_is_also_pad_and_bos():
    lm = model_of("opt", pad_token_id=5, bos_token_id=5)
    tokens, lens = data.pad([[5, 9, 8, 7, 5], [5, 9, 8, 5]], value=5)
    logprobs, _ = models.Policy(lm)(tokens, torch.tensor([3, 2]), lens - torch.tensor([3, 2]))
    (grad,) = torch.autograd.grad(logprobs[0, 1], lm.model.decoder.layers[2].fc2.weight)
    want = plain_logprobs(lm, [5, 9, 8, 7, 5], 3)[1]
    assert logprobs[0, 1].item() == pytest.approx(want.item(), rel=1e-4) and grad.abs().sum() > 0, "the EOS at the end of an answer is an action"


# -----------------------------------------------------------------------------
# step 2


def test_the_pairwise_loss_is_its_formula_and_finite_at_extreme_margins():
    c, r = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    want = np.mean([math.log(1 + math.exp(-(a - b))) for a, b in zip(c.tolist(), r.tolist())])
    assert abs(reward.pairwise_loss(c, r).item() - want) < 1e-6
    assert torch.isfinite(reward.pairwise_loss(torch.tensor([-1e4]), torch.tensor([1e4]))), "margins of any size"


@pytest.mark.parametrize("kind", ["llama", "opt", "opt-350m", "gpt2", "gpt_neox", "bloom"])
def test_a_score_is_read_at_the_last_real_token_whatever_stands_behind_it(kind, tmp_path, tok):
    model_of(kind, vocab_size=258).save_pretrained(tmp_path)
    rm = RewardModel.from_lm(str(tmp_path), torch.float32).eval()
    rows = ragged([9, 4, 21])
    with torch.no_grad():
        alone = torch.cat([rm.score(torch.tensor([r]), torch.tensor([len(r)])) for r in rows])
        for value in (0, 5, 80):
            tokens, lens = data.pad(rows, value=value)
            torch.testing.assert_close(rm.score(tokens, lens), alone, rtol=1e-4, atol=1e-5)
    d = rm.model.score.in_features
    assert abs(rm.model.score.weight.std().item() * (d + 1) ** 0.5 - 1) < 0.3, "the head starts at std 1/sqrt(d + 1)"


def test_pairs_are_scored_alike_in_one_forward_or_in_four(toy_file, tok):
    rows, _ = load_file(toy_file, tok, "reward")
    rm = RewardModel.from_lm("tiny", torch.float32)
    with torch.no_grad():
        one, four = (reward.pair_scores(rm, rows, range(9), groups, "cpu")[0] for groups in (1, 4))
        want = [[rm.score(*data.pad([rows.prompt(i) + rows.answer(i, w)])).item() for w in ("chosen", "rejected")] for i in range(9)]
    torch.testing.assert_close(one, torch.tensor(want), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-5)


def test_a_reward_model_with_a_missing_renamed_or_misshapen_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file as read, save_file
    model_of("opt").save_pretrained(tmp_path / "lm")
    rm = RewardModel.from_lm(str(tmp_path / "lm"), torch.float32)
    rm.model.save_pretrained(tmp_path / "rm")
    RewardModel.from_pretrained(str(tmp_path / "rm"))
    path = tmp_path / "rm" / "model.safetensors"
    whole = read(path)
    name = next(k for k in whole if "layers.1.fc1.weight" in k)
    for change, message in ((lambda s: s.pop(name), "lacks 1 tensor, such as .*layers.1.fc1.weight"),
                            (lambda s: s.update({name.replace("layers", "layer"): s.pop(name)}), "lacks 1 tensor"),
                            (lambda s: s.update({"extra.weight": torch.zeros(2)}), "has unknown 1 tensor, such as extra.weight"),
                            (lambda s: s.update({name: s[name][:-1].clone()}), "wrong shape")):
        state = dict(whole)
        change(state)
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(utils.UserError, match=message):
            RewardModel.from_pretrained(str(tmp_path / "rm"))
    with pytest.raises(utils.UserError, match="is not a reward model"):
        RewardModel.from_pretrained(str(tmp_path / "lm"))


# -----------------------------------------------------------------------------
# step 3: the formulas


def random_batch(B=5, A=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    lens = torch.tensor([A, 1, 3, A - 1, 2])[:B]
    mask = torch.arange(A) < lens[:, None]
    return lens, mask, [torch.randn(B, A, generator=g, dtype=torch.float64) * mask for _ in range(4)]


def test_gae_is_the_sum_of_discounted_errors():
    lens, mask, (values, rewards, *_) = random_batch()
    advantages, returns = ppo.gae(values, rewards, mask, 0.9, 0.8)
    for b, n in enumerate(lens.tolist()):
        for t in range(n):
            want = 0.0
            for k in range(t, n):
                after = values[b, k + 1].item() if k + 1 < n else 0.0
                want += (0.9 * 0.8) ** (k - t) * (rewards[b, k].item() + 0.9 * after - values[b, k].item())
            assert abs(advantages[b, t].item() - want) < 1e-9
    torch.testing.assert_close(returns, (advantages + values) * mask)
    assert (advantages[~mask] == 0).all(), "nothing past the end"
    _, returns = ppo.gae(values, rewards, mask, 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1) * mask, msg="lambda = gamma = 1: the sum of what comes")
    torch.testing.assert_close(ppo.gae(values + 3 * ~mask, rewards - 5 * ~mask, mask, 0.9, 0.8)[0], advantages, msg="what stands past the end is not read")


def test_token_rewards_are_kl_everywhere_and_the_clipped_score_at_the_end():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    logprobs, ref = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]], requires_grad=True), torch.tensor([[-1.5, -1.0, -3.0], [-4.0, 9.0, 9.0]])
    rewards = ppo.token_rewards(torch.tensor([0.5, 30.0]), logprobs, ref, mask, 0.1, 10.0)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 0.5], [10 - 0.3, 0, 0]]))
    assert not rewards.requires_grad, "KL acts through the reward, not through its gradient"


def test_whitening_counts_only_real_tokens():
    _, mask, (x, *_) = random_batch()
    y = ppo.whiten(x * 3 + 5 * mask, mask)
    assert abs(y[mask].mean()) < 1e-9 and abs(y[mask].var(unbiased=False) - 1) < 1e-6 and (y[~mask] == 0).all()


def test_the_losses_are_their_formulas():
    _, mask, (logprobs, old, advantages, returns) = random_batch()
    want, n = 0.0, int(mask.sum())
    for l, o, a, m in zip(*(x.flatten().tolist() for x in (logprobs, old, advantages, mask))):
        ratio = math.exp(l - o)
        want += m * max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)) / n
    assert abs(ppo.actor_loss(logprobs, old, advantages, mask, 0.2).item() - want) < 1e-9
    values, old_values, want = logprobs, old, 0.0
    for v, o, r, m in zip(*(x.flatten().tolist() for x in (values, old_values, returns, mask))):
        held = o + min(max(v - o, -0.2), 0.2)
        want += m * 0.5 * max((v - r) ** 2, (held - r) ** 2) / n
    assert abs(ppo.critic_loss(values, old_values, returns, mask, 0.2).item() - want) < 1e-9
    x = old.clone().requires_grad_()
    ppo.actor_loss(x, old, torch.zeros_like(old), mask, 0.2).backward()
    assert (x.grad == 0).all(), "equal rewards, equal values: nothing to learn"


def test_the_adaptive_kl_coefficient_moves_the_right_way():
    assert ppo.adapt(0.1, 12.0, 6.0, 1000) == pytest.approx(0.1 * 1.02) and ppo.adapt(0.1, 3.0, 6.0, 1000) == pytest.approx(0.1 * 0.98)
    assert ppo.adapt(0.1, 6.3, 6.0, 1000) == pytest.approx(0.1 * 1.005)


def test_a_value_is_that_of_the_state_before_the_token():
    critic = lambda tokens: torch.arange(tokens.size(1)).float().expand(tokens.shape)  # noqa: E731  answers with its position
    got = ppo.answer_values(critic, torch.zeros(2, 9, dtype=torch.long), torch.tensor([3, 5]), torch.tensor([4, 1]))
    assert got.tolist() == [[2, 3, 4, 5], [4, 0, 0, 0]], "the first token is chosen in the state of the prompt's last"


def test_gradients_do_not_depend_on_how_a_batch_is_cut():
    lm = model_of("llama").double()
    policy, rows = models.Policy(lm), ragged([9, 4, 21, 3])
    prompt_lens = torch.tensor([5, 1, 20, 1])
    old, advantages = torch.randn(4, 4, dtype=torch.float64) - 4, torch.randn(4, 4, dtype=torch.float64)

    def gradient(parts):
        lm.zero_grad()
        n = sum(len(rows[i]) - prompt_lens[i] for part in parts for i in part)
        for part in parts:
            tokens, lens = data.pad([rows[i] for i in part])
            answers = lens - prompt_lens[part]
            logprobs, _ = policy(tokens, prompt_lens[part], answers)
            A, mask = logprobs.size(1), torch.arange(logprobs.size(1)) < answers[:, None]
            (ppo.actor_loss(logprobs.double(), old[part, :A], advantages[part, :A], mask, 0.2) * mask.sum() / n).backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters()])
    whole = gradient([[0, 1, 2, 3]])
    for parts in ([[0], [1], [2], [3]], [[0, 3], [1, 2]]):
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-4, atol=1e-7)


# -----------------------------------------------------------------------------
# the three steps, run


STEPS = dict(held_out=0.2, batch_size=8, max_len=64)
PPO_STEPS = dict(STEPS, iterations=3, minibatches=2, ppo_epochs=2, max_new_tokens=8)


@pytest.fixture(scope="session")
def chain(toy_file, tmp_path_factory):
    """The three steps in this process, on 240 rows: {step: (folder, metrics)}."""
    out = tmp_path_factory.mktemp("chain")
    runs = {"sft": train(sft, out / "sft", data=toy_file, epochs=0.5, **STEPS)}
    runs["reward"] = train(reward, out / "reward", model=str(out / "sft"), data=toy_file, epochs=0.5, **STEPS)
    runs["ppo"] = train(ppo, out / "ppo", model=str(out / "sft"), reward_model=str(out / "reward"), data=toy_file, **PPO_STEPS)
    return {step: (str(out / step), metrics) for step, metrics in runs.items()}


def test_every_step_logs_finite_numbers_and_the_metrics_that_a_ppo_run_needs(chain):
    for step, (folder, metrics) in chain.items():  # what is not finite is not logged
        assert all({"loss", "grad_norm", "lr"} <= set(row) for row in metrics) if step != "ppo" else len(metrics) == 4, step
        run = json.load(open(Path(folder) / "run.json"))
        assert run["config"]["batch_size"] == 8 and run["versions"]["torch"] == torch.__version__
    needed = ("score score_std score_clipped kl kl_k3 entropy ratio_mean ratio_max clip_frac value_clip_frac approx_kl explained_variance "
              "advantage_mean advantage_std eos_rate length actor_grad_norm critic_grad_norm engine_gap_mean engine_gap_max tokens_per_s "
              "memory_gib rollout_s score_s update_s")
    for row in chain["ppo"][1][1:]:
        assert set(needed.split()) <= set(row), set(needed.split()) - set(row)
    samples = [json.loads(line) for line in open(Path(chain["ppo"][0]) / "samples.jsonl")]
    assert len(samples) == 3 * 8 and {"prompt", "answer", "score"} <= set(samples[0])
    first = chain["ppo"][1][1]
    assert abs(first["kl"]) < 1e-3 and first["engine_gap_max"] < 1e-4, "before the first update actor and reference are one, and so are engine and trainer"


def test_each_folder_loads_with_transformers_alone_in_a_fresh_process(chain, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer\n"
        "out = {}\nfor step in ('sft', 'reward', 'ppo'):\n"
        "    auto = AutoModelForSequenceClassification if step == 'reward' else AutoModelForCausalLM\n"
        "    folder = f'{sys.argv[1]}/{step}'\n    tok, model = AutoTokenizer.from_pretrained(folder), auto.from_pretrained(folder).eval()\n"
        "    ids = tok(['Human: reverse apple\\nAssistant: elppa'], return_tensors='pt')['input_ids']\n"
        "    out[step] = model(input_ids=ids).logits.detach()\nassert 'utils' not in sys.modules\ntorch.save(out, sys.argv[2])\n")
    root = Path(chain["sft"][0]).parent
    done = subprocess.run([sys.executable, str(probe), str(root), str(tmp_path / "out.pt")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "out.pt")
    tok = models.load_tokenizer(chain["sft"][0])
    ids = torch.tensor([tok("Human: reverse apple\nAssistant: elppa")["input_ids"]])
    with torch.no_grad():
        for step in ("sft", "ppo"):
            assert torch.equal(models.load_lm(chain[step][0], torch.float32).eval()(ids).logits, theirs[step]), step
        rm = RewardModel.from_pretrained(chain["reward"][0])
        ours = rm.score(ids, torch.tensor([ids.size(1)]))
    config = rm.model.config
    torch.testing.assert_close(ours, (theirs["reward"][:, 0] - config.score_offset) * config.score_scale)
    assert config.score_offset != 0 and config.score_scale != 1


def test_the_three_steps_learn_what_they_are_shown(chain, toy_file, tmp_path):
    losses = [r["loss"] for r in chain["sft"][1]]
    assert losses[-1] < 0.6 * losses[0], "demonstrations become likelier"
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"number {i}", "chosen": "good", "rejected": "bad"} for i in range(100)])
    metrics = train(reward, tmp_path / "rm", data=pairs, model=chain["sft"][0], epochs=3, **STEPS)
    assert metrics[-1]["held_out_accuracy"] == 1 and metrics[-1]["held_out_margin"] > 1 and metrics[-1]["margin"] > metrics[0]["margin"] + 1
    (tmp_path / "rules.py").write_text("def short(prompts, answers):\n    return [-float(len(a)) for a in answers]\n")
    metrics = train(ppo, tmp_path / "ppo", model=chain["sft"][0], reward_model="", reward=f"{tmp_path}/rules.py:short:0.5", data=toy_file,
                    **dict(PPO_STEPS, batch_size=32, iterations=10, actor_lr=3e-3))
    scores = [r["score"] for r in metrics[1:]]
    assert np.mean(scores[-2:]) > np.mean(scores[:2]) + 0.5 and metrics[-1]["length"] < metrics[1]["length"], "what is rewarded becomes likelier"


def test_gold_is_what_the_checker_says_of_answers_that_ended(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SOURCES", {**data.SOURCES, "mini": lambda: ({"prompt": f"copy {i}"} for i in range(200))})
    monkeypatch.setattr(data, "CHECKERS", {"mini": lambda prompt, answer: float("7" not in prompt)})
    metrics = train(ppo, tmp_path / "p", **{**flags, "data": "mini", "batch_size": 32})
    samples = [json.loads(line) for line in open(tmp_path / "p" / "samples.jsonl")]
    assert all(s["gold"] == ("7" not in s["prompt"]) * s["eos"] for s in samples) and len({(s["eos"], s["gold"]) for s in samples}) == 3
    assert metrics[1]["gold"] == pytest.approx(np.mean([s["gold"] for s in samples])) and 0 < metrics[1]["eval_gold"] < 1 and "eval_ema_gold" in metrics[1]


def test_rollouts_are_random_in_order_and_in_numbers_and_the_critic_begins_as_the_reward_model(chain, toy_file, tmp_path, monkeypatch):
    seeds, orders, batches, values = [], [], [], []
    real_rollout, real_gae = ppo.rollout, ppo.gae

    def rollout(engine, prompts, cfg, eos, s, rank, world):
        seeds.extend(s), orders.append([len(p) for p in prompts])
        batches.append(real_rollout(engine, prompts, cfg, eos, s, rank, world))
        return batches[-1]
    monkeypatch.setattr(ppo, "rollout", rollout)
    monkeypatch.setattr(ppo, "gae", lambda v, *more: (values.append(v.clone()), real_gae(v, *more))[1])
    train(ppo, tmp_path / "p", **dict(PPO_STEPS, iterations=2, batch_size=16), model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file, ema=0.0)
    rolled = [i for i, order in enumerate(orders) if len(order) == 16]
    assert all(orders[i] != sorted(orders[i]) for i in rolled), "a step of the first epoch sees no other lengths than another"
    in_training = [s for s in seeds if not 2**31 <= s < 2**31 + 1000]
    assert len(in_training) == 32 == len(set(in_training)), "every answer has random numbers of its own"
    batch, critic = batches[rolled[0]], RewardModel.from_pretrained(chain["reward"][0]).eval()
    with torch.no_grad():
        torch.testing.assert_close(values[0], ppo.answer_values(critic, batch.tokens, batch.prompt_lens, batch.answer_lens), rtol=1e-4, atol=1e-5)


def test_the_epochs_on_a_rollout_end_where_the_policy_has_moved_too_far(chain, toy_file, tmp_path, monkeypatch):
    flags = dict(PPO_STEPS, iterations=1, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file, ema=0.0)
    steps = []
    for most in (1e9, 0.0):
        monkeypatch.setattr(ppo, "STOP_KL", most)
        steps.append(train(ppo, tmp_path / "p", **flags)[1]["steps"])
    assert steps == [4, 2], "the first step moves nothing that it could see; the second does"


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_step_sees_a_gradient_of_at_most_one(zero):
    utils.boot(0)
    engine = training.train_engine(models.Policy(model_of("llama")), 1e-3, 2, 1, ppo.Config(zero=zero))
    engine.backward(-100 * engine(torch.tensor(ragged([12, 12])), torch.tensor([5, 5]), torch.tensor([7, 7]))[0].mean())
    norms = training.step(engine)
    moments = torch.cat([s["exp_avg"].flatten() for s in engine.basic_optimizer.state.values()])
    assert norms[0] > 10 and moments.norm() == pytest.approx(0.1, rel=1e-3), "Adam's first moment is a tenth of it"


def test_chosen_answers_score_zero_on_average_and_scores_have_variance_one(chain, toy_file, tok):
    rows, _ = load_file(toy_file, tok, "reward")
    a = RewardModel.from_pretrained(chain["reward"][0])
    tokens, lens = data.pad([rows.prompt(i) + rows.answer(i, "chosen") for i in range(len(rows))])
    with torch.no_grad():
        scores = a.score(tokens, lens)
        other = a.score(*data.pad([rows.prompt(i) + rows.answer(i, "rejected") for i in range(len(rows))]))
    assert abs(scores.mean()) < 0.1 and abs(torch.cat([scores, other]).std() - 1) < 0.1, "0 for a chosen answer, variance 1 over all"


@pytest.mark.parametrize("save_memory", ["no", "recompute"])  # recomputing trains in training mode
def test_the_first_ratio_is_exactly_one_in_spite_of_dropout_in_the_config(save_memory, chain, toy_file, tmp_path):
    config = json.load(open(Path(chain["sft"][0]) / "config.json"))
    for step in ("sft", "reward"):
        subprocess.run(["cp", "-r", chain[step][0], str(tmp_path / step)], check=True)
        path = tmp_path / step / "config.json"
        path.write_text(json.dumps({**json.load(open(path)), "attention_dropout": 0.1}))
    assert config["attention_dropout"] == 0.0
    flags = dict(PPO_STEPS, iterations=2, ppo_epochs=1, actor_lr=0.0, temperature=0.7, micro_batch=3, save_memory=save_memory)
    metrics = train(ppo, tmp_path / "ppo", model=str(tmp_path / "sft"), reward_model=str(tmp_path / "reward"), data=toy_file, **flags)
    for row in metrics[1:]:
        assert row["ratio_max"] == 1 and row["ratio_mean"] == 1 and row["clip_frac"] == 0 and row["approx_kl"] == 0, "fp32: exactly, at any temperature"
        assert abs(row["kl"]) < 1e-5 and row["engine_gap_max"] < 1e-4, "the reference has the temperature in it too, and so has the engine"


def test_one_update_an_iteration_needs_no_old_pass_and_the_engines_logprobs_can_stand_in(chain, toy_file, tmp_path):
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file)
    one = train(ppo, tmp_path / "a", **{**flags, "ppo_epochs": 1, "minibatches": 1})
    assert all(row["ratio_max"] == 1 and row["engine_gap_max"] < 1e-4 for row in one[1:])
    trainer, engine = (train(ppo, tmp_path / "b", **flags, old_logprobs=who) for who in ("trainer", "engine"))
    for a, b in zip(trainer, engine):
        assert a.get("score", 0) == pytest.approx(b.get("score", 0), abs=1e-4) and a.get("actor_loss", 0) == pytest.approx(b.get("actor_loss", 0), abs=1e-4)
    assert all(row.get("engine_gap_max", 0) == 0 for row in engine), "where the engine's are the old ones there is no gap"


def test_ppo_also_runs_on_the_slow_path(chain, toy_file, tmp_path):
    metrics = train(ppo, tmp_path / "p", **{**PPO_STEPS, "iterations": 1}, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file, engine="hf")
    assert metrics[1]["engine_gap_max"] < 1e-3 and metrics[1]["engine_generate_s"] > 0


def test_an_unfinished_answer_loses_exactly_the_penalty(chain, toy_file, tmp_path, monkeypatch):
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file, iterations=1, batch_size=32, max_new_tokens=4)
    scores = {}
    for penalty in (0.0, 2.5):
        monkeypatch.setattr(ppo, "EOS_PENALTY", penalty)
        train(ppo, tmp_path / "p", **flags)
        scores[penalty] = [json.loads(line) for line in open(tmp_path / "p" / "samples.jsonl")]
    assert {s["eos"] for s in scores[0.0]} == {True, False}
    for a, b in zip(scores[0.0], scores[2.5]):
        assert a["score"] - b["score"] == pytest.approx(0 if a["eos"] else 2.5, abs=1e-3)


def test_with_lora_the_reference_is_the_actors_base_and_the_output_is_a_plain_merged_model(chain, toy_file, tmp_path):
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file)
    metrics = train(ppo, tmp_path / "ppo", **flags, lora="4", actor_lr=0.02)
    assert abs(metrics[1]["kl"]) < 1e-3 < metrics[-1]["kl"], "at first the adapters do nothing"
    train(sft, tmp_path / "sft", model=chain["sft"][0], data=toy_file, epochs=0.2, lora="2", **STEPS)
    train(reward, tmp_path / "rm", model=chain["sft"][0], data=toy_file, epochs=0.2, lora="2", **STEPS)
    RewardModel.from_pretrained(str(tmp_path / "rm"))
    base, merged = (models.load_lm(f, torch.float32) for f in (chain["sft"][0], str(tmp_path / "ppo")))
    assert torch.equal(base.model.embed_tokens.weight, merged.model.embed_tokens.weight), "what has no adapter is as it was"
    assert not torch.equal(base.model.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight)
    lm = models.add_lora(model_of("gpt2"), 2)
    for n, p in lm.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
    plain = model_of("gpt2")
    plain.load_state_dict(models.whole_state(lm), strict=False)
    ids = torch.tensor(ragged([9]))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-4, msg="merged weights are base and adapters together")


def _steps_on_ranks(toy_file, out, stages, world_tag):
    """Losses of every step of the three scripts, for each ZeRO stage."""
    results = {}
    for zero in stages:
        root = Path(out) / f"{world_tag}-{zero}"
        common = dict(STEPS, zero=zero, micro_batch=4 if world_tag == "one" else 2, data=toy_file, split="")  # 2 micro batches a step on each rank
        a = train(sft, root / "sft", epochs=0.15, **common)
        b = train(reward, root / "reward", model=str(root / "sft"), epochs=0.15, **common)
        c = train(ppo, root / "ppo", model=str(root / "sft"), reward_model=str(root / "reward"), **{**PPO_STEPS, **common})
        results[zero] = [[r["loss"] for r in a], [r["loss"] for r in b], [[r["actor_loss"], r["critic_loss"], r["score"], r["kl"]] for r in c[1:]],
                         [r["grad_norm"] for r in a], [[r["actor_grad_norm"], r["critic_grad_norm"]] for r in c[1:]]]
    return results


def test_two_ranks_and_every_zero_stage_take_the_steps_of_one_process(toy_file, tmp_path):
    one = _steps_on_ranks(toy_file, str(tmp_path), (0,), "one")[0]
    two, same = ranks(2, _steps_on_ranks, toy_file, str(tmp_path), (0, 1, 2, 3), "two")
    for zero, results in two.items():
        for name, got, want in zip(("sft", "reward", "ppo", "sft gradient", "ppo gradient"), results, one):
            np.testing.assert_allclose(np.array(got), np.array(want), rtol=2e-3, atol=2e-4, err_msg=f"{name}, ZeRO {zero}, two ranks")


# -----------------------------------------------------------------------------
# what runs together: ZeRO, LoRA, offload, ranks


def _table(toy_file, out, sft_folder, reward_folder):
    """PPO for two iterations with each combination; {(zero, lora, save_memory): (numbers of each iteration, a weight, the same weight of the average)}."""
    results = {}
    for lora in ("", "4,lr=0.01"):
        for zero in (0, 2, 3):
            for save_memory in ("no", "both"):
                folder = Path(out) / f"{zero}-{bool(lora)}-{save_memory}"
                flags = dict(PPO_STEPS, iterations=2, micro_batch=2, zero=zero, lora=lora, save_memory=save_memory)
                metrics = train(ppo, folder, model=sft_folder, reward_model=reward_folder, data=toy_file, **flags)
                weights = [models.load_lm(str(f), torch.float32).model.layers[1].mlp.up_proj.weight.detach() for f in (folder, folder / "ema")]
                results[zero, lora, save_memory] = ([[r[k] for k in ("actor_loss", "critic_loss", "score", "kl", "actor_grad_norm", "critic_grad_norm")] for r in metrics[1:]], *weights)
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_zero_lora_offload_recomputing_and_ranks_in_every_combination_train_as_one_plain_process(world, chain, toy_file, tmp_path):
    start = models.load_lm(chain["sft"][0], torch.float32).model.layers[1].mlp.up_proj.weight.detach()
    folders = (toy_file, str(tmp_path), chain["sft"][0], chain["reward"][0])
    results = _table(*folders) if world == 1 else ranks(world, _table, *folders)[0]
    plain = {}
    for lora in ("", "4,lr=0.01"):
        flags = dict(PPO_STEPS, iterations=2, lora=lora, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file)
        metrics = train(ppo, tmp_path / "plain", **flags)
        weights = [models.load_lm(str(f), torch.float32).model.layers[1].mlp.up_proj.weight.detach() for f in (tmp_path / "plain", tmp_path / "plain" / "ema")]
        plain[lora] = ([[r[k] for k in ("actor_loss", "critic_loss", "score", "kl", "actor_grad_norm", "critic_grad_norm")] for r in metrics[1:]], *weights)
    assert len(results) == 12
    for (zero, lora, save_memory), (numbers, weight, average) in results.items():
        want, want_weight, want_average = plain[lora]
        case = f"ZeRO {zero}, LoRA {lora!r}, save_memory {save_memory}, {world} ranks"
        np.testing.assert_allclose(numbers, want, rtol=5e-3, atol=5e-4, err_msg=case)
        for got, ref in ((weight, want_weight), (average, want_average)):
            moved = (ref - start).norm()
            assert moved > 0 and (got - ref).norm() < 0.05 * moved, f"{case}: {(got - ref).norm() / moved:.3f} of the way that the weights went"


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_bfloat16_trains_at_every_stage_from_float32_masters(zero, chain, toy_file, tmp_path):
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file, iterations=2, zero=zero)
    half, full = (train(ppo, tmp_path / dtype, **flags, dtype=dtype) for dtype in ("bf16", "fp32"))
    assert half[1]["score"] == pytest.approx(full[1]["score"], abs=0.5) and abs(half[1]["kl"]) < 0.2 and half[1]["engine_gap_mean"] < 0.05
    start, after, other = (models.load_lm(f, torch.float32).model.layers[1].mlp.up_proj.weight.detach() for f in (chain["sft"][0], str(tmp_path / "bf16"), str(tmp_path / "fp32")))
    assert 0.2 < (after - start).norm() / (other - start).norm() < 5, "updates below the last bit of bfloat16 gather in the masters"


def test_offload_leaves_optimizers_frozen_models_and_sharded_weights_on_the_cpu():
    utils.boot(0)
    for zero in (0, 2, 3):
        on, off = (training.train_engine(models.Policy(model_of("llama")), 1e-3, 2, 1, ppo.Config(zero=zero, save_memory=how)) for how in ("offload", "no"))
        offloads = lambda e: bool(getattr(e.optimizer, "cpu_offload", False) or getattr(e.optimizer, "offload_optimizer", False))  # noqa: E731
        assert offloads(on) and not offloads(off), f"ZeRO {zero}"
        assert zero < 3 or on.optimizer.offload_param and not off.optimizer.offload_param

    class Far(torch.nn.Linear):  # what a frozen model is told, without a second device to be told it for
        told = []

        def to(self, where):
            self.told.append(where)
            return self
    training.frozen_engine(Far(2, 2), torch.device("meta"), ppo.Config(save_memory="offload"))
    training.frozen_engine(Far(2, 2), torch.device("meta"), ppo.Config())
    assert Far.told == ["cpu", torch.device("meta")]
    Far.told.clear()
    with pytest.raises(ZeroDivisionError):
        with training.near(torch.device("meta"), Far(2, 2), None):
            1 / 0
    assert Far.told == [torch.device("meta"), "cpu"], "there, and back whatever happens"


@pytest.mark.parametrize("zero, micro_batch", [(2, 0), (2, 3), (3, 0), (3, 3)])
def test_recomputing_and_several_forwards_a_backward_give_the_gradients_of_plain_training(zero, micro_batch, chain, toy_file, tmp_path):
    """Rows so ragged that the reward model takes four forwards; and PPO with the mixture, which takes two."""
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"{i} " + "x" * (i * i % 150), "chosen": "a" * (i % 40), "rejected": "b" * (1 + i * 7 % 60)} for i in range(80)])
    flags = dict(held_out=0.2, batch_size=8, model=chain["sft"][0])
    lengths = load_file(pairs, models.load_tokenizer("tiny"), "reward")[0].lengths("chosen", "rejected")
    assert reward.groups_for(lengths, 0) == 4 and reward.groups_for(lengths, 3) == 1
    plain = train(reward, tmp_path / "plain", data=pairs, epochs=0.5, **flags)
    other = train(reward, tmp_path / "other", data=pairs, epochs=0.5, zero=zero, save_memory="recompute", micro_batch=micro_batch, **flags)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in other], [r[key] for r in plain], rtol=5e-3, err_msg=key)
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file, iterations=1, ptx_data=toy_file, micro_batch=micro_batch)
    if zero == 3:
        with pytest.raises(utils.UserError, match="--ptx-data needs two forwards"):
            ppo.Config(**flags, zero=3, save_memory="recompute")
    plain, other = train(ppo, tmp_path / "p", **flags), train(ppo, tmp_path / "o", **flags, zero=zero, save_memory="recompute" if zero == 2 else "no")
    for key in ("actor_loss", "actor_grad_norm", "approx_kl"):
        assert other[1][key] == pytest.approx(plain[1][key], rel=5e-3, abs=1e-5), key


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_in_bfloat16_the_first_step_is_a_whole_one_and_rotary_frequencies_stay_float32(zero):
    utils.boot(0)
    cfg = ppo.Config(dtype="bf16", zero=zero)
    make = lambda: models.Policy(models.cast(model_of("llama"), torch.bfloat16))  # noqa: E731
    engine, device = training.train_engine(make(), 1e-3, 2, 1, cfg), utils.boot(0)[2]
    frozen, frequencies = training.frozen_engine(make(), device, cfg), model_of("llama").model.rotary_emb.inv_freq
    for name, policy in (("actor", engine.module), ("reference", getattr(frozen, "module", frozen)),
                         ("reward model", reward.RewardModel.from_lm("tiny", torch.bfloat16))):
        found = next(b for n, b in policy.named_buffers() if n.endswith("rotary_emb.inv_freq"))
        assert found.dtype == torch.float32 and (name == "reward model" or torch.equal(found, frequencies)), name
    before = [m.detach().clone() for m in training.masters(engine)]
    engine.backward(-engine(torch.tensor(ragged([12, 12])), torch.tensor([5, 5]), torch.tensor([7, 7]))[0].mean())
    training.step(engine)
    moved = torch.cat([(a - b).detach().flatten().abs() for a, b in zip(before, training.masters(engine))])
    assert moved.quantile(0.9) == pytest.approx(1e-3, rel=0.01), "Adam's first step is as long as the learning rate"


def test_under_zero_3_a_model_is_sharded_before_deepspeed_puts_it_on_a_gpu(monkeypatch):
    utils.boot(0)
    import deepspeed
    real, held = deepspeed.initialize, []
    monkeypatch.setattr(deepspeed, "initialize", lambda model, **how: (held.append(sum(p.numel() for p in model.parameters())), real(model=model, **how))[1])
    for zero in (2, 3):
        training.train_engine(models.Policy(model_of("llama")), 1e-3, 2, 1, ppo.Config(zero=zero))
    training.frozen_engine(models.Policy(model_of("llama")), utils.boot(0)[2], ppo.Config(zero=3))
    assert held[0] > 0 and held[1:] == [0, 0]


def test_recomputing_runs_each_layer_again_in_the_backward_pass():
    utils.boot(0)
    calls = {}
    for save_memory in ("no", "recompute"):
        policy = models.Policy(models.add_lora(model_of("llama"), "2"))  # frozen weights: the harder case
        cfg = ppo.Config(save_memory=save_memory)
        engine = training.train_engine(policy, 1e-3, 2, 1, cfg)
        n = calls[save_memory] = [0]
        policy.lm.model.layers[1].mlp.register_forward_pre_hook(lambda *_: n.__setitem__(0, n[0] + 1))
        tokens = torch.tensor(ragged([12, 12]))
        engine.backward(-engine(tokens, torch.tensor([5, 5]), torch.tensor([7, 7]))[0].mean())
        assert policy.lm.model.layers[0].mlp.up_proj.lora_B.grad.abs().sum() > 0, "and the first layer's adapters get their gradient"
    assert calls == {"no": [1], "recompute": [2]}


@pytest.mark.parametrize("dtype, zero", [("fp32", 0), ("fp32", 2), ("bf16", 0), ("bf16", 2), ("bf16", 3)])
def test_the_average_is_that_of_the_float32_weights_to_five_digits_after_a_thousand_steps(dtype, zero, tmp_path, tok):
    utils.boot(0)
    lm = model_of("gpt2", vocab_size=258).to(utils.precision(dtype))
    engine = training.train_engine(models.Policy(lm), 1e-3, 2, 1, ppo.Config(dtype=dtype, zero=zero))
    ema = training.EMA(engine, 0.992)
    want, rng = [m.detach().double() for m in training.masters(engine)], torch.Generator().manual_seed(0)
    for _ in range(1000):  # a random walk of the master weights, with a drift
        for m in training.masters(engine):
            m.data += 1e-4 * (torch.randn(m.shape, generator=rng) + 0.3)
        ema.update()
        want = [0.992 * w + (1 - 0.992) * m.detach().double() for w, m in zip(want, training.masters(engine))]
    for got, ref in zip(ema.average, want):
        assert (got - ref).norm() / ref.norm() < 1e-5
    kept = [m.detach().clone() for m in training.masters(engine)]
    shards = [(p.ds_tensor if zero == 3 else p).detach().clone() for p in engine.trained]
    with ema.in_place():
        models.save_model(lm, tok, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(kept, training.masters(engine))), "looking at the average leaves the masters as they were"
    assert all(torch.equal(a, p.ds_tensor if zero == 3 else p) for a, p in zip(shards, engine.trained)), "and the weights"
    assert all((a - b).norm() > 0 for a, b in zip(ema.average, kept))
    if zero == 0:  # one master a parameter
        saved, i = models.load_lm(str(tmp_path), torch.float32), next(i for i, p in enumerate(engine.trained) if p is lm.transformer.wte.weight)
        torch.testing.assert_close(saved.transformer.wte.weight.double(), want[i], rtol=0.01 if dtype == "bf16" else 1e-5, atol=1e-5, check_dtype=False)


# -----------------------------------------------------------------------------
# the mixture, functions as rewards, adapters


@pytest.fixture
def flags(chain, toy_file):
    return dict(PPO_STEPS, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file, iterations=1, minibatches=1, ppo_epochs=1)


def test_the_gradient_of_the_mixture_is_the_sum_of_its_parts_and_a_coefficient_of_0_changes_no_bit(flags, toy_file, tmp_path, monkeypatch):
    gradients, real_step, real_loss = {}, training.step, ppo.actor_loss

    def recording(*engines):
        if engines[0].is_gradient_accumulation_boundary():
            gradients[name] = torch.cat([p.grad.flatten().double() for p in engines[0].trained])
        return real_step(*engines)
    monkeypatch.setattr(training, "step", recording)
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"the {i}-th line of a text that goes on for a while"} for i in range(60)])
    for name, more in (("ppo", {}), ("off", dict(ptx_data=text, ptx_coef=0.0)), ("both", dict(ptx_data=text, ptx_coef=2.5)),
                       ("cut", dict(ptx_data=text, ptx_coef=2.5, micro_batch=3)), ("text", dict(ptx_data=text, ptx_coef=2.5))):
        monkeypatch.setattr(ppo, "actor_loss", real_loss if name != "text" else lambda logprobs, *_: (logprobs * 0).sum())
        train(ppo, tmp_path / name, **flags, **more)
    assert (tmp_path / "ppo/model.safetensors").read_bytes() == (tmp_path / "off/model.safetensors").read_bytes()
    # norms: one is clipped to 1 inside DeepSpeed's step, after what is recorded here
    torch.testing.assert_close(gradients["both"], gradients["ppo"] + gradients["text"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients["cut"], gradients["both"], rtol=1e-4, atol=1e-6, msg="a mean over the step's tokens, however it is cut")
    assert gradients["text"].norm() > 0.01 and gradients["ppo"].norm() > 0.01


def test_a_function_can_be_the_reward_alone_or_beside_the_model(flags, tmp_path, capsys):
    path = tmp_path / "rules.py"
    path.write_text("def length(prompts, answers):\n    return [len(a) for a in answers]\n"
                    "def fails(prompts, answers):\n    return [1 / ('sort' not in p) for p in prompts]\n"
                    "def short(prompts, answers):\n    return [1.0]\n"
                    "def nan(prompts, answers):\n    return [float('nan')] * len(prompts)\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(utils.UserError, match=r"broken.py cannot be imported: SyntaxError"):
        ppo.load_function(f"{tmp_path}/broken.py:f")
    def samples(name, **more):
        train(ppo, tmp_path / name, **{**flags, **more})
        return [json.loads(line) for line in open(tmp_path / name / "samples.jsonl")]
    alone, beside, model = samples("a", reward_model="", reward=f"{path}:length"), samples("b", reward=f"{path}:length:0.5"), samples("c")
    for a, b, c in zip(alone, beside, model):
        assert a["answer"] == b["answer"] == c["answer"], "the first rollout is the same"
        assert a["score"] == pytest.approx(len(a["answer"]) - (not a["eos"])), "the function's value, and the penalty of an unfinished answer"
        assert b["score"] == pytest.approx(c["score"] + 0.5 * len(a["answer"]), abs=1e-3)
    for message, spec in {r"raised ZeroDivisionError\(.*\) for prompt 'Human: sort": "fails", r"gave 1 scores for \d+ prompts": "short", "gave nan for prompt 'Human": "nan",
                          "has no function 'absent'": "absent", "is not a weight": "length:half", "write file.py:function": ""}.items():
        with pytest.raises(utils.UserError, match=message):
            samples("d", reward=f"{path}:{spec}")
    capsys.readouterr()
    train(ppo, tmp_path / "e", **{**flags, "reward_model": "", "reward": f"{path}:length:10"})
    assert re.search(r"warning: \d+% of the scores lie outside \+- 5.0", capsys.readouterr().out)
    with pytest.raises(utils.UserError, match="--reward must name a function"):
        ppo.Config(reward_model="")
    with pytest.raises(utils.UserError, match="there is no file"):
        samples("d", reward="nowhere.py:f")


def test_adapters_have_their_own_rank_targets_and_rate_and_load_with_peft(chain, toy_file, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    train(sft, tmp_path / "sft", model=chain["sft"][0], data=toy_file, epochs=0.3, lora="4,alpha=12,targets=q_proj+mlp.up_proj,lr=0.05", **STEPS)
    train(reward, tmp_path / "rm", model=chain["sft"][0], data=toy_file, epochs=0.3, lora="2,lr=0.05", **STEPS)
    ids = torch.tensor(ragged([20, 20]))
    for folder, auto, more in (("sft", AutoModelForCausalLM, {}), ("rm", AutoModelForSequenceClassification, {"num_labels": 1, "pad_token_id": 257})):
        merged, base = auto.from_pretrained(tmp_path / folder), auto.from_pretrained(chain["sft"][0], **more)
        both = peft.PeftModel.from_pretrained(base, str(tmp_path / folder / "adapters"))
        with torch.no_grad():
            torch.testing.assert_close(both.eval()(ids).logits, merged.eval()(ids).logits, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(merged(ids).logits, auto.from_pretrained(chain["sft"][0], **more).eval()(ids).logits, atol=1e-2)


def test_an_adapter_is_asked_for_in_one_flag():
    assert models.lora_spec("8") == dict(rank=8, alpha=16, lr=None, targets=()) and models.lora_spec("")["rank"] == 0
    assert models.lora_spec("4,alpha=2,lr=1e-3,targets=q_proj+v_proj") == dict(rank=4, alpha=2, lr=1e-3, targets=("q_proj", "v_proj"))
    lm = models.add_lora(model_of("llama"), "3,targets=q_proj+mlp.up_proj")
    names = {n for n, p in lm.named_parameters() if p.requires_grad}
    assert len(names) == 3 * 2 * 2 and all("q_proj.lora_" in n or "mlp.up_proj.lora_" in n for n in names)
    utils.boot(0)
    engine = training.train_engine(models.Policy(lm), 1e-4, 2, 1, ppo.Config(lora="3,targets=q_proj+mlp.up_proj,lr=0.003"))
    training.set_lr(engine, 5e-5)
    assert [g["lr"] for g in engine.optimizer.param_groups] == [pytest.approx(0.0015)], "half the peak of the one is half the peak of the other"
    for text, message in (("x", "write a rank"), ("8,beta=1", "write a rank"), ("4,targets=Wqkv", "has no layer 'Wqkv'; it has down_proj")):
        with pytest.raises(utils.UserError, match=message):
            models.add_lora(model_of("llama"), text)


# -----------------------------------------------------------------------------
# going on after an end, and failing together


class Killed(Exception):
    pass


def _in_two_parts(script, out, after, flags):
    """Runs a script that dies right after the checkpoint of step `after`, then again with --resume; returns its metrics."""
    real, real_restore, began = training.Checkpoint.save, training.Checkpoint.restore, []

    def restore(self):
        out = real_restore(self)
        began.append(out[0])
        return out

    def save(self, at, **added):
        real(self, at, **added)
        if at == after:
            raise Killed
    training.Checkpoint.save, training.Checkpoint.restore = save, restore
    try:
        train(script, out, **flags)
    except Killed:
        training.Checkpoint.save = real
        assert not (Path(out) / "model.safetensors").exists()
        metrics = train(script, out, **flags, resume=True)
    finally:
        training.Checkpoint.save, training.Checkpoint.restore = real, real_restore
    assert began == [0, after], "it went on, and did not begin again"
    return metrics


TIMES = ("_s", "per_s", "memory_gib", "floor_share", "gather", "generate")


def _resumed_equals_whole(toy_file, out, zeros, sft_folder, reward_folder):
    """For each script and stage: whether files and numbers of 4 steps are those of 2 + end + 2."""
    same = {}
    for zero in zeros:
        common = dict(data=toy_file, held_out=0.2, batch_size=8, max_len=64, zero=zero, micro_batch=4)
        runs = {"sft": (sft, dict(common, epochs=0.19)), "reward": (reward, dict(common, epochs=0.19, model=sft_folder)),
                "ppo": (ppo, dict(common, iterations=4, minibatches=2, ppo_epochs=2, max_new_tokens=8, model=sft_folder, reward_model=reward_folder,
                                  kl_target=1.0, ptx_data=toy_file, lora="4" if zero == 2 else ""))}
        for name, (script, flags) in runs.items():
            a, b = Path(out) / f"{name}-{zero}-whole", Path(out) / f"{name}-{zero}-parts"
            whole, parts = train(script, a, **flags), _in_two_parts(script, b, 2, flags)
            assert len(whole) >= 4
            strip = lambda rows: [{k: v for k, v in r.items() if not k.endswith(TIMES)} for r in rows]  # noqa: E731
            files = ["model.safetensors"] + (["samples.jsonl", "ema/model.safetensors"] if name == "ppo" else [])
            torch.distributed.barrier()
            same[name, zero] = strip(whole) == strip(parts) and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
            assert not (b / "checkpoint").exists() and json.load(open(b / "run.json"))["finished"]
    return same


@pytest.mark.parametrize("world", [1, 2])
def test_four_steps_are_two_and_an_end_and_two_bit_for_bit(world, chain, toy_file, tmp_path):
    args = (toy_file, str(tmp_path), (0, 1, 2, 3), chain["sft"][0], chain["reward"][0])
    same = _resumed_equals_whole(*args) if world == 1 else ranks(world, _resumed_equals_whole, *args)[0]
    assert len(same) == 12 and all(same.values()), same


def test_resuming_says_what_it_cannot_do(chain, toy_file, tmp_path, capsys):
    flags = dict(STEPS, data=toy_file, epochs=0.3, zero=1)
    done = train(sft, tmp_path / "a", **flags)
    with pytest.raises(SystemExit) as end:
        sft.main(sft.Config(out=str(tmp_path / "a"), resume=True, **flags))
    assert end.value.code == 0 and "is finished: nothing is left to do" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match="--batch-size was 8, and now it is 4; a run goes on as it began"):
        sft.main(sft.Config(out=str(tmp_path / "a"), resume=True, **{**flags, "batch_size": 4}))
    assert [r["loss"] for r in train(sft, tmp_path / "new", **flags, resume=True)] == [r["loss"] for r in done], "where there is nothing yet it begins"
    ranks(2, _die_after, str(tmp_path / "whole"), {**flags, "zero": 0})
    np.testing.assert_allclose([r["loss"] for r in train(sft, tmp_path / "whole", **{**flags, "zero": 0}, resume=True)], [r["loss"] for r in done], rtol=1e-4,
                               err_msg="ZeRO 0 keeps everything on every rank, so one rank can go on where two were")
    ranks(2, _die_after, str(tmp_path / "two"), flags)
    with pytest.raises(utils.UserError, match="holds a run that did not end, up to step 3: go on with --resume"):
        sft.main(sft.Config(out=str(tmp_path / "two"), **flags))
    with pytest.raises(utils.UserError, match="was written by 2 ranks, and now there are 1.*zero_to_fp32.py") as said:
        sft.main(sft.Config(out=str(tmp_path / "two"), resume=True, **flags))
    code, out = command(*shlex.split(re.search("`python (.*)`", str(said.value))[1]))
    assert code == 0 and list((tmp_path / "two/checkpoint/3/weights").glob("*")), f"the command that it names works: {out}"


def _die_after(out, flags):
    real = training.Checkpoint.save

    def save(self, at, **added):
        real(self, at, **added)
        if at == 3:
            raise Killed
    training.Checkpoint.save = save
    try:
        train(sft, out, **flags)
    except Killed:
        return True


def _poisoned(toy_file, out, sft_folder, reward_folder, zero):
    """PPO in which rank 1's (or the only rank's) critic loss is not a number at the second step of three. Returns, for each step, whether any weight of actor and of critic moved."""
    real_step, real_loss, n, moved = training.step, ppo.critic_loss, [0], []
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    whole = lambda e: [float(p.detach().double().sum()) for p in training.masters(e)]  # noqa: E731

    def loss(*args):
        n[0] += 1
        return real_loss(*args) * (float("nan") if n[0] == 2 and rank == world - 1 else 1.0)

    def step(*engines):
        before = [whole(e) for e in engines]
        out = real_step(*engines)
        moved.append([whole(e) != b for e, b in zip(engines, before)])
        return out
    training.step, ppo.critic_loss = step, loss
    try:
        metrics = train(ppo, out, model=sft_folder, reward_model=reward_folder, data=toy_file,
                        **dict(PPO_STEPS, iterations=3, minibatches=1, ppo_epochs=1, zero=zero))
    finally:
        training.step, ppo.critic_loss = real_step, real_loss
    return moved, [r["skipped"] for r in metrics[1:]], ["actor_grad_norm" in r for r in metrics[1:]]


@pytest.mark.parametrize("world, zero", [(1, 0), (1, 2), (2, 0), (2, 3)])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_of_actor_and_critic_on_all(world, zero, chain, toy_file, tmp_path):
    args = (toy_file, str(tmp_path / "p"), chain["sft"][0], chain["reward"][0], zero)
    results = [_poisoned(*args)] if world == 1 else ranks(world, _poisoned, *args)
    for moved, skipped, normed in results:
        assert moved == [[True, True], [False, False], [True, True]], moved
    assert skipped == [0, 1, 1] and normed == [True, False, True]


def test_a_run_whose_gradients_stay_bad_stops_with_advice(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "actor_loss", lambda logprobs, *_: logprobs.sum() * float("inf"))
    with pytest.raises(utils.UserError, match="last 5 steps .* not finite.*lower learning rate"):
        train(ppo, tmp_path / "p", **{**flags, "iterations": 9})


KILLS = int(os.environ.get("NANORLHF_KILLS", 1))  # of each script; 20 by hand


def _killed(name, flags, folder, seed):
    """Runs a script whole; then again with `kill -9` at random moments of its training, each time resumed. Where a part reaches the end before it is killed, it is
    compared, and another run begins. Returns how many steps each kill had seen and whether all ends are that of the whole run: weights, and numbers but for times."""
    import random
    import shutil
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    start = lambda out, *more: subprocess.Popen([sys.executable, f"{name}.py", *flags, "--out", str(out), *more], cwd=HERE, env=env,  # noqa: E731
                                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kept = lambda: any(p.name.isdigit() for p in (folder / "parts/checkpoint").glob("*"))  # noqa: E731
    files = ["model.safetensors"] + ["ema/model.safetensors", "samples.jsonl"] * (name == "ppo")
    rows = lambda run: [json.loads(line) for line in open(folder / run / "metrics.jsonl")]  # noqa: E731

    def check(process, resumes):
        said = process.communicate()[0]
        assert process.returncode == 0, said
        assert ("goes on after step" in said or "is finished" in said) or not resumes, said
        resumed.append(resumes)
        strip = lambda run: [{k: v for k, v in r.items() if not k.endswith(TIMES)} for r in rows(run)]  # noqa: E731
        same.append(strip("parts") == strip("whole") and all((folder / "whole" / f).read_bytes() == (folder / "parts" / f).read_bytes() for f in files))
        shutil.rmtree(folder / "parts")
    rng, seen, same, resumed, clock, process = random.Random(seed), [], [], [], time.time(), start(folder / "whole")
    while not ((log := folder / "whole/metrics.jsonl").exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    begin = time.time() - clock
    said = process.communicate()[0]
    assert process.returncode == 0, said
    end = time.time() - clock
    while len(seen) < KILLS:
        resumes, process = kept(), start(folder / "parts", "--resume")
        try:
            process.wait(rng.uniform(begin, end))
            begin, end = begin * 0.8, end * 0.8  # too late: the machine has become faster, or there was little left
            check(process, resumes)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            log = folder / "parts/metrics.jsonl"
            seen.append(log.read_text().count("\n") if log.exists() else 0)
    resumes = kept()
    check(start(folder / "parts", "--resume"), resumes)
    return {"script": name, "steps": rows("whole")[-1]["step"], "rows_logged_at_each_kill": seen, "ends_compared": len(same), "of_them_resumed": sum(resumed), "same": all(same)}


def test_a_script_that_is_killed_at_random_moments_ends_as_one_that_is_not(chain, toy_file, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    common = ["--data", toy_file, "--held-out", "0.2", "--batch-size", "8", "--max-len", "64"]
    jobs = [("sft", [*common, "--epochs", "3"], tmp_path / "sft", 1), ("reward", [*common, "--epochs", "2", "--model", chain["sft"][0]], tmp_path / "reward", 2),
            ("ppo", [*common, "--iterations", "15", "--minibatches", "2", "--max-new-tokens", "8", "--kl-target", "1", "--model", chain["sft"][0],
                     "--reward-model", chain["reward"][0]], tmp_path / "ppo", 3)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: _killed(*job), jobs))
    assert all(r["same"] for r in results), results
    if out := os.environ.get("NANORLHF_KILLS_OUT"):
        Path(out).write_text(json.dumps(results, indent=1))


def recipes():
    """{title: [(old lines, new lines)]} of the README's diffs."""
    out = {}
    for title, block in re.findall(r"\*\*([^*\n]+)\*\*[^`]*?```diff\n(.*?)```", (HERE / "README.md").read_text(), re.S):
        hunks = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", block, re.M)
        out[title] = [tuple("".join(line[1:] + "\n" for line in part.splitlines()) for part in hunk) for hunk in hunks]
        assert sum(part.count("\n") for hunk in out[title] for part in hunk) == len([line for line in block.splitlines() if line.strip()]), title
    return out


@pytest.mark.parametrize("title", list(recipes()))
def test_a_recipe_is_a_diff_of_at_most_fifteen_lines_that_applies_and_trains(title, chain, toy_file, tmp_path):
    import importlib.util
    source, hunks = (HERE / "ppo.py").read_text(), recipes()[title]
    assert sum(part.count("\n") for hunk in hunks for part in hunk) <= 15
    for old, new in hunks:
        assert source.count(old) == 1, f"this is not once in ppo.py:\n{old}"
        source = source.replace(old, new)
    (tmp_path / "recipe.py").write_text(source)
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("recipe", tmp_path / "recipe.py"))
    sys.modules["recipe"] = module
    spec.loader.exec_module(module)
    if title.startswith("Truncated"):  # in float32 the engine has no gap to the trainer: make one
        real = module.rollout

        def rollout(*args):
            batch = real(*args)
            batch.logprobs += 0.5 * torch.arange(batch.logprobs.size(1)).sin() * batch.mask
            return batch
        module.rollout = rollout
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file)
    metrics, plain = train(module, tmp_path / "recipe", **flags), train(ppo, tmp_path / "plain", **flags)
    assert len(metrics) == 4 and metrics[1]["ratio_mean"] == pytest.approx(1, abs=0.2) and metrics[-1]["eval_kl"] != 0
    assert metrics[-1]["eval_score"] != plain[-1]["eval_score"], "it changes what is learned"
    assert ("critic_loss" in metrics[1]) == (not title.startswith(("RLOO", "GRPO"))), "without a critic there is none in the log"


# -----------------------------------------------------------------------------
# the engine


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_that_of_transformers_generate_token_for_token(kind):
    lm, lengths = model_of(kind), (1, 3, 3, 17, 40, 90, 200)
    prompts = ragged(lengths)
    likely = rows_of(HybridEngine(lm).generate(prompts, 24, temperature=0))[2][lengths[2] + 4]  # so that some answers end early
    out = HybridEngine(lm, max_batch=4).generate(prompts, 24, temperature=0, eos_token_id=likely)
    assert len(set(out.answer_lens.tolist())) > 1, "answers end at different places"
    for i, (p, mine) in enumerate(zip(prompts, rows_of(out))):
        theirs = lm.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False, eos_token_id=likely, pad_token_id=0)[0].tolist()
        assert mine == theirs, f"{kind}, prompt of {len(p)} tokens"
        gap = (plain_logprobs(lm, mine, len(p)) - out.logprobs[i, : len(mine) - len(p)]).abs().max()
        assert gap < 1e-4, f"{kind}: log-probabilities are off by {gap:.1e}"


@shared
def test_greedy_output_is_that_of_transformers_on_real_weights():
    tok, lm = models.load_tokenizer(STORIES), models.load_lm(STORIES, torch.float32).eval()
    prompts = tok(["Once upon a time", "Lily and Tom went to the park. They saw a big", "The"])["input_ids"]
    out = HybridEngine(lm).generate(prompts, 120, temperature=0, eos_token_id=tok.eos_token_id)
    for p, mine in zip(prompts, rows_of(out)):
        assert mine == lm.generate(torch.tensor([p]), max_new_tokens=120, do_sample=False, pad_token_id=0)[0].tolist()
    assert "Once upon a time, there was" in tok.decode(rows_of(out)[0])


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_engine_follows_every_optimizer_step_and_never_changes_a_weight(kind, lora):
    lm = model_of(kind)
    if lora:
        models.add_lora(lm, 4)
    params = [p for p in lm.parameters() if p.requires_grad]
    optimizer, engine, prompts = torch.optim.AdamW(params, lr=0.02), HybridEngine(lm), ragged((3, 9, 5))
    before = None
    for _ in range(5):
        optimizer.zero_grad()
        lm(torch.tensor([prompts[1]]), labels=torch.tensor([prompts[1]])).loss.backward()
        optimizer.step()
        weights = [p.clone() for p in lm.parameters()]
        mine = rows_of(engine.generate(prompts, 12, temperature=0))
        assert mine == [lm.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist() for p in prompts]
        assert all(torch.equal(a, b) for a, b in zip(weights, lm.parameters())), "no weight changes by one bit"
        assert mine != before, "the steps were large enough to be seen"
        before = mine
    if lora:
        base = model_of(kind)
        with models.adapters_off(), torch.no_grad():
            ids = torch.tensor([prompts[1]])
            assert torch.equal(lm(ids).logits, base(ids).logits), "with its adapters off the model is its base, bit for bit"


def test_a_hundred_rollouts_leave_the_weights_and_a_release_leaves_the_memory_as_it_was():
    import gc
    lm = model_of("llama")
    weights = [p.clone() for p in lm.parameters()]
    def held():
        gc.collect()
        return sum(x.numel() * x.element_size() for x in gc.get_objects() if type(x) is torch.Tensor)
    before, engine = held(), HybridEngine(lm)
    for seed in range(100):
        engine.generate(ragged((3, 5)), 4, seed=seed)
    assert held() > before + engine.k.numel() * 4
    engine.release()
    assert held() <= before + 4096, "release gives everything back but a few indices"
    assert all(torch.equal(a, b) for a, b in zip(weights, lm.parameters()))


def test_a_row_keeps_its_tokens_however_rows_are_batched():
    lm, prompts = model_of("llama"), ragged([1 + i % 13 for i in range(40)])
    def sampled(engine, rows=range(40)):
        out = engine.generate([prompts[i] for i in rows], 20, eos_token_id=[7, 8, 9], seed=[100 + i for i in rows], temperature=1.3)
        return dict(zip(rows, rows_of(out))), out
    whole, out = sampled(HybridEngine(lm))
    assert len(set(out.answer_lens.tolist())) > 3 and all(r[-1] in (7, 8, 9) for r, a in zip(rows_of(out), out.answer_lens) if a < 20)
    small, out_small = sampled(engine := HybridEngine(lm, max_batch=4))
    assert small == whole and engine.k.size(1) == 4, "a rollout ten times larger than the arena"
    torch.testing.assert_close(out_small.logprobs, out.logprobs, rtol=1e-4, atol=1e-5)
    slot = 2 * 3 * 2 * 64 * 16 * 4  # K and V, layers, key heads, capacity, head size, bytes
    assert sampled(engine := HybridEngine(lm, kv_gib=4.5 * slot / 2**30, max_len=64))[0] == whole and engine.k.size(1) == 4, "an arena of four rows by memory"
    some = [31, 2, 17]
    assert sampled(HybridEngine(lm), some)[0] == {i: whole[i] for i in some}, "three of the rows, in another order"
    again = [HybridEngine(lm).generate(prompts, 8, seed=s).tokens for s in (5, 5, 6)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_answers_to_one_prompt_share_its_prefill_and_differ():
    lm, (prompt,) = model_of("qwen3"), ragged([30])
    engine = HybridEngine(lm)
    out = engine.generate([prompt] * 8 + ragged([5]), 10, seed=3)
    assert engine.stats["prefill_tokens"] == 35, "30 tokens once, and the other 5"
    assert len({tuple(r) for r in rows_of(out)[:8]}) > 4
    for i, row in enumerate(rows_of(out)):
        torch.testing.assert_close(plain_logprobs(lm, row, int(out.prompt_lens[i])), out.logprobs[i].double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.7), (0.8, 6, 0.8)])
def test_samples_have_the_frequencies_of_the_distribution(temperature, top_k, top_p):
    n, V = 100_000, 12
    logits = torch.randn(V, generator=torch.Generator().manual_seed(4)) * 1.5
    u = kernels.uniform(torch.arange(n), torch.full((n,), 17))
    tokens, logprobs = kernels.sample(logits.expand(n, V), u, temperature, top_k, top_p)
    p, order = (logits.double() / temperature).softmax(-1), logits.argsort(descending=True)  # the naive version keeps tokens one by one
    kept, mass = [], 0.0
    for i, t in enumerate(order.tolist()):
        renormalised = p[order[: top_k or V]].sum()
        if (top_k and i >= top_k) or mass >= top_p:
            break
        kept.append(t)
        mass += (p[t] / renormalised).item()
    want = torch.zeros(V, dtype=torch.float64)
    want[kept] = p[kept] / p[kept].sum()
    counts = tokens.bincount(minlength=V).double()
    assert counts[want == 0].sum() == 0, "only kept tokens are drawn"
    chi2 = ((counts - n * want) ** 2 / (n * want))[want > 0].sum().item()
    k = len(kept) - 1
    assert chi2 < k + 4 * math.sqrt(2 * k), f"chi-square {chi2:.1f} with {k} degrees of freedom"
    torch.testing.assert_close(logprobs.double(), want.log()[tokens], rtol=1e-5, atol=1e-5)
    if temperature == 1.7:
        assert abs(u.mean() - 0.5) < 0.005 and abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 0.02


def test_logprobs_of_sampled_tokens_are_those_of_the_tempered_policy():
    lm, prompts = model_of("opt"), ragged((4, 8))
    out = HybridEngine(lm).generate(prompts, 10, temperature=0.7, seed=1)
    for i, row in enumerate(rows_of(out)):
        torch.testing.assert_close(plain_logprobs(lm, row, len(prompts[i]), 0.7), out.logprobs[i].double(), rtol=1e-4, atol=1e-4)


def test_what_the_engine_cannot_do_it_says_before_it_starts(tmp_path):
    from transformers import AutoModelForCausalLM, FalconConfig
    falcon = AutoModelForCausalLM.from_config(FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(utils.UserError, match="'falcon'.*--engine hf"):
        HybridEngine(falcon)
    lm = model_of("llama")
    for message, call in {
        "prompt 1 has 500 tokens; with 20 new ones that is more than the model's context of 512": lambda: HybridEngine(lm).generate(ragged((3, 500)), 20),
        "more than max_len of 32": lambda: HybridEngine(lm, max_len=32).generate(ragged((3, 20)), 20),
        "one row of 32 tokens needs": lambda: HybridEngine(lm, kv_gib=1e-6).generate(ragged((3,)), 20),
        "prompt 1 is empty": lambda: HybridEngine(lm).generate([[3], []], 20),
        "there is no prompt": lambda: HybridEngine(lm).generate([], 20),
        "outside the vocabulary of 97": lambda: HybridEngine(lm).generate([[97]], 20),
        "top_p 0.0 must be in": lambda: HybridEngine(lm).generate([[3]], 20, top_p=0.0),
        "max_new_tokens is 0": lambda: HybridEngine(lm).generate([[3]], 0),
    }.items():
        with pytest.raises(utils.UserError, match=message):
            call()
    dynamic = model_of("llama", rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))
    with pytest.raises(utils.UserError, match="rope scaling 'dynamic'"):
        HybridEngine(dynamic)


def test_the_slow_path_has_the_same_interface_and_the_same_greedy_tokens():
    lm, prompts = model_of("gpt2"), ragged((4, 11, 1))
    out, slow = (make_engine(name, lm).generate(prompts, 12, temperature=0, eos_token_id=[7, 20]) for name in ("hybrid", "hf"))
    assert rows_of(out) == rows_of(slow)
    assert torch.equal(out.prompt_lens, slow.prompt_lens) and torch.equal(out.answer_lens, slow.answer_lens)
    torch.testing.assert_close(out.logprobs, slow.logprobs, rtol=1e-4, atol=1e-4)
    a, b = (HFEngine(lm).generate(prompts, 12, temperature=0.7, seed=4) for _ in range(2))
    assert torch.equal(a.tokens, b.tokens)
    assert rows_of(HFEngine(lm).generate(prompts, 12, temperature=0.7, top_k=1)) == rows_of(make_engine("hybrid", lm).generate(prompts, 12, temperature=0))
    for name in ("hybrid", "hf"):
        whole = rows_of(make_engine(name, lm).generate(prompts[1:2], 12, temperature=0.7, eos_token_id=[7, 20], seed=3))[0]
        assert prompts[1] + list(make_engine(name, lm).stream(prompts[1], 12, 0.7, eos_token_id=[7, 20], seed=3)) == whole, name
    for i, row in enumerate(rows_of(a)):
        torch.testing.assert_close(plain_logprobs(lm, row, len(prompts[i]), 0.7), a.logprobs[i].double(), rtol=1e-3, atol=1e-3)


def test_the_slow_path_samples_the_trained_distribution_whatever_the_model_is_set_to():
    lm, prompts = model_of("llama"), ragged((4, 11))
    want = HFEngine(lm).generate(prompts, 30, temperature=0.9, seed=4)
    lm.generation_config.repetition_penalty, lm.generation_config.min_length, lm.generation_config.eos_token_id = 3.0, 20, 7
    lm.gradient_checkpointing_enable(), lm.train()  # as while training with --save-memory recompute
    got = HFEngine(lm).generate(prompts, 30, temperature=0.9, seed=4)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.logprobs, want.logprobs)
    assert lm.training and lm.generation_config.repetition_penalty == 3.0, "and leaves the model as it was"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_graph_replay_equals_eager_steps_across_an_optimizer_step(kind):
    lm, prompts = model_of(kind).cuda(), ragged((3, 30, 9, 1, 200))
    engine, eager = HybridEngine(lm), HybridEngine(lm)
    eager._step = eager._decode
    many = list(range(60, 97))
    first = None
    for turn in range(3):
        for temperature, eos in ((0.0, [7, 8]), (1.0, [7, 8]), (1.0, many)):
            got, want = (e.generate(prompts, 40, temperature=temperature, eos_token_id=eos, seed=3) for e in (engine, eager))
            assert rows_of(got) == rows_of(want)
            torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-3, atol=1e-3)
        graphs = {k: id(g) for k, g in engine.graphs.items() if g is not None}
        assert graphs, "steps were captured"
        assert turn != 1 or graphs == first, "the graphs outlive a weight update"
        first = graphs
        if turn == 1:
            engine.release()  # and after it, as after every rollout of PPO, others are captured
        lm(torch.tensor([prompts[1]], device="cuda"), labels=torch.tensor([prompts[1]], device="cuda")).loss.backward()
        with torch.no_grad():
            for p in lm.parameters():
                p -= 0.1 * p.grad
                p.grad = None


def with_adapters(lm):
    torch.manual_seed(7)
    models.add_lora(lm, 4)
    for n, p in lm.named_parameters():
        if "lora_B" in n:
            p.data.normal_(std=0.1)
    return lm


def _engine_on_ranks(kinds, stages):
    """On two ranks: greedy tokens under each ZeRO stage, LoRA on and off, for each family under tensor parallelism; collectives counted."""
    rank, world, device = utils.boot(1)
    import deepspeed
    out, counted, backend = {}, [], deepspeed.comm.comm.cdb
    gather = backend.all_gather_function  # DeepSpeed took it before what follows
    backend.all_gather_function = lambda *a, **k: (counted.append("all_gather of DeepSpeed"), gather(*a, **k))[1]
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast", "reduce_scatter_tensor"):
        real = getattr(torch.distributed, name)
        setattr(torch.distributed, name, lambda *a, _real=real, _name=name, **k: (counted.append(_name), _real(*a, **k))[1])
    prompts = ragged((3, 30, 9, 1))
    for kind in kinds:
        for sampled in (False, True):
            engine = HybridEngine(with_adapters(model_of("llama")) if kind == "adapters" else model_of(kind), tp=2)
            got = engine.generate(prompts[rank::2], 12, temperature=float(sampled), seed=[10 + i for i in range(rank, 4, 2)])
            out[kind, "tp", sampled] = rows_of(got), got.logprobs
    counted.clear()
    engine.generate(prompts[:1], 6, temperature=0)
    out["collectives"] = [c for c in counted if c != "all_gather_object"], 6 * 2 * engine.L + 1  # a step is a prefill or a decode; and one for the arena
    for stage in stages:
        for lora in (False, True):
            lm = model_of("llama")
            if lora:
                with_adapters(lm)
            cfg = sft.Config(zero=stage, dtype="fp32")
            ds = training.train_engine(models.Policy(lm), 1e-2, 2, 1, cfg)
            engine = HybridEngine(ds)
            for step in range(2):
                got = engine.generate(prompts, 12, temperature=0)
                out[stage, lora, step] = rows_of(got)
                engine.release()
                tokens, lens = data.pad([p + [9] for p in prompts])
                logprobs, _ = ds(tokens, torch.tensor([1] * 4), torch.tensor([2, 29, 8, 1]))
                ds.backward(-logprobs.sum() / 40)
                training.step(ds)
            if stage == 3 and not lora:  # rank 0 ends at once, rank 1 never
                counted.clear()
                first = HybridEngine(ds).generate(prompts[:1], 1, temperature=0).tokens[0, -1].item()
                gathers = len(counted)
                counted.clear()
                got = HybridEngine(ds).generate(prompts[:1], 40, temperature=0, eos_token_id=first if rank == 0 else None)
                out["uneven"] = got.answer_lens.tolist(), len(counted), gathers
            deepspeed.comm.barrier()
    return out


def test_tensor_parallel_ranks_and_zero_shards_give_the_tokens_of_one_process():
    kinds = ("llama", "adapters", "qwen3", "opt", "opt-350m", "gpt2", "gpt_neox", "bloom")
    prompts, results = ragged((3, 30, 9, 1)), ranks(2, _engine_on_ranks, kinds, (0, 2, 3))
    for kind in kinds:
        for sampled in (False, True):
            lm = with_adapters(model_of("llama")) if kind == "adapters" else model_of(kind)
            want = HybridEngine(lm).generate(prompts, 12, temperature=float(sampled), seed=[10, 11, 12, 13])
            for rank in (0, 1):
                rows, logprobs = results[rank][kind, "tp", sampled]
                assert rows == rows_of(want)[rank::2], f"{kind}, tp=2, rank {rank}"
                torch.testing.assert_close(logprobs, want.logprobs[rank::2], rtol=1e-4, atol=1e-4)
    for r in results:
        assert r["collectives"][0].count("all_reduce") == r["collectives"][1] and set(r["collectives"][0]) <= {"all_reduce", "all_gather"}, "two collectives a layer and a step, one for the arena, and no other"
        for lora in (False, True):
            for step in (0, 1):
                assert r[0, lora, step] == r[2, lora, step] == r[3, lora, step], f"ZeRO 0, 2 and 3, LoRA {lora}, step {step}"
            assert r[0, lora, 0] != r[0, lora, 1]
        assert r["uneven"][1] == r["uneven"][2] > 0, "a longer decode makes no further collective: the shards are gathered once a rollout"
    assert results[0][0, False, 0] == rows_of(HybridEngine(model_of("llama")).generate(prompts, 12, temperature=0))
    assert results[0]["uneven"][0] == [1] and results[1]["uneven"][0] == [40]


def test_tensor_parallelism_that_does_not_divide_is_refused():
    with pytest.raises(utils.UserError, match="tp=3 does not divide the . (ranks|attention heads)"):
        HybridEngine(model_of("llama"), tp=3)


# -----------------------------------------------------------------------------
# users' mistakes, and talking to the result


def test_mistakes_get_one_sentence(chain, toy_file, tmp_path):
    import shutil
    shutil.copytree(chain["sft"][0], tmp_path / "mute")
    for f in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / f).unlink()
    shutil.copytree(chain["reward"][0], tmp_path / "other")
    tok = json.load(open(tmp_path / "other" / "tokenizer.json"))
    tok["model"]["vocab"]["Ā"], tok["model"]["vocab"]["ā"] = tok["model"]["vocab"]["ā"], tok["model"]["vocab"]["Ā"]
    json.dump(tok, open(tmp_path / "other" / "tokenizer.json", "w"))
    shutil.copytree(chain["reward"][0], tmp_path / "smaller")
    small = RewardModel.from_pretrained(chain["reward"][0]).model
    small.resize_token_embeddings(200)
    small.config.pad_token_id = None
    small.save_pretrained(tmp_path / "smaller")
    (ds := tmp_path / "optimizer.json").write_text('{"optimizer": {"type": "AdamW"}}')
    flags = dict(PPO_STEPS, model=chain["sft"][0], reward_model=chain["reward"][0], data=toy_file, out=str(tmp_path / "x"))
    for message, call in {
        "this model folder has no tokenizer": lambda: ppo.main(ppo.Config(**{**flags, "model": str(tmp_path / "mute")})),
        "has another tokenizer than": lambda: ppo.main(ppo.Config(**{**flags, "reward_model": str(tmp_path / "other")})),
        "no such model folder": lambda: ppo.main(ppo.Config(**{**flags, "model": "out/nothing/here"})),
        "is not a reward model": lambda: ppo.main(ppo.Config(**{**flags, "reward_model": chain["sft"][0]})),
        "leaves no room for a prompt in the models' context of 512": lambda: ppo.main(ppo.Config(**{**flags, "max_new_tokens": 600, "max_len": 700})),
        "the data has only .* rows for this step": lambda: sft.main(sft.Config(data=toy_file, held_out=0.97, batch_size=64, out=str(tmp_path / "x"))),
        "not divided by the 3 ranks": lambda: utils.micro_batches(8, 0, 3),
        "has no {prompt} in it": lambda: data.check_template("Human:"),
        "--temperature 0": lambda: ppo.Config(temperature=0),
        "--model tiny: its weights are random": lambda: ppo.main(ppo.Config(**{**flags, "model": "tiny"})),
        "--minibatches 0: must be at least 1": lambda: ppo.Config(minibatches=0),
        "--iterations 0: must be at least 1": lambda: ppo.Config(iterations=0),
        "--micro-batch -1: must be at least 0": lambda: reward.Config(micro_batch=-1),
        "--batch-size 0: must be at least 1": lambda: sft.Config(batch_size=0),
        "--lora 8,alpha=0: write a rank": lambda: models.lora_spec("8,alpha=0"),
        "optimizer is set by training.train_engine": lambda: training.read_ds_config(str(ds)),
        '"auto" is a word of': lambda: training.read_ds_config(write_rows(tmp_path / "auto.json", [{"gradient_clipping": "auto"}])),
        "has 258 token ids and .*smaller only 200": lambda: ppo.main(ppo.Config(**{**flags, "reward_model": str(tmp_path / "smaller")})),
        "is set by --batch-size": lambda: training.read_ds_config(write_rows(tmp_path / "ds.json", [{"train_batch_size": 3}])),
    }.items():
        with pytest.raises(utils.UserError, match=message):
            call()


def test_a_mistake_on_the_command_line_prints_no_traceback():
    code, said = command("reward.py", "--model", "out/nothing/here")
    assert code == 2 and said.strip() == "error: out/nothing/here: no such model folder; train one first, or name another", said


def test_chat_answers_once_or_in_turns_and_forgets_what_no_longer_fits(chain):
    code, said = command("chat.py", "--model", chain["sft"][0], "--prompt", "copy abc", "--max-new-tokens", "5", "--seed", "3")
    assert code == 0 and "Traceback" not in said, said
    code, said = command("chat.py", "--model", chain["sft"][0], "--max-new-tokens", "5",
                         typed="copy abc\n" + "reverse " + "abcdefgh" * 30 + "\nsort " + "zyx" * 60 + "\n\n")
    assert code == 0 and said.count("Assistant:") == 3 and "forgotten" in said, said
    code, said = command("chat.py", "--model", chain["sft"][0], "--prompt", "a" * 600)
    assert code == 2 and re.match(r"error: a prompt of \d+ tokens .* context of 512", said.strip().splitlines()[-1]), said


def test_the_benchmarks_measure_and_keep_the_raw_numbers(tmp_path):
    small = ["--model", "opt-4x256", "--repeats", "1", "--prompt-len", "32", "--new-tokens", "4", "--ragged", "2", "--out", tmp_path]
    rows = {}
    for task, more in (("generate", ["--batch", "1,2"]), ("train", ["--batch", "4", "--micro-batch", "2"]), ("ppo", ["--batch", "4"]), ("kernels", []), ("scale", [])):
        code, said = command("bench.py", task, *small, *more)
        assert code == 0 and "Traceback" not in said, said
        (path,) = tmp_path.glob(f"*{task}*.json")
        record = json.load(open(path))
        rows[task] = record["rows"]
        assert record["versions"]["torch"] == torch.__version__ and (record["ceilings"] is None) == (task == "scale")
    assert [(r["case"], r["prompts"]) for r in rows["generate"]] == [("fixed", 1), ("fixed", 2), ("ragged", 2), ("ragged", 4)]
    assert all(len(r["runs"]["ours"]) == 1 and r["tokens_per_s"] > 0 for r in rows["generate"])
    assert [r["step"] for r in rows["train"]] == ["fine-tuning", "reward model", "PPO, actor", "PPO, critic"] and all(0 < r["mfu"] < 1.5 for r in rows["train"])
    assert [r["mean_length"] for r in rows["ppo"]][0] == 4 < rows["ppo"][1]["mean_length"], "fixed lengths are fixed, ragged ones are not"
    assert len(rows["kernels"]) == 8 and all(r["us"] > 0 for r in rows["kernels"])
    assert command("bench.py", "nonsense")[0] == 1
    code, said = command("bench.py", "generate", "--model", "opt-9b")
    assert code == 2 and "no such shape; there are opt-4x256" in said, said


def test_flops_are_those_of_the_layers():
    from torch.utils.flop_counter import FlopCounterMode
    import bench
    for name in ("opt-4x256", "llama-4x256"):
        lm, tokens = bench.build(name, torch.float32), torch.zeros(3, 64, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            lm(tokens)
        counted, ours = counter.get_total_flops(), bench.flops(name, 3 * 64, 64, 3 * 64)
        assert abs(ours / counted - 1) < 0.02, f"{name}: {ours:.3g}, counted {counted:.3g} (attention: half of its square is masked)"


def test_the_model_of_many_gpus_behaves():
    import bench
    step = lambda world, name="opt-13b": bench.step_on(world, name, "opt-350m", bench.SHEETS["H100"], 0.7, 0.5)  # noqa: E731
    total = lambda t: sum(v for k, v in t.items() if k.endswith("_s"))  # noqa: E731
    assert all(total(step(2 * w)) < total(step(w)) for w in (1, 2, 4, 8, 16, 32)), "more GPUs are faster"
    assert 8 * total(step(8)) > total(step(1)) * 0.9, "and not for nothing"
    assert step(1)["gather_s"] == 0 == step(1)["traffic_s"] and step(8, "opt-66b")["tp"] > 1
