"""explore.html, the page of a run: what it holds, and that its JavaScript, which node runs here,
computes what PyTorch does."""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT
from ex6_likelihood import PaperVAE
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import viz
from ae import Autoencoder
from vae import VAE, CelebAVAE, ConvVAE

MODELS = {"ae": Autoencoder, "mlp": lambda: VAE(latent_dim=2), "conv": ConvVAE,
          "celeba": lambda: CelebAVAE(latent_dim=8), "paper": PaperVAE}
TEMPLATE = (PROJECT / "explore.html").read_text("utf-8")
FOLDER, CLASS = "<!--<script>", "</script><b>"  # what would swallow, or end, the page's scripts
NODE = """
const [math, text, x, z] = JSON.parse(require("fs").readFileSync(0, "utf8"));
(0, eval)(math + "; globalThis.page = { read, encode, decodeLogits, lossTerms, sigmoid }");
const run = page.read(text), q = page.encode(run, x), logits = page.decodeLogits(run, z);
const terms = page.lossTerms(run, x, logits, q), decoded = [...logits.map(page.sigmoid)];
console.log(JSON.stringify({ mu: [...q.mu], logvar: [...q.logvar ?? []], decoded, ...terms }));
"""


def explore(folder, model, n=40, shape=(1, 28, 28), **config):
    """The page of a model, and the n images of 10 classes in two batches that it is given."""
    images, labels = torch.randint(256, (n, *shape)) / 255, torch.arange(n) % 10
    config = {"model": "some", "dataset": "digits", "notice": "", "recon": "bce"} | config
    batches, chance = zip(images.split(n // 2), labels.split(n // 2)), torch.get_rng_state()
    viz.write_explorer(folder, model, config, batches)
    assert torch.equal(torch.get_rng_state(), chance)
    path = folder / "explore.html"
    return path.read_text("utf-8") if path.exists() else None, images


def script(page, name):
    return re.search(rf'<script id="{name}".*?>(.*?)</script>', page, re.DOTALL)[1]


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """A model whose BatchNorms are not the identity and, in the paper's, with two of its logvars
    beyond their clamp; how it measures images; its page; and images."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param) / FOLDER
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.1
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                tensor.data.uniform_(0.2, 2)
    if name == "paper":
        model.fc_logvar.bias.data[:2] = torch.tensor([30.0, -30.0])
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(viz.CLASS_NAMES, "nasty", [CLASS] * 10)
        shape = (3, 64, 64) if name == "celeba" else (1, 28, 28)
        config = {"dataset": "nasty", "notice": CLASS, "beta": 4.0, "shape": shape}
        recon = "mse" if name in ("ae", "paper") else "bce"
        return model, recon, *explore(folder, model, recon=recon, **config)


def floats(packed):
    return torch.from_numpy(np.frombuffer(b64decode(packed["f16"]), np.float16).copy()).float()


def test_a_page_holds_the_weights_to_the_precision_of_float16(made):
    model, _, page, _ = made
    run = json.loads(script(page, "run"))
    layers = [layer for layer in run["encoder"] + run["decoder"] if "weight" in layer]
    modules = [module for module in model.modules() if hasattr(module, "weight")]
    for layer, module in zip(layers, modules, strict=True):
        assert torch.equal(floats(layer["weight"]), module.weight.half().float().flatten())
        assert torch.equal(floats(layer["bias"]), module.bias.half().float())
        if isinstance(module, nn.BatchNorm2d):
            x = torch.randn(3, len(module.weight), 2, 2)
            scale, shift = (floats(layer[key])[:, None, None] for key in ("scale", "shift"))
            assert_close(x * scale + shift, module(x), rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node to run JavaScript")
@torch.no_grad()
def test_a_page_encodes_decodes_and_measures_as_pytorch_does(made):
    model, recon, page, images = made
    z, x = torch.randn(1, model.latent_dim), images[0].flatten()
    given = [script(TEMPLATE, "mathematics"), script(page, "run"), x.tolist(), z[0].tolist()]
    node = subprocess.run(["node", "-e", NODE], input=json.dumps(given), stdout=subprocess.PIPE,
                          text=True, check=True)
    answer = json.loads(node.stdout)
    codes, logits = model.encode(images[:1]), model.decode_logits(z)[0].flatten()
    mu, logvar = codes if isinstance(codes, tuple) else (codes, codes[:, :0])
    for key, value in {"mu": mu[0], "logvar": logvar[0], "decoded": logits.sigmoid()}.items():
        np.testing.assert_allclose(answer[key], value, rtol=2e-3, atol=2e-3, err_msg=key)
    errors = {"bce": F.binary_cross_entropy_with_logits(logits, x, reduction="sum"),
              "mse": F.mse_loss(logits.sigmoid(), x, reduction="sum")}
    q = Normal(mu[:, : logvar.shape[1]], (logvar / 2).exp())
    kl = kl_divergence(q, Normal(0.0, 1.0)).sum()
    for key, value in {"recon": errors[recon], "kl": kl, "total": errors[recon] + 4 * kl}.items():
        assert answer[key] == pytest.approx(value.item(), rel=0.005), key


def test_names_cannot_become_html_and_nothing_is_fetched(made):
    page, tags = made[2], []
    for text in (page, TEMPLATE):
        parser = HTMLParser()
        parser.handle_starttag = lambda *tag: tags.append(tag)
        parser.feed(text)
    assert tags[: len(tags) // 2] == tags[len(tags) // 2 :] and "<" not in script(page, "run")
    run = json.loads(script(page, "run"))
    assert run["folder"] == FOLDER and run["classes"][3] == run["notice"] == CLASS
    assert "http" not in TEMPLATE and "://" not in page  # base64 may hold an "http" by chance
    assert not re.search(r"\bsrc=|href=|url\(|@import|fetch\(", TEMPLATE)


@torch.no_grad()
def test_a_page_shows_some_of_every_class_and_what_each_latent_tells(tmp_path):
    model = VAE(latent_dim=2).train()
    page, images = explore(tmp_path, model, n=250)
    run, (mu, logvar) = json.loads(script(page, "run")), model.encode(images)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).mean(dim=0)
    assert run["use"] == pytest.approx(kl.tolist(), rel=1e-4)
    assert_close(floats(run["codes"]).view(-1, 2), mu, rtol=1e-3, atol=1e-4)
    assert [run["labels"][i] for i in run["shown"]] == sorted([*range(10)] * 2)
    assert_close(floats(run["images"]), images[run["shown"]].flatten(), rtol=1e-3, atol=0)
    assert model.training and not any(layer._forward_hooks for layer in model.modules())


class Leaky(VAE):
    def decode_logits(self, z):
        return self.decoder_fc2(F.leaky_relu(self.decoder_fc1(z)))


@pytest.mark.parametrize("make", [Leaky, lambda: VAE(hidden_dim=6000)])
def test_there_is_no_page_of_a_model_that_it_could_not_compute(make, tmp_path):
    assert explore(tmp_path, make())[0] is None
