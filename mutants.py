"""Mutants: one-line changes to the code, each a mistake that somebody could make. Does a test
notice it?

    python mutants.py              # those that have no result in results/mutants.json yet
    python mutants.py 3 17         # these, once more
    python mutants.py --all        # all, once more
    python mutants.py --quick      # no mutant is run with more than its own tests
    python mutants.py --check      # only whether every change can be made

A mutant is a copy of the repository with one change. It is run with the tests that should notice
it, which stand beside it, and if these pass with all tests of `make test`. What is found is written
after every mutant, so this can be stopped and started again. In the end, each test that has noticed
one is run on a copy without any change, where it must pass.

No mutant is here that changes nothing that can be seen, such as > for >= where numbers are never
equal.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "mutants.json"
LIMIT = 600        # seconds for the tests of a mutant: one that hangs is noticed, too
FULL_LIMIT = 7200  # seconds for all tests

# What became of the first version of this list: how many changes got past the tests that are named
# beside them, so that tests were written for them, and how many could not change any result.
FIRST_VERSION = {"tests_written_for": 13, "replaced": 3}

# These read results/mutants.json, which this script is still writing.
LEFT_OUT = (
    "test_bench.py::test_the_page_of_results_is_what_the_json_files_give",
    "test_bench.py::test_the_tests_notice_nearly_all_mutants",
)

# Selections of tests that are used more than once.
SECOND_PPO = "test_ppo.py -k test_ppo_takes_the_steps_of_a_second_version"
SECOND_SFT = "test_ppo.py -k test_sft_takes_the_steps_of_a_second_version"
SECOND_REWARD = "test_ppo.py -k test_reward_takes_the_steps_of_a_second_version"
ADVANTAGES = "test_ppo.py -k advantages_come_from"
TWO_RANKS = "test_ppo.py -k two_ranks_hold_every_row"
RESUMED_PPO = "test_ppo.py -k a_resumed_run_keeps"
RATES = "test_ppo.py -k both_learning_rates"
ROLLOUT = "test_ppo.py -k 'a_rollout_says or rollouts_are_random'"
GOES_ON = "test_training.py -k goes_on_with_weights"
GREEDY = "test_engine.py -k greedy_output_is_that_of_transformers_generate"
TENSOR_PARALLEL = "test_engine.py -k tensor_parallel_ranks"
BATCHED = "test_engine.py -k 'a_row_keeps_its_tokens or share_its_prefill'"
TOOLS = "test_engine.py -k a_tool_goes_on"
LOGPROBS = "test_kernels.py -k token_logprobs_and_their_gradients"

# file -> (a part of one of its lines, what takes its place, pytest's arguments for its tests)
MUTANTS = {
    "ppo.py": [
        ("return (x - mean) * torch.rsqrt(var + 1e-8) * mask", "return (x - mean) * mask",
         "test_ppo.py -k whitening_and_means"),
        ("-kl_coef * (logprobs - ref_logprobs)", "-kl_coef * (ref_logprobs - logprobs)",
         "test_ppo.py -k rewards_are_kl"),
        ("return (position * mask).argmax(1)", "return mask.sum(1) - 1",
         "test_ppo.py -k score_lands"),
        ("+= scores.clamp(-score_clip, score_clip)", "+= scores",
         "test_ppo.py -k rewards_are_kl"),
        ("delta = rewards[:, t] + gamma * next_value", "delta = rewards[:, t] + next_value",
         "test_ppo.py -k gae_is_the_sum"),
        ("delta + gamma * lam * next_advantage", "delta + gamma * next_advantage",
         "test_ppo.py -k gae_is_the_sum"),
        ("next_value = torch.where(sampled, values[:, t], next_value)",
         "next_value = values[:, t]",
         "test_ppo.py -k gae_is_the_sum"),
        ("return masked_mean(torch.max(unclipped, clipped), mask)",
         "return masked_mean(unclipped, mask)",
         "test_ppo.py -k losses_are_their_formulas"),
        ("values_clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)",
         "values_clipped = values",
         "test_ppo.py -k losses_are_their_formulas"),
        ("VALUE_CLIP = 0.2", "VALUE_CLIP = 2.0", SECOND_PPO),
        ("LAM = 0.95", "LAM = 1.0", ADVANTAGES),
        ("GAMMA = 1.0", "GAMMA = 0.99", ADVANTAGES),
        ("ADAM_EPS = 1e-5", "ADAM_EPS = 1e-8", SECOND_PPO),
        ("STOP_KL = 0.1", "STOP_KL = 1.0", "test_ppo.py -k more_than_a_tenth_of_a_nat"),
        ("EOS_PENALTY * ~batch.finished", "EOS_PENALTY * batch.finished", ADVANTAGES),
        ("batch.advantages = whiten(advantages, batch.mask)", "batch.advantages = advantages",
         ADVANTAGES),
        ("batch.advantages = whiten(advantages, batch.mask)",
         "batch.advantages = whiten(advantages, batch.mask); "
         "batch.returns = batch.advantages + batch.values",
         ADVANTAGES),
        ("if epoch > 0:", "if epoch > cfg.ppo_epochs:", "test_ppo.py -k each_epoch_has"),
        ("np.random.default_rng([cfg.seed, iteration, epoch])",
         "np.random.default_rng([cfg.seed, iteration])",
         "test_ppo.py -k each_epoch_has"),
        ("lr_scale = max(LR_FLOOR, 1 - (iteration - 1) / cfg.iterations)", "lr_scale = 1.0",
         RATES),
        ("1 - (iteration - 1) / cfg.iterations", "1 - iteration / cfg.iterations", RATES),
        ("actor_lr = cfg.actor_lr * lr_scale", "actor_lr = cfg.critic_lr * lr_scale", RATES),
        ("training.set_lr(critic, cfg.critic_lr * lr_scale)",
         "training.set_lr(critic, cfg.actor_lr * lr_scale)",
         RATES),
        ("weight = b.mask.sum() / step_tokens * world * len(parts)", "weight = 1.0", SECOND_PPO),
        ("step_tokens * world * len(parts)", "step_tokens * len(parts)", TWO_RANKS),
        ("text_loss * world * len(parts)", "text_loss * len(parts)", TWO_RANKS),
        ("if norms[0] is not None:", "if norms:", "test_ppo.py -k the_ema_takes_each_step"),
        ("logprobs, entropy = actor(*b.inputs, cfg.temperature)",
         "logprobs, entropy = actor(*b.inputs)",
         SECOND_PPO),
        ("ref_logprobs=ref(*b.inputs, cfg.temperature)", "ref_logprobs=ref(*b.inputs)",
         "test_ppo.py -k scoring_runs"),
        ("with models.adapters_off():", "with torch.no_grad():",
         "test_training.py -k with_lora_the_reference"),
        ("critic(batch.tokens).gather(1, index)", "critic(batch.tokens).gather(1, index + 1)",
         "test_ppo.py -k a_value_is_that_of_the_state"),
        ("seeds = [hash((cfg.seed, iteration, i))", "seeds = [hash((cfg.seed, i))", ROLLOUT),
        ("mine = indices[rank::world]", "mine = np.array_split(indices, world)[rank]", TWO_RANKS),
        ("tokenizer, max_len, state.get(\"mix_steps\", 0))", "tokenizer, max_len, 0)",
         RESUMED_PPO),
        ("    restore_normalization(scorers, state)", "    pass", RESUMED_PPO),
        ("prompts, cfg.seed, start, pool=1)", "prompts, cfg.seed, 0, pool=1)",
         RESUMED_PPO),
    ],
    "sft.py": [
        ("loss = -logprobs.sum() / step_tokens",
         "loss = -logprobs.sum() / answer_lens.sum() / accumulation_steps",
         SECOND_SFT),
        ("engine.backward(loss * world * accumulation_steps)",
         "engine.backward(loss * accumulation_steps)",
         "test_training.py -k 'two_ranks_and_every_zero_stage'"),
        ("batches = data.steps(train, lengths, cfg.batch_size, cfg.seed, start)",
         "batches = data.steps(train, lengths, cfg.batch_size, cfg.seed)",
         "test_training.py -k four_steps_are"),
        ("utils.cosine_schedule(step - 1, total)", "utils.cosine_schedule(step, total)",
         SECOND_SFT),
        ("[-logprobs.sum(1), answer_lens.float()]", "[-logprobs.sum(1), prompt_lens.float()]",
         "test_ppo.py -k held_out_loss_of_sft"),
    ],
    "reward.py": [
        ("pairwise_loss(better, worse, weights) * len(part) / cfg.batch_size",
         "pairwise_loss(better, worse, weights) / accumulation_steps",
         SECOND_REWARD),
        ("CENTERING = 0.003", "CENTERING = 0.0", SECOND_REWARD),
        ("lr = cfg.lr * utils.cosine_schedule(step - 1, total)", "lr = cfg.lr", SECOND_REWARD),
        ("torch.as_tensor(np.argsort(order), device=device)",
         "torch.as_tensor(order, device=device)",
         "test_ppo.py -k pairs_get_the_same_scores"),
        ("batches = data.steps(train, lengths, cfg.batch_size, cfg.seed, start)",
         "batches = data.steps(train, lengths, cfg.batch_size, cfg.seed)",
         "test_training.py -k four_steps_are"),
    ],
    "training.py": [
        ("betas=(0.9, 0.99)", "betas=(0.9, 0.999)", "test_training.py -k two_decays"),
        ('"gradient_clipping": 1.0', '"gradient_clipping": 0.0',
         "test_training.py -k norm_at_most_one"),
        ("    engine.nonfinite.zero_()", "    pass",
         "test_training.py -k a_gradient_that_is_not_finite_on_one_rank"),
        ("    dist.all_reduce(nonfinite)", "    pass",
         "test_training.py -k a_gradient_that_is_not_finite_on_one_rank"),
        ("1 - self.decay)", "self.decay)", "test_training.py -k the_ema_is_that"),
        ("                x.data.copy_(weight)", "                pass",
         "test_training.py -k the_ema_is_that"),
        ("if name not in MAY_CHANGE and was != value:",
         "if name not in MAY_CHANGE and was is None:",
         "test_training.py -k 'resuming_says or goes_on_with_no_others'"),
        ("fcntl.flock(FolderLock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
         "test_training.py -k a_second_run_in_the_folder"),
        ("dist.all_reduce(votes, dist.ReduceOp.MAX)", "dist.all_reduce(votes, dist.ReduceOp.MIN)",
         "test_training.py -k a_signal_to_one_rank"),
        ("if found[name] != wanted:", "if found[name][0] != wanted[0]:",
         "test_training.py -k a_damaged_checkpoint_is_named"),
        ('torch.set_rng_state(state["torch"])', "pass", GOES_ON),
        ("                average.copy_(saved)", "                pass", GOES_ON),
    ],
    "models.py": [
        ("torch.where(mask, prompt_lens[:, None] - 1 + pos, 0)",
         "torch.where(mask, prompt_lens[:, None] + pos, 0)",
         "test_training.py -k answer_positions"),
        ("mask = pos < answer_lens[:, None]", "mask = pos < answer_lens[:, None] - 1",
         "test_training.py -k 'answer_positions or eos_carries'"),
        ("            self.softcap,", "            0.0,",
         "test_training.py -k a_padded_batch_gives"),
        ("return values.gather(1, lengths[:, None] - 1)",
         "return values.gather(1, lengths[:, None] - 2)",
         SECOND_REWARD),
        ("return (logits - offset) * scale", "return logits * scale - offset",
         "test_training.py -k scores_are_centred"),
        ("self.scale = alpha / rank", "self.scale = alpha",
         "test_training.py -k alpha_over_rank"),
        ("delta = lora.scale * (B.float() @ A.float())", "delta = B.float() @ A.float()",
         "test_training.py -k merged_weights"),
        ("model.score.requires_grad_(True)", "pass", "test_training.py -k a_head_is_trained"),
        ("        LoRA.enabled = True", "        pass", "test_training.py -k adapters_off"),
        ("setattr(config, name, 0.0)", "pass", "test_training.py -k dropout_is_off"),
        ("std=(model.score.in_features + 1) ** -0.5", "std=1.0",
         "test_training.py -k 'score or reward_model'"),
        ('key=lambda file: file.name == "config.json")', "key=lambda file: file.name)",
         "test_training.py -k a_save_that_is_killed"),
    ],
    "data.py": [
        ("ids = ids + [eos]", "ids = list(ids)",
         "test_data.py -k 'an_answer_ends or rows_end_once'"),
        ("source, content, columns, template, chat_template,",
         "source, columns, template, chat_template,",
         "test_data.py -k 'tokens_are_made_once or never_stale'"),
        ("parts = [VERSION, token_code(), source", "parts = [VERSION, source",
         "test_data.py -k other_code"),
        ("             tokenizer.bos_token_id, tokenizer.eos_token_id]",
         "             tokenizer.bos_token_id]",
         "test_data.py -k another_end_token"),
        ("if len(set(contents)) > 1:", "if len(set(contents)) > dist.get_world_size():",
         "test_data.py -k ranks_share_one_cache"),
        ("        self.fits &= ~bad", "        pass", "test_data.py -k left_out"),
        ("equal.append(len(answers) == 1)", "equal.append(False)",
         "test_data.py -k pairs_of_equal_answers"),
        ("(self.hashes % np.uint64(10_000)) < held_out * 10_000", "u < held_out",
         "test_data.py -k split_divides"),
        ("rng = np.random.default_rng([seed, epoch])", "rng = np.random.default_rng([seed])",
         "test_data.py -k an_epoch_has_every_row"),
        ("islice(epoch_batches, skip, None)", "islice(epoch_batches, 0, None)",
         "test_ppo.py -k mixture_goes_on"),
    ],
    "sources.py": [
        ("return prompt + more", "return more + prompt", "test_data.py -k a_system_message"),
        ("if earlier != before[0]:", "if earlier is None:",
         "test_data.py -k pairs_of_two_conversations"),
        ('make_example([], pair, "chosen")', 'make_example([], pair, "rejected")',
         "test_data.py -k layout"),
        ("renamed[new] = row[old]", "renamed[old] = row[old]", "test_data.py -k columns"),
    ],
    "tasks.py": [
        ("name, word = found[-1]", "name, word = found[0]", "test_data.py -k toy_is_exactly"),
        ("if answer != right:", "if answer != word:", "test_data.py -k toy_is_exactly"),
        ("**copy.deepcopy(arguments)", "**arguments", "test_data.py -k gets_copies"),
        ("if len(scores) != len(prompts):", "if len(scores) > len(prompts):",
         "test_data.py -k a_wrong_reward_function"),
        ("import_file(path, path.stat().st_mtime_ns)", "import_file(path, 0)",
         "test_data.py -k two_functions_of_a_file"),
    ],
    "hybrid_engine.py": [
        ("torch.arange(n) + low + high", "torch.zeros(n, dtype=torch.long) + low + high",
         BATCHED),
        ("lengths.masked_fill(cache.done[:n], 0)", "(lengths - 1).masked_fill(cache.done[:n], 0)",
         GREEDY),
        ("slots[others].tolist(), lengths[others].tolist())",
         "slots[others].tolist(), (lengths[others] - 1).tolist())",
         BATCHED),
        ("        cache.done[slots] = False", "        pass", GREEDY),
        ("for x in self.state():", "for x in self.state()[1:]:", BATCHED),
        ("torch.where(mask, self.out_tokens[rows, :T], 0)", "self.out_tokens[rows, :T]",
         "test_engine.py -k rows_are_padded_with_zeros"),
        ("torch.where(mask, prompt_lens[:, None] + index, 0)",
         "torch.where(mask, prompt_lens[:, None] - 1 + index, 0)",
         "test_engine.py -k logprobs_of_sampled_tokens"),
        ("sampled = mask & ~self.out_given[rows].gather(1, index)", "sampled = mask", TOOLS),
        ("is_full = cache.lengths[slots] >= cache.max_lengths[slots]",
         "is_full = cache.lengths[slots] > cache.max_lengths[slots]",
         TOOLS),
        ("first = sum(len(p) for p, _ in of_rank[: self.decoder.tp_rank])",
         "first = n * self.decoder.tp_rank",
         TENSOR_PARALLEL),
        ("        self.decoder.release()", "        pass", "test_engine.py -k zero_shards"),
        ("logits.float() / (self.temperature or 1)", "logits.float()",
         "test_engine.py -k slow_path"),
    ],
    "decoder.py": [
        ("position_offset=2", "position_offset=0", GREEDY),
        ('kinds[index] != "sliding_attention"', 'kinds[index] == "sliding_attention"', GREEDY),
        ("self.cos = angles.cos() * scaling", "self.cos = angles.cos()", GREEDY),
        ("return not with_rope or bool(with_rope[index])", "return True", GREEDY),
        ("return kernels.add_product(y, kernels.linear(x, A), B, scale)",
         "return kernels.add_product(y, kernels.linear(x, A), B, 1.0)",
         "test_engine.py -k 'greedy or follows_every'"),
        ("weight = module.weight.data", "weight = module.weight.data.clone()",
         "test_engine.py -k by_reference"),
        ("y = linear(x, bias=False)", "y = linear(x)", TENSOR_PARALLEL),
        ("with gathered(*layer.parameters()):", "with gathered():",
         "test_engine.py -k zero_shards"),
    ],
    "kernels.py": [
        ("mask &= pos > pos[:, None] - spec.window", "mask &= pos >= pos[:, None] - spec.window",
         "test_kernels.py -k packed_prefill_is_attention"),
        ("slopes = slopes.to(torch.promote_types(dtype, torch.float32))",
         "slopes = slopes.to(dtype)",
         "test_kernels.py -k far_positions_apart"),
        ("k = rotate(k, cos[positions], sin[positions])",
         "k = rotate(k, cos[positions - 1], sin[positions - 1])",
         "test_kernels.py -k rope"),
        ("k_cache[slots, :, positions] = k", "k_cache[slots, :, positions - 1] = k",
         "test_kernels.py -k rope"),
        ("bits = hash32(hash32(keys) + counters * 0x9E3779B9)", "bits = hash32(hash32(keys))",
         "test_kernels.py -k uniform_numbers"),
        ("rows.done[slots] |= is_eos", "rows.done[slots] = is_eos",
         "test_kernels.py -k a_sampled_token_is_appended"),
        ("dz = log_p + entropy[:, None]", "dz = log_p - entropy[:, None]", LOGPROBS),
        ("d_weight = torch.zeros_like(weight, dtype=torch.float32)",
         "d_weight = torch.zeros_like(weight)",
         "test_kernels.py -k added_up_in_float32"),
        ("qk = tl.where(pos <= offs_m[:, None], qk, -1e30)",
         "qk = tl.where(pos < offs_m[:, None], qk, -1e30)",
         "test_kernels.py -k packed_prefill_is_attention"),
        ("l_i = l_i * alpha + tl.sum(p, 1)", "l_i = l_i + tl.sum(p, 1)",
         "test_kernels.py -k packed_prefill_is_attention"),
        ("dz += tl.where(offs == tl.load(targets_ptr + row), g, 0.0)",
         "dz -= tl.where(offs == tl.load(targets_ptr + row), g, 0.0)",
         LOGPROBS),
    ],
    "utils.py": [
        ("torch.stack(parts, 1).flatten(0, 1)[:total]", "torch.cat(parts)[:total]", TWO_RANKS),
        ("np.argsort(-lengths[rows], kind", "np.argsort(lengths[rows], kind",
         "test_ppo.py -k micro_batches_hold"),
        ("if step < warmup_steps:", "if step < 0:", "test_ppo.py -k warms_up"),
        ("    new.write_text(text)", "    Path(path).write_text(text); new.write_text(text)",
         "test_ppo.py -k a_file_that_is_being_replaced"),
        ("            self.file.flush()", "            pass",
         "test_ppo.py -k in_its_file_at_once"),
    ],
    "chat.py": [
        ("del messages[:2]", "del messages[:1]", "test_mistakes.py -k turns_that_no_longer_fit"),
        ('messages.append({"role": "assistant", "content": answer})', "pass",
         "test_mistakes.py -k conversation"),
    ],
    "plan.py": [
        ("return 2 * s.L", "return s.L", "test_bench.py -k head_size"),
    ],
    "bench.py": [
        ("first_eos + 1, answers.size(1)", "first_eos, answers.size(1)",
         "test_bench.py -k transformers_generates"),
    ],
}


class Mutant(NamedTuple):
    number: int
    file: str
    old: str     # a part of one of its lines, found once in the file
    new: str
    tests: list  # pytest's arguments


def all_mutants():
    """{number: Mutant}, from 1."""
    mutants = {}
    for file, changes in MUTANTS.items():
        for old, new, tests in changes:
            number = len(mutants) + 1
            mutants[number] = Mutant(number, file, old, new, shlex.split(tests))
    return mutants


def lines_of(mutant):
    """The number of the line that changes, the line, and the line in its place."""
    text = (HERE / mutant.file).read_text()
    count = text.count(mutant.old)
    if count != 1 or "\n" in mutant.old + mutant.new:
        sys.exit(f"mutant {mutant.number}: {mutant.old!r} is {count} times in {mutant.file}")
    start, _, end = text.partition(mutant.old)
    before = start.rpartition("\n")[2]
    after = end.partition("\n")[0]
    line = start.count("\n") + 1
    return line, before + mutant.old + after, before + mutant.new + after


# -----------------------------------------------------------------------------
# running


def copy_repository(folder):
    """A copy of the repository in FOLDER/repository, and beside it the data that the tests share.
    Returns its path."""
    copy = folder / "repository"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "out", "__pycache__", ".*_cache", RESULTS.name)
    shutil.copytree(HERE, copy, ignore=ignored)
    shared = HERE.parent / "shared"
    if shared.exists():
        (folder / "shared").symlink_to(shared.resolve())
    return copy


def test_files(copy):
    """Those of `make test`."""
    makefile = (copy / "Makefile").read_text().replace("\\\n", " ")
    return re.search(r"^TESTS = (.*)$", makefile, re.M)[1].split()


def first_failure(copy, arguments, limit, processes=0):
    """Runs pytest. Returns the name of the first test that fails, "timeout" where the tests take
    too long, None where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    if processes > 1:
        command += ["-n", str(processes)]
    for test in LEFT_OUT:
        command += ["--deselect", test]
    environment = {**os.environ, "COLUMNS": "300", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=copy, env=environment, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and the ranks that it has started
            process.wait()
    if process.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+\.py(?:::.*?)?)(?: - |$)", output, re.M)
    if process.returncode not in (1, 2) or not found:  # 2: a test file cannot be imported
        sys.exit(f"pytest {shlex.join(arguments)} did not run:\n{output[-2000:]}")
    name = found[1]
    if not name.endswith("]"):
        name = name.partition("[")[0]  # the parameters of a test may hold anything
    return name


def run(mutant, args):
    """Returns the record of a mutant."""
    line, old, new = lines_of(mutant)
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = copy_repository(Path(folder))
        path = copy / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        failed = first_failure(copy, mutant.tests, LIMIT)
        if failed is None and not args.quick:
            failed = first_failure(copy, test_files(copy), FULL_LIMIT, args.n)
    seconds = time.time() - start
    print(f"{mutant.number:4} {mutant.file}:{line} {seconds:.0f} s, {failed}", flush=True)
    return {
        "number": mutant.number,
        "file": mutant.file,
        "line": line,
        "old": old.strip(),
        "new": new.strip(),
        "noticed": failed is not None,
        "by": failed,
    }


def check_tests(results):
    """Whether the tests that have noticed mutants pass where nothing is changed."""
    tests = {row["by"] for row in results} - {None, "timeout"}
    if not tests:
        return
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        failed = first_failure(copy_repository(Path(folder)), sorted(tests), FULL_LIMIT)
    if failed:
        sys.exit(f"{failed} fails without a mutant")
    print(f"tests that have noticed a mutant: {len(tests)}, which pass without one")


def read_results():
    """{number: record}."""
    if not RESULTS.exists():
        return {}
    return {row["number"]: row for row in json.loads(RESULTS.read_text())["mutants"]}


def write_results(results):
    rows = [results[number] for number in sorted(results)]
    record = {"edition": 2, "first_version": FIRST_VERSION, "mutants": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("-n", type=int, default=0, help="processes, for all tests")
    args = parser.parse_args()

    mutants = all_mutants()
    for mutant in mutants.values():
        lines_of(mutant)
    print(f"{len(mutants)} mutants")
    if args.check:
        return
    results = {} if args.all else read_results()
    numbers = args.numbers or [number for number in mutants if number not in results]
    for number in numbers:
        results[number] = run(mutants[number], args)
        write_results(results)
    survivors = [row for row in results.values() if not row["noticed"]]
    print(f"{len(results) - len(survivors)} of {len(results)} are noticed")
    for row in survivors:
        print(f"not noticed: {row['number']} {row['file']}:{row['line']} {row['new']}")
    check_tests([results[number] for number in numbers])


if __name__ == "__main__":
    main()
