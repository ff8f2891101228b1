"""Slow reference code for more optimizers, from their papers: one weight as a list of numbers, terms and W⁺.

Like :mod:`reference`, which has the elementwise frame: each function takes (g̃, the memory of one element, flags),
updates the memory, and returns the step of that element per η, as a function of (gradient, momentum before).
"""

from __future__ import annotations

import math

from support import reference as ref


def sign(x):
    return (x > 0) - (x < 0)


def adadelta(full, memory, rho, eps):
    second = ref.moment(memory, "v", full**2, rho)
    scale = math.sqrt(memory["a"] + eps) / math.sqrt(second + eps)
    ref.moment(memory, "a", (full * scale) ** 2, rho)
    return lambda g, m: g * scale


def rprop(full, memory, lr, etas, sizes):
    """Return Rprop's step per η = 1, since its steps do not depend on η."""
    agrees = full * memory["g"]
    size = memory.get("size", lr) * (etas[1] if agrees > 0 else etas[0] if agrees < 0 else 1)
    memory["size"] = min(max(size, sizes[0]), sizes[1])
    memory["g"] = 0.0 if agrees < 0 else full
    return lambda g, m: memory["size"] * sign(g) if agrees >= 0 else 0.0


def sgdw(full, memory, momentum, dampening, nesterov):
    first = "b" not in memory
    share = 1 - dampening if momentum and not first else 1.0

    def buffer(g, m):
        return momentum * m + share * g

    def move(g, m):
        return (g + momentum * buffer(g, m)) if nesterov else buffer(g, m)

    memory["m"] = memory["b"] = buffer(full, memory["m"])
    return move


def nadamw(full, memory, betas, eps):
    (beta1, beta2), t = betas, memory["t"]
    divisor = math.sqrt(ref.moment(memory, "v", full**2, beta2) / (1 - beta2**t)) + eps
    ref.moment(memory, "m", full, beta1)
    return lambda g, m: (beta1 * (beta1 * m + (1 - beta1) * g) + (1 - beta1) * g) / (1 - beta1**t) / divisor


def ademamix(full, memory, betas, eps, alpha):
    """Return AdEMAMix's step, which is linear in (g, m₁, m₂); the pair (m₁, m₂) counts as one momentum."""
    (beta1, beta2, beta3), t = betas, memory["t"]
    divisor = math.sqrt(ref.moment(memory, "v", full**2, beta2) / (1 - beta2**t)) + eps
    late = memory["late"]
    ref.moment(memory, "late", full, beta3)
    ref.moment(memory, "m", full, beta1)

    def move(g, m):
        slow = late if m else 0.0
        fast = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
        return (fast + alpha * (beta3 * slow + (1 - beta3) * g)) / divisor

    return move


def adopt(full, memory, betas, eps, exponent):
    (beta1, beta2), t = betas, memory["t"]
    before = memory["v"]
    memory["v"] = full**2 if t == 1 else beta2 * before + (1 - beta2) * full**2
    if t == 1:
        return lambda g, m: 0.0
    scale, bound = max(math.sqrt(before), eps), (t - 1) ** exponent
    cut = min(1.0, bound / abs(full / scale)) if full else 1.0
    memory["m"] = beta1 * memory["m"] + (1 - beta1) * cut * full / scale
    return lambda g, m: beta1 * m + (1 - beta1) * cut * g / scale


# --- whole weights: what each step takes off, in parts ----------------------------------------------------------------


def norm(v):
    return math.sqrt(math.fsum(x * x for x in v))


def whole_terms(w, parts, shrink=1.0):
    """Return the terms and W⁺ of W⁺ = sW - Σ parts, with parts from the gradient, momentum and decay."""
    whole = [math.fsum(part) for part in zip(*parts, strict=True)]
    inner = [-2 * shrink * ref.dot(w, part) for part in parts]
    inner[2] += (shrink - 1) * (shrink + 1) * ref.dot(w, w)
    new = [shrink * x - u for x, u in zip(w, whole, strict=True)]
    return (*inner, ref.dot(whole, whole)), new


def masked(parts, gradient, count=False):
    """Return the parts of an update after a cautious optimizer's mask."""
    mask = [float(math.fsum(part) * g > 0) for *part, g in zip(*parts, gradient, strict=True)]
    scale = (sum(mask) + 1) / len(mask) if count else max(sum(mask) / len(mask), 1e-3)
    return [[x * m / scale for x, m in zip(part, mask, strict=True)] for part in parts]


def adam_parts(g, memory, betas, eps, t, averaging=True):
    """Return A = m̂/(√v̂ + ε) from the gradient and from the previous momentum; updates the memory."""
    beta1, beta2 = betas
    m, v = memory.get("m", [0.0] * len(g)), memory.get("v", [0.0] * len(g))
    share = 1 - beta1 if averaging else 1.0
    memory["v"] = [beta2 * y + (1 - beta2) * x * x for x, y in zip(g, v, strict=True)]
    memory["m"] = [beta1 * y + share * x for x, y in zip(g, m, strict=True)]
    by = [(math.sqrt(y / (1 - beta2**t)) + eps) * (1 - beta1**t) for y in memory["v"]]
    first = [share * x / d for x, d in zip(g, by, strict=True)]
    return [first, [beta1 * x / d for x, d in zip(m, by, strict=True)]]


def lamb(w, g, memory, lr, t, betas, eps, decay, limit):
    clip = max(1.0, norm(g) / limit)
    parts = [*adam_parts([x / clip for x in g], memory, betas, eps, t), [decay * x for x in w]]
    ratio = norm(w) / norm([math.fsum(part) for part in zip(*parts, strict=True)])
    return whole_terms(w, [[lr * ratio * x for x in part] for part in parts])


def lars(w, g, memory, lr, t, momentum, decay, trust):
    ratio = trust * norm(w) / (norm(g) + decay * norm(w) + 1e-8)
    before = memory.get("b", [0.0] * len(w))
    memory["b"] = [momentum * b + ratio * (x + decay * y) for b, x, y in zip(before, g, w, strict=True)]
    parts = [[ratio * x for x in g], [momentum * b for b in before], [ratio * decay * x for x in w]]
    return whole_terms(w, [[lr * x for x in part] for part in parts])


def mars(w, g, memory, lr, t, betas, eps, decay, gamma):
    c = g if t == 1 else [x + gamma * betas[0] / (1 - betas[0]) * (x - y) for x, y in zip(g, memory["g"], strict=True)]
    c, memory["g"] = [x / max(1.0, norm(c)) for x in c], g
    parts = [*adam_parts(c, memory, betas, eps, t), [0.0] * len(w)]
    return whole_terms(w, [[lr * x for x in part] for part in parts], 1 - lr * decay)


def cautious_adamw(w, g, memory, lr, t, betas, eps, decay):
    parts = masked([*adam_parts(g, memory, betas, eps, t), [0.0] * len(w)], g)
    return whole_terms(w, [[lr * x for x in part] for part in parts], 1 - lr * decay)


def sgdp(w, g, memory, lr, t, momentum, decay, delta, ratio):
    """Return SGDP's step of one channel, for which whole-tensor and per-channel projections agree."""
    memory["b"] = [momentum * b + x for b, x in zip(memory.get("b", [0.0] * len(w)), g, strict=True)]
    step, shrink = memory["b"], decay
    if abs(ref.cosine(w, g)) < delta / math.sqrt(len(w)):
        along = ref.dot(w, step) / (norm(w) + 1e-8) ** 2
        step, shrink = [x - along * y for x, y in zip(step, w, strict=True)], decay * ratio
    nothing = [0.0] * len(w)
    return whole_terms(w, [[lr * x for x in step], nothing, nothing], 1 - lr * shrink / (1 - momentum))


def adafactor(w, g, memory, lr, t, decay, eps, clip):
    """Return Adafactor's step of a matrix with one row, for which the rank-one v is v."""
    share = t**-0.8
    row = memory["r"] = (1 - share) * memory.get("r", 0.0) + share * math.fsum(x * x for x in g) / len(g)
    before = memory.get("c", [0.0] * len(g))
    memory["c"] = [(1 - share) * c + share * x * x for c, x in zip(before, g, strict=True)]
    update = [x / math.sqrt(max(row * c / max(row, eps[0]), eps[0] ** 2)) for x, c in zip(g, memory["c"], strict=True)]
    size = math.sqrt(len(w))
    rate = max(eps[1], norm(w) / size) * min(lr, 1 / math.sqrt(t)) / max(1.0, norm(update) / (size * clip))
    nothing = [0.0] * len(w)
    return whole_terms(w, [[rate * x for x in update], nothing, nothing], 1 - lr * decay)
