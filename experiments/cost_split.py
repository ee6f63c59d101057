"""Where do the multiply-adds of a HaloNet go, and what do halos cost? Writes the tables of
docs/cost.md and draws docs/cost.png.

python -m experiments.cost_split

Nothing is computed but numbers of products, by `halonet.models.cost`: seconds, on anything.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

from matplotlib.figure import Figure

from halonet.models import VARIANTS, HaloNet, create_model
from halonet.models.card import markdown_table
from halonet.models.cost import MultiplyAdds, cost
from halonet.tpu_kernels import Shape, attention_layers

DOCS = pathlib.Path(__file__).parent.parent / "docs"
MODELS = (*(f"halonet_h{number}" for number in range(8)), "halonet50ts", "resnet50")
# Blocks and halos that 256 px allow: the last map has 8 pixels.
WINDOWS = ((8, 0), (8, 1), (8, 2), (8, 3), (8, 4), (4, 1), (4, 2), (4, 3))
COLORS = {
    "projections": "tab:gray",
    "content": "tab:red",
    "position": "gold",
    "value": "tab:orange",
    "convolution": "tab:blue",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of halo attention, its three projections in front, for one image.

    Attributes:
      shape: of the layer; queries, keys and values have its `channels`, and so has what enters.
    """

    shape: Shape

    @property
    def channels(self) -> int:
        return self.shape.heads * self.shape.d_k

    @property
    def pixels(self) -> int:
        return self.shape.side**2

    @property
    def window(self) -> int:
        """Keys of a query."""
        return (self.shape.block + 2 * self.shape.halo) ** 2

    @property
    def attention(self) -> MultiplyAdds:
        """Of queries with keys, tables and values, as `halonet.models.cost` counts them."""
        queries, shape = self.pixels // self.shape.stride**2, self.shape
        tables = 2 * (2 * (shape.block + 2 * shape.halo) - 1)
        return MultiplyAdds(
            content=queries * self.window * self.channels,
            position=queries * tables * self.channels,
            value=queries * self.window * shape.heads * shape.d_v,
        )

    def projections(self, *, haloed: bool) -> float:
        """Of queries, keys and values; `haloed`: keys and values of each window anew."""
        each = self.pixels * self.channels**2
        copies = self.window / self.shape.block**2 if haloed else 1
        return each / self.shape.stride**2 + 2 * each * copies

    @property
    def convolution(self) -> int:
        """A 3x3 convolution in its place."""
        return 9 * self.pixels * self.channels**2


def layers(name: str = "halonet_h1") -> list[Layer]:
    """The second layer of each stage, which does not halve its map."""
    found = attention_layers(create_model(name), VARIANTS[name].image_size)
    return [Layer(shape) for _, block, shape in found if block == 2]


def total(model: HaloNet, size: int) -> MultiplyAdds:
    """The multiply-adds of a whole model for an image of size x size pixels."""
    return sum((part.cost for part in cost(model, size, size)), MultiplyAdds())


def layer_table() -> str:
    """What stands where in one layer, in millions."""
    rows = []
    for stage, layer in enumerate(layers(), start=1):
        spent, side = layer.attention, layer.shape.side
        projected = layer.projections(haloed=False)
        numbers = (
            *(layer.projections(haloed=True), projected, spent.content, spent.position),
            *(spent.value, projected + spent.attention, layer.convolution),
        )
        millions = (f"{number / 1e6:,.1f}" for number in numbers)
        rows.append((stage, f"{side} x {side} x {layer.channels}", *millions))
    head = ("stage", "map", "q, k, v from windows", "q, k, v once", "content", "position", "value")
    return markdown_table([(*head, "layer", "3x3 convolution"), *rows], left=(0, 1))


def model_table() -> str:
    """What part of each model's multiply-adds is what, in percent."""
    rows = []
    for name in MODELS:
        size = VARIANTS[name].image_size
        spent = total(create_model(name), size)
        parts = (spent.projections, spent.content, spent.position, spent.value, spent.attention)
        shares = (f"{100 * part / spent.total:.1f}" for part in parts)
        rows.append((f"`{name}`", f"{size} px", f"{spent.total / 1e9:.2f}", *shares))
    head = ("model", "image", "in all, G", "projections, %", "content, %", "position, %")
    return markdown_table([(*head, "value, %", "attention, %"), *rows], left=(0,))


def window_table() -> str:
    """What another block or halo changes in H1, and another way of halving maps."""
    rows = []
    for block, halo in WINDOWS:
        model = create_model("halonet_h1", block_size=block, halo_size=halo)
        pooled = model.clone(downsample="pool")
        copies = (block + 2 * halo) ** 2 / block**2
        spent, other = total(model, 256), total(pooled, 256)
        numbers = (spent.total, spent.attention, other.total, other.attention)
        row = (block, halo, (block + 2 * halo) ** 2, f"{copies:.2f}")
        rows.append((*row, *(f"{number / 1e9:.2f}" for number in numbers)))
    head = ("block", "halo", "keys of a query", "windows / map", "in all, G", "attention, G")
    return markdown_table([(*head, "pooled: in all, G", "pooled: attention, G"), *rows], left=())


TABLES = {"layers": layer_table, "models": model_table, "windows": window_table}


def draw(path: pathlib.Path) -> None:
    """Draws the first two tables: a layer beside a convolution, and whole models."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    one, whole = figure.subplots(1, 2)

    ticks, labels = [], []
    for number, layer in enumerate(layers()):
        unit = layer.pixels * layer.channels**2
        spent = dataclasses.asdict(layer.attention)
        bars = (
            {**spent, "projections": layer.projections(haloed=True)},
            {**spent, "projections": layer.projections(haloed=False)},
            {"convolution": layer.convolution},
        )
        for place, parts in enumerate(bars):
            bottom = 0.0
            for part, color in COLORS.items():
                height = parts.get(part, 0) / unit
                one.bar(4 * number + place, height, 0.85, bottom, color=color)
                bottom += height
        ticks += [4 * number + place for place in range(3)]
        labels += "ABC"
        top = f"stage {number + 1}: C = {layer.channels}"
        one.text(4 * number + 1, 1.01, top, ha="center", transform=one.get_xaxis_transform())
    one.set_xticks(ticks, labels)
    one.set_xlabel("A: windows, then q, k, v   B: q, k, v, then windows   C: 3 × 3 convolution")
    one.set_ylabel("multiply-adds of a pixel, in C²")
    one.set_title("One layer of H1: block 8, halo 3", pad=20)

    for place, name in enumerate(MODELS):
        size = VARIANTS[name].image_size
        spent, left = total(create_model(name), size), 0.0
        for part, color in COLORS.items():
            if part != "convolution":
                width = 100 * getattr(spent, part) / spent.total
                whole.barh(place, width, 0.75, left, color=color)
                left += width
        whole.text(101, place, f"{spent.total / 1e9:.1f} G", va="center", fontsize=9)
    whole.set_yticks(range(len(MODELS)), MODELS)
    whole.invert_yaxis()
    whole.set(xlim=(0, 112), xticks=range(0, 101, 20), xlabel="share of the multiply-adds, %")
    whole.set_title("Whole models", pad=20)
    names = {**dict.fromkeys(COLORS), "projections": "products with weights"}
    names |= {"content": "queries × keys", "position": "queries × relative tables"}
    names |= {"value": "weights × values", "convolution": "3 × 3 convolution"}
    patches = [one.bar(0, 0, color=color) for color in COLORS.values()]
    figure.legend(
        patches, [names[part] for part in COLORS], loc="outside lower center", ncols=5, fontsize=9
    )
    figure.savefig(path, dpi=110)


def fill(page: str) -> str:
    """Puts the tables of today between the marks of a page."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
        filled = rf"\g<1>{table()}\g<2>"
        page, count = re.subn(pattern, filled, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the page has {count} places for the table '{name}'; it needs one")
    return page


def main() -> None:
    page = DOCS / "cost.md"
    page.write_text(fill(page.read_text()))
    draw(DOCS / "cost.png")
    print(f"wrote {page} and {DOCS / 'cost.png'}")


if __name__ == "__main__":
    main()
