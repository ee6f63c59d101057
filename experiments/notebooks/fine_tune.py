# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Fine-tune on a folder
#
# `configs/finetune.py` takes a pretrained run and a folder of images, one folder a class, and
# trains a new classifier on top, and all below it. The pictures here are tiles of three
# photographs that ship with Python packages, and the weights are those of digits, which is the
# wrong thing to start photographs from: it shows how it is done, and is no result. With the
# weights of timm's `halonet50ts` (`python -m halonet.models.convert`) and a folder of your own the
# cells are the same.

# %%
import pathlib

import numpy as np
from PIL import Image

import halonet
from configs import finetune, quick
from experiments.photographs import write_tiles
from halonet import evaluate, plots
from halonet.train import train_and_evaluate

# %% [markdown]
# ## The folder
#
# `PHOTOGRAPHS/CLASS/any_name.jpg`. A tenth of the images is held out, by the hash of their names:
# an image stays where it is whatever is added. `python -m halonet.data check` finds what is wrong
# with a folder before training does.

# %%
PHOTOGRAPHS = pathlib.Path("runs/notebooks/tiles")
write_tiles(PHOTOGRAPHS)
tiles = {folder.name: sorted(folder.iterdir()) for folder in sorted(PHOTOGRAPHS.iterdir())}
{name: len(files) for name, files in tiles.items()}

# %%
shown = [(name, file) for name, files in tiles.items() for file in files[30:90:10]]
plots.sheet(
    np.stack([np.asarray(Image.open(file)) for _, file in shown]),
    [name for name, _ in shown],
    "runs/notebooks/tiles.png",
    title="some of the tiles",
    columns=9,
)
Image.open("runs/notebooks/tiles.png")

# %% [markdown]
# ## The weights
#
# Any run will do: one trained here, one checkpoint of it, or converted weights. This is the run of
# [First steps](first_steps.md), trained now where it is not there yet.

# %%
WEIGHTS = "runs/notebooks/digits"
if not pathlib.Path(WEIGHTS, "summary.json").exists():
    train_and_evaluate(quick.get_config(), WEIGHTS)

# %% [markdown]
# ## Fine-tuning
#
# The model is that of the weights, and the images get its size. `init.skip = "head"` leaves the
# classifier of ten digits out. What the weights were trained with and this run is not, the
# normalisation here, is told.

# %%
config = finetune.get_config()
config.init.weights = WEIGHTS
config.data.data_dir = str(PHOTOGRAPHS)
config.model.name = "halonet_tiny"
config.model.dtype = "float32"
config.data.image_size = 32
config.data.batch_size = 32
config.data.threads = 2
config.eval.batch_size = 16
config.train.epochs = 8
config.optim.learning_rate = 0.003
config.eval.every_steps = 20
config.log.every_steps = 2
summary = train_and_evaluate(config, "runs/notebooks/photographs")

# %%
Image.open("runs/notebooks/photographs/curves.png")

# %% [markdown]
# ## What it says
#
# Files go into `predict` as they are. These were held out:

# %%
run = halonet.load_run("runs/notebooks/photographs")
held_out = evaluate.open_split(run.config, "val")
files = [held_out.path(index) for index in range(len(held_out))]
labels = np.array([held_out[index]["label"] for index in range(len(held_out))])
probabilities = run.predict(files)
confusion = np.zeros((len(run.classes),) * 2, int)
np.add.at(confusion, (labels, probabilities.argmax(-1)), 1)
print("rows: what it is, columns: what the model says,", *run.classes)
print(confusion)

# %%
images = np.stack([np.asarray(Image.open(file)) for file in files])
plots.prediction_sheet(
    images, labels, np.log(probabilities), run.classes, "runs/notebooks/said.png", columns=9, rows=3
)
Image.open("runs/notebooks/said.png")

# %% [markdown]
# Tiles of one photograph share its colours, and neighbours of what is held out were trained on: a
# high score was to be expected, and says nothing about photographs in general.
