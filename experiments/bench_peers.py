"""How fast is HaloNet here, beside timm, kecam and lucidrains' layer, in one run?

    make bench                                      # in the environment of the peers
    python -m experiments.bench_peers [--quick] [--device=cpu|cuda] [--what=op,models] [--batch=8]
    python -m experiments.bench_peers --render=docs/bench_peers_cpu.json  # docs/speed.md's table

Measures the attention layer of H0 and H1 (projections and attention) and whole models at 256 px,
inference and a training step. The contestants take turns, A B C A B C ..., in one process: what
slows the machine slows all. A turn lasts at least a tenth of a second and its sample is the median
of its calls, so that neither a cold cache nor threads of the one before decide; the first round
warms up. A time is the median of a contestant's samples, a ratio that of two such medians. Writes
JSON with every sample, and a picture of the models beside it.
"""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shlex
import shutil
import statistics
import sys
import time

import jax
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments import contestants
from experiments.contestants import BASE, IMAGE_SIZE, OURS, Layer, Settings, is_ours, is_peer

WHAT = ("op", "models")
DEVICES = ("cpu", "cuda")
MODELS = ("halonet_h1", "halonet50ts", "resnet50")
LAYERS = {
    "stage 1, 64 x 64": Layer(side=64, channels=64, heads=4),
    "stage 2, 64 x 64, stride 2": Layer(side=64, channels=128, heads=8, stride=2),
    "stage 3, 16 x 16": Layer(side=16, channels=256, heads=8),
    "stage 4, 8 x 8": Layer(side=8, channels=512, heads=8),
}
TASKS = {"op": ("forward", "forward and backward"), "models": ("inference", "training step")}
PACKAGES = ("torch", "timm", "keras_cv_attention_models", "halonet_pytorch")
VERSIONS = ("jax", "jaxlib", "flax", "torch", "timm", "keras-cv-attention-models")
VERSIONS = (*VERSIONS, "halonet-pytorch", "numpy")

TURN = 0.1  # seconds
NOTES = (
    "Everything runs in one process, one contestant at a time, each with all cores: PyTorch's "
    "threads are as many as cores, and so are XLA's. PyTorch's sleep while they wait "
    "(OMP_WAIT_POLICY=PASSIVE, unless the environment says otherwise): where anything else runs, "
    "spinning multiplies its times.",
    "The layer has no projection of its output in any contestant. lucidrains' masks the border, "
    "the others take part in it as zeros; its layer cannot stride.",
    "ours takes offsets exactly and scales position logits, as the paper has it; timm's and "
    "kecam's convention for strides is another, of the same cost.",
    "A training step is forward, cross-entropy, backward and SGD with Nesterov momentum. Ours is "
    "the trainer's own: it also normalises uint8 images, counts hits and takes the gradient norm.",
    "ours halonet_h1 has a projection shortcut in each first block and 4 heads in stage 1; timm's "
    "has an identity and 8 heads, and `ours, timm's H1` computes exactly that one. kecam's takes "
    "ReLU as the others do.",
    "Memory is temporaries and results: by XLA's plan of ours, and at the peak of PyTorch's "
    "allocator, which does not see what a CPU kernel takes for itself.",
    "torch.compile is measured on a GPU, and with --compile on a CPU, there without gradients: "
    "PyTorch 2.13 crashes in the backward pass that it compiles for timm's attention.",
    "first_s is the first call, with tracing and compilation.",
)
# What each result holds, in this order.
COLUMNS = (
    *("what", "case", "task", "contestant", "parameters", "images", "ms", "quartiles_ms"),
    *("images_per_s", "ratio_to_timm", "ratio_to_best_peer", "memory_mb", "temporaries_mb"),
    *("first_s", "samples_ms"),
)


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def parse(arguments):
    """Reads the command line."""

    def names(known):
        def read(text):
            chosen = text.split(",")
            for name in chosen:
                if name not in known:
                    raise argparse.ArgumentTypeError(
                        f"{name!r} is unknown; the known ones are {', '.join(known)}"
                    )
            return tuple(name for name in known if name in chosen)

        return read

    def positive(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
        return int(text)

    parser = Parser(prog="python -m experiments.bench_peers", allow_abbrev=False)
    parser.add_argument(
        "--quick", action="store_true", help="shows that it runs: one layer, H1, two rounds of two"
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--what", type=names(WHAT), default=WHAT, help="op, models or both")
    parser.add_argument("--models", type=names(MODELS), default=MODELS, help=", ".join(MODELS))
    parser.add_argument("--rounds", type=positive, help="turns of each; 7, quick 2")
    parser.add_argument("--batch", type=positive, help="images at a time; 8, quick 2")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile too, on a CPU without gradients; needs g++",
    )
    parser.add_argument(
        "--out", help="JSON; a .png goes beside it; docs/bench_peers_DEVICE.json, quick nowhere"
    )
    parser.add_argument("--render", metavar="JSON", help="only print the table of docs/speed.md")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (2 if args.quick else 7)
    args.batch = args.batch or (2 if args.quick else 8)
    args.compile = args.compile or args.device == "cuda"
    if args.out is None and not args.quick:
        args.out = f"docs/bench_peers_{args.device}.json"
    return args


def plan(args):
    """What there is to compare: [(what, case, task, {contestant: function of Settings})]."""
    comparisons = []
    for what in args.what:
        cases = list(LAYERS) if what == "op" else list(args.models)
        for case in cases[:1] if args.quick else cases:
            for task in TASKS[what]:
                if what == "op":
                    makers = contestants.of_layer(LAYERS[case], task, args.device, args.compile)
                else:
                    makers = contestants.of_model(case, task, args.device, args.compile)
                comparisons.append((what, case, task, makers))
    return comparisons


def alternate(runs, rounds, clock=time.perf_counter, turn=TURN):
    """Times functions by turns.

    Args:
      runs: {name: function}, each called again and again for `turn` seconds, at least once, and
        then the next; so for one round that warms up, and for the `rounds`.
      clock: seconds.

    Returns:
      {name: samples}, in milliseconds, one a round: the median of the calls of a turn.
    """
    samples = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            calls, began = [], clock()
            while not calls or clock() - began < turn:
                start = clock()
                run()
                calls.append(1e3 * (clock() - start))
            if number > 0:
                samples[name].append(statistics.median(calls))
    return samples


def measure(makers, settings, rounds, progress):
    """Builds the contestants of one comparison and times them.

    Returns:
      {contestant: the columns of a result that are of itself}.
    """
    programs, results = {}, {}
    for name, make in makers.items():
        progress(f"{name}: first call")
        programs[name] = make(settings)
        start = time.perf_counter()
        programs[name].run()
        results[name] = {"first_s": round(time.perf_counter() - start, 2)}
    progress(f"{rounds} rounds of {len(programs)}")
    samples = alternate({name: program.run for name, program in programs.items()}, rounds)
    for name, program in programs.items():
        temporaries, memory = program.memory()
        results[name] |= {
            "parameters": program.parameters,
            "memory_mb": round(memory / 1e6, 1),
            "temporaries_mb": None if temporaries is None else round(temporaries / 1e6, 1),
            **summary(samples[name], settings.batch),
        }
    return results


def summary(samples, images):
    """The columns that follow from samples in milliseconds, of `images` images each."""
    median = statistics.median(samples)
    quartiles = statistics.quantiles(samples, method="inclusive") if samples[1:] else samples * 3
    return {
        "images": images,
        "ms": round(median, 3),
        "quartiles_ms": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "images_per_s": round(1e3 * images / median, 2),
        "samples_ms": [round(sample, 3) for sample in samples],
    }


def with_ratios(results):
    """Adds how many times as fast as timm, and as the fastest peer, each contestant is.

    Args:
      results: {contestant: {"ms": ...}}, of one comparison.
    """
    best = min(result["ms"] for name, result in results.items() if is_peer(name))
    for result in results.values():
        result["ratio_to_timm"] = round(results[BASE]["ms"] / result["ms"], 3)
        result["ratio_to_best_peer"] = round(best / result["ms"], 3)
    return results


def hardware(device):
    """What it was measured on."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        cpu = next((value.strip() for key, _, value in lines if key.strip() == "model name"), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "memory_gb": round(memory / 1e9, 1),
        "gpu": None,
    }
    found["cores"] = found["cores"] or os.cpu_count()
    if device == "cuda":
        found["gpu"] = jax.devices()[0].device_kind
    return found


def machine(record):
    """The machine of a record in a few words."""
    host = record["hardware"]
    return host["gpu"] or f"{host['cpu']}, {host['cores']} cores"


def header(args, arguments):
    """What a record says before its results."""
    import torch

    return {
        "question": "how fast is HaloNet here, beside timm, kecam and lucidrains' layer?",
        "command": shlex.join(["python", "-m", "experiments.bench_peers", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(args.device),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONS},
        },
        "settings": {
            "device": args.device,
            "precision": "float32" if args.device == "cpu" else "bfloat16 over float32 weights",
            "batch": args.batch,
            "image_size": IMAGE_SIZE,
            "rounds": args.rounds,
            "torch_threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        },
        "notes": list(NOTES),
    }


def rows(record):
    """The lines of the printed table."""
    lines = [
        f"{'':24s}{'contestant':30s}{'parameters':>11s}{'ms':>10s}{'quartiles':>19s}"
        f"{'images/s':>10s}{'x timm':>8s}{'x best peer':>12s}{'memory MB':>11s}{'first s':>9s}"
    ]
    before = None
    for result in record["results"]:
        title = f"{result['case']}: {result['task']}"
        if title != before:
            lines += ["", title]
            before = title
        low, high = result["quartiles_ms"]
        lines.append(
            f"{'':24s}{result['contestant']:30s}{result['parameters']:11,d}{result['ms']:10.2f}"
            f"{f'{low:.2f} - {high:.2f}':>19s}{result['images_per_s']:10.1f}"
            f"{result['ratio_to_timm']:8.2f}{result['ratio_to_best_peer']:12.2f}"
            f"{result['memory_mb']:11.1f}{result['first_s']:9.1f}"
        )
    return lines


def markdown(record):
    """The table of docs/speed.md: images per second of the models, a contestant a column."""
    models = [result for result in record["results"] if result["what"] == "models"]
    names = list(dict.fromkeys(result["contestant"] for result in models))
    cells = {(r["case"], r["task"], r["contestant"]): r for r in models}
    lines = [
        "| images/s | " + " | ".join(names) + " | ours / timm | ours / best peer |",
        "|---|" + "---:|" * (len(names) + 2),
    ]
    for case, task in dict.fromkeys((r["case"], r["task"]) for r in models):
        found = [cells.get((case, task, name)) for name in names]
        speeds = [f"{r['images_per_s']:.1f}" if r else "-" for r in found]
        ours = cells[case, task, OURS]
        ratios = [f"{ours[f'ratio_to_{peer}']:.2f}" for peer in ("timm", "best_peer")]
        lines.append(f"| `{case}`, {task} | " + " | ".join([*speeds, *ratios]) + " |")
    settings, versions = record["settings"], record["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"{machine(record)}; {settings['precision']}, {settings['image_size']} px, "
            f"{settings['batch']} images at a time; jax {versions['jax']}, "
            f"torch {versions['torch']}, timm {versions['timm']}; {record['date'][:10]}.",
        ]
    )


def draw(record, path):
    """Draws images per second of the models as a PNG, ours in colour."""
    models = [result for result in record["results"] if result["what"] == "models"]
    titles = list(dict.fromkeys((result["case"], result["task"]) for result in models))
    figure = Figure(figsize=(9, 1.2 + 0.26 * (len(models) + len(titles))), layout="constrained")
    axis = figure.subplots()
    place, places, labels = 0.0, [], []
    fastest = max(result["images_per_s"] for result in models)
    for title in titles:
        group = [result for result in models if (result["case"], result["task"]) == title]
        axis.text(0, place, f"{title[0]}: {title[1]}", fontweight="bold", va="center")
        for result in group:
            place -= 1
            ours, speed = is_ours(result["contestant"]), result["images_per_s"]
            axis.barh(place, speed, height=0.82, color="tab:orange" if ours else "0.72")
            ratio = f"  ({result['ratio_to_timm']:.2f} x timm)" if ours else ""
            axis.text(speed + 0.01 * fastest, place, f"{speed:.1f}{ratio}", va="center")
            places.append(place)
            labels.append(result["contestant"])
        place -= 1.5
    axis.set_yticks(places, labels)
    axis.set(xlabel="images/s", xlim=(0, 1.25 * fastest), ylim=(place + 0.7, 0.8))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.legend(
        handles=[Patch(color="tab:orange", label="ours"), Patch(color="0.72", label="peers")],
        loc="lower right",
        frameon=False,
    )
    settings = record["settings"]
    axis.set_title(
        f"{machine(record)}\n{settings['precision']}, {settings['image_size']} px, "
        f"{settings['batch']} images at a time"
    )
    figure.savefig(path, dpi=130)


def missing(args):
    """What has to be there and is not, in one line; or None."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed here; `make bench` has an environment with them"
    if args.compile and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler; there is no g++ or clang++ on the PATH"
    if args.out and not pathlib.Path(args.out).resolve().parent.is_dir():
        return f"--out={args.out}: there is no folder {pathlib.Path(args.out).parent}"
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return f"--device=cuda: torch {torch.__version__} sees no GPU"
        if jax.default_backend() != "gpu":
            return f"--device=cuda: jax sees no GPU (its backend is {jax.default_backend()})"
    return None


def show(text):
    """Says on standard error what is being measured: in place on a terminal."""
    live = sys.stderr.isatty()
    print(
        f"\r\033[K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True
    )


def refuse(problem):
    """Says what is wrong and returns the exit code of that."""
    print(f"error: {problem}", file=sys.stderr)
    return 2


def main(arguments):
    """Returns the exit code."""
    args = parse(arguments)
    if args.render:
        try:
            print(markdown(json.loads(pathlib.Path(args.render).read_text())))
        except OSError as error:
            return refuse(f"--render={args.render}: {error.strerror}")
        except (ValueError, KeyError):
            return refuse(f"--render={args.render} is no record of this benchmark")
        return 0
    # PyTorch's threads spin while they wait for each other, by default. With anything else on the
    # cores that costs it several times its time (a layer: 5 times the CPU time); asleep they lose
    # microseconds. Before PyTorch is loaded; the caller's own choice counts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    else:
        # PyTorch wants memory of the same GPU.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    problem = missing(args)
    if problem:
        return refuse(problem)
    began = time.perf_counter()
    comparisons = plan(args)
    settings = Settings(args.device, args.batch)
    record = {**header(args, arguments), "results": []}
    for number, (what, case, task, makers) in enumerate(comparisons, start=1):
        title = f"{number}/{len(comparisons)} {case}, {task}"
        measured = measure(
            makers, settings, args.rounds, lambda text, it=title: show(f"{it}: {text}")
        )
        for name, result in with_ratios(measured).items():
            result |= {"what": what, "case": case, "task": task, "contestant": name}
            record["results"].append({column: result[column] for column in COLUMNS})
        record["minutes"] = round((time.perf_counter() - began) / 60, 1)
        if args.out:  # what is measured stays, whatever comes of the next comparison
            pathlib.Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
        # The programs of this comparison are gone; their caches need not stay.
        jax.clear_caches()
        gc.collect()
    show("")
    print("\n".join(rows(record)))
    print(f"\n{machine(record)}; {record['minutes']} minutes")
    if args.out:
        print(f"wrote {args.out}")
        if "models" in args.what:
            picture = pathlib.Path(args.out).with_suffix(".png")
            draw(record, picture)
            print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
