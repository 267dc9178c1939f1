"""The autoencoder, and exercise 0, which compares it with a VAE."""

import ex0_autoencoder as ex0
import torch
import torch.nn.functional as F
import train
from ae import Autoencoder
from conftest import assert_user_error, run_here
from vae import VAE


def test_the_loss_is_the_squared_error_and_both_networks_learn_from_it():
    model, x = Autoencoder(latent_dim=3), torch.rand(5, 1, 28, 28)
    error = F.mse_loss(model(x)[0], x.flatten(1), reduction="sum")
    loss = model.loss(x, None, beta=3.0)
    torch.testing.assert_close(loss, (error, error, 0 * error))
    loss[0].backward()
    assert all(p.grad.any() for p in model.parameters())


def test_the_comparison_prints_where_codes_of_7_and_codes_from_n_0_4_lie(
    drawn, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(ex0, "save", lambda *args: None)
    ae, vae = Autoencoder(latent_dim=3), VAE(latent_dim=3)
    for layer, bias in ((ae.fc2, 7), (vae.encoder_fc_mu, 0), (vae.encoder_fc_logvar, 1.3863)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)
    decoded, decode = [], ae.decode
    ae.decode = lambda z: decoded.append(z) or decode(z)
    ex0.compare({"AE": ae, "VAE": vae}, drawn.images[:2000] / 255, tmp_path / "c.png")
    noise, scaled = (z for z in decoded if len(z) == 24)  # beside the codes and their lines
    assert noise.std() > 0.7 and noise.mean().abs() < 0.5 and torch.allclose(scaled, 7 + 0 * noise)
    lines = map(str.split, capsys.readouterr().out.splitlines())
    table = torch.tensor([[float(v) for v in row[1:]] for row in lines if len(row) == 5])
    assert torch.allclose(table, torch.tensor([7.0, 0, 0, 2]), rtol=0, atol=0.15)  # mean, std twice


def test_exercise_0_trains_both_and_prints_their_errors(mnist_root, tmp_path, monkeypatch, figures):
    monkeypatch.chdir(tmp_path)
    for option in ("--beta=2", "--binarize", "--out=x", "--recon=mse", "--model=conv"):
        assert_user_error(run_here(ex0.main, option), "exercise 0", option.split("=")[0])
    result = run_here(ex0.main, "--data-dir", mnist_root, "--limit=300", "--epochs=1")
    x = train.load_dataset("mnist", mnist_root)[1].images / 255
    ae, vae = (train.load_run(f"runs/mnist-{kind}-limit300-epochs1")[0] for kind in ("ae", "mlp"))
    torch.manual_seed(0)
    torch.randn(24, 20)  # the noise of the figure
    decoded = ae(x)[0], vae.decode(vae.reparameterize(*vae.encode(x)))
    errors = (F.mse_loss(y, x.flatten(1), reduction="sum").item() / 300 for y in decoded)
    end = "images: autoencoder {:.2f}, VAE {:.2f}\nsaved runs/mnist-mlp".format(*errors)
    assert end in result.stdout and list(tmp_path.glob("runs/mnist-mlp*/ae-vs-vae.png"))
