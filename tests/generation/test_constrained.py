import datetime
import ipaddress
import json
import random
import re
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.errors import InputError
from jaxgpt.generation.constrained import choices, json_schema, regex, stacked
from jaxgpt.tokenizer import BPE, EOT, PATTERN, Bytes, Characters
from tests.tiny import sentencepiece

jsonschema = pytest.importorskip("jsonschema")

ALPHABET = 'abcdefgxyz0123456789 -+.,:{}[]"\\_/\n\tEeèé€天🙂'
# Tokens that end inside of a character, begin in one, hold several, or cross JSON's signs.
PIECES = [
    *("é".encode(), b"a\xc3", b"\xa9b", "€".encode()[:2], "🙂".encode()[:3], b"\x99\x82"),
    *(b"ab", b"abc", b" a", b'"a', b'":', b'": ', b', "', b'"}', b"{}", b"]}", b"12", b"-1", b"00"),
    *(b"true", b"null", b"\\n", b'\\"', b'{"', b'{"a": ', "天天".encode(), b"\n\n", b"  "),
]


def bpe():
    ranks = [*(bytes([byte]) for byte in range(256)), *PIECES]
    return BPE("bpe", ranks, PATTERN, {EOT: len(ranks), "<|user|>": len(ranks) + 3})


TOKENIZERS = {
    "bytes": Bytes(),
    "characters": Characters("".join(sorted(set(ALPHABET)))),
    "bpe": bpe(),
    "sentencepiece": sentencepiece('\u2581abc"{}:1é'),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
some_tokenizer = st.sampled_from(list(TOKENIZERS.values()))


def specials(tokenizer):
    return set(tokenizer.specials.values())


def end(tokenizer):
    return tokenizer.eos


def steps(guide):
    """How many tokens a state is from the end, by the plain definition."""
    S = len(guide.next_SC)
    distance = np.full(S, np.inf)
    distance[S - 1] = 0
    for _ in range(S):
        ahead = np.where(guide.next_SC >= 0, distance[guide.next_SC], np.inf).min(1) + 1
        ahead[S - 1] = 0
        if (ahead == distance).all():
            break
        distance = ahead
    return distance


def check_tables(guide, tokenizer):
    """No dead ends, nothing out of reach, no special token, and nothing after the end."""
    S, C = guide.next_SC.shape
    assert guide.classes_V.shape == (tokenizer.vocab_size,)
    assert guide.classes_V.dtype == guide.next_SC.dtype == np.int32
    assert guide.classes_V.min() >= 0 and guide.classes_V.max() < C
    assert np.isfinite(steps(guide)).all()
    reached = {0}
    while more := {int(t) for s in reached for t in guide.next_SC[s] if t >= 0} - reached:
        reached |= more
    assert reached == set(range(S))
    ends = {tokenizer.eot, tokenizer.eos}
    never = [guide.classes_V[token] for token in specials(tokenizer) - ends]
    assert (guide.next_SC[:, never] == -1).all()
    assert set(np.flatnonzero(guide.allowed(S - 1))) == ends
    # Tokens of different classes do differ.
    used = guide.next_SC[:, np.unique(guide.classes_V)]
    assert len(np.unique(used, axis=1).T) == used.shape[1]


def walk(guide, tokenizer, seed, patience=20, matches=None):
    """The text of random allowed tokens, up to the end token.

    Where `matches` says of texts whether they are complete, the end token has to be allowed just
    then.
    """
    rng, distance = random.Random(seed), steps(guide)
    state, tokens = 0, []
    while True:
        text = b"".join(tokenizer.spell(tokens, begins=False))
        if matches:
            try:
                complete = matches(text.decode())
            except UnicodeDecodeError:
                complete = False
            assert guide.allowed(state)[end(tokenizer)] == complete, text
        allowed = np.flatnonzero(guide.allowed(state)).tolist()
        if len(tokens) >= patience:
            nearest = min(distance[guide.after(state, token)] for token in allowed)
            allowed = [t for t in allowed if distance[guide.after(state, t)] == nearest]
        token = rng.choice(allowed)
        state = guide.after(state, token)
        if token in (tokenizer.eot, tokenizer.eos):
            assert state == len(guide.next_SC) - 1
            return text.decode()
        assert token not in specials(tokenizer)
        tokens.append(token)


def spelled(tokenizer, text, seed):
    """Some tokens that spell a text, none of them special; None where there are none."""
    pieces = {
        token: piece
        for token, piece in enumerate(tokenizer.pieces)
        if token not in specials(tokenizer) and piece != "\ufffd".encode()
    }
    rng, rest, tokens = random.Random(seed), text.encode(), []
    while rest:
        fitting = [token for token, piece in pieces.items() if rest.startswith(piece)]
        if not fitting:
            return None
        tokens.append(rng.choice(fitting))
        rest = rest[len(pieces[tokens[-1]]) :]
    return tokens


def accepts(guide, tokenizer, tokens):
    """Whether tokens are allowed one by one, and the end after them."""
    state = 0
    for token in tokens:
        state = guide.after(state, token)
        if state < 0:
            return False
    return bool(guide.allowed(state)[end(tokenizer)])


ATOMS = [
    "a",
    "b",
    "é",
    "天",
    "🙂",
    ".",
    "[ab]",
    "[^a]",
    "[a-é]",
    r"\d",
    r"\w",
    r"\s",
    r"[^\d\sa]",
    r"\.",
]
patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner | st.just(""), min_size=1, max_size=3).map("|".join).map("(?:{})".format),
        st.tuples(
            inner.map("({})".format), st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"])
        ).map("".join),
    ),
    max_leaves=6,
)


@given(patterns, some_tokenizer, st.integers(0, 9), st.data())
@settings(deadline=None, max_examples=150)
def test_a_regex_is_written_as_python_matches_it(pattern, tokenizer, seed, data):
    guide = regex(tokenizer, pattern)
    matches = re.compile(pattern).fullmatch
    check_tables(guide, tokenizer)
    assert matches(walk(guide, tokenizer, seed, matches=lambda text: bool(matches(text))))
    text = data.draw(
        st.from_regex(pattern, fullmatch=True, alphabet=st.characters(codec="utf-8"))
        | st.text("ab1é天🙂 .", max_size=5)
    )
    tokens = spelled(tokenizer, text, seed)
    if tokens is not None:
        assert accepts(guide, tokenizer, tokens) == bool(matches(text))


@every_tokenizer
def test_a_choice_may_go_on_as_another(tokenizer):
    options = ["a", "ab", "abé", "abé天", "b a", "天"]
    guide = choices(tokenizer, options)
    check_tables(guide, tokenizer)
    for seed in range(20):
        assert walk(guide, tokenizer, seed, matches=options.__contains__) in options
    for option in options:
        for seed in range(5):
            assert accepts(guide, tokenizer, spelled(tokenizer, option, seed))
    assert {walk(guide, tokenizer, seed) for seed in range(200)} == set(options)


def test_tokens_hold_parts_of_characters():
    tokenizer = bpe()
    guide = regex(tokenizer, "a?é+b|🙂")
    for text, pieces in {
        "aéb": [b"a\xc3", b"\xa9b"],
        "éé": None,
        "ééb": ["é".encode(), b"\xc3", b"\xa9b"],
        "🙂": [b"\xf0", b"\x9f", b"\x99\x82"],
    }.items():
        if pieces is None:
            assert not accepts(guide, tokenizer, tokenizer.encode(text))
        else:
            tokens = [tokenizer.ranks.index(piece) for piece in pieces]
            assert tokenizer.decode(tokens) == text and accepts(guide, tokenizer, tokens)
    inside = guide.after(0, tokenizer.ranks.index(b"a\xc3"))
    allowed = {tokenizer.pieces[token] for token in np.flatnonzero(guide.allowed(inside))}
    assert allowed == {b"\xa9", b"\xa9b"}


def test_constrained_text_keeps_its_first_space_after_a_prompt():
    """Where a first token would lose the space in front of it, what follows a prompt keeps it."""
    tokenizer = TOKENIZERS["sentencepiece"]
    prompt = tokenizer.encode("b")
    assert tokenizer.decode(prompt) == "b"
    for pattern in ("ab", " ab", " a é"):
        guide = regex(tokenizer, pattern)
        for seed in range(5):
            tokens = spelled(tokenizer, pattern, seed)
            assert accepts(guide, tokenizer, tokens)
            assert tokenizer.decode([*prompt, *tokens]) == "b" + pattern
    assert not accepts(regex(tokenizer, "ab"), tokenizer, tokenizer.encode("ab"))  # " ab"


def test_a_constraint_avoids_text_that_the_tokenizer_cannot_spell():
    tokenizer = Characters("abcx")
    assert {walk(regex(tokenizer, "a(b[^abc]|c*é|x)?[a-cé]"), tokenizer, i) for i in range(99)} == {
        *("aa", "ab", "ac", "abxa", "abxb", "abxc", "axa", "axb", "axc")
    }
    with pytest.raises(InputError, match="no text is possible"):
        regex(tokenizer, "aé|[x-z]+y")
    with pytest.raises(InputError, match="no tokens for 'aé'"):
        choices(tokenizer, ["a", "aé"])


def test_an_id_of_no_token_is_never_allowed():
    replacement = "\ufffd".encode()
    tokenizer = bpe()
    unused = tokenizer.eot + 1
    assert tokenizer.pieces[unused] == replacement
    guide = regex(tokenizer, ".*")
    assert not guide.allowed(0)[unused]
    real = BPE("bpe", [*tokenizer.ranks, replacement], PATTERN, {EOT: 300, "<|user|>": 302})
    guide = regex(real, "\ufffd")
    assert accepts(guide, real, [len(tokenizer.ranks)]) and not guide.allowed(0)[301]


def test_other_ids_can_end_the_text():
    tokenizer = bpe()
    user = tokenizer.specials["<|user|>"]
    guide = choices(tokenizer, ["a"], ends=[user, ord("z")])
    state = guide.after(0, ord("a"))
    assert set(np.flatnonzero(guide.allowed(state))) == {user, ord("z")}
    for ends, message in (([], "at least one"), ([-1], "ends has -1"), ([400], "ids are 0 to 2")):
        with pytest.raises(InputError, match=message):
            choices(tokenizer, ["a"], ends=ends)


names = st.sampled_from(["a", "b", 'q"\\', "é天", "ab"])
texts = st.text(
    st.sampled_from('ab1 é天🙂"\\/\n\t{}[],:') | st.characters(codec="utf-8"), max_size=5
).map(lambda text: re.sub(r"[\x00-\x07\x0b\x0e-\x1f]", "", text))
small = st.integers(-30, 30)
values_of_any = st.recursive(
    st.none() | st.booleans() | small | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def objects(draw, inner):
    properties = draw(st.dictionaries(names, inner, min_size=1, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required}


@st.composite
def bounded(draw, low, high, lengths):
    least, most = sorted((draw(lengths), draw(lengths)))
    return {name: n for name, n in ((low, least), (high, most)) if draw(st.booleans())}


def extended(schemas, more):
    return st.tuples(schemas, more).map(lambda pair: pair[0] | pair[1])


scalars = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}]),
    extended(st.just({"type": "string"}), bounded("minLength", "maxLength", st.integers(0, 4))),
    extended(
        st.sampled_from([{"type": "integer"}, {"type": "number"}]),
        bounded("minimum", "maximum", small),
    ),
    st.lists(values_of_any, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    values_of_any.map(lambda value: {"const": value}),
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        objects(inner),
        inner.map(lambda one: {"type": "object", "additionalProperties": one}),
        extended(
            inner.map(lambda one: {"type": "array", "items": one}),
            bounded("minItems", "maxItems", st.integers(0, 3)),
        ),
        st.lists(inner, min_size=1, max_size=2).map(
            lambda some: {"type": "array", "prefixItems": some, "minItems": len(some) - 1}
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=4,
)


def values(schema):
    """Values that meet a schema of `schemas`, as a guide lets them be written."""
    match schema:
        case {"enum": some}:
            return st.sampled_from(some)
        case {"const": value}:
            return st.just(value)
        case {"anyOf": some}:
            return st.one_of([values(one) for one in some])
        case {"type": [*types]}:
            return st.one_of([values({"type": one}) for one in types])
        case {"type": "null"}:
            return st.none()
        case {"type": "boolean"}:
            return st.booleans()
        case {"type": "string"}:
            least, most = schema.get("minLength", 0), schema.get("maxLength", 9)
            return texts.map(lambda text: (text + "a" * least)[:most])
        case {"type": "integer" | "number" as name}:
            low, high = schema.get("minimum", -99), schema.get("maximum", 99)
            tenths = st.integers(low * 10, high * 10).map(lambda tenth: tenth / 10)
            return st.integers(low, high) if name == "integer" else tenths
        case {"type": "array", "prefixItems": some}:
            whole = st.tuples(*map(values, some)).map(list)
            return whole | whole.map(lambda items: items[: len(items) - 1])
        case {"type": "array", "items": one}:
            least, most = schema.get("minItems", 0), schema.get("maxItems", 3)
            return st.lists(values(one), min_size=least, max_size=max(least, most))
        case {"type": "object", "properties": some, "required": required}:
            every = st.fixed_dictionaries({name: values(one) for name, one in some.items()})
            return st.tuples(every, st.sets(st.sampled_from([*some]))).map(
                lambda pair: {
                    name: pair[0][name] for name in some if name in required or name in pair[1]
                }
            )
        case {"type": "object", "additionalProperties": one}:
            return st.dictionaries(names, values(one), max_size=2)
    raise AssertionError(schema)


def meets(schema):
    """Whether text is JSON that meets a schema."""
    validator = jsonschema.Draft202012Validator(schema)

    def check(text):
        try:
            return validator.is_valid(json.loads(text))
        except json.JSONDecodeError:
            return False

    return check


@given(schemas, some_tokenizer, st.integers(0, 9), st.data())
@settings(deadline=None, max_examples=100)
def test_a_schema_is_met_and_all_its_values_can_be_written(schema, tokenizer, seed, data):
    if tokenizer.kind == "characters":
        tokenizer = TOKENIZERS["bpe"]
    guide = json_schema(tokenizer, schema)
    check_tables(guide, tokenizer)
    assert meets(schema)(walk(guide, tokenizer, seed, matches=meets(schema)))
    value = data.draw(values(schema))
    separators = data.draw(st.sampled_from([(",", ":"), (", ", ": "), (",", ": ")]))
    text = json.dumps(value, ensure_ascii=False, separators=separators)
    assert accepts(guide, tokenizer, spelled(tokenizer, text, seed)), text


PERSON = {
    "$defs": {
        "name/first~": {"type": "string", "pattern": "^[A-Z][a-zé]*$", "maxLength": 5},
        "pet": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
                    "required": ["kind"],
                },
                {
                    "type": "object",
                    "properties": {"kind": {"enum": ["dog", "wolf"]}, "name": {"type": "string"}},
                    "required": ["kind", "name"],
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        },
    },
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"allOf": [{"$ref": "#/$defs/name~1first~0"}], "description": "the first"},
        "age": {"type": ["integer", "null"], "minimum": 0, "exclusiveMaximum": 150, "default": 3},
        "born": {"type": "string", "format": "date"},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/pet"}, "maxItems": 3},
        "notes": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 3}},
        "point": {"prefixItems": [{"type": "number"}, {"type": "number"}], "items": False},
        "more": {"type": "object"},
        "any": True,
    },
    "required": ["name", "score", "pets"],
}


def test_a_schema_like_those_of_real_requests():
    tokenizer = bpe()
    for guide in (json_schema(tokenizer, PERSON), json_schema(tokenizer, json.dumps(PERSON))):
        check_tables(guide, tokenizer)
        for seed in range(10):
            assert meets(PERSON)(walk(guide, tokenizer, seed, patience=60))
    for value in (
        {"name": "Zoé", "score": 0.25, "pets": []},
        {
            "name": "A",
            "age": 149,
            "born": "1999-12-31",
            "score": 1,
            "pets": [None, {"kind": "cat", "lives": 9}, {"kind": "wolf", "name": '"\\'}],
            "notes": {"a": "b", "é": "天"},
            "point": [1, -2.5e7],
            "more": {"a": [{"b": None}], "c": {"d": [True]}},
            "any": [[["x"]]],
        },
    ):
        jsonschema.validate(value, PERSON)
        assert accepts(guide, tokenizer, tokenizer.encode(json.dumps(value, ensure_ascii=False)))


def test_the_order_is_the_schemas_and_spaces_are_few():
    schema = {
        "properties": {"a": {"type": "integer"}, "b": {"items": {"type": "null"}}, "c": {}},
        "required": ["b"],
    }
    tokenizer = Bytes()
    guide = json_schema(tokenizer, schema)
    for text, right in {
        '{"a":1,"b":[null, null],"c": "\\n\\""}': True,
        '{"a": 1, "b": []}': True,
        '{"b":[]}': True,
        '{"b": [], "a": 1}': False,
        '{"a": 1}': False,
        '{"a": 1, "b": [], "d": 1}': False,
        '{"a": 1, "b": [],}': False,
        '{"a": 01, "b": []}': False,
        '{"a": 1,  "b": []}': False,
        '{ "b":[]}': False,
        '{"b" :[]}': False,
        '{"b":[] }': False,
        '{"b":[]}\n': False,
        '{"b":[],"c":"\n"}': False,
        '{"b":[],"c":"\\u00e9"}': False,
        '{"b":[],"c":[[[1]]]}': True,
        '{"b":[],"c":[[[[1]]]]}': False,
        '{"b":[],"c":-1.5e+10}': True,
        '{"b":[],"c":1e100}': False,
    }.items():
        assert accepts(guide, tokenizer, tokenizer.encode(text)) == right, text


NUMBERS = [
    *("0", "-0", "0.0", "0.5", "-0.5", "1", "1.0", "-1.0", "1.000001", "0.999999", "-1.000001"),
    *("9", "9.5", "10", "10.0", "10.5", "11", "99", "100", "101", "-9", "-10", "-10.5", "-11"),
    *("19.999999", "20", "-99", "-100", "123456789", "-123456789.25", "0.000001", "-0.000001"),
]


@given(
    st.sampled_from(["integer", "number"]),
    st.dictionaries(
        st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
        st.integers(-120, 120) | st.sampled_from([0, 0.5, -1.5, 1.0, 10, -10, 100]),
        min_size=1,
    ),
)
@settings(deadline=None, max_examples=100)
def test_numbers_are_within_their_bounds(name, bounds):
    tokenizer, schema = Bytes(), {"type": name} | bounds
    valid = jsonschema.Draft202012Validator(schema).is_valid
    if name == "number" and any(bound % 1 for bound in bounds.values()):
        with pytest.raises(InputError, match="is not whole"):
            json_schema(tokenizer, schema)
        return
    whole = [str(n) for n in range(-130, 131)]
    written = whole if name == "integer" else [*whole, *NUMBERS]
    right = [text for text in written if valid(json.loads(text))]
    if max(bounds.get("minimum", -1), bounds.get("exclusiveMinimum", -1)) >= 0:
        right = [text for text in right if text[0] != "-"]  # zero has no sign there
    try:
        guide = json_schema(tokenizer, schema)
    except InputError as error:
        assert "nothing is within" in str(error) and not right
        return
    assert [t for t in written if accepts(guide, tokenizer, tokenizer.encode(t))] == right
    for seed in range(5):
        assert meets(schema)(walk(guide, tokenizer, seed, patience=4))


@pytest.mark.parametrize(
    "pattern",
    ["b", "^b", "b$", "^b$", "^a|b$", "(^a|b)(c$|[^a]$)", "^$", "", "^(a.|\\S\\n)+$", '"|\\\\'],
)
def test_a_pattern_may_match_anywhere_in_a_string(pattern):
    tokenizer, schema = Bytes(), {"type": "string", "pattern": pattern, "maxLength": 3}
    guide = json_schema(tokenizer, schema)
    check_tables(guide, tokenizer)
    for seed in range(20):
        assert meets(schema)(walk(guide, tokenizer, seed, patience=5))
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice('abc"\\\né') for _ in range(rng.randrange(5)))
        # Python's $ is also before a newline at the end, JSON schema's is not.
        right = re.search(pattern.replace("$", r"\Z"), text) and len(text) <= 3
        written = tokenizer.encode(json.dumps(text, ensure_ascii=False))
        assert accepts(guide, tokenizer, written) == bool(right), text


def test_a_pattern_means_what_ecma_and_python_agree_on():
    tokenizer = Bytes()

    def strings(pattern):
        guide = json_schema(tokenizer, {"type": "string", "pattern": f"^{pattern}$"})
        some = "1a_ é\u0663\u2028\ufeff\n"
        dumped = [json.dumps(character, ensure_ascii=False) for character in some]
        pairs = zip(some, dumped, strict=True)
        return "".join(c for c, text in pairs if accepts(guide, tokenizer, tokenizer.encode(text)))

    assert strings(r"\d") == "1" and strings(r"\w") == "1a_" and strings(r"\s") == " \n"
    assert strings(r"\D") == "a_ é\u2028\ufeff\n" and strings(r"\S") == "1a_é\u0663"
    assert strings(r"[^\s]") == strings(r"\S") and strings(r"[^\D]") == "1"
    assert strings(".") == "1a_ é\u0663\ufeff"


@pytest.mark.parametrize(
    "name, check",
    {
        "date": datetime.date.fromisoformat,
        "time": datetime.time.fromisoformat,
        "date-time": datetime.datetime.fromisoformat,
        "uuid": uuid.UUID,
        "ipv4": ipaddress.IPv4Address,
        "email": re.compile(r"[^@\s.]+(\.[^@\s.]+)*@([^@\s.]+\.)+[a-zA-Z]{2,}").fullmatch,
    }.items(),
)
def test_a_format_is_kept(name, check):
    guide = json_schema(Bytes(), {"type": "string", "format": name})
    for seed in range(50):
        assert check(json.loads(walk(guide, Bytes(), seed))) is not False
    example = {"date": "2024-02-28", "date-time": "2000-01-31T23:59:59.5+01:00"}.get(name)
    if example:
        assert accepts(guide, Bytes(), Bytes().encode(json.dumps(example)))


@pytest.mark.parametrize(
    "schema, message",
    [
        ("{", "not JSON"),
        ("[1]", r"schema at #: \[1\] is no schema"),
        ({"enum": {1}}, "not JSON"),
        ({"const": float("nan")}, "NaN"),
        ('{"const": -1e400}', "-1e400 is not a finite number"),
        ({"const": "\ud800"}, "surrogate"),
        (False, "at #: False is no schema that a value can meet"),
        ({"type": "text"}, "type='text' is none of string, integer"),
        ({"type": []}, "leaves none"),
        ({"type": "integer", "multipleOf": 5}, "multipleOf is not supported"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "#/properties/a: uniqueIt"),
        ({"type": "string", "minimum": 3}, "minimum says nothing of type string"),
        ({"type": "string", "minLenght": 3}, "minLenght is not supported"),
        ({"not": {}}, "not is not supported"),
        ({"anyOf": [{}], "minLength": 1}, "minLength is not supported beside anyOf"),
        ({"$ref": "#", "type": "string"}, r"type is not supported beside \$ref"),
        ({"anyOf": []}, "no list with something in it"),
        ({"enum": []}, "no list with something in it"),
        ({"type": "string", "enum": ["a", 1]}, "1 is not of type string"),
        ({"type": "integer", "const": True}, "True is not of type integer"),
        ({"allOf": [{}, {}]}, "allOf of more than one"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "tell 0 and 1 apart"),
        ({"oneOf": [{"type": "string"}, {"minimum": 1}]}, "tell 0 and 1 apart"),
        ({"$ref": "#"}, "inside of itself"),
        (
            {"$ref": "#/$defs/b", "$defs": {"b": {"items": {"$ref": "#/$defs/b"}}}},
            "inside of itself",
        ),
        ({"$ref": "#/$defs/b"}, "'#/\\$defs/b' is not there"),
        ({"$ref": "other.json#/a"}, "is no #/... of this schema"),
        ({"required": ["a"], "properties": {"b": {}}}, "'a' is required, but not among"),
        ({"required": "a"}, "no list of names"),
        ({"properties": []}, "no table"),
        ({"properties": {"a": {}}, "additionalProperties": {}}, "beside properties"),
        ({"minItems": 3, "maxItems": 2}, "minItems=3 is more than maxItems=2"),
        ({"minLength": -1}, "minLength=-1 is no count"),
        ({"maxLength": 1.5}, "maxLength=1.5 is no count"),
        ({"minItems": 3, "prefixItems": [{}, {}]}, "only 2 items are described"),
        ({"items": [{}]}, "is no schema"),
        ({"minimum": "3"}, "minimum='3' is no number"),
        ({"exclusiveMinimum": True, "minimum": 3}, "exclusiveMinimum=True is no number"),
        ({"type": "integer", "minimum": 1e30}, "is beyond"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "nothing is within"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": r"(a)\1"}, "a reference to a group"),
        ({"pattern": 3}, "pattern=3 is no text"),
        ({"format": "hostname"}, "format='hostname' is none of date"),
        ({"pattern": "^a$", "minLength": 2}, "no text is possible"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(schema, message):
    with pytest.raises(InputError, match=message):
        json_schema(Bytes(), schema)


@pytest.mark.parametrize(
    "pattern, message",
    [
        (None, "give the text of a regular expression"),
        ("a(", "not a regular expression: missing \\)"),
        ("a{3,2}", "not a regular expression"),
        ("\ud800", "surrogate"),
        ("a(?=b)", "a look ahead or behind"),
        ("(?<!b)a", "a look ahead or behind"),
        (r"(a)\1", "a reference to a group"),
        (r"\ba", "a boundary of words"),
        ("(?>a)", "an atomic group"),
        ("a*+", "a possessive repetition"),
        ("(?i)a", "flags"),
        ("(?i:a)", "flags"),
        ("a^b", r"\^ or \$ inside"),
        ("(a$)*b", r"\^ or \$ inside"),
        ("[^\x00-\U0010ffff]", "no text is possible"),
    ],
)
def test_a_pattern_that_cannot_be_kept_is_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        regex(Bytes(), pattern)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "give a list with at least one"),
        ("yes", "give a list"),
        (["a", ""], "'' is among the choices"),
        (["a", 1], "1 is among the choices"),
        (["a", "b", "a"], "'a' is twice"),
        (["\ud800"], "surrogate"),
    ],
)
def test_choices_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        choices(Bytes(), options)


def nested(levels):
    schema = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(levels):
    """A schema of a few lines with 2**levels values in each other."""
    pair = {str(i): {"prefixItems": 2 * [{"$ref": f"#/$defs/{i + 1}"}]} for i in range(levels)}
    return {"$ref": "#/$defs/0", "$defs": pair | {str(levels): {"type": "null"}}}


@pytest.mark.parametrize(
    "make, value, message",
    [
        (regex, "(a{1,1000}){1,1000}", "too complex"),
        (regex, "(a|aa){1000}", "too complex|limit=4096"),
        (regex, "[ab]*a[ab]{30}", "limit=4096"),
        (regex, ".{5000}", "limit=4096"),
        (regex, "(.*)" * 2000, "too complex|too deep"),
        (regex, "a?" * 1000 + "a" * 1000, "too complex|too deep"),
        (regex, "|".join(f"[^{chr(i)}]{chr(i)}" for i in range(0x4E00, 0x5800)), "too complex"),
        (regex, "(" * 5000 + ")" * 5000, "too deep"),
        (regex, "a" * 50_001, "50,001 characters"),
        (json_schema, nested(5000), "too deep|140,016 characters"),
        (json_schema, '{"a":' * 10_000, "too deep|not JSON"),
        (json_schema, doubling(30), "limit=4096"),
        (json_schema, {"type": "string", "maxLength": 10**9}, "limit=4096"),
        (json_schema, {"type": "array", "minItems": 10**9}, "limit=4096"),
        (
            json_schema,
            {"properties": {f"{i}": {"type": "null"} for i in range(800)}},
            "too complex",
        ),
        (json_schema, {"oneOf": [{"const": i} for i in range(2000)]}, "too complex"),
        (json_schema, {"oneOf": 2 * [{"enum": list(range(1001))}]}, "too complex"),
        (choices, ["a" * 5000], "limit=4096"),
        (choices, ["a" * 50_001], "50,001 characters"),
    ],
)
def test_a_constraint_of_too_many_states_is_refused(make, value, message):
    with pytest.raises(InputError, match=message):
        make(Bytes(), value)


def test_a_limit_can_be_set():
    assert len(regex(Bytes(), "a{9}", limit=11).next_SC) == 11
    with pytest.raises(InputError, match="more than limit=10 states"):
        regex(Bytes(), "a{9}", limit=10)
    with pytest.raises(InputError, match="set it from 2 to 16384"):
        regex(Bytes(), "a{9}", limit=10**6)


def test_a_stacked_batch_is_followed_on_the_device():
    tokenizer, V = bpe(), 512
    rows = [choices(tokenizer, ["ab", "é"]), None, json_schema(tokenizer, PERSON)]
    classes_BV, next_BSC = stacked(rows, V)
    assert classes_BV.dtype == next_BSC.dtype == np.int32
    assert {size & size - 1 for size in next_BSC.shape[1:]} == {0}
    assert stacked([None], V)[1].tolist() == [[[0]]]

    @jax.jit
    def step(classes_BV, next_BSC, state_B, token_B):
        B = jnp.arange(len(state_B))
        allowed_BV = next_BSC[B[:, None], state_B[:, None], classes_BV] >= 0
        return allowed_BV, next_BSC[B, state_B, classes_BV[B, token_B]]

    rng, state_B = random.Random(0), [0, 0, 0]
    for _ in range(30):
        allowed_BV, _ = step(classes_BV, next_BSC, jnp.array(state_B), jnp.zeros(3, int))
        allowed_BV = np.asarray(allowed_BV)
        assert allowed_BV[1].all() and not allowed_BV[[0, 2], tokenizer.vocab_size :].any()
        for row in (0, 2):
            expected = rows[row].allowed(state_B[row])
            assert (allowed_BV[row, : tokenizer.vocab_size] == expected).all()
        token_B = [rng.choice(np.flatnonzero(allowed_V)) for allowed_V in allowed_BV]
        _, next_B = step(classes_BV, next_BSC, jnp.array(state_B), jnp.array(token_B))
        state_B = np.asarray(next_B).tolist()
        assert state_B[1] == 0
    with pytest.raises(InputError, match="V=100"):
        stacked(rows, 100)
