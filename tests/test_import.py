"""Networks of other code bases give the same logits here, or are refused with the reason."""

import copy
import json
import warnings

import pytest
import torch
from elsewhere import BEARPAW, HYSTS, KUANGLIU, Cifar, converted, parity, shaken, torch7
from torch import nn

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.errors import UserError
from resnetv2_cli.foreign.convert import checkpoint, class_names, imported, optional
from resnetv2_cli.foreign.files import READERS, tensors
from resnetv2_cli.foreign.names import filled, numbers
from resnetv2_cli.foreign.sources import SOURCES

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize("name, depth", [("resnet18", 18), ("resnet50", 50)])
def test_torchvision(name, depth):
    net = shaken(getattr(torchvision.models, name)(num_classes=7))
    difference, size, e = parity(net, "torchvision")
    assert difference < 1e-10 and size > 0.01
    assert (e.depth, e.unit, e.option, e.stride_on) == (depth, "original", "B", "3x3")


@pytest.mark.parametrize("name, depth", [("resnetv2_18", 18), ("resnetv2_50", 50)])
def test_timm(name, depth):
    net = shaken(timm.create_model(name, num_classes=7))
    difference, size, e = parity(net, "timm")
    assert difference < 1e-10 and size > 0.01
    assert (e.depth, e.unit, e.first_act) == (depth, "full-preact", "unit")


def test_timm_post_activation():
    difference, size, e = parity(shaken(timm.create_model("resnet18", num_classes=7)), "timm")
    assert difference < 1e-10 and size > 0.01 and e.unit == "original"


@pytest.mark.parametrize("post", [True, False])
def test_hysts(post):
    net = shaken(Cifar(2, 2, not post, HYSTS))
    difference, size, e = parity(net, "hysts", 32)
    assert difference < 1e-10 and size > 0.01
    assert (e.depth, e.unit) == (14, "original" if post else "full-preact")
    assert (e.option, e.stem_, e.normalize) == ("B", "cifar", "channel")


@pytest.mark.parametrize("deep, depth", [(2, 14), (3, 20)])
def test_bearpaw(deep, depth):
    difference, size, e = parity(shaken(Cifar(2, deep, False, BEARPAW)), "bearpaw", 32)
    assert difference < 1e-10 and size > 0.01
    assert (e.depth, e.unit, e.block) == (depth, "original", {2: "basic", 3: "bottleneck"}[deep])


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize(
    "stem, deep, stages, option, depth",
    [
        ("cifar", 2, (2, 2, 2), "A", 14),
        ("cifar", 2, (1, 1, 1), "B", 8),
        ("imagenet", 2, (2, 2, 2, 2), "B", 18),
        ("imagenet", 3, (3, 4, 6, 3), "B", 50),
    ],
)
def test_fb(stem, deep, stages, option, depth, pre):
    net = shaken(torch7(stem, deep, stages, pre, option))
    difference, size, e = parity(net, "fb", 32 if stem == "cifar" else 64)
    assert difference < 1e-10 and size > 0.01
    assert (e.depth, e.option, e.unit) == (depth, option, "full-preact" if pre else "original")


def test_every_source_has_its_test():
    assert set(SOURCES) == {"torchvision", "timm", "fb", "keras", "bearpaw", "hysts", "kuangliu"}


def test_the_normalization_of_a_source_is_its_own():
    """Means and standard deviations of 0..1; others use different ones for the same images."""
    numbers = {
        ("bearpaw", "cifar"): [0.4914, 0.4822, 0.4465, 0.2023, 0.1994, 0.2010],
        ("hysts", "cifar"): [0.4914, 0.4822, 0.4465, 0.2470, 0.2435, 0.2616],
        ("fb", "cifar"): [v / 255 for v in (125.3, 123.0, 113.9, 63.0, 62.1, 66.7)],
        ("fb", "imagenet"): [0.485, 0.456, 0.406, 0.229, 0.224, 0.225],
        ("torchvision", "imagenet"): [0.485, 0.456, 0.406, 0.229, 0.224, 0.225],
    }
    for (name, stem), own in numbers.items():
        networks = [n for n in SOURCES[name].networks if n.settings["stem"] == stem]
        assert networks and all([*n.normalize[0], *n.normalize[1]] == own for n in networks)


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize(
    "source, net, mean, std",
    [
        ("hysts", lambda pre: Cifar(2, 2, pre, HYSTS), [0.5071, 0.4865, 0.4409], 0.2673),
        ("fb", lambda pre: torch7("cifar", 2, (1, 1, 1), pre, "A"), [129.3, 124.1, 112.4], 68.2),
    ],
)
def test_100_classes_are_normalized_as_cifar100_is(tmp_path, source, net, mean, std, pre):
    """If the code base has its own numbers for it; those of fb are of 0 to 255."""
    weights = net(pre).state_dict()
    wide = {
        k: v.repeat(10, *[1] * (v.dim() - 1)) for k, v in weights.items() if v.shape[:1] == (10,)
    }
    (tmp_path / "net.pth").touch()
    saved = checkpoint(imported(weights | wide, source), source, tmp_path / "net.pth", None)
    assert saved["experiment"]["dataset"] == "cifar100"
    scale = 255 if source == "fb" else 1
    found = {k: saved["state_dict"][f"normalize.{k}"].flatten() * scale for k in ("mean", "std")}
    torch.testing.assert_close(found["mean"], torch.tensor(mean))
    torch.testing.assert_close(found["std"][0], torch.tensor(std))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from Keras itself
def test_keras(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    pytest.importorskip("h5py")
    keras = pytest.importorskip("keras")
    shape = (64, 64, 3)
    net = keras.applications.ResNet50(
        weights=None, classes=7, classifier_activation=None, input_shape=shape
    )
    for layer in net.layers:
        for variable in layer.weights:
            spread = {"moving_variance": (0.5, 2), "gamma": (0.2, 0.8)}
            low, high = spread.get(variable.path.split("/")[-1], (-0.2, 0.2))
            if "kernel" not in variable.path:
                variable.assign(low + (high - low) * torch.rand(*variable.shape))
    net.save(tmp_path / "old.h5")
    net.save_weights(tmp_path / "new.weights.h5")
    net.save(tmp_path / "new.keras")
    forms = [tensors(tmp_path / name) for name in ("old.h5", "new.weights.h5", "new.keras")]
    for other in forms[1:]:
        assert all(torch.equal(value, other.pop(name)) for name, value in forms[0].items())
        assert not other
    ours, e = converted(forms[0], "keras")
    assert (e.depth, e.unit, e.stride_on) == (50, "original", "first")
    images = 255 * torch.rand(2, *shape)
    with torch.no_grad():
        theirs = net(keras.applications.resnet.preprocess_input(images.numpy().copy())).double()
        mean, std = torch.tensor(SOURCES["keras"].networks[0].normalize, dtype=torch.float64)
        x = (images.double() / 255 - mean) / std
        found = ours(x.permute(0, 3, 1, 2))
    # Keras computes in float32.
    assert (found - theirs).abs().max() < 1e-5 * theirs.abs().max()


def state(net: nn.Module) -> dict:
    return net.state_dict()


def slim(net: dict, *gone: str) -> dict:
    return {name: value for name, value in net.items() if not name.startswith(gone)}


REFUSED = {
    "bit": (
        lambda: state(timm.create_model("resnetv2_50x1_bit", num_classes=7)),
        "timm",
        "GroupNorm and standardized weights",
    ),
    "group norm": (
        lambda: state(timm.create_model("resnet50_gn", num_classes=7)),
        "timm",
        "it has GroupNorm, where this tool has the paper's BN",
    ),
    "deep stem": (
        lambda: state(timm.create_model("resnetv2_50d", num_classes=7)),
        "timm",
        "three 3x3 convolutions",
    ),
    "wide": (
        lambda: state(torchvision.models.wide_resnet50_2(num_classes=7)),
        "torchvision",
        r"layer1.0.conv1.weight is \(128, 64, 1, 1\) there and \(64, 64, 1, 1\) here",
    ),
    "other": (
        lambda: state(torchvision.models.squeezenet1_0(num_classes=7)),
        "torchvision",
        "is not a known network",
    ),
    "raw projection": (
        lambda: state(Cifar(1, 2, True, BEARPAW, shared=False)),
        "bearpaw",
        "projects the raw input",
    ),
    "narrow": (lambda: state(Cifar(1, 3, True, HYSTS)), "hysts", "four times narrower"),
    "no last bn": (
        lambda: state(Cifar(1, 2, True, KUANGLIU, last=False)),
        "kuangliu",
        "lacks the BN and ReLU after the last unit",
    ),
    "cut": (
        lambda: slim(state(torchvision.models.resnet18(num_classes=7)), "layer3.1.bn2"),
        "torchvision",
        "has no layer3.1.bn2.weight, which the network here needs",
    ),
    "headless": (
        lambda: slim(state(torchvision.models.resnet18(num_classes=7)), "fc"),
        "torchvision",
        "has no classifier fc.weight",
    ),
    "shallow": (
        lambda: slim(state(torchvision.models.resnet18(num_classes=7)), "layer2.1"),
        "torchvision",
        "stages of 2, 1, 2, 2 units of 2 convolutions",
    ),
    "more": (
        lambda: state(torchvision.models.resnet18(num_classes=7)) | {"extra": torch.ones(1)},
        "torchvision",
        "has extra, which the network here lacks",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_differs_is_refused_with_the_reason(what):
    make, source, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        imported(make(), source)


@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur18"])
def test_pools_that_blur_have_no_tensors_and_are_refused_by_the_name_of_the_file(name):
    plain = state(torchvision.models.resnet18(num_classes=7))
    with pytest.raises(UserError, match=r"a/resnet\w+.pth, from timm, .* its pooling blurs"):
        imported(plain, "timm", f"a/{name}.pth")
    assert imported(plain, "timm", f"{name}/resnet18.pth").experiment.depth == 18


def test_keras_v2_is_refused():
    names = {"conv1_conv.weight": torch.ones(1), "post_bn.weight": torch.ones(1)}
    with pytest.raises(UserError, match="halves in the last unit of a stage"):
        imported(names, "keras")


def test_the_first_preresnet_of_fb_is_refused():
    names = {"5.0.0.1.1.running_mean": torch.ones(1), "9.running_mean": torch.ones(1)}
    with pytest.raises(UserError, match="projections with BN that read the raw input"):
        imported(names, "fb")


def noise(root, classes):
    """Six images of noise in each class of train/ and val/."""
    import numpy as np
    from PIL import Image

    numbers = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_an_imported_file_evaluates(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    net = shaken(torchvision.models.resnet18(num_classes=2)).float()
    wrapped = {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3}
    torch.save(wrapped, "theirs.pth")
    data = noise(tmp_path / "images", ["cat", "dog"])
    arguments = ["import", "theirs.pth", "--from", "torchvision", "--classes", data, "-o", "a.ckpt"]
    done = here(*arguments, "--json")
    facts = json.loads(done.stdout)
    assert facts["parameters"] == sum(p.numel() for p in net.parameters())
    saved = checkpoints.read(tmp_path / "a.ckpt")
    assert saved["classes"] == ["cat", "dog"] and saved["global_step"] == 0
    assert saved["imported"]["from"] == "torchvision" and len(saved["imported"]["sha256"]) == 64
    done = here(
        "eval", "a.ckpt", "--data-dir", data, "--protocol", "320",
        "--workers", 0, "--precision", "32-true", "--json",
    )  # fmt: skip
    scores = json.loads(done.stdout)
    assert scores["images"] == 12
    from resnetv2_cli.data.folder import MEAN, STD, FolderImages, scan
    from resnetv2_cli.data.protocols import PROTOCOLS

    view = PROTOCOLS["320"].view(224)
    views = FolderImages(scan(data, "test", ("cat", "dog")), 224, "scale", 0, view)
    x, labels = zip(*(views[i, -1] for i in range(12)), strict=True)
    x = (torch.stack(x).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    with torch.no_grad():
        loss = nn.functional.cross_entropy(net(x), torch.stack(labels))
    assert scores["loss"] == pytest.approx(loss.item(), rel=1e-4)
    done = here(*arguments, status=2)
    assert "a.ckpt exists" in done.stderr


def test_safetensors_and_the_normalization_given(tmp_path, monkeypatch, here):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("resnetv2_18", num_classes=1000).state_dict(), "t.safetensors")
    here("import", "t.safetensors", "--from", "timm")
    saved = checkpoints.read(tmp_path / "timm-resnet18-basic-full-preact.ckpt")
    assert saved["classes"][:2] == ["n01440764", "n01443537"] and len(saved["classes"]) == 1000
    assert saved["experiment"]["dataset"] == "imagenet"
    assert saved["state_dict"]["normalize.mean"].flatten().tolist() == [0.5, 0.5, 0.5]
    given = ["--mean", "0.1,0.2,0.3", "--std", "1,1,1", "--output", "b.ckpt"]
    here("import", "t.safetensors", "--from", "timm", *given)
    kept = checkpoints.read(tmp_path / "b.ckpt")["state_dict"]["normalize.mean"].flatten()
    torch.testing.assert_close(kept, torch.tensor([0.1, 0.2, 0.3]))


class Runs:
    def __reduce__(self):
        return print, ("it ran",)


def test_files_that_are_refused(tmp_path, capsys):
    torch.save({"state_dict": Runs()}, tmp_path / "pickle.pth")
    (tmp_path / "net.t7").write_bytes(b"4")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 7)
    (tmp_path / "cut.h5").write_bytes(b"HDF")
    (tmp_path / "cut.keras").write_bytes(b"PK")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    (tmp_path / "README.md").write_text("# weights\n")
    torch.save({"fc.bias": torch.tensor([0.0, float("nan")])}, tmp_path / "nan.pth")
    torch.save({"bn1.running_var": torch.tensor([1.0, -1.0])}, tmp_path / "var.pth")
    whole = torch.eye(2)
    with warnings.catch_warnings(action="ignore"):  # about quantization, which PyTorch deprecates
        quantized = torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8)
    strange = {
        "quantized": quantized,
        "sparse": whole.to_sparse(),
        "meta": whole.to("meta"),
        "complex": whole.to(torch.complex64),
        "float8": whole.to(torch.float8_e4m3fn),
    }
    for kind, tensor in strange.items():
        torch.save({"bn1.running_var": tensor}, tmp_path / f"{kind}.pth")
    for name, message in [
        *((f"{kind}.pth", "bn1.running_var is no plain tensor") for kind in [*strange][:-1]),
        ("float8.pth", "cannot read"),  # PyTorch cannot compare it
        ("nan.pth", "fc.bias has numbers that are not finite"),
        ("var.pth", "bn1.running_var has a variance below 0"),
        ("pickle.pth", "holds more than tensors"),
        ("net.t7", "no maintained reader"),
        ("cut.safetensors", "cannot read"),
        ("cut.h5", "cannot read"),
        ("cut.keras", "cannot read"),
        ("none.pth", "holds no tensors"),
        ("README.md", "is no file of weights"),
        ("missing.pth", "there is no file"),
    ]:
        with pytest.raises(UserError, match=message):
            tensors(tmp_path / name)
    assert "it ran" not in capsys.readouterr().out
    assert ".t7" in READERS


def test_parameters_are_tensors(tmp_path):
    torch.save({"fc.bias": torch.nn.Parameter(torch.ones(2))}, tmp_path / "net.pth")
    assert tensors(tmp_path / "net.pth")["fc.bias"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "arguments, message, hint",
    [
        (["--from", "tim"], "unknown source 'tim'", "did you mean 'timm'?"),
        (["--from", "timm", "--mean", "1,1,1"], "--mean and --std go together", "--std"),
        (["--from", "timm", "--mean", "1,1", "--std", "1,1,1"], "'1,1' is not three", "0.5,0.5"),
        (["--from", "timm", "--mean", "1,1,nan", "--std", "1,1,1"], "'1,1,nan' is not", "0.5,0.5"),
        (["--from", "timm", "--mean", "0,0,0", "--std", "1,0,1"], "'1,0,1' is not above 0", "div"),
        (["--from", "timm", "--mean", "0,127,0", "--std", "1,1,1"], "is not in 0..1", "by 255"),
    ],
)
def test_mistakes_on_the_command_line(here, arguments, message, hint):
    done = here("import", "a.pth", *arguments, status=2)
    assert message in done.stderr and hint in done.stderr


def test_class_names(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\n\n", encoding="utf-8-sig")  # with a BOM, as some editors write it
    assert class_names(2, "imagenet", file) == ("folder", ("cat", "dog"))
    assert class_names(10, "cifar", None)[0] == "cifar10"
    with pytest.raises(UserError, match="names 2 classes, and the network has 3"):
        class_names(3, "imagenet", file)
    with pytest.raises(UserError, match="the network has 3 classes, and nothing names them"):
        class_names(3, "imagenet", None)
    file.write_text("cat\ncat\n")
    with pytest.raises(UserError, match="names a class twice"):
        class_names(2, "imagenet", file)
    file.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="names.txt is no text"):
        class_names(2, "imagenet", file)


def test_patterns_of_names():
    assert filled("layer{s}.{u-1}.{3k-5}", {"s": 2, "u": 1, "k": 3}) == "layer2.0.4"
    assert numbers("layer{s}.{u-1}.{3k-5}", "layer2.0.4") == {"s": 2, "u": 1, "k": 3}
    assert numbers("layer{s}.{3k-5}", "layer2.5") is None  # k would not be an integer
    assert numbers("{s}.{s}", "1.2") is None
    assert numbers("a.{u-1}", "a.x") is None


def test_what_was_imported_is_left_as_it_was():
    net = shaken(torchvision.models.resnet18(num_classes=7))
    before = copy.deepcopy(net.state_dict())
    imported(net.state_dict(), "torchvision")
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_what_may_be_missing_has_its_shape_where_it_is_there():
    left = {"a.bias": torch.zeros(7)}
    assert optional(left, "b.bias", (64,), "hint", "file").shape == (64,)
    with pytest.raises(UserError, match="a.bias is .7,. there and .64,. here"):
        optional(left, "a.bias", (64,), "hint", "file")


def test_an_empty_mean_is_no_mean(here, tmp_path):
    torch.save({"fc.bias": torch.zeros(2)}, tmp_path / "a.pth")
    given = ["--from", "timm", "--mean", "", "--std", "1,1,1", "--output", tmp_path / "b.ckpt"]
    assert (
        "--mean '' is not three numbers"
        in here("import", tmp_path / "a.pth", *given, status=2).stderr
    )
