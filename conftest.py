"""Fixtures that several test files share: the built-in tokenizer, a small file of rows, and one run
of the three steps on it."""
import itertools
import signal

from testing import train, write_rows  # before torch: it sets environment variables

import pytest

import models
import ppo
import reward
import sft
import tasks
import utils

utils.quiet_transformers()


@pytest.fixture(scope="session")
def tok():
    return models.tiny_tokenizer()


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory):
    """240 rows of toy in a file: little enough to train on in a second."""
    rows = itertools.islice(tasks.toy(), 240)
    return write_rows(tmp_path_factory.mktemp("toy") / "toy.jsonl", rows)


@pytest.fixture(scope="session")
def chain(toy_file, tmp_path_factory):
    """The three steps, run in this process on 240 rows: {step: (folder, metrics)}."""
    out = tmp_path_factory.mktemp("chain")
    common = dict(data=toy_file, held_out=0.2, batch_size=8, max_len=64)
    runs = {}
    runs["sft"] = train(sft, out / "sft", epochs=0.5, **common)
    common["model"] = str(out / "sft")
    runs["reward"] = train(reward, out / "reward", epochs=0.5, **common)
    runs["ppo"] = train(
        ppo, out / "ppo", reward=str(out / "reward"), iterations=3, minibatches=2, ppo_epochs=2,
        max_new_tokens=8, **common)
    return {step: (str(out / step), metrics) for step, metrics in runs.items()}


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANDLERS = [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def handlers_of_signals():
    """A run that a test ends early leaves its handlers behind; Ctrl-C must go on ending pytest."""
    yield
    for number, handler in zip(SIGNALS, HANDLERS):
        signal.signal(number, handler)
