"""The demo's autoencoder: principal components of pixel patches behind AutoencoderKL's interface.

This file travels with the weights, so that plain diffusers opens the folder without this project:
`AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`. It therefore imports torch and diffusers alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from torch.nn import functional

_LOG_VARIANCE_OF_CERTAINTY = -30.0  # AutoencoderKL's own lower bound
_AUTO_MAP = {"AutoModel": "patch_autoencoder.PatchAutoencoder"}  # where diffusers finds the class: beside the weights


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Principal components of square pixel patches, arranged as latents of half a patch, four numbers of each channel.

    A patch's components become a 2x2 square of `latent_channels` channels, so that FLUX's 2x2 packing puts one patch
    into one token. Fitted by `fit_patch_autoencoder`, not trained. Has the parts of AutoencoderKL's interface that we
    use: `encode(x).latent_dist.mode()`, `decode(z).sample`, `config.{scaling_factor, shift_factor, latent_channels}`.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 32,
        patch_size: int = 16,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        auto_map: dict[str, str] = _AUTO_MAP,  # kept in the config
    ) -> None:
        super().__init__()
        shape = (3, patch_size, patch_size)
        self.components = nn.Parameter(torch.zeros(4 * latent_channels, *shape), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(shape), requires_grad=False)

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """`x`: pixels in [-1, 1], [batch, 3, height, width]. Raises: ValueError if a side isn't whole patches."""
        patch = self.mean.shape[-1]
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(f"image of {x.shape[-2]}x{x.shape[-1]} pixels: sides must be multiples of {patch}")
        offset = (self.components * self.mean).sum(dim=(1, 2, 3))
        numbers = functional.conv2d(x, self.components, -offset, stride=patch)
        mean = functional.pixel_shuffle(numbers, 2)
        parameters = torch.cat([mean, torch.full_like(mean, _LOG_VARIANCE_OF_CERTAINTY)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters, deterministic=True))

    def decode(self, z: Tensor) -> DecoderOutput:
        """`z`: unscaled latents [batch, channels, height, width]. Gives pixels of about [-1, 1]."""
        patch = self.mean.shape[-1]
        numbers = functional.pixel_unshuffle(z, 2)
        rows, columns = numbers.shape[-2:]
        pixels = functional.conv_transpose2d(numbers, self.components, stride=patch)
        return DecoderOutput(sample=pixels + self.mean.repeat(1, rows, columns))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As diffusers', and this file beside the weights."""
        super().save_pretrained(save_directory, **options)
        shutil.copyfile(__file__, Path(save_directory) / "patch_autoencoder.py")
