r"""Step 3: reinforcement learning from human feedback with PPO (InstructGPT, Ouyang et al. 2022,
section 3.5, "RL").

There are four models. The actor is trained. The reference is the frozen SFT model, which the actor
must stay close to. The reward model is frozen. The critic is trained, and starts as a copy of the
reward model. One iteration has four phases: rollout, score, estimate_advantages, update.

Differs from DeepSpeed-Chat by design: answers are sampled, not greedy; log-probabilities include
the temperature and no dropout; EOS is an action with a gradient; advantages are whitened over the
whole batch; a rollout may be used for several epochs and minibatches; no answer is dropped.

    python ppo.py                         # from out/sft and out/reward, on the built-in prompts
    python ppo.py --model out/sft --reward out/reward --data prompts.jsonl --actor-lr 1e-6 \
        --critic-lr 5e-6 --micro-batch 8
    torchrun --nproc_per_node 8 ppo.py --model out/sft --reward out/reward --data prompts.jsonl \
        --actor-lr 1e-6 --critic-lr 5e-6 --zero 3

After the rollout every rank holds the whole batch, which is small: token ids and a few numbers per
token. So whitening and shuffling need no communication, and any number of ranks takes the same
optimizer steps.
"""
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import data
import models
import sources
import tasks
import training
import utils
from hybrid_engine import make_engine
from models import Policy, RewardModel
from sources import split_weight

# Dimension key:  B batch, P prompt, A answer, T = P + A; in lower case, of one micro batch.
# Column i of a (B, A) tensor is the i-th token of the answer; its value is that of the state
# before that token.


@dataclass(frozen=True)
class Config:
    # models
    model: str = "out/sft"         # folder or hub name of the SFT model; it is also the reference
    reward: str = "out/reward"     # what scores answers: reward model folders, file.py:function or
    #   a task's name, joined by commas, each with an optional :weight, that its normalized score
    #   is multiplied with
    critic: str = ""               # reward model folder that the critic starts from; empty: the
    #   first one in --reward; without any, --model with a new head
    lora: str = ""                 # train adapters only (in ppo.py those of the actor): a rank, or
    #   8,alpha=16,lr=1e-3,targets=q_proj+v_proj; empty: train all weights
    out: str = "out/ppo"           # folder of the run; it is itself a model folder
    overwrite: bool = False        # remove the finished run that is in --out
    # data
    data: str = "toy"              # sources, joined by commas, each with an optional :weight
    columns: str = ""              # names of fields, such as prompt=question,chosen=answer_1
    split: str = ""                # shares of the rows for steps 1, 2 and 3, such as 2,4,4;
    #   empty: all rows for each step
    held_out: float = 0.05         # share of the rows that is only evaluated on
    template: str = ""             # how prompts are written, such as "Q: {prompt}\nA:"; chat: the
    #   tokenizer's chat template; empty: as --model was trained, else "Human: {prompt}\nAssistant:"
    max_len: int = 512             # rows with more tokens, prompt and answer, are left out
    # rollout
    max_new_tokens: int = 16       # longest answer
    temperature: float = 1.0       # of sampling; all log-probabilities include it
    engine: Literal["hybrid", "hf"] = "hybrid"  # what samples: ours or transformers.generate, which
    #   is slower and knows more models
    respond: str = ""              # file.py:function, a tool or an environment that goes on with an
    #   answer whenever it comes to EOS, with text that is not trained on
    tp: int = 1                    # ranks that share one copy of the model while they generate
    # PPO
    iterations: int = 32           # rollouts
    batch_size: int = 512          # answers per rollout, over all ranks
    answers_per_prompt: int = 1    # how many of them are to the same prompt
    ppo_epochs: int = 1            # epochs over each rollout
    minibatches: int = 4           # optimizer steps per epoch
    micro_batch: int = 0           # rows per rank and forward; 0: the rank's share of a minibatch
    actor_lr: float = 3e-4         # first learning rate; about 1e-6 for a pretrained model
    critic_lr: float = 1e-3        # first learning rate; about 5e-6 for a pretrained model
    critic_warmup: int = 0         # iterations at the start in which only the critic learns
    kl_coef: float = 0.05          # weight of the KL penalty, log(policy / reference) per token
    clip: float = 0.2              # how far a ratio may leave 1 before its gradient is cut
    ptx_data: str = ""             # sources of text or demonstrations that the actor trains on too
    #   (InstructGPT's PPO-ptx); empty: none
    ptx_coef: float = 1.0          # weight of that loss, which is a mean over tokens like PPO's own
    ema: float = 0.97              # decay of the actor's EMA, saved in OUT/ema; 0: no EMA
    # run
    seed: int = 1                  # of initial weights, of the order of rows and of sampling
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU
    #   that computes with it (from Ampere on), else fp32
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage: shards optimizer (1), gradients (2), weights (3)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    offload: bool = False          # keep optimizers, frozen models and ZeRO-3 shards in CPU memory
    resume: bool = False           # continue from the last complete checkpoint in --out
    save_every: float = 0.0        # minutes between checkpoints; 0: ten checkpoints per run
    track: Literal["", "wandb", "trackio"] = ""  # package that also gets the metrics; empty: none
    ds_config: str = ""            # JSON file merged over the DeepSpeed settings in training.py

    def __post_init__(self):
        utils.check_values(self)
        models.parse_lora(self.lora)
        parse_reward(self.reward)
        data.split_range(self.split, "ppo")
        data.check_template(self.template)
        sources.parse_sources(self.data)
        sources.parse_columns(self.columns)
        if self.temperature <= 0:
            raise utils.UserError(
                f"--temperature {self.temperature}: PPO learns from samples, so it must be above 0"
            )
        if self.batch_size % self.minibatches:
            raise utils.UserError(
                f"--batch-size {self.batch_size} cannot be divided by "
                f"--minibatches {self.minibatches}"
            )
        if self.batch_size % self.answers_per_prompt:
            raise utils.UserError(
                f"--batch-size {self.batch_size} cannot be divided by "
                f"--answers-per-prompt {self.answers_per_prompt}"
            )
        if self.critic_warmup >= self.iterations:
            raise utils.UserError(
                f"--critic-warmup {self.critic_warmup} leaves no iteration for the actor: "
                f"--iterations is {self.iterations}"
            )
        if self.model == "tiny":
            raise utils.UserError(
                "--model tiny: its weights are random, and PPO starts from a model that answers; "
                "train one with sft.py first"
            )
        if self.max_new_tokens >= self.max_len:
            raise utils.UserError(
                f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt in "
                f"--max-len {self.max_len}"
            )
        if self.uses_mixture and self.zero == 3 and self.gradient_checkpointing:
            raise utils.UserError(
                "--ptx-data needs two forwards per backward, which DeepSpeed's ZeRO-3 cannot "
                "recompute; take --zero 2, or leave out --gradient-checkpointing"
            )

    def check_files(self):
        """What can be said before anything is loaded, see utils.run."""
        models.require_folder(self.model)
        for source, _ in parse_reward(self.reward):
            if tasks.is_function(source):
                tasks.load_function(source)
            else:
                require_reward_model(source)
        if self.critic:
            models.require_folder(self.critic)
        if self.respond:
            tasks.load_tool(self.respond)
        sources.check_sources(self.data)
        if self.uses_mixture:
            sources.check_sources(self.ptx_data, "--ptx-data")
        utils.require_file("ds_config", self.ds_config)
        utils.require_tracker(self.track)
        models.warn_of_toy_lr(self, actor_lr="1e-6", critic_lr="5e-6")

    @property
    def uses_mixture(self):
        return bool(self.ptx_data and self.ptx_coef)

    @property
    def single_update(self):
        """One optimizer step per rollout: the ratio is always 1, since the policy has not changed
        since it sampled."""
        return self.ppo_epochs * self.minibatches == 1


EVAL_ROWS = 512    # held-out prompts that are evaluated, at most
EVALS = 4          # evaluations per run, besides the one at its start
LR_FLOOR = 0.1     # learning rates decay linearly, to this share of their first value
ADAM_EPS = 1e-5    # as in OpenAI's PPO: with tiny second moments the first steps would be too large
GAMMA = 1.0        # discount per token: answers are short, and only their end is judged
LAM = 0.95         # lambda of generalized advantage estimation
VALUE_CLIP = 0.2   # how far a value may leave its old value before its gradient is cut
SCORE_CLIP = 5.0   # scores are clipped to +- this; a reward model's scores have variance 1
EOS_PENALTY = 1.0  # what an answer that does not end with EOS loses
STOP_KL = 0.1      # no more steps on a rollout once the policy has moved so far, nats per token
TOKEN_ROWS = 4     # answers per iteration of which tokens.jsonl keeps every token

# -----------------------------------------------------------------------------
# formulas. All tensors are (B, A) unless noted; mask marks the tokens that the policy sampled. It
# may have holes: words of a tool, which are read by all models and carry no loss and no reward.


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and variance 1 over the masked entries; 0 elsewhere."""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, score_clip):
    """-kl_coef * log(policy / reference) at every sampled token, and the clipped score at the last
    one (InstructGPT, eq. 2). scores (B,). The result carries no gradient: KL acts as a reward."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rows = torch.arange(len(scores), device=mask.device)
    rewards[rows, last_sampled(mask)] += scores.clamp(-score_clip, score_clip)
    return rewards.detach()


def last_sampled(mask):
    """The column of each row's last sampled token, (B,)."""
    position = torch.arange(mask.size(1), device=mask.device)
    return (position * mask).argmax(1)


def move_to_tokens(rewards, token_scores, mask):
    """Moves what process rewards have given from the end of each answer to its tokens, in place.
    The sum of a row stays: its mean, its clipping and the penalty remain at the last token."""
    rows = torch.arange(len(rewards), device=mask.device)
    rewards[rows, last_sampled(mask)] -= token_scores.sum(1)
    rewards += token_scores


def gae(values, rewards, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16). Steps from sampled token to
    sampled token: a hole neither ends the episode nor is discounted. Returns (advantages, returns),
    0 where nothing was sampled."""
    values = values * mask
    rewards = rewards * mask
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])                                    # (B,)
    next_advantage = torch.zeros_like(rewards[:, 0])                                # (B,)
    for t in reversed(range(rewards.size(1))):
        sampled = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = advantage * sampled
        next_value = torch.where(sampled, values[:, t], next_value)
        next_advantage = torch.where(sampled, advantage, next_advantage)
    return advantages, advantages + values


def actor_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Clipped policy loss (Schulman et al. 2017, eq. 7), mean over the sampled tokens."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    unclipped = -advantages * ratio
    clipped   = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.max(unclipped, clipped), mask)


def critic_loss(values, old_values, returns, mask, value_clip):
    """Half the squared error of the value, or of the value clipped to its old one +- value_clip,
    whichever is larger; mean over the sampled tokens."""
    values_clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    unclipped = (values - returns) ** 2
    clipped   = (values_clipped - returns) ** 2
    return 0.5 * masked_mean(torch.max(unclipped, clipped), mask)


# -----------------------------------------------------------------------------
# the record of a rollout


@dataclass
class Batch:
    """All that is known of a rollout, whole on every rank. Each phase fills in its fields."""

    # filled by rollout
    tokens: torch.Tensor           # (B, T) long, right-padded: prompt, then answer
    prompt_lens: torch.Tensor      # (B,) long
    answer_lens: torch.Tensor      # (B,) long
    mask: torch.Tensor             # (B, A) bool: answer tokens that the policy sampled
    finished: torch.Tensor         # (B,) bool: the answer ends with EOS
    sample_logprobs: torch.Tensor  # (B, A) the sampler's log-probabilities
    prompts: list                  # B texts
    answers: list                  # B texts
    row_fields: dict               # name -> B values: what else the rows hold, for reward functions

    # filled by score
    old_logprobs: torch.Tensor = None  # (B, A) the trainer's log-probabilities before the update
    ref_logprobs: torch.Tensor = None  # (B, A)
    values: torch.Tensor = None        # (B, A)
    scores: dict = field(default_factory=dict)  # name of the scorer -> (B,)
    token_scores: dict = field(default_factory=dict)  # of process rewards: name -> (B, A), which
    #   add up to the scores

    # filled by estimate_advantages
    kl: torch.Tensor = None            # (B,) log(policy / reference), summed over each answer
    rewards: torch.Tensor = None       # (B, A)
    advantages: torch.Tensor = None    # (B, A)
    returns: torch.Tensor = None       # (B, A)

    # filled by update, in the rows that this rank trains on
    ratio: torch.Tensor = None         # (B, A) policy / old policy, as last in the loss

    def __len__(self):
        return len(self.tokens)

    @property
    def lengths(self):
        return self.prompt_lens + self.answer_lens                                  # (B,)

    @property
    def inputs(self):
        """What a Policy is called with."""
        return self.tokens, self.prompt_lens, self.answer_lens

    def __getitem__(self, rows):
        """Some rows (an index array) of every field, no wider than these rows need."""
        T = int(self.lengths[rows].max())
        A = int(self.answer_lens[rows].max())
        part = {f.name: select(getattr(self, f.name), rows, A) for f in fields(self)}
        part["tokens"] = self.tokens[rows, :T]
        return Batch(**part)

    def put(self, rows, **outputs):
        """Stores outputs (b, a) of a model for some rows. Rows that were never put are zero."""
        for name, x in outputs.items():
            if getattr(self, name) is None:
                setattr(self, name, x.new_zeros(self.mask.shape))
            getattr(self, name)[rows, : x.size(1)] = x

    def sum_over_ranks(self, *names):
        """Completes fields that every rank has put its own rows into, by a sum over ranks: all
        other rows are zero. To be called once."""
        for name in names:
            if getattr(self, name) is not None:
                dist.all_reduce(getattr(self, name))


def select(x, rows, width):
    """Rows of a Batch's field; of a (B, A) tensor only the first `width` columns."""
    if x is None:
        return None
    if isinstance(x, dict):
        return {name: select(value, rows, width) for name, value in x.items()}
    if isinstance(x, list):
        return [x[i] for i in rows]
    if x.dim() == 1:
        return x[rows]
    return x[rows, :width]


# -----------------------------------------------------------------------------
# phase 1: the actor answers


def rollout(sampler, dataset, indices, seeds, cfg, tokenizer):
    """Samples an answer to the prompt of each of these rows of the data set, with a seed for each.
    Every rank answers its share of the prompts, then all ranks hold all answers, in the order of
    `indices`. Returns a Batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = indices[rank::world]
    prompts = [dataset.prompt(i) for i in mine]
    eos = tokenizer.eos_token_id
    out = sampler.generate(
        prompts, cfg.max_new_tokens, cfg.temperature, eos_token_id=eos, seed=seeds[rank::world],
        respond=make_respond(cfg, dataset, mine, tokenizer),
    )
    sampler.release()  # the KV cache's memory is needed for training now

    # gather_rows restores the order that rank::world has split.
    tokens = utils.gather_rows(out.tokens)                                          # (B, T)
    prompt_lens = utils.gather_rows(out.prompt_lens)                                # (B,)
    answer_lens = utils.gather_rows(out.answer_lens)                                # (B,)
    sample_logprobs = utils.gather_rows(out.logprobs)                               # (B, A)
    mask = utils.gather_rows(out.sampled)                                           # (B, A)
    finished = models.last_token(tokens, prompt_lens + answer_lens) == eos          # (B,)

    prompt_texts, answer_texts = [], []
    for ids, p, a in zip(tokens.tolist(), prompt_lens.tolist(), answer_lens.tolist()):
        prompt_texts.append(tokenizer.decode(ids[:p], skip_special_tokens=True))
        answer_texts.append(tokenizer.decode(ids[p : p + a], skip_special_tokens=True))
    return Batch(
        tokens=tokens,
        prompt_lens=prompt_lens,
        answer_lens=answer_lens,
        mask=mask,
        finished=finished,
        sample_logprobs=sample_logprobs,
        prompts=prompt_texts,
        answers=answer_texts,
        row_fields=dataset.fields(indices),
    )


def make_respond(cfg, dataset, indices, tokenizer):
    """What the engine asks when an answer comes to EOS, see HybridEngine.generate; None without
    --respond."""
    if not cfg.respond:
        return None
    tool = tasks.load_tool(cfg.respond)
    row_fields = dataset.fields(indices)

    def respond(i, answer_ids):
        prompt = tokenizer.decode(dataset.prompt(indices[i]), skip_special_tokens=True)
        row = {"prompt": prompt}
        for name, values in row_fields.items():
            row[name] = values[i]
        reply = tool(row, tokenizer.decode(answer_ids, skip_special_tokens=True))
        return reply and tokenizer(reply, add_special_tokens=False)["input_ids"]

    return respond


# -----------------------------------------------------------------------------
# phase 2: the other models read the answers


@dataclass
class Scorer:
    """One entry of --reward: a reward model or a Python function.

    PPO sees (score - mean) / std, so that clips and the KL coefficient mean the same for every
    scorer (Ziegler et al. 2019). The statistics are those of the first rollout; a reward model of
    reward.py is normalized already."""
    name: str
    weight: float
    model: torch.nn.Module = None  # a frozen RewardModel
    function: object = None        # (prompts, answers, row fields) -> list of scores
    mean: float = 0.0
    std: float = 1.0

    @property
    def is_normalized(self):
        return self.model is not None and hasattr(self.model.model.config, "score_scale")


@torch.no_grad()
def score(batch, actor, ref, critic, scorers, cfg, micro_batch):
    """Fills in old_logprobs, ref_logprobs, values and scores.

    Uses the micro batches of the first epoch of the update: equal shapes give equal rounding, so
    the first ratio is exactly 1. With a single update per rollout, the forward of the update itself
    gives old_logprobs, and one forward of the actor is saved."""
    parts = []
    lengths = batch.lengths.cpu().numpy()
    for rows in np.split(np.arange(len(batch)), cfg.minibatches):
        parts += utils.split_micro_batches(rows, lengths, micro_batch)
    score_frozen(batch, ref, scorers, cfg, parts)
    for part in parts:
        b = batch[part]
        if critic:
            batch.put(part, values=answer_values(critic, b))
        if not cfg.single_update:
            batch.put(part, old_logprobs=actor(*b.inputs, cfg.temperature)[0])
    batch.sum_over_ranks("values", "old_logprobs")


@torch.no_grad()
def score_frozen(batch, ref, scorers, cfg, parts):
    """Fills in ref_logprobs and scores, in these micro batches of this rank."""
    device = batch.tokens.device
    reward_models = [s for s in scorers if s.model]
    for scorer in scorers:
        batch.scores[scorer.name] = torch.zeros(len(batch), device=device)
    frozen_models = [ref] + [scorer.model for scorer in reward_models]
    with training.on_device(device, *frozen_models):
        for part in parts:
            b = batch[part]
            with models.adapters_off():  # with LoRA, the reference is the actor without adapters
                batch.put(part, ref_logprobs=ref(*b.inputs, cfg.temperature)[0])
            for scorer in reward_models:
                values = scorer.model(b.tokens)                                     # (b, t)
                batch.scores[scorer.name][part] = models.last_token(values, b.lengths)
    batch.sum_over_ranks("ref_logprobs")
    for scorer in scorers:
        if scorer.function:
            score_by_function(batch, scorer)
        else:
            dist.all_reduce(batch.scores[scorer.name])


def score_by_function(batch, scorer):
    """Fills in the scores of a Python function, which rank 0 calls once for the whole rollout."""
    ids = []
    for row, p, mask in zip(batch.tokens.tolist(), batch.prompt_lens.tolist(), batch.mask.tolist()):
        ids.append([token for token, sampled in zip(row[p:], mask) if sampled])
    row_fields = batch.row_fields | {"completion_ids": ids}
    result = models.on_rank0(scorer.function, batch.prompts, batch.answers, row_fields)
    totals = [sum(score) if isinstance(score, list) else score for score in result]
    batch.scores[scorer.name] = torch.tensor(totals, device=batch.tokens.device)
    is_process_reward = isinstance(result[0], list)  # then all are
    if is_process_reward:
        token_scores = torch.zeros_like(batch.sample_logprobs)                      # (B, A)
        for i, score in enumerate(result):
            token_scores[i, batch.mask[i]] = torch.tensor(score, device=token_scores.device)
        batch.token_scores[scorer.name] = token_scores


def answer_values(critic, batch):
    """The critic's value of the state before each answer token, (B, A), 0 past the end."""
    index, mask = models.answer_positions(batch.prompt_lens, batch.answer_lens)
    return critic(batch.tokens).gather(1, index) * mask


def total_score(batch, scorers):
    """The weighted sum of the scores as they are, (B,)."""
    return sum(s.weight * batch.scores[s.name] for s in scorers)


def normalized_score(batch, scorers):
    """The weighted sum of the normalized scores, (B,)."""
    return sum(s.weight * (batch.scores[s.name] - s.mean) / s.std for s in scorers)


def fit_normalization(batch, scorers):
    """Takes mean and standard deviation from the first rollout, for those that come without.
    Raises UserError where no scorer tells the answers apart."""
    rewarded = [scorer for scorer in scorers if scorer.weight]
    constant = []
    for scorer in rewarded:
        if scorer.is_normalized:
            continue
        scores = batch.scores[scorer.name]
        scorer.mean = scores.mean().item()
        if scores.max() == scores.min():  # the standard deviation of equal floats may not be 0
            constant.append(scorer)
            continue
        scorer.std = scores.std().item()
        utils.print0(
            f"    scorer {scorer.name}: PPO sees (score - {scorer.mean:.4g}) / {scorer.std:.4g}, "
            "from the first rollout"
        )
    for scorer in constant:
        message = (
            f"--reward {scorer.name}: all {len(batch.scores[scorer.name])} answers of the first "
            f"rollout have the score {scorer.mean:g}"
        )
        if len(constant) == len(rewarded):
            raise utils.UserError(
                f"{message}, so there is nothing to learn from; look at the function, "
                "or start from a model that sometimes earns another score"
            )
        utils.print0(f"    warning: {message}; PPO sees score - {scorer.mean:g}")


# -----------------------------------------------------------------------------
# phase 3: what each token was worth


def estimate_advantages(batch, scorers, cfg):
    """Fills in rewards, advantages and returns. Every rank computes the same. Returns metrics."""
    total = total_score(batch, scorers)                                             # (B,)
    normalized = normalized_score(batch, scorers)                                   # (B,)
    penalized = normalized - EOS_PENALTY * ~batch.finished                          # (B,)
    logprobs = batch.old_logprobs                                                   # (B, A)
    if cfg.single_update:  # the update will fill in old_logprobs
        logprobs = batch.sample_logprobs
    batch.rewards = token_rewards(
        penalized, logprobs, batch.ref_logprobs, batch.mask, cfg.kl_coef, SCORE_CLIP
    )
    for scorer in scorers:
        if scorer.name in batch.token_scores:
            token_scores = batch.token_scores[scorer.name] * scorer.weight / scorer.std
            move_to_tokens(batch.rewards, token_scores, batch.mask)
    advantages, batch.returns = gae(batch.values, batch.rewards, batch.mask, GAMMA, LAM)
    batch.advantages = whiten(advantages, batch.mask)

    log_ratio = (logprobs - batch.ref_logprobs) * batch.mask                        # (B, A)
    batch.kl = log_ratio.sum(1)
    metrics = {
        "score": total.mean().item(),
        "score_std": total.std().item(),
        "score_clipped": (penalized.abs() > SCORE_CLIP).float().mean().item(),
        "kl": batch.kl.mean().item(),
        "kl_k3": (((-log_ratio).exp() - 1 + log_ratio) * batch.mask).sum(1).mean().item(),
        "advantage_mean": advantages[batch.mask].mean().item(),
        "advantage_std": advantages[batch.mask].std(unbiased=False).item(),
    }
    if len(scorers) > 1:
        for name, scores in batch.scores.items():
            metrics[f"score_{name}"] = scores.mean().item()
            metrics[f"score_{name}_std"] = scores.std().item()
    if batch.values is not None:
        returns = batch.returns[batch.mask]
        error = (batch.values - batch.returns)[batch.mask]
        metrics["return_mean"] = returns.mean().item()
        metrics["explained_variance"] = 1 - (error.var() / returns.var()).item()
    return metrics


# -----------------------------------------------------------------------------
# phase 4: clipped PPO


class PretrainingMix:
    """Text or demonstrations that the actor also trains on (InstructGPT's PPO-ptx): as many rows
    per optimizer step as PPO takes. Without --ptx-data a step has no text."""

    def __init__(self, cfg, template, tokenizer, max_len, start):
        self.steps = start  # taken so far; a checkpoint keeps it
        self.rows = None
        if cfg.uses_mixture:
            self.rows, _ = data.load(
                cfg.ptx_data, "sft", cfg.split, cfg.held_out, template, tokenizer, max_len,
                flag="--ptx-data",
            )
            self.lengths = self.rows.lengths("response")
            self.answer_lengths = self.rows.answer_lengths("response")
            step_rows = cfg.batch_size // cfg.minibatches
            self.batches = data.steps(self.rows, self.lengths, step_rows, cfg.seed, start)

    def next_step(self, micro_batch, n):
        """Text for the next optimizer step: this rank's n micro batches, None where there is no
        text, and the number of answer tokens in those of all ranks."""
        if self.rows is None:
            return [None] * n, 0
        self.steps += 1
        _, rows = next(self.batches)
        parts = utils.split_micro_batches(rows, self.lengths, micro_batch)
        return parts, self.answer_lengths[rows].sum()

    def inputs(self, part, device):
        return data.collate(self.rows, part, device)


def minibatches(n, cfg, iteration):
    """Index arrays of the rows of each optimizer step, epoch after epoch. All ranks shuffle alike;
    the first epoch keeps the rollout's order, which is random already."""
    for epoch in range(cfg.ppo_epochs):
        order = np.arange(n)
        if epoch > 0:
            order = np.random.default_rng([cfg.seed, iteration, epoch]).permutation(n)
        yield from np.split(order, cfg.minibatches)


def update(batch, actor, critic, ema, mix, cfg, micro_batch, iteration):
    """Several epochs of clipped PPO over the rollout. Returns metrics, most of them means over the
    tokens of all steps."""
    totals = utils.Totals()
    steps = 0
    for rows in minibatches(len(batch), cfg, iteration):
        step_totals, norms = update_step(batch, rows, actor, critic, mix, cfg, micro_batch)
        if norms[0] is not None:  # None: a gradient was not finite, and no model took the step
            ema.update()
        totals.merge(step_totals)
        steps += 1
        if step_totals.mean("approx_kl") > STOP_KL:  # measured by the forward before the step
            break
    if cfg.single_update:
        batch.sum_over_ranks("old_logprobs")

    metrics = totals.means()
    metrics["steps"] = steps
    metrics["skipped"] = training.SkippedSteps.total
    metrics["actor_grad_norm"] = norms[0]
    if critic:
        metrics["critic_grad_norm"] = norms[1]
    return metrics


def update_step(batch, rows, actor, critic, mix, cfg, micro_batch):
    """One optimizer step of actor and critic on some rows of the rollout. Returns the totals of its
    metrics over all ranks, and the gradient norms."""
    totals = utils.Totals()
    world = dist.get_world_size()
    step_tokens = int(batch.mask[rows].sum())  # of all ranks
    parts = utils.split_micro_batches(rows, batch.lengths.cpu().numpy(), micro_batch)
    text_parts, text_tokens = mix.next_step(micro_batch, len(parts))
    for part, text_part in zip(parts, text_parts):
        b = batch[part]
        # DeepSpeed averages over micro batches and ranks. This weight undoes that, and makes of the
        # mean over the tokens here a share of the mean over all tokens of the step.
        weight = b.mask.sum() / step_tokens * world * len(parts)

        logprobs, entropy = actor(*b.inputs, cfg.temperature)                       # (b, a)
        old_logprobs = b.old_logprobs
        if cfg.single_update:
            old_logprobs = logprobs.detach()
            batch.put(part, old_logprobs=old_logprobs)
        policy_loss = actor_loss(logprobs, old_logprobs, b.advantages, b.mask, cfg.clip)
        loss = policy_loss * weight
        if text_part is not None:
            text_logprobs, _ = actor(*mix.inputs(text_part, b.tokens.device))
            text_loss = -cfg.ptx_coef * text_logprobs.sum() / text_tokens
            loss = loss + text_loss * world * len(parts)
        actor.backward(loss)

        log_ratio = (logprobs.detach() - old_logprobs) * b.mask
        ratio = log_ratio.exp()
        batch.put(part, ratio=ratio)
        metrics = {
            "actor_loss": policy_loss.detach(),
            "entropy": entropy.detach(),
            "ratio_mean": ratio,
            "approx_kl": ratio - 1 - log_ratio,  # the k3 estimator (Schulman 2020)
            "clip_frac": (ratio - 1).abs() > cfg.clip,
        }
        engines = [actor]
        if critic:
            values = answer_values(critic, b)                                       # (b, a)
            value_loss = critic_loss(values, b.values, b.returns, b.mask, VALUE_CLIP)
            critic.backward(value_loss * weight)
            engines.append(critic)
            metrics["critic_loss"] = value_loss.detach()
            metrics["value_clip_frac"] = (values.detach() - b.values).abs() > VALUE_CLIP
        totals.add(b.mask, **metrics)
        totals.add_max(ratio_max=ratio[b.mask].max())
        norms = training.step(*engines)  # DeepSpeed acts at the last micro batch only
    totals.all_reduce()
    return totals, norms


# -----------------------------------------------------------------------------
# what a run loads


def load_reward_model(path, tokenizer, vocab_size, dtype):
    """A reward model that can read what the policy writes."""
    if not models.same_tokenizer(tokenizer, models.load_tokenizer(path)):
        raise utils.UserError(
            f"{path} has another tokenizer than --model: it would read other text than the policy "
            "writes; train it from the same model"
        )
    reward_model = RewardModel.from_pretrained(path, dtype)
    known = reward_model.model.config.vocab_size
    if known < vocab_size:
        raise utils.UserError(
            f"--model has {vocab_size} token ids and {path} only {known}: the policy could write "
            "one that it does not know; train it from the same model, or enlarge it with "
            "transformers' resize_token_embeddings"
        )
    return reward_model


def parse_reward(text):
    """'out/reward,rules.py:brevity:0.1' to [('out/reward', 1.0), ('rules.py:brevity', 0.1)]."""
    entries = []
    for entry in text.split(","):
        source, weight = split_weight(entry.strip())
        if weight is None:
            weight = 1.0
        if not source or not np.isfinite(weight):
            raise utils.UserError(
                f"--reward {text}: {entry!r} is not a reward model folder, file.py:function or "
                "task, with an optional :weight"
            )
        entries.append((source, weight))
    if not any(weight for _, weight in entries):
        raise utils.UserError(f"--reward {text}: all weights are 0, so nothing would be rewarded")
    return entries


def require_reward_model(source):
    """Raises UserError where this entry of --reward can be no reward model."""
    if "/" not in source and not Path(source).is_dir():
        known = ", ".join(tasks.TASKS)
        raise utils.UserError(
            f"--reward {source}: there is no such folder, and no such task ({known}); a function "
            "is written file.py:function"
        )
    models.require_folder(source)


def load_scorers(cfg, tokenizer, vocab_size, dtype, device):
    """What --reward names, in its order."""
    scorers = []
    for source, weight in parse_reward(cfg.reward):
        if tasks.is_function(source):
            function = tasks.load_function(source)
            scorer = Scorer(function.name, weight, function=function)
        else:
            model = load_reward_model(source, tokenizer, vocab_size, dtype)
            name = Path(source).resolve().name
            scorer = Scorer(name, weight, model=training.frozen_engine(model, device, cfg))
        taken = [other.name for other in scorers]
        while scorer.name in (*taken, *SAMPLE_COLUMNS):
            scorer.name += "_"
        scorers.append(scorer)
    return scorers


def run_state(mix, before, scorers):
    """What a checkpoint keeps besides models and optimizers."""
    statistics = [[s.mean, s.std] for s in scorers]
    return {"mix_steps": mix.steps, "before": before, "scorers": statistics}


def restore_normalization(scorers, state):
    for scorer, statistics in zip(scorers, state.get("scorers", [])):
        scorer.mean, scorer.std = statistics


def check_functions(scorers, dataset):
    """Raises UserError for a reward function that needs a field which the rows do not have."""
    for scorer in scorers:
        if scorer.function:
            scorer.function.check_parameters(dataset.field_names())


def load_task(cfg, dataset):
    """The checker of the task that --data names, else --reward: a RewardFunction; or None. With
    several sources, no task that --data names is the one of all rows."""
    names = [source for source, _ in sources.parse_sources(cfg.data)]
    if len(names) > 1:
        names = []
    names += [source for source, _ in parse_reward(cfg.reward)]
    for name in names:
        if tasks.is_task(name):
            task = tasks.load_function(name)
            task.check_parameters(dataset.field_names())
            return task
    return None


def load_critic(cfg, tokenizer, vocab_size, dtype):
    """From --critic, else from the first reward model in --reward, else --model with a new head."""
    path = cfg.critic
    for source, _ in parse_reward(cfg.reward):
        if not path and not tasks.is_function(source):
            path = source
    if not path:
        return RewardModel.from_lm(cfg.model, dtype)
    return load_reward_model(path, tokenizer, vocab_size, dtype)


def longest_row(actor, critic, scorers, cfg):
    """Tokens of prompt and answer that all models can read, --max-len at most."""
    backbones = [actor.lm]
    if critic:
        backbones.append(critic.model)
    for scorer in scorers:
        if scorer.model:
            backbones.append(scorer.model.model)
    context = min(models.context_length(m.config) for m in backbones)
    if cfg.max_new_tokens >= context:
        raise utils.UserError(
            f"--max-new-tokens {cfg.max_new_tokens} leaves no room for a prompt in the models' "
            f"context of {context} tokens"
        )
    return min(cfg.max_len, context)


# -----------------------------------------------------------------------------
# what a run reports


def gold_accuracy(batch, task):
    """For each answer: 1.0 if the task's exact checker accepts it and it ends with EOS, else 0.0;
    None without a task. No model is trained on this: it is the "gold" reward of Gao et al. 2022."""
    if task is None:
        return None
    credit = task(batch.prompts, batch.answers, batch.row_fields)  # below 1: not all is right
    return [float(c >= 1) * finished for c, finished in zip(credit, batch.finished.tolist())]


def evaluate(sampler, held_out, ref, scorers, cfg, micro_batch, tokenizer, task, name="eval"):
    """Samples answers to held-out prompts, with fixed seeds. Returns metrics: the score and its
    standard error, KL per answer, and gold accuracy where the task has a checker."""
    n = min(len(held_out), EVAL_ROWS)
    indices = utils.fill_to_multiple(np.arange(n), dist.get_world_size())
    seeds = [2**31 + i for i in indices.tolist()]
    batch = rollout(sampler, held_out, indices, seeds, cfg, tokenizer)
    lengths = batch.lengths.cpu().numpy()
    micro_batch = max(micro_batch, 32)  # without gradients there is room for more rows
    parts = utils.split_micro_batches(np.arange(len(batch)), lengths, micro_batch)
    score_frozen(batch, ref, scorers, cfg, parts)

    total = total_score(batch, scorers)[:n]                                         # (n,)
    log_ratio = (batch.sample_logprobs - batch.ref_logprobs) * batch.mask           # (B, A)
    metrics = {
        f"{name}_score": total.mean().item(),
        f"{name}_score_se": total.std().item() / n**0.5,
        f"{name}_kl": log_ratio.sum(1)[:n].mean().item(),
    }
    gold = gold_accuracy(batch, task)
    if gold:
        metrics[f"{name}_gold"] = float(np.mean(gold[:n]))
    return metrics


def rollout_metrics(batch, sampler, gold):
    gap = (batch.sample_logprobs - batch.old_logprobs)[batch.mask].abs()
    metrics = {
        "length": batch.mask.sum(1).float().mean().item(),
        "eos_rate": batch.finished.float().mean().item(),
        "engine_gap_mean": gap.mean().item(),  # sampler against trainer: same weights, same tokens
        "engine_gap_max": gap.max().item(),
        "memory_gib": utils.memory_gib(),
    }
    if gold:
        metrics["gold"] = float(np.mean(gold))
    return metrics | {f"engine_{name}": x for name, x in sampler.stats.items()}


# What samples.jsonl has besides the scorers' own columns.
SAMPLE_COLUMNS = ("iteration", "prompt", "answer", "score", "kl", "tokens", "eos", "gold")


def samples_for_log(batch, iteration, scorers, gold):
    """Yields what samples.jsonl keeps of each answer."""
    columns = {"prompt": batch.prompts, "answer": batch.answers}
    columns["score"] = total_score(batch, scorers).tolist()
    if len(scorers) > 1:
        for name, scores in batch.scores.items():
            columns[name] = scores.tolist()
    columns["kl"] = batch.kl.tolist()
    columns["tokens"] = batch.mask.sum(1).tolist()
    columns["eos"] = batch.finished.tolist()
    if gold:
        columns["gold"] = gold
    for values in zip(*columns.values()):
        sample = {"iteration": iteration}
        for name, value in zip(columns, values):
            sample[name] = round(value, 4) if isinstance(value, float) else value
        yield sample


def tokens_for_log(batch, iteration, scorers, tokenizer):
    """Yields what tokens.jsonl keeps: all numbers of each token of a few answers, under the names
    that RLLoggingBoard reads (logprobs: before the update), and under four more: advantages,
    returns, ratio, and mask, which is 0 at words of a tool.

    Rank 0 takes one answer from each of TOKEN_ROWS equal parts of the rollout, out of those that it
    has trained on. So they are from several minibatches; in the first of them the ratio is 1."""
    columns = {
        "logprobs": batch.old_logprobs,
        "ref_logprobs": batch.ref_logprobs,
        "values": batch.values,
        "token_rewards": batch.rewards,
        "advantages": batch.advantages,
        "returns": batch.returns,
        "ratio": batch.ratio,
    }
    scores = total_score(batch, scorers).tolist()
    trained = batch.ratio.any(1).nonzero()[:, 0].tolist()  # other rows of the ratio are zero
    for part in np.array_split(trained, min(TOKEN_ROWS, len(trained))):
        row = part[-1]
        start, length = int(batch.prompt_lens[row]), int(batch.answer_lens[row])
        ids = batch.tokens[row, start : start + length].tolist()
        line = {"step": iteration, "prompt": batch.prompts[row], "response": batch.answers[row]}
        line["reward"] = round(scores[row], 6)
        line["response_tokens"] = [tokenizer.decode([i]) for i in ids]
        line["mask"] = batch.mask[row, :length].int().tolist()
        for name, x in columns.items():
            if x is not None:  # without a critic there are no values
                line[name] = [round(value, 6) for value in x[row, :length].tolist()]
        yield line


def print_plan(cfg, step_rows, micro_batch, accumulation_steps):
    utils.print0(
        f"step 3: {cfg.iterations} iterations of {cfg.batch_size} answers, {cfg.ppo_epochs} epochs "
        f"x {cfg.minibatches} steps of {step_rows} rows = {dist.get_world_size()} ranks x "
        f"{accumulation_steps} x {micro_batch}"
    )


def print_progress(batch, metrics, iteration, cfg):
    """An answer now and then, and warnings."""
    if iteration == 1 or iteration % max(1, cfg.iterations // 8) == 0:
        utils.print0(f"    {batch.prompts[0][-60:]!r} -> {batch.answers[0]!r}")
    if metrics["score_clipped"] > 0.2:
        utils.print0(
            f"    warning: {metrics['score_clipped']:.0%} of the normalized scores are outside "
            f"+-{SCORE_CLIP} and are clipped, so they all look alike; give the scorer a smaller "
            "weight, such as --reward rules.py:length:0.1"
        )
    if metrics["kl"] < -0.1:
        utils.print0(
            f"    warning: the mean KL is {metrics['kl']:.2f}; a sampler and a trainer that agree "
            "cannot stay below 0 for long"
        )


def print_summary(cfg, before, after):
    gold = ""
    if "eval_gold" in after:
        gold = f", gold accuracy {before['eval_gold']:.3f} -> {after['eval_gold']:.3f}"
    if "eval_ema_gold" in after:
        gold += f" (EMA {after['eval_ema_gold']:.3f})"
    utils.print0(
        f"saved {cfg.out}: held-out score {before['eval_score']:.3f} +- "
        f"{before['eval_score_se']:.3f} -> {after['eval_score']:.3f} +- "
        f"{after['eval_score_se']:.3f}{gold}, KL {after['eval_kl']:.2f} nats per answer"
    )


# -----------------------------------------------------------------------------
# the run


def main(cfg):
    device = utils.init_distributed(cfg.seed)
    dtype = utils.dtype_of(cfg.dtype)
    reward_folders = [source for source, _ in parse_reward(cfg.reward)]
    template = data.check_template(cfg.template, cfg.model, cfg.critic, *reward_folders)
    cfg = replace(cfg, template=template)  # as run.json will have it
    training.claim_folder(cfg, cfg.model, cfg.critic, *reward_folders)

    # ---- models ----
    tokenizer = models.load_tokenizer(cfg.model)
    actor = Policy(models.add_lora(models.load_lm(cfg.model, dtype), cfg.lora))
    vocab_size = actor.lm.config.vocab_size
    ref = None
    if not models.parse_lora(cfg.lora)["rank"]:
        ref = training.frozen_engine(Policy(models.load_lm(cfg.model, dtype)), device, cfg)
    critic = load_critic(cfg, tokenizer, vocab_size, dtype)
    scorers = load_scorers(cfg, tokenizer, vocab_size, dtype, device)

    # ---- data ----
    max_len = longest_row(actor, critic, scorers, cfg)
    max_prompt_len = max_len - cfg.max_new_tokens
    train, held_out = data.load(
        cfg.data, "ppo", cfg.split, cfg.held_out, template, tokenizer, max_prompt_len, cfg.columns
    )
    check_functions(scorers, train)
    task = load_task(cfg, train)

    # ---- engines ----
    step_rows = cfg.batch_size // cfg.minibatches
    micro_batch, accumulation_steps = utils.micro_batch_size(step_rows, cfg.micro_batch)
    sizes = (micro_batch, accumulation_steps)
    actor = training.train_engine(actor, cfg.actor_lr, *sizes, cfg, ADAM_EPS)
    if critic:  # some recipes in the README replace the critic by another baseline
        critic = training.train_engine(critic, cfg.critic_lr, *sizes, cfg, ADAM_EPS)
    if ref is None:
        ref = actor  # score_frozen() turns its adapters off
    ema = training.EMA(actor, cfg.ema, cpu=cfg.offload)
    sampler = make_engine(cfg.engine, actor, cfg.tp)
    print_plan(cfg, step_rows, *sizes)
    evaluate_now = partial(
        evaluate, sampler, held_out, ref, scorers, cfg, micro_batch, tokenizer, task
    )  # name="eval" -> metrics

    # ---- start, or resume ----
    checkpoint = training.Checkpoint(cfg, cfg.iterations, ema=ema, actor=actor, critic=critic)
    start, state = checkpoint.restore()
    restore_normalization(scorers, state)
    mix = PretrainingMix(cfg, template, tokenizer, max_len, state.get("mix_steps", 0))
    # pool=1: not sorted by length, so that all minibatches of a rollout are alike
    prompts = cfg.batch_size // cfg.answers_per_prompt  # per rollout
    batches = data.steps(train, train.lengths(), prompts, cfg.seed, start, pool=1)
    before = state.get("before") or evaluate_now()
    columns = {"score": ".3f", "kl": ".3f", "entropy": ".3f", "length": ".1f", "clip_frac": ".3f"}
    if task:
        columns = {"gold": ".3f"} | columns
    log = utils.Log(cfg, cfg.iterations, columns | {"seconds": ".1f"}, start=start)
    if start == 0:
        log.write(0, before)
    clock = utils.Clock()

    for iteration in range(start + 1, cfg.iterations + 1):
        lr_scale = max(LR_FLOOR, 1 - (iteration - 1) / cfg.iterations)
        actor_lr = cfg.actor_lr * lr_scale
        if iteration <= cfg.critic_warmup:
            actor_lr = 0.0
        training.set_lr(actor, actor_lr)
        if critic:
            training.set_lr(critic, cfg.critic_lr * lr_scale)
        indices = np.repeat(next(batches)[1], cfg.answers_per_prompt)
        # A seed for each answer, so that it does not matter which rank samples it.
        seeds = [hash((cfg.seed, iteration, i)) for i in range(cfg.batch_size)]

        clock.lap()
        batch = rollout(sampler, train, indices, seeds, cfg, tokenizer)
        rollout_s = clock.lap()
        score(batch, actor, ref, critic, scorers, cfg, micro_batch)
        score_s = clock.lap()
        if iteration == 1:
            fit_normalization(batch, scorers)
        metrics = estimate_advantages(batch, scorers, cfg)
        metrics |= update(batch, actor, critic, ema, mix, cfg, micro_batch, iteration)
        update_s = clock.lap()

        gold = gold_accuracy(batch, task)
        metrics |= rollout_metrics(batch, sampler, gold)
        metrics |= {"rollout_s": rollout_s, "score_s": score_s, "update_s": update_s}
        metrics["seconds"] = rollout_s + score_s + update_s
        metrics["tokens_per_s"] = int(batch.mask.sum()) / rollout_s
        metrics["actor_lr"] = actor_lr
        metrics["kl_coef"] = cfg.kl_coef
        last = iteration == cfg.iterations
        if last or iteration % max(1, cfg.iterations // EVALS) == 0:
            metrics |= evaluate_now()
        if last:
            models.save_model(actor.module.lm, tokenizer, cfg.out, template)
        if last and cfg.ema:
            with ema.in_place():
                models.save_model(actor.module.lm, tokenizer, f"{cfg.out}/ema", template)
                metrics |= evaluate_now(name="eval_ema")
        log(iteration, metrics)
        log.samples(samples_for_log(batch, iteration, scorers, gold))
        log.samples(tokens_for_log(batch, iteration, scorers, tokenizer), "tokens.jsonl", "step")
        print_progress(batch, metrics, iteration, cfg)
        checkpoint.save(iteration, **run_state(mix, before, scorers))

    checkpoint.finish()
    print_summary(cfg, before, metrics)


if __name__ == "__main__":
    utils.run(main, Config)
