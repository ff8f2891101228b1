"""Parameter groups by role, ready for an optimizer."""

from itertools import chain

import pytest
import torch
from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.symmetries import correct_weight_decay
from support.symmetric_networks import NETWORKS, loss_of, symmetric

ROLES = ["invariant alone", "invariant jointly", "rescaling", "without effect", "none"]


def names_of(module, groups):
    by_id = {id(p): name for name, p in module.named_parameters()}
    return {group["name"]: [by_id[id(p)] for p in group["params"]] for group in groups}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_parameter_is_in_the_group_of_most_of_its_elements(name):
    module, _, symmetries = symmetric(name)
    groups = symmetries.parameter_groups(module)
    found = names_of(module, groups)
    assert sorted(chain(*found.values())) == sorted(name for name, _ in module.named_parameters())
    assert list(found) == [role for role in ROLES if role in found]
    for role, names in found.items():
        for parameter in names:
            counts = {key: int(mask.sum()) for key, mask in symmetries.role_masks(parameter).items()}
            assert counts[role] == max(counts.values())
    assert all(set(group) == {"params", "name"} for group in groups)


def test_roles_of_a_network_with_batch_norms():
    module, _, symmetries = symmetric("convolutions with biases")
    found = names_of(module, symmetries.parameter_groups(module))
    assert found["invariant alone"] == ["stem.weight", "a.weight", "b.weight"]
    assert found["without effect"] == ["stem.bias", "a.bias", "b.bias"]
    assert "norm_a.weight" in found["rescaling"]
    assert found["none"] == ["head.bias"]


def test_options_go_to_the_roles_that_are_named():
    module, batch, symmetries = symmetric("pre-activation")
    groups = symmetries.parameter_groups(module, weight_decay={"invariant jointly": 0.1, "none": 0.0}, lr=0.01)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5)
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"invariant alone": 0.5, "invariant jointly": 0.1, "rescaling": 0.5, "none": 0.0}
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    loss_of(module, batch).backward()
    optimizer.step()


def test_corrected_decay_is_that_of_adamc():
    """W shrinks by λη²/η_max where the scale has no effect, and by λη elsewhere."""
    module, _, symmetries = symmetric("pre-activation")
    decay = {"invariant alone": 0.2, "invariant jointly": 0.1, "rescaling": 0.3}
    groups = symmetries.parameter_groups(module, weight_decay=decay, corrected_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.5, weight_decay=0.0)
    optimizer.register_step_pre_hook(correct_weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    for _ in range(6):
        weights = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        for group, before in zip(optimizer.param_groups, weights, strict=True):
            factor = decay.get(group["name"], 0.0) * lr * (lr / 0.5 if "invariant" in group["name"] else 1.0)
            for p, w in zip(group["params"], before, strict=True):
                assert torch.allclose(p, w * (1 - factor), rtol=1e-14)
    assert lr == pytest.approx(0.5)


def test_frozen_and_unused_parameters():
    module, _, symmetries = symmetric("relu perceptron")
    module.extra = nn.Linear(2, 2)
    module.a.bias.requires_grad_(False)
    found = names_of(module, symmetries.parameter_groups(module))
    assert found["none"] == ["c.bias", "extra.weight", "extra.bias"]
    assert "a.bias" not in chain(*found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": {"invariant": 0.1}}, "did you mean 'invariant alone'"),
        ({"lr": "high"}, "Give a finite number"),
        ({"lr": -1.0}, "Give a finite number"),
        ({"weight_decay": {"none": float("nan")}}, "Give a finite number"),
        ({"weight_decay": 0.1, "corrected_decay": 0}, "largest learning rate"),
        ({"weight_decay": {"rescaling": 0.1}, "corrected_decay": 0.1}, "was not given"),
    ],
)
def test_wrong_options_are_refused(options, message):
    module, _, symmetries = symmetric("relu perceptron")
    with pytest.raises(ConfigurationError, match=message):
        symmetries.parameter_groups(module, **options)


def test_another_module_is_refused():
    module, _, symmetries = symmetric("relu perceptron")
    module.a = nn.Linear(3, 5)
    with pytest.raises(ConfigurationError, match="another module"):
        symmetries.parameter_groups(module)
