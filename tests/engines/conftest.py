"""What the tests of engines share."""

import pytest
import torch

from vitdemo import Model, load_model, reference_crop

IMAGES = 60


@pytest.fixture(scope="session")
def crops(shapes20, vit_shapes20) -> torch.Tensor:
    """Images from all over shapes20, uint8[60, 3, 224, 224]."""
    step, preprocessing = len(shapes20) // IMAGES, vit_shapes20.info.preprocessing
    return torch.stack([reference_crop(shapes20[i * step].image, preprocessing) for i in range(IMAGES)])


@pytest.fixture(scope="session")
def resnet18() -> Model:
    return load_model("resnet18.tv_in1k", "random")
