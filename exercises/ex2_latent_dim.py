"""Exercise 2: what does the size of the latent space do to reconstructions and to samples?

    python exercises/ex2_latent_dim.py                    MNIST
    python exercises/ex2_latent_dim.py --dataset digits   no download

More latents can carry more of an image, so reconstructions should improve until nothing is left
that is worth its KL. Samples are another matter. A classifier that was trained on the same
images looks at them: are they like real ones (its confidence; precision), and is every kind of
real image among them (entropy of the classes; recall, coverage)? Precision and recall are those of
Kynkaanniemi et al. (2019), coverage is of Naeem et al. (2020), all in the classifier's features.
"""

import torch
from common import RESULTS, last_test, load_images, parse_args, plot_measures
from common import report, run, trained
from metrics import active_units, sample_quality, train_classifier

from data import Batches
from viz import encode_all, save_tiles

LATENT_DIMS = (2, 10, 20, 50, 100)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, "ex2_latent_dim", __doc__, ("mnist", "digits", "fashion-mnist"))
    _, test = load_images(args)
    classifier, accuracy = train_classifier(args)
    test_loader = Batches(test.images, test.labels, 1000)
    # MNIST's test set is not in random order, so every other image; the rest is the reference.
    real, others = test.images[::2] / 255, test.images[1::2] / 255
    rows, pictures = [], []
    for latent_dim in LATENT_DIMS:
        for seed in args.seeds:
            model, history = trained(args, seed, latent_dim=latent_dim)
            mu, _, _ = encode_all(model, test_loader, "cpu")
            row = {"latent_dim": latent_dim, "seed": seed} | last_test(history)
            row["active units"] = active_units(mu)
            torch.manual_seed(seed)
            samples = model.sample(len(real))
            rows.append(row | sample_quality(classifier, samples, real))
            if seed == args.seeds[0]:
                pictures.append(samples[:16])
    # What the measures say of images that are real, but not the same: the best to hope for.
    reference = sample_quality(classifier, others, real)
    measures = {
        "recon and KL, nats": ["recon", "KL"],
        "realism": ["confidence", "precision"],
        "diversity": ["recall", "coverage"],
        "class entropy, nats": ["class entropy"],
    }
    plot_measures(rows, "latent_dim", measures, RESULTS / f"{args.name}.png")
    save_tiles(
        torch.cat(pictures), 16, RESULTS / f"{args.name}-samples.png",
        row_labels=[f"{latent_dim} latents" for latent_dim in LATENT_DIMS],
    )
    formats = {"recon + KL": ".2f", "recon": ".2f", "KL": ".2f", "active units": ".1f"}
    formats |= dict.fromkeys(reference, ".3f")
    more = {"classifier_accuracy": accuracy, "other_test_images": reference}
    report(args, rows, "latent_dim", formats, **more)
    print("other test images:", ", ".join(f"{key} {value:.3f}" for key, value in reference.items()))
    print(f"the classifier is right on {accuracy:.2%} of the test images")


if __name__ == "__main__":
    run(main)
