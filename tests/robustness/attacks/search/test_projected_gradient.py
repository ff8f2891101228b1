"""BIM and Gaussian noise: closed forms, an explicit reference, a second library, and invariants.

Both balls, l2 and random starts are in ``test_balls.py``.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_normgeo.robustness import bim_linf, gaussian_noise
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import NOISE
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from support import random_twin
from support import reference as ref
from support.small_classifiers import conv_net, draw, pixels, two_classes

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)


# --- BIM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 0.01, 0.3])
def test_bim_reaches_the_corner_of_the_ball_on_a_linear_model(eps, label):
    w, x = draw(12), 0.35 + 0.3 * pixels(5, 3, 2, 2)
    direction = w.sign().reshape(3, 2, 2) * (1 if label == 0 else -1)
    adversarial = bim_linf(two_classes(w), x, torch.full((5,), label), eps, max(eps / 3, 0.01), 4, 0.0, 1.0)
    assert torch.equal(adversarial, torch.where(direction > 0, x + eps, x - eps))


def test_bim_stops_short_of_the_corner_after_few_steps_and_at_the_box():
    w = torch.tensor([1.0, -2, 0.5, 0], dtype=torch.float64)
    x = torch.tensor([[0.5, 0.5, 0.95, 0.2]], dtype=torch.float64)
    adversarial = bim_linf(two_classes(w), x, torch.tensor([0]), 0.3, 0.05, 3, 0.0, 1.0)
    assert adversarial[0].tolist() == pytest.approx([0.65, 0.35, 1.0, 0.2], rel=1e-14)
    assert x.tolist() == [[0.5, 0.5, 0.95, 0.2]], "the originals stay"


@PROPERTY
@given(
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0, 0.7),
    st.floats(0, 0.5),
    st.integers(1, 4),
    st.sampled_from([(0.0, 1.0), (-0.5, 1.5), (0.2, 0.8)]),
)
def test_bim_never_leaves_the_box_nor_the_ball_inside_it(seed, dtype, eps, step_size, steps, box):
    x, w = pixels(3, 2, 2, seed=seed, dtype=dtype), draw(4, 3, seed=seed, dtype=dtype)
    labels = torch.tensor([0, 1, 2])
    adversarial = bim_linf(lambda z: z.flatten(1).tanh() @ w, x, labels, eps, step_size, steps, *box)
    assert adversarial.dtype == dtype
    assert box[0] <= adversarial.min()
    assert adversarial.max() <= box[1]
    nearest = x.clamp(*box)  # if the box is tighter than the ball, the distance to the box counts
    slack = 2 * torch.finfo(dtype).eps
    assert ((adversarial - nearest).abs() <= eps + slack).all()


@pytest.mark.parametrize("eps", [2 / 255, 8 / 255])
def test_bim_equals_an_explicit_loop_with_one_gradient_per_image(eps):
    net, x, labels = conv_net(dtype=torch.float64), pixels(3, 3, 8, 8), torch.tensor([0, 4, 2])
    adversarial = bim_linf(net, x, labels, eps, eps / 4, 6, 0.0, 1.0)
    assert torch.equal(adversarial, ref.bim(net, x, labels, eps, eps / 4, 6, 0.0, 1.0))
    assert not torch.equal(adversarial, bim_linf(net, x, labels, eps, eps / 4, 5, 0.0, 1.0))


@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.3], ids=["1-255", "8-255", "0.3"])
def test_bim_equals_torchattacks_per_pixel(eps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchattacks

        net, x, labels = conv_net(), pixels(8, 3, 8, 8, dtype=torch.float32), torch.arange(8) % 5
        theirs = torchattacks.BIM(net, eps=eps, alpha=eps / 4, steps=10)(x, labels)
    ours = bim_linf(net, x, labels, eps, eps / 4, 10, 0.0, 1.0)
    assert torch.equal(ours, theirs)
    assert (ours - x).abs().max() == pytest.approx(eps, abs=1e-6)


def test_bim_raises_the_loss_more_with_a_larger_ball():
    net, x, labels = conv_net(), pixels(16, 3, 8, 8, dtype=torch.float32), torch.arange(16) % 5
    losses = []
    for eps in (0.0, 1 / 255, 8 / 255, 32 / 255):
        adversarial = bim_linf(net, x, labels, eps, eps / 4, 10, 0.0, 1.0)
        losses.append(nn.functional.cross_entropy(net(adversarial), labels).item())
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.1


def test_bim_moves_a_confident_sample_in_a_batch_of_any_size():
    """The gradient of a sample is e⁻¹⁰⁰, which an average over the batch would round to zero."""
    w = torch.full((4,), -50.0)
    x = torch.full((512, 4), 0.5)
    for size in (1, 512):
        adversarial = bim_linf(two_classes(w), x[:size], torch.zeros(size).long(), 0.1, 0.1, 1, 0.0, 1.0)
        assert (adversarial < 0.45).all()


def test_bim_touches_no_gradient_and_no_sample_depends_on_another():
    net, x, labels = conv_net(), pixels(4, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 1, 2, 3])
    net[1].weight.grad = torch.full_like(net[1].weight, 7.0)
    with torch.no_grad():
        together = bim_linf(net, x, labels, 0.1, 0.02, 5, 0.0, 1.0)
    alone = torch.cat([bim_linf(net, x[i : i + 1], labels[i : i + 1], 0.1, 0.02, 5, 0.0, 1.0) for i in range(4)])
    assert torch.equal(together, alone)
    assert (net[1].weight.grad == 7).all()
    assert all(p.grad is None for p in net.parameters() if p is not net[1].weight)
    assert not together.requires_grad
    assert not x.requires_grad


def test_bim_works_on_copies_of_tensors_of_inference_mode():
    """In Trainer.test a loader's batches are inference tensors."""
    net, x, labels = conv_net(), pixels(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 1])
    expected = bim_linf(net, x, labels, 0.1, 0.05, 2, 0.0, 1.0)
    with torch.inference_mode():
        batch = x + 0, labels + 0
        with preserved_state(net):
            adversarial = bim_linf(net, *(tensor.clone() for tensor in batch), 0.1, 0.05, 2, 0.0, 1.0)
    assert torch.equal(adversarial, expected)


# --- noise ------------------------------------------------------------------------------------------------------------


def _noise(samples, count):
    """The noise that every device gives, of numpy, made one by one of Philox's words."""
    rows = [random_twin.normals(random_twin.words(3, sample, NOISE, count)) for sample in range(samples)]
    return torch.from_numpy(np.stack(rows))


def test_noise_depends_on_seed_and_sample_alone():
    """It does not depend on the batch, its order, its dtype or the global random state, which stays unchanged."""
    x = pixels(6, 3, 4, 4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = gaussian_noise(x, 0.1, 3, range(6))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    order = [4, 0, 5]
    assert torch.equal(gaussian_noise(x[order], 0.1, 3, order), whole[order])
    assert torch.equal(gaussian_noise(x[2:3], 0.1, 3, [2]), whole[2:3])
    assert torch.equal(gaussian_noise(x, 0.1, 3, torch.arange(6)), whole)
    assert torch.equal(gaussian_noise(x.float(), 0.1, 3, range(6)), (x.float() + 0.1 * _noise(6, 48).view(x.shape)))
    assert torch.equal(whole, x + 0.1 * _noise(6, 48).double().view(x.shape))
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(gaussian_noise(last, 0.1, 3, range(6)), whole)
    assert not torch.allclose(gaussian_noise(x, 0.1, 4, range(6)), whole, atol=0.01)


def test_noise_of_different_samples_and_seeds_is_independent():
    zeros = torch.zeros(200, 400)
    noise = torch.cat([gaussian_noise(zeros, 1.0, seed, range(200)) for seed in (0, 1, 2)])
    correlation = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(400)


@pytest.mark.parametrize("std", [0.05, 0.25, 1.0])
def test_noise_is_white_with_the_given_standard_deviation(std):
    images = torch.full((50, 1000), 0.5, dtype=torch.float64)
    noise = gaussian_noise(images, std, 0, range(50)) - 0.5
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 * std / math.sqrt(n)
    assert abs(noise.std().item() - std) < 5 * std / math.sqrt(2 * n)
    assert abs((noise / std).pow(4).mean().item() - 3) < 5 * math.sqrt(96 / n)
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean().item() / std**2
    assert abs(neighbours) < 5 / math.sqrt(n)


def test_noise_is_clipped_only_when_bounds_are_given():
    x = pixels(4, 100)
    free, clipped = (gaussian_noise(x, 0.5, 0, range(4), bounds) for bounds in (None, (0.0, 1.0)))
    assert free.min() < 0
    assert free.max() > 1
    assert torch.equal(clipped, free.clamp(0, 1))
    assert torch.equal(gaussian_noise(x, 0.0, 0, range(4)), x)
    assert gaussian_noise(x[:0], 0.5, 0, []).shape == (0, 100)
