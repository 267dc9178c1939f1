# Every target sets itself up first: a virtual environment in .venv, once.

PYTHON ?= python3
RUN := .venv/bin/python
TRAIN := $(RUN) train.py --dataset mnist --fallback digits
SMALL := $(if $(QUICK),--dataset digits --epochs 1 --seeds 0 --limit 20000)

help:  ## list the targets (the default)
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

setup: .venv/ready  ## create .venv with the packages of requirements.txt

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	@touch $@

train-mnist: .venv/ready  ## the MLP VAE on MNIST, 10 epochs, with figures
	$(TRAIN) --model mlp

train-mnist-2d: .venv/ready  ## the same with two latents: scatter and manifold
	$(TRAIN) --model mlp --latent-dim 2

train-conv: .venv/ready  ## the convolutional VAE on MNIST, 10 epochs
	$(TRAIN) --model conv

train-celeba: .venv/ready  ## the VAE of 64 x 64 faces on CelebA, or on drawn ones
	$(RUN) train.py --model celeba --fallback faces --batch-size 32 --epochs 6

ae: .venv/ready  ## an autoencoder beside a VAE: what sampling needs
	$(RUN) exercises/ex0_autoencoder.py --dataset mnist --fallback digits

check: .venv/ready  ## mark your answers in exercises/workbook.py, step by step
	$(RUN) exercises/check.py

exercises: .venv/ready  ## solve the exercises: under an hour; with QUICK=1 a glance, small
	$(RUN) exercises/ex1_beta_vae.py $(SMALL)
	$(if $(QUICK),,$(RUN) exercises/ex1_beta_vae.py --dataset digits)
	$(if $(QUICK),,$(RUN) exercises/ex1_beta_vae.py --dataset faces --epochs 2)
	$(RUN) exercises/ex2_latent_dim.py $(SMALL)
	$(RUN) exercises/ex3_conditional_vae.py $(SMALL)
	$(RUN) exercises/ex4_mse_vs_bce.py $(SMALL)
	$(RUN) exercises/ex5_kl_annealing.py $(SMALL)

test: .venv/ready  ## the tests: offline, on the CPU (and on a GPU what needs one)
	$(RUN) -m pytest -q tests

torture: .venv/ready  ## attack files, downloads and runs: 4 minutes
	$(RUN) tests/torture.py

bench: .venv/ready  ## how fast it is, beside a plain loop and the bare products: 15 minutes
	$(RUN) tests/bench.py

clean:  ## remove .venv and caches; keeps data/ and runs/
	rm -rf .venv .pytest_cache .hypothesis __pycache__ */__pycache__

.PHONY: help setup train-mnist train-mnist-2d train-conv train-celeba ae check exercises test torture bench clean
