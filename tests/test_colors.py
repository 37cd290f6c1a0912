"""Color augmentation of photographs: what is drawn, what it does, and that a resume keeps it."""

import io
import os
import signal
import zipfile

import numpy as np
import pytest
import torch
from iterations import on_tape, task
from PIL import Image
from torchvision.transforms import functional as V
from trainings import At, same, trained_as

from resnetv2_cli import graphs
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import colors, folder
from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.data.module import Batch
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import Stopped, UserError

PHOTOGRAPHS = {"dataset": "folder", "stem": "cifar", "batch_size": 4, "steps": 4, "workers": 0}
ADJUST = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation)


def middling(seed: int = 0) -> torch.Tensor:
    """An image that no change takes beyond black or white, where torchvision clamps."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(90, 150, (8, 6, 3), dtype=torch.uint8, generator=g)


def applied(image: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Shape: (H, W, 3) uint8, (3, 4) -> (3, H, W), 0..1."""
    none = Normalize(torch.zeros(3, 1, 1), torch.ones(1))
    return colors.recolored(none, image[None], change[None])[0]


@pytest.mark.parametrize("seed", range(12))
def test_jitter_is_brightness_contrast_and_saturation_in_random_order(seed):
    """As torchvision's, one after the other, plus the tint, which torchvision does not have."""
    image, g = middling(seed), torch.Generator().manual_seed(seed)
    found = applied(image, colors.change(image, "jitter", g))
    g.manual_seed(seed)
    factors = (0.6 + 0.8 * torch.rand(3, generator=g)).tolist()
    expected = image.permute(2, 0, 1) / 255
    for which in torch.randperm(3, generator=g).tolist():
        expected = ADJUST[which](expected, factors[which])
    drawn = 0.1 * torch.randn(3, generator=g).numpy()
    tint = torch.tensor(colors.COMPONENTS @ (colors.VALUES * drawn))[:, None, None]
    torch.testing.assert_close(found, expected + tint.float(), atol=3e-4, rtol=0)
    assert (found - image.permute(2, 0, 1) / 255).abs().max() > 0.02


def test_every_order_and_factor_is_drawn():
    image, g, orders, drawn = middling(), torch.Generator().manual_seed(0), set(), []
    blended = colors.blended

    def noted(matrix, which, factor, mean):
        drawn.append((which, factor))
        return blended(matrix, which, factor, mean)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(colors, "blended", noted)
        for _ in range(200):
            colors.change(image, "jitter", g)
            orders.add(tuple(which for which, _ in drawn[-3:]))
    assert len(orders) == 6
    for kind in range(3):
        factors = [factor for which, factor in drawn if which == kind]
        assert 0.6 <= min(factors) < 0.62 and 1.38 < max(factors) <= 1.4


def test_lighting_is_one_tint_along_the_principal_components():
    image, g = middling(), torch.Generator().manual_seed(0)
    changes = torch.stack([colors.change(image, "lighting", g) for _ in range(4000)])
    assert torch.equal(changes[:, :, :3], torch.eye(3).expand(4000, 3, 3))
    along = changes[:, :, 3].numpy() @ colors.COMPONENTS / 255
    assert along.std(0) == pytest.approx(0.1 * colors.VALUES, rel=0.05)
    assert abs(along.mean(0)).max() < 0.002


def test_the_components_are_those_of_real_photographs(shared_data):
    """Of 100 photographs from ImageNet, in which red, green and blue rise and fall together."""
    pixels = []
    with zipfile.ZipFile(shared_data / "imagenet-sample.zip") as sample:
        for name in sample.namelist():
            if name.endswith(".JPEG"):
                with Image.open(io.BytesIO(sample.read(name))) as image:
                    small = image.convert("RGB").resize((32, 32))
                pixels.append(np.asarray(small).reshape(-1, 3) / 255)
    values, vectors = np.linalg.eigh(np.cov(np.concatenate(pixels).T))
    alike = np.abs((vectors[:, ::-1] * colors.COMPONENTS).sum(0))
    assert alike.min() > 0.999
    assert values[::-1] == pytest.approx(colors.VALUES, rel=0.5)


def views_of(tree, color):
    return folder.FolderImages(
        folder.scan(tree, "train"), 32, "scale", 0, PROTOCOLS["224"].view(32), color
    )


@pytest.mark.parametrize("color", ["lighting", "jitter"])
def test_what_is_drawn_follows_from_seed_epoch_and_index(tree, color):
    plain, views = views_of(tree, "none"), views_of(tree, color)
    changes = []
    for key in ((0, 0), (1, 0), (0, 1)):
        pixels, _, change = views[key]
        assert torch.equal(pixels, plain[key][0])  # the crop is the same without
        assert torch.equal(change, views[key][2])
        changes.append(change)
    assert not torch.equal(changes[0], changes[1]) and not torch.equal(changes[0], changes[2])
    assert len(views[0, -1]) == 2  # a test view keeps the colors of the file


def test_a_loss_is_that_of_recolored_pixels_and_not_rounded_as_the_network_is():
    t = task(dataset="folder", stem="cifar", color="jitter")
    g = torch.Generator().manual_seed(1)
    pixels = torch.stack([middling(k) for k in range(4)])
    changes = torch.stack([colors.change(each, "jitter", g) for each in pixels])
    labels = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = t.augmented(t.normalize, pixels, changes)
    by_hand = torch.stack(
        [applied(each, change) for each, change in zip(pixels, changes, strict=True)]
    )
    torch.testing.assert_close(found, by_hand)
    assert found.is_contiguous(memory_format=torch.channels_last)
    losses = [t.loss(Batch(pixels, labels, which)).item() for which in (changes, None)]
    assert losses[0] != losses[1]


def stopped_at(step):
    return At(step, lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize("graphed", [False, True], ids=["called", "replayed"])
def test_a_stopped_run_continues_with_the_same_colors(tree, tmp_path, monkeypatch, graphed):
    monkeypatch.setattr(graphs, "why_not", lambda device, **parts: "")
    monkeypatch.setattr(graphs, "recorded", on_tape)
    given = PHOTOGRAPHS | {"data_dir": str(tree), "color": "jitter", "kernels": "eager"}
    whole = trained_as(tmp_path / "whole", **given)
    with pytest.raises(Stopped):
        trained_as(tmp_path / "run", display=[stopped_at(2)], **given, graphs=graphed)
    told: list[str] = []
    assert same(whole, trained_as(tmp_path / "run", told.append, resume={}))
    assert ("iterations are replayed, each as one CUDA graph" in told) is graphed
    plain = trained_as(tmp_path / "plain", **given | {"color": "none"})
    assert not same(whole, plain)


def test_workers_draw_what_the_process_itself_would(tree, tmp_path):
    given = PHOTOGRAPHS | {"data_dir": str(tree), "color": "jitter"}
    one, two = (trained_as(tmp_path / str(n), **given | {"workers": n}) for n in (0, 2))
    assert one.read_result()["train_loss"] == two.read_result()["train_loss"]


def test_small_images_keep_their_colors():
    with pytest.raises(UserError, match="color jitter is for larger images than those of digits"):
        Experiment(dataset="digits", depth=8, color="jitter")


def test_colors_are_not_changed_where_nothing_is_augmented():
    with pytest.raises(UserError, match="color jitter is an augmentation, and there is none"):
        Experiment(dataset="folder", depth=18, color="jitter", augment=False)


def test_an_evaluation_has_no_use_for_them(trained, here):
    assert "no such option: --color" in here("eval", trained, "--color", "jitter", status=2).stderr
