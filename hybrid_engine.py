"""The hybrid engine: one set of weights with a training path and a generation path.

               training                                     generation
   HF module, ZeRO shards, autograd  --weights-->  decoder.py, by reference
                                                        |
   prompts --> waiting --admit (prefill)--> running in slots of the KV cache --decode--> ...
                  ^                                     |
                  +---- retire: finished rows leave, their slots take waiting prompts

  admit     Prompts are computed end to end, without padding; equal prompts are computed once.
  decode    One token for every running row. Lengths, EOS and random numbers are in tensors, so a
            step does not need the host. On a GPU it is one CUDA graph per batch size, which serves
            all lengths and stays valid when an optimizer step changes the weights in place.
  retire    Rows that have ended are copied out and free their slots. So the cost follows the
            tokens that are sampled, and not rows x longest answer (continuous batching). A row that
            a tool or an environment answers stays, and goes on with the tokens that it was given.
  release   The memory of the KV cache, and of gathered weights, goes back to training.

decoder.py says which model families this works for; others raise an error. `--engine hf` is the
slow path through `transformers.generate`, for all models.

Dimension key:  n rows of a step, S slots, C capacity of a slot in tokens, N prompts, P longest
                prompt, A longest answer, T longest row, L layers, H heads, K key/value heads,
                D head size, V vocabulary.
"""
import math
import time
from collections import deque
from dataclasses import dataclass
from functools import partial

import numpy as np
import psutil
import torch
import torch.distributed as dist

import kernels
from decoder import Decoder, unwrap
from utils import UserError, print0

# Most tokens of one prefill. It bounds the memory of activations; on a CPU they fit in its cache.
PREFILL_TOKENS = {"cuda": 16384, "cpu": 2048}

# Decode steps between two reads of the flags that say which rows have ended. On a GPU the host
# waits at a read, and then the GPU waits for the host.
STEPS_PER_SYNC = {"cuda": 8, "cpu": 1}

# Bytes per second, from NVIDIA's data sheets.
MEMORY_BANDWIDTH = {
    "H100": 3.35e12,
    "H200": 4.8e12,
    "A100-SXM4-80GB": 2.04e12,
    "A100-SXM4-40GB": 1.56e12,
}


@dataclass
class Rollout:
    tokens: torch.Tensor            # (N, T) long, right-padded: prompt, then answer with its EOS
    prompt_lens: torch.Tensor       # (N,) long
    answer_lens: torch.Tensor       # (N,) long
    logprobs: torch.Tensor          # (N, A) float32, under the tempered policy, 0 elsewhere
    sampled: torch.Tensor           # (N, A) bool: answer tokens that the model sampled


def row_keys(seed, n):
    """One 32-bit random key per row. seed: an int for the whole call, from which row i gets a key
    of its own; or one int per row. Returns (n,) long."""
    if isinstance(seed, int):
        low = kernels.hash32(torch.tensor(seed & 0xFFFFFFFF))
        high = seed >> 32 & 0x7FFFFFFF
        return kernels.hash32(torch.arange(n) + low + high)
    return kernels.hash32(torch.tensor([s & 0xFFFFFFFF for s in seed]))


def as_tuple(eos_token_id):
    """The ids of an EOS that is one id, a list of ids, or None."""
    if eos_token_id is None:
        return ()
    if isinstance(eos_token_id, int):
        return (eos_token_id,)
    return tuple(eos_token_id)


# -----------------------------------------------------------------------------
# the KV cache


class KVCache:
    """Keys and values of S rows of at most C tokens, and the state of these rows.

    A slot is the place of one row in each of these tensors:

    k_cache, v_cache (L, S, K, C, D); tokens (S, C) long; logprobs (S, C) float32, of each token;
    lengths (S,) tokens in the slot, the newest included; max_lengths (S,) where the row must end;
    keys (S,) of its random numbers; done (S,) bool, true also where there is no row. With tools,
    given (S, C) long: the token that a tool has put there, or -1.
    """

    def __init__(self, decoder, max_batch, kv_gib):
        self.decoder = decoder
        self.max_batch = max_batch
        self.kv_gib = kv_gib
        self.memory_share = 0.8                               # of the free memory, without kv_gib
        self.k_cache = self.v_cache = self.given = None
        self.capacity = None                                  # C
        self.most_slots = None                                # that memory has room for
        self.announced = set()                                # sizes that were printed

    def reserve(self, rows, capacity, has_tools=False):
        """Makes room for `rows` rows, or for as many as memory allows. Keeps what is there if it
        is enough. has_tools: with room for tokens that tools give."""
        if self.k_cache is not None and self.capacity == capacity:
            S = len(self.slots)
            has_room = S >= rows or S == self.most_slots
            if has_room and has_tools == (self.given is not None):
                return
        self.release()
        S = self.plan(rows, capacity)
        self.capacity = capacity
        decoder = self.decoder
        device = decoder.device
        shape = (decoder.num_layers, S, decoder.num_kv_heads, capacity, decoder.head_dim)
        self.k_cache = torch.zeros(shape, dtype=decoder.embed.dtype, device=device)
        self.v_cache = torch.zeros_like(self.k_cache)
        self.tokens = torch.zeros(S, capacity, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(S, capacity, device=device)
        # At least 1: an empty slot may take part in a step, and reads the place lengths - 1.
        self.lengths = torch.ones(S, dtype=torch.long, device=device)
        self.max_lengths = torch.ones(S, dtype=torch.long, device=device)
        self.keys = torch.zeros(S, dtype=torch.long, device=device)
        self.done = torch.ones(S, dtype=torch.bool, device=device)
        self.slots = torch.arange(S, device=device)
        if has_tools:
            self.given = torch.full((S, capacity), -1, device=device)

    def plan(self, rows, capacity):
        """The number of slots, from the free memory. Prints the plan once for each size."""
        decoder = self.decoder
        per_slot = 2 * decoder.num_layers * decoder.num_kv_heads * capacity * decoder.head_dim
        per_slot *= decoder.embed.element_size()                              # bytes
        free = self.free_memory()
        budget = self.memory_share * free
        if self.kv_gib:
            budget = self.kv_gib * 2**30
        if per_slot > budget:
            message = (
                f"one row of {capacity} tokens needs {per_slot / 2**30:.3f} GiB for its keys and "
                f"values, and the KV cache has {budget / 2**30:.3f} GiB; shorten the prompts or "
                "answers")
            if self.kv_gib:
                message += ", or raise kv_gib"
            raise UserError(message)
        self.most_slots = int(budget // per_slot)
        if self.max_batch:
            self.most_slots = min(self.most_slots, self.max_batch)
        S = min(rows, self.most_slots)
        if (S, capacity) not in self.announced:
            self.announced.add((S, capacity))
            text = (
                f"engine: KV cache of {S} rows x {capacity} tokens, "
                f"{S * per_slot / 2**30:.3f} GiB of {free / 2**30:.1f} GiB free")
            if S < rows:
                text += f"; {rows} rows take turns in it"
            print0(text)
        return S

    def free_memory(self):
        """Bytes that could be allocated now."""
        decoder = self.decoder
        if decoder.device.type == "cuda":
            device = decoder.device
            free, _ = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        else:
            free = psutil.virtual_memory().available
        if decoder.tp > 1:
            # The ranks of a group take the same steps: they plan with the least memory of all.
            least = torch.tensor(free, dtype=torch.float64, device=decoder.device)
            dist.all_reduce(least, dist.ReduceOp.MIN, group=decoder.group)
            free = least.item()
        return free

    def copy(self, source, target, lengths):
        """Copies keys and values from some slots to others; lengths: how many of each, in tokens.

        Row by row: an index with all slots would first make a copy that may not fit, and on a CPU
        it was 3 to 8 times as slow.
        """
        for old, new, length in zip(source, target, lengths):
            self.k_cache[:, new, :, :length] = self.k_cache[:, old, :, :length]
            self.v_cache[:, new, :, :length] = self.v_cache[:, old, :, :length]

    def move(self, source, target):
        """Moves rows from some slots to others; the source slots are empty after it."""
        self.copy(source, target, self.lengths[source].tolist())
        source = torch.tensor(source, device=self.slots.device)
        target = torch.tensor(target, device=self.slots.device)
        for x in self.state():
            x[target] = x[source]
        self.done[source] = True

    def state(self):
        state = [
            self.tokens, self.logprobs, self.lengths, self.max_lengths, self.keys, self.done]
        if self.given is not None:
            state.append(self.given)
        return state

    def tensors(self):
        return [self.k_cache, self.v_cache, self.slots, *self.state()]

    def release(self):
        self.k_cache = self.v_cache = self.tokens = self.logprobs = None
        self.lengths = self.max_lengths = self.keys = self.done = self.slots = None
        self.given = None


# -----------------------------------------------------------------------------
# CUDA graphs


def graph_sizes(slots):
    """The batch sizes that have a CUDA graph. A step is rounded up to one of them."""
    sizes = [1, 2, 4, 8, 16, 32, 64, *range(128, slots, 64)]
    return [size for size in sizes if size < slots] + [slots]


def addresses(tensors):
    return [(x.data_ptr(), x.shape) for x in tensors]


class CUDAGraphs:
    """Decode steps as CUDA graphs, one for each batch size and way of sampling.

    A graph repeats its kernels at the addresses of their tensors when it was captured. So it stays
    valid over rollouts and optimizer steps, as long as no tensor moves. release() drops all graphs,
    because training gets their memory and that of the KV cache, which then is elsewhere.
    """

    def __init__(self):
        self.graphs = {}
        self.compiled = set()                                 # keys whose kernels exist
        self.weights = None                                   # addresses
        self.cache = None
        self.stream = None
        self.pool = None

    def check(self, weights, cache):
        """Drops the graphs if one of the tensors that they use has moved."""
        weights = addresses(weights)
        cache = addresses(cache)
        if weights != self.weights:
            self.compiled = set()  # Triton compiles again for pointers of another alignment
        if weights != self.weights or cache != self.cache:
            self.drop()
        self.weights = weights
        self.cache = cache

    def drop(self):
        self.graphs = {}
        # NOTE: a pool without graphs takes no new ones while cuBLAS has its workspace in it (torch
        # 2.11), so the next graphs get a new pool.
        self.pool = None

    def run(self, key, step):
        """Runs step(), a function that only launches kernels. The first step of a kind runs as it
        is, because its kernels are compiled, which cannot happen during a capture."""
        if key not in self.compiled:
            self.compiled.add(key)
            step()
            return
        if key not in self.graphs:
            self.graphs[key] = self.capture(step)
        self.graphs[key].replay()

    def capture(self, step):
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        if self.stream is None:
            # NOTE: one stream per engine. Since torch 2.12 a graph that is freed clears the cuBLAS
            # workspace of its stream, which graphs of another engine could still be using.
            self.stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        where = dict(pool=self.pool, stream=self.stream)
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **where):
            step()
        return graph


# -----------------------------------------------------------------------------
# the engine


def check_request(prompts, max_new_tokens, temperature, top_k, top_p):
    """Raises UserError for what no model could do. prompts: a list of arrays."""
    if not prompts:
        raise UserError("there is no prompt")
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise UserError(f"prompt {lengths.index(0)} is empty: give at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        message = (
            f"temperature {temperature} and top_k {top_k} must not be negative, "
            f"and top_p {top_p} must be in (0, 1]")
        raise UserError(message)


def check_lengths(lengths, max_new_tokens, limit, what):
    """Raises UserError if a prompt and its answer could be longer than a limit of something."""
    longest = max(lengths)
    if limit and longest + max_new_tokens > limit:
        message = (
            f"prompt {lengths.index(longest)} has {longest} tokens; with {max_new_tokens} new ones "
            f"that is more than {what} of {limit}")
        raise UserError(message)


def require_finite(logprobs):
    """Raises UserError where a model has no distribution to sample from any more."""
    if not logprobs.isfinite().all():
        message = (
            "the model's log-probabilities are NaN or infinite: training has diverged, or its "
            "weights are broken; take a lower learning rate")
        raise UserError(message)


def group_by_prompt(rows, prompts, lengths):
    """Lists of rows with the same prompt, short prompts first: attention is fastest where
    sequences of one length are next to each other."""
    groups = {}
    for row in rows:
        prompt = prompts[row, : lengths[row]].tobytes()
        groups.setdefault(prompt, []).append(row)
    return sorted(groups.values(), key=lambda group: lengths[group[0]])


class Requests:
    """The prompts of one call, and their results as they come. Row i belongs to prompt i."""

    def __init__(self, prompts, keys, max_new_tokens, capacity, device):
        """prompts: a list of arrays; keys (N,) an array."""
        N = len(prompts)
        self.prompt_lens = np.array([len(prompt) for prompt in prompts])      # (N,)
        self.prompts = np.zeros((N, self.prompt_lens.max()), dtype=np.int64)  # (N, P)
        for row, prompt in zip(self.prompts, prompts):
            row[: len(prompt)] = prompt
        self.keys = keys
        self.max_new_tokens = np.full(N, max_new_tokens)                      # (N,)
        self.out_tokens = torch.zeros(N, capacity, dtype=torch.long, device=device)
        self.out_logprobs = torch.zeros(N, capacity, device=device)           # of each token
        self.out_given = None                                                 # (N, C) bool
        self.out_lengths = torch.zeros(N, dtype=torch.long, device=device)

    def rollout(self, rows):
        """The results of some rows (a slice)."""
        lengths = self.out_lengths[rows]                                      # (n,)
        device = lengths.device
        prompt_lens = torch.from_numpy(self.prompt_lens[rows]).to(device)     # (n,)
        answer_lens = lengths - prompt_lens                                   # (n,)

        # Past the end of a row there may be tokens of rows that had its slot before.
        T = int(lengths.max())
        mask = torch.arange(T, device=device) < lengths[:, None]
        tokens = torch.where(mask, self.out_tokens[rows, :T], 0)              # (n, T)

        A = int(answer_lens.max())
        index = torch.arange(A, device=device)
        mask = index < answer_lens[:, None]
        index = torch.where(mask, prompt_lens[:, None] + index, 0)
        logprobs = self.out_logprobs[rows].gather(1, index)
        sampled = mask                                                        # (n, A)
        if self.out_given is not None:
            sampled = mask & ~self.out_given[rows].gather(1, index)
        logprobs = torch.where(sampled, logprobs, 0)                          # (n, A)
        return Rollout(tokens, prompt_lens, answer_lens, logprobs, sampled)


class HybridEngine:
    """Generation from the weights that are being trained.

    model: a Hugging Face causal LM, or the DeepSpeed engine around one. tp: how many neighbouring
    ranks share the model. max_batch: most rows that are decoded at once; max_len: most tokens of a
    row; kv_gib: size of the KV cache in GiB. None: planned from the call and from free memory.
    Raises UserError (a ValueError) for a model that it cannot run.
    """

    def __init__(self, model, tp=1, max_batch=None, max_len=None, kv_gib=None):
        self.decoder = Decoder(model, tp)
        self.cache = KVCache(self.decoder, max_batch, kv_gib)
        self.graphs = CUDAGraphs()
        self.use_graphs = None                                # None: on a GPU, without tp
        self.max_batch = max_batch
        self.max_len = max_len
        self.stats = {}
        self.eos_tensors = {}                                 # graphs hold their addresses
        self.respond = None                                   # see generate
        self.mine = None                                      # the requests of this rank, a slice

    # ---- what callers use ----

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
                 eos_token_id=None, seed=None, respond=None):
        """Samples an answer to every prompt.

        prompts: lists of token ids, ragged, any number. temperature 0 is greedy. eos_token_id: an
        id, a list of ids, or None (every answer has max_new_tokens). seed: an int, or one int per
        row; the same seed gives the same tokens, however rows are batched.

        respond: a tool or an environment, that is asked whenever an answer comes to an EOS. It is
        called with the number of the prompt and the token ids of the answer so far, and returns
        the ids to go on with, or None at the end. They become a part of the answer, count among
        its max_new_tokens, and are not `sampled`.

        Returns a Rollout in the order of the prompts, on the device of the model. Raises UserError
        before anything runs.
        """
        self.respond = respond
        self.mine = slice(0, len(prompts))
        if self.decoder.tp > 1:
            prompts, seed, self.mine = self.gather_prompts(prompts, seed)
        self.start(prompts, max_new_tokens, temperature, top_k, top_p, eos_token_id, seed)
        while self.waiting or self.running:
            self.step()
        rollout = self.requests.rollout(self.mine)
        require_finite(rollout.logprobs)
        self.finish_stats(rollout)
        return rollout

    @torch.no_grad()
    def stream(self, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
               eos_token_id=None, seed=None):
        """Yields the token ids of one answer as they are sampled, its EOS included."""
        self.respond = None
        self.mine = slice(0, 1)
        self.start([prompt], max_new_tokens, temperature, top_k, top_p, eos_token_id, seed)
        yielded = len(prompt)
        while self.waiting or self.running:
            self.step()
            length = int(self.cache.lengths[0])
            require_finite(self.cache.logprobs[0, yielded:length])
            yield from self.cache.tokens[0, yielded:length].tolist()
            yielded = length

    def release(self):
        """Gives back the memory of the KV cache, and of ZeRO-3 and tensor-parallel copies."""
        self.graphs.drop()
        self.cache.release()
        self.decoder.release()
        self.requests = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- the scheduler ----

    def step(self):
        """Prompts enter, all running rows get new tokens, finished rows leave. This is all that
        the host does between steps, and it waits for the device only in ended_slots()."""
        ended = []
        while self.can_admit():
            self.admit()
            ended = self.ended_slots()  # a row may end with its first token
        if not ended:
            self.close_gaps()
            self.decode()
            ended = self.ended_slots()
        if self.respond:
            ended = [slot for slot in ended if not self.ask_tool(slot)]
        self.retire(ended)

    def can_admit(self):
        """A prefill of few rows costs as much as one of many: wait until an eighth is free."""
        S = len(self.cache.slots)
        free = S - len(self.running)
        return len(self.waiting) > 0 and free >= min(len(self.waiting), max(1, S // 8))

    def admit(self):
        """Waiting prompts take free slots: prefill, and the first token of each answer."""
        start = time.perf_counter()
        requests = self.requests
        cache = self.cache
        rows = self.next_rows()
        slots = self.free_slots()[: len(rows)]
        self.running.update(zip(slots, rows))
        slot_of = dict(zip(rows, slots))
        groups = group_by_prompt(rows, requests.prompts, requests.prompt_lens)
        rows = np.concatenate(groups)                                         # (n,)
        slots = np.array([slot_of[row] for row in rows])                      # (n,)

        # The first row of a group is computed, the others copy its keys and values.
        sizes = [len(group) for group in groups]
        first = np.cumsum(sizes) - sizes                                      # (groups,)
        group_of_row = np.repeat(np.arange(len(groups)), sizes)               # (n,)
        logits = self.prefill(rows[first], slots[first])                      # (groups, V)
        source = slots[first][group_of_row]                                   # (n,)
        lengths = requests.prompt_lens[rows]                                  # (n,)
        others = source != slots
        cache.copy(source[others].tolist(), slots[others].tolist(), lengths[others].tolist())

        slots = self.tensor(slots)
        lengths = self.tensor(lengths)
        cache.tokens[slots, : requests.prompts.shape[1]] = self.tensor(requests.prompts[rows])
        cache.lengths[slots] = lengths
        cache.max_lengths[slots] = lengths + self.tensor(requests.max_new_tokens[rows])
        cache.keys[slots] = self.tensor(requests.keys[rows])
        cache.done[slots] = False
        if self.respond:
            cache.given[slots] = -1
        self.append(logits[self.tensor(group_of_row)], slots)
        self.count("prefill", start, int(requests.prompt_lens[rows[first]].sum()))

    def next_rows(self):
        """The waiting rows that enter now: as many as there are slots, and tokens for a prefill."""
        free = len(self.cache.slots) - len(self.running)
        rows = []
        tokens = 0
        while self.waiting and len(rows) < free:
            tokens += self.requests.prompt_lens[self.waiting[0]]
            if rows and tokens > PREFILL_TOKENS[self.decoder.device.type]:
                break
            rows.append(self.waiting.popleft())
        return rows

    def free_slots(self):
        return [slot for slot in range(len(self.cache.slots)) if slot not in self.running]

    def ended_slots(self):
        """Running slots whose row has ended. Reading the flags waits for the device."""
        done = self.cache.done.tolist()
        return [slot for slot in self.running if done[slot]]

    def close_gaps(self):
        """A step computes all slots up to the last one that is taken. Moves rows down, where that
        makes it smaller."""
        n = len(self.running)
        if self.step_size(n) == self.step_size(max(self.running) + 1):
            return
        target = [slot for slot in range(n) if slot not in self.running]
        source = sorted(slot for slot in self.running if slot >= n)
        for old, new in zip(source, target):
            self.running[new] = self.running.pop(old)
        self.cache.move(source, target)

    def step_size(self, n):
        """How many slots a step computes that needs the first n."""
        if not self.use_graphs:
            return n
        sizes = graph_sizes(len(self.cache.slots))
        return next(size for size in sizes if size >= n)

    def decode(self):
        """New tokens for all running rows, one per step."""
        start = time.perf_counter()
        steps = STEPS_PER_SYNC[self.decoder.device.type]
        n = self.step_size(max(self.running) + 1)
        for _ in range(steps):
            if self.use_graphs:
                has_tools = self.respond is not None
                key = (n, self.cache.capacity, self.sampling, self.eos_ids, has_tools)
                self.graphs.run(key, partial(self.decode_step, n))
            else:
                self.decode_step(n)
        self.stats["decode_steps"] += steps
        self.count("decode", start, 0)

    def ask_tool(self, slot):
        """Asks `respond` how a row that came to its EOS goes on. Returns whether it does."""
        cache = self.cache
        row = self.running[slot]
        length = int(cache.lengths[slot])
        room = int(cache.max_lengths[slot]) - length
        answer = cache.tokens[slot, self.requests.prompt_lens[row] : length].tolist()
        if room < 1 or answer[-1] not in self.eos_ids:
            return False
        reply = self.call_respond(row, answer)
        if not reply:
            return False
        reply = torch.tensor(reply[:room], device=cache.slots.device)
        cache.given[slot, length : length + len(reply)] = reply
        cache.done[slot] = False
        return True

    def call_respond(self, row, answer):
        """What `respond` returns. Of the ranks that share a model, the one asks whose prompt it is,
        and tells the others."""
        mine = range(len(self.requests.keys))[self.mine]
        reply = None
        if row in mine:
            reply = self.respond(row - mine.start, answer)
        if self.decoder.tp == 1:
            return reply
        replies = [None] * self.decoder.tp
        dist.all_gather_object(replies, reply, group=self.decoder.group)
        return next(filter(None, replies), None)

    def retire(self, ended):
        """Rows that have ended leave their slots, and are copied to the results."""
        if not ended:
            return
        requests = self.requests
        cache = self.cache
        rows = self.tensor([self.running.pop(slot) for slot in ended])
        slots = self.tensor(ended)
        requests.out_tokens[rows] = cache.tokens[slots]
        requests.out_logprobs[rows] = cache.logprobs[slots]
        requests.out_lengths[rows] = cache.lengths[slots]
        if cache.given is not None:
            requests.out_given[rows] = cache.given[slots] >= 0

    def tensor(self, values):
        return torch.as_tensor(values, device=self.decoder.device)

    def count(self, phase, start, tokens):
        """Adds to stats the time since start, once the device is ready, and the tokens."""
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize()
        self.stats[f"{phase}_s"] += time.perf_counter() - start
        self.stats[f"{phase}_tokens"] += tokens

    # ---- what runs on the device ----

    def prefill(self, rows, slots):
        """Computes the prompts of these rows into these slots, (n,) arrays. Returns the logits
        after each prompt, (n, V)."""
        requests = self.requests
        lengths = requests.prompt_lens[rows]
        pos = np.arange(lengths.max())                                        # (P,)
        mask = pos < lengths[:, None]                                         # (n, P)
        tokens = self.tensor(requests.prompts[rows, : len(pos)][mask])        # (N,) packed
        positions = self.tensor(np.broadcast_to(pos, mask.shape)[mask])       # (N,)
        slots = self.tensor(np.repeat(slots, lengths))                        # (N,)
        cu_seqlens = self.tensor(np.append(0, lengths.cumsum()).astype(np.int32))

        def attend(layer, q, k, v):
            q, k = self.rope_and_cache(layer, q, k, v, slots, positions)
            return kernels.prefill_attention(q, k, v, cu_seqlens, layer.spec)

        hidden = self.decoder.forward(tokens, positions, attend)              # (N, E)
        last = cu_seqlens[1:].long() - 1
        return self.decoder.logits(hidden[last])

    def decode_step(self, n):
        """One token for each of the first n slots. It only launches kernels, so that a CUDA graph
        can hold it. Rows that have ended and empty slots are computed too, and change nothing."""
        slots = self.cache.slots[:n]
        self.append(self.next_logits(slots), slots)
        if self.respond:
            self.put_given(slots)

    def next_logits(self, slots):
        """Computes the newest token of the first n slots. Returns the logits after it, (n, V)."""
        cache = self.cache
        n = len(slots)
        lengths = cache.lengths[:n]
        positions = lengths - 1                                               # of the newest token
        tokens = cache.tokens[:n].gather(1, positions[:, None])[:, 0]         # (n,)
        # Rows that have ended read no keys and values: they would cost bandwidth.
        key_lengths = lengths.masked_fill(cache.done[:n], 0)                  # (n,)

        def attend(layer, q, k, v):
            q, k = self.rope_and_cache(layer, q, k, v, slots, positions)
            k_cache = cache.k_cache[layer.index]
            v_cache = cache.v_cache[layer.index]
            return kernels.decode_attention(q, k_cache, v_cache, key_lengths, layer.spec)

        hidden = self.decoder.forward(tokens, positions, attend)              # (n, E)
        return self.decoder.logits(hidden)

    def put_given(self, slots):
        """Where a tool has given the newest token, it takes the place of the sampled one."""
        cache = self.cache
        last = cache.lengths[slots] - 1                                       # (n,)
        given = cache.given[slots, last]
        is_given = given >= 0
        cache.tokens[slots, last] = torch.where(is_given, given, cache.tokens[slots, last])
        is_full = cache.lengths[slots] >= cache.max_lengths[slots]
        cache.done[slots] = torch.where(is_given, is_full, cache.done[slots])

    def rope_and_cache(self, layer, q, k, v, slots, positions):
        k_cache = self.cache.k_cache[layer.index]
        v_cache = self.cache.v_cache[layer.index]
        cos = sin = None
        if layer.rotary:
            cos, sin = self.decoder.cos, self.decoder.sin
        return kernels.rope_and_cache(q, k, v, k_cache, v_cache, slots, positions, cos, sin)

    def append(self, logits, slots):
        """Samples a token for each slot. If its row has not ended, writes the token, its
        log-probability, and whether it ends the row. logits (n, V), slots (n,)"""
        cache = self.cache
        rows = kernels.Rows(
            tokens=cache.tokens,
            logprobs=cache.logprobs,
            lengths=cache.lengths,
            max_lengths=cache.max_lengths,
            keys=cache.keys,
            done=cache.done,
        )
        kernels.sample_next(logits, slots, rows, self.eos, *self.sampling)

    # ---- before and after ----

    def start(self, prompts, max_new_tokens, temperature, top_k, top_p, eos_token_id, seed):
        """Checks everything before anything runs. Then prepares weights, KV cache and queue."""
        prompts = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        check_request(prompts, max_new_tokens, temperature, top_k, top_p)
        self.check_prompts(prompts, max_new_tokens)
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        keys = row_keys(seed, len(prompts)).numpy()
        N = len(prompts)
        capacity = self.max_len
        if not capacity:
            longest = max(map(len, prompts)) + max_new_tokens
            capacity = 32 * math.ceil(longest / 32)  # so that similar calls have the same
        self.prepare(N, capacity, eos_token_id)
        device = self.decoder.device
        self.requests = Requests(prompts, keys, max_new_tokens, capacity, device)
        if self.respond:
            self.requests.out_given = torch.zeros(N, capacity, dtype=torch.bool, device=device)
        self.waiting = deque(range(N))                                        # rows
        self.sampling = (temperature, top_k, top_p)

    def prepare(self, rows, capacity, eos_token_id):
        """Loads the weights, and makes room for so many rows of at most `capacity` tokens."""
        self.stats = {
            "gather_s": 0.0, "prefill_s": 0.0, "decode_s": 0.0,
            "prefill_tokens": 0, "decode_tokens": 0, "decode_steps": 0,
        }

        start = time.perf_counter()
        self.decoder.load()
        device = self.decoder.device
        if self.decoder.copies:
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.stats["gather_s"] = time.perf_counter() - start

        has_tools = self.respond is not None
        self.cache.reserve(min(rows, self.max_batch or rows), capacity, has_tools)
        self.cache.done.fill_(True)
        if has_tools:
            self.cache.given.fill_(-1)
        self.decoder.build_rotary(capacity)
        self.running = {}                                                     # slot: row

        self.eos_ids = as_tuple(eos_token_id)
        if self.eos_ids not in self.eos_tensors:
            eos = torch.tensor(self.eos_ids, dtype=torch.long, device=device)
            self.eos_tensors[self.eos_ids] = eos
        self.eos = self.eos_tensors[self.eos_ids]

        if self.use_graphs is None:
            # No tensor parallelism: collectives inside a graph have not been tried.
            self.use_graphs = device.type == "cuda" and self.decoder.tp == 1
        self.graphs.check(self.decoder.tensors(), self.cache.tensors())

    def check_prompts(self, prompts, max_new_tokens):
        """Raises UserError for prompts that this model or this engine cannot take."""
        config = self.decoder.config
        lengths = [len(prompt) for prompt in prompts]
        context = None
        if self.decoder.family.positions != "alibi":
            context = getattr(config, "max_position_embeddings", None)
        check_lengths(lengths, max_new_tokens, context, "the model's context")
        check_lengths(lengths, max_new_tokens, self.max_len, "max_len")
        tokens = np.concatenate(prompts)
        if tokens.min() < 0 or tokens.max() >= config.vocab_size:
            message = (
                f"a prompt holds a token id outside the vocabulary of {config.vocab_size}: is it "
                "from another model's tokenizer?")
            raise UserError(message)

    def gather_prompts(self, prompts, seed):
        """The ranks of a tensor-parallel group answer all their prompts together. Returns these,
        a seed for each, and which of them are this rank's (a slice)."""
        n = len(prompts)
        if seed is None:
            seeds = [int(torch.randint(2**62, ())) for _ in range(n)]
        elif isinstance(seed, int):
            seeds = row_keys(seed, n).tolist()
        else:
            seeds = list(seed)
        prompts = [list(map(int, prompt)) for prompt in prompts]
        of_rank = [None] * self.decoder.tp
        dist.all_gather_object(of_rank, (prompts, seeds), group=self.decoder.group)
        first = sum(len(p) for p, _ in of_rank[: self.decoder.tp_rank])
        all_prompts = [prompt for p, _ in of_rank for prompt in p]
        all_seeds = [seed for _, s in of_rank for seed in s]
        return all_prompts, all_seeds, slice(first, first + n)

    def finish_stats(self, rollout):
        """Adds the sampled tokens, and how fast decode has read memory."""
        stats = self.stats
        decoder = self.decoder
        k_cache = self.cache.k_cache
        prompt_lens = rollout.prompt_lens
        answer_lens = rollout.answer_lens
        stats["decode_tokens"] += int(answer_lens.sum())
        # Decode has to read all weights in every step, and the keys and values of every row at
        # each of its lengths.
        bytes_per_token = 2 * k_cache.element_size()
        bytes_per_token *= decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
        tokens_read = int(((prompt_lens + answer_lens / 2) * answer_lens).sum())
        bytes_read = stats["decode_steps"] * decoder.weight_bytes + bytes_per_token * tokens_read
        stats["kv_bytes"] = 2 * k_cache.numel() * k_cache.element_size()
        stats["gb_per_s"] = bytes_read / max(stats["decode_s"], 1e-9) / 1e9
        if decoder.device.type == "cuda":
            for name, bandwidth in MEMORY_BANDWIDTH.items():
                if name in torch.cuda.get_device_name():  # 1: as fast as memory can be read
                    stats["floor_share"] = stats["gb_per_s"] * 1e9 / bandwidth


# -----------------------------------------------------------------------------
# a server's engine


class OnlineEngine(HybridEngine):
    """Generation for a server: prompts come while others are being answered, each with its own
    sampling. A row gets the tokens that generate() gives to its prompt and key. One thread must own
    it.

    max_batch: most rows that are decoded at once; max_waiting: most that wait for a slot;
    memory_share: of the memory that a KV cache may take, where several engines are in one process.
    """

    @torch.no_grad()
    def __init__(self, model, max_batch, max_len, eos_token_id, max_waiting, memory_share=1.0):
        super().__init__(model, max_batch=max_batch, max_len=max_len)
        self.cache.memory_share *= memory_share
        self.prepare(max_batch, max_len, eos_token_id)
        device = self.decoder.device
        S = len(self.cache.slots)
        N = max_batch + max_waiting
        # Room for rows to come. Their results do not stay here, so the capacity of these is 0.
        prompts = np.zeros((N, max_len), dtype=np.int64)
        self.requests = Requests(prompts, np.zeros(N, dtype=np.int64), 0, 0, device)
        self.samplings = [None] * N           # of each row: temperature, top_k, top_p
        self.read_until = [0] * N             # tokens of each row that step() has returned
        self.free_rows = list(range(N))
        self.waiting = deque()                # rows
        self.logits = torch.zeros(S, len(self.decoder.head), device=device)

    def add(self, prompt, key, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0):
        """Queues a prompt. key: one of row_keys. Returns its row, a number that is this prompt's
        until step() says that it has ended, or remove() is called."""
        row = self.free_rows.pop()
        requests = self.requests
        requests.prompts[row, : len(prompt)] = prompt
        requests.prompt_lens[row] = len(prompt)
        requests.keys[row] = key
        requests.max_new_tokens[row] = max_new_tokens
        self.samplings[row] = (temperature, top_k, top_p)
        self.read_until[row] = len(prompt)
        self.waiting.append(row)
        return row

    def remove(self, row):
        """Ends a row that nobody waits for any more."""
        if row in self.waiting:
            self.waiting.remove(row)
        else:
            slot = next(slot for slot in self.running if self.running[slot] == row)
            self.leave(slot)

    def leave(self, slot):
        """Its row is gone, and the slot is free."""
        self.cache.done[slot] = True
        self.free_rows.append(self.running.pop(slot))

    @torch.no_grad()
    def step(self):
        """Prompts enter, all running rows get new tokens, finished rows leave. Returns of each row
        (row, new tokens, their log-probabilities, whether it has ended)."""
        if self.can_admit():
            self.admit()
        if not self.running:
            return []
        self.close_gaps()
        self.decode()
        news = self.read()
        for slot in self.ended_slots():
            self.leave(slot)
        return news

    def can_admit(self):
        """At once: who waits until an eighth of the slots is free may wait for the longest rows."""
        return len(self.waiting) > 0 and len(self.running) < len(self.cache.slots)

    def decode(self):
        """One token for all running rows. A CUDA graph computes the logits and does not sample:
        how that is done is another mixture in every step."""
        n = self.step_size(max(self.running) + 1)
        slots = self.cache.slots[:n]
        if self.use_graphs:
            self.graphs.run(n, partial(self.write_logits, slots))
        else:
            self.write_logits(slots)
        self.append(self.logits[:n], slots)

    def write_logits(self, slots):
        self.logits[: len(slots)] = self.next_logits(slots)

    def append(self, logits, slots):
        """As above, once for all rows that are sampled in the same way."""
        groups = {}
        for i, slot in enumerate(slots.tolist()):
            if slot in self.running:
                sampling = self.samplings[self.running[slot]]
                groups.setdefault(sampling, []).append(i)
        for self.sampling, group in groups.items():
            index = self.tensor(group)
            super().append(logits[index], slots[index])

    def read(self):
        """What step returns."""
        cache = self.cache
        slots = list(self.running)
        rows = list(self.running.values())
        index = self.tensor(slots)                                            # (n,)
        lengths = cache.lengths[index].tolist()
        done = cache.done[index].tolist()
        first = [self.read_until[row] for row in rows]
        most = max(length - start for start, length in zip(first, lengths))
        pos = self.tensor(first)[:, None] + self.tensor(range(most))          # (n, most)
        pos = pos.clamp(max=cache.capacity - 1)
        tokens = cache.tokens[index[:, None], pos].tolist()
        logprobs = cache.logprobs[index[:, None], pos].tolist()
        news = []
        for i, row in enumerate(rows):
            new = lengths[i] - first[i]
            news.append((row, tokens[i][:new], logprobs[i][:new], done[i]))
            self.read_until[row] = lengths[i]
        return news


# -----------------------------------------------------------------------------
# the slow path


class TemperedLogprobs:
    """A logits processor for transformers that tempers and filters, and writes down the
    log-probability of every sampled token. It keeps the distribution of one step, not of all."""

    def __init__(self, temperature, top_k, top_p):
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.prev_logprobs = None                                             # (N, V)
        self.of_tokens = []                                                   # (N, 1) per step

    def __call__(self, tokens, logits):
        """tokens (N, T) until now, logits (N, V) of the next one."""
        if self.prev_logprobs is not None:
            self.add(tokens)
        require_finite(logits.logsumexp(-1))
        logits = logits.float() / (self.temperature or 1)
        logits = kernels.top_k_top_p_filter(logits, self.top_k, self.top_p)
        self.prev_logprobs = logits.log_softmax(-1)
        return self.prev_logprobs

    def add(self, tokens):
        self.of_tokens.append(self.prev_logprobs.gather(1, tokens[:, -1:]))


class HFEngine:
    """`transformers.generate` behind the same interface, for models that FAMILIES does not have.

    Prompts are left-padded and all rows run until the last one ends. Under ZeRO-3 every layer is
    gathered for every token. Randomness belongs to the call and not to the row.
    """

    def __init__(self, model):
        self.module = unwrap(model)
        self.stats = {}

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
                 eos_token_id=None, seed=None, respond=None):
        """See HybridEngine.generate."""
        from transformers import GenerationConfig, LogitsProcessorList

        if respond:
            raise UserError("a tool between turns needs --engine hybrid")
        start = time.perf_counter()
        device = next(self.module.parameters()).device
        eos_ids = as_tuple(eos_token_id)
        prompt_lens = torch.tensor([len(prompt) for prompt in prompts], device=device)
        P = int(prompt_lens.max())
        tokens = torch.zeros(len(prompts), P, dtype=torch.long, device=device)
        for row, prompt in zip(tokens, prompts):
            row[P - len(prompt) :] = torch.tensor(prompt, device=device)
        mask = torch.arange(P, device=device) >= P - prompt_lens[:, None]     # (N, P)

        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=0,
            num_beams=1,
        )
        if temperature > 0:
            config.update(temperature=1.0, top_k=0, top_p=1.0)  # the processor does all of it
        processor = TemperedLogprobs(temperature, top_k, top_p)
        out = self.run(
            seed,
            inputs=tokens,
            attention_mask=mask.long(),
            generation_config=config,
            synced_gpus=any(hasattr(p, "ds_id") for p in self.module.parameters()),
            logits_processor=LogitsProcessorList([processor]),
        )
        processor.add(out)

        answers = out[:, P:]                                                  # (N, A)
        is_eos = torch.isin(answers, torch.tensor(eos_ids, dtype=torch.long, device=device))
        answer_lens = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, answers.size(1))
        rows = []
        for prompt, answer, n in zip(prompts, answers, answer_lens):
            rows.append(torch.cat([torch.tensor(prompt, device=device), answer[:n]]))
        A = int(answer_lens.max())
        mask = torch.arange(A, device=device) < answer_lens[:, None]
        # Past the end of an answer top-k or top-p may leave -inf for the padding: not x * mask.
        logprobs = torch.where(mask, torch.cat(processor.of_tokens, 1)[:, :A], 0)
        self.stats = {
            "generate_s": time.perf_counter() - start,
            "decode_tokens": int(answer_lens.sum()),
        }
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)        # (N, T)
        return Rollout(rows, prompt_lens, answer_lens, logprobs, mask)

    def run(self, seed, **call):
        """module.generate(**call) with random numbers of its own, and the model as it should be."""
        from transformers import GenerationConfig

        module = self.module
        training = module.training
        own_config = module.generation_config
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if isinstance(seed, int):
                torch.manual_seed(int(row_keys(seed, 1)))
            elif seed is not None:
                torch.manual_seed(int(kernels.hash32(row_keys(seed, len(seed)).sum())))
            # NOTE: while it trains with gradient checkpointing, a model makes no KV cache. And what
            # `call` leaves open, such as a repetition penalty, transformers takes from the model's
            # own config: then it would sample from another distribution than the trained one.
            try:
                module.eval()
                module.generation_config = GenerationConfig()
                return module.generate(**call)
            finally:
                module.train(training)
                module.generation_config = own_config

    def stream(self, prompt, *args, **kwargs):
        tokens = self.generate([prompt], *args, **kwargs).tokens[0]
        yield from tokens[len(prompt) :].tolist()

    def release(self):
        pass


def make_engine(name, model, tp=1):
    """--engine: 'hybrid', or 'hf' for the slow path."""
    if name == "hybrid":
        return HybridEngine(model, tp)
    if tp > 1:
        raise UserError("--tp needs --engine hybrid")
    return HFEngine(model)
