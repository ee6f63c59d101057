"""What each mode of main.py calls, imported when it is chosen: a plan needs no Orbax, say."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from halonet import processes, runtime


def run(
    mode: str,
    config: ConfigDict,
    workdir: epath.PathLike | None,
    *,
    group: Callable[[str], dict[str, Any]],
    chosen: Collection[str],
    force: bool,
) -> None:
    """Trains, evaluates, exports or plans.

    Args:
      mode: "train", "evaluate", "export" or "plan".
      config, workdir: of the run; a plan has no workdir.
      group: gives the flags --NAME.setting as arguments, by setting.
      chosen: the keys of `config` that the command line sets.
      force: see `halonet.train.train_and_evaluate`.
    """
    if mode in ("train", "evaluate"):
        print(processes.join_processes(**group("distributed")))
    if mode == "train":
        from halonet.train import train_and_evaluate

        began = time.time() - runtime.process_seconds()
        train_and_evaluate(config, workdir, force=force, began=began)
    elif mode == "evaluate":
        from halonet.evaluate import evaluate_checkpoint

        evaluate_checkpoint(config, workdir, chosen=chosen, **group("evaluate"))
    elif mode == "export":
        from halonet.export import export_checkpoint

        export_checkpoint(config, workdir, chosen=chosen, **group("export"))
    else:
        from halonet.plan import plan

        plan(config, **group("plan"))
