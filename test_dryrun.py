"""A dry run of the GPU path on a machine without a GPU.

PyTorch's fake tensors have a device, a dtype and a shape, and no data. On fake tensors of cuda:0
all code takes the path that it takes on a GPU, and raises an error where tensors of two devices
meet, where the host would wait for a number, and where a shape depends on data. Triton kernels are
replaced by objects that count their launches. See results/dryrun.json for the counts.
"""
import contextlib
import json
import os

from testing import HERE, KINDS, tiny_config

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import models
from hybrid_engine import HybridEngine

CUDA = torch.device("cuda:0")

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

# Operations that make a view or read a property: they launch nothing on a GPU.
NO_LAUNCH = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty",
    "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unfold", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "lift_fresh",
}


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: PyTorch's operations and our Triton kernels."""

    def __init__(self):
        super().__init__()
        self.torch = {}
        self.triton = {}
        self.between_devices = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        on_gpu = isinstance(out, torch.Tensor) and out.is_cuda
        if on_gpu or not isinstance(out, torch.Tensor):
            if func.namespace == "aten" and name not in NO_LAUNCH:
                self.torch[name] = self.torch.get(name, 0) + 1
        if name in ("_to_copy", "copy_") and args[-1].device != out.device:
            self.between_devices.append(name)
        return out

    def total(self):
        return sum(self.torch.values()) + sum(self.triton.values())


def index(x, key):
    """x[key] by operations of its own: PyTorch's indexing of a CUDA tensor asks for a driver, in a
    build without CUDA. Returns a view and the tensors that index it, if any. A mask is taken to be
    true everywhere: how many elements it has is no question to a fake tensor."""
    keys = key if isinstance(key, tuple) else (key,)
    if isinstance(key, torch.Tensor) and key.dtype == torch.bool:
        assert key.shape == x.shape
        return torch.ops.aten.reshape.default(x, [-1]), []
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        others = sum(k is not None for k in keys) - 1
        keys = keys[:at] + (slice(None),) * (x.dim() - others) + keys[at + 1 :]
    tensors = [None] * len(keys)
    dim = 0
    for k in keys:
        if isinstance(k, int):
            x = torch.ops.aten.select.int(x, dim, k)
        elif isinstance(k, slice):
            assert k.step in (None, 1)
            stop = 2**63 - 1 if k.stop is None else k.stop
            x = torch.ops.aten.slice.Tensor(x, dim, k.start or 0, stop)
            dim += 1
        elif k is None:
            x = torch.ops.aten.unsqueeze.default(x, dim)
            dim += 1
        else:
            tensors[dim] = torch.as_tensor(k)
            dim += 1
    while tensors and tensors[-1] is None:
        tensors.pop()
    return x, tensors


class WithoutDriver(TorchFunctionMode):
    """The few methods of a CUDA tensor that ask for a driver, by the operations that they call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__invert__:
            return torch.ops.aten.bitwise_not.default(*args)
        if func is torch.Tensor.contiguous:
            return torch.ops.aten.contiguous.default(*args)
        if func is torch.Tensor.__getitem__:
            x, tensors = index(*args)
            return torch.ops.aten.index.Tensor(x, tensors) if tensors else x
        if func is torch.Tensor.__setitem__:
            x, tensors = index(*args[:2])
            value = torch.as_tensor(args[2], device=x.device)
            if tensors:
                torch.ops.aten.index_put_.default(x, tensors, value)
            else:
                torch.ops.aten.copy_.default(x, value)
            return None
        return func(*args, **(kwargs or {}))


class FakeKernel:
    """Stands in for a Triton kernel: counts launches, and checks that all tensors are on a GPU."""

    def __init__(self, name, counts):
        self.name = name
        self.counts = counts

    def __getitem__(self, grid):
        def launch(*args, **options):
            for x in args:
                if isinstance(x, torch.Tensor):
                    assert x.is_cuda, f"{self.name} got a tensor on {x.device}"
            self.counts[self.name] = self.counts.get(self.name, 0) + 1

        return launch


@contextlib.contextmanager
def dry_run(monkeypatch):
    """Fake tensors, fake kernels, and a GPU that answers questions. Yields the Launches."""
    launches = Launches()
    for name in vars(kernels).copy():
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, FakeKernel(name, launches.triton))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**36, 2**36))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutDriver(), launches:
        yield launches


def fake_lm(config):
    from transformers import AutoModelForCausalLM

    return fake_model(AutoModelForCausalLM, config)


def fake_model(auto_class, config):
    """A model on fake memory of cuda:0. It is made on the CPU, because initializing needs a GPU."""
    model = auto_class.from_config(config, dtype=torch.bfloat16).eval()
    on_gpu = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device=CUDA)
                # A tied parameter stays one parameter.
                module._parameters[name] = on_gpu.setdefault(p, torch.nn.Parameter(fake))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=CUDA)
    return model


def ready_engine(lm, rows, capacity, eos=(5,)):
    """An engine as HybridEngine.start leaves it, without prompts."""
    engine = HybridEngine(lm)
    engine.decoder.load()
    engine.cache.reserve(rows, capacity)
    engine.decoder.build_rotary(capacity)
    engine.sampling = (1.0, 0, 1.0)
    engine.eos = torch.tensor(eos, device=CUDA)
    return engine


def launches_of_a_decode_step(config, rows, monkeypatch):
    with dry_run(monkeypatch) as launches, torch.no_grad():
        engine = ready_engine(fake_lm(config), rows, 544)
        launches.torch.clear()
        launches.triton.clear()
        launches.between_devices.clear()
        engine.decode_step(rows)
    return launches


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_step_never_waits_for_the_host_nor_mixes_devices(kind, monkeypatch):
    launches = launches_of_a_decode_step(tiny_config(kind), 4, monkeypatch)
    layers = tiny_config(kind).num_hidden_layers
    assert launches.triton["decode_kernel"] == layers
    assert launches.triton["sample_kernel"] == 1
    assert not launches.between_devices


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_mixes_no_devices(kind, monkeypatch):
    with dry_run(monkeypatch) as launches, torch.no_grad():
        engine = ready_engine(fake_lm(tiny_config(kind)), 4, 64)
        slots = torch.zeros(9, dtype=torch.long, device=CUDA)
        positions = torch.zeros(9, dtype=torch.long, device=CUDA)
        cu_seqlens = torch.zeros(4, dtype=torch.int32, device=CUDA)
        cache = engine.cache

        def attend(layer, q, k, v):
            q, k = engine.rope_and_cache(layer, q, k, v, slots, positions)
            return kernels.prefill_attention(q, k, v, cu_seqlens, layer.spec)

        hidden = engine.decoder.forward(slots, positions, attend)
        logits = engine.decoder.logits(hidden[cu_seqlens[1:].long() - 1])
        engine.append(logits, cache.slots[:3])
    assert launches.triton["prefill_kernel"] == tiny_config(kind).num_hidden_layers


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_mixes_no_devices(kind, monkeypatch):
    """Policy and RewardModel. Where the answers are is the one question that the host waits for."""
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification)

    def every_token(prompt_lens, answer_lens):
        positions = torch.zeros(2, 4, dtype=torch.long, device=CUDA)
        return positions, torch.ones(2, 4, dtype=torch.bool, device=CUDA)

    monkeypatch.setattr(models, "answer_positions", every_token)
    with dry_run(monkeypatch) as launches, torch.no_grad():
        lm = fake_lm(tiny_config(kind))
        tokens = torch.zeros(2, 9, dtype=torch.long, device=CUDA)
        lens = torch.zeros(2, dtype=torch.long, device=CUDA)
        logprobs, entropy = models.Policy(lm)(tokens, lens, lens)
        assert logprobs.shape == entropy.shape == (2, 4)
        assert logprobs.dtype == entropy.dtype == torch.float32
        if type(lm.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            config = tiny_config(kind, num_labels=1)
            model = fake_model(AutoModelForSequenceClassification, config)
            values = models.RewardModel(model).values(tokens)
            assert values.shape == (2, 9)
            assert values.dtype == torch.float32
    assert launches.triton["logit_stats_kernel"] == 1
    assert not launches.between_devices


class Context:
    """What autograd hands to a Function. Its own engine needs a driver for CUDA tensors."""

    def __init__(self, needs_input_grad):
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_log_probabilities_of_given_tokens_mix_no_devices(softcap, monkeypatch):
    """With a frozen output layer: the gradient of its weight is added in place by an operation
    that needs a driver."""
    with dry_run(monkeypatch) as launches, torch.no_grad():
        hidden = torch.empty(30, 64, dtype=torch.bfloat16, device=CUDA)
        weight = torch.empty(97, 64, dtype=torch.bfloat16, device=CUDA)
        targets = torch.zeros(30, dtype=torch.long, device=CUDA)
        context = Context((True, False, False, False, False))
        args = (hidden, weight, targets, 0.7, softcap)
        logprobs, entropy = kernels.TokenLogprobs.forward(context, *args)
        assert logprobs.dtype == entropy.dtype == torch.float32
        gradients = kernels.TokenLogprobs.backward(context, logprobs, entropy)
        assert gradients[0].dtype == torch.bfloat16
        assert gradients[1] is None
        assert not launches.between_devices
    assert launches.triton["logit_stats_kernel"] == launches.triton["logit_grads_kernel"] == 1


def test_the_launches_of_a_decode_step_are_those_in_results(monkeypatch):
    """DRYRUN_OUT=file writes the counts instead."""
    from transformers import LlamaConfig, OPTConfig

    shapes = {
        "opt-1.3b": OPTConfig(
            vocab_size=50272, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32,
            ffn_dim=8192, word_embed_proj_dim=2048),
        "llama-8b": LlamaConfig(
            vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, intermediate_size=14336),
    }
    counts = {}
    for name, config in shapes.items():
        for rows in (1, 32, 128):
            launches = launches_of_a_decode_step(config, rows, monkeypatch)
            counts[f"{name}, {rows} rows"] = {
                "launches": launches.total(), "triton": launches.triton, "torch": launches.torch}
    path = HERE / "results" / "dryrun.json"
    if os.environ.get("DRYRUN_OUT"):
        path = os.environ["DRYRUN_OUT"]
        with open(path, "w") as file:
            json.dump(counts, file, indent=1)
    with open(path) as file:
        assert json.load(file) == counts
