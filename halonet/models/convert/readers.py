"""The arrays in a weight file of another program. Files are data: nothing in one ever runs."""

from __future__ import annotations

import argparse
import functools
import io
import math
import os
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from halonet.models.convert.weights import WeightsError

# Where timm keeps weights in a checkpoint of training, best first.
NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
WITHOUT_TORCH = "pip install 'torch>=2.6', or take the .safetensors file of the same weights"
# Of the arrays that weights are made of, by the names of .safetensors.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
}


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a weight file, by key, less what PyTorch's wrappers put before every key.

    The suffix says how it is read.

    Raises:
      WeightsError: for a file that is not there or not what its suffix says, in one line.
    """
    path = pathlib.Path(path)
    reader = READERS.get(path.suffix)
    if reader is None:
        raise WeightsError(f"{path} is of no known kind; there are: {', '.join(READERS)}")
    data = b""
    try:
        data = path.read_bytes()
        arrays = reader(data)
        if not arrays:
            raise WeightsError("it holds no arrays")
        for prefix in ("module.", "_orig_mod."):
            if all(key.startswith(prefix) for key in arrays):
                arrays = {key.removeprefix(prefix): array for key, array in arrays.items()}
    except Exception as error:  # whatever a damaged file makes of a reader
        what, its_reader = _looks_like(data)
        if what and its_reader is not reader:
            why = f"it looks like {what}"
        elif isinstance(error, OSError) and error.strerror:
            why = error.strerror
        else:
            kind = "" if isinstance(error, WeightsError) else f"{type(error).__name__}: "
            why = kind + " ".join(str(error).split())[:300]
        raise WeightsError(f"{path} cannot be read as {path.suffix}: {why}") from error
    return arrays


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    import safetensors

    # The raw form: the package's own NumPy reader knows no bfloat16.
    return {
        key: _array(tensor["data"], DTYPES.get(tensor["dtype"], tensor["dtype"]), tensor["shape"])
        for key, tensor in safetensors.deserialize(data)
    }


def _array(content: bytes | bytearray, dtype: str, shape: list[int]) -> np.ndarray:
    if dtype not in DTYPES.values():
        raise WeightsError(f"arrays of type {dtype} are not weights")
    kind = jnp.dtype(dtype)
    if min(shape, default=0) < 0 or len(content) != kind.itemsize * math.prod(shape):
        raise WeightsError(f"{len(content)} bytes are not a {dtype} array of shape {list(shape)}")
    return np.frombuffer(content, kind).reshape(shape)


def read_torch(data: bytes) -> dict[str, np.ndarray]:
    if not data.startswith((b"PK", b"\x80")):
        raise WeightsError("PyTorch saves a zip archive or a pickle")
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"PyTorch is not installed, and only it reads these: {WITHOUT_TORCH}"
        ) from error
    if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 6]:
        raise WeightsError(
            f"PyTorch {torch.__version__} may run code in it (CVE-2025-32434): {WITHOUT_TORCH}"
        )
    # weights_only: an unpickler that knows tensors and refuses to call anything else, but for the
    # mere attributes in which timm's training keeps its arguments.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own texts advise to let the code run
        raise WeightsError(
            f"it is damaged, or holds more than arrays ({type(error).__name__} with weights_only)"
        ) from error
    state = state if isinstance(state, dict) else {"all of it": state}
    state = next((state[key] for key in NESTS if isinstance(state.get(key), dict)), state)
    arrays = {}
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise WeightsError(f"{key} is a {type(tensor).__name__}, not a tensor")
        # NumPy has no bfloat16; float32 holds it exactly.
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        arrays[key] = tensor.detach().numpy()
    return arrays


def read_mindspore(data: bytes) -> dict[str, np.ndarray]:
    from google.protobuf.message import DecodeError

    try:
        checkpoint = _mindspore_checkpoint().FromString(data)
    except DecodeError as error:
        raise WeightsError("it is no whole MindSpore checkpoint") from error
    # An array above 512 MB comes in parts, one after another under one tag.
    contents: dict[str, bytes] = {}
    tensors = {}
    for value in checkpoint.value:
        if not value.HasField("tensor"):
            raise WeightsError(f"{value.tag} is not a tensor")
        contents[value.tag] = contents.get(value.tag, b"") + value.tensor.tensor_content
        tensors[value.tag] = value.tensor
    return {
        # A scalar is written with the dimension 0.
        tag: _array(contents[tag], it.tensor_type.lower(), [d for d in it.dims if it.dims != [0]])
        for tag, it in tensors.items()
    }


@functools.cache
def _mindspore_checkpoint() -> type:
    """The protobuf message that MindSpore saves (its checkpoint.proto), as far as it is read."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field_type = descriptor_pb2.FieldDescriptorProto
    one, many, maybe = (
        field_type.LABEL_REQUIRED,
        field_type.LABEL_REPEATED,
        field_type.LABEL_OPTIONAL,
    )
    # The fields of each message in the order of their numbers, from 1.
    messages = {
        "Checkpoint": [("value", many, "Value")],
        "Value": [("tag", one, field_type.TYPE_STRING), ("tensor", maybe, "Tensor")],
        "Tensor": [
            ("dims", many, field_type.TYPE_INT64),
            ("tensor_type", one, field_type.TYPE_STRING),
            ("tensor_content", one, field_type.TYPE_BYTES),
        ],
    }
    file = descriptor_pb2.FileDescriptorProto(
        name="mindspore.proto", package="mindspore", syntax="proto2"
    )
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for number, (field, label, kind) in enumerate(fields, start=1):
            named = {"type_name": kind} if isinstance(kind, str) else {"type": kind}
            message.field.add(name=field, number=number, label=label, **named)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("mindspore.Checkpoint"))


READERS = {
    ".safetensors": read_safetensors,
    **dict.fromkeys((".pth", ".pt", ".bin"), read_torch),
    ".ckpt": read_mindspore,
}


def _looks_like(data: bytes) -> tuple[str, Callable | None]:
    """What a file is by its beginning ("" for nothing known), and who reads that."""
    if data[8:9] == b"{":  # behind the length of the header
        return "a .safetensors file", read_safetensors
    for sign, what, reader in (
        (b"PK", "a zip archive, as PyTorch saves", read_torch),
        (b"\x80", "a Python pickle, which may hold code", read_torch),
        (b"\n", "a protobuf message, as MindSpore saves", read_mindspore),
        (b"version https://git-lfs", "a Git LFS pointer: the file was never downloaded", None),
        (b"\x89HDF", "an HDF5 file, as Keras saves", None),
        (b"<", "a web page", None),
    ):
        if data.startswith(sign):
            return what, reader
    return "", None
