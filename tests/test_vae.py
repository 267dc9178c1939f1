"""The mathematics and the networks of vae.py."""

import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ae import Autoencoder
from vae import VAE, CelebAVAE, ConvVAE, bce_from_logits, kl_divergence_gaussian
from vae import reparameterize, squared_error, vae_loss

MODELS = [VAE, ConvVAE, CelebAVAE]
shapes = st.tuples(st.integers(1, 6), st.integers(1, 12))
recon_losses = st.sampled_from([bce_from_logits, squared_error])


@st.composite
def tensors(draw, *ranges, shape=shapes, dtype=np.float32):
    """Tensors of one common shape, one for each range of values."""
    size, limits = draw(shape), [{"min_value": low, "max_value": high} for low, high in ranges]
    return [torch.from_numpy(draw(hnp.arrays(dtype, size, elements=each))) for each in limits]


def random_images(batch, architecture=VAE):
    size = (3, 64, 64) if architecture is CelebAVAE else (1, 28, 28)
    return torch.rand(batch, *size)


# ----------------------------------------------------------------------------- KL


@given(tensors((-1, 1), (-1, 1), dtype=np.float64), st.sampled_from([20, 1, 0.01, 1e-4, 1e-6]))
def test_kl_is_that_of_torch_distributions_and_float32_keeps_its_digits_near_the_prior(pair, scale):
    mu, logvar = (scale * part for part in pair)
    expected = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum(dim=1)
    assert_close(kl_divergence_gaussian(mu, logvar), expected, rtol=1e-5, atol=1e-14)
    kl = kl_divergence_gaussian(mu.float(), logvar.float())
    assert_close(kl.double(), expected, rtol=1e-2, atol=1e-7 * scale)
    assert (kl >= 0).all() and (kl[expected > 1e-6 * scale] > 0).all()


@given(tensors((-3, 3), (-3, 2), dtype=np.float64))
def test_kl_equals_a_monte_carlo_estimate(pair):
    mu, logvar = pair
    q, n = Normal(mu, torch.exp(0.5 * logvar)), 20_000
    z = q.sample((n,))
    log_ratio = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(dim=2)
    estimate, error = log_ratio.mean(dim=0), log_ratio.std(dim=0) / n**0.5
    assert ((kl_divergence_gaussian(mu, logvar) - estimate).abs() <= 5 * error + 1e-9).all()


# --------------------------------------------------------------- reparameterization


def assert_standard_normal(z):
    """Draws of two latents, (n, 2): their moments, and that no number depends on another."""
    z, n = z.double(), len(z)
    assert z.mean(dim=0).abs().max() <= 5 / n**0.5
    assert (z.std(dim=0) - 1).abs().max() <= 5 / (2 * n) ** 0.5
    assert (z.pow(4).mean(dim=0) - 3).abs().max() < 0.2  # the fourth moment of a Gaussian
    correlations = torch.corrcoef(torch.cat([z[1:], z[:-1]], dim=1).T)  # with the draw before, too
    assert correlations.triu(1).abs().max() <= 5 / n**0.5


@given(st.floats(-3, 3), st.floats(-4, 3))
def test_draws_have_the_stated_mean_and_standard_deviation(mu, logvar):
    z = reparameterize(torch.full((50_000, 2), mu), torch.full((50_000, 2), logvar))
    assert_standard_normal((z.double() - mu) / math.exp(0.5 * logvar))


@pytest.mark.parametrize("architecture", [*MODELS, Autoencoder])
def test_samples_are_decoded_from_standard_normal_codes(architecture):
    model = architecture(latent_dim=2)
    model.decode = lambda z: z
    assert_standard_normal(model.sample(50_000))


@given(tensors((-3, 3), (-4, 4), shape=st.tuples(*[st.integers(1, 3)] * 2), dtype=np.float64))
def test_gradients_equal_finite_differences_at_fixed_noise_which_is_fresh_in_every_call(pair):
    def at_fixed_noise(mu, logvar):
        torch.manual_seed(7)
        return reparameterize(mu, logvar).sin()

    assert not torch.equal(reparameterize(*pair), reparameterize(*pair))
    assert torch.autograd.gradcheck(at_fixed_noise, [t.requires_grad_() for t in pair])


# ------------------------------------------------------------------ reconstruction


@given(tensors((-15, 15), (0, 1)), st.sampled_from([1, 1000]))
def test_bce_is_that_of_torch_and_its_gradient_sigmoid_minus_x_however_far_out(pair, scale):
    logits, x = (torch.cat([part, torch.zeros_like(part)], dim=1) for part in pair)
    logits = (scale * logits).requires_grad_()
    ours, exact = bce_from_logits(logits, x), logits.detach().double()
    theirs = F.binary_cross_entropy_with_logits(exact, x.double(), reduction="none").sum(dim=1)
    rounding = 1e-6 * (1 + exact.abs().sum().item())
    assert_close(ours.double(), theirs, rtol=1e-6, atol=rounding)
    ours.sum().backward()
    assert_close(logits.grad, torch.sigmoid(logits.detach()) - x, rtol=0, atol=1e-6)


@given(tensors((-10, 10), (0, 1), dtype=np.float64))
def test_squared_error_is_a_gaussian_likelihood_up_to_a_constant(pair):
    logits, x = pair
    gaussian = Normal(torch.sigmoid(logits), 0.5**0.5)
    constant = x.shape[1] * 0.5 * math.log(math.pi)
    assert_close(squared_error(logits, x) + constant, -gaussian.log_prob(x).sum(dim=1))


# ------------------------------------------------------------------------ the loss


@given(tensors((-8, 8), (0, 1)), tensors((-3, 3), (-3, 3)), st.floats(0, 100), recon_losses)
def test_the_loss_is_recon_plus_beta_kl_summed_over_the_batch(pixels, code, beta, recon_loss):
    batch = min(len(pixels[0]), len(code[0]))
    logits, x, mu, logvar = (t[:batch] for t in (*pixels, *code))
    total, recon, kl = vae_loss(logits, x, mu, logvar, beta, recon_loss)
    assert_close(recon, recon_loss(logits, x).sum())
    assert_close(kl, kl_divergence_gaussian(mu, logvar).sum())
    assert_close(total, recon + beta * kl)
    assert_close(vae_loss(logits, x, mu, logvar)[0], bce_from_logits(logits, x).sum() + kl)


@pytest.mark.parametrize("recon_loss", [bce_from_logits, squared_error])
@pytest.mark.parametrize("size", [(3, 1, 24, 24), (1, 784)])
def test_logits_of_another_size_are_refused_and_not_broadcast(recon_loss, size):
    with pytest.raises(RuntimeError):
        recon_loss(torch.randn(size), random_images(3))


# ---------------------------------------------------------------------- the models


@pytest.mark.parametrize("architecture", MODELS)
@settings(max_examples=4)
@given(batch=st.integers(1, 9), latent_dim=st.integers(1, 40))
def test_shapes_order_and_loss_of_what_a_model_returns(architecture, batch, latent_dim):
    model, x = architecture(latent_dim=latent_dim).eval(), random_images(batch, architecture)
    size = (batch, 784) if architecture is VAE else x.shape
    (logits, mu, logvar), samples = model(x), model.sample(batch)
    assert logits.shape == samples.shape == size and not samples.requires_grad
    assert mu.shape == logvar.shape == (batch, latent_dim)
    assert_close((mu, logvar), model.encode(x))
    model.reparameterize = lambda mu, logvar: mu + 100 * logvar  # asymmetric, and no noise
    z = mu + 100 * logvar
    logits = model.decode_logits(z)
    assert_close(model(x), (logits, mu, logvar))
    assert_close(model.decode(z), torch.sigmoid(logits))
    assert_close(model.loss(x, None), vae_loss(logits, x, mu, logvar))
    model.recon_loss = squared_error
    assert_close(model.loss(x, None, 2.5), vae_loss(logits, x, mu, logvar, 2.5, squared_error))
    assert ConvVAE(3, latent_dim)(torch.rand(batch, 3, 28, 28))[0].shape == (batch, 3, 28, 28)


@pytest.mark.parametrize("architecture", MODELS)
def test_logvar_is_clamped_and_gradients_are_finite_and_come_through_z(architecture):
    model, x = architecture(latent_dim=2), random_images(3, architecture)
    prefix = "encoder_fc" if architecture is VAE else "fc"
    model.get_parameter(f"{prefix}_logvar.bias").data = torch.tensor([-1e6, 1e6])
    assert torch.equal(model.encode(x)[1], torch.tensor([[-10.0, 10.0]]).expand(3, 2))
    model.loss(x, None, beta=0.0)[0].backward()  # of recon, which knows the encoder by z alone
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.get_parameter(f"{prefix}_mu.weight").grad.any()
