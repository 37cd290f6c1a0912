"""What evaluation sees: the views of the named protocols, and the errors published for them."""

import pytest
import torch
from iterations import FakeTrainer
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import (
    center_crop,
    pil_to_tensor,
    resize,
    ten_crop,
)

from resnetv2_cli import paper
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import folder
from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.data.module import ImageData, at_a_time
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import UserError
from resnetv2_cli.task import Classification


def test_the_views_of_the_protocols():
    views = {name: row.view(224) for name, row in PROTOCOLS.items()}
    assert views == {
        "224": (224, 224 / 256, False),
        "320": (320, 1.0, False),
        "ten-crop": (224, 224 / 256, True),
    }
    assert [v.shorter for v in views.values()] == [256, 320, 256]
    assert PROTOCOLS["224"].view(32) == (32, 224 / 256, False)  # --stem cifar: in proportion


def test_ten_crops_of_an_image_take_the_room_of_ten_images():
    e = Experiment(dataset="imagenet", depth=18)
    assert [at_a_time(e, row.view(224)) for row in PROTOCOLS.values()] == [64, 64, 6]


@pytest.mark.parametrize("size", [(500, 375), (256, 400)])
def test_the_places_of_ten_crops(size):
    """Four corners and the middle of the image resized to a shorter side of 256."""
    found = folder.boxes(*size, PROTOCOLS["ten-crop"].view(224))
    scale = 256 / min(size)
    width, height = (side * scale for side in size)
    expected = [(x, y) for y in (0, height - 224) for x in (0, width - 224)]
    expected.append(((width - 224) / 2, (height - 224) / 2))
    assert len(found) == 5
    for (left, top, right, bottom), (x, y) in zip(found, expected, strict=True):
        assert (left * scale, top * scale) == pytest.approx((x, y))
        assert ((right - left) * scale, (bottom - top) * scale) == pytest.approx((224, 224))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_test_view_is_resize_and_crop(tree, protocol):
    """The same as torchvision's up to the rounding of half pixels: the mean difference is below 8
    gray levels, and less than half of that to the crop shifted by 8 pixels."""
    split = folder.scan(tree, "test")
    view = PROTOCOLS[protocol].view(224)
    found, _ = folder.FolderImages(split, 224, "scale", 0, view)[0, -1]
    with Image.open(split.files[0]) as image:
        small = resize(image.convert("RGB"), view.shorter, InterpolationMode.BICUBIC)
    cut = ten_crop if view.ten else lambda *args: [center_crop(*args)]
    expected = torch.stack([pil_to_tensor(c) for c in cut(small, view.side)]).permute(0, 2, 3, 1)
    if view.ten:  # theirs are five crops of the mirrored image: left and right are swapped
        expected = expected[[0, 1, 2, 3, 4, 6, 5, 8, 7, 9]]
    found = found if view.ten else found[None]
    assert found.shape == expected.shape == (10 if view.ten else 1, view.side, view.side, 3)
    for ours, theirs in zip(found.short(), expected.short(), strict=True):
        near = (ours - theirs).abs().float().mean()
        far = (ours - theirs.roll(8, 0)).abs().float().mean()
        assert near < 8 and near < far / 2


def test_ten_crops_are_the_mean_of_softmax():
    task = Classification(
        Experiment(depth=8, dataset="digits"), ("a", "b", "c"),
        Normalize(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)),
    ).eval()  # fmt: skip
    colors = torch.randint(256, (4, 10, 1, 1, 3), dtype=torch.uint8)  # crops that differ a lot
    images = colors.expand(4, 10, 32, 32, 3).contiguous()
    with torch.no_grad():
        task.net.head.fc.weight *= 30
        found = task.look(images).softmax(1)
        each = torch.stack([task(images[:, k]).softmax(1) for k in range(10)])
        torch.testing.assert_close(found, each.mean(0))
        assert (
            each.log().mean(0).softmax(1) - found
        ).abs().max() > 0.01  # unlike the mean of logits, as in fb.resnet.torch
        torch.testing.assert_close(task.look(images[:, 0]), task(images[:, 0]))


def test_ten_crops_of_each_image_are_counted_once_by_several_processes(tree):
    given = {"dataset": "folder", "data_dir": str(tree), "depth": 18, "batch_size": 2}
    e = Experiment(**given, steps=1, workers=0, protocol="ten-crop")
    batches = []
    for rank in range(2):
        module = ImageData(e)
        module.trainer = FakeTrainer(rank, 2)
        module.setup()
        batches += list(module.test_dataloader())
    assert [b.images.shape for b in batches] == [(1, 10, 224, 224, 3)] * 2
    assert [int(label) for b in batches for label in b.labels] == [0, 1]


def test_a_network_of_the_paper_has_its_published_errors():
    def known(**given):
        e = Experiment(dataset="imagenet", **given)
        return [(r.published, r.top5) for r in paper.evaluated(e)]

    assert known(depth=200, protocol="320") == [(20.7, 5.3), (20.1, 4.8)]
    assert known(depth=152, unit="original") == [(23.0, 6.7)]
    assert known(depth=200, protocol="ten-crop") == [(20.15, 4.93)]
    assert known(depth=34) == known(depth=152, unit="original", shortcut="conv1x1") == []
    assert paper.evaluated(Experiment(depth=110)) == []


def test_files_of_older_versions_say_test_size(tmp_path):
    (tmp_path / "old.yaml").write_text("depth: 50\ndataset: imagenet\ntest_size: 320\n")
    assert Experiment.load(tmp_path / "old.yaml").protocol == "320"
    (tmp_path / "old.yaml").write_text(
        "depth: 50\ndataset: imagenet\ntest_size: null\nprotocol: 320\n"
    )
    assert Experiment.load(tmp_path / "old.yaml").protocol == "320"
    (tmp_path / "old.yaml").write_text("test_size: 64\n")
    with pytest.raises(UserError, match="test_size 64 is no longer known"):
        Experiment.load(tmp_path / "old.yaml")


def test_the_scale_of_training_crops_goes_with_the_network(tree):
    """For 32x32 inputs the shorter side is drawn from 256..480 times 32/224: a crop covers the same
    share of the image."""
    draws = [0.0] * folder.DRAWS
    left, _, right, _ = folder.random_box(400, 300, "scale", draws)
    assert right - left == pytest.approx(300 * 224 / 256)
    split = folder.scan(tree, "train")
    small = folder.FolderImages(split, 32, "scale", 0, PROTOCOLS["224"].view(32))[0, 0][0]
    large = folder.FolderImages(split, 224, "scale", 0, PROTOCOLS["224"].view(224))[0, 0][0]
    shrunk = F.interpolate(large.permute(2, 0, 1)[None].float(), (32, 32), mode="area")
    assert (shrunk[0].permute(1, 2, 0) - small).abs().mean() < 8
