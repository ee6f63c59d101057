"""`python -m halonet.models`: the registered variants as a Markdown table, counted now."""

import functools

import jax
import jax.numpy as jnp
from absl import app

from halonet.models import VARIANTS, create_model, list_models


def main(argv: list[str]) -> None:
    del argv
    print("| model | image | block | halo | r_v | r_b | blocks per stage | parameters |")
    print("|---|---|---|---|---|---|---|---|")
    for name in list_models():
        size = VARIANTS[name].image_size
        model = create_model(name)
        init = functools.partial(model.init, train=False)
        shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        print(
            f"| `{name}` | {size} px | {model.block_size} | {model.halo_size} | "
            f"{model.value_ratio:g} | {model.out_ratio:g} | "
            f"{', '.join(map(str, model.depths))} | {count:,} |"
        )


if __name__ == "__main__":
    app.run(main)
