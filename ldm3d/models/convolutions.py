"""A way around wrong gradients of convolutions in bfloat16 on CPUs.

Where the first side of the input is smaller than the kernel, such as 2 and 3, oneDNN's gradient of a padded convolution's
weight (stride 1, in bfloat16) is wrong, often NaN: measured with PyTorch 2.13 and oneDNN 3.12 on a CPU with AVX512-BF16.
Padding by hand avoids it. Other inputs, the forward pass and the input's gradient are right.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PaddedConv3d(nn.Conv3d):
    """The same convolution; an input that is shorter than the kernel, in bfloat16 on a CPU, is padded by hand."""

    def forward(self, input: Tensor) -> Tensor:
        faulty = input.device.type == "cpu" and input.shape[2] < self.kernel_size[0] and torch.is_autocast_enabled("cpu")
        if not faulty or isinstance(self.padding, str):
            return super().forward(input)
        first, *others = self.padding
        padded = F.pad(input, (0, 0, 0, 0, first, first))
        return F.conv3d(padded, self.weight, self.bias, self.stride, (0, *others), self.dilation, self.groups)


def mend_convolutions(network: nn.Module) -> None:
    """Turn the convolutions of a network that the fault can concern into `PaddedConv3d`; parameters and names stay."""
    for module in network.modules():
        if type(module) is nn.Conv3d and module.padding_mode == "zeros" and module.stride[0] == 1:
            module.__class__ = PaddedConv3d
