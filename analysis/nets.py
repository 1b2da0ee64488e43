"""The built-in architectures, as plain modules, and the pretrained CIFAR-10 ResNets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ellq.analysis.dataset_sources import search_roots

PRETRAINED_DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet44": 44}
PRETRAINED_MEAN = (0.485, 0.456, 0.406)
"""What the pretrained nets subtract from R, G and B in [0, 1]."""
PRETRAINED_STD = (0.229, 0.224, 0.225)
"""What the pretrained nets then divide R, G and B by."""

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def mlp(inputs: int, *hidden: int, outputs: int, activation: str = "relu") -> nn.Sequential:
    """Build a multilayer perceptron: Flatten, then Linear and activation for each hidden width, then Linear.

    Args:
        inputs: the number of features of an example once flattened, ≥ 1.
        *hidden: the hidden widths in order, each ≥ 1; none for a linear model.
        outputs: the number of outputs, ≥ 1.
        activation: "relu", "leaky_relu", "gelu", "silu", "tanh" or "sigmoid".

    Returns:
        The net, with torch's default initialisation.

    Raises:
        ValueError: a width below 1, or an unknown activation.
    """
    _require_positive(inputs=inputs, outputs=outputs)
    for width in hidden:
        _require_positive(hidden=width)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown. Choose one of {', '.join(_ACTIVATIONS)}.")
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, after), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], outputs))


def small_conv(
    channels: int, size: int, outputs: int, widths: Sequence[int] = (16, 32), hidden: int = 64
) -> nn.Sequential:
    """Build a small convolutional net: 3x3 convolutions with ReLU, 2x2 average pooling, two Linear layers.

    Args:
        channels: of the images, ≥ 1.
        size: height and width of the images, ≥ 2; the last row and column of an odd size are not pooled.
        outputs: the number of outputs, ≥ 1.
        widths: the number of filters of each convolution, at least one.
        hidden: the width of the hidden Linear layer, ≥ 1.

    Returns:
        The net, with torch's default initialisation. Neither batch norm nor max pooling: both would only
        complicate its bounds.

    Raises:
        ValueError: a number below these limits.
    """
    _require_positive(channels=channels, outputs=outputs, hidden=hidden)
    if size < 2:
        raise ValueError(f"size={size} leaves nothing after 2x2 pooling. Pass size >= 2.")
    if not widths:
        raise ValueError("widths is empty. Pass the number of filters of at least one convolution.")
    layers: list[nn.Module] = []
    for before, after in zip((channels, *widths), widths, strict=False):
        _require_positive(widths=after)
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    features = widths[-1] * (size // 2) ** 2
    head = (nn.AvgPool2d(2), nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return nn.Sequential(*layers, *head)


def cifar_resnet(depth: int, *, outputs: int = 10) -> CifarResNet:
    """Build the ResNet of He et al. for 32x32 images, with widths 16, 32 and 64 and the option-A shortcut.

    Args:
        depth: the number of weight layers, 6n + 2 with n ≥ 1: 20, 32, 44, 56, 110, …
        outputs: the number of outputs, ≥ 1.

    Returns:
        The net, initialised as in the paper.

    Raises:
        ValueError: depth is not 6n + 2, or outputs < 1.

    Reference: He, Zhang, Ren & Sun 2015, Deep Residual Learning for Image Recognition, Section 4.2.
    """
    _require_positive(outputs=outputs)
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth={depth} is not 6n + 2 with n >= 1. Choose 8, 14, 20, 32, 44, 56 or 110.")
    return CifarResNet(blocks, outputs)


VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512)
"""Filters of the 13 convolutions of the CIFAR-10 VGG-16, and the width of its hidden Linear layer."""


def vgg16_cifar10(widths: Sequence[int] | None = None, *, outputs: int = 10) -> Vgg16:
    """Build the VGG-16 for 32x32 images that compression papers use: 13 convolutions, two Linear layers.

    Args:
        widths: the number of filters of each of the 13 convolutions, then the width of the hidden Linear layer, each
            ≥ 1; None for ``VGG16_WIDTHS``, 14,987,722 parameters with 10 outputs.
        outputs: the number of outputs, ≥ 1.

    Returns:
        The net; convolutions initialised as in He et al. 2015, the rest by torch.

    Raises:
        ValueError: not 14 widths, or a number below 1.

    Reference: Liu, Sun, Zhou, Huang & Darrell 2019, Rethinking the Value of Network Pruning: the net without the
    second hidden layer of Simonyan & Zisserman 2015, and with batch norm.
    """
    widths = VGG16_WIDTHS if widths is None else tuple(widths)
    _require_positive(outputs=outputs)
    if len(widths) != len(VGG16_WIDTHS):
        raise ValueError(
            f"widths has {len(widths)} entries. Pass {len(VGG16_WIDTHS)}: 13 convolutions and the hidden Linear layer."
        )
    for width in widths:
        _require_positive(widths=width)
    return Vgg16(widths, outputs)


def pretrained(name: str, root: str | Path | None = None) -> CifarResNet:
    """Load a ResNet trained on CIFAR-10, in eval mode.

    It expects RGB in [0, 1] normalised by PRETRAINED_MEAN and PRETRAINED_STD. The weights are those of
    github.com/akamaster/pytorch_resnet_cifar10.

    Args:
        name: "resnet20", "resnet32" or "resnet44".
        root: the folder that holds ``cifar10-resnets/NAME.safetensors``; None for the one the environment
            variable ELLQ_DATA names. ellq's cache is searched last.

    Returns:
        The net on the CPU.

    Raises:
        ValueError: unknown name, or a file that does not hold these weights.
        FileNotFoundError: the file is nowhere.
    """
    if name not in PRETRAINED_DEPTHS:
        raise ValueError(f"name={name!r} is not a pretrained net. Choose {', '.join(PRETRAINED_DEPTHS)}.")
    places = [folder / "cifar10-resnets" / f"{name}.safetensors" for folder in search_roots(root)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"Pretrained net '{name}' is in none of {', '.join(str(place) for place in places)}. "
            f"Set ELLQ_DATA to the folder that holds 'cifar10-resnets'."
        )
    net = cifar_resnet(PRETRAINED_DEPTHS[name])
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"'{path}' does not hold the weights of {name} ({error}). Replace the file.") from error
    return net.eval()


class ZeroPadShortcut(nn.Module):
    """The option-A shortcut: every second row and column, with channels of zeros on both sides.

    Args:
        before: the number of channels of zeros put first.
        after: the number of channels of zeros put last.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, h, w) to (n, before + c + after, ⌈h/2⌉, ⌈w/2⌉)."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Say the two numbers where the module is printed."""
        return f"before={self.before}, after={self.after}"


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the shortcut: ReLU(bn2(conv2(ReLU(bn1(conv1 x)))) + x).

    Args:
        planes_in: the number of channels it reads.
        planes: the number of channels it writes; where it is larger, the block halves height and width.
    """

    def __init__(self, planes_in: int, planes: int) -> None:
        super().__init__()
        widens = planes != planes_in
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride=2 if widens else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = ZeroPadShortcut(planes // 4, planes // 4) if widens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, planes_in, h, w) to (n, planes, h, w), or to half the height and width."""
        residual = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(residual + self.shortcut(x))


class CifarResNet(nn.Module):
    """The ResNet that `cifar_resnet` builds.

    Args:
        blocks: the number of residual blocks in each of the three layers, ≥ 1.
        outputs: the number of outputs.
    """

    def __init__(self, blocks: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _layer(16, 16, blocks)
        self.layer2 = _layer(16, 32, blocks)
        self.layer3 = _layer(32, 64, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, h, w) to logits (n, outputs)."""
        features = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits


class Vgg16(nn.Module):
    """The VGG-16 that `vgg16_cifar10` builds.

    Args:
        widths: of the 13 convolutions and the hidden Linear layer.
        outputs: the number of outputs.
    """

    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        *filters, hidden = widths
        layers: list[nn.Module] = []
        for place, (before, after) in enumerate(zip((3, *filters), filters, strict=False)):
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
            if place in (1, 3, 6, 9):  # the last pooling, an average, is in forward
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(filters[-1], hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, 32, 32) to logits (n, outputs)."""
        logits: Tensor = self.classifier(functional.avg_pool2d(self.features(x), 2).flatten(1))
        return logits


def _layer(planes_in: int, planes: int, blocks: int) -> nn.Sequential:
    rest = (ResidualBlock(planes, planes) for _ in range(blocks - 1))
    return nn.Sequential(ResidualBlock(planes_in, planes), *rest)


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} is below 1. Pass {name} >= 1.")
