"""The palette: its order, and whether its colours can be told apart."""

import numpy as np
import pytest

from spectr_demo import charts
from tests.charts.samples import rgb


def test_expert_colors_follow_the_order_and_repeat_after_twelve() -> None:
    colors = charts.expert_colors([f"e{index}" for index in range(13)])
    assert list(colors.values())[:12] == list(charts.PALETTE)
    assert colors["e12"] == colors["e0"]


# Machado, Oliveira & Fernandes (2009), severity 1.0, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Ottosson (2020): linear sRGB to cone responses, and their cube roots to OKLab.
TO_LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart_by_every_vision(vision: str) -> None:
    srgb = np.array([rgb(color) for color in charts.PALETTE]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    lab = np.cbrt(seen @ np.transpose(TO_LMS)) @ np.transpose(TO_LAB)
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(len(lab))
    # Okabe and Ito's own closest pair is at 0.076 (deuteranopia): the added five come no closer.
    assert distance.min() > 0.075
