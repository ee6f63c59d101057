"""The tests, and the run-time checker of signatures that pytest hooks in for them."""

from beartype import BeartypeConf, beartype

# PEP 484: an int goes where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
