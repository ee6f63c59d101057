"""Which form of halo attention is fastest, as measured; see `default_implementation`.

Written by `python -m experiments.bench_attention --quick --batch=2 --write_defaults` on two cores.
"""

# By platform: from so many logits in a call on, the form.
FASTEST = {
    "cpu": [(0, "xla_rows")],
}
