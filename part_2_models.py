from prelude import *
from prelude import long, some

# -----------------------------------------------------------------------------
# 2. models: log-probabilities, scores, LoRA, folders
# -----------------------------------------------------------------------------


def padded(rows, value):
    """(B, T) tokens, right-padded with any value, and their lengths."""
    tensors = [torch.tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(tensors, True, value), lengths


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "bloom"])
def test_a_padded_batch_gives_each_row_the_logprobs_and_entropies_of_that_row_alone(kind):
    lm = model_of(kind)
    rows = ragged([9, 4, 21, 3])
    prompt_lens = torch.tensor([5, 1, 20, 1])
    for pad in (0, 5, 1):  # pad, eos, bos: what the padding is cannot matter
        tokens, lens = padded(rows, pad)
        with torch.no_grad():
            got, entropy = sft.Policy(lm)(tokens, prompt_lens, lens - prompt_lens, 0.7)
        for i, (row, prompt_len) in enumerate(zip(rows, prompt_lens.tolist())):
            n = len(row) - prompt_len
            want = plain_logprobs(lm, row, prompt_len, 0.7)
            torch.testing.assert_close(got[i, :n].double(), want, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                logits = lm(torch.tensor([row])).logits[0, prompt_len - 1 : -1].double() / 0.7
            want = torch.distributions.Categorical(logits=logits).entropy()
            torch.testing.assert_close(entropy[i, :n].double(), want, rtol=1e-4, atol=1e-5)
            assert not got[i, n:].any() and not entropy[i, n:].any()


def test_eos_carries_gradient_although_it_is_also_pad_and_bos():
    lm = model_of("opt", pad_token_id=5, bos_token_id=5)
    tokens, lens = padded([[5, 9, 8, 7, 5], [5, 9, 8, 5]], 5)
    prompt_lens = torch.tensor([3, 2])
    index, mask = sft.answer_positions(prompt_lens, lens - prompt_lens)
    assert index.tolist() == [[2, 3], [1, 2]] and mask.all()
    logprobs, _ = sft.Policy(lm)(tokens, prompt_lens, lens - prompt_lens)
    (grad,) = torch.autograd.grad(logprobs[0, 1], lm.model.decoder.layers[2].fc2.weight)
    assert logprobs[0, 1].item() == pytest.approx(plain_logprobs(lm, [5, 9, 8, 7, 5], 3)[1].item())
    assert grad.abs().sum() > 0, "the EOS at the end of an answer is an action"
    lm.config.logits_scaling = 8.0
    with pytest.raises(utils.UserError, match="scales or caps its logits"):
        sft.Policy(lm)


@pytest.mark.parametrize("kind", ["llama", "opt", "opt-350m", "gpt2", "gpt_neox", "bloom"])
def test_a_score_is_read_at_the_last_real_token_whatever_comes_after_it(kind, tmp_path):
    model_of(kind).save_pretrained(tmp_path)
    rm = reward.RewardModel.from_lm(str(tmp_path), torch.float32)
    rows = ragged([9, 4, 21])
    with torch.no_grad():
        alone = torch.stack([rm(torch.tensor([row]))[0, -1] for row in rows])
        for value in (0, 5, 80):
            tokens, lens = padded(rows, value)
            got = reward.last_token(rm(tokens), lens)
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
        rm.lm.config.score_offset = 0.5
        rm.lm.config.score_scale = 3.0
        got = reward.last_token(rm(tokens), lens)
        torch.testing.assert_close(got, (alone - 0.5) * 3.0, rtol=1e-4, atol=1e-5)
    head = rm.lm.score.weight
    std = head.std().item() * (head.size(1) + 1) ** 0.5
    assert abs(std - 1) < 0.3, "the head starts at std 1/sqrt(d + 1)"


# ---- LoRA


def test_every_linear_layer_of_the_blocks_has_an_adapter_and_a_head_is_trained():
    trained = [n for n, p in model_of("llama lora").named_parameters() if p.requires_grad]
    adapted = {name.rpartition(".")[0] for name in trained}
    assert len(trained) == 2 * 3 * 7 == 2 * len(adapted)
    assert all(".lora_" in name and "lm_head" not in name for name in trained)
    rm = reward.RewardModel.from_lm("tiny", torch.float32)
    utils.add_lora(rm.lm, 2)
    assert rm.lm.score.weight.requires_grad, "a new head must learn"
    assert not rm.lm.base_model.embed_tokens.weight.requires_grad
    assert utils.add_lora(model_of("llama"), 0).lm_head.weight.requires_grad, "0: no adapters"


def test_an_adapter_adds_twice_its_product_and_off_it_adds_nothing_even_after_an_error():
    """Hu et al. 2021, section 4.1, with alpha = 2 rank."""
    lm = model_of("llama lora")
    layer = lm.model.layers[0].self_attn.q_proj
    x = torch.randn(5, layer.lora_A.size(1))
    ids = torch.tensor(ragged([9]))
    with torch.no_grad():
        want = 2 * x @ layer.lora_A.T @ layer.lora_B.T
        torch.testing.assert_close(layer(x) - layer.base(x), want, rtol=1e-4, atol=1e-5)
        base = model_of("llama")(ids).logits
        assert not torch.equal(lm(ids).logits, base)
        with pytest.raises(KeyError), utils.adapters_off():
            assert torch.equal(lm(ids).logits, base), "the reference policy"
            raise KeyError
        assert not torch.equal(lm(ids).logits, base), "they are on again"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merged_weights_are_base_and_adapters_together(kind):
    utils.init_distributed(0)
    lm = model_of(kind + " lora")
    plain = model_of(kind)
    missing, unexpected = plain.load_state_dict(utils.whole_state_dict(lm), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied in GPT-2
    ids = torch.tensor(ragged([9]))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-4)


# ---- folders


def test_a_tensor_that_is_missing_or_has_another_shape_is_named_and_unknown_ones_pass(
        tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    lm = model_of("gpt2")
    lm.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    short = whole[name][:-1].clone()
    head = {"score.weight": torch.zeros(1, 64)}
    for state, message in (
            ({k: v for k, v in whole.items() if k != name}, "look at " + name),
            (whole | {name: short}, name + ".*63.*64"),
            (whole | head, "not a whole AutoModelForCausalLM, look at score.weight")):
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(utils.UserError, match=message):
            load_lm(tmp_path)
    # Old files of GPT-2 hold buffers that no model of today has.
    old = {"transformer.h.0.attn.masked_bias": torch.ones(1), "extra.weight": torch.ones(2)}
    save_file(whole | old, path, metadata={"format": "pt"})
    ids = torch.tensor(ragged([9]))
    with torch.no_grad():
        assert torch.equal(load_lm(tmp_path)(ids).logits, lm(ids).logits)
    assert "tensors belong to no layer, such as extra.weight" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match="look at score.weight"):
        reward.RewardModel.from_pretrained(str(tmp_path), torch.float32)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(utils.UserError, match="holds LoRA adapters .*merge them"):
        load_lm(tmp_path)
    for path in ("out/nowhere", "./nowhere"):
        with pytest.raises(utils.UserError, match="no such model folder; train one first"):
            load_lm(path)


def test_what_is_loaded_has_no_dropout_float32_frequencies_and_the_tokenizers_words(tmp_path, tok):
    model_of("gpt2").save_pretrained(tmp_path / "gpt2")
    assert all(m.p == 0 for m in load_lm(tmp_path / "gpt2").modules()
               if isinstance(m, torch.nn.Dropout))
    model_of("llama", vocab_size=264).save_pretrained(tmp_path)
    for path, vocabulary, words in ((tmp_path, 264, 258), ("tiny", 258, None)):
        lm = load_lm(path, torch.bfloat16, tokenizer=tok)
        assert lm.dtype == torch.bfloat16
        assert lm.model.rotary_emb.inv_freq.dtype == torch.float32
        assert (lm.config.vocab_size, lm.config.num_words) == (vocabulary, words)
    assert utils.pick_lr(0, lm.config, 1e-3, 1e-5) == 1e-3, "the built-in model"
    assert utils.pick_lr(0, load_lm(tmp_path).config, 1e-3, 1e-5) == 1e-5
    assert utils.pick_lr(0.5, lm.config, 1e-3, 1e-5) == 0.5
    if not torch.cuda.is_available():
        assert utils.dtype_of("auto") == torch.float32
        assert 0.05 < utils.memory_gib() < 1000


def test_a_saved_folder_keeps_its_settings_names_the_ends_and_holds_nothing_broken(tmp_path, tok):
    """Sampling settings as Llama 2 had them, which transformers calls invalid; and a config that
    ties the embeddings of a file where they differ."""
    from transformers import AutoModelForCausalLM

    utils.init_distributed(0)
    lm = model_of("llama", vocab_size=258, tie_word_embeddings=False)
    lm.config.tie_word_embeddings = True
    lm.save_pretrained(tmp_path / "a")
    settings = {"eos_token_id": 5, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "a/generation_config.json").write_text(json.dumps(settings))
    loaded = load_lm(tmp_path / "a")
    for ends in ([256, 257], [256]):
        utils.save_model(loaded, tok, ends, tmp_path / "b", score_scale=2.5)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        eos = ends if len(ends) > 1 else 256
        assert saved.config.eos_token_id == saved.generation_config.eos_token_id == eos
        assert saved.config.score_scale == 2.5
        for name in ("temperature", "top_p", "repetition_penalty"):
            assert getattr(saved.generation_config, name) == settings[name]
        assert utils.load_tokenizer(str(tmp_path / "b")).chat_template == tok.chat_template
    ids = torch.tensor(ragged([9]))
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, lm(ids).logits)
    loaded.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    before = (tmp_path / "b/model.safetensors").read_bytes()
    with pytest.raises(utils.UserError, match="layers.1.mlp.up_proj.weight is not finite; lower"):
        utils.save_model(loaded, tok, ends, tmp_path / "b")
    assert (tmp_path / "b/model.safetensors").read_bytes() == before


def test_each_folder_loads_with_transformers_alone_in_a_fresh_process(chain, tmp_path):
    probe = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
out = {}
for step in ("sft", "reward", "ppo", "ppo/ema"):
    auto = AutoModelForSequenceClassification if step == "reward" else AutoModelForCausalLM
    tok = AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{step}")
    chat = [{"role": "user", "content": "reverse apple"}, {"role": "assistant", "content": "elppa"}]
    ids = tok(tok.apply_chat_template(chat, tokenize=False), return_tensors="pt")["input_ids"]
    out[step] = auto.from_pretrained(f"{sys.argv[1]}/{step}")(input_ids=ids).logits.detach()
assert "utils" not in sys.modules
torch.save(out, sys.argv[2])
"""
    root = Path(chain["sft"][0]).parent
    code, said = command("-c", probe, root, tmp_path / "out.pt", cwd=tmp_path)
    assert code == 0, said
    theirs = torch.load(tmp_path / "out.pt")
    tok = utils.load_tokenizer(chain["sft"][0])
    ids = torch.tensor([tok("Human: reverse apple\nAssistant: elppa")["input_ids"]])
    with torch.no_grad():
        for step in ("sft", "ppo", "ppo/ema"):
            assert torch.equal(load_lm(root / step)(ids).logits, theirs[step]), step
        rm = reward.RewardModel.from_pretrained(chain["reward"][0], torch.float32)
        score = rm(ids)[:, -1]
    config = rm.lm.config
    want = (theirs["reward"][:, 0] - config.score_offset) * config.score_scale
    torch.testing.assert_close(score, want)
    assert config.score_offset != 0 and config.score_scale != 1
