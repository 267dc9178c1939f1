"""data.py without CelebA: IDX files, files in general, what is drawn once, batches. (Downloads, and
IDX files that are damaged: torture.py.)"""

import importlib.util
import os
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import write_idx
from hypothesis import HealthCheck, example, given, settings

import data
import draw
from data import Batches, UserError, load_dataset, read_idx

arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrays, st.booleans())
def test_idx_files_are_read_back_exactly(tmp_path, array, gzipped):
    read = read_idx(write_idx(tmp_path / ("a.gz" if gzipped else "a"), array), array.ndim)
    assert read.dtype == np.uint8 and read.shape == array.shape
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("images, labels, message", [
    (np.zeros((5, 28, 28)), np.zeros(4), r"\(5, 28, 28\) does not fit .* \(4,\)"),
    (np.zeros((5, 28, 27)), np.zeros(5), r"\(5, 28, 27\)"),
    (np.zeros((0, 28, 28)), np.zeros(0), r"\(0, 28, 28\)"),
    (np.zeros((5, 28)), np.zeros(5), "no IDX file of bytes in 3 dimensions"),
])
def test_files_that_do_not_fit_together_are_refused(tmp_path, images, labels, message):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / "mnist" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / "mnist" / f"{prefix}-labels-idx1-ubyte", labels)
    with pytest.raises(UserError, match=message):
        load_dataset("mnist", tmp_path)


def test_real_mnist():
    root = Path(os.environ.get("VAE_DATA_DIR") or data.PROJECT_DATA)
    if not (root / "mnist").is_dir():
        pytest.skip(f"no MNIST in {root} (set VAE_DATA_DIR)")
    train, test = load_dataset("mnist", root)
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    # Published class counts, and the mean brightness that everyone normalises by.
    counts = [split.labels.bincount().tolist() for split in (train, test)]
    assert counts == [[5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
                      [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]]
    assert train.images.double().mean() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_class_names_are_those_of_the_publishers():
    published = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt",
                 "sneaker", "bag", "ankle boot")
    for theirs, ours in zip(published, data.CLASS_NAMES["fashion-mnist"], strict=True):
        assert theirs.startswith(ours.lower()[:7])  # trousers are a trouser
    assert data.CLASS_NAMES["mnist"] == data.CLASS_NAMES["digits"] == (*"0123456789",)


def test_the_validation_set_is_held_out_of_the_training_images(mnist_root):
    """Its last sixth, 10,000 of the 60,000; the test images are not touched."""
    (images, labels, _), _ = load_dataset("mnist", mnist_root)
    train, held_out = load_dataset("mnist-validation", mnist_root)
    assert len(held_out.images) == len(held_out.labels) == 1000 // 6
    for part, whole in ((0, images), (1, labels)):
        assert torch.equal(torch.cat([train[part], held_out[part]]), whole)


def test_write_atomically_gives_a_file_a_new_content_whole_or_not_at_all(tmp_path, monkeypatch):
    path, link, steps, replace = tmp_path / "file", tmp_path / "link", [], os.replace
    other = tmp_path / f"file.{os.getpid() + 1}.part"  # another process at work
    path.write_bytes(b"old")
    other.write_bytes(b"its own")
    link.hardlink_to(path)
    monkeypatch.setattr(os, "fsync", lambda file: steps.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("replace"), replace(*names)))
    with pytest.raises(ZeroDivisionError), data.write_atomically(path) as file:
        file.write(b"half of the new")
        1 / 0
    assert path.read_bytes() == b"old" and {*tmp_path.iterdir()} == {path, link, other}
    with data.write_atomically(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert steps == [len(b"new"), "replace"]  # on the disk before it has the name
    assert path.read_bytes() == b"new" and {*tmp_path.iterdir()} == {path, link, other}
    assert link.read_bytes() == b"old" and other.read_bytes() == b"its own"


def edited(module, folder: Path, edit=lambda text: f"{text}# edited\n"):
    """A module, from an edited copy of its file."""
    path = folder / f"{module.__name__}.py"
    path.write_text(edit(Path(module.__file__).read_text()))
    spec = importlib.util.spec_from_file_location(module.__name__, path)
    spec.loader.exec_module(copy := importlib.util.module_from_spec(spec))
    return copy


def test_digits_are_drawn_once_and_anew_if_damaged_or_draw_py_is_edited(tmp_path, monkeypatch):
    def small(n, seed):
        calls.append(n)
        return all_[:n].byte().view(n, 1, 1, 1), all_[:n], {"class": all_[:n]}

    def load(module=data):
        """How often they have been drawn, when they are loaded."""
        module.DRAWN["digits"] = (small, *data.DRAWN["digits"][1:])
        splits = module.load_dataset("digits", tmp_path)
        for split, i in zip(splits, (all_[:60_000], all_[60_000:])):
            assert torch.equal(split.labels, i) and torch.equal(split.factors["class"], i)
            assert torch.equal(split.images.flatten(), i.byte())
        return len(calls)

    calls, cache, all_ = [], tmp_path / "digits.npz", torch.arange(70_000)
    assert data.DRAWN["digits"][0] is draw.draw_digits
    monkeypatch.setattr(data, "DRAWN", dict(data.DRAWN))
    monkeypatch.setattr(data, "PROJECT_DATA", tmp_path)
    assert load() == load() == 1
    damaged = bytearray(cache.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    for number, bad in enumerate((damaged, damaged[:-9], b""), start=2):
        cache.write_bytes(bad)
        assert load() == load() == number
    assert load(edited(data, tmp_path)) == 4
    monkeypatch.setattr(data, "draw", edited(draw, tmp_path))  # another glyph, say
    assert load() == load() == 5


@given(st.integers(4, 50), st.integers(1, 9), st.integers(1, 4), st.booleans())
@example(3, 1, 2, True)
def test_the_shares_of_all_processes_are_every_image_once_with_its_label(n, size, world, shuffle):
    images = torch.randint(256, (n, 1, 2, 3), dtype=torch.uint8)
    labels = torch.randint(10**9, (n,))
    torch.manual_seed(0)
    order = torch.randperm(n)[: n - n % world] if shuffle else torch.arange(n)
    shares = []
    for rank in range(world):
        torch.manual_seed(0)
        loader = Batches(images, labels, size * world, shuffle, rank=rank, world_size=world)
        shares.append(list(loader))
        assert len(loader) == len(shares[-1]) == -(-len(order) // (size * world))
    for index, parts in zip(order.split(size * world), zip(*shares)):  # the parts of a batch
        counts = [len(y) for _, y in parts]
        assert max(counts) - min(counts) <= (0 if shuffle else 1)
        x, y = (torch.cat(part) for part in zip(*parts))
        index = torch.cat([index[rank::world] for rank in range(world)])
        assert torch.equal(y, labels[index]) and x.dtype == torch.float32
        torch.testing.assert_close(x, images[index].float() / 255, rtol=0, atol=0)


def test_the_order_is_drawn_on_the_cpu_at_once_from_the_seed(monkeypatch):
    images, labels = torch.zeros(100, 1, 1, 1, dtype=torch.uint8), torch.arange(100)
    with pytest.raises(TypeError, match="uint8"):  # which cannot be NaN
        Batches(images.float(), labels, 100)
    loader, drawn, randperm = Batches(images, labels, 100, True), [], torch.randperm
    begun = iter(loader)
    torch.manual_seed(1)  # is too late for that pass
    (_, order), (_, other) = next(begun), next(iter(loader))
    torch.manual_seed(0)
    assert not torch.equal(order, other) and torch.equal(order, next(iter(loader))[1])
    spy = lambda *a, **k: (drawn.append(randperm(*a, **k)), drawn[-1])[1]  # noqa: E731
    monkeypatch.setattr(torch, "randperm", spy)
    torch.manual_seed(0)
    x, y = next(iter(Batches(images.to("meta"), labels.to("meta"), 100, True)))
    assert torch.equal(drawn[0], order) and x.device.type == y.device.type == "meta"


@given(st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_binary_pixels_are_random_with_the_grey_value_as_probability(grey, seed):
    """Batches draws them anew each time, binarize_once by its own seed only."""
    p, n = grey / 255, 40_000
    images = torch.full((n // 100, 1, 10, 10), grey, dtype=torch.uint8)
    loader = Batches(images, torch.zeros(len(images)), batch_size=len(images), binarize=True)
    once, other = data.binarize_once(images, seed), data.binarize_once(images, seed + 1)
    assert torch.equal(data.binarize_once(images, seed), once) and once.dtype == torch.uint8
    (first, _), (second, _) = [*loader, *loader]
    for one, two in ((first, second), (once / 255, other / 255)):
        assert one.dtype == torch.float32 and ((one == 0) | (one == 1)).all()
        assert abs(one.mean() - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1e-7
        same = (one == two).float().mean()  # independent draws agree by chance only
        assert abs(same - p**2 - (1 - p) ** 2) <= 5 * 0.5 / n**0.5
        assert torch.equal(one, two) == (grey in (0, 255))
