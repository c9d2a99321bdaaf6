"""Sources of rows, and their formats: from files, tasks, functions and the hub to Examples.

    source --read--> {"prompt": ..., "chosen": ..., "rejected": ...} --convert--> Example

A source is a file (.jsonl .json .csv .tsv .txt, also with .gz, or .parquet), a task of tasks.py
(`toy`), a generator of rows in a file of yours (`file.py:function`), or a folder or a name on the
Hugging Face hub, perhaps with configuration and split (`openai/gsm8k:main:train`). FORMATS says
which fields a row can have. To add a format, write a converter of a few lines and put it there.
"""
import csv
import gzip
import importlib
import json
import math
import re
import zlib
from functools import partial
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Callable, NamedTuple

import tasks
from tasks import shorten
from utils import UserError

# -----------------------------------------------------------------------------
# formats: which fields a row has says what it is


class Example(NamedTuple):
    """A row as text, whatever its format was."""
    messages: list               # the prompt, up to the user's last message; empty for plain text
    response: str | None = None  # the answer that step 1 imitates
    answers: tuple = ()          # those that step 2 compares, best first: a pair's chosen and
    #   rejected one, or a ranking; None for one that is not there
    ranks: tuple = ()            # of each of them: 1 for the best; equal numbers are a tie


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
                   "answers without their conversation need a field `prompt`")
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


def make_example(messages, row, response, answers=PAIR, ranks=(1, 2)):
    """An Example of a prompt and the answers in a row, or a ValueError.

    Each answer is text, or messages that end with it. response: the name of the field that holds
    the answer for step 1, or None. answers: names of the fields that step 2 compares, best first.
    """
    texts = {}
    before = []  # what is before the answer, of each list of messages
    for name in (*answers, response):
        if row.get(name) is not None:
            earlier, texts[name] = split_answer(name, row[name])
            if earlier is not None:
                before.append(earlier)
    for earlier in before:
        if earlier != before[0]:
            raise ValueError("these are two conversations, not two answers to one prompt")
    if before:
        messages = join_messages(messages, before[0])
    if not messages and response not in texts:
        raise ValueError("it has neither a prompt nor a text")
    return Example(messages, texts.get(response), tuple(map(texts.get, answers)), ranks)


def first_field(row, *names):
    """The first of these fields that the row has, one with a value if possible, or None."""
    present = [name for name in names if name in row]
    with_value = [name for name in present if row[name] is not None]
    return next(iter(with_value or present), None)


def system_message(row):
    if row.get("system"):
        return [{"role": "system", "content": check_text("system", row["system"])}]
    return []


def from_messages(row):
    messages = check_messages("messages", row["messages"])
    if messages[-1]["role"] != "assistant":
        return make_example(messages, row, "chosen")
    last = messages[-1]["content"]
    return make_example(messages[:-1], {**row, "last message": last}, "last message")


def from_conversations(row):
    """ShareGPT: [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]."""
    messages = check_messages("conversations", row["conversations"])
    return from_messages({**row, "messages": system_message(row) + messages})


def prompt_messages(prompt):
    if isinstance(prompt, (list, tuple, dict)):
        return check_messages("prompt", prompt)
    if not check_text("prompt", prompt).lstrip().startswith("Human:"):
        return user(prompt)
    messages = dialogue(prompt)
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]  # "... Assistant:" is the template's part
    return messages


def from_prompt(row):
    response = first_field(row, "response", "completion", "chosen")
    return make_example(prompt_messages(row["prompt"]), row, response)


def from_ranking(row):
    """Answers to a prompt, and of each its rank (1 is best) or its score (higher is better)."""
    answers = row["answers"]
    name = first_field(row, "ranks", "scores")
    ranks = dense_ranks(name, row[name])
    if not isinstance(answers, (list, tuple)):
        raise ValueError(f"answers is {shorten(answers, 60)}, which is not a list")
    if len(answers) != len(ranks):
        raise ValueError(f"there are {len(answers)} answers and {len(ranks)} {name}")
    best_first = sorted(range(len(ranks)), key=ranks.__getitem__)
    fields = {f"answer {i + 1}": answers[i] for i in best_first}
    for field, answer in fields.items():
        split_answer(field, answer)  # none may be missing
    response = first_field(row, "response", "completion") or next(iter(fields))
    return make_example(prompt_messages(row["prompt"]), {**row, **fields}, response,
                        answers=tuple(fields), ranks=tuple(ranks[i] for i in best_first))


def dense_ranks(name, numbers):
    """The ranks of answers as 1, 2, 3, ...: equal ones are tied. numbers: the field `ranks` or
    `scores`, as the name says. Raises a ValueError if they leave nothing to compare."""
    if not isinstance(numbers, (list, tuple)):
        raise ValueError(f"{name} is {shorten(numbers, 60)}, which is not a list")
    for number in numbers:
        if not isinstance(number, Real) or isinstance(number, bool) or math.isnan(number):
            raise ValueError(f"{name} holds {shorten(number, 60)}, which is not a number")
    levels = sorted(set(numbers), reverse=name == "scores")
    if len(levels) < 2:
        raise ValueError(f"no two of its {name} differ, so there is nothing to compare")
    return [levels.index(number) + 1 for number in numbers]


def from_instruction(row):
    """Alpaca (instruction, input, output) and Dolly (instruction, context, response)."""
    prompt = check_text("instruction", row["instruction"])
    context = first_field(row, "input", "context")
    if context and row[context]:
        prompt += "\n" + check_text(context, row[context])
    return make_example(user(prompt), row, first_field(row, "output", "response", "chosen"))


def from_question(row):
    messages = user(check_text("question", row["question"]))
    name = first_field(row, "answer", "response")
    return make_example(messages, {name: row[name]}, name)


def from_question_pair(row):
    messages = system_message(row) + user(check_text("question", row["question"]))
    return make_example(messages, row, "chosen")


def from_pair(row):
    """Two whole conversations that differ in the last answer: text as in hh-rlhf, or messages."""
    pair = {}
    for name in PAIR:
        pair[name] = row[name]
        if isinstance(row[name], str):
            pair[name] = dialogue(check_text(name, row[name]))
    return make_example([], pair, "chosen")


def from_text(row):
    return make_example([], {"text": row["text"]}, "text")


class Format(NamedTuple):
    needs: tuple       # the fields that a row of this format has
    convert: Callable  # row -> Example, or a ValueError that says what is wrong with the row
    reads: tuple       # fields that are text for the model; the others are for reward functions


RANKING = ("prompt", "answers", "ranks", "scores", "response", "completion")
FORMATS = [  # the first that fits is taken
    Format(("messages",), from_messages, ("messages", "prompt", *PAIR)),
    Format(("prompt", "answers", "ranks"), from_ranking, RANKING),
    Format(("prompt", "answers", "scores"), from_ranking, RANKING),
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
        if all(row.get(name) is not None for name in form.needs):
            return form
    for form in FORMATS:  # its converter says which field is null
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
# reading: every reader yields (where, row): the row as it is in the source, and its place for
# error messages, such as "a.jsonl:7"


def read_task_or_function(source):
    """Rows of a task, or of 'file.py:function', a function without arguments that yields rows."""
    task = tasks.find_task(source)
    if task:
        function, path = task.rows, Path(tasks.__file__)
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
    from datasets import load_dataset
    name, *rest = source.split(":")
    config, split = (rest + ["", ""])[:2]
    try:
        rows = load_dataset(name, config or None, split=split or "train")
        for i, row in enumerate(rows, 1):
            yield f"{source}, row {i}", row
    except Exception as e:  # the library raises many kinds, and each means that nothing can be read
        reason = " ".join(str(e).split())[:300]
        message = (f"{source}: neither a file here nor a data set that loads ({reason}); "
                   "NAME:CONFIGURATION:SPLIT names a configuration and a split other than train")
        raise UserError(message) from None


def require_datasets(source):
    try:
        importlib.import_module("datasets")
    except ImportError:
        known = ", ".join(tasks.TASKS)
        what = f"neither a file nor a task ({known})"
        if hub_folder(source).is_dir():
            what = "a folder"
        message = (f"{source}: is {what}; to read a folder or a name on the Hugging Face hub "
                   "first `pip install datasets`")
        raise UserError(message) from None


def require_pyarrow(source):
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{source}: to read parquet first `pip install pyarrow`") from None


def read_parquet(source):
    import pyarrow.parquet as parquet
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
        raise UserError(f"{source}:{table.reader.line_num}: not valid CSV ({e})") from None


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
    content = "UTF-8 text"
    if source.endswith(".gz"):
        opener = gzip.open
        content = "gzipped UTF-8 text"
    newline = None
    if kind in (".csv", ".tsv"):
        newline = ""  # a cell may hold line ends, which are the csv module's to read
    try:
        # utf-8-sig is UTF-8 that may begin with a byte order mark
        with opener(source, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield from TEXT_FILES[kind](source, file)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{source}: cannot be read as {content} ({e})") from None
    except OSError as e:
        raise UserError(f"{source}: cannot be read ({e.strerror or e})") from None


def find_reader(source):
    """The function that reads a source. Raises UserError for what is wrong with it by its name."""
    task = tasks.find_task(source)
    if task and not task.rows:
        raise UserError(f"{source} is only a checker, for --reward: its rows come from a file or "
                        "the hub, such as --data openai/gsm8k:main:train")
    if tasks.is_function(source):
        return read_task_or_function
    path = Path(source)
    kind = Path(source.removesuffix(".gz")).suffix
    if not path.is_file():
        looks_like_a_file = kind in TEXT_FILES or kind in (".parquet", ".py")
        if looks_like_a_file or path.is_absolute() or source.count("/") > 1:
            if not hub_folder(source).is_dir():
                raise UserError(f"{source}: no such file")
        if source.count(":") > 2:
            raise UserError(f"{source}: write NAME:CONFIGURATION:SPLIT for a data set on the hub")
        require_datasets(source)
        return read_hub
    if source.endswith(".parquet"):
        require_pyarrow(source)
        return read_parquet
    if kind in TEXT_FILES:
        return partial(read_text_file, kind=kind)
    if kind == ".py":
        raise UserError(f"{source}: write {source}:FUNCTION, a generator of rows")
    suffixes = "".join(path.suffixes)
    known = " ".join(TEXT_FILES)
    message = (f"{source}: unknown kind of file {suffixes!r}; known are {known}, these with "
               ".gz, and .parquet")
    raise UserError(message)


def read(source):
    """Yields (where, row) of any source."""
    yield from find_reader(source)(source)


def check_sources(data, flag="--data"):
    """Raises UserError for files that are not there and packages that are not installed."""
    for source, _ in parse_sources(data, flag):
        find_reader(source)


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
