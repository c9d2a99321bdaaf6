# -----------------------------------------------------------------------------
# 11. flags, and what a user can do wrong
from prelude import *
from prelude import long, some

import dataclasses
import inspect
import shlex

import chat

SCRIPTS = {"sft": sft, "reward": reward, "ppo": ppo, "chat": chat}


def helps(Config):
    """{flag: what --help says of it, as a regular expression finds it in the source}."""
    comment = r"^    (\w+): .*?  # (.*(?:\n    #   .*)*)$"
    return dict(re.findall(comment, inspect.getsource(Config), re.M))


def test_flags_that_scripts_share_agree_in_type_and_help_and_none_is_without_help(capsys):
    special = {"model", "batch_size", "epochs", "lr", "seed", "max_new_tokens"}
    types = {}
    for script, most in ((sft, 20), (reward, 20), (ppo, 35)):
        fields = dataclasses.fields(script.Config)
        assert len(fields) <= most
        help_of = helps(script.Config)
        for field in fields:
            assert help_of.get(field.name), f"{script.__name__} --{field.name}: no help"
            entry = (field.type, "" if field.name in special else help_of[field.name])
            assert types.setdefault(field.name, entry) == entry, (script.__name__, field.name)
        with pytest.raises(SystemExit):
            utils.parse_args(script.Config, ["--help"])
        printed = " ".join(capsys.readouterr().out.split())
        for name, text in help_of.items():
            assert " ".join(text.replace("#", "").split()) in printed, name


def test_a_number_outside_of_its_range_and_a_wrong_flag_are_refused_in_one_line(capsys):
    for script in SCRIPTS.values():
        for field in dataclasses.fields(script.Config):
            if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
                for value in ("-1", "nan") if isinstance(field.default, float) else ("-1",):
                    refuse(script, f"--{field.name}", value)
    for line in ("--lrr 1", "toy", "--dtype fp16", "--zero 4", "--batch-size 1.5", "--lr",
                 "--lr inf", "--lr 1e-5x"):
        refuse(sft, *line.split())
    refuse(ppo, "--kl", "1")  # no abbreviations
    cfg = utils.parse_args(ppo.Config, ["--kl_coef", "0.1", "--kl-coef", "0.2", "--resume"])
    assert cfg == ppo.Config(kl_coef=0.2, resume=True), "both spellings"


def refuse(script, *argv):
    with pytest.raises((utils.UserError, SystemExit)):
        utils.parse_args(script.Config, argv)


SMALL = "--batch-size 8 --held-out 0.2 --max-len 64 "
PPO = "ppo --model lm --reward rm --data toy.jsonl --max-new-tokens 8 --minibatches 2 " + SMALL
MISTAKES = {
    "sft --data nothing.jsonl": "--data nothing.jsonl: no such file",
    "sft --data odd.jsonl": "--data odd.jsonl: too few .*: 1 unusable; .*'colour'.*",
    "sft --data toy.jsonl --split 1,2": "--split 1,2: needs three shares.*",
    "sft --data toy.jsonl:0.5,odd.jsonl": ".*: give every source a weight above 0, or none",
    "sft --data toy.jsonl --batch-size 5000": "--batch-size 5000: there are only .* rows .*",
    "sft --data toy.jsonl --max-len 2": ".*too few.*(--split, --held-out).*",
    "sft --template Human:": "--template 'Human:' has no {prompt} in it",
    "sft --model out/nothing": "out/nothing: no such model folder; .*",
    "sft --model rm --data toy.jsonl": "rm: .*score.weight.*",
    "sft --out lm": "--out lm holds a finished run; .*",
    "sft --out other": "--out other holds a run or a model; .*",
    "reward --model lm --data demos.jsonl": "--data demos.jsonl: .*",
    "ppo --batch-size 10 --minibatches 3": "--batch-size 10 is no multiple of --minibatches",
    "ppo --answers-per-prompt 3": "--batch-size 512 is no multiple of --answers.per.prompt",
    "ppo --temperature 0": "--temperature 0: PPO learns from samples",
    "ppo --ptx-data x --zero 3 --gradient-checkpointing": "--ptx-data with --zero 3 .*",
    PPO + "--reward lm": "lm: not a whole .*",
    PPO + "--critic lm": "lm: not a whole .*",
    PPO + "--reward rules.py:constant": "--reward: every answer has the same score, .*",
    PPO + "--reward rules.py:few": "--reward few: 1 scores, .* answers",
    PPO + "--max-new-tokens 64": ".*too few.*(--split, --held-out).*",
    PPO + "--tp 2 --engine hf": "--tp needs --engine hybrid",
    PPO + "--actor-lr 1e9 --ppo-epochs 2 --iterations 9":
        "the model's log-probabilities are NaN or infinite: .*|5 steps in a row had .*",
    "sft --model lm --data toy.jsonl --lr 1e9 --epochs 3 " + SMALL:
        "5 steps in a row had a gradient that is not finite: lower --lr|.*is not finite.*",
}


@pytest.fixture(scope="session")
def place(chain, toy_file, tmp_path_factory):
    """A folder with models and data, some of them broken in some way."""
    root = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(chain["sft"][0], root / "lm")
    shutil.copytree(chain["reward"][0], root / "rm")
    (root / "other").mkdir()
    shutil.copy(root / "lm" / "config.json", root / "other")
    shutil.copy(toy_file, root / "toy.jsonl")
    write_rows(root / "odd.jsonl", [{"colour": "red"}])
    rows = [{key: row[key] for key in ("prompt", "response")} for row in read_lines(toy_file)]
    write_rows(root / "demos.jsonl", rows)
    (root / "rules.py").write_text(
        "def constant(completions):\n    return [1.0] * len(completions)\n"
        "def few(completions):\n    return [1.0]\n")
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    script, *argv = shlex.split(mistake)
    argv = argv if "--out" in argv else argv + ["--out", str(tmp_path / "x")]
    with pytest.raises(utils.UserError) as caught:
        SCRIPTS[script].main(utils.parse_args(SCRIPTS[script].Config, argv))
    message = str(caught.value)
    assert re.fullmatch(MISTAKES[mistake], message), message
    assert not list(tmp_path.glob("x/*.safetensors"))


def commands_in(text):
    """The commands that start a script of ours, as lists of words, in Markdown or a docstring."""
    text = text.replace("\\\n", " ")
    for line in re.findall(r"^(?:    |`*)((?:python|torchrun|deepspeed) [^`\n]*)", text, re.M):
        yield shlex.split(line.partition("  #")[0])


def test_the_commands_in_the_readme_and_in_docstrings_can_be_typed_as_they_stand():
    pages = [HERE / "README.md", HERE / "recipes" / "README.md"]
    texts = {page: page.read_text() for page in pages if page.exists()}
    texts |= {name: script.__doc__ for name, script in SCRIPTS.items()}
    for where, text in texts.items():
        found = list(commands_in(text))
        assert found, where
        for words in found:
            names = [word for word in words if word in {f"{name}.py" for name in SCRIPTS}]
            if not names:
                tools = [word for word in words if word.startswith("tools.")]
                assert tools and (HERE / tools[0].replace(".", "/")).with_suffix(".py").exists()
                continue
            script = SCRIPTS[names[0].removesuffix(".py")]
            argv = words[words.index(names[0]) + 1 :]
            cfg = utils.parse_args(script.Config, argv)
            if where in pages and script is not chat:
                assert "--out" in argv, f"{where}: the demo's own folder is there: {words}"
            assert cfg


@long
def test_a_copy_of_a_script_with_one_more_flag_and_metric_runs_under_torchrun(
        chain, toy_file, tmp_path):
    source = Path(ppo.__file__).read_text()
    for line, new in (
            ("    # PPO\n", "    entropy_coef: float = 0.0     # of a bonus\n"),
            ("            loss = policy_loss * weight\n",
             "            loss = loss - cfg.entropy_coef * (entropy * b.mask).mean()\n"),
            ('                "entropy": entropy.detach(),\n',
             '                "surprise": -logprobs.detach(),\n')):
        assert source.count(line) == 1, line
        source = source.replace(line, line + new)
    (HERE / "ppo_x.py").write_text(source)
    flags = dict(COMMON, model=chain["sft"][0], reward=chain["reward"][0], data=toy_file,
                 iterations=1, minibatches=2, max_new_tokens=8, entropy_coef=0.01,
                 out=tmp_path / "x")
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    try:
        code, printed = command("-m", "torch.distributed.run", "--nproc_per_node", 2,
                                "--master_port", free_port(), "ppo_x.py", *argv)
    finally:
        (HERE / "ppo_x.py").unlink()
    assert code == 0, printed
    assert read_lines(tmp_path / "x" / "metrics.jsonl")[-1]["surprise"] > 0
