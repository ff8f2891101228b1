"""One pass over weights: compiled loops and torch agree with each other and with rational arithmetic."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.geometry import (
    AdamRule,
    NAdamRule,
    RMSpropRule,
    SGDRule,
    StepParts,
    angular_update,
    rows,
    update_products,
)
from lightning_normgeo.geometry.products import compiled, one_pass
from lightning_normgeo.geometry.products.one_pass import many_weight_products, weight_products
from lightning_normgeo.geometry.products.weight_pass import WeightPass
from lightning_normgeo.geometry.steps import angles
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule
from support import reference as ref
from support.tensors import PROPERTY, SEED, draw
from support.triton_interpreter import interpreted

SEGMENT = 2**13


def refuse(*args):
    raise AssertionError("went through torch")


def by_loops(function, *args):
    """Call the one-pass function so that only the compiled loops can answer, whatever the size of a matrix."""
    pytest.importorskip("numba")
    return compiled_alone(function, args, loops="numba_kernels")


def by_triton(function, *args):
    """Call the one-pass function so that only the GPU kernels can answer, which Triton's interpreter runs here."""
    interpreted()
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of infinite numbers
        return compiled_alone(function, args, loops="triton_launches")


def compiled_alone(function, args, loops):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_WORTHWHILE", 0)
        patch.setattr(compiled, "_failed", set())
        patch.setitem(compiled._LOOPS, "cpu", loops)
        patch.setattr(one_pass, "_by_torch", refuse)
        patch.setattr(angles, "_by_torch", refuse)
        return function(*args)


def by_torch(function, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_failed", set(compiled._LOOPS.values()))
        return function(*args)


def read_one(one):
    return many_weight_products([one])[0]


PATHS = pytest.mark.parametrize("path", [by_loops, by_triton, by_torch], ids=["loops", "triton", "torch"])
COMPILED = pytest.mark.parametrize("path", [by_loops, by_triton], ids=["loops", "triton"])
SGD = SGDRule(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05, maximize=True, first=False)
ADAM = AdamRule(lr=1e-3, weight_decay=0.1, betas=(0.8, 0.99), step=7.0)
PLAIN, FIRST = SGDRule(lr=0.1, weight_decay=0.05), AdamRule(lr=1e-3, weight_decay=0.1)
ADAM_FLAGS = [{"decoupled": d, "maximize": m} for d in (False, True) for m in (False, True)]


def example(rule, units=3, width=11, dtypes=(torch.float64,) * 3, seed=0, states=None):
    """Return the tensors of a typical optimizer step; second moments are positive."""
    states = {SGDRule: 1, AdamRule: 2}.get(type(rule), 0) if states is None else states
    state = [draw(units, width, seed=seed + 2), draw(units, width, seed=seed + 3).square()][:states]
    weight, gradient = draw(units, width, seed=seed).to(dtypes[0]), draw(units, width, seed=seed + 1).to(dtypes[1])
    return WeightPass(weight, gradient, tuple(tensor.to(dtypes[2]) for tensor in state), rule)


# --- exactly ----------------------------------------------------------------------------------------------------------


def exact_terms(rule, w, g, *state):
    if isinstance(rule, SGDRule):
        flags = (rule.momentum, rule.dampening, rule.weight_decay, rule.nesterov, rule.maximize)
        return ref.sgd_terms(w, g, state[0] if state else None, rule.lr, *flags)
    moments = [dict(zip("mv", pair, strict=True)) for pair in zip(*state, strict=True)] if state else [{} for _ in w]
    memories = [defaultdict(float, t=int(rule.step) - 1, **moment) for moment in moments]
    flags = {name: getattr(rule, name) for name in ("weight_decay", "decoupled", "maximize", "betas", "eps")}
    return ref.elementwise_step(ref.adam, w, g, memories, rule.lr, **flags)[0]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "rule",
    [
        PLAIN,
        SGD,
        SGDRule(lr=0.1, momentum=0.9, nesterov=True, first=False),
        *(replace(ADAM, **flags) for flags in ADAM_FLAGS),
        FIRST,
    ],
    ids=["plain", "sgd", "nesterov", *(str(flags) for flags in ADAM_FLAGS), "first adam"],
)
def test_sums_are_those_of_rational_arithmetic(path, rule, dtype):
    states = 0 if rule in (PLAIN, FIRST) else None
    one = example(rule, dtypes=(dtype,) * 3, states=states)
    found = path(read_one, one._replace(keep=torch.empty_like(one.weight)))
    terms = rule.terms(found.weight_sq, found.inner, found.gradient_sq, *found.rule)
    for unit in range(3):
        w, g, *state = (ref.floats(tensor[unit]) for tensor in (one.weight, one.gradient, *one.state))
        assert found.weight_sq[unit].item() == pytest.approx(ref.dot(w, w), rel=1e-14)
        assert found.gradient_sq[unit].item() == pytest.approx(ref.dot(g, g), rel=1e-14)
        assert found.inner[unit].item() == pytest.approx(ref.dot(w, g), rel=1e-13, abs=1e-14)
        assert found.quartic[unit].item() == pytest.approx(float(sum(ref.Fraction(x) ** 4 for x in w)), rel=1e-14)
        expected = exact_terms(rule, w, g, *state)
        assert [term[unit].item() for term in terms] == pytest.approx(expected, rel=1e-12, abs=1e-15)


@PATHS
@pytest.mark.parametrize("theta", [1e-9, 1e-4, 1.0])
@pytest.mark.parametrize("width", [2, 40, SEGMENT + 5])
def test_a_small_turn_beside_a_stretch_keeps_its_digits(path, theta, width, monkeypatch):
    """The part orthogonal to W is 1e-9 of it, in rows that both paths split into blocks."""
    monkeypatch.setattr(rows, "_BLOCK", SEGMENT)
    weight, other = draw(1, width), draw(1, width, seed=1)
    new = 1.25 * (weight + theta * (other - (other @ weight.T) / (weight @ weight.T) * weight))
    w, n = ref.floats(weight), ref.floats(new)
    parts = path(update_products, weight, new)
    change = [ref.Fraction(y) - ref.Fraction(x) for x, y in zip(w, n, strict=True)]
    assert parts.weight_sq.item() == pytest.approx(ref.dot(w, w), rel=1e-13)
    assert parts.weight_update.item() == pytest.approx(ref.dot(w, change), rel=1e-13)
    assert parts.update_sq.item() == pytest.approx(ref.dot(change, change), rel=1e-13)
    assert parts.tangential_sq.sqrt().item() == pytest.approx(ref.split(w, n)[1], rel=1e-6 if theta < 1e-6 else 1e-11)
    assert path(angular_update, weight, new).item() == pytest.approx(ref.angle(w, n), rel=1e-6, abs=1e-15)


# --- the same on both paths -------------------------------------------------------------------------------------------


def sizes(one):
    """Return the size that each sum would have without any cancellation."""
    gradient = one.gradient.double() if one.gradient_scale is None else one.gradient.double() / one.gradient_scale
    weight, state = one.weight.double(), [tensor.double() for tensor in one.state]
    sums = [weight * weight, weight * gradient, gradient * gradient, weight**4]
    if isinstance(one.rule, SGDRule) and state:
        c_g, c_m = one.rule.coefficients
        longest = c_g * (gradient.abs() + one.rule.weight_decay * weight.abs()) + c_m * state[0].abs()
        sums += [weight * state[0], longest**2]
    elif isinstance(one.rule, ElementwiseRule):
        parts = [weight * 0 if part is None else part for part in one.rule.parts(weight, gradient, *state)]
        sums += [*(weight * part for part in parts), sum(part.abs() for part in parts) ** 2]
    return [each.abs().sum(1) for each in sums]


def same(found, expected, scale, tolerance=1e-13):
    assert len(found) == len(expected) == len(scale)
    for a, b, size in zip(found, expected, scale, strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert a.shape == b.shape == size.shape
        assert ((a - b).abs() <= tolerance * size).all()


def flat(found):
    return list(found.sums)


RULES = st.one_of(
    st.none(),
    st.builds(
        partial(SGDRule, lr=0.1, first=False),
        momentum=st.sampled_from([0.5, 0.9]),
        dampening=st.sampled_from([0.0, 0.3, 1.0]),
        weight_decay=st.sampled_from([0.0, 1e-4]),
        nesterov=st.booleans(),
        maximize=st.booleans(),
    ),
    st.builds(
        AdamRule,
        lr=st.sampled_from([1e-3, torch.tensor(0.01, dtype=torch.float64)]),
        betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (torch.tensor(0.5, dtype=torch.float64), 0.99)]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        decoupled=st.booleans(),
        maximize=st.booleans(),
        eps=st.sampled_from([1e-8, 1e-3]),
        step=st.sampled_from([1.0, 100.0, torch.tensor(3.0, dtype=torch.float64)]),
    ),
)
SHAPES = {"units": st.integers(1, 5), "width": st.sampled_from([1, 2, 9, 40, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 3])}
DTYPES = st.sampled_from([(torch.float32,) * 3, (torch.float64,) * 3, (torch.float32, torch.float32, torch.float64)])


@COMPILED
@PROPERTY
@given(RULES, DTYPES, SEED, st.sampled_from([None, 3.0, 65536.0]), st.booleans(), st.booleans(), *SHAPES.values())
def test_loops_and_torch_agree(path, rule, dtypes, seed, scale, keep, stateless, units, width):
    one = example(rule, units, width, dtypes, seed, 0 if stateless else None)
    one = one._replace(gradient_scale=None if scale is None else torch.tensor(scale))
    kept = [torch.full_like(one.weight, torch.nan) if keep else None for _ in range(2)]
    expected = by_torch(read_one, one._replace(keep=kept[0]))
    found = path(read_one, one._replace(keep=kept[1]))
    same(flat(found), flat(expected), sizes(one))
    assert not keep or torch.equal(kept[0], one.weight)
    assert not keep or torch.equal(kept[1], one.weight)


@COMPILED
@PROPERTY
@given(DTYPES, SEED, st.sampled_from([1e-9, 1e-3, 1.0]), *SHAPES.values())
def test_loops_and_torch_agree_on_updates(path, dtypes, seed, size, units, width):
    weight = draw(units, width, seed=seed).to(dtypes[0])
    new = (weight + size * draw(units, width, seed=seed + 1)).to(dtypes[2])
    expected, found = by_torch(update_products, weight, new), path(update_products, weight, new)
    change = (new.double() - weight.double()).abs()
    scale = [expected.weight_sq, (weight.double().abs() * change).sum(1), expected.update_sq, expected.update_sq]
    same(found, expected, scale, 1e-12)


@pytest.mark.parametrize("rule", [None, SGD, ADAM], ids=["none", "sgd", "adam"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [1, 9, SEGMENT + 40])
@COMPILED
def test_a_gradient_that_is_not_finite_shows(path, rule, bad, width):
    """A gradient that is not finite is how a step that the gradient scaler skips is recognized."""
    one = example(rule, width=width, dtypes=(torch.float32,) * 3)
    one.gradient[1, width // 2] = bad
    found, expected = path(read_one, one), by_torch(read_one, one)
    assert found.gradient_sq.isfinite().tolist() == [True, False, True]
    torch.testing.assert_close(flat(found), flat(expected), equal_nan=True, rtol=1e-10, atol=1e-10)


@PATHS
@pytest.mark.parametrize("scale", [0.0, torch.nan])
def test_a_gradient_scale_that_is_no_scale_shows(path, scale):
    one = example(SGD)._replace(gradient_scale=torch.tensor(scale))
    assert not path(read_one, one).gradient_sq.isfinite().any()


@COMPILED
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_update_that_is_not_finite_shows(path, bad):
    weight, new = draw(3, 40).float(), draw(3, 40, seed=1).float()
    new[1, 7] = bad
    found, expected = path(update_products, weight, new), by_torch(update_products, weight, new)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-10, atol=1e-10)


@PATHS
def test_zero_weights_and_equal_weights_have_no_angle(path):
    weight, new = torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([[1.0, 2], [3, 4]])
    assert path(update_products, weight, new).tangential_sq.tolist() == [5, 0]


# --- threads ----------------------------------------------------------------------------------------------------------


def test_nothing_depends_on_the_number_of_threads(monkeypatch):
    numba_kernels = pytest.importorskip("lightning_normgeo.geometry.products.numba_kernels", exc_type=ImportError)
    steps = [example(rule, *shape) for rule in (None, SGD, ADAM) for shape in ((70, 500), (1, 5 * SEGMENT + 1), (3, 2))]
    pairs = [(one.weight, one.gradient) for one in steps]
    sums = []
    for threads, chunk in ((1, 2**17), (2, 2**17), (3, 2**10), (7, 1)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(numba_kernels, "_CHUNK", chunk)
        monkeypatch.setattr(numba_kernels, "_HELPED", chunk)
        sums.append(list(chain(*numba_kernels.weight_sums(steps), *numba_kernels.update_sums(pairs))))
    assert all(torch.equal(a, b) for other in sums[1:] for a, b in zip(sums[0], other, strict=True))


def test_threads_survive_a_fork():
    pytest.importorskip("numba")
    code = """
import os, torch
from lightning_normgeo.geometry.products import compiled, one_pass
torch.set_num_threads(3)
weight = torch.ones(300, 2000)
def read(): return one_pass.weight_products(weight, weight).weight_sq.sum().item()
assert read() == 600000 and not compiled._failed
child = os.fork()
if child == 0:
    os._exit(0 if read() == 600000 and not compiled._failed else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_an_error_in_a_thread_is_not_lost(monkeypatch):
    numba_kernels = pytest.importorskip("lightning_normgeo.geometry.products.numba_kernels", exc_type=ImportError)
    failed = threading.Event()

    def fail_elsewhere(*args):
        if threading.current_thread() is threading.main_thread():
            assert failed.wait(60)
        else:
            failed.set()
            fail()

    torch.set_num_threads(2)
    monkeypatch.setattr(numba_kernels, "_CHUNK", 1)
    monkeypatch.setattr(numba_kernels, "_HELPED", 1)
    monkeypatch.setattr(numba_kernels, "_plain", fail_elsewhere)
    with pytest.raises(RuntimeError, match="no compiler"):
        numba_kernels.weight_sums([example(None, units=50)])


# --- without loops ----------------------------------------------------------------------------------------------------


def fail(*args):
    raise RuntimeError("no compiler")


def break_import(patch):
    patch.setitem(sys.modules, "numba", None)
    patch.delitem(sys.modules, "lightning_normgeo.geometry.products.numba_kernels", raising=False)
    patch.delattr("lightning_normgeo.geometry.products.numba_kernels", raising=False)


def break_kernel(patch):
    numba_kernels = pytest.importorskip("lightning_normgeo.geometry.products.numba_kernels", exc_type=ImportError)
    patch.setattr(numba_kernels, "_sgd", fail)


def break_switch(patch):
    """Switch the compiled loops off as NUMBA_DISABLE_JIT does."""
    patch.setattr(pytest.importorskip("numba").config, "DISABLE_JIT", 1)
    patch.delitem(sys.modules, "lightning_normgeo.geometry.products.numba_kernels", raising=False)
    patch.delattr("lightning_normgeo.geometry.products.numba_kernels", raising=False)


@pytest.mark.parametrize("breaks", [break_import, break_kernel, break_switch])
def test_torch_takes_over_for_good_where_loops_fail(breaks, monkeypatch):
    monkeypatch.setattr(compiled, "_WORTHWHILE", 0)
    monkeypatch.setattr(compiled, "_failed", set())
    one = example(SGD, dtypes=(torch.float32,) * 3)
    one, expected = one._replace(keep=torch.empty_like(one.weight)), by_torch(read_one, one)
    breaks(monkeypatch)
    said = pytest.warns(MeasurementWarning, match="numba compiles fails here")
    with said if breaks is break_kernel else nullcontext():
        found = read_one(one)
    assert torch.equal(one.keep, one.weight)
    assert all(map(torch.equal, flat(found), flat(expected)))
    assert compiled.fast(refuse, 10**9) is None, "tried again"
    assert all(map(torch.equal, update_products(*one[:2]), by_torch(update_products, *one[:2])))


def test_loops_are_tried_again_after_a_device_was_out_of_memory(monkeypatch):
    def full(module):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled, "_failed", set())
    assert compiled.fast(full, 10**9) is None
    assert not compiled._failed
    pytest.importorskip("numba")
    assert compiled.fast(lambda module: module.SEGMENT, 10**9) == SEGMENT


def test_machine_code_that_cannot_be_kept_is_compiled_all_the_same():
    numba_kernels = pytest.importorskip("lightning_normgeo.geometry.products.numba_kernels", exc_type=ImportError)
    names: dict = {}
    exec(compile("def double(x): return 2 * x", "<no file>", "exec"), names)
    assert numba_kernels.compiled_loop(names["double"])(21) == 42


def test_numba_is_not_even_imported_for_a_few_elements(monkeypatch):
    monkeypatch.setattr(compiled, "_failed", set())
    break_import(monkeypatch)
    update_products(draw(9, 9), draw(9, 9))
    assert not compiled._failed
    update_products(draw(1, compiled._WORTHWHILE), draw(1, compiled._WORTHWHILE))
    assert compiled._failed == {"numba_kernels"}


class Subclass(torch.Tensor):
    """Tensor subclass whose local memory may be only a part of it, as for a tensor distributed over processes."""


LAYOUTS = {
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "transposed": lambda tensor: tensor.T.contiguous().T,
    "every other": lambda tensor: torch.stack([tensor, -tensor], -1)[..., 0],
    "negated": lambda tensor: torch._neg_view(tensor),
    "empty": lambda tensor: tensor[:0],
    "narrow": lambda tensor: tensor[:, :0],
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("place", ["weight", "state", "all"])
def test_what_loops_cannot_read_goes_through_torch(change, place, monkeypatch):
    monkeypatch.setattr(compiled, "_WORTHWHILE", 0)
    monkeypatch.setattr(compiled, "fast", refuse)
    one = example(SGD)
    weight, gradient, buffer = (change(tensor) for tensor in (one.weight, one.gradient, *one.state))
    if weight.shape == one.weight.shape and place != "all":
        gradient = one.gradient
        weight, buffer = (weight, *one.state) if place == "weight" else (one.weight, buffer)
    keep = torch.zeros_like(weight)
    found = weight_products(weight, gradient, buffer, rule=SGD, keep=keep)
    w, g, b = (tensor.double() for tensor in (weight, gradient, buffer))
    same(
        [found.weight_sq, found.inner, found.rule[0]],
        [(w * w).sum(1), (w * g).sum(1), (w * b).sum(1)],
        [w.new_ones(len(w)) * 99] * 3,
    )
    assert torch.equal(keep, weight)


@PATHS
def test_parameters_and_what_is_followed_by_autograd_can_be_read(path):
    weight = torch.nn.Parameter(draw(3, 4).float())
    found = path(read_one, WeightPass(weight, draw(3, 4, seed=1).float(), keep=torch.empty(3, 4)))
    assert not found.weight_sq.requires_grad


class Half(SGDRule):
    """Update rule of a user."""

    def products(self, weight, gradient, *state):
        return tuple(product / 2 for product in super().products(weight, gradient, *state))


def test_several_weights_come_back_in_order_by_loops_or_by_torch(monkeypatch):
    monkeypatch.setattr(compiled, "_WORTHWHILE", 0)
    monkeypatch.setattr(compiled, "_failed", set())
    rules = [None, RMSpropRule(lr=0.1), ADAM, SGD, Half(lr=0.1, momentum=0.9, first=False), NAdamRule(lr=0.1, step=3.0)]
    states = [0, 0, 2, 1, 1, 2]
    steps = [example(rule, k + 1, seed=k, states=states[k]) for k, rule in enumerate(rules)]
    amsgrad, twice = example(ADAM, 7), example(SGD, 8)
    amsgrad = amsgrad._replace(state=(*amsgrad.state, 2 * amsgrad.state[1]))
    steps += [amsgrad, twice._replace(state=twice.state * 2), example(SGD, 9, 0), example(None, 0)]
    found = many_weight_products(steps)
    assert compiled._failed == (set() if importlib.util.find_spec("numba") else {"numba_kernels"})
    assert [len(products.weight_sq) for products in found] == [*range(1, 10), 0]
    for one, products in zip(steps, found, strict=True):
        same(flat(products), flat(by_torch(read_one, one)), sizes(one))
    assert many_weight_products([]) == angles.many_update_products([]) == []


@pytest.mark.parametrize("block", [1, 7, 11, 30])
def test_torch_cuts_long_rows_only_where_sums_add_up(block, monkeypatch):
    class Normed(ElementwiseRule):
        """Update rule like LAMB's: the gradient divided by its norm."""

        def parts(self, weight, gradient, *state):
            return StepParts(self.lr * gradient / gradient.norm(dim=1, keepdim=True))

    steps = [example(rule) for rule in (None, SGD, ADAM, RMSpropRule(lr=0.1), Normed(lr=0.1))]
    expected = [by_torch(read_one, one) for one in steps]
    monkeypatch.setattr(rows, "_BLOCK", block)
    for one, products in zip(steps, expected, strict=True):
        keep = torch.empty_like(one.weight)
        same(flat(by_torch(read_one, one._replace(keep=keep))), flat(products), sizes(one))
        assert torch.equal(keep, one.weight)
    update = by_torch(update_products, *steps[0][:2])
    assert update.tangential_sq.tolist() == pytest.approx(
        [ref.split(*map(ref.floats, pair))[1] ** 2 for pair in zip(*steps[0][:2], strict=True)], rel=1e-12
    )
