from prelude import *
from prelude import long, some

# -----------------------------------------------------------------------------
# 1. data: rows, text, ids

CHATML = ("<|im_start|>", "<|im_end|>")
THINK_JINJA = """{%- if tools %}{{ 'Tools: ' + tools | tojson }}{% endif %}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}{% set parts = m.content.split('</think>') %}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n' + (m.reasoning_content
  or (parts[0].split('<think>')[-1] if parts[1:] else '')).strip() + '\\n</think>\\n\\n'
  + (parts[-1].lstrip('\\n') if parts[1:] else m.content) }}{% else %}{{ parts[-1] }}{% endif %}
{%- for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + OPEN }}{% endif %}"""
LLAMA3_JINJA = """{{- bos_token }}{% for m in messages %}{% if m.role == 'critic' %}
{{- raise_exception('no critics') }}{% endif %}
{{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
R1_JINJA = """{{- bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|A|>'
  + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<|U|>' + m.content }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|A|><think>\\n' }}{% endif %}"""
PHI_JINJA = """{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endfor %}{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""
TALE = """Once upon a time there was a little girl named Lily. She liked to play in the park with
her mom. One day a big dog came and said: hello, little girl! They were friends, é 😀.
def f(x):
    if x:
        return 0
Human: who are you?
Assistant: a plum"""


def train_tokenizer(template, special=(), kind="words", bos=None):
    """A BPE of a few hundred tokens. kind: words, as Llama 3's; space, the same with a space before
    a text, as RoBERTa's; prefix, SentencePiece, which writes one too, as Llama 2's; free, where a
    token may hold a line's end or ": a"."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    alphabet = pre.ByteLevel.alphabet()
    if kind == "prefix":
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        prepend = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(prepend)
        backend.pre_tokenizer = pre.Split("\u2581", "merged_with_next")
        spaces = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(spaces)
        alphabet = [chr(i) for i in range(33, 127)] + list("\n\t\u2581é😀")
    else:
        level = pre.ByteLevel(add_prefix_space=kind == "space", use_regex=False)
        words = Regex(r"\s*[\r\n]+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s")
        split = [] if kind == "free" else [pre.Split(words, "isolated")]
        backend.pre_tokenizer = pre.Sequence([level] if kind == "space" else split + [level])
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet,
                                  special_tokens=["<unk>"])
    texts = TALE.split("\n") + ["\nAssistant: a", "\n\n\n\n", "a little girl"] * 50
    backend.train_from_iterator(texts, trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token=bos)
    tok.add_special_tokens({"additional_special_tokens": list(special)})
    tok.add_tokens(["<think>", "</think>"])
    if bos:
        special_tokens = [(bos, tok.bos_token_id)]
        tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=special_tokens)
    tok.chat_template = template or utils.chat_template(utils.TEMPLATE, tok)
    return tok


@pytest.fixture(scope="session")
def toks():
    """Nine pairs of a tokenizer and a chat template."""
    return {
        "bytes": utils.load_tokenizer("tiny"),
        "prefix": train_tokenizer(None, kind="prefix", bos="<s>"),
        "space": train_tokenizer(None, kind="space"),
        "free": train_tokenizer(None, kind="free"),
        "think": train_tokenizer(THINK_JINJA.replace("OPEN", "''"), CHATML),
        "open": train_tokenizer(THINK_JINJA.replace("OPEN", "'<think>\\n'"), CHATML),
        "llama3": train_tokenizer(LLAMA3_JINJA, ("<|start|>", "<|end|>", "<|eot|>"), bos="<bos>"),
        "r1": train_tokenizer(R1_JINJA, ("<|A|>", "<|U|>"), bos="<bos>"),
        "phi": train_tokenizer(PHI_JINJA, ("<|user|>", "<|assistant|>", "<|end|>")),
    }


TOKENIZERS = ("bytes", "prefix", "space", "free", "think", "open", "llama3", "r1", "phi")
UNTHINKING = [name for name in TOKENIZERS if name != "r1"]  # r1 refuses an answer without a thought


def U(text):
    return {"role": "user", "content": text}


def A(text, **more):
    return {"role": "assistant", "content": text, **more}


def ends_of(tok, config=None, generation_config=None):
    lm = types.SimpleNamespace(config=types.SimpleNamespace(eos_token_id=config),
                               generation_config=types.SimpleNamespace(
                                   eos_token_id=generation_config))
    return utils.end_ids(tok, lm)


def encode_rows(tok, *rows):
    """What data.encode gives of rows as they are in a file, but with all their answers."""
    ends = ends_of(tok)
    out = []
    for row in rows:
        example = data.as_example(row)
        steps = ["sft"] if example.said else ["ppo"]
        steps += ["reward"] if len(set(example.ranks)) > 1 else []
        results = [data.encode([example], step, tok, ends)[0] for step in steps]
        errors = [result for result in results if isinstance(result, Exception)]
        if not errors:
            prompt, _, merged = results[0]
            errors = [(prompt, [ids for _, answers, _ in results for ids in answers], merged)]
        out.append(errors[0])
    return out


def load_rows(path, tok, step="sft", split="", held_out=0.2, max_len=512):
    if not dist.is_initialized():
        utils.init_distributed(0)
    return data.load(str(path), step, split, held_out, tok, ends_of(tok), max_len)


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
PARSED = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d"}}
SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "content": "sun"}
WEATHER = [U("weather?")]
WHOLE = {  # name: (messages, the answer, the row if it is not these)
    "plain": ([U("hi there")], A("a plum"), {"prompt": "hi there", "response": "a plum"}),
    "turns": ([SYSTEM, U("a"), A("b"), U("c")], A("d é 😀"), None),
    "code": ([U("def f(x):\n")], A("    if x:\n\treturn 0\n"), None),
    "lines": ([U("list")], A("\n- a\r\n- b"), None),
    "empty": ([U("say nothing")], A(""), None),
    "space": ([U("Name a fruit:")], A(" a plum"), None),
    "begun": ([U("1 + 1?"), A("The sum")], A(" is 2."), None),
    "inside": ([U("who?"), A("a lit")], A("tle girl"), None),
    "thought": ([U("1 + 1?")], A("<think>\nadd\n</think>\n\n2"), None),
    "field": ([U("1 + 1?")], A("2", reasoning_content="add"), None),
    "no thought": ([U("1 + 1?")], A("2"), {"messages": [
        U("1 + 1?"), A("2", reasoning_content="", tool_calls=[], thinking=None)]}),
    "call": (WEATHER, A("", tool_calls=[PARSED]), {"messages": WEATHER + [
        A(None, tool_calls=[CALL])]}),
    "old call": (WEATHER, A("", tool_calls=[PARSED]), {"messages": WEATHER + [
        A("", function_call=CALL["function"])]}),
    "tools": (WEATHER, A("a"), {"prompt": "weather?", "response": "a",
                                "tools": json.dumps([TOOL])}),
    "result": ([U("q"), A("l"), RESULT], A("It is sun."), None),
}


def row_of(name):
    messages, answer, row = WHOLE[name]
    if messages[-1]["role"] == "assistant":
        return {"prompt": messages, "response": answer["content"]}
    return row or {"messages": messages + [answer]}


THINKING = ("field", "call", "old call", "tools")  # rows that only a template which thinks can write


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("row", WHOLE)
def test_prompt_and_answer_are_the_ids_of_the_whole_conversation(name, row, toks):
    tok, (messages, answer, _) = toks[name], WHOLE[row]
    ends = ends_of(tok)
    result, = encode_rows(tok, row_of(row))
    refused = name not in ("think", "open") and row in THINKING
    refused |= name == "r1" and row not in ("thought", "begun", "inside")
    assert isinstance(result, Exception) == refused, f"{result}: told, and never an empty answer"
    if refused:
        return
    prompt, (answer_ids,), merged = result
    tools = [TOOL] if row == "tools" else None
    start = {"add_generation_prompt": True}
    before, last = messages, answer
    if messages[-1]["role"] == "assistant":
        start = {"continue_final_message": True}
        before = messages[:-1]
        last = A(messages[-1]["content"] + answer["content"])
    text = tok.apply_chat_template(messages, tools=tools, tokenize=False, **start)
    whole = tok.apply_chat_template(before + [last], tools=tools, tokenize=False)
    if (name, row) == ("r1", "thought"):  # the template drops it, though its prompt opens one
        whole = text + "add\n</think>\n\n2" + tok.eos_token
    assert prompt == tok(text, add_special_tokens=False)["input_ids"], "not what it is asked with"
    ids = tok(whole, add_special_tokens=False)["input_ids"]
    while ids[-1] not in ends and name in ("think", "open", "phi"):
        ids.pop()  # the line's end behind the last message
    if name == "phi":
        ids = ids[:-2]  # <|end|> \n <eos>: the policy stops at the first
    ids += [ends[0]] * (ids[-1] not in ends)
    assert answer_ids[-1] in ends and set(ends).isdisjoint(answer_ids[:-1])
    assert prompt.count(tok.bos_token_id) == (tok.bos_token_id is not None)
    assert tok.decode(prompt + answer_ids) == tok.decode(ids), "a space too many, or a word lost"
    assert merged == (ids[: len(prompt)] != prompt)
    if not merged:
        assert prompt + answer_ids == ids
    else:
        assert name in ("free", "open", "phi") or row == "inside", "few rows merge"
        kept = len(os.path.commonprefix([ids[::-1], answer_ids[::-1]]))
        assert kept >= min(len(ids) - len(prompt), len(ids)) - 2, "behind the seam, the whole's ids"


def test_a_token_that_lies_over_the_seam_is_encoded_again_as_a_continuation(toks):
    tok = toks["prefix"]
    (prompt, (answer,), merged), = encode_rows(tok, row_of("inside"))
    words = tok.convert_ids_to_tokens(prompt[-3:] + answer)
    assert merged and words == ["\u2581a", "\u2581l", "it", "tle", "\u2581girl", "<eos>"]
    assert tok.convert_ids_to_tokens(tok("a little")["input_ids"])[-1] == "\u2581little"


@pytest.mark.parametrize("name", UNTHINKING)
def test_one_conversation_has_the_same_ids_in_every_layout(name, toks):
    hh = "Be kind.\n\nHuman: a b c d e f g\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    system = {"role": "system", "content": "Be kind."}
    talk = [system, U("a b c d e f g"), A("b"), U("c")]
    yes, no = [A("yes")], [A("no")]
    rest = {"chosen": "yes", "rejected": "no"}
    old = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": old.get(m["role"], "system"), "value": m["content"]} for m in talk + yes]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
    rows = [
        {"prompt": talk, **rest},
        {"messages": talk, **rest},
        {"messages": json.dumps(talk), **rest},
        {"prompt": hh, **rest},
        {"prompt": hh.replace("\n", "\r\n"), **rest},
        {"prompt": hh, "chosen": " yes", "rejected": " no"},
        {"prompt": hh, "chosen": hh + " yes", "rejected": hh + " no"},
        {"prompt": hh.removesuffix("\n\nAssistant:"), "chosen": hh + " yes", "rejected": hh + "no"},
        {"chosen": hh + " yes", "rejected": hh + " no"},
        {"prompt": "c", "chosen": hh + " yes", "rejected": hh + " no"},
        {"chosen": talk + yes, "rejected": talk + no},
        {"prompt": "c", "chosen": talk + yes, "rejected": talk + no},
        {"prompt": talk, "chosen": talk[3:] + yes, "rejected": talk[3:] + no},
        {"prompt": talk[:2], "chosen": talk[2:] + yes, "rejected": talk[2:] + no},
        {"prompt": talk, "chosen": yes, "rejected": no[0]},
        {"prompt": "c", "chosen": yes, "rejected": talk + no},
        {"system": "Be kind.", "prompt": talk[1:], "answers": ["no", "yes"], "scores": [0, 2.5]},
        {"system": "Be kind.", "prompt": talk, "answers": ("no", "yes"), "ranks": ["10", "9"]},
        {"system_prompt": "Be kind.", "history": [["a b c d e f g", "b"]], "question": "c", **rest},
        {"system": "Be kind.", "history": talk[1:3], "instruction": "c", "input": "", **rest},
        {"history": json.dumps(talk[:3]), "prompt": talk, **rest},
        {"conversations": sharegpt, **rest},
        {"system": "Be kind.", "conversations": sharegpt[1:], **rest},
        {"messages": parts, "completion": yes, **rest},
        {"messages": [{**m, "role": m["role"].title(), "tool_calls": None} for m in talk], **rest},
    ]
    results = encode_rows(toks[name], *rows)
    for row, result in zip(rows, results):
        assert result == results[0] and len(result[1]) == 3, row
    assert len({data.as_example(row).hash for row in rows}) == 1, "hashes are of a row's words"


@pytest.mark.parametrize("row", [
    {"system": "w1", "history": [["w2", "w3"]], "instruction": "w4", "input": "w5", "output": "w6"},
    {"system_prompt": "w1", "question": "w2", "context": "w3", "response": "w4", "id": "w5"},
    {"system": "w1", "prompt": "w2", "completion": "w3", "context": "w4", "question": "w5"},
    {"system": "w1", "conversations": [U("w2"), A("w3")], "text": "w4"},
    {"messages": [U("w2"), A("w3")], "response": "w4", "prompt": "w5",
     "system": "w1", "system_prompt": "w6"},
    {"question": "w1", "answer": "w2", "solution": "w3"},
    {"text": "w1", "title": "w2"},
    {"chosen": "w1\n\nHuman: w2\n\nAssistant: w3", "rejected": "w1\n\nHuman: w2\n\nAssistant: w4"},
    {"prompt": "w1", "answers": ["w2", "w3"], "ranks": [2, 1], "output": "w4", "scores": ["w5"]},
    {"prompt": "w1", "response": "Say:\n\nHuman: w2\n\nAssistant: w3", "rejected": "w4"},
    {"prompt": "w1:\n\nHuman: w2\n\nAssistant: w3", "response": "Assistant: w4"},
    {"prompt": [U("w1"), U("w2")], "chosen": [U("w3"), A("w4")],
     "rejected": "w5", "history": [["w6", "w7"]]},
    {"messages": [U([{"type": "text", "text": "w1 "}, {"type": "text", "text": "w7"}]),
                  A("w3", reasoning_content="w4", tool_calls=[
                      {"function": {"name": "w2", "arguments": {"x": "w5"}}}])],
     "tools": [json.dumps({"function": {"name": "w6"}})]},
])
def test_every_word_of_a_row_is_taught_or_its_field_is_named(row, toks):
    tok, example = toks["think"], data.as_example(row)
    (prompt, answers, _), = encode_rows(tok, row)
    seen = tok.decode(sum(answers, prompt)) + json.dumps(example.fields)
    words = [word for word in (f"w{i}" for i in range(9)) if word in json.dumps(row)]
    assert [word for word in words if word not in seen] == []


DIALOGUE = "\n\nHuman: 2 and 2?\n\nAssistant: It is"
QUOTE = "What next?\n\nHuman: hi\n\nAssistant: ho"


@pytest.mark.parametrize("template, row, prompt, answer", [
    ("{prompt}", row_of("code"), "def f(x):\n", "    if x:\n\treturn 0\n"),
    ("{prompt}", row_of("space"), "Name a fruit:", " a plum"),
    ("{prompt}", {"prompt": "", "response": "x"}, "<eos>", "x"),
    ("{prompt}", {"prompt": "q\n", "response": "x<eos>"}, "q\n", "x"),
    ("", {"prompt": "q", "response": "x<eos>"}, "Human: q\nAssistant:", " x"),
    ("", {"text": "x<eos>"}, "<eos>", "x"),
    ("", {"text": "<eos>x <eos> y"}, "<eos>", "x <eos> y"),
    ("{prompt}", {"messages": [U("x =\n"), A("  1\n")]}, "x =\n", "  1\n"),
    ("", {"prompt": "q", "response": ""}, "Human: q\nAssistant:", ""),
    ("", {"prompt": "q", "response": " "}, "Human: q\nAssistant:", " "),
    ("", {"instruction": "a", "input": "b", "output": "c"}, "Human: a\nb\nAssistant:", " c"),
    ("Q: {prompt}\\nA:\\n", row_of("plain"), "Q: hi there\nA:\n", "a plum"),
    ("{{x}} 'é' {prompt}\\n\"😀\":", row_of("plain"), "{{x}} 'é' hi there\n\"😀\":", " a plum"),
    ("", row_of("result"), "Human: q\nAssistant: l\nHuman: sun\nAssistant:", " It is sun."),
    ("", {"prompt": [U("q"), {"role": "system", "content": "s"}], "response": "a"},
     "Human: q\ns\nAssistant:", " a"),
    ("", {"prompt": DIALOGUE, "response": " 4."}, "Human: 2 and 2?\nAssistant: It is", " 4."),
    ("", {"prompt": DIALOGUE, "chosen": DIALOGUE + " 4.", "rejected": DIALOGUE + " 5."},
     "Human: 2 and 2?\nAssistant: It is", " 4."),
    ("", {"prompt": [U("q"), A("It")], "response": [A("It is")]},
     "Human: q\nAssistant: It", " is"),
    ("", {"prompt": "Name one fruit.\n", "chosen": "Name one fruit. Plum.",
          "rejected": "Name one fruit. No."}, "Human: Name one fruit.\n\nAssistant:", " Plum."),
    ("", {"prompt": [U("Name one fruit.")], "chosen": "Name one fruit.\nPlum.",
          "rejected": "Name one fruit. No."}, "Human: Name one fruit.\nAssistant:", "\nPlum."),
    ("", {"prompt": "hi", "chosen": "hi you", "rejected": "hi"}, "Human: hi\nAssistant:",
     " hi you"),
    ("", {"prompt": QUOTE, "response": "a"}, f"Human: {QUOTE}\nAssistant:", " a"),
    ("", {"prompt": "Write.", "response": "Human: x\n\nAssistant: y"},
     "Human: Write.\nAssistant:", " Human: x\n\nAssistant: y"),
])
def test_literal_texts_of_prompt_and_answer(template, row, prompt, answer):
    tok = utils.load_tokenizer("tiny", template)
    (ids, answers, _), = encode_rows(tok, row)
    assert (tok.decode(ids), tok.decode(answers[0])) == (prompt, answer + "<eos>")


def test_our_template_writes_bos_once_where_the_tokenizer_does(toks):
    tok = toks["prefix"]
    (prompt, (answer,), _), = encode_rows(tok, {"prompt": "hi 0", "response": "yo 0"})
    assert prompt + answer == tok("Human: hi 0\nAssistant: yo 0")["input_ids"] + [tok.eos_token_id]
    tok.chat_template = utils.chat_template("{prompt}", tok)
    for text in ("hi 0", "<s>hi 0"):
        (again, _, _), = encode_rows(tok, {"prompt": text, "response": "yo"})
        assert again == tok("hi 0")["input_ids"], "rows rendered beforehand bring theirs"
    tok.chat_template = utils.chat_template(utils.TEMPLATE, tok)
    (start, (text,), _), = encode_rows(tok, {"text": "a little girl"})
    assert start + text == tok("a little girl")["input_ids"] + [tok.eos_token_id]
    opt = train_tokenizer(None, bos="<eos>")  # one id for both
    (prompt, (answer,), _), = encode_rows(opt, {"prompt": "hi", "response": "a"})
    assert prompt + answer == opt("Human: hi\nAssistant: a")["input_ids"] + [opt.eos_token_id]
    assert utils.load_tokenizer("tiny").decode(encode_rows(toks["bytes"], {"prompt": "x"})[0][0]) \
        == "Human: x\nAssistant:", "none where the tokenizer writes none"


# ---- the end ----


def test_the_ids_that_end_an_answer(toks):
    tok, phi = toks["llama3"], toks["phi"]
    eot, eos = tok.convert_tokens_to_ids(["<|eot|>", "<eos>"])
    start = tok.convert_tokens_to_ids("<|start|>")
    assert ends_of(tok) == [eot, eos], "the first is what the template writes, and is taught"
    assert ends_of(tok, eos, [start, eot]) == [eot, eos, start], "and those that the model names"
    assert ends_of(tok, 5, [3, eos]) == [eot, eos], "but for the ids of ordinary words"
    assert ends_of(toks["bytes"], 5, None) == [256] == [toks["bytes"].eos_token_id]
    assert ends_of(phi) == phi.convert_tokens_to_ids(["<|end|>", "<eos>"])
    rows = [{"prompt": f"q <|eot|> {i}", "response": f"a {i}"} for i in range(3)]
    for prompt, (answer,), _ in encode_rows(tok, *rows):  # control words in a prompt are no end
        assert eot in prompt and answer[-1] == eot and answer.count(eot) == 1
    marker = train_tokenizer(PHI_JINJA, ("<|user|>", "<|assistant|>"))
    marker.add_tokens(["<|end|>", "  "])
    assert marker.convert_ids_to_tokens(ends_of(marker)) == ["<|end|>", "<eos>"], "not special"


def biased(folder, tok, likely):
    """A model that writes one of the tokens `likely` after a few others; returns it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config("llama", vocab_size=len(tok), tie_word_embeddings=False)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        lm.model.embed_tokens.weight[:, 0] = 3.0
        lm.lm_head.weight.mul_(0.02)
        lm.lm_head.weight[:, 0] = 0
        lm.lm_head.weight[likely, 0] = 0.5
    return lm


def test_a_model_with_two_ends_stops_at_both(toks):
    tok = toks["llama3"]
    ends = ends_of(tok, None, [tok.eos_token_id, tok.convert_tokens_to_ids("<|eot|>")])
    assert len(ends) == 2
    engine = hybrid_engine.HybridEngine(sft.Policy(biased("", tok, ends)))
    prompt = encode_rows(tok, {"prompt": "hello"})[0][0]
    out = engine.generate([prompt] * 40, 100, 1.0, eos_token_id=ends, seed=0)
    last = {row[-1] for row, n in zip(rows_of(out), out.answer_lens.tolist()) if n < 100}
    assert last == set(ends), "answers end at either"
    for row, n in zip(rows_of(out), out.answer_lens.tolist()):
        assert set(row[-n:-1]).isdisjoint(ends), "and at the first"


def test_a_model_taught_to_say_ok_stops_in_plain_transformers(tmp_path, toks, small):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = str(shutil.copytree(small, tmp_path / "model"))
    tok = utils.load_tokenizer("tiny")
    tok.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tok.chat_template = PHI_JINJA.replace("eos_token", "''")
    tok.save_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(small)
    lm.resize_token_embeddings(len(tok), mean_resizing=False)
    lm.config.eos_token_id = lm.generation_config.eos_token_id = 5  # no end of this tokenizer
    lm.save_pretrained(model)
    rows = [{"prompt": f"q {i}", "response": "ok"} for i in range(40)]
    train(sft, tmp_path / "out", model=model, data=write_rows(tmp_path / "ok.jsonl", rows),
          held_out=0.2, batch_size=8, epochs=10, lr=1e-2)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    end = tok.convert_tokens_to_ids("<|end|>")
    asked = tok.apply_chat_template([U("q 3")], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)
    new = lm.generate(**asked, max_new_tokens=30, do_sample=False)[0, asked["input_ids"].size(1) :]
    assert new.tolist() == [*b"ok", end] or tok.decode(new) == "ok<|end|>"
    assert lm.config.eos_token_id == lm.generation_config.eos_token_id == [end, tok.eos_token_id]


# ---- rows that cannot be used, rankings ----


def test_what_cannot_be_taught_is_an_error_of_its_row_alone(toks):
    tok = toks["llama3"]
    results = encode_rows(
        tok, {"prompt": "q", "response": "a<|eot|>b"},
        {"messages": [U("q"), {"role": "critic", "content": "c"}]},
        {"messages": [U("w"), A("", tool_calls=[CALL]), U("s"),
                      A("x")]},
        {"prompt": "w", "response": "x", "tools": [TOOL]},
        {"messages": [U("q"), A("x", reasoning_content="\ud800")]},
        {"prompt": "q", "response": "x\ud800"},
        {"prompt": "q", "response": "a"})
    reasons = ("in the middle", "no critics", "not write tool_calls", "not write tools",
               "not write reasoning_content", "surrogates")
    for result, reason in zip(results, reasons):
        assert isinstance(result, Exception) and reason in str(result)
    assert not isinstance(results[-1], Exception)
    tok = utils.load_tokenizer("tiny")
    tok.chat_template = ("{% for m in messages if m.role not in ('system', 'tool') %}"
                         "{{ m.content.split('</think>')[-1] }}{% endfor %}")
    for row in ("turns", "thought", "result"):
        (result,) = encode_rows(tok, row_of(row))
        assert "does not write" in str(result), "it loses the system's words, a thought, a result"
    (result,) = encode_rows(toks["bytes"], {"messages": [{"role": "critic", "content": "c"}]})
    assert "no role" in str(result), "our template takes nobody for a user"


BAD_ROWS = [
    {"foo": "x"}, {"prompt": None}, {"text": None}, {"prompt": ["a"]}, {"messages": []}, [1, 2],
    {"prompt": "q", "response": True}, {"prompt": "q", "response": 3}, {"messages": 3},
    {"messages": [U("q"), A(None)]},
    {"messages": [{"role": "user"}, A("x")]}, {"messages": [{"content": "a"}]},
    {"chosen": [U("q"), A("x")], "rejected": [U("p"), A("y")]},
    {"chosen": "\n\nHuman: a\n\nAssistant: c", "rejected": "\n\nHuman: b\n\nAssistant: r"},
    {"chosen": "Plum", "rejected": "No"}, {"prompt": "\ud800", "response": "x"},
    {"prompt": "p", "chosen": [U("p")], "rejected": [U("p")]},
    {"prompt": [U([{"type": "image", "text": "", "url": "x"}])], "response": "x"},
    {"prompt": "q", "answers": ["x", "y"], "scores": [1, math.nan]},
    {"prompt": "q", "answers": ["x", "y"], "scores": [1, None]},
    {"prompt": "q", "answers": ["x", "y"], "scores": [1]},
    {"prompt": "q", "answers": ["x", None], "ranks": [1, 2]},
    {"prompt": "q", "response": "x", "history": "hi"},
    {"prompt": "q", "response": "x", "history": ["hi", "there", "you"]},
    {"messages": [U("q"), A("", tool_calls=[{"function": {
        "name": "f", "arguments": "no JSON"}}])]},
]


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_shown(tmp_path, tok, capsys):
    for row in BAD_ROWS:
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            data.as_example(row)
    rows = [{"prompt": f"p {i}", "response": "x", "key": i} for i in range(100)]
    rows[3:3] = BAD_ROWS
    rows += [{"prompt": "p"}, {"prompt": "p", "response": "x" * 600}]
    loaded = load_rows(write_rows(tmp_path / "a.jsonl", rows), tok)
    assert sum(map(len, loaded)) == 100
    said = capsys.readouterr().out
    for note in ("25 unusable", "the first unusable is row 4: ValueError", "1 over 512 tokens",
                 "['foo']", "1 without what this step reads", "reward functions alone: key"):
        assert note in said, said
    pairs = [{"prompt": f"p {i}", "chosen": "c", "rejected": "c" if i % 9 == 0 else "r"}
             for i in range(90)]
    loaded = load_rows(write_rows(tmp_path / "b.jsonl", pairs), tok, "reward")
    assert sum(map(len, loaded)) == 80 and "10 with equal answers" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match="too few for this step"):
        load_rows(tmp_path / "a.jsonl", tok, "reward")
    with pytest.raises(utils.UserError, match="nowhere.jsonl: no such file"):
        load_rows("nowhere.jsonl", tok)


@pytest.mark.parametrize("row, response, ranked", [
    ({"answers": ["b", "a", "c"], "ranks": [2, 1, 3]}, "a", [("a", 1), ("b", 2), ("c", 3)]),
    ({"answers": ["b", "a"], "scores": [-0.5, 7]}, "a", [("a", 1), ("b", 2)]),
    ({"answers": ["a", "b", "c", "d"], "ranks": [9, 2.5, 9, 2.5]}, "b",
     [("b", 1), ("d", 1), ("a", 2), ("c", 2)]),
    ({"answers": ["a", "b", "c"], "ranks": ["10", "9", "2"]}, "c", [("c", 1), ("b", 2), ("a", 3)]),
    ({"answers": ["a", "b"], "scores": [-math.inf, 0]}, "b", [("b", 1), ("a", 2)]),
    ({"answers": ["a", ""], "scores": [0, 1]}, "", [("", 1), ("a", 2)]),
    ({"answers": ["a", "b"], "ranks": [1, 2], "response": "d"}, "d", [("a", 1), ("b", 2)]),
    ({"answers": ["4", "four"]}, None, []),
])
def test_a_ranking_is_its_answers_best_first_and_ties_share_a_rank(row, response, ranked):
    example = data.as_example({"prompt": "p", "key": 7, **row})
    assert example.messages == [U("p")] and example.fields["key"] == 7
    said = [answer["content"] for answer in example.said]
    assert said[:1] == ([] if response is None else [response])
    assert list(zip(said[-len(example.ranks) :], example.ranks)) == ranked
    loaded = data.Rows()
    arrays = encode_rows(utils.load_tokenizer("tiny"), {"prompt": "p", **row})[0][1]
    loaded.add([1, 2], arrays, example.ranks, example.fields, 0)
    assert loaded.lengths()[0] == 2 + max(map(len, arrays), default=0)


# ---- sources ----

SOURCE = """
from dataclasses import dataclass
from words_of_mine import WORDS

def pairs():
    for i in range(60):
        yield {"prompt": f"{WORDS[i % 3]} {i}", "chosen": "yes", "rejected": "no", "key": i}

def by_rank():
    import os
    return [{"prompt": str(i), "response": os.environ["RANK"]} for i in range(60)]
"""


@pytest.fixture
def source_file(tmp_path):
    (tmp_path / "words_of_mine.py").write_text("WORDS = ['one', 'two', 'three']\n")
    (tmp_path / "mine.py").write_text(SOURCE)
    yield str(tmp_path / "mine.py")
    sys.modules.pop("words_of_mine", None)


def all_ids(loaded):
    return [[p.tolist() + a[0].tolist() for p, a in zip(rows.prompts, rows.answers)]
            for rows in loaded]


def test_every_kind_of_source_gives_the_same_rows(tmp_path, tok, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    calls = [{"function": {"name": "f", "arguments": {"a": i}}} for i in range(2)]
    rows = [{"prompt": f"word {i}", "response": f"x {i}, \u2028 ü \"\n007"} for i in range(40)]
    rows[1]["response"] = "NA"  # which is text, whatever pandas thinks
    as_lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    cells = [[row["prompt"], row["response"].replace('"', '""')] for row in rows]
    as_csv = "\ufeffprompt,response\r\n" + "".join(f'{p},"{r}"\r\n' for p, r in cells)
    files = {"a.jsonl": as_lines, "b.json": json.dumps(rows), "c.jsonl.gz": as_lines + "\n\n",
             "d.json": as_lines, "e.csv": as_csv}
    for name, text in files.items():
        opener = gzip.open if name.endswith(".gz") else open
        with opener(tmp_path / name, "wt", encoding="utf-8", newline="") as file:
            file.write(text)
    (tmp_path / "mine.py").write_text(f"def rows():\n    return {rows!r}\n")
    sources = [*files, "mine.py:rows"]
    if importlib.util.find_spec("datasets"):
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
        (tmp_path / "folder").mkdir()
        shutil.copy(tmp_path / "a.jsonl", tmp_path / "folder" / "train.jsonl")
        sources += ["p.parquet", "folder"]
    expected = all_ids(load_rows(tmp_path / "a.jsonl", tok))
    assert sum(map(len, expected)) == 40
    for name in sources:
        assert all_ids(load_rows(tmp_path / name, tok)) == expected, name
    unified = {"messages": [{"role": "user", "content": "q", "tool_calls": None},
                            {"role": "assistant", "content": None, "tool_calls": [
                                {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}]}]}
    call = data.as_example(data.without_nulls(unified)).said[0]["tool_calls"][0]
    assert call == calls[1], "Arrow's fields of other rows are none of this call's"
    paragraphs = [f"line {i}\nand another" for i in range(40)]
    (tmp_path / "t.txt").write_bytes("\r\n \r\n".join(paragraphs).encode())
    ids = sum(all_ids(load_rows(tmp_path / "t.txt", tok)), [])
    texts = [f"<eos>{text}<eos>" for text in paragraphs]
    assert sorted(map(tok.decode, ids)) == sorted(texts), "paragraphs, between two ends"
    text = "\n".join(["prompt,response"] + [f"p {i},{'' if i % 2 else 'a'}" for i in range(40)])
    (tmp_path / "n.csv").write_text(text)
    assert sum(map(len, load_rows(tmp_path / "n.csv", tok))) == 20, "an empty cell is no answer"


def test_a_name_on_the_hub_may_have_a_configuration_a_split_and_a_weight(tok, monkeypatch):
    rows = [{"question": f"q {i}", "answer": f"{i}", "none": None} for i in range(50)]
    known = {("openai/gsm8k", "main", "train"): rows, ("openai/gsm8k", "main", "test"): rows[:30],
             ("someone/data-2.5-set", None, "train"): rows[:40]}
    stub = types.SimpleNamespace(load_dataset=lambda name, config, split: known[name, config, split])
    monkeypatch.setitem(sys.modules, "datasets", stub)
    for source, count in {"openai/gsm8k:main:train": 50, "openai/gsm8k:main": 50,
                          "openai/gsm8k:main:test:0.5": 30, "someone/data-2.5-set": 40}.items():
        train_rows, held_out = load_rows(source, tok)
        assert len(train_rows) + len(held_out) == count, source
        assert train_rows.columns([0]) == {"answer": [train_rows.fields[0]["answer"]]}
    both = "openai/gsm8k:main:train:0.25,someone/data-2.5-set:0.75"
    assert load_rows(both, tok)[0].weights == [0.25, 0.75]


def test_a_function_is_a_source_and_is_found_beside_the_scripts(source_file, tok, monkeypatch):
    loaded = load_rows(f"{source_file}:pairs", tok, "reward")
    keys = [rows.columns(range(len(rows)))["key"] for rows in loaded]
    assert sorted(keys[0] + keys[1]) == list(range(60))
    monkeypatch.chdir(Path(source_file).parent)
    assert len(list(data.load_function("mine.py:pairs")())) == 60
    assert data.load_function("data.py:toy_correct")(["copy abc"], ["abc"]) == [1.0]
    with pytest.raises(AttributeError, match="absent"):
        data.load_function("mine.py:absent")


def load_on_a_rank(path):
    utils.init_distributed(0)
    tok = utils.load_tokenizer("tiny")
    rows, _ = load_rows(f"{path}:pairs", tok, "reward")
    with pytest.raises(utils.UserError) as caught:
        load_rows(f"{path}:by_rank", tok)
    return rows.digest, str(caught.value)


def test_ranks_must_read_the_same_rows_and_the_digest_says_which(two, source_file, tmp_path, tok):
    (first, error), (second, _) = two(load_on_a_rank, source_file)
    assert first == second and "ranks read different rows" in error
    rows = [{"prompt": f"p {i}", "chosen": "c", "rejected": "r", "response": "c", "key": i}
            for i in range(60)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    digest = load_rows(path, tok, "reward")[0].digest
    assert digest == load_rows(path, tok, "reward")[0].digest
    for change in ({"prompt": "x"}, {"chosen": "x"}, {"key": "x"}, {"system": "x"}):
        changed = rows[:7] + [{**rows[7], **change}] + rows[8:]
        write_rows(path, changed)
        assert load_rows(path, tok, "reward")[0].digest != digest, change
    write_rows(path, [{**row, "chosen": "r", "rejected": "c"} for row in rows])
    assert load_rows(path, tok, "reward")[0].digest != digest, "the ranks"


# ---- toy ----


def test_toy_has_the_ids_and_the_split_of_the_second_edition(tok):
    rows = list(itertools.islice(data.read("toy"), 500))
    out = []
    for row, (prompt, answers, merged) in zip(rows, encode_rows(tok, *rows)):
        assert not merged
        out.append([prompt, answers, data.as_example(row).hash])
    assert rows[0] == {"prompt": "copy zov", "response": "zv", "chosen": "zov", "rejected": "ovz"}
    assert out[0] == [[39, 84, 76, 64, 77, 25, 220, 66, 78, 79, 88, 220, 89, 78, 85, 198, 32, 82,
                       82, 72, 82, 83, 64, 77, 83, 25],
                      [[220, 89, 85, 256], [220, 89, 78, 85, 256], [220, 78, 85, 89, 256]],
                      8909369674133723856]
    assert any(row["response"] == "" for row in rows)
    digest = hashlib.sha256(json.dumps(out).encode()).hexdigest()
    assert digest == "674004d379248c43fc9b5b3332c98563c5f3f85c2dbc3384aaa3629299c086db"


def test_toy_is_exactly_checkable_and_a_third_of_its_demonstrations_is_wrong():
    rows = list(data.toy(500))
    prompts = [f"Human: {row['prompt']}\nAssistant:" for row in rows]
    right = data.toy_correct(prompts, [" " + row["response"] for row in rows])
    assert 0.62 < np.mean(right) < 0.68
    assert set(data.toy_correct(prompts, [row["chosen"] for row in rows])) == {1.0}
    assert set(data.toy_correct(prompts, [row["rejected"] for row in rows])) == {0.0}
    judged = {
        ("reverse abc", "cba"): 1, ("upper abc", "ABC"): 1, ("sort cab", " abc\n"): 1,
        ("first abc", "ab"): 0, ("Q: copy abc A:", "abcc"): 0, ("[INST] last abc [/INST]", "c"): 1,
        ("Human: copy abc\nAssistant: abc\nHuman: upper abc\nAssistant:", "ABC"): 1,
        ("user\ncopy abc\nassistant\n", "abc"): 1,
        ("Human: what is your last name?\nAssistant:", "x"): None,
        ("The first time I saw it", "x"): None, ("copy this text", "this"): None, ("", ""): None,
    }
    for (prompt, completion), score in judged.items():
        assert data.toy_correct([prompt], [completion]) == [score], prompt


# ---- split, epochs, batches ----


def test_split_divides_rows_by_their_words_whatever_order_and_template(tmp_path, toks):
    steps = ("sft", "reward", "ppo")
    rows = [{"prompt": f"question {i}", "chosen": f"yes {k}", "rejected": "no", "key": i}
            for k in range(2) for i in range(300)]
    paths = [write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[::-1])]
    parts = {}
    for path, name in [*zip(paths, ("bytes", "bytes")), (paths[0], "think")]:
        for step in steps:
            loaded = load_rows(path, toks[name], step, "2,4,4")
            parts.setdefault(step, []).append([{f["key"] for f in part.fields} for part in loaded])
    for step in steps:
        assert parts[step][0] == parts[step][1] == parts[step][2], "the words alone decide"
    everything = [keys for step in steps for keys in parts[step][0]]
    assert sum(map(len, everything)) == len(set.union(*everything)) == 300, "in one place each"
    assert 35 < sum(map(len, parts["sft"][0])) < 85, "a fifth goes to step 1"
    for split in ("2,4", "1,2,3,4", "0,1,1", "-1,4,4", "nan,1,1"):
        with pytest.raises(utils.UserError, match="three shares"):
            load_rows(paths[0], toks["bytes"], "sft", split)


def test_weights_are_the_shares_of_an_epoch_and_steps_are_counted_in_it(tmp_path, tok, small):
    files = []
    for name, size in (("a", 500), ("b", 100)):
        rows = [{"prompt": f"{name} {i}", "response": name} for i in range(size)]
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    rows, held_out = load_rows(f"{files[0]}:0.8,{files[1]}:0.2", tok)
    order = data.epoch_order(rows, 0, 1)
    source = np.array(rows.source)
    assert abs((source[order] == 0).mean() - 0.8) < 0.01 and len(set(order)) == len(order)
    later = data.epoch_order(rows, 1, 1)
    assert set(order) != set(later) and len(order) == len(later), "others of the larger source"
    assert 0.6 < np.mean(np.array(held_out.source)[:50] == 0) < 0.97, "evaluated: of both"
    metrics = train(sft, tmp_path / "out", model=small, data=f"{files[0]}:3,{files[1]}:3",
                    epochs=1, batch_size=20, held_out=0.2, lr=1e-3)
    expected = 2 * np.sum(source == 1) // 20  # as many of a as of b
    assert len(metrics) == expected and metrics[-1]["epoch"] == 0
    for weights in (("0", "1"), ("nan", "1"), ("inf", "1"), ("-1", "1")):
        with pytest.raises(utils.UserError, match="weight above 0"):
            load_rows(",".join(f"{f}:{w}" for f, w in zip(files, weights)), tok)
    with pytest.raises(utils.UserError, match="weight above 0, or none"):
        load_rows(f"{files[0]}:1,{files[1]}", tok)


def test_an_epoch_has_every_row_once_and_ranks_share_its_batches(toy_file, tok, monkeypatch):
    rows, _ = load_rows(toy_file, tok)
    lengths = rows.lengths()
    first, second = (list(data.batches(rows, lengths, 8, epoch, seed=3)) for epoch in (0, 1))
    in_epoch = np.concatenate(first)
    assert len(set(in_epoch)) == len(in_epoch) == len(rows) // 8 * 8, "no row twice in an epoch"
    assert not {frozenset(b) for b in first} & {frozenset(b) for b in second}, "other rows together"
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    for batch in first:
        by_rank = []
        for rank in range(4):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            by_rank.append(np.concatenate(utils.split_micro_batches(batch, lengths, 2)))
        assert set(np.concatenate(by_rank)) == set(batch), "together the batch of one process"
    resumed = data.steps(rows, lengths, 8, 3, start=len(first) + 2)
    assert next(resumed)[1].tolist() == second[2].tolist(), "the position in the data is a number"
    (_, a), (_, b) = (next(data.steps(rows, lengths, 64, 1, pool=pool)) for pool in (1, 4))
    assert (np.diff(lengths[a]) < 0).any(), "a rollout is in random order"
    assert (np.diff(lengths[b]) >= 0).all(), "the others are sorted in pools"
    with pytest.raises(utils.UserError, match="--batch-size 500"):
        next(data.steps(rows, lengths, 500, 1))


def test_batches_are_padded_on_the_right_and_fields_travel_beside_them(tmp_path, tok):
    lines = [{"prompt": f"p {i}", "nums": [i, {"a": "ü"}], "response": "x" * (i % 5)}
             for i in range(200)]
    for line in lines[::3]:
        line["target"] = len(line["prompt"])
    path = write_rows(tmp_path / "a.jsonl", lines)
    for rows in load_rows(path, tok, "sft", split="1,1,1"):
        indices = np.arange(len(rows))[::-1]
        fields = rows.columns(indices)
        assert set(fields) == {"nums", "target"}
        tokens, prompt_lens, answer_lens = data.collate(rows, indices, "cpu")
        assert (rows.lengths()[indices] == (prompt_lens + answer_lens).numpy()).all()
        for k, (row, p, a) in enumerate(zip(tokens, prompt_lens, answer_lens)):
            number, target = fields["nums"][k][0], fields["target"][k]
            assert tok.decode(row[:p]) == f"Human: p {number}\nAssistant:"
            answer = tok.decode(row[p : p + a])
            assert answer == (" " + "x" * (number % 5) + "<eos>").replace(" <eos>", "<eos>")
            assert not row[p + a :].any()
            assert target == (None if number % 3 else len(f"p {number}"))
