"""How many images a second does a core prepare for training, beside timm's loader?

    PYTHONPATH=. .venv-peers/bin/python -m experiments.bench_input    # writes docs/bench_input.txt

The same JPEG files on disk, about 500x375 pixels and 60 kB, cut from scikit-learn's photographs:

    decode  a file to RGB pixels, in one process without a loader
    crop    a random resized crop (area 0.08 to 1, bilinear) to 256 pixels, flipped half the time
    recipe  as crop, then rand-m9-n2-mstd0.5-inc1 (bilinear) and erasing with the mean (0.25), as
            the MindCV recipe of halonet_50t has it

crop and recipe run through the whole loader, with the same number of worker processes, and end in
uint8 batches on both sides, which the devices normalise. timm erases there too, after that, and so
for nothing here; ours erases in its workers, and the time of that is counted.

Contestants take turns, so that a busy machine slows all alike. A turn begins when the batches made
ahead are taken. "a core" counts processor time: of the trainer, its workers and their threads. The
ratio is of that, ours to timm's in the same round, median over the rounds; "wall" is images a
second by the clock.

Last, the milliseconds of a core that an image takes us, part by part, in one process. The aim was a
ratio of 1.5 for the recipe. What stands in its way: both sides resize and move pixels in Pillow's C
and decode with libjpeg-turbo. Tried without enough gain: shear and translation in numpy, exact to
the last bit, take 0.6 to 0.85 of Pillow's time; tables and blends in numpy take as long as those of
Pillow; other codecs are no faster (docs/bench_decode.txt). Not taken: OpenCV, which resizes without
antialiasing and moves pixels in steps of 1/32, so that its images are others than timm's.

timm's Posterize, which asks Pillow for 0 bits at the largest magnitude and fails, is given black
there instead, which is what ours gives.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import logging
import os
import pathlib
import platform
import statistics
import tempfile
import time
import warnings

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from halonet.data import augment, decode, pipeline, views
from halonet.data.folder import FolderImages
from halonet.data.randaugment import RandAugment

SIZE, BATCH = 256, 32
# Each file has many names: a permutation of few numbers is slow in Grain, and no data set is small.
FILES, NAMES, BATCHES = 256, 64, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY = "rand-m9-n2-mstd0.5-inc1"
RECORD = pathlib.Path(__file__).parent.parent / "docs" / "bench_input.txt"

CROP = views.RandomView(views.CenterView(SIZE), min_area=0.08, flip=0.5)
RECIPE = views.RandomView(
    views.CenterView(SIZE),
    min_area=0.08,
    flip=0.5,
    rand_augment=RandAugment.parse(POLICY, interpolation="bilinear"),
    erasing=functools.partial(
        augment.random_erasing,
        probability=0.25,
        mean=MEAN,
        std=STD,
        area=(0.02, 0.33),
        aspect=(0.3, 3.3),
        fill="mean",
        attempts=1,
    ),
)


def write_files(folder: pathlib.Path) -> None:
    """JPEGs of 500x375 in two class folders, cut anywhere from both photographs."""
    rng = np.random.default_rng(0)
    for number in range(FILES):
        pixels = load_sample_images().images[number % 2]
        top, left = rng.integers(427 - 320), rng.integers(640 - 427)
        part = Image.fromarray(pixels[top : top + 320, left : left + 427])
        path = folder / "train" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.resize((500, 375), Image.Resampling.LANCZOS).save(path, quality=92)
        for name in range(1, NAMES):
            os.link(path, path.with_name(f"{number}-{name}.jpg"))


def our_loader(root: pathlib.Path, view: views.RandomView, workers: int):
    """Endless batches."""
    batches = pipeline.train_batches(
        FolderImages(root, "train"), batch_size=BATCH, seed=0, augment=view, workers=workers
    )
    for batch in batches:
        yield batch["image"]


def timm_loader(root: pathlib.Path, workers: int, *, recipe: bool):
    """Endless batches."""
    from experiments.contestants import import_timm

    timm = import_timm()
    import torch
    from timm.data import auto_augment

    torch.set_num_threads(1)
    posterize = auto_augment.posterize
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **kwargs: (
        posterize(image, bits) if bits else Image.new("RGB", image.size)
    )
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(root / "train")),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        scale=(0.08, 1.0),
        hflip=0.5,
        color_jitter=None,
        interpolation="bilinear",
        auto_augment=POLICY if recipe else None,
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=True,
    )
    while True:
        for batch, _ in loader.loader:  # what is around it belongs to the device
            yield batch


def processor_seconds() -> float:
    """Of this process and all below it, those that ended among the latter not."""
    parents, spent = {}, {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            parents[int(entry.name)] = int(fields[1])
            spent[int(entry.name)] = int(fields[11]) + int(fields[12])
    mine = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(spent[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")


def settle() -> None:
    """Waits until nobody below works ahead any more."""
    before = processor_seconds()
    while True:
        time.sleep(0.3)
        now = processor_seconds()
        if now - before < 0.03:
            return
        before = now


def take_turn(loader, workers: int) -> tuple[float, float]:
    """Seconds an image: of the processor, by the clock."""
    settle()
    for _ in range(2 * workers + 1):  # what was made ahead
        next(loader)
    began, spent = time.perf_counter(), processor_seconds()
    for _ in range(BATCHES):
        next(loader)
    images = BATCHES * BATCH
    return (processor_seconds() - spent) / images, (time.perf_counter() - began) / images


def decode_turn(read, files: list[pathlib.Path]) -> tuple[float, float]:
    """As `take_turn`, of a function of a path."""
    began, spent = time.perf_counter(), time.process_time()
    for path in files:
        read(path)
    return (
        (time.process_time() - spent) / len(files),
        (time.perf_counter() - began) / len(files),
    )


def timm_read(path: pathlib.Path) -> Image.Image:
    """As timm's ImageDataset opens files."""
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def contests(root: pathlib.Path, workers: int) -> dict[str, dict]:
    """task: {contestant: what takes a turn}."""
    files = [root / "train" / str(number % 2) / f"{number}.jpg" for number in range(FILES)]
    found = {
        "parts": {
            name: functools.partial(decode_turn, part, files) for name, part in parts().items()
        },
        "decode": {
            "timm": functools.partial(decode_turn, timm_read, files),
            "ours": functools.partial(
                decode_turn, lambda path: decode.decode(path.read_bytes()), files
            ),
        },
    }
    for task, view in (("crop", CROP), ("recipe", RECIPE)):
        found[task] = {
            name: functools.partial(take_turn, loader, workers)
            for name, loader in (
                ("timm", timm_loader(root, workers, recipe=task == "recipe")),
                ("ours", our_loader(root, view, workers)),
            )
        }
    return found


def parts() -> dict[str, functools.partial]:
    """What is done to a file, each with one thing more than the one before."""
    plain = dataclasses.replace(RECIPE, flip=0.0, rand_augment=None, erasing=None)
    augmented = dataclasses.replace(RECIPE, erasing=None)
    rng = np.random.default_rng(0)
    return {
        "read": pathlib.Path.read_bytes,
        "decode": lambda path: decode.decode(path.read_bytes()),
        "crop and resize": lambda path: plain(path.read_bytes(), rng),
        "flip and RandAugment": lambda path: augmented(path.read_bytes(), rng),
        "erase": lambda path: RECIPE(path.read_bytes(), rng),
    }


def measure(contest: dict, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """contestant: its turns; one more than asked for, the first, is left out."""
    turns = {name: [] for name in contest}
    for number in range(rounds + 1):
        for name, turn in contest.items():
            seconds = turn()
            if number:
                turns[name].append(seconds)
    return turns


def report(root: pathlib.Path, workers: int, rounds: int):
    """Yields the lines of the record."""
    yield __doc__.splitlines()[0]
    yield f"date     {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {rounds} rounds"
    yield f"machine  {os.cpu_count()} cores, {platform.machine()}, {platform.python_version()}"
    packages = ("timm", "torch", "pillow", "simplejpeg", "numpy")
    yield "versions " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    sizes = [path.stat().st_size / 1000 for path in root.rglob("*.jpg")]
    yield f"files    {len(sizes):,} of 500x375, {statistics.mean(sizes):.0f} kB on average"
    yield f"loaders  {workers} workers, batches of {BATCH}, turns of {BATCHES} batches"
    yield ""
    yield f"{'task':8}{'contestant':12}{'images/s a core':>16}{'wall':>7}{'ratio':>7}"
    tasks = contests(root, workers)
    turns_of_parts = measure(tasks.pop("parts"), rounds)
    for task, contest in tasks.items():
        turns = measure(contest, rounds)
        for name, seconds in turns.items():
            core, wall = (1 / statistics.median(column) for column in zip(*seconds, strict=True))
            ratio = statistics.median(
                base[0] / own[0] for base, own in zip(turns["timm"], seconds, strict=True)
            )
            yield f"{task:8}{name:12}{core:16.0f}{wall:7.0f}{ratio:7.2f}"

    yield ""
    before = 0.0
    for name, seconds in turns_of_parts.items():
        spent = 1000 * statistics.median(core for core, _ in seconds)
        yield f"{name:22}{spent - before:6.2f} ms"
        before = spent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant")
    parser.add_argument("--out", type=pathlib.Path, default=RECORD)
    arguments = parser.parse_args()
    # timm's workers fork; Grain has imported JAX, which warns of it, but started nothing.
    warnings.filterwarnings("ignore", message=".*fork.*")
    logging.getLogger("timm").setLevel(logging.ERROR)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_files(root)
        for line in report(root, arguments.workers, arguments.rounds):
            print(line, flush=True)
            lines.append(line)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
