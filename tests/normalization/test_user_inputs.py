"""Models, batches and settings in the forms that users pass: accepted as meant, or refused in the user's words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_normgeo import (
    AffineConvergenceMonitor,
    DigitsDataModule,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    ResNetClassifier,
    RobustnessEvaluation,
    describe_lion,
    evaluate_robustness,
    read_record,
    register_optimizer,
    scale_invariant_units,
    scale_symmetries,
    swap_norm,
)
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization import find_norm, normalize_weight
from lightning_normgeo.robustness import RobustnessSettings
from lightning_normgeo.robustness.inputs import declared_inputs
from lightning_normgeo.utilities.checked_values import nearest, plain_values, short_repr

torch.manual_seed(0)
IMAGES, LABELS = torch.randint(0, 256, (8, 3, 8, 8)) / 255, torch.arange(8) % 5
BATCHES = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]
PICTURE = Image.fromarray((IMAGES[0] * 255).byte().permute(1, 2, 0).numpy())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))
        return out


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Any:
        return PICTURE, int(LABELS[index])


class BatchesByNumber:
    """A sequence of batches that is not an iterator, as in Keras."""

    def __len__(self) -> int:
        return len(BATCHES)

    def __getitem__(self, index: int) -> Any:
        return BATCHES[index]


def evaluate(model: Any = None, data: Any = BATCHES, **changes: Any) -> Any:
    options = {"attacks": "bim", "steps": 2, "progress": False} | changes
    return evaluate_robustness(Net() if model is None else model, data, **options)


# --- batches ----------------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "images of numpy": lambda x, y: [x.numpy(), y],
    "labels of numpy": lambda x, y: (x, y.numpy().astype(np.uint8)),
    "double arrays": lambda x, y: (x.double().numpy(), y.numpy()),
    "double tensors": lambda x, y: (x.double(), y),
    "other byte order": lambda x, y: (x.numpy().astype(">f4"), y.numpy().astype(">i8")),
    "named": lambda x, y: {"image": x.numpy(), "label": y.numpy(), "name": np.array(["a"] * len(x))},
    "list of labels": lambda x, y: (x.numpy(), y.tolist()),
    "read only": lambda x, y: (np.broadcast_to(x.numpy(), x.shape), y),
}


@pytest.fixture(scope="module")
def expected() -> Any:
    return evaluate()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_arrays_are_what_tensors_are(form: Callable[[Tensor, Tensor], Any], expected: Any) -> None:
    assert evaluate(data=[form(*batch) for batch in BATCHES]).results == expected.results


def test_batches_come_in_any_container(expected: Any) -> None:
    for data in (BatchesByNumber(), iter(BATCHES), tuple(BATCHES), DataLoader(TensorDataset(IMAGES, LABELS), 4)):
        assert evaluate(data=data).results == expected.results
    empty = (IMAGES[:0], LABELS[:0])
    assert evaluate(data=[empty, *BATCHES, empty]).results == expected.results


def test_a_function_may_return_arrays(expected: Any) -> None:
    assert evaluate(unpack=lambda batch: [batch[0].numpy(), batch[1].tolist()]).results == expected.results


def test_arrays_in_a_trainer(expected: Any, tmp_path: Any) -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    callback = RobustnessEvaluation(attacks="bim", steps=2, on_unsuitable="raise")
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.test(Module(), DataLoader([FORMS["double arrays"](*batch) for batch in BATCHES], None), verbose=False)
    assert {name: one.correct for name, one in callback.results.items()} == {
        name: one.correct for name, one in expected.results.items()
    }


def test_double_precision_of_the_model_is_kept() -> None:
    report = evaluate(Net().double(), [FORMS["double arrays"](*batch) for batch in BATCHES])
    assert report.settings["precision"] == "fp64"
    assert evaluate(Net().double()).results["clean"].correct == report["clean"].correct


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IMAGES, r"dataloader=Tensor of shape \(8, 3, 8, 8\) yields no batches.*DataLoader\(TensorDataset"),
        (IMAGES.numpy(), r"dataloader=ndarray of shape \(8, 3, 8, 8\) yields no batches.*TensorDataset"),
        ((IMAGES, LABELS), r"images and labels in batches: DataLoader\(TensorDataset\(images, labels"),
        ([IMAGES.numpy(), LABELS.numpy()], r"images and labels in batches: DataLoader"),
        (TensorDataset(IMAGES, LABELS), r"It is a single sample: give DataLoader\(dataset, batch_size=64\)"),
        (Samples(), r"got tuple\(Image, int\). Turn pictures into tensors"),
        ([[(PICTURE, 1), (PICTURE, 2)]], r"Turn pictures into tensors in the data set"),
        (DigitsDataModule(), r"Give its loader: .* setup\('test'\), that of test_dataloader\(\)"),
        ({"test": BATCHES}, r"Give one loader at a time"),
        ([DataLoader(TensorDataset(IMAGES, LABELS), 4)] * 2, r"Give one loader at a time"),
        (3, r"dataloader=3 yields no batches \(images, labels\). Give a DataLoader, or a list of batches"),
        ("data/cifar", r"dataloader='data/cifar' yields no batches"),
        (None, r"dataloader=None yields no batches"),
        ([], r"The dataloader has no samples. An iterator that was used up has none: make a new one"),
        ([(IMAGES.tolist(), LABELS.tolist())], r"got tuple\(list\(list\(list, list, list\), .*\)\). Override Rob"),
        ([(IMAGES.permute(0, 2, 3, 1), LABELS)], r"Channels are the last dimension of \(8, 8, 8, 3\): give images"),
        ([(IMAGES[:, :1], LABELS)], r"The model takes 3 channels, and images \(8, 1, 8, 8\) have 1"),
        ([((IMAGES * 255).byte(), LABELS)], r"Images are bytes.*evaluate_robustness\(unpack=…\).*as images / 255"),
        ([(IMAGES, LABELS + 0.5)], r"not whole numbers.*Override RobustnessEvaluation.unpack, or give evaluate_rob"),
    ],
    ids=[
        "tensor", "array", "pair of tensors", "pair of arrays", "data set", "pictures", "batch of pictures",
        "data module",
        "loaders by name", "list of loaders", "number", "path", "None", "nothing", "lists", "channels last", "grey",
        "bytes", "regression",
    ],
)  # fmt: skip
def test_what_yields_no_batches_is_refused_with_the_remedy(data: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        evaluate(data=data)
    assert len(str(caught.value)) < 500


def test_half_precision_models_name_the_precision() -> None:
    with pytest.raises(
        ConfigurationError, match=r"The batch is float32, the model float16: give batch.to\(torch.float16"
    ):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).half())


@pytest.mark.parametrize("found", [IMAGES, None, (1, 2)], ids=["image", "None", "numbers"])
def test_a_function_that_finds_no_pair_is_named(found: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"unpack\(batch\) returned .*\. Return two tensors: images, labels"):
        evaluate(unpack=lambda batch: found)


# --- models -----------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Any], Any]] = {
    "evaluate_robustness": lambda model: evaluate_robustness(model, BATCHES),
    "scale_invariant_units": lambda model: scale_invariant_units(model, IMAGES),
    "swap_norm": lambda model: swap_norm(model, "gn"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net, r"\) got the class Net. Give a model of it, as Net\(\)"),
        ("gn", r"\(.*, .*\) got 'gn' as its model. Give a torch.nn.Module first"),
        (IMAGES, r"got Tensor of shape \(8, 3, 8, 8\) as its model"),
        (Net().state_dict(), r"got OrderedDict.* as its model"),
        (None, r"got None as its model"),
        (lambda x: x, r"got <function .* as its model"),
    ],
    ids=["class", "name", "batch", "state dict", "None", "function"],
)
def test_what_is_no_model_is_refused(call: Callable[[Any], Any], model: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        call(model)
    assert len(str(caught.value)) < 250


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="The model is on the meta device"):
        evaluate(Net().to("meta"))


# --- example batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [Tensor.numpy, lambda x: x.double().numpy(), Tensor.tolist, lambda x: {"x": x.numpy()}],
    ids=["array", "double array", "list", "named"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_examples_may_be_arrays_and_lists(form: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    example = form(IMAGES)
    assert scale_invariant_units(Net().to(dtype), example) == scale_invariant_units(Net().to(dtype), IMAGES.to(dtype))
    found = swap_norm(Net().to(dtype), "gn", example_batch=example)
    assert found == swap_norm(Net().to(dtype), "gn", example_batch=IMAGES.to(dtype))


def test_lists_of_tokens_stay_whole_numbers() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    assert scale_invariant_units(net, [[1, 2], [3, 4]]) == scale_invariant_units(net, torch.tensor([[1, 2], [3, 4]]))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (IMAGES.double(), r"The batch is float64, the model float32: give batch.to\(torch.float32\)"),
        ((IMAGES * 255).byte(), r"The images are bytes: give images / 255"),
        (IMAGES.permute(0, 2, 3, 1), r"Channels are the last dimension .*: give images.permute\(0, 3, 1, 2\)"),
        (IMAGES[0], r"It is a single sample: give a batch, as images\[None\]"),
        (IMAGES[:, :2], r"The model takes 3 channels, and images \(8, 2, 8, 8\) have 2"),
        (IMAGES.to("meta"), r"The batch is on meta, the model on cpu: give batch.to\('cpu'\)"),
        (BATCHES[0], r"Give the images alone, as batch\[0\]: the second entry looks like labels"),
        (BATCHES, r"Give one batch of tensors, as next\(iter\(loader\)\)\[0\]"),
        (DataLoader(TensorDataset(IMAGES), 4), r"Give one batch of tensors"),
        ((8, 3, 8, 8), r"Give one batch of tensors"),
        ("image.png", r"Give one batch of tensors"),
        ({"image": IMAGES}, r"unexpected keyword argument 'image'. Give one batch as its forward takes it"),
    ],
    ids=["double", "bytes", "channels last", "one", "two channels", "meta", "labels", "batches", "loader", "shape",
         "path", "name"],
)  # fmt: skip
def test_an_example_that_does_not_fit_names_the_remedy(example: Any, message: str) -> None:
    for call in (scale_invariant_units, lambda model, batch: swap_norm(model, "gn", example_batch=batch)):
        with pytest.raises(ConfigurationError, match=f"Net cannot take the example batch.*{message}") as caught:
            call(Net(), example)
        assert "\n" not in str(caught.value)


# --- names and settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["group", "GN", "GroupNorm", "group_norm", "groupnorm"])
def test_norms_are_found_by_what_they_mean(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"norm='.*' is unknown; did you mean 'gn' \(group normalization\)"):
        find_norm(name)


@pytest.mark.parametrize("name", [None, 3, ["gn"], nn.GroupNorm, nn.GroupNorm(2, 4)], ids=lambda x: type(x).__name__)
def test_a_wrong_norm_names_all(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"to=.* is unknown; known are 'bn', 'ln', .*'wn\+mbn'"):
        swap_norm(Net(), name)


def test_of_many_names_the_nearest_come_first() -> None:
    assert nearest("x7", [f"x{k}" for k in range(30)]).startswith("did you mean 'x7' or")
    assert nearest("q", "abc") == "known are 'a', 'b', 'c'"
    assert nearest(3, []) == "known are none"
    assert nearest("zzz", map(str, range(99))).endswith("… (99 in all)")


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (swap_norm, {"layers": 3}, r"layers=3 must be a glob"),
        (swap_norm, {"layers": IMAGES}, r"layers=Tensor of shape .* must be a glob"),
        (swap_norm, {"layers": ["bn", 3]}, r"layers=\['bn', 3\] must be a glob"),
        (swap_norm, {"layers": "bm"}, r"'bm' matches none of the 1 normalization layers; did you mean 'bn'"),
        (swap_norm, {"groups": "2"}, r"groups='2' must be an integer, at least 1"),
        (swap_norm, {"groups": 2.0}, r"groups=2.0 must be an integer"),
        (swap_norm, {"unbiased": "no"}, r"unbiased='no' must be True or False"),
        (swap_norm, {"optimizer": torch.optim.SGD}, r"optimizer=the class SGD must be a torch.optim.Optimizer"),
        (OrthogonalityMonitor, {"layers": 3}, r"OrthogonalityMonitor: layers=3 must be a glob"),
        (OrthogonalityMonitor, {"every_n_steps": "5"}, r"every_n_steps='5'\): must be an integer, at least 1"),
        (NormGrowthMonitor, {"cumulative": "yes"}, r"cumulative='yes' must be True or False"),
        (AffineConvergenceMonitor, {"channel_seed": "0"}, r"channel_seed='0' must be an integer, at least 0"),
        (RobustnessEvaluation, {"num_images": "3"}, r"num_images='3' must be an integer, at least 0"),
        (RobustnessEvaluation, {"after_fit": "no"}, r"after_fit='no' must be True or False"),
        (RobustnessEvaluation, {"name": 3}, r"name=3 becomes part of keys"),
        (ResNetClassifier, {"num_classes": "resnet18"}, r"num_classes='resnet18' must be an integer, at least 2"),
        (ResNetClassifier, {"arch": 18}, r"arch=18 is unknown; known are 'resnet18'"),
        (ResNetClassifier, {"norm": None}, r"norm=None is unknown"),
        (ResNetClassifier, {"input_mean": 0.5}, r"input_mean=\(0.5,\) and input_std=.* must have three values each"),
        (ResNetClassifier, {"input_std": "0.5"}, r"input_std='0.5' must be three numbers"),
        (ResNetClassifier, {"optimizer": "sgd"}, r"optimizer='sgd' must be a dictionary with class_path and init_args"),
        (ResNetClassifier, {"lr_scheduler": "cosine"}, r"lr_scheduler='cosine' must be a dictionary with class_path"),
        (
            normalize_weight,
            {"layer": nn.Linear(3, 3), "kind": "group"},
            r"kind='group' is unknown; known are 'wn', 'cwn'",
        ),
        (read_record, {"run": 3}, r"read_record\(3\): give the path"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or (next(iter(value)) if isinstance(value, dict) else ""),
)
def test_wrong_types_are_refused_by_name(function: Any, options: dict[str, Any], message: str) -> None:
    given = (Net(), "gn" if "unbiased" not in options else "ws") if function is swap_norm else ()
    with pytest.raises(ConfigurationError, match=message):
        function(*given, **options)


def test_functions_have_to_be_functions() -> None:
    with pytest.raises(ConfigurationError, match=r"register_optimizer\(SGD, None\): give a function"):
        register_optimizer(torch.optim.SGD, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"register_optimizer\(SGD \( Parameter Group 0 .*\): give the class"):
        register_optimizer(torch.optim.SGD([torch.zeros(1)], 0.1), describe_lion)  # type: ignore[arg-type]
    for name in ("logits", "unpack"):
        with pytest.raises(ConfigurationError, match=f"{name}='model' must be a function, or left out"):
            evaluate(**{name: "model"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 2.5}, r"num_images=2.5 must be an integer, at least 0"),
        ({"progress": "no"}, r"progress='no' must be True or False"),
        ({"resume_dir": 3}, r"resume_dir=3 must be the path of a folder"),
        ({"mean": "imagenet", "std": 1}, r"mean='imagenet' must be a number, or one for each channel.*without quotes"),
        ({"mean": [0.5, None], "std": 1}, r"mean=\[0.5, None\] must be a number"),
        ({"mean": 0.5, "std": float("nan")}, r"std=nan must be a number"),
        ({"value_range": 255}, r"value_range=255 must be the smallest and the largest value, as \[0, 255\]"),
        ({"value_range": "0,1"}, r"value_range='0,1' must be the smallest"),
        ({"normalized_by": ["model"]}, r"normalized_by=\['model'\] is unknown; choose 'data' or 'model'"),
    ],
    ids=str,
)
def test_what_an_evaluation_cannot_use_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        evaluate(**options)


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"attacks": "bim"}, {"attacks": ["bim"]}),
    ({"attacks": {"pgd", "bim"}}, {"attacks": ["bim", "pgd"]}),
    ({"attacks": np.array(["bim"])}, {"attacks": ["bim"]}),
    ({"eps": np.float64(0.1), "steps": np.int64(3)}, {"eps": 0.1, "steps": 3}),
    ({"eps": torch.tensor(0.5), "seed": torch.tensor(4)}, {"eps": 0.5, "seed": 4}),
    ({"eps": Fraction(1, 2), "eps_l2": np.array([0.5, 1.0])}, {"eps": 0.5, "eps_l2": [0.5, 1.0]}),
    ({"eps": iter([0.25, 0.5]), "upper": range(1, 4)}, {"eps": [0.25, 0.5], "upper": [1, 2, 3]}),
    ({"eps": {0.25, 0.5}, "lower": torch.zeros(3)}, {"eps": [0.25, 0.5], "lower": [0.0, 0.0, 0.0]}),
]


@pytest.mark.parametrize(("given", "meant"), SAME, ids=[str(k) for k in range(len(SAME))])
def test_numbers_and_names_of_any_kind_are_plain(given: dict[str, Any], meant: dict[str, Any]) -> None:
    found, expected = RobustnessSettings(**given), RobustnessSettings(**meant)
    assert found == expected
    assert found.all_attacks == expected.all_attacks
    assert all(type(getattr(found, name)) is type(getattr(expected, name)) for name in meant)


def test_constants_of_a_normalization_have_any_shape() -> None:
    declared = declared_inputs(torch.full((1, 3, 1, 1), 0.5), np.full((3, 1, 1), 0.25))  # type: ignore[arg-type]
    assert (declared.mean, declared.std) == ((0.5,) * 3, (0.25,) * 3)


def test_values_become_plain() -> None:
    found = (
        plain_values({"a": 1}),
        plain_values((np.float32(0.5), [torch.tensor([1, 2])])),
        plain_values("x"),
        plain_values(True),
        plain_values(None),
    )
    assert found == ({"a": 1}, (0.5, [[1, 2]]), "x", True, None)


def test_values_are_shown_in_short() -> None:
    assert short_repr([IMAGES] * 100).startswith("[Tensor of shape (8, 3, 8, 8), ")
    assert all(
        len(short_repr(value)) <= 80 for value in ([IMAGES] * 100, Net(), "x" * 999, {1: {2: {3: IMAGES}}}, range(9))
    )
    assert short_repr("a\nb") == r"'a\nb'"
    assert short_repr(8 / 255) == repr(8 / 255)


@pytest.mark.parametrize(
    ("argument", "attacks"),
    [("bim", ["bim"]), ("[bim, pgd]", ["bim", "pgd"]), ('["torchattacks.FGSM"]', ["torchattacks.FGSM"])],
)
def test_the_command_line_takes_one_attack_or_several(argument: str, attacks: list[str]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(RobustnessEvaluation, "robustness")
    if "torchattacks" in argument:
        pytest.importorskip("torchattacks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = [f"--robustness.{one}" for one in (f"attacks={argument}", "mean=0.5", "std=[0.25]")]
        made = parser.instantiate_classes(parser.parse_args(given)).robustness
    assert made.settings.attacks == attacks
    assert (made.declared.mean, made.declared.std) == ((0.5,), (0.25,))


class Sequences(nn.Module):
    """A network for sequences of several lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.rnn = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.GRU(4, 3)

    def forward(self, packed: PackedSequence) -> Tensor:
        inputs = self.norm(self.embed(packed.data))
        output, _ = self.rnn(PackedSequence(inputs, *packed[1:]))
        return output.data  # type: ignore[no-any-return]


def test_a_packed_sequence_is_one_input() -> None:
    packed = pack_sequence([torch.randn(length, 5) for length in (4, 3, 2)])
    units = scale_invariant_units(Sequences(), packed)
    assert (units["embed"].kind, units["embed"].count) == ("filter", 4)
    assert not scale_symmetries(Sequences(), packed).unknown
