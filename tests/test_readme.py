"""What the READMEs show runs as it stands there."""

import re

import data
import pytest
import train
from conftest import PROJECT
from PIL import Image

README = (PROJECT / "README.md").read_text()
TEXTS = {name: (PROJECT / name).read_text()
         for name in ("README.md", "exercises/README.md", "tests/README.md")}
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("no_figures")
def test_the_blocks_train_a_vae_and_encode_a_picture(tmp_path, monkeypatch, drawn, faces, capsys):
    """On some of the images."""
    monkeypatch.chdir(tmp_path)
    small = {name: data.Split(split.images[:n], split.labels[:n], {})
             for name, split, n in (("digits", drawn, 1500), ("faces", faces, 20))}
    for module in (data, train):
        monkeypatch.setattr(module, "load_dataset", lambda name, *root: (small[name],) * 2)
    first, second = PYTHON
    exec(first, found := {})
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0] < 784
    assert found["new"].shape == (64, 28, 28) and 0 <= found["new"].min() <= found["new"].max() <= 1
    assert len(first.splitlines()) <= 20

    train.main("--dataset faces --epochs 1 --latent-dim 8 --out runs/folder-celeba".split())
    Image.new("RGB", (300, 200), "green").save("me.jpg")
    exec(second, found := {})
    assert found["mu"].shape == (1, 8) and found["image"].shape == (1, 3, 64, 64)


def test_commands_and_links_lead_somewhere(tmp_path):
    text = "\n".join(TEXTS.values())
    targets = set(re.findall(r"^([a-z0-9-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", text, re.MULTILINE))
    assert named and named <= targets
    commands = re.findall(r"python train\.py((?: --?[a-z-]+(?: [\w./-]+)?)*)", text)
    assert len(commands) > 3
    for options in commands:
        train.parse_args(options.replace("path/to/a/folder", str(tmp_path)).split())
    for name, text in TEXTS.items():
        links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text)
        for path, anchor in links + [(path, "") for path in re.findall(r'src="(.*?)"', text)]:
            target = (PROJECT / name).parent / path if path else PROJECT / name
            assert target.exists(), (name, path)
            if anchor:
                headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                ids = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in ids, (name, path, anchor)


def test_files_are_as_long_as_the_readme_says():
    for name, lines in re.findall(r"^\| \d \| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE):
        assert len((PROJECT / name).read_text().splitlines()) == pytest.approx(int(lines), rel=0.1)
