"""Every known optimizer under the changes that trainings make: its increments are explained, or not claimed."""

import copy
from functools import partial

import lion_pytorch
import pytest
import pytorch_optimizer
import timm.optim
import torch
from timm.optim.adamw import AdamWLegacy
from timm.optim.mars import Mars
from torch import nn

from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.geometry import SGDRule
from lightning_normgeo.geometry.update_rules import registry
from lightning_normgeo.probes.explain import plan
from support import named_optimizers as zoo
from support.named_optimizers import EXPLAINED, MATRICES_ONLY, network, residual, set_gradients, take_steps
from support.tensors import draw

KNOWN = {**EXPLAINED, **MATRICES_ONLY}
SHAPES = {name: [(3, 4), (4, 2, 3, 3), (6,)] if name in EXPLAINED else [(3, 4), (6, 5)] for name in KNOWN}
SLOW_STARTS = {"Rprop"}  # after the first step it does not depend on η
each_known = pytest.mark.parametrize("name", KNOWN)


@pytest.fixture(autouse=True)
def _registry_is_restored(monkeypatch):
    monkeypatch.setattr(registry, "_DESCRIPTIONS", dict(registry._DESCRIPTIONS))


def assert_all_explained(steps, tolerance=1e-12):
    for step in steps:
        assert step.rule is not None
        assert residual(step) < tolerance


def started(name, lr=0.05, **flags):
    parameters = network(*SHAPES[name])
    return parameters, KNOWN[name](parameters, lr=lr, **flags)


@each_known
def test_steps_are_explained(name):
    parameters, optimizer = started(name)
    for step in range(5):
        set_gradients(parameters, step, scale=0.5**step)
        found = take_steps(optimizer)
        assert len(found) == len(parameters)
        assert_all_explained(found)
    if name != "timm LARS":  # its steps are a thousand times smaller
        assert all((step.exact.abs() > 1e-9).any() for step in found)


@each_known
def test_clipped_and_accumulated_gradients_are_explained(name):
    parameters, optimizer = started(name)
    for step in range(3):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for part in range(2):  # gradients accumulate over backward passes
            loss = sum((parameter * draw(*parameter.shape, seed=step + 9 * part)).sum() for parameter in parameters)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        assert_all_explained(take_steps(optimizer))


@each_known
def test_a_warm_up_from_zero_is_explained(name):
    parameters, optimizer = started(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)
    for step in range(4):
        set_gradients(parameters, step)
        found = take_steps(optimizer)
        assert_all_explained(found)
        if step == 0 and name not in SLOW_STARTS:
            assert all((one.exact == 0).all() for one in found)
        scheduler.step()


def adagrad_takes_groups() -> bool:
    first, late = network(SHAPES["Adagrad"][0]), network(SHAPES["Adagrad"][0])
    optimizer = torch.optim.Adagrad(first)
    optimizer.add_param_group({"params": late})
    set_gradients(first + late, 0)
    try:
        optimizer.step()
    except KeyError:
        return False
    return True


@each_known
def test_a_group_that_joins_in_training_is_explained(name):
    parameters, optimizer = started(name)
    for step in range(4):
        if step == 2:
            late = network(SHAPES[name][0], seed=5)
            optimizer.add_param_group({"params": late, "lr": 0.01})
            parameters = parameters + late
            if name == "Adagrad" and not adagrad_takes_groups():
                pytest.skip("torch 2.6 cannot step such a group itself")
        set_gradients(parameters, step)
        assert_all_explained(take_steps(optimizer))


@each_known
def test_a_restored_optimizer_is_explained(name):
    parameters, first = started(name)
    _, second = parameters, KNOWN[name](parameters, lr=0.05)
    for step in range(4):
        set_gradients(parameters, step)
        assert_all_explained(take_steps(first if step < 2 else second))
        if step == 1:
            second.load_state_dict(copy.deepcopy(first.state_dict()))


TENSOR_LR = [name for name in KNOWN if name not in {"lion-pytorch decoupled"}]


@pytest.mark.parametrize("name", TENSOR_LR)
def test_a_learning_rate_may_be_a_tensor_wherever_the_optimizer_takes_one(name):
    parameters = network(*SHAPES[name])
    optimizer = KNOWN[name](parameters, lr=torch.tensor(0.05, dtype=torch.float64))
    for step in range(3):
        set_gradients(parameters, step)
        assert_all_explained(take_steps(optimizer))


@each_known
def test_float32_is_explained_up_to_the_floors(name):
    """The tensors are so large that exact norms differ from the optimizer's own by more than the floors."""
    shapes = [(8, 40)] if name in MATRICES_ONLY else [(8, 10_000)]
    parameters = [nn.Parameter(0.05 * parameter.detach()) for parameter in network(*shapes, dtype=torch.float32)]
    optimizer = KNOWN[name](parameters, lr=0.001)
    for step in range(2):
        set_gradients(parameters, step, scale=0.01)
        for found in take_steps(optimizer):
            assert zoo.over_floors(found) < 1


# --- what is not known ------------------------------------------------------------------------------------------------

UNKNOWN = {
    "timm AdamW clipped": partial(AdamWLegacy, clipping_threshold=1.0),
    "pytorch-optimizer Lion fixed": partial(pytorch_optimizer.Lion, fixed_decay=True, weight_decay=0.1),
    "pytorch-optimizer Lion adanorm": partial(pytorch_optimizer.Lion, adanorm=True),
    "pytorch-optimizer Lion centralized": partial(pytorch_optimizer.Lion, use_gc=True),
    "pytorch-optimizer AdEMAMix cautious": partial(pytorch_optimizer.AdEMAMix, cautious=True),
    "pytorch-optimizer AdEMAMix stable": partial(pytorch_optimizer.AdEMAMix, stable_adamw=True),
    **{
        f"pytorch-optimizer {kind.__name__}": kind
        for kind in (
            pytorch_optimizer.SOAP,
            pytorch_optimizer.Lamb,
            pytorch_optimizer.LARS,
            pytorch_optimizer.AdamP,
            pytorch_optimizer.MARS,
            pytorch_optimizer.Prodigy,
            pytorch_optimizer.ScheduleFreeAdamW,
        )
    },
    "timm Adan": timm.optim.Adan,
    "timm AdaBelief": timm.optim.AdaBelief,
    "timm RMSpropTF": timm.optim.RMSpropTF,
    "timm NvNovoGrad": timm.optim.NvNovoGrad,
    "LBFGS": torch.optim.LBFGS,
    "SparseAdam": torch.optim.SparseAdam,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_no_formula_is_known_none_is_claimed(name):
    parameters = network((4, 6))
    optimizer = UNKNOWN[name](parameters, lr=0.01)
    set_gradients(parameters, 0)
    reads = plan(parameters[0], zoo.rows, optimizer, optimizer.param_groups[0]).reads
    assert reads.rule is None
    assert reads.state == reads.known == ()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, timm.optim.Lion, lion_pytorch.Lion])
@pytest.mark.parametrize("where", ["defaults", "group"])
def test_an_option_of_a_later_version_counts_once_it_is_switched_on(make, where):
    parameters = network((4, 6))
    optimizer = make(parameters, lr=0.01)
    set_gradients(parameters, 0)

    def rule():
        return plan(parameters[0], zoo.rows, optimizer, optimizer.param_groups[0]).reads.rule

    for off in (None, False, 0, 0.0):
        optimizer.defaults["orthogonal"] = optimizer.param_groups[0]["orthogonal"] = off
        assert rule() is not None
    if where == "defaults":
        del optimizer.param_groups[0]["orthogonal"]
        optimizer.defaults["orthogonal"] = 0.5
    else:
        optimizer.param_groups[0]["orthogonal"] = True
    assert rule() is None


def test_labels_of_a_group_change_nothing():
    """Schedulers and users write entries into groups that no optimizer reads."""
    parameters = network((4, 6))
    group = {"params": parameters, "name": "matrices", "max_lr": 1.0, "lr_scale": 0.5, "initial_lr": 1.0}
    optimizer = torch.optim.AdamW([group], lr=0.01)
    set_gradients(parameters, 0)
    assert_all_explained(take_steps(optimizer))


@pytest.mark.parametrize("name", ["timm Lion", "timm LAMB", "lion-pytorch decoupled", "Adagrad", "SGD"])
def test_subclasses_that_keep_step_and_its_helpers_are_known(name):
    parameters, optimizer = started(name)
    kind = type(optimizer)
    optimizer.__class__ = type("Mine", (kind,), {"more": lambda self: None})
    set_gradients(parameters, 0)
    assert_all_explained(take_steps(optimizer))
    for changed in {"_init_group", "_get_clip_grad_norm", "step"} & set(dir(kind)):
        optimizer.__class__ = type("Mine", (kind,), {changed: lambda self, *args: None})
        assert registry.description_of(type(optimizer)) is None


def test_nothing_is_imported_to_recognise_a_class():
    """Recognition is by name: a Lion with timm's name is taken for timm's, any other is not."""
    kind = type("Lion", (torch.optim.Optimizer,), {"step": lambda self: None})
    assert registry.description_of(kind) is None
    kind.__module__ = "timm.optim.lion"
    assert registry.description_of(kind) is registry.RECIPES["timm.optim.lion.Lion"]


def test_all_named_classes_are_tested():
    makers = [maker.func if isinstance(maker, partial) else maker for maker in KNOWN.values()]
    tested = {f"{make.__module__}.{make.__qualname__}" for make in makers}
    aliases = {
        "torch.optim.Muon",
        "torch.optim.Adafactor",
        "torch.optim._muon.Muon",
        "torch.optim._adafactor.Adafactor",
    }
    assert tested >= set(registry.RECIPES) - aliases
    assert {make.__name__ for make in makers} >= {name for name in ("Muon", "Adafactor") if hasattr(torch.optim, name)}


def test_ones_own_description_goes_before_a_name():
    def describe(group, state, dtype):
        return SGDRule(lr=0.5), ()

    registry.register_optimizer(timm.optim.Lion, describe)
    assert registry.description_of(timm.optim.Lion) is describe


@pytest.mark.parametrize("name", ["lion-pytorch decoupled", "timm Lion cautious", "pytorch-optimizer Lion coupled"])
def test_describe_lion_for_a_library_s_lion_is_that_lion(name):
    """Registered as the documentation once said, and with options that it does not know."""
    parameters, optimizer = started(name)
    registry.register_optimizer(type(optimizer), registry.describe_lion)
    for step in range(2):
        set_gradients(parameters, step)
        assert_all_explained(take_steps(optimizer))


# --- what fails, fails for one weight ---------------------------------------------------------------------------------


def test_a_description_that_fails_costs_the_formula_of_that_weight_alone():
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    def describe(group, state, dtype):
        if group["lr"] > 0.05:
            raise LookupError("no such state")
        return SGDRule(lr=group["lr"]), ()

    registry.register_optimizer(Mine, describe)
    one, two = network((2, 3), (2, 3))
    optimizer = Mine([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.01}])
    set_gradients([one, two], 0)
    with pytest.warns(MeasurementWarning, match=r"not explained, since Mine failed: LookupError\('no such state'\)"):
        first, second = take_steps(optimizer)
    assert first.terms is None
    assert_all_explained([second])


ODD = {
    "missing": lambda state: state.pop("exp_avg_sq"),
    "another shape": lambda state: state.update(exp_avg=torch.zeros(2, dtype=torch.float64)),
    "no tensor": lambda state: state.update(exp_avg=0.0),
    "integers": lambda state: state.update(exp_avg=torch.zeros(3, 4, dtype=torch.int64)),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.filterwarnings("ignore::lightning_normgeo.errors.MeasurementWarning")
@pytest.mark.parametrize("name", ["AdamW", "timm AdamP", "timm LAMB", "timm AdamW cautious"])
def test_an_odd_state_costs_the_formula_of_that_weight_alone(name, odd):
    parameters = network((3, 4), (3, 4))
    optimizer = KNOWN[name](parameters, lr=0.01)
    set_gradients(parameters, 0)
    optimizer.step()
    ODD[odd](optimizer.state[parameters[0]])
    first, second = take_steps(optimizer, step=lambda: None)
    assert second.terms is not None
    if odd != "integers" or name == "AdamW":
        assert first.terms is None
    assert torch.isfinite(second.terms.total).all()


@pytest.mark.skipif(not MATRICES_ONLY, reason="torch has no Muon")
def test_a_mixture_of_optimizers_is_explained_by_weight():
    matrices, vectors = network((4, 6), (5, 4)), network((4,), (5,), seed=3)
    muon, adamw = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=1e-3)
    for step in range(3):
        set_gradients(matrices + vectors, step)
        assert_all_explained([*take_steps(muon), *take_steps(adamw)])


def test_nothing_of_an_optimizer_is_written_to():
    for name in KNOWN:
        parameters, optimizer = started(name)
        for step in range(2):
            set_gradients(parameters, step)
            state = copy.deepcopy(optimizer.state_dict())
            tensors = [t.detach().clone() for p in parameters for t in (p, p.grad)]
            zoo.read(optimizer)
            assert all(map(torch.equal, tensors, (t for p in parameters for t in (p, p.grad))))
            assert str(state) == str(optimizer.state_dict())
            optimizer.step()


def test_weights_without_a_gradient_and_scaled_gradients_are_followed():
    """Fused optimizers unscale gradients inside their step, so whole tensors have to be read unscaled, too."""
    parameters = network((3, 4), (3, 4))
    optimizer = KNOWN["timm AdamW cautious"](parameters, lr=0.01)
    set_gradients(parameters, 0)
    parameters[0].grad = None
    plain = zoo.read(optimizer)[2]
    parameters[1].grad *= 8
    optimizer.grad_scale = torch.tensor(8.0)
    (scaled,) = zoo.read(optimizer)[2]
    for a, b in zip(scaled.rule, plain[0].rule, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_mars_of_a_vector_is_adamw():
    parameters = network((6,))
    optimizer = Mars(parameters, lr=0.01, betas_1d=(0.5, 0.6), lr_1d_factor=0.3, weight_decay=0.1)
    for step in range(3):
        set_gradients(parameters, step)
        assert_all_explained(take_steps(optimizer))
