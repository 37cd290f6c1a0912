"""Every option of an experiment, with its default, which is the paper's (appendix).

To add one, add a field to Options. Flag, help, config key, check and saved file follow from it.
"""

from dataclasses import dataclass
from typing import Literal

from resnetv2_cli import plans
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.data.protocols import listed
from resnetv2_cli.settings import BITS, LATER, PARTS, SAME, rows, setting

PAPER_STEPS, PAPER_WARMUP = 64_000, 400  # iterations
OF_FILES = ("crop", "color", "protocol")  # no effect on images decoded whole

Block = rows(plans.BLOCKS)
Stem = rows(plans.STEMS)
Dataset = rows(DATASETS)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of an experiment, as given; ``config.Experiment`` checks them."""

    depth: int = setting(
        110,
        "Weight layers, including those of stem and head.",
        "Network",
        least=5,
        most=plans.DEEPEST,
    )
    block: Block | None = setting(  # type: ignore[valid-type]
        None,
        "The weight layers of F. Default: basic for a depth of 6n+2, bottleneck for 9n+2; a depth "
        "that fits both is basic below 164.",
        "Network",
    )
    unit: str = setting(
        "full-preact",
        "Where BN and ReLU are placed (Fig. 4); or your own, as 'bn + | bn relu' or module:Class.",
        "Network",
        form=plans.unit_type,
    )
    shortcut: str = setting(
        "identity",
        "How x is carried past F (Fig. 2); or your own, as module:Class or, with settings, "
        "module:Class:name=value.",
        "Network",
        form=plans.shortcut_type,
    )
    shortcut_scale: float | None = setting(
        None, "constant-scale: a in a x + b F(x); 0.5 unless given.", "Network"
    )
    residual_scale: float | None = setting(
        None, "constant-scale: b in a x + b F(x); 1 unless given.", "Network"
    )
    gate_bias: float | None = setting(
        None, "Initial bias b_g of the gates; -6 unless given, 0 to -10 in the paper.", "Network"
    )
    dropout_ratio: float | None = setting(
        None, "dropout: fraction that is dropped; 0.5 unless given.", "Network", least=0, most=1
    )
    dropout_inverted: bool | None = setting(
        None, "dropout: divide what is kept by 1 - ratio in training (the default).", "Network"
    )
    survival: float | None = setting(
        None,
        "stochastic-depth: probability that the last unit's F is kept in training; 0.5 unless "
        "given.",
        "Network",
        least=0,
        most=1,
    )
    option: Literal["A", "B", "C"] | None = setting(
        None,
        "Where the shape changes, A pads with zeros and B projects; C projects in every unit. "
        "Default: A in CIFAR networks without bottlenecks, else B.",
        "Network",
    )
    pad: Literal["raw", "activated"] = setting(
        "raw", "Which x option A pads in pre-activation units.", "Network"
    )
    stride_on: Literal["first", "3x3"] = setting(
        "first", "Which convolution of a bottleneck has the stride.", "Network"
    )
    first_act: Literal["stem", "unit"] = setting(
        "stem",
        "Where the first activation is: in the stem, before splitting and pooling; or in the "
        "first unit, as in all others.",
        "Network",
    )
    init: Literal["fan_out", "fan_in"] = setting(
        "fan_out", "Which fan He initialization uses.", "Network"
    )
    stem: Stem | None = setting(  # type: ignore[valid-type]
        None, "3x3 (cifar), or 7x7 and pooling (imagenet). Default: by dataset.", "Network"
    )

    dataset: Dataset = setting(  # type: ignore[valid-type]
        "cifar10", "Images to learn from.", "Data"
    )
    data_dir: str = setting(
        "data", "Where the images are, or are downloaded to.", "Data", free=SAME
    )
    classes: int | None = setting(
        None,
        "How many classes there must be; images of more or fewer are refused.",
        "Data",
        least=1,
        free=SAME,
    )
    batch_size: int = setting(
        128,
        "Images per iteration, over all devices and micro-batches, which share it equally.",
        "Data",
        least=1,
    )
    val: int = setting(
        0,
        "Training images held out for choosing a checkpoint; He et al. 2015: 5000 of 50,000.",
        "Data",
        least=0,
    )
    augment: bool = setting(
        True, "Random crops and flips in training; small images are padded by 4.", "Data"
    )
    normalize: Literal["pixel-mean", "channel"] = setting(
        "pixel-mean",
        "Subtract each pixel's mean, as He et al. 2015, or use channel mean and std; photographs: "
        "always ImageNet's.",
        "Data",
    )
    crop: Literal["scale", "scale-aspect"] = setting(
        "scale", "Photographs: random scale, as He et al. 2015, or scale and aspect ratio.", "Data"
    )
    color: Literal["none", "lighting", "jitter"] = setting(
        "none",
        "Colors of photographs in training: lighting, a random tint (AlexNet), as He et al. 2015; "
        "or jitter, of brightness, contrast and saturation too (fb.resnet.torch).",
        "Data",
    )
    protocol: str = setting(
        "224",
        "How photographs are evaluated: one crop of 224 or 320, or ten crops; scaled in proportion "
        "for networks of smaller images. Of several (224,320), training uses the first.",
        "Data",
        form=listed,
    )
    workers: int = setting(
        2, "Processes that decode image files.", "Data", least=0, most=1024, free=SAME
    )

    lr: float = setting(
        0.1, "Learning rate, to which warm-up and drops apply.", "Optimization", least=0
    )
    schedule: Literal["steps", "cosine", "one-cycle"] = setting(
        "steps",
        "steps: constant with two drops by 10, as in the paper; or cosine; or one-cycle.",
        "Optimization",
    )
    steps: int = setting(
        PAPER_STEPS,
        "Training iterations; drops and warm-up scale with them.",
        "Optimization",
        least=1,
    )
    epochs: float | None = setting(
        None,
        "Passes over the training images, instead of --steps.",
        "Optimization",
        least=0.001,
        most=1e6,
    )
    drops: str = setting(
        "0.5,0.75",
        "Fractions of the training after which the rate is divided by 10 (steps).",
        "Optimization",
    )
    warmup: int | None = setting(
        None,
        "Iterations at a tenth of the learning rate (steps), or while it rises (others). "
        "Default: 400 of 64,000, in proportion; for one-cycle 30 %.",
        "Optimization",
        least=0,
    )
    momentum: float = setting(0.9, "Momentum of SGD.", "Optimization", least=0)
    nesterov: bool = setting(
        False, "Nesterov's momentum, as in the released Torch code.", "Optimization"
    )
    weight_decay: float = setting(1e-4, "L2 penalty.", "Optimization", least=0)
    decay: Literal["all", "weights"] = setting(
        "all",
        "What weight decay acts on: all parameters, or only weights of conv and fc layers.",
        "Optimization",
    )
    label_smoothing: float = setting(
        0.0, "Share of the label that is spread over all classes.", "Optimization", least=0, most=1
    )
    non_finite: Literal["stop", "skip"] = setting(
        "stop",
        "If loss or gradient is not finite: stop and say where, or skip that iteration.",
        "Optimization",
    )
    seed: int = setting(
        0, "Seed of weights, order and augmentation.", "Optimization", least=0, most=2**31 - 1
    )

    weights: str | None = setting(
        None,
        "Weights to start from: a checkpoint, a run's folder, or a .safetensors file.",
        "Fine-tuning",
        free="the file may have moved; the weights are the same",
    )
    weights_sha256: str | None = setting(
        None, "SHA-256 that the weights must have; computed unless given.", "Fine-tuning"
    )
    freeze: str = setting(
        "",
        "Parts that stay as loaded, BN's statistics included: stem,stage1,stage2.",
        "Fine-tuning",
    )

    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = setting(
        "auto", "Arithmetic; auto picks the fast safe mode of the hardware.", "Engine"
    )
    accumulate: int = setting(1, "Micro-batches that each batch is split into.", "Engine", least=1)
    compile: bool = setting(False, "Compile the network, unit by unit.", "Engine", free=BITS)
    graphs: bool | None = setting(
        None,
        "Replay each iteration as one CUDA graph, once a replay agrees with the iteration. "
        "Default: on one GPU, but not with code of your own, whose Python would run only once.",
        "Engine",
        free=BITS,
    )
    recompute: int = setting(
        0,
        "Segments whose activations are recomputed in backward, to save memory; 0: none.",
        "Engine",
        least=0,
        free="memory against time",
    )
    recompute_bn: bool = setting(
        False,
        "Recompute outputs of BN and ReLU, and most sums, in backward: about half the memory.",
        "Engine",
        free="memory against time",
    )
    kernels: Literal["auto", "eager"] = setting(
        "auto",
        "BN, ReLU and the convolution after them: auto uses one compiled operation for all, on a "
        "CPU with gcc and in CUDA graphs; eager uses PyTorch's.",
        "Engine",
        free=BITS,
    )
    sync_bn: bool = setting(
        False,
        "BN statistics over the whole batch. By default BN sees each device's part alone, as the "
        "paper's two GPUs saw 64 of 128 images each.",
        "Engine",
    )
    accelerator: str = setting("auto", "auto, cpu or gpu.", "Engine", free=BITS)
    devices: str = setting(
        "1", "How many devices; or which ones (0,1); or auto: all there are.", "Engine", free=PARTS
    )
    nodes: int = setting(1, "Number of machines.", "Engine", least=1, free=PARTS)
    strategy: str = setting("auto", "How devices share the work: auto or ddp.", "Engine", free=BITS)
    deterministic: bool = setting(
        False, "Use only operations that give the same bits each time.", "Engine", free=BITS
    )

    eval_every: float = setting(1.0, "Epochs between evaluations.", "Run", least=0.001, most=1e6)
    log_every: int = setting(100, "Iterations between lines of metrics.csv.", "Run", least=1)
    save_every: int = setting(
        0, "Iterations between checkpoints that are kept; 0: none.", "Run", least=0, free=LATER
    )
    save_failure: Literal["continue", "stop"] = setting(
        "continue",
        "If a checkpoint cannot be written (disk full, quota): train on and try later, or stop.",
        "Run",
        free=LATER,
    )
    tensorboard: bool = setting(False, "Log to TensorBoard too.", "Run", free=LATER)
    wandb: bool = setting(False, "Log to Weights & Biases too.", "Run", free=LATER)
