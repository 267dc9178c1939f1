"""The loaders of data.py: IDX files, downloads, drawn digits, batches."""

import gzip
import hashlib
import http.server
import os
import threading
import zipfile
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import write_idx, write_mnist
from hypothesis import HealthCheck, given, settings
from PIL import Image

import data
from data import Batches, DataUnavailable, Split, UserError, draw_digits, draw_faces, read_idx

arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9))
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---------------------------------------------------------------------- IDX files


@in_one_folder
@given(arrays, st.booleans())
def test_idx_files_are_read_back_exactly(tmp_path, array, gzipped):
    path = write_idx(tmp_path / ("a.gz" if gzipped else "a"), array)
    read = read_idx(path, array.ndim)
    assert read.dtype == np.uint8 and read.shape == array.shape
    np.testing.assert_array_equal(read, array)


@in_one_folder
@given(arrays, st.booleans(), st.data())
def test_damaged_idx_files_are_refused(tmp_path, array, gzipped, choice):
    """Cut short, gone on, or any bit of the header flipped."""
    content = write_idx(tmp_path / "a", array).read_bytes()
    header = 4 + 4 * array.ndim
    damage = choice.draw(st.sampled_from(["cut", "pad", "flip"]))
    if damage == "cut":
        content = content[: choice.draw(st.integers(0, len(content) - 1))]
    elif damage == "pad":
        content += choice.draw(st.binary(min_size=1, max_size=9))
    else:
        bit = choice.draw(st.integers(0, 8 * header - 1))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        content = bytes(flipped)
    path = tmp_path / "damaged"
    path.write_bytes(gzip.compress(content) if gzipped else content)
    with pytest.raises(UserError, match="damaged"):
        read_idx(path, array.ndim)


@in_one_folder
@given(st.data())
def test_damaged_gzip_is_refused(tmp_path, choice):
    """Cut short, or a bit flipped in its compressed bytes, its checksum or its size."""
    path = write_idx(tmp_path / "a.gz", np.arange(200, dtype=np.uint8))
    content = bytearray(path.read_bytes())
    if choice.draw(st.booleans()):
        content = content[: choice.draw(st.integers(2, len(content) - 1))]
    else:
        content[choice.draw(st.integers(10, len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.gz"):
        read_idx(path, 1)


def test_a_false_size_in_the_header_costs_no_memory(tmp_path):
    for sizes, message in ((b"\xff" * 12, "declares"), (b"\0\0\0\xff" * 3, "cut short")):
        (tmp_path / "a").write_bytes(bytes([0, 0, 8, 3]) + sizes + bytes(100))
        with pytest.raises(UserError, match=message):
            read_idx(tmp_path / "a", 3)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((5, 28, 28)), np.zeros(4), "5 images.*4 labels"),
        (np.zeros((5, 28, 28)), np.full(5, 10), "label 10"),
        (np.zeros((5, 28, 27)), np.zeros(5), "shape"),
        (np.zeros((0, 28, 28)), np.zeros(0), "shape"),
        (np.zeros((5, 28)), np.zeros(5), "2 dimensions where 3"),
        (np.zeros((5, 28, 28)), np.zeros((5, 1)), "2 dimensions where 1"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, images, labels, message):
    write_idx(tmp_path / "mnist" / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "mnist" / "train-labels-idx1-ubyte", labels)
    with pytest.raises(UserError, match=message):
        data.load_dataset("mnist", tmp_path)


def test_a_data_folder_is_read_as_it_lies(mnist_root, drawn):
    train, test = data.load_dataset("mnist", mnist_root)
    assert torch.equal(train.images, drawn.images[:1000]) and train.images.dtype == torch.uint8
    assert torch.equal(test.labels, drawn.labels[1000:1300]) and test.labels.dtype == torch.int64


def test_real_mnist():
    root = Path(os.environ.get("VAE_DATA_DIR") or data.PROJECT_DATA)
    if not (root / "mnist").is_dir():
        pytest.skip(f"no MNIST in {root} (set VAE_DATA_DIR)")
    train, test = data.load_dataset("mnist", root)
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    # Published class counts, and the mean brightness that everyone normalises by.
    assert train.labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949
    ]
    assert test.labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009
    ]
    assert train.images.double().mean() / 255 == pytest.approx(0.1307, abs=1e-4)


# ---------------------------------------------------------------------- downloads


@pytest.fixture
def mirror(tmp_path, drawn, monkeypatch):
    """A local mirror of a tiny MNIST; `mirror.behave(name)` decides what it answers."""
    source = tmp_path / "source"
    write_mnist(source, Split(*drawn[:2], {}), Split(*drawn[:2], {}))
    files = {}
    for path in (source / "mnist").iterdir():
        content = path.read_bytes()
        if path.suffix != ".gz":
            content = gzip.compress(content)
        files[f"{path.name.removesuffix('.gz')}.gz"] = content

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, the base class names it
            behaviour, _, name = self.path[1:].partition("/")
            requests.append(self.path)
            content = files[name]
            self.send_response(404 if behaviour == "missing" else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if behaviour == "short":
                content = content[:-5]
            if behaviour == "wrong":
                content = content[:-1] + b"?"
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # a client may hang up
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def mirrors(*behaviours):
        urls = [f"http://127.0.0.1:{server.server_port}/{name}/" for name in behaviours]
        monkeypatch.setitem(data.IDX_MIRRORS, "mnist", urls)

    checksums = {
        name.removesuffix(".gz"): hashlib.sha256(content).hexdigest()
        for name, content in files.items()
    }
    monkeypatch.setitem(data.IDX_CHECKSUMS, "mnist", checksums)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirrors.requests, mirrors.files = requests, files
    yield mirrors
    server.shutdown()
    server.server_close()


def test_a_download_is_verified_kept_and_not_repeated(mirror, tmp_path, drawn):
    mirror("good")
    train, _ = data.load_dataset("mnist", tmp_path / "data")
    assert torch.equal(train.images, drawn.images)
    folder = tmp_path / "data" / "mnist"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == mirror.files
    assert len(mirror.requests) == 4
    data.load_dataset("mnist", tmp_path / "data")
    assert len(mirror.requests) == 4


@pytest.mark.parametrize("bad", ["missing", "short", "wrong"])
def test_a_bad_mirror_is_left_for_the_next(mirror, tmp_path, drawn, bad):
    mirror(bad, "good")
    train, _ = data.load_dataset("mnist", tmp_path / "data")
    assert torch.equal(train.images, drawn.images)
    assert len(mirror.requests) == 8


@pytest.mark.parametrize("bad", ["missing", "short", "wrong"])
def test_without_a_good_mirror_nothing_is_left_behind(mirror, tmp_path, bad):
    mirror(bad, bad)
    with pytest.raises(DataUnavailable, match="train-images-idx3-ubyte.gz is missing"):
        data.load_dataset("mnist", tmp_path / "data")
    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))


def test_md5_checksums_are_for_fashion_mnist_only():
    assert {len(c) for c in data.IDX_CHECKSUMS["mnist"].values()} == {64}
    assert {len(c) for c in data.IDX_CHECKSUMS["fashion-mnist"].values()} == {32}
    assert data.IDX_CHECKSUMS["mnist"].keys() == data.IDX_CHECKSUMS["fashion-mnist"].keys()


def test_write_atomically_keeps_the_old_file_if_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), data.write_atomically(path) as file:
        file.write(b"half of the new")
        1 / 0
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with data.write_atomically(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------- drawn digits


@pytest.mark.parametrize("draw, n", [(draw_digits, 300), (draw_faces, 60)])
def test_drawings_are_deterministic_in_their_seed(draw, n):
    one, same, other = draw(n, 5), draw(n, 5), draw(n, 6)
    assert torch.equal(one.images, same.images) and torch.equal(one.labels, same.labels)
    assert all(torch.equal(one.factors[name], same.factors[name]) for name in one.factors)
    assert not torch.equal(one.images, other.images)


def test_drawn_digits_have_the_stated_form(drawn):
    assert drawn.images.shape == (6000, 1, 28, 28) and drawn.images.dtype == torch.uint8
    assert drawn.labels.bincount().min() > 500 and drawn.labels.max() == 9
    assert torch.equal(drawn.factors["class"], drawn.labels)
    assert (drawn.images.flatten(1).amax(dim=1) > 200).all()  # no faint ones
    assert drawn.images[..., [0, -1], :].float().mean() < 5  # they fit into the frame
    assert drawn.images[..., [0, -1]].float().mean() < 5
    for name, (low, high) in data.DIGIT_FACTORS.items():
        values = drawn.factors[name]
        assert values.shape == (6000,) and low <= values.min() and values.max() <= high
        assert values.max() - values.min() > 0.95 * (high - low)


def test_factors_are_what_their_names_say(drawn):
    """Each factor moves the statistic of the picture that it should, the right way."""
    images = drawn.images[:, 0].double() / 255
    ink = images.sum(dim=(1, 2))
    grid = torch.arange(28.0, dtype=torch.float64)
    x = (images.sum(dim=1) * grid).sum(dim=1) / ink
    y = (images.sum(dim=2) * grid).sum(dim=1) / ink
    dx, dy = grid - x[:, None], grid - y[:, None]
    covariance = torch.einsum("nyx,nx,ny->n", images, dx, dy) / ink
    height = torch.einsum("nyx,ny->n", images, dy**2).div(ink).sqrt()
    width = torch.einsum("nyx,nx->n", images, dx**2).div(ink).sqrt()
    statistics = {
        "slant": -covariance / height**2,
        "rotation": -covariance / height**2,  # clockwise leans to the right
        "size": height,
        "aspect": width / height,
        "thickness": ink,
        "shift_x": x,
        "shift_y": y,
    }
    assert statistics.keys() == data.DIGIT_FACTORS.keys()
    for name, statistic in statistics.items():
        within_class = [
            torch.corrcoef(torch.stack([drawn.factors[name][drawn.labels == c].double(),
                                        statistic[drawn.labels == c]]))[0, 1].item()
            for c in range(10)
        ]
        assert np.mean(within_class) > 0.3, (name, within_class)


def test_factors_are_independent_of_each_other_and_of_the_class(drawn):
    table = torch.stack([drawn.factors[name].double() for name in ["class", *data.DIGIT_FACTORS]])
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    assert correlation.abs().max() < 5 / 6000**0.5


def test_a_linear_classifier_reads_drawn_digits(drawn):
    x, y = drawn.images.flatten(1) / 255, drawn.labels
    model = torch.nn.Linear(784, 10)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[:5000]), y[:5000])
        loss = loss + 1e-3 * model.weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    accuracy = (model(x[5000:]).argmax(dim=1) == y[5000:]).double().mean()
    assert accuracy >= 0.9


def test_digits_are_cached_and_a_bad_cache_is_drawn_anew(digits_root, tmp_path, monkeypatch):
    def small(n, seed):
        calls.append(n)
        labels = torch.arange(n) % 10
        factors = dict.fromkeys(["class", "glyph", *data.DIGIT_FACTORS], labels)
        return Split(labels.byte().view(n, 1, 1, 1), labels, factors)

    calls = []
    monkeypatch.setitem(data.DRAWN, "digits", (small, 60_000, 10_000))
    train, test = data.load_dataset("digits", digits_root)
    assert not calls  # the fixture has cached them
    assert len(train.images) == 60_000 and len(test.images) == 10_000
    assert train.factors.keys() == {"class", "glyph", *data.DIGIT_FACTORS}

    monkeypatch.setattr(data, "PROJECT_DATA", tmp_path / "project")
    for round_number in (1, 2):
        first, _ = data.load_dataset("digits", tmp_path)
        again, _ = data.load_dataset("digits", tmp_path)
        assert len(calls) == round_number and torch.equal(first.images, again.images)
        content = bytearray((tmp_path / "digits.npz").read_bytes())
        content[len(content) // 2] ^= 255
        (tmp_path / "digits.npz").write_bytes(content)
    (tmp_path / "digits.npz").write_bytes(b"")
    data.load_dataset("digits", tmp_path)
    assert len(calls) == 3
    edited = tmp_path / "data.py"  # another glyph, say
    edited.write_text("")
    monkeypatch.setattr(data, "__file__", str(edited))
    data.load_dataset("digits", tmp_path)
    assert len(calls) == 4
    (tmp_path / "blocked").write_text("a file, so no folder")
    data.load_dataset("digits", tmp_path / "blocked")
    assert (tmp_path / "project" / "digits.npz").is_file()


# -------------------------------------------------------------------- drawn faces


def test_drawn_faces_have_the_stated_form(faces):
    assert faces.images.shape == (400, 3, 64, 64) and faces.images.dtype == torch.uint8
    assert faces.factors.keys() == {*data.FACE_FACTORS, "glasses"}
    assert torch.equal(faces.labels, (faces.factors["smile"] > 0).long())
    assert set(faces.factors["glasses"].tolist()) == {0, 1}
    for name, (low, high) in data.FACE_FACTORS.items():
        values = faces.factors[name]
        if name == "beard":  # what is not there has no opacity
            assert 0.5 < (values == 0).double().mean() < 0.8
            low = 0.0
        assert values.shape == (400,) and low <= values.min() and values.max() <= high
        assert values.max() - values.min() > 0.95 * (high - low)


def test_factors_of_faces_are_independent():
    table = torch.stack([values.double() for values in data.face_factors(20_000, 2).values()])
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    assert correlation.abs().max() < 5 / 20_000**0.5


def paint(faces: Split, **changed: float) -> torch.Tensor:
    """The first 12 faces with some factors changed: (12, 3, 64, 64), float."""
    factors = {name: values[:12].clone() for name, values in faces.factors.items()}
    for name, value in changed.items():
        factors[name].fill_(value)
    return data.paint_faces(factors).float()


# In which rows of the image a factor may show.
FACE_ROWS = {
    "skin": (0, 64), "hair_colour": (0, 64), "hair_length": (0, 64), "fringe": (0, 48),
    "face_width": (0, 64), "jaw": (28, 64), "beard": (24, 60), "eye_size": (10, 40),
    "eye_colour": (18, 40), "gaze": (18, 40), "turn": (0, 64), "brows": (10, 32),
    "smile": (34, 58), "mouth_open": (38, 58), "shirt": (48, 64), "background": (0, 64),
    "glasses": (20, 42),
}  # fmt: skip


@pytest.mark.parametrize("name", FACE_ROWS)
def test_a_factor_of_faces_shows_where_it_should_and_is_smooth(faces, name):
    assert FACE_ROWS.keys() == faces.factors.keys()
    low, high = (0.0, 1.0) if name in ("glasses", "beard") else data.FACE_FACTORS[name]
    factors = {key: values[:2].repeat_interleave(101) for key, values in faces.factors.items()}
    factors[name] = torch.linspace(low, high, 101).repeat(2)
    path = data.paint_faces(factors).float().view(2, 101, 3, 64, 64)
    change = (path[:, -1] - path[:, 0]).abs().mean(dim=1)  # (2, 64, 64)
    first, last = FACE_ROWS[name]
    assert (change[:, first:last].sum(dim=(1, 2)) > 0.99 * change.sum(dim=(1, 2))).all()
    assert (change.amax(dim=(1, 2)) > 15).all()
    # Edges are soft: a step, a third of a pixel at most, nowhere swaps one colour for another.
    assert path.diff(dim=1).abs().max() < 110


def test_edges_of_faces_are_antialiased(faces):
    """A face is what it would be if drawn four times as large and averaged."""
    factors = {name: values[:12] for name, values in faces.factors.items()}
    large = data.paint_faces(factors, 256, 256, 256).float()
    averaged = torch.nn.functional.avg_pool2d(large, 4)
    assert (data.paint_faces(factors).float() - averaged).abs().mean() < 1.5  # levels of 256


def test_factors_of_faces_are_what_their_names_say(faces):
    """From one end to the other each moves what it should, the right way, in every face."""

    def mask(colour, rows=(0, 64), columns=(0, 64), **changed):
        """What has the colour of a factor: its area and its centre (x, y), within limits."""
        one, other = (paint(faces, **{colour: v, "beard": 0, **changed}) for v in (0, 1))
        part = (one - other).abs().mean(dim=1)[:, slice(*rows), slice(*columns)]
        area = part.sum(dim=(1, 2))
        x = (part.sum(dim=1) * torch.arange(part.shape[2])).sum(dim=1) / area
        y = (part.sum(dim=2) * torch.arange(part.shape[1])).sum(dim=1) / area
        return area, x, y

    area, x, y = 0, 1, 2
    for factor, low, high, statistic, arguments in (
        ("gaze", -1, 1, x, {"colour": "eye_colour"}),
        ("turn", -1, 1, x, {"colour": "eye_colour"}),
        ("eye_size", 0.8, 1.25, area, {"colour": "eye_colour", "gaze": 0, "turn": 0}),
        ("face_width", 0.47, 0.57, area, {"colour": "skin"}),
        ("jaw", 0, 1, area, {"colour": "skin", "rows": (40, 64)}),
        ("hair_length", 0, 1, area, {"colour": "hair_colour"}),
        ("hair_length", 0, 1, y, {"colour": "hair_colour"}),
        ("fringe", 0, 1, area, {"colour": "hair_colour"}),
        ("beard", 0, 1, area, {"colour": "hair_colour", "rows": (40, 60)}),
        ("mouth_open", 1, 0, area, {"colour": "skin", "rows": (38, 58)}),
        ("brows", -1, 1, y, {"colour": "hair_colour", "rows": (14, 30), "columns": (26, 38),
                             "fringe": 0, "turn": 0}),
    ):
        before = mask(**{**arguments, factor: low})[statistic]
        after = mask(**{**arguments, factor: high})[statistic]
        assert (after > before).all(), (factor, before, after)

    # A smile lifts the corners of the mouth: what has become darker lies above what was dark.
    fixed = {"turn": 0, "mouth_open": 0, "beard": 0, "skin": 0}
    change = (paint(faces, smile=1, **fixed) - paint(faces, smile=-1, **fixed)).mean(dim=1)
    rows = torch.arange(64.0)
    for corner in (slice(23, 26), slice(38, 41)):
        darker, lighter = ((-change).clamp(min=0), change.clamp(min=0))
        above, below = ((part[..., corner].sum(dim=2) * rows).sum(dim=1) / part[..., corner].sum(
            dim=(1, 2)) for part in (darker, lighter))
        assert (above < below - 1).all()


def test_faces_of_another_size_are_the_same_faces_and_write_celeba_writes_them(tmp_path):
    drawn = draw_faces(40, seed=3)
    folder = data.write_celeba(tmp_path, 40, zipped=True, seed=3)
    assert {path.name for path in folder.iterdir()} == {
        "img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"
    }
    with zipfile.ZipFile(folder / "img_align_celeba.zip") as archive:
        with archive.open("img_align_celeba/000001.jpg") as file:
            image = Image.open(file)
            assert image.size == (178, 218) and image.mode == "RGB"
    train, test = data.load_dataset("celeba", tmp_path)
    assert len(train.images) == 32 and len(test.images) == 4
    for split, part in ((train, slice(32)), (test, slice(36, 40))):
        assert (split.images.float() - drawn.images[part].float()).abs().mean() < 4
        assert torch.equal(split.labels, drawn.labels[part])
        assert len(split.factors) == 40
        assert torch.equal(split.factors["Eyeglasses"], drawn.factors["glasses"][part].byte())
        assert not split.factors["Male"].any()  # drawings have no sex
    with pytest.raises(FileExistsError):  # it may be the real one
        data.write_celeba(tmp_path, 10)
    data.write_celeba(tmp_path / "other", 40, seed=3)
    for one, other in zip((train, test), data.load_dataset("celeba", tmp_path / "other")):
        assert torch.equal(one.images, other.images)


# ------------------------------------------------------------------------ batches


@given(st.integers(1, 50), st.integers(1, 60), st.booleans())
def test_batches_serve_every_image_once_with_its_label(n, batch_size, shuffle):
    images = torch.randint(256, (n, 1, 2, 3), dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n)
    loader = Batches(images, torch.arange(n), batch_size, shuffle)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert [len(x) for x, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    x, y = (torch.cat(part) for part in zip(*batches))
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    assert sorted(y.tolist()) == list(range(n))
    assert torch.equal((x * 255).round().byte(), images[y])
    assert shuffle or torch.equal(y, torch.arange(n))
    torch.testing.assert_close(x, images[y].float() / 255, rtol=0, atol=0)


@given(st.integers(0, 255))
def test_binarized_pixels_are_drawn_anew_with_the_grey_value_as_probability(grey):
    n = 40_000
    images = torch.full((2, 1, n // 200, 100), grey, dtype=torch.uint8)
    loader = Batches(images, torch.zeros(2), batch_size=2, binarize=True)
    (first, _), (second, _) = [*loader, *loader]
    assert ((first == 0) | (first == 1)).all() and first.dtype == torch.float32
    p = grey / 255
    assert abs(first.mean() - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1e-7
    assert torch.equal(first, second) == (grey in (0, 255))
    same = (first == second).float().mean()  # independent draws agree by chance only
    assert abs(same - p**2 - (1 - p) ** 2) <= 5 * 0.5 / n**0.5


@given(st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_binarizing_once_is_one_fixed_draw(grey, seed):
    n = 40_000
    images = torch.full((n // 100, 1, 10, 10), grey, dtype=torch.uint8)
    once = data.binarize_once(images, seed)
    assert once.dtype == torch.uint8 and ((once == 0) | (once == 255)).all()
    p = grey / 255
    assert abs((once / 255).mean() - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1e-7
    torch.rand(3)  # the draw depends on its own seed only
    assert torch.equal(data.binarize_once(images, seed), once)
    assert torch.equal(data.binarize_once(images, seed + 1), once) == (grey in (0, 255))


def test_shuffling_differs_from_pass_to_pass_and_follows_the_seed():
    loader = Batches(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), torch.arange(100), 100, True)
    first, second = (next(iter(loader))[1].tolist() for _ in range(2))
    torch.manual_seed(0)
    assert first != second and next(iter(loader))[1].tolist() == first


def test_batches_take_bytes_only_which_cannot_be_nan():
    with pytest.raises(TypeError, match="uint8"):
        Batches(torch.full((2, 1, 28, 28), torch.nan), torch.zeros(2), 2)
