"""VGG-16 with narrow layers, of GSE's CIFAR tables."""

from torch import Tensor, nn

POOL = 0
LAYERS = (16, 16, POOL, 32, 32, POOL, 64, 64, 64, POOL, 128, 128, 128, POOL, 128, 128, 128, POOL)
HIDDEN = 512


class SmallVGG16(nn.Module):
    """VGG-16 with BatchNorm for 32x32 images: convolutions a quarter, linear layers an eighth as wide.

    Of arXiv:2401.06898; all widths times `width`.
    """

    def __init__(self, classes: int = 10, width: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for outputs in (layer * width for layer in LAYERS):
            if outputs == POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        self.features = nn.Sequential(*layers)
        hidden = HIDDEN * width
        self.classifier = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
