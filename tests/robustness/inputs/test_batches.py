"""Images and labels are found in batches of many forms, classes in labels, and logits in outputs."""

import dataclasses
from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.inputs import class_indices, class_logits, images_and_labels
from lightning_normgeo.robustness.inputs.batches import IMAGE_NAMES, LABEL_NAMES, described

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
WHOLE = [
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip

X = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([2, 0, 1, 1, 0])
INDEX = torch.arange(5)
Named = namedtuple("Named", ["image", "label"])
Odd = namedtuple("Odd", ["number", "first", "second"])


class Typed(NamedTuple):
    target: torch.Tensor
    name: list
    pixels: torch.Tensor


@dataclasses.dataclass
class Plain:
    pixel_values: torch.Tensor
    labels: torch.Tensor
    file: str = "x.png"


@dataclasses.dataclass(frozen=True)
class Unnamed:
    what: torch.Tensor
    is_it: torch.Tensor


class Graph:
    """A batch as in torch_geometric: attributes, but not a sequence."""

    def __init__(self):
        self.x, self.edge_index, self.y = torch.rand(5, 8), torch.zeros(2, 9, dtype=torch.long), Y


def found(batch, images=X, labels=Y):
    got = images_and_labels(batch)
    assert got[0] is images
    assert got[1].tolist() == labels.tolist()
    return True


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, INDEX),
        [X, Y, INDEX, ["a.png"] * 5],
        (X, Y, torch.rand(5, 4, 4)),
        (INDEX, X, Y),
        [["a.png"] * 5, INDEX, X, Y],
        (INDEX, X, Y, INDEX),
        [[X, Y]],
        ([X, Y],),
        [{"image": X, "label": Y}],
        [[[(X, Y, INDEX)]]],
        (X, {"label": Y}),
        (X, {"boxes": torch.rand(5, 2, 4), "labels": Y, "image_id": INDEX}),
        (X, {"anything": Y}),
        [INDEX, X, {"target": Y}],
        (X, Y.tolist()),
        (X, tuple(Y.tolist())),
        [X, Y.double().tolist()],
        {"image": X, "label": Y.tolist()},
        (X, {"label": Y.tolist()}),
        Named(X, Y),
        Odd(["a"] * 5, X, Y),
        Typed(Y, ["a"] * 5, X),
        Plain(X, Y),
        Unnamed(X, Y),
        OrderedDict([("y", Y), ("x", X)]),
        {"what": X, "it_is": Y},
        {"idx": INDEX, "label": Y, "img": X, "path": ["a"] * 5, "mask": torch.zeros(5, 4, 4).long()},
        {"image": X, "mask": torch.rand(5, 1, 4, 4), "label": Y},
        {"image": X, "depth": torch.rand(5, 1, 4, 4), "target": Y, "weight": torch.rand(5)},
        {0: X, 1: Y},
    ],
    ids=lambda batch: described(batch).replace("float32 (5, 3, 4, 4)", "X").replace("int64 (5,)", "Y")[:60],
)
def test_images_and_labels_are_found(batch):
    assert found(batch)


@pytest.mark.parametrize("image", IMAGE_NAMES)
@pytest.mark.parametrize("label", LABEL_NAMES)
def test_every_known_name_is_known_in_any_order_and_case(image, label):
    for names in ((image, label), (image.upper(), label.title()), (image.capitalize(), label.upper())):
        named = dict(zip(names, (X, Y), strict=True))
        more = {"index": INDEX, "mask": torch.rand(5, 1, 4, 4), "path": ["a"] * 5}
        for batch in (named, dict(reversed(named.items())), more | named, named | more):
            assert found(batch)


@PROPERTY
@given(
    st.sampled_from(IMAGE_NAMES),
    st.sampled_from(LABEL_NAMES),
    st.dictionaries(
        st.sampled_from(["index", "idx", "mask", "path", "weight", "attention", "size", "meta", "view", "depth"]),
        st.sampled_from([INDEX, torch.rand(5), torch.rand(5, 1, 4, 4), ["a"] * 5, 3, None, {"a": INDEX}, "text"]),
    ),
    st.randoms(use_true_random=False),
)
def test_names_decide_whatever_else_is_there(image, label, others, random):
    entries = [*others.items(), (image, X), (label, Y)]
    random.shuffle(entries)
    assert found(dict(entries))
    assert found([dict(entries)])
    assert found(OrderedDict(entries))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("shape", [(5, 7), (5, 4, 4), (5, 1, 16), (5, 4, 4, 3), (5, 1, 4, 4, 4)], ids=str)
def test_images_have_two_dimensions_or_more_of_floats_or_bytes(dtype, shape):
    images = (torch.rand(shape) * 100).to(dtype)
    for batch in ((images, Y), (INDEX, images, Y), {"a": images, "b": Y}, {"image": images, "label": Y}):
        assert found(batch, images)


@pytest.mark.parametrize(
    "labels",
    [Y.float(), Y[:, None], Y[:, None].double(), F.one_hot(Y), F.one_hot(Y).float(), Y.bool(), Y.to(torch.uint8)],
    ids=described,
)
def test_labels_have_one_dimension_or_two_of_any_numbers(labels):
    assert found((X, labels), X, labels)
    assert found({"image": X, "label": labels}, X, labels)
    assert found((X, {"label": labels}), X, labels)


VIEWS = [X, X.clone()]


@pytest.mark.parametrize(
    "batch",
    [
        (X, X.clone(), Y),
        (VIEWS, Y),
        ([VIEWS], Y),
        {"image": X, "volume": X.clone(), "label": Y},
        {"x": X, "image": X.clone(), "y": Y},
        {"first": X, "second": X.clone(), "label": Y},
        (X, torch.zeros(5, 4, 4, dtype=torch.long)),
        {"image": X, "mask": torch.zeros(5, 4, 4, dtype=torch.long)},
        (X, torch.rand(5, 1, 4, 4)),
        {"input_ids": torch.ones(5, 9).long(), "attention_mask": torch.ones(5, 9).long(), "labels": Y},
        (torch.ones(5, 9).long(), Y),
        Graph(),
        SimpleNamespace(image=X, label=Y),
        ([torch.rand(3, 4, 4), torch.rand(3, 5, 4)], torch.tensor([0, 1])),
        [torch.rand(3, 4, 4), torch.rand(3, 5, 4)],
        ([torch.rand(3, 4, 4), torch.rand(3, 5, 4)], [{"boxes": torch.rand(1, 4)}, {"boxes": torch.rand(2, 4)}]),
        {"image": X, "label": Y, "class": Y},
        {"image": X, "one": Y, "other": INDEX},
        (X, {"one": Y, "other": INDEX}),
        (X, {"label": Y, "target": INDEX}),
        (X, {}),
        (X, None),
        (X, Y[:4]),
        {"image": X, "label": Y[:4]},
        (X, ["a"] * 5),
        (X, [0, 1, None, 1, 0]),
        (X, Y.to(torch.complex64)),
        (Y, X),
        (X,),
        [X],
        X,
        Y,
        (),
        [],
        {},
        None,
        "image",
        3,
        Plain,
        (torch.rand(5), Y),
        {"label": Y},
        {"image": X},
    ],
    ids=lambda batch: described(batch)[:70],
)
def test_what_could_be_several_things_or_nothing_is_refused_and_described(batch):
    inner = batch
    while isinstance(inner, (tuple, list)) and len(inner) == 1:
        inner = inner[0]
    with pytest.raises(
        UnsuitableError, match=r"Override RobustnessEvaluation\.unpack, or give evaluate_robustness\(unpack=…\)"
    ) as caught:
        images_and_labels(batch)
    assert described(inner) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (X, "float32 (5, 3, 4, 4)"),
        (torch.tensor(1, dtype=torch.bfloat16), "bfloat16 ()"),
        ((X, Y), "tuple(float32 (5, 3, 4, 4), int64 (5,))"),
        ([Y, ["a", 1]], "list(int64 (5,), list(str, int))"),
        ({"a": Y, "b": {"c": None}}, "dict(a: int64 (5,), b: dict(c: NoneType))"),
        (Named(X, Y), "Named(image: float32 (5, 3, 4, 4), label: int64 (5,))"),
        (Plain(X, Y), "Plain(pixel_values: float32 (5, 3, 4, 4), labels: int64 (5,), file: str)"),
        (Graph(), "Graph"),
        (dict.fromkeys("abcdefg", 1), "dict(a: int, b: int, c: int, d: int, e: int, f: int, …)"),
        ([1] * 9, "list(int, int, int, int, …)"),
        ((), "tuple()"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_is_described_in_a_few_words(value, text):
    assert described(value) == text


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("make", [list, tuple, lambda entries: {str(k): v for k, v in enumerate(entries)}])
def test_what_a_description_leaves_out_is_marked(count, make):
    text = described(make([1] * count))
    assert text.endswith(", …)") == (text.count("int") < count)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_whole_numbers_of_any_type_are_classes(dtype):
    expected = torch.tensor([1, 0, 0, 1, 1] if dtype is torch.bool else [3, 0, 99, 1, 0])
    for labels in (expected.to(dtype), expected.to(dtype)[:, None]):
        classes = class_indices(labels)
        assert classes.dtype == torch.int64
        assert classes.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_one_hot_rows_of_any_type_are_classes(dtype):
    for count in (3, 5):
        classes = class_indices(F.one_hot(Y, count).to(dtype))
        assert classes.dtype == torch.int64
        assert classes.tolist() == Y.tolist()


@PROPERTY
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(2, 12), st.sampled_from(WHOLE))
def test_one_hot_rows_are_the_classes_they_were_made_from(numbers, count, dtype):
    labels = torch.tensor([number % count for number in numbers])
    assert class_indices(torch.eye(count)[labels].to(dtype)).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0.9, 0.1], [0.0, 1.0]]), r"float32 \(2, 2\) are not one-hot"),
        (torch.full((4, 3), 1 / 3), r"not one-hot.*soft labels"),
        (torch.tensor([[1, 1, 0], [1, 0, 0]]), r"int64 \(2, 3\) are not one-hot: several classes"),
        (torch.tensor([[True, True], [False, True]]), "not one-hot"),
        (torch.tensor([[0, 0, 0], [1, 0, 0]]), "not one-hot"),
        (torch.tensor([[1, -1], [-1, 1]]), "not one-hot"),
        (torch.tensor([[2, 0], [0, 2]]), "not one-hot"),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), "not one-hot"),
        (torch.tensor([0.5, 1.0]), r"float32 \(2,\) are not whole numbers, so this is no classification"),
        (torch.tensor([[0.25], [1.0]]), "not whole numbers"),
        (torch.tensor([0.0, torch.nan]), "not whole numbers"),
        (torch.zeros(2, 4, 4, dtype=torch.long), r"int64 \(2, 4, 4\) are not one class for each image"),
        (torch.zeros(2, 1, 4, 4), "not one class for each image"),
        (torch.tensor(3), r"int64 \(\) are not one class for each image"),
    ],
    ids=str,
)
def test_targets_that_are_no_single_class_are_refused(labels, message):
    with pytest.raises(UnsuitableError, match=message + r".*RobustnessEvaluation\.unpack"):
        class_indices(labels)


@PROPERTY
@given(st.lists(st.floats(-5, 50, width=32), min_size=1, max_size=8))
def test_numbers_are_classes_exactly_where_all_are_whole(numbers):
    labels = torch.tensor(numbers, dtype=torch.float64)
    if all(number.is_integer() for number in numbers):
        assert class_indices(labels).tolist() == [int(number) for number in numbers]
    else:
        with pytest.raises(UnsuitableError, match="not whole numbers"):
            class_indices(labels)


# --- logits -----------------------------------------------------------------------------------------------------------

Z = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
Output = namedtuple("Output", ["logits", "aux_logits"])


@pytest.mark.parametrize(
    "output",
    [
        Z,
        SimpleNamespace(logits=Z, hidden_states=None),
        SimpleNamespace(loss=None, logits=Z),
        SimpleNamespace(logits=None, scores=Z),
        {"logits": Z},
        {"out": Z},
        {"output": Z, "features": torch.rand(5, 64)},
        {"logits": Z, "scores": Z + 1, "loss": torch.tensor(0.0)},
        OrderedDict(loss=torch.tensor(0.0), logits=Z),
        Output(Z, torch.rand(5, 4)),
        (Z,),
        [Z],
        (Z, None),
        (None, Z, "text", 3),
        Z[:, :, None, None],
        Z[:, :, None],
        {"out": Z[:, :, None, None]},
    ],
    ids=lambda output: described(output)[:60],
)
def test_logits_are_found(output):
    assert torch.equal(class_logits(output), Z)


def test_logits_can_be_differentiated_wherever_they_were_found():
    z = Z.clone().requires_grad_()
    for output in (z, {"logits": z}, (z, None), z[:, :, None, None], z[:, :1], z[:, 0]):
        (gradient,) = torch.autograd.grad(class_logits(output).logsumexp(1).sum(), z)
        assert gradient.any()


@PROPERTY
@given(
    st.lists(st.tuples(st.floats(-80, 80), st.integers(0, 1)), min_size=1, max_size=12),
    st.sampled_from([(), (1,), (1, 1), (1, 1, 1)]),
    st.sampled_from([lambda z: z, lambda z: {"logits": z}, lambda z: (z, None)]),
)
def test_one_logit_stands_for_two_classes_with_the_same_loss(pairs, more, wrapped):
    single, labels = (torch.tensor(part, dtype=torch.float64) for part in zip(*pairs, strict=True))
    scores = class_logits(wrapped(single.view(-1, *more)))
    assert scores.shape == (len(pairs), 2)
    torch.testing.assert_close(
        F.cross_entropy(scores, labels.long(), reduction="none"),
        F.binary_cross_entropy_with_logits(single, labels, reduction="none"),
        rtol=1e-12,
        atol=1e-14,
    )
    torch.testing.assert_close(scores.softmax(1)[:, 1], single.sigmoid(), rtol=1e-12, atol=1e-14)
    assert scores.argmax(1).tolist() == [int(value > 0) for value, _ in pairs]


def test_a_map_of_logits_is_not_flattened():
    scores = torch.rand(5, 4, 2, 2)
    assert class_logits(scores) is scores, "check_labels refuses it with its shape"


@pytest.mark.parametrize(
    "output",
    [
        (Z, Z.clone()),
        [Z, None, Z.clone()],
        (),
        (None,),
        Y,
        {"logits": Y},
        (Y,),
        "logits",
        3,
        1.5,
        None,
        {"probabilities": Z},
        {"logits": [1.0, 2.0]},
        SimpleNamespace(prediction=Z),
        ({"logits": Z}, None),
    ],
    ids=lambda output: described(output)[:60],
)
def test_outputs_without_one_tensor_of_logits_are_refused(output):
    with pytest.raises(UnsuitableError, match=r"Expected logits .*RobustnessEvaluation\.logits") as caught:
        class_logits(output)
    assert described(output) in str(caught.value)
