"""PSNR and SSIM against scikit-image's numbers, and against what can be told without a computer."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from nexusgen.errors import ShapeError
from nexusgen.picture_quality import MAX_PSNR, psnr, ssim


def pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:height, :width]
    first = np.stack([(3 * x + 5 * y) % 256, (x * y) % 256, (7 * x) % 256], axis=-1)
    second = np.stack([(3 * x + 5 * y + 9) % 256, (x * y + x) % 256, (7 * x) // 2 % 256], axis=-1)
    return first.astype(np.uint8), second.astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "expected_ssim", "expected_psnr"),
    [
        # scikit-image 0.26.0: structural_similarity(a, b, data_range=255, gaussian_weights=True, sigma=1.5,
        # use_sample_covariance=False, channel_axis=2) and peak_signal_noise_ratio(a, b).
        ((11, 11), 0.8796291287173809, 25.476192973331266),
        ((24, 40), 0.7555276307736981, 13.061726390580237),
        ((96, 96), 0.5364160589056293, 10.941298777366375),
    ],
)
def test_both_are_scikit_images(size: tuple[int, int], expected_ssim: float, expected_psnr: float) -> None:
    first, second = pair(*size)
    assert ssim(first, second) == pytest.approx(expected_ssim, abs=1e-12)
    assert psnr(first, second) == pytest.approx(expected_psnr, abs=1e-12)
    assert ssim(first, second) == pytest.approx(ssim(second, first), abs=1e-12)


def test_even_pictures_differ_by_their_luminance_alone() -> None:
    first, second = (np.full((16, 16, 3), value, np.uint8) for value in (100, 120))
    c1 = (0.01 * 255) ** 2
    assert ssim(first, second) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), abs=1e-9)
    assert psnr(first, second) == pytest.approx(20 * np.log10(255 / 20), abs=1e-9)


def test_equal_pictures_are_the_best_and_an_inverse_is_worse_than_nothing() -> None:
    picture, _ = pair(32, 32)
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-12)
    assert psnr(picture, picture) == MAX_PSNR
    assert ssim(picture, 255 - picture) < 0


def test_pictures_that_cant_be_compared_are_refused() -> None:
    picture, _ = pair(32, 32)
    with pytest.raises((ShapeError, TypeCheckError), match="31"):  # annotations are checked in tests alone
        psnr(picture[:, :31], picture)
    with pytest.raises(ShapeError, match=r"10x32.*11 pixels wide"):
        ssim(picture[:10], picture[:10])
