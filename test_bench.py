"""The benchmarks: they measure what they say, keep what they measured, and results/README.md shows
the numbers of results/*.json and nothing else."""
from testing import HERE, command  # first, because it sets environment variables

import ast
import json
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench
import experiments
import kernels
import mutants
import ppo
import tables
import utils
from hybrid_engine import HybridEngine, Rollout

utils.quiet_transformers()

RESULTS = HERE / "results"
CEILINGS = {"bytes_per_s": 1e10, "flop_per_s": 1e11}


def result(name):
    return tables.read_json(RESULTS / f"{name}.json")


def small_config(**changes):
    options = dict(
        model="opt-4x256", batch="2", prompt_len=16, new_tokens=3, ragged=0, repeats=1, out="/none")
    return bench.Config(**options | changes)


# -----------------------------------------------------------------------------
# shapes


def test_shapes_have_the_parameters_of_the_models_that_they_are_named_after():
    import transformers

    published = {
        "opt-125m": 125_239_296,
        "opt-350m": 331_196_416,
        "opt-1.3b": 1_315_758_080,
        "opt-6.7b": 6_658_473_984,
        "llama-3.2-1b": 1_235_814_400,
        "llama-8b": 8_030_261_248,
        "qwen2.5-0.5b": 494_032_768,
        "qwen3-0.6b": 596_049_920,
        "qwen3-8b": 8_190_735_360,
    }
    for name, n_params in published.items():
        with torch.device("meta"):
            lm = transformers.AutoModelForCausalLM.from_config(bench.config_of(name))
        assert sum(p.numel() for p in lm.parameters()) == n_params, name


@pytest.mark.parametrize("name", ["opt-4x256", "llama-4x256"])
def test_flops_are_those_of_the_layers(name):
    from torch.utils.flop_counter import FlopCounterMode

    lm = bench.build(name, torch.float32)
    tokens = torch.zeros(3, 64, dtype=torch.long, device=bench.device())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(tokens)
    counted = counter.get_total_flops()
    ours = bench.flops(bench.SHAPES[name], 3 * 64, 64, 3 * 64)
    message = f"{ours:.3g}, counted {counted:.3g} (half of the square of attention is masked)"
    assert abs(ours / counted - 1) < 0.02, message


def test_head_size_may_differ_from_width_over_heads():
    """Qwen3-0.6B has 16 heads of 128 at width 1,024."""
    s = bench.SHAPES["qwen3-0.6b"]
    projections = 1024 * 16 * 128 + 2 * 1024 * 8 * 128 + 16 * 128 * 1024
    assert bench.layer_params(s) == projections + 3 * 1024 * 3072
    assert bench.kv_bytes(s, 10, torch.bfloat16) == 2 * 28 * 8 * 128 * 10 * 2


# -----------------------------------------------------------------------------
# every task measures, and keeps its raw numbers


def run(task, out, **changes):
    """Runs a task in this process; returns the record that it wrote."""
    bench.main(small_config(out=str(out), **changes), task)
    (path,) = out.glob("*.json")
    record = json.loads(path.read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["task"] == task
    assert record["edition"] == 2
    return record


def test_generate_measures_fixed_and_ragged_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MAX_RAGGED", 30)
    record = run("generate", tmp_path, batch="1,2", ragged=1)
    rows = record["rows"]
    cases = [(row["case"], row["prompts"]) for row in rows]
    assert cases == [("fixed", 1), ("fixed", 2), ("ragged", 1), ("ragged", 2)]
    for row in rows:
        assert len(row["runs"]["ours"]) == 1
        assert len(row["runs"]["theirs"]) == 1
        assert row["tokens_per_s"] > 0
        assert row["ratio"] > 0
    assert rows[0]["mean_length"] == 3
    assert record["ceilings"]["bytes_per_s"] > 0


def test_train_measures_a_step_of_each_kind(tmp_path):
    rows = run("train", tmp_path, batch="4", micro_batch=2)["rows"]
    steps = [row["step"] for row in rows]
    assert steps == ["fine-tuning", "reward model", "PPO, actor", "PPO, critic"]
    assert all(0 < row["mfu"] < 1.5 for row in rows)


def test_train_can_be_limited_to_some_steps():
    rows = list(bench.train(small_config(only="sft", gradient_checkpointing=True), CEILINGS))
    assert [row["step"] for row in rows] == ["fine-tuning"]
    with pytest.raises(utils.UserError, match="'dpo' is none of sft, reward, actor, critic"):
        small_config(only="dpo")


def test_ppo_measures_the_phases_of_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MAX_RAGGED", 30)
    fixed, ragged = run("ppo", tmp_path, ragged=1)["rows"]
    assert fixed["mean_length"] == 3, "fixed lengths are fixed"
    assert ragged["mean_length"] > 3, "ragged ones are not"
    for row in (fixed, ragged):
        assert len(row["runs"]["hybrid"]) == 2
        assert len(row["runs"]["hf"]) == 2
        assert all(row["hybrid"][phase] > 0 for phase in bench.PHASES)
        assert row["ratio"] > 0
        assert 0 < row["mfu"] < 1.5


def test_ppo_measures_several_minibatches_with_a_reward_function_and_lora():
    cfg = small_config(minibatches=2, scorer="function", lora="2", compare=False)
    (row,) = bench.ppo_task(cfg, CEILINGS)
    assert row["pairs_per_s"] > 0
    assert row["ratio"] is None
    assert row["hf"] is None


def test_kernels_measures_each_function(tmp_path):
    rows = run("kernels", tmp_path)["rows"]
    assert len(rows) == 8
    assert all(row["us"] > 0 and row["pytorch_us"] > 0 for row in rows)


@torch.no_grad()
def test_what_the_kernels_are_compared_with_computes_the_same():
    sizes = bench.Sizes(bench.SHAPES["llama-4x256"], B=3, P=10, T=20, dtype=torch.float32)
    for title, make in bench.kernel_cases(sizes).items():
        case = make()
        if title == "sampling":
            continue  # random
        ours, pytorch = case.ours(), case.pytorch()
        if title == "prefill attention":
            pytorch = pytorch.transpose(1, 2).flatten(0, 1)
        elif title == "decode attention":
            pytorch = pytorch[:, :, 0]
        elif title == "rotary and cache":
            ours = ours[0]  # q; ours also returns k
        elif title == "add and norm":
            ours, pytorch = ours[0], pytorch[0]
        elif title == "log-probabilities":
            ours = ours[0]
        torch.testing.assert_close(ours, pytorch, rtol=1e-4, atol=1e-4, msg=title)


def test_fit_runs_ppo_in_a_process_of_its_own():
    cfg = small_config(critic="opt-4x256")
    gib, error = bench.try_to_fit(cfg, "opt-4x256")
    assert error is None
    assert 0 < gib < 20
    gib, error = bench.try_to_fit(cfg, "opt-66b")
    assert gib is None
    assert error == "its weights alone are larger than the memory"


def test_bench_runs_the_code_of_the_project_as_it_is():
    """It replaces nothing in other modules. The one switch that it flips is made for that."""
    tree = ast.parse((HERE / "bench.py").read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        assert not (isinstance(node, ast.Name) and node.id == "setattr")
    changed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = ast.unparse(node.value)
            if owner in modules or owner[0].isupper():
                changed.add(f"{owner}.{node.attr}")
    assert changed == {"kernels.ONEDNN"}


def test_pytorch_products_are_pytorchs():
    before = kernels.ONEDNN
    with bench.pytorch_products():
        x = torch.randn(5, 7)
        weight = torch.randn(3, 7)
        assert torch.equal(kernels.linear(x, weight), F.linear(x, weight))
        assert not kernels.ONEDNN
    assert kernels.ONEDNN == before


# -----------------------------------------------------------------------------
# nothing that was measured is lost


def test_a_row_is_written_as_soon_as_it_is_measured(tmp_path, monkeypatch):
    def two_rows_and_a_crash(cfg, ceilings):
        yield {"row": 1}
        (path,) = tmp_path.glob("*.json")
        assert tables.read_json(path)["rows"] == [{"row": 1}]
        yield {"row": 2}
        raise RuntimeError("the machine goes away")

    monkeypatch.setitem(bench.TASKS, "fit", two_rows_and_a_crash)
    with pytest.raises(RuntimeError, match="goes away"):
        bench.main(small_config(out=str(tmp_path)), "fit")
    (path,) = tmp_path.glob("*.json")
    assert tables.read_json(path)["rows"] == [{"row": 1}, {"row": 2}]


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_side_that_runs_out_of_memory_is_left_out_and_the_other_goes_on():
    calls = []

    def ours(repeat):
        calls.append(repeat)
        return repeat

    def fails_later(repeat):
        if repeat == 2:
            out_of_memory()

    sides = {"ours": ours, "theirs": out_of_memory, "later": fails_later}
    measured = bench.alternate(3, sides)
    assert calls == [0, 1, 2, 3]
    assert [result for _, result in measured["ours"]] == [1, 2, 3]
    assert measured["theirs"] == []
    assert len(measured["later"]) == 1


def test_rows_of_generate_and_ppo_survive_a_side_without_memory(monkeypatch):
    monkeypatch.setattr(bench, "transformers_generate", out_of_memory)
    (row,) = bench.generate(small_config(), CEILINGS)
    assert row["tokens_per_s"] > 0
    assert row["transformers_tokens_per_s"] is None
    assert row["ratio"] is None
    assert "| - | **-** |" in tables.generation_table([row])[-1]

    phases = {"rollout_s": 1.0, "score_s": 2.0, "update_s": 3.0, "seconds": 6.0}
    measured = phases | {"length": 3.0, "memory_gib": 1.0}
    for failing in ("hf", "hybrid"):

        def iterations(cfg, name, case, side, count, failing=failing):
            if side == failing:
                out_of_memory()
            return [measured]

        monkeypatch.setattr(bench, "ppo_iterations", iterations)
        (row,) = bench.ppo_task(small_config(), CEILINGS)
        other = "hybrid" if failing == "hf" else "hf"
        assert row["runs"][failing] == []
        assert row["runs"][other] == [[1.0, 2.0, 3.0]] * 2
        assert row["ratio"] is None
        assert len(tables.ppo_table([row])) == 3


def test_train_goes_on_after_a_step_without_memory(monkeypatch):
    monkeypatch.setattr(bench, "train_row", out_of_memory)
    rows = list(bench.train(small_config(only="sft,critic"), CEILINGS))
    assert [row["error"] for row in rows] == ["out of memory"] * 2


# -----------------------------------------------------------------------------
# transformers generates in groups of rows that fit


class CountingModel:
    """Answers 7, 7, 2, 7 to every prompt, and counts the rows of each call."""

    def __init__(self):
        self.calls = []

    def generate(self, ids, **options):
        self.calls.append(len(ids))
        answers = torch.tensor([[7, 7, 2, 7]], device=ids.device).expand(len(ids), -1)
        return torch.cat([ids, answers], 1)


def test_transformers_generates_in_groups_and_tokens_count_up_to_the_eos():
    prompts = [[1, 2, 3]] * 5
    lm = CountingModel()
    assert bench.transformers_generate(lm, prompts, 4, None, group=2) == 5 * 4
    assert lm.calls == [2, 2, 1]
    assert bench.transformers_generate(lm, prompts, 4, [2, 9], group=5) == 5 * 3


def test_a_group_is_what_was_asked_for_or_what_fits():
    assert bench.rows_that_fit(100, row_bytes=1, limit=0) == 100
    assert bench.rows_that_fit(100, row_bytes=1, limit=7) == 7
    assert bench.rows_that_fit(100, row_bytes=2**60, limit=0) == 1
    some = bench.rows_that_fit(1000, row_bytes=bench.available_bytes() / 100, limit=0)
    assert 20 <= some <= 60, "0.4 of what is free"


def test_a_sampler_in_groups_gives_what_it_gives_at_once():
    """Randomness belongs to the row, so for the hybrid engine the groups change nothing."""
    lm = bench.build("opt-4x256", torch.float32)
    engine = HybridEngine(lm)
    V = lm.config.vocab_size
    eos = bench.eos_ids(bench.Case("ragged", 5, 40), V)
    prompts = bench.random_prompts(5, 6, V, torch.Generator().manual_seed(0))
    seeds = list(range(5))
    at_once = bench.Sampler(engine, eos).generate(prompts, 40, 1.0, 0, seeds, None)
    grouped = bench.Sampler(engine, eos, row_bytes=1, group=2)
    grouped = grouped.generate(prompts, 40, 1.0, 0, seeds, None)
    assert len(set(at_once.answer_lens.tolist())) > 1
    assert torch.equal(at_once.tokens, grouped.tokens)
    assert torch.equal(at_once.answer_lens, grouped.answer_lens)


def test_rollouts_are_joined_with_padding_on_the_right():
    one = torch.tensor([1])
    two = torch.tensor([2])
    short_logprobs = torch.tensor([[-0.5]])
    long_logprobs = torch.tensor([[-0.1, -0.2]])
    short = Rollout(torch.tensor([[5, 6]]), one, one, short_logprobs, short_logprobs < 0)
    long = Rollout(torch.tensor([[5, 6, 7]]), one, two, long_logprobs, long_logprobs < 0)
    joined = bench.join_rollouts([short, long])
    assert joined.tokens.tolist() == [[5, 6, 0], [5, 6, 7]]
    assert joined.answer_lens.tolist() == [1, 2]
    expected = torch.tensor([[-0.5, 0.0], [-0.1, -0.2]])
    assert torch.equal(joined.logprobs, expected)
    assert torch.equal(joined.sampled, expected < 0)


# -----------------------------------------------------------------------------
# jobs


def test_nano_vllms_requests_are_its_own():
    """Its published numbers are for 142,827 tokens of prompts and 133,966 of answers."""
    prompts, answer_lens = bench.nano_vllm_requests(256, 1024, 1024, V=151936)
    assert sum(map(len, prompts)) == 142_827
    assert sum(answer_lens) == 133_966
    assert max(map(max, prompts)) == 10_000


def test_answers_have_exactly_the_lengths_that_were_asked_for():
    engine = bench.ExactLengths(bench.build("llama-4x256", torch.float32), max_batch=3)
    prompts = bench.random_prompts(8, 5, 8192, torch.Generator().manual_seed(0))
    answer_lens = [9, 2, 30, 2, 3, 17, 4, 8]
    out = engine.generate_lengths(prompts, answer_lens, 0.6, seed=1)
    assert out.answer_lens.tolist() == answer_lens
    whole = HybridEngine(engine.decoder.module).generate(prompts, 30, 0.6, seed=1)
    for row, n in enumerate(answer_lens):
        assert torch.equal(out.tokens[row, : 5 + n], whole.tokens[row, : 5 + n])
    assert engine.stats["decode_steps"] < sum(answer_lens), "rows are decoded together"


def test_nano_vllm_measures_tokens_of_answers(tmp_path):
    record = run("nano-vllm", tmp_path, prompt_len=101, new_tokens=101)
    (row,) = record["rows"]
    assert 200 <= row["prompt_tokens"] <= 202
    assert 200 <= row["answer_tokens"] <= 202
    assert row["mean_length"] == row["answer_tokens"] / 2
    assert row["tokens_per_s"] > 0


def test_every_job_is_a_command_and_flags_after_its_name_override_it():
    for name in bench.JOBS:
        task, job, flags = bench.parse_task(["job", name])
        assert job == name
        assert task in bench.TASKS
        utils.parse_args(bench.Config, flags)
    task, _, flags = bench.parse_task(["job", "nano-vllm", "--model", "llama-3.2-1b"])
    cfg = utils.parse_args(bench.Config, flags)
    assert task == "nano-vllm"
    assert cfg.model == "llama-3.2-1b"
    assert (cfg.batch, cfg.prompt_len, cfg.new_tokens) == ("256", 1024, 1024)
    verl = utils.parse_args(bench.Config, bench.parse_task(["job", "verl"])[2])
    assert (verl.batch, verl.prompt_len, verl.new_tokens) == ("256", 104, 276)


def test_a_job_is_kept_under_its_name(tmp_path):
    small = "--model opt-4x256 --batch 1 --prompt-len 8 --new-tokens 2 --repeats 1"
    code, out = command("bench.py", "job", "decode-opt-6.7b", *small.split(), "--out", tmp_path)
    assert code == 0, out
    assert "Traceback" not in out, out
    (path,) = tmp_path.glob("*-job-decode-opt-6.7b-opt-4x256.json")
    record = tables.read_json(path)
    assert record["job"] == "decode-opt-6.7b"
    assert record["config"]["batch"] == "1"
    assert record["command"].startswith("python bench.py job decode-opt-6.7b --model opt-4x256")
    text = tables.readme(tmp_path)
    assert "## Job: decode-opt-6.7b" in text
    assert "opt-4x256, 1 rows" in text


# -----------------------------------------------------------------------------
# command line


def test_numbers_are_lists_and_ranges():
    assert bench.parse_numbers("--batch", "1,8..64") == [1, 8, 16, 32, 64]
    for text in ("", "0", "x", "4,,5", "-1", "8..y"):
        with pytest.raises(utils.UserError, match="needs numbers above 0"):
            bench.parse_numbers("--batch", text)


def test_a_wrong_task_job_or_shape_is_named():
    with pytest.raises(SystemExit, match="there is no task 'nonsense'; there are generate"):
        bench.parse_task(["nonsense"])
    with pytest.raises(SystemExit, match="there is no job 'x'; there are decode-opt-1.3b"):
        bench.parse_task(["job", "x"])
    with pytest.raises(SystemExit, match="there is no job ''"):
        bench.parse_task(["job"])
    assert bench.parse_task([]) == bench.parse_task(["--help"])
    for flag in ("model", "critic"):
        with pytest.raises(utils.UserError, match=f"--{flag} opt-9b: there is no such shape"):
            bench.Config(**{flag: "opt-9b"})


# -----------------------------------------------------------------------------
# peaks of memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_peak_is_the_most_memory_since_the_last_one():
    buffer = b"x" * 2**26
    bench.start_peak()
    before = bench.current_bytes()
    # From the system, not from malloc, which would hand out again what other tests have freed.
    with mmap.mmap(-1, 2**26) as memory:
        memory.write(buffer)
    assert bench.start_peak() - before == pytest.approx(2**26, abs=2**23)
    assert bench.start_peak() - before < 2**23, "what was freed before does not count"


def test_plan_memory_puts_the_plan_beside_what_was_measured(monkeypatch):
    measured = {"rollout": 2**30, "score": 2**30, "update": 2**31}
    monkeypatch.setattr(bench, "measure_peaks", lambda case, ranks: measured)
    rows = list(bench.plan_memory(small_config(), None))
    assert [row["case"] for row in rows] == list(bench.MEMORY_CASES)
    for row in rows:
        assert row["measured_mib"]["update"] == 2048
        assert row["ratio"] == max(row["predicted_mib"].values()) / 2048


# -----------------------------------------------------------------------------
# results/README.md, and what it claims


def test_the_page_of_results_is_what_the_json_files_give():
    text = (RESULTS / "README.md").read_text()
    message = "run `python bench.py tables`"
    assert text == tables.readme(RESULTS), message


def test_every_file_of_results_has_its_table():
    text = (RESULTS / "README.md").read_text()
    for path in RESULTS.glob("*.json"):
        assert f"({path.name})" in text, f"{path.name} is in no section"


def test_a_file_says_with_which_edition_of_the_code_it_was_measured():
    assert tables.code_of({"rows": []}) == "the first edition of this code"
    assert tables.code_of([{"seed": 1}]) == "the first edition of this code"
    assert tables.code_of([{"seed": 1, "edition": 2}]) == "this code"
    assert tables.code_of({"edition": 2}) == "this code"


def test_generation_is_as_much_faster_than_transformers_as_it_should_be():
    for row in result("cpu-2-threads-generate")["rows"]:
        least = 3 if row["case"] == "ragged" else 1.75
        assert row["ratio"] >= least, row
        assert len(row["runs"]["ours"]) >= 3, row


def test_ppo_is_as_much_faster_than_with_transformers_as_it_should_be():
    for row in result("cpu-2-threads-ppo")["rows"]:
        assert row["ratio"] >= 1.5, row


def test_chunks_of_logits_save_memory_and_change_nothing():
    plain, chunked = result("cpu-1-threads-memory")["rows"]
    assert plain["loss"] == chunked["loss"]
    assert chunked["gradients_off"] < 1e-5
    assert chunked["peak_mib"] < plain["peak_mib"] / 10


def test_the_demo_shows_what_the_readme_says():
    for row in result("demo"):
        assert 0.5 <= row["sft_gold"] <= 0.7
        assert row["reward_accuracy"] >= 0.95
        assert row["ppo_gold"] >= 0.9


def test_long_runs_do_not_over_optimise():
    held_out = result("guard")["held_out"]
    assert held_out[-1]["gold"] >= held_out[1]["gold"] - 0.02
    assert held_out[-1]["score"] > held_out[1]["score"]
    gold = [row["gold"] for row in held_out]
    noise = 2 * (0.95 * 0.05 / 512) ** 0.5
    assert max(gold) - gold[-1] < noise, "the fall is within the noise of 512 prompts"


def test_no_number_of_updates_diverges():
    sweep = result("sweep")
    assert len(sweep) == 36 and {row["seed"] for row in sweep} == {1, 2, 3}
    assert len({row["gold_before"] for row in sweep}) == 1
    for row in sweep:
        assert row["gold"] > row["gold_before"] + 0.1, row
        assert row["skipped"] == 0, row


def test_every_recipe_learns():
    for row in result("recipes"):
        assert row["gold"] > row["gold_before"] + 0.1, row


def means(name, column="gold"):
    """{variant of an experiment: mean over its three seeds}."""
    values = {}
    for row in result(name)["rows"]:
        if column in row:  # best of n has no accuracy before training
            values.setdefault(row["variant"], []).append(row[column])
    assert all(len(each) == 3 for each in values.values()), "three seeds"
    return {variant: sum(each) / 3 for variant, each in values.items()}


def test_all_methods_learn_and_none_of_those_with_a_gradient_is_far_ahead():
    gold = means("methods")
    before = means("break", "gold_before")["PPO"]
    assert min(gold.values()) > before + 0.15
    trained = [gold[method] for method in experiments.METHODS["toy"]]
    assert max(trained) - min(trained) < 0.03
    assert gold["best of 4"] > max(trained) + 0.03
    assert gold["best of 16"] < gold["best of 4"] - 0.03
    assert gold["filtered fine-tuning"] < min(trained) - 0.01
    seconds = {}
    for row in result("methods")["rows"]:
        if row["cpu_seconds"]:
            seconds.setdefault(row["variant"], []).append(row["cpu_seconds"])
    assert 1.2 < np.mean(seconds["PPO"]) / np.mean(seconds["RLOO"]) < 1.8


def test_mistakes_show_in_the_columns_that_the_page_names():
    gold, gap = means("break"), means("break", "first_gap")
    assert set(gold) == {
        "PPO", "KL coefficient 0", "PPO at temperature 0.7", *experiments.MISTAKES}
    before = means("break", "gold_before")
    assert all(gold[variant] > before[variant] + 0.05 for variant in gold), "all learn"
    for variant in gap:
        has_gap = variant in ("Dropout", "Log-probabilities without the temperature")
        assert (gap[variant] > 0.03) == has_gap and (gap[variant] < 1e-5) != has_gap
    assert gold["EOS is not an action"] < gold["PPO"] - 0.04
    clipped = means("break", "clip_frac")
    assert clipped["Dropout"] > 0.02 and clipped["PPO"] < 0.001
    norm = means("break", "actor_grad_norm")
    assert norm["Advantages as they are"] < 0.7 * norm["PPO"]


def test_a_reward_model_of_few_pairs_is_overoptimized_and_the_kl_penalty_protects():
    rows = result("overoptimization")["rows"]
    assert len(rows) == 27
    for row in rows:
        assert row["score"] > row["score_before"] + 0.1, "the score always rises"
        change = row["gold"] - row["gold_before"]
        if row["pairs"] == 100 and row["kl_coef"] == 0:
            assert change < -0.15, row
        if row["kl_coef"] == 0.3:
            assert change > 0.15, row
        if row["pairs"] == 0:
            assert row["gold"] > 0.85, row


def test_ema_is_better_where_the_learning_rate_stays_high_and_lags_in_short_runs():
    last = means("ema")
    gold = {decay: means("ema", f"gold_{decay}") for decay in experiments.DECAYS}
    for variant in ("8 iterations", "32 iterations", "64 iterations"):
        assert all(gold[decay][variant] < last[variant] + 0.01 for decay in gold)
    constant = "32 iterations, constant learning rates"
    high = "32 iterations, constant, three times as high"
    assert gold[0.97][constant] > last[constant] + 0.015
    assert gold[0.97][high] > last[high] + 0.14
    assert gold[0.992][high] > last[high] + 0.2
    for decay in (0.992, 0.998):
        assert gold[decay]["8 iterations"] < last["8 iterations"] - 0.1
    assert ppo.Config.ema == 0.97
    for variant in ("32 iterations", "64 iterations"):
        assert gold[0.97][variant] > last[variant] - 0.011


def test_all_methods_solve_more_of_countdown_and_best_of_16_the_most():
    gold = means("countdown-methods")
    before = means("countdown-methods", "gold_before")["PPO"]
    for method in (*experiments.METHODS["countdown"], "filtered fine-tuning"):
        assert 0.08 < gold[method] - before < 0.14
    assert gold["best of 16"] > gold["best of 4"] + 0.3 > 0.7


def test_the_mixture_holds_the_loss_on_demonstrations_and_costs_accuracy():
    sft, ppo_alone = "SFT", "PPO, KL coefficient 0"
    penalty, mixed = "PPO, KL coefficient 0.05", "PPO, KL coefficient 0, mixture"
    hidden = means("mixture", "gold_hidden_skill")
    assert hidden[ppo_alone] > hidden[mixed] + 0.05 > hidden[sft] + 0.15
    assert abs(hidden[ppo_alone] - hidden[penalty]) < 0.02
    loss = means("mixture", "held_out_loss")
    rise = loss[ppo_alone] - loss[sft]
    assert 0.11 < rise < 0.14
    assert 0.3 < (loss[mixed] - loss[sft]) / rise < 0.4


def test_ppo_on_toy_does_not_forget_countdown_and_the_mixture_costs_accuracy():
    countdown, loss = means("forgetting", "gold_countdown"), means("forgetting", "held_out_loss")
    for variant in experiments.forgetting():
        assert abs(countdown[variant] - countdown["SFT"]) < 0.015
        assert abs(loss[variant] - loss["SFT"]) < 0.005
    toy = means("forgetting", "gold_toy")
    alone, mixed = toy["PPO, KL coefficient 0"], toy["PPO, KL coefficient 0, mixture"]
    assert 0.02 < alone - mixed < 0.04


def test_the_sampler_and_the_trainer_agree_to_the_rounding_of_the_dtype():
    gap = means("gap", "gap_mean")
    assert gap["fp32"] < 1e-6 < 1e-4 < gap["bf16"] < 1e-2


def test_a_tool_solves_what_the_model_alone_does_not():
    tool, alone = result("tool")["rows"]
    assert tool["before"] > 0.7 and tool["after"] > tool["before"] + 0.03
    assert alone["before"] < 0.01 and alone["after"] is None
    assert alone["sft_steps"] >= 4 * tool["sft_steps"]


def test_the_checker_of_countdown_teaches():
    first, *_, last = result("countdown")["rows"]
    assert first["gold"] < 0.25 and last["gold"] > first["gold"] + 0.1


def test_disturbed_runs_end_as_if_nothing_had_happened():
    rows = result("faults")
    assert {(row["script"], row["zero"]) for row in rows} == {
        (script, zero) for script in ("sft", "reward", "ppo") for zero in (0, 2)}
    assert sum(len(row["faults"]) for row in rows) == 60
    for row in rows:
        assert row["same"] and all(row["same"]), row
        for fault in row["faults"]:
            was_done = fault["exit_code"] == 0 or fault["rows"] == row["steps"]
            assert fault["said"] or fault["fault"] == "kill -9" or was_done


def test_ppo_on_real_weights_improves_the_score_and_stays_close():
    real = result("real-data")["ppo"]
    before, after = real["eval_score"]
    before_se, after_se = real["eval_score_se"]
    assert after - before > 2 * np.hypot(before_se, after_se)
    assert real["eval_kl"][1] < 15


def test_the_tests_notice_nearly_all_mutants():
    rows = result("mutants")["mutants"]
    assert len(rows) >= 100
    assert sum(row["noticed"] for row in rows) >= 95
    for row in rows:
        assert row["old"] != row["new"], row
        assert row["by"] or not row["noticed"], row
    for mutant in mutants.all_mutants().values():
        mutants.lines_of(mutant)  # raises where the code does not have this line any more


def test_compiled_kernels_spill_nothing():
    rows = result("kernels-compile")
    assert {row["kernel"] for row in rows} == set(tables.KERNEL_TITLES)
    for row in rows:
        if row["target"] in ("80", "90"):
            assert row["spilled"] == 0, row


# -----------------------------------------------------------------------------
# on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_seconds_per_call_counts_the_work_and_not_the_launch():
    x = torch.zeros(2**28, device="cuda")
    y = torch.empty_like(x)
    small = torch.zeros(16, device="cuda")

    def copy():
        y.copy_(x)

    def nothing():
        small.add_(1)

    bytes_per_s = 2 * x.nbytes / bench.seconds_per_call([copy])
    assert 1e11 < bytes_per_s < 1e13
    assert bench.seconds_per_call([nothing]) < 5e-6
