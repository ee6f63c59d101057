"""The fused TPU kernel on the layers of H0 to H7: its numbers interpreted, its cycles compiled.

The contract that it shares with the other forms is in test_halo_attention.py.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.layer_shapes import layer_shapes
from halonet import tpu_kernels
from halonet.ops import geometry, halo_attention, pallas_tpu, table_size

ROOT = pathlib.Path(__file__).parent.parent
RECORD = json.loads(tpu_kernels.RECORD.read_text())
GENERATIONS = ("v4", "v5e", "v5p", "v6e")
LAYERS = {name: shape for shape, name in layer_shapes().items()}
# One of each kind: H0's first stage and its strided layer, three blocks that are not of whole
# registers, wider values, heads in groups.
KINDS = ("H0 stage 1", "H0 stage 2 (64x64 stride", "H3 stage 2 (40", "H4 stage 3 (24", "H5 stage 1")
KINDS = [name for name in LAYERS if name.startswith(KINDS)]
RECOMPILED = [
    *((name, "v5e") for name in KINDS[:3]),
    *((KINDS[0], generation) for generation in ("v4", "v5p", "v6e")),
]


def inputs(shape, rows=2, cols=2, n=1):
    """Random arguments for the layer on a smaller map, and a cotangent."""
    rng = np.random.default_rng(0)
    size = (rows * shape.block, cols * shape.block)
    queries = tuple(axis // shape.stride for axis in size)
    table = (table_size(shape.block, shape.halo), shape.d_k)
    sizes = [
        (n, *queries, shape.heads, shape.d_k),
        (n, *size, shape.heads, shape.d_k),
        (n, *size, shape.heads, shape.d_v),
        *(table, table),
        (n, *queries, shape.heads, shape.d_v),
    ]
    return [jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes]


def compare(shape, dtype, value_bound, gradient_bound):
    """Values within a bound, and gradients within one relative to their largest."""
    *arguments, cotangent = inputs(shape)
    op = functools.partial(halo_attention, block=shape.block, halo=shape.halo, stride=shape.stride)

    def run(implementation, dtype):
        def both(cotangent, *arguments):
            out, pull = jax.vjp(functools.partial(op, implementation=implementation), *arguments)
            return out, *pull(cotangent)

        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        both = jax.jit(both, compiler_options=options)
        found = both(cotangent.astype(dtype), *(x.astype(dtype) for x in arguments))
        return [np.asarray(x, np.float32) for x in found]

    (values, *gradients), (right, *rights) = run("pallas_tpu", dtype), run("reference", np.float32)
    assert np.abs(values - right).max() < value_bound
    for ours, theirs in zip(gradients, rights, strict=True):
        assert np.abs(ours - theirs).max() < gradient_bound * max(1.0, np.abs(theirs).max())


@pytest.mark.long
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(layer):
    compare(LAYERS[layer], jnp.float32, 1e-5, 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("layer", KINDS)
def test_layers_in_bfloat16(layer):
    compare(LAYERS[layer], jnp.bfloat16, 0.05, 0.05)


@pytest.mark.middle
@pytest.mark.parametrize("layer", KINDS)
def test_a_layer_of_each_kind(layer):
    compare(LAYERS[layer], jnp.float32, 1e-5, 1e-4)


def test_the_smallest_layer():
    (name,) = (name for name in LAYERS if name.startswith("TINY stage 2 (8x8"))
    compare(LAYERS[name], jnp.float32, 1e-5, 1e-4)


def test_heads_go_in_groups_where_vmem_is_short(monkeypatch):
    (shape,) = (shape for name, shape in LAYERS.items() if name.startswith("TINY stage 2 (8x8"))
    shape = dataclasses.replace(shape, d_k=64, d_v=64)
    arguments = inputs(shape)[:-1]
    op = functools.partial(
        halo_attention, block=shape.block, halo=shape.halo, implementation="pallas_tpu"
    )
    right = jax.jit(op)(*arguments)
    spec = geometry.Spec(shape.block, shape.halo, 1, "zeros", "exact", True, 8, 8)
    k, v = arguments[1:3]
    two = pallas_tpu.Layout.of(spec, k, v, heads=2).vmem
    monkeypatch.setattr(pallas_tpu, "VMEM", two)
    # Keys and values of two heads, as though there were two images.
    assert "f32[2,8,2,4,256]" in str(jax.make_jaxpr(lambda *x: op(*x))(*arguments))
    np.testing.assert_allclose(jax.jit(lambda *x: op(*x))(*arguments), right, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(pallas_tpu, "VMEM", 1000)
    with pytest.raises(
        NotImplementedError, match="no room for rows of 2 blocks of 4; .*xla_packed"
    ):
        op(*arguments)


@pytest.mark.parametrize("n", [4, 3])
def test_a_batch_on_a_mesh_is_computed_where_it_lies(n):
    (shape,) = (shape for name, shape in LAYERS.items() if name.startswith("TINY stage 2 (8x8"))
    *arguments, cotangent = inputs(shape, n=n)
    op = functools.partial(
        halo_attention, block=shape.block, halo=shape.halo, implementation="pallas_tpu"
    )

    def both(cotangent, *arguments):
        out, pull = jax.vjp(op, *arguments)
        return out, *pull(cotangent)

    mesh = jax.make_mesh(
        (2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    images = NamedSharding(mesh, P(mesh.axis_names if n == 4 else None))
    copied = NamedSharding(mesh, P())
    layout = (images, images, images, images, copied, copied)
    with jax.set_mesh(mesh):
        split = jax.jit(both, in_shardings=layout).lower(cotangent, *arguments).compile()
        found = split(*jax.device_put((cotangent, *arguments), layout))
    # The tables' gradients alone are added up over devices.
    program = split.as_text()
    assert "all-gather" not in program
    assert "collective-permute" not in program
    for ours, right in zip(found, jax.jit(both)(cotangent, *arguments), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-5)


def test_the_table_is_of_this_kernel_and_of_every_layer():
    """Run `python -m experiments.tpu_kernels` after a change to the kernel."""
    from experiments import tpu_kernels as table

    assert RECORD["kernel"] == table.kernel_hash()
    assert RECORD["layers"].keys() == LAYERS.keys()
    for layer, costs in RECORD["layers"].items():
        assert costs.keys() == set(GENERATIONS), layer
    text = (ROOT / "docs" / "tpu_kernels.txt").read_text()
    assert text == table.render(RECORD)


@pytest.mark.middle
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra tpu-aot")
def test_cycles_are_those_of_the_table():
    """Compiled in another process, as libtpu reads its settings once."""
    program = (
        "import json, sys; from experiments import tpu_kernels; "
        "from experiments.layer_shapes import layer_shapes; "
        "shapes = {name: shape for shape, name in layer_shapes().items()}; "
        "print(json.dumps([tpu_kernels.cost(shapes[n], g) for n, g in json.loads(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", program, json.dumps(RECOMPILED)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for (layer, generation), found in zip(
        RECOMPILED, json.loads(run.stdout.splitlines()[-1]), strict=True
    ):
        recorded = RECORD["layers"][layer][generation]
        for column in ("forward_cycles", "backward_cycles"):
            assert found[column] == pytest.approx(recorded[column], rel=0.02), (layer, generation)
        assert found["temporary_bytes"] == recorded["temporary_bytes"], (layer, generation)
