# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Restore and evaluate
#
# A run is a folder. This notebook opens one, asks it about arrays, pictures and files, chooses
# among its checkpoints and weights, gives it images of other sizes, and scores it as the command
# line does.

# %%
import json
import pathlib

import jax
import numpy as np
from PIL import Image

import halonet
from configs import quick
from halonet import checkpoint, evaluate
from halonet.data.errors import DataError
from halonet.train import train_and_evaluate

# %% [markdown]
# The run is that of [First steps](first_steps.md); where it is not there yet, it is trained now.

# %%
WORKDIR = pathlib.Path("runs/notebooks/digits")
config = quick.get_config()
if not (WORKDIR / "summary.json").exists():
    train_and_evaluate(config, WORKDIR)
run = halonet.load_run(WORKDIR)
run.step, run.weights, run.classes

# %% [markdown]
# ## Arrays, pictures, files
#
# `predict` takes a list of uint8 arrays, of Pillow images, of paths of files, mixed as they come
# and of any sizes. Whatever they are they become what evaluation sees: resized, cropped to the
# middle, normalised as in training. A file is decoded as those of a data set are, by its content.

# %%
held_out = evaluate.open_split(run.config, "test")
digit = held_out[0]["image"]
picture = Image.fromarray(digit).resize((110, 96))
path = pathlib.Path("runs/notebooks/digit.png")
picture.save(path)
probabilities = run.predict([digit, picture, path, np.asarray(picture)[..., 0]])
print("it is", held_out[0]["label"])
np.round(probabilities, 2)

# %% [markdown]
# A file that is missing or damaged is named, and what is wrong with it, in one line:

# %%
damaged = path.with_name("damaged.png")
damaged.write_bytes(path.read_bytes()[:500])
for image in (damaged, "runs/notebooks/nowhere.jpg"):
    try:
        run.predict([image])
    except DataError as error:
        print(error)

# %% [markdown]
# `preprocess` is the first half of `predict`; the model is a Flax module, and its variables are a
# tree of arrays: anything that JAX can do can be done with them. The derivative of the winning
# logit by the pixels, for one:

# %%
inputs = run.preprocess([digit])
winner = jax.jit(lambda x: run.model.apply(run.variables, x, train=False).max())
gradient = jax.grad(winner)(inputs)
gradient.shape, float(abs(gradient).max())

# %% [markdown]
# ## Other steps, other weights
#
# Kept are the latest checkpoints and the best. `step="best"`, the default, asks the run's own
# record of evaluations; "latest" or a number choose otherwise. Where averages of the weights were
# kept they are used, unless `weights="raw"`.

# %%
steps = checkpoint.saved_steps(WORKDIR)
images = np.stack([held_out[index]["image"] for index in range(0, len(held_out), 10)])
labels = np.array([held_out[index]["label"] for index in range(0, len(held_out), 10)])
for step, weights in ((steps[0], "ema"), (steps[0], "raw"), ("latest", "raw")):
    chosen = halonet.load_run(WORKDIR, step, weights=weights)
    right = np.mean(chosen.predict(images).argmax(-1) == labels)
    print(f"step {chosen.step}, {weights}: {right:.0%} of {len(labels)} digits")

# %% [markdown]
# ## Other sizes
#
# A model takes images that its blocks divide: here multiples of 16 pixels. With `pad_to_blocks` it
# takes any size, and then `model.apply` wants arrays that are normalised but not cropped. Fields
# of the model are overridden when it is opened; another window resizes the relative tables by
# offset.

# %%
flexible = halonet.load_run(WORKDIR, pad_to_blocks=True)
tall = np.zeros((1, 50, 37, 3), np.float32)
flexible.model.apply(flexible.variables, tall, train=False).shape

# %%
wider = halonet.load_run(WORKDIR, halo_size=2)
print(f"halo 1: {np.mean(run.predict(images).argmax(-1) == labels):.0%}")
print(f"halo 2: {np.mean(wider.predict(images).argmax(-1) == labels):.0%}, without training for it")

# %% [markdown]
# ## Evaluation
#
# `evaluate_checkpoint` is `python main.py --mode=evaluate`. It scores each held-out example once
# and writes `evaluation.json` into the workdir: top-1 with its 95 % interval, calibration, hits of
# every class, and what was run: configuration, data, commit, versions.

# %%
result = evaluate.evaluate_checkpoint(config, WORKDIR)
low, high = result["top1_interval_95"]
print(f"top-1 {result['top1']:.1%}, between {low:.1%} and {high:.1%}")
json.loads((WORKDIR / "evaluation.json").read_text())["calibration_error"]

# %% [markdown]
# How often it is right against how sure it is. A short training with smoothed labels leaves a
# model less sure than it could be:

# %%
Image.open(WORKDIR / "reliability.png")

# %% [markdown]
# At another image size the digits keep their pixels and get wider margins. The result goes into a
# folder of its own, beside the run that it is of. Nobody trained this model to find small digits
# in the middle of much black:

# %%
larger = quick.get_config()
larger.data.image_size = 48
elsewhere = evaluate.evaluate_checkpoint(
    larger, "runs/notebooks/digits_48", checkpoint=str(WORKDIR)
)
print(f"top-1 {elsewhere['top1']:.1%} at 48 px, {result['top1']:.1%} at 32 px")
