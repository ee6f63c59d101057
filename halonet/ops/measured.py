"""Which form of halo attention is fastest, as measured; see `default_implementation`.

Written by `python -m experiments.bench_attention --write_defaults`.
"""

# By platform: from so many logits in a call on, the form.
FASTEST = {"cpu": [(0, "xla_shift"), (4_000_000, "xla_rows")]}
