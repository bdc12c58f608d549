"""Flax files of GPT-2 are read completely, or rejected with a reason."""

import copy
import functools

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxgpt.errors import InputError
from jaxgpt.pretrained.msgpack import tensors

V, T, D, LAYERS = 11, 7, 4, 2


def tree(dtype=np.float32):
    """Parameters of a FlaxGPT2LMHeadModel: its FlaxConv1D kernels are [out, in]."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.normal(size=shape).astype(dtype)

    def linear(inputs, outputs):
        return {"kernel": array(outputs, inputs), "bias": array(outputs)}

    def norm():
        return {"scale": array(D), "bias": array(D)}

    def block():
        return {
            "ln_1": norm(),
            "attn": {"c_attn": linear(D, 3 * D), "c_proj": linear(D, D)},
            "ln_2": norm(),
            "mlp": {"c_fc": linear(D, 4 * D), "c_proj": linear(4 * D, D)},
        }

    return {
        "transformer": {
            "wte": {"embedding": array(V, D)},
            "wpe": {"embedding": array(T, D)},
            "h": {str(layer): block() for layer in range(LAYERS)},
            "ln_f": norm(),
        }
    }


def at(values, *path):
    return functools.reduce(lambda node, key: node[key], path, values)


@pytest.fixture
def write(tmp_path):
    def write(values):
        path = tmp_path / "flax_model.msgpack"
        content = (
            values
            if isinstance(values, bytes)
            else flax.serialization.msgpack_serialize(copy.deepcopy(values))
        )
        path.write_bytes(content)
        return path

    return write


def packed(shape, dtype, content, code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content), use_bin_type=True))


def damaged(value, *path):
    """The tree in msgpack with `value` at the path; None removes the entry."""
    values = msgpack.unpackb(flax.serialization.msgpack_serialize(tree()))
    node = at(values, *path[:-1])
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return msgpack.packb(values)


def names_of_gpt2():
    yield from ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
    for layer in range(LAYERS):
        for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            yield from (f"h.{layer}.{module}.weight", f"h.{layer}.{module}.bias")


def test_transformers_takes_the_tensors_for_its_own(write):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    values = tree()
    found = tensors(write(values))

    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=D, n_layer=LAYERS, n_head=2, n_inner=4 * D
    )
    model = transformers.GPT2Model(config).eval()
    model.load_state_dict({name: torch.tensor(array) for name, array in found.items()})

    # The same block by the equations of modeling_flax_gpt2.py: x @ kernel.T + bias.
    def linear(x, part):
        return x @ part["kernel"].T + part["bias"]

    block, x = at(values, "transformer", "h", "0"), np.ones((3, D), np.float32)
    x[:, 1] = [2.0, -1.0, 0.5]
    layer = model.h[0]
    with torch.no_grad():
        for got, want in (
            (layer.attn.c_attn(torch.tensor(x)), linear(x, block["attn"]["c_attn"])),
            (layer.attn.c_proj(torch.tensor(x)), linear(x, block["attn"]["c_proj"])),
            (layer.mlp.c_fc(torch.tensor(x)), linear(x, block["mlp"]["c_fc"])),
        ):
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


def test_names_are_torchs_and_a_kernel_multiplies_as_its_conv1d(write):
    values = tree()
    found = tensors(write(values))
    assert found.keys() == set(names_of_gpt2())
    x = np.random.default_rng(1).normal(size=(3, D)).astype(np.float32)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc"):
        part = at(values, "transformer", "h", "1", *name.split("."))
        flax_conv1d = np.einsum("ti,oi->to", x, part["kernel"]) + part["bias"]
        conv1d = x @ found[f"h.1.{name}.weight"] + found[f"h.1.{name}.bias"]
        np.testing.assert_allclose(conv1d, flax_conv1d, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_dtype_comes_in_as_it_is(write, dtype):
    values = tree(dtype)
    found = tensors(write(values))
    for name, path in {
        "wte.weight": ("wte", "embedding"),
        "h.1.ln_2.weight": ("h", "1", "ln_2", "scale"),
        "h.1.attn.c_proj.bias": ("h", "1", "attn", "c_proj", "bias"),
    }.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(
            found[name], at(values, "transformer", *path), err_msg=name, strict=True
        )


def test_to_bytes_of_jax_arrays_comes_in(tmp_path):
    values = tree()
    values["transformer"]["wpe"]["embedding"] = jnp.ones((T, D), jnp.bfloat16)
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(values))
    assert tensors(path)["wpe.weight"].dtype == ml_dtypes.bfloat16


def test_a_model_without_its_head_has_the_same_names(write):
    assert tensors(write(tree()["transformer"])).keys() == set(names_of_gpt2())


def test_an_output_layer_of_its_own_is_transposed(write):
    kernel = np.arange(D * V, dtype=np.float32).reshape(D, V)
    found = tensors(write({**tree(), "lm_head": {"kernel": kernel}}))
    np.testing.assert_array_equal(found["lm_head.weight"], kernel.T, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_large_arrays_in_chunks_are_put_together(write, monkeypatch, dtype):
    whole = tensors(write(tree(dtype)))
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 20)
    path = write(tree(dtype))
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    for name, array in tensors(path).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name, strict=True)


WTE = ("transformer", "wte", "embedding")
CHUNK = packed([2], "float32", bytes(8))


def chunks(shape, *parts, flag=True, **more):
    numbered = {str(i): part for i, part in enumerate(parts)}
    return {"__msgpack_chunked_array__": flag, "shape": shape, "chunks": numbered, **more}


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        (None, ("transformer", "ln_f"), "transformer has no 'ln_f'"),
        (None, ("transformer", "h", "0"), "transformer/h has '1', .* and has no '0'"),
        (None, ("transformer", "h", "1", "mlp", "c_fc", "bias"), "h/1/mlp/c_fc has no 'bias'"),
        ({}, ("transformer", "h"), "transformer/h has no '0'"),
        ({}, ("transformer", "h", "1", "crossattention"), "h/1 has 'crossattention', which"),
        ({}, ("params",), "the tree has 'params'"),
        (1.5, WTE, "wte/embedding is of type float, not an array"),
        (msgpack.ExtType(2, msgpack.packb((1.0, 2.0))), WTE, "is a complex number"),
        (msgpack.ExtType(9, b""), WTE, "unknown code 9"),
        (msgpack.Timestamp(0), WTE, "is of type Timestamp"),
        (packed([], "float32", bytes(4), 3), WTE, r"embedding has shape \[\], .* 2 dimensions"),
        (packed([44], "float32", bytes(176)), WTE, r"shape \[44\], and in GPT-2 it has 2 dim"),
        (packed([8, V, D], "float32", bytes(1408)), WTE, r"has shape \[8, 11, 4\]"),
        (packed([V, D], "float32", bytes(175)), WTE, r"float32\[11, 4\] and has 175 bytes"),
        (packed([V, D], "float64", bytes(352)), WTE, "dtype 'float64', not one of float32"),
        (packed([V, D], "O", bytes(352)), WTE, "dtype 'O'"),
        (packed([V, D], ["float32"], bytes(176)), WTE, "dtype "),
        (packed([V, D], "float32", "x" * 176), WTE, "of type str instead of its bytes"),
        (packed([-V, -D], "float32", bytes(176)), WTE, r"shape \[-11, -4\]"),
        (packed([V, 0], "float32", b""), WTE, r"shape \[11, 0\]"),
        (packed([True, 4], "float32", bytes(16)), WTE, "shape "),
        (packed([V, 4.0], "float32", bytes(176)), WTE, "shape "),
        (packed(44, "float32", bytes(176)), WTE, "shape 44"),
        (packed([1 << 62] * 9, "float32", bytes(8)), WTE, "and has 8 bytes"),
        (packed([1] * 99, "float32", bytes(4)), WTE, "is not a complete array: 99 exceeds"),
        (msgpack.ExtType(1, b"\x93"), WTE, "is not a complete array"),
        (msgpack.ExtType(1, b"\xc0"), WTE, "is not a list of shape, dtype and bytes"),
        (msgpack.ExtType(1, CHUNK.data + b"\x00"), WTE, "not a complete array: .*extra data"),
        (chunks({"0": 2, "1": 2}, CHUNK, flag=False), WTE, "is a map of names"),
        (chunks({"0": 2, "1": 2}, CHUNK, more=1), WTE, "is a map of names"),
        (chunks({"0": 2, "1": 2}, CHUNK), WTE, r"shape \[2, 2\], and its chunks have 2"),
        (chunks({"0": 2, "1": 2}), WTE, "has chunks that are not numbered"),
        (chunks({"0": 2, "2": 2}, CHUNK), WTE, "has shape that are not numbered"),
        (chunks({"0": 2, "1": "2"}, CHUNK), WTE, "has shape "),
        (chunks({str(i): 1 for i in range(99)}, CHUNK), WTE, "has 99 dimensions"),
        (chunks({"0": 2}, packed([1, 2], "float32", bytes(8))), WTE, "not one-dimensional and of"),
        (
            chunks({"0": 4}, CHUNK, packed([2], "float16", bytes(4))),
            WTE,
            "not one-dimensional and of",
        ),
        (chunks({"0": 2}, chunks({"0": 2}, CHUNK)), WTE, "of type dict, not an array"),
    ],
)
def test_damage_is_named_with_the_tensor(write, value, path, reason):
    file = write(damaged(value, *path))
    with pytest.raises(InputError, match=reason) as caught:
        tensors(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a complete msgpack file"),
        (b"\xc1", "not a complete msgpack file: FormatError"),
        (b"\x80\x80", "extra data"),
        (b"\x91" * 5000, "not a complete msgpack file"),
        (b"\xc0", "the tree is of type NoneType"),
        (b"\x07", "the tree is of type int"),
        (b"\x82\xa1a\xc0\xa1a\xc0", "a name appears twice"),
        (b"\x81\x07\xc0", "not a complete msgpack file"),
        (b"\x81\xc4\x00\xc0", "the tree has b''"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xc9\xff\xff\xff\xff\x01", "exceeds max_ext_len"),
    ],
)
def test_a_file_of_something_else_is_refused(write, content, reason):
    with pytest.raises(InputError, match=reason):
        tensors(write(content))


def test_a_file_cut_short_is_refused_wherever_it_was_cut(write):
    content = flax.serialization.msgpack_serialize(tree())
    for length in range(0, len(content), 7):
        with pytest.raises(InputError, match="not a complete msgpack file"):
            tensors(write(content[:length]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"flax_model.msgpack cannot be read: No such file"):
        tensors(tmp_path / "flax_model.msgpack")
    with pytest.raises(InputError, match="cannot be read"):
        tensors(tmp_path)


WHOLE = flax.serialization.msgpack_serialize(tree())
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=8),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=24)),
    st.builds(
        packed,
        st.lists(st.integers(-1, 5), max_size=3),
        st.sampled_from(["float32", "bfloat16", "int8", "O", ""]),
        st.binary(max_size=40),
        st.sampled_from([1, 3]),
    ),
)
keys = st.sampled_from(
    ["transformer", "wte", "wpe", "h", "0", "1", "ln_f", "lm_head", "embedding", "scale"]
) | st.sampled_from(["kernel", "shape", "chunks", "__msgpack_chunked_array__"])
nested = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=4), max_leaves=12)
fuzz = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_or_refuse(path):
    try:
        found = tensors(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert found.keys() >= set(names_of_gpt2())


@fuzz
@given(st.binary(max_size=200))
@example(b"\xd4\xff\x00")
def test_random_bytes_are_refused_with_a_reason(write, content):
    read_or_refuse(write(content))


@fuzz
@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=6), st.integers(0, 6))
def test_changed_bytes_are_read_or_refused(write, position, new, taken):
    read_or_refuse(write(WHOLE[:position] + new + WHOLE[position + taken :]))


@fuzz
@given(nested, st.lists(keys, max_size=4))
def test_other_trees_are_read_or_refused(write, value, path):
    values = msgpack.unpackb(WHOLE)
    node = values
    for key in path:
        node = node[key] if isinstance(node.get(key), dict) else node
    node[path[-1] if path else "transformer"] = value
    read_or_refuse(write(msgpack.packb(values)))
    read_or_refuse(write(msgpack.packb(value)))
