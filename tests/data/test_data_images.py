"""jaxtrain.data.images and randaugment: crops as pure functions of (seed, epoch, example), against Pillow."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_data import write_tfds
from PIL import Image, JpegImagePlugin

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.data import TFDS, Order, Sequential, Subset
from jaxtrain.data.images import Images, RandomCrops
from jaxtrain.data.order import permutation
from jaxtrain.data.randaugment import Draws, RandAugment, _operations
from jaxtrain.program.loader import Streamed

SIZES = [(60, 40), (40, 60), (50, 50), (90, 31), (33, 97), (16, 20), (128, 120)]  # width, height
N, BATCH, SIZE = 21, 8, 24


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Make a photograph-like image: a few large blobs and a little noise."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    noise = rng.normal(0, 3, (height, width, 3))
    pixels = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC)) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(picture: Image.Image, kind: str = "jpeg", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


PHOTOS = [encode(smooth(*SIZES[i % len(SIZES)], seed=i), quality=90) for i in range(N)]


def grid(width: int, height: int) -> Image.Image:
    """Make an image whose red is the column and whose green is the row."""
    row, column = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([column, row, 0 * row], -1).astype(np.uint8))


def board(width: int, height: int, square: int) -> tuple[Image.Image, Image.Image]:
    """Make a checkerboard and its mask: 1 where red is 200, 3 where it is 0; asymmetric in one corner."""
    row, column = np.mgrid[:height, :width]
    dark = (row // square + column // square) % 2 == 1
    dark[: height // 2, : width // 3] = False  # so that a mirrored image differs
    pixels = np.where(dark[..., None], 0, 200).repeat(3, -1).astype(np.uint8)
    return Image.fromarray(pixels), Image.fromarray((1 + 2 * dark).astype(np.uint8))


def labelled(root: Path, name: str, files: list[bytes]) -> TFDS:
    """Write the files with their list index as label, because TFDS reorders them."""
    import tensorflow_datasets as tfds

    examples = [{"image": data, "label": i} for i, data in enumerate(files)]
    label = tfds.features.ClassLabel(num_classes=len(files))
    write_tfds(root, name, {"image": tfds.features.Image(), "label": label}, train=examples)
    return TFDS(name, data_dir=str(root))


def masked(root: Path, name: str, pairs: list[tuple[bytes, bytes]]) -> TFDS:
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "where": tfds.features.Image(shape=(None, None, 1)),
        "text": tfds.features.Text(),
    }
    examples = [{"image": image, "where": mask, "text": "x"} for image, mask in pairs]
    write_tfds(root, name, features, train=examples)
    return TFDS(name, data_dir=str(root))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def photos(root: Path) -> TFDS:
    return labelled(root, "photos", PHOTOS)


@pytest.fixture(scope="module")
def boards(root: Path) -> TFDS:
    kinds = ["png", "jpeg"]
    pairs = [board(120, 90, 15), board(600, 450, 75)]
    return masked(
        root, "boards", [(encode(p, k), encode(m, "png")) for (p, m), k in zip(pairs, kinds, strict=True)]
    )


def drawn(source: Any, ids: Any, epochs: Any, seed: int = 0) -> np.ndarray:
    return source.draw(np.array(ids), np.array(epochs), seed)["image"]


# Evaluation


@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_evaluation_matches_pillow(photos: TFDS, crop: float) -> None:
    batch = Images(photos, SIZE, crop).gather(np.arange(N))
    assert batch["image"].shape == (N, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32 and sorted(batch["label"]) == list(range(N))
    for number, found in zip(batch["label"], batch["image"], strict=True):
        with Image.open(io.BytesIO(PHOTOS[number])) as picture:
            side = crop * min(picture.size)
            left, top = (picture.width - side) / 2, (picture.height - side) / 2
            box = (left, top, left + side, top + side)
            wanted = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)
            np.testing.assert_array_equal(found, np.asarray(wanted))


def test_evaluation_equals_resize_then_centre_crop(root: Path) -> None:
    photo = smooth(96, 64)
    found = Images(labelled(root, "one", [encode(photo, "png")]), 24, crop=0.75).gather(np.array([0]))[
        "image"
    ][0]
    wanted = photo.resize((48, 32), Image.Resampling.BILINEAR).crop((12, 4, 36, 28))
    assert np.abs(found - np.asarray(wanted, int)).max() <= 1


def test_evaluation_does_not_depend_on_the_batch(photos: TFDS, mesh8: Any) -> None:
    for source in (Images(photos, SIZE), RandomCrops(photos, SIZE, stages=(RandAugment(),))):
        full = source.gather(np.arange(N))["image"]
        np.testing.assert_array_equal(full, Images(photos, SIZE).gather(np.arange(N))["image"])
        np.testing.assert_array_equal(source.gather(np.array([20, 3, 3]))["image"], full[[20, 3, 3]])
        loader = Streamed(source, Sequential(N, BATCH), mesh8)
        np.testing.assert_array_equal(loader.batch(1)["image"], full[8:16])
        loader.close()


def test_every_image_mode_becomes_rgb_and_orientation_is_ignored(root: Path) -> None:
    rgb = smooth(40, 30)
    palette = rgb.quantize(16)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: rotated by 90 degrees
    alpha = rgb.copy()
    alpha.putalpha(Image.new("L", rgb.size, 7))
    files = [
        encode(rgb.convert("L"), "png"),
        encode(rgb.convert("CMYK"), "jpeg", quality=95),
        encode(palette, "png"),
        encode(palette, "png", transparency=bytes(range(16))),
        encode(alpha, "png"),
        encode(rgb, "jpeg", quality=95, exif=rotated),
        encode(rgb.convert("LA"), "png"),
        encode(rgb.convert("L"), "jpeg", quality=95),
    ]
    grey, colours = np.asarray(rgb.convert("L").convert("RGB")), np.asarray(palette.convert("RGB"))
    wanted = [grey, rgb, colours, colours, rgb, rgb, grey, grey]
    batch = Images(labelled(root, "kinds", files), size=30, crop=1.0).gather(np.arange(len(files)))
    for number, found in zip(batch["label"], batch["image"], strict=True):
        centre = np.asarray(wanted[number], np.int32)[:, 5:35]
        assert np.abs(centre - found).mean() < (4 if files[number][:2] == b"\xff\xd8" else 0.01), number


# Training


def test_crop_depends_only_on_seed_epoch_and_example(photos: TFDS) -> None:
    source = RandomCrops(photos, SIZE, stages=(RandAugment(),))
    ids, epochs = np.arange(N), np.arange(N) % 3
    full = source.draw(ids, epochs, 5)
    assert full["image"].shape == (N, SIZE, SIZE, 3) and full["image"].dtype == np.uint8
    np.testing.assert_array_equal(full["label"], source.gather(ids)["label"])
    order = np.random.default_rng(0).permutation(N)
    copy = pickle.loads(pickle.dumps(source))
    for part in (order[:7], order[7:], order[:1]):
        np.testing.assert_array_equal(drawn(copy, part, epochs[part], 5), full["image"][part])
    for other in (drawn(source, ids, epochs, 6), drawn(source, ids, epochs + 3, 5)):
        assert (other != full["image"]).any((1, 2, 3)).sum() > N - 2
    one = drawn(source, [4] * 20, range(20))
    assert len(np.unique(one, axis=0)) == 20
    assert drawn(source, ids[:0], ids[:0]).shape == (0, SIZE, SIZE, 3)


def test_duplicate_images_get_different_crops(root: Path) -> None:
    twins = RandomCrops(labelled(root, "twins", PHOTOS[:1] * 9), SIZE)
    assert len(np.unique(drawn(twins, range(9), [0] * 9), axis=0)) == 9


@pytest.mark.full("[0]")
@pytest.mark.parametrize("workers", [0, 2])
def test_crops_are_the_same_after_resuming(photos: TFDS, mesh1: Any, workers: int) -> None:
    source = RandomCrops(photos, SIZE, stages=(RandAugment(),))
    order = Order(seed=9, n=N, batch=BATCH)
    loader = Streamed(source, order, mesh1, workers)
    for step in (2, 3) if workers else (2, 3, 0):  # Batch 2 continues into the second epoch.
        ids, epochs = order.ids_and_epochs(step)
        np.testing.assert_array_equal(loader.batch(step)["image"], drawn(source, ids, epochs, 9))
    loader.close()


def test_subset_of_random_crops(photos: TFDS) -> None:
    source = RandomCrops(photos, SIZE)
    found = Subset(source, np.array([5, 2])).draw(np.array([1, 0]), np.array([0, 1]), 3)["image"]
    np.testing.assert_array_equal(found, drawn(source, [2, 5], [0, 1], 3))


def cropped(source: RandomCrops, n: int) -> dict[str, np.ndarray]:
    """Return the positions of ``n`` crops of a ``grid`` image, read from their pixels."""
    image = drawn(source, [0] * n, range(n)).astype(float)
    width = (image[:, 8, 13, 0] - image[:, 8, 2, 0]) * 16 / 11
    height = (image[:, 13, 8, 1] - image[:, 2, 8, 1]) * 16 / 11
    x, y = image[:, :, 2:14, 0].mean((1, 2)), image[:, 2:14, :, 1].mean((1, 2))
    return {"width": abs(width), "height": height, "x": x + 0.5, "y": y + 0.5, "mirrored": width < 0}


@pytest.mark.full("tests/data/test_data_images.py::test_crops_are_the_same_after_resuming")
def test_distribution_of_crops(root: Path) -> None:
    one = labelled(root, "grid", [encode(grid(256, 256), "png")])
    at = cropped(RandomCrops(one, 16, area=(0.1, 0.5), ratio=(0.5, 2.0)), 800)
    area, ratio = at["width"] * at["height"] / 256**2, at["width"] / at["height"]
    assert 0.09 < area.min() < 0.12 and 0.47 < area.max() < 0.52
    assert abs(area.mean() - 0.3) < 0.02  # uniform
    assert 0.47 < ratio.min() < 0.55 and 1.8 < ratio.max() < 2.12
    assert abs(np.log(ratio).mean()) < 0.06 and abs(np.median(ratio) - 1) < 0.1
    for middle, side in (("x", "width"), ("y", "height")):
        low, high = at[middle] - at[side] / 2, at[middle] + at[side] / 2
        assert -2 < low.min() < 3 and 253 < high.max() < 258, "up to both borders and not over them"
        offset = low / (256 - at[side])  # uniform in [0, 1]
        assert abs(offset.mean() - 0.5) < 0.04 and abs(offset.var() - 1 / 12) < 0.01
    assert 340 < at["mirrored"].sum() < 460
    still = cropped(RandomCrops(one, 16, area=(1.0, 1.0), ratio=(1.0, 1.0), flip=False), 40)
    assert not still["mirrored"].any() and np.all(abs(still["width"] - 256) < 3)


@pytest.mark.parametrize(("size", "box"), [((250, 20), (112, 0, 138, 20)), ((20, 250), (0, 112, 20, 139))])
def test_crop_falls_back_to_the_centre(root: Path, size: Any, box: Any) -> None:
    strip = grid(*size)
    source = labelled(root, f"strip{size[0]}", [encode(strip, "png")])
    crops = RandomCrops(source, 16, area=(0.9, 1.0), ratio=(0.75, 1.3), flip=False)
    wanted = strip.crop(box).resize((16, 16), Image.Resampling.BILINEAR)
    found = drawn(crops, [0, 0], [0, 1]).astype(int)
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - np.asarray(wanted, int)).max() <= 1


def test_large_jpeg_is_decoded_smaller_in_training_only(root: Path, monkeypatch: Any) -> None:
    source = labelled(root, "large", [encode(smooth(700, 500, seed=i), quality=95) for i in range(4)])
    crops = RandomCrops(source, SIZE, area=(0.5, 1.0))
    drafted: list[tuple[int, int]] = []
    real = JpegImagePlugin.JpegImageFile.draft

    def spy(self: Any, mode: Any, size: Any) -> Any:
        drafted.append(size)
        return real(self, mode, size)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    crops.gather(np.arange(4))
    assert not drafted
    fast = drawn(crops, range(4), [0] * 4).astype(int)
    assert drafted == [(87, 62)] * 4
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda *args: None)
    slow = drawn(crops, range(4), [0] * 4).astype(int)
    assert 0 < np.abs(fast - slow).mean() < 1.5, "other pixels of the same crop"


# Masks


def mistakes(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the share of each image's pixels whose class clearly contradicts their colour."""
    red = batch["image"][..., 0].astype(int)
    wrong = (red > 100) != (batch["label"] == 0)
    return (wrong & (abs(red - 100) > 60)).mean((1, 2))


def test_mask_is_cropped_resized_and_flipped_with_its_image(boards: TFDS) -> None:
    source = RandomCrops(boards, 64, mask="where", area=(0.2, 1.0))
    ids, epochs = np.arange(80) % 2, np.arange(80) // 2
    batch = source.draw(ids, epochs, 0)
    assert batch["label"].dtype == np.int32 and batch["label"].shape == (80, 64, 64)
    assert sorted(np.unique(batch["label"])) == [0, 2]
    assert mistakes(batch).max() < 0.01
    assert mistakes({**batch, "label": batch["label"][:, :, ::-1]}).mean() > 0.3, (
        "a mirrored mask is detected"
    )
    centre = Images(boards, 64, crop=1.0, mask="where").gather(np.arange(2))
    assert mistakes(centre).max() < 0.01


def test_mask_is_resized_by_nearest_neighbour(boards: TFDS) -> None:
    mask = np.asarray(board(120, 90, 15)[1]).astype(int)
    found = Images(boards, 90, crop=1.0, mask="where", offset=0).gather(np.arange(2))["label"]
    for one in found:  # The second board is the first, enlarged five times.
        np.testing.assert_array_equal(one, mask[:, 15:105])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (30, 20), 0), r"example 0 of split train: its mask 'where' holds 0.*offset=1"),
        (Image.new("L", (20, 30), 1), r"example 0 .* mask 'where' has 20 x 30 pixels .* 30 x 20"),
        (Image.new("RGB", (30, 20), 1), r"example 0 .* mask 'where' is RGB"),
    ],
)
def test_invalid_mask_is_refused(tmp_path: Path, mask: Image.Image, message: str) -> None:
    source = masked(tmp_path, "wrong", [(encode(smooth(30, 20)), encode(mask, "png"))])
    for use in (Images.gather, lambda s, ids: RandomCrops(source, 8, mask="where").draw(ids, ids, 0)):
        with pytest.raises(InputError, match=message) as caught:
            use(Images(source, 8, mask="where"), np.array([0]))
        assert "\n" not in str(caught.value)


def test_palette_mask_is_read_by_index(tmp_path: Path) -> None:
    mask = board(60, 60, 15)[1]
    palette = mask.copy()
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 0, 0, 200, 0])
    source = masked(tmp_path, "palette", [(encode(smooth(60, 60)), encode(palette, "png"))])
    found = Images(source, 60, crop=1.0, mask="where").gather(np.array([0]))["label"][0]
    np.testing.assert_array_equal(found, np.asarray(mask).astype(int) - 1)


# Errors and metadata


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_image_is_located(tmp_path: Path, damage: str) -> None:
    data = encode(smooth(300, 200), quality=95)
    broken = {"cut": data[: len(data) // 2], "noise": b"not a picture" * 9, "empty": b""}[damage]
    source = labelled(tmp_path, "broken", [broken])
    for use in (Images(source, 8).gather, lambda ids: RandomCrops(source, 8).draw(ids, ids, 0)):
        with pytest.raises(
            RunError, match=r"set broken: record 0 of .*, example 0 of split train: .*'image'"
        ) as caught:
            use(np.array([0]))
        assert "\n" not in str(caught.value)


def test_wrong_feature_is_refused(photos: TFDS, boards: TFDS, root: Path) -> None:
    ids = np.array([0])
    for source, message in (
        (Images(photos, 8, image="label"), "'label' is not an image"),
        (Images(boards, 8, label="text"), "'text' is not an integer"),
        (Images(boards, 8, mask="text"), "'text' cannot be decoded|'text' is not an image"),
        (Images(photos, 8, label="colour"), "has no feature 'colour': it has image, label"),
        (Images(labelled(root, "deep", [encode(Image.new("I;16", (9, 9)), "png")]), 8), "more than 8 bits"),
    ):
        with pytest.raises((InputError, RunError), match=message):
            source.gather(ids)
    with pytest.raises(IndexError):
        Images(photos, 8).gather(np.array([N]))
    bad = RandomCrops(photos, 8, stages=(lambda picture, draws: picture.resize((4, 4)),))
    with pytest.raises(InputError, match="must return an RGB image"):
        drawn(bad, [0], [0])


REFUSED: dict[str, Any] = {
    "size": lambda s: Images(s, 0),
    "crop": lambda s: Images(s, 8, crop=1.1),
    "offset": lambda s: Images(s, 8, offset=-1),
    "data.Subset": lambda s: Images(Subset(s, np.arange(2)), 8),  # type: ignore[arg-type]
    "area": lambda s: RandomCrops(s, 8, area=(0.0, 1.0)),
    "ratio": lambda s: RandomCrops(s, 8, ratio=(2.0, 1.0)),
    "stages and a mask": lambda s: RandomCrops(s, 8, mask="where", stages=(RandAugment(),)),
    "num": lambda s: RandAugment(num=-1),
    "magnitude": lambda s: RandAugment(magnitude=11),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_settings_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        REFUSED[name](TFDS("photos"))


def test_metadata_of_the_data_set(photos: TFDS, boards: TFDS, tmp_path: Path) -> None:
    absent = TFDS("nothing", data_dir=str(tmp_path))
    for source in (Images(absent, 8), RandomCrops(absent, 8)):
        assert not source.prepared() and source.name == "nothing" and source.data_dir == str(tmp_path)
        assert {k: (v.shape, v.dtype) for k, v in source.example().items()} == {
            "image": ((1, 8, 8, 3), np.uint8),
            "label": ((1,), np.int32),
        }
    assert Images(absent, 8, mask="where").example()["label"].shape == (1, 8, 8)
    source = RandomCrops(photos, 8)
    assert source.prepared() and len(source) == N and source.classes == N
    assert source.class_names == photos.class_names
    for other in (Images(boards, 8, mask="where"), Images(photos, 8, mask="x"), Images(photos, 8, label="x")):
        assert other.classes is None and other.class_names is None
    assert {k: v.dtype for k, v in source.example().items()} == {
        k: v.dtype for k, v in source.gather(np.array([0])).items()
    }


@pytest.mark.full("tests/cli/test_cli.py::test_importing_jaxtrain_loads_nothing_heavy")
def test_importing_is_cheap() -> None:
    code = (
        "import sys, jaxtrain.data.images, jaxtrain.data.randaugment;"
        "print([m for m in ('tensorflow_datasets', 'PIL') if m in sys.modules])"
    )
    repo = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Random numbers and RandAugment


def test_random_numbers_never_change() -> None:
    """Runs resume by these: if they differ, a resumed run sees other crops. Never update them."""
    draws = Draws(seed=1, epoch=2, example=3)
    got = [draws.integer(1000), draws.uniform(0.0, 1.0), draws.coin(0.5), draws.integer(1000)]
    assert got == [248, 0.04304472748440813, False, 358]


def test_random_numbers_are_uniform_and_independent() -> None:
    draws = Draws(0, 0, 0)
    integers = np.array([draws.integer(7) for _ in range(7000)])
    assert np.bincount(integers, minlength=7).min() > 850 and integers.max() == 6
    floats = np.array([draws.uniform(-1.0, 3.0) for _ in range(5000)])
    assert floats.min() >= -1 and floats.max() < 3 and abs(floats.mean() - 1) < 0.1
    assert abs(np.mean([draws.coin(0.2) for _ in range(5000)]) - 0.2) < 0.03
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2**40)]
    words = [Draws(*at).integer(2**64) for at in keys]
    words += np.random.Philox(key=np.zeros(2, np.uint64)).random_raw(4 * N).tolist()
    assert len(set(words)) == len(words), "no words are shared with other examples or with the permutation"
    assert permutation(0, 0, N)[0] == np.argmin(words[len(keys) : len(keys) + N])


@pytest.mark.parametrize("name", _operations())
def test_operations_scale_with_magnitude(name: str) -> None:
    picture = Image.eval(smooth(48, 40, seed=3), lambda v: 30 + v * 3 // 4)
    before = np.asarray(picture).astype(int)

    def change(strength: float) -> float:
        result = _operations()[name](picture, strength)
        assert result.size == picture.size and result.mode == "RGB"
        return float(np.abs(np.asarray(result) - before).mean())

    if name == "identity":
        assert change(1.0) == change(-1.0) == 0
    elif name in ("autocontrast", "equalize"):
        assert change(0.0) == change(1.0) > 1
    else:
        assert change(0.0) == 0
        for sign in (1, -1):
            assert 0 < change(0.3 * sign) < change(sign)


def test_geometric_operations_by_hand() -> None:
    picture, operations = grid(200, 100), _operations()

    def pixel(name: str, strength: float, column: int, row: int) -> list[int]:
        return np.asarray(operations[name](picture, strength))[row, column].tolist()

    assert pixel("translate_x", 0.5, 20, 50) == [20 + round(200 * 75 / 331), 50, 0]
    assert pixel("translate_y", -0.5, 20, 50) == [20, 50 - round(100 * 75 / 331), 0]
    assert pixel("translate_x", -1.0, 0, 50) == [128, 128, 128]
    assert np.abs(np.array(pixel("shear_x", 1.0, 50, 40)) - [62, 40, 0]).max() <= 1
    assert np.abs(np.array(pixel("shear_y", 1.0, 100, 40)) - [100, 70, 0]).max() <= 1
    # 30 degrees about the centre (100, 50): 40 pixels to its right come from 20 below or above.
    assert np.abs(np.array(pixel("rotate", 1.0, 140, 50)) - [135, 70, 0]).max() <= 1
    assert np.abs(np.array(pixel("rotate", -1.0, 140, 50)) - [135, 30, 0]).max() <= 1


def test_colour_operations_by_hand() -> None:
    picture, operations = Image.new("RGB", (4, 4), (100, 203, 31)), _operations()

    def pixel(name: str, strength: float) -> tuple[int, ...]:
        return operations[name](picture, strength).getpixel((1, 1))

    assert pixel("solarize", 0.5) == pixel("solarize", -0.5) == (100, 52, 31)
    assert pixel("solarize", 1.0) == (155, 52, 224)
    assert pixel("posterize", 1.0) == (96, 192, 16) and pixel("posterize", -0.5) == (100, 200, 28)
    assert pixel("brightness", -1.0) == (10, 20, 3) and pixel("brightness", 1.0)[0] == 190


def test_operations_and_directions_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []
    spies = {k: lambda p, s, k=k: seen.append((k, s)) or p for k in _operations()}  # type: ignore
    monkeypatch.setattr("jaxtrain.data.randaugment._operations", lambda: spies)
    for example in range(1400):
        RandAugment(num=3, magnitude=4)(Image.new("RGB", (2, 2)), Draws(0, 0, example))
    assert len(seen) == 4200 and {s for _, s in seen} == {0.4, -0.4}
    names = [name for name, _ in seen]
    assert len(spies) == 14 and all(240 < names.count(name) < 360 for name in spies)
    assert 1900 < sum(s > 0 for _, s in seen) < 2300


def test_randaugment_is_pure_and_uses_every_field() -> None:
    picture = smooth(40, 30)

    def result(stage: RandAugment, example: int = 0) -> bytes:
        return stage(picture, Draws(0, 0, example)).tobytes()

    assert result(RandAugment()) == result(RandAugment()) and picture.tobytes() == smooth(40, 30).tobytes()
    assert len({result(RandAugment(), i) for i in range(30)}) > 20
    assert result(RandAugment(num=0)) == picture.tobytes()
    for other in (RandAugment(num=3), RandAugment(magnitude=5)):
        assert any(result(other, i) != result(RandAugment(), i) for i in range(5))
