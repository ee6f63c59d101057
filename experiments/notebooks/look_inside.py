# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Look inside
#
# What a query attends to, which pixels a place of a map depends on, what relative positions were
# learned, and the pyramid of maps that a detector would take.
#
# Everything below works with any run: set `WORKDIR` to one of `halonet50ts`, converted from timm's
# weights, and the cells need no change. Nothing can be downloaded here, so that the run is one of
# minutes, of tiles of three photographs. Its pictures show what the architecture *allows*, the
# windows and how they grow from stage to stage, which no training changes. What they show of
# *learning*, which offsets a head prefers, is of a tiny model that had only to tell three
# photographs apart, mostly by colour: do not read meaning into it.

# %%
import pathlib

import jax
import numpy as np
from PIL import Image

import halonet
from configs import finetune
from experiments.photographs import write_tiles
from halonet import plots
from halonet.data.transforms import normalize
from halonet.models import attention_layers, attention_map, receptive_field
from halonet.train import train_and_evaluate

WORKDIR = "runs/notebooks/three_photographs"

# %%
if not pathlib.Path(WORKDIR, "config.json").exists():
    write_tiles("runs/notebooks/tiles")
    config = finetune.get_config()
    config.init.weights = config.init.skip = ""
    config.data.data_dir = "runs/notebooks/tiles"
    config.model.name = "halonet_tiny"
    config.model.dtype = "float32"
    config.data.image_size = 32
    config.data.batch_size = 32
    config.data.threads = 2
    config.eval.batch_size = 16
    config.train.epochs = 12
    config.optim.learning_rate = 0.003
    config.eval.every_steps = 60
    train_and_evaluate(config, WORKDIR)
run = halonet.load_run(WORKDIR, pad_to_blocks=True)

# %% [markdown]
# ## A photograph
#
# Much larger than the images that the model was trained on, which attention in windows does not
# mind: nothing in it is of one size, and `pad_to_blocks` takes what its blocks do not divide.
# Models of 256 px keep their own size here. The ring is the pixel that all of this is about.

# %%
SIZE = max(96, run.config.data.image_size)
PIXEL = (SIZE * 45 // 100, SIZE * 38 // 100)
photograph = plots.photograph(SIZE, SIZE)
images = normalize(photograph[None], tuple(run.config.data.mean), tuple(run.config.data.std))
layers = attention_layers(run.model)
print(f"{SIZE} px, pixel {PIXEL}; layers: {', '.join(layers)}")

# %% [markdown]
# ## Attention
#
# The weights that one query gives to the pixels of its map, for every head, over the photograph.
# The query is the one whose pixel lies in the ring. Its window is that of its whole *block*: the
# query need not stand in the middle of what it sees, and that is the price of sharing keys and
# values among a block.


# %%
def query_at(layer):
    """The query of a layer that is nearest to the pixel: `run.model.features` has the strides."""
    stage, block = (int(part[5:]) for part in layer.split("_"))
    stride = run.model.features[stage - 1][0]
    # The first block of a stage attends over the map of the stage before, where it pools.
    if block == 1 and run.model.downsample == "pool":
        stride //= run.model.stages()[stage - 1][0].stride
    return tuple(at // stride for at in PIXEL)


def shown(layer):
    """The maps of the heads of a layer, drawn over the photograph."""
    weights = attention_map(run.model, run.variables, images, layer=layer, query=query_at(layer))[0]
    inside = np.asarray(weights.sum((-2, -1)))
    path = f"runs/notebooks/{layer}.png"
    titles = [f"{layer}, head {head}\n{share:.0%} inside" for head, share in enumerate(inside)]
    plots.heat_maps(dict(zip(titles, weights, strict=True)), path, image=photograph, at=PIXEL)
    return Image.open(path)


first, *_, last = layers
shown(first)

# %%
shown(last)

# %% [markdown]
# "Inside" is the weight that lies within the image. At a border the rest goes to zeros: in the
# paper what lies outside has keys and values of zero that take part in the softmax.
#
# ## Receptive fields
#
# The derivative of one place of a map by every pixel of the image. Where it is exactly zero
# nothing of the pixel arrives: what has any colour is the field that blocks and halos allow. How
# much of it is used is the *effective* field, and tells of training. The colours are logarithms,
# over four decades, since most of it comes the straight way, by the shortcuts around the
# attention.


# %%
def logarithm(field, decades=4):
    """From 1 at the largest value down to 0.1 for all that is smaller, and 0 for zero."""
    ratio = np.maximum(field / field.max(), 10.0**-decades)
    return np.where(field > 0, 0.1 + 0.9 * (1 + np.log10(ratio) / decades), 0)


fields = {}
for stage, (stride, _) in enumerate(run.model.features, start=1):
    place = tuple(at // stride for at in PIXEL)
    (field,) = np.asarray(
        receptive_field(run.model, run.variables, images, stage=stage, place=place)
    )
    rows, columns = (np.ptp(np.flatnonzero(field.any(axis))) + 1 for axis in (1, 0))
    power = np.sort(field, axis=None)[::-1] ** 2
    most = np.searchsorted(np.cumsum(power), 0.9 * power.sum()) + 1
    title = f"stage {stage}: {rows} x {columns} px,\n90 % of the power in {most} of them"
    fields[title] = logarithm(field)
plots.heat_maps(fields, "runs/notebooks/fields.png", image=photograph, at=PIXEL)
Image.open("runs/notebooks/fields.png")

# %% [markdown]
# The edges are those of blocks, not circles around the ring: the windows of a few layers, one out
# of the other. Only through its halo does a block learn of the next one.
#
# ## Relative positions
#
# A table has a row for each offset between a key and a query, along one axis, and the channels of
# a query. First the tables as they are; then what they mean, their products with the query in the
# ring: what is added to its logits for every offset, before scaling, and for each head.

# %%
attention = run.variables["params"][first]["attention"]
tables = [np.asarray(attention[name]) for name in ("row_table", "col_table")]
plots.heat_maps(
    dict(zip(("vertical offsets", "horizontal offsets"), tables, strict=True)),
    "runs/notebooks/tables.png",
    signed=True,
)
Image.open("runs/notebooks/tables.png")

# %%
apply = jax.jit(lambda x: run.model.apply(run.variables, x, train=False, mutable=["intermediates"]))
_, sown = apply(images)
queries, _ = sown["intermediates"][first]["attention"]["queries_keys"][0]
heads = np.asarray(queries)[0][query_at(first)]
rows, columns = (table @ heads.T for table in tables)
logits = rows[:, None] + columns[None]
plots.heat_maps(
    {f"head {head}": logits[..., head] for head in range(logits.shape[-1])},
    "runs/notebooks/logits.png",
    signed=True,
    at=(len(rows) / 2, len(columns) / 2),
)
Image.open("runs/notebooks/logits.png")

# %% [markdown]
# The ring is at offset zero: the query itself. A table starts as noise, and a short training
# leaves most of it that way.
#
# ## The pyramid
#
# With `features_only` a model returns the map of every stage, what a detector or a segmenter
# takes, at any size. Of each, the three channels that vary most:

# %%
backbone = halonet.load_run(WORKDIR, features_only=True, pad_to_blocks=True)
maps = jax.jit(lambda x: backbone.model.apply(backbone.variables, x, train=False))(images)
panels = {}
for (stride, channels), found in zip(backbone.model.features, maps, strict=True):
    found = np.asarray(found[0], np.float32)
    for channel in np.argsort(found.std((0, 1)))[::-1][:3]:
        panels[f"stride {stride}: channel {channel} of {channels}"] = found[..., channel]
plots.heat_maps(panels, "runs/notebooks/pyramid.png", columns=3)
print([found.shape for found in maps])
Image.open("runs/notebooks/pyramid.png")
