"""tools/demo.py: three steps with one command, that goes on where it stopped."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import reward
import utils
from tools import demo

HERE = Path(demo.__file__).parent.parent
long = pytest.mark.skipif(not os.environ.get("LONG"), reason="only in make test-long")

SMALL = "--held-out 0.9 --batch-size 8 "
FLAGS = {
    "sft_flags": SMALL + "--epochs 0.02",
    "reward_flags": SMALL + "--epochs 0.02",
    "ppo_flags": SMALL + "--iterations 2 --max-new-tokens 6",
}


def test_a_demo_of_toy_reports_what_its_runs_logged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "toy", lambda toy=data.toy: toy(words=200))
    cfg = demo.Config(out=str(tmp_path), **FLAGS)
    demo.main(cfg)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    steps, gold = demo.column(tmp_path / "ppo", "eval_toy_correct")
    assert steps == [0, 1, 2]
    assert summary["sft"] == {"gold": gold[0]}
    assert summary["ppo"]["gold"] == gold[-1]
    _, accuracy = demo.column(tmp_path / "reward", "held_out_accuracy")
    assert summary["reward"] == {"accuracy": accuracy[-1]}
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000

    capsys.readouterr()
    demo.main(cfg)  # nothing is left to do
    assert capsys.readouterr().out.count("is finished, and kept") == 3
    with pytest.raises(utils.UserError, match="--seed 1, not 2"):
        demo.main(demo.Config(out=str(tmp_path), seed=2, **FLAGS))


def test_flags_are_passed_on_as_they_are():
    cfg = demo.Config(model="a/b", reward_model="c/d", data="x.jsonl", split="2,4,4", out="o",
                      reward_flags="--zero 3 --ds-config 'my file.json'")
    config = utils.parse_args(reward.Config, demo.flags_of("reward", cfg))
    assert config == reward.Config(model="c/d", data="x.jsonl", split="2,4,4", out="o/reward",
                                   zero=3, ds_config="my file.json")


def opt_folder(folder, width, seed):
    """A small OPT with random weights and the built-in tokenizer."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    tokenizer = utils.load_tokenizer("tiny")
    config = OPTConfig(vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2,
                       ffn_dim=2 * width, num_attention_heads=4, word_embed_proj_dim=width,
                       max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
                       bos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@long
def test_two_ranks_with_models_of_their_own_go_on_after_a_kill(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in data.toy(words=40)))
    flags = {name: text.replace("0.9", "0.2") for name, text in FLAGS.items()}
    flags["reward_flags"] = "--held-out 0.2 --batch-size 8 --epochs 3 --max-len 128"
    arguments = ["--model", opt_folder(tmp_path / "a", 64, 1), "--reward-model",
                 opt_folder(tmp_path / "b", 32, 2), "--data", str(rows), "--split", "2,4,4",
                 "--out", str(tmp_path / "out")]
    for name, text in flags.items():
        arguments += ["--" + name.replace("_", "-"), text]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", "-m", "tools.demo", *arguments]
    process = subprocess.Popen(command, cwd=HERE, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    deadline = time.time() + 300
    while not list((tmp_path / "out" / "reward" / "checkpoint").glob("[0-9]*[0-9]")):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "stopped after step" in process.communicate()[0]
    done = subprocess.run(command, cwd=HERE, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sft is finished, and kept" in done.stdout
    assert "goes on after step" in done.stdout
    summary = json.loads((tmp_path / "out" / "demo" / "summary.json").read_text())
    widths = [json.loads((tmp_path / "out" / step / "config.json").read_text())["hidden_size"]
              for step in demo.STEPS]
    assert widths == [64, 32, 64] and "score" in summary["ppo"]
