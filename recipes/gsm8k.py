"""GSM8K (Cobbe et al. 2021): word problems whose solutions end with "#### 42".

    python sft.py --model Qwen/Qwen2.5-0.5B --data recipes/gsm8k.py:gsm8k --out out/gsm8k-sft
    python ppo.py --model out/gsm8k-sft --data recipes/gsm8k.py:gsm8k \
        --reward recipes/gsm8k.py:correct --max-new-tokens 256 --out out/gsm8k-ppo
"""
import re
from fractions import Fraction

import data

SOURCE = "openai/gsm8k:main:train"  # on the hub; or a file, such as train.jsonl


def gsm8k():
    """Yields {prompt, response, solution}. The calculator's notes, such as <<48/2=24>>, go."""
    for row in data.read(SOURCE):
        response = re.sub(r"<<.*?>>", "", row["answer"])
        yield {"prompt": row["question"], "response": response, "solution": row["answer"]}


def correct(completions, solution, **kwargs):
    """A reward function: 1.0 where the answer's number is the solution's, else 0.0. A row without a
    solution is not judged."""
    scores = []
    for completion, text in zip(completions, solution):
        if text is None:
            scores.append(None)
        else:
            number = last_number(completion[-10_000:])
            scores.append(float(number is not None and number == last_number(str(text))))
    return scores


def last_number(text):
    """The first number behind the last "####", else the last one of all: a Fraction, or None."""
    # A minus behind a digit or a parenthesis is no sign.
    pattern = r"(?:(?<![0-9)])-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
    behind = re.findall(pattern, text.rpartition("####")[2]) if "####" in text else []
    numbers = behind[:1] or re.findall(pattern, text)[-1:]
    if not numbers or len(numbers[0]) > 100:  # Python refuses to read numbers of 4,300 digits
        return None
    return Fraction(numbers[0].replace(",", ""))
