# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # First steps
#
# A HaloNet is trained on handwritten digits, its curves are looked at, and it reads digits that it
# has not seen. Nothing is downloaded: 5,000 of the MNIST digits ship inside a Python package.
# Start Jupyter at the root of the repository.

# %%
import dataclasses

import numpy as np
from PIL import Image

import halonet
from configs import quick
from halonet import evaluate, metrics, plots
from halonet.train import train_and_evaluate

# %% [markdown]
# ## A configuration
#
# Every key is declared once, with its unit, in `configs/default.py`; other configurations are that
# plus what differs. `configs/quick.py` is a run of a minute or two. Assigning `config.train.steps
# = 600` here is what `--config.train.steps=600` is on the command line.

# %%
config = quick.get_config()
print(config.train)

# %% [markdown]
# ## Training
#
# This is what `main.py` calls. What it leaves is a folder, the *workdir*. Interrupt the kernel,
# and it saves before it stops; run the cell again, and it goes on from there; run it when it is
# done, and it says so at once.

# %%
WORKDIR = "runs/notebooks/digits"
summary = train_and_evaluate(config, WORKDIR)

# %%
Image.open(f"{WORKDIR}/curves.png")

# %% [markdown]
# The curves are drawn from `metrics.jsonl`, which is a list of rows to anyone who wants other
# plots:

# %%
rows = metrics.read_metrics(WORKDIR)
[(row["step"], row["eval/top1"]) for row in rows if "eval/top1" in row]

# %% [markdown]
# ## Using it
#
# `load_run` opens the best checkpoint, on any device, without the data set. `predict` takes a list
# of images of any size and returns a probability for each class. Here it gets digits that were
# held out from training.

# %%
run = halonet.load_run(WORKDIR)
held_out = evaluate.open_split(run.config, "test")
examples = [held_out[index] for index in range(0, len(held_out), 50)]
images = np.stack([example["image"] for example in examples])
labels = np.array([example["label"] for example in examples])
probabilities = run.predict(images)
print(f"{np.mean(probabilities.argmax(-1) == labels):.0%} of these {len(labels)} are right")

# %%
plots.prediction_sheet(
    images, labels, np.log(probabilities), run.classes, "runs/notebooks/digits.png", rows=2
)
Image.open("runs/notebooks/digits.png")

# %% [markdown]
# ## What it is
#
# The model is a Flax module, and a registered name with numbers that can be changed. This one has
# maps of 16x16 and 8x8 pixels, in blocks of 4; the queries of a block see it and a ring of one
# pixel around it. H0 to H7 of the paper are made of the same parts: `python -m halonet.models
# list`.

# %%
for block in (block for stage in run.model.stages() for block in stage):
    print(dataclasses.asdict(block))
print(f"{summary['parameters']:,} parameters, {run.model.block_size=}, {run.model.halo_size=}")
