"""Sums of numbers with four digits, for a policy that can call a calculator: recipes/README.md,
tool use.

    git apply recipes/tool-use.diff
    python sft.py --data recipes/calculator.py:sums --epochs 0.2 --out out/calls
    python ppo.py --model out/calls --data recipes/calculator.py:sums \
        --reward recipes/calculator.py:correct --respond recipes/calculator.py:calculate \
        --max-new-tokens 24 --iterations 12 --batch-size 256 --out out/tool
"""
import random
import re


def sums(n=20_000):
    """Yields {prompt, response, sum}. The response calls the calculator."""
    rng = random.Random(0)
    for _ in range(n):
        a = rng.randrange(1000, 10_000)
        b = rng.randrange(1000, 10_000)
        yield {"prompt": f"{a} + {b} =", "response": f"[{a}+{b}]", "sum": str(a + b)}


def alone():
    """The same without a calculator: the response is the sum."""
    for row in sums():
        yield row | {"response": row["sum"]}


def calculate(answer, **fields):
    """The tool: what follows an answer that ends with a call, such as [12+30]; else None."""
    call = re.search(r"\[(\d+)\+(\d+)\]$", answer)
    return str(int(call[1]) + int(call[2])) if call else None


def correct(completions, sum, **kwargs):
    """A reward function: 1.0 if the sum is at the start of the answer or behind a call."""
    found = [re.search(rf"(^|\]\D*){s}\b", c.strip()) for c, s in zip(completions, sum)]
    return [float(match is not None) for match in found]
