import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.data.examples import examples
from jaxgpt.data.records import Record, RecordsConfig
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import Instruct
from jaxgpt.tokenizer import TokenizerConfig, build
from tests.runs import assert_same_run, cut_back, run
from tests.tiny import PLAIN, random_params

CORPUS = "user assistant system <|im_start|> <|im_end|> Hello there! How are you?\n\n" * 9


@cache
def tokenizer():
    return Instruct().extend(build(TokenizerConfig(vocab_size=300), [CORPUS]))


def encode(learn="assistant", **values):
    return Instruct(learn=learn).encode(Record("line 7", values), tokenizer())


def turns(*contents):
    """User and assistant in turns."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


NAMES = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>assistant\n")
written = st.lists(st.text(max_size=8) | st.sampled_from(NAMES), min_size=1, max_size=4).map(
    "".join
)
conversations = st.lists(st.tuples(written, written), min_size=1, max_size=3).map(
    lambda pairs: [text or "." for pair in pairs for text in pair]
)


@settings(deadline=None, max_examples=100)
@given(conversations)
@example(["<|im_end|>\n<|im_start|>assistant\n", "\n\n<|im_start|>"])
@example([" ", "\n"])
def test_exactly_what_the_assistant_says_is_learned_whatever_it_is(contents):
    arrays = encode(messages=turns(*contents))
    tokens, targets, weights = (arrays[name] for name in ("tokens", "targets", "weights"))
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    ids, weights = [tokens[0], *targets], [0, *weights]

    start, end = (tokenizer().specials[name] for name in NAMES[:2])
    assert sum(i in tokenizer().specials.values() for i in ids) == 2 * len(contents)
    place = 0
    for turn, content in enumerate(contents):
        said = turn % 2
        stop = ids.index(end, place)
        assert ids[place] == start and weights[place] == 0
        header = tokenizer().encode("assistant\n" if said else "user\n")
        text = tokenizer().decode(ids[place + 1 : stop])
        assert text == ("assistant\n" if said else "user\n") + content
        if said:
            begin = place + 1 + len(header)
            assert ids[place + 1 : begin] == header
            assert weights[place + 1 : begin] == [0] * len(header)
            assert weights[begin : stop + 1] == [1] * (stop + 1 - begin)
            assert tokenizer().decode(ids[begin:stop]) == content
        else:
            assert not any(weights[place : stop + 1])
        place = ids.index(start, stop) if turn + 1 < len(contents) else len(ids)
        line_break = slice(stop + 1, place)
        assert tokenizer().decode(ids[line_break]) == "\n" and not any(weights[line_break])


# Each format with the texts of user and assistant in turns; the last turn is the assistant's.
LAYOUTS = {
    "OpenAI": lambda texts: {"messages": [{"role": "system", "content": NAMES[3]}, *turns(*texts)]},
    "OpenAI, JSON text": lambda texts: {"messages": json.dumps(turns(*texts))},
    "ShareGPT": lambda texts: {
        "system": NAMES[1],
        "conversations": [
            {"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)
        ]
        + [{"from": "human", "value": "thanks"}],  # a last request without an answer
    },
    "Alpaca": lambda texts: {
        "instruction": texts[-2],
        "input": NAMES[3],
        "output": texts[-1],
        "history": [*map(list, batched(texts[:-2]))],
    },
    "prompt and completion": lambda texts: {"prompt": turns(*texts[:-1]), "completion": texts[-1]},
    "question and answer": lambda texts: {"question": texts[-2], "answer": texts[-1]},
}
LEARNS_LAST = ("prompt and completion", "question and answer")


def batched(texts):
    return zip(texts[::2], texts[1::2], strict=True)


@settings(deadline=None, max_examples=30)
@given(conversations.map(lambda texts: [text if text.strip() else f"{text}." for text in texts]))
@example(["<|im_end|>\n<|im_start|>assistant\n", "\n\n<|im_start|> "])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tokens_with_a_loss_are_the_answers_and_their_ends_in_every_format(layout, texts):
    arrays = encode(**LAYOUTS[layout](texts))
    assert set(arrays["weights"].tolist()) == {0, 1}
    end = tokenizer().specials["<|im_end|>"]
    answers, learned = [[]], arrays["weights"] == 1
    for target in arrays["targets"][learned].tolist():
        if target == end:
            answers.append([])
        else:
            answers[-1].append(target)
    said = [tokenizer().decode(answer) for answer in answers]
    expected = texts[-1:] if layout in LEARNS_LAST else texts[1::2]
    assert said == [*expected, ""]


def test_a_conversation_ends_with_its_last_answer():
    whole = encode(messages=turns("Hello", "there"))
    longer = encode(messages=[*turns("Hello", "there", "And?"), {"role": "human", "content": "?"}])
    jax.tree.map(np.testing.assert_array_equal, whole, longer)


def test_all_may_be_learned():
    messages = turns("Hello", "there", "How", "are you?")
    some, all = encode(messages=messages), encode("all", messages=messages)
    np.testing.assert_array_equal(some["targets"], all["targets"])
    assert (all["weights"] == 1).all() and 0 < some["weights"].sum() < len(some["weights"])


@pytest.mark.parametrize("given", ["", "a: int", None])
def test_a_request_and_its_answer_are_a_conversation(given):
    request = "Write it.\n\na: int" if given else "Write it."
    fields = {"instruction": "Write it.", "input": given, "output": "Done."}
    ours = encode(**fields)
    theirs = encode(messages=turns(request, "Done."))
    assert ours.keys() == theirs.keys() == {"tokens", "targets", "weights"}
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"messages": turns("Hello")}, "no message is the assistant's; add its answer"),
        ({"messages": turns("Hello", "")}, "message 1 has content ''; give it text"),
        ({"messages": turns("Hello", None)}, "message 1 has content None"),
        ({"messages": [{"role": "user", "text": "Hello"}, *turns("a", "b")]}, "add role and"),
        ({"messages": [{"role": "user", "content": "a", "train": 1}, *turns("b")]}, "has train 1"),
        ({"messages": []}, r"messages is \[\]; use a list"),
        ({"messages": "Hello"}, "messages is 'Hello'; use a list"),
        ({"messages": ["Hello"]}, "message 0 is str"),
        ({"conversations": [{"from": "human", "value": ""}]}, "message 0 has content ''; a user's"),
        ({"instruction": "Write it."}, "needs messages, or instruction and output"),
        ({"text": "Hello"}, "line 7: the record has the fields text, but needs"),
        ({"instruction": "", "output": "Done."}, "instruction is ''"),
        ({"instruction": "Write it.", "output": " "}, "output is ' '"),
        ({"instruction": "Write it.", "input": 3, "output": "Done."}, "input is 3"),
    ],
)
def test_a_record_that_cannot_be_is_named(values, says):
    with pytest.raises(InputError, match=f"^line 7.*{says}" if says[:4] != "line" else f"^{says}"):
        encode(**values)


def test_conversations_in_one_row_are_as_if_apart():
    T = 48
    gpt = GPTConfig(L=1, D=8, N=2, T=T, V=tokenizer().vocab_size).build(PLAIN)
    params = jax.tree.map(jnp.asarray, random_params(gpt))
    texts = [("Hello", "there"), ("How are", "you?"), ("a", "b"), ("Hello, who?", "user, you")]
    records = [Record(f"line {i}", {"messages": turns(*pair)}) for i, pair in enumerate(texts)]

    def rows(pack):
        encode = partial(Instruct().encode, tokenizer=tokenizer())
        splits = {"train": records, "val": records}
        settings = RecordsConfig(paths=("memory",), pack=pack)
        (batch,) = examples(
            settings, splits, encode, Instruct().cut, "", context=T, batch=4, packs=True
        ).held_out["val"]()
        return batch

    @jax.jit
    def losses(batch):
        """The loss and its gradient, and the loss of each target."""

        def of(weights):
            return Instruct()(gpt, params, {**batch, "weights": weights}, None)[0]

        total, gradient = jax.value_and_grad(
            lambda params: Instruct()(gpt, params, batch, None)[0]
        )(params)
        return total, gradient, jax.vmap(of)(single(batch["weights"]))

    def single(weights):
        """For each place in turn the weights without all the others."""
        return (jnp.eye(weights.size) * weights.reshape(1, -1)).reshape(-1, *weights.shape)

    apart, packed = rows(False), rows(True)
    assert packed["segments"].max() > 1 and packed["weights"].sum() == apart["weights"].sum()
    (total, gradient, each), (total_, gradient_, each_) = losses(apart), losses(packed)
    np.testing.assert_allclose(total, total_, rtol=1e-5)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, gradient, gradient_)
    in_order = [x[b["weights"].ravel() > 0] for x, b in ((each, apart), (each_, packed))]
    np.testing.assert_allclose(*in_order, atol=1e-5)


RUN = """
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import RecordSource, mixture
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import Instruct
from jaxgpt.sharding import ParallelConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training.checkpoint import CheckpointConfig

config = Config(
    model=GPTConfig(L=1, D=16, N=2, T=48),
    tokenizer=TokenizerConfig(vocab_size=257),
    data=mixture(
        RecordSource("openai.jsonl", epochs=2, max_examples=16),
        RecordSource("sharegpt.json"),
        RecordSource("alpaca.jsonl", fields=("output=reply",)),
        val_fraction=0.2,
    ),
    objective=Instruct(),
    train=TrainConfig(steps=4, batch=4, log_every=1, eval_every=2, sample_tokens=0),
    checkpoint=CheckpointConfig(every=2, keep=9),
    parallel=ParallelConfig(devices=1),
)
"""


@pytest.mark.slow
def test_a_mixture_of_three_formats_trains_and_resumes_bit_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(RUN)
    pairs = [(f"say {n}", f"it is {n}") for n in range(20)]
    names = {"user": "human", "assistant": "gpt"}
    tables = {
        "openai.jsonl": [{"messages": turns(*pair)} for pair in pairs],
        "sharegpt.json": [
            {
                "conversations": [
                    {"from": names[t["role"]], "value": t["content"]} for t in turns(*p)
                ]
            }
            for p in pairs
        ],
        "alpaca.jsonl": [{"instruction": ask, "input": "", "reply": said} for ask, said in pairs],
    }
    for name, table in tables.items():
        lines = [json.dumps(each) for each in table]
        text = f"[{','.join(lines)}]" if name.endswith(".json") else "\n".join(lines)
        (tmp_path / name).write_text(text)
    assert run() == 0
    said = capsys.readouterr().err
    for line in (
        "openai.jsonl: 20 records, OpenAI messages",
        "openai.jsonl: kept 16 of 20 records (data.max_examples)",
        "sharegpt.json: 20 records, ShareGPT conversations",
        "alpaca.jsonl: 20 records, output from 'reply', instruction, input",
    ):
        assert f"data: {line}" in said
    metrics = [*map(json.loads, (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines())]
    last = [each for each in metrics if "val_loss" in each][-1]
    assert {f"val_loss/{name}" for name in tables} <= last.keys()
    cut_back("a", "b", 2)
    assert run(name="b") == 0
    assert_same_run("a", "b", 4)
    assert run("--data.epochs", "1", "1", "1", "--train.steps", "5") == 2
    assert "the data differs" in capsys.readouterr().err
