r"""Step 1: supervised fine-tuning on demonstrations (InstructGPT, Ouyang et al. 2022, section 3.5,
"SFT").

Trains a causal LM to give the demonstrated answer to a prompt. The loss is on the answer and on the
EOS that ends it.

Differs from DeepSpeed-Chat by design: no loss on prompts or padding; EOS is a token id, not text;
lengths instead of masks; the loss is a mean over the answer tokens of the whole batch, on all
ranks.

    python sft.py                         # a tiny model from scratch, on a laptop
    python sft.py --model facebook/opt-1.3b --data demos.jsonl --lr 1e-5 --micro-batch 8
    torchrun --nproc_per_node 8 sft.py --model meta-llama/Llama-3.2-1B --data demos.jsonl \
        --lr 1e-5 --zero 3
"""
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import data
import models
import sources
import training
import utils

# Dimension key:  B batch, T = P prompt + A answer.


@dataclass(frozen=True)
class Config:
    # models
    model: str = "tiny"            # folder or hub name to start from; tiny: the built-in one
    lora: str = ""                 # train adapters only (in ppo.py those of the actor): a rank, or
    #   8,alpha=16,lr=1e-3,targets=q_proj+v_proj; empty: train all weights
    out: str = "out/sft"           # folder of the run; it is itself a model folder
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
    epochs: float = 2.5            # epochs over the data
    batch_size: int = 32           # rows per optimizer step, over all ranks
    micro_batch: int = 0           # rows per rank and forward; 0: the rank's share of a batch
    lr: float = 1e-3               # peak learning rate; about 1e-5 for a pretrained model
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
        data.split_range(self.split, "sft")
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


@torch.no_grad()
def evaluate(engine, rows, micro_batch, device):
    """Mean loss per answer token on held-out rows, over all ranks."""

    def loss_and_tokens(indices):
        tokens, prompt_lens, answer_lens = data.collate(rows, indices, device)
        logprobs, _ = engine(tokens, prompt_lens, answer_lens)                      # (B, A)
        return torch.stack([-logprobs.sum(1), answer_lens.float()], 1)              # (B, 2)

    indices = np.arange(min(len(rows), EVAL_ROWS))
    lengths = rows.lengths("response")
    sums = utils.forward_in_micro_batches(loss_and_tokens, indices, lengths, micro_batch)
    loss, tokens = sums.sum(0).tolist()
    return loss / tokens


def main(cfg):
    device = utils.init_distributed(cfg.seed)
    template = data.check_template(cfg.template, cfg.model)
    cfg = replace(cfg, template=template)  # as run.json will have it
    training.claim_folder(cfg, cfg.model)

    # ---- model and data ----
    tokenizer = models.load_tokenizer(cfg.model)
    policy = models.Policy(models.load_lm(cfg.model, utils.dtype_of(cfg.dtype)))
    models.add_lora(policy.lm, cfg.lora)
    max_len = min(cfg.max_len, models.context_length(policy.lm.config))
    train, held_out = data.load(
        cfg.data, "sft", cfg.split, cfg.held_out, template, tokenizer, max_len, cfg.columns
    )
    lengths = train.lengths("response")
    answer_lengths = train.answer_lengths("response")

    # ---- engine ----
    world = dist.get_world_size()
    micro_batch, accumulation_steps = utils.micro_batch_size(cfg.batch_size, cfg.micro_batch)
    engine = training.train_engine(policy, cfg.lr, micro_batch, accumulation_steps, cfg)
    total = max(1, int(cfg.epochs * len(train) // cfg.batch_size))
    n_params = sum(p.numel() for p in policy.parameters())
    utils.print0(
        f"step 1: {n_params / 1e6:.2f} M parameters, {total} steps of {cfg.batch_size} rows = "
        f"{world} ranks x {accumulation_steps} x {micro_batch}"
    )

    # ---- start, or resume ----
    checkpoint = training.Checkpoint(cfg, total, engine=engine)
    start, _ = checkpoint.restore()
    batches = data.steps(train, lengths, cfg.batch_size, cfg.seed, start)
    columns = {"loss": ".4f", "held_out_loss": ".4f", "perplexity": ".2f", "tokens_per_s": ".0f"}
    log = utils.Log(cfg, total, columns, every=max(1, total // 30), start=start)
    clock = utils.Clock()

    # ---- training ----
    for step in range(start + 1, total + 1):
        lr = cfg.lr * utils.cosine_schedule(step - 1, total)
        training.set_lr(engine, lr)
        epoch, indices = next(batches)
        step_tokens = answer_lengths[indices].sum()  # on all ranks
        loss_sum, slots = 0.0, 0
        for part in utils.split_micro_batches(indices, lengths, micro_batch):
            tokens, prompt_lens, answer_lens = data.collate(train, part, device)
            logprobs, _ = engine(tokens, prompt_lens, answer_lens)                  # (B, A)
            loss = -logprobs.sum() / step_tokens
            # DeepSpeed averages over micro batches and ranks; this loss is a share of a sum.
            engine.backward(loss * world * accumulation_steps)
            norms = training.step(engine)
            loss_sum += loss.item()
            slots += tokens.numel()
        slots = utils.sum_over_ranks(slots, device)
        real_tokens = float(lengths[indices].sum())
        metrics = {
            "epoch": epoch,
            "loss": utils.sum_over_ranks(loss_sum, device),
            "lr": lr,
            "padding": 1 - real_tokens / slots,
            "tokens_per_s": real_tokens / clock.lap(),
            "grad_norm": norms[0],
            "skipped": training.SkippedSteps.total,
        }
        if step == total or step % max(1, total // 10) == 0:
            held_out_loss = evaluate(engine, held_out, micro_batch, device)
            metrics["held_out_loss"] = held_out_loss
            metrics["perplexity"] = float(np.exp(held_out_loss))
            clock.lap()
        log(step, metrics)
        checkpoint.save(step)

    # ---- a model folder ----
    models.save_model(policy.lm, tokenizer, cfg.out, template)
    checkpoint.finish()
    utils.print0(
        f"saved {cfg.out}: held-out loss {metrics['held_out_loss']:.4f}, "
        f"perplexity {metrics['perplexity']:.2f}"
    )


if __name__ == "__main__":
    utils.run(main, Config)
