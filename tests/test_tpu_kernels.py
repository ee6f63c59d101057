"""The table of the fused kernel's cycles, and what is said of layers that are not in it."""

import dataclasses

import pytest

from halonet import aot, hlo, tpu_kernels
from halonet.models import create_model
from halonet.tpu_kernels import Shape

GENERATIONS = ("v4", "v5e", "v5p", "v6e")
H0 = Shape(64, 8, 3, 4, 16, 16)


def kernel(grid, name="halo_attention_forward"):
    where = "jit(f)/HaloNet/stage1_block1/attention/halo"
    return hlo.Operation(name, "kernel", 1, 0, 0, where, f"(bf16[{grid},8,8,64,48]{{4}})")


@pytest.mark.parametrize("shape", [H0, dataclasses.replace(H0, stride=2), Shape(28, 7, 0, 2, 8, 9)])
def test_shapes_come_back_from_their_text(shape):
    assert Shape.parse(f"H0 stage 1 {shape}") == shape


def test_layers_of_a_model_are_in_the_table():
    layers = list(tpu_kernels.attention_layers(create_model("halonet_h0"), 256))
    assert layers[0] == (1, 1, H0)
    assert len(layers) == 16
    for _, _, shape in layers:
        for generation in GENERATIONS:
            assert tpu_kernels.cost(shape, generation).like == ""


def test_products_are_those_of_whole_windows():
    # 4096 queries of 4 heads, 196 keys and 42 rows of tables of 16 channels.
    assert H0.products == 64 * 64 * 4 * ((196 + 42) * 16 + 196 * 16)


def test_an_unknown_layer_is_like_the_nearest_in_proportion():
    """H0's first layer on a map of twice the side, of which there is none in the table."""
    large = dataclasses.replace(H0, side=128)
    own, guess = tpu_kernels.cost(H0, "v5e"), tpu_kernels.cost(large, "v5e")
    assert guess.like == str(H0)
    assert (guess.forward, guess.backward) == (4 * own.forward, 4 * own.backward)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_guesses_are_good_to_a_factor(generation):
    """Each layer from the others: what a plan adds to its range."""
    assert 1.2 < tpu_kernels.uncertainty(generation) < 2.5


def test_a_generation_without_a_table_is_refused():
    with pytest.raises(ValueError, match="no cycles of the fused kernel are known on v3"):
        tpu_kernels.cost(H0, "v3")


@pytest.mark.parametrize(
    ("topology", "grid", "images", "rows", "times"),
    [
        ("v5e:2x2", 16, 16, 1, 16),
        ("v5p:2x2x1", 16, 16, 1, 8),  # two cores share the images
        ("v4:2x2x1", 16, 16, 1, 8),  # two as well, and the table is of one
        ("v4:2x2x1", 32, 16, 1, 8),  # heads in two groups, which are one image's cycles together
        ("v5e:2x2", 16, 16, 4, 4),  # four devices share the rows of an image
    ],
)
def test_cycles_of_a_kernel_are_those_of_its_turns(topology, grid, images, rows, times):
    generation = topology.partition(":")[0]
    settings = {"layers": {(1, 1): H0}, "images": images, "generation": generation}
    op, like = tpu_kernels.with_kernel_cycles(
        kernel(grid), **settings, chip=aot.chip_of(topology), rows=rows
    )
    assert op.cycles == times * tpu_kernels.cost(H0, generation).forward
    assert like == ""


def test_only_kernels_are_changed():
    op = dataclasses.replace(kernel(16), kind="fusion", cycles=5)
    settings = {"layers": {}, "images": 16, "generation": "v5e", "chip": aot.CHIPS["v5e"]}
    assert tpu_kernels.with_kernel_cycles(op, **settings) == (op, "")
