"""What is launched is what main.py would get, and restarts follow from exit codes."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from halonet import aot, runtime
from launch import TARGETS, LaunchError, Run, load_runs, render, targets
from launch.__main__ import main
from tests import jobset_schema

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "launch"
# ml_collections loads config files by an older way of importlib.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

H4 = Run(
    name="h4",
    config="configs/imagenet.py:halonet_h4",
    workdir="gs://bucket/runs/h4",
    topology="v5e:8x8",
    overrides={"data.data_dir": "/data", "data.workers": 16},
)
# What shells, YAML and Kubernetes would each make something else of.
AWKWARD = Run(
    name="on",
    config="configs/mnist.py",
    workdir='gs://bucket/it\'s "here" $HOME $(HOME) $$(HOME) `id` \\ #? é',
    topology="v5e:2x2",
    overrides={
        "data.mean": (0.5, 0.25, 1e-3),
        "data.train_split": "train[:99%]",
        "data.name": "a b; c && d | 'e' !",
        "augment.flip": True,
        "init.skip": "",
        "optim.weight_decay": 8e-5,
    },
)
SETTINGS = {
    "jobset": {"image": "us-docker.pkg.dev/p/r/halonet:1", "data_bucket": "imagenet", "spot": True},
    "gcloud": {"project": "p", "zone": "us-west4-a", "data_bucket": "imagenet", "spot": True},
    "slurm": {"time": "1-00:00:00", "partition": "gpu"},
}
NEEDED = {
    "jobset": {"image": "i"},
    "gcloud": {"project": "p", "zone": "z"},
    "slurm": {"time": "60"},
}


def on(target, run):
    """The same run where the target can have it."""
    if target != "slurm":
        return run
    return dataclasses.replace(run, topology="gpu:2x8", workdir=run.workdir.replace("gs:/", ""))


def rendered(target, run, **settings):
    ((name, text),) = render([on(target, run)], target, **(settings or NEEDED[target])).items()
    return name, text


@pytest.mark.parametrize("target", TARGETS)
def test_the_files_are_as_recorded(target):
    """`python -m tests.test_launch` records them anew."""
    name, text = rendered(target, H4, **SETTINGS[target])
    assert text == (GOLDEN / name).read_text()


@pytest.mark.parametrize("target", ["gcloud", "slurm"])
@pytest.mark.parametrize("settings", [SETTINGS, NEEDED], ids=["all", "few"])
def test_scripts_are_bash(target, settings):
    for run in (H4, AWKWARD):
        _, text = rendered(target, run, **settings[target])
        assert "#?" not in text.replace("#? é", "")
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("settings", [SETTINGS, NEEDED], ids=["all", "few"])
@pytest.mark.parametrize("run", [H4, AWKWARD], ids=lambda it: it.name)
def test_a_jobset_follows_the_schema_of_its_api(run, settings):
    document = yaml.safe_load(rendered("jobset", run, **settings["jobset"])[1])
    assert document["metadata"]["name"] == run.name
    schema = json.loads(jobset_schema.PATH.read_text())
    assert jobset_schema.problems(schema, document) == []


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("spec.failurePolicy.maxRestart", 1, "unknown maxRestart"),
        ("spec.failurePolicy.maxRestarts", "20", "'20' is no integer"),
        ("spec.failurePolicy.restartStrategy", "Blocking", "is none of"),
        ("spec.replicatedJobs.0.template.spec.parallelism", None, "None is no integer"),
        ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.action", True, "no string"),
        ("metadata", [], "[] is no object"),
        ("spec.replicatedJobs.0", {}, "no name"),
    ],
)
def test_the_schema_can_refuse(path, value, problem):
    document = yaml.safe_load(rendered("jobset", H4)[1])
    *groups, name = [int(it) if it.isdigit() else it for it in path.split(".")]
    inner = document
    for group in groups:
        inner = inner[group]
    inner[name] = value
    found = jobset_schema.problems(json.loads(jobset_schema.PATH.read_text()), document)
    assert any(problem in line for line in found), found


def test_a_pod_gets_every_flag_as_it_is():
    def as_kubernetes(text):
        """$(NAME) of an environment, $$ a dollar."""
        return re.sub(r"\$\$|\$\((\w+)\)", lambda it: "$" if it[0] == "$$" else "lost", text)

    document = yaml.safe_load(rendered("jobset", AWKWARD)[1])
    (job,) = document["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    command = [as_kubernetes(it) for it in container["command"]]
    assert command == ["python", "main.py", *AWKWARD.flags]


def test_exit_codes_are_those_of_main():
    assert targets.PREEMPTED == runtime.PREEMPTED
    spec = yaml.safe_load(rendered("jobset", H4)[1])["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    codes = rules[1]["onExitCodes"]["values"]
    assert codes == [75, 2, 3, 5, 7]
    # What Kubernetes says then, and which rule JobSet takes.
    said = "Container train for pod p/h4-slice-0-3-x failed with exit code {} matching FailJob rule"
    actions = [
        next(
            rule["action"]
            for rule in spec["failurePolicy"]["rules"]
            if any(
                re.search(it, said.format(code))
                for it in rule.get("onJobFailureMessagePatterns", [""])
            )
        )
        for code in codes
    ]
    assert actions == ["RestartJobSetAndIgnoreMaxRestarts"] + 4 * ["FailJobSet"]


FAKE = """#!{python} -S
import json, os, pathlib, sys
here = pathlib.Path({here!r})
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with (here / "calls").open("a") as file:
    file.write(json.dumps([name, *arguments]) + "\\n")
if name == "curl":
    print({{"agent-worker-number": "3", "worker-network-endpoints": "a:0:10.0.0.2,b:1:10.0.0.3"}}
          [arguments[-1].rpartition("/")[2]])
elif name == "gcloud" and arguments[3] == "describe":
    print((here / "state").read_text())
elif name == "gcloud" and arguments[3] == "create":
    (here / "state").write_text("READY")
elif name == "gcloud" and arguments[3] == "ssh" and "python" in arguments[-3]:
    command = next(it for it in arguments if it.startswith("--command="))
    sys.exit(os.waitstatus_to_exitcode(os.spawnlp(
        os.P_WAIT, "bash", "bash", "-c", command.removeprefix("--command=")) << 8))
elif name in ("python", "srun"):
    codes = (here / "codes").read_text().split()
    (here / "codes").write_text(" ".join(codes[1:]))
    print("start", flush=True)
    sys.exit(int(codes[0]))
"""


@pytest.fixture
def cluster(tmp_path):
    """Runs a script where gcloud, srun and so on write down what they were called with.

    What the run ends with, start by start, are the codes; `calls` is what was called by whom.
    """
    (tmp_path / "bin").mkdir()
    for name in ("curl", "gcloud", "git", "gcsfuse", "mountpoint", "python", "scontrol", "srun"):
        path = tmp_path / "bin" / name
        path.write_text(FAKE.format(python=sys.executable, here=str(tmp_path)))
        path.chmod(0o755)
    sleep = tmp_path / "bin" / "sleep"
    sleep.write_text("#!/bin/sh\n")
    sleep.chmod(0o755)
    (tmp_path / "state").write_text("READY")

    def run(text, *codes):
        (tmp_path / "codes").write_text(" ".join(map(str, codes)))
        home = tmp_path / "home"
        (home / "halonet-" / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        python = home / "halonet-" / ".venv" / "bin" / "python"
        python.unlink(missing_ok=True)
        python.symlink_to(tmp_path / "bin" / "python")
        done = subprocess.run(
            ["bash"],
            input=text.replace("/tmp/", f"{tmp_path}/"),
            cwd=home,
            env={
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "HOME": str(home),
                "SLURM_SUBMIT_DIR": str(home),
                "SLURM_JOB_ID": "17",
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        (tmp_path / "calls").unlink()
        return done, calls

    return run


def of(calls, name):
    return [arguments for it, *arguments in calls if it == name]


@pytest.mark.parametrize(
    ("codes", "ends", "starts", "requeued"),
    [
        ([0], 0, 1, []),
        ([75], 0, 1, [["requeue", "17"]]),
        *(([code], code, 1, []) for code in (2, 3, 5, 7)),
        ([134, 6, 0], 0, 3, []),
        ([1, 1, 1], 1, 3, []),
        ([1, 3], 3, 2, []),
    ],
)
def test_slurm_starts_again_what_a_restart_can_cure(cluster, codes, ends, starts, requeued):
    _, text = rendered("slurm", AWKWARD, **NEEDED["slurm"], max_restarts=2)
    done, calls = cluster(text, *codes)
    assert done.returncode == ends, done.stderr
    command = ["--kill-on-bad-exit=1", ".venv/bin/python", "main.py", *on("slurm", AWKWARD).flags]
    assert of(calls, "srun") == starts * [command]
    assert of(calls, "scontrol") == requeued


def test_slurm_keeps_the_shell_alive_while_processes_save(tmp_path):
    """SIGTERM to the shell is not passed on, and the exit code of the processes counts."""
    _, text = rendered("slurm", H4)
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nkill -TERM "$PPID"; sleep 0.2; exit 75\n')
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@"\n')
    for path in (srun, scontrol):
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(
        ["bash"],
        input=text,
        env={**environment, "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "requeue 17\n"), done.stderr


@pytest.mark.parametrize(
    ("codes", "ends", "starts"),
    [([75, 6, 0], 0, 3), ([2], 2, 1), ([6, 134], 134, 2)],
)
def test_gcloud_starts_again_what_a_restart_can_cure(cluster, codes, ends, starts):
    run = dataclasses.replace(AWKWARD, topology="v5e:4x4")
    _, text = rendered("gcloud", run, **NEEDED["gcloud"], max_restarts=1)
    done, calls = cluster(text, *codes)
    assert done.returncode == ends, done.stderr
    found = [
        *("--distributed.coordinator=10.0.0.2:8476", "--distributed.process_id=3"),
        "--distributed.process_count=4",
    ]
    assert of(calls, "python") == starts * [["-u", "main.py", *run.flags, *found]]
    assert done.stdout.count("start\n") == starts


@pytest.mark.parametrize("state", ["PREEMPTED", ""])
def test_gcloud_makes_the_slice_anew(cluster, tmp_path, state):
    (tmp_path / "state").write_text(state)
    done, calls = cluster(rendered("gcloud", AWKWARD, **SETTINGS["gcloud"])[1], 0)
    assert done.returncode == 0, done.stderr
    verbs = [arguments[3] for arguments in of(calls, "gcloud")]
    assert verbs == ["describe", *(["delete"] if state else []), "create", "ssh", "ssh"]
    create = next(it for it in of(calls, "gcloud") if it[3] == "create")
    assert create[4:] == [
        *("on", "--type=v5litepod", "--topology=2x2", "--version=v2-alpha-tpuv5-lite", "--spot"),
        *("--quiet", "--project=p", "--zone=us-west4-a"),
    ]
    # One host has nobody to find.
    assert of(calls, "python") == [["-u", "main.py", *AWKWARD.flags]]


def test_what_can_be_launched_can_be_planned():
    for generation, tpu in targets.TPUS.items():
        assert set(tpu.shapes) <= set(aot.CHIPS[generation].shapes)


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("jobset", {"name": "H4"}, "name 'H4' must have lower-case letters, digits and dashes"),
        ("jobset", {"name": "h4-"}, "name 'h4-' must"),
        ("jobset", {"name": "4h"}, "name '4h' must"),
        ("jobset", {"name": "h" * 41}, "of 40 characters at most"),
        ("jobset", {"name": 4}, "name 4 of a run is no text"),
        ("jobset", {"workdir": "/tmp/h4"}, "run 'h4': workdir '/tmp/h4' is not what all hosts see"),
        ("gcloud", {"workdir": "runs/h4"}, "take gs://BUCKET/..."),
        ("slurm", {"workdir": "/tmp/h4"}, "workdir '/tmp/h4' is not what all nodes see"),
        ("slurm", {"workdir": "runs/h4"}, "take an absolute path on a shared file system"),
        ("jobset", {"topology": "v5e:8x9"}, "no TPU slice 'v5e:8x9'; there are v4: 2x2x1, 2x2x2"),
        ("gcloud", {"topology": "gpu:1x8"}, "no TPU slice 'gpu:1x8'"),
        ("slurm", {"topology": "v5e:8x8"}, "topology 'v5e:8x8' is not of Slurm's; gpu:NODESxGPUS"),
        ("slurm", {"topology": "gpu:0x8"}, "'gpu:0x8' is not of Slurm's"),
        (
            "jobset",
            {"config": "configs/imagenet.py:halonet_h8"},
            "run 'h4': configs/imagenet.py:halonet_h8: unknown variant 'halonet_h8'; there are: h",
        ),
        ("jobset", {"config": "configs/imagnet.py"}, "there is no such file"),
        ("jobset", {"config": "/configs/mnist.py"}, "must be a path inside the repository"),
        ("jobset", {"config": "../configs/mnist.py"}, "must be a path inside the repository"),
        (
            "jobset",
            {"overrides": {"optim.lerning_rate": 1.0}},
            "run 'h4': no config key 'optim.lerning_rate' (value '1.0'); did you mean "
            "'optim.learning_rate'?",
        ),
        ("jobset", {"overrides": {"optim": 1}}, "run 'h4': "),
        ("jobset", {"overrides": {"data.batch_size": "many"}}, "is not of the key's type, int"),
        (
            "jobset",
            {"overrides": {"data.batch_size": 0}},
            "run 'h4': config.data.batch_size=0 must be above 0",
        ),
        ("jobset", {"overrides": {"data.name": 5}}, "data.name=5 would be read as '5'; give one"),
        ("jobset", {"overrides": {"data.name": "a\nb"}}, "has a character that no line can"),
    ],
)
def test_a_run_that_cannot_be_is_one_line(target, changes, message):
    run = dataclasses.replace(on(target, H4), **changes)
    with pytest.raises(LaunchError, match=re.escape(message)) as error:
        render([run], target, **NEEDED[target])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("jobset", {}, "target jobset needs image"),
        ("gcloud", {"zone": "z"}, "target gcloud needs project"),
        ("slurm", {"time": ""}, "target slurm needs time"),
        ("jobset", {"image": "i", "zone": "z"}, "target jobset has no setting 'zone'; it has"),
        ("jobset", {"image": 'i"'}, "image='i\"' has characters that no such name has"),
        ("slurm", {"time": "60", "max_restarts": -1}, "max_restarts=-1 must not be negative"),
        ("ray", {}, "target 'ray' is not one of jobset, gcloud, slurm"),
    ],
)
def test_settings_that_cannot_be(target, settings, message):
    with pytest.raises(LaunchError, match=re.escape(message)):
        render([on(target, H4)], target, **settings)


def test_runs_in_each_others_way():
    for changes in ({"workdir": "gs://bucket/other"}, {"name": "other"}):
        with pytest.raises(LaunchError, match="2 runs have the (name 'h4'|workdir 'gs://bucket/r)"):
            render([H4, dataclasses.replace(H4, **changes)], "jobset", image="i")
    with pytest.raises(LaunchError, match="no runs"):
        render([], "jobset", image="i")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def runs(", "'(' was never closed"),
        ("x = 1", "it has no function runs()"),
        ("def runs():\n    yield {'name': 'h4'}", "yields no launch.Run but {'name': 'h4'}"),
        (
            "from launch import Run\ndef runs():\n    yield Run(name='h4', topolgy='v5e:8x8')",
            "unexpected keyword argument 'topolgy'",
        ),
    ],
    ids=["syntax", "function", "dict", "key"],
)
def test_a_file_without_runs(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(LaunchError, match=re.escape(message)) as error:
        load_runs(str(path))
    assert str(error.value).startswith(f"{path}: ")


RUNS = """
from launch import Run

def runs():
    for name in ("halonet_h0", "halonet_h4"):
        yield Run(
            name=name.replace("_", "-"),
            config=f"configs/imagenet.py:{name}",
            workdir=f"gs://bucket/{name}",
            topology="v5e:8x8",
        )
"""


def test_the_command_line_writes_a_file_a_run(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(RUNS)
    arguments = ["render", "--target=jobset", f"--runs={tmp_path / 'mine.py'}"]
    out = tmp_path / "out"
    assert main([*arguments, f"--out={out}", "--image=i", "--spot", "--max_restarts=3"]) == 0
    files = sorted(out.iterdir())
    assert [path.name for path in files] == ["halonet-h0.yaml", "halonet-h4.yaml"]
    assert capsys.readouterr().out == "".join(
        f"kubectl apply --filename={path}\n" for path in files
    )
    spec = yaml.safe_load(files[0].read_text())["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 3
    assert "gke-spot" in files[0].read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=jobset", "--out={tmp}/out"], "target jobset needs image"),
        (["--target=jobset", "--out={tmp}/mine.py", "--image=i"], "cannot be written"),
        (["--target=ray", "--out={tmp}/out"], "'ray'"),
        (["--target=slurm", "--out={tmp}/out", "--time=60"], "is not of Slurm's"),
        (["--target=jobset", "--out={tmp}/out", "--image=i", "--", "--x"], "--x"),
    ],
)
def test_a_command_line_that_cannot_be(tmp_path, capsys, arguments, message):
    (tmp_path / "mine.py").write_text(RUNS)
    arguments = [it.format(tmp=tmp_path) for it in arguments]
    try:
        code = main(["render", f"--runs={tmp_path / 'mine.py'}", *arguments])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    for target in TARGETS:
        name, text = rendered(target, H4, **SETTINGS[target])
        (GOLDEN / name).write_text(text)
