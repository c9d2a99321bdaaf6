"""The page to look at runs (look.py, look.html), and tokens.jsonl, which it shows.

    pytest test_look.py -k browser      # these need Chromium, and playwright from PyPI
"""
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

from testing import HERE, train, write_rows  # before torch: it sets environment variables

import numpy as np
import pytest
import torch

import look
import ppo
import utils

PPO = dict(held_out=0.2, batch_size=8, max_len=64, iterations=2, minibatches=2, max_new_tokens=12)


# -----------------------------------------------------------------------------
# tokens.jsonl


@pytest.fixture(scope="module")
def with_tool(chain, toy_file, tmp_path_factory):
    """PPO with a tool between turns, of which every token is kept: (folder, metrics, batches)."""
    root = tmp_path_factory.mktemp("look")
    (root / "tool.py").write_text(
        "def more(row, answer):\n    return ' ok' if 'ok' not in answer else None\n")
    batches = []
    real = ppo.update

    def update(batch, *arguments):
        batches.append(batch)
        return real(batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "update", update)
        patch.setattr(ppo, "TOKEN_ROWS", PPO["batch_size"])
        metrics = train(
            ppo, root / "ppo", model=chain["sft"][0], reward=chain["reward"][0], data=toy_file,
            respond=f"{root}/tool.py:more", **PPO)
    return root / "ppo", metrics, batches


def read_tokens(folder):
    return [json.loads(line) for line in open(Path(folder) / "tokens.jsonl")]


def test_tokens_jsonl_holds_the_numbers_of_the_batch_under_the_names_of_rlloggingboard(
        with_tool, tok):
    folder, _, batches = with_tool
    lines = read_tokens(folder)
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8
    assert any(0 in line["mask"] for line in lines), "the tool has said something"
    for line, (batch, row) in zip(lines, [(batch, row) for batch in batches for row in range(8)]):
        n = int(batch.answer_lens[row])
        ids = batch.tokens[row, batch.prompt_lens[row] :][:n].tolist()
        assert (line["prompt"], line["response"]) == (batch.prompts[row], batch.answers[row])
        assert line["response_tokens"] == [tok.decode([i]) for i in ids]
        [scores] = batch.scores.values()
        assert line["reward"] == pytest.approx(scores[row].item(), abs=1e-5)
        for name, x in {
            "logprobs": batch.old_logprobs, "ref_logprobs": batch.ref_logprobs,
            "values": batch.values, "token_rewards": batch.rewards, "ratio": batch.ratio,
            "advantages": batch.advantages, "returns": batch.returns, "mask": batch.mask,
        }.items():
            assert line[name] == pytest.approx(x[row, :n].float().tolist(), abs=1e-5), name
            assert not x[row, n:].any() or name in ("ratio", "values"), "nothing is cut off"


def test_the_terms_of_the_loss_in_tokens_jsonl_average_to_the_loss_that_is_logged(with_tool):
    folder, metrics, _ = with_tool
    for row in metrics[1:]:
        terms, ratios = [], []
        for line in read_tokens(folder):
            if line["step"] != row["step"]:
                continue
            for advantage, ratio, sampled in zip(line["advantages"], line["ratio"], line["mask"]):
                if sampled:
                    clipped = min(max(ratio, 0.8), 1.2)
                    terms.append(max(-advantage * ratio, -advantage * clipped))
                    ratios.append(ratio)
        assert np.mean(terms) == pytest.approx(row["actor_loss"], abs=1e-5)
        assert np.mean(ratios) == pytest.approx(row["ratio_mean"], abs=1e-5)
        assert max(ratios) == pytest.approx(row["ratio_max"], abs=1e-5)
        assert len(terms) == round(row["length"] * 8), "the number that the page divides by"


def test_a_few_answers_of_different_minibatches_are_kept(chain):
    lines = read_tokens(chain["ppo"][0])
    assert len(lines) == 3 * 4
    for line in lines:
        assert all(ratio > 0 for ratio in line["ratio"])
    samples = [json.loads(line) for line in open(Path(chain["ppo"][0]) / "samples.jsonl")]
    for line in lines:
        of_sample = [
            s for s in samples
            if (s["iteration"], s["prompt"], s["answer"])
            == (line["step"], line["prompt"], line["response"])]
        assert of_sample and of_sample[0]["tokens"] == sum(line["mask"])


def test_answers_that_this_rank_has_not_trained_on_and_numbers_that_are_not_there_are_left_out(tok):
    ones = torch.ones(3, 2)
    batch = ppo.Batch(
        tokens=torch.full((3, 4), 9), prompt_lens=torch.tensor([2, 2, 2]),
        answer_lens=torch.tensor([2, 1, 2]), mask=ones.bool(), finished=ones[:, 0].bool(),
        sample_logprobs=ones, prompts=["a", "b", "c"], answers=["x", "y", "z"], row_fields={},
        old_logprobs=-ones, ref_logprobs=-ones, rewards=ones, advantages=ones,
        scores={"rm": torch.tensor([0.5, 1.5, 2.5])})
    batch.put([0, 1], ratio=ones[:2])  # row 2 is another rank's
    lines = list(ppo.tokens_for_log(batch, 7, [ppo.Scorer("rm", 2.0)], tok))
    assert [line["prompt"] for line in lines] == ["a", "b"]
    assert [line["reward"] for line in lines] == [1.0, 3.0]
    assert [len(line["mask"]) for line in lines] == [2, 1]
    assert not {"values", "returns"} & set(lines[0]), "this run has no critic"


def test_a_resumed_run_drops_the_lines_past_its_checkpoint_and_a_new_one_all(tmp_path):
    cfg = ppo.Config(out=str(tmp_path))
    utils.init_distributed(0)
    path = tmp_path / "tokens.jsonl"
    rows = [{"step": step, "reward": 1.0} for step in (1, 1, 2, 2, 3)]
    write_rows(path, rows)
    log = utils.Log(cfg, 4, {}, start=2)
    for step in (3, 4):
        log.samples([{"step": step}], "tokens.jsonl", "step")
        log.samples([{"iteration": step}])
    assert [row["step"] for row in read_tokens(tmp_path)] == [1, 1, 2, 2, 3, 4]
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 2
    utils.Log(cfg, 4, {})
    assert not path.exists()


# -----------------------------------------------------------------------------
# what metrics mean

# What is logged on a GPU, by --engine hf, with several scorers, rankings, or a task's checker.
SOMETIMES = {
    "engine_floor_share", "engine_generate_s", "score_brevity", "score_brevity_std",
    "held_out_tau", "gold", "eval_gold", "eval_ema_gold"}


def test_every_metric_that_a_script_logs_is_explained_and_no_other(chain):
    logged = set(SOMETIMES)
    for _, metrics in chain.values():
        for row in metrics:
            logged |= set(row) - {"step"}
    for name in logged:
        group, text = look.explain(name)
        assert group != look.OTHER and text.endswith("."), f"{name} is not explained in look.py"
        assert len(text) <= 200, name
    described = {name for texts in look.METRICS.values() for name in texts}
    described -= {"score_NAME", "score_NAME_std"}
    assert described <= logged, "these are logged no more"
    assert look.explain("of_somebody") == (look.OTHER, "")


# -----------------------------------------------------------------------------
# the page


class Scripts(html.parser.HTMLParser):
    """What a browser takes for the contents of script elements."""

    def __init__(self, text):
        super().__init__()
        self.contents = []
        self.inside = False
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag == "script"
        if self.inside:
            self.contents.append("")
        for name, value in attributes:
            assert name not in ("src", "style") and not name.startswith("on"), (tag, name)
            assert name != "href" or value.startswith("#"), value

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.contents[-1] += text


def content_of(path):
    """The data of a page."""
    return json.loads(Scripts(Path(path).read_text()).contents[0])


def make_run(folder, metrics, samples=(), tokens=()):
    """The folder of a run, as far as look.py reads it."""
    folder.mkdir(parents=True)
    write_rows(folder / "metrics.jsonl", metrics)
    if samples:
        write_rows(folder / "samples.jsonl", samples)
    if tokens:
        write_rows(folder / "tokens.jsonl", tokens)
    return folder


def sample(iteration, prompt, answer, score=0.0, **more):
    return {"iteration": iteration, "prompt": prompt, "answer": answer, "score": score, **more}


def test_a_page_has_all_metrics_of_all_runs_and_needs_no_network(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(look, "draw", lambda runs, path: None)  # of 70 metrics: takes long
    folder = tmp_path / "ppo"
    shutil.copytree(chain["ppo"][0], folder)
    path = look.write([folder, chain["sft"][0], chain["reward"][0], folder])
    assert path == folder / "look.html"
    text = path.read_text()
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|innerHTML|insertAdj", text)
    assert "default-src 'none'" in text
    content = content_of(path)
    assert [run["script"] for run in content["runs"]] == ["ppo.py", "sft.py", "reward.py"]
    explained = {metric["name"]: metric["text"] for metric in content["metrics"]}
    for run, (_, metrics) in zip(content["runs"], [chain[s] for s in ("ppo", "sft", "reward")]):
        for row in metrics:
            for name, value in row.items():
                if name == "step":
                    continue
                steps, values = run["curves"][name]
                assert values[steps.index(row["step"])] == pytest.approx(value, rel=1e-5)
                assert explained[name]
    run = content["runs"][0]
    assert len(run["samples"]) == 24 and len(run["tokens"]) == 12 and run["notes"] == []
    assert run["config"]["clip"] == 0.2
    assert run["arithmetic"]["3"]["kl_coef"] == 0.05


def test_the_picture_has_one_part_for_each_metric_of_each_script(tmp_path, monkeypatch):
    one = make_run(tmp_path / "one", [{"step": 1, "loss": 2.0, "lr": 1.0}])
    two = make_run(tmp_path / "two", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    other = make_run(tmp_path / "other", [{"step": 1, "loss": 1.0}])
    (other / "run.json").write_text(json.dumps({"script": "reward.py", "config": {}}))
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    look.write([one, two, other])
    assert (one / "look.png").read_bytes().startswith(b"\x89PNG")
    parts = {ax.get_title(): len(ax.lines) for ax in figures[0].axes if ax.lines}
    assert parts == {"loss ()": 2, "lr ()": 1, "loss (reward.py)": 1}


EVIL = [
    "</script><script>document.title = 'broken'</script>", "<!-- <script>", "<img src=x onerror=a>",
    "a & b &amp; \u2028 \U0001f600 \"'`${1}", "@DATA@", "\ud800"]


def test_what_models_and_people_wrote_is_never_markup(tmp_path):
    samples = [sample(1, text, text, name=text) for text in EVIL]
    folder = make_run(tmp_path / "<b>run", [{"step": 1, "<i>": 1.0}], samples)
    path = look.write([folder])
    page = Scripts(path.read_text())
    assert len(page.contents) == 2 and "img" not in page.tags
    content = json.loads(page.contents[0])
    shown = content["runs"][0]["samples"]
    assert [row["prompt"] for row in shown] == EVIL
    assert content["metrics"][0]["name"] == "<i>"


def test_numbers_that_are_not_finite_become_null_and_others_keep_six_digits(tmp_path):
    rows = [sample(1, "p", "a", score=float("nan")), sample(1, "q", "b", score=0.123456789)]
    path = look.write([make_run(tmp_path / "run", [{"step": 1, "loss": float("nan")}], rows)])
    assert "NaN" not in Scripts(path.read_text()).contents[0]
    content = content_of(path)
    scores = [row["score"] for row in content["runs"][0]["samples"]]
    assert scores == [None, 0.123457]
    assert content["runs"][0]["curves"] == {}


# -----------------------------------------------------------------------------
# long runs


def test_a_long_curve_keeps_its_ends_and_its_peaks():
    steps = list(range(50_000))
    values = np.random.default_rng(0).standard_normal(50_000)
    values[31_415] = 99.0
    values[27_182] = -99.0
    thin_steps, thin_values = look.thin(steps, values.tolist())
    assert len(thin_steps) == len(thin_values) <= look.MAX_POINTS
    assert thin_steps == sorted(set(thin_steps))
    assert [values[s] for s in thin_steps] == thin_values
    assert {31_415, 27_182} <= set(thin_steps)
    assert thin_steps[0] < 100 and thin_steps[-1] >= 50_000 - 100
    assert look.thin([1, 2], [3.0, 4.0]) == [[1, 2], [3.0, 4.0]]


def test_the_page_of_a_long_run_is_small_and_says_how_much_is_left_out(tmp_path, capsys):
    rng = np.random.default_rng(0)
    metrics = [{"step": step, "score": rng.random(), "kl": 1.0} for step in range(3000)]
    samples, tokens = [], []
    for iteration in range(1, 601):
        for i, score in enumerate(rng.standard_normal(20).tolist()):
            samples.append(sample(iteration, f"prompt {iteration} {i} " + "x" * 300, "y", score))
        numbers = rng.standard_normal(100).tolist()
        tokens += [{"step": iteration, "reward": 1.0, "values": numbers}] * 4
    folder = make_run(tmp_path / "run", metrics, samples, tokens)
    path = look.write([folder])
    assert path.stat().st_size < 5 * 10**6
    [run] = content_of(path)["runs"]
    note = "samples.jsonl: {:,} of 12,000 answers are in this page, from 250 of 600 iterations"
    notes = [note.format(len(run["samples"]))]
    notes.append(f"tokens.jsonl: {len(run['tokens']):,} of 2,400 answers are in this page")
    assert [text.startswith(begin) for text, begin in zip(run["notes"], notes)] == [True, True]
    assert all(note in capsys.readouterr().out for note in notes[:1])
    assert 2000 <= len(run["samples"]) <= look.MAX_ROWS
    kept = {row["iteration"] for row in run["samples"]}
    assert len(kept) == look.MAX_ITERATIONS and {1, 600} <= kept
    for iteration in kept:
        own = [row["score"] for row in samples if row["iteration"] == iteration]
        shown = [row["score"] for row in run["samples"] if row["iteration"] == iteration]
        assert [min(shown), max(shown)] == pytest.approx([min(own), max(own)], rel=1e-4)


def test_the_same_prompt_is_shown_at_its_first_middle_and_last_iteration(tmp_path):
    samples = []
    for iteration in range(1, 10):
        prompts = [f"p{iteration}", f"p{iteration}"]  # twice in one iteration is no repetition
        if iteration in (1, 4, 9):
            prompts.append("a")
        if iteration in (2, 9):
            prompts.append("b")
        if iteration not in (1, 9):
            prompts.append("c")
        samples += [sample(iteration, prompt, f"{prompt}{iteration}") for prompt in prompts]
    run = look.read_run(make_run(tmp_path / "run", [{"step": 9}], samples))
    shown = [[row["answer"] for row in group] for group in run["side_by_side"]]
    assert shown == [["a1", "a4", "a9"], ["c2", "c5", "c8"], ["b2", "b9"]]


def test_without_a_prompt_that_came_twice_three_iterations_are_shown(tmp_path):
    samples = []
    for iteration in range(1, 8):
        samples += [sample(iteration, f"p{iteration}{i}", "x") for i in range(2)]
    run = look.read_run(make_run(tmp_path / "run", [{"step": 7}], samples))
    shown = [[row["prompt"] for row in group] for group in run["side_by_side"]]
    assert shown == [["p10", "p40", "p70"], ["p11", "p41", "p71"]]


# -----------------------------------------------------------------------------
# mistakes


def test_a_line_that_is_cut_off_is_left_out_and_the_page_says_so(tmp_path, capsys):
    folder = make_run(
        tmp_path / "run", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
        [sample(1, "p", "a"), sample(1, "q", "b")])
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[: -len(whole) // 4])
    [run] = content_of(look.write([folder]))["runs"]
    assert run["curves"]["loss"] == [[1], [2.0]]
    assert [row["prompt"] for row in run["samples"]] == ["p"]
    for name in ("metrics.jsonl", "samples.jsonl"):
        note = f"{name}: 1 line is cut off, and left out"
        assert note in run["notes"]
        assert f"{folder}: {note}" in capsys.readouterr().out or name == "samples.jsonl"


def test_a_mistake_gets_one_sentence(tmp_path, monkeypatch):
    def message(*folders):
        with pytest.raises(utils.UserError) as error:
            look.write(folders)
        assert "\n" not in str(error.value)
        return str(error.value)

    run = make_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    assert f"{tmp_path}: no metrics.jsonl in it; name the folder of a run" in message(run, tmp_path)
    assert "nowhere: no metrics.jsonl in it" in message(tmp_path / "nowhere")
    for i, text in enumerate(["", '{"step": 1, "lo', "[]\n"]):
        empty = make_run(tmp_path / f"empty{i}", [])
        (empty / "metrics.jsonl").write_text(text)
        assert "metrics.jsonl has no whole line: the run has not come to its" in message(empty)
    (run / "run.json").write_text("{")
    assert "run.json cannot be read" in message(run)
    (run / "run.json").unlink()

    def not_allowed(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(utils, "atomic_write", not_allowed)
        assert "look.html or look.png cannot be written: the folder is not writable" in message(run)
    monkeypatch.setattr(look, "Lines", not_allowed)
    assert message(run) == f"{run}/metrics.jsonl cannot be read: Permission denied"


def test_the_command_takes_one_folder_or_more(capsys):
    assert utils.parse_args(look.Config, ["out/a"]).runs == ["out/a"]
    assert utils.parse_args(look.Config, ["out/a", "b"]).runs == ["out/a", "b"]
    for argv, said in (([], "arguments are required: runs"), (["a", "--x"], "unrecognized")):
        with pytest.raises(SystemExit):
            utils.parse_args(look.Config, argv)
        assert said in capsys.readouterr().err
    shown = re.findall(r"python look\.py ([^\n`#]*)", (HERE / "README.md").read_text())
    assert shown and all(utils.parse_args(look.Config, line.split()).runs for line in shown)


# -----------------------------------------------------------------------------
# in a browser


FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")


def page_of(folder):
    """The page alone: the picture takes longer."""
    path = folder / "look.html"
    path.write_text(look.page([look.read_run(folder)]))
    return path


@needs_chromium
def test_a_browser_shows_everything_as_text_and_has_no_error(with_tool, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(with_tool[0], folder)
    rows = [sample(1, text, text) for text in EVIL[:-1]]  # a browser does not print the last one
    write_rows(folder / "samples.jsonl", rows)
    path = page_of(folder)
    flags = [*FLAGS, "--enable-logging=stderr", f"--user-data-dir={tmp_path}/browser"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    dom = done.stdout
    assert "<title>flatRLHF: " in dom
    assert dom.count("<figure>") == len(content_of(path)["metrics"])
    assert "&lt;/script&gt;&lt;script&gt;document.title" in dom
    assert "<img" not in dom


@needs_chromium
def test_a_browser_sorts_searches_and_reads_tokens_by_keyboard(with_tool, tmp_path):
    reason = "needs playwright: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    folder = tmp_path / "run"
    shutil.copytree(with_tool[0], folder)
    path = page_of(folder)
    lines = read_tokens(folder)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 390, "height": 800})
        errors = []
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{path}")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, "nothing is wider than a phone"

        page.get_by_role("button", name="score").focus()
        for direction in (1, -1):
            page.keyboard.press("Enter")
            cells = page.locator("#sample-table td[data-name=score]").all_inner_texts()
            scores = [direction * float(cell) for cell in cells]
            assert len(scores) == 16 and scores == sorted(scores)
        word = lines[0]["prompt"].split()[2]
        page.get_by_role("searchbox").fill(word.upper())
        prompts = page.locator("#sample-table td[data-name=prompt]").all_inner_texts()
        assert 1 <= len(prompts) < 16 and all(word in prompt for prompt in prompts)

        curve = page.locator("figure", has_text="kl_coef").locator("svg")
        curve.focus()
        page.keyboard.press("Home")
        assert "step 1: 0.05" in page.locator("figure", has_text="kl_coef").inner_text()

        [number, line] = next((i, line) for i, line in enumerate(lines) if 0 in line["mask"])
        values = (str(line["step"]), str(number), "advantages")
        for control, value in zip(page.locator("#token-view select").all(), values):
            control.select_option(value)
        tokens = page.locator(".tokens button")
        assert tokens.count() == len(line["response_tokens"])
        assert page.locator(".tokens button.read").count() == line["mask"].count(0)
        tokens.first.focus()
        page.keyboard.press("ArrowRight")
        detail = page.locator(".detail").inner_text()
        assert f"token 2 of {len(line['mask'])}" in detail
        assert f"= {line['advantages'][1]:.3g}" in detail
        colors = tokens.evaluate_all("buttons => buttons.map(b => b.style.backgroundColor)")
        for color, advantage, sampled in zip(colors, line["advantages"], line["mask"]):
            if sampled and abs(advantage) > 0.1:
                assert color.startswith("rgba(59" if advantage > 0 else "rgba(234")
        assert errors == []
        browser.close()
