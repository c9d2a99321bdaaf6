"""Rows, from wherever they come, to batches of token ids.

    source --read--> {"prompt": ..., "chosen": ...} --FORMATS--> Example
           --template, tokenizer--> tokens in the cache
           --split, held out, limits on length--> Rows --shuffled, bucketed by length--> batches

A source is a file (.jsonl .json .csv .tsv .txt, also with .gz, or .parquet), a task of tasks.py
(`toy`), a generator of rows in a file of yours (`file.py:function`), or a folder or a name on the
Hugging Face hub, perhaps with configuration and split (`openai/gsm8k:main:train`).

Tokens are made once, by one process per machine, and kept in ~/.cache/flatrlhf (set FLATRLHF_CACHE
for another folder; it may be deleted at any time). Their name there is a hash of everything they
depend on: the rows, the template, the tokenizer and the code above class Rows. Only a data set on
the hub is known by its name alone.

A row is a prompt and up to two answers to it. Its tokens are `prompt ids + answer ids + EOS`: the
two parts are tokenized separately, exactly as they meet again when the policy answers a prompt, and
EOS is an id, not text. The fields of a row that are not text for the model (`answer`, `solution`,
`nums`, ...) are kept beside the tokens, for reward functions.

Dimension key: B batch, T = prompt + answer.
"""
import ast
import csv
import gzip
import hashlib
import inspect
import json
import os
import re
import shutil
import time
import uuid
import zlib
from array import array
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import tasks
from tasks import shorten
from utils import UserError, print0

CACHE = Path(os.environ.get("FLATRLHF_CACHE", Path.home() / ".cache" / "flatrlhf"))
VERSION = 2  # of the layout of the cached files

# -----------------------------------------------------------------------------
# formats: which fields a row has says what it is


class Example(NamedTuple):
    """A row as text, whatever its format was."""
    messages: list                # the prompt, up to the user's last message; empty for plain text
    response: str | None = None   # the answer that step 1 imitates
    chosen: str | None = None     # the better answer of a pair
    rejected: str | None = None   # the worse answer of a pair


def user(text):
    return [{"role": "user", "content": text}]


def check_text(name, value):
    """Returns the value if it is text that can be encoded; else a ValueError names the field."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shorten(value, 60)}, which is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        message = f"{name} holds one half of a surrogate pair, which is not a character"
        raise ValueError(message) from None
    return value


def dialogue(text):
    """'\\n\\nHuman: ... \\n\\nAssistant: ...' to messages (the layout of hh-rlhf)."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(parts) < 3:
        message = ("it is not a dialogue (no line begins with 'Human:' or 'Assistant:'); "
                   "plain answers need a prompt beside them")
        raise ValueError(message)
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = []
    for speaker, content in zip(parts[1::2], parts[2::2]):
        messages.append({"role": roles[speaker], "content": content.strip()})
    return messages


PAIR = ("chosen", "rejected")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def check_messages(name, value):
    """A list of messages with role and content. ShareGPT's `from` and `value` are renamed."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name} is {shorten(value, 60)}, which is not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise ValueError(f"{name} holds {shorten(message, 60)}, which is not a message")
        if "from" in message and "value" in message:
            role = SHAREGPT_ROLES.get(message["from"], message["from"])
            message = {"role": role, "content": message["value"]}
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"there is no {key!r} in a message of {name}")
            check_text(f"the {key} of a message of {name}", message[key])
        messages.append(message)
    return messages


def split_answer(name, value):
    """(messages before the answer, its text). The first is None where an answer is plain text."""
    if not isinstance(value, (list, tuple, dict)):
        return None, check_text(name, value)
    messages = check_messages(name, value)
    last = messages[-1]
    if last["role"] != "assistant":
        raise ValueError(f"{name} does not end with a message of the assistant")
    return messages[:-1], last["content"]


def join_messages(prompt, more):
    """The prompt and what follows it. `more` may repeat the prompt: then it is all there is."""
    if not prompt:
        return more
    last = prompt[-1]
    for message in more:
        same_role = message["role"] == last["role"]
        if same_role and message["content"].strip() == last["content"].strip():
            return more
    return prompt + more


def make_example(messages, response, pair):
    """An Example of a prompt, a response and the `chosen` and `rejected` of a dict.

    Each answer is text, or a list of messages that ends with it, or None.
    """
    texts = {}
    before = []  # what is before the answer, of each list of messages
    answers = {"response": response, "chosen": pair.get("chosen"), "rejected": pair.get("rejected")}
    for name, value in answers.items():
        if value is not None:
            earlier, texts[name] = split_answer(name, value)
            if earlier is not None:
                before.append(earlier)
    for earlier in before:
        if earlier != before[0]:
            raise ValueError("these are two conversations, not two answers to one prompt")
    if before:
        messages = join_messages(messages, before[0])
    if not messages and "response" not in texts:
        raise ValueError("it has neither a prompt nor a text")
    return Example(messages, **texts)


def first_field(row, *names):
    """The value of the first of these fields that the row has, or None."""
    for name in names:
        if name in row:
            return row[name]
    return None


def system_message(row):
    if row.get("system"):
        return [{"role": "system", "content": check_text("system", row["system"])}]
    return []


def from_messages(row):
    messages = check_messages("messages", row["messages"])
    response = row.get("chosen")
    if messages[-1]["role"] == "assistant":
        response = messages[-1]["content"]
        messages = messages[:-1]
    return make_example(messages, response, row)


def from_conversations(row):
    """ShareGPT: [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]."""
    messages = check_messages("conversations", row["conversations"])
    return from_messages({**row, "messages": system_message(row) + messages})


def from_prompt(row):
    prompt = row["prompt"]
    if isinstance(prompt, (list, tuple, dict)):
        messages = check_messages("prompt", prompt)
    elif check_text("prompt", prompt).lstrip().startswith("Human:"):
        messages = dialogue(prompt)
        if messages[-1] == {"role": "assistant", "content": ""}:
            messages = messages[:-1]  # "... Assistant:" is the template's part
    else:
        messages = user(prompt)
    response = first_field(row, "response", "completion", "chosen")
    return make_example(messages, response, row)


def from_instruction(row):
    """Alpaca (instruction, input, output) and Dolly (instruction, context, response)."""
    prompt = check_text("instruction", row["instruction"])
    context = first_field(row, "input", "context")
    if context:
        prompt += "\n" + check_text("input", context)
    response = first_field(row, "output", "response", "chosen")
    return make_example(user(prompt), response, row)


def from_question(row):
    messages = user(check_text("question", row["question"]))
    return make_example(messages, first_field(row, "answer", "response"), {})


def from_question_pair(row):
    messages = system_message(row) + user(check_text("question", row["question"]))
    return make_example(messages, row["chosen"], row)


def from_pair(row):
    """Two whole conversations that differ in the last answer: text as in hh-rlhf, or messages."""
    pair = {}
    for name in PAIR:
        pair[name] = row[name]
        if isinstance(row[name], str):
            pair[name] = dialogue(check_text(name, row[name]))
    return make_example([], pair["chosen"], pair)


def from_text(row):
    return make_example([], row["text"], {})


class Format(NamedTuple):
    needs: tuple       # the fields that a row of this format has
    convert: Callable  # row -> Example, or a ValueError that says what is wrong with the row
    reads: tuple       # fields that are text for the model; the others are for reward functions


FORMATS = [  # the first that fits is taken
    Format(("messages",), from_messages, ("messages", "prompt", *PAIR)),
    Format(("prompt",), from_prompt, ("prompt", "response", "completion", *PAIR)),
    Format(("instruction",), from_instruction,
           ("instruction", "input", "context", "output", "response", *PAIR)),
    Format(("conversations",), from_conversations, ("conversations", "system", *PAIR)),
    Format(("question", *PAIR), from_question_pair, ("question", "system", *PAIR)),
    Format(PAIR, from_pair, PAIR),
    # `answer` is a field as well: a checker of GSM8K compares with it
    Format(("question", "answer"), from_question, ("question",)),
    Format(("question", "response"), from_question, ("question", "response")),
    Format(("text",), from_text, ("text",)),
]


def find_format(row):
    """The Format of a row, or a ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with fields, not {shorten(row, 60)}")
    for form in FORMATS:
        if all(name in row for name in form.needs):
            return form
    known = "; ".join("/".join(form.needs) for form in FORMATS)
    names = sorted(map(str, row))
    message = (f"unknown fields {names}; a row needs one of: {known} "
               "(--columns prompt=NAME gives a field another name)")
    raise ValueError(message)


def convert(row):
    """(Example, name of its format, fields that are not text for the model) of a row.

    Raises a ValueError where the row cannot be used.
    """
    form = find_format(row)
    name = "/".join(form.needs)
    try:
        example = form.convert(row)
    except KeyError as e:
        raise ValueError(f"cannot be read as {name}: there is no {e}") from None
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"cannot be read as {name}: {e}") from None
    fields = {key: value for key, value in row.items() if key not in form.reads}
    return example, name, fields


# -----------------------------------------------------------------------------
# --columns


def parse_columns(columns):
    """'prompt=question,chosen=answer_1' to {"prompt": "question", "chosen": "answer_1"}."""
    names = {}
    for item in filter(None, columns.split(",")):
        new, _, old = item.partition("=")
        new = new.strip()
        old = old.strip()
        if not new or not old or new in names:
            message = (f"--columns {columns}: write NEW=OLD, joined by commas and each NEW once, "
                       "such as prompt=question,chosen=answer_1")
            raise UserError(message)
        names[new] = old
    return names


def rename_columns(row, names):
    """The row with its field names[new] called `new`."""
    if not names or not isinstance(row, dict):
        return row
    old_names = names.values()
    renamed = {name: value for name, value in row.items() if name not in old_names}
    for new, old in names.items():
        if old in row:
            renamed[new] = row[old]
    return renamed


# -----------------------------------------------------------------------------
# reading: every reader yields (where, row), the row as it is in the source, and words that lead a
# person to it


def read_task_or_function(source):
    """Rows of a task, or of 'file.py:function', a function without arguments that yields rows."""
    path = Path(tasks.__file__)
    if source in tasks.TASKS:
        function = tasks.TASKS[source].rows
    else:
        function, path = tasks.import_function(source, source)
    try:
        with tasks.folder_on_path(path.parent):
            rows = iter(function())
        for i, row in enumerate(rows, 1):
            yield f"{source}, row {i}", row
    except Exception as e:
        message = (f"{source}: raised {tasks.describe(e)}; it is called without arguments, and "
                   "must yield rows")
        raise UserError(message + tasks.user_lines(e, path)) from e


def hub_folder(source):
    """The folder that a source NAME:CONFIG:SPLIT may name, in place of a name on the hub."""
    return Path(source.split(":")[0])


def read_hub(source):
    """Rows of a folder in the hub's layout, or of a name on the hub: NAME, NAME:CONFIG:SPLIT."""
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise UserError(f"{source}: write NAME:CONFIGURATION:SPLIT for a data set on the hub")
    config, split = (rest + ["", ""])[:2]
    try:
        from datasets import load_dataset
    except ImportError:
        known = ", ".join(tasks.TASKS)
        what = f"neither a file nor a task ({known})"
        if hub_folder(source).is_dir():
            what = "a folder"
        message = (f"{source}: is {what}; to read a folder or a name on the Hugging Face hub "
                   "first `pip install datasets`")
        raise UserError(message) from None
    try:
        rows = load_dataset(name, config or None, split=split or "train")
        for i, row in enumerate(rows, 1):
            yield f"{source}, row {i}", row
    except Exception as e:  # the library raises many kinds, and each means that nothing can be read
        reason = shorten(" ".join(str(e).split()))
        message = (f"{source}: neither a file here nor a data set that loads ({reason}); "
                   "NAME:CONFIGURATION:SPLIT names a configuration and a split other than train")
        raise UserError(message) from None


def read_parquet(source):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{source}: to read parquet first `pip install pyarrow`") from None
    try:
        i = 0
        for part in parquet.ParquetFile(source).iter_batches():
            for row in part.to_pylist():
                i += 1
                yield f"{source}, row {i}", row
    except (OSError, ValueError) as e:
        raise UserError(f"{source}: cannot be read as parquet ({e})") from None


def read_json_lines(source, file):
    for i, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                message = f"{source}:{i}: not valid JSON ({e.msg} at column {e.colno})"
                raise UserError(message) from None
            yield f"{source}:{i}", row


def read_json(source, file):
    """One list of rows. Also one object per line, which many files named .json are."""
    head = list(islice((line.strip() for line in file if line.strip()), 2))
    file.seek(0)
    if len(head) == 2 and head[0].startswith("{") and head[0].endswith("}"):
        yield from read_json_lines(source, file)
        return
    try:
        rows = json.load(file)
    except json.JSONDecodeError as e:
        message = f"{source}:{e.lineno}: not valid JSON ({e.msg} at column {e.colno})"
        raise UserError(message) from None
    if not isinstance(rows, list):
        message = (f"{source}: a .json file must hold one list of rows, or one object per line; "
                   f"this one holds {shorten(rows, 60)}")
        raise UserError(message)
    for i, row in enumerate(rows, 1):
        yield f"{source}, row {i}", row


def read_csv(source, file, delimiter=","):
    """The first line names the fields. An empty cell is a field without a value."""
    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
    try:
        for row in table:
            where = f"{source}:{table.line_num}"
            if "" in row:
                message = (f"{where}: there are more cells than in the first line; put a text that "
                           f"holds {delimiter!r} into double quotes")
                raise UserError(message)
            yield where, {name: cell or None for name, cell in row.items()}
    except csv.Error as e:
        raise UserError(f"{source}:{table.line_num}: not valid CSV ({e})") from None


def read_tsv(source, file):
    return read_csv(source, file, delimiter="\t")


def read_paragraphs(source, file):
    """Plain text: what is between blank lines is a row."""
    paragraphs = [p for p in re.split(r"\n\s*\n", file.read()) if p.strip()]
    for i, paragraph in enumerate(paragraphs, 1):
        yield f"{source}, paragraph {i}", {"text": paragraph}


TEXT_FILES = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_paragraphs,
}


def read_text_file(source, kind):
    opener = open
    how = "UTF-8 text"
    if source.endswith(".gz"):
        opener = gzip.open
        how = "gzipped UTF-8 text"
    newline = None
    if kind in (".csv", ".tsv"):
        newline = ""  # a cell may hold line ends, which are the csv module's to read
    try:
        # utf-8-sig is UTF-8 that may begin with a byte order mark
        with opener(source, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield from TEXT_FILES[kind](source, file)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{source}: cannot be read as {how} ({e})") from None
    except OSError as e:
        raise UserError(f"{source}: cannot be read ({e.strerror})") from None


def read(source):
    """Yields (where, row) of any source."""
    if tasks.is_function(source):
        yield from read_task_or_function(source)
        return
    path = Path(source)
    kind = Path(source.removesuffix(".gz")).suffix
    if not path.is_file():
        looks_like_a_file = kind in TEXT_FILES or kind in (".parquet", ".py")
        if looks_like_a_file or path.is_absolute() or source.count("/") > 1:
            if not hub_folder(source).is_dir():
                raise UserError(f"{source}: no such file")
        yield from read_hub(source)
    elif source.endswith(".parquet"):
        yield from read_parquet(source)
    elif kind in TEXT_FILES:
        yield from read_text_file(source, kind)
    elif kind == ".py":
        raise UserError(f"{source}: write {source}:FUNCTION, a generator of rows")
    else:
        suffixes = "".join(path.suffixes)
        known = " ".join(TEXT_FILES)
        message = (f"{source}: unknown kind of file {suffixes!r}; known are {known}, these with "
                   ".gz, and .parquet")
        raise UserError(message)


def split_weight(text):
    """'a.jsonl:0.7' to ("a.jsonl", 0.7); the weight is None where there is none."""
    name, colon, weight = text.rpartition(":")
    if not colon:
        return text, None
    try:
        return name, float(weight)
    except ValueError:
        return text, None  # a colon that belongs to the name


def parse_sources(data, flag="--data"):
    """'a.jsonl:0.7,b.json:0.3' to [(source, weight or None), ...]."""
    sources = []
    for item in data.split(","):
        if item.strip():
            sources.append(split_weight(item.strip()))
    if not sources:
        raise UserError(f"{flag} is empty: name a file, a task or a data set")
    weights = [weight for _, weight in sources]
    if all(weight is None for weight in weights):
        return sources
    for weight in weights:
        if weight is None or not 0 < weight < float("inf"):
            raise UserError(f"{flag} {data}: give every source a weight above 0, or none")
    return sources


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


def template_of_run(folder):
    """The template that a run was trained with, or None where its folder does not say."""
    path = Path(folder) / "run.json"
    if not folder or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError):
        print0(f"warning: {path} is damaged, so its --template is not known")
        return None
    if "template" not in config:
        return None
    return config["template"].replace("\\n", "\n")


def check_template(template, *folders):
    """The template to use. Warns where one of these folders is of a run with another one."""
    if template != "chat" and "{prompt}" not in template:
        message = (f"--template {template!r} has no {{prompt}} in it, so every prompt would be "
                   "the same")
        raise UserError(message)
    template = template.replace("\\n", "\n")  # a shell passes the two characters \n
    for folder in folders:
        trained = template_of_run(folder)
        if trained is not None and trained != template:
            print0(f"warning: {folder} was trained with --template {trained!r}, and here it is "
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
    """What is known of a source beside its tokens (info.json)."""
    unusable: int = 0            # rows that cannot be used
    first_unusable: str = ""     # where the first of them is, and why
    columns: list = field(default_factory=list)  # names of all fields in the source
    formats: list = field(default_factory=list)  # how its rows were read, such as "messages"
    fields: list = field(default_factory=list)   # names of the fields for reward functions


def add_new(known, names):
    """Adds those names to the list that it does not have."""
    known += [name for name in names if name not in known]


def plain(value):
    """What JSON keeps of a value that it has no type for."""
    if hasattr(value, "tolist"):  # NumPy
        return value.tolist()
    return str(value)


def usable_rows(source, columns, template, tokenizer, summary):
    """Yields (Example, rendered prompt, fields as JSON) of each row that can be used.

    Fills the summary. A row that cannot be used is counted, and the first one is described.
    """
    names = parse_columns(columns)
    for where, row in read(source):
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


def blocks(items, size):
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    while block := list(islice(items, size)):
        yield block


def answers_of(examples, name, template, tokenizer):
    """Token ids of one kind of answer; an empty list where an example does not have it."""
    texts = [getattr(example, name) for example in examples]
    encoded = iter(answer_ids([t for t in texts if t is not None], template, tokenizer))
    return [[] if text is None else next(encoded) for text in texts]


def hash_of_prompt(text):
    """64 bits that decide on the step that a row belongs to, and whether it is held out."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def tokenize(source, columns, template, tokenizer, folder):
    """Writes the tokens of a source into a folder. Holds a thousand rows at a time.

    tokens.bin    int32, flat: of each row prompt, response, chosen, rejected
    rows.npy      (rows, 5) int64: where in it the prompt begins, and where each of the four ends;
                  the span of an answer that a row does not have is empty
    hash.npy      (rows,) uint64: hash of the prompt
    fields.jsonl, fields.npy, info.json: fields for reward functions, (rows + 1,) where each
                  row's begin, and the Summary
    """
    summary = Summary()
    bounds = array("q")
    hashes = array("Q")
    field_bounds = array("q", [0])
    position = 0
    rows = usable_rows(source, columns, template, tokenizer, summary)
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "fields.jsonl", "wb") as fields:
        for block in blocks(rows, 1000):
            examples, prompts, lines = zip(*block)
            parts = [prompt_ids(list(prompts), template, tokenizer)]
            for name in ("response", "chosen", "rejected"):
                parts.append(answers_of(examples, name, template, tokenizer))
            for i, example in enumerate(examples):
                bounds.append(position)
                for part in parts:
                    np.asarray(part[i], dtype=np.int32).tofile(tokens)
                    position += len(part[i])
                    bounds.append(position)
                # plain text has no prompt: the row is its content
                hashes.append(hash_of_prompt(prompts[i] or example.response or ""))
                written = fields.write(lines[i].encode())
                field_bounds.append(field_bounds[-1] + written)
    if not hashes:
        raise UserError(no_rows(source, summary))
    np.save(folder / "rows.npy", np.frombuffer(bounds, dtype=np.int64).reshape(-1, 5))
    np.save(folder / "hash.npy", np.frombuffer(hashes, dtype=np.uint64))
    np.save(folder / "fields.npy", np.frombuffer(field_bounds, dtype=np.int64))
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
            h.update(json.dumps(row, default=plain, skipkeys=True).encode())
    elif path.is_file():
        try:
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    h.update(block)
        except OSError as e:
            raise UserError(f"{source}: cannot be read ({e.strerror})") from None
    else:
        files = hub_folder(source).rglob("*")  # none, of a name on the hub
        times = sorted((str(file), file.stat().st_mtime_ns) for file in files)
        h.update(repr(times).encode())
    return h.hexdigest()


def token_code():
    """This file above class Rows, without comments: all code that decides on tokens."""
    first_line = inspect.getsourcelines(Rows)[1]
    lines = Path(__file__).read_text().splitlines()[: first_line - 1]
    return ast.dump(ast.parse("\n".join(lines)))


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
            message = (f"the token cache {CACHE} cannot be written ({e.strerror}); set the "
                       "environment variable FLATRLHF_CACHE to another folder")
            raise UserError(message) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


# -----------------------------------------------------------------------------
# rows of one step


COLUMN = {"response": 1, "chosen": 2, "rejected": 3}  # where that answer begins, of five bounds


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


@dataclass
class Rows:
    """Tokenized rows that fit a step."""
    tokens: list         # one memory map per source
    bounds: np.ndarray   # (rows, 5) positions in it: the start, and the ends of its four parts
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

    def answer_lengths(self, *which):
        """Tokens of the longest of these answers, (rows,)."""
        columns = [COLUMN[name] for name in which]
        return np.diff(self.bounds)[:, columns].max(1, initial=0)

    def lengths(self, *which):
        """Tokens of the prompt and the longest of these answers, (rows,)."""
        return np.diff(self.bounds)[:, 0] + self.answer_lengths(*which)

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
    step: 'sft' (prompt and response), 'reward' (prompt, chosen and rejected) or 'ppo' (prompt).
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
    check_columns(columns, parts)

    weights = None
    if sources[0][1] is not None:
        weights = [weight for _, weight in sources]
    numbers = [np.flatnonzero(part.kept) for part in parts]  # of each source
    number = np.concatenate(numbers)
    source = np.repeat(np.arange(len(parts)), [len(n) for n in numbers])
    bounds = np.concatenate([part.bounds[n] for part, n in zip(parts, numbers)])
    is_held_out = np.concatenate([part.held_out[n] for part, n in zip(parts, numbers)])

    tokens = [part.tokens for part in parts]
    field_files = [part.field_file for part in parts]

    def take(indices):
        return Rows(tokens, bounds[indices], source[indices], number[indices], field_files, weights)

    train = take(np.flatnonzero(~is_held_out))
    # An evaluation takes the first ones, so they must be a sample of all sources.
    test = take(np.random.default_rng(0).permutation(np.flatnonzero(is_held_out)))
    for rows, name in ((train, "to train on"), (test, "held out")):
        if not len(rows):
            hashes = [part.hashes[n] for part, n in zip(parts, numbers)]
            prompts = len(np.unique(np.concatenate(hashes)))
            message = (f"{flag} {data}: no row is {name} (--split {split or 'all'}, --held-out "
                       f"{held_out}); {len(number):,} rows with {prompts:,} different prompts are "
                       "too few")
            raise UserError(message)
    return train, test


class SourceRows:
    """The rows of one source, and which of them a step takes. All arrays are (rows,)."""

    def __init__(self, name, folder):
        self.name = name
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
        self.bounds = np.load(folder / "rows.npy")  # (rows, 5)
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
        lengths = np.diff(self.bounds)  # (rows, 4): tokens of prompt, response, chosen, rejected
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
            what = " and ".join(needed) or "a prompt"
            columns = ", ".join(map(str, self.summary.columns))
            message = (f"{self.name}: no row has {what}, which this step needs. The rows have "
                       f"{columns}, and are read as {', '.join(self.summary.formats)} "
                       f"(--columns {(needed or ['prompt'])[0]}=NAME gives a field another name)")
            raise UserError(message)

        if step == "reward":
            equal = []
            for _, _, start, middle, end in self.bounds:
                chosen = self.tokens[start:middle]
                rejected = self.tokens[middle:end]
                equal.append(np.array_equal(chosen, rejected))
            self.leave_out(np.array(equal), "with equal answers")
        answer_columns = [COLUMN[name] for name in needed]
        total = lengths[:, 0] + lengths[:, answer_columns].max(1, initial=0)
        self.leave_out(total > max_len, f"over {max_len} tokens")
        if not self.fits.any():
            raise UserError(f"{self.name}: no row is left ({'; '.join(self.left_out)})")

    def divide(self, low, high, held_out):
        """Sets `kept`, the rows of this step, and `held_out`; prints how many rows there are."""
        u = self.hashes / 2.0**64
        self.kept = self.fits & (u >= low) & (u < high)
        # other digits than those of the split, so that every step holds the same share out
        self.held_out = (self.hashes % np.uint64(10_000)) < held_out * 10_000
        train = int((self.kept & ~self.held_out).sum())
        held = int((self.kept & self.held_out).sum())
        count = len(self.bounds) + self.summary.unusable
        line = f"data: {self.name}: {train:,} rows, {held:,} held out, of {count:,}"
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
    scale = min(len(mine) / weight for mine, weight in zip(by_source, rows.weights))
    taken = []
    for mine, weight in zip(by_source, rows.weights):
        count = max(1, int(scale * weight))
        taken.append(rng.permutation(mine)[:count])
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
