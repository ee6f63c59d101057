"""Prepares a data set, or says what is wrong with the one that a configuration names.

python -m halonet.data prepare imagenet2012 --manual_dir=~/archives --data_dir=~/tensorflow_datasets
python -m halonet.data check --config=configs/mindcv_halonet_50t.py --sheet=sheet.png

`prepare` downloads nothing; `check` takes --config.key=value as main.py does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from halonet import plots
from halonet.config import ConfigError, center_view, check_values, parse_flags, random_view
from halonet.data import check, prepare, sources
from halonet.data.errors import (
    DamagedImageError,
    DamagedShardError,
    DataError,
    NotPreparedError,
)

_SHEET = 16  # images on it
_SAMPLE = 64  # images decoded of each split
_LISTED = 5  # faults of one kind
_RATE_BATCH = 32  # images: batches large enough for their overhead, small enough to count by


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str]) -> int:
    """Does what was asked for and returns the exit code: 2 for the command line or the
    configuration, 3 for the data."""
    logging.set_verbosity(logging.ERROR)  # TFDS tells of each split that nobody has
    parser = _Parser(prog="python -m halonet.data", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{prepare,check}")
    one = commands.add_parser("prepare", help="ArrayRecord from archives", allow_abbrev=False)
    one.add_argument("name", help="as TensorFlow Datasets writes it, such as imagenet2012")
    one.add_argument("--manual_dir", required=True, help="the folder of the archives")
    one.add_argument("--data_dir", default="", help="of prepared data sets; empty: TFDS's own")
    commands.add_parser("check", help="looks at the data of a --config", add_help=False)
    if not arguments:
        parser.print_usage(sys.stderr)
        return 2
    known, rest = parser.parse_known_args(arguments)
    try:
        if known.command == "check":
            return _check(["python -m halonet.data check", *rest])
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return _prepare(known)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command starts again", file=sys.stderr)
        return 130


def _prepare(known: argparse.Namespace) -> int:
    folder, splits = prepare.prepare(
        known.name, manual_dir=known.manual_dir, data_dir=known.data_dir
    )
    counts = ", ".join(f"{split} {examples:,}" for split, examples in splits.items())
    print(f"{folder} has {counts} examples; look at them with python -m halonet.data check")
    return 0


def _check(argv: list[str]) -> int:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "a file of configs/", flag_values=values, sys_argv=argv
    )
    for name, what in (
        ("manual_dir", "folder of archives, looked into where nothing is prepared"),
        ("sheet", "PNG of images as the model sees them"),
    ):
        flags.DEFINE_string(name, "", what, flag_values=values)
    flags.DEFINE_float(
        "images_per_second", 0.0, "what a step takes", lower_bound=0.0, flag_values=values
    )
    flags.mark_flag_as_required("config", values)
    if {"-h", "--help"} & set(argv):
        print(__doc__, values.get_help(), sep="\n")
        return 0
    parse_flags(argv, values)
    if values.sheet and not values.sheet.endswith(".png"):
        raise ConfigError(f"--sheet={values.sheet} does not end in .png")
    check_values(values.config)
    faults = _look(values.config, values)
    if any(isinstance(error, NotPreparedError) for error in faults):
        _say_how_to_prepare(values.config.data, values.manual_dir)
    elif any(isinstance(error, DamagedShardError) for error in faults):
        data = values.config.data
        folder, _ = sources.open_prepared(data.name, data_dir=data.data_dir)
        _say_how_to_prepare(data, values.manual_dir, first=f"remove {folder}, then ")
    if faults:
        return DataError.exit_code
    print("ready")
    return 0


def _look(config: ConfigDict, values: flags.FlagValues) -> list[DataError]:
    """Prints what is found, line by line; returns the faults."""
    faults = []

    def fault(*errors: DataError) -> None:
        known = {str(error) for error in faults}  # of both splits, where they are the same
        errors = [error for error in errors if str(error) not in known]
        faults.extend(errors)
        for error in errors[:_LISTED]:
            print(f"error: {error}", file=sys.stderr)
        if errors[_LISTED:]:
            print(f"error: and {len(errors) - _LISTED} more like these", file=sys.stderr)

    opened = _open(config.data, fault)
    if not opened:
        return faults
    first = next(iter(opened.values()))
    _say("data", check.describe(first))
    for split, count in check.examples(*opened.values()).items():
        _say("split", f"{split}: {count:,} examples")
    _say("warning", *check.unusual_counts(first))
    random, rng = random_view(config), np.random.default_rng(config.seed)
    views = {"train": lambda image: random(image, rng), "eval": center_view(config)}
    for use, source in opened.items():
        damaged = check.read_shards(source)
        fault(*damaged)
        if damaged:  # of which a sample would only say the same
            continue
        if isinstance(source, sources.TfdsImages):
            _say("shards", f"{source.split}: {len(source.shards)}, both ends of each can be read")
        *_, damaged = check.decode_sample(source, (views[use],), _SAMPLE)
        if use == "train" and config.data.damaged == "skip":  # a run would pass over them
            _say("warning", *(str(e) for e in damaged if isinstance(e, DamagedImageError)))
            damaged = [error for error in damaged if not isinstance(error, DamagedImageError)]
        fault(*damaged)
    if values.sheet:
        squares, names, _ = check.decode_sample(first, tuple(views.values()), _SHEET)
        if names:
            try:
                plots.view_sheet(*squares, names, values.sheet)
            except OSError as error:
                raise ConfigError(f"--sheet={values.sheet}: {error.strerror}") from error
            _say("sheet", f"{values.sheet}: {len(names)} images")
    if "train" in opened and not faults:
        _say_rate(config, opened["train"], values.images_per_second)
    return faults


def _open(data: ConfigDict, fault: Callable[..., None]) -> dict[str, sources.Source]:
    """The splits for training and evaluation, as far as they can be opened."""
    opened = {}
    for use, split in (("train", data.train_split), ("eval", data.eval_split)):
        try:
            opened[use] = sources.open_source(
                data.name, split, data_dir=data.data_dir, image_size=data.image_size
            )
        except NotPreparedError as error:  # no split is
            fault(error)
            break
        except DataError as error:
            fault(error)
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error
    return opened


def _say_how_to_prepare(data: ConfigDict, manual_dir: str, first: str = "") -> None:
    try:
        instructions = prepare.manual_instructions(data.name)
    except DataError as error:  # somebody's own, or mistyped
        _say("mend", str(error))
        return
    if manual_dir:
        _say("archive", *check.archives(instructions, manual_dir))
    _say(
        "mend",
        f"{first}python -m halonet.data prepare {data.name} --manual_dir={manual_dir or 'DIR'} "
        f"--data_dir={sources.data_root(data.data_dir)}",
    )


def _say_rate(config: ConfigDict, source: sources.Source, wanted: float) -> None:
    data = config.data
    rate = check.measure_rate(
        source,
        random_view(config),
        batch_size=min(data.batch_size, _RATE_BATCH),
        replace_damaged=data.damaged == "skip",
        threads=data.threads,
        workers=data.workers,
    )
    cores = len(os.sched_getaffinity(0))
    _say(
        "input",
        f"{rate.images_per_second:,.0f} images/s with data.workers={data.workers} and "
        f"data.threads={data.threads} on {cores} cores; one core makes "
        f"{rate.images_per_core_second:,.0f}",
    )
    if wanted:
        needs = wanted / rate.images_per_core_second
        _say("cores", f"{wanted:,.0f} images/s need {needs:,.1f} cores of this kind")
        if wanted > rate.images_per_second:
            _say("warning", f"a step that takes {wanted:,.0f} images/s would wait for its images")


def _say(what: str, *lines: str) -> None:
    for line in lines:
        print(f"{what:<8}{line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
