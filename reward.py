r"""Step 2: a reward model from preferences, pairs or rankings (InstructGPT, Ouyang et al. 2022,
section 3.5, "RM", eq. 1).

The SFT model with a scalar head in place of its output layer. The score of an answer is read at its
last token, the EOS. The loss is -log sigmoid(score(better) - score(worse)), averaged over a row's
comparisons and then over rows. A row of K ranked answers has K (K - 1) / 2 of them, less its ties,
and scores each answer once; a pair, chosen and rejected, is a ranking of two. Accuracy and margin
are averaged in the same way: every row weighs the same.

Differs from DeepSpeed-Chat by design: one score per answer, at a position known from lengths (there
the loss also covers padding, and a number per tokenizer says where answers begin); loading is
strict (there a renamed tensor leaves random weights); scores are normalized after training, so that
the best answer of a row scores 0 on average and scores have variance 1: a KL coefficient or a clip
then means the same for every reward model (Ziegler et al. 2019).

    python reward.py                      # from out/sft, on the built-in pairs
    python reward.py --model out/sft --data pairs.jsonl --lr 1e-5 --micro-batch 8
    torchrun --nproc_per_node 8 reward.py --model out/sft --data Dahoas/rm-static --split 2,4,4 \
        --lr 1e-5 --zero 2

The result is an AutoModelForSequenceClassification with one label. Its config holds score_offset
and score_scale: score = (logit - score_offset) * score_scale.
"""
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import models
import sources
import training
import utils
from models import RewardModel

# Dimension key:  B rows, K answers of a row, N comparisons of a batch, T = P prompt + A answer.


@dataclass(frozen=True)
class Config:
    # models
    model: str = "out/sft"         # folder or hub name to start from; tiny: the built-in one
    lora: str = ""                 # train adapters only (in ppo.py those of the actor): a rank, or
    #   8,alpha=16,lr=1e-3,targets=q_proj+v_proj; empty: train all weights
    out: str = "out/reward"        # folder of the run; it is itself a model folder
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
    # training
    epochs: float = 1.5            # epochs over the data; InstructGPT takes 1: more overfits
    batch_size: int = 32           # rows (pairs, rankings) per optimizer step, over all ranks
    micro_batch: int = 0           # pairs per rank and forward, or as many rankings as have no
    #   more answers; 0: the rank's share of a batch
    lr: float = 2.5e-4             # peak learning rate; about 1e-5 for a pretrained model
    # run
    seed: int = 1                  # of initial weights and of the order of rows
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
        data.split_range(self.split, "reward")
        data.check_template(self.template)
        sources.parse_sources(self.data)
        sources.parse_columns(self.columns)

    def check_files(self):
        """What can be said before anything is loaded, see utils.run."""
        models.require_folder(self.model)
        sources.check_sources(self.data)
        utils.require_file("ds_config", self.ds_config)
        utils.require_tracker(self.track)
        models.warn_of_toy_lr(self, lr="1e-5")


EVAL_ROWS = 1024  # held-out rows that are evaluated, at most
CENTERING = 0.003  # weight of (chosen + rejected)^2 in the loss (Eisenstein et al. 2023), of a
# ranking (2 * mean score)^2: comparisons say nothing about the level of a prompt's scores, and PPO
# compares scores of different prompts


def weighted_mean(x, weights):
    return (weights * x).sum() / weights.sum()


def comparisons(scores, ranks):
    """All pairs of answers to the same prompt of which one is better; a tie is no comparison.

    scores (B, K); ranks (B, K): 1 is best, 0: there is no answer. Returns the scores of the better
    and of the worse answers, and weights, (N,) each: 1 over the number of the row's comparisons.
    """
    first = ranks[:, :, None]
    second = ranks[:, None, :]
    is_better = (first > 0) & (first < second)                                      # (B, K, K)
    row, better, worse = is_better.nonzero(as_tuple=True)                           # (N,) each
    weights = 1 / is_better.sum((1, 2))                                             # (B,)
    return scores[row, better], scores[row, worse], weights[row]


def pairwise_loss(better_scores, worse_scores, weights=None):
    """-log sigmoid(better - worse), averaged (Bradley and Terry 1952; InstructGPT eq. 1). All (N,),
    any float type; computed in float32. weights: of the average; None: all equal."""
    losses = -F.logsigmoid(better_scores.float() - worse_scores.float())
    if weights is None:
        return losses.mean()
    return weighted_mean(losses, weights)


def kendall_tau(scores, ranks):
    """Kendall's tau-b between the scores and the ranks of each row's answers, (B,): 1 where they
    agree, -1 where they are opposite. Without ties it is 2 * accuracy - 1. Both (B, K)."""
    there = ranks > 0
    is_pair = there[:, :, None] & there[:, None, :]                    # (B, K, K), each pair twice
    by_score = (scores[:, :, None] - scores[:, None, :]).sign() * is_pair
    by_rank = (ranks[:, None, :] - ranks[:, :, None]).sign() * is_pair
    untied = (by_score**2).sum((1, 2)) * (by_rank**2).sum((1, 2))
    return (by_score * by_rank).sum((1, 2)) / untied.clamp(min=1).sqrt()


def answer_scores(model, rows, indices, n_forwards, device):
    """Scores the answers of some rows, each once. They may differ much in length, so the sequences
    are sorted by length and split into `n_forwards` forwards. Returns scores (B, K), best answer
    first and 0 where there is none, and the number of tokens computed, padding included."""
    sequences = []
    for i in indices:
        prompt = rows.prompt(i)
        sequences += [prompt + answer for answer in rows.answers(i)]
    order = np.argsort([len(s) for s in sequences], kind="stable")
    scores, slots = [], 0
    for group in np.array_split(order, min(n_forwards, len(order))):
        tokens, lengths = data.pad([sequences[i] for i in group], device)
        scores.append(models.last_token(model(tokens), lengths))
        slots += tokens.numel()
    back = torch.as_tensor(np.argsort(order), device=device)
    there = torch.as_tensor(rows.ranks[indices] > 0, device=device)                 # (B, K)
    scores = torch.cat(scores)[back]
    return scores.new_zeros(there.shape).masked_scatter(there, scores), slots


def forwards_per_micro_batch(lengths, zero):
    """Where lengths vary much, four shorter forwards beat one that is a quarter padding. A function
    of the data, so the same on every rank. NOTE: under ZeRO-3 the weights that several forwards
    gathered stay until the backward, so there it is one."""
    if zero < 3 and lengths.std() > 0.25 * lengths.mean():
        return 4
    return 1


@torch.no_grad()
def score_rows(engine, rows, indices, n_forwards, micro_batch, device):
    """Scores and ranks of the answers of some rows, (n, K) each, on every rank."""

    def forward(part):
        scores, _ = answer_scores(engine, rows, part, n_forwards, device)
        return scores

    lengths = rows.lengths_to_compare().max(1)
    scores = utils.forward_in_micro_batches(forward, indices, lengths, micro_batch)
    return scores, torch.as_tensor(rows.ranks[indices], device=device)


def main(cfg):
    device = utils.init_distributed(cfg.seed)
    template = data.check_template(cfg.template, cfg.model)
    cfg = replace(cfg, template=template)  # as run.json will have it
    training.claim_folder(cfg, cfg.model)

    # ---- model and data ----
    tokenizer = models.load_tokenizer(cfg.model)
    model = RewardModel.from_lm(cfg.model, utils.dtype_of(cfg.dtype))
    models.add_lora(model.model, cfg.lora)
    max_len = min(cfg.max_len, models.context_length(model.model.config))
    train, held_out = data.load(
        cfg.data, "reward", cfg.split, cfg.held_out, template, tokenizer, max_len, cfg.columns
    )
    answer_lengths = train.lengths_to_compare()                                     # (rows, K)
    lengths = answer_lengths.max(1)
    n_forwards = forwards_per_micro_batch(lengths, cfg.zero)
    most_answers = max(int((rows.ranks > 0).sum(1).max()) for rows in (train, held_out))

    # ---- engine ----
    world = dist.get_world_size()
    # Memory is bounded by sequences, two for each pair of --micro-batch.
    rows_per_forward = cfg.micro_batch and max(1, 2 * cfg.micro_batch // most_answers)
    micro_batch, accumulation_steps = utils.micro_batch_size(cfg.batch_size, rows_per_forward)
    engine = training.train_engine(model, cfg.lr, micro_batch, accumulation_steps, cfg)
    total = max(1, int(cfg.epochs * len(train) // cfg.batch_size))
    n_params = sum(p.numel() for p in model.parameters())
    utils.print0(
        f"step 2: {n_params / 1e6:.2f} M parameters, {total} steps of {cfg.batch_size} rows = "
        f"{world} ranks x {accumulation_steps} x {micro_batch}"
    )

    # ---- start, or resume ----
    checkpoint = training.Checkpoint(cfg, total, engine=engine)
    start, _ = checkpoint.restore()
    batches = data.steps(train, lengths, cfg.batch_size, cfg.seed, start)
    columns = {"loss": ".4f", "accuracy": ".3f", "margin": ".3f", "held_out_accuracy": ".3f"}
    if most_answers > 2:
        columns["held_out_tau"] = ".3f"
    log = utils.Log(cfg, total, columns, every=max(1, total // 30), start=start)

    # ---- training ----
    for step in range(start + 1, total + 1):
        lr = cfg.lr * utils.cosine_schedule(step - 1, total)
        training.set_lr(engine, lr)
        epoch, indices = next(batches)
        sums = torch.zeros(4)  # of loss, accuracy, margins, tokens with padding
        for part in utils.split_micro_batches(indices, lengths, micro_batch):
            scores, slots = answer_scores(engine, train, part, n_forwards, device)  # (B, K)
            ranks = torch.as_tensor(train.ranks[part], device=device)               # (B, K)
            better, worse, weights = comparisons(scores, ranks)                     # (N,) each
            loss = pairwise_loss(better, worse, weights) * len(part) / cfg.batch_size
            level = 2 * scores.sum(1) / (ranks > 0).sum(1)                          # (B,)
            centering = CENTERING * (level**2).sum() / cfg.batch_size
            # DeepSpeed averages over micro batches and ranks; this loss is a share of a sum.
            engine.backward((loss + centering) * world * accumulation_steps)
            norms = training.step(engine)
            margin = (better - worse).detach()
            correct = (weights * (margin > 0)).sum().item()
            margin = (weights * margin).sum().item()
            sums += torch.tensor([loss.item(), correct, margin, slots])
        loss, correct, margin, slots = utils.sum_over_ranks(sums, device).tolist()
        metrics = {
            "epoch": epoch,
            "loss": loss,
            "accuracy": correct / cfg.batch_size,
            "margin": margin / cfg.batch_size,
            "lr": lr,
            "padding": 1 - answer_lengths[indices].sum() / slots,
            "grad_norm": norms[0],
            "skipped": training.SkippedSteps.total,
        }
        if step == total or step % max(1, total // 10) == 0:
            some = np.arange(min(len(held_out), EVAL_ROWS))
            scores, ranks = score_rows(engine, held_out, some, n_forwards, micro_batch, device)
            better, worse, weights = comparisons(scores, ranks)
            metrics["held_out_accuracy"] = weighted_mean(better > worse, weights).item()
            metrics["held_out_margin"] = weighted_mean(better - worse, weights).item()
            metrics["held_out_loss"] = pairwise_loss(better, worse, weights).item()
            metrics["held_out_pairs"] = len(better)
            if most_answers > 2:
                metrics["held_out_tau"] = kendall_tau(scores, ranks).mean().item()
        log(step, metrics)
        checkpoint.save(step)

    # ---- normalize scores, on training rows ----
    some = np.random.default_rng(cfg.seed).permutation(len(train))[:EVAL_ROWS]
    utils.print0(f"normalizing scores on {len(some)} training rows")
    scores, ranks = score_rows(engine, train, some, n_forwards, micro_batch, device)  # (n, K) each
    offset = scores[:, 0].mean().item()  # the best answer (the first of equals) scores 0 on average
    scale = 1 / max(scores[ranks > 0].std().item(), 1e-3)  # scores of all answers have variance 1

    # ---- a model folder ----
    pad = tokenizer.pad_token_id
    if pad == tokenizer.eos_token_id:
        pad = None  # transformers reads the score before the first pad token
    models.save_model(
        model.model, tokenizer, cfg.out, template,
        score_offset=offset, score_scale=scale, pad_token_id=pad,
    )
    checkpoint.finish()
    accuracy, n = metrics["held_out_accuracy"], min(len(held_out), EVAL_ROWS)
    interval = 1.96 * (accuracy * (1 - accuracy) / n) ** 0.5
    utils.print0(
        f"saved {cfg.out}: held-out accuracy {accuracy:.3f} +- {interval:.3f} (95%, {n} rows), "
        f"margin {metrics['held_out_margin'] * scale:.2f} standard deviations of a score"
    )


if __name__ == "__main__":
    utils.run(main, Config)
