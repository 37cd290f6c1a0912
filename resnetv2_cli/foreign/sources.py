"""Layer names of residual networks in other code bases, as data; and what cannot be imported.

To add a code base: one row in SOURCES. Nothing here needs torch. In a pattern s is the stage, u the
unit in it and k the weight layer of F, all counted from 1; K is the number of weight layers of F.
"""

from typing import NamedTuple

Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of channels of 0..1

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CAFFE = ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255))
CIFAR_HYSTS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR_BEARPAW = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR_FB = ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))
CIFAR100_HYSTS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
CIFAR100_FB = ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255))


class Refusal(NamedTuple):
    """A network that cannot be imported, and ``why``: one of its tensors' names matches ``has`` and
    none ``lacks`` (regular expressions). Where a network that can be imported has such names too,
    ``file`` must also match the file's name."""

    has: str
    lacks: str
    why: str
    file: str = ""


class Network(NamedTuple):
    """A kind of network that can be built here; its tensors' names identify it and its layers."""

    doc: str
    has: str  # a regular expression that at least one name matches
    lacks: str  # one that no name matches; empty: no condition
    settings: dict[str, str]  # of the experiment that builds it here
    keys: dict[str, str]  # our name: its name there; the first match counts
    normalize: Normalization
    biased: bool = False  # whether convolutions have biases, which the next BN absorbs
    epsilon: float = 1e-5  # of BN; a difference from ours goes into the variance
    bgr: bool = False  # whether channels are in the order blue, green, red
    normalize_100: Normalization | None = None  # with 100 classes, if different

    def normalization(self, classes: int) -> Normalization:
        """What the network was trained with; its number of classes tells the dataset."""
        return self.normalize_100 if self.normalize_100 and classes == 100 else self.normalize


class Source(NamedTuple):
    """A code base: its networks, and those known to have no counterpart here."""

    doc: str
    networks: tuple[Network, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    shapes: str = "a network of another width"  # why a tensor may have another shape


UNIT = "body.stage{s}.unit{u}."
POST = {"unit": "original"}
PRE = {"unit": "full-preact"}
IN_IMAGENET = {"stem": "imagenet"}
IN_CIFAR = {"stem": "cifar", "normalize": "channel"}
ON_3X3 = {"stride_on": "3x3"}

_RESNET = {  # torchvision's names, which many adopted
    "stem.conv": "conv1",
    "stem.act.bn": "bn1",
    UNIT + "residual.conv{k}": "layer{s}.{u-1}.conv{k}",
    UNIT + "residual.act{k}.bn": "layer{s}.{u-1}.bn{k-1}",
    UNIT + "residual.last.bn": "layer{s}.{u-1}.bn{K}",
    UNIT + "shortcut.carry.conv": "layer{s}.{u-1}.downsample.0",
    UNIT + "shortcut.carry.act.bn": "layer{s}.{u-1}.downsample.1",
    "head.fc": "fc",
}

_TIMM_V2 = {
    "stem.conv": "stem.conv",
    UNIT + "shared.bn": "stages.{s-1}.blocks.{u-1}.norm1",
    UNIT + "residual.conv{k}": "stages.{s-1}.blocks.{u-1}.conv{k}",
    UNIT + "residual.act{k}.bn": "stages.{s-1}.blocks.{u-1}.norm{k}",
    UNIT + "shortcut.carry.conv": "stages.{s-1}.blocks.{u-1}.downsample.conv",
    "head.act.bn": "norm",
    "head.fc": "head.fc",
}

_HYSTS = {
    "stem.conv": "conv",
    UNIT + "residual.conv{k}": "stage{s}.block{u}.conv{k}",
    UNIT + "shortcut.carry.conv": "stage{s}.block{u}.shortcut.conv",
    "head.fc": "fc",
}
_HYSTS_POST = _HYSTS | {
    "stem.act.bn": "bn",
    UNIT + "residual.act{k}.bn": "stage{s}.block{u}.bn{k-1}",
    UNIT + "residual.last.bn": "stage{s}.block{u}.bn{K}",
    UNIT + "shortcut.carry.act.bn": "stage{s}.block{u}.shortcut.bn",
}
_HYSTS_PRE = _HYSTS | {
    "stem.act.bn": "stage1.block1.bn1",  # acts before the first unit splits
    UNIT + "shared.bn": "stage{s}.block{u}.bn1",
    UNIT + "residual.act{k}.bn": "stage{s}.block{u}.bn{k}",
    "head.act.bn": "bn",
}

_KERAS = {
    "stem.conv": "conv1_conv",
    "stem.act.bn": "conv1_bn",
    UNIT + "residual.conv{k}": "conv{s+1}_block{u}_{k}_conv",
    UNIT + "residual.act{k}.bn": "conv{s+1}_block{u}_{k-1}_bn",
    UNIT + "residual.last.bn": "conv{s+1}_block{u}_{K}_bn",
    UNIT + "shortcut.carry.conv": "conv{s+1}_block{u}_0_conv",
    UNIT + "shortcut.carry.act.bn": "conv{s+1}_block{u}_0_bn",
    "head.fc": "predictions",
}


def _torch7(stages: int, fc: str) -> dict[str, str]:
    """Names of a post-activation network: positions in Torch7's containers, counted from 0; stage s
    is container ``stages`` + s."""
    unit = f"{{s+{stages}}}.{{u-1}}."
    return {
        "stem.conv": "0",
        "stem.act.bn": "1",
        UNIT + "residual.conv{k}": unit + "0.0.{3k-3}",
        UNIT + "residual.act{k}.bn": unit + "0.0.{3k-5}",
        UNIT + "residual.last.bn": unit + "0.0.{3K-2}",
        UNIT + "shortcut.carry.conv": unit + "0.1.0",
        UNIT + "shortcut.carry.act.bn": unit + "0.1.1",
        "head.fc": fc,
    }


def _torch7_pre(stages: int, head: str, fc: str, first: dict[str, str]) -> dict[str, str]:
    """The same for a pre-activation network: a stage's first unit activates before the split."""
    unit, begins = f"{{s+{stages}}}.{{u-1}}.", f"{{s+{stages}}}.0."
    return {
        "stem.conv": "0",
        **first,
        "body.stage{s}.unit1.shared.bn": begins + "0",
        "body.stage{s}.unit1.residual.conv{k}": begins + "2.0.{3k-3}",
        "body.stage{s}.unit1.residual.act{k}.bn": begins + "2.0.{3k-5}",
        "body.stage{s}.unit1.shortcut.carry.conv": begins + "2.1.0",
        UNIT + "residual.conv{k}": unit + "0.0.{3k-1}",
        UNIT + "residual.act{k}.bn": unit + "0.0.{3k-3}",
        "head.act.bn": head,
        "head.fc": fc,
    }


_FB_FIRST_IMAGENET = {  # the stem activates, as here
    "stem.act.bn": "1",
    "body.stage1.unit1.residual.conv{k}": "4.0.0.0.{3k-3}",
    "body.stage1.unit1.residual.act{k}.bn": "4.0.0.0.{3k-5}",
    "body.stage1.unit1.shortcut.carry.conv": "4.0.0.1.0",
}

_TORCHVISION = Network(
    "ResNet (post-activation)",
    r"^layer4\.0\.bn1\.weight$",
    "",
    POST | ON_3X3 | IN_IMAGENET,
    _RESNET,
    IMAGENET,
)
_DEEP_STEM = "its stem is three 3x3 convolutions; every one here is a single convolution"
_EARLY_FB = (
    "it is of the first preresnet.lua (until 2016-04-30): projections with BN that read the raw "
    "input, and a first stage without pre-activation; no unit here is like that"
)

SOURCES = {
    "torchvision": Source(
        "torchvision.models.resnet18 ... resnet152",
        (_TORCHVISION,),
        (Refusal(r"^conv1\.0\.", "", _DEEP_STEM),),
        "wide_resnet* and resnext* have other widths or groups; resnet18 ... 152 can be imported",
    ),
    "timm": Source(
        "timm's resnetv2_18 ... resnetv2_152 with BatchNorm, and its resnet18 ... resnet152",
        (
            Network(
                "ResNetV2 (pre-activation)",
                r"^stem\.conv\.weight$",
                "",
                PRE | ON_3X3 | IN_IMAGENET | {"option": "B", "first_act": "unit"},
                _TIMM_V2,
                INCEPTION,
            ),
            _TORCHVISION,
        ),
        (
            Refusal(
                r"^norm\.weight$",
                r"^norm\.running_mean$",
                "it is like BiT: GroupNorm and standardized weights, where this tool has the "
                "paper's BN and plain convolutions; resnetv2_50, resnetv2_101, ... can be imported",
            ),
            Refusal(
                r"^bn1\.weight$",
                r"\.running_mean$",
                "it has GroupNorm, where this tool has the paper's BN; resnet18 ... 152 can be "
                "imported",
            ),
            Refusal(r"^stem\.conv1\.|^conv1\.0\.", "", _DEEP_STEM),
            Refusal(
                r"^layer4\.",
                "",
                "its pooling blurs, which tensors do not show (resnetaa*, resnetblur*)",
                r"resnet(aa|blur)",
            ),
        ),
        "resnetv2_50x3, wide_resnet* and resnext* have other widths or groups",
    ),
    "fb": Source(
        "fb.resnet.torch's resnet.lua and preresnet.lua, as tensors named by their positions",
        (
            Network(
                "preresnet.lua on ImageNet",
                r"^8\.running_mean$",
                "",
                PRE | ON_3X3 | IN_IMAGENET,
                _torch7_pre(3, "8", "12.1", _FB_FIRST_IMAGENET),
                IMAGENET,
            ),
            Network(
                "preresnet.lua on CIFAR",
                r"^4\.running_mean$",
                "",
                PRE | IN_CIFAR | {"pad": "activated"},
                _torch7_pre(0, "4", "8.1", {"stem.act.bn": "1.0.0"}),
                CIFAR_FB,
                normalize_100=CIFAR100_FB,
            ),
            Network(
                "resnet.lua on ImageNet",
                r"^10\.1\.weight$",
                "",
                POST | ON_3X3 | IN_IMAGENET,
                _torch7(3, "10.1"),
                IMAGENET,
            ),
            Network(
                "resnet.lua on CIFAR",
                r"^8\.1\.weight$",
                r"^4\.running_mean$",
                POST | IN_CIFAR,
                _torch7(2, "8.1"),
                CIFAR_FB,
                normalize_100=CIFAR100_FB,
            ),
        ),
        (Refusal(r"^[3-7]\.0\.0\.1\.1\.running_mean$", r"^10\.1\.|^8\.1\.", _EARLY_FB),),
    ),
    "keras": Source(
        "keras.applications.ResNet50, ResNet101 and ResNet152",
        (
            Network(
                "ResNet (post-activation)",
                r"^conv1_bn\.running_mean$",
                "",
                POST | IN_IMAGENET,
                _KERAS,
                CAFFE,
                biased=True,
                epsilon=1.001e-5,
                bgr=True,
            ),
        ),
        (
            Refusal(
                r"^post_bn\.",
                "",
                "ResNetV2 of Keras halves in the last unit of a stage, and pads the raw input of "
                "its max-pool with zeros; networks here halve in the first and pad with nothing",
            ),
        ),
        "another network of keras.applications; ResNet50, ResNet101, ResNet152 can be imported",
    ),
    "bearpaw": Source(
        "bearpaw/pytorch-classification's resnet on CIFAR",
        (
            Network(
                "resnet (post-activation)",
                r"^layer3\.0\.downsample\.1\.running_mean$",
                r"^layer4\.",
                POST | ON_3X3 | IN_CIFAR,
                _RESNET,
                CIFAR_BEARPAW,
            ),
        ),
        (
            Refusal(
                r"^layer\d\.0\.downsample\.0\.weight$",
                r"^layer\d\.0\.downsample\.1\.",
                "its preresnet projects the raw input of a unit; the paper's projections read the "
                "activated input, as F does (appendix)",
            ),
        ),
    ),
    "hysts": Source(
        "hysts/pytorch_image_classification's resnet and resnet_preact on CIFAR, basic blocks",
        (
            Network(
                "resnet (post-activation)",
                r"^stage3\.block1\.shortcut\.bn\.running_mean$",
                "",
                POST | ON_3X3 | IN_CIFAR,
                _HYSTS_POST,
                CIFAR_HYSTS,
                normalize_100=CIFAR100_HYSTS,
            ),
            Network(
                "resnet_preact",
                r"^stage3\.block1\.shortcut\.conv\.weight$",
                r"^stage3\.block1\.shortcut\.bn\.",
                PRE | ON_3X3 | IN_CIFAR,
                _HYSTS_PRE,
                CIFAR_HYSTS,
                normalize_100=CIFAR100_HYSTS,
            ),
        ),
        (
            Refusal(
                r"^stage1\.block1\.conv3\.weight$",
                "",
                "its bottlenecks are four times narrower in the first stage than the paper's: 16 "
                "output channels, not 64 (ResNet-164 has 1,619,290 parameters there, 1,703,258 "
                "here)",
            ),
            Refusal(
                r"^stage1\.block1\.bn3\.",
                "",
                "a BN follows the last convolution of F (add_last_bn), as in no unit of Fig. 4 "
                "that opens with BN and ReLU",
            ),
        ),
    ),
    "kuangliu": Source(
        "kuangliu/pytorch-cifar: none of its residual networks has a counterpart here",
        (),
        (
            Refusal(
                r"^layer1\.0\.bn1\.",
                r"^bn1?\.",
                "its PreActResNet lacks the BN and ReLU after the last unit, with which the "
                "paper's networks end (appendix)",
            ),
            Refusal(
                r"^layer4\.0\.",
                "",
                "its ResNet has the four stages of ImageNet, 64 to 512 wide, after a 3x3 stem; "
                "CIFAR networks here have the paper's three, 16 to 64 wide",
            ),
        ),
    ),
}
