"""What a user can do wrong: one table of mistakes, with the sentence that each of them gets. And
what a script does where it cannot print, or is interrupted.

    pytest test_mistakes.py -k numbers       # one part

Everything runs in this process, as a script runs it (utils.run), but for the last part.
"""
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from testing import HERE, write_rows  # before torch: it sets environment variables

import pytest
import torch

import chat
import data
import demo
import models
import ppo
import reward
import sft
import training
import utils

SCRIPTS = {"sft": sft, "reward": reward, "ppo": ppo, "chat": chat, "demo": demo}
TINY = "--batch-size 8 --held-out 0.2 --max-len 64 "  # enough for the files below
PPO = "ppo --model lm --reward rm --data toy.jsonl --max-new-tokens 8 --minibatches 2 " + TINY

# "script flags": the sentence, a regular expression, without "error: " and the hint at --help.
NUMBERS = {
    "sft --lr nan": "--lr nan: must be above 0",
    "sft --lr -1": "--lr -1.0: must be above 0",
    "sft --lr 0": "--lr 0.0: must be above 0",
    "sft --lr inf": r"--lr inf: must be below 2\*\*32",
    "sft --lr 1e-5x": "argument --lr: invalid float value: '1e-5x'",
    "sft --epochs 0": "--epochs 0.0: must be above 0",
    "sft --epochs nan": "--epochs nan: must be above 0",
    "reward --epochs inf": r"--epochs inf: must be below 2\*\*32",
    "sft --held-out -1": "--held-out -1.0: must be above 0 and below 1",
    "sft --held-out 0": "--held-out 0.0: must be above 0 and below 1",
    "sft --held-out 2": "--held-out 2.0: must be above 0 and below 1",
    "ppo --held-out nan": "--held-out nan: must be above 0 and below 1",
    "sft --seed -1": "--seed -1: must be at least 0",
    "sft --seed 99999999999999999999": r"--seed 99999999999999999999: must be below 2\*\*32",
    "chat --seed -5": "--seed -5: must be at least 0",
    "sft --batch-size 0": "--batch-size 0: must be at least 1",
    "sft --batch-size 1.5": "argument --batch-size: invalid int value: '1.5'",
    "reward --micro-batch -1": "--micro-batch -1: must be at least 0",
    "reward --max-len 1": "--max-len 1: must be at least 2",
    "sft --save-every -1": "--save-every -1.0: must be at least 0",
    "sft --save-every nan": "--save-every nan: must be at least 0",
    "sft --zero 4": "argument --zero: invalid choice: 4 .*",
    "ppo --actor-lr nan": "--actor-lr nan: must be at least 0",
    "ppo --actor-lr -1": "--actor-lr -1.0: must be at least 0",
    "ppo --actor-lr inf": r"--actor-lr inf: must be below 2\*\*32",
    "ppo --critic-lr nan": "--critic-lr nan: must be at least 0",
    "ppo --kl-coef -1": "--kl-coef -1.0: must be at least 0",
    "ppo --kl-coef nan": "--kl-coef nan: must be at least 0",
    "ppo --clip 0": "--clip 0.0: must be above 0",
    "ppo --clip -1": "--clip -1.0: must be above 0",
    "ppo --ptx-coef -1": "--ptx-coef -1.0: must be at least 0",
    "ppo --ptx-coef nan": "--ptx-coef nan: must be at least 0",
    "ppo --ema 1": "--ema 1.0: must be at least 0 and below 1",
    "ppo --ema -0.1": "--ema -0.1: must be at least 0 and below 1",
    "ppo --tp 0": "--tp 0: must be at least 1",
    "ppo --iterations 0": "--iterations 0: must be at least 1",
    "ppo --ppo-epochs 0": "--ppo-epochs 0: must be at least 1",
    "ppo --minibatches 0": "--minibatches 0: must be at least 1",
    "ppo --max-new-tokens 0": "--max-new-tokens 0: must be at least 1",
    "ppo --temperature nan": "--temperature nan: must be 0, or at least 0.001",
    "ppo --temperature inf": r"--temperature inf: must be below 2\*\*32",
    "ppo --temperature 0": "--temperature 0.0: PPO learns from samples, so it must be above 0",
    "chat --temperature -1": "--temperature -1.0: must be 0, or at least 0.001",
    "chat --temperature nan": "--temperature nan: must be 0, or at least 0.001",
    "chat --temperature inf": r"--temperature inf: must be below 2\*\*32",
    "chat --top-p 0": "--top-p 0.0: must be above 0 and at most 1",
    "chat --top-p 1.5": "--top-p 1.5: must be above 0 and at most 1",
    "chat --top-p nan": "--top-p nan: must be above 0 and at most 1",
    "chat --top-k -1": "--top-k -1: must be at least 0",
    "chat --max-new-tokens 0": "--max-new-tokens 0: must be at least 1",
}
FLAGS = {
    "sft --lrr 1": "unrecognized arguments: --lrr 1",
    "ppo --kl 1": "unrecognized arguments: --kl 1",  # no abbreviations
    "sft toy": "unrecognized arguments: toy",
    "sft --dtype fp16": "argument --dtype: invalid choice: 'fp16' .*",
    "sft --lr": "argument --lr: expected one argument",
    "demo --seed x": "argument --seed: invalid int value: 'x'",
    "sft --out ''": "--out is empty; .*",
    "sft --model ''": "--model is empty; .*",
    "chat --model ' '": "--model is empty; .*",
    "sft --data ''": "--data is empty; .*",
    "ppo --reward ''": "--reward is empty; .*",
    "ppo --reward a,,b": "--reward a,,b: '' is not a reward model folder, .*",
    "ppo --reward rm:nan": "--reward rm:nan: 'rm:nan' is not a reward model folder, .*",
    "sft --data a.jsonl:0.5,b.jsonl": "--data a.jsonl:0.5,b.jsonl: give every source a weight .*",
    "sft --data a.jsonl:-1": "--data a.jsonl:-1: give every source a weight above 0, or none",
    "sft --split 1,2": "--split 1,2: needs three shares, .*",
    "sft --split nan,1,1": "--split nan,1,1: needs three shares, .*",
    "ppo --split 1,1,0": "--split 1,1,0: gives nothing to step 3, which is this one",
    "sft --columns prompt": "--columns prompt: write NEW=OLD, .*",
    "sft --template Human:": "--template 'Human:' has no {prompt} in it, .*",
    "chat --template Human:": "--template 'Human:' has no {prompt} in it, .*",
    "sft --lora x": "--lora x: write a rank, .*",
    "sft --lora -1": "--lora -1: write a rank, .*",
    "sft --lora 8,lr=nan": "--lora 8,lr=nan: write a rank, .*",
    "ppo --lora 8,alpha=0": "--lora 8,alpha=0: write a rank, .*",
    "ppo --model tiny": "--model tiny: its weights are random, .*",
    "ppo --batch-size 10 --minibatches 3":
        "--batch-size 10 cannot be divided by --minibatches 3",
    "ppo --answers-per-prompt 3":
        "--batch-size 512 cannot be divided by --answers-per-prompt 3",
    "ppo --critic-warmup 32":
        "--critic-warmup 32 leaves no iteration for the actor: --iterations is 32",
    "ppo --max-new-tokens 512":
        "--max-new-tokens 512 leaves no room for a prompt in --max-len 512",
    "ppo --ptx-data x --zero 3 --gradient-checkpointing":
        "--ptx-data needs two forwards per backward, .*",
}
FILES = {
    "sft --data nothing.jsonl": "nothing.jsonl: no such file",
    "sft --data folder": "folder: is a folder; to read a folder .*first `pip install datasets`",
    "sft --data some/set": "some/set: is neither a file nor a task .*`pip install datasets`",
    "sft --data some/set:a:b:c": "some/set:a:b:c: write NAME:CONFIGURATION:SPLIT for .*",
    "sft --data table.parquet": "table.parquet: to read parquet first `pip install pyarrow`",
    "sft --data notes.doc": "notes.doc: unknown kind of file '.doc'; known are .jsonl .*",
    "sft --data rules.py": "rules.py: write rules.py:FUNCTION, a generator of rows",
    "ppo --model lm --reward rm --ptx-data nothing.txt": "nothing.txt: no such file",
    "sft --ds-config nothing.json": "--ds-config nothing.json: no such file",
    "ppo --model lm --reward rules.py:nothing":
        "--reward rules.py:nothing: rules.py has no function 'nothing'",
    "ppo --model lm --reward nothing.py:f":
        "--reward nothing.py:f: there is no file nothing.py",
    "ppo --model lm --reward nothing/here": "nothing/here: .*",
    "ppo --model lm --reward out/nothing/here": "out/nothing/here: no such model folder; .*",
    "sft --model nowhere": "no folder nowhere here, and it is not a name of the .* hub .*",
    "sft --model out/nothing": "out/nothing: no such model folder; train one first, .*",
    "chat --model out/nothing": "out/nothing: no such model folder; train one first, .*",
    "sft --out afile": "--out afile: cannot write to this folder .*",
    "sft --out afile/x": "--out afile/x: cannot write to this folder .*",
    "sft --out lm": "--out lm: this folder holds a model that no run has written; name another",
    "sft --model lm --out lm": "--out lm is the folder of a model that this run starts from; .*",
    "sft --resume --overwrite": "--resume goes on with a run and --overwrite removes it; .*",
}
DATA = {
    "sft --data empty.jsonl": "empty.jsonl: has no rows",
    "sft --data broken.jsonl": r"broken.jsonl:2: not valid JSON \(.* at column 10\)",
    "sft --data latin.jsonl": r"latin.jsonl: cannot be read as UTF-8 text \(.*\)",
    "sft --data odd.jsonl": "odd.jsonl: none of its 1 rows can be used. .*unknown fields .*",
    "sft --data asks.jsonl": "asks.jsonl: no row has response, which this step needs. .*",
    "reward --model lm --data demos.jsonl": "demos.jsonl: no row has chosen and rejected, .*",
    "sft --data one.jsonl": "--data one.jsonl: no row is (held out|to train on) .*400 rows .*",
    "sft --data rules.py:nothing": "rules.py:nothing: rules.py has no function 'nothing'",
    "sft --data toy.jsonl --columns prompt=nothing":
        "toy.jsonl: none of its .* rows can be used. .*|--columns .*: no row has nothing; .*",
    "sft --data toy.jsonl --max-len 2": r"toy.jsonl: no row is left \(240 over 2 tokens\)",
    "sft --data toy.jsonl --template chat": "--template chat: this tokenizer has no chat .*",
    "sft --data toy.jsonl --batch-size 5000":
        "--batch-size 5000: the data has only .* rows for this step; make the batch smaller",
    "sft --data toy.jsonl --ds-config auto.json": '--ds-config auto.json: "auto" is a word of .*',
    "sft --data toy.jsonl --ds-config key.json":
        "--ds-config key.json: foo is not a DeepSpeed setting that can be used here",
}
MODELS = {
    "chat --model cut": "cut: the model cannot be loaded .*",
    "sft --model nan --data toy.jsonl":
        "nan: model.norm.weight has values that are NaN or infinite, so the model is broken; .*",
    "chat --model nan": "nan: model.norm.weight has values that are NaN or infinite, .*",
    "sft --model small --data toy.jsonl":
        "small: its tokenizer has token ids up to 256, and the model only 200 tokens; .*",
    "reward --model small --data toy.jsonl": "small: its tokenizer has token ids up to 256, .*",
    "ppo --model small --reward rm --data toy.jsonl": "small: its tokenizer has token ids .*",
    "ppo --model lm --reward small --data toy.jsonl": "small: its tokenizer has token ids .*",
    "chat --model small": "small: its tokenizer has token ids up to 256, .*",
    "chat --model mute": "mute: this model folder has no tokenizer .*",
    "chat --model rm": "rm: this is a reward model .*, and a language model is needed here; .*",
    "sft --model rm --data toy.jsonl": "rm: this is a reward model .*",
    "chat --model lm/adapters":
        "lm/adapters: these are LoRA adapters and not a whole model; take lm, which has .*",
    "chat --model adapters":
        "adapters: these are LoRA adapters and not a whole model; merge them into their base .*",
    PPO + "--reward lm": "lm: is not a reward model .*",
    PPO + "--critic lm": "lm: is not a reward model .*",
    PPO + "--reward other": "other has another tokenizer than --model: .*",
    PPO + "--reward narrow": "--model has 258 token ids and narrow only 257: .*",
    PPO + "--max-new-tokens 600 --max-len 700":
        "--max-new-tokens 600 leaves no room for a prompt in the models' context of 512 tokens",
    "sft --model lm --data toy.jsonl --lora 8,targets=nothing":
        "--lora 8,targets=nothing: this model has no layer 'nothing'; it has .*",
    "chat --model lm --template chat --prompt x": "--template chat: this tokenizer has no chat .*",
    f"chat --model lm --prompt {'a' * 600}":
        "a prompt of .* tokens and --max-new-tokens 128 exceed the model's context of 512; .*",
}
RUNS = {
    PPO + "--reward rules.py:constant":
        "--reward constant: all 8 answers of the first rollout have the score 1, .*",
    PPO + "--reward rules.py:none": "--reward rules.py:none: returned None, .*",
    PPO + "--reward rules.py:few": "--reward rules.py:few: gave 1 scores for .* prompts; .*",
    PPO + "--reward rules.py:needs_answer":
        "--reward rules.py:needs_answer: its parameter 'answer' is not a field of the rows; .*",
    PPO + "--batch-size 5000 --minibatches 1": "--batch-size 5000: the data has only .*",
    PPO + "--actor-lr 1e9 --ppo-epochs 2 --iterations 9":
        "the model's log-probabilities are NaN or infinite: training has diverged, .*|"
        "the last 5 steps had a loss or a gradient that is not finite, .*",
    "sft --data toy.jsonl --lr 1e9 --epochs 1 " + TINY:
        "the last 5 steps had a loss or a gradient that is not finite, .*|"
        ".*: the last . steps of this run had a loss or a gradient that is not finite, .*",
}
RULES = """
def constant(completions, **kwargs):
    return [1.0 for _ in completions]

def none(completions, **kwargs):
    return None

def few(completions, **kwargs):
    return [1.0]

def length(completions, **kwargs):
    return [len(completion) for completion in completions]

def needs_answer(completions, answer):
    return [1.0 for _ in completions]
"""


def copy_of(folder, name, change=None):
    """A model folder again, with its state dict changed."""
    shutil.copytree(folder, folder.parent / name)
    if change:
        model = models.load_lm(str(folder), torch.float32)
        change(model)
        model.save_pretrained(folder.parent / name)
    return folder.parent / name


@pytest.fixture(scope="session")
def place(tmp_path_factory, toy_file, tok):
    """A folder with models and data, most of them broken in some way."""
    root = tmp_path_factory.mktemp("mistakes")
    torch.manual_seed(0)
    lm = root / "lm"
    models.tiny_lm().save_pretrained(lm)
    tok.save_pretrained(lm)
    make_models(root, lm, tok)

    shutil.copy(toy_file, root / "toy.jsonl")
    rows = [json.loads(line) for line in open(toy_file)]
    write_rows(root / "demos.jsonl", [{k: row[k] for k in ("prompt", "response")} for row in rows])
    write_rows(root / "asks.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write_rows(root / "one.jsonl", [{"prompt": "x", "response": str(i)} for i in range(400)])
    write_rows(root / "odd.jsonl", [{"colour": "red"}])
    (root / "empty.jsonl").write_text("")
    (root / "broken.jsonl").write_text('{"text": "x"}\n{"text": "x')
    (root / "latin.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
    for name in ("notes.doc", "table.parquet", "afile"):
        (root / name).write_text("x")
    (root / "folder").mkdir()
    (root / "rules.py").write_text(RULES)
    write_rows(root / "auto.json", [{"gradient_clipping": "auto"}])
    write_rows(root / "key.json", [{"foo": 1}])
    return root


def make_models(root, lm, tok):
    def make_nan(model):
        model.model.norm.weight.data[3] = float("nan")

    copy_of(lm, "nan", make_nan)
    copy_of(lm, "small", lambda model: model.resize_token_embeddings(200))
    cut = copy_of(lm, "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    mute = copy_of(lm, "mute")
    for path in mute.glob("tokenizer*"):
        path.unlink()
    for folder in (lm / "adapters", root / "adapters"):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")

    reward_model = models.RewardModel.from_lm(str(lm), torch.float32).model
    reward_model.config.score_offset = 0.0
    reward_model.config.score_scale = 1.0
    reward_model.save_pretrained(root / "rm")
    tok.save_pretrained(root / "rm")
    other = root / "other"
    shutil.copytree(root / "rm", other)
    text = (other / "tokenizer.json").read_text()
    swapped = json.loads(text)
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(swapped))
    shutil.copytree(root / "rm", root / "narrow")
    reward_model.resize_token_embeddings(257)
    reward_model.config.pad_token_id = None
    reward_model.save_pretrained(root / "narrow")


class Stopped(Exception):
    """In place of the end of the process."""


@pytest.fixture
def start(place, monkeypatch, capsys):
    """start(command, stdin=b""): runs a script as `python script.py flags` does. Returns the line
    that it ends with on standard error, and its exit code."""
    def stop(line, code):
        raise Stopped(line, code)

    def run(command, stdin=b""):
        name, *argv = shlex.split(command)
        script = SCRIPTS[name]
        if name in ("sft", "reward", "ppo") and "--out" not in argv:
            argv += ["--out", "x", "--overwrite"]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            utils.run(script.main, script.Config)
        except Stopped as end:
            return end.args
        except SystemExit as end:  # of argparse
            return capsys.readouterr().err.rstrip("\n"), end.code
        return "", 0

    monkeypatch.chdir(place)
    monkeypatch.setattr(utils, "stop", stop)
    # Other tests go on in this process.
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if they were not installed
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    yield run
    if training.FolderLock.file:
        training.FolderLock.file.close()


TABLE = {**NUMBERS, **FLAGS, **FILES, **DATA, **MODELS, **RUNS}


@pytest.mark.parametrize("mistake", TABLE, ids=lambda command: command[:60])
def test_a_mistake_gets_one_sentence_and_exit_code_2(mistake, start):
    line, code = start(mistake)
    assert code == 2, f"{mistake}: ends with code {code}: {line}"
    assert "\n" not in line
    expected = f"error: ({TABLE[mistake]})" + re.escape(" (--help lists all flags)")
    assert re.fullmatch(expected + "|" + f"error: ({TABLE[mistake]})", line), line


def test_every_number_that_a_user_can_give_has_a_range():
    for script in (sft, reward, ppo, chat):
        for field in dataclasses.fields(script.Config):
            is_number = isinstance(field.default, (int, float)) and field.type is not bool
            assert not is_number or field.name in utils.NUMBERS, field.name


def test_under_a_launcher_rank_0_tells_of_a_mistake_and_the_others_wait_to_be_ended(
        start, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    for rank, expected in (("0", []), ("1", [5])):
        monkeypatch.setenv("RANK", rank)
        start("sft --lr nan")
        assert slept == expected, rank


# -----------------------------------------------------------------------------
# learning rates


def test_a_pretrained_model_with_the_learning_rate_of_the_toy_gets_a_warning(start, place, capsys):
    for name, model in (("of-tiny", "tiny"), ("of-that", "of-tiny"), ("of-lm", "lm")):
        (place / name).mkdir(exist_ok=True)
        write_rows(place / name / "run.json", [{"config": {"model": model}}])

    def warnings(Config, **usual):
        for model in ("lm", "of-lm", "tiny", "of-tiny", "of-that"):
            for flags in ({}, {name: 1e-6 for name in usual}):
                if model != "tiny" or Config != ppo.Config:
                    models.warn_of_toy_lr(Config(model=model, **flags), **usual)
        return capsys.readouterr().out.splitlines()

    lines = warnings(sft.Config, lr="1e-5")
    assert len(lines) == 2 and all(line.startswith("warning: --lr 0.001, the") for line in lines)
    assert "such as lm about 1e-5 is usual" in lines[0] and "of-lm" in lines[1]
    lines = warnings(ppo.Config, actor_lr="1e-6", critic_lr="5e-6")
    assert len(lines) == 4 and "--actor-lr 0.0003" in lines[0] and "--critic-lr" in lines[1]
    models.warn_of_toy_lr(sft.Config(model="lm", lora="8,lr=1e-4"), lr="1e-5")
    assert not capsys.readouterr().out, "adapters have their own rate"


# -----------------------------------------------------------------------------
# the screen

SFT = "sft --model lm --data toy.jsonl --lr 1e-3 --epochs 0.1 " + TINY


def lost_stream(how):
    """A standard output that cannot be written to."""
    if how == "closed":
        return None
    if how == "full":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.parametrize("how, reason", [
    ("closed", None), ("full", "No space left on device"), ("pipe", "Broken pipe")])
def test_training_goes_on_where_standard_output_is_lost(
        how, reason, start, place, monkeypatch, capsys):
    shutil.rmtree(place / "x", ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", lost_stream(how))
        assert start(SFT) == ("", 0)
        sys.stdout.close()
    warnings = capsys.readouterr().err
    expected = f"warning: standard output is lost ({reason}); the run goes on\n" if reason else ""
    assert warnings == expected, "once, and only where it is news"
    assert (place / "x" / "model.safetensors").exists()
    assert len(open(place / "x" / "metrics.jsonl").readlines()) == 2


@pytest.mark.parametrize("how", ["full", "pipe"])
def test_an_answer_that_cannot_be_printed_is_an_error(how, start, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", lost_stream(how))
        line, code = start("chat --model lm --prompt x --max-new-tokens 3")
        utils.discard_output(sys.stdout)
        sys.stdout.close()
    assert code == 2
    assert line.startswith("error: standard output cannot be written to (")


def test_what_a_terminal_cannot_show_is_escaped(start, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stdin", None)
    utils.prepare_streams()
    utils.print0("caf\xe9 \u2501 \udce9")  # the last one is a byte of a file's name
    assert screen.buffer.getvalue() == b"caf\\xe9 \\u2501 \\udce9\n"


def test_the_table_of_ppo_fits_in_80_columns(start, capsys):
    flags = "--reward rules.py:length --actor-lr 1e-3 --critic-lr 1e-3 --iterations 1"
    assert start(PPO + flags) == ("", 0)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if re.match(r" *(step|1/1)  ", line)]
    assert len(table) == 2
    assert max(map(len, table)) <= 80 - 4, "1/1 may be 100/100"


def test_ctrl_c_while_models_are_loaded_is_one_line(start, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(models, "load_lm", interrupt)
    assert start(SFT) == ("\nstopped by Ctrl-C", 130)


def test_the_end_of_another_rank_is_one_line_and_another_error_is_not(start, monkeypatch):
    def fail(*args):
        raise RuntimeError(text)
    monkeypatch.setattr(models, "load_lm", fail)
    text = "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:47211"
    expected = "error: another rank has ended; its own message, or the launcher's, says why"
    assert start(SFT) == (expected, 1)
    text = "size mismatch"
    with pytest.raises(RuntimeError, match="size mismatch"):
        start(SFT)


# -----------------------------------------------------------------------------
# the chat


class Terminal(io.TextIOWrapper):
    """Standard output that is a terminal; `text` is what was printed on it."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")

    def isatty(self):
        return True

    @property
    def text(self):
        return self.buffer.getvalue().decode()


@pytest.fixture
def answers(monkeypatch):
    """A list of answers, each a list of pieces, that the chat gives instead of a model's. An
    exception among the pieces is raised. `answers.prompts` are the prompts that it was given."""
    class Answers(list):
        prompts = []

    given = Answers()
    given.prompts = []

    def answer_texts(engine, tokenizer, ids, cfg, turn):
        given.prompts.append(tokenizer.decode(ids))
        text = ""
        for piece in given[turn]:
            if isinstance(piece, type):
                raise piece
            text += piece
            yield text

    monkeypatch.setattr(chat, "answer_texts", answer_texts)
    return given


def test_standard_output_holds_the_answer_and_nothing_else(start, place, tok, capsys):
    assert start("chat --model lm --prompt 'copy abc' --max-new-tokens 9 --seed 3") == ("", 0)
    printed = capsys.readouterr()
    lm = models.load_lm("lm", torch.float32)
    ids = tok("Human: copy abc\nAssistant:")["input_ids"]
    out = chat.make_engine("hybrid", lm).generate([ids], 9, eos_token_id=tok.eos_token_id, seed=3)
    answer = tok.decode(out.tokens[0, len(ids) :], skip_special_tokens=True)
    assert printed.out.removesuffix("\n") == answer.encode(errors="replace").decode()
    assert "KV cache" not in printed.err


def test_a_conversation_from_a_pipe_is_answered_line_by_line(start, answers, capsys):
    answers += [["one"], ["two", " three"]]
    assert start("chat --model lm", stdin=b"hello\ncaf\xe9\n") == ("", 0)
    printed = capsys.readouterr()
    assert printed.out == "one\ntwo three\n"
    assert printed.err.count("Assistant: ") == 2 and printed.err.count("Human: ") == 4
    assert printed.err.count("(bytes that are not UTF-8 were replaced)") == 1
    assert "caf\ufffd" in answers.prompts[1]
    assert answers.prompts[1].startswith(answers.prompts[0] + " one\n"), "with the turn before"


def test_turns_that_no_longer_fit_are_dropped(start, answers, capsys):
    answers += [["a"], ["b"], ["c"]]
    turns = "copy abc\nreverse " + "abcdefgh" * 30 + "\nsort " + "zyx" * 80 + "\n"
    assert start("chat --model lm --max-new-tokens 5", stdin=turns.encode()) == ("", 0)
    printed = capsys.readouterr()
    assert printed.out == "a\nb\nc\n"
    assert "(the oldest turn was dropped" in printed.err
    assert answers.prompts[2].startswith("Human: sort zyx"), "questions go with their answers"


def test_ctrl_c_ends_an_answer_and_keeps_the_conversation(start, answers, capsys):
    answers += [["ab", KeyboardInterrupt], ["cd"]]
    assert start("chat --model lm", stdin=b"x\ny\n") == ("", 0)
    assert capsys.readouterr().out == "ab\ncd\n"
    assert " ab\n" in answers.prompts[1], "what had come of the answer"

    answers[:] = [["ab", KeyboardInterrupt]]
    assert start("chat --model lm --prompt x") == ("\nstopped by Ctrl-C", 130)


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave(end, start, monkeypatch):
    def read(*prompt):
        raise end
    monkeypatch.setattr("builtins.input", read)
    assert start("chat --model lm") == ("", 0)


def test_a_terminal_never_obeys_a_model(start, answers, monkeypatch, capsys):
    text = "a\x1b[2J\x9b\r\x07\t\xe9\n\u4e2d"
    answers.append([text])
    assert start("chat --model lm --prompt x") == ("", 0)
    assert capsys.readouterr().out == text + "\n", "a program gets the text as it is"
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert start("chat --model lm --prompt x") == ("", 0)
    assert terminal.text == "a\\x1b[2J\\x9b\\r\\x07\t\xe9\n\u4e2d\n"


def test_the_chat_speaks_as_the_model_was_trained(start, answers, place, tok, capsys):
    answers.append(["yes"])
    trained = copy_of(place / "lm", "trained")
    template = "Q: {prompt}\\nA:"  # as a shell passes it
    write_rows(trained / "run.json", [{"config": {"template": template}}])
    saying = copy_of(place / "lm", "saying")
    (saying / "chat_template.jinja").write_text("[{{ messages[0].content }}]")

    expected = {
        "chat --model trained --prompt x": "Q: x\nA:",
        "chat --model trained --prompt x --template 'U: {prompt}'": "U: x",
        "chat --model saying --prompt x": "[x]",
        "chat --model lm --prompt x --template '{prompt}'": "x",
        "chat --model lm --prompt x": data.DEFAULT_TEMPLATE.format(prompt="x"),
    }
    notes = []
    for command, prompt in expected.items():
        assert start(command) == ("", 0)
        assert answers.prompts[-1] == prompt, command
        notes.append("does not say how its prompts are written" in capsys.readouterr().err)
    assert notes == [False, False, False, False, True]


# -----------------------------------------------------------------------------
# real processes


def shell(command, place):
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in launcher}
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_run_outlives_what_reads_it(place):
    script = f"{sys.executable} {HERE / 'sft.py'} {SFT.removeprefix('sft')} --out piped"
    code, out, err = shell(f"set -o pipefail; {script} | head -n 1", place)
    assert code == 0, err
    assert out.count("\n") == 1
    assert err.strip() == "warning: standard output is lost (Broken pipe); the run goes on"
    assert (place / "piped" / "model.safetensors").exists()


def test_a_mistake_of_a_process_without_standard_output_is_one_line(place):
    script = f"{sys.executable} {HERE / 'chat.py'} --model rm"
    code, out, err = shell(f"PYTHONIOENCODING=ascii {script} <&- >&-", place)
    assert code == 2
    assert err.startswith("error: rm: this is a reward model") and err.count("\n") == 1
