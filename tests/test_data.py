"""Batches: order and augmentation depend on (seed, epoch, index) alone."""

import os
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from iterations import FakeTrainer
from PIL import Image
from torch.nn import functional as F

from resnetv2_cli.config import Experiment
from resnetv2_cli.data import folder
from resnetv2_cli.data.augment import Normalize, crop_and_flip
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.data.order import Schedule, epoch_order, share
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import UserError

pytestmark = pytest.mark.usefixtures("no_cache")

# The order.


def test_seeds_that_agree_in_their_low_bits_have_orders_of_their_own():
    first, *others = (epoch_order(50, seed, 0).order.tolist() for seed in (0, 4096, 2**31 - 4096))
    assert first not in others and others[0] != others[1]


def test_an_epoch_is_a_function_of_seed_and_number():
    first, again = epoch_order(1000, 3, 7), epoch_order(1000, 3, 7)
    torch.testing.assert_close(first, again)
    orders = [epoch_order(1000, *which).order for which in [(3, 7), (3, 8), (4, 7)]]
    for one, other in combinations(orders, 2):  # nor is the next epoch the next seed's
        assert (one != other).float().mean() > 0.9
    assert first.order.sort().values.tolist() == list(range(1000))


def test_views_are_uniform():
    """Crops from 0 to 8 on each axis, and a flip half of the time."""
    views = epoch_order(50_000, 0, 0).views
    for axis in (0, 1):
        share = views[:, axis].bincount(minlength=9) / 50_000
        assert len(share) == 9
        torch.testing.assert_close(share, torch.full((9,), 1 / 9), atol=0.01, rtol=0)
    assert views[:, 2].float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert epoch_order(1000, 0, 0, flip=False).views[:, 2].max() == 0


@pytest.mark.parametrize("images_, batch", [(50_000, 128), (1437, 64), (100, 100), (130, 128)])
@pytest.mark.parametrize("micro, ranks", [(1, 1), (1, 3), (2, 2)])
def test_every_epoch_covers_every_image_once(images_, batch, micro, ranks):
    schedules = [Schedule(images_, batch, micro, r, ranks) for r in range(ranks)]
    steps = schedules[0].steps_per_epoch
    for epoch in (0, 1):
        taken = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            parts = [p for s in schedules for p in s.parts(step)]
            assert {p.epoch for p in parts} == {epoch}
            assert sum(p.weight for p in parts) == pytest.approx(micro * ranks)
            taken += [i for p in parts for i in range(p.start, p.stop)]
            assert all(p.stop > p.start for p in parts)
        assert sorted(taken) == list(range(images_))


def test_391_iterations_are_an_epoch_of_cifar():
    schedule = Schedule(50_000, 128)
    assert schedule.steps_per_epoch == 391
    assert schedule.parts(390)[0].stop - schedule.parts(390)[0].start == 80


@pytest.mark.parametrize("n, ranks", [(10_000, 3), (10_001, 2), (5, 3)])
def test_evaluation_shares_are_disjoint_and_complete(n, ranks):
    taken = [i for rank in range(ranks) for i in share(n, rank, ranks)]
    assert taken == list(range(n))


# The augmentation.


def by_hand(x: torch.Tensor, view: list[int]) -> torch.Tensor:
    top, left, flip = view
    padded = F.pad(x, (4, 4, 4, 4))
    crop = padded[:, top : top + x.shape[1], left : left + x.shape[2]]
    return crop.flip(2) if flip else crop


def test_crops_and_flips_are_those_of_pad_crop_and_mirror():
    x = torch.randn(81 * 2, 3, 32, 32)
    views = torch.tensor([[t, le, f] for t in range(9) for le in range(9) for f in (0, 1)])
    expected = torch.stack([by_hand(x[i], views[i].tolist()) for i in range(len(x))])
    torch.testing.assert_close(crop_and_flip(x, views), expected, rtol=0, atol=0)


def test_the_middle_view_is_the_image_itself():
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(crop_and_flip(x, torch.tensor([[4, 4, 0]] * 2)), x)


def test_normalization_scales_to_0_to_1_and_lays_channels_last():
    pixels = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.rand(3, 32, 32), torch.rand(3, 1, 1) + 0.5
    x = Normalize(mean, std)(pixels)
    expected = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last)


# The DataModule.


def data(rank: int = 0, ranks: int = 1, step: int = 0, **given) -> ImageData:
    module = ImageData(Experiment(**{"dataset": "digits", "batch_size": 128, "steps": 36, **given}))
    module.trainer = FakeTrainer(rank, ranks, step)
    module.setup()
    return module


def test_a_resumed_stream_continues_where_the_other_was():
    whole = list(data(seed=1).train_dataloader())
    rest = list(data(seed=1, step=17).train_dataloader())
    assert len(whole) == 36 and len(rest) == 19
    for a, b in zip(whole[17:], rest, strict=True):
        torch.testing.assert_close(a, b)


def test_processes_and_micro_batches_share_the_batch_of_one():
    whole = list(data().train_dataloader())
    halves = [list(data(rank, 2).train_dataloader()) for rank in (0, 1)]
    micro = list(data(accumulate=2).train_dataloader())
    for step, batch in enumerate(whole):
        for parts in ([h[step] for h in halves], micro[2 * step : 2 * step + 2]):
            together = torch.cat([p.images for p in parts])
            torch.testing.assert_close(together, batch.images)
            torch.testing.assert_close(torch.cat([p.views for p in parts]), batch.views)


def test_a_validation_split_is_balanced_and_apart_from_training():
    whole, module = data(), data(val=100)
    assert module.scored == "val" and whole.scored == "test"
    assert len(module.val.labels) == 100 and module.train_images == 1337
    assert np.bincount(module.val.labels, minlength=10).min() >= 9
    rows = {im.tobytes() for im in module.train.images}
    assert not rows & {im.tobytes() for im in module.val.images}
    evaluated = torch.cat([b.labels for b in module.val_dataloader()])
    assert len(evaluated) == 100


def test_a_process_without_an_image_is_refused_in_every_process():
    for rank in (0, 2):
        shared = data(rank, 3, val=2)
        with pytest.raises(UserError, match="2 images cannot be shared among 3 processes"):
            shared.val_dataloader()
    assert len(data(1, 2, val=2).val_dataloader()) == 1


@pytest.mark.parametrize(
    "given, devices, first",
    [
        ({"batch_size": 2, "accumulate": 2}, 1, 1),
        ({"batch_size": 7, "accumulate": 2}, 2, 1),
        ({"batch_size": 4}, 1, 360),  # 1437 images: one is left over
        ({"batch_size": 4, "steps": 359}, 1, None),
        ({"batch_size": 4}, 2, None),  # the one left over joins the batch before
        ({"batch_size": 5}, 1, None),
    ],
)
def test_the_first_iteration_of_one_image_at_a_time_is_known(given, devices, first):
    assert data(**{"steps": 1000, **given}).one_at_a_time(devices) == first


def test_the_test_images_are_never_augmented():
    for batch in data().test_dataloader():
        assert batch.views is None
    assert next(iter(data(augment=False).train_dataloader())).views is None


def test_statistics_come_from_the_images_that_train():
    assert not torch.equal(data().normalize.mean, data(val=700).normalize.mean)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"batch_size": 2000}, "the batch of 2000 is larger than the 1437 training images"),
        ({"val": 1437}, "cannot hold out 1437 of 1437"),
        ({"classes": 9}, "9 classes were asked for, the images have 10: 0, 1, 2, 3, 4, ..."),
    ],
)
def test_settings_that_do_not_fit_the_images(given, message):
    assert data(classes=10).classes == tuple("0123456789")
    with pytest.raises(UserError, match=message):
        data(**given)


# Class folders of photographs.


@pytest.fixture
def class_folders(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for split, n in [("train", 6), ("val", 3)]:
        for c in ("ant", "bee"):
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)
                mode = ("RGB", "L", "CMYK")[i % 3]
                Image.fromarray(pixels).convert(mode).save(tmp_path / split / c / f"{i}.jpg")
    return tmp_path


def test_photographs_of_any_mode_and_size_become_batches(class_folders):
    given = {"dataset": "folder", "data_dir": str(class_folders), "depth": 18, "batch_size": 4}
    module = ImageData(Experiment(**given, steps=3, workers=0))
    module.trainer = FakeTrainer()
    module.setup()
    batches = list(module.train_dataloader())
    assert [b.images.shape for b in batches] == [(4, 224, 224, 3)] * 3
    assert sorted(torch.cat([b.labels for b in batches]).tolist()) == [0] * 6 + [1] * 6
    again = list(module.train_dataloader())
    torch.testing.assert_close(batches[0].images, again[0].images)
    tested = module.test_dataloader()
    for _ in range(2):  # Lightning requests it once, and iterates over it at each evaluation
        assert sum(len(b.labels) for b in tested) == 6
    assert module.classes == ("ant", "bee")


@pytest.mark.parametrize("augment", [True, False])
def test_photographs_are_the_same_in_every_epoch_unless_augmented(class_folders, augment):
    given = {"dataset": "folder", "data_dir": str(class_folders), "depth": 18, "batch_size": 12}
    batches = data(**given, augment=augment, steps=2, workers=0).train_dataloader()
    first, second = (sorted(b.images.sum((1, 2, 3)).tolist()) for b in batches)
    assert (first == second) is not augment


def test_every_seed_and_epoch_draws_crops_of_its_own(class_folders, monkeypatch):
    """PyTorch's generator uses 32 bits of a seed: all these once had the crops of the first."""
    drawn, box = [], folder.random_box
    monkeypatch.setattr(folder, "random_box", lambda *g: drawn.append(g[3][0]) or box(*g))
    view = PROTOCOLS["224"].view(32)
    for seed, epoch in ((0, 0), (0, 2048), (1, 0), (20240101, 0), (2**31 - 1, 0)):
        views = folder.FolderImages(folder.scan(class_folders, "train"), 32, "scale", seed, view)
        pixels, _ = views[3, epoch]
        torch.testing.assert_close(pixels, views[3, epoch][0])
    assert drawn[::2] == drawn[1::2] and len(set(drawn)) == 5
    assert drawn[0] == pytest.approx(0.2867, abs=1e-4)  # must not change, so that runs continue


def test_a_photograph_is_mirrored_left_to_right_or_not_at_all(class_folders, monkeypatch):
    monkeypatch.setattr(folder, "random_box", lambda width, height, *_: (0, 0, width, height))
    view = PROTOCOLS["224"].view(32)
    views = folder.FolderImages(folder.scan(class_folders, "train"), 32, "scale", 0, view)
    one, other = torch.stack([views[0, epoch][0] for epoch in range(8)]).unique(dim=0)
    assert torch.equal(one.flip(1), other)


def test_training_crops_lie_inside_the_photograph_and_are_as_large_as_the_sources_say():
    g, areas = torch.Generator().manual_seed(0), []
    for crop in ("scale", "scale-aspect"):
        for width, height in [(500, 375), (60, 200), (224, 224)]:
            for _ in range(200):
                draws = torch.rand(folder.DRAWS, generator=g, dtype=torch.float64).tolist()
                left, top, right, bottom = folder.random_box(width, height, crop, draws)
                assert 0 <= left < right <= width + 1e-9
                assert 0 <= top < bottom <= height + 1e-9
                if crop == "scale":
                    side = (right - left) / min(width, height)
                    assert 224 / 480 - 1e-9 <= side <= 224 / 256 + 1e-9
                else:
                    areas.append((right - left) * (bottom - top) / (width * height))
                    assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9
    assert 0.08 <= min(areas) < 0.1 and 0.9 < max(areas) <= 1


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: shutil.rmtree(r / "val"), "there is no folder .*val or .*test"),
        (lambda r: (r / "val" / "cow").mkdir(), "val has classes that train lacks: cow"),
        (lambda r: (r / "train" / "cow").mkdir(), "classes of .*train have no images: cow"),
        (lambda r: [p.unlink() for p in (r / "val").glob("*/*")], "no images in .*val"),
    ],
)
def test_a_folder_that_is_not_right(class_folders, damage, message):
    damage(class_folders)
    with pytest.raises(UserError, match=message):
        train = folder.scan(class_folders, "train")
        folder.scan(class_folders, "test", train.classes)


def test_hidden_names_and_folders_are_no_images(class_folders):
    before = folder.scan(class_folders, "train")
    (class_folders / "train" / ".ipynb_checkpoints").mkdir()
    (class_folders / "train" / "ant" / "album.jpg").mkdir()
    (class_folders / "train" / "ant" / "._0.jpg").write_bytes(b"of a Mac")
    after = folder.scan(class_folders, "train")
    assert (after.files, after.classes) == (before.files, before.classes)


def test_a_class_that_is_alone_is_told(class_folders):
    told: list[str] = []
    shutil.rmtree(class_folders / "train" / "bee")
    folder.scan(class_folders, "train", tell=told.append)
    shutil.rmtree(class_folders / "val" / "bee")
    folder.scan(class_folders, "test", ("ant",), tell=told.append)
    assert told == [f"{class_folders} has one class to learn, ant, and none to tell it from"]


def test_files_that_are_not_read_as_images_are_told(class_folders):
    told: list[str] = []
    for name in ("a.gif", "b.jfif"):  # the latter is a JPEG, as browsers save it
        (class_folders / "train" / "ant" / name).write_bytes(b"")
    found = folder.scan(class_folders, "train", tell=told.append)
    assert len(found.files) == 13
    [line] = told
    assert f"1 file in {class_folders / 'train'} is not read as an image: image names" in line


def test_names_need_not_be_text(class_folders):
    """If they are text, the digest must not change, so that runs can continue."""
    known = "a304a839"
    assert folder.digest(folder.scan(class_folders, "train")).startswith(known)
    where = class_folders / "train" / "ant"
    (where / "0.jpg").rename(os.fsdecode(os.fsencode(where) + b"/\xe9.jpg"))
    assert not folder.digest(folder.scan(class_folders, "train")).startswith(known)


def test_who_has_learned_its_classes_needs_the_test_images_alone(class_folders):
    given = {"dataset": "folder", "data_dir": str(class_folders), "depth": 18, "batch_size": 12}
    both = ImageData(Experiment(**given))
    both.setup()
    shutil.rmtree(class_folders / "train")
    alone = ImageData(Experiment(**given), both.classes)
    alone.setup()
    assert alone.test.files == both.test.files and torch.equal(alone.test.labels, both.test.labels)
    assert alone.classes == both.classes and not alone.train_images
    with pytest.raises(UserError, match="val has classes that the checkpoint lacks: "):
        ImageData(Experiment(**given), both.classes[1:]).setup()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_photograph_is_named(class_folders, workers):
    (class_folders / "train" / "ant" / "0.jpg").write_bytes(b"nothing")
    given = {"dataset": "folder", "data_dir": str(class_folders), "depth": 18, "batch_size": 12}
    module = ImageData(Experiment(**given, steps=1, workers=workers))
    module.trainer = FakeTrainer()
    module.setup()
    with pytest.raises(UserError, match="^cannot read the image [^\n]*ant.0.jpg[^\n]*$") as refused:
        list(module.train_dataloader())
    assert refused.value.hint == "resnetv2 data check lists all files that cannot be read"


def test_the_home_of_nobody_is_a_folder_that_is_not_there(tmp_path, here):
    photographs = ["--dataset", "folder", "--data-dir", "~no-user/photos", "--depth", 18]
    done = here("train", *photographs, "--output", tmp_path / "run", status=2)
    assert "there is no folder ~no-user/photos/train" in done.stderr
