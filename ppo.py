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
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import data
import utils
from hybrid_engine import make_engine
from reward import RewardModel, at_end


@dataclass(frozen=True)
class Config:
    model: str = "out/sft"             # model folder or hub name to start from: the SFT model, also the reference
    reward_model: str = "out/reward"   # folder of the reward model, from which the critic starts too
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
    stop_kl: float = 0.1               # stop the epochs on a rollout once a step moved the policy so far, in nats a token; 0: never
    clip: float = 0.2                  # how far a ratio may leave 1 before its gradient is cut
    value_clip: float = 0.2            # how far a value may leave its old value before its gradient is cut
    gamma: float = 1.0                 # discount of a token
    lam: float = 0.95                  # lambda of generalized advantage estimation
    score_clip: float = 5.0            # scores are cut to +- this
    eos_penalty: float = 1.0           # what the score of an answer without its EOS loses
    engine: Literal["hybrid", "hf"] = "hybrid"  # what samples: ours, or transformers.generate (any model, slower)
    tp: int = 1                        # ranks that share one copy of the model while they generate
    old_logprobs: Literal["trainer", "engine"] = "trainer"  # whose log-probabilities the ratio starts from; the engine's save a forward pass
    lora: int = 0                      # rank of LoRA adapters beside the linear layers, which alone are trained; 0: train all weights
    seed: int = 1                      # of initial weights, of the order of rows and of sampling
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU, fp32 on a CPU
    zero: Literal[0, 1, 2, 3] = 0      # ZeRO stage: shards optimizer (1), gradients (2), parameters (3) over the ranks
    ds_config: str = ""                # JSON file merged over the DeepSpeed settings in utils.train_engine

    def __post_init__(self):
        if self.temperature <= 0:
            raise utils.UserError(f"--temperature {self.temperature}: PPO learns from samples, so it must be above 0")
        if self.batch_size % self.minibatches:
            raise utils.UserError(f"--batch-size {self.batch_size} is not divided by --minibatches {self.minibatches}")
        if self.max_new_tokens >= self.max_len:
            raise utils.UserError(f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt in --max-len {self.max_len}")


EVAL_ROWS = 512   # held-out prompts that are looked at, at most
ADAM_EPS = 1e-5   # as in OpenAI's PPO: keeps the first steps, with tiny second moments, from being too long

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
    index, mask = utils.answer_index(prompt_lens, answer_lens)
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
    """[(prompt, answer)] as text, without special tokens."""
    out = []
    for row, p, a in zip(batch.tokens.tolist(), batch.prompt_lens.tolist(), batch.answer_lens.tolist()):
        out.append(tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in (row[:p], row[p : p + a])))
    return out


def main(cfg):
    rank, world, device = utils.boot(cfg.seed)
    dtype = utils.precision(cfg.dtype)

    # ---- four models, one tokenizer ----
    tokenizer = utils.load_tokenizer(cfg.model)
    if not utils.same_tokenizer(tokenizer, utils.load_tokenizer(cfg.reward_model)):
        raise utils.UserError(f"{cfg.reward_model} has another tokenizer than {cfg.model}: the reward model would read other words than the "
                              "policy writes; train it from the same model")
    eos, template = tokenizer.eos_token_id, data.check_template(cfg.template)
    actor = utils.Policy(utils.load_lm(cfg.model, dtype))
    if cfg.lora:
        utils.add_lora(actor.lm, cfg.lora)  # the reference is then the actor with its adapters off: it costs no memory
    ref = None if cfg.lora else utils.frozen_engine(utils.Policy(utils.load_lm(cfg.model, dtype)), device, cfg)
    critic = RewardModel.from_pretrained(cfg.reward_model, dtype)
    reward_model = utils.frozen_engine(RewardModel.from_pretrained(cfg.reward_model, dtype), device, cfg)
    context = min(utils.context_length(m.config) for m in (actor.lm, critic.model))
    if cfg.max_new_tokens >= context:
        raise utils.UserError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room for a prompt in the models' context of {context} tokens")

    # ---- prompts ----
    train, held_out = data.load(cfg.data, "ppo", cfg.split, cfg.held_out, template, tokenizer, min(cfg.max_len, context) - cfg.max_new_tokens)
    prompts = data.steps(train, train.lengths(), cfg.batch_size, cfg.seed, pool=1)                # a rollout is a random sample: no buckets
    gold = data.checker(cfg.data)                                                             # exact, on toy only; never trained on

    # ---- engines ----
    step_size = cfg.batch_size // cfg.minibatches
    micro, accumulate = utils.micro_batches(step_size, cfg.micro_batch, world)
    actor = utils.train_engine(actor, cfg.actor_lr, micro, accumulate, cfg, ADAM_EPS)
    critic = utils.train_engine(critic, cfg.critic_lr, micro, accumulate, cfg, ADAM_EPS)
    actor.eval(), critic.eval()                                                               # dropout is off in every model, always
    engine = make_engine(cfg.engine, actor, cfg.tp)
    utils.print0(f"step 3: {cfg.iterations} iterations of {cfg.batch_size} prompts, {cfg.ppo_epochs} epochs x {cfg.minibatches} steps of "
                 f"{step_size} rows = {world} ranks x {accumulate} x {micro}")
    columns = {"score": "7.3f", "gold": "6.3f", "kl": "6.3f", "entropy": "7.3f", "length": "6.1f", "eos_rate": "6.3f", "clip_frac": "6.3f",
               "explained_variance": "6.3f", "rollout_s": "6.2f", "tokens_per_s": "6.0f", "score_s": "6.2f", "update_s": "6.2f"}
    log = utils.Log(cfg, cfg.iterations, {k: f for k, f in columns.items() if gold or k != "gold"})
    samples = open(log.out / "samples.jsonl", "w") if rank == 0 else None
    one_pass = cfg.ppo_epochs * cfg.minibatches == 1  # the policy that sampled is the one that is updated: no old pass is needed
    kl_coef, clock = cfg.kl_coef, utils.Clock()

    def ref_logprobs(*x):
        with utils.adapters_off():
            return (ref or actor)(*x, cfg.temperature)[0]

    def score(tokens, prompt_lens, answer_lens):
        return at_end(reward_model(tokens), prompt_lens + answer_lens)

    def evaluate():
        """Held-out prompts, sampled with fixed seeds: score with its standard error, KL an answer, gold accuracy."""
        n = min(len(held_out), EVAL_ROWS)
        rows = np.resize(np.arange(n), n + -n % world)                                        # some twice, so that ranks get equally many
        batch = rollout(engine, [held_out.prompt(i) for i in rows], cfg, eos, [2**31 + i for i in rows.tolist()], rank, world)
        seen = ask(batch, [np.arange(len(rows))], max(micro, 32), rank, world, ref_logprobs=ref_logprobs, scores=score)
        scores, kl = seen["scores"][:n], ((batch.logprobs - seen["ref_logprobs"]) * batch.mask).sum(1)[:n]
        out = {"eval_score": scores.mean().item(), "eval_score_se": scores.std().item() / n**0.5, "eval_kl": kl.mean().item()}
        if gold:
            out["eval_gold"] = float(np.mean([gold(p, a) * e for (p, a), e in zip(texts(batch, tokenizer)[:n], ends(batch, eos).tolist())]))
        return out
    before = evaluate()
    log.write(0, before)

    for it in range(1, cfg.iterations + 1):
        scale = max(0.1, 1 - (it - 1) / cfg.iterations)
        utils.set_lr(actor, cfg.actor_lr * scale), utils.set_lr(critic, cfg.critic_lr * scale)

        # ---- rollout: the actor answers ----
        clock.lap()
        _, indices = next(prompts)
        seeds = [hash((cfg.seed, it, row)) for row in range(cfg.batch_size)]                  # a row's, wherever it is sampled
        batch = rollout(engine, [train.prompt(i) for i in indices], cfg, eos, seeds, rank, world)
        mask, tokens_sampled = batch.mask, int(batch.answer_lens.sum())
        rollout_s = clock.lap()

        # ---- score: what the four models say of the answers ----
        first_epoch = np.split(np.arange(cfg.batch_size), cfg.minibatches)
        questions = {"ref_logprobs": ref_logprobs, "scores": score, "values": lambda *x: answer_values(critic, *x)}
        if cfg.old_logprobs == "trainer" and not one_pass:
            questions["logprobs"] = lambda *x: actor(*x, cfg.temperature)[0]
        seen = ask(batch, first_epoch, micro, rank, world, **questions)
        old_logprobs = seen.get("logprobs", batch.logprobs)                                   # (B, A)
        finished = ends(batch, eos)                                                           # (B,)
        scores = seen["scores"] - cfg.eos_penalty * ~finished                                 # (B,)
        score_s = clock.lap()

        # ---- advantages: the same on every rank ----
        rewards = token_rewards(scores, old_logprobs, seen["ref_logprobs"], mask, kl_coef, cfg.score_clip)
        raw, returns = gae(seen["values"], rewards, mask, cfg.gamma, cfg.lam)
        advantages = whiten(raw, mask)

        # ---- update: several epochs over the same answers ----
        sums, steps, moved = torch.zeros(9, dtype=torch.float64), 0, 0.0
        ratio_max, gap = 0.0, []
        for epoch in range(cfg.ppo_epochs):
            # The first epoch keeps the rollout's order, which is random already; the same shuffles on every rank.
            order = np.arange(cfg.batch_size) if epoch == 0 else np.random.default_rng([cfg.seed, it, epoch]).permutation(cfg.batch_size)
            for rows in np.split(order, cfg.minibatches):
                if cfg.stop_kl and moved > cfg.stop_kl:
                    break
                n_tokens, seen_by_step = int(batch.answer_lens[rows].sum()), torch.zeros(9, dtype=torch.float64)
                for part in utils.deal(rows, batch.lengths, micro, rank, world):
                    tokens, prompt_lens, answer_lens = batch.part(part)
                    A = int(answer_lens.max())
                    m, old, old_v, adv, ret = (x[part, :A] for x in (mask, old_logprobs, seen["values"], advantages, returns))  # (b, A)
                    weight = m.sum() / n_tokens * world * accumulate  # a mean over the step's tokens on all ranks, however it is cut

                    logprobs, entropy = actor(tokens, prompt_lens, answer_lens, cfg.temperature)  # (b, A)
                    if one_pass and cfg.old_logprobs == "trainer":
                        gap.append((old - logprobs.detach())[m])
                        old = logprobs.detach()
                    pi_loss = actor_loss(logprobs, old, adv, m, cfg.clip)
                    actor.backward(pi_loss * weight)
                    values = answer_values(critic, tokens, prompt_lens, answer_lens)              # (b, A)
                    v_loss = critic_loss(values, old_v, ret, m, cfg.value_clip)
                    critic.backward(v_loss * weight)
                    actor_norm, critic_norm = utils.step(actor), utils.step(critic)

                    with torch.no_grad():
                        log_ratio, n = (logprobs - old) * m, m.sum()
                        ratio = log_ratio.exp()
                        ratio_max = max(ratio_max, ratio[m].max().item())
                        outside = lambda x, c: ((x.abs() > c) & m).sum()  # noqa: E731
                        seen_by_step += torch.stack([n, pi_loss * n, v_loss * n, (entropy * m).sum(), (ratio * m).sum(), ((ratio - 1 - log_ratio) * m).sum(),
                                                     outside(ratio - 1, cfg.clip), outside(values - old_v, cfg.value_clip), ((values - ret) ** 2 * m).sum()]).double().cpu()
                seen_by_step = utils.all_sum(seen_by_step, device).cpu()
                moved, steps, sums = (seen_by_step[5] / seen_by_step[0]).item(), steps + 1, sums + seen_by_step
        update_s = clock.lap()

        # ---- what happened ----
        n, pi, v, entropy, ratio, approx_kl, clipped, v_clipped, v_error = (sums / sums[0]).tolist()
        log_ratio = (old_logprobs - seen["ref_logprobs"]) * mask
        kl = log_ratio.sum(1).mean().item()
        var = lambda x: x[mask].var(unbiased=False).item()  # noqa: E731
        gap = torch.cat(gap) if gap else (batch.logprobs - old_logprobs)[mask]
        metrics = {
            "score": seen["scores"].mean().item(), "score_std": seen["scores"].std().item(), "score_clipped": (scores.abs() > cfg.score_clip).float().mean().item(),
            "kl": kl, "kl_k3": ((-log_ratio).exp() - 1 + log_ratio).mul(mask).sum(1).mean().item(), "kl_coef": kl_coef,
            "entropy": entropy, "length": batch.answer_lens.float().mean().item(), "eos_rate": finished.float().mean().item(),
            "actor_loss": pi, "critic_loss": v, "ratio_mean": ratio, "ratio_max": ratio_max, "approx_kl": approx_kl, "steps": steps,
            "clip_frac": clipped, "value_clip_frac": v_clipped, "explained_variance": 1 - ((seen["values"] - returns)[mask].var() / returns[mask].var()).item(),
            "advantage_mean": raw[mask].mean().item(), "advantage_std": var(raw) ** 0.5, "return_mean": returns[mask].mean().item(),
            "actor_grad_norm": actor_norm, "critic_grad_norm": critic_norm, "actor_lr": cfg.actor_lr * scale,
            "engine_gap_mean": gap.abs().mean().item(), "engine_gap_max": gap.abs().max().item(),
            "rollout_s": rollout_s, "score_s": score_s, "update_s": update_s, "tokens_per_s": tokens_sampled / rollout_s,
            "memory_gib": utils.memory_gib(), **{f"engine_{k}": v for k, v in engine.stats.items()},
        }
        if cfg.kl_target:
            kl_coef = adapt(kl_coef, kl, cfg.kl_target, cfg.batch_size)
        if rank == 0:
            said = texts(batch, tokenizer)
            right = [gold(p, a) * e if gold else None for (p, a), e in zip(said, finished.tolist())]
            if gold:
                metrics["gold"] = float(np.mean(right))
            for (p, a), s, k, e, g in zip(said, scores.tolist(), log_ratio.sum(1).tolist(), finished.tolist(), right):
                samples.write(json.dumps({"iteration": it, "prompt": p, "answer": a, "score": round(s, 4), "kl": round(k, 4), "eos": e, "gold": g}) + "\n")
            samples.flush()
        if it == cfg.iterations or it % max(1, cfg.iterations // 4) == 0:
            metrics.update(evaluate())
        log(it, metrics)
        if rank == 0 and (it == 1 or it % max(1, cfg.iterations // 8) == 0):
            print(f"    {said[0][0][-60:]!r} -> {said[0][1]!r}  score {scores[0]:.2f}")
        if kl < -0.1:
            utils.print0(f"    warning: the mean KL is {kl:.2f}, below 0: a sampler and a trainer that agree cannot give that for long")

    # ---- a model folder ----
    utils.save_model(actor.module.lm, tokenizer, cfg.out)
    shown = "".join(f", {name} {before[k]:.3f} -> {metrics[k]:.3f}" for k, name in (("eval_gold", "gold"),) if k in metrics)
    utils.print0(f"saved {cfg.out}: held-out score {before['eval_score']:.3f} +- {before['eval_score_se']:.3f} -> {metrics['eval_score']:.3f} +- "
                 f"{metrics['eval_score_se']:.3f}{shown}, KL {metrics['eval_kl']:.2f} nats an answer")


if __name__ == "__main__":
    utils.run(main, Config)
