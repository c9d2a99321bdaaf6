"""tools/bench.py: what it counts, and what its lines say."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import bench

TINY = "llama:vocab_size=512,hidden_size=64,num_hidden_layers=2,num_attention_heads=4," \
       "num_key_value_heads=2,intermediate_size=128"


def config(tmp_path, **changes):
    options = dict(model=TINY, batch=4, prompt_len=8, new_tokens=8, turns=1)
    return bench.Config(**options | dict(out=str(tmp_path / "results.jsonl")) | changes)


def results(tmp_path):
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("ragged", [False, True])
def test_generation_is_compared_with_both_ways_of_transformers(tmp_path, ragged):
    bench.generate(config(tmp_path, ragged=ragged))
    rows = results(tmp_path)
    assert [row["side"] for row in rows] == ["hybrid", "generate", "generate_batch"]
    for row in rows:
        assert row["vocabulary"] == 512 and row["threads"] == torch.get_num_threads()
        assert row["tokens_per_s"] > 0 and row["device"] and row["commit"] and row["command"]
        assert 1 <= row["mean_length"] <= 8 and (ragged or row["mean_length"] == 8)
    assert rows[0]["hybrid_is_faster_by"] == 1


def test_tokens_are_counted_up_to_the_end_of_each_row():
    class Model:
        def generate(self, ids, **kwargs):
            answers = torch.tensor([[5, 9, 5, 5], [7, 7, 7, 7], [9, 0, 0, 0]])
            return torch.cat([ids, answers], 1)

    prompts = [[1, 2], [3, 4], [5, 6]]
    assert bench.transformers_generate(Model(), prompts, 4, [9]) == 2 + 4 + 1
    assert bench.transformers_generate(Model(), prompts, 4, None) == 12


def test_kernels_are_compared_with_pytorch(tmp_path):
    compared = ("linear", "output layer", "prefill attention", "decode attention", "add and norm")
    for name, ours, pytorch, _ in bench.kernel_cases(TINY, 4, 8, 16, torch.float32):
        if name in compared:
            a, b = ours(), pytorch()
            if name == "prefill attention":
                b = b.transpose(1, 2)
            a = a[0] if name == "add and norm" else a
            torch.testing.assert_close(a, b.reshape(a.shape))
    bench.kernels_job(config(tmp_path))
    assert len({row["kernel"] for row in results(tmp_path)}) == 7


def test_an_iteration_is_that_of_ppo(tmp_path):
    out = tmp_path / "results.jsonl"
    flags = ["--batch=4", "--prompt-len=32", "--new-tokens=8", "--iterations=2", "--ragged"]
    subprocess.run([sys.executable, "-m", "tools.bench", "ppo", f"--model={TINY}", f"--out={out}",
                    "--flags=--lora 4", *flags], check=True, cwd=Path(bench.__file__).parents[1],
                   capture_output=True)
    row = results(tmp_path)[0]
    parts = row["rollout_s"] + row["score_s"] + row["update_s"]
    assert parts == pytest.approx(row["seconds"], rel=0.01)
    assert row["pairs_per_s"] == pytest.approx(4 / row["seconds"], rel=0.01)
    assert row["command"].startswith("python -m tools.bench ppo --model=")
