"""Data: rows from anywhere, their tokens, their order, their fields; tasks and reward functions.

    pytest test_data.py -k layout
"""
import ast
import contextlib
import gzip
import importlib.util
import itertools
import json
import math
import os
import re
import stat
import sys
import time
import types
from fractions import Fraction
from pathlib import Path

from testing import HERE, SHARED, STORIES, TEMPLATE, ranks, shared, write_rows

import numpy as np
import pytest
import torch

import data
import models
import sources
import reward
import tasks
import utils

# -----------------------------------------------------------------------------
# helpers


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test alone."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def load_file(path, tok, step="sft", split="", held_out=0.2, max_len=512, template=TEMPLATE,
              columns=""):
    return data.load(str(path), step, split, held_out, template, tok, max_len, columns)


def texts_of(loaded, tok, which="response"):
    """{prompt: answer} of train and held-out rows, as text."""
    out = {}
    for rows in loaded:
        for i in range(len(rows)):
            prompt = tok.decode(rows.prompt(i), skip_special_tokens=True)
            out[prompt] = tok.decode(rows.answer(i, which), skip_special_tokens=True)
    return out


def tokens_of(loaded):
    """Prompt and response of all rows, train and held out, in their order."""
    out = []
    for rows in loaded:
        out.append([rows.prompt(i) + rows.answer(i, "response") for i in range(len(rows))])
    return out


# -----------------------------------------------------------------------------
# layouts

USER = {"role": "user", "content": "p"}
GOOD = {"role": "assistant", "content": "c"}
BAD = {"role": "assistant", "content": "r"}
SYSTEM = {"role": "system", "content": "be nice"}

LAYOUTS = {  # name: (row, (user's text or None, response, chosen, rejected), other fields)
    "pair": ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "c", "r"), {}),
    "demonstration": ({"prompt": "p", "response": "a"}, ("p", "a", None, None), {}),
    "prompt": ({"prompt": "p"}, ("p", None, None, None), {}),
    "prompt with fields": (
        {"prompt": "p", "nums": [1, 2], "target": 3, "answer": "x"}, ("p", None, None, None),
        {"nums": [1, 2], "target": 3, "answer": "x"}),
    "hh-rlhf, prompt apart": (
        {"prompt": "\n\nHuman: p\n\nAssistant:", "chosen": " c", "rejected": " r"},
        ("p", " c", " c", " r"), {}),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"},
        ("p", "c", "c", "r"), {}),
    "Alpaca": (
        {"instruction": "i", "input": "x", "output": "o"}, ("i\nx", "o", None, None), {}),
    "Alpaca with a pair": (
        {"instruction": "i", "input": "", "output": "o", "chosen": "c", "rejected": "r"},
        ("i", "o", "c", "r"), {}),
    "Alpaca, only a pair": (
        {"instruction": "i", "chosen": "c", "rejected": "r"}, ("i", "c", "c", "r"), {}),
    "Dolly": (
        {"instruction": "i", "context": "x", "response": "o", "category": "qa"},
        ("i\nx", "o", None, None), {"category": "qa"}),
    "Dolly without a context": (
        {"instruction": "i", "context": "", "response": "o"}, ("i", "o", None, None), {}),
    "messages": ({"messages": [USER, GOOD]}, ("p", "c", None, None), {}),
    "messages that end with the user": ({"messages": [USER]}, ("p", None, None, None), {}),
    "no_robots: a prompt beside messages": (
        {"prompt": "p", "messages": [USER, GOOD], "category": "x"}, ("p", "c", None, None),
        {"category": "x"}),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]},
        ("p", "a", None, None), {}),
    "conversations with role and content": (
        {"conversations": [USER, GOOD], "id": 7}, ("p", "c", None, None), {"id": 7}),
    "ShareGPT with a pair": (
        {"conversations": [{"from": "human", "value": "p"}],
         "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}},
        ("p", "c", "c", "r"), {}),
    "GSM8K": (
        {"question": "q", "answer": "a #### 3"}, ("q", "a #### 3", None, None),
        {"answer": "a #### 3"}),
    "question and response": ({"question": "q", "response": "a"}, ("q", "a", None, None), {}),
    "question and a pair": (
        {"question": "q", "chosen": "c", "rejected": "r"}, ("q", "c", "c", "r"), {}),
    "text": ({"text": "t", "source": "web"}, (None, "t", None, None), {"source": "web"}),
    "TRL prompt and completion": (
        {"prompt": "p", "completion": "a"}, ("p", "a", None, None), {}),
    "TRL prompt and completion as messages": (
        {"prompt": [USER], "completion": [GOOD]}, ("p", "c", None, None), {}),
    "TRL pair of messages": (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ("p", "c", "c", "r"), {}),
    "TRL pair of conversations": (
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ("p", "c", "c", "r"), {}),
    "a prompt that the pair repeats": (
        {"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ("p", "c", "c", "r"), {}),
    "UltraFeedback binarized": (
        {"prompt": "p", "prompt_id": "7", "chosen": [USER, GOOD], "rejected": [USER, BAD],
         "messages": [USER, GOOD], "score_chosen": 8.5, "score_rejected": 6.0},
        ("p", "c", "c", "r"), {"prompt_id": "7", "score_chosen": 8.5, "score_rejected": 6.0}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_by_its_fields(name):
    row, expected, expected_fields = LAYOUTS[name]
    example, _, fields = sources.convert(row)
    prompt = None
    if example.messages:
        assert [m["role"] for m in example.messages] == ["user"]
        prompt = example.messages[0]["content"]
    assert (prompt, example.response, *example.answers) == expected
    assert fields == expected_fields, "what is not text for the model is for reward functions"


OTHER = {"role": "assistant", "content": "o"}

RANKINGS = {  # name: (row, response, answers with their ranks, best first)
    "ranks": (
        {"answers": ["b", "a", "c"], "ranks": [2, 1, 3]}, "a", [("a", 1), ("b", 2), ("c", 3)]),
    "scores": (
        {"answers": ["b", "a"], "scores": [-0.5, 7]}, "a", [("a", 1), ("b", 2)]),
    "ties, and ranks that are not 1, 2, 3": (
        {"answers": ["a", "b", "c", "d"], "ranks": [9, 2.5, 9, 2.5]}, "b",
        [("b", 1), ("d", 1), ("a", 2), ("c", 2)]),
    "an infinite score": (
        {"answers": ["a", "b"], "scores": [-math.inf, 0]}, "b", [("b", 1), ("a", 2)]),
    "an answer without a character": (
        {"answers": ["a", ""], "scores": [0, 1]}, "", [("", 1), ("a", 2)]),
    "ranks before scores": (
        {"answers": ["a", "b"], "ranks": [1, 2], "scores": [0, 1]}, "a", [("a", 1), ("b", 2)]),
    "a demonstration beside them": (
        {"answers": ["a", "b"], "ranks": [1, 2], "response": "d"}, "d", [("a", 1), ("b", 2)]),
    "messages": (
        {"answers": [[BAD], [GOOD], [OTHER]], "scores": [0, 2, 1]}, "c",
        [("c", 1), ("o", 2), ("r", 3)]),
    "messages that repeat the prompt": (
        {"answers": [[USER, BAD], [USER, GOOD]], "scores": [0, 2]}, "c", [("c", 1), ("r", 2)]),
}


@pytest.mark.parametrize("name", RANKINGS)
def test_a_ranking_is_its_answers_best_first(name):
    row, response, ranked = RANKINGS[name]
    example, _, fields = sources.convert({"prompt": "p", "key": 7, **row})
    assert example.messages == [USER] and fields == {"key": 7}
    assert example.response == response
    assert list(zip(example.answers, example.ranks, strict=True)) == ranked


def test_answers_without_ranks_are_a_field_for_reward_functions():
    example, form, fields = sources.convert({"prompt": "p", "answers": ["4", "four"]})
    assert form == "prompt" and fields == {"answers": ["4", "four"]}


BAD_RANKINGS = {  # name: (row, what the message says)
    "one answer": ({"answers": ["a"], "ranks": [1]}, "no two of its ranks differ, so there is"),
    "no answer": ({"answers": [], "scores": []}, "no two of its scores differ"),
    "only ties": ({"answers": ["a", "b"], "ranks": [1, 1.0]}, "no two of its ranks differ"),
    "too few ranks": (
        {"answers": ["a", "b", "c"], "ranks": [1, 2]}, "there are 3 answers and 2 ranks"),
    "too many scores": (
        {"answers": ["a"], "scores": [1, 2]}, "there are 1 answers and 2 scores"),
    "NaN": ({"answers": ["a", "b"], "scores": [1, math.nan]}, "scores holds nan, which is not a"),
    "ranks as text": ({"answers": ["a", "b"], "ranks": ["1", "2"]}, "ranks holds '1', which is"),
    "true and false": ({"answers": ["a", "b"], "scores": [True, False]}, "scores holds True"),
    "no score": ({"answers": ["a", "b"], "scores": [1, None]}, "scores holds None"),
    "a number": ({"answers": ["a", "b"], "scores": 3}, "scores is 3, which is not a list"),
    "text": ({"answers": "ab", "ranks": [1, 2]}, "answers is 'ab', which is not a list"),
    "no text": ({"answers": ["a", None], "ranks": [1, 2]}, "answer 2 is None, which is not text"),
    "two conversations": (
        {"answers": [[USER, GOOD], [SYSTEM, BAD]], "ranks": [1, 2]}, "these are two conv"),
}


@pytest.mark.parametrize("name", BAD_RANKINGS)
def test_a_ranking_that_cannot_be_used_is_left_out_and_described(name, tmp_path, tok, capsys):
    row, message = BAD_RANKINGS[name]
    lines = [{"prompt": f"p {i}", "answers": ["a", "b"], "ranks": [1, 2]} for i in range(50)]
    lines.insert(3, {"prompt": "p", **row})
    rows, held_out = load_file(write_rows(tmp_path / "a.jsonl", lines), tok, "reward")
    assert len(rows) + len(held_out) == 50
    printed = capsys.readouterr().out
    assert "of 51 (left out: 1 unusable)" in printed
    assert f"a.jsonl:4: cannot be read as prompt/answers/{list(row)[1]}: {message}" in printed


def test_rankings_of_any_length_and_pairs_are_rows_of_one_data_set(tmp_path, tok):
    expected = {}  # prompt: (answers, ranks), best first
    lines = []
    for i in range(60):
        count = 2 + i % 4
        answers = [f"{i}" + "x" * k for k in range(count)]
        ratings = [k // 2 - 1.5 for k in range(count)]
        lines.append({"task": f"p {i}", "completions": answers, "ratings": ratings, "key": i})
        if count == 2:
            lines[-1] = {"task": f"p {i}", "chosen": answers[1], "rejected": answers[0], "key": i}
            expected[f"p {i}"] = (answers[::-1], [1, 2])
        else:
            order = [*range(2, count), 0, 1]
            if count == 5:
                order = [4, 2, 3, 0, 1]
            best = max(ratings)
            ranks = [1 + int(best - ratings[k]) for k in order]
            expected[f"p {i}"] = ([answers[k] for k in order], ranks)
    first = write_rows(tmp_path / "a.jsonl", lines[::2])   # of 2 and 4 answers
    second = write_rows(tmp_path / "b.jsonl", lines[1::2])  # of 3 and 5
    columns = "prompt=task,answers=completions,scores=ratings"
    found = 0
    for rows in load_file(f"{first},{second}", tok, "reward", columns=columns):
        for i in range(len(rows)):
            prompt = re.search(r"p \d+", tok.decode(rows.prompt(i)))[0]
            answers, ranks = expected[prompt]
            texts = [tok.decode(ids, skip_special_tokens=True)[1:] for ids in rows.answers(i)]
            assert texts == answers
            assert all(ids[-1] == tok.eos_token_id for ids in rows.answers(i))
            assert rows.ranks[i].tolist() == ranks + [0] * (5 - len(ranks))
            lengths = [len(rows.prompt(i) + ids) for ids in rows.answers(i)]
            assert rows.lengths_to_compare()[i].tolist() == lengths + [0] * (5 - len(ranks))
            assert rows.fields([i])["key"] == [int(prompt[2:])]
            found += 1
    assert found == 60
    texts = texts_of(load_file(f"{first},{second}", tok, "sft", columns=columns), tok)
    best = {prompt: answers[0] for prompt, (answers, _) in expected.items()}
    got = {re.search(r"p \d+", prompt)[0]: answer[1:] for prompt, answer in texts.items()}
    assert got == best, "step 1 imitates the best answer, the first of equals"
    rows, held_out = load_file(f"{first},{second}", tok, "ppo", columns=columns)
    assert len(rows) + len(held_out) == 60 and rows.field_names() == ["key"]


def test_rankings_that_teach_nothing_or_are_too_long_are_left_out(tmp_path, tok, capsys):
    lines = [{"prompt": f"{i}", "answers": ["a", "b", "c"], "ranks": [1, 2, 3]} for i in range(50)]
    lines[7]["answers"] = ["a", "a ", "a"]
    lines[9]["answers"] = ["a", "a", "b"]
    lines[11]["answers"][2] = "c" * 100
    rows, held_out = load_file(write_rows(tmp_path / "a.jsonl", lines), tok, "reward", max_len=99)
    assert len(rows) + len(held_out) == 48
    assert "(left out: 1 with equal answers; 1 over 99 tokens)" in capsys.readouterr().out


def test_a_system_message_is_kept_wherever_it_is():
    pair = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    question = {"system": "be nice", "question": "p", "chosen": "c", "rejected": "r"}
    conversations = {"system": "be nice", "conversations": [{"from": "human", "value": "p"}]}
    apart = {"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    beside = {"prompt": "p", **pair}
    for row in (pair, beside, apart, {"prompt": [SYSTEM, USER]}, question, conversations):
        example, _, _ = sources.convert(row)
        assert example.messages == [SYSTEM, USER], row


def test_a_conversation_is_rendered_turn_by_turn(tok):
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    messages = sources.dialogue(dialogue)[:-1]
    assert data.render(messages, TEMPLATE, tok) == "Human: a\nAssistant: b\nHuman: c\nAssistant:"
    tok = models.tiny_tokenizer()
    tok.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
    assert data.render(messages, "chat", tok) == "[user]a[assistant]b[user]c[assistant]"


# -----------------------------------------------------------------------------
# kinds of files, and sources that are not files


def test_every_kind_of_file_gives_the_same_rows(tmp_path, tok):
    rows = [{"prompt": f"word {i}", "response": f"x {i}, ü \"\n"} for i in range(40)]
    as_lines = "\n".join(json.dumps(row) for row in rows)
    as_list = json.dumps(rows)
    as_csv = "prompt,response\r\n"
    as_tsv = "response\tprompt\n"
    for row in rows:
        response = row["response"].replace('"', '""')
        as_csv += f'{row["prompt"]},"{response}"\r\n'
        as_tsv += f'"{response}"\t{row["prompt"]}\n'
    files = {
        "a.jsonl": as_lines, "b.json": as_list, "c.jsonl.gz": as_lines, "d.json.gz": as_list,
        "e.json": as_lines, "f.json.gz": f"\n{as_lines}\n", "g.json": json.dumps(rows, indent=1),
        "h.csv": as_csv, "i.tsv": as_tsv, "j.csv.gz": as_csv,
    }
    for name in ("a.jsonl", "b.json", "e.json", "f.json.gz", "h.csv"):
        files[f"mark-{name}"] = "\ufeff" + files[name]  # a byte order mark, as Windows writes it
    for name, text in files.items():
        opener = gzip.open if name.endswith(".gz") else open
        with opener(tmp_path / name, "wt", encoding="utf-8", newline="") as f:
            f.write(text)
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
        files["p.parquet"] = None
    expected = tokens_of(load_file(tmp_path / "a.jsonl", tok))
    assert len(expected[0]) + len(expected[1]) == 40
    for name in files:
        assert tokens_of(load_file(tmp_path / name, tok)) == expected, name


def test_paragraphs_of_plain_text_are_rows(tmp_path, tok):
    paragraphs = [f"a line {i}\nand another" for i in range(40)]
    (tmp_path / "t.txt").write_text("\n\n".join(paragraphs))
    rows, held_out = load_file(tmp_path / "t.txt", tok)
    assert len(rows) + len(held_out) == 40
    assert tok.decode(rows.answer(0, "response")[:-1]).endswith("\nand another")


def test_an_empty_cell_of_a_csv_is_a_field_without_a_value(tmp_path, tok):
    path = tmp_path / "a.csv"
    lines = [f"p {i},{'' if i % 2 else 'a'}" for i in range(40)]
    path.write_text("\n".join(["prompt,response", *lines]))
    rows, held_out = load_file(path, tok)
    assert len(rows) + len(held_out) == 20


SOURCE = '''
import random
from words_of_mine import WORDS

def pairs():
    rng = random.Random(0)
    for line in open({file!r}):
        n = int(line)
        yield {{"prompt": f"{{WORDS[n % 3]}} {{n}}", "chosen": "yes", "rejected": "no", "key": n}}

def other_every_time():
    for i in range(50):
        yield {{"prompt": str(random.random()), "response": "x"}}

def breaks():
    yield {{"prompt": "a"}}
    yield {{"prompt": WORDS[99]}}

def nothing():
    return None

def needs(n):
    return []
'''


@pytest.fixture
def source_file(tmp_path):
    """A file with sources, a module that it imports, and the file that its rows are from."""
    (tmp_path / "words_of_mine.py").write_text("WORDS = ['one', 'two', 'three']\n")
    (tmp_path / "numbers.txt").write_text("\n".join(map(str, range(60))))
    path = tmp_path / "mine.py"
    path.write_text(SOURCE.format(file=str(tmp_path / "numbers.txt")))
    yield path
    sys.modules.pop("words_of_mine", None)


def test_a_function_is_a_source_and_its_tokens_are_never_stale(source_file, cache, tmp_path, tok):
    source = f"{source_file}:pairs"
    rows, held_out = load_file(source, tok, "reward")
    assert len(rows) + len(held_out) == 60
    keys = []
    for part in (rows, held_out):
        keys += part.fields(range(len(part)))["key"]
    assert sorted(keys) == list(range(60))
    load_file(source, tok, "reward")
    assert len(list(cache.iterdir())) == 1, "the same rows are tokenized once"
    (tmp_path / "numbers.txt").write_text("\n".join(map(str, range(100, 140))))
    rows, held_out = load_file(source, tok, "reward")
    assert len(rows) + len(held_out) == 40, "the file that the function reads has changed"
    weighted, _ = load_file(f"{source}:0.7", tok, "reward")
    assert weighted.weights == [0.7]


@pytest.mark.parametrize("function, message", {
    "absent": "mine.py has no function 'absent'",
    "": "write file.py:function",
    "other_every_time": "other_every_time: its rows changed while they were read",
    "nothing": "raised TypeError.*must yield rows",
    "needs": "raised TypeError.*called without arguments",
}.items())
def test_a_wrong_source_function_gets_one_sentence(function, message, source_file, cache, tok):
    with pytest.raises(utils.UserError, match=message):
        load_file(f"{source_file}:{function}", tok)
    assert not cache.exists() or not list(cache.iterdir()), "nothing of it is left in the cache"


def test_a_bug_in_a_source_function_shows_its_own_line(source_file, cache, tok):
    with pytest.raises(utils.UserError) as caught:
        load_file(f"{source_file}:breaks", tok)
    message = str(caught.value)
    assert "breaks: raised IndexError(list index out of range)" in message
    assert 'yield {"prompt": WORDS[99]}' in message
    assert "data.py" not in message and "tasks.py" not in message, message


def test_the_source_in_the_readme_is_a_source(tmp_path, tok):
    readme = (HERE / "README.md").read_text()
    blocks = re.findall(r"```python\n(import random\n.*?)```", readme, re.S)
    assert len(blocks) == 1, "the README has one example of a source, a file of its own"
    (tmp_path / "mine.py").write_text(blocks[0])
    name = re.search(r"^def (\w+)", blocks[0], re.M).group(1)
    assert len(blocks[0].split("\n\n")[1].splitlines()) <= 10
    rows, _ = load_file(f"{tmp_path}/mine.py:{name}", tok, "reward")
    prompt, chosen, rejected = (
        tok.decode(ids, skip_special_tokens=True)
        for ids in (rows.prompt(5), rows.answer(5, "chosen"), rows.answer(5, "rejected")))
    a, b = map(int, re.findall(r"\d+", prompt))
    assert int(chosen) == a + b and int(rejected) != a + b


@pytest.fixture
def stub_datasets(monkeypatch):
    """A module `datasets` whose data sets are {(name, config, split): rows}."""
    known = {}

    def load_dataset(name, config=None, split=None):
        if (name, config, split) not in known:
            raise ValueError(f"Unknown split {split!r}.\nShould be one of ['test'].")
        return known[name, config, split]
    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return known


def test_a_name_on_the_hub_may_have_a_configuration_a_split_and_a_weight(stub_datasets, cache, tok):
    rows = [{"question": f"q {i}", "answer": f"{i}"} for i in range(50)]
    stub_datasets["openai/gsm8k", "main", "train"] = rows
    stub_datasets["openai/gsm8k", "main", "test"] = rows[:30]
    stub_datasets["someone/data-2.5-set", None, "train"] = rows[:40]
    stub_datasets["someone/other", None, "test"] = rows[:20]
    for source, count in {
        "openai/gsm8k:main:train": 50, "openai/gsm8k:main": 50, "openai/gsm8k:main:test": 30,
        "someone/data-2.5-set": 40, "someone/other::test": 20, "openai/gsm8k:main:test:0.5": 30,
    }.items():
        train, held_out = load_file(source, tok)
        assert len(train) + len(held_out) == count, source
    both, _ = load_file("openai/gsm8k:main:train:0.25,someone/other::test:0.75", tok)
    assert both.weights == [0.25, 0.75]
    message = r"openai/gsm8k:main:dev: .*Should be one of \['test'\]"
    with pytest.raises(utils.UserError, match=message):
        load_file("openai/gsm8k:main:dev", tok)
    with pytest.raises(utils.UserError, match="write NAME:CONFIGURATION:SPLIT"):
        load_file("openai/gsm8k:main:train:dev", tok)


def test_a_folder_in_the_hubs_layout_is_a_source(tmp_path, tok, monkeypatch, request, cache):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"prompt": f"p {i}", "response": "a"} for i in range(40)]
    write_rows(folder / "train.jsonl", rows)
    if importlib.util.find_spec("datasets"):
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    else:
        known = request.getfixturevalue("stub_datasets")
        known[str(folder), None, "train"] = rows
    train, held_out = load_file(folder, tok)
    assert len(train) + len(held_out) == 40


# -----------------------------------------------------------------------------
# tokens


def test_an_answer_ends_with_the_one_id_of_eos_even_where_pad_and_bos_are_the_same_id(tmp_path):
    for same in (False, True):
        tok = models.tiny_tokenizer()
        if same:
            tok.pad_token = tok.bos_token = tok.eos_token
        lines = [{"prompt": f"word {i}", "response": "x" * (1 + i % 7)} for i in range(40)]
        rows, _ = load_file(write_rows(tmp_path / "a.jsonl", lines), tok)
        tokens, prompt_lens, answer_lens = data.collate(rows, range(len(rows)), "cpu")
        for ids, p, a in zip(tokens, prompt_lens, answer_lens):
            answer = ids[p : p + a].tolist()
            assert answer[-1] == tok.eos_token_id, "EOS is at the end"
            assert answer.count(tok.eos_token_id) == 1, "EOS is one id"
            assert tok.decode(answer[:-1]).strip("x ") == ""
            assert tok.decode(ids[:p]).endswith("Assistant:")


def test_another_tokenizer_makes_other_tokens(tmp_path, tok):
    lines = [{"prompt": f"word {i}", "response": "x"} for i in range(40)]
    path = write_rows(tmp_path / "a.jsonl", lines)
    other = models.tiny_tokenizer()
    spec = json.loads(other.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab["w"], vocab["v"] = vocab["v"], vocab["w"]
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(spec))
    a, b = (load_file(path, t)[0].prompt(0) for t in (tok, other))
    assert a != b and len(a) == len(b), "and not those that the first one left in the cache"


def test_another_end_token_makes_other_tokens(tmp_path, tok):
    lines = [{"prompt": f"word {i}", "response": "x"} for i in range(40)]
    path = write_rows(tmp_path / "a.jsonl", lines)
    other = models.tiny_tokenizer()
    other.eos_token = "<pad>"
    ends = [load_file(path, t)[0].answer(0, "response")[-1] for t in (tok, other)]
    assert ends == [tok.eos_token_id, other.eos_token_id] and ends[0] != ends[1]


def test_tokens_are_made_once_and_again_when_a_line_or_the_template_changes(tmp_path, tok, cache):
    rows = [{"prompt": f"question {i}", "response": "yes", "other": "o"} for i in range(50)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    load_file(path, tok)
    (folder,) = cache.iterdir()
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    load_file(path, tok)
    assert [f.name for f in cache.iterdir()] == [folder.name]
    assert (folder / "tokens.bin").stat().st_mtime_ns == stamp
    load_file(path, tok, template="Q: {prompt}\nA:")
    assert len(list(cache.iterdir())) == 2, "another template, other tokens"
    load_file(path, tok, columns="response=other")
    assert len(list(cache.iterdir())) == 3, "other columns, other tokens"
    rows[7]["response"] = "no"
    write_rows(path, rows)
    edited, held_out = load_file(path, tok)
    assert len(list(cache.iterdir())) == 4
    answers = texts_of((edited, held_out), tok).values()
    assert [a.strip() for a in answers].count("no") == 1, "the edited line is there"


def test_an_edit_of_the_code_makes_tokens_anew_only_where_it_can_change_them(
    tmp_path, monkeypatch
):
    def code_in_key(data_code, sources_code):
        (tmp_path / "edited_sources.py").write_text(sources_code)
        monkeypatch.setattr(sources, "__file__", str(tmp_path / "edited_sources.py"))
        path = tmp_path / "edited_data.py"
        path.write_text(data_code)
        spec = importlib.util.spec_from_file_location("edited_data", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["edited_data"] = module  # dataclasses look it up
        spec.loader.exec_module(module)
        return module.token_code()

    before = data.token_code()
    data_code = (HERE / "data.py").read_text()
    sources_code = (HERE / "sources.py").read_text()
    assert before == code_in_key(data_code, sources_code)
    for old, new, differs in (
        ('"\\n".join(blocks)', '" ".join(blocks)', True),     # render
        ('"\\n" + check_text(', '": " + check_text(', True),  # from_instruction
        ("pool=4", "pool=8", False),                          # batches
        ("\n# formats:", "\n# layouts:", False),              # a comment
    ):
        assert old in data_code + sources_code
        edited = code_in_key(data_code.replace(old, new), sources_code.replace(old, new))
        assert (edited != before) == differs, old


def test_other_code_does_not_read_the_tokens_of_this_one(tmp_path, tok, cache, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(50)])
    load_file(path, tok)
    monkeypatch.setattr(data, "token_code", lambda: ["edited"])
    load_file(path, tok)
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_gets_one_sentence(tmp_path, tok, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i}", "response": "x"} for i in range(9)])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data, "CACHE", tmp_path / "file" / "cache")
    with pytest.raises(utils.UserError, match="cache .* cannot be written .*FLATRLHF_CACHE"):
        load_file(path, tok)


def test_the_cache_can_be_read_by_others(tmp_path, tok, cache):
    lines = [{"prompt": f"{i}", "response": "x"} for i in range(50)]
    path = write_rows(tmp_path / "a.jsonl", lines)
    umask = os.umask(0o022)
    try:
        load_file(path, tok)
    finally:
        os.umask(umask)
    (folder,) = cache.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def _load_on_a_rank(path):
    utils.init_distributed(0)
    tok = models.tiny_tokenizer()
    rows, _ = load_file(f"{path}:same", tok)
    with pytest.raises(utils.UserError) as caught:
        load_file(f"{path}:by_rank", tok)
    return len(rows), str(caught.value)


def test_ranks_share_one_cache_and_must_read_the_same_rows(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import os\n"
        "def same():\n    return [{'prompt': str(i), 'response': 'x'} for i in range(90)]\n"
        "def by_rank():\n    return [{'prompt': str(i), 'response': os.environ['RANK']} "
        "for i in range(90)]\n")
    first, second = ranks(2, _load_on_a_rank, str(path))
    assert first == second and first[0] > 60
    assert "by_rank: not every rank reads the same rows" in first[1]


def test_rows_end_once_have_a_prompt_and_are_held_out_from_every_source(tmp_path, tok):
    lines = [{"prompt": f"word {i}", "response": f"x{i}<eos>"} for i in range(40)]
    rows, _ = load_file(write_rows(tmp_path / "eos.jsonl", lines), tok)
    for i in range(len(rows)):
        answer = rows.answer(i, "response")
        assert answer.count(tok.eos_token_id) == 1, "a text may end in the tokenizer's word for EOS"
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"line {i}"} for i in range(40)])
    with pytest.raises(utils.UserError, match="text.jsonl: no row has a prompt.*rows have text"):
        load_file(text, tok, "ppo")
    a, b = (write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(400)])
            for name in "ab")
    _, held_out = load_file(f"{a},{b}", tok, "ppo", held_out=0.5)
    share = held_out.source[:100].mean()
    assert 0.3 < share < 0.7, "the first rows, which are evaluated, come from both"


def test_a_prompt_without_a_character_is_still_a_row(tmp_path, tok):
    lines = [{"prompt": "", "response": f"{i}"} for i in range(40)]
    lines += [{"prompt": ""}] + [{"prompt": f"{i}", "response": "x"} for i in range(40)]
    rows, held_out = load_file(write_rows(tmp_path / "a.jsonl", lines), tok, template="{prompt}")
    assert len(rows) + len(held_out) == 80


# -----------------------------------------------------------------------------
# fields for reward functions


def test_fields_that_are_not_text_for_the_model_travel_beside_the_tokens(tmp_path, tok):
    lines = [{"prompt": f"p {i}", "nums": [i, {"a": "ü"}], "response": "x"} for i in range(200)]
    for line in lines[::3]:
        line["target"] = len(line["prompt"])
    path = write_rows(tmp_path / "a.jsonl", lines)
    for rows in load_file(path, tok, "ppo", split="1,1,1"):
        indices = np.arange(len(rows))[::-1]
        fields = rows.fields(indices)
        assert set(fields) == {"nums", "target"} == set(rows.field_names())
        for i, nums, target in zip(indices, fields["nums"], fields["target"]):
            number = int(re.search(r"p (\d+)", tok.decode(rows.prompt(i))).group(1))
            assert nums == [number, {"a": "ü"}], "the fields are those of the row"
            assert target == (None if number % 3 else len(f"p {number}"))


def test_a_source_without_fields_keeps_none_and_gives_none_beside_another(tmp_path, tok, cache):
    plain = write_rows(tmp_path / "a.jsonl", [{"prompt": f"a {i}"} for i in range(100)])
    train, _ = load_file(plain, tok, "ppo")
    assert train.fields([0, 1]) == {}
    (folder,) = cache.iterdir()
    assert not (folder / "fields.jsonl").exists() and not (folder / "fields.npy").exists()
    other = write_rows(tmp_path / "b.jsonl", [{"prompt": f"b {i}", "key": i} for i in range(100)])
    train, _ = load_file(f"{plain},{other}", tok, "ppo")
    keys = train.fields(range(len(train)))["key"]
    for i, key in enumerate(keys):
        prompt = tok.decode(train.prompt(i))
        if " a " in prompt:
            assert key is None
        else:
            assert f"b {key}\n" in prompt


@shared
def test_the_answers_of_gsm8k_are_responses_and_fields():
    tok = models.load_tokenizer(STORIES)
    path = SHARED / "tasks" / "gsm8k_test.jsonl"
    answers = {}
    for line in open(path):
        row = json.loads(line)
        answers[row["question"]] = row["answer"]
    rows, _ = data.load(str(path), "sft", "", 0.1, "{prompt}", tok, 10**6)
    assert rows.field_names() == ["answer"]
    picked = [5, 0, len(rows) - 1]
    for i, answer in zip(picked, rows.fields(picked)["answer"]):
        assert answer in answers.values()
        response = tok.decode(rows.answer(i, "response"), skip_special_tokens=True)
        assert response.split()[-1] == answer.split()[-1]


# -----------------------------------------------------------------------------
# --columns, and rows that cannot be used


def test_columns_give_fields_other_names(tmp_path, tok):
    lines = []
    for i in range(60):
        lines.append({"task": f"p {i}", "best": "c", "worst": "r", "response": 3, "key": i})
    path = write_rows(tmp_path / "a.jsonl", lines)
    columns = "prompt=task, chosen=best, rejected=worst, kept=response"
    loaded = load_file(path, tok, "reward", columns=columns)
    texts = texts_of(loaded, tok, "rejected")
    assert len(texts) == 60 and set(texts.values()) == {" r"}
    assert set(loaded[0].field_names()) == {"key", "kept"}, "also a field that is in the way"
    columns = "prompt=task,chosen=worst,rejected=best,kept=response"
    swapped = load_file(path, tok, "reward", columns=columns)
    assert set(texts_of(swapped, tok, "chosen").values()) == {" r"}


@pytest.mark.parametrize("columns, message", {
    "prompt": "write NEW=OLD",
    "=task": "write NEW=OLD",
    "prompt=": "write NEW=OLD",
    "prompt=task,prompt=best": "each NEW once",
    "prompt=tusk": "none of its 60 rows can be used.*unknown fields .*'task'",
    "prompt=task,solution=sulution": "no row has sulution; the rows have task, best",
}.items())
def test_wrong_columns_get_one_sentence(columns, message, tmp_path, tok):
    path = write_rows(tmp_path / "a.jsonl", [{"task": f"{i}", "best": "c"} for i in range(60)])
    with pytest.raises(utils.UserError, match=message):
        load_file(path, tok, "ppo", columns=columns)


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_shown(tmp_path, tok, capsys):
    lines = [{"prompt": f"p {i}", "response": "x"} for i in range(100)]
    lines[3] = {"prompt": "p", "response": True}  # one odd cell, as PandaLM has
    lines[50] = {"prompt": None, "response": "x"}
    lines[60] = {"messages": []}
    path = write_rows(tmp_path / "a.jsonl", lines)
    for _ in range(2):  # also when the tokens come from the cache
        rows, held_out = load_file(path, tok)
        assert len(rows) + len(held_out) == 97
        printed = capsys.readouterr().out
        assert "held out, of 100 (left out: 3 unusable)" in printed
        assert "a.jsonl:4: cannot be read as prompt: response is True, which is not text" in printed


def test_pairs_of_two_conversations_and_pairs_of_equal_answers_are_left_out(tmp_path, tok, capsys):
    lines = [{"prompt": f"p {i}", "chosen": "c", "rejected": "r"} for i in range(50)]
    lines[7]["rejected"] = "c "
    chosen = "\n\nHuman: a\n\nAssistant: c"
    lines.append({"chosen": chosen, "rejected": "\n\nHuman: b\n\nAssistant: r"})
    rows, held_out = load_file(write_rows(tmp_path / "a.jsonl", lines), tok, "reward")
    assert len(rows) + len(held_out) == 49
    printed = capsys.readouterr().out
    assert "1 unusable; 1 with equal answers" in printed and "two conversations" in printed


def test_a_chat_template_that_refuses_a_row_leaves_it_out(tmp_path, capsys):
    tok = models.tiny_tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}{% endfor %}")
    lines = [{"prompt": [{"role": "user", "content": f"p {i}"}]} for i in range(60)]
    lines[5]["prompt"].insert(0, SYSTEM)
    rows, held_out = load_file(write_rows(tmp_path / "a.jsonl", lines), tok, "ppo", template="chat")
    assert len(rows) + len(held_out) == 59
    assert "a.jsonl:6: the tokenizer's chat template refuses" in capsys.readouterr().out
    message = "--template chat: this tokenizer has no chat template"
    with pytest.raises(utils.UserError, match=message):
        load_file(tmp_path / "a.jsonl", models.tiny_tokenizer(), "ppo", template="chat")


def message_rows(*messages):
    return json.dumps({"messages": list(messages)})


BAD_DATA = {  # name: (file, its text, or None for no file, what the message must hold)
    "missing file": ("nowhere.jsonl", None, "nowhere.jsonl: no such file"),
    "missing file, no suffix": ("nowhere", None, "nowhere: no such file"),
    "not a kind": ("a.xlsx", "x", "unknown kind of file '.xlsx'; known are .jsonl .json .csv"),
    "a Python file": ("a.py", "x", "a.py: write .*a.py:FUNCTION"),
    "broken line": (
        "a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a", ',
        "a.jsonl:2: not valid JSON"),
    "broken line in .json": (
        "a.json", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": }', "a.json:3: not valid JSON"),
    "broken .json": ("a.json", '[{"prompt": "a"},\n{"prompt": }]', "a.json:2: not valid JSON"),
    "unknown fields": (
        "a.jsonl", '{"foo": 1}',
        r"a.jsonl:1: unknown fields \['foo'\]; a row needs one of: messages; prompt/.*--columns"),
    "not an object": ("a.jsonl", "[1, 2]", "a.jsonl:1: a row must be an object"),
    "not text": (
        "a.jsonl", '{"prompt": "a", "response": 3}',
        "a.jsonl:1: cannot be read as prompt: response is 3, which is not text"),
    "no question": (
        "a.jsonl", '{"question": null, "answer": "b"}',
        "a.jsonl:1: cannot be read as question/answer: question is None, which is not text"),
    "not text, in another field": (
        "a.jsonl", '{"instruction": "a", "output": true}',
        "a.jsonl:1: cannot be read as instruction: output is True, which is not text"),
    "no prompt": ("a.jsonl", '{"prompt": null}', "a.jsonl:1: .*prompt is None, which is not text"),
    "a tool's call": (
        "a.jsonl", message_rows({"role": "user", "content": None}, GOOD),
        "a.jsonl:1: .*the content of a message of messages is None, which is not text"),
    "no content": (
        "a.jsonl", message_rows({"role": "user"}, GOOD),
        "a.jsonl:1: cannot be read as messages: there is no 'content'"),
    "no role": (
        "a.jsonl", message_rows({"content": "a"}),
        "a.jsonl:1: cannot be read as messages: there is no 'role'"),
    "no messages": (
        "a.jsonl", message_rows(),
        r"a.jsonl:1: .* messages: messages is \[\], which is not a list of messages"),
    "not messages": ("a.jsonl", '{"prompt": ["a"]}', "a.jsonl:1: cannot be read as prompt: .*'a'"),
    "a pair that ends with the user": (
        "a.jsonl", json.dumps({"prompt": "p", "chosen": [USER], "rejected": [USER]}),
        "a.jsonl:1: .*chosen does not end with a message of the assistant"),
    "answers without a prompt": (
        "a.jsonl", '{"chosen": "c", "rejected": "r"}',
        "a.jsonl:1: .*it is not a dialogue .*without their conversation need a field `prompt`"),
    "no text": ("a.jsonl", '{"text": null}', "a.jsonl:1: .*neither a prompt nor a text"),
    "half a character": (
        "a.jsonl", r'{"prompt": "a \ud83d", "response": "b"}', "a.jsonl:1: .*surrogate"),
    "not parquet": ("a.parquet", "x", "cannot be read as parquet|first `pip install pyarrow`"),
    "empty": ("a.jsonl", "", "has no rows"),
    "empty list": ("a.json", "[]", "has no rows"),
    "no pair": (
        "a.jsonl", '{"prompt": "a", "response": "b", "score": 1}',
        "no row has chosen and rejected, which this step needs. The rows have prompt, response, "
        "score, and are read as prompt .--columns chosen=NAME"),
    "not a list": (
        "a.json", '{"prompt": "a"}',
        "must hold one list of rows, or one object per line; this one holds {'prompt'"),
    "parquet, gzipped": ("a.parquet.gz", "x", "unknown kind of file '.parquet.gz'"),
    "not gzip": ("a.jsonl.gz", "plain", "cannot be read as gzipped"),
    "csv, more cells": (
        "a.csv", "prompt,chosen,rejected\na,b,c\nyes, a,b,c\n",
        "a.csv:3: there are more cells than in the first line; put a text that holds ',' into"),
    "csv, a quote too many": ("a.csv", 'prompt,chosen\na,"b"c\n', "a.csv:2: not valid CSV"),
    "csv without a header": ("a.csv", "a b c,d\n", "has no rows"),
    "too few": (
        "a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}',
        "1 rows with 1 different prompts are too few"),
    "one prompt": (
        "a.jsonl", "\n".join(['{"prompt": "a", "chosen": "b", "rejected": "c"}'] * 400),
        "400 rows with 1 different prompts are too few"),
    "too long": (
        "a.jsonl", json.dumps({"prompt": "a" * 600, "chosen": "b", "rejected": "c"}),
        "no row is left .*1 over 512 tokens"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_gets_one_sentence_that_says_where(case, tmp_path, tok):
    name, content, message = BAD_DATA[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(utils.UserError, match=message):
        load_file(tmp_path / name, tok, "reward")


def test_a_name_that_is_nothing_here_says_what_could_be_meant(tmp_path, tok, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for name in ("toi", "someone/data-2.5-set"):
        message = rf"{name}: is neither a file nor a task \(toy, .*\); .*`pip install datasets`"
        with pytest.raises(utils.UserError, match=message):
            load_file(name, tok)
    (tmp_path / "folder").mkdir()
    message = "folder: is a folder; .*first `pip install datasets`"
    with pytest.raises(utils.UserError, match=message):
        load_file(tmp_path / "folder", tok)


def test_a_file_that_cannot_be_read_gets_one_sentence(tmp_path, tok, monkeypatch):
    whole = gzip.compress(json.dumps([{"prompt": str(i)} for i in range(999)]).encode())
    damaged = {"cut.json.gz": whole[:-20], "bad.json.gz": whole[:50] + whole[60:]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(utils.UserError, match=f"{name}: cannot be read as gzipped UTF-8 text"):
            load_file(tmp_path / name, tok)
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a"}])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(utils.UserError, match=r"a.jsonl: cannot be read \(Permission denied\)"):
        load_file(path, tok)


@pytest.mark.parametrize("split, held_out, data_flag, message", [
    ("2,4", 0.1, "toy", "three shares"),
    ("1,2", 0.1, "toy", "three shares"),
    ("a,b,c", 0.1, "toy", "three shares"),
    ("nan,1,1", 0.1, "toy", "three shares"),
    ("0,1,1", 0.1, "toy", "gives nothing to step 1"),
    ("", 0.1, "toy:0", "weight above 0"),
    ("", 0.1, "toy:nan", "weight above 0"),
    ("", 0.1, "toy:1,toy", "weight above 0, or none"),
    ("", 0.1, "", "--data is empty"),
    ("", 0, "toy", "--held-out 0: a share of the rows is above 0 and below 1"),
    ("", 2, "toy", "--held-out 2"),
    ("", float("nan"), "toy", "--held-out nan"),
])
def test_bad_splits_shares_and_weights_get_one_sentence(split, held_out, data_flag, message, tok):
    with pytest.raises(utils.UserError, match=message):
        data.load(data_flag, "sft", split, held_out, TEMPLATE, tok, 512)


def test_the_flag_that_named_the_data_is_in_the_message(tok):
    messages = {"": "--ptx-data is empty", "toy:0": "--ptx-data toy:0: give"}
    for data_flag, message in messages.items():
        with pytest.raises(utils.UserError, match=message):
            data.load(data_flag, "sft", "", 0.1, TEMPLATE, tok, 512, flag="--ptx-data")


@pytest.mark.parametrize("module", [data, tasks])
def test_no_input_is_checked_with_assert_which_python_o_leaves_out(module):
    tree = ast.parse(Path(module.__file__).read_text())
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not lines, f"{module.__name__}.py asserts in lines {lines}"


def test_the_template_is_the_given_one_or_that_of_the_model_or_the_default(tmp_path, capsys):
    sft, reward, hub = [str(tmp_path / name) for name in ("sft", "reward", "hub")]
    for folder, template in ((sft, "Q: {prompt}\\nA:"), (reward, "{prompt} =")):
        Path(folder, "ema").mkdir(parents=True)
        write_rows(Path(folder, "run.json"), [{"config": {"template": template}}])
    assert data.check_template("", "", hub) == data.DEFAULT_TEMPLATE == TEMPLATE
    assert data.check_template("", sft, "", hub) == "Q: {prompt}\nA:"
    assert data.check_template("", hub, reward) == "{prompt} ="
    assert data.check_template("", f"{sft}/ema") == "Q: {prompt}\nA:"
    assert data.check_template("Q: {prompt}\\nA:", sft) == "Q: {prompt}\nA:"
    said = capsys.readouterr()
    assert not said.out + said.err
    assert data.check_template("", sft, reward) == "Q: {prompt}\nA:"
    assert data.check_template(TEMPLATE, sft) == TEMPLATE
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert lines == [
        f"warning: {reward} was trained with --template '{{prompt}} =', and here it is "
        "'Q: {prompt}\\nA:'",
        f"warning: {sft} was trained with --template 'Q: {{prompt}}\\nA:', and here it is "
        f"{TEMPLATE!r}"]
    with pytest.raises(utils.UserError, match="has no {prompt} in it"):
        data.check_template("Human:")


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 1}', "{}"])
def test_a_run_json_that_does_not_say_the_template_is_an_error(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(utils.UserError, match="run.json is damaged, so nobody knows how"):
        data.check_template("", str(tmp_path))


# -----------------------------------------------------------------------------
# split, weights, epochs, batches


def test_split_divides_rows_without_overlap_whatever_their_order(tmp_path, tok):
    steps = ("sft", "reward", "ppo")
    rows = []
    for i in range(1200):
        rows.append({"prompt": f"question {i % 600}", "chosen": f"yes {i}", "rejected": "no"})
    a = write_rows(tmp_path / "a.jsonl", rows)
    b = write_rows(tmp_path / "b.jsonl", rows[::-1])
    parts = {}
    for path in (a, b):
        for step in steps:
            loaded = load_file(path, tok, step, "2,4,4")
            parts[path, step] = [{tuple(r.prompt(i)) for i in range(len(r))} for r in loaded]
    for step in steps:
        assert parts[a, step] == parts[b, step], "a row's step depends on its content alone"
    everything = [prompts for step in steps for prompts in parts[a, step]]
    different = len(set.union(*everything))
    assert different == sum(map(len, everything)) == 600, "a prompt is in exactly one place"
    assert 80 < len(set.union(*parts[a, "sft"])) < 160, "a fifth goes to step 1"


def test_weights_are_the_shares_of_an_epoch(tmp_path, tok):
    files = []
    for name, size in (("a", 700), ("b", 500)):
        rows = [{"prompt": f"{name} {i}", "response": name} for i in range(size)]
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    rows, _ = load_file(f"{files[0]}:0.8,{files[1]}:0.2", tok, held_out=0.05)
    order = data.epoch_order(rows, 0, 1)
    share = (rows.source[order] == 0).mean()
    assert abs(share - 0.8) < 0.01, f"{share}: 80% are from the first"
    assert len(set(order)) == len(order), "no row comes twice"
    later = data.epoch_order(rows, 1, 1)
    assert set(order) != set(later), "another epoch takes other rows of the larger source"


def test_an_epoch_has_every_row_once_and_ranks_share_its_batches(toy_file, tok, monkeypatch):
    rows, _ = load_file(toy_file, tok)
    lengths = rows.lengths("response")
    first, second = (list(data.batches(rows, lengths, 8, epoch, seed=3)) for epoch in (0, 1))
    in_epoch = np.concatenate(first)
    assert len(set(in_epoch)) == len(in_epoch) == len(rows) // 8 * 8, "no row twice in an epoch"
    assert [b.tolist() for b in first] != [b.tolist() for b in second], "another order"
    first_sets, second_sets = ({frozenset(b) for b in batches} for batches in (first, second))
    assert not first_sets & second_sets, "and other rows together"
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    for batch in first:
        by_rank = []
        for rank in range(4):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            by_rank.append(np.concatenate(utils.split_micro_batches(batch, lengths, 2)))
        assert all(len(part) == 2 for part in by_rank)
        assert set(np.concatenate(by_rank)) == set(batch), "together the batch of one process"
    resumed = data.steps(rows, lengths, 8, 3, start=len(first) + 2)
    assert next(resumed)[1].tolist() == second[2].tolist(), "the position in the data is a number"


def test_a_rollout_is_in_random_order_and_steps_of_the_others_are_sorted_in_pools(toy_file, tok):
    rows, _ = load_file(toy_file, tok, "ppo", held_out=0.1)
    lengths = rows.lengths()
    (_, a), (_, b) = (next(data.steps(rows, lengths, 64, 1, pool=pool)) for pool in (1, 4))
    early = lengths[a][:32].mean()
    late = lengths[a][32:].mean()
    message = "the first optimizer steps of a rollout have the same lengths as the last"
    assert abs(early - late) < lengths.std(), message
    assert (np.diff(lengths[a]) < 0).any() and (np.diff(lengths[b]) >= 0).all()


def test_a_batch_larger_than_the_data_is_refused(toy_file, tok):
    rows, _ = load_file(toy_file, tok)
    with pytest.raises(utils.UserError, match="--batch-size 500: the data has only .* rows"):
        data.steps(rows, rows.lengths("response"), 500, 1)


@shared
def test_real_preferences_are_read_whole_and_batches_of_them_have_little_padding():
    tok = models.load_tokenizer(STORIES)
    path = str(SHARED / "prefs" / "hh_harmless_test.jsonl.gz")
    rows, held_out = data.load(path, "reward", "", 0.1, TEMPLATE, tok, 10**6)
    there = len(rows) + len(held_out)
    equal = 2312 - there - 5  # 5 pairs of dialogues with different prompts
    assert 0 <= equal <= 12, f"{there} of 2,312 rows are there"

    def no_model(tokens):
        return torch.zeros(tokens.shape)
    utils.init_distributed(0)
    lengths = rows.lengths("chosen", "rejected")
    forwards = reward.forwards_per_micro_batch(lengths, 0)
    slots = 0
    tokens = 0
    for batch in data.batches(rows, lengths, 32, 0, 1):
        for part in utils.split_micro_batches(batch, lengths, 8):
            slots += reward.answer_scores(no_model, rows, part, forwards, "cpu")[1]
        for which in ("chosen", "rejected"):
            tokens += rows.lengths(which)[batch].sum()
    padding = 1 - tokens / slots
    assert padding < 0.10, f"{padding:.1%} of the tokens are padding"
    text = tok.decode(rows.prompt(0), skip_special_tokens=True)
    assert text.startswith("Human:") and text.endswith("Assistant:"), text


# -----------------------------------------------------------------------------
# tasks


def test_toy_is_exactly_checkable_and_a_third_of_its_demonstrations_is_wrong():
    rows = list(tasks.toy(500))
    accuracy = []
    for row in rows:
        prompt = f"Human: {row['prompt']}\nAssistant:"
        accuracy.append(tasks.toy_accuracy(prompt, " " + row["response"]))
        assert tasks.toy_accuracy(row["prompt"], row["chosen"]) == 1
        assert tasks.toy_accuracy(row["prompt"], row["rejected"]) == 0
    assert 0.62 < np.mean(accuracy) < 0.68
    for prompt, right in {"reverse abc": "cba", "upper abc": "ABC", "sort cab": "abc"}.items():
        assert tasks.toy_accuracy(prompt, right) == 1
    conversation = "Human: copy abc\nAssistant: abc\nHuman: upper abc\nAssistant:"
    assert tasks.toy_accuracy(conversation, "ABC") == 1, "the last question counts"
    for prompt, wrong in {"first abc": "ab", "copy abc": "abcc"}.items():
        assert tasks.toy_accuracy(prompt, wrong) == 0


def test_a_task_is_rows_and_a_checker(tok, monkeypatch):
    def rows():
        return ({"prompt": f"copy {i}", "response": str(i)} for i in range(100))

    def check(prompts, completions):
        return [float(p.split()[-1] == c) for p, c in zip(prompts, completions)]
    monkeypatch.setitem(tasks.TASKS, "mini", tasks.Task(rows=rows, check=check))
    train, held_out = load_file("mini", tok)
    assert len(train) + len(held_out) == 100
    function = tasks.load_function("mini")
    assert function.name == "mini"
    assert function(["copy 1", "copy 2"], ["1", "1"], {}) == [1.0, 0.0]


def all_expressions(nums):
    """{expression: value} of all that can be written with these numbers, without parentheses."""
    values = {}
    for count in (1, 2, 3):
        for order in itertools.permutations(nums, count):
            for ops in itertools.product("+-*/", repeat=count - 1):
                text = str(order[0]) + "".join(op + str(n) for op, n in zip(ops, order[1:]))
                with contextlib.suppress(ZeroDivisionError):
                    fractions = re.sub(r"(\d)", r"Fraction(\1)", text)
                    values[text] = eval(fractions, {"Fraction": Fraction})
    return values


def test_countdown_rows_are_what_they_say():
    rows = list(itertools.islice(tasks.countdown(), 100))
    assert rows == list(itertools.islice(tasks.countdown(), 100)), "the same at every call"
    right = 0
    for row in rows:
        numbers = row["nums"], row["target"]
        assert row["prompt"] == f"{row['target']} from {' '.join(map(str, row['nums']))}"
        assert tasks.countdown_accuracy(" " + row["chosen"], *numbers) == 1
        assert tasks.countdown_accuracy(row["rejected"], *numbers) == 0
        assert sorted(re.findall(r"\d", row["rejected"])) == sorted(map(str, row["nums"]))
        right += tasks.countdown_accuracy(row["response"], *numbers)
    assert 40 <= right <= 60


def test_the_checker_of_countdown_agrees_with_all_expressions():
    for row in itertools.islice(tasks.countdown(), 10):
        expressions = all_expressions(row["nums"])
        assert row["chosen"] in expressions and row["rejected"] in expressions
        for answer, value in expressions.items():
            right = tasks.countdown_accuracy(answer, row["nums"], row["target"])
            assert right == (value == row["target"]), answer
        for answer in all_expressions([n % 9 + 1 for n in row["nums"]]).keys() - expressions.keys():
            assert tasks.countdown_accuracy(answer, row["nums"], row["target"]) == 0, answer


@pytest.mark.parametrize("answer, expected", {
    "(1+2)*8": 1, " ( 1 + 2 ) * 8 = 24": 1, "(1+2)*8=23": 0, "(1+2)*8=": 0, "8*2-1=24": 0,
    "8/(2/(2*1))": 0, "8*1*2": 0, "(8/2)*1": 0, "24": 0,
    "8*2+8": 0, "8*2+8*1": 0, "": 0, "=24": 0, "8*(1+2": 0, "8**1+2": 0, "48//2": 0, "-1+2": 0,
    "__import__('os').system('false')": 0, "9**9**9**9": 0, "8*(1+2)#": 0, "0x8*(1+2)": 0,
    "8_0": 0, "\u0668*(1+2)": 0, "8*(1+2)\n": 1, "1/0": 0, "(" * 90 + "8" + ")" * 9: 0,
    "8*(01+2)": 0, "8*(1+2)" + " " * 10_000: 1, "8" * 10_000: 0, "[8*(1+2)]": 0, "8*(1+2.0)": 0,
}.items())
def test_the_checker_of_countdown_runs_nothing_and_is_exact(answer, expected):
    start = time.perf_counter()
    assert tasks.countdown_accuracy(answer, [8, 2, 1], 24) == expected
    assert time.perf_counter() - start < 0.2


def test_the_checker_of_countdown_divides_exactly():
    assert tasks.countdown_accuracy("8/(3-8/3)", [8, 8, 3, 3], 24) == 1


@pytest.mark.parametrize("completion, expected", {
    "#### 1,234": 1, "It is 7, no, 1234.": 1, "It is 1234, no, 7": 0, "It is 7, so $1,234": 1,
    "1234.0": 1, "#### 1234 of 5": 1, "#### none, 1234": 1, "1 and 1234 ####": 1, "9" * 9000: 0,
    "-1234": 0, "": 0, "none": 0,
    "12 34": 0, "\u0661": 0, "1e3 234": 0, "1244-10=1234": 1, "2468/2-1234": 1, "- 1234": 1,
}.items())
def test_the_checker_of_gsm8k_compares_the_last_number(completion, expected):
    gsm8k = tasks.load_function("gsm8k")
    answer = "He has 2 * 617 = <<2*617=1234>>1234.\n#### 1234"
    assert gsm8k(["p"], [completion], {"answer": [answer]}) == [expected]


def test_the_checker_of_gsm8k_reads_answers_that_are_numbers():
    gsm8k = tasks.load_function("gsm8k")
    assert gsm8k(["p"] * 3, ["so 42", "-0.5", "#### .5"], {"answer": [42, -0.5, 0.5]}) == [1.0] * 3
    with pytest.raises(utils.UserError, match=r"ValueError\(this row has no answer\) for [^\n]*$"):
        gsm8k(["p"], ["42"], {"answer": [None]})


@shared
def test_the_checker_of_gsm8k_accepts_every_real_solution():
    lines = [json.loads(line) for line in open(SHARED / "tasks/gsm8k_test.jsonl")]
    answers = [line["answer"] for line in lines]
    gsm8k = tasks.load_function("gsm8k")
    assert gsm8k([""] * len(lines), answers, {"answer": answers}) == [1.0] * len(lines)
    others = [f"The answer is {i}.5" for i in range(len(lines))]
    assert sum(gsm8k([""] * len(lines), others, {"answer": answers})) == 0


@pytest.mark.parametrize("row, name", [
    ({"prompt": "p", "answers": None, "ranks": None, "chosen": "c", "rejected": "r"}, "prompt"),
    ({"prompt": "p", "answers": ["a", "b"], "ranks": None, "scores": [1, 2]},
     "prompt/answers/scores"),
    ({"prompt": "p", "messages": None}, "prompt"),
])
def test_a_null_field_does_not_hide_the_format_that_fits(row, name):
    example, form, _ = sources.convert(row)
    assert form == name
    if row.get("chosen"):
        assert example.answers == ("c", "r")


def test_a_checker_without_rows_is_no_source():
    with pytest.raises(utils.UserError, match="gsm8k is only a checker, for --reward: its rows"):
        sources.check_sources("gsm8k")


def test_reasoning_gym_without_the_package_gets_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for read in (sources.check_sources, tasks.load_function):
        with pytest.raises(utils.UserError, match="backward: first `pip install reasoning-gym"):
            read("reasoning_gym:spell_backward")


def test_a_task_of_reasoning_gym_is_rows_and_its_own_scorer(tok):
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    with pytest.raises(utils.UserError, match="reasoning_gym:no_such: reasoning-gym has no such"):
        sources.check_sources("reasoning_gym:no_such")
    rows = list(itertools.islice(tasks.find_task("reasoning_gym:spell_backward").rows(), 5))
    scorer = tasks.load_function("reasoning_gym:spell_backward")
    answers = [row["response"] for row in rows]
    fields = {"row": [row["row"] for row in rows]}
    assert scorer([""] * 5, answers, fields) == [1.0] * 5
    own = tasks.gym_dataset("reasoning_gym:spell_backward")
    credit = [own.score_answer(answer, own[i]) for i, answer in enumerate(answers[::-1])]
    assert scorer([""] * 5, answers[::-1], fields) == credit and credit[0] < 1.0
    other = tasks.load_function("reasoning_gym:letter_counting")
    with pytest.raises(utils.UserError, match="backward:0, is not one of reasoning_gym:letter"):
        other([""], ["3"], {"row": fields["row"][:1]})
    assert all(row["prompt"].rpartition(" ")[2][::-1] == row["response"] for row in rows)


# -----------------------------------------------------------------------------
# reward functions

RULES = '''
import numpy as np
import torch
from helper_of_mine import LIMIT, explode

class Scorer:
    def __call__(self, completions, **kwargs):
        return [LIMIT for _ in completions]

def exact(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]

async def waits(completions):
    return [float(len(c)) for c in completions]

def numpy_positions(completion_ids):
    return [{np.int64(len(ids) - 1): 1.0} for ids in completion_ids]

def everything(prompts, completions, **kwargs):
    return [len(kwargs)] * len(prompts)

def optional(completions, bonus=2.0, absent=1.0):
    return [absent for _ in completions]

def as_numpy(completions): return np.arange(len(completions), dtype=np.float32)
def as_torch(completions): return torch.ones(len(completions), dtype=torch.bfloat16)
def as_generator(completions): return (len(c) > 1 for c in completions)
def as_text(completions): return ["0.5" for _ in completions]
def as_tensors(completions): return [torch.tensor(0.25) for _ in completions]

def imports_late(completions):
    from other_helper_of_mine import VALUE
    return [VALUE] * len(completions)

scorer = Scorer()

def greedy(prompts, completions, answer):
    prompts.clear()
    completions.clear()
    answer[0].append(1)
    return [1.0, 1.0]

def fails(prompts, completions):
    return [explode(p) for p in prompts]

def fails_late(completions): return (1 / (c != "bb") for c in completions)
def fails_together(completions): return [1 / (len(completions) == 1)] * len(completions)
def short(completions): return [1.0]
def nan(completions): return [1.0, float("nan")]
def none(completions): return [None for _ in completions]
def nothing(completions): pass
def number(completions): return 1.0
def words(completions): return ["good" for _ in completions]
def per_token(completion_ids): return [[i / 2 for i in ids] for ids in completion_ids]
def as_table(completions): return np.array([[1, 0], [0, 2]])
def by_place(completions): return [{0: 1.5}, {-1: 2, -2: True}]
def lists(completions): return [[0.1, 0.2, 0.3] for _ in completions]
def table(completions): return np.zeros((len(completions), 1))
def far_away(completions): return [{2: 1.0} for _ in completions]
def nan_inside(completions): return [[0.0, float("nan")] for _ in completions]
def half(completions): return [[0.0, 1.0], 1.0]
def first_edition(prompts, answers): return [1.0 for _ in answers]
def by_position(completions, /): return [1.0 for _ in completions]
not_callable = 3
'''

HELPER = '''
LIMIT = 7
def explode(prompt):
    """A long function of another file."""
    if "sort" in prompt:
        return {}[prompt]
    return 1.0
'''


@pytest.fixture
def rules(tmp_path):
    """rules.py, and the modules beside it that it imports."""
    (tmp_path / "helper_of_mine.py").write_text(HELPER)
    (tmp_path / "other_helper_of_mine.py").write_text("VALUE = 4\n")
    (tmp_path / "rules.py").write_text(RULES)
    yield tmp_path / "rules.py"
    for name in ("helper_of_mine", "other_helper_of_mine"):
        sys.modules.pop(name, None)


PROMPTS = ["copy a", "sort b"]
COMPLETIONS = ["a", "bb"]
FIELDS = {"answer": ["a", "b"], "bonus": [5, None]}
IDS = {"completion_ids": [[5, 2], [6, 2]]}


@pytest.mark.parametrize("name, expected", {
    "exact": [1.0, 0.0], "everything": [2.0, 2.0], "optional": [1.0, 1.0], "as_numpy": [0.0, 1.0],
    "as_torch": [1.0, 1.0], "as_generator": [0.0, 1.0], "as_text": [0.5, 0.5],
    "as_tensors": [0.25, 0.25], "scorer": [7.0, 7.0], "imports_late": [4.0, 4.0],
    "waits": [1.0, 2.0],
}.items())
def test_a_reward_function_gets_by_name_what_its_signature_takes(name, expected, rules):
    before = list(sys.path)
    function = tasks.load_function(f"{rules}:{name}")
    assert function.name == name
    scores = function(PROMPTS, COMPLETIONS, FIELDS)
    assert scores == expected and all(type(score) is float for score in scores)
    assert sys.path == before, "its folder is on the path only while its code runs"


@pytest.mark.parametrize("name, expected", {
    "per_token": [[2.5, 1.0], [3.0, 1.0]], "as_table": [[1.0, 0.0], [0.0, 2.0]],
    "by_place": [[1.5, 0.0], [1.0, 2.0]], "numpy_positions": [[0.0, 1.0], [0.0, 1.0]],
}.items())
def test_a_process_reward_gives_a_number_for_each_sampled_token(name, expected, rules):
    function = tasks.load_function(f"{rules}:{name}")
    scores = function(PROMPTS, COMPLETIONS, FIELDS | IDS)
    assert scores == expected and all(type(x) is float for row in scores for x in row)


def test_a_reward_function_gets_copies(rules):
    prompts = list(PROMPTS)
    fields = {"answer": [[0], [0]]}
    tasks.load_function(f"{rules}:greedy")(prompts, COMPLETIONS, fields)
    assert prompts == PROMPTS and len(COMPLETIONS) == 2 and fields == {"answer": [[0], [0]]}


def test_two_functions_of_a_file_share_its_module_and_an_edit_is_read(rules):
    first = tasks.load_function(f"{rules}:exact").function
    second = tasks.load_function(f"{rules}:short").function
    assert first.__globals__ is second.__globals__
    rules.write_text("def short(completions):\n    return [9.0, 9.0]\n")
    os.utime(rules, ns=(1, 1))
    assert tasks.load_function(f"{rules}:short")(PROMPTS, COMPLETIONS, {}) == [9.0, 9.0]


@pytest.mark.parametrize("name, message", {
    "short": "rules.py:short: gave 1 scores for 2 prompts; it must return one finite number",
    "nan": "rules.py:nan: gave nan for prompt 'sort b', completion 'bb'; it must return one finite",
    "none": "gave None for prompt 'copy a', completion 'a'",
    "words": "gave 'good' for prompt 'copy a'",
    "nothing": "returned None, a NoneType; it must return a list",
    "number": "returned 1.0, a float; it must return a list",
    "lists": "gave a list of 3 numbers for prompt 'copy a'.*which has 2 sampled tokens; a process",
    "table": "gave a list of 1 numbers",
    "far_away": "gave a number for position 2 for prompt 'copy a'.*which has 2 sampled tokens",
    "nan_inside": "gave nan for prompt 'copy a', completion 'a'",
    "half": "gave lists for some completions and numbers for others",
    "first_edition": "its parameter 'answers' is not a field of the rows; a function can take "
                     "prompts, completions, completion_ids, answer, bonus",
    "fails_together": r"raised ZeroDivisionError\(.*\) for 2 prompts at once, but for none",
    "fails_late": r"raised ZeroDivisionError\(.*\) for prompt 'sort b', completion 'bb'",
}.items())
def test_a_wrong_reward_function_gets_one_sentence(name, message, rules):
    function = tasks.load_function(f"{rules}:{name}")
    with pytest.raises(utils.UserError, match=message):
        function(PROMPTS, COMPLETIONS, FIELDS | IDS)


def test_a_bug_in_a_reward_function_shows_the_row_and_only_the_users_lines(rules):
    function = tasks.load_function(f"{rules}:fails")
    with pytest.raises(utils.UserError) as caught:
        function(PROMPTS, COMPLETIONS, FIELDS)
    sentence, *lines = str(caught.value).splitlines()
    assert sentence == (f"--reward {rules}:fails: raised KeyError('sort b') for prompt 'sort b', "
                        "completion 'bb'")
    files = re.findall(r'File "(.*?)", line (\d+), in (\w+)', "\n".join(lines))
    places = [(os.path.basename(file), where) for file, _, where in files]
    places = [place for place in places if place[1] != "<listcomp>"]  # before Python 3.12
    assert places == [("rules.py", "fails"), ("helper_of_mine.py", "explode")]
    assert "return {}[prompt]" in str(caught.value)


@pytest.mark.parametrize("spec, message", {
    "rules.py:absent": "rules.py has no function 'absent'",
    "rules.py:exact:half": "has no function 'exact:half'; a weight is a number",
    "rules.py:not_callable": "rules.py has no function 'not_callable'",
    "rules.py:": "write file.py:function",
    "rules.py:by_position": "its parameter 'completions' cannot be given by name",
    "nowhere.py:f": "there is no file nowhere.py",
    "something": "write file.py:function, or the name of a task .toy.",
    "broken.py:f": r"broken.py cannot be imported: SyntaxError(.|\n)*def f\(:",
    "raises.py:f": r"raises.py cannot be imported: ZeroDivisionError(.|\n)*line 2.*\n *x = 1 / 0",
}.items())
def test_a_wrong_reward_gets_one_sentence(spec, message, rules, monkeypatch):
    monkeypatch.chdir(rules.parent)
    (rules.parent / "broken.py").write_text("def f(:\n")
    (rules.parent / "raises.py").write_text("import json\nx = 1 / 0\n")
    with pytest.raises(utils.UserError, match=message):
        tasks.load_function(spec)


def test_the_checker_of_toy_as_a_reward_says_which_prompt_is_not_of_toy():
    function = tasks.load_function("toy")
    prompts = ["Human: copy ab\nAssistant:", "Human: hello\nAssistant:"]
    assert function(prompts[:1], [" ab"], {}) == [1.0]
    with pytest.raises(utils.UserError, match="ValueError.*not a prompt of toy.* 'Human: hello"):
        function(prompts, ["a", "b"], {})
