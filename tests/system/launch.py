"""Commands in processes of their own, as a user starts them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent


def launch(*arguments, devices=1):
    """Starts Python with `arguments` in the repository, on so many devices of a CPU."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": os.path.expanduser("~"),
            "JAX_PLATFORMS": "cpu",
            "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
