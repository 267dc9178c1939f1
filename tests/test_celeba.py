"""The loader of CelebA, against small sets in the layout of the official files."""

import errno
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import PROJECT, assert_user_error, run_here
from hypothesis import given, settings
from PIL import Image

import data
import train
from data import DataUnavailable, Split, UserError, load_celeba

PARTITION, ATTRIBUTES = "list_eval_partition.txt", "list_attr_celeba.txt"


@pytest.fixture(autouse=True)
def project_data(tmp_path, monkeypatch):
    """Caches that cannot lie beside the data go here, not into the project."""
    monkeypatch.setattr(data, "PROJECT_DATA", tmp_path / "project")
    return tmp_path / "project"


def to_jpeg(image: Image.Image, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", **{"quality": 95, **options})
    return content.getvalue()


def shade(number: int) -> bytes:
    """A JPEG whose red, everywhere, tells its number."""
    return to_jpeg(Image.new("RGB", (178, 218), (7 * number % 256, 100, 50)))


def numbers(images: torch.Tensor) -> list[int]:
    """The numbers of images that `shade` has made."""
    reds = images[:, 0].float().mean(dim=(1, 2))
    return [min(range(36), key=lambda k: abs(7 * k - red)) for red in reds.tolist()]


def write_set(root: Path, jpegs: dict[str, bytes], kind: str = "folder") -> Path:
    """A set in CelebA's layout: "folder", "deflated" zip or "stored" zip.

    Every fifth image is for testing. Attributes of image k: Smiling if k is odd, Eyeglasses
    if it is divisible by 3.
    """
    folder = root / "celeba"
    folder.mkdir(parents=True)
    if kind == "folder":
        (folder / "img_align_celeba").mkdir()
        for name, content in jpegs.items():
            (folder / "img_align_celeba" / name).write_bytes(content)
    else:
        method = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w", method) as archive:
            archive.writestr("img_align_celeba/", b"")
            for name, content in jpegs.items():
                archive.writestr(f"img_align_celeba/{name}", content)
    names = sorted(filter(data.JPEG_NAME.fullmatch, jpegs))
    write_lists(folder, names, [2 if i % 5 == 4 else 0 for i in range(len(names))])
    return root


def write_lists(folder: Path, names: list[str], parts, end="\n", last="") -> None:
    lines = [f"{name} {part}" for name, part in zip(names, parts)]
    (folder / PARTITION).write_bytes((end.join(lines) + end + last).encode())
    lines = [str(len(names)), "Smiling Eyeglasses "]
    for name in names:
        k = int(name[:6])
        lines.append(f"{name} {' 1' if k % 2 else '-1'} {'-1' if k % 3 else ' 1'}")
    (folder / ATTRIBUTES).write_bytes((end.join(lines) + end + last).encode())


def name_of(number: int) -> str:
    return f"{number:06d}.jpg"


def shades(*wanted: int) -> dict[str, bytes]:
    return {name_of(k): shade(k) for k in wanted}


def cache_of(root: Path) -> Path:
    return root / "celeba" / data.CELEBA_CACHE


def copied(splits: tuple[Split, Split]) -> list[Split]:
    return [Split(images.clone(), *rest) for images, *rest in splits]


def assert_same(one, other) -> None:
    for a, b in zip(one, other):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert a.factors.keys() == b.factors.keys()
        assert all(torch.equal(a.factors[name], b.factors[name]) for name in a.factors)


# ------------------------------------------------------------- what is read, and from where


def test_folder_and_zip_give_the_same(tmp_path):
    rng = np.random.default_rng(0)
    jpegs = {
        name_of(k): to_jpeg(Image.fromarray(rng.integers(0, 256, (218, 178, 3), np.uint8)))
        for k in range(1, 151)  # more than two tasks
    }
    folder, *zips = (
        load_celeba(write_set(tmp_path / kind, jpegs, kind))
        for kind in ("folder", "deflated", "stored")
    )
    for other in zips:
        assert_same(folder, other)
    train_split, test_split = folder
    assert train_split.images.shape == (120, 3, 64, 64) and len(test_split.images) == 30
    assert train_split.images.dtype == torch.uint8
    expected = [data.decode_face(jpegs[name_of(k)]) for k in range(1, 151) if k % 5]
    assert np.array_equal(train_split.images.numpy(), np.stack(expected))


@pytest.mark.parametrize("kind", ["folder", "deflated"])
@pytest.mark.parametrize("end, last", [("\n", ""), (" \r\n", ""), ("\n", "\n  \r\n\n")])
def test_order_splits_and_attributes(tmp_path, capsys, kind, end, last):
    """Numbers with gaps, parts in no order, lines shuffled and with odd ends."""
    there = [2, 3, 5, 8, 9, 10, 14, 20, 21, 33]
    root = write_set(tmp_path, shades(*reversed(there)), kind)
    parts = {k: (0, 2, 1, 0)[k % 4] for k in range(1, 36)}
    listed = list(parts)
    np.random.default_rng(1).shuffle(listed)
    names = [name_of(k) for k in listed]
    write_lists(root / "celeba", names, [parts[k] for k in listed], end, last)
    for _ in range(2):  # decoded, and from the cache
        splits = load_celeba(root)
        assert "lists 35 images, of which 10 are there" in capsys.readouterr().out
        for part, split in zip((0, 2), splits):
            expected = [k for k in there if parts[k] == part]
            assert numbers(split.images) == expected and len(expected) > 1
            assert split.labels.tolist() == [k % 2 for k in expected]
            assert split.factors["Smiling"].tolist() == [k % 2 for k in expected]
            assert split.factors["Eyeglasses"].tolist() == [int(k % 3 == 0) for k in expected]


def test_without_a_partition_file(tmp_path, capsys, monkeypatch):
    root = write_set(tmp_path, shades(*range(1, 21)))
    (root / "celeba" / PARTITION).unlink()
    train_split, test_split = load_celeba(root)
    assert numbers(train_split.images) == [*range(1, 19)]
    assert numbers(test_split.images) == [19, 20]
    assert f"{PARTITION} is missing: images are split 9 to 1" in capsys.readouterr().out

    monkeypatch.setattr(data, "CELEBA_SPLITS", (12, 5, 3))  # now this is the whole set
    cache_of(root).unlink()
    train_split, test_split = load_celeba(root)
    assert numbers(train_split.images) == [*range(1, 13)]
    assert numbers(test_split.images) == [18, 19, 20]
    assert "is missing: images are split at the official boundaries" in capsys.readouterr().out


def test_the_official_boundaries():
    assert sum(data.CELEBA_SPLITS) == 202_599
    assert data.CELEBA_SPLITS[0] == 162_770 and sum(data.CELEBA_SPLITS[:2]) == 182_637


def test_without_an_attribute_file(tmp_path, capsys):
    root = write_set(tmp_path, shades(*range(1, 11)))
    (root / "celeba" / ATTRIBUTES).unlink()
    train_split, test_split = load_celeba(root)
    assert train_split.factors == {} and test_split.labels.tolist() == [0, 0]
    assert f"{ATTRIBUTES} is missing" in capsys.readouterr().out


def test_other_files_are_no_images(tmp_path):
    jpegs = shades(*range(1, 11))
    for kind in ("folder", "deflated"):
        root = write_set(tmp_path / kind, jpegs | {"._000001.jpg": b"", "Thumbs.db": b"x"}, kind)
        assert [len(split.images) for split in load_celeba(root)] == [8, 2]


# ------------------------------------------------------------------------- the pixels


def resize_by_hand(pixels: np.ndarray, start: float, side: float) -> np.ndarray:
    """Rows from start to start + side, to 64, with a triangle as wide as two steps."""
    scale = side / 64
    width = max(scale, 1.0)
    rows = np.arange(len(pixels)) + 0.5
    out = []
    for i in range(64):
        weights = np.maximum(0, 1 - np.abs(rows - (start + (i + 0.5) * scale)) / width)
        out.append(np.tensordot(weights / weights.sum(), pixels, 1))
    return np.stack(out)


@settings(max_examples=25)
@given(st.integers(40, 260), st.integers(40, 260), st.integers(0, 99))
def test_crop_and_resize_of_any_size(width, height, seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    content = to_jpeg(Image.fromarray(coarse).resize((width, height)), quality=100)
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)
    side = min(width * 148 / 178, height)
    expected = resize_by_hand(pixels, (height - side) / 2, side)
    expected = resize_by_hand(expected.swapaxes(0, 1), (width - side) / 2, side)
    expected = expected.transpose(2, 1, 0)  # (x, y, channel) -> (channel, y, x)
    assert np.abs(data.decode_face(content) - expected).max() < 1.6  # rounded twice


def test_the_crop_is_where_it_should_be_on_a_known_gradient():
    """From column 15 to 163 and row 35 to 183; a pixel aside would change the mean by 1."""
    x, y = np.meshgrid(np.arange(178), np.arange(218))
    gradient = np.stack([x + 20, y + 20, x // 2 + y // 2], axis=-1).astype(np.uint8)
    red, green, _ = data.decode_face(to_jpeg(Image.fromarray(gradient), quality=100, subsampling=0))
    steps = (np.arange(64) + 0.5) * 148 / 64 - 0.5
    assert np.abs(red.mean(axis=0) - (15 + 20 + steps)).max() < 0.6
    assert abs((red.mean(axis=0) - (15 + 20 + steps)).mean()) < 0.2
    assert np.abs(green.mean(axis=1) - (35 + 20 + steps)).max() < 0.6
    assert abs((green.mean(axis=1) - (35 + 20 + steps)).mean()) < 0.2


def test_fine_stripes_are_averaged_away():
    """Without antialiasing a grid finer than the new pixels would show as a coarse one."""
    stripes = np.zeros((218, 178, 3), np.uint8)
    stripes[:, ::2] = 255
    face = data.decode_face(to_jpeg(Image.fromarray(stripes), quality=100, subsampling=0))
    assert np.abs(face[:, :, 1:-1] - 127.5).max() < 25


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_spaces_become_rgb(mode):
    image = Image.new("RGB", (178, 218), (200, 60, 20)).convert(mode)
    face = data.decode_face(to_jpeg(image))
    expected = np.array(image.convert("RGB").getpixel((0, 0)))
    assert face.shape == (3, 64, 64)
    assert np.abs(face - expected[:, None, None]).max() <= 3


# --------------------------------------------------------------------------- bad input


def test_a_missing_set_says_what_to_put_where(tmp_path):
    (tmp_path / "celeba").mkdir()
    with pytest.raises(DataUnavailable, match="no script can download it") as error:
        load_celeba(tmp_path)
    for word in ("img_align_celeba.zip", PARTITION, ATTRIBUTES, "mmlab", str(tmp_path / "celeba")):
        assert word in str(error.value)
    result = run_here(train.main, "--dataset", "celeba", "--data-dir", tmp_path)
    assert_user_error(result, "img_align_celeba", "--dataset faces")


@pytest.mark.parametrize(
    "member", ["../000001.jpg", "a/../../000001.jpg", "/000001.jpg", "C:/000001.jpg", "..\\x.txt"]
)
def test_members_outside_of_the_archive_are_refused(tmp_path, member):
    root = write_set(tmp_path, shades(*range(1, 11)), "deflated")
    with zipfile.ZipFile(root / "celeba" / "img_align_celeba.zip", "a") as archive:
        archive.writestr(zipfile.ZipInfo(member), shade(1))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="outside of its own folder"):
        load_celeba(root)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["folder", "deflated"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header"])
def test_a_broken_jpeg_stops_with_its_name_or_is_left_out(tmp_path, capsys, kind, damage):
    jpegs = shades(*range(1, 21))
    good = jpegs["000007.jpg"]
    jpegs["000007.jpg"] = {
        "empty": b"", "text": b"<html></html>", "cut": good[:-80], "header": b"?" + good[1:]
    }[damage]
    root = write_set(tmp_path, jpegs, kind)
    for _ in range(2):
        with pytest.raises(UserError, match="000007.jpg is broken .*--skip-broken"):
            load_celeba(root)
        assert not cache_of(root).exists() and not list((root / "celeba").glob(".*"))
    capsys.readouterr()
    for _ in range(2):  # decoded, and from the cache
        train_split, test_split = load_celeba(root, skip_broken=True)
        assert "left out 1 of 20 images, the first: 000007.jpg is" in capsys.readouterr().out
        expected = [k for k in range(1, 21) if k % 5 and k != 7]
        assert numbers(train_split.images) == expected
        assert train_split.labels.tolist() == [k % 2 for k in expected]
        assert numbers(test_split.images) == [5, 10, 15, 20]
    with pytest.raises(UserError, match="000007.jpg is broken"):  # no silence afterwards
        load_celeba(root)


def test_damage_inside_an_archive_is_found_by_its_checksum(tmp_path):
    root = write_set(tmp_path, shades(*range(1, 11)), "stored")
    path = root / "celeba" / "img_align_celeba.zip"
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("img_align_celeba/000004.jpg")
    content = bytearray(path.read_bytes())
    content[member.header_offset + 200] ^= 1  # in the tables of the JPEG: it still decodes
    path.write_bytes(content)
    with pytest.raises(UserError, match="000004.jpg is broken .its checksum is wrong"):
        load_celeba(root)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_celeba(root)


def change_directory(path: Path, at: int, new: bytes) -> None:
    """Change the entry of the first member in the directory at the end of an archive."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)  # after the folder's own
    content[entry + at : entry + at + len(new)] = new
    path.write_bytes(content)


@pytest.mark.parametrize(
    "at, new, message",
    [
        (6, b"\x63", "damaged or cut short"),  # the version that is needed
        (8, b"\x01", "000001.jpg is encrypted"),
        (9, b"\x08\x0c\x00\x00\x00\x00\x00", "compressed by another method"),
        (42, b"\x07", "000001.jpg is broken .the directory of the archive is wrong"),
        (46 + 17, b"000002", "has two members named 000002.jpg"),
    ],
)
def test_an_archive_with_a_strange_directory_is_refused(tmp_path, at, new, message):
    root = write_set(tmp_path, shades(*range(1, 11)), "deflated")
    change_directory(root / "celeba" / "img_align_celeba.zip", at, new)
    with pytest.raises(UserError, match=message):
        load_celeba(root)


def test_a_full_disk_during_the_work_is_named(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    root = write_set(tmp_path, shades(*range(1, 11)))
    monkeypatch.setattr(os, "fsync", fsync)
    result = run_here(lambda _: load_celeba(root))
    assert_user_error(result, str(cache_of(root)), "No space left on device")
    assert not list((root / "celeba").glob("*.npy")) and not list((root / "celeba").glob(".*"))


def test_a_disk_that_fails_is_no_broken_image(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    root = write_set(tmp_path, shades(*range(1, 11)))
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_celeba(root, skip_broken=True)


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        (PARTITION, "000003.jpg 0\n", "", "no line for 000003.jpg"),
        (PARTITION, "000003.jpg 0\n", "000003.jpg 3\n", "line 3: '000003.jpg 3'"),
        (PARTITION, "000003.jpg 0\n", "000003.jpg\n", "line 3: '000003.jpg'"),
        (PARTITION, "000003.jpg 0\n", "000002.jpg 0\n", "line 3: '000002.jpg 0'"),
        (PARTITION, "000003.jpg 0\n", "000003.jpg\0\n", "line 3"),
        (PARTITION, " 2", " 0", "8 are for training and 0 for testing|10 are for training"),
        (ATTRIBUTES, "10\n", "11\n", "says '11' images, has 10 lines"),
        (ATTRIBUTES, "000003.jpg  1  1\n", "", "says '10' images, has 9 lines"),
        (ATTRIBUTES, "000003.jpg  1  1\n", "000003.jpg  1\n", "line 5: '000003.jpg  1'"),
        (ATTRIBUTES, "000003.jpg  1  1\n", "000003.jpg  1  0\n", "line 5"),
        (ATTRIBUTES, "000003.jpg  1  1\n", "000099.jpg  1  1\n", "no line for 000003.jpg"),
    ],
)
def test_lists_that_are_damaged_or_do_not_fit_are_refused(tmp_path, file, old, new, message):
    root = write_set(tmp_path, shades(*range(1, 11)))
    path = root / "celeba" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message) as error:
        load_celeba(root)
    assert str(root) in str(error.value)


def test_a_folder_without_images_is_refused(tmp_path):
    root = write_set(tmp_path, {"1.png": b""})
    with pytest.raises(UserError, match="has no images named 000001.jpg"):
        load_celeba(root)


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    root = write_set(tmp_path, shades(*range(1, 11)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data, "decode_face", None)  # the work
    monkeypatch.setattr(data.inspect, "getsource", lambda function: "")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage._replace(free=122_000))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="takes 0.00 GB; its disk has 0.00 GB free"):
        load_celeba(root)
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------- the cache


@pytest.fixture
def no_building(monkeypatch):
    def refuse(*args):
        raise AssertionError("the cache was not used")

    return lambda: monkeypatch.setattr(data, "build_celeba_cache", refuse)


def test_the_second_start_uses_the_cache_memory_mapped(tmp_path, no_building):
    root = write_set(tmp_path, shades(*range(1, 21)))
    first = copied(load_celeba(root))
    no_building()
    second = load_celeba(root)
    assert_same(first, second)
    second[0].images[0] = 0  # the file that is mapped is not written to
    assert_same(first, load_celeba(root))


def test_a_cache_that_is_cut_short_is_not_used(tmp_path):
    root = write_set(tmp_path, shades(*range(1, 21)))
    first = copied(load_celeba(root))  # pages that are mapped are gone when the file is cut
    whole = cache_of(root).read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        cache_of(root).write_bytes(whole[:size])
        assert_same(first, load_celeba(root))
        assert cache_of(root).read_bytes() == whole


def test_a_cache_of_another_source_is_not_used(tmp_path, no_building):
    jpegs = {name: jpeg.ljust(4000, b"\0") for name, jpeg in shades(*range(1, 21)).items()}
    root = write_set(tmp_path / "one", jpegs)
    folder = root / "celeba"
    load_celeba(root)
    path = folder / "img_align_celeba" / "000001.jpg"
    path.write_bytes(shade(30).ljust(4000, b"\0"))  # other pixels in a file of the same size
    assert numbers(load_celeba(root)[0].images)[:2] == [30, 2]
    (folder / "img_align_celeba" / "000002.jpg").unlink()  # one less
    assert numbers(load_celeba(root)[0].images)[:2] == [30, 3]
    names = [path.name for path in (folder / "img_align_celeba").iterdir()]
    write_lists(folder, sorted(names), [2] + [0] * 18)  # other parts
    assert numbers(load_celeba(root)[1].images) == [30]
    other = write_set(tmp_path / "two", shades(*range(11, 31)), "deflated")
    shutil.copy(cache_of(root), cache_of(other))  # of a folder elsewhere
    assert numbers(load_celeba(other)[0].images)[0] == 11
    (folder / ATTRIBUTES).unlink()
    assert load_celeba(root)[0].factors == {}
    no_building()
    (folder / "img_align_celeba" / ".DS_Store").write_text("what a file browser leaves")
    load_celeba(root)


def test_a_change_of_the_decoder_makes_a_new_cache(tmp_path, monkeypatch):
    root = write_set(tmp_path, shades(*range(1, 11)))
    load_celeba(root)
    old, decode_face = cache_of(root).read_bytes(), data.decode_face
    monkeypatch.setattr(data, "decode_face", lambda content: 255 - decode_face(content))
    images = load_celeba(root)[0].images
    assert np.array_equal(images[0].numpy(), 255 - decode_face(shade(1)))
    assert cache_of(root).read_bytes() != old


def test_a_read_only_folder_has_its_cache_in_the_project(
    tmp_path, project_data, monkeypatch, no_building
):
    root = write_set(tmp_path / "data", shades(*range(1, 11)))
    temporary_file = data.tempfile.TemporaryFile

    def read_only(dir):
        if dir == root / "celeba":
            raise OSError(errno.EROFS, "Read-only file system")
        return temporary_file(dir=dir)

    before = sorted(root.rglob("*"))
    monkeypatch.setattr(data.tempfile, "TemporaryFile", read_only)
    first = load_celeba(root)
    assert sorted(root.rglob("*")) == before
    assert [path.name for path in project_data.rglob("*.npy")] == [data.CELEBA_CACHE]
    no_building()
    assert_same(first, load_celeba(root))


def wait_for_the_end_of_group(group: int) -> None:
    """Until none of its processes is left."""
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_build_that_is_killed_leaves_nothing_that_is_used(tmp_path, monkeypatch):
    """Killed midway, and run again: the bytes of a build that was not."""
    jpegs = shades(*(k % 36 for k in range(1, 36)))
    jpegs = {name_of(i): content for i, content in enumerate(20 * list(jpegs.values()))}
    monkeypatch.setattr(data, "DECODE_CHUNK", 7)
    roots = [write_set(tmp_path / name, jpegs) for name in ("whole", "killed")]
    load_celeba(roots[0])
    folder = roots[1] / "celeba"
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        data.show_status = lambda line: time.sleep(0.05)  # a build of five seconds
        load_celeba(roots[1])
        os._exit(0)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size > 500_000 for p in folder.glob(".*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    wait_for_the_end_of_group(child)
    assert not cache_of(roots[1]).exists() and list(folder.glob(".*.part"))
    assert_same(*map(load_celeba, roots))
    assert not list(folder.glob(".*"))

    def pixels(root):  # what follows them has the times of the source in it
        return cache_of(root).read_bytes()[: 700 * 3 * 64 * 64]

    assert pixels(roots[0]) == pixels(roots[1])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are only threads")
@pytest.mark.parametrize("again", [None, 0.01])
def test_ctrl_c_ends_a_build_and_leaves_nothing(tmp_path, again):
    """Also if it comes twice, while the first is being dealt with."""
    root = write_set(tmp_path, {name_of(i): shade(i % 36) for i in range(1, 701)})
    program = f"""if True:
        import sys, time
        sys.path.insert(0, {str(PROJECT)!r})
        import data, train
        data.DECODE_CHUNK, data.show_status = 7, lambda line: time.sleep(0.05)
        train.run_cli(lambda: data.load_celeba(data.Path({str(root)!r})))
    """
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "decoding" in run.stdout.readline()
    time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    if again:
        time.sleep(again)
        os.killpg(run.pid, signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    wait_for_the_end_of_group(run.pid)
    assert not list((root / "celeba").glob("*.npy"))
    if not again:
        assert not list((root / "celeba").glob(".*"))
        # Python can lose a Ctrl-C that comes while it forks; then the workers' end ends the run.
        assert run.returncode == 130 and "interrupted" in error or (
            run.returncode == 2 and "Ctrl-C" in error
        ), (run.returncode, error)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_of_two_runs_at_once_one_builds(tmp_path, capfd):
    root = write_set(tmp_path, shades(*range(1, 36)))
    children = []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            data.show_status = lambda line: time.sleep(0.3)
            load_celeba(root)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert not list((root / "celeba").glob(".*"))
    assert capfd.readouterr().out.count("decoding") == 1


# ------------------------------------------------------------------ the worker processes


@pytest.mark.parametrize("platform", [sys.platform, "darwin"])
def test_tasks_are_done_in_order_and_taken_as_they_are_needed(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    results = data.in_parallel(abs, (-i for i in itertools.count()))  # without end
    assert list(itertools.islice(results, 100)) == list(range(100))
    results.close()
    assert list(data.in_parallel(abs, [-1, -2])) == [1, 2]
    with pytest.raises(TypeError):
        list(data.in_parallel(abs, [1, "x"]))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are only threads")
def test_threads_give_the_same_as_processes(tmp_path, monkeypatch):
    root = write_set(tmp_path, shades(*range(1, 36)))
    with_processes = [split.images.clone() for split in load_celeba(root)]
    cache_of(root).unlink()
    monkeypatch.setattr(sys, "platform", "darwin")
    for images, split in zip(with_processes, load_celeba(root)):
        assert torch.equal(images, split.images)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are only threads")
def test_a_worker_that_is_killed_is_a_users_error():
    with pytest.raises(UserError, match="killed"):
        list(data.in_parallel(os._exit, [1]))
