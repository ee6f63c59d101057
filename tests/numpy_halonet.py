"""MindCV's halonet_50t in plain NumPy, float64: a second opinion written from its layers.

MindSpore runs that network on Ascend and GPU only (it has no window extraction for CPU). Nothing of
halonet/ is imported here. Maps are (N, C, H, W), arrays have MindCV's names.
"""

import numpy as np

DEPTHS = (3, 4, 6, 3)
BLOCK, HALO = 8, 3
HEADS = (0, 4, 8, 8)  # by stage


def forward(arrays, images):
    """Logits (N, num_classes) of images (N, 3, H, W)."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    x = images.astype(np.float64)
    for layer, stride in (("stem.conv1", 2), ("stem.conv2", 1), ("stem.conv3", 1)):
        x = silu(conv_norm(arrays, layer, x, stride))
    x = max_pool(x)
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True), start=1):
        for block in range(depth):
            name = f"stage{stage}.blocks.{block}"
            x = residual_block(arrays, name, x, heads, 2 if stage > 1 and block == 0 else 1)
    return x.mean((2, 3)) @ arrays["classifier.1.weight"].T + arrays["classifier.1.bias"]


def residual_block(arrays, name, x, heads, stride):
    y = silu(conv_norm(arrays, f"{name}.conv1_1x1", x))
    if f"{name}.conv2_kxk.conv.weight" in arrays:
        y = silu(conv_norm(arrays, f"{name}.conv2_kxk", y, stride))
    else:
        y = silu(norm(arrays, f"{name}.post_attn.bn", halo_attention(arrays, name, y, heads)))
    y = conv_norm(arrays, f"{name}.conv3_1x1", y)
    if f"{name}.creat_shortcut.conv.weight" in arrays:
        x = conv_norm(arrays, f"{name}.creat_shortcut", x, stride)
    return silu(y + x)


def halo_attention(arrays, name, x, heads):
    """Each block of 8x8 queries attends to the 14x14 pixels around it; beyond the map are zeros."""
    name = f"{name}.self_attn"
    q = conv(x, arrays[f"{name}.q.weight"])
    kv = conv(x, arrays[f"{name}.kv.weight"])
    n, channels, height, width = q.shape
    d = channels // heads
    window = BLOCK + 2 * HALO
    # Per head its d keys, then its values.
    kv = np.pad(kv, ((0, 0), (0, 0), (HALO, HALO), (HALO, HALO)))
    kv = kv.reshape(n, heads, -1, height + 2 * HALO, width + 2 * HALO)
    q = q.reshape(n, heads, d, height, width)
    # Key minus query, counted in the window: the top left query sits at the window's top left.
    offsets = np.arange(window) - np.arange(BLOCK)[:, None] + window - 1
    row_table = arrays[f"{name}.pos_embed.rel_height"][offsets]
    col_table = arrays[f"{name}.pos_embed.rel_width"][offsets]
    output = np.empty((n, heads, kv.shape[2] - d, height, width))
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            block = np.s_[:, :, :, top : top + BLOCK, left : left + BLOCK]
            near = kv[:, :, :, top : top + window, left : left + window]
            k, v = near[:, :, :d], near[:, :, d:]
            logits = np.einsum("nhdxy,nhdij->nhxyij", q[block], k, optimize=True) * d**-0.5
            logits += np.einsum("nhdxy,xid->nhxyi", q[block], row_table)[..., None]
            logits += np.einsum("nhdxy,yjd->nhxyj", q[block], col_table)[..., None, :]
            weights = np.exp(logits - logits.max((-2, -1), keepdims=True))
            weights /= weights.sum((-2, -1), keepdims=True)
            output[block] = np.einsum("nhxyij,nhdij->nhdxy", weights, v, optimize=True)
    return output.reshape(n, -1, height, width)


def conv_norm(arrays, name, x, stride=1):
    return norm(arrays, f"{name}.bn", conv(x, arrays[f"{name}.conv.weight"], stride))


def conv(x, kernel, stride=1):
    """kernel is (out, in, size, size); the map is padded with zeros by size // 2."""
    size = kernel.shape[-1]
    windows = all_windows(x, size, stride)
    return np.moveaxis(np.tensordot(windows, kernel, ((1, 4, 5), (1, 2, 3))), -1, 1)


def max_pool(x):
    """3x3, stride 2. The border is of zeros, not of minus infinity, and takes part."""
    return all_windows(x, 3, 2).max((-2, -1))


def all_windows(x, size, stride):
    """(N, C, H, W) -> (N, C, H/stride, W/stride, size, size), beyond the map zeros."""
    pad = size // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
    return windows[:, :, ::stride, ::stride]


def norm(arrays, name, x):
    mean, variance, scale, bias = (
        arrays[f"{name}.{leaf}"][:, None, None]
        for leaf in ("moving_mean", "moving_variance", "gamma", "beta")
    )
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias


def silu(x):
    return x / (1 + np.exp(-x))
