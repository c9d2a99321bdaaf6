"""Step 1: supervised fine-tuning on demonstrations (InstructGPT, Ouyang et al. 2022, section 3.5, "SFT").

Trains a causal LM to give the demonstrated answer to a prompt; the loss is on the answer and the EOS that ends it. On purpose
not as in DeepSpeed-Chat: no loss on prompts or padding, EOS is an id and not text, lengths and not masks, the mean is over the
tokens of the whole batch, on all ranks.

    python sft.py                                                     # a tiny model from scratch, on a laptop
    python sft.py --model facebook/opt-1.3b --data demos.jsonl --lr 1e-5 --micro-batch 8
    torchrun --nproc_per_node 8 sft.py --model meta-llama/Llama-3.2-1B --data demos.jsonl --lr 1e-5 --zero 3

Dimension key:  B batch, T = P prompt + A answer.
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import data
import models
import training
import utils


@dataclass(frozen=True)
class Config:
    model: str = "tiny"                # model folder or hub name to start from; tiny: the built-in one, from scratch
    data: str = "toy"                  # sources, joined by commas, each with an optional :weight
    out: str = "out/sft"               # folder of the run; it is itself a model folder
    split: str = ""                    # shares of the rows that steps 1, 2 and 3 get, such as 2,4,4; empty: all to each
    held_out: float = 0.05             # share of the rows that is only evaluated on
    template: str = "Human: {prompt}\nAssistant:"  # how a prompt is written; chat: the tokenizer's own chat template
    max_len: int = 512                 # rows of more tokens, prompt and answer, are left out, and counted
    epochs: float = 2.5                # passes over the data
    batch_size: int = 32               # rows of one optimizer step, on all ranks together
    micro_batch: int = 0               # rows a rank takes at once; 0: its whole share
    lr: float = 1e-3                   # peak learning rate; take about 1e-5 for a pretrained model
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


EVAL_ROWS = 1024  # held-out rows that are looked at, at most


@torch.no_grad()
def evaluate(engine, rows, micro, rank, world, device):
    """Mean loss a token on held-out rows, over all ranks."""
    def question(indices):
        logprobs, _ = engine(*(batch := data.collate(rows, indices, device)))
        return torch.stack([-logprobs.sum(1), batch[2].float()], 1)                           # (B, 2)
    indices = np.arange(min(len(rows), EVAL_ROWS))
    loss, tokens = utils.ask_rows(question, indices, rows.lengths("response"), micro, rank, world).sum(0).tolist()
    return loss / tokens


def main(cfg):
    rank, world, device = utils.boot(cfg.seed)

    # ---- model and data ----
    tokenizer = models.load_tokenizer(cfg.model)
    template = data.check_template(cfg.template, cfg.model)
    policy = models.Policy(models.load_lm(cfg.model, utils.precision(cfg.dtype)))
    models.add_lora(policy.lm, cfg.lora)
    max_len = min(cfg.max_len, models.context_length(policy.lm.config))
    train, held_out = data.load(cfg.data, "sft", cfg.split, cfg.held_out, template, tokenizer, max_len)
    lengths, answer_lengths = train.lengths("response"), train.answer_lengths("response")
    micro, accumulate = utils.micro_batches(cfg.batch_size, cfg.micro_batch, world)
    total = max(1, int(cfg.epochs * len(train) // cfg.batch_size))
    utils.print0(f"step 1: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, {total} steps of {cfg.batch_size} rows"
                 f" = {world} ranks x {accumulate} x {micro}")
    engine = training.train_engine(policy, cfg.lr, micro, accumulate, cfg)
    checkpoint = training.Checkpoint(cfg, total, engine=engine)
    start, _ = checkpoint.restore()
    stream = data.steps(train, lengths, cfg.batch_size, cfg.seed, start)
    log = utils.Log(cfg, total, {"loss": "7.4f", "held_out_loss": "7.4f", "perplexity": "8.2f", "padding": "6.3f", "tokens_per_s": "7.0f"}, every=max(1, total // 30), start=start)
    clock = utils.Clock()

    # ---- training ----
    for step in range(start + 1, total + 1):
        epoch, indices = next(stream)
        lr = cfg.lr * utils.cosine(step - 1, total)
        training.set_lr(engine, lr)
        batches = [data.collate(train, part, device) for part in utils.deal(indices, lengths, micro, rank, world)]
        answer_tokens = answer_lengths[indices].sum()      # of all ranks: the mean is over the whole batch
        loss = 0.0
        for tokens, prompt_lens, answer_lens in batches:
            logprobs, _ = engine(tokens, prompt_lens, answer_lens)          # (B, A)
            part = -logprobs.sum() / answer_tokens
            engine.backward(part * world * accumulate)                      # DeepSpeed averages over ranks and divides by accumulate
            norms = training.step(engine)
            loss += part.item()
        slots, real = utils.all_sum(torch.tensor([sum(t.numel() for t, *_ in batches), lengths[indices].sum() / world]), device).tolist()
        metrics = {"epoch": epoch, "loss": utils.all_sum(loss, device), "lr": lr,
                   "padding": 1 - real / slots, "tokens_per_s": real / clock.lap(), "grad_norm": norms[0], "skipped": training.Skipped.total}
        if step == total or step % max(1, total // 10) == 0:
            metrics["held_out_loss"] = evaluate(engine, held_out, micro, rank, world, device)
            metrics["perplexity"] = float(np.exp(metrics["held_out_loss"]))
            clock.lap()
        log(step, metrics)
        checkpoint.save(step)

    # ---- a model folder ----
    models.save_model(policy.lm, tokenizer, cfg.out)
    checkpoint.finish()
    utils.print0(f"saved {cfg.out}: held-out loss {metrics['held_out_loss']:.4f}, perplexity {metrics['perplexity']:.2f}")


if __name__ == "__main__":
    utils.run(main, Config)
