"""Step 2: a reward model from pairwise preferences (InstructGPT, Ouyang et al. 2022, section 3.5, "RM", eq. 1).

The SFT model with a scalar head in place of its output layer. The score of an answer is read at its last real token, the EOS;
the loss is -log sigmoid(score(chosen) - score(rejected)). On purpose not as in DeepSpeed-Chat: one score an answer, from explicit
lengths (there the loss runs over the shorter answer's padding, and a per-tokenizer number says where answers begin); afterwards
scores are centred and scaled, so that a chosen answer scores 0 on average and scores have variance 1 (Ziegler et al. 2019: a KL
coefficient or a clip then means the same for any reward model); loading is strict (there a renamed tensor leaves random weights).

    python reward.py                                                  # from out/sft, on the built-in pairs
    python reward.py --model out/sft --data pairs.jsonl --lr 1e-5 --micro-batch 8
    torchrun --nproc_per_node 8 reward.py --model out/sft --data Dahoas/rm-static --split 2,4,4 --lr 1e-5 --zero 2

The result is an `AutoModelForSequenceClassification` with one label; its config holds `score_offset` and `score_scale`:
score = (logit - score_offset) * score_scale.

Dimension key:  B pairs, T = P prompt + A answer.
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import kernels
import models
import training
import utils


@dataclass(frozen=True)
class Config:
    model: str = "out/sft"             # model folder or hub name to start from: the SFT model; tiny: the built-in one, from scratch
    data: str = "toy"                  # sources, joined by commas, each with an optional :weight
    out: str = "out/reward"            # folder of the run; it is itself a model folder
    split: str = ""                    # shares of the rows that steps 1, 2 and 3 get, such as 2,4,4; empty: all to each
    held_out: float = 0.05             # share of the rows that is only evaluated on
    template: str = "Human: {prompt}\nAssistant:"  # how a prompt is written; chat: the tokenizer's own chat template
    max_len: int = 512                 # rows of more tokens, prompt and answer, are left out, and counted
    epochs: float = 1.5                # passes over the data; InstructGPT takes one, as more overfits where pairs are few
    batch_size: int = 32               # pairs of one optimizer step, on all ranks together
    micro_batch: int = 0               # pairs a rank takes at once; 0: its whole share
    lr: float = 2.5e-4                 # peak learning rate; take about 1e-5 for a pretrained model
    lora: str = ""                     # train adapters only, in ppo.py of the actor: their rank, or such as 8,alpha=16,lr=1e-3,targets=q_proj+v_proj; empty: all weights
    seed: int = 1                      # of initial weights and of the order of rows
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights; auto: bf16 on a GPU, fp32 on a CPU
    zero: Literal[0, 1, 2, 3] = 0      # ZeRO stage: shards optimizer (1), gradients (2), parameters (3) over the ranks
    save_memory: Literal["no", "recompute", "offload", "both"] = "no"  # recompute activations; offload optimizer, frozen models, ZeRO-3 weights to the CPU
    resume: bool = False               # go on after the last complete checkpoint in --out
    ds_config: str = ""                # JSON file merged over the DeepSpeed settings in training.train_engine

    def __post_init__(self):
        utils.at_least(self, 1, "batch_size")
        utils.at_least(self, 0, "micro_batch", "epochs")


EVAL_ROWS = 1024  # held-out pairs that are looked at, at most
CENTRE = 0.003    # weight of (chosen + rejected)^2 in the loss (Eisenstein et al. 2023): pairs leave a prompt's level free, PPO needs it fixed


class RewardModel(nn.Module):
    """A number for every prefix of a text. As reward model: the number at the end of an answer is its score. As critic: the number at
    each token is the value of the state that it leads to. One class, because a critic starts as a copy of the reward model."""

    def __init__(self, model):
        """model: an HF sequence-classification model with one label."""
        super().__init__()
        self.model = kernels.quick_linears(model)

    @classmethod
    def from_lm(cls, path, dtype):
        """A new reward model on the backbone of a causal LM: the head is drawn with std 1/sqrt(d + 1) (Stiennon et al. 2020)."""
        from transformers import AutoModelForSequenceClassification
        if path == "tiny":
            config, lm = (lm := models.tiny_lm()).config, lm
        else:
            config, lm = models.load_config(path), None
        config.num_labels, config.dtype = 1, dtype
        if lm is None:
            model = models.load_pretrained(AutoModelForSequenceClassification, path, config, may_miss=("score.",))
        else:
            model = AutoModelForSequenceClassification.from_config(config)
            model.base_model.load_state_dict(lm.base_model.state_dict())
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
        return cls(models.cast(model, dtype))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """The folder of a reward model. Every tensor must be there, with its name and shape; else UserError."""
        from transformers import AutoModelForSequenceClassification
        config = models.load_config(path)
        if config.num_labels != 1 or "ForSequenceClassification" not in str(config.architectures):
            raise utils.UserError(f"{path}: is not a reward model (its config says {config.architectures}, {config.num_labels} labels); "
                                  "train one with reward.py")
        config.dtype = dtype
        return cls(models.load_pretrained(AutoModelForSequenceClassification, path, config))

    def values(self, tokens):
        """tokens (B, T) right-padded. Returns (B, T) float32, centred and scaled by what the config says."""
        hidden = self.model.base_model(tokens, use_cache=False).last_hidden_state             # (B, T, E)
        offset, scale = (getattr(self.model.config, k, v) for k, v in (("score_offset", 0.0), ("score_scale", 1.0)))
        return (F.linear(hidden.float(), self.model.score.weight.float()).squeeze(-1) - offset) * scale

    forward = values  # what DeepSpeed calls

    def score(self, tokens, lengths):
        """tokens (B, T) right-padded, lengths (B,). Returns (B,) float32: the value at the last real token."""
        return at_end(self.values(tokens), lengths)


def at_end(values, lengths):
    """values (B, T), lengths (B,) -> (B,): each row's value at its last real token."""
    return values.gather(1, lengths[:, None] - 1)[:, 0]


def pairwise_loss(chosen_scores, rejected_scores):
    """-log sigmoid(chosen - rejected), averaged (Bradley and Terry 1952; InstructGPT eq. 1). Both (B,), any float type."""
    return -F.logsigmoid(chosen_scores.float() - rejected_scores.float()).mean()


def pair_scores(model, rows, indices, groups, device):
    """Scores of the chosen and of the rejected answers of some rows, (B, 2), and how many token slots that took. The 2B sequences go
    through the model in `groups` forwards of similar lengths: the two answers of a pair may be of very different lengths."""
    sequences = [rows.prompt(i) + rows.answer(i, w) for i in indices for w in ("chosen", "rejected")]
    order, out, slots = np.argsort([len(s) for s in sequences], kind="stable"), [], 0
    for group in np.array_split(order, min(groups, len(order))):
        tokens, lengths = data.pad([sequences[i] for i in group], device)
        out.append(at_end(model(tokens), lengths))
        slots += tokens.numel()
    return torch.cat(out)[torch.as_tensor(np.argsort(order), device=device)].view(-1, 2), slots


def groups_for(lengths, zero):
    """Where lengths differ much, four shorter forwards beat one with a quarter of padding; a function of the data: the same on every rank. NOTE: under
    ZeRO-3 weights that were gathered by several forwards stay until the step: there it is one."""
    return 4 if zero < 3 and lengths.std() > 0.25 * lengths.mean() else 1


@torch.no_grad()
def scores_of(engine, rows, indices, groups, micro, rank, world, device):
    """Scores of the chosen and of the rejected answers, (n, 2), on every rank."""
    lengths = rows.lengths("chosen", "rejected")
    return utils.ask_rows(lambda part: pair_scores(engine, rows, part, groups, device)[0], indices, lengths, micro, rank, world)


def main(cfg):
    rank, world, device = utils.boot(cfg.seed)

    # ---- model and data ----
    tokenizer = models.load_tokenizer(cfg.model)
    template = data.check_template(cfg.template, cfg.model)
    model = RewardModel.from_lm(cfg.model, utils.precision(cfg.dtype))
    models.add_lora(model.model, cfg.lora)
    max_len = min(cfg.max_len, models.context_length(model.model.config))
    train, held_out = data.load(cfg.data, "reward", cfg.split, cfg.held_out, template, tokenizer, max_len)
    lengths, both_lengths = train.lengths("chosen", "rejected"), train.lengths("chosen") + train.lengths("rejected")
    groups = groups_for(lengths, cfg.zero)
    micro, accumulate = utils.micro_batches(cfg.batch_size, cfg.micro_batch, world)
    total = max(1, int(cfg.epochs * len(train) // cfg.batch_size))
    utils.print0(f"step 2: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {total} steps of {cfg.batch_size} pairs"
                 f" = {world} ranks x {accumulate} x {micro}")
    engine = training.train_engine(model, cfg.lr, micro, accumulate, cfg)
    checkpoint = training.Checkpoint(cfg, total, engine=engine)
    start, _ = checkpoint.restore()
    stream = data.steps(train, lengths, cfg.batch_size, cfg.seed, start)
    log = utils.Log(cfg, total, {"loss": "7.4f", "accuracy": "8.3f", "margin": "7.3f", "held_out_accuracy": "6.3f", "padding": "6.3f"}, every=max(1, total // 30), start=start)

    # ---- training ----
    for step in range(start + 1, total + 1):
        epoch, indices = next(stream)
        lr = cfg.lr * utils.cosine(step - 1, total)
        training.set_lr(engine, lr)
        sums = torch.zeros(4)  # loss, right pairs, margin, tokens with padding
        for part in utils.deal(indices, lengths, micro, rank, world):
            scores, slots = pair_scores(engine, train, part, groups, device)                   # (B, 2)
            chosen, rejected = scores.unbind(1)
            loss = pairwise_loss(chosen, rejected) * len(part) / cfg.batch_size
            centre = CENTRE * ((chosen + rejected) ** 2).sum() / cfg.batch_size
            engine.backward((loss + centre) * world * accumulate)                              # DeepSpeed averages over ranks and divides by accumulate
            norms = training.step(engine)
            margin = chosen - rejected
            sums += torch.tensor([loss.item(), (margin > 0).sum().item(), margin.sum().item(), slots])
        loss, right, margin, slots = utils.all_sum(sums, device).tolist()
        metrics = {"epoch": epoch, "loss": loss, "accuracy": right / cfg.batch_size, "margin": margin / cfg.batch_size,
                   "lr": lr, "padding": 1 - both_lengths[indices].sum() / slots, "grad_norm": norms[0], "skipped": training.Skipped.total}
        if step == total or step % max(1, total // 10) == 0:
            chosen, rejected = scores_of(engine, held_out, np.arange(min(len(held_out), EVAL_ROWS)), groups, micro, rank, world, device).unbind(1)
            metrics.update(held_out_accuracy=(chosen > rejected).float().mean().item(), held_out_margin=(chosen - rejected).mean().item(),
                           held_out_loss=pairwise_loss(chosen, rejected).item(), held_out_pairs=len(chosen))
        log(step, metrics)
        checkpoint.save(step)

    # ---- centre and scale, on pairs that it was trained on: a chosen answer scores 0 on average, scores have variance 1 ----
    some = np.random.default_rng(cfg.seed).permutation(len(train))[:EVAL_ROWS]
    scores = scores_of(engine, train, some, groups, micro, rank, world, device)                        # (n, 2)
    offset, scale = scores[:, 0].mean().item(), 1 / max(scores.std().item(), 1e-3)

    # ---- a model folder ----
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None  # transformers scores before the first pad
    models.save_model(model.model, tokenizer, cfg.out, score_offset=offset, score_scale=scale, pad_token_id=pad)
    checkpoint.finish()
    p, n = metrics["held_out_accuracy"], metrics["held_out_pairs"]
    utils.print0(f"saved {cfg.out}: held-out accuracy {p:.3f} +- {1.96 * (p * (1 - p) / n) ** 0.5:.3f} (95%, {n} pairs), "
                 f"margin {metrics['held_out_margin'] * scale:.2f} standard deviations of a score")


if __name__ == "__main__":
    utils.run(main, Config)
