"""Step 3: reinforcement learning from human feedback with PPO (InstructGPT, Ouyang et al. 2022, section 3.5, "RL").

Four models: the actor (trained), the reference it must stay near (the SFT model, frozen), the critic (trained, starts as the reward
model) and the reward model (frozen). An iteration has four phases: rollout, score, advantages, update. On purpose not as in
DeepSpeed-Chat: answers are sampled, not greedy; log-probabilities have the temperature in them and no dropout; EOS is an action with a
gradient; advantages are whitened over the whole batch; several epochs and minibatches work; no answer is dropped.

    python ppo.py                                                     # from out/sft and out/reward, on the built-in prompts
    python ppo.py --model out/sft --reward-model out/reward --data prompts.jsonl --actor-lr 1e-6 --critic-lr 5e-6 --micro-batch 8
    torchrun --nproc_per_node 8 ppo.py --model out/sft --reward-model out/reward --data prompts.jsonl --actor-lr 1e-6 --critic-lr 5e-6 --zero 3

After the rollout every rank holds the whole batch, which is small (ids and a few numbers a token). So whitening, shuffling and
metrics need no care, and any number of ranks takes the same optimizer steps.

Dimension key:  B batch, P prompt, A answer, T = P + A.  logprobs, ref_logprobs, values, rewards, advantages, returns, mask are (B, A),
scores (B,). Position a of A is the a-th token of the answer; its value is that of the state before it.
"""
import importlib.util
import json
import math
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import models
import training
import utils
from hybrid_engine import make_engine
from reward import RewardModel, at_end


@dataclass(frozen=True)
class Config:
    model: str = "out/sft"             # model folder or hub name to start from: the SFT model, also the reference
    reward_model: str = "out/reward"   # folder of the reward model, from which the critic starts too; empty: none, --reward alone
    reward: str = ""                   # a function that scores answers, file.py:function or with a weight file.py:function:0.5; added to the reward model's, cut to +-5
    data: str = "toy"                  # sources, joined by commas, each with an optional :weight
    out: str = "out/ppo"               # folder of the run; it is itself a model folder
    split: str = ""                    # shares of the rows that steps 1, 2 and 3 get, such as 2,4,4; empty: all to each
    held_out: float = 0.05             # share of the rows that is only evaluated on
    template: str = "Human: {prompt}\nAssistant:"  # how a prompt is written; chat: the tokenizer's own chat template
    max_len: int = 512                 # rows of more tokens, prompt and answer, are left out, and counted
    max_new_tokens: int = 16           # longest answer
    temperature: float = 1.0           # of sampling; every log-probability has it in it
    iterations: int = 32               # rollouts
    batch_size: int = 512              # prompts of one rollout, on all ranks together
    ppo_epochs: int = 1                # passes over each rollout
    minibatches: int = 4               # optimizer steps of one pass
    micro_batch: int = 0               # rows a rank takes at once; 0: its whole share
    actor_lr: float = 3e-4             # peak learning rate of the actor; take about 1e-6 for a pretrained model
    critic_lr: float = 1e-3            # peak learning rate of the critic; take about 5e-6 for a pretrained model
    kl_coef: float = 0.05              # reward a token loses for each nat that its log-probability lies above the reference's
    kl_target: float = 0.0             # adapt kl_coef towards this KL, in nats an answer (Ziegler et al. 2019); 0: leave it fixed
    clip: float = 0.2                  # how far a ratio may leave 1 before its gradient is cut
    engine: Literal["hybrid", "hf"] = "hybrid"  # what samples: ours, or transformers.generate (any model, slower)
    ptx_data: str = ""                 # sources of text or demonstrations that the actor goes on learning (InstructGPT's PPO-ptx); empty: none
    ptx_coef: float = 1.0              # weight of that loss, a mean over tokens like PPO's own
    ema: float = 0.992                 # decay of the actor's moving average, which is saved in OUT/ema; 0: none
    tp: int = 1                        # ranks that share one copy of the model while they generate
    old_logprobs: Literal["trainer", "engine"] = "trainer"  # whose log-probabilities the ratio starts from; the engine's save a forward pass
    lora: str = ""                     # train adapters only, in ppo.py of the actor: their rank, or such as 8,alpha=16,lr=1e-3,targets=q_proj+v_proj; empty: all weights
    seed: int = 1                      # of initial weights, of the order of rows and of sampling
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU, fp32 on a CPU
    zero: Literal[0, 1, 2, 3] = 0      # ZeRO stage: shards optimizer (1), gradients (2), parameters (3) over the ranks
    save_memory: Literal["no", "recompute", "offload", "both"] = "no"  # recompute activations; offload optimizer, frozen models, ZeRO-3 weights to the CPU
    resume: bool = False               # go on after the last complete checkpoint in --out
    ds_config: str = ""                # JSON file merged over the DeepSpeed settings in training.train_engine

    def __post_init__(self):
        if self.temperature <= 0:
            raise utils.UserError(f"--temperature {self.temperature}: PPO learns from samples, so it must be above 0")
        utils.at_least(self, 1, "batch_size", "minibatches", "iterations", "ppo_epochs", "max_new_tokens", "tp")
        utils.at_least(self, 0, "micro_batch")
        if self.ptx_data and self.ptx_coef and self.zero == 3 and self.save_memory in ("recompute", "both"):
            raise utils.UserError("--ptx-data needs two forwards a backward, which DeepSpeed's ZeRO-3 cannot recompute; take --zero 2, or leave recomputing out")
        if self.batch_size % self.minibatches:
            raise utils.UserError(f"--batch-size {self.batch_size} is not divided by --minibatches {self.minibatches}")
        if not self.reward_model and not self.reward:
            raise utils.UserError("--reward-model is empty, so --reward must name a function that scores answers")
        if not 0 <= self.ema < 1:
            raise utils.UserError(f"--ema {self.ema}: a decay is at least 0 and below 1")
        if self.max_new_tokens >= self.max_len:
            raise utils.UserError(f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt in --max-len {self.max_len}")


EVAL_ROWS = 512    # held-out prompts that are looked at, at most
EVALS = 4          # times in a run, besides its start
ADAM_EPS = 1e-5    # as in OpenAI's PPO: keeps the first steps, with tiny second moments, from being too long
GAMMA = 1.0        # discount of a token: answers are short, and only their end is judged
LAM = 0.95         # lambda of generalized advantage estimation
VALUE_CLIP = 0.2   # how far a value may leave its old value before its gradient is cut
SCORE_CLIP = 5.0   # scores are cut to +- this; a reward model's have variance 1
EOS_PENALTY = 1.0  # what the score of an answer without its EOS loses
STOP_KL = 0.1      # the epochs on a rollout end once a step moved the policy so far, in nats a token

# -----------------------------------------------------------------------------
# the formulas


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and variance 1 over the masked entries; 0 elsewhere. x, mask (B, A)."""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, score_clip):
    """-kl_coef * log(policy / reference) at every token, and the score, clipped, at the last (InstructGPT eq. 2). scores (B,);
    the rest and the result (B, A). The result carries no gradient: KL acts through the reward."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask                                     # (B, A)
    last = (mask.sum(1) - 1).long()                                                           # (B,)
    rewards[torch.arange(len(scores)), last] += scores.clamp(-score_clip, score_clip)
    return rewards.detach()


def gae(values, rewards, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16). All (B, A); zero past the end."""
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(rewards)                                                    # (B, A)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])                             # (B,)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def actor_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Clipped policy loss (Schulman et al. 2017, eq. 7), mean over the answers' tokens. All (B, A)."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    unclipped = -advantages * ratio
    clipped   = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.max(unclipped, clipped), mask)


def critic_loss(values, old_values, returns, mask, value_clip):
    """Half the squared error, of the value or of the value held near its old one, whichever is larger. All (B, A)."""
    held = old_values + (values - old_values).clamp(-value_clip, value_clip)
    unclipped = (values - returns) ** 2
    clipped   = (held - returns) ** 2
    return 0.5 * masked_mean(torch.max(unclipped, clipped), mask)


def adapt(kl_coef, kl, target, n):
    """A proportional controller (Ziegler et al. 2019, section 2.2) that moves kl_coef so that KL nears its target; n samples seen."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / 10_000)


# -----------------------------------------------------------------------------
# the phases


@dataclass
class Batch:
    """A rollout, whole, on every rank."""
    tokens: torch.Tensor               # (B, T) long, right-padded: prompt, then answer
    prompt_lens: torch.Tensor          # (B,)
    answer_lens: torch.Tensor          # (B,)
    logprobs: torch.Tensor             # (B, A) the engine's

    def part(self, rows):
        """tokens, prompt_lens, answer_lens of some rows, no wider than they need."""
        p, a = self.prompt_lens[rows], self.answer_lens[rows]
        return self.tokens[rows, : int((p + a).max())], p, a

    @property
    def mask(self):
        return torch.arange(self.logprobs.size(1), device=self.tokens.device) < self.answer_lens[:, None]  # (B, A)

    @property
    def lengths(self):
        return (self.prompt_lens + self.answer_lens).cpu().numpy()


def rollout(engine, prompts, cfg, eos, seeds, rank, world):
    """Answers to prompts (lists of ids): each rank samples its share, then all ranks hold all. seeds: one a prompt."""
    mine = range(rank, len(prompts), world)
    out = engine.generate([prompts[i] for i in mine], cfg.max_new_tokens, cfg.temperature, eos_token_id=eos, seed=[seeds[i] for i in mine])
    engine.release()                                                                          # its memory is training's now
    return Batch(*map(utils.gather_rows, (out.tokens, out.prompt_lens, out.answer_lens, out.logprobs)))


def answer_values(critic, tokens, prompt_lens, answer_lens):
    """The value of the state before each answer token, (B, A), 0 past the end."""
    index, mask = models.answer_index(prompt_lens, answer_lens)
    return critic(tokens).gather(1, index) * mask


@torch.no_grad()
def ask(batch, rows_of_steps, micro, rank, world, **questions):
    """Asks models about a batch: {name: f(tokens, prompt_lens, answer_lens) -> (b, a) or (b,)}. The work is dealt to the ranks in the
    very micro batches that the first epoch trains on (equal shapes, equal rounding: its first ratio is exactly 1)."""
    B, A = batch.logprobs.shape
    answers = {}
    for rows in rows_of_steps:
        for part in utils.deal(rows, batch.lengths, micro, rank, world):
            for name, question in questions.items():
                x = question(*batch.part(part))
                out = answers.setdefault(name, x.new_zeros((B, A) if x.dim() == 2 else B))
                out[(part, slice(x.size(1))) if x.dim() == 2 else part] = x
    for x in answers.values():
        torch.distributed.all_reduce(x)                                                       # every row was zero on all ranks but one
    return answers


def ends(batch, eos):
    """Whether each answer ended itself, (B,) bool."""
    return batch.tokens.gather(1, (batch.prompt_lens + batch.answer_lens - 1)[:, None])[:, 0] == eos


def texts(batch, tokenizer):
    """Prompts and answers as two lists of texts, without special tokens."""
    rows, p, a = batch.tokens.tolist(), batch.prompt_lens.tolist(), batch.answer_lens.tolist()
    spans = [row[:n] for row, n in zip(rows, p)], [row[n : n + m] for row, n, m in zip(rows, p, a)]
    return [[tokenizer.decode(ids, skip_special_tokens=True) for ids in part] for part in spans]


def load_function(spec):
    """'file.py:function' or 'file.py:function:weight' to (prompts, answers) -> weighted scores, a list of floats."""
    path, _, rest = spec.partition(".py:")
    path, (name, _, weight) = Path(path + ".py"), rest.partition(":")
    try:
        weight = float(weight or 1)
    except ValueError:
        raise utils.UserError(f"--reward {spec}: {weight!r} is not a weight; write file.py:function:0.5") from None
    if not path.is_file() or not name:
        raise utils.UserError(f"--reward {spec}: " + (f"there is no file {path}" if name else "write file.py:function"))
    module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location(path.stem, path))
    try:
        found.loader.exec_module(module)
    except Exception as e:
        raise utils.UserError(f"--reward {spec}: {path} cannot be imported: {type(e).__name__}({e})") from e
    if not callable(function := getattr(module, name, None)):
        raise utils.UserError(f"--reward {spec}: {path} has no function {name!r}")

    def ask_function(prompts, answers):
        try:
            scores = [weight * float(s) for s in function(prompts, answers)]
        except Exception as e:
            for p, a in zip(prompts, answers):  # one by one, to say which
                try:
                    float(function([p], [a])[0])
                except Exception as e:
                    raise utils.UserError(f"--reward {spec}: raised {type(e).__name__}({e}) for prompt {p!r}, answer {a!r}") from e
            raise utils.UserError(f"--reward {spec}: raised {type(e).__name__}({e}) for {len(prompts)} prompts at once, and for none alone") from e
        if len(scores) != len(prompts) or not all(map(math.isfinite, scores)):
            bad = [i for i, s in enumerate(scores) if not math.isfinite(s)]
            raise utils.UserError(f"--reward {spec}: " + (f"gave {scores[bad[0]]} for prompt {prompts[bad[0]]!r}, answer {answers[bad[0]]!r}" if bad else
                                                          f"gave {len(scores)} scores for {len(prompts)} prompts") + "; it must return one finite number each")
        return scores
    return ask_function


def main(cfg):
    rank, world, device = utils.boot(cfg.seed)
    dtype = utils.precision(cfg.dtype)

    # ---- four models, one tokenizer ----
    tokenizer = models.load_tokenizer(cfg.model)
    if cfg.model == "tiny":
        raise utils.UserError("--model tiny: its weights are random, and PPO begins with a model that answers; train one with sft.py first")
    if cfg.reward_model and not models.same_tokenizer(tokenizer, models.load_tokenizer(cfg.reward_model)):
        raise utils.UserError(f"{cfg.reward_model} has another tokenizer than {cfg.model}: the reward model would read other words than the "
                              "policy writes; train it from the same model")
    eos, template = tokenizer.eos_token_id, data.check_template(cfg.template, cfg.model, cfg.reward_model)
    rule = load_function(cfg.reward) if cfg.reward else None
    actor = models.Policy(models.add_lora(models.load_lm(cfg.model, dtype), cfg.lora))
    ref = None if models.lora_spec(cfg.lora)["rank"] else training.frozen_engine(models.Policy(models.load_lm(cfg.model, dtype)), device, cfg)  # or the actor, adapters off
    critic = RewardModel.from_pretrained(cfg.reward_model, dtype) if cfg.reward_model else RewardModel.from_lm(cfg.model, dtype)
    reward_model = training.frozen_engine(RewardModel.from_pretrained(cfg.reward_model, dtype), device, cfg) if cfg.reward_model else None
    context = min(models.context_length(m.config) for m in (actor.lm, critic and critic.model) if m)
    words, known = actor.lm.config.vocab_size, min(m.config.vocab_size for m in (actor.lm, critic and critic.model) if m)
    if known < words:
        raise utils.UserError(f"{cfg.model} has {words} token ids and {cfg.reward_model} only {known}, so it could be asked of one that it lacks; give it as many "
                              "(transformers' resize_token_embeddings), or train it from the same model")
    if cfg.max_new_tokens >= context:
        raise utils.UserError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room for a prompt in the models' context of {context} tokens")

    # ---- prompts ----
    train, held_out = data.load(cfg.data, "ppo", cfg.split, cfg.held_out, template, tokenizer, min(cfg.max_len, context) - cfg.max_new_tokens)
    gold = data.checker(cfg.data)                                                             # exact, on toy only; never trained on
    ptx_rows = data.load(cfg.ptx_data, "sft", cfg.split, cfg.held_out, template, tokenizer, min(cfg.max_len, context))[0] if cfg.ptx_data and cfg.ptx_coef else None

    # ---- engines ----
    step_size = cfg.batch_size // cfg.minibatches
    micro, accumulate = utils.micro_batches(step_size, cfg.micro_batch, world)
    actor = training.train_engine(actor, cfg.actor_lr, micro, accumulate, cfg, ADAM_EPS)
    # no critic: in recipes of the README, which put another baseline in its place
    critic = critic and training.train_engine(critic, cfg.critic_lr, micro, accumulate, cfg, ADAM_EPS)
    ema = training.EMA(actor, cfg.ema, cpu=training.saves(cfg, "offload")) if cfg.ema else None
    engine = make_engine(cfg.engine, actor, cfg.tp)
    utils.print0(f"step 3: {cfg.iterations} iterations of {cfg.batch_size} prompts, {cfg.ppo_epochs} epochs x {cfg.minibatches} steps of "
                 f"{step_size} rows = {world} ranks x {accumulate} x {micro}")
    one_pass = cfg.ppo_epochs * cfg.minibatches == 1  # the policy that sampled is the one that is updated: no old pass is needed

    def ref_logprobs(*x):
        with models.adapters_off():
            return (ref or actor)(*x, cfg.temperature)[0]

    def ask_frozen(batch, rows_of_steps, micro, **questions):
        """What the frozen models (and the questions) say: as `ask`; "scores" (B,) are the reward model's and the function's together."""
        if reward_model:
            questions["scores"] = lambda tokens, p, a: at_end(reward_model(tokens), p + a)
        with training.near(device, ref, reward_model):
            seen = ask(batch, rows_of_steps, micro, rank, world, ref_logprobs=ref_logprobs, **questions)
        said = texts(batch, tokenizer) if rank == 0 else None
        if rule:
            told = torch.zeros(len(batch.tokens), device=device)
            if rank == 0:
                told += torch.tensor(rule(*said), device=device)
            torch.distributed.broadcast(told, 0)
            seen["scores"] = seen.get("scores", 0) + told
        return seen, said

    def right(said, finished):
        """What the exact checker says, on rank 0: 1 where an answer is right and ended."""
        return [gold(p, a) * e for p, a, e in zip(*said, finished.tolist())]

    def evaluate():
        """Held-out prompts, sampled with fixed seeds: score with its standard error, KL an answer, gold accuracy."""
        n = min(len(held_out), EVAL_ROWS)
        rows = np.resize(np.arange(n), n + -n % world)                                        # some twice, so that ranks get equally many
        batch = rollout(engine, [held_out.prompt(i) for i in rows], cfg, eos, [2**31 + i for i in rows.tolist()], rank, world)
        seen, said = ask_frozen(batch, [np.arange(len(rows))], max(micro, 32))
        scores, kl = seen["scores"][:n], ((batch.logprobs - seen["ref_logprobs"]) * batch.mask).sum(1)[:n]
        out = {"eval_score": scores.mean().item(), "eval_score_se": scores.std().item() / n**0.5, "eval_kl": kl.mean().item()}
        if gold and rank == 0:
            out["eval_gold"] = float(np.mean(right(said, ends(batch, eos))[:n]))
        return out

    # ---- where the run begins, or goes on ----
    checkpoint = training.Checkpoint(cfg, cfg.iterations, ema=ema, actor=actor, critic=critic)
    start, state = checkpoint.restore()
    kl_coef, ptx_steps = state.get("kl_coef", cfg.kl_coef), state.get("ptx_steps", 0)
    before = state.get("before") or evaluate()
    prompts = data.steps(train, train.lengths(), cfg.batch_size, cfg.seed, start, pool=1)         # a rollout is a random sample: no buckets
    if ptx_rows:
        text_lengths, text_tokens = ptx_rows.lengths("response"), ptx_rows.answer_lengths("response")
        ptx = data.steps(ptx_rows, text_lengths, step_size, cfg.seed, ptx_steps)
    columns = {"score": "7.3f", "gold": "6.3f", "kl": "6.3f", "entropy": "7.3f", "length": "6.1f", "eos_rate": "6.3f", "clip_frac": "6.3f",
               "explained_variance": "6.3f", "rollout_s": "6.2f", "tokens_per_s": "6.0f", "score_s": "6.2f", "update_s": "6.2f"}
    log = utils.Log(cfg, cfg.iterations, {k: f for k, f in columns.items() if gold or k != "gold"}, start=start)
    samples = utils.open_lines(log.out / "samples.jsonl", "iteration", start) if rank == 0 else None
    if not start:
        log.write(0, before)
    clock = utils.Clock()

    for it in range(start + 1, cfg.iterations + 1):
        scale = max(0.1, 1 - (it - 1) / cfg.iterations)
        for e, lr in ((actor, cfg.actor_lr), (critic, cfg.critic_lr)):
            if e:
                training.set_lr(e, lr * scale)

        # ---- rollout: the actor answers ----
        clock.lap()
        _, indices = next(prompts)
        seeds = [hash((cfg.seed, it, row)) for row in range(cfg.batch_size)]                  # a row's, wherever it is sampled
        batch = rollout(engine, [train.prompt(i) for i in indices], cfg, eos, seeds, rank, world)
        mask, tokens_sampled = batch.mask, int(batch.answer_lens.sum())
        rollout_s = clock.lap()

        # ---- score: what the four models say of the answers ----
        questions = {"values": lambda *x: answer_values(critic, *x)} if critic else {}
        if cfg.old_logprobs == "trainer" and not one_pass:
            questions["logprobs"] = lambda *x: actor(*x, cfg.temperature)[0]
        seen, said = ask_frozen(batch, np.split(np.arange(cfg.batch_size), cfg.minibatches), micro, **questions)
        old_logprobs = seen.get("logprobs", batch.logprobs)                                   # (B, A)
        finished = ends(batch, eos)                                                           # (B,)
        scores = seen["scores"] - EOS_PENALTY * ~finished                                     # (B,)
        score_s = clock.lap()

        # ---- advantages: the same on every rank ----
        rewards = token_rewards(scores, old_logprobs, seen["ref_logprobs"], mask, kl_coef, SCORE_CLIP)  # (B, A)
        raw, returns = gae(seen["values"], rewards, mask, GAMMA, LAM)
        advantages = whiten(raw, mask)

        # ---- update: several epochs over the same answers ----
        sums, steps, moved, trained = torch.zeros(8, dtype=torch.float64), 0, 0.0, torch.zeros_like(batch.logprobs)
        ratio_max = torch.zeros((), device=device)
        for epoch in range(cfg.ppo_epochs):
            # The first epoch keeps the rollout's order, which is random already; the same shuffles on every rank.
            order = np.arange(cfg.batch_size) if epoch == 0 else np.random.default_rng([cfg.seed, it, epoch]).permutation(cfg.batch_size)
            for rows in np.split(order, cfg.minibatches):
                if moved > STOP_KL:
                    break
                n_tokens, seen_by_step = int(batch.answer_lens[rows].sum()), torch.zeros(8, dtype=torch.float64)
                parts, extra = utils.deal(rows, batch.lengths, micro, rank, world), []
                if ptx_rows:
                    _, text = next(ptx)
                    extra, ptx_steps = utils.deal(text, text_lengths, micro, rank, world), ptx_steps + 1
                for part, more in zip_longest(parts, extra):
                    tokens, prompt_lens, answer_lens = batch.part(part)
                    A = int(answer_lens.max())
                    m, old, adv = (x[part, :A] for x in (mask, old_logprobs, advantages))         # (b, A)
                    share = m.sum() / n_tokens * world * accumulate  # a mean over the step's tokens on all ranks, however it is cut

                    logprobs, entropy = actor(tokens, prompt_lens, answer_lens, cfg.temperature)  # (b, A)
                    trained[part, :A] = logprobs.detach()
                    if one_pass and cfg.old_logprobs == "trainer":
                        old = logprobs.detach()
                    pi_loss = actor_loss(logprobs, old, adv, m, cfg.clip)
                    losses, v_loss = {actor: pi_loss * share}, pi_loss.new_zeros(())
                    if ptx_rows:
                        text_logprobs, _ = actor(*data.collate(ptx_rows, more, device))           # (b, A'), at temperature 1
                        losses[actor] -= cfg.ptx_coef * text_logprobs.sum() / text_tokens[text].sum() * world * accumulate
                    if critic:
                        values = answer_values(critic, tokens, prompt_lens, answer_lens)          # (b, A)
                        v_loss = critic_loss(values, seen["values"][part, :A], returns[part, :A], m, VALUE_CLIP)
                        losses[critic] = v_loss * share
                    for e, loss in losses.items():
                        e.backward(loss)
                    norms = training.step(*losses)
                    if ema and norms and norms[0] is not None:
                        ema.update()

                    with torch.no_grad():
                        log_ratio, n = (logprobs - old) * m, m.sum()
                        ratio = log_ratio.exp()
                        ratio_max = torch.maximum(ratio_max, ratio[m].max())
                        seen_by_step += torch.stack([n, pi_loss * n, v_loss * n, (entropy * m).sum(), (ratio * m).sum(), ((ratio - 1 - log_ratio) * m).sum(),
                                                     (((ratio - 1).abs() > cfg.clip) & m).sum(),
                                                     (((values - seen["values"][part, :A]).abs() > VALUE_CLIP) & m).sum() if critic else n * 0]).double().cpu()
                seen_by_step = utils.all_sum(seen_by_step, device).cpu()
                moved, steps, sums = (seen_by_step[5] / seen_by_step[0]).item(), steps + 1, sums + seen_by_step
        torch.distributed.all_reduce(ratio_max, torch.distributed.ReduceOp.MAX)
        if one_pass:
            torch.distributed.all_reduce(trained)                                             # every row was zero on all ranks but one
        update_s = clock.lap()

        # ---- what happened ----
        n, pi, v, entropy, ratio, approx_kl, clipped, v_clipped = (sums / sums[0]).tolist()
        log_ratio = (old_logprobs - seen["ref_logprobs"]) * mask
        kl = log_ratio.sum(1).mean().item()
        gap = (batch.logprobs - (trained if one_pass else old_logprobs))[mask].abs()
        metrics = {
            "score": seen["scores"].mean().item(), "score_std": seen["scores"].std().item(), "score_clipped": (scores.abs() > SCORE_CLIP).float().mean().item(),
            "kl": kl, "kl_k3": ((-log_ratio).exp() - 1 + log_ratio).mul(mask).sum(1).mean().item(), "kl_coef": kl_coef,
            "entropy": entropy, "length": batch.answer_lens.float().mean().item(), "eos_rate": finished.float().mean().item(),
            "actor_loss": pi, "ratio_mean": ratio, "ratio_max": ratio_max.item(), "approx_kl": approx_kl, "steps": steps, "clip_frac": clipped,
            "advantage_mean": raw[mask].mean().item(), "advantage_std": raw[mask].std(unbiased=False).item(),
            "actor_grad_norm": norms[0], "actor_lr": cfg.actor_lr * scale, "skipped": training.Skipped.total,
            "engine_gap_mean": gap.mean().item(), "engine_gap_max": gap.max().item(),
            "rollout_s": rollout_s, "score_s": score_s, "update_s": update_s, "tokens_per_s": tokens_sampled / rollout_s,
            "memory_gib": utils.memory_gib(), **{f"engine_{k}": v for k, v in engine.stats.items()},
        }
        if critic:
            error = (seen["values"] - returns)[mask].var() / returns[mask].var()
            metrics |= {"critic_loss": v, "value_clip_frac": v_clipped, "explained_variance": 1 - error.item(), "return_mean": returns[mask].mean().item(),
                        "critic_grad_norm": norms[1]}
        if cfg.kl_target:
            kl_coef = adapt(kl_coef, kl, cfg.kl_target, cfg.batch_size)
        if rank == 0:
            golds = right(said, finished) if gold else [None] * len(scores)
            if gold:
                metrics["gold"] = float(np.mean(golds))
            for p, a, s, k, e, g in zip(*said, scores.tolist(), log_ratio.sum(1).tolist(), finished.tolist(), golds):
                samples.write(json.dumps({"iteration": it, "prompt": p, "answer": a, "score": round(s, 4), "kl": round(k, 4), "eos": e, "gold": g}) + "\n")
            samples.flush()
        if it == cfg.iterations or it % max(1, cfg.iterations // EVALS) == 0:
            metrics |= evaluate()
        if it == cfg.iterations:
            models.save_model(actor.module.lm, tokenizer, cfg.out)                            # a model folder
            if ema:
                with ema.in_place():
                    models.save_model(actor.module.lm, tokenizer, f"{cfg.out}/ema")
                    metrics |= {k.replace("eval", "eval_ema"): v for k, v in evaluate().items()}
        log(it, metrics)
        if rank == 0 and (it == 1 or it % max(1, cfg.iterations // 8) == 0):
            print(f"    {said[0][0][-60:]!r} -> {said[1][0]!r}  score {scores[0]:.2f}")
        if metrics["score_clipped"] > 0.2:
            utils.print0(f"    warning: {metrics['score_clipped']:.0%} of the scores lie outside +- {SCORE_CLIP} and are cut to it, so they are all alike; give --reward a weight "
                         "that brings them there, such as file.py:function:0.1")
        if kl < -0.1:
            utils.print0(f"    warning: the mean KL is {kl:.2f}, below 0: a sampler and a trainer that agree cannot give that for long")
        checkpoint.save(it, kl_coef=kl_coef, ptx_steps=ptx_steps, before=before)

    checkpoint.finish()
    shown = "".join(f", {name} {before[k]:.3f} -> {metrics[k]:.3f}" for k, name in (("eval_gold", "gold"),) if k in metrics) + "".join(
        f" (average {metrics[k]:.3f})" for k in ("eval_ema_gold",) if k in metrics)
    utils.print0(f"saved {cfg.out}: held-out score {before['eval_score']:.3f} +- {before['eval_score_se']:.3f} -> {metrics['eval_score']:.3f} +- "
                 f"{metrics['eval_score_se']:.3f}{shown}, KL {metrics['eval_kl']:.2f} nats an answer")


if __name__ == "__main__":
    utils.run(main, Config)
