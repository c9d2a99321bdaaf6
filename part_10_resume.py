from prelude import *
from prelude import long, some

# -----------------------------------------------------------------------------
# 10. going on: checkpoints, kills, signals, the folder of a run
# -----------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: as after kill -9, no handler of an error runs."""


def short_run(out, total=6, at_step=lambda step: None, digest="rows", **flags):
    """A run of a small policy. at_step(step) is called before each step. Returns the step that it
    started after, what it found there, and the weights and the EMA at its end."""
    engine = engine_of(out=str(out), **flags)
    cfg = sft.Config(out=str(out), dtype="fp32", **{k: v for k, v in flags.items() if k != "dtype"})
    utils.claim_folder(cfg)
    ema = utils.EMA(engine, 0.9)
    columns = {"loss": ".3f"}
    run = utils.Run(cfg, total, columns, ema=ema, digest=digest, engine=engine, critic=None)
    start, state = run.restore()
    if start == 0:
        run.write(0, [{"eval_score": 1.0}])
    for step in range(start + 1, total + 1):
        at_step(step)
        tokens = torch.tensor(ragged([12, 12], seed=step))
        logprobs, _ = engine(tokens, torch.tensor([5, 5]), torch.tensor([7, 7]))
        engine.backward(-logprobs.mean())
        utils.step(engine)
        ema.update()
        run.log(step, {"loss": logprobs.mean().item(), "nan": math.nan, "none": None})
        run.write(step, [{"row": 1}, {"row": 2}], "tokens.jsonl")
        run.save(step, note=f"after {step}")
    run.finish("done")
    return start, state, [p.detach().clone() for p in (*ema.masters(), *ema.average)]


def die_at(last):
    def at_step(step):
        if step == last:
            raise Killed
    return at_step


def send_at(number, last):
    def at_step(step):
        if step == last:
            os.kill(os.getpid(), number)
            utils.skipped["total"] += 2
    return at_step


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def results(out):
    """{file: contents} of a run, without times."""
    times = ("_s", "seconds", "memory_gib")
    found = {}
    for path in (p for p in Path(out).rglob("*") if p.suffix in (".jsonl", ".safetensors")):
        found[str(path.relative_to(out))] = path.read_bytes()
    found["metrics.jsonl"] = [
        {k: v for k, v in row.items() if not k.endswith(times) and "per_s" not in k}
        for row in read_lines(Path(out) / "metrics.jsonl")]
    return found


@pytest.mark.parametrize("dtype, zero", [("fp32", 0), ("fp32", 3), ("bf16", 2)])
def test_a_run_goes_on_with_weights_moments_and_ema_to_the_bit(dtype, zero, tmp_path):
    whole = short_run(tmp_path / "whole", dtype=dtype, zero=zero)
    assert whole[:2] == (0, {})
    flags = dict(out=tmp_path / "parts", dtype=dtype, zero=zero)
    with pytest.raises(Killed):
        short_run(at_step=die_at(4), **flags)
    resumed = short_run(resume=True, **flags)
    assert resumed[:2] == (3, {"note": "after 3"})
    assert equal(resumed[2], whole[2])
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert "nan" not in read_lines(tmp_path / "whole/metrics.jsonl")[-1]
    assert not (tmp_path / "parts/checkpoint").exists()


def test_a_run_that_is_killed_in_a_checkpoint_or_a_log_ends_as_if_it_had_not_been(
        tmp_path, monkeypatch):
    whole = short_run(tmp_path / "whole")
    for i, (owner, name, call, when) in enumerate((
            (torch, "save", 5, "before"), (Path, "rename", 3, "before"),
            (Path, "rename", 3, "after"), (shutil, "rmtree", 2, "before"),
            (utils.Run, "write", 5, "after"))):
        real = getattr(owner, name)
        calls = itertools.count(1)

        def kill(*args, real=real, calls=calls, call=call, when=when, **kwargs):
            number = next(calls)
            if (number, when) == (call, "before"):
                raise Killed
            real(*args, **kwargs)
            if number == call:
                raise Killed

        out = tmp_path / str(i)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, kill)
            short_run(out)
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 1, "lo')  # a torn line
        (out / "checkpoint/5.new").mkdir(exist_ok=True)
        (out / "checkpoint/5.new/state.json").write_text("{")
        resumed = short_run(out, resume=True)
        assert resumed[0] > 0 and equal(resumed[2], whole[2]), (owner, name, when)
        assert results(out) == results(tmp_path / "whole"), (owner, name, when)


def test_ten_checkpoints_are_written_two_are_kept_and_a_signal_ends_a_run_with_one(
        tmp_path, monkeypatch, capsys):
    seen = []

    def look(step):
        folder = tmp_path / "whole/checkpoint"
        seen.append(sorted(int(p.name) for p in folder.glob("*")))

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    utils.skipped.update(total=7)  # of another run of this process
    whole = short_run(tmp_path / "whole", total=30, at_step=look)
    steps = sorted({step for steps in seen for step in steps})
    assert steps == list(range(3, 30, 3)), "none at the end, where the result is saved"
    assert max(map(len, seen)) == 2 and seen[-1] == [24, 27]
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert after == before, "a finished run takes its handlers back"

    assert utils.skipped["total"] == 0

    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / str(number)
        with pytest.raises(utils.UserError, match="stopped after step 13; go on with .* --resume"):
            short_run(out, total=30, at_step=send_at(number, 13))
        start, _, end = short_run(out, total=30, resume=True, at_step=send_at(number, 30))
        assert start == 13 and equal(end, whole[2]), "a signal in the last step changes nothing"
        assert utils.skipped["total"] == 4
        assert results(out) == results(tmp_path / "whole")
    assert "--resume: goes on after step 13 of 30" in capsys.readouterr().out


def stop_one_rank(out):
    """A signal to rank 1 alone. Returns what this rank says at its end."""
    rank = int(os.environ["RANK"])
    with pytest.raises(utils.UserError) as error:
        short_run(out, zero=2, at_step=send_at(signal.SIGTERM, 3 if rank else None))
    return str(error.value)


def test_a_signal_to_one_rank_ends_all_of_them_after_the_same_step(two, tmp_path):
    said = two(stop_one_rank, str(tmp_path))
    assert said == ["stopped after step 3; go on with the same command and --resume"] * 2
    with pytest.raises(utils.UserError, match="was written by 2 ranks.*start as many"):
        short_run(tmp_path, zero=2, resume=True)


def test_a_folder_is_claimed_by_one_run_and_goes_on_only_as_it_began(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def refused(message, path=out, **flags):
        with pytest.raises(utils.UserError, match=message):
            short_run(path, **flags)

    with pytest.raises(Killed):
        short_run(out, at_step=die_at(1), resume=True)  # --resume where there is nothing: begins
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["lr"] == sft.Config.lr and record["versions"]["torch"]
    assert (out / "code/sft.py").read_text() == (HERE / "sft.py").read_text()
    refused("holds a run or a model; --resume it")
    with pytest.raises(Killed):  # killed before its first checkpoint
        short_run(out, at_step=die_at(3), resume=True, zero=0)
    refused("--batch_size was 32, and now it is 8", resume=True, batch_size=8)
    refused("the rows of --data are not those", resume=True, digest="other rows")
    monkeypatch.setattr(dist, "get_world_size", lambda *args, **kwargs: 4)
    with pytest.raises(Killed):
        short_run(out, at_step=die_at(4), resume=True, micro_batch=2)  # these may change
    monkeypatch.undo()
    short_run(out, resume=True)
    assert [row["step"] for row in read_lines(out / "metrics.jsonl")] == list(range(7))
    refused("holds a finished run")
    refused("holds a finished run", resume=True)
    model_of("llama").save_pretrained(tmp_path / "model")
    refused("holds a run or a model", path=tmp_path / "model", resume=True)


def test_a_tracker_gets_what_the_log_gets_and_a_missing_one_is_said(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(
        "calls = []\n"
        "def init(**kwargs): calls.append(kwargs['config']['track'])\n"
        "def log(row, step): calls.append({'step': step, **row})\n"
        "def finish(): calls.append('finish')\n")
    monkeypatch.syspath_prepend(tmp_path)
    short_run(tmp_path / "a", total=2, track="stub")
    import stub

    assert stub.calls == ["stub", *read_lines(tmp_path / "a/metrics.jsonl"), "finish"]
    with pytest.raises(utils.UserError, match="--track no_such_package: pip install"):
        short_run(tmp_path / "b", track="no_such_package")


# ---- the scripts


def in_two_parts(script, out, after, monkeypatch, **flags):
    """Runs a script that dies right after the checkpoint of step `after`, then in the middle of
    saving its last model, then again with --resume; other rows in between are refused."""
    real = utils.Run.save

    def save(run, step, **state):
        real(run, step, **state)
        if step == after:
            raise Killed

    def save_half(lm, tokenizer, ends, out, **entries):
        lm.save_pretrained(out)
        os.truncate(Path(out, "model.safetensors"), 1000)
        raise Killed

    for resume, owner, name, dies in ((False, utils.Run, "save", save),
                                      (True, utils, "save_model", save_half)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, dies)
            train(script, out, resume=resume, **flags)
    path = Path(flags.get("ptx_data", flags["data"]))
    rows = path.read_text()
    path.write_text(rows.rpartition("\n")[0])
    with pytest.raises(utils.UserError, match="the rows of --data are not those"):
        train(script, out, resume=True, **flags)
    path.write_text(rows)
    train(script, out, resume=True, **flags)


def test_a_script_that_is_killed_twice_ends_as_one_that_is_not_bit_for_bit(
        chain, toy_file, tmp_path, monkeypatch):
    """SFT in its second epoch, whose rows are no multiple of the batch; PPO with a mixture, a
    function as a second reward, LoRA and an EMA."""
    (tmp_path / "rules.py").write_text(
        "def length(completions, **fields):\n    return [len(c) for c in completions]\n")
    rows = shutil.copy(toy_file, tmp_path / "rows.jsonl")
    common = dict(COMMON, data=str(rows), micro_batch=4, model=chain["sft"][0])
    scorers = f"{chain['reward'][0]},{tmp_path}/rules.py:length:0.5"
    text = str(shutil.copy(rows, tmp_path / "text.jsonl"))
    of_ppo = dict(common, reward=scorers, ptx_data=text, lora=4, iterations=4, minibatches=2,
                  ppo_epochs=2, max_new_tokens=8, actor_lr=1e-3, critic_lr=1e-3)
    common.update(epochs=1.3, lr=1e-3)
    for name, script, after, flags in (("sft", sft, 27, common), ("reward", reward, 27, common),
                                       ("ppo", ppo, 2, of_ppo)):
        train(script, tmp_path / name, **flags)
        in_two_parts(script, tmp_path / "parts" / name, after, monkeypatch, **flags)
        whole = results(tmp_path / name)
        assert results(tmp_path / "parts" / name) == whole
        if name == "ppo":
            assert {"samples.jsonl", "ema/model.safetensors"} < set(whole)


def start(*arguments, **env):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=HERE, env=as_a_user() | env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def rows_logged(out):
    path = Path(out) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_rows(process, out, n):
    """Waits until a run has logged so many rows, or has ended."""
    while rows_logged(out) < n and process.poll() is None:
        time.sleep(0.02)


def as_arguments(flags):
    """{"held_out": 0.2} as --held-out=0.2."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def train_on_ranks(out, flags):
    sft.main(sft.Config(out=out, **flags))


def test_torchrun_takes_a_script_and_after_a_sigterm_it_goes_on_as_if_nothing_had_happened(
        two, small, toy_file, tmp_path):
    flags = dict(COMMON, data=toy_file, epochs=2.0, model=small, lr=1e-3)
    out = tmp_path / "out"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(),
              "sft.py", *as_arguments(flags), "--out", out]
    process = start(*launch)
    wait_for_rows(process, out, 8)
    process.terminate()
    said = process.communicate(timeout=100)[0]
    found = re.search(r"error: stopped after step (\d+); go on with the same command", said)
    assert found and process.returncode != 0, said
    assert 8 <= int(found[1]) == rows_logged(out) < 47
    code, said = command(*launch, "--resume")
    assert code == 0 and f"goes on after step {found[1]} of 47" in said, said
    two(train_on_ranks, str(tmp_path / "whole"), flags)
    assert results(out) == results(tmp_path / "whole")


@long
@pytest.mark.parametrize("name, zero", [("sft", 0), ("reward", 3), ("ppo", 2)])
def test_ranks_that_are_killed_at_random_moments_end_as_ranks_that_are_not(
        name, zero, chain, toy_file, tmp_path):
    """Seven times: kill -9 to both of two ranks at any moment, or to one of them while they train,
    whereupon the other must end within a minute, too."""
    flags = dict(COMMON, data=toy_file, model=chain["sft"][0], zero=zero)
    if name == "ppo":
        flags |= dict(reward=chain["reward"][0], iterations=15, minibatches=2, max_new_tokens=8)
    else:
        flags |= dict(epochs=2.5, lr=1e-3)
    rng = random.Random(name)

    def launch(out):
        port = str(free_port())
        ranks = []
        for rank in "01":
            env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port)
            ranks.append(start(f"{name}.py", *as_arguments(flags), "--out", out, "--resume", **env))
        return ranks

    def ends(ranks, timeout=200):
        return [(rank.communicate(timeout=timeout)[0], rank.returncode) for rank in ranks]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [code for _, code in ends(launch(whole))] == [0, 0]
    total = rows_logged(whole)
    for kill in range(7):
        ranks = launch(parts)
        if kill % 3 == 0:
            time.sleep(rng.uniform(0, 20))
            ranks[0].kill()
            ranks[1].kill()
        else:
            wait_for_rows(ranks[0], parts, rows_logged(parts) + rng.randint(1, total // 6))
            time.sleep(rng.uniform(0, 0.5))
            rng.choice(ranks).kill()
        said = ends(ranks, timeout=60)
        print(name, kill, rows_logged(parts), total, [code for _, code in said], flush=True)
        if (parts / "finished").exists():
            break
    if not (parts / "finished").exists():
        said = ends(launch(parts))
        assert [code for _, code in said] == [0, 0], said
    assert results(parts) == results(whole)
