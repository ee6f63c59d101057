"""A sweep's folder, written by hand as the runs would have left it."""

import json

from halonet.runtime import versions

CODE = {**versions(), "code": "a" * 40}


def write_member(folder, member, *, top1=None, at=2, made_by=(CODE,), batch=64, **summary):
    """The workdir of a member: of a finished run where it has a top-1, of a running one else."""
    workdir = folder / member["id"]
    (workdir / "metrics").mkdir(parents=True)
    config = {"seed": member["overrides"].get("seed", 0), "data": {"batch_size": batch}}
    (workdir / "config.json").write_text(json.dumps(config))
    end = 0.6 if top1 is None else top1
    rows = [{"step": 0, "perf/started": 1.0}]
    for step in range(1, at + 1):
        # The best was before the last.
        score = end + 0.01 if step == at - 1 else end - 0.1 * (at - step)
        rows.append({"step": step, "train/loss": 2 / step, "perf/images_per_second": 100.0 * step})
        rows.append({"step": step, "eval/loss": 1 / step, "eval/top1": score, "eval/count": 1000.0})
    (workdir / "metrics" / "000.jsonl").write_text("".join(json.dumps(it) + "\n" for it in rows))
    if top1 is not None:
        whole = {
            "step": at,
            **{name: value for name, value in rows[-1].items() if name.startswith("eval/")},
            "best/step": at - 1,
            "best/top1": top1 + 0.01,
            "parameters": 1000,
            "multiply_adds": 50_000,
            "perf/images_per_second": 200.0,
            "goodput/starts": 1,
            "goodput/seconds": 90.0,
            "goodput/step": 0.75,
            "devices": "8 cpu",
            "made_by": list(made_by),
        }
        (workdir / "summary.json").write_text(json.dumps({**whole, **summary}))
    return workdir


def write_sweep(folder, members, *, config="experiments/none.py", overrides=()):
    """sweep.json of members given as (name, overrides); returns them as sweep.json has them."""
    folder.mkdir(parents=True)
    listed = [
        {"name": name, "id": f"{name}-{number:08x}", "overrides": own}
        for number, (name, own) in enumerate(members)
    ]
    saved = {"sweep": folder.name, "config": config, "overrides": dict(overrides)}
    (folder / "sweep.json").write_text(json.dumps({**saved, "members": listed}))
    return listed


def scaling_sweep(folder, **options):
    """A sweep of three sizes with two seeds each, all finished, and two members that are not."""
    own = [
        (f"{name}_seed{seed}", {"model.name": f"halonet_{name}", "seed": seed})
        for name in ("h0", "h1", "h2")
        for seed in (0, 1)
    ]
    own += [("h3_seed0", {"model.name": "halonet_h3", "seed": 0})]
    own += [("h3_seed1", {"model.name": "halonet_h3", "seed": 1})]
    *finished, failed, _ = members = write_sweep(folder, own, **options)
    for index, member in enumerate(finished):
        size = index // 2
        # An error that halves where the cost is four times as much, and a spread between seeds.
        error = 0.4 * 0.5**size + (0.01 if index % 2 else -0.01)
        cost = {"parameters": 1000 * 4**size, "multiply_adds": 50_000 * 4**size}
        rate = {"perf/images_per_second": 400.0 / 2**size}
        write_member(folder, member, top1=1 - error, at=4, **cost, **rate)
    write_member(folder, failed, at=3)
    (folder / f"{failed['id']}.json").write_text(json.dumps({"exit_code": 5, "attempts": 1}))
    return members
