"""What the scripts share and a reader rarely opens: command line, start-up, how batches are cut, logs."""
import argparse
import dataclasses
import importlib
import inspect
import io
import json
import logging
import os
import random
import resource
import socket
import subprocess
import sys
import time
import tokenize
import typing
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake that a user can mend. Its message is all that is printed: what was there, where, and what to do."""


def print0(*args):
    if os.environ.get("RANK", "0") == "0":
        print(*args, flush=True)


# -----------------------------------------------------------------------------
# command line


def field_help(Config):
    """{field: the comment behind it in the source}. The comment is the flag's help, so the two cannot differ."""
    out, line_field = {}, {}
    for tok in tokenize.generate_tokens(io.StringIO(inspect.getsource(Config)).readline):
        if tok.type == tokenize.NAME and tok.start[0] not in line_field:
            line_field[tok.start[0]] = tok.string
        elif tok.type == tokenize.COMMENT and tok.start[0] in line_field:
            out[line_field[tok.start[0]]] = tok.string.lstrip("# ")
    return out


def parse_args(Config, argv=None):
    """A frozen dataclass of knobs to a command line: `kl_coef: float = 0.1  # help` is --kl-coef 0.2 (or --kl_coef)."""
    argv = [a.replace("_", "-", a.split("=")[0].count("_")) if a.startswith("--") else a for a in argv or sys.argv[1:]]
    doc = sys.modules[Config.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, comments = typing.get_type_hints(Config), field_help(Config)
    for f in dataclasses.fields(Config):
        kind, flag = hints[f.name], "--" + f.name.replace("_", "-")
        how = {"default": f.default, "help": f"{comments[f.name]} (default: {f.default!r})".replace("%", "%%")}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            how.update(type=type(typing.get_args(kind)[0]), choices=typing.get_args(kind))
        else:
            how.update(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(flag, **how)
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = vars(parser.parse_args(argv))
    args.pop("local_rank")
    try:
        return Config(**args)
    except UserError as e:
        parser.error(str(e))


def at_least(cfg, least, *names):
    for name in names:
        if getattr(cfg, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least {least}")


def run(main, Config):
    """The last line of a script. A user's mistake is one sentence and exit code 2; anything else is a bug and shows its traceback."""
    cfg = parse_args(Config)
    try:
        main(cfg)
    except UserError as e:
        sys.stdout.flush()
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # most mistakes are every rank's: then rank 0 says it, and the launcher ends the others meanwhile
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(2)  # and not sys.exit: another rank may be inside a collective, and would be waited for
    if dist.is_initialized():
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# start-up


def boot(seed):
    """Joins the other ranks, however they were started (python, torchrun, deepspeed). Returns rank, world size, device."""
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported; only spares a warning
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's use of collectives that torch renamed
    importlib.import_module("torch._dynamo")  # before zero.Init, which breaks the import inside it (DeepSpeed 0.19, torch 2.13)
    import deepspeed
    importlib.import_module("deepspeed.comm.torch")
    if not cuda:  # DeepSpeed would compile C++ for two minutes, for a collective that gloo has
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # recomputing, where nothing is trained
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings are of our AdamW, and of skipped steps, which we say ourselves
    quiet()
    rank, device = int(os.environ["RANK"]), torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(verbose=False)
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return rank, dist.get_world_size(), device


def quiet():
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def precision(name):
    """auto is bf16 on a GPU and fp32 on a CPU."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.bfloat16 if torch.cuda.is_available() else torch.float32}[name]


# -----------------------------------------------------------------------------
# how a batch is cut, and what ranks tell each other


def micro_batches(cfg_batch, cfg_micro, world):
    """Rows of an optimizer step that one rank takes at once, and how often: (micro batch, steps). Checks that they divide."""
    if cfg_batch % world:
        raise UserError(f"the {cfg_batch} rows of an optimizer step (--batch-size, over --minibatches in ppo.py) are not divided by the {world} ranks; take a multiple of {world}")
    mine = cfg_batch // world
    micro = min(cfg_micro, mine) if cfg_micro else mine
    return micro, -(-mine // micro)


def deal(rows, lengths, micro, rank, world):
    """The micro batches of one rank, of the rows (an index array) that one optimizer step sees on all ranks. Rows are sorted by
    length and dealt like cards: ranks carry the same load and a micro batch has little padding. Every rank gets equally many."""
    rows = rows[np.argsort(-lengths[rows], kind="stable")][rank::world]
    return [rows[i : i + micro] for i in range(0, len(rows), micro)]


def ask_rows(question, indices, lengths, micro, rank, world):
    """question(indices of a micro batch) -> (b, k) float, for all of `indices`: (n, k), in their order, on every rank."""
    padded = np.resize(indices, len(indices) + -len(indices) % world)  # some twice, so that every rank makes the same forwards
    out = None
    for part in deal(np.arange(len(padded)), lengths[padded], micro, rank, world):
        x = question(padded[part])
        out = x.new_zeros(len(padded), x.size(1)) if out is None else out
        out[part] = x
    dist.all_reduce(out)  # every row was zero on all ranks but one
    return out[: len(indices)]


def all_sum(x, device):
    """Sum over ranks of a number or a tensor."""
    t = torch.as_tensor(x, dtype=torch.float64, device=device).clone()
    dist.all_reduce(t)
    return t if isinstance(x, torch.Tensor) else t.item()


def gather_rows(x):
    """Rows of all ranks, dealt as rank::world, back in order. x (n, ...) on each rank, n and the last size may differ by rank;
    pads with 0 on the right. Returns (sum of n, ...) on x's device."""
    world, device = dist.get_world_size(), x.device
    if world == 1:
        return x
    shape = torch.tensor([len(x), x.size(-1) if x.dim() > 1 else 0], device=device)
    shapes = [torch.empty_like(shape) for _ in range(world)]
    dist.all_gather(shapes, shape)
    n, width = (int(max(s[i] for s in shapes)) for i in (0, 1))
    full = x.new_zeros((n, width) if x.dim() > 1 else n)
    full[(slice(len(x)), slice(x.size(1))) if x.dim() > 1 else slice(len(x))] = x
    parts = [torch.empty_like(full) for _ in range(world)]
    dist.all_gather(parts, full.contiguous())
    total = sum(int(s[0]) for s in shapes)
    return torch.stack(parts, 1).flatten(0, 1)[:total]  # row i of rank r is row i * world + r


# -----------------------------------------------------------------------------
# logs


def commit():
    """The commit that this code is, or None."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or None
    except FileNotFoundError:
        return None


def memory_gib():
    """Most memory that this process has held: on the GPU, else on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cosine(step, total, warmup=0.03, floor=0.1):
    """Share of the peak learning rate: linear warm-up over 3% of the steps, then half a cosine down to 10%."""
    up = max(1, int(warmup * total))
    return (step + 1) / up if step < up else floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * (step - up) / max(1, total - up)))


class Clock:
    """Seconds since the last lap, with all of the GPU's work done."""

    def __init__(self):
        self.lap()

    def lap(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self.last = now - getattr(self, "last", now), now
        return seconds


def open_lines(path, key, last):
    """A file of JSON lines to append to, with the lines up to the step `last` kept: what came after a checkpoint comes again."""
    kept = []
    if last and path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)[key] <= last:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # cut off in the middle, so it came after the checkpoint
    write_whole(path, "".join(kept))
    return open(path, "a")


def write_whole(path, text):
    """The old file or the new one, whenever the process ends."""
    beside = Path(f"{path}.new")
    beside.write_text(text)
    beside.rename(path)


class Log:
    """One line a step on the screen, with fixed columns; the same numbers and all others in metrics.jsonl; run.json beside it."""

    def __init__(self, cfg, total, columns, every=1, start=0):
        """columns: {metric: format}, e.g. {"loss": "8.4f"}. every: of how many steps one is printed. start: the step that a resumed run goes on after."""
        self.out, self.total, self.columns, self.every, self.first = Path(cfg.out), total, columns, every, start
        self.start, self.tty = time.time(), sys.stdout.isatty()
        self.rank0 = os.environ.get("RANK", "0") == "0"
        if not self.rank0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        import deepspeed
        import transformers
        versions = {m.__name__: m.__version__ for m in (torch, deepspeed, transformers, np)}
        write_whole(self.out / "run.json", json.dumps({"script": Path(sys.argv[0]).name, "config": dataclasses.asdict(cfg), "world": dist.get_world_size(),
                                                       "versions": versions, "git": commit()}, indent=1))
        self.file = open_lines(self.out / "metrics.jsonl", "step", start)
        print0("  step" + " " * (len(str(total)) * 2 - 3) + "".join(f" {k:>{max(len(k), int(f.split('.')[0]))}}" for k, f in columns.items()) + "  left")

    def write(self, step, metrics):
        """Only to the file."""
        if self.rank0:
            self.file.write(json.dumps({"step": step, **{k: v for k, v in metrics.items() if v is not None and np.isfinite(v)}}) + "\n")
            self.file.flush()

    def __call__(self, step, metrics):
        """step counts from 1. Rank 0 writes; others do nothing."""
        self.write(step, metrics)
        if not self.rank0:
            return
        left = (time.time() - self.start) / (step - self.first) * (self.total - step)
        bar = "━" * (n := 10 * step // self.total) + "╌" * (10 - n)
        cells = "".join(f" {format(metrics[k], f) if k in metrics else '-':>{max(len(k), int(f.split('.')[0]))}}" for k, f in self.columns.items())
        line = f"{step:>{len(str(self.total))}}/{self.total} {cells}  {int(left // 60)}:{int(left % 60):02d} {bar}"
        if step % self.every == 0 or step in (1, self.total):
            print(("\r\033[K" if self.tty else "") + line, flush=True)
        elif self.tty:
            print("\r\033[K" + line, end="", flush=True)
