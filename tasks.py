"""Tasks with an exact checker, and functions that users write.

A task is a name for rows and a checker: `toy` is rows to train on, and a function that says
exactly whether an answer is right. Its name can be given as a source (--data toy) and as a
reward (--reward toy); its accuracy is logged as `gold`. To add a task, write a generator of rows
and a checker, and put them into TASKS. Without an edit of this file, --data file.py:function reads
rows from a generator of yours, and --reward file.py:function scores with a function of yours.

A reward function is called as TRL calls one, so the same function works in both: by keyword, with
`prompts` and `completions` (lists of text) and one list for each field of the rows that is not
text for the model. It gets those that its signature names, or all of them if it has **kwargs. It
returns one finite number for each completion.

    def short(completions, **kwargs):
        return [-len(completion) for completion in completions]

    def exact(completions, answer):  # for rows with a field `answer`
        return [float(c.strip() == a) for c, a in zip(completions, answer)]
"""
import copy
import functools
import hashlib
import importlib.util
import inspect
import math
import random
import re
import sys
import traceback
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from utils import UserError

# -----------------------------------------------------------------------------
# toy: six skills with an exact checker, and labellers who are often wrong

SKILLS = {
    "copy": lambda word: word,
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "upper": lambda word: word.upper(),
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
}
LOWER = "abcdefghijklmnopqrstuvwxyz"


def corrupt(rng, text):
    """One letter changed, doubled or dropped, or two neighbours swapped."""
    letters = list(text)
    i = rng.randrange(len(text))
    kind = rng.randrange(4)
    if kind == 0:
        alphabet = LOWER
        if text.isupper():
            alphabet = LOWER.upper()
        letters[i] = rng.choice(alphabet)
    elif kind == 1:
        letters.insert(i, letters[i])
    elif kind == 2:
        del letters[i]
    elif i + 1 < len(letters):
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def wrong_answer(rng, skill, word):
    """A spelling mistake in the answer, or in reading the word, or the answer of another skill."""
    right = skill(word)
    while True:
        kind = rng.random()
        if kind < 0.5:
            answer = corrupt(rng, right)
        elif kind < 0.8:
            answer = skill(corrupt(rng, word))
        else:
            other_skill = rng.choice(list(SKILLS.values()))
            answer = other_skill(word)
        if answer != right:  # a corrupted word may still have the right answer
            return answer


def random_word(rng):
    """Three or four letters that can be pronounced: consonant, vowel, consonant, vowel."""
    word = ""
    for _ in range(2):
        word += rng.choice("bdfgklmnprstvz")
        word += rng.choice("aeiou")
    return word[: rng.randint(3, 4)]


def toy(words=4000, wrong=0.35):
    """Yields {prompt, response, chosen, rejected}, the same rows on every machine.

    The response is a labeller's, and wrong in 35% of the rows. Of the pair, `chosen` is right and
    `rejected` is wrong.
    """
    rng = random.Random(0)
    for _ in range(words):
        word = random_word(rng)
        for name, skill in SKILLS.items():
            right = skill(word)
            response = right
            if rng.random() < wrong:
                response = wrong_answer(rng, skill, word)
            rejected = wrong_answer(rng, skill, word)
            prompt = f"{name} {word}"
            yield {"prompt": prompt, "response": response, "chosen": right, "rejected": rejected}


def toy_accuracy(prompt, answer):
    """1.0 if the answer is right, else 0.0. The skill is the last one that the prompt names."""
    found = re.findall(rf"\b({'|'.join(SKILLS)}) (\w+)", prompt)
    if not found:
        raise ValueError("this is not a prompt of toy: it names none of the six skills")
    name, word = found[-1]
    right = SKILLS[name](word)
    return float(answer.strip() == right)


# -----------------------------------------------------------------------------
# the tasks


@dataclass(frozen=True)
class Task:
    rows: Callable   # () -> an iterable of rows, the same ones at every call
    check: Callable  # (prompt, answer) -> float, 1.0 for a right answer; no model is trained on it


TASKS = {"toy": Task(rows=toy, check=toy_accuracy)}


# -----------------------------------------------------------------------------
# functions from a user's file


def is_function(spec):
    """Whether this names a function: a task, or file.py:function."""
    return spec in TASKS or ".py:" in spec


@contextmanager
def folder_on_path(folder):
    """Context manager: modules in the folder of the user's file can be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@functools.cache
def import_file(path, modified):
    """The module of a user's file. Two functions of one file share it, and an edit imports it anew.

    modified: the time of its last change, only there to be a part of the cache's key.
    """
    # The name must be its own: the user's file may be called as one of ours. It is registered
    # because dataclasses and pickle look modules up by name.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with folder_on_path(path.parent):
        spec.loader.exec_module(module)
    return module


def import_function(spec, label):
    """(function, path of its file) of 'file.py:function'. label: how error messages begin."""
    stem, _, name = spec.partition(".py:")
    path = Path(f"{stem}.py").resolve()
    if not name:
        raise UserError(f"{label}: write file.py:function")
    if not path.is_file():
        raise UserError(f"{label}: there is no file {stem}.py")
    try:
        module = import_file(path, path.stat().st_mtime_ns)
    except Exception as error:
        message = f"{label}: {path.name} cannot be imported: {describe(error)}"
        raise UserError(message + user_lines(error, path)) from error
    function = getattr(module, name, None)
    if not callable(function):
        message = f"{label}: {path.name} has no function {name!r}"
        if ":" in name:
            message += "; a weight is a number, as in file.py:function:0.5"
        raise UserError(message)
    return function, path


def describe(error):
    return f"{type(error).__name__}({error})"


def user_lines(error, path):
    """The lines of a traceback that are in the user's file, or in files of the same folder.

    Returns text that begins with a newline, or nothing. Frames of libraries, and ours, are left
    out.
    """
    lines = []
    reached = False
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        reached = reached or file == path  # what comes before called the user's function
        installed = "site-packages" in file.parts
        if reached and file.is_relative_to(path.parent) and not installed:
            lines += traceback.format_list([frame])
    if isinstance(error, SyntaxError):  # has no frame of its own, but a file and a line
        lines += traceback.format_exception_only(error)
    if not lines:
        return ""
    return "\n" + "".join(lines).rstrip()


# -----------------------------------------------------------------------------
# reward functions


def load_function(spec):
    """The RewardFunction that 'file.py:function', or the name of a task, stands for."""
    label = f"--reward {spec}"
    if spec in TASKS:
        return RewardFunction(from_checker(TASKS[spec].check), spec, label, Path(__file__))
    if not is_function(spec):
        known = ", ".join(TASKS)
        raise UserError(f"{label}: write file.py:function, or the name of a task ({known})")
    function, path = import_function(spec, label)
    name = spec.partition(".py:")[2]
    return RewardFunction(function, name, label, path)


def from_checker(check):
    """A task's checker as a reward function."""
    def score(prompts, completions):
        return [check(prompt, answer) for prompt, answer in zip(prompts, completions)]
    return score


class RewardFunction:
    """A user's function that scores answers. It gets copies, and its mistakes get a sentence.

    name: for logs, the function's or the task's.
    """

    def __init__(self, function, name, label, path):
        """label: how error messages begin. path: the user's file, whose lines they show."""
        self.function = function
        self.name = name
        self.label = label
        self.path = path
        self.takes_all = False
        self.parameters = []  # names of all parameters
        self.required = []    # of those without a default
        try:
            signature = inspect.signature(function)
        except ValueError:  # some functions written in C
            message = f"{label}: its parameters are not known; write a def around it"
            raise UserError(message) from None
        for parameter in signature.parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                self.takes_all = True
            elif parameter.kind == parameter.POSITIONAL_ONLY:
                message = f"{label}: its parameter {parameter.name!r} cannot be given by name"
                raise UserError(message)
            elif parameter.kind != parameter.VAR_POSITIONAL:
                self.parameters.append(parameter.name)
                if parameter.default is parameter.empty:
                    self.required.append(parameter.name)

    def check_parameters(self, field_names):
        """Raises a UserError where the function needs a field that the rows do not have."""
        known = ["prompts", "completions", *field_names]
        for name in self.required:
            if name not in known:
                message = (f"{self.label}: its parameter {name!r} is not a field of the rows; "
                           f"a function can take {', '.join(known)}, or **kwargs")
                raise UserError(message)

    def __call__(self, prompts, completions, fields):
        """Scores (n,), a list of floats.

        prompts, completions: n texts each. fields: {name: n values}, of Rows.fields.
        """
        self.check_parameters(fields)
        try:
            scores = self.call(prompts, completions, fields)
        except Exception as error:
            message = self.explain(error, prompts, completions, fields)
            raise UserError(message) from error
        if not isinstance(scores, list):
            message = (f"{self.label}: returned {shorten(scores)}, a {type(scores).__name__}; "
                       "it must return a list with one number per completion")
            raise UserError(message)
        if len(scores) != len(prompts):
            message = (f"{self.label}: gave {len(scores)} scores for {len(prompts)} prompts; "
                       "it must return one finite number per completion")
            raise UserError(message)
        for score, prompt, completion in zip(scores, prompts, completions):
            self.check_score(score, row_text(prompt, completion))
        return [float(score) for score in scores]

    def call(self, prompts, completions, fields):
        """What the user's function returns; a list, if it can be made one."""
        arguments = {**fields, "prompts": prompts, "completions": completions}
        if not self.takes_all:
            taken = [name for name in self.parameters if name in arguments]
            arguments = {name: arguments[name] for name in taken}
        with folder_on_path(self.path.parent):  # it may import when it is called
            scores = self.function(**copy.deepcopy(arguments))
            if hasattr(scores, "tolist"):  # NumPy and PyTorch
                scores = scores.tolist()
            if isinstance(scores, Iterable) and not isinstance(scores, (str, dict)):
                scores = list(scores)  # in here because a generator runs only now
        return scores

    def explain(self, error, prompts, completions, fields):
        """The message for an exception in the user's function: which row, and which lines."""
        where = f"for {len(prompts)} prompts at once, but for none of them alone"
        for i in range(len(prompts)):
            row = slice(i, i + 1)
            row_fields = {name: values[row] for name, values in fields.items()}
            try:
                self.call(prompts[row], completions[row], row_fields)
            except Exception as row_error:
                error = row_error
                where = row_text(prompts[i], completions[i])
                break
        return f"{self.label}: raised {describe(error)} {where}" + user_lines(error, self.path)

    def check_score(self, score, row):
        """Raises a UserError where a score is not one finite number."""
        if isinstance(score, (list, tuple)) or getattr(score, "ndim", 0):
            message = (f"{self.label}: gave a list of {len(score)} numbers {row}; "
                       "only one number per completion can be used so far")
            raise UserError(message)
        shown = repr(score)
        try:
            value = float(score)
            shown = str(value)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            message = (f"{self.label}: gave {shown} {row}; "
                       "it must return one finite number per completion")
            raise UserError(message)


def row_text(prompt, completion):
    return f"for prompt {shorten(prompt)}, completion {shorten(completion)}"


def shorten(value, limit=300):
    """repr of a value for a message, with its middle left out if it is long."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {text[-half:]}"


# -----------------------------------------------------------------------------
# tools


def load_tool(spec):
    """The Tool that 'file.py:function' stands for."""
    label = f"--respond {spec}"
    function, path = import_function(spec, label)
    return Tool(function, label, path)


class Tool:
    """A user's function that goes on with an answer whenever the policy has come to its EOS: a
    tool or an environment. Its mistakes get a sentence."""

    def __init__(self, function, label, path):
        """label: how error messages begin. path: the user's file, whose lines they show."""
        self.function = function
        self.label = label
        self.path = path

    def __call__(self, row, text):
        """The text that follows, or None at the end of the answer.

        row: {"prompt": text, and the other fields of the row}. text: the answer so far.
        """
        where = row_text(row["prompt"], text)
        try:
            with folder_on_path(self.path.parent):
                reply = self.function(copy.deepcopy(row), text)
        except Exception as error:
            message = f"{self.label}: raised {describe(error)} {where}"
            raise UserError(message + user_lines(error, self.path)) from error
        if reply is not None and not isinstance(reply, str):
            message = (f"{self.label}: returned {shorten(reply)} {where}; it must return the text "
                       "that follows, or None")
            raise UserError(message)
        return reply
