"""Decoding a latent in parts, exactly.

A volume passes through the decoder as a stream of chunks, slabs of whole planes along X. Each layer is a generator: it pulls
chunks from the layer before and yields its own. A 3x3x3 convolution holds on to the two planes it still needs, a residual
connection to the planes that its branch has not answered yet, and everything else looks at one position alone. So nothing
is approximated or computed twice, there are no seams, and memory grows with the area of a plane, not with the volume.

Group normalisation and attention look at the whole volume: they let everything in, and then out again chunk by chunk, each
freed once it is used. MONAI's decoders so hold two feature maps of a residual block at their peak, or one before it.

A generator that waits keeps its variables alive: so layers are functions that are mapped over chunks, wherever they can be.

Whole and streamed decoding agree to rounding, not bit for bit; chunks of the same size give the same bits.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm3d.errors import InputError
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.blocks import ChannelNorm, ResBlock, TransformerBlock, convolve_to_voxels, depth_to_space
from ldm3d.models.planes import Chunks, Planes, cut, joined, placed, slabs_of, windows_of

SILU = nn.SiLU(inplace=True)  # on the fresh output of a norm or convolution, which nothing else refers to

# Between two layers. Larger ones are no faster on a CPU; a GPU needs them, to have all of its units at work.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 32 * 2**20}


@torch.no_grad()
def decode_streamed(autoencoder: nn.Module, z: Tensor, chunk_bytes: int | None = None) -> Tensor:
    """What `autoencoder.decode(z)` gives, in little memory.

    Args:
        autoencoder: an `Autoencoder`, a `MonaiAutoencoder`, or an AutoencoderKL of MONAI or monai-generative itself.
        z: latents as `decode` takes them, (N, c, X/f, Y/f, Z/f), in the network's dtype and on its device.
        chunk_bytes: about what a chunk between two layers takes (never less than a plane); None: see CHUNK_BYTES.

    Returns:
        Volumes (N, C, X, Y, Z), float32, not clipped.

    Raises:
        InputError: a decoder with a layer that is not known here.
    """
    limit = chunk_bytes or chunk_bytes_of(z.device)
    if isinstance(autoencoder, Autoencoder):
        z = autoencoder.apart(z)
    volume = z.new_empty(0)
    for start, chunk in placed(_decoded(autoencoder, z, limit)):
        if start == 0:
            n, c, _, y, z_ = chunk.shape
            volume = z.new_empty((n, c, z.shape[2] * (y // z.shape[3]), y, z_), dtype=torch.float32)
        volume.narrow(2, start, chunk.shape[2]).copy_(chunk)
    if isinstance(autoencoder, Autoencoder) and autoencoder.synthesis is not None:
        linear = _to_voxels(iter([z]), autoencoder.synthesis, limit)
        for start, chunk in placed(depth_to_space(chunk, autoencoder.downsampling) for chunk in linear):
            volume.narrow(2, start, chunk.shape[2]).add_(chunk)
    return autoencoder.beside(volume) if isinstance(autoencoder, Autoencoder) else volume


def chunk_bytes_of(device: torch.device) -> int:
    """The size of chunks that suits a device."""
    return CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]


def _decoded(autoencoder: nn.Module, z: Tensor, limit: int) -> Chunks:
    """The network's share of a volume, without the linear path."""
    if isinstance(autoencoder, Autoencoder):
        chunks = _through([autoencoder.decoder], iter([z]), limit)
        last = _to_voxels if autoencoder.synthesis is None else _convolve
        return (depth_to_space(chunk, autoencoder.stem) for chunk in last(chunks, autoencoder.to_voxels, limit))
    network: Any = getattr(autoencoder, "network", autoencoder)  # MonaiAutoencoder wraps what it builds
    *blocks, last = network.decoder.blocks
    return _to_voxels(_through([network.post_quant_conv, *blocks], iter([z]), limit), last.conv, limit)


def _through(layers: Sequence[nn.Module], chunks: Chunks, limit: int) -> Chunks:
    """A stream through one layer after the other."""
    for layer in layers:
        chunks = _layer(layer, chunks, limit)
    return chunks


def _layer(layer: Any, chunks: Chunks, limit: int) -> Chunks:
    """A stream through a layer, which is known by its type; MONAI's blocks, which two libraries define, by their parts."""
    match layer:
        case nn.Conv3d(kernel_size=(3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1), dilation=(1, 1, 1), groups=1):
            return _convolve(chunks, layer, limit)
        case nn.ConvTranspose3d(kernel_size=(2, 2, 2), stride=(2, 2, 2), padding=(0, 0, 0)):
            return map(layer, cut(chunks, 8 * layer.out_channels, limit))
        case nn.ConvTranspose3d(kernel_size=(3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1), output_padding=(1, 1, 1)):
            return _convolve_transposed(chunks, layer, limit)
        case nn.Conv3d(kernel_size=(1, 1, 1)) | ChannelNorm() | nn.SiLU() | nn.Identity():
            return map(layer, chunks)
        case nn.GroupNorm():
            return _normalise(chunks, layer, limit)
        case ResBlock():
            return _residual([layer.norm, layer.conv1, SILU, layer.conv2], nn.Identity(), chunks, limit)
        case TransformerBlock():
            return _whole(layer, chunks)
    parts = {name for name, _ in layer.named_children()}
    if {"norm1", "conv1", "norm2", "conv2", "nin_shortcut"} == parts:
        branch = [layer.norm1, SILU, layer.conv1, layer.norm2, SILU, layer.conv2]
        return _residual(branch, layer.nin_shortcut, chunks, limit)
    if parts == {"upsample_non_trainable", "postconv"}:  # MONAI
        return _upsample(chunks, layer.postconv.conv, limit)
    if parts == {"conv"} and getattr(layer, "use_convtranspose", None) is False:  # monai-generative
        return _upsample(chunks, layer.conv.conv, limit)
    if "norm" in parts and parts & {"attn", "to_q"}:
        return _whole(layer, chunks)
    if isinstance(layer, nn.Sequential) or parts == {"conv"}:
        return _through(list(layer.children()), chunks, limit)
    raise InputError(
        f"a decoder with {type(layer).__name__} cannot be streamed, how its planes depend on each other is not known; "
        'decode it whole (decode_mode="whole")'
    )


# Layers that look at neighbours


def _convolve(chunks: Chunks, conv: nn.Conv3d, limit: int) -> Chunks:
    """A 3x3x3 convolution with zeros around the volume."""
    weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)
    windows = windows_of(chunks, 1, 1, conv.out_channels, limit)
    return map(lambda window: F.conv3d(window, weight, conv.bias, padding=(0, 1, 1)), windows)


def _to_voxels(chunks: Chunks, conv: nn.Conv3d, limit: int) -> Chunks:
    """A 3x3x3 convolution whose output is the image."""
    windows = windows_of(chunks, 1, 1, conv.out_channels, limit)
    return map(lambda window: convolve_to_voxels(window, conv, padding=(0, 1, 1)), windows)


def _convolve_transposed(chunks: Chunks, conv: nn.ConvTranspose3d, limit: int) -> Chunks:
    """A transposed 3x3x3 convolution of stride 2: plane i makes planes 2i and 2i + 1, the latter with help of i + 1."""
    weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)

    def convolve(window: Tensor) -> Tensor:
        wider = F.conv_transpose3d(window, weight, conv.bias, stride=2, padding=(0, 1, 1), output_padding=(0, 1, 1))
        return wider[:, :, 1:-2]

    return map(convolve, windows_of(chunks, 0, 1, 8 * conv.out_channels, limit))


def _upsample(chunks: Chunks, conv: nn.Conv3d, limit: int) -> Chunks:
    """Nearest-neighbour upsampling by 2 and a 3x3x3 convolution, from the coarse planes alone.

    Along an axis the fine voxel 2i sees the coarse ones i - 1, i, i, and 2i + 1 sees i, i, i + 1. So each of the 8 parities is
    a 2x2x2 convolution of the coarse planes, with taps of the kernel summed: 8 x 8 products for 8 voxels, not 8 x 27.
    """
    c = conv.out_channels
    taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=conv.weight.device)
    kernels = torch.einsum("oixyz, aux, bvy, cwz -> abcoiuvw", conv.weight.float(), taps, taps, taps).to(conv.weight.dtype)
    # One convolution for the four parities of Y and Z: it reads its input once
    halves = [kernel.flatten(0, 2).contiguous(memory_format=torch.channels_last_3d) for kernel in kernels]
    bias = None if conv.bias is None else conv.bias.repeat(4)

    def convolve(window: Tensor) -> Tensor:
        n, _, x, y, z = window.shape
        fine = window.new_empty((n, 2 * x - 4, 2 * y, 2 * z, c)).movedim(-1, 1)
        for i, kernel in enumerate(halves):
            part = F.conv3d(window[:, :, i : i + x - 1], kernel, bias, padding=(0, 1, 1))  # (N, 4c, x - 2, Y + 1, Z + 1)
            for j, quarter in enumerate(part.split(c, dim=1)):
                k, m = divmod(j, 2)
                fine[:, :, i::2, k::2, m::2] = quarter[:, :, :, k : k + y, m : m + z]
        return fine

    return map(convolve, windows_of(chunks, 1, 1, 8 * c, limit))


def _residual(branch: Sequence[nn.Module], skip: nn.Module, chunks: Chunks, limit: int) -> Chunks:
    """skip(x) + branch(x), whose answers come later than x."""
    waiting = Planes()

    def remember(chunk: Tensor) -> Tensor:
        waiting.put(skip(chunk))
        return chunk

    def add(chunk: Tensor) -> Tensor:
        for start, part in placed(iter(waiting.take(chunk.shape[2]))):
            chunk.narrow(2, start, part.shape[2]).add_(part)
        return chunk

    if isinstance(branch[0], nn.GroupNorm):  # it keeps x until it has seen all of it, so remember what leaves
        answers = _through(branch[1:], _normalise(chunks, branch[0], limit, remember), limit)
    else:
        answers = _through(branch, map(remember, chunks), limit)
    return map(add, answers)


# Layers that look at everything


def _whole(layer: nn.Module, chunks: Chunks) -> Chunks:
    """A layer that needs all planes at once: attention, at coarse levels."""
    yield layer(joined(list(chunks)).contiguous())


def _normalise(
    chunks: Chunks, norm: nn.GroupNorm, limit: int, leaving: Callable[[Tensor], Tensor] = lambda slab: slab
) -> Chunks:
    """Group normalisation (Wu & He 2018) with the statistics of the whole volume.

    `leaving` is called with all planes on their way out, before they are normalised.

    The statistics are pooled from those of the chunks: the mean of their means; their variances and that of their means
    (Chan et al. 1983).
    """
    kept: deque[Tensor] = deque()
    means, variances, planes = [], [], []

    def keep(slab: Tensor) -> Tensor:
        kept.append(slab)
        return slab

    for chunk in cut(map(keep, slabs_of(chunks)), 1, limit):
        mean, variance = _moments(chunk)
        means.append(mean)
        variances.append(variance)
        planes.append(chunk.shape[2])
    del chunk
    chunk_means, chunk_variances = torch.stack(means), torch.stack(variances)  # (chunks, N, C)
    weights = chunk_means.new_tensor(planes)[:, None, None] / sum(planes)

    def pooled(x: Tensor) -> Tensor:
        """Over the chunks and the channels of a group, (N, C)."""
        groups = (weights * x).sum(dim=0).unflatten(1, (norm.num_groups, -1))
        return groups.mean(dim=2, keepdim=True).expand_as(groups).flatten(1)

    mean = pooled(chunk_means)
    variance = pooled(chunk_variances + (chunk_means - mean) ** 2)
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    moments = list(zip(mean.to(dtype), variance.to(dtype)))
    weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
    slabs = (leaving(kept.popleft()) for _ in range(len(kept)))
    for chunk in cut(slabs, 1, limit):
        samples = [F.batch_norm(x, *of_x, weight, bias, eps=norm.eps) for x, of_x in zip(chunk.split(1), moments)]
        yield samples[0] if len(samples) == 1 else torch.cat(samples)


def _moments(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each sample and channel, (N, C), float64.

    From batch normalisation of one sample, which reads it much faster than torch.var_mean.
    """
    dtype = torch.promote_types(chunk.dtype, torch.float32)  # of weights; half precision comes with these
    one, zero = (torch.full(chunk.shape[1:2], value, dtype=dtype, device=chunk.device) for value in (1, 0))
    found = [torch.native_batch_norm(x, one, zero, None, None, True, 0.0, 0.0)[1:] for x in chunk.split(1)]
    means, inverse_deviations = (torch.stack(values).double() for values in zip(*found))
    return means, inverse_deviations**-2
