"""Trains, evaluates or exports a HaloNet, or says before what training would need.

python main.py --config=configs/mnist.py --workdir=runs/mnist
python main.py --config=configs/mnist.py --workdir=runs/mnist --mode=evaluate
python main.py --config=configs/mnist.py --workdir=runs/mnist --mode=export --export.out=digits
python main.py --config=configs/imagenet.py:halonet_h1 --mode=plan --plan.topology=v5e:2x4
"""

import sys

if sys.hexversion < 0x030B0000:  # or a package would seem to be missing
    print(f"error: Python {sys.version.split()[0]}; it must be 3.11 or later", file=sys.stderr)
    sys.exit(2)

from absl import app, flags, logging
from ml_collections import config_flags

from halonet import modes, processes, runtime
from halonet.config import ConfigError, parse_flags

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "a file of configs/; --config.key=value overrides")
flags.DEFINE_string("workdir", None, "folder of the run, may be gs://; the same one resumes")
flags.DEFINE_enum("mode", "train", ["train", "evaluate", "export", "plan"], "what to do")
flags.DEFINE_bool("force", False, "train in a workdir that another run holds: that one stops")
flags.DEFINE_string("evaluate.step", "best", "best, latest or a number")
flags.DEFINE_string("evaluate.checkpoint", "", "a run's folder or checkpoint besides the workdir's")
flags.DEFINE_enum("evaluate.weights", "", ["", "ema", "raw"], "empty: averaged where kept")
flags.DEFINE_list("evaluate.suites", [], "real, v2: ImageNet's, scored beside the split")
flags.DEFINE_enum("export.format", "stablehlo", ["stablehlo", "savedmodel", "timm"], "for whom")
flags.DEFINE_string("export.out", "", "the folder to write, a new one")
flags.DEFINE_string("export.step", "best", "best, latest or a number")
flags.DEFINE_string("export.checkpoint", "", "a run's folder or checkpoint besides the workdir's")
flags.DEFINE_enum("export.weights", "", ["", "ema", "raw"], "empty: averaged where kept")
flags.DEFINE_enum("export.preprocess", "", ["", "inside", "outside"], "empty: inside where it can")
flags.DEFINE_string("plan.topology", "", "slice of TPUs in chips, such as v5e:2x4, or cpu:8")
flags.DEFINE_integer("plan.classes", 0, "of data that is not there; 0: known or read", 0)
flags.DEFINE_integer("plan.examples", 0, "likewise, of the training split", 0)
flags.DEFINE_string("plan.out", "", "write the plan to this file, as JSON")
flags.DEFINE_string("distributed.coordinator", "", "host:port of process 0; empty: detected")
flags.DEFINE_integer("distributed.process_id", -1, "of this process, with a coordinator")
flags.DEFINE_integer("distributed.process_count", 0, "of the run, with a coordinator")
flags.mark_flags_as_required(["config"])
flags.register_validator("workdir", lambda it: it != "", "it is empty; it would be this folder: .")
flags.register_multi_flags_validator(
    ["mode", "workdir"],
    lambda it: it["mode"] == "plan" or it["workdir"] is not None,
    "no --workdir",
)


def group(name: str) -> dict:
    """The flags --name.setting as arguments, by setting."""
    return {it.partition(".")[2]: FLAGS[it].value for it in FLAGS if it.startswith(f"{name}.")}


def main(_: list[str]) -> None:
    if not FLAGS["verbosity"].present:  # app.run turns the libraries' own progress on
        logging.set_verbosity(logging.WARNING)
    try:
        if FLAGS.force and FLAGS.mode != "train":
            raise ConfigError(f"--force is of --mode=train; leave it out with --mode={FLAGS.mode}")
        runtime.enable_compilation_cache()
        modes.run(
            FLAGS.mode,
            FLAGS.config,
            FLAGS.workdir,
            group=group,
            chosen=config_flags.get_override_values(FLAGS["config"]),
            force=FLAGS.force,
        )
    except (KeyboardInterrupt, Exception) as error:
        processes.leave_for(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
