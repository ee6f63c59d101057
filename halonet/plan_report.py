"""A plan as text, from its numbers."""

from __future__ import annotations

import math
import textwrap
from typing import Any

GIB = 2**30
_KINDS = {
    "parameters": "parameters",
    "batch_statistics": "batch statistics",
    "optimizer": "optimizer state",
    "averages": "averages",
    "batch": "batch",
    "waiting_batches": "batches waiting",
    "padding": "padding of these",
    "temporaries": "temporaries",
    "outputs": "metrics",
    "code": "code",
}


def show(plan: dict[str, Any]) -> None:
    """Prints what `halonet.plan.plan` has found."""
    for line in lines(plan):
        print(textwrap.fill(line, 100, subsequent_indent=" " * 14, break_long_words=False))


def lines(plan: dict[str, Any]) -> list[str]:
    where, images = plan["topology"], plan["images_per_device"]
    kind = f"{where['chips']} chips, " if where["chips"] else ""
    text = [
        f"plan of {plan['model']} at {plan['image_size']} px, batch {plan['batch_size']}, on "
        f"{where['name']}: {kind}{where['devices']} devices of JAX, "
        f"mesh {' x '.join(f'{n} {axis}' for axis, n in where['mesh'].items())}",
        "every figure is an estimate by compilation; nothing was run but the input",
        f"data          {plan['data']['name']}: {plan['data']['classes']:,} classes, "
        f"{plan['data']['examples']:,} examples ({plan['data']['source']})",
        *_fit(plan),
        *_memory(plan),
    ]
    if plan["flops"]:
        text.append(
            f"work          {plan['flops']['per_image'] / 1e9:.2f} GFLOP an image, "
            f"{plan['flops']['per_step_and_device'] / 1e12:.3g} TFLOP a step and device"
        )
    for kind, it in (plan["collectives"] or {}).items():
        took = f", {1e3 * it['seconds']:.2f} ms if nothing hides them" if "seconds" in it else ""
        text.append(f"{kind:14}{it['count']} of {it['bytes'] / 1e6:.1f} MB together{took}")
    text += _time(plan) if plan["seconds"] else [_no_time(plan)]
    per_core = plan["input"]["images_per_core_second"]
    cores = plan["input"]["cores"]
    if cores is None:
        text.append(f"input         {per_core:,.0f} images/s a core, measured here now")
    else:
        chips = max(1, where["chips"])
        text.append(
            f"input         {cores:,.0f} cores in all, {cores / chips:.1f} a chip, of this "
            f"machine's kind: {per_core:,.0f} images/s each, measured now"
        )
    if plan["largest_batch"]:
        most = plan["largest_batch"]
        far = most["images_per_device"] > 4 * plan["trials"][-1]["images_per_device"]
        text.append(
            f"largest batch {most['images_per_device']} images a device ({most['batch_size']:,}), "
            f"by the memory of {_sizes(plan)}" + (", far from both" if far else "")
        )
    if images["compiled"] and images["compiled"] < images["wanted"]:
        text.append(_advice(images["wanted"], plan["largest_batch"]["images_per_device"], plan))
    text.append(f"planned in {plan['plan_seconds']:.0f} s")
    return text


def _fit(plan: dict[str, Any]) -> list[str]:
    images = plan["images_per_device"]
    if plan["fits"] is None:
        return [f"fits          no limit is known here; {images['wanted']} images a device"]
    if plan["fits"]:
        return [f"fits          yes, {images['wanted']} images a device"]
    refused = next(it for it in plan["trials"] if it["images_per_device"] == images["wanted"])
    why = refused["said"] or f"{refused['bytes'] / GIB:.2f} GiB with the batches that wait"
    text = [f"fits          NO: {images['wanted']} images a device; {why}"]
    if images["compiled"]:
        return [*text, f"              what follows is of {images['compiled']} images a device"]
    return [*text, "              nor does any smaller batch"]


def _memory(plan: dict[str, Any]) -> list[str]:
    memory = plan["memory"]
    shown = [
        f"{name} {memory[kind] / 1e6:,.{1 if memory[kind] < 1e7 else 0}f}"
        for kind, name in _KINDS.items()
        if memory.get(kind, 0) >= 5e4
    ]
    limit = f" of {memory['limit'] / GIB:.2f}" if memory["limit"] else ""
    total = f"memory        {memory['total'] / GIB:.2f}{limit} GiB a device"
    return [f"{total}; MB: {', '.join(shown)}"] if shown else []


def _no_time(plan: dict[str, Any]) -> str:
    if not plan["topology"]["chips"]:
        return "time          none: there is no estimate for CPUs"
    return f"time          none: {plan.get('no_time', 'nothing fits')}"


def _time(plan: dict[str, Any]) -> list[str]:
    seconds, rate, days = plan["seconds"], plan["images_per_second"], plan["schedule"]["days"]
    low, high = seconds["measured_over_estimated"]
    text = [
        f"time          {1e3 * seconds['estimate']:.1f} ms a step, {rate['estimate']:,.0f} "
        f"images/s, MFU {100 * plan['mfu']['estimate']:.1f} %",
        f"              steps that others timed took {low} to {high} of such an estimate: "
        f"{1e3 * seconds['low']:.1f} to {1e3 * seconds['high']:.1f} ms, {rate['low']:,.0f} to "
        f"{rate['high']:,.0f} images/s",
        f"              in it: fused kernels {1e3 * seconds['kernels']:.1f} ms, collectives "
        f"{1e3 * seconds['collectives']:.2f} ms",
    ]
    if seconds["kernels_guessed"]:
        text.append(
            f"              kernels of {1e3 * seconds['kernels_guessed']:.1f} ms are guessed from "
            f"the layers most like theirs ({'; '.join(seconds['kernels_guessed_from'])}), good to "
            f"a factor of {seconds['kernels_guessed_within']:.1f}; the range above has it in"
        )
    text.append(
        f"schedule      {plan['schedule']['steps']:,} steps: {days['estimate']:.3g} days "
        f"({days['low']:.3g} to {days['high']:.3g} by that measure), without "
        "evaluation and checkpoints"
    )
    return text


def _sizes(plan: dict[str, Any]) -> str:
    sizes = [
        f"{it['images_per_device']} ({it['bytes'] / GIB:.2f} GiB"
        + ("" if it["fits"] else ", refused")
        + ")"
        for it in plan["trials"]
    ]
    return ", ".join(sizes)


def _advice(wanted: int, fitting: int, plan: dict[str, Any]) -> str:
    """What makes the same step in less memory: parts of equal size, none above what fits."""
    parts = next(it for it in range(1, wanted + 1) if wanted % it == 0 and wanted // it <= fitting)
    accumulate = plan["settings"]["train.accumulate"] * parts
    text = (
        f"--config.train.accumulate={accumulate} makes the step of {wanted} images a device of "
        "parts that fit"
    )
    group = plan["settings"]["model.bn_group"]
    if (wanted // accumulate) % group:
        text += f" (with --config.model.bn_group={math.gcd(wanted // accumulate, group)})"
    return f"instead       {text}; --config.model.remat=attention or block needs less memory too"
