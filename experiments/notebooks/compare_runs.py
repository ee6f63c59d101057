# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Compare two runs
#
# What does the halo do? Two runs differ in nothing but `model.halo_size`: in one the queries of a
# block see a ring of one pixel around it, in the other their block alone. Their curves, parameters
# and mistakes are laid side by side.

# %%
import math

import jax
import numpy as np
from PIL import Image

import halonet
from configs import quick
from halonet import evaluate, metrics, plots
from halonet.config import flatten
from halonet.train import train_and_evaluate

# %% [markdown]
# ## Two runs
#
# The first is that of [First steps](first_steps.md); what is there already is not trained again.
# Both see the same batches in the same order, since the data of a step depend on the seed and the
# step alone.

# %%
config = quick.get_config()
without = config.copy_and_resolve_references()
without.model.halo_size = 0
train_and_evaluate(config, "runs/notebooks/digits")
train_and_evaluate(without, "runs/notebooks/digits_without_halo")

runs = {
    "halo 1": halonet.load_run("runs/notebooks/digits"),
    "no halo": halonet.load_run("runs/notebooks/digits_without_halo"),
}
one, other = runs.values()
there, here = flatten(one.config), flatten(other.config)
{key: (there[key], here[key]) for key in there if there[key] != here[key]}

# %% [markdown]
# ## Parameters
#
# The relative tables have a row for each offset between a query and a key, so that only they
# differ:

# %%
for name, run in runs.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"]))
    table = run.variables["params"]["stage1_block1"]["attention"]["row_table"]
    print(f"{name}: {count:,} parameters, tables of {len(table)} rows")

# %% [markdown]
# ## Curves

# %%
rows = {name: metrics.read_metrics(run.workdir) for name, run in runs.items()}
plots.compared_curves(rows, "runs/notebooks/compared.png")
Image.open("runs/notebooks/compared.png")

# %% [markdown]
# ## Where they disagree
#
# All held-out digits, seen by both. Those that only one of them gets right are what tells the two
# apart; all others say nothing about which is better.

# %%
held_out = evaluate.open_split(config, "test")
images = np.stack([held_out[index]["image"] for index in range(len(held_out))])
labels = np.array([held_out[index]["label"] for index in range(len(held_out))])
answers = {name: run.predict(images).argmax(-1) for name, run in runs.items()}
right = {name: answer == labels for name, answer in answers.items()}
first, second = right.values()
for name, hits in right.items():
    print(f"{name}: {hits.mean():.1%}")
print(f"only with a halo: {(first & ~second).sum()}, only without: {(second & ~first).sum()}")

# %%
differing = np.flatnonzero(first != second)[:20]
with_halo, without_halo = answers.values()
plots.sheet(
    images[differing],
    [f"{labels[i]}: {with_halo[i]} | {without_halo[i]}" for i in differing],
    "runs/notebooks/disagreements.png",
    title="digit: with a halo | without",
)
Image.open("runs/notebooks/disagreements.png")

# %% [markdown]
# ## Is that chance?
#
# If the two were equally good, each of these digits would fall to either side like a coin. How
# probable is a split as uneven as this one (McNemar's test, exact)?

# %%
wins, losses = int((first & ~second).sum()), int((second & ~first).sum())
total, least = wins + losses, min(wins, losses)
tail = sum(math.comb(total, k) for k in range(least + 1)) / 2**total
print(f"{wins} to {losses}: p = {min(1.0, 2 * tail):.3g}")

# %% [markdown]
# This is about these two runs: their sampling of test digits, and nothing else. Another seed moves
# both, and what a halo is worth is the mean over seeds, with its spread, at a length of training
# that matters. Sweeps do that (`python -m experiments run NAME`).
