"""Trains or evaluates a HaloNet.

python main.py --config=configs/mnist.py --workdir=runs/mnist
python main.py --config=configs/mnist.py --workdir=runs/mnist --mode=evaluate
"""

import sys
import time
import traceback

if sys.hexversion < 0x030B0000:  # or a package would seem to be missing
    print(f"error: Python {sys.version.split()[0]}; it must be 3.11 or later", file=sys.stderr)
    sys.exit(2)

from absl import app, flags, logging
from ml_collections import config_flags

from halonet import processes, runtime
from halonet.config import ConfigError, parse_flags

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "a file of configs/; --config.key=value overrides")
flags.DEFINE_string("workdir", None, "folder of the run, may be gs://; the same one resumes")
flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "what to do")
flags.DEFINE_bool("force", False, "train in a workdir that another run holds: that one stops")
flags.DEFINE_string("evaluate.step", "best", "best, latest or a number")
flags.DEFINE_string("evaluate.checkpoint", "", "a run's folder or checkpoint besides the workdir's")
flags.DEFINE_enum("evaluate.weights", "", ["", "ema", "raw"], "empty: averaged where kept")
flags.DEFINE_list("evaluate.suites", [], "real, v2: ImageNet's, scored beside the split")
flags.DEFINE_string("distributed.coordinator", "", "host:port of process 0; empty: detected")
flags.DEFINE_integer("distributed.process_id", -1, "of this process, with a coordinator")
flags.DEFINE_integer("distributed.process_count", 0, "of the run, with a coordinator")
flags.mark_flags_as_required(["config", "workdir"])
flags.register_validator("workdir", lambda it: it != "", "it is empty; it would be this folder: .")


def main(argv: list[str]) -> None:
    del argv
    if not FLAGS["verbosity"].present:  # app.run turns the libraries' own progress on
        logging.set_verbosity(logging.WARNING)
    began = time.time() - runtime.process_seconds()
    try:
        if FLAGS.force and FLAGS.mode != "train":
            raise ConfigError(f"--force is of --mode=train; leave it out with --mode={FLAGS.mode}")
        runtime.enable_compilation_cache()
        settings = ("coordinator", "process_id", "process_count")
        settings = {name: FLAGS[f"distributed.{name}"].value for name in settings}
        print(processes.join_processes(**settings))
        if FLAGS.mode == "train":
            from halonet.train import train_and_evaluate

            train_and_evaluate(FLAGS.config, FLAGS.workdir, force=FLAGS.force, began=began)
        else:
            from halonet.evaluate import evaluate_checkpoint

            evaluate_checkpoint(
                FLAGS.config,
                FLAGS.workdir,
                step=FLAGS["evaluate.step"].value,
                checkpoint=FLAGS["evaluate.checkpoint"].value,
                weights=FLAGS["evaluate.weights"].value,
                chosen=config_flags.get_override_values(FLAGS["config"]),
                suites=FLAGS["evaluate.suites"].value,
            )
    except KeyboardInterrupt:
        processes.leave(130)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            traceback.print_exc()
            code = 1
        else:
            print(f"error: {error}" if code != runtime.PREEMPTED else error, file=sys.stderr)
        processes.leave(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
