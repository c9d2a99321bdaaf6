"""Countdown (Gandhi et al. 2024; TinyZero): reach a number with three others, each used at most
once. The demonstrations of half of the rows miss it.

    python sft.py --data recipes/countdown.py:countdown --out out/countdown-sft
    python ppo.py --model out/countdown-sft --data recipes/countdown.py:countdown \
        --reward recipes/countdown.py:correct --out out/countdown-ppo
"""
import ast
import operator
import random
import re
from collections import Counter
from fractions import Fraction

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}


def countdown(n=20_000, wrong=0.5):
    """Yields {prompt, response, chosen, rejected, nums, target}, the same rows on every machine."""
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


def correct(completions, nums, target, **kwargs):
    """A reward function: 1.0 for a solution, else 0.0. None, which abstains, for rows of others."""
    scores = []
    for completion, numbers, number in zip(completions, nums, target):
        scores.append(None if numbers is None else solves(completion, numbers, number))
    return scores


def solves(answer, nums, target):
    """Whether the answer is an expression, with or without "= target" behind it, that equals the
    target and uses each number at most once. What it reads is parsed and never run."""
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


def evaluate(node):
    """The exact value of a parsed expression of integers, + - * / and parentheses."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    raise ValueError("not an expression of integers and + - * /")
