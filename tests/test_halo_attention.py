"""The contract that every implementation keeps, and the errors of the public op."""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.ops import IMPLEMENTATIONS, geometry, halo_attention, rows, table_size

# The package's attribute of this name is the function.
op_module = sys.modules["halonet.ops.halo_attention"]

BFLOAT16_BOUND = 0.04  # of values of order 1, and of gradients relative to their largest


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call. `image` is (rows, columns) of blocks, `channels` (d_k, d_v).

    `size`, (height, width) in pixels, takes the place of `image` where padding is asked for.
    """

    block: int = 4
    halo: int = 1
    stride: int = 1
    border: str = "zeros"
    image: tuple[int, int] = (2, 3)
    channels: tuple[int, int] = (4, 6)
    positions: str = "exact"
    scale_positions: bool = True
    n: int = 2
    heads: int = 2
    size: tuple[int, int] | None = None

    @property
    def options(self):
        names = ("block", "halo", "stride", "border", "positions", "scale_positions")
        return {f: getattr(self, f) for f in names} | {"pad_to_blocks": self.size is not None}

    def inputs(self, dtype=np.float32):
        """The five arguments and a cotangent, as NumPy arrays of a fixed random seed."""
        (d_k, d_v), rng = self.channels, np.random.default_rng(0)
        size = self.size or tuple(blocks * self.block for blocks in self.image)
        pixels = (self.n, *size, self.heads)
        queries = (self.n, *(-(-axis // self.stride) for axis in size), self.heads)
        table = (table_size(self.block, self.halo, self.positions), d_k)
        shapes = [(*queries, d_k), (*pixels, d_k), (*pixels, d_v), table, table, (*queries, d_v)]
        arrays = [rng.normal(size=s) for s in shapes]
        if self.size:
            arrays[2][..., 0] = 1  # the outputs of this channel are the weight inside the image
        return [jnp.asarray(x, dtype) for x in arrays]


AXES = {
    "block": (4, 8, 10, 12, 14),
    "halo": (0, 1, 2, 3, 4),
    "stride": (1, 2),
    "border": ("zeros", "mask"),
    "image": ((1, 2), (2, 1), (3, 2)),
    "channels": ((4, 6), (8, 3)),
    "positions": ("exact", "contiguous"),
    "scale_positions": (True, False),
}
# Every block, halo, stride, border and image; of the last three axes, the combinations in turn.
SIZES, REST = list(AXES.values())[:5], list(AXES.values())[5:]
IN_TURN = itertools.cycle(itertools.product(*REST))
EVERYWHERE = [Case(*sizes, *next(IN_TURN)) for sizes in itertools.product(*SIZES)]


def pairs(case):
    """Every pair of settings that a case holds."""
    settings = [(name, getattr(case, name)) for name in AXES]
    return set(itertools.combinations(settings, 2))


def pairwise(cases):
    """A small choice of cases, always the same, that holds every pair that all of them hold."""
    missing, chosen = set().union(*map(pairs, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def name(case):
    (rows, cols), (d_k, d_v) = case.image, case.channels
    size = f"b{case.block}h{case.halo}s{case.stride}"
    scaled = "scaled" if case.scale_positions else "unscaled"
    return f"{size}-{case.border}-{rows}x{cols}-d{d_k},{d_v}-{case.positions}-{scaled}"


def any_size(seed):
    """A random case whose image need not consist of whole blocks."""
    rng = np.random.default_rng(seed)
    block = int(rng.integers(1, 9))
    return Case(
        block=block,
        halo=int(rng.integers(5)),
        stride=int(rng.choice([s for s in range(1, block + 1) if block % s == 0])),
        border=str(rng.choice(geometry.BORDERS)),
        positions=str(rng.choice(geometry.POSITIONS)),
        scale_positions=bool(rng.integers(2)),
        heads=int(rng.integers(1, 4)),
        size=tuple(rng.integers(1, 20, size=2).tolist()),
    )


def compiled(function, *arguments):
    """Runs `function` under jit, optimised little: these tests spend their time in the compiler."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    if isinstance(arguments[0], jax.core.Tracer):
        return function(*arguments)
    return jax.jit(function, compiler_options=options)(*arguments)


def values_and_gradients(case, implementation, dtype=np.float32):
    """The output and the gradients of the five inputs, for a random cotangent."""
    *arguments, cotangent = case.inputs(dtype)
    op = functools.partial(halo_attention, **case.options, implementation=implementation)

    def run(*arguments):
        out, pull = jax.vjp(op, *arguments)
        return out, pull(cotangent)

    return jax.device_get(compiled(run, *arguments))


@functools.cache
def expected(case):
    return values_and_gradients(case, "reference")


def inverse_offsets(case):
    """Table rows of (key, query) pairs of pixels of one axis, for an image of one block."""
    pixels = np.arange(case.block)
    return pixels[None, :] - pixels[:, None] + case.block + case.halo - 1


def global_attention(q, k, v, row_table, col_table, rows, cols):
    """Attention of every pixel to every pixel with relative positions; written apart."""
    keys = k[:, None, None] + row_table[rows][None, :, None, :, None, None, :]
    keys = keys + col_table[cols][None, None, :, None, :, None, :]  # n y x i j head d
    logits = np.einsum("nyxhd,nyxijhd->nyxhij", q, keys) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max((-2, -1), keepdims=True))
    weights /= weights.sum((-2, -1), keepdims=True)
    return np.einsum("nyxhij,nijhd->nyxhd", weights, v)


class Contract:
    """What every implementation must do. A subclass names one."""

    implementation: str

    def run(self, case, *arguments):
        op = functools.partial(halo_attention, implementation=self.implementation)
        return compiled(functools.partial(op, **case.options), *arguments)

    def check(self, case):
        """Compares values and gradients to those of the reference; returns the values."""
        values, gradients = values_and_gradients(case, self.implementation)
        expected_values, expected_gradients = expected(case)
        np.testing.assert_allclose(values, expected_values, rtol=1e-5, atol=1e-5)
        for ours, right in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-4)
        return values

    @pytest.mark.parametrize("case", pairwise(EVERYWHERE), ids=name)
    def test_values_and_gradients(self, case):
        self.check(case)

    @pytest.mark.long
    @pytest.mark.parametrize("case", EVERYWHERE, ids=name)
    def test_values_and_gradients_everywhere(self, case):
        self.check(case)

    def check_any_size(self, seed):
        case = any_size(seed)
        weight = self.check(case)[..., 0]
        if case.border == "mask":
            np.testing.assert_allclose(weight, 1, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("seed", range(20))
    def test_any_size(self, seed):
        self.check_any_size(seed)

    @pytest.mark.long
    @pytest.mark.parametrize("seed", range(200))
    def test_any_size_everywhere(self, seed):
        self.check_any_size(seed)

    @pytest.mark.parametrize("border", ["zeros", "mask"])
    def test_halo_wider_than_a_block(self, border):
        self.check(Case(halo=6, border=border, image=(1, 4)))

    @pytest.mark.parametrize("border", ["zeros", "mask"])
    def test_bfloat16(self, border):
        case = Case(block=8, halo=2, border=border, channels=(16, 16))
        values, gradients = values_and_gradients(case, self.implementation, jnp.bfloat16)
        right, right_gradients = expected(case)
        assert values.dtype == jnp.bfloat16
        assert np.abs(values.astype(np.float32) - right).max() < BFLOAT16_BOUND
        for ours, theirs in zip(gradients, right_gradients, strict=True):
            assert ours.dtype == jnp.bfloat16
            error = np.abs(ours.astype(np.float32) - theirs).max()
            assert error < BFLOAT16_BOUND * np.abs(theirs).max()

    def test_float16_with_a_mask_stays_finite(self):
        case = Case(border="mask")
        values, gradients = values_and_gradients(case, self.implementation, jnp.float16)
        assert values.dtype == jnp.float16
        for ours, right in zip(
            (values, *gradients), (expected(case)[0], *expected(case)[1]), strict=True
        ):
            np.testing.assert_allclose(ours, right, rtol=0, atol=0.02 * np.abs(right).max())

    def test_large_logits_do_not_overflow(self):
        case = Case(border="mask")
        q, *others, _ = case.inputs()
        assert np.isfinite(self.run(case, 1000 * q, *others)).all()

    def test_vmap(self):
        case = Case()
        *arguments, _ = case.inputs()
        q, k, v = (jnp.stack([x, 2 * x, -x]) for x in arguments[:3])
        mapped = jax.vmap(functools.partial(self.run, case), (0, 0, 0, None, None))
        values = compiled(mapped, q, k, v, *arguments[3:])
        merged = self.run(case, *(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)), *arguments[3:])
        np.testing.assert_allclose(values.reshape(merged.shape), merged, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("stride", [1, 2])
    def test_gradients_vanish_outside_the_window(self, stride):
        case = Case(block=4, halo=1, stride=stride, image=(3, 3), n=1)
        *arguments, _ = case.inputs()
        side = case.block // stride
        queries = np.s_[:, side : 2 * side, side : 2 * side]  # those of the block in the middle
        window = np.zeros((12, 12), bool)
        window[3:9, 3:9] = True

        def total(q, k, v):
            return jnp.square(self.run(case, q, k, v, *arguments[3:])[queries]).sum()

        gradients = compiled(jax.grad(total, (0, 1, 2)), *arguments[:3])
        of_q, *of_others = (np.array(x) for x in gradients)
        for gradient in of_others:
            by_pixel = np.abs(gradient).max((0, 3, 4))
            assert (by_pixel[~window] == 0).all()
            assert (by_pixel[window] > 0).all()
        assert (of_q[queries] != 0).all()
        of_q[queries] = 0
        assert (of_q == 0).all()

    def test_halo_0_is_plain_blocked_attention(self):
        case = Case(block=4, halo=0, image=(2, 3))
        *arguments, _ = case.inputs()
        values = self.run(case, *arguments)
        offsets = inverse_offsets(case)
        for row, col in np.ndindex(2, 3):
            block = np.s_[:, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
            q, k, v = (np.asarray(x)[block] for x in arguments[:3])
            right = global_attention(q, k, v, *map(np.asarray, arguments[3:]), offsets, offsets)
            np.testing.assert_allclose(values[block], right, rtol=1e-5, atol=1e-5)

    def test_one_block_is_global_attention(self):
        case = Case(block=8, halo=2, border="mask", image=(1, 1))
        *arguments, _ = case.inputs()
        offsets = inverse_offsets(case)
        right = global_attention(*map(np.asarray, arguments), offsets, offsets)
        np.testing.assert_allclose(self.run(case, *arguments), right, rtol=1e-5, atol=1e-5)

    def test_border(self):
        """What lies outside weighs nothing under "mask" and something under "zeros"."""
        case = Case(block=4, halo=1, image=(3, 3))
        q, k, v, *tables, _ = case.inputs()
        masked = self.run(dataclasses.replace(case, border="mask"), q, k, jnp.ones_like(v), *tables)
        np.testing.assert_allclose(masked, 1, rtol=0, atol=1e-6)
        padded = self.run(case, q, k, jnp.ones_like(v), *tables)
        middle = np.s_[:, 4:8, 4:8]
        np.testing.assert_allclose(padded[middle], 1, rtol=0, atol=1e-6)
        assert (np.delete(padded.reshape(2, 144, -1), middle_pixels(), 1) < 1 - 1e-4).all()

    @pytest.mark.parametrize("stride", [1, 2])
    def test_padding_weighs_nothing_under_a_mask(self, stride):
        """Whatever it holds, and for every query, those in the padding included."""
        image = np.zeros((8, 8), bool)
        image[:5, :6] = True
        spec = geometry.Spec(4, 2, stride, "mask", "exact", True, height=5, width=6)
        q, k, v, *tables, _ = Case(halo=2, stride=stride, image=(2, 2)).inputs()
        # The first channel of the values weighs the image: 1 if all weight lies inside.
        v = v.at[..., 0].set(jnp.where(image, 1.0, 1000.0)[None, :, :, None])

        def total(k, v):
            out = IMPLEMENTATIONS[self.implementation](q, k, v, *tables, spec)
            return jnp.square(out).sum(), out

        gradients, values = compiled(jax.grad(total, (0, 1), has_aux=True), k, v)
        np.testing.assert_allclose(values[..., 0], 1, rtol=0, atol=1e-6)
        for gradient in gradients:
            by_pixel = np.abs(gradient).max((0, 3, 4))
            assert (by_pixel[~image] == 0).all()
            assert (by_pixel[image] > 0).all()


def middle_pixels():
    return np.arange(144).reshape(12, 12)[4:8, 4:8].ravel()


class TestShift(Contract):
    implementation = "xla_shift"


class TestRows(Contract):
    implementation = "xla_rows"

    @pytest.fixture(autouse=True)
    def small_steps(self, monkeypatch):
        monkeypatch.setattr(rows, "ELEMENTS_PER_STEP", 2**15)


@pytest.mark.middle
class TestPacked(Contract):
    implementation = "xla_packed"
    # The long tier goes through the forms that are defaults where tests run.
    test_values_and_gradients_everywhere = None
    test_any_size_everywhere = None


@pytest.mark.middle
class TestPallasTpu(Contract):
    """The fused kernel, interpreted; see also test_pallas_tpu.py.

    Compiling it for a CPU takes seconds, hence fewer cases than of the others.
    """

    implementation = "pallas_tpu"
    test_values_and_gradients_everywhere = None

    @pytest.mark.long
    @pytest.mark.parametrize("seed", range(100))
    def test_any_size_everywhere(self, seed):
        self.check_any_size(seed)

    def check(self, case):
        """With positions and a halo that the kernel knows; others it must refuse."""
        known = {"positions": "exact", "scale_positions": True, "halo": min(case.halo, case.block)}
        supported = dataclasses.replace(case, **known)
        if supported != case:
            with pytest.raises(NotImplementedError, match="'xla_packed' has"):
                values_and_gradients(case, self.implementation)
        return super().check(supported)

    def test_float16_with_a_mask_stays_finite(self):
        with pytest.raises(NotImplementedError, match="no float16; .*'xla_packed' has"):
            values_and_gradients(Case(), self.implementation, jnp.float16)


def test_the_cases_hold_every_pair():
    axes = [[(axis, value) for value in values] for axis, values in AXES.items()]
    two = (itertools.product(*both) for both in itertools.combinations(axes, 2))
    everything = set(itertools.chain.from_iterable(two))
    assert set().union(*map(pairs, EVERYWHERE)) == everything
    cover = pairwise(EVERYWHERE)
    assert set().union(*map(pairs, cover)) == everything
    assert len(cover) < 35


def test_random_sizes_are_of_every_kind():
    cases = [any_size(seed) for seed in range(20)]
    assert {case.border for case in cases} == set(geometry.BORDERS)
    assert {case.positions for case in cases} == set(geometry.POSITIONS)
    missing = [tuple(-axis % case.block for axis in case.size) for case in cases]
    assert sum(rows > 0 and cols > 0 for rows, cols in missing) >= 10
    assert any(case.stride > 1 and any(axis % case.stride for axis in case.size) for case in cases)


def test_every_implementation_has_its_contract():
    tested = {contract.implementation for contract in Contract.__subclasses__()}
    assert tested | {"reference"} == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("chosen", sorted(IMPLEMENTATIONS))
def test_a_named_implementation_is_the_one_that_runs(monkeypatch, chosen):
    def refuse(*_, **__):
        raise NotImplementedError("not here")

    monkeypatch.setitem(IMPLEMENTATIONS, chosen, refuse)
    *arguments, _ = Case().inputs()
    with pytest.raises(NotImplementedError, match="not here"):
        halo_attention(*arguments, **Case().options, implementation=chosen)


def default(platform, devices, **changes):
    case = dataclasses.replace(Case(block=8, halo=3), **changes)
    _, k, v, *_ = case.inputs()
    height, width = k.shape[1:3]
    options = {name: getattr(case, name) for name in ("block", "halo", "stride", "border")}
    options |= {"positions": case.positions, "scale_positions": case.scale_positions}
    spec = geometry.Spec(**options, height=height, width=width)
    return op_module.default_implementation(platform, devices, spec, k, v)


def test_the_default_follows_platform_and_shape(monkeypatch):
    assert default("cpu", 8) == "xla_shift"
    assert default("gpu", 1) == "xla_shift"
    # 2 images x 2 heads x 6 blocks x 64 queries x 196 keys
    for least, form in ((301056, "xla_rows"), (301057, "xla_shift")):
        table = {"cpu": [(0, "xla_shift"), (least, "xla_rows")]}
        monkeypatch.setattr(op_module.measured, "FASTEST", table)
        assert default("cpu", 1) == form
        assert default("cpu", 8) == "xla_shift"


def test_the_default_on_a_tpu_is_the_kernel_where_it_can_be():
    assert default("tpu", 1) == "pallas_tpu"
    assert default("tpu", 1, positions="contiguous") == "xla_packed"
    assert default("tpu", 1, scale_positions=False) == "xla_packed"
    assert default("tpu", 4) == "xla_packed"  # nobody says how the batch lies
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert default("tpu", 4) == "pallas_tpu"


def test_the_default_is_what_runs(monkeypatch):
    monkeypatch.setattr(op_module, "default_implementation", lambda *_: "chosen")
    monkeypatch.setitem(IMPLEMENTATIONS, "chosen", lambda q, k, v, *_: jnp.full_like(v, 7.0))
    *arguments, _ = Case().inputs()
    assert (halo_attention(*arguments, **Case().options) == 7.0).all()


def test_the_measured_table_is_in_order():
    for forms in op_module.measured.FASTEST.values():
        least = [number for number, _ in forms]
        assert least == sorted(least)
        assert least[0] == 0
        assert {form for _, form in forms} <= set(IMPLEMENTATIONS)


@pytest.mark.parametrize("stride", [1, 2])
def test_contiguous_positions_are_exact_ones_unless_queries_are_left_out(stride):
    case = Case(halo=2, stride=stride)
    q, k, v, *tables, _ = case.inputs()
    # The first 2 * halo rows have no use: no key lies so far before its query.
    shifted = [jnp.pad(table, ((4, 0), (0, 0)), constant_values=jnp.nan) for table in tables]
    exact, contiguous = (
        functools.partial(halo_attention, **(case.options | {"positions": positions}))
        for positions in ("exact", "contiguous")
    )
    right = compiled(exact, q, k, v, *tables)
    difference = np.abs(compiled(contiguous, q, k, v, *shifted) - right).max((0, 3, 4))
    # Queries by their blocks' rows, rows of the block, and the same of columns.
    in_blocks = difference.reshape(2, case.block // stride, 3, case.block // stride)
    assert in_blocks[:, 0, :, 0].max() < 1e-6  # queries at a corner of their block
    if stride == 1:
        assert in_blocks.max() < 1e-6
    else:
        assert in_blocks[:, 1:].min() > 1e-3
        assert in_blocks[..., 1:].min() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "block 0 is not positive; HaloNet uses 8 to 14"),
        ({"halo": -1}, "halo -1 is negative; 0 means no halo"),
        ({"stride": 3}, "stride 3 does not divide block 4; these do: 1, 2, 4"),
        ({"stride": 0}, "stride 0 does not divide block 4; these do: 1, 2, 4"),
        ({"border": "wrap"}, "border 'wrap' is unknown; the known ones are zeros, mask"),
        (
            {"positions": "true"},
            "positions 'true' is unknown; the known ones are exact, contiguous",
        ),
        (
            {"implementation": "cuda"},
            "implementation 'cuda' is unknown; the known ones are reference, xla_shift, xla_rows, "
            "xla_packed, pallas_tpu",
        ),
        (
            {"q": (2, 8, 12, 8)},
            "q has shape (2, 8, 12, 8); it needs dimensions (n, height, width, heads, channels)",
        ),
        ({"row_table": (9,)}, "row_table has shape (9,); it needs dimensions (rows, d_k)"),
        ({"block": 5}, "height 8 is not a multiple of block 5; the nearest that work are 5 and 10"),
        (
            {"block": 8, "q": (1,) * 5},
            "width 12 is not a multiple of block 8; the nearest that work are 8 and 16",
        ),
        (
            {"q": (2, 4, 6, 2, 4)},
            "q has shape (2, 4, 6, 2, 4); with k of shape (2, 8, 12, 2, 4), block 4, halo 1 and "
            "stride 1 it needs (2, 8, 12, 2, 4)",
        ),
        (
            {"stride": 2},
            "q has shape (2, 8, 12, 2, 4); with k of shape (2, 8, 12, 2, 4), block 4, halo 1 and "
            "stride 2 it needs (2, 4, 6, 2, 4)",
        ),
        (
            {"v": (2, 8, 12, 3, 6)},
            "v has shape (2, 8, 12, 3, 6); with k of shape (2, 8, 12, 2, 4), block 4, halo 1 and "
            "stride 1 it needs (2, 8, 12, 2, 6)",
        ),
        (
            {"col_table": (11, 4)},
            "col_table has shape (11, 4); with k of shape (2, 8, 12, 2, 4), block 4, halo 1 and "
            "stride 1 it needs (9, 4)",
        ),
        (
            {"row_table": (9, 5)},
            "row_table has shape (9, 5); with k of shape (2, 8, 12, 2, 4), block 4, halo 1 and "
            "stride 1 it needs (9, 4)",
        ),
        (
            {"positions": "contiguous"},
            "row_table has shape (9, 4); with k of shape (2, 8, 12, 2, 4), block 4, halo 1 and "
            "stride 1 it needs (11, 4) for contiguous positions",
        ),
        (
            {"pad_to_blocks": True, "k": (2, 7, 11, 2, 4)},
            "q has shape (2, 8, 12, 2, 4); with k of shape (2, 7, 11, 2, 4), block 4, halo 1 and "
            "stride 1 it needs (2, 7, 11, 2, 4)",
        ),
        (
            {"pad_to_blocks": True, "k": (2, 7, 11, 2, 4), "stride": 2},
            "q has shape (2, 8, 12, 2, 4); with k of shape (2, 7, 11, 2, 4), block 4, halo 1 and "
            "stride 2 it needs (2, 4, 6, 2, 4)",
        ),
        (
            {"pad_to_blocks": True, "k": (2, 0, 11, 2, 4)},
            "height 0 is not a multiple of block 4; the nearest that works is 4",
        ),
        ({"k": jnp.int32}, "k has dtype int32; it needs a floating one"),
        ({"v": jnp.bfloat16}, "v has dtype bfloat16 but q has float32; cast one with .astype"),
        (
            {"row_table": jnp.bfloat16},
            "row_table has dtype bfloat16 but q has float32; cast one with .astype",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument_and_what_would_do(change, message):
    names = ("q", "k", "v", "row_table", "col_table")
    arguments = dict(zip(names, Case().inputs()[:5], strict=True))
    options = Case().options
    for changed, value in change.items():
        if changed not in names:
            options[changed] = value
        elif isinstance(value, tuple):
            arguments[changed] = jnp.zeros(value)
        else:
            arguments[changed] = arguments[changed].astype(value)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        halo_attention(*arguments.values(), **options)
    assert str(error.value) == message
