"""What people really have on their disks, in their notebooks: files as they are found."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from celeba_files import write_celeba
from conftest import assert_user_error, run_here, write_idx
from PIL import Image

import data
import train
import viz
from ae import Autoencoder
from data import UserError, load_dataset
from vae import VAE, CelebAVAE, ConvVAE

# ------------------------------------------------------------------------ MNIST's files

FORMS = {
    "official": ("mnist", "{}", True), "plain": ("mnist", "{}", False),
    "torchvision": ("MNIST/raw", "{}", False), "beside": (".", "{}", True),
    "dotted": ("mnist", "dotted", False), "Kaggle's": ("mnist", "{0}/{0}", False),
}


def write_set(root: Path, split: data.Split, form: str = "official", n: int = 40) -> Path:
    """n + n images, as one finds them."""
    folder, name, zipped = FORMS[form]
    for prefix, part in (("train", slice(n)), ("t10k", slice(n, 2 * n))):
        arrays = {"images-idx3": split.images[part, 0], "labels-idx1": split.labels[part]}
        for kind, array in arrays.items():
            stem = f"{prefix}-{kind}-ubyte"
            stem = stem.replace("-idx", ".idx") if name == "dotted" else name.format(stem)
            write_idx(root / folder / f"{stem}{'.gz' * zipped}", array.numpy())
    return root / folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_a_set_is_read_where_it_lies(tmp_path, drawn, form, name, capsys):
    folder = write_set(tmp_path, drawn, form)
    raw = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}[name]
    if form != "beside":
        place = tmp_path / (f"{raw}/raw" if form == "torchvision" else name)
        place.parent.mkdir(exist_ok=True)
        folder.rename(place)
    train_split, test_split = load_dataset(train.parse_args(["--dataset", name]).dataset, tmp_path)
    assert "have no known checksum" in capsys.readouterr().out
    assert torch.equal(train_split.images, drawn.images[:40])
    assert torch.equal(test_split.labels, drawn.labels[40:80])


def test_another_set_of_mnists_names_is_refused_by_its_own(tmp_path, drawn, monkeypatch, capsys):
    """Known by its compressed labels, or MNIST by the labels themselves, however stored."""
    folder = write_set(tmp_path, drawn)
    digest = data.checksum((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with monkeypatch.context() as patch:
        patch.setitem(data.IDX_SETS, "kmnist", ("KMNIST/raw", (), digest))
        with pytest.raises(UserError, match="t10k-labels.*: is of kmnist"):
            load_dataset("mnist", tmp_path)
    digests = [data.checksum(labels.byte().numpy()) for labels in drawn.labels[:80].split(40)]
    monkeypatch.setitem(data.IDX_SETS, "mnist", ("MNIST/raw", (), " ".join(digests)))
    capsys.readouterr()
    load_dataset("mnist", tmp_path)
    assert capsys.readouterr().out == ""
    write_set(tmp_path / "plain", drawn, "plain")
    (tmp_path / "plain" / "mnist").rename(tmp_path / "plain" / "fashion-mnist")
    with pytest.raises(UserError, match="is of mnist: train on that"):
        load_dataset("fashion-mnist", tmp_path / "plain")


def test_files_are_not_completed_by_a_download_of_something_else(tmp_path, drawn, monkeypatch):
    folder, fetched = write_set(tmp_path, drawn, "torchvision"), []
    monkeypatch.setattr(data, "fetch", lambda name, stem, where: fetched.append(stem) or where / (
        f"of the network/{stem}"))
    shutil.copytree(folder, folder / "of the network")
    for path in folder.glob("t10k*"):
        path.unlink()
    with pytest.raises(UserError, match="lacks t10k-images-.*, t10k-labels-.*: add"):
        load_dataset("mnist", tmp_path)
    official = [data.checksum(path.read_bytes()) for path in folder.glob("train*")]
    monkeypatch.setitem(data.IDX_SETS, "mnist", ("MNIST/raw", (), " ".join(official)))
    assert len(load_dataset("mnist", tmp_path)[1].images) == 40 and fetched == [*data.IDX_FILES[2:]]


def test_letters_have_labels_above_9_and_a_place_in_the_scatter(tmp_path, drawn):
    letters = drawn._replace(labels=drawn.labels + 17)
    write_set(tmp_path, letters)
    loader = [(drawn.images[:40] / 255, load_dataset("mnist", tmp_path)[0].labels)]
    viz.visualize_latent_space_2d(VAE(latent_dim=2), loader, "cpu", tmp_path / "scatter.png")
    assert (tmp_path / "scatter.png").stat().st_size > 2000


# ------------------------------------------------------------------------ CelebA's


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix, counted", [(".csv", False), (".txt", False), (".txt", True)])
def test_kaggles_celeba_is_read_as_it_was_unpacked(tmp_path, zipped, suffix, counted):
    expected = load_dataset("celeba", write_celeba(tmp_path / "official", 10).parent)
    folder = write_celeba(tmp_path / "kaggle", 10)
    inner = shutil.move(folder / "img_align_celeba", folder / "inner")
    shutil.move(inner, folder / "img_align_celeba" / "img_align_celeba")
    if zipped:
        shutil.make_archive(folder / "img_align_celeba", "zip", folder / "img_align_celeba")
        shutil.rmtree(folder / "img_align_celeba")
    headers = {"list_attr_celeba.txt": "", "list_eval_partition.txt": "image_id,partition"}
    for path, header in headers.items():
        lines = [",".join(line.split()) for line in (folder / path).read_text().splitlines()]
        if "attr" in path:
            lines[1] = f"image_id,{lines[1]}"
            lines = lines if counted else lines[1:]
        (folder / path).unlink()
        text = "\n".join(filter(None, [header, *lines])) + "\n"
        (folder / path).with_suffix(suffix).write_text(text)
    found = load_dataset("celeba", folder.parent)
    torch.testing.assert_close([*found], [*expected], rtol=0, atol=0)


def test_a_broken_archive_beside_a_folder_can_be_deleted(tmp_path):
    folder = write_celeba(tmp_path, 20)
    (folder / "img_align_celeba.zip").write_bytes(b"PK half of it")
    with pytest.raises(UserError, match="img_align_celeba.zip: is damaged .* or delete it"):
        load_dataset("celeba", tmp_path)


# ------------------------------------------------------------------------ your own pictures


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: which way up it is shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x + 90], axis=-1).astype(np.uint8))


def test_every_kind_of_picture_becomes_what_a_viewer_shows(tmp_path):
    image, path = gradient(120, 80), tmp_path / "picture.png"
    square = image.crop((20, 0, 100, 80)).resize((64, 64), Image.Resampling.BILINEAR)
    rgb, grey = (np.asarray(square.convert(mode)).astype(float) for mode in ("RGB", "L"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter to the left, to be turned back
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    half = image.convert("RGBA")
    half.putalpha(Image.new("L", image.size, 128))
    grey, turned = grey[..., None], image.transpose(Image.Transpose.ROTATE_90)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    for picture, expected, options in (
        (image, rgb, {}), (image.convert("L"), grey, {}), (image.convert("LA"), grey, {}),
        (palette, rgb, {}), (sixteen, grey, {}), (turned, rgb, {"exif": exif}),
        (half, rgb * 128 / 255 + 255 - 128, {}),
    ):
        picture.save(path, **options)
        found = data.load_picture(path)[0].permute(1, 2, 0).numpy() * 255
        assert found.shape == (64, 64, 3) and np.abs(found - expected).mean() < 3, picture.mode
    assert data.load_picture(path, channels=1, side=28).shape == (1, 1, 28, 28)
    image.convert("CMYK").save(tmp_path / "picture.jpg", quality=100)
    found = data.load_picture(tmp_path / "picture.jpg")[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - rgb).mean() < 4


def write_pictures(folder: Path, n: int) -> Path:
    for i, suffix in zip(range(n), 20 * [".jpg", ".JPEG", ".png", ".bmp", ".webp"]):
        path = folder / ("deep/er" if i % 3 else ".") / f"a b{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        gradient(40 + i, 60).rotate(i).save(path)
    return folder


def test_a_folder_of_pictures_is_trained_on(tmp_path, monkeypatch, figures):
    folder = write_pictures(tmp_path / "my photos", 30)
    for name in ("broken.png", "__MACOSX/._a.jpg", ".thumbs/b.jpg", "deep/.c.jpg", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    options = ["--latent-dim", 2, "--epochs", 1, "--batch-size", 10]
    result = run_here(train.main, "--dataset", "my photos", *options)
    assert result.returncode == 0, result.stderr
    assert "broken.png is broken (cannot identify" in result.stdout
    assert result.stdout.count("and passed over") == 1
    run = Path("runs/my photos-celeba-latent-dim2-epochs1-batch-size10")
    assert {"reconstruction.png", "latent_space.png"} <= figures.keys() and run.is_dir()
    before = load_dataset(str(folder))
    assert [len(split.images) for split in before] == [28, 2]
    for i in range(307):  # others, which move none of these to the other side
        gradient(20, 20).rotate(i).save(folder / f"{'az'[i % 2]}{i}.png")
    for old, new in zip(before, load_dataset(str(folder))):
        assert {image.numpy().tobytes() for image in old.images} <= {
            image.numpy().tobytes() for image in new.images}


def test_one_of_a_few_pictures_is_for_testing_though_none_is_by_its_name(tmp_path):
    for i in range(20):
        gradient(20, 20).save(tmp_path / f"f{i}.png")
    assert [len(split.images) for split in load_dataset(str(tmp_path))] == [19, 1]


def test_too_few_pictures_or_no_place_are_said(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "few", 19)
    assert_user_error(run_here(train.main, "--dataset", folder), "19 pictures", "20 are needed")
    assert_user_error(run_here(train.main, "--dataset", tmp_path / "no"), "is no folder", "mnist")
    write_pictures(folder, 25)
    closed = [folder]
    monkeypatch.setattr(data, "PROJECT_DATA", tmp_path / "project")
    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed)
    load_dataset(str(folder))
    assert {path.name for path in (tmp_path / "project").iterdir()} == {
        "few-64x64-train.uint8", "few-64x64-test.uint8"}
    closed.append(tmp_path / "project")
    shutil.rmtree(tmp_path / "project")
    with pytest.raises(UserError, match="make one of them a writable folder"):
        load_dataset(str(folder))


# ------------------------------------------------------------------------ Python, notebooks


@pytest.mark.parametrize("scale, shift, limits", [(2, -1, "-1 to 1"), (255, 0, "0 to 255")])
def test_images_outside_0_to_1_are_refused_with_their_range(drawn, scale, shift, limits):
    loader = [(drawn.images[:50] / 255 * scale + shift, None)]
    model = VAE()
    with pytest.raises(UserError, match=f"from {limits}"):
        train.train_epoch(model, loader, torch.optim.Adam(model.parameters()), "cpu")
    with pytest.raises(UserError, match=f"from {limits}"):
        train.test_epoch(model, loader, "cpu")


@pytest.mark.parametrize("architecture", [Autoencoder, VAE, ConvVAE, CelebAVAE])
def test_images_of_another_size_are_refused_with_both_sizes(architecture):
    with pytest.raises(ValueError, match=r"takes images of .*(784|28, 28|64, 64).*(1920|32, 20)"):
        architecture().encode(torch.rand(2, 3, 32, 20))


def test_pictures_that_are_not_square_are_drawn_as_they_are_or_refused(tmp_path):
    x = torch.rand(6, 1, 7, 28)  # as many values as 14 x 14
    model, seen = VAE(input_dim=196), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viz, "save_tiles", lambda images, *args, **more: seen.append(images))
        viz.visualize_reconstruction(model, [(x, None)], "cpu", tmp_path / "r.png")
        viz.visualize_interpolation(model, [(x, None)], "cpu", tmp_path / "i.png")
    assert all(images.shape[1:] == (1, 7, 28) for images in seen) and len(seen) == 2
    viz.save_tiles(x, 3, tmp_path / "t.png", scale=1)
    assert Image.open(tmp_path / "t.png").size[0] > 3 * 28
    with pytest.raises(ValueError, match="are no square image"):
        viz.as_images(torch.rand(2, 200))


@pytest.mark.usefixtures("no_figures")
def test_home_is_found_and_a_notebooks_arguments_are_not_read(tmp_path, mnist_root, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(mnist_root, tmp_path / "sets")
    options = ["--epochs", 1, "--limit", 50, "--out=~/run"]
    for where in (["--data-dir=~/sets"], []):
        assert run_here(train.main, *options, *where).returncode == 0
        result = run_here(train.redraw, "~/run", "--data-dir", "~/sets")
        assert result.returncode == 0 and f"figures drawn in {tmp_path}/run" in result.stdout
        monkeypatch.setenv("VAE_DATA_DIR", "~/sets")
        shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/tmp/kernel-1.json"])
    runs = []
    ended = ("run", None, {"notice": ""})
    monkeypatch.setattr(train, "train_run", lambda args: runs.append(args) or ended)
    assert train.main() == "run" and runs == [train.parse_args([])]
