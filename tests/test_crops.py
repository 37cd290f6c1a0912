"""Crops of photographs: the same pixels as the reference, whatever the file format."""

import io

import numpy as np
import pytest
import torch
from conftest import encoded
from fuzzing import cases, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from resnetv2_cli.data import crop, folder, turbo
from resnetv2_cli.data.turbo import Box
from resnetv2_cli.errors import UserError

needs_turbo = pytest.mark.skipif(turbo.library() is None, reason="there is no TurboJPEG 3")


def by_pil(content: bytes, scale: int) -> np.ndarray:
    """The whole picture, decoded by Pillow at 1/``scale`` of its size."""
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (image.width // scale, image.height // scale))
        return np.asarray(image.convert("RGB"))


KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "grey": {"mode": "L"},
}


@needs_turbo
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_region_has_the_very_pixels_that_pil_decodes(kind, scale):
    content = encoded(213, 157, quality=88, **KINDS[kind])
    jpeg = turbo.plain(content, 10**6)
    whole = by_pil(content, scale)
    rng = np.random.default_rng(0)
    for _ in range(20):
        left, right = sorted(rng.choice(213 // scale + 1, 2, replace=False))
        top, bottom = sorted(rng.choice(157 // scale + 1, 2, replace=False))
        found = jpeg.region(Box(int(left), int(top), int(right), int(bottom)), scale)
        np.testing.assert_array_equal(found, whole[top:bottom, left:right])


def chosen(kind: str, seed: int) -> crop.Choose:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(folder.DRAWS, generator=generator, dtype=torch.float64).tolist()
    return lambda width, height: [folder.random_box(width, height, kind, draws)]


@pytest.mark.parametrize("kind", ["scale", "scale-aspect"])
def test_crops_are_the_reference_transforms_within_bounds(kind, photographs):
    """Reference: torchvision's crop and bicubic resize of the whole picture by Pillow. Bounds in
    gray levels: torch's resize differs by 2, or by more where one side grows and the other shrinks;
    at a reduced scale the JPEG's transform filters differently."""
    for seed, content in enumerate(photographs.values()):
        with Image.open(io.BytesIO(content)) as image:
            whole = image.convert("RGB")
        plan = crop.settled(chosen(kind, seed)(*whole.size), whole.size, 224)
        [box], s = plan
        width, height = box.right - box.left, box.bottom - box.top
        expected = resized_crop(
            whole, box.top * s, box.left * s, height * s, width * s, [224, 224],
            InterpolationMode.BICUBIC,
        )  # fmt: skip
        found = crop.crops(content, "it", chosen(kind, seed), 224)[0].numpy()
        apart = np.abs(np.asarray(expected, np.int16) - found)
        mixed = (width < 224) != (height < 224)
        mean, most = (3, 90) if s > 1 else (0.5, 30) if mixed else (0.05, 2)
        assert apart.mean() < mean and apart.max() <= most, (seed, s, apart.mean(), apart.max())


def test_a_crop_is_decoded_at_the_least_scale_that_has_its_pixels():
    for side, scale in [(223, 1), (447, 1), (448, 2), (900, 4), (5000, 8)]:
        plan = crop.settled([(10.4, 20.0, 10.4 + side, 20.0 + side)], (6000, 6000), 224)
        assert plan.scale == scale
        [box] = plan.boxes
        assert abs(box.left * scale - 10.4) <= scale / 2 + 1e-9
        assert min(box.right - box.left, box.bottom - box.top) >= min(side, 224)


def test_a_crop_at_the_edge_does_not_reach_over_it():
    """Its position and size are rounded, and so is the size of the picture."""
    assert crop.settled([(51, 0, 101, 50)], (101, 50), 25) == ([Box(25, 0, 50, 25)], 2)


@pytest.mark.parametrize("kind", ["scale", "scale-aspect"])
def test_without_the_library_the_pixels_are_the_same(kind, photographs, monkeypatch):
    some = [*list(photographs.values())[:4], encoded(1000, 900, quality=70)]
    fast = [crop.crops(content, "it", chosen(kind, i), 224) for i, content in enumerate(some)]
    monkeypatch.setattr(turbo, "library", lambda: None)
    slow = [crop.crops(content, "it", chosen(kind, i), 224) for i, content in enumerate(some)]
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)


OTHERS = {
    "progressive": {"progressive": True},
    "CMYK": {"mode": "CMYK"},
    "PNG": {"format": "PNG"},
    "PNG, palette": {"format": "PNG", "mode": "P"},
    "WebP": {"format": "WEBP"},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_file_is_read_in_the_usual_way(kind):
    content = encoded(**OTHERS[kind])
    assert turbo.plain(content, 10**6) is None
    found = crop.crops(content, "it", lambda w, h: [(5, 7, 45, 47)], 32)
    with Image.open(io.BytesIO(content)) as image:
        part = image.convert("RGB").crop((5, 7, 45, 47))
    expected = part.resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(expected, np.int16) - found[0].numpy()).max() <= 2


@pytest.mark.parametrize("cut", [0.2, 0.6, 0.95])
def test_a_photograph_that_is_cut_off_is_an_error_wherever_the_crop_is(cut):
    content = encoded(400, 300)
    with pytest.raises(UserError, match="cannot read the image it.jpg: .*truncated"):
        crop.crops(content[: int(cut * len(content))], "it.jpg", lambda w, h: [(0, 0, 9, 9)], 8)


def test_a_size_that_would_fill_the_memory_is_refused():
    content = bytearray(encoded())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = b"\xff\xff" * 2  # 65535 x 65535
    with pytest.raises(UserError, match="it.jpg: .*exceeds limit"):
        crop.crops(bytes(content), "it.jpg", lambda w, h: [(0, 0, 9, 9)], 8)


def saved(array: np.ndarray, **how) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **how)
    return out.getvalue()


PIXELS = saved(np.arange(30 * 22 * 3, dtype=np.uint8).reshape(22, 30, 3))
ARRAYS = {
    "magic alone": PIXELS[:6],
    "another version": PIXELS[:6] + b"\xff\xd8",
    "cut off": PIXELS[:-1],
    "no end": PIXELS + b"0",
    "a header of brackets": PIXELS[:10] + b"[" * 118,
    "a size that would fill the memory": PIXELS.replace(b"22, 30, 3", b"9" * 7 + b",30"),
    "no colors": saved(np.zeros((22, 30), np.uint8)),
    "numbers": saved(np.zeros((22, 30, 3), np.float32)),
    "nothing": saved(np.zeros((0, 30, 3), np.uint8)),
    "by columns": saved(np.asfortranarray(np.zeros((22, 30, 3), np.uint8))),
    "objects": saved(np.array([[["x"] * 3]], object), allow_pickle=True),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_is_no_image_is_an_error(kind):
    with pytest.raises(UserError, match="cannot read the image it.npy: "):
        crop.crops(ARRAYS[kind], "it.npy", chosen("scale", 0), 8)


SMALL = [PIXELS, *(encoded(30, 22, **how) for how in KINDS.values())]


@needs_turbo
@cases(400)
@given(content=mutated(SMALL), kind=st.sampled_from(["scale", "scale-aspect"]))
@pytest.mark.filterwarnings("ignore")  # from Pillow, about images that it can still read
def test_crops_of_random_bytes(content, kind):
    try:
        found = crop.crops(content, "it", chosen(kind, 0), 8)
    except UserError as error:
        assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
    else:
        assert found.shape == (1, 8, 8, 3)
