"""Predictions of memory, FLOPs, traffic and fit, against live arrays and XLA."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import cli, sharding
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.errors import InputError
from jaxgpt.model import GPTConfig
from jaxgpt.objectives import DPO, NextToken
from jaxgpt.sharding import ParallelConfig
from jaxgpt.tokenizer import TokenizerConfig
from jaxgpt.training import devices, estimate, hlo, setup, work
from jaxgpt.training.estimate import compiling, search, tracing
from jaxgpt.training.finetune import TuneConfig
from jaxgpt.training.optim import OptimConfig

TINY = Config(
    name="tiny",
    model=GPTConfig(L=1, D=64, N=2, T=32, V=257),
    tokenizer=TokenizerConfig(kind="bytes"),
    objective=NextToken(chunk=16),
    train=TrainConfig(batch=16, steps=10),
    parallel=ParallelConfig(devices=1),
)
MADE_UP = devices.Device("made-up", "gpu", 1e12, 1e11, 0.0, 1e10, "nowhere")


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


@pytest.mark.parametrize(("fsdp", "name"), [(1, "adamw"), (2, "muon")])
def test_the_memory_of_parameters_and_moments_is_that_of_live_arrays(fsdp, name):
    cfg = replace(
        TINY, parallel=ParallelConfig(devices=2, fsdp=fsdp), optim=OptimConfig(name=name, ema=0.9)
    )
    network = setup.build_network(cfg, None)
    tx = setup.build_optimizer(cfg, network)
    state = network.layout.create(partial(setup.new_state, cfg, network, tx))
    first = network.layout.mesh.devices.flat[0]

    def held(tree):
        shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
        return sum(s.data.nbytes for s in shards if s.device == first)

    memory = tracing.analyze(
        replace(cfg, parallel=replace(cfg.parallel, devices=0)), MADE_UP.of(2)
    ).memory
    assert memory.parameters == held(state.params)
    assert memory.moments == held(state.opt)
    batch = 3 * 4 * cfg.train.batch // 2 * cfg.context
    assert memory.other_state == held((state.step, state.guard, state.ema)) + 8 + batch


@pytest.mark.parametrize("base", ["int8", "int4", "nf4"])
def test_the_memory_of_a_quantized_base_is_that_of_live_arrays(base):
    tune = TuneConfig("lora", rank=2, base=base)
    cfg = replace(TINY, parallel=ParallelConfig(devices=1), tune=tune)
    network = setup.build_network(cfg, None)
    tx = setup.build_optimizer(cfg, network)
    state = network.layout.create(partial(setup.new_state, cfg, network, tx))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    memory = tracing.analyze(cfg, MADE_UP).memory
    batch = 3 * 4 * cfg.train.batch * cfg.context
    found = memory.parameters + memory.moments + memory.other_state
    assert found == pytest.approx(held + batch, abs=64)  # a random key and counters


@pytest.mark.parametrize("remat", ["none", "full"])
def test_flops_are_those_that_xla_counts(remat):
    # Wide, so that products are nearly all that XLA counts; and without the loop of the loss, whose
    # body XLA counts once.
    model = GPTConfig(L=1, D=128, N=2, T=64, V=512)
    compute = replace(TINY.compute, remat=remat, attention="plain")
    cfg = replace(TINY, model=model, compute=compute, objective=NextToken(chunk=64))
    network = setup.build_network(cfg, None)
    found = tracing.gradient_work(cfg, "cpu").of(4)

    loss_fn = setup.build_loss(cfg, network)
    params = jax.eval_shape(partial(network.tree.create, jax.random.key(0)))[0]

    def gradient(params, batch):
        return jax.grad(lambda params: loss_fn(params, batch, None)[0])(params)

    traced = jax.jit(gradient).lower(params, work.batch_shapes(cfg, 4))
    assert found.flops < traced.cost_analysis()["flops"] < 1.15 * found.flops
    if remat == "none":
        scores_again = 2 * model.N * model.sizes["H"] * model.T
        expected = 4 * 64 * (model.flops_per_token() + scores_again)
        assert found.flops == pytest.approx(expected, rel=1e-6)


def test_more_layers_are_the_line_through_two_small_models():
    deep = replace(TINY, model=replace(TINY.model, L=3))
    found = tracing.gradient_work(deep, "cpu").of(3)
    # With a window that covers everything in one layer, the layers differ, and all are traced.
    mixed = replace(deep, model=replace(deep.model, window=32, global_every=3))
    whole = tracing.gradient_work(mixed, "cpu").of(3)
    assert found == pytest.approx(whole, rel=1e-3)


def test_a_loop_is_counted_as_often_as_it_runs():
    x, w = jnp.ones((64, 64)), jnp.ones((7, 64, 64))

    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def unrolled(x, w):
        for each in range(7):
            x = jnp.tanh(x @ w[each])
        return x

    loop, flat = (hlo.read(compiled(f, x, w).as_text()) for f in (scanned, unrolled))
    assert loop.loops == (7,) and flat.loops == ()
    assert flat.moved == flat.moved_once
    assert loop.moved == pytest.approx(flat.moved, rel=0.25)
    assert loop.moved_once < 0.3 * loop.moved
    assert work.of_function(scanned, x, w).flops == 7 * 2 * 64**3


def test_collectives_are_read_with_their_groups_and_loops():
    mesh = sharding.make_mesh(ParallelConfig(data=2, fsdp=4))
    by_fsdp, everywhere = (jax.NamedSharding(mesh, jax.P(axis)) for axis in ("fsdp", None))
    x = jax.device_put(jnp.ones((8, 1024)), by_fsdp)

    def add_up(x):
        def turn(total, _):
            return total + (x + total[0]).sum(0), None

        return jax.lax.scan(turn, jnp.zeros(1024), None, length=3)[0]

    text = jax.jit(add_up, out_shardings=everywhere).lower(x).compile().as_text()
    found = hlo.read(text)
    assert {each.kind for each in found.collectives} == {"all-reduce"}
    assert found.sent == 3 * 2 * (4 - 1) / 4 * 4096


def test_a_reduce_scatter_is_one_as_libtpu_writes_it_too():
    text = """HloModule scattered

%all-reduce-scatter (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0} parameter(0)
  %all-reduce = f32[8,16]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %dynamic-slice = f32[2,16]{1,0} dynamic-slice(%all-reduce, %zero, %zero)
}

ENTRY %main (x: f32[8,16]) -> f32[2,16] {
  %x = f32[8,16]{1,0} parameter(0)
  ROOT %fusion = f32[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""
    (found,) = hlo.read(text).collectives
    assert (found.kind, found.array, found.sent) == ("reduce-scatter", 4 * 2 * 16, 4 * 3 * 2 * 16)


@pytest.mark.parametrize(
    "product",
    [
        "dot(%x, %y), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
        "rhs_contracting_dims={2}",
        # what libtpu makes of it
        "convolution(%x, %y), window={size=12 stride=11 lhs_dilate=12}, dim_labels=0bf_0oi->0bf",
    ],
    ids=["dot", "convolution"],
)
def test_a_batch_of_products_has_the_flops_of_each(product):
    text = f"""HloModule batched
ENTRY main (a: f32[12,64,256], b: f32[12,32,256]) -> f32[12,64,32] {{
  %x = f32[12,64,256]{{2,1,0}} parameter(0)
  %y = f32[12,32,256]{{2,1,0}} parameter(1)
  ROOT %z = f32[12,64,32]{{2,1,0}} {product}
}}
"""
    (cost,) = hlo.read(text).costs
    assert cost.flops == 2 * 12 * 64 * 32 * 256


def test_memory_is_what_the_compiler_says_of_the_step_that_runs():
    found = estimate.estimate(TINY, "here")
    network = setup.build_network(TINY, None)
    tx = setup.build_optimizer(TINY, network)
    state = network.layout.create(partial(setup.new_state, TINY, network, tx))
    rows = np.zeros((16, 32), np.int32)
    batch = network.layout.put(
        {"tokens": rows, "targets": rows, "weights": rows.astype(np.float32)}
    )
    step = setup.build_step(TINY, setup.build_loss(TINY, network), tx)
    stats = network.layout.compile_step(step, state, batch).memory_analysis()
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    assert found.memory.total == pytest.approx(total, rel=0.05)
    assert found.program["state_leaves_in_place"] >= found.program["state_leaves"] - 1
    assert not found.step.seconds and "not known" in estimate.report(found)
    # Traced, it is an estimate, and the order of magnitude must be right.
    traced = tracing.analyze(
        replace(TINY, parallel=ParallelConfig()), replace(MADE_UP, platform="cpu")
    )
    assert 0.5 < traced.memory.temporaries / found.memory.temporaries < 2


def needed(cfg, count=1):
    return tracing.analyze(cfg, MADE_UP.of(count)).memory.total


def test_micro_batches_make_it_fit_first_and_then_rematerialization(monkeypatch):
    cfg = replace(TINY, parallel=ParallelConfig())
    remat = replace(cfg, compute=replace(cfg.compute, remat="full"))
    in_parts = [replace(each, train=replace(each.train, micro=16)) for each in (cfg, remat)]
    least, least_with_remat = map(needed, in_parts)
    assert least_with_remat < least < needed(cfg)
    for limit, remat_too in ((1.01 * least, False), (1.01 * least_with_remat, True)):
        monkeypatch.setitem(devices.DEVICES, "made", replace(MADE_UP, memory=limit))
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "1")
        found = estimate.estimate(cfg, "made", counts=())
        assert found.memory.fits and "GiB" in found.given
        assert any("--train.micro" in each for each in found.options)
        assert any("--compute.remat" in each for each in found.options) == remat_too
        assert " ".join(found.options) in estimate.report(found)


def test_fsdp_makes_fit_what_no_device_holds_alone(monkeypatch):
    cfg = replace(TINY, parallel=ParallelConfig())
    remat = replace(cfg.compute, remat="full")
    least = needed(replace(cfg, compute=remat, train=replace(cfg.train, micro=4)), 4)
    monkeypatch.setitem(devices.DEVICES, "made", replace(MADE_UP, memory=0.9 * least))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "1")
    found = estimate.estimate(cfg, "made-4", counts=())
    assert found.memory.fits
    assert any("--parallel.fsdp" in each for each in found.options)
    own = replace(cfg, parallel=ParallelConfig(data=1, fsdp=4))
    fewer = [*search.scale(own, found, 1.0, counts=(2,))]
    assert len(fewer) == 1  # although its layout is for four devices
    alone = estimate.estimate(cfg, "made", counts=())
    assert not alone.memory.fits and "no micro-batch" in alone.notes[-1]


def test_what_the_compiler_says_is_out_of_memory_does_not_fit(monkeypatch):
    monkeypatch.setattr(compiling, "make_plan", lambda *_: None)
    for needs in (0.0, 3e12):  # it may not say how much
        monkeypatch.setattr(compiling, "compiled", lambda _, n=needs: compiling.OutOfMemory(n))
        cfg = replace(TINY, parallel=ParallelConfig())
        found = compiling.attempt(cfg, replace(MADE_UP, memory=1e12), [])
        assert not found.memory.fits and found.memory.total >= needs


def test_a_batch_that_does_not_split_gets_micro_batches_that_do(monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "made", replace(MADE_UP, memory=1e12))
    cfg = replace(TINY, train=replace(TINY.train, micro=4), parallel=ParallelConfig())
    found = estimate.estimate(cfg, "made-8", counts=())
    assert "does not split over 8 devices x micro=4" in found.given
    assert found.options == ("--train.micro 1",) or found.options == ("--train.micro 2",)
    with pytest.raises(InputError, match="does not split"):
        estimate.estimate(replace(cfg, train=replace(cfg.train, batch=12)), "made-8")


def test_more_rows_take_more_memory_and_a_gpu_has_the_fraction_that_jax_uses(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert devices.find_device("h100").memory == 0.75 * devices.DEVICES["h100"].memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert devices.find_device("h100").memory == 0.9 * devices.DEVICES["h100"].memory
    twice = replace(TINY, train=replace(TINY.train, batch=32), parallel=ParallelConfig())
    assert needed(twice) > needed(replace(TINY, parallel=ParallelConfig()))


def test_slices_have_the_names_and_sizes_of_the_cloud():
    assert devices.find_device("v5e-8").topology == "v5e:2x4"
    assert devices.find_device("v5p-8").count == 4
    assert devices.find_device("v5p").topology == "v5p:2x2x1"
    assert devices.find_device("v6e-256").topology == "v6e:16x16"
    assert devices.find_device("h100-8").name == "h100-8"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v7x", "set it to one of v5e-1"),
        ("v5e-3", "there is no slice v5e-3"),
        ("h100-0", "is unknown"),
        ("v5e-", "there is no slice|is unknown"),
    ],
)
def test_a_wrong_device_is_an_error_that_lists_the_right_ones(name, says):
    if name == "v5e-":
        assert devices.find_device(name).count == 1
        return
    with pytest.raises(InputError, match=says):
        devices.find_device(name)


def test_without_libtpu_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'libtpu==0\.\d"):
        estimate.estimate(TINY, "v5e-1")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"objective": DPO()}, "not of DPO"),
        ({"parallel": ParallelConfig(mode="pmap")}, "parallel.mode=jit"),
    ],
)
def test_what_cannot_be_estimated_is_an_error(change, says):
    with pytest.raises(InputError, match=says):
        estimate.check_supported(replace(TINY, **change))


def test_a_price_is_not_negative():
    with pytest.raises(InputError, match="price=-1"):
        estimate.estimate(TINY, "h100", price=-1)


def test_the_command_predicts_in_json(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.py").write_text(
        "from jaxgpt.config import Config\n"
        "from jaxgpt.model import GPTConfig\n"
        "config = Config(model=GPTConfig(L=2, D=64, N=1, T=128))\n"
    )
    monkeypatch.chdir(tmp_path)
    args = ["--train.batch", "8", "--device", "h100", "--train.micro=2", "--price", "2"]
    assert cli.main(["estimate", "tiny.py", *args, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] is True and found["tokens"] == 8 * 128
    assert found["device"]["name"] == "h100" and "attention cudnn" in found["implementation"]
    assert found["tokens_per_hour"] == pytest.approx(3600 * found["tokens_per_second"])
    assert found["cost"] == pytest.approx(2 * found["hours"])
    assert cli.main(["estimate", "tiny.py", "--device", "v9"]) == 2
    assert "device=v9 is unknown" in capsys.readouterr().err


def test_options_of_training_go_after_those_of_the_command():
    given = [
        "estimate",
        "a.py",
        "--train.batch",
        "8",
        "--device=v5e-1",
        "--optim.clip",
        "-1",
        "--price",
        "2",
    ]
    assert estimate.own_options_first(given) == [
        *("estimate", "a.py", "--device=v5e-1", "--price", "2"),
        *("--", "--train.batch", "8", "--optim.clip", "-1"),
    ]
    assert estimate.own_options_first(["estimate", "--help"]) == ["estimate", "--help"]


def test_documents_that_are_masked_have_segments():
    masked = replace(TINY, data=DataConfig(documents="masked"))
    assert {*work.batch_shapes(masked, 2)} > {"segments", "positions"}
