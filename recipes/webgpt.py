"""WebGPT comparisons (Nakano et al. 2021): questions with two answers each, some of them tied.

    python reward.py --model out/sft --data recipes/webgpt.py:webgpt --out out/reward-webgpt
"""
import re

import data

FILE = ""  # comparisons.jsonl; empty: from the hub


def webgpt():
    """Yields {prompt, response, answers, scores}. Equal scores are a tie. The response, for step 1,
    is the better answer, the first one of a tie. Citations, such as [1, 2], go."""
    for row in data.read(FILE) if FILE else hub():
        answers = [re.sub(r"\s*\[[\d, ]+\]", "", row[f"answer_{i}"]).strip() for i in (0, 1)]
        scores = [row["score_0"], row["score_1"]]
        if all(answers):
            yield {"prompt": row["question"]["full_text"], "answers": answers, "scores": scores,
                   "response": answers[scores[1] > scores[0]]}


def hub():
    from datasets import load_dataset

    # Its main branch is a script, which the package no longer runs.
    return load_dataset("openai/webgpt_comparisons", revision="refs/convert/parquet", split="train")
