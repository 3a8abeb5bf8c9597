"""How near a picture is to the one it should be: PSNR and SSIM of its pixels. NumPy alone, no model.

Both are of 8-bit RGB pictures of one size. How near two pictures are to a model's own eye is `embedding_error`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import correlate1d

from nexusgen.errors import ShapeError

MAX_PSNR = 100.0  # dB; of equal pictures it would be infinite, and so would every mean with one of them
_PEAK = 255.0
_RADIUS, _SIGMA = 5, 1.5  # the window: 11 x 11, Gaussian
_K1, _K2 = 0.01, 0.03


def psnr(picture: UInt8[np.ndarray, "height width 3"], reference: UInt8[np.ndarray, "height width 3"]) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels, at most `MAX_PSNR`.

    Raises: ShapeError if the sizes differ.
    """
    _check(picture, reference)
    error = float(np.square(picture.astype(np.float64) - reference).mean())
    return min(MAX_PSNR, float(10 * np.log10(_PEAK**2 / error))) if error else MAX_PSNR


def ssim(picture: UInt8[np.ndarray, "height width 3"], reference: UInt8[np.ndarray, "height width 3"]) -> float:
    """Structural similarity, in [-1, 1]: the mean over windows and, of each channel alone, over channels.

    Source: Wang et al., Image Quality Assessment, IEEE TIP 13 (4), 2004, section III.B, with its own settings: Gaussian
    windows of 11 x 11 (sigma 1.5) that lie inside the picture, K1 = 0.01, K2 = 0.03, covariances over the window's
    weights. scikit-image gives the same with gaussian_weights=True, use_sample_covariance=False.
    Raises: ShapeError if the sizes differ, or a side is shorter than a window.
    """
    _check(picture, reference)
    if min(picture.shape[:2]) <= 2 * _RADIUS:
        raise ShapeError(
            f"SSIM of {picture.shape[0]}x{picture.shape[1]} (h x w) pixels: its windows are {2 * _RADIUS + 1} pixels "
            "wide, and the picture must hold one; compare larger pictures"
        )
    first, second = picture.astype(np.float64), reference.astype(np.float64)
    mean_1, mean_2 = _smooth(first), _smooth(second)
    variance_1 = _smooth(first**2) - mean_1**2
    variance_2 = _smooth(second**2) - mean_2**2
    covariance = _smooth(first * second) - mean_1 * mean_2
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1**2 + mean_2**2 + c1)
    structure = (2 * covariance + c2) / (variance_1 + variance_2 + c2)
    return float((luminance * structure).mean())


def _smooth(values: Float[np.ndarray, "height width 3"]) -> Float[np.ndarray, "rows columns 3"]:
    """Weighted means over the windows that lie inside the picture, `_RADIUS` pixels fewer on each side."""
    window = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    window /= window.sum()
    smooth = correlate1d(correlate1d(values, window, axis=0), window, axis=1)
    return smooth[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]


def _check(picture: UInt8[np.ndarray, "..."], reference: UInt8[np.ndarray, "..."]) -> None:
    if picture.shape != reference.shape or picture.ndim != 3 or picture.shape[2] != 3:
        raise ShapeError(
            f"pictures of shapes {picture.shape} and {reference.shape} can't be compared: both must be RGB "
            "(height, width, 3) of one size"
        )
