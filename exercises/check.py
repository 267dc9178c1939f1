"""Check a workbook: is each step right, and if not, which slip was it?

    python exercises/check.py                      exercises/workbook.py
    python exercises/check.py my_answers.py        a copy of it
    python exercises/check.py --no-reward          without the training at the end

What is asked of each step, and the slips that are known by name, stand in slips.py.
"""

import contextlib
import faulthandler
import io
import linecache
import signal
import sys
import textwrap
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import run, train
from slips import STEPS
from torch import Tensor

import vae
from data import Batches, UserError, load_dataset
from viz import save_tiles

LIMIT, REWARD_LIMIT = 10, 20  # seconds: for a step, and for the learner's training
IMAGES, EPOCHS, PICTURE = 20_000, 5, Path("runs/workbook/digits.png")
REWARDED = {"reparameterize", "kl_divergence_gaussian", "bce_from_logits", "vae_loss", "VAE",
            "train_step"}


class TooLong(BaseException):
    """No Exception, which a learner's own code might catch."""


CRASHES = (Exception, SystemExit, TooLong)  # but not Ctrl-C


@contextlib.contextmanager
def guest(seconds: int) -> Iterator[None]:
    """For a learner's code: it is not heard, and does not stay for ever."""
    def ring(*_) -> None:
        raise TooLong(f"no end after {seconds} s")

    # The last resort: Python hears no signal inside a loop in C, and on Windows there is none.
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    if alarm := hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            yield
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def own_frames(error: BaseException) -> list[tuple]:
    """Of the traceback the learner's own frames: the code and the line."""
    return [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__") == "answers"]


def describe(error: BaseException) -> str:
    """The error, and the last two of the learner's own lines that led to it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for code, line in own_frames(error)[-2:]:
        text += f", line {line}: `{linecache.getline(code.co_filename, line).strip()}`"
    return text


def load(path: Path) -> types.ModuleType:
    """The learner's file, executed as a module."""
    answers, source = types.ModuleType("answers"), path.read_bytes()
    linecache.checkcache()
    try:
        with guest(LIMIT):
            exec(compile(source, path, "exec"), vars(answers))
    except CRASHES as error:
        raise UserError(f"{path} does not run: {describe(error)}") from error
    return answers


def same(a: object, b: object, tolerance: float) -> bool:
    """Equal, or tensors of one shape with close values; all that is not finite is the same."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and a == b
    a, b = (part.detach().double().nan_to_num(9e9, 9e9, 9e9) for part in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, tolerance, tolerance)


def show(value: object) -> str:
    """A tensor by its first numbers, anything else as it is."""
    if not isinstance(value, Tensor):
        return str(value)[:200] + " (is there a return?)" * (str(value) == "None")
    numbers = ", ".join(f"{number:.4g}" for number in value.detach().flatten()[:4].tolist())
    return f"({numbers}{', ...' * (value.numel() > 4)}) of shape {tuple(value.shape)}"


def judge(step: Callable, answer: object) -> str:
    """passed, not yet, or what is wrong."""
    words = "when first used"
    torch.manual_seed(0)
    try:
        with guest(LIMIT):
            for words, ask, right, slips, tolerance in step(answer):
                came = ask()
                if not same(came, right, tolerance):
                    known = [slip for slip in slips if same(came, slips[slip], tolerance)]
                    unknown = f"{words}: expected {show(right)}, came {show(came)}"
                    return f"wrong: {[*known, unknown][0]}"
    except NotImplementedError as error:
        names = [f": {code.co_name}" for code, _ in own_frames(error)[-1:]]
        return "".join(["not yet", *names * isinstance(answer, type)])
    except CRASHES as error:
        return f"wrong: {words}: {describe(error)}"
    return "passed"


def check(answers: types.ModuleType) -> Iterator[tuple[str, str]]:
    """Every step and its verdict. What is not right is lent from vae.py to the steps after it."""
    for step in STEPS:
        name = step.__name__
        verdict = judge(step, vars(answers)[name]) if name in vars(answers) else "not yet"
        if verdict != "passed":
            setattr(answers, name, getattr(vae, name, None))
        yield name, verdict


# ------------------------------------------------------------------------------- the reward


def trained(build: Callable, step: Callable, batches: list, x: Tensor, seconds: float) -> tuple:
    """Train as many steps as there is time for: how many, the test loss in nats per image, and ten
    reconstructions and ten samples."""
    torch.manual_seed(0)
    model, end = build(), time.monotonic() + seconds
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    steps = [step(model, images, optimizer, 1.0) for images in batches if time.monotonic() < end]
    torch.manual_seed(0)
    with torch.no_grad():
        x_logits, mu, logvar = model(x)
        loss = vae.vae_loss(x_logits, x, mu, logvar)[0].item() / len(x)
        codes = torch.cat([mu[:10], torch.randn(10, mu.shape[1])])
        return len(steps), loss, model.decode_logits(codes).sigmoid().reshape(20, 1, 28, 28)


def reward(answers: types.ModuleType) -> None:
    """Train the learner's VAE by the learner's step, then vae.VAE for as many steps; draw both."""
    def lent_step(model, images, optimizer, beta):
        train.train_epoch(model, [(images, images)], optimizer, "cpu", beta)

    split, test = load_dataset("digits", train.find_data_dir(None))
    batches = [x for x, _ in Batches(split.images[:IMAGES], split.labels[:IMAGES], 128)] * EPOCHS
    x = test.images[:1000] / 255
    print("All that a VAE needs has passed. Now yours learns to draw digits ...", flush=True)
    try:
        with guest(2 * REWARD_LIMIT):
            n, loss, images = trained(answers.VAE, answers.train_step, batches, x, REWARD_LIMIT)
    except CRASHES as error:
        return print(f"... and stops: {describe(error)}")
    _, right, right_images = trained(vae.VAE, lent_step, batches[:n], x, float("inf"))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    labels = ["input", "yours", "yours, sampled", "vae.py", "vae.py, sampled"]
    save_tiles(torch.cat([x[:10], images, right_images]), 10, PICTURE, row_labels=labels)
    print(f"After {n} steps your test loss is {loss:.2f} nats per image, that of vae.py "
          f"{right:.2f}. What both make of it: {PICTURE}")


def main(argv: list[str] | None = None) -> None:
    parser = train.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: workbook.py",
                        default=Path(__file__).with_name("workbook.py"))
    parser.add_argument("--no-reward", action="store_true", help="do not train at the end")
    args = parser.parse_args(argv)
    answers, passed = load(args.file), set()
    for number, (name, verdict) in enumerate(check(answers), start=1):
        line = f"{number:2} {name}: {verdict}"
        print(textwrap.fill(line, 100, subsequent_indent=" " * 5), flush=True)
        passed |= {name} if verdict == "passed" else set()
    print(f"{len(passed)} of {len(STEPS)} steps have passed.")
    if REWARDED <= passed and not args.no_reward:
        reward(answers)


if __name__ == "__main__":
    torch.set_num_threads(1)  # with so little to compute, a second one mostly waits
    run(main)
