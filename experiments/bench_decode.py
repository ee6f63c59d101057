"""Which codec gives JPEGs to training fastest, and what is that worth on the whole?

    python -m experiments.bench_decode [--rounds=40]

Tasks, on JPEGs made from scikit-learn's two photographs (baseline, 4:2:0):

    decode   all of 500x375 to an RGB array
    crop     500x375: draw a random resized crop, decode, cut, resize to 224 pixels with Pillow
    photo    as crop, from 2560x1920, where reducing while decoding counts

Codecs take turns, eight images a turn, so that a busy machine slows all alike. Printed are images
per second of a core (the processor's time of all threads of the process, by the median turn); the
ratio to Pillow, the median over the rounds; and whether other threads of Python run meanwhile.
Every codec uses the accurate transform and smooth upsampling, and reduces by 2, 4 or 8 while
decoding where the crop keeps 224 pixels. Pillow crops and resizes in its own memory. "ours" is
halonet.data.decode with all its checks.

What is not installed is said to be so; the rest come by `pip install opencv-python-headless pyvips
pyvips-binary imagecodecs`. The saved run is docs/bench_decode.txt.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import io
import itertools
import os
import platform
import statistics
import time

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from halonet.data import augment, decode

SIZE = 224
SCALES = (8, 4, 2, 1)


def photographs(height: int, width: int) -> list[bytes]:
    """Eight JPEGs of this size: overlapping quarters of both photographs, resized."""
    files = []
    for pixels in load_sample_images().images:
        for top, left in itertools.product((0, 107), (0, 213)):  # of 427 x 640
            file = io.BytesIO()
            quarter = Image.fromarray(pixels[top : top + 320, left : left + 427])
            quarter.resize((width, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=94)
            files.append(file.getvalue())
    return files


def pillow():
    def read(encoded, scale):
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft("RGB", (image.width // scale, image.height // scale))
            return np.asarray(image)

    return read


def simplejpeg():
    import simplejpeg

    def read(encoded, scale):
        if scale == 1:
            return simplejpeg.decode_jpeg(encoded)
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
        return simplejpeg.decode_jpeg(
            encoded, min_height=-(-height // scale), min_width=-(-width // scale)
        )

    return read


def opencv():
    import cv2

    cv2.setNumThreads(1)
    reduced = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }

    def read(encoded, scale):
        if scale == 1:
            how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            return cv2.imdecode(np.frombuffer(encoded, np.uint8), how)
        how = reduced[scale] | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), how)
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    return read


def pyvips():
    import pyvips

    pyvips.cache_set_max(0)

    def read(encoded, scale):
        return pyvips.Image.jpegload_buffer(encoded, shrink=scale, access="sequential").numpy()

    return read


def imagecodecs():
    import imagecodecs

    def read(encoded, scale):
        pixels = imagecodecs.jpeg8_decode(encoded)
        return pixels[::scale, ::scale]  # it cannot reduce: this only stands for the time

    return read


CODECS = {
    "Pillow": (pillow, "pillow"),
    "simplejpeg": (simplejpeg, "simplejpeg"),
    "OpenCV": (opencv, "opencv-python-headless"),
    "pyvips": (pyvips, "pyvips-binary"),
    "imagecodecs": (imagecodecs, "imagecodecs"),
}


def pillow_crop(encoded, box, scale):
    top, left, height, width = (side / scale for side in box)
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("RGB", (image.width // scale, image.height // scale))
        inside = image.crop((int(left), int(top), int(left + width), int(top + height)))
        return np.asarray(inside.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def codec_crop(read):
    """The same through an array, which is what codecs other than Pillow give."""

    def crop(encoded, box, scale):
        top, left, height, width = (side / scale for side in box)
        image = read(encoded, scale)
        inside = image[int(top) : int(top + height), int(left) : int(left + width)]
        picture = Image.fromarray(np.ascontiguousarray(inside))
        return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    return crop


def our_crop(encoded, box, scale):
    crop = decode.decode_crop(encoded, box, SIZE)
    top, left, height, width = crop.box
    picture = Image.fromarray(np.ascontiguousarray(crop.image))
    sides = (left, top, left + width, top + height)
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=sides))


def random_crop(crop):
    """What training does to an image, from its bytes on."""

    def work(encoded, rng):
        box = augment.random_crop_box(*decode.image_size(encoded), rng)
        scale = next(s for s in SCALES if s == 1 or min(box[2:]) // s >= SIZE)
        return crop(encoded, box, scale)

    return work


def contestants():
    """name: (read, crop) of what is installed, and name: version or what is missing of all."""
    found, versions = {}, {}
    for name, (make, package) in CODECS.items():
        try:
            read = make()
        except ImportError:
            versions[name] = "not installed"
            continue
        versions[name] = importlib.metadata.version(package)
        found[name] = (read, pillow_crop if name == "Pillow" else codec_crop(read))
    found["ours"] = (lambda encoded, scale: decode.decode(encoded), our_crop)
    return found, versions


def measure(works, files, rounds):
    """Seconds of the processor for each turn: {name: [...]}, each turn over all files."""
    taken = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            rng = np.random.default_rng(turn)  # the same boxes for all
            start = time.process_time()
            for encoded in files:
                work(encoded, rng)
            if turn > 0:  # the first warms up
                taken[name].append(time.process_time() - start)
    return taken


def frees_the_lock(read, encoded):
    """Whether Python goes on in one thread while another decodes.

    Told by the longest pause of a counting thread as a part of the time that decoding takes, which
    a busy machine can only lengthen: hence the shortest of ten.
    """

    def longest_pause():
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            start = last = time.perf_counter()
            longest, done = 0.0, pool.submit(read, encoded, 1)
            while not done.done():
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
        return longest / (time.perf_counter() - start)

    return min(longest_pause() for _ in range(10)) < 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="turns of each; a quarter for photo")
    runs = parser.parse_args().rounds
    found, versions = contestants()
    small, large = photographs(375, 500), photographs(1920, 2560)
    print(__doc__.splitlines()[0])
    print(f"date     {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {runs} rounds")
    print(
        f"machine  {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    )
    for side, files in (("500x375", small), ("2560x1920", large)):
        sizes = [len(file) / 1000 for file in files]
        print(
            f"files    {side}: {min(sizes):.0f} to {max(sizes):.0f} kB, "
            f"{statistics.mean(sizes):.0f} on average"
        )
    print(f"\n{'task':8}{'codec':14}{'version':16}{'images/s':>9}{'ratio':>7}  frees the lock")
    free = {
        name: "yes" if frees_the_lock(read, large[0]) else "no" for name, (read, _) in found.items()
    }
    decodes = {
        name: lambda encoded, rng, read=read: read(encoded, 1) for name, (read, _) in found.items()
    }
    crops = {name: random_crop(crop) for name, (_, crop) in found.items()}
    for task, works, files, rounds in (
        ("decode", decodes, small, runs),
        ("crop", crops, small, runs),
        ("photo", crops, large[::4], max(1, runs // 4)),
    ):
        taken = measure(works, files, rounds)
        for name in (*versions, "ours"):
            if name not in taken:
                print(f"{task:8}{name:14}{versions[name]}")
                continue
            ratios = [a / b for a, b in zip(taken["Pillow"], taken[name], strict=True)]
            print(
                f"{task:8}{name:14}{versions.get(name, ''):16}"
                f"{len(files) / statistics.median(taken[name]):9.0f}"
                f"{statistics.median(ratios):7.2f}  {free[name]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
