"""MONAI's losses of volumes (N, C, X, Y, Z); a module of their own, since MONAI takes seconds to import."""

from pathlib import Path

from monai.losses import PatchAdversarialLoss
from monai.losses.perceptual import MedicalNetPerceptualSimilarity
from monai.networks.nets import PatchDiscriminator, ResNetFeatures
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm3d.config.training import AdversarialConfig
from ldm3d.errors import InputError
from ldm3d.models.pretrained import load_weights


class PerceptualLoss(MedicalNetPerceptualSimilarity):
    """MONAI's perceptual loss on the features of a MedicalNet ResNet-10 (Chen et al. 2019), without any download.

    Args:
        weights: safetensors file with the state dict of `monai.networks.nets.ResNetFeatures("resnet10",
            pretrained=False, spatial_dims=3, in_channels=1)`; MedicalNet's published file has these names behind "module.".

    Raises:
        InputError: no such file, not safetensors, or other weights.
    """

    def __init__(self, weights: Path | str):
        nn.Module.__init__(self)  # MONAI's own constructor fetches the network from the internet
        self.channel_wise = False
        features = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1)
        weights = Path(weights)
        if not weights.is_file():
            raise InputError(f"perceptual weights {weights} do not exist; give a safetensors file or drop `perceptual`")
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise InputError(
                f"perceptual weights {weights} are not safetensors ({error}); convert a PyTorch file with "
                "safetensors.torch.save_file(torch.load(file, weights_only=True)['state_dict'], new_file)"
            ) from None
        load_weights(features, {name.removeprefix("module."): value for name, value in state.items()}, weights)
        self.model = _Deepest(features)
        self.eval().requires_grad_(False)


class _Deepest(nn.Module):
    """The last of a feature network's maps."""

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]


class Adversary(nn.Module):
    """MONAI's patch discriminator with its least-squares loss (Isola et al. 2017; Mao et al. 2017).

    Instance norm, as in MONAI's bundles: with batch norm the losses would depend on how a batch is divided over processes and
    accumulated parts.
    """

    def __init__(self, config: AdversarialConfig, in_channels: int):
        super().__init__()
        self.discriminator = PatchDiscriminator(
            spatial_dims=3, channels=config.channels, in_channels=in_channels, num_layers_d=config.layers, norm="INSTANCE"
        )
        self.criterion = PatchAdversarialLoss(criterion="least_squares")

    def forward(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """The autoencoder's loss if real is None, else the discriminator's own."""
        if real is None:
            return self.criterion(self.discriminator(fake)[-1], target_is_real=True, for_discriminator=False)
        on_fake = self.criterion(self.discriminator(fake.detach())[-1], target_is_real=False, for_discriminator=True)
        on_real = self.criterion(self.discriminator(real)[-1], target_is_real=True, for_discriminator=True)
        return (on_fake + on_real) / 2
