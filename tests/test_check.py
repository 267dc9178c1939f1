"""The workbook and its checker: slips are named, right answers pass, nothing hangs or crashes."""

import re
from pathlib import Path

import check
import data
import draw
import pytest
import slips
from conftest import assert_user_error, run_here

# The project's own functions as answers, in the workbook's form.
RIGHT = """
import train
from torch import randn, randn_like
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy as bce
from train import kl_weight
from ex3_conditional_vae import *
from ex6_likelihood import *
from vae import *
import vae
def train_step(model, images, optimizer, beta):
    return train.train_epoch(model, [(images, images)], optimizer, "cpu", beta)[0]
class CVAE(ConditionalVAE):
    to_x = to_z = staticmethod(one_hot)
    def encode(self, x, y): return super().encode(x, self.to_x(y))
    def decode_logits(self, z, y): return super().decode_logits(join(z, self.to_z(y)))
    def forward(self, x, y):
        q = self.encode(x, y)
        return self.decode_logits(self.reparameterize(*q), y), *q
Right, old = CVAE, ConvVAE.decode_logits
def heads(s, h): return s.encoder_fc_mu(h), s.encoder_fc_logvar(h)
def sum_(each): return each.flatten(1).sum(1)
"""
# How answers begin; what they return, or the rest of a class, follows.
START = {step: f"{head}:\n {body}" for step, head, body in (
    ("draw", "def reparameterize(mu, logvar)", "std = (0.5 * logvar).exp()\n return "),
    ("kl", "def kl_divergence_gaussian(mu, v)", "return "),
    ("bce", "def bce_from_logits(l, x)", "x = x.view_as(l); p = l.sigmoid(); each = "
     "F.binary_cross_entropy_with_logits(l, x, reduction='none')\n return "),
    ("error", "def squared_error(l, x)", "x = x.view_as(l); each = (x - l.sigmoid())**2\n return "),
    ("loss", "def vae_loss(l, x, mu, v, beta=1.0)", "r = bce_from_logits(l, x).sum(); "
     "kl = kl_divergence_gaussian(mu, v).sum()\n return "),
    ("step", "def train_step(model, images, optimizer, beta)", "l, mu, v = model(images); n = "
     "len(images); z = optimizer.zero_grad; s = optimizer.step\n"
     " def loss(*b): return vae_loss(l, images, mu, v, *b)[0]\n "),
    ("weight", "def kl_weight(epoch, n)", "return "), ("VAE", "class VAE(vae.VAE)", ""),
    ("bound", "def importance_weighted_bound(w)", "return "), ("CVAE", "class CVAE(Right)", ""),
    ("Conv", "class ConvVAE(vae.ConvVAE)", ""))}
SLIPS = """
draw | mu | no new noise || (torch.manual_seed(1), mu + std * randn(mu.shape))[1] | no new noise
draw | mu + logvar.exp() * randn_like(mu) | variance for standard deviation
draw | mu + (0.5 * std).exp() * randn_like(mu) | exp(0.5 logvar) used twice
draw | mu + logvar * randn_like(mu) | logvar for standard deviation
draw | mu + randn_like(mu) | sigma left out || (mu + std * randn_like(mu)).detach() | no gradient
draw | mu + std * torch.rand_like(mu) | uniform noise || torch.normal(mu, std) | no gradient
draw | mu + std * randn(mu.shape[1]) | one epsilon for the whole batch
draw | mu + std * randn(len(mu), 1) | one epsilon for all latents
draw | mu + std.detach() * randn_like(mu) | no gradient for logvar
kl | 0.5 * (1 + v - mu**2 - v.exp()).sum(1) | the KL's sign
kl | -0.5 * torch.mean(1 + v - mu**2 - v.exp(), dim=1) | averaged over the latents
kl | -0.5 * torch.sum(1 + v - mu**2 - v.exp()) | one number for the batch
kl | (mu**2 + v.exp() - 1 - v).sum(1) | the factor 1/2 is missing
kl | -0.5 * (1 + v - mu**2 - (v / 2).exp()).sum(1) | sigma for sigma^2
kl | -0.5 * (1 + v - mu**2 - v.exp() ** 2).sum(1) | sigma^4 for sigma^2
kl | torch.tensor(vae.kl_divergence_gaussian(mu, v).tolist()) | the gradient is lost
bce | sum_(-x * p.log() - (1 - x) * (1 - p).log()) | BCE through the sigmoid
bce | sum_(-x * (p + 1e-7).log() - (1 - x) * (1 - p + 1e-7).log()) | BCE through sigmoid + epsilon
bce | sum_(bce(p, x, reduction='none')) | BCE through F.binary_cross_entropy
bce | sum_(x * (1 + (-l).exp()).log() + (1 - x) * (1 + l.exp()).log()) | exp overflows
bce | sum_(bce(l, x, reduction='none')) | logits taken for probabilities
bce | vae.bce_from_logits(p, x) | the sigmoid taken twice
error | sum_((l - x) ** 2) | logits compared with pixels
both | each.flatten(1).mean(1) | averaged over the pixels ("beta = 784") || -sum_(each) | the sign
both | each.mean() | averaged over all
both | each.sum() | one number for the batch || sum_(each.detach()) | the gradient is lost
loss | -(r + beta * kl), r, kl | the total called the ELBO || r - beta * kl, r, kl | KL subtracted
loss | beta * r + kl, r, kl | beta on the wrong term
loss | r + kl, r, kl | beta left out || r + beta * kl, r, beta * kl | kl returned with its weight
loss | (r + beta * kl) / len(x), r / len(x), kl / len(x) | averaged over the batch
loss | r / 5 + beta * kl, r / 5, kl | recon averaged over the pixels ("beta = 784")
loss | r / l.numel() + beta * kl, r / l.numel(), kl | recon averaged over pixels and images
loss | (r + beta * kl).detach(), r, kl | the gradient is lost
step | m = loss(beta) / n; m.backward(); s(); return m.item() | no zero_grad
step | m = loss(beta) / n; z(); m.backward(); return m.item() | nothing is learned
step | m = loss(beta) / n; m.backward(); z(); s(); return m.item() | nothing is learned
step | m = loss(beta); z(); m.backward(); s(); return m.item() | the sum for the mean
step | m = loss(); m.backward(); s(); return m | the sum for the mean, and beta left out
step | m = loss() / n; z(); m.backward(); s(); return m.item() | beta left out
step | m = loss(beta) / n; z(); m.backward(); s(); return m | the loss returned with its graph
weight | min(1, (epoch - 1) / n) if n else 1 | a weight that starts at 0
weight | min(1, (epoch - 1) / (n - 1)) if n > 1 else 1 | a weight from 0 to 1
weight | epoch / n if n else 1 | a weight beyond 1
bound | w.logsumexp(0) | without -log k
bound | w.mean(0) | the mean of the logarithms || w.exp().mean(0).log() | exp overflows
bound | (w.logsumexp(0) - math.log(len(w))).detach() | the gradient is lost
CVAE | to_x = staticmethod(lambda y: 0 * one_hot(y)) | the label given to the decoder only
CVAE | to_z = staticmethod(lambda y: 0 * one_hot(y)) | the label given to the encoder only
CVAE | to_z = staticmethod(lambda y: y[:, None] / 9 * torch.ones(10)) | the label as a number
Conv | def decode_logits(s, z): s.decoder_conv[0].output_padding = 0, 0; return old(s, z) | 24 x 24
"""
FORWARD = "def forward(s, x, *y):\n  mu, v = s.encode(x, *y)\n  return s.decode_logits"
ENCODE = "def encode(s, i, *y):\n  mu, logvar = super().encode(i, *y); o = "
PARTS = {"mu": ENCODE + "mu\n  return {}, logvar", "logvar": ENCODE + "logvar\n  return mu, {}",
         "decode_logits":
         "def decode_logits(s, i, *y):\n  o = super().decode_logits(i, *y)\n  return {}"}
CHANGES = {"through a sigmoid": "o.sigmoid()", "never negative": "o.relu()",
           "without ReLU": "i.flatten(1)[:, 0].view(-1, *[1] * (o.dim() - 1)) + 0 * o"}
UNUSUAL = """
draw | Normal(mu, std).rsample() || torch.stack([m + s * randn(s.shape) for m, s in zip(mu, std)])
kl | kl_divergence(Normal(mu, (v / 2).exp()), Normal(0, 1)).sum(-1)
kl | torch.stack([sum((a * a + b.exp() - 1 - b) / 2 for a, b in zip(*q)) for q in zip(mu, v)])
kl | (mu.double() ** 2 / 2 + (v.double().exp() - 1 - v.double()) / 2).sum(1)
bce | sum_(-x * F.logsigmoid(l) - (1 - x) * F.logsigmoid(-l))
bce | sum_((l.clamp(min=0) - x * l + (1 + (-l.abs()).exp()).log()).double())
both | each.reshape(len(l), -1).permute(1, 0).sum(0)
error | (l.sigmoid() - x).flatten(1).norm(dim=1) ** 2
loss | [r + beta * kl.double(), r, kl]
step | m = loss(beta) / n; m.backward(); s(); z(); return m.detach()
step | m = loss(beta) / n; model.zero_grad(); m.backward(); s(); return float(m.detach())
step | images = images.flatten(1); m = loss(beta) / n; z(); m.backward(); s(); return m.item()
weight | torch.tensor(1.0 if epoch >= n else epoch / n)
bound | (w - w.max(0).values).exp().mean(0).log() + w.max(0).values
bound | torch.stack([torch.logsumexp(a, 0) for a in w.double().T]) - math.log(len(w))
CVAE | to_x = to_z = staticmethod(lambda y: torch.eye(10)[y])
VAE | encode = lambda s, x: heads(s, s.encoder_fc1(x.view(len(x), -1)).clamp(min=0))
Conv | decode_logits = lambda s, z: F.interpolate(old(s, z)[..., 4:-4, 4:-4], (28, 28))
"""
BROKEN = {  # what is written in place of the KL, and what the verdict must hold
    "return": r"came None \(is there a return\?\)",
    "return mu": r"random mu.*: expected \(.*\) of shape \(5,\), came \(.*\) of shape \(5, 3\)",
    "return nn.Linear(2, 2)(mu)": r"RuntimeError: .*, line \d+: `return nn.Linear\(2, 2\)\(mu\)`$",
    "return kl_divergence_gaussian(mu, v)": "RecursionError",
    "exit(3)": r"SystemExit: 3, line \d+: `exit\(3\)`",
    "while True: print('noise')": r"TooLong: no end after 0.2 s, line \d+: `while True",
    "raise NotImplementedError": "not yet",
}


def cases(text: str) -> list:
    """step | what is written | the slip's name || the same again, for the same step"""
    found = []
    for step, rows in (line.split(" | ", 1) for line in text.strip().splitlines()):
        for step in ("bce", "error") if step == "both" else (step,):
            for code, *name in (row.split(" | ") for row in rows.split(" || ")):
                found.append((START[step] + code, *name))
    return found


SLIPS = cases(SLIPS)
for begin in (START["VAE"], START["CVAE"], START["Conv"]):
    SLIPS += [(begin + part.format(change), f"{name} {slip}") for slip, change in CHANGES.items()
              for name, part in PARTS.items() if name == "decode_logits" or "Conv" not in begin]
    if "Conv" not in begin:
        SLIPS += [(begin + FORWARD + "(mu, *y), mu, v", "z = mu in training"),
                  (begin + FORWARD + "(reparameterize(mu, v), *y).sigmoid(), mu, v",
                   "forward returns probabilities")]


def load(folder: Path, source: str):
    (folder / "answers.py").write_text(RIGHT + source)
    return check.load(folder / "answers.py")


def step_of(source: str) -> str:
    return re.match(r"(?:def|class) (\w+)", source)[1]


def judge(folder: Path, source: str) -> str:
    step = step_of(source)
    return check.judge(getattr(slips, step), getattr(load(folder, source), step))


@pytest.mark.parametrize(("source", "name"), SLIPS)
def test_every_slip_is_recognised_by_its_name(tmp_path, source, name):
    assert judge(tmp_path, source).startswith(f"wrong: {name}: ")


def test_the_slips_above_are_all_that_the_checker_knows(tmp_path):
    answers, known = load(tmp_path, ""), set()
    for step in slips.STEPS:
        for fact in step(getattr(answers, step.__name__)):
            fact.ask()
            known |= {(step.__name__, slip.split(": ")[0]) for slip in fact.slips}
    assert known == {(step_of(source), name) for source, name in SLIPS}


@pytest.mark.parametrize("source", [source for source, in cases(UNUSUAL)])
def test_right_but_unusual_answers_pass(tmp_path, source):
    assert judge(tmp_path, source) == "passed"


def test_of_a_wrong_answer_without_a_name_the_property_is_reported(tmp_path):
    source = START["VAE"] + FORWARD + "(mu + 0.8 * (v / 2).exp() * randn_like(v)), mu, v"
    assert re.match(r"wrong: z ~ N.*: expected \(0, .*, came \(", judge(tmp_path, source))


@pytest.mark.parametrize("body", BROKEN)
def test_nothing_hangs_or_crashes_the_check_and_a_line_says_why(tmp_path, monkeypatch, capfd, body):
    monkeypatch.setattr(check, "LIMIT", 0.2)
    line = judge(tmp_path, START["kl"].replace("return ", body))
    assert re.search(BROKEN[body], line) and "\n" not in line
    assert capfd.readouterr() == ("", "")


def test_the_projects_own_functions_pass_and_draw(tmp_path, monkeypatch):
    load(tmp_path, "print('noise')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(check, "EPOCHS", 1)
    monkeypatch.setitem(data.DRAWN, "digits", (draw.draw_digits, 1000, 300))
    lines = run_here(check.main, "answers.py").stdout.splitlines()
    assert [line.split(": ")[1] for line in lines[:11]] == ["passed"] * 11
    mine, reference = re.findall(r"\d+\.\d\d", lines[-1])
    assert mine == reference and Path("runs/workbook/digits.png").stat().st_size > 1000


def test_what_is_not_there_or_wrong_does_not_spoil_other_steps(tmp_path):
    path, empty = tmp_path / "answers.py", Path(check.__file__).with_name("workbook.py").read_text()
    for source, passed in ((empty, 0), (empty + START["loss"] + "r + beta * kl, r, kl\n", 1),
                           (empty + START["kl"] + "-mu\n" + START["loss"] + "r + kl, r, kl\n", 0)):
        path.write_text(source)
        text = run_here(check.main, path).stdout
        assert f"{passed} of 11" in text and "VAE: not yet: encode" in text
    assert "vae_loss: wrong: beta left out" in text


@pytest.mark.parametrize("source", ["def f(:", "import nothing_such", "exit()", "\0", "1 / 0"])
def test_a_file_that_is_not_there_or_does_not_run_is_one_line(tmp_path, source):
    path = tmp_path / "answers.py"
    assert_user_error(run_here(check.main, path), "answers.py", "No such file")
    path.write_text(source)
    assert_user_error(run_here(check.main, path), "answers.py does not run")
