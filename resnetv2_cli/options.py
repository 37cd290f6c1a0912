"""Every option of an experiment, with its default, which is the paper's (appendix).

To add one: a field of Options. Flag, help, config key, check and saved file follow.
"""

from dataclasses import dataclass
from typing import Literal

from resnetv2_cli import plans
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.data.protocols import listed
from resnetv2_cli.settings import BITS, LATER, PARTS, SAME, rows, setting

PAPER_STEPS, PAPER_WARMUP = 64_000, 400  # iterations
OF_FILES = ("crop", "color", "protocol")  # that do nothing to images that are decoded whole

Block = rows(plans.BLOCKS)
Stem = rows(plans.STEMS)
Dataset = rows(DATASETS)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is given of an experiment, as it is given; ``config.Experiment`` checks it."""

    depth: int = setting(
        110, "Weight layers, stem's and head's among them.", "Network", least=5, most=plans.DEEPEST
    )
    block: Block | None = setting(  # type: ignore[valid-type]
        None,
        "Weight layers of F. By itself 6n+2 layers are basic, 9n+2 are bottleneck, and what fits "
        "both is basic below 164.",
        "Network",
    )
    unit: str = setting(
        "full-preact",
        "Where BN and ReLU stand (Fig. 4); or your own, as 'bn + | bn relu' or module:Class.",
        "Network",
        form=plans.unit_type,
    )
    shortcut: str = setting(
        "identity",
        "What carries x past F (Fig. 2); or your own, as module:Class or, with settings of its "
        "own, module:Class:name=value.",
        "Network",
        form=plans.shortcut_type,
    )
    shortcut_scale: float | None = setting(
        None, "a in a x + b F(x), of constant-scale: 0.5 unless given.", "Network"
    )
    residual_scale: float | None = setting(
        None, "b in a x + b F(x), of constant-scale: 1 unless given.", "Network"
    )
    gate_bias: float | None = setting(
        None, "Initial b_g of the gates: -6 unless given; 0 to -10 in the paper.", "Network"
    )
    dropout_ratio: float | None = setting(
        None, "Share that the dropout shortcut drops: 0.5 unless given.", "Network", least=0, most=1
    )
    dropout_inverted: bool | None = setting(
        None, "Divide what is kept by 1 - ratio in training (the default).", "Network"
    )
    survival: float | None = setting(
        None,
        "Chance that the last unit's F survives in training, of stochastic-depth: 0.5 unless "
        "given.",
        "Network",
        least=0,
        most=1,
    )
    option: Literal["A", "B", "C"] | None = setting(
        None,
        "Where the shape changes: A pads with zeros, B projects; C projects in every unit. By "
        "itself A for CIFAR networks but bottlenecks, B else.",
        "Network",
    )
    pad: Literal["raw", "activated"] = setting(
        "raw", "What option A carries in pre-activation units.", "Network"
    )
    stride_on: Literal["first", "3x3"] = setting(
        "first", "Which convolution of a bottleneck has the stride.", "Network"
    )
    first_act: Literal["stem", "unit"] = setting(
        "stem",
        "Where the first activation stands: in the stem, before splitting and pooling; or in the "
        "first unit, as in its others.",
        "Network",
    )
    init: Literal["fan_out", "fan_in"] = setting(
        "fan_out", "Which fan He initialization counts.", "Network"
    )
    stem: Stem | None = setting(  # type: ignore[valid-type]
        None, "3x3 (cifar) or 7x7 and pooling (imagenet). By itself as the dataset.", "Network"
    )

    dataset: Dataset = setting(  # type: ignore[valid-type]
        "cifar10", "Images to learn from.", "Data"
    )
    data_dir: str = setting("data", "Where images are, or are downloaded to.", "Data", free=SAME)
    classes: int | None = setting(
        None,
        "How many there must be: images of more or fewer are refused.",
        "Data",
        least=1,
        free=SAME,
    )
    batch_size: int = setting(
        128,
        "Images in one iteration, over all devices and micro-batches; each takes its equal part.",
        "Data",
        least=1,
    )
    val: int = setting(
        0, "Training images held out for choosing; 5000 as in [1], of 50,000.", "Data", least=0
    )
    augment: bool = setting(True, "Crop at random and flip; small images are padded by 4.", "Data")
    normalize: Literal["pixel-mean", "channel"] = setting(
        "pixel-mean",
        "Minus each pixel's mean, as [1], or by channels' mean and std; photographs: ImageNet's.",
        "Data",
    )
    crop: Literal["scale", "scale-aspect"] = setting(
        "scale", "ImageNet: random scale, as [1], or scale and aspect ratio.", "Data"
    )
    color: Literal["none", "lighting", "jitter"] = setting(
        "none",
        "Photographs' colors in training: lighting, a random tint (AlexNet), as [1]; or jitter, of "
        "brightness, contrast and saturation too (fb.resnet.torch).",
        "Data",
    )
    protocol: str = setting(
        "224",
        "How photographs are evaluated: one crop of 224 or 320, or ten; in proportion by a network "
        "of smaller images. Of several, with commas between, the first is used during training.",
        "Data",
        form=listed,
    )
    workers: int = setting(
        2, "Processes that decode image files.", "Data", least=0, most=1024, free=SAME
    )

    lr: float = setting(0.1, "Learning rate, before warm-up and drops.", "Optimization", least=0)
    schedule: Literal["steps", "cosine", "one-cycle"] = setting(
        "steps",
        "Constant with two drops by 10, as the paper; or cosine; or one-cycle.",
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
        "Shares of the training after which the rate drops by 10 (steps).",
        "Optimization",
    )
    warmup: int | None = setting(
        None,
        "Iterations at a tenth of the learning rate (steps), or of its rise (others). "
        "By itself 400 of 64,000, and in that proportion; of one-cycle 30 %.",
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
        "What decays: every parameter, or only weights of conv and fc layers.",
        "Optimization",
    )
    label_smoothing: float = setting(
        0.0, "Share of the label given to all classes.", "Optimization", least=0, most=1
    )
    non_finite: Literal["stop", "skip"] = setting(
        "stop", "Loss or gradient not finite: stop, and say where; or skip it.", "Optimization"
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
        None, "SHA-256 that the weights must have; found by itself.", "Fine-tuning"
    )
    freeze: str = setting(
        "", "Parts that stay as they come, BN's statistics too: stem,stage1,stage2.", "Fine-tuning"
    )

    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = setting(
        "auto", "Arithmetic; auto takes the fast safe mode of the hardware.", "Engine"
    )
    accumulate: int = setting(1, "Micro-batches that one batch is split into.", "Engine", least=1)
    compile: bool = setting(False, "Compile the network, unit by unit.", "Engine", free=BITS)
    graphs: bool | None = setting(
        None,
        "Launch each iteration as one CUDA graph, once it agrees with what it stands for. By "
        "itself on one GPU, but for code of your own, which would run only once.",
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
        "Make again in backward what BN and ReLU make, and most additions: some half the memory.",
        "Engine",
        free="memory against time",
    )
    kernels: Literal["auto", "eager"] = setting(
        "auto",
        "BN, ReLU and the convolution behind them: auto has one compiled operation for "
        "them, on a CPU with gcc and in CUDA graphs; eager has PyTorch's.",
        "Engine",
        free=BITS,
    )
    sync_bn: bool = setting(
        False,
        "BN statistics over the whole batch. By itself BN sees each device's part alone, as the "
        "paper's two GPUs saw 64 of 128 images each.",
        "Engine",
    )
    accelerator: str = setting("auto", "auto, cpu or gpu.", "Engine", free=BITS)
    devices: str = setting(
        "1", "How many devices; which (0,1); or auto, all there are.", "Engine", free=PARTS
    )
    nodes: int = setting(1, "Machines.", "Engine", least=1, free=PARTS)
    strategy: str = setting("auto", "How devices share the work: auto or ddp.", "Engine", free=BITS)
    deterministic: bool = setting(
        False, "Only operations that give the same bits each time.", "Engine", free=BITS
    )

    eval_every: float = setting(1.0, "Epochs between evaluations.", "Run", least=0.001, most=1e6)
    log_every: int = setting(100, "Iterations between lines of metrics.csv.", "Run", least=1)
    save_every: int = setting(
        0, "Iterations between checkpoints that are kept; 0: none.", "Run", least=0, free=LATER
    )
    save_failure: Literal["continue", "stop"] = setting(
        "continue",
        "A checkpoint cannot be written (disk full, quota): train on and try later, or stop.",
        "Run",
        free=LATER,
    )
    tensorboard: bool = setting(False, "Log to TensorBoard too.", "Run", free=LATER)
    wandb: bool = setting(False, "Log to Weights & Biases too.", "Run", free=LATER)
