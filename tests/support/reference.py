"""Slow reference code for the package's formulas: one vector at a time, exact if possible, from the textbook.

Nothing here calls the package. Sums are taken in rational arithmetic, so the only error is the final rounding.
"""

from __future__ import annotations

import itertools
import math
import struct
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import torch
from torch.nn import functional as F

Vector = list[float]


def floats(tensor) -> Vector:
    """The stored values of a tensor, exactly."""
    return [float(value) for value in tensor.detach().reshape(-1)]


def exact_sum(values) -> Fraction:
    """A sum over the least common denominator, which is ten times as fast as adding fractions one by one."""
    ratios = [value.as_integer_ratio() for value in values]
    common = math.lcm(*(below for _, below in ratios))
    return Fraction(sum(above * (common // below) for above, below in ratios), common)


def exact_dot(a, b) -> Fraction:
    ratios = [(*x.as_integer_ratio(), *y.as_integer_ratio()) for x, y in zip(a, b, strict=True)]
    common = math.lcm(*(below * other_below for _, below, _, other_below in ratios))
    return Fraction(sum(x * y * (common // (below * other)) for x, below, y, other in ratios), common)


def dot(a, b) -> float:
    return float(exact_dot(a, b))


def root(value: Fraction) -> float:
    with localcontext() as context:
        context.prec = 60
        return float((Decimal(value.numerator) / Decimal(value.denominator)).sqrt())


def increment(before, after) -> float:
    """‖W⁺‖² - ‖W‖² of two stored vectors, without any rounding before the end."""
    return float(exact_dot(after, after) - exact_dot(before, before))


# --- the sphere -------------------------------------------------------------------------------------------------------


def mean(v) -> Fraction:
    return exact_sum(v) / len(v)


def center(v) -> Vector:
    middle = mean(v)
    return [float(Fraction(x) - middle) for x in v]


def variance(v) -> Fraction:
    """The biased variance."""
    middle = mean(v)
    return exact_sum((Fraction(x) - middle) ** 2 for x in v) / len(v)


def standardize(v, eps: float = 0.0) -> Vector:
    scale = root(variance(v) + Fraction(eps))
    return [x / scale if scale else 0.0 for x in center(v)]


def cosine(a, b) -> float:
    norms = root(exact_dot(a, a)) * root(exact_dot(b, b))
    return dot(a, b) / norms if norms else 0.0


# --- angles -----------------------------------------------------------------------------------------------------------


def angle(a, b) -> float:
    """Kahan's angle 2 atan2(‖a/‖a‖ - b/‖b‖‖, ‖a/‖a‖ + b/‖b‖‖), the unit vectors in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        a, b = [Decimal(x) for x in a], [Decimal(x) for x in b]
        a_norm, b_norm = (sum(x * x for x in v).sqrt() for v in (a, b))
        apart = sum((x / a_norm - y / b_norm) ** 2 for x, y in zip(a, b, strict=True)).sqrt()
        along = sum((x / a_norm + y / b_norm) ** 2 for x, y in zip(a, b, strict=True)).sqrt()
        return 2 * math.atan2(float(apart), float(along))


def split(before, after) -> tuple[float, float]:
    """Radial share ρ and tangential length of an update."""
    change = [Fraction(y) - Fraction(x) for x, y in zip(before, after, strict=True)]
    radial = exact_dot(before, change) / exact_dot(before, before)
    rest = [d - radial * Fraction(x) for x, d in zip(before, change, strict=True)]
    return float(radial), root(exact_dot(rest, rest))


# --- charges of scale symmetries --------------------------------------------------------------------------------------


def weighted(exponents, values) -> Fraction:
    """Σ s_i x_i."""
    return exact_dot(exponents, values)


def normalized_charge(exponents, weights, gradients) -> float:
    """The cosine between the concatenated s_i W_i and the gradients of the slices with s_i ≠ 0."""
    moved = [s * x for s, w in zip(exponents, weights, strict=True) if s for x in w]
    return cosine(moved, [x for s, g in zip(exponents, gradients, strict=True) if s for x in g])


def imbalance(exponents, squares) -> float:
    size = exact_dot(map(abs, exponents), squares)
    return float(exact_dot(exponents, squares) / size) if size else 0.0


def joined(exponents, slices) -> Vector:
    """The concatenated √s_i W_i."""
    return [math.sqrt(s) * x for s, w in zip(exponents, slices, strict=True) for x in w]


def product(a, b) -> list[Vector]:
    """A Bᵀ of matrices given as rows."""
    return [[dot(x, y) for y in b] for x in a]


def transposed(rows) -> list[Vector]:
    return [list(column) for column in zip(*rows, strict=True)]


# --- optimizers -------------------------------------------------------------------------------------------------------


def sgd_direction(w, g, buffer, momentum, dampening, weight_decay, nesterov, maximize):
    """One step of torch's documented SGD; returns the direction u and the buffer after the step."""
    d = [(-y if maximize else y) + weight_decay * x for x, y in zip(w, g, strict=True)]
    if not momentum:
        return d, None
    after = d if buffer is None else [momentum * b + (1 - dampening) * x for b, x in zip(buffer, d, strict=True)]
    return ([x + momentum * b for x, b in zip(d, after, strict=True)] if nesterov else after), after


def sgd_terms(w, g, buffer, lr, *flags):
    """Return the four terms: the step is linear in (g, W, b⁻), so each term is the step of that input alone."""
    nothing = [0.0] * len(w)
    silent = None if buffer is None else nothing
    by_gradient, _ = sgd_direction(nothing, g, silent, *flags)
    by_momentum, _ = sgd_direction(nothing, nothing, buffer, *flags)
    by_decay, _ = sgd_direction(w, nothing, silent, *flags)
    whole, _ = sgd_direction(w, g, buffer, *flags)
    linear = [-2 * lr * dot(w, part) for part in (by_gradient, by_momentum, by_decay)]
    return (*linear, lr**2 * dot(whole, whole))


# --- optimizers that scale each element by itself ---------------------------------------------------------------------

# Each function takes (g̃, memory of one element, flags), updates the memory, and returns the step of that element
# per η as a function of (gradient, momentum before), which is linear because the divisor is already known.


def single(x: float) -> float:
    """Return x rounded to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def moment(memory, name, value, decay) -> float:
    memory[name] = decay * memory[name] + (1 - decay) * value
    return memory[name]


def adam(full, memory, betas, eps, *, amsgrad=False):
    (beta1, beta2), t = betas, memory["t"]
    second = moment(memory, "v", full**2, beta2)
    memory["top"] = max(memory["top"], second)
    divisor = math.sqrt((memory["top"] if amsgrad else second) / (1 - beta2**t)) + eps
    moment(memory, "m", full, beta1)
    return lambda g, m: (beta1 * m + (1 - beta1) * g) / (1 - beta1**t) / divisor


def nadam(full, memory, betas, eps, momentum_decay):
    """Torch keeps Π μ in float32."""
    (beta1, beta2), t = betas, memory["t"]
    divisor = math.sqrt(moment(memory, "v", full**2, beta2) / (1 - beta2**t)) + eps
    mu, mu_next = (beta1 * (1 - 0.96 ** (time * momentum_decay) / 2) for time in (t, t + 1))
    product = memory["product"] = single(memory.get("product", 1.0) * single(mu))
    moment(memory, "m", full, beta1)

    def move(g, m):
        m = beta1 * m + (1 - beta1) * g
        return (mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)) / divisor

    return move


def radam_length(beta2, t) -> tuple[float, float]:
    """Return ρ_∞ and ρ_t of RAdam."""
    longest = 2 / (1 - beta2) - 1
    return longest, longest - 2 * t * beta2**t / (1 - beta2**t)


def radam(full, memory, betas, eps):
    (beta1, beta2), t = betas, memory["t"]
    second, (longest, length) = moment(memory, "v", full**2, beta2), radam_length(beta2, t)
    factor = 1.0
    if length > 5:
        squared = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        factor = math.sqrt(squared) * math.sqrt(1 - beta2**t) / (math.sqrt(second) + eps)
    moment(memory, "m", full, beta1)
    return lambda g, m: (beta1 * m + (1 - beta1) * g) / (1 - beta1**t) * factor


def rmsprop(full, memory, alpha, eps, momentum, centered):
    second = moment(memory, "v", full**2, alpha)
    mean = moment(memory, "mean", full, alpha)
    divisor = math.sqrt(second - mean**2 if centered else second) + eps

    def move(g, m):
        return momentum * m + g / divisor

    memory["m"] = move(full, memory["m"])
    return move


def adagrad(full, memory, lr_decay, initial_accumulator_value, eps):
    memory["sum"] = memory.get("sum", initial_accumulator_value) + full**2
    divisor = (math.sqrt(memory["sum"]) + eps) * (1 + (memory["t"] - 1) * lr_decay)
    return lambda g, m: g / divisor


def adamax(full, memory, betas, eps):
    (beta1, beta2), t = betas, memory["t"]
    divisor = memory["u"] = max(beta2 * memory["u"], abs(full) + eps)
    moment(memory, "m", full, beta1)
    return lambda g, m: (beta1 * m + (1 - beta1) * g) / (1 - beta1**t) / divisor


def lion(full, memory, betas):
    beta1, beta2 = betas
    c = beta1 * memory["m"] + (1 - beta1) * full
    moment(memory, "m", full, beta2)
    return lambda g, m: (beta1 * m + (1 - beta1) * g) / abs(c) if c else 0.0


def elementwise_step(optimizer, w, g, memories, lr, *, weight_decay=0.0, decoupled=False, maximize=False, **flags):
    """Take one elementwise step; return (terms, W⁺) and update the memories, a defaultdict(float) per element."""
    coupled, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    parts = []
    for x, slope, memory in zip(w, g, memories, strict=True):
        gradient, before = -slope if maximize else slope, memory["m"]
        memory["t"] += 1
        move = optimizer(gradient + coupled * x, memory, **flags)
        parts.append((move(gradient, 0.0), move(0.0, before), move(coupled * x, 0.0)))
    whole = [math.fsum(part) for part in parts]
    by_gradient, by_momentum, by_decay = (-2 * lr * shrink * dot(w, part) for part in zip(*parts, strict=True))
    by_decay += float((Fraction(shrink) ** 2 - 1) * exact_dot(w, w))
    new = [shrink * x - lr * a for x, a in zip(w, whole, strict=True)]
    return (by_gradient, by_momentum, by_decay, lr**2 * dot(whole, whole)), new


# --- equilibria -------------------------------------------------------------------------------------------------------


def impulse_response(momentum, dampening, nesterov) -> Vector:
    """Return h, the contribution of one gradient to the directions of its own and all later steps."""
    response, buffer = [], None
    for step in range(3000):
        impulse = [1.0 if step == 1 else 0.0]  # not at step 0, where torch skips dampening
        direction, buffer = sgd_direction([0.0], impulse, buffer, momentum, dampening, 0.0, nesterov, maximize=False)
        response.append(direction[0])
    return response


def equilibrium_angle(lr, decay, *, momentum=0.0, dampening=0.0, nesterov=False) -> float:
    """Return the angle of the random-walk model: θ² = 2ηλ Σh² / Σh."""
    response = impulse_response(momentum, dampening, nesterov)
    return math.sqrt(2 * lr * decay * math.fsum(h * h for h in response) / math.fsum(response))


def relaxation_steps(lr, decay, *, momentum=0.0, dampening=0.0, nesterov=False) -> float:
    """‖W‖² loses 2ηλΣh of itself per step and gains η²G²(Σh)²/‖W‖²: ‖W‖⁴ relaxes at the rate 4ηλΣh."""
    return 1 / (4 * lr * decay * math.fsum(impulse_response(momentum, dampening, nesterov)))


def lion_sign_correlations(betas) -> Vector:
    """Correlation of sign(c) with itself k steps on, c of white Gaussian noise: (2/π) arcsin ρ_k, from h of c."""
    response, (beta1, beta2), m = [1 - betas[0]], betas, 1 - betas[1]
    while beta1 * m > 1e-9:
        response.append(beta1 * m)
        m *= beta2
    lagged = [math.fsum(a * b for a, b in zip(response, response[k:], strict=False)) for k in range(len(response))]
    return [2 / math.pi * math.asin(value / lagged[0]) for value in lagged]


def lion_equilibrium_angle(lr, decay, betas) -> float:
    """Steps of length η√n whose directions correlate by r_k: 2ηλ‖W‖² = η²n(1 + 2Σr_k), θ² = η²n/‖W‖²."""
    itself, *later = lion_sign_correlations(betas)
    return math.sqrt(2 * lr * decay / (itself + 2 * math.fsum(later)))


# --- batches ----------------------------------------------------------------------------------------------------------


def span(columns) -> list[list[Fraction]]:
    """An orthogonal basis of the centered columns, by Gram-Schmidt in rationals; its length is the rank."""
    means = [mean(row) for row in zip(*columns, strict=True)]
    basis: list[list[Fraction]] = []
    for column in columns:
        rest = [Fraction(x) - m for x, m in zip(column, means, strict=True)]
        for q in basis:
            share = exact_dot(rest, q) / exact_dot(q, q)
            rest = [x - share * y for x, y in zip(rest, q, strict=True)]
        if any(rest):
            basis.append(rest)
    return basis


def kernel_fraction(w, columns) -> float:
    seen = sum((exact_dot(w, q) ** 2 / exact_dot(q, q) for q in span(columns)), Fraction(0))
    return float(1 - seen / exact_dot(w, w))


# --- robustness -------------------------------------------------------------------------------------------------------


def normal_quantile(level: float) -> float:
    """z with P(|Z| ≤ z) = level, by bisection of the error function."""
    low, high = 0.0, 40.0
    for _ in range(200):
        z = (low + high) / 2
        low, high = (z, high) if math.erf(z / math.sqrt(2)) < level else (low, z)
    return z


def wilson(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval by solving (p̂ - p)² = z² p (1 - p) / n for p."""
    z, share = normal_quantile(level), correct / total
    a, b, c = 1 + z * z / total, -(2 * share + z * z / total), share**2
    width = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return (-b - width) / (2 * a), (-b + width) / (2 * a)


def paired(only_first: int, only_second: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wald's interval for the mean of n + 2 differences: the samples', one more of +1, one of -1."""
    differences = [-1] * (only_first + 1) + [1] * (only_second + 1) + [0] * (n - only_first - only_second)
    half = normal_quantile(level) * root(variance(differences) / (n + 2))
    return max(-1.0, float(mean(differences)) - half), min(1.0, float(mean(differences)) + half)


def holm(p_values: Vector) -> Vector:
    """Return p-values of closed testing: the largest Bonferroni p-value of all families that contain a hypothesis."""
    members = range(len(p_values))
    families = [family for size in range(1, len(p_values) + 1) for family in itertools.combinations(members, size)]
    bonferroni = {family: min(1.0, len(family) * min(p_values[k] for k in family)) for family in families}
    return [max(p for family, p in bonferroni.items() if k in family) for k in members]


def bim(logits, images, labels, eps, step_size, steps, lower, upper):
    """The basic iterative method."""
    size = images[0].numel()
    box = [lower] * size, [upper] * size
    pairs = zip(images, labels, strict=True)
    return torch.stack([attacked(logits, x, y, "linf", eps, step_size, steps, box) for x, y in pairs])


def attacked(logits, image, label, norm, eps, step_size, steps, box, start=None):
    """Projected gradient ascent for one image, step by step, pixel by pixel; ``box`` has two ends for each pixel."""
    origin, current = floats(image), floats(image if start is None else start)
    for _ in range(steps):
        x = shaped(current, image).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits(x), label[None]), x)
        current = projected(ascended(current, floats(gradient), norm, step_size), origin, norm, eps, box)
    return shaped(current, image)[0]


def shaped(values: Vector, image):
    return torch.tensor(values, dtype=image.dtype).reshape(1, *image.shape)


def ascended(point: Vector, gradient: Vector, norm: str, step_size: float) -> Vector:
    if norm == "linf":
        return [x + step_size * ((slope > 0) - (slope < 0)) for x, slope in zip(point, gradient, strict=True)]
    length = root(exact_dot(gradient, gradient))
    return [x + step_size * (slope / length if length else 0) for x, slope in zip(point, gradient, strict=True)]


def projected(point: Vector, origin: Vector, norm: str, eps: float, box: tuple[Vector, Vector]) -> Vector:
    if norm == "linf":
        near = [min(max(x, o - eps), o + eps) for x, o in zip(point, origin, strict=True)]
    else:
        offset = [x - o for x, o in zip(point, origin, strict=True)]
        length = root(exact_dot(offset, offset))
        near = [o + d * min(1, eps / length) if length else o for o, d in zip(origin, offset, strict=True)]
    return [min(max(x, low), high) for x, low, high in zip(near, *box, strict=True)]


def attacked_until_wrong(logits, image, label, norm, eps, step_size, steps, box, starts):
    """Attack one image until an iterate is wrong, from each start in turn (None: the image, its gradient is known).

    Returns the iterate that ended it, whether that is wrong, and the cost: 1 for a forward and backward pass, 1/3 for
    a forward pass alone.
    """

    def wrong(x) -> bool:
        return int(logits(x[None]).argmax()) != int(label)

    current, cost = image, 0.0
    if wrong(current):
        return current, True, cost
    for start in starts:
        current = image if start is None else start
        for step in range(steps):
            if start is not None or step > 0:
                cost += 1
                if wrong(current):
                    return current, True, cost
            current = attacked(logits, image, label, norm, eps, step_size, 1, box, current)
        cost += 1 / 3
        if wrong(current):
            return current, True, cost
    return current, False, cost


def two_norm_squared(matrix) -> float:
    """Return σ_max²: the smallest t for which t - A Aᵀ is not indefinite, by bisection on its pivots in rationals."""
    gram = [[exact_dot(a, b) for b in matrix] for a in matrix]

    def above(t: float) -> bool:
        rest = [[Fraction(t) * (i == j) - x for j, x in enumerate(row)] for i, row in enumerate(gram)]
        while rest:
            (pivot, *head), *rest = rest
            if pivot <= 0:
                return False
            rest = [[x - row[0] * y / pivot for x, y in zip(row[1:], head, strict=True)] for row in rest]
        return True

    low, high = 0.0, 2 * float(sum(row[i] for i, row in enumerate(gram)))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return high


def weight_normalization(v, gain: float) -> Vector:
    return [gain * x / root(exact_dot(v, v)) for x in v]


def centered_weight_normalization(v) -> Vector:
    return weight_normalization(center(v), 1.0)


def weight_standardization(v, unbiased: bool, eps: float) -> Vector:
    return [x / (root(variance(v) * Fraction(len(v), len(v) - unbiased)) + eps) for x in center(v)]


def patches(images, height: int, width: int, stride: int, padding: int, dilation: int) -> list[Vector]:
    """The patches of ``(B, C, H, W)`` nested lists, one vector each: images, then rows, then columns of positions."""
    found = []
    for image in images:
        rows, columns = len(image[0]), len(image[0][0])
        reach = [padding + rows - dilation * (height - 1), padding + columns - dilation * (width - 1)]
        for top in range(-padding, reach[0], stride):
            for left in range(-padding, reach[1], stride):
                places = [(top + dilation * i, left + dilation * j) for i in range(height) for j in range(width)]
                inside = [0 <= i < rows and 0 <= j < columns for i, j in places]
                found.append([c[i][j] if ok else 0.0 for c in image for (i, j), ok in zip(places, inside, strict=True)])
    return found


# --- what ε and weight decay do ---------------------------------------------------------------------------------------


def standardize_gradient(v, upstream, eps: float) -> Vector:
    """Σ_j c_j ∂N_j/∂v_i with ∂N_j/∂v_i = (δ_ij - 1/n)/s - u_i u_j/(n s³), entry by entry in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        v, c, n = [Decimal(x) for x in v], [Decimal(x) for x in upstream], len(v)
        u = [x - sum(v) / n for x in v]
        s = (sum(x * x for x in u) / n + Decimal(eps)).sqrt()
        rows = [[(Decimal(i == j) - 1 / Decimal(n)) / s - u[i] * u[j] / (n * s**3) for j in range(n)] for i in range(n)]
        return [float(sum(x * y for x, y in zip(row, c, strict=True))) for row in rows]


def epsilon_inner(upstream, normalized, scales, eps: float) -> float:
    """Σ_k ε/(scale_k + ε) ⟨c_k, ŷ_k⟩ over the instances of one unit."""
    shares = [Fraction(eps) / (Fraction(scale) + Fraction(eps)) for scale in scales]
    parts = [exact_dot(c, y) for c, y in zip(upstream, normalized, strict=True)]
    return float(sum((share * part for share, part in zip(shares, parts, strict=True)), Fraction(0)))


def schedule_root(lr: float, decay: float, momentum: float) -> Decimal:
    """The larger root of x² - (1 + μ - λη)x + μ, in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        half = (1 + Decimal(momentum) - Decimal(lr) * Decimal(decay)) / 2
        return half + (half * half - Decimal(momentum)).sqrt()


def balanced_norm(lr: float, decay: float, unit_gradient_norm: float) -> float:
    """The length at which one step of SGD with weight decay changes nothing, by bisection."""
    low, high = 1e-6, 1e6
    for _ in range(200):
        length = math.sqrt(low * high)
        longer = math.hypot((1 - lr * decay) * length, lr * unit_gradient_norm / length)
        low, high = (length, high) if longer > length else (low, length)
    return length


def advertorch_iterates(x, slopes, norm, eps, step, low, high):
    """Return the last image of advertorch's perturb_iterative for given gradients, image by image in numpy."""
    delta, x = np.zeros(x.shape), x.numpy()
    for slope in slopes.numpy():
        for k in range(len(x)):
            if norm == "linf":
                moved = np.clip(delta[k] + step * np.sign(slope[k]), -eps, eps)
                delta[k] = np.clip(x[k] + moved, low, high) - x[k]
            else:
                moved = delta[k] + step * slope[k] / np.sqrt((slope[k] ** 2).sum())
                moved = np.clip(x[k] + moved, low, high) - x[k]
                delta[k] = moved * min(1.0, eps / max(np.sqrt((moved**2).sum()), 1e-300))
    return torch.from_numpy(np.clip(x + delta, low, high))
