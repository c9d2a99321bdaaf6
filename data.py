"""Rows, from wherever they come, to batches of token ids.

    sources.py --template, tokenizer--> tokens in the cache
        --split, held out, limits on length--> Rows --shuffled, bucketed by length--> batches

Tokens are made once, by one process per machine, and kept in ~/.cache/flatrlhf (set FLATRLHF_CACHE
for another folder; it may be deleted at any time). Their name there is a hash of everything they
depend on: the rows, the template, the tokenizer, and the code that makes tokens of rows. Only a
data set on the hub is known by its name alone.

A row is a prompt and answers to it: one to imitate, others to compare. Its tokens are `prompt ids +
answer ids + EOS`: the two parts are tokenized separately, exactly as they meet again when the
policy answers a prompt, and EOS is an id, not text. The fields of a row that are not text for the
model (`answer`, `solution`, `nums`, ...) are kept along with the tokens, for reward functions.

Dimension key: B batch, T = prompt + answer, K answers to compare.
"""
import ast
import functools
import hashlib
import inspect
import json
import os
import shutil
import time
import uuid
from array import array
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import sources
import tasks
from sources import convert, hub_folder, parse_columns, parse_sources, read, rename_columns
from utils import Inputs, UserError, print0

CACHE = Path(os.environ.get("FLATRLHF_CACHE", Path.home() / ".cache" / "flatrlhf"))
VERSION = 4  # of the layout of the cached files

# -----------------------------------------------------------------------------
# template and tokens


def render(messages, template, tokenizer):
    """The text that the policy continues.

    template: text with {prompt} in it, used for each message of the user; chat: the tokenizer's.
    """
    if template == "chat":
        return render_chat(messages, tokenizer)
    blocks = []
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "user":
            blocks.append(template.replace("{prompt}", content))
        elif message["role"] == "assistant" and blocks:
            blocks[-1] += separator(template) + content
        else:
            blocks.append(content)  # a system message comes before the first turn
    return "\n".join(blocks)


def render_chat(messages, tokenizer):
    check_chat_template("chat", tokenizer)
    from jinja2 import TemplateError
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as e:
        raise UserError(f"the tokenizer's chat template refuses this conversation: {e}") from None


def check_chat_template(template, tokenizer):
    if template == "chat" and not tokenizer.chat_template:
        message = ("--template chat: this tokenizer has no chat template; leave the flag out, or "
                   "give a template with {prompt}")
        raise UserError(message)


def separator(template):
    """What is between a prompt and its answer."""
    if template == "chat" or template[-1:].isspace():
        return ""
    return " "


DEFAULT_TEMPLATE = "Human: {prompt}\nAssistant:"


def template_of_run(folder):
    """The template that a run was trained with, or None where its folder does not say."""
    run = Path(folder)
    if run.name == "ema":  # the average of a run, in its folder
        run = run.parent
    path = run / "run.json"
    if not folder or not path.is_file():
        return None
    try:
        template = json.loads(path.read_text())["config"].get("template")
    except (ValueError, KeyError, TypeError, AttributeError):
        message = (f"{path} is damaged, so nobody knows how this model was trained; repair it, or "
                   "remove it and give --template")
        raise UserError(message) from None
    return template and template.replace("\\n", "\n")


def check_template(template, *folders):
    """The template to use: --template; if that is empty, the one that these folders were trained
    with, the first that says so; else DEFAULT_TEMPLATE. Warns of a folder with another one."""
    trained = {}
    for folder in folders:
        known = template_of_run(folder)
        if known:
            trained[folder] = known
    if not template:
        template = next(iter(trained.values()), DEFAULT_TEMPLATE)
    if template != "chat" and "{prompt}" not in template:
        message = (f"--template {template!r} has no {{prompt}} in it, so every prompt would be "
                   "the same")
        raise UserError(message)
    template = template.replace("\\n", "\n")  # a shell passes the two characters \n
    for folder, known in trained.items():
        if known != template:
            print0(f"warning: {folder} was trained with --template {known!r}, and here it is "
                   f"{template!r}")
    return template


def prompt_ids(texts, template, tokenizer):
    """Token ids of rendered prompts, with the special tokens that the tokenizer puts in front."""
    if not texts:
        return []
    eos = tokenizer.eos_token_id
    start = tokenizer.bos_token_id
    if start is None:
        start = eos
    out = []
    for ids in tokenizer(texts, add_special_tokens=template != "chat")["input_ids"]:
        if len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]  # some tokenizers append EOS, which ends no prompt
        out.append(ids or [start])  # without a token there would be nothing to continue
    return out


def answer_ids(texts, template, tokenizer):
    """Token ids of answers, each with EOS at its end."""
    if not texts:
        return []
    eos = tokenizer.eos_token_id
    written = []
    for text in texts:
        text = text.strip()
        if text:
            text = separator(template) + text
        written.append(text)
    out = []
    for ids in tokenizer(written, add_special_tokens=False)["input_ids"]:
        if ids[-1:] != [eos]:  # some texts end in the tokenizer's own word for EOS
            ids = ids + [eos]
        out.append(ids)
    return out


# -----------------------------------------------------------------------------
# the cache: tokens of a source, made once


@dataclass
class Summary:
    """What is known of a source besides its tokens (info.json)."""
    unusable: int = 0            # rows that cannot be used
    first_unusable: str = ""     # where the first of them is, and why
    columns: list = field(default_factory=list)  # names of all fields in the source
    formats: list = field(default_factory=list)  # how its rows were read, such as "messages"
    fields: list = field(default_factory=list)   # names of the fields for reward functions
    rows_hash: str = ""          # of all its rows, as they were read


def add_new(known, names):
    """Adds those names to the list that it does not have."""
    known += [name for name in names if name not in known]


def plain(value):
    """What JSON keeps of a value that it has no type for."""
    if hasattr(value, "tolist"):  # NumPy
        return value.tolist()
    return str(value)


def row_bytes(row):
    """What hashes of rows are made of."""
    return json.dumps(row, default=plain, skipkeys=True).encode()


def usable_rows(source, columns, template, tokenizer, summary):
    """Yields (Example, rendered prompt, fields as JSON) of each row that can be used.

    Fills the summary. A row that cannot be used is counted, and the first one is described.
    """
    names = parse_columns(columns)
    rows_hash = hashlib.sha256()
    for where, row in read(source):
        rows_hash.update(row_bytes(row))
        try:
            if isinstance(row, dict):
                add_new(summary.columns, row)
            example, form, fields = convert(rename_columns(row, names))
            prompt = ""
            if example.messages:
                prompt = render(example.messages, template, tokenizer)
            fields_json = json.dumps(fields, default=plain) if fields else ""
        except (ValueError, TypeError) as e:
            summary.unusable += 1
            if summary.unusable == 1:
                summary.first_unusable = f"{where}: {e}"
            continue
        add_new(summary.formats, [form])
        add_new(summary.fields, fields)
        yield example, prompt, fields_json
    summary.rows_hash = rows_hash.hexdigest()[:16]


def blocks(items, size):
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    while block := list(islice(items, size)):
        yield block


def answers_of(texts, template, tokenizer):
    """Token ids of answers; an empty list where there is None."""
    encoded = iter(answer_ids([t for t in texts if t is not None], template, tokenizer))
    return [[] if text is None else next(encoded) for text in texts]


def hash_of_prompt(text):
    """64 bits that decide on the step that a row belongs to, and whether it is held out."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def stack(parts, fill):
    """Arrays (n, k) to one (sum of n, largest k). fill: what np.pad fills narrow ones with, such as
    "constant" for 0, "edge" for a row's last value."""
    width = max(part.shape[1] for part in parts)
    padded = [np.pad(part, ((0, 0), (0, width - part.shape[1])), fill) for part in parts]
    return np.concatenate(padded)


def tokenize(source, columns, template, tokenizer, folder):
    """Writes the tokens of a source into a folder. Holds a thousand rows at a time.

    tokens.bin    int32, flat: of each row prompt, response, and the answers to compare, best first
                  (of a pair: chosen, rejected)
    rows.npy      (rows, 3 + K) int64: where in it the prompt begins, and where each of these ends;
                  the span of an answer that a row does not have is empty
    ranks.npy     (rows, K) int32: 1 for the best answer; equal for a tie; 0 past a row's answers
    hash.npy      (rows,) uint64: hash of the prompt
    fields.jsonl  the fields of each row for reward functions; none, if no row has any
    fields.npy    (rows + 1,) int64: where in it the fields of each row begin
    info.json     the Summary
    """
    summary = Summary()
    bounds = []  # of each block
    ranks = []
    hashes = array("Q")
    field_bounds = array("q", [0])
    position = 0
    rows = usable_rows(source, columns, template, tokenizer, summary)
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "fields.jsonl", "wb") as fields:
        for block in blocks(rows, 1000):
            examples, prompts, lines = zip(*block)
            texts = [[example.response for example in examples]]
            texts += zip_longest(*(example.answers for example in examples))
            parts = [prompt_ids(list(prompts), template, tokenizer)]
            parts += [answers_of(column, template, tokenizer) for column in texts]
            block_bounds = np.empty((len(block), 1 + len(parts)), dtype=np.int64)
            for i, example in enumerate(examples):
                block_bounds[i, 0] = position
                for k, part in enumerate(parts, 1):
                    np.asarray(part[i], dtype=np.int32).tofile(tokens)
                    position += len(part[i])
                    block_bounds[i, k] = position
                # plain text has no prompt: the row is its content
                hashes.append(hash_of_prompt(prompts[i] or example.response or ""))
                written = fields.write(lines[i].encode())
                field_bounds.append(field_bounds[-1] + written)
            bounds.append(block_bounds)
            columns_of_ranks = zip_longest(*(example.ranks for example in examples), fillvalue=0)
            ranks.append(np.array(list(columns_of_ranks), dtype=np.int32).T)
    if not hashes:
        raise UserError(no_rows(source, summary))
    np.save(folder / "rows.npy", stack(bounds, "edge"))
    np.save(folder / "ranks.npy", stack(ranks, "constant"))
    np.save(folder / "hash.npy", np.frombuffer(hashes, dtype=np.uint64))
    if summary.fields:
        np.save(folder / "fields.npy", np.frombuffer(field_bounds, dtype=np.int64))
    else:
        (folder / "fields.jsonl").unlink()
    (folder / "info.json").write_text(json.dumps(asdict(summary)))


def no_rows(source, summary):
    if not summary.unusable:
        return f"{source}: has no rows"
    message = (f"{source}: none of its {summary.unusable:,} rows can be used. The first is "
               f"{summary.first_unusable}")
    if "unknown fields" not in message:
        message += f" (the rows have {', '.join(map(str, summary.columns))})"
    return message


def content_hash(source):
    """A hash of the rows of a source; of a folder, of the names and times of its files."""
    h = hashlib.sha256()
    path = Path(source)
    if tasks.is_function(source):
        for _, row in read(source):
            h.update(row_bytes(row))
    elif path.is_file():
        try:
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    h.update(block)
        except OSError as e:
            raise UserError(f"{source}: cannot be read ({e.strerror or e})") from None
    else:
        files = hub_folder(source).rglob("*")  # none, of a name on the hub
        times = sorted((str(file), file.stat().st_mtime_ns) for file in files)
        h.update(repr(times).encode())
    return h.hexdigest()


@functools.cache
def token_code():
    """The code that decides on tokens, without comments: sources.py, and this file above Rows."""
    first_line = inspect.getsourcelines(Rows)[1]
    lines = Path(__file__).read_text().splitlines()[: first_line - 1]
    code = [Path(sources.__file__).read_text(), "\n".join(lines)]
    return [ast.dump(ast.parse(text)) for text in code]


def fingerprint(source, content, columns, template, tokenizer):
    """A hash of all that the tokens depend on."""
    chat_template = None
    if template == "chat":
        chat_template = tokenizer.chat_template
    parts = [VERSION, token_code(), source, content, columns, template, chat_template,
             tokenizer.bos_token_id, tokenizer.eos_token_id]
    if tokenizer.is_fast:
        parts.append(tokenizer.backend_tokenizer.to_str())
    else:
        parts.append(tokenizer.get_vocab())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def check_equal_on_all_ranks(source, content):
    """Ranks take their rows from one common order, so all of them must read the same rows."""
    if not dist.is_initialized():
        return
    contents = [None] * dist.get_world_size()
    dist.all_gather_object(contents, content)
    if len(set(contents)) > 1:
        message = (f"{source}: not every rank reads the same rows; a function must seed its random "
                   "numbers, and a file must be the same on every machine")
        raise UserError(message)


def cached(source, columns, template, tokenizer):
    """The folder with the tokens of a source. One process per machine makes it, the others wait."""
    content = content_hash(source)
    if tasks.is_function(source) or Path(source).is_file():
        check_equal_on_all_ranks(source, content)
    folder = CACHE / fingerprint(source, content, columns, template, tokenizer)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # Not a collective, which would time out after half an hour. If the maker fails, the
        # launcher ends this process too.
        while not folder.exists():
            time.sleep(0.2)
    elif not folder.exists():
        make_folder(folder, source, content, columns, template, tokenizer)
    return folder


def make_folder(folder, source, content, columns, template, tokenizer):
    """Tokenizes into a new folder and renames it, so that a folder is there whole or not at all."""
    new = CACHE / f"{folder.name}.{uuid.uuid4().hex}.new"
    try:
        new.mkdir(parents=True)
        tokenize(source, columns, template, tokenizer, new)
        if content_hash(source) != content:
            message = (f"{source}: its rows changed while they were read; a function must yield "
                       "the same rows at every call (seed its random numbers)")
            raise UserError(message)
        os.replace(new, folder)
    except OSError as e:
        if not folder.exists():  # else another run was faster, with the same content
            message = (f"the token cache {CACHE} cannot be written ({e.strerror or e}); set "
                       "the environment variable FLATRLHF_CACHE to another folder")
            raise UserError(message) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


# -----------------------------------------------------------------------------
# rows of one step


COLUMN = {"response": 1, "chosen": 2, "rejected": 3}  # where that answer begins, of the bounds


class FieldFile:
    """The fields of a source's rows, read when they are needed."""

    def __init__(self, folder, names):
        self.names = names
        if names:
            self.text = np.memmap(folder / "fields.jsonl", dtype=np.uint8, mode="r")
            self.bounds = np.load(folder / "fields.npy", mmap_mode="r")

    def __getitem__(self, i):
        """{name: value} of row i of the source."""
        if not self.names:
            return {}
        text = self.text[self.bounds[i] : self.bounds[i + 1]].tobytes()
        return json.loads(text or "{}")


def spans(bounds):
    """(start, end) of each answer that a row has for step 2. bounds: of one row."""
    return [(start, end) for start, end in pairwise(bounds[2:]) if end > start]


@dataclass
class Rows:
    """Tokenized rows that fit a step."""
    tokens: list         # one memory map per source
    bounds: np.ndarray   # (rows, 3 + K) positions in it: the start, and the ends of its parts
    ranks: np.ndarray    # (rows, K) of the answers to compare, best first; 0: there is none
    source: np.ndarray   # (rows,) which source
    number: np.ndarray   # (rows,) which row of that source
    field_files: list    # one FieldFile per source
    weights: list        # share of each source in an epoch, or None: every row once

    def __len__(self):
        return len(self.bounds)

    def prompt(self, i):
        start, end = self.bounds[i, :2]
        return self.tokens[self.source[i]][start:end].tolist()

    def answer(self, i, which):
        k = COLUMN[which]
        start, end = self.bounds[i, k : k + 2]
        return self.tokens[self.source[i]][start:end].tolist()

    def answers(self, i):
        """The answers that step 2 compares, best first."""
        tokens = self.tokens[self.source[i]]
        return [tokens[start:end].tolist() for start, end in spans(self.bounds[i])]

    def answer_lengths(self, *which):
        """Tokens of the longest of these answers, (rows,)."""
        columns = [COLUMN[name] for name in which]
        return np.diff(self.bounds)[:, columns].max(1, initial=0)

    def lengths(self, *which):
        """Tokens of the prompt and the longest of these answers, (rows,)."""
        return np.diff(self.bounds)[:, 0] + self.answer_lengths(*which)

    def lengths_to_compare(self):
        """Tokens of the prompt and each answer that step 2 compares, (rows, K); 0: no answer."""
        lengths = np.diff(self.bounds)
        return (lengths[:, :1] + lengths[:, 2:]) * (lengths[:, 2:] > 0)

    def field_names(self):
        """Names of all fields that rows of these sources have."""
        names = []
        for file in self.field_files:
            names += [name for name in file.names if name not in names]
        return names

    def fields(self, indices):
        """{name: [a value for each of these rows]} of the fields that are not text for the model.

        A row that does not have a field has None. Reward functions take them as arguments.
        """
        records = [self.field_files[self.source[i]][self.number[i]] for i in indices]
        return {name: [record.get(name) for record in records] for name in self.field_names()}


def load(data, step, split, held_out, template, tokenizer, max_len, columns="", flag="--data"):
    """Rows of one step, and its held-out rows: (train, held_out), both Rows.

    data, split, template, columns: as on the command line.
    step: 'sft' (prompt and response), 'reward' (prompt, and chosen and rejected answer or ranked
    ones) or 'ppo' (prompt).
    held_out: share of the rows. flag: the one that named the data, for messages.

    A row's step and whether it is held out depend on the hash of its prompt alone: they are the
    same on every machine and in every run, and all rows of a prompt stay together.
    """
    if not 0 < held_out < 1:
        raise UserError(f"--held-out {held_out}: a share of the rows is above 0 and below 1")
    check_chat_template(template, tokenizer)
    low, high = split_range(split, step)
    sources = parse_sources(data, flag)
    parts = []
    for source, _ in sources:
        folder = cached(source, columns, template, tokenizer)
        part = SourceRows(source, folder)
        part.leave_out_unfit(step, tokenizer, max_len)
        part.divide(low, high, held_out)
        parts.append(part)
        Inputs.data[source] = part.summary.rows_hash
    check_columns(columns, parts)

    weights = None
    if sources[0][1] is not None:
        weights = [weight for _, weight in sources]
    train, test = join_sources(parts, weights)
    for rows, name in ((train, "to train on"), (test, "held out")):
        if not len(rows):
            hashes = np.concatenate([part.hashes[part.selected] for part in parts])
            prompts = len(np.unique(hashes))
            message = (f"{flag} {data}: no row is {name} (--split {split or 'all'}, --held-out "
                       f"{held_out}); {len(hashes):,} rows with {prompts:,} different prompts are "
                       "too few")
            raise UserError(message)
    return train, test


def join_sources(parts, weights):
    """(train, held_out), both Rows, of the SourceRows of all sources."""
    numbers = [np.flatnonzero(part.selected) for part in parts]  # of each source
    number = np.concatenate(numbers)
    source = np.repeat(np.arange(len(parts)), [len(n) for n in numbers])
    bounds = stack([part.bounds[part.selected] for part in parts], "edge")
    ranks = stack([part.ranks[part.selected] for part in parts], "constant")
    is_held_out = np.concatenate([part.held_out[part.selected] for part in parts])
    tokens = [part.tokens for part in parts]
    field_files = [part.field_file for part in parts]

    def take(i):
        return Rows(tokens, bounds[i], ranks[i], source[i], number[i], field_files, weights)

    train = np.flatnonzero(~is_held_out)
    # an evaluation takes the first ones, so they must be a sample of all sources
    test = np.random.default_rng(0).permutation(np.flatnonzero(is_held_out))
    return take(train), take(test)


class SourceRows:
    """The rows of one source, and which of them a step takes. Arrays are (rows,) unless said."""

    def __init__(self, name, folder):
        self.name = name
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
        self.bounds = np.load(folder / "rows.npy")  # (rows, 3 + K)
        self.ranks = np.load(folder / "ranks.npy")  # (rows, K)
        self.hashes = np.load(folder / "hash.npy")
        self.summary = Summary(**json.loads((folder / "info.json").read_text()))
        self.field_file = FieldFile(folder, self.summary.fields)
        self.fits = np.ones(len(self.bounds), bool)
        self.left_out = []  # "7 over 512 tokens"
        if self.summary.unusable:
            self.left_out.append(f"{self.summary.unusable:,} unusable")

    def leave_out(self, bad, reason):
        """Takes rows out of `fits` and counts those that were in it."""
        count = int((self.fits & bad).sum())
        if count:
            self.left_out.append(f"{count:,} {reason}")
        self.fits &= ~bad

    def leave_out_unfit(self, step, tokenizer, max_len):
        """Leaves out rows that lack what the step needs, teach nothing or are too long."""
        needed = {"sft": ["response"], "reward": ["chosen", "rejected"], "ppo": []}[step]
        lengths = np.diff(self.bounds)  # (rows, 2 + K): of prompt, response, answers to compare
        for name in needed:
            self.leave_out(lengths[:, COLUMN[name]] == 0, f"without '{name}'")
        if not needed:
            # plain text has a prompt of one token, put there by prompt_ids
            special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
            special = [token for token in special if token is not None]
            first_tokens = self.tokens[self.bounds[:, 0]]
            no_prompt = (lengths[:, 0] == 1) & np.isin(first_tokens, special)
            self.leave_out(no_prompt, "without a prompt")
        if not self.fits.any():
            raise UserError(self.nothing_for_step(needed))

        if step == "reward":
            equal = []
            for bounds in self.bounds:
                answers = {self.tokens[start:end].tobytes() for start, end in spans(bounds)}
                equal.append(len(answers) == 1)
            self.leave_out(np.array(equal), "with equal answers")
        answers = {"sft": slice(1, 2), "reward": slice(2, None), "ppo": slice(0)}[step]
        total = lengths[:, 0] + lengths[:, answers].max(1, initial=0)
        self.leave_out(total > max_len, f"over {max_len} tokens")
        if not self.fits.any():
            raise UserError(f"{self.name}: no row is left ({'; '.join(self.left_out)})")

    def nothing_for_step(self, needed):
        names = "a prompt"
        column = "prompt"
        if needed:
            names = " and ".join(needed)
            column = needed[0]
        columns = ", ".join(map(str, self.summary.columns))
        formats = ", ".join(self.summary.formats)
        return (f"{self.name}: no row has {names}, which this step needs. The rows have {columns}, "
                f"and are read as {formats} (--columns {column}=NAME gives a field another name)")

    def divide(self, low, high, held_out):
        """Sets `selected`, the rows of this step, and `held_out`; prints their numbers."""
        u = self.hashes / 2.0**64
        self.selected = self.fits & (u >= low) & (u < high)
        # other digits than those of the split, so that every step holds the same share out
        self.held_out = (self.hashes % np.uint64(10_000)) < held_out * 10_000
        train_count = int((self.selected & ~self.held_out).sum())
        test_count = int((self.selected & self.held_out).sum())
        count = len(self.bounds) + self.summary.unusable
        line = f"data: {self.name}: {train_count:,} rows, {test_count:,} held out, of {count:,}"
        if self.left_out:
            line += f" (left out: {'; '.join(self.left_out)})"
        print0(line)
        if self.summary.unusable:
            print0(f"    the first unusable row: {self.summary.first_unusable}")


def check_columns(columns, parts):
    """Raises a UserError where --columns names a field that no source has."""
    known = []
    for part in parts:
        add_new(known, part.summary.columns)
    for old in parse_columns(columns).values():
        if old not in known:
            names = ", ".join(map(str, known))
            raise UserError(f"--columns {columns}: no row has {old}; the rows have {names}")


def split_range(split, step):
    """The interval of [0, 1) that '2,4,4' gives to a step; '' gives everything to every step."""
    if not split:
        return 0.0, 1.0
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not min(shares) >= 0 or not 0 < sum(shares) < float("inf"):
        message = f"--split {split}: needs three shares, such as 2,4,4 (for steps 1, 2 and 3)"
        raise UserError(message)
    i = ("sft", "reward", "ppo").index(step)
    if shares[i] == 0:
        raise UserError(f"--split {split}: gives nothing to step {i + 1}, which is this one")
    total = sum(shares)
    return sum(shares[:i]) / total, sum(shares[: i + 1]) / total


# -----------------------------------------------------------------------------
# batches


def epoch_order(rows, epoch, seed):
    """The rows of one epoch, shuffled.

    With weights every source gets its share of the largest epoch that repeats no row. Another
    epoch takes other rows of a source that is larger than its share.
    """
    rng = np.random.default_rng([seed, epoch])
    if rows.weights is None:
        return rng.permutation(len(rows))
    by_source = [np.flatnonzero(rows.source == k) for k in range(len(rows.weights))]
    scale = min(len(indices) / weight for indices, weight in zip(by_source, rows.weights))
    taken = []
    for indices, weight in zip(by_source, rows.weights):
        count = max(1, int(scale * weight))
        taken.append(rng.permutation(indices)[:count])
    return rng.permutation(np.concatenate(taken))


def batches(rows, lengths, batch_size, epoch, seed, pool=4):
    """Yields index arrays (batch_size,): the rows of one optimizer step, on all ranks together.

    Rows are shuffled, sorted by length inside pools of `pool` batches, cut into batches, and these
    shuffled again. A pool of one batch is not sorted. The last rows of an epoch, which fill no
    batch, wait for another epoch.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    order = epoch_order(rows, epoch, seed)
    order = order[: len(order) // batch_size * batch_size]
    if pool > 1:
        pools = np.split(order, range(pool * batch_size, len(order), pool * batch_size))
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    cut = order.reshape(-1, batch_size)
    yield from cut[rng.permutation(len(cut))]


def steps(rows, lengths, batch_size, seed, start=0, pool=4):
    """Yields (epoch, indices) without end: the batches of epoch after epoch, from step `start`."""
    per_epoch = len(epoch_order(rows, 0, seed)) // batch_size
    if per_epoch == 0:
        message = (f"--batch-size {batch_size}: the data has only {len(rows)} rows for this step; "
                   "make the batch smaller")
        raise UserError(message)

    def forever():
        epoch, skip = divmod(start, per_epoch)
        while True:
            epoch_batches = batches(rows, lengths, batch_size, epoch, seed, pool)
            for indices in islice(epoch_batches, skip, None):
                yield epoch, indices
            epoch += 1
            skip = 0
    return forever()


def pad(sequences, device="cpu", value=0):
    """Lists of ids to one right-padded tensor and the lengths: (B, T) long, (B,) long.

    It does not matter what the padding is: lengths travel with the tokens, and no causal model
    looks to the right.
    """
    lengths = torch.tensor([len(ids) for ids in sequences])
    out = torch.full((len(sequences), int(lengths.max())), value)  # (B, T)
    for row, ids in zip(out, sequences):
        row[: len(ids)] = torch.as_tensor(ids)
    return out.to(device), lengths.to(device)


def collate(rows, indices, device):
    """Prompt and response of each row: tokens (B, T), prompt_lens (B,), answer_lens (B,)."""
    prompts = [rows.prompt(i) for i in indices]
    answers = [rows.answer(i, "response") for i in indices]
    tokens, lengths = pad([p + a for p, a in zip(prompts, answers)], device)
    answer_lens = torch.tensor([len(ids) for ids in answers], device=device)
    return tokens, lengths - answer_lens, answer_lens
