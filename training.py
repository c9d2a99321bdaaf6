"""Training: DeepSpeed engines, steps that all models take or none, EMA, and the folder of a run:
who may write to it, checkpoints, and how a run ends early and goes on."""
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from models import gathered, is_adapter, on_rank0, parse_lora, read_run_json
from utils import (
    Inputs,
    UserError,
    atomic_write,
    disk_problem,
    dtype_of,
    first_line,
    is_rank0,
    print0,
    short_hash,
    writing,
)

# -----------------------------------------------------------------------------
# DeepSpeed

# On a GPU, AdamW is one kernel: PyTorch's default moves almost three times as many bytes, and needs
# 4 more per parameter. On a CPU its default is kept.
FUSED = torch.cuda.is_available()


class AdamW(torch.optim.AdamW):
    """AdamW whose step changes nothing while `skip` is True, whatever the gradients hold.

    NOTE: DeepSpeed's wrappers each have a rule of their own for gradients that are not finite.
    With this one, all models of a script skip a step together, at every ZeRO stage.
    """

    skip = False

    def step(self, closure=None):
        if self.skip:
            return None
        return super().step(closure)


def shared_config(cfg, stage, micro_batch):
    """What all DeepSpeed engines of a script have in common."""
    param_device = "none"
    if cfg.offload and stage == 3:
        param_device = "cpu"
    bf16 = dtype_of(cfg.dtype) == torch.bfloat16
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        # A bf16 gradient is added to the float32 sum as soon as it is there, and freed.
        "bf16": {"enabled": bf16, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": stage,
            # Every parameter is sharded: one rule, and no surprise in memory.
            "stage3_param_persistence_threshold": 0,
            # Prefetching records one order of layers, and RLHF runs several.
            "stage3_prefetch_bucket_size": 0,
            "offload_param": {"device": param_device},
        },
        "steps_per_print": 10**9,
    }


def initialize(model, config, optimizer=None):
    """Wraps a model in a DeepSpeed engine.

    NOTE: buffers are set once more afterwards. Under ZeRO-3, DeepSpeed leaves them on the CPU; and
    older versions round them with bf16, which for the frequencies of rotary positions costs
    accuracy far from the start.
    """
    import deepspeed

    buffers = {}
    for name, buffer in model.named_buffers():
        if buffer.dtype == torch.float32:
            buffers[name] = buffer.clone()
    if config["zero_optimization"]["stage"] == 3:
        # Shards parameter by parameter. Without it, deepspeed.initialize would first put the whole
        # model on the GPU.
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    with no_prints():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    device = next(engine.module.parameters()).device
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        engine.module.get_submodule(parent)._buffers[leaf] = buffer.to(device)
    return engine


def no_prints():
    """Context manager: nothing is printed. DeepSpeed's optimizer for bf16 reports on memory each
    time it is made, on every rank, and on what it loads."""
    return contextlib.redirect_stdout(io.StringIO())


def train_engine(model, lr, micro_batch, accumulation_steps, cfg, eps=1e-8):
    """A DeepSpeed engine that trains a Policy or a RewardModel: one optimizer, ZeRO as asked for,
    and on a GPU bf16 with float32 master weights.

    cfg has zero, dtype, lora, gradient_checkpointing, offload, and ds_config, a JSON file that is
    merged over the settings here.
    Two attributes are added to DeepSpeed's object: trained_params, and nonfinite, which is NaN if a
    gradient since the last step was NaN or infinite, else 0 (see `step`).
    """
    stage = cfg.zero
    optimizer_device = "none"
    if cfg.offload or dtype_of(cfg.dtype) == torch.bfloat16:
        # DeepSpeed offloads from stage 1 on. And its stage 0 would add up the bf16 gradients of
        # micro batches in bf16, where the last of many hardly count; later ones do it in float32.
        stage = max(stage, 1)
    if cfg.offload:
        optimizer_device = "cpu"
    config = shared_config(cfg, stage, micro_batch)
    ours = {
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": 1.0,
        "zero_optimization": {"offload_optimizer": {"device": optimizer_device}},
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW: nothing to compile
        "zero_allow_untested_optimizer": True,  # our own class
    }
    config = merge(config, ours)
    config = merge(config, read_ds_config(cfg.ds_config, stage))

    if cfg.gradient_checkpointing:
        enable_gradient_checkpointing(model, stage)
    groups = parameter_groups(model, lr, cfg.lora)
    trained_params = [p for group in groups for p in group["params"]]
    # 0.99 lies between the 0.95 of InstructGPT's large batches and 0.999: a second moment over some
    # hundred steps suits small batches.
    optimizer = AdamW(groups, lr=lr, betas=(0.9, 0.99), eps=eps, weight_decay=0.0, fused=FUSED)
    # NOTE: ZeRO begins with a step on gradients of zero, which would count in Adam's bias
    # correction.
    optimizer.skip = True
    engine = initialize(model, config, optimizer)
    optimizer.skip = False
    # transformers recomputes activations in training mode only. Dropout is 0 in either mode, see
    # models.load_config.
    engine.train(cfg.gradient_checkpointing)
    engine.trained_params = trained_params
    engine.nonfinite = watch_nonfinite(trained_params, engine.device)
    return engine


def enable_gradient_checkpointing(model, stage):
    """Activations are computed again in the backward pass instead of being kept.

    NOTE: ZeRO-3 releases weights that non-reentrant checkpointing wants to find again. And the
    reentrant kind counts the gradient of a weight once per forward, so that under ZeRO-3 there must
    be one forward per backward.
    """
    lm = getattr(model, "lm", None) or model.model  # of a Policy, or of a RewardModel
    lm.gradient_checkpointing_enable({"use_reentrant": stage == 3})
    lm.enable_input_require_grads()  # without it, nothing is recomputed under frozen weights


def parameter_groups(model, lr, lora):
    """The optimizer's groups: adapters, which may have a learning rate of their own, and all other
    trained weights. `scale` is the share of the learning rate that a group gets, see set_lr."""
    adapters = {"params": [], "scale": 1.0}
    others = {"params": [], "scale": 1.0}
    adapter_lr = parse_lora(lora)["lr"]
    if adapter_lr and lr:
        adapters["scale"] = adapter_lr / lr
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = adapters if is_adapter(name) else others
            group["params"].append(p)
    # Matrices first, because ZeRO-1 and 2 keep a group in one buffer, in this order: so the
    # projections of a layer are neighbours in it, and decoder.py computes them by one product.
    others["params"].sort(key=lambda p: p.dim() == 1)
    return [group for group in (adapters, others) if group["params"]]


def watch_nonfinite(params, device):
    """A tensor that is 0, and NaN as soon as a gradient is NaN or infinite. A gradient is looked at
    before it is reduced over ranks, so that this needs to know nothing of ZeRO."""
    flag = torch.zeros((), device=device)

    def check(gradient):
        flag.add_(gradient.sum(), alpha=0)  # NaN and infinity times 0 are NaN

    for p in params:
        p.register_hook(check)
    return flag


def fp32_params(engine):
    """The float32 weights that the optimizer updates, as it keeps them on this rank: whole tensors,
    or flat shards under ZeRO."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]


def frozen_engine(model, device, cfg):
    """A model that is never trained: a plain module on this rank's device, or sharded where ZeRO-3
    shards everything. With --offload it waits on the CPU: see on_device."""
    model.requires_grad_(False).eval()
    if cfg.zero < 3:
        return model.to("cpu" if cfg.offload else device)
    engine = initialize(model, shared_config(cfg, stage=3, micro_batch=1))
    engine.eval()
    return engine


@contextlib.contextmanager
def on_device(device, *models):
    """Context manager: offloaded frozen models are on the device. A model may be None; one that
    DeepSpeed has wrapped is left to DeepSpeed."""
    moved = []
    for model in models:
        is_plain = model is not None and not hasattr(model, "module")
        if is_plain and next(model.parameters()).device != device:
            moved.append(model)
    for model in moved:
        model.to(device)
    try:
        yield
    finally:
        for model in moved:
            model.to("cpu")


def set_lr(engine, lr):
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def merge(base, over):
    """Two nested dicts as one; `over` wins."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = merge(base[key], value)
        result[key] = value
    return result


# -----------------------------------------------------------------------------
# --ds-config

SET_BY_FLAGS = {
    "train_batch_size": "--batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch",
    "gradient_accumulation_steps": "--micro-batch",
    "fp16": "--dtype",
    "optimizer": "training.train_engine",
    "scheduler": "the script's schedule",
}
NUMBER = (int, float)
DS_SETTINGS = {  # DeepSpeed itself ignores a setting that it does not know
    "activation_checkpointing": dict,
    "aio": dict,
    "bf16": dict,
    "checkpoint": dict,
    "comet": dict,
    "comms_logger": dict,
    "communication_data_type": str,
    "compile": dict,
    "csv_monitor": dict,
    "data_types": dict,
    "disable_allgather": bool,
    "dump_state": bool,
    "flops_profiler": dict,
    "gradient_allreduce_op": str,
    "gradient_clipping": NUMBER,
    "gradient_predivide_factor": NUMBER,
    "log_level": str,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "sparse_gradients": bool,
    "steps_per_print": int,
    "tensorboard": dict,
    "timers": dict,
    "torch_autocast": dict,
    "wall_clock_breakdown": bool,
    "wandb": dict,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "zero_optimization": dict,
}


def read_ds_config(path, stage=None):
    """The settings of a --ds-config file; {} without one. stage: the ZeRO stage that the flags ask
    for. Raises UserError for what DeepSpeed would ignore, misread, or refuse with a traceback."""
    if not path:
        return {}
    try:
        config = json.loads(Path(path).read_text())
        check_ds_config(config, stage)
    except (OSError, ValueError) as error:
        raise UserError(f"--ds-config {path}: {first_line(error)}") from None
    return config


def check_ds_config(config, stage):
    """Raises ValueError with a sentence about the first setting that cannot be used."""
    if not isinstance(config, dict):
        raise ValueError("must hold one JSON object")
    if '"auto"' in json.dumps(config):
        message = (
            '"auto" is a word of transformers\' Trainer; write the number, or take that entry out'
        )
        raise ValueError(message)
    for name, value in config.items():
        if name in SET_BY_FLAGS:
            raise ValueError(f"{name} is set by {SET_BY_FLAGS[name]}; take it out of the file")
        if name not in DS_SETTINGS:
            raise ValueError(f"{name} is not a DeepSpeed setting that can be used here")
        kind = DS_SETTINGS[name]
        is_switch = isinstance(value, bool)
        if is_switch != (kind is bool) or not isinstance(value, kind):
            expected = {dict: "an object", str: "a string", bool: "true or false"}
            message = f"{name} must be {expected.get(kind, 'a number')}, and is {value!r}"
            raise ValueError(message)
    clipping = config.get("gradient_clipping", 1.0)
    if not clipping >= 0:
        raise ValueError(f"gradient_clipping {clipping}: must be at least 0, which is no clipping")
    check_with_deepspeed(config)
    file_stage = config.get("zero_optimization", {}).get("stage", stage)
    if stage is not None and file_stage != stage:
        message = (
            f"zero_optimization.stage is {file_stage}, and by --zero, --offload and --dtype it is "
            f"{stage}; take it out of the file, and set --zero"
        )
        raise ValueError(message)


def check_with_deepspeed(config):
    """Raises ValueError with one line where DeepSpeed refuses these settings."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(merge(config, {"train_micro_batch_size_per_gpu": 1}))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        kind = error.title  # such as DeepSpeedZeroConfig
        raise ValueError(f"{name}: {first['msg']}, not {first['input']!r} ({kind})") from None
    except TypeError as error:
        raise ValueError(f"DeepSpeed cannot read this ({first_line(error)})") from None


# -----------------------------------------------------------------------------
# a step

PATIENCE = 5  # steps in a row without a finite gradient, after which a run gives up


class SkippedSteps:
    """How many optimizer steps were not taken, because a gradient was NaN or infinite.

    The counts belong to the process, which trains one run at a time: Checkpoint.restore sets them.
    """

    total = 0
    in_a_row = 0


def step(*engines):
    """engine.step() of each engine, which acts only after the last accumulated micro batch.

    If a gradient of any of them is not finite on any rank, no engine takes the step on any rank.
    Returns the norm of each engine's gradient before clipping, None where it was not finite; and ()
    between two steps.
    """
    if not engines[0].is_gradient_accumulation_boundary():
        for engine in engines:
            engine.step()
        return ()
    nonfinite = sum(engine.nonfinite for engine in engines)
    dist.all_reduce(nonfinite)
    skip = bool(nonfinite.isnan())
    if skip:
        SkippedSteps.total += 1
        SkippedSteps.in_a_row += 1
        print0("    warning: a loss or a gradient is not finite: no model takes this step")
    else:
        SkippedSteps.in_a_row = 0
    norms = [step_one(engine, skip) for engine in engines]
    if SkippedSteps.in_a_row >= PATIENCE:
        message = (
            f"the last {PATIENCE} steps had a loss or a gradient that is not finite, and were "
            "skipped: take a lower learning rate, then start again; if the very first steps did, "
            "look at the data and at the model's dtype"
        )
        raise UserError(message)
    return norms


def step_one(engine, skip):
    """The optimizer step of one engine. Returns the norm of its gradient before clipping."""
    norm = None
    if engine.zero_optimization_stage() == 0 and engine.get_global_grad_norm() is None:
        # With fp32 and without ZeRO, DeepSpeed keeps no record of it.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.basic_optimizer.skip = skip
    engine.step()
    engine.nonfinite.zero_()
    if skip:
        return None
    if norm is None:
        norm = engine.get_global_grad_norm()
    return float(norm)


# -----------------------------------------------------------------------------
# EMA


class EMA:
    """Exponential moving average of the trained weights (Ouyang et al. 2022, appendix C.4: 0.992).

    It is float32, made of the float32 master weights, and sharded as the optimizer shards them. In
    16 bit it would hardly move: a difference times 1 - decay is below the last bit.
    With decay 0 it keeps nothing, and update() does nothing.
    """

    def __init__(self, engine, decay, cpu=False):
        """cpu: keep it in the host's memory."""
        self.engine = engine
        self.decay = decay
        self.average = []
        if decay:
            for p in fp32_params(engine):
                device = "cpu" if cpu else p.device
                self.average.append(p.detach().clone().to(device))

    @torch.no_grad()
    def update(self):
        """Call it once per optimizer step."""
        if not self.average:
            return
        for average, p in zip(self.average, fp32_params(self.engine)):
            average.lerp_(p.detach().to(average.device), 1 - self.decay)

    def exchange(self):
        """The optimizer's weights become the average, and the average these weights."""
        for p, average in zip(fp32_params(self.engine), self.average):
            weights = p.detach().to(average.device, copy=True)
            p.data.copy_(average)
            average.copy_(weights)

    @contextlib.contextmanager
    def in_place(self):
        """Context manager: the model's weights are the average, in the model's precision.
        Afterwards they are what they were before, to the bit."""
        assert self.average, "an EMA with decay 0 keeps no average"
        stage = self.engine.zero_optimization_stage()
        params = self.engine.trained_params
        local = params  # what this rank holds of each
        if stage == 3:
            local = [p.ds_tensor for p in params]
        weights = [x.detach().to("cpu", copy=True) for x in local]
        self.write_into_model(params, stage)
        try:
            yield
        finally:
            for x, weight in zip(local, weights):
                x.data.copy_(weight)

    @torch.no_grad()
    def write_into_model(self, params, stage):
        if stage == 0:
            for p, average in zip(params, self.average):
                p.copy_(average)
            return
        from deepspeed.utils import safe_get_full_fp32_param

        self.exchange()
        for p in params:
            whole = safe_get_full_fp32_param(p)  # a collective
            with gathered(p, write=True):
                p.copy_(whole)
        self.exchange()


# -----------------------------------------------------------------------------
# the folder of a run

# Flags that may be different when a run goes on.
MAY_CHANGE = ("resume", "out", "overwrite", "micro_batch", "save_every")


class FolderLock:
    """The lock on the folder that this process writes to. It is held as long as the file is open,
    so it ends with the process, however that ends."""

    file = None


def claim_folder(cfg, *inputs):
    """Makes --out and makes sure that this run may write to it. All ranks call this first thing
    after init_distributed, before anything is loaded. inputs: folders that the run reads.

    Raises UserError, on every rank, where the folder cannot be written to, is one of the inputs,
    belongs to a process that is still running, or holds a model or a run: a finished one needs
    --overwrite, which removes it first, and one that did not end needs --overwrite or --resume.
    With --resume, a run that is finished ends the process, with exit code 0.
    """
    is_finished = on_rank0(claim_folder_on_rank0, cfg, inputs)
    if is_finished:
        exit_finished(cfg)
    Inputs.models = {path: model_hash(path) for path in inputs if path}
    Inputs.data = {}


# Suffixes of the files that a model is loaded from.
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def model_hash(folder):
    """A hash of the files of a model folder, None where there is no such folder. All ranks call:
    they share the files. It costs one reading of the weights (13 GB in memory: 4 s on one core),
    which loading them then finds in memory."""
    names = on_rank0(model_files, Path(folder))
    if not names:
        return None
    checksums = file_checksums(Path(folder), names)
    return short_hash(json.dumps(checksums, sort_keys=True).encode())


def model_files(folder):
    """Names of the files that a model is loaded from; [] where there is no such folder."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.suffix in MODEL_FILES]
    return sorted(name for name in names if name != "run.json")


def claim_folder_on_rank0(cfg, inputs):
    """Returns whether there is nothing left to do for --resume."""
    overwrite = getattr(cfg, "overwrite", False)
    out = Path(cfg.out)
    if not cfg.out:
        raise UserError("--out is empty; name a folder for the run")
    if overwrite and cfg.resume:
        raise UserError("--resume goes on with a run and --overwrite removes it; take one of them")
    for path in inputs:
        require_not_inside(path, out, overwrite)
    if (out / "config.json").exists() and not (out / "run.json").exists():
        message = f"--out {out}: this folder holds a model that no run has written; name another"
        raise UserError(message)
    lock_folder(out)

    if overwrite:
        if (out / "run.json").exists():
            empty_folder(out)
        return False
    run = read_run_json(out)
    if cfg.resume:
        require_same_flags(cfg, run)
        if not run and checkpoint_steps(out):
            message = (
                f"--resume: {out} has a checkpoint and no run.json, so nobody knows how this run "
                "began; take another --out, or remove the folder"
            )
            raise UserError(message)
        return run.get("finished", False)
    if run.get("finished"):
        message = (
            f"--out {out} holds a finished run of {run.get('script')}; take another --out, or "
            "--overwrite, which removes it first"
        )
        raise UserError(message)
    require_no_checkpoint(out)
    return False


def require_not_inside(path, out, overwrite):
    """Raises UserError where the run would write over a folder that it reads, or remove it."""
    if not path or not Path(path).exists():
        return  # a name of the hub, or `tiny`
    source = Path(path).resolve()
    if source == out.resolve():
        message = f"--out {out} is the folder of a model that this run starts from; name another"
        raise UserError(message)
    if overwrite and out.resolve() in source.parents:
        message = f"--overwrite would remove {path}, which this run starts from; name another --out"
        raise UserError(message)


def lock_folder(out):
    """Makes a folder and locks it until this process ends, or locks another one."""
    if FolderLock.file:
        FolderLock.file.close()
    try:
        out.mkdir(parents=True, exist_ok=True)
        FolderLock.file = open(out / ".lock", "w")
    except OSError as error:
        message = f"--out {out}: cannot write to this folder ({error.strerror}: {error.filename})"
        raise UserError(message) from None
    try:
        fcntl.flock(FolderLock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is writing to it; name another one") from None
    except OSError as error:
        print0(f"warning: {out} cannot be locked ({error.strerror}); start no second run there")


def empty_folder(out):
    """Removes a run: everything in its folder but the lock that this process holds."""
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def checkpoint_steps(out):
    """The steps that have a checkpoint in the folder of a run, in order."""
    names = [path.name for path in (Path(out) / "checkpoint").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def require_no_checkpoint(out):
    steps = checkpoint_steps(out)
    if steps:
        message = (
            f"{Path(out) / 'checkpoint'} holds a run that did not end, up to step {steps[-1]}: go "
            "on with --resume, or remove that folder, or take another --out"
        )
        raise UserError(message)


def require_same_flags(cfg, run):
    """Raises UserError where a run is to go on with other flags than it began with. run: its
    run.json, {} where there is none."""
    before = run.get("config", {})
    for name, value in dataclasses.asdict(cfg).items():
        was = before.get(name, value)
        if name not in MAY_CHANGE and was != value:
            flag = "--" + name.replace("_", "-")
            message = (
                f"--resume: {Path(cfg.out) / 'run.json'} says that {flag} was {was!r}, and now it "
                f"is {value!r}; a run goes on as it began"
            )
            raise UserError(message)


def exit_finished(cfg):
    exit_all(f"{cfg.out} is finished: nothing is left to do", 0)


def exit_all(message, code):
    """Ends the process of every rank, with one line on the screen. All ranks call."""
    print0(message)
    dist.barrier()
    sys.stdout.flush()
    raise SystemExit(code)


# -----------------------------------------------------------------------------
# signals


class Interrupt:
    """Signals that ask a run to end: SIGTERM (a scheduler wants the machine back), SIGHUP (the
    terminal is closed) and SIGINT (Ctrl-C). The run ends after the current step, with a checkpoint;
    a second Ctrl-C ends it at once.

    Checkpoint.restore installs the handlers, Checkpoint.finish takes them out again.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def __init__(self):
        self.received = 0   # number of the first signal
        self.time = 0.0     # when it came
        self.previous = {}  # signal -> its handler before install()
        self.terminal = []  # of stdout (1) and stderr (2), those that are a terminal

    def install(self):
        self.terminal = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in self.SIGNALS:
            # What is ignored stays ignored: nohup does that to SIGHUP.
            if signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.handle)

    def uninstall(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if number == signal.SIGHUP:
            self.leave_terminal()
        if not self.received:
            self.received = number
            self.time = time.monotonic()
            if is_rank0():
                # Not print, which cannot be called while another print is at work.
                line = f"\n{self.name(number)}: the run ends after this step, with a checkpoint\n"
                os.write(2, line.encode())
        # Launchers pass Ctrl-C on, so that one may arrive twice.
        elif number == signal.SIGINT and time.monotonic() - self.time > 1:
            os._exit(128 + number)

    def leave_terminal(self):
        """The terminal is gone: to write to it would be an error, and end the run too early."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self.terminal:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    @staticmethod
    def name(number):
        if number == signal.SIGINT:
            return "Ctrl-C"
        return signal.Signals(number).name


# -----------------------------------------------------------------------------
# checkpoints

CHECKPOINTS = 10  # number written in a run, at equal distances
KEPT = 2          # number of them that are kept


class Checkpoint:
    """All that a run needs to go on as if nothing had happened, in OUT/checkpoint/STEP: weights and
    optimizers of all engines, EMA, random states, and what the script adds.

    A checkpoint gets its name when it is complete. Its manifest has the size and the checksum of
    each file. A finished run keeps no checkpoint.
    """

    def __init__(self, cfg, total, ema=None, **engines):
        """total: number of steps; engines: by name, None for one that this run does not have."""
        self.cfg = cfg
        self.total = total
        self.ema = ema
        self.engines = {name: e for name, e in engines.items() if e is not None}
        self.folder = Path(cfg.out) / "checkpoint"
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        # Under ZeRO each rank's files hold its own shard; else those of rank 0 serve every rank.
        self.sharded = any(e.zero_optimization_stage() for e in self.engines.values())
        self.save_every = getattr(cfg, "save_every", 0)  # minutes; 0: only at equal distances
        self.last_time = time.monotonic()
        self.interrupt = Interrupt()

    # ---- going on ----

    def restore(self):
        """Returns (0, {}) for a run that begins; with --resume, (the step of the last checkpoint
        that is whole, what the script added to it)."""
        SkippedSteps.total = 0
        SkippedSteps.in_a_row = 0
        self.interrupt.install()
        if not self.cfg.resume:
            on_rank0(require_no_checkpoint, self.cfg.out)
            return 0, {}
        run = read_run_json(self.cfg.out)
        require_same_flags(self.cfg, run)
        if run.get("finished"):
            exit_finished(self.cfg)
        step = self.last_whole_step()
        if step is None:
            print0(f"--resume: no checkpoint in {self.folder} yet: starting from the beginning")
            return 0, {}
        state = self.load(step)
        print0(f"--resume: goes on after step {step} of {self.total}")
        return step, state

    def last_whole_step(self):
        """The step of the last checkpoint without damage; None where there is no checkpoint."""
        steps = on_rank0(checkpoint_steps, self.cfg.out)
        for step in reversed(steps):
            damage = self.find_damage(step)
            if damage is None:
                return step
            folder = self.folder / str(step)
            print0(f"--resume: {folder} is damaged ({damage}); trying the one before it")
        if steps:
            message = (
                f"--resume: no checkpoint in {self.folder} is whole; start from the beginning with "
                "--overwrite, or with another --out"
            )
            raise UserError(message)
        return None

    def find_damage(self, step):
        """What is wrong with a checkpoint, in words; None where nothing is. All ranks call."""
        folder = self.folder / str(step)
        if not folder.is_dir():
            message = (
                f"--resume: rank 0 sees {folder} and rank {self.rank} does not; --out must be on a "
                "disk that all machines share"
            )
            raise UserError(message)
        manifest = on_rank0(read_manifest, folder)
        if manifest is None:
            return "its manifest.json is missing or broken"
        found = file_checksums(folder, sorted(manifest))
        for name, wanted in manifest.items():
            if found[name] is None:
                return f"{name} is missing"
            if found[name][0] != wanted[0]:
                return f"{name} has {found[name][0]} bytes, and should have {wanted[0]}"
            if found[name] != wanted:
                return f"{name} has changed since it was written"
        return None

    def load(self, step):
        """Puts everything back as it was after a step. Returns what the script had added."""
        folder = self.folder / str(step)
        saved = json.loads((folder / "state.json").read_text())
        if saved["world"] != self.world and self.sharded:
            name = next(iter(self.engines))
            command = f"python {folder}/zero_to_fp32.py {folder} {folder}/weights --tag {name}"
            message = (
                f"--resume: {folder} was written by {saved['world']} ranks, and now there are "
                f"{self.world}: ZeRO keeps a part on each. Start {saved['world']} ranks, or put "
                f"its weights into files with `{command}`"
            )
            raise UserError(message)
        for name, engine in self.engines.items():
            # Not strict: frozen weights are not in a checkpoint.
            with no_prints():
                path, _ = engine.load_checkpoint(folder, tag=name, load_module_strict=False)
            assert path is not None, f"DeepSpeed finds no {name} in {folder}"
        rank = self.rank if self.sharded else 0
        path = folder / f"rank-{rank}.pt"
        self.set_rank_state(torch.load(path, weights_only=False, map_location="cpu"))
        SkippedSteps.total, SkippedSteps.in_a_row = saved["skipped"]
        return saved["added"]

    def set_rank_state(self, state):
        torch.set_rng_state(state["torch"])
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])
        if torch.cuda.is_available() and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])
        if self.ema is not None:
            for average, saved in zip(self.ema.average, state["ema"]):
                average.copy_(saved)

    # ---- writing ----

    def save(self, step, **state):
        """Call it after every step; it writes a checkpoint where one is due: at CHECKPOINTS equal
        distances, after cfg.save_every minutes, and after a signal, which then ends the run.

        state: numbers, strings, lists and dicts that the script wants back from restore().
        """
        if step == self.total:
            return  # the result itself is saved now
        is_due, received = self.agree()
        if step % max(1, self.total // CHECKPOINTS) == 0 or is_due or received:
            self.write(step, state)
            self.last_time = time.monotonic()
        if received:
            message = (
                f"{Interrupt.name(received)}: stopped after step {step} of {self.total}. The "
                f"checkpoint is {self.folder / str(step)}: go on with the same command and --resume"
            )
            exit_all(message, 128 + received)

    def agree(self):
        """Returns the same on every rank: whether so many minutes have passed, by rank 0's clock,
        and the number of a signal that any rank has received, or 0."""
        minutes = (time.monotonic() - self.last_time) / 60
        is_due = self.rank == 0 and self.save_every > 0 and minutes >= self.save_every
        device = next(iter(self.engines.values())).device
        votes = torch.tensor([int(is_due), self.interrupt.received], device=device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        is_due, received = votes.tolist()
        return bool(is_due), received

    def write(self, step, state):
        """Writes a checkpoint and removes old ones. Raises UserError where the disk is full; the
        checkpoint before stays then."""
        new = self.folder / f"{step}.new"
        try:
            self.write_files(new, state)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
            problem = disk_problem(self.folder, error)
            if isinstance(error, FileNotFoundError) or "Parent directory" in str(error):
                problem = "another rank, which could not write its part, has removed it"
            shutil.rmtree(new, ignore_errors=True)
            if problem is None:
                raise
            steps = checkpoint_steps(self.cfg.out)
            kept = f"the checkpoint of step {steps[-1]} stays" if steps else "there is none before"
            message = (
                f"{self.folder}: the checkpoint of step {step} cannot be written: {problem}; "
                f"{kept}. When this is fixed, go on with --resume"
            )
            raise UserError(message) from None
        if self.rank == 0:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
            new.rename(self.folder / str(step))
            self.remove_old(step)

    def write_files(self, new, state):
        if self.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        dist.barrier()
        for name, engine in self.engines.items():
            engine.save_checkpoint(
                new, tag=name, save_latest=False, exclude_frozen_parameters=True
            )
        torch.save(self.rank_state(), new / f"rank-{self.rank}.pt")
        if self.rank == 0:
            checkpoint = {
                "world": self.world,
                "skipped": [SkippedSteps.total, SkippedSteps.in_a_row],
                "added": state,
            }
            (new / "state.json").write_text(json.dumps(checkpoint))
        dist.barrier()
        names = on_rank0(files_in, new)
        manifest = file_checksums(new, names)
        if self.rank == 0:
            (new / "manifest.json").write_text(json.dumps(manifest, indent=1))
        dist.barrier()

    def rank_state(self):
        """What each rank keeps beside DeepSpeed's files."""
        cuda_state = None
        if torch.cuda.is_available():
            cuda_state = torch.cuda.get_rng_state()
        average = None
        if self.ema is not None and (self.sharded or self.rank == 0):
            average = self.ema.average
        return {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
            "cuda": cuda_state,
            "ema": average,
        }

    def remove_old(self, step):
        """Keeps the last KEPT checkpoints up to this step. Half-written ones go, and those of later
        steps, which were found damaged."""
        steps = [s for s in checkpoint_steps(self.cfg.out) if s <= step]
        kept = [str(s) for s in steps[-KEPT:]]
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path)

    def finish(self):
        """The folder holds the result, and there is nothing left to resume. Raises UserError where
        the run went wrong in its last steps, too late for `step` to give up."""
        if SkippedSteps.in_a_row:
            message = (
                f"{self.cfg.out}: the last {SkippedSteps.in_a_row} steps of this run had a loss or "
                "a gradient that is not finite, so the model that was saved is probably broken: "
                "take a lower learning rate, and start again with --overwrite"
            )
            raise UserError(message)
        dist.barrier()
        on_rank0(self.mark_finished)
        self.interrupt.uninstall()

    def mark_finished(self):
        path = Path(self.cfg.out) / "run.json"
        run = read_run_json(self.cfg.out)
        run["finished"] = True
        with writing(path):
            atomic_write(path, json.dumps(run, indent=1))
        shutil.rmtree(self.folder, ignore_errors=True)
        if FolderLock.file:
            FolderLock.file.close()


def files_in(folder):
    """Names of all files below a folder, relative to it, in order."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in paths)


def file_checksums(folder, names):
    """{name: [bytes, CRC-32]}, None for a file that is missing. All ranks call: each reads a share
    of the files, and all return the whole."""
    mine = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        mine[name] = checksum(folder / name)
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    result = {}
    for share in shares:
        result.update(share)
    return result


def checksum(path):
    """[bytes, CRC-32] of a file, None where there is none."""
    if not path.is_file():
        return None
    size = 0
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(2**22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]


def read_manifest(folder):
    """{name: [bytes, CRC-32]} as it was written, None where it cannot be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None
