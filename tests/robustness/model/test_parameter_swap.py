"""A temporary parameter swap leaves the model unchanged, also after errors and changes during the evaluation."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.robustness import FoldedModel, folded_model
from lightning_normgeo.robustness.model.parameter_swap import logit_change
from support.folded_models import folds, images, net_of, seen
from support.small_models import Net, worn


def small():
    return net_of(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def parts(net):
    """Return everything that could change: objects, their order and place, values, flags."""
    return [
        (name, list(vars(m)), *((k, id(v)) for d in (m._parameters, m._buffers, m._modules) for k, v in d.items()))
        for name, m in net.named_modules()
    ]


def flags(net):
    return [(p.requires_grad, p.grad is None, p._version, p.stride()) for p in net.parameters()]


@pytest.mark.parametrize("fails", [False, True], ids=["", "exception inside"])
def test_the_model_is_unchanged_bit_by_bit(fails):
    net, x = small(), images(2, 3, 8, 8)
    net[0].weight.requires_grad_(False)
    objects, state, before = parts(net), copy.deepcopy(net.state_dict()), flags(net)
    folded = FoldedModel(net, net, x)
    assert (parts(net), flags(net)) == (objects, before)
    try:
        with folded.active():
            assert parts(net) != objects
            assert "forward" in vars(net[1])
            seen(net, x)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert (parts(net), flags(net)) == (objects, before)
    assert "forward" not in vars(net[1])
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_images_without_finite_logits_show_no_change():
    net, x = small(), images(4, 3, 8, 8)
    x[1, 0, 0, 0] = float("nan")
    assert folded_model(net, net, x) is not None
    assert folded_model(net, net, x[1:2]) is None


def test_stand_ins_can_be_used_again_and_again():
    net, x = small(), images(2, 3, 8, 8)
    folded = FoldedModel(net, net, x)
    found = []
    for _ in range(2):
        with folded.active():
            found.append(net(x))
    assert torch.equal(*found)
    assert not torch.equal(found[0], net(x)), "rounding tells that they were used"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_nothing_is_folded_in_a_compiled_model():
    net, x = small(), images(2, 3, 8, 8)
    compiled = torch.compile(net, backend="eager")
    assert folds(compiled, x) == set()
    inner = small()
    inner[2].compile(backend="eager")
    assert folds(inner, x) == set()


def test_parametrized_weights_are_made_once():
    made = []

    class CumulativeState(nn.Module):
        def forward(self, weight):
            made.append(1)
            return weight.tanh()

    net = small()
    nn.utils.parametrize.register_parametrization(net[4], "weight", CumulativeState())
    x = images(2, 3, 8, 8)
    folded, expected = FoldedModel(net, net, x), net(x)
    made.clear()
    with folded.active():
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)
        seen(net, x)
    assert len(made) == 1
    net(x)
    assert len(made) == 2, "and anew afterwards"
    assert folds(net, x) == {"0"}


def test_weights_of_transposed_convolutions_are_turned_too():
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), parametrizations.weight_norm(nn.Conv2d(4, 4, 3))).double()
    folded = FoldedModel(net, net, images(2, 3, 8, 8))
    assert [layer for layer, _ in folded._parameters] == [net[0]]
    assert not FoldedModel(net, net, images(2, 3, 8, 8), channels_last=False)._parameters
    rows = nn.Sequential(nn.Linear(4, 3))
    assert not FoldedModel(rows, rows, torch.rand(2, 4)).channels_last


def test_models_without_a_graph_are_left_alone():
    net = small()
    assert folded_model(net, torch.no_grad()(net), images(2, 3, 8, 8)) is None
    without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    assert folded_model(without, without, torch.rand(2, 3, 8, 8)).folded == {}


def test_a_function_that_changes_is_found_out():
    """The model does not use a bias of the preceding layer, which the graph cannot show."""
    net = worn(
        Net(
            lambda n, x: n.bn(nn.functional.conv2d(x, n.a.weight)).flatten(1),
            a=nn.Conv2d(3, 4, 3),
            bn=nn.BatchNorm2d(4),
        )
    )
    net, x = net.double().eval(), images(2, 3, 8, 8)
    objects = parts(net)
    with pytest.warns(MeasurementWarning, match=r"changes the logits by up to .* more than rounding"):
        assert folded_model(net, net, x) is None
    assert parts(net) == objects


def test_logits_may_be_called_in_a_way_of_their_own():
    net, x = small(), images(2, 3, 8, 8)

    def logits(images):
        return net(images * 2)[:, :3]

    folded = folded_model(net, logits, x)
    assert list(folded.folded) == ["0"]
    with folded.active():
        assert logits(x).shape == (2, 3)


def test_a_masked_class_is_compared_like_others():
    net, x = small().eval(), images(2, 3, 8, 8)
    masks = iter([-torch.inf, -torch.inf, -torch.inf, 0.0])

    def masked(batch):
        return nn.functional.pad(net(batch), (0, 1), value=next(masks))

    assert logit_change(nullcontext(), masked, x) == 0
    assert logit_change(nullcontext(), masked, x) == torch.inf
    assert folded_model(net, lambda batch: nn.functional.pad(net(batch), (0, 1), value=-torch.inf), x) is not None
