import functools
import importlib.metadata
import json

import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from jaxgpt import chat
from jaxgpt.chat import (
    QWEN2,
    QWEN2_5,
    ChatML,
    Gemma,
    Jinja,
    Llama2,
    Llama3,
    Message,
    Qwen3,
    choose,
    conversation,
    render,
)
from jaxgpt.chat.sandbox import jinja_of
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Bytes, HuggingFace

CORPUS = [
    "Hello there, how are you? I am fine.\n\nAnd you?\n",
    "system user assistant model think thinking You are a helpful assistant.\n\n\n",
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n[INST] <<SYS>> [/INST]\n",
    "<|im_start|> <|im_end|> <|eot_id|> <start_of_turn> </s> a  b   c\n  d\r\n\r\n",
] * 20
# As in Qwen2's tokenizer.json.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIALS = {
    "llama3": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>"),
    ),
    "llama2": ("<unk>", "<s>", "</s>"),
    "chatml": CHATML,
    "qwen3": CHATML,
    "llama2 sentencepiece": ("<unk>", "<s>", "</s>"),
    "gemma sentencepiece": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    "gemma": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
}

# The published formats, reimplemented.
EACH = "{% for m in messages %}"
LLAMA3 = (
    "{{ bos_token }}{% if date is defined %}{% set system = '' %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ date }}\n\n{{ system }}<|eot_id|>"
    "{% endif %}"
    + EACH
    + "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% set ns = namespace(system='') %}"
    + EACH
    + "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' ~ m.content ~ '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ (ns.system ~ m.content).strip() }}"
    "{{ ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ ' ' ~ m.content.strip() ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    EACH + "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT = (
    "{%% if messages[0].role != 'system' %%}{{ '<|im_start|>system\n%s<|im_end|>\n' }}{%% endif %%}"
)
QWEN3 = (
    "{% set last_query_index = messages | length - 2 %}"
    + EACH
    + "{% set content, thought = m.content, '' %}"
    + "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > last_query_index %}"
    "{{ '<think>\n' ~ thought ~ '\n</think>\n\n' }}{% set content = content.lstrip('\n') %}"
    "{% endif %}{{ content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(system='') %}"
    + EACH
    + "{% if m.role == 'system' %}{% set ns.system = m.content ~ '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}"
    "{{ ns.system ~ m.content | trim ~ '<end_of_turn>\n' }}{% set ns.system = '' %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Family, our template, the published one, its own options.
FORMATS = {
    "llama3": ("llama3", Llama3(), LLAMA3, {}),
    "llama3.1": ("llama3", Llama3(date="26 Jul 2024"), LLAMA3, {"date": "26 Jul 2024"}),
    "llama2": ("llama2", Llama2(), LLAMA2, {}),
    "chatml": ("chatml", ChatML(), TURNS, {}),
    "qwen2": ("chatml", QWEN2, DEFAULT % QWEN2.system + TURNS, {}),
    "qwen2.5": ("chatml", QWEN2_5, DEFAULT % QWEN2_5.system + TURNS, {}),
    "qwen3": ("qwen3", Qwen3(), QWEN3, {}),
    "qwen3 unthinking": ("qwen3", Qwen3(thinking=False), QWEN3, {"enable_thinking": False}),
    "gemma": ("gemma", Gemma(), GEMMA, {}),
}
LIKE_SENTENCEPIECE = {
    "llama2 sentencepiece": ("llama2 sentencepiece", Llama2(), LLAMA2, {}),
    "gemma sentencepiece": ("gemma sentencepiece", Gemma(), GEMMA, {}),
}
ALL = FORMATS | LIKE_SENTENCEPIECE
formats = pytest.mark.parametrize("name", FORMATS)
all_formats = pytest.mark.parametrize("name", ALL)


@functools.cache
def trained():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@functools.cache
def trained_like_sentencepiece(prefix):
    """As the tokenizer.json of Llama 2, with a space before all text, and of Gemma."""
    bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    spaces = tokenizers.normalizers.Replace(" ", "\u2581")
    prepend = [tokenizers.normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = tokenizers.normalizers.Sequence([*prepend, spaces])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("\u2581", "merged_with_next")
    decoders = tokenizers.decoders
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *bytes], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    parsed = json.loads(tokenizer.to_str())
    parsed["pre_tokenizer"] = None
    parsed["added_tokens"] = []
    return json.dumps(parsed)


@functools.cache
def backend(family):
    tokenizer = tokenizers.Tokenizer.from_str(
        trained_like_sentencepiece(prefix="llama2" in family)
        if family in LIKE_SENTENCEPIECE
        else trained()
    )
    tokenizer.add_special_tokens(list(SPECIALS[family]))
    if family == "qwen3":
        tokenizer.add_tokens(
            [tokenizers.AddedToken(t, normalized=False) for t in ("<think>", "</think>")]
        )
    return tokenizer


def config(family, template=None):
    begin, end = {
        "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
        "llama2": ("<s>", "</s>"),
        "gemma": ("<bos>", "<eos>"),
    }.get(family.split()[0], (None, "<|im_end|>"))
    values = {"bos_token": begin, "eos_token": {"content": end, "special": True}}
    return values if template is None else {**values, "chat_template": template}


@functools.cache
def made(family, template=None):
    if template:
        pytest.importorskip("jinja2", reason="renders chat templates; an extra")
    return HuggingFace(backend(family).to_str(), config(family, template))


def says(*contents, system=None):
    turns = [
        {"role": ("user", "assistant")[position % 2], "content": content}
        for position, content in enumerate(contents)
    ]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS = [
    says("Hello"),
    says("Hello", "Hello there!"),
    says("Hello", "Fine, and you?\n\n", " I am ", "  good \n", "a\n", system="You are helpful.\n"),
    says("\n\nx = 1\n", "```py\nx\n```", "Ça va 🙂?", "天地", system=" terse"),
]
THOUGHT = says("1+1?", "<think>\neasy\n</think>\n\n2", "2+2?", "<think>\nalso\n</think>\n\n4")


def theirs(family, template):
    transformers = pytest.importorskip("transformers", reason="is what we compare with")
    values = {**config(family), "eos_token": config(family)["eos_token"]["content"]}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(family), chat_template=template, **values
    )


@all_formats
@pytest.mark.parametrize("messages", [*CONVERSATIONS, THOUGHT, THOUGHT[:3]])
def test_ids_are_those_of_transformers(name, messages):
    family, template, published, options = ALL[name]
    open = messages[-1]["role"] == "user"
    expected = theirs(family, published).apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=open, **options
    )
    assert render(template, made(family), messages, open=open).tokens == expected


GOLDEN = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n{Hello<|eot_id|>}<|start_header_id|>user<|end_header_id|>\n\nBye"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge "
    "Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "{Hello<|eot_id|>}<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]{ Hello </s>}<s>[INST] Bye "
    "[/INST]",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n{Hello<|im_end|>}\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    "{Hello<end_of_turn>}\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
}
GOLDEN["qwen2"] = GOLDEN["qwen2.5"] = GOLDEN["qwen3"] = GOLDEN["chatml"]
GOLDEN["qwen3 unthinking"] = GOLDEN["chatml"] + "<think>\n\n</think>\n\n"


def marked(tokenizer, rendered):
    """The text, with the parts that have a loss in braces."""
    text, inside = "", 0.0
    for token, weight in zip(rendered.tokens, rendered.weights, strict=True):
        if weight != inside:
            text += "{" if weight == 1.0 else "}"
        text, inside = text + tokenizer.decode([token]), weight
    return text + "}" * (inside == 1.0)


@formats
def test_a_conversation_reads_as_published(name):
    family, template, *_ = FORMATS[name]
    messages = says("Hi", "Hello", "Bye", system="Be brief.")
    rendered = render(template, made(family), messages, open=True)
    assert marked(made(family), rendered) == GOLDEN[name]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (ChatML(), "<|im_start|>user\nHi<|im_end|>\n"),
        (
            QWEN2,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n",
        ),
        (
            QWEN2_5,
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
            "assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
        ),
        (Qwen3(), "<|im_start|>user\nHi<|im_end|>\n"),
    ],
)
def test_a_family_has_its_own_default_system_text(template, text):
    tokenizer = made("qwen3")
    assert tokenizer.decode(render(template, tokenizer, says("Hi")).tokens) == text


@pytest.mark.parametrize(
    ("template", "answer", "text"),
    [
        (Qwen3(), "4", "{<think>\n\n</think>\n\n4<|im_end|>}\n"),
        (Qwen3(), "<think>\nhm\n</think>\n\n4", "{<think>\nhm\n</think>\n\n4<|im_end|>}\n"),
        (Qwen3(thinking=False), "4", "<think>\n\n</think>\n\n{4<|im_end|>}\n"),
        (Qwen3(thinking=False), "<think>hm</think>4", "{<think>\nhm\n</think>\n\n4<|im_end|>}\n"),
    ],
)
def test_qwen3_keeps_and_learns_only_the_last_thought(template, answer, text):
    tokenizer = made("qwen3")
    messages = [*THOUGHT[:3], {"role": "assistant", "content": answer}]
    assert marked(tokenizer, render(template, tokenizer, messages)) == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n{2<|im_end|>}\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n" + text
    )


def test_qwen3_writes_its_thoughts_with_their_own_tokens():
    tokens = render(Qwen3(), made("qwen3"), THOUGHT).tokens
    ids = [backend("qwen3").token_to_id(name) for name in ("<think>", "</think>")]
    assert [token for token in tokens if token in ids] == ids


LITERALS = sorted({name for names in SPECIALS.values() for name in names} | {"user\n", "Hi", "\n"})
text = st.lists(st.sampled_from(LITERALS) | st.text(max_size=4), min_size=1, max_size=5).map(
    "".join
)
contents = text.filter(lambda text: text and "think>" not in text)


@formats
@settings(max_examples=60, deadline=None)
@given(contents, contents, contents, contents)
@example("<|im_end|>\n<|im_start|>system\n", "\n\nx", " \n", "</s><s>")
@example("<end_of_turn>\n", "<|eot_id|>", "<|begin_of_text|>", " <bos> ")
def test_text_is_text_and_weights_cover_the_answers(name, system, first, answer, second):
    family, template, *_ = FORMATS[name]
    tokenizer = made(family)
    texts = (system, first, answer, second)
    assume(family != "llama2" or not any("INST]" in text or "SYS>>" in text for text in texts))
    messages = says(first, answer, second, answer, system=system)
    rendered = render(template, tokenizer, messages)

    special = set(tokenizer.specials.values())
    plain = render(template, tokenizer, says("a", "b", "c", "d", system="e"))
    assert [t for t in rendered.tokens if t in special] == [t for t in plain.tokens if t in special]

    learned = [t for t, w in zip(*rendered, strict=True) if w == 1.0]
    said, end = answer, tokenizer.decode([template.stops(tokenizer)[0]])
    if family in ("llama3", "llama2", "gemma"):
        said = answer.strip()
    if family == "llama2":
        said = f" {said} "
    last = said.lstrip("\n") if family == "qwen3" else said
    if name == "qwen3":
        last = "<think>\n\n</think>\n\n" + last
    assert tokenizer.decode(learned) == said + end + last + end
    assert set(rendered.weights) == {0.0, 1.0}
    whole = tokenizer.decode(rendered.tokens)
    assert all(text.strip() in whole for text in texts)


@all_formats
@settings(max_examples=30, deadline=None)
@given(contents, contents)
@example("Hi", "\n\nHello")
@example("Hi", "  Hello")
def test_an_answer_continues_the_prompt_it_is_generated_from(name, question, answer):
    family, template, *_ = ALL[name]
    prompt = render(template, made(family), says(question), open=True)
    whole = render(template, made(family), says(question, answer))
    size = len(prompt.tokens)
    assert whole.tokens[:size] == prompt.tokens
    assert not any(prompt.weights) and not any(whole.weights[:size])
    assert whole.weights[size] == 1.0


@pytest.mark.parametrize(
    ("family", "template", "names"),
    [
        ("llama3", Llama3(), ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]),
        ("llama2", Llama2(), ["</s>"]),
        ("chatml", ChatML(), ["<|im_end|>", "<|endoftext|>"]),
        ("gemma", Gemma(), ["<end_of_turn>", "<eos>"]),
    ],
)
def test_an_answer_ends_at_the_end_of_turn_or_of_text(family, template, names):
    assert template.stops(made(family)) == [made(family).specials[name] for name in names]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "none of the 0 messages is from the user"),
        ([{"role": "system", "content": "x"}], "none of the 1 messages is from the user"),
        (
            [{"role": "narrator", "content": "x"}],
            "message 0 has the unknown role 'narrator'; use system",
        ),
        ([{"role": None, "content": "x"}], r"message 0 has the fields .*; add role and content"),
        ([{"role": "user"}], r"message 0 has the fields \['role'\]; add role and content"),
        ([{"role": "user", "content": None}], "message 0 has content None; use text"),
        (
            [{"role": "user", "content": ""}],
            "message 0 has content ''; a user's message needs text",
        ),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"parts of type \['image_url'\]"),
        ([{"role": "user", "content": "x", "weight": -1}], "message 0 has weight -1; use a number"),
        ([{"role": "user", "content": "x", "weight": True}], "message 0 has weight True"),
        ([{"role": "user", "content": "x", "train": "no"}], "message 0 has train 'no'; use true"),
        ([{"role": "user", "content": "x", "images": ["a"]}], "has images, which is not supported"),
        ([{"role": "user", "content": "x", "name": 3}], "message 0 has name 3; use text"),
        ([*says("x"), {"role": "assistant", "tool_calls": "f()"}], "message 1 has tool_calls 'f"),
        (
            [*says("x"), {"role": "assistant", "tool_calls": ["f()"]}],
            "a tool call that is not JSON",
        ),
        (
            [*says("x"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            r"message 1 has the tool call arguments \[1\]; use a JSON object",
        ),
        ([{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}], "only the assistant"),
        ([Message("user", 3)], "message 0 has content 3"),
        (["x"], "message 0 is str"),
        ("x", "message 0 is str"),
    ],
)
def test_a_bad_conversation_is_refused_with_its_position(messages, error):
    with pytest.raises(InputError, match=error):
        conversation(messages)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (says("x", "y")[1:] + says("x"), "message 0 has role assistant, but must have role user"),
        ([*says("x"), *says("y")], "message 1 has role user, but must have role assistant"),
        ([*says("x", "y"), {"role": "system", "content": "z"}], "message 2 has role system"),
        ([{"role": "system", "content": "z"}] * 2 + says("x"), "message 1 has role system"),
        (
            [*says("x"), {"role": "tool", "content": "z"}],
            "message 1 uses tools, which the chat format Gemma does not",
        ),
    ],
)
def test_a_format_refuses_conversations_it_cannot_render(messages, error):
    with pytest.raises(InputError, match=error):
        render(Gemma(), made("gemma"), messages)


@pytest.mark.parametrize("name", ["llama3", "chatml"])
def test_turns_may_have_any_order_where_the_published_template_has_none(name):
    family, template, published, _ = FORMATS[name]
    system = {"role": "system", "content": "Now."}
    messages = [*says("a", "b")[1:], *says("c"), *says("d", "e"), system, *says("f")]
    expected = theirs(family, published).apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert render(template, made(family), messages, open=True).tokens == expected


def test_an_answer_can_only_follow_a_question():
    with pytest.raises(InputError, match="open=True .* message 1 is already one"):
        render(ChatML(), made("chatml"), says("Hi", "Hello"), open=True)


def test_a_tokenizer_without_the_formats_tokens_is_refused():
    with pytest.raises(InputError, match=r"Gemma needs the special tokens <bos>.*<\|im_start\|>"):
        render(Gemma(), made("chatml"), says("Hi"))


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_llama2_refuses_the_tags_that_are_its_only_borders(tag):
    with pytest.raises(InputError, match="message 1 contains"):
        render(Llama2(), made("llama2"), says("Hi", f"x {tag} y"))


@pytest.mark.parametrize(
    ("family", "published", "template"),
    [
        ("llama3", LLAMA3, Llama3()),
        ("llama3", None, Llama3()),
        ("llama2", LLAMA2, Llama2()),
        ("chatml", None, ChatML()),
        ("chatml", TURNS, ChatML()),
        ("chatml", DEFAULT % QWEN2.system + TURNS, QWEN2),
        ("chatml", (DEFAULT % QWEN2_5.system + TURNS).replace("\n", r"\n"), QWEN2_5),
        ("chatml", DEFAULT % "You are SmolLM" + TURNS, ChatML("You are SmolLM")),
        ("qwen3", QWEN3, Qwen3()),
        ("gemma", GEMMA, Gemma()),
        ("gemma", None, Gemma()),
    ],
)
def test_choose_knows_a_format_by_its_tokens_and_template(family, published, template):
    assert choose(made(family, published)) == template


def test_choose_takes_the_default_of_several_templates():
    several = [{"name": "tool_use", "template": TURNS}, {"name": "default", "template": QWEN3}]
    tokenizer = HuggingFace(backend("qwen3").to_str(), config("qwen3", several))
    assert choose(tokenizer) == Qwen3()


UNLIKE = {
    "other line break": ("chatml", TURNS.replace("\n' ", "\n\n' ")),
    "no line break at the end": ("chatml", TURNS.replace("<|im_end|>\n", "<|im_end|>")),
    "trimmed": ("chatml", TURNS.replace("m.content", "m.content | trim")),
    "separator": ("chatml", TURNS.replace("m.role ~ '\n'", "m.role ~ '<|im_sep|>'")),
    "role names": (
        "chatml",
        TURNS.replace("m.role", "{'user': 'human', 'assistant': 'bot'}.get(m.role, m.role)"),
    ),
    "begins": ("chatml", "{{ '<|endoftext|>' }}" + TURNS),
    "ends": ("chatml", TURNS.replace("<|im_end|>\n", "<|im_end|><|endoftext|>")),
    "another header": ("chatml", TURNS.replace("<|im_start|>assistant\n", "<|im_start|>AI\n")),
    "thought in the header": ("qwen3", QWEN3.replace("assistant\n' }}", "assistant\n<think>' }}")),
    "dates": ("llama3", LLAMA3.replace("date is defined", "true").replace("{{ date }}", "today")),
    "no tags": ("llama2", EACH + "{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}"),
    "no line breaks": ("gemma", GEMMA.replace("\n'", "'")),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_template_like_a_published_one_is_rendered_as_it_is(name):
    family, template = UNLIKE[name]
    assert isinstance(found := choose(made(family, template)), Jinja)
    for messages in CONVERSATIONS:
        # White space at the beginning of an answer is kept apart from that of its header here.
        messages = [{**message, "content": message["content"].lstrip()} for message in messages]
        open = messages[-1]["role"] == "user"
        expected = theirs(family, template).apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=open
        )
        assert render(found, made(family, template), messages, open=open).tokens == expected


def test_an_answer_ends_at_a_token_of_the_template_that_is_not_special():
    pytest.importorskip("jinja2", reason="renders chat templates; an extra")
    library = tokenizers.Tokenizer.from_str(trained())
    library.add_special_tokens(["</s>"])
    library.add_tokens(["<|im_start|>", "<|im_end|>"])
    values = {"eos_token": "</s>", "chat_template": TURNS}
    tokenizer = HuggingFace(library.to_str(), values)
    end = library.token_to_id("<|im_end|>")
    assert choose(tokenizer).stops(tokenizer) == [end, tokenizer.eos]
    tokens, weights = render(choose(tokenizer), tokenizer, says("Hi", "Hello"))
    assert [t for t, w in zip(tokens, weights, strict=True) if w][-1] == end


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}"])
def test_a_template_that_renders_nothing_is_refused(template):
    with pytest.raises(InputError, match="the chat_template failed"):
        choose(made("chatml", template))


@pytest.mark.parametrize("specials", [["<s>", "</s>"], [*CHATML, "<|im_sep|>"]])
def test_special_tokens_of_no_known_format_are_refused(specials):
    tokenizer = tokenizers.Tokenizer.from_str(trained())
    tokenizer.add_special_tokens(specials)
    ours = HuggingFace(tokenizer.to_str(), {"eos_token": specials[1]})
    with pytest.raises(InputError, match="no chat_template, and no chat format fits"):
        choose(ours)


def test_choose_says_what_a_tokenizer_of_our_own_lacks():
    with pytest.raises(InputError, match=r"<\|endoftext\|>; .*: Llama3 \(<\|begin_of_text\|> "):
        choose(Bytes())


def published(tokenizer, messages, **options):
    """The conversation as the tokenizer's own chat_template has it."""
    return render(jinja_of(tokenizer), tokenizer, messages, **options)


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name][3]])
def test_a_template_that_says_the_same_gives_the_same(name):
    family, template, source, _ = FORMATS[name]
    messages = says("Hello ", "Fine.\n", "a  <|im_end|></s>", system="Be <|eot_id|> brief.")
    mine = render(template, made(family), messages, open=True)
    assert published(made(family, source), messages, open=True) == mine


def test_a_template_writes_special_tokens_and_a_message_does_not():
    tokenizer = made("chatml", "<|im_start|>" + EACH + "{{ m.content }}{% endfor %}")
    tokens, _ = published(tokenizer, says("<|im_start|>", "<|im_end|>"))
    assert [t for t in tokens if t in tokenizer.specials.values()] == tokens[:1]
    assert tokenizer.decode(tokens) == "<|im_start|><|im_start|><|im_end|>"


def test_a_template_gets_what_transformers_gives():
    template = (
        "{% generation %}{{ messages[0].content }}{% endgeneration %}\n"
        "    {% for i in range(9) %}\n{% if i == 2 %}{% break %}{% endif %}\n{{ i }}{% endfor %}\n"
        "{{ {'a': '<ü>'} | tojson }}{{ strftime_now('%Y')|length }}{{ bos_token }}{{ eos_token }}"
    )
    tokens, _ = published(made("llama3", template), says("Hi"))
    expected = theirs("llama3", template).apply_chat_template(says("Hi"), return_dict=False)
    assert tokens == expected


@pytest.mark.parametrize("change", ["upper()", "replace('e', 'a')", "replace('H', 'h')"])
def test_a_template_may_not_change_what_messages_say(change):
    template = TURNS.replace("m.content", f"m.content.{change}")
    with pytest.raises(InputError, match="omits, repeats or changes the text of message 0"):
        published(made("chatml", template), says("Hi there"))


LOOKS = TURNS.replace("m.content", "m.content.split('</think>')[-1]")


@pytest.mark.parametrize("header", ["", "<think>\n"])
def test_a_template_that_looks_into_messages_is_rendered_as_transformers_does(header):
    source = LOOKS.replace("<|im_start|>assistant\n", f"<|im_start|>assistant\n{header}")
    messages = says("Hi", "<think>\nhm\n</think>Fine", "And?", "<think></think>Good")
    found = published(made("chatml", source), messages)
    expected = theirs("chatml", source).apply_chat_template(messages, return_dict=False)
    assert found.tokens == expected
    learned = [t for t, w in zip(*found, strict=True) if w]
    assert made("chatml").decode(learned) == "Fine<|im_end|>Good<|im_end|>"


def test_where_a_template_looks_into_messages_they_have_no_names_of_special_tokens():
    messages = says("Hi", "<think>hm</think>Fine <|im_end|>")
    with pytest.raises(InputError, match=r"contains <\|im_end\|>, which cannot be distinguished"):
        published(made("chatml", LOOKS), messages)


@pytest.mark.parametrize("template", ["<|im_start|>", "{{ messages[0].content * 2 }}"])
def test_a_template_says_each_message_once(template):
    with pytest.raises(InputError, match="omits, repeats"):
        published(made("chatml", template), says("Hi"))


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ strftime_now.__globals__.sys }}", "SecurityError"),
        ("{{ raise_exception.__globals__.sys }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
        ("{% set ns = namespace(__html__=1) %}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update(role='x') }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ 'x' * (2 * 10 ** 9) }}", "MemoryError"),
        ("{{ 'x' * 10 ** 7 }}", "more than 10000.. characters"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ cycler }}{{ nothing.at.all }}", "UndefinedError"),
    ],
)
def test_the_sandbox_refuses(template, error):
    with pytest.raises(InputError, match=f"chat_template failed: .*{error}"):
        published(made("chatml", template), says("Hi"))
    assert published(made("chatml", TURNS), says("Hi")).tokens  # goes on


def test_a_template_cannot_run_for_long(monkeypatch):
    monkeypatch.setattr(chat.sandbox, "SECONDS", 1.0)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="took more than 1 seconds"):
        published(made("chatml", loops), says("Hi"))


def test_a_template_needs_jinja2_without_known_holes(monkeypatch):
    tokenizer = made("chatml", TURNS + "{# not recognised before #}")
    chat.sandbox._process.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.1.4")
    with pytest.raises(InputError, match="jinja2 3.1.4 is too old .* 3.1.6"):
        choose(tokenizer)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match="pip install jinja2"):
        choose(tokenizer)
