"""What all scripts share: command line, start-up, micro batches, collectives, logs."""
import argparse
import contextlib
import dataclasses
import errno
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import logging
import os
import random
import re
import resource
import shlex
import shutil
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
    """A mistake that a user can fix. Only its message is printed: what was wrong and what to do."""


def first_line(error):
    """The first line of an error's message; without a message, the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_rank0():
    return os.environ.get("RANK", "0") == "0"


# -----------------------------------------------------------------------------
# the screen


def print0(*args, end="\n"):
    """print, on rank 0 only.

    Where standard output cannot be written to, because its reader has ended or its disk is full,
    there is one warning, and the run goes on: what it prints is in its folder, too."""
    if not is_rank0():
        return
    try:
        print(*args, end=end, flush=True)
    except OSError as error:
        discard_output(sys.stdout)
        print_error(f"warning: standard output is lost ({error.strerror}); the run goes on")


def print_error(line):
    """A line on standard error; nothing, where that is lost."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard_output(sys.stderr)


def discard_output(stream):
    """What is written to this stream, now and later, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def prepare_streams():
    """Makes standard input, output and error fit for anything that is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `python sft.py >&-`
            setattr(sys, name, open(os.devnull, mode))
    sys.stdin.reconfigure(errors="surrogateescape")  # see chat.without_bad_bytes
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may know only ASCII or Latin-1


# -----------------------------------------------------------------------------
# command line


def field_comments(Config):
    """Reads the source of a dataclass: returns {field: help} and {field: group}.

    The comment behind a field is its help, continued on lines that begin with "#   "; any other
    comment on a line of its own starts a group of flags. So source and --help cannot differ."""
    help_of, group_of = {}, {}
    group, field, field_line = "flags", None, 0
    source = io.StringIO(inspect.getsource(Config))
    for token in tokenize.generate_tokens(source.readline):
        line = token.start[0]
        if token.type == tokenize.NAME and line != field_line:
            field, field_line = token.string, line
            group_of[field] = group
        elif token.type == tokenize.COMMENT and line == field_line:
            help_of[field] = token.string.lstrip("# ")
        elif token.type == tokenize.COMMENT and token.string.startswith("#   "):
            help_of[field] += " " + token.string.lstrip("# ")
        elif token.type == tokenize.COMMENT:
            group = token.string.lstrip("# ")
    return help_of, group_of


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        """Without argparse's ten lines of usage in front of the line that matters."""
        wait_for_rank0()
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def parse_args(Config, argv=None):
    """Builds a command line from a frozen dataclass: `kl_coef: float = 0.1  # help` becomes
    --kl-coef 0.2 (or --kl_coef). Returns a Config."""
    if argv is None:
        argv = sys.argv[1:]
    parser = OneLineParser(
        description=sys.modules[Config.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    types = typing.get_type_hints(Config)
    help_of, group_of = field_comments(Config)
    groups = {}
    for field in dataclasses.fields(Config):
        name = group_of[field.name]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        kind = types[field.name]
        if kind is tuple:  # one argument or more, named without a flag
            groups[name].add_argument(field.name, nargs="+", help=help_of[field.name])
            continue
        help_text = f"{help_of[field.name]} (default: {field.default!r})".replace("%", "%%")
        options = {"default": field.default, "help": help_text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
            options["type"] = type(options["choices"][0])
        else:
            options["type"] = kind
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        groups[name].add_argument("--" + field.name.replace("_", "-"), **options)
    # The deepspeed launcher passes this one; the environment says the same.
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)

    args = vars(parser.parse_args([with_dashes(arg) for arg in argv]))
    del args["local_rank"]
    try:
        return Config(**args)
    except UserError as error:
        parser.error(str(error))


def with_dashes(arg):
    """--kl_coef=0.1 becomes --kl-coef=0.1; what is not a flag stays as it is."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value


def flag_of(name):
    """The flag that sets a field of a Config."""
    return "--" + name.replace("_", "-")


def require_at_least(cfg, least, *names):
    """Raises UserError where one of these fields of a Config is smaller than `least` or NaN."""
    for name in names:
        value = getattr(cfg, name)
        if not value >= least:
            raise UserError(f"{flag_of(name)} {value}: must be at least {least}")


# What a number of a Config must be, in words and as a test. NaN passes none of them.
COUNT = ("at least 1", lambda x: x >= 1)
NOT_NEGATIVE = ("at least 0", lambda x: x >= 0)
POSITIVE = ("above 0", lambda x: x > 0)
NUMBERS = {
    "actor_lr": NOT_NEGATIVE,  # 0: only the critic learns
    "answers_per_prompt": COUNT,
    "batch_size": COUNT,
    "clip": POSITIVE,
    "critic_lr": NOT_NEGATIVE,
    "critic_warmup": NOT_NEGATIVE,
    "ema": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "epochs": POSITIVE,
    "held_out": ("above 0 and below 1", lambda x: 0 < x < 1),
    "iterations": COUNT,
    "kl_coef": NOT_NEGATIVE,
    "lr": POSITIVE,
    "max_len": ("at least 2", lambda x: x >= 2),
    "max_new_tokens": COUNT,
    "micro_batch": NOT_NEGATIVE,
    "minibatches": COUNT,
    "ppo_epochs": COUNT,
    "ptx_coef": NOT_NEGATIVE,
    "save_every": NOT_NEGATIVE,
    "seed": NOT_NEGATIVE,
    "serve": ("a port, from 1 to 65535, or 0", lambda x: 0 <= x < 2**16),
    "temperature": ("0, or at least 0.001", lambda x: x == 0 or x >= 0.001),
    "top_k": NOT_NEGATIVE,
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "tp": COUNT,
    "zero": ("0, 1, 2 or 3", lambda x: x in (0, 1, 2, 3)),
}
NEVER_EMPTY = ("model", "out", "data", "reward")


def check_values(cfg):
    """Raises UserError where a number of a Config is not what NUMBERS says, or a text is empty that
    must not be. A number that is not in there must be finite."""
    for field in dataclasses.fields(cfg):
        name = field.name
        value = getattr(cfg, name)
        if isinstance(value, str) and name in NEVER_EMPTY and not value.strip():
            raise UserError(f"{flag_of(name)} is empty; is a variable of the shell not set?")
        if isinstance(value, (int, float)):
            words, holds = NUMBERS.get(name, ("a finite number", np.isfinite))
            if not holds(value):
                raise UserError(f"{flag_of(name)} {value}: must be {words}")
            if value >= 2**32:
                raise UserError(f"{flag_of(name)} {value}: must be below 2**32")


def require_file(name, path):
    """Raises UserError where a flag names a file that is not there; an empty one is left out."""
    if path and not Path(path).is_file():
        raise UserError(f"{flag_of(name)} {path}: no such file")


def wait_for_rank0():
    """Most mistakes are every rank's. Rank 0 prints; the launcher ends the others meanwhile."""
    if not is_rank0():
        time.sleep(5)


def stop(line, code):
    """Prints why this process ends, and ends it."""
    wait_for_rank0()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print_error(line)
    # Not sys.exit: another rank may be inside a collective, and this one would wait for it.
    os._exit(code)


# What gloo and NCCL say in a collective when the process of another rank has ended.
LOST_RANK = r"Connection (closed|reset) by peer|Broken pipe|remote process exit"


def run(main, Config):
    """The last line of a script. A user's mistake prints one sentence and exits with code 2;
    anything else is a bug and shows its traceback.

    Config may have a method check_files(), which is called first: it raises UserError, and prints
    warnings, for what can be seen before anything is loaded."""
    prepare_streams()
    cfg = parse_args(Config)
    try:
        if hasattr(cfg, "check_files"):
            cfg.check_files()
        main(cfg)
    except UserError as error:
        stop(f"error: {error}", 2)
    except KeyboardInterrupt:  # while models are loaded; later training.Interrupt takes it
        stop("\nstopped by Ctrl-C", 130)
    except BrokenPipeError:  # of a script's own print
        stop("error: what read the standard output has ended", 2)
    except RuntimeError as error:
        if not re.search(LOST_RANK, str(error)):
            raise
        stop("error: another rank has ended; its own message, or the launcher's, says why", 1)
    if dist.is_initialized():
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# start-up


def init_distributed(seed):
    """Joins the other ranks, whoever launched them (python, torchrun, deepspeed), and seeds all
    generators. Afterwards dist.get_rank() and dist.get_world_size() work everywhere.
    Returns this rank's device."""
    alone = "RANK" not in os.environ  # plain `python script.py`
    if alone:
        # The port is for DeepSpeed, which asks for one; nothing listens there.
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # must be set before deepspeed is imported
    # DeepSpeed calls collectives that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Gradient checkpointing warns where nothing is trained.
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
    # NOTE: before zero.Init, inside which this import fails (DeepSpeed 0.19, torch 2.13).
    importlib.import_module("torch._dynamo")
    import deepspeed

    importlib.import_module("deepspeed.comm.torch")
    if not cuda:
        # DeepSpeed would compile C++ for two minutes, for a collective that gloo has.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    # Its warnings are about our AdamW and about skipped steps, which we report ourselves.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    quiet_transformers()

    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if alone:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return device


def quiet_transformers():
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def dtype_of(name):
    """--dtype to a torch.dtype; auto is bf16 on a GPU that computes with it, from Ampere on. Older
    ones, such as the T4, only emulate it, slowly."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


# -----------------------------------------------------------------------------
# micro batches


def micro_batch_size(step_rows, micro_batch):
    """How a rank computes its share of the rows of one optimizer step. micro_batch: what the user
    asked for, 0 for the whole share. Returns (rows per micro batch, micro batches per step)."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if step_rows % world:
        raise UserError(
            f"the {step_rows} rows of an optimizer step (--batch-size, in ppo.py divided by "
            f"--minibatches) cannot be divided among {world} ranks; take a multiple of {world}"
        )
    share = step_rows // world
    size = min(micro_batch or share, share)
    return size, -(-share // size)


def split_micro_batches(rows, lengths, micro_batch):
    """This rank's micro batches, out of the rows (an index array) that one optimizer step sees on
    all ranks. Rows are sorted by length and dealt out like cards: all ranks get the same load, a
    micro batch has little padding, and every rank has the same number of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
    share = longest_first[rank::world]
    return [share[i : i + micro_batch] for i in range(0, len(share), micro_batch)]


def fill_to_multiple(rows, n):
    """Repeats some rows, so that their number is a multiple of n: every rank then makes the same
    number of forwards."""
    return np.resize(rows, len(rows) + -len(rows) % n)


def forward_in_micro_batches(forward, indices, lengths, micro_batch):
    """Calls forward(indices of a micro batch) -> (b, k) float for all of `indices`, spread over the
    ranks. Returns (n, k) in the order of `indices`, on every rank."""
    padded = fill_to_multiple(indices, dist.get_world_size())
    out = None
    for part in split_micro_batches(np.arange(len(padded)), lengths[padded], micro_batch):
        x = forward(padded[part])
        if out is None:
            out = x.new_zeros(len(padded), x.size(1))
        out[part] = x
    dist.all_reduce(out)  # every row is zero on all ranks but one
    return out[: len(indices)]


# -----------------------------------------------------------------------------
# collectives


def sum_over_ranks(x, device):
    """Sum over ranks, in float64, of a number or a tensor."""
    total = torch.as_tensor(x, dtype=torch.float64, device=device).clone()
    dist.all_reduce(total)
    return total if isinstance(x, torch.Tensor) else total.item()


def gather_rows(x):
    """All ranks' rows, on every rank. x (n, ...) holds rows rank::world of the whole; n and the
    last size may differ between ranks. Pads with 0 on the right. Returns (sum of n, ...)."""
    world = dist.get_world_size()
    if world == 1:
        return x
    width = x.size(-1) if x.dim() > 1 else 0
    shape = torch.tensor([len(x), width], device=x.device)
    shapes = [torch.empty_like(shape) for _ in range(world)]
    dist.all_gather(shapes, shape)
    most_rows, most_width = torch.stack(shapes).max(0).values.tolist()
    if x.dim() > 1:
        padded = x.new_zeros(most_rows, most_width)
        padded[: len(x), :width] = x
    else:
        padded = x.new_zeros(most_rows)
        padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    total = sum(int(s[0]) for s in shapes)
    return torch.stack(parts, 1).flatten(0, 1)[:total]  # row i of rank r is row i * world + r


class Totals:
    """Means of named quantities over tokens: over micro batches, optimizer steps and ranks.

    A mean over all tokens is the sum of the sums over the sum of the counts, so that it does not
    depend on how the batch was split.
    """

    def __init__(self):
        self.sums = {}    # name -> float64 sum over tokens; "tokens" -> their number
        self.maxima = {}  # name -> largest value

    def add(self, mask, **quantities):
        """mask (B, A) bool; a quantity is a (B, A) tensor, or a scalar that is its masked mean."""
        n = mask.sum()
        sums = {"tokens": n}
        for name, x in quantities.items():
            sums[name] = x * n if x.dim() == 0 else (x * mask).sum()
        for name, x in sums.items():
            self.sums[name] = self.sums.get(name, 0) + x.double()

    def add_max(self, **quantities):
        for name, x in quantities.items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, x), x)

    def all_reduce(self):
        """Takes all ranks together."""
        sums = torch.stack(list(self.sums.values()))
        dist.all_reduce(sums)
        self.sums = dict(zip(self.sums, sums))
        for x in self.maxima.values():
            dist.all_reduce(x, dist.ReduceOp.MAX)

    def merge(self, other):
        """Adds another object's sums to these."""
        for name, x in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + x
        self.add_max(**other.maxima)

    def mean(self, name):
        return (self.sums[name] / self.sums["tokens"]).item()

    def means(self):
        """{name: mean over tokens, or maximum} as floats."""
        out = {name: self.mean(name) for name in self.sums if name != "tokens"}
        return out | {name: x.item() for name, x in self.maxima.items()}


# -----------------------------------------------------------------------------
# files and logs


def git(*arguments):
    """What a git command prints about this code, None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, errors="replace",
            cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def git_commit():
    """The commit of this code, or None."""
    return (git("rev-parse", "HEAD") or "").strip() or None


def memory_gib():
    """Peak memory of this process: on the GPU if there is one, else on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cosine_schedule(step, total, warmup=0.03, floor=0.1):
    """Share of the peak learning rate at a step (from 0): linear warm-up over 3% of the steps,
    then half a cosine down to 10%."""
    warmup_steps = max(1, int(warmup * total))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * progress))


class Clock:
    def __init__(self):
        self.last = time.perf_counter()

    def lap(self):
        """Seconds since the last lap, with all of the GPU's work done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds = now - self.last
        self.last = now
        return seconds


def disk_problem(folder, error):
    """What keeps files from being written to a folder, in words; None where the error is of
    another kind. torch and safetensors raise errors of their own, without an errno."""
    from safetensors import SafetensorError

    text = str(error)
    number = getattr(error, "errno", None)
    folder = Path(folder)
    while not folder.exists():
        folder = folder.parent
    full = number in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in text or shutil.disk_usage(folder).free < 2**20:
        return "the disk is full"
    if number == errno.EFBIG or "File too large" in text:
        return "a file has reached the largest size that is allowed (ulimit -f)"
    if "unexpected pos" in text or "file write failed" in text:  # torch does not say why
        return f"a file is not written to its end, as on a full disk ({first_line(error)})"
    from_torch = "inline_container" in text or "PytorchStreamWriter" in text
    if from_torch or isinstance(error, (OSError, SafetensorError)):
        return f"the folder is not writable ({first_line(error)})"
    return None


@contextlib.contextmanager
def writing(path, advice=". When this is fixed, go on with --resume"):
    """Around what writes a file: an error of the disk becomes a UserError. advice: its end."""
    try:
        yield
    except OSError as error:
        problem = disk_problem(Path(path).parent, error)
        raise UserError(f"{path} cannot be written: {problem}{advice}") from None


def atomic_write(path, text):
    """Whenever the process ends, the file is the old one or the new one, never half of it."""
    new = Path(f"{path}.new")
    new.write_text(text)
    new.rename(path)


def append_lines(path, key, last):
    """Opens a file of JSON lines for appending. Lines past step `last` are dropped: they were
    written after the checkpoint that a run resumes from, and will be written again."""
    new = Path(f"{path}.new")
    with open(new, "w") as kept:
        if last and path.exists():
            for line in open(path, errors="replace"):
                try:
                    step = json.loads(line)[key]
                except (ValueError, TypeError, KeyError):
                    break  # cut off in the middle, so it was written after the checkpoint
                if step <= last:
                    kept.write(line.rstrip("\n") + "\n")
    new.rename(path)
    return open(path, "a")


def require_tracker(name):
    """Raises UserError where the package that --track names is not installed."""
    if name and importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name}: first `pip install {name}`")


def start_tracker(cfg):
    """wandb or trackio, which have the same interface; None without --track."""
    if not cfg.track:
        return None
    tracker = importlib.import_module(cfg.track)
    tracker.init(project="flatrlhf", name=cfg.out, config=dataclasses.asdict(cfg))
    return tracker


class Log:
    """One line per step on the screen, in fixed columns; all numbers in OUT/metrics.jsonl; and
    OUT/run.json and OUT/code, see write_record."""

    def __init__(self, cfg, total, columns, every=1, start=0):
        """columns: {metric: format}, such as {"loss": ".4f"}. every: print one step of so many.
        start: the step that a resumed run goes on after."""
        self.out = Path(cfg.out)
        self.total = total
        self.columns = columns
        self.every = every
        self.start = start
        self.start_time = time.time()
        self.interactive = sys.stdout.isatty()
        if not is_rank0():
            return
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            write_record(self.out, cfg, start)
            if start == 0:  # a run that never came to a checkpoint may have left some
                (self.out / "samples.jsonl").unlink(missing_ok=True)
                (self.out / "tokens.jsonl").unlink(missing_ok=True)
            self.file = append_lines(self.out / "metrics.jsonl", "step", start)
        self.sample_files = {}
        self.tracker = start_tracker(cfg)
        names = " ".join(f"{name:>{self.width(name)}}" for name in columns)
        print0(f"{'step':>{self.step_width}} {names}   left")

    @property
    def step_width(self):
        return max(4, 2 * len(str(self.total)) + 1)

    def width(self, name):
        return max(len(name), 7)

    def write(self, step, metrics):
        """Writes to the file only. Values that are not finite are left out."""
        if is_rank0():
            finite = {k: v for k, v in metrics.items() if v is not None and np.isfinite(v)}
            with writing(self.out / "metrics.jsonl"):
                self.file.write(json.dumps({"step": step, **finite}) + "\n")
                self.file.flush()
            if self.tracker:
                self.tracker.log(finite, step=step)
                if step == self.total:
                    self.tracker.finish()

    def samples(self, rows, name="samples.jsonl", key="iteration"):
        """Appends rows to OUT/samples.jsonl or another file. row[key] is the iteration."""
        if not is_rank0():
            return
        path = self.out / name
        with writing(path):
            if name not in self.sample_files:
                self.sample_files[name] = append_lines(path, key, self.start)
            for row in rows:
                self.sample_files[name].write(json.dumps(row) + "\n")
            self.sample_files[name].flush()

    def __call__(self, step, metrics):
        """Writes and prints a step, which counts from 1. Ranks other than 0 do nothing."""
        self.write(step, metrics)
        if not is_rank0():
            return
        cells = []
        for name, form in self.columns.items():
            cell = format(metrics[name], form) if name in metrics else "-"
            cells.append(f"{cell:>{self.width(name)}}")
        seconds_per_step = (time.time() - self.start_time) / (step - self.start)
        minutes, seconds = divmod(int(seconds_per_step * (self.total - step)), 60)
        progress = f"{step}/{self.total}"
        line = f"{progress:>{self.step_width}} {' '.join(cells)} {minutes:3}:{seconds:02}"
        if self.interactive:
            line = "\r\033[K" + line  # over the line of the step before, if that was not kept
        if step % self.every == 0 or step in (1, self.total):
            print0(line)
        elif self.interactive:
            print0(line, end="")


# -----------------------------------------------------------------------------
# what a run knows about itself


class Inputs:
    """Hashes of what this run has read. training.claim_folder puts the models in, and data.load the
    sources. They belong to the process, which trains one run at a time."""

    models = {}  # folder -> hash of its files; None for anything else
    data = {}    # source -> hash of its rows


def write_record(out, cfg, start):
    """Writes OUT/run.json, and a copy of the code to OUT/code with what git says is changed in it.

    start: the step that a resumed run goes on after. It keeps the record that it began with, adds
    to its list `resumed`, and if the code has changed, a copy of that too. Raises UserError where
    its data or its models have changed."""
    path = out / "run.json"
    record = run_record(cfg)
    folder = out / "code"
    changed = True
    if start and path.exists():
        old = json.loads(path.read_text())
        require_same_inputs(old, record)
        folder = out / f"code-{start}"
        changed = warn_of_changed_code(old, record)
        names = ("command", "time", "host", "device", "world", "versions", "git", "dirty")
        resumed = {"step": start, **{name: record[name] for name in names}}
        record = {**old, "resumed": [*old.get("resumed", []), resumed]}
    if changed:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for source in code_files(cfg).values():
            shutil.copy(source, folder)
        if record["dirty"]:
            (folder / "changes.diff").write_text(git("diff", "HEAD", "--", *record["dirty"]))
    atomic_write(path, json.dumps(record, indent=1))


def run_record(cfg):
    """What a run needs to know about itself later."""
    import deepspeed
    import transformers

    modules = (torch, deepspeed, transformers, np)
    models = {}
    for name, digest in Inputs.models.items():
        models[name] = digest or hub_commit(name)
    device = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    dirty = git("diff", "HEAD", "--name-only", "--relative", "--", "*.py") or ""
    return {
        "script": Path(inspect.getfile(type(cfg))).name,
        "command": shlex.join(sys.argv),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": socket.gethostname(),
        "device": device,
        "world": dist.get_world_size(),
        "config": dataclasses.asdict(cfg),
        "models": {name: digest for name, digest in models.items() if digest},
        "data": dict(Inputs.data),
        "versions": {m.__name__: m.__version__ for m in modules},
        "git": git_commit(),
        "dirty": dirty.splitlines(),  # files that are not as in this commit
        "code": {name: short_hash(path.read_bytes()) for name, path in code_files(cfg).items()},
    }


def code_files(cfg):
    """{name: path} of the source files that decide on a run: its script, our modules that it has
    imported, and the files with functions of the user that its flags name."""
    paths = [Path(inspect.getfile(type(cfg)))]
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "")
        if path.parent == Path(__file__).parent and not path.name.startswith("test"):
            paths.append(path)
    for value in dataclasses.asdict(cfg).values():
        paths += [Path(name) for name in re.findall(r"([^,]+\.py):", str(value))]
    return {path.name: path for path in sorted(paths) if path.is_file()}


def hub_commit(name):
    """The commit of a model that was loaded from the hub, None for anything else."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json")
    except ValueError:  # the name of a function
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def short_hash(content):
    """16 hexadecimal digits of bytes: enough to see a change."""
    return hashlib.sha256(content).hexdigest()[:16]


def require_same_inputs(old, new):
    """Raises UserError where a run would go on with other rows or models than it began with. old,
    new: what run_record has returned."""
    for kind, what in (("data", "rows"), ("models", "files")):
        for name, digest in new[kind].items():
            if old.get(kind, {}).get(name, digest) != digest:
                message = (
                    f"--resume: {name} has other {what} now than when this run began; put the "
                    "old ones back, or start again with --overwrite")
                raise UserError(message)


def warn_of_changed_code(old, new):
    """Returns whether the code of a run has changed since it began."""
    before = old.get("code", {})
    changed = [name for name, digest in new["code"].items() if before.get(name, digest) != digest]
    if before and new["script"] not in before:
        changed.append(new["script"])
    if changed:
        print0(f"warning: --resume: code has changed since this run began: {', '.join(changed)}")
    return bool(changed)
