"""Images: read right from every layout, ordered and augmented by (seed, epoch, index) alone."""

import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from resnetv2_cli.config import Experiment
from resnetv2_cli.data import folder, images
from resnetv2_cli.data.augment import Normalize, crop_and_flip, statistics
from resnetv2_cli.data.catalog import CIFAR10, CIFAR100
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.data.order import Schedule, epoch_order, share
from resnetv2_cli.errors import UserError


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def cifar10(shared_data, tmp_path_factory):
    """All of CIFAR-10, decoded once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield images.load("cifar10", shared_data)


def test_cifar10_is_whole_and_in_the_official_order_of_classes(cifar10):
    assert cifar10.train.images.shape == (50_000, 32, 32, 3)
    assert np.bincount(cifar10.train.labels).tolist() == [5000] * 10
    assert np.bincount(cifar10.test.labels).tolist() == [1000] * 10
    assert CIFAR10.index("airplane") == 0 and CIFAR10.index("truck") == 9


def test_cifar10_has_its_known_mean_and_deviation(cifar10):
    mean, std = statistics(cifar10.train, "channel")
    known = [0.49139968, 0.48215841, 0.44653091], [0.24703223, 0.24348513, 0.26158784]
    np.testing.assert_allclose(mean.flatten(), known[0], atol=1e-6)
    np.testing.assert_allclose(std.flatten(), known[1], atol=1e-6)


def test_pixel_mean_is_the_mean_image(cifar10):
    mean, std = statistics(cifar10.train, "pixel-mean")
    assert mean.shape == (3, 32, 32) and std.unique().tolist() == [1]
    expected = cifar10.train.images[:, 5, 7, 2].mean() / 255
    assert mean[2, 5, 7].item() == pytest.approx(expected, abs=1e-6)


def test_the_cifar100_sample(shared_data):
    sample = images.load("cifar100", shared_data)
    assert np.bincount(sample.train.labels).tolist() == [50] * 100
    assert len(CIFAR100) == 100 and list(CIFAR100) == sorted(CIFAR100)


def test_the_digits_are_split_once_and_for_all():
    digits = images.digits()
    assert digits.train.images.shape == (1437, 32, 32, 3) and len(digits.test.labels) == 360
    assert digits.train.images.max() == 255
    assert images.digits().digest == digits.digest


# Small copies of CIFAR-10 in each layout, made of the same images.


@pytest.fixture
def small() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        split: {c: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for c in CIFAR10}
        for split, n in [("train", 5), ("test", 2)]
    }


def write_tree(root: Path, small: dict, suffix: str = "png") -> Path:
    for split, classes in small.items():
        for name, arrays in classes.items():
            place = root / split / name
            place.mkdir(parents=True)
            for i, pixels in enumerate(arrays):
                Image.fromarray(pixels).save(place / f"{i}.{suffix}", lossless=True)
    return root


def write_archive(root: Path, small: dict, monkeypatch) -> Path:
    """The official layout, with the md5 sums of these files in the place of the official ones."""
    import hashlib

    from torchvision.datasets import CIFAR10 as Official

    place = root / Official.base_folder
    place.mkdir(parents=True)
    pixels = {
        split: [(im, CIFAR10.index(c)) for c, ims in classes.items() for im in ims]
        for split, classes in small.items()
    }

    def batch(name: str, chosen: list) -> list[str]:
        rows = np.stack([im.transpose(2, 0, 1).reshape(-1) for im, _ in chosen])
        content = pickle.dumps({"data": rows, "labels": [label for _, label in chosen]})
        (place / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    train = [batch(f"data_batch_{k + 1}", pixels["train"][k::5][::-1]) for k in range(5)]
    monkeypatch.setattr(Official, "train_list", train)
    monkeypatch.setattr(Official, "test_list", [batch("test_batch", pixels["test"])])
    meta = pickle.dumps({"label_names": list(CIFAR10)})
    (place / "batches.meta").write_bytes(meta)
    md5 = hashlib.md5(meta).hexdigest()
    monkeypatch.setattr(Official, "meta", Official.meta | {"md5": md5})
    return root


def write_zips(root: Path, small: dict) -> Path:
    tree = write_tree(root / "loose", small, "webp")
    (root / "cifar10").mkdir()
    files = [p for p in sorted(tree.rglob("*")) if p.is_file()]
    for part in range(2):
        with zipfile.ZipFile(root / "cifar10" / f"part-{part}.zip", "w") as archive:
            for file in files[part::2]:
                archive.write(file, file.relative_to(tree))
    shutil.rmtree(tree)
    return root


def test_every_layout_gives_the_same_arrays(small, tmp_path, monkeypatch):
    copies = [
        images.load("cifar10", write_tree(tmp_path / "a", small)),
        images.load("cifar10", write_tree(tmp_path / "b" / "cifar10", small, "webp").parent),
        images.load("cifar10", write_zips(tmp_path / "c", small)),
        images.load("cifar10", tmp_path / "c" / "cifar10"),
        images.load("cifar10", write_archive(tmp_path / "d", small, monkeypatch)),
    ]
    for copy in copies[1:]:
        for split in (0, 1):
            np.testing.assert_array_equal(copy[split].images, copies[0][split].images)
            np.testing.assert_array_equal(copy[split].labels, copies[0][split].labels)
        assert copy.digest == copies[0].digest
    original = {im.tobytes() for im in small["train"]["cat"]}
    cats = copies[0].train.images[copies[0].train.labels == 3]
    assert {im.tobytes() for im in cats} == original


def test_the_cache_serves_until_a_file_changes(small, tmp_path, monkeypatch):
    root = write_tree(tmp_path / "a", small)
    first = images.load("cifar10", root)
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", None)  # a second decoding would fail
        assert images.load("cifar10", root).digest == first.digest
    changed = np.zeros((32, 32, 3), np.uint8)
    Image.fromarray(changed).save(root / "train" / "cat" / "9.png")
    (root / "train" / "cat" / "0.png").unlink()
    assert images.load("cifar10", root).digest != first.digest
    seen = images.load("cifar10", root).digest
    changed += 1
    Image.fromarray(changed).save(root / "train" / "cat" / "9.png")  # in place
    assert images.load("cifar10", root).digest != seen
    for file in (tmp_path / "cache").rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:5000])
    assert images.load("cifar10", root).digest != first.digest  # a damaged cache is read anew


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: shutil.rmtree(r / "test"), "half of cifar10 is missing: there is no .*test"),
        (lambda r: shutil.rmtree(r / "train" / "cat"), r"train lacks 1 of its classes \(cat\)"),
        (lambda r: (r / "train/cat/0.png").unlink(), "train/cat has 4 images, others 5"),
        (lambda r: (r / "test/dog/1.png").write_bytes(b"no"), "cannot read the image .*dog.1.png"),
        (
            lambda r: (r / "test/dog/1.png").write_bytes((r / "test/dog/1.png").read_bytes()[:900]),
            "cannot read the image .*dog.1.png",
        ),
        (lambda r: Image.new("RGB", (8, 9)).save(r / "test/dog/1.png"), "1.png is 8x9, not 32x32"),
    ],
)
def test_a_damaged_copy_is_one_clear_error(small, tmp_path, damage, message):
    root = write_tree(tmp_path / "a", small)
    damage(root)
    with pytest.raises(UserError, match=message):
        images.load("cifar10", root)


# The order.


def test_an_epoch_is_a_function_of_seed_and_number():
    first, again = epoch_order(1000, 3, 7), epoch_order(1000, 3, 7)
    torch.testing.assert_close(first, again)
    for seed, epoch in [(3, 8), (4, 7)]:
        assert (epoch_order(1000, seed, epoch).order != first.order).float().mean() > 0.9
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


class FakeTrainer:
    """What the DataModule asks of a trainer."""

    def __init__(self, rank: int = 0, ranks: int = 1, step: int = 0) -> None:
        self.global_rank, self.world_size, self.global_step = rank, ranks, step
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()


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
    assert np.bincount(module.val.labels).min() >= 9
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
    ],
)
def test_settings_that_do_not_fit_the_images(given, message):
    with pytest.raises(UserError, match=message):
        data(**given)


# Class folders of photographs.


@pytest.fixture
def photographs(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for split, n in [("train", 6), ("val", 3)]:
        for c in ("ant", "bee"):
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)
                mode = ("RGB", "L", "CMYK")[i % 3]
                Image.fromarray(pixels).convert(mode).save(tmp_path / split / c / f"{i}.jpg")
    return tmp_path


def test_photographs_of_any_mode_and_size_become_batches(photographs):
    given = {"dataset": "folder", "data_dir": str(photographs), "depth": 18, "batch_size": 4}
    module = ImageData(Experiment(**given, steps=3, workers=0))
    module.trainer = FakeTrainer()
    module.setup()
    batches = list(module.train_dataloader())
    assert [b.images.shape for b in batches] == [(4, 224, 224, 3)] * 3
    assert sorted(torch.cat([b.labels for b in batches]).tolist()) == [0] * 6 + [1] * 6
    again = list(module.train_dataloader())
    torch.testing.assert_close(batches[0].images, again[0].images)
    tested = module.test_dataloader()
    for _ in range(2):  # the framework asks for it once, and goes through it at each evaluation
        assert sum(len(b.labels) for b in tested) == 6
    assert module.classes == ("ant", "bee")


def test_training_crops_lie_inside_the_photograph():
    g = torch.Generator().manual_seed(0)
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


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: shutil.rmtree(r / "val"), "there is no folder .*val or .*test"),
        (lambda r: (r / "val" / "cow").mkdir(), "val has classes that train lacks: cow"),
        (lambda r: [p.unlink() for p in (r / "val").glob("*/*")], "no images in .*val"),
    ],
)
def test_a_folder_that_is_not_right(photographs, damage, message):
    damage(photographs)
    with pytest.raises(UserError, match=message):
        train = folder.scan(photographs, "train")
        folder.scan(photographs, "test", train.classes)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_photograph_is_named(photographs, workers):
    (photographs / "train" / "ant" / "0.jpg").write_bytes(b"nothing")
    given = {"dataset": "folder", "data_dir": str(photographs), "depth": 18, "batch_size": 12}
    module = ImageData(Experiment(**given, steps=1, workers=workers))
    module.trainer = FakeTrainer()
    module.setup()
    with pytest.raises(UserError, match="^cannot read the image [^\n]*ant.0.jpg"):
        list(module.train_dataloader())
