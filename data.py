"""Rows, from wherever they come, to batches of token ids.

    source --read--> {"prompt": ..., "chosen": ...} --FORMATS--> Row --template, tokenizer--> one flat file of tokens
    --split, held-out, length limits--> Rows --shuffled, bucketed by length, dealt to ranks--> batches

A source is a file (.jsonl .json .txt, also with .gz, or .parquet), a name in SOURCES, a folder or a name on the Hugging Face hub.
To add one of your own, write a generator of at most ten lines and put it into SOURCES; `toy` below is one. Tokens are made
once, by one process a machine, under a name that is a hash of all that they depend on; so there is no stale cache (but of a
name on the hub: there it is the name alone).

A row is a prompt and up to two answers to it. Its tokens are `prompt ids + answer ids + EOS`: the two parts are tokenized
apart, exactly as they meet again when the policy answers a prompt, and EOS is an id, not text.
"""
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import time
from array import array
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from utils import UserError, print0

CACHE = Path(os.environ.get("NANORLHF_CACHE", Path.home() / ".cache" / "nanorlhf"))
VERSION = 1  # of the layout of the cached files

# -----------------------------------------------------------------------------
# toy: six skills with an exact checker, and labellers who are often wrong

SKILLS = {
    "copy": lambda w: w,
    "reverse": lambda w: w[::-1],
    "sort": lambda w: "".join(sorted(w)),
    "upper": str.upper,
    "first": lambda w: w[0],
    "last": lambda w: w[-1],
}


def careless(rng, text):
    """A near miss: one letter changed, doubled or dropped, or two neighbours swapped."""
    letters, i, kind = list(text), rng.randrange(len(text)), rng.randrange(4)
    if kind == 0:
        letters[i] = rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ" if text.isupper() else "abcdefghijklmnopqrstuvwxyz")
    elif kind == 1:
        letters.insert(i, letters[i])
    elif kind == 2:
        del letters[i]
    elif i + 1 < len(letters):
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def miss(rng, skill, word):
    """A wrong answer: the answer miswritten, the word misread, or the question mistaken for another."""
    while True:
        kind = rng.random()
        answer = careless(rng, skill(word)) if kind < 0.5 else skill(careless(rng, word)) if kind < 0.8 else rng.choice(list(SKILLS.values()))(word)
        if answer != skill(word):
            return answer


def toy(words=4000, wrong=0.35):
    """{prompt, response, chosen, rejected}: the response is a labeller's, wrong for 35% of the rows; of the pair, chosen is
    right and rejected wrong. The same rows on every machine."""
    rng = random.Random(0)
    for _ in range(words):
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))[: rng.randint(3, 4)]
        for name, skill in SKILLS.items():
            right = skill(word)
            response = miss(rng, skill, word) if rng.random() < wrong else right
            yield {"prompt": f"{name} {word}", "response": response, "chosen": right, "rejected": miss(rng, skill, word)}


def toy_reward(prompts, answers):
    """The exact checker as a reward: ppo.py --reward-model "" --reward data.py:toy_reward"""
    return list(map(toy_gold, prompts, answers))


def toy_gold(prompt, answer):
    """1.0 where the answer is right, else 0.0. Reads the last line of the prompt that names a skill."""
    skill, word = re.findall(rf"\b({'|'.join(SKILLS)}) (\w+)", prompt)[-1]
    return float(answer.strip() == SKILLS[skill](word))


SOURCES = {"toy": toy}
CHECKERS = {"toy": toy_gold}  # (prompt, answer) -> float: what is logged as `gold`; no model is trained on it

# -----------------------------------------------------------------------------
# formats: which fields a row has says what it is. Each returns (messages, response, chosen, rejected), or None for a row
# that teaches nothing (it is left out and counted); messages end with the user's turn.


def user(text):
    return [{"role": "user", "content": text}]


def dialogue(text):
    """'\\n\\nHuman: ... \\n\\nAssistant: ...' to messages (the layout of hh-rlhf)."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(parts) < 3:
        raise ValueError("is not a dialogue: no line begins with 'Human:' or 'Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": t.strip()} for r, t in zip(parts[1::2], parts[2::2])]


def from_dialogues(row):
    chosen, rejected = dialogue(row["chosen"]), dialogue(row["rejected"])
    if chosen[:-1] != rejected[:-1] or not (chosen[-1]["role"] == rejected[-1]["role"] == "assistant"):
        return None  # two conversations, not two answers to one prompt
    return chosen[:-1], chosen[-1]["content"], chosen[-1]["content"], rejected[-1]["content"]


def from_alpaca(row):
    prompt = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    return user(prompt), row.get("output"), row.get("chosen"), row.get("rejected")


def from_messages(row):
    *messages, last = row["messages"]
    return (messages, last["content"], None, None) if last["role"] == "assistant" else (row["messages"], None, None, None)


def from_prompt(row):
    prompt = row["prompt"]
    if isinstance(prompt, list):
        messages = prompt
    else:
        messages = dialogue(prompt) if prompt.lstrip().startswith("Human:") else user(prompt)
        if messages[-1] == {"role": "assistant", "content": ""}:
            messages = messages[:-1]  # "... Assistant:" is the template's part
    return messages, row.get("response", row.get("chosen")), row.get("chosen"), row.get("rejected")


FORMATS = [  # (fields that a row must have, converter); the first that fits is taken
    (("messages",), from_messages),
    (("prompt",), from_prompt),
    (("instruction",), from_alpaca),
    (("chosen", "rejected"), from_dialogues),
    (("question", "answer"), lambda row: (user(row["question"]), row["answer"], None, None)),
    (("text",), lambda row: ([], row["text"], None, None)),
]


def convert(row, where):
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with fields, not {str(row)[:40]!r}")
    for fields, converter in FORMATS:
        if all(f in row for f in fields):
            try:
                if (out := converter(row)) is not None:
                    check_text(out)
                return out
            except (ValueError, TypeError, KeyError, AttributeError) as e:
                what = f"there is no {e}" if isinstance(e, KeyError) else e
                raise UserError(f"{where}: cannot read this row as {'/'.join(fields)}: {what}") from None
    known = "; ".join("/".join(fields) for fields, _ in FORMATS)
    raise UserError(f"{where}: unknown fields {sorted(row)}; a row needs one of: {known}")


def check_text(out):
    """Raises ValueError where a converted row holds something else than text that can be written down."""
    messages, *answers = out
    for x in [m["content"] for m in messages] + [m["role"] for m in messages] + [a for a in answers if a is not None]:
        if not isinstance(x, str):
            raise ValueError(f"{str(x)[:40]!r} stands where text is needed")
        x.encode()  # half of a surrogate pair is no text
    if not messages and answers[0] is None:
        raise ValueError("it has neither a prompt nor a text")


# -----------------------------------------------------------------------------
# reading

KINDS = (".jsonl", ".json", ".txt", ".parquet")

def read(source):
    """Yields (where, row): the row as it stands in the source, and the words that lead a person to it."""
    if source in SOURCES:
        yield from ((f"{source}, row {i}", row) for i, row in enumerate(SOURCES[source](), 1))
        return
    path, kind = Path(source), Path(source.removesuffix(".gz")).suffix
    if path.is_dir() or (kind not in KINDS and not path.exists()):
        try:
            from datasets import load_dataset  # a folder in the hub's layout, or a name on the hub
        except ImportError:
            raise UserError(f"--data {source}: no such file, nor a built-in source ({', '.join(SOURCES)}); for a folder or a "
                            "name on the Hugging Face hub first `pip install datasets`") from None
        try:
            rows = load_dataset(source, split="train")
        except Exception as e:  # the library raises many kinds, each meaning that there is nothing to read
            raise UserError(f"--data {source}: neither a file here nor a data set that loads ({str(e).splitlines()[0]})") from None
        yield from ((f"{source}, row {i}", row) for i, row in enumerate(rows, 1))
        return
    if not path.is_file():
        raise UserError(f"--data {source}: no such file")
    if kind not in KINDS or source.endswith(".parquet.gz"):
        raise UserError(f"--data {source}: unknown kind of file {''.join(path.suffixes)!r}; known are {' '.join(KINDS)}, and all but the last with .gz")
    if kind == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(f"--data {source}: to read parquet first `pip install pyarrow`") from None
        try:
            rows = (row for part in parquet.ParquetFile(path).iter_batches() for row in part.to_pylist())
        except (OSError, ValueError) as e:
            raise UserError(f"--data {source}: cannot be read as parquet ({e})") from None
        yield from ((f"{source}, row {i}", row) for i, row in enumerate(rows, 1))
        return
    with (gzip.open if source.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
        try:
            if kind == ".txt":
                paragraphs = (p for p in re.split(r"\n\s*\n", f.read()) if p.strip())
                yield from ((f"{source}, paragraph {i}", {"text": p}) for i, p in enumerate(paragraphs, 1))
            elif kind == ".json":
                rows = json.load(f)
                if not isinstance(rows, list):
                    raise UserError(f"{source}: a .json file must hold one list of rows (one object a line is .jsonl)")
                yield from ((f"{source}, row {i}", row) for i, row in enumerate(rows, 1))
            else:
                for i, line in enumerate(f, 1):
                    if line.strip():
                        where = f"{source}:{i}"
                        yield where, json.loads(line)
        except json.JSONDecodeError as e:
            where = f"{source}:{e.lineno}" if kind == ".json" else f"{source}:{i}"
            raise UserError(f"{where}: not valid JSON ({e.msg} at column {e.colno})") from None
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as e:
            raise UserError(f"{source}: cannot be read as {'gzipped ' if source.endswith('.gz') else ''}UTF-8 text ({e})") from None


def checker(data):
    """The exact checker of a built-in source, if that is all there is: (prompt, answer) -> float, or None."""
    return CHECKERS.get(data)


def parse_sources(data):
    """'a.jsonl:0.7,b.json:0.3' to [(source, weight or None), ...]."""
    out = []
    for item in filter(None, (s.strip() for s in data.split(","))):
        source, colon, weight = item.rpartition(":")
        try:
            out.append((source, float(weight)) if colon else (item, None))
        except ValueError:
            out.append((item, None))  # a colon that belongs to the name
    if not out:
        raise UserError("--data is empty: name a file, a built-in source or a data set")
    if len({w is None for _, w in out}) > 1 or any(w is not None and w <= 0 for _, w in out):
        raise UserError(f"--data {data}: give every source a weight above 0, or none")
    return out


# -----------------------------------------------------------------------------
# template and tokens


def render(messages, template, tokenizer, where="the conversation"):
    """The text that the policy continues. template: text with {prompt} in it, once a user's turn; 'chat': the tokenizer's. where: for errors."""
    if template == "chat":
        if not tokenizer.chat_template:
            raise UserError("--template chat: this tokenizer has no chat template; leave the flag out, or give one with {prompt}")
        from jinja2 import TemplateError
        try:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as e:
            raise UserError(f"{where}: the tokenizer's chat template refuses it: {e}") from None
    blocks = []
    for m in messages:
        if m["role"] == "user":
            blocks.append(template.replace("{prompt}", m["content"].strip()))
        elif m["role"] == "assistant" and blocks:
            blocks[-1] += glue(template) + m["content"].strip()
        else:
            blocks.append(m["content"].strip())  # a system's words stand before the first turn
    return "\n".join(blocks)


def glue(template):
    """What stands between a prompt and its answer."""
    return "" if template == "chat" or template[-1:].isspace() else " "


def check_template(template, *folders):
    """The template to use. Warns where one of these folders is that of a run with another one."""
    if template != "chat" and "{prompt}" not in template:
        raise UserError(f"--template {template!r} has no {{prompt}} in it, so every prompt would be the same")
    template = template.replace("\\n", "\n")  # a shell passes the two characters \n
    for run in (Path(folder) / "run.json" for folder in folders if folder):
        if run.is_file() and (was := json.loads(run.read_text())["config"].get("template", template).replace("\\n", "\n")) != template:
            print0(f"warning: {run.parent} was trained with --template {was!r}, and here it is {template!r}")
    return template


def prompt_ids(texts, template, tokenizer):
    """Token ids of rendered prompts, with the special tokens that the tokenizer puts in front by itself."""
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=template != "chat")["input_ids"]
    ids = [i[:-1] if len(i) > 1 and i[-1] == tokenizer.eos_token_id else i for i in ids]  # some append EOS: it ends no prompt
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [i or [start] for i in ids]  # without a token there is nothing to continue


def answer_ids(texts, template, tokenizer):
    """Token ids of answers, each ended by EOS."""
    if not texts:
        return []
    ids = tokenizer([t and glue(template) + t for t in map(str.strip, texts)], add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return [i + [eos] * (i[-1:] != [eos]) for i in ids]  # some texts end in the tokenizer's own word for it


def fingerprint(source, template, tokenizer):
    """A hash of all that the tokens depend on: the rows themselves, the tokenizer, the template."""
    h = hashlib.sha256(json.dumps([VERSION, source, template, tokenizer.chat_template if template == "chat" else None,
                                   tokenizer.bos_token_id, tokenizer.eos_token_id]).encode())
    h.update(Path(__file__).read_bytes())
    h.update(tokenizer.backend_tokenizer.to_str().encode() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab()).encode())
    if source not in SOURCES and Path(source).is_file():
        with open(source, "rb") as f:
            while block := f.read(2**20):
                h.update(block)
    elif source not in SOURCES:
        h.update(repr(sorted((str(p), p.stat().st_mtime_ns) for p in Path(source).rglob("*"))).encode())
    return h.hexdigest()[:32]


def tokenize(source, template, tokenizer, folder):
    """Writes tokens.bin (int32, flat) and rows.npy (rows, 5) int64: start, end of prompt, of response, of chosen, of rejected
    (an empty span where a row has none), and hash.npy: 64 bits of the prompt's hash. Reads a thousand rows at a time."""
    bounds, hashes, at, skipped = array("q"), array("Q"), 0, 0
    with open(folder / "tokens.bin", "wb") as f:
        rows = ((where, convert(row, where)) for where, row in read(source))
        while block := list(islice(rows, 1000)):
            kept = [row for _, row in block if row is not None]
            skipped += len(block) - len(kept)
            texts = [render(row[0], template, tokenizer, where) if row[0] else "" for where, row in block if row is not None]
            parts = [prompt_ids(texts, template, tokenizer)]
            for k in (1, 2, 3):
                have = [i for i, row in enumerate(kept) if row[k] is not None]
                ids = dict(zip(have, answer_ids([kept[i][k] for i in have], template, tokenizer)))
                parts.append([ids.get(i, []) for i in range(len(kept))])
            for i, text in enumerate(texts):
                bounds.append(at)
                for part in parts:
                    np.asarray(part[i], dtype=np.int32).tofile(f)
                    at += len(part[i])
                    bounds.append(at)
                key = text or kept[i][1]  # plain text has no prompt: the row is its content
                hashes.append(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    np.save(folder / "rows.npy", np.frombuffer(bounds, dtype=np.int64).reshape(-1, 5))
    np.save(folder / "hash.npy", np.frombuffer(hashes, dtype=np.uint64))
    (folder / "skipped").write_text(str(skipped))


def cached(source, template, tokenizer):
    """The folder with the tokens of a source, made if it is not there: one process a machine makes it, the others wait."""
    folder = CACHE / fingerprint(source, template, tokenizer)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        while not folder.exists():  # no collective, so no time-out: if the maker fails, the launcher ends us all
            time.sleep(0.2)
    elif not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=CACHE))
        try:
            tokenize(source, template, tokenizer, new)
            os.replace(new, folder)
        except OSError:
            if not folder.exists():  # else another run was faster, with the same content
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder


# -----------------------------------------------------------------------------
# rows of one step


COLUMN = {"response": 1, "chosen": 2, "rejected": 3}  # of the five bounds of a row: where that answer begins


@dataclass
class Rows:
    """Tokenized rows that fit a step. `bounds` (rows, 5) are positions in `tokens` of their source."""
    tokens: list       # one memory map a source
    bounds: np.ndarray
    source: np.ndarray  # (rows,) which source
    weights: list      # share of each source in an epoch, or None: every row once

    def __len__(self):
        return len(self.bounds)

    def prompt(self, i):
        b = self.bounds[i]
        return self.tokens[self.source[i]][b[0] : b[1]].tolist()

    def answer(self, i, which):
        b, k = self.bounds[i], COLUMN[which]
        return self.tokens[self.source[i]][b[k] : b[k + 1]].tolist()

    def answer_lengths(self, *which):
        """Tokens of the longest of these answers, (rows,)."""
        return np.diff(self.bounds)[:, [COLUMN[w] for w in which]].max(1, initial=0)

    def lengths(self, *which):
        """Tokens of the prompt and the longest of these answers, (rows,)."""
        return np.diff(self.bounds)[:, 0] + self.answer_lengths(*which)


def load(data, step, split, held_out, template, tokenizer, max_len):
    """Rows of one step, and its held-out rows.

    step: 'sft' (prompt and response), 'reward' (prompt, chosen and rejected) or 'ppo' (prompt); data, split, template as on the
    command line. A row's step and whether it is held out depend on the hash of its prompt alone: the same on every machine and in
    every run, and all rows of a prompt stay together. Returns (train, held_out), both Rows.
    """
    need = {"sft": ("response",), "reward": ("chosen", "rejected"), "ppo": ()}[step]
    low, high = split_range(split, step)
    sources, tokens, bounds, which, held = parse_sources(data), [], [], [], []
    for k, (source, _) in enumerate(sources):
        folder = cached(source, template, tokenizer)
        b, h = np.load(folder / "rows.npy"), np.load(folder / "hash.npy")
        if not len(b):
            raise UserError(f"--data {source}: has no rows")
        t = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
        parts = np.diff(b)  # (rows, 4): tokens of prompt, response, chosen, rejected
        fits = np.ones(len(b), bool)
        notes = [f"{s} unusable" for s in [int((folder / "skipped").read_text())] if s]

        def leave_out(bad, why):
            nonlocal fits
            if n := int((fits & bad).sum()):
                notes.append(f"{n:,} {why}")
            fits &= ~bad

        if not need:
            leave_out((parts[:, 0] == 1) & np.isin(t[b[:, 0]], [x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id) if x is not None]), "without a prompt")
        for w in need:
            leave_out(parts[:, COLUMN[w]] == 0, f"without '{w}'")
        if not fits.any():
            raise UserError(f"--data {source}: no row has {' and '.join(need) or 'a prompt'}, which this step needs")
        if step == "reward":
            leave_out(np.array([np.array_equal(t[c:d], t[d:e]) for _, _, c, d, e in b]), "with equal answers")
        total = parts[:, 0] + parts[:, [COLUMN[w] for w in need]].max(1, initial=0)
        leave_out(total > max_len, f"over {max_len} tokens")
        if not fits.any():
            raise UserError(f"--data {source}: no row is left ({'; '.join(notes)})")
        u = h / 2.0**64
        mine = (u >= low) & (u < high)
        # other bits than the split's say what is held out: of every step the same share
        out = (h % np.uint64(10_000)) < held_out * 10_000
        print0(f"data: {source}: {int((fits & mine & ~out).sum()):,} rows, {int((fits & mine & out).sum()):,} held out, of {len(b):,}"
               + (f" (left out: {'; '.join(notes)})" if notes else ""))
        keep = fits & mine
        tokens.append(t), bounds.append(b[keep]), which.append(np.full(keep.sum(), k)), held.append(out[keep])
    bounds, which, held = np.concatenate(bounds), np.concatenate(which), np.concatenate(held)
    weights = None if sources[0][1] is None else [w for _, w in sources]
    test = np.random.default_rng(0).permutation(np.flatnonzero(held))  # an evaluation takes the first ones: they are a sample of all sources
    train, test = (Rows(tokens, bounds[m], which[m], weights) for m in (np.flatnonzero(~held), test))
    for rows, name in ((train, "to train on"), (test, "held out")):
        if not len(rows):
            raise UserError(f"--data {data}: no row is {name} (--split {split or 'all'}, --held-out {held_out}); "
                            f"{len(train) + len(test)} rows are too few")
    return train, test


def split_range(split, step):
    """The interval of [0, 1) that '2,4,4' gives to a step; '' gives every step everything."""
    if not split:
        return 0.0, 1.0
    try:
        parts = [float(x) for x in split.split(",")]
        assert len(parts) == 3 and min(parts) >= 0 and sum(parts) > 0
    except (ValueError, AssertionError):
        raise UserError(f"--split {split}: needs three shares, such as 2,4,4 (for steps 1, 2 and 3)") from None
    i, total = ("sft", "reward", "ppo").index(step), sum(parts)
    if parts[i] == 0:
        raise UserError(f"--split {split}: gives nothing to step {i + 1}, which is this one")
    return sum(parts[:i]) / total, sum(parts[: i + 1]) / total


# -----------------------------------------------------------------------------
# batches


def epoch_order(rows, epoch, seed):
    """The rows of one epoch, shuffled. With weights every source gets its share of the largest epoch that repeats no row;
    another epoch takes other rows of a source that is larger than its share."""
    rng = np.random.default_rng([seed, epoch])
    if rows.weights is None:
        return rng.permutation(len(rows))
    per = [np.flatnonzero(rows.source == k) for k in range(len(rows.weights))]
    scale = min(len(p) / w for p, w in zip(per, rows.weights))
    return rng.permutation(np.concatenate([rng.permutation(p)[: max(1, int(scale * w))] for p, w in zip(per, rows.weights)]))


def batches(rows, lengths, batch_size, epoch, seed, pool=4):
    """Yields index arrays (batch_size,): all that one optimizer step sees on all ranks. Rows are shuffled, sorted by length inside
    pools of `pool` batches, cut, and the batches shuffled again; a pool of one is not sorted. The last rows of an epoch that fill no batch wait for another."""
    rng = np.random.default_rng([seed, epoch, 1])
    order = epoch_order(rows, epoch, seed)
    order = order[: len(order) // batch_size * batch_size]
    size = pool * batch_size
    if pool > 1:
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in np.split(order, range(size, len(order), size))] or [order])
    cut = order.reshape(-1, batch_size)
    yield from cut[rng.permutation(len(cut))]


def steps(rows, lengths, batch_size, seed, start=0, pool=4):
    """batches of epoch after epoch, without end, from global step `start`: (epoch, indices)."""
    per_epoch = len(epoch_order(rows, 0, seed)) // batch_size
    if per_epoch == 0:
        raise UserError(f"--batch-size {batch_size}: the data has only {len(rows)} rows for this step; make the batch smaller")

    def forever(epoch, skip):
        while True:
            for indices in islice(batches(rows, lengths, batch_size, epoch, seed, pool), skip, None):
                yield epoch, indices
            epoch, skip = epoch + 1, 0
    return forever(*divmod(start, per_epoch))


def pad(sequences, device="cpu", value=0):
    """Lists of ids to one right-padded tensor, and the lengths: (B, T) long, (B,) long. What the padding is does not matter:
    lengths travel with the tokens, and no causal model looks to the right."""
    lengths = torch.tensor([len(s) for s in sequences])
    out = torch.full((len(sequences), int(lengths.max())), value)
    for row, s in zip(out, sequences):
        row[: len(s)] = torch.as_tensor(s)
    return out.to(device), lengths.to(device)


def collate(rows, indices, device):
    """Prompt and response of each row: tokens (B, T), prompt_lens (B,), answer_lens (B,)."""
    prompts, answers = [rows.prompt(i) for i in indices], [rows.answer(i, "response") for i in indices]
    tokens, lens = pad([p + a for p, a in zip(prompts, answers)], device)
    answer_lens = torch.tensor([len(a) for a in answers], device=device)
    return tokens, lens - answer_lens, answer_lens
