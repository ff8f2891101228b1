"""Attacks and their losses as written in the papers, for one image at a time, in float64 and without vectors."""

from __future__ import annotations

import math

import torch

from support.reference import ascended, floats, projected, shaped


def _plain(value):
    return float(value.detach())


def loss_of(name, logits, label, target=None):
    """Return a loss of one image from its logits, a list of tensors without dimensions."""
    others = [z for j, z in enumerate(logits) if j != label]
    ordered = sorted(logits, key=_plain, reverse=True)
    if name == "cross_entropy":
        log_sum = torch.stack(list(logits)).logsumexp(0)
        return log_sum - logits[label] if target is None else logits[target] - log_sum
    rise = max(others, key=_plain) - logits[label] if target is None else logits[target] - logits[label]
    if name == "margin":
        return rise
    if target is None:
        return rise / (ordered[0] - ordered[2] + 1e-12)  # as in the published code
    return rise / (ordered[0] - (ordered[2] + ordered[3]) / 2 + 1e-12)


def slope(network, image, loss):
    """Return the loss of an image, ``(1, …)``, and its gradient as a list of numbers."""
    inside = image.detach().clone().requires_grad_(True)
    value = loss(list(network(inside)[0]))
    (gradient,) = torch.autograd.grad(value, inside)
    return _plain(value), floats(gradient)


def auto_pgd(network, image, norm, eps, steps, box, start, loss):
    """Yield the points of APGD (Croce and Hein 2020, algorithm 1), from a start, as lists of numbers."""
    original, point = floats(image), floats(start)
    size, rises, window, since = 2 * eps, 0, max(int(0.22 * steps), 1), 0
    halved = True
    value, gradient = slope(network, shaped(point, image), loss)
    best = point, value, gradient
    at_check, before = value, point
    yield point
    for step in range(steps):
        ahead = projected(ascended(point, gradient, norm, size), original, norm, eps, box)
        share = 1.0 if step == 0 else 0.75
        mixed = [x + share * (z - x) + (1 - share) * (x - b) for x, z, b in zip(point, ahead, before, strict=True)]
        before, point = point, projected(mixed, original, norm, eps, box)
        yield point
        last = value
        value, gradient = slope(network, shaped(point, image), loss)
        rises, since = rises + (value > last), since + 1
        if value > best[1]:
            best = point, value, gradient
        if since == window:
            halve = rises <= 0.75 * window or (not halved and at_check >= best[1])
            if halve:
                size /= 2
                point, gradient = best[0], best[2]
            halved, at_check, rises, since = halve, best[1], 0, 0
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))


def squares(network, image, label, eps, steps, box, share, uniforms):
    """Yield the points of the square attack in l∞ (Andriushchenko et al. 2020), of random numbers by query."""
    channels, height, width = image.shape
    original = floats(image)

    def clipped(values):
        return projected(values, original, "linf", eps, box)

    def rise(values):
        logits = list(network(shaped(values, image))[0])
        return _plain(loss_of("margin", logits, label))

    def index(c, i, j):
        return (c * height + i) * width + j

    drawn = uniforms(0, channels * width)
    point = list(original)
    for c in range(channels):
        for j in range(width):
            sign = -1.0 if drawn[c * width + j] < 0.5 else 1.0
            for i in range(height):
                point[index(c, i, j)] += sign * eps
    best, highest = None, -math.inf
    point = clipped(point)
    yield point
    for step in range(steps):
        if rise(point) > highest:
            best, highest = point, rise(point)
        query = step * 10_000 // steps
        halvings = sum(query > limit for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = min(max(round(math.sqrt(share * height * width / 2**halvings)), 1), height, width)
        drawn = uniforms(step + 1, 2 + channels)
        top, left = int(drawn[0] * (height - side)), int(drawn[1] * (width - side))
        point = list(best)
        for c in range(channels):
            sign = -1.0 if drawn[2 + c] < 0.5 else 1.0
            for i in range(top, top + side):
                for j in range(left, left + side):
                    point[index(c, i, j)] += sign * 2 * eps
        point = clipped(point)
        yield point
