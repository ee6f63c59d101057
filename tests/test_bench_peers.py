"""The benchmark's arithmetic, its order, its record and its refusals; all of it without PyTorch."""

import copy
import json
import pathlib
import shlex
import statistics

import pytest

from experiments import bench_peers, contestants
from halonet.models import VARIANTS, create_model
from halonet.ops import IMPLEMENTATIONS

ROOT = pathlib.Path(__file__).parent.parent
RECORDS = sorted(ROOT.glob("docs/bench_peers_*.json"))


class Clock:
    """Time that passes only while something runs."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def run(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds

        return run


def test_contestants_take_turns_and_the_first_round_is_not_counted():
    clock = Clock()
    runs = {name: clock.run(name, seconds) for name, seconds in {"a": 1, "b": 2, "c": 4}.items()}
    samples = bench_peers.alternate(runs, 2, clock=clock)
    assert clock.calls == ["a", "b", "c"] * 3
    assert samples == {"a": [1000] * 2, "b": [2000] * 2, "c": [4000] * 2}


def test_a_turn_lasts_and_its_sample_is_the_median_of_its_calls():
    clock, durations = Clock(), iter([1.0, 2.0, 4.0, 3.0, 5.0, 1.0])

    def run():
        clock.now += next(durations)

    # A turn of 6 seconds: 1 + 2 + 4 to warm up, then 3 + 5.
    assert bench_peers.alternate({"a": run}, 1, clock=clock, turn=6) == {"a": [4000]}


def test_the_columns_of_samples():
    found = bench_peers.summary([40.0, 10.0, 20.0, 30.0, 1000.0], images=6)
    assert (found["ms"], found["quartiles_ms"], found["images_per_s"]) == (30, [20, 40], 200)
    assert found["samples_ms"] == [40, 10, 20, 30, 1000]
    assert bench_peers.summary([5.0], images=1)["quartiles_ms"] == [5, 5]


def test_ratios_are_to_timm_and_to_the_fastest_peer():
    times = {"ours": 10, "ours, xla_rows": 5, "gather form in JAX": 1, "timm": 40, "kecam": 20}
    results = bench_peers.with_ratios({name: {"ms": ms} for name, ms in times.items()})
    assert results["ours"] == {"ms": 10, "ratio_to_timm": 4, "ratio_to_best_peer": 2}
    assert results["kecam"] == {"ms": 20, "ratio_to_timm": 2, "ratio_to_best_peer": 1}
    assert results["timm"]["ratio_to_best_peer"] == 0.5


def test_the_layers_are_those_of_h0_and_h1():
    for name in ("halonet_h0", "halonet_h1"):
        model, side, layers = create_model(name), 64, set()
        for block in (block for stage in model.stages() for block in stage):
            assert block.key_width == block.value_width == block.width
            layers.add((side, block.width, block.heads, block.stride, 8, 3))
            side //= block.stride
        assert (model.block_size, model.halo_size) == (8, 3)
        for layer in bench_peers.LAYERS.values():
            numbers = (layer.side, layer.channels, layer.heads, layer.stride)
            assert (*numbers, layer.block, layer.halo) in layers


def names_of(arguments):
    """{(case, task): names of the contestants} of a command line."""
    comparisons = bench_peers.plan(bench_peers.parse(arguments))
    return {(case, task): list(makers) for _, case, task, makers in comparisons}


def test_the_plan():
    names = names_of([])
    assert len(names) == 2 * (len(bench_peers.LAYERS) + len(bench_peers.MODELS))
    layer = names["stage 1, 64 x 64", "forward"]
    assert layer[:3] == ["ours", "ours, xla_shift", "ours, xla_rows"]
    assert layer[-4:] == ["timm", "timm, channels_last", "kecam", "lucidrains"]
    assert not any("reference" in name or "pallas" in name for name in layer)
    # Its layer has no stride.
    assert "lucidrains" not in names["stage 2, 64 x 64, stride 2", "forward"]
    h1 = ["ours", "ours, timm's H1", "timm", "timm, channels_last", "kecam"]
    assert names["halonet_h1", "training step"] == h1
    assert names["resnet50", "inference"] == ["ours", "timm", "timm, channels_last"]


@pytest.mark.parametrize(
    ("argument", "measured"),
    [("--compile", {"inference"}), ("--device=cuda", {"inference", "training step"})],
)
def test_torch_compile_is_measured_where_it_is_asked_for_and_on_a_gpu(argument, measured):
    compiled = ["timm, compiled", "timm, compiled, channels_last"]
    tasks = {"inference", "training step"}
    names = names_of([argument])
    assert {task for task in tasks if names["halonet50ts", task][-2:] == compiled} == measured
    assert not any(set(compiled) & set(found) for found in names_of([]).values())


def test_quick_is_small_and_writes_nothing():
    args = bench_peers.parse(["--quick"])
    assert (args.rounds, args.batch, args.out) == (2, 2, None)
    assert {case for case, _ in names_of(["--quick"])} == {"stage 1, 64 x 64", "halonet_h1"}
    args = bench_peers.parse(["--quick", "--rounds=3", "--batch=4", "--out=x.json"])
    assert (args.rounds, args.batch, args.out) == (3, 4, "x.json")
    assert bench_peers.parse(["--device=cuda"]).out == "docs/bench_peers_cuda.json"


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--what=op,layers", "argument --what: 'layers' is unknown; the known ones are op, models"),
        ("--models=halonet_h1,vgg", "'vgg' is unknown; the known ones are halonet_h1, halonet50ts"),
        ("--rounds=0", "argument --rounds: '0' is no positive whole number"),
        ("--batch=many", "argument --batch: 'many' is no positive whole number"),
        ("--device=tpu", "argument --device: invalid choice: 'tpu'"),
        ("--batches=8", "unrecognized arguments: --batches=8"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(argument, text, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_peers.parse([argument])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert text in error


def test_absent_peers_are_named_with_the_way_to_have_them(monkeypatch):
    monkeypatch.setattr(bench_peers, "PACKAGES", ("numpy", "no_such_package"))
    wrong = bench_peers.missing(bench_peers.parse([]))
    assert wrong == "no_such_package not installed here; `make bench` has an environment with them"


def test_what_is_absent_is_said_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(bench_peers, "PACKAGES", ())
    monkeypatch.setattr(bench_peers.shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in bench_peers.missing(bench_peers.parse(["--compile"]))
    wrong = bench_peers.missing(bench_peers.parse(["--out=/no/such/folder/x.json"]))
    assert wrong == "--out=/no/such/folder/x.json: there is no folder /no/such/folder"


def test_every_package_of_the_environment_is_looked_for():
    required = (ROOT / "tests" / "parity" / "requirements.txt").read_text().replace("-", "_")
    assert all(f"\n{name}==" in required for name in bench_peers.PACKAGES)


def made_up(arguments):
    """A record such as a run with these arguments writes; each contestant faster than the next."""
    args = bench_peers.parse(arguments)
    results = []
    for what, case, task, makers in bench_peers.plan(args):
        columns = {}
        for place, name in enumerate(makers, start=1):
            model = "timm_halonet_h1" if name == contestants.OURS_AS_TIMM else case
            columns[name] = {
                "what": what,
                "case": case,
                "task": task,
                "contestant": name,
                "parameters": VARIANTS[model].params if what == "models" else 12_960,
                "memory_mb": 20.5,
                "temporaries_mb": None,
                "first_s": 1.5,
                **bench_peers.summary([100.0 * place, 100.0 * place + 2], args.batch),
            }
        results += bench_peers.with_ratios(columns).values()
    command = shlex.join(["python", "-m", "experiments.bench_peers", *arguments])
    settings = {"device": "cpu", "precision": "float32", "batch": args.batch, "image_size": 256}
    return {
        "question": "?",
        "command": command,
        "date": "2026-01-02T03:04:05+00:00",
        "hardware": {"cpu": "A chip", "cores": 2, "memory_gb": 24.0, "gpu": None},
        "versions": dict.fromkeys(["python", *bench_peers.VERSIONS], "1.2.3"),
        "settings": {**settings, "rounds": 2, "torch_threads": 2, "omp_wait_policy": "PASSIVE"},
        "notes": list(bench_peers.NOTES),
        "results": [{column: r[column] for column in bench_peers.COLUMNS} for r in results],
        "minutes": 1.0,
    }


def misfits(record):
    """What in a record does not fit the script as it stands."""
    found = []
    arguments = shlex.split(record["command"])
    if arguments[:3] != ["python", "-m", "experiments.bench_peers"]:
        found.append(f"command {record['command']!r}")
    planned = names_of(arguments[3:])
    measured = {}
    for result in record["results"]:
        case, task, name = (result[key] for key in ("case", "task", "contestant"))
        measured.setdefault((case, task), []).append(name)
        if tuple(result) != bench_peers.COLUMNS:
            found.append(f"columns of {case}, {task}, {name}")
        if result["ms"] != round(statistics.median(result["samples_ms"]), 3):
            found.append(f"median of {case}, {task}, {name}")
        # Layers are no models.
        model = VARIANTS.get("timm_halonet_h1" if name == contestants.OURS_AS_TIMM else case)
        expected = model and contestants.is_ours(name)
        if expected and result["parameters"] != model.params:
            found.append(f"parameters of {case}, {task}, {name}")
    if list(measured) != list(planned):
        found.append("comparisons")
    for key, names in measured.items():
        # A new form of the op need not be measured at once; one that is gone has no place here.
        forms = {f"ours, {name}" for name in IMPLEMENTATIONS}
        if set(names) - forms != set(planned.get(key, ())) - forms:
            found.append(f"contestants of {', '.join(key)}")
    return found


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_the_record_fits_the_script(path):
    record = json.loads(path.read_text())
    assert misfits(record) == []
    assert list(record) == list(made_up([]))
    for key in ("settings", "versions", "hardware"):
        assert list(record[key]) == list(made_up([])[key])
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize("path", [path for path in RECORDS if path.stem.endswith("_cpu")])
def test_the_page_has_the_table_of_the_record(path):
    _, rest = (ROOT / "docs" / "speed.md").read_text().split("<!-- bench -->\n")
    table, _ = rest.split("\n<!-- end of bench -->")
    assert table == bench_peers.markdown(json.loads(path.read_text()))


def test_records_that_do_not_fit_are_found():
    right = made_up([])
    assert misfits(right) == []
    wrong = [copy.deepcopy(right) for _ in range(5)]
    for result in wrong[0]["results"]:
        result["case"] = result["case"].replace("resnet50", "resnet18")
    wrong[1]["results"][0].pop("first_s")
    wrong[2]["results"][0]["samples_ms"][0] += 50
    wrong[3]["results"][-3]["parameters"] += 1
    wrong[4]["results"][1]["contestant"] = "ours, xla_gone"
    assert [misfits(record)[0] for record in wrong] == [
        "comparisons",
        "columns of stage 1, 64 x 64, forward, ours",
        "median of stage 1, 64 x 64, forward, ours",
        "parameters of resnet50, training step, ours",
        "contestants of stage 1, 64 x 64, forward",
    ]


def test_the_printed_table():
    lines = bench_peers.rows(made_up(["--what=models", "--models=resnet50", "--batch=4"]))
    assert lines[0].split()[:4] == ["contestant", "parameters", "ms", "quartiles"]
    assert lines[2] == "resnet50: inference"
    # 4 images in 101 ms; timm takes 201.
    expected = "ours 25,557,032 101.00 100.50 - 101.50 39.6 1.99 1.99 20.5 1.5"
    assert lines[3].split() == expected.split()
    assert lines[7] == "resnet50: training step"
    assert len({len(line) for line in lines if line.startswith(" ")}) == 1


def test_the_table_of_the_page(tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(made_up(["--models=halonet_h1,resnet50"])))
    assert bench_peers.main([f"--render={path}"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == (
        "| images/s | ours | ours, timm's H1 | timm | timm, channels_last | kecam "
        "| ours / timm | ours / best peer |"
    )
    h1 = "| `halonet_h1`, inference | 79.2 | 39.8 | 26.6 | 19.9 | 16.0 | 2.98 | 2.98 |"
    assert table[2] == h1
    assert table[5].startswith("| `resnet50`, training step | 79.2 | - | 39.8 | 26.6 | - |")
    assert table[-1] == (
        "A chip, 2 cores; float32, 256 px, 8 images at a time; jax 1.2.3, torch 1.2.3, timm 1.2.3; "
        "2026-01-02."
    )


def test_a_file_that_is_no_record_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "record.json"
    for text, wrong in (
        (None, "No such file"),
        ("{", "no record"),
        ('{"results": []}', "no record"),
    ):
        if text is not None:
            path.write_text(text)
        assert bench_peers.main([f"--render={path}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert wrong in error


def test_the_picture_has_a_bar_for_every_model_and_contestant(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        bench_peers.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure)
    )
    record = made_up([])
    bench_peers.draw(record, tmp_path / "x.png")
    (axis,) = drawn[0].axes
    models = [result for result in record["results"] if result["what"] == "models"]
    assert [bar.get_width() for bar in axis.patches] == [r["images_per_s"] for r in models]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == [result["contestant"] for result in models]
    ours = {label for label, bar in zip(labels, axis.patches, strict=True) if is_coloured(bar)}
    assert ours == {"ours", "ours, timm's H1"}
    assert axis.get_title() == "A chip, 2 cores\nfloat32, 256 px, 8 images at a time"


def is_coloured(bar):
    red, green, blue, _ = bar.get_facecolor()
    return not red == green == blue
