"""Checkpoints: Orbax, asynchronous, the latest and the best side by side.

A checkpoint is a folder `checkpoints/<step>/` with two items: "state", the arrays of a train state,
and "meta", a small JSON object: format version, step, what the data set was, how many damaged
images were passed over, and which versions of the code made the state. A manifest beside them has
the SHA-256 of each file: Orbax itself notices no changed bit in an array. Paths may be gs://.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from halonet import files
from halonet.files import MANIFEST, room

FORMAT_VERSION = 2  # 1 had no manifest
FOLDER = "checkpoints"
# Orbax writes these after the manifest, and nothing that is restored depends on them.
_NOT_IN_MANIFEST = ("_CHECKPOINT_METADATA", "commit_success.txt")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model. The message is one line."""

    exit_code = 4


class SaveError(CheckpointError):
    """A checkpoint that could not be written. Those before it are whole."""

    exit_code = 7


@dataclasses.dataclass(frozen=True)
class _KeepSteps(preservation_policy.PreservationPolicy):
    """Keeps what `steps()` names at the time of asking."""

    steps: Callable[[], Sequence[int]]

    def should_preserve(self, checkpoints, *, context):
        keep = set(self.steps())
        return [info.step in keep for info in checkpoints]


class Checkpointer:
    """Saves the train states of one run.

    Args:
      workdir: the run's folder; checkpoints lie in `workdir/checkpoints`.
      keep_latest: how many of the newest are kept.
      best_steps: called at each save; the steps that are kept for being the best. The caller's own
        record decides, because a step is evaluated after it was saved.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep_latest: int,
        best_steps: Callable[[], Sequence[int]],
    ):
        policy = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(keep_latest), _KeepSteps(best_steps)]
        )
        self._folder, self._saving = _absolute(workdir) / FOLDER, 0
        # What fails in a save is raised; each of Orbax's tasks would print it once more.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # In the background, before the step gets its name: no checkpoint is without one.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            # On an object store an unfinished step is overwritten when it is saved again, while
            # the cleaning would run beside that save and might delete it.
            cleanup_tmp_directories="://" not in str(workdir),
        )
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"checkpoints in {workdir} need the package {error.name}: "
                "pip install google-cloud-storage"
            ) from error
        except (OSError, ValueError) as error:  # of a step's own description, say
            raise CheckpointError(f"{self._folder} cannot be opened: {_line(error)}") from error

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts saving; a failure of the save before this one is raised here.

        Raises:
          CheckpointError: where a checkpoint of this step or a later one is there, which Orbax
            would pass over in silence.
        """
        newest = self._manager.latest_step()
        if newest is not None and newest >= step:
            raise CheckpointError(
                f"step {step} is not saved: {self._folder} has step {newest}, of another start"
            )
        self.wait()
        self._saving = step
        meta = {"format_version": FORMAT_VERSION, "step": step, **meta}
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_as_dict(state)), meta=ocp.args.JsonSave(meta)
                ),
            )

    def _write_manifest(self) -> None:
        # Where files cannot be renamed, the step has its own name from the start.
        folders = self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        write_manifest(next(iter(folders), self._folder / str(self._saving)))

    def check_errors(self) -> None:
        """Raises what went wrong in a save since the last call, without waiting for it.

        Raises:
          SaveError: where a disk is full, say; with the room that is left.
        """
        with self._explained():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything saved is durable; SaveError where that cannot be."""
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, KeyError, AttributeError, AssertionError):
            raise  # a fault of the program
        # What a full disk, a quota or a bucket raises is of many kinds.
        except Exception as error:
            earlier = ", ".join(map(str, saved_steps(self._folder.parent))) or "none"
            raise SaveError(
                f"step {self._saving} could not be saved into {self._folder}: "
                f"{type(error).__name__}: {_line(error)}; "
                f"{room(self._folder)}; whole checkpoints there, which the same command goes on "
                f"from: {earlier}"
            ) from error

    def close(self) -> None:
        """Waits, then ends the manager's threads; SaveError where a save still fails then."""
        with self._explained():
            self._manager.close()


def save_variables(
    workdir: epath.PathLike, variables: dict[str, Any], meta: dict[str, Any]
) -> None:
    """Writes `variables`, {"params", "batch_stats"}, as the one checkpoint of a workdir, of step 0.

    Returns when it is durable. A checkpoint that the workdir has already is replaced.
    """
    folder = _absolute(workdir) / FOLDER
    if folder.exists():
        folder.rmtree()
    checkpointer = Checkpointer(workdir, keep_latest=1, best_steps=list)
    try:
        checkpointer.save(0, variables, meta)
        checkpointer.wait()
    finally:
        checkpointer.close()


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """The steps with a complete checkpoint under `workdir`, oldest first."""
    folder = _absolute(workdir) / FOLDER
    if not folder.exists():
        return []
    return sorted(ocp.utils.checkpoint_steps(folder))


def write_manifest(folder: epath.PathLike) -> None:
    """Writes manifest.json: the SHA-256 of each file under `folder`, by its relative path."""
    files.write_manifest(_absolute(folder), _NOT_IN_MANIFEST)


def verify(folder: epath.PathLike) -> None:
    """Compares each file of a checkpoint with the manifest.

    A checkpoint of format version 1, which has none, passes.

    Raises:
      CheckpointError: naming the files that are damaged or missing.
    """
    folder = _absolute(folder)
    try:
        if not (folder / MANIFEST).exists():
            if read_meta(folder)["format_version"] == 1:
                return
            raise CheckpointError(f"{folder} is damaged: it has no {MANIFEST}")
        damaged = files.damaged(folder, _NOT_IN_MANIFEST)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is damaged: {MANIFEST}: {_line(error)}") from error
    if damaged:
        raise CheckpointError(f"{folder} is damaged: not as they were saved: {damaged}")


def newest_good_step(workdir: epath.PathLike, say: Callable[[str], None]) -> int:
    """The newest step whose files are as they were saved, 0 where nothing was ever saved.

    Newer ones, damaged, lose their names, so that the run can save these steps again.

    Raises:
      CheckpointError: where all are damaged.
    """
    damaged = {}
    for step in reversed(saved_steps(workdir)):
        try:
            verify(step_folder(workdir, step))
            break
        except CheckpointError as error:
            damaged[step] = error
    else:
        if damaged:
            raise CheckpointError("; ".join(map(str, damaged.values())))
        return 0
    for newer, error in damaged.items():
        folder = step_folder(workdir, newer)
        aside = folder.with_name(f"{newer}.damaged")
        if aside.exists():
            aside.rmtree()
        folder.rename(aside)
        say(f"{error}; it is {aside.name} now, and the run goes on from step {step}")
    return step


def step_folder(workdir: epath.PathLike, step: int) -> epath.Path:
    """The folder of one checkpoint.

    Raises:
      CheckpointError: where there is none of that step, listing those there are.
    """
    steps = saved_steps(workdir)
    if step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"no checkpoint of step {step} in {workdir}; steps found: {found}")
    return _absolute(workdir) / FOLDER / str(step)


def read_meta(folder: epath.PathLike) -> dict[str, Any]:
    """The "meta" item of a checkpoint folder.

    Raises:
      CheckpointError: where `folder` is not a checkpoint, or of a newer format.
    """
    folder = _absolute(folder)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            meta = checkpointer.restore(folder / "meta")
        version = meta["format_version"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is not a readable checkpoint: {_line(error)}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, newer than this program's "
            f"{FORMAT_VERSION}; update halonet"
        )
    return meta


def restore_state(workdir: epath.PathLike, step: int, abstract_state: Any) -> Any:
    """The whole state at `step`, on the shardings of `abstract_state`.

    Raises:
      CheckpointError: where it is damaged or its arrays are not those of `abstract_state`.
    """
    folder = step_folder(workdir, step)
    return type(abstract_state)(**restore_arrays(folder, _as_dict(abstract_state)))


def restore_arrays(folder: epath.PathLike, target: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a checkpoint folder that `target` asks for.

    Args:
      folder: `checkpoints/<step>`.
      target: any subset of a state's fields, with abstract arrays that carry their sharding.

    Raises:
      CheckpointError: where it is damaged, or a field holds other arrays than `target`: one error
        that lists them all.
    """
    path = _absolute(folder) / "state"
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            stored = ocp.PyTreeCheckpointHandler().metadata(path).tree
            stored = {name: tree for name, tree in stored.items() if name in target}
            differing = differences(stored, target)
            if differing:
                raise CheckpointError(
                    f"cannot restore {folder}: it is of another model: {'; '.join(differing)}"
                )
            return checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"cannot restore {folder}, it is damaged: {_line(error)}; without that folder the run "
            "goes on from the checkpoint before"
        ) from error


def differing_arrays(workdir: epath.PathLike, abstract_state: Any) -> list[str]:
    """As `differences`, of the newest checkpoint from a state; none where nothing is saved."""
    if not (steps := saved_steps(workdir)):
        return []
    path = step_folder(workdir, steps[-1]) / "state"
    try:
        there = ocp.PyTreeCheckpointHandler().metadata(path).tree
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return [f"the arrays there cannot be listed: {_line(error)}"]
    return differences(there, _as_dict(abstract_state))


def differences(there: Any, wanted: Any) -> list[str]:
    """One text for each array in which two trees differ: in path, dtype or shape."""
    there, wanted = _describe(there), _describe(wanted)
    return [
        f"{name}: {there.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} wanted"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]


def _describe(tree: Any) -> dict[str, str]:
    """Path of each array -> its dtype and shape. Orbax itself casts and drops without a word."""
    return {
        path_name(path): f"{jnp.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def path_name(path: tuple) -> str:
    """The path of a leaf, as jax.tree_util gives it, as text: "params/head/bias"."""
    return "/".join(
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
    )


def _as_dict(state: Any) -> dict[str, Any]:
    """A state's fields by name: what lies on disk does not depend on a Python class."""
    if isinstance(state, dict):
        return state
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax refuses relative paths; resolve() alone would make gs://b a folder of this one."""
    path = epath.Path(path)
    return path if path.is_absolute() else path.resolve()


def _line(error: Exception) -> str:
    """The first line of an error: TensorStore's run to sixty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def abstract_on(tree: Any, shardings: Any) -> Any:
    """Abstract arrays like those of `tree`, lying on `shardings` (a tree, or one for all)."""
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
