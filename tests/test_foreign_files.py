"""Untrusted files: whatever is in them, loading succeeds or raises InputError, quickly."""

import datetime
import decimal
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxgpt
from jaxgpt import data, pretrained, strict_json
from jaxgpt.chat import choose
from jaxgpt.cli import _given, _json
from jaxgpt.data import json_files, parquet, records, textfile
from jaxgpt.data.records import open_records
from jaxgpt.data.sources import measure, open_source
from jaxgpt.errors import InputError
from jaxgpt.generation.constrained import choices, json_schema, regex
from jaxgpt.model.params import flat
from jaxgpt.paths import regular_file
from jaxgpt.pretrained import peft
from jaxgpt.pretrained.export import new_folder
from jaxgpt.terminal import read_message
from jaxgpt.tokenizer import Bytes, HuggingFace, TokenizerConfig, build
from jaxgpt.tokenizer.exported import to_tokenizer_json
from jaxgpt.tokenizer.huggingface import read_text, read_tokenizer, write_tokenizer
from tests import tiny
from tests.tiny import PLAIN, random_params

HEALTH = list(HealthCheck)
SECONDS = 20  # far more than anything here takes, on a slow machine too


@pytest.fixture(autouse=True)
def soon():
    """Ends a test that does not end by itself."""

    def stop(*_):
        raise TimeoutError(f"did not end within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


LLAMA = replace(tiny.LLAMA, D=16, N=2, K=1, F=24, V=257)
MODELS = {
    "gpt2": replace(tiny.GPT2, N=2, T=8, V=257),
    "llama": LLAMA,
    "qwen3": replace(LLAMA, qk_norm=True),
    "gemma3_text": replace(
        LLAMA, L=7, norm="rmsnorm+1", post_norm=True, mlp="geglu", qk_norm=True,
        scale_embedding=True, window=8, global_every=6, rope_local_theta=1e4,
    ),
}  # fmt: skip


def export(folder, cfg, **options):
    """An export of random parameters, with a tokenizer and a manifest."""
    with new_folder(folder) as draft:
        write_tokenizer(Bytes(), draft, cfg.T)
        pretrained.write_model(draft, cfg, random_params(cfg.build(PLAIN)), **options)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    return {name: export(root / name, cfg) for name, cfg in MODELS.items()}


def copy(folder, to, manifest=False):
    shutil.copytree(folder, to, dirs_exist_ok=True)
    if not manifest:
        (to / "SHA256SUMS").unlink()
    return Path(to)


def edit(file, **changes):
    """Changes fields of a JSON file; a value of type bytes is put there as it is."""
    values = json.loads(file.read_text())
    raw = {f"@{name}@": value for name, value in changes.items() if isinstance(value, bytes)}
    values |= {name: f"@{name}@" if f"@{name}@" in raw else v for name, v in changes.items()}
    text = json.dumps(values).encode()
    for mark, value in raw.items():
        text = text.replace(json.dumps(mark).encode(), value)
    file.write_bytes(text)


SIZES = {
    "gpt2": ("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size"),
    **dict.fromkeys(
        ("llama", "qwen3", "gemma3_text"),
        (
            *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings"),
        ),
    ),
}
IMPOSSIBLE = (-1, 0, 10**18, 2**31 - 1, 10**400, 1.5, True, "3", [1], b"NaN", b"1e400")


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, fields in SIZES.items() for field in fields]
)
def test_an_impossible_size_is_refused_by_name_before_anything_is_made(
    exports, tmp_path, name, field
):
    folder = copy(exports[name], tmp_path / "model")
    for value in IMPOSSIBLE:
        shutil.copy(exports[name] / "config.json", folder)
        edit(folder / "config.json", **{field: value})
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match=rf"config.json.*({field}|NaN|1e400)"):
                pretrained.read_model(folder)
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"num_hidden_layers": 3}),
        ("llama", {"num_hidden_layers": 20}),  # as many as there are tensors
        ("llama", {"vocab_size": 256}),
        ("llama", {"head_dim": 4}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 1000}),
        ("gemma3_text", {"layer_types": [["full_attention"]] * 7}),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": -1}),
        ("gemma3_text", {"sliding_window": 10**30}),
        ("qwen3", {"max_window_layers": 10**30}),
    ],
)
def test_a_config_of_other_weights_is_refused(exports, tmp_path, name, changes):
    folder = copy(exports[name], tmp_path / "model")
    edit(folder / "config.json", **changes)
    with pytest.raises(InputError):
        pretrained.read_model(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": b"NaN"},
        {"rope_theta": b"-Infinity"},
        {"rope_theta": b"1e400"},
        {"rope_theta": 10**400},
        {"rope_theta": 1e300},
        {"rope_theta": 0},
        {"rope_theta": -1e4},
        {"rope_theta": 1e-300},
        {"rms_norm_eps": b"NaN"},
        {"rms_norm_eps": 1e39},
        {"rms_norm_eps": 0},
        {"initializer_range": b"Infinity"},
        {"rope_scaling": {"type": "linear", "factor": 1e-300}},
        {"rope_scaling": {"type": "linear", "factor": 10**400}},
        {
            "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
            | {"high_freq_factor": 4.0, "original_max_position_embeddings": 10**400}
        },
        {"torch_dtype": [[b"NaN".decode()]], "something": b"NaN"},
    ],
    ids=str,
)
def test_a_number_of_a_config_that_is_not_finite_is_refused(exports, tmp_path, changes):
    folder = copy(exports["llama"], tmp_path / "model")
    edit(folder / "config.json", **changes)
    with pytest.raises(InputError):
        pretrained.read_model(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_the_name_of_its_tensor(tmp_path, value):
    cfg = MODELS["gpt2"]
    params = jax.tree.map(np.copy, random_params(cfg.build(PLAIN)))
    params["blocks"]["1"]["up"]["w"][3, 5] = value
    pretrained.write_model(tmp_path, cfg, params)
    with pytest.raises(InputError, match=r"h\.1\.mlp\.c_fc\.weight' has NaN or infinite values"):
        pretrained.read_model(tmp_path).params()


def adapter(folder, cfg, b=0.5):
    shapes = {"lora_a": (2, cfg.D), "lora_b": (cfg.N, cfg.sizes["H"], 2), "lora_scale": ()}
    q = {name: np.full(shape, b, np.float32) for name, shape in shapes.items()}
    q["lora_scale"] = np.ones((), np.float32)
    with new_folder(folder) as draft:
        peft.write_adapter(draft, cfg, {"blocks": {"0": {"q": q}}}, "base")
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        *({"r": value} for value in (0, -1, 10**18, 2**31 - 1, 1.5, True)),
        *({"lora_alpha": value} for value in (b"NaN", b"Infinity", b"1e400", 10**400, 1e300)),
        {"rank_pattern": {"q_proj": 10**18}},
        {"rank_pattern": {r"(\w|[a-z_.])*([a-z.]+)*X": 2, "(": 1}},
        {"rank_pattern": {"(" * 5000: 2}},
        {"rank_pattern": {"(a{1000}){1000}": 2}},
        {"rank_pattern": {str(n): 2 for n in range(100_000)}},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_an_impossible_field_of_an_adapter_is_refused(tmp_path, changes):
    folder = copy(adapter(tmp_path / "made", LLAMA), tmp_path / "adapter")
    edit(folder / "adapter_config.json", **changes)
    with pytest.raises(InputError, match="adapter_config.json"):
        peft.read_adapter(folder, LLAMA)


def test_a_pattern_that_backtracks_forever_is_matched_in_time(tmp_path):
    folder = copy(adapter(tmp_path / "made", LLAMA), tmp_path / "adapter")
    # Python's re takes 2^30 steps to see that the first does not match.
    pattern = {r"([a-z._0-9]|[a-z._0-9]+)*X": 7, r"(self_attn|mlp)\.[qk]_proj": 2}
    edit(folder / "adapter_config.json", r=3, rank_pattern=pattern)
    assert flat(peft.read_adapter(folder, LLAMA))["blocks", "0", "q", "lora_a"].shape == (
        2,
        LLAMA.D,
    )


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(InputError, match="lora_A of .*q_proj' has NaN or infinite values"):
        peft.read_adapter(adapter(tmp_path / "adapter", LLAMA, np.nan), LLAMA)


# Not regular files.


@pytest.fixture(params=["FIFO", "folder", "socket", "device"])
def irregular(request, tmp_path):
    """A function that puts something at a path that is no regular file."""

    def put(path):
        path = Path(path)
        if path.exists():
            path.unlink()
        match request.param:
            case "FIFO":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "socket":
                here = os.getcwd()
                os.chdir(path.parent)  # a socket's path is short
                try:
                    socket.socket(socket.AF_UNIX).bind(path.name)
                finally:
                    os.chdir(here)
            case "device":
                path.symlink_to("/dev/zero")
        return path

    return put


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_irregular_files_are_never_opened(exports, tmp_path, irregular):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        folder = copy(exports["gpt2"], tmp_path / name.replace(".", "-"))
        irregular(folder / name)
        with pytest.raises(InputError, match=name):
            jaxgpt.load(folder)
    folder = copy(exports["gpt2"], tmp_path / "summed", manifest=True)
    irregular(folder / "SHA256SUMS")
    with pytest.raises(InputError, match="SHA256SUMS"):
        jaxgpt.load(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        made = adapter(tmp_path / f"made {name}", LLAMA)
        folder = copy(made, tmp_path / f"adapter {name}")
        irregular(folder / name)
        with pytest.raises(InputError, match=name):
            peft.read_adapter(folder, LLAMA)
    for name in ("a.txt", "a.jsonl", "a.parquet", "a.csv", "a.json"):
        path = str(irregular(tmp_path / name))
        if not os.path.isdir(path):
            with pytest.raises(InputError, match=name):
                measure(open_source(path))
        if name != "a.txt":
            with pytest.raises(InputError, match=name):
                open_records(path)
        with pytest.raises(InputError, match=name):
            _json(path)
        with pytest.raises(InputError, match=name):
            _given((), path)


def test_a_folder_of_data_reports_what_is_no_file(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nothing")
    source = open_source(str(tmp_path))
    assert measure(source) == 4
    assert [Path(line.split(":")[0]).name for line in source.skipped] == ["b.txt", "c.txt"]


def test_a_link_to_a_regular_file_is_one(tmp_path):
    (tmp_path / "a").write_text("text")
    (tmp_path / "b").symlink_to("a")
    assert regular_file(tmp_path / "b") == tmp_path / "b"


# JSON.


@pytest.mark.parametrize(
    "text",
    [
        *("NaN", "[Infinity]", '{"a": -Infinity}', "1e400", "-1e400", "[" * 101 + "]" * 101),
        *("[" * 100_000, '{"a":' * 100_000, "1" * 5000, b"\xff", "", "{", "[1,]", "'a'"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_invalid_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        strict_json.loads(text)


@settings(max_examples=50, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)  # fmt: skip
def test_json_is_read_as_python_reads_it(value):
    text = json.dumps(value)
    assert strict_json.loads(text) == strict_json.loads(text.encode()) == value


def test_brackets_in_text_are_no_depth():
    value = {"a": "[{" * 1000, "b": [[]] * 200}
    assert strict_json.loads(json.dumps(value)) == value


MARK = "\ufeff"
TEXT_INPUTS = {  # what a reader of text makes of a file
    "a file of texts": lambda file, _: _given((), str(file)),
    "standard input": lambda file, patch: (
        patch.setattr("sys.stdin", io.StringIO(file.read_text())),
        _given((), "-"),
    )[1],
    "a message": lambda file, patch: (
        patch.setattr("sys.stdin", io.StringIO(file.read_text())),
        read_message("")[0],
    )[1],
    "JSON": lambda file, _: (strict_json.loads(file.read_text()), _json(str(file))),
    "a tokenizer's file": lambda file, _: read_text(file.parent, file.name),
    "a corpus": lambda file, _: list(data.texts(data.DataConfig((str(file),), val_fraction=0.0))),
    "an alphabet": lambda file, _: build(
        TokenizerConfig(kind="characters"), data.texts(data.DataConfig((str(file),)))
    ).to_json(),
}


@pytest.mark.parametrize("name", TEXT_INPUTS)
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, name):
    (tmp_path / "a.txt").write_text(MARK + '{"a": 1}')
    (tmp_path / "b.txt").write_text('{"a": 1}')
    marked, plain = (TEXT_INPUTS[name](tmp_path / f, monkeypatch) for f in ("a.txt", "b.txt"))
    assert marked == plain and MARK not in str(marked)


# Data.


@pytest.mark.parametrize("content", ["[" * 5000, '{"text":' * 5000, '{"text": "b", "x": NaN}'])
def test_json_that_is_too_deep_or_not_finite_is_refused_by_line(tmp_path, content):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "a"}}\n{content}\n')
    for read_all in (lambda path: measure(open_source(path)), open_records):
        with pytest.raises(InputError, match=r"a.jsonl:2 is not JSON"):
            read_all(str(file))
    file = tmp_path / "a.json"
    file.write_text(f'[{{"text": "a"}},\n{content}]\n')
    with pytest.raises(InputError, match=r"a.json is not JSON"):
        open_records(str(file))


def test_a_line_of_unbounded_length_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "LARGEST_LINE", 1000)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "' + "a" * 1000 + '"}\n')
    for read_all in (lambda path: measure(open_source(path)), open_records):
        with pytest.raises(InputError, match=r"a.jsonl:2 has more than 1,000 characters; split"):
            read_all(str(file))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_records_that_take_too_much_memory_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(records, "LARGEST_RECORDS", 20_000)
    lines = {"a.jsonl": '{"x": [[], [], [], {}]}\n' * 100, "a.csv": "x,y\n" + ",\n" * 1000}
    (tmp_path / name).write_text(lines[name])
    with pytest.raises(
        InputError, match=rf"{name}:\d+: the records up to here take more than 20,000"
    ):
        open_records(str(tmp_path / name))


def test_a_json_file_that_is_too_large_to_parse_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LARGEST_JSON", 1000)
    (tmp_path / "a.json").write_text("[" + '{"a": 1},' * 200 + "]")
    with pytest.raises(InputError, match=r"a.json has more than 1,000 char.*to JSON Lines"):
        open_records(str(tmp_path / "a.json"))


MIB = 1 << 20
BOMBS = {  # each far larger in memory than in its file
    "a page of zeros": lambda: ["\0" * (20 * MIB)],
    "a dictionary": lambda: ["ab" * 1000] * 100_000,
    "runs of nulls": lambda: pyarrow.nulls(20_000_000, pyarrow.string()),
    "runs of nothing": lambda: pyarrow.array([""]).take(pyarrow.array(np.zeros(5_000_000, int))),
    "runs of numbers": lambda: pyarrow.array(np.zeros(20_000_000, np.int8)),
    "a long list": lambda: pyarrow.array([np.zeros(20_000_000, np.int8)]),
    "lists of text": lambda: [["ab" * 1000] * 100] * 1000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_parquet_that_expands_without_bound_is_refused(tmp_path, monkeypatch, bomb):
    monkeypatch.setattr(parquet, "ALWAYS_ALLOWED", 8 * MIB)
    monkeypatch.setattr(records, "LARGEST_RECORDS", 64 * MIB)
    file = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": BOMBS[bomb]()}), file, compression="zstd")
    assert os.path.getsize(file) < MIB
    before = pyarrow.default_memory_pool().bytes_allocated()
    for read_all in (lambda path: measure(open_source(path)), open_records):
        with pytest.raises(InputError, match=r"a.parquet"):
            read_all(file)
    assert pyarrow.default_memory_pool().bytes_allocated() - before < 8 * MIB


def test_a_text_that_a_dictionary_holds_once_takes_memory_once(tmp_path):
    file = str(tmp_path / "a.parquet")
    rows = pyarrow.array(["ab" * 500_000]).take(pyarrow.array(np.zeros(800, int)))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file, compression="zstd")
    del rows
    code = (
        "import itertools, resource, sys\n"
        "from jaxgpt.data.formats import open_documents\n"
        "import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "documents = open_documents(sys.argv[1]).documents()\n"
        "n = sum(len(piece) for document in documents for piece in document)\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    length, kilobytes = map(int, done.stdout.split())
    assert length == 800 * 1_000_000 and kilobytes < 100_000, done.stderr


def test_parquet_with_every_kind_of_value_arrives_unchanged(tmp_path):
    rows = [
        {
            "text": f"text {n}",
            "bytes": b"b%d" % n,
            "chat": [{"role": "user", "content": "hi"}] * n,
            "pairs": [("k", "v")] * n,
            "more": {"who": "me", "n": n},
            "day": datetime.date(2020, 1, 1 + n),
            "price": decimal.Decimal("1.20"),
            "nothing": None,
        }
        for n in range(3)
    ]
    table = pyarrow.Table.from_pylist(
        [{k: v for k, v in row.items() if k != "pairs"} for row in rows]
    )
    pairs = pyarrow.array(
        [row["pairs"] for row in rows], pyarrow.map_(pyarrow.string(), pyarrow.string())
    )
    table = table.append_column("pairs", pairs)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert [record.values for record in open_records(str(tmp_path / "a.parquet"))] == rows


def test_damaged_parquet_is_refused_by_name(tmp_path):
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"some text {n}" for n in range(2000)]})
    pyarrow.parquet.write_table(table, file, compression="snappy")
    whole = file.read_bytes()
    for start in (4, 40, 400, len(whole) - 300, len(whole) - 30):
        file.write_bytes(whole[:start] + b"\xff" * 20 + whole[start + 20 :])
        for read_all in (lambda path: measure(open_source(path)), open_records):
            with pytest.raises(InputError, match=r"a.parquet.*damaged"):
                read_all(str(file))


# Constrained decoding.


def arrays_in_each_other(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        *(
            {"type": kind, bound: value}
            for kind in ("integer", "number")
            for bound in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
            for value in (10**400, -(10**400), 10**5000, 1e308)
        ),
        {"type": "integer", "multipleOf": 10**400},
        *({"type": "string", key: 10**400} for key in ("minLength", "maxLength")),
        *({"type": "array", key: 10**400} for key in ("minItems", "maxItems")),
        {"$ref": "#/$defs/a/" + "1" * 5000, "$defs": {"a": [{}]}},
        {"type": "string", "pattern": "a{99999999999999}"},
        {"type": "string", "pattern": "((a{1000}){1000}){1000}"},
        arrays_in_each_other(300),
        {"oneOf": [{"const": n} for n in range(3000)]},
        {"properties": {f"p{n}": {"type": "object"} for n in range(1500)}},
    ],
)
def test_a_schema_beyond_all_measure_is_refused(schema):
    with pytest.raises(InputError):
        json_schema(Bytes(), schema)


@pytest.mark.parametrize("digits", [400, 5000])
def test_the_text_of_a_schema_with_an_enormous_number_is_refused(digits):
    with pytest.raises(InputError):
        json_schema(Bytes(), '{"minimum": 1' + "0" * digits + "}")


def test_the_text_of_a_schema_that_is_too_deep_is_refused():
    with pytest.raises(InputError, match="nested deeper"):
        json_schema(Bytes(), '{"items":' * 4000 + "true" + "}" * 4000)


number = st.sampled_from(
    [0, 1, -1, 3, 2.5, 10**9, 10**18, 10**19, 10**400, 1e300, -0.0, True, None, "1", []]
)
names = st.sampled_from(["a", "b", "#/$defs/a", "#/$defs/b/0", "#/properties/a", "#", "string"])
kinds = st.sampled_from(
    ["string", "integer", "number", "array", "object", "boolean", "null", "x", None, 1]
)
some_pattern = st.text("ab.*+?(){}[]^$|\\dwsb1,9é", max_size=12)
anything = st.deferred(lambda: number | names | st.lists(schemas, max_size=3) | schemas)
schemas = st.deferred(
    lambda: (
        st.fixed_dictionaries(
            {},
            optional={
                "type": kinds | st.lists(kinds, max_size=3),
                **{key: number for key in ("minimum", "maximum", "exclusiveMinimum", "minLength")},
                **{key: number for key in ("maxLength", "minItems", "maxItems", "multipleOf")},
                "pattern": some_pattern | number,
                "format": st.sampled_from(["date", "email", "x", 1]),
                **{key: anything for key in ("items", "additionalProperties", "const", "enum")},
                **{
                    key: st.lists(anything, max_size=3) | number
                    for key in ("anyOf", "oneOf", "allOf")
                },
                "prefixItems": st.lists(schemas, max_size=3) | number,
                "properties": st.dictionaries(names, anything, max_size=3) | number,
                "required": st.lists(names | number, max_size=3) | number,
                "$ref": names | number,
                "$defs": st.dictionaries(names, anything, max_size=2) | number,
            },
        )
        | st.booleans()
    )
)


def compiles_or_is_refused(make, *given):
    try:
        guide = make(*given)
    except InputError:
        return
    assert guide.next_SC.size <= 1 << 23


@settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(schemas)
def test_any_schema_compiles_in_bounds_or_is_refused(schema):
    compiles_or_is_refused(json_schema, Bytes(), schema)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text("ab.*+?(){}[]^$|\\dwsbBAZ1,9-é🙂:?P<n>=!xi#\0\ud800", max_size=20) | st.text())
def test_any_pattern_compiles_in_bounds_or_is_refused(pattern):
    compiles_or_is_refused(regex, Bytes(), pattern)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.text("aé\ud800\0", max_size=30) | number, max_size=10) | st.text() | number)
def test_any_choices_compile_in_bounds_or_are_refused(options):
    compiles_or_is_refused(choices, Bytes(), options)


# Exports and their manifests.


def content(folder):
    """All that decides what a loaded model says."""
    config, params, tokenizer = jaxgpt.load(folder)
    leaves = {path: np.asarray(leaf) for path, leaf in flat(params).items()}
    return config.model, leaves, tokenizer.fingerprint


def same(one, other):
    return (
        one[::2] == other[::2]
        and one[1].keys() == other[1].keys()
        and all(np.array_equal(leaf, other[1][path]) for path, leaf in one[1].items())
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_of_an_export_is_named(exports, tmp_path, name, damage):
    folder = copy(exports["llama"], tmp_path / "model", manifest=True)
    if damage == "missing":
        (folder / name).unlink()
    else:
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: {damage}"):
        jaxgpt.load(folder)


def test_the_manifest_of_a_download_is_compared(exports, tmp_path):
    """In the hub's cache, where files are links, and some that are listed were not downloaded."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    copy(exports["gpt2"], blobs, manifest=True)
    lines = (blobs / "SHA256SUMS").read_text()
    (blobs / "SHA256SUMS").write_text(f"{'0' * 64}  pytorch_model.bin\n{lines}")
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert same(content(snapshot), content(exports["gpt2"]))
    edit(blobs / "config.json", initializer_range=0.5)
    with pytest.raises(InputError, match="config.json: changed"):
        jaxgpt.load(snapshot)


def test_a_damaged_shard_is_named(tmp_path):
    folder = export(tmp_path / "model", LLAMA, shard_bytes=10_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=rf"\({shard.name}: changed\)"):
        jaxgpt.load(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_named(tmp_path, name):
    folder = adapter(tmp_path / "adapter", LLAMA)
    peft.read_adapter(folder, LLAMA)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"\({name}: changed\)"):
        peft.read_adapter(folder, LLAMA)


def test_files_that_a_load_does_not_read_may_change(exports, tmp_path):
    folder = copy(exports["gpt2"], tmp_path / "model", manifest=True)
    before = content(folder)
    (folder / "README.md").write_text("edited")
    (folder / ".DS_Store").write_text("")
    lines = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  README.md\n{'0' * 64}  gone.txt\n{lines}")
    assert same(content(folder), before)


def test_a_manifest_of_sha256sum_itself_is_understood(exports, tmp_path):
    folder = copy(exports["gpt2"], tmp_path / "model")
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum")
    command = "sha256sum --binary ./* > SHA256SUMS"
    subprocess.run(["bash", "-c", command], cwd=folder, check=True)
    (folder / "SHA256SUMS").write_text(
        "".join(
            line
            for line in (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
            if "SHA256SUMS" not in line
        )
    )
    before = content(folder)
    edit(folder / "config.json", initializer_range=0.5)
    with pytest.raises(InputError, match="config.json: changed"):
        jaxgpt.load(folder)
    assert before


@st.composite
def damage(draw, files):
    """A file of a folder, and what becomes of its content; None: it is deleted."""
    name = draw(st.sampled_from(sorted(files)))
    whole = files[name]
    match draw(st.sampled_from(["flip", "flip", "cut", "insert", "delete"])):
        case "flip":
            place, bit = draw(st.integers(0, len(whole) - 1)), draw(st.integers(0, 7))
            return name, whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        case "cut":
            return name, whole[: draw(st.integers(0, len(whole) - 1))]
        case "insert":
            place = draw(st.integers(0, len(whole)))
            return name, whole[:place] + draw(st.binary(min_size=1, max_size=9)) + whole[place:]
    return name, None


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=HEALTH)
@given(data=st.data(), manifest=st.booleans())
def test_no_damage_is_loaded_silently(exports, tmp_path_factory, data, manifest):
    """Any change is an InputError, or changes nothing; without a manifest it may change a value."""
    good = exports["llama"]
    files = {file.name: file.read_bytes() for file in good.iterdir()}
    if not manifest:
        del files["SHA256SUMS"]
    name, changed = data.draw(damage(files))
    folder = tmp_path_factory.mktemp("damaged")
    for other, whole in (files | {name: changed}).items():
        if whole is not None:
            (folder / other).write_bytes(whole)
    try:
        found = content(folder)
    except InputError:
        return
    finally:
        shutil.rmtree(folder)
    if manifest:
        assert same(found, content(good))


# Tokenizers.

TOKENIZER = to_tokenizer_json(Bytes())
VALUES = [
    *(None, True, 0, -1, 1, 2**32, 10**30, 0.5, "", "a", "\u2581", "<|endoftext|>", [], {}, [1]),
    *(["a"], [None], {"type": "Sequence"}, {"String": "a"}, {"Regex": "("}, {"content": None}),
    *({"type": "Replace", "pattern": {"Regex": ""}, "content": "aa"}, {"normalizers": 1}),
    *({"type": "WordPiece", "vocab": {"a": 0}}, {"type": "Unigram", "unk_id": 9, "vocab": []}),
]
WHERE = [
    *(("model",), ("model", "vocab"), ("model", "merges"), ("model", "unk_token"), ("decoder",)),
    *(("model", "type"), ("model", "unk_id"), ("model", "dropout"), ("added_tokens",)),
    *(("added_tokens", 0), ("added_tokens", 0, "content"), ("added_tokens", 0, "id")),
    *(("added_tokens", 0, "lstrip"), ("added_tokens", 0, "special"), ("normalizer",)),
    *(("pre_tokenizer",), ("pre_tokenizer", "type"), ("pre_tokenizer", "pattern")),
    *(("post_processor",), ("post_processor", "single"), ("post_processor", "special_tokens")),
    *(("truncation",), ("padding",), ("version",), ("decoder", "type")),
]
FIELDS = ["bos_token", "eos_token", "chat_template", "tokenizer_class", "model_max_length"]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(WHERE), st.sampled_from(VALUES)), max_size=3),
    st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(VALUES), max_size=2),
)
def test_any_tokenizer_runs_or_is_refused(changes, config):
    parsed = json.loads(json.dumps(TOKENIZER))
    for (*way, last), value in changes:
        node = parsed
        for key in way:
            found = isinstance(node, dict) and key in node
            found = found or (isinstance(node, list) and isinstance(key, int) and key < len(node))
            node = node[key] if found else None
        if isinstance(node, dict) or (isinstance(node, list) and last in range(len(node))):
            node[last] = value
    try:
        tokenizer = HuggingFace(json.dumps(parsed), {"bos_token": "<|endoftext|>", **config})
        tokenizer.decode(tokenizer.encode("Hello, world!"))
        choose(tokenizer)
    except InputError:
        pass


@pytest.mark.parametrize("pattern", [{"String": "e"}, {"Regex": ""}])
def test_a_normalizer_that_grows_text_without_bound_is_refused(pattern):
    step = {"type": "Replace", "pattern": pattern, "content": "ee"}
    normalizer = {"type": "Sequence", "normalizers": [step] * 40}
    with pytest.raises(InputError, match="normalizer of tokenizer.json may make text"):
        HuggingFace(json.dumps({**TOKENIZER, "normalizer": normalizer}), {})


def test_a_post_processor_that_repeats_the_text_is_refused():
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * 1000
    step = {**TOKENIZER["post_processor"], "single": single}
    with pytest.raises(InputError, match="post_processor of tokenizer.json repeats the text"):
        HuggingFace(json.dumps({**TOKENIZER, "post_processor": step}), {})


def test_an_enormous_chat_template_is_refused(tmp_path):
    write_tokenizer(Bytes(), tmp_path, 8)
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>system\n" * 100_000)
    with pytest.raises(InputError, match="chat_template has 1,900,000 characters"):
        choose(read_tokenizer(tmp_path))
