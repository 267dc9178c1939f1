"""The loader of CelebA, against small sets in the layout of the official files."""

import _thread
import errno
import io
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from celeba_files import write_celeba
from conftest import assert_user_error, run_here
from PIL import Image
from test_data import edited

import data
import draw
import train
from data import Split, UserError

PARTITION, ATTRIBUTES = "list_eval_partition.txt", "list_attr_celeba.txt"


def to_jpeg(image: Image.Image) -> bytes:
    image.save(content := io.BytesIO(), "JPEG", quality=100, subsampling=0)
    return content.getvalue()


def name_of(number: int) -> str:
    return f"{number:06d}.jpg"


def shades(*numbers: int) -> dict[str, bytes]:
    """JPEGs whose red, everywhere, tells their number, to 35."""
    return {name_of(k): to_jpeg(Image.new("RGB", (178, 218), (7 * k, 100, 50))) for k in numbers}


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0].float().mean(dim=(1, 2)).div(7).round().int().tolist()


def write_set(root: Path, jpegs: dict[str, bytes], method: int | None = None) -> Path:
    """<root>/celeba: images in a folder or a zip of this method, every fifth for testing."""
    images = root / "celeba" / "img_align_celeba"
    images.mkdir(parents=True)
    for name, content in jpegs.items():
        (images / name).write_bytes(content)
    if method is not None:
        with zipfile.ZipFile(f"{images}.zip", "w", method) as archive:
            for path in (images, *images.iterdir()):
                archive.write(path, path.relative_to(images.parent))
        shutil.rmtree(images)
    found = sorted(int(name[:6]) for name in jpegs if name[:6].isdigit())
    write_lists(images.parent, {k: 2 if i % 5 == 4 else 0 for i, k in enumerate(found)})
    return images.parent


def write_lists(folder: Path, parts: dict[int, int], first=("0",), end="\n", last="") -> None:
    """Image k is in parts[k], Smiling if k is odd, Eyeglasses if it is divisible by 3."""
    lines = [f"{name_of(k)} {part}" for k, part in parts.items()]
    (folder / PARTITION).write_bytes((end.join(lines) + end + last).encode())
    lines = [f"{name_of(k)} {' 1' if k % 2 else '-1'} {'-1' if k % 3 else ' 1'}" for k in parts]
    lines = [*first, "Smiling Eyeglasses ", *lines]
    (folder / ATTRIBUTES).write_bytes((end.join(lines) + end + last).encode())


def load(folder: Path, module=data) -> list[Split]:
    """Copies of the splits: of a file that is mapped and cut short, the pages would be gone."""
    splits = module.load_dataset("celeba", folder.parent)
    return [split._replace(images=split.images.clone()) for split in splits]


def made_files(folder: Path) -> list[str]:
    """The names of what is in the folder, beside what `write_set` has put there: the cache."""
    return sorted({path.name for path in folder.iterdir()} - {
        PARTITION, ATTRIBUTES, "img_align_celeba", "img_align_celeba.zip"})


def assert_same(one, other) -> None:
    torch.testing.assert_close([*one], [*other], rtol=0, atol=0)


def by_hand(start: float, side: float, n: int) -> np.ndarray:
    """The weights, (64, n), of n pixels in 64: triangles as wide as two steps, from start on."""
    centre, width = start + (np.arange(64)[:, None] + 0.5) * side / 64, max(side / 64, 1)
    weights = np.maximum(0, 1 - np.abs(np.arange(n) + 0.5 - centre) / width)
    return weights / weights.sum(axis=1, keepdims=True)


def test_folder_and_zips_give_the_pixels_worked_out_by_hand(tmp_path, monkeypatch):
    """Of pictures of any size, texture and colour space, in any number of threads."""
    rng, jpegs, expected = np.random.default_rng(0), {}, []
    for k in range(1, 41):
        width, height = rng.integers(40, 260, 2).tolist() if k % 2 else (178, 218)
        side = min(width * 148 / 178, height)  # of 178 x 218: columns 15 to 163, rows 35 to 183
        grain = (9, 7, 3) if k % 3 else (height, width, 3)
        image = Image.fromarray(rng.integers(0, 256, grain, np.uint8)).resize((width, height))
        jpegs[name_of(k)] = to_jpeg(image.convert({0: "L", 1: "CMYK"}.get(k % 10, "RGB")))
        pixels = np.asarray(Image.open(io.BytesIO(jpegs[name_of(k)])).convert("RGB")).astype(float)
        y, x = (by_hand((n - side) / 2, side, n) for n in (height, width))
        expected.append(np.einsum("yh,xw,hwc->cyx", y, x, pixels, optimize=True))
    expected, test = np.stack(expected), np.arange(40) % 5 == 4
    splits = load(write_set(tmp_path, jpegs))
    for split, part in zip(splits, (expected[~test], expected[test])):
        assert split.images.dtype == torch.uint8 and split.images.shape == part.shape
        assert np.abs(split.images.numpy() - part).max() < 1.6  # rounded twice
    for method, threads in ((zipfile.ZIP_DEFLATED, 16), (zipfile.ZIP_STORED, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda: threads)
        assert_same(splits, load(write_set(tmp_path / str(method), jpegs, method)))


def test_drawn_faces_come_back_from_celebas_layout(tmp_path):
    drawn, folder = Split(*draw.draw_faces(40, seed=3)), write_celeba(tmp_path, 40, True, seed=3)
    with pytest.raises(FileExistsError):  # it may be the real one
        write_celeba(tmp_path, 10)
    for split, part in zip(load(folder), (slice(32), slice(36, 40)), strict=True):
        assert (split.images.float() - drawn.images[part].float()).abs().mean() < 4
        assert torch.equal(split.labels, drawn.labels[part]) and len(split.factors) == 40
        assert torch.equal(split.factors["Eyeglasses"], drawn.factors["glasses"][part].byte())
        assert not split.factors["Male"].any()  # drawings have no sex


@pytest.mark.parametrize("method", [None, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("first, end, last", [
    (["10"], "\n", ""), (["10"], " \r\n", ""), ([], "\n", "\n  \r\n\n")])
def test_order_splits_and_attributes(tmp_path, method, first, end, last):
    """Numbers with gaps, parts in no order, more lines than images, shuffled and with odd ends."""
    there = [2, 3, 5, 8, 9, 10, 14, 20, 21, 33]
    others = {"._000001.jpg": b"", "Thumbs.db": b"x"}  # are no images
    folder = write_set(tmp_path, shades(*reversed(there)) | others, method)
    listed = np.random.default_rng(1).permutation(range(1, 36)).tolist()
    parts = {k: (0, 2, 1, 0)[k % 4] for k in listed}
    write_lists(folder, parts, first, end, last)
    for _ in range(2):  # decoded, and from the cache
        for part, (images, labels, factors) in zip((0, 2), load(folder)):
            expected = [k for k in there if parts[k] == part]
            assert numbers(images) == expected and len(expected) > 1
            assert labels.tolist() == factors["Smiling"].tolist() == [k % 2 for k in expected]
            assert factors["Eyeglasses"].tolist() == [k % 3 == 0 for k in expected]


def test_a_missing_set_says_what_to_put_where(tmp_path):
    result = run_here(train.main, "--dataset", "celeba", "--data-dir", tmp_path)
    assert_user_error(result, str(tmp_path / "celeba"), "img_align_celeba.zip", PARTITION,
                      ATTRIBUTES, "no script can download it", "mmlab", "--dataset faces")
    with pytest.raises(UserError, match="has no images named 000001.jpg"):
        load(write_set(tmp_path / "another", {"1.png": b""}))
    folder = write_set(tmp_path, shades(1, 2))
    (folder / ATTRIBUTES).unlink()
    with pytest.raises(UserError, match=f"{folder / ATTRIBUTES} .or .csv.* is missing"):
        load(folder)


@pytest.mark.parametrize("method", [None, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("damage", ["", "<html>", "cut", "header"])
def test_a_broken_jpeg_stops_with_its_name(tmp_path, method, damage):
    good = shades(7)["000007.jpg"]
    bad = {"cut": good[:-80], "header": b"?" + good[1:]}.get(damage, damage.encode())
    folder = write_set(tmp_path, shades(*range(1, 21)) | {"000007.jpg": bad}, method)
    with pytest.raises(UserError, match=rf"{folder}/.*000007.jpg is broken \([^<]*\)"):
        load(folder)
    assert not made_files(folder)


@pytest.mark.parametrize("after, at, message", [
    (b"000004.jpg", 200, "000004.jpg is broken"),  # in its tables: it still decodes
    (b"PK\1\2", 2, "damaged or cut short"),  # the version that is needed
    (b"PK\5\6", -9, "damaged or cut short"),
])
def test_damage_of_an_archive_is_found(tmp_path, after, at, message):
    folder = write_set(tmp_path, shades(*range(1, 11)), zipfile.ZIP_STORED)
    content = bytearray((folder / "img_align_celeba.zip").read_bytes())
    i = content.index(after) + len(after) + at
    content[i] ^= 0x61
    (folder / "img_align_celeba.zip").write_bytes(content[:i] if at < 0 else content)
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize("file, old, new, message", [
    (PARTITION, "000003.jpg 0\n", "", "lacks images .*000003.jpg"),
    (PARTITION, "000003.jpg 0\n", "000003.jpg 3\n", "damaged"),
    (PARTITION, "000003.jpg 0\n", "000003.jpg 300\n", "damaged"),
    (PARTITION, " 2", " 0", "has no pictures for testing"),
    (ATTRIBUTES, "000003.jpg  1  1\n", "000003.jpg  1\n", "damaged"),
    (ATTRIBUTES, "000003.jpg  1  1\n", "000003.jpg  1  0\n", "damaged"),
    (ATTRIBUTES, "Smiling", "", "damaged"),
])
def test_lists_that_are_damaged_or_do_not_fit_are_refused(tmp_path, file, old, new, message):
    folder = write_set(tmp_path, shades(*range(1, 11)))
    (folder / file).write_text((folder / file).read_text().replace(old, new))
    with pytest.raises(UserError, match=f"{folder}.*{message}"):
        load(folder)


@pytest.mark.parametrize("target, function, number", [
    (os, "fsync", errno.ENOSPC), (Path, "read_bytes", errno.EIO)])
def test_a_full_or_failing_disk_is_named(tmp_path, monkeypatch, target, function, number):
    def fail(argument):
        raise OSError(number, os.strerror(number), *[str(argument)] * (target is Path))

    folder = write_set(tmp_path, shades(*range(1, 11)))
    monkeypatch.setattr(target, function, fail)
    result = run_here(lambda _: load(folder))
    assert_user_error(result, str(folder), os.strerror(number))
    assert "broken" not in result.stderr and not made_files(folder)


def test_a_cache_is_mapped_and_what_is_not_whole_or_of_another_set_not_used(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "one", shades(*range(1, 21)))
    other = write_set(tmp_path / "other", shades(*range(16, 36)))
    first, _, made = load(folder), load(other), made_files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        second, maps = data.load_dataset("celeba", folder.parent), Path("/proc/self/maps")
        assert not maps.exists() or all(str(folder / name) in maps.read_text() for name in made)
        second[0].images[0] = 0  # not in the file
        assert_same(first, load(folder))
    for name in made:
        whole = (folder / name).read_bytes()
        for damage in (*(whole[:size] for size in (0, 100, 30_000, len(whole) - 1)), None,
                       (other / name).read_bytes()):
            (folder / f"{name}.1.part").write_bytes(whole[:30_000])
            (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
            assert_same(first, load(folder))
            assert (folder / name).read_bytes() == whole


def test_a_cache_of_another_source_or_decoder_is_not_used(tmp_path, monkeypatch):
    jpegs = {name: jpeg.ljust(4000, b"\0") for name, jpeg in shades(*range(1, 21), 30).items()}
    other = jpegs.pop(name_of(30))
    images = (folder := write_set(tmp_path, jpegs)) / "img_align_celeba"
    load(folder)
    (images / "000001.jpg").write_bytes(other)  # other pixels in a file of the same size
    assert numbers(load(folder)[0].images)[:2] == [30, 2]
    (images / "000002.jpg").unlink()  # one less
    assert numbers(load(folder)[0].images)[:2] == [30, 3]
    write_lists(folder, {k: 2 if k == 1 else 0 for k in range(1, 21)})  # other parts
    assert numbers(load(folder)[1].images) == [30]
    bgr = edited(data, tmp_path, lambda s: s.replace(".transpose(2,", "[..., ::-1].transpose(2,"))
    assert numbers(load(folder, bgr)[1].images.flip(1)) == numbers(load(folder)[1].images) == [30]
    monkeypatch.setattr(Image, "open", None)
    (images / ".DS_Store").write_text("what a file browser leaves")
    load(folder)
    wider = edited(data, tmp_path, lambda text: text.replace("crop=148 / 178", "crop=1.0"))
    with pytest.raises(wider.UserError, match="is broken"):  # it decodes anew
        load(folder, wider)


def test_ctrl_c_ends_a_build_and_leaves_nothing(tmp_path, monkeypatch):
    def slow(file):
        opened.append(file)
        if len(opened) == 50:
            _thread.interrupt_main()
        time.sleep(0.002)
        return open_(file)

    folder = write_set(tmp_path, dict.fromkeys(map(name_of, range(1, 501)), *shades(1).values()))
    opened, open_ = [], Image.open
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(Image, "open", slow)
    result = run_here(lambda _: load(folder))
    assert result.returncode == 130 and result.stderr == "\ninterrupted; what was saved is kept\n"
    assert len(opened) < 200 and not made_files(folder)  # of 450
