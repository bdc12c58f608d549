import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import manifest
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.training import checkpoint
from jaxgpt.training.checkpoint import CheckpointConfig, Checkpoints, arrays, writer


class Train(NamedTuple):
    step: jax.Array
    key: jax.Array
    opt: optax.OptState
    ema: None = None


def on(devices):
    """A function that shards an array's first dimension over this many devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    return lambda x: NamedSharding(mesh, P("data") if x.ndim and x.shape[0] % 8 == 0 else P())


def make_state(seed=0):
    key = jax.random.key(seed)
    params = {
        "blocks": {"0": {"w": jax.random.normal(key, (16, 24)), "b": jnp.full(3, seed / 3)}},
        "wte": jax.random.normal(key, (8, 16)).astype(jnp.bfloat16),
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adam(1e-3), {"blocks": {"0": {"w": True, "b": False}}, "wte": True}),
    )
    state = {
        "params": params,
        "train": Train(jnp.int32(seed), jax.random.key(7, impl="rbg"), tx.init(params)),
    }
    return jax.device_put(state, jax.tree.map(on(8), state))


def abstract(state, sharding=None):
    """A tree of ShapeDtypeStructs; by default with the arrays' own shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding(x) if sharding else x.sharding
        ),
        state,
    )


def numbers(leaf):
    """An array's bytes, for bit-exact comparison."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and numbers(x) == numbers(y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "shakespeare" / "checkpoints"


def save(folder, *steps, losses=(), **options):
    """Saves the states `make_state(step)`; returns the open checkpoints."""
    checkpoints = Checkpoints(folder, CheckpointConfig(**options))
    for i, step in enumerate(steps):
        metrics = {"val_loss": losses[i]} if losses else None
        checkpoints.save(step, make_state(step), {"config": {"L": 2}}, metrics)
    checkpoints.wait()
    return checkpoints


def flip_a_bit(file, choose=random):
    data = bytearray(file.read_bytes())
    place = choose.randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_a_state_saved_on_8_devices_restores_bit_equal(folder, devices):
    state = make_state()
    target = abstract(state, on(devices))
    restored = save(folder, 0).restore(0, target)
    assert same(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, target
    )
    # The restored key is a typed key that gives the same random numbers.
    draws = [jax.random.uniform(s["train"].key, (4,)) for s in (state, restored)]
    np.testing.assert_array_equal(*draws)


def test_without_a_sharding_a_leaf_is_restored_on_the_first_device(folder):
    target = jax.eval_shape(make_state)
    restored = save(folder, 0).restore(0, target)
    assert same(restored, make_state())
    assert {d for x in jax.tree.leaves(restored) for d in x.devices()} == {jax.devices()[0]}


def test_the_saved_state_is_that_at_the_call_even_if_buffers_are_donated(folder):
    overwrite = jax.jit(lambda x: -x, donate_argnums=0)
    spread = NamedSharding(on(8)(np.zeros(8)).mesh, P("data"))
    x = jax.device_put(np.arange(8 * 50_000, dtype=np.float32).reshape(8, -1), spread)
    expected = np.array(x)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"params": {"x": x}}, {})
    for _ in range(5):
        x = overwrite(x)
    jax.block_until_ready(x)
    restored = checkpoints.restore(1, {"params": {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}})
    np.testing.assert_array_equal(restored["params"]["x"], expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_saving_holds_no_copy_of_the_state(folder, monkeypatch):
    monkeypatch.setattr(arrays, "IN_FLIGHT", 1 << 24)
    rng = np.random.default_rng(0)
    state = {
        "params": {str(i): jnp.asarray(rng.random(1 << 22, np.float32)) for i in range(12)},
    }
    checkpoints = save(folder.with_name("first"), 0)  # whose imports and threads stay in memory
    checkpoints.close()
    jax.block_until_ready(state)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the memory of now
    before = peak_memory()
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    assert peak_memory() - before < sum(x.nbytes for x in jax.tree.leaves(state)) / 2


def peak_memory():
    """The most memory that this process had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_saving_goes_on_in_the_background(folder, monkeypatch):
    write = writer.write_manifest
    monkeypatch.setattr(writer, "write_manifest", lambda *a: (time.sleep(0.5), write(*a)))
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, make_state(1), {})
    assert checkpoints.steps() == []
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_the_manifest_lists_the_sha256_of_every_file(folder):
    save(folder, 5)
    listed = dict(
        reversed(line.split("  ")) for line in (folder / "5/SHA256SUMS").read_text().splitlines()
    )
    found = {
        str(file.relative_to(folder / "5")): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (folder / "5").rglob("*")
        if file.is_file() and file.name != "SHA256SUMS"
    }
    assert listed == found and {"config.json", "metrics.json", "leaves.json"} < set(found)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_checks_a_checkpoint_by_hand(folder):
    save(folder, 5)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder / "5").returncode == 0
    flip_a_bit(folder / "5" / "params" / "_METADATA")
    assert subprocess.run(check, cwd=folder / "5", capture_output=True).returncode == 1


def test_20_of_20_flipped_bits_are_rejected_by_the_name_of_the_file(folder):
    checkpoints, target, choose = save(folder, 5), abstract(make_state()), random.Random(0)
    files = [f for f in sorted((folder / "5").rglob("*")) if f.is_file()]
    for file in choose.choices(files, k=20):
        whole = file.read_bytes()
        flip_a_bit(file, choose)
        name = "" if file.name == "SHA256SUMS" else str(file.relative_to(folder / "5"))
        with pytest.raises(InputError, match=name):
            checkpoints.restore(5, target)
        file.write_bytes(whole)
    assert same(checkpoints.restore(5, target), make_state(5))


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda file: file.unlink(), "params/_METADATA: missing"),
        (lambda file: os.truncate(file, 10), "params/_METADATA: changed"),
    ],
)
def test_missing_and_truncated_files_are_rejected_by_name(folder, harm, said):
    checkpoints = save(folder, 5)
    harm(folder / "5" / "params" / "_METADATA")
    with pytest.raises(InputError, match=said):
        checkpoints.restore(5, abstract(make_state()))
    with pytest.raises(InputError, match=said):
        checkpoint.load_params(folder / "5")


def test_latest_skips_a_damaged_step_with_a_warning(folder, caplog):
    checkpoints = save(folder, 5, 10)
    (folder / "10" / "train" / "_METADATA").unlink()
    assert checkpoints.latest() == 5
    assert "10 is damaged" in caplog.text and "train/_METADATA: missing" in caplog.text
    assert same(checkpoints.restore(5, abstract(make_state())), make_state(5))


STRAY = (".DS_Store", "config.json~", ".nfs0001", "._params", "notes.json", "lost+found/x")


def test_files_that_the_manifest_does_not_list_are_ignored_and_stay(folder):
    checkpoints = save(folder, 5)
    strays = [
        folder / "5" / inner / name for inner in ("", "params", "train") for name in STRAY
    ] + [folder / "params.txt"]
    for stray in strays:
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("[1")
    assert checkpoints.latest() == 5
    assert same(checkpoints.restore(5, abstract(make_state())), make_state(5))
    assert same(checkpoint.load_params(folder), make_state(5)["params"])
    assert "notes" not in checkpoint.read_metadata(folder)
    checkpoints.save(10, make_state(10), {})
    checkpoints.wait()
    assert checkpoints.latest() == 10 and all(stray.exists() for stray in strays)


def test_unfinished_saves_are_removed_and_nothing_else(folder):
    save(folder, 5).close()
    for name in ("15.saving", "15.saving.orbax-checkpoint-tmp-1", "15.orbax-checkpoint-tmp"):
        (folder / name / "params").mkdir(parents=True)
    (folder / "notes").mkdir()
    (folder / "7.damaged").mkdir()
    assert checkpoint.open_checkpoint(folder).folder.name == "5"
    assert Checkpoints(folder).latest() == 5
    assert sorted(os.listdir(folder)) == ["5", "7.damaged", "notes"]


def test_a_step_without_its_manifest_is_moved_aside(folder, caplog):
    save(folder, 5, 10).close()
    (folder / "10" / "SHA256SUMS").unlink()
    assert checkpoint.open_checkpoint(folder).folder.name == "5"
    assert Checkpoints(folder).latest() == 5
    assert "SHA256SUMS: missing" in caplog.text and "10.damaged" in caplog.text
    assert sorted(os.listdir(folder)) == ["10.damaged", "5"]
    assert (folder / "10.damaged" / "params").is_dir()


@pytest.mark.parametrize(
    "harm",
    [
        lambda step: flip_a_bit(step / "params" / "_METADATA"),
        lambda step: (step / "SHA256SUMS").unlink(),
        lambda step: (step / "SHA256SUMS").write_text("nonsense"),
        lambda step: shutil.rmtree(step / "train"),
    ],
)
def test_if_no_checkpoint_is_intact_nothing_is_changed(folder, harm):
    checkpoints = save(folder, 5, 10)
    for step in ("5", "10"):
        harm(folder / step)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=r"step 10: .*; step 5: .*train again from step 0"):
        checkpoints.latest()
    assert sorted(folder.rglob("*")) == before


def test_a_file_that_cannot_be_read_is_an_error_and_not_damage(folder, monkeypatch):
    checkpoints = save(folder, 5, 10)
    failures = iter([OSError(5, "Input/output error")] * 2)
    sha256 = manifest.file_sha256

    def read(path):
        if error := next(failures, None):
            raise error
        return sha256(path)

    monkeypatch.setattr(manifest, "file_sha256", read)
    with pytest.raises(InputError, match="cannot be read: Input/output error; the file may be"):
        checkpoints.latest()
    while next(failures, None):
        pass
    assert checkpoints.latest() == 10 and sorted(os.listdir(folder)) == ["10", "5"]


def test_going_back_renames_the_later_checkpoints(folder):
    checkpoints = save(folder, 5, 10, 15, keep=9)
    with pytest.raises(InputError, match=r"resume=7: .* has: 5, 10, 15"):
        checkpoints.go_back(7)
    checkpoints.go_back(10)
    checkpoints.save(15, make_state(0), {})
    checkpoints.go_back(10)
    assert sorted(os.listdir(folder)) == ["10", "15.abandoned", "15.abandoned-2", "5"]
    assert checkpoints.latest() == 10


def test_metrics_measured_after_a_save_are_part_of_the_checkpoint(folder):
    checkpoints = save(folder, 5)
    digest = checkpoint.open_checkpoint(folder).digest()
    checkpoints.record(5, {"val_loss": 2.5, "val_accuracy": float("nan")})
    checkpoints.wait()
    assert checkpoint.read_metadata(folder)["metrics"] == {
        "step": 5,
        "val_loss": 2.5,
        "val_accuracy": None,
    }
    assert checkpoints.best() == 5 and checkpoints.latest() == 5
    # The digest identifies the arrays, which have not changed.
    assert checkpoint.open_checkpoint(folder).digest() == digest
    flip_a_bit(folder / "5" / "evaluation.json")
    with pytest.raises(InputError, match=r"evaluation.json: changed"):
        checkpoint.read_metadata(folder / "5")


def test_a_checkpoint_of_a_newer_format_is_rejected(folder, monkeypatch):
    save(folder, 4).close()
    monkeypatch.setattr(writer, "FORMAT", 99)
    checkpoints = save(folder, 5)
    for use in (checkpoints.latest, lambda: checkpoint.load_params(folder)):
        with pytest.raises(InputError, match="format 99.* newer jaxgpt"):
            use()
    assert checkpoints.steps() == [4, 5]


def test_an_open_checkpoint_is_not_deleted_until_it_is_closed(folder):
    checkpoints = save(folder, 5, keep=1)
    opened = checkpoint.open_checkpoint(folder)
    for step in (10, 15):
        checkpoints.save(step, make_state(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [5, step]
    assert same(opened.load("params"), make_state(5)["params"])
    opened.close()
    checkpoints.save(20, make_state(20), {})
    checkpoints.wait()
    assert checkpoints.steps() == [20]


@pytest.mark.slow
def test_loading_never_fails_while_a_run_saves_and_deletes(folder):
    checkpoints = save(folder, 1, keep=1, keep_best=False)
    errors, loads = [], []

    def load():
        while not done.is_set():
            try:
                opened = checkpoint.open_checkpoint(folder)
                step = opened.metadata["metrics"]["step"]
                assert same(opened.load("params"), make_state(step)["params"])
                loads.append(step)
            except Exception as error:
                errors.append(error)

    done = threading.Event()
    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(2, 16):
        checkpoints.save(step, make_state(step), {})
    checkpoints.wait()
    done.set()
    for thread in threads:
        thread.join()
    assert not errors and len(set(loads)) > 1


def test_the_latest_and_the_best_are_kept(folder):
    losses = [3.0, 1.5, 2.0, float("nan"), 2.5]
    checkpoints = save(folder, 1, 2, 3, 4, 5, losses=losses, keep=2)
    assert checkpoints.steps() == [2, 4, 5]
    assert (checkpoints.best(), checkpoints.latest()) == (2, 5)
    assert same(checkpoints.restore(2, abstract(make_state())), make_state(2))


def test_an_old_checkpoint_whose_measurements_are_damaged_is_not_deleted(folder, caplog):
    checkpoints = save(folder, 1, 2, losses=[1.0, 2.0], keep=1)
    file = folder / "1" / "metrics.json"
    file.write_text(file.read_text().replace("1.0", "9.0"))  # step 5 had the best loss
    checkpoints.save(3, make_state(3), {}, {"val_loss": 3.0})
    checkpoints.wait()
    assert sorted(os.listdir(folder)) == ["1.damaged", "2", "3"]
    assert "metrics.json: changed" in caplog.text


def test_the_best_may_be_step_0(folder):
    assert save(folder, 0, 1, 2, losses=[1.0, 2.0, 3.0], keep=1).steps() == [0, 2]


def test_without_keep_best_only_the_latest_are_kept(folder):
    checkpoints = save(folder, 1, 2, 3, losses=[1.0, 2.0, 3.0], keep=1, keep_best=False)
    assert checkpoints.steps() == [3]


def test_without_a_validation_loss_there_is_no_best(folder):
    assert save(folder, 1).best() is None


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: p | {"wte": jax.ShapeDtypeStruct((8, 32), jnp.bfloat16)}, r"bfloat16\[8,32\]"),
        (lambda p: p | {"wte": jax.ShapeDtypeStruct((8, 16), jnp.float32)}, r"float32\[8,16\]"),
        (lambda p: {"blocks": p["blocks"]}, "nothing"),
    ],
)
def test_another_shape_dtype_or_tree_is_rejected_by_path(folder, change, said):
    target = abstract(make_state())
    target["params"] = change(target["params"])
    message = rf"params/wte: saved bfloat16\[8,16\], wanted {said}"
    with pytest.raises(InputError, match=message):
        save(folder, 5).restore(5, target)
    with pytest.raises(InputError, match=message):
        checkpoint.load_params(folder, target["params"])


def test_a_leaf_that_was_not_saved_is_rejected_by_path(folder):
    target = abstract(make_state())
    target["params"]["head"] = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(InputError, match=r"params/head/w: saved nothing, wanted float32\[2\]"):
        save(folder, 5).restore(5, target)


def test_another_kind_of_key_is_rejected(folder):
    target = abstract(make_state())
    target["train"] = target["train"]._replace(key=jax.eval_shape(lambda: jax.random.key(0)))
    with pytest.raises(InputError, match=r"train/key: saved key<rbg>\[\], wanted key<fry>\[\]"):
        save(folder, 5).restore(5, target)


def test_an_item_that_was_not_saved_is_rejected(folder):
    with pytest.raises(InputError, match="no 'ema'; it has params, train"):
        save(folder, 5).restore(5, {"ema": {}})


def test_an_unknown_step_is_rejected_with_a_list_of_steps(folder):
    with pytest.raises(InputError, match=r"no checkpoint of step 7; .* has: 5, 10"):
        save(folder, 5, 10).restore(7, abstract(make_state()))


def test_params_load_alone_on_one_device_from_a_run_its_checkpoints_or_a_step(folder):
    save(folder, 5, 10)
    for path in (folder.parent, folder, folder / "10"):
        shutil.rmtree(folder / "10" / "train", ignore_errors=True)
        params = checkpoint.load_params(path)
        assert same(params, make_state(10)["params"])
        assert {d for x in jax.tree.leaves(params) for d in x.devices()} == {jax.devices()[0]}


def test_params_load_onto_the_shardings_given(folder):
    save(folder, 5)
    target = abstract(make_state()["params"])
    params = checkpoint.load_params(folder, target)
    assert same(params, make_state(5)["params"])
    assert params["wte"].sharding == target["wte"].sharding


def test_a_checkpoint_describes_itself(folder):
    describe = {"config": {"L": 2, "lr": 1e-3}, "tokenizer": {"ranks": ["é", 1]}, "lineage": []}
    checkpoints = Checkpoints(folder)
    checkpoints.save(5, make_state(), describe, {"val_loss": np.float32(1.5)})
    checkpoints.wait()
    described = checkpoint.read_metadata(folder.parent)
    assert described["leaves"]["params"]["wte"] == "bfloat16[8,16]"
    assert described["metrics"] == {"step": 5, "val_loss": 1.5}
    assert {name: described[name] for name in describe} == describe
    assert json.loads((folder / "5" / "tokenizer.json").read_text()) == describe["tokenizer"]


def test_a_wrong_path_is_rejected_with_suggested_runs(folder, monkeypatch):
    save(folder, 5)
    monkeypatch.chdir(folder.parent.parent)  # a folder without other runs
    with pytest.raises(InputError, match=r"looked for .*did you mean .*/runs/shakespeare\?"):
        checkpoint.load_params(folder.parent.with_name("shakespear"))
    with pytest.raises(InputError, match=r"there are .*/runs/shakespeare"):
        checkpoint.read_metadata(folder.parent.with_name("zzz"))


def test_a_run_without_a_checkpoint_yet_is_rejected(folder):
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match="no complete checkpoint"):
        checkpoint.read_metadata(folder.parent)


def test_a_run_with_only_damaged_checkpoints_is_rejected(folder):
    save(folder, 5)
    (folder / "5" / "params" / "_METADATA").unlink()
    with pytest.raises(InputError, match=r"no checkpoint in .* is intact: 5 is damaged"):
        checkpoint.load_params(folder.parent)


@pytest.mark.parametrize(
    "state, describe, said",
    [
        ({"params": {"w": np.ones(2)}}, {"config": {"x": object()}}, "config.*JSON"),
        ({"params": {"w": np.ones(2)}}, {"config": {"x": float("nan")}}, "config.*JSON"),
        ({"params": {"w": np.ones(2)}}, {"metrics": {}}, "metrics are reserved"),
        ({"params": {"w": 1.0}}, {}, "params/w is a float"),
        ({"params": {"a.b": {"c": np.ones(2)}, "a": {"b.c": np.ones(2)}}}, {}, "differ only"),
    ],
)
def test_state_that_cannot_be_saved_exactly_is_rejected(folder, state, describe, said):
    with pytest.raises(InputError, match=said):
        Checkpoints(folder).save(1, state, describe)
    assert not folder.exists()


@pytest.mark.parametrize("options", [{"every": -1}, {"keep": 0}, {"patience": -1.0}])
def test_an_invalid_config_is_rejected(folder, options):
    with pytest.raises(InputError, match=next(iter(options))):
        Checkpoints(folder, CheckpointConfig(**options))


def test_saving_a_step_again_keeps_it_and_replaces_a_damaged_one(folder):
    checkpoints = save(folder, 5)
    written = (folder / "5" / "SHA256SUMS").stat().st_mtime_ns
    checkpoints.save(5, make_state(5), {})
    checkpoints.wait()
    assert (folder / "5" / "SHA256SUMS").stat().st_mtime_ns == written
    flip_a_bit(folder / "5" / "leaves.json")
    checkpoints.save(5, make_state(5), {})
    checkpoints.wait()
    assert checkpoints.latest() == 5 and sorted(os.listdir(folder)) == ["5", "5.damaged"]


def test_a_step_before_the_newest_is_not_saved(folder):
    with pytest.raises(InputError, match=r"has the later step 20; .* go back with --resume"):
        save(folder, 10, 20).save(15, make_state(15), {})


def test_importing_touches_no_device():
    code = """
        import jaxgpt.training.checkpoint
        from jax._src import xla_bridge
        assert not xla_bridge._backends
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# A run whose state at step k is k everywhere: random bits, so that it does not compress, plus k.
WORKER = """
    import resource, signal, sys
    import jax.numpy as jnp, numpy as np
    from jaxgpt.training.checkpoint import Checkpoints, CheckpointConfig
    from jaxgpt.errors import TrainingError

    noise = np.random.default_rng(0).random((256, 1024), np.float32)
    def state(step):
        return {"params": {"w": jnp.asarray(noise + step)}, "train": {"step": jnp.int32(step)}}
"""


def run_worker(body, *args):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER) + textwrap.dedent(body), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def expect_step(folder, step):
    noise = np.random.default_rng(0).random((256, 1024), np.float32)
    target = {
        "params": {"w": jax.ShapeDtypeStruct(noise.shape, noise.dtype)},
        "train": {"step": jax.ShapeDtypeStruct((), jnp.int32)},
    }
    restored = Checkpoints(folder).restore(step, target)
    assert restored["train"]["step"] == step
    np.testing.assert_array_equal(restored["params"]["w"], noise + np.float32(step))


def test_a_kill_at_any_moment_leaves_the_newest_checkpoint_good(folder):
    body = """
        checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep=1))
        step = checkpoints.latest() or 0
        while True:
            step += 1
            checkpoints.save(step, state(step), {"config": {}})
            print(step, flush=True)
    """
    reached = 0
    for _ in range(2):
        worker = run_worker(body, folder)
        # A line is printed while its step is being saved: the one before it is complete.
        for step in (reached + 1, reached + 2):
            assert int(worker.stdout.readline()) == step
        time.sleep(0.5 * random.random())
        worker.send_signal(signal.SIGKILL)
        started = [step, *map(int, worker.communicate()[0].split())][-1]
        reached = Checkpoints(folder).latest()
        assert reached in (started - 1, started, started + 1)
        expect_step(folder, reached)


def test_a_cut_rename_of_a_folder_leaves_no_complete_checkpoint(folder, monkeypatch):
    """As on a mounted bucket, which copies a folder file by file."""
    save(folder, 1)
    rename = Path.rename

    def cut(self, target):
        if self.name != "2.saving":
            return rename(self, target)
        target.mkdir()
        for file in sorted(self.iterdir())[:5]:  # the manifest is the first
            shutil.move(file, target / file.name)
        raise OSError(errno.EIO, "cut")

    monkeypatch.setattr(Path, "rename", cut)
    with pytest.raises(TrainingError, match="step 2 was not saved: cut"):
        save(folder, 2)
    monkeypatch.undo()
    assert (folder / "2").is_dir()
    assert checkpoint.steps_in(folder) == [1]
    assert Checkpoints(folder).latest() == 1


def test_a_full_disk_is_an_error_that_names_the_last_good_checkpoint(folder):
    body = """
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        for step, meet in (2, checkpoints.wait), (3, lambda: checkpoints.save(4, state(4), {})):
            checkpoints.save(step, state(step), {})
            try:
                meet()
            except TrainingError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        checkpoints.save(5, state(5), {})
        checkpoints.close()
    """
    worker = run_worker(body, folder)
    out, err = worker.communicate()
    assert worker.returncode == 0, err
    assert out.splitlines() == [
        f"the checkpoint of step {step} was not saved: File too large; "
        f"the last checkpoint is step 1 in {folder}"
        for step in (2, 3)
    ]
    assert "_SignalingThread" not in err
    expect_step(folder, 1)  # opening the folder sweeps it
    expect_step(folder, 5)
    assert sorted(os.listdir(folder)) == ["1", "5"]


def test_late_files_of_a_failed_save_are_deleted_by_the_next_save(folder, monkeypatch):
    def write_late(*args):
        (folder / "3.saving.orbax-checkpoint-tmp" / "train").mkdir(parents=True, exist_ok=True)
        return write(*args)

    write = writer.write_manifest  # the last call of a save
    monkeypatch.setattr(writer, "write_manifest", write_late)
    save(folder, 5).close()
    assert os.listdir(folder) == ["5"]


def test_a_folder_that_cannot_be_written_is_an_error(folder):
    folder.parent.mkdir(parents=True)
    folder.touch()
    with pytest.raises(TrainingError, match=r"step 1 was not saved.*no earlier"):
        Checkpoints(folder).save(1, make_state(), {})
