"""What bench_peers times: our layer and models, and those of timm, kecam and lucidrains.

Each is a program that does one whole piece of work and waits for its end. Inputs are random and
lie on the device; weights are those that each library draws. The layer is the queries', keys' and
values' projections and the attention between them, without a projection of the output; the peers'
own is left out. A training step is the forward pass, cross-entropy, the backward pass and SGD with
Nesterov momentum and weight decay, of which ours is `halonet.steps.train_step`: it also normalises
its uint8 images, counts hits and takes the gradient's norm.

PyTorch and what builds on it are imported inside functions: they are of the environment of
`make bench`.
"""

import contextlib
import dataclasses
import functools
import io
import os

import jax
import jax.numpy as jnp
import numpy as np

from halonet import optim, steps
from halonet.models import HaloAttention, create_model
from halonet.ops import IMPLEMENTATIONS

IMAGE_SIZE, CLASSES = 256, 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The contestants that ratios are of and to, and ours of timm's conventions for H1.
OURS, BASE, OURS_AS_TIMM = "ours", "timm", "ours, timm's H1"
WITH_GRADIENTS = ("forward and backward", "training step")
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4


@dataclasses.dataclass(frozen=True)
class Layer:
    """An attention layer of H0 and H1, which have the same; `side` is its input's, in pixels."""

    side: int
    channels: int
    heads: int
    stride: int = 1
    block: int = 8
    halo: int = 3

    @property
    def head_dim(self):
        return self.channels // self.heads


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one benchmark: "cpu" in float32, or "cuda" in bfloat16 over float32 weights."""

    device: str
    batch: int

    @property
    def dtype(self):
        return jnp.dtype("bfloat16" if self.device == "cuda" else "float32")


# Ours and JAX -------------------------------------------------------------------------------------


class JaxProgram:
    """A jitted function of arguments, the first of which it may hand on to its next run."""

    def __init__(self, function, *arguments, parameters, carries=False):
        self._function, self._arguments = function, list(arguments)
        self._carries, self._compiled = carries, None
        self.parameters = sum(x.size for x in jax.tree.leaves(parameters))

    def run(self):
        """Compiles at first."""
        if self._compiled is None:
            jitted = jax.jit(self._function, donate_argnums=0 if self._carries else ())
            self._compiled = jitted.lower(*self._arguments).compile()
        out = self._compiled(*self._arguments)
        if self._carries:
            self._arguments[0] = out[0]
        jax.block_until_ready(out)

    def memory(self):
        """Bytes: of temporaries, and of these and what is returned in new buffers."""
        sizes = self._compiled.memory_analysis()
        temporaries = sizes.temp_size_in_bytes
        return temporaries, temporaries + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def _random(shape, dtype, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _layer_program(apply, params, layer, task, settings):
    """Of `apply(params, x)`, with the gradients of the parameters and of x if the task is both."""
    x = _random((settings.batch, layer.side, layer.side, layer.channels), settings.dtype)
    if task == "forward":
        return JaxProgram(apply, params, x, parameters=params)

    def both(params, x, cotangent):
        out, pull = jax.vjp(apply, params, x)
        return out, pull(cotangent)

    cotangent = _random(jax.eval_shape(apply, params, x).shape, settings.dtype, seed=1)
    return JaxProgram(both, params, x, cotangent, parameters=params)


def our_layer(layer, task, settings, implementation=None):
    """halonet.HaloAttention; `implementation` None is its own choice."""
    module = _module(layer, settings.dtype, implementation)
    apply = lambda params, x: module.apply({"params": params}, x)  # noqa: E731
    return _layer_program(apply, _init(module, layer), layer, task, settings)


def gather_layer(layer, task, settings):
    """The form that the public implementations have, in JAX: see `gather_form`."""
    apply = functools.partial(gather_form, layer=layer)
    params = _init(_module(layer, settings.dtype, None), layer)
    return _layer_program(apply, params, layer, task, settings)


def _module(layer, dtype, implementation):
    return HaloAttention(
        block_size=layer.block,
        halo_size=layer.halo,
        heads=layer.heads,
        head_dim=layer.head_dim,
        stride=layer.stride,
        out_projection=False,
        implementation=implementation,
        dtype=dtype,
    )


def _init(module, layer):
    x = jnp.zeros((1, layer.side, layer.side, layer.channels))
    return jax.jit(module.init)(jax.random.key(0), x)["params"]


def gather_form(params, x, *, layer):
    """What HaloAttention computes, as public implementations do: each window is copied, keys and
    values of a pixel up to (1 + 2 * halo / block)**2 times, and every logit is written to memory.

    Args:
      params: of HaloAttention without a projection of its output.
      x: (N, side, side, channels).
    """
    n, block, halo, stride = len(x), layer.block, layer.halo, layer.stride
    blocks, window = layer.side // block, block + 2 * halo
    kernels = {name: params[name]["kernel"].astype(x.dtype) for name in ("query", "key", "value")}
    rows, cols = (params[f"{axis}_table"].astype(x.dtype) for axis in ("row", "col"))
    queried = block // stride
    q = x[:, ::stride, ::stride] @ kernels["query"]
    q = q.reshape(n, blocks, queried, blocks, queried, layer.heads, layer.head_dim)
    q = q.transpose(0, 1, 3, 5, 2, 4, 6)  # n, block row and column, head, query row and column, d

    places = block * np.arange(blocks)[:, None] + np.arange(window)

    def windows(name):
        y = jnp.pad(x @ kernels[name], ((0, 0), (halo, halo), (halo, halo), (0, 0)))
        y = y[:, places[:, None, :, None], places[None, :, None, :]]
        return y.reshape(n, blocks, blocks, window, window, layer.heads, layer.head_dim)

    offsets = np.arange(window) - stride * np.arange(queried)[:, None] + block - 1
    logits = jnp.einsum("nabhyxd,nabuvhd->nabhyxuv", q, windows("key"))
    logits += jnp.einsum("nabhyxd,yud->nabhyxu", q, rows[offsets])[..., :, None]
    logits += jnp.einsum("nabhyxd,xvd->nabhyxv", q, cols[offsets])[..., None, :]
    logits = logits.astype(jnp.float32) * layer.head_dim**-0.5
    weights = jax.nn.softmax(logits, axis=(-2, -1)).astype(x.dtype)
    out = jnp.einsum("nabhyxuv,nabuvhd->naybxhd", weights, windows("value"))
    return out.reshape(n, layer.side // stride, layer.side // stride, layer.channels)


def our_model(name, task, settings):
    """A registered model in inference, or in a training step of the trainer's own."""
    model = create_model(name, num_classes=CLASSES, dtype=settings.dtype)
    tx = optim.make_optimizer(
        "sgd",
        learning_rate=lambda step: LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        clip_norm=0.0,
    )
    init = functools.partial(
        steps.init_state, init_fn=model.init, tx=tx, image_size=IMAGE_SIZE, ema=False
    )
    state = jax.jit(init)(jax.random.key(0))
    shape = (settings.batch, IMAGE_SIZE, IMAGE_SIZE, 3)
    if task == "inference":
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        apply = functools.partial(model.apply, train=False)
        images = _random(shape, jnp.float32)
        return JaxProgram(apply, variables, images, parameters=state.params)
    batch = {
        "image": jax.random.randint(jax.random.key(1), shape, 0, 256).astype(jnp.uint8),
        "label": jnp.arange(settings.batch) % CLASSES,
    }
    step = functools.partial(
        steps.train_step,
        apply_fn=model.apply,
        tx=tx,
        learning_rate=lambda step: LEARNING_RATE,
        mean=MEAN,
        std=STD,
        label_smoothing=0.0,
        ema_decay=0.0,
    )
    return JaxProgram(step, state, batch, parameters=state.params, carries=True)


# The peers and PyTorch ----------------------------------------------------------------------------


class TorchProgram:
    """A function of no arguments that PyTorch runs, eagerly or compiled."""

    def __init__(self, function, module, device):
        self._function, self._device = function, device
        self.parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)

    def run(self):
        import torch

        self._function()
        if self._device == "cuda":
            torch.cuda.synchronize()

    def memory(self):
        """None for temporaries alone, and the bytes at the peak above those at rest.

        Of PyTorch's allocator: on a CPU what a kernel takes for itself is not among them.
        """
        import torch

        if self._device == "cuda":
            at_rest = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            return None, torch.cuda.max_memory_allocated() - at_rest
        activities = [torch.profiler.ProfilerActivity.CPU]
        profile = torch.profiler.profile(activities=activities, profile_memory=True)
        with _silence(), profile:
            self.run()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return None, int(np.cumsum([0, *changes]).max())


@contextlib.contextmanager
def _silence():
    """Nothing on standard error, where PyTorch's profiler tells of itself from C++."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _torch_program(module, shape, task, settings, *, channels_last=False, compiled=False):
    """Of a layer or a model that takes maps of `shape`, (N, C, H, W)."""
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = module.to(settings.device, memory_format=layout)
    train = task in WITH_GRADIENTS
    module.train(train)
    x = torch.randn(shape, device=settings.device).to(memory_format=layout)
    called = torch.compile(module) if compiled else module

    def forward():
        # Off on a CPU: everything is float32 there.
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.device == "cuda"):
            return called(x)

    if not train:
        function = torch.inference_mode()(forward)
    elif task == "training step":
        labels = torch.arange(shape[0], device=settings.device) % CLASSES
        optimizer = torch.optim.SGD(
            module.parameters(),
            LEARNING_RATE,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=WEIGHT_DECAY,
            fused=True,  # the fastest of its forms
        )

        def function():
            logits = forward()
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    else:
        x.requires_grad_()
        with torch.no_grad():
            cotangent = torch.randn_like(forward())

        def function():
            forward().backward(cotangent)
            module.zero_grad(set_to_none=True)
            x.grad = None

    return TorchProgram(function, module, settings.device)


def _map_shape(layer, settings):
    return settings.batch, layer.channels, layer.side, layer.side


def import_timm():
    """timm, also where torchvision was built for CUDA and torch was not.

    Such a torchvision finds no operators in torch; nothing that is compared here calls them.
    """
    import torch

    try:
        import torchvision  # noqa: F401 (timm imports it)
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


def import_kecam():
    """keras_cv_attention_models on PyTorch; it chooses once, by the environment."""
    os.environ["KECAM_BACKEND"] = "torch"
    with contextlib.redirect_stdout(io.StringIO()):  # it announces the backend
        from keras_cv_attention_models import backend, halonet
    return backend, halonet


def timm_layer(layer, task, settings, **forms):
    """timm's HaloAttn."""
    from_timm = import_timm().layers.halo_attn.HaloAttn(
        layer.channels,
        stride=layer.stride,
        num_heads=layer.heads,
        block_size=layer.block,
        halo_size=layer.halo,
    )
    return _torch_program(from_timm, _map_shape(layer, settings), task, settings, **forms)


def lucidrains_layer(layer, task, settings):
    """halonet-pytorch's HaloAttention. It has no stride, and projects the keys and values of every
    window, after copying it."""
    import halonet_pytorch
    import torch

    module = halonet_pytorch.HaloAttention(
        dim=layer.channels,
        block_size=layer.block,
        halo_size=layer.halo,
        dim_head=layer.head_dim,
        heads=layer.heads,
    )
    module.to_out = torch.nn.Identity()
    return _torch_program(module, _map_shape(layer, settings), task, settings)


def kecam_layer(layer, task, settings):
    """The halo attention of keras_cv_attention_models, on its PyTorch backend."""
    backend, halonet = import_kecam()
    inputs = backend.layers.Input(_map_shape(layer, settings)[1:])
    outputs = halonet.halonet.halo_attention(
        inputs,
        num_heads=layer.heads,
        key_dim=layer.head_dim,
        block_size=layer.block,
        halo_size=layer.halo,
        strides=layer.stride,
        out_weight=False,
    )
    module = backend.models.Model(inputs, outputs)
    return _torch_program(module, _map_shape(layer, settings), task, settings)


def timm_model(name, task, settings, **forms):
    """timm's model of our name."""
    module = import_timm().create_model(name, num_classes=CLASSES)
    shape = (settings.batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    return _torch_program(module, shape, task, settings, **forms)


def kecam_model(task, settings):
    """kecam's H1 on PyTorch, with ReLU as the others have it (its default is swish)."""
    _, halonet = import_kecam()
    shape = (3, IMAGE_SIZE, IMAGE_SIZE)
    with contextlib.redirect_stdout(io.StringIO()):
        module = halonet.HaloNetH1(
            input_shape=shape,
            num_classes=CLASSES,
            activation="relu",
            classifier_activation=None,
            pretrained=None,
        )
    return _torch_program(module, (settings.batch, *shape), task, settings)


# Who competes, by name: functions of Settings that build a program --------------------------------


def of_layer(layer, task, device, compiled):
    """Those of an attention layer: ours in every form of this device, and the peers."""
    implementations = {OURS: None}
    for name in IMPLEMENTATIONS:
        if name.startswith("xla_") or (name == "pallas_gpu" and device == "cuda"):
            implementations[f"{OURS}, {name}"] = name
    makers = {
        name: functools.partial(our_layer, layer, task, implementation=implementation)
        for name, implementation in implementations.items()
    }
    makers["gather form in JAX"] = functools.partial(gather_layer, layer, task)
    for name, form in _timm_forms(task, device, compiled).items():
        makers[name] = functools.partial(timm_layer, layer, task, **form)
    makers["kecam"] = functools.partial(kecam_layer, layer, task)
    if layer.stride == 1:
        makers["lucidrains"] = functools.partial(lucidrains_layer, layer, task)
    return makers


def of_model(model, task, device, compiled):
    """Those of a model."""
    makers = {OURS: functools.partial(our_model, model, task)}
    if model == "halonet_h1":
        makers[OURS_AS_TIMM] = functools.partial(our_model, "timm_halonet_h1", task)
    for name, form in _timm_forms(task, device, compiled).items():
        makers[name] = functools.partial(timm_model, model, task, **form)
    if model == "halonet_h1":
        makers["kecam"] = functools.partial(kecam_model, task)
    return makers


def _timm_forms(task, device, compiled):
    """The ways in which PyTorch runs the same, by name, as options of timm_layer and timm_model.

    On a CPU torch.compile goes without gradients: with two threads the backward pass that PyTorch
    2.13 compiles for HaloAttn corrupts its heap ("double free"), and takes the whole run with it.
    """
    forms = {BASE: {}, f"{BASE}, channels_last": {"channels_last": True}}
    if compiled and (device == "cuda" or task not in WITH_GRADIENTS):
        forms[f"{BASE}, compiled"] = {"compiled": True}
        forms[f"{BASE}, compiled, channels_last"] = {"compiled": True, "channels_last": True}
    return forms


def is_ours(contestant):
    """Whether it is this library."""
    return contestant.split(",")[0] == OURS


def is_peer(contestant):
    """Whether it is another library; the gather form in JAX is neither."""
    return contestant.split(",")[0] in (BASE, "kecam", "lucidrains")
