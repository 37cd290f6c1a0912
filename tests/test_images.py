"""Small images: read correctly from every layout, and cached; one clear error for damaged ones."""

import shutil
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from layouts import write_archive, write_tree, write_zips
from PIL import Image
from torchvision.datasets import utils

from resnetv2_cli.data import archive, images
from resnetv2_cli.data.augment import statistics
from resnetv2_cli.data.catalog import CIFAR10, CIFAR100
from resnetv2_cli.errors import UserError

pytestmark = pytest.mark.usefixtures("no_cache")


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


# Small copies of CIFAR in each layout, made of the same images.


def few(classes: tuple[str, ...]) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        split: {c: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for c in classes}
        for split, n in [("train", 5), ("test", 2)]
    }


@pytest.fixture
def small() -> dict[str, dict[str, np.ndarray]]:
    return few(CIFAR10)


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


def test_of_the_archive_of_cifar100_the_fine_labels_are_read(tmp_path, monkeypatch):
    """It also has coarse labels, which could be read as classes too."""
    small = few(CIFAR100)
    loose = images.load("cifar100", write_tree(tmp_path / "a", small))
    packed = write_archive(tmp_path / "b", small, monkeypatch, "cifar100")
    assert images.load("cifar100", packed).digest == loose.digest


def test_the_cache_serves_until_a_file_changes(small, tmp_path, monkeypatch):
    root = write_tree(tmp_path / "a", small)
    told: list[str] = []
    first = images.load("cifar10", root, told.append)
    cache = tmp_path / "cache" / "resnetv2"
    kept = f"cifar10 is kept in {cache} and will not be decoded again"
    assert told == ["decoding cifar10", kept]
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", None)  # a second decoding would fail
        (tmp_path / "link").symlink_to(root)
        for way in (root, tmp_path / "cache" / ".." / "a", tmp_path / "link"):
            assert images.load("cifar10", way, told.append).digest == first.digest
    assert len(told) == 2
    changed = np.zeros((32, 32, 3), np.uint8)
    Image.fromarray(changed).save(root / "train" / "cat" / "9.png")
    (root / "train" / "cat" / "0.png").unlink()
    assert images.load("cifar10", root).digest != first.digest
    seen = images.load("cifar10", root).digest
    changed += 1
    Image.fromarray(changed).save(root / "train" / "cat" / "9.png")  # overwritten in place
    assert images.load("cifar10", root).digest != seen
    for file in (tmp_path / "cache").rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:5000])
    assert images.load("cifar10", root).digest != first.digest  # a damaged cache is rebuilt


@pytest.mark.parametrize(
    "cache, error", [("a file", "Not a directory"), ("a full disk", "File too large")]
)
def test_a_cache_that_keeps_nothing_is_said(cache, error, small, tmp_path, full):
    root, told = write_tree(tmp_path / "a", small), []
    if cache == "a file":
        (tmp_path / "cache").touch()
    else:
        full(5000)
    for n in (1, 2):
        images.load("cifar10", root, told.append)
        assert told[-2] == "decoding cifar10" and len(told) == 2 * n
        at = tmp_path / "cache" / "resnetv2"
        assert told[-1] == f"cifar10 cannot be kept in {at}: {error}; each run decodes it again"
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_who_has_no_home_reads_images_each_time(small, tmp_path, homeless):
    told: list[str] = []
    assert images.load("cifar10", write_tree(tmp_path / "a", small), told.append) and not told


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: shutil.rmtree(r / "test"), "half of cifar10 is missing: there is no .*test"),
        (lambda r: [shutil.rmtree(p) for p in r.glob("t*/*")], "train lacks 10 of its classes"),
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
    root = write_tree(tmp_path / "cifar10", small)
    damage(root)
    with pytest.raises(UserError, match=message):
        images.load("cifar10", tmp_path)


def test_files_of_other_programs_are_no_images(small, tmp_path):
    """As among photographs; macOS writes them on every other filesystem."""
    root = write_tree(tmp_path / "a", small)
    whole = images.load("cifar10", root).digest
    for file in [*root.rglob("0.png")]:
        file.with_name("._0.png").write_bytes(b"of macOS")
    assert images.load("cifar10", root).digest == whole
    for file in [*root.rglob("[0-9].png")]:
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    assert images.load("cifar10", root).digest == whole
    archives = write_zips(tmp_path / "b", small)
    with zipfile.ZipFile(next(archives.rglob("*.zip")), "a") as packed:
        packed.writestr("train/cat/._0.png", b"of macOS")
    assert images.load("cifar10", archives).digest == whole


def test_of_processes_that_start_together_one_decodes(small, tmp_path, monkeypatch):
    root, calls, read = write_tree(tmp_path / "a", small), [], images.from_files

    def slow(*given):
        calls.append(time.sleep(0.3))
        return read(*given)

    monkeypatch.setattr(images, "from_files", slow)
    with ThreadPoolExecutor(3) as pool:
        digests = {made.digest for made in pool.map(images.load, ["cifar10"] * 3, [root] * 3)}
    assert len(calls) == len(digests) == 1


def test_the_digits_are_kept_and_then_need_no_scikit_learn(tmp_path, monkeypatch):
    first = images.digits()
    assert len(list((tmp_path / "cache").rglob("digits-*.npz"))) == 1
    monkeypatch.setattr(images, "embedded", lambda: pytest.fail("they were made again"))
    again = images.digits()
    assert again.digest == first.digest
    for split in ("train", "test"):
        for kept, made in zip(getattr(again, split), getattr(first, split), strict=True):
            np.testing.assert_array_equal(kept, made)


def test_of_processes_that_start_together_one_downloads_at_a_time(tmp_path, monkeypatch):
    """Each would write to the same file."""
    busy, most = [], []

    def download(url, root, name, md5):
        busy.append(url)
        most.append(len(busy))
        time.sleep(0.2)
        with tarfile.open(root / name, "w"):
            pass
        busy.pop()

    monkeypatch.setattr(utils, "download_url", download)
    official = SimpleNamespace(url="here", filename="a.tar", tgz_md5="")
    with ThreadPoolExecutor(3) as pool:
        made = pool.map(lambda _: archive.packed("cifar10", official, tmp_path / "new"), range(3))
        assert [*made] == [{}] * 3 and most == [1] * 3
