import importlib
import re
import shlex
import shutil

from prelude import *
from prelude import long

# -----------------------------------------------------------------------------
# 12. chat.py, and what a newcomer types first


@pytest.fixture
def talk(small, monkeypatch, capsys):
    """talk(*lines, **flags): what chat.py prints where a user types these lines to a small model,
    which answers greedily. talk.asked: the texts that it was asked."""
    import chat

    render = data.render

    def recorded(*args):
        talk.asked.append(render(*args))
        return talk.asked[-1]

    def talk(*lines, **flags):
        talk.asked = []
        typed = iter([*lines, ""])
        monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
        chat.main(chat.Config(**{"model": small, "temperature": 0.0, "max_new_tokens": 6, **flags}))
        return capsys.readouterr().out

    monkeypatch.setattr(data, "render", recorded)
    return talk


def greedy_answer(folder, text, tok):
    """The answer of transformers."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder)
    ids = tok(f"Human: {text}\nAssistant:", return_tensors="pt")["input_ids"]
    out = lm.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.size(1) :]
    return tok.decode(out, skip_special_tokens=True).strip()


def test_chat_prints_the_answer_alone_for_one_prompt_and_both_of_two_models(
        talk, small, chain, tok):
    expected = greedy_answer(small, "reverse lamu", tok)
    for engine in ("hybrid", "hf"):
        assert talk(prompt="reverse lamu", engine=engine).strip() == expected != "", engine
    out = talk("sort boda", compare=chain["sft"][0])
    for name in (small, chain["sft"][0]):
        assert f"{name}: {greedy_answer(name, 'sort boda', tok)}" in out


def test_chat_ends_an_answer_at_each_id_that_the_folder_names(talk, small, tok, tmp_path,
                                                              monkeypatch):
    folder = shutil.copytree(small, tmp_path / "model")
    ends = {"eos_token_id": [tok.eos_token_id, tok.pad_token_id]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    asked = []
    monkeypatch.setattr(HybridEngine, "stream", lambda *args: asked.append(args) or [])
    talk(prompt="?", model=str(folder))
    assert [tok.eos_token_id, tok.pad_token_id] in asked[0]


@pytest.mark.parametrize("turns, flag", ((1, False), (2, False), (1, True)))
def test_chat_goes_on_in_turns_where_the_model_was_trained_on_them(
        talk, small, tmp_path, turns, flag):
    words = [{"role": role, "content": "hi"} for role in ("user", "assistant") * turns]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": words}] * 3)
    folder = shutil.copytree(small, tmp_path / "model")
    (folder / "run.json").write_text(json.dumps({"config": {"data": rows}}))
    said = talk("one", "two", model=str(folder), turns=flag).splitlines()[0]
    before = f"Human: one\nAssistant: {said.removeprefix('Assistant: ')}\n"
    assert talk.asked[1] == before * (turns > 1 or flag) + "Human: two\nAssistant:"


def test_chat_prints_a_character_of_several_tokens_when_it_is_whole(talk, monkeypatch, tok):
    stream = tok("né€ ok")["input_ids"]
    monkeypatch.setattr(hybrid_engine.HybridEngine, "stream", lambda *args: stream)
    assert talk(prompt="?") == "né€ ok\n"


def readme_commands():
    """[(launcher, script, flags)]"""
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    return re.findall(r"^(python|torchrun .*?) (\w+\.py|-m tools\.demo)([^#\n]*)", text, re.M)


def test_each_command_of_the_readme_has_flags_that_exist():
    assert len(readme_commands()) > 5
    for _, script, flags in readme_commands():
        module = importlib.import_module(script.removeprefix("-m ").removesuffix(".py"))
        utils.parse_args(module.Config, shlex.split(flags))


@long
def test_make_demo_and_each_ppo_of_the_readme_after_it_end_better_than_they_began(tmp_path):
    repo = shutil.copytree(HERE, tmp_path / "repo", ignore=shutil.ignore_patterns(".*", "out"))
    after = [shlex.split(flags) for launcher, script, flags in readme_commands()
             if (launcher, script) == ("python", "ppo.py") and "--model" not in flags]
    for args in (["-m", "tools.demo"], *(["ppo.py", *flags] for flags in after)):
        code, printed = command(*args, cwd=repo)
        assert code == 0, printed
        out = repo / (args[args.index("--out") + 1] if "--out" in args else "out/ppo")
        rows = read_lines(out / "metrics.jsonl")
        gold = [row["eval_toy_correct"] for row in rows if "eval_toy_correct" in row]
        assert gold[-1] > gold[0] + 0.2, (args, gold)
    assert 0.55 < json.loads((repo / "out/demo/summary.json").read_text())["sft"]["gold"] < 0.7
