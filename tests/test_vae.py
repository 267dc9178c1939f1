"""The mathematics and the networks of vae.py."""

import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.testing import assert_close

from ae import Autoencoder
from vae import VAE, CelebAVAE, ConvVAE, bce_from_logits, kl_divergence_gaussian
from vae import reparameterize, squared_error, vae_loss

MODELS = [VAE, ConvVAE, CelebAVAE]
shapes = st.tuples(st.integers(1, 6), st.integers(1, 12))


def floats(low, high, width=32):
    return st.floats(low, high, width=width)


@st.composite
def tensors(draw, *ranges, shape=shapes, dtype=np.float32):
    """Tensors of one common shape, one for each range of values."""
    size = draw(shape)
    width = 32 if dtype == np.float32 else 64
    arrays = [draw(hnp.arrays(dtype, size, elements=floats(*r, width=width))) for r in ranges]
    return [torch.from_numpy(array) for array in arrays]


def random_images(batch, architecture=VAE):
    size = (3, 64, 64) if architecture is CelebAVAE else (1, 28, 28)
    return torch.rand(batch, *size)


# ----------------------------------------------------------------------------- KL


@given(tensors((-1, 1), (-1, 1), dtype=np.float64), st.sampled_from([20, 1, 0.01, 1e-4, 1e-6]))
def test_kl_is_that_of_torch_distributions_and_float32_keeps_its_digits_near_the_prior(pair, scale):
    mu, logvar = (scale * part for part in pair)
    q = torch.distributions.Normal(mu, torch.exp(0.5 * logvar))
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = torch.distributions.kl_divergence(q, prior).sum(dim=1)
    assert_close(kl_divergence_gaussian(mu, logvar), expected, rtol=1e-5, atol=1e-14)
    kl = kl_divergence_gaussian(mu.float(), logvar.float())
    assert_close(kl.double(), expected, rtol=1e-2, atol=1e-7 * scale)
    assert kl.shape == (len(mu),) and (kl >= 0).all()
    assert (kl[expected > 1e-6 * scale] > 0).all()
    assert (kl_divergence_gaussian(0 * mu, 0 * mu) == 0).all()


@given(tensors((-3, 3), (-3, 2), dtype=np.float64))
def test_kl_equals_a_monte_carlo_estimate(pair):
    mu, logvar = pair
    n, std = 20_000, torch.exp(0.5 * logvar)
    z = mu + std * torch.randn(n, *mu.shape, dtype=mu.dtype)
    log_q = torch.distributions.Normal(mu, std).log_prob(z).sum(dim=2)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=2)
    estimate, error = (log_q - log_p).mean(dim=0), (log_q - log_p).std(dim=0) / n**0.5
    assert ((kl_divergence_gaussian(mu, logvar) - estimate).abs() <= 5 * error + 1e-9).all()


# --------------------------------------------------------------- reparameterization


@given(floats(-3, 3), floats(-4, 3))
def test_samples_have_the_stated_mean_and_standard_deviation(mu, logvar):
    n = 50_000
    z = reparameterize(torch.full((n, 2), mu), torch.full((n, 2), logvar)).double()
    std = math.exp(0.5 * logvar)
    assert (z.mean(dim=0) - mu).abs().max() <= 5 * std / n**0.5 + 1e-6
    assert (z.std(dim=0) - std).abs().max() <= 5 * std / (2 * n) ** 0.5 + 1e-6
    assert abs((((z - mu) / std) ** 4).mean() - 3) < 0.2  # the fourth moment of a Gaussian
    assert abs(torch.corrcoef(z.T)[0, 1]) <= 5 / n**0.5  # each latent has its own noise
    assert abs(torch.corrcoef(torch.stack([z[:-1, 0], z[1:, 0]]))[0, 1]) <= 5 / n**0.5


@given(tensors((-3, 3), (-4, 4), shape=st.tuples(*[st.integers(1, 3)] * 2), dtype=np.float64))
def test_gradients_equal_finite_differences_at_fixed_noise_which_is_fresh_in_every_call(pair):
    def at_fixed_noise(mu, logvar):
        torch.manual_seed(7)
        return reparameterize(mu, logvar).sin()

    assert not torch.equal(reparameterize(*pair), reparameterize(*pair))
    assert torch.autograd.gradcheck(at_fixed_noise, [t.requires_grad_() for t in pair])


# ------------------------------------------------------------------ reconstruction


@given(tensors((-15, 15), (0, 1)))
def test_bce_is_that_of_torch_and_its_gradient_sigmoid_minus_x(pair):
    logits, x = (torch.cat([part, torch.zeros_like(part)], dim=1) for part in pair)
    logits.requires_grad_()
    ours = bce_from_logits(logits, x)
    theirs = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=1)
    assert ours.shape == (len(x),)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    ours.sum().backward()
    assert_close(logits.grad, torch.sigmoid(logits.detach()) - x, rtol=0, atol=1e-6)


@given(floats(20, 1e4), st.sampled_from([-1.0, 1.0]), floats(0, 1))
def test_bce_far_out_has_the_exact_asymptote_and_gradient(size, sign, x):
    logits = torch.tensor([[sign * size]], requires_grad=True)
    loss = bce_from_logits(logits, torch.tensor([[x]]))
    loss.sum().backward()
    # softplus(l) -> max(l, 0), so the loss is (1 - x) l for l > 0 and -x l for l < 0
    expected = (1 - x) * size if sign > 0 else x * size
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6 * size)
    assert logits.grad.item() == pytest.approx((1.0 if sign > 0 else 0.0) - x, abs=1e-6)


@given(tensors((-10, 10), (0, 1), dtype=np.float64))
def test_squared_error_is_a_gaussian_likelihood_up_to_a_constant(pair):
    logits, x = pair
    ours = squared_error(logits, x)
    assert_close(ours, F.mse_loss(torch.sigmoid(logits), x, reduction="none").sum(dim=1))
    gaussian = torch.distributions.Normal(torch.sigmoid(logits), 0.5**0.5)
    constant = x.shape[1] * 0.5 * math.log(math.pi)
    assert_close(ours + constant, -gaussian.log_prob(x).sum(dim=1))


# ------------------------------------------------------------------------ the loss


@given(tensors((-8, 8), (0, 1)), tensors((-3, 3), (-3, 3)), floats(0, 100))
def test_the_loss_is_recon_plus_beta_kl_summed_over_the_batch(pixels, code, beta):
    batch = min(len(pixels[0]), len(code[0]))
    logits, x, mu, logvar = (t[:batch] for t in (*pixels, *code))
    total, recon, kl = vae_loss(logits, x, mu, logvar, beta)
    assert_close(recon, bce_from_logits(logits, x).sum())
    assert_close(kl, kl_divergence_gaussian(mu, logvar).sum())
    assert_close(total, recon + beta * kl)
    assert_close(vae_loss(logits, x, mu, logvar)[0], recon + kl)


@pytest.mark.parametrize("recon_loss", [bce_from_logits, squared_error])
def test_flat_logits_and_images_may_meet_but_sizes_must_agree(recon_loss):
    x, mu, logits = random_images(3), torch.zeros(3, 2), torch.randn(3, 784)
    flat = vae_loss(logits, x.flatten(1), mu, mu, 1.0, recon_loss)
    assert_close(vae_loss(logits, x, mu, mu, 1.0, recon_loss), flat)
    for wrong in (torch.randn(3, 1, 24, 24), torch.randn(1, 784)):  # no silent broadcasting
        with pytest.raises(RuntimeError):
            vae_loss(wrong, x, mu, mu, 1.0, recon_loss)


# ---------------------------------------------------------------------- the models


@pytest.mark.parametrize("architecture", MODELS)
@settings(max_examples=4)
@given(batch=st.integers(1, 9), latent_dim=st.integers(1, 40))
def test_shapes_ranges_and_the_order_of_what_is_returned(architecture, batch, latent_dim):
    model, x = architecture(latent_dim=latent_dim).eval(), random_images(batch, architecture)
    size = (batch, 784) if architecture is VAE else x.shape
    logits, mu, logvar = model(x)
    assert logits.shape == size
    assert mu.shape == logvar.shape == (batch, latent_dim)
    assert_close((mu, logvar), model.encode(x))
    model.reparameterize = lambda mu, logvar: mu + 100 * logvar  # asymmetric, and no noise
    z = mu + 100 * logvar
    assert_close(model(x)[0], model.decode_logits(z))
    decoded, samples = model.decode(z), model.sample(batch)
    assert_close(decoded, torch.sigmoid(model.decode_logits(z)))
    assert decoded.shape == samples.shape == size
    for images in (decoded, samples):
        assert images.min() >= 0 and images.max() <= 1
    assert ConvVAE(3, latent_dim)(torch.rand(batch, 3, 28, 28))[0].shape == (batch, 3, 28, 28)


@pytest.mark.parametrize("architecture", MODELS)
def test_model_loss_is_the_vae_loss_of_its_forward_pass(architecture):
    model, x = architecture(), random_images(3, architecture)
    for beta, recon_loss in ((0.0, bce_from_logits), (2.5, bce_from_logits), (2.5, squared_error)):
        model.recon_loss = recon_loss
        torch.manual_seed(3)
        loss = model.loss(x, None, beta)
        torch.manual_seed(3)
        logits, mu, logvar = model(x)
        assert_close(loss, vae_loss(logits, x, mu, logvar, beta, recon_loss))


@pytest.mark.parametrize("architecture", MODELS)
def test_logvar_is_clamped_and_gradients_are_finite_and_come_through_z(architecture):
    model, x = architecture(latent_dim=2), random_images(3, architecture)
    prefix = "encoder_fc" if architecture is VAE else "fc"
    model.get_parameter(f"{prefix}_logvar.bias").data = torch.tensor([-1e6, 1e6])
    assert torch.equal(model.encode(x)[1], torch.tensor([[-10.0, 10.0]]).expand(3, 2))
    model.loss(x, None, beta=0.0)[0].backward()  # of recon, which knows the encoder by z alone
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.get_parameter(f"{prefix}_mu.weight").grad.any()


@pytest.mark.parametrize("architecture", [*MODELS, Autoencoder])
def test_samples_are_decoded_from_standard_normal_codes(architecture):
    model = architecture(latent_dim=2)
    model.decode = lambda z: z
    z = model.sample(50_000)
    assert z.mean(dim=0).abs().max() < 0.03 and (z.var(dim=0) - 1).abs().max() < 0.05
    assert (z.pow(4).mean(dim=0) - 3).abs().max() < 0.2  # the fourth moment of a Gaussian
