"""Records in every format and tokenizers of every kind, compared with transformers."""

import functools
import json

import pytest
import tokenizers

from jaxgpt.chat import (
    ChatML,
    choose,
    read_conversation,
    read_messages,
    read_preference,
    read_request,
    render,
)
from jaxgpt.data.records import Record
from jaxgpt.errors import InputError
from jaxgpt.objectives import DPO, GRPO, Instruct
from jaxgpt.pretrained.export import CHAT_TEMPLATES
from jaxgpt.tokenizer import HuggingFace
from tests.chat.test_templates import (
    CHATML,
    EACH,
    FORMATS,
    GEMMA,
    LLAMA3,
    QWEN3,
    TURNS,
    made,
    says,
    theirs,
    trained,
    trained_like_sentencepiece,
)

SYSTEM, HISTORY = "Be brief.", ["What is 2+2?", "It is 4."]
QUESTION, ANSWER, WORSE = "Are you\n\nsure?", "Yes, I am.", "No, I am not."
WHOLE = says(*HISTORY, QUESTION, ANSWER, system=SYSTEM)
PROMPT = WHOLE[:-1]


def sharegpt(messages):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


def openai(messages):
    """With what OpenAI's client and parquet files add."""
    nothing = dict.fromkeys(["name", "tool_calls", "tool_call_id", "weight", "refusal", "audio"])
    roles = {"system": "developer"}
    return [
        {
            **nothing,
            "role": roles.get(m["role"], m["role"]),
            "content": [{"type": "text", "text": m["content"]}],
        }
        for m in messages
    ]


def weighted(messages, **weight):
    """The messages with a weight on the first answer."""
    return [{**m, **(weight if number == 2 else {})} for number, m in enumerate(messages)]


ALPACA = {"instruction": QUESTION, "input": "", "output": ANSWER}
REQUEST = {"system": SYSTEM, "history": [HISTORY]}
# The objective, the record, and the weights of the two answers.
LAYOUTS = {
    "messages": (Instruct(), {"messages": openai(WHOLE), "tools": None}, (1, 1)),
    "messages as JSON": (Instruct(), {"messages": json.dumps(openai(WHOLE))}, (1, 1)),
    "messages in columns": (
        Instruct(),
        {"messages": {name: [m[name] for m in WHOLE] for name in ("role", "content")}},
        (1, 1),
    ),
    "messages, one weight": (Instruct(), {"messages": weighted(WHOLE, weight=0.5)}, (0.5, 1)),
    "sharegpt": (Instruct(), {"conversations": sharegpt(WHOLE)}, (1, 1)),
    "sharegpt, one not trained": (
        Instruct(),
        {"system": SYSTEM, "conversations": weighted(sharegpt(WHOLE), train=False)[1:]},
        (0, 1),
    ),
    "alpaca": (Instruct(), {**ALPACA, **REQUEST}, (1, 1)),
    "prompt and completion": (
        Instruct(),
        {"prompt": PROMPT, "completion": says("x", ANSWER)[1:], "messages": None},
        (0, 1),
    ),
    "question and answer": (
        Instruct(),
        {"question": QUESTION, "answer": ANSWER, "system_prompt": SYSTEM, "history": [HISTORY]},
        (1, 1),
    ),
    "alpaca with input": (
        Instruct(),
        {
            **{"instruction": "Are you", "input": "sure?", "output": ANSWER, **REQUEST},
            "conversation": None,
        },
        (1, 1),
    ),
    "preference": (DPO(), {"prompt": PROMPT, "chosen": ANSWER, "rejected": WORSE}, (0, 1)),
    "preference, one prompt in both": (
        DPO(),
        {"prompt": QUESTION, "chosen": WHOLE, "rejected": [*PROMPT, *says("x", WORSE)[1:]]},
        (0, 1),
    ),
    "preference, sharegpt": (
        DPO(),
        {
            "conversations": sharegpt(PROMPT),
            "chosen": {"from": "gpt", "value": ANSWER},
            "rejected": {"from": "gpt", "value": WORSE},
        },
        (0, 1),
    ),
    "preference, OpenAI": (
        DPO(),
        {
            "prompt": {"messages": openai(PROMPT), "tools": []},
            "chosen": says("x", ANSWER)[1:],
            "rejected": says("x", WORSE)[1:],
        },
        (0, 1),
    ),
    "preference, alpaca": (
        DPO(),
        {"instruction": QUESTION, "chosen": ANSWER, "rejected": WORSE, **REQUEST},
        (0, 1),
    ),
}


def byte_level(**options):
    parsed = json.loads(trained())
    parsed["pre_tokenizer"] = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    parsed["pre_tokenizer"] |= {"add_prefix_space": False, **options}
    return parsed


def metaspace(scheme):
    parsed = json.loads(trained_like_sentencepiece(prefix=False))
    parsed["normalizer"] = None
    parsed["pre_tokenizer"] = {
        **{"type": "Metaspace", "replacement": "\u2581", "split": True},
        "prepend_scheme": scheme,
    }
    return parsed


@functools.cache
def kind(name):
    """A library's tokenizer with ChatML's special tokens, and JSON of the same."""
    values, flags = {
        "metaspace first": (metaspace("first"), {}),
        "metaspace always": (metaspace("always"), {}),
        "metaspace never": (metaspace("never"), {}),
        "prepend": (json.loads(trained_like_sentencepiece(prefix=True)), {}),
        "prefix space": (byte_level(add_prefix_space=True), {}),
        "lstrip": (byte_level(), {"lstrip": True}),
        "rstrip": (byte_level(), {"rstrip": True}),
        "single word": (byte_level(), {"single_word": True}),
        "normalized": (byte_level() | {"normalizer": {"type": "Lowercase"}}, {"normalized": True}),
        "rstrip, first": (metaspace("first"), {"rstrip": True}),
        "rstrip, prepend": (json.loads(trained_like_sentencepiece(prefix=True)), {"rstrip": True}),
    }[name]
    library = tokenizers.Tokenizer.from_str(json.dumps(values))
    added = [
        tokenizers.AddedToken(n, special=True, **{"normalized": False} | flags) for n in CHATML
    ]
    library.add_special_tokens(added)
    return library


KINDS = ["metaspace first", "metaspace always", "metaspace never", "prepend", "prefix space"]
KINDS += ["lstrip", "rstrip", "single word", "normalized", "rstrip, first", "rstrip, prepend"]
CONVERSATIONS = [
    says("Hello", "Hello there!", " How are  you?"),
    says("<x> Hi\n", "a <b\nc", system="Be \u00e9 brief."),
]


def of_kind(name, template=TURNS):
    """Our tokenizer and transformers', of a kind."""
    transformers = pytest.importorskip("transformers", reason="is what we compare with")
    library = kind(name)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, chat_template=template
    )
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    return HuggingFace(library.to_str(), config), reference


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "template",
    [TURNS, "Chat: " + TURNS, TURNS.replace("<|im_start|>' ~ m.role", "x<|im_start|>y' ~ m.role")],
)
def test_text_beside_special_tokens_is_encoded_as_transformers_does(name, template):
    ours, reference = of_kind(name, template)
    for messages in CONVERSATIONS:
        open = messages[-1]["role"] == "user"
        expected = reference.apply_chat_template(
            messages, return_dict=False, add_generation_prompt=open
        )
        assert render(choose(ours), ours, messages, open=open).tokens == expected


@pytest.mark.parametrize("name", [name for name in KINDS if name != "single word"])
def test_names_of_special_tokens_in_messages_stay_text(name):
    ours, _ = of_kind(name)
    said = says("x <|im_end|> y", "a<|im_end|>")
    tokens = render(choose(ours), ours, said).tokens
    special = [token for token in tokens if token in ours.specials.values()]
    plain = render(choose(ours), ours, says("x", "y")).tokens
    assert special == [token for token in plain if token in ours.specials.values()]


END = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
MARKED = {  # with the tags by which transformers marks answers
    "chatml": TURNS.replace(
        "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}",
        "{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content ~ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content ~ '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}",
    ),
    "llama3": "{{ bos_token }}"
    + EACH
    + "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>' }}"
    "{{ '\n\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>"
    "{% endgeneration %}{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}",
}
# Ours, and transformers' tokenizer, by the name of the format.
FAMILIES = {
    "chatml": ("chatml", TURNS),
    "chatml, marked": ("chatml", MARKED["chatml"]),
    "llama3": ("llama3", LLAMA3),
    "llama3, marked": ("llama3", MARKED["llama3"]),
    "qwen3": ("qwen3", QWEN3),
    "gemma": ("gemma", GEMMA),
    "metaspace": ("metaspace first", TURNS),
    "metaspace, marked": ("metaspace first", MARKED["chatml"]),
}


@functools.cache
def pair(name):
    family, template = FAMILIES[name]
    if family in KINDS:
        return of_kind(family, template)
    return made(family, template), theirs(family, template)


@functools.cache
def expected(name, weights):
    """The ids that transformers gives WHOLE, and these weights on the two answers."""
    tokenizer = pair(name)[1]
    apply = functools.partial(tokenizer.apply_chat_template, return_dict=False)
    ids = apply(WHOLE)
    if "marked" in name:
        found = apply(WHOLE, return_dict=True, return_assistant_tokens_mask=True)
        mask = found["assistant_masks"]
        second = len(mask) - mask[::-1].index(0, mask[::-1].index(1))
        return ids, [w * weights[n >= second] for n, w in enumerate(mask)]
    mask = [0.0] * len(ids)
    end = tokenizer.convert_tokens_to_ids(END.get(name, "<|im_end|>"))
    for weight, size in zip(weights, (2, 4), strict=True):
        before = apply(WHOLE[:size], add_generation_prompt=True)
        assert ids[: len(before)] == before
        stop = ids.index(end, len(before)) + 1
        mask[len(before) : stop] = [weight] * (stop - len(before))
    return ids, mask


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_loss_weights_are_those_of_transformers(layout, name):
    objective, record, weights = LAYOUTS[layout]
    side = "chosen_" if isinstance(objective, DPO) else ""
    arrays = objective.encode(Record("line 7", record), pair(name)[0])
    tokens, targets, found = (arrays[side + k] for k in ("tokens", "targets", "weights"))
    ids, mask = expected(name, weights)
    assert [tokens[0], *targets] == ids
    assert found.tolist() == mask[1:]
    if side:
        rejected = Record("line 7", {"messages": [*PROMPT, *says("x", WORSE)[1:]]})
        worse = Instruct().encode(rejected, pair(name)[0])
        assert arrays["rejected_targets"].tolist() == worse["targets"].tolist()


def test_weights_do_not_change_ids():
    tokenizer = pair("chatml")[0]
    messages = says("Hi", "\n\nHello", "And?", "\nx")
    whole = render(choose(tokenizer), tokenizer, messages)
    some = render(
        choose(tokenizer),
        tokenizer,
        weighted(messages[1:], weight=0)
        and [
            {**message, "weight": 0} if message["role"] == "assistant" else message
            for message in messages
        ],
    )
    assert some.tokens == whole.tokens and not any(some.weights)


def test_grpo_prompts_have_every_field_of_a_record():
    ours, reference = pair("chatml")
    ids = reference.apply_chat_template(PROMPT, return_dict=False, add_generation_prompt=True)
    for record in (
        {"instruction": QUESTION, "output": "Yes", **REQUEST},
        {"instruction": "Are you", "input": "sure?", "output": "Yes", **REQUEST},
        {"instruction": PROMPT, "output": "Yes"},
    ):
        assert GRPO().encode(Record("line 7", record), ours)["tokens"].tolist() == ids


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"name": "add", "arguments": {"a": 1, "b": "\u00e9"}}
CALLING = [
    *says("1+2?"),
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {**CALL, "arguments": json.dumps(CALL["arguments"])},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": '{"sum": 3}'},
    {"role": "assistant", "content": "It is 3."},
]
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' ~ tools | tojson ~ '<|im_end|>\n' }}{% endif %}"
    + EACH
    + "{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ '<tool_call>' ~ call.function.name ~ call.function.arguments | tojson ~ '</tool_call>' }}"
    "{% endfor %}{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None])
def test_tool_calls_are_rendered_by_a_template_that_has_them(tools):
    ours, reference = made("chatml", WITH_TOOLS), theirs("chatml", WITH_TOOLS)
    arrays = Instruct().encode(Record("line 7", {"messages": CALLING, "tools": tools}), ours)
    plain = [*CALLING[:1], {**CALLING[1], "tool_calls": [{"function": CALL}]}, *CALLING[2:]]
    ids = reference.apply_chat_template(plain, return_dict=False, tools=TOOLS if tools else None)
    assert [arrays["tokens"][0], *arrays["targets"]] == ids
    learned = arrays["targets"][arrays["weights"] == 1]
    call = '<tool_call>add{"a": 1, "b": "\u00e9"}</tool_call><|im_end|>'
    assert ours.decode(learned) == call + "It is 3.<|im_end|>"


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_tools_are_rendered_without_a_template_and_as_the_exported_template_does(system):
    messages = [*([{"role": "system", "content": system}] if system is not None else []), *CALLING]
    messages += [*says("And 3+4?"), {**CALLING[1], "content": "I add.", "weight": 0.5}]
    messages[-1]["tool_calls"] = 2 * messages[-1]["tool_calls"]
    ours, record = made("chatml", None), Record("line 7", {"messages": messages, "tools": TOOLS})
    arrays = Instruct().encode(record, ours)
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "\u00e9"}}</tool_call>'
    said = {1: f"{call}<|im_end|>It is 3.<|im_end|>", 0.5: f"I add.\n{call}\n{call}<|im_end|>"}
    for weight, text in said.items():
        assert ours.decode(arrays["targets"][arrays["weights"] == weight]) == text
    whole = ours.decode([arrays["tokens"][0], *arrays["targets"]])
    first = f"{system}\n\n" if system else ""
    assert whole.startswith(f"<|im_start|>system\n{first}# Tools\n{json.dumps(TOOLS[0])}<|im_end|>")
    assert '<|im_start|>tool\n{"sum": 3}<|im_end|>' in whole
    published = made("chatml", CHAT_TEMPLATES[ChatML])
    assert choose(published) == choose(ours)
    theirs = Instruct().encode(record, published)
    for name, array in arrays.items():
        assert array.tolist() == theirs[name].tolist()


def test_a_template_that_expects_arguments_as_text_gets_them_so():
    source = WITH_TOOLS.replace("arguments | tojson", "arguments.strip()")
    ours = made("chatml", source)
    tokens = render(choose(ours), ours, CALLING).tokens
    assert '<tool_call>add{"a": 1, "b": "\u00e9"}</tool_call><|im_end|>' in ours.decode(tokens)


@pytest.mark.parametrize(
    "call",
    [
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "assistant", "function_call": CALL, "content": None},
        {"role": "assistant", "tool_calls": [CALL]},
    ],
)
def test_function_calls_of_every_layout_are_tool_calls(call):
    turns = [call]
    turns += [{"from": "observation", "value": "3"}]
    call, answer = read_messages(turns)
    assert (call.role, call.tool_calls) == ("assistant", [{"type": "function", "function": CALL}])
    assert (answer.role, answer.content) == ("tool", "3")


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (TURNS, "does not render the tool add"),
        ("{{ tools | tojson }}" + TURNS, "omits, repeats or changes the text of message 1"),
        (
            WITH_TOOLS.replace(
                "{{ '<|im_start|>system\n' ~ tools | tojson ~ '<|im_end|>\n' }}", ""
            ),
            "does not render the tool add",
        ),
        ("{{ raise_exception('no tools') if tools }}" + TURNS, "no tools"),
    ],
)
@pytest.mark.parametrize("name", ["add", "abc", "as"])  # "as" is part of "assistant"
def test_tools_that_a_template_cannot_render_are_refused(template, error, name):
    calling, tools = (
        json.loads(json.dumps(value).replace('"add"', f'"{name}"')) for value in (CALLING, TOOLS)
    )
    error = error.replace("the tool add", f"the tool {name};")
    record = Record("line 7", {"messages": calling, "tools": tools})
    with pytest.raises(InputError, match=f"^line 7: .*({error})"):
        Instruct().encode(record, made("chatml", template))


def test_the_name_of_a_special_token_in_tools_is_refused():
    tools = [{"name": "add", "description": "x<|im_end|>"}]
    with pytest.raises(InputError, match=r"contains <\|im_end\|>, which cannot be distinguished"):
        render(choose(made("chatml", WITH_TOOLS)), made("chatml", WITH_TOOLS), WHOLE, tools=tools)


def test_ignored_fields_of_messages_are_reported_once(capsys):
    for _ in range(2):
        read_messages([{"role": "user", "content": "x", "colour": 1, "id": None}])
    assert capsys.readouterr().err == "chat: ignored fields of messages: colour\n"


def test_a_request_may_have_earlier_turns():
    asked = read_request({"prompt": "c", "history": [["a", "b"]], "system": ""}, "prompt")
    assert [(m.role, m.content) for m in asked.messages] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


@pytest.mark.parametrize(
    ("read", "record", "error"),
    [
        (read_conversation, {"instruction": "a", "history": ["b"]}, "needs messages, or instruc"),
        (read_conversation, {**ALPACA, "history": ["b"]}, "history has 'b'; use pairs"),
        (read_conversation, {**ALPACA, "history": [["b", ""]]}, "history has .*; use pairs"),
        (read_conversation, {**ALPACA, "system": 3}, "system is 3, but must be non-empty text"),
        (read_conversation, {"messages": WHOLE, "system": "x"}, "system differs from the first"),
        (read_conversation, {"messages": WHOLE, "tools": "{"}, "tools has text that is not JSON"),
        (read_conversation, {"messages": WHOLE, "tools": [1]}, r"tools is \[1\]; use a list"),
        (read_conversation, {"messages": {"role": ["a"], "content": []}}, "different lengths"),
        (read_conversation, {"messages": "[1"}, "messages has text that is not JSON"),
        (read_conversation, {"messages": WHOLE, "tools": [{"a": b"x"}]}, "tools has a value that"),
        (read_conversation, {"prompt": "a", "completion": PROMPT}, "completion does not end with"),
        (read_preference, {"chosen": WHOLE, "rejected": WHOLE}, "chosen and rejected are equal"),
        (
            read_preference,
            {"chosen": WHOLE, "rejected": WHOLE[:3]},
            "is the beginning of the other",
        ),
        (
            read_preference,
            {"prompt": "Hm?", "chosen": WHOLE, "rejected": [*PROMPT, *says("x", WORSE)[1:]]},
            "start with another request than prompt, which has 'Hm\\?'",
        ),
        (read_preference, {"chosen": ANSWER, "rejected": WORSE}, "needs a prompt, or chosen"),
        (read_preference, {"prompt": "a", "chosen": [], "rejected": "b"}, "chosen does not end"),
    ],
)
def test_a_bad_record_is_refused(read, record, error):
    with pytest.raises(InputError, match=error):
        read(record)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([{"content": ""}], "message 1 has content ''; give it text, or weight 0"),
        ([{"content": "x", "weight": 0}], "every answer has weight 0"),
    ],
)
def test_a_record_with_nothing_to_learn_is_refused(answers, error):
    messages = [*says("Hi"), *({"role": "assistant", **answer} for answer in answers)]
    with pytest.raises(InputError, match=f"^line 7: {error}"):
        Instruct().encode(Record("line 7", {"messages": messages}), pair("chatml")[0])


@pytest.mark.parametrize("name", FORMATS)
def test_a_marked_or_unmarked_answer_may_be_empty_in_the_history(name):
    family, template, published, _ = FORMATS[name]
    messages = says("Hi", "", "And?") if name != "llama2" else says("Hi", "x", "And?")
    assert render(template, made(family, published), messages, open=True).tokens
