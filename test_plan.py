"""plan.py: what it says of parameters, activations, memory and time, against models that are really
made, against its own parts, and against peaks that were measured."""
from testing import HERE, KINDS, tiny_config  # before torch: it sets environment variables

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

import bench
import models
import plan
import ppo
import tables
import utils

utils.quiet_transformers()


RESULTS = HERE / "results"


def config(**changes):
    options = dict(model="opt-1.3b", critic="opt-350m", gpu="a100-80g", micro_batch=8)
    return plan.Config(**options | changes)


def memory(**changes):
    return plan.Memory(config(**changes))


def printed(capsys, **changes):
    plan.main(config(**changes))
    return capsys.readouterr().out


def on_meta(config, auto_class="AutoModelForCausalLM"):
    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(config)


def count(model):
    return sum(p.numel() for p in model.parameters())


# -----------------------------------------------------------------------------
# shapes and parameters


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_models_of_transformers(kind):
    made = tiny_config(kind, num_labels=1)
    shape = plan.shape_of_config(kind, made.to_dict())
    assert plan.lm_params(shape) == count(on_meta(made))
    reward_model = on_meta(made, "AutoModelForSequenceClassification")
    if hasattr(reward_model, "score"):
        assert plan.reward_model_params(shape) == count(reward_model)


@pytest.mark.parametrize("kind", ["llama", "opt-350m", "gpt2", "phi3"])
@pytest.mark.parametrize("lora", ["8", "4,targets=up_proj+fc1+c_attn+qkv_proj"])
def test_adapters_have_the_parameters_that_add_lora_adds(kind, lora):
    made = tiny_config(kind)
    shape = plan.shape_of_config(kind, made.to_dict())
    lm = on_meta(made)
    names = {name.rpartition(".")[2] for name, _ in lm.named_modules()}
    rank, _, targets = lora.partition(",targets=")
    if targets:
        lora = f"{rank},targets=" + "+".join(set(targets.split("+")) & names)
    before = count(lm)
    assert plan.lora_params(shape, lora) == count(models.add_lora(lm, lora)) - before


def kept_by(kind, layers, dtype):
    """Bytes that autograd keeps of a forward, without the weights."""
    made = tiny_config(kind, attn_implementation="sdpa")  # rows below its windows
    made.num_hidden_layers = layers
    for name in ("layer_types", "no_rope_layers"):
        if getattr(made, name, None):
            setattr(made, name, (getattr(made, name) * 2)[:layers])
    lm = transformers.AutoModelForCausalLM.from_config(made).to(dtype).eval()
    policy = models.Policy(lm)
    weights = {x.untyped_storage().data_ptr() for x in (*lm.parameters(), *lm.buffers())}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)  # it stays alive
        return x

    tokens = torch.randint(97, (2, 12))
    lens = torch.tensor([6, 6])
    with saved_tensors_hooks(pack, lambda x: x):
        policy(tokens, lens, lens)
    return sum(nbytes for where, (nbytes, _) in kept.items() if where not in weights), made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_keeps(kind, dtype):
    one, _ = kept_by(kind, 1, dtype)
    two, made = kept_by(kind, 2, dtype)
    shape = plan.shape_of_config(kind, made.to_dict())
    ours = plan.kept_bytes(shape, 2 * 12, 12, dtype.itemsize)
    assert ours == pytest.approx(two - one, rel=0.08), f"{kind}: {ours} and {two - one}"


def test_a_model_may_be_a_name_a_folder_or_a_shape(tmp_path):
    by_name = plan.find_shape("--model", "opt-1.3b")
    text = "layers=24,width=2048,heads=32,ffn=8192,vocab=50272"
    assert plan.find_shape("--model", text) == by_name
    made = tiny_config("qwen3")
    made.save_pretrained(tmp_path)
    assert plan.lm_params(plan.find_shape("--model", str(tmp_path))) == count(on_meta(made))


@pytest.mark.parametrize("name, published", [
    ("opt-175b", 175e9), ("opt-66b", 66e9), ("smollm2-135m", 135e6), ("smollm2-1.7b", 1.71e9),
    ("llama-2-7b", 6.74e9), ("llama-2-13b", 13.0e9), ("llama-2-70b", 69.0e9),
    ("llama-70b", 70.6e9), ("llama-3.2-3b", 3.21e9), ("qwen2.5-1.5b", 1.54e9),
    ("qwen2.5-7b", 7.62e9), ("qwen3-1.7b", 1.72e9), ("qwen3-4b", 4.02e9),
])
def test_shapes_are_as_large_as_their_names_say(name, published):
    assert plan.lm_params(plan.SHAPES[name]) == pytest.approx(published, rel=0.02)


# -----------------------------------------------------------------------------
# memory


def test_the_parts_add_up_to_the_peak_that_is_printed(capsys):
    text = printed(capsys, zero=3, gpus=8, lora="64")
    rows = {}
    for line in text.splitlines():
        name, numbers = line[:22].strip(), line[22:].split()
        if name in plan.PARTS or name == "together":
            rows[name] = [float(number) for number in numbers]
    together = rows.pop("together")
    sums = [sum(column) for column in zip(*rows.values())]
    assert sums == pytest.approx(together, abs=0.07), "0.005 for each part"
    assert f"fits: {max(together):.1f} of 77.5 GiB" in text


def test_what_is_there_all_the_time_is_what_adamw_in_bf16_needs():
    """2 bytes of weights, 4 of master weights, 8 of moments, 4 of gradients, 4 of EMA."""
    parts = memory().resident()
    n = plan.lm_params(plan.SHAPES["opt-1.3b"])
    assert parts["actor: weights"] == parts["reference"] == 2 * n
    assert parts["actor: optimizer"] == 12 * n
    assert parts["actor: gradients"] == parts["EMA"] == 4 * n
    c = plan.reward_model_params(plan.SHAPES["opt-350m"])
    assert parts["critic: weights"] == parts["reward model"] == 2 * c


@pytest.mark.parametrize("model", ["opt-6.7b", "llama-8b"])
def test_more_sharding_needs_less(model):
    peaks = [memory(model=model, gpus=8, zero=zero).peak_bytes for zero in (1, 2, 3)]
    assert peaks[2] < peaks[1] < peaks[0]
    fp32 = []
    for zero in (0, 1, 2, 3):
        fp32.append(memory(model=model, gpus=8, zero=zero, dtype="fp32").peak_bytes)
    assert fp32[3] < fp32[2] < fp32[1] < fp32[0]
    assert memory(model=model, gpus=64, zero=3).peak_bytes < peaks[2]


@pytest.mark.parametrize("change", [
    {"gradient_checkpointing": True}, {"lora": "64"}, {"offload": True}, {"ema": 0.0},
    {"micro_batch": 4}, {"critic": "opt-125m"}, {"reward": "rules.py:brevity"},
])
def test_each_of_these_needs_less(change):
    rows = dict(batch_size=32, minibatches=1, micro_batch=16)
    assert memory(**rows | change).totals["update"] < memory(**rows).totals["update"]


def test_lora_has_no_reference_and_hardly_an_optimizer():
    full, lora = memory().phases["update"], memory(lora="8").phases["update"]
    assert full["reference"] > 0 and lora["reference"] == 0
    assert lora["actor: optimizer"] < 0.02 * full["actor: optimizer"]
    assert lora["critic: optimizer"] == full["critic: optimizer"], "only the actor has adapters"


def test_offload_moves_memory_to_the_host():
    here, offloaded = memory(), memory(offload=True)
    assert here.host_bytes == 0
    n = here.actor.trained + here.critic.trained
    frozen = 2 * (here.ref_params + here.reward_params)
    assert offloaded.host_bytes == 16 * n + 4 * here.actor.trained + frozen
    assert offloaded.phases["update"]["reference"] == 0
    assert offloaded.phases["score"]["reference"] > 0, "it is on the device for that phase"


def test_the_kv_cache_is_that_of_the_engine():
    parts = memory(batch_size=64, minibatches=1, max_new_tokens=250).phases["rollout"]
    tokens = 64 * 512  # 506, in blocks of 32
    keys_and_values = plan.kv_bytes(plan.SHAPES["opt-1.3b"], tokens, torch.bfloat16)
    assert parts["KV cache"] == keys_and_values + 12 * tokens
    crowded = memory(model="opt-13b", lora="8", batch_size=4096)
    assert crowded.waves > 1
    assert crowded.totals["rollout"] < 80 * plan.GIB, "rows take turns"


def test_predicted_peaks_are_within_15_percent_of_measured_ones():
    record = tables.read_json(RESULTS / "plan-memory.json")
    assert len(record["rows"]) >= 6
    stages = {(row["ranks"], row["flags"].get("zero", 0)) for row in record["rows"]}
    assert {(1, 0), (2, 2), (2, 3)} <= stages
    for row in record["rows"]:
        case = bench.MemoryConfig(ragged=0, **row["flags"])
        predicted = plan.Memory(bench.planned_config(case, row["ranks"])).totals
        for phase, measured in row["measured_mib"].items():
            mib = predicted[phase] / 2**20
            where = f"{row['case']}, {phase}"
            assert mib == pytest.approx(measured, rel=0.15), where
            assert mib == pytest.approx(row["predicted_mib"][phase], rel=1e-6), where


# -----------------------------------------------------------------------------
# what to change


def test_a_plan_that_does_not_fit_names_flags_with_which_it_does(capsys):
    text = printed(capsys, model="opt-13b", micro_batch=16)
    assert "does not fit" in text
    solution = plan.make_it_fit(config(model="opt-13b", micro_batch=16))
    cfg, changed, changes = solution
    assert changed.fits
    assert plan.flag_text(changes) in text
    assert cfg == replace(config(model="opt-13b", micro_batch=16), **changes)
    assert "seconds" not in text, "what does not fit takes no time"


def test_what_never_fits_is_said(capsys):
    assert plan.make_it_fit(config(model="opt-175b")) is None
    assert "no flag makes it fit" in printed(capsys, model="opt-175b")


# -----------------------------------------------------------------------------
# time


def seconds(**changes):
    cfg = config(**dict(batch_size=1024, minibatches=1) | changes)
    return plan.seconds_of_iteration(cfg, plan.Memory(cfg))


def test_more_gpus_are_faster_but_not_for_nothing():
    times = [sum(seconds(model="opt-13b", lora="64", zero=3, gpus=n).values()) for n in (1, 8, 64)]
    assert times[2] < times[1] < times[0]
    assert 8 * times[1] > 0.9 * times[0]


def test_one_gpu_waits_for_nothing_and_offload_waits_for_the_host():
    alone = seconds()
    assert alone["gather"] == alone["traffic"] == alone["host"] == 0
    assert seconds(offload=True)["host"] > 0
    assert seconds(zero=3, gpus=8)["traffic"] > seconds(zero=2, gpus=8)["traffic"] > 0


def test_work_is_that_of_the_forwards():
    whole = seconds()
    recomputed = seconds(gradient_checkpointing=True)
    assert recomputed["update"] == pytest.approx(4 / 3 * whole["update"])
    assert seconds(mfu=0.25)["update"] == pytest.approx(2 * whole["update"])
    several = seconds(minibatches=4)
    assert several["score"] > whole["score"], "several updates need old log-probabilities"
    assert seconds(bandwidth=0.35)["rollout"] > 1.5 * whole["rollout"]


def test_cost_is_hours_times_gpus_times_price(capsys):
    cfg = config(gpus=8, zero=2)
    hours = sum(plan.hours_of_steps(cfg, plan.Memory(cfg)))
    text = printed(capsys, gpus=8, zero=2, price=2.0)
    assert f"together ${hours * 8 * 2:,.0f}" in text
    assert "assumed: 70% of the bandwidth in decode, assumed: 50% MFU elsewhere" in text


def bench_files(folder):
    """Files as bench.py would write them on an H100."""
    options = {"lora": "", "scorer": "model", "gradient_checkpointing": False}
    record = {"device": "NVIDIA-H100", "config": options, "ceilings": {"bytes_per_s": 3e12}}
    row = {
        "case": "fixed", "model": "opt-1.3b", "critic": "opt-350m", "batch": 128, "minibatches": 1,
        "prompt_len": 256, "mean_length": 256.0, "hybrid": {"score_s": 0.5, "update_s": 1.5},
        "floor_share": 0.6}
    paths = []
    for task in ("ppo", "generate"):
        paths.append(folder / f"{task}.json")
        paths[-1].write_text(json.dumps(record | {"task": task, "rows": [row]}))
    return [str(path) for path in paths]


def test_measured_shares_take_the_place_of_assumed_ones(tmp_path):
    files = bench_files(tmp_path)
    cfg, basis = plan.with_measured(config(gpu="h100", measured=",".join(files)))
    assert cfg.bandwidth == pytest.approx(0.6 * 3 / 3.35)
    actor = plan.flops(plan.SHAPES["opt-1.3b"], 128 * 512, 512, 128 * 256)
    critic = plan.flops(plan.SHAPES["opt-350m"], 128 * 512, 512, 0)
    assert cfg.mfu == pytest.approx((4 * actor + 5 * critic) / 2 / 989e12)
    assert basis.count("measured") == 2
    cfg, basis = plan.with_measured(config(gpu="h100", measured=files[1]))
    assert cfg.mfu == 0.5 and "assumed: 50% MFU" in basis


# -----------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize("changes, message", [
    ({"gpu": "h1000"}, "--gpu h1000: not known; there are h200, h100"),
    ({"gpu": "cpu", "offload": True}, "--offload moves memory to the CPU"),
    ({"gpu": "v100-32g", "dtype": "bf16"}, "v100-32g computes no bf16; add --dtype fp32"),
    ({"gpus": 8, "tp": 3}, "--tp 3 does not divide --gpus 8"),
    ({"batch_size": 100, "gpus": 8}, "--batch-size 100 cannot be divided by --minibatches 4"),
    ({"mfu": 1.5}, "--mfu 1.5: a share"),
    ({"gpus": 0}, "--gpus 0: must be at least 1"),
    ({"lora": "x"}, "--lora x: write a rank"),
])
def test_flags_that_make_no_sense_get_one_sentence(changes, message):
    with pytest.raises(utils.UserError, match=message):
        config(**changes)


@pytest.mark.parametrize("model, message", [
    ("opt-9b", "no model that is known here; there are .*opt-13b"),
    ("layers=24,width=2048", "heads and ffn and vocab must be there"),
    ("layers=24,depth=3", "'depth=3' is not one of layers"),
    ("layers=0,width=64,heads=2,ffn=9,vocab=9", "'0' is not a number above 0"),
    ("layers=2,width=65,heads=2,ffn=9,vocab=9", "width of 65 cannot be divided among 2 heads"),
    ("layers=2,width=64,heads=3,head=8,kv-heads=2,ffn=9,vocab=9", "3 heads cannot share 2"),
    ("layers=2,width=64,heads=2,ffn=9,vocab=9,family=t5", "family 't5' is not known"),
])
def test_a_model_that_is_none_gets_one_sentence(model, message):
    with pytest.raises(utils.UserError, match=message):
        memory(model=model)


def test_a_folder_that_is_no_model_gets_one_sentence(tmp_path):
    with pytest.raises(utils.UserError, match="has no config.json"):
        memory(model=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(utils.UserError, match="cannot be read"):
        memory(model=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(utils.UserError, match="family 't5' is not known; there are llama"):
        memory(model=str(tmp_path))


def test_measured_shares_of_something_else_get_one_sentence(tmp_path):
    files = bench_files(tmp_path)
    with pytest.raises(utils.UserError, match="say nothing of --gpu a100-80g"):
        plan.with_measured(config(measured=files[0]))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(utils.UserError, match="is not a file that bench.py has written"):
        plan.with_measured(config(measured=str(tmp_path / "x.json")))
    with pytest.raises(utils.UserError, match="no such file"):
        plan.with_measured(config(measured="none.json"))
    with pytest.raises(utils.UserError, match="--tp 64 does not divide the 32 heads"):
        memory(gpus=64, tp=64)


def test_flags_are_those_of_ppo():
    names = (
        "model", "critic", "reward", "lora", "max_new_tokens", "tp", "batch_size", "ppo_epochs",
        "minibatches", "micro_batch", "ema", "dtype", "zero", "gradient_checkpointing", "offload")
    fields = plan.Config.__dataclass_fields__
    for name in names:
        theirs = ppo.Config.__dataclass_fields__[name]
        assert fields[name].type == theirs.type, name
        if name not in ("model", "reward", "max_new_tokens"):
            assert fields[name].default == theirs.default, name


# -----------------------------------------------------------------------------
# DeepSpeed-Chat's tables


def test_tables_that_cannot_be_written_get_one_sentence(tmp_path):
    path = tmp_path / "none" / "plan.json"
    with pytest.raises(utils.UserError, match="plan.json cannot be written: .*; name another file"):
        plan.main(config(deepspeed_chat=True, out=str(path)))


def test_the_tables_are_what_the_plans_give():
    record = tables.read_json(RESULTS / "plan.json")
    assert "assumed" in record["basis"] and "measured" not in record["basis"], "no GPU was measured"
    rows = [*plan.step3_rows(), *plan.three_step_rows(), *plan.largest_rows()]
    assert json.loads(json.dumps(rows)) == record["rows"]
    step3 = [row for row in rows if row["table"] == "step 3"]
    assert {row["model"] for row in step3} >= {"opt-1.3b", "opt-175b"}
    assert {row["gpus"] for row in step3} == {1, 8, 64}
    assert {row["gpu"] for row in rows if row["table"] == "largest"} == set(plan.LARGEST)
