"""The weights of attention are those that the op sums values with."""

import functools

import jax
import numpy as np
import pytest

from halonet.ops import attention_weights, halo_attention
from tests.test_halo_attention import Case

CASES = {
    "zeros": Case(),
    "timm": Case(stride=2, halo=2, positions="contiguous", scale_positions=False),
    "padded": Case(size=(7, 9), stride=2, border="mask", halo=3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_they_are_those_of_the_op(case):
    q, k, v, row_table, col_table, _ = case.inputs()
    op = jax.jit(functools.partial(halo_attention, **case.options, implementation="reference"))
    expected = op(q, k, v, row_table, col_table)
    options = {name: it for name, it in case.options.items() if name != "pad_to_blocks"}
    side, around = case.block + 2 * case.halo, case.block + case.halo
    # The values of the same window, out of an image with zeros all around.
    v = np.pad(v, ((0, 0), (around, around), (around, around), (0, 0), (0, 0)))
    height, width = q.shape[1:3]
    for query in ((0, 0), (1, 2), (height - 1, width - 1)):
        weigh = jax.jit(functools.partial(attention_weights, query=query, **options))
        weights = weigh(q, k, row_table, col_table)
        assert weights.shape == (case.n, case.heads, side, side)
        np.testing.assert_allclose(weights.sum((-2, -1)), 1, atol=1e-5)
        top, left = (case.stride * at // case.block * case.block + case.block for at in query)
        window = v[:, top : top + side, left : left + side]
        found = np.einsum("naij,nijad->nad", weights, window)
        np.testing.assert_allclose(found, expected[:, *query], atol=1e-5)


def test_half_precision_is_computed_in_single():
    q, k, _, row_table, col_table, _ = Case().inputs("bfloat16")
    weights = attention_weights(q, k, row_table, col_table, query=(0, 0), block=4, halo=1)
    assert weights.dtype == np.float32


@pytest.mark.parametrize("query", [(8, 0), (0, -1)])
def test_a_query_that_is_not_there_is_refused(query):
    q, k, _, row_table, col_table, _ = Case().inputs()
    message = f"query {query} is not among the 8 x 12 queries".replace("(", r"\(")
    with pytest.raises(ValueError, match=message.replace(")", r"\)")):
        attention_weights(q, k, row_table, col_table, query=query, block=4, halo=1)
