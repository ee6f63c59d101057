"""Which array of timm's and MindCV's is which of ours, and how each is laid out.

One table of layers serves both peers and both directions: MindCV's names are timm's renamed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from halonet.models import VARIANTS, HaloNet, create_model


class WeightsError(ValueError):
    """A weight file that is damaged or of another model. The message is one line."""

    exit_code = 4


class UsageError(ValueError):
    """A command line that makes no sense. The message is one line."""

    exit_code = 2


# What a run may set otherwise than timm: neither the weights nor what evaluation makes of them
# depend on it.
FREE = (
    *("num_classes", "pad_to_blocks", "implementation", "bn_group", "dtype", "param_dtype"),
    *("remat", "drop_path", "dropout"),
)

# (ours, theirs, layout). A line counts where the model has that layer. Several of ours lie side by
# side in one of theirs; "norm" stands for the five arrays of a batch normalisation.
STEM = (
    ("stem_conv#/kernel", "conv.weight", "conv"),
    ("stem_bn#", "bn", "norm"),
)
BLOCK = (
    ("conv1/kernel", "conv1_1x1.conv.weight", "1x1"),
    ("bn1", "conv1_1x1.bn", "norm"),
    ("channel_attention/reduce/kernel", "attn.fc1.weight", "1x1"),
    ("channel_attention/reduce/bias", "attn.fc1.bias", "same"),
    ("channel_attention/expand/kernel", "attn.fc2.weight", "1x1"),
    ("channel_attention/expand/bias", "attn.fc2.bias", "same"),
    ("channel_attention/kernel", "attn.conv.weight", "conv1d"),
    ("conv3/kernel", "conv3_1x1.conv.weight", "1x1"),
    ("bn3", "conv3_1x1.bn", "norm"),
    ("shortcut_conv/kernel", "shortcut.conv.weight", "1x1"),
    ("shortcut_bn", "shortcut.bn", "norm"),
)
ATTENTION = (
    ("attention/row_table", "self_attn.pos_embed.height_rel", "same"),
    ("attention/col_table", "self_attn.pos_embed.width_rel", "same"),
    ("bn2", "post_attn", "norm"),
)
# What stands between the 1x1 convolutions of a block, by the letter of the plan.
MIDDLE = {
    "c": (
        ("conv2/kernel", "conv2_kxk.conv.weight", "conv"),
        ("bn2", "conv2_kxk.bn", "norm"),
    ),
    "h": (
        ("attention/query/kernel", "self_attn.q.weight", "1x1"),
        ("attention/key/kernel attention/value/kernel", "self_attn.kv.weight", "1x1 by head"),
        *ATTENTION,
    ),
    "b": (
        (
            "attention/query/kernel attention/key/kernel attention/value/kernel",
            "self_attn.qkv.weight",
            "1x1",
        ),
        *ATTENTION,
    ),
    "l": (
        (
            "lambda/query/kernel lambda/key/kernel lambda/value/kernel",
            "self_attn.qkv.weight",
            "1x1",
        ),
        ("lambda/query_bn", "self_attn.norm_q", "norm"),
        ("lambda/value_bn", "self_attn.norm_v", "norm"),
        ("lambda/position_kernel", "self_attn.conv_lambda.weight", "conv3d"),
        ("lambda/position_bias", "self_attn.conv_lambda.bias", "same"),
        ("bn2", "post_attn", "norm"),
    ),
}
HEAD = (
    ("final_conv/kernel", "final_conv.conv.weight", "1x1"),
    ("final_bn", "final_conv.bn", "norm"),
    ("head/kernel", "head.fc.weight", "dense"),
    ("head/bias", "head.fc.bias", "same"),
)
NORM = (
    ("params", "scale", "weight"),
    ("params", "bias", "bias"),
    ("batch_stats", "mean", "running_mean"),
    ("batch_stats", "var", "running_var"),
)
# The fifth: batches seen in training. Nothing of ours, but kept for the way back.
COUNT = "num_batches_tracked"

# From timm's keys to MindCV's, which has no counts.
MINDCV: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"^stages\.(\d+)\.", lambda found: f"stage{int(found[1]) + 1}.blocks."),
    (r"\.shortcut\.", ".creat_shortcut."),
    (r"\.post_attn\.", ".post_attn.bn."),
    (r"\.(height|width)_rel$", r".rel_\1"),
    (r"\.bn\.weight$", ".bn.gamma"),
    (r"\.bn\.bias$", ".bn.beta"),
    (r"\.running_mean$", ".moving_mean"),
    (r"\.running_var$", ".moving_variance"),
    (r"^head\.fc\.", "classifier.1."),
)

# (ours to theirs, theirs to ours) of the layouts that hold one array of ours.
LAYOUTS: dict[str, tuple[Callable, Callable]] = {
    "same": (lambda x: x, lambda x: x),
    "dense": (np.transpose, np.transpose),
    # (height, width, in, out) and (out, in, height, width)
    "conv": (lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0)),
    # (width,) and (1, 1, width)
    "conv1d": (lambda x: x[None, None], lambda x: x[0, 0]),
    # (height, width, out) and (out, 1, height, width, 1)
    "conv3d": (
        lambda x: x.transpose(2, 0, 1)[:, None, :, :, None],
        lambda x: x[:, 0, :, :, 0].transpose(1, 2, 0),
    ),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of theirs.

    Attributes:
      theirs: its key.
      ours: the paths of ours that it holds, "params/..." or "batch_stats/..."; none for a count.
      how: a key of `LAYOUTS`; "1x1", kernels (in, out) of ours as rows (out, in, 1, 1), one after
        another; "1x1 by head", the same within each head; or "count".
      shapes: of ours, in the same order.
      heads: of attention.
    """

    theirs: str
    ours: tuple[str, ...]
    how: str
    shapes: tuple[tuple[int, ...], ...]
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of theirs."""
        if self.how == "count":
            return ()
        return self.pack([np.broadcast_to(np.int8(0), shape) for shape in self.shapes]).shape

    def pack(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Ours to theirs."""
        if self.how in LAYOUTS:
            return LAYOUTS[self.how][0](*arrays)
        groups = self.heads if self.how == "1x1 by head" else 1
        inputs = arrays[0].shape[0]
        rows = np.concatenate([x.T.reshape(groups, -1, inputs) for x in arrays], axis=1)
        return rows.reshape(-1, inputs, 1, 1)

    def unpack(self, array: np.ndarray) -> list[np.ndarray]:
        """Theirs to ours."""
        if self.how in LAYOUTS:
            return [LAYOUTS[self.how][1](array)]
        groups = self.heads if self.how == "1x1 by head" else 1
        inputs = array.shape[1]
        ends = np.cumsum([outputs // groups for _, outputs in self.shapes])[:-1]
        parts = np.split(array.reshape(groups, -1, inputs), ends, axis=1)
        return [x.reshape(-1, inputs).T for x in parts]


def timm_entries(model: HaloNet) -> list[Entry]:
    """All arrays of timm's state dict of such a model.

    Raises:
      WeightsError: where the model has arrays that timm has no name for.
    """
    shapes = _shapes(model)
    entries = [entry for place in _places(model) for entry in _entries(shapes, *place)]
    unnamed = shapes.keys() - {path for entry in entries for path in entry.ours}
    if unnamed:
        raise WeightsError(f"timm has no name for {', '.join(sorted(unnamed))}")
    return entries


def mindcv_entries(model: HaloNet) -> list[Entry]:
    """All parameters of MindCV's checkpoint of such a model."""
    entries = []
    for entry in timm_entries(model):
        name = entry.theirs
        for pattern, replacement in MINDCV:
            name = re.sub(pattern, replacement, name)
        if entry.how != "count":
            entries.append(dataclasses.replace(entry, theirs=name))
    return entries


ENTRIES = {"timm": timm_entries, "mindcv": mindcv_entries}


def _places(model: HaloNet) -> Iterator[tuple]:
    """(lines of the table, prefix of ours, prefix of theirs, heads) for every part of a model."""
    # A stem of one convolution and no pooling is not a sequence in timm.
    lone = len(model.stem_widths) == 1 and model.stem_pool == "none"
    for number in range(1, len(model.stem_widths) + 1):
        lines = [(ours.replace("#", str(number)), *rest) for ours, *rest in STEM]
        yield lines, "", "stem." if lone else f"stem.conv{number}.", 1
    for stage, blocks in enumerate(model.stages()):
        for number, block in enumerate(blocks):
            lines = (*BLOCK, *MIDDLE[block.kind])
            ours, theirs = f"stage{stage + 1}_block{number + 1}/", f"stages.{stage}.{number}."
            yield lines, ours, theirs, block.heads
    yield HEAD, "", "", 1


def _entries(shapes, lines, ours: str, theirs: str, heads: int) -> Iterator[Entry]:
    """The lines that a model with such `shapes` has, under these prefixes."""
    for mine, key, how in lines:
        if how == "norm":
            if f"params/{ours}{mine}/scale" in shapes:
                for collection, leaf, their_leaf in NORM:
                    path = f"{collection}/{ours}{mine}/{leaf}"
                    name = f"{theirs}{key}.{their_leaf}"
                    yield Entry(name, (path,), "same", (shapes[path],), heads)
                yield Entry(f"{theirs}{key}.{COUNT}", (), "count", (), heads)
        else:
            paths = tuple(f"params/{ours}{path}" for path in mine.split())
            if all(path in shapes for path in paths):
                its = tuple(shapes[path] for path in paths)
                yield Entry(theirs + key, paths, how, its, heads)


def _shapes(model: HaloNet) -> dict[str, tuple[int, ...]]:
    """Path of each of our arrays -> its shape."""
    # Global attention, in the last stage, knows one size only.
    size = model.global_size * model.features[-1][0] or model.size_unit
    flat = traverse_util.flatten_dict(model.abstract_variables(size, size), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def to_variables(
    arrays: Mapping[str, np.ndarray], entries: Sequence[Entry], model: HaloNet
) -> tuple[dict[str, Any], dict[str, int]]:
    """Their arrays as our variables.

    float32 and float64 stay as they are; narrower floats become float32, which holds them exactly.

    Args:
      arrays: by key.
      entries: of the model.
      model: what the arrays shall fit.

    Returns:
      {"params", "batch_stats"}, and the counts of batches by their key, where there are any.

    Raises:
      WeightsError: one error that lists every missing, extra and misshapen key, and the registered
        models that the arrays do fit.
    """
    differing = _differences(arrays, entries)
    if differing:
        others = [
            name
            for name, variant in VARIANTS.items()
            if variant.origin in ENTRIES
            and not _differences(
                arrays, ENTRIES[variant.origin](create_model(name, num_classes=model.num_classes))
            )
        ]
        if others:
            differing.append(f"they fit {' and '.join(others)}")
        raise WeightsError("; ".join(differing))
    ours: dict[str, np.ndarray] = {}
    counts = {}
    for entry in entries:
        if entry.how != "count":
            parts = entry.unpack(_widened(arrays[entry.theirs]))
            ours.update(zip(entry.ours, parts, strict=True))
        elif entry.theirs in arrays:
            counts[entry.theirs] = int(arrays[entry.theirs])
    return traverse_util.unflatten_dict(ours, sep="/"), counts


def _differences(arrays: Mapping[str, np.ndarray], entries: Sequence[Entry]) -> list[str]:
    """Missing, extra and misshapen keys, one text for each kind that there is."""
    known = {entry.theirs: entry for entry in entries}
    missing = [key for key, entry in known.items() if key not in arrays and entry.how != "count"]
    extra = [f"{key} {list(array.shape)}" for key, array in arrays.items() if key not in known]
    misshapen = []
    for key in known.keys() & arrays.keys():
        found, wanted = arrays[key], known[key]
        name, kind = ("int", jnp.integer) if wanted.how == "count" else ("float", jnp.floating)
        if found.shape != wanted.shape or not jnp.issubdtype(found.dtype, kind):
            is_shape, shape = list(found.shape), list(wanted.shape)
            misshapen.append(f"{key} is {found.dtype}{is_shape}, not {name}{shape}")
    lists = {"missing": missing, "extra": extra, "misshapen": misshapen}
    return [f"{what}: {', '.join(sorted(keys))}" for what, keys in lists.items() if keys]


def _widened(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.itemsize >= 4 else array.astype(np.float32)


def from_variables(
    variables: Mapping[str, Any], entries: Sequence[Entry], counts: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Our variables as their arrays, by key and contiguous; counts that are not known are 0."""
    ours = traverse_util.flatten_dict(dict(variables), sep="/")
    theirs = {}
    for entry in entries:
        if entry.how == "count":
            theirs[entry.theirs] = np.array((counts or {}).get(entry.theirs, 0), np.int64)
        else:
            packed = entry.pack([np.asarray(ours[path]) for path in entry.ours])
            theirs[entry.theirs] = np.ascontiguousarray(packed)
    return theirs


def as_safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    """A state dict as the bytes of a .safetensors file that says, as timm's do, that it is one."""
    from safetensors.numpy import save

    return save(arrays, metadata={"format": "pt"})


def check_origin(model: str, kind: str) -> None:
    """Refuses models that `kind` does not have."""
    known = [name for name, variant in VARIANTS.items() if variant.origin == kind]
    if model not in known:
        near = [] if model in VARIANTS else difflib.get_close_matches(model, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}"
        raise UsageError(f"{model!r} is not one of {kind}'s models; {hint}")


def check_conventions(model: HaloNet, name: str) -> None:
    """Refuses a model that computes something else than the registered one of that name."""
    registered = create_model(name, num_classes=model.num_classes)
    fields = [f.name for f in dataclasses.fields(registered) if f.name not in (*FREE, "parent")]
    differing = [
        f"{field}={getattr(model, field)!r}"
        for field in fields
        if getattr(model, field) != getattr(registered, field)
    ]
    if differing:
        raise UsageError(f"timm's {name} cannot compute {', '.join(differing)}")
