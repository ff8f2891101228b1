"""BIM and PGD compared with torchattacks and foolbox on a trained network: the same pixels, bit for bit.

Two details decide the last bits. The libraries project in two ways, which differ where adversarial - image is not
exact: torchattacks.BIM clips the image as the paper does, torchattacks.PGD and foolbox clip the perturbation. And
torchattacks averages the loss over the batch, which keeps the signs of gradients only if the batch size is a power of
two and no gradient is near the smallest positive number.
"""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_normgeo import ResNetClassifier
from lightning_normgeo.robustness import Ball, InputSpace, RobustnessEvaluator, RobustnessSettings, projected_gradient

EPS = [2 / 255, 4 / 255, 8 / 255]
IDS = ["2-255", "4-255", "8-255"]
STEPS = 10


class ByPerturbation(Ball):
    """The l∞ ball with the projection of torchattacks.PGD and foolbox."""

    def project(self, adversarial, images):
        return (images + (adversarial - images).clamp(-self.eps, self.eps)).clamp(self.lower, self.upper)


def pictures(n, seed):
    """Coarse patterns, one for each of 10 classes, of random contrast, with noise; clipped to black and white."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(10, (n,), generator=generator)
    shades = nn.functional.interpolate(patterns[labels] - 0.5, size=32, mode="bilinear")
    contrast = 0.1 + 0.7 * torch.rand(n, 1, 1, 1, generator=generator)
    noise = 0.25 * torch.randn(shades.shape, generator=generator)
    return (0.5 + contrast * shades + noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def trained():
    """A ResNet-18 without its last and largest stage after a few steps, and images it has not seen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ResNetClassifier(num_classes=10, arch="resnet18", stem="imagenet")
        net.model.layer4, net.model.fc = nn.Identity(), nn.Linear(256, 10)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        x, y = pictures(32 * 40, seed=1)
        for images, labels in zip(x.split(32), y.split(32), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels, label_smoothing=0.2).backward()
            optimizer.step()
    net.eval().requires_grad_(False)
    images, labels = pictures(8, seed=2)
    with torch.no_grad():
        correct = int((net(images).argmax(1) == labels).sum())
    assert correct >= 5, "there is something to attack"
    return SimpleNamespace(net=net, images=images, labels=labels, correct=correct)


@pytest.fixture(scope="module")
def torchattacks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchattacks

        return torchattacks


@pytest.fixture(scope="module")
def foolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("foolbox")


def attacked(trained, eps, ball=Ball, start=None):
    return projected_gradient(
        trained.net, trained.images, trained.labels, ball("linf", eps, 0.0, 1.0), eps / 4, STEPS, start
    )


def accuracy(trained, images):
    with torch.no_grad():
        return int((trained.net(images).argmax(1) == trained.labels).sum())


def loss(trained, images):
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(trained.net(images), trained.labels))


@pytest.mark.parametrize("eps", EPS, ids=IDS)
def test_bim_equals_torchattacks_bim(eps, trained, torchattacks):
    ours = attacked(trained, eps)
    theirs = torchattacks.BIM(trained.net, eps=eps, alpha=eps / 4, steps=STEPS)(trained.images, trained.labels)
    assert torch.equal(ours, theirs)
    assert (ours - trained.images).abs().max() == pytest.approx(eps, abs=1e-6)
    assert loss(trained, ours) > loss(trained, trained.images)


@pytest.mark.parametrize("eps", EPS, ids=IDS)
def test_pgd_from_the_same_start_equals_torchattacks_pgd_but_for_its_projection(eps, trained, torchattacks):
    torch.manual_seed(5)
    start = (trained.images + torch.empty_like(trained.images).uniform_(-eps, eps)).clamp(0, 1)
    for begin, random_start in ((None, False), (start, True)):
        torch.manual_seed(5)
        attack = torchattacks.PGD(trained.net, eps=eps, alpha=eps / 4, steps=STEPS, random_start=random_start)
        theirs = attack(trained.images, trained.labels)
        assert torch.equal(attacked(trained, eps, ByPerturbation, begin), theirs)
    last_bits(trained, attacked(trained, eps, Ball, start), theirs)


@pytest.mark.parametrize("eps", EPS, ids=IDS)
def test_bim_equals_foolbox_but_for_its_projection(eps, trained, foolbox):
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=eps / 4, steps=STEPS, random_start=False)
    model = foolbox.PyTorchModel(trained.net, bounds=(0, 1))
    _, theirs, broken = attack(model, trained.images, trained.labels, epsilons=eps)
    assert torch.equal(attacked(trained, eps, ByPerturbation), theirs)
    last_bits(trained, attacked(trained, eps), theirs)
    assert accuracy(trained, theirs) == int((~broken).sum())


def last_bits(trained, ours, theirs):
    """Few pixels differ, by the rounding of a number below 1, and no per-sample result does."""
    differing = (ours != theirs).double().mean().item()
    assert differing < 0.005
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-24)
    assert accuracy(trained, ours) == accuracy(trained, theirs)


def test_l2_equals_torchattacks_up_to_rounding_in_float64(trained, torchattacks):
    """In float32, where the length of a step is rounded, differences grow from step to step."""
    net = copy.deepcopy(trained.net).double()
    images, labels = trained.images[:4].double(), trained.labels[:4]
    ours = projected_gradient(net, images, labels, Ball("l2", 0.5, 0.0, 1.0), 0.125, STEPS)
    attack = torchattacks.PGDL2(net, eps=0.5, alpha=0.125, steps=STEPS, random_start=False, eps_for_division=0.0)
    torch.testing.assert_close(ours, attack(images, labels), rtol=0, atol=1e-9)
    assert 0.4 < (ours - images).flatten(1).norm(dim=1).max() <= 0.5 + 1e-9


def test_the_evaluator_attacks_with_the_same_pixels(trained, torchattacks):
    """It takes the first gradient from the clean pass."""
    settings = RobustnessSettings(attacks=["bim"], fold=False, batch_size=4)
    inputs = InputSpace(None, None, normalized_data=False)
    evaluator = RobustnessEvaluator(trained.net, inputs, settings, trained.net, num_images=8)
    evaluator.put(trained.images, trained.labels, range(8))
    decisions = evaluator.finish()
    attack = torchattacks.BIM(trained.net, eps=8 / 255, alpha=2 / 255, steps=STEPS)
    halves = zip(trained.images.split(4), trained.labels.split(4), strict=True)
    theirs = torch.cat([attack(images, labels) for images, labels in halves])
    shown = evaluator.shown.pixels["bim"]
    assert torch.equal(torch.stack([shown[i] for i in range(8)]), theirs)
    assert int(decisions.of("clean").correct.sum()) == trained.correct
    assert int(decisions.of("bim").correct.sum()) == accuracy(trained, theirs)
