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
    Llama2,
    Llama3,
    Message,
    Qwen3,
    choose,
    conversation,
    foreign,
    render,
)
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

# The published formats, in words of our own.
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
    """The text, with what is learned in braces."""
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
def test_qwen3_learns_its_last_thought_and_forgets_earlier_ones(template, answer, text):
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
        ([], "0 messages without a user"),
        ([{"role": "system", "content": "x"}], "1 messages without a user"),
        ([{"role": "tool", "content": "x"}], "message 0 has role 'tool'"),
        ([{"role": None, "content": "x"}], "message 0 has role None"),
        ([{"role": "user"}], r"message 0 has \['role'\]"),
        ([{"role": "user", "content": "x", "name": "y"}], "message 0 has .*'name'"),
        ([*says("x"), {"role": "assistant", "content": ""}], "message 1 has content ''"),
        ([{"role": "user", "content": ["x"]}], r"message 0 has content \['x'\]"),
        ([Message("user", 3)], "message 0 has content 3"),
        ([{"role": "assistant", "content": "x"}], "message 0 is of role assistant, but user is"),
        ([*says("x"), *says("y")], "message 1 is of role user, but assistant is next"),
        ([*says("x", "y"), {"role": "system", "content": "z"}], "message 2 is of role system"),
        ([{"role": "system", "content": "z"}] * 2, "message 1 is of role system"),
        (["x"], "message 0 has str"),
        ("x", "message 0 has str"),
    ],
)
def test_a_bad_conversation_is_refused_with_its_position(messages, error):
    with pytest.raises(InputError, match=error):
        conversation(messages)


def test_an_answer_can_only_follow_a_question():
    with pytest.raises(InputError, match="open=True .* message 1 is one"):
        render(ChatML(), made("chatml"), says("Hi", "Hello"), open=True)


def test_a_tokenizer_without_the_formats_tokens_is_refused():
    with pytest.raises(InputError, match=r"Gemma is written with <bos>.*<\|im_start\|>"):
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


@pytest.mark.parametrize(
    ("family", "published"),
    [
        ("llama2", None),
        ("llama2", "{{ messages[0].content }}</s>"),
        ("chatml", TURNS.replace("m.content", "m.content | trim")),
        ("chatml", "{{ bos_token }}" + TURNS),
        ("qwen3", TURNS + "{{ '<think>\\n' }}"),
        ("qwen3", QWEN3.replace("last_query_index", "last")),
        ("qwen3", QWEN3 + "{% if enable_thinking %}{{ '<think>\\n' }}{% endif %}"),
        ("gemma", TURNS),
    ],
)
def test_choose_refuses_what_it_does_not_know(family, published):
    with pytest.raises(
        InputError, match=f"no chat format fits .*{SPECIALS[family][1]}".replace("|", r"\|")
    ):
        choose(made(family, published))


def test_choose_says_what_a_tokenizer_of_our_own_lacks():
    with pytest.raises(InputError, match=r"<\|endoftext\|> .*Llama3 \(<\|begin_of_text\|> "):
        choose(Bytes())


def allowed(tokenizer, messages, **options):
    pytest.importorskip("jinja2", reason="runs foreign templates; an extra")
    return foreign(tokenizer, messages, allow=True, **options)


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name][3]])
def test_a_foreign_template_that_says_the_same_gives_the_same(name):
    family, template, published, _ = FORMATS[name]
    # The space before an answer of Llama 2 is learned, but no foreign template can say so.
    messages = says("Hello ", "Fine.\n", "a  <|im_end|></s>", system="Be <|eot_id|> brief.")
    mine = render(template, made(family), messages, open=True)
    found = allowed(made(family, published), messages, open=True)
    assert found.tokens == mine.tokens
    if name != "llama2":
        assert found.weights == mine.weights


def test_a_foreign_template_writes_special_tokens_and_a_message_does_not():
    tokenizer = made("chatml", "<|im_start|>" + EACH + "{{ m.content }}{% endfor %}")
    tokens, _ = allowed(tokenizer, says("<|im_start|>", "<|im_end|>"))
    assert [t for t in tokens if t in tokenizer.specials.values()] == tokens[:1]
    assert tokenizer.decode(tokens) == "<|im_start|><|im_start|><|im_end|>"


def test_a_foreign_template_gets_what_transformers_gives():
    template = (
        "{% generation %}{{ messages[0].content }}{% endgeneration %}\n"
        "    {% for i in range(9) %}\n{% if i == 2 %}{% break %}{% endif %}\n{{ i }}{% endfor %}\n"
        "{{ {'a': '<ü>'} | tojson }}{{ strftime_now('%Y')|length }}{{ bos_token }}{{ eos_token }}"
    )
    tokens, _ = allowed(made("llama3", template), says("Hi"))
    expected = theirs("llama3", template).apply_chat_template(says("Hi"), return_dict=False)
    assert tokens == expected


def test_a_foreign_template_runs_only_when_allowed():
    with pytest.raises(InputError, match="allow=True"):
        foreign(made("chatml", TURNS), says("Hi"))


@pytest.mark.parametrize(
    "change",
    ["upper()", "strip('H')", "split('i')[0]", "replace('e', 'a')", "isalpha()"],
)
def test_a_foreign_template_may_not_look_into_messages(change):
    template = TURNS.replace("m.content", f"m.content.{change}")
    with pytest.raises(InputError, match="changes or looks into"):
        allowed(made("chatml", template), says("Hi there"))


@pytest.mark.parametrize("template", ["<|im_start|>", "{{ messages[0].content * 2 }}"])
def test_a_foreign_template_says_each_message_once(template):
    with pytest.raises(InputError, match="leaves out, repeats"):
        allowed(made("chatml", template), says("Hi"))


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ strftime_now.__self__.year }}", "SecurityError"),
        ("{{ raise_exception.__globals__.sys }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
        ("{% set ns = namespace(__html__=1) %}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update(role='x') }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ 'x' * (2 * 10 ** 9) }}", "MemoryError"),
        ("{{ 'x' * 10 ** 7 }}", "more than 1000002 characters"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ cycler }}{{ nothing.at.all }}", "UndefinedError"),
    ],
)
def test_the_sandbox_refuses(template, error):
    with pytest.raises(InputError, match=f"chat_template failed: .*{error}"):
        allowed(made("chatml", template), says("Hi"))


def test_a_foreign_template_cannot_run_for_long(monkeypatch):
    monkeypatch.setattr(chat.sandbox, "SECONDS", 1.0)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="took over 1 seconds"):
        allowed(made("chatml", loops), says("Hi"))


def test_a_foreign_template_needs_jinja2_without_known_holes(monkeypatch):
    tokenizer = made("chatml", TURNS)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.1.4")
    with pytest.raises(InputError, match="jinja2 is 3.1.4; .* 3.1.6"):
        allowed(tokenizer, says("Hi"))

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match="pip install jinja2"):
        allowed(tokenizer, says("Hi"))


def test_a_foreign_template_must_exist():
    with pytest.raises(InputError, match="no chat_template"):
        allowed(made("chatml"), says("Hi"))
