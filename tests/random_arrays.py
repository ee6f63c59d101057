"""Arrays made from their names: the same weights in every environment, and nothing to store."""

import zlib

import numpy as np


def uniform(name, shape, low=-1.0, high=1.0):
    """A float32 array of `shape`, uniform in [low, high), the same for the same name everywhere.

    Built on the raw bits of PCG64, whose stream NumPy guarantees; that of `Generator` may change.
    """
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    fraction = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return (np.float32(low) + np.float32(high - low) * fraction).reshape(shape)


def random_arrays(shapes):
    """State of a network by its keys in timm's or MindCV's naming: {key: shape} to {key: array}.

    Batch statistics are random too, and nothing is left at zero. Kernels keep the size of the
    activations, so that a deep network neither saturates its softmax nor loses digits.
    """
    arrays = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            arrays[key] = np.array(zlib.crc32(key.encode()), np.int64)
        elif key.endswith(("running_var", "moving_variance")):
            arrays[key] = uniform(key, shape, 0.5, 2.0)
        elif len(shape) == 1 and key.endswith(("weight", "gamma")):
            arrays[key] = uniform(key, shape, 0.5, 1.5)
        elif len(shape) == 1:
            arrays[key] = uniform(key, shape, -0.5, 0.5)
        else:
            bound = (3 / np.prod(shape[1:])) ** 0.5
            arrays[key] = uniform(key, shape, -bound, bound)
    return arrays
