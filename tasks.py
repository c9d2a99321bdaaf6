"""Tasks with an exact checker, and functions that users write.

A task is a name for rows and a checker, a reward function that says exactly whether an answer is
right. Its name can be given as a source (--data countdown) and as a reward (--reward countdown);
its accuracy is logged as `gold`.

    toy             six skills on short words, with careless labellers
    countdown       reach a number with three others
    gsm8k           only a checker; the rows come from the hub or a file, as in
                    --data openai/gsm8k:main:train --reward gsm8k
    reasoning_gym:NAME    any task of the package reasoning-gym

To add a task, write a generator of rows and a checker, and put them into TASKS. Without an edit of
this file, --data file.py:function reads rows from a generator of yours, and --reward
file.py:function scores with a function of yours.

A reward function is called as TRL calls one, so the same function works in both: by keyword, with
`prompts` and `completions` (lists of text), `completion_ids` (lists of the token ids that the
policy sampled, EOS included) and one list for each field of the rows that is not text for the
model. It gets those that its signature names, or all of them if it has **kwargs. It returns one
finite number for each completion. A process reward returns in its place a list with one number for
each sampled token, or {position: number} for some of them.

    def short(completions, **kwargs):
        return [-len(completion) for completion in completions]

    def exact(completions, answer):  # for rows with a field `answer`
        return [float(c.strip() == a) for c, a in zip(completions, answer)]

    def no_repetition(completion_ids):  # a process reward
        return [[-float(a == b) for a, b in zip([None, *ids], ids)] for ids in completion_ids]
"""
import ast
import asyncio
import copy
import functools
import hashlib
import importlib.util
import inspect
import math
import operator
import random
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
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


def toy_checker(prompts, completions):
    return [toy_accuracy(prompt, answer) for prompt, answer in zip(prompts, completions)]


# -----------------------------------------------------------------------------
# countdown: reach a number with others, each used once at most (Gandhi et al. 2024; TinyZero)

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}


def countdown(n=20_000, wrong=0.5):
    """Yields {prompt, response, chosen, rejected, nums, target}, the same rows on every machine.

    The response uses the three numbers, and misses the target in half of the rows. Of the pair,
    `chosen` reaches it and `rejected` does not.
    """
    rng = random.Random(0)

    def attempt(nums):
        a, b, c = rng.sample(nums, 3)
        text = f"{a}{rng.choice('+-*')}{b}{rng.choice('+-*')}{c}"
        return text, evaluate(ast.parse(text, mode="eval").body)

    for _ in range(n):
        nums = [rng.randint(1, 9) for _ in range(3)]
        chosen, target = attempt(nums)
        while not 1 <= target <= 99:
            chosen, target = attempt(nums)
        rejected, value = attempt(nums)
        while value == target:
            rejected, value = attempt(nums)
        prompt = f"{target} from {' '.join(map(str, nums))}"
        response = rejected if rng.random() < wrong else chosen
        yield {"prompt": prompt, "response": response, "chosen": chosen, "rejected": rejected,
               "nums": nums, "target": int(target)}


def evaluate(node):
    """The exact value of a parsed expression of numbers, + - * / and parentheses. Raises ValueError
    for anything else, ZeroDivisionError as usual."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    raise ValueError("this is no expression of numbers and + - * /")


def countdown_accuracy(answer, nums, target):
    """1.0 if the answer is an expression, with or without "= target" behind it, that has the value
    of the target and uses each number once at most; else 0.0. Never runs what it reads."""
    expression, equals, result = (part.strip() for part in answer.partition("="))
    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", expression):
        return 0.0
    if equals and result != str(target):
        return 0.0
    try:
        value = evaluate(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0
    used = Counter(map(int, re.findall("[0-9]+", expression)))
    return float(value == target and used <= Counter(nums))


def countdown_checker(completions, nums, target):
    rows = zip(completions, nums, target)
    return [countdown_accuracy(*row) for row in rows]


# -----------------------------------------------------------------------------
# gsm8k: word problems, whose solutions end with "#### 42" (Cobbe et al. 2021)


def last_number(text):
    """The first number behind the last "####", else the last one of all: a Fraction, or None."""
    # a minus behind a digit or a parenthesis is no sign
    pattern = r"(?:(?<![0-9)])-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
    behind = re.findall(pattern, text.rpartition("####")[2]) if "####" in text else []
    numbers = behind[:1] or re.findall(pattern, text)[-1:]
    if not numbers or len(numbers[0]) > 100:  # Python refuses to read numbers of 4,300 digits
        return None
    return Fraction(numbers[0].replace(",", ""))


def gsm8k_checker(completions, answer):
    right = []
    for completion, solution in zip(completions, answer):
        if solution is None:
            raise ValueError("this row has no answer")
        number = last_number(completion[-10_000:])
        right.append(float(number is not None and number == last_number(str(solution))))
    return right


# -----------------------------------------------------------------------------
# the package reasoning-gym, which has a hundred tasks

GYM = "reasoning_gym:"
GYM_ROWS = 10_000


@functools.cache
def gym_dataset(spec):
    """The data set that 'reasoning_gym:NAME' stands for. A row depends on its number alone."""
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError:
        raise UserError(f"{spec}: first `pip install reasoning-gym`") from None
    name = spec.removeprefix(GYM)
    try:
        return gym.create_dataset(name, size=GYM_ROWS, seed=0)
    except ValueError as error:
        raise UserError(f"{spec}: reasoning-gym has no such task ({error})") from None


def gym_rows(spec):
    for i, entry in enumerate(gym_dataset(spec)):
        yield {"prompt": entry["question"], "response": entry["answer"], "row": f"{spec}:{i}"}


def gym_checker(spec, completions, row):
    """The task's own scores: 1 for a right answer, and less, often above 0, for a wrong one."""
    dataset = gym_dataset(spec)
    scores = []
    for completion, label in zip(completions, row):
        name, _, i = str(label).rpartition(":")
        if name != spec:
            raise ValueError(f"this row, {label}, is not one of {spec}")
        scores.append(float(dataset.score_answer(completion.strip(), dataset[int(i)])))
    return scores


# -----------------------------------------------------------------------------
# the tasks


@dataclass(frozen=True)
class Task:
    rows: Callable | None  # () -> an iterable of rows, the same ones at every call; None: the rows
    #   come from somewhere else
    check: Callable        # a reward function that gives 1.0 for a right answer, else less


TASKS = {
    "toy": Task(rows=toy, check=toy_checker),
    "countdown": Task(rows=countdown, check=countdown_checker),
    "gsm8k": Task(rows=None, check=gsm8k_checker),
}


def is_task(spec):
    return spec in TASKS or spec.startswith(GYM)


def find_task(spec):
    """The Task of this name, or None."""
    if spec.startswith(GYM):
        gym_dataset(spec)  # says what is wrong with the name
        return Task(functools.partial(gym_rows, spec), functools.partial(gym_checker, spec))
    return TASKS.get(spec)


# -----------------------------------------------------------------------------
# functions from a user's file


def is_function(spec):
    """Whether this names a function: a task, or file.py:function."""
    return is_task(spec) or ".py:" in spec


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
    if path == Path(__file__):  # a task: no file of the user's
        return ""
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
    task = find_task(spec)
    if task:
        return RewardFunction(task.check, spec, label, Path(__file__))
    if not is_function(spec):
        known = ", ".join(TASKS)
        raise UserError(f"{label}: write file.py:function, or the name of a task ({known})")
    function, path = import_function(spec, label)
    name = spec.partition(".py:")[2]
    return RewardFunction(function, name, label, path)


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
        known = ["prompts", "completions", "completion_ids", *field_names]
        for name in self.required:
            if name not in known:
                message = (f"{self.label}: its parameter {name!r} is not a field of the rows; "
                           f"a function can take {', '.join(known)}, or **kwargs")
                if self.path == Path(__file__):
                    message = (f"{self.label}: needs the field {name!r}, which the rows of --data "
                               "do not have")
                raise UserError(message)

    def __call__(self, prompts, completions, fields):
        """n scores. Each is a float; of a process reward a list of floats, one per sampled token.

        prompts, completions: n texts each. fields: {name: n values}, of Rows.fields; and
        completion_ids, the ids of the sampled tokens.
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
        ids = fields.get("completion_ids", [()] * len(scores))
        result = []
        for score, prompt, completion, tokens in zip(scores, prompts, completions, ids):
            row = row_text(prompt, completion)
            if isinstance(score, dict):
                score = self.spread(score, len(tokens), row)
            if isinstance(score, (list, tuple)) or getattr(score, "ndim", 0):
                result.append(self.process_score(list(score), len(tokens), row))
            else:
                result.append(self.check_score(score, row))
        if 0 < sum(isinstance(score, list) for score in result) < len(result):
            message = (f"{self.label}: gave lists for some completions and numbers for others; it "
                       "must return lists for all, or for none")
            raise UserError(message)
        return result

    def spread(self, scores, n, row):
        """{position: number} as a list of n numbers. Negative positions count from the end."""
        values = [0.0] * n
        for position, score in scores.items():
            if not isinstance(position, Integral) or not -n <= position < n:
                message = (f"{self.label}: gave a number for position {position!r} {row}, which "
                           f"has {n} sampled tokens")
                raise UserError(message)
            values[int(position)] = score
        return values

    def process_score(self, scores, n, row):
        if len(scores) != n:
            message = (f"{self.label}: gave a list of {len(scores)} numbers {row}, which has {n} "
                       "sampled tokens; a process reward is one number for each of "
                       "completion_ids, or {position: number}")
            raise UserError(message)
        return [self.check_score(score, row) for score in scores]

    def call(self, prompts, completions, fields):
        """What the user's function returns; a list, if it can be made one."""
        arguments = {**fields, "prompts": prompts, "completions": completions}
        if not self.takes_all:
            taken = [name for name in self.parameters if name in arguments]
            arguments = {name: arguments[name] for name in taken}
        with folder_on_path(self.path.parent):  # it may import when it is called
            scores = self.function(**copy.deepcopy(arguments))
            if inspect.iscoroutine(scores):  # of an async def
                scores = asyncio.run(scores)
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
        """A score as a float. Raises a UserError where it is not one finite number."""
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
        return value


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
