"""Training: DeepSpeed's settings, steps that all models take or none, the moving average, checkpoints."""
import contextlib
import dataclasses
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from models import gathered, is_adapter, lora_spec
from utils import UserError, precision, print0, write_whole

# -----------------------------------------------------------------------------
# DeepSpeed


class AdamW(torch.optim.AdamW):
    """NOTE: where `skip` is True a step changes nothing, whatever the gradients hold. DeepSpeed's wrappers each have a rule of their own for
    gradients that are not finite; under this one all models of a script skip together, at every ZeRO stage."""
    skip = False

    def step(self, closure=None):
        return None if self.skip else super().step(closure)


def saves(cfg, how):
    """Whether --save-memory asks for it; how: recompute or offload."""
    return cfg.save_memory in (how, "both")


def settings(cfg, stage, micro_batch):
    """What all DeepSpeed engines here have in common."""
    offload = {"device": "cpu" if saves(cfg, "offload") else "none"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "bf16": {"enabled": precision(cfg.dtype) == torch.bfloat16},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,      # every parameter is sharded: one rule, and no surprise in memory
            "stage3_prefetch_bucket_size": 0,             # prefetching records one order of layers; RLHF runs several
            "offload_param": offload if stage == 3 else {"device": "none"},
        },
        "steps_per_print": 10**9,
    }


def initialize(model, config, optimizer=None):
    """DeepSpeed around a model. NOTE: .bfloat16() rounds buffers too, and with the frequencies of rotary positions that costs accuracy far out: they
    are put back."""
    import deepspeed
    buffers = {n: b.clone() for n, b in model.named_buffers() if b.dtype == torch.float32}
    if config["zero_optimization"]["stage"] == 3:  # parameter by parameter; deepspeed.initialize would first put all of it on the GPU
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for name, old in buffers.items():
        owner, _, leaf = name.rpartition(".")
        engine.module.get_submodule(owner)._buffers[leaf] = old.to(next(engine.module.parameters()).device)
    return engine


def train_engine(model, lr, micro_batch, accumulate, cfg, eps=1e-8):
    """DeepSpeed around a model to train: one optimizer, bf16 with fp32 master weights on a GPU, ZeRO as asked for.
    cfg has zero, dtype, lora, save_memory and ds_config (a JSON file merged over what stands here)."""
    away = saves(cfg, "offload")
    stage = max(cfg.zero, int(away))  # DeepSpeed offloads from stage 1 on; on one rank 1 is 0
    config = merge(merge(settings(cfg, stage, micro_batch), {
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "zero_optimization": {"offload_optimizer": {"device": "cpu" if away else "none"}},
        "zero_force_ds_cpu_optimizer": False,             # torch's AdamW: nothing to compile
        "zero_allow_untested_optimizer": True,            # and below it our own class
    }), read_ds_config(cfg.ds_config))
    lm = getattr(model, "lm", None) or model.model
    if saves(cfg, "recompute"):
        # NOTE: ZeRO-3 lets go of weights that the other kind wants to find again; and this kind counts a weight's gradient once a forward, so
        # that under ZeRO-3 there must be one forward a backward
        lm.gradient_checkpointing_enable({"use_reentrant": stage == 3})
        lm.enable_input_require_grads()                            # else nothing is recomputed under frozen weights
    scales = {True: (lora_spec(cfg.lora)["lr"] or lr) / lr if lr else 1.0, False: 1.0}  # of the learning rate: of adapters, of other weights
    groups = [{"params": [p for n, p in model.named_parameters() if p.requires_grad and is_adapter(n) == kind], "scale": scale} for kind, scale in scales.items()]
    groups = [g for g in groups if g["params"]]
    trained = [p for g in groups for p in g["params"]]
    # 0.99: between the 0.95 of InstructGPT's large batches and 0.999; a second moment over some hundred steps suits small ones
    optimizer = AdamW(groups, lr=lr, betas=(0.9, 0.99), eps=eps, weight_decay=0.0)
    optimizer.skip = True  # NOTE: in bf16 DeepSpeed's stage 0 begins with a step on gradients of zero, which would count in Adam's bias correction
    engine = initialize(model, config, optimizer)
    optimizer.skip = False
    engine.train(saves(cfg, "recompute"))  # transformers recomputes in training mode only; dropout is 0 in either, see load_config
    engine.trained, engine.bad = trained, (bad := torch.zeros((), device=engine.device))

    def look(gradient):
        bad.add_(~gradient.sum().isfinite())
    for p in trained:  # before gradients are reduced, so it needs nothing of ZeRO
        p.register_hook(look)
    return engine


def masters(engine):
    """The float32 weights that the optimizer changes, as it keeps them on this rank: tensors of its own, flat shards under ZeRO."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [p for g in engine.basic_optimizer.param_groups for p in g["params"]]


def frozen_engine(model, device, cfg):
    """A model that is only asked: plain on this rank's device, or sharded where ZeRO-3 shards everything. Offloaded, it waits on the CPU: see `near`."""
    model.requires_grad_(False).eval()
    if cfg.zero < 3:
        return model.to("cpu" if saves(cfg, "offload") else device)
    engine = initialize(model, settings(cfg, 3, 1))
    engine.eval()
    return engine


@contextlib.contextmanager
def near(device, *models):
    """Within: offloaded frozen models are on the device."""
    away = [m for m in models if m is not None and not hasattr(m, "module") and next(m.parameters()).device != device]
    for m in away:
        m.to(device)
    try:
        yield
    finally:
        for m in away:
            m.to("cpu")


def merge(base, over):
    return {**base, **{k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()}}


def read_ds_config(path):
    if not path:
        return {}
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"--ds-config {path}: {e}") from None
    if not isinstance(config, dict):
        raise UserError(f"--ds-config {path}: must hold one JSON object")
    for owned, flag in (("train_batch_size", "--batch-size"), ("gradient_accumulation_steps", "--micro-batch"), ("fp16", "--dtype"),
                        ("optimizer", "training.train_engine"), ("scheduler", "the script's schedule")):
        if owned in config:
            raise UserError(f"--ds-config {path}: {owned} is set by {flag}; take it out of the file")
    if '"auto"' in json.dumps(config):
        raise UserError(f"--ds-config {path}: \"auto\" is a word of transformers' Trainer; write the number, or take that entry out")
    return config


def set_lr(engine, lr):
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


# -----------------------------------------------------------------------------
# a step

PATIENCE = 5  # steps in a row without a finite gradient, before a run gives up


class Skipped:
    """Steps that were not taken, of the run and in a row."""
    total = in_a_row = 0


def step(*engines):
    """engine.step() of each, which acts only after the last of the accumulated micro batches. Where a gradient of any of them is not finite on any
    rank, none of them takes the step, anywhere. Returns the norms of the gradients before clipping, None where not finite; () in between."""
    if not engines[0].is_gradient_accumulation_boundary():
        for e in engines:
            e.step()
        return ()
    bad = sum(e.bad for e in engines)
    dist.all_reduce(bad)
    Skipped.in_a_row, Skipped.total = Skipped.in_a_row + 1 if bad else 0, Skipped.total + int(bad > 0)
    if bad:
        print0("    warning: a loss or a gradient is not finite: no model takes this step")
    norms = []
    for e in engines:
        norm = None
        if e.zero_optimization_stage() == 0 and e.get_global_grad_norm() is None:  # plain fp32: DeepSpeed keeps no record
            norm = torch.nn.utils.get_total_norm([p.grad for p in e.module.parameters() if p.grad is not None])
        e.basic_optimizer.skip = bool(bad)
        e.step()
        e.bad.zero_()
        norms.append(None if bad else float(norm if norm is not None else e.get_global_grad_norm()))
    if Skipped.in_a_row >= PATIENCE:
        raise UserError(f"the last {PATIENCE} steps had a loss or a gradient that is not finite, and were skipped: take a lower learning rate, then start "
                        "again; if the very first steps did, look at the data and at the model's dtype")
    return norms


# -----------------------------------------------------------------------------
# the average


class EMA:
    """Exponential moving average of what is trained: float32, of the float32 master weights, sharded as the optimizer shards them (Ouyang et al. 2022,
    appendix C.4, take 0.992). In 16 bit it would hardly move: 1 - decay of a difference is below the last bit."""

    def __init__(self, engine, decay, cpu=False):
        self.engine, self.decay = engine, decay
        self.average = [m.detach().clone().to("cpu" if cpu else m.device) for m in masters(engine)]

    @torch.no_grad()
    def update(self):
        """Once an optimizer step."""
        for a, m in zip(self.average, masters(self.engine)):
            a.lerp_(m.detach().to(a.device), 1 - self.decay)

    def exchange(self):
        """The masters become the average, and the average the masters."""
        for m, a in zip(masters(self.engine), self.average):
            kept = m.detach().to(a.device, copy=True)
            m.data.copy_(a)
            a.copy_(kept)

    @contextlib.contextmanager
    def in_place(self):
        """Within: the model's weights are the average, in the model's precision; afterwards what they were, to the bit."""
        from deepspeed.utils import safe_get_full_fp32_param
        stage, trained = self.engine.zero_optimization_stage(), self.engine.trained
        mine = [p.ds_tensor if stage == 3 else p for p in trained]          # what this rank holds of each
        kept = [x.detach().to("cpu", copy=True) for x in mine]
        with torch.no_grad():
            if stage == 0:
                for p, a in zip(trained, self.average):
                    p.copy_(a)
            else:
                self.exchange()
                for p in trained:
                    whole = safe_get_full_fp32_param(p)                     # a collective
                    with gathered(p, write=True):
                        p.copy_(whole)
                self.exchange()
        try:
            yield
        finally:
            for x, k in zip(mine, kept):
                x.data.copy_(k)


# -----------------------------------------------------------------------------
# checkpoints

CHECKPOINTS, KEPT = 10, 2  # written in a run, at equal distances; the last so many are kept


class Checkpoint:
    """What a run needs to go on as if nothing had happened: OUT/checkpoint/STEP with the weights and optimizers of all engines, averages, random
    states, and what the script adds. It is written beside and renamed, so one that is there is whole. A finished run keeps none."""

    def __init__(self, cfg, total, ema=None, **engines):
        self.cfg, self.total, self.ema, self.engines = cfg, total, ema, {k: e for k, e in engines.items() if e is not None}
        self.folder, self.run_json = Path(cfg.out) / "checkpoint", Path(cfg.out) / "run.json"
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.sharded = any(e.zero_optimization_stage() for e in self.engines.values())

    def complete(self):
        """Steps whose checkpoints are whole, in order: what rank 0 sees."""
        steps = [sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())]
        dist.broadcast_object_list(steps, 0)
        return steps[0]

    def restore(self):
        """With --resume: (last complete step, what the script added to it); else, and where there is none yet, (0, {})."""
        Skipped.total = Skipped.in_a_row = 0
        steps = self.complete()
        if not self.cfg.resume:
            if steps:
                raise UserError(f"{self.folder} holds a run that did not end, up to step {steps[-1]}: go on with --resume, or remove that folder, or take another --out")
            return 0, {}
        run = json.loads(self.run_json.read_text()) if self.run_json.exists() else {}
        now = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in ("resume", "out", "micro_batch")}
        for key, v in now.items():
            if run and (was := run["config"].get(key, v)) != v:
                raise UserError(f"--resume: {self.run_json} says that --{key.replace('_', '-')} was {was!r}, and now it is {v!r}; a run goes on as it began")
        if run.get("finished"):
            print0(f"{self.cfg.out} is finished: nothing is left to do")
            dist.barrier()
            sys.stdout.flush()
            raise SystemExit(0)
        if not steps:
            print0(f"--resume: no checkpoint in {self.folder} yet: starting from the beginning")
            return 0, {}
        folder = self.folder / str(steps[-1])
        if not folder.is_dir():
            raise UserError(f"--resume: rank 0 sees {folder} and rank {self.rank} does not; --out must be on a disk that all machines share")
        state = json.loads((folder / "state.json").read_text())
        if state["world"] != self.world and self.sharded:
            raise UserError(f"--resume: {folder} was written by {state['world']} ranks, and now there are {self.world}: ZeRO keeps a part on each. Start "
                            f"{state['world']} ranks, or put its weights into files with `python {folder}/zero_to_fp32.py {folder} {folder}/weights --tag {next(iter(self.engines))}`")
        for name, engine in self.engines.items():
            engine.load_checkpoint(folder, tag=name, load_module_strict=False)  # frozen weights are not in it
        mine = torch.load(folder / f"rank-{self.rank if self.sharded else 0}.pt", weights_only=False, map_location="cpu")
        torch.set_rng_state(mine["torch"]), np.random.set_state(mine["numpy"]), random.setstate(mine["python"])
        if torch.cuda.is_available() and mine["cuda"] is not None:
            torch.cuda.set_rng_state(mine["cuda"])
        if self.ema:
            for a, b in zip(self.ema.average, mine["ema"]):
                a.copy_(b)
        Skipped.total, Skipped.in_a_row = state["skipped"]
        print0(f"--resume: goes on after step {steps[-1]} of {self.total}")
        return steps[-1], state["added"]

    def save(self, at, **added):
        """added: numbers, strings, lists and dicts that the script wants back."""
        if at % max(1, self.total // CHECKPOINTS) or at == self.total:
            return
        new = self.folder / f"{at}.new"
        if self.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        dist.barrier()
        for name, engine in self.engines.items():
            engine.save_checkpoint(new, tag=name, save_latest=False, exclude_frozen_parameters=True)
        torch.save({"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate(),
                    "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None, "ema": self.ema.average if self.ema and (self.sharded or self.rank == 0) else None}, new / f"rank-{self.rank}.pt")
        if self.rank == 0:
            (new / "state.json").write_text(json.dumps({"world": self.world, "skipped": [Skipped.total, Skipped.in_a_row], "added": added}))
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self.folder / str(at), ignore_errors=True)
            new.rename(self.folder / str(at))
        for old in self.complete()[:-KEPT]:
            if self.rank == 0:
                shutil.rmtree(self.folder / str(old))

    def finish(self):
        """The folder holds the result: nothing is left to resume."""
        dist.barrier()
        if self.rank == 0:
            write_whole(self.run_json, json.dumps({**json.loads(self.run_json.read_text()), "finished": True}, indent=1))
            shutil.rmtree(self.folder, ignore_errors=True)
